"""The rest of PyTorch: opcheck, compile, export, autocast, vmap, torch.func, forward mode, double backward."""

import contextlib
import copy
import itertools
import threading
import warnings

import pytest
import torch
from torch import nn
from torch.autograd import forward_ad
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils._python_dispatch import TorchDispatchMode

import fused_sepconv
from fused_sepconv import SeparableConv2d, depthwise_conv2d, separable_conv2d
from fused_sepconv.tensors import memory_format
from tests.support.calls import (
    backward_arguments,
    backward_op,
    each_input,
    forward_arguments,
    forward_op,
    function_of,
)
from tests.support.cases import ACTIVATIONS, Case, DepthwiseCase, both, named, two_convolutions
from tests.support.closeness import assert_as_close_as_eager, assert_gradient_as_close_as_eager

CHOSEN = named(
    "plain",
    "all six tensors",
    "relu thrice",
    "gelu thrice",
    "depth multiplier 2",
    "same, stride 2, even size",
    "four different sides",
    "everything",
)

# What each kind of tracing, which takes seconds, goes through by default.
TRACED = both(named("batch 0", "same, stride 2, even size", "everything"))


def leaves(case, dtype=torch.float64, requires_grad=True, seed=0, device="cpu"):
    return {name: t.to(device, dtype).requires_grad_(requires_grad) for name, t in case.tensors(seed).items()}


def close(actual, expected, tolerance=1e-10):
    torch.testing.assert_close(actual, expected, rtol=tolerance, atol=tolerance)


# opcheck


@pytest.mark.dtypes(torch.float32)
@pytest.mark.parametrize("requires_grad", (False, True), ids=("constant", "differentiable"))
@pytest.mark.cases(TRACED, full=both((*CHOSEN, *named("batch 0", "1x1 image", "silu after"))))
def test_opcheck_finds_nothing_in_the_forward(target, case, requires_grad):
    if requires_grad and torch.float32 not in target.gradient_dtypes:
        requires_grad = False
    tensors = leaves(case, torch.float32, requires_grad, device=target.device)
    torch.library.opcheck(forward_op(case), forward_arguments(case, tensors, target.backend))


@pytest.mark.parametrize("layout", (torch.contiguous_format, torch.channels_last), ids=("nchw", "nhwc"))
@pytest.mark.cases(both(named("everything")), full=both(CHOSEN))
def test_opcheck_finds_nothing_in_the_forward_of_either_layout(case, layout):
    tensors = leaves(case, torch.float32)
    tensors["x"] = tensors["x"].detach().contiguous(memory_format=layout).requires_grad_()
    torch.library.opcheck(forward_op(case), forward_arguments(case, tensors))


@pytest.mark.gradients
@pytest.mark.dtypes(torch.float32)
@pytest.mark.parametrize("requires_grad", (False, True), ids=("constant", "differentiable"))
@pytest.mark.cases(TRACED, full=both((*CHOSEN, *named("batch 0", "1x1 image", "silu after"))))
def test_opcheck_finds_nothing_in_the_backward(target, case, requires_grad):
    tensors = leaves(case, torch.float32, requires_grad, device=target.device)
    arguments = backward_arguments(case, tensors, requires_grad, target.backend)
    tests = ["test_schema", "test_autograd_registration", "test_faketensor"]
    if not requires_grad:  # the graph of a double backward is one that AOTAutograd does not trace
        tests.append("test_aot_dispatch_dynamic")
    torch.library.opcheck(backward_op(case), arguments, test_utils=tests)


@pytest.mark.cases(both(named("everything")))
def test_the_op_called_directly_is_differentiable(case):
    tensors = leaves(case)
    y = forward_op(case)(*forward_arguments(case, tensors))
    found = torch.autograd.grad(y.square().sum(), list(tensors.values()))
    y = case.definition(**tensors, **case.options)
    for ours, eager in zip(found, torch.autograd.grad(y.square().sum(), list(tensors.values())), strict=True):
        close(ours, eager)


@pytest.mark.cases(both(named("everything")))
def test_the_backward_op_called_directly_is_differentiable(case):
    tensors = leaves(case)
    arguments = backward_arguments(case, tensors, requires_grad=True)
    asking = [arguments[0], *tensors.values()]
    ours = torch.autograd.grad(sum(g.square().sum() for g in backward_op(case)(*arguments)), asking)
    y = case.definition(**tensors, **case.options)
    first = torch.autograd.grad(y, list(tensors.values()), arguments[0], create_graph=True)
    eager = torch.autograd.grad(sum(g.square().sum() for g in first), asking)
    for a, b in zip(ours, eager, strict=True):
        close(a, b)


# torch.compile


@pytest.fixture
def fresh_compiler():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()
    # An error inside a compiled jvp leaves PyTorch in forward mode, and the next test with it.
    with contextlib.suppress(RuntimeError):
        torch._C._exit_dual_level(level=0)


def value_and_gradients(function, tensors, options):
    y = function(**tensors, **options)
    return [y, *torch.autograd.grad(y.square().sum(), [t for t in tensors.values() if t.requires_grad])]


@pytest.mark.usefixtures("fresh_compiler")
@pytest.mark.parametrize("dynamic", (False, True), ids=("static", "dynamic"))
@pytest.mark.cases(TRACED, full=both((*CHOSEN, *named("unbatched, everything", "batch 0", "silu after"))))
def test_it_compiles_into_one_graph_forward_and_backward(case, dynamic):
    compiled = torch.compile(function_of(case), backend="aot_eager", fullgraph=True, dynamic=dynamic)
    tensors = leaves(case)
    expected = value_and_gradients(case.definition, tensors, case.options)
    for ours, eager in zip(value_and_gradients(compiled, tensors, case.options), expected, strict=True):
        close(ours, eager)


@pytest.mark.usefixtures("fresh_compiler")
def test_it_compiles_with_inductor_in_both_layouts():
    network = nn.Sequential(
        SeparableConv2d(3, 8, 3, padding="same", stride=2, activation="relu"),
        nn.BatchNorm2d(8),
        SeparableConv2d(8, 4, 3, padding=1, pre_activation="relu"),
    )
    compiled = torch.compile(network, fullgraph=True)
    for layout in (torch.contiguous_format, torch.channels_last):
        x = torch.randn(2, 3, 11, 9).contiguous(memory_format=layout)
        results = []
        for module in (network, compiled):
            leaf = x.clone().requires_grad_()
            y = module(leaf)
            assert y.is_contiguous(memory_format=layout)
            results.append((y, *torch.autograd.grad(y.square().sum(), [leaf, *network.parameters()])))
        for ours, eager in zip(*results, strict=True):
            close(ours, eager, 2e-4)


@pytest.mark.usefixtures("fresh_compiler")
def test_one_dynamic_graph_serves_every_size():
    graphs = []

    def count(graph, inputs):
        graphs.append(graph)
        return graph

    module = SeparableConv2d(3, 5, 3, padding="same", stride=2, dtype=torch.float64)
    compiled = torch.compile(module, backend=count, fullgraph=True, dynamic=True)
    for n, h, w in ((2, 9, 8), (3, 12, 11), (5, 20, 7), (4, 6, 30)):
        x = torch.randn(n, 3, h, w, dtype=torch.float64)
        close(compiled(x), module(x))
    assert len(graphs) == 1


@pytest.mark.usefixtures("fresh_compiler")
@pytest.mark.quick
def test_the_op_is_one_node_of_the_graph():
    seen = []

    def look(graph, inputs):
        seen.extend(str(node.target) for node in graph.graph.nodes if node.op == "call_function")
        return graph

    module = SeparableConv2d(3, 5, 3, padding=1, pre_activation="relu", activation="gelu")
    torch.compile(module, backend=look, fullgraph=True)(torch.randn(1, 3, 6, 6))
    assert sum("fused_sepconv" in name for name in seen) == 1
    assert not any(("conv2d" in name and "fused_sepconv" not in name) or "gelu" in name for name in seen)


@pytest.mark.usefixtures("fresh_compiler")
@pytest.mark.cases(both(named("plain")))
def test_use_backend_is_heard_inside_and_outside_of_what_is_compiled(case):
    heard = []

    def look(graph, inputs):
        for node in graph.graph.nodes:
            if "fused_sepconv" in str(node.target):
                heard.append((*node.args, *node.kwargs.values())[-1])
        return graph

    def inside(**tensors):
        with fused_sepconv.use_backend("reference"):
            return function_of(case)(**tensors, padding=1)

    tensors = leaves(case)
    expected = case.definition(**tensors, padding=1)
    compiled = torch.compile(function_of(case), backend=look, fullgraph=True)
    close(compiled(**tensors, padding=1), expected)
    with fused_sepconv.use_backend("reference"):
        close(compiled(**tensors, padding=1), expected)
    close(compiled(**tensors, padding=1), expected)
    assert heard == ["auto", "reference"]
    heard.clear()
    close(torch.compile(inside, backend=look, fullgraph=True)(**tensors), expected)
    assert heard == ["reference"]


@pytest.mark.usefixtures("fresh_compiler")
def test_a_module_with_a_hook_compiles_too():
    module = SeparableConv2d(3, 5, 3, padding=1, dtype=torch.float64)
    module.depthwise.register_forward_hook(lambda child, args, output: output * 2)
    x = torch.randn(2, 3, 6, 6, dtype=torch.float64)
    close(torch.compile(module, backend="aot_eager", fullgraph=True)(x), module(x))


@pytest.mark.usefixtures("fresh_compiler")
@pytest.mark.cases(both(named("biases")))
def test_a_bad_call_is_named_under_compile_too(case):
    compiled = torch.compile(function_of(case), backend="eager")
    with pytest.raises(Exception, match="bias"):
        compiled(**{**case.tensors(), "bias": torch.randn(7, dtype=torch.float64)})


# export and make_fx


@pytest.mark.parametrize("strict", (False, True), ids=("not strict", "strict"))
@pytest.mark.parametrize(
    "options",
    (
        {"padding": 1},
        {"padding": "same", "stride": 2, "activation": "relu"},
        {"padding": ((1, 0), (2, 1)), "pre_activation": "silu", "depth_multiplier": 2},
        {"padding": 1, "padding_mode": "reflect"},
    ),
    ids=str,
)
def test_it_exports_with_dynamic_sizes(options, strict):
    module = SeparableConv2d(3, 5, 3, dtype=torch.float64, **options).eval()
    # The four sizes follow from what the layer strides over, so that every one of them is allowed.
    n, h, w = (torch.export.Dim(name, min=2, max=64) for name in ("n", "h", "w"))
    x = torch.randn(2, 3, 16, 12, dtype=torch.float64)
    program = torch.export.export(module, (x,), dynamic_shapes=({0: n, 2: 4 * h, 3: 4 * w},), strict=strict)
    assert any("fused_sepconv.separable_conv2d" in str(node.target) for node in program.graph.nodes)
    for shape in ((2, 3, 16, 12), (5, 3, 32, 8), (3, 3, 8, 64)):
        x = torch.randn(shape, dtype=torch.float64)
        close(program.module()(x), module(x))


def test_an_exported_program_is_saved_and_loaded(tmp_path):
    module = SeparableConv2d(3, 5, 3, padding="same", stride=2, activation="relu").eval()
    x = torch.randn(2, 3, 9, 9)
    torch.export.save(torch.export.export(module, (x,)), tmp_path / "program.pt2")
    loaded = torch.export.load(tmp_path / "program.pt2").module()
    close(loaded(x), module(x), 1e-6)


@pytest.mark.parametrize("tracing_mode", ("real", "fake", "symbolic"))
@pytest.mark.cases(both(named("everything", "relu thrice", "same, stride 2, even size")))
def test_make_fx_traces_forward_and_backward(case, tracing_mode):
    tensors = leaves(case)
    names = list(tensors)

    def step(*values):
        return value_and_gradients(function_of(case), dict(zip(names, values, strict=True)), case.options)

    graph = make_fx(step, tracing_mode=tracing_mode)(*tensors.values())
    targets = [str(node.target) for node in graph.graph.nodes]
    assert any(name.startswith(f"fused_sepconv.{case.operator}.") for name in targets)
    assert any(name.startswith(f"fused_sepconv.{case.operator}_backward") for name in targets)
    other = leaves(case, seed=7)
    expected = value_and_gradients(case.definition, other, case.options)
    for ours, eager in zip(graph(*other.values()), expected, strict=True):
        close(ours, eager)


# autocast


LOW = (torch.float16, torch.bfloat16)
lows = pytest.mark.parametrize("low", LOW, ids=str)


def under_autocast(function, tensors, options, device, low, grad_output):
    with torch.autocast(device, dtype=low):
        y = function(**tensors, **options)
    return [y, *torch.autograd.grad(y, list(tensors.values()), grad_output.to(device, y.dtype))]


@pytest.mark.gradients
@pytest.mark.dtypes(torch.float32)
@lows
@pytest.mark.cases(both(
    named("plain", "biases", "relu thrice", "728->728@19 reduced", "every dimension: one over", "same, stride 3",
          "four different sides", "depth multiplier 2", "silu between")
))  # fmt: skip
def test_autocast_does_what_it_does_to_the_pair(target, dtype, case, low):
    if low not in target.gradient_dtypes:
        low = dtype
    tensors = leaves(case, dtype, device=target.device)
    grad_output = torch.randn(case.output_shape, dtype=torch.float64)
    ours = under_autocast(function_of(case), tensors, case.options, target.device, low, grad_output)
    eager = under_autocast(case.definition, tensors, case.options, target.device, low, grad_output)
    exact = {name: t.detach().double().cpu().requires_grad_() for name, t in tensors.items()}
    y = case.definition(**exact, **case.options)
    oracle = [y.detach(), *torch.autograd.grad(y, list(exact.values()), grad_output.to(low).double())]
    assert ours[0].dtype == low
    assert_as_close_as_eager(ours[0], eager[0], oracle[0])
    for name, trio in zip(tensors, zip(ours[1:], eager[1:], oracle[1:], strict=True), strict=True):
        assert trio[0].dtype == torch.float32
        assert_gradient_as_close_as_eager(*trio, name=f"gradient of {name}")


@lows
@pytest.mark.cases(both(named("biases")))
def test_autocast_takes_inputs_that_are_low_already(low, case):
    tensors = leaves(case, torch.float32, requires_grad=False)
    mixed = {**tensors, "x": tensors["x"].to(low), "bias": tensors["bias"].to(low)}
    with torch.autocast("cpu", dtype=low):
        y = function_of(case)(**mixed, padding=1)
        expected = function_of(case)(**{name: t.to(low) for name, t in tensors.items()}, padding=1)
    assert y.dtype == low
    assert torch.equal(y, expected)


@lows
def test_autocast_takes_a_residual_in_float32(low):
    (case,) = named("all six tensors")
    tensors = leaves(case, torch.float32)
    with torch.autocast("cpu", dtype=low):
        y = separable_conv2d(**tensors, **case.options)
    assert y.dtype == low
    exact = two_convolutions(**{name: t.detach().double() for name, t in tensors.items()}, **case.options)
    close(y.double(), exact, 0.1)
    y.float().sum().backward()
    assert tensors["residual"].grad.dtype == torch.float32
    close(tensors["residual"].grad, torch.ones_like(tensors["residual"]))


@lows
@pytest.mark.cases(both(named("everything")))
def test_autocast_leaves_float64_as_it_is(low, case):
    tensors = leaves(case)
    with torch.autocast("cpu", dtype=low):
        found = value_and_gradients(function_of(case), tensors, case.options)
    for ours, eager in zip(found, value_and_gradients(case.definition, tensors, case.options), strict=True):
        assert ours.dtype == torch.float64
        close(ours, eager)


@pytest.mark.cases(both(named("plain")))
def test_autocast_switched_off_inside_is_off(case):
    tensors = leaves(case, torch.float32)
    with torch.autocast("cpu", dtype=torch.bfloat16), torch.autocast("cpu", enabled=False):
        assert function_of(case)(**tensors).dtype == torch.float32


@pytest.mark.cases(both(named("plain")))
def test_autocast_of_another_device_does_nothing(case):
    tensors = leaves(case, torch.float32)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        with torch.autocast("cuda", dtype=torch.bfloat16):
            assert function_of(case)(**tensors).dtype == torch.float32


@lows
@pytest.mark.parametrize("inside", (False, True), ids=("a backward outside of it", "a backward inside of it"))
def test_a_backward_is_the_same_inside_and_outside_of_autocast(low, inside):
    module = SeparableConv2d(4, 5, 3, padding=1, activation="silu")
    x = torch.randn(2, 4, 6, 6, requires_grad=True)
    with torch.autocast("cpu", dtype=low):
        loss = module(x).float().square().sum()
        expected = [g.clone() for g in torch.autograd.grad(loss, [x, *module.parameters()], retain_graph=True)]
        if inside:
            found = torch.autograd.grad(loss, [x, *module.parameters()])
    if not inside:
        found = torch.autograd.grad(loss, [x, *module.parameters()])
    for a, b in zip(found, expected, strict=True):
        assert a.dtype == torch.float32
        assert torch.equal(a, b)


@lows
def test_the_module_trains_under_autocast(low):
    module = SeparableConv2d(4, 5, 3, padding=1, activation="relu")
    optimizer = torch.optim.SGD(module.parameters(), lr=0.05)
    x, wanted = torch.randn(4, 4, 8, 8), torch.rand(4, 5, 8, 8)
    losses = []
    for _ in range(10):
        optimizer.zero_grad()
        with torch.autocast("cpu", dtype=low):
            loss = (module(x).float() - wanted).square().mean()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0]
    assert {p.grad.dtype for p in module.parameters()} == {torch.float32}


@pytest.mark.usefixtures("fresh_compiler")
@lows
@pytest.mark.cases(both(named("biases")))
def test_autocast_is_heard_under_compile(low, case):
    tensors = leaves(case, torch.float32)
    compiled = torch.compile(function_of(case), backend="aot_eager", fullgraph=True)
    grad_output = torch.randn(case.output_shape)
    ours = under_autocast(compiled, tensors, case.options, "cpu", low, grad_output)
    eager = under_autocast(function_of(case), tensors, case.options, "cpu", low, grad_output)
    for a, b in zip(ours, eager, strict=True):
        assert a.dtype == b.dtype
        close(a, b, 2e-2)


# vmap


VMAPPED = named(
    "plain", "all six tensors", "relu thrice", "same, stride 2, even size", "depth multiplier 2", "everything"
)


def stacked(case, mapped, in_dim=0, count=3, requires_grad=False):
    """The case's tensors, ``count`` different ones stacked at ``in_dim`` for those that are mapped."""
    several = [case.tensors(seed) for seed in range(count)]
    tensors = {
        name: torch.stack([one[name] for one in several], in_dim) if name in mapped else several[0][name]
        for name in several[0]
    }
    return {name: tensor.requires_grad_(requires_grad) for name, tensor in tensors.items()}


def one_by_one(case, tensors, mapped, in_dim=0, count=3):
    return torch.stack(
        [
            case.definition(
                **{name: t.select(in_dim, i) if name in mapped else t for name, t in tensors.items()}, **case.options
            )
            for i in range(count)
        ]
    )


MAPS = {
    "separable_conv2d": (
        ("x",),
        ("depthwise_weight",),
        ("pointwise_weight",),
        ("depthwise_weight", "pointwise_weight"),
        ("x", "depthwise_weight", "pointwise_weight"),
        ("bias", "depthwise_bias"),
        ("residual",),
        ("x", "residual"),
        Case.inputs,
    ),
    "depthwise_conv2d": (("x",), ("weight",), ("x", "weight"), ("bias",), DepthwiseCase.inputs),
}


def maps(cases):
    """(case, what of its tensors is mapped), each once."""
    return [
        pytest.param((case, mapped), id=f"{case}: {', '.join(mapped)}")
        for case in both(cases)
        for mapped in MAPS[case.operator]
        if set(mapped) <= case.tensors().keys()
    ]


@pytest.mark.parametrize("mapping", maps(VMAPPED))
def test_vmap_is_a_loop(mapping):
    case, mapped = mapping
    names = list(case.tensors())

    def call(*values):
        return function_of(case)(**dict(zip(names, values, strict=True)), **case.options)

    for in_dim in (0, 1, -1):
        tensors = stacked(case, mapped, in_dim)
        in_dims = tuple(in_dim if name in mapped else None for name in names)
        expected = one_by_one(case, tensors, mapped, in_dim)
        close(torch.vmap(call, in_dims=in_dims)(*tensors.values()), expected)
        close(torch.vmap(call, in_dims=in_dims, out_dims=2)(*tensors.values()), expected.movedim(0, 2))


@pytest.mark.parametrize("mapping", maps(named("everything")))
def test_a_gradient_goes_back_through_vmap(mapping):
    case, mapped = mapping
    tensors = stacked(case, mapped, requires_grad=True)
    names = list(tensors)
    in_dims = tuple(0 if name in mapped else None for name in names)

    def call(*values):
        return function_of(case)(**dict(zip(names, values, strict=True)), **case.options)

    y = torch.vmap(call, in_dims=in_dims)(*tensors.values())
    found = torch.autograd.grad(y.square().sum(), list(tensors.values()))
    y = one_by_one(case, tensors, mapped)
    for ours, eager in zip(found, torch.autograd.grad(y.square().sum(), list(tensors.values())), strict=True):
        close(ours, eager)


@pytest.mark.cases(both((Case("unbatched under vmap", None, 3, 6, 5, 4, padding=1, bias=True),)))
def test_vmap_over_unbatched_images_is_a_batch(case):
    x, *weights = case.tensors().values()
    x = torch.randn(5, *x.shape, dtype=torch.float64)
    mapped = torch.vmap(lambda image: function_of(case)(image, *weights, padding=1))(x)
    close(mapped, case.definition(x, *weights, padding=1))


@pytest.mark.cases(both(named("plain")))
def test_vmap_in_vmap_is_a_loop_in_a_loop(case):
    x, weight, *others = case.tensors().values()
    x = torch.randn(2, 3, *x.shape, dtype=torch.float64)
    weights = torch.stack([weight * scale for scale in (1.0, -2.0)])

    def call(x, weight):
        return function_of(case)(x, weight, *others, padding=1)

    found = torch.vmap(torch.vmap(call, in_dims=(0, None)), in_dims=(0, 0))(x, weights)
    for i, j in itertools.product(range(2), range(3)):
        close(found[i, j], case.definition(x[i, j], weights[i], *others, padding=1))


@pytest.mark.cases(both(named("everything")))
def test_vmap_over_a_batch_of_none_or_one(case):
    tensors = case.tensors()
    images = {name: t for name, t in tensors.items() if name in ("x", "residual")}
    weights = {name: t for name, t in tensors.items() if name not in images}

    def call(images):
        return function_of(case)(**weights, **images, **case.options)

    found = torch.vmap(call)({name: t[None] for name, t in images.items()})
    close(found[0], case.definition(**tensors, **case.options))
    empty = torch.vmap(call)({name: t[None, :0] for name, t in images.items()})
    assert empty.shape == (1, 0, *case.output_shape[1:])


@pytest.mark.quick
def test_many_models_at_once():
    """An ensemble, as torch.func.stack_module_state makes it."""
    modules = [SeparableConv2d(3, 4, 3, padding="same", stride=2, dtype=torch.float64) for _ in range(3)]
    parameters, buffers = torch.func.stack_module_state(modules)
    x = torch.randn(2, 3, 7, 7, dtype=torch.float64)

    def call(parameters, buffers, x):
        return torch.func.functional_call(modules[0], (parameters, buffers), (x,))

    found = torch.vmap(call, in_dims=(0, 0, None))(parameters, buffers, x)
    close(found, torch.stack([module(x) for module in modules]))


# torch.func


@pytest.mark.cases(both((*CHOSEN, *named("unbatched, everything", "silu after"))))
def test_func_grad_is_the_gradient(case):
    tensors = leaves(case, requires_grad=False)
    names = list(tensors)

    def loss(function):
        return lambda *values: function(**dict(zip(names, values, strict=True)), **case.options).square().sum()

    every = tuple(range(len(names)))
    found = torch.func.grad(loss(function_of(case)), argnums=every)(*tensors.values())
    expected = torch.func.grad(loss(case.definition), argnums=every)(*tensors.values())
    for ours, eager in zip(found, expected, strict=True):
        close(ours, eager)


@pytest.mark.cases(both(VMAPPED))
def test_per_sample_gradients_are_those_of_each_sample_alone(case):
    tensors = leaves(case, requires_grad=False)
    per_sample = {name for name in tensors if name in ("x", "residual")}
    weights = [name for name in tensors if name not in per_sample]
    count = case.N

    def loss(function):
        def of(weight_values, sample_values):
            values = {**dict(zip(weights, weight_values, strict=True)), **sample_values}
            return function(**values, **case.options).square().sum()

        return of

    samples = {name: tensors[name] for name in per_sample}
    weight_values = tuple(tensors[name] for name in weights)
    found = torch.vmap(torch.func.grad(loss(function_of(case))), in_dims=(None, 0))(weight_values, samples)
    for i in range(count):
        one = {name: value[i] for name, value in samples.items()}
        expected = torch.func.grad(loss(case.definition))(weight_values, one)
        for ours, eager in zip(found, expected, strict=True):
            close(ours[i], eager)


@pytest.mark.quick
def test_per_sample_gradients_of_a_module():
    """The recipe of PyTorch's own tutorial: functional_call, grad, vmap."""
    torch.manual_seed(0)
    model = nn.Sequential(
        SeparableConv2d(3, 6, 3, padding=1, activation="relu", dtype=torch.float64),
        SeparableConv2d(6, 4, 3, stride=2, padding="same", depthwise_bias=True, dtype=torch.float64),
    )
    parameters = {name: p.detach() for name, p in model.named_parameters()}
    x = torch.randn(4, 3, 6, 6, dtype=torch.float64)

    def loss(parameters, sample):
        return torch.func.functional_call(model, parameters, (sample[None],)).square().sum()

    found = torch.vmap(torch.func.grad(loss), in_dims=(None, 0))(parameters, x)
    for i in range(4):
        model.zero_grad()
        model(x[i : i + 1]).square().sum().backward()
        for name, parameter in model.named_parameters():
            close(found[name][i], parameter.grad)


def small_functions(function, case):
    tensors = leaves(case, requires_grad=False)
    names = list(tensors)
    return (lambda *values: function(**dict(zip(names, values, strict=True)), **case.options)), tuple(tensors.values())


JACOBIANS = named("1x1 image and kernel", "plain", "relu thrice", "gelu thrice", "unbatched", "everything")


@pytest.mark.cases(both(JACOBIANS))
def test_jacrev_is_the_jacobian(case):
    ours, values = small_functions(function_of(case), case)
    theirs, _ = small_functions(case.definition, case)
    every = tuple(range(len(values)))
    for a, b in zip(torch.func.jacrev(ours, every)(*values), torch.func.jacrev(theirs, every)(*values), strict=True):
        close(a, b)


@pytest.mark.cases(both(JACOBIANS))
def test_a_jacobian_by_batched_gradients_is_the_jacobian(case):
    """torch.autograd.grad with is_grads_batched, and functional.jacobian(vectorize=True) over it."""
    ours, values = small_functions(function_of(case), case)
    theirs, _ = small_functions(case.definition, case)
    found = torch.autograd.functional.jacobian(ours, values, vectorize=True)
    for a, b in zip(found, torch.autograd.functional.jacobian(theirs, values), strict=True):
        close(a, b)


@pytest.mark.cases(both(named("everything")))
def test_vjp_is_the_product(case):
    ours, values = small_functions(function_of(case), case)
    theirs, _ = small_functions(case.definition, case)
    (y, ours_back), (expected, theirs_back) = torch.func.vjp(ours, *values), torch.func.vjp(theirs, *values)
    close(y, expected)
    cotangent = torch.randn_like(y)
    for a, b in zip(ours_back(cotangent), theirs_back(cotangent), strict=True):
        close(a, b)


def test_functional_call_uses_the_parameters_that_it_is_given():
    module = SeparableConv2d(3, 4, 3, padding=1, dtype=torch.float64)
    other = SeparableConv2d(3, 4, 3, padding=1, dtype=torch.float64)
    x = torch.randn(2, 3, 6, 6, dtype=torch.float64)
    close(torch.func.functional_call(module, dict(other.named_parameters()), (x,)), other(x))
    zero = {"pointwise.weight": torch.zeros(4, 3, 1, 1, dtype=torch.float64)}
    found = torch.func.functional_call(module, zero, (x,))
    close(found, module.pointwise.bias.view(1, 4, 1, 1).expand_as(found))


@pytest.mark.cases(both(named("1x1 image and kernel", "gelu thrice", "relu thrice", "everything")))
def test_a_gradient_of_a_gradient_is_eagers(case):
    def twice(function):
        call, values = small_functions(function, case)

        def penalty(*values):
            gradients = torch.func.grad(lambda *v: call(*v).square().sum(), tuple(range(len(values))))(*values)
            return sum(gradient.square().sum() for gradient in gradients)

        return torch.func.grad(penalty, tuple(range(len(values))))(*values)

    for ours, eager in zip(twice(function_of(case)), twice(case.definition), strict=True):
        close(ours, eager, 1e-9)


# Forward mode: PyTorch's own operators carry the tangents, so it is right, and never silently zero


def right(ours, theirs, tolerance=1e-10):
    expected = theirs()
    assert all(tensor.abs().max() > 0 for tensor in expected if tensor.numel()), "zero would prove nothing"
    for a, b in zip(ours(), expected, strict=True):
        close(a, b, tolerance)


def right_or_refused(ours, theirs):
    """Where tracing and forward mode meet PyTorch itself refuses much; a wrong number is never right."""
    expected = theirs()
    try:
        found = ours()
    except Exception:
        return
    for a, b in zip(found, expected, strict=True):
        close(a, b)


def tangents(values, seed=100):
    generator = torch.Generator().manual_seed(seed)
    return tuple(torch.randn(value.shape, generator=generator, dtype=value.dtype) for value in values)


FORWARD_MODE = (
    *CHOSEN,
    *named("elu thrice", "silu after", "relu6 thrice", "hardswish thrice", "unbatched, everything"),
)


@pytest.mark.cases(both(FORWARD_MODE))
def test_jvp_is_right(case):
    def product(function):
        call, values = small_functions(function, case)
        return torch.func.jvp(call, values, tangents(values))

    right(lambda: product(function_of(case)), lambda: product(case.definition))


@pytest.mark.parametrize("input_of", each_input(both(named("everything"))))
def test_jvp_along_one_input_is_right(input_of):
    case, alone = input_of

    def product(function):
        call, values = small_functions(function, case)
        position = list(case.tensors()).index(alone)

        def of_one(value):
            return call(*values[:position], value, *values[position + 1 :])

        return torch.func.jvp(of_one, (values[position],), tangents((values[position],)))

    right(lambda: product(function_of(case)), lambda: product(case.definition))


@pytest.mark.parametrize("requires_grad", (False, True), ids=("constant", "differentiable"))
@pytest.mark.cases(both(named("everything", "relu thrice", "plain")))
def test_dual_numbers_are_right(case, requires_grad):
    def product(function):
        tensors = leaves(case, requires_grad=requires_grad)
        with forward_ad.dual_level():
            along = tangents(list(tensors.values()))
            duals = {n: forward_ad.make_dual(t, v) for (n, t), v in zip(tensors.items(), along, strict=True)}
            primal, tangent = forward_ad.unpack_dual(function(**duals, **case.options))
            assert tangent is not None, "the tangent was lost"
            return [primal.detach(), tangent.detach()]

    right(lambda: product(function_of(case)), lambda: product(case.definition))


@pytest.mark.cases(both(named("everything")))
def test_dual_numbers_through_the_op_itself_are_right(case):
    tensors = leaves(case, requires_grad=False)

    def product(call):
        with forward_ad.dual_level():
            along = tangents(list(tensors.values()))
            duals = {n: forward_ad.make_dual(t, v) for (n, t), v in zip(tensors.items(), along, strict=True)}
            primal, tangent = forward_ad.unpack_dual(call(duals))
            assert tangent is not None, "the tangent was lost"
            return [primal, tangent]

    right(
        lambda: product(lambda duals: forward_op(case)(*forward_arguments(case, duals))),
        lambda: product(lambda duals: case.definition(**duals, **case.options)),
    )


@pytest.mark.cases(both(named("plain", "relu thrice", "gelu thrice")))
def test_forward_over_reverse_is_right(case):
    """A Hessian-vector product, the usual way."""

    def product(function):
        call, values = small_functions(function, case)
        gradient = torch.func.grad(lambda *v: call(*v).square().sum(), tuple(range(len(values))))
        _, found = torch.func.jvp(gradient, values, tangents(values))
        return found

    right(lambda: product(function_of(case)), lambda: product(case.definition), 1e-9)


@pytest.mark.cases(both(named("plain", "relu thrice", "gelu thrice")))
def test_reverse_over_forward_is_right(case):
    def product(function):
        call, values = small_functions(function, case)

        def slope(*v):
            return torch.func.jvp(call, v, tangents(values))[1].square().sum()

        return torch.func.grad(slope, tuple(range(len(values))))(*values)

    right(lambda: product(function_of(case)), lambda: product(case.definition), 1e-9)


@pytest.mark.cases(both(named("1x1 image and kernel", "gelu thrice", "unbatched")))
def test_jacfwd_and_the_hessian_are_right(case):
    def jacobian(function):
        call, values = small_functions(function, case)
        return [torch.func.jacfwd(call)(*values)]

    def hessian(function):
        call, values = small_functions(function, case)
        return [torch.func.hessian(lambda x: call(x, *values[1:]).pow(3).sum())(values[0])]

    right(lambda: jacobian(function_of(case)), lambda: jacobian(case.definition))
    right(lambda: hessian(function_of(case)), lambda: hessian(case.definition), 1e-9)


@pytest.mark.cases(both(named("1x1 image and kernel", "gelu thrice", "everything")))
def test_forward_mode_passes_gradcheck(case):
    tensors = leaves(case)

    def call(*values):
        return function_of(case)(**dict(zip(tensors, values, strict=True)), **case.options)

    assert torch.autograd.gradcheck(call, tuple(tensors.values()), check_forward_ad=True, check_backward_ad=False)


def with_a_way_past(function, case):
    """The call, plus the sum of its inputs: a tangent lost on the way leaves a result that is wrong, not missing."""
    call, values = small_functions(function, case)
    return (lambda *values: call(*values).sum() + sum(value.sum() for value in values)), values


@pytest.mark.usefixtures("fresh_compiler")
@pytest.mark.parametrize("how", ("jvp", "dual numbers"))
@pytest.mark.parametrize("build", (small_functions, with_a_way_past), ids=("alone", "with a way past"))
@pytest.mark.parametrize("backend", ("eager", "aot_eager"))
@pytest.mark.cases(both(named("relu thrice")))
def test_forward_mode_under_compile_is_right_or_refused(case, backend, build, how):

    def product(function):
        call, values = build(function, case)

        def jvp(values, along):
            return torch.func.jvp(call, values, along)

        def dual(values, along):
            with forward_ad.dual_level():
                return forward_ad.unpack_dual(call(*map(forward_ad.make_dual, values, along)))

        return (jvp if how == "jvp" else dual), (values, tangents(values))

    ours, values = product(function_of(case))
    theirs, _ = product(case.definition)
    right_or_refused(lambda: torch.compile(ours, backend=backend)(*values), lambda: theirs(*values))


@pytest.mark.usefixtures("fresh_compiler")
@pytest.mark.cases(both(named("relu thrice")))
def test_what_is_compiled_and_then_differentiated_forward_is_right_or_refused(case):
    compiled = torch.compile(function_of(case), backend="aot_eager")

    def product(function):
        call, values = small_functions(function, case)
        return torch.func.jvp(call, values, tangents(values))

    right_or_refused(lambda: product(compiled), lambda: product(case.definition))


@pytest.mark.usefixtures("fresh_compiler")
@pytest.mark.cases(both(named("plain")))
def test_func_grad_and_vmap_compile(case):
    tensors = leaves(case, requires_grad=False)
    _, *weights = tensors.values()

    def loss(function):
        return lambda weights, x: function(x, *weights, padding=1, activation="relu").square().sum()

    per_sample = torch.vmap(torch.func.grad(loss(function_of(case))), in_dims=(None, 0))
    expected = torch.vmap(torch.func.grad(loss(case.definition)), in_dims=(None, 0))(weights, tensors["x"])
    found = torch.compile(per_sample, backend="aot_eager")(weights, tensors["x"])
    for ours, eager in zip(found, expected, strict=True):
        close(ours, eager)


# Other ways to run a graph


@pytest.mark.quick
def test_checkpointing_recomputes_the_same():
    module = SeparableConv2d(4, 4, 3, padding=1, activation="gelu", dtype=torch.float64)
    results = []
    for checkpointed in (False, True):
        x = torch.ones(2, 4, 6, 6, dtype=torch.float64).cumsum(-1).requires_grad_()
        y = torch.utils.checkpoint.checkpoint(module, x, use_reentrant=False) if checkpointed else module(x)
        results.append(torch.autograd.grad(y.square().sum(), [x, *module.parameters()]))
    for a, b in zip(*results, strict=True):
        assert torch.equal(a, b)


@pytest.mark.quick
def test_threads_may_share_a_module():
    module = SeparableConv2d(4, 6, 3, padding=1, activation="relu", dtype=torch.float64)
    images = [torch.randn(n % 3 + 1, 4, 6 + n % 2, 6, dtype=torch.float64) for n in range(16)]
    expected = [two_convolutions(
        x, module.depthwise.weight, module.pointwise.weight, module.pointwise.bias, padding=1, activation="relu"
    ) for x in images]  # fmt: skip
    found = [None] * len(images)

    def work(n):
        for i in range(n, len(images), 4):
            x = images[i].clone().requires_grad_()
            y = module(x)
            (gradient,) = torch.autograd.grad(y.sum(), x)
            found[i] = (y.detach(), gradient)

    threads = [threading.Thread(target=work, args=(n,)) for n in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    for result, y in zip(found, expected, strict=True):
        close(result[0], y.detach())
        assert result[1].abs().max() > 0


@pytest.mark.parametrize("elsewhere", (False, True), ids=("this thread", "another thread"))
@pytest.mark.cases(both(named("relu thrice")))
def test_a_backward_runs_on_the_backend_of_its_forward(case, elsewhere):
    backends = []

    class Record(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            if func in (forward_op(case).default, backward_op(case).default):
                names = [argument.name for argument in func._schema.arguments]
                given = {**dict(zip(names, args, strict=False)), **(kwargs or {})}
                backends.append((func._schema.name.split("::")[1], given["backend"]))
            return func(*args, **(kwargs or {}))

    tensors = leaves(case)
    with Record(), fused_sepconv.use_backend("reference"):
        y = function_of(case)(**tensors, padding=1)

    def backward():
        with Record():
            y.sum().backward()

    if elsewhere:
        thread = threading.Thread(target=backward)
        thread.start()
        thread.join(60)
    else:
        backward()
    assert backends == [(case.operator, "reference"), (f"{case.operator}_backward", "reference")]


@pytest.mark.cases(both(named("plain")))
def test_a_tensor_subclass_of_the_users_passes_through(case):
    class Tagged(torch.Tensor):
        pass

    tensors = leaves(case, requires_grad=False)
    y = function_of(case)(**{**tensors, "x": tensors["x"].as_subclass(Tagged)})
    assert isinstance(y, Tagged)
    close(y.as_subclass(torch.Tensor), case.definition(**tensors))


def test_averaged_models_follow_the_weights():
    """torch.optim.swa_utils copies the module and its buffers; the copy computes with its own averages."""
    module = SeparableConv2d(3, 4, 3, padding=1, dtype=torch.float64)
    averaged = torch.optim.swa_utils.AveragedModel(module)
    x = torch.randn(1, 3, 5, 5, dtype=torch.float64)
    for _ in range(2):
        averaged.update_parameters(module)
        with torch.no_grad():
            for parameter in module.parameters():
                parameter.add_(1.0)
    reference = copy.deepcopy(module)
    with torch.no_grad():
        for parameter, average in zip(reference.parameters(), averaged.module.parameters(), strict=True):
            parameter.copy_(average)
    assert torch.equal(averaged(x), reference(x))


def test_every_activation_of_the_definition_is_one_of_the_packages():
    """The tests' own table and the package's name the same seven."""
    assert set(ACTIVATIONS) == set(fused_sepconv.tensors.activations.ACTIVATIONS)


@pytest.mark.parametrize("transform", (torch.func.jacfwd, torch.func.hessian), ids=lambda t: t.__name__)
@pytest.mark.cases(both((Case("per sample", 1, 3, 3, 4, 2, padding=1, pre_activation="silu", mid_activation="silu"),)))
def test_per_sample_forward_mode_in_channels_last(case, transform):
    x, *weights = case.tensors().values()
    batch = torch.stack([sample.contiguous(memory_format=torch.channels_last) for sample in torch.stack([x, 2 * x])])

    def sample(function):
        return torch.vmap(transform(lambda x: function(x, *weights, **case.options).square().sum()))

    ours, right = sample(function_of(case))(batch), sample(case.definition)(batch)
    torch.testing.assert_close(ours, right)


def test_vmap_over_an_empty_batch_of_images_keeps_their_number():
    weights = torch.randn(3, 1, 1, 1), torch.randn(4, 3, 1, 1)
    images = torch.randn(0, 2, 3, 4, 5)
    assert torch.vmap(lambda x: separable_conv2d(x, *weights))(images).shape == (0, 2, 4, 4, 5)
    assert torch.vmap(lambda x: depthwise_conv2d(x, weights[0]))(images).shape == (0, 2, 3, 4, 5)


def test_the_flag_for_tf32_is_read_in_each_of_its_forms():
    if not hasattr(torch.backends.cudnn, "conv"):
        return
    before = torch.backends.cudnn.conv.fp32_precision
    try:
        for precision, allowed in (("tf32", True), ("ieee", False), ("none", False)):
            torch.backends.cudnn.conv.fp32_precision = precision
            assert memory_format.tf32() == allowed
    finally:
        torch.backends.cudnn.conv.fp32_precision = before
