"""fp32 is fp32 and bf16 is chosen by name: through the commands, against the same weights in float64."""
import ast
import copy
import json
from pathlib import Path

import pytest
import torch

import diffusion
from common import hardware
import sample
import train
from sample import Pipeline
from training.state import TrainingState

SIZES = ["--image-size", "32", "--batch-size", "4", "--steps", "1", "--log-every", "1", "--sample-every", "-1"]


def image(root, out, *flags):
    train.main(["image", "--data", str(root / "data"), "--autoencoder", str(root / "ae"), "--out", str(out), *SIZES, *flags])


def norm_of(difference, exact):
    return (torch.cat([d.flatten() for d in difference]).norm() / torch.cat([e.flatten() for e in exact]).norm()).item()


def first_step(root, out, precision, monkeypatch):
    """Relative errors of the first training step's loss and gradient, against float64."""
    real, norm, seen = train.diffusion_loss, TrainingState.gradient_norm, {}

    def in_both(model, batch):
        if model.device.type == "meta":  # to count FLOPs
            return real(model, batch)
        with torch.no_grad():  # at zero, gates and outputs would hide most of the products
            if not seen:
                for p in model.transformer.parameters():
                    p.add_(0.05 * torch.randn_like(p))
        exact = copy.deepcopy(model).double()
        with torch.autocast("cpu", enabled=False):
            loss, _ = real(exact, batch | {name: batch[name].double() for name in ("x0", "noise")})
            loss.mean().backward()
        found, levels = real(model, batch)
        seen.update(model=model, exact=exact, loss=loss.detach(), error=(found.detach() - loss.detach()))
        return found, levels

    def measured(state):
        pairs = [(p.grad.double(), q.grad) for p, q in zip(seen["model"].parameters(), seen["exact"].parameters()) if q.grad is not None]
        seen["gradient"] = norm_of([a - b for a, b in pairs], [b for _, b in pairs])
        return norm(state)

    with monkeypatch.context() as patch:
        patch.setattr(train, "diffusion_loss", in_both)
        patch.setattr(TrainingState, "gradient_norm", measured)
        image(root, out, "--precision", precision)
    return norm_of([seen["error"]], [seen["loss"]]), seen["gradient"]


def one_call(run, precision, monkeypatch):
    """Relative error of what the sampler returns for two prompts, against float64."""
    real, found = diffusion.SAMPLERS["sde"], []

    def kept(model, schedule, x, *rest):
        found.append(real(model, schedule, x, *rest))
        return found[-1]

    prompts = ["a red circle above a blue square", "a small green cross"]
    with monkeypatch.context() as patch:
        patch.setitem(diffusion.SAMPLERS, "sde", kept)
        flags = ["--checkpoint", str(run), "--steps", "2", "--out", str(run / "x.png"), "--precision", precision]
        sample.main([*prompts, *flags])
        patch.setitem(diffusion.SAMPLERS, "sde", lambda model, schedule, x, *rest: kept(model, schedule, x.double(), *rest))
        exact = Pipeline.load(run)
        exact.double().generate(prompts, steps=2)
    return norm_of([found[0] - found[1]], [found[1]])


@pytest.mark.rounding
def test_fp32_is_fp32_and_bf16_is_not(pictures, tmp_path, monkeypatch):
    """An fp32 product of vectors of at most 768 numbers errs by sqrt(768) · 6e-8 = 2e-6 of its value on average, and some
    forty of them follow one another: 1e-5. bf16 keeps 16 bits fewer: 65,536 times as much in one product."""
    found = {}
    for precision in ("fp32", "bf16"):
        run = tmp_path / precision
        found[precision] = (*first_step(pictures, run, precision, monkeypatch), one_call(run, precision, monkeypatch))
    print(found)
    assert max(found["fp32"]) < 1e-5
    assert min(found["bf16"]) > 1e-4


def test_what_auto_chose_stays_with_the_run(pictures, tmp_path, monkeypatch, capsys):
    """Where bf16 was faster when the run began, it goes on and is drawn from in bf16, without measuring again; on another
    processor it is measured."""
    calls = []

    def rate(device, dtype):
        calls.append(dtype)
        return (dtype == torch.bfloat16) == (len(calls) <= 2)  # the first time bf16 is faster, the second time fp32

    monkeypatch.setattr(hardware, "matmul_rate", rate)
    image(pictures, tmp_path, "--steps", "2", "--checkpoint-every", "1", "--cooldown", "0")
    assert "bf16 products, steps 0…2" in capsys.readouterr().out and len(calls) == 2
    (tmp_path / "checkpoints/000002/config.json").unlink()
    (tmp_path / "run.json").unlink()  # it says that the run is finished
    image(pictures, tmp_path, "--steps", "2", "--checkpoint-every", "1", "--cooldown", "0", "--resume")
    draw = ["a star", "--checkpoint", str(tmp_path), "--steps", "1", "--out", str(tmp_path / "x.png")]
    sample.main(draw)
    printed = capsys.readouterr().out
    assert "bf16 products, steps 1…2" in printed and "bf16 products → " in printed and len(calls) == 2
    sample.main([*draw, "--precision", "fp32"])
    assert "fp32 products → " in capsys.readouterr().out
    monkeypatch.setattr(hardware, "processor", lambda device: "another")
    sample.main(draw)
    assert "fp32 products → " in capsys.readouterr().out and len(calls) == 4
    saved = json.loads((tmp_path / "checkpoints/000002/config.json").read_text())["config"]
    assert saved["precision"] == "bf16" and saved["processor"] != "another"


ROOT = Path(__file__).parent.parent
SOURCES = [path for path in ROOT.rglob("*.py") if not {".venv", "tests"} & set(path.relative_to(ROOT).parts)]


def test_no_file_changes_the_precision_of_fp32_products():
    """torch's default computes them in fp32 on every processor. Its switches stand in no file of ours."""
    assert torch.get_float32_matmul_precision() == "highest"
    switches = (
        "set_float32_matmul_precision", "fp32_precision", "allow_tf32", "reduced_precision", "set_default_dtype",
        "set_default_device", "set_default_tensor_type", "use_deterministic_algorithms", "cudnn.", "set_num_threads",
        "set_num_interop_threads", "set_flush_denormal", "set_grad_enabled", "set_autocast", "autocast_cache", "enable_flash_sdp",
        "enable_math_sdp", "enable_mem_efficient_sdp", "set_rng_state", "set_detect_anomaly", "random.seed(", "CUBLAS_WORKSPACE",
    )  # fmt: skip
    found = [(path.name, switch) for path in SOURCES for switch in switches if switch in path.read_text()]
    assert len(SOURCES) > 40 and not found


def globals_of_torch():
    backends = torch.backends
    return {
        "deterministic": torch.are_deterministic_algorithms_enabled(), "products": torch.get_float32_matmul_precision(),
        "dtype": torch.get_default_dtype(), "device": torch.get_default_device(), "gradients": torch.is_grad_enabled(),
        "threads": (torch.get_num_threads(), torch.get_num_interop_threads()), "anomalies": torch.is_anomaly_enabled(),
        "autocast": [(torch.is_autocast_enabled(kind), torch.get_autocast_dtype(kind)) for kind in ("cpu", "cuda")],
        "cudnn": (backends.cudnn.enabled, backends.cudnn.benchmark, backends.cudnn.deterministic, backends.cudnn.allow_tf32),
        "mkldnn": backends.mkldnn.enabled, "attention": (backends.cuda.flash_sdp_enabled(), backends.cuda.math_sdp_enabled()),
    }  # fmt: skip


def test_a_run_and_its_pictures_leave_torch_as_it_was(pictures, tmp_path):
    """Also where drawing or evaluation is refused halfway. Nothing of torch is set, or drawn, where a file is imported."""
    before = globals_of_torch()
    image(pictures, tmp_path, "--precision", "bf16")
    draw = ["a star", "--checkpoint", str(tmp_path), "--steps", "1", "--out", str(tmp_path / "x.png"), "--precision", "bf16"]
    sample.main(draw)
    with pytest.raises(ValueError):
        sample.main([*draw, "--frames", "3"])
    assert globals_of_torch() == before
    calls = []
    for path in SOURCES:
        inner = (ast.FunctionDef, ast.Lambda)
        nodes = [node for node in ast.parse(path.read_text()).body if not isinstance(node, inner)]
        while nodes:
            node = nodes.pop()
            nodes += [child for child in ast.iter_child_nodes(node) if not isinstance(child, inner)]
            if isinstance(node, ast.Call) and ast.unparse(node.func).startswith(("torch.", "random.", "np.random.")):
                calls.append(f"{path.name}: {ast.unparse(node)}")
    assert not calls
