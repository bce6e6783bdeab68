"""Training pictures with captions.

    shapes   pictures drawn here (shapes.py)
    folder   any folder of pictures. The caption of NAME.jpg is in NAME.txt beside it, or captions.jsonl has
             one line {"file": "NAME.jpg", "caption": "…"} for each picture.

A data set has `captions`, a list of N strings; `pictures(indices)`, which gives (B, 3, S, S) uint8; `group`,
the number of neighbours that training keeps together in a batch; and `skipped`, a list of (path, reason) for
the files that were left out.
"""
import json
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageOps
from tqdm import tqdm

from data.shapes import Shapes

PICTURES = (".png", ".jpg", ".jpeg", ".webp")


def fitted(image, size):
    """A Pillow image → (size, size, 3) uint8: transparency becomes white, the shorter side is scaled to fit,
    the longer one is cropped around the centre."""
    if image.mode in ("LA", "PA", "RGBA") or "transparency" in image.info:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return np.asarray(ImageOps.fit(image.convert("RGB"), (size, size), Image.Resampling.LANCZOS))


def open_picture(file, size):
    """A picture file, by path or open, → (size, size, 3) uint8. EXIF rotation is applied, 16 bits become 8,
    and the picture is `fitted`. ValueError with the reason if it cannot be used."""
    try:
        with Image.open(file) as image:
            width, height = image.size
            if min(width, height) < 8:
                raise ValueError(f"only {width}×{height} pixels")
            if width * height > 100_000_000 or max(width, height) > 12 * min(width, height):
                raise ValueError(f"{width}×{height} pixels: too large, or too long and narrow")
            image.draft("RGB", (2 * size, 2 * size))  # a JPEG is then decoded at a lower resolution
            image = ImageOps.exif_transpose(image)
            if image.mode.startswith("I"):  # 16-bit grey
                image = Image.fromarray((np.asarray(image, np.float32) / 257).clip(0, 255).astype(np.uint8))
            return fitted(image, size)
    except ValueError:
        raise
    except Exception as error:  # Pillow raises OSError, SyntaxError, struct.error, … on damaged files
        raise ValueError(f"not a whole picture ({error})") from None


def read_captions(folder, candidates):
    """Yields (path, caption, problem) for each line of captions.jsonl. Without this file: for each candidate
    path, with the caption from the .txt beside it. Either caption or problem is None."""
    listing = folder / "captions.jsonl"
    if listing.exists():
        for number, line in enumerate(listing.read_bytes().splitlines(), 1):
            try:
                entry = json.loads(line)
                yield folder / entry["file"], str(entry["caption"]), None
            except (ValueError, KeyError, TypeError) as error:
                yield f"{listing}, line {number}", None, f'not {{"file": …, "caption": …}} in UTF-8 ({error})'
        return
    for path in candidates:
        text = path.with_name(f"{path.name if path.is_dir() else path.stem}.txt")
        try:
            yield path, text.read_text(encoding="utf-8"), None
        except FileNotFoundError:
            yield path, None, f"no caption: {text.name} is missing"
        except UnicodeDecodeError:
            yield path, None, f"{text.name} is not UTF-8"


def tidy(caption):
    """A caption, its words one space apart. ValueError if it has none."""
    if not caption.split():
        raise ValueError("the caption is empty")
    return " ".join(caption.split())


def read_folder(folder, candidates, read, flag, what):
    """Reads a folder of pictures or clips. Returns N captions, the N results of read(path), and `skipped`: a
    list of (path, reason) for those without a caption or where read raised ValueError. ValueError if the
    folder is missing or nothing in it can be used; flag ("--data") and what ("picture") word its message."""
    if not folder.is_dir():
        raise ValueError(f"{flag} {folder}: there is no such folder (or use {flag} shapes)")
    found, skipped = [], []
    entries = list(read_captions(folder, candidates))
    for path, caption, problem in tqdm(entries, desc=f"reading {folder}", disable=None, leave=False):
        try:
            if problem:
                raise ValueError(problem)
            found.append((tidy(caption), read(path)))
        except ValueError as reason:
            skipped.append((path, str(reason)))
    if not found:
        reasons = "".join(f"\n  {path}: {reason}" for path, reason in skipped[:5])
        raise ValueError(
            f"{flag} {folder}: no usable {what} with a caption. Put it beside a .txt of the same name, "
            f'or write a captions.jsonl with lines {{"file": "NAME", "caption": "…"}}.{reasons}'
        )
    captions, results = map(list, zip(*found))
    return captions, results, skipped


def read_pictures(folder, read, flag="--data"):
    """read_folder for the pictures in a folder and in those below it."""
    files = (path for path in sorted(folder.rglob("*")) if path.suffix.lower() in PICTURES)
    return read_folder(folder, files, read, flag, "picture (png, jpg, webp)")


class Folder:
    """A folder of pictures with captions, read into memory: 3·S² bytes a picture. Raises as read_folder."""

    group = 1

    def __init__(self, folder, size=64):
        self.captions, pictures, self.skipped = read_pictures(folder, lambda path: open_picture(path, size))
        self.array = torch.from_numpy(np.stack(pictures)).permute(0, 3, 1, 2)  # (N, 3, S, S)

    def __len__(self):
        return len(self.captions)

    def pictures(self, indices):
        """B indices → (B, 3, S, S) uint8."""
        return self.array[torch.as_tensor(indices)]


def load(data, size, seed=0):
    """The data set that --data names: "shapes" or a folder."""
    return Shapes(size, seed=seed) if data == "shapes" else Folder(Path(data), size)
