"""The yardstick itself: it lets honest results pass, and catches each way of being wrong."""

import pytest
import torch
from torch import Tensor

from tests.support.closeness import assert_as_close_as_eager, assert_gradient_as_close_as_eager

pytestmark = pytest.mark.quick

CHECKS = (assert_as_close_as_eager, assert_gradient_as_close_as_eager)
checks = pytest.mark.parametrize("check", CHECKS, ids=("result", "gradient"))
dtypes = pytest.mark.parametrize("dtype", (torch.float64, torch.float32, torch.float16, torch.bfloat16), ids=str)


def noise(shape, seed: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def truth_and_eager(dtype: torch.dtype, count: int = 4000) -> tuple[Tensor, Tensor]:
    """A float64 truth, and a result whose errors are of the size of a few roundings in ``dtype``."""
    truth = noise((count // 10, 10), 0)
    return truth, (truth * (1 + noise(truth.shape, 1) * torch.finfo(dtype).eps)).to(dtype)


def unit(dtype: torch.dtype) -> float:
    return max(torch.finfo(dtype).eps, 1e-12)


def changed(tensor: Tensor, value: float) -> Tensor:
    tensor = tensor.clone()
    tensor[123, 4] = value
    return tensor


# From the truth and eager's result: ours, and what eager has in its stead.
PASSES = {
    "eager itself": lambda truth, eager: (eager, eager),
    "the truth rounded": lambda truth, eager: (truth.to(eager.dtype), eager),
    "the truth rounded, as eager": lambda truth, eager: (truth.to(eager.dtype), truth.to(eager.dtype)),
    "other errors of the same size": lambda truth, eager: (
        (truth * (1 + noise(truth.shape, 9) * torch.finfo(eager.dtype).eps)).to(eager.dtype),
        eager,
    ),
}
FAILS = {
    "errors four times as large": (
        lambda truth, eager: tuple(
            (truth + noise(truth.shape, 3) * unit(eager.dtype) * n).to(eager.dtype) for n in (8, 2)
        ),
        "error",
    ),
    "a shift": (lambda truth, eager: ((truth + 100 * unit(eager.dtype)).to(eager.dtype), eager), None),
    "a scale": (lambda truth, eager: ((truth * (1 + 100 * unit(eager.dtype))).to(eager.dtype), eager), None),
    "one wrong element": (lambda truth, eager: (changed(eager, float(eager[123, 4]) + 0.25), eager), "error"),
    "one element left out": (lambda truth, eager: (changed(eager, 0.0), eager), "error"),
    "elements exchanged": (lambda truth, eager: (eager.flip(0), eager), "error"),
    "NaN": (lambda truth, eager: (changed(eager, float("nan")), eager), "NaN"),
    "inf": (lambda truth, eager: (changed(eager, float("inf")), eager), "inf"),
    "-inf": (lambda truth, eager: (changed(eager, float("-inf")), eager), "-inf"),
    "zeros": (lambda truth, eager: (torch.zeros_like(eager), eager), None),
    "transposed": (lambda truth, eager: (eager.t(), eager), "shape"),
    "too few": (lambda truth, eager: (eager[:-1], eager), "shape"),
    "one dimension more": (lambda truth, eager: (eager[None], eager), "shape"),
    "broadcast": (lambda truth, eager: (eager[:1], eager), "shape"),
    "on another device": (lambda truth, eager: (eager.to("meta"), eager), "meta"),
    "missing": (lambda truth, eager: (None, eager), "NoneType"),
}


@checks
@dtypes
def test_honest_results_pass_and_no_others(check, dtype):
    truth, eager = truth_and_eager(dtype)
    for make in PASSES.values():
        check(*make(truth, eager), truth)
    for name, (make, message) in FAILS.items():
        ours, theirs = make(truth, changed(eager, 1.0) if name == "one element left out" else eager)
        with pytest.raises(AssertionError, match=message):
            check(ours, theirs, changed(truth, 1.0) if name == "one element left out" else truth)


@checks
def test_what_the_truth_has_of_nan_and_inf_must_be_there(check):
    truth, eager = truth_and_eager(torch.float32)
    for element, value in enumerate((float("nan"), float("inf"), float("-inf"))):
        truth[element, 0] = eager[element, 0] = value
    check(eager, eager, truth)
    for element in range(3):
        ours = eager.clone()
        ours[element, 0] = 0.0
        with pytest.raises(AssertionError, match="missing"):
            check(ours, eager, truth)


@checks
def test_a_truth_of_zeros_or_of_nothing_and_one_that_is_no_better(check):
    zeros, nothing = torch.zeros(10, 10, dtype=torch.float64), torch.empty(0, 3)
    check(zeros.float(), zeros.float(), zeros)
    check(nothing, nothing, nothing.double())
    truth, eager = truth_and_eager(torch.bfloat16)
    for ours, theirs, oracle, message in (
        (zeros.float() + 1e-6, zeros.float(), zeros, None),
        (torch.empty(3, 0), nothing, nothing.double(), "shape"),
        (truth.float(), eager, truth, "dtype"),
        (eager, eager, truth.float(), "float64"),
    ):
        with pytest.raises(AssertionError, match=message):
            check(ours, theirs, oracle)


def cut_off(truth: Tensor, dtype: torch.dtype) -> Tensor:
    """Rounded towards zero, as a conversion that drops the low bits does."""
    nearest = truth.to(dtype)
    too_far = nearest.double().abs() > truth.abs()
    return torch.where(too_far, torch.nextafter(nearest, torch.zeros_like(nearest)), nearest)


def test_a_gradient_that_is_one_sided_fails_though_its_errors_are_small():
    for dtype in (torch.float16, torch.bfloat16):
        truth, _ = truth_and_eager(dtype, count=40_000)
        eager = (truth * (1 + noise(truth.shape, 4) * torch.finfo(dtype).eps / 2)).to(dtype)
        assert_as_close_as_eager(cut_off(truth, dtype), eager, truth)
        with pytest.raises(AssertionError, match="gain"):
            assert_gradient_as_close_as_eager(cut_off(truth, dtype), eager, truth)
    truth, eager = truth_and_eager(torch.float32, count=40_000)
    ours = (truth + 0.9 * torch.finfo(torch.float32).eps).float()
    assert_as_close_as_eager(ours, eager, truth)
    with pytest.raises(AssertionError, match="offset"):
        assert_gradient_as_close_as_eager(ours, eager, truth)


def test_the_message_says_what_was_compared_and_by_how_much_it_failed():
    truth, eager = truth_and_eager(torch.float32)
    with pytest.raises(AssertionError, match=r"gradient of bias: relative L2 error 1\.\d+e\+00, where eager has"):
        assert_gradient_as_close_as_eager(-eager * 0.5, eager, truth, name="gradient of bias")
