"""The autoencoder published with Stable Diffusion (Rombach et al. 2022, arXiv 2112.10752, section 3.1). It is
loaded, not trained here, and has the methods of autoencoder.py. Its modules bear the published names.
Letters: B batch, C latent channels, W width.
"""
from collections import OrderedDict
from dataclasses import dataclass

import torch
from torch import nn

from attention import fused_attention
from encoders import weights
from encoders.autoencoder import Autoencoder, ResidualBlock


@dataclass
class AutoencoderKLConfig:
    """Defaults: Stable Diffusion's, 84M parameters. Later ones (SDXL, SD3) differ only in these values."""

    channels: int = 4  # C
    widths: tuple = (128, 256, 512, 512)  # W at each resolution, which halves from one to the next
    depth: int = 2  # residual blocks at each resolution; the decoder has one more
    groups: int = 32  # of every GroupNorm
    scaling_factor: float = 0.18215  # 1 / standard deviation of the raw latents
    shift_factor: float = 0.0  # their mean
    quant_conv: bool = True  # a 1×1 convolution after the encoder
    post_quant_conv: bool = True  # a 1×1 convolution before the decoder


class PositionAttention(nn.Module):
    """Every position attends to all positions, with a single head."""

    def __init__(self, width, groups):
        super().__init__()
        self.group_norm = nn.GroupNorm(groups, width, 1e-6)
        self.to_q = nn.Linear(width, width)
        self.to_k = nn.Linear(width, width)
        self.to_v = nn.Linear(width, width)
        self.to_out = nn.ModuleList([nn.Linear(width, width)])

    def forward(self, x):
        y = self.group_norm(x).flatten(2).transpose(1, 2).unsqueeze(1)  # (B, 1, h·w, W)
        y = fused_attention(self.to_q(y), self.to_k(y), self.to_v(y))  # (B, 1, h·w, W)
        y = self.to_out[0](y).squeeze(1)  # (B, h·w, W)
        return x + y.transpose(1, 2).reshape(x.shape)  # (B, W, h, w)


class Middle(nn.Module):
    def __init__(self, width, groups):
        super().__init__()
        self.resnets = nn.ModuleList(ResidualBlock(width, width, groups, 1e-6) for _ in range(2))
        self.attentions = nn.ModuleList([PositionAttention(width, groups)])

    def forward(self, x):
        return self.resnets[1](self.attentions[0](self.resnets[0](x)))


def stack(**layers):
    """Named layers, one after the other."""
    return nn.Sequential(OrderedDict(layers))


def residual_blocks(width, out, depth, groups):
    return nn.Sequential(*[ResidualBlock(out if i else width, out, groups, 1e-6) for i in range(depth)])


def half(width):
    pad = nn.ZeroPad2d((0, 1, 0, 1))  # at the right and below only, as published
    return nn.Sequential(stack(pad=pad, conv=nn.Conv2d(width, width, 3, stride=2)))


def double(width):
    nearest = nn.Upsample(scale_factor=2.0)
    return nn.Sequential(stack(nearest=nearest, conv=nn.Conv2d(width, width, 3, padding=1)))


class AutoencoderKL(nn.Module):
    """Pictures go through a few at once, so memory does not grow with the batch; results are the same."""

    at_once = 64 * 64  # latent positions, as of four pictures of 256×256 pixels; at least one picture
    encode, decode = Autoencoder.encode, Autoencoder.decode  # the same shift and scale

    def __init__(self, config):
        super().__init__()
        self.config = config
        C, W, depth, groups = config.channels, config.widths, config.depth, config.groups
        last = len(W) - 1
        self.factor = 2**last  # pixels per latent position, each way
        down_blocks, up_blocks = [], []
        for i in range(last + 1):
            blocks = residual_blocks(W[max(i - 1, 0)], W[i], depth, groups)
            down_blocks.append(stack(resnets=blocks, downsamplers=half(W[i]) if i < last else nn.Identity()))
        for i in reversed(range(last + 1)):
            blocks = residual_blocks(W[min(i + 1, last)], W[i], depth + 1, groups)
            up_blocks.append(stack(resnets=blocks, upsamplers=double(W[i]) if i > 0 else nn.Identity()))
        self.encoder = stack(
            conv_in=nn.Conv2d(3, W[0], 3, padding=1),  # (B, W[0], H, W)
            down_blocks=nn.Sequential(*down_blocks),  # (B, W[last], h, w)
            mid_block=Middle(W[last], groups),
            conv_norm_out=nn.GroupNorm(groups, W[last], 1e-6),
            conv_act=nn.SiLU(),
            conv_out=nn.Conv2d(W[last], 2 * C, 3, padding=1),  # mean and log-variance
        )
        self.decoder = stack(
            conv_in=nn.Conv2d(C, W[last], 3, padding=1),  # (B, W[last], h, w)
            mid_block=Middle(W[last], groups),
            up_blocks=nn.Sequential(*up_blocks),  # (B, W[0], H, W)
            conv_norm_out=nn.GroupNorm(groups, W[0], 1e-6),
            conv_act=nn.SiLU(),
            conv_out=nn.Conv2d(W[0], 3, 3, padding=1),
        )
        self.quant_conv = nn.Conv2d(2 * C, 2 * C, 1) if config.quant_conv else nn.Identity()
        self.post_quant_conv = nn.Conv2d(C, C, 1) if config.post_quant_conv else nn.Identity()
        # published in the config, not among the weights
        self.register_buffer("shift", torch.full((C,), float(config.shift_factor)), persistent=False)
        self.register_buffer("scale", torch.full((1,), 1 / config.scaling_factor), persistent=False)

    def parts(self, x, positions):
        """x, of so many latent positions a sample, in parts: on a GPU twice as much at once."""
        most = self.at_once if x.device.type == "cpu" else 2 * self.at_once
        return x.split(max(1, most // positions))

    def moments(self, pictures):
        """pictures (B, 3, H, W) in -1…1 → mean and log-variance of the raw latent, (B, C, h, w) each."""
        H, W = pictures.shape[-2:]
        parts = self.parts(pictures, H * W // self.factor**2)
        parts = [self.quant_conv(self.encoder(part)) for part in parts]
        mean, log_variance = torch.cat(parts).chunk(2, dim=1)  # (B, C, h, w) each
        return mean, log_variance.clamp(-30, 20)

    def reconstruct(self, raw):
        """Raw latents (B, C, h, w) → pictures (B, 3, factor·h, factor·w)."""
        parts = self.parts(raw, raw.shape[-2] * raw.shape[-1])
        return torch.cat([self.decoder(self.post_quant_conv(part)) for part in parts])


FIELDS = {  # of AutoencoderKLConfig: key of config.json
    "channels": "latent_channels", "widths": "block_out_channels", "depth": "layers_per_block",
    "groups": "norm_num_groups", "scaling_factor": "scaling_factor", "shift_factor": "shift_factor",
    "quant_conv": "use_quant_conv", "post_quant_conv": "use_post_quant_conv",
}
# of the attention's tensors, in files of 2022: their names since
NAMES = {".query.": ".to_q.", ".key.": ".to_k.", ".value.": ".to_v.", ".proj_attn.": ".to_out.0."}


def load_published(folder):
    """A folder with config.json and diffusion_pytorch_model.safetensors or .bin → AutoencoderKL in fp32.
    ValueError, naming the folder, if it is damaged, holds something else or needs what is not built here."""
    found = weights.read_config(folder, "AutoencoderKL")
    weights.check_values(folder, found, act_fn=["silu"], latents_mean=[None], latents_std=[None])
    if found.get("shift_factor") is None:
        found["shift_factor"] = 0.0
    known = {field: (key, getattr(AutoencoderKLConfig, field)) for field, key in FIELDS.items()}
    config = AutoencoderKLConfig(**weights.read_values(folder, found, **known))
    if config.scaling_factor < 1e-6:
        wrong = f"scaling_factor is {config.scaling_factor}, not above 0.000001"
        raise ValueError(f"{folder}/config.json: {wrong}")
    if any(width % config.groups for width in config.widths):
        wrong = f"norm_num_groups is {config.groups}, which does not divide all of {config.widths}"
        raise ValueError(f"{folder}/config.json: {wrong}, its block_out_channels")
    model = weights.load_into(AutoencoderKL(config), folder, NAMES)
    return model.to(memory_format=torch.channels_last)  # which convolutions compute in fastest
