"""Exercise 6: a still clip weighs half as much in the loss as a moving one."""
from types import SimpleNamespace

import torch

from train import diffusion_loss


def test_still_clips_weigh_half():
    diffusion = SimpleNamespace(loss=lambda *parts: torch.tensor([1.0, 2.0, 4.0]), steps=1000)
    model = SimpleNamespace(encode_text=lambda text: ([], []), transformer=None, diffusion=diffusion)
    batch = dict(x0=torch.zeros(3, 2, 4, 2, 2), t=torch.tensor([0, 500, 999]), noise=None, text=None, dropped=None)
    moving, _ = diffusion_loss(model, batch | dict(clips={}))
    mixed, _ = diffusion_loss(model, batch | dict(clips=dict(motion_free=torch.tensor([False, True, True]))))
    clips_alone, _ = diffusion_loss(model, batch | dict(clips=dict(motion_free=None)))
    assert moving.tolist() == clips_alone.tolist() == [1, 2, 4] and mixed.tolist() == [1, 1, 2]
