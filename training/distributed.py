"""One model on many GPUs: PyTorch's fully sharded data parallel (FSDP2), in a few functions.

    torchrun --nproc_per_node 8 train.py image --size XL/2 …

starts 8 processes (ranks). Each holds a share of every weight, gradient, EMA and optimizer state. It gathers
a block's weights just before the block runs, computes its share of the batch, and gives away its share of the
gradients' average.

    --shard 0    all ranks share one copy of the model
    --shard S    each S neighbours share one copy (the GPUs of a machine): HSDP
    --shard 1    every rank has the whole model; `Averaging` averages the gradients

FSDP costs Python some 3 ms a block and step while the GPU idles; if the model fits on one GPU, use --shard 1.
Without torchrun there is one process and the same code. A sharded weight is a DTensor, which optimizers,
norms and EMA take as they take any tensor.
"""
import os
import sys
import warnings
from datetime import timedelta

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.overrides import TorchFunctionMode


def rank():
    return int(os.environ.get("RANK", 0))


def world():
    """How many processes there are."""
    return int(os.environ.get("WORLD_SIZE", 1))


def start(device):
    """Joins the processes that torchrun started (does nothing without it), and returns this one's device. A
    process that waits ten minutes for another gives up, with an error."""
    if "RANK" not in os.environ:
        return device
    if device.type == "cuda":
        device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)))
        torch.cuda.set_device(device)
    if dist.is_initialized():
        return device
    for harmless in ("DTensor random operators", "FSDP2-wrapped module"):
        warnings.filterwarnings("ignore", harmless)
    if rank() > 0:
        sys.stdout = open(os.devnull, "w")  # one voice; errors go to stderr, from every rank
    dist.init_process_group("nccl" if device.type == "cuda" else "gloo", timeout=timedelta(minutes=10))
    return device


def shard(model, device, dtype, group=0):
    """Shares out the weights of a GenTron (or any module; if it has `blocks`, block by block), in place.
    dtype: of the products; weights stay in fp32 and gradients are summed in fp32. group: how many neighbours
    share the weights; 0: all; 1: none do. ValueError if the number of processes is no multiple of it."""
    group = min(group or world(), world())
    if world() % group:
        raise ValueError(f"--shard {group}: does not divide the {world()} processes")
    if group == 1:
        return
    if group == world():
        mesh = init_device_mesh(device.type, (group,))
    else:
        mesh = init_device_mesh(device.type, (world() // group, group), mesh_dim_names=("replicate", "shard"))
    policy = MixedPrecisionPolicy()
    if dtype != torch.float32:
        policy = MixedPrecisionPolicy(dtype, torch.float32)
    for block in getattr(model, "blocks", []):
        fully_shard(block, mesh=mesh, mp_policy=policy)
    fully_shard(model, mesh=mesh, mp_policy=policy)


def whole(tensor):
    """A sharded tensor's full value, on every rank; any other tensor as it is."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def share_of(tensor, like):
    """This rank's share of a tensor that every rank has whole, sharded as `like` is; if that is not sharded,
    the tensor."""
    if not isinstance(like, DTensor):
        return tensor
    return distribute_tensor(tensor, like.device_mesh, like.placements, src_data_rank=None)


class DrawnWhole(TorchFunctionMode):
    """While this mode is on, starting values are drawn for whole tensors on the CPU, and each rank keeps its
    share: a run starts alike on any device and any number of ranks, and no rank ever holds more than one
    whole tensor of a shared model."""

    FILLING = tuple(getattr(torch.Tensor, name) for name in ("normal_", "uniform_", "zero_", "fill_"))
    FILLING += (torch.nn.init.normal_,)

    def __torch_function__(self, function, types, arguments=(), options=None):
        options = dict(options or {})
        if function not in self.FILLING:
            return function(*arguments, **options)
        p, *rest = arguments or [options.pop("tensor")]  # nn.init.normal_ gives it by name
        value = function(torch.empty(p.shape), *rest, **options)
        return p.copy_(share_of(value.to(p.device), p))


class Averaging:
    """Averages a model's gradients over the ranks. FSDP does so for sharded weights. A gradient of a whole
    weight is sent off here as soon as the backward pass has it. (DDP wraps the forward pass of one module;
    here several modules train, and are called apart.)"""

    def __init__(self, model):
        self.model = model
        self.enabled = True
        self.sent = []
        for p in model.parameters():
            if world() > 1 and p.requires_grad and not isinstance(p, DTensor):
                p.register_post_accumulate_grad_hook(self.send)

    def send(self, p):
        if self.enabled:
            p.grad /= world()
            self.sent.append(dist.all_reduce(p.grad, async_op=True))

    def enable(self, enabled):
        """Whether the next backward pass averages, or only adds up gradients here."""
        self.enabled = enabled
        for module in self.model.modules():
            if isinstance(module, FSDPModule):
                module.set_requires_gradient_sync(enabled)

    def wait(self):
        """Until the averages of the last backward pass are there."""
        while self.sent:
            self.sent.pop().wait()


def total(value):
    """The sum of a number over all ranks."""
    if not dist.is_initialized():
        return value
    device = "cuda" if dist.get_backend() == "nccl" else "cpu"
    tensor = torch.tensor(float(value), dtype=torch.float64, device=device)
    dist.all_reduce(tensor)
    return tensor.item()


def majority(choice):
    """What most ranks chose (of a tie, what comes first in the alphabet), so that all do the same."""
    choices = gathered([choice])
    return min(sorted(set(choices)), key=lambda one: -choices.count(one))


def gathered(items):
    """The lists of all ranks, one after the other."""
    if not dist.is_initialized():
        return items
    lists = [None] * world()
    dist.all_gather_object(lists, items)
    return sum(lists, [])


def barrier():
    """Waits until every rank is here."""
    if dist.is_initialized():
        dist.barrier()
