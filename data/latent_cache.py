"""A cache of encoded training data: latents, and what published text encoders make of the captions.

    python -m data.latent_cache --data DIR --autoencoder DIR --image-size 256 --out CACHE [--text --t5 DIR]

The autoencoder and published text encoders are frozen, so what they give is computed once. A cache is a
folder of shards of n samples, whose arrays are memory-mapped:

    00000.moments.npy      (n, flips, 2, C, h, w) fp16: raw mean and log-variance of picture and mirror image
    00000.t5.npy           (sum of L, E) bf16, viewed as int16: the vectors of all tokens, without padding
    00000.t5.offsets.npy   (n + 1,) int64: caption i has the rows from offsets[i] to offsets[i + 1]
    00000.captions.jsonl   file and caption of each sample, or why it was left out, and the file's size and
                           time, so that a changed picture is encoded again; written last of a shard
    cache.json             counts, shapes, flags and fingerprints; written last of all

In fp16 a latent is off by at most |raw| / 2048 / scale. At 256×256 a sample takes 32 KiB with both flips, and
8 KiB per token of T5-XXL. Letters: B batch, C latent channels, S picture size, L text tokens, E their width.
"""
import functools
import hashlib
import json
import math
import os
from collections import defaultdict
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

from common.figures import from_bytes
from common.files import print_left_out, remove_parts, run_name, written_whole
from common.flags import SEEDS, flag, read, run_command
from common.hardware import device_of
from data.folder import Folder, open_picture, printable, read_pictures
from data.shapes import Shapes, draw
from encoders import autoencoders
from encoders.padding import padded
from encoders.text import LOADERS
from encoders.weights import json_object


@dataclass
class Flags:
    data: str = flag("shapes", "a folder of pictures with captions, or shapes")
    autoencoder: str = flag("", "its run, or a published folder (default: runs/autoencoder-DATA)")
    image_size: int = flag(256, "pixels, each way, a multiple of 16", low=16)
    out: str = flag("", "the cache's folder")
    mirror: str = flag("auto", "encode mirror images too (auto: unless of shapes, which say left and right)",
                       choices=("auto", "true", "false"))
    text: bool = flag(False, "keep what the encoders below make of the captions")
    clip: str = flag("", "the folder of a published CLIP")
    t5: str = flag("", "the folder of a published T5 1.1 or Flan-T5")
    per_shard: int = flag(4096, "samples in each shard", low=1)
    batch_size: int = flag(32, "samples encoded at a time", low=1)
    seed: int = flag(0, "of shapes", low=0, high=SEEDS)
    device: str = flag("auto", "where to encode: auto, cpu, cuda, …")


def fingerprint(module, tokenizer=None):
    """A hash, as text, of a module's config, names and weights, and of a tokenizer's vocabulary."""
    digest = hashlib.blake2b(json.dumps(vars(module.config), sort_keys=True).encode(), digest_size=16)
    for name, tensor in sorted(module.state_dict().items()):
        digest.update(f"{name} {tensor.dtype} {list(tensor.shape)}".encode())
        digest.update(tensor.cpu().contiguous().reshape(-1).view(torch.uint8).numpy())
    ranks = getattr(tokenizer, "ranks", None)
    if ranks:  # CLIP's
        digest.update(json.dumps([tokenizer.vocabulary, list(ranks)], sort_keys=True).encode())
    elif tokenizer:  # a sentencepiece model
        digest.update(tokenizer.model)
    return digest.hexdigest()


def samples_of(data, size, seed):
    """What --data names, no picture opened yet: N names, their captions, a function from a name to a picture
    (S, S, 3) uint8 (ValueError if it cannot be used), what lacks a caption, and the data set's group."""
    if data == "shapes":
        dataset = Shapes(size, seed=seed)
        names = list(range(len(dataset)))
        return names, dataset.captions, lambda i: draw(dataset.scenes[i], size), [], dataset.group
    folder = Path(data)
    variants, paths, skipped = read_pictures(folder, Path)
    captions = [several[0] for several in variants]  # of several, a cache keeps the first
    names = [os.path.relpath(path, folder) for path in paths]
    return names, captions, lambda name: open_picture(folder / name, size), skipped, Folder.group


def stamps_of(data, names):
    """For each name: the size and time of the picture's file, by which a change is seen. None for shapes, and
    for a file that is missing."""
    if data == "shapes":
        return [None] * len(names)
    paths = [Path(data, name) for name in names]
    stats = [path.stat() if path.exists() else None for path in paths]
    return [stat and [stat.st_size, stat.st_mtime_ns] for stat in stats]


def hash_of(value):
    return hashlib.blake2b(json.dumps(value).encode(), digest_size=16).hexdigest()


def put(path, content):
    """Writes an array as .npy, or a text."""
    with written_whole(path) as part, open(part, "wb") as file:
        if isinstance(content, np.ndarray):
            np.save(file, content)
        else:
            file.write(content.encode())


def read_lines(stem, settings):
    """A shard's captions, what it left out as (name, reason), and the stamps of its files. ValueError, naming
    the file, if cut."""
    path = Path(f"{stem}.captions.jsonl")
    try:
        lines = [json.loads(text) for text in path.read_bytes().splitlines()]
    except (OSError, ValueError):
        lines = []
    if len(lines) != min(settings["per_shard"], settings["files"] - int(stem.name) * settings["per_shard"]):
        raise ValueError(f"{path} is missing or was cut short: encode again to mend it")
    skipped = [(printable(line["file"]), printable(line["skipped"])) for line in lines if "skipped" in line]
    captions = [line["caption"] for line in lines if "caption" in line]
    return captions, skipped, [line.get("stamp") for line in lines]


def open_array(path, *shape):
    """The memory-mapped array of a .npy file. ValueError, naming the file, if cut or of another shape."""
    try:
        return np.load(path, mmap_mode="r").reshape(shape)
    except (OSError, ValueError, EOFError):
        raise ValueError(f"{path} is missing or was cut short: encode again to mend it") from None


def open_shard(stem, count, settings):
    """Of `count` samples: {"moments": array, name of an encoder: (vectors, offsets)}. ValueError as above."""
    if not count:
        return {}  # nothing in it could be used
    shape = (count, 1 + settings["mirror"], 2, *settings["shape"])
    shard = dict(moments=open_array(f"{stem}.moments.npy", *shape))
    for name, encoder in settings["text"].items():
        offsets = np.array(open_array(f"{stem}.{name}.offsets.npy", count + 1))
        shard[name] = open_array(f"{stem}.{name}.npy", offsets[-1], encoder["width"]), offsets
    return shard


def moments_of(autoencoder, pictures, mirror):
    """Pictures (B, S, S, 3) uint8 → their means and log-variances and, with `mirror`, their mirror images':
    (B, flips, 2, C, h, w) fp16. ValueError if fp16 cannot hold them."""
    x = torch.from_numpy(pictures).permute(0, 3, 1, 2).to(autoencoder.shift.device)  # (B, 3, S, S)
    x = torch.stack([x, x.flip(-1)] if mirror else [x], dim=1)  # (B, flips, 3, S, S)
    moments = torch.stack(autoencoder.moments(from_bytes(x.flatten(0, 1))), dim=1)  # (B · flips, 2, C, h, w)
    moments = moments.half().unflatten(0, x.shape[:2])  # (B, flips, 2, C, h, w)
    if not moments.isfinite().all():
        raise ValueError("the autoencoder gives latents that are not numbers, or too large for fp16")
    return moments.cpu().numpy()


@torch.no_grad()
def write_shard(stem, samples, open_sample, autoencoder, encoders, mirror, batch_size, bar):
    """Encodes samples, a list of (name, caption, stamp), and writes their files. encoders: {name: (tokenizer,
    encoder)}. open_sample: from a name to a picture; where it raises ValueError, the reason is written."""

    def attempt(sample):
        name, caption, stamp = sample
        try:
            return dict(file=name, caption=caption, stamp=stamp), open_sample(name)
        except ValueError as reason:
            return dict(file=name, skipped=str(reason), stamp=stamp), None

    entries, arrays, device = [], defaultdict(list), autoencoder.shift.device
    with ThreadPoolExecutor() as pool:
        for i in range(0, len(samples), batch_size):
            opened = list(pool.map(attempt, samples[i : i + batch_size]))
            entries += [entry for entry, _ in opened]
            kept = [(entry["caption"], picture) for entry, picture in opened if picture is not None]
            if kept:
                texts, pictures = zip(*kept)
                arrays["moments"].append(moments_of(autoencoder, np.stack(pictures), mirror))
                for name, (tokenizer, encoder) in encoders.items():
                    tokens, mask = (a.to(device) for a in tokenizer(texts))  # (B, L)
                    vectors = encoder(tokens, mask)[mask].bfloat16()  # (sum of L, E)
                    arrays[name].append(vectors.view(torch.int16).cpu().numpy())
                    arrays[f"{name}.offsets"].append(mask.sum(1).cpu().numpy())  # lengths, summed below
            bar.update(len(opened))
    for name, parts in arrays.items():
        array = np.concatenate(parts)
        if name.endswith(".offsets"):
            array = np.cumsum([0, *array], dtype=np.int64)
        put(f"{stem}.{name}.npy", array)
    put(f"{stem}.captions.jsonl", "".join(json.dumps(entry) + "\n" for entry in entries))


def check_folder(folder, settings):
    """ValueError unless the folder is new, empty, or holds the cache of these settings, or a part of it."""
    path = folder / "cache.json"
    if not path.exists():
        if folder.exists() and any(folder.iterdir()):
            raise ValueError(f"--out {folder}: is neither empty nor a cache")
        return
    old = json_object(path)
    other = " or ".join(name.replace("_", " ") for name in settings if old.get(name) != settings[name])
    if other:
        raise ValueError(f"--out {folder} holds a cache with another {other}: give its flags or a new --out")


def encode(flags):
    """Writes the cache that the flags ask for, or what it lacks. ValueError if the flags do not fit together,
    or a folder is not what it should be."""
    folder, device, size = Path(flags.out), device_of(flags.device), flags.image_size
    default = f"runs/autoencoder-{run_name(flags.data)}"
    autoencoder = autoencoders.load(flags.autoencoder or default).to(device)
    multiple = math.lcm(16, autoencoder.factor)
    if size < 1 or size % multiple:
        raise ValueError(f"--image-size {size}: must be a multiple of {multiple}")
    names, captions, open_sample, skipped, group = samples_of(flags.data, size, flags.seed)
    folders = {name: getattr(flags, name) for name in LOADERS if getattr(flags, name)}
    encoders = {name: LOADERS[name](path, torch.bfloat16, device) for name, path in folders.items()}
    text = {}
    for name, (tokenizer, encoder) in encoders.items():
        text[name] = dict(width=encoder.config.width, fingerprint=fingerprint(encoder, tokenizer))
    mirror = flags.mirror == "true" or (flags.mirror == "auto" and flags.data != "shapes")
    side = size // autoencoder.factor
    settings = dict(
        data=hash_of([names, captions]), files=len(names), image_size=size, mirror=mirror, group=group,
        text=text, per_shard=flags.per_shard, autoencoder=fingerprint(autoencoder),
        scale=autoencoder.scale.item(), shift=autoencoder.shift.tolist(),
        shape=[autoencoder.config.channels, side, side],
    )
    check_folder(folder, settings)
    latents = len(names) * (1 + mirror) * 2 * math.prod(settings["shape"]) * 2  # in bytes
    print(f"{folder}: {len(names)} pictures, whose latents take {latents / 2**30:.3f} GiB")
    folder.mkdir(parents=True, exist_ok=True)
    remove_parts(folder)  # of processes that were killed
    put(folder / "cache.json", json.dumps(settings))  # without counts it is not finished
    counts, stamps = [], stamps_of(flags.data, names)
    samples = list(zip(names, captions, stamps))
    with tqdm(total=len(names), desc="encoding", unit="picture", disable=None) as bar:
        for k, first in enumerate(range(0, len(names), flags.per_shard)):
            stem, part = folder / f"{k:05d}", slice(first, first + flags.per_shard)
            try:
                kept, _, encoded = read_lines(stem, settings)
                open_shard(stem, len(kept), settings)
                if encoded != stamps[part]:
                    raise ValueError(f"{stem}: a picture was changed since")
                bar.update(len(samples[part]))
            except ValueError:
                batch_size = flags.batch_size
                write_shard(stem, samples[part], open_sample, autoencoder, encoders, mirror, batch_size, bar)
            kept, left_out, _ = read_lines(stem, settings)
            counts.append(len(kept))
            skipped += left_out
    print_left_out(skipped, sum(counts))
    if not any(counts):
        raise ValueError(f"--data {flags.data}: no usable picture")
    given = {name: value for name, value in vars(flags).items() if name != "out"}
    found = dict(samples=sum(counts), counts=counts, stamps=hash_of(stamps), flags=given)
    put(folder / "cache.json", json.dumps(settings | found))
    print(f"{sum(counts)} pictures of {size}×{size} → {folder}")


class LatentCache:
    """A finished cache. `captions`: N strings; `group`: how many neighbours training keeps together;
    `mirror`: whether it has mirror images. ValueError, naming the file, if one is missing or was cut."""

    def __init__(self, folder):
        self.folder, path = Path(folder), Path(folder) / "cache.json"
        self.settings = settings = json_object(path) if path.exists() else {}
        if "counts" not in settings:
            raise ValueError(f"{folder}: there is no cache, or it is not finished: encode again to finish")
        self.group, self.mirror, counts = settings["group"], settings["mirror"], settings["counts"]
        self.shift = torch.tensor(settings["shift"]).view(-1, 1, 1)
        self.scale = torch.tensor(settings["scale"])
        self.starts = np.cumsum([0, *counts])
        stems = [self.folder / f"{k:05d}" for k in range(len(counts))]
        self.captions = [caption for stem in stems for caption in read_lines(stem, settings)[0]]
        # a memory map keeps its file open, and a process may open only so many
        self.shard = functools.lru_cache(128)(lambda k: open_shard(stems[k], counts[k], settings))
        for k in range(len(counts)):
            self.shard(k)

    def __len__(self):
        return int(self.starts[-1])

    def rows(self, indices):
        """Yields shard and row there of each of the indices (B,)."""
        for i in torch.as_tensor(indices).tolist():
            k = int(np.searchsorted(self.starts, i, side="right")) - 1
            yield self.shard(k), i - int(self.starts[k])

    def read(self, indices, flips=None):
        """Latents (B, C, h, w) fp32 of the samples `indices` (B,), shifted and scaled as the autoencoder's
        `encode` does. flips (B,): 1 where the mirror image is wanted, if the cache has one; None: nowhere."""
        if flips is None or not self.mirror:
            flips = torch.zeros(len(indices), dtype=torch.long)
        rows = zip(self.rows(indices), flips.tolist())
        means = np.stack([shard["moments"][row, flip, 0] for (shard, row), flip in rows])  # (B, C, h, w)
        return (torch.from_numpy(means).float() - self.shift) / self.scale

    def text(self, indices, name):
        """What the encoder `name`, "clip" or "t5", gives for the captions of samples `indices` (B,): vectors
        (B, L, E) bf16, 0 at padding, and mask (B, L), True = a token. KeyError if it is not in the cache."""
        texts = []
        for shard, row in self.rows(indices):
            vectors, offsets = shard[name]
            copy = np.array(vectors[offsets[row] : offsets[row + 1]])
            texts.append(torch.from_numpy(copy).view(torch.bfloat16))  # (L, E)
        return padded(texts)


def check(cache, image_size, autoencoder, encoders, data=None):
    """ValueError, naming the cache and what differs, unless it was made for this image size by this
    autoencoder, of what --data names, and holds text of these encoders, {name: (tokenizer, encoder)}. Of data
    only names and captions are compared, and no picture is opened; None: not at all."""
    settings, size = cache.settings, cache.settings["image_size"]
    if size != image_size:
        raise ValueError(f"{cache.folder} holds pictures of {size} pixels each way, not {image_size}")
    made_by = {name: text["fingerprint"] for name, text in settings["text"].items()}
    made_by["autoencoder"] = settings["autoencoder"]
    for name, (tokenizer, module) in dict(autoencoder=(None, autoencoder), **encoders).items():
        if name not in made_by:
            raise ValueError(f"{cache.folder} holds no text of {name}: encode with --text --{name} DIR")
        if made_by[name] != fingerprint(module, tokenizer):
            raise ValueError(f"{cache.folder} was made with another {name}: give that one, or encode again")
    if data is None:
        return
    names, captions, *_ = samples_of(data, size, settings["flags"]["seed"])
    if hash_of([names, captions]) != settings["data"]:
        raise ValueError(f"--data {data}: {cache.folder} was made of other names or captions: "
                         f"give {settings['flags']['data']}, or encode again to another --out")


def main(arguments):
    about = "Encodes pictures and captions once, for --cache. Repeat it if stopped, or if pictures changed."
    flags, _, _ = read(Flags, arguments, "python -m data.latent_cache", about)
    if not flags.out:
        raise ValueError("--out CACHE: say where it is to be")
    if flags.text != bool(flags.clip or flags.t5):
        raise ValueError("--text keeps what published encoders give: it goes with --clip DIR or --t5 DIR")
    encode(flags)


if __name__ == "__main__":
    run_command(main, stopped="stopped. The same command goes on after the last whole shard")
