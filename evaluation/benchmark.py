"""Speed, as ratios within one run, because a machine's own speed wanders.

    python -m evaluation.benchmark

1. the training step of S/2 on 256 tokens, fp32, against this machine's matrix product: as torch comes, and through oneDNN,
   which the commands use on CPUs. goal: 0.80
2. a training step on clips of 8 frames against one on as many pictures, mini and S/2. goal: at most 1.3
3. the three passes of motion-free guidance against one pass, mini. goal: at most 2.95
4. a training step of S/2 on 256×256 pictures, encoded by the published autoencoder's architecture in every step, against one
   on latents from the cache. goal: at least 2
"""
import statistics
import time

import torch

import attention
from diffusion import guided_motion
from dit import GenTron, ModelConfig
from evaluation.dry_run import Flops
from common.hardware import device_of
from encoders.autoencoder_kl import AutoencoderKL, AutoencoderKLConfig


def compare(first, second, repeats=7):
    """Median seconds of two functions, called in turn, after one call each to warm up."""
    times = ([], [])
    for i in range(repeats + 1):
        for function, found in zip((first, second), times):
            start = time.perf_counter()
            function()
            if i:
                found.append(time.perf_counter() - start)
    return map(statistics.median, times)


def batch(config, count, frames, side, length=20):
    """Random arguments for a text-conditioned model: count clips (or, with 0 frames, pictures) of side×side latents."""
    shape = (count, frames, config.channels, side, side) if frames else (count, config.channels, side, side)
    mask = torch.ones(count, length, dtype=torch.bool)
    text = torch.randn(count, length, config.text_widths[0])
    return torch.randn(shape), torch.randint(0, 1000, (count,)), (text,), (mask,)


def step_of(model, arguments):
    """A function that trains for one step, without the optimizer."""

    def step():
        model(*arguments).square().mean().backward()
        model.zero_grad(set_to_none=True)
        arguments[0].flatten()[0].item()  # waits for a GPU

    return step


def against_the_product(name):
    config = ModelConfig.of("S", integration="class", classes=1000)
    model, a = GenTron(config), torch.randn(4096, 4096)
    step = step_of(model, (torch.randn(8, 4, 32, 32), *torch.randint(0, 1000, (2, 8))))
    with Flops() as counter:
        step()
    ratios = []
    for _ in range(3):
        product, whole = compare(lambda: (a @ a)[0, 0].item(), step, 3)
        product, rate = 2 * 4096**3 / product, counter.total / whole
        ratios.append(rate / product)
    print(f"S/2, 256 tokens, {name}: step {rate / 1e9:.0f}, product {product / 1e9:.0f} GFLOP/s; ratio {statistics.median(ratios):.2f}")


def clips_against_pictures(size, count, side, frames=8):
    config = dict(channels=8, out_channels=8)
    image, video = (GenTron(ModelConfig.of(size, **config, temporal=temporal)) for temporal in (False, True))
    pictures = step_of(image, batch(image.config, count * frames, 0, side))
    clips = step_of(video, batch(video.config, count, frames, side))
    a, b = compare(pictures, clips)
    print(f"{size}/2, {count} clips of {frames} frames against {count * frames} pictures: {b / a:.2f}")


@torch.no_grad()
def three_passes(count=8, frames=8):
    model = GenTron(ModelConfig.of("mini", channels=8, out_channels=8, temporal=True))
    x, t, text, mask = batch(model.config, count, frames, 8)
    no, yes = torch.zeros(count, dtype=torch.bool), torch.ones(count, dtype=torch.bool)
    conditions = [dict(text=text, mask=mask, dropped=d, motion_free=f) for d, f in ((no, no), (yes, no), (yes, yes))]
    plain, guided = (guided_motion(model, *conditions, *scales) for scales in ((1.0, 1.0), (7.5, 1.2)))
    a, b = compare(lambda: plain(x, t), lambda: guided(x, t), 15)
    print(f"mini, {count} clips of {frames} frames: three guidance passes against one: {b / a:.2f}")


def encoding_against_the_cache(count=4):
    config = ModelConfig.of("S", text_widths=(128,))
    model, autoencoder = GenTron(config), AutoencoderKL(AutoencoderKLConfig()).requires_grad_(False)
    x, *rest = batch(config, count, 0, 32)
    pictures = torch.rand(count, 3, 256, 256) * 2 - 1
    train = step_of(model, (x, *rest))

    def encode_and_train():
        autoencoder.encode(pictures)
        train()

    a, b = compare(train, encode_and_train, 3)
    print(f"S/2, {count} pictures of 256×256: a step with encoding against one from the cache: {b / a:.2f}")


if __name__ == "__main__":
    against_the_product("torch as it comes")
    attention.use("auto", device_of("cpu"))
    against_the_product("oneDNN")
    clips_against_pictures("mini", 16, 8)
    clips_against_pictures("S", 1, 32)
    three_passes()
    encoding_against_the_cache()
