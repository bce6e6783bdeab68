"""Which samples and which random numbers a step sees.

Both follow from (seed, step, row) alone. So there is no random state to save: on one machine a resumed run is
the same, bit for bit, as one that was never interrupted. Every number of processes sees the same batches, of
which each computes its rows.
"""
import atexit
import functools
from dataclasses import dataclass

import torch
from tqdm import tqdm

from common.figures import from_bytes
from data import latent_cache, tar_shards
from data.latent_cache import LatentCache
from data.tar_shards import TarShards
from encoders.autoencoder import check_scale
from training import distributed


@dataclass(frozen=True)
class Step:
    """The rows of a step's global batch that one process computes at a time.

    seed: the run's. number: of the step, from 0. rows: a slice of the global batch. count: rows of the global
    batch."""

    seed: int
    number: int
    rows: slice
    count: int

    def generator(self, purpose):
        """Random numbers for the whole global batch, the same on every process. purpose: "batch" (which
        samples) or "loss" (timesteps, dropped captions); the two share no numbers."""
        purposes = ("batch", "loss")
        key = (self.seed * 1_000_003 + self.number) * 2 + purposes.index(purpose)
        return torch.Generator().manual_seed(key)

    def row_generators(self):
        """A generator of noise for each row."""
        rows = range(self.rows.start, self.rows.stop)
        seeds = [hash((self.seed, self.number, row)) & (2**63 - 1) for row in rows]
        return [torch.Generator().manual_seed(seed) for seed in seeds]

    def indices(self, samples, group=1):
        """The indices of the rows among `samples` samples, (B,)."""
        return batch_indices(self.number, samples, self.count, self.seed, group)[self.rows]

    def times(self, factor):
        """The same step with `factor` rows in place of each."""
        rows = slice(self.rows.start * factor, self.rows.stop * factor)
        return Step(self.seed, self.number, rows, self.count * factor)


def share_out(batch_size, accumulate):
    """ValueError unless the batch can be shared out among the processes, in parts."""
    if batch_size % (distributed.world() * accumulate):
        parts = f"{distributed.world()} processes times --accumulate {accumulate}"
        raise ValueError(f"--batch-size {batch_size}: not a multiple of {parts}")


def steps_of(seed, number, batch_size, accumulate):
    """The parts of a step that this process computes, one after the other: a list of `accumulate` Steps."""
    size = batch_size // distributed.world() // accumulate
    first = distributed.rank() * accumulate * size
    starts = range(first, first + accumulate * size, size)
    return [Step(seed, number, slice(start, start + size), batch_size) for start in starts]


@functools.lru_cache(maxsize=2)
def permutation(count, seed, epoch):
    return torch.randperm(count, generator=torch.Generator().manual_seed(seed * 100_003 + epoch))


def batch_indices(number, samples, batch_size, seed, group=1):
    """The indices of batch `number` in an endless row of shuffled epochs over the samples, (batch_size,).
    Each `group` neighbours stay together; what is left of a group at the end of an epoch does not take
    part."""
    samples = samples // group * group
    found = []
    for position in range(number * batch_size, (number + 1) * batch_size):
        epoch, place = divmod(position, samples)
        found.append(permutation(samples // group, seed, epoch)[place // group] * group + place % group)
    return torch.stack(found)


class MemoryReader:
    """read(step) of latents in memory (N, C, h, w) with their captions."""

    def __init__(self, latents, captions, group):
        self.latents, self.captions, self.group = latents, captions, group

    def __call__(self, step):
        """Names of the samples, latents (B, C, h, w), and captions."""
        indices = step.indices(len(self.captions), self.group)
        return indices.tolist(), self.latents[indices], [self.captions[i] for i in indices]


class CacheReader:
    """read(step) of a LatentCache; half of each batch is mirrored, where it has mirror images. encoders: the
    names of those whose text is read from it too."""

    def __init__(self, cache, encoders):
        self.cache, self.encoders = cache, encoders

    def __call__(self, step):
        """Names of the samples, latents (B, C, h, w), and captions, or text and masks, lists with one entry
        an encoder."""
        indices = step.indices(len(self.cache), self.cache.group)
        flips = torch.randint(2, (step.count,), generator=step.generator("batch"))[step.rows]
        text = [self.cache.captions[i] for i in indices]
        if self.encoders:
            text = tuple(zip(*(self.cache.text(indices, name) for name in self.encoders)))
        return indices.tolist(), self.cache.read(indices, flips), text


class TarReader:
    """read(step) of tar shards. Worker processes read ahead, in the order of the run, from the step that is
    asked for first.

    dataset: TarShards. steps: of the run. batch_size, seed, accumulate, workers: the flags'."""

    def __init__(self, dataset, steps, batch_size, seed, accumulate, workers):
        self.dataset, self.steps, self.workers = dataset, steps, workers
        self.batch_size, self.seed, self.accumulate = batch_size, seed, accumulate
        self.batches = None
        self.last = None  # (k, batch): a batch that is asked for twice is kept

    def indices(self, k):
        """The indices of the k-th part of this process; a step has --accumulate parts."""
        number, part = divmod(k, self.accumulate)
        own = self.dataset.indices_of(
            number, self.batch_size, self.seed, distributed.rank(), distributed.world()
        )
        size = len(own) // self.accumulate
        return own[part * size : (part + 1) * size]

    def __call__(self, step):
        """Names of the samples, pictures (B, 3, S, S) uint8, and captions."""
        parts = steps_of(self.seed, step.number, self.batch_size, self.accumulate)
        k = step.number * self.accumulate + parts.index(step)
        if self.batches is None:
            end = max(k + 1, self.steps * self.accumulate)
            self.batches = tar_shards.batches(self.dataset, range(k, end), self.indices, self.workers)
            atexit.register(self.batches.close)  # however the run ends, or Python would wait for the readers
        if self.last is None or self.last[0] != k:
            self.last = k, next(self.batches)
            for index, reason in self.last[1][2].items():
                print(f"sample {index} is left out, another takes its place: {reason}")
        pictures, captions, _ = self.last[1]
        return self.indices(k).tolist(), pictures, captions


def encode_all(autoencoder, count, read, size):
    """Latents (count, …, C, h, w) of all pictures or clips read(indices), `size` at a time. The autoencoder
    is frozen, so once is enough."""
    device, found = autoencoder.shift.device, []
    hidden = None if distributed.rank() == 0 else True
    for indices in tqdm(torch.arange(count).split(size), desc="encoding", disable=hidden, leave=False):
        x = read(indices)  # (size, [F,] 3, S, S) uint8
        with torch.no_grad():
            latents = autoencoder.encode(from_bytes(x.flatten(0, -4)).to(device)).cpu()
        found.append(latents.view(*x.shape[:-3], *latents.shape[1:]))
    return torch.cat(found)


def reader_of(flags, model, dataset):
    """read(step) for `fit` → names, latents (B, C, h, w) or pictures (B, 3, S, S) uint8, and captions or what
    the text encoders made of them: from tar shards, a cache, or latents in memory."""
    if isinstance(dataset, TarShards):
        return TarReader(dataset, flags.steps, flags.batch_size, flags.seed, flags.accumulate, flags.workers)
    if isinstance(dataset, LatentCache):
        published = model.config.get("published", {})
        encoders = dict(zip(published, zip(model.tokenizers, model.text_encoders)))
        with_text = bool(encoders) and encoders.keys() <= dataset.settings["text"].keys()
        latent_cache.check(dataset, flags.image_size, model.autoencoder, encoders if with_text else {})
        check_scale(dataset.read(torch.arange(min(256, len(dataset)))))
        return CacheReader(dataset, list(published) if with_text else [])
    latents = encode_all(model.autoencoder, len(dataset), dataset.pictures, 256)  # (N, C, h, w)
    check_scale(latents)
    return MemoryReader(latents, dataset.captions, dataset.group)
