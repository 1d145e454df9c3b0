"""The gradients: right by finite differences, made from the inputs, as often as they are asked for."""

import itertools

import pytest
import torch

from fused_sepconv import DepthwiseConv2dFunction, SeparableConv2dFunction, separable_conv2d
from tests.support.calls import backward_op, each_input, function_of, leaves, op_arguments, value_and_gradients
from tests.support.cases import CASES, SMALL, Case, both, named, two_convolutions
from tests.support.closeness import assert_gradient_as_close_as_eager, close

pytestmark = pytest.mark.gradients


def gradients(function, inputs, options, grad_output):
    found = value_and_gradients(function, inputs, options, grad_output)
    del found["y"]
    return found


# A case for each feature: test_forward.py holds every case against float64 too.
DIFFERENTIATED = both(named(
    "biases", "one column", "windows in the padding alone", "batch 0", "unbatched", "depth multiplier 3", "stride 3",
    "same, stride 2, dilation 2", "relu6 thrice", "elu thrice", "silu thrice", "hardswish thrice", "gelu thrice",
    "everything",
))  # fmt: skip


@pytest.mark.dtypes(torch.float64)
@pytest.mark.parametrize("fast", (True, pytest.param(False, marks=pytest.mark.full)), ids=("projected", "in full"))
@pytest.mark.cases(DIFFERENTIATED, full=both(SMALL))
def test_gradcheck_and_gradgradcheck(target, dtype, case, fast):
    """Along one random direction, or every element of every Jacobian."""
    inputs = leaves(case, dtype, target.device)

    def call(*values):
        return function_of(case)(**dict(zip(inputs, values, strict=True)), **case.options)

    for check in (torch.autograd.gradcheck, torch.autograd.gradgradcheck):
        assert check(call, tuple(inputs.values()), check_batched_grad=False, fast_mode=fast)


@pytest.mark.dtypes(torch.float64)
@pytest.mark.cases(both(named("everything", "gelu thrice", "all six tensors")))
def test_the_third_derivative_is_eagers(target, dtype, case):
    """Through torch's own operators from the second on, so there is no end to it."""
    inputs = leaves(case, dtype, target.device)

    def third(function):
        value = function(**inputs, **case.options).square().sum()
        for _ in range(2):
            first = torch.autograd.grad(value, list(inputs.values()), create_graph=True)
            value = sum(gradient.square().sum() for gradient in first)
        return torch.autograd.grad(value, list(inputs.values()))

    close(third(function_of(case)), third(case.definition), 1e-9)


@pytest.mark.dtypes(torch.float64)
@pytest.mark.parametrize("activation", ("relu", "relu6", "elu", "silu", "hardswish", "gelu"))
@pytest.mark.cases(both((Case("one pixel wide", 1, 1, 1, 17, 1, kernel=1),)))
def test_at_a_bend_the_gradient_is_the_one_that_pytorch_takes(target, dtype, case, activation):
    """x walks through whole numbers past every bend (0, 6, -3, 3), and identity weights leave it as it is."""
    values = torch.arange(-8.0, 9.0, dtype=dtype, device=target.device).view(1, 1, 1, -1)
    ones = {name: torch.ones_like(tensor) for name, tensor in leaves(case, dtype, target.device).items()}
    inputs = {name: tensor.requires_grad_() for name, tensor in {**ones, "x": values.clone()}.items()}
    for place in case.activations:
        ours, eager = (
            gradients(function, inputs, {place: activation}, torch.ones_like(values))
            for function in (function_of(case), case.definition)
        )
        close(ours.values(), eager.values(), 1e-14)


# Which gradients


@pytest.mark.dtypes(torch.float64)
@pytest.mark.parametrize("input_of", each_input(both(named("everything", "all six tensors"))))
def test_each_input_alone_and_all_but_it_get_the_gradients_that_they_have_among_all(target, dtype, input_of):
    case, name = input_of
    grad_output = torch.randn(case.output_shape, dtype=dtype)
    everything = gradients(function_of(case), leaves(case, dtype, target.device), case.options, grad_output)
    others = [other for other in everything if other != name]
    for frozen in (others, [name]):
        inputs = leaves(case, dtype, target.device, frozen)
        function_of(case)(**inputs, **case.options).backward(grad_output.to(target.device))
        found = {name: tensor.grad for name, tensor in inputs.items() if tensor.grad is not None}
        assert set(found) == set(everything) - set(frozen)
        close(found.values(), [everything[name] for name in found], 1e-12)

        def twice(function, inputs=inputs):
            asking = [tensor for tensor in inputs.values() if tensor.requires_grad]
            y = function(**inputs, **case.options)
            first = torch.autograd.grad(y.square().sum(), asking, create_graph=True)
            return torch.autograd.grad(sum(gradient.square().sum() for gradient in first), asking)

        close(twice(function_of(case)), twice(case.definition), 1e-10)


@pytest.mark.cases(both(named("everything")))
def test_where_nothing_asks_for_a_gradient_no_graph_is_made(target, case):
    inputs = leaves(case, torch.float64, target.device)
    assert not function_of(case)(**{n: t.detach() for n, t in inputs.items()}, **case.options).requires_grad
    with torch.no_grad():
        assert not function_of(case)(**inputs, **case.options).requires_grad
    with torch.inference_mode():
        assert function_of(case)(**inputs, **case.options).is_inference()


@pytest.mark.cases(both(named("plain")))
def test_the_graph_has_the_function_that_the_contract_names(target, case):
    y = function_of(case)(**leaves(case, torch.float64, target.device), **case.options)
    function = {"separable_conv2d": SeparableConv2dFunction, "depthwise_conv2d": DepthwiseConv2dFunction}[case.operator]
    assert issubclass(function, torch.autograd.Function)
    assert function.__name__ in type(y.grad_fn).__name__


def masks(count):
    """None, all, one by one, all but one, and every other."""
    ones = [tuple(i == j for i in range(count)) for j in range(count)]
    others = [tuple(not asked for asked in mask) for mask in ones]
    return {(True,) * count, (False,) * count, *ones, *others, tuple(i % 2 == 0 for i in range(count))}


@pytest.mark.dtypes(torch.float64)
@pytest.mark.cases(both(named("everything", "relu between")))
def test_the_backward_op_gives_the_gradients_that_its_mask_asks_for(target, dtype, case):
    inputs = leaves(case, dtype, target.device)
    grad_output = torch.randn(case.output_shape, dtype=dtype, device=target.device)
    expected = value_and_gradients(case.definition, inputs, case.options, grad_output)
    given = [inputs[name].detach() if name in inputs else None for name in case.inputs]
    for mask, output in itertools.product(masks(len(case.inputs)), (None, expected["y"])):
        asked = [asked and name in inputs for name, asked in zip(case.inputs, mask, strict=True)]
        found = backward_op(case)(grad_output, *given, output, *op_arguments(case, target.backend), asked)
        for name, wanted, gradient in zip(case.inputs, asked, found, strict=True):
            if wanted:
                torch.testing.assert_close(gradient, expected[name], rtol=1e-12, atol=1e-12)
            else:
                assert gradient.shape == (0,), "an empty tensor stands for what was not asked for"


# What is kept for the backward


SAVED = named(
    "all six tensors", "residual before the activation", "relu6 thrice", "elu thrice", "silu thrice", "gelu thrice",
    "everything", "same, stride 2, even size", "four different sides", "1x1 kernel",
)  # fmt: skip


@pytest.mark.dtypes(torch.float32)
@pytest.mark.cases(both(SAVED))
def test_without_the_depthwise_result_nothing_is_kept_but_the_inputs_and_some_outputs(target, dtype, case):
    inputs = leaves(case, dtype, target.device)
    save = {"save_intermediate": False} if case.operator == "separable_conv2d" else {}
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: saved.append(tensor) or tensor, lambda tensor: tensor):
        y = function_of(case)(**inputs, **case.options, **save)
    allowed = {tensor.untyped_storage().data_ptr(): name for name, tensor in inputs.items()}
    if case.activation in ("relu", "relu6", "elu"):
        allowed[y.untyped_storage().data_ptr()] = "the output"
    assert saved
    for tensor in saved:
        assert tensor.untyped_storage().data_ptr() in allowed, f"a {tuple(tensor.shape)} is kept that is no input"
    total = sum({tensor.untyped_storage().data_ptr(): tensor.numel() for tensor in saved}.values())
    assert total <= sum(tensor.numel() for tensor in inputs.values()) + y.numel()


@pytest.mark.parametrize("input_of", each_input(both(named("relu thrice"))))
def test_an_input_changed_before_the_backward_is_refused(target, input_of):
    case, name = input_of
    inputs = leaves(case, torch.float64, target.device)
    y = function_of(case)(**inputs, **case.options)
    with torch.no_grad():
        inputs[name].add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()


@pytest.mark.cases(both(named("plain")))
def test_an_output_changed_before_the_backward_is_refused_where_it_is_needed_and_harmless_elsewhere(target, case):
    for activation, needed in ((None, False), ("relu", True), ("relu6", True), ("elu", False), ("gelu", False)):
        inputs = leaves(case, torch.float64, target.device)
        options = {**case.options, "activation": activation}
        expected = gradients(case.definition, inputs, options, torch.ones(case.output_shape))
        y = function_of(case)(**inputs, **options)
        y.mul_(1).add_(3)
        if needed:
            with pytest.raises(RuntimeError, match="modified by an inplace operation"):
                y.sum().backward()
        else:
            y.sum().backward()
            close([tensor.grad for tensor in inputs.values()], expected.values(), 1e-12)


@pytest.mark.cases(both(named("everything", "every dimension: one over")))
def test_a_graph_that_is_retained_gives_the_same_bits_again_and_one_that_is_not_says_so(target, case):
    for dtype in (torch.float32, torch.bfloat16):
        inputs = list(leaves(case, dtype, target.device).values())
        y = function_of(case)(**dict(zip(case.tensors(), inputs, strict=True)), **case.options).sum()
        first = torch.autograd.grad(y, inputs, retain_graph=True)
        assert all(map(torch.equal, first, torch.autograd.grad(y, inputs)))
        with pytest.raises(RuntimeError, match="second time"):
            torch.autograd.grad(y, inputs)


def test_a_tensor_used_twice_gets_the_sum(target):
    """The result goes in again as the next call's input and residual; one pair of weights serves both."""
    case = Case("twice", 2, 4, 5, 5, 4, padding=1, residual=True, activation="relu")
    inputs = leaves(case, torch.float64, target.device)

    def twice(function):
        y = function(**inputs, **case.options)
        y = function(y, inputs["depthwise_weight"], inputs["pointwise_weight"], padding=1, residual=y)
        return torch.autograd.grad(y.square().sum(), list(inputs.values()))

    close(twice(separable_conv2d), twice(two_convolutions), 1e-11)


# The gradient that arrives


ARRIVALS = {
    "expanded from one number": lambda g: g.new_ones(()).expand(g.shape),
    "expanded over the batch": lambda g: g[:1].expand(g.shape),
    "channels_last": lambda g: g.contiguous(memory_format=torch.channels_last),
    "transposed": lambda g: g.transpose(-1, -2).contiguous().transpose(-1, -2),
    "every other": lambda g: torch.stack([g, torch.full_like(g, float("nan"))], -1)[..., 0],
}


@pytest.mark.dtypes(torch.float32, torch.bfloat16)
@pytest.mark.cases(both(named("everything", "same, stride 2, even size", "residual")))
def test_a_gradient_may_arrive_in_any_layout(target, dtype, case):
    inputs = leaves(case, dtype, target.device)
    exact = {name: tensor.detach().to("cpu", torch.float64).requires_grad_() for name, tensor in inputs.items()}
    drawn = torch.randn(case.output_shape, dtype=dtype, device=target.device)
    for arrival, make in ARRIVALS.items():
        grad_output = make(drawn)
        before = grad_output.clone()
        ours = gradients(function_of(case), inputs, case.options, grad_output)
        eager = gradients(case.definition, inputs, case.options, before.contiguous())
        oracle = gradients(case.definition, exact, case.options, before.cpu())
        assert torch.equal(grad_output, before)
        for name, gradient in ours.items():
            assert_gradient_as_close_as_eager(gradient, eager[name], oracle[name], name=f"{arrival}: {name}")


@pytest.mark.dtypes(torch.float64)
def test_the_residuals_gradient_is_not_the_arriving_tensor_itself(target, dtype):
    """Accumulation in place into one of them must not reach the other."""
    (case,) = named("residual")
    inputs = leaves(case, dtype, target.device)
    grad_output = torch.randn(case.output_shape, dtype=dtype, device=target.device)
    before = grad_output.clone()
    for _ in range(2):
        separable_conv2d(**inputs, **case.options).backward(grad_output)
    assert torch.equal(grad_output, before)
    torch.testing.assert_close(inputs["residual"].grad, 2 * before)


# What double backward and saved gradients must not trip over


@pytest.mark.parametrize("dtype", (torch.float16, torch.bfloat16), ids=str)
def test_elus_gradient_stays_right_where_its_output_is_close_to_minus_one(dtype):
    x = (torch.randn(4, 3, 8, 8, generator=torch.Generator().manual_seed(1)) - 5).to(dtype)
    unit = torch.ones(3, 1, 1, 1, dtype=dtype), torch.eye(3, dtype=dtype).view(3, 3, 1, 1)

    def gradient(function, *tensors):
        leaf = tensors[0].clone().requires_grad_()
        function(leaf, *tensors[1:], activation="elu").sum().backward()
        return leaf.grad

    ours, eager = (gradient(function, x, *unit) for function in (separable_conv2d, two_convolutions))
    oracle = gradient(two_convolutions, x.double(), *(weight.double() for weight in unit))
    assert_gradient_as_close_as_eager(ours, eager, oracle)


@pytest.mark.cases(both(CASES[:1]))
def test_double_backward_works_under_saved_tensor_hooks(case):
    tensors = leaves(case)

    def penalty(function):
        with torch.autograd.graph.save_on_cpu():
            y = function(**tensors, **case.options)
            (grad,) = torch.autograd.grad(y.square().sum(), tensors["x"], create_graph=True)
            return torch.autograd.grad(grad.square().sum(), list(tensors.values()))

    close(penalty(function_of(case)), penalty(case.definition))


@pytest.mark.cases(both((Case("crop", 2, 4, 5, 5, 5, padding=((1, 2), (1, 2))),)))
def test_the_gradient_of_a_crop_has_memory_of_its_own(case):
    crop = torch.randn(2, 4, 9, 9)[:, :, 2:7, 1:6].requires_grad_()
    y = function_of(case)(**{**leaves(case, torch.float32), "x": crop}, **case.options)
    (grad,) = torch.autograd.grad(y.sum(), crop)
    assert grad.stride() == torch.empty_like(crop).stride()
    assert grad.untyped_storage().nbytes() == grad.numel() * 4
