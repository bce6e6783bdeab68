"""Results as pictures: a grid with captions, and curves. Pillow does the drawing."""
import textwrap

import numpy as np
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
    sheet = Image.new("RGB", (columns * (width + pad) + pad, -(-B // columns) * (height + foot + pad) + pad), "white")
    pen = ImageDraw.Draw(sheet)
    for i, picture in enumerate(pictures):
        x, y = pad + i % columns * (width + pad), pad + i // columns * (height + foot + pad)
        image = Image.fromarray(picture.permute(1, 2, 0).numpy())
        sheet.paste(image.resize((width, height), Image.Resampling.NEAREST), (x, y))
        for n, line in enumerate(lines[i]):
            pen.text((x + 1, y + height + 2 + 13 * n), line, fill="black", font=font())
    return sheet


def curves(series, title, size=(720, 360)):
    """{name: (x values, y values)} → a Pillow image of lines over a logarithmic y axis."""
    width, height = size
    left, right, top, bottom = 64, width - 16, 36, height - 32
    image = Image.new("RGB", size, "white")
    pen = ImageDraw.Draw(image)
    xs = np.concatenate([np.asarray(x, float) for x, _ in series.values()])
    ys = np.log10(np.maximum(np.concatenate([np.asarray(y, float) for _, y in series.values()]), 1e-9))
    x_low, x_high, y_low, y_high = xs.min(), max(xs.max(), xs.min() + 1), ys.min() - 0.02, ys.max() + 0.02

    def point(x, y):
        x = left + (x - x_low) / (x_high - x_low) * (right - left)
        return x, bottom - (np.log10(max(y, 1e-9)) - y_low) / (y_high - y_low) * (bottom - top)

    pen.text((left, 8), title, fill="black", font=font(14))
    for share in np.linspace(0, 1, 5):
        y = bottom - share * (bottom - top)
        pen.line([(left, y), (right, y)], fill=(225, 225, 225))
        pen.text((6, y - 7), f"{10 ** (y_low + share * (y_high - y_low)):.3g}", fill="black", font=font())
        x = x_low + share * (x_high - x_low)
        pen.text((left + share * (right - left) - 10, bottom + 8), f"{x:.0f}", fill="black", font=font())
    palette = [(30, 90, 200), (220, 60, 40), (40, 150, 70), (150, 60, 180), (230, 140, 20), (20, 160, 170)]
    for i, (name, (x, y)) in enumerate(series.items()):
        if len(x) > 1:
            pen.line([point(*p) for p in zip(x, y)], fill=palette[i % 6], width=2)
        pen.text((right - 110, top + 14 * i), name, fill=palette[i % 6], font=font())
    return image
