"""A prompt → a picture, or a clip.

    python sample.py "a striped red circle above a blue square" "a small green cross"
    python sample.py --frames 8 --lambda-t 7.5 --lambda-m 1.2 "a red circle moving left"
    python sample.py --prompts color_val.txt --per-prompt 10 --out color

reads the newest run (or --checkpoint DIR) and writes a grid of pictures with their captions to samples.png; for clips, with
--frames, an animation to samples.gif (--out FILE.webp or .mp4) and all its frames to samples.png.

--prompts reads one prompt a line (as T2I-CompBench's lists have them) or a table with tabs and a column "Prompt" (as
PartiPrompts'), and writes OUT/samples/PROMPT_NUMBER.png, numbered on from prompt to prompt: the folder that
T2I-CompBench's scripts read. What is there already is left alone, so the command goes on where it was stopped; under
torchrun each process draws its share.
"""
import dataclasses
import difflib
import os
import sys
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from tqdm import tqdm

import attention
from common import figures as pictures
from common.hardware import device_of, precision_of
from pipeline import Pipeline


def newest_run(stage="image"):
    """The folder of the run whose model was written last. ValueError if there is none."""
    found = sorted(Path("runs").glob(f"{stage}*/model.safetensors"), key=lambda path: path.stat().st_mtime)
    if not found:
        raise ValueError(f"no run found in runs/: train one with `python train.py {stage}`, or name one: --checkpoint DIR")
    return found[-1].parent


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
    clip: str = ""  # the folder of the published CLIP, where the run had one and it has moved since
    t5: str = ""  # the same, of T5
    out: str = ""  # the file to write (samples.png), or the folder for --prompts (samples)
    prompts: str = ""  # a file of prompts
    per_prompt: int = 1  # samples of each prompt of --prompts
    grid: bool = False  # with --prompts: one grid instead
    sampler: str = "sde"  # sde or dpm (DPM-Solver++, with new noise or without), ddim or ddpm
    steps: int = 16
    lambda_t: float = 2.0  # guidance by the text; 1: none
    lambda_m: float = 1.0  # clips: guidance by motion; 1: none
    frames: int = 0  # clips of so many frames, from a video model
    fps: int = 4  # frames a second, of the file
    image_size: str = ""  # pixels each way, or HEIGHTxWIDTH, if not as trained
    rescale: float = 0.0
    guide_from: float = 0.0  # guide in this interval of noise levels: 0 is clean, 1 is noise
    guide_to: float = 1.0
    seed: int = 0
    batch_size: int = 32
    zoom: int = 3  # how many times larger a grid shows a picture
    attention: str = "auto"  # fused, written, or auto
    precision: str = "auto"  # of products: fp32, bf16, or auto: what the run was trained in, if on this processor
    device: str = "auto"


def read_prompts(path):
    """The prompts of a file: its non-empty lines, or of a table its column "Prompt". ValueError if it is not in UTF-8."""
    try:
        lines = [line for line in Path(path).read_text(encoding="utf-8-sig").splitlines() if line.strip()]
    except UnicodeDecodeError:
        raise ValueError(f"--prompts {path}: not a text file in UTF-8") from None
    head = lines[0].split("\t") if lines else []
    if "Prompt" in head and len(head) > 1:
        lines = [line.split("\t")[head.index("Prompt")] for line in lines[1:]]
    return [line.strip() for line in lines]


def read_size(text):
    """"64" or "48x80" → (height, width). ValueError unless both are multiples of 16."""
    sides = text.split("x") * (1 if "x" in text else 2)
    if len(sides) != 2 or not all(side.isdecimal() and int(side) and int(side) % 16 == 0 for side in sides):
        raise ValueError(f"--image-size {text}: must be a multiple of 16, or two, as 48x80 (height, width)")
    return tuple(map(int, sides))


def file_name(prompt, number, suffix):
    """PROMPT_NUMBER.png; a slash or underscore in the prompt becomes a space, for the number is what follows "_"; a very
    long prompt is cut to what a file system takes."""
    name = "".join(" " if c in "/_\\" or not c.isprintable() else c for c in prompt)
    return f"{name.encode()[:200].decode(errors='ignore')}_{number:06d}{suffix}"


def save(result, path, fps):
    """One picture (3, H, W) or clip (F, 3, H, W), uint8, to a file that appears whole or not at all."""
    part = path.with_name(f".part-{os.getpid()}{path.suffix}")
    if result.ndim == 4:
        pictures.animation(result[None], None, fps, part, zoom=1)
    else:
        Image.fromarray(np.asarray(result.permute(1, 2, 0))).save(part)
    os.replace(part, path)


def main(arguments):
    config = Config()
    prompts = parse_flags(config, arguments)
    if config.prompts:
        prompts += read_prompts(config.prompts)
    if not prompts or not all(map(str.strip, prompts)):
        raise ValueError('no prompt: python sample.py "a red circle above a blue square", or --prompts FILE')
    for field in ("batch_size", "fps", "zoom", "per_prompt"):
        if getattr(config, field) < 1:
            raise ValueError(f"--{field.replace('_', '-')} {getattr(config, field)}: must be at least 1")
    if config.frames < 0:
        raise ValueError(f"--frames {config.frames}: must be at least 1")
    size = read_size(config.image_size) if config.image_size else None
    folder, device = config.checkpoint or newest_run("video" if config.frames else "image"), device_of(config.device)
    attention.use(config.attention, device)
    model = Pipeline.load(folder, clip=config.clip, t5=config.t5).to(device)
    model.precision = precision_of(config.precision, device, model.trained_in)
    clips = model.transformer.config.temporal
    many = config.prompts and not config.grid
    out = Path(config.out or ("samples" if many else "samples.gif" if clips else "samples.png"))
    if clips and out.suffix not in pictures.ANIMATED and not (many and not out.suffix):
        raise ValueError(f"--out {out}: clips are written as {', '.join(pictures.ANIMATED)}")
    if not clips and not many and Image.registered_extensions().get(out.suffix.lower()) not in Image.SAVE:
        raise ValueError(f"--out {out}: no kind of picture; call it NAME.png")
    for prompt in prompts:
        if unknown := model.unknown_words(prompt):
            print(f'note: in "{prompt}" no training caption had: {", ".join(unknown)}', file=sys.stderr)

    def generate(prompts, seeds):
        interval = (config.guide_from, config.guide_to)
        return model.generate(
            prompts, seeds, config.sampler, config.steps, config.lambda_t, config.lambda_m, config.rescale, interval,
            config.frames, size,
        )  # fmt: skip

    bar = lambda n: tqdm(range(0, n, config.batch_size), desc="sampling", disable=None)
    if many:
        folder_out = out / "samples"
        folder_out.mkdir(parents=True, exist_ok=True)
        wanted = [(prompt, j, i * config.per_prompt + j) for i, prompt in enumerate(prompts) for j in range(config.per_prompt)]
        files = [folder_out / file_name(prompt, number, ".gif" if clips else ".png") for prompt, _, number in wanted]
        rank, world = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
        mine = [k for k in range(rank, len(wanted), world) if not files[k].exists()]
        for i in bar(len(mine)):
            batch = mine[i : i + config.batch_size]
            results = generate([wanted[k][0] for k in batch], [config.seed + wanted[k][1] for k in batch])
            for k, result in zip(batch, results):
                save(result, files[k], config.fps)
        print(f"{len(mine)} new of {len(wanted)} {'clips' if clips else 'pictures'} from {folder}, {model.precision} products → {folder_out}")
        return
    done = torch.cat([generate(prompts[i : i + config.batch_size], config.seed) for i in bar(len(prompts))])
    out.parent.mkdir(parents=True, exist_ok=True)
    if clips:
        pictures.animation(done, prompts, config.fps, out, config.zoom)
        pictures.sheet(done, prompts).save(out.with_suffix(".png"))
    else:
        pictures.grid(done, prompts, min(len(done), 6), config.zoom).save(out)
    print(f"{len(done)} {'clip' if clips else 'picture'}{'s' * (len(done) > 1)} from {folder}, {model.precision} products → {out}")


if __name__ == "__main__":
    try:
        main(sys.argv[1:])
    except (ValueError, OSError) as error:
        sys.exit(f"sample.py: {error}")
