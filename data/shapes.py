"""Captioned pictures drawn here: one to three shapes with colour, texture, size and position.

A *thing* is one shape. Things get places such that what the caption says is true (`place`), are drawn anti-aliased (`draw`)
and described in one of several wordings (`describe`); `Shapes` is the data set of such scenes. A caption tells where things
stand: by its relation, by words of place, or, without either, by its order, in which what is named first stands further to
the left. So little is left to chance. Certain pairs of colour and shape, and of texture and shape, never occur in training, so
that a model can be asked for what it has never seen.
"""
import functools
import itertools
import random
from dataclasses import dataclass, replace

import numpy as np
import torch

COLOURS = {
    "red": (220, 40, 40), "orange": (250, 140, 30), "yellow": (245, 215, 40), "green": (40, 160, 60),
    "cyan": (50, 195, 215), "blue": (45, 80, 220), "purple": (140, 50, 185), "pink": (250, 140, 190),
}  # fmt: skip
TEXTURES = ("solid", "striped", "dotted", "checkered")
SHAPES = ("circle", "square", "triangle", "cross", "star")
SIZES = {"small": 0.08, "": 0.105, "big": 0.135}  # radius of the circle of equal area, as a share of the picture
BOXES = {"circle": (1, 1), "square": (0.886, 0.886), "triangle": (1.347, 1.166), "cross": (1.154, 1.154),
         "star": (1.466, 1.541)}  # half width and half height at r = 1
PERIOD = 0.08  # of a texture, as a share of the picture
RELATIONS = ("above", "below", "left of", "right of")
COMPARISONS = ("bigger than", "smaller than")
BACKGROUND = (250, 250, 250)
CELLS = 4  # things stand in the middle of cells, so many a side
UNSEEN_COLOURS = {("purple", "circle"), ("green", "square"), ("red", "triangle"), ("yellow", "cross"), ("blue", "star")}
UNSEEN_TEXTURES = {("striped", "star"), ("dotted", "triangle"), ("checkered", "cross")}


@dataclass(frozen=True)
class Thing:
    """One shape. x, y: centre, r: radius of the circle of equal area; all as shares of the picture, y downwards."""

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
    """Signed distance to the outline of a shape of area π around 0 (negative inside; exact near the edges, which is
    where it counts). x, y: arrays of coordinates, y downwards."""
    if shape == "circle":
        return np.hypot(x, y) - 1
    if shape == "square":
        return np.maximum(abs(x), abs(y)) - 0.886
    if shape == "triangle":
        y = y - 0.389  # centred by its box, not by its centre of mass
        return np.maximum(y, abs(x) * 0.866 - y / 2) - 0.7776
    if shape == "cross":
        x, y = abs(x), abs(y)
        return np.minimum(np.maximum(x - 1.154, y - 0.4155), np.maximum(x - 0.4155, y - 1.154))
    if shape == "star":  # five points: fold the plane into one tenth of it, where the outline is one line
        angle = np.abs((np.arctan2(x, -y) + np.pi / 5) % (2 * np.pi / 5) - np.pi / 5)
        radius = np.hypot(x, y)
        return radius * (0.3840 * np.cos(angle) + 0.9233 * np.sin(angle)) - 0.5918
    raise ValueError(f"shape {shape!r} is not one of {', '.join(SHAPES)}")


def texture_share(texture, x, y, period):
    """How much of each pixel takes the dark tone, 0…1. x, y in pixels from the shape's centre; period in pixels."""
    if texture == "solid":
        return np.zeros_like(x)
    if texture == "striped":
        return (0.5 - np.cos(2 * np.pi * y / period) * period / 6.3).clip(0, 1)
    if texture == "checkered":
        cell = 1.5 * period  # two squares
        return (0.5 + np.sin(2 * np.pi * x / cell) * np.sin(2 * np.pi * y / cell) * cell / 6.3).clip(0, 1)
    if texture == "dotted":
        u, v = ((a + period / 2) % period - period / 2 for a in (x, y))
        return (0.5 + 0.28 * period - np.hypot(u, v)).clip(0, 1)
    raise ValueError(f"texture {texture!r} is not one of {', '.join(TEXTURES)}")


@functools.cache
def background(size):
    """An empty picture, (size, size, 3) uint8; the same one each time, to be copied."""
    return np.full((size, size, 3), BACKGROUND, np.uint8)


def draw(things, size=64):
    """Renders things onto the plain background, edges anti-aliased: (size, size, 3) uint8."""
    picture = background(size).copy()
    for thing in things:
        x, y, r = thing.x * size, thing.y * size, thing.r * size
        reach = 1.6 * r + 2  # a star's point is 1.54 r away
        left, right = max(0, int(x - reach)), min(size, int(x + reach) + 1)
        top, bottom = max(0, int(y - reach)), min(size, int(y + reach) + 1)
        u = (np.arange(left, right, dtype=np.float32) + 0.5 - x)[None, :]
        v = (np.arange(top, bottom, dtype=np.float32) + 0.5 - y)[:, None]
        cover = (0.5 - distance(thing.shape, u / r, v / r) * r).clip(0, 1)[..., None]
        colour = np.array(COLOURS[thing.colour], np.float32)
        if thing.texture != "solid":
            colour = colour * (1 - 0.72 * texture_share(thing.texture, u, v, PERIOD * size)[..., None])
        window = picture[top:bottom, left:right].astype(np.float32)
        picture[top:bottom, left:right] = window + cover * (colour - window) + 0.5
    return picture


def random_thing(rng, unseen=False):
    """A thing without a place. unseen: False never gives a held-out pair, True always does."""
    while True:
        texture = rng.choice(TEXTURES) if rng.random() < 0.5 else "solid"
        size = rng.choice(("small", "big")) if rng.random() < 0.5 else ""
        thing = Thing(rng.choice(SHAPES), rng.choice(list(COLOURS)), texture, size)
        if thing.unseen == unseen:
            return thing


def holds(relation, a, b):
    """Whether "a RELATION b" is true of two things (anything with x, y, r)."""
    dx, dy = b.x - a.x, b.y - a.y
    return {
        "above": dy > abs(dx), "below": -dy > abs(dx), "left of": dx > abs(dy), "right of": -dx > abs(dy),
        "bigger than": a.r > 1.14 * b.r, "smaller than": b.r > 1.14 * a.r,
    }[relation]  # fmt: skip


def sized(things, relation):
    """For a comparison, the first two things big and small, so that the caption tells both sizes; else the things as they are."""
    if relation not in COMPARISONS:
        return things
    sizes = ("big", "small") if relation == "bigger than" else ("small", "big")
    return [replace(thing, size=size) for thing, size in zip(things, sizes)] + list(things[2:])


def cells_for(half):
    """The centres of the cells in which a thing of this half width (or height) stays in the picture, but for 0.03."""
    centres = [(i + 0.5) / CELLS for i in range(CELLS)]
    return [c for c in centres if half - 0.03 <= c <= 1.03 - half]


def clear(relation, a, b):
    """Whether the relation holds and, if it is one of place, a and b are at most a third as far apart to the side. Where
    training shows it so, a small error in drawing leaves it true."""
    across, along = sorted((abs(b.x - a.x), abs(b.y - a.y)))
    return holds(relation, a, b) and (relation not in RELATIONS or 3 * across < along + 0.01)


def cells_of(i, things, relation, ordered, columns, rows):
    """Which of the columns and rows of cells thing i may stand in. Of two things in a spatial relation: at opposite ends, in
    the middle across; of a third beside them: at a side. Otherwise from left to right as the things are named (three things, on
    four columns, may share one). Not ordered: at opposite ends, or anywhere."""
    if relation in RELATIONS:
        upright = relation in ("above", "below")
        along, across = (rows, columns) if upright else (columns, rows)
        if i < 2:
            first = (i == 0) == (relation in ("above", "left of"))
            along = along[:1] if first else along[-1:]
        if ordered:
            across = middle(across) if i < 2 else across[:1] + across[-1:]
        return (across, along) if upright else (along, across)
    if ordered and len(things) == 2:
        half = len(columns) // 2
        columns = columns[half:] if i else columns[:half]
    if ordered and len(things) == 3:
        columns = (columns[:1], middle(columns), columns[-1:])[i]
    return columns, rows


def middle(cells):
    """The centres of the two cells in the middle."""
    return [c for c in cells if abs(c - 0.5) < 1 / CELLS]


def place(things, relation, rng, ordered=True):
    """Gives things places (and radii, by their size) so that their boxes stay apart and `relation`, if any, holds
    between the first two. Returns the placed things. They stand in the middle of cells, CELLS a side, where their
    points may reach a little past the picture. In which cells, the order of the caption tells (`cells_of`); not ordered,
    chance does, and words of place are to say it. That makes few different pieces of picture, and few places that two
    things could both take, which is what lets a laptop learn in minutes. Three that do not fit in 20 tries are no longer
    ordered; scenes that do not fit in 40 become a little smaller with every further one."""
    for attempt in itertools.count():
        shrink = min(1.0, 0.995 ** (attempt - 40))
        ordered = ordered and (len(things) < 3 or attempt < 20)
        placed = []
        for i, thing in enumerate(things):
            r = SIZES[thing.size] * shrink
            width, height = (share * r for share in BOXES[thing.shape])
            columns, rows = cells_of(i, things, relation, ordered, cells_for(width), cells_for(height))
            for _ in range(8):
                x, y = rng.choice(columns), rng.choice(rows)
                if all(
                    abs(x - o.x) > width + BOXES[o.shape][0] * o.r + 0.02
                    or abs(y - o.y) > height + BOXES[o.shape][1] * o.r + 0.02
                    for o in placed
                ):
                    candidate = replace(thing, x=x, y=y, r=r)
                    if len(placed) != 1 or relation is None or clear(relation, placed[0], candidate):
                        placed.append(candidate)
                        break
            else:
                break
        if len(placed) == len(things):
            return placed


def noun(thing, size=True):
    """"a small striped red circle"; solid and middle-sized go without saying."""
    words = [thing.size if size else "", "" if thing.texture == "solid" else thing.texture, thing.colour, thing.shape]
    words = " ".join(word for word in words if word)
    return ("an " if words[0] in "aeiou" else "a ") + words


OPPOSITE = {"above": "below", "below": "above", "left of": "right of", "right of": "left of",
            "bigger than": "smaller than", "smaller than": "bigger than"}  # fmt: skip


def where(thing, rng):
    """"at the top" and the like: the half of the picture that a placed thing is in, up and down or left and right."""
    if rng.random() < 0.5:
        return " at the top" if thing.y < 0.5 else " at the bottom"
    return " on the left" if thing.x < 0.5 else " on the right"


def describe(things, relation, rng, places=False):
    """A caption in one of several wordings. A relation is between the first two; a third follows with "and". With places,
    things (which must then be placed, and in no relation) are said to be at the top, on the left, …"""
    names = [noun(thing, size=relation not in COMPARISONS) for thing in things]
    if relation:
        if relation in RELATIONS and rng.random() < 0.3:
            names[:2], relation = names[1::-1], OPPOSITE[relation]
        relation = "to the " + relation if "of" in relation and rng.random() < 0.3 else relation
        text = f"{names[0]} {relation} {names[1]}" + (f" and {names[2]}" if names[2:] else "")
    else:
        names = [name + (where(thing, rng) if places else "") for name, thing in zip(names, things)]
        joint = rng.choice([" and ", " and ", " and ", " with ", " next to "]) if len(names) == 2 else " and "
        text = ", ".join([*names[:-2], joint.join(names[-2:])])
    return rng.choice(["", "", "", "", "there is ", "a picture of "]) + text


def mirrored(things, relation, ordered, rng):
    """The mirror image of a scene, and the relation that then holds. Left and right are swapped if the relation is about
    them, and in half of the scenes whose caption has words of place (not ordered); in all others above and below, which
    keeps the order from left to right."""
    sideways = relation in ("left of", "right of") or not ordered and rng.random() < 0.5
    things = [replace(thing, x=1 - thing.x) if sideways else replace(thing, y=1 - thing.y) for thing in things]
    return things, OPPOSITE[relation] if relation in RELATIONS else relation


class Shapes:
    """count (an even number of) scenes; 2k and 2k+1 are mirror images, drawn from (seed, k) alone, when they are asked
    for. Their captions differ in the words of place, if they have any. Side by side in a batch, at one timestep, they cancel what
    chance placement adds to the gradient, and leave what those words do. No scene has a held-out pair of attributes."""

    skipped = ()
    group = 2  # neighbours that training keeps together

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
            told = relation is None and len(things) < 3 and rng.random() < 0.4  # the caption says where all stand
            things, wording = place(things, relation, rng, not told), rng.random()
            for things, relation in ((things, relation), mirrored(things, relation, not told, rng)):
                self.scenes.append(things)
                self.captions.append(describe(things, relation, random.Random(wording), told))

    def __len__(self):
        return len(self.captions)

    def pictures(self, indices):
        pictures = np.stack([draw(self.scenes[i], self.size) for i in indices])
        return torch.from_numpy(pictures).permute(0, 3, 1, 2)
