"""Training, stage by stage.

    python train.py autoencoder      pictures → latents and back
    python train.py image            captions → latents, with that autoencoder frozen
    python train.py video            the image model, given temporal layers, on clips and pictures together

A run leaves in its folder: model.safetensors (EMA weights and the whole config; what sample.py and evaluate.py read),
checkpoint.pt (to --resume), metrics.jsonl, loss.png and samples/. Every field of Config is a flag.
The loop that all stages share is loop.py.
"""
import dataclasses
import json
import sys
from dataclasses import dataclass
from pathlib import Path

import torch
from tqdm import tqdm

import attention
import autoencoder as autoencoders
import clips
import data
import dryrun
import pictures
import weights
from autoencoder import Autoencoder, AutoencoderConfig, check_scale, psnr
from dit import SIZES, ModelConfig
from loop import batch_indices, fit
from pipeline import NULL_TOKENS, POOLING, READERS, Pipeline, device_of, from_bytes, to_bytes, words_of
from sample import parse_flags
from temporal import inflate
from text_encoders import T5Config, Tokenizer


@dataclass
class Config:
    """The flags. The defaults are the laptop demo's; a size other than mini takes PAPER's values for what is not given."""

    size: str = "mini"  # or S/2, B/2, L/2, XL/2, G/2
    data: str = "shapes"  # or a folder of pictures with captions
    image_size: int = 64  # pixels, each way
    clips: str = "shapes"  # video: or a folder of clips with captions; the pictures are those of --data
    frames: int = 8
    fps: int = 4  # frames a second, of clips from a folder
    p_motion_free: float = 0.25  # share of a video batch that is pictures, repeated, under the motion-free mask
    joint: bool = True  # false: no pictures, clips only
    motion_free_mask: bool = True  # false: the pictures are still clips like any other
    one_frame: int = 100  # video: so many steps at first see the last frame of each clip alone
    two_frames: int = 100  # the next ones see two frames, one of each half
    four_frames: int = 800  # and then four
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
    sample_every: int = 0  # 0: four times a run
    checkpoint_every: int = 500
    resume: bool = False
    precision: str = "auto"  # fp32, bf16 (weights stay fp32), or auto: bf16 where this machine multiplies it faster
    attention: str = "auto"  # fused, written, or auto: written on a CPU
    checkpointing: bool = False  # keep only what goes into each block, and compute the rest again: less memory, a third slower
    device: str = "auto"
    dry_run: bool = False  # print parameters, FLOPs, memory and hours, and stop (dryrun.py)
    gpus: int = 8  # of a dry run
    tflops: float = 989.0  # of one, in bf16
    utilisation: float = 0.4  # share of that that a step reaches


# The paper's objective and optimizer (section 4; DiT's where it is silent).
PAPER = dict(
    image_size=256, optimizer="adamw", lr=1e-4, warmup=0, cooldown=0.0, ema=0.9999, schedule="linear", target="noise", shift=1.0, qk_norm=False,
    batch_size=256, steps=400_000, checkpoint_every=5000, log_every=100, one_frame=0, two_frames=0, four_frames=0,
)  # fmt: skip
STEPS = {"autoencoder": 1000, "image": 1700, "video": 1300}  # the demo's
VIDEO = dict(batch_size=16)
AUTOENCODER = dict(optimizer="muon", batch_size=16, lr=2e-3, cooldown=0.5)


CHOICES = dict(
    precision=("auto", "fp32", "bf16"),
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
    if config.frames < 2:
        raise ValueError(f"--frames {config.frames}: a clip has at least 2")
    for field in ("batch_size", "steps", "fps", "log_every", "sample_every", "checkpoint_every", "latent_channels", "text_depth", "gpus"):
        if getattr(config, field) < 1:
            raise ValueError(f"--{field.replace('_', '-')} {getattr(config, field)}: must be at least 1")
    device_of(config.device)
    return config


def report_skipped(dataset):
    """One line for every file that the data set could not use."""
    if dataset.skipped:
        print(f"{len(dataset.skipped)} of {len(dataset.skipped) + len(dataset.captions)} files were left out:")
        for path, reason in dataset.skipped[:20]:
            print(f"  {path}: {reason}")
        if len(dataset.skipped) > 20:
            print(f"  … and {len(dataset.skipped) - 20} more")


def train_autoencoder(config):
    dataset = data.load(config.data, config.image_size, config.seed)
    report_skipped(dataset)
    device = device_of(config.device)
    torch.manual_seed(config.seed)
    model = Autoencoder(AutoencoderConfig(config.latent_channels)).to(device)
    side = config.image_size // model.factor

    def batch(indices):
        return from_bytes(dataset.pictures(indices)).to(device)

    model.start_from(batch(batch_indices(0, len(dataset.captions), 512, config.seed)))

    check = data.load("shapes", config.image_size, config.seed + 1) if config.data == "shapes" else dataset
    check = from_bytes(check.pictures(range(min(256, len(check.captions))))).to(device)  # a folder's own pictures

    def batch_loss(step, generator):
        images = batch(batch_indices(step, len(dataset.captions), config.batch_size, config.seed))
        noise = torch.randn(len(images), config.latent_channels, side, side, generator=generator).to(device)
        return model.loss(images, noise), None

    def preview(step):
        with torch.no_grad():
            images = torch.stack([check[:8], model.decode(model.encode(check[:8]))]).flatten(0, 1)
        pictures.grid(to_bytes(images).cpu(), columns=8).save(f"{config.out}/samples/{step:06d}.png")

    def save(state):
        metadata = dict(config=json.dumps(describe(config, autoencoder=vars(model.config))))
        weights.write(f"{config.out}/model.safetensors", state, metadata)

    log = fit(config, model, batch_loss, preview, save)
    model.calibrate(batch(batch_indices(0, len(dataset.captions), 512, config.seed)))
    save(model.state_dict())
    check_scale(model.encode(check))
    quality = psnr(model, check)
    log(step=config.steps, psnr=quality)
    print(f"autoencoder: {quality:.1f} dB on {len(check)} {'fresh' if config.data == 'shapes' else 'of the'} pictures → {config.out}")


def describe(config, **parts):
    """What a checkpoint says of itself: the flags, and the arguments of each part."""
    return dict(flags=dataclasses.asdict(config), image_size=config.image_size, **parts)


def encode_all(autoencoder, count, read, size=256):
    """Latents (count, …, C, h, w) of all pictures or clips read(indices): the autoencoder is frozen, so once is enough."""
    device, found = autoencoder.shift.device, []
    for part in tqdm(torch.arange(count).split(size), desc="encoding", disable=None, leave=False):
        x = read(part)  # (size, [F,] 3, S, S)
        with torch.no_grad():
            latents = autoencoder.encode(from_bytes(x.flatten(0, -4)).to(device)).cpu()
        found.append(latents.view(*x.shape[:-3], *latents.shape[1:]))
    return torch.cat(found)


def text_of(config, captions):
    """Which text encoders a new model has → the parts of Pipeline's config that say so, the arguments of ModelConfig, and
    the tokenizer, if it is trained here."""
    published = {name: getattr(config, name) for name in READERS if getattr(config, name)}
    if published:
        parts = dict(text_widths=[READERS[name].read(folder).width for name, folder in published.items()])
        parts |= dict(null_tokens=[NULL_TOKENS[name] for name in published], pooling=[POOLING[name] for name in published])
        return dict(published=published), parts, None
    tokenizer = Tokenizer.train(captions)
    text = T5Config(vocabulary=len(tokenizer), depth=config.text_depth)
    return dict(text=vars(text)), dict(text_widths=[text.width]), tokenizer


def new_image_model(config, dataset):
    """A Pipeline by the flags, with its autoencoder, which is trained first if there is none."""
    kinds = "model.safetensors", "config.json"  # of a run, of a published folder
    if not any((Path(config.autoencoder) / kind).exists() for kind in kinds) and not config.resume:
        print(f"no autoencoder in {config.autoencoder} yet: training one first")
        flags = ["--data", config.data, "--image-size", str(config.image_size), "--out", config.autoencoder,
                 "--seed", str(config.seed), "--device", config.device]  # fmt: skip
        train_autoencoder(read_flags("autoencoder", flags))
    autoencoder = autoencoders.load(config.autoencoder)
    of_clips = clips.MovingShapes(count=500).captions if config.data == "shapes" else []  # train.py video has words too
    text, of_text, tokenizer = text_of(config, dataset.captions + of_clips)
    C = autoencoder.config.channels
    model = ModelConfig.of(
        config.size, channels=C, out_channels=C * (2 if config.learned_variance else 1), integration=config.integration,
        qk_norm=config.qk_norm, **of_text,
    )  # fmt: skip
    diffusion = dict(schedule=config.schedule, target=config.target, learned_variance=config.learned_variance, shift=config.shift)
    words = sorted({word for caption in dataset.captions for word in words_of(caption)})
    parts = dict(model=vars(model), autoencoder=vars(autoencoder.config), diffusion=diffusion, words=words, **text)
    torch.manual_seed(config.seed)
    model = Pipeline(describe(config, **parts), tokenizer)
    model.autoencoder.load_state_dict(autoencoder.state_dict())
    return model


def continued_image_model(config, dataset):
    """The model of the run that --init names, for other pictures or another size of them: a grid of positions is computed
    for whatever size there is."""
    start = Pipeline.load(config.init, clip=config.clip, t5=config.t5)
    if start.transformer.config.temporal:
        raise ValueError(f"--init {config.init}: is a video model")
    parts = {name: part for name, part in start.config.items() if name not in ("flags", "image_size", "words")}
    words = sorted({*start.config["words"], *(word for caption in dataset.captions for word in words_of(caption))})
    start.config = describe(config, words=words, **parts)
    return start.train()


def train_image(config):
    dataset = data.load(config.data, config.image_size, config.seed)
    report_skipped(dataset)
    model = (continued_image_model if config.init else new_image_model)(config, dataset).to(device_of(config.device))
    model.transformer.checkpointing = config.checkpointing

    latents = encode_all(model.autoencoder, len(dataset.captions), dataset.pictures)  # (N, C, h, w)
    check_scale(latents)

    def batch_loss(step, generator):
        indices = batch_indices(step, len(latents), config.batch_size, config.seed, dataset.group)
        captions = [dataset.captions[i] for i in indices]
        return diffusion_loss(config, model, latents[indices], captions, dataset.group, generator)

    prompts = dataset.captions[:16]

    def preview(step):
        pictures.grid(model.generate(prompts), prompts).save(f"{config.out}/samples/{step:06d}.png")

    fit(config, model, batch_loss, preview, lambda state: model.save(f"{config.out}/model.safetensors", state))
    print(f"image model → {config.out}. Now: python sample.py \"{prompts[0]}\"")


def diffusion_loss(config, model, x0, captions, group, generator, motion_free=None, numbers=None):
    """Losses (B,) of clean latents x0 (B, [F,] C, h, w) with their captions, and their timesteps' shares of all steps (B,).
    Each `group` neighbours have one timestep, and lose their captions together. motion_free, numbers: as in dit.py."""
    device, B = model.device, len(x0)
    once = lambda values: values.repeat_interleave(group)[:B].to(device)
    x0 = x0.to(device)
    tokens, masks = model.tokenize(captions)  # (B, L) an encoder
    t = once(model.diffusion.random_timesteps(B, generator))
    dropped = once(torch.rand(B, generator=generator) < config.caption_dropout)
    noise = torch.randn(x0.shape, generator=generator).to(device)
    loss = model.diffusion.loss(lambda x, t: model(x, t, tokens, masks, dropped, motion_free, numbers), x0, t, noise)
    return loss, (t / model.diffusion.steps).cpu()


def frames_at(step, config, generator):
    """The numbers (K,) of the frames that a step of video training sees: the last one, then two, four, and all. A clip as a
    whole shows which way it goes at all but the highest noise, and its words stay unused; of the last frame alone "moving
    left" says where the thing is, and the image model knows such words. (Ours, for a short training.)"""
    F = config.frames
    for K, steps in ((1, config.one_frame), (2, config.two_frames), (4, config.four_frames)):
        if step < steps and K <= F:  # one from each K-th of the clip
            return torch.tensor([F - 1]) if K == 1 else torch.arange(K) * F // K + torch.randint(F // K, (K,), generator=generator)
        step -= steps
    return torch.arange(F)


def train_video(config):
    """Joint image–video training (paper, section 3.3). With probability p_motion_free a sample is a picture, repeated
    F times under the motion-free mask, else a clip; captions are dropped independently of that, so that all that
    guidance asks for is trained: text and motion, motion alone, neither."""
    image = Pipeline.load(config.init, clip=config.clip, t5=config.t5)
    if image.config["image_size"] != config.image_size:
        raise ValueError(f"--image-size {config.image_size}: the image model in {config.init} has {image.config['image_size']}")
    films = clips.load(config.clips, config.image_size, config.frames, config.fps, config.seed)
    report_skipped(films)
    if films.held:
        print(f"{films.held} of {len(films.captions)} clips are shorter than {config.frames} frames: their last one is held")
    stills = data.load(config.data, config.image_size, config.seed)
    words = sorted({*image.config["words"], *(word for caption in films.captions for word in words_of(caption))})
    parts = {name: image.config[name] for name in ("text", "published", "autoencoder", "diffusion") if name in image.config}
    # mini's few frames stand further apart in the positions' sinusoids, as its tokens do
    changes = dict(temporal=True, frame_step=min(2.0, image.config["model"]["position_step"]))
    torch.manual_seed(config.seed)
    model = Pipeline(
        describe(config, model=image.config["model"] | changes, words=words, frames=config.frames, **parts), image.tokenizer
    )
    new = inflate(model, image.state_dict())
    print(f"{len(new)} new weights, the temporal layers': {new[0]} … {new[-1]}")
    if config.only_temporal:
        for name, p in model.named_parameters():
            p.requires_grad_(name in new)
    model.to(device_of(config.device))
    model.transformer.checkpointing = config.checkpointing
    moving = encode_all(model.autoencoder, len(films.captions), films.clips, 32)  # (N, F, C, h, w)
    still = encode_all(model.autoencoder, len(stills.captions), stills.pictures)  # (N, C, h, w)
    group = max(films.group, stills.group)

    def batch_loss(step, generator):
        numbers = frames_at(step, config, generator)  # (K,)
        count = config.batch_size * config.frames // len(numbers)  # as many frames in every step
        a = batch_indices(step, len(moving), count, config.seed, films.group)
        b = batch_indices(step, len(still), count, config.seed, stills.group)
        share = config.p_motion_free if config.joint else 0.0
        free = (torch.rand(len(a), generator=generator) < share).repeat_interleave(group)[: len(a)]  # (B,)
        repeated = still[b][:, None].expand(-1, len(numbers), -1, -1, -1)
        x0 = torch.where(free[:, None, None, None, None], repeated, moving[a][:, numbers])  # (B, K, C, h, w)
        captions = [stills.captions[j] if f else films.captions[i] for i, j, f in zip(a, b, free)]
        motion_free = free.to(model.device) if config.motion_free_mask and free.any() else None
        return diffusion_loss(config, model, x0, captions, group, generator, motion_free, numbers.to(model.device))

    prompts = films.captions[:8]

    def preview(step):
        pictures.sheet(model.generate(prompts), prompts).save(f"{config.out}/samples/{step:06d}.png")

    fit(config, model, batch_loss, preview, lambda state: model.save(f"{config.out}/model.safetensors", state))
    print(f"video model → {config.out}. Now: python sample.py --frames {config.frames} \"{prompts[0]}\"")


STAGES = {"autoencoder": train_autoencoder, "image": train_image, "video": train_video}


def main(arguments):
    if not arguments or arguments[0] not in STAGES:
        raise ValueError(f"say what to train: python train.py {'|'.join(STAGES)} [--flag value …]")
    config = read_flags(arguments[0], arguments[1:])
    if config.dry_run:
        if arguments[0] == "autoencoder":
            raise ValueError("--dry-run: of the stages image and video")
        print("\n".join(dryrun.report(arguments[0], config)))
        return
    attention.use(config.attention, device_of(config.device))
    STAGES[arguments[0]](config)


if __name__ == "__main__":
    try:
        main(sys.argv[1:])
    except (ValueError, OSError) as error:
        sys.exit(f"train.py: {error}")
