"""The gradients: right by finite differences, and as close to the oracle as eager's."""

import itertools

import pytest
import torch

from fused_sepconv import DepthwiseConv2dFunction, SeparableConv2dFunction, separable_conv2d
from tests.support.calls import backward_op, each_input, function_of, op_arguments
from tests.support.cases import CASES, FEATURES, SMALL, Case, both, named, two_convolutions
from tests.support.closeness import assert_gradient_as_close_as_eager


def leaves(tensors, dtype, device="cpu", frozen=()):
    made = {name: tensor.to(device=device, dtype=dtype).clone() for name, tensor in tensors.items()}
    return {name: tensor.requires_grad_(name not in frozen) for name, tensor in made.items()}


def gradients(function, inputs, options, grad_output):
    """The gradients of those inputs that ask for one, by name."""
    asking = {name: tensor for name, tensor in inputs.items() if tensor.requires_grad}
    y = function(**inputs, **options)
    found = torch.autograd.grad(y, list(asking.values()), grad_output.to(y.device, y.dtype))
    return dict(zip(asking, found, strict=True))


@pytest.mark.gradients
@pytest.mark.cases(both(CASES), quick=FEATURES)
def test_every_gradient_of_every_case_is_as_close_to_the_oracle_as_eagers(target, dtype, case):
    generator = torch.Generator().manual_seed(1)
    grad_output = torch.randn(case.output_shape, generator=generator, dtype=torch.float64).to(dtype)
    inputs = leaves(case.tensors(), dtype, target.device)
    eager = gradients(case.definition, inputs, case.options, grad_output)
    exact = leaves({name: tensor.detach() for name, tensor in inputs.items()}, torch.float64)
    oracle = gradients(case.definition, exact, case.options, grad_output)
    for x in target.in_each_layout(inputs["x"]):
        ours = gradients(function_of(case), {**inputs, "x": x}, case.options, grad_output)
        assert ours.keys() == eager.keys()
        for name, gradient in ours.items():
            assert_gradient_as_close_as_eager(gradient, eager[name], oracle[name], name=f"gradient of {name}")


# A case for each feature: the test above holds every case against float64 too. The rest is differentiated in full.
DIFFERENTIATED = both(named(
    "plain", "biases", "one column", "windows in the padding alone", "batch 0", "unbatched", "depth multiplier 3",
    "stride 3", "same, stride 2, dilation 2", "four different sides", "relu6 thrice", "elu thrice", "silu thrice",
    "hardswish thrice", "gelu thrice", "everything",
))  # fmt: skip


@pytest.mark.gradients
@pytest.mark.dtypes(torch.float64)
@pytest.mark.cases(DIFFERENTIATED, full=both(SMALL))
def test_gradcheck(target, dtype, case):
    inputs = leaves(case.tensors(), dtype, target.device)

    def call(*values):
        return function_of(case)(**dict(zip(inputs, values, strict=True)), **case.options)

    assert torch.autograd.gradcheck(call, tuple(inputs.values()), check_batched_grad=False)


@pytest.mark.gradients
@pytest.mark.dtypes(torch.float64)
@pytest.mark.cases(DIFFERENTIATED, full=SMALL)
def test_gradgradcheck(target, dtype, case):
    inputs = leaves(case.tensors(), dtype, target.device)

    def call(*values):
        return function_of(case)(**dict(zip(inputs, values, strict=True)), **case.options)

    assert torch.autograd.gradgradcheck(call, tuple(inputs.values()), check_batched_grad=False)


@pytest.mark.gradients
@pytest.mark.dtypes(torch.float64)
@pytest.mark.cases(both(named("everything", "gelu thrice", "all six tensors")))
def test_the_third_derivative_is_eagers(target, dtype, case):
    """Through torch's own operators from the second on, so there is no end to it."""
    inputs = leaves(case.tensors(), dtype, target.device)

    def third(function):
        value = function(**inputs, **case.options).square().sum()
        for _ in range(2):
            first = torch.autograd.grad(value, list(inputs.values()), create_graph=True)
            value = sum(gradient.square().sum() for gradient in first)
        return torch.autograd.grad(value, list(inputs.values()))

    for ours, eager in zip(third(function_of(case)), third(case.definition), strict=True):
        torch.testing.assert_close(ours, eager, rtol=1e-9, atol=1e-9)


@pytest.mark.gradients
@pytest.mark.dtypes(torch.float64)
@pytest.mark.parametrize("input_of", each_input(both(named("everything"))))
def test_a_second_derivative_needs_only_what_asks_for_it(target, dtype, input_of):
    case, frozen = input_of
    inputs = leaves(case.tensors(), dtype, target.device, frozen=(frozen,))
    asking = [tensor for tensor in inputs.values() if tensor.requires_grad]

    def twice(function):
        first = torch.autograd.grad(function(**inputs, **case.options).square().sum(), asking, create_graph=True)
        return torch.autograd.grad(sum(gradient.square().sum() for gradient in first), asking)

    for ours, eager in zip(twice(function_of(case)), twice(case.definition), strict=True):
        torch.testing.assert_close(ours, eager, rtol=1e-10, atol=1e-10)


# At the bends


@pytest.mark.gradients
@pytest.mark.dtypes(torch.float64)
@pytest.mark.parametrize("activation", ("relu", "relu6", "elu", "silu", "hardswish", "gelu"))
@pytest.mark.cases(both((Case("one pixel wide", 1, 1, 1, 17, 1, kernel=1),)))
def test_at_a_bend_the_gradient_is_the_one_that_pytorch_takes(target, dtype, case, activation):
    """x walks through whole numbers past every bend (0, 6, -3, 3), and identity weights leave it as it is."""
    values = torch.arange(-8.0, 9.0, dtype=dtype, device=target.device).view(1, 1, 1, -1)
    inputs = {
        name: (values.clone() if name == "x" else torch.ones_like(tensor, dtype=dtype, device=target.device))
        for name, tensor in case.tensors().items()
    }
    inputs = {name: tensor.requires_grad_() for name, tensor in inputs.items()}
    for place in case.activations:
        ours, eager = (
            gradients(function, inputs, {place: activation}, torch.ones_like(values))
            for function in (function_of(case), case.definition)
        )
        for name, gradient in ours.items():
            torch.testing.assert_close(gradient, eager[name], rtol=1e-14, atol=1e-14)


# Which gradients


@pytest.mark.gradients
@pytest.mark.dtypes(torch.float64)
@pytest.mark.parametrize("input_of", each_input(both(named("everything", "all six tensors", "relu thrice"))))
def test_each_gradient_alone_is_what_it_is_among_all(target, dtype, input_of):
    case, asking = input_of
    tensors = case.tensors()
    grad_output = torch.randn(case.output_shape, dtype=dtype)
    everything = gradients(function_of(case), leaves(tensors, dtype, target.device), case.options, grad_output)
    frozen = [name for name in tensors if name != asking]
    alone = gradients(function_of(case), leaves(tensors, dtype, target.device, frozen), case.options, grad_output)
    assert list(alone) == [asking]
    torch.testing.assert_close(alone[asking], everything[asking], rtol=1e-12, atol=1e-12)


@pytest.mark.gradients
@pytest.mark.parametrize("input_of", each_input(both(named("everything"))))
def test_what_asks_for_no_gradient_gets_none(target, input_of):
    case, frozen = input_of
    inputs = leaves(case.tensors(), torch.float64, target.device, frozen=(frozen,))
    function_of(case)(**inputs, **case.options).sum().backward()
    assert {name for name, tensor in inputs.items() if tensor.grad is None} == {frozen}


@pytest.mark.cases(both(named("everything")))
def test_where_nothing_asks_for_a_gradient_no_graph_is_made(target, case):
    inputs = leaves(case.tensors(), torch.float64, target.device)
    assert not function_of(case)(**{n: t.detach() for n, t in inputs.items()}, **case.options).requires_grad
    with torch.no_grad():
        assert not function_of(case)(**inputs, **case.options).requires_grad
    with torch.inference_mode():
        assert function_of(case)(**inputs, **case.options).is_inference()


@pytest.mark.gradients
@pytest.mark.cases(both(named("plain")))
def test_the_graph_has_the_function_that_the_contract_names(target, case):
    y = function_of(case)(**leaves(case.tensors(), torch.float64, target.device), **case.options)
    function = {"separable_conv2d": SeparableConv2dFunction, "depthwise_conv2d": DepthwiseConv2dFunction}[case.operator]
    assert issubclass(function, torch.autograd.Function)
    assert function.__name__ in type(y.grad_fn).__name__


OUTPUT_MASKS = {
    "separable_conv2d": (
        (True,) * 6,
        (True, False, False, False, False, False),
        (False, True, False, False, False, False),
        (False, False, True, False, False, False),
        (False, False, False, True, False, False),
        (False, False, False, False, True, False),
        (False, False, False, False, False, True),
        (True, False, True, False, True, False),
        (False, True, True, True, True, True),
        (False,) * 6,
    ),
    "depthwise_conv2d": tuple(itertools.product((True, False), repeat=3)),
}
MASKED = [
    pytest.param((case, mask), id=f"{case}: {''.join('ny'[asked] for asked in mask)}")
    for case in both(named("everything", "relu between"))
    for mask in OUTPUT_MASKS[case.operator]
]


@pytest.mark.gradients
@pytest.mark.dtypes(torch.float64)
@pytest.mark.parametrize("masked", MASKED)
def test_the_backward_op_gives_the_gradients_that_its_mask_asks_for(target, dtype, masked):
    case, mask = masked
    inputs = leaves(case.tensors(), dtype, target.device)
    mask = [asked and name in inputs for name, asked in zip(case.inputs, mask, strict=True)]
    grad_output = torch.randn(case.output_shape, dtype=dtype, device=target.device)
    expected = gradients(case.definition, inputs, case.options, grad_output)
    y = case.definition(**inputs, **case.options).detach()
    inputs = {name: tensor.detach() for name, tensor in inputs.items()}
    for output in (None, y):
        found = backward_op(case)(
            grad_output, *(inputs.get(name) for name in case.inputs), output,
            *op_arguments(case, target.backend), mask,
        )  # fmt: skip
        for name, wanted, gradient in zip(case.inputs, mask, found, strict=True):
            if wanted:
                torch.testing.assert_close(gradient, expected[name], rtol=1e-12, atol=1e-12)
            else:
                assert gradient.shape == (0,), "an empty tensor stands for what was not asked for"


# What is kept for the backward


SAVED = named(
    "all six tensors",
    "residual before the activation",
    "relu thrice",
    "relu6 thrice",
    "elu thrice",
    "silu thrice",
    "hardswish thrice",
    "gelu thrice",
    "everything",
    "same, stride 2, even size",
    "four different sides",
    "1x1 kernel",
)


@pytest.mark.gradients
@pytest.mark.dtypes(torch.float32, torch.bfloat16)
@pytest.mark.cases(both(SAVED))
def test_without_the_depthwise_result_nothing_is_kept_but_the_inputs_and_some_outputs(target, dtype, case):
    inputs = leaves(case.tensors(), dtype, target.device)
    save = {"save_intermediate": False} if case.operator == "separable_conv2d" else {}
    saved = []

    def keep(tensor):
        saved.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        y = function_of(case)(**inputs, **case.options, **save)
    allowed = {tensor.untyped_storage().data_ptr(): name for name, tensor in inputs.items()}
    if case.activation in ("relu", "relu6", "elu"):
        allowed[y.untyped_storage().data_ptr()] = "the output"
    assert saved
    for tensor in saved:
        assert tensor.untyped_storage().data_ptr() in allowed, f"a {tuple(tensor.shape)} is kept that is no input"
    total = sum({tensor.untyped_storage().data_ptr(): tensor.numel() for tensor in saved}.values())
    assert total <= sum(tensor.numel() for tensor in inputs.values()) + y.numel()


@pytest.mark.gradients
@pytest.mark.parametrize("input_of", each_input(both(named("relu thrice"))))
def test_an_input_changed_before_the_backward_is_refused(target, input_of):
    case, name = input_of
    inputs = leaves(case.tensors(), torch.float64, target.device)
    y = function_of(case)(**inputs, **case.options)
    with torch.no_grad():
        inputs[name].add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()


@pytest.mark.gradients
@pytest.mark.cases(both(named("plain")))
def test_an_output_changed_before_the_backward_is_refused_where_it_is_needed_and_harmless_elsewhere(target, case):
    for activation, needed in ((None, False), ("relu", True), ("relu6", True), ("elu", False), ("gelu", False)):
        inputs = leaves(case.tensors(), torch.float64, target.device)
        options = {**case.options, "activation": activation}
        expected = gradients(case.definition, inputs, options, torch.ones(case.output_shape))
        y = function_of(case)(**inputs, **options)
        y.mul_(1).add_(3)
        if needed:
            with pytest.raises(RuntimeError, match="modified by an inplace operation"):
                y.sum().backward()
        else:
            y.sum().backward()
            for name, tensor in inputs.items():
                torch.testing.assert_close(tensor.grad, expected[name], rtol=1e-12, atol=1e-12)


@pytest.mark.gradients
@pytest.mark.cases(both(named("everything")))
def test_a_graph_that_is_retained_can_be_walked_again_and_one_that_is_not_says_so(target, case):
    inputs = leaves(case.tensors(), torch.float64, target.device)
    y = function_of(case)(**inputs, **case.options).sum()
    first = torch.autograd.grad(y, list(inputs.values()), retain_graph=True)
    second = torch.autograd.grad(y, list(inputs.values()))
    for a, b in zip(first, second, strict=True):
        assert torch.equal(a, b)
    with pytest.raises(RuntimeError, match="second time"):
        torch.autograd.grad(y, list(inputs.values()))


@pytest.mark.gradients
def test_a_tensor_used_twice_gets_the_sum(target):
    """The result goes in again as the next call's input and residual; one pair of weights serves both."""
    case = Case("twice", 2, 4, 5, 5, 4, padding=1, residual=True, activation="relu")
    inputs = leaves(case.tensors(), torch.float64, target.device)

    def twice(function):
        y = function(**inputs, **case.options)
        y = function(y, inputs["depthwise_weight"], inputs["pointwise_weight"], padding=1, residual=y)
        return torch.autograd.grad(y.square().sum(), list(inputs.values()))

    for ours, eager in zip(twice(separable_conv2d), twice(two_convolutions), strict=True):
        torch.testing.assert_close(ours, eager, rtol=1e-11, atol=1e-11)


# The gradient that arrives


ARRIVALS = {
    "expanded from one number": lambda g: g.new_ones(()).expand(g.shape),
    "expanded over the batch": lambda g: g[:1].expand(g.shape),
    "channels_last": lambda g: g.contiguous(memory_format=torch.channels_last),
    "transposed": lambda g: g.transpose(-1, -2).contiguous().transpose(-1, -2),
    "every other": lambda g: torch.stack([g, torch.full_like(g, float("nan"))], -1)[..., 0],
}


@pytest.mark.gradients
@pytest.mark.cases(both(named("everything", "same, stride 2, even size", "relu thrice", "residual")))
def test_a_gradient_may_arrive_in_any_layout(target, dtype, case):
    inputs = leaves(case.tensors(), dtype, target.device)
    exact = leaves({name: tensor.detach() for name, tensor in inputs.items()}, torch.float64)
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


@pytest.mark.gradients
@pytest.mark.dtypes(torch.float64)
def test_the_residuals_gradient_is_not_the_arriving_tensor_itself(target, dtype):
    """Accumulation in place into one of them must not reach the other."""
    (case,) = named("residual")
    inputs = leaves(case.tensors(), dtype, target.device)
    grad_output = torch.randn(case.output_shape, dtype=dtype, device=target.device)
    before = grad_output.clone()
    for _ in range(2):
        y = separable_conv2d(**inputs, **case.options)
        y.backward(grad_output)
    assert torch.equal(grad_output, before)
    torch.testing.assert_close(inputs["residual"].grad, 2 * before)


@pytest.mark.gradients
@pytest.mark.cases(both(named("728->728@19 reduced", "every dimension: one over", "everything")))
def test_the_same_backward_gives_the_same_bits(target, dtype, case):
    inputs = leaves(case.tensors(), dtype, target.device)
    grad_output = torch.randn(case.output_shape, dtype=torch.float64)
    first, second = (gradients(function_of(case), inputs, case.options, grad_output) for _ in range(2))
    for name, gradient in first.items():
        assert torch.equal(gradient, second[name]), name


@pytest.mark.gradients
@pytest.mark.dtypes(torch.float32)
def test_a_small_network_learns(target, dtype):
    """Two layers, plain gradient descent, a target that another pair of layers drew: the loss falls by far."""

    def layers(seed):
        first = Case("first", 4, 3, 8, 8, 8, padding=1, bias=True).tensors(seed)
        second = Case("second", 4, 8, 8, 8, 2, padding=1, bias=True).tensors(seed + 1)
        return [
            {name: t.to(target.device, dtype).requires_grad_() for name, t in layer.items() if name != "x"}
            for layer in (first, second)
        ]

    def network(x, weights):
        x = separable_conv2d(x, **weights[0], padding=1, activation="elu")
        return separable_conv2d(x, **weights[1], padding=1)

    x = torch.randn(16, 3, 8, 8, device=target.device, dtype=dtype)
    wanted = network(x, layers(100)).detach()
    weights = layers(200)
    optimizer = torch.optim.Adam([tensor for layer in weights for tensor in layer.values()], lr=0.03)
    losses = []
    for _ in range(150):
        optimizer.zero_grad()
        loss = (network(x, weights) - wanted).square().mean()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.1 * losses[0], losses[::30]


# What double backward and saved gradients must not trip over


@pytest.mark.parametrize("dtype", (torch.float16, torch.bfloat16), ids=str)
def test_elus_gradient_stays_right_where_its_output_is_close_to_minus_one(dtype):
    x = (torch.randn(4, 3, 8, 8, generator=torch.Generator().manual_seed(1)) - 5).to(dtype)
    unit = torch.ones(3, 1, 1, 1, dtype=dtype), torch.eye(3, dtype=dtype).view(3, 3, 1, 1)

    def gradient(function, *tensors):
        leaf = tensors[0].clone().requires_grad_()
        function(leaf, *tensors[1:], activation="elu").sum().backward()
        return leaf.grad

    ours = gradient(separable_conv2d, x, *unit)
    eager = gradient(two_convolutions, x, *unit)
    oracle = gradient(two_convolutions, x.double(), *(weight.double() for weight in unit))
    assert_gradient_as_close_as_eager(ours, eager, oracle)


@pytest.mark.cases(both(CASES[:1]))
def test_double_backward_works_under_saved_tensor_hooks(case):
    tensors = {name: tensor.requires_grad_() for name, tensor in case.tensors().items()}

    def penalty(function):
        with torch.autograd.graph.save_on_cpu():
            y = function(**tensors, **case.options)
            (grad,) = torch.autograd.grad(y.square().sum(), tensors["x"], create_graph=True)
            return torch.autograd.grad(grad.square().sum(), list(tensors.values()))

    for ours, right in zip(penalty(function_of(case)), penalty(case.definition), strict=True):
        torch.testing.assert_close(ours, right)


@pytest.mark.cases(both((Case("crop", 2, 4, 5, 5, 5, padding=((1, 2), (1, 2))),)))
def test_the_gradient_of_a_crop_has_memory_of_its_own(case):
    tensors = leaves(case.tensors(), torch.float32)
    crop = torch.randn(2, 4, 9, 9)[:, :, 2:7, 1:6].requires_grad_()
    y = function_of(case)(**{**tensors, "x": crop}, **case.options)
    (grad,) = torch.autograd.grad(y.sum(), crop)
    assert grad.stride() == torch.empty_like(crop).stride()
    assert grad.untyped_storage().nbytes() == grad.numel() * 4
