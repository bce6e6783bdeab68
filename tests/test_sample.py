import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import rounding
from PIL import Image

import sample
from data import prompt_lists
from encoders.autoencoder import Autoencoder, AutoencoderConfig, check_scale
from diffusion import SAMPLERS, classifier_free_guidance
from common.hardware import device_of
from sample import Pipeline
from encoders.t5 import Tokenizer

ROOT = Path(__file__).parent.parent
CAPTIONS = ["a red circle above a blue square", "a small green cross", "a big pink star"]


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A tiny model with random weights, saved as a run leaves it."""
    folder = tmp_path_factory.mktemp("run")
    torch.manual_seed(0)
    tokenizer = Tokenizer.train(CAPTIONS)
    config = dict(
        model=dict(depth=2, width=24, heads=2, channels=4, out_channels=4, text_widths=(16,)),
        text=dict(vocabulary=len(tokenizer), width=16, depth=1, heads=2, head_width=8, mlp_width=16),
        autoencoder=dict(channels=4, width=16, depth=1), diffusion=dict(schedule="cosine", target="velocity"),
        image_size=32, words=sorted({w for c in CAPTIONS for w in c.split()}), flags=dict(data="shapes"),
    )  # fmt: skip
    model = Pipeline(config, tokenizer)
    with torch.no_grad():
        for p in model.transformer.parameters():
            p.add_(0.1 * torch.randn_like(p))
    model.save(folder / "model.safetensors")
    return folder


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
    text, masks = model.encode_text(CAPTIONS[:1])
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
        (["a star", "--checkpoint", run, "--steps", 2000], "2000 sampling steps asked for, 1 to 1000 are possible"),
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
    assert len(prompt_lists.file_name("x" * 500, 3, ".png").encode()) < 255
    assert all(name.rpartition("_")[2] == f"{i:06d}.png" and name.count("_") == 1 for i, name in enumerate(names))


def test_any_aspect_ratio(run):
    model = Pipeline.load(run)
    assert prompt_lists.read_size("48x80") == (48, 80) and prompt_lists.read_size("64") == (64, 64)
    assert model.generate(CAPTIONS[:1], steps=2, size=(48, 80)).shape == (1, 3, 48, 80)
