"""Results as pictures: a grid with captions, clips as animations and contact sheets, and curves."""
import shutil
import subprocess
import textwrap

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont

FONT = ImageFont.load_default(11)
MOST_PIXELS = 500_000_000  # of a grid: 2 GB of memory


def grid(pictures, captions=None, columns=None, zoom=2):
    """(B, 3, S, S) uint8 → one Pillow image, each picture `zoom` times as large, with its caption below, of
    which 30 lines are shown. ValueError if it is too large for memory."""
    B, _, height, width = pictures.shape
    columns = columns or min(B, 8)
    width, height, pad = width * zoom, height * zoom, 4
    wrap = textwrap.TextWrapper(max(8, width // 6), max_lines=30, placeholder=" …").wrap
    lines = [wrap(caption) for caption in captions or [""] * B]
    foot = 13 * max(map(len, lines)) + (6 if captions else 0)
    rows = -(-B // columns)
    size = columns * (width + pad) + pad, rows * (height + foot + pad) + pad
    if size[0] * size[1] > MOST_PIXELS:
        raise ValueError(f"a grid of {size[0]}×{size[1]} pixels is too large")
    sheet = Image.new("RGB", size, "white")
    pen = ImageDraw.Draw(sheet)
    for i, picture in enumerate(pictures):
        x, y = pad + i % columns * (width + pad), pad + i // columns * (height + foot + pad)
        image = Image.fromarray(picture.permute(1, 2, 0).numpy())
        sheet.paste(image.resize((width, height), Image.Resampling.NEAREST), (x, y))
        for n, line in enumerate(lines[i]):
            pen.text((x + 1, y + height + 2 + 13 * n), line, fill="black", font=FONT)
    return sheet


ANIMATED = (".gif", ".webp", ".mp4")


def animation(clips, captions, fps, path, zoom=2):
    """(B, F, 3, S, S) uint8 → one animated grid, written to path (.gif, .webp, or through the program ffmpeg
    .mp4). It lasts F/fps seconds, up to the format's unit. ValueError if the program is needed and missing,
    or fails."""
    frames = [grid(frame, captions, min(len(clips), 6), zoom) for frame in clips.unbind(1)]
    if len(clips) == 1 and captions is None:  # a clip alone has no frame around it
        frames = [Image.fromarray(frame.permute(1, 2, 0).numpy()) for frame in clips[0]]
    kind = path.suffix.lower()
    if kind != ".mp4":
        unit = 10 if kind == ".gif" else 1  # milliseconds
        ends = [round(1000 * i / fps / unit) * unit for i in range(len(frames) + 1)]
        more = dict(append_images=frames[1:], duration=np.diff(ends).tolist(), loop=0, lossless=True)
        frames[0].save(path, save_all=True, **more)
        return
    if shutil.which("ffmpeg") is None:
        raise ValueError("for mp4 install the program ffmpeg (on Debian: apt-get install ffmpeg)")
    width, height = frames[0].size
    read = ["-f", "rawvideo", "-pix_fmt", "rgb24", "-s", f"{width}x{height}", "-r", str(fps), "-i", "-"]
    even = ["-vf", "pad=ceil(iw/2)*2:ceil(ih/2)*2:color=white", "-pix_fmt", "yuv420p"]
    command = ["ffmpeg", "-v", "error", "-y", *read, *even, f"file:{path}"]  # a name may have colons
    result = subprocess.run(command, input=b"".join(map(Image.Image.tobytes, frames)), capture_output=True)
    if result.returncode:
        lines = result.stderr.decode(errors="replace").strip().splitlines()
        raise ValueError(f"ffmpeg cannot write it: {lines[-1] if lines else 'no reason given'}")


def sheet(clips, captions):
    """(B, F, 3, S, S) uint8 → one Pillow image: a row a clip, its frames from left to right, its caption
    below."""
    frames = torch.nn.functional.pad(clips, (0, 4), value=255)  # a white gap after each frame
    return grid(torch.cat(frames.unbind(1), dim=-1), captions, columns=1, zoom=1)


def curves(series, title, size=(720, 360), logarithmic=True):
    """{name: (x values, y values)}, at most five → a Pillow image of lines over a logarithmic y axis, or a
    linear one from 0 to at least 1."""
    left, right, top, bottom = 64, size[0] - 16, 36, size[1] - 32
    image = Image.new("RGB", size, "white")
    pen = ImageDraw.Draw(image)
    scaled = lambda y: np.log10(np.maximum(y, 1e-9)) if logarithmic else np.asarray(y, float)
    xs = np.concatenate([np.asarray(x, float) for x, _ in series.values()])
    ys = np.concatenate([scaled(y) for _, y in series.values()])
    x_low, x_high = xs.min(), max(xs.max(), xs.min() + 1)
    y_low, y_high = (ys.min() - 0.02, ys.max() + 0.02) if logarithmic else (0.0, max(1.0, ys.max()))
    pen.text((left, 10), title, fill="black", font=FONT)
    for x, y, x_value, value in np.linspace((left, bottom, x_low, y_low), (right, top, x_high, y_high), 5):
        pen.line([(left, y), (right, y)], fill=(225, 225, 225))
        pen.text((6, y - 7), f"{10**value if logarithmic else value:.3g}", fill="black", font=FONT)
        pen.text((x - 10, bottom + 8), f"{x_value:g}", fill="black", font=FONT)
    palette = [(30, 90, 200), (220, 60, 40), (40, 150, 70), (150, 60, 180), (230, 140, 20)]
    end = right  # of the next name, in the line of the title
    for (name, (x, y)), colour in reversed(list(zip(series.items(), palette))):
        if len(x) > 1:
            across = np.interp(x, (x_low, x_high), (left, right))
            up = np.interp(scaled(y), (y_low, y_high), (bottom, top))
            pen.line(list(zip(across, up)), fill=colour, width=2)
        end -= pen.textlength(name, font=FONT) + 12
        pen.text((end + 12, 10), name, fill=colour, font=FONT)
    return image


def to_bytes(x):
    """Pictures (…, 3, H, W) in -1…1 → uint8."""
    return ((x + 1) * 127.5).round().clamp(0, 255).to(torch.uint8)


def from_bytes(x):
    """uint8 pictures (…, 3, H, W) → fp32 in -1…1."""
    return x.float() / 127.5 - 1
