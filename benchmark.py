"""Speed, as ratios within one run: the training step against this machine's own matrix product.

    python benchmark.py        S/2, 256 tokens, fp32: forward and backward, batch 8
"""
import statistics
import sys
import time

import torch
from torch.utils.flop_counter import FlopCounterMode

from dit import GenTron, ModelConfig
from sample import device_of


def seconds(function, repeats):
    """Median time of a call, after one to warm up."""
    function()
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        function()
        times.append(time.perf_counter() - start)
    return statistics.median(times)


def main(batch=8, tokens_side=16, repeats=5):
    device = device_of()
    config = ModelConfig.of("S", integration="class", classes=1000)
    model = GenTron(config).to(device)
    x = torch.randn(batch, config.channels, 2 * tokens_side, 2 * tokens_side, device=device)
    t, labels = torch.randint(0, 1000, (2, batch), device=device)
    a = torch.randn(4096, 4096, device=device)

    def step():
        model(x, t, labels).square().mean().backward()
        model.zero_grad(set_to_none=True)
        x[0, 0, 0, 0].item()  # waits for a GPU

    with FlopCounterMode(display=False) as counter:
        step()
    ratios = []
    for _ in range(3):  # the machine's speed wanders: measure both in turn
        product = 2 * 4096**3 / seconds(lambda: (a @ a)[0, 0].item(), repeats)
        rate = counter.get_total_flops() / seconds(step, repeats)
        ratios.append(rate / product)
        print(f"S/2, {tokens_side**2} tokens: {rate / 1e9:6.0f} GFLOP/s; matrix product {product / 1e9:6.0f}; ratio {ratios[-1]:.2f}")
    print(f"ratio, median of {len(ratios)}: {statistics.median(ratios):.2f}")


if __name__ == "__main__":
    sys.exit(main())
