"""Rows of different lengths in one batch. Masks: True = a row's own, False = padding."""
import torch
from torch.nn.utils.rnn import pad_sequence


def padded(rows, value=0):
    """B tensors (L_i, …) → one (B, L, …), padded on the right with `value`, and the mask (B, L)."""
    batch = pad_sequence(rows, batch_first=True, padding_value=value)  # (B, L, …)
    lengths = torch.tensor([[len(row)] for row in rows])  # (B, 1)
    return batch, torch.arange(batch.shape[1]) < lengths
