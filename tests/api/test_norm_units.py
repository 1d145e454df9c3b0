"""BatchNorm units: what `F.batch_norm` and a convolution compute, by the operator and its kernels."""

import pytest
import torch
import torch.nn.functional as F

from fused_sepconv import norm_depthwise_conv2d, norm_separable_conv2d, separable_conv2d, use_backend
from fused_sepconv.ops import norm_units
from tests.support.closeness import assert_gradient_as_close_as_eager

C, FEATURES = 8, 16
NORMS = {
    "batch": {"training": True, "momentum": 0.3},
    "running": {"training": False},
    "batch, nothing kept": {"training": True, "keeps": False},
    "no affine": {"training": True, "affine": False},
}


def unit(keeps=True, affine=True, dtype=torch.float64, training=True, size=6, **options):
    """(tensors of a unit by name, options)."""
    generator = torch.Generator().manual_seed(0)

    def randn(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    weight = randn(C)
    weight[0] = 0  # and about half of them are negative
    tensors = {
        "x": 2 * randn(4, C, size, size) + 1,
        "norm_weight": weight if affine else None,
        "norm_bias": randn(C) if affine else None,
        "depthwise_weight": randn(C, 1, 3, 3) / 3,
        "pointwise_weight": randn(FEATURES, C, 1, 1) / 3,
        "bias": randn(FEATURES),
        "depthwise_bias": randn(C),
    }
    made = {}
    for name, tensor in tensors.items():
        wanted = torch.float32 if name.startswith("norm") and dtype.itemsize < 4 else dtype
        made[name] = None if tensor is None else tensor.to(wanted).requires_grad_()
    wide = torch.float32 if dtype.itemsize < 4 else dtype
    buffers = (randn(C).to(wide), randn(C).square().to(wide) + 0.5) if keeps else (None, None)
    return made, buffers, {"training": training, **options}


def composed(x, norm_weight, norm_bias, depthwise_weight, pointwise_weight, bias, depthwise_bias, buffers, options):
    u = F.batch_norm(x, *buffers, norm_weight, norm_bias, **options)
    t = F.conv2d(F.silu(u), depthwise_weight, depthwise_bias, padding=1, groups=C)
    return F.conv2d(t, pointwise_weight, bias)


def fused(x, norm_weight, norm_bias, depthwise_weight, pointwise_weight, bias, depthwise_bias, buffers, options):
    return norm_separable_conv2d(
        x, *buffers, norm_weight, norm_bias, depthwise_weight, pointwise_weight, bias,
        padding=1, depthwise_bias=depthwise_bias, pre_activation="silu", **options,
    )  # fmt: skip


def by_operator(x, norm_weight, norm_bias, depthwise_weight, pointwise_weight, bias, depthwise_bias, buffers, options):
    """The operator itself, whatever runs it."""
    if options["training"]:
        momentum = options.get("momentum", 0.1)
        mean, invstd, _ = norm_units.statistics(x.detach(), *buffers, momentum, 1e-5)
    else:
        mean, invstd = buffers[0], torch.rsqrt(buffers[1] + 1e-5)
    t = norm_units.norm_depthwise_conv2d(
        x, mean, invstd, norm_weight, norm_bias, depthwise_weight, depthwise_bias,
        [1, 1], [1, 1, 1, 1], [1, 1], "silu", options["training"], "auto",
    )  # fmt: skip
    return F.conv2d(t, pointwise_weight, bias)


def differentiate(function, tensors, buffers, options):
    y = function(**tensors, buffers=buffers, options=options)
    asking = {name: tensor for name, tensor in tensors.items() if tensor is not None and tensor.requires_grad}
    weights = torch.linspace(-1, 1, y.numel(), dtype=torch.float64).view(y.shape).to(y.dtype)
    return {"y": y.detach()} | dict(zip(asking, torch.autograd.grad((y * weights).sum(), asking.values()), strict=True))


@pytest.mark.gradients
@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("function", (fused, by_operator), ids=("function", "operator"))
@pytest.mark.parametrize("layout", (torch.contiguous_format, torch.channels_last), ids=("nchw", "nhwc"))
def test_a_unit_is_its_parts(function, norm, layout):
    results, kept = [], []
    for one in (composed, function):
        tensors, buffers, options = unit(**NORMS[norm])
        tensors["x"] = tensors["x"].detach().contiguous(memory_format=layout).requires_grad_()
        results.append(differentiate(one, tensors, buffers, options))
        kept.append(buffers)
    for name, right in results[0].items():
        torch.testing.assert_close(results[1][name], right, rtol=1e-10, atol=1e-10)
    for ours, right in zip(*kept, strict=True):
        if right is not None:
            torch.testing.assert_close(ours, right, rtol=1e-12, atol=1e-12)


@pytest.mark.gradients
@pytest.mark.parametrize("training", (True, False))
def test_first_and_second_derivatives_of_the_operator(training):
    tensors, buffers, options = unit(training=training, size=3)
    tensors = {name: tensor[:2] if name == "x" else tensor for name, tensor in tensors.items()}
    values = tuple(tensor.detach().requires_grad_() for tensor in tensors.values())

    def function(*values):
        kept = tuple(buffer.clone() for buffer in buffers)
        return by_operator(**dict(zip(tensors, values, strict=True)), buffers=kept, options=options)

    assert torch.autograd.gradcheck(function, values)
    assert torch.autograd.gradgradcheck(function, values, fast_mode=True)


def test_transforms_compilers_and_forward_mode_see_the_operator():
    tensors, buffers, options = unit()
    values = [tensor.detach() for tensor in tensors.values()]
    mean, invstd, _ = norm_units.statistics(values[0], *buffers, 0.1, 1e-5)
    rest = ([1, 1], [1, 1, 1, 1], [1, 1], "relu", True, "auto")

    def function(x, norm_weight, norm_bias, weight, bias):
        return norm_units.norm_depthwise_conv2d(x, mean, invstd, norm_weight, norm_bias, weight, bias, *rest)

    own = [values[i] for i in (0, 1, 2, 3, 6)]
    leaves = [value.clone().requires_grad_() for value in own]
    y = function(*leaves)
    right = torch.autograd.grad(y.square().sum(), leaves)
    found = torch.func.grad(lambda *v: function(*v).square().sum(), tuple(range(5)))(*own)
    for ours, other in zip(found, right, strict=True):
        torch.testing.assert_close(ours, other)
    batch = torch.stack([own[0], own[0] + 1])
    mapped = torch.vmap(function, (0, None, None, None, None))(batch, *own[1:])
    torch.testing.assert_close(mapped[1], function(own[0] + 1, *own[1:]))
    _, tangent = torch.func.jvp(function, tuple(own), tuple(torch.ones_like(v) for v in own))
    step = 1e-6
    moved = own[0] + step
    shifted = norm_units.statistics(moved, None, None, 0.1, 1e-5)
    ahead = norm_units.norm_depthwise_conv2d(
        moved, *shifted[:2], own[1] + step, own[2] + step, own[3] + step, own[4] + step, *rest
    )
    torch.testing.assert_close(tangent, (ahead - y.detach()) / step, rtol=1e-3, atol=1e-3)
    compiled = torch.compile(function, backend="aot_eager", fullgraph=True)
    again = torch.autograd.grad(compiled(*leaves).square().sum(), leaves)
    for ours, other in zip(again, right, strict=True):
        torch.testing.assert_close(ours, other)
    op = norm_units.norm_depthwise_conv2d
    torch.library.opcheck(op, (leaves[0], mean, invstd, *leaves[1:], *rest))


def test_one_value_a_channel_is_refused_as_pytorch_does():
    x = torch.randn(1, C, 1, 1)
    weight = torch.randn(C, 1, 1, 1)
    for backend in ("auto", "fused"):
        with use_backend(backend), pytest.raises(ValueError, match="more than 1 value per channel"):
            norm_depthwise_conv2d(x, None, None, None, None, weight, training=True)


def test_autocast_reads_a_unit_as_it_reads_its_parts():
    tensors, _, _ = unit(dtype=torch.float32, keeps=False)
    x, depthwise, pointwise = (tensors[name] for name in ("x", "depthwise_weight", "pointwise_weight"))
    with torch.autocast("cpu", torch.bfloat16):
        ours = norm_separable_conv2d(x, None, None, None, None, depthwise, pointwise, training=True, padding=1)
        theirs = separable_conv2d(F.batch_norm(x, None, None, training=True), depthwise, pointwise, padding=1)
    assert ours.dtype == theirs.dtype == torch.bfloat16
    assert torch.equal(ours, theirs)


# Emulated, from here on (the fixture lasts as long as the module)


@pytest.mark.gradients
@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16), ids=str)
@pytest.mark.parametrize("layout", (torch.contiguous_format, torch.channels_last), ids=("nchw", "nhwc"))
def test_the_kernels_are_as_close_to_the_oracle_as_eager(plain, layout, dtype, norm):
    results = []
    for one, wanted in ((fused, dtype), (composed, dtype), (composed, torch.float64)):
        tensors, buffers, options = unit(**NORMS[norm], dtype=dtype)
        if wanted is torch.float64:
            tensors = {n: None if t is None else t.detach().double().requires_grad_() for n, t in tensors.items()}
            buffers = tuple(None if buffer is None else buffer.double() for buffer in buffers)
        tensors["x"] = tensors["x"].detach().contiguous(memory_format=layout).requires_grad_()
        results.append(differentiate(one, tensors, buffers, options) | {"mean": buffers[0], "var": buffers[1]})
    assert any("normalised" in name for name in plain.executed())
    for name, ours in results[0].items():
        if ours is not None:
            assert_gradient_as_close_as_eager(ours, results[1][name], results[2][name], name=name)


@pytest.mark.parametrize("mid_activation", (None, "relu", "gelu"))
def test_without_save_intermediate_a_unit_computes_it_again(plain, mid_activation):
    def step(save):
        tensors, buffers, _ = unit(dtype=torch.float32)
        kept = []

        def keep(tensor):
            kept.append(tensor.shape)
            return tensor

        plain.reset_launch_counts()
        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            y = norm_separable_conv2d(
                tensors["x"], *buffers, tensors["norm_weight"], tensors["norm_bias"], tensors["depthwise_weight"],
                tensors["pointwise_weight"], padding=1, training=True, mid_activation=mid_activation,
                save_intermediate=save,
            )  # fmt: skip
        used = [tensors[name] for name in ("x", "norm_weight", "norm_bias", "depthwise_weight", "pointwise_weight")]
        gradients = torch.autograd.grad(y.square().sum(), used)
        counts = plain.launch_counts()
        forwards = sum(count for name, count in counts.items() if "normalised_forward" in name)
        return (y, *gradients, *buffers), forwards, kept.count(tensors["x"].shape)

    (right, once, saved), (ours, more, without) = step("auto"), step(False)
    assert all(torch.equal(a, b) for a, b in zip(ours, right, strict=True))
    assert once == 1 and more > 1 and saved > without == 1  # x alone
    with pytest.raises(ValueError, match="save_intermediate"):
        step("never")


def test_a_recomputed_unit_has_second_derivatives_and_refuses_a_changed_input(plain):
    def function(x, weight, save):
        pointwise = torch.linspace(-1, 1, FEATURES * C).view(FEATURES, C, 1, 1)
        return norm_separable_conv2d(
            x, None, None, None, None, weight, pointwise, padding=1, training=True, pre_activation="silu",
            mid_activation="silu", save_intermediate=save,
        )  # fmt: skip

    found = []
    for save in (True, False):
        tensors, _, _ = unit(dtype=torch.float32)
        leaves = tensors["x"], tensors["depthwise_weight"]
        grad = torch.autograd.grad(function(*leaves, save).square().sum(), leaves, create_graph=True)
        found.append(torch.autograd.grad(sum(each.square().sum() for each in grad), leaves))
    torch.testing.assert_close(*found, rtol=1e-4, atol=1e-3)
    x = leaves[0].detach().clone()
    y = function(x, leaves[1], False)
    x += 1
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()
