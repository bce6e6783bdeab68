"""What a signal can meet besides a step: encoding before the first one, a preview, the end of the run."""
import os
import signal

import pytest

import train
from sample import Pipeline
from training import batches, checkpoints

FLAGS = ["--image-size", "32", "--batch-size", "4", "--steps", "4", "--checkpoint-every", "4", "--log-every", "1"]


def image(pictures, out, *flags):
    source = ["--data", str(pictures / "data"), "--autoencoder", str(pictures / "ae")]
    train.main(["image", *source, "--out", str(out), *FLAGS, *flags])


def signalled(monkeypatch, number, owner, name):
    """Sends this process a signal whenever owner.name is called."""
    real = getattr(owner, name)

    def call(*arguments, **options):
        os.kill(os.getpid(), number)
        return real(*arguments, **options)

    monkeypatch.setattr(owner, name, call)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_in_a_preview(pictures, tmp_path, monkeypatch, capsys, number):
    """The preview is finished, and one more step; then it is as in any step."""
    signalled(monkeypatch, number, Pipeline, "generate")
    with pytest.raises(SystemExit) as end:
        image(pictures, tmp_path / "run", "--sample-every", "2")
    assert end.value.code == 0 and "stopped after step 3, with a checkpoint in" in capsys.readouterr().out
    assert [folder.name for folder in checkpoints.folders(tmp_path / "run")] == ["000003"]
    monkeypatch.undo()
    image(pictures, tmp_path / "run", "--resume", "--sample-every", "-1")
    assert "steps 3…4" in capsys.readouterr().out


def test_in_the_last_preview(pictures, tmp_path, monkeypatch, capsys):
    """All is saved by then: the run ends as it would have."""
    signalled(monkeypatch, signal.SIGTERM, Pipeline, "generate")
    image(pictures, tmp_path / "run", "--sample-every", "4")
    assert "image model →" in capsys.readouterr().out
    assert (tmp_path / "run/model.safetensors").exists() and (tmp_path / "run/samples/000004.png").exists()


def test_in_encoding(pictures, tmp_path, monkeypatch):
    """Nothing is trained yet, so nothing is left behind. (The command's one line: tests/common/test_flags.py.)"""
    signalled(monkeypatch, signal.SIGINT, batches, "encode_all")
    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background job ignores it
    try:
        with pytest.raises(KeyboardInterrupt):
            image(pictures, tmp_path / "run")
    finally:
        signal.signal(signal.SIGINT, before)
    assert not list(tmp_path.iterdir())
