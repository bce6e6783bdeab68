"""Two processes are one: the same losses, checkpoints that either reads. And faults: signals, lost processes, bad numbers, full
disks. Real processes, started by torchrun (gloo, CPU)."""
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from PIL import Image

from training import checkpoints
from data import latent_cache as latents
from training import batches
from data import shapes
from data import tar_shards as shards
import train
from encoders import weights
from training.state import TrainingState

ROOT = Path(__file__).parent.parent.parent
FLAGS = ["--image-size", "32", "--batch-size", "8", "--steps", "20", "--log-every", "1", "--sample-every", "-1",
         "--checkpoint-every", "7", "--precision", "fp32", "--optimizer", "adamw", "--lr", "1e-4"]  # fmt: skip


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    root = tmp_path_factory.mktemp("distributed")
    (root / "data").mkdir()
    drawn = shapes.Shapes(32, count=20)
    for i, caption in enumerate(drawn.captions):
        Image.fromarray(drawn.pictures([i])[0].permute(1, 2, 0).numpy()).save(root / "data" / f"{i}.png")
        (root / "data" / f"{i}.txt").write_text(caption)
    train.main(["autoencoder", "--data", str(root / "data"), "--image-size", "32", "--steps", "2", "--out", str(root / "ae")])
    run(root, root / "one", 1)
    return root


def start(root, out, processes, *flags):
    program = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}"]
    program = program if processes > 1 else [sys.executable]
    command = ["train.py", "image", "--data", str(root / "data"), "--autoencoder", str(root / "ae"), "--out", str(out)]
    keep = os.environ | {"OMP_NUM_THREADS": "1"}
    return subprocess.Popen([*program, *command, *FLAGS, *flags], cwd=ROOT, env=keep, stdout=subprocess.PIPE,
                            stderr=subprocess.STDOUT, text=True, start_new_session=True)  # fmt: skip


def run(root, out, processes, *flags, code=0):
    process = start(root, out, processes, *flags)
    text = process.communicate(timeout=600)[0]
    assert (process.returncode == 0) == (code == 0), text
    return text


def rows(out):
    return [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]


def losses(out):
    return torch.tensor([row["loss"] for row in rows(out)])


def bins(out):
    return torch.tensor([[float("nan") if mean is None else mean for mean in row["loss_bins"]] for row in rows(out)])


def until(out, step):
    """Waits for a run to log this step."""
    end = time.monotonic() + 600
    while time.monotonic() < end:
        if (out / "metrics.jsonl").exists() and len((out / "metrics.jsonl").read_text().splitlines()) >= step:
            return
        time.sleep(0.02)
    raise TimeoutError


def test_two_processes_give_the_losses_of_one_and_the_same_pictures(folder, tmp_path):
    text = run(folder, tmp_path, 2, "--sample-every", "100")
    assert text.count("image model →") == 1  # one voice
    assert len(losses(tmp_path)) == 20 and (losses(tmp_path) - losses(folder / "one")).abs().max() < 1e-5
    torch.testing.assert_close(bins(tmp_path), bins(folder / "one"), rtol=0, atol=1e-5, equal_nan=True)
    one, two = (weights.read(path / "model.safetensors")[0] for path in (folder / "one", tmp_path))
    assert {name: t.shape for name, t in one.items()} == {name: t.shape for name, t in two.items()}
    assert max((one[name].float() - two[name].float()).abs().max() for name in one) < 1e-3
    assert {path.name for path in (tmp_path / "samples").iterdir()} == {"000020.png", "000020-raw.png"}


@pytest.mark.parametrize("processes, shard", [(1, 0), (2, 0), (2, 1)])
def test_a_preview_changes_no_loss(folder, tmp_path, processes, shard):
    """A sharded model that has run for a preview, with EMA weights, must gather its own weights again for the next step."""
    for out, every in (("with", "2"), ("without", "-1")):
        run(folder, tmp_path / out, processes, "--shard", str(shard), "--steps", "4", "--lr", "1e-3", "--sample-every", every)
    assert len(list((tmp_path / "with/samples").iterdir())) == 4
    assert torch.equal(losses(tmp_path / "with"), losses(tmp_path / "without"))


def test_ranks_without_a_voice_may_say_anything():
    """Their output goes nowhere, whatever characters the locale has."""
    code = (
        "import torch; from training import distributed; distributed.dist.init_process_group = lambda *_, **__: None\n"
        "distributed.start(torch.device('cpu')); print('steps 0\\u20262 \\u2192 runs')"
    )
    ascii_only = {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}
    result = subprocess.run([sys.executable, "-c", code], cwd=ROOT, env=os.environ | {"RANK": "1", "WORLD_SIZE": "2"} | ascii_only,
                            capture_output=True, text=True)  # fmt: skip
    assert result.returncode == 0 and not result.stdout, result.stderr


@pytest.mark.parametrize("before, after, shard", [(2, 1, 0), (1, 2, 1)])
def test_a_checkpoint_of_some_processes_goes_on_in_others(folder, tmp_path, before, after, shard):
    """Stopped by SIGTERM, which ends the step, saves and exits 0; then losses go on as if nothing had been. Of shares, and
    into whole models."""
    process = start(folder, tmp_path, before, "--shard", str(shard))
    until(tmp_path, 5)
    process.send_signal(signal.SIGTERM)
    text = process.communicate(timeout=600)[0]
    assert f"with a checkpoint in {tmp_path}. Go on with this command and --resume" in text, text
    assert before > 1 or process.returncode == 0
    steps = len(rows(tmp_path))
    assert 5 <= steps < 20 and checkpoints.folders(tmp_path)[-1].name == f"{steps:06d}"
    run(folder, tmp_path, after, "--resume", "--shard", str(shard))
    assert (losses(tmp_path) - losses(folder / "one")).abs().max() < 1e-5


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_to_all_processes_of_a_job_ends_it_with_a_checkpoint(folder, tmp_path, number):
    """As Ctrl-C and clusters send it: the readers of tar shards get it too, and must not die before the training ends."""
    shards.main([str(folder / "data"), str(tmp_path / "tars")])
    process = start(folder, tmp_path / "run", 1, "--data", str(tmp_path / "tars"), "--steps", "5000", "--workers", "2")
    until(tmp_path / "run", 5)
    os.killpg(process.pid, number)
    text = process.communicate(timeout=600)[0]
    assert process.returncode == 0 and "with a checkpoint in" in text and "Traceback" not in text, text


def test_replicas_groups_accumulation_checkpointing_and_bf16_agree(folder, tmp_path):
    """Whole models, or shared out in two groups, parts of a batch, blocks computed twice: the same to 1e-5; bf16: to 0.02."""
    run(folder, tmp_path / "a", 2, "--shard", "1", "--accumulate", "2", "--checkpointing", "--steps", "4", "--cooldown", "0")
    run(folder, tmp_path / "d", 4, "--shard", "2", "--steps", "4", "--cooldown", "0")
    run(folder, tmp_path / "b", 1, "--steps", "4", "--cooldown", "0")
    run(folder, tmp_path / "c", 2, "--precision", "bf16", "--steps", "4", "--cooldown", "0")
    norms = lambda out: torch.tensor([row["grad_norm"] for row in rows(tmp_path / out)])  # AdamW does not see their scale
    for out in ("a", "d"):
        assert (losses(tmp_path / out) - losses(tmp_path / "b")).abs().max() < 1e-5
        torch.testing.assert_close(norms(out), norms("b"), rtol=1e-3, atol=0)
    assert 0 < (losses(tmp_path / "c") - losses(tmp_path / "b")).abs().max() < 0.02


def test_muon_on_shares_is_muon(folder, tmp_path):
    """With every gradient clipped: the losses of one process."""
    flags = ["--optimizer", "muon", "--lr", "1e-3", "--steps", "5", "--cooldown", "0", "--max-norm", "0.1"]
    for processes in (1, 2):
        run(folder, tmp_path / str(processes), processes, *flags)
    assert (losses(tmp_path / "1") - losses(tmp_path / "2")).abs().max() < 1e-5


def test_a_process_that_dies_ends_the_run(folder, tmp_path):
    process = start(folder, tmp_path, 2, "--steps", "5000")
    until(tmp_path, 3)
    children = subprocess.run(["pgrep", "-P", str(process.pid)], capture_output=True, text=True).stdout.split()
    os.kill(int(children[-1]), signal.SIGKILL)
    text = process.communicate(timeout=600)[0]
    assert process.returncode != 0 and "SIGKILL" in text


def test_a_batch_that_cannot_be_shared_out_is_named(folder, tmp_path):
    assert "--batch-size 9: not a multiple of 2 processes" in run(folder, tmp_path, 2, "--batch-size", "9", code=1)
    assert "the autoencoder trains in one process" in subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", "train.py", "autoencoder",
         "--out", str(tmp_path / "ae")],
        cwd=ROOT, capture_output=True, text=True, env=os.environ | {"OMP_NUM_THREADS": "1"},
    ).stderr  # fmt: skip


def test_a_refused_folder_is_one_line_of_rank_0(folder, tmp_path):
    (tmp_path / "model.safetensors").touch()
    text = run(folder, tmp_path, 2, code=1)
    assert text.count("holds a run: --resume goes on with it") == 1 and "[rank1]: Traceback" not in text


def here(folder, out, *flags):
    train.main(["image", "--data", str(folder / "data"), "--autoencoder", str(folder / "ae"), "--out", str(out), *FLAGS, *flags])


def poison(monkeypatch, steps):
    real = train.draw

    def poisoned(step, *rest):
        drawn = real(step, *rest)
        return drawn | dict(noise=drawn["noise"] * float("nan")) if step.number in steps else drawn

    monkeypatch.setattr(train, "draw", poisoned)


def test_a_poisoned_batch_is_skipped_and_named(folder, tmp_path, monkeypatch):
    poison(monkeypatch, {4})
    here(folder, tmp_path, "--steps", "6")
    skipped = [row for row in rows(tmp_path) if "skipped" in row]
    assert [row["step"] for row in skipped] == [5] and skipped[0]["grad_norm"] == "nan"
    assert skipped[0]["skipped"] == [str(i) for i in batches.Step(0, 4, slice(0, 8), 8).indices(20).tolist()]
    assert all(torch.isfinite(t).all() for t in weights.read(tmp_path / "model.safetensors")[0].values() if t.is_floating_point())


def test_many_poisoned_batches_stop_the_run_with_the_last_good_checkpoint_untouched(folder, tmp_path, monkeypatch):
    poison(monkeypatch, set(range(9, 20)))
    with pytest.raises(ValueError, match="no number in 3 steps in a row, the last of them 12"):
        here(folder, tmp_path, "--patience", "3")
    assert [path.name for path in checkpoints.folders(tmp_path)] == ["000007"]
    monkeypatch.undo()
    here(folder, tmp_path, "--resume")
    assert torch.equal(losses(tmp_path), losses(folder / "one"))


def test_a_disk_that_fills_leaves_the_last_checkpoint(folder, tmp_path, monkeypatch):
    def full(state, checkpoint_id, **_):
        Path(checkpoint_id).mkdir()
        (Path(checkpoint_id) / "__0_0.distcp").write_bytes(b"half")
        raise OSError(28, "No space left on device")

    real = checkpoints.dcp.save
    monkeypatch.setattr(checkpoints.dcp, "save", lambda *a, **k: real(*a, **k) if "000007" in str(k["checkpoint_id"]) else full(*a, **k))
    with pytest.raises(OSError, match="000014 could not be written: .*No space left on device"):
        here(folder, tmp_path)
    assert [path.name for path in (tmp_path / "checkpoints").iterdir()] == ["000007"]
    monkeypatch.undo()
    monkeypatch.setattr(checkpoints.shutil, "disk_usage", lambda _: type("", (), dict(free=1000)))
    with pytest.raises(OSError, match="a checkpoint needs .* MiB, the disk has 0 free"):
        here(folder, tmp_path, "--resume")
    monkeypatch.undo()
    here(folder, tmp_path, "--resume")
    assert torch.equal(losses(tmp_path), losses(folder / "one"))


def test_tar_shards_train_alike_with_any_workers_and_go_on_in_mid_epoch(folder, tmp_path, monkeypatch):
    """20 samples, one of them damaged, in batches of 8: epochs end in mid-batch."""
    captions, files = zip(*((path.with_suffix(".txt").read_text(), path) for path in sorted((folder / "data").glob("*.png"))))
    shards.write_shards(tmp_path / "tars", list(files), list(captions), per_shard=7)
    again = lambda out, *flags: here(folder, tmp_path / out, "--data", str(tmp_path / "tars"), "--steps", "9", "--cooldown", "0", *flags)
    again("alone", "--workers", "0")
    again("helped", "--workers", "2")
    assert torch.equal(losses(tmp_path / "alone"), losses(tmp_path / "helped"))
    real = TrainingState.gradient_norm

    def lost(state, calls=[]):
        calls.append(1)
        if len(calls) == 9:
            raise KeyError("lost")
        return real(state)

    monkeypatch.setattr(TrainingState, "gradient_norm", lost)
    with pytest.raises(KeyError):
        again("parts", "--accumulate", "2")
    monkeypatch.undo()
    again("parts", "--accumulate", "2", "--resume")
    assert (losses(tmp_path / "parts") - losses(tmp_path / "alone")).abs().max() < 1e-5
    assert all(0 <= row["waiting"] <= 1 for row in rows(tmp_path / "alone"))


def test_the_latent_cache_gives_the_losses_of_encoding_on_the_fly(folder, tmp_path):
    source = ["--data", str(folder / "data"), "--autoencoder", str(folder / "ae"), "--image-size", "32"]
    latents.main([*source, "--out", str(tmp_path / "cache"), "--mirror", "false"])
    here(folder, tmp_path / "cached", "--cache", str(tmp_path / "cache"))
    assert 0 < (losses(tmp_path / "cached") - losses(folder / "one")).abs().max() < 1e-3  # the cache is in fp16
    train.main(["autoencoder", *source[:2], *source[4:], "--steps", "1", "--seed", "1", "--out", str(tmp_path / "other")])
    with pytest.raises(ValueError, match="made with another autoencoder"):
        here(folder, tmp_path / "no", "--cache", str(tmp_path / "cache"), "--autoencoder", str(tmp_path / "other"))
    with pytest.raises(ValueError, match="neither a run nor a published folder"):
        here(folder, tmp_path / "no", "--cache", str(tmp_path / "cache"), "--autoencoder", str(tmp_path / "none"))
