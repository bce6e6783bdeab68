"""How the condition enters the transformer (paper, section 3.2).

    adaLN   c = time embedding + MLP(pooled text): one vector, which shifts, scales and gates every token alike.
    cross   the same c, and in each block cross-attention: image tokens ask, text tokens answer.
    class   c = time embedding + label embedding: DiT (arXiv 2212.09748), where the paper starts.

For classifier-free guidance (Ho & Salimans 2022) training replaces some captions by a *null text*. The paper does not
say what that is; ours is a few learned tokens in the encoder's width, kept here and nowhere else, so that training
and sampling cannot disagree. Pooling is not stated either; ours is the mean over the tokens that are words.

Letters: B batch, L text tokens, D width. Masks are boolean, True = a word to attend, False = padding.
"""
import torch
from torch import nn


def masked_mean(text, mask):
    """Mean over the attended tokens: text (B, L, E), mask (B, L) → (B, E). A row without any gives 0."""
    weight = mask[..., None].to(text.dtype)
    return (text * weight).sum(1) / weight.sum(1).clamp(min=1)  # (B, E)


def modulate(x, shift, scale):
    """adaLN: x (B, N, D) scaled and shifted alike at every position, shift and scale (B, 1, D)."""
    return x * (1 + scale) + shift  # (B, N, D)


class TextCondition(nn.Module):
    """Encoded text → (tokens for cross-attention, their mask, vector for adaLN).

    text_width: the encoder's width E. width: the model's D. null_tokens: length of the null text.
    """

    def __init__(self, text_width, width, null_tokens=1):
        super().__init__()
        self.null = nn.Parameter(torch.empty(null_tokens, text_width))  # the null text, filled by dit.initialise
        self.pool = nn.Sequential(nn.Linear(text_width, text_width), nn.SiLU(), nn.Linear(text_width, width))

    def drop(self, text, mask, dropped):
        """Replaces the text by the null text where dropped (B,) is True. text (B, L, E), mask (B, L) → the same."""
        padding = len(self.null) - text.shape[1]
        if padding > 0:  # short captions make room for the null text
            text = nn.functional.pad(text, (0, 0, 0, padding))
            mask = nn.functional.pad(mask, (0, padding))
        null = nn.functional.pad(self.null, (0, 0, 0, text.shape[1] - len(self.null)))  # (L, E)
        null_mask = torch.arange(text.shape[1], device=text.device) < len(self.null)  # (L,)
        text = torch.where(dropped[:, None, None], null.to(text.dtype), text)
        return text, torch.where(dropped[:, None], null_mask, mask)

    def forward(self, text, mask, dropped):
        """text (B, L, E), mask (B, L), dropped (B,) booleans → text (B, L, E), mask (B, L), vector (B, D)."""
        text, mask = self.drop(text, mask, dropped)
        return text, mask, self.pool(masked_mean(text, mask))


class LabelCondition(nn.Module):
    """Class label → vector for adaLN; the last row of the table is the null label (DiT's label dropout)."""

    def __init__(self, classes, width):
        super().__init__()
        self.table = nn.Embedding(classes + 1, width)

    def forward(self, labels, mask, dropped):
        """labels (B,) integers in 0…classes-1; mask is not used; dropped (B,). Returns None, None, vector (B, D)."""
        null = self.table.num_embeddings - 1
        return None, None, self.table(torch.where(dropped, null, labels))
