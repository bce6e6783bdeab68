"""The flags of train.py with their ranges, and the recipes: what a run does if it is told nothing.

The defaults of Flags are the laptop demo's. --recipe names another set of values for what is not given.
"""
from dataclasses import dataclass

from common.files import run_name
from common.flags import SEEDS, check, dashed, flag, read
from common.hardware import PRECISIONS, device_of


@dataclass
class Flags:
    recipe: str = flag(
        "", "demo, emoji, emoji-gpu or paper: values for what is not given; demo for size mini, else paper",
        choices=("", "demo", "emoji", "emoji-gpu", "paper"), group="data")
    data: str = flag("shapes", "shapes, a folder of captioned pictures, or one of tar shards")
    image_size: int = flag(64, "pixels each way, a multiple of 16", low=16)
    cache: str = flag("", "a folder of latents that `python -m data.latent_cache` made of --data")
    workers: int = flag(2, "processes that read tar shards ahead", low=0)
    clips: str = flag("shapes", "video: shapes, or a folder of captioned clips; pictures: see --data")
    frames: int = flag(8, "video: frames of a clip", low=2)
    fps: int = flag(4, "video: frames a second, taken from the clips of a folder", low=1)

    size: str = flag("mini", "the transformer: mini, S/2, B/2, L/2, XL/2 or G/2", group="model")
    integration: str = flag("cross", "how text enters", choices=("cross", "adaln"))
    clip: str = flag("", "the folder of a published CLIP, whose text tower reads the captions")
    t5: str = flag("", "the folder of a published T5 1.1 or Flan-T5; with --clip too, the blocks take turns")
    text_depth: int = flag(2, "blocks of the mini T5 that trains along if neither is given", low=1)
    autoencoder: str = flag("", "a run or published folder; runs/autoencoder-DATA if not given")
    latent_channels: int = flag(0, "of a new autoencoder; 0: 8", low=0, high=192)
    kl_weight: float = flag(1e-5, "autoencoder: of the KL term; less is sharper", low=0, high=1)
    qk_norm: bool = flag(True, "LayerNorm on queries and keys")
    init: str = flag("", "the image run to start from; video: runs/image-DATA if not given")
    only_temporal: bool = flag(False, "video: the image model's weights stay as they are")

    schedule: str = flag("cosine", "of the noise", choices=("cosine", "linear"), group="objective")
    target: str = flag("velocity", "what the network predicts", choices=("velocity", "noise", "x0"))
    learned_variance: bool = flag(False, "as DiT does")
    shift: float = flag(6.0, "above 1: more of the training at high noise", low=0.01, high=100)
    caption_dropout: float = flag(0.1, "share of the captions replaced by the null text", low=0, high=1)
    p_motion_free: float = flag(0.15, "video: share of pictures, under the mask", low=0, high=0.99)
    joint: bool = flag(True, "video: train on pictures too; false: on clips alone")
    motion_free_mask: bool = flag(True, "video: false: the pictures are still clips like any other")
    frame_curriculum: str = flag("80,80,600", "video, ours: steps that see 1, 2, 4 frames a clip")
    own_timesteps: float = flag(0.85, "video, ours: share with a timestep a frame", low=0, high=1)

    steps: int = flag(0, "0: the recipe's", low=0, group="optimizer")
    batch_size: int = flag(128, "samples a step, of all processes together", low=1)
    optimizer: str = flag("muon", "muon: in the blocks; AdamW for the rest", choices=("muon", "adamw"))
    lr: float = flag(3e-3, "the learning rate", low=0)
    beta2: float = flag(0.99, "AdamW's average of squared gradients decays by this", low=0, high=0.9999)
    warmup: int = flag(50, "steps of rising learning rate", low=0)
    cooldown: float = flag(0.6, "last share of the steps, of falling learning rate", low=0, high=1)
    weight_decay: float = flag(0.0, "AdamW's", low=0)
    max_norm: float = flag(1.0, "gradients longer than this are shortened to it; 0: none are", low=0)
    ema: float = flag(0.999, "decay of the averaged weights", low=0, high=1)
    accumulate: int = flag(1, "parts of a process's batch, one after the other: less memory", low=1)
    patience: int = flag(10, "steps in a row with a gradient that is not finite, before the run stops", low=1)

    out: str = flag("", "the run's folder; runs/STAGE-DATA if not given", group="run")
    seed: int = flag(0, "of data order, noise and starting values", low=0, high=SEEDS)
    resume: bool = flag(False, "go on from the last checkpoint in --out")
    overwrite: bool = flag(False, "delete the run that --out holds, and begin anew")
    log_every: int = flag(100, "steps", low=1)
    sample_every: int = flag(0, "steps between preview pictures; 0: four times a run; -1: none", low=-1)
    checkpoint_every: int = flag(500, "steps", low=1)
    keep: int = flag(2, "how many checkpoints are kept, the last ones", low=1)

    device: str = flag("auto", "auto, cpu, cuda, mps", group="hardware")
    precision: str = flag("auto", "of products; auto: bf16 where it is faster", choices=PRECISIONS)
    attention: str = flag("auto", "auto: fused on a GPU", choices=("auto", "fused", "written"))
    compile: bool = flag(False, "torch.compile each block: on a GPU 1.5 times as fast, after half a minute")
    checkpointing: bool = flag(False, "keep each block's input alone: less memory, 1/3 slower")
    shard: int = flag(0, "torchrun: neighbours that share one copy of the model; 0: all", low=0)
    dry_run: str = flag("", "GPUS[,TFLOPS[,UTILISATION]]: print what the run needs on so many GPUs, and stop")


# The paper's objective and optimizer (section 4); where it is silent, those of DiT's train.py: AdamW's betas
# 0.9 and 0.999, no clipping, learned variance, an EMA of 0.9999. Two things are ours. The EMA warms up
# (optimizers.update_ema): DiT's begins at the random weights and takes 10,000 steps to forget them. And the
# learned variance has a simpler loss at the first timestep (diffusion.variance_loss).
PAPER = dict(
    image_size=256, optimizer="adamw", lr=1e-4, beta2=0.999, max_norm=0.0, warmup=0, cooldown=0.0, ema=0.9999,
    schedule="linear", target="noise", learned_variance=True, shift=1.0, qk_norm=False, batch_size=256,
    steps=400_000, checkpoint_every=5000, frame_curriculum="0,0,0", own_timesteps=0.0,
)
# The demo's, where they differ from the defaults above.
DEMO = dict(
    autoencoder=dict(steps=1000, batch_size=16, lr=2e-3, cooldown=0.5),
    image=dict(steps=1100),
    video=dict(steps=1000, batch_size=16),
)
# Emoji (data/emoji.py) on a laptop. They have fine detail: the latent has twice the channels. And thousands
# of names must be learned. What a caption names is decided at high noise: a larger shift.
EMOJI = dict(
    autoencoder=dict(DEMO["autoencoder"], data="emoji", latent_channels=16, kl_weight=1e-6, steps=3000),
    image=dict(data="emoji", shift=8.0, steps=1800),
    video=dict(data="emoji", clips="emoji/clips", batch_size=16, steps=350, frame_curriculum="40,40,150"),
)
# Emoji on one GPU, 128 pixels each way, DiT's size B. --compile makes it faster still.
EMOJI_GPU = dict(
    autoencoder=dict(EMOJI["autoencoder"], image_size=128, batch_size=64),
    image=dict(
        data="emoji", image_size=128, size="B", shift=3.0, batch_size=512, steps=1200, lr=2e-3, warmup=100,
        cooldown=0.4,
    ),
    video=dict(EMOJI["video"], image_size=128, size="B", batch_size=64, steps=800, lr=1e-3),
)
RECIPES = {
    "demo": DEMO, "emoji": EMOJI, "emoji-gpu": EMOJI_GPU,
    "paper": {stage: values if stage == "autoencoder" else values | PAPER for stage, values in DEMO.items()},
}

# What a model that starts from another (--init) takes from it.
INHERITED = (
    "schedule", "target", "learned_variance", "shift", "integration", "qk_norm", "text_depth", "autoencoder",
    "latent_channels",
)
# Flags of one stage only.
OF_VIDEO = (
    "clips", "frames", "fps", "only_temporal", "p_motion_free", "joint", "motion_free_mask",
    "frame_curriculum", "own_timesteps",
)
OF_AUTOENCODER = (
    "recipe", "data", "image_size", "latent_channels", "kl_weight", "steps", "batch_size", "optimizer", "lr",
    "beta2", "warmup", "cooldown", "weight_decay", "max_norm", "ema", "accumulate", "patience", "out", "seed",
    "resume", "overwrite", "log_every", "sample_every", "checkpoint_every", "keep", "device", "precision",
)


def read_flags(stage, arguments, sizes):
    """Command line of a stage → Flags, with the recipe's values for what is not given. ValueError for a flag
    or value that makes no sense."""
    config, given, _ = read(Flags, arguments, f"python train.py {stage}", f"Trains the {stage} model.")
    config.size = config.size.removesuffix("/2")  # the papers' name of the patch
    if config.size not in sizes:
        raise ValueError(f"--size {config.size}: not one of {', '.join(sizes)}")
    config.recipe = config.recipe or ("demo" if config.size == "mini" else "paper")
    recipe = RECIPES[config.recipe][stage]
    for name, value in recipe.items():
        if name not in given:
            setattr(config, name, value)
    name = run_name(config.data)
    config.steps = config.steps or recipe["steps"]
    if stage == "autoencoder":
        config.latent_channels = config.latent_channels or 8
    config.out = config.out or f"runs/{stage}-{name}"
    config.autoencoder = config.autoencoder or f"runs/autoencoder-{name}"
    if stage == "video":
        config.init = config.init or f"runs/image-{name}"
    if config.sample_every == 0:
        config.sample_every = max(1, config.steps // 4)
    check_together(stage, config, given)
    for field in recipe:
        check(config, field)
    device_of(config.device)
    return config


def of_autoencoder(flags, sizes):
    """The flags of the autoencoder stage that the image stage with these flags runs first."""
    same = ["recipe", "data", "image_size", "seed", "device", "precision"]
    same += ["latent_channels"] * (flags.latent_channels > 0)  # 0: the recipe's
    words = [word for name in same for word in (f"--{dashed(name)}", str(getattr(flags, name)))]
    return read_flags("autoencoder", [*words, "--out", flags.autoencoder], sizes)


def check_together(stage, config, given):
    """ValueError for flags, of those that were given, that have no effect or do not go together."""
    if stage == "autoencoder":
        idle = given - set(OF_AUTOENCODER)
    elif stage == "image":
        idle = given & {*OF_VIDEO, "kl_weight"}
    else:
        idle = given & {"workers", "kl_weight"}
    for field in sorted(idle):
        raise ValueError(f"--{dashed(field)}: has no effect on the stage {stage}")
    for field in INHERITED if config.init else ():
        if field in given:
            raise ValueError(f"--{dashed(field)}: the run that --init names has its own, which stays")
    if config.resume and config.overwrite:
        raise ValueError("--resume goes on with a run, --overwrite deletes it: give one of them")
    if config.cache and "data" not in given:
        raise ValueError(f"--cache {config.cache}: name the pictures that it was made of too, by --data")
    if config.image_size % 16:
        raise ValueError(f"--image-size {config.image_size}: must be a multiple of 16")
    numbers(config, "frame_curriculum", 3)
    numbers(config, "dry_run", 1, 3)


def numbers(config, name, least, most=None):
    """The numbers of a flag like "100,100,800", a list. ValueError if they are none, or not so many."""
    text = getattr(config, name)
    try:
        found = [float(part) if "." in part else int(part) for part in text.split(",")] if text else []
    except ValueError:
        found = [-1]
    if text and not least <= len(found) <= (most or least) or any(number < 0 for number in found):
        count = f"{least} to {most}" if most else least
        raise ValueError(f"--{dashed(name)} {text}: must be {count} numbers with commas between")
    return found
