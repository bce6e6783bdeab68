"""Which samples and which random numbers a step sees.

Both follow from (seed, step, row) alone. So there is no random state to save: on a CPU a resumed run is the
same, bit for bit, as one that was never interrupted. Every number of processes sees the same batches, of
which each computes its rows.
"""
import atexit
import functools
import itertools
import math
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np
import torch
from torch.utils._pytree import tree_map_only
from tqdm import tqdm

from common.figures import from_bytes
from common.flops import Flops
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

    def noise(self, shape):
        """Unit Gaussian noise of the rows, (B, *shape) fp32, the same for a row whoever computes it. The
        counter generator Philox (Salmon et al. 2011), keyed by (seed, step), is advanced to the first row;
        Box and Muller's transform makes two Gaussian numbers of two uniform ones."""
        count, size = self.rows.stop - self.rows.start, math.prod(shape)
        blocks = math.ceil(size / 8)  # the generator gives 8 numbers of 32 bits at a time
        philox = np.random.Philox(key=[self.seed, self.number]).advance(self.rows.start * blocks)
        uniform = np.random.Generator(philox).random(count * blocks * 8, dtype=np.float32)  # in [0, 1)
        u, v = (1 - torch.from_numpy(uniform)).view(count, 2, -1).unbind(1)  # above 0, (B, 4 · blocks) each
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


def steps_of(flags, number):
    """The parts of a step that this process computes, one after the other: a list of --accumulate Steps."""
    size = flags.batch_size // distributed.world() // flags.accumulate
    first = distributed.rank() * flags.accumulate * size
    starts = range(first, first + flags.accumulate * size, size)
    return [Step(flags.seed, number, slice(start, start + size), flags.batch_size) for start in starts]


def moved(batch, device):
    """A batch, of tensors in dictionaries and lists, on a device; no one waits for a copy to a GPU."""
    gpu = device.type == "cuda"
    move = lambda x: x.pin_memory().to(device, non_blocking=True) if gpu else x.to(device)
    return tree_map_only(torch.Tensor, move, batch)


def ahead(read, steps, device):
    """Yields read(step) of each step, on the device; a thread reads the next one meanwhile. On a CPU, which
    would do both with the same cores, nothing is read ahead."""
    if device.type == "cpu":
        yield from map(read, steps)
        return
    # a thread has a current GPU of its own, on which memory would be pinned
    prepare = functools.partial(torch.cuda.set_device, device) if device.type == "cuda" else None
    with ThreadPoolExecutor(1, initializer=prepare) as thread:
        coming = None
        for step in steps:
            ready, coming = coming, thread.submit(lambda step: moved(read(step), device), step)
            if ready:
                yield ready.result()
        if coming:
            yield coming.result()


def step_flops(outline, batch_loss, read, parts):
    """FLOPs of a step of these parts, forward and backward, counted on the meta device. With --checkpointing,
    what is computed twice counts twice."""
    batch = moved(read(parts[0]), torch.device("meta"))
    with Flops() as counter:
        losses, _ = batch_loss(outline, batch)
        losses.float().mean().backward()
    return len(parts) * counter.total


def variants_of(dataset):
    """For each sample of a data set the list of its captions."""
    return getattr(dataset, "variants", None) or [[caption] for caption in dataset.captions]


class Captions:
    """The captions of data sets, tokenised once: of each sample one, or one drawn from its list. A call with
    indices (B,) and random numbers (B,) in 0…1 gives what Pipeline.tokenize gives of those captions."""

    def __init__(self, tokenize, *datasets):
        of_samples = [several for dataset in datasets for several in variants_of(dataset)]
        captions = [caption for several in of_samples for caption in several]
        self.several = torch.tensor(list(map(len, of_samples)))  # (N,)
        self.first = self.several.cumsum(0) - self.several  # (N,)
        parts = [tokenize(captions[i : i + 1000]) for i in range(0, len(captions), 1000)]
        self.encoders = []  # (all tokens in a row, how many each caption has, where its first one lies)
        for part in zip(*parts):
            tokens = torch.cat([tokens[mask] for tokens, mask in part])
            lengths = torch.cat([mask.sum(1) for _, mask in part])  # (N,)
            self.encoders.append((tokens, lengths, lengths.cumsum(0) - lengths))

    def __call__(self, indices, choice):
        indices = self.first[indices] + (choice * self.several[indices]).long()
        found = []
        for tokens, lengths, starts in self.encoders:
            lengths, starts = lengths[indices].unsqueeze(1), starts[indices].unsqueeze(1)  # (B, 1)
            places = torch.arange(lengths.max())  # (L,)
            mask = places < lengths  # (B, L)
            found.append((tokens[(starts + places) * mask] * mask, mask))
        return found


class TarReader:
    """read(step) of TarShards. Worker processes read ahead, in the order of the run, from the first step that
    is asked for."""

    def __init__(self, dataset, flags):
        self.dataset, self.flags = dataset, flags
        self.order = functools.lru_cache(maxsize=2)(dataset.order)
        self.batches = None
        self.last = None  # (step, batch): a batch that is asked for twice is kept

    def __call__(self, step):
        """Names of the samples, pictures (B, 3, S, S) uint8, and captions."""
        if self.batches is None:
            parts = (part for number in itertools.count(step.number) for part in steps_of(self.flags, number))
            indices = (part.indices(len(self.dataset), order=self.order).tolist() for part in parts)
            self.batches = read_ahead(self.dataset, indices, self.flags.workers)
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
    """read(step) → names of the samples, latents (B, C, h, w) or pictures (B, 3, S, S) uint8, and what
    Pipeline.encode_text takes. From tar shards, a cache (half of each batch mirrored, if it has mirror
    images), or latents in memory."""
    if isinstance(dataset, TarShards):
        tars = TarReader(dataset, flags)

        def read_tars(step):
            names, pictures, captions = tars(step)
            return names, pictures, model.tokenize(captions)

        return read_tars
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

    captions = None if encoders else Captions(model.tokenize, dataset)

    def read(step):
        indices = step.indices(len(dataset), dataset.group)  # (B,)
        generator = step.generator("batch")
        flips = torch.randint(2, (step.count,), generator=generator)[step.rows]  # (B,)
        choice = torch.rand(step.count, generator=generator)[step.rows]  # (B,)
        text = [dataset.text(indices, name) for name in encoders] if encoders else captions(indices, choice)
        return indices, latents(indices, flips), text

    return read
