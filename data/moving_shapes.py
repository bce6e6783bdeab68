"""Drawn clips with captions: one or two shapes that move, grow, shrink or stand still.

The clips are ours. They pose the problem that the paper's joint image–video training solves: they are fewer
than the pictures, blurred and noisy, and lack some colours and textures, which only the pictures can teach.
Three choices make them quick to learn, as those of shapes.py do for pictures:
- Hops. Things move from the centre of one cell to the next, so that the image model can draw each frame.
- Opposite ends. What moves crosses the whole picture, which shows its direction as clearly as can be.
- Reversed pairs. Clip 2k+1 is clip 2k reversed with the opposite motion word, so only the direction tells
  them apart.
"""
import random
from dataclasses import replace

import numpy as np
import torch
from PIL import Image, ImageFilter

from data import shapes
from data.shapes import COMPARISONS, RELATIONS, SIZES

# Name of a motion: the signs by which x, y and the radius change.
MOTIONS = {"moving left": (-1, 0, 0), "moving right": (1, 0, 0), "moving up": (0, -1, 0),
           "moving down": (0, 1, 0), "moving up left": (-1, -1, 0), "moving up right": (1, -1, 0),
           "moving down left": (-1, 1, 0), "moving down right": (1, 1, 0), "growing": (0, 0, 1),
           "shrinking": (0, 0, -1), "standing still": (0, 0, 0)}
REVERSED = {a: b for a, m in MOTIONS.items() for b, n in MOTIONS.items() if n == tuple(-sign for sign in m)}
COLOURS = ("red", "orange", "green", "blue", "purple")  # those that clips have
TEXTURES = ("solid", "striped")


def path_of(i, things, motions, relation, frames, rng):
    """A random path for thing i: a list of F Things. A moving thing goes from one end of the picture to the
    other. Along an axis without motion it stays in one of its `shapes.cells_allowed`, in the order of the
    caption: from left to right, or from top to bottom if anything moves sideways."""
    thing = things[i]
    dx, dy, growth = MOTIONS[motions[i]]
    radii = list(SIZES.values())[::growth] if growth else [SIZES[thing.size]]
    columns, rows = shapes.cells_inside(thing.shape, max(radii))
    if relation not in RELATIONS and any(MOTIONS[motion][0] for motion in motions):
        still_rows, still_columns = shapes.cells_allowed(i, len(things), relation, True, rows, columns)
    else:
        still_columns, still_rows = shapes.cells_allowed(i, len(things), relation, True, columns, rows)
    xs = columns[::dx] if dx else [rng.choice(still_columns)]
    ys = rows[::dy] if dy else [rng.choice(still_rows)]
    at = lambda values, k: values[round(k * (len(values) - 1) / (frames - 1))]  # of 4 values: 0 0 1 1 2 2 3 3
    return [replace(thing, x=at(xs, k), y=at(ys, k), r=at(radii, k)) for k in range(frames)]


def random_path(things, motions, relation, rng, frames, tries=300):
    """Random paths on which things stay apart and the relation, if any, stays clear: a list of F lists of
    Things. None if no try finds them."""
    for _ in range(tries):
        paths = [path_of(i, things, motions, relation, frames, rng) for i in range(len(things))]
        scenes = [list(scene) for scene in zip(*paths)]
        separate = len(things) < 2 or all(shapes.apart(*scene) for scene in scenes)
        if separate and (relation is None or all(shapes.clear(relation, *scene) for scene in scenes)):
            return scenes
    return None


def unsized(things, motions):
    """The things; those that grow or shrink lose their word of size."""
    return [replace(t, size="") if m in ("growing", "shrinking") else t for t, m in zip(things, motions)]


def describe(things, motions, relation, rng):
    """A caption: "a red circle moving left"; "a red circle above a blue star, both growing"; if the motions
    differ, "a red circle moving left and a blue star standing still"."""
    things = unsized(things, motions)
    if len(things) == 1:
        return f"{shapes.describe(things, None, rng)} {motions[0]}"
    if motions[0] == motions[1]:
        return f"{shapes.describe(things, relation, rng)}, both {motions[0]}"
    return " and ".join(f"{shapes.noun(thing)} {motion}" for thing, motion in zip(things, motions))


def random_scene(rng, count):
    """One or two things without positions, their motions, and their relation or None."""
    things = []
    while len(things) < count:
        thing = shapes.random_thing(rng)
        if thing.colour in COLOURS and thing.texture in TEXTURES:
            things.append(thing)
    motions, relation = [rng.choice(list(MOTIONS))] * count, None
    if count == 2 and rng.random() < 0.5:
        motions[1] = rng.choice(list(MOTIONS))
    if count == 2 and motions[0] == motions[1] and rng.random() < 0.7:
        sizes_change = motions[0] in ("growing", "shrinking")
        relation = rng.choice(RELATIONS if sizes_change else RELATIONS + COMPARISONS)
    return shapes.sized(things, relation), motions, relation


class MovingShapes:
    """`count` (an even number) clips with captions. Clip 2k+1 is clip 2k reversed with the opposite motion
    word; both depend on (seed, k) alone. Clips are drawn when they are asked for."""

    skipped = ()
    held = 0
    group = 2  # a reversed pair stays together in a batch

    def __init__(self, size=64, frames=8, count=4096, seed=0):
        self.size, self.seed = size, seed
        self.scenes, self.captions = [], []
        for k in range(count // 2):
            rng = random.Random(f"clip {seed} {k}")
            number, scenes = rng.choice((1, 2, 2)), None
            while scenes is None:
                things, motions, relation = random_scene(rng, number)
                scenes = random_path(things, motions, relation, rng, frames, tries=50)
            wording = rng.random()
            for scenes, motions in ((scenes, motions), (scenes[::-1], [REVERSED[m] for m in motions])):
                self.scenes.append(scenes)
                self.captions.append(describe(scenes[0], motions, relation, random.Random(wording)))

    def __len__(self):
        return len(self.captions)

    def clips(self, indices):
        """B indices → (B, F, 3, S, S) uint8."""
        indices = [int(i) for i in indices]
        films = {k: self.film(k) for k in {i // 2 for i in indices}}
        clips = np.stack([films[i // 2][::-1] if i % 2 else films[i // 2] for i in indices])
        return torch.from_numpy(clips).permute(0, 1, 4, 2, 3)

    def film(self, k):
        """Clip 2k, blurred and noisy as from a bad camera: (F, S, S, 3) uint8."""
        rng = np.random.default_rng((self.seed, k))
        blur = ImageFilter.GaussianBlur(rng.uniform(0.004, 0.01) * self.size)
        sharp = [Image.fromarray(shapes.draw(scene, self.size)) for scene in self.scenes[2 * k]]
        blurred = np.stack([np.asarray(image.filter(blur)) for image in sharp])
        return (blurred + rng.normal(0, 5, blurred.shape)).round().clip(0, 255).astype(np.uint8)
