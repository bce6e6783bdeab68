"""What both tokenizers share: texts that can be encoded, and rows of different lengths in one batch.
Masks: True = a row's own, False = padding."""
import re

import torch
from torch.nn.utils.rnn import pad_sequence


def readable(text):
    """Text without byte-order marks at its start; U+FFFD in place of lone surrogates, which no encoding
    has."""
    return re.sub("[\ud800-\udfff]", "\ufffd", text.lstrip("\ufeff"))


def padded(rows, value=0):
    """B tensors (L_i, …) → one (B, L, …), padded on the right with `value`, and the mask (B, L)."""
    batch = pad_sequence(rows, batch_first=True, padding_value=value)  # (B, L, …)
    lengths = torch.tensor([[len(row)] for row in rows])  # (B, 1)
    return batch, torch.arange(batch.shape[1]) < lengths
