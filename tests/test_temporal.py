import pytest
import torch
from conftest import rounding

from diffusion import classifier_free_guidance, motion_free_guidance
from dit import GenTron, ModelConfig, sincos
from temporal import TempSelfAttn, inflate, motion_free_mask

SMALL = dict(depth=2, width=32, heads=4, channels=3, out_channels=3, text_widths=(16,))
B, F, L = 3, 5, 4


def random_weights(model):
    """Nothing at zero, so that every branch counts."""
    with torch.no_grad():
        for p in model.parameters():
            p.copy_(torch.randn_like(p) * 0.1)
    return model


def batch(dtype=torch.float32):
    x = torch.randn(B, F, 3, 4, 6, dtype=dtype)
    t = torch.randint(0, 1000, (B,))
    text = torch.randn(B, L, 16, dtype=dtype)
    mask = torch.arange(L) < torch.tensor([[4], [2], [3]])
    return x, t, (text,), (mask,)


@pytest.mark.rounding
def test_the_inflated_model_equals_the_image_model_on_every_frame():
    """Up to rounding, for a clip's products have more rows than a picture's: 2 blocks of 5 products, in sums of at most 128."""
    image = random_weights(GenTron(ModelConfig(**SMALL)))
    video = GenTron(ModelConfig(**SMALL, temporal=True))
    new = inflate(video, image.state_dict())
    assert new == sorted(name for name in new if "temporal." in name) and len(new) == len(video.state_dict()) - len(image.state_dict())
    assert not any("temporal" in name for name in image.state_dict())  # an image model pays nothing
    x, t, text, mask = batch()
    with torch.no_grad():
        clip = video(x, t, text, mask)
        for i in range(F):
            alone = image(x[:, i], t, text, mask)
            assert (clip[:, i] - alone).abs().max() <= rounding(alone, sums=10 * 128)
    optimizer = torch.optim.SGD(video.parameters(), lr=0.1)
    before = {name: p.detach().clone() for name, p in video.named_parameters()}
    for _ in range(2):  # at first only the output projection has a gradient
        optimizer.zero_grad()
        (video(x, t, text, mask) - torch.randn(B, F, 3, 4, 6)).square().mean().backward()
        optimizer.step()
        moved = {name for name, p in video.named_parameters() if not torch.equal(p, before[name])}
        assert {name for name in new if ".attention.out." in name or "temporal.mlp.2" in name} <= moved
    assert {n for n in new if n.endswith("weight")} <= moved


def test_other_weights_are_named():
    video = GenTron(ModelConfig(**SMALL, temporal=True))
    image = GenTron(ModelConfig(**SMALL | dict(depth=1)))
    with pytest.raises(ValueError, match="does not fit the video model: blocks.1"):
        inflate(video, image.state_dict())


def test_under_the_motion_free_mask_a_frame_sees_itself_alone():
    motion_free = torch.ones(B, dtype=torch.bool)
    video = random_weights(GenTron(ModelConfig(**SMALL, temporal=True)))
    x, t, text, mask = batch()
    other = x.clone()
    other[:, 2] += 1.0
    alone = [i for i in range(F) if i != 2]
    with torch.no_grad():
        a, b = (video(y, t, text, mask, motion_free=motion_free) for y in (x, other))
        assert torch.equal(a[:, alone], b[:, alone]) and not torch.equal(a[:, 2], b[:, 2])
        a, b = (video(y, t, text, mask) for y in (x, other))
        assert all(not torch.allclose(a[:, i], b[:, i], atol=1e-6) for i in range(F))


@pytest.mark.rounding
def test_frames_may_have_timesteps_of_their_own():
    """Under the motion-free mask a clip is then so many pictures, each at its own; and where all are equal, they are one."""
    video = random_weights(GenTron(ModelConfig(**SMALL, temporal=True)))
    x, _, text, mask = batch()
    t, free = torch.randint(0, 1000, (B, F)), torch.ones(B, dtype=torch.bool)
    with torch.no_grad():
        clip = video(x, t, text, mask, motion_free=free)
        for i in range(F):
            alone = video(x[:, i : i + 1], t[:, i], text, mask, motion_free=free)[:, 0]
            assert (clip[:, i] - alone).abs().max() <= rounding(alone, sums=10 * 128)  # as above
        same = video(x, t[:, :1].expand(B, F), text, mask)
        one = video(x, t[:, 0], text, mask)
        assert (same - one).abs().max() <= rounding(one, sums=10 * 128)
        assert (same - video(x, t, text, mask)).abs().max() > 10 * rounding(one, sums=10 * 128)


def test_each_clip_of_a_batch_has_its_own_mask():
    video = random_weights(GenTron(ModelConfig(**SMALL, temporal=True)).double())
    x, t, text, mask = batch(torch.float64)
    free = torch.tensor([True, False, True])
    with torch.no_grad():
        mixed = video(x, t, text, mask, motion_free=free)
        still = video(x, t, text, mask, motion_free=torch.ones(B, dtype=torch.bool))
        moving = video(x, t, text, mask)
        torch.testing.assert_close(mixed[free], still[free], rtol=1e-9, atol=1e-12)
        torch.testing.assert_close(mixed[~free], moving[~free], rtol=1e-9, atol=1e-12)
        assert not torch.allclose(still, moving)
    identity, everything = [[True, False], [False, True]], [[True, True], [True, True]]
    found = motion_free_mask(free, frames=2, tokens=2).squeeze(1).tolist()
    assert found == [identity, identity, everything, everything, identity, identity]


def test_the_layer_is_the_equation_in_the_paper():
    """x + TempSelfAttn(LN(x)) over the frames of one place, against torch's attention."""
    layer = random_weights(TempSelfAttn(16, 2).double())
    x, positions = torch.randn(1, 3, 4, 16, dtype=torch.float64), sincos(torch.arange(3), 16).double()
    theirs = torch.nn.MultiheadAttention(16, 2, batch_first=True).double()
    ours = layer.attention
    with torch.no_grad():
        theirs.in_proj_weight.copy_(ours.qkv.weight)
        theirs.in_proj_bias.copy_(ours.qkv.bias)
        theirs.out_proj.load_state_dict(ours.out.state_dict())
        y = layer.norm(x)[0].transpose(0, 1) + positions  # (N, F, D)
        expected = x + theirs(y, y, y)[0].transpose(0, 1)[None]
        everywhere = motion_free_mask(torch.tensor([False]), frames=3, tokens=4)
        torch.testing.assert_close(layer(x, positions[None], everywhere), expected)


def test_without_positions_a_clip_cannot_be_told_from_its_reverse():
    layer = random_weights(TempSelfAttn(16, 2))
    x = torch.randn(2, F, 6, 16)
    mask = motion_free_mask(torch.zeros(2, dtype=torch.bool), F, tokens=6)
    with torch.no_grad():
        for positions, same in ((torch.zeros(F, 16), True), (sincos(torch.arange(F), 16), False)):
            positions = positions.expand(2, F, 16)
            forth, back = layer(x, positions, mask), layer(x.flip(1), positions, mask).flip(1)
            assert torch.allclose(forth, back, atol=1e-5) == same


def test_frames_taken_out_of_a_clip_keep_their_numbers():
    """With the attention silenced, frames 1 and 4 alone are what they are in the whole clip; with numbers 0 and 1 they
    are not."""
    video = random_weights(GenTron(ModelConfig(**SMALL, temporal=True)).double())
    for block in video.blocks:
        torch.nn.init.zeros_(block.temporal.attention.out.weight)
    x, t, text, mask = batch(torch.float64)
    two, numbers = x[:, [1, 4]], torch.tensor([1, 4])
    with torch.no_grad():
        torch.testing.assert_close(video(two, t, text, mask, frame_numbers=numbers), video(x, t, text, mask)[:, [1, 4]])
        assert (video(two, t, text, mask) - video(x, t, text, mask)[:, [1, 4]]).abs().max() > 1e-4


def test_the_frames_step_is_from_one_number_to_the_next():
    """Frames 0, 1, 2 at a step of 2 are frames 0, 2, 4 at a step of 1, which is the default."""
    assert ModelConfig().frame_step == 1.0
    wide, plain = (GenTron(ModelConfig(**SMALL, temporal=True, frame_step=step)).double() for step in (2.0, 1.0))
    plain.load_state_dict(random_weights(wide).state_dict())
    x, t, text, mask = batch(torch.float64)
    x = x[:, :3]
    with torch.no_grad():
        apart = plain(x, t, text, mask, frame_numbers=torch.tensor([0, 2, 4]))
        torch.testing.assert_close(wide(x, t, text, mask), apart)
        assert not torch.allclose(plain(x, t, text, mask), apart)


def toy(x, t, text, motion_free):
    """A model whose output says which conditions it was given."""
    toy.rows.append(len(x))
    return x * 0.5 + (text + 10.0 * motion_free).view(-1, 1, 1, 1, 1)


def conditions():
    no, yes = torch.zeros(2, dtype=torch.bool), torch.ones(2, dtype=torch.bool)
    text, null = torch.tensor([1.0, 2.0]), torch.tensor([-3.0, -3.0])
    return dict(text=text, motion_free=no), dict(text=null, motion_free=no), dict(text=null, motion_free=yes)


def test_motion_free_guidance_is_the_formula():
    toy.rows = []
    x, t = torch.randn(2, 3, 1, 2, 2), torch.full((2,), 500)
    both, motion, neither = conditions()
    out = motion_free_guidance(toy, both, motion, neither, 7.5, 1.2)(x, t)
    assert toy.rows == [6]  # three passes, one call
    a, b, c = (toy(x, t, **condition) for condition in (both, motion, neither))
    torch.testing.assert_close(out, c + 7.5 * (a - b) + 1.2 * (b - c))


def test_motion_free_guidance_leaves_the_variance_alone_and_has_an_interval_and_a_rescale():
    x, t = torch.randn(2, 3, 1, 4, 4), torch.full((2,), 500)
    both, motion, neither = conditions()

    def learned(x, t, text, motion_free):  # one channel more: that of a learned variance
        shift = (text + 10.0 * motion_free).view(-1, 1, 1, 1, 1)
        return torch.cat([x * shift.cos(), x + shift], dim=2)

    out = motion_free_guidance(learned, both, motion, neither, 7.5, 1.2, rescale=1.0)(x, t)
    plain = learned(x, t, **both)
    torch.testing.assert_close(out[:, :, :1].flatten(1).std(1), plain[:, :, :1].flatten(1).std(1))
    assert torch.equal(out[:, :, 1:], plain[:, :, 1:]) and not torch.allclose(out[:, :, :1], plain[:, :, :1])
    for motion_scale in (1.0, 1.2):
        guided = lambda *interval: motion_free_guidance(learned, both, motion, neither, 7.5, motion_scale, interval=interval)(x, t)
        assert torch.equal(guided(0.0, 0.4), plain) and not torch.equal(guided(0.5, 0.6), plain)


def test_at_lambda_m_one_it_is_classifier_free_guidance_in_two_passes():
    toy.rows = []
    x, t = torch.randn(2, 3, 1, 2, 2), torch.full((2,), 500)
    both, motion, neither = conditions()
    out = motion_free_guidance(toy, both, motion, neither, 7.5, 1.0)(x, t)
    assert toy.rows == [4]
    assert torch.equal(out, classifier_free_guidance(toy, both, motion, 7.5)(x, t))
    a, b, c = (toy(x, t, **condition) for condition in (both, motion, neither))
    torch.testing.assert_close(out, c + 7.5 * (a - b) + 1.0 * (b - c))
