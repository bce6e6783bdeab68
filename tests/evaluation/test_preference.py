"""A blind test of two folders: what is answered is counted for the right model."""
import json

import pytest
from PIL import Image

from evaluation import preference
from evaluation.preference import Test as Preference
from evaluation.preference import interval

COLOURS = {"a": (255, 0, 0), "b": (0, 0, 255)}


@pytest.fixture
def folders(tmp_path, monkeypatch):
    """a/samples/PROMPT_NUMBER.png, red, and b/…, blue, of six prompts; one more in b."""
    monkeypatch.chdir(tmp_path)
    for name, colour in COLOURS.items():
        (tmp_path / name / "samples").mkdir(parents=True)
        for i in range(6 + (name == "b")):
            Image.new("RGB", (8, 8), colour).save(tmp_path / name / "samples" / f"a prompt {i}_{i:06d}.png")
    return tmp_path


def side_of(test, shown, name):
    """left or right: where the picture of folder a or b lies."""
    addresses = {preference.address(test.a[shown["name"]]): "a", preference.address(test.b[shown["name"]]): "b"}
    return next(side for side in ("left", "right") if addresses[shown[side]] == name)


def test_answers_are_counted_for_the_right_model(folders):
    test, sides = Preference("a", "b", "out.json", 0), []
    shown = test.answer({})
    while "result" not in shown:
        assert shown["prompt"] == shown["name"][:-7] and "/a/" not in json.dumps(shown)
        sides.append(side_of(test, shown, "a"))
        number = int(shown["name"][-1])
        choice = "draw" if number == 0 else side_of(test, shown, "a" if shown["question"] == "quality" else "b")
        shown = test.answer(dict(question=shown["question"], name=shown["name"], choice=choice))
    assert len(sides) == 12 and {"left", "right"} == set(sides)
    quality, alignment = (shown["result"][question] for question in ("quality", "alignment"))
    assert (quality["win"], quality["draw"], quality["lose"]) == (5 / 6, 1 / 6, 0) and quality["answers"] == 6
    assert (alignment["win"], alignment["draw"], alignment["lose"]) == (0, 1 / 6, 5 / 6)
    written = json.loads((folders / "out.json").read_text())
    assert written["result"] == shown["result"] and len(written["answers"]) == 12
    with Image.open(folders / "out.png") as image:
        assert image.getpixel((200, 40)) == (30, 90, 200)


def test_it_goes_on_where_it_was_stopped(folders):
    test = Preference("a", "b", "out.json", 3)
    first = test.answer({})
    second = test.answer(dict(question=first["question"], name=first["name"], choice="left"))
    again = Preference("a", "b", "out.json", 3)
    assert again.answer({}) == second and second["number"] == 2
    assert again.answer({"undo": True}) == first == again.answer({"undo": True})
    assert Preference("a", "b", "out.json", 3).answer({}) == first
    with pytest.raises(ValueError, match="no answer to a pair"):
        again.answer(dict(question="quality", name="a prompt 6_000006", choice="left"))
    with pytest.raises(ValueError, match="no answer to a pair"):
        again.answer(dict(question="quality", name=first["name"], choice="both"))


def test_intervals():
    for count, total, low, high in ((50, 100, 0.4038, 0.5962), (0, 10, 0.0, 0.2775), (51, 100, 0.4135, 0.6058)):
        assert interval(count, total) == pytest.approx([low, high], abs=1e-4)  # statsmodels' proportion_confint


def test_mistakes(folders):
    (folders / "empty").mkdir()
    (folders / "mine.json").write_text('{"a": 1}')
    (folders / "c").mkdir()
    Image.new("RGB", (8, 8)).save(folders / "c" / "other_000000.png")
    Preference("a", "b", "out.json", 0).write()
    for words, message in (
        (["a"], "give two folders"), (["a", "empty"], "empty: no folder with pictures"), (["a", "gone"], "gone: no folder with pictures"),
        (["a", "c"], "a and c have no picture of the same name"), (["a", "b", "--out", "mine.json"], "--out mine.json: no result of this command"),
        (["a", "b", "--out", "x.txt"], "--out x.txt: must be NAME.json"), (["a", "b", "--seed", "1", "--out", "out.json"], "of other folders or another seed"),
    ):
        with pytest.raises(ValueError, match=message):
            preference.main(words)
    assert (folders / "mine.json").read_text() == '{"a": 1}'


def test_the_command(folders, monkeypatch, capsys):
    monkeypatch.setattr(preference, "serve", lambda page, answer, port: print(page.read_text()[:15], answer({})["number"], port))
    preference.main(["a", "b", "--port", "8002"])
    said = capsys.readouterr().out
    assert "quality: 0 of 6 answers" in said and "<!doctype html> 1 8002" in said
