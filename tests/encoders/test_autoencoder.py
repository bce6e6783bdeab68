import json
import math

import diffusers
import pytest
import torch
from conftest import fake_cuda, rounding
from oracles import oracle, shake
from torch._subclasses import FakeTensorMode

from common.files import FORMAT
from encoders import weights
from encoders.autoencoder import Autoencoder, AutoencoderConfig
from encoders.autoencoder_kl import AutoencoderKL, AutoencoderKLConfig
from encoders.autoencoders import build, load

PUBLISHED = (128, 256, 512, 512)
TINY = {
    "two levels": dict(widths=(32, 64), layers=1),
    "four levels": dict(widths=(16, 32, 32, 32), norm_num_groups=8, latent_channels=16, use_quant_conv=False,
                        use_post_quant_conv=False, scaling_factor=1.5305, shift_factor=0.0609),
    "as published": dict(widths=tuple(w // 8 for w in PUBLISHED), norm_num_groups=4),
}


@pytest.fixture
def folder(tmp_path):
    oracle((8, 16), layers=1, norm_num_groups=4).save_pretrained(tmp_path)
    return tmp_path


def edit(folder, **changes):
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def edit_tensors(folder, change):
    path = folder / "diffusion_pytorch_model.safetensors"
    weights.write(path, change(weights.read(path)[0]))


def one_line(folder, match):
    with pytest.raises(ValueError, match=match) as error:
        load(folder)
    assert str(folder) in str(error.value) and "\n" not in str(error.value)


def near(ours, theirs):
    assert ours.shape == theirs.shape and (ours - theirs).abs().max() <= 1e-4 * theirs.abs().max()


@pytest.mark.parametrize("safe", [True, False], ids=["safetensors", "bin"])
@pytest.mark.parametrize("name", TINY)
@torch.no_grad()
def test_a_published_folder_gives_diffusers_own_numbers(tmp_path, name, safe):
    theirs = oracle(**TINY[name])
    theirs.save_pretrained(tmp_path, safe_serialization=safe)
    assert len(list(tmp_path.iterdir())) == 2
    ours = load(tmp_path)
    assert ours.factor == 2 ** (len(TINY[name]["widths"]) - 1)
    assert ours.config.channels == theirs.config.latent_channels
    pictures = torch.rand(2, 3, 48, 32) * 2 - 1
    posterior = theirs.encode(pictures).latent_dist
    mean, log_variance = ours.moments(pictures)
    near(mean, posterior.mean)
    near(log_variance, posterior.logvar)
    scaled = (posterior.mean - (theirs.config.shift_factor or 0)) * theirs.config.scaling_factor
    latents = ours.encode(pictures)
    near(latents, scaled)
    near(latents * ours.scale + ours.shift.view(1, -1, 1, 1), posterior.mean)
    near(ours.decode(latents), theirs.decode(posterior.mean).sample)
    with pytest.raises(ValueError, match=rf"\(30, 33\) is not divisible by {ours.factor}"):
        ours.encode(torch.zeros(1, 3, 30, 33))


@torch.no_grad()
def test_log_variance_is_clamped_as_published():
    model = AutoencoderKL(AutoencoderKLConfig(2, (8, 8), 1, 4))
    model.quant_conv.weight.zero_()
    model.quant_conv.bias.copy_(torch.tensor([-50.0, 50, -50, 50]))
    mean, log_variance = model.moments(torch.zeros(1, 3, 4, 4))
    assert mean.amin() == -50 and mean.amax() == 50
    assert log_variance.amin() == -30 and log_variance.amax() == 20


@pytest.mark.parametrize("convolutions", [False, True])
@torch.no_grad()
def test_the_attention_names_of_old_files(folder, convolutions):
    pictures = torch.rand(1, 3, 8, 8) * 2 - 1
    expected = load(folder).encode(pictures)

    names = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}

    def old(tensors):
        renamed = {}
        for name, tensor in tensors.items():
            for new, then in names.items():
                if new in name:
                    name = name.replace(new, then)
                    tensor = tensor[..., None, None] if convolutions and tensor.ndim == 2 else tensor
            renamed[name] = tensor
        assert sum("proj_attn" in name for name in renamed) == 4
        return renamed

    edit_tensors(folder, old)
    assert torch.equal(load(folder).encode(pictures), expected)


def test_config_keys_that_old_files_lack(folder):
    config = json.loads((folder / "config.json").read_text())
    numbers, layers = ("scaling_factor", "shift_factor"), ("use_quant_conv", "use_post_quant_conv")
    for key in (*numbers, *layers, "mid_block_add_attention"):
        del config[key]
    (folder / "config.json").write_text(json.dumps(config))
    model = load(folder)
    torch.testing.assert_close(model.scale, torch.tensor([1 / 0.18215]))
    assert model.shift.tolist() == [0] * 4
    assert {"quant_conv.weight", "post_quant_conv.weight"} < model.state_dict().keys()


def test_half_precision_files_become_fp32(folder):
    edit_tensors(folder, lambda tensors: {name: tensor.half() for name, tensor in tensors.items()})
    assert {p.dtype for p in load(folder).parameters()} == {torch.float32}


@pytest.mark.parametrize(
    "change, message",
    [
        (dict(_class_name="VQModel"), "is of a model of type 'VQModel', not AutoencoderKL"),
        (dict(act_fn="gelu"), "act_fn is 'gelu'"),
        (dict(latents_mean=[0.0] * 4), "latents_mean"),
        (dict(latents_std=[1.0] * 4), "latents_std"),
        (dict(norm_num_groups=3), r"norm_num_groups is 3, which does not divide all of \[8, 16\], its block_out_channels"),
        (dict(block_out_channels=8), "block_out_channels is 8, not a list of whole numbers above 0"),
        (dict(block_out_channels=[]), r"block_out_channels is \[\], not a list"),
        (dict(block_out_channels=[8, "16"]), r"block_out_channels is \[8, '16'\], not a list"),
        (dict(block_out_channels=[8, -8]), r"block_out_channels is \[8, -8\], not a list"),
        (dict(latent_channels="4"), "latent_channels is '4', not a whole number above 0"),
        (dict(latent_channels=None), "latent_channels is None, not a whole number"),
        (dict(latent_channels=10**30), "latent_channels is 10+, not a whole number"),
        (dict(layers_per_block=0), "layers_per_block is 0, not a whole number"),
        (dict(layers_per_block=True), "layers_per_block is True, not a whole number"),
        (dict(norm_num_groups=4.0), "norm_num_groups is 4.0, not a whole number"),
        (dict(scaling_factor=None), "scaling_factor is None, not a number"),
        (dict(scaling_factor=0), "scaling_factor is 0, not above 0.000001"),
        (dict(scaling_factor=-0.18), "scaling_factor is -0.18, not above 0.000001"),
        (dict(scaling_factor=math.nan), "scaling_factor is nan, not a number"),
        (dict(scaling_factor="0.18215"), "scaling_factor is '0.18215', not a number"),
        (dict(shift_factor=False), "shift_factor is False, not a number"),
        (dict(shift_factor=-math.inf), "shift_factor is -inf, not a number"),
        (dict(use_quant_conv=None), "use_quant_conv is None, not true or false"),
        (dict(use_post_quant_conv="false"), "use_post_quant_conv is 'false', not true or false"),
        (dict(use_quant_conv=False), r"missing \[\], unknown .'quant_conv"),
        (dict(layers_per_block=2), "missing .'encoder.down_blocks.0.resnets.1"),
        (dict(latent_channels=8), "conv_.*.weight. has the shape"),
    ],
)
def test_a_config_that_does_not_fit_is_named(folder, change, message):
    load(folder)
    edit(folder, **change)
    one_line(folder, message)


@pytest.mark.parametrize(
    "change, message",
    [
        (dict(down_block_types=["DownEncoderBlock2D", "AttnDownEncoderBlock2D"]), "unknown .'encoder.down_blocks.1.att"),
        (dict(up_block_types=["AttnUpDecoderBlock2D", "UpDecoderBlock2D"]), "unknown .'decoder.up_blocks.0.attentions"),
        (dict(mid_block_add_attention=False), "missing .'encoder.mid_block.attentions.0"),
        (dict(in_channels=1), "'encoder.conv_in.weight' has the shape"),
        (dict(out_channels=1), "'decoder.conv_out.bias' has the shape"),
    ],
)
def test_other_layers_are_named(tmp_path, change, message):
    sizes = dict(block_out_channels=(8, 16), layers_per_block=1, norm_num_groups=4)
    kinds = dict(down_block_types=["DownEncoderBlock2D"] * 2, up_block_types=["UpDecoderBlock2D"] * 2)
    diffusers.AutoencoderKL(**sizes | kinds | change).save_pretrained(tmp_path)
    one_line(tmp_path, message)


def test_files_that_do_not_fit_are_named(folder, tmp_path_factory):
    file = folder / "diffusion_pytorch_model.safetensors"
    tensors = weights.read(file)[0]
    weights.write(file, {name: tensor for name, tensor in tensors.items() if name != "quant_conv.bias"})
    one_line(folder, r"missing .'quant_conv.bias'., unknown \[\]")
    weights.write(file, tensors | {"loss.discriminator": torch.zeros(3)})
    one_line(folder, r"missing \[\], unknown .'loss.discriminator'.")
    weights.write(file, tensors | {"quant_conv.bias": torch.zeros(3)})
    one_line(folder, "'quant_conv.bias' has the shape")
    weights.write(file, tensors)
    file.write_bytes(file.read_bytes()[:-100])
    one_line(folder, "cut short")
    file.unlink()
    one_line(folder, "no weights in")
    binary = file.with_suffix(".bin")
    torch.save(tensors, binary)
    whole = binary.read_bytes()
    for length in (0, 1, 10, 1000, len(whole) // 2, len(whole) - 1000, len(whole) - 10):
        binary.write_bytes(whole[:length])
        one_line(folder, "not a file of tensors alone")
    torch.save(list(tensors), binary)
    one_line(folder, "not a file of tensors alone")
    torch.save({name: "text" for name in tensors}, binary)
    one_line(folder, "not a file of tensors alone")
    (folder / "config.json").write_text("{")
    one_line(folder, "does not hold a JSON object")
    (folder / "config.json").write_text("[]")
    one_line(folder, "does not hold a JSON object")
    (folder / "config.json").unlink()
    one_line(folder, "no model.safetensors there")


class Trap:
    """Pickled, it asks whoever reads it to make a folder."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return __import__("os").mkdir, (self.path,)


def test_a_pickle_runs_nothing(folder):
    file = folder / "diffusion_pytorch_model.safetensors"
    tensors = weights.read(file)[0] | {"quant_conv.bias": Trap(str(folder / "made"))}
    torch.save(tensors, file.with_suffix(".bin"))
    file.unlink()
    one_line(folder, "not a file of tensors alone")
    assert not (folder / "made").exists()


def test_a_runs_folder_loads_as_before(tmp_path):
    model = Autoencoder(AutoencoderConfig(4, 16, 1))
    assert not any("shortcut" in name for name in model.state_dict()) and len(model.state_dict()) == 54
    metadata = dict(config=json.dumps(dict(autoencoder=vars(model.config))), format=str(FORMAT))
    weights.write(tmp_path / "model.safetensors", model.state_dict(), metadata)
    again = load(tmp_path)
    assert type(again) is Autoencoder and again.config == model.config
    assert all(torch.equal(tensor, again.state_dict()[name]) for name, tensor in model.state_dict().items())


@pytest.mark.parametrize("config", [AutoencoderConfig(4, 16), AutoencoderKLConfig(4, (8, 16), 1, 4)])
def test_build_makes_the_kind_that_a_config_is_of(config):
    assert build(vars(config)).config == config


def test_the_published_size():
    with torch.device("meta"):
        ours = AutoencoderKL(AutoencoderKLConfig())
    with torch.device("meta"):
        theirs = diffusers.AutoencoderKL(
            block_out_channels=PUBLISHED, layers_per_block=2, down_block_types=["DownEncoderBlock2D"] * 4,
            up_block_types=["UpDecoderBlock2D"] * 4,
        )
    shapes = lambda model: {name: tensor.shape for name, tensor in model.state_dict().items()}
    assert shapes(ours) == shapes(theirs) and sum(p.numel() for p in ours.parameters()) == 83_653_863
    latents = ours.encode(torch.zeros(3, 3, 512, 512, device="meta"))
    assert latents.shape == (3, 4, 64, 64) and ours.decode(latents).shape == (3, 3, 512, 512)
    assert ours.decode(torch.zeros(1, 4, 96, 128, device="meta")).shape == (1, 3, 768, 1024)


def test_the_forward_pass_on_a_gpu():
    """With fake tensors, which have no values, and so need no GPU."""
    with torch.device("meta"):
        model = AutoencoderKL(AutoencoderKLConfig(4, (8, 16), 1, 4))
    with FakeTensorMode(), torch.no_grad():
        fake_cuda(model)
        pictures = model.decode(model.encode(torch.empty(2, 3, 64, 64, device="cuda")))
    assert pictures.shape == (2, 3, 64, 64) and pictures.device.type == "cuda"


@pytest.mark.rounding
@torch.no_grad()
def test_slices_equal_the_whole():
    """Up to rounding: some twenty convolutions, in sums of 16·3·3."""
    near = lambda found, whole: (found - whole).abs().max() <= rounding(whole, sums=20 * 144)
    model = shake(AutoencoderKL(AutoencoderKLConfig(4, (8, 16), 1, 4)))
    pictures = torch.rand(5, 3, 16, 16) * 2 - 1
    seen = []
    for part in (model.encoder, model.decoder):
        part.register_forward_hook(lambda module, inputs, out: seen.append(len(inputs[0])))
    latents = model.encode(pictures)
    decoded = model.decode(latents)
    assert seen == [5, 5]
    for positions, sizes in ((144, [2, 2, 1]), (36, [1] * 5)):  # a picture has 64
        seen.clear()
        model.at_once = positions
        assert near(model.encode(pictures), latents) and near(model.decode(latents), decoded)
        assert seen == sizes * 2
    seen.clear()
    model.at_once = 144
    model.decode(torch.randn(3, 4, 4, 32))  # as many positions as 12×12, whatever their shape
    assert seen == [1, 1, 1]


@pytest.mark.parametrize("values", [[1.0] * 4, [-1.0, 1.0, 1.0, -1.0], [0.3] * 4])
def test_pictures_of_one_colour_train(values):
    """Their patches have no variance, which the principal components divide by."""
    pictures = torch.tensor(values).view(4, 1, 1, 1).expand(4, 3, 32, 32)
    model = Autoencoder(AutoencoderConfig())
    model.start_from(pictures)
    model.loss(pictures, torch.randn(4, 8, 4, 4), 1e-5).mean().backward()
    assert all(p.grad.isfinite().all() for p in model.parameters() if p.grad is not None)
    model.calibrate(pictures)
    assert (model.decode(model.encode(pictures)) - pictures).abs().max() < 0.05
