"""What the demo adds to the paper's method. All of it is ours, for short trainings; the paper's recipe has
none of it.

- Frame curriculum (`frames_seen`): the first steps of video training see few frames of each clip.
- Own timesteps (`own_timesteps`): most clips have a noise level for each frame.
- Mirrored pairs (`in_groups`; the pairs are made in data/shapes.py and data/clips): neighbours in the data
  set that differ in one word share timestep and caption dropout, so that their difference is what that word
  says.
- The timestep shift, the cosine schedule and the velocity target (diffusion.py), QK-norm (attention.py) and
  Muon (training/optimizers.py) are others' findings that the paper does not use.
"""
import torch


def frames_seen(number, frames, curriculum, generator):
    """Which frames of a clip step `number` sees, (K,): the last frame alone, then two, then four, one from
    each K-th of the clip, then all. curriculum: for how many steps each of the first three lasts.

    From a whole noisy clip the model sees the direction, so it need not read the word. Of the last
    frame alone, "moving left" tells where the thing is, and the image model knows such words."""
    for K, steps in zip((1, 2, 4), curriculum):
        if number < steps and K <= frames:
            first = torch.arange(K + 1) * frames // K
            chosen = first[:-1] + (torch.rand(K, generator=generator) * first.diff()).long()
            return torch.tensor([frames - 1]) if K == 1 else chosen
        number -= steps
    return torch.arange(frames)


def own_timesteps(t, frames, share, diffusion, generator):
    """t (B,) → (B, F): in a share of the clips each frame has a timestep of its own (as in Chen et al. 2024,
    arXiv 2407.01392). Frames with little noise then tell the others where a thing is, which is what temporal
    attention is to pass on."""
    own = diffusion.random_timesteps((len(t), frames), generator)
    chosen = torch.rand(len(t), 1, generator=generator) < share
    return torch.where(chosen, own, t.unsqueeze(1))


def in_groups(values, group, rows):
    """Values of a global batch → those of `rows` in which each `group` neighbours have one value."""
    return values.repeat_interleave(group, dim=0)[rows]
