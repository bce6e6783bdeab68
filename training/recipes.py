"""What a run can be told, and what it does if it is told nothing: the flags of train.py, and the recipes.

Every field of Config is a flag: batch_size is --batch-size. The defaults are the laptop demo's.
"""
from dataclasses import dataclass
from pathlib import Path

from dit import SIZES
from common.hardware import PRECISIONS, device_of
from sample import parse_flags


@dataclass
class Config:
    """The flags. A size other than mini takes PAPER's values for what is not given."""

    size: str = "mini"  # or S/2, B/2, L/2, XL/2, G/2
    data: str = "shapes"  # or a folder of pictures with captions
    image_size: int = 64  # pixels, each way
    cache: str = ""  # a folder that `python data.py encode` made of --data
    workers: int = 2  # processes that read tar shards ahead
    clips: str = "shapes"  # video: or a folder of clips with captions; the pictures are those of --data
    frames: int = 8
    fps: int = 4  # frames a second, of clips from a folder
    p_motion_free: float = 0.15  # share of a video batch that is pictures, repeated, under the motion-free mask
    joint: bool = True  # false: no pictures, clips only
    motion_free_mask: bool = True  # false: the pictures are still clips like any other
    one_frame: int = 100  # video: so many steps at first see the last frame of each clip alone
    two_frames: int = 100  # the next ones see two frames, one of each half
    four_frames: int = 800  # and then four
    own_timesteps: float = 0.85  # share of the clips whose frames have timesteps of their own
    only_temporal: bool = False  # true: the image model's weights stay as they are
    init: str = ""  # the image run to start from: image: if any; video: runs/image-DATA if not given
    clip: str = ""  # the folder of a published CLIP whose text tower reads the captions
    t5: str = ""  # the folder of a published T5 1.1 or Flan-T5; with both, the blocks take turns; with none, a mini T5 learns
    integration: str = "cross"  # cross: text by cross-attention; adaln: pooled text alone
    out: str = ""  # the run's folder; runs/STAGE-DATA if not given
    autoencoder: str = ""  # its run, or a published folder; runs/autoencoder-DATA if not given, trained first if missing
    steps: int = 0  # 0: the recipe's
    batch_size: int = 128  # words of place are learned from large batches, hardly at all from 64
    optimizer: str = "muon"  # muon (for the matrices in the blocks, with AdamW for the rest) or adamw
    lr: float = 3e-3
    warmup: int = 50  # steps of rising learning rate
    cooldown: float = 0.4  # share of the steps, at the end, in which the learning rate falls to zero
    weight_decay: float = 0.0
    max_norm: float = 1.0  # of the gradient
    ema: float = 0.999
    schedule: str = "cosine"  # cosine or linear
    target: str = "velocity"  # velocity, noise or x0
    learned_variance: bool = False
    shift: float = 6.0  # above 1: more of the training at high noise
    qk_norm: bool = True
    caption_dropout: float = 0.1
    text_depth: int = 2  # blocks of the text encoder that trains along
    latent_channels: int = 8  # of a new autoencoder
    seed: int = 0
    log_every: int = 100
    sample_every: int = 0  # steps between pictures that show how far the model is; 0: four times a run; -1: none
    checkpoint_every: int = 500
    keep: int = 2  # the last checkpoints
    resume: bool = False
    patience: int = 10  # steps in a row with a gradient that is no number, before the run stops
    accumulate: int = 1  # parts of a process's batch, one after the other: less memory
    shard: int = 0  # under torchrun: how many neighbours share one copy of the model; 0: all; 1: none, each process has it whole
    precision: str = "auto"  # of products: fp32, bf16 (weights stay fp32), or auto: bf16 where this machine multiplies it faster
    attention: str = "auto"  # fused, written, or auto: written on a CPU
    compile: bool = False  # torch.compile each block: on a GPU 1.5 times as fast with a third less memory, after a minute's wait
    checkpointing: bool = False  # keep only what goes into each block, and compute the rest again: less memory, a third slower
    device: str = "auto"
    dry_run: bool = False  # print parameters, FLOPs, memory and hours, and stop (dryrun.py)
    gpus: int = 8  # of a dry run
    tflops: float = 989.0  # of one, in bf16
    utilisation: float = 0.4  # share of that that a step reaches


# The paper's objective and optimizer (section 4; DiT's where it is silent).
PAPER = dict(
    image_size=256, optimizer="adamw", lr=1e-4, warmup=0, cooldown=0.0, ema=0.9999, schedule="linear", target="noise", shift=1.0,
    qk_norm=False, batch_size=256, steps=400_000, checkpoint_every=5000, log_every=100, one_frame=0, two_frames=0, four_frames=0,
    own_timesteps=0.0,
)  # fmt: skip
STEPS = {"autoencoder": 1000, "image": 1200, "video": 1300}  # the demo's
VIDEO = dict(batch_size=16)
AUTOENCODER = dict(optimizer="muon", batch_size=16, lr=2e-3, cooldown=0.5)
# What a model that starts from another (--init) has from it.
INHERITED = ("schedule", "target", "learned_variance", "shift", "integration", "qk_norm", "text_depth", "latent_channels")
CHOICES = dict(
    precision=PRECISIONS,
    optimizer=("adamw", "muon"), schedule=("linear", "cosine"), target=("noise", "velocity", "x0"), integration=("cross", "adaln")
)  # fmt: skip


def read_flags(stage, arguments):
    """Command line → Config. ValueError for a flag or value that makes no sense."""
    given = Config()
    defaults = dict(vars(given))
    rest = parse_flags(given, arguments)
    given.size = given.size.removesuffix("/2")  # the papers' name of the patch
    if rest:
        raise ValueError(f"{rest[0]!r} is not a flag; flags look like --size mini")
    if given.size not in SIZES:
        raise ValueError(f"--size {given.size}: not one of {', '.join(SIZES)}")
    recipe = AUTOENCODER if stage == "autoencoder" else PAPER if given.size != "mini" else VIDEO if stage == "video" else {}
    named = {word[2:].partition("=")[0].replace("-", "_") for word in arguments if word.startswith("--")}
    config = Config(**defaults | recipe | {name: getattr(given, name) for name in named})
    if config.cache and "data" not in named:
        raise ValueError(f"--cache {config.cache}: name the pictures that it was made of too, by --data")
    for field in INHERITED if config.init or stage == "video" else ():
        if field in named:
            raise ValueError(f"--{field.replace('_', '-')}: the run that --init names has its own, which stays")
    name = Path(config.data).name or "data"
    config.steps = config.steps or STEPS[stage]
    config.out = config.out or f"runs/{stage}-{name}"
    config.autoencoder = config.autoencoder or f"runs/autoencoder-{name}"
    if stage == "video":
        config.init = config.init or f"runs/image-{name}"
    config.sample_every = config.sample_every or max(1, config.steps // 4)
    for field, choices in CHOICES.items():
        if getattr(config, field) not in choices:
            raise ValueError(f"--{field} {getattr(config, field)}: not one of {', '.join(choices)}")
    if config.image_size % 16 or config.image_size < 16:
        raise ValueError(f"--image-size {config.image_size}: must be a multiple of 16")
    if not 0 <= config.p_motion_free < 1:
        raise ValueError(f"--p-motion-free {config.p_motion_free}: must be at least 0 and less than 1")
    if not 0 <= config.own_timesteps <= 1:
        raise ValueError(f"--own-timesteps {config.own_timesteps}: must be from 0 to 1")
    if config.sample_every < -1:
        raise ValueError(f"--sample-every {config.sample_every}: must be at least -1")
    if config.shard < 0:
        raise ValueError(f"--shard {config.shard}: must be at least 0")
    if config.frames < 2:
        raise ValueError(f"--frames {config.frames}: a clip has at least 2")
    for field in ("batch_size", "steps", "fps", "log_every", "checkpoint_every", "latent_channels",
                  "text_depth", "gpus", "keep", "patience", "accumulate"):  # fmt: skip
        if getattr(config, field) < 1:
            raise ValueError(f"--{field.replace('_', '-')} {getattr(config, field)}: must be at least 1")
    device_of(config.device)
    return config
