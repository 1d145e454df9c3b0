"""Judges an emulated native module: does what its kernels give differ from the definition, or break a rule?

`Judge` is a process that has PyTorch imported, and forks for every module: what crashes or hangs is the fork.
`python -m tests.mutants.judge` is that process. It reads a line for every module, the file's name, and answers with a
line of JSON.
"""

from __future__ import annotations

import json
import os
import resource
import select
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from itertools import product
from pathlib import Path
from types import ModuleType, TracebackType
from typing import TypedDict

import torch
from torch import Tensor

import fused_sepconv
from fused_sepconv import _native, depthwise_execution, launching, tensor_execution
from fused_sepconv.devices import DEVICES
from fused_sepconv.execution import ALL_KERNELS
from fused_sepconv.families import depthwise, tensor_input, tensor_weight
from fused_sepconv.families.tensor import NARROW, WIDE
from fused_sepconv.problem import Candidate, TensorInputTiling
from tests.cases import ACTIVATIONS, Case, depthwise_convolution, named, two_convolutions
from tests.emulation import planned_for
from tests.test_plan import problem

from .scratch import INSTANCES

TOLERANCE = {"float64": 1e-12, "float32": 1e-5}
MEMORY_FORMATS = {"nhwc": torch.channels_last, "nchw": torch.contiguous_format}

SCHEDULES = {False: (("forward", 1), ("reverse", 1), ("random", 1)), True: (("forward", 1), ("reverse", 1))}


class Verdict(TypedDict):
    """`caught` is why the module is wrong. It is empty where nothing seems wrong: `unused` are then the instances that
    no case executed, and `seconds` is how long all took."""

    caught: str
    unused: list[str]
    seconds: float


class Judge:
    """A process that judges one module at a time. It runs in a copy of the checkout, with that copy's package."""

    def __init__(self, root: Path) -> None:
        environment = dict(os.environ, OMP_NUM_THREADS="1")
        environment.pop("PYTHONPATH", None)
        environment.pop("FUSED_SEPCONV_NATIVE", None)
        self._process = subprocess.Popen(
            [sys.executable, "-m", "tests.mutants.judge"],
            cwd=root,
            env=environment,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )

    def __enter__(self) -> Judge:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        self._process.stdin.close()
        self._process.wait()

    def judge(self, native: Path, seconds: float) -> Verdict:
        """Runs the cases on a module, which is wrong if it takes more than `seconds` of processor time."""
        print(json.dumps([str(native), seconds]), file=self._process.stdin, flush=True)
        return json.loads(self._process.stdout.readline())


# ---- in the process


# What a module is asked: small cases of the table, the bends of activations, and tiles and splits that are whole or one
# over. A tile is 64 x 64 (32 or 4 channels for the depthwise weight), its slabs are 16 deep, and a sum over more than
# 256 pixels is split.
CASES = (
    *named(
        "everything",
        "four different sides",
        "three activations, both biases",
        "dilation and stride",
        "stride larger than the kernel",
        "kernel larger than the image",
        "5x2 kernel",
        "depth multiplier 3",
        "residual before the activation",
        "plain",
        "relu thrice",
        "relu6 thrice",
        "elu thrice",
        "silu thrice",
        "hardswish thrice",
        "gelu thrice",
    ),
    Case("bends", 1, 2, 4, 4, 3, pre_activation="relu", mid_activation="relu"),
    Case("bends of relu6", 1, 2, 4, 4, 3, pre_activation="relu6"),
    Case("bends of hardswish", 1, 2, 4, 4, 3, pre_activation="hardswish"),
    Case("whole tiles", 1, 64, 8, 8, 64, kernel=1, padding=0),
    Case("one over a tile", 1, 65, 1, 66, 65, kernel=(1, 2), padding=0, bias=True, depthwise_bias=True),
    Case("many channels, few features", 1, 70, 2, 3, 2, kernel=1, padding=0),
    Case("few channels, many features", 1, 2, 2, 3, 70, kernel=1, padding=0),
    Case("a split sum", 1, 4, 17, 17, 3, bias=True, depthwise_bias=True),
    Case("a split sum, whole tiles of channels", 1, 64, 17, 17, 2, kernel=1, padding=0),
    Case("a split sum, whole tiles of features", 1, 2, 17, 17, 64, kernel=1, padding=0),
)


def _tensors(case: Case) -> dict[str, Tensor]:
    tensors = case.tensors()
    if case.name.startswith("bends"):
        corners = [0.0, 3.0, -3.0, 6.0]  # where activations have no derivative
        tensors["x"].view(-1)[: 2 * len(corners)] = tensors["x"].new_tensor(2 * corners)
        tensors["depthwise_weight"][-1] = 0.0  # another channel is 0 throughout after the taps
    return tensors


def _forward_and_back(function: Callable[..., Tensor], tensors: dict[str, Tensor], options: dict) -> dict[str, Tensor]:
    y = function(**tensors, **options)
    grad_output = torch.randn(y.shape, generator=torch.Generator().manual_seed(7), dtype=torch.float64).to(y.dtype)
    gradients = torch.autograd.grad(y, list(tensors.values()), grad_output)
    return {"y": y.detach(), **{f"the gradient of {name}": g for name, g in zip(tensors, gradients, strict=True)}}


# The depthwise kernels, as the split family runs them: several strips, chunks, groups of rows and parts, a chunk that
# is not filled, and rows and columns on both sides of every edge. On one SM a part goes through several strips.
DEPTHWISE_CASES = (
    Case("two strips of several groups", 2, 40, 9, 45, 2, pre_activation="silu", depthwise_bias=True),
    Case("stride 2", 2, 36, 11, 13, 2, kernel=5, stride=2, padding=((3, 1), (1, 4)), mid_activation="silu"),
    Case("stride 2 and a bias", 1, 8, 9, 13, 2, kernel=5, stride=2, padding=2, depthwise_bias=True),
    Case(
        "dilation", 1, 8, 9, 8, 2, padding=((2, 3), (4, 1)), dilation=(2, 3), depthwise_bias=True, mid_activation="relu"
    ),
    Case("dilation and stride", 1, 8, 12, 11, 2, kernel=5, padding=(3, 2), dilation=3, stride=2, depthwise_bias=True),
    Case("dilation and stride with a common factor", 1, 8, 9, 8, 2, padding=2, dilation=2, stride=2),
    Case("windows in the padding alone", 1, 4, 3, 3, 2, padding=((5, 0), (0, 6)), depthwise_bias=True),
    Case("through the mid-activation", 1, 40, 9, 45, 2, depthwise_bias=True, mid_activation="silu"),
    Case("multiplier", 1, 12, 5, 6, 2, multiplier=3, depthwise_bias=True, mid_activation="gelu"),
    Case("many small images", 7, 4, 3, 2, 2, pre_activation="relu"),
    Case("more outputs than threads", 1, 4, 13, 12, 2, pre_activation="silu", mid_activation="silu"),
)

# Images so large that the kernels for NCHW cut them into bands, and parts into several of those.
PLANE_CASES = (
    Case("bands and parts", 5, 4, 121, 33, 2, pre_activation="silu", depthwise_bias=True),
    Case("bands, stride 2", 3, 4, 61, 33, 2, kernel=5, stride=2, padding=((3, 1), (2, 3)), mid_activation="relu"),
)
PLANE_INSTANCE = ("float32", "nchw")

PLANS = ((1, True), (1, False), (2, False), (132, False))  # SMs, and whether tiles are the widest

# What is left of the fast kernels is float32. Where they have no backward it is the generic kernels', left in others.
FAST_INSTANCE = ("float32", "nhwc")
WITHOUT_FAST_BACKWARD = ("dilation and stride with a common factor", "multiplier")


def _what_is_wrong_with_the_split_family(module: ModuleType) -> str:
    for case in (*DEPTHWISE_CASES, *PLANE_CASES):
        exact = {name: tensor.requires_grad_() for name, tensor in _tensors(case).items()}
        oracle = _forward_and_back(two_convolutions, exact, case.options)
        for dtype, layout in [PLANE_INSTANCE] if case in PLANE_CASES else (*INSTANCES, FAST_INSTANCE):
            tensors = {name: tensor.detach().to(getattr(torch, dtype)) for name, tensor in exact.items()}
            tensors["x"] = tensors["x"].contiguous(memory_format=MEMORY_FORMATS[layout])
            forward_alone = (dtype, layout) == FAST_INSTANCE and case.name in WITHOUT_FAST_BACKWARD
            tensors = {name: tensor.requires_grad_(not forward_alone) for name, tensor in tensors.items()}
            for (order, seed), (sms, widest) in product(SCHEDULES[module.is_checked()][:2], PLANS):
                module.set_schedule(order, seed)
                where = f"{case.name}, {dtype}, {layout}, {order}, {sms} SMs, {widest}"
                try:
                    with fused_sepconv.use_backend("fused"), launching.preferring("split"), planned_for(sms, widest):
                        if forward_alone:
                            ours = {"y": fused_sepconv.separable_conv2d(**tensors, **case.options)}
                        else:
                            ours = _forward_and_back(fused_sepconv.separable_conv2d, tensors, case.options)
                except module.EmulatorError as error:
                    return f"{where}: {error}"
                if wrong := _difference(ours, oracle, TOLERANCE[dtype]):
                    return f"{where}: {wrong}"
    return ""


def _what_is_wrong_with_the_step_through_the_mid_activation(module: ModuleType) -> str:
    """The forward that a backward runs first where its own kernel does not: not in cases as small as these."""
    for case in (case for case in DEPTHWISE_CASES if case.mid_activation and case.multiplier == 1):
        tensors = {name: tensor.float() for name, tensor in _tensors(case).items()}
        x = tensors["x"].contiguous(memory_format=torch.channels_last)
        inputs = x, tensors["depthwise_weight"], tensors.get("depthwise_bias")
        options = {name: case.options[name] for name in ("stride", "padding", "dilation", "pre_activation")}
        t = depthwise_convolution(*(None if i is None else i.double() for i in inputs), **options).requires_grad_()
        grad = torch.randn(t.shape, generator=torch.Generator().manual_seed(7))
        (expected,) = torch.autograd.grad(ACTIVATIONS[case.mid_activation](t), t, grad.double())
        call = replace(problem(case), layout="nhwc", aligned=True).depthwise("forward")
        for sms in (1, 132):
            step = depthwise.best(call, replace(DEVICES["H200"], sms=sms), ALL_KERNELS)
            where = f"{case.name}, through the mid-activation, {sms} SMs"
            try:
                ours = depthwise_execution.forward(step, call, *inputs, grad)
            except module.EmulatorError as error:
                return f"{where}: {error}"
            if wrong := _difference({"the gradient of t": ours}, {"the gradient of t": expected}, TOLERANCE["float32"]):
                return f"{where}: {wrong}"
    return ""


# The tensor-core kernels: tiles of 128 or 256 features and a vector of the next, slabs of channels and a vector,
# several tiles a block and a block a tile, tiles that end inside a cell and past the image, all kinds, both operands'
# types. Of the backward, the gradients that have no other kernels.
TENSOR_CASES = (
    Case("slabs and vectors", 2, 72, 7, 9, 136, bias=True, residual=True, pre_activation="relu", activation="relu"),
    Case("256 features, and a vector", 1, 8, 4, 5, 264, bias=True, activation="silu"),
    Case("many tiles", 5, 8, 13, 30, 8, depthwise_bias=True, mid_activation="relu"),
    Case("many tiles of two slabs", 2, 40, 21, 30, 16, pre_activation="relu", bias=True),
    Case("stride 2", 1, 40, 11, 14, 24, stride=2, padding=1, mid_activation="relu", activation="gelu"),
    Case("stride 3", 1, 24, 14, 17, 8, kernel=(4, 2), stride=3, pre_activation="silu", mid_activation="silu"),
    Case("strides and dilations", 1, 8, 13, 19, 8, padding=((1, 2), (3, 0)), stride=(2, 1), dilation=(3, 4)),
    Case("a row and a column", 2, 8, 9, 11, 8, kernel=(3, 1), padding=((1, 0), (0, 2)), stride=(1, 2)),
    Case("more channels than threads", 1, 264, 3, 4, 8, depthwise_bias=True),
    Case("more pieces of taps than threads", 1, 8, 6, 7, 8, kernel=9, padding=4, depthwise_bias=True),
    Case("multiplier 5", 1, 16, 6, 6, 16, multiplier=5, pre_activation="relu", depthwise_bias=True),
)
TENSOR_GRADIENTS = ("pointwise_weight", "bias")
TENSOR_TOLERANCE = {"bfloat16": 2e-2, "float32": 4e-3}


def _what_is_wrong_with_the_tensor_family(module: ModuleType) -> str:
    for case, (dtype, tolerance) in product(TENSOR_CASES, TENSOR_TOLERANCE.items()):
        tensors = {name: tensor.to(getattr(torch, dtype)) for name, tensor in case.tensors().items()}
        tensors["x"] = tensors["x"].contiguous(memory_format=torch.channels_last)
        grad_z = torch.randn(case.output_shape, generator=torch.Generator().manual_seed(7)).to(tensors["x"].dtype)
        grad_z = grad_z.contiguous(memory_format=torch.channels_last)
        exact = {name: tensor.double() for name, tensor in tensors.items()}
        oracle = {"y": two_convolutions(**exact, **case.options), **_of_pointwise_weight(case, exact, grad_z.double())}
        tiles = (WIDE, NARROW) if case.kernel == 3 and case.dilation == 1 else (None,)
        for (order, seed), sms, tile in product(SCHEDULES[module.is_checked()], (2, 132), tiles):
            module.set_schedule(order, seed)
            where = f"{case.name}, {dtype} on tensor cores, tiles {tile}, {order}, {sms} SMs"
            try:
                with fused_sepconv.use_backend("fused"), launching.preferring("tensor"), planned_for(sms, tile=tile):
                    ours = {"y": fused_sepconv.separable_conv2d(**tensors, **case.options)}
                if tile == tiles[0]:  # the other step has no such tiles
                    ours |= _by_tensor_cores(case, tensors, grad_z, sms)
            except module.EmulatorError as error:
                return f"{where}: {error}"
            if wrong := _difference(ours, oracle, tolerance):
                return f"{where}: {wrong}"
    return ""


def _of_pointwise_weight(case: Case, tensors: dict[str, Tensor], grad_z: Tensor) -> dict[str, Tensor]:
    """The gradients of the pointwise weight and bias, by definition, from that of the last activation's argument."""
    leaves = {name: tensors[name].detach().requires_grad_() for name in TENSOR_GRADIENTS if name in tensors}
    z = two_convolutions(**{**tensors, **leaves}, **{**case.options, "activation": None})
    return dict(zip(leaves, torch.autograd.grad(z, list(leaves.values()), grad_z), strict=True))


def _by_tensor_cores(case: Case, tensors: dict[str, Tensor], grad_z: Tensor, sms: int) -> dict[str, Tensor]:
    call = replace(problem(case, "backward", grad_z.dtype), layout="nhwc", aligned=True, tf32=True)
    step = tensor_weight.best(call, replace(DEVICES["H200"], sms=sms), ALL_KERNELS)
    names = ("x", "depthwise_weight", "pointwise_weight", "bias", "depthwise_bias", "residual")
    found = tensor_execution.pointwise_weight_gradient(
        step, call, grad_z, tuple(tensors.get(name) for name in names), want_bias=case.bias
    )
    return {name: gradient for name, gradient in zip(TENSOR_GRADIENTS, found, strict=True) if gradient is not None}


# The tensor-core kernel towards x: a chunk of channels and a vector, paddings that leave x without dT and dT without x,
# several tiles and parts, strips, phases that end early, the way of relu and that of the others.
TENSOR_INPUT_CASES = (
    Case("chunks and vectors", 2, 72, 7, 9, 40, pre_activation="relu", padding=((2, 0), (0, 1)), depthwise_bias=True),
    Case("many tiles", 1, 8, 33, 31, 8, pre_activation="silu", depthwise_bias=True),
    Case("strips", 1, 8, 15, 52, 24, padding=((0, 3), (4, 1)), pre_activation="relu", depthwise_bias=True),
    Case("phases", 2, 8, 12, 19, 8, padding=((1, 5), (3, 0)), dilation=(3, 2), depthwise_bias=True),
)


def _what_is_wrong_with_the_tensor_input(module: ModuleType) -> str:
    names = ("x", "depthwise_weight", "pointwise_weight", "bias", "depthwise_bias", "residual")
    for case in TENSOR_INPUT_CASES:
        tensors = {name: tensor.bfloat16() for name, tensor in case.tensors().items()}
        tensors["x"] = tensors["x"].contiguous(memory_format=torch.channels_last)
        grad_z = torch.randn(case.output_shape, generator=torch.Generator().manual_seed(7)).bfloat16()
        oracle = _towards_x(case, {name: tensor.double() for name, tensor in tensors.items()}, grad_z.double())
        call = replace(problem(case, "backward", torch.bfloat16), layout="nhwc", aligned=True)
        cuts = tensor_input.cuts(call, replace(DEVICES["H200"], sms=2))
        most_strips = max(cuts, key=lambda cut: cut.strips)
        for cut, stages, mask in (
            (cuts[0], 5, (True, True, True)),
            (most_strips, 4, (True, True, True)),
            (cuts[0], 3, (True, False, False)),
            (most_strips, 2, (False, True, True)),
        ):
            tiling = TensorInputTiling(cut.strips, cut.part, cut.parts, stages)
            step = Candidate("tensor", "tensor_backward_input_3x3_bfloat16", tiling=tiling)
            for order, seed in SCHEDULES[module.is_checked()]:
                module.set_schedule(order, seed)
                where = f"{case.name}, towards x on tensor cores, {order}, {tiling}"
                try:
                    found = tensor_execution.input_gradients(
                        step, call, grad_z, tuple(tensors.get(name) for name in names), mask
                    )
                except module.EmulatorError as error:
                    return f"{where}: {error}"
                asked = {name: gradient for name, gradient in zip(oracle, found, strict=True) if gradient is not None}
                if wrong := _difference(asked, oracle, TENSOR_TOLERANCE["bfloat16"]):
                    return f"{where}: {wrong}"
    return ""


def _towards_x(case: Case, tensors: dict[str, Tensor], grad_z: Tensor) -> dict[str, Tensor]:
    """The gradients of x and of the depthwise weight and bias, by definition."""
    leaves = {name: tensors[name].requires_grad_() for name in ("x", "depthwise_weight", "depthwise_bias")}
    options = {name: case.options[name] for name in ("stride", "padding", "dilation", "pre_activation")}
    t = depthwise_convolution(*leaves.values(), **options)
    grad_t = torch.einsum("nfhw,fk->nkhw", grad_z, tensors["pointwise_weight"].flatten(1))
    return dict(zip(leaves, torch.autograd.grad(t, list(leaves.values()), grad_t), strict=True))


def _difference(ours: dict[str, Tensor], oracle: dict[str, Tensor], tolerance: float) -> str:
    for name, mine in ours.items():
        error, scale = float((mine.double() - oracle[name]).abs().max()), float(oracle[name].abs().max())
        if not error <= tolerance * max(scale, 1.0):
            return f"{name} is {error:.1e} off, of {scale:.1e}"
    return ""


def _what_is_wrong(native: Path) -> tuple[str, list[str]]:
    """The first thing that is wrong with a module, or nothing; and the instances that were never executed."""
    os.environ["FUSED_SEPCONV_NATIVE"] = str(native)
    module = _native.load()
    for case in CASES:
        exact = {name: tensor.requires_grad_() for name, tensor in _tensors(case).items()}
        oracle = _forward_and_back(two_convolutions, exact, case.options)
        for dtype, layout in INSTANCES:
            tensors = {name: tensor.detach().to(getattr(torch, dtype)) for name, tensor in exact.items()}
            tensors["x"] = tensors["x"].contiguous(memory_format=MEMORY_FORMATS[layout])
            tensors = {name: tensor.requires_grad_() for name, tensor in tensors.items()}
            for order, seed in SCHEDULES[module.is_checked()]:
                module.set_schedule(order, seed)
                where = f"{case.name}, {dtype}, {layout}, {order}"
                try:
                    with fused_sepconv.use_backend("fused"):
                        ours = _forward_and_back(fused_sepconv.separable_conv2d, tensors, case.options)
                except module.EmulatorError as error:
                    return f"{where}: {error}", []
                if wrong := _difference(ours, oracle, TOLERANCE[dtype]):
                    return f"{where}: {wrong}", []
    families = (
        _what_is_wrong_with_the_split_family,
        _what_is_wrong_with_the_tensor_family,
        _what_is_wrong_with_the_tensor_input,
        _what_is_wrong_with_the_step_through_the_mid_activation,
    )
    for family in families:
        if wrong := family(module):
            return wrong, []
    return "", sorted({instance["name"] for instance in module.instances()} - set(module.executed()))


def _judge_in_a_fork(native: Path, seconds: float) -> Verdict:
    started = time.monotonic()
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:
        os.close(reader)
        for stream in (1, 2):  # stdout is the answers', and the C library's last words say nothing to anyone
            os.dup2(os.open(os.devnull, os.O_WRONLY), stream)
        resource.setrlimit(resource.RLIMIT_CPU, (int(seconds) + 1, int(seconds) + 1))
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
        try:
            answer = _what_is_wrong(native)
        except Exception as error:
            answer = f"{type(error).__name__}: {error}", []
        os.write(writer, json.dumps(answer).encode())
        os._exit(0)
    os.close(writer)
    # The limit of processor time does not end one that sleeps for ever.
    if not select.select([reader], [], [], 10 * seconds)[0]:
        os.kill(child, signal.SIGKILL)
    with os.fdopen(reader, "rb") as pipe:
        answer = pipe.read()
    _, status = os.waitpid(child, 0)
    caught, unused = json.loads(answer) if answer else (_how_it_ended(status), [])
    return {"caught": caught, "unused": unused, "seconds": time.monotonic() - started}


def _how_it_ended(status: int) -> str:
    code = os.waitstatus_to_exitcode(status)
    if code in (-signal.SIGKILL, -signal.SIGXCPU):
        return "time-out"
    return f"crash: {signal.Signals(-code).name if code < 0 else f'exit status {code}'}"


def main() -> None:
    torch.set_num_threads(1)
    for line in sys.stdin:
        native, seconds = json.loads(line)
        print(json.dumps(_judge_in_a_fork(Path(native), seconds)), flush=True)


if __name__ == "__main__":
    main()
