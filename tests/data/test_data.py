import hashlib
import itertools
import json
import os
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from data import folder, shapes
from data.folder import Folder


@pytest.mark.parametrize("shape", shapes.SHAPES)
def test_shapes_have_equal_area_true_distance_and_their_box(shape):
    axis = np.linspace(-2, 2, 801)
    x, y = np.meshgrid(axis, axis)
    d = shapes.distance(shape, x, y)
    assert (d < 0).mean() * 16 == pytest.approx(np.pi, rel=0.01)
    edge = abs(d) < 0.03
    slope = np.hypot(*np.gradient(d, axis, axis))[edge]
    assert np.median(slope) == pytest.approx(1, abs=0.02)  # the edge is one pixel wide at any size
    width, height = shapes.BOXES[shape]
    for extent, coordinate in ((width, x), (height, y)):
        assert abs(coordinate[d < 0]).max() == pytest.approx(extent, abs=0.02)
        if (shape, extent) != ("star", height):  # a star's box reaches as far down as its point does up
            assert coordinate[d < 0].max() == pytest.approx(-coordinate[d < 0].min(), abs=0.02)


def test_scenes_are_true_to_their_captions_and_inside_the_picture():
    drawn = shapes.Shapes(count=400, seed=3)
    assert drawn.captions == shapes.Shapes(count=400, seed=3).captions
    for things, caption in zip(drawn.scenes, drawn.captions):
        for relation in (*shapes.RELATIONS, *shapes.COMPARISONS):
            if f" {relation} " not in caption:
                continue
            names = [shapes.noun(thing, size=relation not in shapes.COMPARISONS) for thing in things[:2]]
            in_order = caption.index(names[0]) <= caption.index(names[1])
            a, b = things[:2] if in_order else things[1::-1]
            assert names[0] == names[1] or shapes.clear(relation, a, b), caption
            if relation in shapes.RELATIONS:  # at opposite ends; across, in the middle if there is room
                axis = 1 if relation in ("above", "below") else 0
                position = lambda thing: (thing.x, thing.y)[axis]
                for thing, end in zip(sorted(things[:2], key=position), (0, -1)):
                    assert position(thing) == shapes.cells_inside(thing.shape, thing.r)[axis][end], caption
                    across = (thing.y, thing.x)[axis]
                    assert abs(across - 0.5) < 0.25 or len(things) == 3, caption
        for thing in things:
            for half, centre in zip(shapes.BOXES[thing.shape], (thing.x, thing.y)):
                assert half * thing.r - 0.03 <= centre <= 1.03 - half * thing.r
                assert 4 * centre % 1 == 0.5  # at the centre of a cell
            assert thing.colour in caption and thing.shape in caption and not thing.unseen


def test_a_seed_gives_the_same_scenes_as_when_the_demo_was_trained():
    drawn = shapes.Shapes(count=1000, seed=0)
    digest = hashlib.sha256(repr((drawn.captions, drawn.scenes)).encode()).hexdigest()
    assert digest[:16] == "7557fd79fc0c68b8"


def test_captions_tell_where_things_stand():
    """By words of place, which are true of all things; or from left to right. Mirror images keep to it."""
    drawn, told, in_order = shapes.Shapes(count=600, seed=4), 0, []
    words = {" at the top": ("y", -1), " at the bottom": ("y", 1),
             " on the left": ("x", -1), " on the right": ("x", 1)}
    for k, (things, caption) in enumerate(zip(drawn.scenes, drawn.captions)):
        if any(f" {relation} " in caption for relation in shapes.RELATIONS):
            continue
        found = [word for word in words if word in caption]
        if found:
            told += 1
            rest = caption
            for thing in things:  # each name is followed by its words
                rest = rest.split(shapes.noun(thing), 1)[1]
                axis, side = next(words[word] for word in words if rest.startswith(word))
                assert (getattr(thing, axis) - 0.5) * side > 0, caption
        else:
            sizes = not any(f" {comparison} " in caption for comparison in shapes.COMPARISONS)
            rest = caption
            for thing in things:  # named in their order
                rest = rest.split(shapes.noun(thing, sizes), 1)[1]
            assert len(things) != 2 or things[0].x < things[1].x, caption
            if len(things) == 3:
                in_order.append(things[0].x <= things[1].x <= things[2].x)
        if k % 2 and not found:  # the mirror image of the scene before
            assert [(a.x, 1 - a.y) for a in things] == [(b.x, b.y) for b in drawn.scenes[k - 1]]
            assert caption == drawn.captions[k - 1]
    assert 40 < told < 160
    assert len(in_order) > 40 and 0.8 < np.mean(in_order) < 1  # three do not always have room


def test_a_clear_relation_stays_true_if_a_thing_two_away_is_drawn_a_cell_aside():
    at = lambda x, y: shapes.Thing("circle", "red", x=(x + 0.5) / 4, y=(y + 0.5) / 4)
    for x1, y1, x2, y2 in itertools.product(range(4), repeat=4):
        if shapes.clear("above", at(x1, y1), at(x2, y2)):
            assert shapes.clear("left of", at(y1, x1), at(y2, x2))
            assert shapes.clear("below", at(x2, y2), at(x1, y1))
            assert shapes.holds("above", at(x1, y1), at(x2, y2))
            moved = [at(x2 + aside, y2) for aside in (-1, 1)]
            assert y2 == y1 + 1 or all(shapes.holds("above", at(x1, y1), thing) for thing in moved)
    assert shapes.clear("above", at(1, 0), at(1, 1)) and not shapes.clear("above", at(0, 0), at(1, 2))


def test_pictures_scale_with_size():
    small = shapes.Shapes(64, count=4).pictures([1, 2]).float()
    big = shapes.Shapes(256, count=4).pictures([1, 2]).float()
    assert small.shape == (2, 3, 64, 64)
    assert (torch.nn.functional.avg_pool2d(big, 4) - small).abs().mean() < 3


def save(folder, name, image, caption="a thing", **options):
    image.save(folder / name, **options)
    (folder / name).with_suffix(".txt").write_text(caption)


def red(mode="RGB", size=(40, 30)):
    return Image.new("RGB", size, (250, 0, 0)).convert(mode)


def test_every_usable_kind_of_picture_is_read(tmp_path):
    save(tmp_path, "rgb.png", red())
    save(tmp_path, "palette.png", red("P"))
    save(tmp_path, "grey.png", red("L"))
    save(tmp_path, "cmyk.jpg", red("CMYK"))
    save(tmp_path, "web.webp", red())
    clear = Image.new("RGBA", (40, 40), (0, 0, 0, 0))
    save(tmp_path, "clear.png", clear)
    save(tmp_path, "deep.png", Image.fromarray(np.full((40, 40), 40000, np.uint16)))
    turned = Image.new("RGB", (60, 30), "white")
    turned.paste((250, 0, 0), (0, 0, 20, 30))  # red on the left; the tag says: turn by 90° to the right
    exif = Image.Exif()
    exif[0x0112] = 6
    save(tmp_path, "turned.jpg", turned, exif=exif)
    folder = Folder(tmp_path, 16)
    assert not folder.skipped and len(folder.captions) == 8
    names = sorted(p.name for p in tmp_path.iterdir() if p.suffix != ".txt")
    pictures = dict(zip(names, folder.pictures(range(8))))
    for name in ("rgb.png", "palette.png", "cmyk.jpg", "web.webp"):
        assert pictures[name][0].float().mean() > 220 and pictures[name][1].float().mean() < 40, name
    assert (pictures["clear.png"] == 255).all()  # transparency lies on white
    assert abs(pictures["deep.png"].float().mean() - 155.6) < 2
    green = pictures["turned.jpg"][1].float().mean(1)  # of each row
    assert green[0] < green[-1] - 50  # red is at the top


def test_what_cannot_be_used_is_named_and_the_rest_goes_on(tmp_path):
    save(tmp_path, "good.png", red(), "  a   red\nthing ")
    save(tmp_path, "tiny.png", red(size=(1, 1)))
    save(tmp_path, "wide.png", red(size=(20000, 10)))
    save(tmp_path, "empty caption.png", red(), " \n")
    red().save(tmp_path / "no caption.png")
    save(tmp_path, "latin.png", red())
    (tmp_path / "latin.txt").write_bytes("Äpfel".encode("latin-1"))
    save(tmp_path, "zero.png", red())
    (tmp_path / "zero.png").write_bytes(b"")
    noise = np.random.default_rng(0).integers(0, 255, (64, 64, 3), np.uint8)
    save(tmp_path, "cut.jpg", Image.fromarray(noise))
    (tmp_path / "cut.jpg").write_bytes((tmp_path / "cut.jpg").read_bytes()[:700])
    save(tmp_path, "long.png", red(), "red " * 5000)
    folder = Folder(tmp_path, 16)
    assert folder.captions[0] == "a red thing" and len(folder.captions) == 2
    reasons = {path.name: reason for path, reason in folder.skipped}
    expected = {
        "tiny.png": "1×1", "wide.png": "20000×10", "latin.png": "UTF-8",
        "empty caption.png": "empty", "no caption.png": "no caption.txt is missing",
        "zero.png": "not a whole picture", "cut.jpg": "not a whole picture",
    }
    assert set(reasons) == set(expected)
    for name, words in expected.items():
        assert words in reasons[name]


def test_one_listing_for_all(tmp_path):
    red().save(tmp_path / "a.png")
    entries = [json.dumps(dict(file="a.png", caption="red")), json.dumps(dict(file="b.png", caption="gone"))]
    lines = [entries[0], "{broken", entries[1]]
    (tmp_path / "captions.jsonl").write_bytes("\n".join(lines).encode() + b"\n\xff\xfe")
    folder = Folder(tmp_path, 16)
    assert folder.captions == ["red"]
    names = [str(path).rsplit("/", 1)[-1] for path, _ in folder.skipped]
    assert names == ["captions.jsonl, line 2", "b.png", "captions.jsonl, line 4"]


@pytest.mark.parametrize("listed", [False, True])
def test_a_byte_order_mark_is_no_part_of_a_caption(tmp_path, listed):
    captions = {"a": "\ufeffred", "b": "\ufeff \ufeff blue\r\n", "c": "\ufeff", "d": "green\ufeff"}
    for name, caption in captions.items():
        red().save(tmp_path / f"{name}.png")
        if not listed:
            (tmp_path / f"{name}.txt").write_text(caption, encoding="utf-8")
    if listed:
        lines = [json.dumps(dict(file=f"{name}.png", caption=caption)) for name, caption in captions.items()]
        (tmp_path / "captions.jsonl").write_text("\n".join(lines), encoding="utf-8-sig")
    folder = Folder(tmp_path, 16)
    assert folder.captions == ["red", "blue", "green"]
    assert [(path.name, reason) for path, reason in folder.skipped] == [("c.png", "the caption is empty")]


def test_every_file_is_used_or_named(tmp_path):
    """Kinds that Pillow reads, also through links, in natural order; the rest in a line for each extension."""
    data, elsewhere = tmp_path / "data", tmp_path / "elsewhere"
    (data / "in").mkdir(parents=True)
    elsewhere.mkdir()
    kinds = "jfif bmp gif tif avif ppm tga jp2 ico qoi jpe".split()
    for i, kind in enumerate(kinds, 1):
        save(data, f"{i}.{kind}", red(size=(32, 32)), f"number {i}")
    save(elsewhere, "12.png", red(), "number 12")
    (data / "away").symlink_to(elsewhere)
    (data / "in" / "up").symlink_to(data)  # back up: no circle
    (elsewhere / "self").symlink_to(elsewhere)
    save(data, "13.gif", red(), "number 13", save_all=True, append_images=[Image.new("RGB", (40, 30))])
    save(data, "14.tif", Image.fromarray(np.zeros((32, 32), np.float32)), "number 14")
    for name in ("a.heic", "b.HEIC", "c.svg", "hash", "d.eps"):
        (data / name).write_bytes(b"?")
    for name in (".hidden.png", "._1.png", "Thumbs.db", "README.md", "LICENSE", "captions.csv"):
        (data / name).write_bytes(b"?")
    for name in ("__MACOSX", ".git"):
        (data / name).mkdir()
        red().save(data / name / "x.png")
    folder = Folder(data, 16)
    assert folder.captions == [f"number {i}" for i in (*range(1, 12), 13, 12)]
    first = folder.pictures([11])[0].float().mean((1, 2))
    assert first[0] > 220 and first[1] < 40  # of a picture that moves, its first frame
    assert [(Path(path).name, reason) for path, reason in folder.skipped] == [
        ("data", "1 .eps file: no kind of picture that can be read"),
        ("data", "2 .heic files: no kind of picture that can be read"),
        ("data", "1 .svg file: no kind of picture that can be read"),
        ("data", "1 extensionless file: no kind of picture that can be read"),
        ("14.tif", "its pixels are floating-point numbers, of an unknown range"),
    ]


def test_one_file_that_cannot_be_opened_is_named_and_the_rest_goes_on(tmp_path, monkeypatch):
    save(tmp_path, "good.png", red())
    red().save(tmp_path / "folder.png")
    (tmp_path / "folder.txt").mkdir()
    (tmp_path / "broken.png").symlink_to(tmp_path / "gone.png")
    (tmp_path / "broken.txt").write_text("a link to nothing")
    (tmp_path / "closed").mkdir()
    scandir = os.scandir

    def closed(path):
        if str(path).endswith("closed"):
            raise PermissionError(13, "Permission denied", str(path))
        return scandir(path)

    monkeypatch.setattr(os, "scandir", closed)
    folder = Folder(tmp_path, 16)
    assert folder.captions == ["a thing"]
    reasons = {path.name: reason for path, reason in folder.skipped}
    assert reasons["closed"] == "cannot be opened (Permission denied)"
    assert reasons["folder.png"] == "folder.txt cannot be read (Is a directory)"
    assert "not a whole picture" in reasons["broken.png"] and len(reasons) == 3


def test_captions_that_are_no_texts_and_pictures_that_the_listing_lacks_are_named(tmp_path):
    values = ["null", "NaN", '["a", ["b"]]', "false", '{"en": "a"}', "3", '"\\ud83d"', '"red"']
    for i in range(len(values) + 1):
        red().save(tmp_path / f"{i}.png")
    red().save(tmp_path / "raw.dat", "PNG")
    (tmp_path / "in").mkdir()
    lines = [f'{{"file": "./{i}.png", "caption": {value}}}' for i, value in enumerate(values)]
    lines[-1] = lines[-1].replace("./", f"{tmp_path}/in/../")
    lines += ['{"file": "raw.dat", "caption": "raw"}', "[" * 100_000]
    (tmp_path / "captions.jsonl").write_text("\n".join(lines))
    folder = Folder(tmp_path, 16)
    assert folder.captions == ["red", "raw"]
    found = [reason for _, reason in folder.skipped]
    told = ["null", "NaN", '["b"]', "false", '{"en": "a"}', "3"]
    assert found[:6] == [f"the caption is not a text but {value}" for value in told]
    assert found[6] == "the caption is not UTF-8" and found[7].startswith("not JSON in UTF-8")
    assert found[8:] == ["captions.jsonl has no line for it"] and folder.skipped[8][0].name == "8.png"


def test_file_names_that_are_not_utf8_are_used_and_can_be_printed(tmp_path):
    for name in (b"caf\xe9", b"b\xffd", b"silent\xfe"):
        red().save(os.fsdecode(bytes(tmp_path) + b"/" + name + b".png"))
        if name != b"silent\xfe":
            Path(os.fsdecode(bytes(tmp_path) + b"/" + name + b".txt")).write_text("a thing")
    Path(os.fsdecode(bytes(tmp_path) + b"/b\xffd.png")).write_bytes(b"no picture")
    Path(os.fsdecode(bytes(tmp_path) + b"/odd.k\xe9")).write_bytes(b"?")
    folder = Folder(tmp_path, 16)
    assert folder.captions == ["a thing"] and len(folder.skipped) == 3
    said = "\n".join(f"{path}: {reason}" for path, reason in folder.skipped).encode().decode()
    assert r"b\udcffd.png: not a whole" in said and r"silent\udcfe.txt is missing" in said
    assert r"1 .k\udce9 file" in said


def test_nothing_usable(tmp_path):
    with pytest.raises(ValueError, match="no usable picture"):
        Folder(tmp_path)
    with pytest.raises(ValueError, match="there is no such folder"):
        Folder(tmp_path / "gone")


ROWS = [("a.png", "red"), ("in/b.png", "blue"), ("gone.png", "green")]


def imagefolder(where, kind):
    """Four pictures, of which the listing has two, and a row without a file."""
    (where / "in").mkdir(parents=True)
    for name in ("a.png", "in/b.png", "in/c.png", "d.png"):
        red().save(where / name)
    if kind == "csv":
        rows = ["file_name,text,licence", *(f"{file},{text},free" for file, text in ROWS)]
        (where / "metadata.csv").write_bytes("\r\n".join(rows).encode("utf-8-sig"))
    else:
        rows = [json.dumps(dict(file_name=file, text=text, licence="free")) for file, text in ROWS]
        (where / "metadata.jsonl").write_text("\n".join(rows))


@pytest.mark.parametrize("kind", ["jsonl", "csv"])
def test_an_imagefolder_is_read_and_each_bad_row_named(tmp_path, kind):
    imagefolder(tmp_path, kind)
    found = Folder(tmp_path, 16)
    assert found.captions == ["red", "blue"] and found.labels == ["", "in"]
    line = 4 if kind == "csv" else 3
    assert [(path.name, reason) for path, reason in found.skipped] == [
        ("gone.png", f"line {line} of metadata.{kind} names it; there is no such file"),
        ("d.png", f"metadata.{kind} has no line for it"), ("c.png", f"metadata.{kind} has no line for it"),
    ]


@pytest.mark.parametrize("names", [("train", "test"), ("training", "valid")])
def test_of_splits_the_one_for_training_is_read(tmp_path, names):
    imagefolder(tmp_path / names[0], "csv")
    imagefolder(tmp_path / names[1], "jsonl")
    red().save(tmp_path / "beside.png")
    found = Folder(tmp_path, 16)
    assert found.captions == ["red", "blue"] and len(found.skipped) == 5
    beside = [path.name for path, reason in found.skipped if reason == f"beside {names[0]}/, which alone is trained on"]
    assert beside == ["beside.png", names[1]]
    unseen = folder.unseen(tmp_path, 16)
    assert unseen is None if names[1] == "valid" else (unseen.captions, unseen.labels) == (["red", "blue"], ["", "in"])
    assert found.labels == ["", "in"]
    assert len(Folder(tmp_path / names[1], 16)) == 2  # by its own name
    (tmp_path / names[1]).rename(tmp_path / "more")
    save(tmp_path, "beside.png", red(), "a train")
    assert len(Folder(tmp_path, 16)) == 5  # without another split it is a folder like any other
    (tmp_path / names[0]).rename(tmp_path / "test")
    assert len(Folder(tmp_path, 16)) == 5 and folder.unseen(tmp_path, 16) is None  # trained on, so not unseen


def test_a_test_split_without_captions_is_none(tmp_path):
    imagefolder(tmp_path / "train", "csv")
    (tmp_path / "test").mkdir()
    red().save(tmp_path / "test" / "a.png")
    assert len(Folder(tmp_path, 16)) == 2 and folder.unseen(tmp_path, 16) is None


def test_a_picture_may_have_several_captions(tmp_path):
    imagefolder(tmp_path, "jsonl")
    rows = [dict(file_name="a.png", text=["red", "a  red thing"]), dict(file_name="d.png", caption="green")]
    rows += [dict(file_name="in/b.png", text=["blue", ""]), dict(file_name="in/c.png", text=[])]
    (tmp_path / "metadata.jsonl").write_text("\n".join(map(json.dumps, rows)))
    found = Folder(tmp_path, 16)
    assert found.variants == [["red", "a red thing"], ["green"]] and found.captions == ["red", "green"]
    assert [reason for _, reason in found.skipped] == ["the caption is empty", "the caption is not a text but []"]


@pytest.mark.parametrize("table, message", [
    (b"file_name,text\n\xff.png,red\n", "metadata.csv, line 1: not a table of commas in UTF-8"),
    (b"picture,words\na.png,red\n", 'metadata.csv, line 2: not {"file_name"'),
    (b"file_name,text\na.png\n", "a.png: the caption is not a text but null"),
    (b"", "a.png: metadata.csv has no line for it"),
])  # fmt: skip
def test_a_table_that_cannot_be_used_is_named(tmp_path, table, message):
    red().save(tmp_path / "a.png")
    (tmp_path / "metadata.csv").write_bytes(table)
    with pytest.raises(ValueError) as error:
        Folder(tmp_path, 16)
    assert message in str(error.value)


def test_ctrl_c_does_not_wait_for_the_rest_of_a_folder(tmp_path, monkeypatch):
    for i in range(300):
        (tmp_path / f"{i}.png").touch()
        (tmp_path / f"{i}.txt").write_text("a star")
    read = []

    def slowly(path):
        time.sleep(0.01)
        read.append(path)
        return path

    def interrupted(results, *_, **__):
        yield next(iter(results))
        raise KeyboardInterrupt

    monkeypatch.setattr(folder, "tqdm", interrupted)
    with pytest.raises(KeyboardInterrupt):
        folder.read_folder(tmp_path, list(tmp_path.iterdir()), {".png"}, slowly, "--data", "picture")
    assert len(read) < 100
