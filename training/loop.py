"""The training loop that all stages share: the order of the data, the optimizers, the log, stops and faults.

Step i of a run draws its batch and its noise from (seed, i) alone. So there is no random state to save: on the same
machine a resumed run is the same, bit for bit, as one that was never interrupted. Every number of processes sees the same
batches, of which each computes its rows; their losses agree up to rounding.
"""
import atexit
import ctypes
import dataclasses
import functools
import importlib.util
import json
import math
import os
import resource
import signal
import sys
import time
from pathlib import Path

import torch
from tqdm import tqdm

from training import checkpoints
from training import distributed
from evaluation import dry_run as dryrun
from common import hardware
from common import figures as pictures
from data import tar_shards as shards
from training.optimizers import Muon


def make_optimizers(config, model, dtype=torch.float32):
    """Muon for the matrices inside the blocks (not the adaLN tables, whose input is one vector a sample), AdamW for
    the rest; or AdamW for all. dtype: of Muon's iteration. Returns a list."""
    named = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    inside = [
        p for name, p in named
        if config.optimizer == "muon" and p.ndim >= 2 and "modulation" not in name
        and any(part in name for part in ("blocks.", "coder.")) and min(p.shape[:2]) >= 48
    ]  # fmt: skip
    chosen = set(map(id, inside))
    rest = [p for _, p in named if id(p) not in chosen]
    adamw = torch.optim.AdamW(rest, config.lr, betas=(0.9, 0.99), weight_decay=config.weight_decay, fused=True)
    return ([Muon(inside, config.lr, weight_decay=config.weight_decay, dtype=dtype)] if inside else []) + [adamw]


def learning_rate(config, step):
    """The share of --lr at a step: rises over `warmup`, stays, and falls over the last `cooldown` of the run."""
    left = (config.steps - step) / max(1, config.cooldown * config.steps)
    return min(1.0, (step + 1) / (config.warmup + 1), left)


@functools.lru_cache(maxsize=2)
def permutation(count, seed, epoch):
    return torch.randperm(count, generator=torch.Generator().manual_seed(seed * 100_003 + epoch))


def batch_indices(step, count, batch_size, seed, group=1):
    """The indices of batch `step` in an endless row of shuffled epochs over `count` samples: (batch_size,) integers.
    Each `group` neighbours stay together (at the end of an epoch, what is left of a group does not take part)."""
    count, found = count // group * group, []
    for position in range(step * batch_size, (step + 1) * batch_size):
        epoch, place = divmod(position, count)
        found.append(permutation(count // group, seed, epoch)[place // group] * group + place % group)
    return torch.stack(found)


class Log:
    """metrics.jsonl and loss.png, and event files where TensorBoard is installed; rank 0 writes them. On resume, keeps what
    was logged before the checkpoint's step."""

    def __init__(self, folder, step):
        self.path, self.rows, self.events = folder / "metrics.jsonl", [], None
        if distributed.rank() > 0:
            return
        if importlib.util.find_spec("tensorboard"):
            from torch.utils.tensorboard import SummaryWriter

            self.events = SummaryWriter(folder, purge_step=step)
        lines = self.path.read_text().splitlines() if step and self.path.exists() else []
        whole = (line for line in lines if line.endswith("}"))  # a full disk cuts the last one
        self.rows = [row for row in map(json.loads, whole) if row["step"] <= step]
        self.path.write_text("".join(json.dumps(row) + "\n" for row in self.rows))

    def __call__(self, **row):
        if distributed.rank() > 0:
            return
        self.rows.append(row)
        for name, value in row.items():
            if self.events and isinstance(value, (int, float)):
                self.events.add_scalar(name, value, row["step"])
        with self.path.open("a") as file:
            file.write(json.dumps(row) + "\n")

    def draw(self):
        rows = [row for row in self.rows if "loss" in row]
        series = {"loss": ([row["step"] for row in rows], [row["loss"] for row in rows])}
        for i in range(len(rows[0].get("loss_bins", [])) if rows else 0):
            points = [(row["step"], row["loss_bins"][i]) for row in rows if row["loss_bins"][i] is not None]
            series[f"t in {i}/4…{i + 1}/4"] = tuple(zip(*points)) if points else ([], [])
        if rows:
            pictures.curves(series, "training loss, and by timestep", (720, 360)).save(self.path.parent / "loss.png")


def by_bin(values, shares, bins=4):
    """Mean of values (K,) in each quarter of shares (K,) in 0…1; None where there is none."""
    which = (shares * bins).long().clamp(max=bins - 1)
    return [values[which == i].mean().item() if (which == i).any() else None for i in range(bins)]


def rows_of(config, part=0):
    """Which rows of the global batch this rank computes in part `part` of --accumulate: a slice."""
    count = config.batch_size // distributed.world() // config.accumulate
    start = (distributed.rank() * config.accumulate + part) * count
    return slice(start, start + count)


class Ahead:
    """read(step, rows) of tar shards: worker processes read ahead, in the order of the run, which starts where it is asked
    first. A batch that is asked for twice is kept."""

    def __init__(self, config, dataset):
        self.config, self.dataset, self.batches, self.last = config, dataset, None, None

    def indices(self, k):
        """Of the k-th part of the run's batches, on this rank."""
        step, part = divmod(k, self.config.accumulate)
        rows = rows_of(self.config, part)
        own = self.dataset.indices_of(step, self.config.batch_size, self.config.seed, distributed.rank(), distributed.world())
        first = distributed.rank() * len(own)
        return own[rows.start - first : rows.stop - first]

    def __call__(self, step, rows):
        start = rows_of(self.config)
        k = step * self.config.accumulate + (rows.start - start.start) // (start.stop - start.start)
        if self.batches is None:
            end = max(k + 1, self.config.steps * self.config.accumulate)  # one, for a run that is at its end already
            self.batches = shards.batches(self.dataset, range(k, end), self.indices, self.config.workers)
            atexit.register(self.batches.close)  # however the run ends, or Python would wait for the readers at its exit
        if self.last is None or self.last[0] != k:
            self.last = k, next(self.batches)
            for index, reason in self.last[1][2].items():
                print(f"sample {index} is left out, another takes its place: {reason}")
        pictures, captions, _ = self.last[1]
        return self.indices(k).tolist(), pictures, captions


def row_generators(seed, step, rows):
    """A generator of noise for each of these rows of the batch of a step: from (seed, step, row) alone, whatever the number
    of ranks."""
    seeds = (hash((seed, step, row)) & (2**63 - 1) for row in range(rows.start, rows.stop))
    return [torch.Generator().manual_seed(one) for one in seeds]


def generator_of(config, step, use):
    """Random numbers of a step, the same on every rank, for one use of them: "batch" or "loss". Two uses share no numbers."""
    return torch.Generator().manual_seed((config.seed * 1_000_003 + step) * 2 + ("batch", "loss").index(use))


class Stop:
    """SIGTERM (a cluster takes the machine back) and SIGINT (Ctrl-C) end a run after the step, with a checkpoint."""

    def __init__(self):
        self.asked = False
        self.before = {number: signal.signal(number, self.ask) for number in (signal.SIGTERM, signal.SIGINT)}

    def ask(self, number, frame):
        self.asked = True

    def over(self):
        for number, handler in self.before.items():
            signal.signal(number, handler)


def memory_of(device):
    """GiB that this process has taken at most."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**30
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20


def trim(device):
    """Gives what is freed back to the system. On Linux the C library keeps it, in pieces that the next step's tensors do not
    fit: without this S/2 on a CPU takes some 30 MB more with every step."""
    if device.type == "cpu" and sys.platform == "linux" and hasattr(library := ctypes.CDLL(None), "malloc_trim"):
        library.malloc_trim(0)


def fit(config, model, read, batch_loss, preview, save):
    """The loop that all stages share.

    read(step, rows) → a batch of these rows of the step's global batch; its first item names them, for the log.
    batch_loss(batch, step, rows, generator) → losses (B,) and what they depend on, shares (B,) in 0…1 or None; generator:
    for what is drawn for the whole global batch. preview() → a Pillow image, drawn from the weights; save(state) writes the
    run's model from a state of whole tensors. ValueError if --batch-size cannot be shared out, the folder cannot be
    written, or the loss is no number for --patience steps in a row.
    """
    folder, device = Path(config.out), next(model.parameters()).device
    if config.batch_size % (distributed.world() * config.accumulate):
        raise ValueError(
            f"--batch-size {config.batch_size}: not a multiple of {distributed.world()} processes times --accumulate {config.accumulate}"
        )
    (folder / "samples").mkdir(parents=True, exist_ok=True)
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    ema = {name: p.detach().clone() for name, p in trained.items()}
    dtype, averaging = hardware.DTYPES[config.precision], distributed.Averaging(model)
    processor = hardware.processor(device)
    optimizers, first = make_optimizers(config, model, dtype), 0

    def losses_of(step, part):
        rows, generator = rows_of(config, part), generator_of(config, step, "loss")
        start = time.perf_counter()
        batch = read(step, rows)
        waited = time.perf_counter() - start
        with hardware.products_in(config.precision, device):
            loss, share = batch_loss(batch, step, rows, generator)
        return loss.float(), share, batch[0], waited

    if config.resume:
        first = checkpoints.load(folder, config, trained, ema, optimizers)
    log, rate = Log(folder, first), hardware.matmul_rate(device, dtype)
    # on a step of its own: counting may change the last bits of a result; uncompiled: what is met first while a mode is on
    # would never be compiled
    with torch.compiler.set_stance("force_eager"), dryrun.Flops() as counter:
        losses_of(first, 0)[0].mean().backward()
    averaging.wait()
    flops = counter.total * config.accumulate  # with --checkpointing, what is computed twice counts twice
    model.zero_grad(set_to_none=True)
    count = sum(p.numel() for p in trained.values())
    print(f"{folder}: {count / 1e6:.1f}M trained parameters on {device}, {config.precision} products, steps {first}…{config.steps}")

    def export():
        state = {}
        for name, tensor in model.state_dict().items():
            tensor = distributed.whole(ema.get(name, tensor))
            if distributed.rank() == 0:
                state[name] = tensor.cpu()
        if distributed.rank() == 0:
            save(state)
            log.draw()

    def write(step):
        made_by = dataclasses.asdict(config) | dict(processor=processor)
        checkpoints.save(folder, step, made_by, checkpoints.state_of(trained, ema, optimizers), config.keep)
        export()

    @torch.no_grad()
    def fill(weights):
        for name, p in trained.items():
            p.copy_(weights[name])

    def show(step):
        raw = {name: p.detach().clone() for name, p in trained.items()}
        for name, weights in (("", ema), ("-raw", raw)):  # in this order: the run goes on with the raw ones
            fill(weights)
            with torch.compiler.set_stance("force_eager"):  # a few batches of another shape: not worth the wait for a compiler
                image = preview()  # on every rank, since each may hold a share of the weights
            if distributed.rank() == 0:
                image.save(folder / "samples" / f"{step:06d}{name}.png")

    if first == config.steps:  # it may have ended between its last checkpoint and the model
        export()
    bar = tqdm(range(first, config.steps), initial=first, total=config.steps, mininterval=1,
               disable=None if distributed.rank() == 0 else True)  # fmt: skip
    losses, shares, waited, since, begin, skipped, stop = [], [], 0.0, time.perf_counter(), first, 0, Stop()
    try:
        for step in bar:
            for optimizer in optimizers:
                for group in optimizer.param_groups:
                    group["lr"] = config.lr * learning_rate(config, step)
            names = []
            for part in range(config.accumulate):
                averaging.switch(part == config.accumulate - 1)
                loss, share, some, wait = losses_of(step, part)
                names += some
                (loss.mean() / config.accumulate).backward()
                losses.append(loss.detach())
                shares.append(share)
                waited += wait
            averaging.wait()
            norm = distributed.whole(torch.nn.utils.clip_grad_norm_(trained.values(), config.max_norm)).item()
            if math.isfinite(norm):  # on all ranks or on none, as it is the norm of all
                skipped = 0
                for optimizer in optimizers:
                    optimizer.step()
                decay = min(config.ema, (1 + step) / (10 + step))  # warm-up: a short run must not average its first noise
                torch._foreach_lerp_(list(ema.values()), list(trained.values()), 1 - decay)
            else:
                skipped += 1
                losses, shares = losses[: -config.accumulate], shares[: -config.accumulate]
                log(step=step + 1, skipped=[str(name) for name in distributed.gathered(names)], grad_norm=str(norm))
                if skipped == config.patience:
                    raise ValueError(
                        f"the gradient was no number in {skipped} steps in a row, the last of them {step + 1}; the last good "
                        f"checkpoint in {folder} is as it was. Try a lower --lr; {folder}/metrics.jsonl names the batches"
                    )
            model.zero_grad(set_to_none=True)
            done = step + 1
            stopped = distributed.total(stop.asked) > 0  # whichever rank was asked
            last = done == config.steps or stopped
            if (done % config.log_every == 0 or last) and losses:
                loss = torch.cat(losses)
                bins = dict(loss_bins=by_bin(loss, torch.cat(shares))) if share is not None else {}
                seconds = time.perf_counter() - since
                speed = (done - begin) / seconds
                mean = distributed.total(loss.mean().item()) / distributed.world()
                log(step=done, loss=mean, **bins, grad_norm=norm, lr=config.lr * learning_rate(config, step),
                    samples_per_s=speed * config.batch_size, mfu=speed * flops / rate, waiting=waited / seconds,
                    memory=memory_of(device))  # fmt: skip
                bar.set_postfix(loss=f"{mean:.4f}", mfu=f"{speed * flops / rate:.2f}", refresh=False)
                losses, shares, waited, since, begin = [], [], 0.0, time.perf_counter(), done
            if done % 20 == 0:  # it takes some 30 ms
                trim(device)
            if done % config.checkpoint_every == 0 or last:
                write(done)
            if stopped and done < config.steps:
                bar.close()
                print(f"stopped after step {done}, with a checkpoint. Go on with the same command and --resume")
                sys.exit(0)
            if config.sample_every > 0 and (done % config.sample_every == 0 or last):
                show(done)
    finally:
        stop.over()
    fill(ema)  # the caller goes on with the EMA
    rows = [row for row in log.rows if "loss" in row]
    if rows and rows[-1].get("loss_bins"):
        bins = ("-" if b is None else f"{b:.3f}" for b in rows[-1]["loss_bins"])
        print("loss by timestep, clean to noise:", "  ".join(bins))
    if rows:
        print(f"model FLOP utilisation {rows[-1]['mfu']:.2f} of the {rate / 1e9:.0f} GFLOP/s of a matrix product here")
    return log
