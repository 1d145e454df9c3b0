"""Runs a checked call on the kernel that its plan chooses; with `_native.py`, all that talks to the native module."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from . import _native
from .activations import ACTIVATIONS
from .arguments import Arguments, DepthwiseArguments, TensorSpec, check_cached, output_size
from .devices import DEVICES, Device, cuda_device
from .memory_format import empty_output, memory_format_of
from .plan import INSTANCES, Plan, plan
from .problem import Candidate, Kernels, Problem, Splits

Tensors = tuple[Tensor, Tensor, Tensor, Tensor | None, Tensor | None, Tensor | None]
"""x, depthwise_weight, pointwise_weight, bias, depthwise_bias, residual."""

DepthwiseTensors = tuple[Tensor, Tensor, Tensor | None]
"""x, weight, bias."""

ALL_KERNELS = Kernels(frozenset(INSTANCES))
"""What a complete build has; predictions for a device that is not here assume it."""


def forward(tensors: Tensors, arguments: Arguments, backend: str) -> Tensor | None:
    """The output, or None where the plan chooses PyTorch's own convolutions."""
    _check(tensors, arguments)
    problem = problem_of("forward", tensors, arguments)
    candidate = plan_for(problem, tensors[0].device).choose(backend)
    if candidate.family == "reference":
        return None
    with _current(tensors[0].device):
        return _launch_forward(candidate, problem, tensors)


def backward(
    grad_output: Tensor,
    tensors: Tensors,
    output: Tensor | None,
    arguments: Arguments,
    backend: str,
    output_mask: tuple[bool, ...],
) -> tuple[Tensor | None, ...] | None:
    """The six gradients, None where not asked for; None instead where the plan chooses PyTorch's own convolutions."""
    _check(tensors, arguments)
    problem = problem_of("backward", tensors, arguments)
    _check_like("grad_output", grad_output, tensors[0], problem)
    candidate = plan_for(problem, tensors[0].device).choose(backend)
    if candidate.family == "reference":
        return None
    if output is not None:
        _check_like("output", output, tensors[0], problem)
    with _current(tensors[0].device):
        return _launch_backward(candidate, problem, grad_output, tensors, output, output_mask)


def depthwise_forward(tensors: DepthwiseTensors, arguments: DepthwiseArguments, backend: str) -> Tensor | None:
    """`forward`, of a depthwise convolution alone."""
    return None


def depthwise_backward(
    grad_output: Tensor,
    tensors: DepthwiseTensors,
    output: Tensor | None,
    arguments: DepthwiseArguments,
    backend: str,
    output_mask: tuple[bool, ...],
) -> tuple[Tensor | None, ...] | None:
    """`backward`, of a depthwise convolution alone: the gradients of x, weight and bias."""
    return None


def _check(tensors: Tensors, arguments: Arguments) -> None:
    """Refuses what a kernel must not see: the op may be called directly, with anything."""
    names = ("x", "depthwise_weight", "pointwise_weight", "bias", "depthwise_bias", "residual")
    specs = (
        None if tensor is None else TensorSpec.of(name, tensor) for name, tensor in zip(names, tensors, strict=True)
    )
    check_cached(*specs, *arguments)


def _check_like(name: str, tensor: Tensor, x: Tensor, problem: Problem) -> None:
    shape = (problem.N, problem.F, problem.out_h, problem.out_w)
    if tuple(tensor.shape) != shape:
        raise ValueError(f"{name}: expected the output's shape {shape}, got {tuple(tensor.shape)}")
    if tensor.dtype != x.dtype:
        raise TypeError(f"{name}: expected x's dtype {x.dtype}, got {tensor.dtype}")
    if tensor.device != x.device:
        raise ValueError(f"{name}: expected x's device {x.device}, got {tensor.device}")


def problem_of(direction: str, tensors: Tensors, arguments: Arguments) -> Problem:
    """The problem that a checked call is."""
    x, depthwise_weight, pointwise_weight, _, _, residual = tensors
    n, channels, height, width = x.shape
    kernel = tuple(depthwise_weight.shape[2:])
    out_h, out_w = output_size((height, width), kernel, arguments.stride, arguments.padding, arguments.dilation)
    return Problem(
        direction=direction,
        N=n,
        C=channels,
        H=height,
        W=width,
        F=pointwise_weight.shape[0],
        multiplier=depthwise_weight.shape[0] // channels,
        kernel=kernel,
        stride=arguments.stride,
        padding=arguments.padding,
        dilation=arguments.dilation,
        out_h=out_h,
        out_w=out_w,
        dtype=str(x.dtype).removeprefix("torch."),
        layout="nhwc" if memory_format_of(x) == torch.channels_last else "nchw",
        pre_activation=arguments.pre_activation,
        mid_activation=arguments.mid_activation,
        activation=arguments.activation,
        residual=residual is not None,
        tf32=_tf32(),
    )


def plan_for(problem: Problem, device: torch.device) -> Plan:
    """The plan of a problem where its tensors are."""
    return plan(problem, *_here(device.type, device.index))


def _here(device_type: str, index: int | None) -> tuple[Device, Kernels]:
    """A device's ceilings, and the kernels that can run on its tensors."""
    if device_type == "cuda" and torch.version.hip is None:
        index = torch.cuda.current_device() if index is None else index
        return cuda_device(index), _cuda_kernels(index)
    # Its ceilings are not known: an H200's fill the fields, and no source means that they decide and show nothing.
    return replace(DEVICES["H200"], name=f"a {device_type} device", source=""), _kernels_off_cuda(device_type)


_usable: dict[int, Kernels] = {}


def _cuda_kernels(index: int) -> Kernels:
    """The kernels that the driver can run on a device. Asked until it answers: a failure may pass."""
    if index not in _usable:
        native = _native.load()
        if native is None:
            return Kernels(frozenset(), _native.why_missing())
        if native.build_info()["emulated"]:
            return Kernels(frozenset(), "the native module that was loaded is the CPU emulation, for CPU tensors")
        try:
            # Fails where the driver is too old, or the build has no code for this architecture.
            with torch.cuda.device(index):
                _usable[index] = Kernels(frozenset(native.attributes()))
        except RuntimeError as error:
            return Kernels(frozenset(), str(error))
    return _usable[index]


@lru_cache(maxsize=8)
def _kernels_off_cuda(device_type: str) -> Kernels:
    native = _native.load()
    if device_type == "cpu" and native is not None and native.build_info()["emulated"]:
        return Kernels(frozenset(instance["name"] for instance in native.instances()))
    if device_type == "cuda":
        return Kernels(frozenset(), "this PyTorch is built for ROCm; the kernels are for NVIDIA GPUs")
    return Kernels(frozenset(), f"x is on a {device_type} device; the kernels are for CUDA tensors")


def _launch_forward(
    candidate: Candidate, problem: Problem, tensors: Tensors, grad_output: Tensor | None = None
) -> Tensor:
    """y, or with grad_output the gradient of the last activation's argument."""
    x, depthwise_weight, pointwise_weight, bias, depthwise_bias, residual = tensors
    y = empty_output(x, (problem.N, problem.F, problem.out_h, problem.out_w))
    if problem.N == 0:
        return y
    weights = _contiguous(depthwise_weight, pointwise_weight, depthwise_bias, bias)
    _native.load().forward(
        candidate.name,
        _conv_shape(problem),
        _image(x),
        *map(_address, weights),
        _image(residual),
        _image(grad_output),
        _image(y),
        _stream(x.device),
    )
    return y


def _launch_backward(
    candidate: Candidate,
    problem: Problem,
    grad_output: Tensor,
    tensors: Tensors,
    output: Tensor | None,
    output_mask: tuple[bool, ...],
) -> tuple[Tensor | None, ...]:
    """The six gradients, None where not asked for: the steps of `BackwardParams` in csrc/params.h that they need."""
    want_x, want_depthwise, want_pointwise, want_bias, want_depthwise_bias, want_residual = output_mask
    x, depthwise_weight, pointwise_weight, bias, depthwise_bias, _ = tensors
    grad_z = _gradient_of_argument(grad_output, tensors, output, problem)
    run = _Backward(candidate, problem, tensors, grad_z)

    grad_x = grad_depthwise = grad_depthwise_bias = grad_pointwise = grad_bias = None
    if want_x or want_depthwise or want_depthwise_bias:
        grad_t = empty_output(x, (problem.N, problem.K, problem.out_h, problem.out_w))
        run.step("intermediate", grad_t=grad_t)
        if want_x:
            grad_x = torch.empty_like(x)
            run.step("input", grad_t=grad_t, grad_x=grad_x)
        grad_depthwise, grad_depthwise_bias = run.split_sums(
            "depthwise_weight",
            candidate.depthwise_splits,
            depthwise_weight if want_depthwise else None,
            depthwise_bias if want_depthwise_bias else None,
            grad_t=grad_t,
        )
    if want_pointwise:
        grad_pointwise, grad_bias = run.split_sums(
            "pointwise_weight", candidate.pointwise_splits, pointwise_weight, bias if want_bias else None
        )
    elif want_bias:
        grad_bias = grad_z.sum((0, 2, 3))
    return grad_x, grad_depthwise, grad_pointwise, grad_bias, grad_depthwise_bias, grad_z if want_residual else None


def _gradient_of_argument(grad_output: Tensor, tensors: Tensors, output: Tensor | None, problem: Problem) -> Tensor:
    """The gradient of the last activation's argument z: read from the output, or at z computed again."""
    activation = ACTIVATIONS[problem.activation]
    if problem.activation is None:
        return grad_output
    if output is not None and activation.from_output is not None:
        return activation.from_output(grad_output, output)
    # The forward kernel, with grad_output: z is never rounded to the tensors' dtype on the way.
    candidate = plan_for(replace(problem, direction="forward"), grad_output.device).choose("fused")
    return _launch_forward(candidate, problem, tensors, grad_output)


class _Backward:
    """The launches of one backward: what they share, and how a split sum becomes a gradient."""

    def __init__(self, candidate: Candidate, problem: Problem, tensors: Tensors, grad_z: Tensor) -> None:
        x, depthwise_weight, pointwise_weight, _, depthwise_bias, _ = tensors
        self._suffix = candidate.name.removeprefix("simt_backward")
        self._problem = problem
        self._x, self._grad_z = x, grad_z
        self._weights = _contiguous(depthwise_weight, pointwise_weight, depthwise_bias)

    def step(
        self,
        name: str,
        *,
        grad_t: Tensor | None = None,
        grad_x: Tensor | None = None,
        partial_weight: Tensor | None = None,
        partial_bias: Tensor | None = None,
        splits: Splits | None = None,
    ) -> None:
        if self._problem.N == 0:
            return
        _native.load().backward(
            f"simt_backward_{name}{self._suffix}",
            _conv_shape(self._problem),
            _image(self._x),
            *map(_address, self._weights),
            _image(self._grad_z),
            _image(grad_t),
            _image(grad_x),
            _address(partial_weight),
            _address(partial_bias),
            splits.pixels_per_part if splits else 0,
            splits.parts if splits else 0,
            _stream(self._x.device),
        )

    def split_sums(
        self, name: str, splits: Splits | None, weight: Tensor | None, bias: Tensor | None, grad_t: Tensor | None = None
    ) -> tuple[Tensor | None, Tensor | None]:
        """The gradients of a weight and a bias, None for None: partial sums, then their ordered reduction."""
        if (weight is None and bias is None) or splits is None:
            return None, None
        if self._problem.N == 0:
            return tuple(None if like is None else torch.zeros_like(like) for like in (weight, bias))
        compute = torch.float64 if self._x.dtype == torch.float64 else torch.float32
        partials = [
            None if like is None else torch.empty(splits.parts, like.numel(), dtype=compute, device=like.device)
            for like in (weight, bias)
        ]
        self.step(name, grad_t=grad_t, partial_weight=partials[0], partial_bias=partials[1], splits=splits)
        return self._reduced(partials[0], weight), self._reduced(partials[1], bias)

    def _reduced(self, partials: Tensor | None, like: Tensor | None) -> Tensor | None:
        if partials is None:
            return None
        parts, count = partials.shape
        out = torch.empty(like.shape, dtype=like.dtype, device=like.device)
        _native.load().reduce(
            f"reduce_splits_{self._problem.dtype}",
            _address(partials),
            _address(out),
            count,
            parts,
            _stream(self._x.device),
        )
        return out


def _contiguous(*weights: Tensor | None) -> list[Tensor | None]:
    """The weights are small: a view with odd strides is copied rather than strided through."""
    return [None if weight is None else weight.contiguous() for weight in weights]


def _address(tensor: Tensor | None) -> int:
    return 0 if tensor is None else tensor.data_ptr()


def _image(tensor: Tensor | None) -> tuple[int, tuple[int, ...]]:
    return (0, (0, 0, 0, 0)) if tensor is None else (tensor.data_ptr(), tensor.stride())


def _stream(device: torch.device) -> int:
    """The handle of the stream that PyTorch would use now."""
    return torch.cuda.current_stream(device).cuda_stream if device.type == "cuda" else 0


def _current(device: torch.device) -> AbstractContextManager[Any]:
    """The native module launches on the current device: this makes it the tensors' own."""
    return torch.cuda.device(device) if device.type == "cuda" else nullcontext()


@lru_cache(maxsize=4096)
def _conv_shape(problem: Problem) -> Any:
    """The problem as `csrc/params.h` has it."""
    native = _native.load()
    shape = native.ConvShape()
    shape.N, shape.C, shape.H, shape.W = problem.N, problem.C, problem.H, problem.W
    shape.K, shape.F, shape.multiplier = problem.K, problem.F, problem.multiplier
    shape.out_h, shape.out_w = problem.out_h, problem.out_w
    shape.kernel_h, shape.kernel_w = problem.kernel
    shape.stride_h, shape.stride_w = problem.stride
    shape.pad_top, _, shape.pad_left, _ = problem.padding
    shape.dilation_h, shape.dilation_w = problem.dilation
    for place in ("pre_activation", "mid_activation", "activation"):
        setattr(shape, place, getattr(native.Activation, getattr(problem, place) or "none"))
    return shape


def _tf32() -> bool:
    """Whether PyTorch's float32 convolutions may use TF32 now."""
    conv = getattr(torch.backends.cudnn, "conv", None)
    precision = getattr(conv, "fp32_precision", None)  # the new flag, which knows the old one's setting too
    return torch.backends.cudnn.allow_tf32 if precision is None else precision == "tf32"
