"""Exercise 10: timesteps as today's flow models draw them: logit-normal (Esser et al. 2024)."""
import torch

from diffusion import Diffusion


def test_logit_normal():
    t = Diffusion(shift=1.0).random_timesteps((100_000,), torch.Generator().manual_seed(0))
    u = torch.sort((t + 0.5) / 1000).values
    expected = torch.distributions.Normal(0.0, 1.0).cdf(torch.logit(u))
    share = (torch.arange(len(u)) + 0.5) / len(u)
    assert (expected - share).abs().max() < 0.01
    assert t.min() >= 0 and t.max() < 1000
