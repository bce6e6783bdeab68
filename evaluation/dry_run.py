"""What a training run will need, before it starts.

    python train.py image --size G/2 --dry-run --gpus 64 --batch-size 2048 --checkpointing

builds the model and runs one step of it on the *meta* device, whose tensors have a shape and no data: parameters by part,
FLOPs, memory, hours, in seconds and on any machine. Bytes of activations are counted as the step runs: each new tensor's
storage is added when it is made and taken off when it is freed, and the largest sum is the answer, whatever the model.
Weights, gradients, optimizer and EMA are fp32 and shared out among the GPUs, or --shard of them; what is frozen is whole on
each.
"""
import weakref
from pathlib import Path

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry

import attention
from encoders.autoencoder import Autoencoder, AutoencoderConfig
from dit import GenTron, ModelConfig
from pipeline import NULL_TOKENS, POOLING, READERS
from encoders.autoencoder_kl import AutoencoderKL, AutoencoderKLConfig
from encoders.t5 import CLIPConfig, CLIPTextEncoder, T5Config, T5Encoder

ENCODERS = {"clip": CLIPTextEncoder, "t5": T5Encoder}
T5_XXL = T5Config(vocabulary=32128, width=4096, depth=24, heads=64, head_width=64, mlp_width=10240)
PARTS = ("self_attention", "cross_attention", "temporal", "mlp", "modulation", "condition")  # in the names of parameters
OPTIMIZER = dict(adamw=8, muon=4)  # bytes of state a parameter: two moments in fp32, or one


class Peak(TorchDispatchMode):
    """Bytes of tensors that are alive while this mode is on, and the most there were: `peak`. Not counted: `kept`, tensors
    that were there before."""

    def __init__(self, kept):
        super().__init__()
        self.kept = {tensor.untyped_storage()._cdata: tensor for tensor in kept}
        self.alive, self.now, self.peak = {}, 0, 0

    def __torch_dispatch__(self, function, types, arguments=(), options=None):
        result = function(*arguments, **(options or {}))
        for tensor in tree_leaves(result):
            if torch.is_tensor(tensor):
                self.add(tensor.untyped_storage())
        return result

    def add(self, storage):
        key, size = storage._cdata, storage.nbytes()
        if key in self.kept or key in self.alive:
            return

        def freed(_):
            self.now -= size
            del self.alive[key]

        self.alive[key] = weakref.ref(storage, freed)
        self.now += size
        self.peak = max(self.peak, self.now)


class Flops(TorchDispatchMode):
    """Counts the FLOPs of all products while this mode is on: `total`. (torch's FlopCounterMode keeps an account of modules
    too, and with it all that checkpointed blocks compute again: enough to run out of memory.)"""

    total = 0

    def __torch_dispatch__(self, function, types, arguments=(), options=None):
        options = options or {}
        with self:
            result = function.decompose(*arguments, **options)  # into the products that it is made of, if of any
        if result is NotImplemented:
            result = function(*arguments, **options)
            if count := flop_registry.get(function.overloadpacket):
                self.total += count(*arguments, **options, out_val=result)
        return result


def flash(q, k, v, mask=None):
    """Fused attention on the meta device, where torch would fall back to the written-out one and count its (L, M)."""
    if mask is not None:
        mask = torch.empty(len(q), 1, q.shape[-2], k.shape[-2], dtype=q.dtype, device=q.device)  # one for all heads
    return torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(q, k, v, attn_mask=mask)[0]


def step_inputs(config, batch, frames, side, lengths, dtype=torch.float32, device="meta"):
    """Arguments of GenTron.forward: `batch` pictures, or with frames > 0 clips, of side×side latents, and captions of these
    lengths, one an encoder."""
    shape = (batch, frames, config.channels, side, side) if frames else (batch, config.channels, side, side)
    text = [torch.empty(batch, L, E, dtype=dtype, device=device) for L, E in zip(lengths, config.text_widths)]
    masks = [torch.ones(batch, L, dtype=torch.bool, device=device) for L in lengths]
    return torch.empty(shape, dtype=dtype, device=device), torch.zeros(batch, dtype=torch.long, device=device), text, masks


def activations(config, batch, frames, side, lengths, dtype, checkpointing, fused):
    """Bytes that a training step's tensors take at most, beside weights and their gradients."""
    before = attention.fused_attention, attention.FUSED
    attention.fused_attention, attention.FUSED = flash, fused
    try:
        with torch.device("meta"):
            model = GenTron(config).to(dtype)
        model.checkpointing = checkpointing
        inputs = step_inputs(config, batch, frames, side, lengths, dtype)
        for p in model.parameters():
            p.grad = torch.empty_like(p)
        with Peak([*model.parameters(), *(p.grad for p in model.parameters())]) as peak:
            model(*inputs).float().square().mean().backward()
        return peak.peak
    finally:
        attention.fused_attention, attention.FUSED = before


def flops(config, frames, side, lengths, checkpointing):
    """FLOPs of a training step on one sample: forward and backward, and with checkpointing forward again."""
    with torch.device("meta"):
        model = GenTron(config)
    model.checkpointing = checkpointing
    before, attention.FUSED = attention.FUSED, False  # written out, every product is seen
    try:
        with Flops() as counter:
            model(*step_inputs(config, 1, frames, side, lengths)).square().mean().backward()
    finally:
        attention.FUSED = before
    return counter.total


def by_part(model):
    """Numbers of parameters by PARTS, and the rest."""
    count = dict.fromkeys((*PARTS, "other"), 0)
    for name, p in model.named_parameters():
        count[next((part for part in PARTS if part in name), "other")] += p.numel()
    return {part: n for part, n in count.items() if n}


def built(kind, config):
    """A module on the meta device."""
    with torch.device("meta"):
        return kind(config)


def parts_of(stage, config):
    """What the flags ask for → the transformer's ModelConfig; lengths of the captions, one an encoder; {name: module} of what
    is frozen; and of what trains beside the transformer. Sizes other than mini are the paper's, whose captions CLIP ViT-L/14
    and Flan-T5-XXL read and whose latents are Stable Diffusion's; --clip, --t5 and --autoencoder name others."""
    paper = config.size != "mini"
    found = {name: kind.read(getattr(config, name)) for name, kind in READERS.items() if getattr(config, name)}
    if paper and not found:
        found = {"clip": CLIPConfig(), "t5": T5_XXL}
    published = paper or (Path(config.autoencoder) / "config.json").exists()
    autoencoder = built(AutoencoderKL, AutoencoderKLConfig()) if published else built(Autoencoder, AutoencoderConfig(config.latent_channels))  # fmt: skip
    frozen = {name: built(ENCODERS[name], found[name]) for name in found} | {"autoencoder": autoencoder}
    beside = {} if found else {"text encoder": built(T5Encoder, T5Config(depth=config.text_depth))}
    C = autoencoder.config.channels
    text = dict(text_widths=[part.width for part in found.values()], null_tokens=[NULL_TOKENS[name] for name in found],
                pooling=[POOLING[name] for name in found]) if found else {}  # fmt: skip
    model = ModelConfig.of(
        config.size, channels=C, out_channels=C * (2 if config.learned_variance else 1), integration=config.integration,
        qk_norm=config.qk_norm, temporal=stage == "video", **text,
    )  # fmt: skip
    return model, [NULL_TOKENS[name] for name in found] or [20], frozen, beside


def report(stage, config):
    """The lines that --dry-run prints: train.py's stage, "image" or "video", and its Config."""
    model_config, lengths, frozen, beside = parts_of(stage, config)
    model, frames = built(GenTron, model_config), config.frames if stage == "video" else 0
    side = config.image_size // frozen["autoencoder"].factor
    size = lambda module: sum(p.numel() for p in module.parameters())
    total = size(model) + sum(map(size, beside.values()))
    lines = [f"parameters {total}"]
    lines += [f"  {part:<24}{n / 1e6:>10.2f}M" for part, n in by_part(model).items()]
    lines += [f"  {name:<24}{size(module) / 1e6:>10.2f}M" for name, module in beside.items()]
    lines += [f"  {name + ', frozen':<24}{size(module) / 1e6:>10.2f}M, not among them" for name, module in frozen.items()]
    work = config.batch_size * flops(model_config, frames, side, lengths, config.checkpointing)
    reading = config.batch_size * sum(2 * size(frozen[name]) * NULL_TOKENS[name] for name in READERS if name in frozen)
    lines.append(f"a step of {config.batch_size}: {work / 1e12:.2f} TFLOP, and {reading / 1e12:.2f} for the frozen text encoders")
    if config.batch_size % (config.gpus * config.accumulate):
        raise ValueError(f"--batch-size {config.batch_size}: not a multiple of {config.gpus} GPUs times --accumulate {config.accumulate}")
    half, local = config.precision != "fp32", config.batch_size // config.gpus // config.accumulate
    moving = activations(
        model_config, local, frames, side, lengths, torch.bfloat16 if half else torch.float32, config.checkpointing,
        config.attention != "written",
    )  # fmt: skip
    sharers = config.shard or config.gpus
    if config.gpus % sharers:
        raise ValueError(f"--shard {sharers}: does not divide the {config.gpus} GPUs")
    gathered = 2 * size(model.blocks[0]) * (2 if half else 4)
    memory = {
        "weights": total * 4 / sharers,
        "gradients": total * 4 / sharers,
        "optimizer": total * OPTIMIZER[config.optimizer] / sharers,
        "EMA": total * 4 / sharers,
        **({"two gathered blocks": gathered} if sharers > 1 else {"weights in bf16": total * 2} if half else {}),
        "frozen": sum(size(module) * (4 if name == "autoencoder" else 2) for name, module in frozen.items()),
        f"activations of {local}": moving,
    }
    lines.append(f"memory of each of {config.gpus} GPUs, {'bf16' if half else 'fp32'} products: {sum(memory.values()) / 2**30:.1f} GiB")
    lines += [f"  {name:<24}{n / 2**30:>10.2f} GiB" for name, n in memory.items()]
    seconds = (work + reading) / (config.gpus * config.tflops * 1e12 * config.utilisation)
    lines.append(
        f"time: {seconds:.3g} s a step, {seconds * config.steps / 3600:.3g} hours for {config.steps} steps, at "
        f"{config.utilisation:g} of {config.tflops:g} TFLOP/s a GPU"
    )
    return lines
