"""Exercise 2: each encoder has its half of the depth, in place of turns."""
import torch

from dit import GenTron, ModelConfig


def test_halves():
    model = GenTron(ModelConfig(depth=4, width=16, heads=2, text_widths=(8, 12), null_tokens=(1, 1), pooling=("last", "mean")))
    assert [block.cross_attention.attention.kv.in_features for block in model.blocks] == [8, 8, 12, 12]
    texts = [torch.randn(2, 3, 8), torch.randn(2, 5, 12)]
    masks = [torch.ones(text.shape[:2], dtype=torch.bool) for text in texts]
    assert model(torch.randn(2, 4, 4, 4), torch.tensor([5, 900]), texts, masks).shape == (2, 4, 4, 4)
