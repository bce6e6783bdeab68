"""The machine that a command runs on: which device, and in which precision it multiplies.

    fp32    matrix products are computed in fp32 on every processor: torch's default, which no file here
            changes (on a GPU convolutions, the autoencoders', take TF32)
    bf16    products are computed in bf16 (torch.autocast); weights and samplers stay in fp32
    auto    bf16 where this machine multiplies it faster; measured once, and kept with the run
"""
import functools
import os
import platform
import re
import timeit
from pathlib import Path

import torch

PRECISIONS = ("auto", "fp32", "bf16")
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


def world():
    """How many processes torchrun has started; 1 without it."""
    return int(os.environ.get("WORLD_SIZE", 1)) if "RANK" in os.environ else 1


def rank():
    """The number of this process among them."""
    return int(os.environ["RANK"]) if world() > 1 else 0


def device_of(name="auto"):
    """"auto", or a device's name as torch writes it → torch.device; auto is cuda, else mps, else cpu.
    ValueError if this machine does not have the named one."""
    if name == "auto":
        name = "cpu"
        if torch.cuda.is_available():
            name = f"cuda:{os.environ.get('LOCAL_RANK', 0)}"  # torchrun's number of this process
        elif torch.backends.mps.is_available():
            name = "mps"
    try:
        return torch.empty(0, device=name).device
    except (RuntimeError, AssertionError):
        hint = "not to be had on this machine with this build of torch; try cpu"
        raise ValueError(f"--device {name}: {hint}") from None


def processor(device):
    """The name of the GPU or CPU, with torch's version: what decides which precision is faster."""
    name = platform.processor() or device.type
    cpuinfo = Path("/proc/cpuinfo")
    if device.type == "cuda":
        name = torch.cuda.get_device_name(device)
    elif device.type == "cpu" and cpuinfo.exists():
        text = cpuinfo.read_text()
        found = re.search(r"model name\s*: (.*)", text)
        name = found[1] if found else name
        name += ", bf16 instructions" if "bf16" in text else ""
    return f"{name}, torch {torch.__version__}"


@functools.cache
def matmul_rate(device, dtype):
    """FLOP/s of a square product on this machine, large enough to fill it; measured once."""
    n = 8192 if device.type == "cuda" else 1024
    a = torch.randn(n, n, device=device, generator=torch.Generator(device).manual_seed(0)).to(dtype)
    seconds = timeit.repeat(lambda: (a @ a)[0, 0].item(), number=1, repeat=8)
    return 2 * n**3 / min(seconds)


def precision_of(precision, device, chosen=None):
    """--precision → "fp32" or "bf16". chosen: {"processor", "precision"} of the run that this goes on with or
    draws from: on the same processor "auto" is what it was."""
    if precision != "auto":
        return precision
    if chosen and chosen["processor"] == processor(device):
        return chosen["precision"]
    # with instructions for it, bf16 is faster by far; without, slower by far
    return max(DTYPES, key=lambda name: matmul_rate(device, DTYPES[name]))


def products_in(precision, device):
    """A context in which products are computed in "fp32" or "bf16"."""
    return torch.autocast(device.type, torch.bfloat16, enabled=precision == "bf16")
