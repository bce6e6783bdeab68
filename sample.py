"""A prompt → a picture.

    python sample.py "a striped red circle above a blue square" "a small green cross"

reads the newest run (or --checkpoint DIR) and writes a picture, or a grid with captions, to samples.png. The class
TextToImage puts together what a prompt passes through: tokenizer → text encoder → diffusion transformer, called by a
sampler under guidance → autoencoder. All of it is in the run's model.safetensors.
"""
import dataclasses
import difflib
import hashlib
import json
import sys
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import nn
from tqdm import tqdm

import attention
import pictures
import weights
from autoencoder import Autoencoder, AutoencoderConfig
from diffusion import SAMPLERS, Diffusion, guided
from dit import GenTron, ModelConfig
from text_encoders import T5Config, T5Encoder, Tokenizer


class TextToImage(nn.Module):
    """config: a dictionary with "model", "text", "autoencoder", "diffusion" (the arguments of those classes' configs)
    and "image_size"; "words", those of the training captions, to tell a prompt's unknown ones. It is all that the
    checkpoint needs, with the weights and the tokenizer, to rebuild this object."""

    def __init__(self, config, tokenizer):
        super().__init__()
        self.config, self.tokenizer = config, tokenizer
        self.transformer = GenTron(ModelConfig(**config["model"]))
        self.text_encoder = T5Encoder(T5Config(**config["text"]))
        self.autoencoder = Autoencoder(AutoencoderConfig(**config["autoencoder"])).requires_grad_(False)
        self.diffusion = Diffusion(**config["diffusion"])

    def forward(self, x, t, tokens, mask, dropped):
        """The transformer's output for noisy latents x (B, C, h, w) at t (B,), captions as tokens and mask (B, L);
        dropped (B,), True = without the caption."""
        return self.transformer(x, t, self.text_encoder(tokens, mask), mask, dropped)

    def save(self, path, state=None):
        """Writes weights (`state`, if given, in place of the module's own), config and tokenizer as one safetensors."""
        tokenizer = torch.frombuffer(bytearray(self.tokenizer.model), dtype=torch.uint8)
        weights.write(path, (state or self.state_dict()) | {"tokenizer": tokenizer}, {"config": json.dumps(self.config)})

    @classmethod
    def load(cls, folder):
        """Rebuilds the model from a run's folder (or its model.safetensors). ValueError, naming the file, if there is
        none or it does not fit."""
        path = Path(folder) if Path(folder).is_file() else Path(folder) / "model.safetensors"
        if not path.exists():
            raise ValueError(f"no model.safetensors in {folder}: is it the folder of a run of train.py image?")
        tensors, metadata = weights.read(path)
        try:
            model = cls(json.loads(metadata["config"]), Tokenizer(tensors.pop("tokenizer").numpy().tobytes()))
            model.load_state_dict(tensors)
        except (KeyError, TypeError, ValueError, RuntimeError) as error:
            raise ValueError(f"{path} is not a model of train.py image: {' '.join(str(error).split())[:300]}") from None
        return model.eval()

    def unknown_words(self, prompt):
        """The words of a prompt that no training caption had."""
        return sorted(set(words_of(prompt)) - set(self.config["words"]))

    @torch.no_grad()
    def generate(self, prompts, seed=0, sampler="dpm", steps=16, guidance=2.0, rescale=0.0, interval=(0.0, 1.0), copy=0):
        """List of B prompts → pictures (B, 3, S, S) uint8. A prompt's picture depends on the prompt, seed and copy
        number alone, not on the rest of the batch. ValueError for an unknown sampler or number of steps."""
        if sampler not in SAMPLERS:
            raise ValueError(f"sampler {sampler!r} is not one of {', '.join(SAMPLERS)}")
        device = self.autoencoder.shift.device
        side = self.config["image_size"] // self.autoencoder.factor
        keys = [hashlib.sha256(f"{seed} {copy} {prompt}".encode()).digest()[:7] for prompt in prompts]
        generators = [torch.Generator().manual_seed(int.from_bytes(key, "little")) for key in keys]
        x = torch.stack([torch.randn(self.transformer.config.channels, side, side, generator=g) for g in generators])
        tokens, mask = (a.to(device) for a in self.tokenizer(prompts))
        no, yes = torch.zeros(len(x), dtype=torch.bool, device=device), torch.ones(len(x), dtype=torch.bool, device=device)
        text = self.text_encoder(tokens, mask)
        run = guided(
            self.transformer, dict(text=text, mask=mask, dropped=no), dict(text=text, mask=mask, dropped=yes),
            guidance, rescale, interval, self.diffusion.steps,
        )  # fmt: skip
        x = SAMPLERS[sampler](run, self.diffusion, x.to(device), steps, generators)
        return to_bytes(self.autoencoder.decode(x)).cpu()


def words_of(text):
    """Lower-case words of a text."""
    return "".join(c if c.isalnum() else " " for c in text.lower()).split()


def to_bytes(x):
    """Pictures (B, 3, H, W) in -1…1 → uint8."""
    return ((x + 1) * 127.5).round().clamp(0, 255).to(torch.uint8)


def from_bytes(x):
    """uint8 pictures → -1…1."""
    return x.float() / 127.5 - 1


def newest_run(stage="image"):
    """The folder of the run whose model was written last. ValueError if there is none."""
    found = sorted(Path("runs").glob(f"{stage}*/model.safetensors"), key=lambda path: path.stat().st_mtime)
    if not found:
        raise ValueError("no run found in runs/: train one with `python train.py image`, or name one: --checkpoint DIR")
    return found[-1].parent


def device_of(name="auto"):
    """torch.device: cuda, else mps, else cpu, unless named. ValueError if this machine does not have the named one."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    try:
        return torch.empty(0, device=name).device
    except (RuntimeError, AssertionError):
        raise ValueError(f"--device {name}: not to be had on this machine with this build of torch; try cpu") from None


def parse_flags(config, arguments):
    """Reads `--key value` (or `--flag` alone for a switch) into the fields of a dataclass instance, by their types, and
    returns the arguments that are no flags. ValueError names an unknown key, with the nearest one, or a bad value."""
    fields, rest, arguments = {f.name: f for f in dataclasses.fields(config)}, [], list(arguments)
    while arguments:
        word = arguments.pop(0)
        if not word.startswith("--"):
            rest.append(word)
            continue
        key, equals, value = word[2:].partition("=")
        name = key.replace("-", "_")
        if name not in fields:
            near = difflib.get_close_matches(name, fields, 1, 0)[0].replace("_", "-")
            raise ValueError(f"unknown flag --{key}; did you mean --{near}?")
        kind = fields[name].type
        if not equals:
            if kind is bool and (not arguments or arguments[0] not in ("true", "false")):
                value = "true"
            elif not arguments:
                raise ValueError(f"--{key} needs a value")
            else:
                value = arguments.pop(0)
        try:
            value = {"true": True, "false": False}[value] if kind is bool else kind(value)
        except (ValueError, KeyError):
            raise ValueError(f"--{key} {value}: not a {dict(int='whole number', float='number', bool='true or false')[kind.__name__]}") from None  # fmt: skip
        setattr(config, name, value)
    return rest


@dataclass
class Config:
    checkpoint: str = ""  # a run's folder; the newest one if not given
    out: str = ""  # the file to write (samples.png), or the folder for --prompts (samples/)
    prompts: str = ""  # a text file of prompts, one a line, into numbered pictures
    grid: bool = False  # with --prompts: one grid instead
    sampler: str = "dpm"  # dpm, ddim or ddpm
    steps: int = 16
    guidance: float = 2.0  # 1: none
    rescale: float = 0.0
    guide_from: float = 0.0  # guide in this interval of noise levels: 0 is clean, 1 is noise
    guide_to: float = 1.0
    seed: int = 0
    batch_size: int = 32
    zoom: int = 3  # how many times larger a grid shows a picture
    fused: bool = True  # false: the written-out attention
    device: str = "auto"


def main(arguments):
    config = Config()
    prompts = parse_flags(config, arguments)
    if config.prompts:
        try:
            lines = Path(config.prompts).read_text(encoding="utf-8").splitlines()
        except UnicodeDecodeError:
            raise ValueError(f"--prompts {config.prompts}: not a text file in UTF-8") from None
        prompts += [line.strip() for line in lines if line.strip()]
    if not prompts or not all(map(str.strip, prompts)):
        raise ValueError('no prompt: python sample.py "a red circle above a blue square", or --prompts FILE')
    if config.batch_size < 1:
        raise ValueError(f"--batch-size {config.batch_size}: must be at least 1")
    attention.FUSED = config.fused
    folder = config.checkpoint or newest_run()
    model = TextToImage.load(folder).to(device_of(config.device))
    for prompt in prompts:
        if unknown := model.unknown_words(prompt):
            print(f'note: in "{prompt}" no training caption had: {", ".join(unknown)}', file=sys.stderr)
    done = []
    for i in tqdm(range(0, len(prompts), config.batch_size), desc="sampling", disable=None):
        interval = (config.guide_from, config.guide_to)
        batch = prompts[i : i + config.batch_size]
        done.append(
            model.generate(batch, config.seed, config.sampler, config.steps, config.guidance, config.rescale, interval)
        )
    done = torch.cat(done)
    if config.prompts and not config.grid:
        out = Path(config.out or "samples")
        out.mkdir(parents=True, exist_ok=True)
        for i, picture in enumerate(done):
            Image.fromarray(np.asarray(picture.permute(1, 2, 0))).save(out / f"{i:06d}.png")
        (out / "prompts.txt").write_text("\n".join(prompts) + "\n", encoding="utf-8")
    else:
        out = Path(config.out or "samples.png")
        out.parent.mkdir(parents=True, exist_ok=True)
        pictures.grid(done, prompts, min(len(done), 6), config.zoom).save(out)
    print(f"{len(done)} picture{'s' * (len(done) > 1)} from {folder} → {out}")


if __name__ == "__main__":
    try:
        main(sys.argv[1:])
    except (ValueError, OSError) as error:
        sys.exit(f"sample.py: {error}")
