"""The published DiT (Peebles & Xie 2022, arXiv 2212.09748) in our code: its checkpoint read, its classes drawn.

    python -m evaluation.published_dit DiT-XL-2-256x256.pt --autoencoder sd-vae-ft-mse 207 360

DiT, where the paper starts, is GenTron with a label in place of the text, so that one model holds both, and reading the
file only renames. Three tensors are written differently: DiT cuts patches by a convolution, whose weight (D, C, P, P) becomes
the matrix (D, P·P·C) in patchify's order; it keeps query, key and value in one matrix; and it stores its positions,
which we compute: the stored ones are compared, not loaded. All else has one order in both: cosines first in the
timestep, shift, scale and gate of attention and then of the MLP, patches decoded to (row, column, channel), and of
the 2C channels first the noise, then the variance.

Sampling is DiT's: 250 of 1000 steps with ends included, the learned variance, guidance 4, no clipping. One thing is not:
DiT guides 3 of the 4 latent channels (by its own account only to keep its published figures reproducible); we guide all.
"""
import argparse
import math
import sys
from dataclasses import dataclass
from pathlib import Path

import torch
from tqdm import tqdm

import attention
from encoders import autoencoder
from common import figures as pictures
from diffusion import SAMPLERS, Diffusion, gaussian, guided
from dit import SIZES, GenTron, ModelConfig, position_embedding
from common.hardware import device_of, precision_of, products_in
from pipeline import to_bytes
from sample import parse_flags

HEADS = {SIZES[size][:2]: SIZES[size][2] for size in ("S", "B", "L", "XL")}  # (depth, width) → heads, which no tensor tells


def layers(depth):
    """The published name of each layer → the layers that it is here: three for query, key and value, else one."""
    names = {
        "x_embedder.proj": ["patch_embedding"],
        "t_embedder.mlp.0": ["time.mlp.0"],
        "t_embedder.mlp.2": ["time.mlp.2"],
        "y_embedder.embedding_table": ["condition.table"],
        "final_layer.adaLN_modulation.1": ["final.modulation.1"],
        "final_layer.linear": ["final.linear"],
    }
    for block in (f"blocks.{k}." for k in range(depth)):
        names |= {
            block + "adaLN_modulation.1": [block + "modulation.1"],
            block + "attn.qkv": [block + "self_attention." + name for name in "qkv"],
            block + "attn.proj": [block + "self_attention.out"],
            block + "mlp.fc1": [block + "mlp.0"],
            block + "mlp.fc2": [block + "mlp.2"],
        }
    return names


def config_of(state, heads=0):
    """The ModelConfig that a published state (a dictionary of tensors) asks for, from its shapes. heads: how many, if it is
    none of DiT's sizes. ValueError if it is not a DiT, or if the heads are not known."""
    if not isinstance(state, dict) or not all(torch.is_tensor(tensor) for tensor in state.values()):
        raise ValueError("not a DiT checkpoint: it is not a dictionary of tensors")
    patches, table, final = "x_embedder.proj.weight", "y_embedder.embedding_table.weight", "final_layer.linear.weight"
    for name, rank in ((patches, 4), (table, 2), (final, 2), ("pos_embed", 3)):
        if name not in state or state[name].ndim != rank:
            raise ValueError(f"not a DiT checkpoint: there is no tensor {name} with {rank} dimensions")
    D, C, patch, _ = state[patches].shape
    depth = len({name.split(".")[1] for name in state if name.startswith("blocks.")})
    heads = heads or HEADS.get((depth, D))
    if not heads:
        raise ValueError(f"depth {depth} and width {D} are none of DiT's sizes, so the number of heads is not known: --heads")
    return ModelConfig(
        depth=depth,
        width=D,
        heads=heads,
        patch=patch,
        channels=C,
        out_channels=len(state[final]) // patch**2,
        integration="class",
        classes=len(state[table]) - 1,  # the last row is the null label
    )


def from_published(state):
    """A published state (a dictionary of tensors) → the state_dict of GenTron(config_of(state)), in fp32. ValueError names
    what is missing, what is too much, or the first tensor of a wrong shape, and tells if positions are not ours."""
    config = config_of(state, heads=1)  # shapes do not depend on the heads
    with torch.device("meta"):
        shapes = {name: tensor.shape for name, tensor in GenTron(config).state_dict().items()}
    names = {
        f"{published}.{kind}": [f"{name}.{kind}" for name in ours]
        for published, ours in layers(config.depth).items()
        for kind in ("weight", "bias")
        if f"{ours[0]}.{kind}" in shapes  # the table of labels has no bias
    }
    for problem, found in (("missing", names.keys() - state), ("not known", state.keys() - names - {"pos_embed"})):
        if found:
            raise ValueError(f"{len(found)} tensors are {problem}: {', '.join(sorted(found)[:3])}{', …' * (len(found) > 3)}")
    result = {}
    for published, ours in names.items():
        tensor, (rows, *rest) = state[published].float(), shapes[ours[0]]
        if tensor.ndim == 4:
            tensor = tensor.permute(0, 2, 3, 1).flatten(1)  # (D, C, P, P) → (D, P·P·C)
        if tensor.shape != (len(ours) * rows, *rest):
            shape, needed = tuple(state[published].shape), (len(ours) * rows, *rest)
            raise ValueError(f"{published} has shape {shape}, not {needed}, which the other tensors ask for")
        result |= zip(ours, tensor.chunk(len(ours)))
    side = math.isqrt(state["pos_embed"].shape[1])  # tokens, each way
    positions = position_embedding(side, side, config.width)
    if state["pos_embed"].shape[1:] != positions.shape or not (state["pos_embed"] - positions).abs().max() < 1e-2:
        raise ValueError("pos_embed does not hold the sin-cos positions of a square grid of tokens")
    return result


def load(path, heads=0):
    """A published file (or a checkpoint of DiT's train.py, whose EMA weights are taken) → (GenTron, side of its latents).
    Nothing in the file is executed. ValueError, naming the file, if it is cut short or not a DiT; OSError if not there."""
    with open(path, "rb") as file, torch.serialization.safe_globals([argparse.Namespace]):  # of train.py's flags; no code
        try:
            state = torch.load(file, map_location="cpu", weights_only=True)
        except Exception as error:  # of many kinds: damaged bytes fail where they happen to
            reason = str(error).partition("\n")[0][:100]
            raise ValueError(f"{path} cannot be read: it was cut short, or holds more than tensors ({reason})") from None
    if isinstance(state, dict) and "ema" in state:
        state = state["ema"]
    try:
        config, ours = config_of(state, heads), from_published(state)
        with torch.device("meta"):
            model = GenTron(config)
        model.load_state_dict(ours, assign=True)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None
    return model.eval(), math.isqrt(state["pos_embed"].shape[1]) * config.patch


@torch.no_grad()
def generate(model, labels, side, seed=0, sampler="ddpm", steps=250, guidance=4.0, precision="fp32"):
    """Labels, a list of B integers → latents (B, C, side, side), as DiT draws them. guidance 1: none. A latent depends on
    its label, its place in the list and the seed. ValueError for an unknown sampler or label, or number of steps."""
    config, device = model.config, next(model.parameters()).device
    if sampler not in SAMPLERS:
        raise ValueError(f"sampler {sampler!r} is not one of {', '.join(SAMPLERS)}")
    if wrong := [label for label in labels if not 0 <= label < config.classes]:
        raise ValueError(f"class {wrong[0]} is not one of 0 to {config.classes - 1}")
    diffusion = Diffusion("linear", "noise", config.out_channels > config.channels, spacing="even")
    generators = [torch.Generator().manual_seed(seed + i) for i in range(len(labels))]
    x = gaussian((config.channels, side, side), generators).to(device)
    dropped, labels = torch.zeros(len(x), dtype=torch.bool, device=device), torch.tensor(labels, device=device)

    def predict(x, t, **condition):
        with products_in(precision, device):
            return model(x, t, **condition).to(x.dtype)

    run = guided(predict, dict(text=labels, dropped=dropped), dict(text=labels, dropped=~dropped), guidance)
    with tqdm(total=steps, desc="sampling", disable=None) as bar:

        def counted(x, t):
            bar.update()
            return run(x, t)

        return SAMPLERS[sampler](counted, diffusion, x, steps, generators)


@dataclass
class Config:
    autoencoder: str = ""  # its folder
    out: str = "classes.png"
    sampler: str = "ddpm"  # or sde, dpm, ddim
    steps: int = 250
    guidance: float = 4.0  # 1: none
    heads: int = 0  # for a DiT of none of the published sizes
    seed: int = 0
    zoom: int = 1  # how many times larger the grid shows a picture
    precision: str = "auto"  # of products: fp32, bf16, or auto: whichever is faster here
    attention: str = "auto"  # fused, written, or auto
    device: str = "auto"


def main(arguments):
    config = Config()
    path, *labels = parse_flags(config, arguments) or [""]
    if not labels or not config.autoencoder or not all(map(str.isdecimal, labels)):
        raise ValueError("a file, an autoencoder and classes, as numbers: FILE.pt --autoencoder DIR 207 360")
    device, out = device_of(config.device), Path(config.out)
    attention.use(config.attention, device)
    decoder = autoencoder.load(config.autoencoder).to(device)
    model, side = load(path, config.heads)
    if decoder.config.channels != model.config.channels:
        raise ValueError(f"{path} has {model.config.channels} latent channels, {config.autoencoder} {decoder.config.channels}")
    latents = generate(
        model.to(device), list(map(int, labels)), side, config.seed, config.sampler, config.steps, config.guidance,
        precision_of(config.precision, device),
    )
    with torch.no_grad():
        done = to_bytes(decoder.decode(latents)).cpu()
    out.parent.mkdir(parents=True, exist_ok=True)
    pictures.grid(done, [f"class {label}" for label in labels], min(len(done), 6), config.zoom).save(out)
    print(f"{len(done)} picture{'s' * (len(done) > 1)} from {path} → {out}")


if __name__ == "__main__":
    try:
        main(sys.argv[1:])
    except (ValueError, OSError) as error:
        sys.exit(f"published_dit.py: {error}")
