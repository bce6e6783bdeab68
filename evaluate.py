"""How well do pictures say what their prompts say? A composition benchmark, judged from pixels.

    python evaluate.py                 the newest run on shapes: six columns, seen and unseen combinations
    python evaluate.py                 the newest run on a folder: how many samples look like their caption's picture

The columns are T2I-CompBench's (Huang et al. 2023): color, shape, texture, spatial, non-spatial (here comparisons of
size) and complex. The judge looks at pixels alone: it finds the things in a picture and says what each is; only then is
that compared with the words. A prompt scores 1 if all that its column asks for is right, else 0:

    color, shape, texture   each named thing, found by its other attributes, has the attribute that the prompt says
    spatial, non_spatial    the two named things are there (colour and shape), and the relation between them holds
    complex                 every attribute, and the relation if there is one

and in every column there must be as many things as were named. "unseen" prompts each hold a pair of colour and shape,
or of texture and shape, that no training picture has.
"""
import itertools
import json
import random
import sys
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

import data
from data import COLOURS, SHAPES, SIZES, TEXTURES, Thing, distance, texture_share
from sample import TextToImage, device_of, from_bytes, newest_run, parse_flags

COLUMNS = ("color", "shape", "texture", "spatial", "non_spatial", "complex")


@dataclass(frozen=True)
class Prompt:
    text: str
    things: tuple  # what the text says, as Things; their places mean nothing
    relation: str | None  # between the first two


def prompts(column, unseen, count, seed=0):
    """`count` prompts of a column. The same arguments give the same prompts. unseen: at least one held-out pair."""
    rng, found = random.Random(f"{column} {unseen} {seed}"), []
    while len(found) < count:
        number = rng.choice([2, 3]) if column == "complex" else 2
        things = [data.random_thing(rng, unseen and i == 0) for i in range(number)]
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
            relation = rng.choice(data.RELATIONS)
        elif column == "non_spatial":
            relation = rng.choice(data.COMPARISONS)
        found.append(Prompt(data.describe(things, relation, rng), tuple(things), relation))
    return found


# -------------------------------------------------------------------------------------------------------- the judge


def components(mask):
    """Connected regions (8 neighbours) of a boolean picture: a list of (row indices, column indices)."""
    label = np.where(mask, np.arange(1, mask.size + 1).reshape(mask.shape), 0)
    while True:  # every pixel takes its neighbours' largest label until nothing changes
        padded = np.pad(label, 1)
        height, width = label.shape
        largest = np.max([padded[i : i + height, j : j + width] for i in range(3) for j in range(3)], axis=0)
        largest = np.where(mask, largest, 0)
        if (largest == label).all():
            return [np.nonzero(label == value) for value in np.unique(label) if value]
        label = largest


def eroded(mask):
    """The pixels of a boolean picture whose four neighbours belong to it too; all of them if that leaves too few."""
    p = np.pad(mask, 1, constant_values=True)
    inner = mask & p[:-2, 1:-1] & p[2:, 1:-1] & p[1:-1, :-2] & p[1:-1, 2:]
    return inner if inner.sum() > 3 else mask


def name_colour(pixels):
    """The nearest name to the brighter half (the other half may be a texture's dark tone) of pixels (K, 3)."""
    value = pixels.max(1)
    colour = np.median(pixels[value >= np.median(value)], axis=0)
    hue = {name: np.array(c) / max(c) for name, c in COLOURS.items()}  # blurred textures are darker, of the same hue
    return min(hue, key=lambda name: np.square(colour / max(colour.max(), 1) - hue[name]).sum())


def look(picture):
    """What is in a picture? (S, S, 3) uint8 → a list of Things, from pixels alone.

    Background: the commonest colour at the border. Foreground: what differs from it, in connected regions of some size.
    Colour: the nearest name to a region's inner pixels. Shape: the outline that fits its silhouette best. Texture:
    the pattern that fits its brightness best. Size: by area.
    """
    S = len(picture)
    image = picture.astype(np.float32)
    border = np.concatenate([image[0], image[-1], image[:, 0], image[:, -1]])
    background = np.median(border, axis=0)
    contrast = np.abs(image - background).max(-1)
    found = []
    # a pixel at an edge, which two near things may share, is much paler than its neighbours: it parts the things
    strongest = np.max([np.roll(contrast, (i, j), (0, 1)) for i in (-1, 0, 1) for j in (-1, 0, 1)], axis=0)
    for rows, columns in components((contrast > 48) & (contrast > 0.45 * strongest)):
        if len(rows) < 0.006 * S * S:
            continue
        top, bottom = max(0, rows.min() - 1), min(S, rows.max() + 2)
        left, right = max(0, columns.min() - 1), min(S, columns.max() + 2)
        window = image[top:bottom, left:right]
        own = np.zeros(window.shape[:2], bool)
        own[rows - top, columns - left] = True
        colour = name_colour(window[eroded(own)])
        # how much of each pixel in and beside the region it covers, 0…1
        full = np.abs(np.array(COLOURS[colour]) - background).max()
        beside = ~eroded(~own)
        cover = np.where(beside, contrast[top:bottom, left:right] / full, 0).clip(0, 1)
        x = (left + right) / 2
        y = (top + bottom) / 2
        r = np.sqrt(cover.sum() / np.pi)
        shape, x, y, r = best_shape(cover, left, top, x, y, r)
        texture = best_texture(window, left, top, shape, x, y, r, colour, S)
        size = min(SIZES, key=lambda s: abs(np.log(SIZES[s] * S / r)))
        found.append(Thing(shape, colour, texture, size, x / S, y / S, r / S))
    return found


def grid(window, left, top, x, y):
    """Pixel centres of a window (h, w) relative to candidates' centres x, y (K, 1, 1): two arrays (K, h, w)."""
    u = np.arange(left, left + window.shape[1], dtype=np.float32)[None, None, :] + 0.5 - x
    v = np.arange(top, top + window.shape[0], dtype=np.float32)[None, :, None] + 0.5 - y
    return np.broadcast_arrays(u, v)


def candidates(*choices):
    """All combinations, as one (K, 1, 1) array for each list of choices."""
    return (np.array(c, np.float32)[:, None, None] for c in zip(*itertools.product(*choices)))


def best_shape(cover, left, top, x, y, r):
    """The shape, centre and radius whose outline is nearest to a silhouette `cover` (h, w)."""
    dx, dy, scale = candidates((-0.6, 0, 0.6), (-0.6, 0, 0.6), (0.94, 1.0, 1.06))
    u, v = grid(cover, left, top, x + dx, y + dy)
    best = (np.inf, None)
    for shape in SHAPES:
        outline = (0.5 - distance(shape, u / (r * scale), v / (r * scale)) * r * scale).clip(0, 1)
        error = np.square(outline - cover).sum((1, 2))  # (K,)
        k = error.argmin()
        if error[k] < best[0]:
            best = (error[k], (shape, x + dx[k, 0, 0], y + dy[k, 0, 0], r * scale[k, 0, 0]))
    return best[1]


def best_texture(window, left, top, shape, x, y, r, colour, S):
    """The texture whose pattern is nearest to a window (h, w, 3), well inside the outline."""
    dx, dy = candidates((-0.7, 0, 0.7), (-0.7, 0, 0.7))
    u, v = grid(window[..., 0], left, top, x + dx, y + dy)
    inside = distance(shape, u[4] / r, v[4] / r) * r < -1.0  # candidate 4 of 9 is the middle
    if not inside.any():
        return "solid"
    dark = ((1 - window.max(-1) / max(COLOURS[colour])) / 0.72).clip(0, 1)
    errors = {
        texture: np.square(texture_share(texture, u, v, data.PERIOD * S) - dark)[:, inside].mean(1).min()
        for texture in TEXTURES
    }
    return min(errors, key=errors.get)


def judge(found, prompt, column):
    """1.0 if a list of Things, as look() gives it, is what the prompt says in what the column asks for, else 0.0."""
    named = prompt.things
    if len(found) != len(named):
        return 0.0
    asked = {"color": ["colour"], "shape": ["shape"], "texture": ["texture"], "complex": ["colour", "shape", "texture"]}
    asked = asked.get(column, ["colour", "shape"])
    other = [key for key in ("shape", "colour") if key not in asked] or ["shape", "colour"]

    def agree(pairs, keys):
        return sum(getattr(a, key) == getattr(b, key) for a, b in pairs for key in keys)

    # name the found things by the other attributes first; where that leaves a choice, do not choose in favour
    orders = (list(zip(named, order)) for order in itertools.permutations(found))
    pairs = max(orders, key=lambda p: (agree(p, other), -agree(p, asked)))
    if agree(pairs, asked) < len(named) * len(asked):
        return 0.0
    matched = [b for _, b in pairs]
    if column == "complex" and any(a.size and a.size != b.size for a, b in pairs):
        return 0.0
    return float(prompt.relation is None or data.holds(prompt.relation, *matched[:2]))


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


def retrieval(model, dataset, generate, count=100, seed=0):
    """For `count` training captions: the share of samples whose nearest training picture, by distance in the latent, is
    a picture of that caption."""
    chosen = random.Random(seed).sample(range(len(dataset.captions)), min(count, len(dataset.captions)))

    def encode(images):
        return torch.cat([model.autoencoder.encode(from_bytes(part)).flatten(1) for part in images.split(256)])

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


@dataclass
class Config:
    checkpoint: str = ""  # a run's folder; the newest one if not given
    json: str = ""  # a file for the scores, and for what made them
    prompts: int = 100  # a column
    sampler: str = "dpm"
    steps: int = 16
    guidance: float = 2.0
    seed: int = 0
    batch_size: int = 100
    device: str = "auto"


def main(arguments):
    config = Config()
    if rest := parse_flags(config, arguments):
        raise ValueError(f"{rest[0]!r} is not a flag; flags look like --seed 1")
    for field in ("prompts", "batch_size"):
        if getattr(config, field) < 1:
            raise ValueError(f"--{field.replace('_', '-')} {getattr(config, field)}: must be at least 1")
    folder = config.checkpoint or newest_run()
    model = TextToImage.load(folder).to(device_of(config.device))
    source = model.config["flags"]["data"]

    def generate(texts):
        parts = [texts[i : i + config.batch_size] for i in range(0, len(texts), config.batch_size)]
        return torch.cat([
            model.generate(part, config.seed, config.sampler, config.steps, config.guidance)
            for part in tqdm(parts, desc="sampling", disable=None, leave=False)
        ])  # fmt: skip

    if source == "shapes":
        scores = composition(generate, config.prompts, config.seed)
        print(table(scores))
    else:
        dataset = data.load(source, model.config["image_size"])
        scores = {"retrieval": retrieval(model, dataset, generate, config.prompts, config.seed)}
        print(f"nearest training picture is the caption's own: {scores['retrieval']:.2f} of {config.prompts} captions")
    if config.json:
        made_by = {key: getattr(config, key) for key in ("seed", "sampler", "steps", "guidance", "prompts")}
        scores |= {"checkpoint": str(folder), **made_by}
        Path(config.json).write_text(json.dumps(scores, indent=1) + "\n")


if __name__ == "__main__":
    try:
        main(sys.argv[1:])
    except (ValueError, OSError) as error:
        sys.exit(f"evaluate.py: {error}")
