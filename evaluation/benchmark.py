"""Speed, as ratios within one run, because a machine's own speed wanders. In brackets: the goals.

    python -m evaluation.benchmark

On a CPU the commands take written-out attention. Cached latents stand for pictures that the published
autoencoder's architecture encoded once.
"""
import statistics
import time

import torch

from attention import fused_attention, use_attention, written_out_attention
from common.flops import Flops
from diffusion import motion_free_guidance
from dit import GenTron, ModelConfig
from encoders.autoencoder_kl import AutoencoderKL, AutoencoderKLConfig
from evaluation.dry_run import random_inputs


def ratio(first, second, repeats):
    """Median seconds of the second function over those of the first. They are called in turn, after one call
    each to warm up."""
    times = ([], [])
    for _ in range(repeats + 1):
        for function, found in zip((first, second), times):
            start = time.perf_counter()
            function()
            found.append(time.perf_counter() - start)
    a, b = (statistics.median(found[1:]) for found in times)
    return b / a


def build(size, count, frames, side, **changes):
    """A model of a size, and random arguments for it, with captions of 20 tokens."""
    model = GenTron(ModelConfig.of(size, **changes))
    use_attention(model, written_out_attention)
    return model, random_inputs(model.config, count, frames, side, [20], device="cpu")


def train(model, inputs):
    """One step of training, without the optimizer."""
    model(*inputs).square().mean().backward()
    model.zero_grad(set_to_none=True)


def main():
    model, (x, t, *_) = build("S", 8, 0, 32, integration="class", classes=1000)
    a, labels = torch.randn(4096, 4096), torch.randint(0, 1000, (8,))
    step = lambda: train(model, (x, t, labels))
    with Flops() as counter:
        step()
    for name, function in (("written-out", written_out_attention), ("fused", fused_attention)):
        use_attention(model, function)
        speed = counter.total / (2 * 4096**3) / ratio(lambda: a @ a, step, 9)
        print(f"S/2, 256 tokens, {name} attention, against a matrix product: {speed:.2f} (at least 0.8)")

    channels = dict(channels=8, out_channels=8)
    for size, count, side in (("mini", 16, 8), ("S", 1, 32)):
        pictures = build(size, count * 8, 0, side, **channels)
        clips = build(size, count, 8, side, **channels, temporal=True)
        slower = ratio(lambda: train(*pictures), lambda: train(*clips), 7)
        print(f"{size}, {count} clips of 8 frames against {count * 8} pictures: {slower:.2f} (at most 1.3)")

    model, (x, t, text, text_mask) = build("mini", 8, 8, 8, **channels, temporal=True)
    no = torch.zeros(8, dtype=torch.bool)
    given = dict(text=text, text_mask=text_mask, dropped=no, motion_free=no)
    conditions = given, given | dict(dropped=~no), given | dict(dropped=~no, motion_free=~no)
    plain, guided = (motion_free_guidance(model, *conditions, *scales) for scales in ((1.0, 1.0), (7.5, 1.2)))
    with torch.no_grad():
        slower = ratio(lambda: plain(x, t), lambda: guided(x, t), 15)
    print(f"mini, 8 clips of 8 frames: three guidance passes against one: {slower:.2f} (at most 2.95)")

    cached = build("S", 4, 0, 32)
    pictures = torch.rand(4, 3, 256, 256) * 2 - 1
    autoencoder = AutoencoderKL(AutoencoderKLConfig()).requires_grad_(False)

    def encode_and_train():
        autoencoder.encode(pictures)
        train(*cached)

    slower = ratio(lambda: train(*cached), encode_and_train, 3)
    print(f"S/2, 4 pictures of 256²: steps with encoding against cached ones: {slower:.2f} (at least 2)")


if __name__ == "__main__":
    main()
