import json
import pickle
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.distributed.checkpoint as dcp
from PIL import Image

from training import checkpoints
from data.moving_shapes import MovingShapes
import evaluate
from training import batches, logging, optimizers, tricks
import sample
from data import shapes
import train
from encoders import weights
from dit import SIZES, GenTron
from training import recipes
from training.optimizers import Muon, clip_and_step, learning_rate, make_optimizers, orthogonalise, update_ema
from training.state import TrainingState
from sample import Pipeline

ROOT = Path(__file__).parent.parent
LEFT = {"model.safetensors", "checkpoints", "metrics.jsonl", "loss.png", "samples", "run.json"}
TINY = ["--steps", "6", "--batch-size", "4", "--log-every", "2", "--sample-every", "-1", "--checkpoint-every", "3"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A few pictures with captions, and an autoencoder trained on them for a moment."""
    path = tmp_path_factory.mktemp("train") / "data"
    path.mkdir()
    drawn = shapes.Shapes(32, count=20)
    for i, caption in enumerate(drawn.captions):
        Image.fromarray(drawn.pictures([i])[0].permute(1, 2, 0).numpy()).save(path / f"{i}.png")
        (path / f"{i}.txt").write_text(caption)
    (path / "broken.png").write_bytes(b"\x89PNG no")
    (path / "broken.txt").write_text("broken")
    run("autoencoder", path, path.parent / "ae", *TINY)
    return path


def run(stage, data_folder, out, *flags):
    train.main([stage, "--data", str(data_folder), "--image-size", "32", "--out", str(out), *flags])


def image(folder, out, *flags):
    run("image", folder, out, "--autoencoder", str(folder.parent / "ae"), *TINY, *flags)


def forget_the_end(out):
    """As if the process had died before it wrote its last checkpoint."""
    shutil.rmtree(checkpoints.folders(out)[-1])
    (out / "run.json").unlink()


def losses(out):
    return torch.tensor([json.loads(line)["loss"] for line in (out / "metrics.jsonl").read_text().splitlines()])


def test_compiled_blocks_train_alike_and_go_on_uncompiled(folder, tmp_path, monkeypatch):
    """With a back end that traces, as on a GPU, and needs no compiler; through checkpointing, captions of any length, a stop."""
    traced, compile = [], torch.compile

    def backend(graph, inputs):
        traced.append(graph)
        return torch._dynamo.lookup_backend("aot_eager")(graph, inputs)

    monkeypatch.setattr(torch, "compile", lambda function, **options: compile(function, backend=backend, **options))
    flags = "--precision", "fp32", "--log-every", "1", "--optimizer", "adamw", "--lr", "1e-3"
    image(folder, tmp_path / "plain", *flags)
    assert not traced
    monkeypatch.setattr(shutil, "which", lambda program: None)
    with pytest.raises(ValueError, match="--compile: needs a C\\+\\+ compiler"):
        image(folder, tmp_path / "compiled", *flags, "--compile")
    monkeypatch.setattr(shutil, "which", lambda program: program)
    image(folder, tmp_path / "compiled", *flags, "--compile", "--checkpointing")
    assert traced
    assert (losses(tmp_path / "compiled") - losses(tmp_path / "plain")).abs().max() < 1e-5
    forget_the_end(tmp_path / "compiled")
    image(folder, tmp_path / "compiled", *flags, "--resume")
    assert (losses(tmp_path / "compiled") - losses(tmp_path / "plain")).abs().max() < 1e-5


def test_a_run_leaves_what_it_says(folder, tmp_path, capsys):
    image(folder, tmp_path)
    printed = capsys.readouterr().out
    assert "1 of 21 files were left out" in printed and "broken.png: not a whole picture" in printed
    assert {p.name for p in tmp_path.iterdir()} == LEFT
    rows = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == [2, 4, 6] and len(rows[0]["loss_bins"]) == 4
    model = Pipeline.load(tmp_path)
    assert model.config["flags"]["batch_size"] == 4
    pictures = model.generate(["a red circle", "a blue star"], steps=2)
    assert pictures.shape == (2, 3, 32, 32) and pictures.dtype == torch.uint8


class Lost(Exception):
    """A process dies."""


def interrupted_in_the_fifth_step(monkeypatch, train_it):
    """Runs train_it(), which does not survive its fifth step: after the checkpoint of the third."""
    real, calls = TrainingState.gradient_norm, []

    def interrupted(state):
        calls.append(1)
        if len(calls) == 5:
            raise Lost
        return real(state)

    monkeypatch.setattr(TrainingState, "gradient_norm", interrupted)
    with pytest.raises(Lost):
        train_it()
    monkeypatch.undo()


def stored(checkpoint):
    """All tensors of a checkpoint."""
    found = checkpoints.Reader(checkpoint).read_metadata().state_dict_metadata
    state = {name: torch.empty(entry.size, dtype=entry.properties.dtype) for name, entry in found.items()}
    dcp.load(state, storage_reader=checkpoints.Reader(checkpoint), no_dist=True)
    return state


@pytest.mark.parametrize("optimizer", ["muon", "adamw"])
def test_an_interrupted_and_resumed_run_equals_an_uninterrupted_one(folder, tmp_path, monkeypatch, optimizer):
    flags = ["--optimizer", optimizer, "--log-every", "1"]
    image(folder, tmp_path / "whole", *flags)
    interrupted_in_the_fifth_step(monkeypatch, lambda: image(folder, tmp_path / "parts", *flags))
    image(folder, tmp_path / "parts", *flags, "--resume")
    whole, parts = (weights.read(tmp_path / name / "model.safetensors")[0] for name in ("whole", "parts"))
    assert set(whole) == set(parts) and all(torch.equal(whole[name], parts[name]) for name in whole)
    whole, parts = (stored(checkpoints.folders(tmp_path / name)[-1]) for name in ("whole", "parts"))
    assert len(whole) > 200 and set(whole) == set(parts) and all(torch.equal(whole[name], parts[name]) for name in whole)
    assert [folder.name for folder in checkpoints.folders(tmp_path / "parts")] == ["000003", "000006"]
    losses = [[json.loads(line)["loss"] for line in (tmp_path / name / "metrics.jsonl").open()] for name in ("whole", "parts")]
    assert losses[0] == losses[1]


def test_a_run_that_ended_between_its_last_checkpoint_and_its_model_writes_the_model(folder, tmp_path):
    image(folder, tmp_path)
    path = tmp_path / "model.safetensors"
    good = path.read_bytes()
    path.write_bytes(b"of an earlier step")
    (tmp_path / "run.json").unlink()
    image(folder, tmp_path, "--resume")
    assert path.read_bytes()[-1000:] == good[-1000:]


@pytest.fixture(scope="module")
def clip_folder(folder):
    """An image run on `folder`, and a few clips with captions."""
    image(folder, folder.parent / "image")
    path = folder.parent / "clips"
    path.mkdir()
    drawn = MovingShapes(32, count=4)
    for i, caption in enumerate(drawn.captions):
        frames = [Image.fromarray(frame) for frame in drawn.clips([i])[0].permute(0, 2, 3, 1).numpy()]
        frames[0].save(path / f"{i}.webp", save_all=True, append_images=frames[1:], duration=250, lossless=True)
        (path / f"{i}.txt").write_text(caption)
    (path / "broken.gif").write_bytes(b"GIF89a no")
    (path / "broken.txt").write_text("broken")
    return path


def video(folder, clip_folder, out, *flags):
    run("video", folder, out, "--clips", str(clip_folder), "--init", str(folder.parent / "image"), *TINY, *flags)


def test_an_image_model_becomes_a_video_model(folder, clip_folder, tmp_path, capsys, monkeypatch):
    video(folder, clip_folder, tmp_path / "all")
    printed = capsys.readouterr().out
    assert "1 of 5 files were left out" in printed and "new weights, the temporal layers'" in printed
    model, before = Pipeline.load(tmp_path / "all"), Pipeline.load(folder.parent / "image").state_dict()
    assert model.generate(["a red circle moving left"], steps=2, lambda_m=1.2).shape == (1, 8, 3, 32, 32)
    assert model.generate(["a red circle moving left"], steps=2, frames=12).shape == (1, 12, 3, 32, 32)
    assert not torch.equal(model.state_dict()["transformer.patch_embedding.weight"], before["transformer.patch_embedding.weight"])
    flags = ["--checkpoint", str(tmp_path / "all"), "--frames", "8", "--steps", "2", "--lambda-t", "7.5", "--lambda-m", "1.2"]
    for name in ["clip.gif", "clip.webp"] + ["clip.mp4"] * bool(shutil.which("ffmpeg")):
        sample.main(["a red circle moving left", *flags, "--out", str(tmp_path / name)])
        assert (tmp_path / name).stat().st_size > 0 and (tmp_path / "clip.png").exists()
    (tmp_path / "list.txt").write_text("a red circle moving left")
    sample.main(["--prompts", str(tmp_path / "list.txt"), *flags, "--out", str(tmp_path / "many")])
    with Image.open(tmp_path / "many/samples/a red circle moving left_000000.gif") as clip:
        assert clip.size == (32, 32)  # as pictures, without a frame around it
    with pytest.raises(ValueError, match="--frames -1: must be from 0 to 1000"):
        sample.main(["a red circle moving left", *flags, "--frames", "-1"])
    of_clips = ["--video", "--checkpoint", str(tmp_path / "all"), "--steps", "1", "--prompts", "2"]
    evaluate.main([*of_clips, "--json", str(tmp_path / "clips.json")])
    scores = json.loads((tmp_path / "clips.json").read_text())
    assert scores["frames_a_clip"] == 8 and scores["change over the data's"] > 0 and "rank 5 latent, last frame" in scores
    with pytest.raises(ValueError, match="gone is no folder of clips"):
        evaluate.main([*of_clips, "--data", "gone"])
    model.config["flags"]["clips"], lengths, generate = "shapes", set(), Pipeline.generate

    def noted(*arguments, **options):
        clips = generate(*arguments, **options)
        lengths.add(clips.shape[1])
        return clips

    monkeypatch.setattr(Pipeline, "generate", noted)
    model.save(tmp_path / "model.safetensors")
    judged = ["--video", "--checkpoint", str(tmp_path / "model.safetensors"), "--frames", "3", "--steps", "1", "--prompts", "2"]
    evaluate.main([*judged, "--json", str(tmp_path / "scores.json")])
    assert lengths == {3} and json.loads((tmp_path / "scores.json").read_text())["frames_a_clip"] == 3
    with pytest.raises(ValueError, match="--frames 12: of clips only"):
        evaluate.main(["--frames", "12", "--checkpoint", str(folder.parent / "image")])
    for flag, value, message in (
        ("--frames", "1", "a clip has at least 2"), ("--json", "no/scores.json", "there is no folder no"),
    ):  # fmt: skip
        with pytest.raises(ValueError, match=f"{flag} {value}: {message}"):
            evaluate.main([*judged, flag, value])
    for name in ("clip.avi", "clip"):
        with pytest.raises(ValueError, match="clips are written as .gif, .webp, .mp4"):
            sample.main(["a red circle moving left", *flags, "--out", str(tmp_path / name)])
    video(folder, clip_folder, tmp_path / "layers", "--only-temporal", "--motion-free-mask", "false")
    video(folder, clip_folder, tmp_path / "clips", "--joint", "false")
    after = Pipeline.load(tmp_path / "layers").state_dict()
    assert all(torch.equal(after[name], before[name]) for name in before)
    assert after["transformer.blocks.0.temporal.attention.out.weight"].abs().max() > 0
    with pytest.raises(ValueError, match="--frames: this is an image model"):
        Pipeline.load(folder.parent / "image").generate(["a star"], frames=4)


def test_a_video_run_resumes_bit_for_bit(folder, clip_folder, tmp_path, monkeypatch):
    video(folder, clip_folder, tmp_path / "whole")
    interrupted_in_the_fifth_step(monkeypatch, lambda: video(folder, clip_folder, tmp_path / "parts"))
    video(folder, clip_folder, tmp_path / "parts", "--resume")
    whole, parts = (weights.read(tmp_path / name / "model.safetensors")[0] for name in ("whole", "parts"))
    assert set(whole) == set(parts) and all(torch.equal(whole[name], parts[name]) for name in whole)


def test_the_mask_and_the_captions_are_dropped_independently(folder, clip_folder, tmp_path, monkeypatch):
    """All combinations that guidance needs are trained, and neither depends on the timestep."""
    seen, times = set(), {True: [], False: []}
    real = GenTron.forward

    def spy(self, x, t, text, mask, dropped, motion_free=None, frame_numbers=None, kept=None):
        if x.is_meta:  # to count FLOPs
            return real(self, x, t, text, mask, dropped, motion_free, frame_numbers)
        free = torch.zeros_like(dropped) if motion_free is None else motion_free
        seen.update(zip(free.tolist(), dropped.tolist()))
        for kind in (free, dropped):
            times[True] += t[kind].flatten().tolist()
            times[False] += t[~kind].flatten().tolist()
        return real(self, x, t, text, mask, dropped, motion_free, frame_numbers)

    monkeypatch.setattr(GenTron, "forward", spy)
    whole = ["--frame-curriculum", "0,0,0"]
    video(folder, clip_folder, tmp_path, "--caption-dropout", "0.5", "--p-motion-free", "0.5", "--batch-size", "64", *whole)
    assert abs(sum(times[True]) / len(times[True]) - sum(times[False]) / len(times[False])) < 60
    assert seen == {(f, d) for f in (True, False) for d in (True, False)}


def test_what_a_run_starts_from_must_fit(folder, clip_folder, tmp_path, monkeypatch):
    image(folder, tmp_path / "image")
    with pytest.raises(ValueError, match="--size S: the model in .*image is of size mini"):
        run("image", folder, tmp_path / "more", *TINY, "--init", str(tmp_path / "image"), "--size", "S")
    video(folder, clip_folder, tmp_path / "video")
    with pytest.raises(ValueError, match="--init .*video: is a video model"):
        video(folder, clip_folder, tmp_path / "more", "--init", str(tmp_path / "video"))
    with pytest.raises(ValueError, match="not tar shards or a cache"):
        video(folder, clip_folder, tmp_path / "more", "--cache", str(tmp_path))


def test_an_autoencoder_whose_training_was_stopped_is_not_used(folder, tmp_path, monkeypatch):
    stopped = tmp_path / "ae"
    flags = "autoencoder", folder, stopped, *TINY
    interrupted_in_the_fifth_step(monkeypatch, lambda: run(*flags))
    with pytest.raises(ValueError, match="its training was stopped; go on with `python train.py autoencoder --resume`"):
        run("image", folder, tmp_path / "image", "--autoencoder", str(stopped), *TINY)
    run(*flags, "--resume")
    run("image", folder, tmp_path / "image", "--autoencoder", str(stopped), *TINY)


def test_a_log_that_a_full_disk_cut_does_not_keep_a_run_from_going_on(folder, tmp_path):
    image(folder, tmp_path)
    log = tmp_path / "metrics.jsonl"
    log.write_text(log.read_text().rstrip()[:-20])
    (tmp_path / "run.json").unlink()
    image(folder, tmp_path, "--resume")
    assert [json.loads(line)["step"] for line in log.read_text().splitlines()] == [2, 4]


def test_a_share_of_the_clips_has_a_timestep_a_frame(folder, clip_folder, tmp_path, monkeypatch):
    seen = []
    real = GenTron.forward

    def spy(self, x, t, *rest, **more):
        if torch.is_grad_enabled():
            seen.append(t.view(len(t), -1))
        return real(self, x, t, *rest, **more)

    monkeypatch.setattr(GenTron, "forward", spy)
    whole = ["--frame-curriculum", "0,0,0", "--own-timesteps", "0.5"]
    video(folder, clip_folder, tmp_path, "--batch-size", "32", *whole)
    steps = seen[1:]  # the first call counts FLOPs
    assert all(t.shape[1] == 8 for t in steps)
    mixed = (torch.cat(steps) != torch.cat(steps)[:, :1]).any(1).double().mean()
    assert 0.35 < mixed < 0.65


def test_batches_are_epochs_in_a_new_order_each():
    first = torch.cat([batches.Step(0, step, slice(0, 5), 5).indices(10) for step in (0, 1)])
    second = torch.cat([batches.Step(0, step, slice(0, 5), 5).indices(10) for step in (2, 3)])
    assert sorted(first.tolist()) == sorted(second.tolist()) == list(range(10)) and not torch.equal(first, second)
    assert torch.equal(batches.Step(0, 7, slice(0, 3), 3).indices(10), torch.cat([batches.Step(0, s, slice(0, 1), 1).indices(10) for s in (21, 22, 23)]))


READING = ("item", "tolist", "cpu", "numpy", "nonzero", "masked_select", "__bool__", "__int__", "__float__", "__index__")


def test_a_step_reads_no_value_back(folder, clip_folder, tmp_path, monkeypatch):
    """What would make Python wait for a GPU, looked for on a CPU: from the batch to the average, nothing calls what turns a
    tensor into numbers."""
    within, steps, found = [False], [], set()

    def watched(read, parts, device):
        for batch in batches.ahead(read, parts, device):
            within[0] = True
            yield batch

    def ended(self, *rest):
        within[0] = False
        steps.append(1)
        return end(self, *rest)

    def spy(name, real):
        def called(*arguments, **options):
            if within[0]:
                found.add(name)
            return real(*arguments, **options)

        return called

    end = logging.Window.end_step
    monkeypatch.setattr(train, "ahead", watched)
    monkeypatch.setattr(logging.Window, "end_step", ended)
    for name in READING:
        monkeypatch.setattr(torch.Tensor, name, spy(name, getattr(torch.Tensor, name)))
    image(folder, tmp_path / "image", "--optimizer", "adamw")
    video(folder, clip_folder, tmp_path / "video")  # with Muon
    train.main(["autoencoder", "--data", str(folder), *TINY, "--out", str(tmp_path / "autoencoder")])
    assert len(steps) >= 9 and not found


@pytest.mark.parametrize("stage", ["image", "video"])
def test_a_step_runs_where_tensors_have_no_values(folder, clip_folder, tmp_path, monkeypatch, stage):
    """On the meta device, which stands for a GPU: a tensor from the CPU, or a value that Python asks for, is an error."""
    kept = []
    fit = train.fit

    def step(flags, model, outline, hashes, read, batch_loss, *rest):
        batch = batches.moved(read(batches.steps_of(flags, 0)[0]), torch.device("meta"))
        state = TrainingState(outline, flags, hashes)
        losses, _ = batch_loss(outline, batch)
        losses.mean().backward()
        norm = state.gradient_norm()
        for optimizer in state.optimizers:
            clip_and_step(optimizer, 1e-3, norm, 1.0)
        update_ema(state.ema, state.weights, 0.999, 0)
        kept.append(norm)
        return fit(flags, model, outline, hashes, read, batch_loss, *rest)

    monkeypatch.setattr(train, "fit", step)
    monkeypatch.setattr(optimizers, "AdamW", lambda params, *rest, **more: torch.optim.RMSprop(params))  # whose kernel is not for meta
    if stage == "image":
        image(folder, tmp_path)
    else:
        video(folder, clip_folder, tmp_path)
    assert kept[0].is_meta


def test_every_objective_trains(folder, tmp_path):
    """The paper's recipe, with the variance learned; adaLN alone; x0."""
    for flags in (
        ["--target", "noise", "--schedule", "linear", "--learned-variance", "--optimizer", "adamw"],
        ["--integration", "adaln", "--attention", "fused", "--precision", "bf16"],
        ["--target", "x0", "--shift", "3"],
    ):
        image(folder, tmp_path, *flags, "--overwrite")
        assert Pipeline.load(tmp_path).generate(["a star"], steps=2, sampler="ddpm").shape == (1, 3, 32, 32)


def test_the_papers_sizes_take_dits_recipe():
    """As DiT's train.py has it: AdamW(lr=1e-4, weight_decay=0) with torch's betas, no clipping, learned sigma, EMA 0.9999."""
    flags = recipes.read_flags("image", ["--size", "XL/2"], SIZES)
    adamw = make_optimizers(torch.nn.Linear(2, 2), flags.optimizer, flags.lr, flags.beta2, flags.weight_decay, torch.float32)[0]
    theirs = torch.optim.AdamW([torch.nn.Parameter(torch.zeros(1))], lr=1e-4, weight_decay=0).defaults
    assert [adamw.defaults[key] for key in ("lr", "betas", "eps", "weight_decay")] == [
        theirs[key] for key in ("lr", "betas", "eps", "weight_decay")
    ]
    assert flags.learned_variance and flags.max_norm == 0 and flags.ema == 0.9999 and flags.warmup == flags.cooldown == 0
    assert recipes.read_flags("image", [], SIZES).beta2 == 0.99
    named = recipes.read_flags("image", ["--recipe", "paper", "--size", "XL/2"], SIZES)
    assert named == flags and flags.recipe == "paper" and recipes.read_flags("image", [], SIZES).recipe == "demo"


def test_a_recipe_gives_what_is_not_given():
    for stage in train.TRAIN:
        for name in ("emoji", "emoji-gpu"):
            flags = recipes.read_flags(stage, ["--recipe", name], SIZES)
            for field, value in recipes.RECIPES[name][stage].items():
                assert getattr(flags, field) == value, field
    flags = recipes.read_flags("video", ["--recipe", "emoji", "--steps", "7", "--data", "mine"], SIZES)
    assert (flags.steps, flags.data, flags.clips, flags.init) == (7, "mine", "emoji/clips", "runs/image-mine")
    own = recipes.of_autoencoder(recipes.read_flags("image", ["--recipe", "emoji"], SIZES), SIZES)
    assert own == recipes.read_flags("autoencoder", ["--recipe", "emoji"], SIZES) and own.out == "runs/autoencoder-emoji"
    with pytest.raises(ValueError, match="--recipe art: not one of demo, emoji"):
        recipes.read_flags("image", ["--recipe", "art"], SIZES)


def test_without_a_longest_gradient_none_is_shortened(folder, tmp_path):
    flags = "--optimizer", "adamw", "--lr", "1e-3", "--precision", "fp32", "--steps", "2"
    for name, longest in (("none", "0"), ("far", "1e9"), ("near", "1e-9")):
        image(folder, tmp_path / name, *flags, "--max-norm", longest)
    none, far, near = (weights.read(tmp_path / name / "model.safetensors")[0] for name in ("none", "far", "near"))
    assert all(torch.equal(none[key], far[key]) for key in none)
    assert not all(torch.equal(none[key], near[key]) for key in none)


def test_the_learning_rate_rises_stays_and_falls():
    rates = [learning_rate(step, steps=100, warmup=9, cooldown=0.5) for step in range(100)]
    assert rates[0] == 0.1 and rates[9] == rates[49] == 1.0 and rates[75] == 0.5 and 0 < rates[99] <= 0.02


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_what_is_freed_in_pieces_goes_back_to_the_system(folder, tmp_path, monkeypatch):
    resident = lambda: int(Path("/proc/self/statm").read_text().split()[1]) * 4096 / 2**20
    pieces = [torch.ones(2**14) for _ in range(4000)]  # 64 KiB each; every tenth stays, so that the rest cannot go by itself
    pieces = pieces[::10]
    before = resident()
    logging.trim(torch.device("cpu"))
    assert before - resident() > 150 and all(piece.sum() == 2**14 for piece in pieces)
    calls = []
    monkeypatch.setattr(logging, "trim", calls.append)
    image(folder, tmp_path, "--steps", "20")
    assert calls == [torch.device("cpu")]


def test_muon_equals_torchs(monkeypatch):
    """torch.optim.Muon with its bf16 iteration moved to fp32, and with its polynomials here; wide, tall and square matrices, a
    few steps."""
    torch.manual_seed(0)
    ours = [torch.nn.Parameter(torch.randn(*shape)) for shape in ((6, 10), (10, 6), (8, 8))]
    theirs = [torch.nn.Parameter(p.detach().clone()) for p in ours]
    monkeypatch.setattr(torch.Tensor, "bfloat16", torch.Tensor.float)
    monkeypatch.setattr(optimizers, "orthogonalise", lambda u: orthogonalise(u, [(3.4445, -4.7750, 2.0315)] * 5))
    a = Muon(ours, lr=0.02, weight_decay=0.1)
    b = torch.optim.Muon(theirs, lr=0.02, weight_decay=0.1, adjust_lr_fn="match_rms_adamw")
    for _ in range(4):
        for p, q in zip(ours, theirs):
            p.grad = torch.randn_like(p)
            q.grad = p.grad.clone()
        a.step()
        b.step()
    for p, q in zip(ours, theirs):
        torch.testing.assert_close(p, q, rtol=1e-4, atol=1e-5)


def test_orthogonalise_levels_the_singular_values():
    u = torch.randn(3, 12, 20, dtype=torch.float64)
    s = torch.linalg.svdvals(orthogonalise(u))
    assert s.min() > 0.4 and s.max() < 1.3
    exact = torch.linalg.svd(u, full_matrices=False)
    assert ((orthogonalise(u) * (exact.U @ exact.Vh)).sum((1, 2)) > 0.8 * 12).all()


@pytest.mark.parametrize(
    "arguments,message",
    [
        (["picture"], "say what to train: python train.py autoencoder|image|video"),
        (["image", "--batchsize", "4"], "unknown flag --batchsize; did you mean --batch-size?"),
        (["image", "--size", "huge"], "--size huge: not one of mini, S, B, L, XL, G"),
        (["image", "--steps", "many"], "--steps many: not a whole number"),
        (["image", "--lr"], "--lr: expected one argument"),
        (["image", "extra"], "'extra' is not a flag"),
        (["image", "--data", "/no/folder"], "--data /no/folder: there is no such folder"),
        (["image", "--image-size", "50"], "--image-size 50: must be a multiple of 16"),
        (["image", "--device", "banana"], "--device banana: not to be had"),
        (["autoencoder", "--latent-channels", "-1"], "--latent-channels -1: must be from 0 to 192"),
        (["autoencoder", "--latent-channels", "300"], "--latent-channels 300: must be from 0 to 192"),
        (["image", "--seed", "-1"], "--seed -1: must be from 0 to 1000000000"),
        (["image", "--seed", "20240101123456"], "--seed 20240101123456: must be from 0 to 1000000000"),
        (["image", "--batch-size", "0"], "--batch-size 0: must be at least 1"),
        (["image", "--schedule", "round"], "--schedule round: not one of cosine, linear"),
        (["video"], "no model.safetensors in runs/image-shapes"),
        (["video", "--frames", "1"], "--frames 1: must be at least 2"),
        (["video", "--p-motion-free", "2"], "--p-motion-free 2.0: must be from 0 to 0.99"),
        (["video", "--own-timesteps", "2"], "--own-timesteps 2.0: must be from 0 to 1"),
        (["image", "--attention", "none"], "--attention none: not one of auto, fused, written"),
        (["image", "--precision", "fp16"], "--precision fp16: not one of auto, fp32, bf16"),
        (["image", "--integration", "none"], "--integration none: not one of cross, adaln"),
        (["autoencoder", "--resume", "--out", "/tmp/no-run-here"], "--resume: there is no"),
    ],
)
def test_a_users_mistake_gets_one_line(arguments, message, tmp_path):
    result = subprocess.run([sys.executable, ROOT / "train.py", *arguments], capture_output=True, text=True, cwd=tmp_path)
    assert result.returncode != 0 and message in result.stderr and "Traceback" not in result.stderr, result.stderr
    assert len(result.stderr.strip().splitlines()) == 1 and not list(tmp_path.iterdir())


def test_a_new_run_in_an_old_ones_folder_keeps_its_own_checkpoints(folder, tmp_path):
    """It may be shorter than the old one, and steps count as numbers, not as words."""
    image(folder, tmp_path)
    image(folder, tmp_path, "--steps", "4", "--checkpoint-every", "2", "--overwrite")
    assert [path.name for path in checkpoints.folders(tmp_path)] == ["000002", "000004"]
    state = {"model.w": torch.zeros(1)}
    for step in (999_999, 1_000_000, 1_000_001):
        checkpoints.save(tmp_path / "long", step, {}, state)
    assert [path.name for path in checkpoints.folders(tmp_path / "long")] == ["1000000", "1000001"]


@pytest.mark.parametrize("frames", [5, 6, 8])
def test_steps_of_few_frames_see_all_of_them_in_order(frames):
    curriculum = (1, 100, 100)
    seen = [tricks.frames_seen(k, frames, curriculum, torch.Generator().manual_seed(k)) for k in range(202)]
    assert seen[0].tolist() == [frames - 1] and seen[201].tolist() == list(range(frames))
    for chosen, K in ((seen[1:101], 2), (seen[101:201], 4)):
        assert all(len(numbers) == K and (numbers.diff() > 0).all() for numbers in chosen)
        assert set(torch.cat(chosen).tolist()) == set(range(frames))


@pytest.mark.parametrize(
    "arguments,message",
    [
        (["image", "--shard", "-1"], "--shard -1: must be at least 0"),
        (["image", "--cache", "somewhere"], "--cache somewhere: name the pictures that it was made of too, by --data"),
        (["image", "--init", "run", "--shift", "3"], "--shift: the run that --init names has its own, which stays"),
        (["video", "--learned-variance"], "--learned-variance: the run that --init names has its own, which stays"),
        (["image", "--dry-run", "8", "--batch-size", "12"], "--batch-size 12: not a multiple of 8 GPUs times --accumulate 1"),
    ],
)
def test_flags_that_make_no_sense_are_named(arguments, message):
    with pytest.raises(ValueError, match=message):
        train.main(arguments)


class Evil:
    def __reduce__(self):
        return (Path("evil").touch, ())


def test_checkpoints_that_cannot_be_used_are_named(folder, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    image(folder, tmp_path / "run")
    checkpoint = checkpoints.folders(tmp_path / "run")[-1]
    shutil.rmtree(checkpoints.folders(tmp_path / "run")[0])
    (tmp_path / "run/run.json").unlink()
    again = lambda *flags: image(folder, tmp_path / "run", "--resume", *flags)
    with pytest.raises(ValueError, match="made with --integration cross, not adaln"):
        again("--integration", "adaln")
    for path in (checkpoint / "__0_0.distcp", checkpoint / ".metadata"):
        good = path.read_bytes()
        path.write_bytes(good[: len(good) // 2])
        with pytest.raises(ValueError, match="no checkpoint in .* can be read"):
            again()
        path.write_bytes(pickle.dumps(Evil()))
        with pytest.raises(ValueError, match="it holds|no checkpoint in .* can be read"):
            again()
        assert not Path("evil").exists()
        path.write_bytes(good)
    again()
    assert not Path("evil").exists()
    model = tmp_path / "run" / "model.safetensors"
    content = model.read_bytes()
    model.write_bytes(content[: len(content) // 2])
    with pytest.raises(ValueError, match="model.safetensors is not a whole safetensors file"):
        Pipeline.load(tmp_path / "run")
    with pytest.raises(ValueError, match="is not a model of train.py image"):
        Pipeline.load(folder.parent / "ae")
    with pytest.raises(ValueError, match="no model.safetensors in"):
        Pipeline.load(tmp_path)
