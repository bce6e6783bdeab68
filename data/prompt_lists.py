"""Lists of prompts, and the folder of pictures drawn from them, as T2I-CompBench's scripts read it."""
import os
from pathlib import Path

import numpy as np
from PIL import Image
from tqdm import tqdm

from common import figures
from common.files import written_whole


def read_prompts(path):
    """The prompts of a file: its non-empty lines, or of a table with tabs its column "Prompt", as
    PartiPrompts has. ValueError if the file is not in UTF-8."""
    try:
        lines = [line for line in Path(path).read_text(encoding="utf-8-sig").splitlines() if line.strip()]
    except UnicodeDecodeError:
        raise ValueError(f"--prompts {path}: not a text file in UTF-8") from None
    head = lines[0].split("\t") if lines else []
    if "Prompt" in head and len(head) > 1:
        column = head.index("Prompt")
        rows = [line.split("\t") for line in lines[1:]]
        for number, row in enumerate(rows, 2):
            if len(row) <= column or not row[column].strip():
                raise ValueError(f"--prompts {path}: row {number} of the table has no prompt")
        lines = [row[column] for row in rows]
    return [line.strip() for line in lines]


def read_size(text):
    """"64" or "48x80" → (height, width). ValueError unless both are multiples of 16."""
    sides = text.split("x") * (1 if "x" in text else 2)
    if len(sides) != 2 or not all(side.isdecimal() and int(side) and int(side) % 16 == 0 for side in sides):
        raise ValueError(f"--image-size {text}: must be a multiple of 16, or two, as 48x80 (height, width)")
    return tuple(map(int, sides))


def read_interval(text):
    """"0.2,0.8" → (0.2, 0.8). ValueError unless it is two rising numbers from 0 to 1."""
    try:
        low, high = map(float, text.split(","))
    except ValueError:
        low, high = 1.0, 0.0
    if not 0 <= low <= high <= 1:
        raise ValueError(f"--guide {text}: must be two rising numbers from 0 to 1, as 0.2,0.8")
    return low, high


def file_name(prompt, number, suffix):
    """PROMPT_NUMBER.png. The scripts split at "_", so slashes and underscores become spaces. A long prompt is
    cut."""
    name = "".join(" " if c in "/_\\" or not c.isprintable() else c for c in prompt)
    return f"{name.encode()[:200].decode(errors='ignore')}_{number:06d}{suffix}"


def words_of(text):
    """Lower-case words of a text."""
    return "".join(c if c.isalnum() else " " for c in text.lower()).split()


def output_of(out, into_folder, clips):
    """The file or folder to write: --out, or the default. ValueError if it is of a kind that cannot be
    written."""
    default = "samples" if into_folder else "samples.gif" if clips else "samples.png"
    path = Path(out or default)
    if clips and path.suffix not in figures.ANIMATED and not (into_folder and not path.suffix):
        raise ValueError(f"--out {path}: clips are written as {', '.join(figures.ANIMATED)}")
    writable = Image.registered_extensions().get(path.suffix.lower()) in Image.SAVE
    if not clips and not into_folder and not writable:
        raise ValueError(f"--out {path}: no kind of picture; call it NAME.png")
    return path


def progress(count, batch_size):
    """The starts of batches, with a bar."""
    return tqdm(range(0, count, batch_size), desc="sampling", disable=None)


def write_folder(draw, samples, folder, batch_size, clips, fps):
    """Draws this process's share of the samples, a list of (prompt, seed), those that are not in the folder
    yet. draw(prompts, seeds) → pictures or clips, uint8. Returns how many were drawn, and of how many."""
    folder.mkdir(parents=True, exist_ok=True)
    suffix = ".gif" if clips else ".png"
    files = [folder / file_name(prompt, number, suffix) for number, (prompt, _) in enumerate(samples)]
    rank, world = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    mine = [k for k in range(rank, len(samples), world) if not files[k].exists()]
    for i in progress(len(mine), batch_size):
        batch = mine[i : i + batch_size]
        results = draw(*map(list, zip(*(samples[k] for k in batch))))
        for k, result in zip(batch, results):
            with written_whole(files[k]) as part:
                if clips:
                    figures.animation(result[None], None, fps, part, zoom=1)
                else:
                    Image.fromarray(np.asarray(result.permute(1, 2, 0))).save(part)
    return len(mine), len(samples)
