import hashlib
import re
import shutil
import subprocess

import numpy as np
import pytest
import torch
from PIL import Image

from data import clips, moving_shapes, shapes
from data.moving_shapes import MOTIONS, MovingShapes


def test_clips_are_true_to_their_captions():
    drawn = MovingShapes(count=300, seed=1)
    assert drawn.captions == MovingShapes(count=300, seed=1).captions
    assert 0.57 < np.mean([len(scenes[0]) == 2 for scenes in drawn.scenes]) < 0.77  # two of three have two
    for scenes, caption in zip(drawn.scenes, drawn.captions):
        assert len(scenes) == 8
        for thing in sum(scenes, []):  # at most 0.03 past the picture
            for centre, half in zip((thing.x, thing.y), shapes.BOXES[thing.shape]):
                assert half * thing.r - 0.03 <= centre <= 1.03 - half * thing.r
        told = re.findall("|".join(sorted(MOTIONS, key=len, reverse=True)), caption)
        for i, (first, second, last) in enumerate(zip(scenes[0], scenes[1], scenes[-1])):
            dx, dy = np.sign([round(last.x - first.x, 6), round(last.y - first.y, 6)])
            growth = np.sign(round(last.r - first.r, 6))
            name = next(n for n, m in MOTIONS.items() if m == (dx, dy, growth))
            assert name == told[min(i, len(told) - 1)], (caption, name)
            assert first.colour in moving_shapes.COLOURS and first.texture in moving_shapes.TEXTURES
            assert not first.unseen
            cells = shapes.cells_inside(first.shape, max(first.r, last.r))
            for a, b, moves, ends in zip((first.x, first.y), (last.x, last.y), (dx, dy), cells):
                assert not moves or (a, b) == (ends[0], ends[-1])[::int(moves)]
            assert 4 * second.x % 1 == 0.5 and f"{first.colour} {first.shape}" in caption
        for relation in (*shapes.RELATIONS, *shapes.COMPARISONS):
            if f" {relation} " in caption:
                names = [shapes.noun(thing, False).split(" ", 1)[1] for thing in scenes[0]]  # without a, an
                order = 1 if caption.index(names[0]) <= caption.index(names[1]) else -1
                always = all(shapes.holds(relation, *scene[::order]) for scene in scenes)
                assert names[0] == names[1] or always, caption


def test_what_does_not_move_along_an_axis_stands_in_the_order_of_the_caption():
    """From left to right; where something moves sideways, from top to bottom. A relation goes before."""
    drawn, seen = MovingShapes(count=600, seed=2), {"x": 0, "y": 0}
    for scenes, caption in zip(drawn.scenes, drawn.captions):
        if len(scenes[0]) < 2 or any(f" {relation} " in caption for relation in shapes.RELATIONS):
            continue
        ends = list(zip(scenes[0], scenes[-1]))
        moving = {axis: [getattr(a, axis) != getattr(b, axis) for a, b in ends] for axis in "xy"}
        axis = "y" if any(moving["x"]) else "x"
        if not any(moving[axis]):
            seen[axis] += 1
            assert all(getattr(a, axis) < getattr(b, axis) for a, b in scenes), caption
    assert min(seen.values()) > 20


def test_a_seed_gives_the_same_clips_as_when_the_demo_was_trained():
    drawn = MovingShapes(count=300, seed=0)
    digest = hashlib.sha256(repr((drawn.captions, drawn.scenes)).encode()).hexdigest()
    assert digest[:16] == "952447f73e57e2ce"


def test_a_pair_is_one_clip_forwards_and_backwards():
    drawn = MovingShapes(count=6)
    forth, back = drawn.clips([0, 2, 4]), drawn.clips([1, 3, 5])
    assert forth.shape == (3, 8, 3, 64, 64) and forth.dtype == torch.uint8
    assert torch.equal(forth, back.flip(1)) and torch.equal(forth, drawn.clips([0, 2, 4]))
    assert (forth[:, 0] != forth[:, 7]).any()


def frames(count=8, size=40):
    """A dark square that moves."""
    made = []
    for i in range(count):
        array = np.full((size, size + 8, 3), 255, np.uint8)
        array[10:20, 2 + 3 * i : 12 + 3 * i] = (200, 0, 0)
        made.append(Image.fromarray(array))
    return made


def left_edge(clip):
    """Where the dark square begins in each frame of (F, S, S, 3)."""
    return [int((frame[:, :, 1] < 128).any(0).argmax()) for frame in clip]


@pytest.mark.parametrize("kind", ["gif", "webp", "png"])
def test_animations_go_by_duration(tmp_path, kind):
    """Three pictures shown for 500, 250 and 250 ms are four frames at 4 frames a second."""
    a, b, c = frames(3)
    path = tmp_path / f"x.{kind}"
    a.save(path, save_all=True, append_images=[b, c], duration=[500, 250, 250], lossless=True)
    clip, length = clips.open_clip(path, 40, 6, 4)
    assert clip.shape == (6, 40, 40, 3) and clip.dtype == np.uint8 and length == 4
    edges = left_edge(clip)
    assert edges[0] == edges[1] < edges[2] < edges[3] == edges[4] == edges[5]  # the last one is held


def save(folder, name, caption="a thing that moves", **options):
    made = options.pop("frames", frames())
    made[0].save(folder / name, save_all=True, append_images=made[1:], duration=250, **options)
    if caption is not None:
        (folder / name).with_suffix(".txt").write_text(caption)


def test_a_folder_of_clips_and_what_cannot_be_used(tmp_path):
    save(tmp_path, "good.gif")
    save(tmp_path, "good2.webp")
    save(tmp_path, "short.gif", frames=frames(3))
    save(tmp_path, "still.gif", frames=[frames()[0]] * 5)
    save(tmp_path, "silent.gif", caption=None)
    save(tmp_path, "empty.gif", caption=" ")
    (tmp_path / "cut.webp").write_bytes((tmp_path / "good2.webp").read_bytes()[:200])
    (tmp_path / "cut.txt").write_text("cut short")
    (tmp_path / "film.mp4").write_bytes(b"no film at all")
    (tmp_path / "film.txt").write_text("no film")
    (tmp_path / "sequence.1").mkdir()
    for i, frame in enumerate(frames(9)):
        frame.save(tmp_path / "sequence.1" / f"{i:03d}.png")
    (tmp_path / "sequence.1.txt").write_text("a folder of frames")
    found = clips.ClipFolder(tmp_path, 32, 8, 4)
    assert sorted(found.captions) == ["a folder of frames"] + ["a thing that moves"] * 3
    assert found.held == 1 and found.clips([0, 1, 2, 3]).shape == (4, 8, 3, 32, 32)
    reasons = {path.name: reason for path, reason in found.skipped}
    assert set(reasons) == {"still.gif", "silent.gif", "empty.gif", "cut.webp", "film.mp4"}
    assert "nothing moves" in reasons["still.gif"] or "a single picture" in reasons["still.gif"]
    assert "no caption" in reasons["silent.gif"] and "the caption is empty" in reasons["empty.gif"]
    assert "ffmpeg" in reasons["film.mp4"]


def test_films_without_ffmpeg_say_so(tmp_path, monkeypatch):
    (tmp_path / "film.mp4").write_bytes(b"")
    monkeypatch.setattr(shutil, "which", lambda name: None)
    with pytest.raises(ValueError, match="install the program ffmpeg"):
        clips.open_clip(tmp_path / "film.mp4", 32, 8, 4)


@pytest.mark.skipif(shutil.which("ffmpeg") is None, reason="the program ffmpeg is not installed")
def test_films(tmp_path):
    for i, frame in enumerate(frames(16)):
        frame.save(tmp_path / f"{i:03d}.png")
    film = tmp_path / "film.mp4"
    command = ["ffmpeg", "-v", "error", "-r", "8", "-i", tmp_path / "%03d.png", "-pix_fmt", "yuv420p", film]
    subprocess.run(command, check=True)
    clip, length = clips.open_clip(film, 40, 5, 4)  # two seconds at 8 frames a second: every second frame
    assert length == 5 and left_edge(clip) == sorted(set(left_edge(clip)))


def numbered(count, size=32):
    """Frames whose grey is 8 times their number."""
    return [Image.new("RGB", (size, size), (8 * i,) * 3) for i in range(count)]


def shown(clip, length):
    """Which of the numbered frames a clip consists of."""
    return [round(frame.mean() / 8) for frame in clip[:length]]


@pytest.mark.parametrize("duration, fps, expected", [
    (50, 4, [0, 5, 10, 15]),  # 20 a second
    (200, 4, [0, 1, 2, 3, 5, 6, 7, 8]),  # 5 a second: what shows at 0.25 s is the second frame
    (0, 5, [0, 2, 4, 6, 8, 10, 12, 14]),  # no delay is 100 ms, as viewers have it
    (10, 10, list(range(8))),  # and so is one too short to be meant
    (20, 10, [0, 5, 10, 15]),
])
@pytest.mark.parametrize("kind", ["gif", "webp", "png"])
def test_a_clip_has_the_frames_that_show_at_its_times(tmp_path, kind, duration, fps, expected):
    first, *others = numbered(20)
    path = tmp_path / f"x.{kind}"
    first.save(path, save_all=True, append_images=others, duration=duration, lossless=True)
    assert shown(*clips.open_clip(path, 32, 8, fps)) == expected


def test_an_animation_is_decoded_as_far_as_needed(tmp_path):
    first, *others = numbered(20)
    first.save(tmp_path / "x.gif", save_all=True, append_images=others, duration=100)
    raw = (tmp_path / "x.gif").read_bytes()
    (tmp_path / "x.gif").write_bytes(raw[: len(raw) // 2])  # the second half is missing
    assert shown(*clips.open_clip(tmp_path / "x.gif", 32, 4, 10)) == [0, 1, 2, 3]
    with pytest.raises(ValueError, match="nothing moves in its first 0.05 seconds"):
        clips.open_clip(tmp_path / "x.gif", 32, 2, 40)


def test_a_picture_for_programs_that_cannot_play_is_no_frame(tmp_path):
    white = Image.new("RGB", (32, 32), "white")
    white.save(tmp_path / "x.png", save_all=True, append_images=numbered(4), default_image=True, duration=250)
    assert shown(*clips.open_clip(tmp_path / "x.png", 32, 4, 4)) == [0, 1, 2, 3]


def test_frames_in_a_folder_go_by_their_numbers(tmp_path):
    for i, frame in enumerate(numbered(12), 1):
        frame.save(tmp_path / f"{i}.{('png', 'bmp')[i % 2]}")
    for name in ("._1.png", "Thumbs.db", "notes.txt"):
        (tmp_path / name).write_bytes(b"?")
    assert shown(*clips.open_clip(tmp_path, 32, 12, 4)) == list(range(12))
    (tmp_path / "10.png").write_bytes(b"?")
    with pytest.raises(ValueError, match="^10.png: not a whole picture"):
        clips.open_clip(tmp_path, 32, 12, 4)
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match="no frames in this folder"):
        clips.open_clip(tmp_path / "empty", 32, 12, 4)


def test_every_file_beside_the_clips_is_named(tmp_path):
    for i in (10, 9):
        save(tmp_path, f"{i}.gif", f"clip {i}")
    (tmp_path / "train").mkdir()
    for name in ("a.jpg", "b.jpg", "c.swf", "._9.gif", "README"):
        (tmp_path / name).write_bytes(b"?")
    found = clips.ClipFolder(tmp_path, 32, 8, 4)
    assert found.captions == ["clip 9", "clip 10"]
    assert [reason for _, reason in found.skipped] == [
        "2 .jpg files: no kind of clip that can be read", "1 .swf file: no kind of clip that can be read",
        "no caption: train.txt is missing",
    ]


def test_a_listing_may_name_clips_in_folders_below(tmp_path):
    (tmp_path / "train").mkdir()
    save(tmp_path / "train", "a.gif", caption=None)
    save(tmp_path, "b.gif", caption=None)
    (tmp_path / "captions.jsonl").write_text('{"file": "train/a.gif", "caption": "a clip"}')
    found = clips.ClipFolder(tmp_path, 32, 8, 4)
    assert found.captions == ["a clip"]
    assert found.skipped == [(tmp_path / "b.gif", "captions.jsonl has no line for it")]


def test_the_films_command_takes_what_shows_at_each_time(tmp_path):
    words = clips.film_command(tmp_path / "a:b.mp4", 32, 8, 4)
    assert "setpts=PTS-STARTPTS,fps=4:round=up," in words[words.index("-vf") + 1]
    assert words[words.index("-i") + 1] == f"file:{tmp_path}/a:b.mp4"  # a colon is no protocol


@pytest.mark.skipif(shutil.which("ffmpeg") is None, reason="the program ffmpeg is not installed")
@pytest.mark.parametrize("name, rate, expected", [
    ("24.mp4", 24, [0, 6, 12, 18]), ("5.avi", 5, [0, 1, 2, 3, 5, 6, 7, 8]), ("30.ts", 30, [0, 7, 15, 22]),
    ("24.mpg", 24, [0, 6, 12, 18]), ("10.flv", 10, [0, 2, 5, 7, 10, 12, 15, 17]),
])
def test_films_have_the_frames_that_show_at_their_times(tmp_path, name, rate, expected):
    made = [np.asarray(frame).tobytes() for frame in numbered(30)[: rate if rate > 10 else 20]]
    command = ["ffmpeg", "-v", "error", "-f", "rawvideo", "-pix_fmt", "rgb24", "-s", "32x32", "-r", str(rate),
               "-i", "-", "-q:v", "1", "-pix_fmt", "yuv420p", tmp_path / name]
    subprocess.run(command, input=b"".join(made), check=True)
    assert shown(*clips.open_clip(tmp_path / name, 32, 8, 4)) == expected


def test_nothing_usable(tmp_path):
    with pytest.raises(ValueError, match="there is no such folder"):
        clips.ClipFolder(tmp_path / "none")
    with pytest.raises(ValueError, match="no usable clip"):
        clips.ClipFolder(tmp_path)
