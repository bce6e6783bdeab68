"""Lists of prompts; what is said before they are drawn; what is written: a grid, or the folder of pictures
that T2I-CompBench's scripts read."""
import contextlib
import errno
import re
import stat
import sys
import unicodedata
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from common import figures
from common.files import remove_parts, written_whole
from common.flags import dashed
from common.hardware import rank, world
from encoders.padding import readable


def read_prompts(path):
    """The prompts of a file, one a line. Of a line with tabs the first column counts, or the one whose head
    is "Prompt", as in PartiPrompts. ValueError if the file is not in UTF-8, or it or a row has no prompt."""
    try:
        lines = Path(path).read_text(encoding="utf-8-sig").split("\n")
    except UnicodeDecodeError:
        raise ValueError(f"--prompts {path}: not a text file in UTF-8") from None
    rows = [(number, line.split("\t")) for number, line in enumerate(lines, 1) if line.strip()]
    column = 0
    if rows and "Prompt" in rows[0][1]:
        column = rows[0][1].index("Prompt")
        rows = rows[1:]
    for number, cells in rows:
        if not "".join(cells[column : column + 1]).strip():
            raise ValueError(f"--prompts {path}: row {number} of the table has no prompt")
    if not rows:
        raise ValueError(f"--prompts {path}: there is no prompt in it; write one a line")
    return [cells[column].strip() for _, cells in rows]


def prompts_of(words, file):
    """The prompts of a command: its words, then those of the file, if it is not "". ValueError if there is
    none, or an empty one."""
    prompts = [readable(prompt) for prompt in words] + (read_prompts(file) if file else [])
    if not prompts or not all(map(str.strip, prompts)):
        raise ValueError('no prompt: python sample.py "a red circle above a blue square", or --prompts FILE')
    return prompts


def read_size(text):
    """"64" or "48x80" → (height, width). ValueError unless both are multiples of 16 below 10,000."""
    sides = re.fullmatch("([0-9]{1,4})(?:x([0-9]{1,4}))?", text)
    height, width = (int(side or sides[1]) for side in sides.groups()) if sides else (0, 0)
    if not height or not width or height % 16 or width % 16:
        raise ValueError(f"--image-size {text}: must be a multiple of 16, or two, as 48x80 (height, width)")
    return height, width


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


def check_flags(flags, given, clips):
    """ValueError for a flag that would have no effect. given: the names of those in the command. clips:
    whether the model makes clips."""
    into_folder = flags.prompts and not flags.grid
    if (flags.grid and not flags.prompts) or ("per_prompt" in given and not into_folder):
        raise ValueError("--grid goes with --prompts FILE; --per-prompt with --prompts FILE without --grid")
    if "zoom" in given and into_folder:
        raise ValueError("--zoom: a folder's pictures are as the model draws them; for a grid give --grid")
    for name in ("frames", "lambda_m", "fps"):
        if name in given and not clips:
            hint = "name a run of `python train.py video`: --checkpoint DIR"
            raise ValueError(f"--{dashed(name)}: of clips only, and this is an image model; {hint}")


def notes_on(prompts, known, tokenizers):
    """What of each prompt the model cannot know, a line for each that has any: words that no training caption
    had, words that a tokenizer has no pieces for, and an end that it cuts off. known: the words of the
    training captions, or []: any."""
    notes = []
    for prompt in dict.fromkeys(prompts):
        unknown = set(words_of(prompt)) - set(known or words_of(prompt))
        unseen = {word for tokenizer in tokenizers for word in tokenizer.unknown(prompt)}
        strange = {"no training caption had": unknown, "the tokenizer cannot read": unseen}
        parts = [f"{what}: {shortened(', '.join(sorted(words)))}" for what, words in strange.items() if words]
        for tokenizer in tokenizers:
            if cut := tokenizer.cut(prompt):
                parts.append(f"only the first {tokenizer.length} tokens are read, the last {cut} are not")
        if parts:
            notes.append(f'note: in "{shortened(prompt)}" {"; ".join(parts)}')
    return notes


def print_notes(prompts, known, tokenizers, most=20):
    """Prints the notes on prompts, at most so many."""
    notes = notes_on(prompts, known, tokenizers)
    if len(notes) > most:
        notes[most - 1 :] = [f"note: … and likewise in {len(notes) - most + 1} more prompts"]
    if rank() == 0:  # one voice
        print(*notes, sep="\n", end="\n" * bool(notes), file=sys.stderr)


def shortened(text, most=200):
    """A text in one line, cut to so many characters."""
    text = " ".join(text.split())
    return text if len(text) <= most else f"{text[:most]}…"


def output_of(out, into_folder, clips, fps):
    """The file or folder to write: --out, or the default. ValueError for a file of a kind that cannot be
    written, or that cannot show so many frames a second."""
    if into_folder:
        path, suffix = Path(out or "samples") / "samples", ".gif" if clips else ".png"
    else:
        path = Path(out or ("clips.gif" if clips else "samples.png"))
        suffix = path.suffix.lower()
    if clips and suffix not in figures.ANIMATED:
        raise ValueError(f"--out {path}: clips are written as {', '.join(figures.ANIMATED)}")
    most = {".gif": 50, ".webp": 100}.get(suffix, fps)  # viewers show shorter frames for a tenth of a second
    if clips and fps > most:
        hint = "" if into_folder else "; --out NAME.webp may have 100, NAME.mp4 more"
        raise ValueError(f"--fps {fps}: a {suffix} has at most {most}{hint}")
    if not clips and Image.registered_extensions().get(suffix) not in Image.SAVE:
        raise ValueError(f"--out {path}: no kind of picture; call it NAME.png")
    return path


def file_name(prompt, number, suffix):
    """PROMPT_NUMBER.png. The scripts split at "_", so slashes and underscores become spaces, and so do line
    ends and the like. A long prompt is cut: a name has at most 255 bytes."""
    blank = lambda c: c in "/_\\" or c.isspace() or unicodedata.category(c) == "Cc"
    name = "".join(" " if blank(c) else c for c in prompt)
    end = f"_{number:06d}{suffix}"
    return name.encode()[: 255 - len(end)].decode(errors="ignore") + end


@contextlib.contextmanager
def trial(path, parts):
    """with trial(path, parts): … writes white results, and keeps none: what cannot be written is found before
    it is drawn. ValueError, naming --out. parts: the folder of temporary files."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        for place in (parts, path.parent):
            remove_parts(place)
        with contextlib.suppress(FileNotFoundError):
            if stat.S_ISDIR(path.stat().st_mode):
                raise IsADirectoryError(errno.EISDIR, "it is a folder")
        yield
    except Exception as error:  # Pillow's are of many kinds
        hint = "fewer prompts, a smaller --zoom or another kind of file may do"
        reason = getattr(error, "strerror", None) or f"{' '.join(str(error).split())}; {hint}"
        raise ValueError(f"--out {path} cannot be written: {reason}") from None


def white(shape):
    """uint8 (shape), in the memory of one number."""
    return torch.tensor(255, dtype=torch.uint8).expand(shape)


def write_grid(draw, samples, out, shape, fps, zoom):
    """Draws all samples, a list of (prompt, seed), into one file: pictures as a grid; clips as an animated
    one, with all their frames in NAME.png. draw(samples) yields a picture or clip of this shape for each,
    uint8, ([F,] 3, H, W). ValueError, before anything is drawn, if the file cannot be written."""
    captions = [prompt for prompt, _ in samples]

    def write(results, keep):
        with written_whole(out, keep=keep) as part:
            if len(shape) == 4:
                figures.animation(results, captions, fps, part, zoom)
            else:
                figures.grid(results, captions, min(len(results), 6), zoom).save(part)
        if len(shape) == 4:
            with written_whole(out.with_suffix(".png"), keep=keep) as part:
                figures.sheet(results, captions).save(part)

    with trial(out, out.parent):
        write(white((len(samples), *shape)), keep=False)
    write(torch.stack(list(draw(samples))), keep=True)


def write_folder(draw, samples, folder, shape, fps):
    """Draws this process's share of the samples, those that are not in the folder yet; arguments as above.
    Processes share if torchrun has started them. Returns how many were drawn. ValueError if the folder cannot
    be written, or holds other files, which would count as samples."""
    suffix = ".gif" if len(shape) == 4 else ".png"
    files = [folder / file_name(prompt, number, suffix) for number, (prompt, _) in enumerate(samples)]
    others = {path.name for path in folder.glob("[!.]*")} - {path.name for path in files}
    if others:
        found = f"files that are not of this list, as {min(others)}"
        raise ValueError(f"{folder} holds {found}: give another --out, or move them away")
    home = folder.resolve()
    parts = home if home.is_mount() else home.parent  # what reads the folder sees only whole pictures

    def write(result, path, keep):
        with written_whole(path, parts, keep) as part:
            if len(shape) == 4:
                figures.animation(result[None], None, fps, part, zoom=1)
            else:
                Image.fromarray(np.asarray(result.permute(1, 2, 0))).save(part)

    with trial(files[0], parts):
        write(white(shape), files[0], keep=False)
    mine = [k for k in range(rank(), len(samples), world()) if not files[k].exists()]
    for k, result in zip(mine, draw([samples[k] for k in mine])):
        write(result, files[k], keep=True)
    return len(mine)
