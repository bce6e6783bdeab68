"""Tiny published folders, all with random weights, train and sample by the commands of the big ones."""
import shutil

import pytest
import torch
from PIL import Image
from oracles import clip, oracle, save, t5

import sample
from data import shapes
import train
from encoders import weights
from sample import Pipeline

FLAGS = ["--steps", "2", "--batch-size", "4", "--image-size", "32"]
CAPTIONS = ["a red circle", "a blue star", "a green cross above a pink square", "a big yellow triangle"]


@pytest.fixture(scope="module")
def folders(tmp_path_factory, byte_pairs):  # noqa: F811
    root = tmp_path_factory.mktemp("published")
    save(clip(), root / "clip", byte_pairs)
    save(t5(vocab_size=32128), root / "t5", byte_pairs)
    oracle((8, 16, 16, 16), layers=1, norm_num_groups=4).save_pretrained(root / "vae")
    (root / "data").mkdir()
    for i, caption in enumerate(CAPTIONS):
        Image.fromarray(shapes.Shapes(32, count=4).pictures([i])[0].permute(1, 2, 0).numpy()).save(root / "data" / f"{i}.png")
        (root / "data" / f"{i}.txt").write_text(caption)
    return root


def flags(root, *encoders):
    """Of a run on these folders."""
    chosen = [word for name in encoders for word in (f"--{name}", str(root / name))]
    return ["--data", str(root / "data"), "--autoencoder", str(root / "vae"), *FLAGS, *chosen]


@pytest.mark.parametrize("encoders, integration", [(("clip", "t5"), "cross"), (("t5",), "cross"), (("clip",), "adaln")])
def test_published_parts_train_and_sample(folders, tmp_path, encoders, integration, capsys):
    run = tmp_path / "run"
    train.main(["image", *flags(folders, *encoders), "--integration", integration, "--out", str(run)])
    stored = weights.read(run / "model.safetensors")[0]
    assert not any(name.startswith("text_encoders.") or name == "tokenizer" for name in stored)
    model = Pipeline.load(run)
    assert [encoder.config.width for encoder in model.text_encoders] == [dict(clip=32, t5=24)[name] for name in encoders]
    if integration == "cross":
        widths = [block.cross_attention.attention.kv.in_features for block in model.transformer.blocks]
        assert widths == ([32, 24] * 3 if len(encoders) == 2 else [24] * 6)  # the blocks take turns
    assert not any(p.requires_grad for p in (*model.text_encoders.parameters(), *model.autoencoder.parameters()))
    sample.main(["a red circle", "a blue star", "--checkpoint", str(run), "--steps", "2", "--out", str(tmp_path / "x.png")])
    assert Image.open(tmp_path / "x.png").width > 64


def test_encoders_that_moved_are_found_by_a_flag(folders, tmp_path):
    run, moved = tmp_path / "run", tmp_path / "moved"
    root = tmp_path / "copies"
    shutil.copytree(folders, root)
    train.main(["image", *flags(root, "t5"), "--out", str(run)])
    before = Pipeline.load(run).generate(CAPTIONS[:1], steps=2)
    (root / "t5").rename(moved)
    with pytest.raises(ValueError, match="there is no folder .*t5"):
        Pipeline.load(run)
    assert torch.equal(Pipeline.load(run, t5=str(moved)).generate(CAPTIONS[:1], steps=2), before)
    with pytest.raises(ValueError, match="of type 't5', not clip_text_model or clip"):
        train.main(["image", *flags(root), "--clip", str(moved), "--out", str(tmp_path / "other")])


def test_a_second_stage_on_larger_pictures(folders, tmp_path, capsys):
    """--init RUN --image-size: the same weights, with positions for the wider grid."""
    small, large = tmp_path / "small", tmp_path / "large"
    train.main(["image", *flags(folders, "clip"), "--out", str(small)])
    data = ["--data", str(folders / "data"), *FLAGS]
    train.main(["image", *data, "--init", str(small), "--image-size", "64", "--lr", "0", "--out", str(large)])
    first, second = Pipeline.load(small), Pipeline.load(large)
    assert second.generate(CAPTIONS[:1], steps=2).shape == (1, 3, 64, 64) and second.config["published"] == first.config["published"]
    assert all(torch.equal(a, b) for a, b in zip(first.state_dict().values(), second.state_dict().values()))
