"""Speed, as ratios within one run, because a machine's own speed wanders.

    python -m evaluation.benchmark

1. A training step of S/2 on 256 tokens, fp32, against this machine's matrix product, with written-out
   attention (what the commands take on a CPU) and with fused. Goal: 0.80.
2. A training step on clips of 8 frames against one on as many pictures, mini and S/2. Goal: at most 1.3.
3. The three passes of motion-free guidance against one pass, mini. Goal: at most 2.95.
4. A training step of S/2 on 256×256 pictures, each time encoded by the published autoencoder's architecture,
   against one on cached latents. Goal: at least 2.
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


def compare(first, second, repeats=7):
    """Median seconds of two functions, called in turn, after one call each to warm up."""
    times = ([], [])
    for _ in range(repeats + 1):
        for function, found in zip((first, second), times):
            start = time.perf_counter()
            function()
            found.append(time.perf_counter() - start)
    return [statistics.median(found[1:]) for found in times]


def model_of(size, attend=written_out_attention, **changes):
    model = GenTron(ModelConfig.of(size, **changes))
    use_attention(model, attend)
    return model


def inputs_of(model, count, frames, side):
    """Random arguments for a text-conditioned model; captions have 20 tokens."""
    return random_inputs(model.config, count, frames, side, [20], device="cpu")


def step_of(model, inputs):
    """A function that trains for one step, without the optimizer."""

    def step():
        model(*inputs).square().mean().backward()
        model.zero_grad(set_to_none=True)

    return step


def against_the_product(name, attend):
    model, a = model_of("S", attend, integration="class", classes=1000), torch.randn(4096, 4096)
    step = step_of(model, (torch.randn(8, 4, 32, 32), *torch.randint(0, 1000, (2, 8))))
    with Flops() as counter:
        step()
    ratios = []
    for _ in range(3):
        product, whole_step = compare(lambda: a @ a, step, 3)
        rate, best_rate = counter.total / whole_step, 2 * 4096**3 / product
        ratios.append(rate / best_rate)
    rates = f"step {rate / 1e9:.0f}, product {best_rate / 1e9:.0f} GFLOP/s"
    print(f"S/2, 256 tokens, {name} attention: {rates}; ratio {statistics.median(ratios):.2f}")


def clips_against_pictures(size, count, side, frames=8):
    image, video = (model_of(size, channels=8, out_channels=8, temporal=flag) for flag in (False, True))
    pictures = step_of(image, inputs_of(image, count * frames, 0, side))
    clips = step_of(video, inputs_of(video, count, frames, side))
    a, b = compare(pictures, clips)
    print(f"{size}/2, {count} clips of {frames} frames against {count * frames} pictures: {b / a:.2f}")


@torch.no_grad()
def three_passes(count=8, frames=8):
    model = model_of("mini", channels=8, out_channels=8, temporal=True)
    x, t, text, masks = inputs_of(model, count, frames, 8)
    no = torch.zeros(count, dtype=torch.bool)
    given = dict(text=text, text_mask=masks, dropped=no, motion_free=no)
    conditions = given, given | dict(dropped=~no), given | dict(dropped=~no, motion_free=~no)
    plain, guided = (motion_free_guidance(model, *conditions, *scales) for scales in ((1.0, 1.0), (7.5, 1.2)))
    a, b = compare(lambda: plain(x, t), lambda: guided(x, t), 15)
    print(f"mini, {count} clips of {frames} frames: three guidance passes against one: {b / a:.2f}")


def encoding_against_the_cache(count=4):
    model, autoencoder = model_of("S"), AutoencoderKL(AutoencoderKLConfig()).requires_grad_(False)
    train, pictures = step_of(model, inputs_of(model, count, 0, 32)), torch.rand(count, 3, 256, 256) * 2 - 1

    def encode_and_train():
        autoencoder.encode(pictures)
        train()

    a, b = compare(train, encode_and_train, 3)
    print(f"S/2, {count} pictures of 256×256: a step with encoding against one from the cache: {b / a:.2f}")


if __name__ == "__main__":
    against_the_product("written-out", written_out_attention)
    against_the_product("fused", fused_attention)
    clips_against_pictures("mini", 16, 8)
    clips_against_pictures("S", 1, 32)
    three_passes()
    encoding_against_the_cache()
