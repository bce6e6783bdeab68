"""Training data in tar files, by the WebDataset convention: for data that does not fit in memory.

    python -m data.tar_shards FOLDER OUT [--per-shard 1000]      packs a folder of pictures with captions

A sample is the files that share a key, the name up to its first dot: 00012.jpg with 00012.txt, or with a
00012.json that has a "caption". Each tar (a shard) is scanned once; an index file beside it then says where
each sample lies, so that any sample is one seek away. Nothing is unpacked.

Disks are fast when few files are read at a time. So an epoch shuffles the shards, takes WINDOW at a time, and
shuffles the samples within each window. Letters: B batch, S picture size, N samples.
"""
import contextlib
import io
import itertools
import json
import os
import shutil
import signal
import sys
import tarfile
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

import numpy as np
import torch
from tqdm import tqdm

from common.files import print_left_out, written_whole
from common.flags import flag, read, run_command
from data.folder import (
    PICTURES, by_extension, files_below, is_data, is_text, natural, open_picture, printable, read_pictures,
    tidy,
)

WINDOW = 8  # shards whose samples are shuffled together
INDEX_VERSION = 3  # an index of another version is made again
UNKNOWN = "no kind of picture or caption"


def caption_of(raw, is_json):
    """The bytes of a .txt or .json file → its caption. ValueError if it is empty or not UTF-8."""
    try:
        text = raw.decode("utf-8-sig")
        caption = json.loads(text)["caption"] if is_json else text
    except UnicodeError:
        raise ValueError("the caption is not UTF-8") from None
    except (ValueError, KeyError, TypeError, RecursionError):
        raise ValueError('the .json is not {"caption": "…"}') from None
    return tidy(caption)


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


def members_of(file):
    """An open tar → {key: {"picture", ".txt" or ".json": (offset, size)}}, and what is left out: a list of
    (name, reason), with the name "" for the tar itself. A damaged tar is used up to the damage."""
    members, skipped = {}, []
    try:
        for member in headers(file):
            name = PurePosixPath(member.name)  # drops a leading ./
            stem, _, suffix = name.name.partition(".")
            suffix = f".{suffix.lower()}"
            part = "picture" if suffix in PICTURES else suffix
            if not member.isreg() or member.issparse() or member.size < 0:
                skipped.append((member.name, "not a plain file (a link, a device, …)"))
            elif name.is_absolute() or ".." in name.parts or any(c < " " for c in member.name):
                skipped.append((member.name, "its name is absolute, or has .. or control characters"))
            elif not all(map(is_data, name.parts)):
                continue
            elif part not in ("picture", ".txt", ".json"):
                skipped.append((member.name, UNKNOWN))
            else:
                parts = members.setdefault(str(name.parent / stem), {})
                if part in parts:
                    skipped.append((member.name, "its key has such a file already, which is used"))
                else:
                    parts[part] = (member.offset_data, member.size)
    except ValueError as reason:
        skipped.append(("", str(reason)))
    return members, skipped


def scan(path):
    """A tar → rows (n, 5) int64, n keys, and what is left out, as above. A row holds offset and size of the
    picture, offset and size of the caption, and whether the caption is JSON."""
    rows, keys = [], []
    with open(path, "rb") as file:
        members, skipped = members_of(file)
        for key, parts in members.items():
            try:
                if "picture" not in parts:
                    raise ValueError("no picture")
                if len(parts) == 1:
                    raise ValueError("no caption: neither .txt nor .json")
                is_json = ".txt" not in parts
                offset, size = parts[".json" if is_json else ".txt"]
                file.seek(offset)
                caption_of(file.read(size), is_json)
                rows.append((*parts["picture"], offset, size, is_json))
                keys.append(key)
            except ValueError as reason:
                skipped.append((key, str(reason)))
    return np.array(rows, np.int64).reshape(-1, 5), keys, skipped


def index_of(path):
    """scan(path), from the file NAME.tar.index if that is sound and the tar's size and time fit; else anew,
    writing the file if possible. Returns rows, and keys and skipped as one compact JSON."""
    stat, index = path.stat(), Path(f"{path}.index")
    stamp = np.array([INDEX_VERSION, len(PICTURES), stat.st_size, stat.st_mtime_ns])
    try:
        with np.load(index, allow_pickle=False) as saved:  # a zip, with checksums
            if np.array_equal(saved["stamp"], stamp):
                return saved["rows"], saved["text"].tobytes()
    except Exception:  # missing, or damaged in any way
        pass
    rows, keys, skipped = scan(path)
    text = json.dumps(dict(keys=keys, skipped=skipped)).encode()
    with contextlib.suppress(OSError), written_whole(index) as part, open(part, "wb") as file:
        np.savez(file, stamp=stamp, rows=rows, text=np.frombuffer(text, np.uint8))
    return rows, text


class TarShards:
    """The N samples of a folder's .tar files, of which there is one at least. ValueError if none is usable.

    `skipped` lists what is left out, as ("SHARD: name", reason). A sample found damaged when it is read is
    replaced by the next one, so that batches stay full; `bad` maps its index to the reason."""

    group = 1

    def __init__(self, folder, size=64):
        self.size = size
        self.paths = sorted(Path(folder).glob("[!.]*.tar"), key=natural)
        bar = tqdm(self.paths, desc=f"reading {folder}", disable=None, leave=False)
        rows, self.texts = zip(*map(index_of, bar))
        self.rows = np.concatenate(rows)  # (N, 5)
        self.starts = np.cumsum([0, *map(len, rows)])  # shard s has the samples starts[s] … starts[s + 1] - 1
        self.skipped, self.bad = self.left_out(Path(folder)), {}
        if not len(self.rows):
            reasons = "".join(f"\n  {name}: {reason}" for name, reason in self.skipped[:5])
            raise ValueError(f"--data {folder}: no usable sample, a picture and its .txt{reasons}")

    def left_out(self, folder):
        """A list of (path, reason) for what is not used, of the shards and beside them."""
        unknown, found = [], []
        for path, text in zip(self.paths, self.texts):
            for name, reason in json.loads(text)["skipped"]:
                if reason == UNKNOWN:
                    unknown.append(PurePosixPath(name))
                else:
                    found.append((printable(f"{path}: {name}" if name else path), reason))
        read = {*self.paths, *(Path(f"{path}.index") for path in self.paths)}
        beside = [path for path in files_below(folder)[0] if path not in read and not is_text(path)]
        beside = by_extension(folder, beside, "beside the .tar files of this folder, and not read")
        return by_extension(folder, unknown, UNKNOWN) + beside + found

    def __len__(self):
        return len(self.rows)

    def order(self, seed, epoch):
        """Each sample once, (N,) int64: shards shuffled, and the samples of every WINDOW of them shuffled."""
        generator = torch.Generator().manual_seed(seed * 100_003 + epoch)
        parts = []
        for window in torch.randperm(len(self.paths), generator=generator).split(WINDOW):
            part = torch.cat([torch.arange(self.starts[s], self.starts[s + 1]) for s in window])
            parts.append(part[torch.randperm(len(part), generator=generator)])
        return torch.cat(parts)

    def shard_of(self, i):
        return int(np.searchsorted(self.starts, i, side="right")) - 1

    def bytes_at(self, i, column):
        """The bytes whose offset and size are in these columns of row i. Processes share no open file."""
        with open(self.paths[self.shard_of(i)], "rb") as file:
            file.seek(self.rows[i, column])
            return file.read(self.rows[i, column + 1])

    def caption(self, i):
        return caption_of(self.bytes_at(i, 2), self.rows[i, 4])

    def read_one(self, i):
        """Picture (S, S, 3) uint8 and caption of sample i or, if it is damaged, of the next sound one."""
        for j in itertools.chain([i], range(i + 1, len(self)), range(i)):
            try:
                if j not in self.bad:
                    return open_picture(io.BytesIO(self.bytes_at(j, 0)), self.size), self.caption(j)
            except ValueError as reason:
                shard = self.shard_of(j)
                key = json.loads(self.texts[shard])["keys"][j - self.starts[shard]]
                self.bad[j] = f"{self.paths[shard]}: {key}: {reason}"
        raise ValueError(f"{self.paths[0].parent}: none of {len(self)} samples can be read ({self.bad[i]})")

    def __getitem__(self, indices):
        """A list of B indices, pictures (B, 3, S, S) uint8, B captions, and {index: reason} of the samples
        newly found damaged. ValueError if no sample is sound."""
        known = set(self.bad)
        pictures, captions = zip(*map(self.read_one, indices))
        pictures = torch.from_numpy(np.stack(pictures)).permute(0, 3, 1, 2)  # (B, 3, S, S)
        return indices, pictures, list(captions), {i: self.bad[i] for i in self.bad if i not in known}


def ignore_signals(worker):
    """Ctrl-C and a cluster's SIGTERM reach every process of a job; the training decides how to end."""
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)


def read_ahead(dataset, batches, workers):
    """Yields dataset[indices] for each list of indices that `batches` yields. workers: processes that read
    ahead, two batches each; 0 reads in this process."""
    yield from torch.utils.data.DataLoader(
        dataset, sampler=batches, batch_size=None, num_workers=workers, worker_init_fn=ignore_signals,
        generator=torch.Generator(),  # not PyTorch's own, which training uses
    )


def write_shards(folder, pictures, captions, per_shard=1000):
    """Packs picture files, unchanged, and their captions into folder/00000.tar, … Keys are numbers, for names
    may have dots, or differ in the extension alone. The tars get their names when all are written: there are
    none if anything fails. ValueError if the folder has tars already."""
    folder.mkdir(parents=True, exist_ok=True)
    if any(folder.glob("[!.]*.tar")):
        raise ValueError(f"{folder}: has .tar files already")
    parts = folder / ".packing"
    shutil.rmtree(parts, ignore_errors=True)  # of a process that was killed
    parts.mkdir()
    try:
        for first in tqdm(range(0, len(pictures), per_shard), desc="packing", disable=None, leave=False):
            with tarfile.open(parts / f"{first // per_shard:05d}.tar", "w") as tar:
                for i in range(first, min(first + per_shard, len(pictures))):
                    picture, caption = pictures[i].read_bytes(), captions[i].encode()
                    for suffix, raw in ((pictures[i].suffix.lower(), picture), (".txt", caption)):
                        member = tarfile.TarInfo(f"{i:08d}{suffix}")
                        member.size = len(raw)
                        tar.addfile(member, io.BytesIO(raw))
        for tar in parts.iterdir():
            tar.rename(folder / tar.name)
    finally:
        shutil.rmtree(parts)


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
            raise ValueError(f"its extension {path.suffix!r} is of no kind of picture")
        open_picture(path, 64)
        return path

    try:
        variants, pictures, skipped = read_pictures(folder, checked, "folder")
        write_shards(out, pictures, [captions[0] for captions in variants], flags.per_shard)
    except KeyboardInterrupt:
        print(f"\nstopped: nothing is packed in {out}")
        sys.exit(130)
    print(f"{len(pictures)} pictures with captions → {out}")
    print_left_out(skipped, len(pictures))


if __name__ == "__main__":
    run_command(main)
