"""Training data in tar files, by the WebDataset convention: for data that does not fit in memory.

    python -m data.tar_shards FOLDER OUT [--per-shard 1000]      packs a folder of pictures with captions

A sample is the files that share a key, the name up to its first dot: 00012.jpg with 00012.txt, or with a
00012.json that has a "caption". Each tar (a shard) is scanned once; an index file beside it then says where
each sample lies, so that any sample is one seek away. Nothing is unpacked.

Disks are fast when few files are read at a time. So an epoch shuffles the shards, takes WINDOW at a time, and
shuffles the samples within each window. The batch of a step depends on (seed, step) alone: a run resumed in
mid-epoch continues with the very next sample. Letters: B batch, F frames, S picture size, N samples.
"""
import contextlib
import glob
import io
import itertools
import json
import os
import shutil
import signal
import tarfile
import tempfile
from collections import Counter
from dataclasses import dataclass
from functools import partial
from pathlib import Path, PurePosixPath

import numpy as np
import torch
from tqdm import tqdm

from common.files import print_left_out, written_whole
from common.flags import flag, read, run_command
from data.clips import ANIMATIONS, FILMS, open_clip
from data.folder import PICTURES, open_picture, read_folder

WINDOW = 8  # shards whose samples are shuffled together
INDEX_VERSION = 1  # an index of another version is made again


def caption_of(raw, is_json):
    """The bytes of a .txt or .json file → its caption. ValueError if it is empty or not UTF-8."""
    try:
        text = raw.decode()
        if is_json:
            text = json.loads(text)["caption"].encode().decode()  # JSON can escape half a character
    except UnicodeError:
        raise ValueError("the caption is not UTF-8") from None
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        raise ValueError('the .json is not {"caption": "…"}') from None
    text = " ".join(text.split())
    if not text:
        raise ValueError("the caption is empty")
    return text


def headers(file):
    """Yields the header of each file in an open tar. ValueError where it is damaged, or if it is empty."""
    length, end, problem = os.fstat(file.fileno()).st_size, -1, "not a tar file, or a compressed one"
    try:
        tar = tarfile.open(fileobj=file, mode="r:", encoding="utf-8", errors="backslashreplace")
        problem = "cut short or damaged, and used up to there"
        while (member := tar.next()) is not None:
            if member.offset_data + member.size > length or tar.offset <= end:  # a size below 0 would loop
                raise tarfile.ReadError(f"{member.name} reaches past the end")
            end = tar.offset
            if not member.isdir():
                yield member
        file.seek(tar.offset)
        if file.read(tarfile.BLOCKSIZE) != bytes(tarfile.BLOCKSIZE):  # to tarfile a bad header is the end
            raise tarfile.ReadError(f"no header at byte {tar.offset}")
    except Exception as error:  # tarfile raises ReadError and, on damaged headers, ValueError, MemoryError, …
        raise ValueError(f"{problem} ({error})") from None
    if end < 0:
        raise ValueError("an empty tar")


def members_of(file, suffixes):
    """An open tar → {key: {"picture", ".txt" or ".json": (offset, size, suffix)}}, and what is left out: a
    list of (name, reason), with the name "" for the tar itself. A damaged tar is used up to the damage."""
    members, unknown, skipped = {}, Counter(), []
    try:
        for member in headers(file):
            name = PurePosixPath(member.name)  # drops a leading ./
            stem, _, suffix = name.name.partition(".")
            suffix = f".{suffix.lower()}"
            part = "picture" if suffix in suffixes else suffix
            if not member.isreg() or member.issparse() or member.size < 0:
                skipped.append((member.name, "not a plain file (a link, a device, …)"))
            elif name.is_absolute() or ".." in name.parts or any(c < " " for c in member.name):
                skipped.append((member.name, "its name is absolute, or has .. or control characters"))
            elif not stem or part not in ("picture", ".txt", ".json"):
                unknown[suffix] += 1
            elif part in (parts := members.setdefault(str(name.parent / stem), {})):
                skipped.append((member.name, "its key has such a file already, which is used"))
            else:
                parts[part] = (member.offset_data, member.size, suffix)
    except ValueError as reason:
        skipped.append(("", str(reason)))
    skipped += [(f"*{suffix}", f"{count} of an unknown extension") for suffix, count in unknown.items()]
    return members, skipped


def scan(path, suffixes):
    """A tar → rows (n, 6) int64, n keys, and what is left out, as above. A row holds offset and size of the
    picture, offset and size of the caption, which of the suffixes, and whether the caption is JSON."""
    rows, keys = [], []
    with open(path, "rb") as file:
        members, skipped = members_of(file, suffixes)
        for key, parts in members.items():
            try:
                if "picture" not in parts:
                    raise ValueError(f"no picture or clip ({', '.join(suffixes)})")
                if len(parts) == 1:
                    raise ValueError("no caption: neither .txt nor .json")
                is_json = ".txt" not in parts
                offset, size, _ = parts[".json" if is_json else ".txt"]
                file.seek(offset)
                caption_of(file.read(size), is_json)
                picture = parts["picture"]
                rows.append((*picture[:2], offset, size, suffixes.index(picture[2]), is_json))
                keys.append(key)
            except ValueError as reason:
                skipped.append((key, str(reason)))
    return np.array(rows, np.int64).reshape(-1, 6), keys, skipped


def index_of(path, kind, suffixes):
    """scan(path), from the file NAME.tar.KIND.index if that is sound and the tar's size and time fit;
    else anew, writing the file if possible. Returns rows, and keys and skipped as one compact JSON."""
    stat, index = path.stat(), Path(f"{path}.{kind}.index")
    stamp = np.array([INDEX_VERSION, stat.st_size, stat.st_mtime_ns])
    try:
        with np.load(index, allow_pickle=False) as saved:  # a zip, with checksums
            if np.array_equal(saved["stamp"], stamp):
                return saved["rows"], saved["text"].tobytes()
    except Exception:  # missing, or damaged in any way
        pass
    rows, keys, skipped = scan(path, suffixes)
    text = json.dumps(dict(keys=keys, skipped=skipped)).encode()
    with contextlib.suppress(OSError), written_whole(index) as part, open(part, "wb") as file:
        np.savez(file, stamp=stamp, rows=rows, text=np.frombuffer(text, np.uint8))
    return rows, text


class TarShards:
    """The samples of all .tar files in a folder, or of those that a pattern such as data/0*.tar names.

    frames: 0 for pictures, F for clips of F frames at `fps` a second. `skipped` lists what is left out, as
    ("SHARD: name", reason). A sample found damaged when it is read is replaced by the next one, so that
    batches stay full and ranks in step; `bad` maps its index to the reason. ValueError if none is usable."""

    group = 1

    def __init__(self, folder, size=64, frames=0, fps=4):
        self.size, self.frames, self.fps = size, frames, fps
        where, kind = (f"--clips {folder}", "clips") if frames else (f"--data {folder}", "pictures")
        self.suffixes = ANIMATIONS + FILMS if frames else PICTURES
        is_folder = Path(folder).is_dir()
        paths = Path(folder).glob("[!.]*.tar") if is_folder else map(Path, glob.glob(str(folder)))
        self.paths = sorted((path for path in paths if path.suffix == ".tar"), key=str)
        if not self.paths:
            raise ValueError(f"{where}: there is no {'.tar in it' if is_folder else 'such folder or .tar'}")
        bar = tqdm(self.paths, desc=f"reading {folder}", disable=None, leave=False)
        rows, self.texts = zip(*(index_of(path, kind, self.suffixes) for path in bar))
        self.rows = np.concatenate(rows)  # (N, 6)
        self.starts = np.cumsum([0, *map(len, rows)])  # shard s has the samples starts[s] … starts[s + 1] - 1
        self.skipped, self.bad = [], {}
        self.last_order = None  # ((seed, epoch), order)
        for path, text in zip(self.paths, self.texts):
            for name, reason in json.loads(text)["skipped"]:
                self.skipped.append((f"{path}: {name}" if name else str(path), reason))
        if not len(self.rows):
            reasons = "".join(f"\n  {name}: {reason}" for name, reason in self.skipped[:5])
            raise ValueError(f"{where}: no usable sample, a picture or clip and its .txt{reasons}")
        if frames and (self.rows[:, 4] >= len(ANIMATIONS)).any() and not shutil.which("ffmpeg"):
            raise ValueError(f"{where}: to read films install the program ffmpeg (apt-get install ffmpeg)")

    def __len__(self):
        return len(self.rows)

    def shard_of(self, i):
        return int(np.searchsorted(self.starts, i, side="right")) - 1

    def bytes_at(self, i, column):
        """The bytes whose offset and size are in these columns of row i. Processes share no open file."""
        with open(self.paths[self.shard_of(i)], "rb") as file:
            file.seek(self.rows[i, column])
            return file.read(self.rows[i, column + 1])

    def caption(self, i):
        return caption_of(self.bytes_at(i, 2), self.rows[i, 5])

    def picture(self, i):
        """(S, S, 3) uint8, or (F, S, S, 3) for a clip. ValueError if it cannot be used."""
        raw = self.bytes_at(i, 0)
        if not self.frames:
            return open_picture(io.BytesIO(raw), self.size)
        with tempfile.NamedTemporaryFile(suffix=self.suffixes[self.rows[i, 4]]) as file:  # ffmpeg seeks in it
            file.write(raw)
            file.flush()
            return open_clip(file.name, self.size, self.frames, self.fps)[0]

    def read_one(self, i):
        """Picture and caption of sample i or, if it is damaged, of the next sound one."""
        for j in itertools.chain([i], range(i + 1, len(self)), range(i)):
            try:
                if j not in self.bad:
                    return self.picture(j), self.caption(j)
            except ValueError as reason:
                shard = self.shard_of(j)
                key = json.loads(self.texts[shard])["keys"][j - self.starts[shard]]
                self.bad[j] = f"{self.paths[shard]}: {key}: {reason}"
        raise ValueError(f"{self.paths[0].parent}: none of {len(self)} samples can be read ({self.bad[i]})")

    def read(self, indices):
        """Pictures (B, 3, S, S) or clips (B, F, 3, S, S), uint8; B captions. ValueError if none is sound."""
        pictures, captions = zip(*(self.read_one(int(i)) for i in indices))
        return torch.from_numpy(np.stack(pictures)).movedim(-1, -3), list(captions)

    def order(self, seed, epoch):
        """Each sample once, (N,) int64: shards shuffled, and the samples of every WINDOW of them shuffled."""
        if self.last_order is None or self.last_order[0] != (seed, epoch):
            generator, parts = torch.Generator().manual_seed(seed * 100_003 + epoch), []
            for window in torch.randperm(len(self.paths), generator=generator).split(WINDOW):
                part = torch.cat([torch.arange(self.starts[s], self.starts[s + 1]) for s in window])
                parts.append(part[torch.randperm(len(part), generator=generator)])
            self.last_order = (seed, epoch), torch.cat(parts)
        return self.last_order[1]

    def indices_of(self, step, batch_size, seed, rank=0, world=1):
        """This rank's part, (batch_size / world,), of batch `step` in an endless sequence of epochs. The
        batch is the same for any number of ranks. ValueError if they cannot share it evenly."""
        if batch_size % world:
            raise ValueError(f"--batch-size {batch_size}: {world} processes cannot share it evenly")
        count = batch_size // world
        positions = torch.arange(count) + step * batch_size + rank * count
        epochs, offsets = positions // len(self), positions % len(self)
        return torch.cat([self.order(seed, e)[offsets[epochs == e]] for e in epochs.unique().tolist()])


def read_step(dataset, indices, step):
    """Pictures and captions of a step, and {index: reason} of the samples newly found damaged."""
    bad = getattr(dataset, "bad", {})
    known = len(bad)
    pictures, captions = dataset.read(indices(step))
    return pictures, captions, dict(itertools.islice(bad.items(), known, None))


def ignore_signals(worker):
    """Ctrl-C and a cluster's SIGTERM reach every process of a job; the training decides how to end."""
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)


def batches(dataset, steps, indices, workers=0):
    """Yields what `read_step` returns for each of the steps, a range. dataset: anything with read(indices).
    indices: a function from a step to the indices to read. workers: processes that read ahead, two steps
    each; 0 reads in this process. The batches do not depend on it."""
    yield from torch.utils.data.DataLoader(
        steps, batch_size=None, collate_fn=partial(read_step, dataset, indices), num_workers=workers,
        worker_init_fn=ignore_signals, generator=torch.Generator(),  # not PyTorch's own, which training uses
    )


def write_shards(folder, pictures, captions, per_shard=1000):
    """Packs picture files, unchanged, and their captions into folder/00000.tar, … Keys are numbers, for names
    may have dots, or differ in the extension alone. ValueError if the folder has tars already."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    if any(folder.glob("[!.]*.tar")):
        raise ValueError(f"{folder}: has .tar files already")
    for first in tqdm(range(0, len(pictures), per_shard), desc="packing", disable=None, leave=False):
        with written_whole(folder / f"{first // per_shard:05d}.tar") as part, tarfile.open(part, "w") as tar:
            for i in range(first, min(first + per_shard, len(pictures))):
                files = {pictures[i].suffix.lower(): pictures[i].read_bytes(), ".txt": captions[i].encode()}
                for suffix, raw in files.items():
                    member = tarfile.TarInfo(f"{i:08d}{suffix}")
                    member.size = len(raw)
                    tar.addfile(member, io.BytesIO(raw))


@dataclass
class Flags:
    per_shard: int = flag(1000, "samples in each tar", low=1)


def main(arguments):
    about = "Packs a folder of pictures with captions into tar files."
    flags, _, words = read(Flags, arguments, "python -m data.tar_shards", about, words="FOLDER OUT")
    if len(words) != 2:
        raise ValueError("give two folders: python -m data.tar_shards FOLDER OUT")
    folder, out = map(Path, words)
    if not folder.is_dir():
        raise ValueError(f"{folder}: there is no such folder")

    def checked(path):
        if path.suffix.lower() not in PICTURES:
            raise ValueError(f"not one of {', '.join(PICTURES)}")
        open_picture(path, 64)
        return path

    files = (path for path in sorted(folder.rglob("*")) if path.suffix.lower() in PICTURES)
    captions, pictures, skipped = read_folder(folder, files, checked, "folder", "picture (png, jpg, webp)")
    write_shards(out, pictures, captions, flags.per_shard)
    print(f"{len(pictures)} pictures with captions → {out}")
    print_left_out(skipped, len(pictures))


if __name__ == "__main__":
    run_command(main)
