"""BatchNorm's joins, run on the CPU: right to the bit where numbers are exact, race-free, and no byte written twice."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from fused_sepconv.families import joins
from fused_sepconv.ops.joins import Window, why_not
from tests.support.emulation import in_every_schedule
from tests.support.joins import prepared

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
SIZES = ((2, 8, 9, 7), (1, 40, 6, 10), (3, 264, 3, 3), (1, 8, 21, 38))
WINDOWS = [(padding, ceil_mode) for padding in ((1, 1), (0, 0), (0, 1)) for ceil_mode in (False, True)]


def image(*shape: int, dtype: torch.dtype, seed: int = 0) -> Tensor:
    """Halves, many of them equal: all that is computed of them is exact."""
    x = torch.randint(-6, 7, shape, generator=torch.Generator().manual_seed(seed)) / 2
    return x.to(dtype).contiguous(memory_format=torch.channels_last)


def channels(count: int, seed: int, *values: float) -> Tensor:
    chosen = torch.randint(len(values), (count,), generator=torch.Generator().manual_seed(seed))
    return torch.tensor(values)[chosen]


def scale_and_shift(count: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    return channels(count, seed, 2.0, 1.0, -1.0, 0.0, 0.5), channels(count, seed + 1, 0.0, 1.0, -3.0)


def same_as_pytorch(native, kind: type, x: Tensor, window: Window | None, *tensors: Tensor | None) -> None:
    arguments = (window.padding, window.size) if window else ()
    right = prepared(kind, x, *arguments)(*tensors)
    ours = in_every_schedule(native, lambda: as_tuple(kind(x, *arguments)(*tensors)))
    for mine, wanted in zip(ours, as_tuple(right), strict=True):
        assert mine.dtype == wanted.dtype and torch.equal(mine, wanted)


def as_tuple(result) -> tuple[Tensor, ...]:
    return result if isinstance(result, tuple) else (result,)


@pytest.mark.quick
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SIZES, ids=str)
def test_an_addition(native, shape, dtype):
    x, other = (image(*shape, dtype=dtype, seed=seed) for seed in (0, 1))
    affine, second = scale_and_shift(shape[1]), scale_and_shift(shape[1], 5)
    for rest in ((None, None, None), (other, None, None), (other, *second)):
        same_as_pytorch(native, joins.Add, x, None, x, *affine, *rest)


@pytest.mark.quick
@pytest.mark.parametrize("padding, ceil_mode", WINDOWS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SIZES, ids=str)
def test_a_pooling_and_its_backward(native, shape, dtype, padding, ceil_mode):
    x = image(*shape, dtype=dtype)
    window = Window.of(shape[2:], padding, ceil_mode)
    assert window.pool(x).shape[2:] == window.size
    affine = scale_and_shift(shape[1])
    same_as_pytorch(native, joins.Pool, x, window, x, *affine)
    _, index = joins.Pool(x, *window[:2])(x, *affine)
    grad = image(*index.shape, dtype=dtype, seed=3)
    factor, mean = channels(shape[1], 7, 1.0, -2.0), channels(shape[1], 8, 0.5, 0.0)
    mean_g, slope = channels(shape[1], 9, 0.25, -0.5), channels(shape[1], 10, 0.125, 0.0)
    for rest in ((None, None, None), (mean, mean_g, slope)):
        same_as_pytorch(native, joins.PoolBackward, x, window, grad, index, x, factor, *rest)


def test_nan_and_infinity_are_picked_as_pytorch_picks_them(plain):
    x = image(1, 8, 9, 9, dtype=torch.float32)
    x[0, 0, 3, 3], x[0, 0, 3, 4], x[0, 1, 0, 0], x[0, 2] = torch.nan, torch.nan, torch.inf, -torch.inf
    ones, zeros = torch.ones(8), torch.zeros(8)
    window = Window.of((9, 9), (1, 1), False)
    picked, index = joins.Pool(x, *window[:2])(x, ones, zeros)
    values, flat = F.max_pool2d(x, 3, 2, 1, return_indices=True)
    torch.testing.assert_close(picked, values, rtol=0, atol=0, equal_nan=True)
    rows, columns = (2 * torch.arange(5) - 1).view(-1, 1), 2 * torch.arange(5) - 1
    assert torch.equal((index.long() // 3 + rows) * 9 + index.long() % 3 + columns, flat)


def test_bytes(checked):
    """Each image once, but for pixels that neighbouring windows share: they come from L1 or L2 after the first time."""
    x = image(2, 16, 9, 9, dtype=torch.bfloat16)
    affine, window = scale_and_shift(16), Window.of((9, 9), (0, 0), False)

    def counted(run):
        checked.reset_counters()
        results = run()
        counters = checked.counters()
        read, written = counters["bytes_read"], counters["bytes_written"]
        return results, {name: read.get(name, 0) + written.get(name, 0) for name in {*read, *written}}

    y, moved = counted(lambda: joins.Add(x)(x, *affine, x.clone(), *affine))
    assert moved["x"] == moved["other"] == moved["y"] == x.nbytes
    (picked, index), moved = counted(lambda: joins.Pool(x, *window[:2])(x, *affine))
    assert (moved["picked"], moved["index"], moved["x"]) == (picked.nbytes, index.nbytes, 9 * picked.nbytes)
    run = joins.PoolBackward(x, *window[:2])
    _, moved = counted(lambda: run(picked, index, x, affine[0], *[affine[1]] * 3))
    assert (moved["x"], moved["grad_x"]) == (x.nbytes, x.nbytes)
    assert (moved["grad"], moved["index"]) == (9 * picked.nbytes, 9 * index.nbytes)


@pytest.mark.parametrize("change, reason", [
    (lambda x: x.double(), "float64"),
    (lambda x: x.contiguous(), "NHWC"),
    (lambda x: x[:, :4], "NHWC"),
    (lambda x: x[:, :6].contiguous(memory_format=torch.channels_last), "6 channels"),
])  # fmt: skip
def test_other_images_are_refused_with_the_reason(plain, change, reason):
    x = image(1, 8, 5, 5, dtype=torch.float32)
    assert why_not(x) == "" and reason in why_not(change(x))
