"""Training pictures with captions.

    shapes   pictures drawn here (shapes.py)
    folder   any folder of pictures, with the folders below it and those that links lead to. The caption of
             NAME.jpg is in NAME.txt beside it, or in a listing. captions.jsonl has a line {"file":
             "NAME.jpg", "caption": "…"} for each picture; metadata.jsonl and metadata.csv have "file_name"
             and "text" (or "caption"), as in Hugging Face's imagefolder. A listing counts for the folder that
             it lies in and those below. Training draws one of several captions, if a picture has a list.
             Of an imagefolder with splits, train/ and test/ or validation/, train/ alone is read, and the
             listings in it.

A data set has `captions`, a list of N strings; `pictures(indices)`, which gives (B, 3, S, S) uint8; `group`,
the number of neighbours that training keeps together in a batch; and `skipped`, a list of (path, reason) for
the files that were left out. Every file is used or has its reason there. Files of unknown kinds share one for
each extension; hidden files and texts, which may hold captions, need none.
"""
import csv
import json
import os
import re
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageOps
from tqdm import tqdm

from data.shapes import Shapes

NEED_MORE = ("BUFR", "EPS", "GRIB", "HDF5", "IPTC", "MPEG", "WMF")  # Pillow alone can't read these it knows
PICTURES = {suffix for suffix, kind in Image.registered_extensions().items()
            if kind in Image.OPEN and kind not in NEED_MORE}
LISTINGS = ("metadata.csv", "metadata.jsonl", "captions.jsonl")  # if a folder has several, the last counts
SPLITS = dict(train=("train", "training"), test=("test", "testing", "eval", "evaluation"),
              validation=("validation", "valid", "val", "dev"))  # as the imagefolder names them
TEXTS = (".txt", ".json", ".jsonl", ".csv", ".tsv", ".md", ".html", ".xml", ".yaml", ".yml")


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
            if image.mode == "F":
                raise ValueError("its pixels are floating-point numbers, of an unknown range")
            if image.mode.startswith("I"):  # 16-bit grey
                image = Image.fromarray((np.asarray(image, np.float32) / 257).clip(0, 255).astype(np.uint8))
            return fitted(image, size)
    except ValueError:
        raise
    except Exception as error:  # Pillow raises OSError, SyntaxError, struct.error, … on damaged files
        raise ValueError(f"not a whole picture ({error})") from None


def natural(path):
    """A sort key: 2.png comes before 10.png."""
    parts = re.split(r"(\d+)", str(path))
    return [int(part) if part.isdecimal() else part for part in parts], str(path)


def is_data(name):
    """Whether a file or folder of this name is the user's, not hidden or put there by a desktop."""
    return not name.startswith(".") and name not in ("__MACOSX", "Thumbs.db", "desktop.ini")


def is_text(path):
    return path.suffix.lower() in TEXTS or path.stem.upper() in ("README", "LICENSE", "COPYING")


def printable(text):
    """A name or a reason as text that can be printed: a file name may hold bytes that are not UTF-8."""
    return str(text).encode("utf-8", "backslashreplace").decode()


def by_extension(folder, paths, reason):
    """One (folder, reason) for each extension that the paths have: "3 .psd files: …"."""
    counts = Counter(printable(path.suffix.lower()) or "extensionless" for path in paths)
    return [(printable(folder), f"{count} {suffix} file{'s' * (count > 1)}: {reason}")
            for suffix, count in sorted(counts.items())]


def files_below(folder):
    """The files in a folder and in those below it, in natural order, and a list of (path, reason) for folders
    that cannot be opened. Links are followed, and no folder is read twice."""
    files, problems, seen = [], [], {os.path.realpath(folder)}

    def note(error):
        problems.append((Path(printable(error.filename)), f"cannot be opened ({error.strerror})"))

    for root, folders, names in os.walk(folder, followlinks=True, onerror=note):
        below = [Path(root, name) for name in folders if is_data(name)]
        folders.clear()
        for path in sorted(below, key=lambda path: (path.is_symlink(), path)):
            if os.path.realpath(path) not in seen:
                seen.add(os.path.realpath(path))
                folders.append(path.name)
        files += [Path(root, name) for name in names if is_data(name)]
    return sorted(files, key=natural), problems


def rows_of(listing):
    """Yields (number, entry, problem) for each row of a listing: a dictionary, or why it is none."""
    if listing.suffix == ".csv":
        try:
            with open(listing, encoding="utf-8-sig", newline="") as file:
                rows = csv.DictReader(file)
                yield from ((rows.line_num, row, None) for row in rows)
        except (ValueError, csv.Error) as error:
            yield 1, None, f"not a table of commas in UTF-8 ({error})"
        return
    for number, line in enumerate(listing.read_bytes().splitlines(), 1):
        try:
            yield number, json.loads(line), None
        except (ValueError, RecursionError) as error:
            yield number, None, f"not JSON in UTF-8 ({error})"


def read_listing(listing):
    """Yields (path, caption, problem) for each row; for one that names no file, "LISTING, line 3" as path."""
    for number, entry, problem in rows_of(listing):
        entry = entry if isinstance(entry, dict) else {}
        file = entry.get("file_name", entry.get("file"))
        caption = entry.get("text", entry.get("caption"))
        if not problem and not (file and isinstance(file, str) and {"text", "caption"} & entry.keys()):
            problem = 'not {"file_name": …, "text": …} or {"file": …, "caption": …}'
        if problem:
            yield Path(f"{listing}, line {number}"), None, problem
        elif not os.path.lexists(listing.parent / file):
            problem = f"line {number} of {listing.name} names it; there is no such file"
            yield listing.parent / file, None, problem
        else:
            yield listing.parent / file, caption, None


def read_captions(candidates, listings):
    """Yields (path, caption, problem) for each row of the listings, and for the candidate paths that they
    lack: where no listing counts, with the caption from the .txt beside it. The caption is as it was read, or
    there is a problem."""
    listed = set()
    for listing in listings:
        for path, caption, problem in read_listing(listing):
            named = Path(os.path.abspath(path))
            listed.update((named, *named.parents))  # a clip's folder too
            yield path, caption, problem
    counts_for = {Path(os.path.abspath(listing)).parent: listing.name for listing in listings}
    for path in candidates:
        absolute = Path(os.path.abspath(path))
        if absolute in listed:
            continue
        listing = next((counts_for[parent] for parent in absolute.parents if parent in counts_for), None)
        if listing:
            yield path, None, f"{listing} has no line for it"
            continue
        text = path.with_name(f"{path.name if path.is_dir() else path.stem}.txt")
        try:
            yield path, text.read_text(encoding="utf-8"), None
        except FileNotFoundError:
            yield path, None, f"no caption: {text.name} is missing"
        except UnicodeDecodeError:
            yield path, None, f"{text.name} is not UTF-8"
        except OSError as error:
            yield path, None, f"{text.name} cannot be read ({error.strerror})"


def tidy(caption):
    """A caption, its words one space apart, without a byte-order mark. ValueError unless it is a text (null
    or a number is none) with a word in it."""
    if not isinstance(caption, str):
        raise ValueError(f"the caption is not a text but {json.dumps(caption)[:40]}")
    words = caption.replace("\ufeff", "").split()
    if not words:
        raise ValueError("the caption is empty")
    try:
        return " ".join(words).encode().decode()  # JSON can escape half a character
    except UnicodeError:
        raise ValueError("the caption is not UTF-8") from None


def read_folder(folder, entries, suffixes, read, flag, what):
    """Reads a folder of pictures or clips. entries: the paths to look at; of them, folders and files with one
    of the suffixes are read. Returns N lists of captions, the N results of read(path), and `skipped`: a list
    of (path, reason) for those of other kinds, without a caption, or where read raised ValueError. ValueError
    if the folder is missing or nothing in it can be used; flag ("--data") and what ("picture") word its
    message."""
    if not folder.is_dir():
        raise ValueError(f"{flag} {folder}: there is no such folder (or use {flag} shapes)")
    candidates = [path for path in entries if path.suffix.lower() in suffixes or path.is_dir()]
    listings = {path.parent: path for name in LISTINGS for path in entries if path.name == name}
    captioned = list(read_captions(candidates, listings.values()))
    unknown = set(entries).difference(candidates, (path for path, _, _ in captioned))
    unknown = [path for path in unknown if not is_text(path)]
    found, skipped = [], by_extension(folder, unknown, f"no kind of {what} that can be read")

    def attempt(entry):
        path, caption, problem = entry
        try:
            if problem:
                raise ValueError(problem)
            several = caption if isinstance(caption, list) and caption else [caption]
            return [tidy(one) for one in several], read(path), None
        except ValueError as reason:
            return None, Path(printable(path)), printable(reason)

    threads = ThreadPoolExecutor(os.cpu_count())  # Pillow decodes outside of Python's lock
    try:
        results = threads.map(attempt, captioned)
        results = tqdm(results, f"reading {folder}", len(captioned), leave=False, disable=None)
        for caption, result, reason in results:
            if reason is None:
                found.append((caption, result))
            else:
                skipped.append((result, reason))
    finally:
        threads.shutdown(cancel_futures=True)  # Ctrl-C does not wait for the rest of the folder
    if not found:
        reasons = "".join(f"\n  {path}: {reason}" for path, reason in skipped[:5])
        raise ValueError(
            f"{flag} {folder}: no usable {what} with a caption. Put it beside a .txt of the same name, "
            f'or write a metadata.jsonl with lines {{"file_name": "NAME", "text": "…"}}.{reasons}'
        )
    captions, results = map(list, zip(*found))
    return captions, results, skipped


def split_of(folder, split):
    """The folder of a split, "train", "test" or "validation", in an imagefolder; None if it has none."""
    return next((folder / name for name in SPLITS[split] if (folder / name).is_dir()), None)


def trained_on(folder):
    """The part of a folder that is trained on: train/ of splits, else all of it."""
    train = split_of(folder, "train")
    return train if train and (split_of(folder, "test") or split_of(folder, "validation")) else folder


def read_pictures(folder, read, flag="--data"):
    """read_folder for the pictures in a folder and in those below it; of splits, for those of train/."""
    files, problems = files_below(folder)
    train = trained_on(folder)
    if train != folder:
        others = {file.relative_to(folder).parts[0] for file in files if train not in file.parents}
        reason = f"beside {train.name}/, which alone is trained on"
        problems += [(folder / name, reason) for name in sorted(others)]
        files = [file for file in files if train in file.parents]
    captions, results, skipped = read_folder(folder, files, PICTURES, read, flag, "picture")
    return captions, results, problems + skipped


class Folder:
    """A folder of pictures with captions, read into memory: 3·S² bytes a picture. Raises as read_folder.
    Besides what every data set has: `variants`, a list of captions for each picture, of which `captions` has
    the first, and `labels`, the names of the folders below this one that they lie in, or ""."""

    group = 1

    def __init__(self, folder, size=64):
        read = lambda path: (path.parent, open_picture(path, size))
        self.variants, found, self.skipped = read_pictures(folder, read)
        self.captions = [captions[0] for captions in self.variants]
        self.labels = ["" if parent == trained_on(folder) else parent.name for parent, _ in found]
        self.array = torch.from_numpy(np.stack([picture for _, picture in found])).permute(0, 3, 1, 2)

    def __len__(self):
        return len(self.captions)

    def pictures(self, indices):
        """B indices → (B, 3, S, S) uint8."""
        return self.array[torch.as_tensor(indices)]


def load(data, size, seed=0):
    """The data set that --data names: "shapes" or a folder."""
    return Shapes(size, seed=seed) if data == "shapes" else Folder(Path(data), size)


def unseen(data, size, seed=0):
    """Pictures that training with `load(data, size, seed)` never sees: other shapes, or an imagefolder's test
    split, if that has captions. None if there are none."""
    if data == "shapes":
        return Shapes(size, seed=seed + 1)
    test = split_of(Path(data), "test")
    try:
        return Folder(test, size) if test and trained_on(Path(data)) != Path(data) else None
    except ValueError:
        return None
