"""Checkpoints of a run, to go on from: folders that torch.distributed.checkpoint writes and reads.

    RUN/checkpoints/000500/    one file a process, and where each tensor lies: any number can read it

A checkpoint holds the weights, their EMA, the optimizers' state, the number of steps done, the flags, and
hashes of what the run takes from elsewhere: data, autoencoder, text encoders, tokenizer. It holds no random
state and no data position: a step draws its batch and its noise from (seed, step) alone. A folder is written
under another name and renamed when it is whole and on the disk, so no broken one is ever seen. Nothing that
is read can run code.
"""
import json
import os
import pickle
import shutil
import warnings
from pathlib import Path

import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.api import CheckpointException

from common.files import FORMAT, check_format
from common.flags import dashed
from training import distributed
from training.optimizers import learning_rate

# one process is what it then assumes, rightly
warnings.filterwarnings("ignore", "torch.distributed is disabled")

# Flags that --resume may change: but for rounding, what is learned does not depend on them. What the folders
# hold is compared by hashes.
FREE = (
    "out", "resume", "overwrite", "steps", "data", "cache", "clips", "autoencoder", "latent_channels", "clip",
    "t5", "init", "workers", "accumulate", "patience", "log_every", "sample_every", "checkpoint_every",
    "keep", "device", "precision", "attention", "compile", "checkpointing", "shard", "dry_run",
)
HASHED = dict(data="pictures or captions", clips="clips or their captions", tokenizer="captions")


class Refused(ValueError):
    """A checkpoint that is whole, and must not be used."""


class Records(pickle.Unpickler):
    """Reads a checkpoint's list of contents, a pickle, without running code from it. torch.load cannot read
    it with weights_only; so we allow torch's own records and dtypes, and nothing else."""

    ALLOWED = {
        "torch.distributed.checkpoint.metadata": (
            "Metadata", "MetadataIndex", "StorageMeta", "ChunkStorageMetadata", "TensorStorageMetadata",
            "TensorProperties", "BytesStorageMetadata", "_MEM_FORMAT_ENCODING",
        ),
        "torch.distributed.checkpoint.filesystem": ("_StorageInfo",),
        "torch.serialization": ("_get_layout",),
        "torch": ("Size", "float32", "float64", "bfloat16", "float16", "int64"),
        "pathlib": ("PosixPath", "PurePosixPath", "WindowsPath"),
    }

    def find_class(self, module, name):
        if name not in self.ALLOWED.get(module, ()):
            raise Refused(f"it holds {module}.{name}, more than a list of tensors")
        return super().find_class(module, name)


class Reader(dcp.FileSystemReader):
    """torch's, but for the list of contents. (Tensors it reads by torch.load with weights_only.)"""

    def read_metadata(self, *arguments, **options):
        with open(Path(self.path) / ".metadata", "rb") as file:
            metadata = Records(file).load()
        metadata.storage_meta.load_id = self.load_id
        return metadata


def folders(run):
    """The whole checkpoints of a run's folder, oldest first."""
    found = (Path(run) / "checkpoints").glob("*/config.json")
    whole = [path.parent for path in found if path.parent.name.isdecimal()]
    return sorted(whole, key=lambda folder: int(folder.name))


def read_config(folder):
    """{"format", "step", "config": flags and processor, "hashes"} of a checkpoint; None if it is damaged."""
    try:
        return json.loads((folder / "config.json").read_bytes())
    except (OSError, ValueError):
        return None


def check_flags(run, flags):
    """The flags of the run's last checkpoint that is not damaged, and its processor. ValueError, naming the
    flag, unless the given flags (a dictionary) are the same but for those in FREE. --steps may differ if the
    learning rate of all steps done would have been the same."""
    saved = next(filter(None, map(read_config, reversed(folders(run)))), None)
    if saved is None:
        raise ValueError(f"--resume: there is no checkpoint in {run}; start without --resume")
    check_format(f"--resume: {run}", saved.get("format"))
    before = saved["config"]
    for name, value in flags.items():
        if name not in FREE and before.get(name, value) != value:
            was, now = (str(x).lower() if isinstance(x, bool) else x for x in (before[name], value))
            raise ValueError(f"--resume: {run} was made with --{dashed(name)} {was}, not {now}")
    rates = lambda steps: [
        learning_rate(step, steps, flags["warmup"], flags["cooldown"]) for step in range(saved["step"])
    ]
    if flags["steps"] < saved["step"] or rates(flags["steps"]) != rates(before["steps"]):
        advice = f"it may change until the learning rate falls (--cooldown), to {saved['step']} or more"
        raise ValueError(f"--resume: {run} was made with --steps {before['steps']}; {advice}")
    return before


def save(run, step, config, state, keep=2):
    """Writes a checkpoint; older ones than the last `keep` are removed, and those of later steps, which are
    damaged. config: a dictionary; state: {name: tensor}. OSError if it cannot be written; what was there
    before then still is."""
    root = Path(run) / "checkpoints"
    part, final = root / f".part-{step:06d}", root / f"{step:06d}"
    if distributed.rank() == 0:
        root.mkdir(parents=True, exist_ok=True)
        for leftover in root.glob(".part-*"):  # of a run that was killed
            shutil.rmtree(leftover)
        size = sum(t.numel() * t.element_size() for t in state.values())
        if (free := shutil.disk_usage(root).free) < size:
            needed = f"a checkpoint needs {size / 2**20:.0f} MiB, the disk has {free / 2**20:.0f} free"
            raise OSError(f"{root}: {needed}")
    distributed.barrier()
    try:
        dcp.save(state, checkpoint_id=part, no_dist=distributed.world() == 1)
        if distributed.rank() == 0:
            (part / "config.json").write_text(json.dumps(dict(format=FORMAT, step=step, **config)))
            for path in (*part.iterdir(), part):
                sync(path)
            if final.exists():
                shutil.rmtree(final)
            os.replace(part, final)
            sync(root)
            own = [folder for folder in folders(run) if int(folder.name) <= step]
            for other in set(folders(run)) - set(own[-keep:]):
                shutil.rmtree(other)
    except (Exception, CheckpointException) as error:  # torch wraps what the disk says
        if distributed.rank() == 0:
            shutil.rmtree(part, ignore_errors=True)
        raise OSError(f"{final} could not be written: {str(error).strip().splitlines()[-1]}") from None
    distributed.barrier()


def sync(path):
    """Waits until a file or folder is on the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def load(run, hashes, state):
    """Fills the tensors of state, {name: tensor}, from the run's last checkpoint that is not damaged,
    whatever the number of ranks that wrote it; returns its number of steps. hashes: {name: text} of what the
    run takes from elsewhere. ValueError if no checkpoint can be read, it is of another model, or a hash has
    changed."""
    reason = "there is none"
    for folder in distributed.gathered([folders(run)])[0][::-1]:  # rank 0's list, for all
        damage = ""
        try:
            config = read_config(folder)
            for name, before in config.get("hashes", {}).items():
                if hashes.get(name, before) != before:
                    advice = f"put back what it was, or begin anew with --init {run}"
                    raise Refused(f"the {HASHED.get(name, name)} changed since; {advice}")
            found = Reader(folder).read_metadata().state_dict_metadata
            shapes = {name: tuple(tensor.shape) for name, tensor in state.items()}
            if {name: tuple(found[name].size) for name in found} != shapes:
                raise Refused("its weights are of another model; give the flags it was made with")
            dcp.load(state, storage_reader=Reader(folder), no_dist=distributed.world() == 1)
        except Refused as error:
            raise ValueError(f"--resume: {folder}: {error}") from None
        except (Exception, CheckpointException) as error:  # torch's readers raise many kinds
            damage = str(error).strip().splitlines()[-1][:200]
        reason = next(filter(None, distributed.gathered([damage])), "")
        if not reason:
            return config["step"]
        print(f"{folder} is damaged ({reason}): the checkpoint before it is used")
    raise ValueError(f"--resume: no checkpoint in {run} can be read: {reason}")
