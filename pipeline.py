"""What a prompt passes through, in one object: tokenizer → text encoder → diffusion transformer, called by a sampler under
guidance → autoencoder.

The text is read by a mini T5 that trained along with the transformer; or by published encoders, CLIP, T5 or both, which
stay as they are. A run's model.safetensors holds everything but published encoders: of those, the folders' names.
"""
import hashlib
import json
from pathlib import Path

import torch
from torch import nn

from encoders import autoencoder as autoencoders
from encoders import weights
from diffusion import SAMPLERS, Diffusion, gaussian, guided, guided_motion
from dit import GenTron, ModelConfig
from common.hardware import products_in
from encoders.t5 import CLIPConfig, T5Config, T5Encoder, Tokenizer, load_clip, load_t5

# Published encoders, by name: (folder, dtype) → tokenizer, encoder; their config.json; and how conditioning.py takes them.
LOADERS = {"clip": load_clip, "t5": load_t5}
READERS = {"clip": CLIPConfig, "t5": T5Config}
NULL_TOKENS, POOLING = {"clip": 77, "t5": 256}, {"clip": "last", "t5": "mean"}


class Pipeline(nn.Module):
    """config: a dictionary with "model", "diffusion" and "autoencoder" (the arguments of those classes' configs); "text",
    the mini T5's, or "published", {"clip": DIR, "t5": DIR} or one of the two; "image_size"; "words", those of the training
    captions if they are known, to tell a prompt's unknown ones. It is all that the checkpoint needs, with the weights and the tokenizer
    (of the mini T5), to rebuild this object. ValueError if a published folder is not what it should be."""

    def __init__(self, config, tokenizer=None, empty=False):
        super().__init__()
        self.config, self.tokenizer = config, tokenizer
        self.precision = "fp32"  # or "bf16": of the products in `generate`
        with torch.device("meta" if empty else "cpu"):  # empty: without values yet
            self.transformer = GenTron(ModelConfig(**config["model"]))
        if published := config.get("published"):
            read = [LOADERS[name](folder, torch.bfloat16) for name, folder in published.items()]
        else:
            read = [(tokenizer, T5Encoder(T5Config(**config["text"])))]
        self.tokenizers, encoders = zip(*read)
        self.text_encoders = nn.ModuleList(encoders).requires_grad_(not published)
        self.autoencoder = autoencoders.build(config["autoencoder"]).requires_grad_(False)
        self.diffusion = Diffusion(**config["diffusion"])

    @property
    def device(self):
        return self.autoencoder.shift.device

    @property
    def trained_in(self):
        """What hardware.precision_of takes: the processor that trained this model, and the precision chosen there."""
        return dict(processor=self.config.get("processor"), precision=self.config["flags"].get("precision"))

    def read(self, captions):
        """List of B texts → for each encoder its vectors (B, L, E) and a mask (B, L), True = a token: what the transformer
        takes as text and mask."""
        pairs = [[a.to(self.device) for a in tokenizer(captions)] for tokenizer in self.tokenizers]  # (B, L) each
        return tuple(encoder(*pair) for encoder, pair in zip(self.text_encoders, pairs)), tuple(mask for _, mask in pairs)

    def save(self, path, state=None):
        """Writes weights (`state`, if given, in place of the module's own), config and tokenizer as one safetensors."""
        state = dict(state or self.state_dict())
        if "published" in self.config:
            state = {name: tensor for name, tensor in state.items() if not name.startswith("text_encoders.")}
        else:
            state["tokenizer"] = torch.frombuffer(bytearray(self.tokenizer.model), dtype=torch.uint8)
        weights.write(path, state, {"config": json.dumps(self.config)})

    @classmethod
    def load(cls, folder, **published):
        """Rebuilds the model from a run's folder (or its model.safetensors). published: folders of encoders that have
        moved, clip=DIR, t5=DIR. ValueError, naming the file, if there is none or it does not fit."""
        path = Path(folder) if Path(folder).is_file() else Path(folder) / "model.safetensors"
        if not path.exists():
            raise ValueError(f"no model.safetensors in {folder}: is it the folder of a run of train.py image?")
        tensors, metadata = weights.read(path)
        try:
            config = json.loads(metadata["config"])
            tokenizer = Tokenizer(tensors.pop("tokenizer").numpy().tobytes()) if "tokenizer" in tensors else None
            config.get("published", {}).update({name: moved for name, moved in published.items() if moved})
            model = cls(config, tokenizer, empty=True)
            model.transformer.to_empty(device="cpu")
            missing, unexpected = model.load_state_dict(tensors, strict=False)
            missing = [name for name in missing if tokenizer or not name.startswith("text_encoders.")]
            if missing or unexpected:
                raise ValueError(f"of its tensors are missing {missing[:3]}, too many {unexpected[:3]}")
        except (KeyError, TypeError, ValueError, RuntimeError) as error:
            raise ValueError(f"{path} is not a model of train.py image: {' '.join(str(error).split())[:300]}") from None
        return model.eval()

    def unknown_words(self, prompt):
        """The words of a prompt that no training caption had."""
        return sorted(set(words_of(prompt)) - set(self.config["words"])) if self.config["words"] else []

    @torch.no_grad()
    def generate(
        self, prompts, seed=0, sampler="sde", steps=16, lambda_t=2.0, lambda_m=1.0, rescale=0.0, interval=(0.0, 1.0), frames=0, size=None
    ):
        """List of B prompts → pictures (B, 3, H, W) uint8, or from a video model clips (B, F, 3, H, W). A prompt's result
        depends on the prompt and the seed (one for all, or a list) alone, up to rounding: a batch of another size is
        multiplied by other kernels. lambda_t, lambda_m: the guidance of diffusion.py; frames: F, and size: (H, W), if not as the model was trained. ValueError for an unknown sampler or
        number of steps, or for frames of an image model."""
        if sampler not in SAMPLERS:
            raise ValueError(f"sampler {sampler!r} is not one of {', '.join(SAMPLERS)}")
        video, device = self.transformer.config.temporal, self.device
        if frames and not video:
            raise ValueError("--frames: this is an image model; for clips train one with `python train.py video`")
        h, w = (side // self.autoencoder.factor for side in size or [self.config["image_size"]] * 2)
        shape = (self.transformer.config.channels, h, w)
        shape = (frames or self.config["frames"], *shape) if video else shape  # ([F,] C, h, w)
        seeds = seed if isinstance(seed, list) else [seed] * len(prompts)
        keys = [hashlib.sha256(f"{one} {prompt}".encode()).digest()[:7] for one, prompt in zip(seeds, prompts)]
        generators = [torch.Generator().manual_seed(int.from_bytes(key, "little")) for key in keys]
        x = gaussian(shape, generators)
        with products_in(self.precision, device):
            text, masks = self.read(prompts)
        no, yes = torch.zeros(len(x), dtype=torch.bool, device=device), torch.ones(len(x), dtype=torch.bool, device=device)
        shared = dict(text=text, mask=masks)
        condition, null_text, still = (
            shared | dict(dropped=dropped) | (dict(motion_free=motion_free) if video else {})
            for dropped, motion_free in ((no, no), (yes, no), (yes, yes))
        )  # the paper's (c_T, c_M), (∅, c_M) and (∅, ∅)

        def predict(x, t, **condition):
            with products_in(self.precision, device):
                return self.transformer(x, t, **condition).to(x.dtype)  # guidance and sampler compute in fp32

        options = rescale, interval, self.diffusion.steps
        if video:
            run = guided_motion(predict, condition, null_text, still, lambda_t, lambda_m, *options)
        else:
            run = guided(predict, condition, null_text, lambda_t, *options)
        x = SAMPLERS[sampler](run, self.diffusion, x.to(device), steps, generators)
        frames = x.reshape(-1, *x.shape[-3:]).split(64)  # few at a time: the decoder works at full resolution
        frames = torch.cat([to_bytes(self.autoencoder.decode(part)).cpu() for part in frames])
        return frames.view(*x.shape[:-3], *frames.shape[1:])


def words_of(text):
    """Lower-case words of a text."""
    return "".join(c if c.isalnum() else " " for c in text.lower()).split()


def to_bytes(x):
    """Pictures (B, 3, H, W) in -1…1 → uint8."""
    return ((x + 1) * 127.5).round().clamp(0, 255).to(torch.uint8)


def from_bytes(x):
    """uint8 pictures → -1…1."""
    return x.float() / 127.5 - 1
