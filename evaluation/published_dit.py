"""The published DiT (Peebles & Xie 2022, arXiv 2212.09748) in our code: reads its files and draws classes.

    python -m evaluation.published_dit DiT-XL-2-256x256.pt --autoencoder sd-vae-ft-mse 207 360

The paper starts from DiT: GenTron with a label in place of the text. So a checkpoint is only renamed, but for
three tensors. DiT cuts patches by a convolution: its weight (D, C, P, P) becomes a matrix (D, P·P·C). Query,
key and value are in one matrix. Positions are stored, which we compute: we only compare them.

Sampling is DiT's: 250 of 1000 steps, both ends included, learned variance, guidance 4, no clipping. One thing
differs: DiT guides 3 of the 4 latent channels, only to reproduce its published figures; we guide all.
"""
import argparse
import math
from dataclasses import dataclass
from pathlib import Path

import torch
from tqdm import tqdm

from attention import choose_attention
from common import figures
from common.flags import SEEDS, flag, read, run_command
from common.hardware import PRECISIONS, device_of, precision_of, products_in
from diffusion import SAMPLERS, Diffusion, classifier_free_guidance, gaussian
from dit import SIZES, GenTron, ModelConfig, position_embedding
from encoders import autoencoders

# (depth, width) → H, which no tensor tells
HEADS = {(size["depth"], size["width"]): size["heads"] for size in map(SIZES.get, ("S", "B", "L", "XL"))}


def layers(depth):
    """The published name of each layer → its names here: three for query, key and value, else one."""
    names = {
        "x_embedder.proj": ["patch_embedding"], "y_embedder.embedding_table": ["condition.table"],
        "t_embedder.mlp.0": ["time.mlp.0"], "t_embedder.mlp.2": ["time.mlp.2"],
        "final_layer.adaLN_modulation.1": ["final.modulation.1"], "final_layer.linear": ["final.linear"],
    }
    for block in (f"blocks.{k}." for k in range(depth)):
        names |= {
            block + "adaLN_modulation.1": [block + "modulation.1"],
            block + "attn.qkv": [block + "self_attention." + name for name in "qkv"],
            block + "attn.proj": [block + "self_attention.out"],
            block + "mlp.fc1": [block + "mlp.0"], block + "mlp.fc2": [block + "mlp.2"],
        }
    return names


def config_of(state, heads=0):
    """The ModelConfig of a published state (a dictionary of tensors), from its shapes. heads: H, for none of
    DiT's sizes. ValueError if it is not a DiT, or if H is not known."""
    if not isinstance(state, dict) or not all(torch.is_tensor(tensor) for tensor in state.values()):
        raise ValueError("not a DiT checkpoint: it is not a dictionary of tensors")
    table, final = "y_embedder.embedding_table.weight", "final_layer.linear.weight"
    for name, rank in (("x_embedder.proj.weight", 4), (table, 2), (final, 2), ("pos_embed", 3)):
        if name not in state or state[name].ndim != rank:
            raise ValueError(f"not a DiT checkpoint: there is no tensor {name} with {rank} dimensions")
    D, C, P, _ = state["x_embedder.proj.weight"].shape
    depth = len({name.split(".")[1] for name in state if name.startswith("blocks.")})
    heads = heads or HEADS.get((depth, D))
    if not heads:
        raise ValueError(f"depth {depth} and width {D} are none of DiT's sizes: say how many --heads it has")
    return ModelConfig(
        depth=depth, width=D, heads=heads, patch=P, channels=C, out_channels=len(state[final]) // P**2,
        integration="class", classes=len(state[table]) - 1,  # the last row is the null label
    )


def from_published(state):
    """A published state → the state_dict of GenTron(config_of(state)), in fp32. ValueError if a tensor is
    missing, unknown or of a wrong shape, or if the positions are not ours."""
    config = config_of(state, heads=1)  # shapes do not depend on the heads
    with torch.device("meta"):
        shapes = {name: tensor.shape for name, tensor in GenTron(config).state_dict().items()}
    names = {}
    for kind in (".weight", ".bias"):
        for published, ours in layers(config.depth).items():
            if ours[0] + kind in shapes:  # the table of labels has no bias
                names[published + kind] = [name + kind for name in ours]
    unknown = state.keys() - {*names, "pos_embed"}
    for problem, found in (("missing", names.keys() - state), ("unknown", unknown)):
        if found:
            raise ValueError(f"{len(found)} tensors are {problem}: {', '.join(sorted(found)[:3])}")
    result = {}
    for name, ours in names.items():
        tensor = state[name].float()
        rows, *rest = shapes[ours[0]]
        needed = len(ours) * rows, *rest
        if tensor.ndim == 4:
            tensor = tensor.permute(0, 2, 3, 1).flatten(1)  # (D, C, P, P) → (D, P·P·C), as patchify
        if tensor.shape != needed:
            raise ValueError(f"{name} has shape {tuple(state[name].shape)}, not {needed} as the others ask")
        result |= zip(ours, tensor.chunk(len(ours)))
    stored = state["pos_embed"]  # (1, N, D)
    side = math.isqrt(stored.shape[1])
    positions = position_embedding(side, side, config.width)  # (N, D)
    if stored.shape[1:] != positions.shape or not (stored - positions).abs().max() < 1e-2:
        raise ValueError("pos_embed does not hold the sin-cos positions of a square grid of tokens")
    return result


def load(path, heads=0):
    """A published file, or a checkpoint of DiT's train.py, of which the EMA weights → (GenTron, side of its
    latents). Nothing in the file is executed. ValueError, naming it, if it is cut short or not a DiT."""
    with open(path, "rb") as file, torch.serialization.safe_globals([argparse.Namespace]):  # train.py's flags
        try:
            state = torch.load(file, map_location="cpu", weights_only=True)
        except Exception as error:  # damaged bytes fail in many ways
            reason = str(error).partition("\n")[0][:100]
            problem = f"it was cut short, or holds more than tensors ({reason})"
            raise ValueError(f"{path} cannot be read: {problem}") from None
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
    """List of B labels → latents (B, C, side, side), as DiT draws them. guidance 1: none. A latent depends on
    its label, its index in the list and the seed. ValueError for a label that the model does not have."""
    config, device = model.config, next(model.parameters()).device
    for label in labels:
        if not 0 <= label < config.classes:
            raise ValueError(f"class {label} is not one of 0 to {config.classes - 1}")
    diffusion = Diffusion("linear", "noise", config.out_channels > config.channels, spacing="even")
    generators = [torch.Generator().manual_seed(seed + i) for i in range(len(labels))]
    x = gaussian((config.channels, side, side), generators).to(device)
    labels = torch.tensor(labels, device=device)
    no = torch.zeros(len(x), dtype=torch.bool, device=device)
    condition, null = dict(text=labels, dropped=no), dict(text=labels, dropped=~no)
    with tqdm(total=steps, desc="sampling", disable=None) as bar:

        def predict(x, t, **condition):
            bar.update()
            with products_in(precision, device):
                return model(x, t, **condition).to(x.dtype)

        guided = classifier_free_guidance(predict, condition, null, guidance)
        return SAMPLERS[sampler](guided, diffusion, x, steps, generators)


@dataclass
class Flags:
    autoencoder: str = flag("", "the folder of Stable Diffusion's autoencoder")
    out: str = flag("classes.png", "the grid of pictures")
    sampler: str = flag("ddpm", "DiT's is ddpm", choices=tuple(SAMPLERS))
    steps: int = flag(250, "of the sampler", low=1, high=1000)
    guidance: float = flag(4.0, "1: none")
    heads: int = flag(0, "for a DiT of none of the published sizes", low=0)
    seed: int = flag(0, "of the noise", low=0, high=SEEDS)
    zoom: int = flag(1, "how many times larger the grid shows a picture", low=1)
    precision: str = flag("auto", "of products; auto: whichever is faster here", choices=PRECISIONS)
    attention: str = flag("auto", "auto: written out on a CPU", choices=("auto", "fused", "written"))
    device: str = flag("auto", "auto, cpu, cuda, mps")


def main(arguments):
    about = __doc__.partition("\n")[0]
    flags, _, words = read(Flags, arguments, "python -m evaluation.published_dit", about, words="FILE CLASS")
    path, *labels = words or [""]
    if not labels or not flags.autoencoder or not all(map(str.isdecimal, labels)):
        raise ValueError("a file, an autoencoder and classes, as numbers: FILE.pt --autoencoder DIR 207 360")
    device = device_of(flags.device)
    decoder = autoencoders.load(flags.autoencoder).to(device)
    model, side = load(path, flags.heads)
    choose_attention(model.to(device), flags.attention, device)
    C, others = model.config.channels, decoder.config.channels
    if C != others:
        raise ValueError(f"{path} has {C} latent channels, {flags.autoencoder} {others}")
    options = flags.seed, flags.sampler, flags.steps, flags.guidance, precision_of(flags.precision, device)
    latents = generate(model, list(map(int, labels)), side, *options)
    with torch.no_grad():
        pictures = figures.to_bytes(decoder.decode(latents)).cpu()
    captions = [f"class {label}" for label in labels]
    Path(flags.out).parent.mkdir(parents=True, exist_ok=True)
    figures.grid(pictures, captions, min(len(labels), 6), flags.zoom).save(flags.out)
    print(f"{len(pictures)} picture{'s' * (len(pictures) > 1)} from {path} → {flags.out}")


if __name__ == "__main__":
    run_command(main)
