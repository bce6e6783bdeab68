"""A dry run counts what a real one takes; and a whole training or sampling step runs where no tensor has data."""
import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import fake_cuda
from torch._subclasses import FakeTensorMode

import attention
from evaluation import dry_run as dryrun
import train
from diffusion import Diffusion, ddim, ddpm, dpm_sde, dpm_solver, guided, guided_motion
from dit import GenTron, ModelConfig
from encoders.autoencoder_kl import AutoencoderKL, AutoencoderKLConfig
from encoders.t5 import CLIPConfig, CLIPTextEncoder, T5Config, T5Encoder

ROOT = Path(__file__).parent.parent.parent
TWO = dict(text_widths=(12, 16), null_tokens=(2, 3), pooling=("last", "mean"))

MEASURE = """
import sys
import torch
import attention, dryrun
from dit import GenTron, ModelConfig

def resident(key):
    return int(next(line for line in open("/proc/self/status") if line.startswith(key)).split()[1]) * 1024

size, batch, side, frames, fused, checkpointing = sys.argv[1], *map(int, sys.argv[2:])
torch.set_num_threads(1)
config = ModelConfig.of(size, temporal=frames > 0)
estimate = dryrun.activations(config, batch, frames, side, (20,), torch.float32, bool(checkpointing), bool(fused))
attention.FUSED = bool(fused)
model = GenTron(config)
model.checkpointing = bool(checkpointing)
for p in model.parameters():
    p.grad = torch.zeros_like(p)

def step(batch):
    model(*dryrun.step_inputs(config, batch, frames, side, (20,), device="cpu")).square().mean().backward()

step(1)
open("/proc/self/clear_refs", "w").write("5")  # forget the peak until now
before = resident("VmRSS")
step(batch)
print(estimate / (resident("VmHWM") - before))
"""


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="Linux tells a process's peak memory there")
@pytest.mark.parametrize(
    "size, batch, side, frames, fused, checkpointing",
    [("mini", 128, 8, 0, 0, 0), ("mini", 16, 8, 8, 1, 0), ("S", 4, 32, 0, 1, 0), ("S", 4, 32, 0, 0, 0), ("S", 4, 32, 0, 1, 1)],
)
def test_activations_are_within_15_percent_of_measured_memory(size, batch, side, frames, fused, checkpointing):
    """With an allocator that gives memory back at once, as freed memory that is kept would be counted."""
    keep = {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536", "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    arguments = map(str, (size, batch, side, frames, fused, checkpointing))
    done = subprocess.run([sys.executable, "-c", MEASURE, *arguments], capture_output=True, text=True, env=keep)
    assert done.returncode == 0, done.stderr
    assert 0.85 < float(done.stdout) < 1.15


def test_a_dry_run_of_the_largest_model(capsys, monkeypatch, tmp_path):
    monkeypatch.setattr(dryrun, "activations", lambda *_: 2**30)  # that is tested above
    train.main(["image", "--size", "G/2", "--dry-run", "--gpus", "16"])
    first, *lines = capsys.readouterr().out.splitlines()
    assert int(first.removeprefix("parameters ")) == pytest.approx(3083.8e6, rel=1e-3)
    parts = [float(line.split()[-1][:-1]) for line in lines if line.endswith("M")]
    assert sum(parts) == pytest.approx(3083.7, abs=0.1)
    assert any("t5, frozen" in line and "4762.31M" in line for line in lines) and "400000 steps" in lines[-1]
    folder = tmp_path / "t5"
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(dict(model_type="t5", feed_forward_proj="gated-gelu")))
    train.main(["image", "--size", "S/2", "--dry-run", "--t5", str(folder)])
    alone = next(line for line in capsys.readouterr().out.splitlines() if line.startswith("a step of"))
    assert float(alone.split(", and ")[1].split()[0]) > 0
    train.main(["image", "--dry-run"])
    assert capsys.readouterr().out.startswith("parameters 5")
    with pytest.raises(ValueError, match="--dry-run: of the stages image and video"):
        train.main(["autoencoder", "--dry-run"])


def test_flops_are_the_products_of_the_equations():
    """A token passes 12 D² weights a block in attention and MLP, and looks at N others, 2 N D more each way; forward and
    backward are three times forward."""
    config = ModelConfig(depth=3, width=64, heads=4, channels=4, out_channels=4, integration="class", classes=10)
    N, D = 64, 64
    ends = N * D * (16 + 16) + 256 * D + D * D + 2 * D * D  # patches in and out; the timestep's MLP and the last adaLN
    block = N * (12 * D * D + 2 * N * D) + 6 * D * D
    with torch.device("meta"):
        model = GenTron(config)
    from torch.utils.flop_counter import FlopCounterMode

    labels, t = torch.zeros(1, dtype=torch.long, device="meta"), torch.zeros(1, dtype=torch.long, device="meta")
    before, attention.FUSED = attention.FUSED, False
    try:
        with FlopCounterMode(display=False) as counter:
            model(torch.empty(1, 4, 16, 16, device="meta"), t, labels)
    finally:
        attention.FUSED = before
    assert counter.get_total_flops() == 2 * (ends + 3 * block)
    text = ModelConfig(depth=3, width=64, heads=4, text_widths=(8,))
    once, again = (dryrun.flops(text, 0, 16, (5,), checkpointing) for checkpointing in (False, True))
    assert 1.2 < again / once < 1.35  # the forward pass a second time


@pytest.mark.parametrize("fused", [False, True])
def test_flops_are_counted_as_torch_counts_them_and_keep_nothing_alive(fused, monkeypatch):
    """Of a checkpointed step under autocast, with an encoder that does not learn before it."""
    from torch.utils.flop_counter import FlopCounterMode

    monkeypatch.setattr(attention, "FUSED", fused)
    encoder, model = T5Encoder(T5Config(vocabulary=64, width=16)), GenTron(ModelConfig(depth=8, width=64, heads=4, text_widths=(16,)))
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
    with dryrun.Peak(model.parameters()) as plain:
        step()
    with dryrun.Peak(model.parameters()) as counted, dryrun.Flops() as ours:
        step()
    assert ours.total == theirs.get_total_flops() > 0
    assert counted.peak < 1.05 * plain.peak


def small(**changes):
    return ModelConfig(depth=2, width=32, heads=4, channels=4, out_channels=8, **TWO | changes)


@pytest.mark.parametrize("temporal", [False, True])
@pytest.mark.parametrize("fused", [False, True])
def test_a_training_and_a_sampling_step_run_on_the_meta_device(temporal, fused, monkeypatch):
    """A tensor that was made on the wrong device would fail here."""
    monkeypatch.setattr(attention, "FUSED", fused)
    with torch.device("meta"):
        model = GenTron(small(temporal=temporal))
        readers = CLIPTextEncoder(CLIPConfig(50, 12, 1, 2, 16)), T5Encoder(T5Config(width=16))
    optimizer = torch.optim.AdamW(model.parameters())
    x, t, *_ = dryrun.step_inputs(model.config, 2, 3 if temporal else 0, 8, (4, 6))
    tokens = [torch.zeros(2, L, dtype=torch.long, device="meta") for L in (4, 6)]
    masks = tuple(torch.ones(2, L, dtype=torch.bool, device="meta") for L in (4, 6))
    text = tuple(reader(*pair) for reader, *pair in zip(readers, tokens, masks))
    no = torch.zeros(2, dtype=torch.bool, device="meta")
    motion = dict(motion_free=no) if temporal else {}
    diffusion = Diffusion(learned_variance=True)
    loss = diffusion.loss(lambda x, t: model(x, t, text, masks, no, **motion), x, t, torch.empty_like(x))
    loss.mean().backward()
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()
    conditions = [dict(text=text, mask=masks, dropped=no, **motion)] * 3
    run = guided_motion(model, *conditions, 7.5, 1.2) if temporal else guided(model, *conditions[:2], 4.0)
    for sampler in (ddpm, ddim, dpm_solver, dpm_sde):
        with torch.no_grad():
            assert sampler(run, diffusion, x, 2, [torch.Generator() for _ in range(2)]).device.type == "meta"
    with torch.device("meta"):
        autoencoder = AutoencoderKL(AutoencoderKLConfig(widths=(8, 8, 8, 8), groups=2))
    assert autoencoder.decode(autoencoder.encode(torch.empty(2, 3, 64, 64, device="meta"))).shape == (2, 3, 64, 64)


@pytest.mark.parametrize("temporal", [False, True])
def test_forward_passes_run_on_fake_cuda_tensors(temporal):
    with torch.device("meta"):
        model = GenTron(small(temporal=temporal))
        readers = CLIPTextEncoder(CLIPConfig(50, 12, 1, 2, 16)), T5Encoder(T5Config(width=16))
    with FakeTensorMode(), torch.no_grad():
        fake_cuda(model)
        inputs = dryrun.step_inputs(model.config, 2, 3 if temporal else 0, 8, (4, 6), device="cuda")
        no = torch.zeros(2, dtype=torch.bool, device="cuda")
        for motion_free in (None, no, True) if temporal else (None,):
            assert model(*inputs, no, motion_free).device.type == "cuda"
        tokens = torch.zeros(2, 5, dtype=torch.long, device="cuda")
        mask = torch.ones(2, 5, dtype=torch.bool, device="cuda")
        for reader in readers:
            assert fake_cuda(reader)(tokens, mask).device.type == "cuda"


def test_checkpointing_changes_nothing_but_memory():
    torch.manual_seed(0)
    model = GenTron(small(temporal=True)).double()
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.1 * torch.randn_like(p))
    inputs = x, t, text, masks = dryrun.step_inputs(model.config, 2, 3, 8, (4, 6), torch.float64, "cpu")
    for tensor in (x, *text):
        tensor.normal_()
    found = []
    for model.checkpointing in (False, True):
        model.zero_grad()
        out = model(*inputs, motion_free=torch.tensor([True, False]))
        out.square().mean().backward()
        found.append([out.detach(), *(p.grad.clone() for p in model.parameters())])
    assert all(torch.equal(a, b) for a, b in zip(*found))
