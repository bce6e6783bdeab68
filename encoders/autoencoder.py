"""A KL autoencoder (Rombach et al. 2022): pictures to a small latent and back, so that diffusion has less to do.

    picture (B, 3, 8h, 8w) → encode → latent (B, C, h, w) → decode → picture

The encoder gives a mean and a log-variance; training decodes a sample of that Gaussian, and a small Kullback–Leibler
term keeps it near the unit one. `encode` and `decode` own the latent's scale and shift: outside of this file, latents
have mean 0 in every channel and standard deviation 1 over all.

This one is convolutional, trained here, and small enough for a laptop: the first layer folds 4×4 pixels into channels, so
that nothing runs at full resolution. The one published with Stable Diffusion (published_autoencoder.py) has the same methods;
`load` reads either. Letters: B batch, C latent channels, W width.
"""
import json
import warnings
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn

from encoders import weights


@dataclass
class AutoencoderConfig:
    channels: int = 8  # C
    width: int = 48  # channels at a quarter of the resolution; twice as many at an eighth
    depth: int = 1  # residual blocks at each resolution


def norm(width, groups=8, eps=1e-5):
    return nn.GroupNorm(groups, width, eps)


class ResidualBlock(nn.Module):
    """From one width to another if `out` is given: a 1×1 convolution then takes x along."""

    def __init__(self, width, out=None, groups=8, eps=1e-5):
        super().__init__()
        out = out or width
        self.norm1, self.conv1 = norm(width, groups, eps), nn.Conv2d(width, out, 3, padding=1)
        self.norm2, self.conv2 = norm(out, groups, eps), nn.Conv2d(out, out, 3, padding=1)
        self.conv_shortcut = nn.Identity() if out == width else nn.Conv2d(width, out, 1)
        nn.init.zeros_(self.conv2.weight)  # starts as the identity, which lets a deep stack learn at once
        nn.init.zeros_(self.conv2.bias)

    def forward(self, x):
        y = self.conv1(F.silu(self.norm1(x)))
        return self.conv_shortcut(x) + self.conv2(F.silu(self.norm2(y)))


class Autoencoder(nn.Module):
    """A linear path, which `start_from` sets to the principal components of 8×8 patches, the best that a linear
    autoencoder can do; and convolutions beside it, which start at zero and learn what that leaves. (Ours: without
    the linear path the convolutions spend the demo's whole time on getting as far as the principal components.)"""

    factor = 8  # pixels a latent position, each way

    def __init__(self, config):
        super().__init__()
        self.config = config
        W, C, depth = config.width, config.channels, config.depth
        self.linear_in = nn.Sequential(nn.PixelUnshuffle(8), nn.Conv2d(192, C, 1))
        self.encoder = nn.Sequential(
            nn.PixelUnshuffle(4),  # (B, 48, H/4, W/4)
            nn.Conv2d(48, W, 3, padding=1),
            *[ResidualBlock(W) for _ in range(depth)],
            nn.Conv2d(W, 2 * W, 3, stride=2, padding=1),  # (B, 2W, h, w)
            *[ResidualBlock(2 * W) for _ in range(depth)],
            norm(2 * W),
            nn.Conv2d(2 * W, 2 * C, 3, padding=1),  # mean and log-variance
        )
        self.linear_out = nn.Sequential(nn.Conv2d(C, 192, 1), nn.PixelShuffle(8))
        self.decoder = nn.Sequential(
            nn.Conv2d(C, 2 * W, 3, padding=1),  # (B, 2W, h, w)
            *[ResidualBlock(2 * W) for _ in range(depth)],
            nn.Conv2d(2 * W, 4 * W, 3, padding=1),
            nn.PixelShuffle(2),  # (B, W, H/4, W/4)
            *[ResidualBlock(W) for _ in range(depth)],
            norm(W),
            nn.SiLU(),
            nn.Conv2d(W, 48, 3, padding=1),
            nn.PixelShuffle(4),  # (B, 3, H, W)
        )
        for last in (self.encoder[-1], self.decoder[-2]):  # beside the linear path: nothing at first
            nn.init.zeros_(last.weight)
            nn.init.zeros_(last.bias)
        nn.init.constant_(self.encoder[-1].bias[C:], -6.0)  # little noise at first: nothing is learned through much
        self.register_buffer("shift", torch.zeros(C))
        self.register_buffer("scale", torch.ones(1))
        self.to(memory_format=torch.channels_last)  # convolutions on a CPU are a quarter faster so

    @torch.no_grad()
    def start_from(self, pictures):
        """Sets the linear path to the C largest principal components of the 8×8 patches of pictures (B, 3, H, W) in
        -1…1, all on one scale. (Each on its own scale, small details would weigh as much in the diffusion loss as
        where things are.) A few hundred pictures are enough."""
        patches = F.pixel_unshuffle(pictures, 8).movedim(1, -1).flatten(0, 2)  # (patches, 192)
        mean = patches.mean(0)
        U, S, _ = torch.linalg.svd((patches - mean).T.cov())
        components, std = U[:, : self.config.channels].T, S[: self.config.channels].mean().sqrt()  # (C, 192), scalar
        inward, outward = self.linear_in[1], self.linear_out[0]
        inward.weight.copy_((components / std)[..., None, None])
        inward.bias.copy_(-components @ mean / std)
        outward.weight.copy_((components * std).T[..., None, None])
        outward.bias.copy_(mean)

    def moments(self, pictures):
        """pictures (B, 3, H, W) in -1…1 → mean and log-variance of the raw latent, (B, C, H/8, W/8) each.
        ValueError if 8 does not divide H and W."""
        if pictures.shape[-1] % self.factor or pictures.shape[-2] % self.factor:
            raise ValueError(f"picture size {tuple(pictures.shape[-2:])} is not divisible by {self.factor}")
        mean, log_variance = self.encoder(pictures).chunk(2, dim=1)
        return self.linear_in(pictures) + mean, log_variance.clamp(-20, 10)

    def reconstruct(self, raw):
        """Raw latents (B, C, h, w) → pictures (B, 3, 8h, 8w)."""
        return self.linear_out(raw) + self.decoder(raw)

    def encode(self, pictures):
        """pictures (B, 3, H, W) in -1…1 → latent mean (B, C, H/8, W/8), shifted and scaled to mean 0 and std 1."""
        return (self.moments(pictures)[0] - self.shift.view(1, -1, 1, 1)) / self.scale

    def decode(self, latents):
        """latents (B, C, h, w), as encode gives them → pictures (B, 3, 8h, 8w), about -1…1, not clipped."""
        return self.reconstruct(latents * self.scale + self.shift.view(1, -1, 1, 1))

    def loss(self, pictures, noise, kl_weight=1e-5):
        """Reconstruction (mean absolute error) + kl_weight · KL, per sample (B,).
        noise: unit Gaussian of the latent's shape, (B, C, H/8, W/8)."""
        mean, log_variance = self.moments(pictures)
        kl = 0.5 * (mean.square() + log_variance.exp() - 1 - log_variance).flatten(1).sum(1)  # (B,)
        error = self.reconstruct(mean + (0.5 * log_variance).exp() * noise) - pictures
        return error.abs().flatten(1).mean(1) + kl_weight * kl

    @torch.no_grad()
    def calibrate(self, pictures):
        """Measures shift (one a channel) and scale (one for all, as in latent diffusion) on pictures (B, 3, H, W):
        a few hundred are enough."""
        mean = self.moments(pictures)[0]
        self.shift.copy_(mean.mean((0, 2, 3)))
        self.scale.copy_((mean - self.shift.view(1, -1, 1, 1)).std().clamp(min=1e-6))


def psnr(autoencoder, pictures):
    """Peak signal-to-noise ratio in dB of reconstructed pictures (B, 3, H, W) in -1…1, mean over pictures."""
    with torch.no_grad():
        error = autoencoder.decode(autoencoder.encode(pictures)).clamp(-1, 1) - pictures
    return (10 * (4 / error.square().flatten(1).mean(1)).log10()).mean().item()


def build(config):
    """The dictionary of an AutoencoderConfig or an AutoencoderKLConfig → the autoencoder, with new weights."""
    from encoders.autoencoder_kl import AutoencoderKL, AutoencoderKLConfig  # here, for it is made of this file's parts

    return AutoencoderKL(AutoencoderKLConfig(**config)) if "widths" in config else Autoencoder(AutoencoderConfig(**config))


def load(folder):
    """The autoencoder of a run's folder (`Autoencoder`) or of one as published (`AutoencoderKL`). ValueError if there is
    none, or the file is something else."""
    from encoders.autoencoder_kl import load_published

    path = Path(folder) / "model.safetensors"
    if not path.exists() and (path.parent / "config.json").exists():
        return load_published(folder)
    if not path.exists():
        raise ValueError(f"--autoencoder {folder}: no model.safetensors there; train one with `python train.py autoencoder`")
    tensors, metadata = weights.read(path)
    try:
        config = json.loads(metadata["config"])
        model = build(config["autoencoder"])
        model.load_state_dict(tensors)
    except (KeyError, TypeError, ValueError, RuntimeError) as error:
        raise ValueError(f"{path} is not an autoencoder of train.py: {' '.join(str(error).split())[:200]}") from None
    if not config.get("finished", True):
        raise ValueError(f"{path}: its training was stopped; go on with `python train.py autoencoder --resume` and its flags")
    return model


def check_scale(latents, tolerance=0.2):
    """Warns when latents (B, C, h, w) are not at mean 0 and standard deviation 1: diffusion's noise would then be too
    weak or too strong for them. Returns (mean, std)."""
    mean, std = latents.mean().item(), latents.std().item()
    if abs(mean) > tolerance or abs(std - 1) > tolerance:
        warnings.warn(
            f"latents have mean {mean:.2f} and standard deviation {std:.2f}, not 0 and 1: "
            "was this autoencoder trained on other pictures? Train one on these."
        )
    return mean, std
