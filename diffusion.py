"""Diffusion: how noise is added, what the network is asked for, how samplers take the noise out, and
guidance. It takes any callable as model and knows no network.

    forward    x_t = α_t x_0 + σ_t ε,    α_t = sqrt(ᾱ_t),  σ_t = sqrt(1 - ᾱ_t)   (Ho et al. 2020, equation 4)
    target     noise ε;  velocity v = α_t ε - σ_t x_0 (Salimans & Ho 2022);  or x_0
    loss       the mean squared error between output and target
    guidance   classifier-free (Ho & Salimans 2022) and motion-free (the paper, section 3.3)

The paper trains on the noise target with DiT's linear schedule. Ours, for the demo: the cosine schedule, the
velocity target and the timestep shift, with which a short training on small latents learns faster.

A timestep t is an integer in 0…steps-1; 0 has the least noise. Everything holds for pictures x (B, C, h, w)
and for clips (B, F, C, h, w). Timesteps are (B,); the frames of a clip may have one each: (B, F).

Letters: B batch, F frames, C latent channels, x noisy latent, t timestep, s the next timestep of a sampler.
"""
import math

import torch


def gaussian(shape, generators):
    """Unit Gaussian noise (B, *shape), each sample from a generator of its own."""
    return torch.stack([torch.randn(shape, generator=generator) for generator in generators])


def split_channels(output, x):
    """A network's output → C channels, as many as x has, and the others, those of a learned variance."""
    C = x.shape[-3]
    return output[..., :C, :, :], output[..., C:, :, :]


def expand(values, x):
    """values (B,) or (B, F) → with dimensions of 1 appended until there are as many as x has."""
    return values.view(*values.shape, *[1] * (x.ndim - values.ndim))


class Diffusion:
    """The noise schedule and the target.

    schedule: "linear" (β from 1e-4 to 0.02 over 1000 steps) or "cosine" (Nichol & Dhariwal 2021, equation
    17). target: "noise", "velocity" or "x0". learned_variance: the output has 2C channels (see the end of
    this file). shift: above 1, training and sampling spend more of their timesteps at high noise: u → k u /
    (1 + (k-1) u) with u = t / steps (Esser et al. 2024, equation 23). spacing: "trailing" or "even", as in
    `timesteps`. ValueError for an unknown schedule, target or spacing.
    """

    def __init__(
        self, schedule="cosine", target="velocity", learned_variance=False, shift=1.0, steps=1000,
        spacing="trailing",
    ):
        if schedule == "linear":
            beta = torch.linspace(1e-4 * 1000 / steps, 0.02 * 1000 / steps, steps, dtype=torch.float64)
        elif schedule == "cosine":
            u = torch.arange(steps + 1, dtype=torch.float64) / steps
            f = torch.cos((u + 0.008) / 1.008 * math.pi / 2) ** 2
            beta = (1 - f[1:] / f[:-1]).clamp(max=0.999)
        else:
            raise ValueError(f"schedule {schedule!r} is not one of linear, cosine")
        if target not in ("noise", "velocity", "x0"):
            raise ValueError(f"target {target!r} is not one of noise, velocity, x0")
        if spacing not in ("trailing", "even"):
            raise ValueError(f"spacing {spacing!r} is not one of trailing, even")
        self.target = target
        self.learned_variance = learned_variance
        self.shift = shift
        self.steps = steps
        self.spacing = spacing
        self.alpha_bar = (1 - beta).cumprod(0)  # (steps,) float64
        self.tables = {}  # ᾱ on each device: no step waits for a copy

    def alpha_bar_at(self, t, x):
        """ᾱ of timesteps t (B,) or (B, F), of which -1 is the clean latent, with as many dimensions as x. In
        float64; on Apple's GPUs, which have none, in float32."""
        if t.device not in self.tables:
            dtype = torch.float32 if t.device.type == "mps" else torch.float64
            table = torch.cat([self.alpha_bar, torch.ones(1)])  # index -1: clean
            self.tables[t.device] = table.to(t.device, dtype)
        return expand(self.tables[t.device][t], x)

    def alpha_sigma(self, t, x):
        """α_t and σ_t of timesteps t (B,) or (B, F), with as many dimensions as x, in its dtype."""
        alpha_bar = self.alpha_bar_at(t, x)
        return alpha_bar.sqrt().to(x.dtype), (1 - alpha_bar).sqrt().to(x.dtype)

    def add_noise(self, x0, noise, t):
        """x_t of the forward process; x0 and noise (B, C, h, w), t (B,) → (B, C, h, w)."""
        alpha, sigma = self.alpha_sigma(t, x0)
        return alpha * x0 + sigma * noise

    def target_of(self, x0, noise, t):
        """What the network should output, (B, C, h, w)."""
        alpha, sigma = self.alpha_sigma(t, x0)
        if self.target == "noise":
            return noise
        if self.target == "velocity":
            return alpha * noise - sigma * x0
        return x0

    def x0_and_noise(self, x, output, t):
        """The x_0 and ε that a network's output (B, C, h, w) implies at x_t = x."""
        alpha, sigma = self.alpha_sigma(t, x)
        if self.target == "noise":
            return (x - sigma * output) / alpha, output
        if self.target == "velocity":
            return alpha * x - sigma * output, sigma * x + alpha * output
        return output, (x - alpha * output) / sigma

    def loss(self, model, x0, t, noise):
        """The loss of each sample (B,): model(x, t) against the target. x0 and noise (B, C, h, w), t (B,)."""
        x = self.add_noise(x0, noise, t)
        prediction, extra = split_channels(model(x, t), x)
        error = prediction - self.target_of(x0, noise, t)
        loss = error.square().flatten(1).mean(1)  # (B,)
        if self.learned_variance:
            loss = loss + variance_loss(self, x0, x, prediction.detach(), extra, t)
        return loss

    def shifted(self, u):
        """The shift: shares u of the timesteps, 0…1 → 0…1."""
        return self.shift * u / (1 + (self.shift - 1) * u)

    def random_timesteps(self, shape, generator=None):
        """Timesteps of a shape, such as (B,), uniform before the shift."""
        u = self.shifted(torch.rand(shape, generator=generator))
        return (u * self.steps).long().clamp(max=self.steps - 1)

    def timesteps(self, count):
        """`count` timesteps for a sampler, falling from steps-1; fewer, where the shift brings some together.
        Before the shift they are evenly spaced: "trailing" (Lin et al. 2023) ends one stride before the clean
        latent; "even" ends at 0, so that the last step is as short as can be (as in improved-diffusion and
        DiT). ValueError unless 1 ≤ count ≤ steps."""
        if not 1 <= count <= self.steps:
            raise ValueError(f"{count} sampling steps asked for, 1 to {self.steps} are possible")
        if self.spacing == "even":
            u = torch.linspace(1, 0, count, dtype=torch.float64)
            times = (self.shifted(u) * (self.steps - 1)).round()
        else:
            u = torch.arange(count, 0, -1, dtype=torch.float64) / count
            times = (self.shifted(u) * self.steps).round() - 1
        times = times.long().clamp(min=0).tolist()
        return list(dict.fromkeys(times))  # without repetitions


# ---------------------------------------------------------------------------------------------- samplers
# One signature: sampler(model, diffusion, x, steps, generators). x (B, C, h, w) is pure noise, the result is
# x_0. model(x, t), already guided, gives the network's output. generators, one a sample, serve samplers that
# add noise.


def predict(model, diffusion, x, t):
    """Calls the model at a timestep t, a number. Returns x_0, ε, and the channels of a learned variance."""
    t = torch.full((len(x),), t, device=x.device)  # (B,)
    prediction, extra = split_channels(model(x, t), x)
    x0, noise = diffusion.x0_and_noise(x, prediction, t)
    return x0, noise, extra


def ddpm(model, diffusion, x, steps, generators):
    """Ancestral sampling (Ho et al. 2020, algorithm 2), on any number of steps:

        x_s = mean of q(x_s | x_t, x_0) + sqrt(variance) · noise

    The variance is the lower bound β̃, or the learned one, of the chain of the steps taken (Nichol & Dhariwal
    2021, section 4). The predicted x_0 is not clipped, for latents have no bounds. The last step adds no
    noise."""
    times = diffusion.timesteps(steps)
    for t, s in zip(times, times[1:] + [-1]):
        x0, _, extra = predict(model, diffusion, x, t)
        now, then = (torch.full((1,), step, device=x.device) for step in (t, s))
        mean, low, high = reverse_step(diffusion, x0, x, now, then)
        if s < 0:
            return mean
        log_variance = interpolated(low, high, extra) if diffusion.learned_variance else low
        x = mean + (0.5 * log_variance).exp() * gaussian(x.shape[1:], generators).to(x)


def ddim(model, diffusion, x, steps, generators=None):
    """The deterministic sampler of Song et al. 2020 (arXiv 2010.02502), equation 12 with σ = 0: the predicted
    x_0 and ε give x_s by the forward process."""
    times = diffusion.timesteps(steps)
    for t, s in zip(times, times[1:] + [-1]):
        x0, noise, _ = predict(model, diffusion, x, t)
        if s < 0:
            return x0
        x = diffusion.add_noise(x0, noise, torch.full((1,), s, device=x.device))


def alpha_sigma_lambda(diffusion, t):
    """α, σ and λ = log(α / σ) of a timestep t, as numbers."""
    alpha_bar = diffusion.alpha_bar[t].item()
    alpha, sigma = math.sqrt(alpha_bar), math.sqrt(1 - alpha_bar)
    return alpha, sigma, math.log(alpha / sigma)


def dpm_solver(model, diffusion, x, steps, generators=None):
    """DPM-Solver++(2M) (Lu et al. 2022, arXiv 2211.01095, algorithm 2): second order, with one call a step.

        x_s = σ_s/σ_t · x_t - α_s (e^-h - 1) · D,    h = λ_s - λ_t
        D = x_0 + h / (2 h_before) · (x_0 - x_0 before), where h_before is h of the step before; at first D =
        x_0

    In λ = log(α/σ) the solution is an integral over the predicted x_0, which D extrapolates from the last two
    calls. The last step goes to σ = 0, where λ is infinite: it returns the predicted x_0."""
    times = diffusion.timesteps(steps)
    x0_before = lambda_before = None
    for t, s in zip(times, times[1:] + [-1]):
        x0, _, _ = predict(model, diffusion, x, t)
        if s < 0:
            return x0
        _, sigma_t, lambda_t = alpha_sigma_lambda(diffusion, t)
        alpha_s, sigma_s, lambda_s = alpha_sigma_lambda(diffusion, s)
        h = lambda_s - lambda_t
        D = x0
        if x0_before is not None:
            D = x0 + h / (2 * (lambda_t - lambda_before)) * (x0 - x0_before)
        x = sigma_s / sigma_t * x - alpha_s * math.expm1(-h) * D
        x0_before, lambda_before = x0, lambda_t


def dpm_sde(model, diffusion, x, steps, generators):
    """SDE-DPM-Solver++(2M) (the same paper): the same for the process that adds noise as it goes.

        x_s = σ_s/σ_t e^-h · x_t - α_s (e^-2h - 1) · D + σ_s sqrt(1 - e^-2h) · noise,    h and D as above

    An error of an early step, such as a thing begun in two places, is noised over. The demo's sampler."""
    times = diffusion.timesteps(steps)
    x0_before = lambda_before = None
    for t, s in zip(times, times[1:] + [-1]):
        x0, _, _ = predict(model, diffusion, x, t)
        if s < 0:
            return x0
        _, sigma_t, lambda_t = alpha_sigma_lambda(diffusion, t)
        alpha_s, sigma_s, lambda_s = alpha_sigma_lambda(diffusion, s)
        h = lambda_s - lambda_t
        D = x0
        if x0_before is not None:
            D = x0 + h / (2 * (lambda_t - lambda_before)) * (x0 - x0_before)
        noise = gaussian(x.shape[1:], generators).to(x)
        x = sigma_s / sigma_t * math.exp(-h) * x - alpha_s * math.expm1(-2 * h) * D
        x = x + sigma_s * math.sqrt(-math.expm1(-2 * h)) * noise
        x0_before, lambda_before = x0, lambda_t


SAMPLERS = {"ddpm": ddpm, "ddim": ddim, "dpm": dpm_solver, "sde": dpm_sde}


# ---------------------------------------------------------------------------------------------- guidance
# Each function wraps model(x, t, **condition) and returns a model(x, t) for the samplers. A condition is a
# dictionary of tensors with B rows, or of lists of such tensors. All C channels are guided; those of a
# learned variance are the conditional pass's.


def classifier_free_guidance(model, condition, null, scale, rescale=0.0, interval=(0.0, 1.0), steps=1000):
    """Guidance by text (Ho & Salimans 2022):

        out(∅) + λ_T (out(c) - out(∅))

    condition: c. null: ∅. scale: λ_T; 1 is the plain model, in one pass. rescale and interval as below."""

    def guided(x, t):
        if scale == 1 or outside(interval, t, steps):
            return model(x, t, **condition)
        with_text, without = passes(model, x, t, [condition, null])
        out, extra = split_channels(with_text, x)
        base, _ = split_channels(without, x)
        guided = base + scale * (out - base)
        return torch.cat([rescaled(guided, out, rescale), extra], dim=-3)

    return guided


def motion_free_guidance(
    model, condition, null_text, neither, text_scale, motion_scale, rescale=0.0, interval=(0.0, 1.0),
    steps=1000,
):
    """Guidance by text and by motion (paper, section 3.3):

        out(∅, ∅) + λ_T (out(c_T, c_M) - out(∅, c_M)) + λ_M (out(∅, c_M) - out(∅, ∅))

    condition: text c_T and motion c_M. null_text: the null text, and motion. neither: the null text, under
    the motion-free mask. text_scale: λ_T, motion_scale: λ_M. At λ_M = 1 the term out(∅, ∅) cancels: that is
    classifier-free guidance. rescale and interval as below."""
    if motion_scale == 1:
        return classifier_free_guidance(model, condition, null_text, text_scale, rescale, interval, steps)

    def guided(x, t):
        if outside(interval, t, steps):
            return model(x, t, **condition)
        both, motion, nothing = passes(model, x, t, [condition, null_text, neither])
        out, extra = split_channels(both, x)
        motion, _ = split_channels(motion, x)
        nothing, _ = split_channels(nothing, x)
        guided = nothing + text_scale * (out - motion) + motion_scale * (motion - nothing)
        return torch.cat([rescaled(guided, out, rescale), extra], dim=-3)

    return guided


def passes(model, x, t, conditions):
    """The model's output under each condition, computed as one batch."""
    K = len(conditions)
    together = {}
    for key in conditions[0]:
        values = [condition[key] for condition in conditions]
        if torch.is_tensor(values[0]):
            together[key] = torch.cat(values)
        else:  # a list with a tensor for each encoder
            together[key] = [torch.cat(tensors) for tensors in zip(*values)]
    return model(torch.cat([x] * K), torch.cat([t] * K), **together).chunk(K)


def outside(interval, t, steps):
    """Whether timesteps t (B,), all alike, lie outside of the interval in which to guide, given in shares of
    all timesteps, 0 = clean, 1 = noise (Kynkäänniemi et al. 2024)."""
    return interval != (0.0, 1.0) and not interval[0] <= t[0].item() / steps <= interval[1]


def rescaled(guided, plain, share):
    """The guided output with its standard deviation pulled back to the plain one's by a share, 0…1 (Lin et
    al. 2023, equations 15 and 16)."""
    if not share:
        return guided
    ratio = plain.flatten(1).std(1) / guided.flatten(1).std(1)  # (B,)
    return guided * expand(1 + share * (ratio - 1), guided)


# ----------------------------------------------------------- learned variance: skip this on a first reading
# The network has C more channels: where the log-variance of a reverse step lies between its two bounds,
# log β̃ and log β (Nichol & Dhariwal 2021, equation 15).


def reverse_step(diffusion, x0, x, t, s):
    """q(x_s | x_t, x_0) for s < t: its mean (B, C, h, w) and the two bounds of its log-variance, log β̃ and
    log β (Ho et al. 2020, equations 6 and 7). t and s (B,) or (B, F); s = -1 is the clean latent."""
    now, then = diffusion.alpha_bar_at(t, x), diffusion.alpha_bar_at(s, x)
    beta = 1 - now / then
    of_x0 = (then.sqrt() * beta / (1 - now)).to(x)
    of_x = ((1 - beta).sqrt() * (1 - then) / (1 - now)).to(x)
    low = (beta * (1 - then) / (1 - now)).clamp(min=1e-20).log().to(x)
    return of_x0 * x0 + of_x * x, low, beta.log().to(x)


def interpolated(low, high, extra):
    """The learned log-variance: extra = -1 is the lower bound, 1 the upper one."""
    return low + (extra + 1) / 2 * (high - low)


def variance_loss(diffusion, x0, x, prediction, extra, t):
    """What teaches the variance, (B,): the KL divergence between the true and the modelled reverse step, in
    bits a dimension; at t = 0, where the true one has no variance, the negative log-likelihood of x_0. Its
    weight is steps / 1000. No gradient reaches the mean (Nichol & Dhariwal 2021, section 3.1)."""
    mean, low, high = reverse_step(diffusion, x0, x, t, t - 1)
    predicted_x0, _ = diffusion.x0_and_noise(x, prediction, t)
    model_mean, _, _ = reverse_step(diffusion, predicted_x0, x, t, t - 1)
    first = expand(t == 0, x)
    # ours: at t = 0 the variance is the upper bound, not the learned one (DiT's: a likelihood of 256 values)
    log_variance = torch.where(first, high, interpolated(low, high, extra))
    square = (mean - model_mean).square()
    kl = 0.5 * (log_variance - low - 1 + (low - log_variance).exp() + square * (-log_variance).exp())
    error = (x0 - model_mean).square() * (-log_variance).exp()
    likelihood = 0.5 * (math.log(2 * math.pi) + log_variance + error)
    bits = torch.where(first, likelihood, kl).flatten(1).mean(1) / math.log(2)  # (B,)
    return diffusion.steps / 1000 * bits
