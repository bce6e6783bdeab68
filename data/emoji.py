"""Real pictures without a download: the colour-emoji font that is installed, as a folder for train.py --data.

    python -m data.emoji FOLDER [FONT.ttf]
"""
import sys
import unicodedata
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont, ImageOps

FONTS = (
    "/usr/share/fonts/truetype/noto/NotoColorEmoji.ttf",
    "/usr/share/fonts/noto/NotoColorEmoji.ttf",
    "/usr/share/fonts/google-noto-emoji/NotoColorEmoji.ttf",
)


def make_emoji(folder, font_path=None, size=128):
    """Draws every single-character emoji that the font has into `folder`, NAME.png with its Unicode name in NAME.txt.
    Returns how many. ValueError if no font is found."""
    path = next((p for p in ([font_path] if font_path else FONTS) if Path(p).exists()), None)
    if path is None:
        raise ValueError(f"no font at {font_path or FONTS[0]}. On Debian: apt-get install fonts-noto-color-emoji")
    font = ImageFont.truetype(path, 109)  # the one size that this bitmap font holds
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    missing = font.getmask("\uffff", mode="RGBA").getbbox()
    count = 0
    for code in [*range(0x203C, 0x3300), *range(0x1F000, 0x1FB00)]:
        name = unicodedata.name(chr(code), "").lower()
        if not name or name.startswith("emoji modifier") or "regional indicator" in name:
            continue
        image = Image.new("RGBA", (136, 128), "white")
        ImageDraw.Draw(image).text((0, 0), chr(code), font=font, embedded_color=True)
        box = ImageOps.invert(image.convert("L")).getbbox()
        colourful = np.ptp(np.asarray(image.convert("RGB"), int), axis=2).max() > 0
        if box is None or font.getmask(chr(code), mode="RGBA").getbbox() == missing or not colourful and code < 0x2600:
            continue
        stem = f"{code:05x}"
        ImageOps.pad(image.convert("RGB"), (size, size), color="white").save(folder / f"{stem}.png")
        (folder / f"{stem}.txt").write_text(name + "\n", encoding="utf-8")
        count += 1
    return count


if __name__ == "__main__":
    if len(sys.argv) not in (2, 3):
        sys.exit("usage: python -m data.emoji FOLDER [FONT.ttf]")
    try:
        print(f"{make_emoji(*sys.argv[1:])} emoji with captions in {sys.argv[1]}")
    except (ValueError, OSError) as error:
        sys.exit(f"emoji.py: {error}")
