"""How the condition enters the transformer (paper, section 3.2).

    adaLN   c = time embedding + MLP(pooled text): one vector, which shifts, scales and gates every token alike.
    cross   the same c, and in each block cross-attention: image tokens ask, text tokens answer.
    class   c = time embedding + label embedding: DiT (arXiv 2212.09748), where the paper starts.

A caption may be read by several encoders. Their pooled texts, each through an MLP of its own, are added; in
cross-attention the blocks take turns (*interleaving*): block k reads the tokens of encoder k modulo their number.

For classifier-free guidance (Ho & Salimans 2022) training replaces some captions by a *null text*. The paper does not
say what that is; ours is a few learned tokens in each encoder's width, kept here and nowhere else, so that training
and sampling cannot disagree. Pooling is not stated either; ours is the mean over the tokens that are words for T5, and
the last word, which is the end of the text, for CLIP, whose training made that token the text's summary.

Letters: B batch, L text tokens, E width of an encoder, D width. Masks are boolean, True = a word to attend, False =
padding. Texts and masks come as tuples, with one entry an encoder.
"""
import torch
from torch import nn


def masked_mean(text, mask):
    """Mean over the attended tokens: text (B, L, E), mask (B, L) → (B, E). A row without any gives 0."""
    weight = mask.unsqueeze(-1).to(text.dtype)
    return (text * weight).sum(1) / weight.sum(1).clamp(min=1)  # (B, E)


def modulate(x, shift, scale):
    """adaLN: x (B, F, N, D) scaled and shifted alike at every position, shift and scale (B, F or 1, 1, D)."""
    return x * (1 + scale) + shift  # (B, F, N, D)


def last_word(text, mask):
    """The last attended token: text (B, L, E), mask (B, L) → (B, E). A row without any gives its first."""
    last = (mask * torch.arange(mask.shape[1], device=mask.device)).argmax(1)  # (B,)
    return text.take_along_dim(last.view(-1, 1, 1), dim=1).squeeze(1)  # (B, E)


POOLING = {"mean": masked_mean, "last": last_word}


def drop(text, mask, dropped, null):
    """Replaces text (B, L, E) and mask (B, L) by the null text (M, E) where dropped (B,) is True; shorter ones are
    padded to its length. Returns the same, (B, max(L, M), E) and (B, max(L, M))."""
    M, L = len(null), max(len(null), text.shape[1])
    text = nn.functional.pad(text, (0, 0, 0, L - text.shape[1]))
    mask = nn.functional.pad(mask, (0, L - mask.shape[1]))
    text = torch.where(dropped.view(-1, 1, 1), nn.functional.pad(null, (0, 0, 0, L - M)), text)
    return text, torch.where(dropped.view(-1, 1), torch.arange(L, device=mask.device) < M, mask)


class TextCondition(nn.Module):
    """Encoded texts → (tokens for cross-attention, their masks, vector for adaLN).

    text_widths: E of each encoder. width: the model's D. null_tokens: length of each one's null text. pooling: "mean" or
    "last" for each. ValueError if the three are not of one length.
    """

    def __init__(self, text_widths, width, null_tokens, pooling):
        super().__init__()
        if not len(text_widths) == len(null_tokens) == len(pooling):
            raise ValueError(f"{len(text_widths)} text widths, {len(null_tokens)} null texts and {len(pooling)} ways of pooling")
        self.pooling = [POOLING[name] for name in pooling]
        self.null = nn.ParameterList(torch.empty(L, E) for L, E in zip(null_tokens, text_widths))  # filled by dit.initialise
        self.pool = nn.ModuleList(nn.Sequential(nn.Linear(E, E), nn.SiLU(), nn.Linear(E, width)) for E in text_widths)

    def forward(self, texts, masks, dropped):
        """texts: a (B, L, E) an encoder; masks: a (B, L) each; dropped (B,) booleans, True = the null texts instead.
        Returns texts, masks, vector (B, D)."""
        pairs = [drop(text.to(null.dtype), mask, dropped, null) for text, mask, null in zip(texts, masks, self.null)]
        pooled = sum(mlp(pooling(*pair)) for mlp, pooling, pair in zip(self.pool, self.pooling, pairs))  # (B, D)
        texts, masks = zip(*pairs)
        return texts, masks, pooled


class LabelCondition(nn.Module):
    """Class label → vector for adaLN; the last row of the table is the null label (DiT's label dropout)."""

    def __init__(self, classes, width):
        super().__init__()
        self.table = nn.Embedding(classes + 1, width)

    def forward(self, labels, mask, dropped):
        """labels (B,) integers in 0…classes-1; mask is not used; dropped (B,). Returns (None,), (None,), vector (B, D)."""
        null = self.table.num_embeddings - 1
        return (None,), (None,), self.table(torch.where(dropped, null, labels))
