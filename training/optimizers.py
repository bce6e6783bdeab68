"""Muon (Jordan et al. 2024): momentum whose matrix updates are made orthogonal, so that every direction learns alike.

    m ← 0.95 m + g;   u = 0.95 m + g;   W ← W - lr · 0.2 sqrt(max(rows, columns)) · UVᵀ,   where u = UΣVᵀ

A Newton–Schulz iteration gives UVᵀ nearly, with products alone. The factor 0.2 sqrt(…) makes an update as large as
AdamW's, so that one learning rate serves both (Liu et al. 2025, arXiv 2502.16982). torch.optim.Muon is the same
rule; this one iterates in the dtype it is given (bf16 is slow on many CPUs), and on all matrices of one shape at once; of a
sharded matrix every rank makes the whole update and keeps its share.
"""
import torch

from training.distributed import share_of, whole


def orthogonalise(u, steps=5):
    """UVᵀ of each matrix in u (K, rows, columns), up to singular values between about 0.7 and 1.2."""
    tall = u.shape[1] > u.shape[2]
    u = u.mT if tall else u
    u = u / u.norm(dim=(1, 2), keepdim=True).clamp(min=1e-7)
    for _ in range(steps):
        gram = u @ u.mT
        u = 3.4445 * u + torch.baddbmm(gram, gram, gram, beta=-4.7750, alpha=2.0315) @ u
    return u.mT if tall else u


class Muon(torch.optim.Optimizer):
    """For weight matrices (convolution kernels count as matrices of their output channels) inside the network; the
    rest, and the first and last layer, are better left to AdamW."""

    def __init__(self, params, lr, momentum=0.95, weight_decay=0.0, dtype=torch.float32):
        super().__init__(params, dict(lr=lr, momentum=momentum, weight_decay=weight_decay))
        self.dtype = dtype  # of the iteration

    @torch.no_grad()
    def step(self):
        for group in self.param_groups:
            shapes = {}
            for p in group["params"]:
                if p.grad is not None:
                    shapes.setdefault(p.shape, []).append(p)
            for shape, same in shapes.items():
                updates = []
                for p in same:
                    if not self.state[p]:
                        self.state[p]["momentum"] = torch.zeros_like(p)
                    m = self.state[p]["momentum"]
                    m.lerp_(p.grad, 1 - group["momentum"])  # the sum in the docstring, but for a factor that is divided away
                    updates.append(whole(torch.lerp(p.grad, m, group["momentum"])).flatten(1))
                updates = orthogonalise(torch.stack(updates).to(self.dtype)).to(same[0].dtype)
                size = group["lr"] * 0.2 * max(updates.shape[1:]) ** 0.5
                for p, update in zip(same, updates):
                    if group["weight_decay"]:
                        p.mul_(1 - group["lr"] * group["weight_decay"])
                    p.sub_(share_of(update.view(shape), p), alpha=size)
