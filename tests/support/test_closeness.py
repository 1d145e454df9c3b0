"""The yardstick itself: it lets honest results pass, and catches each way of being wrong."""

import pytest
import torch
from torch import Tensor

from tests.support.closeness import assert_as_close_as_eager, assert_gradient_as_close_as_eager

pytestmark = pytest.mark.quick

DTYPES = (torch.float64, torch.float32, torch.float16, torch.bfloat16)
CHECKS = (assert_as_close_as_eager, assert_gradient_as_close_as_eager)

dtypes = pytest.mark.parametrize("dtype", DTYPES, ids=str)
checks = pytest.mark.parametrize("check", CHECKS, ids=("result", "gradient"))


def truth_and_eager(dtype: torch.dtype, count: int = 4000, seed: int = 0) -> tuple[Tensor, Tensor]:
    """A float64 truth, and a result whose errors are of the size of a few roundings in ``dtype``."""
    generator = torch.Generator().manual_seed(seed)
    truth = torch.randn(count // 10, 10, generator=generator, dtype=torch.float64)
    errors = torch.randn(truth.shape, generator=generator, dtype=torch.float64) * torch.finfo(dtype).eps
    return truth, (truth * (1 + errors)).to(dtype)


@checks
@dtypes
def test_eager_itself_passes(check, dtype):
    truth, eager = truth_and_eager(dtype)
    check(eager, eager, truth)


@checks
@dtypes
def test_the_truth_rounded_passes(check, dtype):
    truth, eager = truth_and_eager(dtype)
    check(truth.to(dtype), eager, truth)


@checks
@dtypes
def test_the_truth_rounded_passes_when_eager_is_just_that(check, dtype):
    truth, _ = truth_and_eager(dtype)
    check(truth.to(dtype), truth.to(dtype), truth)


@checks
@dtypes
def test_other_errors_of_the_same_size_pass(check, dtype):
    truth, eager = truth_and_eager(dtype)
    errors = torch.randn(truth.shape, generator=torch.Generator().manual_seed(9), dtype=torch.float64)
    check((truth * (1 + errors * torch.finfo(dtype).eps)).to(dtype), eager, truth)


@checks
@dtypes
def test_errors_four_times_as_large_fail(check, dtype):
    generator = torch.Generator().manual_seed(3)
    truth = torch.randn(400, 10, generator=generator, dtype=torch.float64)
    unit = max(torch.finfo(dtype).eps, 1e-12)
    errors = torch.randn(truth.shape, generator=generator, dtype=torch.float64)
    eager, ours = (truth + errors * unit * n for n in (2, 8))
    with pytest.raises(AssertionError, match="error"):
        check(ours.to(dtype), eager.to(dtype), truth)


@checks
@dtypes
def test_a_shift_fails(check, dtype):
    truth, eager = truth_and_eager(dtype)
    shift = 100 * max(torch.finfo(dtype).eps, 1e-12)
    with pytest.raises(AssertionError):
        check((truth + shift).to(dtype), eager, truth)


@checks
@dtypes
def test_a_scale_fails(check, dtype):
    truth, eager = truth_and_eager(dtype)
    scale = 1 + 100 * max(torch.finfo(dtype).eps, 1e-12)
    with pytest.raises(AssertionError):
        check((truth * scale).to(dtype), eager, truth)


@checks
@dtypes
def test_one_wrong_element_fails(check, dtype):
    truth, eager = truth_and_eager(dtype)
    ours = eager.clone()
    ours[123, 4] += 0.25
    with pytest.raises(AssertionError, match="error"):
        check(ours, eager, truth)


@checks
@dtypes
def test_one_element_left_out_fails(check, dtype):
    truth, eager = truth_and_eager(dtype)
    truth[123, 4] = 1.0
    eager[123, 4] = 1.0
    ours = eager.clone()
    ours[123, 4] = 0.0
    with pytest.raises(AssertionError, match="error"):
        check(ours, eager, truth)


@checks
@dtypes
def test_two_elements_exchanged_fail(check, dtype):
    truth, eager = truth_and_eager(dtype)
    with pytest.raises(AssertionError, match="error"):
        check(eager.flip(0), eager, truth)


@checks
@dtypes
@pytest.mark.parametrize("value", (float("nan"), float("inf"), float("-inf")))
def test_one_element_that_is_not_finite_fails(check, dtype, value):
    truth, eager = truth_and_eager(dtype)
    ours = eager.clone()
    ours[0, 0] = value
    with pytest.raises(AssertionError, match=str(value).removeprefix("-").replace("nan", "NaN")):
        check(ours, eager, truth)


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
def test_zeros_fail(check):
    truth, eager = truth_and_eager(torch.float32)
    with pytest.raises(AssertionError):
        check(torch.zeros_like(eager), eager, truth)


@checks
def test_anything_but_zero_fails_where_the_truth_is_zero(check):
    truth = torch.zeros(10, 10, dtype=torch.float64)
    check(truth.float(), truth.float(), truth)
    with pytest.raises(AssertionError):
        check(truth.float() + 1e-6, truth.float(), truth)


@checks
def test_a_wrong_shape_fails(check):
    truth, eager = truth_and_eager(torch.float32)
    for ours in (eager.t(), eager[:-1], eager[None], eager[:1]):
        with pytest.raises(AssertionError, match="shape"):
            check(ours, eager, truth)


@checks
def test_a_wrong_dtype_fails(check):
    truth, eager = truth_and_eager(torch.bfloat16)
    with pytest.raises(AssertionError, match="dtype"):
        check(truth.float(), eager, truth)


@checks
def test_a_wrong_device_fails(check):
    truth, eager = truth_and_eager(torch.float32)
    with pytest.raises(AssertionError, match="meta"):
        check(eager.to("meta"), eager, truth)


@checks
def test_a_missing_result_fails(check):
    truth, eager = truth_and_eager(torch.float32)
    with pytest.raises(AssertionError, match="NoneType"):
        check(None, eager, truth)


@checks
def test_an_oracle_that_is_no_better_than_the_result_is_refused(check):
    truth, eager = truth_and_eager(torch.float32)
    with pytest.raises(AssertionError, match="float64"):
        check(eager, eager, truth.float())


@checks
def test_nothing_at_all_passes_where_nothing_is_expected(check):
    nothing = torch.empty(0, 3)
    check(nothing, nothing, nothing.double())
    with pytest.raises(AssertionError, match="shape"):
        check(torch.empty(3, 0), nothing, nothing.double())


def cut_off(truth: Tensor, dtype: torch.dtype) -> Tensor:
    """Rounded towards zero, as a conversion that drops the low bits does."""
    nearest = truth.to(dtype)
    too_far = nearest.double().abs() > truth.abs()
    return torch.where(too_far, torch.nextafter(nearest, torch.zeros_like(nearest)), nearest)


@pytest.mark.parametrize("dtype", (torch.float16, torch.bfloat16), ids=str)
def test_a_gradient_cut_off_instead_of_rounded_fails_though_its_errors_are_small(dtype):
    truth, _ = truth_and_eager(dtype, count=40_000)
    generator = torch.Generator().manual_seed(4)
    noise = torch.randn(truth.shape, generator=generator, dtype=torch.float64) * torch.finfo(dtype).eps / 2
    eager, ours = (truth * (1 + noise)).to(dtype), cut_off(truth, dtype)
    assert_as_close_as_eager(ours, eager, truth)
    with pytest.raises(AssertionError, match="gain"):
        assert_gradient_as_close_as_eager(ours, eager, truth)


def test_a_gradient_with_a_small_offset_everywhere_fails_though_its_errors_are_small():
    truth, eager = truth_and_eager(torch.float32, count=40_000)
    ours = (truth + 0.9 * torch.finfo(torch.float32).eps).float()
    assert_as_close_as_eager(ours, eager, truth)
    with pytest.raises(AssertionError, match="offset"):
        assert_gradient_as_close_as_eager(ours, eager, truth)


def test_the_message_says_what_was_compared_and_by_how_much_it_failed():
    truth, eager = truth_and_eager(torch.float32)
    with pytest.raises(AssertionError, match=r"gradient of bias: relative L2 error 1\.\d+e\+00, where eager has"):
        assert_gradient_as_close_as_eager(-eager * 0.5, eager, truth, name="gradient of bias")
