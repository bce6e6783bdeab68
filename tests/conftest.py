import sys
from pathlib import Path

import pytest
import torch
from PIL import Image

sys.path.insert(0, str(Path(__file__).parent.parent))

CAPTIONS = ["a red circle above a blue square", "a small green cross", "a big pink star"]


def pytest_configure(config):
    config.addinivalue_line("markers", "rounding: compares computations of different shape; make test-processors runs it")


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


def rounding(expected, sums):
    """How far from `expected` a second computation of it may come out that rounds in another order: by other kernels, for a
    batch of another size, on another processor. Each of `sums` additions errs by half an epsilon of the largest value at
    most, in either direction: sqrt(sums) of them in all, on average; four times that is allowed."""
    return 4 * torch.finfo(expected.dtype).eps * sums**0.5 * expected.abs().max().item()


@pytest.fixture(scope="session")
def pictures(tmp_path_factory):
    """A folder of 20 small pictures with captions, `data`, and in `ae` an autoencoder trained on them for a moment."""
    from data import shapes
    import train

    root = tmp_path_factory.mktemp("pictures")
    (root / "data").mkdir()
    drawn = shapes.Shapes(32, count=20)
    for i, caption in enumerate(drawn.captions):
        Image.fromarray(shapes.draw(drawn.scenes[i], 32)).save(root / "data" / f"{i}.png")
        (root / "data" / f"{i}.txt").write_text(caption)
    train.main(["autoencoder", "--data", str(root / "data"), "--image-size", "32", "--steps", "2", "--out", str(root / "ae")])
    return root


@pytest.fixture(scope="session")
def byte_pairs(tmp_path_factory):
    """A folder with CLIP's merges.txt and vocab.json, as on the hub."""
    from oracles import write_byte_pairs

    folder = tmp_path_factory.mktemp("byte_pairs")
    write_byte_pairs(folder)
    return folder


def fake_cuda(module):
    """Under FakeTensorMode: the module, made on the meta device, as if it lay on a GPU."""
    for part in module.modules():
        for tensors in (part._parameters, part._buffers):
            for name in tensors:
                if tensors[name] is not None:
                    tensors[name] = torch.empty(tensors[name].shape, device="cuda")
    return module


def tiny(folder, **more):
    """A tiny model with random weights, saved as a run leaves it."""
    from encoders.t5 import Tokenizer
    from sample import Pipeline

    torch.manual_seed(0)
    tokenizer = Tokenizer.train(CAPTIONS)
    config = dict(
        model=dict(depth=2, width=24, heads=2, channels=4, out_channels=4, text_widths=(16,), **more),
        text=dict(vocabulary=len(tokenizer), width=16, depth=1, heads=2, head_width=8, mlp_width=16),
        autoencoder=dict(channels=4, width=16, depth=1), diffusion=dict(schedule="cosine", target="velocity"),
        image_size=32, frames=3, words=sorted({w for c in CAPTIONS for w in c.split()}), flags=dict(data="shapes"),
    )  # fmt: skip
    model = Pipeline(config, tokenizer)
    with torch.no_grad():
        for p in model.transformer.parameters():
            p.add_(0.1 * torch.randn_like(p))
    model.save(folder / "model.safetensors")
    return folder
