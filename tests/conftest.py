import sys
from pathlib import Path

import pytest
import torch
from PIL import Image

sys.path.insert(0, str(Path(__file__).parent.parent))


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
