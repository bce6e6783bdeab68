"""The published DiT (Peebles & Xie 2022, arXiv 2212.09748) in our code: reads its files and draws classes.

    python -m evaluation.published_dit DiT-XL-2-256x256.pt --autoencoder sd-vae-ft-mse 207 360

The paper starts from DiT: GenTron with a label in place of the text. So a checkpoint is only renamed, but for
two tensors. DiT cuts patches by a convolution: its weight (D, C, P, P) becomes a matrix (D, P·P·C). Positions
are stored, which we compute: we only compare them.

Sampling is DiT's: 250 of 1000 steps, both ends included, learned variance, guidance 4, no clipping. One thing
differs: DiT guides 3 of the 4 latent channels, only to reproduce its published figures; we guide all. The
other samplers, `dpm` and `sde`, are not DiT's: see SPACING.
"""
import argparse
import math
from dataclasses import dataclass
from pathlib import Path

import torch
from tqdm import tqdm

from attention import use_attention
from common import figures
from common.flags import SEEDS, flag, read, run_command
from common.hardware import PRECISIONS, device_of, precision_of, products_in
from diffusion import SAMPLERS, Diffusion, classifier_free_guidance, gaussian
from dit import SIZES, GenTron, ModelConfig, position_embedding
from encoders import autoencoders
from encoders.weights import renamed

# (depth, width) → H, which no tensor tells
HEADS = {(SIZES[name]["depth"], SIZES[name]["width"]): SIZES[name]["heads"] for name in ("S", "B", "L", "XL")}
NAMES = {  # a part of our names: of the published ones, replaced in this order
    ".mlp.0.": ".mlp.fc1.", ".mlp.2.": ".mlp.fc2.", "time.mlp.fc1.": "t_embedder.mlp.0.",
    "time.mlp.fc2.": "t_embedder.mlp.2.", "patch_embedding": "x_embedder.proj", "final": "final_layer",
    "condition.table": "y_embedder.embedding_table", "modulation": "adaLN_modulation",
    "self_attention.qkv": "attn.qkv", "self_attention.out": "attn.proj",
}
RANKS = {  # of the tensors that tell the sizes
    "x_embedder.proj.weight": 4, "y_embedder.embedding_table.weight": 2, "final_layer.linear.weight": 2,
    "pos_embed": 3,
}
# DiT's timesteps go down to 0 evenly. From the last but one to 0 the signal-to-noise ratio jumps, over which
# the second-order samplers extrapolate too far: they end one stride before the clean latent.
SPACING = {"ddpm": "even", "ddim": "even", "dpm": "trailing", "sde": "trailing"}


def config_of(state, heads=0):
    """The ModelConfig of a published state (a dictionary of tensors), from its shapes. heads: H, for none of
    DiT's sizes. ValueError if it is not a DiT, or if H is not known or does not divide D."""
    tensors = state.items() if isinstance(state, dict) else [("", None)]
    if not all(isinstance(name, str) and torch.is_tensor(tensor) for name, tensor in tensors):
        raise ValueError("not a DiT checkpoint: it is not a dictionary of tensors by name")
    for name, rank in RANKS.items():
        if name not in state or state[name].ndim != rank or 0 in state[name].shape:
            raise ValueError(f"not a DiT checkpoint: there is no tensor {name} with {rank} dimensions")
    patches, labels, final, _ = (state[name] for name in RANKS)
    D, C, P, _ = patches.shape
    depth = len({name.split(".")[1] for name in state if name.startswith("blocks.")})
    heads = heads or HEADS.get((depth, D))
    if not heads:
        raise ValueError(f"depth {depth} and width {D} are none of DiT's sizes: say how many --heads it has")
    out_channels = len(final) // P**2
    if out_channels not in (C, 2 * C):
        raise ValueError(f"not a DiT checkpoint: {C} channels in, {out_channels} out, not {C} or {2 * C}")
    return ModelConfig(
        depth=depth, width=D, heads=heads, patch=P, channels=C, out_channels=out_channels,
        integration="class", classes=len(labels) - 1,  # the last row is the null label
    )


def from_published(state, heads=0):
    """A published state → GenTron with its weights, in fp32. heads: as in config_of. ValueError as there, if
    a tensor is missing, unknown or of a wrong shape, or if the positions are not ours."""
    with torch.device("meta"):
        model = GenTron(config_of(state, heads))
    expected = model.state_dict()
    names = {renamed(ours, NAMES): ours for ours in expected}  # published name → ours
    unknown = state.keys() - {*names, "pos_embed"}
    for problem, found in (("missing", names.keys() - state), ("unknown", unknown)):
        if found:
            raise ValueError(f"{len(found)} tensors are {problem}: {', '.join(sorted(found)[:3])}")
    weights = {}
    for name, ours in names.items():
        tensor = state[name].float()
        needed = tuple(expected[ours].shape)
        if tensor.ndim == 4:
            tensor = tensor.permute(0, 2, 3, 1).flatten(1)  # (D, C, P, P) → (D, P·P·C), as patchify
        if tensor.shape != needed:
            raise ValueError(f"{name} has shape {tuple(state[name].shape)}, not {needed} as the others ask")
        weights[ours] = tensor
    stored = state["pos_embed"][0].float()  # (N, D)
    side = math.isqrt(len(stored))
    positions = position_embedding(side, side, model.config.width)  # (N, D)
    if stored.shape != positions.shape or not (stored - positions).abs().max() < 1e-2:
        raise ValueError("pos_embed does not hold the sin-cos positions of a square grid of tokens")
    model.load_state_dict(weights, assign=True)
    return model.eval()


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
        model = from_published(state, heads)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None
    return model, math.isqrt(state["pos_embed"].shape[1]) * model.config.patch


@torch.no_grad()
def generate(model, labels, side, seed=0, sampler="ddpm", steps=250, guidance=4.0, precision="fp32"):
    """List of B labels → latents (B, C, side, side), as DiT draws them. guidance 1: none. A latent depends on
    its label, its index in the list and the seed. ValueError for a label that the model does not have."""
    config, device = model.config, next(model.parameters()).device
    if max(labels) >= config.classes:
        raise ValueError(f"class {max(labels)} is not one of 0 to {config.classes - 1}")
    diffusion = Diffusion("linear", "noise", config.out_channels > config.channels, spacing=SPACING[sampler])
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
    guidance: float = flag(4.0, "1: none", low=0, high=100)
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
    use_attention(model.to(device), flags.attention)
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
