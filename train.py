"""Training, in three stages, with one loop.

    python train.py autoencoder      pictures → latents and back
    python train.py image            captions → latents, with that autoencoder frozen
    python train.py video            the image model with temporal layers, on clips and pictures together

A run leaves in its folder: model.safetensors (EMA weights and all settings; sample.py and evaluate.py read
it), checkpoints/ (for --resume), metrics.jsonl, loss.png, and samples/. The flags and recipes are in
training/recipes.py. Under torchrun many processes share the work (training/distributed.py).

Letters: B batch, F frames, K frames seen by a step, C latent channels, x0 clean latent, t timestep.
"""
import json
import shlex
import sys
from contextlib import closing
from pathlib import Path

import torch

from common import figures
from common.figures import from_bytes, to_bytes
from common.files import FORMAT, print_left_out
from common.flags import run_command
from common.flops import outline as outline_of
from common.hardware import DTYPES, device_of, matmul_rate, precision_of, products_in
from data import clips, folder
from data.tar_shards import TarShards
from dit import SIZES
from encoders import autoencoders, weights
from encoders.autoencoder import Autoencoder, AutoencoderConfig, check_scale, psnr
from evaluation import dry_run
from training import checkpoints, distributed, models, recipes, run_folder, tricks
from training.batches import Captions, Step, ahead, encode_all, reader_of, share_out, step_flops, steps_of
from training.logging import Log, StopSignals, Window, progress
from training.optimizers import clip_and_step, learning_rate, update_ema
from training.recipes import numbers, read_flags
from training.state import TrainingState

# --------------------------------------------------------------------------------------------------- the loss


def draw(step, shape, group, flags, diffusion):
    """What is random in the loss of a batch: t (B,) or (B, F), dropped (B,) and noise (B, *shape). shape:
    ([F,] C, h, w) of x0. Each `group` neighbours in the batch share t and dropped."""
    generator = step.generator("loss")
    t = diffusion.random_timesteps(step.count, generator)
    if len(shape) == 4 and flags.own_timesteps:
        t = tricks.own_timesteps(t, shape[0], flags.own_timesteps, diffusion, generator)
    dropped = torch.rand(step.count, generator=generator) < flags.caption_dropout
    t, dropped = (tricks.in_groups(values, group, step.rows) for values in (t, dropped))
    return dict(t=t, dropped=dropped, noise=step.noise(shape))


def diffusion_loss(model, batch):
    """The diffusion loss of a batch. model: a Pipeline. batch: a dictionary of x0, clean latents (B, [F,] C,
    h, w) or pictures (B, 3, H, W) uint8; text, as Pipeline.encode_text takes it; what `draw` gives; and
    `clips`, motion_free (B,) and frame_numbers (F,), as in dit.py, or nothing. Returns losses (B,) and noise
    levels (B,) in 0…1, for the log."""
    x0, t = batch["x0"], batch["t"]  # t (B,) or (B, F)
    if x0.dtype == torch.uint8:
        with torch.no_grad():
            x0 = model.autoencoder.encode(from_bytes(x0))
    texts, masks = model.encode_text(batch["text"])
    predict = lambda x, t: model.transformer(x, t, texts, masks, batch["dropped"], **batch["clips"])
    losses = model.diffusion.loss(predict, x0, t, batch["noise"])  # (B,)
    levels = t.view(len(t), -1).float().mean(1) / model.diffusion.steps  # (B,)
    return losses, levels


# --------------------------------------------------------------------------------------------------- the loop


def fit(flags, model, outline, hashes, read, batch_loss, preview, save, again="this command and --resume"):
    """The loop of all stages. outline: the model without values, for its FLOPs. hashes: {name: text} of data
    and frozen parts, which a resumed run must find as they were. read(step) → a batch: a dictionary of
    tensors, whose "names" name its samples. batch_loss(model, batch) → losses (B,) and noise levels (B,) or
    None. preview() → a picture of what the model does now. save(state) writes the model from whole tensors.
    again: how a stopped run goes on. ValueError after --patience steps in a row without a finite gradient."""
    run, device = Path(flags.out), next(model.parameters()).device
    (run / "samples").mkdir(parents=True, exist_ok=True)
    state = TrainingState(model, flags, hashes)
    first = state.load() if flags.resume else 0
    averaging = distributed.Averaging(model)
    log = Log(run, first)
    parts = (part for number in range(first, flags.steps) for part in steps_of(flags, number))
    flops = step_flops(outline, batch_loss, read, steps_of(flags, first))
    rate = matmul_rate(device, DTYPES[flags.precision])
    window = Window(flops, rate, flags.batch_size, flags.patience, device)
    bar = progress(f"{run}: {state.size()}, {flags.precision} products", first, flags.steps)
    with StopSignals() as signals, closing(ahead(read, parts, device)) as batches:
        for number in bar:
            # forward and backward, in parts if --accumulate
            for k in range(flags.accumulate):
                with window.waiting():
                    batch = next(batches)
                with products_in(flags.precision, device):
                    losses, levels = batch_loss(model, batch)
                averaging.enable(k == flags.accumulate - 1)
                (losses.float().mean() / flags.accumulate).backward()
                window.add(losses.float().detach(), levels, batch["names"])
            averaging.wait()
            # clip, step, average; a gradient that is not finite, on any process, changes no weight
            norm = state.gradient_norm()
            lr = flags.lr * learning_rate(number, flags.steps, flags.warmup, flags.cooldown)
            for optimizer in state.optimizers:
                clip_and_step(optimizer, lr, norm, flags.max_norm)
            update_ema(state.ema, state.weights, flags.ema, number)
            model.zero_grad(set_to_none=True)
            done = number + 1
            window.end_step(norm, done, log)
            # log, checkpoint, stop, preview
            stopped = signals.on_any_rank(done)
            last = done == flags.steps or stopped
            if done % flags.log_every == 0 or last:
                window.write(log, bar, done, lr)
            if done % flags.checkpoint_every == 0 or last:
                window.look(log)
                state.save(done)
                state.export(save, log)
            if stopped and done < flags.steps:
                bar.close()
                print(f"stopped after step {done}, with a checkpoint in {run}. Go on with {again}")
                sys.exit(0)
            if flags.sample_every > 0 and (done % flags.sample_every == 0 or last):
                state.show(preview, run / "samples", done)
    if first == flags.steps:  # it may have been killed before its model was written
        state.export(save, log)
    state.become(state.ema)
    log.summarise(rate)
    return log


# ------------------------------------------------------------------------------------------------- the stages


def train_autoencoder(flags, **more):
    if distributed.world() > 1:
        raise ValueError("the autoencoder trains in one process: start this stage without torchrun")
    dataset = folder.load(flags.data, flags.image_size, flags.seed)
    print_left_out(dataset.skipped, len(dataset))
    device = device_of(flags.device)
    torch.manual_seed(flags.seed)
    model = Autoencoder(AutoencoderConfig(flags.latent_channels)).to(device)
    some = dataset.pictures(Step(flags.seed, 0, slice(0, 512), 512).indices(len(dataset)))
    some = from_bytes(some).to(device)
    model.start_from(some)
    unseen = folder.unseen(flags.data, flags.image_size, flags.seed)
    check = unseen or dataset
    check = from_bytes(check.pictures(range(min(256, len(check))))).to(device)

    side = flags.image_size // model.factor

    def read(step):
        indices = step.indices(len(dataset))
        noise = step.noise((flags.latent_channels, side, side))
        return dict(names=indices, pictures=dataset.pictures(indices), noise=noise)

    def batch_loss(model, batch):
        return model.loss(from_bytes(batch["pictures"]), batch["noise"], flags.kl_weight), None

    @torch.no_grad()
    def preview():
        images = torch.stack([check[:8], model.decode(model.encode(check[:8]))]).flatten(0, 1)
        return figures.grid(to_bytes(images).cpu(), columns=8)

    def save(state, finished=False):
        config = models.describe(flags, autoencoder=vars(model.config), finished=finished)
        metadata = dict(config=json.dumps(config), format=str(FORMAT))
        weights.write(f"{flags.out}/model.safetensors", state, metadata)

    parts = outline_of(model), models.hashes_of(data=dataset), read, batch_loss, preview, save
    log = fit(flags, model, *parts, **more)
    model.calibrate(some)
    save(model.state_dict(), finished=True)
    check_scale(model.encode(check))
    quality = psnr(model, check)
    log(step=flags.steps, psnr=quality)
    kind = "unseen" if unseen else "of the"
    print(f"autoencoder: {quality:.1f} dB on {len(check)} {kind} pictures → {flags.out}")


def autoencoder_of(flags, dataset):
    """The autoencoder that --autoencoder names. It is trained first if there is none, or to its end if that
    was stopped. ValueError if --latent-channels asks for others than it has."""
    path = Path(flags.autoencoder)
    own = recipes.of_autoencoder(flags, SIZES)
    if not (path / "model.safetensors").exists() and not (path / "config.json").exists():
        if flags.resume or flags.cache or distributed.world() > 1 or isinstance(dataset, TarShards):
            raise ValueError(f"--autoencoder {path}: neither a run nor a published folder")
        print(f"no autoencoder in {path} yet: training one first")
        run_stage("autoencoder", own, again="the same command")
    elif run_folder.unfinished(path, own):
        own.resume = True
        run_stage("autoencoder", own, again="the same command")
    autoencoder = autoencoders.load(flags.autoencoder)
    if flags.latent_channels not in (0, autoencoder.config.channels):
        found = f"the autoencoder in {path} has {autoencoder.config.channels}"
        raise ValueError(f"--latent-channels {flags.latent_channels}: {found}; name another by --autoencoder")
    return autoencoder


def train_image(flags):
    dataset = models.pictures_of(flags)
    if flags.init:
        model = models.continued_image_model(flags, dataset)
    else:
        model = models.new_image_model(flags, dataset, autoencoder_of(flags, dataset))
    hashes, outline = models.hashes_of(model, data=dataset), outline_of(model)
    models.place(model, flags)
    samples = reader_of(flags, model, dataset)

    def read(step):
        names, x0, text = samples(step)
        drawn = draw(step, model.latent_shape(), dataset.group, flags, model.diffusion)
        return dict(names=names, x0=x0, text=text, clips={}, **drawn)

    prompts = models.some_captions(dataset, 16)[:16]
    preview = lambda: figures.grid(model.generate(prompts), prompts)
    save = lambda state: model.save(f"{flags.out}/model.safetensors", state)
    fit(flags, model, outline, hashes, read, diffusion_loss, preview, save)
    print(f"image model → {flags.out}. Now: {hint(flags.out, prompts[0])}")


def train_video(flags):
    """Joint image–video training (paper, section 3.3). With probability p_motion_free a sample is a picture,
    repeated into a still clip under the motion-free mask; else it is a clip. Captions are dropped
    independently, so all that guidance asks for is trained: text and motion, motion alone, neither."""
    image = models.image_run_for_clips(flags)
    films = clips.load(flags.clips, flags.image_size, flags.frames, flags.fps, flags.seed)
    print_left_out(films.skipped, len(films))
    if films.held:
        short = f"{films.held} of {len(films)} clips are shorter than {flags.frames} frames"
        print(f"{short}: their last frame is held")
    stills = folder.load(flags.data, flags.image_size, flags.seed)
    model = models.new_video_model(flags, image, models.some_captions(films, len(films)))
    del image
    hashes, outline = models.hashes_of(model, data=stills, clips=films), outline_of(model)
    models.place(model, flags)
    moving = encode_all(model.autoencoder, len(films), films.clips, 32)  # (N, F, C, h, w)
    still = encode_all(model.autoencoder, len(stills), stills.pictures, 256)  # (N, C, h, w)
    group = max(films.group, stills.group)
    text = Captions(model.tokenize, films, stills)
    share = flags.p_motion_free if flags.joint else 0.0
    curriculum = numbers(flags, "frame_curriculum", 3)

    def read(step):
        generator = step.generator("batch")
        seen = tricks.frames_seen(step.number, flags.frames, curriculum, generator)  # (K,)
        step = step.times(flags.frames // len(seen))  # about as many frames in every step
        a = step.indices(len(moving), films.group)  # (B,)
        b = step.indices(len(still), stills.group)  # (B,)
        free = tricks.in_groups(torch.rand(step.count, generator=generator) < share, group, step.rows)  # (B,)
        repeated = still[b].unsqueeze(1).expand(-1, len(seen), -1, -1, -1)  # (B, K, C, h, w)
        x0 = torch.where(free.view(-1, 1, 1, 1, 1), repeated, moving[a][:, seen])  # (B, K, C, h, w)
        choice = torch.rand(step.count, generator=generator)[step.rows]  # (B,)
        captions = text(torch.where(free, len(moving) + b, a), choice)  # of the pictures or the clips
        drawn = draw(step, x0.shape[1:], group, flags, model.diffusion)
        motion_free = free if flags.joint and flags.motion_free_mask else None
        of_clips = dict(motion_free=motion_free, frame_numbers=seen)
        return dict(names=a, x0=x0, text=captions, clips=of_clips, **drawn)

    prompts = films.captions[:8]
    preview = lambda: figures.sheet(model.generate(prompts), prompts)
    save = lambda state: model.save(f"{flags.out}/model.safetensors", state)
    fit(flags, model, outline, hashes, read, diffusion_loss, preview, save)
    print(f"video model → {flags.out}. Now: {hint(flags.out, prompts[0])}")


def hint(out, prompt):
    return f"python sample.py --checkpoint {shlex.quote(out)} {shlex.quote(prompt)}"


# ------------------------------------------------------------------------------------------------ the command


def main(arguments):
    if not arguments or arguments[0] not in TRAIN:
        raise ValueError(f"say what to train: python train.py {'|'.join(TRAIN)} [--flag value …]")
    stage, *rest = arguments
    flags = read_flags(stage, rest, SIZES)
    if flags.dry_run:
        report = dry_run.report(stage, flags, *numbers(flags, "dry_run", 1, 3))
        if distributed.rank() == 0:
            print("\n".join(report))
        return
    distributed.start(device_of(flags.device))
    share_out(flags.batch_size, flags.accumulate)
    run_stage(stage, flags)


def run_stage(stage, flags, **more):
    """Trains a stage in its own folder, from the start or from the last checkpoint."""
    with run_folder.claimed(flags.out, flags.resume, flags.overwrite) as (flags.resume, finished, finish):
        before = None
        if flags.resume:
            before = checkpoints.check_flags(flags.out, vars(flags))
            if finished >= flags.steps:
                print(f"{flags.out} is finished, at {finished} steps of {flags.steps}: nothing to do")
                return
        device = distributed.start(device_of(flags.device))
        flags.precision = distributed.majority(precision_of(flags.precision, device, before))
        TRAIN[stage](flags, **more)
        finish(flags.steps)


TRAIN = {"autoencoder": train_autoencoder, "image": train_image, "video": train_video}


if __name__ == "__main__":
    run_command(main)
