"""What turns gradients into weights: Muon, AdamW, the learning rate, and the averaged weights (EMA).

Muon (Jordan et al. 2024) makes the updates of matrices orthogonal, so that every direction learns alike:

    m ← 0.95 m + g;   u = 0.95 m + g;   W ← W - lr · 0.2 sqrt(max(rows, columns)) · UVᵀ,   where u = UΣVᵀ

A Newton–Schulz iteration gives UVᵀ nearly, by products alone. The factor makes an update as large as AdamW's,
so that one learning rate serves both (Liu et al. 2025, arXiv 2502.16982). torch.optim.Muon is the same rule;
ours iterates in the dtype of the run, on all matrices of one shape together, and on sharded ones.
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
    """For matrices inside the network; a convolution kernel counts as the matrix of its output channels. The
    rest is better left to AdamW. dtype: of the iteration."""

    def __init__(self, params, lr, momentum=0.95, weight_decay=0.0, dtype=torch.float32):
        super().__init__(params, dict(lr=lr, momentum=momentum, weight_decay=weight_decay))
        self.dtype = dtype

    @torch.no_grad()
    def step(self):
        for group in self.param_groups:
            of_shape = {}
            for p in group["params"]:
                if p.grad is not None:
                    of_shape.setdefault(p.shape, []).append(p)
            for params in of_shape.values():
                self.update(group, params)

    def update(self, group, params):
        """One step of all matrices of one shape. Of sharded ones every process computes the whole update."""
        updates = []
        for p in params:
            if not self.state[p]:
                self.state[p]["momentum"] = torch.zeros_like(p)
            m = self.state[p]["momentum"]
            m.lerp_(p.grad, 1 - group["momentum"])  # 0.05 times the m above; UVᵀ ignores scale
            updates.append(whole(torch.lerp(p.grad, m, group["momentum"])).flatten(1))
        updates = orthogonalise(torch.stack(updates).to(self.dtype)).to(params[0].dtype)  # (K, rows, columns)
        size = group["lr"] * 0.2 * max(updates.shape[1:]) ** 0.5
        for p, update in zip(params, updates):
            if group["weight_decay"]:
                p.mul_(1 - group["lr"] * group["weight_decay"])
            p.sub_(share_of(update.view(p.shape), p), alpha=size)


def make_optimizers(model, optimizer, lr, beta2, weight_decay, dtype):
    """A list: AdamW for all weights; or Muon for the matrices inside the blocks and AdamW for the rest. The
    tables of adaLN are AdamW's, since their input is one vector a sample. dtype: of Muon's iteration."""
    inside, rest = [], []
    for name, p in model.named_parameters():
        in_blocks = ("blocks." in name or "coder." in name) and "modulation" not in name
        matrix = p.ndim >= 2 and min(p.shape[:2]) >= 48
        if p.requires_grad and optimizer == "muon" and in_blocks and matrix:
            inside.append(p)
        elif p.requires_grad:
            rest.append(p)
    adamw = torch.optim.AdamW(rest, lr, betas=(0.9, beta2), weight_decay=weight_decay, fused=True)
    return [Muon(inside, lr, weight_decay=weight_decay, dtype=dtype), adamw] if inside else [adamw]


def learning_rate(step, steps, warmup, cooldown):
    """The share of the full rate at a step: it rises over `warmup` steps, stays, and falls to 0 over the last
    share `cooldown` of the run."""
    left = (steps - step) / max(1, cooldown * steps)
    return min(1.0, (step + 1) / (warmup + 1), left)


def set_learning_rate(optimizer, lr):
    for group in optimizer.param_groups:
        group["lr"] = lr


@torch.no_grad()
def update_ema(ema, weights, decay, step):
    """ema ← decay · ema + (1 - decay) · weights. Early steps decay faster: a short run must not average its
    first noise."""
    decay = min(decay, (1 + step) / (10 + step))
    torch._foreach_lerp_(list(ema.values()), list(weights.values()), 1 - decay)
