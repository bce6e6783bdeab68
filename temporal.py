"""How motion enters (paper, section 3.3): temporal self-attention, and a mask that takes motion out again.

    x ← x + TempSelfAttn(LN(x)):    (b f) n d → (b n) f d, attention over the frames, (b n) f d → (b f) n d

Each image token attends to the tokens at its own place in all frames. The layer stands after cross-attention
and before the MLP. It has a plain LayerNorm, no adaLN. Its output projection starts at zero, so that a new
video model is its image model, frame by frame.

The *motion-free mask* is the F×F identity: each frame attends to itself alone, and a clip is F separate
pictures. Training uses it on pictures that are repeated into still clips, so that motion becomes a condition
that can be dropped, as a caption can. Sampling then turns motion up or down (diffusion.py).

Ours, where the paper is silent: attention cannot tell a clip from its reverse unless frames have positions.
We use sinusoids of the frame's number, in two places. They are added to what the attention reads. And an MLP,
also zero at the start, adds them to the adaLN vector, where they meet the pooled text: "moving left" asks for
the opposite in the first frame and in the last. A motion-free sample has no positions.

Letters: B clips, F frames, N image tokens a frame, D width, c the adaLN vector. Masks: True = attend.
"""
import torch
from torch import nn

from attention import MultiHeadAttention


def motion_free_mask(motion_free, frames, tokens):
    """The mask of temporal attention, in which every image token is a row of the batch: the F×F identity for
    the tokens of a motion-free sample, else all True. It is built once a forward pass, for all blocks.

    motion_free (B,): True = a frame sees itself alone. frames: F. tokens: N. Returns (B·N, 1, F, F)."""
    identity = torch.eye(frames, dtype=torch.bool, device=motion_free.device)  # (F, F)
    mask = identity | ~motion_free[:, None, None]  # (B, F, F)
    return mask.repeat_interleave(tokens, dim=0).unsqueeze(1)  # (B·N, 1, F, F)


class FrameEmbedding(nn.Module):
    """What each frame adds to c: an MLP of its position."""

    def __init__(self, width):
        super().__init__()
        self.mlp = nn.Sequential(nn.Linear(width, width), nn.SiLU(), nn.Linear(width, width))

    def forward(self, positions, moving):
        """positions (F, D); moving (B, 1, 1), False in motion-free samples → (B, F, D), zero in those."""
        return self.mlp(positions) * moving


class TempSelfAttn(nn.Module):
    """x ← x + TempSelfAttn(LN(x)), over the frames."""

    def __init__(self, width, heads, qk_norm=False):
        super().__init__()
        self.norm = nn.LayerNorm(width, eps=1e-6)
        self.attention = MultiHeadAttention(width, heads, qk_norm=qk_norm)

    def forward(self, x, positions, mask):
        """x (B, F, N, D); positions (B, F, D), added after the LayerNorm, zero in motion-free samples; mask
        (B·N, 1, F, F), True = attend, or None: all True → x plus the branch, (B, F, N, D)."""
        B, F, N, D = x.shape
        y = self.norm(x) + positions.unsqueeze(2).to(x.dtype)  # (B, F, N, D)
        y = y.transpose(1, 2).reshape(B * N, F, D)  # (b f) n d → (b n) f d
        y = self.attention(y, mask=mask)  # (B·N, F, D)
        y = y.view(B, N, F, D).transpose(1, 2)  # (b n) f d → (b f) n d
        return x + y  # (B, F, N, D)


def inflate(video_model, image_state):
    """Fills a video model with an image model's weights; the temporal layers keep their starting values.

    image_state: the image model's state_dict. Returns the sorted names of the weights that are new.
    ValueError if the two models differ in more than the temporal layers."""
    missing, unexpected = video_model.load_state_dict(image_state, strict=False)
    other = [name for name in missing if "temporal." not in name] + list(unexpected)
    if other:
        raise ValueError(f"the image model does not fit the video model: {', '.join(other[:3])}")
    return sorted(missing)
