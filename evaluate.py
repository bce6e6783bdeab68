"""How well do pictures say what their prompts say? A composition benchmark, judged from pixels.

    python evaluate.py                 the newest image run. On shapes: six columns, seen and unseen combinations;
                                       on a folder: how many samples look like their caption's picture
    python evaluate.py --video         the newest video run: motion, and the six columns frame by frame
    python evaluate.py --video --sweep FILE.png    the same over guidance scales, as curves

The columns are T2I-CompBench's (Huang et al. 2023): color, shape, texture, spatial, non-spatial (here comparisons of
size) and complex. The judge (judge.py) sees pixels alone. A prompt scores 1 if all that its column asks for is right,
else 0:

    color, shape, texture   each named thing, found by its other attributes, has the attribute that the prompt says
    spatial, non_spatial    the two named things are there (colour and shape), and the relation between them holds
    complex                 every attribute, and the relation if there is one

and in every column there must be as many things as were named. "unseen" prompts each hold a pair of colour and shape,
or of texture and shape, that no training picture has.

Of clips, `motion`, `identity`, `flicker` and `amount` are judge_clip's, over prompts of all motions, one thing and two,
half of them with colours or textures that pictures have and clips have not (identity: on these alone); `frames` are the
six columns, of two things that move together, as the mean over frames.
"""
import json
import random
import sys
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from tqdm import tqdm

import attention
from data import clips
from data import folder as data
from common import figures as pictures
from data import shapes
from data.clips import MOTIONS
from common.hardware import device_of, precision_of
from evaluation.judge import judge, judge_clip, look
from pipeline import Pipeline, from_bytes
from sample import newest_run, parse_flags
from data.shapes import TEXTURES, Thing

COLUMNS = ("color", "shape", "texture", "spatial", "non_spatial", "complex")


@dataclass(frozen=True)
class Prompt:
    text: str
    things: tuple  # what the text says, as Things; their places mean nothing
    relation: str | None = None  # between the first two
    motions: tuple = ()  # of clips: one a thing


def prompts(column, unseen, count, seed=0):
    """`count` prompts of a column. The same arguments give the same prompts. unseen: at least one held-out pair."""
    rng, found = random.Random(f"{column} {unseen} {seed}"), []
    while len(found) < count:
        number = rng.choice([2, 3]) if column == "complex" else 2
        things = [shapes.random_thing(rng, unseen and i == 0) for i in range(number)]
        rng.shuffle(things)
        if column != "texture" and column != "complex":
            things = [Thing(thing.shape, thing.colour) for thing in things]
        elif column == "texture":
            things = [Thing(thing.shape, thing.colour, rng.choice(TEXTURES[1:])) for thing in things]
        if any(thing.unseen for thing in things) != unseen:
            continue
        # each thing must be known by the attributes that the column does not ask for
        known_by = {"color": ["shape"], "shape": ["colour"]}.get(column, ["shape", "colour"])
        if len({tuple(getattr(thing, key) for key in known_by) for thing in things}) < number:
            continue
        relation = None
        if column == "spatial" or column == "complex" and rng.random() < 0.5:
            relation = rng.choice(shapes.RELATIONS)
        elif column == "non_spatial":
            relation = rng.choice(shapes.COMPARISONS)
        found.append(Prompt(shapes.describe(things, relation, rng), tuple(things), relation))
    return found


# ---------------------------------------------------------------------------------------------------- the benchmark


def composition(generate, count=100, seed=0):
    """Scores of a model on the benchmark. generate: list of prompts → (B, 3, S, S) uint8; count: prompts a column.
    Returns {"seen": {column: share, …, "mean"}, "unseen": …}."""
    scores = {}
    for name, unseen in (("seen", False), ("unseen", True)):
        asked = [(column, p) for column in COLUMNS for p in prompts(column, unseen, count, seed)]
        images = generate([p.text for _, p in asked]).permute(0, 2, 3, 1).numpy()
        points = [judge(look(image), p, column) for image, (column, p) in zip(images, asked)]
        scores[name] = {c: float(np.mean(points[i * count : (i + 1) * count])) for i, c in enumerate(COLUMNS)}
        scores[name]["mean"] = float(np.mean(list(scores[name].values())))
    return scores


def motion_prompts(count, seed=0):
    """`count` prompts for clips: all motions in turn, with one thing and with two (which move alike or each its own way),
    with attributes that training clips have and with some that only pictures have. The same arguments give the same."""
    rng, found, kinds = random.Random(f"motion {seed}"), [], list(MOTIONS)
    while len(found) < count:
        turn, i = divmod(len(found), len(kinds))
        motions = [kinds[i]] + [rng.choice([kinds[i], rng.choice(kinds)])] * (turn % 2)
        things = [shapes.random_thing(rng) for _ in motions]
        if only_in_pictures(things) != (turn // 2 % 2 == 1) or len({(t.colour, t.shape) for t in things}) < len(things):
            continue
        if clips.random_path(things, motions, None, rng, 8):  # can be drawn
            text = clips.describe(things, motions, None, rng)
            found.append(Prompt(text, tuple(clips.unsized(things, motions)), motions=tuple(motions)))
    return found


def only_in_pictures(things):
    """Whether some thing has a colour or texture that no training clip has."""
    return any(thing.colour not in clips.COLOURS or thing.texture not in clips.TEXTURES for thing in things)


def moving_prompts(column, count, seed=0):
    """`count` of a column's prompts that name two things, which move together."""
    rng, found = random.Random(f"moving {column} {seed}"), []
    for prompt in prompts(column, False, 20 * count, seed):
        motions = [rng.choice(list(MOTIONS))] * 2
        things = shapes.sized(prompt.things, prompt.relation)
        if len(things) == 2 and len(found) < count and clips.random_path(things, motions, prompt.relation, rng, 8):
            things = tuple(clips.unsized(prompt.things, motions))
            found.append(Prompt(clips.describe(things, motions, prompt.relation, rng), things, prompt.relation, tuple(motions)))
    return found


def motion(generate, count=100, seed=0):
    """Scores of a video model. generate: list of prompts → (B, F, 3, S, S) uint8; count: prompts for motion, and a fifth
    of it for each column. Returns {motion, motion_one (one thing that moves), identity, flicker, amount, frames}."""
    asked = motion_prompts(count, seed)
    of_columns = {column: moving_prompts(column, max(1, count // 5), seed) for column in COLUMNS}
    made = generate([p.text for p in [*asked, *sum(of_columns.values(), [])]]).permute(0, 1, 3, 4, 2).numpy()
    points = [judge_clip(clip, p.things, p.motions)[0] for clip, p in zip(made, asked)]
    average = lambda key, chosen: float(np.mean([s[key] for s, p in zip(points, asked) if chosen(p)]))
    everything = lambda p: True
    scores = {key: average(key, everything) for key in ("motion", "flicker", "amount")}
    scores["motion_one"] = average("motion", lambda p: len(p.things) == 1 and p.motions[0] != "standing still")
    few = not any(only_in_pictures(p.things) for p in asked)  # the first such prompt is the 23rd
    scores["identity"] = average("identity", lambda p: few or only_in_pictures(p.things))
    rest, scores["frames"] = iter(made[len(asked) :]), {}
    for column, chosen in of_columns.items():
        scores["frames"][column] = float(np.mean([judge(look(f), p, column) for p in chosen for f in next(rest)]))
    scores["frames"]["mean"] = float(np.mean(list(scores["frames"].values())))
    return scores


def retrieval(model, dataset, generate, count=100, seed=0):
    """For `count` training captions: the share of samples whose nearest training picture, by distance in the latent, is
    a picture of that caption."""
    chosen = random.Random(seed).sample(range(len(dataset.captions)), min(count, len(dataset.captions)))

    def encode(images):
        parts = (from_bytes(part).to(model.device) for part in images.split(256))
        return torch.cat([model.autoencoder.encode(part).flatten(1) for part in parts])

    with torch.no_grad():
        latents = encode(dataset.pictures(range(len(dataset.captions))))
        samples = encode(generate([dataset.captions[i] for i in chosen]))
    nearest = torch.cdist(samples, latents).argmin(1).tolist()
    return float(np.mean([dataset.captions[n] == dataset.captions[i] for n, i in zip(nearest, chosen)]))


def table(scores):
    """The scores as lines of text."""
    rows = ["".ljust(8) + "".join(name.rjust(13) for name in (*COLUMNS, "mean"))]
    for name in ("seen", "unseen"):
        rows.append(name.ljust(8) + "".join(f"{scores[name][c]:13.3f}" for c in (*COLUMNS, "mean")))
    return "\n".join(rows)


def video_table(scores):
    """The scores of clips as lines of text."""
    keys = ("motion", "motion_one", "identity", "flicker", "amount")
    names, frames = (*COLUMNS, "mean"), scores["frames"]
    return "\n".join([
        "".join(key.rjust(13) for key in keys), "".join(f"{scores[key]:13.3f}" for key in keys),
        "frames".ljust(8) + "".join(name.rjust(13) for name in names), " " * 8 + "".join(f"{frames[name]:13.3f}" for name in names),
    ])  # fmt: skip


def sweep(generate, count, seed, path, motions=(0.0, 1.0, 1.1, 1.2, 1.3, 1.6, 2.0), texts=(1.0, 2.0, 4.0, 7.5)):
    """Scores over λ_M at λ_T = 2, and over λ_T at λ_M = 1, printed and drawn as curves to path. Returns them."""
    rows = {}
    for lambda_t, lambda_m in [(2.0, m) for m in motions] + [(t, 1.0) for t in texts if t != 2.0]:
        s = motion(lambda prompts: generate(prompts, lambda_t, lambda_m), count, seed)
        rows[lambda_t, lambda_m] = s | {"frames": s["frames"]["mean"]}
        print(f"λ_T {lambda_t:g} λ_M {lambda_m:g}: " + "  ".join(f"{k} {v:.3f}" for k, v in rows[lambda_t, lambda_m].items()))
    panels = []
    for title, xs, points in (
        ("over lambda-m, at lambda-t 2", motions, [(2.0, m) for m in motions]),
        ("over lambda-t, at lambda-m 1", texts, [(t, 1.0) for t in texts]),
    ):
        series = {key: (xs, [rows[p][key] for p in points]) for key in ("motion", "identity", "amount", "frames")}
        panels.append(pictures.curves(series, title, (480, 320), logarithmic=False))
    pictures.side_by_side(panels).save(path)
    return {"sweep": [dict(lambda_t=t, lambda_m=m, **s) for (t, m), s in rows.items()]}


@dataclass
class Config:
    checkpoint: str = ""  # a run's folder; the newest one if not given
    json: str = ""  # a file for the scores, and for what made them
    prompts: int = 100  # a column; of clips: for motion, and a fifth of it a column
    sampler: str = "sde"
    steps: int = 16
    lambda_t: float = 2.0
    lambda_m: float = 1.0
    video: bool = False
    frames: int = 0  # with --video: a clip, if not as many as the model was trained on
    sweep: str = ""  # with --video: a file for the curves over --lambda-m and --lambda-t
    seed: int = 0
    batch_size: int = 100
    precision: str = "auto"  # of products: fp32, bf16, or auto: what the run was trained in, if on this processor
    device: str = "auto"


def main(arguments):
    config = Config()
    if rest := parse_flags(config, arguments):
        raise ValueError(f"{rest[0]!r} is not a flag; flags look like --seed 1")
    for field in ("prompts", "batch_size"):
        if getattr(config, field) < 1:
            raise ValueError(f"--{field.replace('_', '-')} {getattr(config, field)}: must be at least 1")
    folder, device = config.checkpoint or newest_run("video" if config.video else "image"), device_of(config.device)
    attention.use("auto", device)
    model = Pipeline.load(folder).to(device)
    model.precision = precision_of(config.precision, device, model.trained_in)
    source = model.config["flags"]["data"]

    for field in ("sweep", "frames"):
        if (value := getattr(config, field)) and not config.video:
            raise ValueError(f"--{field} {value}: of clips only; give --video too")
    if config.sweep and Image.registered_extensions().get(Path(config.sweep).suffix.lower()) not in Image.SAVE:
        raise ValueError(f"--sweep {config.sweep}: no kind of picture; call it NAME.png")
    for field in ("sweep", "json"):
        if not (parent := Path(getattr(config, field)).parent).is_dir():
            raise ValueError(f"--{field} {getattr(config, field)}: there is no folder {parent}")
    if config.frames < 0 or config.frames == 1:
        raise ValueError(f"--frames {config.frames}: a clip has at least 2")
    if config.video and model.config["flags"].get("clips") not in (None, "shapes"):
        raise ValueError(f"{folder} was trained on clips from a folder; --video judges clips of shapes")
    if config.video != model.transformer.config.temporal:
        raise ValueError(f"{folder} holds {'an image' if config.video else 'a video'} model: {'leave out' if config.video else 'give'} --video")
    frames = (config.frames or model.config["frames"]) if config.video else 0
    size = max(1, config.batch_size // max(1, frames))

    def generate(texts, lambda_t=config.lambda_t, lambda_m=config.lambda_m):
        parts = [texts[i : i + size] for i in range(0, len(texts), size)]
        return torch.cat([
            model.generate(part, config.seed, config.sampler, config.steps, lambda_t, lambda_m, frames=frames)
            for part in tqdm(parts, desc="sampling", disable=None, leave=False)
        ])  # fmt: skip

    if config.sweep:
        scores = sweep(generate, config.prompts, config.seed, config.sweep)
    elif config.video:
        scores = motion(generate, config.prompts, config.seed)
        print(video_table(scores))
    elif source == "shapes":
        scores = composition(generate, config.prompts, config.seed)
        print(table(scores))
    else:
        dataset = data.load(source, model.config["image_size"])
        scores = {"retrieval": retrieval(model, dataset, generate, config.prompts, config.seed)}
        print(f"nearest training picture is the caption's own: {scores['retrieval']:.2f} of {min(config.prompts, len(dataset))} captions")
    if config.json:
        made_by = {key: getattr(config, key) for key in ("seed", "sampler", "steps", "lambda_t", "lambda_m", "prompts")}
        made_by |= {"frames_a_clip": frames} if config.video else {}
        scores |= {"checkpoint": str(folder), "precision": model.precision, **made_by}
        Path(config.json).write_text(json.dumps(scores, indent=1) + "\n")


if __name__ == "__main__":
    try:
        main(sys.argv[1:])
    except (ValueError, OSError) as error:
        sys.exit(f"evaluate.py: {error}")
