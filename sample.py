"""A prompt → a picture, or a clip.

    python sample.py "a striped red circle above a blue square" "a small green cross"
    python sample.py --frames 8 --lambda-t 7.5 --lambda-m 1.2 "a red circle moving left"

reads the newest run (or --checkpoint DIR) and writes a picture, or a grid with captions, to samples.png; for clips, with
--frames, an animation to samples.gif (--out FILE.webp or .mp4) and all its frames to samples.png. The class
Pipeline puts together what a prompt passes through: tokenizer → text encoder → diffusion transformer, called by a
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
from diffusion import SAMPLERS, Diffusion, guided, guided_motion
from dit import GenTron, ModelConfig
from text_encoders import T5Config, T5Encoder, Tokenizer


class Pipeline(nn.Module):
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

    def forward(self, x, t, tokens, mask, dropped, motion_free=None):
        """The transformer's output for noisy latents x (B, [F,] C, h, w) at t (B,), captions as tokens and mask (B, L);
        dropped (B,), True = without the caption; motion_free: as in temporal.py."""
        return self.transformer(x, t, self.text_encoder(tokens, mask), mask, dropped, motion_free)

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
    def generate(
        self, prompts, seed=0, sampler="dpm", steps=16, lambda_t=2.0, lambda_m=1.0, rescale=0.0, interval=(0.0, 1.0), frames=0
    ):
        """List of B prompts → pictures (B, 3, S, S) uint8, or from a video model clips (B, F, 3, S, S). A prompt's result
        depends on the prompt and seed alone, not on the rest of the batch. lambda_t, lambda_m: the guidance of
        diffusion.py; frames: F, if not as many as the model was trained on. ValueError for an unknown sampler or number
        of steps, or for frames of an image model."""
        if sampler not in SAMPLERS:
            raise ValueError(f"sampler {sampler!r} is not one of {', '.join(SAMPLERS)}")
        video, device = self.transformer.config.temporal, self.autoencoder.shift.device
        if frames and not video:
            raise ValueError("--frames: this is an image model; for clips train one with `python train.py video`")
        side = self.config["image_size"] // self.autoencoder.factor
        shape = (self.transformer.config.channels, side, side)
        shape = (frames or self.config["frames"], *shape) if video else shape  # ([F,] C, h, w)
        keys = [hashlib.sha256(f"{seed} {prompt}".encode()).digest()[:7] for prompt in prompts]
        generators = [torch.Generator().manual_seed(int.from_bytes(key, "little")) for key in keys]
        x = torch.stack([torch.randn(shape, generator=g) for g in generators])
        tokens, mask = (a.to(device) for a in self.tokenizer(prompts))
        no, yes = torch.zeros(len(x), dtype=torch.bool, device=device), torch.ones(len(x), dtype=torch.bool, device=device)
        shared = dict(text=self.text_encoder(tokens, mask), mask=mask)
        condition, null_text, still = (
            shared | dict(dropped=dropped) | (dict(motion_free=motion_free) if video else {})
            for dropped, motion_free in ((no, no), (yes, no), (yes, yes))
        )  # the paper's (c_T, c_M), (∅, c_M) and (∅, ∅)
        options = rescale, interval, self.diffusion.steps
        if video:
            run = guided_motion(self.transformer, condition, null_text, still, lambda_t, lambda_m, *options)
        else:
            run = guided(self.transformer, condition, null_text, lambda_t, *options)
        x = SAMPLERS[sampler](run, self.diffusion, x.to(device), steps, generators)
        frames = x.reshape(-1, *x.shape[-3:]).split(64)  # few at a time: the decoder works at full resolution
        frames = torch.cat([to_bytes(self.autoencoder.decode(part)).cpu() for part in frames])
        return frames.view(*x.shape[:-3], *frames.shape[1:])


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
    """torch.device: cuda, else mps, else cpu, unless named. ValueError if this machine does not have the named one.
    For a CPU it also allows fp32 products to run in oneDNN, which on many is twice as fast as the default library."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    try:
        device = torch.empty(0, device=name).device
    except (RuntimeError, AssertionError):
        raise ValueError(f"--device {name}: not to be had on this machine with this build of torch; try cpu") from None
    if device.type == "cpu":
        torch.set_float32_matmul_precision("medium")
    return device


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
    lambda_t: float = 2.0  # guidance by the text; 1: none
    lambda_m: float = 1.0  # clips: guidance by motion; 1: none
    frames: int = 0  # clips of so many frames, from a video model
    fps: int = 4  # frames a second, of the file
    image_size: int = 0  # pixels, each way, if not as trained
    rescale: float = 0.0
    guide_from: float = 0.0  # guide in this interval of noise levels: 0 is clean, 1 is noise
    guide_to: float = 1.0
    seed: int = 0
    batch_size: int = 32
    zoom: int = 3  # how many times larger a grid shows a picture
    attention: str = "auto"  # fused, written, or auto
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
    for field in ("batch_size", "fps", "zoom"):
        if getattr(config, field) < 1:
            raise ValueError(f"--{field.replace('_', '-')} {getattr(config, field)}: must be at least 1")
    folder, device = config.checkpoint or newest_run("video" if config.frames else "image"), device_of(config.device)
    attention.use(config.attention, device)
    if config.frames < 0:
        raise ValueError(f"--frames {config.frames}: must be at least 1")
    model = Pipeline.load(folder).to(device)
    if config.image_size % 16 or config.image_size < 0:
        raise ValueError(f"--image-size {config.image_size}: must be a multiple of 16")
    model.config["image_size"] = config.image_size or model.config["image_size"]
    clips = model.transformer.config.temporal
    out = Path(config.out or ("samples" if config.prompts and not config.grid else "samples.gif" if clips else "samples.png"))
    if clips and out.suffix not in ("", *pictures.ANIMATED):
        raise ValueError(f"--out {out}: clips are written as {', '.join(pictures.ANIMATED)}")
    for prompt in prompts:
        if unknown := model.unknown_words(prompt):
            print(f'note: in "{prompt}" no training caption had: {", ".join(unknown)}', file=sys.stderr)
    done = []
    for i in tqdm(range(0, len(prompts), config.batch_size), desc="sampling", disable=None):
        interval = (config.guide_from, config.guide_to)
        batch = prompts[i : i + config.batch_size]
        done.append(
            model.generate(
                batch, config.seed, config.sampler, config.steps, config.lambda_t, config.lambda_m, config.rescale, interval,
                config.frames,
            )
        )  # fmt: skip
    done = torch.cat(done)
    if config.prompts and not config.grid:
        out.mkdir(parents=True, exist_ok=True)
        for i, result in enumerate(done):
            if clips:
                pictures.animation(result[None], None, config.fps, out / f"{i:06d}.gif", zoom=1)
            else:
                Image.fromarray(np.asarray(result.permute(1, 2, 0))).save(out / f"{i:06d}.png")
        (out / "prompts.txt").write_text("\n".join(prompts) + "\n", encoding="utf-8")
    else:
        out.parent.mkdir(parents=True, exist_ok=True)
        if clips:
            pictures.animation(done, prompts, config.fps, out, config.zoom)
            pictures.sheet(done, prompts).save(out.with_suffix(".png"))
        else:
            pictures.grid(done, prompts, min(len(done), 6), config.zoom).save(out)
    print(f"{len(done)} {'clip' if clips else 'picture'}{'s' * (len(done) > 1)} from {folder} → {out}")


if __name__ == "__main__":
    try:
        main(sys.argv[1:])
    except (ValueError, OSError) as error:
        sys.exit(f"sample.py: {error}")
