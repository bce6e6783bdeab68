"""Our samplers against diffusers' schedulers and against improved-diffusion's p_sample, written here in numpy: the same
settings, model and noise must give the same trajectory, from the first x to the picture."""
import pytest
import torch
from diffusers import DDIMScheduler, DDPMScheduler, DPMSolverMultistepScheduler
from oracles import p_sample_loop, space_timesteps

from diffusion import Diffusion, ddim, ddpm, dpm_sde, dpm_solver

SCHEDULES = {"linear": "linear", "cosine": "squaredcos_cap_v2"}
TARGETS = {"noise": "epsilon", "velocity": "v_prediction"}
BOTH = [("linear", "noise"), ("cosine", "velocity"), ("linear", "velocity"), ("cosine", "noise")]


def toy(x, t, learned=False):
    """A bounded network, different at every t and channel, that sees neighbours; with C more channels around -1…1."""
    wave = torch.sin(x * (1 + t.view(-1, 1, 1, 1) / 500) + torch.arange(x.shape[1]).view(1, -1, 1, 1))
    out = 0.6 * x.tanh() + 0.4 * wave.roll(1, -1)
    return torch.cat([out, 1.1 * torch.cos(3 * x + t.view(-1, 1, 1, 1) / 100)], 1) if learned else out


def seeds(count):
    return [torch.Generator().manual_seed(10 + i) for i in range(count)]


def our_trajectory(sampler, diffusion, x, steps, learned=False):
    """The timesteps at which the sampler called the model, and all it passed there, with what it returned at the end."""
    times, states = [], []

    def model(x, t):
        times.append(t[0].item())
        states.append(x)
        return toy(x, t, learned)

    states.append(sampler(model, diffusion, x, steps, seeds(len(x))))
    return times, states


def their_trajectory(scheduler, x, learned=False, **options):
    states = [x]
    for t in scheduler.timesteps:
        output = toy(x, t.expand(len(x)), learned)
        x = scheduler.step(output, t, x, **options).prev_sample
        states.append(x)
    return scheduler.timesteps.tolist(), states


def assert_same(ours, theirs, tolerance=1e-4):
    assert ours[0] == theirs[0]
    assert len(ours[1]) == len(theirs[1]) == len(ours[0]) + 1
    for a, b in zip(ours[1], theirs[1]):
        assert (a - b).abs().max() <= tolerance * b.abs().max()


def start():
    return torch.randn(3, 4, 4, 4)


def settings(schedule, target):
    return dict(beta_schedule=SCHEDULES[schedule], beta_start=1e-4, beta_end=0.02, prediction_type=TARGETS[target])


@pytest.mark.parametrize("schedule,target", BOTH)
@pytest.mark.parametrize("steps", [10, 50])
def test_ddim(schedule, target, steps):
    scheduler = DDIMScheduler(**settings(schedule, target), clip_sample=False, timestep_spacing="trailing")
    scheduler.set_timesteps(steps)
    x = start()
    assert_same(our_trajectory(ddim, Diffusion(schedule, target), x, steps), their_trajectory(scheduler, x, eta=0.0))


@pytest.mark.parametrize("schedule,target", BOTH)
@pytest.mark.parametrize("steps,spacing", [(8, "trailing"), (20, "trailing"), (20, "even")])
@pytest.mark.parametrize("sampler", [dpm_solver, dpm_sde])
def test_dpm_solver(schedule, target, steps, spacing, sampler):
    """The same noise too, where there is any. Second order at every step but the first, and the last to σ = 0, as diffusers' default final_sigmas_type has it. Under
    15 steps its lower_order_final says the same."""
    diffusion = Diffusion(schedule, target, spacing=spacing)
    scheduler = DPMSolverMultistepScheduler(
        **settings(schedule, target), algorithm_type="sde-dpmsolver++" if sampler is dpm_sde else "dpmsolver++", solver_order=2, solver_type="midpoint",
        timestep_spacing="trailing", final_sigmas_type="zero",
    )  # fmt: skip
    if spacing == "trailing":
        scheduler.set_timesteps(steps)
    else:
        scheduler.set_timesteps(timesteps=diffusion.timesteps(steps))
    x, generators = start(), seeds(3)
    states = [x]
    for t in scheduler.timesteps:
        noise = torch.stack([torch.randn(x.shape[1:], generator=g) for g in generators])
        states.append(scheduler.step(toy(states[-1], t.expand(3)), t, states[-1], variance_noise=noise).prev_sample)
    assert_same(our_trajectory(sampler, diffusion, x, steps), (scheduler.timesteps.tolist(), states))


@pytest.mark.parametrize("schedule,target", BOTH)
@pytest.mark.parametrize("steps,spacing,learned", [(250, "even", True), (250, "even", False), (40, "trailing", False)])
def test_ddpm(schedule, target, steps, spacing, learned):
    """With spacing "trailing" diffusers adds noise in the last step too, of the variance to which it clips log 0: 1e-20. With
    a learned variance that would be visible; DiT's spacing ends at 0, where neither adds any."""
    diffusion = Diffusion(schedule, target, learned, spacing=spacing)
    scheduler = DDPMScheduler(
        **settings(schedule, target), clip_sample=False, variance_type="learned_range" if learned else "fixed_small"
    )
    scheduler.alphas_cumprod = (1 - scheduler.betas.double()).cumprod(0)  # fp32 loses digits of small steps
    scheduler.set_timesteps(timesteps=diffusion.timesteps(steps))
    x = start()
    theirs = their_trajectory(scheduler, x, learned, generator=seeds(len(x)))
    assert_same(our_trajectory(ddpm, diffusion, x, steps, learned), theirs)


@pytest.mark.parametrize("count", [250, 50])
def test_ddpm_is_improved_diffusions(count):
    diffusion = Diffusion("linear", "noise", learned_variance=True, spacing="even")
    x = start().double()
    ours = our_trajectory(ddpm, diffusion, x, count, learned=True)
    assert_same(ours, p_sample_loop(lambda x, t: toy(x, t, True), x, count, seeds(len(x))), 1e-9)


def test_even_timesteps_are_improved_diffusions():
    """All even counts agree. Where an odd count's middle falls on one half, the sum there rounds by its own errors."""
    diffusion = Diffusion("linear", "noise", spacing="even")
    for count in range(2, 1001):
        ours, theirs = diffusion.timesteps(count)[::-1], space_timesteps(1000, count)
        assert len(set(ours)) == count and ours[0] == 0 and ours[-1] == 999
        assert ours == theirs or count % 2 and max(abs(a - b) for a, b in zip(ours, theirs)) == 1
    assert diffusion.timesteps(1) == [999]
    shifted = Diffusion(shift=4.0, spacing="even").timesteps(10)
    assert shifted[0] == 999 and shifted[-1] == 0 and sum(shifted) > sum(diffusion.timesteps(10))


def test_trailing_is_as_it_was():
    assert Diffusion().timesteps(4) == [999, 749, 499, 249] and Diffusion(shift=3.0).timesteps(3) == [999, 856, 599]
    with pytest.raises(ValueError, match="'leading' is not one of trailing, even"):
        Diffusion(spacing="leading")
