"""Files: written whole or not at all; what was left out of a folder; the format of models; the newest run."""
import contextlib
import fcntl
import os
import uuid
from pathlib import Path


@contextlib.contextmanager
def written_whole(path, parts=None, keep=True):
    """with written_whole(path) as part: … writes the file `part`, which then takes the place of `path` in one
    step. If anything fails it is removed, and what was at `path` before stays. parts: the folder of `part`,
    on the same file system; path's own by default. keep=False: a trial, which writes and removes it."""
    path = Path(path)
    part = Path(parts or path.parent) / f".part-{uuid.uuid4().hex}{path.suffix}"
    with open(part, "xb") as lock:
        try:
            with contextlib.suppress(OSError):  # a file system without locks
                fcntl.flock(lock, fcntl.LOCK_EX)
            yield part
            if keep:
                os.replace(part, path)
        finally:
            part.unlink(missing_ok=True)


def remove_parts(folder):
    """Removes the parts that killed processes have left in a folder. A living process has locked its own."""
    for part in Path(folder).glob(".part-" + "[0-9a-f]" * 32 + "*"):
        with contextlib.suppress(OSError), open(part, "r+b") as file:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            part.unlink()


def print_left_out(skipped, used, most=20):
    """skipped: a list of (path, reason); used: how many files were used."""
    if skipped:
        print(f"{len(skipped)} of {len(skipped) + used} files were left out:")
    for path, reason in skipped[:most]:
        print(f"  {path}: {reason}")
    if len(skipped) > most:
        print(f"  … and {len(skipped) - most} more")


FORMAT = 2  # of models and checkpoints: what their tensors and settings are called


def check_format(path, number):
    """ValueError, naming the file, unless this code reads the format `number` (None: a file without one)."""
    if str(number) in ("None", "1"):
        raise ValueError(f"{path} was made by an earlier version of this code: train it again")
    if not str(number).isdecimal() or int(number) > FORMAT:
        raise ValueError(f"{path} has format {number}; this code reads up to {FORMAT}")


def run_name(data):
    """"shapes", or the folder that --data names → what its runs are called: photos/train → photos-train."""
    return "-".join(part for part in Path(data).parts if part not in ("/", ".", "..")) or "data"


def newest_run(stage="image"):
    """The folder of the run whose model was written last. ValueError if there is none."""
    models = Path("runs").glob(f"{stage}*/model.safetensors")
    newest = max(models, key=lambda path: path.stat().st_mtime, default=None)
    if newest is None:
        hint = f"train one with `python train.py {stage}`, or name one: --checkpoint DIR"
        raise ValueError(f"no run found in runs/: {hint}")
    return newest.parent
