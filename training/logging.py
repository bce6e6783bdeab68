"""What a run writes down, and what it asks of its process: metrics, curves, memory, signals."""
import contextlib
import ctypes
import json
import math
import resource
import signal
import sys
import time

import torch
from tqdm import tqdm

from common import figures
from training import distributed


class Log:
    """metrics.jsonl and loss.png in the run's folder, and event files where TensorBoard is installed: an
    extra, whose failure stops no run. Rank 0 writes them. A run that goes on after `step` keeps what was
    logged up to there."""

    def __init__(self, folder, step):
        self.path = folder / "metrics.jsonl"
        self.rows, self.events = [], None  # rows: those with a loss; a skipped step has none
        if distributed.rank() > 0:
            return
        lines = self.path.read_text().splitlines() if step and self.path.exists() else []
        rows = [json.loads(line) for line in lines if line.endswith("}")]  # a full disk cuts the last one
        rows = [row for row in rows if row["step"] <= step]
        self.rows = [row for row in rows if "loss" in row]
        self.path.write_text("".join(json.dumps(row) + "\n" for row in rows))
        with contextlib.suppress(Exception):
            from torch.utils.tensorboard import SummaryWriter

            self.events = SummaryWriter(folder, purge_step=step)

    def __call__(self, **row):
        if distributed.rank() > 0:
            return
        if "loss" in row:
            self.rows.append(row)
        with self.path.open("a") as file:
            file.write(json.dumps(row) + "\n")
        with contextlib.suppress(Exception):
            for name, value in row.items():
                if self.events and isinstance(value, (int, float)):
                    self.events.add_scalar(name, value, row["step"])

    def draw(self):
        """loss.png: the loss, and the loss of each quarter of the noise levels, over the steps."""
        if not self.rows:
            return
        series = {"loss": ([row["step"] for row in self.rows], [row["loss"] for row in self.rows])}
        for i in range(len(self.rows[0].get("loss_bins", []))):
            points = [(row["step"], row["loss_bins"][i]) for row in self.rows]
            points = [(step, mean) for step, mean in points if mean is not None]
            series[f"t in {i}/4…{i + 1}/4"] = tuple(zip(*points)) if points else ([], [])
        figures.curves(series, "training loss, and by timestep").save(self.path.parent / "loss.png")

    def summarise(self, rate):
        """Prints the last loss by noise level, and the share of `rate`, in FLOP/s, that the run reached."""
        if not self.rows:
            return
        last = self.rows[-1]
        if "loss_bins" in last:
            bins = ["-" if mean is None else f"{mean:.3f}" for mean in last["loss_bins"]]
            print("loss by timestep, clean to noise:", "  ".join(bins))
        product = f"the {rate / 1e9:.0f} GFLOP/s of a matrix product here"
        print(f"model FLOP utilisation {last['mfu']:.2f} of {product}")


class Window:
    """What happens between two lines of the log. flops: of one step. rate: FLOP/s of this machine's products.
    batch_size: of a step. patience: so many steps in a row may be skipped. What a GPU computes is looked at
    two steps later, when it is there: nothing waits for it."""

    def __init__(self, flops, rate, batch_size, patience, device):
        self.flops, self.rate, self.batch_size, self.device = flops, rate, batch_size, device
        self.patience = patience
        self.skipped = 0  # steps in a row whose gradient was not finite
        self.step = []  # (losses, levels, names of the samples) of each part of this step
        self.coming = []  # steps that were not looked at yet: number, norm of the gradient, event, `step`
        self.clear()

    def clear(self):
        self.parts = []  # those of all good steps
        self.waited, self.steps, self.start = 0.0, 0, time.perf_counter()

    @contextlib.contextmanager
    def waiting(self):
        """with window.waiting(): the time that data are waited for."""
        start = time.perf_counter()
        yield
        self.waited += time.perf_counter() - start

    def add(self, losses, levels, names):
        self.step.append((losses, levels, names))

    def end_step(self, norm, number, log):
        """Counts a step. norm: of its gradient, a tensor. ValueError as in `look`."""
        norm, computed = norm.to("cpu", non_blocking=self.device.type == "cuda"), None
        if self.device.type == "cuda":
            computed = torch.cuda.Event()
            computed.record()
        self.coming.append((number, norm, computed, self.step))
        self.step = []
        self.steps += 1
        if number % 20 == 0:
            trim(self.device)
        self.look(log, 2 if self.device.type == "cuda" else 0)

    def look(self, log, later=0):
        """Looks at all steps but the last `later`. If a gradient was not finite, the step's losses are left
        out and the log names its samples. ValueError at the `patience`-th such step in a row."""
        while len(self.coming) > later:
            number, norm, computed, step = self.coming.pop(0)
            if computed:
                computed.synchronize()
            self.norm = norm.item()
            if math.isfinite(self.norm):
                self.parts += step
                self.skipped = 0
                continue
            self.skipped += 1
            names = [part.tolist() if torch.is_tensor(part) else part for *_, part in step]
            names = distributed.gathered([str(name) for part in names for name in part])
            log(step=number, skipped=names, grad_norm=str(self.norm))
            if self.skipped == self.patience:
                raise ValueError(
                    f"the gradient was no number in {self.patience} steps in a row, the last of them "
                    f"{number}; the last good checkpoint in {log.path.parent} is as it was. Try a lower "
                    f"--lr; {log.path} names the batches"
                )

    def write(self, log, bar, step, lr):
        """A line of the log: the mean loss, by noise level too; samples a second; the share of the machine's
        FLOP/s; the share of the time that data were waited for; GiB of memory, at most."""
        self.look(log)
        if not self.parts:
            return
        losses, levels, _ = zip(*self.parts)
        losses = torch.cat(losses)
        bins = {} if levels[0] is None else dict(loss_bins=by_bin(losses, torch.cat(levels)))
        loss = distributed.total(losses.mean().item()) / distributed.world()
        seconds = time.perf_counter() - self.start
        speed = self.steps / seconds
        mfu = speed * self.flops / self.rate
        log(
            step=step, loss=loss, **bins, grad_norm=self.norm, lr=lr, samples_per_s=speed * self.batch_size,
            mfu=mfu, waiting=self.waited / seconds, memory=memory_of(self.device),
        )
        bar.set_postfix(loss=f"{loss:.4f}", mfu=f"{mfu:.2f}", refresh=False)
        self.clear()


def progress(title, first, steps):
    """Prints a run's first line. Returns the numbers of its steps, with a bar on rank 0."""
    print(f"{title}, steps {first}…{steps}")
    hidden = True if distributed.rank() else None  # None: unless it is shown in a terminal
    return tqdm(range(first, steps), initial=first, total=steps, mininterval=1, disable=hidden)


def by_bin(losses, levels, bins=4):
    """The mean over all ranks of losses (K,) in each quarter of noise levels (K,) in 0…1; None where there
    is none."""
    which = (levels * bins).long().clamp(max=bins - 1).cpu()
    sums = torch.bincount(which, losses.double().cpu(), minlength=bins)
    counts = torch.bincount(which, minlength=bins)
    sums, counts = distributed.total([sums.tolist(), counts.tolist()])
    return [total / count if count else None for total, count in zip(sums, counts)]


def memory_of(device):
    """GiB that this process has taken at most."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**30
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / (2**30 if sys.platform == "darwin" else 2**20)  # macOS counts bytes, Linux KiB


def trim(device):
    """Gives freed memory back to the system. On Linux the C library keeps it, in pieces that the next step's
    tensors do not fit: without this, S/2 on a CPU takes some 30 MB more with every step."""
    if device.type == "cpu" and sys.platform == "linux":
        ctypes.CDLL(None).malloc_trim(0)


class StopSignals:
    """SIGTERM (a cluster takes the machine back) and SIGINT (Ctrl-C) ask the run to end after the step, with
    a checkpoint."""

    def __enter__(self):
        self.asked = False
        self.before = {number: signal.signal(number, self.ask) for number in (signal.SIGTERM, signal.SIGINT)}
        return self

    def ask(self, number, frame):
        self.asked = True

    def on_any_rank(self, step):
        """Whether any process was asked. Many of them speak about it at every fifth step."""
        if distributed.world() == 1:
            return self.asked
        return step % 5 == 0 and distributed.total(self.asked) > 0

    def __exit__(self, kind, error, traceback):
        for number, handler in self.before.items():
            signal.signal(number, handler)
        if self.asked and isinstance(error, Exception):  # Ctrl-C reaches a compiler too, and readers of data
            sys.exit(f"stopped within a step ({kind.__name__}): --resume goes on from the last checkpoint")
