"""Speed: this model against a matrix product, against its peers, and inside train.py's loop.

    python -m evaluation.benchmark [--device cuda] [--quick] [--json FILE]

Every row is a ratio within one run, since a machine's own speed wanders. What is compared is called in turn;
a row gives the median of the ratios, their spread in brackets, and the goal. The peers are diffusers' DiT and
PixArt, from requirements-dev.txt, on the same latents, texts and number of blocks; each row says what else
was equal. On a CPU the size is S/2 in fp32, on a GPU XL/2 in bf16.
"""
import contextlib
import io
import json
import statistics
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image

import train
from attention import use_attention
from common.flags import flag, read, run_command
from common.hardware import DTYPES, device_of, processor, products_in
from diffusion import motion_free_guidance
from dit import GenTron, ModelConfig
from encoders.autoencoder import Autoencoder, AutoencoderConfig
from evaluation.dry_run import random_inputs, training_step


class Bench:
    """Measures on a device, prints a row for each ratio, and keeps them."""

    def __init__(self, device, repeats):
        self.device, self.repeats, self.rows = device, repeats, []
        gpu = device.type == "cuda"
        self.precision = "bf16" if gpu else "fp32"
        self.wait = (lambda: torch.cuda.synchronize(device)) if gpu else (lambda: None)

    def seconds(self, function):
        self.wait()
        start = time.perf_counter()
        function()
        self.wait()
        return time.perf_counter() - start

    def compare(self, what, one, other, scale=1.0, goal="", equal=""):
        """A row: scale · seconds of `one` over seconds of `other`, called in turn after two calls each."""
        both = [(self.seconds(one), self.seconds(other)) for _ in range(self.repeats + 2)][2:]
        self.add(what, [scale * a / b for a, b in both], goal, equal)

    def add(self, what, ratios, goal="", equal=""):
        row = dict(what=what, median=statistics.median(ratios), low=min(ratios), high=max(ratios))
        self.rows.append(row | dict(goal=goal, equal=equal))
        print(f"{what}: {row['median']:.2f} ({row['low']:.2f}–{row['high']:.2f}){goal and ', goal ' + goal}")
        if equal:
            print(f"    {equal}")

    def step(self, model, *inputs, **more):
        """Forward and backward of a model, without an optimizer, as a function without arguments."""

        def step():
            with products_in(self.precision, self.device):
                output = model(*inputs, **more)
            output = output if torch.is_tensor(output) else output.sample
            output.float().square().mean().backward()
            model.zero_grad(set_to_none=True)

        return step


def build(device, size, count, frames=0, side=32, length=120, **changes):
    """A model of a size, and random inputs for it, with captions of `length` tokens."""
    model = GenTron(ModelConfig.of(size, **changes)).to(device)
    return model, random_inputs(model.config, count, frames, side, [length], device=device)


def against_a_product(bench, size, count, n):
    a = torch.randn(n, n, device=bench.device).to(DTYPES[bench.precision])
    product = lambda: a @ a

    def row(name, model, inputs, goal, equal):
        share = training_step(model.config, count, 0, 32, [120], checkpointing=False)[0] / (2 * n**3)
        step = bench.step(model, *inputs)
        bench.compare(f"{size}/2, {name}, over a product", product, step, share, goal, equal)

    model, inputs = build(bench.device, size, count, integration="class", classes=1000)
    goal = "0.83" if size == "S" else ""
    row("labels", model, inputs, goal, f"FLOP/s, {bench.precision}, {count} pictures of 256 tokens")
    for null in (1, 256):
        model, inputs = build(bench.device, size, count, text_widths=(4096,), null_tokens=(null,))
        about = f"text of 120×4096, null text of {null}"
        row(f"text, eager, null text of {null}", model, inputs, "", about)
        if bench.device.type == "cuda":
            for block in model.blocks:
                block.compile()
            row(f"text, compiled, null text of {null}", model, inputs, "0.62", about)


def against_peers(bench, size, count):
    try:
        from diffusers import DiTTransformer2DModel, PixArtTransformer2DModel
    except ImportError:
        print("no diffusers, so no peers: pip install -r requirements-dev.txt")
        return
    ours, (x, t, text, mask) = build(bench.device, size, count, text_widths=(4096,))
    D, heads, depth = ours.config.width, ours.config.heads, ours.config.depth
    shape = dict(num_attention_heads=heads, attention_head_dim=D // heads, num_layers=depth, sample_size=32)
    with contextlib.redirect_stderr(io.StringIO()):
        pixart = PixArtTransformer2DModel(
            **shape, in_channels=4, out_channels=4, cross_attention_dim=D, caption_channels=4096,
            use_additional_conditions=False,
        ).to(bench.device)
        dit = DiTTransformer2DModel(**shape, in_channels=4, out_channels=4).to(bench.device)
    given = dict(timestep=t, encoder_hidden_states=text[0], encoder_attention_mask=mask[0].float())
    millions = lambda model: f"{sum(p.numel() for p in model.parameters()) / 1e6:.0f}M parameters"
    equal = f"{count} pictures of 256 tokens, text of 120×4096, {bench.precision}, eager"
    equal += f"; {millions(ours)} against {millions(pixart)}"
    name = f"{size}/2, pictures a second over PixArt's"
    bench.compare(name, bench.step(pixart, x, **given), bench.step(ours, x, t, text, mask), 1, "1.05", equal)
    ours, (x, t, labels, _) = build(bench.device, size, count, integration="class", classes=1000)
    given = dict(timestep=t, class_labels=labels)
    equal = f"{count} pictures of 256 tokens, labels, {bench.precision}, eager; {millions(ours)} each"
    name = f"{size}/2, pictures a second over DiT's"
    bench.compare(name, bench.step(dit, x, **given), bench.step(ours, x, t, labels), 1, "1", equal)


def attention_rows(bench, size, count):
    model, inputs = build(bench.device, size, count, text_widths=(4096,))
    written, _ = build(bench.device, size, count, text_widths=(4096,))
    use_attention(model, "fused")
    use_attention(written, "written")
    name = f"{size}/2, written-out attention over fused, seconds"
    bench.compare(name, bench.step(written, *inputs), bench.step(model, *inputs))


def clips_and_guidance(bench, size, count):
    for size, side, clips in (("mini", 8, count), (size, 32, max(2, count // 8))):  # memory
        changes = dict(side=side, length=20, channels=8, out_channels=8)
        video, of_clips = build(bench.device, size, clips, 8, **changes, temporal=True)
        image, of_pictures = build(bench.device, size, clips * 8, **changes)
        one, other = bench.step(video, *of_clips), bench.step(image, *of_pictures)
        equal = f"{clips} clips of 8 frames against {8 * clips} pictures, eager"
        goal = "1.2 at most" if bench.device.type == "cpu" else "1.3 at most"
        bench.compare(f"{size}, a clip's frame over a picture, seconds", one, other, 1, goal, equal)
    model, (x, t, text, mask) = build(bench.device, "mini", count, 8, 8, 20, temporal=True)
    no = torch.zeros(count, dtype=torch.bool, device=bench.device)
    given = dict(text=text, text_mask=mask, dropped=no, motion_free=no)
    conditions = given, given | dict(dropped=~no), given | dict(dropped=~no, motion_free=~no)
    plain, guided = (motion_free_guidance(model, *conditions, *scales) for scales in ((1.0, 1.0), (7.5, 1.2)))
    with torch.no_grad():
        name = "mini, three guidance passes over one, seconds"
        bench.compare(name, lambda: guided(x, t), lambda: plain(x, t), 1, "2.95 at most")


def autoencoder_row(bench):
    """Pictures a second of the mini autoencoder's training, which is no ratio: of two runs."""
    batch, size = (1024, 128) if bench.device.type == "cuda" else (16, 64)
    model = Autoencoder(AutoencoderConfig()).to(bench.device)
    pictures = torch.rand(batch, 3, size, size, device=bench.device) * 2 - 1
    noise = torch.randn(batch, 8, size // 8, size // 8, device=bench.device)
    optimizer = torch.optim.AdamW(model.parameters(), fused=True)

    def step():
        with products_in(bench.precision, bench.device):
            loss = model.loss(pictures, noise)
        loss.float().mean().backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    rates = [batch / bench.seconds(step) for _ in range(bench.repeats + 2)][2:]
    bench.add(f"mini autoencoder, pictures of {size}² a second", rates, "15000" if size == 128 else "")


def loop_row(bench, size, count, steps):
    """train.py's pictures a second over those of its bare step: the same model, on the same batch."""
    rng = np.random.default_rng(0)
    with tempfile.TemporaryDirectory() as root, contextlib.redirect_stdout(io.StringIO()):
        for i in range(16):
            Image.fromarray(rng.integers(0, 256, (256, 256, 3), dtype=np.uint8)).save(f"{root}/{i}.png")
            Path(root, f"{i}.txt").write_text(f"picture {i} of noise, with a caption of some ten words or so")
        run = ["--data", root, "--image-size", "256", "--device", str(bench.device), "--sample-every", "-1"]
        train.main(["autoencoder", *run, "--steps", "1", "--batch-size", "4", "--out", f"{root}/ae"])
        run += ["--size", size, "--autoencoder", f"{root}/ae", "--precision", bench.precision]
        run += ["--batch-size", str(count), "--steps", str(steps), "--log-every", str(steps // 4)]
        compiled = ["--compile"] if bench.device.type == "cuda" else []
        train.main(["image", *run, *compiled, "--out", f"{root}/run"])
        lines = [json.loads(line) for line in Path(root, "run/metrics.jsonl").read_text().splitlines()]
    rates = [line["samples_per_s"] for line in lines[1:]]  # the first one holds the compilation
    changes = dict(channels=8, out_channels=16, text_widths=(128,), length=16)
    model, inputs = build(bench.device, size, count, **changes)
    for block in model.blocks if compiled else ():
        block.compile()
    step = bench.step(model, *inputs)
    bare = count / statistics.median([bench.seconds(step) for _ in range(bench.repeats + 2)][2:])
    equal = f"{count} pictures; the loop also reads, encodes the text, and runs optimizer, EMA and log"
    bench.add(f"train.py over its bare step, {size}/2", [rate / bare for rate in rates], "0.93", equal)


@dataclass
class Flags:
    device: str = flag("auto", "auto, cpu, cuda")
    quick: bool = flag(False, "three repetitions of each, to see that it works")
    json: str = flag("", "a file for the rows")


def main(arguments):
    flags, _, _ = read(Flags, arguments, "python -m evaluation.benchmark", __doc__.partition("\n")[0])
    if not Path(flags.json).parent.is_dir():
        raise ValueError(f"--json {flags.json}: there is no folder {Path(flags.json).parent}")
    device = device_of(flags.device)
    large = device.type == "cuda"
    size, count = ("XL", 64) if large else ("S", 8)
    bench = Bench(device, 3 if flags.quick else 9)
    print(f"{processor(device)}, {torch.get_num_threads()} threads, {bench.precision} products")
    try:
        against_a_product(bench, size, count, 8192 if large else 4096)
        against_peers(bench, size, count)
        attention_rows(bench, size, count)
        clips_and_guidance(bench, size, 64 if large else 2)
        autoencoder_row(bench)
        loop_row(bench, size, count, 80 if large else 8)
    finally:  # what was measured before an error
        if flags.json:
            about = dict(processor=processor(device), precision=bench.precision, repeats=bench.repeats)
            Path(flags.json).write_text(json.dumps(about | dict(rows=bench.rows), indent=1) + "\n")


if __name__ == "__main__":
    run_command(main)
