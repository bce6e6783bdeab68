"""Training, stage by stage.

    python train.py autoencoder      pictures → latents and back
    python train.py image            captions → latents, with that autoencoder frozen

A run leaves in its folder: model.safetensors (EMA weights and the whole config; what sample.py and evaluate.py read),
checkpoint.pt (to --resume), metrics.jsonl, loss.png and samples/. Every field of Config is a flag.

Step i of a run draws its batch and its noise from (seed, i) alone. A resumed run is therefore the same, bit for bit,
as one that was never interrupted, and there is no random state to save.
"""
import dataclasses
import functools
import json
import os
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import torch
from torch.utils.flop_counter import FlopCounterMode
from tqdm import tqdm

import attention
import autoencoder as autoencoders
import data
import pictures
import weights
from autoencoder import Autoencoder, AutoencoderConfig, check_scale, psnr
from dit import SIZES, ModelConfig
from muon import Muon
from sample import TextToImage, device_of, from_bytes, parse_flags, to_bytes, words_of
from text_encoders import T5Config, Tokenizer


@dataclass
class Config:
    """The flags. The defaults are the laptop demo's; a size other than mini takes PAPER's values for what is not given."""

    size: str = "mini"
    data: str = "shapes"  # or a folder of pictures with captions
    image_size: int = 64  # pixels, each way
    integration: str = "cross"  # cross: text by cross-attention; adaln: pooled text alone
    out: str = ""  # the run's folder; runs/STAGE-DATA if not given
    autoencoder: str = ""  # an autoencoder's run; runs/autoencoder-DATA if not given, trained first if missing
    steps: int = 0  # 0: the recipe's
    batch_size: int = 128  # words of place are learned from large batches, hardly at all from 64
    optimizer: str = "muon"  # muon (for the matrices in the blocks, with AdamW for the rest) or adamw
    lr: float = 3e-3
    warmup: int = 50  # steps of rising learning rate
    cooldown: float = 0.4  # share of the steps, at the end, in which the learning rate falls to zero
    weight_decay: float = 0.0
    clip: float = 1.0  # largest norm of the gradient
    ema: float = 0.999
    schedule: str = "cosine"  # cosine or linear
    target: str = "velocity"  # velocity, noise or x0
    learned_variance: bool = False
    shift: float = 6.0  # above 1: more of the training at high noise
    qk_norm: bool = True
    caption_dropout: float = 0.1
    text_depth: int = 2  # blocks of the text encoder that trains along
    latent_channels: int = 8  # of a new autoencoder
    seed: int = 0
    log_every: int = 100
    sample_every: int = 0  # 0: four times a run
    checkpoint_every: int = 500
    resume: bool = False
    fused: bool = True  # false: the written-out attention
    device: str = "auto"


# The paper's objective and optimizer (section 4; DiT's where it is silent).
PAPER = dict(
    optimizer="adamw", lr=1e-4, warmup=0, cooldown=0.0, ema=0.9999, schedule="linear", target="noise", shift=1.0, qk_norm=False,
    batch_size=256, steps=400_000, checkpoint_every=5000, log_every=100,
)  # fmt: skip
STEPS = {"autoencoder": 800, "image": 1500}  # the demo's
AUTOENCODER = dict(optimizer="muon", batch_size=16, lr=2e-3, cooldown=0.5)


CHOICES = dict(
    optimizer=("adamw", "muon"), schedule=("linear", "cosine"), target=("noise", "velocity", "x0"), integration=("cross", "adaln")
)  # fmt: skip


def read_flags(stage, arguments):
    """Command line → Config. ValueError for a flag or value that makes no sense."""
    given = Config()
    defaults = dict(vars(given))
    rest = parse_flags(given, arguments)
    if rest:
        raise ValueError(f"{rest[0]!r} is not a flag; flags look like --size mini")
    if given.size not in SIZES:
        raise ValueError(f"--size {given.size}: not one of {', '.join(SIZES)}")
    recipe = AUTOENCODER if stage == "autoencoder" else PAPER if given.size != "mini" else {}
    named = {word[2:].partition("=")[0].replace("-", "_") for word in arguments if word.startswith("--")}
    config = Config(**defaults | recipe | {name: getattr(given, name) for name in named})
    name = Path(config.data).name or "data"
    config.steps = config.steps or STEPS[stage]
    config.out = config.out or f"runs/{stage}-{name}"
    config.autoencoder = config.autoencoder or f"runs/autoencoder-{name}"
    config.sample_every = config.sample_every or max(1, config.steps // 4)
    for field, choices in CHOICES.items():
        if getattr(config, field) not in choices:
            raise ValueError(f"--{field} {getattr(config, field)}: not one of {', '.join(choices)}")
    if config.image_size % 16 or config.image_size < 16:
        raise ValueError(f"--image-size {config.image_size}: must be a multiple of 16")
    for field in ("batch_size", "steps", "log_every", "sample_every", "checkpoint_every", "latent_channels", "text_depth"):
        if getattr(config, field) < 1:
            raise ValueError(f"--{field.replace('_', '-')} {getattr(config, field)}: must be at least 1")
    device_of(config.device)
    return config


def make_optimizers(config, model):
    """Muon for the matrices inside the blocks (not the adaLN tables, whose input is one vector a sample), AdamW for
    the rest; or AdamW for all. Returns a list."""
    named = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    inside = [
        p for name, p in named
        if config.optimizer == "muon" and p.ndim >= 2 and "modulation" not in name
        and any(part in name for part in ("blocks.", "coder.")) and min(p.shape[:2]) >= 48
    ]  # fmt: skip
    chosen = set(map(id, inside))
    rest = [p for _, p in named if id(p) not in chosen]
    adamw = torch.optim.AdamW(rest, config.lr, betas=(0.9, 0.99), weight_decay=config.weight_decay, fused=True)
    return ([Muon(inside, config.lr, weight_decay=config.weight_decay)] if inside else []) + [adamw]


def learning_rate(config, step):
    """The share of --lr at a step: rises over `warmup`, stays, and falls over the last `cooldown` of the run."""
    left = (config.steps - step) / max(1, config.cooldown * config.steps)
    return min(1.0, (step + 1) / (config.warmup + 1), left)


@functools.lru_cache(maxsize=2)
def permutation(count, seed, epoch):
    return torch.randperm(count, generator=torch.Generator().manual_seed(seed * 100_003 + epoch))


def batch_indices(step, count, batch_size, seed):
    """The indices of batch `step` in an endless row of shuffled epochs over `count` samples: (batch_size,) integers."""
    position = torch.arange(step * batch_size, (step + 1) * batch_size)
    return torch.stack([permutation(count, seed, p // count)[p % count] for p in position.tolist()])


def matmul_rate(device, n=2048, repeats=4):
    """FLOP/s of a square fp32 product on this machine: the yardstick for the step's own rate."""
    a = torch.randn(n, n, device=device)
    best = 0.0
    for _ in range(repeats):
        start = time.perf_counter()
        (a @ a)[0, 0].item()
        best = max(best, 2 * n**3 / (time.perf_counter() - start))
    return best


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
    optimizers, first = make_optimizers(config, model), 0
    checkpoint = folder / "checkpoint.pt"
    if config.resume:
        first = load_checkpoint(checkpoint, config, trained, ema, optimizers)
    log, rate = Log(folder, first), matmul_rate(device)
    with FlopCounterMode(display=False) as counter:  # on a step of its own: counting may change the last bits of a result
        batch_loss(first, torch.Generator().manual_seed(0))[0].mean().backward()
    flops = counter.get_total_flops()
    model.zero_grad(set_to_none=True)
    count = sum(p.numel() for p in trained.values())
    print(f"{folder}: {count / 1e6:.1f}M trained parameters on {device}, steps {first}…{config.steps}")

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
            loss, share = batch_loss(step, generator)
            loss.mean().backward()
            norm = torch.nn.utils.clip_grad_norm_(trained.values(), config.clip)
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
    for key in ("size", "data", "integration", "image_size", "seed", "batch_size", "steps", "lr", "optimizer", "schedule", "target"):
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


def report_skipped(dataset):
    """One line for every file that the data set could not use."""
    if dataset.skipped:
        print(f"{len(dataset.skipped)} of {len(dataset.skipped) + len(dataset.captions)} files were left out:")
        for path, reason in dataset.skipped[:20]:
            print(f"  {path}: {reason}")
        if len(dataset.skipped) > 20:
            print(f"  … and {len(dataset.skipped) - 20} more")


def train_autoencoder(config, dataset=None):
    dataset = dataset or data.load(config.data, config.image_size, config.seed)
    report_skipped(dataset)
    device = device_of(config.device)
    torch.manual_seed(config.seed)
    model = Autoencoder(AutoencoderConfig(config.latent_channels)).to(device)
    side = config.image_size // model.factor

    def batch(indices):
        return from_bytes(dataset.pictures(indices)).to(device)

    model.start_from(batch(batch_indices(0, len(dataset.captions), 512, config.seed)))

    check = data.load("shapes", config.image_size, config.seed + 1) if config.data == "shapes" else dataset
    check = from_bytes(check.pictures(range(min(256, len(check.captions))))).to(device)  # a folder's own pictures

    def batch_loss(step, generator):
        images = batch(batch_indices(step, len(dataset.captions), config.batch_size, config.seed))
        noise = torch.randn(len(images), config.latent_channels, side, side, generator=generator).to(device)
        return model.loss(images, noise), None

    def preview(step):
        with torch.no_grad():
            images = torch.stack([check[:8], model.decode(model.encode(check[:8]))]).flatten(0, 1)
        pictures.grid(to_bytes(images).cpu(), columns=8).save(f"{config.out}/samples/{step:06d}.png")

    def save(state):
        metadata = dict(config=json.dumps(describe(config, autoencoder=vars(model.config))))
        weights.write(f"{config.out}/model.safetensors", state, metadata)

    log = fit(config, model, batch_loss, preview, save)
    model.calibrate(batch(batch_indices(0, len(dataset.captions), 512, config.seed)))
    save(model.state_dict())
    check_scale(model.encode(check))
    quality = psnr(model, check)
    log(step=config.steps, psnr=quality)
    print(f"autoencoder: {quality:.1f} dB on {len(check)} {'fresh' if config.data == 'shapes' else 'of the'} pictures → {config.out}")


def describe(config, **parts):
    """What a checkpoint says of itself: the flags, and the arguments of each part."""
    return dict(flags=dataclasses.asdict(config), image_size=config.image_size, **parts)


def train_image(config):
    dataset = data.load(config.data, config.image_size, config.seed)
    report_skipped(dataset)
    if not (Path(config.autoencoder) / "model.safetensors").exists() and not config.resume:
        print(f"no autoencoder in {config.autoencoder} yet: training one first")
        flags = ["--data", config.data, "--image-size", str(config.image_size), "--out", config.autoencoder,
                 "--seed", str(config.seed), "--device", config.device]  # fmt: skip
        train_autoencoder(read_flags("autoencoder", flags), dataset)
    autoencoder = autoencoders.load(config.autoencoder)
    device = device_of(config.device)

    tokenizer = Tokenizer.train(dataset.captions)
    text = T5Config(vocabulary=len(tokenizer), depth=config.text_depth)
    C = autoencoder.config.channels
    model = ModelConfig.of(
        config.size, channels=C, out_channels=C * (2 if config.learned_variance else 1),
        integration=config.integration, text_width=text.width, qk_norm=config.qk_norm,
    )  # fmt: skip
    diffusion = dict(schedule=config.schedule, target=config.target, learned_variance=config.learned_variance, shift=config.shift)
    words = sorted({word for caption in dataset.captions for word in words_of(caption)})
    torch.manual_seed(config.seed)
    model = TextToImage(
        describe(config, model=vars(model), text=vars(text), autoencoder=vars(autoencoder.config), diffusion=diffusion, words=words),
        tokenizer,
    )  # fmt: skip
    model.autoencoder.load_state_dict(autoencoder.state_dict())
    model.to(device)

    with torch.no_grad():  # the autoencoder is frozen: every picture is encoded once
        parts = torch.arange(len(dataset.captions)).split(256)
        latents = [
            model.autoencoder.encode(from_bytes(dataset.pictures(part)).to(device)).cpu()
            for part in tqdm(parts, desc="encoding", disable=None, leave=False)
        ]
    latents = torch.cat(latents)  # (N, C, h, w)
    check_scale(latents)

    def batch_loss(step, generator):
        indices = batch_indices(step, len(latents), config.batch_size, config.seed)
        x0 = latents[indices].to(device)  # (B, C, h, w)
        tokens, mask = (a.to(device) for a in tokenizer([dataset.captions[i] for i in indices]))  # (B, L)
        t = model.diffusion.random_timesteps(len(x0), generator).to(device)
        noise = torch.randn(x0.shape, generator=generator).to(device)
        dropped = (torch.rand(len(x0), generator=generator) < config.caption_dropout).to(device)
        loss = model.diffusion.loss(lambda x, t: model(x, t, tokens, mask, dropped), x0, t, noise)
        return loss, (t / model.diffusion.steps).cpu()

    prompts = [dataset.captions[i] for i in range(16)] if len(latents) >= 16 else dataset.captions

    def preview(step):
        pictures.grid(model.generate(prompts), prompts).save(f"{config.out}/samples/{step:06d}.png")

    fit(config, model, batch_loss, preview, lambda state: model.save(f"{config.out}/model.safetensors", state))
    print(f"image model → {config.out}. Now: python sample.py \"{prompts[0]}\"")


STAGES = {"autoencoder": train_autoencoder, "image": train_image}


def main(arguments):
    if not arguments or arguments[0] not in STAGES:
        raise ValueError(f"say what to train: python train.py {'|'.join(STAGES)} [--flag value …]")
    config = read_flags(arguments[0], arguments[1:])
    attention.FUSED = config.fused
    STAGES[arguments[0]](config)


if __name__ == "__main__":
    try:
        main(sys.argv[1:])
    except (ValueError, OSError) as error:
        sys.exit(f"train.py: {error}")
