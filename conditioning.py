"""How text enters the transformer (paper, section 3.2).

    adaLN            c = time embedding + MLP(pooled text): one vector that shifts, scales, gates all tokens
    cross-attention  image tokens are queries, text tokens are keys and values; adaLN stays, with the same c
    class            c = time embedding + label embedding: DiT (arXiv 2212.09748), where the paper starts

Several encoders may read a caption. Then the blocks take turns (*interleaving*): block k attends to encoder
number k modulo the number of encoders; in c, the pooled texts of all encoders are added.

Ours, where the paper is silent:
- The *null text* of classifier-free guidance (Ho & Salimans 2022) is a few learned tokens in each encoder's
  width. It is defined in TextCondition and nowhere else, so training and sampling share it. It is projected
  once a batch, beside the captions, and a mask chooses. An empty caption is the null text too.
- T5's tokens are pooled by their mean. CLIP's are pooled by taking the last one, the end of the text, which
  CLIP's own training made the summary of the text.
- Cross-attention is a plain pre-norm residual branch without a gate, as in PixArt-α.

Letters: B batch, F frames, N image tokens a frame, L text tokens, M null tokens, E width of an encoder, D
width, c the adaLN vector. Masks are boolean: True = a token, False = padding.
"""
from typing import NamedTuple

import torch
from torch import nn

from attention import MultiHeadAttention


class Text(NamedTuple):
    """What the blocks read of one encoder: captions, and beside them the null text. The mask chooses."""

    tokens: torch.Tensor  # (B, L, E), of the captions
    null: torch.Tensor  # (M, E)
    mask: torch.Tensor  # (B, L + M), True = attend


def modulate(x, shift, scale):
    """adaLN: x · (1 + scale) + shift; x (B, F, N, D), shift and scale (B, F or 1, 1, D) → (B, F, N, D)."""
    return torch.addcmul(shift, x, 1 + scale)


class CrossAttention(nn.Module):
    """The branch, added to x: x ← x + Attention(LN(x), text). All F·N tokens of a clip share one caption.

    width: D; heads: H; text_width: E, from which keys and values are projected directly."""

    def __init__(self, width, heads, text_width, qk_norm=False):
        super().__init__()
        self.norm = nn.LayerNorm(width, eps=1e-6)
        self.attention = MultiHeadAttention(width, heads, text_width, qk_norm)

    def forward(self, x, text, kept=None):
        """x (B, F, N, D), text: a Text → x plus the branch, (B, F, N, D). kept: a dictionary that keeps keys
        and values for further calls with the same text, as a sampler makes them."""
        kept = {} if kept is None else kept
        if self not in kept:
            null = self.attention.kv(text.null).expand(len(x), -1, -1)  # (B, M, 2·D)
            kept[self] = torch.cat([self.attention.kv(text.tokens), null], dim=1)  # (B, L + M, 2·D)
        y = self.norm(x).flatten(1, 2)  # (B, F·N, D)
        y = self.attention(y, kept[self], text.mask[:, None, None, :])  # (B, F·N, D)
        return x + y.view_as(x)  # (B, F, N, D)


def masked_mean(text, mask):
    """The mean over the tokens: text (B, L, E), mask (B, L) → (B, E). A text without any gives 0."""
    weight = mask.unsqueeze(-1).to(text.dtype)  # (B, L, 1)
    return (text * weight).sum(1) / weight.sum(1).clamp(min=1)  # (B, E)


def last_token(text, mask):
    """The last token, CLIP's end of text: text (B, L, E), mask (B, L) → (B, E); the first, if all is
    padding."""
    positions = torch.arange(mask.shape[1], device=mask.device)
    last = (mask * positions).argmax(1)  # (B,)
    return text[torch.arange(len(text), device=text.device), last]  # (B, E)


POOLING = {"mean": masked_mean, "last": last_token}


class TextCondition(nn.Module):
    """Encoded captions → a Text of each encoder for cross-attention, and a vector for adaLN.

    text_widths: E of each encoder. width: D. null_tokens: M of each encoder. pooling: "mean" or "last", for
    each encoder. ValueError if the three lists differ in length."""

    def __init__(self, text_widths, width, null_tokens, pooling):
        super().__init__()
        if not len(text_widths) == len(null_tokens) == len(pooling):
            raise ValueError(
                f"{len(text_widths)} text widths, {len(null_tokens)} null texts and {len(pooling)} ways of "
                "pooling: each encoder has one of each"
            )
        self.pooling = [POOLING[name] for name in pooling]
        self.null = nn.ParameterList(torch.empty(M, E) for M, E in zip(null_tokens, text_widths))
        self.pool = nn.ModuleList(
            nn.Sequential(nn.Linear(E, E), nn.SiLU(), nn.Linear(E, width)) for E in text_widths
        )

    def forward(self, texts, masks, dropped):
        """texts: (B, L, E) of each encoder; masks: (B, L) of each; dropped (B,): True = the null text
        instead. Returns a Text for each encoder, in a list, and the vector (B, D)."""
        found, vector = [], 0
        for text, mask, null, pooling, mlp in zip(texts, masks, self.null, self.pooling, self.pool):
            text = text.to(null.dtype)
            without = (dropped | ~mask.any(1)).unsqueeze(1)  # (B, 1)
            attended = torch.cat([mask & ~without, without.expand(-1, len(null))], dim=1)  # (B, L + M)
            found.append(Text(text, null, attended))
            of_captions = mlp(pooling(text, mask))  # (B, D)
            of_null = mlp(pooling(null.unsqueeze(0), mask.new_ones(1, len(null))))  # (1, D)
            vector = vector + torch.where(without, of_null, of_captions)  # (B, D)
        return found, vector


class LabelCondition(nn.Module):
    """A class label → a vector for adaLN. The last row of the table is the null label, as in DiT."""

    def __init__(self, classes, width):
        super().__init__()
        self.table = nn.Embedding(classes + 1, width)

    def forward(self, labels, mask, dropped):
        """labels (B,), integers in 0…classes-1; mask is not used; dropped (B,): True = the null label
        instead. Returns no text, and the vector (B, D)."""
        null = self.table.num_embeddings - 1
        return [None], self.table(torch.where(dropped, null, labels))
