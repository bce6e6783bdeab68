import random
from dataclasses import replace

import numpy as np
import pytest

import data
from evaluate import COLUMNS, composition, judge, look, prompts


def scene_of(prompt, rng):
    """Draws what a prompt says, somewhere."""
    things = list(prompt.things)
    if prompt.relation in data.COMPARISONS:
        sizes = sorted(rng.sample(list(data.SIZES), 2), key=data.SIZES.get, reverse=prompt.relation == "bigger than")
        things = [replace(thing, size=size) for thing, size in zip(things, sizes)]
    return data.draw(data.place(things, prompt.relation, rng))


@pytest.mark.parametrize("column", COLUMNS)
def test_judge_is_right_on_true_pictures_and_near_chance_on_shuffled_ones(column):
    rng = random.Random(0)
    asked = prompts(column, False, 100) + prompts(column, True, 100)
    found = [look(scene_of(prompt, rng)) for prompt in asked]
    true = np.mean([judge(f, p, column) for f, p in zip(found, asked)])
    shuffled = np.mean([judge(f, p, column) for f, p in zip(found[1:] + found[:1], asked)])
    assert true >= 0.99 and shuffled <= 0.15, (true, shuffled)


def test_a_swapped_attribute_is_seen():
    """Binding: the same words with two colours exchanged are a wrong picture."""
    a, b = data.Thing("circle", "red", "striped", "big", 0.3, 0.3, 0.15), data.Thing("star", "pink", x=0.7, y=0.7)
    p = next(q for q in prompts("color", False, 1))
    p = replace(p, things=(a, b), relation=None)
    good, swapped = look(data.draw([a, b])), look(data.draw([replace(a, colour="pink"), replace(b, colour="red")]))
    assert judge(good, p, "color") == 1 and judge(swapped, p, "color") == 0
    assert judge(swapped, p, "texture") == 0 and judge(good, p, "texture") == 1
    other = look(data.draw([replace(a, texture="dotted"), b]))
    assert judge(other, p, "texture") == 0 and judge(other, p, "color") == 1 and judge(other, p, "complex") == 0
    upside_down = look(data.draw([replace(a, y=0.7), replace(b, y=0.2, x=0.4)]))
    above = replace(p, relation="above")
    assert judge(upside_down, above, "spatial") == 0 and judge(good, replace(p, relation="above"), "spatial") == 0
    third = look(data.draw([a, b, data.Thing("cross", "blue", x=0.8, y=0.2)]))
    assert judge(third, p, "color") == 0  # one thing too many


def test_prompts_are_fixed_and_keep_the_held_out_pairs_apart():
    for column in COLUMNS:
        seen, unseen = prompts(column, False, 50), prompts(column, True, 50)
        assert seen == prompts(column, False, 50) and seen != prompts(column, False, 50, seed=1)
        assert not any(thing.unseen for p in seen for thing in p.things)
        assert all(any(thing.unseen for thing in p.things) for p in unseen)
    assert not any(thing.unseen for things in data.Shapes(count=500).scenes for thing in things)


def test_scores_of_a_perfect_and_of_a_blank_generator():
    by_text = {p.text: p for c in COLUMNS for u in (False, True) for p in prompts(c, u, 5)}
    import torch

    def perfect(texts):
        rng = random.Random(0)
        return torch.stack([torch.from_numpy(scene_of(by_text[t], rng)).permute(2, 0, 1) for t in texts])

    scores = composition(perfect, 5)
    assert scores["seen"]["mean"] == 1 and scores["unseen"]["mean"] == 1
    blank = composition(lambda texts: torch.full((len(texts), 3, 64, 64), 200, dtype=torch.uint8), 5)
    assert blank["seen"]["mean"] == 0
    assert set(scores["seen"]) == {*COLUMNS, "mean"}
