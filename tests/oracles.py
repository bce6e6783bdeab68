"""What published implementations write and compute, for the tests of several folders: transformers' CLIP and
T5 and diffusers' autoencoder with random weights (no published weights are at hand), their folders, and DiT's
sampling."""
import gzip
import importlib.util
import json
import os
import shutil
from pathlib import Path

import diffusers
import numpy as np
import torch

os.environ["HF_HUB_OFFLINE"] = "1"
import transformers

from encoders.clip import byte_letters

transformers.logging.set_verbosity_error()


def package(name):
    """A package's folder; it is not imported."""
    return Path(importlib.util.find_spec(name).submodule_search_locations[0])


SPIECE = package("diffsynth") / "tokenizer_configs/stable_diffusion_3/tokenizer_3/spiece.model"


def write_byte_pairs(folder):
    """CLIP's merges.txt and vocab.json, as on the hub."""
    merges = gzip.open(package("open_clip") / "bpe_simple_vocab_16e6.txt.gz").read().decode()
    lines = merges.split("\n")[1 : 49152 - 256 - 2 + 1]
    letters = list(byte_letters().values())
    pieces = letters + [f"{letter}</w>" for letter in letters] + [line.replace(" ", "") for line in lines]
    pieces += ["<|startoftext|>", "<|endoftext|>"]
    vocabulary = {piece: i for i, piece in enumerate(pieces)}
    (folder / "vocab.json").write_text(json.dumps(vocabulary), encoding="utf-8")
    (folder / "merges.txt").write_text("\n".join(["#version: 0.2", *lines, ""]), encoding="utf-8")


def spread(model):
    """Random weights larger than an initialisation, so that each one counts."""
    torch.manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return model.eval()


CLIP = dict(hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=2)
T5 = dict(d_model=24, d_kv=8, d_ff=40, num_layers=2, num_heads=4, feed_forward_proj="gated-gelu")


def clip(**changes):
    return spread(transformers.CLIPTextModel(transformers.CLIPTextConfig(**CLIP | changes)))


def whole_clip():
    vision = CLIP | dict(hidden_size=16, image_size=32, patch_size=16)
    config = transformers.CLIPConfig(text_config=CLIP, vision_config=vision, projection_dim=8)
    return spread(transformers.CLIPModel(config))


def t5(kind=transformers.T5EncoderModel, **changes):
    return spread(kind(transformers.T5Config(**T5 | changes)))


def save(model, folder, byte_pairs, **options):
    """The model's folder as transformers writes it, with the files of a tokenizer."""
    model.save_pretrained(folder, **options)
    for path in (byte_pairs / "vocab.json", byte_pairs / "merges.txt", SPIECE):
        shutil.copy(path, folder)
    return folder


@torch.no_grad()
def shake(model):
    """Random weights under which every branch counts, the attention too, and values keep their size."""
    for name, p in model.named_parameters():
        if p.ndim > 1:
            p.normal_(0, (3 if "to_q" in name or "to_k" in name else 1) * p[0].numel() ** -0.5)
        else:
            p.normal_(1 if "norm" in name and "weight" in name else 0, 0.2)
    return model


def oracle(widths, layers=2, **config):
    """diffusers' AutoencoderKL, with random weights."""
    levels = len(widths)
    return shake(diffusers.AutoencoderKL(
        block_out_channels=widths, layers_per_block=layers, down_block_types=["DownEncoderBlock2D"] * levels,
        up_block_types=["UpDecoderBlock2D"] * levels, **config,
    )).eval()


def space_timesteps(steps, count):
    """improved-diffusion's rule for one section: from 0, in equal strides, both ends included, rounded."""
    stride, at, taken = (steps - 1) / max(count - 1, 1), 0.0, []
    for _ in range(count):
        taken.append(round(at))
        at += stride
    return taken


def p_sample_loop(model, x, count, generators):
    """DiT's sampling of model(x, t): 250 respaced steps, learned_range, nothing clipped; by Nichol & Dhariwal
    2021, on the numbers of the shorter chain: its β from the products of the steps kept, its own log β̃,
    clipped at the first."""
    kept = space_timesteps(1000, count)
    bar = np.cumprod(1 - np.linspace(1e-4, 0.02, 1000))[kept]
    bar_before = np.append(1.0, bar[:-1])
    beta = 1 - bar / bar_before
    variance = beta * (1 - bar_before) / (1 - bar)
    low, high = np.log(np.append(variance[1], variance[1:])), np.log(beta)
    states, x = [x], x.numpy()
    for i in reversed(range(count)):
        output = model(torch.from_numpy(x), torch.full((len(x),), kept[i])).numpy()
        noise, share = output[:, : x.shape[1]], (output[:, x.shape[1] :] + 1) / 2
        x0 = x / np.sqrt(bar[i]) - np.sqrt(1 / bar[i] - 1) * noise
        mean = np.sqrt(bar_before[i]) * beta[i] * x0 + np.sqrt(1 - beta[i]) * (1 - bar_before[i]) * x
        z = np.stack([torch.randn(x.shape[1:], generator=g).numpy() for g in generators])
        spread = np.exp(0.5 * (share * high[i] + (1 - share) * low[i]))
        x = mean / (1 - bar[i]) + (i > 0) * spread * z
        states.append(torch.from_numpy(x))
    return kept[::-1], states
