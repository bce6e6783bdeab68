"""Training data: pictures with captions.

    shapes   drawn here (shapes.py)
    folder   any folder of pictures, each with a caption in a .txt of the same name, or one captions.jsonl for all

A data set has `captions`, a list of N strings, `pictures(indices)`, a (B, 3, S, S) uint8 tensor, and `group`, the number
of neighbours that training keeps together in a batch.
"""
import json
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageOps
from tqdm import tqdm

from data.shapes import Shapes

PICTURES = (".png", ".jpg", ".jpeg", ".webp")


def open_picture(path, size):
    """Any picture file, by path or open, → (size, size, 3) uint8: EXIF rotation applied, transparency on white, 16 bits
    to 8, scaled so that the shorter side fits and cropped at the centre. ValueError with the reason if it cannot be used."""
    try:
        with Image.open(path) as image:
            if min(image.size) < 8:
                raise ValueError(f"only {image.width}×{image.height} pixels")
            if image.width * image.height > 100_000_000 or max(image.size) > 12 * min(image.size):
                raise ValueError(f"{image.width}×{image.height} pixels: too large, or too long and narrow")
            image.draft("RGB", (2 * size, 2 * size))  # a JPEG is then decoded at a lower resolution
            image = ImageOps.exif_transpose(image)
            if image.mode.startswith("I"):  # 16-bit grey
                image = Image.fromarray((np.asarray(image, np.float32) / 257).clip(0, 255).astype(np.uint8))
            if image.mode in ("LA", "PA", "RGBA") or "transparency" in image.info:
                image = image.convert("RGBA")
                image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
            image = ImageOps.fit(image.convert("RGB"), (size, size), Image.Resampling.LANCZOS)
            return np.asarray(image)
    except ValueError:
        raise
    except Exception as error:  # Pillow raises OSError, SyntaxError, struct.error, … on damaged files
        raise ValueError(f"not a whole picture ({error})") from None


def read_captions(folder, candidates):
    """Yields (path, caption or ValueError): what captions.jsonl lists, or else all candidates, by the .txt beside them."""
    listing = folder / "captions.jsonl"
    if listing.exists():
        for number, line in enumerate(listing.read_bytes().splitlines(), 1):
            try:
                entry = json.loads(line)
                yield folder / entry["file"], str(entry["caption"])
            except (ValueError, KeyError, TypeError) as error:
                yield f"{listing}, line {number}", ValueError(f'not {{"file": …, "caption": …}} in UTF-8 ({error})')
        return
    for path in candidates:
        text = path.with_name(f"{path.name if path.is_dir() else path.stem}.txt")
        try:
            yield path, text.read_text(encoding="utf-8")
        except FileNotFoundError:
            yield path, ValueError(f"no caption: {text.name} is missing")
        except UnicodeDecodeError:
            yield path, ValueError(f"{text.name} is not UTF-8")


def read_folder(folder, candidates, read, flag, what):
    """Reads what a folder holds: (captions, what read(path) gives for each, skipped), the last a list of (path, reason).
    flag and what are for the words of the ValueError that is raised where the folder is missing, or nothing usable."""
    if not folder.is_dir():
        raise ValueError(f"{flag} {folder}: there is no such folder (or use {flag} shapes)")
    captions, found, skipped = [], [], []
    for path, caption in tqdm(list(read_captions(folder, candidates)), desc=f"reading {folder}", disable=None, leave=False):
        try:
            if isinstance(caption, ValueError):
                raise caption
            caption = " ".join(caption.split())
            if not caption:
                raise ValueError("the caption is empty")
            found.append(read(path))
            captions.append(caption)
        except ValueError as reason:
            skipped.append((path, str(reason)))
    if not found:
        reasons = "".join(f"\n  {path}: {reason}" for path, reason in skipped[:5])
        raise ValueError(
            f"{flag} {folder}: no usable {what} with a caption. Put it beside a .txt of the same name, "
            f'or write a captions.jsonl with lines {{"file": "NAME", "caption": "…"}}.{reasons}'
        )
    return captions, found, skipped


class Folder:
    """A folder of pictures with captions, read into memory (3·S² bytes a picture). What cannot be used is left out and
    listed in `skipped` as (path, reason). ValueError if the folder is missing or nothing in it can be used."""

    group = 1

    def __init__(self, folder, size=64):
        folder, self.size = Path(folder), size
        files = (path for path in sorted(folder.rglob("*")) if path.suffix.lower() in PICTURES)
        read = lambda path: open_picture(path, size)
        self.captions, pictures, self.skipped = read_folder(folder, files, read, "--data", "picture (png, jpg, webp)")
        self.array = torch.from_numpy(np.stack(pictures)).permute(0, 3, 1, 2)  # (N, 3, S, S)

    def __len__(self):
        return len(self.captions)

    def pictures(self, indices):
        return self.array[torch.as_tensor(indices)]


def load(data, size, seed=0):
    """The data set that --data names: "shapes" or a folder."""
    return Shapes(size, seed=seed) if data == "shapes" else Folder(data, size)
