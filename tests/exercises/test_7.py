"""Exercise 7: guidance that changes direction, not size (adaptive projected guidance, Sadat et al. 2024)."""
import torch

from diffusion import classifier_free_guidance


def test_the_update_is_perpendicular():
    outputs = {True: torch.randn(2, 4, 3, 3), False: torch.randn(2, 4, 3, 3)}

    def model(x, t, text):
        return torch.where(text.view(-1, 1, 1, 1), torch.cat([outputs[True]] * 2), torch.cat([outputs[False]] * 2))

    condition, null = dict(text=torch.ones(2, dtype=torch.bool)), dict(text=torch.zeros(2, dtype=torch.bool))
    guided = classifier_free_guidance(model, condition, null, 3.0)(torch.zeros(2, 4, 3, 3), torch.zeros(2))
    update, out = (guided - outputs[True]).flatten(1), outputs[True].flatten(1)
    assert (update * out).sum(1).abs().max() < 1e-4
    difference = (outputs[True] - outputs[False]).flatten(1)
    parallel = (difference * out).sum(1, keepdim=True) / out.square().sum(1, keepdim=True) * out
    assert torch.allclose(update, 2.0 * (difference - parallel), atol=1e-5)
