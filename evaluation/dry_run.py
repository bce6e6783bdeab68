"""What a training run will need, before it starts.

    python train.py image --size G/2 --batch-size 2048 --checkpointing --dry-run 64

One step runs on the *meta* device, whose tensors have a shape and no data: it takes seconds, on any machine.
Memory is counted as the step runs: a tensor's bytes are added when it is made and taken off when it is freed.
Weights, gradients, optimizer state and EMA are in fp32 and divided among the GPUs, or among --shard of them
(under --accumulate not the gradients: FSDP adds them up whole). Each GPU holds all of the frozen parts. They
run before the step, whose activations take their memory after them; so the larger of the two counts.
"""
import weakref
from pathlib import Path
from unittest import mock

import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from attention import use_attention
from common.flops import Flops
from dit import GenTron, ModelConfig
from encoders.autoencoder import Autoencoder, AutoencoderConfig
from encoders.autoencoder_kl import AutoencoderKL, AutoencoderKLConfig
from encoders.clip import CLIPConfig, CLIPTextEncoder
from encoders.t5 import T5Config, T5Encoder
from encoders.text import CONFIGS, NULL_TOKENS, POOLING

ENCODERS = {"clip": CLIPTextEncoder, "t5": T5Encoder, "text encoder": T5Encoder}
T5_XXL = T5Config(vocabulary=32128, width=4096, depth=24, heads=64, head_width=64, mlp_width=10240)
PARTS = ("self_attention", "cross_attention", "temporal", "mlp", "modulation", "condition")  # of names
STATE_BYTES = dict(adamw=8, muon=4)  # of the optimizer for each parameter: two moments in fp32, or one


class Peak(TorchDispatchMode):
    """with Peak(kept) as memory: …; memory.peak is the most bytes alive at a time, of tensors made in it.
    kept: tensors from before, which are not counted."""

    def __init__(self, kept):
        super().__init__()
        self.alive = {tensor.untyped_storage()._cdata for tensor in kept}
        self.now = self.peak = 0

    def __torch_dispatch__(self, function, types, arguments=(), options=None):
        result = function(*arguments, **(options or {}))
        for tensor in filter(torch.is_tensor, tree_leaves(result)):
            storage = tensor.untyped_storage()
            if storage._cdata not in self.alive:
                self.alive.add(storage._cdata)
                self.now += storage.nbytes()
                weakref.finalize(storage, self.freed, storage._cdata, storage.nbytes())
        self.peak = max(self.peak, self.now)
        return result

    def freed(self, key, size):
        self.alive.remove(key)
        self.now -= size


def flash(*arguments, **options):
    """Fused attention on the meta device, where torch's own would store the (L, M) weights."""
    return torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(*arguments, **options)[0]


fused = lambda: mock.patch.object(F, "scaled_dot_product_attention", flash)


def random_inputs(config, count, frames, side, lengths, dtype=torch.float32, device="meta"):
    """x, t, text and text_mask of GenTron.forward, for `count` pictures (frames = 0) or clips of side×side
    latents. lengths: L of each encoder's captions."""
    shape = (count, frames) if frames else (count,)
    x = torch.randn(*shape, config.channels, side, side, dtype=dtype, device=device)
    t = torch.randint(0, 1000, (count,), device=device)
    text = [torch.randn(count, L, E, dtype=dtype, device=device) for L, E in zip(lengths, config.text_widths)]
    if config.integration == "class":
        text = torch.randint(0, config.classes, (count,), device=device)  # labels
    masks = [torch.ones(count, L, dtype=torch.bool, device=device) for L in lengths]
    return x, t, text, masks


def training_step(
    config, count, frames, side, lengths, checkpointing, dtype=torch.float32, attention="written"
):
    """A step on `count` samples: forward, backward and, with checkpointing, forward again. Returns its FLOPs,
    and the most bytes that it takes beside weights and gradients. FLOPs lack those of fused attention."""
    with torch.device("meta"):
        model = GenTron(config).to(dtype)
    model.checkpointing = checkpointing
    use_attention(model, attention)
    inputs = random_inputs(config, count, frames, side, lengths, dtype)
    for p in model.parameters():
        p.grad = torch.empty_like(p)
    kept = [*model.parameters(), *(p.grad for p in model.parameters())]
    with fused(), Flops() as counter, Peak(kept) as memory:
        model(*inputs).float().square().mean().backward()
    return counter.total, memory.peak


@torch.no_grad()
def encoding(autoencoder, encoders, count, size, lengths):
    """The most bytes that frozen parts take, on the meta device, for `count` pictures of size×size and their
    captions of so many tokens. autoencoder: None, if its latents are there already."""
    parts = [*encoders, autoencoder] if autoencoder else encoders
    with fused(), Peak([tensor for part in parts for tensor in part.state_dict().values()]) as memory:
        kept = []
        if autoencoder:
            kept.append(autoencoder.encode(torch.empty(count, 3, size, size, device="meta")))
        for encoder, L in zip(encoders, lengths):
            tokens = torch.empty(count, L, dtype=torch.long, device="meta")
            kept.append(encoder(tokens, tokens > 0))
    return memory.peak


def size_of(module):
    return sum(p.numel() for p in module.parameters())


def by_part(model):
    """{part: number of parameters}, for PARTS and the rest."""
    count = dict.fromkeys((*PARTS, "other"), 0)
    for name, p in model.named_parameters():
        count[next((part for part in PARTS if part in name), "other")] += p.numel()
    return {part: n for part, n in count.items() if n}


def parts_of(stage, config):
    """train.py's flags → the transformer, and {name: module} of the other parts: frozen ones, and the "text
    encoder" that trains along. Sizes other than mini have the paper's CLIP ViT-L/14 and Flan-T5-XXL, unless
    --clip or --t5 names others, and Stable Diffusion's autoencoder."""
    paper = config.size != "mini"
    texts = {name: CONFIGS[name].read(getattr(config, name)) for name in CONFIGS if getattr(config, name)}
    if not texts and paper:
        texts = {"clip": CLIPConfig(), "t5": T5_XXL}
    elif not texts:
        texts = {"text encoder": T5Config(depth=config.text_depth)}
    parts = {name: ENCODERS[name](text) for name, text in texts.items()}
    if paper or (Path(config.autoencoder) / "config.json").exists():
        parts["autoencoder"] = AutoencoderKL(AutoencoderKLConfig())
    else:
        parts["autoencoder"] = Autoencoder(AutoencoderConfig(config.latent_channels or 8))
    C = parts["autoencoder"].config.channels
    model_config = ModelConfig.of(
        config.size, channels=C, out_channels=C * (1 + config.learned_variance),
        integration=config.integration, qk_norm=config.qk_norm, temporal=stage == "video",
        text_widths=[text.width for text in texts.values()],
        null_tokens=[NULL_TOKENS.get(name, 1) for name in texts],
        pooling=[POOLING.get(name, "mean") for name in texts],
    )
    return GenTron(model_config), parts


def rows(numbers, unit, end):
    """{name: number} → a line for each, in units of `unit`, with `end` after it."""
    return [f"  {name:<24}{number / unit:>10.2f}{end}" for name, number in numbers.items()]


def report(stage, config, gpus, tflops=989.0, utilisation=0.4):
    """The lines that --dry-run prints. stage: "image" or "video"; config: train.py's flags; tflops: TFLOP/s
    of a GPU; utilisation: the share that a step reaches. ValueError if the GPUs cannot divide the batch."""
    batch, accumulate, sharers = config.batch_size, config.accumulate, config.shard or gpus
    if not isinstance(gpus, int) or min(gpus, tflops, utilisation) <= 0 or tflops > 1e6 or utilisation > 1:
        limits = "GPUs whole, TFLOPS up to 1e6, the share of them up to 1"
        raise ValueError(f"--dry-run {gpus},{tflops:g},{utilisation:g}: must be above 0, {limits}")
    if batch % (gpus * accumulate):
        product = f"{gpus} GPUs times --accumulate {accumulate}"
        raise ValueError(f"--batch-size {batch}: not a multiple of {product}")
    if gpus % sharers:
        raise ValueError(f"--shard {sharers}: does not divide the {gpus} GPUs")
    with torch.device("meta"):
        model, frozen = parts_of(stage, config)
    parameters = by_part(model)
    if "text encoder" in frozen:
        parameters["text encoder"] = size_of(frozen.pop("text encoder"))
    total = sum(parameters.values())
    lines = [f"parameters {total}", *rows(parameters, 1e6, "M")]
    sizes = {f"{name}, frozen": size_of(part) for name, part in frozen.items()}
    lines += rows(sizes, 1e6, "M, not among them")

    encoders = [name for name in frozen if name in ENCODERS]
    lengths = [NULL_TOKENS[name] for name in encoders] or [20]  # of the captions
    side = config.image_size // frozen["autoencoder"].factor
    shape = config.frames if stage == "video" else 0, side, lengths
    local = batch // gpus // accumulate  # samples of a GPU at a time
    one, two = (training_step(model.config, count, *shape, config.checkpointing)[0] for count in (1, 2))
    work = batch // local * (one + (local - 1) * (two - one))  # the null text is projected once for all
    reading = batch * sum(2 * size_of(frozen[name]) * NULL_TOKENS[name] for name in encoders)
    texts = f"{reading / 1e12:.2f} for the frozen text encoders"
    lines.append(f"a step of {batch}: {work / 1e12:.2f} TFLOP, and {texts}")

    half = config.precision != "fp32"
    each = {"weights": 4, "gradients": 4, "optimizer": STATE_BYTES[config.optimizer], "EMA": 4}  # bytes
    memory = {name: total * count / sharers for name, count in each.items()}
    if config.accumulate > 1:
        memory["gradients"] = total * 4
    if sharers > 1:
        memory["two gathered blocks"] = 2 * size_of(model.blocks[0]) * (2 if half else 4)
    elif half:
        memory["weights in bf16"] = total * 2
    memory["frozen"] = sum(size_of(frozen[name]) * (2 if name in encoders else 4) for name in frozen)
    dtype = torch.bfloat16 if half else torch.float32
    options = config.checkpointing, dtype, config.attention
    _, activations = training_step(model.config, local, *shape, *options)
    autoencoder = frozen["autoencoder"] if stage == "image" and not config.cache else None
    texts = [frozen[name].to(torch.bfloat16) for name in encoders]
    encoded = encoding(autoencoder, texts, local, config.image_size, lengths)
    larger = "activations" if activations > encoded else "encoding"
    memory[f"{larger} of {local}"] = max(activations, encoded)
    needed = f"{'bf16' if half else 'fp32'} products: {sum(memory.values()) / 2**30:.1f} GiB"
    lines += [f"memory of each of {gpus} GPUs, {needed}", *rows(memory, 2**30, " GiB")]

    seconds = (work + reading) / (gpus * tflops * 1e12 * utilisation)
    hours = f"{seconds * config.steps / 3600:.3g} hours for {config.steps} steps"
    lines.append(f"time: {seconds:.3g} s a step, {hours}, at {utilisation:g} of {tflops:g} TFLOP/s a GPU")
    return lines
