import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import CAPTIONS, rounding, tiny
from PIL import Image, ImageSequence
from test_docs import check_command

import sample
from common import figures
from data import prompt_lists
from encoders.autoencoder import Autoencoder, AutoencoderConfig, check_scale
from diffusion import SAMPLERS, classifier_free_guidance
from common.hardware import device_of
from sample import Pipeline
from encoders.t5 import Tokenizer

ROOT = Path(__file__).parent.parent
@pytest.fixture(scope="module")
def run(tmp_path_factory):
    return tiny(tmp_path_factory.mktemp("run"))


@pytest.fixture(scope="module")
def video_run(tmp_path_factory):
    return tiny(tmp_path_factory.mktemp("video"), temporal=True)


@pytest.fixture
def draw(tmp_path, monkeypatch):
    """draw(run, "a star", "--seed", 1) calls the command in an empty folder."""
    monkeypatch.chdir(tmp_path)

    def call(run, *arguments):
        sample.main(["--checkpoint", str(run), "--steps", "1", "--precision", "fp32", *map(str, arguments)])

    return call


def refusal(call, *arguments):
    with pytest.raises(ValueError) as error:
        call(*arguments)
    assert "\n" not in str(error.value) and len(str(error.value)) < 400
    return str(error.value)


def test_saved_and_loaded_is_the_same(run):
    model = Pipeline.load(run)
    again = Pipeline.load(run / "model.safetensors")
    assert torch.equal(model.generate(CAPTIONS, steps=3), again.generate(CAPTIONS, steps=3))


@pytest.mark.rounding
@pytest.mark.parametrize("sampler", SAMPLERS)
def test_a_picture_depends_on_prompt_and_seed_alone(run, sampler):
    model = Pipeline.load(run)
    together = model.generate(CAPTIONS, seed=3, sampler=sampler, steps=4).int()
    alone = model.generate(CAPTIONS[1:2], seed=3, sampler=sampler, steps=4).int()
    # of 255 levels one at most: what fp32 rounds otherwise in a batch of three is far less, but may lie on either side of a half
    assert (together[1:2] - alone).abs().max() <= 1
    assert (together[1:2] - model.generate(CAPTIONS[1:2], seed=4, sampler=sampler, steps=4).int()).abs().max() > 10
    assert (together[0] - together[1]).abs().max() > 10


@pytest.mark.rounding
def test_null_text_of_training_and_sampling_is_one_object(run):
    """With guidance 0 only the null pass counts: the prompt's words, its length included, must leave no trace; and a
    change of the one null parameter changes both what training with a dropped caption and what sampling sees."""
    model = Pipeline.load(run)
    text, masks = model.encode_text(model.tokenize(CAPTIONS[:1]))
    x, t, dropped = torch.randn(1, 4, 4, 4), torch.tensor([500]), torch.tensor([True])
    trained = model.transformer(x, t, text, masks, dropped)
    sampled = classifier_free_guidance(
        model.transformer, dict(text=text, text_mask=masks, dropped=~dropped), dict(text=text, text_mask=masks, dropped=dropped), 0.0
    )
    near = lambda found, expected: (found - expected).abs().max() <= rounding(expected, sums=10 * 96)  # 2 blocks of 5 products
    assert near(sampled(x, t), trained)
    with torch.no_grad():
        model.transformer.condition.null[0].add_(1.0)
    changed = model.transformer(x, t, text, masks, dropped)
    assert (changed - trained).abs().max() > 10 * rounding(changed, sums=10 * 96)
    assert near(sampled(x, t), changed)
    assert [name for name, _ in model.named_parameters() if "null" in name] == ["transformer.condition.null.0"]


def test_commands(run, tmp_path, monkeypatch):
    def call(*arguments, code=0):
        result = subprocess.run(
            [sys.executable, ROOT / "sample.py", *map(str, arguments)], capture_output=True, text=True, cwd=tmp_path
        )
        assert result.returncode == code, result.stderr
        assert "Traceback" not in result.stderr
        return result

    def refused(*arguments):
        with pytest.raises((ValueError, OSError)) as error:
            sample.main([*map(str, arguments)])
        assert "\n" not in str(error.value)
        return str(error.value)

    common = ["--checkpoint", run, "--steps", 2, "--precision", "fp32"]
    monkeypatch.chdir(tmp_path)
    result = call("a red circle", "a zebra", *common, "--zoom", 1)
    assert 'in "a zebra" no training caption had: zebra' in result.stderr
    assert Image.open(tmp_path / "samples.png").width == 2 * 32 + 12
    (tmp_path / "list.txt").write_text("a red circle\n\na star\n")
    (tmp_path / "latin.txt").write_bytes(b"\xff\xfe")
    (tmp_path / "short.tsv").write_text("Category\tPrompt\nAbstract\ta star\nWorld\n")
    sample.main(["--prompts", "list.txt", "--out", "many", *map(str, common)])
    sample.main(["--prompts", "list.txt", "--grid", "--out", "new/grid.png", "--zoom", "1", *map(str, common)])
    assert Image.open(tmp_path / "new" / "grid.png").width == 2 * 32 + 12
    assert sorted(p.name for p in (tmp_path / "many/samples").iterdir()) == ["a red circle_000000.png", "a star_000001.png"]
    first = np.asarray(Image.open(tmp_path / "many/samples/a red circle_000000.png")).astype(int)
    model = Pipeline.load(run)
    assert abs(first - model.generate(["a red circle"], steps=2)[0].permute(1, 2, 0).numpy()).max() <= 1
    for arguments, message in (
        (["a star", "--sampler", "euler", *common], "--sampler euler: not one of ddpm, ddim, dpm, sde"),
        (["a star", "--checkpoint", run, "--precision", "fp16"], "--precision fp16: not one of auto, fp32, bf16"),
        (["a star", "--checkpoint", run, "--steps", 2000], "--steps 2000: must be from 1 to 1000"),
        ([], "no prompt"),
        (["  "], "no prompt"),
        (["a star"], "no run found in runs/"),
        (["a star", "--checkpoint", "nowhere"], "no model.safetensors in nowhere"),
        (["--prompts", "gone.txt", *common], "gone.txt"),
        (["--prompts", "short.tsv", *common], "--prompts short.tsv: row 3 of the table has no prompt"),
        (["a star", "--grid", *common], "--grid goes with --prompts FILE"),
        (["a star", "--per-prompt", 2, *common], "--per-prompt with --prompts FILE without --grid"),
        (["--prompts", "latin.txt", *common], "--prompts latin.txt: not a text file in UTF-8"),
        (["a star", "--device", "banana", *common], "--device banana: not to be had"),
        (["a star", "--batch-size", 0, *common], "--batch-size 0: must be at least 1"),
        (["a star", "--image-size", "40x30", *common], "--image-size 40x30: must be a multiple of 16, or two"),
    ):
        assert message in refused(*arguments)
    result = call("a star", "--lamda-t", 3, code=1)
    assert result.stderr.strip() == "sample.py: unknown flag --lamda-t; did you mean --lambda-t?"


def test_autoencoder_shapes_scale_and_warning():
    torch.manual_seed(0)
    model = Autoencoder(AutoencoderConfig(4, 16, 1))
    images = torch.rand(64, 3, 32, 48) * 2 - 1
    model.calibrate(images)
    latents = model.encode(images)
    assert latents.shape == (64, 4, 4, 6) and model.decode(latents).shape == images.shape
    torch.testing.assert_close(latents.mean((0, 2, 3)), torch.zeros(4), atol=1e-4, rtol=0)
    torch.testing.assert_close(latents.square().mean(), torch.tensor(1.0), atol=1e-3, rtol=0)
    raw, each = model.moments(images)[0].std((0, 2, 3)), latents.std((0, 2, 3))
    torch.testing.assert_close(each / each[0], raw / raw[0])  # one scale for all channels
    check_scale(latents)
    with pytest.warns(UserWarning, match="mean 3.00 and standard deviation"):
        check_scale(latents + 3)
    with pytest.raises(ValueError, match="divisible by 8"):
        model.encode(torch.zeros(1, 3, 30, 32))


def test_kl_is_that_of_two_gaussians():
    model = Autoencoder(AutoencoderConfig(4, 16, 1)).double()
    images = torch.rand(3, 3, 16, 16, dtype=torch.float64) * 2 - 1
    noise = torch.randn(3, 4, 2, 2, dtype=torch.float64)
    with_kl, without = (model.loss(images, noise, kl_weight=w) for w in (1.0, 0.0))
    mean, log_variance = model.moments(images)
    posterior = torch.distributions.Normal(mean, (0.5 * log_variance).exp())
    kl = torch.distributions.kl_divergence(posterior, torch.distributions.Normal(0.0, 1.0)).flatten(1).sum(1)
    torch.testing.assert_close(with_kl - without, kl)


def test_what_cannot_be_written_is_said_before_anything_is_drawn(run, tmp_path, monkeypatch):
    monkeypatch.setattr(Pipeline, "generate", None)
    for name in ("x", "x.foo", "x.psd"):  # Pillow reads the last, but does not write it
        with pytest.raises(ValueError, match=f"--out .*{name}: no kind of picture; call it NAME.png"):
            sample.main(["a star", "--checkpoint", str(run), "--out", str(tmp_path / name)])
    monkeypatch.undo()
    sample.main(["a star", "--checkpoint", str(run), "--steps", "2", "--out", str(tmp_path / "X.PNG")])
    assert Image.open(tmp_path / "X.PNG").format == "PNG"


def test_under_torchrun_each_process_has_a_gpu_of_its_own(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setenv("LOCAL_RANK", "99")
    with pytest.raises(ValueError, match="cuda:99"):  # no machine has so many
        device_of()


@pytest.mark.rounding
def test_lists_of_prompts_become_the_folder_that_t2i_compbench_reads(run, tmp_path, monkeypatch):
    """PROMPT_NUMBER.png, numbered on from prompt to prompt; in shares, and going on where it stopped."""
    table = tmp_path / "parti.tsv"
    table.write_text("Prompt\tCategory\na red circle\tAbstract\na big pink/blue_star\tWorld\n", encoding="utf-8")
    flags = ["--prompts", str(table), "--per-prompt", "3", "--checkpoint", str(run), "--steps", "2", "--out", str(tmp_path / "out")]
    flags += ["--precision", "fp32"]
    names = [f"a red circle_00000{i}.png" for i in range(3)] + [f"a big pink blue star_00000{i}.png" for i in range(3, 6)]
    folder, written = tmp_path / "out" / "samples", lambda: {p.name for p in (tmp_path / "out" / "samples").iterdir()}
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setenv("WORLD_SIZE", "2")
    sample.main(flags)
    assert written() == {names[1], names[3], names[5]}
    monkeypatch.setenv("RANK", "0")
    sample.main(flags)
    assert written() == set(names)
    read = lambda name: np.asarray(Image.open(folder / name)).astype(int)
    first = [read(name) for name in names]
    apart = min(abs(a - b).max() for i, a in enumerate(first) for b in first[:i])
    assert apart > 10  # no two alike
    (folder / names[2]).unlink()
    (folder / names[0]).write_bytes(b"kept")
    monkeypatch.setenv("WORLD_SIZE", "1")
    sample.main(flags)
    assert (folder / names[0]).read_bytes() == b"kept"
    # drawn in a batch of another size: fp32 rounds a pixel, of 255 levels, to a neighbouring one at most
    assert all(abs(read(name) - before).max() <= 1 for name, before in zip(names[1:], first[1:]))
    assert prompt_lists.read_prompts(table) == ["a red circle", "a big pink/blue_star"]
    assert len(prompt_lists.file_name("x" * 500, 3, ".png").encode()) == 255
    assert all(name.rpartition("_")[2] == f"{i:06d}.png" and name.count("_") == 1 for i, name in enumerate(names))


def test_any_aspect_ratio(run):
    model = Pipeline.load(run)
    assert prompt_lists.read_size("48x80") == (48, 80) and prompt_lists.read_size("64") == (64, 64)
    assert model.generate(CAPTIONS[:1], steps=2, size=(48, 80)).shape == (1, 3, 48, 80)


@pytest.mark.parametrize("content, prompts", [
    (b"a star\ta category\n  a cross \t1\tx\n", ["a star", "a cross"]),  # without a head, the first column
    (b"\n\nChallenge\tPrompt\nx\ta star\n\t\ny\ta cross\t3\n", ["a star", "a cross"]),  # blank rows, a long row
    (b"\xef\xbb\xbfPrompt\tNote\r\na star\r\na cross\t\r\n", ["a star", "a cross"]),  # a BOM, Windows, a short row
    (b"Prompt\na star\n", ["a star"]),
    ("a\u2028star\x0b\n\u2764\ufe0f\n".encode(), ["a\u2028star", "\u2764\ufe0f"]),  # one line each
])  # fmt: skip
def test_lists_of_prompts_are_read(tmp_path, content, prompts):
    (tmp_path / "list").write_bytes(content)
    assert prompt_lists.read_prompts(tmp_path / "list") == prompts


@pytest.mark.parametrize("content, message", [
    (b"", "there is no prompt in it"),
    (b"\xef\xbb\xbf\r\n \t\n", "there is no prompt in it"),
    (b"Category\tPrompt\r\n", "there is no prompt in it"),
    (b"Category\tPrompt\n\nAbstract\ta star\n\nWorld\n", "row 5 of the table has no prompt"),
    (b"a star\n\tWorld\n", "row 2 of the table has no prompt"),
    (b"a \xed\xa0\x80 star\n", "not a text file in UTF-8"),  # a lone surrogate
    ("a star".encode("utf-16"), "not a text file in UTF-8"),
])  # fmt: skip
def test_lists_without_prompts_are_refused(tmp_path, content, message):
    (tmp_path / "list").write_bytes(content)
    assert f"--prompts {tmp_path / 'list'}: {message}" in refusal(prompt_lists.read_prompts, tmp_path / "list")


def test_names_of_pictures_keep_what_a_name_can_hold(tmp_path):
    family, keycap, flag = "\U0001f469\u200d\U0001f469\u200d\U0001f467", "1\ufe0f\u20e3", "\U0001f3f4\U000e0067\U000e007f"
    name = prompt_lists.file_name
    assert name(f"{family} {keycap} {flag}", 7, ".png") == f"{family} {keycap} {flag}_000007.png"
    assert name("a/b_c\\d\te\u2028f\u00a0g\x00h", 0, ".png") == "a b c d e f g h_000000.png"
    assert name("x" * 244, 0, ".png") == "x" * 244 + "_000000.png"
    for prompt, number in (("y" * 245, 0), ("y" * 245, 10**7), ("é" * 200, 1), (family * 50, 2)):
        cut = name(prompt, number, ".gif")
        assert 250 < len(cut.encode()) <= 255 and prompt.startswith(cut.rpartition("_")[0])
        (tmp_path / cut).touch()


class Known:
    """A tokenizer of up to three letters a word and four words a text."""

    length = 4
    unknown = staticmethod(lambda text: [word for word in text.split() if len(word) > 3])
    cut = staticmethod(lambda text: max(0, len(text.split()) - 4))


def test_what_a_model_cannot_read_is_said_once_for_each_prompt(capsys, monkeypatch):
    prompts = ["a red cat", "a dog", "a dog", "a big zebra", "a red cat a big cat"]
    prompt_lists.print_notes(prompts, ["a", "red", "big", "cat"], [Known, Known])
    notes = capsys.readouterr().err.splitlines()
    cut = "only the first 4 tokens are read, the last 2 are not"
    assert notes == [
        'note: in "a dog" no training caption had: dog',
        'note: in "a big zebra" no training caption had: zebra; the tokenizer cannot read: zebra',
        f'note: in "a red cat a big cat" {cut}; {cut}',
    ]
    prompt_lists.print_notes([f"dog {i}" for i in range(5000)], ["dog"], [Known])
    notes = capsys.readouterr().err.splitlines()
    assert len(notes) == 20 and notes[-1] == "note: … and likewise in 4981 more prompts"
    with monkeypatch.context() as other:
        for name, value in (("RANK", "1"), ("WORLD_SIZE", "2")):
            other.setenv(name, value)
        prompt_lists.print_notes(["a dog"], ["a"], [])
    assert capsys.readouterr().err == ""
    prompt_lists.print_notes(["a\ndog"], ["a"], [])
    assert capsys.readouterr().err == 'note: in "a dog" no training caption had: dog\n'
    prompt_lists.print_notes(["z" * 100_000, "ab cd " * 20_000], [], [Known])
    assert max(map(len, capsys.readouterr().err.splitlines())) < 600


PROMPTS = dict(surrogate="a \udcff star", letters="a" * 100_000, words="wörd " * 20_000, null="\x00", bom="\ufeffa star")


@pytest.mark.parametrize("prompt", PROMPTS.values(), ids=PROMPTS)
def test_any_text_can_be_a_prompt(run, draw, prompt):
    draw(run, prompt)
    (Path("list.txt")).write_text(f"{prompt_lists.readable(prompt)}\n")
    draw(run, "--prompts", "list.txt")
    assert len(list(Path("samples/samples").iterdir())) == 1
    assert Image.open("samples.png").height < 1000
    Pipeline.load(run).generate([prompt], steps=1)


def test_flags_without_effect_are_refused(run, video_run, draw, monkeypatch):
    Path("list.txt").write_text("a star\n")
    monkeypatch.setattr(Pipeline, "generate", None)
    for flags, message in (
        (["--lambda-m", 1.2], "--lambda-m: of clips only, and this is an image model; name a run of `python train.py video`"),
        (["--frames", 8], "--frames: of clips only"),
        (["--fps", 4], "--fps: of clips only"),
        (["--clip", "."], "--clip .: "),
        (["--t5", "."], "was trained without it; leave it out"),
        (["--per-prompt", 1], "--per-prompt with --prompts FILE without --grid"),
        (["--prompts", "list.txt", "--zoom", 2], "--zoom: a folder's pictures are as the model draws them; for a grid give --grid"),
        (["--seed", 1_700_000_000_000_000_000], "--seed 1700000000000000000: must be from 0 to"),
        (["--seed", -1], "--seed -1: must be from 0 to"),
        (["--image-size", 16 * 10**100], "must be a multiple of 16"),
        (["--image-size", "32x"], "must be a multiple of 16"),
        (["--frames", 10**12], "must be from 0 to 1000"),
    ):
        assert message in refusal(draw, run, "a star", *flags)
    assert "--seed -1" in refusal(draw, video_run, "a star", "--seed", -1)


def test_an_output_that_cannot_be_written_is_refused_before_anything_is_drawn(run, video_run, draw, monkeypatch):
    monkeypatch.setattr(Pipeline, "generate", None)
    Path("list.txt").write_text("a star\n")
    Path("many.txt").write_text("a star\n" * 150)
    Path("folder.png").mkdir()
    for out, reason in (
        ("list.txt/x.png", "File exists|Not a directory"),
        ("/proc/none/x.png", "No such file|Permission denied"),
        ("folder.png", "Is a directory|it is a folder"),
        ("x" * 300 + ".png", "File name too long"),
    ):
        with pytest.raises(ValueError, match=f"--out {out} cannot be written: .*({reason})"):
            draw(run, "a star", "--out", out)
    assert "cannot be written" in refusal(draw, run, "--prompts", "list.txt", "--out", "list.txt")
    grid = "--prompts", "many.txt", "--grid"
    assert "WebP limit of 16383" in refusal(draw, run, *grid, "--zoom", 21, "--out", "big.webp")
    assert "pixels is too large; fewer prompts" in refusal(draw, run, *grid, "--zoom", 10**6)
    assert "--out x.xbm cannot be written" in refusal(draw, run, "a star", "--out", "x.xbm")
    assert "--fps 60: a .gif has at most 50; --out NAME.webp may have 100" in refusal(draw, video_run, "a star", "--fps", 60)
    assert refusal(draw, video_run, "--prompts", "list.txt", "--fps", 51) == "--fps 51: a .gif has at most 50"
    monkeypatch.setattr("shutil.which", lambda name: None)
    assert "for mp4 install the program ffmpeg" in refusal(draw, video_run, "a star", "--out", "x.mp4")
    assert {path.name for path in Path().iterdir()} == {"list.txt", "many.txt", "folder.png"}


@pytest.mark.parametrize("out", ["x.webp", "X.GIF", "f:g.mp4", "a:b/%d-?.mp4"])
def test_clips_are_written_under_any_name(video_run, draw, out):
    if out.endswith(".mp4") and shutil.which("ffmpeg") is None:
        pytest.skip("the program ffmpeg is not installed")
    draw(video_run, "a star", "--out", out)
    assert {path.name for path in Path(out).parent.iterdir()} == {Path(out).name, f"{Path(out).stem}.png"}


@pytest.mark.parametrize("name, fps", [("x.gif", 30), ("x.gif", 7), ("x.gif", 50), ("x.gif", 1), ("x.webp", 60), ("x.webp", 4)])
def test_a_clip_lasts_as_long_as_its_frames(tmp_path, name, fps):
    pictures = torch.randint(256, (1, 8, 3, 16, 16), dtype=torch.uint8)
    pictures[0, 3] = pictures[0, 2]  # the formats merge equal neighbours
    figures.animation(pictures, None, fps, tmp_path / name)
    with Image.open(tmp_path / name) as image:
        durations = []
        for frame in ImageSequence.Iterator(image):
            frame.load()
            durations.append(frame.info["duration"])
    unit = 10 if name.endswith("gif") else 1
    assert abs(sum(durations) - 8000 / fps) <= unit / 2 and len(durations) == 7
    assert min(durations) >= (20 if unit == 10 else 10)


def test_a_folder_of_other_prompts_is_refused(run, draw):
    Path("list.txt").write_text("a star\na cross\n")
    Path("one.txt").write_text("a star\n")
    draw(run, "--prompts", "list.txt")
    before = {path: path.stat().st_mtime_ns for path in Path("samples/samples").iterdir()}
    for flags in (["--prompts", "list.txt", "--per-prompt", 2], ["--prompts", "one.txt"], ["a ring", "--prompts", "list.txt"]):
        assert "samples/samples holds files that are not of this list, as a cross_000001.png" in refusal(draw, run, *flags)
    assert {path: path.stat().st_mtime_ns for path in Path("samples/samples").iterdir()} == before
    Path("list.txt").write_text("a star\na cross\na ring\n")  # a list may grow at its end
    draw(run, "--prompts", "list.txt")
    assert len(list(Path("samples/samples").iterdir())) == 3


@pytest.mark.parametrize("settings", [dict(WORLD_SIZE="2"), dict(RANK="1"), dict(SLURM_PROCID="1", WORLD_SIZE="4")])
def test_only_torchrun_shares_prompts_out(run, draw, monkeypatch, settings):
    for name in ("RANK", "WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)
    for name, value in settings.items():
        monkeypatch.setenv(name, value)
    Path("list.txt").write_text("a star\na cross\na ring\n")
    draw(run, "--prompts", "list.txt")
    assert len(list(Path("samples/samples").iterdir())) == 3


def test_an_interrupted_folder_has_whole_pictures_alone(run, draw, monkeypatch):
    """Temporary files lie beside the folder, under names of their own; the next start removes those of dead processes."""
    Path("list.txt").write_text("a star\na cross\n")
    seen, save = [], Image.Image.save

    def saves(image, path, *rest):
        save(image, path, *rest)
        seen.append(path)
        assert path.parent == Path("samples").resolve() and path.exists()
        if len(seen) == 3:  # the trial, a star, and now a cross
            raise KeyboardInterrupt

    for left in (Path("samples") / f".part-{'0' * 32}.png", Path("samples/samples") / f".part-{'a1' * 16}-a star_000000.png"):
        left.parent.mkdir(exist_ok=True)
        left.touch()
    monkeypatch.setattr(Image.Image, "save", saves)
    with pytest.raises(KeyboardInterrupt):
        draw(run, "--prompts", "list.txt")
    assert [path.name for path in Path("samples").rglob("*") if path.is_file()] == ["a star_000000.png"]
    assert len(set(seen)) == 3
    monkeypatch.undo()


def test_hints_are_commands_that_exist():
    for name in ("sample.py", "data/prompt_lists.py", "common/files.py"):
        text = (ROOT / name).read_text().replace("{stage}", "image")
        for hint in re.findall(r"`(python [^`]+)`", text) + re.findall(r"'no prompt: (python [^,]+),", text):
            check_command(shlex.split(hint))


def test_a_prompts_keys_and_values_are_computed_once(run):
    """Not at every step of a sampler: once for the guided batch, once for the plain one outside of the interval."""
    model, calls = Pipeline.load(run), []
    for block in model.transformer.blocks:
        block.cross_attention.attention.kv.register_forward_hook(lambda *_: calls.append(1))
    once = 2 * len(model.transformer.blocks)  # captions and null text
    for interval, batches in (((0.0, 1.0), 1), ((0.2, 0.8), 2)):
        calls.clear()
        model.generate(CAPTIONS, steps=6, interval=interval)
        assert len(calls) == batches * once
