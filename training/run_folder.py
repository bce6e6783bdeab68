"""A run's folder: one command at a time trains in it, and nothing in it is overwritten unasked.

RUN/run.json is locked while a command trains there; the system unlocks it when the process ends, however it
ends. It says which start of torchrun trains there, and how many steps the run had when it was finished.
"""
import contextlib
import fcntl
import json
import os
import shutil
import sys
from pathlib import Path

from training import checkpoints, distributed

CONTENTS = "model.safetensors", "checkpoints", "metrics.jsonl", "loss.png", "samples", "events.out.tfevents*"


@contextlib.contextmanager
def claimed(out, resume, overwrite):
    """with claimed(out, resume, overwrite) as (resume, finished, finish): … no other command trains in the
    folder `out`, which is made if there is none, and taken away again if nothing was written to it.

    resume: whether to go on from its checkpoints. finished: steps of a finished run, or 0. finish(steps):
    marks the run as finished. ValueError if another command trains there, or if it holds a run and neither
    --resume nor --overwrite was given."""
    out, path = Path(out), Path(out) / "run.json"
    if distributed.rank() > 0:  # rank 0 decides for all
        decision = distributed.gathered([])[0]
        if decision is None:
            sys.exit(1)  # rank 0 says why
        yield *decision, lambda steps: None
        return
    made = [folder for folder in (out, *out.parents) if not folder.exists()]
    out.mkdir(parents=True, exist_ok=True)
    before = {entry.name for entry in out.iterdir()}
    with open(path, "a+") as file:
        with refusal_told():
            lock(out, file)
        try:
            with refusal_told():
                start, resume, finished = decide(out, file, resume, overwrite)
            write(file, start, finished)
            distributed.gathered([(resume, finished)])
            yield resume, finished, lambda steps: write(file, start, steps)
        except BaseException:
            if {entry.name for entry in out.iterdir()} - before == {path.name}:
                path.unlink()
                with contextlib.suppress(OSError):  # one that is not empty any more stays
                    for folder in made:
                        folder.rmdir()
            raise
        finally:
            with contextlib.suppress(OSError):  # readers of tar shards, forked, hold the file too
                fcntl.flock(file, fcntl.LOCK_UN)


@contextlib.contextmanager
def refusal_told():
    """A ValueError of rank 0 is told to the other ranks, which wait for its decision."""
    try:
        yield
    except ValueError:
        distributed.gathered([None])
        raise


def lock(out, file):
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise ValueError(f"--out {out}: another command is training there") from None
    except OSError:  # a file system without locks
        pass


def decide(out, file, resume, overwrite):
    """Which start of torchrun this is; whether to go on; at how many steps the run was finished, or 0."""
    file.seek(0)
    before = contents(file.read())
    # torchrun outlives its workers: only a run of its own has the same start in the file
    start = f"{os.environ.get('TORCHELASTIC_RUN_ID')} {os.getppid()}"
    own = int(os.environ.get("TORCHELASTIC_RESTART_COUNT", 0)) > 0 and before.get("start") == start
    has_model, has_checkpoints = (out / "model.safetensors").exists(), bool(checkpoints.folders(out))
    if own:
        resume = has_checkpoints
    elif overwrite:
        delete_run(out)
        return start, False, 0
    elif (has_model or has_checkpoints) and not resume:
        raise ValueError(f"--out {out} holds a run: --resume goes on with it, --overwrite deletes it")
    return start, resume, before.get("finished", 0) if resume and has_model else 0


def delete_run(out):
    """Deletes what a run has left in its folder, and says what that was. ValueError if it is not a run's."""
    found = [path for name in CONTENTS for path in sorted(out.glob(name))]
    if found and not (out / "metrics.jsonl").exists():
        raise ValueError(f"--overwrite: {out} is not the folder of a run; give another --out")
    if found:
        print(f"--overwrite: {out} loses {', '.join(path.name for path in found)}")
    for path in found:
        if path.is_dir():
            shutil.rmtree(path)
        else:
            path.unlink()


def contents(text):
    """The dictionary of a run.json; an empty one if a process died while it wrote."""
    return json.loads(text) if text.endswith("}") else {}


def write(file, start, finished):
    file.seek(0)
    file.truncate()
    json.dump(dict(start=start, finished=finished), file)
    file.flush()


def finished(out):
    """How many steps the run in a folder had when it was finished; 0: it was not, or there is none."""
    path = Path(out) / "run.json"
    return contents(path.read_text()).get("finished", 0) if path.exists() else 0


def unfinished(out, flags):
    """Whether a run with the same flags was stopped in this folder."""
    if finished(out) or not checkpoints.folders(out):
        return False
    try:
        checkpoints.check_flags(out, vars(flags))
    except ValueError:
        return False
    return True
