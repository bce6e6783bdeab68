"""Exercise 9: prompts that differ in one word start from the same noise, so that one can compare them."""
import torch

from sample import generator_of


def test_the_same_noise_for_all_prompts():
    draw = lambda prompt, seed: torch.randn(4, generator=generator_of(prompt, seed))
    assert torch.equal(draw("a red circle", 3), draw("a blue circle", 3))
    assert not torch.equal(draw("a red circle", 3), draw("a red circle", 4))
