import random
import shutil
from dataclasses import replace

import numpy as np
import pytest
import torch

import evaluate
import train
from data import moving_shapes, shapes, tar_shards
from evaluate import composition, motion
from evaluation.judge import judge, judge_clip, look
from evaluation.prompts import COLUMNS, motion_prompts, moving_prompts, only_in_pictures, prompts
from sample import Pipeline


def scene_of(prompt, rng):
    """Draws what a prompt says, somewhere."""
    things = shapes.sized(list(prompt.things), prompt.relation)
    return shapes.draw(shapes.arrange(things, prompt.relation, rng))


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
    a = shapes.Thing("circle", "red", "striped", "big", 0.3, 0.3, 0.15)
    b = shapes.Thing("star", "pink", x=0.7, y=0.7)
    p = next(q for q in prompts("color", False, 1))
    p = replace(p, things=(a, b), relation=None)
    good = look(shapes.draw([a, b]))
    swapped = look(shapes.draw([replace(a, colour="pink"), replace(b, colour="red")]))
    assert judge(good, p, "color") == 1 and judge(swapped, p, "color") == 0
    assert judge(swapped, p, "texture") == 0 and judge(good, p, "texture") == 1
    other = look(shapes.draw([replace(a, texture="dotted"), b]))
    assert [judge(other, p, column) for column in ("texture", "color", "complex")] == [0, 1, 0]
    upside_down = look(shapes.draw([replace(a, y=0.7), replace(b, y=0.2, x=0.4)]))
    above = replace(p, relation="above")
    assert judge(upside_down, above, "spatial") == 0 and judge(good, above, "spatial") == 0
    third = look(shapes.draw([a, b, shapes.Thing("cross", "blue", x=0.8, y=0.2)]))
    assert judge(third, p, "color") == 0  # one thing too many


def test_prompts_are_fixed_and_keep_the_held_out_pairs_apart():
    for column in COLUMNS:
        seen, unseen = prompts(column, False, 50), prompts(column, True, 50)
        assert seen == prompts(column, False, 50) and seen != prompts(column, False, 50, seed=1)
        assert not any(thing.unseen for p in seen for thing in p.things)
        assert all(any(thing.unseen for thing in p.things) for p in unseen)
    assert not any(thing.unseen for things in shapes.Shapes(count=500).scenes for thing in things)


def true_clips(asked, backwards=False):
    """Draws what prompts for clips say: (B, 8, 3, 64, 64) uint8."""
    rng, made = random.Random(3), []
    for p in asked:
        scenes = None
        while scenes is None:
            things = shapes.sized(p.things, p.relation)
            scenes = moving_shapes.random_path(things, p.motions, p.relation, rng, 8)
        made.append(np.stack([shapes.draw(scene) for scene in (scenes[::-1] if backwards else scenes)]))
    return torch.from_numpy(np.stack(made)).permute(0, 1, 4, 2, 3)


def test_the_judge_of_clips_is_right_on_true_ones_and_sees_what_is_wrong():
    by_text = {p.text: p for column in COLUMNS for p in moving_prompts(column, 6)}
    asked = motion_prompts(33)
    by_text |= {p.text: p for p in asked}
    true = motion(lambda texts: true_clips([by_text[text] for text in texts]), 33)
    assert min(true["motion"], true["motion_one"], true["identity"], *true["frames"].values()) >= 0.99
    assert true["flicker"] < 0.005 and true["amount"] > 0.5
    back = motion(lambda texts: true_clips([by_text[text] for text in texts], True), 33)
    assert back["motion"] < 0.15 and back["motion_one"] == 0 and back["identity"] >= 0.99
    p = next(p for p in asked if p.motions == ("moving left",))
    clip = true_clips([p])[0].permute(0, 2, 3, 1).numpy()
    other_shape = {shape: "cross" for shape in shapes.SHAPES} | {"cross": "star"}
    changed = clip.copy()
    changed[3] = shapes.draw([replace(thing, shape=other_shape[thing.shape]) for thing in look(clip[3])])
    good, bad = judge_clip(clip, p.things, p.motions), judge_clip(changed, p.things, p.motions)
    assert good["identity"] == 1 and bad["identity"] == 7 / 8 and good["motion"] == bad["motion"] == 1
    jumped = clip.copy()  # one frame stands aside of the way
    jumped[4] = shapes.draw([replace(thing, y=(thing.y + 0.5) % 1) for thing in look(clip[4])])
    assert judge_clip(jumped, p.things, p.motions)["motion"] == 0
    noise = np.random.default_rng(0).normal(0, 20, clip.shape)
    noisy = judge_clip((clip + noise).clip(0, 255).astype(np.uint8), p.things, p.motions)
    assert noisy["flicker"] > 5 * good["flicker"] + 0.01
    empty = judge_clip(np.full_like(clip, 250), p.things, p.motions)
    assert empty["motion"] == empty["identity"] == empty["amount"] == 0


def test_prompts_of_clips_are_fixed_and_half_of_them_are_of_what_only_pictures_have():
    asked = motion_prompts(88)
    assert asked == motion_prompts(88) != motion_prompts(88, seed=1)
    assert sum(only_in_pictures(p.things) for p in asked) == 44
    assert {p.motions[0] for p in asked} == set(moving_shapes.MOTIONS)
    assert not any(thing.unseen for p in asked for thing in p.things)
    assert all(len(moving_prompts(column, 20)) == 20 for column in COLUMNS)


def test_few_prompts_of_clips_have_scores_too():
    blank = lambda texts: torch.full((len(texts), 2, 3, 64, 64), 250, dtype=torch.uint8)
    assert motion(blank, 5)["identity"] == 0.0


def test_scores_of_a_perfect_and_of_a_blank_generator():
    by_text = {p.text: p for c in COLUMNS for u in (False, True) for p in prompts(c, u, 5)}

    def perfect(texts):
        rng = random.Random(0)
        return torch.stack([torch.from_numpy(scene_of(by_text[t], rng)).permute(2, 0, 1) for t in texts])

    scores = composition(perfect, 5)
    assert scores["seen"]["mean"] == 1 and scores["unseen"]["mean"] == 1
    blank = composition(lambda texts: torch.full((len(texts), 3, 64, 64), 200, dtype=torch.uint8), 5)
    assert blank["seen"]["mean"] == 0
    assert set(scores["seen"]) == {*COLUMNS, "mean"}


@pytest.mark.parametrize("words, message", [
    (["--lambda-m", "1.2"], "--lambda-m 1.2: of clips only; give --video too"),
    (["--frames", "0"], "--frames 0: of clips only; give --video too"),
    (["--lambda-t", "1e30"], "--lambda-t 1e+30: must be from 0 to 100"),
    (["--steps", "1001"], "--steps 1001: must be from 1 to 1000"),
])  # fmt: skip
def test_flags_without_effect_or_sense_are_refused(words, message):
    with pytest.raises(ValueError) as error:
        evaluate.main([*words, "--checkpoint", "none"])
    assert str(error.value) == message


def test_a_run_finds_what_has_moved(pictures, tmp_path, monkeypatch, capsys):
    """Its pictures, also those that were packed, and its encoders."""
    data, tars, run = tmp_path / "data", tmp_path / "tars", str(tmp_path / "run")
    shutil.copytree(pictures / "data", data)
    tar_shards.main([str(data), str(tars)])
    size = ["--image-size", "32", "--batch-size", "4", "--steps", "1", "--sample-every", "-1", "--workers", "0"]
    train.main(["image", "--data", str(tars), "--autoencoder", str(pictures / "ae"), "--out", run, *size])
    judged = ["--checkpoint", run, "--steps", "1", "--prompts", "2"]
    problem = f"{run} was trained on {tars}; %s is no folder of pictures: give the folder that it moved to or was packed from, --data DIR"
    for words, named in (([], tars), (["--data", "gone"], "gone"), (["--data", "shapes"], "shapes")):
        with pytest.raises(ValueError) as error:
            evaluate.main([*judged, *words])
        assert str(error.value) == problem % named
    evaluate.main([*judged, "--data", str(data)])
    assert "neighbours.png" in capsys.readouterr().out
    with pytest.raises(ValueError, match=f"--t5 {data}: .* was trained without it; leave it out"):
        evaluate.main([*judged, "--t5", str(data)])
    model = Pipeline.load(run)
    model.config["flags"]["data"] = "shapes"
    given = []
    monkeypatch.setattr(Pipeline, "load", lambda run, **folders: given.append(folders) or model)
    with pytest.raises(ValueError, match="--data x: .* is judged by prompts of shapes alone; leave it out"):
        evaluate.main([*judged, "--data", "x", "--clip", "here", "--t5", "there"])
    assert given == [dict(clip="here", t5="there")]
