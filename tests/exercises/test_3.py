"""Exercise 3: a gated MLP, SwiGLU, with as many parameters as before."""
import pytest
import torch

from dit import MLP


@pytest.mark.parametrize("width, ratio", [(192, 4), (384, 2)])
def test_swiglu(width, ratio):
    mlp = MLP(width, ratio)
    before = 2 * ratio * width**2 + (ratio + 1) * width
    assert abs(sum(p.numel() for p in mlp.parameters()) / before - 1) < 0.01
    x = torch.randn(2, 1, 3, width)
    expected = mlp.down(torch.nn.functional.silu(mlp.gate(x)) * mlp.up(x))
    assert mlp(x).shape == x.shape and torch.allclose(mlp(x), expected, atol=1e-5)
