"""The prompts of evaluate.py. The same arguments always give the same prompts."""
import random
from dataclasses import dataclass

from data import moving_shapes, shapes
from data.moving_shapes import MOTIONS
from data.shapes import TEXTURES, Thing

BOTH = ("shape", "colour")
# The attributes that a column asks for, and those by which the judge knows which thing is which.
COLUMNS = {"color": (("colour",), ("shape",)), "shape": (("shape",), ("colour",)),
           "texture": (("texture",), BOTH), "spatial": (BOTH, BOTH), "non_spatial": (BOTH, BOTH),
           "complex": (("texture", *BOTH), BOTH)}


@dataclass(frozen=True)
class Prompt:
    text: str
    things: tuple  # what the text names, as Things; their positions mean nothing
    relation: str | None = None  # between the first two
    motions: tuple = ()  # of each thing, in a prompt for a clip


def prompts(column, unseen, count, seed=0):
    """`count` Prompts of a column. unseen: whether each names a thing that training never shows."""
    rng, found = random.Random(f"{column} {unseen} {seed}"), []
    _, known_by = COLUMNS[column]
    while len(found) < count:
        number = rng.choice([2, 3]) if column == "complex" else 2
        things = [shapes.random_thing(rng, unseen and i == 0) for i in range(number)]
        rng.shuffle(things)
        if column == "texture":
            things = [Thing(thing.shape, thing.colour, rng.choice(TEXTURES[1:])) for thing in things]
        elif column != "complex":
            things = [Thing(thing.shape, thing.colour) for thing in things]
        distinct = len({tuple(getattr(thing, key) for key in known_by) for thing in things}) == number
        if not distinct or any(thing.unseen for thing in things) != unseen:
            continue
        relation = None
        if column == "spatial" or (column == "complex" and rng.random() < 0.5):
            relation = rng.choice(shapes.RELATIONS)
        elif column == "non_spatial":
            relation = rng.choice(shapes.COMPARISONS)
        found.append(Prompt(shapes.describe(things, relation, rng), tuple(things), relation))
    return found


def clip_prompt(things, motions, relation, rng):
    """A list of one Prompt for a clip; an empty one if the things have no room to move so."""
    if not moving_shapes.random_path(shapes.sized(things, relation), motions, relation, rng, 8):
        return []
    text = moving_shapes.describe(things, motions, relation, rng)
    return [Prompt(text, tuple(moving_shapes.unsized(things, motions)), relation, tuple(motions))]


def motion_prompts(count, seed=0):
    """`count` Prompts for clips: all motions in turn, of one thing and of two (with one motion, or one each).
    Half of them name a colour or texture that only pictures have."""
    rng = random.Random(f"motion {seed}")
    names, found = list(MOTIONS), []
    while len(found) < count:
        turn, i = divmod(len(found), len(names))
        motions = [names[i]] + [rng.choice([names[i], rng.choice(names)])] * (turn % 2)
        things = [shapes.random_thing(rng) for _ in motions]
        distinct = len({(thing.colour, thing.shape) for thing in things}) == len(things)
        if distinct and only_in_pictures(things) == (turn // 2 % 2 == 1):
            found += clip_prompt(things, motions, None, rng)
    return found


def moving_prompts(column, count, seed=0):
    """`count` Prompts for clips: those of a column that name two things, which move alike."""
    rng, found = random.Random(f"moving {column} {seed}"), []
    for prompt in prompts(column, False, 20 * count, seed):
        motion = rng.choice(list(MOTIONS))
        if len(found) < count and len(prompt.things) == 2:
            found += clip_prompt(prompt.things, [motion, motion], prompt.relation, rng)
    return found


def only_in_pictures(things):
    """Whether some thing has a colour or texture that no training clip has."""
    colours, textures = moving_shapes.COLOURS, moving_shapes.TEXTURES
    return any(thing.colour not in colours or thing.texture not in textures for thing in things)
