"""A KL autoencoder (Rombach et al. 2022, arXiv 2112.10752): pictures to a small latent and back.

    picture (B, 3, 8h, 8w) → encode → latent (B, C, h, w) → decode → picture

The encoder predicts a Gaussian: a mean and a log-variance. Training decodes a sample of it, and a small
Kullback–Leibler term keeps it near the unit Gaussian. `encode` and `decode` apply the latent's shift and
scale: outside of this file, every latent channel has mean 0, and all together have standard deviation 1.

This one is trained here. Its first layer folds 4×4 pixels into channels, so that a laptop suffices: no
convolution works at full resolution. Letters: B batch, C latent channels, W width.
"""
import warnings
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import nn


@dataclass
class AutoencoderConfig:
    channels: int = 8  # C
    width: int = 48  # channels at a quarter of the resolution; twice as many at an eighth
    depth: int = 1  # residual blocks at each resolution


class ResidualBlock(nn.Module):
    """x + convolutions of x. If the width changes to `out`, a 1×1 convolution adapts x."""

    def __init__(self, width, out, groups=8, eps=1e-5):
        super().__init__()
        self.norm1 = nn.GroupNorm(groups, width, eps)
        self.conv1 = nn.Conv2d(width, out, 3, padding=1)
        self.norm2 = nn.GroupNorm(groups, out, eps)
        self.conv2 = nn.Conv2d(out, out, 3, padding=1)
        self.conv_shortcut = nn.Identity() if out == width else nn.Conv2d(width, out, 1)

    def forward(self, x):
        y = self.conv1(F.silu(self.norm1(x)))  # (B, out, h, w)
        y = self.conv2(F.silu(self.norm2(y)))  # (B, out, h, w)
        return self.conv_shortcut(x) + y


class Autoencoder(nn.Module):
    """A linear path plus convolutions. `start_from` sets the linear path to the principal components of 8×8
    patches, which no linear autoencoder beats; the convolutions start at zero and learn the rest. (The linear
    path is ours: without it, the convolutions need the demo's whole training to get that far.)"""

    factor = 8  # pixels per latent position, each way

    def __init__(self, config):
        super().__init__()
        self.config = config
        W, C, depth = config.width, config.channels, config.depth
        self.linear_in = nn.Sequential(nn.PixelUnshuffle(8), nn.Conv2d(192, C, 1))
        self.encoder = nn.Sequential(
            nn.PixelUnshuffle(4),  # (B, 48, H/4, W/4)
            nn.Conv2d(48, W, 3, padding=1),
            *[ResidualBlock(W, W) for _ in range(depth)],
            nn.Conv2d(W, 2 * W, 3, stride=2, padding=1),  # (B, 2W, h, w)
            *[ResidualBlock(2 * W, 2 * W) for _ in range(depth)],
            nn.GroupNorm(8, 2 * W),
            nn.Conv2d(2 * W, 2 * C, 3, padding=1),  # mean and log-variance
        )
        self.linear_out = nn.Sequential(nn.Conv2d(C, 192, 1), nn.PixelShuffle(8))
        self.decoder = nn.Sequential(
            nn.Conv2d(C, 2 * W, 3, padding=1),  # (B, 2W, h, w)
            *[ResidualBlock(2 * W, 2 * W) for _ in range(depth)],
            nn.Conv2d(2 * W, 4 * W, 3, padding=1),
            nn.PixelShuffle(2),  # (B, W, H/4, W/4)
            *[ResidualBlock(W, W) for _ in range(depth)],
            nn.GroupNorm(8, W),
            nn.SiLU(),
            nn.Conv2d(W, 48, 3, padding=1),
            nn.PixelShuffle(4),  # (B, 3, H, W)
        )
        self.register_buffer("shift", torch.zeros(C))
        self.register_buffer("scale", torch.ones(1))
        self.initialise()
        self.to(memory_format=torch.channels_last)  # makes convolutions on a CPU a quarter faster

    @torch.no_grad()
    def initialise(self):
        """Residual blocks start as the identity, so that a deep stack learns at once; the convolutions start
        at zero next to the linear path; the log-variance starts at -6, since much noise hides the picture."""
        ends = [module.conv2 for module in self.modules() if isinstance(module, ResidualBlock)]
        for layer in (*ends, self.encoder[-1], self.decoder[-2]):
            nn.init.zeros_(layer.weight)
            nn.init.zeros_(layer.bias)
        self.encoder[-1].bias[self.config.channels :] = -6.0

    @torch.no_grad()
    def start_from(self, pictures):
        """Sets the linear path to the C largest principal components of the 8×8 patches of pictures (B, 3, H,
        W) in -1…1; a few hundred are enough. All components share one scale: on scales of their own, small
        details would weigh as much in the diffusion loss as positions do."""
        C = self.config.channels
        patches = F.pixel_unshuffle(pictures, 8).movedim(1, -1).flatten(0, 2)  # (patches, 192)
        mean = patches.mean(0)  # (192,)
        U, S, _ = torch.linalg.svd((patches - mean).T.cov())
        components = U[:, :C].T  # (C, 192)
        std = S[:C].mean().sqrt().clamp(min=1e-2)  # 0 if all patches are alike
        self.linear_in[1].weight.copy_((components / std)[..., None, None])
        self.linear_in[1].bias.copy_(-components @ mean / std)
        self.linear_out[0].weight.copy_((components * std).T[..., None, None])
        self.linear_out[0].bias.copy_(mean)

    def moments(self, pictures):
        """pictures (B, 3, H, W) in -1…1 → mean and log-variance of the raw latent, each (B, C, H/8, W/8)."""
        mean, log_variance = self.encoder(pictures).chunk(2, dim=1)  # (B, C, h, w) each
        return self.linear_in(pictures) + mean, log_variance.clamp(-20, 10)

    def reconstruct(self, raw):
        """Raw latents (B, C, h, w) → pictures (B, 3, 8h, 8w)."""
        return self.linear_out(raw) + self.decoder(raw)

    def encode(self, pictures):
        """pictures (B, 3, H, W) in -1…1 → latent means (B, C, H/8, W/8), shifted and scaled. ValueError if 8
        does not divide H and W."""
        if pictures.shape[-1] % self.factor or pictures.shape[-2] % self.factor:
            raise ValueError(f"picture size {tuple(pictures.shape[-2:])} is not divisible by {self.factor}")
        return (self.moments(pictures)[0] - self.shift.view(1, -1, 1, 1)) / self.scale

    def decode(self, latents):
        """latents (B, C, h, w) from `encode` → pictures (B, 3, 8h, 8w), about -1…1, not clipped."""
        return self.reconstruct(latents * self.scale + self.shift.view(1, -1, 1, 1))

    def loss(self, pictures, noise, kl_weight=1e-5):
        """Mean absolute error of the reconstruction + kl_weight · KL, per sample (B,).
        noise: unit Gaussian in the latent's shape (B, C, H/8, W/8)."""
        mean, log_variance = self.moments(pictures)
        kl = 0.5 * (mean.square() + log_variance.exp() - 1 - log_variance).flatten(1).sum(1)  # (B,)
        error = self.reconstruct(mean + (0.5 * log_variance).exp() * noise) - pictures  # (B, 3, H, W)
        return error.abs().flatten(1).mean(1) + kl_weight * kl

    @torch.no_grad()
    def calibrate(self, pictures):
        """Sets shift (per channel) and scale (one for all, as in latent diffusion) from a few hundred
        pictures (B, 3, H, W) in -1…1."""
        mean = self.moments(pictures)[0]  # (B, C, h, w)
        self.shift.copy_(mean.mean((0, 2, 3)))
        self.scale.copy_((mean - self.shift.view(1, -1, 1, 1)).std().clamp(min=1e-6))


def psnr(autoencoder, pictures):
    """Peak signal-to-noise ratio in dB of reconstructed pictures (B, 3, H, W) in -1…1, mean over pictures."""
    with torch.no_grad():
        error = autoencoder.decode(autoencoder.encode(pictures)).clamp(-1, 1) - pictures
    return (10 * (4 / error.square().flatten(1).mean(1)).log10()).mean().item()


def check_scale(latents):
    """Warns if latents (B, C, h, w) are far from mean 0 and standard deviation 1, the scale of the noise."""
    mean, std = latents.mean().item(), latents.std().item()
    if abs(mean) > 0.2 or abs(std - 1) > 0.2:
        warnings.warn(
            f"latents have mean {mean:.2f} and standard deviation {std:.2f}, not 0 and 1: "
            "was this autoencoder trained on other pictures? Train one on these."
        )
