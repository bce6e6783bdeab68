"""What a run writes down while it goes on, and what it asks of its process: metrics, curves, memory,
signals."""
import contextlib
import ctypes
import importlib.util
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
    """metrics.jsonl and loss.png in the run's folder, and event files where TensorBoard is installed. Rank 0
    writes them. A run that goes on after `step` keeps what was logged up to there."""

    def __init__(self, folder, step):
        self.path = folder / "metrics.jsonl"
        self.rows = []
        self.events = None
        if distributed.rank() > 0:
            return
        if importlib.util.find_spec("tensorboard"):
            from torch.utils.tensorboard import SummaryWriter

            self.events = SummaryWriter(folder, purge_step=step)
        lines = self.path.read_text().splitlines() if step and self.path.exists() else []
        whole = [json.loads(line) for line in lines if line.endswith("}")]  # a full disk cuts the last one
        self.rows = [row for row in whole if row["step"] <= step]
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
        """loss.png: the loss, and the loss of each quarter of the noise levels, over the steps."""
        rows = [row for row in self.rows if "loss" in row]
        if not rows:
            return
        series = {"loss": ([row["step"] for row in rows], [row["loss"] for row in rows])}
        for i in range(len(rows[0].get("loss_bins", []))):
            points = [(row["step"], row["loss_bins"][i]) for row in rows if row["loss_bins"][i] is not None]
            series[f"t in {i}/4…{i + 1}/4"] = tuple(zip(*points)) if points else ([], [])
        curves = figures.curves(series, "training loss, and by timestep", (720, 360))
        curves.save(self.path.parent / "loss.png")

    def summarise(self, rate):
        """Prints the last loss by noise level, and how fast the run was."""
        rows = [row for row in self.rows if "loss" in row]
        if not rows:
            return
        if rows[-1].get("loss_bins"):
            bins = ["-" if mean is None else f"{mean:.3f}" for mean in rows[-1]["loss_bins"]]
            print("loss by timestep, clean to noise:", "  ".join(bins))
        mfu = rows[-1]["mfu"]
        print(f"model FLOP utilisation {mfu:.2f} of the {rate / 1e9:.0f} GFLOP/s of a matrix product here")


class Window:
    """What happens between two lines of the log.

    flops: of one step. rate: FLOP/s of this machine's products. batch_size: of a step."""

    def __init__(self, flops, rate, batch_size, device):
        self.flops, self.rate, self.batch_size, self.device = flops, rate, batch_size, device
        self.skipped = 0  # steps in a row whose gradient was not finite
        self.clear()

    def clear(self):
        self.losses, self.levels = [], []
        self.waited, self.steps, self.start = 0.0, 0, time.perf_counter()
        self.parts = []  # names of the samples of this step, a list for each of its parts

    @contextlib.contextmanager
    def waiting(self):
        """with window.waiting(): the time that data are waited for."""
        start = time.perf_counter()
        yield
        self.waited += time.perf_counter() - start

    def add(self, losses, levels, names):
        self.losses.append(losses)
        self.levels.append(levels)
        self.parts.append(names)

    def end_step(self, norm, step, log, patience):
        """Counts a step. If its gradient was not finite, its losses are left out and the log names its
        samples. ValueError at the `patience`-th such step in a row."""
        parts, self.parts = self.parts, []
        self.steps += 1
        if step % 20 == 0:
            trim(self.device)
        if math.isfinite(norm):
            self.skipped = 0
            return
        self.skipped += 1
        del self.losses[-len(parts) :], self.levels[-len(parts) :]
        names = distributed.gathered(sum(parts, []))
        log(step=step, skipped=[str(name) for name in names], grad_norm=str(norm))
        if self.skipped == patience:
            run = log.path.parent
            raise ValueError(
                f"the gradient was no number in {patience} steps in a row, the last of them {step}; the last "
                f"good checkpoint in {run} is as it was. Try a lower --lr; {log.path} names the batches"
            )

    def write(self, log, bar, step, norm, lr):
        """A line of the log: the mean loss, by noise level too; samples a second; the share of the machine's
        FLOP/s; the share of the time that data were waited for; GiB of memory, at most."""
        if not self.losses:
            return
        losses = torch.cat(self.losses)
        bins = {}
        if self.levels[0] is not None:
            bins = dict(loss_bins=by_bin(losses, torch.cat(self.levels)))
        loss = distributed.total(losses.mean().item()) / distributed.world()
        seconds = time.perf_counter() - self.start
        speed = self.steps / seconds
        mfu = speed * self.flops / self.rate
        log(
            step=step, loss=loss, **bins, grad_norm=norm, lr=lr, samples_per_s=speed * self.batch_size,
            mfu=mfu, waiting=self.waited / seconds, memory=memory_of(self.device),
        )
        bar.set_postfix(loss=f"{loss:.4f}", mfu=f"{mfu:.2f}", refresh=False)
        self.clear()


def progress(title, first, steps):
    """Prints a run's first line. Returns the numbers of its steps, with a bar on rank 0."""
    print(f"{title}, steps {first}…{steps}")
    hidden = None if distributed.rank() == 0 else True
    return tqdm(range(first, steps), initial=first, total=steps, mininterval=1, disable=hidden)


def by_bin(values, shares, bins=4):
    """The mean of values (K,) in each quarter of shares (K,) in 0…1; None where there is none."""
    which = (shares * bins).long().clamp(max=bins - 1)
    return [values[which == i].mean().item() if (which == i).any() else None for i in range(bins)]


def memory_of(device):
    """GiB that this process has taken at most."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**30
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20


def trim(device):
    """Gives freed memory back to the system. On Linux the C library keeps it, in pieces that the next step's
    tensors do not fit: without this, S/2 on a CPU takes some 30 MB more with every step."""
    if device.type == "cpu" and sys.platform == "linux":
        library = ctypes.CDLL(None)
        if hasattr(library, "malloc_trim"):
            library.malloc_trim(0)


class StopSignals:
    """SIGTERM (a cluster takes the machine back) and SIGINT (Ctrl-C) ask the run to end after the step, with
    a checkpoint."""

    def __enter__(self):
        self.asked = False
        self.before = {number: signal.signal(number, self.ask) for number in (signal.SIGTERM, signal.SIGINT)}
        return self

    def ask(self, number, frame):
        self.asked = True

    def on_any_rank(self):
        return distributed.total(self.asked) > 0

    def report(self, step):
        return f"stopped after step {step}, with a checkpoint. Go on with the same command and --resume"

    def __exit__(self, *error):
        for number, handler in self.before.items():
            signal.signal(number, handler)
