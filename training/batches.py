"""Which samples and which random numbers a step sees.

Both follow from (seed, step, row) alone. So there is no random state to save: on one machine a resumed run is
the same, bit for bit, as one that was never interrupted. Every number of processes sees the same batches, of
which each computes its rows.
"""
import atexit
import functools
import itertools
import math
import sys
from dataclasses import dataclass

import numpy as np
import torch
from tqdm import tqdm

from common.figures import from_bytes
from data import latent_cache
from data.latent_cache import LatentCache
from data.tar_shards import TarShards, read_ahead
from encoders.autoencoder import check_scale
from training import distributed


@functools.lru_cache(maxsize=2)
def shuffled(samples, group, seed, epoch):
    """The order of an epoch, (samples,). Each `group` neighbours stay together."""
    groups = torch.randperm(samples // group, generator=torch.Generator().manual_seed(seed * 100_003 + epoch))
    return (groups[:, None] * group + torch.arange(group)).flatten()


@dataclass(frozen=True)
class Step:
    """The rows of a step's global batch that one process computes at a time."""

    seed: int  # of the run
    number: int  # of the step, from 0
    rows: slice  # of the global batch
    count: int  # rows of the global batch

    def generator(self, purpose):
        """Random numbers for the whole global batch, the same on every process. purpose: "batch" (which
        samples) or "loss" (timesteps, dropped captions); the two share no numbers."""
        key = (self.seed * 1_000_003 + self.number) * 2 + ("batch", "loss").index(purpose)
        return torch.Generator().manual_seed(key)

    def noise(self, shape, device="cpu"):
        """Unit Gaussian noise of the rows, (B, *shape) fp32, the same for a row whoever computes it. The
        counter generator Philox (Salmon et al. 2011), keyed by (seed, step), is advanced to the first row;
        Box and Muller's transform makes two Gaussian numbers of two uniform ones."""
        count, size = self.rows.stop - self.rows.start, math.prod(shape)
        blocks = math.ceil(size / 8)  # the generator gives 4 numbers of 64 bits at a time
        philox = np.random.Philox(key=[self.seed, self.number]).advance(self.rows.start * blocks)
        bits = torch.from_numpy(philox.random_raw(count * blocks * 4).view(np.uint32))
        uniform = (bits.to(device).float() + 1) / 2**32  # above 0
        u, v = uniform.view(count, 2, -1).unbind(1)  # (B, 4 · blocks) each
        radius, angle = (-2 * u.log()).sqrt(), 2 * math.pi * v
        normal = torch.cat([radius * angle.cos(), radius * angle.sin()], dim=1)  # (B, 8 · blocks)
        return normal[:, :size].reshape(count, *shape)

    def indices(self, samples, group=1, order=None):
        """The indices of the rows, (B,): the batches of a run follow one another through an endless row of
        epochs over the samples. order(seed, epoch): the order of an epoch, (samples,); None: shuffled, with
        each `group` neighbours together. What is left of a group at the end does not take part."""
        samples = samples // group * group
        if order is None:
            order = functools.partial(shuffled, samples, group)
        positions = self.number * self.count + torch.arange(self.rows.start, self.rows.stop)
        epochs = positions // samples
        parts = [order(self.seed, e)[positions[epochs == e] % samples] for e in epochs.unique().tolist()]
        return torch.cat(parts)

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


class TarReader:
    """read(step) of TarShards. Worker processes read ahead, in the order of the run, from the first step that
    is asked for."""

    def __init__(self, dataset, flags):
        self.dataset, self.flags = dataset, flags
        self.order = functools.lru_cache(maxsize=2)(dataset.order)
        self.batches = None
        self.last = None  # (step, batch): a batch that is asked for twice is kept

    def indices(self, first):
        """Yields the indices of each part of the steps from number `first` on, without end."""
        flags = self.flags
        for number in itertools.count(first):
            for step in steps_of(flags.seed, number, flags.batch_size, flags.accumulate):
                yield step.indices(len(self.dataset), order=self.order).tolist()

    def __call__(self, step):
        """Names of the samples, pictures (B, 3, S, S) uint8, and captions."""
        if self.batches is None:
            self.batches = read_ahead(self.dataset, self.indices(step.number), self.flags.workers)
            atexit.register(self.batches.close)  # however the run ends, or Python would wait for the readers
        if self.last is None or self.last[0] != step:
            *batch, damaged = next(self.batches)
            for index, reason in damaged.items():
                line = f"sample {index} is left out, another takes its place: {reason}"
                print(line, file=sys.stderr)  # from every rank
            self.last = step, batch
        return self.last[1]


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
    """read(step) for `fit` → names of the samples, latents (B, C, h, w) or pictures (B, 3, S, S) uint8, and
    captions or, as two lists with one entry an encoder, texts and masks. From tar shards, a cache (half of
    each batch mirrored, if it has mirror images), or latents in memory."""
    if isinstance(dataset, TarShards):
        return TarReader(dataset, flags)
    encoders = {}  # those whose text is in the cache
    if isinstance(dataset, LatentCache):
        published = model.config.get("published", {})
        if published.keys() <= dataset.settings["text"].keys():
            encoders = dict(zip(published, zip(model.tokenizers, model.text_encoders)))
        latent_cache.check(dataset, flags.image_size, model.autoencoder, encoders, flags.data)
        latents = dataset.read
        check_scale(latents(range(min(256, len(dataset)))))
    else:
        in_memory = encode_all(model.autoencoder, len(dataset), dataset.pictures, 256)  # (N, C, h, w)
        check_scale(in_memory)
        latents = lambda indices, flips: in_memory[indices]

    def read(step):
        indices = step.indices(len(dataset), dataset.group)  # (B,)
        flips = torch.randint(2, (step.count,), generator=step.generator("batch"))[step.rows]  # (B,)
        text = [dataset.captions[i] for i in indices]
        if encoders:
            text = tuple(zip(*(dataset.text(indices, name) for name in encoders)))
        return indices.tolist(), latents(indices, flips), text

    return read
