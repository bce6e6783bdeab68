"""The noise of a step: unit Gaussian, without repeats, a row's own whoever computes it. Batches read ahead; captions
tokenised once."""
import threading
from types import SimpleNamespace

import pytest
import torch

from data import tar_shards
from encoders.t5 import Tokenizer
from training import models
from training.batches import Captions, Step, TarReader, ahead, steps_of


@pytest.mark.parametrize("shape", [(8, 4, 4), (3, 5, 7), (2, 8, 4, 4), (1, 1, 1)])
def test_a_rows_noise_does_not_depend_on_who_computes_it(shape):
    whole = Step(5, 9, slice(0, 12), 12).noise(shape)
    parts = [Step(5, 9, slice(start, start + 3), 12).noise(shape) for start in (0, 3, 6, 9)]
    assert whole.shape == (12, *shape) and torch.equal(whole, torch.cat(parts))
    assert torch.equal(Step(5, 9, slice(0, 3), 12).times(4).noise(shape), whole)


def test_the_noise_is_gaussian():
    """Its first four moments, its tail, and its correlations within and between rows, each to 5 standard errors."""
    x = torch.cat([Step(0, step, slice(0, 64), 64).noise((16, 16, 16)) for step in range(4)]).double().flatten(1)  # (256, 4096)
    n = x.numel()
    for power, mean, variance in ((1, 0, 1), (2, 1, 2), (3, 0, 15), (4, 3, 96)):
        assert abs((x**power).mean().item() - mean) < 5 * (variance / n) ** 0.5
    tail = 2.7e-3 * n  # beyond 3
    assert abs((x.abs() > 3).sum().item() - tail) < 5 * tail**0.5 and x.isfinite().all()
    for a, b in ((x[:, 1:], x[:, :-1]), (x[1:], x[:-1]), (x[:, :2048], x[:, 2048:]), (x[:64], x[64:128])):
        assert abs((a * b).mean().item()) < 5 / a.numel() ** 0.5
        assert abs((a.square() * b.square()).mean().item() - 1) < 5 * (8 / a.numel()) ** 0.5


def test_no_two_rows_steps_or_seeds_share_noise():
    """100,000 first numbers of rows: as many different ones as there are, up to what fp32 itself merges."""
    first = [Step(seed, step, slice(0, 250), 250).noise((1,)).flatten() for seed in range(20) for step in range(20)]
    first = torch.cat(first)
    merged = len(first) - len(first.unique())
    expected = sum(len(torch.randn(len(first)).unique()) for _ in range(3)) / 3
    assert merged < 1.5 * (len(first) - expected) + 20


@pytest.mark.parametrize("rank", ["0", "1"])
def test_a_damaged_sample_is_told_by_the_rank_that_met_it(pictures, tmp_path, monkeypatch, capsys, rank):
    """On stderr: the other ranks' stdout leads nowhere. Two ranks of two rows; all pictures but one are damaged later."""
    tar_shards.main([str(pictures / "data"), str(tmp_path)])
    dataset = tar_shards.TarShards(tmp_path, 32)
    raw = bytearray((tmp_path / "00000.tar").read_bytes())
    for offset, size in dataset.rows[1:, :2]:
        raw[offset : offset + size] = bytes(size)
    (tmp_path / "00000.tar").write_bytes(raw)
    monkeypatch.setenv("RANK", rank)
    monkeypatch.setenv("WORLD_SIZE", "2")
    flags = SimpleNamespace(seed=0, batch_size=4, accumulate=1, workers=0)
    names, found, captions = TarReader(dataset, flags)(steps_of(flags, 0)[0])
    told = capsys.readouterr()
    assert found.shape == (2, 3, 32, 32) and "is left out, another takes its place" in told.err and "left out" not in told.out


def test_batches_are_read_one_step_ahead_on_the_device():
    """The meta device stands for a GPU."""
    read, others = [], set()

    def batch(step):
        read.append(step)
        others.add(threading.get_ident())
        return dict(names=[str(step)], x=torch.zeros(2), text=[(torch.ones(1), torch.ones(1))])

    batches = ahead(batch, range(4), torch.device("meta"))
    first = next(batches)
    assert first["names"] == ["0"] and first["x"].is_meta and first["text"][0][1].is_meta
    while len(read) < 2:  # the second one is being read already
        pass
    assert [found["names"][0] for found in batches] == ["1", "2", "3"] and read == [0, 1, 2, 3]
    assert others and threading.get_ident() not in others
    assert [found["names"][0] for found in ahead(batch, range(3), torch.device("cpu"))] == ["0", "1", "2"]
    assert threading.get_ident() in others  # on a CPU the step itself reads


def test_an_error_while_reading_ahead_reaches_the_step():
    def batch(step):
        raise ValueError(f"no batch {step}")

    with pytest.raises(ValueError, match="no batch 0"):
        list(ahead(batch, range(3), torch.device("meta")))


def test_captions_tokenised_once_are_those_of_each_batch():
    captions = [f"a {'very ' * (i % 7)}small circle {i}" for i in range(2500)]
    tokenizers = Tokenizer.train(captions[:9]), Tokenizer.train(captions[-9:])
    tokenize = lambda texts: [tokenizer(texts) for tokenizer in tokenizers]
    kept = Captions(tokenize, SimpleNamespace(captions=captions))
    for indices in ([3], [0, 2499, 7, 7, 1200], range(0, 2500, 11)):
        expected = tokenize([captions[i] for i in indices])
        for (tokens, mask), (known, known_mask) in zip(kept(torch.tensor(list(indices)), torch.rand(len(indices))), expected):
            assert torch.equal(mask, known_mask) and torch.equal(tokens * mask, known * known_mask)


def test_the_words_of_all_captions_of_a_picture_are_known():
    several = SimpleNamespace(variants=[["red"], ["blue", "green star"]], captions=["red", "blue"])
    assert models.vocabulary(models.some_captions(several, 2)) == ["blue", "green", "red", "star"]
    assert models.some_captions(several, 1) == ["red"]


def test_of_several_captions_one_is_drawn():
    tokenizer = Tokenizer.train(["red", "blue", "green star", "one"])
    several = SimpleNamespace(variants=[["red"], ["blue", "green star", "red"], ["one"]])
    kept = Captions(lambda texts: [tokenizer(texts)], several, SimpleNamespace(captions=["green star"]))
    (tokens, mask), = kept(torch.tensor([0, 1, 1, 1, 2, 3]), torch.tensor([0.99, 0.0, 0.34, 0.99, 0.5, 0.5]))
    expected, expected_mask = tokenizer(["red", "blue", "green star", "red", "one", "green star"])
    assert torch.equal(mask, expected_mask) and torch.equal(tokens * mask, expected * expected_mask)
