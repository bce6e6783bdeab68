"""Lists of prompts, and the folder of pictures drawn from them, as T2I-CompBench's scripts read it."""
import os
import sys
from pathlib import Path

import numpy as np
from PIL import Image

from common import figures
from common.files import written_whole


def read_prompts(path):
    """The prompts of a file: its non-empty lines, or of a table with tabs its column "Prompt", as
    PartiPrompts has. ValueError if the file is not in UTF-8, or a row has no prompt."""
    try:
        lines = [line for line in Path(path).read_text(encoding="utf-8-sig").splitlines() if line.strip()]
    except UnicodeDecodeError:
        raise ValueError(f"--prompts {path}: not a text file in UTF-8") from None
    head = lines[0].split("\t") if lines else []
    if "Prompt" in head and len(head) > 1:
        column = head.index("Prompt")
        rows = [line.split("\t") + [""] * len(head) for line in lines[1:]]
        lines = [row[column] for row in rows]
        for number, prompt in enumerate(lines, 2):
            if not prompt.strip():
                raise ValueError(f"--prompts {path}: row {number} of the table has no prompt")
    return [line.strip() for line in lines]


def read_size(text):
    """"64" or "48x80" → (height, width). ValueError unless both are multiples of 16."""
    sides = text.split("x") if "x" in text else [text, text]
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


def words_of(text):
    """Lower-case words of a text."""
    return "".join(c if c.isalnum() else " " for c in text.lower()).split()


def note_unknown_words(prompts, known):
    """Prints the words of each prompt that no training caption had. known: those that one had, or []: any."""
    for prompt in prompts:
        unknown = sorted(set(words_of(prompt)) - set(known))
        if known and unknown:
            print(f'note: in "{prompt}" no training caption had: {", ".join(unknown)}', file=sys.stderr)


def output_of(out, into_folder, clips):
    """The file or folder to write: --out, or the default. ValueError for a file of a kind that cannot be
    written."""
    if into_folder:
        return Path(out or "samples") / "samples"
    path = Path(out or ("samples.gif" if clips else "samples.png"))
    if clips and path.suffix not in figures.ANIMATED:
        raise ValueError(f"--out {path}: clips are written as {', '.join(figures.ANIMATED)}")
    if not clips and Image.registered_extensions().get(path.suffix.lower()) not in Image.SAVE:
        raise ValueError(f"--out {path}: no kind of picture; call it NAME.png")
    return path


def file_name(prompt, number, suffix):
    """PROMPT_NUMBER.png. The scripts split at "_", so slashes and underscores become spaces. A long prompt is
    cut."""
    name = "".join(" " if c in "/_\\" or not c.isprintable() else c for c in prompt)
    return f"{name.encode()[:200].decode(errors='ignore')}_{number:06d}{suffix}"


def write_folder(draw, samples, folder, clips, fps):
    """Draws this process's share of the samples, a list of (prompt, seed), those that are not in the folder
    yet. draw(samples) yields a picture or clip for each, uint8. Returns how many were drawn."""
    folder.mkdir(parents=True, exist_ok=True)
    suffix = ".gif" if clips else ".png"
    files = [folder / file_name(prompt, number, suffix) for number, (prompt, _) in enumerate(samples)]
    rank, world = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    mine = [k for k in range(rank, len(samples), world) if not files[k].exists()]
    for k, result in zip(mine, draw([samples[k] for k in mine])):
        with written_whole(files[k]) as part:
            if clips:
                figures.animation(result[None], None, fps, part, zoom=1)
            else:
                Image.fromarray(np.asarray(result.permute(1, 2, 0))).save(part)
    return len(mine)
