"""The rest of PyTorch: opcheck, compile, make_fx, autocast, vmap, torch.func, forward mode, double backward."""

import contextlib
import functools
import itertools
import threading
import warnings

import pytest
import torch
from torch import nn
from torch.autograd import forward_ad
from torch.fx.experimental.proxy_tensor import make_fx

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
    leaves,
    recording,
)
from tests.support.cases import ACTIVATIONS, Case, DepthwiseCase, both, named, two_convolutions
from tests.support.closeness import assert_as_close_as_eager, assert_gradient_as_close_as_eager, close

CHOSEN = named(
    "plain", "all six tensors", "relu thrice", "gelu thrice", "depth multiplier 2", "same, stride 2, even size",
    "four different sides", "everything",
)  # fmt: skip

# What each kind of tracing, which takes seconds, goes through by default, and all that it can.
EVERYTHING = both(named("everything"))
TRACED = (*named("batch 0"), *EVERYTHING)
ALL_TRACED = both((*CHOSEN, *named("unbatched, everything", "1x1 image", "silu after")))


def one_operator(case):
    """The case's function, in a graph of one operator a direction: a depthwise result that is saved makes two."""
    function = function_of(case)
    return functools.partial(function, save_intermediate=False) if function is separable_conv2d else function


def in_order(function, case, options=None):
    """The call as a function of the case's tensors alone, in their order."""
    names = list(case.tensors())
    options = case.options if options is None else options
    return lambda *values: function(**dict(zip(names, values, strict=True)), **options)


def all_of(values):
    return tuple(range(len(values)))


def value_and_gradients(function, tensors, options):
    y = function(**tensors, **options)
    return [y, *torch.autograd.grad(y.square().sum(), [t for t in tensors.values() if t.requires_grad])]


# opcheck


@pytest.mark.dtypes(torch.float32)
@pytest.mark.parametrize(
    "layout", (pytest.param(torch.contiguous_format, marks=pytest.mark.full), torch.channels_last), ids=("nchw", "nhwc")
)
@pytest.mark.cases(EVERYTHING, full=ALL_TRACED)
def test_opcheck_finds_nothing_in_the_forward(target, case, layout):
    tensors = leaves(case, torch.float32, target.device)
    if case.N is not None:
        tensors["x"] = tensors["x"].detach().contiguous(memory_format=layout).requires_grad_()
    torch.library.opcheck(forward_op(case), forward_arguments(case, tensors, target.backend))


@pytest.mark.gradients
@pytest.mark.dtypes(torch.float32)
@pytest.mark.parametrize("requires_grad", (False, True), ids=("constant", "differentiable"))
@pytest.mark.cases(TRACED, full=ALL_TRACED)
def test_opcheck_finds_nothing_in_the_backward(target, case, requires_grad):
    tensors = leaves(case, torch.float32, target.device, frozen=() if requires_grad else case.inputs)
    arguments = backward_arguments(case, tensors, requires_grad, target.backend)
    tests = ["test_schema", "test_autograd_registration", "test_faketensor"]
    if not requires_grad:  # the graph of a double backward is one that AOTAutograd does not trace
        tests.append("test_aot_dispatch_dynamic")
    torch.library.opcheck(backward_op(case), arguments, test_utils=tests)


@pytest.mark.cases(EVERYTHING)
def test_the_ops_called_directly_are_differentiable(case):
    tensors = leaves(case)
    values = list(tensors.values())
    y, expected = forward_op(case)(*forward_arguments(case, tensors)), case.definition(**tensors, **case.options)
    close(torch.autograd.grad(y.square().sum(), values), torch.autograd.grad(expected.square().sum(), values))

    arguments = backward_arguments(case, tensors, requires_grad=True)
    first = torch.autograd.grad(case.definition(**tensors, **case.options), values, arguments[0], create_graph=True)
    ours, theirs = (
        torch.autograd.grad(sum(gradient.square().sum() for gradient in gradients), [arguments[0], *values])
        for gradients in (backward_op(case)(*arguments), first)
    )
    close(ours, theirs)


# torch.compile


@pytest.fixture
def fresh_compiler():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()
    # An error inside a compiled jvp leaves PyTorch in forward mode, and the next test with it.
    with contextlib.suppress(RuntimeError):
        torch._C._exit_dual_level(level=0)


fresh = pytest.mark.usefixtures("fresh_compiler")


@fresh
@pytest.mark.parametrize("dynamic", (False, pytest.param(True, marks=pytest.mark.full)), ids=("static", "dynamic"))
@pytest.mark.cases(TRACED, full=ALL_TRACED)
def test_it_compiles_into_one_graph_forward_and_backward(case, dynamic):
    compiled = torch.compile(function_of(case), backend="aot_eager", fullgraph=True, dynamic=dynamic)
    tensors = leaves(case)
    expected = value_and_gradients(case.definition, tensors, case.options)
    close(value_and_gradients(compiled, tensors, case.options), expected)


@fresh
@pytest.mark.parametrize(
    "layout", (pytest.param(torch.contiguous_format, marks=pytest.mark.full), torch.channels_last), ids=str
)
def test_it_compiles_with_inductor(layout):
    network = nn.Sequential(
        SeparableConv2d(3, 8, 3, padding="same", stride=2, activation="relu"),
        nn.BatchNorm2d(8),
        SeparableConv2d(8, 4, 3, padding=1, pre_activation="relu"),
    )
    x = torch.randn(2, 3, 11, 9).contiguous(memory_format=layout)
    results = []
    for module in (network, torch.compile(network, fullgraph=True)):
        leaf = x.clone().requires_grad_()
        y = module(leaf)
        assert y.is_contiguous(memory_format=layout)
        results.append((y, *torch.autograd.grad(y.square().sum(), [leaf, *network.parameters()])))
    close(*results, 2e-4)


@fresh
@pytest.mark.quick
def test_one_dynamic_graph_with_one_node_serves_every_size():
    graphs = []
    module = SeparableConv2d(
        3, 5, 3, padding="same", stride=2, pre_activation="relu", activation="gelu", dtype=torch.float64
    )
    compiled = torch.compile(
        module, backend=lambda graph, _: graphs.append(graph) or graph, fullgraph=True, dynamic=True
    )
    for n, h, w in ((2, 9, 8), (3, 12, 11), (5, 20, 7), (4, 6, 30)):
        x = torch.randn(n, 3, h, w, dtype=torch.float64)
        close(compiled(x), module(x))
    (graph,) = graphs
    names = [str(node.target) for node in graph.graph.nodes if node.op == "call_function"]
    assert sum("fused_sepconv" in name for name in names) == 1
    assert not any(("conv2d" in name and "fused_sepconv" not in name) or "gelu" in name for name in names)


@fresh
@pytest.mark.cases(both(named("plain")))
def test_use_backend_is_heard_inside_and_outside_of_what_is_compiled(case):
    heard = []

    def look(graph, inputs):
        calls = (node for node in graph.graph.nodes if "fused_sepconv" in str(node.target))
        heard.extend((*node.args, *node.kwargs.values())[-1] for node in calls)
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
    close(torch.compile(inside, backend=look, fullgraph=True)(**tensors), expected)
    assert heard == ["auto", "reference", "reference"]


@fresh
def test_a_module_with_a_hook_compiles_too():
    module = SeparableConv2d(3, 5, 3, padding=1, dtype=torch.float64)
    module.depthwise.register_forward_hook(lambda child, args, output: output * 2)
    x = torch.randn(2, 3, 6, 6, dtype=torch.float64)
    close(torch.compile(module, backend="aot_eager", fullgraph=True)(x), module(x))


@fresh
@pytest.mark.cases(both(named("biases")))
def test_a_bad_call_is_named_under_compile_too(case):
    compiled = torch.compile(function_of(case), backend="eager")
    with pytest.raises(Exception, match="bias"):
        compiled(**{**case.tensors(), "bias": torch.randn(7, dtype=torch.float64)})


@pytest.mark.parametrize("tracing_mode", ("real", pytest.param("fake", marks=pytest.mark.full), "symbolic"))
@pytest.mark.cases(EVERYTHING, full=both(named("relu thrice", "same, stride 2, even size")))
def test_make_fx_traces_forward_and_backward(case, tracing_mode):
    names = list(case.tensors())  # not in what is traced: PyTorch 2.7 traces no generator

    def step(*values):
        return value_and_gradients(one_operator(case), dict(zip(names, values, strict=True)), case.options)

    graph = make_fx(step, tracing_mode=tracing_mode)(*leaves(case).values())
    targets = [str(node.target) for node in graph.graph.nodes]
    assert any(name.startswith(f"fused_sepconv.{case.operator}.") for name in targets)
    assert any(name.startswith(f"fused_sepconv.{case.operator}_backward") for name in targets)
    other = {name: tensor.requires_grad_() for name, tensor in case.tensors(seed=7).items()}
    close(graph(*other.values()), value_and_gradients(case.definition, other, case.options))


# autocast


lows = pytest.mark.parametrize("low", (torch.float16, torch.bfloat16), ids=str)


def under_autocast(function, tensors, options, device, low, grad_output):
    with torch.autocast(device, dtype=low):
        y = function(**tensors, **options)
    return [y, *torch.autograd.grad(y, list(tensors.values()), grad_output.to(device, y.dtype))]


@pytest.mark.gradients
@pytest.mark.dtypes(torch.float32)
@lows
@pytest.mark.cases(both(
    named("biases", "728->728@19 reduced", "same, stride 3", "four different sides", "depth multiplier 2",
          "silu between")
))  # fmt: skip
def test_autocast_does_what_it_does_to_the_pair(target, dtype, case, low):
    if low not in target.gradient_dtypes:
        low = dtype
    tensors = leaves(case, dtype, target.device)
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
    tensors = leaves(case, torch.float32, frozen=case.inputs)
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


@pytest.mark.cases(EVERYTHING)
def test_autocast_leaves_alone_what_it_is_not_for(case):
    tensors, single = leaves(case), leaves(case, torch.float32)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = value_and_gradients(function_of(case), tensors, case.options)
        with torch.autocast("cpu", enabled=False):
            assert function_of(case)(**single, **case.options).dtype == torch.float32
    close(found, value_and_gradients(case.definition, tensors, case.options))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        with torch.autocast("cuda", dtype=torch.bfloat16):
            assert function_of(case)(**single, **case.options).dtype == torch.float32


@lows
def test_a_backward_is_the_same_inside_and_outside_of_autocast(low):
    module = SeparableConv2d(4, 5, 3, padding=1, activation="silu")
    leaf = torch.randn(2, 4, 6, 6, requires_grad=True)
    with torch.autocast("cpu", dtype=low):
        loss = module(leaf).float().square().sum()
        inside = torch.autograd.grad(loss, [leaf, *module.parameters()], retain_graph=True)
    outside = torch.autograd.grad(loss, [leaf, *module.parameters()])
    for a, b in zip(inside, outside, strict=True):
        assert a.dtype == torch.float32 and torch.equal(a, b)


@fresh
@pytest.mark.cases(both(named("biases")))
def test_autocast_is_heard_under_compile(case):
    tensors = leaves(case, torch.float32)
    compiled = torch.compile(function_of(case), backend="aot_eager", fullgraph=True)
    grad_output = torch.randn(case.output_shape)
    ours, eager = (
        under_autocast(function, tensors, case.options, "cpu", torch.bfloat16, grad_output)
        for function in (compiled, function_of(case))
    )
    assert [tensor.dtype for tensor in ours] == [tensor.dtype for tensor in eager]
    close(ours, eager, 2e-2)


# vmap


VMAPPED = named("all six tensors", "everything")
MAPS = {
    "separable_conv2d": (
        ("x",), ("depthwise_weight",), ("pointwise_weight",), ("depthwise_weight", "pointwise_weight"),
        ("x", "depthwise_weight", "pointwise_weight"), ("bias", "depthwise_bias"), ("residual",), ("x", "residual"),
        Case.inputs,
    ),
    "depthwise_conv2d": (("x",), ("weight",), ("x", "weight"), ("bias",), DepthwiseCase.inputs),
}  # fmt: skip
MAPPINGS = [
    pytest.param((case, mapped), id=f"{case}: {', '.join(mapped)}")
    for case in both(VMAPPED)
    for mapped in MAPS[case.operator]
]


@pytest.mark.parametrize("mapping", MAPPINGS)
def test_vmap_is_a_loop_and_a_gradient_goes_back_through_it(mapping):
    case, mapped = mapping
    several = [case.tensors(seed) for seed in range(3)]
    for in_dim in (0, 1, -1):
        tensors = {
            name: torch.stack([one[name] for one in several], in_dim) if name in mapped else several[0][name]
            for name in several[0]
        }
        leaves = [tensor.requires_grad_() for tensor in tensors.values()]
        in_dims = tuple(in_dim if name in mapped else None for name in tensors)
        call = in_order(function_of(case), case)
        ours = torch.vmap(call, in_dims=in_dims, out_dims=2)(*leaves).movedim(2, 0)
        one_by_one = (
            {name: t.select(in_dim, i) if name in mapped else t for name, t in tensors.items()} for i in range(3)
        )
        expected = torch.stack([case.definition(**one, **case.options) for one in one_by_one])
        close(ours, expected)
        if in_dim == 0:
            close(*(torch.autograd.grad(y.square().sum(), leaves) for y in (ours, expected)))


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


@pytest.mark.cases(EVERYTHING)
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


def test_vmap_over_an_empty_batch_of_images_keeps_their_number():
    weights = torch.randn(3, 1, 1, 1), torch.randn(4, 3, 1, 1)
    images = torch.randn(0, 2, 3, 4, 5)
    assert torch.vmap(lambda x: separable_conv2d(x, *weights))(images).shape == (0, 2, 4, 4, 5)
    assert torch.vmap(lambda x: depthwise_conv2d(x, weights[0]))(images).shape == (0, 2, 3, 4, 5)


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


@pytest.mark.cases(both(named("gelu thrice", "four different sides", "unbatched, everything", "everything")))
def test_func_grad_is_the_gradient(case):
    values = tuple(case.tensors().values())

    def gradient(function):
        call = in_order(function, case)
        return torch.func.grad(lambda *values: call(*values).square().sum(), argnums=all_of(values))(*values)

    close(gradient(function_of(case)), gradient(case.definition))


@pytest.mark.cases(both(VMAPPED))
def test_per_sample_gradients_are_those_of_each_sample_alone(case):
    tensors = case.tensors()
    samples = {name: tensor for name, tensor in tensors.items() if name in ("x", "residual")}
    weights = {name: tensor for name, tensor in tensors.items() if name not in samples}

    def gradient(function):
        return torch.func.grad(lambda weights, sample: function(**weights, **sample, **case.options).square().sum())

    found = torch.vmap(gradient(function_of(case)), in_dims=(None, 0))(weights, samples)
    for i in range(case.N):
        expected = gradient(case.definition)(weights, {name: value[i] for name, value in samples.items()})
        close([found[name][i] for name in weights], [expected[name] for name in weights])


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


@pytest.mark.cases(both(named("1x1 image and kernel", "relu thrice", "gelu thrice", "unbatched", "everything")))
def test_jacobians_are_right_in_reverse_and_by_batched_gradients(case):
    """torch.func.jacrev, and torch.autograd.grad with is_grads_batched, which vectorize=True comes to."""
    ours, theirs = in_order(function_of(case), case), in_order(case.definition, case)
    values = tuple(case.tensors().values())
    expected = torch.func.jacrev(theirs, all_of(values))(*values)
    close(torch.func.jacrev(ours, all_of(values))(*values), expected)
    close(torch.autograd.functional.jacobian(ours, values, vectorize=True), expected)


def test_functional_call_uses_the_parameters_that_it_is_given():
    module, other = (SeparableConv2d(3, 4, 3, padding=1, dtype=torch.float64) for _ in range(2))
    x = torch.randn(2, 3, 6, 6, dtype=torch.float64)
    close(torch.func.functional_call(module, dict(other.named_parameters()), (x,)), other(x))
    zero = {"pointwise.weight": torch.zeros(4, 3, 1, 1, dtype=torch.float64)}
    found = torch.func.functional_call(module, zero, (x,))
    close(found, module.pointwise.bias.view(1, 4, 1, 1).expand_as(found))


@pytest.mark.cases(both(named("1x1 image and kernel", "gelu thrice", "relu thrice", "everything")))
def test_a_gradient_of_a_gradient_is_eagers(case):
    values = tuple(case.tensors().values())

    def twice(function):
        call = in_order(function, case)

        def penalty(*values):
            gradients = torch.func.grad(lambda *v: call(*v).square().sum(), all_of(values))(*values)
            return sum(gradient.square().sum() for gradient in gradients)

        return torch.func.grad(penalty, all_of(values))(*values)

    close(twice(function_of(case)), twice(case.definition), 1e-9)


# Forward mode: PyTorch's own operators carry the tangents, so it is right, and never silently zero


def tangents(values, seed=100):
    generator = torch.Generator().manual_seed(seed)
    return tuple(torch.randn(value.shape, generator=generator, dtype=value.dtype) for value in values)


def right(case, product, tolerance=1e-10):
    """product(call, values) is the same for ours and for the definition, and not zero, which would prove nothing."""
    values = tuple(case.tensors().values())
    ours, expected = (
        product(in_order(function, case), values) for function in (function_of(case), case.definition)
    )  # fmt: skip
    assert all(tensor.abs().max() > 0 for tensor in expected if tensor.numel())
    close(ours, expected, tolerance)


FORWARD_MODE = named(
    "plain", "gelu thrice", "elu thrice", "silu after", "relu6 thrice", "hardswish thrice", "same, stride 2, even size",
    "depth multiplier 2", "four different sides", "unbatched, everything", "everything",
)  # fmt: skip


@pytest.mark.cases(both(FORWARD_MODE))
def test_jvp_is_right(case):
    right(case, lambda call, values: torch.func.jvp(call, values, tangents(values)))


@pytest.mark.parametrize("input_of", each_input(EVERYTHING))
def test_jvp_along_one_input_is_right(input_of):
    case, alone = input_of
    i = list(case.tensors()).index(alone)

    def product(call, values):
        return torch.func.jvp(
            lambda v: call(*values[:i], v, *values[i + 1 :]), (values[i],), tangents(values[i : i + 1])
        )

    right(case, product)


def by_dual_numbers(call, values):
    with forward_ad.dual_level():
        primal, tangent = forward_ad.unpack_dual(call(*map(forward_ad.make_dual, values, tangents(values))))
        assert tangent is not None, "the tangent was lost"
        return [primal.detach(), tangent.detach()]


@pytest.mark.parametrize("requires_grad", (False, True), ids=("constant", "differentiable"))
@pytest.mark.cases(both(named("everything", "relu thrice", "plain")))
def test_dual_numbers_are_right(case, requires_grad):
    right(case, lambda call, values: by_dual_numbers(call, [v.requires_grad_(requires_grad) for v in values]))


@pytest.mark.cases(EVERYTHING)
def test_dual_numbers_through_the_op_itself_are_right(case):
    def op(*values):
        return forward_op(case)(*forward_arguments(case, dict(zip(case.tensors(), values, strict=True))))

    values = tuple(case.tensors().values())
    close(by_dual_numbers(op, values), by_dual_numbers(in_order(case.definition, case), values))


def forward_over_reverse(call, values):
    """A Hessian-vector product, the usual way."""
    gradient = torch.func.grad(lambda *v: call(*v).square().sum(), all_of(values))
    return torch.func.jvp(gradient, values, tangents(values))[1]


def reverse_over_forward(call, values):
    def slope(*v):
        return torch.func.jvp(call, v, tangents(values))[1].square().sum()

    return torch.func.grad(slope, all_of(values))(*values)


def jacfwd_and_hessian(call, values):
    hessian = torch.func.hessian(lambda x: call(x, *values[1:]).pow(3).sum())(values[0])
    return [torch.func.jacfwd(call)(*values), hessian]


@pytest.mark.parametrize("product", (forward_over_reverse, reverse_over_forward, jacfwd_and_hessian))
@pytest.mark.cases(both(named("relu thrice", "gelu thrice")))
def test_second_derivatives_that_go_forward_are_right(case, product):
    right(case, product, 1e-9)


def right_or_refused(ours, expected):
    """Where tracing and forward mode meet PyTorch itself refuses much; a wrong number is never right."""
    try:
        found = ours()
    except Exception:
        return
    close(found, expected)


full = pytest.mark.full


@fresh
@pytest.mark.parametrize("how", ("jvp", "dual numbers"))
@pytest.mark.parametrize("past", (pytest.param(False, marks=full), True), ids=("alone", "with a way past"))
@pytest.mark.parametrize("backend", (pytest.param("eager", marks=full), "aot_eager"))
@pytest.mark.cases(both(named("relu thrice")))
def test_forward_mode_under_compile_is_right_or_refused(case, backend, past, how):
    """With a way past, the sum of the inputs: a tangent lost leaves a result that is wrong, not missing."""
    values = tuple(case.tensors().values())

    def product(function):
        call = in_order(function, case)

        def summed(*values):
            return call(*values).sum() + sum(value.sum() for value in values)

        used = summed if past else call
        if how == "jvp":
            return lambda values, along: torch.func.jvp(used, values, along)

        def dual(values, along):
            with forward_ad.dual_level():
                return forward_ad.unpack_dual(used(*map(forward_ad.make_dual, values, along)))

        return dual

    compiled = torch.compile(product(function_of(case)), backend=backend)
    expected = product(case.definition)(values, tangents(values))
    right_or_refused(lambda: compiled(values, tangents(values)), expected)


@fresh
@pytest.mark.cases(both(named("relu thrice")))
def test_what_is_compiled_and_then_differentiated_forward_is_right_or_refused(case):
    compiled = torch.compile(function_of(case), backend="aot_eager")
    values = tuple(case.tensors().values())
    expected = torch.func.jvp(in_order(case.definition, case), values, tangents(values))
    right_or_refused(lambda: torch.func.jvp(in_order(compiled, case), values, tangents(values)), expected)


@fresh
@pytest.mark.cases(both(named("plain")))
def test_func_grad_and_vmap_compile(case):
    x, *weights = case.tensors().values()

    def per_sample(function):
        def loss(weights, x):
            return function(x, *weights, padding=1, activation="relu").square().sum()

        return torch.vmap(torch.func.grad(loss), in_dims=(None, 0))

    found = torch.compile(per_sample(function_of(case)), backend="aot_eager")(weights, x)
    close(found, per_sample(case.definition)(weights, x))


@pytest.mark.parametrize("transform", (torch.func.jacfwd, torch.func.hessian), ids=lambda t: t.__name__)
@pytest.mark.cases(both((Case("per sample", 1, 3, 3, 4, 2, padding=1, pre_activation="silu", mid_activation="silu"),)))
def test_per_sample_forward_mode_in_channels_last(case, transform):
    x, *weights = case.tensors().values()
    batch = torch.stack([sample.contiguous(memory_format=torch.channels_last) for sample in torch.stack([x, 2 * x])])

    def sample(function):
        return torch.vmap(transform(lambda x: function(x, *weights, **case.options).square().sum()))

    torch.testing.assert_close(sample(function_of(case))(batch), sample(case.definition)(batch))


# Other ways to run a graph


@pytest.mark.parametrize("elsewhere", (False, True), ids=("this thread", "another thread"))
@pytest.mark.cases(both(named("relu thrice")))
def test_a_backward_runs_on_the_backend_of_its_forward(case, elsewhere):
    backends = []
    with recording(case, backends), fused_sepconv.use_backend("reference"):
        y = one_operator(case)(**leaves(case), padding=1)

    def backward():
        with recording(case, backends):
            y.sum().backward()

    if elsewhere:
        thread = threading.Thread(target=backward)
        thread.start()
        thread.join(60)
    else:
        backward()
    assert backends == [(case.operator, "reference"), (f"{case.operator}_backward", "reference")]


def test_every_activation_of_the_definition_is_one_of_the_packages():
    """The tests' own table and the package's name the same seven."""
    assert set(ACTIVATIONS) == set(fused_sepconv.tensors.activations.ACTIVATIONS)


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
