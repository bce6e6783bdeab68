"""GenTron's diffusion transformer (arXiv 2312.04557, section 3; DiT, arXiv 2212.09748).

A noisy latent is cut into P×P patches, each patch becomes a token, a stack of blocks lets the tokens look at each
other and at the text, and a linear layer turns every token back into a patch:

    x (B, C, h, w) → patchify → tokens (B, N, D) → blocks → unpatchify → (B, C, h, w)

Of a clip, x (B, F, C, h, w), self-attention is each frame's own; cross-attention sees all its F·N tokens in a row, for it
has one text; and the temporal layers (temporal.py) link the frames. A picture is a clip of one frame.

Self-attention and MLP are written x ← x + gate · branch(adaLN(x)), with shift, scale and gate computed from c, which holds
the time and the pooled condition. Gates start at zero (adaLN-Zero), and so do the outputs of the other branches: a new block
is the identity.

Letters: B batch, F frames, N image tokens a frame, L text tokens, D width, H heads, C latent channels, P patch, E text width;
x noisy latent, t timestep, c the adaLN vector.
"""
from dataclasses import dataclass

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from attention import MultiHeadAttention
from conditioning import LabelCondition, TextCondition, modulate
from temporal import FrameEmbedding, TempSelfAttn

# (depth, width, heads, patch, position_step). S to XL are DiT's; XL and G are the paper's (Table 1), which states depth,
# width, MLP width and the number of parameters: 930.0M and 3083.8M. Heads are not stated (ours: DiT-XL's 16), nor what else
# is counted. Inferred, and within 0.1 % of both (929.2M, 3083.7M): DiT with learned variance and without labels, keys and
# values straight from the encoders' widths (768 in one block, 4096 in the next), pooled-text MLPs as wide as the encoder,
# null texts of 77 and 256 tokens.
# mini is ours, for a laptop: its 4×4 tokens stand 4 apart, so that they span what DiT's 16×16 span. One apart, their
# sinusoids would differ little beside the noise of a patch.
SIZES = {
    "mini": (6, 192, 4, 2, 4.0),
    "S": (12, 384, 6, 2, 1.0),
    "B": (12, 768, 12, 2, 1.0),
    "L": (24, 1024, 16, 2, 1.0),
    "XL": (28, 1152, 16, 2, 1.0),
    "G": (48, 1664, 16, 2, 1.0),
}


@dataclass
class ModelConfig:
    """All that is needed to rebuild the model; saved in every checkpoint. `ModelConfig.of("XL", …)` starts from a size."""

    depth: int = 6
    width: int = 192
    heads: int = 4
    patch: int = 2
    position_step: float = 1.0  # from a token to the next, in the positions' sinusoids
    mlp_ratio: int = 4
    channels: int = 4  # C of the latent
    out_channels: int = 4  # C, or 2 C where the variance is learned too
    integration: str = "cross"  # adaln, cross, or class
    text_widths: tuple = (128,)  # E of each text encoder; with several, the blocks take turns
    null_tokens: tuple = (1,)
    pooling: tuple = ("mean",)
    classes: int = 0  # for integration "class"
    qk_norm: bool = False
    temporal: bool = False  # a video model
    frame_step: float = 1.0  # from a frame to the next, in the positions' sinusoids

    @classmethod
    def of(cls, size, **changes):
        if size not in SIZES:
            raise ValueError(f"size {size!r} is not one of {', '.join(SIZES)}")
        names = ("depth", "width", "heads", "patch", "position_step")
        return cls(**dict(zip(names, SIZES[size])) | changes)


def patchify(x, patch):
    """(B, C, h, w) → (B, N, P·P·C) with N = (h/P)·(w/P), row by row. Pure reshape. ValueError if P does not divide."""
    B, C, h, w = x.shape
    if h % patch or w % patch:
        raise ValueError(f"a latent of {h}×{w} cannot be cut into patches of {patch}×{patch}")
    x = x.reshape(B, C, h // patch, patch, w // patch, patch)
    return x.permute(0, 2, 4, 3, 5, 1).reshape(B, -1, patch * patch * C)  # (B, N, P·P·C)


def unpatchify(x, patch, h, w):
    """The way back: (B, N, P·P·C) → (B, C, h, w)."""
    B = x.shape[0]
    x = x.reshape(B, h // patch, w // patch, patch, patch, -1)
    return x.permute(0, 5, 1, 3, 2, 4).reshape(B, -1, h, w)  # (B, C, h, w)


def sincos(position, width):
    """Sinusoids of a position (Vaswani et al. 2017): position (…) → (…, width), half sines, half cosines.
    width must be even. The frequencies fall from 1 to 1/10000."""
    frequency = torch.exp(-torch.arange(width // 2, device=position.device) / (width // 2) * 9.210340371976184)
    angle = position.unsqueeze(-1).float() * frequency  # (…, width/2)
    return torch.cat([angle.sin(), angle.cos()], dim=-1)


def position_embedding(rows, columns, width, step=1.0, device=None):
    """Fixed 2D sin-cos positions for a grid of any height and width: half the channels tell the column, half the row.
    step: from one token to the next. Returns (rows·columns, D), in the order of patchify. width must be divisible by 4."""
    row, column = torch.meshgrid(
        step * torch.arange(rows, device=device), step * torch.arange(columns, device=device), indexing="ij"
    )
    grid = torch.cat([sincos(column, width // 2), sincos(row, width // 2)], dim=-1)  # (rows, columns, D)
    return grid.flatten(0, 1)  # (N, D)


class TimestepEmbedding(nn.Module):
    """t (…) → (…, D): sinusoids (256 of them, cosines first, as in DiT), then a small MLP."""

    def __init__(self, width):
        super().__init__()
        self.mlp = nn.Sequential(nn.Linear(256, width), nn.SiLU(), nn.Linear(width, width))

    def forward(self, t):
        wave = sincos(t, 256).roll(128, dims=-1)  # (B, 256)
        return self.mlp(wave.to(self.mlp[0].weight.dtype))  # (B, D)


class MLP(nn.Sequential):
    """D → ratio·D → D with GELU (tanh form, as in DiT)."""

    def __init__(self, width, ratio):
        super().__init__(nn.Linear(width, ratio * width), nn.GELU(approximate="tanh"), nn.Linear(ratio * width, width))


class Block(nn.Module):
    """Self-attention → cross-attention → [temporal] → MLP. Self-attention and MLP are modulated by c; cross-attention is a
    plain pre-norm residual branch (its placement and the lack of a gate follow PixArt-α; the paper does not say).
    text_width: E of the encoder that this block reads."""

    def __init__(self, config, text_width=None):
        super().__init__()
        D = config.width
        self.modulation = nn.Sequential(nn.SiLU(), nn.Linear(D, 6 * D))
        self.norm1 = nn.LayerNorm(D, elementwise_affine=False, eps=1e-6)
        self.self_attention = MultiHeadAttention(D, config.heads, qk_norm=config.qk_norm)
        self.cross_attention = None
        if config.integration == "cross":
            self.norm_cross = nn.LayerNorm(D, eps=1e-6)
            self.cross_attention = MultiHeadAttention(D, config.heads, text_width, config.qk_norm)
        self.temporal = TempSelfAttn(D, config.heads, config.qk_norm) if config.temporal else None
        self.norm2 = nn.LayerNorm(D, elementwise_affine=False, eps=1e-6)
        self.mlp = MLP(D, config.mlp_ratio)

    def forward(self, x, c, text, mask, positions=None, motion_free=None):
        """x (B, F, N, D), c (B, F or 1, D), text (B, L, E), mask (B, L) True = attend → (B, F, N, D). positions (F, D) and
        motion_free as in temporal.py."""
        shift1, scale1, gate1, shift2, scale2, gate2 = self.modulation(c).unsqueeze(2).chunk(6, dim=-1)  # (B, F, 1, D) each
        y = modulate(self.norm1(x), shift1, scale1).flatten(0, 1)  # (B·F, N, D)
        x = x + gate1 * self.self_attention(y).view_as(x)  # (B, F, N, D)
        if self.cross_attention is not None:
            y = self.norm_cross(x).flatten(1, 2)  # (B, F·N, D)
            x = x + self.cross_attention(y, text, mask.view(len(mask), 1, 1, -1)).view_as(x)  # (B, F, N, D)
        if self.temporal is not None:
            x = self.temporal(x, positions, motion_free)  # (B, F, N, D)
        x = x + gate2 * self.mlp(modulate(self.norm2(x), shift2, scale2))  # (B, F, N, D)
        return x


class FinalLayer(nn.Module):
    """adaLN and the linear decoder: tokens (B, F, N, D) → patches (B, F, N, P·P·C)."""

    def __init__(self, config):
        super().__init__()
        self.modulation = nn.Sequential(nn.SiLU(), nn.Linear(config.width, 2 * config.width))
        self.norm = nn.LayerNorm(config.width, elementwise_affine=False, eps=1e-6)
        self.linear = nn.Linear(config.width, config.patch**2 * config.out_channels)

    def forward(self, x, c):
        shift, scale = self.modulation(c).unsqueeze(2).chunk(2, dim=-1)  # (B, F, 1, D) each
        return self.linear(modulate(self.norm(x), shift, scale))  # (B, F, N, P·P·C)


class GenTron(nn.Module):
    """The diffusion transformer. The output means what diffusion.py's target says: noise, velocity or x0."""

    def __init__(self, config):
        super().__init__()
        self.config = config
        self.checkpointing = False  # True: a block's insides are computed again in the backward pass, not kept
        self.patch_embedding = nn.Linear(config.patch**2 * config.channels, config.width)
        self.time = TimestepEmbedding(config.width)
        if config.integration == "class":
            self.condition = LabelCondition(config.classes, config.width)
        elif config.integration in ("adaln", "cross"):
            self.condition = TextCondition(config.text_widths, config.width, config.null_tokens, config.pooling)
        else:
            raise ValueError(f"integration {config.integration!r} is not one of adaln, cross, class")
        widths = config.text_widths
        self.blocks = nn.ModuleList(Block(config, widths[k % len(widths)]) for k in range(config.depth))
        self.final = FinalLayer(config)
        self.temporal = FrameEmbedding(config.width) if config.temporal else None
        initialise(self)

    def forward(self, x, t, text, mask=None, dropped=None, motion_free=None, numbers=None):
        """The network's output for a batch.

        x (B, C, h, w) noisy latent, or (B, F, C, h, w) clip; t (B,) timesteps, or (B, F), one a frame; text: for each encoder the encoded captions
        (B, L, E), and mask: for each (B, L), True = word; or text: labels (B,) when integration is "class"; dropped (B,)
        booleans, True = use the null condition instead; motion_free: (B,) booleans, True = each frame sees itself alone,
        or None: nowhere, or True: everywhere; numbers (F,): which frames of a clip these are, if not the first F.
        Returns (…, out_channels, h, w). ValueError if the patch does not divide h and w.
        """
        patch, (h, w), frames = self.config.patch, x.shape[-2:], x.shape[1] if x.ndim == 5 else 1
        if dropped is None:
            dropped = torch.zeros(len(x), dtype=torch.bool, device=x.device)
        texts, masks, pooled = self.condition(text, mask, dropped)  # (B, L, E) and (B, L) an encoder; (B, D)
        c, positions = self.time(t).view(len(x), -1, self.config.width) + pooled.unsqueeze(1), None  # (B, 1 or F, D)
        if self.temporal is not None:
            numbers = torch.arange(frames, device=x.device) if numbers is None else numbers
            positions = sincos(self.config.frame_step * numbers, self.config.width).to(c.dtype)  # (F, D)
            c = c + self.temporal(positions, motion_free)  # (B, F, D)
        shape, x = x.shape, self.patch_embedding(patchify(x.reshape(-1, *x.shape[-3:]), patch))  # (B·F, N, D)
        grid = position_embedding(h // patch, w // patch, self.config.width, self.config.position_step, x.device)
        x = (x + grid.to(x.dtype)).unflatten(0, (-1, frames))  # (B, F, N, D)
        for k, block in enumerate(self.blocks):
            inputs = (x, c, texts[k % len(texts)], masks[k % len(texts)], positions, motion_free)
            x = checkpoint(block, *inputs, use_reentrant=False) if self.checkpointing else block(*inputs)  # (B, F, N, D)
        x = self.final(x, c).flatten(0, 1)  # (B·F, N, P·P·C)
        return unpatchify(x, patch, h, w).view(*shape[:-3], -1, h, w)  # (B, [F,] C, h, w)


@torch.no_grad()
def initialise(model):
    """Every starting value, with its reason."""
    for module in model.modules():
        if isinstance(module, nn.Linear):
            nn.init.xavier_uniform_(module.weight)  # keeps the variance of activations from layer to layer
            nn.init.zeros_(module.bias)  # no preference before data
        elif isinstance(module, nn.LayerNorm) and module.elementwise_affine:
            nn.init.ones_(module.weight)  # normalised, and nothing else
            if module.bias is not None:
                nn.init.zeros_(module.bias)
    for layer in (model.time.mlp[0], model.time.mlp[2]):
        nn.init.normal_(layer.weight, std=0.02)  # DiT's: small, so that c starts near zero
    if isinstance(model.condition, LabelCondition):
        nn.init.normal_(model.condition.table.weight, std=0.02)  # DiT's
    else:
        for null in model.condition.null:
            nn.init.normal_(null)  # a text like any other: encoders give values of order 1
    for block in model.blocks:
        nn.init.zeros_(block.modulation[1].weight)  # shift, scale and gate 0: the block starts as the identity
        if block.cross_attention is not None:
            nn.init.zeros_(block.cross_attention.out.weight)  # no gate there, so its output starts at zero instead
        if block.temporal is not None:
            nn.init.zeros_(block.temporal.attention.out.weight)  # the paper's: a new video model is its image model
    if model.temporal is not None:
        nn.init.zeros_(model.temporal.mlp[2].weight)  # and for the same reason
    nn.init.zeros_(model.final.modulation[1].weight)
    nn.init.zeros_(model.final.linear.weight)  # the model starts by predicting 0, the mean of noise and velocity
