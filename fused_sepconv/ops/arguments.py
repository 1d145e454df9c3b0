"""Checks a call and brings its arguments into one form: the only place where a bad argument is refused.

Every message names the argument, what it got and what was expected. `TypeError`: a wrong Python type or dtype;
`ValueError`: a wrong value, shape or device.
"""

from __future__ import annotations

import operator
from collections.abc import Sequence
from functools import lru_cache
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fused_sepconv.tensors.activations import ACTIVATIONS, NAMES

DTYPES = (torch.float64, torch.float32, torch.float16, torch.bfloat16)
_DTYPE_NAMES = "float64, float32, float16 or bfloat16"

LARGEST = 2**31 - 1
"""The largest integer argument: sizes in pixels are 32 bits wide in the kernels, and far beyond any image."""

_TENSORS = ("x", "depthwise_weight", "pointwise_weight", "bias", "depthwise_bias", "residual")
_DEPTHWISE_TENSORS = ("x", "weight", "bias")
_OPTIONAL = ("bias", "depthwise_bias", "residual")

Pair = tuple[int, int]
Padding = tuple[int, int, int, int]
"""Zeros (or other padding) at the (top, bottom, left, right) of an image, in pixels."""


class Arguments(NamedTuple):
    """The checked non-tensor arguments of `separable_conv2d`, as the op's schema has them."""

    stride: Pair
    padding: Padding
    dilation: Pair
    pre_activation: str | None
    mid_activation: str | None
    activation: str | None


class DepthwiseArguments(NamedTuple):
    """The checked non-tensor arguments of `depthwise_conv2d`, as the op's schema has them."""

    stride: Pair
    padding: Padding
    dilation: Pair
    pre_activation: str | None
    activation: str | None


def hashable(arguments: Sequence[Any]) -> tuple[Any, ...]:
    """An op's arguments with tuples for its lists, which have no hash."""
    return tuple(tuple(value) if isinstance(value, (list, tuple)) else value for value in arguments)


class Call(NamedTuple):
    """A checked call. `tensors` has every tensor that the op takes, None for those not given; x is (N, C, H, W)."""

    tensors: tuple[Tensor | None, ...]
    arguments: Arguments | DepthwiseArguments
    unbatched: bool
    save: bool | None = None
    """`save_intermediate`; None is "auto"."""


class TensorSpec(NamedTuple):
    """What the checks look at in a tensor; hashable, so that the checks of a repeated call are looked up."""

    shape: torch.Size
    dtype: torch.dtype
    device: torch.device
    layout: torch.layout

    @staticmethod
    def of(name: str, tensor: Any) -> TensorSpec:
        if not isinstance(tensor, Tensor):
            raise TypeError(f"{name}: expected a torch.Tensor, got {type(tensor).__name__}")
        if tensor.is_nested:
            raise TypeError(f"{name}: expected an ordinary dense tensor, got a nested tensor")
        return TensorSpec(tensor.shape, tensor.dtype, tensor.device, tensor.layout)


def integer(name: str, value: Any, minimum: int) -> int:
    """`value` as an int that is at least `minimum`; symbolic sizes pass through."""
    if isinstance(value, torch.SymInt):
        return value
    if isinstance(value, (bool, Tensor)):
        raise TypeError(f"{name}: expected an int, got {_describe(value)}")
    try:
        value = operator.index(value)
    except TypeError:
        raise TypeError(f"{name}: expected an int, got {_describe(value)}") from None
    if not minimum <= value <= LARGEST:
        raise ValueError(f"{name}: expected {minimum} to {LARGEST}, got {value}")
    return value


def pair(name: str, value: Any, minimum: int) -> Pair:
    """An int or a (height, width) pair as a pair of ints."""
    if type(value) is int and minimum <= value <= LARGEST:
        return value, value
    if isinstance(value, (tuple, list)):
        if len(value) != 2:
            raise ValueError(f"{name}: expected an int or a (height, width) pair, got {len(value)} values: {value}")
        return integer(name, value[0], minimum), integer(name, value[1], minimum)
    one = integer(name, value, minimum)
    return one, one


def padding_form(padding: Any) -> Padding | str:
    """`padding` as (top, bottom, left, right), or the word "same" or "valid" that waits for the sizes."""
    if isinstance(padding, str):
        if padding not in ("same", "valid"):
            raise ValueError(
                f"padding: expected 'same', 'valid', an int, a pair or ((top, bottom), (left, right)), got {padding!r}"
            )
        return padding
    if isinstance(padding, (tuple, list)) and any(isinstance(side, (tuple, list)) for side in padding):
        if len(padding) != 2 or not all(isinstance(side, (tuple, list)) and len(side) == 2 for side in padding):
            raise ValueError(f"padding: expected ((top, bottom), (left, right)), got {padding}")
        (top, bottom), (left, right) = padding
        top, bottom, left, right = (integer("padding", side, 0) for side in (top, bottom, left, right))
        return top, bottom, left, right
    vertical, horizontal = pair("padding", padding, 0)
    return vertical, vertical, horizontal, horizontal


def padding_sides(padding: Padding | str, size: Pair, kernel: Pair, stride: Pair, dilation: Pair) -> Padding:
    """(top, bottom, left, right) for an input of `size` (H, W).

    "same" is TensorFlow's rule (tf.nn.convolution): out = ceil(in / stride), the total is what makes that come out,
    the smaller half goes before. Where the stride is 1 it equals PyTorch's.
    """
    if not isinstance(padding, str):
        return padding
    if padding == "valid":
        return 0, 0, 0, 0
    top, bottom = _same(size[0], kernel[0], stride[0], dilation[0])
    left, right = _same(size[1], kernel[1], stride[1], dilation[1])
    return top, bottom, left, right


def _same(size: int, kernel: int, stride: int, dilation: int) -> Pair:
    span = dilation * (kernel - 1) + 1
    if stride == 1 or span == 1:
        total = span - 1 if stride == 1 else 0  # no size in it: the same for every size of an export
    else:
        # Written so that an export with free sizes sees out = (in - 1) // stride + 1 = ceil(in / stride), and no guard.
        total = (size - 1) // stride * stride + span - size
        if span < stride:  # sizes are tensors in torch.jit.trace
            total = total.clamp(min=0) if isinstance(total, Tensor) else torch.sym_max(total, 0)
    return total // 2, total - total // 2


def check_activation(name: str, value: Any) -> str | None:
    """`value`, if it is one of the seven activations."""
    if value is not None and not isinstance(value, str):
        raise TypeError(f"{name}: expected one of {NAMES}, got {_describe(value)}")
    if value not in ACTIVATIONS:
        raise ValueError(f"{name}: expected one of {NAMES}, got {value!r}")
    return value


def check_save(value: Any) -> bool | None:
    """`save_intermediate` as the operator takes it: None for "auto"."""
    if value is True or value is False:
        return value
    if isinstance(value, str) and value == "auto":
        return None
    error = ValueError if isinstance(value, str) else TypeError
    raise error(f'save_intermediate: expected "auto", True or False, got {_describe(value)}')


def output_size(size: Pair, kernel: Pair, stride: Pair, padding: Padding, dilation: Pair) -> Pair:
    """(H, W) of the output: floor((in + before + after - dilation * (kernel - 1) - 1) / stride) + 1."""
    top, bottom, left, right = padding
    return (
        (size[0] + top + bottom - dilation[0] * (kernel[0] - 1) - 1) // stride[0] + 1,
        (size[1] + left + right - dilation[1] * (kernel[1] - 1) - 1) // stride[1] + 1,
    )


def normalise(
    x: Tensor,
    depthwise_weight: Tensor,
    pointwise_weight: Tensor,
    bias: Tensor | None = None,
    stride: Any = 1,
    padding: Any = 0,
    dilation: Any = 1,
    *,
    depthwise_bias: Tensor | None = None,
    residual: Tensor | None = None,
    pre_activation: str | None = None,
    mid_activation: str | None = None,
    activation: str | None = None,
    save_intermediate: Any = "auto",
) -> Call:
    """The arguments of `separable_conv2d` as a checked call, cast to autocast's dtype where autocast is on.

    The casts come before the op, where autograd sees them: an autocast rule registered on the op would leave its
    backward without them.
    """
    save = check_save(save_intermediate)
    unbatched = _is_dense(x) and x.dim() == 3
    if unbatched:
        x = x.unsqueeze(0)
        residual = residual.unsqueeze(0) if _is_dense(residual) else residual
    tensors = _as_autocast_reads(x, depthwise_weight, pointwise_weight, bias, depthwise_bias, residual)
    specs = _specs(_TENSORS, tensors)
    options = (
        pair("stride", stride, 1),
        padding_form(padding),
        pair("dilation", dilation, 1),
        check_activation("pre_activation", pre_activation),
        check_activation("mid_activation", mid_activation),
        check_activation("activation", activation),
    )
    arguments = (check if _is_traced(specs) else check_cached)(*specs, *options)
    return Call(tensors, arguments, unbatched, save)


def normalise_depthwise(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: Any = 1,
    padding: Any = 0,
    dilation: Any = 1,
    *,
    pre_activation: str | None = None,
    activation: str | None = None,
) -> Call:
    """`normalise`, for `depthwise_conv2d`."""
    unbatched = _is_dense(x) and x.dim() == 3
    tensors = _as_autocast_reads(x.unsqueeze(0) if unbatched else x, weight, bias)
    specs = _specs(_DEPTHWISE_TENSORS, tensors)
    options = (
        pair("stride", stride, 1),
        padding_form(padding),
        pair("dilation", dilation, 1),
        check_activation("pre_activation", pre_activation),
        check_activation("activation", activation),
    )
    arguments = (check_depthwise if _is_traced(specs) else check_depthwise_cached)(*specs, *options)
    return Call(tensors, arguments, unbatched)


def _is_dense(tensor: Any) -> bool:
    return isinstance(tensor, Tensor) and not tensor.is_nested and tensor.layout is torch.strided


def _is_traced(specs: tuple[TensorSpec | None, ...]) -> bool:
    """Whether checks can't be looked up: while tracing, shapes may be symbolic, and have no hash."""
    if torch.compiler.is_compiling():
        return True
    try:
        hash(specs)
    except TypeError:
        return True
    return False


def autocasts(device_type: str) -> bool:
    """Whether autocast is on for a device."""
    # is_autocast_enabled refuses devices that autocast does not know. Dynamo before 2.13 can't trace
    # is_autocast_available; of those devices it compiles for meta alone.
    known = device_type != "meta" if torch.compiler.is_compiling() else torch.amp.is_autocast_available(device_type)
    return known and torch.is_autocast_enabled(device_type)


def _as_autocast_reads(x: Any, *others: Any) -> tuple[Any, ...]:
    """A call's tensors, cast where autocast is on for x's device."""
    tensors = (x, *others)
    if isinstance(x, Tensor) and autocasts(x.device.type):
        return tuple(_autocast(tensor, x.device.type) for tensor in tensors)
    return tensors


def _autocast(tensor: Any, device_type: str) -> Any:
    """`tensor` as a convolution under autocast would read it: float64 and what is not floating point stay."""
    if not isinstance(tensor, Tensor) or not tensor.is_floating_point() or tensor.dtype == torch.float64:
        return tensor
    return tensor.to(torch.get_autocast_dtype(device_type))


def check(
    x: TensorSpec,
    depthwise_weight: TensorSpec,
    pointwise_weight: TensorSpec,
    bias: TensorSpec | None,
    depthwise_bias: TensorSpec | None,
    residual: TensorSpec | None,
    stride: Pair,
    padding: Padding | str,
    dilation: Pair,
    pre_activation: str | None,
    mid_activation: str | None,
    activation: str | None,
) -> Arguments:
    """Refuses a bad call of `separable_conv2d`, or gives its arguments in the op's form. x is batched: (N, C, H, W)."""
    specs = (x, depthwise_weight, pointwise_weight, bias, depthwise_bias, residual)
    _check_kinds(_TENSORS, specs)
    sides, (batch, intermediate, out_h, out_w) = _check_depthwise(
        "depthwise_weight", x, depthwise_weight, stride, padding, dilation
    )
    if len(pointwise_weight.shape) != 4 or tuple(pointwise_weight.shape[1:]) != (intermediate, 1, 1):
        raise ValueError(
            f"pointwise_weight: expected (F, {intermediate}, 1, 1) after depthwise_weight {_shape(depthwise_weight)}, "
            f"got {_shape(pointwise_weight)}"
        )
    features = pointwise_weight.shape[0]
    if features < 1:
        raise ValueError(f"pointwise_weight: expected at least one output channel, got {_shape(pointwise_weight)}")
    _check_vector("bias", bias, features, "F, pointwise_weight's dimension 0")
    _check_vector("depthwise_bias", depthwise_bias, intermediate, "C * m, depthwise_weight's dimension 0")
    expected = (batch, features, out_h, out_w)
    if residual is not None and tuple(residual.shape) != expected:
        raise ValueError(f"residual: expected the output's shape {expected}, got {_shape(residual)}")
    return Arguments(stride, sides, dilation, pre_activation, mid_activation, activation)


def check_depthwise(
    x: TensorSpec,
    weight: TensorSpec,
    bias: TensorSpec | None,
    stride: Pair,
    padding: Padding | str,
    dilation: Pair,
    pre_activation: str | None,
    activation: str | None,
) -> DepthwiseArguments:
    """`check`, for `depthwise_conv2d`."""
    _check_kinds(_DEPTHWISE_TENSORS, (x, weight, bias))
    sides, (_, channels, _, _) = _check_depthwise("weight", x, weight, stride, padding, dilation)
    _check_vector("bias", bias, channels, "C * m, weight's dimension 0")
    return DepthwiseArguments(stride, sides, dilation, pre_activation, activation)


check_cached = lru_cache(maxsize=4096)(check)
check_depthwise_cached = lru_cache(maxsize=4096)(check_depthwise)
"""The checks for an eager call: what the shapes of a call decide is looked up the next time (3 us against 20)."""


def check_tensors(tensors: tuple[Any, ...], arguments: tuple) -> None:
    """Refuses a direct call of the operator with tensors that are not right; x is batched."""
    check(*_specs(_TENSORS, tensors), *arguments)


def check_depthwise_tensors(tensors: tuple[Any, ...], arguments: tuple) -> None:
    """`check_tensors`, for the depthwise operator."""
    check_depthwise(*_specs(_DEPTHWISE_TENSORS, tensors), *arguments)


def _specs(names: tuple[str, ...], tensors: tuple[Any, ...]) -> tuple[TensorSpec | None, ...]:
    """A spec for each tensor; only biases and the residual may be None."""
    return tuple(
        None if tensor is None and name in _OPTIONAL else TensorSpec.of(name, tensor)
        for name, tensor in zip(names, tensors, strict=True)
    )


def _check_kinds(names: tuple[str, ...], tensors: tuple[TensorSpec | None, ...]) -> None:
    """Refuses tensors that no kernel reads, or that are not of x's dtype and device."""
    x = tensors[0]
    for name, tensor in zip(names, tensors, strict=True):
        if tensor is None:
            continue
        if tensor.layout is not torch.strided:
            raise TypeError(f"{name}: expected an ordinary dense tensor, got layout {tensor.layout}")
        if tensor.dtype not in DTYPES:
            raise TypeError(f"{name}: expected {_DTYPE_NAMES}, got {tensor.dtype}")
        if tensor.dtype != x.dtype:
            raise TypeError(f"{name}: expected x's dtype {x.dtype}, got {tensor.dtype}")
        if tensor.device != x.device:
            raise ValueError(f"{name}: expected x's device {x.device}, got {tensor.device}")


def _check_depthwise(
    name: str, x: TensorSpec, weight: TensorSpec, stride: Pair, padding: Padding | str, dilation: Pair
) -> tuple[Padding, tuple[int, int, int, int]]:
    """Refuses what is no depthwise convolution of x with the weight `name`.

    Gives the four sides of its padding and the shape of its result, (N, C * m, out_h, out_w).
    """
    if len(x.shape) != 4:
        raise ValueError(f"x: expected (N, C, H, W) or (C, H, W), got {len(x.shape)} dimensions: {_shape(x)}")
    batch, channels, height, width = x.shape
    if channels < 1 or height < 1 or width < 1:
        raise ValueError(f"x: expected at least one channel, row and column, got {_shape(x)}")
    if len(weight.shape) != 4 or weight.shape[1] != 1:
        raise ValueError(f"{name}: expected (C * m, 1, kh, kw) for x with C = {channels}, got {_shape(weight)}")
    intermediate, _, *kernel = weight.shape
    if intermediate < 1 or intermediate % channels != 0:
        raise ValueError(f"{name}: expected a multiple of x's {channels} channels in dimension 0, got {_shape(weight)}")
    if kernel[0] < 1 or kernel[1] < 1:
        raise ValueError(f"{name}: expected a kernel of at least 1 x 1, got {_shape(weight)}")
    sides = padding_sides(padding, (height, width), kernel, stride, dilation)
    out_h, out_w = output_size((height, width), kernel, stride, sides, dilation)
    if padding != "same" and (out_h < 1 or out_w < 1):
        raise ValueError(
            f"x: the kernel of {name}, {kernel[0]} x {kernel[1]} with dilation {dilation}, is larger than the "
            f"image {height} x {width} with padding (top, bottom, left, right) = {sides}: the output would be empty"
        )
    return sides, (batch, intermediate, out_h, out_w)


def _check_vector(name: str, tensor: TensorSpec | None, length: int, meaning: str) -> None:
    if tensor is not None and tuple(tensor.shape) != (length,):
        raise ValueError(f"{name}: expected shape ({length},) ({meaning}), got {_shape(tensor)}")


def _shape(tensor: TensorSpec) -> str:
    return str(tuple(tensor.shape))


def _describe(value: Any) -> str:
    return f"{type(value).__name__} {value!r}"[:80]
