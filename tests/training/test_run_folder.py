"""What a run's folder keeps: one command at a time, nothing overwritten unasked, nothing made anew that a model needs."""
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from PIL import Image

import train
from dit import SIZES
from encoders import weights
from sample import Pipeline
from training import checkpoints, recipes, run_folder

ROOT = Path(__file__).parent.parent.parent
FLAGS = ["--image-size", "32", "--batch-size", "4", "--steps", "6", "--checkpoint-every", "3", "--log-every", "1",
         "--sample-every", "-1", "--cooldown", "0"]  # fmt: skip


@pytest.fixture
def data(pictures, tmp_path):
    """A folder of pictures that a test may change."""
    shutil.copytree(pictures / "data", tmp_path / "data")
    return tmp_path / "data"


def image(pictures, out, *flags, data=None):
    source = ["--data", str(data or pictures / "data"), "--autoencoder", str(pictures / "ae")]
    train.main(["image", *source, "--out", str(out), *FLAGS, *flags])


def content(out):
    """Every file of a folder, with its bytes."""
    return {path.relative_to(out): path.read_bytes() for path in sorted(out.rglob("*")) if path.is_file()}


def test_a_run_is_not_overwritten_unasked(pictures, tmp_path, capsys):
    image(pictures, tmp_path / "run")
    before = content(tmp_path / "run")
    with pytest.raises(ValueError, match="run holds a run: --resume goes on with it, --overwrite deletes it"):
        image(pictures, tmp_path / "run", "--seed", "1")
    assert content(tmp_path / "run") == before
    image(pictures, tmp_path / "run", "--resume")
    assert "run is finished, at 6 steps of 6: nothing to do" in capsys.readouterr().out
    assert content(tmp_path / "run") == before
    (tmp_path / "run/run.json").unlink()  # as a run of an earlier version: loaded, then known to be finished
    for steps in ("steps 6…6", "run is finished, at 6 steps of 6"):
        image(pictures, tmp_path / "run", "--resume")
        assert steps in capsys.readouterr().out
    image(pictures, tmp_path / "run", "--overwrite", "--steps", "3")
    assert "loses model.safetensors, checkpoints, metrics.jsonl, loss.png, samples" in capsys.readouterr().out
    assert [folder.name for folder in checkpoints.folders(tmp_path / "run")] == ["000003"]
    with pytest.raises(ValueError, match="give one of them"):
        image(pictures, tmp_path / "run", "--overwrite", "--resume")


def test_overwrite_deletes_only_what_is_a_run(pictures, tmp_path):
    published = tmp_path / "published"
    published.mkdir()
    (published / "model.safetensors").write_bytes(b"of somebody")
    with pytest.raises(ValueError, match="published holds a run"):
        image(pictures, published)
    with pytest.raises(ValueError, match="published is not the folder of a run"):
        image(pictures, published, "--overwrite")
    assert (published / "model.safetensors").read_bytes() == b"of somebody"
    assert [path.name for path in published.iterdir()] == ["model.safetensors"]


def test_a_mistake_leaves_no_folder(pictures, tmp_path):
    with pytest.raises(ValueError, match="there is no such folder"):
        image(pictures, tmp_path / "a/b/run", data=tmp_path / "none")
    assert not list(tmp_path.iterdir())


def test_two_commands_cannot_train_in_one_folder_and_a_dead_one_does_not_count(pictures, tmp_path):
    with run_folder.claimed(tmp_path / "run", False, False):
        with pytest.raises(ValueError, match="run: another command is training there"):
            image(pictures, tmp_path / "run")
    holder = f"import os, sys; sys.path.insert(0, {str(ROOT)!r}); from training import run_folder\n"
    holder += f"with run_folder.claimed({str(tmp_path / 'run')!r}, False, False): os.kill(os.getpid(), 9)"
    assert subprocess.run([sys.executable, "-c", holder]).returncode == -9
    assert (tmp_path / "run/run.json").exists()
    image(pictures, tmp_path / "run")


def claim(out, monkeypatch, restarts, run_id="a", resume=False, overwrite=False):
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", run_id)
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", str(restarts))
    with run_folder.claimed(out, resume, overwrite) as (resumed, finished, finish):
        return resumed


def test_torchruns_restart_goes_on_with_its_own_run_alone(pictures, tmp_path, monkeypatch):
    """Also if the folder held another run, which the first start refused or deleted, and no checkpoint was written yet."""
    image(pictures, tmp_path / "run")
    for restarts in (0, 1):
        with pytest.raises(ValueError, match="holds a run"):
            claim(tmp_path / "run", monkeypatch, restarts)
    assert not claim(tmp_path / "run", monkeypatch, 0, overwrite=True)  # it dies before its first checkpoint
    assert not claim(tmp_path / "run", monkeypatch, 1, overwrite=True)
    (tmp_path / "run/checkpoints/000003").mkdir(parents=True)
    (tmp_path / "run/checkpoints/000003/config.json").write_text("{}")
    assert claim(tmp_path / "run", monkeypatch, 2, overwrite=True)  # of its own checkpoint nothing is deleted
    with pytest.raises(ValueError, match="holds a run"):
        claim(tmp_path / "run", monkeypatch, 1, run_id="b")


def test_flags_that_change_what_is_learned_cannot_change(pictures, tmp_path):
    image(pictures, tmp_path / "run")
    changes = dict(ema="0.9", warmup="10", caption_dropout="0.3", weight_decay="0.1", max_norm="2", beta2="0.9", cooldown="0.5",
                   batch_size="8", text_depth="1", qk_norm="false", seed="3")  # fmt: skip
    for name, value in changes.items():
        flag = f"--{name.replace('_', '-')}"
        with pytest.raises(ValueError, match=f"was made with {flag} .*, not "):
            image(pictures, tmp_path / "run", "--resume", flag, value)
    with pytest.raises(ValueError, match="made with --qk-norm true, not false"):  # as one would type it
        image(pictures, tmp_path / "run", "--resume", "--qk-norm", "false")


def test_a_run_may_grow_while_its_learning_rate_does_not_fall(pictures, tmp_path):
    """It then equals, bit for bit, one that was as long from the start."""
    image(pictures, tmp_path / "whole", "--steps", "9")
    image(pictures, tmp_path / "grown")
    image(pictures, tmp_path / "grown", "--resume", "--steps", "9")
    whole, grown = (weights.read(tmp_path / name / "model.safetensors")[0] for name in ("whole", "grown"))
    assert all(torch.equal(whole[name], grown[name]) for name in whole)
    with pytest.raises(ValueError, match="made with --steps 9; it may change .* to 9 or more"):
        image(pictures, tmp_path / "grown", "--resume", "--steps", "8")
    image(pictures, tmp_path / "falling", "--warmup", "0", "--cooldown", "0.4")
    with pytest.raises(ValueError, match="made with --steps 6; it may change until the learning rate falls"):
        image(pictures, tmp_path / "falling", "--warmup", "0", "--cooldown", "0.4", "--resume", "--steps", "9")


def test_a_damaged_checkpoint_gives_way_to_the_one_before(pictures, tmp_path, capsys):
    image(pictures, tmp_path / "whole")
    shutil.copytree(tmp_path / "whole", tmp_path / "good")
    for name, damages in (("config.json", ["cut", "gone"]), (".metadata", ["cut", "empty"]), ("__0_0.distcp", ["cut", "gone"])):
        for damage in damages:
            run = tmp_path / f"{name}-{damage}"
            shutil.copytree(tmp_path / "good", run)
            (run / "model.safetensors").unlink()
            path = checkpoints.folders(run)[-1] / name
            raw = path.read_bytes()
            path.unlink() if damage == "gone" else path.write_bytes(raw[: len(raw) // 2] if damage == "cut" else b"")
            image(pictures, run, "--resume")
            printed = capsys.readouterr().out
            assert "000006 is damaged" in printed or (name, damage) == ("config.json", "gone")
            assert "steps 3…6" in printed
            a, b = (weights.read(out / "model.safetensors")[0] for out in (tmp_path / "whole", run))
            assert all(torch.equal(a[key], b[key]) for key in a)


def recoloured(path):
    image = Image.open(path).convert("RGB")
    Image.eval(image, lambda value: 255 - value).save(path)


@pytest.mark.parametrize("change, what", [
    (lambda data: (data / "3.txt").write_text("other words"), "pictures or captions"),
    (lambda data: recoloured(data / "3.png"), "pictures or captions"),
    (lambda data: (data / "3.png").unlink(), "pictures or captions"),
])  # fmt: skip
def test_changed_data_is_noticed(pictures, data, tmp_path, change, what):
    """And the good model stays: of a finished run, and of one that was not."""
    image(pictures, tmp_path / "run", data=data)
    good = (tmp_path / "run/model.safetensors").read_bytes()
    change(data)
    with pytest.raises(ValueError, match=f"the {what} changed since; put back what it was"):
        image(pictures, tmp_path / "run", "--resume", "--steps", "9", data=data)
    assert (tmp_path / "run/model.safetensors").read_bytes() == good
    shutil.rmtree(checkpoints.folders(tmp_path / "run")[-1])


def test_changed_tars_are_noticed(pictures, tmp_path):
    from data import tar_shards

    tar_shards.main([str(pictures / "data"), str(tmp_path / "tars"), "--per-shard", "5"])
    image(pictures, tmp_path / "run", data=tmp_path / "tars")
    (tmp_path / "tars/00001.tar").unlink()
    with pytest.raises(ValueError, match="the pictures or captions changed since"):
        image(pictures, tmp_path / "run", "--resume", "--steps", "9", data=tmp_path / "tars")


def test_another_autoencoder_is_noticed(pictures, tmp_path):
    image(pictures, tmp_path / "run")
    train.main(["autoencoder", "--data", str(pictures / "data"), "--image-size", "32", "--steps", "1", "--seed", "5",
                "--out", str(tmp_path / "ae")])  # fmt: skip
    with pytest.raises(ValueError, match="the autoencoder changed since"):
        image(pictures, tmp_path / "run", "--resume", "--steps", "9", "--autoencoder", str(tmp_path / "ae"))


def test_a_folder_that_moved_is_the_same_data(pictures, data, tmp_path):
    image(pictures, tmp_path / "run", data=data)
    data.rename(tmp_path / "moved")
    image(pictures, tmp_path / "run", "--resume", "--steps", "7", data=tmp_path / "moved")
    assert Pipeline.load(tmp_path / "run").config["flags"]["steps"] == 7


def test_folders_of_one_name_have_runs_of_their_own():
    outs = {recipes.read_flags("image", ["--data", path], SIZES).out for path in ("a/train", "b/train", "/c/train", "train", "./train")}
    assert outs == {"runs/image-a-train", "runs/image-b-train", "runs/image-c-train", "runs/image-train"}


@pytest.mark.parametrize("stage, flags, message", [
    ("image", ["--frames", "99"], "--frames: has no effect on the stage image"),
    ("image", ["--motion-free-mask", "false"], "--motion-free-mask: has no effect on the stage image"),
    ("autoencoder", ["--t5", "folder"], "--t5: has no effect on the stage autoencoder"),
    ("video", ["--workers", "4"], "--workers: has no effect on the stage video"),
    ("image", ["--init", "run", "--autoencoder", "ae"], "--autoencoder: the run that --init names has its own"),
])  # fmt: skip
def test_flags_without_effect_are_refused(stage, flags, message):
    with pytest.raises(ValueError, match=message):
        train.main([stage, *flags])


def test_latent_channels_of_an_autoencoder_that_has_others(pictures, tmp_path):
    with pytest.raises(ValueError, match="--latent-channels 16: the autoencoder in .* has 8"):
        image(pictures, tmp_path / "run", "--latent-channels", "16")
    image(pictures, tmp_path / "run", "--latent-channels", "8")


def test_an_autoencoder_that_was_stopped_goes_on_with_the_same_command(pictures, data, tmp_path, capsys, monkeypatch):
    """As its message says, when the image stage trained it first."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(recipes.DEMO["autoencoder"], "steps", 6)
    command = ["image", "--data", "data", *FLAGS]
    real = train.StopSignals.on_any_rank
    monkeypatch.setattr(train.StopSignals, "on_any_rank", lambda self, step: True)
    with pytest.raises(SystemExit):
        train.main(command)
    assert "in runs/autoencoder-data. Go on with the same command\n" in capsys.readouterr().out
    monkeypatch.setattr(train.StopSignals, "on_any_rank", real)
    train.main(command)
    assert "steps 1…6" in capsys.readouterr().out
    assert json.loads(Path("runs/autoencoder-data/run.json").read_text())["finished"] == 6
    assert os.path.exists("runs/image-data/model.safetensors")
