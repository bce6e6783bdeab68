"""The autoencoder published with Stable Diffusion (Rombach et al. 2022, arXiv 2112.10752, section 3.1): built, and read from
its folder; it is not trained here. What it is for, and the methods that it shares, are in autoencoder.py.

Letters: B batch, C latent channels, W width.
"""
import math
from collections import OrderedDict
from dataclasses import dataclass

import torch
from torch import nn

from encoders import weights
from attention import attention
from encoders.autoencoder import Autoencoder, ResidualBlock, norm


@dataclass
class AutoencoderKLConfig:
    """Defaults: as published with Stable Diffusion, 84M parameters. Later ones (SDXL, SD3) differ in numbers alone."""

    channels: int = 4  # C
    widths: tuple = (128, 256, 512, 512)  # W at each resolution, each half of the one before
    depth: int = 2  # residual blocks at each resolution; the decoder has one more
    groups: int = 32  # of every GroupNorm
    scaling_factor: float = 0.18215  # 1 / standard deviation of the raw latents
    shift_factor: float = 0.0  # their mean
    quant_conv: bool = True  # a 1×1 convolution after the encoder
    post_quant_conv: bool = True  # and one before the decoder


class PositionAttention(nn.Module):
    """Every position attends to all, with one head as wide as the channels."""

    def __init__(self, width, groups):
        super().__init__()
        self.group_norm = norm(width, groups, 1e-6)
        self.to_q, self.to_k, self.to_v = nn.Linear(width, width), nn.Linear(width, width), nn.Linear(width, width)
        self.to_out = nn.ModuleList([nn.Linear(width, width)])

    def forward(self, x):
        y = self.group_norm(x).flatten(2).transpose(1, 2).unsqueeze(1)  # (B, 1, h·w, W)
        y = self.to_out[0](attention(self.to_q(y), self.to_k(y), self.to_v(y)))
        return x + y.squeeze(1).transpose(1, 2).reshape(x.shape)  # (B, W, h, w)


class Middle(nn.Module):
    def __init__(self, width, groups):
        super().__init__()
        self.resnets = nn.ModuleList(ResidualBlock(width, width, groups, 1e-6) for _ in range(2))
        self.attentions = nn.ModuleList([PositionAttention(width, groups)])

    def forward(self, x):
        return self.resnets[1](self.attentions[0](self.resnets[0](x)))


def stack(**layers):
    """Layers with names, one after the other."""
    return nn.Sequential(OrderedDict(layers))


class AutoencoderKL(nn.Module):
    """Modules have the published names, so that published files load as they are.

    As many pictures as hold tile² latent positions go through at a time (one of 512×512 pixels, four of 256×256), which
    changes nothing but the memory: it stays the same for any batch. Bigger ones are decoded in tiles (`decode_tiles`), so
    that it stays the same for them too; they are encoded whole."""

    tile = 64  # latent positions each way
    encode, decode = Autoencoder.encode, Autoencoder.decode  # shift and scale, as there

    def __init__(self, config):
        super().__init__()
        self.config = config
        C, W, groups, last = config.channels, config.widths, config.groups, len(config.widths) - 1
        self.factor = 2**last  # pixels a latent position, each way

        def blocks(width, out, depth):
            return nn.Sequential(*[ResidualBlock(out if i else width, out, groups, 1e-6) for i in range(depth)])

        def down(width):  # zeros at the right and below only
            return nn.Sequential(stack(pad=nn.ZeroPad2d((0, 1, 0, 1)), conv=nn.Conv2d(width, width, 3, stride=2)))

        def up(width):
            return nn.Sequential(stack(nearest=nn.Upsample(scale_factor=2.0), conv=nn.Conv2d(width, width, 3, padding=1)))

        levels = [
            stack(resnets=blocks(W[max(i - 1, 0)], W[i], config.depth), downsamplers=down(W[i]) if i < last else nn.Identity())
            for i in range(last + 1)
        ]
        self.encoder = stack(
            conv_in=nn.Conv2d(3, W[0], 3, padding=1),  # (B, W[0], H, W)
            down_blocks=nn.Sequential(*levels),  # (B, W[last], h, w)
            mid_block=Middle(W[last], groups),
            conv_norm_out=norm(W[last], groups, 1e-6),
            conv_act=nn.SiLU(),
            conv_out=nn.Conv2d(W[last], 2 * C, 3, padding=1),  # mean and log-variance
        )
        levels = [
            stack(resnets=blocks(W[min(i + 1, last)], W[i], config.depth + 1), upsamplers=up(W[i]) if i else nn.Identity())
            for i in reversed(range(last + 1))
        ]
        self.decoder = stack(
            conv_in=nn.Conv2d(C, W[last], 3, padding=1),  # (B, W[last], h, w)
            mid_block=Middle(W[last], groups),
            up_blocks=nn.Sequential(*levels),  # (B, W[0], H, W)
            conv_norm_out=norm(W[0], groups, 1e-6),
            conv_act=nn.SiLU(),
            conv_out=nn.Conv2d(W[0], 3, 3, padding=1),
        )
        self.quant_conv = nn.Conv2d(2 * C, 2 * C, 1) if config.quant_conv else nn.Identity()
        self.post_quant_conv = nn.Conv2d(C, C, 1) if config.post_quant_conv else nn.Identity()
        # published in the config, not among the weights
        self.register_buffer("shift", torch.full((C,), float(config.shift_factor)), persistent=False)
        self.register_buffer("scale", torch.full((1,), 1 / config.scaling_factor), persistent=False)

    def moments(self, pictures):
        """pictures (B, 3, H, W) in -1…1 → mean and log-variance of the raw latent, (B, C, h, w) each, h = H / factor.
        ValueError if the factor does not divide H and W."""
        H, W = pictures.shape[-2:]
        if H % self.factor or W % self.factor:
            raise ValueError(f"picture size {(H, W)} is not divisible by {self.factor}")
        parts = pictures.split(max(1, (self.tile * self.factor) ** 2 // (H * W)))
        mean, log_variance = torch.cat([self.quant_conv(self.encoder(part)) for part in parts]).chunk(2, dim=1)
        return mean, log_variance.clamp(-30, 20)

    def reconstruct(self, raw):
        """Raw latents (B, C, h, w) → pictures (B, 3, factor·h, factor·w)."""
        at_once = self.tile**2 // (raw.shape[-2] * raw.shape[-1])
        if at_once == 0:
            return torch.cat([self.decode_tiles(part) for part in raw.split(1)])
        return torch.cat([self.decoder(self.post_quant_conv(part)) for part in raw.split(at_once)])

    def decode_tiles(self, raw):
        """`reconstruct` in tiles that share at least a quarter with the next one, where one fades into the other.
        An approximation: GroupNorm and attention see one tile, not the whole picture, so that colour and contrast may
        drift from tile to tile, and things far apart may match less well."""
        (h, w), n, f = raw.shape[-2:], self.tile, self.factor
        picture = torch.zeros(len(raw), 3, h * f, w * f, device=raw.device)  # sums in fp32, whatever the model's dtype
        total = torch.zeros(h * f, w * f, device=raw.device)
        for y in tile_starts(h, n):
            for x in tile_starts(w, n):
                tile = self.decoder(self.post_quant_conv(raw[..., y : y + n, x : x + n]))  # (B, 3, 8n, 8n), at the most
                weight = (fade(tile.shape[-2])[:, None] * fade(tile.shape[-1])).to(raw.device)  # (8n, 8n)
                rows, columns = slice(y * f, (y + n) * f), slice(x * f, (x + n) * f)
                picture[..., rows, columns] += weight * tile
                total[rows, columns] += weight
        return (picture / total).to(raw.dtype)


def tile_starts(length, tile):
    """Where tiles begin that cover 0…length evenly, the next one at most 3/4 of a tile further on."""
    steps = max(0, math.ceil((length - tile) / (tile * 3 // 4)))
    return [(length - tile) * i // steps for i in range(steps + 1)] if steps else [0]


def fade(n):
    """Weights (n,) of a tile's pixels along one side: 1, 2, 3, … to the middle and back. Where two tiles meet, their
    shares of the sum then change in a straight line from the one to the other."""
    return torch.minimum(torch.arange(1, n + 1), torch.arange(n, 0, -1))


def load_published(folder):
    """The AutoencoderKL, in fp32, of a folder with config.json and diffusion_pytorch_model.safetensors or .bin. ValueError,
    naming the folder, if they are damaged or something else."""
    try:
        model = AutoencoderKL(published_config(folder, weights.read_config(folder, "AutoencoderKL")))
    except (TypeError, ValueError) as error:
        raise ValueError(f"{folder}: no autoencoder that can be built here: {error}") from None
    return weights.load_into(model, folder, renamed)


def published_config(folder, found):
    """The dictionary in config.json → AutoencoderKLConfig. ValueError if it asks for what is not here."""
    names = dict(latent_channels="channels", block_out_channels="widths", layers_per_block="depth", norm_num_groups="groups",
                 scaling_factor="scaling_factor", shift_factor="shift_factor",
                 use_quant_conv="quant_conv", use_post_quant_conv="post_quant_conv")  # fmt: skip
    config = AutoencoderKLConfig(**{names[key]: value for key, value in found.items() if key in names and value is not None})
    levels = len(config.widths)
    here = dict(
        act_fn="silu", in_channels=3, out_channels=3, mid_block_add_attention=True, latents_mean=None, latents_std=None,
        down_block_types=["DownEncoderBlock2D"] * levels, up_block_types=["UpDecoderBlock2D"] * levels,
    )  # fmt: skip
    weights.check_values(folder, found, **{key: (value, [value]) for key, value in here.items()})
    return config


def renamed(name):
    """Files of 2022 call the layers of the attention query, key, value and proj_attn."""
    if ".attentions." in name:
        for old, new in dict(query="to_q", key="to_k", value="to_v", proj_attn="to_out.0").items():
            name = name.replace(f".{old}.", f".{new}.")
    return name
