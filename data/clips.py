"""Training clips: a few pictures a second, with captions.

    shapes   one or two shapes that move, grow, shrink or stand still, drawn and captioned here
    folder   any folder of clips (animated GIF, WebP or PNG; films, through the program ffmpeg; folders of frames), each
             with a caption in a .txt of the same name, or one captions.jsonl for all

A data set has `captions`, a list of N strings, `clips(indices)`, a (B, F, 3, S, S) uint8 tensor, and `group`, as in data.py.

Clips of shapes are made so that the paper's problem exists: they are fewer than the pictures, blurred and noisy, and have
not all colours and textures. What a cyan, dotted thing looks like, a video model can know from pictures alone. Things
move in hops, from the middle of one cell to the next, so that each frame is a picture that the image model could draw,
and from one end of the picture to the other, so that the word for the way tells as much as it can.
"""
import random
import shutil
import subprocess
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageFilter, ImageOps

from data import folder as data
from data import shapes
from data.shapes import COMPARISONS, RELATIONS, SIZES

# ---------------------------------------------------------------------------------------------------------- shapes

MOTIONS = {  # signs of the way (x, y) and of the growth
    "moving left": (-1, 0, 0), "moving right": (1, 0, 0), "moving up": (0, -1, 0), "moving down": (0, 1, 0),
    "moving up left": (-1, -1, 0), "moving up right": (1, -1, 0), "moving down left": (-1, 1, 0),
    "moving down right": (1, 1, 0), "growing": (0, 0, 1), "shrinking": (0, 0, -1), "standing still": (0, 0, 0),
}  # fmt: skip
REVERSED = {name: next(n for n, v in MOTIONS.items() if v == tuple(-a for a in m)) for name, m in MOTIONS.items()}
COLOURS = ("red", "orange", "green", "blue", "purple")  # the colours and textures that clips have
TEXTURES = ("solid", "striped")


def path(i, things, motions, relation, frames, rng):
    """A place for thing i, and its place and radius in each frame: a list of F Things. What moves goes from one end of
    the picture to the other, cell by cell. Along an axis in which it does not move, it stands in one cell, as in pictures
    (`cells_of`). Where something moves sideways, an order from left to right cannot last: then it is from top to bottom."""
    thing, (dx, dy, growth) = things[i], MOTIONS[motions[i]]
    sizes = list(SIZES.values())[::growth] if growth else [SIZES[thing.size]]
    columns, rows = (shapes.cells_for(share * max(sizes)) for share in shapes.BOXES[thing.shape])
    if relation not in RELATIONS and any(MOTIONS[motion][0] for motion in motions):
        still_rows, still_columns = shapes.cells_of(i, things, relation, True, rows, columns)  # rows in the columns' place
    else:
        still_columns, still_rows = shapes.cells_of(i, things, relation, True, columns, rows)
    x = columns[::dx] if dx else [rng.choice(still_columns)]
    y = rows[::dy] if dy else [rng.choice(still_rows)]
    steps = ([way[round(k * (len(way) - 1) / (frames - 1))] for way in (sizes, x, y)] for k in range(frames))  # 0 0 1 1 2 2 3 3
    return [replace(thing, r=r, x=x, y=y) for r, x, y in steps]


def apart(a, b):
    """Whether the boxes of two things stay apart."""
    (aw, ah), (bw, bh) = shapes.BOXES[a.shape], shapes.BOXES[b.shape]
    return abs(a.x - b.x) > aw * a.r + bw * b.r + 0.02 or abs(a.y - b.y) > ah * a.r + bh * b.r + 0.02


def random_path(things, motions, relation, rng, frames, tries=300):
    """Places for things such that in every frame all are inside and apart and the relation, if any, is clear between
    the two: a list of F lists of Things; None if no try gives that."""
    for _ in range(tries):
        paths = [path(i, things, motions, relation, frames, rng) for i in range(len(things))]
        scenes = [list(scene) for scene in zip(*paths)]
        if all((len(scene) < 2 or apart(*scene)) and (not relation or shapes.clear(relation, *scene)) for scene in scenes):
            return scenes
    return None


def unsized(things, motions):
    """The things, without a size where it changes."""
    return [replace(t, size="") if m in ("growing", "shrinking") else t for t, m in zip(things, motions)]


def describe(things, motions, relation, rng):
    """A caption: "a red circle moving left", "a red circle above a blue star, both growing", or, where the motions
    differ, "a red circle moving left and a blue star standing still"."""
    things = unsized(things, motions)
    if len(things) == 1:
        return f"{shapes.describe(things, None, rng)} {motions[0]}"
    if motions[0] == motions[1]:
        return f"{shapes.describe(things, relation, rng)}, both {motions[0]}"
    return " and ".join(f"{shapes.noun(thing)} {motion}" for thing, motion in zip(things, motions))


class MovingShapes:
    """count (an even number of) clips; 2k+1 is 2k backwards, both drawn from (seed, k) alone, when they are asked for: the
    same frames in another order and another word for it, which is what that word is then learned from. (Compare
    shapes.Shapes.)"""

    skipped, held = (), 0
    group = 2

    def __init__(self, size=64, frames=8, count=4096, seed=0):
        self.size, self.frames, self.seed, self.last = size, frames, seed, (None, None)  # last: what was filmed, to be reversed
        self.scenes, self.captions = [], []
        for k in range(count // 2):
            rng = random.Random(f"clip {seed} {k}")
            number, scenes = rng.choice((1, 2, 2)), None
            while scenes is None:
                things, motions, relation = random_scene(rng, number)
                scenes = random_path(things, motions, relation, rng, frames, tries=50)  # some scenes no try would give
            wording = rng.random()
            for scenes, motions in ((scenes, motions), (scenes[::-1], [REVERSED[m] for m in motions])):
                self.scenes.append(scenes)
                self.captions.append(describe(scenes[0], motions, relation, random.Random(wording)))

    def __len__(self):
        return len(self.captions)

    def clips(self, indices):
        clips = np.stack([self.film(int(i)) for i in indices])
        return torch.from_numpy(clips).permute(0, 1, 4, 2, 3)

    def film(self, i):
        """Clip i, blurred and noisy, as a bad camera sees it: (F, S, S, 3) uint8."""
        if i % 2:
            return self.film(i - 1)[::-1]
        if i == self.last[0]:
            return self.last[1]
        rng = np.random.default_rng((self.seed, i // 2))
        blur = ImageFilter.GaussianBlur(rng.uniform(0.004, 0.01) * self.size)
        frames = np.stack([np.asarray(Image.fromarray(shapes.draw(scene, self.size)).filter(blur)) for scene in self.scenes[i]])
        self.last = i, (frames + rng.normal(0, 5, frames.shape)).round().clip(0, 255).astype(np.uint8)
        return self.last[1]


def random_scene(rng, number):
    """One or two things without a place, their motions, and a relation or None, as clips have them."""
    things = []
    while len(things) < number:
        thing = shapes.random_thing(rng)
        if thing.colour in COLOURS and thing.texture in TEXTURES:
            things.append(thing)
    motions, relation = [rng.choice(list(MOTIONS))] * len(things), None
    if len(things) == 2 and rng.random() < 0.5:
        motions[1] = rng.choice(list(MOTIONS))
    if len(things) == 2 and motions[0] == motions[1] and rng.random() < 0.7:
        still_sized = motions[0] not in ("growing", "shrinking")
        relation = rng.choice(RELATIONS + COMPARISONS if still_sized else RELATIONS)
    return shapes.sized(things, relation), motions, relation


# ---------------------------------------------------------------------------------------------------------- folders

ANIMATIONS = (".gif", ".webp", ".png", ".apng")
FILMS = (".mp4", ".mov", ".mkv", ".webm", ".avi", ".m4v")


def read_animation(file, frames, fps):
    """The frames that show at 0, 1/fps, 2/fps, … of an animated picture, at most `frames`, as Pillow images. By duration,
    not by number: the formats merge equal neighbours. A frame without a duration lasts 0.1 s."""
    with Image.open(file) as image:
        found, start = [], 0.0
        for i in range(getattr(image, "n_frames", 1)):
            image.seek(i)
            still = image.convert("RGBA")
            start += (image.info.get("duration") or 100) / 1000
            while len(found) < frames and len(found) / fps < start - 1e-6:
                found.append(still)
    if i == 0:
        raise ValueError("a single picture, not a clip")
    return found


def read_film(file, frames, fps, size):
    """The same of a film, through the program ffmpeg, which also scales and crops."""
    if shutil.which("ffmpeg") is None:
        raise ValueError("to read films install the program ffmpeg (on Debian: apt-get install ffmpeg)")
    filters = f"fps={fps},scale={size}:{size}:force_original_aspect_ratio=increase,crop={size}:{size}"
    command = ["ffmpeg", "-v", "error", "-i", str(file), "-vf", filters, "-frames:v", str(frames), "-f", "rawvideo", "-pix_fmt", "rgb24", "-"]  # fmt: skip
    result = subprocess.run(command, capture_output=True, stdin=subprocess.DEVNULL)
    if result.returncode or len(result.stdout) < size * size * 3:
        lines = result.stderr.decode(errors="replace").strip().splitlines()
        raise ValueError(f"ffmpeg cannot read it: {lines[-1] if lines else 'no picture in it'}")
    array = np.frombuffer(result.stdout, np.uint8)
    return array[: len(array) // (size * size * 3) * size * size * 3].reshape(-1, size, size, 3)


def open_clip(file, size, frames, fps):
    """A clip file, or a folder of frames (taken to be fps a second, in the order of names) → its first F frames at fps a
    second, (F, S, S, 3) uint8, scaled and cropped as pictures are; and how many frames it really had. A shorter clip's
    last frame is held. ValueError with the reason if it cannot be used, or nothing in it moves."""
    file = Path(file)
    try:
        if file.is_dir():
            names = sorted(p for p in file.iterdir() if p.suffix.lower() in data.PICTURES)[:frames]
            clip = [data.open_picture(name, size) for name in names]
        elif file.suffix.lower() in FILMS:
            clip = read_film(file, frames, fps, size)
        else:
            clip = []
            for still in read_animation(file, frames, fps):
                still = Image.alpha_composite(Image.new("RGBA", still.size, "white"), still).convert("RGB")
                clip.append(np.asarray(ImageOps.fit(still, (size, size), Image.Resampling.LANCZOS)))
    except ValueError:
        raise
    except Exception as error:  # Pillow raises OSError, SyntaxError, EOFError, … on damaged files
        raise ValueError(f"not a whole clip ({error})") from None
    if len(clip) < 2 or all((frame == clip[0]).all() for frame in clip):
        raise ValueError(f"nothing moves in its first {frames / fps:g} seconds")
    return np.stack([clip[min(i, len(clip) - 1)] for i in range(frames)]), len(clip)


class ClipFolder:
    """A folder of clips with captions, read into memory (3·F·S² bytes a clip). What cannot be used is left out and listed
    in `skipped` as (path, reason); clips shorter than F frames are counted in `held`. ValueError if the folder is missing
    or nothing in it can be used."""

    group = 1

    def __init__(self, folder, size=64, frames=8, fps=4):
        folder, self.size, self.frames = Path(folder), size, frames
        entries = sorted(folder.iterdir()) if folder.is_dir() else []
        entries = (entry for entry in entries if entry.is_dir() or entry.suffix.lower() in ANIMATIONS + FILMS)
        read = lambda file: open_clip(file, size, frames, fps)
        self.captions, found, self.skipped = data.read_folder(folder, entries, read, "--clips", "clip (gif, webp, png, mp4, …)")
        self.held = sum(length < frames for _, length in found)
        self.array = torch.from_numpy(np.stack([clip for clip, _ in found])).permute(0, 1, 4, 2, 3)  # (N, F, 3, S, S)

    def __len__(self):
        return len(self.captions)

    def clips(self, indices):
        return self.array[torch.as_tensor(indices)]


def load(clips, size, frames, fps, seed=0):
    """The clips that --clips names: "shapes" or a folder."""
    return MovingShapes(size, frames, seed=seed) if clips == "shapes" else ClipFolder(clips, size, frames, fps)
