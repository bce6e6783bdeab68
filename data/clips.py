"""Training clips with captions, at a few frames a second.

    shapes   moving shapes, drawn here (moving_shapes.py)
    folder   any folder of clips: animated GIF, WebP or PNG; films, read by the program ffmpeg; folders of
             frames. Captions are as in folder.py. NAME.txt beside it has the caption of the folder NAME.

A data set has `captions`, `group` and `skipped` as in folder.py; `clips(indices)`, (B, F, 3, S, S) uint8; and
`held`, the number of clips that repeat their last frame, having fewer than F.
"""
import shutil
import subprocess
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageSequence

from data.folder import PICTURES, fitted, open_picture, read_folder
from data.moving_shapes import MovingShapes

ANIMATIONS = (".gif", ".webp", ".png", ".apng")
FILMS = (".mp4", ".mov", ".mkv", ".webm", ".avi", ".m4v")


def read_animation(file, size, frames, fps):
    """An animated picture → a list of at most F frames (S, S, 3) uint8, those shown at 0, 1/fps, 2/fps, …
    seconds. Durations count, since the formats merge equal neighbours; a missing one is 0.1 s."""
    with Image.open(file) as image:
        found, end = [], 0.0
        for i, frame in enumerate(ImageSequence.Iterator(image)):
            frame = frame.convert("RGBA")
            end += (image.info.get("duration") or 100) / 1000
            while len(found) < frames and len(found) / fps < end - 1e-6:
                found.append(fitted(frame, size))
    if i == 0:
        raise ValueError("a single picture, not a clip")
    return found


def read_film(file, size, frames, fps):
    """A film → at most F frames (F, S, S, 3) uint8 at fps a second, read and scaled by the program ffmpeg."""
    if shutil.which("ffmpeg") is None:
        raise ValueError("to read films install the program ffmpeg (on Debian: apt-get install ffmpeg)")
    filters = f"fps={fps},scale={size}:{size}:force_original_aspect_ratio=increase,crop={size}:{size}"
    command = ["ffmpeg", "-v", "error", "-i", str(file), "-vf", filters, "-frames:v", str(frames),
               "-f", "rawvideo", "-pix_fmt", "rgb24", "-"]
    result = subprocess.run(command, capture_output=True, stdin=subprocess.DEVNULL)
    count = len(result.stdout) // (size * size * 3)
    if result.returncode or count == 0:
        lines = result.stderr.decode(errors="replace").strip().splitlines()
        raise ValueError(f"ffmpeg cannot read it: {lines[-1] if lines else 'no picture in it'}")
    return np.frombuffer(result.stdout, np.uint8, count * size * size * 3).reshape(count, size, size, 3)


def open_clip(file, size, frames, fps):
    """A clip file, or a folder of frames (fps a second, ordered by name) → its first F frames at fps a second
    (F, S, S, 3) uint8, scaled and cropped like pictures, and how many of them it had. A shorter clip repeats
    its last frame. ValueError with the reason if it cannot be used or nothing in it moves."""
    try:
        if file.is_dir():
            names = sorted(path for path in file.iterdir() if path.suffix.lower() in PICTURES)[:frames]
            clip = [open_picture(name, size) for name in names]
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
        entries = sorted(folder.iterdir()) if folder.is_dir() else []
        entries = [entry for entry in entries if entry.is_dir() or entry.suffix.lower() in ANIMATIONS + FILMS]
        read = lambda file: open_clip(file, size, frames, fps)
        what = "clip (gif, webp, png, mp4, …)"
        self.captions, found, self.skipped = read_folder(folder, entries, read, "--clips", what)
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
