"""The training loop that all stages share: the order of the data, the optimizers, the log, the checkpoint.

Step i of a run draws its batch and its noise from (seed, i) alone. A resumed run is therefore the same, bit for bit,
as one that was never interrupted, and there is no random state to save.
"""
import dataclasses
import functools
import json
import os
import sys
import time
from pathlib import Path

import torch
from torch.utils.flop_counter import FlopCounterMode
from tqdm import tqdm

import pictures
from muon import Muon


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


def matmul_rate(device, dtype=torch.float32, n=2048, repeats=4):
    """FLOP/s of a square product on this machine: the yardstick for the step's own rate."""
    a = torch.randn(n, n, device=device, dtype=dtype)
    best = 0.0
    for _ in range(repeats):
        start = time.perf_counter()
        (a @ a)[0, 0].item()
        best = max(best, 2 * n**3 / (time.perf_counter() - start))
    return best


def computing_dtype(precision, device):
    """The dtype of the products in training (weights, their gradients and the optimizer stay in fp32). "auto" measures
    which is faster here: with instructions for it, bf16 is so by far; without, it is slower by far."""
    if precision == "auto":
        faster = matmul_rate(device, torch.bfloat16, 1024, 8) > matmul_rate(device, torch.float32, 1024, 8)
        precision = "bf16" if faster else "fp32"
    return dict(fp32=torch.float32, bf16=torch.bfloat16)[precision]


class Log:
    """metrics.jsonl and loss.png. On resume, keeps what was logged before the checkpoint's step."""

    def __init__(self, folder, step):
        self.path = folder / "metrics.jsonl"
        lines = self.path.read_text().splitlines() if step and self.path.exists() else []
        self.rows = [row for row in map(json.loads, lines) if row["step"] <= step]
        self.path.write_text("".join(json.dumps(row) + "\n" for row in self.rows))

    def __call__(self, **row):
        self.rows.append(row)
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


def fit(config, model, batch_loss, preview, save):
    """The loop that all stages share.

    batch_loss(step, generator) → losses (B,) and what they depend on, shares (B,) in 0…1 or None; preview(step) draws
    from the EMA weights; save(state) writes the run's model from an EMA state.
    """
    folder, device = Path(config.out), next(model.parameters()).device
    (folder / "samples").mkdir(parents=True, exist_ok=True)
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    ema = {name: p.detach().clone() for name, p in trained.items()}
    dtype = computing_dtype(config.precision, device)
    optimizers, first = make_optimizers(config, model, dtype), 0

    def losses_of(step, generator):
        with torch.autocast(device.type, torch.bfloat16, enabled=dtype is torch.bfloat16):
            loss, share = batch_loss(step, generator)
        return loss.float(), share

    checkpoint = folder / "checkpoint.pt"
    if config.resume:
        first = load_checkpoint(checkpoint, config, trained, ema, optimizers)
    log, rate = Log(folder, first), matmul_rate(device, dtype)
    with FlopCounterMode(display=False) as counter:  # on a step of its own: counting may change the last bits of a result
        losses_of(first, torch.Generator().manual_seed(0))[0].mean().backward()
    flops = counter.get_total_flops()
    model.zero_grad(set_to_none=True)
    count = sum(p.numel() for p in trained.values())
    print(f"{folder}: {count / 1e6:.1f}M trained parameters on {device}, {str(dtype)[6:]} products, steps {first}…{config.steps}")

    def write(step):
        weights_now = dict(model=trained, ema=ema, optimizers=[o.state_dict() for o in optimizers])
        torch.save(weights_now | dict(step=step, config=dataclasses.asdict(config)), f"{checkpoint}.tmp")
        os.replace(f"{checkpoint}.tmp", checkpoint)
        save(model.state_dict() | ema)
        log.draw()

    bar = tqdm(range(first, config.steps), initial=first, total=config.steps, disable=None, mininterval=1)
    losses, shares, since, begin = [], [], time.perf_counter(), first
    step = first
    try:
        for step in bar:
            generator = torch.Generator().manual_seed(config.seed * 1_000_003 + step)
            for optimizer in optimizers:
                for group in optimizer.param_groups:
                    group["lr"] = config.lr * learning_rate(config, step)
            loss, share = losses_of(step, generator)
            loss.mean().backward()
            norm = torch.nn.utils.clip_grad_norm_(trained.values(), config.max_norm)
            for optimizer in optimizers:
                optimizer.step()
                optimizer.zero_grad(set_to_none=True)
            decay = min(config.ema, (1 + step) / (10 + step))  # warm-up: a short run must not average its first noise
            torch._foreach_lerp_(list(ema.values()), list(trained.values()), 1 - decay)
            losses.append(loss.detach())
            shares.append(share)
            done = step + 1
            if done % config.log_every == 0 or done == config.steps:
                loss = torch.cat(losses)
                bins = dict(loss_bins=by_bin(loss, torch.cat(shares))) if share is not None else {}
                speed = (done - begin) / (time.perf_counter() - since) if done > begin else 0.0
                log(step=done, loss=loss.mean().item(), **bins, grad_norm=norm.item(), lr=config.lr * learning_rate(config, step),
                    samples_per_s=speed * config.batch_size, mfu=speed * flops / rate)  # fmt: skip
                bar.set_postfix(loss=f"{loss.mean():.4f}", mfu=f"{speed * flops / rate:.2f}", refresh=False)
                losses, shares, since, begin = [], [], time.perf_counter(), done
            if done % config.checkpoint_every == 0 or done == config.steps:
                write(done)
            if done % config.sample_every == 0 or done == config.steps:
                raw = {name: p.detach().clone() for name, p in trained.items()}
                torch._foreach_copy_([p.data for p in trained.values()], list(ema.values()))
                preview(done)
                torch._foreach_copy_([p.data for p in trained.values()], list(raw.values()))
    except KeyboardInterrupt:
        bar.close()
        print(f"\nstopped in step {step + 1}. Go on from the last checkpoint with the same command and --resume")
        sys.exit(130)
    with torch.no_grad():
        torch._foreach_copy_([p.data for p in trained.values()], list(ema.values()))  # the caller goes on with the EMA
    bins = log.rows[-1].get("loss_bins") if log.rows else None
    if bins:
        print("loss by timestep, clean to noise:", "  ".join("-" if b is None else f"{b:.3f}" for b in bins))
    if log.rows:
        print(f"model FLOP utilisation {log.rows[-1]['mfu']:.2f} of the {rate / 1e9:.0f} GFLOP/s of a matrix product here")
    return log


def load_checkpoint(path, config, trained, ema, optimizers):
    """Fills weights, EMA and optimizers from a run's checkpoint; returns the number of steps done. Nothing in the file
    is executed. ValueError if it is missing, damaged or of another model."""
    if not path.exists():
        raise ValueError(f"--resume: there is no {path}; start without --resume")
    try:
        saved = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:
        raise ValueError(f"{path} is damaged or holds more than weights: {str(error).splitlines()[0]}") from None
    for key in (
        "size", "data", "integration", "image_size", "seed", "batch_size", "steps", "lr", "optimizer", "schedule", "target",
        "clips", "frames", "init", "joint", "motion_free_mask", "only_temporal", "p_motion_free", "one_frame", "two_frames", "four_frames",
    ):  # fmt: skip
        if saved["config"].get(key) != getattr(config, key):
            flag = f"--{key.replace('_', '-')}"
            raise ValueError(f"--resume: {path} was made with {flag} {saved['config'].get(key)}, not {getattr(config, key)}")
    shapes = {name: p.shape for name, p in saved["model"].items()}
    if shapes != {name: p.shape for name, p in trained.items()}:
        raise ValueError(f"--resume: the weights in {path} are of another model; give the flags it was made with")
    with torch.no_grad():
        for name in trained:
            trained[name].copy_(saved["model"][name])
            ema[name].copy_(saved["ema"][name])
    for optimizer, state in zip(optimizers, saved["optimizers"]):
        optimizer.load_state_dict(state)
    return saved["step"]
