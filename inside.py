"""What happens inside of a model while it draws one prompt.

    python inside.py "a red circle above a blue square"     the newest image run; pictures in inside/
    python inside.py --video "a red circle moving left"     the newest video run; in inside-clip/
    python inside.py --serve                                both, as a page of this machine

    steps.png       noisy latents x_t, and the x_0 that the model predicts from them, decoded
    terms.png       the terms of guidance in x_0: each alone, and their sum
    words.png       cross-attention: where each word is read, block by block; words-by-step.png, step by step;
                    of clips also words-by-frame.png
    patch.png       self-attention: what one patch reads, block by block
    frames.png      temporal attention: which frame reads which; beside it, the motion-free mask
    schedule.png    the noise schedule; positions.png, the positions of patches (and frames)

This is a hook, not a second model. `Watch` makes every layer compute the written-out attention and keeps its
weights, averaged over heads, while `Pipeline.generate` runs as it always does.

Letters: S steps, K passes of guidance, F frames, N image tokens a frame, C latent channels, L text tokens.
"""
import base64
import contextlib
import functools
import io
import itertools
import time
from dataclasses import dataclass
from pathlib import Path

import torch
from PIL import Image

from attention import written_out_attention
from common import figures
from common.figures import to_bytes
from common.files import newest_run
from common.flags import SEEDS, check, dashed, flag, read, run_command
from common.hardware import device_of
from common.serve import serve
from data import prompt_lists
from diffusion import SAMPLERS, split_channels
from dit import position_embedding, sincos
from sample import Pipeline
from temporal import motion_free_mask

PAGE = Path(__file__).parent / "evaluation" / "inside.html"
MOST_SHOWN = 8  # steps of a sheet


class Watch:
    """with Watch(transformer) as watch: … records each call that draws one prompt: `calls` has a dictionary
    for each step, with x ([F,] C, h, w), t, outputs (K, [F,] C, h, w), and the cross-attention of the first
    pass, (F·N, L + M) for each block. `sums` adds up the other attention of that pass over the steps:
    {("self", block): (F, N, N), ("temporal", block): (F, F)}, the latter averaged over patches.
    still: the motion-free mask holds in all passes, so that a clip becomes separate pictures."""

    def __init__(self, transformer, still=False):
        self.transformer, self.still, self.calls, self.sums = transformer, still, [], {}

    def __enter__(self):
        hook = self.transformer.register_forward_pre_hook(self.before, with_kwargs=True)
        self.hooks = [hook, self.transformer.register_forward_hook(self.after)]
        self.attends = {}  # what each layer computed with
        for k, block in enumerate(self.transformer.blocks):
            for name, branch in (("self", block.self_attention), ("cross", block.cross_attention),
                                 ("temporal", block.temporal)):
                if branch is not None:
                    layer = getattr(branch, "attention", branch)
                    self.attends[layer] = layer.attend
                    layer.attend = functools.partial(self.attend, name, k)
        return self

    def __exit__(self, *error):
        for hook in self.hooks:
            hook.remove()
        for layer, attend in self.attends.items():
            layer.attend = attend

    def before(self, transformer, inputs, named):
        x, t = inputs  # (K, [F,] C, h, w), (K,)
        self.calls.append(dict(x=x[0].cpu(), t=t[0].item(), K=len(x), cross=[]))
        if self.still:
            named = named | dict(motion_free=torch.ones_like(named["motion_free"]))
        return inputs, named

    def after(self, transformer, inputs, output):
        prediction, _ = split_channels(output, inputs[0])
        self.calls[-1]["outputs"] = prediction.float().cpu()

    def attend(self, name, block, q, k, v, mask=None):
        """Attention to a unit matrix gives the weights themselves."""
        unit = torch.eye(k.shape[-2], dtype=v.dtype, device=v.device)
        weights = written_out_attention(q, k, unit, mask)  # (rows, H, queries, keys)
        rows = len(q) // self.calls[-1]["K"]  # of the first pass, which has the text and the motion
        kept = weights[:rows].float().mean(1).cpu()  # (rows, queries, keys)
        if name == "cross":
            self.calls[-1]["cross"].append(kept[0])
        else:
            found = kept if name == "self" else kept.mean(0)
            self.sums[name, block] = self.sums.get((name, block), 0) + found
        return weights @ v

    def mean(self, name):
        """The mean over the steps, of all blocks: (blocks, …), or None if no block has such a branch."""
        found = [total / len(self.calls) for (kind, _), total in self.sums.items() if kind == name]
        return torch.stack(found) if found else None


class Inside:
    """All that is seen while `model`, a Pipeline, draws one prompt. prompt and sampling: as
    Pipeline.generate takes them. ValueError as there."""

    def __init__(self, model, prompt, seed, sampler, steps, lambda_t, lambda_m):
        with Watch(model.transformer) as watch:
            made = model.generate([prompt], seed, sampler, steps, lambda_t, lambda_m)
        calls, self.model, self.prompt = watch.calls, model, prompt
        self.clip = made.ndim == 5
        self.result = made[0] if self.clip else made  # (F, 3, H, W) uint8, F = 1 for a picture
        self.times = [call["t"] for call in calls]
        self.x = torch.stack([call["x"] for call in calls])  # (S, [F,] C, h, w)
        self.terms = torch.stack([self.terms_of(call, lambda_t, lambda_m) for call in calls], dim=1)
        self.x0 = self.terms.sum(0)  # (S, [F,] C, h, w)
        self.own = watch.mean("self")  # self-attention (blocks, F, N, N)
        self.temporal = watch.mean("temporal")  # (blocks, F, F), or None
        self.words, self.cross = [], None  # (S, blocks, F, N, words)
        if calls[0]["cross"]:
            self.words = [*prompt.split(), "(end)"]
            maps = [words_of_tokens(tokenizer, self.words[:-1]) for tokenizer in model.tokenizers]
            self.cross = torch.stack([self.by_words(call["cross"], maps) for call in calls])

    def terms_of(self, call, lambda_t, lambda_m):
        """The terms whose sum is the guided x_0, by diffusion.py's formulas. These hold for x_0 too, which is
        linear in the output. (terms, [F,] C, h, w), terms = K."""
        x, t = call["x"].expand_as(call["outputs"]), torch.full((call["K"],), call["t"])
        x0, _ = self.model.diffusion.x0_and_noise(x, call["outputs"], t)  # (K, [F,] C, h, w)
        if len(x0) == 1:
            return x0
        if len(x0) == 2:
            text, null = x0
            return torch.stack([null, lambda_t * (text - null)])
        both, motion, nothing = x0
        return torch.stack([nothing, lambda_t * (both - motion), lambda_m * (motion - nothing)])

    def by_words(self, blocks, maps):
        """Cross-attention (F·N, L + M) of each block → (blocks, F, N, words): weights of a word's tokens
        added, those of the null text left out. maps: (L, words) of each encoder."""
        found = []
        for weights, tokens in zip(blocks, itertools.cycle(maps)):  # the encoders take turns
            found.append(weights[:, : len(tokens)] @ tokens)  # (F·N, words)
        return torch.stack(found).unflatten(1, (len(self.result), -1))

    @property
    def cells(self):
        """Rows and columns of patches."""
        h, w = self.x.shape[-2:]
        return h // self.model.transformer.config.patch, w // self.model.transformer.config.patch

    def decoded(self, latents):
        """([F,] C, h, w) with dimensions before → pictures (…, 3, H, W) in -1…1."""
        with torch.no_grad():
            flat = latents.reshape(-1, *latents.shape[-3:]).to(self.model.device)
            pictures = torch.cat([self.model.autoencoder.decode(part).cpu() for part in flat.split(64)])
        return pictures.view(*latents.shape[:-3], *pictures.shape[1:])

    def lit(self, weights, most, frame):
        """A frame of the result, bright where the weights (N,) of its patches are near `most`: (3, H, W)
        uint8."""
        light = (weights / most.clamp(min=1e-9)).view(1, 1, *self.cells)
        picture = self.result[frame]
        light = torch.nn.functional.interpolate(light, picture.shape[-2:])[0]  # (1, H, W)
        return (picture * (0.15 + 0.85 * light)).to(torch.uint8)


def words_of_tokens(tokenizer, words):
    """(L, words + 1): which token belongs to which word; the last column is the end of the text."""
    _, mask = tokenizer([" ".join(words)])
    ahead = int(tokenizer([""])[1].sum()) - 1  # a token before the text: CLIP's
    found = torch.zeros(mask.shape[1], len(words) + 1)
    ends = [ahead + len(tokenizer.encode(" ".join(words[:k]))) for k in range(len(words) + 1)]
    for column, (start, end) in enumerate(itertools.pairwise(ends)):
        found[start:end, column] = 1
    found[-1] = torch.eye(len(words) + 1)[-1]
    return found


# ---------------------------------------------------------------------------------------------- the pictures


def sheets(seen, patch):
    """Yields (name, Pillow image) for all that the docstring above lists. patch: the number of a patch."""
    count, frame, F = len(seen.times), len(seen.result) // 2, len(seen.result)
    shown = torch.linspace(0, count - 1, min(MOST_SHOWN, count)).round().int().tolist()  # first and last too
    a_frame = (lambda pictures: pictures[:, frame]) if seen.clip else (lambda pictures: pictures)
    pictures = [to_bytes(a_frame(seen.decoded(part[shown]))) for part in (seen.x, seen.x0)]
    times = [f"t {seen.times[k]}" for k in shown]
    names = [f"{name}, {t}" for name in ("x_t", "x_0") for t in times]
    yield "steps", figures.grid(torch.cat(pictures), names, len(shown))

    base = seen.decoded(seen.terms[0, shown])  # (shown, [F,] 3, H, W)
    changes = [seen.decoded(seen.terms[0, shown] + term[shown]) - base for term in seen.terms[1:]]
    parts = [to_bytes(a_frame(part)) for part in (base, *changes, seen.decoded(seen.x0[shown]))]
    kinds = ["without text", "what the text changes", "what motion changes"][: len(seen.terms)] + ["the sum"]
    kinds = kinds if len(seen.terms) > 1 else ["the model, without guidance", "the same"]
    names = [f"{kind}, {t}" for kind in kinds for t in times]
    yield "terms", figures.grid(torch.cat(parts), names, len(shown))

    blocks = range(len(seen.own))
    if seen.cross is not None:  # (S, blocks, F, N, words)
        by_block = seen.cross[:, :, frame].mean(0)  # (blocks, N, words)
        yield "words", words(seen, by_block, [f"block {k + 1}" for k in blocks], [frame] * len(blocks))
        by_step = seen.cross[shown, :, frame].mean(1)  # (shown, N, words)
        yield "words-by-step", words(seen, by_step, times, [frame] * len(shown))
        if seen.clip:
            by_frame = seen.cross.mean((0, 1))  # (F, N, words)
            yield "words-by-frame", words(seen, by_frame, [f"frame {f + 1}" for f in range(F)], range(F))

    chosen = torch.nn.functional.one_hot(torch.tensor(patch), seen.own.shape[-1]).float()  # (N,)
    read = [chosen, *seen.own[:, frame, patch]]  # (N,) each: the patch, and what each block reads
    tiles = [seen.lit(weights, weights.max(), frame) for weights in read]
    names = ["the patch", *(f"block {k + 1}" for k in blocks)]
    yield "patch", figures.grid(torch.stack(tiles), names, len(tiles))

    if seen.temporal is not None:
        mask = motion_free_mask(torch.tensor([True]), F, 1)[0, 0].float()
        maps = torch.stack([*seen.temporal / seen.temporal.max(), mask])  # (blocks + 1, F, F)
        tiles = (255 * maps).to(torch.uint8).unsqueeze(1).expand(-1, 3, -1, -1)
        names = [*(f"block {k + 1}" for k in blocks), "motion-free mask"]
        yield "frames", figures.grid(tiles, names, len(tiles), zoom=max(1, 96 // F))

    diffusion, config = seen.model.diffusion, seen.model.transformer.config
    t = range(diffusion.steps)
    series = {"alpha": (t, diffusion.alpha_bar.sqrt()), "sigma": (t, (1 - diffusion.alpha_bar).sqrt())}
    yield "schedule", figures.curves(series, "x_t = alpha x_0 + sigma noise, over t", logarithmic=False)
    positions = [position_embedding(*seen.cells, config.width, config.position_step)]  # (N, D)
    if seen.clip:
        positions.append(sincos(config.frame_step * torch.arange(F), config.width))  # (F, D)
    tall = max(map(len, positions))
    tiles = [torch.nn.functional.pad(part, (0, 0, 0, tall - len(part)), value=1) for part in positions]
    tiles = to_bytes(torch.stack(tiles)).unsqueeze(1).expand(-1, 3, -1, -1)
    names = ["a row for each patch: its position", "a row for each frame"][: len(tiles)]
    yield "positions", figures.grid(tiles, names, 1, zoom=4)


def words(seen, weights, rows, frames):
    """Where each word is read: weights (rows, N, words), with the name and the frame of each row. A word is
    as bright as its largest weight of all rows allows."""
    most = weights.amax((0, 1))  # (words,)
    places = [(r, w) for r in range(len(rows)) for w in range(len(most))]
    tiles = [seen.lit(weights[r, :, w], most[w], frames[r]) for r, w in places]
    names = [f"{rows[r]}: {seen.words[w]}" for r, w in places]
    return figures.grid(torch.stack(tiles), names, len(most), zoom=max(1, 128 // tiles[0].shape[-1]))


def write(seen, patch, out):
    """Writes all sheets, and the result, into a folder."""
    out.mkdir(parents=True, exist_ok=True)
    if seen.clip:
        figures.animation(seen.result[None], [seen.prompt], 4, out / "result.gif", zoom=3)
    else:
        figures.grid(seen.result, [seen.prompt], zoom=3).save(out / "result.png")
    for name, sheet in sheets(seen, patch):
        sheet.save(out / f"{name}.png")


# -------------------------------------------------------------------------------------------------- the page


def png(picture):
    """(3, H, W) uint8 → the address of a picture in a page."""
    file = io.BytesIO()
    Image.fromarray(picture.permute(1, 2, 0).numpy()).save(file, "PNG")
    return "data:image/png;base64," + base64.b64encode(file.getvalue()).decode()


def packed(weights):
    """Weights of any shape → a dictionary for JSON."""
    data = base64.b64encode(weights.float().contiguous().numpy().tobytes()).decode()
    return dict(shape=list(weights.shape), data=data)


def described(seen):
    """All that the page shows, for JSON."""
    parts = dict(words=seen.words, times=seen.times, cells=seen.cells)
    parts["result"] = [png(frame) for frame in seen.result]
    for name, latents in (("x", seen.x), ("x0", seen.x0)):
        first = latents[:, 0] if seen.clip else latents  # frames
        parts[name] = [png(picture) for picture in to_bytes(seen.decoded(first))]
    for name, weights in (("own", seen.own), ("cross", seen.cross), ("temporal", seen.temporal)):
        if weights is not None:
            parts[name] = packed(weights)
    return parts


@dataclass
class Question:
    """What the page asks for."""

    kind: str = flag("picture", "", choices=("picture", "clip"))
    prompt: str = flag("", "")
    seed: int = flag(0, "", low=0, high=SEEDS)
    steps: int = flag(16, "", low=1, high=100)
    sampler: str = flag("sde", "", choices=tuple(SAMPLERS))
    lambda_t: float = flag(2.0, "", low=0, high=100)
    lambda_m: float = flag(1.3, "", low=0, high=100)


def answerer(models):
    """The function that answers the page. models: {"picture": a Pipeline, "clip": one}, or one of the two."""

    def answer(asked):
        if asked == {"hello": True}:
            return dict(kinds=list(models), samplers=list(SAMPLERS))
        fields = Question.__dataclass_fields__
        for name, value in asked.items():
            kind = fields[name].type if name in fields else ()
            if not isinstance(value, (int, float) if kind is float else kind) or isinstance(value, bool):
                raise ValueError(f"{name}: not a value that this page sends")
        question = Question(**asked)
        try:
            for name in fields:
                check(question, name)
        except ValueError as error:
            raise ValueError(str(error).removeprefix("--")) from None
        if not question.prompt.split():
            raise ValueError("type a prompt")
        if question.kind not in models:
            raise ValueError(f"there is no run of a {question.kind}")
        model, start = models[question.kind], time.perf_counter()
        sampling = question.seed, question.sampler, question.steps, question.lambda_t, question.lambda_m
        prompt = " ".join(question.prompt.split())
        found = described(Inside(model, prompt, *sampling))
        if question.kind == "clip":
            with Watch(model.transformer, still=True):
                twin = model.generate([prompt], *sampling)[0]  # (F, 3, H, W)
            found["twin"] = [png(frame) for frame in twin]
        found["notes"] = prompt_lists.notes_on([prompt], model.config["words"], model.tokenizers)
        return found | dict(seconds=round(time.perf_counter() - start, 1))

    return answer


# ----------------------------------------------------------------------------------------------- the command


@dataclass
class Flags:
    checkpoint: str = flag("", "a run's folder; the newest run if not given", group="model")
    clip: str = flag("", "the folder of the published CLIP, if it has moved since the training")
    t5: str = flag("", "the folder of the published T5, if it has moved since the training")
    video: bool = flag(False, "a video run")
    patch: str = flag("", "ROW,COLUMN of the patch in patch.png, from 0; the middle if not given")
    seed: int = flag(0, "another seed is another picture", low=0, high=SEEDS, group="sampling")
    sampler: str = flag("sde", "a solver's name", choices=tuple(SAMPLERS))
    steps: int = flag(16, "calls of the model", low=1, high=1000)
    lambda_t: float = flag(2.0, "guidance by text; 1: none", low=0, high=100)
    lambda_m: float = flag(1.3, "with --video: guidance by motion; 1: none", low=0, high=100)
    out: str = flag("", "the folder of the pictures; inside, with --video inside-clip", group="output")
    serve: bool = flag(False, "a page in place of pictures")
    port: int = flag(8000, "of the page", low=1024, high=65535)
    device: str = flag("auto", "auto, cpu, cuda, mps")


def patch_of(text, cells):
    """"ROW,COLUMN" → the number of the patch; "": the middle one. ValueError if there is none such."""
    rows, columns = cells
    row, _, column = (text or f"{rows // 2},{columns // 2}").partition(",")
    if not (row.isdecimal() and column.isdecimal() and int(row) < rows and int(column) < columns):
        raise ValueError(f"--patch {text}: must be ROW,COLUMN, below {rows} and {columns}")
    return int(row) * columns + int(column)


def models_to_serve(flags, device):
    """{"picture": a Pipeline, "clip": one}: of --checkpoint, or of the newest runs."""
    folders = [flags.checkpoint] if flags.checkpoint else []
    for stage in ("video", "image") if not folders else ():
        with contextlib.suppress(ValueError):
            folders.append(newest_run(stage))
    folders = folders or [newest_run()]  # which says what to do
    models = [Pipeline.load(folder, clip=flags.clip, t5=flags.t5).on(device) for folder in folders]
    return {"clip" if model.transformer.config.temporal else "picture": model for model in models}


def main(arguments):
    about = __doc__.partition("\n")[0]
    flags, given, words = read(Flags, arguments, "python inside.py", about, words="PROMPT")
    device = device_of(flags.device)
    if flags.serve:
        if words or given - {"serve", "port", "checkpoint", "clip", "t5", "device"}:
            raise ValueError("--serve: the page has the rest; give only flags of the model, --port, --device")
        return serve(PAGE, answerer(models_to_serve(flags, device)), flags.port)
    if len(words) != 1:
        raise ValueError('give one prompt: python inside.py "a red circle above a blue square"')
    folder = flags.checkpoint or newest_run("video" if flags.video else "image")
    model = Pipeline.load(folder, clip=flags.clip, t5=flags.t5).on(device)
    if flags.video != model.transformer.config.temporal:
        found, advice = ("an image", "leave out") if flags.video else ("a video", "give")
        raise ValueError(f"{folder} holds {found} model: {advice} --video")
    if "lambda_m" in given and not flags.video:
        raise ValueError(f"--{dashed('lambda_m')} {flags.lambda_m}: of clips only; give --video too")
    prompt = " ".join(words[0].split())
    prompt_lists.print_notes([prompt], model.config["words"], model.tokenizers)
    _, h, w = model.latent_shape()[-3:]
    patch = model.transformer.config.patch
    number = patch_of(flags.patch, (h // patch, w // patch))
    sampling = flags.seed, flags.sampler, flags.steps, flags.lambda_t, flags.lambda_m
    out = Path(flags.out or ("inside-clip" if flags.video else "inside"))
    write(Inside(model, prompt, *sampling), number, out)
    print(f"what happens inside of {folder}, {model.precision} products → {out}/")


if __name__ == "__main__":
    run_command(main)
