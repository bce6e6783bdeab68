"""Training data in tar files, by the WebDataset convention: for data that does not fit in memory.

    python -m data.tar_shards FOLDER_OF_PICTURES OUT --per-shard 1000      packs a folder, as data.py reads it, into tar files

A sample is the files of one key, a name up to its first dot: 00012.jpg with 00012.txt, or with a 00012.json that has a
"caption". Each tar is scanned once, header by header, past the pictures; where its samples lie is kept in an index beside
it. Any sample is then one seek away, and nothing is ever unpacked to disk.

Disks and networks like few files read at a time. So an epoch takes WINDOW shards after WINDOW shards, in an order shuffled
anew, and shuffles the samples within each window. The batch of a step depends on (seed, step) alone: ranks share it,
workers only read ahead, and a run resumed in the middle of an epoch goes on at the very next sample.
"""
import argparse
import glob
import io
import itertools
import json
import os
import shutil
import signal
import sys
import tarfile
import tempfile
import uuid
from collections import Counter
from pathlib import Path, PurePosixPath

import numpy as np
import torch
from tqdm import tqdm

from data import clips
from data import folder as data

WINDOW = 8  # shards whose samples are shuffled among each other
LAYOUT = 1  # of the index; one with another number is made again


def read_caption(file, offset, size, is_json):
    """The caption at a place in an open tar, a string. ValueError if it is empty or not UTF-8."""
    file.seek(offset)
    try:
        text = file.read(size).decode()
        text = json.loads(text)["caption"].encode().decode() if is_json else text  # JSON can escape half a character
    except UnicodeError:
        raise ValueError("the caption is not UTF-8") from None
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        raise ValueError('the .json is not {"caption": "…"}') from None
    if not (text := " ".join(text.split())):
        raise ValueError("the caption is empty")
    return text


def refusal(member):
    """Why a member of a tar is not used, or "". Nothing is unpacked, so it could do no harm; but it was not made for us."""
    if not member.isreg() or member.issparse() or member.size < 0:
        return "not a plain file (a link, a device, …)"
    name = PurePosixPath(member.name)
    if name.is_absolute() or ".." in name.parts or any(c < " " for c in member.name):
        return "a name that is absolute, or has .. or control characters in it"
    return ""


def members_of(path, suffixes):
    """The headers of a tar → {key: {"picture", ".txt", ".json": (offset, size, suffix)}}, and what cannot be used, a list
    of (name, reason), the name "" for the tar itself. If that is cut short or damaged, what comes before is used."""
    found, unknown, skipped, end, what = {}, Counter(), [], -1, "not a tar file, or a compressed one"
    with open(path, "rb") as file:
        length = os.fstat(file.fileno()).st_size
        try:
            tar = tarfile.open(fileobj=file, mode="r:", encoding="utf-8", errors="backslashreplace")
            what = "cut short or damaged, and used up to there"
            while (member := tar.next()) is not None:
                if member.offset_data + member.size > length or tar.offset <= end:  # a negative size would go in circles
                    raise tarfile.ReadError(f"{member.name} reaches past the end")
                end = tar.offset
                name = PurePosixPath(member.name)  # loses a ./ at the start
                stem, _, suffix = name.name.partition(".")
                suffix = f".{suffix.lower()}"
                part = "picture" if suffix in suffixes else suffix
                if member.isdir():
                    continue
                if reason := refusal(member):
                    skipped.append((member.name, reason))
                elif not stem or part not in ("picture", ".txt", ".json"):
                    unknown[suffix] += 1
                elif part in (parts := found.setdefault(str(name.parent / stem), {})):
                    skipped.append((member.name, "its key has such a file already, which is used"))
                else:
                    parts[part] = (member.offset_data, member.size, suffix)
            file.seek(tar.offset)
            if file.read(tarfile.BLOCKSIZE) != bytes(tarfile.BLOCKSIZE):  # tarfile takes what is no header for the end
                raise tarfile.ReadError(f"no header at byte {tar.offset}")
            if end < 0:
                skipped.append(("", "an empty tar"))
        except Exception as error:  # tarfile raises ReadError and, on damaged headers, ValueError, MemoryError, …
            skipped.append(("", f"{what} ({error})"))
    return found, skipped + [(f"*{suffix}", f"{count} of an unknown extension") for suffix, count in unknown.items()]


def scan(path, suffixes):
    """A tar → rows (n, 6) int64, of each sample the offset and size of the picture, the offset and size of the caption,
    which suffix, whether the caption is JSON; the n keys; and what cannot be used, as above."""
    found, skipped = members_of(path, suffixes)
    rows, keys = [], []
    with open(path, "rb") as file:
        for key, parts in found.items():
            try:
                if "picture" not in parts:
                    raise ValueError(f"no picture or clip ({', '.join(suffixes)})")
                caption = parts.get(".txt") or parts.get(".json")
                if not caption:
                    raise ValueError("no caption: neither .txt nor .json")
                offset, size, suffix = parts["picture"]
                row = offset, size, *caption[:2], suffixes.index(suffix), caption[2] == ".json"
                read_caption(file, *row[2:4], row[5])
                rows.append(row)
                keys.append(key)
            except ValueError as reason:
                skipped.append((key, str(reason)))
    return np.array(rows, np.int64).reshape(-1, 6), keys, skipped


def index_of(path, kind, suffixes):
    """scan(path) from the file NAME.tar.KIND.index, if that is whole and the tar has the size and time it had then; else
    anew. Processes that start at once may all write it: each puts a whole one in its place. Where none can be written, the
    next start scans again. Returns rows (n, 6), and the JSON of keys and skipped (which is smaller than they are)."""
    stat, index = path.stat(), Path(f"{path}.{kind}.index")
    stamp = np.array([LAYOUT, stat.st_size, stat.st_mtime_ns])
    try:
        with np.load(index, allow_pickle=False) as saved:  # a zip, with checksums
            if np.array_equal(saved["stamp"], stamp):
                return saved["rows"], saved["text"].tobytes()
    except Exception:  # missing, or damaged in any way
        pass
    rows, keys, skipped = scan(path, suffixes)
    text = json.dumps(dict(keys=keys, skipped=skipped)).encode()
    temporary = Path(f"{index}.{uuid.uuid4().hex}.tmp")
    try:
        with open(temporary, "wb") as file:
            np.savez(file, stamp=stamp, rows=rows, text=np.frombuffer(text, np.uint8))
        os.replace(temporary, index)
    except OSError:
        temporary.unlink(missing_ok=True)
    return rows, text


class TarShards:
    """The samples of all .tar files in a folder, or of those that a pattern like data/0*.tar names. With frames: clips, of F
    frames at fps a second. What the indexes leave out is listed in `skipped` as ("SHARD: name", reason). A picture is only
    opened when it is read; if it turns out damaged, the next sample is read in its place, so that a batch is always full
    and all ranks stay in step, and `damaged` names it. ValueError if there is no tar, or nothing usable in any."""

    group = 1

    def __init__(self, folder, size=64, frames=0, fps=4):
        self.size, self.frames, self.fps = size, frames, fps
        where, kind = (f"--clips {folder}", "clips") if frames else (f"--data {folder}", "pictures")
        self.suffixes = clips.ANIMATIONS + clips.FILMS if frames else data.PICTURES
        is_folder = Path(folder).is_dir()
        paths = glob.glob(os.path.join(glob.escape(str(folder)), "*.tar") if is_folder else str(folder))
        self.paths = [Path(path) for path in sorted(paths) if path.endswith(".tar")]
        if not self.paths:
            raise ValueError(f"{where}: " + ("there is no .tar in it" if is_folder else "there is no such folder or .tar"))
        bar = tqdm(self.paths, desc=f"reading {folder}", disable=None, leave=False)
        rows, self.texts = zip(*(index_of(path, kind, self.suffixes) for path in bar))
        self.rows = np.concatenate(rows)  # (N, 6)
        self.starts = np.cumsum([0, *map(len, rows)])  # shard s has the samples starts[s] … starts[s + 1] - 1
        lists = ((path, json.loads(text)["skipped"]) for path, text in zip(self.paths, self.texts))
        self.skipped = [(f"{path}: {name}" if name else f"{path}", reason) for path, some in lists for name, reason in some]
        self.bad = {}  # index → reason, of the samples that were tried in vain
        self.kept = None  # the last order asked for
        if not len(self.rows):
            reasons = "".join(f"\n  {name}: {reason}" for name, reason in self.skipped[:5])
            raise ValueError(f"{where}: no usable sample, {self.suffixes[0]} or the like with a .txt of the same key{reasons}")
        if frames and (self.rows[:, 4] >= len(clips.ANIMATIONS)).any() and not shutil.which("ffmpeg"):
            raise ValueError(f"{where}: to read films install the program ffmpeg (on Debian: apt-get install ffmpeg)")

    def __len__(self):
        return len(self.rows)

    def shard_of(self, i):
        return int(np.searchsorted(self.starts, i, side="right")) - 1

    def open(self, i):
        """The tar of sample i. Opened for each sample, which takes little beside decoding a picture: so processes share no
        place in a file, and a thousand shards need no thousand open files."""
        return open(self.paths[self.shard_of(i)], "rb")

    def caption(self, i):
        with self.open(i) as file:
            return read_caption(file, *self.rows[i, 2:4].tolist(), self.rows[i, 5])

    def picture(self, i):
        """(S, S, 3), or of a clip (F, S, S, 3), uint8. ValueError if it cannot be used."""
        with self.open(i) as file:
            file.seek(self.rows[i, 0])
            raw = file.read(self.rows[i, 1])
        if not self.frames:
            return data.open_picture(io.BytesIO(raw), self.size)
        with tempfile.NamedTemporaryFile(suffix=self.suffixes[self.rows[i, 4]]) as file:  # ffmpeg goes to and fro in it
            file.write(raw)
            file.flush()
            return clips.open_clip(file.name, self.size, self.frames, self.fps)[0]

    def read(self, indices):
        """pictures (B, 3, S, S), or clips (B, F, 3, S, S), uint8, and their B captions. ValueError if none at all can be
        read."""
        found = []
        for i in map(int, indices):
            for j in itertools.chain([i], range(i + 1, len(self)), range(i)):
                try:
                    if j not in self.bad:
                        found.append((self.picture(j), self.caption(j)))
                        break
                except ValueError as reason:
                    self.bad[j] = str(reason)
            else:
                raise ValueError(f"{self.paths[0].parent}: none of {len(self)} samples can be read ({self.bad[i]})")
        pictures, captions = zip(*found)
        return torch.from_numpy(np.stack(pictures)).movedim(-1, -3), list(captions)

    @property
    def damaged(self):
        """{shard: {key: reason}} of the samples found damaged so far."""
        found = {}
        for shard, indices in itertools.groupby(sorted(self.bad), self.shard_of):
            keys = json.loads(self.texts[shard])["keys"]
            found[str(self.paths[shard])] = {keys[i - self.starts[shard]]: self.bad[i] for i in indices}
        return found

    def report(self):
        """A line for the log for each shard that has damaged samples."""
        return [
            f"{shard}: {len(bad)} damaged, the next ones are read instead: "
            + "; ".join(f"{key}: {reason}" for key, reason in list(bad.items())[:3]) + "; …" * (len(bad) > 3)
            for shard, bad in self.damaged.items()
        ]  # fmt: skip

    def order(self, seed, epoch):
        """Each sample once, (N,) int64: the shards shuffled, and the samples of every WINDOW of them."""
        if self.kept is None or self.kept[0] != (seed, epoch):
            generator, parts = torch.Generator().manual_seed(seed * 100_003 + epoch), []
            for window in torch.randperm(len(self.paths), generator=generator).split(WINDOW):
                part = torch.cat([torch.arange(self.starts[s], self.starts[s + 1]) for s in window])
                parts.append(part[torch.randperm(len(part), generator=generator)])
            self.kept = (seed, epoch), torch.cat(parts)
        return self.kept[1]

    def indices_of(self, step, batch_size, seed, rank=0, world=1):
        """Rank's part, (batch_size / world,), of batch `step` in the endless row of epochs. The batch is the same for any
        number of ranks. ValueError if they cannot share it evenly."""
        if batch_size % world:
            raise ValueError(f"--batch-size {batch_size}: {world} processes cannot share it evenly")
        left, found = batch_size // world, []
        position = step * batch_size + rank * left
        while left:
            epoch, place = divmod(position, len(self))
            found.append(self.order(seed, epoch)[place : place + left])
            position, left = position + len(found[-1]), left - len(found[-1])
        return torch.cat(found)


class Steps:
    """What each step reads, for a DataLoader."""

    def __init__(self, dataset, indices):
        self.dataset, self.indices = dataset, indices

    def __getitem__(self, step):
        bad = getattr(self.dataset, "bad", {})
        known = len(bad)
        pictures, captions = self.dataset.read(self.indices(step))
        return pictures, captions, dict(itertools.islice(bad.items(), known, None))  # the last ones that went in


def undisturbed(worker):
    """Ctrl-C and a cluster's SIGTERM reach all processes of a job: how to end is the training's to say, not its readers'."""
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)


def batches(dataset, steps, indices, workers=0):
    """Yields, for each of the steps in order, (pictures, captions, {index: reason} of what was found damaged, which the data
    set then knows too). dataset: anything with read(indices). indices: step → the indices to read, for instance
    functools.partial(shards.indices_of, batch_size=…, seed=…, rank=…, world=…). So many worker processes read ahead, two
    steps each, or none: the result is the same."""
    own = torch.Generator()  # else the loader would draw from PyTorch's, and change what a training draws next
    for pictures, captions, bad in torch.utils.data.DataLoader(
        Steps(dataset, indices), batch_size=None, sampler=steps, num_workers=workers, generator=own,
        worker_init_fn=undisturbed,
    ):
        if bad:
            dataset.bad.update(bad)
        yield pictures, captions, bad


def write_shards(folder, pictures, captions, per_shard=1000):
    """Packs files, as they are, with their captions into folder/00000.tar, … Their keys are numbers: names may have dots,
    or differ in the extension alone. A tar appears when it is whole. ValueError if the folder has some already."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    if any(folder.glob("*.tar")):
        raise ValueError(f"{folder}: has .tar files already")
    for number, first in enumerate(tqdm(range(0, len(pictures), per_shard), desc="packing", disable=None, leave=False)):
        path = folder / f"{number:05d}.tar"
        with tarfile.open(f"{path}.tmp", "w") as tar:
            for i in range(first, min(first + per_shard, len(pictures))):
                for suffix, raw in ((pictures[i].suffix.lower(), pictures[i].read_bytes()), (".txt", captions[i].encode())):
                    member = tarfile.TarInfo(f"{i:08d}{suffix}")
                    member.size = len(raw)
                    tar.addfile(member, io.BytesIO(raw))
        os.replace(f"{path}.tmp", path)


def main(arguments):
    parser = argparse.ArgumentParser(description="packs a folder of pictures with captions into tar files")
    parser.add_argument("folder", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--per-shard", type=int, default=1000)
    given = parser.parse_args(arguments)
    if given.per_shard < 1:
        raise ValueError(f"--per-shard {given.per_shard}: must be at least 1")
    if not given.folder.is_dir():
        raise ValueError(f"{given.folder}: there is no such folder")

    def check(path):
        if path.suffix.lower() not in data.PICTURES:
            raise ValueError(f"not one of {', '.join(data.PICTURES)}")
        data.open_picture(path, 64)
        return path

    files = (path for path in sorted(given.folder.rglob("*")) if path.suffix.lower() in data.PICTURES)
    captions, pictures, skipped = data.read_folder(given.folder, files, check, "folder", "picture (png, jpg, webp)")
    write_shards(given.out, pictures, captions, given.per_shard)
    print(f"{len(pictures)} pictures with captions → {given.out}, {len(skipped)} left out")
    for path, reason in skipped:
        print(f"  {path}: {reason}")


if __name__ == "__main__":
    try:
        main(sys.argv[1:])
    except (ValueError, OSError) as error:
        sys.exit(f"shards.py: {error}")
