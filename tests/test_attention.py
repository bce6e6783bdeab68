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
    """Against the written-out one in float64. A GPU has a kernel for each dtype."""
    exact = tensors()
    mask = torch.rand(2, 1, 5, 7) > 0.4 if masked else None
    if masked:
        mask[..., 3] = True  # a query attends to something
        mask[1, ..., 4:] = False
    results = []
    for function, inputs in (
        (fused_attention, [moved(t, device, dtype) for t in exact]),
        (written_out_attention, exact),
    ):
        out = function(*inputs, mask if mask is None else mask.to(inputs[0].device))
        results.append([out, *torch.autograd.grad(out.square().sum(), inputs)])
    for a, b in zip(*results):
        assert (a.cpu().double() - b).norm() <= tolerance * b.norm()


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


@pytest.mark.parametrize("qk_norm", [False, True])
def test_layer_equals_torch_multi_head(qk_norm):
    """Against torch's own layer with the same weights (without QK-norm, which it lacks); with it, both paths agree."""
    layer = MultiHeadAttention(12, 3, qk_norm=qk_norm).double()
    x = torch.randn(2, 6, 12, dtype=torch.float64)
    mask = torch.rand(2, 6) > 0.3
    mask[:, 0] = True
    ours = layer(x, mask=mask[:, None, None, :])
    if qk_norm:
        attention.use_attention(layer, "written")
        torch.testing.assert_close(ours, layer(x, mask=mask[:, None, None, :]))
        return
    theirs = torch.nn.MultiheadAttention(12, 3, batch_first=True, dtype=torch.float64)
    with torch.no_grad():
        theirs.in_proj_weight.copy_(layer.qkv.weight)
        theirs.in_proj_bias.copy_(layer.qkv.bias)
        theirs.out_proj.load_state_dict(layer.out.state_dict())
    torch.testing.assert_close(ours, theirs(x, x, x, key_padding_mask=~mask)[0])


def test_qk_norm_is_off_unless_asked_for():
    names = lambda layer: {name for name, _ in layer.named_parameters()}
    with_bias = lambda *layers: {f"{layer}.{part}" for layer in layers for part in ("weight", "bias")}
    for layer in (MultiHeadAttention(12, 3), TempSelfAttn(12, 3).attention):
        assert names(layer) == with_bias("qkv", "out")
    assert names(CrossAttention(12, 3, 10).attention) == with_bias("q", "kv", "out")
    norms = {"q_norm.weight", "k_norm.weight"}
    assert names(MultiHeadAttention(12, 3, qk_norm=True)) == with_bias("qkv", "out") | norms


def test_cross_attention_equals_torch_multi_head():
    """Queries of x, keys and values of a context of another width."""
    layer = MultiHeadAttention(12, 3, 10).double()
    x, context = torch.randn(2, 6, 12, dtype=torch.float64), torch.randn(2, 5, 10, dtype=torch.float64)
    theirs = torch.nn.MultiheadAttention(12, 3, kdim=10, vdim=10, batch_first=True, dtype=torch.float64)
    with torch.no_grad():
        theirs.q_proj_weight.copy_(layer.q.weight)
        theirs.k_proj_weight.copy_(layer.kv.weight[:12])
        theirs.v_proj_weight.copy_(layer.kv.weight[12:])
        theirs.in_proj_bias.copy_(torch.cat([layer.q.bias, layer.kv.bias]))
        theirs.out_proj.load_state_dict(layer.out.state_dict())
    torch.testing.assert_close(layer(x, layer.kv(context)), theirs(x, context, context)[0])


@pytest.mark.parametrize(
    "name, device, rows, chosen",
    [
        ("auto", "cpu", 300, "written"),
        ("auto", "meta", 300, "fused"),  # which stands for a GPU
        ("auto", "meta", 8, "written"),  # frames of a clip
        ("fused", "cpu", 8, "fused"),
        ("written", "meta", 300, "written"),
    ],
)
def test_auto_is_fused_for_long_rows_on_a_gpu_alone(monkeypatch, name, device, rows, chosen):
    called = []
    for key, function in (("written", "written_out_attention"), ("fused", "fused_attention")):
        spy = lambda q, k, v, mask, key=key: called.append(key) or q
        monkeypatch.setattr(attention, function, spy)
        monkeypatch.setitem(attention.ATTENTION, key, spy)
    layers = torch.nn.ModuleList(MultiHeadAttention(8, 2) for _ in range(2)).to(device)
    attention.use_attention(layers, name)
    for layer in layers:
        layer(torch.zeros(1, rows, 8, device=device))
    assert called == [chosen] * 2


def test_width_must_divide():
    with pytest.raises(ValueError, match="10 is not divisible by 3"):
        MultiHeadAttention(10, 3)
