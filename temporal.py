"""How motion enters (paper, section 3.3): temporal self-attention in every block, and a mask that takes it out again.

    (b f) n d → (b n) f d;   x ← x + TempSelfAttn(LN(x));   (b n) f d → (b f) n d

Each place of the picture looks at itself in all frames, after cross-attention and before the MLP, with a plain
LayerNorm. The output projection starts at zero, so that a new video model is its image model, frame by
frame (up to rounding: a clip is multiplied by other kernels than a picture).

The *motion-free mask* is the F×F identity: each frame sees itself alone, and the clip is F pictures. Training uses it on
pictures repeated into still clips, so that motion is a condition that can be dropped like a caption; sampling then turns
it up or down (`guided_motion` in diffusion.py).

The paper states no frame positions, and attention without them cannot tell a clip from its reverse. Ours, sinusoids of
the frame's number, enter twice: added to what the attention reads, and through an MLP (also zero at the start) added to
the adaLN vector, where they meet the pooled text: "moving left" means one thing in the first frame and the opposite in
the last, and from the attention alone a short training does not learn that. Under the motion-free mask there are none:
a picture has no place in a clip.

Letters: B clips, F frames, N tokens a frame, D width. Masks: True = attend.
"""
import torch
from torch import nn

from attention import MultiHeadAttention


def motion_free_mask(motion_free, frames):
    """motion_free (B,) booleans → (B, F, F) boolean mask: the identity where True, everything where False."""
    identity = torch.eye(frames, dtype=torch.bool, device=motion_free.device)
    return identity | motion_free.logical_not().view(-1, 1, 1)  # (B, F, F)


class FrameEmbedding(nn.Module):
    """What each frame adds to the adaLN vector: sinusoids of its number, through an MLP."""

    def __init__(self, width):
        super().__init__()
        self.mlp = nn.Sequential(nn.Linear(width, width), nn.SiLU(), nn.Linear(width, width))

    def forward(self, positions, motion_free):
        """positions (F, D), motion_free as below → (B or 1, F, D), 0 where motion-free."""
        if motion_free is True:
            return torch.zeros_like(positions).unsqueeze(0)  # (1, F, D)
        y = self.mlp(positions).unsqueeze(0)  # (1, F, D)
        return y if motion_free is None else y * motion_free.logical_not().view(-1, 1, 1)  # (B, F, D)


class TempSelfAttn(nn.Module):
    """x (B, F, N, D) → the same, each token having looked at its place in the other frames."""

    def __init__(self, width, heads, qk_norm=False):
        super().__init__()
        self.norm = nn.LayerNorm(width, eps=1e-6)
        self.attention = MultiHeadAttention(width, heads, qk_norm=qk_norm)

    def forward(self, x, positions, motion_free):
        """x (B, F, N, D); positions (F, D), of the frames; motion_free: (B,) booleans, True = each frame sees itself alone;
        or None, nowhere; or True, everywhere. Returns (B, F, N, D)."""
        y = self.norm(x)  # (B, F, N, D)
        if motion_free is True:  # the softmax over one frame is 1: attention gives each frame its own value
            return x + self.attention.out(self.attention.v(y))
        B, F, N, _ = x.shape
        y, mask = y.transpose(1, 2), None  # (B, N, F, D)
        if motion_free is not None:
            positions = positions * motion_free.logical_not().view(-1, 1, 1, 1)  # (B, 1, F, D)
            mask = motion_free_mask(motion_free, F).repeat_interleave(N, dim=0).unsqueeze(1)  # (B·N, 1, F, F)
        y = self.attention((y + positions.to(y.dtype)).flatten(0, 1), mask=mask)  # (B·N, F, D)
        return x + y.unflatten(0, (B, N)).transpose(1, 2)  # (B, F, N, D)


def inflate(video_model, image_state):
    """Fills a video model with an image model's weights; its temporal layers keep their start, at which they change
    nothing. image_state: the image model's state_dict. Returns the sorted names of the weights that are new. ValueError
    if the two differ in more than the temporal layers."""
    missing, unexpected = video_model.load_state_dict(image_state, strict=False)
    other = [name for name in missing if "temporal." not in name] + list(unexpected)
    if other:
        raise ValueError(f"the image model does not fit the video model: {', '.join(other[:3])}")
    return sorted(missing)
