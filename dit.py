"""GenTron's diffusion transformer (arXiv 2312.04557, section 3; DiT, arXiv 2212.09748).

A noisy latent is cut into P×P patches. Each patch becomes a token. A stack of blocks lets the tokens attend
to each other and to the text. A linear layer turns every token back into a patch:

    x (B, C, h, w) → patchify → tokens (B, N, D) → blocks → unpatchify → (B, C, h, w)

A clip (B, F, C, h, w) has F·N tokens; a picture is a clip of one frame. Self-attention runs within a frame.
Cross-attention runs over all frames, which share one caption. Temporal attention links the frames.

A block is four residual branches:

    x ← x + gate · SelfAttention(adaLN(x))         shift, scale and gate come from c: time + pooled condition
    x ← x + CrossAttention(LN(x), text)            conditioning.py
    x ← x + TempSelfAttn(LN(x))                    temporal.py; video models only
    x ← x + gate · MLP(adaLN(x))

Every branch starts at zero (adaLN-Zero: the gates do), so a new block is the identity.

Letters: B batch, F frames, N image tokens a frame, L text tokens, D width, H heads, C latent channels, P
patch, E text width; x noisy latent, t timestep, c the adaLN vector.
"""
import math
from dataclasses import dataclass

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from attention import MultiHeadAttention
from conditioning import CrossAttention, LabelCondition, TextCondition, modulate
from temporal import FrameEmbedding, TempSelfAttn, motion_free_mask

# S to XL are DiT's. XL and G are the paper's (Table 1), which states depth, width, MLP width and parameters:
# 930.0M and 3083.8M. It does not state the heads (ours: 16, as DiT-XL), nor what is counted. The following
# comes within 0.1 % of both (929.2M, 3083.7M): learned variance, no labels, keys and values projected
# directly from the encoders' widths (CLIP's 768 and T5's 4096 in turn), pooled-text MLPs as wide as the
# encoder, null texts of 77 and 256 tokens. mini is ours, for a laptop. Its 4×4 tokens stand 4 apart, so that
# they span what DiT's 16×16 span: one apart, their positions would differ little.
SIZES = {
    "mini": dict(depth=6, width=192, heads=4, position_step=4.0),
    "S": dict(depth=12, width=384, heads=6),
    "B": dict(depth=12, width=768, heads=12),
    "L": dict(depth=24, width=1024, heads=16),
    "XL": dict(depth=28, width=1152, heads=16),
    "G": dict(depth=48, width=1664, heads=16),
}


@dataclass
class ModelConfig:
    """All that is needed to build the model, saved with it. `ModelConfig.of("XL", …)` starts from a size."""

    depth: int = 6
    width: int = 192  # D
    heads: int = 4  # H
    patch: int = 2  # P
    position_step: float = 1.0  # from one token to the next, in the sinusoids of the positions
    mlp_ratio: int = 4
    channels: int = 4  # C of the latent
    out_channels: int = 4  # C, or 2 C with learned variance
    integration: str = "cross"  # adaln, cross, or class
    text_widths: tuple = (128,)  # E of each text encoder
    null_tokens: tuple = (1,)  # M of each
    pooling: tuple = ("mean",)  # of each
    classes: int = 0  # for integration "class"
    qk_norm: bool = False
    temporal: bool = False  # True: a video model
    frame_step: float = 1.0  # from one frame to the next, in the sinusoids of the positions

    @classmethod
    def of(cls, size, **changes):
        """A size of SIZES with changes. ValueError for an unknown size."""
        if size not in SIZES:
            raise ValueError(f"size {size!r} is not one of {', '.join(SIZES)}")
        return cls(**SIZES[size] | changes)


def patchify(x, patch):
    """(B, C, h, w) → (B, N, P·P·C), N = (h/P)·(w/P), row by row. ValueError if P does not divide h and w."""
    B, C, h, w = x.shape
    if h % patch or w % patch:
        raise ValueError(f"a latent of {h}×{w} cannot be cut into patches of {patch}×{patch}")
    x = x.reshape(B, C, h // patch, patch, w // patch, patch)
    x = x.permute(0, 2, 4, 3, 5, 1)  # (B, h/P, w/P, P, P, C)
    return x.reshape(B, -1, patch * patch * C)  # (B, N, P·P·C)


def unpatchify(x, patch, h, w):
    """The inverse of patchify: (B, N, P·P·C) → (B, C, h, w)."""
    B = x.shape[0]
    x = x.reshape(B, h // patch, w // patch, patch, patch, -1)  # (B, h/P, w/P, P, P, C)
    x = x.permute(0, 5, 1, 3, 2, 4)  # (B, C, h/P, P, w/P, P)
    return x.reshape(B, -1, h, w)  # (B, C, h, w)


def sincos(position, width):
    """Sinusoids of a position (Vaswani et al. 2017): position (…) → (…, width), half sines, half cosines, at
    frequencies that fall from 1 to nearly 1/10000. width is even."""
    half = width // 2
    share = torch.arange(half, device=position.device) / half
    frequency = torch.exp(-share * math.log(10000.0))  # (width/2,)
    angle = position.unsqueeze(-1).float() * frequency  # (…, width/2)
    return torch.cat([angle.sin(), angle.cos()], dim=-1)  # (…, width)


def position_embedding(rows, columns, width, step=1.0, device=None):
    """Fixed 2D positions of a grid: half of the D channels tell the column, half the row, in the order of
    patchify. step: from one token to the next. Returns (rows·columns, D); 4 divides D."""
    row = step * torch.arange(rows, device=device)
    column = step * torch.arange(columns, device=device)
    row, column = torch.meshgrid(row, column, indexing="ij")  # (rows, columns) each
    grid = torch.cat([sincos(column, width // 2), sincos(row, width // 2)], dim=-1)  # (rows, columns, D)
    return grid.flatten(0, 1)  # (rows·columns, D)


class TimestepEmbedding(nn.Module):
    """t (…) → (…, D): 256 sinusoids, cosines first as in DiT, then an MLP."""

    def __init__(self, width):
        super().__init__()
        self.mlp = nn.Sequential(nn.Linear(256, width), nn.SiLU(), nn.Linear(width, width))

    def forward(self, t):
        wave = sincos(t, 256).roll(128, dims=-1)  # (…, 256), cosines first
        return self.mlp(wave.to(self.mlp[0].weight.dtype))  # (…, D)


class MLP(nn.Sequential):
    """D → ratio·D → D with GELU (tanh form, as in DiT)."""

    def __init__(self, width, ratio):
        hidden = ratio * width
        super().__init__(nn.Linear(width, hidden), nn.GELU(approximate="tanh"), nn.Linear(hidden, width))


class Block(nn.Module):
    """The four branches above. text_width: E of the encoder that this block reads."""

    def __init__(self, config, text_width):
        super().__init__()
        D, H, qk_norm = config.width, config.heads, config.qk_norm
        self.modulation = nn.Sequential(nn.SiLU(), nn.Linear(D, 6 * D))
        self.norm1 = nn.LayerNorm(D, elementwise_affine=False, eps=1e-6)
        self.self_attention = MultiHeadAttention(D, H, qk_norm=qk_norm)
        self.cross_attention = self.temporal = None
        if config.integration == "cross":
            self.cross_attention = CrossAttention(D, H, text_width, qk_norm)
        if config.temporal:
            self.temporal = TempSelfAttn(D, H, qk_norm)
        self.norm2 = nn.LayerNorm(D, elementwise_affine=False, eps=1e-6)
        self.mlp = MLP(D, config.mlp_ratio)

    def forward(self, x, c, text, kept=None, positions=None, temporal_mask=None):
        """x (B, F, N, D); c (B, F or 1, D); text and kept: as in conditioning.py; of a video model, positions
        (B, F, D) and temporal_mask (B·N, 1, F, F), None: all True, of temporal.py. Returns (B, F, N, D)."""
        modulation = self.modulation(c).unsqueeze(2)  # (B, F or 1, 1, 6·D)
        shift1, scale1, gate1, shift2, scale2, gate2 = modulation.chunk(6, dim=-1)  # (B, F or 1, 1, D) each
        y = modulate(self.norm1(x), shift1, scale1)
        y = self.self_attention(y.flatten(0, 1))  # (B·F, N, D)
        x = torch.addcmul(x, gate1, y.view_as(x))  # x + gate1 · y, (B, F, N, D)
        if self.cross_attention is not None:
            x = self.cross_attention(x, text, kept)
        if self.temporal is not None:
            x = self.temporal(x, positions, temporal_mask)
        y = self.mlp(modulate(self.norm2(x), shift2, scale2))
        return torch.addcmul(x, gate2, y)  # x + gate2 · y, (B, F, N, D)


class FinalLayer(nn.Module):
    """adaLN and the linear decoder: tokens (B, F, N, D) → patches (B, F, N, P·P·out_channels)."""

    def __init__(self, config):
        super().__init__()
        self.modulation = nn.Sequential(nn.SiLU(), nn.Linear(config.width, 2 * config.width))
        self.norm = nn.LayerNorm(config.width, elementwise_affine=False, eps=1e-6)
        self.linear = nn.Linear(config.width, config.patch**2 * config.out_channels)

    def forward(self, x, c):
        shift, scale = self.modulation(c).unsqueeze(2).chunk(2, dim=-1)  # (B, F or 1, 1, D) each
        return self.linear(modulate(self.norm(x), shift, scale))  # (B, F, N, P·P·out_channels)


class GenTron(nn.Module):
    """The diffusion transformer. What its output means is up to the target in diffusion.py: noise, velocity
    or x_0. ValueError for an unknown integration."""

    def __init__(self, config):
        super().__init__()
        self.config = config
        self.checkpointing = False  # True: keep each block's input alone, compute the rest again in backward
        self.patch_embedding = nn.Linear(config.patch**2 * config.channels, config.width)
        self.time = TimestepEmbedding(config.width)
        if config.integration == "class":
            self.condition = LabelCondition(config.classes, config.width)
        elif config.integration in ("adaln", "cross"):
            parts = config.text_widths, config.width, config.null_tokens, config.pooling
            self.condition = TextCondition(*parts)
        else:
            raise ValueError(f"integration {config.integration!r} is not one of adaln, cross, class")
        E = config.text_widths
        self.blocks = nn.ModuleList(Block(config, E[k % len(E)]) for k in range(config.depth))
        self.final = FinalLayer(config)
        self.temporal = FrameEmbedding(config.width) if config.temporal else None
        initialise(self)

    def forward(
        self, x, t, text, text_mask=None, dropped=None, motion_free=None, frame_numbers=None, kept=None
    ):
        """The network's output, (…, out_channels, h, w). ValueError if P does not divide h and w.

        x            (B, C, h, w) noisy latents of pictures, or (B, F, C, h, w) of clips
        t            (B,) timesteps, or (B, F): one for each frame
        text         (B, L, E) for each encoder; or labels (B,), if the integration is "class"
        text_mask    (B, L) for each encoder, True = a token
        dropped      (B,) True = the null condition in place of text; None: nowhere
        motion_free  (B,) True = each frame attends to itself alone; None: nowhere
        frame_numbers  (F,) which frames of a clip these are; None: the first F. kept: as in CrossAttention"""
        clip = x if x.ndim == 5 else x.unsqueeze(1)  # (B, F, C, h, w)
        B, F, _, h, w = clip.shape
        P, D = self.config.patch, self.config.width
        nowhere = torch.zeros(B, dtype=torch.bool, device=x.device)

        texts, pooled = self.condition(text, text_mask, nowhere if dropped is None else dropped)  # (B, D)
        c = self.time(t).view(B, -1, D) + pooled.unsqueeze(1)  # (B, F or 1, D)

        y = self.patch_embedding(patchify(clip.flatten(0, 1), P))  # (B·F, N, D)
        y = y + position_embedding(h // P, w // P, D, self.config.position_step, x.device).to(y.dtype)
        y = y.unflatten(0, (B, F))  # (B, F, N, D)

        positions = temporal_mask = None
        if self.temporal is not None:
            numbers = torch.arange(F, device=x.device) if frame_numbers is None else frame_numbers
            positions = sincos(self.config.frame_step * numbers, D).to(c.dtype)  # (F, D)
            if motion_free is not None:
                temporal_mask = motion_free_mask(motion_free, F, y.shape[2])  # (B·N, 1, F, F)
            moving = ~(nowhere if motion_free is None else motion_free)[:, None, None]  # (B, 1, 1)
            c = c + self.temporal(positions, moving)  # (B, F, D)
            positions = positions * moving  # (B, F, D)

        for k, block in enumerate(self.blocks):
            inputs = y, c, texts[k % len(texts)], kept, positions, temporal_mask  # the encoders take turns
            y = checkpoint(block, *inputs, use_reentrant=False) if self.checkpointing else block(*inputs)

        y = self.final(y, c).flatten(0, 1)  # (B·F, N, P·P·out_channels)
        return unpatchify(y, P, h, w).view(*x.shape[:-3], -1, h, w)  # (B, [F,] out_channels, h, w)


@torch.no_grad()
def initialise(model):
    """Sets every starting value of a GenTron, with its reason."""
    for module in model.modules():
        if isinstance(module, nn.Linear):
            nn.init.xavier_uniform_(module.weight)  # keeps the variance of activations from layer to layer
            nn.init.zeros_(module.bias)  # no preference before data
        elif isinstance(module, nn.LayerNorm) and module.elementwise_affine:
            nn.init.ones_(module.weight)  # a plain normalisation
            if module.bias is not None:
                nn.init.zeros_(module.bias)
    for layer in (model.time.mlp[0], model.time.mlp[2]):
        nn.init.normal_(layer.weight, std=0.02)  # DiT's: c starts near zero
    if isinstance(model.condition, LabelCondition):
        nn.init.normal_(model.condition.table.weight, std=0.02)  # DiT's
    else:
        for null in model.condition.null:
            nn.init.normal_(null)  # as large as an encoder's tokens
    for block in model.blocks:
        nn.init.zeros_(block.modulation[1].weight)  # adaLN-Zero: shift, scale and gate are 0
        if block.cross_attention is not None:
            nn.init.zeros_(block.cross_attention.attention.out.weight)  # it has no gate: its output is 0
        if block.temporal is not None:
            nn.init.zeros_(block.temporal.attention.out.weight)  # the paper's: no motion at first
    if model.temporal is not None:
        nn.init.zeros_(model.temporal.mlp[2].weight)  # for the same reason
    nn.init.zeros_(model.final.modulation[1].weight)  # adaLN-Zero, as in the blocks
    nn.init.zeros_(model.final.linear.weight)  # it predicts 0, the mean of noise and of velocity
