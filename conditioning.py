"""How text enters the transformer (paper, section 3.2).

    adaLN            c = time embedding + MLP(pooled text): one vector that shifts, scales, gates all tokens
    cross-attention  image tokens are queries, text tokens are keys and values; adaLN stays, with the same c
    class            c = time embedding + label embedding: DiT (arXiv 2212.09748), where the paper starts

Several encoders may read a caption. Then the blocks take turns (*interleaving*): block k attends to encoder
number k modulo the number of encoders; in c, the pooled texts of all encoders are added.

Ours, where the paper is silent:
- The *null text* of classifier-free guidance (Ho & Salimans 2022) is a few learned tokens in each encoder's
  width. It is defined in TextCondition and nowhere else, so training and sampling share it.
- T5's tokens are pooled by their mean. CLIP's are pooled by taking the last one, the end of the text, which
  CLIP's own training made the summary of the text.
- Cross-attention is a plain pre-norm residual branch without a gate, as in PixArt-α.

Letters: B batch, F frames, N image tokens a frame, L text tokens, M null tokens, E width of an encoder, D
width, c the adaLN vector. Masks are boolean: True = a token, False = padding.
"""
import torch
import torch.nn.functional as F
from torch import nn

from attention import MultiHeadAttention


def modulate(x, shift, scale):
    """adaLN: x (B, F, N, D); shift and scale (B, F or 1, 1, D), the same at every position → (B, F, N, D)."""
    return x * (1 + scale) + shift


class CrossAttention(nn.Module):
    """The branch, added to x: x ← x + Attention(LN(x), text). All F·N tokens of a clip share one caption.

    width: D; heads: H; text_width: E, from which keys and values are projected directly."""

    def __init__(self, width, heads, text_width, qk_norm=False):
        super().__init__()
        self.norm = nn.LayerNorm(width, eps=1e-6)
        self.attention = MultiHeadAttention(width, heads, text_width, qk_norm)

    def forward(self, x, text, mask):
        """x (B, F, N, D), text (B, L, E), mask (B, L), True = attend → x plus the branch, (B, F, N, D)."""
        y = self.norm(x).flatten(1, 2)  # (B, F·N, D)
        y = self.attention(y, text, mask[:, None, None, :])  # (B, F·N, D)
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


def drop_captions(text, mask, dropped, null):
    """The caption, or the null text where `dropped` is True.

    text (B, L, E), mask (B, L), dropped (B,), null (M, E). Returns both, with max(L, M) tokens."""
    M = len(null)
    longest = max(M, text.shape[1])
    text = F.pad(text, (0, 0, 0, longest - text.shape[1]))  # (B, max(L, M), E)
    mask = F.pad(mask, (0, longest - mask.shape[1]))  # (B, max(L, M))
    null = F.pad(null, (0, 0, 0, longest - M))  # (max(L, M), E)
    null_mask = torch.arange(longest, device=mask.device) < M  # (max(L, M),)
    text = torch.where(dropped[:, None, None], null, text)
    mask = torch.where(dropped[:, None], null_mask, mask)
    return text, mask


class TextCondition(nn.Module):
    """Encoded captions → tokens for cross-attention, their masks, and a vector for adaLN.

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
        instead. Returns texts and masks, lists with one entry an encoder, and the vector (B, D)."""
        tokens, token_masks, vector = [], [], 0
        for text, mask, null, pooling, mlp in zip(texts, masks, self.null, self.pooling, self.pool):
            text, mask = drop_captions(text.to(null.dtype), mask, dropped, null)
            tokens.append(text)
            token_masks.append(mask)
            vector = vector + mlp(pooling(text, mask))  # (B, D)
        return tokens, token_masks, vector


class LabelCondition(nn.Module):
    """A class label → a vector for adaLN. The last row of the table is the null label, as in DiT."""

    def __init__(self, classes, width):
        super().__init__()
        self.table = nn.Embedding(classes + 1, width)

    def forward(self, labels, mask, dropped):
        """labels (B,), integers in 0…classes-1; mask is not used; dropped (B,): True = the null label
        instead. Returns no tokens, no masks, and the vector (B, D)."""
        null = self.table.num_embeddings - 1
        return [None], [None], self.table(torch.where(dropped, null, labels))
