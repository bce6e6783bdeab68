"""Training, stage by stage.

    python train.py autoencoder      pictures → latents and back
    python train.py image            captions → latents, with that autoencoder frozen
    python train.py video            the image model, given temporal layers, on clips and pictures together

A run leaves in its folder: model.safetensors (EMA weights and the whole config; what sample.py and evaluate.py read),
checkpoints/ (to --resume), metrics.jsonl, loss.png and samples/. The flags and recipes are in recipes.py, the loop that all
stages share is loop.py; under torchrun many processes share the work (distributed.py).
"""
import dataclasses
import json
import os
import shutil
import sys
from pathlib import Path

import torch
from tqdm import tqdm

import attention
from encoders import autoencoder as autoencoders
from training import checkpoints
from data import clips
from data import folder as data
from training import distributed
from evaluation import dry_run as dryrun
from data import latent_cache as cached
from common import figures as pictures
from encoders import weights
from encoders.autoencoder import Autoencoder, AutoencoderConfig, check_scale, psnr
from diffusion import gaussian
from dit import SIZES, ModelConfig, initialise
from data.latent_cache import LatentCache
from common.hardware import DTYPES, device_of, precision_of, processor
from training.loop import Ahead, batch_indices, fit, generator_of, row_generators
from pipeline import NULL_TOKENS, POOLING, READERS, Pipeline, from_bytes, to_bytes, words_of
from training.recipes import read_flags
from data.tar_shards import TarShards
from temporal import inflate
from encoders.t5 import T5Config, Tokenizer


def report_skipped(dataset):
    """One line for every file that the data set could not use."""
    if dataset.skipped:
        print(f"{len(dataset.skipped)} of {len(dataset.skipped) + len(dataset)} files were left out:")
        for path, reason in dataset.skipped[:20]:
            print(f"  {path}: {reason}")
        if len(dataset.skipped) > 20:
            print(f"  … and {len(dataset.skipped) - 20} more")


def train_autoencoder(config):
    if distributed.world() > 1:
        raise ValueError("the autoencoder trains in one process: start this stage without torchrun")
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

    def read(step, rows):
        indices = batch_indices(step, len(dataset.captions), config.batch_size, config.seed)[rows]
        return indices.tolist(), batch(indices)

    def batch_loss(batch, step, rows, generator):
        noise = gaussian((config.latent_channels, side, side), row_generators(config.seed, step, rows))
        return model.loss(batch[1], noise.to(device)), None

    def preview():
        with torch.no_grad():
            images = torch.stack([check[:8], model.decode(model.encode(check[:8]))]).flatten(0, 1)
        return pictures.grid(to_bytes(images).cpu(), columns=8)

    def save(state, finished=False):
        metadata = dict(config=json.dumps(describe(config, autoencoder=vars(model.config), finished=finished)))
        weights.write(f"{config.out}/model.safetensors", state, metadata)

    log = fit(config, model, read, batch_loss, preview, save)
    model.calibrate(batch(batch_indices(0, len(dataset.captions), 512, config.seed)))
    save(model.state_dict(), finished=True)
    check_scale(model.encode(check))
    quality = psnr(model, check)
    log(step=config.steps, psnr=quality)
    print(f"autoencoder: {quality:.1f} dB on {len(check)} {'fresh' if config.data == 'shapes' else 'of the'} pictures → {config.out}")


def describe(config, **parts):
    """What a checkpoint says of itself: the flags, and the arguments of each part."""
    made_on = processor(device_of(config.device))
    return dict(flags=dataclasses.asdict(config), image_size=config.image_size, processor=made_on, **parts)


def encode_all(autoencoder, count, read, size=256):
    """Latents (count, …, C, h, w) of all pictures or clips read(indices): the autoencoder is frozen, so once is enough."""
    device, found = autoencoder.shift.device, []
    for part in tqdm(torch.arange(count).split(size), desc="encoding", disable=None if distributed.rank() == 0 else True, leave=False):
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


def some_captions(dataset, most):
    """Captions of a data set, at most so many; of tar shards from all over them."""
    if not isinstance(dataset, TarShards):
        return dataset.captions[:most]
    return [dataset.caption(i) for i in range(0, len(dataset), -(-len(dataset) // most))]


def new_image_model(config, dataset):
    """A Pipeline by the flags, with its autoencoder, which is trained first if there is none."""
    kinds = "model.safetensors", "config.json"  # of a run, of a published folder
    if not any((Path(config.autoencoder) / kind).exists() for kind in kinds):
        if config.resume or config.cache or distributed.world() > 1 or any(Path(config.data).glob("*.tar")):
            raise ValueError(f"--autoencoder {config.autoencoder}: neither a run nor a published folder")
        print(f"no autoencoder in {config.autoencoder} yet: training one first")
        flags = ["--data", config.data, "--image-size", str(config.image_size), "--out", config.autoencoder,
                 "--seed", str(config.seed), "--device", config.device, "--precision", config.precision,
                 "--latent-channels", str(config.latent_channels)]  # fmt: skip
        train_autoencoder(read_flags("autoencoder", flags))
    autoencoder = autoencoders.load(config.autoencoder)
    of_clips = clips.MovingShapes(count=500).captions if config.data == "shapes" else []  # train.py video has words too
    captions = some_captions(dataset, 100_000)
    text, of_text, tokenizer = text_of(config, captions + of_clips)
    C = autoencoder.config.channels
    model = ModelConfig.of(
        config.size, channels=C, out_channels=C * (2 if config.learned_variance else 1), integration=config.integration,
        qk_norm=config.qk_norm, **of_text,
    )  # fmt: skip
    diffusion = dict(schedule=config.schedule, target=config.target, learned_variance=config.learned_variance, shift=config.shift)
    words = sorted({word for caption in captions for word in words_of(caption)}) if len(captions) == len(dataset) else []
    parts = dict(model=vars(model), autoencoder=vars(autoencoder.config), diffusion=diffusion, words=words, **text)
    torch.manual_seed(config.seed)
    model = Pipeline(describe(config, **parts), tokenizer, empty=True)
    model.autoencoder.load_state_dict(autoencoder.state_dict())
    return model


def with_words(words, captions):
    """The words of a run's captions, and of more; none if the first are not known."""
    return sorted({*words, *(word for caption in captions for word in words_of(caption))}) if words else []


def image_run(config):
    """The Pipeline of the run that --init names. ValueError if it is of another --size, or of clips already."""
    model = Pipeline.load(config.init, clip=config.clip, t5=config.t5)
    if model.transformer.config.temporal:
        raise ValueError(f"--init {config.init}: is a video model")
    shape = lambda c: (c.depth, c.width, c.heads)
    if (found := shape(model.transformer.config)) != shape(ModelConfig.of(config.size)):
        size = next((name for name in SIZES if shape(ModelConfig.of(name)) == found), "another")
        raise ValueError(f"--size {config.size}: the model in {config.init} is of size {size}")
    return model


def continued_image_model(config, dataset):
    """The model of the run that --init names, for other pictures or another size of them: a grid of positions is computed
    for whatever size there is."""
    start = image_run(config)
    parts = {name: part for name, part in start.config.items() if name not in ("flags", "image_size", "processor", "words")}
    words = with_words(start.config["words"], some_captions(dataset, 100_000)) if len(dataset) <= 100_000 else []
    start.config = describe(config, words=words, **parts)
    return start.train()


def place(model, config):
    """Shares a Pipeline out among the ranks, on their devices, and gives the transformer its starting values if it has none
    yet. No rank ever holds the whole of a new model that is shared out."""
    device = distributed.start(device_of(config.device))
    dtype, model.precision = DTYPES[config.precision], config.precision
    model.transformer.checkpointing = config.checkpointing
    if config.compile:
        if not any(map(shutil.which, ("c++", "g++", "clang++"))):
            raise ValueError("--compile: needs a C++ compiler; on Debian: apt-get install g++")
        for block in model.transformer.blocks:
            block.compile()
    for part in (model.transformer, *model.text_encoders):
        if any(p.requires_grad for p in part.parameters()):
            distributed.shard(part, device, dtype, config.shard)
    if any(p.is_meta for p in model.transformer.parameters()):
        model.transformer.to_empty(device=device)
        torch.manual_seed(config.seed)
        with distributed.DrawnWhole():
            initialise(model.transformer)
    return model.to(device)


def pictures_of(config):
    """What --data names: shapes, a folder of pictures, or a folder of tar shards."""
    if any(Path(config.data).glob("*.tar")):
        return TarShards(config.data, config.image_size)
    return data.load(config.data, config.image_size, config.seed)


def reader_of(config, model, dataset):
    """read(step, rows) as loop.fit wants it, of latents in memory, of tar shards, or of a cache → indices, latents
    (B, C, h, w) or pictures (B, 3, S, S) uint8, and captions or what the text encoders made of them."""
    if isinstance(dataset, TarShards):
        return Ahead(config, dataset)
    indices_of = lambda step, rows: batch_indices(step, len(dataset.captions), config.batch_size, config.seed, dataset.group)[rows]
    if not config.cache:
        latents = encode_all(model.autoencoder, len(dataset.captions), dataset.pictures)  # (N, C, h, w)
        check_scale(latents)

        def read(step, rows):
            indices = indices_of(step, rows)
            return indices.tolist(), latents[indices], [dataset.captions[i] for i in indices]

        return read
    published = model.config.get("published", {})
    encoders = dict(zip(published, zip(model.tokenizers, model.text_encoders)))
    with_text = bool(encoders) and encoders.keys() <= dataset.settings["text"].keys()
    cached.check(dataset, config.image_size, model.autoencoder, encoders if with_text else {})
    check_scale(dataset.read(torch.arange(min(256, len(dataset)))))

    def read(step, rows):
        indices = indices_of(step, rows)
        flips = torch.randint(2, (config.batch_size,), generator=generator_of(config, step, "batch"))[rows]
        text = [dataset.captions[i] for i in indices]
        if with_text:
            text = tuple(zip(*(dataset.text(indices, name) for name in published)))
        return indices.tolist(), dataset.read(indices, flips), text

    return read


def train_image(config):
    dataset = LatentCache(config.cache) if config.cache else pictures_of(config)
    if not config.cache:
        report_skipped(dataset)
    model = place((continued_image_model if config.init else new_image_model)(config, dataset), config)
    read = reader_of(config, model, dataset)

    def batch_loss(batch, step, rows, generator):
        _, x0, text = batch
        if x0.dtype == torch.uint8:
            with torch.no_grad():
                x0 = model.autoencoder.encode(from_bytes(x0.to(model.device)))
        return diffusion_loss(config, model, x0, text, dataset.group, step, rows, generator)

    prompts = some_captions(dataset, 16)
    preview = lambda: pictures.grid(model.generate(prompts), prompts)
    fit(config, model, read, batch_loss, preview, lambda state: model.save(f"{config.out}/model.safetensors", state))
    print(f"image model → {config.out}. Now: python sample.py \"{prompts[0]}\"")


def diffusion_loss(config, model, x0, text, group, step, rows, generator, motion_free=None, numbers=None):
    """Losses (B,) of clean latents x0 (B, [F,] C, h, w) with their captions (or what Pipeline.read makes of them), and their
    timesteps' shares of all steps (B,). They are these rows of the step's global batch, in which each `group` neighbours
    have one timestep, and lose their captions together. motion_free, numbers: as in dit.py.

    In a share of the clips, --own-timesteps, each frame has a timestep of its own, so that those with little noise tell
    the others where a thing is: that is what the temporal attention is to pass on, and where all frames are as noisy
    there is little of it to learn from. (Ours; the idea is Chen et al. 2024, arXiv 2407.01392.)"""
    device, count = model.device, (rows.stop - rows.start) * distributed.world() * config.accumulate
    once = lambda values: values.repeat_interleave(group, dim=0)[rows].to(device)
    x0 = x0.to(device)
    texts, masks = ([a.to(device) for a in part] for part in text) if isinstance(text, tuple) else model.read(text)
    t = model.diffusion.random_timesteps(count, generator)
    if x0.ndim == 5 and config.own_timesteps:
        own = model.diffusion.random_timesteps((count, x0.shape[1]), generator)
        t = torch.where(torch.rand(count, 1, generator=generator) < config.own_timesteps, own, t.unsqueeze(1))  # (B, F)
    t = once(t)
    dropped = once(torch.rand(count, generator=generator) < config.caption_dropout)
    noise = gaussian(x0.shape[1:], row_generators(config.seed, step, rows)).to(device)
    loss = model.diffusion.loss(lambda x, t: model.transformer(x, t, texts, masks, dropped, motion_free, numbers), x0, t, noise)
    return loss, (t.view(len(t), -1).float().mean(1) / model.diffusion.steps).cpu()


def frames_at(step, config, generator):
    """The numbers (K,) of the frames that a step of video training sees: the last one, then two, four, and all. A clip as a
    whole shows which way it goes at all but the highest noise, and its words stay unused; of the last frame alone "moving
    left" says where the thing is, and the image model knows such words. (Ours, for a short training.)"""
    F = config.frames
    for K, steps in ((1, config.one_frame), (2, config.two_frames), (4, config.four_frames)):
        if step < steps and K <= F:  # one from each K-th of the clip
            first = torch.arange(K + 1) * F // K
            chosen = first[:-1] + (torch.rand(K, generator=generator) * first.diff()).long()
            return torch.tensor([F - 1]) if K == 1 else chosen
        step -= steps
    return torch.arange(F)


def train_video(config):
    """Joint image–video training (paper, section 3.3). With probability p_motion_free a sample is a picture, repeated
    F times under the motion-free mask, else a clip; captions are dropped independently of that, so that all that
    guidance asks for is trained: text and motion, motion alone, neither."""
    if config.cache or any(Path(config.data).glob("*.tar")):
        raise ValueError("train.py video takes its pictures from shapes or a folder, not from tar shards or a cache")
    image = image_run(config)
    if image.config["image_size"] != config.image_size:
        raise ValueError(f"--image-size {config.image_size}: the image model in {config.init} has {image.config['image_size']}")
    films = clips.load(config.clips, config.image_size, config.frames, config.fps, config.seed)
    report_skipped(films)
    if films.held:
        print(f"{films.held} of {len(films.captions)} clips are shorter than {config.frames} frames: their last one is held")
    stills = data.load(config.data, config.image_size, config.seed)
    words = with_words(image.config["words"], films.captions)
    parts = {name: image.config[name] for name in ("text", "published", "autoencoder", "diffusion") if name in image.config}
    # mini's few frames stand further apart in the positions' sinusoids, as its tokens do
    changes = dict(temporal=True, frame_step=min(2.0, image.config["model"]["position_step"]))
    torch.manual_seed(config.seed)
    model = Pipeline(
        describe(config, model=image.config["model"] | changes, words=words, frames=config.frames, **parts), image.tokenizer
    )
    new = inflate(model, image.state_dict())
    del image
    print(f"{len(new)} new weights, the temporal layers': {new[0]} … {new[-1]}")
    if config.only_temporal:
        for name, p in model.named_parameters():
            p.requires_grad_(name in new)
    place(model, config)
    moving = encode_all(model.autoencoder, len(films.captions), films.clips, 32)  # (N, F, C, h, w)
    still = encode_all(model.autoencoder, len(stills.captions), stills.pictures)  # (N, C, h, w)
    group = max(films.group, stills.group)

    def read(step, rows):
        generator = generator_of(config, step, "batch")
        numbers = frames_at(step, config, generator)  # (K,)
        more = config.frames // len(numbers)  # clips in place of one whole one: as many frames in every step
        rows, count = slice(rows.start * more, rows.stop * more), config.batch_size * more
        a = batch_indices(step, len(moving), count, config.seed, films.group)[rows]
        b = batch_indices(step, len(still), count, config.seed, stills.group)[rows]
        share = config.p_motion_free if config.joint else 0.0
        free = (torch.rand(count, generator=generator) < share).repeat_interleave(group)[rows]  # (B,)
        repeated = still[b][:, None].expand(-1, len(numbers), -1, -1, -1)
        x0 = torch.where(free[:, None, None, None, None], repeated, moving[a][:, numbers])  # (B, K, C, h, w)
        captions = [stills.captions[j] if f else films.captions[i] for i, j, f in zip(a, b, free)]
        return a.tolist(), x0, captions, free, numbers, rows

    def batch_loss(batch, step, rows, generator):
        _, x0, captions, free, numbers, rows = batch
        motion_free = free.to(model.device) if config.motion_free_mask and config.joint else None
        return diffusion_loss(config, model, x0, captions, group, step, rows, generator, motion_free, numbers.to(model.device))

    prompts = films.captions[:8]
    preview = lambda: pictures.sheet(model.generate(prompts), prompts)
    fit(config, model, read, batch_loss, preview, lambda state: model.save(f"{config.out}/model.safetensors", state))
    print(f"video model → {config.out}. Now: python sample.py --frames {config.frames} \"{prompts[0]}\"")


STAGES = {"autoencoder": train_autoencoder, "image": train_image, "video": train_video}


def main(arguments):
    if not arguments or arguments[0] not in STAGES:
        raise ValueError(f"say what to train: python train.py {'|'.join(STAGES)} [--flag value …]")
    config = read_flags(arguments[0], arguments[1:])
    if config.dry_run:
        if arguments[0] == "autoencoder":
            raise ValueError("--dry-run: of the stages image and video")
        report = dryrun.report(arguments[0], config)
        if distributed.rank() == 0:
            print("\n".join(report))
        return
    device = distributed.start(device_of(config.device))
    attention.use(config.attention, device)
    if int(os.environ.get("TORCHELASTIC_RESTART_COUNT", 0)) and checkpoints.folders(config.out):
        config.resume = True  # torchrun has started this run again
    before = checkpoints.trained_in(config.out) if config.resume else None
    config.precision = distributed.majority(precision_of(config.precision, device, before))
    STAGES[arguments[0]](config)


if __name__ == "__main__":
    try:
        main(sys.argv[1:])
    except (ValueError, OSError) as error:
        sys.exit(f"train.py: {error}")
