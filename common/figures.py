"""Results as pictures: a grid with captions, clips as animations and contact sheets, and curves. Pillow does
the drawing."""
import shutil
import subprocess
import textwrap

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont


def font(size=11):
    return ImageFont.load_default(size)


def grid(pictures, captions=None, columns=None, zoom=2):
    """(B, 3, S, S) uint8 → one Pillow image, each picture `zoom` times as large, with its caption below."""
    B, _, height, width = pictures.shape
    columns = columns or min(B, 8)
    width, height = width * zoom, height * zoom
    lines = [textwrap.wrap(caption, max(8, width // 6)) for caption in captions or [""] * B]
    foot = 13 * max(map(len, lines)) + (6 if captions else 0)
    pad = 4
    rows = -(-B // columns)
    size = columns * (width + pad) + pad, rows * (height + foot + pad) + pad
    sheet = Image.new("RGB", size, "white")
    pen = ImageDraw.Draw(sheet)
    for i, picture in enumerate(pictures):
        x, y = pad + i % columns * (width + pad), pad + i // columns * (height + foot + pad)
        image = Image.fromarray(picture.permute(1, 2, 0).numpy())
        sheet.paste(image.resize((width, height), Image.Resampling.NEAREST), (x, y))
        for n, line in enumerate(lines[i]):
            pen.text((x + 1, y + height + 2 + 13 * n), line, fill="black", font=font())
    return sheet


ANIMATED = (".gif", ".webp", ".mp4")


def animation(clips, captions, fps, path, zoom=2):
    """(B, F, 3, S, S) uint8 → one animated grid, written to path (.gif, .webp, or through the program ffmpeg
    .mp4). ValueError if the program is needed and missing, or fails."""
    columns = min(len(clips), 6)
    frames = [grid(clips[:, i], captions, columns, zoom) for i in range(clips.shape[1])]
    if len(clips) == 1 and captions is None:  # a clip alone has no frame around it
        frames = [Image.fromarray(frame.permute(1, 2, 0).numpy()) for frame in clips[0]]
    if path.suffix != ".mp4":
        more = dict(append_images=frames[1:], duration=1000 // fps, loop=0, lossless=True)
        frames[0].save(path, save_all=True, **more)
        return
    if shutil.which("ffmpeg") is None:
        raise ValueError(f"{path}: for mp4 install the program ffmpeg (on Debian: apt-get install ffmpeg)")
    width, height = frames[0].size
    read = ["-f", "rawvideo", "-pix_fmt", "rgb24", "-s", f"{width}x{height}", "-r", str(fps), "-i", "-"]
    even = ["-vf", "pad=ceil(iw/2)*2:ceil(ih/2)*2:color=white", "-pix_fmt", "yuv420p"]
    command = ["ffmpeg", "-v", "error", "-y", *read, *even, str(path)]
    result = subprocess.run(command, input=b"".join(map(Image.Image.tobytes, frames)), capture_output=True)
    if result.returncode:
        reason = result.stderr.decode(errors="replace").strip().splitlines()[-1]
        raise ValueError(f"ffmpeg cannot write {path}: {reason}")


def sheet(clips, captions, zoom=1):
    """(B, F, 3, S, S) uint8 → one Pillow image: a row a clip, its frames from left to right, its caption
    below."""
    rows = [grid(clip, columns=len(clip), zoom=zoom) for clip in clips]
    width, height = rows[0].size
    image = Image.new("RGB", (width, (height + 16) * len(rows)), "white")
    pen = ImageDraw.Draw(image)
    for i, (row, caption) in enumerate(zip(rows, captions)):
        image.paste(row, (0, (height + 16) * i))
        pen.text((5, (height + 16) * i + height - 1), caption, fill="black", font=font())
    return image


def side_by_side(images):
    """Pillow images of one height → one."""
    whole = Image.new("RGB", (sum(image.width for image in images), images[0].height), "white")
    for i, image in enumerate(images):
        whole.paste(image, (sum(other.width for other in images[:i]), 0))
    return whole


def curves(series, title, size=(720, 360), logarithmic=True):
    """{name: (x values, y values)} → a Pillow image of lines over a logarithmic y axis, or a linear one from
    0 to at least 1."""
    width, height = size
    left, right, top, bottom = 64, width - 16, 36, height - 32
    image = Image.new("RGB", size, "white")
    pen = ImageDraw.Draw(image)
    scaled = lambda y: np.log10(np.maximum(y, 1e-9)) if logarithmic else np.asarray(y, float)
    xs = np.concatenate([np.asarray(x, float) for x, _ in series.values()])
    ys = np.concatenate([scaled(y) for _, y in series.values()])
    x_low, x_high = xs.min(), max(xs.max(), xs.min() + 1)
    y_low, y_high = (ys.min() - 0.02, ys.max() + 0.02) if logarithmic else (0.0, max(1.0, ys.max()))

    def point(x, y):
        x = left + (x - x_low) / (x_high - x_low) * (right - left)
        return x, bottom - (float(scaled(y)) - y_low) / (y_high - y_low) * (bottom - top)

    pen.text((left, 8), title, fill="black", font=font(14))
    for share in np.linspace(0, 1, 5):
        y = bottom - share * (bottom - top)
        value = y_low + share * (y_high - y_low)
        pen.line([(left, y), (right, y)], fill=(225, 225, 225))
        pen.text((6, y - 7), f"{10**value if logarithmic else value:.3g}", fill="black", font=font())
        x = x_low + share * (x_high - x_low)
        label = f"{x:.0f}" if logarithmic else f"{x:.3g}"
        pen.text((left + share * (right - left) - 10, bottom + 8), label, fill="black", font=font())
    palette = [(30, 90, 200), (220, 60, 40), (40, 150, 70), (150, 60, 180), (230, 140, 20), (20, 160, 170)]
    end = right  # of the next name, in the line of the title
    for i, (name, (x, y)) in reversed(list(enumerate(series.items()))):
        if len(x) > 1:
            pen.line([point(*p) for p in zip(x, y)], fill=palette[i % 6], width=2)
        end -= pen.textlength(name, font=font()) + 12
        pen.text((end + 12, 10), name, fill=palette[i % 6], font=font())
    return image


def to_bytes(x):
    """Pictures (…, 3, H, W) in -1…1 → uint8."""
    return ((x + 1) * 127.5).round().clamp(0, 255).to(torch.uint8)


def from_bytes(x):
    """uint8 pictures (…, 3, H, W) → fp32 in -1…1."""
    return x.float() / 127.5 - 1
