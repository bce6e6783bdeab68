"""A training run whose disk fills, and one whose folder is read-only: on file systems of their own.

    python tests/slow/full_disk.py          Linux, as root or where users may have namespaces; half a minute

The run must end with one line, leave nothing half-written, and go on from its last checkpoint when there is room.
"""
import os
import subprocess
import sys
import tempfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent.parent))
sys.path.insert(0, str(Path(__file__).parent))

import survive  # noqa: E402

from encoders import weights  # noqa: E402

STEPS = ["--steps", "12", "--checkpoint-every", "4"]


def run(*command):
    subprocess.run(command, check=True)


def outcome(root, out, *flags):
    """(exit status, what the run printed) of an image stage that writes to out."""
    process = survive.start(root, "image", out, "--autoencoder", str(root / "ae"), *STEPS, *flags)
    text = process.communicate()[0]
    print(text.strip(), end="\n\n")
    return process.returncode, text


def main():
    with tempfile.TemporaryDirectory() as root:
        root = Path(root)
        survive.make_data(root)
        disk, locked = root / "disk", root / "locked"
        disk.mkdir(), locked.mkdir()
        # a checkpoint is 69 MiB, the model 22: the second checkpoint has no room, which is told before; or the model beside
        # it has none, which shows when it is half written
        for size, whole in ((130, ["000004"]), (170, ["000004", "000008"])):
            run("mount", "-t", "tmpfs", "-o", f"size={size}m", "full", disk)
            status, text = outcome(root, disk / "run")
            assert status == 1 and "Traceback" not in text and str(disk) in text.splitlines()[-1], text
            assert sorted(path.name for path in (disk / "run" / "checkpoints").iterdir()) == whole
            assert [path.name for path in (disk / "run").glob("*model*")] == ["model.safetensors"]
            weights.read(disk / "run" / "model.safetensors")
            run("mount", "-o", "remount,size=1g", disk)
            status, text = outcome(root, disk / "run", "--resume")
            assert status == 0 and f"steps {int(whole[-1])}…12" in text, text
            run("umount", disk)
        run("mount", "-t", "tmpfs", "-o", "ro", "locked", locked)
        status, text = outcome(root, locked / "run")
        assert status == 1 and "Read-only file system" in text and "Traceback" not in text, text
        run("umount", locked)
    print("a full disk: twice one line, and gone on from the checkpoint; a read-only folder: one line")


if __name__ == "__main__":
    if "inside" not in sys.argv:  # in a mount namespace of our own, where mounting harms nobody
        os.execvp("unshare", ["unshare", "--mount", "--user", "--map-root-user", sys.executable, __file__, "inside"])
    main()
