"""Diffusion: noise in, noise out, and the guidance in between. Takes any callable as model; knows no network.

    forward   x_t = α_t x_0 + σ_t ε,   α_t = sqrt(ᾱ_t), σ_t = sqrt(1 - ᾱ_t)          (Ho et al. 2020, equation 4)
    targets   noise ε;   velocity v = α_t ε - σ_t x_0 (Salimans & Ho 2022);   x_0 itself
    loss      mean squared error between the network's output and the target
    guidance  out(∅) + λ (out(c) - out(∅))                                          (Ho & Salimans 2022)

The paper trains on the noise target with DiT's linear schedule. The cosine schedule with the velocity target learns
faster on small latents and short budgets; the demo uses it. A timestep t is an integer in 0…steps-1; 0 is the least
noise. Letters: B batch, F frames, C channels, t (B,), x noisy latent (B, C, h, w), or (B, F, C, h, w) for clips: whatever is
said of pictures here holds for both. The frames of a clip may have timesteps of their own, t (B, F).
"""
import math

import torch


def channels(output, x):
    """A network's output, split into as many channels as x (…, C, h, w) has, and the rest (of a learned variance)."""
    C = x.shape[-3]
    return output[..., :C, :, :], output[..., C:, :, :]


def beside(values, x):
    """Values of timesteps, (B,) or (B, F), with as many dimensions as x has, to be multiplied with it."""
    return values.view(*values.shape, *[1] * (x.ndim - values.ndim))


def on(table, device):
    """A table in float64, on a device; in float32 where that has no float64 (Apple's)."""
    return table.float().to(device) if device.type == "mps" else table.to(device)


def gaussian(shape, generators):
    """Unit Gaussian noise (B, *shape), each sample's from a generator of its own."""
    return torch.stack([torch.randn(shape, generator=g) for g in generators])


class Diffusion:
    """The noise schedule, and what the network is asked for.

    schedule: "linear" (β from 1e-4 to 0.02 over 1000 steps) or "cosine" (Nichol & Dhariwal 2021, equation 17).
    target: "noise", "velocity" or "x0". learned_variance: the output has C more channels, the interpolation between
    the two bounds of the reverse variance (Nichol & Dhariwal, equation 15).
    shift: s > 1 moves timesteps, in training and sampling alike, to more noise: u → s u / (1 + (s-1) u) with u = t/steps
    (Esser et al. 2024, equation 23). spacing: of the timesteps in sampling, "trailing" or "even", as in `timesteps`.
    Raises ValueError for an unknown schedule, target or spacing.
    """

    def __init__(
        self, schedule="cosine", target="velocity", learned_variance=False, shift=1.0, steps=1000, spacing="trailing"
    ):
        if schedule == "linear":
            beta = torch.linspace(1e-4 * 1000 / steps, 0.02 * 1000 / steps, steps, dtype=torch.float64)
        elif schedule == "cosine":
            f = ((torch.arange(steps + 1, dtype=torch.float64) / steps + 0.008) / 1.008 * math.pi / 2).cos() ** 2
            beta = (1 - f[1:] / f[:-1]).clamp(max=0.999)
        else:
            raise ValueError(f"schedule {schedule!r} is not one of linear, cosine")
        if target not in ("noise", "velocity", "x0"):
            raise ValueError(f"target {target!r} is not one of noise, velocity, x0")
        if spacing not in ("trailing", "even"):
            raise ValueError(f"spacing {spacing!r} is not one of trailing, even")
        self.target, self.learned_variance, self.shift, self.steps = target, learned_variance, shift, steps
        self.spacing = spacing
        self.alpha_bar = (1 - beta).cumprod(0)  # (steps,) float64

    def alpha_sigma(self, t, like):
        """α_t and σ_t of timesteps t (B,), shaped (B, 1, 1, 1), or (B, F), shaped (B, F, 1, 1, 1), in the dtype and on the
        device of `like`."""
        alpha_bar = beside(on(self.alpha_bar, t.device)[t], like)
        return alpha_bar.sqrt().to(like), (1 - alpha_bar).sqrt().to(like)

    def add_noise(self, x0, noise, t):
        """x_t of the forward process: x0 and noise (B, C, h, w), t (B,) → (B, C, h, w)."""
        alpha, sigma = self.alpha_sigma(t, x0)
        return alpha * x0 + sigma * noise

    def target_of(self, x0, noise, t):
        """What the network should output, (B, C, h, w)."""
        alpha, sigma = self.alpha_sigma(t, x0)
        return {"noise": noise, "velocity": alpha * noise - sigma * x0, "x0": x0}[self.target]

    def x0_and_noise(self, x, output, t):
        """Both endpoints that a network's output (B, C, h, w) implies at x_t = x."""
        alpha, sigma = self.alpha_sigma(t, x)
        if self.target == "noise":
            return (x - sigma * output) / alpha, output
        if self.target == "velocity":
            return alpha * x - sigma * output, sigma * x + alpha * output
        return output, (x - alpha * output) / sigma

    def random_timesteps(self, shape, generator=None):
        """Integers of a shape, as (B,), uniform before the shift."""
        u = torch.rand(shape, generator=generator)
        u = self.shift * u / (1 + (self.shift - 1) * u)
        return (u * self.steps).long().clamp(max=self.steps - 1)

    def timesteps(self, count):
        """`count` timesteps for sampling (fewer, if the shift brings some together), falling from steps-1, evenly spaced
        before the shift. "trailing" (Lin et al. 2023) ends one stride before the clean latent; "even" ends at 0, so that
        the last step is the shortest there is (improved-diffusion and DiT). ValueError unless 1 ≤ count ≤ steps."""
        if not 1 <= count <= self.steps:
            raise ValueError(f"{count} sampling steps asked for, 1 to {self.steps} are possible")
        even = self.spacing == "even"
        if even:
            u = torch.linspace(1, 0, count, dtype=torch.float64)
        else:
            u = torch.arange(count, 0, -1, dtype=torch.float64) / count
        u = self.shift * u / (1 + (self.shift - 1) * u)
        times = (u * (self.steps - 1)).round() if even else (u * self.steps).round() - 1
        return list(dict.fromkeys(times.long().clamp(min=0).tolist()))

    def loss(self, model, x0, t, noise):
        """Per-sample loss (B,) of model(x, t) on clean latents x0 (B, C, h, w) with timesteps t (B,) and noise like x0.

        With learned variance the bound of the reverse step is added for the variance channels alone (Nichol & Dhariwal
        2021, section 3.1: weight 1/1000, times the number of steps; gradients do not reach the mean through it).
        """
        x = self.add_noise(x0, noise, t)
        output = model(x, t)
        prediction, extra = channels(output, x)
        loss = (prediction - self.target_of(x0, noise, t)).square().flatten(1).mean(1)  # (B,)
        if self.learned_variance:
            loss = loss + self.steps / 1000 * self.variance_bound(x0, x, prediction.detach(), extra, t)
        return loss

    def reverse_step(self, x0, x, t, s):
        """Mean (B, C, h, w) and the two bounds of the log-variance of q(x_s | x_t, x_0), s < t (Ho et al., equations 6
        and 7, for any pair of timesteps; s = -1 is the clean latent). The bounds are log β̃ and log β."""
        alpha_bar = on(torch.cat([self.alpha_bar, self.alpha_bar.new_ones(1)]), x.device)  # index -1 is the clean end
        now, then = (beside(alpha_bar[i], x) for i in (t, s))
        beta = 1 - now / then
        mean = (then.sqrt() * beta / (1 - now)).to(x) * x0 + ((1 - beta).sqrt() * (1 - then) / (1 - now)).to(x) * x
        low = (beta * (1 - then) / (1 - now)).clamp(min=1e-20)
        return mean, low.log().to(x), beta.log().to(x)

    def variance_bound(self, x0, x, prediction, extra, t):
        """KL between the true and the modelled reverse step, in bits a dimension, (B,); at t = 0, where the true one
        has no variance, its likelihood instead (a Gaussian's, since latents are continuous)."""
        mean, low, high = self.reverse_step(x0, x, t, t - 1)
        model_mean, *_ = self.reverse_step(self.x0_and_noise(x, prediction, t)[0], x, t, t - 1)
        log_variance = low + (extra + 1) / 2 * (high - low)
        square = (mean - model_mean).square()
        kl = 0.5 * (log_variance - low - 1 + (low - log_variance).exp() + square * (-log_variance).exp())
        likelihood = 0.5 * (math.log(2 * math.pi) + high + (x0 - model_mean).square() * (-high).exp()) + 0 * extra
        first = beside(t == 0, x)
        return torch.where(first, likelihood, kl).flatten(1).mean(1) / math.log(2)


# Samplers. One pattern: sampler(model, diffusion, x, steps, generators) with x (B, C, h, w) pure noise; returns x_0.
# model(x, t) gives the network's output; generators, one a sample, are used by the sampler that adds noise.


def _predict(model, diffusion, x, t):
    """Runs the model at one timestep for the whole batch → x_0, ε, and the extra channels of a learned variance."""
    t = torch.full((len(x),), t, device=x.device)
    output = model(x, t)
    prediction, extra = channels(output, x)
    return *diffusion.x0_and_noise(x, prediction, t), extra


def ddpm(model, diffusion, x, steps, generators):
    """Ancestral sampling (Ho et al. 2020, algorithm 2), on any number of steps; uses a learned variance if there is.

    The two bounds of the variance are those of the chain of the steps taken, not of all 1000 (Nichol & Dhariwal 2021,
    section 4). The predicted x_0 is not clipped: latents have no bounds, and DiT's sampling does not clip either. The
    last step adds no noise, so its variance, where log β̃ = -∞, is never used.
    """
    times = diffusion.timesteps(steps)
    for t, s in zip(times, times[1:] + [-1]):
        x0, _, extra = _predict(model, diffusion, x, t)
        mean, low, high = diffusion.reverse_step(x0, x, torch.tensor([t]), torch.tensor([s]))
        log_variance = low + (extra + 1) / 2 * (high - low) if diffusion.learned_variance else low
        noise = gaussian(x.shape[1:], generators).to(x)
        x = mean + (0.5 * log_variance).exp() * noise if s >= 0 else mean
    return x


def ddim(model, diffusion, x, steps, generators=None):
    """The deterministic sampler of Song et al. 2020 (arXiv 2010.02502), equation 12 with σ = 0."""
    times = diffusion.timesteps(steps)
    for t, s in zip(times, times[1:] + [-1]):
        x0, noise, _ = _predict(model, diffusion, x, t)
        x = diffusion.add_noise(x0, noise, torch.tensor([s], device=x.device)) if s >= 0 else x0
    return x


def dpm_solver(model, diffusion, x, steps, generators=None, stochastic=False):
    """DPM-Solver++(2M) (Lu et al. 2022, arXiv 2211.01095, algorithm 2): second order at one call a step.

    In λ = log(α/σ) the solution is an integral over the predicted x_0, which is extrapolated from the last two calls.
    The last step goes to σ = 0, where λ is infinite, and takes the predicted x_0 as it is. stochastic: see `dpm_sde`.
    """
    times, k = diffusion.timesteps(steps), 2 if stochastic else 1  # the noised process forgets x twice as fast: e^-2h, not e^-h
    before = lam_before = None
    for t, s in zip(times, times[1:] + [-1]):
        x0, _, _ = _predict(model, diffusion, x, t)
        if s < 0:
            return x0
        (alpha, sigma), (alpha_next, sigma_next) = (
            (a.sqrt().item(), (1 - a).sqrt().item()) for a in (diffusion.alpha_bar[t], diffusion.alpha_bar[s])
        )
        lam, lam_next = math.log(alpha / sigma), math.log(alpha_next / sigma_next)
        h = lam_next - lam
        estimate = x0
        if before is not None:
            estimate = x0 + 0.5 * h / (lam - lam_before) * (x0 - before)
        x = sigma_next / sigma * math.exp(h - k * h) * x - alpha_next * math.expm1(-k * h) * estimate
        if stochastic:
            x = x + sigma_next * (-math.expm1(-2 * h)) ** 0.5 * gaussian(x.shape[1:], generators).to(x)
        before, lam_before = x0, lam


def dpm_sde(model, diffusion, x, steps, generators):
    """SDE-DPM-Solver++(2M) (the same paper): the same for the reverse process that adds noise as it
    goes. An error in an early step, as a thing begun in two places, is noised over and mended; the other samplers keep it."""
    return dpm_solver(model, diffusion, x, steps, generators, stochastic=True)


SAMPLERS = {"ddpm": ddpm, "ddim": ddim, "dpm": dpm_solver, "sde": dpm_sde}


def guided(model, condition, null, scale, rescale=0.0, interval=(0.0, 1.0), steps=1000):
    """Classifier-free guidance around any model(x, t, **condition): returns a function of (x, t).

        out(∅) + λ_T (out(c) - out(∅))                                               (Ho & Salimans 2022)

    condition and null: dictionaries of tensors (or tuples of them) with B rows, for the two passes, which run as one batch. scale: λ_T;
    1 is the plain conditional model, in one pass. rescale φ: the guided output's standard deviation is pulled back to
    the conditional one's by this share (Lin et al. 2023, equations 15 and 16). interval: the share of the timesteps,
    0 = clean, 1 = noise, in which to guide (Kynkäänniemi et al. 2024); elsewhere one plain pass.
    All C channels are guided; channels beyond them (learned variance) are the conditional pass's.
    """
    return guided_motion(model, condition, null, null, scale, 1.0, rescale, interval, steps)


def _rows(values):
    """The rows of all, one after the other: tensors, or tuples of tensors."""
    return torch.cat(values) if torch.is_tensor(values[0]) else tuple(map(torch.cat, zip(*values)))


def guided_motion(model, condition, null_text, still, text_scale, motion_scale, rescale=0.0, interval=(0.0, 1.0), steps=1000):
    """Motion-free guidance (paper, section 3.3) around any model(x, t, **condition): returns a function of (x, t).

        out(∅, ∅) + λ_T (out(c_T, c_M) - out(∅, c_M)) + λ_M (out(∅, c_M) - out(∅, ∅))

    condition: text and motion; null_text: motion, but the null text; still: the null text under the motion-free mask.
    Passes whose weight is zero are left out: λ_M = 1 is classifier-free guidance in two passes. The rest as in `guided`.
    """
    weights = (text_scale, motion_scale - text_scale, 1 - motion_scale)
    passes = [(w, c) for w, c in zip(weights, (condition, null_text, still)) if w or c is condition]
    batched = {key: _rows([c[key] for _, c in passes]) for key in condition}

    def run(x, t):
        if len(passes) == 1 or interval != (0.0, 1.0) and not interval[0] <= t[0].item() / steps <= interval[1]:
            return model(x, t, **condition)
        outputs = model(torch.cat([x] * len(passes)), torch.cat([t] * len(passes)), **batched).chunk(len(passes))
        first, extra = channels(outputs[0], x)
        out = sum(w * channels(o, x)[0] for (w, _), o in zip(passes, outputs))
        if rescale:
            ratio = first.flatten(1).std(1) / out.flatten(1).std(1)
            out = out * (1 + rescale * (ratio - 1)).view(-1, *[1] * (x.ndim - 1))
        return torch.cat([out, extra], dim=-3)

    return run
