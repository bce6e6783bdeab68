"""Exercise 1: a gate for cross-attention, which starts closed."""
import torch

from conditioning import CrossAttention, Text


def test_the_gate():
    branch = CrossAttention(16, 2, 8)
    text = Text(torch.randn(3, 5, 8), torch.randn(1, 8), torch.ones(3, 6, dtype=torch.bool))
    x = torch.randn(3, 1, 4, 16)
    assert torch.equal(branch(x, text), x)
    with torch.no_grad():
        branch.gate.fill_(100.0)
        whole = branch(x, text) - x
        branch.gate.fill_(0.5)
    assert whole.abs().max() > 0.01
    assert torch.allclose(branch(x, text) - x, torch.tensor(0.5).tanh() * whole, atol=1e-5)
