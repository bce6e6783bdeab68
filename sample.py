"""A prompt → a picture, or a clip.

    python sample.py "a striped red circle above a blue square" "a small green cross"
    python sample.py --frames 8 --lambda-t 7.5 --lambda-m 1.2 "a red circle moving left"
    python sample.py --prompts color_val.txt --per-prompt 10 --out color

The command reads the newest image run, with --frames the newest video run, or --checkpoint DIR. It writes a
grid of pictures to samples.png. With --frames it writes an animation to clips.gif (--out NAME.webp or
NAME.mp4) and all frames of it to clips.png.

--prompts reads a list of prompts: one a line, as T2I-CompBench has them, or a table with tabs and a column
"Prompt", as PartiPrompts. It writes the folder that T2I-CompBench's scripts read: PROMPT_NUMBER.png in
OUT/samples. Pictures that are there already stay. Under torchrun each process draws its share.

`Pipeline` is what a prompt passes through: tokenizer → text encoder → diffusion transformer, called by a
sampler under guidance → autoencoder. Letters: B batch, F frames, C latent channels, L text tokens, E width of
an encoder.
"""
import hashlib
import json
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn
from tqdm import tqdm

from attention import use_attention
from common.figures import to_bytes
from common.files import FORMAT, check_format, newest_run
from common.flags import SEEDS, flag, read, run_command
from common.hardware import PRECISIONS, device_of, precision_of, products_in
from data import prompt_lists
from diffusion import SAMPLERS, Diffusion, classifier_free_guidance, gaussian, motion_free_guidance
from dit import GenTron, ModelConfig
from encoders import weights
from encoders.autoencoders import build
from encoders.t5 import T5Config, T5Encoder, Tokenizer
from encoders.text import LOADERS


class Pipeline(nn.Module):
    """All parts of a text-to-image or text-to-video model.

    config: a dictionary that is saved with the weights. "model", "diffusion" and "autoencoder" hold the
    arguments of those classes; "text" those of the mini T5, which trains along, or "published" the folders of
    frozen encoders, {"clip": DIR, "t5": DIR} or one of the two; "image_size" and, of a video model, "frames";
    "words" those of the training captions, if known; "flags" and "processor" tell how it was trained.
    tokenizer: the mini T5's. empty: the transformer has no values yet. ValueError for a bad folder."""

    def __init__(self, config, tokenizer=None, empty=False):
        super().__init__()
        self.config = config
        self.tokenizer = tokenizer
        self.precision = "fp32"  # or "bf16": of the products in `generate`
        with torch.device("meta" if empty else "cpu"):
            self.transformer = GenTron(ModelConfig(**config["model"]))
        published = config.get("published")
        if published:
            parts = [LOADERS[name](folder, torch.bfloat16) for name, folder in published.items()]
        else:
            parts = [(tokenizer, T5Encoder(T5Config(**config["text"])))]
        self.tokenizers = [tokenizer for tokenizer, _ in parts]
        self.text_encoders = nn.ModuleList(encoder for _, encoder in parts).requires_grad_(not published)
        self.autoencoder = build(config["autoencoder"]).requires_grad_(False)
        self.diffusion = Diffusion(**config["diffusion"])

    @property
    def device(self):
        return self.autoencoder.shift.device

    def on(self, device, precision="auto"):
        """Moves to a device. Products are of this precision; "auto": as in training, on its processor."""
        before = dict(processor=self.config.get("processor"), precision=self.config["flags"].get("precision"))
        self.precision = precision_of(precision, device, before)
        return self.to(device)

    def tokenize(self, captions):
        """List of B captions → for each encoder its tokens (B, L), and a mask (B, L), True = a token."""
        return [tokenizer(captions) for tokenizer in self.tokenizers]

    def encode_text(self, text):
        """The result of `tokenize` → each encoder's vectors (B, L, E), and masks, in a list each. What is
        vectors already, from a cache, stays."""
        texts, masks = [], []
        for encoder, (tokens, mask) in zip(self.text_encoders, text):
            tokens, mask = tokens.to(self.device), mask.to(self.device)
            texts.append(tokens if tokens.is_floating_point() else encoder(tokens, mask))
            masks.append(mask)
        return texts, masks

    @torch.no_grad()
    def generate(
        self, prompts, seed=0, sampler="sde", steps=16, lambda_t=2.0, lambda_m=1.0, rescale=0.0,
        interval=(0.0, 1.0), frames=0, size=None,
    ):
        """List of B prompts → pictures (B, 3, H, W) uint8, or from a video model clips (B, F, 3, H, W).

        A prompt's result depends on the prompt and the seed (one for all, or a list) alone, up to rounding: a
        batch of another size is multiplied by other kernels. lambda_t, lambda_m, rescale, interval: the
        guidance of diffusion.py. frames: F, and size: (H, W), if not as the model was trained. ValueError for
        a number of steps that is not possible, or frames of an image model."""
        seeds = seed if isinstance(seed, list) else [seed] * len(prompts)
        generators = [generator_of(prompt, seed) for prompt, seed in zip(prompts, seeds)]
        x = gaussian(self.latent_shape(frames, size), generators).to(self.device)  # (B, [F,] C, h, w)
        model = self.guided(prompts, lambda_t, lambda_m, rescale, interval)
        x = SAMPLERS[sampler](model, self.diffusion, x, steps, generators)
        return self.decode(x)

    def latent_shape(self, frames=0, size=None):
        """([F,] C, h, w)"""
        H, W = size or (self.config["image_size"],) * 2
        shape = (self.transformer.config.channels, H // self.autoencoder.factor, W // self.autoencoder.factor)
        if self.transformer.config.temporal:
            return (frames or self.config["frames"], *shape)
        if frames:
            raise ValueError("--frames: this is an image model; train one of clips: `python train.py video`")
        return shape

    def guided(self, prompts, lambda_t, lambda_m, rescale, interval):
        """The model(x, t) that a sampler calls: the transformer under guidance."""
        with products_in(self.precision, self.device):
            texts, masks = self.encode_text(self.tokenize(prompts))

        kept = {}  # keys and values of the texts, by the number of rows that guidance makes of the batch

        def predict(x, t, **condition):
            condition["kept"] = kept.setdefault(len(x), {})
            with products_in(self.precision, self.device):
                return self.transformer(x, t, **condition).to(x.dtype)  # guidance and sampler compute in fp32

        no = torch.zeros(len(prompts), dtype=torch.bool, device=self.device)
        given = dict(text=texts, text_mask=masks, dropped=no, motion_free=no)  # (c_T, c_M)
        null_text = given | dict(dropped=~no)  # (∅, c_M)
        neither = given | dict(dropped=~no, motion_free=~no)  # (∅, ∅)
        options = rescale, interval, self.diffusion.steps
        if self.transformer.config.temporal:
            return motion_free_guidance(predict, given, null_text, neither, lambda_t, lambda_m, *options)
        return classifier_free_guidance(predict, given, null_text, lambda_t, *options)

    def decode(self, x):
        """Latents (B, [F,] C, h, w) → (B, [F,] 3, H, W) uint8, 64 pictures at a time."""
        parts = x.reshape(-1, *x.shape[-3:]).split(64)
        pictures = torch.cat([to_bytes(self.autoencoder.decode(part)).cpu() for part in parts])
        return pictures.view(*x.shape[:-3], *pictures.shape[1:])

    def save(self, path, state=None):
        """Writes weights (`state`, if given), config and tokenizer to one file."""
        state = dict(state or self.state_dict())
        if "published" in self.config:  # their folders are named in the config
            state = {name: tensor for name, tensor in state.items() if not name.startswith("text_encoders.")}
        else:
            state["tokenizer"] = torch.frombuffer(bytearray(self.tokenizer.model), dtype=torch.uint8)
        weights.write(path, state, {"config": json.dumps(self.config), "format": str(FORMAT)})

    @classmethod
    def load(cls, folder, **published):
        """The model of a run's folder, or of its model.safetensors. published: folders of encoders that have
        moved, clip=DIR, t5=DIR. ValueError, naming the file, if there is none or it does not fit."""
        path = Path(folder) if Path(folder).is_file() else Path(folder) / "model.safetensors"
        if not path.exists():
            raise ValueError(f"no model.safetensors in {folder}: is it a run of train.py image?")
        tensors, metadata = weights.read(path)
        check_format(path, metadata.get("format"))
        try:
            config = json.loads(metadata["config"])
            tokenizer = None
            if "published" in config:
                own = config["published"]
                own |= {name: moved for name, moved in published.items() if moved and name in own}
            else:
                tokenizer = Tokenizer(tensors.pop("tokenizer").numpy().tobytes())
            model = cls(config, tokenizer, empty=True)
            model.transformer.to_empty(device="cpu")
            if "published" in config:
                tensors |= model.text_encoders.state_dict(prefix="text_encoders.")
            model.load_state_dict(tensors)
        except (KeyError, TypeError, ValueError, RuntimeError) as error:
            reason = f"as the code is now: {' '.join(str(error).split())[:300]}"
            raise ValueError(f"{path} is not a model of train.py image, {reason}") from None
        for name, moved in published.items():
            if moved and name not in config.get("published", {}):
                raise ValueError(f"--{name} {moved}: {path} was trained without it; leave it out")
        return model.eval()


def generator_of(prompt, seed):
    """The random numbers of a prompt's picture, from prompt and seed alone."""
    key = hashlib.sha256(f"{seed} {prompt}".encode(errors="replace")).digest()[:7]
    return torch.Generator().manual_seed(int.from_bytes(key, "little"))


# ------------------------------------------------------------------------------------------- the command


@dataclass
class Flags:
    checkpoint: str = flag("", "a run's folder; the newest run if not given", group="model")
    clip: str = flag("", "the folder of the published CLIP, if it has moved since the training")
    t5: str = flag("", "the folder of the published T5, if it has moved since the training")
    prompts: str = flag("", "a file of prompts", group="what to draw")
    per_prompt: int = flag(1, "samples of each prompt of --prompts", low=1, high=10_000)
    seed: int = flag(0, "another seed is another picture", low=0, high=SEEDS)
    frames: int = flag(0, "of a clip, from a video model; 0: as it was trained", low=0, high=1000)
    image_size: str = flag("", "pixels each way, or HEIGHTxWIDTH, if not as trained")
    sampler: str = flag("sde", "a solver's name", choices=tuple(SAMPLERS), group="sampling")
    steps: int = flag(16, "calls of the model", low=1, high=1000)
    lambda_t: float = flag(2.0, "guidance by text; 1: none", low=0, high=100)
    lambda_m: float = flag(1.0, "clips: guidance by motion; 1: none", low=0, high=100)
    rescale: float = flag(0.0, "pulls guided outputs back to the plain ones' spread", low=0, high=1)
    guide: str = flag("0,1", "guide between these noise levels, 0 = clean, 1 = noise")
    out: str = flag("", "a file (samples.png, clips.gif); with --prompts a folder (samples)", group="output")
    grid: bool = flag(False, "with --prompts: one grid in place of a folder")
    zoom: int = flag(3, "how many times larger a grid shows a picture", low=1)
    fps: int = flag(4, "clips: frames a second, of the file", low=1, high=1000)
    batch_size: int = flag(32, "prompts drawn together", low=1, group="hardware")
    precision: str = flag("auto", "of products; auto: as in training, on its processor", choices=PRECISIONS)
    attention: str = flag("auto", "auto: fused on a GPU", choices=("auto", "fused", "written"))
    device: str = flag("auto", "auto, cpu, cuda, mps")


def main(arguments):
    about = __doc__.partition("\n")[0]
    flags, given, prompts = read(Flags, arguments, "python sample.py", about, words="PROMPT")
    prompts = prompt_lists.prompts_of(prompts, flags.prompts)
    size = prompt_lists.read_size(flags.image_size) if flags.image_size else None
    interval = prompt_lists.read_interval(flags.guide)
    folder = flags.checkpoint or newest_run("video" if flags.frames else "image")
    device = device_of(flags.device)
    model = Pipeline.load(folder, clip=flags.clip, t5=flags.t5).on(device, flags.precision)
    use_attention(model, flags.attention)
    clips, into_folder = model.transformer.config.temporal, flags.prompts and not flags.grid
    prompt_lists.check_flags(flags, given, clips)
    out = prompt_lists.output_of(flags.out, into_folder, clips, flags.fps)
    prompt_lists.print_notes(prompts, model.config["words"], model.tokenizers)

    guidance = flags.lambda_t, flags.lambda_m, flags.rescale, interval
    options = flags.sampler, flags.steps, *guidance, flags.frames, size

    def draw(samples):
        """List of (prompt, seed) → yields a picture or clip for each."""
        for i in tqdm(range(0, len(samples), flags.batch_size), desc="sampling", disable=None):
            prompts, seeds = map(list, zip(*samples[i : i + flags.batch_size]))
            yield from model.generate(prompts, seeds, *options)

    samples = [(prompt, flags.seed + k) for prompt in prompts for k in range(flags.per_prompt)]
    *frames, _, h, w = model.latent_shape(flags.frames, size)
    shape = (*frames, 3, h * model.autoencoder.factor, w * model.autoencoder.factor)
    count = f"{len(samples)} {'clip' if clips else 'picture'}{'s' * (len(samples) > 1)}"
    if into_folder:
        count = f"{prompt_lists.write_folder(draw, samples, out, shape, flags.fps)} new of {count}"
    else:
        prompt_lists.write_grid(draw, samples, out, shape, flags.fps, flags.zoom)
    print(f"{count} from {folder}, {model.precision} products → {out}")


if __name__ == "__main__":
    run_command(main)
