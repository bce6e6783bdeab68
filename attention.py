"""Attention, twice: written out to be read, and fused to be fast.

    attention(Q, K, V) = softmax(Q Kᵀ / sqrt(d)) V                      (Vaswani et al. 2017, equation 1)

Both functions compute this; `FUSED` picks which one the models use, `use` sets it. One mask rule holds everywhere:
boolean, True = attend. A query that may attend nothing gets 0, in both.

Letters: B batch, H heads, L queries, M keys, d width of a head, D = H·d width of the model.
"""
import torch
import torch.nn.functional as F
from torch import nn

FUSED = True  # False: the models use the written-out attention


def written_out_attention(q, k, v, mask=None):
    """softmax(q kᵀ / sqrt(d)) v, as in the equation.

    q (B, H, L, d); k and v (B, H, M, d); mask boolean, broadcastable to (B, H, L, M), True = attend.
    Returns (B, H, L, d).
    """
    scores = q @ k.transpose(-2, -1) / q.shape[-1] ** 0.5  # (B, H, L, M)
    if mask is not None:
        scores = scores.masked_fill(mask.logical_not(), torch.finfo(scores.dtype).min)
    weights = scores.softmax(dim=-1)
    if mask is not None:
        weights = weights * mask  # changes only rows with nothing to attend, where softmax spreads evenly
    return weights @ v  # (B, H, L, d)


def fused_attention(q, k, v, mask=None):
    """The same in one kernel that never stores the (L, M) weights. Arguments and result as above."""
    x = F.scaled_dot_product_attention(q, k, v, attn_mask=mask)  # (B, H, L, d)
    return x if mask is None else x * mask.any(dim=-1, keepdim=True)  # not all kernels give 0 to a query with nothing to attend


def attention(q, k, v, mask=None):
    """Fused or written out, as `FUSED` says. Arguments and result as above."""
    return (fused_attention if FUSED else written_out_attention)(q, k, v, mask)


def use(name, device):
    """What --attention says: "fused", "written", or "auto": fused on a GPU, where rows are long and memory is dear, and
    written out on a CPU, where the kernel's many small products cost more than they save. ValueError for another name."""
    global FUSED
    if name not in ("auto", "fused", "written"):
        raise ValueError(f"--attention {name}: not one of auto, fused, written")
    FUSED = name == "fused" or name == "auto" and device.type != "cpu"


class MultiHeadAttention(nn.Module):
    """Projections to and from the heads. Serves self-attention (context = x) and cross-attention (context = text).

    width D, heads H with D divisible by H; context_width: width of the context if it is not D (keys and values
    are projected straight from it). qk_norm: LayerNorm on every head's queries and keys (Dehghani et al. 2023,
    arXiv 2302.05442): their product can then not grow without bound, which allows a larger learning rate.
    """

    def __init__(self, width, heads, context_width=None, qk_norm=False):
        super().__init__()
        if width % heads:
            raise ValueError(f"width {width} is not divisible by {heads} heads")
        self.heads = heads
        self.q = nn.Linear(width, width)
        self.k = nn.Linear(context_width or width, width)
        self.v = nn.Linear(context_width or width, width)
        self.out = nn.Linear(width, width)
        self.q_norm = nn.LayerNorm(width // heads, bias=False) if qk_norm else nn.Identity()
        self.k_norm = nn.LayerNorm(width // heads, bias=False) if qk_norm else nn.Identity()

    def split(self, x):
        """(B, L, D) → (B, L, H, d)"""
        return x.unflatten(-1, (self.heads, -1))

    def forward(self, x, context=None, mask=None):
        """x (B, L, D); context (B, M, context_width) or None for self-attention; mask boolean, broadcastable to
        (B, H, L, M), True = attend. Returns (B, L, D)."""
        context = x if context is None else context
        q = self.q_norm(self.split(self.q(x))).transpose(1, 2)  # (B, H, L, d)
        k = self.k_norm(self.split(self.k(context))).transpose(1, 2)  # (B, H, M, d)
        v = self.split(self.v(context)).transpose(1, 2)  # (B, H, M, d)
        x = attention(q, k, v, mask)  # (B, H, L, d)
        return self.out(x.transpose(1, 2).flatten(2))  # (B, L, D)
