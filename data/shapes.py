"""Drawn pictures with captions: scenes of one to three shapes, each with a colour, a texture and a size.
Positions and radii are shares of the picture's side; y points downwards.

The scenes are ours, not the paper's, and so are four choices that let a laptop learn them in minutes. Each
leaves less to chance, so that the picture follows from the caption:
- Cells. Things stand at the centres of 4×4 cells, one for each token of the demo's model, which then has few
  different pieces of picture to learn.
- Opposite ends. Two things in a relation such as "above" stand at opposite ends of the picture, nearly in
  line. The relation stays true if one of them is drawn a little off.
- Words of place. Any other caption says where its things are ("at the top") or names them from left to right.
- Mirrored pairs. Scene 2k+1 is scene 2k mirrored. Both are trained in one batch at one timestep: their random
  positions cancel in the gradient, and the words that tell them apart remain.
"""
import itertools
import random
from dataclasses import dataclass, replace

import numpy as np
import torch

COLOURS = {"red": (220, 40, 40), "orange": (250, 140, 30), "yellow": (245, 215, 40), "green": (40, 160, 60),
           "cyan": (50, 195, 215), "blue": (45, 80, 220), "purple": (140, 50, 185), "pink": (250, 140, 190)}
TEXTURES = ("solid", "striped", "dotted", "checkered")
SHAPES = ("circle", "square", "triangle", "cross", "star")
SIZES = {"small": 0.08, "": 0.105, "big": 0.135}  # radius r: that of the circle of equal area
BOXES = {"circle": (1, 1), "square": (0.886, 0.886), "triangle": (1.347, 1.166), "cross": (1.154, 1.154),
         "star": (1.466, 1.541)}  # half width and half height, in units of r
PERIOD = 0.08  # of a texture
RELATIONS = ("above", "below", "left of", "right of")
COMPARISONS = ("bigger than", "smaller than")
OPPOSITE = {"above": "below", "below": "above", "left of": "right of", "right of": "left of"}
BACKGROUND = 250  # of 255, in each colour channel
CELLS = 4  # along each side of the picture
# Pairs that no training scene has. evaluate.py asks for them.
UNSEEN_COLOURS = {("purple", "circle"), ("green", "square"), ("red", "triangle"), ("yellow", "cross"),
                  ("blue", "star")}
UNSEEN_TEXTURES = {("striped", "star"), ("dotted", "triangle"), ("checkered", "cross")}


@dataclass(frozen=True)
class Thing:
    """One shape of a scene. x, y: its centre; r: the radius of the circle of equal area."""

    shape: str
    colour: str
    texture: str = "solid"
    size: str = ""
    x: float = 0.5
    y: float = 0.5
    r: float = SIZES[""]

    @property
    def unseen(self):
        return (self.colour, self.shape) in UNSEEN_COLOURS or (self.texture, self.shape) in UNSEEN_TEXTURES


def distance(shape, x, y):
    """Signed distance from points (x, y), two arrays, to the outline of a shape of area π at the origin:
    negative inside, exact near the edges but for corners."""
    if shape == "circle":
        return np.hypot(x, y) - 1
    if shape == "square":
        return np.maximum(abs(x), abs(y)) - 0.886
    if shape == "triangle":
        y = y - 0.389  # the origin is the centre of the box, not the centre of mass
        return np.maximum(y, abs(x) * 0.866 - y / 2) - 0.7776
    if shape == "cross":
        x, y = abs(x), abs(y)
        return np.minimum(np.maximum(x - 1.154, y - 0.4155), np.maximum(x - 0.4155, y - 1.154))
    # star: fold the plane into one tenth, where the outline is a single line
    angle = np.abs((np.arctan2(x, -y) + np.pi / 5) % (2 * np.pi / 5) - np.pi / 5)
    return np.hypot(x, y) * (0.3840 * np.cos(angle) + 0.9233 * np.sin(angle)) - 0.5918


def texture_share(texture, x, y, period):
    """The share of dark tone in each pixel, 0…1. x, y (arrays, from the centre), period: in pixels."""
    if texture == "solid":
        return np.zeros_like(x)
    if texture == "striped":
        return (0.5 - np.cos(2 * np.pi * y / period) * period / 6.3).clip(0, 1)
    if texture == "checkered":
        period = 1.5 * period  # two squares
        waves = np.sin(2 * np.pi * x / period) * np.sin(2 * np.pi * y / period)
        return (0.5 + waves * period / 6.3).clip(0, 1)
    u, v = ((a + period / 2) % period - period / 2 for a in (x, y))  # dotted: from the nearest dot's centre
    return (0.5 + 0.28 * period - np.hypot(u, v)).clip(0, 1)


def draw(things, size=64):
    """Renders positioned things on the plain background, with anti-aliased edges: (size, size, 3) uint8."""
    picture = np.full((size, size, 3), BACKGROUND, np.uint8)
    centres = np.arange(size, dtype=np.float32) + 0.5  # of pixels
    for thing in things:
        x, y, r = thing.x * size, thing.y * size, thing.r * size  # in pixels
        reach = 1.6 * r + 2  # the widest shape, the star, reaches 1.54 r
        columns, rows = (slice(max(0, int(c - reach)), int(c + reach) + 1) for c in (x, y))
        window = picture[rows, columns]  # (h, w, 3), a view
        u, v = centres[columns] - x, centres[rows, None] - y  # (w,), (h, 1)
        cover = (0.5 - distance(thing.shape, u / r, v / r) * r).clip(0, 1)[..., None]
        dark = texture_share(thing.texture, u, v, PERIOD * size)[..., None]
        colour = np.array(COLOURS[thing.colour], np.float32) * (1 - 0.72 * dark)
        window[:] = window + cover * (colour - window) + 0.5  # 0.5: uint8 rounds down
    return picture


def random_thing(rng, unseen=False):
    """A thing with random attributes and no position yet. unseen: whether it has a pair of UNSEEN_…."""
    while True:
        texture = rng.choice(TEXTURES) if rng.random() < 0.5 else "solid"
        size = rng.choice(("small", "big")) if rng.random() < 0.5 else ""
        thing = Thing(rng.choice(SHAPES), rng.choice(list(COLOURS)), texture, size)
        if thing.unseen == unseen:
            return thing


def sized(things, relation):
    """The things. For a comparison, the first two become big and small: the caption then tells both sizes."""
    if relation not in COMPARISONS:
        return things
    sizes = ("big", "small") if relation == "bigger than" else ("small", "big")
    return [replace(thing, size=size) for thing, size in zip(things, sizes)] + list(things[2:])


def holds(relation, a, b):
    """Whether "a RELATION b" is true. a and b need x, y and r."""
    dx, dy = b.x - a.x, b.y - a.y
    return {"above": dy > abs(dx), "below": -dy > abs(dx), "left of": dx > abs(dy), "right of": -dx > abs(dy),
            "bigger than": a.r > 1.14 * b.r, "smaller than": b.r > 1.14 * a.r}[relation]


def clear(relation, a, b):
    """Whether the relation holds with a margin: one of RELATIONS at most a third as far across as along."""
    across, along = sorted((abs(b.x - a.x), abs(b.y - a.y)))
    return holds(relation, a, b) and (relation not in RELATIONS or 3 * across < along + 0.01)


def apart(a, b):
    """Whether a gap separates the boxes of two things."""
    (a_width, a_height), (b_width, b_height) = BOXES[a.shape], BOXES[b.shape]
    return (abs(a.x - b.x) > a_width * a.r + b_width * b.r + 0.02
            or abs(a.y - b.y) > a_height * a.r + b_height * b.r + 0.02)


def cells_inside(shape, r):
    """The columns and rows, as lists of centres, where a shape reaches at most 0.03 past the picture."""
    centres = [(i + 0.5) / CELLS for i in range(CELLS)]
    return [[c for c in centres if half * r - 0.03 <= c <= 1.03 - half * r] for half in BOXES[shape]]


def cells_allowed(i, count, relation, ordered, columns, rows):
    """Of the columns and rows, those where thing i of `count` may stand. In one of RELATIONS, the first two
    stand at opposite ends. ordered: across, these two stand in the middle and a third at a side; without
    such a relation, things stand from left to right as they are named."""
    if relation in ("above", "below"):  # like these, with x and y exchanged
        turned = "left of" if relation == "above" else "right of"
        rows, columns = cells_allowed(i, count, turned, ordered, rows, columns)
        return columns, rows
    middle = lambda cells: [c for c in cells if abs(c - 0.5) < 1 / CELLS]
    left, right, half = columns[:1], columns[-1:], len(columns) // 2
    if ordered and relation in RELATIONS:
        rows = middle(rows) if i < 2 else rows[:1] + rows[-1:]
    if relation == "left of":
        columns = (left, right, columns)[i]
    elif relation == "right of":
        columns = (right, left, columns)[i]
    elif ordered and count == 2:
        columns = (columns[:half], columns[half:])[i]
    elif ordered and count == 3:
        columns = (left, middle(columns), right)[i]
    return columns, rows


def arrange(things, relation, rng, ordered=True):
    """Gives things positions and radii and returns them. Their boxes stay apart, each stands in one of its
    `cells_allowed`, and the relation, if any, is clear between the first two. Three things that do not fit in
    20 attempts lose their order. Things that do not fit in 40 shrink by 0.5 % with each further attempt."""
    for attempt in itertools.count():
        shrink = 0.995 ** max(0, attempt - 40)
        ordered = ordered and (len(things) < 3 or attempt < 20)
        placed = []
        for i, thing in enumerate(things):
            r = SIZES[thing.size] * shrink
            columns, rows = cells_allowed(i, len(things), relation, ordered, *cells_inside(thing.shape, r))
            for _ in range(8):
                thing = replace(thing, x=rng.choice(columns), y=rng.choice(rows), r=r)
                related = i != 1 or relation is None or clear(relation, placed[0], thing)
                if related and all(apart(thing, other) for other in placed):
                    placed.append(thing)
                    break
            else:
                break  # no room: the next attempt
        if len(placed) == len(things):
            return placed


def noun(thing, size=True):
    """"a small striped red circle". "solid" and the middle size are not said. size: whether a size is."""
    words = [thing.size if size else "", thing.texture.replace("solid", ""), thing.colour, thing.shape]
    words = " ".join(filter(None, words))
    return ("an " if words[0] in "aeiou" else "a ") + words


def words_of_place(thing, rng):
    """" at the top" and the like: the half of the picture that the thing is in."""
    if rng.random() < 0.5:
        return " at the top" if thing.y < 0.5 else " at the bottom"
    return " on the left" if thing.x < 0.5 else " on the right"


def describe(things, relation, rng, placed=False):
    """A caption, in one of several wordings. relation: between the first two, or None. placed: whether words
    of place follow each thing; things must then have positions and no relation."""
    names = [noun(thing, size=relation not in COMPARISONS) for thing in things]
    if relation:
        if relation in RELATIONS and rng.random() < 0.3:
            names[:2], relation = names[1::-1], OPPOSITE[relation]
        relation = "to the " + relation if "of" in relation and rng.random() < 0.3 else relation
        text = f"{names[0]} {relation} {names[1]}" + (f" and {names[2]}" if names[2:] else "")
    else:
        names = [name + (words_of_place(thing, rng) if placed else "") for name, thing in zip(names, things)]
        joint = rng.choice([" and ", " and ", " and ", " with ", " next to "]) if len(names) == 2 else " and "
        text = ", ".join([*names[:-2], joint.join(names[-2:])])
    return rng.choice(["", "", "", "", "there is ", "a picture of "]) + text


def mirrored(things, relation, ordered, rng):
    """The mirror image of a scene, and its relation. Left and right swap if the relation is about them, and
    in half of the unordered scenes. Otherwise top and bottom swap: the order from left to right stays."""
    sideways = relation in ("left of", "right of") or not ordered and rng.random() < 0.5
    flip = lambda thing: replace(thing, x=1 - thing.x) if sideways else replace(thing, y=1 - thing.y)
    return [flip(thing) for thing in things], OPPOSITE[relation] if relation in RELATIONS else relation


class Shapes:
    """`count` (an even number) scenes with captions. Scene 2k+1 is scene 2k mirrored; both depend on
    (seed, k) alone. Pictures are drawn when they are asked for."""

    skipped = ()
    group = 2  # a mirrored pair stays together in a batch

    def __init__(self, size=64, count=16384, seed=0):
        self.size = size
        self.scenes, self.captions = [], []
        for k in range(count // 2):
            rng = random.Random(f"{seed} {k}")
            things = [random_thing(rng) for _ in range(rng.choice([1, 2, 2, 2, 2, 3, 3, 3]))]
            relation = None
            if len(things) > 1 and rng.random() < 0.7:
                relation = rng.choice(RELATIONS if rng.random() < 0.75 else COMPARISONS)
            things = sized(things, relation)
            if sum(thing.size == "big" for thing in things) == 3:
                things[2] = replace(things[2], size="small")  # three big ones hardly fit
            ordered = relation is not None or len(things) == 3 or rng.random() >= 0.4
            scene = arrange(things, relation, rng, ordered)
            wording = rng.random()
            for things, relation in ((scene, relation), mirrored(scene, relation, ordered, rng)):
                self.scenes.append(things)
                self.captions.append(describe(things, relation, random.Random(wording), not ordered))

    def __len__(self):
        return len(self.captions)

    def pictures(self, indices):
        """B indices → (B, 3, S, S) uint8."""
        pictures = np.stack([draw(self.scenes[i], self.size) for i in indices])
        return torch.from_numpy(pictures).permute(0, 3, 1, 2)
