"""Counts the FLOPs of a computation as it runs."""
import copy

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry


class Flops(TorchDispatchMode):
    """with Flops() as counter: …; counter.total is the FLOPs of all matrix products and convolutions in it.

    torch's FlopCounterMode counts the same, but also by module. For that it keeps alive whatever checkpointed
    blocks compute again, enough to run out of memory."""

    total = 0

    def __torch_dispatch__(self, function, types, arguments=(), options=None):
        options = options or {}
        result = function(*arguments, **options)
        if function.overloadpacket in flop_registry:
            self.total += flop_registry[function.overloadpacket](*arguments, **options, out_val=result)
        return result


def outline(model):
    """A copy of a module on the meta device, whose tensors have shapes and no values: to count FLOPs with, in
    no time and memory. Tokenizers are shared."""
    empty = lambda tensor: torch.empty_like(tensor, device="meta")
    memo = {id(tokenizer): tokenizer for tokenizer in getattr(model, "tokenizers", [])}
    memo |= {id(p): torch.nn.Parameter(empty(p), p.requires_grad) for p in model.parameters()}
    memo |= {id(buffer): empty(buffer) for buffer in model.buffers()}
    return copy.deepcopy(model, memo)
