import pytest
import torch

import attention
from attention import MultiHeadAttention, fused_attention, written_out_attention
from conditioning import CrossAttention
from temporal import TempSelfAttn


def tensors(dtype=torch.float64):
    q, k, v = (torch.randn(2, 3, n, 8, dtype=dtype, requires_grad=True) for n in (5, 7, 7))
    return q, k, v


def moved(tensor, device, dtype):
    return tensor.detach().to(device, dtype).requires_grad_()


KERNELS = [("cpu", torch.float64, 1e-9), ("cpu", torch.float32, 1e-5), ("cpu", torch.bfloat16, 2e-2)]
if torch.cuda.is_available():
    KERNELS += [("cuda", torch.float32, 1e-5), ("cuda", torch.bfloat16, 2e-2)]


@pytest.mark.rounding
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("device, dtype, tolerance", KERNELS)
def test_fused_is_the_equation_in_value_and_gradient(device, dtype, tolerance, masked):
    """Against the written-out one in float64. A GPU has a kernel for each dtype, with its own idea of a row without keys."""
    exact = tensors()
    mask = torch.rand(2, 1, 5, 7) > 0.4 if masked else None
    if masked:
        mask[0, 0, 2] = False  # a query that may attend nothing
        mask[1] = False
    results = []
    for function, inputs in (
        (fused_attention, [moved(t, device, dtype) for t in exact]),
        (written_out_attention, exact),
    ):
        out = function(*inputs, mask if mask is None else mask.to(inputs[0].device))
        results.append([out, *torch.autograd.grad(out.square().sum(), inputs)])
    for a, b in zip(*results):
        assert (a.cpu().double() - b).norm() <= tolerance * b.norm()


def test_a_kernel_that_gives_a_query_without_keys_something(monkeypatch):
    """As cuDNN's does in bf16: the mean of the values, say."""
    mean = lambda q, k, v, attn_mask=None: v.mean(2, keepdim=True).expand(*q.shape[:3], -1)
    monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", mean)
    q, k, v = tensors()
    mask = torch.ones(2, 1, 5, 7, dtype=torch.bool)
    mask[0, 0, 2] = False
    out = fused_attention(q, k, v, mask)
    assert (out[0, :, 2] == 0).all() and (out[0, :, 1] != 0).all()


def test_written_out_is_the_equation():
    """One query, two keys, by hand: weights softmax(1/sqrt(2), 0)."""
    q = torch.tensor([[[[1.0, 0.0]]]])
    k = torch.tensor([[[[1.0, 0.0], [0.0, 1.0]]]])
    v = torch.tensor([[[[1.0], [0.0]]]])
    expected = torch.exp(torch.tensor(0.5**0.5)) / (1 + torch.exp(torch.tensor(0.5**0.5)))
    torch.testing.assert_close(written_out_attention(q, k, v).squeeze(), expected)


@pytest.mark.parametrize("function", [fused_attention, written_out_attention])
def test_true_means_attend(function):
    q, k, v = tensors()
    mask = torch.zeros(5, 7, dtype=torch.bool)
    mask[:, 3] = True
    torch.testing.assert_close(function(q, k, v, mask), v[:, :, 3:4].expand(-1, -1, 5, -1))
    nothing = function(q, k, v, torch.zeros(5, 7, dtype=torch.bool))
    assert (nothing == 0).all()


@pytest.mark.parametrize("qk_norm", [False, True])
def test_layer_equals_torch_multi_head(qk_norm):
    """Against torch's own layer with the same weights (without QK-norm, which it lacks); with it, both paths agree."""
    layer = MultiHeadAttention(12, 3, qk_norm=qk_norm).double()
    x = torch.randn(2, 6, 12, dtype=torch.float64)
    mask = torch.rand(2, 6) > 0.3
    mask[:, 0] = True
    ours = layer(x, mask=mask[:, None, None, :])
    if qk_norm:
        attention.use_attention(layer, written_out_attention)
        torch.testing.assert_close(ours, layer(x, mask=mask[:, None, None, :]))
        return
    theirs = torch.nn.MultiheadAttention(12, 3, batch_first=True, dtype=torch.float64)
    with torch.no_grad():
        theirs.in_proj_weight.copy_(torch.cat([layer.q.weight, layer.k.weight, layer.v.weight]))
        theirs.in_proj_bias.copy_(torch.cat([layer.q.bias, layer.k.bias, layer.v.bias]))
        theirs.out_proj.load_state_dict(layer.out.state_dict())
    torch.testing.assert_close(ours, theirs(x, x, x, key_padding_mask=~mask)[0])


def test_qk_norm_is_off_unless_asked_for():
    names = lambda layer: {name for name, _ in layer.named_parameters()}
    plain = {f"{layer}.{part}" for layer in ("q", "k", "v", "out") for part in ("weight", "bias")}
    for layer in (MultiHeadAttention(12, 3), CrossAttention(12, 3, 10).attention, TempSelfAttn(12, 3).attention):
        assert names(layer) == plain
    assert names(MultiHeadAttention(12, 3, qk_norm=True)) == plain | {"q_norm.weight", "k_norm.weight"}


@pytest.mark.parametrize(
    "name, device, function",
    [
        ("auto", "cpu", written_out_attention),
        ("auto", "cuda", fused_attention),
        ("fused", "cpu", fused_attention),
        ("written", "cuda", written_out_attention),
    ],
)
def test_auto_is_written_out_on_a_cpu_alone(name, device, function):
    layers = torch.nn.ModuleList(MultiHeadAttention(8, 2) for _ in range(2))
    layers[0].attend = layers[1].attend = None
    attention.choose_attention(layers, name, torch.device(device))
    assert [layer.attend for layer in layers] == [function, function]


def test_width_must_divide():
    with pytest.raises(ValueError, match="10 is not divisible by 3"):
        MultiHeadAttention(10, 3)
