"""Exercise 8: temporal attention starts from the weights of self-attention, and still changes nothing."""
import torch

from dit import GenTron, ModelConfig
from temporal import inflate


def test_copied_weights():
    settings = dict(depth=2, width=16, heads=2, text_widths=(8,))
    image, video = GenTron(ModelConfig(**settings)), GenTron(ModelConfig(**settings, temporal=True))
    for p in image.parameters():
        torch.nn.init.normal_(p, std=0.1)
    inflate(video, image.state_dict())
    for block in video.blocks:
        assert torch.equal(block.temporal.attention.qkv.weight, block.self_attention.qkv.weight)
    x, t = torch.randn(2, 3, 4, 4, 4), torch.tensor([10, 700])
    text, mask = [torch.randn(2, 5, 8)], [torch.ones(2, 5, dtype=torch.bool)]
    frames = torch.stack([image(x[:, f], t, text, mask) for f in range(3)], dim=1)
    assert torch.allclose(video(x, t, text, mask), frames, atol=1e-5)
