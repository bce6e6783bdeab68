"""Attention, twice: written out to be read, and fused to be fast.

    attention(Q, K, V) = softmax(Q Kᵀ / sqrt(d)) V                      (Vaswani et al. 2017, equation 1)

Both functions below compute this. One mask rule holds in the whole project: boolean, True = attend. A query
that may attend nothing gets 0.

Letters: B batch, H heads, L queries, M keys, d width of a head, D = H·d width of the model.
"""
import torch
import torch.nn.functional as F
from torch import nn


def written_out_attention(q, k, v, mask=None):
    """softmax(q kᵀ / sqrt(d)) v, as in the equation.

    q (B, H, L, d); k and v (B, H, M, d); mask boolean, broadcastable to (B, H, L, M), True = attend.
    Returns (B, H, L, d).
    """
    d = q.shape[-1]
    scores = q @ k.transpose(-2, -1) / d**0.5  # (B, H, L, M)
    if mask is not None:
        scores = scores.masked_fill(~mask, torch.finfo(scores.dtype).min)
    weights = scores.softmax(dim=-1)  # (B, H, L, M)
    if mask is not None:
        weights = weights * mask  # a query with nothing to attend: softmax spreads it evenly, this makes it 0
    return weights @ v  # (B, H, L, d)


def fused_attention(q, k, v, mask=None):
    """The same in one kernel, which never stores the (L, M) weights. Arguments and result as above."""
    x = F.scaled_dot_product_attention(q, k, v, attn_mask=mask)  # (B, H, L, d)
    if mask is not None:
        x = x * mask.any(dim=-1, keepdim=True)  # some kernels give a query with nothing to attend a value
    return x


class MultiHeadAttention(nn.Module):
    """Projections to and from the heads, for self-attention (context = x) and cross-attention.

    width: D, divisible by heads: H. context_width: the width of the context, D if not given. qk_norm:
    LayerNorm on the queries and keys of each head (Dehghani et al. 2023, arXiv 2302.05442); their product
    cannot grow without bound then, which allows a larger learning rate. ValueError if H does not divide D.
    """

    def __init__(self, width, heads, context_width=None, qk_norm=False):
        super().__init__()
        if width % heads:
            raise ValueError(f"width {width} is not divisible by {heads} heads")
        self.heads = heads
        self.attend = fused_attention  # or written_out_attention: see `use_attention`
        self.q = nn.Linear(width, width)
        self.k = nn.Linear(context_width or width, width)
        self.v = nn.Linear(context_width or width, width)
        self.out = nn.Linear(width, width)
        self.q_norm = nn.LayerNorm(width // heads, bias=False) if qk_norm else nn.Identity()
        self.k_norm = nn.LayerNorm(width // heads, bias=False) if qk_norm else nn.Identity()

    def forward(self, x, context=None, mask=None):
        """x (B, L, D); context (B, M, context_width), or None: x itself; mask boolean, broadcastable to (B,
        H, L, M), True = attend. Returns (B, L, D)."""
        if context is None:
            context = x
        q = self.q(x).unflatten(-1, (self.heads, -1))  # (B, L, H, d)
        k = self.k(context).unflatten(-1, (self.heads, -1))  # (B, M, H, d)
        v = self.v(context).unflatten(-1, (self.heads, -1))  # (B, M, H, d)
        q = self.q_norm(q).transpose(1, 2)  # (B, H, L, d)
        k = self.k_norm(k).transpose(1, 2)  # (B, H, M, d)
        v = v.transpose(1, 2)  # (B, H, M, d)
        x = self.attend(q, k, v, mask)  # (B, H, L, d)
        x = x.transpose(1, 2).flatten(2)  # (B, L, D)
        return self.out(x)  # (B, L, D)


def use_attention(model, function):
    """Makes every attention layer of a model compute by `function`: fused_attention or
    written_out_attention."""
    for module in model.modules():
        if isinstance(module, MultiHeadAttention):
            module.attend = function


def choose_attention(model, name, device):
    """--attention. "auto" is fused on a GPU, where rows are long and memory is dear. It is written out on a
    CPU, where the fused kernel's many small products cost more than they save."""
    fused = name == "fused" or (name == "auto" and device.type != "cpu")
    use_attention(model, fused_attention if fused else written_out_attention)
