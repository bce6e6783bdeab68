"""Exercise 5: between a still picture and a clip: a mask that reaches some frames far."""
import torch

from temporal import motion_free_mask


def test_reach():
    free = torch.tensor([True, False])
    assert torch.equal(motion_free_mask(free, 4, 3, reach=0)[:3], motion_free_mask(free, 4, 3)[:3])
    mask = motion_free_mask(free, 4, 3, reach=1)  # (B·N, 1, F, F)
    band = torch.tensor([[1, 1, 0, 0], [1, 1, 1, 0], [0, 1, 1, 1], [0, 0, 1, 1]], dtype=torch.bool)
    assert mask.shape == (6, 1, 4, 4) and torch.equal(mask[0, 0], band) and mask[3:].all()
