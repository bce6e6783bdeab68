"""Real pictures without a download: the emoji of an installed font, as a folder for train.py --data.

    python -m data.emoji OUT [--size 128] [--font FONT.ttf]
"""
import unicodedata
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont, ImageOps

from common.flags import flag, read, run_command

FONTS = [f"/usr/share/fonts/{folder}/NotoColorEmoji.ttf"
         for folder in ("truetype/noto", "noto", "google-noto-emoji")]


@dataclass
class Flags:
    size: int = flag(128, "width and height of the pictures, in pixels", low=8)
    font: str = flag("", "file of a colour-emoji font (default: the installed Noto Color Emoji)")


def make_emoji(folder, font_path=None, size=128):
    """Draws each single-character emoji of a font into a folder: CODE.png, and its Unicode name in CODE.txt.
    Returns how many it drew. ValueError if there is no font."""
    paths = [font_path] if font_path else FONTS
    found = [path for path in paths if Path(path).exists()]
    if not found:
        raise ValueError(f"no font at {paths[0]}. On Debian: apt-get install fonts-noto-color-emoji")
    font = ImageFont.truetype(found[0], 109)  # the only size of this bitmap font
    box_of = lambda character: font.getmask(character, mode="RGBA").getbbox()
    missing = box_of("\uffff")  # what the font draws for a character it lacks
    Path(folder).mkdir(parents=True, exist_ok=True)
    count = 0
    for code in [*range(0x203C, 0x3300), *range(0x1F000, 0x1FB00)]:
        name = unicodedata.name(chr(code), "").lower()
        if not name or name.startswith("emoji modifier") or "regional indicator" in name:
            continue
        image = Image.new("RGB", (136, 128), "white")
        ImageDraw.Draw(image).text((0, 0), chr(code), font=font, embedded_color=True)
        pixels = np.asarray(image, int)
        grey = code < 0x2600 and np.ptp(pixels, axis=2).max() == 0
        if grey or pixels.min() == 255 or box_of(chr(code)) == missing:
            continue
        ImageOps.pad(image, (size, size), color="white").save(f"{folder}/{code:05x}.png")
        Path(f"{folder}/{code:05x}.txt").write_text(name + "\n", encoding="utf-8")
        count += 1
    return count


def main(arguments):
    flags, _, folders = read(Flags, arguments, "python -m data.emoji", "Draws emoji into a folder.", "OUT")
    if len(folders) != 1:
        raise ValueError("give one folder: python -m data.emoji OUT")
    print(f"{make_emoji(folders[0], flags.font, flags.size)} emoji with captions in {folders[0]}")


if __name__ == "__main__":
    run_command(main)
