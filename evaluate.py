"""Do pictures show what their prompts say? A composition benchmark, judged from pixels.

    python evaluate.py             the newest image run: six columns, for seen and unseen combinations;
                                   of a run on a folder: do samples look like the picture of their caption?
    python evaluate.py --video     the newest video run: motion, and the six columns frame by frame

The columns are T2I-CompBench's (Huang et al. 2023). A prompt scores 1 if the judge (evaluation/judge.py)
finds all that its column asks for, and as many things as the prompt names; else 0:

    color, shape, texture   each named thing, found by its other attributes, has this attribute
    spatial, non_spatial    both named things are there, in the named relation: of position, or of size
    complex                 every attribute is right, and the relation if there is one

An "unseen" prompt names a pair of colour and shape, or of texture and shape, that no training picture has.
"""
import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

from common.files import newest_run
from common.flags import SEEDS, dashed, flag, read, run_command
from common.hardware import PRECISIONS, device_of
from data import clips, folder
from diffusion import SAMPLERS
from evaluation import likeness
from evaluation.judge import judge, judge_clip, look
from evaluation.prompts import COLUMNS, motion_prompts, moving_prompts, only_in_pictures, prompts
from sample import Pipeline


def with_mean(scores):
    return scores | {"mean": float(np.mean(list(scores.values())))}


def composition(generate, count=100, seed=0):
    """Scores of an image model on `count` prompts a column. generate: list of prompts → (B, 3, S, S) uint8.
    Returns {"seen": {column: share, …, "mean"}, "unseen": …}."""
    scores = {}
    for name, unseen in (("seen", False), ("unseen", True)):
        asked = [(column, prompt) for column in COLUMNS for prompt in prompts(column, unseen, count, seed)]
        images = generate([prompt.text for _, prompt in asked]).permute(0, 2, 3, 1).numpy()  # (B, S, S, 3)
        points = [judge(look(image), prompt, column) for image, (column, prompt) in zip(images, asked)]
        shares = np.reshape(points, (len(COLUMNS), count)).mean(1).tolist()
        scores[name] = with_mean(dict(zip(COLUMNS, shares)))
    return scores


def motion(generate, count=100, seed=0):
    """Scores of a video model on `count` prompts for motion, and a fifth of that for each column. generate:
    list of prompts → (B, F, 3, S, S) uint8. Returns the means of judge_clip's scores, and

    motion_one   motion, where one thing moves
    identity     if any prompt names what only pictures have: of those prompts
    frames       {column: share, …, "mean"}, over all frames"""
    asked = motion_prompts(count, seed)
    of_columns = {column: moving_prompts(column, max(1, count // 5), seed) for column in COLUMNS}
    clips = generate([prompt.text for group in (asked, *of_columns.values()) for prompt in group])
    clips = clips.permute(0, 1, 3, 4, 2).numpy()  # (B, F, S, S, 3)
    points = [judge_clip(clip, prompt.things, prompt.motions) for clip, prompt in zip(clips, asked)]
    moves_alone = lambda prompt: len(prompt.things) == 1 and prompt.motions[0] != "standing still"
    alone = [score for score, prompt in zip(points, asked) if moves_alone(prompt)]
    new = [score for score, prompt in zip(points, asked) if only_in_pictures(prompt.things)]
    mean = lambda scores, key: float(np.mean([score[key] for score in scores]))
    rest, frames = iter(clips[count:]), {}
    for column, group in of_columns.items():
        judged = [judge(look(frame), prompt, column) for prompt in group for frame in next(rest)]
        frames[column] = float(np.mean(judged))
    scores = dict(motion=mean(points, "motion"), motion_one=mean(alone, "motion"))
    scores |= dict(identity=mean(new or points, "identity"), flicker=mean(points, "flicker"))
    return scores | dict(amount=mean(points, "amount"), frames=with_mean(frames))


def print_table(rows):
    """rows: {name: {column: number}}, all with the same columns."""
    columns, indent = next(iter(rows.values())), max(8, *(len(name) + 1 for name in rows))
    print(" " * indent + "".join(column.rjust(max(13, len(column) + 2)) for column in columns))
    for name, row in rows.items():
        numbers = (f"{number:{max(13, len(column) + 2)}.3f}" for column, number in row.items())
        print(name.ljust(indent) + "".join(numbers))


@dataclass
class Flags:
    checkpoint: str = flag("", "a run's folder; the newest run's if not given")
    clip: str = flag("", "the folder of the published CLIP, if it has moved since the training")
    t5: str = flag("", "the folder of the published T5, if it has moved since the training")
    data: str = flag("", "the folder of training pictures or clips, if it has moved or was packed as tars")
    json: str = flag("", "a file for the scores and the settings that made them")
    prompts: int = flag(
        100, "prompts a column; --video: for motion, and a fifth a column; of a folder: captions", low=1)
    sampler: str = flag("sde", "see diffusion.py", choices=tuple(SAMPLERS))
    steps: int = flag(16, "of the sampler", low=1, high=1000)
    lambda_t: float = flag(2.0, "guidance by text; 1: none", low=0, high=100)
    lambda_m: float = flag(1.0, "with --video: guidance by motion; 1: none", low=0, high=100)
    video: bool = flag(False, "a video run")
    frames: int = flag(0, "with --video: of a clip; 0: as many as in training", low=0)
    seed: int = flag(0, "of prompts and noise", low=0, high=SEEDS)
    batch_size: int = flag(100, "pictures made at once; with --video, frames", low=1)
    precision: str = flag("auto", "of products; auto: as in training, on this processor", choices=PRECISIONS)
    device: str = flag("auto", "as torch names it; auto: a GPU if there is one")


def check(flags, given):
    """ValueError for flags, of those given, without effect, and for files that could not be written."""
    for name in ("frames", "lambda_m"):
        if name in given and not flags.video:
            raise ValueError(f"--{dashed(name)} {getattr(flags, name)}: of clips only; give --video too")
    if flags.frames == 1:
        raise ValueError("--frames 1: a clip has at least 2")
    if not Path(flags.json).parent.is_dir():
        raise ValueError(f"--json {flags.json}: there is no folder {Path(flags.json).parent}")


def training_data(flags, run, trained_on):
    """"shapes", or the folder of pictures or clips to compare with. trained_on: the run's own --data or
    --clips. ValueError if there is no such folder now, or --data has no effect."""
    if trained_on in (None, "shapes"):
        if flags.data:
            raise ValueError(f"--data {flags.data}: {run} is judged by prompts of shapes alone; leave it out")
        return "shapes"
    source = flags.data or trained_on
    if not Path(source).is_dir() or any(Path(source).glob("[!.]*.tar")):
        what = "clips" if flags.video else "pictures"
        advice = "give the folder that it moved to or was packed from, --data DIR"
        raise ValueError(f"{run} was trained on {trained_on}; {source} is no folder of {what}: {advice}")
    return source


def of_folder(flags, model, run, source, generate, frames):
    """Scores of a run on a folder of pictures or clips, by evaluation/likeness.py; printed. Of pictures, a
    sheet of samples and their nearest training pictures is written to RUN/neighbours.png."""
    size = model.config["image_size"]
    if flags.video:
        films = clips.load(source, size, frames, model.config["flags"]["fps"])
        scores = likeness.of_clips(model.autoencoder, films, generate, flags.prompts, flags.seed)
        for name, score in scores.items():
            print(f"{name.ljust(30)}{score:.3f}")
        return scores
    train, test = folder.Folder(source, size), folder.unseen(source, size)
    scores, sheet = likeness.of_pictures(model.autoencoder, train, test, generate, flags.prompts, flags.seed)
    print_table({name: row for name, row in scores.items() if name != "diversity"})
    print(f"4 samples of a caption differ by {scores['diversity']:.2f} of what training pictures do")
    sheet.save(run / "neighbours.png")
    print(f"samples beside their nearest training pictures → {run}/neighbours.png")
    return scores


def main(arguments):
    flags, given, _ = read(Flags, arguments, "python evaluate.py", __doc__.partition("\n")[0])
    check(flags, given)
    run = flags.checkpoint or newest_run("video" if flags.video else "image")
    device = device_of(flags.device)
    model = Pipeline.load(run, clip=flags.clip, t5=flags.t5).on(device, flags.precision)
    if flags.video != model.transformer.config.temporal:
        found, advice = ("an image", "leave out") if flags.video else ("a video", "give")
        raise ValueError(f"{run} holds {found} model: {advice} --video")
    frames = (flags.frames or model.config["frames"]) if flags.video else 0
    size = max(1, flags.batch_size // max(1, frames))

    options = flags.sampler, flags.steps, flags.lambda_t, flags.lambda_m

    def generate(texts, seeds=None):
        """List of N prompts → (N, 3, S, S) uint8, or clips (N, F, 3, S, S)."""
        seeds = seeds or [flags.seed] * len(texts)
        starts = tqdm(range(0, len(texts), size), desc="sampling", disable=None, leave=False)
        parts = ((texts[i : i + size], seeds[i : i + size]) for i in starts)
        return torch.cat([model.generate(*part, *options, frames=frames) for part in parts])

    count, trained_on = flags.prompts, model.config["flags"].get("clips" if flags.video else "data")
    source = training_data(flags, run, trained_on)
    if source != "shapes":
        out = Path(run) if Path(run).is_dir() else Path(run).parent
        scores = of_folder(flags, model, out, Path(source), generate, frames)
    elif flags.video:
        scores = motion(generate, count, flags.seed)
        print_table({"": {key: score for key, score in scores.items() if key != "frames"}})
        print_table({"frames": scores["frames"]})
    else:
        scores = composition(generate, count, flags.seed)
        print_table(scores)
    if flags.json:
        settings = ("seed", "sampler", "steps", "lambda_t", "lambda_m", "prompts")
        scores |= {name: getattr(flags, name) for name in settings}
        scores |= dict(checkpoint=str(run), precision=model.precision)
        if flags.video:
            scores["frames_a_clip"] = frames
        Path(flags.json).write_text(json.dumps(scores, indent=1) + "\n")


if __name__ == "__main__":
    run_command(main)
