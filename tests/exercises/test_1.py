"""Exercise 1: a gate for cross-attention, which starts closed and can open."""
import torch

from conditioning import Text
from dit import GenTron, ModelConfig, initialise


def test_the_gate():
    with torch.device("meta"):  # as a new model is made
        model = GenTron(ModelConfig(depth=1, width=16, heads=2, text_widths=(8,))).to_empty(device="cpu")
    initialise(model)
    branch = model.blocks[0].cross_attention
    text = Text(torch.randn(3, 5, 8), torch.randn(1, 8), torch.ones(3, 6, dtype=torch.bool))
    x = torch.randn(3, 1, 4, 16)
    assert torch.equal(branch(x, text), x)
    branch(x, text).square().sum().backward()
    assert branch.gate.grad.abs().max() > 1e-4  # it learns
    with torch.no_grad():
        branch.gate.fill_(100.0)
        whole = branch(x, text) - x
        branch.gate.fill_(0.5)
    assert whole.abs().max() > 0.01
    assert torch.allclose(branch(x, text) - x, torch.tensor(0.5).tanh() * whole, atol=1e-5)
