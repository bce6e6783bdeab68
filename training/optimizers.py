"""What turns gradients into weights: Muon, AdamW, the learning rate, and the averaged weights (EMA).

Muon (Jordan et al. 2024) makes the updates of matrices orthogonal, so that every direction learns alike:

    m ← 0.95 m + g;   u = 0.95 m + g;   W ← W - lr · 0.2 sqrt(max(rows, columns)) · UVᵀ,   where u = UΣVᵀ

A few polynomials of u give UVᵀ nearly, by products alone. The factor makes an update as large as AdamW's, so
that one learning rate serves both (Liu et al. 2025, arXiv 2502.16982). torch.optim.Muon is the same rule with
five polynomials of one kind; ours computes in the dtype of the run, on all matrices of one shape together,
and on sharded ones.
"""
import math

import torch

from training.distributed import local, share_of, whole


# p(s) = a s + b s³ + c s⁵, applied one after the other: of all such, the ones that bring singular values from
# 0.01…1 nearest to 1, to 0.73…1.27 (the idea of Amsel et al. 2025, arXiv 2505.16932)
POLYNOMIALS = (8.0934, -23.6206, 17.4462), (3.6366, -2.7219, 0.5365), (2.6613, -1.9771, 0.4526)


def orthogonalise(u, polynomials=POLYNOMIALS):
    """UVᵀ of each matrix in u (K, rows, columns), up to singular values between 0.73 and 1.27; smaller where
    they were below a hundredth of the matrix's norm."""
    tall = u.shape[1] > u.shape[2]
    u = u.mT if tall else u
    u = u / u.norm(dim=(1, 2), keepdim=True).clamp(min=1e-7)
    for a, b, c in polynomials:
        gram = u @ u.mT
        u = a * u + torch.baddbmm(gram, gram, gram, beta=b, alpha=c) @ u
    return u.mT if tall else u


class Muon(torch.optim.Optimizer):
    """For matrices inside the network; a convolution kernel counts as the matrix of its output channels. The
    rest is better left to AdamW. parts: how many matrices lie in a weight one below the other, as those of
    queries, keys and values. dtype: of the iteration."""

    def __init__(self, params, lr, momentum=0.95, weight_decay=0.0, dtype=torch.float32):
        super().__init__(params, dict(lr=lr, momentum=momentum, weight_decay=weight_decay, parts=1))
        self.dtype = dtype
        self.grad_scale, self.found_inf = torch.ones(()), torch.zeros(())  # as in `clip_and_step`

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
            m, gradient = self.state[p]["momentum"], p.grad
            gradient = torch.where(self.found_inf > 0, m, gradient / self.grad_scale)  # or m stays as it is
            m.lerp_(gradient, 1 - group["momentum"])  # 0.05 times the m above; UVᵀ ignores scale
            update = whole(torch.lerp(gradient, m, group["momentum"])).flatten(1)
            updates.append(update.unflatten(0, (group["parts"], -1)))  # (parts, rows, columns)
        updates = orthogonalise(torch.cat(updates).to(self.dtype)).to(params[0].dtype)
        lr = group["lr"] * (1 - self.found_inf)
        updates = updates * (1 - self.found_inf)
        size = group["lr"] * 0.2 * max(updates.shape[1:]) ** 0.5
        for p, update in zip(params, updates.split(group["parts"])):
            if group["weight_decay"]:
                p.mul_(1 - lr * group["weight_decay"])
            p.sub_(share_of(update.view(p.shape), p), alpha=size)


class AdamW(torch.optim.AdamW):
    """torch's. Of sharded weights it sees this rank's shares as plain tensors, in the same memory: its work
    is number by number, and DTensor's dispatch costs more than that. shares: {what it sees: the weight}."""

    def __init__(self, params, lr, **options):
        self.shares = {torch.nn.Parameter(local(p.detach())): p for p in params}
        super().__init__(list(self.shares), lr, **options)

    def step(self):
        for share, p in self.shares.items():
            share.grad = local(p.grad)
        super().step()
        for share in self.shares:
            share.grad = None


def make_optimizers(model, optimizer, lr, beta2, weight_decay, dtype):
    """A list: AdamW for all weights; or Muon for the matrices inside the blocks and AdamW for the rest. The
    tables of adaLN are AdamW's, since their input is one vector a sample. dtype: of Muon's iteration."""
    inside, rest = {1: [], 2: [], 3: []}, []  # inside: {parts: weights}
    for name, p in model.named_parameters():
        in_blocks = ("blocks." in name or "coder." in name) and "modulation" not in name
        matrix = p.ndim >= 2 and min(p.shape[:2]) >= 48
        if p.requires_grad and optimizer == "muon" and in_blocks and matrix:
            inside[3 if "qkv" in name else 2 if ".kv." in name else 1].append(p)
        elif p.requires_grad:
            rest.append(p)
    adamw = AdamW(rest, lr, betas=(0.9, beta2), weight_decay=weight_decay, fused=True)
    groups = [dict(params=params, parts=parts) for parts, params in inside.items() if params]
    return [Muon(groups, lr, weight_decay=weight_decay, dtype=dtype), adamw] if groups else [adamw]


def learning_rate(step, steps, warmup, cooldown):
    """The share of the full rate at a step: it rises over `warmup` steps, stays, and falls to 0 over the last
    share `cooldown` of the run."""
    left = (steps - step) / max(1, cooldown * steps)
    return min(1.0, (step + 1) / (warmup + 1), left)


def clip_and_step(optimizer, lr, norm, max_norm):
    """A step of an optimizer, with a gradient that is longer than max_norm (0: any) shortened to it. A
    gradient that is not finite changes nothing. norm: a tensor; the device decides by it, and nothing waits.
    AdamW's fused kernel reads grad_scale and found_inf, made for torch.amp; Muon above does likewise."""
    for group in optimizer.param_groups:
        group["lr"] = lr
    optimizer.grad_scale = (norm / (max_norm or math.inf)).clamp(min=1)
    optimizer.found_inf = 1 - norm.isfinite().float()
    optimizer.step()


@torch.no_grad()
def update_ema(ema, weights, decay, step):
    """ema ← decay · ema + (1 - decay) · weights. Early steps decay faster: a short run must not average its
    first noise. From the 100th on, every fourth step counts for four: on a GPU the average costs what it
    reads."""
    every = 1 if step < 100 else 4
    if step % every == every - 1:
        decay = min(decay, (1 + step) / (10 + step)) ** every
        torch._foreach_lerp_([*map(local, ema.values())], [*map(local, weights.values())], 1 - decay)
