"""Checkpoints of a run, to go on from: folders that torch.distributed.checkpoint writes and reads.

    RUN/checkpoints/000500/    one file a process, and where each tensor lies: any number can read it

A checkpoint holds the weights, their EMA, the optimizers' state, the number of steps done, and the flags. It
holds no random state and no data position: a step draws its batch and its noise from (seed, step) alone. A
folder is written under another name and renamed when it is whole and on the disk, so no broken one is ever
seen. Nothing that is read can run code.
"""
import json
import os
import pickle
import shutil
import warnings
from pathlib import Path

import torch
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.api import CheckpointException

from common.files import FORMAT, check_format
from training import distributed

# one process is what it then assumes, rightly
warnings.filterwarnings("ignore", "torch.distributed is disabled")

# Flags that --resume must repeat.
FIXED = (
    "size", "data", "cache", "integration", "image_size", "seed", "batch_size", "steps", "lr", "optimizer",
    "schedule", "target", "shift", "clips", "frames", "init", "joint", "motion_free_mask", "only_temporal",
    "p_motion_free", "own_timesteps", "frame_curriculum",
)


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
            raise ValueError(f"it holds {module}.{name}, more than a list of tensors")
        return super().find_class(module, name)


class Reader(dcp.FileSystemReader):
    """torch's, but for the list of contents. (Tensors it reads by torch.load with weights_only.)"""

    def read_metadata(self, *arguments, **options):
        with open(Path(self.path) / ".metadata", "rb") as file:
            metadata = Records(file).load()
        metadata.storage_meta.load_id = self.load_id
        return metadata


def state_of(trained, ema, optimizers):
    """All that is saved, by name: {"model.NAME", "ema.NAME", "optimizer.K.NAME.KEY"}. trained and ema: {name:
    tensor}."""
    state = {f"model.{name}": p.detach() for name, p in trained.items()}
    state |= {f"ema.{name}": average for name, average in ema.items()}
    names = {id(p): name for name, p in trained.items()}
    for k, optimizer in enumerate(optimizers):
        for p, values in optimizer.state.items():
            state |= {f"optimizer.{k}.{names[id(p)]}.{key}": value for key, value in values.items()}
    return state


def folders(run):
    """The whole checkpoints of a run's folder, oldest first."""
    found = (Path(run) / "checkpoints").glob("*/config.json")
    whole = [path.parent for path in found if path.parent.name.isdecimal()]
    return sorted(whole, key=lambda folder: int(folder.name))


def trained_in(run):
    """{"processor", "precision"} of the run's last checkpoint, or None: what hardware.precision_of takes."""
    try:
        config = json.loads((folders(run)[-1] / "config.json").read_text())["config"]
        return dict(processor=config.get("processor"), precision=config["precision"])
    except (IndexError, OSError, ValueError, KeyError, TypeError):  # none, or damaged, which `load` will say
        return None


def save(run, step, config, state, keep=2):
    """Writes a checkpoint; older ones than the last `keep` are removed, and those of later steps, which an
    earlier run left in the folder. config: a dictionary. OSError if it cannot be written; what was there
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
            (part / "config.json").write_text(json.dumps(dict(format=FORMAT, step=step, config=config)))
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


def load(run, flags, trained, ema, optimizers):
    """Fills weights, EMA and optimizers from the run's last checkpoint, whatever the number of ranks that
    wrote it; returns the number of steps done. ValueError if there is none, it is damaged, or it was made
    with other flags or another model."""
    if not folders(run):
        raise ValueError(f"--resume: there is no checkpoint in {run}; start without --resume")
    folder = folders(run)[-1]
    try:
        saved = json.loads((folder / "config.json").read_text())
        check_format("it", saved.get("format"))
        for key in FIXED:
            before, now = saved["config"].get(key), getattr(flags, key)
            if before != now:
                raise ValueError(f"made with --{key.replace('_', '-')} {before}, not {now}")
        create_state(optimizers)
        state = state_of(trained, ema, optimizers)
        shapes = Reader(folder).read_metadata().state_dict_metadata
        found = {name: tuple(shapes[name].size) for name in shapes}
        if found != {name: tuple(tensor.shape) for name, tensor in state.items()}:
            raise ValueError("its weights are of another model; give the flags it was made with")
        dcp.load(state, storage_reader=Reader(folder), no_dist=distributed.world() == 1)
    except ValueError as error:
        raise ValueError(f"--resume: {folder}: {error}") from None
    except (Exception, CheckpointException) as error:  # torch's readers raise many kinds
        reason = str(error).strip().splitlines()[-1][:200]
        raise ValueError(f"--resume: {folder} is damaged: {reason}") from None
    return saved["step"]


def create_state(optimizers):
    """Makes the optimizers' state, to be filled: a step with gradients of zero at a learning rate of zero."""
    for optimizer in optimizers:
        rates = [group["lr"] for group in optimizer.param_groups]
        for group in optimizer.param_groups:
            group["lr"] = 0.0
            for p in group["params"]:
                p.grad = torch.zeros_like(p)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        for group, rate in zip(optimizer.param_groups, rates):
            group["lr"] = rate
