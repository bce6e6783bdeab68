"""A step of an optimizer: clipping and skipping on the device, matrices that lie in one weight, the average."""
import pytest
import torch

from training.optimizers import Muon, clip_and_step, make_optimizers, update_ema


def network():
    torch.manual_seed(3)
    model = torch.nn.Module()
    model.blocks = torch.nn.ModuleList(torch.nn.ModuleDict(dict(qkv=torch.nn.Linear(64, 192), mlp=torch.nn.Linear(64, 64))) for _ in range(2))
    model.end = torch.nn.Linear(64, 3)
    return model


def gradients(model, step, factor=1.0):
    generator = torch.Generator().manual_seed(step)
    for p in model.parameters():
        p.grad = factor * torch.randn(p.shape, generator=generator)


@pytest.mark.parametrize("kind", ["muon", "adamw"])
@pytest.mark.parametrize("max_norm", [0.0, 1.0, 1e6])
def test_clipping_and_skipping_are_torchs_clipping_and_no_step(kind, max_norm):
    """With torch's clip_grad_norm_ and a plain step; where the gradient is not finite, without a step: nothing changes, to
    the bit, in weights and states."""
    models = network(), network()
    ours, theirs = (make_optimizers(model, kind, 1e-2, 0.99, 0.1, torch.float32) for model in models)
    for step, factor in enumerate((1.0, 3.0, float("nan"), 0.5, float("inf"), 2.0)):
        for model in models:
            gradients(model, step, factor)
        before = [p.detach().clone() for p in models[0].parameters()]
        norm = torch.nn.utils.get_total_norm([p.grad for p in models[0].parameters()])
        for optimizer in ours:
            clip_and_step(optimizer, 1e-2, norm, max_norm)
        if torch.isfinite(norm):
            if max_norm:
                torch.nn.utils.clip_grad_norm_(models[1].parameters(), max_norm)
            for optimizer in theirs:
                optimizer.step()
        else:
            assert all(torch.equal(p, q) for p, q in zip(models[0].parameters(), before))
        for p, q in zip(models[0].parameters(), models[1].parameters()):
            torch.testing.assert_close(p, q, rtol=2e-5, atol=2e-6)
    for a, b in zip(ours, theirs):
        for (p, one), (q, other) in zip(a.state.items(), b.state.items()):
            for key in other:
                torch.testing.assert_close(one[key], other[key], rtol=2e-5, atol=2e-6)


def test_muon_sees_the_matrices_of_queries_keys_and_values_apart():
    whole, apart = network(), network()
    split = [[torch.nn.Parameter(part.clone()) for part in block["qkv"].weight.detach().chunk(3)] for block in apart.blocks]
    muon = make_optimizers(whole, "muon", 1e-2, 0.99, 0.0, torch.float32)[0]
    other = Muon([p for parts in split for p in parts], lr=1e-2)
    for step in range(3):
        gradients(whole, step)
        for block, parts in zip(whole.blocks, split):
            for p, gradient in zip(parts, block["qkv"].weight.grad.chunk(3)):
                p.grad = gradient
        muon.step()
        other.step()
    for block, parts in zip(whole.blocks, split):
        torch.testing.assert_close(block["qkv"].weight, torch.cat(parts), rtol=1e-5, atol=1e-6)


def test_an_average_of_every_fourth_step_is_that_of_every_step():
    """Up to what weights do within four steps. Before step 100 it is that of every step."""
    ema, every = {"w": torch.zeros(3)}, torch.zeros(3)
    for step in range(1000):
        weight = torch.tensor([1.0, step / 1000, torch.tensor(step / 200).sin()])
        update_ema(ema, {"w": weight}, 0.99, step)
        every.lerp_(weight, 1 - min(0.99, (1 + step) / (10 + step)))
        if step < 100 or step % 4 == 3:
            assert (ema["w"] - every).abs().max() < (1e-6 if step < 100 else 0.01)
