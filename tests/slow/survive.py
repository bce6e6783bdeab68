"""Kills a training run at random moments, saving included, and goes on from what it left; at the end its weights must be, bit
for bit, those of a run that nobody disturbed.

    python tests/slow/survive.py            20 times SIGKILL, then 20 times SIGTERM; about ten minutes on two cores
"""
import random
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).parent.parent.parent
sys.path.insert(0, str(ROOT))

import torch  # noqa: E402
from PIL import Image  # noqa: E402

from training import checkpoints  # noqa: E402
from data import shapes  # noqa: E402
from encoders import weights  # noqa: E402

FLAGS = ["--image-size", "32", "--batch-size", "4", "--steps", "400", "--checkpoint-every", "5", "--sample-every", "-1",
         "--precision", "fp32"]  # fmt: skip


def start(root, stage, out, *flags):
    command = [sys.executable, "train.py", stage, "--data", str(root / "data"), "--out", str(out), *FLAGS, *flags]
    return subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


def make_data(root):
    """A folder of pictures, root/data, and an autoencoder, root/ae."""
    (root / "data").mkdir()
    drawn = shapes.Shapes(32, count=20)
    for i, caption in enumerate(drawn.captions):
        Image.fromarray(drawn.pictures([i])[0].permute(1, 2, 0).numpy()).save(root / "data" / f"{i}.png")
        (root / "data" / f"{i}.txt").write_text(caption)
    assert start(root, "autoencoder", root / "ae", "--steps", "5").wait() == 0


def survive(root, number, kills, rng):
    """Runs one image stage under `kills` signals → how many fell into a save, and the weights at the end."""
    out, done, saving = root / number.name, 0, 0
    image = lambda: start(root, "image", out, "--autoencoder", str(root / "ae"), *(["--resume"] if checkpoints.folders(out) else []))
    while done < kills:
        process = image()
        time.sleep(rng.uniform(0, 3))
        while process.poll() is None and not list((out / "checkpoints").glob("0*")):
            time.sleep(0.01)  # until the first checkpoint is there
        time.sleep(rng.uniform(2, 8))
        if process.poll() is not None:
            assert process.returncode == 0, process.communicate()[0]
            break
        in_save = bool(list((out / "checkpoints").glob(".part-*")))
        process.send_signal(number)
        text = process.communicate()[0]
        done, saving = done + 1, saving + in_save
        assert number == signal.SIGKILL or process.returncode in (0, 143, -signal.SIGTERM), text  # before it trains, it just ends
        last = checkpoints.folders(out)[-1]
        state = checkpoints.Reader(last).read_metadata().state_dict_metadata
        print(f"{number.name} {done}: {len(state)} tensors in {last.name}{', while it saved' if in_save else ''}", flush=True)
    process = image()
    text = process.communicate()[0]
    assert process.returncode == 0, text
    return done, saving, weights.read(out / "model.safetensors")[0]


def main(kills=20):
    rng = random.Random(0)
    with tempfile.TemporaryDirectory() as root:
        root = Path(root)
        make_data(root)
        assert start(root, "image", root / "whole", "--autoencoder", str(root / "ae")).wait() == 0
        whole = weights.read(root / "whole" / "model.safetensors")[0]
        for number in (signal.SIGKILL, signal.SIGTERM):
            done, saving, found = survive(root, number, kills, rng)
            same = set(found) == set(whole) and all(torch.equal(found[name], whole[name]) for name in whole)
            print(f"{number.name}: {done} times, {saving} of them while it saved; weights at the end identical: {same}")
            assert same


if __name__ == "__main__":
    main(*map(int, sys.argv[1:]))
