import itertools
import math

import pytest
import torch

from diffusion import SAMPLERS, Diffusion, classifier_free_guidance, ddim, dpm_solver, reverse_step, variance_loss

KINDS = [(s, p) for s in ("linear", "cosine") for p in ("noise", "velocity", "x0")]


def gaussian_model(diffusion, mean, covariance):
    """The exact network for data N(mean, covariance) in two dimensions, whatever the target: E[target | x_t]."""

    def model(x, t):
        alpha, sigma = diffusion.alpha_sigma(t, x)
        a, s = alpha[0].item(), sigma[0].item()
        total = a * a * covariance + s * s * torch.eye(2, dtype=x.dtype)
        offset = x.flatten(1) - a * mean
        noise = s * torch.linalg.solve(total, offset.T).T
        x0 = mean + a * torch.linalg.solve(total, offset.T).T @ covariance
        return diffusion.target_of(x0.view_as(x), noise.view_as(x), t)

    return model


MEAN = torch.tensor([0.5, -1.0], dtype=torch.float64)
COVARIANCE = torch.tensor([[1.0, 0.4], [0.4, 0.3]], dtype=torch.float64)


@pytest.mark.parametrize("schedule,target", KINDS)
def test_conversions_recover_both_endpoints(schedule, target):
    d = Diffusion(schedule, target)
    x0, noise = torch.randn(2, 5, 3, 4, 4, dtype=torch.float64)
    t = torch.tensor([1, 200, 500, 800, 950])
    x = d.add_noise(x0, noise, t)
    for got, true in zip(d.x0_and_noise(x, d.target_of(x0, noise, t), t), (x0, noise)):
        torch.testing.assert_close(got, true, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("schedule,target", KINDS)
def test_a_clip_whose_frames_have_timesteps_of_their_own_is_so_many_pictures(schedule, target):
    d = Diffusion(schedule, target, learned_variance=True)
    x0, noise = torch.randn(2, 3, 5, 2, 4, 4, dtype=torch.float64)
    t = torch.tensor([[0, 1, 200, 500, 999], [3, 0, 800, 7, 40], [950, 2, 5, 300, 600]])
    model = lambda x, t: torch.cat([x.sin(), x.cos()], dim=-3)
    clip = d.loss(model, x0, t, noise)
    pictures = d.loss(model, x0.flatten(0, 1), t.flatten(), noise.flatten(0, 1)).view(3, 5)
    torch.testing.assert_close(clip, pictures.mean(1))


def test_alpha_bar_is_the_product():
    d = Diffusion("linear")
    product = 1.0
    for i, beta in enumerate(torch.linspace(1e-4, 0.02, 1000, dtype=torch.float64).tolist()):
        product *= 1 - beta
        assert d.alpha_bar[i].item() == pytest.approx(product, rel=1e-10)
    cosine = Diffusion("cosine").alpha_bar
    f = lambda u: math.cos((u + 0.008) / 1.008 * math.pi / 2) ** 2
    assert cosine[499].item() == pytest.approx(f(0.5) / f(0), rel=1e-9)
    assert (cosine[-1] / cosine[-2]).item() == pytest.approx(1 - 0.999)  # where the formula would leave nothing of x_0


@pytest.mark.parametrize("schedule,target", KINDS)
@pytest.mark.parametrize("sampler", SAMPLERS)
def test_samplers_recover_x0_when_told_the_truth(schedule, target, sampler):
    """A model that knows x_0 leads every sampler to it."""
    d = Diffusion(schedule, target)
    x0 = torch.randn(2, 3, 4, 4, dtype=torch.float64)

    def model(x, t):
        alpha, sigma = d.alpha_sigma(t, x)
        return d.target_of(x0, (x - alpha * x0) / sigma, t)

    start = torch.randn(2, 3, 4, 4, dtype=torch.float64)
    out = SAMPLERS[sampler](model, d, start, 12, [torch.Generator().manual_seed(i) for i in range(2)])
    torch.testing.assert_close(out, x0, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("spacing", ["trailing", "even"])
@pytest.mark.parametrize("sampler", SAMPLERS)
def test_samplers_call_the_model_once_a_timestep_on_the_latents_device(sampler, spacing):
    """The meta device stands for a GPU: a tensor made on the CPU does not go with its own."""
    d, called = Diffusion(spacing=spacing), []

    def model(x, t):
        called.append(t)
        return x

    out = SAMPLERS[sampler](model, d, torch.empty(2, 3, 4, 4, device="meta"), 5, [torch.Generator() for _ in range(2)])
    assert out.device.type == "meta" and out.shape == (2, 3, 4, 4)
    assert len(called) == 5 and all(t.device.type == "meta" for t in called)


@pytest.mark.parametrize("sampler,steps", [("ddpm", 250), ("ddim", 100), ("dpm", 30), ("sde", 60)])
@pytest.mark.parametrize("schedule,target", [("cosine", "velocity"), ("linear", "noise")])
def test_gaussian_data_gets_its_mean_and_covariance(sampler, steps, schedule, target):
    """20,000 points, as 20 samples of 1,000 places each: a generator a point would take a minute."""
    d = Diffusion(schedule, target)
    point = gaussian_model(d, MEAN, COVARIANCE)

    def model(x, t):  # (20, 2, 1000, 1)
        out = point(x.movedim(1, -1).reshape(-1, 2, 1, 1), t.repeat_interleave(1000))  # (20000, 2, 1, 1)
        return out.view(20, 1000, 1, 2).movedim(-1, 1)

    x = torch.randn(20, 2, 1000, 1, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    generators = [torch.Generator().manual_seed(i) for i in range(len(x))]
    out = SAMPLERS[sampler](model, d, x, steps, generators).movedim(1, -1).reshape(-1, 2)
    torch.testing.assert_close(out.mean(0), MEAN, rtol=0, atol=0.03)
    torch.testing.assert_close(out.T.cov(), COVARIANCE, rtol=0, atol=0.04)


@pytest.mark.parametrize("sampler,steps", [("ddpm", 200), ("ddim", 100), ("dpm", 40), ("sde", 60)])
def test_mixture_of_two_gets_its_weights_and_moments(sampler, steps):
    """0.3 N(-2, 0.2²) + 0.7 N(1, 0.4²) in one dimension, with its closed-form posterior mean as model."""
    d = Diffusion("cosine", "x0")
    weight, mean, std = (torch.tensor(a, dtype=torch.float64) for a in ([0.3, 0.7], [-2.0, 1.0], [0.2, 0.4]))

    def model(x, t):
        alpha, sigma = d.alpha_sigma(t, x)
        variance = alpha**2 * std**2 + sigma**2  # (B, 1, 1, 2)
        log = weight.log() - 0.5 * variance.log() - 0.5 * (x - alpha * mean) ** 2 / variance
        posterior = mean + alpha * std**2 / variance * (x - alpha * mean)
        return (log.softmax(-1) * posterior).sum(-1, keepdim=True)

    x = torch.randn(10, 1, 1000, 1, dtype=torch.float64)
    out = SAMPLERS[sampler](model, d, x, steps, [torch.Generator().manual_seed(i) for i in range(len(x))]).flatten()
    left = out[out < -0.7]
    assert len(left) / len(out) == pytest.approx(0.3, abs=0.025)
    assert left.mean().item() == pytest.approx(-2, abs=0.03) and left.std().item() == pytest.approx(0.2, abs=0.03)
    right = out[out >= -0.7]
    assert right.mean().item() == pytest.approx(1, abs=0.03) and right.std().item() == pytest.approx(0.4, abs=0.03)


def test_dpm_solver_is_second_order_and_ddim_first():
    """Error against the exact flow of a Gaussian, on a fine schedule, down to the last timestep before the clean end."""
    d = Diffusion("linear", "noise", steps=64000)
    model = gaussian_model(d, MEAN, COVARIANCE)
    x = torch.randn(64, 2, 1, 1, dtype=torch.float64)

    def exact(x, s):  # x_s = mean + Σ_s^½ Σ_T^-½ (x_T - mean): covariances of all times share their eigenvectors
        ends = []
        for t in (d.steps - 1, s):
            a = d.alpha_bar[t].item()
            ends.append((a**0.5 * MEAN, a * COVARIANCE + (1 - a) * torch.eye(2, dtype=x.dtype)))
        (m1, c1), (m2, c2) = ends
        values, vectors = torch.linalg.eigh(COVARIANCE)
        ratio = ((c2 @ vectors).norm(dim=0) / (c1 @ vectors).norm(dim=0)).sqrt()
        return m2 + (x.flatten(1) - m1) @ vectors @ torch.diag(ratio) @ vectors.T

    def error(sampler, steps):
        states = []

        def watched(x, t):
            states.append((x, t[0].item()))
            return model(x, t)

        sampler(watched, d, x, steps)
        last = next((state, t) for state, t in states if t <= d.steps // 10)
        return (last[0].flatten(1) - exact(x, last[1])).abs().max().item()

    for sampler, order in ((dpm_solver, 2), (ddim, 1)):
        errors = [error(sampler, n) for n in (20, 40, 80, 160)]
        rates = [math.log2(a / b) for a, b in zip(errors, errors[1:])]
        assert abs(rates[-1] - order) < 0.25, (sampler.__name__, errors, rates)


def test_shift_moves_training_and_sampling_to_noise():
    plain, shifted = Diffusion(), Diffusion(shift=4.0)
    assert shifted.timesteps(10)[0] == 999 and sum(shifted.timesteps(10)) > sum(plain.timesteps(10))
    t = shifted.random_timesteps(20000, torch.Generator().manual_seed(0)).double() / 1000
    assert (t > 0.8).double().mean().item() == pytest.approx(0.5, abs=0.02)  # u = 1/2 goes to 4/5
    assert torch.equal(t, shifted.random_timesteps(20000, torch.Generator().manual_seed(0)).double() / 1000)
    drawn = plain.random_timesteps(20000, torch.Generator().manual_seed(0))
    assert drawn.min() == 0 and drawn.max() == 999 and drawn.double().mean().item() == pytest.approx(499.5, abs=7)
    # the ends, where rounding or a small shift would leave the schedule
    assert Diffusion(shift=1e8).random_timesteps(20000).max() == 999 and Diffusion(shift=0.1).timesteps(1000)[-1] == 0
    with pytest.raises(ValueError, match="0 sampling steps"):
        plain.timesteps(0)


@pytest.mark.parametrize("spacing", ["trailing", "even"])
def test_timesteps_that_a_shift_brings_together_are_taken_once(spacing):
    """Twice the same would make a step of no length, and a division by it."""
    diffusion = Diffusion(shift=6.0, spacing=spacing)
    times = diffusion.timesteps(300)
    assert 250 < len(times) < 300 and all(a > b for a, b in itertools.pairwise(times)) and times[0] == 999
    model = gaussian_model(diffusion, MEAN, COVARIANCE)
    for sampler in SAMPLERS.values():
        assert sampler(model, diffusion, torch.randn(3, 2, 1, 1).double(), 300, [torch.Generator() for _ in range(3)]).isfinite().all()


def toy(x, t, *, text, dropped):
    """A model with 2 channels predicted of 2 and 2 more for the variance; the text shifts it, dropped removes that."""
    shift = torch.where(dropped, 0.0, text)[:, None, None, None]
    return torch.cat([x * 0.5 + shift * x.cos(), x - shift], dim=1)


def conditions():
    text = torch.tensor([1.0, -2.0, 0.5])
    no, yes = torch.zeros(3, dtype=torch.bool), torch.ones(3, dtype=torch.bool)
    return dict(text=text, dropped=no), dict(text=text, dropped=yes)


def test_guidance_is_the_formula_on_every_channel():
    condition, null = conditions()
    x, t = torch.randn(3, 4, 2, 2), torch.full((3,), 500)
    out = classifier_free_guidance(toy, condition, null, 3.0)(x, t)
    c, u = toy(x, t, **condition), toy(x, t, **null)
    torch.testing.assert_close(out[:, :4], u[:, :4] + 3 * (c[:, :4] - u[:, :4]))
    torch.testing.assert_close(out[:, 4:], c[:, 4:])
    assert ((out - c)[:, :4].abs().amax((0, 2, 3)) > 0).all()


def test_guidance_of_a_condition_with_a_text_for_each_encoder():
    """Such a condition is a list of tensors; every pass gets its own rows of each."""
    model = lambda x, t, texts: x + (texts[0].sum(1) * texts[1].sum(1))[:, None, None, None]
    condition, null = (dict(texts=[torch.randn(3, 5), torch.randn(3, 7)]) for _ in range(2))
    x, t = torch.randn(3, 2, 2, 2), torch.full((3,), 500)
    out = classifier_free_guidance(model, condition, null, 3.0)(x, t)
    c, u = model(x, t, **condition), model(x, t, **null)
    torch.testing.assert_close(out, u + 3 * (c - u))


def test_guidance_one_and_outside_the_interval_is_the_conditional_model():
    condition, null = conditions()
    x, t = torch.randn(3, 4, 2, 2), torch.full((3,), 500)
    assert torch.equal(classifier_free_guidance(toy, condition, null, 1.0)(x, t), toy(x, t, **condition))
    assert torch.equal(classifier_free_guidance(toy, condition, null, 5.0, interval=(0.6, 1.0))(x, t), toy(x, t, **condition))
    assert not torch.equal(classifier_free_guidance(toy, condition, null, 5.0, interval=(0.4, 0.6))(x, t), toy(x, t, **condition))


def test_the_interval_has_both_its_ends():
    """In a batch of one, t = 500 of 1000."""
    text, dropped = torch.tensor([1.0]), torch.tensor([False])
    condition, null = dict(text=text, dropped=dropped), dict(text=text, dropped=~dropped)
    x, t = torch.randn(1, 4, 2, 2), torch.full((1,), 500)
    for interval, inside in (((0.5, 0.6), True), ((0.4, 0.5), True), ((0.501, 0.6), False), ((0.4, 0.499), False)):
        out = classifier_free_guidance(toy, condition, null, 5.0, interval=interval)(x, t)
        assert torch.equal(out, toy(x, t, **condition)) != inside


def test_full_rescale_gives_the_conditional_spread():
    condition, null = conditions()
    x, t = torch.randn(3, 4, 8, 8), torch.full((3,), 500)
    out = classifier_free_guidance(toy, condition, null, 6.0, rescale=1.0)(x, t)[:, :4].flatten(1).std(1)
    torch.testing.assert_close(out, toy(x, t, **condition)[:, :4].flatten(1).std(1))


def test_learned_variance_finds_the_true_reverse_variance():
    """For unit Gaussian data the variance of x_{t-1} given x_t is known, and lies between the two bounds: the loss's
    minimum over the variance channel must be there."""
    d = Diffusion("linear", "noise", learned_variance=True)
    t = 20
    now, then = d.alpha_bar[t].item(), d.alpha_bar[t - 1].item()
    beta = 1 - now / then
    true = math.log(beta)  # marginals are N(0, 1) at all times, so x_{t-1} | x_t has variance 1 - (1 - β)
    x0 = torch.randn(40000, 1, 1, 1, dtype=torch.float64)
    noise, times = torch.randn_like(x0), torch.full((len(x0),), t)
    x = d.add_noise(x0, noise, times)
    prediction = (1 - now) ** 0.5 * x  # E[ε | x_t]
    extra = torch.zeros((), dtype=torch.float64, requires_grad=True)
    optimizer = torch.optim.LBFGS([extra], line_search_fn="strong_wolfe", max_iter=50)

    def closure():
        optimizer.zero_grad()
        loss = variance_loss(d, x0, x, prediction, extra.expand_as(x0), times).mean()
        loss.backward()
        return loss

    optimizer.step(closure)
    _, low, high = reverse_step(d, x0[:1], x[:1], times[:1], times[:1] - 1)
    found = (low + (extra + 1) / 2 * (high - low)).item()
    assert found == pytest.approx(true, abs=0.01) and high.item() - low.item() > 0.01


def test_variance_loss_is_the_divergence_of_two_gaussians():
    """q(x_{t-1} | x_t, x_0) and p(x_{t-1} | x_t) by Ho et al. 2020, equations 7 and 11; their divergence by torch.distributions;
    at t = 0 the log-likelihood. In bits, and of 200 steps a fifth (equation 15 of Nichol & Dhariwal 2021 for the variance)."""
    d = Diffusion("linear", "noise", learned_variance=True, steps=200)
    beta = torch.linspace(5e-4, 0.1, 200, dtype=torch.float64)
    alpha, bar = 1 - beta, (1 - beta).cumprod(0)
    t = torch.tensor([0, 1, 2, 50, 199])
    x0, noise, predicted, extra = torch.randn(4, 5, 2, 3, 3, dtype=torch.float64)
    x = d.add_noise(x0, noise, t)
    found = variance_loss(d, x0, x, predicted, extra, t)
    for i, k in enumerate(t.tolist()):
        before = bar[k - 1] if k else torch.ones(())
        model_mean = (x[i] - beta[k] / (1 - bar[k]).sqrt() * predicted[i]) / alpha[k].sqrt()
        if k:
            true_mean = before.sqrt() * beta[k] / (1 - bar[k]) * x0[i] + alpha[k].sqrt() * (1 - before) / (1 - bar[k]) * x[i]
            variance = (1 - before) / (1 - bar[k]) * beta[k]
            share = (extra[i] + 1) / 2
            learned = beta[k] ** share * variance ** (1 - share)
            true = torch.distributions.Normal(true_mean, variance.sqrt())
            nats = torch.distributions.kl_divergence(true, torch.distributions.Normal(model_mean, learned.sqrt()))
        else:
            nats = -torch.distributions.Normal(model_mean, beta[0].sqrt()).log_prob(x0[i])
        torch.testing.assert_close(found[i], 0.2 * nats.mean() / math.log(2))


def test_learned_variance_leaves_the_mean_alone():
    d = Diffusion("linear", "noise", learned_variance=True)
    output = torch.randn(6, 4, 4, 4, requires_grad=True)
    x0, noise, t = torch.randn(6, 2, 4, 4), torch.randn(6, 2, 4, 4), torch.tensor([0, 1, 5, 100, 500, 999])
    loss = d.loss(lambda x, t: output, x0, t, noise)
    gradient = torch.autograd.grad(loss.sum(), output)[0]
    simple = 2 * (output[:, :2] - noise) / 32
    torch.testing.assert_close(gradient[:, :2], simple)
    assert loss.isfinite().all() and (gradient[1:, 2:].abs().amax((1, 2, 3)) > 0).all()


@pytest.mark.parametrize("wrong", [dict(schedule="quadratic"), dict(target="score")])
def test_unknown_names(wrong):
    with pytest.raises(ValueError, match="is not one of"):
        Diffusion(**wrong)


def test_at_the_first_timestep_the_variance_channels_have_no_gradient_and_none_that_is_not_a_number():
    """There the true reverse step has no variance, and log β̃ is -46: exp(log β̃ - log variance) would overflow."""
    d = Diffusion("linear", "noise", learned_variance=True)
    x0 = torch.randn(2, 1, 2, 2)
    extra = torch.full_like(x0, -5.0, requires_grad=True)
    model = lambda x, t: torch.cat([x, extra], dim=1)
    d.loss(model, x0, torch.tensor([0, 500]), torch.randn_like(x0)).sum().backward()
    assert extra.grad[0].eq(0).all() and extra.grad[1].ne(0).all() and extra.grad.isfinite().all()
