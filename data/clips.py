"""Training clips with captions, at a few frames a second.

    shapes   moving shapes, drawn here (moving_shapes.py)
    folder   any folder of clips: animated GIF, WebP, PNG or AVIF; films, read by the program ffmpeg; folders
             of frames. Captions are as in folder.py. NAME.txt beside it has the caption of the folder NAME.

Frame k of a clip, for k = 0 … F-1, is the one that shows k/fps seconds after the start.

A data set has `captions`, `group` and `skipped` as in folder.py; `clips(indices)`, (B, F, 3, S, S) uint8; and
`held`, the number of clips that repeat their last frame, having fewer than F.
"""
import shutil
import subprocess
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageSequence

from data.folder import PICTURES, fitted, is_data, natural, open_picture, read_folder
from data.moving_shapes import MovingShapes

ANIMATIONS = (".gif", ".webp", ".png", ".apng", ".avif", ".avifs", ".fli", ".flc")
FILMS = (".mp4", ".m4v", ".mov", ".mkv", ".webm", ".avi", ".mpg", ".mpeg", ".wmv", ".asf", ".flv", ".f4v",
         ".ts", ".mts", ".m2ts", ".vob", ".3gp", ".3g2", ".ogv", ".ogg", ".mxf", ".rm", ".divx")


def read_animation(file, size, frames, fps):
    """An animated picture → a list of at most F frames (S, S, 3) uint8, decoded only as far as needed.
    Durations count, since the formats merge equal neighbours. As in browsers, 10 ms or less means 100."""
    with Image.open(file) as image:
        if not getattr(image, "is_animated", False):
            raise ValueError("a single picture, not a clip")
        found, end = [], 0.0
        for i, frame in enumerate(ImageSequence.Iterator(image)):
            if i == 0 and getattr(image, "default_image", False):
                continue  # what a program shows that cannot play it
            frame = frame.convert("RGBA")
            duration = image.info.get("duration") or 0  # in ms
            end += (duration if duration > 10 else 100) / 1000
            while len(found) < frames and len(found) / fps < end - 1e-6:
                found.append(fitted(frame, size))
            if len(found) == frames:
                break
    return found


def film_command(file, size, frames, fps):
    """The command by which ffmpeg writes frames as raw RGB. round=up moves each of the film's frames to the
    next multiple of 1/fps, where the last one to come is kept: the one that shows then."""
    filters = f"setpts=PTS-STARTPTS,fps={fps}:round=up,"
    filters += f"scale={size}:{size}:force_original_aspect_ratio=increase,crop={size}:{size}"
    return ["ffmpeg", "-v", "error", "-i", f"file:{file}", "-vf", filters, "-frames:v", str(frames),
            "-f", "rawvideo", "-pix_fmt", "rgb24", "-"]


def read_film(file, size, frames, fps):
    """A film → at most F frames (F, S, S, 3) uint8, read and scaled by the program ffmpeg."""
    if shutil.which("ffmpeg") is None:
        raise ValueError("to read films install the program ffmpeg (on Debian: apt-get install ffmpeg)")
    command = film_command(file, size, frames, fps)
    result = subprocess.run(command, capture_output=True, stdin=subprocess.DEVNULL)
    count = len(result.stdout) // (size * size * 3)
    if result.returncode or count == 0:
        lines = result.stderr.decode(errors="replace").strip().splitlines()
        raise ValueError(f"ffmpeg cannot read it: {lines[-1] if lines else 'no picture in it'}")
    return np.frombuffer(result.stdout, np.uint8, count * size * size * 3).reshape(count, size, size, 3)


def read_frames(folder, size, frames):
    """A folder of frames, in natural order → the first F of them, a list of (S, S, 3) uint8."""
    paths = [path for path in folder.iterdir() if path.suffix.lower() in PICTURES and is_data(path.name)]
    if not paths:
        raise ValueError("no frames in this folder. Clips are read from the folder that is named, not below")
    found = []
    for path in sorted(paths, key=natural)[:frames]:
        try:
            found.append(open_picture(path, size))
        except ValueError as reason:
            raise ValueError(f"{path.name}: {reason}") from None
    return found


def open_clip(file, size, frames, fps):
    """A clip file, or a folder of frames (fps a second) → its first F frames at fps a second (F, S, S, 3)
    uint8, scaled and cropped like pictures, and how many of them it had. A shorter clip repeats its last
    frame. ValueError with the reason if it cannot be used or nothing in it moves."""
    try:
        if file.is_dir():
            clip = read_frames(file, size, frames)
        elif file.suffix.lower() in FILMS:
            clip = read_film(file, size, frames, fps)
        else:
            clip = read_animation(file, size, frames, fps)
    except ValueError:
        raise
    except Exception as error:  # Pillow raises OSError, SyntaxError, EOFError, … on damaged files
        raise ValueError(f"not a whole clip ({error})") from None
    if len(clip) < 2 or all((frame == clip[0]).all() for frame in clip):
        raise ValueError(f"nothing moves in its first {frames / fps:g} seconds")
    return np.stack([clip[min(i, len(clip) - 1)] for i in range(frames)]), len(clip)


class ClipFolder:
    """A folder of clips with captions, read into memory: 3·F·S² bytes a clip. Raises as read_folder."""

    group = 1

    def __init__(self, folder, size=64, frames=8, fps=4):
        entries = [path for path in folder.iterdir() if is_data(path.name)] if folder.is_dir() else []
        entries.sort(key=natural)
        read = lambda file: open_clip(file, size, frames, fps)
        kinds = ANIMATIONS + FILMS
        self.variants, found, self.skipped = read_folder(folder, entries, kinds, read, "--clips", "clip")
        self.captions = [captions[0] for captions in self.variants]
        self.held = sum(length < frames for _, length in found)
        self.array = torch.from_numpy(np.stack([clip for clip, _ in found])).permute(0, 1, 4, 2, 3)

    def __len__(self):
        return len(self.captions)

    def clips(self, indices):
        """B indices → (B, F, 3, S, S) uint8."""
        return self.array[torch.as_tensor(indices)]


def load(clips, size, frames, fps, seed=0):
    """The data set that --clips names: "shapes" or a folder."""
    if clips == "shapes":
        return MovingShapes(size, frames, seed=seed)
    return ClipFolder(Path(clips), size, frames, fps)
