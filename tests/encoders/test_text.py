import torch

from encoders.t5 import T5Config, T5Encoder, Tokenizer, directed_bias, relative_buckets

COLOURS, SHAPES = ("red", "blue", "green"), ("circle", "star")
CAPTIONS = [f"a {c} {s} above a {d} square" for c in COLOURS for s in SHAPES for d in ("pink", "red")]


def test_buckets_by_hand():
    """32 buckets to distance 128: T5's published table, at some distances (key minus query)."""
    table = relative_buckets(200, 32, 128)
    at = lambda distance: table[max(0, -distance), max(0, distance)].item()
    assert [at(d) for d in (0, -1, -7, -8, -11, -12, -127, -199)] == [0, 1, 7, 8, 8, 9, 15, 15]
    assert [at(d) for d in (1, 7, 8, 16, 32, 64, 128)] == [17, 23, 24, 26, 28, 30, 31]


def test_bias_starts_near_and_on_one_side():
    table = relative_buckets(60, 32, 128)
    bias = directed_bias(32, 128, 4)[table]  # (query, key, head)
    at = lambda distance, head: bias[max(0, -distance), max(0, distance), head].item()
    assert [at(d, 0) for d in (0, -1, -7, -8, 1, 3)] == [0, -1, -7, -8, -5, -7]  # the first head looks left
    assert [at(d, 1) for d in (0, 1, 7, -1, -3)] == [0, -1, -7, -5, -7]  # the second looks right
    assert abs(at(-5, 2) + 1.5) < 1e-6 and abs(at(5, 3) + 1.5) < 1e-6  # the last pair sees further


def test_encoder_ignores_padding_and_knows_order():
    model = T5Encoder(T5Config(vocabulary=50, width=32, heads=2, head_width=8, mlp_width=40)).double()
    tokens = torch.randint(3, 50, (2, 6))
    mask = torch.ones(2, 6, dtype=torch.bool)
    mask[1, 4:] = False
    out = model(tokens, mask)
    changed = tokens.clone()
    changed[1, 4:] = 7
    torch.testing.assert_close(model(changed, mask)[mask], out[mask])
    longer = torch.cat([tokens, torch.zeros(2, 3, dtype=torch.long)], 1)
    longer_mask = torch.cat([mask, torch.zeros(2, 3, dtype=torch.bool)], 1)
    torch.testing.assert_close(model(longer, longer_mask)[:, :6][mask], out[mask])
    assert (model(tokens.flip(1), mask.fill_(True)).flip(1) - out)[0].abs().max() > 1e-3


def test_encoder_keeps_values_of_order_one():
    out = T5Encoder(T5Config())(torch.randint(0, 512, (4, 12)), torch.ones(4, 12, dtype=torch.bool))
    assert 0.8 < out.std() < 1.2


def test_tokenizer_pads_cuts_and_ends():
    tokenizer = Tokenizer.train(CAPTIONS)
    tokens, mask = Tokenizer(tokenizer.model, length=5)(["a red circle above a pink square", "a star"])
    assert tokens.shape == (2, 5) and mask.sum(1).tolist()[0] == 5
    assert tokens[0, -1] == 1 and tokens[1][mask[1]][-1] == 1 and (tokens[1][~mask[1]] == 0).all()
    assert Tokenizer.train(CAPTIONS).model == tokenizer.model
    again = Tokenizer(tokenizer.model)(["a blue star"])
    assert torch.equal(again[0], tokenizer(["a blue star"])[0])
    empty, mask = tokenizer([""])
    assert empty.tolist() == [[1]] and mask.all()
