"""How close is close enough: no further from the truth than PyTorch's own result, within a factor of two.

Fixed tolerances are either too wide for one shape or too narrow for another. Here the oracle (float64) says what is
true, and the eager result in the dtype under test says how far an honest computation in that dtype strays from it.
Ours may stray ``FACTOR`` times as far, plus the noise that rounding the result to its dtype costs anyway; a little more
where there are only a few elements to judge by.
"""

from __future__ import annotations

import math
from collections.abc import Iterable

import torch
from torch import Tensor

FACTOR = 2.0

# A float64 oracle strays as far as a float64 result. Sums of 10⁴ products of ordinary size keep well within this.
ORACLE_NOISE = 1e-12


def luck(count: int) -> float:
    """How much further than eager an equally good result may seem to stray, if ``count`` elements are all one sees.

    The size of random errors is known from n samples to a part in sqrt(2 n); three times that for each of the two is
    no accident. It is 1.03 for 10,000 elements, where a factor of two means two, and 1.75 for 16.
    """
    return 1 + 3 / math.sqrt(max(count, 1))


def rounding_noise(dtype: torch.dtype, count: int) -> float:
    """The relative error that rounding to ``dtype`` may cost: half a unit in the last place."""
    return max(torch.finfo(dtype).eps / 2 * luck(count), ORACLE_NOISE)


def _comparable(ours: Tensor, eager: Tensor, oracle: Tensor, name: str) -> tuple[Tensor, Tensor, Tensor] | None:
    """The three as float64 vectors on the CPU, after everything but the values has been checked."""
    for what, tensor in (("ours", ours), ("eager", eager), ("oracle", oracle)):
        assert isinstance(tensor, Tensor), f"{name}: {what} is {type(tensor).__name__}, not a tensor"
    assert oracle.dtype == torch.float64, f"{name}: the oracle must be float64, not {oracle.dtype}"
    assert eager.shape == oracle.shape, f"{name}: eager and oracle disagree: {eager.shape} and {oracle.shape}"
    assert ours.shape == oracle.shape, f"{name}: shape {tuple(ours.shape)}, expected {tuple(oracle.shape)}"
    assert ours.dtype == eager.dtype, f"{name}: dtype {ours.dtype}, expected {eager.dtype}"
    assert ours.device.type == eager.device.type, f"{name}: on {ours.device}, expected {eager.device}"

    a, b, truth = (tensor.detach().to("cpu", torch.float64).reshape(-1) for tensor in (ours, eager, oracle))
    for what, holds in (("NaN", torch.isnan), ("inf", torch.isposinf), ("-inf", torch.isneginf)):
        expected = holds(truth.to(eager.dtype))
        wrong = holds(a) != expected
        assert not wrong.any(), f"{name}: {what} in {int(wrong.sum())} places where it should not be, or missing there"
    finite = torch.isfinite(truth.to(eager.dtype)) & torch.isfinite(b)
    return (a[finite], b[finite], truth[finite]) if finite.any() else None


def _check(name: str, measure: str, ours: float, eager: float, allowed: float) -> None:
    assert ours <= allowed, f"{name}: {measure} {ours:.3e}, where eager has {eager:.3e} and {allowed:.3e} is allowed"


def assert_as_close_as_eager(
    ours: Tensor, eager: Tensor, oracle: Tensor, *, name: str = "result", factor: float = FACTOR
) -> None:
    """Ours is a tensor like eager's, and about as close to the oracle: in L2 (relative), and in its worst element."""
    vectors = _comparable(ours, eager, oracle, name)
    if vectors is None:
        return
    a, b, truth = vectors
    noise = rounding_noise(ours.dtype, truth.numel())
    factor = factor * luck(truth.numel())

    norm = float(truth.norm())
    error, eager_error = float((a - truth).norm()), float((b - truth).norm())
    scale = norm if norm > 0 else 1.0
    _check(name, "relative L2 error", error / scale, eager_error / scale, (factor * eager_error + noise * norm) / scale)

    worst, eager_worst = float((a - truth).abs().max()), float((b - truth).abs().max())
    _check(name, "worst error", worst, eager_worst, factor * eager_worst + noise * float(truth.abs().max()))


def assert_gradient_as_close_as_eager(
    ours: Tensor, eager: Tensor, oracle: Tensor, *, name: str = "gradient", factor: float = FACTOR
) -> None:
    """As above, and no more one-sided: it points where the oracle points, and is neither systematically too large or
    too small (a gain) nor shifted (an offset). Training forgives noise; it does not forgive bias."""
    assert_as_close_as_eager(ours, eager, oracle, name=name, factor=factor)
    vectors = _comparable(ours, eager, oracle, name)
    if vectors is None or not vectors[2].any():
        return
    a, b, truth = vectors
    count = truth.numel()
    noise = rounding_noise(ours.dtype, count)
    norm = float(truth.norm())
    factor = factor * luck(count)
    reach = factor * float((b - truth).norm()) / norm + noise

    def off_course(v: Tensor) -> float:
        return 1.0 - float(v @ truth) / (float(v.norm()) * norm) if v.any() else 1.0

    _check(name, "1 - cosine", off_course(a), off_course(b), reach**2 + 1e-15 * math.sqrt(count))

    # Independent errors of relative size e leave e / sqrt(count) in their mean; five times that is no accident. The
    # quarter of a unit's half is for errors that are not quite independent; cutting off instead of rounding costs more.
    accident = 5 * reach / math.sqrt(count) + noise / 4
    gain, eager_gain = (abs(float((v - truth) @ truth)) / norm**2 for v in (a, b))
    _check(name, "gain", gain, eager_gain, factor * eager_gain + accident)
    spread = norm / math.sqrt(count)
    offset, eager_offset = (abs(float((v - truth).mean())) / spread for v in (a, b))
    _check(name, "offset", offset, eager_offset, factor * eager_offset + accident)


def close(actual: Tensor | Iterable[Tensor], expected: Tensor | Iterable[Tensor], tolerance: float = 1e-10) -> None:
    """The same but for rounding, in float64: two tensors, or as many of them on either side."""
    pairs = [(actual, expected)] if isinstance(expected, Tensor) else zip(actual, expected, strict=True)
    for ours, theirs in pairs:
        torch.testing.assert_close(ours, theirs, rtol=tolerance, atol=tolerance)
