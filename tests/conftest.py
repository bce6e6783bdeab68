import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parent.parent))


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)
    torch.set_float32_matmul_precision("highest")  # commands run in tests may have lowered it
