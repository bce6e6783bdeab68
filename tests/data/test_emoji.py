"""The emoji folder, built from a small font-less set of packages."""
import io
import json
import tarfile

import pytest
import torch
from PIL import Image

from data import clips, emoji
from data.folder import Folder, unseen

KEYS = [f"{0x1F600 + i:x}" for i in range(60)]


def picture(i, kind="PNG", frames=1):
    drawn = [Image.new("RGBA", (72, 64), (40 * (i % 6), 4 * i, 60 * k % 256, 255)) for k in range(frames)]
    file = io.BytesIO()
    more = dict(save_all=True, append_images=drawn[1:], duration=50, lossless=True) if frames > 1 else {}
    drawn[0].save(file, kind, **more)
    return file.getvalue()


def package(path, name, files):
    """A .tgz as `npm pack` writes it."""
    files = {"package.json": json.dumps(dict(name=name)).encode(), **files}
    with tarfile.open(path, "w:gz") as tar:
        for file, data in files.items():
            member = tarfile.TarInfo(f"package/{file}")
            member.size = len(data)
            tar.addfile(member, io.BytesIO(data))
    return str(path)


@pytest.fixture
def packages(tmp_path):
    table = [dict(name=f"FACE: NUMBER {i}", unified=key.upper() + "-FE0F") for i, key in enumerate(KEYS)]
    variant = {"1F3FB-1F3FF": dict(unified=f"{KEYS[0]}-1F3FB-200D-1F3FF")}
    table[0]["skin_variations"] = variant
    flat = {f"img/twitter/64/{key}.png": picture(i) for i, key in enumerate(KEYS)}
    flat[f"img/twitter/64/{KEYS[0]}-1f3fb-200d-1f3ff.png"] = picture(0)
    flat |= {"img/twitter/sheets/64.png": picture(3), "emoji.json": json.dumps(table).encode()}
    glossy = {f"assets/0{key}-fe0f.webp": picture(i, "WEBP") for i, key in enumerate(KEYS)}
    moving = {f"assets/{key}.webp": picture(i, "WEBP", 1 if i % 3 == 0 else 20) for i, key in enumerate(KEYS)}
    return [
        package(tmp_path / "flat.tgz", "emoji-datasource-twitter", flat),
        package(tmp_path / "glossy.tgz", "@lobehub/fluent-emoji-3d", glossy),
        package(tmp_path / "moving.tgz", "@lobehub/fluent-emoji-anim-2", moving),
    ]


@pytest.fixture
def font(tmp_path, monkeypatch):
    """In place of a colour-emoji font."""
    green = lambda key: Image.new("RGBA", (136, 128), (0, int(key[:5], 16) % 256, 0))
    drawn = lambda path, names: ((key, green(key)) for key in names)
    monkeypatch.setattr(emoji, "drawn_by_font", drawn)
    (tmp_path / "font.ttf").touch()
    return str(tmp_path / "font.ttf")


def test_held_out_pairs_are_in_no_training_set(tmp_path, packages, font, capsys):
    emoji.main([str(tmp_path / "emoji"), *packages, "--size", "16", "--font", font])
    train, test = Folder(tmp_path / "emoji", 16), unseen(tmp_path / "emoji", 16)
    assert len(test) > 2 and not set(train.captions) & set(test.captions)
    assert len(train) + len(test) == 3 * len(KEYS) == len({*train.captions, *test.captions})
    for caption, label in zip(test.captions, test.labels):
        style, _, name = caption.partition(" ")
        assert style == label and {f"{other} {name}" for other in ("noto", "flat", "glossy")} - {caption} <= {*train.captions}
    films = clips.load(str(tmp_path / "emoji" / "clips"), 16, 8, 4)
    held = {caption for caption in test.captions if caption.startswith("glossy")}
    moving = {f"glossy face number {i}" for i in range(len(KEYS)) if i % 3}
    assert held and set(films.captions) == moving - held
    said = capsys.readouterr().out
    stills = len({f"glossy face number {i}" for i in range(0, len(KEYS), 3)} - held)
    counted = f"{len(films)} clips (left out: {stills} that are stills, {len(held)} of held-out emoji)"
    for words in ("SIL Open Font License", "CC BY 4.0", "MIT", counted):
        assert words in said, words


def test_what_is_held_out_follows_from_the_emoji_alone():
    styles = ["noto", "flat", "glossy"]
    found = [emoji.held_out(f"{code:x}", styles) for code in range(0x1F000, 0x1F000 + 6000)]
    shares = [found.count(style) / len(found) for style in styles]
    assert all(0.02 < share < 0.035 for share in shares) and found[:9] == [emoji.held_out(f"{0x1F000 + i:x}", styles[::-1]) for i in range(9)]
    assert not any(emoji.held_out(key, styles[:2]) for key in KEYS)
    held = next(key for key in KEYS if emoji.held_out(key, styles))
    for alike in ("1f3fb", "1f3ff", "200d-2640", "1f3fb-200d-2642"):
        assert emoji.held_out(f"{held}-{alike}", styles) == emoji.held_out(held, styles)
    assert {emoji.held_out(f"{held}-200d-{code:x}", styles) for code in range(0x2700, 0x2740)} != {emoji.held_out(held, styles)}


def test_a_double_of_a_training_picture_is_not_held_out(tmp_path, packages, font):
    def held(packages, out):
        emoji.make_emoji(tmp_path / out, packages, font, 16)
        return unseen(tmp_path / out, 16).captions

    before = held(packages[:2], "before")
    chosen = next(caption for caption in before if caption.startswith("flat"))
    i = int(chosen.split()[-1])
    table = [dict(name=f"face number {k}", unified=key) for k, key in enumerate(KEYS)]
    table.append(dict(name="EMOJI MODIFIER FITZPATRICK TYPE-3", unified="1f3fc"))
    files = {f"img/twitter/64/{key}.png": picture(k) for k, key in enumerate([*KEYS, "1f3fc"])}
    files[f"img/twitter/64/{KEYS[i - 1]}.png"] = picture(i)
    files["emoji.json"] = json.dumps(table).encode()
    twin = package(tmp_path / "twin.tgz", "emoji-datasource-twitter", files)
    assert set(held([twin, packages[1]], "after")) == set(before) - {chosen, f"flat face number {i - 1}"}
    train = Folder(tmp_path / "after", 16)
    assert chosen in train.captions and not any("modifier" in caption for caption in train.captions)


def test_a_package_is_drawn_as_it_is(tmp_path, packages, font):
    emoji.make_emoji(tmp_path / "emoji", packages[:2], font, 64, skin_tones=True)
    train, test = Folder(tmp_path / "emoji", 64), unseen(tmp_path / "emoji", 64)
    captions, pictures = train.captions + test.captions, torch.cat([train.array, test.array])
    assert "flat face number 0 with light skin and dark skin" in captions
    for kind in ("flat", "glossy"):
        drawn = pictures[captions.index(f"{kind} face number 7")]
        assert (drawn[:, 32, 32].int() - torch.tensor([40, 28, 0])).abs().max() <= 3
        assert drawn[:, 0, 32].min() == 255  # 72 × 64 pixels keep their shape, on white


def test_a_clip_is_resampled_by_its_durations():
    frames = emoji.clip_of(picture(1, "WEBP", 20), 16)  # 20 frames of 50 ms are a second
    assert len(frames) == emoji.CLIP_FPS
    shown = [frame.getpixel((8, 8))[2] for frame in frames]
    assert shown == [60 * (k * 20 // 12) % 256 for k in range(12)]


def test_mistakes_leave_nothing(tmp_path, packages, monkeypatch):
    out = tmp_path / "emoji"
    wrong = package(tmp_path / "wrong.tgz", "left-pad", {})
    (tmp_path / "cut.tgz").write_bytes(b"\x1f\x8bno")
    monkeypatch.setattr(emoji, "FONTS", ["/no/such.ttf"])
    for words, message in (
        ([], "give a folder: python -m data.emoji OUT"), ([str(out)], "Debian: apt-get install fonts-noto-color-emoji"),
        ([str(out), "--font", "/no.ttf"], "--font /no.ttf: no such file"),
        ([str(out), wrong], "wrong.tgz: not a .tgz of emoji-datasource-twitter"),
        ([str(out), str(tmp_path / "cut.tgz")], "cut.tgz: not a .tgz of"), ([str(out), "gone.tgz"], "gone.tgz: not a .tgz of"),
    ):  # fmt: skip
        with pytest.raises(ValueError, match=message):
            emoji.main(words)
        assert not out.exists()
    monkeypatch.setattr(emoji, "make_clips", lambda *parts: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        emoji.main([str(out), *packages])
    assert not out.exists() and not list(tmp_path.glob("*.part"))
    out.mkdir()
    (out / "mine").touch()
    with pytest.raises(ValueError, match="emoji is not empty"):
        emoji.main([str(out), *packages])
    assert [path.name for path in out.iterdir()] == ["mine"]
