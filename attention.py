"""Attention, twice: written out to be read, and fused to be fast.

    attention(Q, K, V) = softmax(Q Kᵀ / sqrt(d)) V                      (Vaswani et al. 2017, equation 1)

Both functions below compute this. One mask rule holds in the whole project: boolean, True = attend. Every
query attends to something; conditioning.py sees to that where a text may be empty.

Letters: B batch, H heads, L queries, M keys, d width of a head, D = H·d width of the model.
"""
import torch
import torch.nn.functional as F
from torch import nn


def written_out_attention(q, k, v, mask=None):
    """softmax(q kᵀ / sqrt(d)) v, as in the equation.

    q (B, H, L, d); k and v (B, H, M, d); mask boolean, broadcastable to (B, H, L, M), True = attend. Returns
    (B, H, L, d)."""
    d = q.shape[-1]
    scores = q @ k.transpose(-2, -1) / d**0.5  # (B, H, L, M)
    if mask is not None:
        scores = scores.masked_fill(~mask, torch.finfo(scores.dtype).min)
    weights = scores.softmax(dim=-1)  # (B, H, L, M)
    return weights @ v  # (B, H, L, d)


def fused_attention(q, k, v, mask=None):
    """The same in one kernel, which never stores the (L, M) weights. Arguments and result as above."""
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask)  # (B, H, L, d)


def automatic_attention(q, k, v, mask=None):
    """Whichever is faster: written out on a CPU, whose fused kernel makes many small products; fused on a
    GPU, but for short rows such as the frames of a clip, which its kernels pad to 64 or more."""
    short = q.shape[-2] <= 32 and k.shape[-2] <= 32
    attend = written_out_attention if short or q.device.type == "cpu" else fused_attention
    return attend(q, k, v, mask)


ATTENTION = {"auto": automatic_attention, "fused": fused_attention, "written": written_out_attention}


class MultiHeadAttention(nn.Module):
    """Projections to and from the heads. Self-attention computes queries, keys and values of x in one
    product; cross-attention the queries of x in one, keys and values of the context in another.

    width: D, divisible by heads: H. context_width: of cross-attention alone, E. qk_norm: LayerNorm on the
    queries and keys of each head (Dehghani et al. 2023, arXiv 2302.05442); their product cannot grow without
    bound then, which allows a larger learning rate. ValueError if H does not divide D."""

    def __init__(self, width, heads, context_width=None, qk_norm=False):
        super().__init__()
        if width % heads:
            raise ValueError(f"width {width} is not divisible by {heads} heads")
        self.heads = heads
        self.attend = automatic_attention  # see `use_attention`
        if context_width is None:
            self.qkv = nn.Linear(width, 3 * width)
        else:
            self.q = nn.Linear(width, width)
            self.kv = nn.Linear(context_width, 2 * width)
        self.out = nn.Linear(width, width)
        self.q_norm = nn.LayerNorm(width // heads, bias=False) if qk_norm else nn.Identity()
        self.k_norm = nn.LayerNorm(width // heads, bias=False) if qk_norm else nn.Identity()

    def forward(self, x, kv=None, mask=None):
        """x (B, L, D); kv (B, M, 2·D): for cross-attention, `self.kv` of the context; mask boolean,
        broadcastable to (B, H, L, M), True = attend. Returns (B, L, D)."""
        if kv is None:
            q, k, v = self.qkv(x).chunk(3, dim=-1)  # (B, L, D) each
        else:
            q = self.q(x)  # (B, L, D)
            k, v = kv.chunk(2, dim=-1)  # (B, M, D) each
        q = self.q_norm(q.unflatten(-1, (self.heads, -1))).transpose(1, 2)  # (B, H, L, d)
        k = self.k_norm(k.unflatten(-1, (self.heads, -1))).transpose(1, 2)  # (B, H, M, d)
        v = v.unflatten(-1, (self.heads, -1)).transpose(1, 2)  # (B, H, M, d)
        x = self.attend(q, k, v, mask)  # (B, H, L, d)
        x = x.transpose(1, 2).flatten(2)  # (B, L, D)
        return self.out(x)  # (B, L, D)


def use_attention(model, name):
    """--attention: how every attention layer of a model computes, "auto", "fused" or "written"."""
    for module in model.modules():
        if isinstance(module, MultiHeadAttention):
            module.attend = ATTENTION[name]
