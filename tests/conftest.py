import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parent.parent))


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)
    torch.set_float32_matmul_precision("highest")  # commands run in tests may have lowered it


def fake_cuda(module):
    """Under FakeTensorMode: the module, made on the meta device, as if it lay on a GPU."""
    for part in module.modules():
        for tensors in (part._parameters, part._buffers):
            for name in tensors:
                if tensors[name] is not None:
                    tensors[name] = torch.empty(tensors[name].shape, device="cuda")
    return module
