import pytest
import torch

from conditioning import masked_mean
from dit import MLP, GenTron, ModelConfig, TimestepEmbedding, patchify, position_embedding, unpatchify

SMALL = dict(depth=2, width=24, heads=3, channels=3, out_channels=3, text_widths=(10,), qk_norm=True)


def small(**changes):
    return GenTron(ModelConfig(**SMALL | changes)).double()


def inputs(batch=3, length=5, width=10, height=8, columns=8):
    x = torch.randn(batch, 3, height, columns, dtype=torch.float64)
    t = torch.tensor([5, 500, 999])[:batch]
    text = torch.randn(batch, length, width, dtype=torch.float64)
    mask = torch.arange(length) < torch.tensor([[length], [2], [3]])[:batch]
    return x, t, (text,), (mask,)


@torch.no_grad()
def shake(model):
    """Moves every parameter off its initial value, so that no branch is silent."""
    for p in model.parameters():
        p.add_(0.1 * torch.randn_like(p))
    return model


def test_patchify_by_hand_and_back():
    x = torch.arange(2 * 3 * 4 * 6).reshape(2, 3, 4, 6)
    tokens = patchify(x, 2)
    assert tokens.shape == (2, 6, 12)
    # the second token is rows 0-1, columns 2-3; its first three numbers are the three channels of its first pixel
    assert tokens[1, 1, :3].tolist() == x[1, :, 0, 2].tolist() and tokens[1, 3, :3].tolist() == x[1, :, 2, 0].tolist()
    assert torch.equal(unpatchify(tokens, 2, 4, 6), x)
    with pytest.raises(ValueError, match="5×6"):
        patchify(torch.zeros(1, 3, 5, 6), 2)


def test_positions_are_sinusoids_of_column_and_row():
    table = position_embedding(3, 5, 16)
    assert table.shape == (15, 16)
    i = 2 * 5 + 4  # row 2, column 4
    for k in range(4):
        w = 10000 ** (-k / 4)
        expected = [torch.tensor(f(p * w)) for p in (4, 2) for f in (__import__("math").sin, __import__("math").cos)]
        got = table[i, [k, 4 + k, 8 + k, 12 + k]]
        torch.testing.assert_close(got, torch.stack(expected).float())
    assert torch.cdist(table, table).fill_diagonal_(1).min() > 0.05  # no two places look alike
    wide, apart = position_embedding(3, 13, 16), position_embedding(3, 4, 16, step=4.0)
    torch.testing.assert_close(apart[:4], wide[:13:4])  # the first row: every fourth of a grid of step 1


def test_output_is_zero_at_the_start_and_every_branch_moves_within_two_steps():
    model = small()
    x, t, text, mask = inputs()
    dropped = torch.tensor([False, True, False])
    assert (model(x, t, text, mask, dropped) == 0).all()
    moved = set()
    target = torch.randn_like(x)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    for _ in range(3):
        (model(x, t, text, mask, dropped) - target).square().mean().backward()
        moved |= {name for name, p in model.named_parameters() if p.grad is not None and p.grad.abs().max() > 0}
        optimizer.step()
        optimizer.zero_grad()
    silent = {name for name, _ in model.named_parameters()} - moved
    # a bias that adds the same to all keys cannot change a softmax, but under QK-norm it does
    assert not silent, silent
    zeros = [n for n, p in small().named_parameters() if p.dim() > 1 and not p.any()]
    assert len(zeros) == 2 + 2 + 2  # two blocks: adaLN and cross-attention's output; the final layer's two


@pytest.mark.rounding
@pytest.mark.parametrize("integration", ["cross", "adaln"])
def test_padding_changes_nothing(integration):
    model = shake(small(integration=integration))
    x, t, (text,), (mask,) = inputs()
    before = model(x, t, (text,), (mask,))
    garbage = torch.where(mask[..., None], text, 1e3 * torch.randn_like(text))
    longer = torch.cat([garbage, 1e3 * torch.randn(3, 4, 10, dtype=torch.float64)], 1)
    longer_mask = torch.cat([mask, torch.zeros(3, 4, dtype=torch.bool)], 1)
    torch.testing.assert_close(model(x, t, (longer,), (longer_mask,)), before, rtol=0, atol=1e-6)
    changed = text.clone()
    changed[1, 1] += 1  # a word, not padding
    assert (model(x, t, (changed,), (mask,)) - before)[1].abs().max() > 1e-4
    assert torch.equal((model(x, t, (changed,), (mask,)) - before)[0], torch.zeros_like(x[0]))


@pytest.mark.parametrize("null_tokens", [1, 7])
def test_dropped_rows_see_the_null_text_and_nothing_of_the_caption(null_tokens):
    model = shake(small(null_tokens=(null_tokens,)))
    x, t, text, mask = inputs()
    dropped = torch.tensor([False, True, True])
    out = model(x, t, text, mask, dropped)
    other = model(x, t, (torch.randn_like(text[0]),), (~mask[0],), dropped)
    torch.testing.assert_close(out[1:], other[1:])
    assert (out[0] - other[0]).abs().max() > 1e-4
    # and it is exactly as if the null tokens had been given as a caption
    null = model.condition.null[0].detach().expand(3, -1, -1)
    as_text = model(x, t, (null,), (torch.ones(3, null_tokens, dtype=torch.bool),))
    torch.testing.assert_close(out[1:], as_text[1:])


def test_two_encoders_take_turns_in_the_blocks_and_are_added_in_the_vector():
    """CLIP-T5 (paper, section 3.2): block 0 reads the first text, block 1 the second, block 2 the first again. With the
    pooling MLPs silenced, a text whose blocks are silenced too leaves no trace."""
    two = dict(depth=3, text_widths=(10, 14), null_tokens=(2, 3), pooling=("last", "mean"))
    model = shake(small(**two))
    x, t, (first,), (mask,) = inputs()
    second, second_mask = torch.randn(3, 4, 14, dtype=torch.float64), torch.ones(3, 4, dtype=torch.bool)
    out = lambda a, b: model(x, t, (a, b), (mask, second_mask))
    assert [block.cross_attention.attention.kv.in_features for block in model.blocks] == [10, 14, 10]
    pooled = model.condition((first, second), (mask, second_mask), torch.zeros(3, dtype=torch.bool))[1]
    by_hand = model.condition.pool[0](torch.stack([first[0, 4], first[1, 1], first[2, 2]]))  # masks of 5, 2 and 3 words
    torch.testing.assert_close(pooled, by_hand + model.condition.pool[1](second.mean(1)))
    with torch.no_grad():
        for mlp in model.condition.pool:
            mlp[2].weight.zero_()
        model.blocks[1].cross_attention.attention.out.weight.zero_()
    before = out(first, second)
    assert torch.equal(out(first, second + 1), before) and (out(first + 1, second) - before).abs().max() > 1e-4
    other = shake(small(**two))
    with torch.no_grad():
        for mlp in other.condition.pool:
            mlp[2].weight.zero_()
        for k in (0, 2):
            other.blocks[k].cross_attention.attention.out.weight.zero_()
    model = other
    assert torch.equal(out(first + 1, second), out(first, second)) and (out(first, second + 1) - out(first, second)).abs().max() > 1e-4
    with pytest.raises(ValueError, match="2 text widths, 1 null texts"):
        small(text_widths=(10, 14), pooling=("mean", "mean"))


def test_a_caption_without_a_token_is_the_null_text():
    """So every query of an image has a token to attend to."""
    model = shake(small())
    x, t, text, (mask,) = inputs()
    mask[1] = False
    expected = model(x, t, text, (mask | True,), torch.tensor([False, True, False]))[1]
    torch.testing.assert_close(model(x, t, text, (mask,))[1], expected)


def test_keys_and_values_that_are_kept_are_computed_once():
    """As in sampling: further calls with the same text give the same, and project no text."""
    model = shake(small())
    x, t, text, mask = inputs()
    kept, calls = {}, []
    for block in model.blocks:
        block.cross_attention.attention.kv.register_forward_hook(lambda *_: calls.append(1))
    first = model(x, t, text, mask, kept=kept)
    assert len(calls) == 2 * len(model.blocks)  # captions, and the null text
    torch.testing.assert_close(model(x + 1, t, text, mask, kept=kept), model(x + 1, t, text, mask))
    assert torch.equal(model(x, t, text, mask, kept=kept), first) and len(calls) == 4 * len(model.blocks)


def test_frozen_text_gets_no_gradient():
    """Only weights do, which a third of the text's backward pass is spared."""
    model = shake(small())
    x, t, text, mask = inputs()
    seen = []
    model.blocks[0].cross_attention.attention.kv.register_forward_hook(lambda _, given, out: seen.append(given[0].requires_grad))
    model(x, t, text, mask, torch.tensor([False, True, False]))
    assert seen == [True, False]  # the null text learns; captions do not


def test_masked_mean_by_hand():
    """Of two words, of none, and of one."""
    text = torch.tensor([[[2.0], [4.0], [100.0]], [[1.0], [5.0], [9.0]], [[7.0], [5.0], [9.0]]])
    mask = torch.tensor([[True, True, False], [False, False, False], [True, False, False]])
    assert masked_mean(text, mask).tolist() == [[3.0], [0.0], [7.0]]


def test_class_labels_take_the_place_of_text():
    """DiT: changing the label changes the picture; a dropped label is the last row of the table."""
    model = shake(small(integration="class", classes=4))
    x, t, *_ = inputs()
    labels = torch.tensor([0, 1, 3])
    out = model(x, t, labels)
    assert (out - model(x, t, torch.tensor([0, 2, 3])))[1].abs().max() > 1e-6
    no = torch.ones(3, dtype=torch.bool)
    torch.testing.assert_close(model(x, t, labels, dropped=no), model(x, t, torch.full((3,), 4)))
    assert not any("cross" in name for name, _ in model.named_parameters())


def test_any_grid_that_the_patch_divides():
    model = shake(small())
    _, t, text, mask = inputs()
    assert model(torch.randn(3, 3, 4, 10, dtype=torch.float64), t, text, mask).shape == (3, 3, 4, 10)


def test_samples_do_not_see_each_other():
    model = shake(small())
    x, t, text, mask = inputs()
    whole = model(x, t, text, mask)
    alone = model(x[1:2], t[1:2], (text[0][1:2],), (mask[0][1:2],))
    torch.testing.assert_close(whole[1:2], alone)


@pytest.mark.parametrize(
    "size, depth, D, heads, millions",
    [("S", 12, 384, 6, 33), ("B", 12, 768, 12, 130), ("L", 24, 1024, 16, 458), ("XL", 28, 1152, 16, 675)],
)
def test_sizes_are_DiTs(size, depth, D, heads, millions):
    """DiT's S/2 to XL/2 (its table 1 and models.py), and their parameters, with labels and learned variance: each layer's
    weights and biases, added by hand, are its table 4."""
    config = ModelConfig.of(size, integration="class", classes=1000, out_channels=8)
    assert (config.depth, config.width, config.heads, config.patch, config.position_step) == (depth, D, heads, 2, 1.0)
    with torch.device("meta"):
        model = GenTron(config)
    block = (3 * D * D + 3 * D) + (D * D + D) + (8 * D * D + 5 * D) + (6 * D * D + 6 * D)  # q, k, v; out; MLP; adaLN
    ends = (2 * 2 * 4 * D + D) + (2 * D * D + 2 * D + 2 * 2 * 8 * D + 2 * 2 * 8)  # patches to tokens; the final layer
    conditions = (256 * D + D + D * D + D) + 1001 * D  # the timestep; the labels, with the null label
    count = sum(p.numel() for p in model.parameters())
    assert count == depth * block + ends + conditions
    assert count + 256 * D == pytest.approx(millions * 1e6, abs=0.6e6)  # DiT counts its table of fixed positions


def test_the_smallest_size_spans_what_DiTs_256_tokens_span():
    assert ModelConfig.of("mini").position_step * 4 == 16  # 4×4 tokens in the demo, 16×16 in DiT
    assert ModelConfig.of("mini", position_step=1.0) == ModelConfig() == ModelConfig(
        depth=6, width=192, heads=4, channels=4, out_channels=4, text_widths=(128,), null_tokens=(1,), classes=0
    )


def test_sizes():
    # GenTron's two (paper, Table 1), both encoders interleaved, by the reconstruction in dit.py
    clip_t5 = dict(text_widths=(768, 4096), null_tokens=(77, 256), pooling=("last", "mean"), out_channels=8)
    for size, count in (("XL", 930.0e6), ("G", 3083.8e6)):
        with torch.device("meta"):
            model = GenTron(ModelConfig.of(size, **clip_t5))
        assert sum(p.numel() for p in model.parameters()) == pytest.approx(count, rel=1e-3)
    with pytest.raises(ValueError, match="'huge' is not one of mini, S"):
        ModelConfig.of("huge")
    with pytest.raises(ValueError, match="integration 'none'"):
        GenTron(ModelConfig(integration="none"))


def test_timestep_waves_are_DiTs():
    """256 of them, which the MLP reads."""
    embedding = TimestepEmbedding(8)
    t = torch.tensor([3.0, 700.0])
    half = torch.exp(-torch.log(torch.tensor(10000.0)) * torch.arange(128) / 128)
    expected = torch.cat([torch.cos(t[:, None] * half), torch.sin(t[:, None] * half)], -1)
    torch.testing.assert_close(embedding(t), embedding.mlp(expected), rtol=1e-4, atol=1e-4)


def test_gelu_and_norms_are_DiTs():
    """GELU in its tanh form, and LayerNorm with 1e-6 under the root."""
    x = torch.randn(5, 8, dtype=torch.float64)
    into, _, out = mlp = MLP(8, 4).double()
    y = into(x)
    gelu = 0.5 * y * (1 + torch.tanh((2 / torch.pi) ** 0.5 * (y + 0.044715 * y**3)))
    torch.testing.assert_close(mlp(x), out(gelu), rtol=0, atol=1e-9)
    model = small(temporal=True, qk_norm=False)
    norms = [module for module in model.modules() if isinstance(module, torch.nn.LayerNorm)]
    x = 1e-3 * torch.randn(5, 24, dtype=torch.float64)
    expected = (x - x.mean(1, keepdim=True)) / (x.var(1, correction=0, keepdim=True) + 1e-6).sqrt()
    assert len(norms) == 2 * 4 + 1
    for norm in norms:
        torch.testing.assert_close(norm(x), expected)


def test_starting_values():
    """Xavier's, DiT's 0.02, null texts as large as an encoder's tokens, and no biases."""
    text, labels = small(width=96, text_widths=(64,), null_tokens=(50,)), small(width=96, integration="class", classes=100)
    assert text.condition.null[0].std().item() == pytest.approx(1, rel=0.1)
    for table in (text.time.mlp[0].weight, text.time.mlp[2].weight, labels.condition.table.weight):
        assert table.std().item() == pytest.approx(0.02, rel=0.1)
    kv = text.blocks[1].cross_attention.attention.kv.weight  # (192, 64)
    assert kv.std().item() == pytest.approx((2 / (192 + 64)) ** 0.5, rel=0.1)
    assert not any(p.any() for name, p in text.named_parameters() if name.endswith("bias"))


@pytest.mark.parametrize("pooling", ["mean", "last"])
def test_all_is_computed_on_the_inputs_device(pooling):
    """The meta device stands for a GPU: a tensor made on the CPU does not go with its own."""
    with torch.device("meta"):
        model = GenTron(ModelConfig(**SMALL | dict(temporal=True, pooling=(pooling,))))
        x, t = torch.empty(2, 3, 3, 4, 4), torch.empty(2, dtype=torch.long)
        text, mask = torch.empty(2, 5, 10), torch.empty(2, 5, dtype=torch.bool)
    out = model(x, t, (text,), (mask,))
    assert out.device.type == "meta" and out.shape == x.shape


def test_checkpointing_is_off_unless_asked_for_and_changes_no_gradient():
    model = shake(small())
    assert not model.checkpointing
    batch, gradients = inputs(), []
    for model.checkpointing in (False, True):
        gradients.append(torch.autograd.grad(model(*batch).square().sum(), list(model.parameters())))
    torch.testing.assert_close(*gradients)
