"""The cache of encoded training data gives what encoding in every step gives, survives interruption, and is
refused where it does not fit."""
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import rounding
from PIL import Image
from oracles import clip, oracle, save, shake, t5

import train
from common.figures import from_bytes
from common.files import FORMAT
from data import latent_cache, shapes
from data.folder import Folder
from data.latent_cache import LatentCache, check, fingerprint
from encoders import autoencoders, weights
from encoders.autoencoder import Autoencoder, AutoencoderConfig
from encoders.text import LOADERS
from sample import Pipeline

ROOT = Path(__file__).parent.parent.parent
COUNT = 10


@pytest.fixture(scope="module")
def root(tmp_path_factory, byte_pairs):
    """Pictures, an autoencoder of each kind, and text encoders, all tiny and with random weights."""
    torch.manual_seed(0)
    root = tmp_path_factory.mktemp("latents")
    save(clip(), root / "clip", byte_pairs)
    save(t5(), root / "t5", byte_pairs)
    oracle((8, 16, 16, 16), layers=1, norm_num_groups=4, shift_factor=0.1).save_pretrained(root / "vae")
    mini = shake(Autoencoder(AutoencoderConfig(4, 16)))
    (root / "mini").mkdir()
    write_mini(mini, root / "mini")
    (root / "data").mkdir()
    drawn = shapes.Shapes(32, count=COUNT)
    for i, caption in enumerate(drawn.captions):
        Image.fromarray(shapes.draw(drawn.scenes[i], 32)).save(root / "data" / f"{i}.png")
        (root / "data" / f"{i}.txt").write_text(caption + ", très joli" * (i % 3))
    return root


def write_mini(model, folder):
    model.shift.copy_(torch.linspace(-1, 1, 4))
    model.scale.fill_(1.7)
    metadata = dict(config=json.dumps(dict(autoencoder=vars(model.config))), format=str(FORMAT))
    weights.write(folder / "model.safetensors", model.state_dict(), metadata)


def encode(root, out, *flags, kind="vae", pictures="data"):
    """Runs the command; the flags may change its own. Returns the cache's folder."""
    words = ["--data", root / pictures, "--autoencoder", root / kind, "--image-size", 32, "--out", out,
             "--per-shard", 4, "--batch-size", 3, "--device", "cpu", *flags]
    latent_cache.main([str(word) for word in words])
    return Path(out)


def text_flags(root):
    return "--text", "--clip", root / "clip", "--t5", root / "t5"


@pytest.fixture(scope="module")
def whole(root):
    """A cache with everything in it."""
    return encode(root, root / "whole", *text_flags(root))


def bytes_of(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def one_line(match, function, *arguments):
    with pytest.raises((ValueError, OSError), match=match) as error:
        function(*arguments)
    assert "\n" not in str(error.value)
    return str(error.value)


def straight(autoencoder, pictures):
    """What a step would encode, and its tolerance: what the cache states, and what some twenty convolutions
    in sums of 16·3·3 may round otherwise in a batch of another size."""
    mean, _ = autoencoder.moments(pictures)
    close = rounding(mean, sums=20 * 144)
    return autoencoder.encode(pictures), (mean.abs() / 2048 + close) / autoencoder.scale


@pytest.mark.rounding
@pytest.mark.parametrize("kind", ["vae", "mini"])
@torch.no_grad()
def test_the_cache_gives_what_encoding_in_every_step_gives(root, tmp_path, kind):
    cache = LatentCache(encode(root, tmp_path / "cache", kind=kind))
    autoencoder = autoencoders.load(root / kind)
    folder = Folder(root / "data", 32)
    assert cache.captions == folder.captions
    assert (len(cache), cache.group, cache.mirror) == (COUNT, 1, True)
    pictures = from_bytes(folder.pictures(range(COUNT)))
    order = torch.randperm(COUNT)
    read = cache.read(order)
    assert read.dtype is torch.float32 and read.shape == (COUNT, 4, 4, 4)
    expected, tolerance = straight(autoencoder, pictures[order])
    assert ((read - expected).abs() <= tolerance).all() and expected.std() > 0.1
    # mirror images: of each sample either the one or the other
    flips = torch.randint(2, (COUNT,), generator=torch.Generator().manual_seed(3)).bool()
    assert 0 < flips.sum() < COUNT
    turned = torch.where(flips[:, None, None, None], pictures[order].flip(-1), pictures[order])
    expected, tolerance = straight(autoencoder, turned)
    mirrored = cache.read(order, flips.long())
    assert ((mirrored - expected).abs() <= tolerance).all()
    assert (mirrored - read)[flips].abs().mean() > 0.05  # mirroring counts
    with pytest.raises(IndexError):
        cache.read([COUNT])
    log_variance = torch.from_numpy(np.load(tmp_path / "cache/00000.moments.npy"))[:, 0, 1].float()
    expected = autoencoder.moments(pictures[:4])[1]
    torch.testing.assert_close(log_variance, expected, rtol=1e-3, atol=1e-2)


@pytest.mark.rounding
@torch.no_grad()
def test_shapes_are_not_mirrored_and_keep_their_group(root, tmp_path, monkeypatch):
    monkeypatch.setattr(shapes.Shapes, "__init__", few_shapes(shapes.Shapes.__init__))
    cache = LatentCache(encode(root, tmp_path / "cache", "--data", "shapes", "--seed", "5"))
    assert (cache.group, cache.mirror, len(cache)) == (2, False, 6)
    assert np.load(tmp_path / "cache/00000.moments.npy").shape == (4, 1, 2, 4, 4, 4)
    made = shapes.Shapes(32, seed=5)
    assert cache.captions == made.captions
    pictures = from_bytes(made.pictures(range(6)))
    expected, tolerance = straight(autoencoders.load(root / "vae"), pictures)
    for flips in (None, torch.ones(6, dtype=torch.long)):
        assert ((cache.read(range(6), flips) - expected).abs() <= tolerance).all()
    assert LatentCache(encode(root, tmp_path / "both", "--data", "shapes", "--mirror", "true")).mirror
    assert not LatentCache(encode(root, tmp_path / "one", "--mirror", "false")).mirror


def few_shapes(init):
    return lambda self, size=64, count=6, seed=0: init(self, size, 6, seed)


@pytest.mark.parametrize("name", ["clip", "t5"])
@torch.no_grad()
def test_text_is_what_the_encoder_gives_at_tokens(root, whole, name):
    cache = LatentCache(whole)
    tokenizer, encoder = LOADERS[name](root / name, torch.bfloat16)
    order = torch.randperm(COUNT)
    tokens, mask = tokenizer([cache.captions[i] for i in order])
    text, found = cache.text(order, name)
    assert text.dtype is torch.bfloat16 and torch.equal(found, mask) and len(set(mask.sum(1).tolist())) > 2
    expected = encoder(tokens, mask)
    error = (text - expected)[mask].float().abs()  # with other padding the last bits of bf16 may differ
    assert error.max() <= 0.03 * expected.float().abs().max() and expected.float()[mask].std() > 0.1
    assert not text[~mask].any()
    rows = np.load(whole / f"00001.{name}.npy")
    offsets = np.load(whole / f"00001.{name}.offsets.npy")
    lengths = tokenizer(cache.captions[4:8])[1].sum(1)
    assert rows.dtype == np.int16 and rows.shape == (sum(lengths), encoder.config.width)
    assert offsets.dtype == np.int64 and offsets.tolist() == [0, *lengths.cumsum(0).tolist()]
    short = min(range(COUNT), key=lambda i: len(cache.captions[i]))
    assert cache.text([short], name)[1].all()  # alone it has no padding


def test_an_interrupted_cache_goes_on_to_the_same_bytes(root, whole, tmp_path, monkeypatch):
    out, put, written = tmp_path / "cache", latent_cache.put, []
    log = lambda path, content: (written.append(Path(path).name), put(path, content))

    def stops(path, content):
        written.append(Path(path).name)
        if Path(path).name == "00001.t5.npy":
            (out / f".part-{'0' * 32}.npy").write_bytes(b"half")  # what a killed process leaves
            raise KeyboardInterrupt
        put(path, content)

    monkeypatch.setattr(latent_cache, "put", stops)
    with pytest.raises(KeyboardInterrupt):
        encode(root, out, *text_flags(root))
    assert (out / "00000.captions.jsonl").exists() and (out / "00001.moments.npy").exists()
    one_line("cache: there is no cache, or it is not finished: encode again to finish", LatentCache, out)
    written.clear()
    monkeypatch.setattr(latent_cache, "put", log)
    encode(root, out, *text_flags(root))
    assert not any(name.startswith("00000") for name in written) and "00001.moments.npy" in written
    assert bytes_of(out) == bytes_of(whole) and not any("part" in name for name in bytes_of(out))
    written.clear()
    encode(root, out, *text_flags(root))  # nothing is left to do
    assert written == ["cache.json", "cache.json"] and bytes_of(out) == bytes_of(whole)


def test_a_file_appears_whole_or_not_at_all(tmp_path, monkeypatch):
    def breaks(file, array):
        file.write(b"half of it")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(np, "save", breaks)
    with pytest.raises(OSError, match="No space left"):
        latent_cache.put(tmp_path / "x.npy", np.zeros(3))
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    "name", ["00001.moments.npy", "00002.t5.npy", "00000.clip.offsets.npy", "00001.captions.jsonl"]
)
@pytest.mark.parametrize("keep", [None, 0, 0.5, 0.99])
def test_a_file_that_is_missing_or_cut_is_named_and_mended(root, whole, tmp_path, name, keep):
    folder = Path(shutil.copytree(whole, tmp_path / "cache"))
    if keep is None:
        (folder / name).unlink()
    else:
        os.truncate(folder / name, int(keep * (folder / name).stat().st_size))
    one_line(f"cache/{name} is missing or was cut short", LatentCache, folder)
    if keep == 0.5:
        encode(root, folder, *text_flags(root))
        assert bytes_of(folder) == bytes_of(whole)


@torch.no_grad()
def test_a_cache_of_other_weights_is_refused_by_name(root, whole):
    cache = LatentCache(whole)
    autoencoder = autoencoders.load(root / "vae")
    encoders = {name: LOADERS[name](root / name, torch.bfloat16) for name in LOADERS}
    refused = lambda match, size=32: one_line(match, check, cache, size, autoencoder, encoders)
    check(cache, 32, autoencoder, encoders)
    check(cache, 32, autoencoder, {})
    assert str(whole) in refused("holds pictures of 32 pixels each way, not 64", 64)
    for name, module in (("autoencoder", autoencoder), *((name, encoders[name][1]) for name in encoders)):
        weight = list(module.parameters())[-1].view(-1)[:1]
        before = weight.clone()
        weight += 0.5
        assert str(whole) in refused(f"was made with another {name}: ")
        weight.copy_(before)
        check(cache, 32, autoencoder, encoders)
    encoders["t5"][0].model += b"x"
    refused("was made with another t5")
    encoders["clip"][0].vocabulary["new"] = 7
    refused("was made with another clip")
    autoencoder.config.scaling_factor *= 2
    one_line("was made with another autoencoder", check, cache, 32, autoencoder, {})


def test_the_text_that_a_cache_lacks_is_named(root, tmp_path):
    cache = LatentCache(encode(root, tmp_path / "cache", "--text", "--t5", root / "t5"))
    encoders = dict(clip=LOADERS["clip"](root / "clip", torch.bfloat16))
    message = "holds no text of clip: encode with --text --clip DIR"
    one_line(message, check, cache, 32, autoencoders.load(root / "vae"), encoders)


def test_a_published_folder_and_a_run_made_with_it_have_one_fingerprint(root, tmp_path):
    flags = ["--autoencoder", root / "vae", "--clip", root / "clip", "--out", tmp_path,
             "--data", root / "data", "--steps", 1, "--batch-size", 2, "--image-size", 32]
    train.main(["image", *map(str, flags)])
    model = Pipeline.load(tmp_path)
    assert fingerprint(model.autoencoder) == fingerprint(autoencoders.load(root / "vae"))
    tokenizer, encoder = LOADERS["clip"](root / "clip", torch.bfloat16)
    assert fingerprint(model.text_encoders[0], model.tokenizers[0]) == fingerprint(encoder, tokenizer)


@torch.no_grad()
def test_a_fingerprint_is_of_names_and_values_and_not_of_their_layout(root):
    mini = autoencoders.load(root / "mini")
    first = fingerprint(mini)
    assert len(first) == 32 and fingerprint(mini.to(memory_format=torch.contiguous_format)) == first
    assert fingerprint(mini.half()) != first
    first_layer = mini.float().encoder[1].weight
    first_layer.copy_(first_layer.flip(0))  # the same numbers elsewhere
    assert fingerprint(mini) != first


def test_the_size_of_the_latents_is_what_the_disk_holds(root, tmp_path, capsys):
    out = encode(root, tmp_path / "cache", "--image-size", 800)
    held = sum((out / f"{k:05d}.moments.npy").stat().st_size - 128 for k in range(3))  # without the headers
    assert f"{out}: {COUNT} pictures, whose latents take {held / 2**30:.3f} GiB" in capsys.readouterr().out
    assert held > 2_000_000


def test_a_folder_that_holds_something_else_is_left_alone(root, whole, tmp_path):
    before = bytes_of(whole)
    for flags, name in (
        (("--image-size", 64), "image size"), (("--mirror", "false"), "mirror"),
        (("--per-shard", 5), "per shard"), (("--autoencoder", root / "mini"), "autoencoder"),
        (("--data", "shapes"), "data"),
    ):
        one_line(f"holds a cache with another {name}", encode, root, whole, *text_flags(root), *flags)
    one_line("holds a cache with another text", encode, root, whole)
    assert bytes_of(whole) == before
    one_line("data: is neither empty nor a cache", encode, root, root / "data")
    (tmp_path / "file").write_text("")
    one_line("file", encode, root, tmp_path / "file")
    one_line("file/cache", encode, root, tmp_path / "file" / "cache")
    one_line("there is no cache", LatentCache, tmp_path / "gone")


def test_pictures_that_cannot_be_used_are_left_out_and_named(root, tmp_path, capsys):
    """The same ones, and for the same reasons, as where a folder is read into memory."""
    pictures = shutil.copytree(root / "data", tmp_path / "data")
    for i in range(4, 9):  # in the order of names; the middle shard has nothing left
        (pictures / f"{i}.png").write_bytes((pictures / f"{i}.png").read_bytes()[:60] if i % 2 else b"")
    (pictures / "0.txt").write_text(" ")
    (pictures / "1.txt").unlink()
    (pictures / "z.png").write_bytes(b"no picture")
    (pictures / "z.txt").write_text("é" * 300)
    out = encode(root, tmp_path / "cache", "--per-shard", 3, *text_flags(root), pictures=pictures)
    printed = capsys.readouterr().out
    expected = Folder(pictures, 32)
    cache = LatentCache(out)
    assert cache.captions == expected.captions and len(cache) == 3 and cache.settings["counts"] == [2, 0, 1]
    assert "8 of 11 files were left out" in printed
    for path, reason in expected.skipped:
        assert f"{Path(path).name}: {reason}" in printed
    with torch.no_grad():
        latent = autoencoders.load(root / "vae").encode(from_bytes(expected.pictures([2])))
    torch.testing.assert_close(cache.read([2]), latent, atol=5e-3, rtol=5e-3)
    tokenizer = LOADERS["t5"](root / "t5")[0]
    assert torch.equal(cache.text([2, 0], "t5")[1], tokenizer([cache.captions[2], cache.captions[0]])[1])
    for path in pictures.glob("*.png"):
        path.write_bytes(b"")
    one_line("no usable picture", encode, root, tmp_path / "none", "--per-shard", 3, "--data", pictures)
    one_line("there is no such folder", encode, root, tmp_path / "gone", "--data", tmp_path / "nowhere")


def test_a_picture_that_was_changed_is_encoded_again_and_no_other_shard(root, tmp_path, monkeypatch):
    """One mended, one replaced, one spoilt: the cache is that of a new one."""
    pictures = Path(shutil.copytree(root / "data", tmp_path / "data"))
    whole = (pictures / "0.png").read_bytes()
    (pictures / "0.png").write_bytes(b"broken")
    os.symlink(b"gone", bytes(pictures / "a") + b"\xff.png")  # a name that is not UTF-8, of a missing file
    Path(os.fsdecode(bytes(pictures / "a") + b"\xff.txt")).write_text("a link")
    out = encode(root, tmp_path / "cache", kind="mini", pictures=pictures)
    assert LatentCache(out).settings["counts"] == [3, 4, 2]
    before, written, put = LatentCache(out).settings, [], latent_cache.put
    log = lambda path, content: (written.append(Path(path).name), put(path, content))
    monkeypatch.setattr(latent_cache, "put", log)
    (pictures / "0.png").write_bytes(whole)
    (pictures / "8.png").write_bytes(whole)
    (pictures / "9.png").write_bytes(b"")
    encode(root, out, kind="mini", pictures=pictures)
    assert {name[:5] for name in written} == {"00000", "00002", "cache"}
    assert bytes_of(out) == bytes_of(encode(root, tmp_path / "new", kind="mini", pictures=pictures))
    assert LatentCache(out).settings != before  # so that --resume finds other data
    assert LatentCache(out).settings["counts"] == [4, 4, 1]


def test_a_cache_of_other_pictures_than_those_of_data_is_refused(root, whole, tmp_path):
    cache, autoencoder = LatentCache(whole), autoencoders.load(root / "vae")
    moved = Path(shutil.copytree(root / "data", tmp_path / "moved"))
    check(cache, 32, autoencoder, {}, root / "data")
    check(cache, 32, autoencoder, {}, str(moved))  # the same names and captions elsewhere
    refused = lambda data: one_line(f"--data {data}: .*was made of other names", check, cache, 32, autoencoder, {}, data)
    refused("shapes")
    (moved / "3.txt").write_text("another caption")
    refused(str(moved))
    (moved / "3.txt").write_text((root / "data" / "3.txt").read_text())
    check(cache, 32, autoencoder, {}, str(moved))
    for suffix in ("png", "txt"):
        (moved / f"3.{suffix}").rename(moved / f"33.{suffix}")
    refused(str(moved))
    one_line("--data gone: there is no such folder", check, cache, 32, autoencoder, {}, "gone")


def test_latents_that_are_not_numbers_are_said(root, tmp_path):
    shutil.copytree(root / "mini", tmp_path / "bad")
    model = autoencoders.load(tmp_path / "bad")
    with torch.no_grad():
        model.linear_in[1].weight.fill_(1e6)
        write_mini(model, tmp_path / "bad")
    one_line("too large for fp16", encode, root, tmp_path / "cache", "--autoencoder", tmp_path / "bad")


def test_flags_that_make_no_sense(root, tmp_path):
    out = tmp_path / "cache"
    for flags, message in (
        (("--image-size", 40), "--image-size 40: must be a multiple of 16"),
        (("--image-size", 0), "--image-size 0: must be at least 16"),
        (("--mirror", "yes"), "--mirror yes: not one of auto, true, false"),
        (("--text",), "it goes with --clip DIR"),
        (("--t5", root / "t5"), "it goes with --clip DIR"),
        (("--text", "--t5", root / "clip"), "not t5"),
        (("--autoencoder", tmp_path), "no model.safetensors there"),
        (("--per-shard", 0), "--per-shard 0: must be at least 1"),
        (("--shard", 1), "did you mean --per-shard"),
        (("--out", ""), "--out CACHE: say"),
        (("x",), "'x' is not a flag"),
    ):
        one_line(message, encode, root, out, *flags)
    assert not out.exists()


def test_the_command(root, tmp_path):
    def command(*words):
        words = [sys.executable, "-m", "data.latent_cache", *map(str, words)]
        return subprocess.run(words, cwd=ROOT, capture_output=True, text=True)

    out = tmp_path / "cache"
    done = command("--data", root / "data", "--autoencoder", root / "mini", "--image-size", 32, "--out", out)
    assert done.returncode == 0 and f"10 pictures of 32×32 → {out}" in done.stdout
    assert len(LatentCache(out)) == COUNT
    failed = command("--data", root / "gone", "--autoencoder", root / "mini", "--out", out)
    assert failed.returncode == 1 and failed.stderr.startswith("latent_cache.py: --data")
    assert failed.stderr.count("\n") == 1
