import random

import pytest
import torch
from oracles import SPIECE

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


def test_the_trained_tokenizer_reads_capitals_as_small_letters():
    tokenizer = Tokenizer.train(CAPTIONS)
    for text in CAPTIONS:
        for same in (text.title(), text.upper(), f"\ufeff{text}", f"\ufeff\ufeff {text}", text.replace("r", "Ｒ")):
            assert tokenizer.encode(same) == tokenizer.encode(text) and not tokenizer.unknown(same)
    mixed = Tokenizer.train([text.title() if i % 2 else text.upper() for i, text in enumerate(CAPTIONS)])
    assert pieces_of(mixed) == pieces_of(tokenizer)
    flan = Tokenizer(SPIECE.read_bytes(), length=256, extra=100)
    assert flan.encode("A Red Circle") != flan.encode("a red circle") == flan.encode("\ufeffa red circle")


def pieces_of(tokenizer):
    return [tokenizer.pieces.id_to_piece(i) for i in range(len(tokenizer))]


def test_a_tokenizer_names_words_that_it_does_not_know_and_what_it_cuts():
    tokenizer = Tokenizer.train(CAPTIONS)
    assert tokenizer.unknown("A RED ziggurat, a blue star?") == ["ziggurat,", "star?"]
    assert tokenizer.unknown("") == tokenizer.unknown("a Blue CIRCLE") == []
    assert tokenizer.unknown("赤い red \ud800") == ["赤い"]
    fitting = " ".join(["red"] * 63)
    assert tokenizer.cut(fitting) == 0 and tokenizer.cut(f"{fitting} red blue") == 2
    flan = Tokenizer(SPIECE.read_bytes(), length=256, extra=100)
    assert flan.unknown("A Red Circle 赤 ☃ café") == ["赤", "☃"]
    assert flan.cut("red " * 255) == 0 and flan.cut("red " * 300) == 45


HAN = "".join(map(chr, range(0x4E00, 0x4E00 + 5400)))
UNUSUAL = {  # captions that a tokenizer is trained on: whether the first is read without an unknown piece
    "more characters than pieces": ([HAN[i::60] for i in range(60)], True),
    "more characters than pieces, spaces between": ([" ".join(HAN[i::60]) for i in range(60)], True),
    "a lone surrogate": (["a red \ud800 circle", "a star \udcff"], True),
    "a NUL byte": (["a\0b", "a red circle"], False),
    "one letter": (["a"], True),
    "the same letter": (["a"] * 100, True),
    "some empty": (["a star", "", "  "], True),
    "a hundred thousand characters": (["a red circle " * 7_700], True),
    "many spaces before": ([" " * 10_000 + "a red circle"], True),
    "a word of a million characters": (["ab" * 500_000], True),
    "a character that stands for 18": (["\ufdfa" * 5000], True),
    "sentencepiece's own signs": (["\u2585 red", "a \u2581 b"], False),
    "pieces with a meaning": (["<unk> </s> <pad> a"], False),
    "several lines": (["a red\ncircle\ttoo\r\n"], True),
    "a byte-order mark": (["\ufeffa red circle"], True),
}


@pytest.mark.parametrize("case", UNUSUAL)
def test_a_tokenizer_is_trained_on_unusual_captions(case):
    captions, known = UNUSUAL[case]
    tokenizer = Tokenizer.train(captions)
    assert 3 < len(tokenizer) <= 4096 and Tokenizer.train(captions).model == tokenizer.model
    assert (not tokenizer.unknown(captions[0])) == known
    tokens, mask = tokenizer(captions)
    assert tokens.max() < len(tokenizer) and tokens.shape[1] <= 64


@pytest.mark.parametrize("captions", [[], [""], [" ", "\n\t"], ["\ufeff"], ["\u200b", "\ud800"]])
def test_captions_without_a_character_are_refused(captions):
    with pytest.raises(ValueError, match="no caption has a character") as error:
        Tokenizer.train(captions)
    assert "\n" not in str(error.value)


def test_rare_letters_are_pieces_and_bytes_come_only_where_they_are_needed():
    tokenizer = Tokenizer.train(["a red circle above a blue square"] * 2000 + ["jazz", "quiz?"])
    assert tokenizer.unknown("jazz quiz?") == [] and "<0x00>" not in pieces_of(tokenizer)
    frequent = random.Random(0).choices(HAN[:500], k=4000) + list(HAN)
    many = Tokenizer.train(["".join(frequent[i::60]) for i in range(60)])
    assert "<0x00>" in pieces_of(many) and set(HAN[:500]) <= set(pieces_of(many))
    assert many.unknown("Ünknown ☃") == []
