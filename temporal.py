"""How motion enters (paper, section 3.3): temporal self-attention in every block, and a mask that takes it out again.

    (b f) n d → (b n) f d;   x ← x + TempSelfAttn(LN(x));   (b n) f d → (b f) n d

Each place of the picture looks at itself in all frames, after cross-attention and before the MLP, with a plain
LayerNorm. The output projection starts at zero, so that a new video model is exactly its image model, frame by frame.

The *motion-free mask* is the F×F identity: each frame sees itself alone, and the clip is F pictures. Training uses it on
pictures repeated into still clips, so that motion is a condition that can be dropped like a caption; sampling then turns
it up or down (`guided_motion` in diffusion.py).

The paper states no frame positions, and attention without them cannot tell a clip from its reverse. Ours are added to
what the attention reads: sinusoids of the frame's number. Under the motion-free mask there are none: a picture is no
frame number so and so.

Letters: B clips, F frames, N tokens a frame, D width. Masks: True = attend.
"""
import torch
from torch import nn

from attention import MultiHeadAttention


def motion_free_mask(motion_free, frames):
    """motion_free (B,) booleans → (B, F, F) boolean mask: the identity where True, everything where False."""
    identity = torch.eye(frames, dtype=torch.bool, device=motion_free.device)
    return identity | ~motion_free[:, None, None]  # (B, F, F)


class TempSelfAttn(nn.Module):
    """x (B, F·N, D), frame after frame → the same, each token having looked at its place in the other frames."""

    def __init__(self, width, heads, qk_norm=False):
        super().__init__()
        self.norm = nn.LayerNorm(width, eps=1e-6)
        self.attention = MultiHeadAttention(width, heads, qk_norm=qk_norm)

    def forward(self, x, positions, motion_free):
        """x (B, F·N, D); positions (F, D), of the frames; motion_free: (B,) booleans, True = each frame sees itself alone;
        or None, nowhere; or True, everywhere. Returns (B, F·N, D)."""
        y = self.norm(x)  # (B, F·N, D)
        if motion_free is True:  # the softmax over one frame is 1: attention gives each frame its own value
            return x + self.attention.out(self.attention.v(y))
        B, F = len(x), len(positions)
        y, mask = y.unflatten(1, (F, -1)).transpose(1, 2), None  # (B, N, F, D)
        if motion_free is not None:
            positions = positions * ~motion_free[:, None, None, None]  # (B, 1, F, D)
            mask = motion_free_mask(motion_free, F).repeat_interleave(y.shape[1], dim=0)[:, None]  # (B·N, 1, F, F)
        y = self.attention((y + positions.to(y.dtype)).flatten(0, 1), mask=mask)  # (B·N, F, D)
        return x + y.unflatten(0, (B, -1)).transpose(1, 2).flatten(1, 2)  # (B, F·N, D)


def inflate(video_model, image_state):
    """Fills a video model with an image model's weights; its temporal layers keep their start, at which they change
    nothing. image_state: the image model's state_dict. Returns the sorted names of the weights that are new. ValueError
    if the two differ in more than the temporal layers."""
    missing, unexpected = video_model.load_state_dict(image_state, strict=False)
    other = [name for name in missing if ".temporal." not in name] + list(unexpected)
    if other:
        raise ValueError(f"the image model does not fit the video model: {', '.join(other[:3])}")
    return sorted(missing)
