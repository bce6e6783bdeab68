"""The published DiT in our model, against diffusers' DiT and against one written here from the paper."""
import argparse
import json
import math
import pickle

import pytest
import torch
import torch.nn.functional as F
from diffusers import DiTTransformer2DModel
from PIL import Image
from oracles import p_sample_loop

from diffusion import Diffusion
from evaluation import published_dit
from encoders import weights
from encoders.autoencoder import Autoencoder, AutoencoderConfig
from dit import ModelConfig
from evaluation.published_dit import config_of, from_published, generate, load

HEADS = 2


def positions(side, D):
    """(1, side², D), number by number: sines and cosines of the column, then of the row."""
    rows = []
    for row in range(side):
        for column in range(side):
            angles = [[p / 10000 ** (i / (D // 4)) for i in range(D // 4)] for p in (column, row)]
            rows.append([f(a) for angle in angles for f in (math.sin, math.cos) for a in angle])
    return torch.tensor(rows)[None]


def published(depth=2, D=24, patch=2, C=4, out=8, classes=5, side=4):
    """A state as in the public files: random, zero nowhere."""
    linear = {
        "t_embedder.mlp.0": (D, 256), "t_embedder.mlp.2": (D, D),
        "final_layer.linear": (patch * patch * out, D), "final_layer.adaLN_modulation.1": (2 * D, D),
    }
    for k in range(depth):
        linear |= {
            f"blocks.{k}.attn.qkv": (3 * D, D), f"blocks.{k}.attn.proj": (D, D),
            f"blocks.{k}.mlp.fc1": (4 * D, D), f"blocks.{k}.mlp.fc2": (D, 4 * D),
            f"blocks.{k}.adaLN_modulation.1": (6 * D, D),
        }
    shapes = {"x_embedder.proj.weight": (D, C, patch, patch), "x_embedder.proj.bias": (D,)}
    shapes["y_embedder.embedding_table.weight"] = (classes + 1, D)
    for name, shape in linear.items():
        shapes |= {f"{name}.weight": shape, f"{name}.bias": shape[:1]}
    scale = lambda shape: 0.3 if len(shape) == 1 else (1.5 / shape[1]) ** 0.5
    state = {name: torch.randn(shape) * scale(shape) for name, shape in shapes.items()}
    return state | {"pos_embed": positions(side, D)}


def reference(state, x, t, y):
    """DiT by its paper (arXiv 2212.09748, sections 3.1 and 3.2), in the public layout and without modules."""
    D, C, patch, _ = state["x_embedder.proj.weight"].shape
    linear = lambda name, x: x @ state[f"{name}.weight"].T + state[f"{name}.bias"]
    norm = lambda x: (x - x.mean(-1, keepdim=True)) / (x.var(-1, unbiased=False, keepdim=True) + 1e-6).sqrt()

    def modulation(name, c, count):
        return linear(f"{name}.adaLN_modulation.1", c * c.sigmoid())[:, None].chunk(count, -1)

    angle = t[:, None] * torch.tensor([10000 ** (-i / 128) for i in range(128)], dtype=x.dtype)
    c = linear("t_embedder.mlp.0", torch.cat([angle.cos(), angle.sin()], -1))
    c = linear("t_embedder.mlp.2", c * c.sigmoid()) + state["y_embedder.embedding_table.weight"][y]
    x = F.conv2d(x, state["x_embedder.proj.weight"], state["x_embedder.proj.bias"], stride=patch)
    B, _, rows, columns = x.shape
    x = x.flatten(2).transpose(1, 2) + state["pos_embed"]
    for k in range(sum(name.endswith("attn.proj.bias") for name in state)):
        shift1, scale1, gate1, shift2, scale2, gate2 = modulation(f"blocks.{k}", c, 6)
        y = linear(f"blocks.{k}.attn.qkv", norm(x) * (1 + scale1) + shift1)
        q, k_, v = (a.view(B, -1, HEADS, D // HEADS) for a in y.split(D, -1))
        scores = torch.einsum("blhd,bmhd->bhlm", q, k_) / (D // HEADS) ** 0.5
        y = torch.einsum("bhlm,bmhd->blhd", scores.softmax(-1), v).reshape(B, -1, D)
        x = x + gate1 * linear(f"blocks.{k}.attn.proj", y)
        y = linear(f"blocks.{k}.mlp.fc1", norm(x) * (1 + scale2) + shift2)
        y = 0.5 * y * (1 + (math.sqrt(2 / math.pi) * (y + 0.044715 * y**3)).tanh())
        x = x + gate2 * linear(f"blocks.{k}.mlp.fc2", y)
    shift, scale = modulation("final_layer", c, 2)
    x = linear("final_layer.linear", norm(x) * (1 + scale) + shift)
    x = x.view(B, rows, columns, patch, patch, -1).permute(0, 5, 1, 3, 2, 4)
    return x.reshape(B, -1, rows * patch, columns * patch)


def inputs(B=3, C=4, side=8):
    """x, t and labels, of which 5 is the null label."""
    return torch.randn(B, C, side, side), torch.tensor([0, 421, 999])[:B], torch.tensor([0, 3, 5])[:B]


def difference(a, b):
    return ((a - b).abs().max() / b.abs().max()).item()


@pytest.mark.rounding
@torch.no_grad()
@pytest.mark.parametrize("changes", [{}, dict(patch=4, C=3, out=6, side=2), dict(out=4, depth=1, D=32)])
def test_a_DiT_written_from_its_paper_gives_the_same(changes):
    state = published(**changes)
    x, t, y = inputs(C=changes.get("C", 4))
    exact = {name: tensor.double() for name, tensor in state.items()}
    expected = reference(exact, x.double(), t, y)
    model = from_published(state, HEADS)
    assert difference(model(x, t, y), expected) < 1e-5
    dropped = torch.tensor([False, True, True])  # a dropped label is the last row
    expected = reference(exact, x.double(), t, torch.tensor([0, 5, 5]))
    assert difference(model(x, t, y, dropped=dropped), expected) < 1e-5


def to_diffusers(state):
    """The public layout → diffusers', in which each block has a copy of the embeddings of time and label."""
    result = {}

    def put(name, published):
        for kind in ("weight", "bias"):
            if f"{published}.{kind}" in state:
                result[f"{name}.{kind}"] = state[f"{published}.{kind}"]

    put("pos_embed.proj", "x_embedder.proj")
    put("proj_out_1", "final_layer.adaLN_modulation.1")
    put("proj_out_2", "final_layer.linear")
    for k in range(sum(name.endswith("attn.proj.bias") for name in state)):
        there, here = f"transformer_blocks.{k}.", f"blocks.{k}."
        put(there + "norm1.emb.timestep_embedder.linear_1", "t_embedder.mlp.0")
        put(there + "norm1.emb.timestep_embedder.linear_2", "t_embedder.mlp.2")
        put(there + "norm1.emb.class_embedder.embedding_table", "y_embedder.embedding_table")
        put(there + "norm1.linear", here + "adaLN_modulation.1")
        put(there + "attn1.to_out.0", here + "attn.proj")
        put(there + "ff.net.0.proj", here + "mlp.fc1")
        put(there + "ff.net.2", here + "mlp.fc2")
        for kind in ("weight", "bias"):
            for name, part in zip("qkv", state[f"{here}attn.qkv.{kind}"].chunk(3)):
                result[f"{there}attn1.to_{name}.{kind}"] = part
    return result


@torch.no_grad()
def test_the_DiT_of_diffusers_gives_the_same():
    """diffusers takes 127 steps, not DiT's 128, from the first frequency of the timestep to 1/10000, and 1e-5
    in the second norm for DiT's 1e-6. Set to DiT's values, it is equal."""
    state = published()
    model = DiTTransformer2DModel(
        num_attention_heads=HEADS, attention_head_dim=24 // HEADS, num_layers=2, in_channels=4,
        out_channels=8, sample_size=8, patch_size=2, num_embeds_ada_norm=5, norm_eps=1e-6,
    ).eval()
    model.load_state_dict(to_diffusers(state))
    for block in model.transformer_blocks:
        block.norm1.emb.time_proj.downscale_freq_shift = 0
    x, t, y = inputs()
    state["pos_embed"] = model.pos_embed.pos_embed
    assert difference(from_published(state, HEADS)(x, t, y), model(x, t, y).sample) < 1e-4


def test_the_public_XL_is_known_by_its_shapes():
    """The file's tensors at their full shapes, as zeros that take no memory."""
    shapes = {name: tensor.shape for name, tensor in published(1, 1152, classes=1000, side=1).items()}
    state = {name: torch.zeros(1).expand(shape) for name, shape in shapes.items()}
    for k in range(28):
        block = {name: tensor for name, tensor in state.items() if "blocks.0" in name}
        state |= {name.replace("blocks.0", f"blocks.{k}"): tensor for name, tensor in block.items()}
    state["pos_embed"] = positions(16, 1152)
    assert len(state) == 292 and sum(tensor.numel() for tensor in state.values()) == 675_129_632
    assert config_of(state) == ModelConfig.of("XL", integration="class", classes=1000, out_channels=8)
    assert sum(p.numel() for p in from_published(state).parameters()) == 675_129_632 - 256 * 1152


def test_a_file_plain_or_of_train_py(tmp_path):
    state = published(12, 384, classes=1)  # S/2, by its depth and width
    torch.save(state, tmp_path / "plain.pt")
    flags = argparse.Namespace(model="DiT-S/2")
    torch.save({"model": {}, "ema": state, "opt": {"state": {}}, "args": flags}, tmp_path / "trained.pt")
    for name in ("plain.pt", "trained.pt"):
        model, side = load(tmp_path / name)
        assert side == 8
        assert model.config == ModelConfig.of("S", integration="class", classes=1, out_channels=8)
        bias = model.state_dict()["blocks.7.self_attention.qkv.bias"]
        assert torch.equal(bias, state["blocks.7.attn.qkv.bias"])
        assert not any(tensor.is_meta for tensor in model.state_dict().values())


def without(state, name):
    return {key: tensor for key, tensor in state.items() if key != name}


WRONG = {
    "1 tensors are missing: blocks.1.mlp.fc2.bias": lambda s: without(s, "blocks.1.mlp.fc2.bias"),
    "2 tensors are unknown: a.b, c": lambda s: s | {"a.b": torch.ones(1), "c": torch.ones(1)},
    r"blocks.0.attn.qkv.weight has shape \(48, 24\), not \(72, 24\)": lambda s: s
    | {"blocks.0.attn.qkv.weight": torch.ones(48, 24)},
    r"final_layer.linear.bias has shape \(1,\), not \(32,\)": lambda s: s
    | {"final_layer.linear.bias": torch.ones(1)},
    "not a DiT checkpoint: there is no tensor x_embedder.proj.weight": lambda s: {"conv": torch.ones(1)},
    "not a DiT checkpoint: there is no tensor pos_embed with 3": lambda s: s | {"pos_embed": torch.ones(3)},
    "not a DiT checkpoint: it is not a dictionary": lambda s: list(s.values()),
    "not a DiT checkpoint: it is not a dictionary of": lambda s: {"step": 3},
    "pos_embed does not hold": lambda s: s | {"pos_embed": torch.cat(s["pos_embed"].split(12, -1)[::-1], -1)},
    "pos_embed does not hold the sin-cos": lambda s: s | {"pos_embed": s["pos_embed"][:, :15]},
    "pos_embed does not hold the sin-cos positions": lambda s: s | {"pos_embed": s["pos_embed"] > 0},
    "not a DiT checkpoint: there is no tensor pos_embed": lambda s: s | {"pos_embed": s["pos_embed"][:0]},
    "not a DiT checkpoint: there is no tensor pos_embed with": lambda s: s | {"pos_embed": s["pos_embed"][:, :0]},
    "not a DiT checkpoint: there is no tensor x_embedder.proj.weight with": lambda s: s
    | {"x_embedder.proj.weight": s["x_embedder.proj.weight"][..., :0, :0]},
    "not a DiT checkpoint: 4 channels in, 9 out, not 4 or 8": lambda s: s
    | {f"final_layer.linear.{name}": torch.cat([s[f"final_layer.linear.{name}"], torch.ones(4, *rest)])
       for name, rest in (("weight", [24]), ("bias", []))},
    "not a DiT checkpoint: it is not a dictionary of tensors by name": lambda s: s | {3: torch.ones(1)},
}


@pytest.mark.parametrize("message", WRONG)
def test_wrong_checkpoints_are_named(message, tmp_path):
    path = tmp_path / "wrong.pt"
    torch.save(WRONG[message](published()), path)
    with pytest.raises(ValueError, match=f"wrong.pt: {message}"):
        load(path, HEADS)


def test_unknown_heads(tmp_path):
    torch.save(published(), tmp_path / "tiny.pt")
    with pytest.raises(ValueError, match="tiny.pt: depth 2 and width 24 are none of DiT's sizes: .* --heads"):
        load(tmp_path / "tiny.pt")


class Evil:
    def __reduce__(self):
        return exec, ("raise SystemExit('ran')",)


def test_damaged_files_are_named_and_no_code_runs(tmp_path):
    torch.save(published(), tmp_path / "whole.pt")
    whole, path = (tmp_path / "whole.pt").read_bytes(), tmp_path / "bad.pt"
    contents = [b"", b"abc", b"\0" * 100, whole[:100], whole[: len(whole) // 2], whole[:-1]]
    contents.append(pickle.dumps({"a": Evil()}))
    torch.save({"a": Evil()}, path)
    for content in [path.read_bytes(), *contents]:
        path.write_bytes(content)
        with pytest.raises(ValueError, match="bad.pt cannot be read: .* holds more than tensors"):
            load(path)
    with pytest.raises(FileNotFoundError):
        load(tmp_path / "none.pt")


@torch.no_grad()
def test_classes_are_drawn_as_DiT_does_but_guided_in_all_channels():
    state = published()
    exact, model = {name: tensor.double() for name, tensor in state.items()}, from_published(state, HEADS)
    generators = [torch.Generator().manual_seed(5 + i) for i in range(2)]
    x = torch.stack([torch.randn(4, 8, 8, generator=g) for g in generators]).double()

    def guided(x, t):
        out, null = reference(exact, x, t, torch.tensor([3, 0])), reference(exact, x, t, torch.tensor([5, 5]))
        return torch.cat([(null + 4 * (out - null))[:, :4], out[:, 4:]], 1)

    both = generate(model, [3, 0], 8, seed=5, steps=6)
    assert difference(both, p_sample_loop(guided, x, 6, generators)[1][-1]) < 1e-4
    assert difference(generate(model, [3], 8, seed=5, steps=6), both[:1]) < 1e-4  # whatever else is drawn


class Mixture(torch.nn.Module):
    """What a perfect DiT predicts for data at -1 and 1, each with a standard deviation of 0.2."""

    def __init__(self):
        super().__init__()
        self.place = torch.nn.Parameter(torch.zeros(1))  # tells the device
        self.config = ModelConfig(channels=1, out_channels=1, integration="class", classes=1)

    def forward(self, x, t, text, dropped):
        alpha, sigma = Diffusion("linear").alpha_sigma(t, x)
        means, variance = torch.tensor([-1.0, 1.0]), (0.2 * alpha) ** 2 + sigma**2
        error = x[..., None] - alpha[..., None] * means  # (B, 1, h, w, 2), from either mode
        share = (-0.5 * error.square() / variance[..., None]).softmax(-1)
        return sigma * (share * error).sum(-1) / variance


@pytest.mark.parametrize("sampler, steps", [("sde", 16), ("sde", 50), ("sde", 250), ("dpm", 40), ("dpm", 50), ("ddpm", 250)])
def test_a_mode_of_the_data_is_as_wide_as_it_should_be(sampler, steps):
    """The two solvers of second order, on timesteps that end at 0, make it 1.3 to 4 times as wide."""
    x = generate(Mixture(), [0] * 4, 32, 0, sampler, steps, guidance=1.0)
    assert 0.5 < x[x > 0].var() / 0.2**2 < 1.1


def test_the_command_draws_a_grid(tmp_path, capsys):
    torch.save(published(), tmp_path / "tiny.pt")
    for C in (4, 5):
        config = dict(channels=C, width=8, depth=1)
        state = Autoencoder(AutoencoderConfig(**config)).state_dict()
        (tmp_path / f"ae{C}").mkdir()
        metadata = {"config": json.dumps({"autoencoder": config}), "format": "2"}
        weights.write(tmp_path / f"ae{C}/model.safetensors", state, metadata)
    out = tmp_path / "new/classes.png"
    words = [str(tmp_path / "tiny.pt"), "3", "0", "--autoencoder", str(tmp_path / "ae4"), "--heads", "2"]
    words += ["--steps", "4", "--out", str(out), "--device", "cpu"]
    published_dit.main(words)
    assert Image.open(out).width == 2 * 64 + 3 * 4
    assert f"2 pictures from {words[0]} → {out}" in capsys.readouterr().out
    for change, message in (
        (["5"], "class 5 is not one of 0 to 4"),
        (["dog"], "FILE.pt --autoencoder DIR 207 360"),
        (["--sampler", "euler"], "--sampler euler: not one of ddpm"),
        (["--steps", "0"], "--steps 0: must be from 1 to 1000"),
        (["--guidance", "-1"], "--guidance -1.0: must be from 0 to 100"),
        (["--guidance", "1e30"], "--guidance 1e\\+30: must be from 0 to 100"),
        (["--heads", "5"], "tiny.pt: width 24 is not divisible by 5 heads"),
        (["--autoencoder", str(tmp_path / "ae5")], "tiny.pt has 4 latent channels, .*ae5 5"),
    ):
        with pytest.raises(ValueError, match=message):
            published_dit.main(words + change)
    with pytest.raises(ValueError, match="FILE.pt --autoencoder DIR 207 360"):
        published_dit.main([])
