import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import data
import train
import weights
from muon import Muon, orthogonalise
from sample import TextToImage

ROOT = Path(__file__).parent.parent
TINY = ["--steps", "6", "--batch-size", "4", "--log-every", "2", "--sample-every", "100", "--checkpoint-every", "3"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A few pictures with captions, and an autoencoder trained on them for a moment."""
    path = tmp_path_factory.mktemp("train") / "data"
    path.mkdir()
    shapes = data.Shapes(32, count=20)
    from PIL import Image

    for i, caption in enumerate(shapes.captions):
        Image.fromarray(shapes.pictures([i])[0].permute(1, 2, 0).numpy()).save(path / f"{i}.png")
        (path / f"{i}.txt").write_text(caption)
    (path / "broken.png").write_bytes(b"\x89PNG no")
    (path / "broken.txt").write_text("broken")
    run("autoencoder", path, path.parent / "ae", *TINY)
    return path


def run(stage, data_folder, out, *flags):
    train.main([stage, "--data", str(data_folder), "--image-size", "32", "--out", str(out), *flags])


def image(folder, out, *flags):
    run("image", folder, out, "--autoencoder", str(folder.parent / "ae"), *TINY, *flags)


def test_a_run_leaves_what_it_says(folder, tmp_path, capsys):
    image(folder, tmp_path)
    printed = capsys.readouterr().out
    assert "1 of 21 files were left out" in printed and "broken.png: not a whole picture" in printed
    assert {p.name for p in tmp_path.iterdir()} == {"model.safetensors", "checkpoint.pt", "metrics.jsonl", "loss.png", "samples"}
    rows = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == [2, 4, 6] and len(rows[0]["loss_bins"]) == 4
    model = TextToImage.load(tmp_path)
    assert model.config["flags"]["batch_size"] == 4
    pictures = model.generate(["a red circle", "a blue star"], steps=2)
    assert pictures.shape == (2, 3, 32, 32) and pictures.dtype == torch.uint8


@pytest.mark.parametrize("optimizer", ["muon", "adamw"])
def test_an_interrupted_and_resumed_run_equals_an_uninterrupted_one(folder, tmp_path, monkeypatch, optimizer):
    image(folder, tmp_path / "whole", "--optimizer", optimizer, "--log-every", "1")
    real, calls = torch.nn.utils.clip_grad_norm_, []

    def interrupted(*args):
        calls.append(1)
        if len(calls) == 5:  # in the fifth step: after the checkpoint of the third
            raise KeyboardInterrupt
        return real(*args)

    monkeypatch.setattr(torch.nn.utils, "clip_grad_norm_", interrupted)
    with pytest.raises(SystemExit):
        image(folder, tmp_path / "parts", "--optimizer", optimizer, "--log-every", "1")
    monkeypatch.undo()
    image(folder, tmp_path / "parts", "--optimizer", optimizer, "--log-every", "1", "--resume")
    whole, parts = (weights.read(tmp_path / name / "model.safetensors")[0] for name in ("whole", "parts"))
    assert set(whole) == set(parts) and all(torch.equal(whole[name], parts[name]) for name in whole)
    whole, parts = (torch.load(tmp_path / name / "checkpoint.pt", weights_only=True) for name in ("whole", "parts"))
    assert all(torch.equal(whole["model"][name], parts["model"][name]) for name in whole["model"])
    losses = [[json.loads(line)["loss"] for line in (tmp_path / name / "metrics.jsonl").open()] for name in ("whole", "parts")]
    assert losses[0] == losses[1]


def test_batches_are_epochs_in_a_new_order_each():
    first = torch.cat([train.batch_indices(step, 10, 5, 0) for step in (0, 1)])
    second = torch.cat([train.batch_indices(step, 10, 5, 0) for step in (2, 3)])
    assert sorted(first.tolist()) == sorted(second.tolist()) == list(range(10)) and not torch.equal(first, second)
    assert torch.equal(train.batch_indices(7, 10, 3, 0), torch.cat([train.batch_indices(s, 10, 1, 0) for s in (21, 22, 23)]))


def test_every_objective_trains(folder, tmp_path):
    """The paper's recipe, with the variance learned; adaLN alone; x0."""
    for flags in (
        ["--target", "noise", "--schedule", "linear", "--learned-variance", "--optimizer", "adamw"],
        ["--integration", "adaln", "--fused", "false"],
        ["--target", "x0", "--shift", "3"],
    ):
        image(folder, tmp_path, *flags)
        assert TextToImage.load(tmp_path).generate(["a star"], steps=2, sampler="ddpm").shape == (1, 3, 32, 32)


def test_the_learning_rate_rises_stays_and_falls():
    config = train.Config(steps=100, warmup=9, cooldown=0.5)
    rates = [train.learning_rate(config, step) for step in range(100)]
    assert rates[0] == 0.1 and rates[9] == rates[49] == 1.0 and rates[75] == 0.5 and 0 < rates[99] <= 0.02


def test_muon_equals_torchs(monkeypatch):
    """torch.optim.Muon with its bf16 iteration moved to fp32; wide, tall and square matrices, a few steps."""
    torch.manual_seed(0)
    ours = [torch.nn.Parameter(torch.randn(*shape)) for shape in ((6, 10), (10, 6), (8, 8))]
    theirs = [torch.nn.Parameter(p.detach().clone()) for p in ours]
    monkeypatch.setattr(torch.Tensor, "bfloat16", torch.Tensor.float)
    a = Muon(ours, lr=0.02, weight_decay=0.1)
    b = torch.optim.Muon(theirs, lr=0.02, weight_decay=0.1, adjust_lr_fn="match_rms_adamw")
    for _ in range(4):
        for p, q in zip(ours, theirs):
            p.grad = torch.randn_like(p)
            q.grad = p.grad.clone()
        a.step()
        b.step()
    for p, q in zip(ours, theirs):
        torch.testing.assert_close(p, q, rtol=1e-4, atol=1e-5)


def test_orthogonalise_levels_the_singular_values():
    u = torch.randn(3, 12, 20, dtype=torch.float64)
    s = torch.linalg.svdvals(orthogonalise(u))
    assert s.min() > 0.4 and s.max() < 1.3
    exact = torch.linalg.svd(u, full_matrices=False)
    assert ((orthogonalise(u) * (exact.U @ exact.Vh)).sum((1, 2)) > 0.8 * 12).all()


@pytest.mark.parametrize(
    "arguments,message",
    [
        (["picture"], "say what to train: python train.py autoencoder|image"),
        (["image", "--batchsize", "4"], "unknown flag --batchsize; did you mean --batch-size?"),
        (["image", "--size", "huge"], "--size huge: not one of mini, S, B, L, XL, G"),
        (["image", "--steps", "many"], "--steps many: not a whole number"),
        (["image", "--lr"], "--lr needs a value"),
        (["image", "extra"], "'extra' is not a flag"),
        (["image", "--data", "/no/folder"], "--data /no/folder: there is no such folder"),
        (["image", "--image-size", "50"], "--image-size 50: must be a multiple of 16"),
        (["image", "--device", "banana"], "--device banana: not to be had"),
        (["autoencoder", "--latent-channels", "0"], "--latent-channels 0: must be at least 1"),
        (["image", "--batch-size", "0"], "--batch-size 0: must be at least 1"),
        (["image", "--schedule", "round"], "--schedule round: not one of linear, cosine"),
        (["image", "--integration", "none"], "--integration none: not one of cross, adaln"),
        (["autoencoder", "--resume", "--out", "/tmp/no-run-here"], "--resume: there is no"),
    ],
)
def test_a_users_mistake_gets_one_line(arguments, message, tmp_path):
    result = subprocess.run([sys.executable, ROOT / "train.py", *arguments], capture_output=True, text=True, cwd=tmp_path)
    assert result.returncode != 0 and message in result.stderr and "Traceback" not in result.stderr, result.stderr
    assert len(result.stderr.strip().splitlines()) == 1 and not list(tmp_path.iterdir())


class Evil:
    def __reduce__(self):
        return (Path("evil").touch, ())


def test_checkpoints_that_cannot_be_used_are_named(folder, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    image(folder, tmp_path / "run")
    path = tmp_path / "run" / "checkpoint.pt"
    good = path.read_bytes()
    again = lambda *flags: image(folder, tmp_path / "run", "--resume", *flags)
    with pytest.raises(ValueError, match="was made with --integration cross, not adaln"):
        again("--integration", "adaln")
    with pytest.raises(ValueError, match="of another model"):
        again("--text-depth", "1")
    path.write_bytes(good[: len(good) // 2])
    with pytest.raises(ValueError, match="checkpoint.pt is damaged"):
        again()
    torch.save(Evil(), path)
    with pytest.raises(ValueError, match="checkpoint.pt is damaged or holds more than weights"):
        again()
    assert not Path("evil").exists()
    model = tmp_path / "run" / "model.safetensors"
    content = model.read_bytes()
    model.write_bytes(content[: len(content) // 2])
    with pytest.raises(ValueError, match="model.safetensors is not a whole safetensors file"):
        TextToImage.load(tmp_path / "run")
    with pytest.raises(ValueError, match="is not a model of train.py image"):
        TextToImage.load(folder.parent / "ae")
    with pytest.raises(ValueError, match="no model.safetensors in"):
        TextToImage.load(tmp_path)
