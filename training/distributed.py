"""One model on many GPUs: PyTorch's fully sharded data parallel (FSDP2), in a few functions.

    torchrun --nproc_per_node 8 train.py image --size XL/2 …

starts 8 processes (ranks). Each computes a share of the batch, and holds a share of every weight, gradient,
EMA and optimizer state: a DTensor, which optimizers, norms and EMA take as any tensor. A block's weights are
gathered just before the block runs.

    --shard 0    all ranks share one copy of the model
    --shard S    each S neighbours share one copy (the GPUs of a machine): HSDP
    --shard 1    every rank has the whole model; `Averaging` averages the gradients

FSDP costs Python some 3 ms a block and step while the GPU idles; if the model fits on one GPU, use --shard 1.
Without torchrun there is one process and the same code.
"""
import os
import statistics
import sys
import warnings
from datetime import timedelta

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.overrides import TorchFunctionMode

from common.hardware import rank, world


def start(device):
    """Joins the processes that torchrun started, if it did, and returns this one's device. A process that
    waits ten minutes for another gives up, with an error."""
    if device.type == "cuda":
        if "RANK" in os.environ:
            device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)))
        torch.cuda.set_device(device)
    if "RANK" not in os.environ or dist.is_initialized():
        return device
    warnings.filterwarnings("ignore", "DTensor random operators|FSDP2-wrapped module")  # both harmless here
    if rank() > 0:  # one voice; errors go to stderr, from every rank
        sys.stdout = open(os.devnull, "w", encoding="utf-8")
    # numbers of Python are exchanged on the CPUs, for which no GPU waits
    backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
    dist.init_process_group(backend, timeout=timedelta(minutes=10))
    return device


def shard(model, device, dtype, group=0):
    """Shares out the weights of a module in place, block by block if it has `blocks`. dtype: of the products;
    weights stay in fp32 and gradients are summed in fp32. group: how many neighbours share the weights; 0:
    all; 1: none do. ValueError if the number of processes is no multiple of it."""
    group = min(group or world(), world())
    if world() % group:
        raise ValueError(f"--shard {group}: does not divide the {world()} processes")
    if group == 1:
        return
    if group == world():
        mesh = init_device_mesh(device.type, (group,))
    else:
        mesh = init_device_mesh(device.type, (world() // group, group), mesh_dim_names=("replicate", "shard"))
    policy = MixedPrecisionPolicy(dtype, torch.float32)
    # By default the model's own weights, outside the blocks, would stay gathered until a backward pass. After
    # a preview, which has none, the next step would compute with the preview's EMA weights.
    blocks = [*getattr(model, "blocks", [])]
    for part in (*blocks, model):
        fully_shard(part, mesh=mesh, mp_policy=policy, reshard_after_forward=True)
    for block, following in zip(blocks, blocks[1:]):  # gathered while the block before it computes
        block.set_modules_to_forward_prefetch([following])


def whole(tensor):
    """A sharded tensor's full value, on every rank; any other tensor as it is."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def local(tensor):
    """This rank's share of a sharded tensor, in the same memory: for arithmetic number by number, of which
    DTensor's own dispatch costs more than the work. Any other tensor as it is."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def sharded(tensor, like):
    """The inverse of `local`: this rank's share of what is sharded as `like` is; if it has no shares, as it
    is."""
    if not isinstance(like, DTensor) or isinstance(tensor, DTensor) or tensor.ndim == 0:
        return tensor
    mesh, placements, shape = like.device_mesh, like.placements, like.shape
    return DTensor.from_local(tensor, mesh, placements, run_check=False, shape=shape, stride=like.stride())


def share_of(tensor, like):
    """This rank's share of a tensor that every rank has whole, if `like` is sharded; else the tensor."""
    if not isinstance(like, DTensor):
        return tensor
    return distribute_tensor(tensor, like.device_mesh, like.placements, src_data_rank=None)


class DrawnWhole(TorchFunctionMode):
    """While this mode is on, starting values are drawn for whole tensors on the CPU, one at a time, and each
    rank keeps its share: a run starts alike on any device and any number of ranks."""

    FILLING = ("normal_", "uniform_")  # all that is random in torch.nn.init

    def __torch_function__(self, function, types, arguments=(), options=None):
        options = dict(options or {})
        if function.__name__ not in self.FILLING:
            return function(*arguments, **options)
        p, *rest = arguments or [options.pop("tensor")]  # nn.init.normal_ gives it by name
        value = function(torch.empty(p.shape), *rest, **options)
        return p.copy_(share_of(value.to(p.device), p))


class Averaging:
    """Averages a model's gradients over the ranks. FSDP does so for sharded weights. A gradient of a whole
    weight is sent off here as soon as the backward pass has it. (DDP wraps the forward pass of one module;
    here several modules train, and are called apart.)"""

    def __init__(self, model):
        self.model, self.enabled, self.sent = model, True, []
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


def total(numbers):
    """The sum over all ranks of a number, or of each number in a list (of lists)."""
    if not dist.is_initialized():
        return numbers
    tensor = torch.tensor(numbers, dtype=torch.float64)
    dist.all_reduce(tensor)
    return tensor.tolist()


def majority(choice):
    """What most ranks chose (of a tie, what comes first in the alphabet), so that all do the same."""
    return statistics.mode(sorted(gathered([choice])))


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
