"""A dry run counts what a real run takes. Whole training and sampling steps run where no tensor has data."""
import itertools
import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch._subclasses import FakeTensorMode
from torch.testing._internal.distributed.fake_pg import FakeStore
from torch.utils.flop_counter import FlopCounterMode

import train
from attention import use_attention
from common.flops import Flops
from diffusion import SAMPLERS, Diffusion, classifier_free_guidance, motion_free_guidance
from dit import GenTron, ModelConfig
from encoders.autoencoder import Autoencoder, AutoencoderConfig
from encoders.autoencoder_kl import AutoencoderKL, AutoencoderKLConfig
from encoders.clip import CLIPConfig, CLIPTextEncoder
from encoders.t5 import T5Config, T5Encoder
from evaluation import dry_run
from training import distributed
from training.recipes import read_flags

ROOT = Path(__file__).parent.parent.parent
TWO = dict(text_widths=(12, 16), null_tokens=(2, 3), pooling=("last", "mean"))

MEASURE = """
import sys
import torch
from attention import use_attention
from dit import GenTron, ModelConfig
from evaluation import dry_run

def resident(key):
    return int(next(line for line in open("/proc/self/status") if line.startswith(key)).split()[1]) * 1024

size, batch, side, frames, fused, checkpointing = sys.argv[1], *map(int, sys.argv[2:])
torch.set_num_threads(1)
config = ModelConfig.of(size, temporal=frames > 0)
shape = frames, side, (20,)
attention = "fused" if fused else "written"
_, estimate = dry_run.training_step(config, batch, *shape, bool(checkpointing), torch.float32, attention)
model = GenTron(config)
use_attention(model, attention)
model.checkpointing = bool(checkpointing)
for p in model.parameters():
    p.grad = torch.zeros_like(p)

one, many = (dry_run.random_inputs(config, count, *shape, device="cpu") for count in (1, batch))
model(*one).square().mean().backward()
open("/proc/self/clear_refs", "w").write("5")  # forget the peak until now
before = resident("VmRSS")
model(*many).square().mean().backward()
print(estimate / (resident("VmHWM") - before))
"""


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="Linux tells peak memory there")
@pytest.mark.parametrize(
    "size, batch, side, frames, fused, checkpointing",
    [("mini", 128, 8, 0, 0, 0), ("mini", 16, 8, 8, 1, 0),
     ("S", 4, 32, 0, 1, 0), ("S", 4, 32, 0, 0, 0), ("S", 4, 32, 0, 1, 1)],
)
def test_activations_are_within_15_percent_of_measured_peaks(size, batch, side, frames, fused, checkpointing):
    """The allocator gives freed memory back at once: memory that it kept would be counted."""
    variables = {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", MEASURE, *map(str, (size, batch, side, frames, fused, checkpointing))]
    done = subprocess.run(command, capture_output=True, text=True, env=variables | {"PYTHONPATH": str(ROOT)})
    assert done.returncode == 0, done.stderr
    assert 0.85 < float(done.stdout) < 1.15


def test_a_dry_run_of_the_largest_model(capsys, monkeypatch, tmp_path):
    step = dry_run.training_step  # of one sample for FLOPs, of many for memory, which is tested above
    monkeypatch.setattr(dry_run, "training_step", lambda *given: step(*given) if given[1] == 1 else (0, 2**30))
    train.main(["image", "--size", "G/2", "--dry-run", "16"])
    first, *lines = capsys.readouterr().out.splitlines()
    assert int(first.removeprefix("parameters ")) == pytest.approx(3083.8e6, rel=1e-3)
    parts = [float(line.split()[-1][:-1]) for line in lines if line.endswith("M")]
    assert sum(parts) == pytest.approx(3083.7, abs=0.1)
    assert any("t5, frozen" in line and "4762.31M" in line for line in lines) and "400000 steps" in lines[-1]
    folder = tmp_path / "t5"
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(dict(model_type="t5", feed_forward_proj="gated-gelu")))
    train.main(["image", "--size", "S/2", "--dry-run", "8", "--t5", str(folder)])
    alone = next(line for line in capsys.readouterr().out.splitlines() if line.startswith("a step of"))
    assert float(alone.split(", and ")[1].split()[0]) > 0
    train.main(["image", "--dry-run", "1"])
    assert capsys.readouterr().out.startswith("parameters 5")
    with pytest.raises(ValueError, match="--dry-run: has no effect on the stage autoencoder"):
        train.main(["autoencoder", "--dry-run", "1"])


AUTOENCODERS = {
    "": lambda: None,
    "mini": lambda: Autoencoder(AutoencoderConfig()),
    "kl": lambda: AutoencoderKL(AutoencoderKLConfig(widths=(16, 32), groups=4)),
}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("autoencoder, encoders", [("", ["t5"]), ("mini", []), ("kl", ["clip", "t5"]), ("kl", ["clip"])])
def test_encoding_takes_what_the_allocator_gives_out(autoencoder, encoders, monkeypatch):
    """By the profiler, which sees each allocation and release of a real run, with a CPU's number of pictures at once."""
    as_on_a_cpu = lambda self, x, positions: x.split(max(1, self.at_once // positions))
    monkeypatch.setattr(AutoencoderKL, "parts", as_on_a_cpu)
    made = {"clip": lambda: CLIPTextEncoder(CLIPConfig(64, 64, 2, 2, 256)), "t5": lambda: T5Encoder(T5Config(heads=8))}
    lengths = [{"clip": 77, "t5": 128}[name] for name in encoders]

    def parts():
        return AUTOENCODERS[autoencoder](), [made[name]().to(torch.bfloat16) for name in encoders]

    with torch.device("meta"):
        counted = dry_run.encoding(*parts(), 16, 64, lengths)
    pictures, texts = parts()
    with torch.no_grad(), torch.profiler.profile(profile_memory=True, activities=[torch.profiler.ProfilerActivity.CPU]) as seen:
        kept = [pictures.encode(torch.zeros(16, 3, 64, 64))] if pictures else []
        for encoder, L in zip(texts, lengths):
            tokens = torch.ones(16, L, dtype=torch.long)
            kept.append(encoder(tokens, tokens > 0))
    sizes = [event.nbytes() for event in seen.profiler.kineto_results.events() if event.name() == "[memory]"]
    assert 0.85 < counted / max(itertools.accumulate(sizes)) < 1.15


def lines_of(stage, *flags):
    config = read_flags(stage, [*flags, "--precision", "bf16"], train.SIZES)
    return dry_run.report(stage, config, 8)


def test_what_is_encoded_counts_where_it_takes_more_than_the_step(tmp_path, monkeypatch):
    """The text encoder runs in every step. With --cache no picture is encoded; for clips it is done beforehand."""
    (tmp_path / "config.json").write_text(json.dumps(dict(model_type="t5", feed_forward_proj="gated-gelu")))
    with torch.device("meta"):
        autoencoder = AutoencoderKL(AutoencoderKLConfig())
        t5 = T5Encoder(T5Config.read(tmp_path)).to(torch.bfloat16)
    both, text = (dry_run.encoding(part, [t5], 2, 64, [256]) for part in (autoencoder, None))
    assert text < both
    flags = ["--size", "S/2", "--batch-size", "16", "--image-size", "64", "--t5", str(tmp_path)]
    for step, more, row, largest in (
        (both - 1, ["image"], "encoding", both),
        (both + 1, ["image"], "activations", both + 1),
        (text - 1, ["image", "--data", "shapes", "--cache", "latents"], "encoding", text),
        (text - 1, ["video"], "encoding", text),
    ):
        monkeypatch.setattr(dry_run, "training_step", lambda *_: (1, step))
        assert f"  {row + ' of 2':<24}{largest / 2**30:>10.2f} GiB" in lines_of(*more, *flags)


def test_gradients_of_shares_are_whole_while_they_add_up(monkeypatch):
    """As FSDP holds them between the parts of a step, and as the dry run counts them."""
    config = ModelConfig(depth=3, width=64, heads=4, text_widths=(12,), null_tokens=(2,))
    model = GenTron(config)
    total = dry_run.size_of(model)
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "4")
    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=4)
    try:
        distributed.shard(model, torch.device("cpu"), torch.bfloat16)
        averaging, held = distributed.Averaging(model), []
        for last in (False, True):
            averaging.enable(last)
            model(*dry_run.random_inputs(config, 2, 0, 8, (4,), device="cpu")).float().square().mean().backward()
            groups = [module._get_fsdp_state()._fsdp_param_group for module in (model, *model.blocks)]
            whole = [p.unsharded_accumulated_grad for group in groups for p in group.fsdp_params]
            shares = [p.grad.to_local() for p in model.parameters() if p.grad is not None]
            held.append(sum(tensor.nbytes for tensor in (*whole, *shares) if tensor is not None))
    finally:
        dist.destroy_process_group()
    assert held[0] == total * 4 and held[1] == pytest.approx(total, rel=0.01)
    monkeypatch.setattr(dry_run, "training_step", lambda *_: (1, 1))
    monkeypatch.setattr(dry_run, "encoding", lambda *_: 1)
    gradients = lambda *flags: next(line for line in lines_of("image", *flags) if line.startswith("  gradients"))
    small = ["--size", "S/2", "--checkpointing"]
    of_S = float(lines_of("image", *small)[0].split()[1]) * 4 / 2**30
    assert gradients(*small) == gradients(*small, "--shard", "8") == f"  gradients{of_S / 8:>25.2f} GiB"
    for more in ([], ["--shard", "2"], ["--shard", "1"]):
        assert gradients(*small, "--accumulate", "4", *more) == f"  gradients{of_S:>25.2f} GiB"


@pytest.mark.parametrize("given", ["0", "-1", "8.0", "8,0", "8,-1", "8,0.0", "8,989,0", "8,989,40", "8,1.e400", "nan", "8,inf", "8,", "1,2,3,4"])
def test_a_machine_that_cannot_be_is_refused(given):
    with pytest.raises(ValueError, match="--dry-run .*: must be [^\n]*$"):
        train.main(["image", "--dry-run", given])


def test_flops_are_the_products_of_the_equations():
    """In a block a token passes 12 D² weights, and attention over N tokens takes 2 N D products more."""
    config = ModelConfig(depth=3, width=64, heads=4, integration="class", classes=10)
    N, D = 64, 64
    ends = N * D * (16 + 16) + 256 * D + D * D + 2 * D * D  # patches in and out; t's MLP; last adaLN
    block = N * (12 * D * D + 2 * N * D) + 6 * D * D
    with torch.device("meta"):
        model = GenTron(config)
    use_attention(model, "written")
    t = labels = torch.zeros(1, dtype=torch.long, device="meta")
    with FlopCounterMode(display=False) as counter:
        model(torch.empty(1, 4, 16, 16, device="meta"), t, labels)
    assert counter.get_total_flops() == 2 * (ends + 3 * block)
    text = ModelConfig(depth=3, width=64, heads=4, text_widths=(8,))
    once, again = (dry_run.training_step(text, 1, 0, 16, (5,), checkpointing)[0] for checkpointing in (False, True))
    assert 1.2 < again / once < 1.35  # the forward pass a second time


@pytest.mark.parametrize("attention", ["written", "fused"])
def test_flops_are_counted_as_torch_counts_them_and_keep_nothing_alive(attention):
    """Of a checkpointed step under autocast, with an encoder that does not learn before it."""
    encoder = T5Encoder(T5Config(vocabulary=64, width=16))
    model = GenTron(ModelConfig(depth=8, width=64, heads=4, text_widths=(16,)))
    use_attention(model, attention)
    tokens, mask = torch.randint(0, 64, (4, 9)), torch.ones(4, 9, dtype=torch.bool)
    model.checkpointing = True
    inputs = torch.randn(4, 4, 16, 16), torch.zeros(4, dtype=torch.long)

    def step():
        with torch.autocast("cpu", torch.bfloat16):
            with torch.no_grad():
                text = encoder(tokens, mask)
            loss = model(*inputs, (text,), (mask,)).float().square().mean()
        loss.backward()
        model.zero_grad()

    with FlopCounterMode(display=False) as theirs:
        step()
    with dry_run.Peak(model.parameters()) as plain:
        step()
    with dry_run.Peak(model.parameters()) as counted, Flops() as ours:
        step()
    assert ours.total == theirs.get_total_flops() > 0
    assert counted.peak < 1.05 * plain.peak


def small(**changes):
    return ModelConfig(depth=2, width=32, heads=4, channels=4, out_channels=8, **TWO | changes)


@pytest.mark.parametrize("temporal", [False, True])
@pytest.mark.parametrize("attention", ["written", "fused"])
def test_a_training_and_a_sampling_step_run_on_the_meta_device(temporal, attention):
    """A tensor that was made on the wrong device would fail here."""
    with torch.device("meta"):
        model = GenTron(small(temporal=temporal))
        encoders = CLIPTextEncoder(CLIPConfig(50, 12, 1, 2, 16)), T5Encoder(T5Config(width=16))
    use_attention(model, attention)
    optimizer = torch.optim.AdamW(model.parameters())
    x, t, *_ = dry_run.random_inputs(model.config, 2, 3 if temporal else 0, 8, (4, 6))
    tokens = [torch.zeros(2, L, dtype=torch.long, device="meta") for L in (4, 6)]
    masks = tuple(torch.ones(2, L, dtype=torch.bool, device="meta") for L in (4, 6))
    text = tuple(encoder(*pair) for encoder, *pair in zip(encoders, tokens, masks))
    no = torch.zeros(2, dtype=torch.bool, device="meta")
    motion = dict(motion_free=no) if temporal else {}
    diffusion = Diffusion(learned_variance=True)
    loss = diffusion.loss(lambda x, t: model(x, t, text, masks, no, **motion), x, t, torch.empty_like(x))
    loss.mean().backward()
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()
    conditions = [dict(text=text, text_mask=masks, dropped=no, **motion)] * 3
    guided = classifier_free_guidance(model, *conditions[:2], 4.0)
    if temporal:
        guided = motion_free_guidance(model, *conditions, 7.5, 1.2)
    for sampler in SAMPLERS.values():
        with torch.no_grad():
            x0 = sampler(guided, diffusion, x, 2, [torch.Generator() for _ in range(2)])
        assert x0.device.type == "meta"
    with torch.device("meta"):
        autoencoder = AutoencoderKL(AutoencoderKLConfig(widths=(8, 8, 8, 8), groups=2))
    pictures = torch.empty(2, 3, 64, 64, device="meta")
    assert autoencoder.decode(autoencoder.encode(pictures)).shape == pictures.shape


@pytest.mark.parametrize("temporal", [False, True])
def test_forward_passes_run_where_the_cpu_is_another_device(temporal):
    """A tensor that was made on the CPU would fail here. "lazy" stands in for a GPU: a fake tensor of device
    "cuda" cannot be indexed where torch has no CUDA."""
    with FakeTensorMode(), torch.no_grad():
        with torch.device("lazy"):
            model = GenTron(small(temporal=temporal))
            encoders = CLIPTextEncoder(CLIPConfig(50, 12, 1, 2, 16)), T5Encoder(T5Config(width=16))
        inputs = dry_run.random_inputs(model.config, 2, 3 if temporal else 0, 8, (4, 6), device="lazy")
        no = torch.zeros(2, dtype=torch.bool, device="lazy")
        for motion_free in (None, no) if temporal else (None,):
            assert model(*inputs, no, motion_free).device.type == "lazy"
        tokens = torch.zeros(2, 5, dtype=torch.long, device="lazy")
        mask = torch.ones(2, 5, dtype=torch.bool, device="lazy")
        for encoder in encoders:
            assert encoder(tokens, mask).device.type == "lazy"


def test_checkpointing_changes_nothing_but_memory():
    torch.manual_seed(0)
    model = GenTron(small(temporal=True)).double()
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.1 * torch.randn_like(p))
    inputs = dry_run.random_inputs(model.config, 2, 3, 8, (4, 6), torch.float64, "cpu")
    found = []
    for model.checkpointing in (False, True):
        model.zero_grad()
        out = model(*inputs, motion_free=torch.tensor([True, False]))
        out.square().mean().backward()
        found.append([out.detach(), *(p.grad.clone() for p in model.parameters())])
    assert all(torch.equal(a, b) for a, b in zip(*found))
