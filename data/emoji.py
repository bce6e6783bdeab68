"""Pictures that nobody here drew: emoji of several styles, as a folder for train.py.

    python -m data.emoji OUT [PACKAGE.tgz …] [--size 64]

noto     the colour-emoji font of the system                    Debian: fonts-noto-color-emoji    OFL
flat     emoji-datasource-twitter, whose table names all emoji  npm pack NAME                     CC BY 4.0
glossy   @lobehub/fluent-emoji-3d                               npm pack NAME                     MIT
clips    @lobehub/fluent-emoji-anim-1 … -4, of the glossy style npm pack NAME                     MIT

A package is the .tgz that `npm pack NAME` downloads; nothing is unpacked. A caption is STYLE NAME: "flat
grinning face". OUT/train/ and OUT/test/ are each a Hugging Face imagefolder: metadata.jsonl, and a
folder for each style. Of 8 % of the emoji with three styles or more, one style lies in OUT/test/, and so in
no training set: can a model draw an emoji in a style in which it never saw it? OUT/clips/ is for --clips.
"""
import hashlib
import io
import itertools
import json
import shutil
import signal
import tarfile
import unicodedata
import zlib
from collections import Counter
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont, ImageOps, ImageSequence
from tqdm import tqdm

from common.flags import flag, read, run_command

FONTS = [f"/usr/share/fonts/{folder}/NotoColorEmoji.ttf"
         for folder in ("truetype/noto", "noto", "google-noto-emoji")]
# npm package → (style, licence)
PACKAGES = {"emoji-datasource-twitter": ("flat", "Twemoji, CC BY 4.0"),
            "@lobehub/fluent-emoji-3d": ("glossy", "Fluent Emoji by Microsoft, MIT")}
PACKAGES |= {f"@lobehub/fluent-emoji-anim-{i}": ("clips", "Fluent Emoji by Microsoft, MIT")
             for i in range(1, 5)}
TONES = dict(zip(("1f3fb", "1f3fc", "1f3fd", "1f3fe", "1f3ff"),
                 ("light skin", "medium light skin", "medium skin", "medium dark skin", "dark skin")))
HELD_OUT = 8  # % of the emoji with three styles or more
CLIP_FPS = 12


@dataclass
class Flags:
    size: int = flag(64, "width and height of the pictures, in pixels", low=16, high=512)
    font: str = flag("", "file of a colour-emoji font (default: the installed Noto Color Emoji)")
    skin_tones: bool = flag(False, "the five skin tones of each person too, as words of the caption")


def key_of(code):
    """The code points of an emoji, "1F3F3-FE0F-200D-1F308" → "1f3f3-200d-1f308": without the mark that asks
    for colour, which files leave out as they like."""
    return "-".join(f"{int(part, 16):x}" for part in code.split("-") if part.lower() != "fe0f")


def names_of(table, skin_tones):
    """emoji.json of emoji-datasource → {key: name}, in small letters."""
    names = {}
    for entry in table:
        words = entry["name"].lower().replace(":", " ").replace(",", " ").split()
        if words[:2] == ["emoji", "modifier"]:
            continue  # a square of a skin tone
        names[key_of(entry["unified"])] = " ".join(words)
        for tones, variant in entry.get("skin_variations", {}).items() if skin_tones else ():
            tones = [TONES[tone] for tone in tones.lower().split("-")]
            names[key_of(variant["unified"])] = " ".join([*words, "with", " and ".join(tones)])
    return names


def names_of_unicode():
    """{key: name} of the single characters that may be emoji, by Python's table: for a font alone."""
    codes = [*range(0x203C, 0x3300), *range(0x1F000, 0x1FB00)]
    names = {f"{code:x}": unicodedata.name(chr(code), "").lower() for code in codes}
    unwanted = ("emoji modifier", "regional indicator")
    return {key: name for key, name in names.items() if name and not name.startswith(unwanted)}


def drawn_by_font(path, names):
    """Yields (key, Pillow image) for each emoji that a colour-emoji font has."""
    font = ImageFont.truetype(path, 109)  # the only size of this bitmap font
    missing = font.getmask("\uffff", mode="RGBA").getbbox()  # what it draws for a character that it lacks
    for key in names:
        text = "".join(chr(int(part, 16)) for part in key.split("-"))
        if font.getmask(text, mode="RGBA").getbbox() == missing or font.getlength(text) > 150:
            continue  # a sequence that it draws as several emoji in a row is too wide
        image = Image.new("RGBA", (136, 128))
        ImageDraw.Draw(image).text((0, 0), text, font=font, embedded_color=True)
        red, green, blue, alpha = image.getextrema()
        black = key < "2600" and len(key) == 4 and red == green == blue  # a sign of text, not an emoji
        if alpha[1] == 255 and not black:
            yield key, image


def in_package(path):
    """(npm package, {key: its file's bytes}, the table emoji.json or None) of a .tgz; of Twemoji, the
    files of 64 pixels. ValueError, naming the file, if it is none of PACKAGES."""
    try:
        with tarfile.open(path) as package:
            name = json.load(package.extractfile("package/package.json"))["name"]
            if name not in PACKAGES:
                raise ValueError(f"it is {name}")
            files, table = {}, None
            for member in package:
                file = Path(member.name)
                if file.suffix == ".webp" or "/img/twitter/64/" in member.name:
                    files[key_of(file.stem)] = package.extractfile(member).read()
                elif file.name == "emoji.json":
                    table = json.load(package.extractfile(member))
            return name, files, table
    except (OSError, EOFError, KeyError, ValueError, tarfile.TarError, zlib.error) as error:
        known = f"a .tgz of {', '.join([*PACKAGES][:3])} …"
        raise ValueError(f"{path}: not {known}, as `npm pack NAME` downloads it ({error})") from None


def held_out(key, styles):
    """The style in which an emoji is never trained, or None. It follows from the emoji, all its skin tones
    and genders alike, since they look alike, and from the names of its styles."""
    first, *others = key.split("-")
    key = "-".join([first, *(part for part in others if part not in TONES)])
    key = key.removesuffix("-200d-2640").removesuffix("-200d-2642")  # the signs of woman and man
    number = int.from_bytes(hashlib.sha256(key.encode()).digest()[:4], "big")
    if len(styles) < 3 or number % 100 >= HELD_OUT:
        return None
    return sorted(styles)[number // 100 % len(styles)]


def white(image, size):
    """A Pillow image on white, scaled to size × size, with what is missing beside it filled up."""
    image = image.convert("RGBA")
    image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image).convert("RGB")
    return ImageOps.pad(image, (size, size), Image.Resampling.LANCZOS, color="white")


def clip_of(data, size):
    """An animated picture's bytes → frames, CLIP_FPS a second; [] if it is a still."""
    with Image.open(io.BytesIO(data)) as image:
        found, end = [], 0.0
        for frame in ImageSequence.Iterator(image) if getattr(image, "is_animated", False) else ():
            frame.load()  # only then is its duration known
            end += image.info["duration"] / 1000
            while len(found) / CLIP_FPS < end - 1e-6:
                found.append(white(frame, size))
    return found


def write_rows(folder, rows):
    lines = (json.dumps(dict(file_name=file, text=text)) + "\n" for file, text in rows)
    (folder / "metadata.jsonl").write_text("".join(lines), encoding="utf-8")


def make_emoji(out, packages=(), font="", size=64, skin_tones=False):
    """Builds the folder, and prints what it holds. packages: .tgz files. ValueError if there is nothing to
    build from, or `out` has something in it."""
    done, out = Path(out), Path(f"{Path(out)}.part")  # it gets its name when it is whole
    if done.exists() and any(done.iterdir()):
        raise ValueError(f"{done} is not empty: give a new folder, or delete it first")
    found = [path for path in ([font] if font else FONTS) if Path(path).exists()]
    if font and not found:
        raise ValueError(f"--font {font}: no such file")
    if not found and not packages:
        hint = "on Debian: apt-get install fonts-noto-color-emoji"
        raise ValueError(f"no font at {FONTS[0]} and no package given; {hint}")
    sources = [in_package(path) for path in packages]
    tables = [table for *_, table in sources if table]
    names = names_of(tables[0], skin_tones) if tables else names_of_unicode()
    styles, clips = {}, {}  # {style: {key: Pillow image or bytes of a file}}, {key: bytes}
    if found:
        styles["noto"] = dict(tqdm(drawn_by_font(found[0], names), "noto", leave=False, disable=None))
        print("noto: Noto Color Emoji by Google, SIL Open Font License")
    for name, files, _ in sources:
        style, licence = PACKAGES[name]
        print(f"{style}: {name}, {licence}")
        (clips if style == "clips" else styles.setdefault(style, {})).update(files)
    rows = {"train": [], "test": []}
    shutil.rmtree(out, ignore_errors=True)
    try:
        for style, pictures in styles.items():
            drawn = {}
            for key in tqdm([key for key in names if key in pictures], style, leave=False, disable=None):
                picture = pictures[key]
                if isinstance(picture, bytes):
                    picture = Image.open(io.BytesIO(picture))
                drawn[key] = white(picture, size)
            count = Counter(picture.tobytes() for picture in drawn.values())
            for key, picture in drawn.items():
                having = [other for other in styles if key in styles[other]]
                unseen = held_out(key, having) == style and count[picture.tobytes()] == 1  # and has no double
                split = "test" if unseen else "train"
                file = out / split / style / f"{key}.png"
                file.parent.mkdir(parents=True, exist_ok=True)
                picture.save(file)
                rows[split].append((f"{style}/{key}.png", f"{style} {names[key]}"))
        for split in rows:
            if rows[split]:
                write_rows(out / split, rows[split])
                kinds = ", ".join(sorted({file.partition("/")[0] for file, _ in rows[split]}))
                print(f"{done / split}: {len(rows[split])} pictures ({kinds})")
        if len(styles) < 3:
            print(f"no {done / 'test'}: that takes three styles")
        if clips:
            made = make_clips(out, clips, {key: names[key] for key in clips if key in names}, size)
            print(f"{done / 'clips'}: {made}")
        out.replace(done)
    except BaseException:
        shutil.rmtree(out, ignore_errors=True)  # nothing half-built is left
        raise


def make_clips(out, clips, names, size):
    """Writes OUT/clips, and says what is in it. clips: {key: bytes of an animated picture}. An emoji whose
    glossy picture is held out has no clip either."""
    folder, rows = out / "clips", []
    folder.mkdir(parents=True)
    keys = [key for key in names if not (out / "test" / "glossy" / f"{key}.png").exists()]
    deaf_to_ctrl_c = dict(initializer=signal.signal, initargs=(signal.SIGINT, signal.SIG_IGN))
    processes = ProcessPoolExecutor(**deaf_to_ctrl_c)
    try:
        found = processes.map(clip_of, (clips[key] for key in keys), itertools.repeat(size), chunksize=8)
        for key, frames in zip(keys, tqdm(found, "clips", len(keys), leave=False, disable=None)):
            if len(frames) > 1:
                options = dict(save_all=True, append_images=frames[1:], duration=round(1000 / CLIP_FPS))
                frames[0].save(folder / f"{key}.webp", lossless=True, quality=50, method=2, loop=0, **options)
                rows.append((f"{key}.webp", f"glossy {names[key]}"))
    finally:
        processes.shutdown(cancel_futures=True)
    write_rows(folder, rows)
    left_out = f"{len(keys) - len(rows)} that are stills, {len(names) - len(keys)} of held-out emoji"
    return f"{len(rows)} clips (left out: {left_out})"


def main(arguments):
    about = "Builds a folder of captioned emoji from a font and npm packages."
    flags, _, words = read(Flags, arguments, "python -m data.emoji", about, "OUT [PACKAGE.tgz …]")
    if not words:
        raise ValueError("give a folder: python -m data.emoji OUT [PACKAGE.tgz …]")
    make_emoji(words[0], words[1:], flags.font, flags.size, flags.skin_tones)


if __name__ == "__main__":
    run_command(main)
