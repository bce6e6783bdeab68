"""Each claim of the paper as an experiment: the miniature is trained in two ways or more, and scored.

    python claims.py conditioning     one claim (python claims.py --help lists them)
    python claims.py all              all, which takes a night on 2 CPU cores
    python claims.py all --quick      a trial of the commands: two steps and one seed; it shows nothing

A claim is a function below. Its docstring says what the paper found; its body, which runs to compare. A run
that is done leaves a line in docs/claims/NAME.jsonl, and is not run again: delete the line to repeat it. From
these lines NAME.md and NAME.png are made. Trained models stay in runs/claims/; docs/claims.md discusses all.

All share the autoencoder of `make demo`, and claims about clips start from its image model. They are trained
first if there are none.
"""
import contextlib
import itertools
import json
import re
import shutil
import signal
import time
from dataclasses import dataclass
from pathlib import Path
from unittest import mock

import numpy as np
import torch
from torch import nn

import train
from common import figures
from common.flags import flag, read, run_command
from common.hardware import device_of, processor
from data import folder
from data.shapes import COLOURS, SHAPES, UNSEEN_COLOURS, Shapes
from diffusion import Diffusion
from dit import SIZES, ModelConfig, initialise
from encoders import autoencoders
from evaluate import composition, motion
from evaluation.dry_run import training_step
from evaluation.judge import judge, look
from evaluation.prompts import COLUMNS, moving_prompts
from sample import Pipeline
from training import models
from training.run_folder import finished
from training.text_pretraining import pretrain_clip, pretrain_t5

RUNS = Path("runs/claims")
SHOWN = ["a red circle above a blue square", "a striped green star left of a solid pink cross",
         "a small yellow circle and a big purple triangle", "a dotted cyan square"]
SHOWN_MOVING = ["a red circle moving left", "a striped pink star moving up"]


class Claim:
    """The runs of a claim. name: of its function. folder: of its lines, table and picture. quick: trains for
    two steps and judges one prompt a column."""

    def __init__(self, name, folder, seeds, quick):
        self.name, self.folder, self.seeds, self.quick = name, Path(folder), range(seeds), quick
        self.path, self.runs = self.folder / f"{name}.jsonl", RUNS / ("quick" if quick else "") / name

    def lines(self):
        """The dictionaries of all runs that are done. ValueError, naming the file, for a damaged line."""
        text = self.path.read_text() if self.path.exists() else ""
        try:
            found = [json.loads(line) for line in text.splitlines()]
        except ValueError:
            found = [{}]
        if not all({"row", "seed", "flags", "scores", "seconds", "machine"} <= line.keys() for line in found):
            raise ValueError(f"{self.path} has a line that is not of this command: delete that line")
        return found

    def run(self, row, seed, job, flags=""):
        """Does one run of a row of the table, unless it is done. job() → {score: number}. flags: those of its
        training. ValueError if it was done with others."""
        for line in self.lines():
            if (line["row"], line["seed"]) == (row, seed):
                if line["flags"] != flags:
                    raise ValueError(f"{self.path}: {row}, seed {seed} had other flags; delete its line")
                return
        print(f"\n{self.name}: {row}, seed {seed}", flush=True)
        if finished(self.folder_of(row, seed)):  # of a line that was deleted
            shutil.rmtree(self.folder_of(row, seed))
        start = time.perf_counter()
        line = dict(row=row, seed=seed, flags=flags, scores=job())
        line |= dict(seconds=round(time.perf_counter() - start), machine=processor(device_of()))
        self.folder.mkdir(parents=True, exist_ok=True)
        with self.path.open("a") as file:
            file.write(json.dumps(line) + "\n")

    def folder_of(self, row, seed):
        """Of a run: row "adaLN alone" → runs/claims/NAME/adaLN-alone-0."""
        return self.runs / re.sub(r"\W+", "-", f"{row}-{seed}")

    def train(self, stage, out, seed, flags, kind=Pipeline):
        """Trains, or goes on where it was stopped → the Pipeline, of this kind. flags: a string."""
        words = [stage, "--sample-every", "-1", *flags.split(), "--seed", str(seed), "--out", str(out)]
        if stage == "image":
            words += ["--autoencoder", str(self.autoencoder())]
        if stage == "video":
            words += ["--init", str(self.image_model())]
        self.call_train(words, out)
        return kind.load(out).on(device_of())

    def call_train(self, words, out):
        words += "--steps 2 --batch-size 4 --checkpoint-every 1".split() * self.quick
        resume = any(out.glob("checkpoints/*/config.json"))
        try:
            train.main(words + ["--resume"] * resume)
        except SystemExit:  # Ctrl-C; it has left a checkpoint
            raise KeyboardInterrupt(signal.SIGINT) from None

    def autoencoder(self):
        """Its folder; it is trained first, or to its end."""
        out = RUNS / "quick/autoencoder" if self.quick else Path("runs/autoencoder-shapes")
        if not finished(out):
            self.call_train(["autoencoder", "--out", str(out)], out)
        return out

    def image_model(self):
        """The folder of the image model that clips start from; it is trained first, or to its end."""
        out = RUNS / "quick/image" if self.quick else Path("runs/image-shapes")
        if not finished(out):
            self.train("image", out, 0, "")
        return out

    def images(self, rows):
        """Trains and scores an image model for each row and seed. rows: {row: flags}."""
        prompts = self.count(50)
        for seed in self.seeds:
            for row, flags in rows.items():
                out = self.folder_of(row, seed)
                job = lambda: of_image(self.train("image", out, seed, flags), prompts, out)
                self.run(row, seed, job, flags)

    def count(self, prompts):
        return 1 if self.quick else prompts

    def values(self, row, score):
        """The score of each seed."""
        found = [line["scores"] for line in self.lines() if line["row"] == row]
        return [scores[score] for scores in found if score in scores]

    def mean(self, row, score):
        return float(np.mean(self.values(row, score) or [0]))

    def table(self, rows, scores):
        """Markdown: mean ± standard deviation over seeds."""
        text = ["| | " + " | ".join(scores) + " |", "|---" * (len(scores) + 1) + "|"]
        for row in rows:
            cells = [spread(self.values(row, score)) for score in scores]
            count = len(self.values(row, scores[0]))
            fewer = f" ({count} of {len(self.seeds)} seeds)" * (0 < count < len(self.seeds))
            text.append(f"| {row}{fewer} | " + " | ".join(cells) + " |")
        return "\n".join(text)

    def higher(self, score, first, second):
        """Whether the first row's score is higher, in a sentence."""
        a, b = self.values(first, score), self.values(second, score)
        if not a or not b:
            return f"{score}: {first} against {second}: not run yet."
        verdict = "higher" if np.mean(a) > np.mean(b) else "not higher"
        if min(len(a), len(b)) > 1 and verdict == "higher":
            apart = np.mean(a) - np.std(a, ddof=1) > np.mean(b) + np.std(b, ddof=1)
            verdict += ", intervals apart" if apart else ", but the intervals overlap"
        return f"{score}: {first} {spread(a)}, {second} {spread(b)}: {verdict}."

    def page(self, table, verdicts, picture):
        """Writes NAME.md and, if there is one, NAME.png, a Pillow image."""
        self.folder.mkdir(parents=True, exist_ok=True)
        if picture:
            picture.save(self.folder / f"{self.name}.png")
        lines = self.lines()
        minutes = sum(line["seconds"] for line in lines) / 60
        machines = ", ".join(sorted({line["machine"] for line in lines}))
        seeds = len({line["seed"] for line in lines})
        about = "\n".join(line.strip() for line in CLAIMS[self.name].__doc__.splitlines()).strip()
        drawn = (self.folder / f"{self.name}.png").exists()
        made = f"`python claims.py {self.name}`: {len(lines)} runs, {seeds} seeds, {minutes:.0f} minutes on"
        parts = [f"# {self.name}", about, table, "\n".join(f"- {verdict}" for verdict in verdicts)]
        parts += [f"![{self.name}]({self.name}.png)"] * drawn + [f"{made}\n{machines}."]
        (self.folder / f"{self.name}.md").write_text("\n\n".join(parts) + "\n", encoding="utf-8")
        print(f"\n{table}\n\n" + "\n".join(verdicts) + f"\n→ {self.folder / self.name}.md")

    def samples(self, rows, prompts, kinds=itertools.repeat(Pipeline)):
        """A row of pictures or clips for each row of the table, by its model of seed 0, of these kinds; None
        if one is not on this disk."""
        folders = [self.folder_of(row, 0) for row in rows]
        if not all((folder / "model.safetensors").exists() for folder in folders):
            return None
        loaded = (kind.load(run).on(device_of()) for run, kind in zip(folders, kinds))
        made = torch.cat([model.generate(prompts) for model in loaded])
        names = [f"{row}: {prompt}" for row in rows for prompt in prompts]
        return figures.sheet(made, names) if made.ndim == 5 else figures.grid(made, names, len(prompts))


def changed(place, **parts):
    """with changed(module or class, name=value, …): … these names mean something else meanwhile."""
    return mock.patch.multiple(place, **parts) if parts else contextlib.nullcontext()


def spread(values):
    """Mean ± standard deviation; of one value, itself."""
    if len(values) < 2:
        return f"{values[0]:.2f}" if values else "–"
    return f"{np.mean(values):.2f} ± {np.std(values, ddof=1):.2f}"


def generator(model, **guidance):
    """Prompts → samples, some at a time."""
    part = 100 if not model.transformer.config.temporal else 16

    def generate(prompts):
        parts = [prompts[i : i + part] for i in range(0, len(prompts), part)]
        return torch.cat([model.generate(some, **guidance) for some in parts])

    return generate


def of_image(model, prompts, run):
    """{column: share, …, "seen", "unseen", "loss"} of an image model: evaluate.py's scores, and the loss in
    the last line of its run's log."""
    scores = composition(generator(model), prompts)
    columns = {column: score for column, score in scores["seen"].items() if column != "mean"}
    lines = map(json.loads, (run / "metrics.jsonl").read_text().splitlines())
    loss = [line["loss"] for line in lines if "loss" in line][-1]
    return columns | dict(seen=scores["seen"]["mean"], unseen=scores["unseen"]["mean"], loss=loss)


def of_clips(model, prompts, **guidance):
    """{"motion", "identity", "frames"} of a video model."""
    scores = motion(generator(model, **guidance), prompts)
    return dict(motion=scores["motion"], identity=scores["identity"], frames=scores["frames"]["mean"])


# ------------------------------------------------------------------------------------------------- the claims


def conditioning(claim):
    """For free text, cross-attention is better than adaLN alone: a mean of 47.8 against 34.3 on
    T2I-CompBench (section 4.2, table 2).

    Both train for the same time: a step of adaLN is shorter. Scores of evaluate.py, 50 prompts a column."""
    rows = {"cross-attention": "--steps 400", "adaLN alone": "--integration adaln --steps 540"}
    claim.images(rows)
    verdicts = [claim.higher(score, *rows) for score in ("seen", "unseen")]
    claim.page(claim.table(rows, [*COLUMNS, "seen", "unseen"]), verdicts, claim.samples(rows, SHOWN))


def encoders(claim):
    """T5 is a better text encoder than CLIP: means of 48.9 and 47.8 on T2I-CompBench; both in turn are best:
    49.1 (section 4.2, table 2).

    A CLIP and a T5 in miniature are trained on the captions (CLIP on their pictures too), and frozen, as
    theirs were: training/text_pretraining.py. Scores of evaluate.py, 50 prompts a column."""
    rows = {"CLIP": ["clip"], "T5": ["t5"], "both in turn": ["clip", "t5"]}
    for seed in claim.seeds:
        for row, names in rows.items():

            def job():
                texts = [f"--{name} {pretrained(claim, name, seed)}" for name in names]
                flags, out = " ".join(["--steps 400", *texts]), claim.folder_of(row, seed)
                return of_image(claim.train("image", out, seed, flags), claim.count(50), out)

            claim.run(row, seed, job)
    verdicts = [claim.higher("seen", *pair) for pair in (("T5", "CLIP"), ("both in turn", "T5"))]
    claim.page(claim.table(rows, [*COLUMNS, "seen", "unseen"]), verdicts, claim.samples(rows, SHOWN))


def pretrained(claim, name, seed):
    """The folder of a small "clip" or "t5", which is trained first if there is none."""
    out = claim.runs / f"text-{name}-{seed}"
    if not (out / "model.safetensors").exists():
        dataset = Shapes(64, seed=seed)
        steps = dict(steps=2, batch_size=4) if claim.quick else {}
        if name == "clip":
            pretrain_clip(out, dataset, autoencoders.load(claim.autoencoder()), seed, **steps)
        else:
            pretrain_t5(out, dataset.captions, seed, **steps)
    return out


def scale(claim):
    """A deeper, wider model is better: G/2 has a mean of 50.0 on T2I-CompBench, XL/2 49.1 (section 4.2).

    Depth × width, after 200 steps and after equal FLOPs; and depth, width and MLP width each changed alone.
    FLOPs are the transformer's. The loss is the mean of the last 10 steps; scores of evaluate.py, 50 prompts
    a column."""
    mini = SIZES["mini"]
    sizes = {"3×96": dict(depth=3, width=96), "4×128": dict(depth=4, width=128), "6×192": {},
             "8×256": dict(depth=8, width=256)}
    alone = {"2×192, less depth": dict(depth=2), "6×96, less width": dict(width=96),
             "6×192, MLP width 192": dict(mlp_ratio=1)}
    name = lambda size: "mini" + "".join(f"-{key}-{value}" for key, value in size.items())
    with mock.patch.dict(SIZES, {name(size): mini | size for size in (sizes | alone).values()}):
        work = {row: step_work(name(size)) for row, size in sizes.items()}  # TFLOP of a step
        steps = {row: 200 for row in sizes | alone}
        steps |= {f"{row}, equal FLOPs": 10 * round(20 * work["4×128"] / work[row]) for row in sizes}
        del steps["4×128, equal FLOPs"]  # it has 200 steps
        size_of = lambda row: (sizes | alone)[row.removesuffix(", equal FLOPs")]
        rows = {row: f"--size {name(size_of(row))} --recipe demo --log-every 10 --steps {count}"
                for row, count in steps.items()}
        claim.images(rows)
        picture = claim.samples(rows, SHOWN)
    logs = np.log10([200 * work[row] for row in sizes])
    verdicts = ["TFLOP of 200 steps: " + ", ".join(f"{row} {200 * work[row]:.2g}" for row in sizes)]
    for score in ("loss", "seen"):
        slope, level = np.polyfit(logs, [claim.mean(row, score) for row in sizes], 1)
        verdicts.append(f"{score} after 200 steps = {level:.3f} {slope:+.3f} · log10(TFLOP), fitted")
    pairs = [("8×256", "6×192"), ("6×192", "4×128"), ("4×128", "3×96"), *(("6×192", row) for row in alone)]
    verdicts += [claim.higher("seen", *pair) for pair in pairs]
    claim.page(claim.table(rows, ["loss", "seen", "unseen"]), verdicts, picture)


def step_work(size):
    """TFLOP of a training step of 128 pictures of 64 pixels, by the transformer alone."""
    config = ModelConfig.of(size, channels=8, out_channels=8, text_widths=[128], null_tokens=[1])
    return training_step(config, 128, 0, 8, [12], checkpointing=False)[0] / 1e12


STARTS = (0, 25, 50, 75, 100)  # steps of video training after which frames are judged


def zero_start(claim):
    """Temporal attention whose output starts at zero keeps the image model as it is; training begins from its
    pictures (section 3.3).

    Scores of single frames, 5 clips a column, over the first steps of video training, when the output
    projections start at zero or at random values. Three ways to train: as the demo does (Muon, learning rate
    0.003), as the paper does (AdamW, 0.0001), and the temporal layers alone."""
    ways = {"": "", "AdamW 1e-4: ": "--optimizer adamw --lr 1e-4", "temporal layers: ": "--only-temporal"}
    starts = {"zero start": {}, "random start": dict(new_video_model=at_random(models.new_video_model))}
    columns, verdicts, panels = [f"step {step}" for step in STARTS], [], []
    for way, flags in ways.items():
        rows = {way + start: changes for start, changes in starts.items()}
        for seed in claim.seeds:
            for row, changes in rows.items():
                with changed(models, **changes):
                    job = lambda: frames_while_training(claim, claim.folder_of(row, seed), seed, flags)
                    claim.run(row, seed, job, flags)
        verdicts += [claim.higher(column, *rows) for column in columns]
        points = {row: (STARTS, [claim.mean(row, column) for column in columns]) for row in rows}
        panels.append(figures.curves(points, "frames over steps", (560, 320), False))
    table = claim.table([way + start for way in ways for start in starts], columns)
    claim.page(table, verdicts, figures.Image.fromarray(np.vstack(panels)))


def at_random(new_video_model):
    """new_video_model, but what starts at zero in it (dit.initialise) starts at random values."""

    def made(*parts):
        model = new_video_model(*parts)
        for block in model.transformer.blocks:
            nn.init.xavier_uniform_(block.temporal.attention.out.weight)
        nn.init.xavier_uniform_(model.transformer.temporal.mlp[2].weight)
        return model

    return made


def frames_while_training(claim, out, seed, flags):
    """{"step 0": score of frames, …}, of the averaged weights. Training is asked for previews, and a score is
    taken in the place of each."""
    scores, count, fit = [], claim.count(5), train.fit
    averaged = itertools.cycle([True, False])  # each second preview is of the last weights
    asked = [(column, prompt) for column in COLUMNS for prompt in moving_prompts(column, count)]

    def judged(model):
        clips = generator(model)([prompt.text for _, prompt in asked])
        pairs = list(zip(clips.permute(0, 1, 3, 4, 2).numpy(), asked))
        points = [judge(look(frame), prompt, column) for clip, (column, prompt) in pairs for frame in clip]
        scores.append(float(np.mean(points)))
        return figures.sheet(clips[:1], [asked[0][1].text])

    def fit_and_judge(flags, model, outline, hashes, read, batch_loss, preview, save):
        picture = judged(model.eval())
        preview = lambda: judged(model) if next(averaged) else picture
        fit(flags, model.train(), outline, hashes, read, batch_loss, preview, save)

    flags += f" --steps {STARTS[-1]} --sample-every {1 if claim.quick else STARTS[1]}"
    shutil.rmtree(out, ignore_errors=True)  # it begins with step 0
    claim.image_model()  # which trains by the real `fit`
    with changed(train, fit=fit_and_judge):
        claim.train("video", out, seed, f"{flags} --cooldown 0 --frame-curriculum 0,0,0")
    return {f"step {step}": score for step, score in zip(STARTS, scores)}


SHORT_VIDEO = "--steps 700 --cooldown 0.4 --frame-curriculum 100,100,400 --p-motion-free 0.25"


def joint(claim):
    """Training on clips alone spoils the frames. Training on pictures too, under the motion-free mask, wins
    them back (section 3.3).

    Three ways to train from one image model, by the scores of evaluate.py --video with 60 prompts."""
    rows = {"with pictures and mask": "", "clips alone": "--joint false",
            "with pictures, no mask": "--motion-free-mask false"}
    for row, flags in rows.items():
        for seed in claim.seeds:
            job = lambda: of_clips(joint_model(claim, row, seed, flags), claim.count(60))
            claim.run(row, seed, job, f"{SHORT_VIDEO} {flags}")
    verdicts = [claim.higher("frames", "with pictures and mask", "clips alone"),
                claim.higher("motion", "with pictures and mask", "with pictures, no mask")]
    table = claim.table(rows, ["motion", "identity", "frames"])
    claim.page(table, verdicts, claim.samples(rows, SHOWN_MOVING))


def joint_model(claim, row, seed, flags=""):
    return claim.train("video", claim.folder_of(row, seed), seed, f"{SHORT_VIDEO} {flags}")


GUIDANCE = [(2, 0), (2, 1), (2, 1.3), (2, 2), (1, 1), (4, 1), (7.5, 1)]  # (λ_T, λ_M)


def guidance(claim):
    """λ_M trades motion against the quality of frames; the paper takes 1.0 to 1.3. λ_T trades what the text
    says against diversity; the paper takes 7.5 (section 3.3).

    The models of the claim `joint` with pictures and mask, one for each seed; scores of evaluate.py --video
    with 100 prompts. Diversity: how far four samples of one prompt lie apart, over how far samples of
    different prompts do, in pixels."""
    rows = {f"λ_T {t:g}, λ_M {m:g}": dict(lambda_t=t, lambda_m=m) for t, m in GUIDANCE}
    trained = Claim("joint", claim.folder, len(claim.seeds), claim.quick)
    for seed in claim.seeds:
        for row, scales in rows.items():
            model = lambda: joint_model(trained, "with pictures and mask", seed)
            claim.run(row, seed, lambda: of_guidance(model(), claim.count(100), scales))
    scores, panels = ["motion", "identity", "frames", "diversity"], []
    for name, fixed, value in (("lambda_m", "lambda_t", 2), ("lambda_t", "lambda_m", 1)):
        chosen = sorted((scales[name], row) for row, scales in rows.items() if scales[fixed] == value)
        over = lambda score: ([x for x, _ in chosen], [claim.mean(row, score) for _, row in chosen])
        title = f"over {name}, at {fixed} {value}"
        panels.append(figures.curves({score: over(score) for score in scores}, title, (560, 320), False))
    verdicts = [claim.higher("motion", "λ_T 2, λ_M 1.3", "λ_T 2, λ_M 0"),
                claim.higher("frames", "λ_T 2, λ_M 1", "λ_T 2, λ_M 2"),
                claim.higher("diversity", "λ_T 1, λ_M 1", "λ_T 7.5, λ_M 1")]
    picture = figures.Image.fromarray(np.hstack(panels))
    claim.page(claim.table(rows, scores), verdicts, picture)


def of_guidance(model, count, scales):
    """of_clips, and diversity."""
    prompts = [prompt.text for prompt in moving_prompts("color", min(count, 10), seed=1)]
    clips = [generator(model, **scales, seed=k)(prompts) for k in range(4)]
    clips = torch.stack(clips).float()  # (4, B, F, 3, S, S)
    apart = lambda some: nn.functional.pdist(some.flatten(1)).mean().item()
    within = np.mean([apart(clips[:, i]) for i in range(len(prompts))])
    between = apart(clips[0]) if len(prompts) > 1 else 1.0
    return of_clips(model, count, **scales) | dict(diversity=within / between)


PAIRS = [(colour, shape) for colour in COLOURS for shape in SHAPES]
CLASSES = [" ".join(pair) for pair in PAIRS if pair not in UNSEEN_COLOURS]


class OneThing(Shapes):
    """The scenes of one thing, with its colour and shape as caption."""

    def __init__(self, size, seed):
        super().__init__(size, seed=seed)
        self.scenes = [scene for scene in self.scenes if len(scene) == 1]
        self.captions = [f"{thing.colour} {thing.shape}" for (thing,) in self.scenes]


class Labels(Pipeline):
    """A Pipeline that reads a caption as one of CLASSES: the class-conditional DiT."""

    def __init__(self, config, tokenizer=None, empty=False):
        super().__init__(config, None, empty)
        self.tokenizers, self.text_encoders = [self.numbers], nn.ModuleList()

    @staticmethod
    def numbers(captions):
        found = torch.tensor([[CLASSES.index(caption)] for caption in captions])  # (B, 1)
        return found, torch.ones_like(found, dtype=torch.bool)

    def encode_text(self, text):
        ((numbers, mask),) = text
        return numbers[:, 0].to(self.device), mask.to(self.device)


def new_label_model(flags, dataset, autoencoder):
    """models.new_image_model, for Labels."""
    C = autoencoder.config.channels
    sizes = dict(channels=C, out_channels=C, integration="class", classes=len(CLASSES), qk_norm=flags.qk_norm)
    diffusion = {name: getattr(flags, name) for name in ("schedule", "target", "learned_variance", "shift")}
    parts = dict(model=vars(ModelConfig.of(flags.size, **sizes)), diffusion=diffusion, published={})
    parts |= dict(autoencoder=vars(autoencoder.config), text=dict(vocabulary=8), words=[])
    torch.manual_seed(flags.seed)
    model = Labels(models.describe(flags, **parts), empty=True)
    model.autoencoder.load_state_dict(autoencoder.state_dict())
    return model


def plain_start(model):
    """dit.initialise, but shift and scale start at random values, gates at about 1: adaLN without Zero."""
    initialise(model)
    for part in (*model.blocks, model.final):
        nn.init.xavier_uniform_(part.modulation[1].weight)
    for block in model.blocks:
        block.modulation[1].bias.data.view(6, -1)[[2, 5]] = 1.0


def labels(claim):
    """The class-conditional DiT is the special case with a label in the place of text (section 3.2). DiT
    finds adaLN-Zero better than adaLN (arXiv 2212.09748).

    The same pictures of one thing, with the class of colour and shape or with these words. Score: of 210
    pictures, how many show that colour and that shape, and nothing else."""
    rows = {"text, cross-attention": {}, "label, adaLN-Zero": dict(new_image_model=new_label_model),
            "label, adaLN": dict(new_image_model=new_label_model, initialise=plain_start)}
    claim.autoencoder()  # of all shapes
    for seed in claim.seeds:
        for row, changes in rows.items():
            out, kind = claim.folder_of(row, seed), Labels if changes else Pipeline
            one_thing = changed(folder, load=lambda data, size, seed: OneThing(size, seed))
            with one_thing, changed(models, **changes):
                job = lambda: claim.train("image", out, seed, "--steps 200", kind)
                claim.run(row, seed, lambda: of_classes(job(), claim.count(6)))
    verdicts = [claim.higher("right", "label, adaLN-Zero", row) for row in rows if row != "label, adaLN-Zero"]
    picture = claim.samples(rows, CLASSES[:4], [Labels if changes else Pipeline for changes in rows.values()])
    claim.page(claim.table(rows, ["right"]), verdicts, picture)


def of_classes(model, count):
    """{"right": share} of `count` pictures of each class."""
    pictures = torch.cat([generator(model, seed=k)(CLASSES) for k in range(count)])
    found = [look(picture) for picture in pictures.permute(0, 2, 3, 1).numpy()]
    names = [[f"{thing.colour} {thing.shape}" for thing in things] for things in found]
    return dict(right=float(np.mean([things == [name] for things, name in zip(names, CLASSES * count)])))


def weighted_loss(weights_of, loss=Diffusion.loss):
    """Diffusion.loss, times weights_of(α_t, σ_t)."""

    def weighted(diffusion, model, x0, t, noise):
        alpha, sigma = (values.flatten(1)[:, 0] for values in diffusion.alpha_sigma(t, x0))  # (B,)
        return loss(diffusion, model, x0, t, noise) * weights_of(alpha, sigma)

    return weighted


def min_snr(alpha, sigma):
    """For the velocity target: min(SNR, 5) / (SNR + 1) (Hang et al. 2023)."""
    snr = (alpha / sigma).square()
    return snr.clamp(max=5) / (snr + 1)


def logit_normal(diffusion, shape, generator=None):
    """Timesteps as Stable Diffusion 3 draws them (Esser et al. 2024), before the shift."""
    u = diffusion.shifted(torch.randn(shape, generator=generator).sigmoid())
    return (u * diffusion.steps).long().clamp(max=diffusion.steps - 1)


def straight_path(diffusion, *parts, made=Diffusion.__init__, **more):
    """The path of rectified flow (Liu et al. 2022), x = (1-u) x_0 + u ε, over its standard deviation r: then
    α = (1-u) / r, σ = u / r. Its target ε - x_0 is, for given x, x_0 up to a factor as our velocity is; its
    loss is that of the velocity over r², which is (α + σ)² times as large."""
    made(diffusion, *parts, **more)
    u = torch.arange(1, diffusion.steps + 1, dtype=torch.float64) / (diffusion.steps + 1)
    diffusion.alpha_bar = (1 - u) ** 2 / ((1 - u) ** 2 + u**2)


def objective(claim):
    """Beyond the paper: it predicts the noise under DiT's linear schedule, with AdamW. The demo predicts the
    velocity under the cosine schedule, with a timestep shift, QK-norm and Muon. Each is taken back alone.
    What the field uses today is added: min-SNR weights; logit-normal timesteps, with shift 3; and rectified
    flow, which has these timesteps on a straight path.

    Scores of evaluate.py after 200 steps, 50 prompts a column. (The noise target under the cosine schedule
    divides by α = 0.00005 in the first step of sampling: that row fails by itself.)"""
    flags = {
        "as the demo": "", "x0": "--target x0", "noise": "--target noise",
        "noise, linear schedule": "--target noise --schedule linear", "linear schedule": "--schedule linear",
        "no QK-norm": "--qk-norm false", "AdamW": "--optimizer adamw --lr 1e-3", "no shift": "--shift 1",
        "shift 3": "--shift 3", "shift 3, logit-normal": "--shift 3", "rectified flow": "--shift 3",
        "min-SNR": "",
    }
    flow = dict(__init__=straight_path, loss=weighted_loss(lambda alpha, sigma: (alpha + sigma) ** 2))
    changes = {"shift 3, logit-normal": dict(random_timesteps=logit_normal),
               "rectified flow": dict(random_timesteps=logit_normal, **flow),
               "min-SNR": dict(loss=weighted_loss(min_snr))}
    for row in flags:
        with changed(Diffusion, **changes.get(row, {})):
            claim.images({row: f"--steps 200 {flags[row]}"})
    verdicts = [claim.higher("seen", "as the demo", row) for row in flags if row != "as the demo"]
    shown = [row for row in flags if row != "rectified flow"]  # a model does not keep its path
    claim.page(claim.table(flags, ["seen", "unseen"]), verdicts, claim.samples(shown, SHOWN))


ALL = (conditioning, encoders, scale, zero_start, joint, guidance, labels, objective)
CLAIMS = {function.__name__: function for function in ALL}


@dataclass
class Flags:
    quick: bool = flag(False, "a trial of the commands; it shows nothing")
    seeds: int = flag(3, "runs of each row", low=1, high=100)
    out: str = flag("", "folder of lines, tables and pictures; docs/claims, with --quick runs/claims/quick")


def main(arguments):
    about = "Runs the experiments of a claim: " + ", ".join(CLAIMS) + ", or all."
    flags, given, words = read(Flags, arguments, "python claims.py", about, words="NAME")
    unknown = [word for word in words if word not in (*CLAIMS, "all")]
    if unknown or not words:
        found = f"{unknown[0]}: no claim" if unknown else "name a claim"
        raise ValueError(f"{found}; there are {', '.join(CLAIMS)}, or all")
    if flags.quick and flags.out:
        raise ValueError("--out: runs of --quick have a folder of their own, since they show nothing")
    out = flags.out or (RUNS / "quick" if flags.quick else "docs/claims")
    for name in CLAIMS if "all" in words else words:
        CLAIMS[name](Claim(name, out, 1 if flags.quick else flags.seeds, flags.quick))


if __name__ == "__main__":
    run_command(main)
