"""A cache of encoded training data. The autoencoder and published text encoders are frozen: what they make of a picture and its
caption is the same in every epoch, so it is computed once and kept on disk.

    python -m data.latent_cache --data DIR --autoencoder DIR --image-size 256 --out CACHE [--text --clip DIR --t5 DIR]

A cache is a folder of shards of n samples, whose arrays np.load(path, mmap_mode="r") opens without reading them:

    00000.moments.npy      (n, flips, 2, C, h, w) fp16: mean and log-variance of the raw latent, of picture and mirror image
    00000.t5.npy           (sum of L, E) bf16, viewed as int16: one vector for each token of the captions, without padding
    00000.t5.offsets.npy   (n + 1,) int64: caption i has the rows from offsets[i] to offsets[i + 1]
    00000.captions.jsonl   file and caption of each sample, or the reason why a file was left out; written last of its shard
    cache.json             counts, shapes, flags and fingerprints; written when all is there

fp16 keeps 11 bits of a number, so that a latent is off by at most |raw| / 2048 / scale, a standard deviation by less than 1 %;
log-variances are in -30…20 and means within some tens, far from its limit of 65504 (which is checked). bf16 would keep 8 bits.
Text is in bf16, in which pipeline.py runs published encoders: nothing is lost. A sample of 256×256 takes 32 KiB with both flips
(C = 4), and 8 KiB more for every token that T5-XXL reads.
Letters: B batch, C latent channels, S picture size, L text tokens, E width of an encoder.
"""
import bisect
import functools
import hashlib
import itertools
import json
import math
import os
import random
import shutil
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

from encoders import autoencoder as autoencoders
from data import folder as data
from data import shapes
from encoders import weights
from common.hardware import device_of
from pipeline import LOADERS, from_bytes
from sample import parse_flags


@dataclass
class Config:
    data: str = "shapes"  # or a folder of pictures with captions
    autoencoder: str = ""  # its run, or a published folder; runs/autoencoder-DATA if not given
    image_size: int = 256  # pixels, each way
    out: str = ""  # the cache's folder
    mirror: str = ""  # true: pictures are encoded mirrored too; not given: true but for shapes, which speak of left and right
    text: bool = False  # true: what the next two make of the captions too; with a large T5, most of the cache
    clip: str = ""  # the folder of a published CLIP
    t5: str = ""  # the folder of a published T5 1.1 or Flan-T5
    per_shard: int = 4096
    batch_size: int = 32
    seed: int = 0  # of shapes
    device: str = "auto"


def fingerprint(module, tokenizer=None):
    """A hash of a module's config and all its weights (names, dtypes, shapes, bytes), and of a tokenizer's vocabulary: a text.
    The file or device that they are on does not matter."""
    digest = hashlib.blake2b(json.dumps(vars(module.config), sort_keys=True).encode(), digest_size=16)
    for name, tensor in sorted(module.state_dict().items()):
        digest.update(f"{name} {tensor.dtype} {list(tensor.shape)}".encode())
        digest.update(tensor.cpu().contiguous().reshape(-1).view(torch.uint8).numpy())
    if tokenizer:
        pairs = getattr(tokenizer, "pairs", None)  # CLIP's, or else a sentencepiece model
        digest.update(json.dumps([pairs.vocabulary, list(pairs.ranks)], sort_keys=True).encode() if pairs else tokenizer.model)
    return digest.hexdigest()


def samples_of(config):
    """What --data names, with no picture opened yet: the names of N pictures, their captions, a function from a name to the
    picture (S, S, 3) uint8 (ValueError if it cannot be used), what was left out for its caption, and the data set's group."""
    if config.data == "shapes":
        drawn = shapes.Shapes(config.image_size, seed=config.seed)
        read = lambda i: shapes.draw(drawn.scenes[i], config.image_size)
        return list(range(len(drawn.captions))), drawn.captions, read, [], drawn.group
    folder = Path(config.data)
    files = (path for path in sorted(folder.rglob("*")) if path.suffix.lower() in data.PICTURES)
    captions, paths, skipped = data.read_folder(folder, files, lambda path: path, "--data", "picture (png, jpg, webp)")
    read = lambda name: data.open_picture(folder / name, config.image_size)
    return [os.path.relpath(path, folder) for path in paths], captions, read, skipped, data.Folder.group


def put(path, content):
    """Writes an array as .npy, or a text; the file appears whole or not at all."""
    with open(f"{path}.part", "wb") as file:
        np.save(file, content) if isinstance(content, np.ndarray) else file.write(content.encode())
    os.replace(f"{path}.part", path)


def line(name, **rest):
    return json.dumps(dict(file=name, **rest)) + "\n"


def read_lines(stem, settings):
    """A shard's captions, and a list of (name, reason) of what was left out. ValueError, naming the file, if it is cut."""
    path = stem.with_name(f"{stem.name}.captions.jsonl")
    try:
        lines = [json.loads(text) for text in path.read_bytes().splitlines()]
    except (OSError, ValueError):
        lines = []
    if len(lines) != min(settings["per_shard"], settings["files"] - int(stem.name) * settings["per_shard"]):
        raise ValueError(f"{path} is missing or was cut short: encode again to mend it")
    skipped = [(one["file"], one["skipped"]) for one in lines if "skipped" in one]
    return [one["caption"] for one in lines if "caption" in one], skipped


def open_array(path, *shape):
    """The array of a .npy file, not yet read. ValueError, naming the file, if it is not whole or does not have that shape."""
    try:
        return np.load(path, mmap_mode="r").reshape(shape)
    except (OSError, ValueError, EOFError) as error:
        error = str(error).splitlines()[0]
        raise ValueError(f"{path} is missing or was cut short: encode again to mend it ({error})") from None


def open_shard(stem, count, settings):
    """{"moments": array, name of an encoder: (vectors, offsets)} of a shard with `count` samples; ValueError as open_array."""
    if not count:
        return {}  # nothing of it could be used
    shard = dict(moments=open_array(f"{stem}.moments.npy", count, 1 + settings["mirror"], 2, *settings["shape"]))
    for name, encoder in settings["text"].items():
        offsets = np.array(open_array(f"{stem}.{name}.offsets.npy", count + 1))
        shard[name] = open_array(f"{stem}.{name}.npy", offsets[-1], encoder["width"]), offsets
    return shard


def moments_of(autoencoder, pictures, mirror):
    """pictures (B, S, S, 3) uint8 → (B, flips, 2, C, h, w) fp16: the pictures and with `mirror` their mirror images; of each,
    mean and log-variance. ValueError if fp16 cannot hold them."""
    x = from_bytes(torch.from_numpy(pictures).permute(0, 3, 1, 2).to(autoencoder.shift.device))  # (B, 3, S, S)
    x = torch.stack([x, x.flip(-1)] if mirror else [x], dim=1)  # (B, flips, 3, S, S)
    found = torch.stack(autoencoder.moments(x.flatten(0, 1)), dim=1).half()  # (B · flips, 2, C, h, w)
    if not found.isfinite().all():
        raise ValueError("the autoencoder gives latents that are not numbers, or too large for fp16")
    return found.unflatten(0, x.shape[:2]).cpu().numpy()


@torch.no_grad()
def write_shard(stem, names, captions, read, autoencoder, encoders, mirror, batch_size, bar):
    """Encodes samples and writes their files. encoders: {name: (tokenizer, encoder)}. What cannot be read leaves its reason."""

    def attempt(name):
        try:
            return read(name)
        except ValueError as reason:
            return str(reason)

    lines, moments, vectors, lengths = [], [], {name: [] for name in encoders}, {name: [0] for name in encoders}
    with ThreadPoolExecutor() as pool:
        for i in range(0, len(names), batch_size):
            batch = names[i : i + batch_size]
            batch = list(zip(batch, captions[i : i + batch_size], pool.map(attempt, batch)))
            lines += [line(n, skipped=p) if isinstance(p, str) else line(n, caption=caption) for n, caption, p in batch]
            good = [(caption, p) for _, caption, p in batch if not isinstance(p, str)]
            if good:
                texts, pictures = zip(*good)
                moments.append(moments_of(autoencoder, np.stack(pictures), mirror))
                for name, (tokenizer, encoder) in encoders.items():
                    tokens, mask = (a.to(autoencoder.shift.device) for a in tokenizer(texts))  # (B, L)
                    found = encoder(tokens, mask)[mask].bfloat16()  # (sum of L, E)
                    vectors[name].append(found.view(torch.int16).cpu().numpy())
                    lengths[name] += mask.sum(1).tolist()
            bar.update(len(batch))
    if moments:
        put(f"{stem}.moments.npy", np.concatenate(moments))
        for name in encoders:
            put(f"{stem}.{name}.npy", np.concatenate(vectors[name]))
            put(f"{stem}.{name}.offsets.npy", np.cumsum(lengths[name], dtype=np.int64))
    put(f"{stem}.captions.jsonl", "".join(lines))


def estimate(settings, names, captions, encoders):
    """Bytes of a cache by part, before it is made. The captions' tokens are counted for a thousand of them at most."""
    N, headers = len(names), 128 * math.ceil(len(names) / settings["per_shard"])  # 128 bytes before every array
    sizes = dict(latents=N * (1 + settings["mirror"]) * 2 * math.prod(settings["shape"]) * 2 + headers)
    lines = (line(name, caption=caption) for name, caption in zip(names, captions))
    sizes["captions"] = sum(map(len, lines)) + len(json.dumps(settings))
    some = random.Random(0).sample(captions, min(N, 1000))
    for name, (tokenizer, encoder) in encoders.items():
        tokens = sum(tokenizer([caption])[1].sum().item() for caption in some) / len(some)  # L, on average
        sizes[f"{name} at {tokens:.1f} tokens a caption"] = round(N * (tokens * encoder.config.width * 2 + 8)) + 2 * headers
    return sizes


def check_room(folder, settings, sizes):
    """Prints what the cache will need. ValueError if the folder holds something else, or its disk has no room for the rest."""
    known = [path for path in (folder / "cache.json", folder / "begun.json") if path.exists()]
    old = weights.json_object(known[0]) if known else {}
    other = [name for name in settings if known and old.get(name) != settings[name]]
    if other:
        name = other[0].replace("_", " ")
        raise ValueError(f"--out {folder} holds a cache with another {name}: give the flags it was begun with or another --out")
    files = list(folder.iterdir()) if folder.exists() else []
    if files and not known:
        raise ValueError(f"--out {folder}: is neither empty nor a cache")
    there, need = sum(path.stat().st_size for path in files), sum(sizes.values())
    free = shutil.disk_usage(next(path for path in (folder.absolute(), *folder.absolute().parents) if path.exists())).free
    GiB = lambda size: f"{size / 2**30:.3f} GiB"
    parts = ", ".join(f"{name} {GiB(size)}" for name, size in sizes.items())
    print(f"{folder}: {GiB(need)} in all ({parts}), of which {GiB(there)} are there; the disk has {GiB(free)} free")
    if need - there > free:
        raise ValueError(f"--out {folder}: needs {GiB(need - there)} more, and its disk has {GiB(free)} free")


def encode(config):
    """Writes the cache that the flags ask for, or what it lacks of its shards. ValueError if something is wrong with them."""
    folder, device, size = Path(config.out), device_of(config.device), config.image_size
    autoencoder = autoencoders.load(config.autoencoder or f"runs/autoencoder-{Path(config.data).name or 'data'}").to(device)
    if size < 1 or size % math.lcm(16, autoencoder.factor):
        raise ValueError(f"--image-size {size}: must be a multiple of {math.lcm(16, autoencoder.factor)}")
    names, captions, read, skipped, group = samples_of(config)
    folders = {name: getattr(config, name) for name in LOADERS if getattr(config, name)}
    encoders = {name: LOADERS[name](folders[name], torch.bfloat16, device) for name in folders}  # dtype: as in pipeline.py
    text = {name: dict(width=pair[1].config.width, fingerprint=fingerprint(*pair[::-1])) for name, pair in encoders.items()}
    mirror, side = config.mirror == "true" or not config.mirror and config.data != "shapes", size // autoencoder.factor
    settings = dict(
        data=hashlib.blake2b(json.dumps([names, captions]).encode(), digest_size=16).hexdigest(), files=len(names),
        image_size=size, mirror=mirror, group=group, per_shard=config.per_shard,
        autoencoder=fingerprint(autoencoder), shape=[autoencoder.config.channels, side, side],
        shift=autoencoder.shift.tolist(), scale=autoencoder.scale.item(), text=text,
    )  # fmt: skip
    check_room(folder, settings, estimate(settings, names, captions, encoders))
    folder.mkdir(parents=True, exist_ok=True)
    put(folder / "begun.json", json.dumps(settings))
    (folder / "cache.json").unlink(missing_ok=True)  # comes back when all is found to be whole
    stems = [folder / f"{k:05d}" for k in range(math.ceil(len(names) / config.per_shard))]
    with tqdm(total=len(names), desc="encoding", unit="picture", disable=None) as bar:
        for k, stem in enumerate(stems):
            part = slice(k * config.per_shard, (k + 1) * config.per_shard)
            try:
                open_shard(stem, len(read_lines(stem, settings)[0]), settings)
                bar.update(len(names[part]))
            except ValueError:
                write_shard(stem, names[part], captions[part], read, autoencoder, encoders, mirror, config.batch_size, bar)
    done = [read_lines(stem, settings) for stem in stems]
    counts, skipped = [len(kept) for kept, _ in done], skipped + [left for _, out in done for left in out]
    if skipped:
        print(f"{len(skipped)} of {len(skipped) + sum(counts)} files were left out:")
        print("\n".join(f"  {path}: {reason}" for path, reason in skipped[:20]) + "\n  …" * (len(skipped) > 20))
    if not any(counts):
        raise ValueError(f"--data {config.data}: no usable picture (png, jpg, webp)")
    flags = {name: value for name, value in vars(config).items() if name != "out"}
    put(folder / "cache.json", json.dumps(settings | dict(samples=sum(counts), counts=counts, flags=flags)))
    (folder / "begun.json").unlink()
    print(f"{sum(counts)} pictures of {size}×{size} → {folder}")


class LatentCache:
    """A finished cache. `captions`: list of N strings; `group`: how many neighbours training keeps together; `shape`: C, h, w;
    `mirror`: whether mirror images are there. ValueError, naming the folder or file, if something is missing or cut short."""

    def __init__(self, folder):
        self.folder, path, self.captions = Path(folder), Path(folder) / "cache.json", []
        if not path.exists():
            begun = (self.folder / "begun.json").exists()
            raise ValueError(f"{folder}: {'cache.json is missing: encode again to finish' if begun else 'there is no cache'}")
        self.settings = weights.json_object(path)
        self.shape, self.group, self.mirror = (self.settings[key] for key in ("shape", "group", "mirror"))
        self.shift, self.scale = torch.tensor(self.settings["shift"]).view(-1, 1, 1), torch.tensor(self.settings["scale"])
        self.counts = self.settings["counts"]
        self.starts = list(itertools.accumulate(self.counts, initial=0))
        self.shard = functools.lru_cache(128)(self.shard)  # so many at a time: a process may not open files without end
        for k in range(len(self.counts)):
            self.captions += read_lines(self.folder / f"{k:05d}", self.settings)[0]
            self.shard(k)

    def __len__(self):
        return self.starts[-1]

    def shard(self, k):
        return open_shard(self.folder / f"{k:05d}", self.counts[k], self.settings)

    def rows(self, indices):
        """For each of the indices (B,): its shard and the row there. IndexError if there is no such sample."""
        for i in torch.as_tensor(indices).tolist():
            if not 0 <= i < len(self):
                raise IndexError(f"there is no sample {i} among {len(self)}")
            k = bisect.bisect_right(self.starts, i) - 1
            yield self.shard(k), i - self.starts[k]

    def read(self, indices, flips=None, noise=None):
        """Latents (B, C, h, w) fp32 of the samples `indices` (B,), shifted and scaled as the autoencoder's `encode` does.

        flips (B,): 1 for those to be mirrored, where the cache has mirror images; None: none.
        noise: unit Gaussian (B, C, h, w), for samples of the latents' distribution, which is what DiT's train.py learns from
        (facebookresearch/DiT); None: the mean, which is what `encode` gives."""
        if flips is None or not self.mirror:
            flips = torch.zeros(len(indices), dtype=torch.long)
        found = np.stack([shard["moments"][row, flip] for (shard, row), flip in zip(self.rows(indices), flips.tolist())])
        mean, log_variance = torch.from_numpy(found).float().unbind(1)  # (B, C, h, w)
        raw = mean if noise is None else mean + (0.5 * log_variance).exp() * noise
        return (raw - self.shift) / self.scale

    def text(self, indices, name):
        """What the encoder `name` ("clip", "t5") made of the captions `indices` (B,): vectors (B, L, E) in bf16, 0 at padding,
        and mask (B, L), True = a token. KeyError if it is not in the cache."""
        found = []
        for shard, row in self.rows(indices):
            vectors, offsets = shard[name]
            found.append(torch.from_numpy(np.array(vectors[offsets[row] : offsets[row + 1]])).view(torch.bfloat16))  # (L, E)
        lengths = torch.tensor([[len(one)] for one in found])  # (B, 1)
        return torch.nn.utils.rnn.pad_sequence(found, batch_first=True), torch.arange(lengths.max()) < lengths


def check(cache, image_size, autoencoder, encoders):
    """ValueError, naming the cache and what differs, unless it was made for this image size by this autoencoder, and holds the
    text of these encoders, {name: (tokenizer, encoder)}; {} where no text is read from it."""
    if cache.settings["image_size"] != image_size:
        raise ValueError(f"{cache.folder} holds pictures of {cache.settings['image_size']} pixels each way, not {image_size}")
    found = {name: text["fingerprint"] for name, text in cache.settings["text"].items()}
    found["autoencoder"] = cache.settings["autoencoder"]
    for name, (tokenizer, module) in (dict(autoencoder=(None, autoencoder)) | encoders).items():
        if name not in found:
            raise ValueError(f"{cache.folder} holds no text of {name}: encode with --text --{name} DIR")
        if found[name] != fingerprint(module, tokenizer):
            raise ValueError(f"{cache.folder} was made with another {name}: give that one, or encode again with this one")


def main(arguments):
    config = Config()
    if rest := parse_flags(config, arguments):
        raise ValueError(f"{rest[0]!r} is not a flag; flags look like --out CACHE")
    if not config.out or config.mirror not in ("", "true", "false"):
        raise ValueError(f"--mirror {config.mirror}: not true or false" if config.out else "--out CACHE: say where it is to be")
    if config.text != bool(config.clip or config.t5):
        raise ValueError("--text keeps what published encoders make of captions: it goes with --clip DIR, --t5 DIR, or both")
    if min(config.per_shard, config.batch_size) < 1:
        raise ValueError(f"--per-shard {config.per_shard} --batch-size {config.batch_size}: must be at least 1")
    try:
        encode(config)
    except KeyboardInterrupt:
        print("\nstopped. The same command goes on after the last whole shard")
        sys.exit(130)


if __name__ == "__main__":
    try:
        main(sys.argv[1:])
    except (ValueError, OSError) as error:
        sys.exit(f"latent_cache.py: {error}")
