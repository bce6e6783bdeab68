"""Exercise 4: causal temporal attention. A frame reads itself and earlier frames."""
import torch

from temporal import TempSelfAttn


def test_the_past_does_not_know_the_future():
    branch = TempSelfAttn(16, 2)
    x, positions = torch.randn(2, 5, 3, 16), torch.zeros(2, 5, 16)
    changed = x.clone()
    changed[:, 3] = torch.randn(2, 3, 16)
    for mask in (None, torch.ones(6, 1, 5, 5, dtype=torch.bool)):
        before, after = branch(x, positions, mask), branch(changed, positions, mask)
        assert torch.allclose(before[:, :3], after[:, :3], atol=1e-6)
        assert (before[:, 4] - after[:, 4]).abs().max() > 1e-3
    alone = torch.eye(5, dtype=torch.bool).expand(6, 1, 5, 5)  # the motion-free mask still holds
    before, after = branch(x, positions, alone), branch(changed, positions, alone)
    assert torch.allclose(before[:, 4], after[:, 4], atol=1e-6)
