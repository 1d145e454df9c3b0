"""Prepared calls: the first call of a signature does all the thinking; later ones look it up, allocate and launch.

A signature is what a tensor's metadata decides: shape, strides, dtype, device, alignment. Nothing of its contents is
kept. Whatever else changes what runs is in the key too: the arguments, the backend, PyTorch's precision and determinism
flags, and the generation of what was measured.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from fused_sepconv.families.registry import RunBackward, RunForward
from fused_sepconv.native.marshalling import GUARD_BINDS
from fused_sepconv.ops import launching, saving
from fused_sepconv.planning import choice
from fused_sepconv.planning.problem import Candidate
from fused_sepconv.tensors.memory_format import tf32

if TYPE_CHECKING:
    from fused_sepconv.ops.operators import Operator

MOST = 4096
"""Prepared calls that are kept; the oldest leaves for a new one."""

MOST_GRADIENTS = 64
"""Backwards that are kept for each of them: gradients may come in ever new strides."""

MEASURES_CPU = False
"""Switch for tests: choices are measured on the CPU too, as on CUDA."""

# -1 is no device: each launch then makes its own the current one.
_current_device: Callable[[], int] = getattr(torch._C, "_cuda_getDevice" if GUARD_BINDS else "", lambda: -1)
_deterministic = torch._C._get_deterministic_algorithms
_cudnn_benchmark, _cudnn_deterministic = torch._C._get_cudnn_benchmark, torch._C._get_cudnn_deterministic
_cudnn_enabled = torch._C._get_cudnn_enabled

_calls: dict[tuple, Prepared] = {}
_lock = threading.Lock()


def clear() -> None:
    """Forgets all prepared calls."""
    with _lock:
        _calls.clear()


def look_up(key: tuple) -> Any:
    """What `remember` was given under a key."""
    return _calls.get(key)


def remember(key: tuple, value: Any) -> Any:
    """Keeps a value beside the prepared calls; returns it."""
    return keep(_calls, key, value)


def keep(cache: dict[tuple, Any], key: tuple, value: Any, most: int | None = None) -> Any:
    """Puts a value into a cache of at most `most` values, by default `MOST`; returns it."""
    with _lock:
        while len(cache) >= (most or MOST):
            del cache[next(iter(cache))]
        cache[key] = value
    return value


class Prepared:
    """A checked call of an operator, on tensors of one signature, under one backend: both directions of it."""

    def __init__(
        self,
        operator: Operator,
        tensors: tuple[Tensor | None, ...],
        arguments: tuple,
        backend: str,
        save: bool | None = None,
    ) -> None:
        self.operator, self.arguments, self.backend, self.save = operator, arguments, backend, save
        self._index = tensors[0].device.index if tensors[0].is_cuda else None
        self._device = tensors[0].device
        self._chosen: dict[Any, tuple[Candidate, Any]] = {}
        self._forward: RunForward | None = None
        self._saving: RunForward | None = None
        self.saves_for: dict[tuple[bool, ...], bool] = {}  # what `saves` has answered
        self._backwards: dict[tuple, RunBackward] = {}
        self.backward_routes: dict[tuple, Any] = {}  # those of eager calls

    def saves(self, tensors: tuple[Tensor | None, ...], mask: tuple[bool, ...]) -> bool:
        """Whether the forward saves the depthwise result for the gradients that the mask asks for."""
        found = saving.saves(self.operator, tensors, self.arguments, self.backend, self.save, mask)
        self.saves_for[mask] = found
        return found

    def forward(self, *tensors: Tensor | None) -> Tensor:
        """The output."""
        return self.run(self._forward or self._prepare_forward(tensors), tensors)

    def forward_saving(self, *tensors: Tensor | None) -> tuple[Tensor, Tensor]:
        """The output, and the depthwise result for `backward`, of a call that `saves`."""
        return self.run(self._saving or self._prepare_forward(tensors, saved=True), tensors)

    def backward(
        self, grad_output: Tensor, tensors: tuple[Tensor | None, ...], output: Tensor | None, mask: tuple[bool, ...]
    ) -> tuple[Tensor | None, ...]:
        """A gradient for each tensor, None where the mask does not ask."""
        key = (*signature(grad_output), *(() if output is None else signature(output)), mask)
        run = self._backwards.get(key)
        if run is None:
            run, settled = self.prepare_backward(grad_output, tensors, output, mask)
            if settled:
                keep(self._backwards, key, run, MOST_GRADIENTS)
        return self.run(run, (grad_output, tensors, output))

    def run(self, run: Callable[..., Any], given: tuple[Any, ...]) -> Any:
        """Calls what was prepared, on the tensors' device; its error names the kernel where a launch failed."""
        try:
            if self._index is None or self._index == _current_device():
                return run(*given)
            with launching.on_device(self._device):
                return run(*given)
        except RuntimeError as error:
            raise self._named(error, run) from error

    def _named(self, error: RuntimeError, run: Any) -> RuntimeError:
        """The error that names kernel and problem where a launch failed; it is not chosen again."""
        chosen = self._chosen.get(run)
        return error if chosen is None else choice.launch_failed(chosen[1], self._device, chosen[0], error)

    @contextmanager
    def _naming(self, candidate: Candidate, problem: Any) -> Iterator[None]:
        try:
            yield
        except RuntimeError as error:
            raise choice.launch_failed(problem, self._device, candidate, error) from error

    def _note(self, run: Any, candidate: Candidate, problem: Any) -> None:
        if len(self._chosen) >= 64:
            self._chosen.clear()
        self._chosen[run] = candidate, problem

    def _problem(self, direction: str, tensors: tuple[Tensor | None, ...], saved: bool) -> Any:
        problem = self.operator.problem_of(direction, tensors, self.arguments)
        return replace(problem, saved=True) if saved else problem

    def _prepare_forward(self, tensors: tuple[Tensor | None, ...], saved: bool = False) -> RunForward:
        problem = self._problem("forward", tensors, saved)

        def trial(candidate: Candidate, problem: Any, arguments: Any, own: tuple) -> Tensor:
            with self._naming(candidate, problem):
                made = self.operator.families[candidate.family].forward(candidate, problem, own)(*own)
            return made[0] if saved else made

        with launching.on_device(tensors[0].device):
            decision = launching.choose(problem, tensors[0].device, self.backend, trial, self.arguments, tensors)
            run = self.operator.families[decision.candidate.family].forward(decision.candidate, problem, tensors)
        self._note(run, decision.candidate, problem)
        if decision.settled and saved:
            self._saving = run
        elif decision.settled:
            self._forward = run
        return run

    def prepare_backward(
        self,
        grad_output: Tensor,
        tensors: tuple[Tensor | None, ...],
        output: Tensor | None,
        mask: tuple[bool, ...],
        saved: bool = False,
    ) -> tuple[RunBackward, bool]:
        """The backward for gradients like these, for `run`, and whether later calls may use it again.

        It takes (grad_output, tensors, output), and if `saved` also what `forward_saving` gave.
        """
        x = tensors[0]
        problem = self._problem("backward", tensors, saved)
        shape = (problem.N, getattr(problem, "F", problem.K), problem.out_h, problem.out_w)
        _check_like("grad_output", grad_output, x, shape)
        if output is not None:
            _check_like("output", output, x, shape)
        wanted = self.operator.tuned_gradients
        kept: list[Tensor] = []  # what the forward of a trial's tensors saves

        def trial(candidate: Candidate, problem: Any, arguments: Any, own: tuple) -> tuple[Tensor | None, ...]:
            grad, *inputs, y = own
            if saved and not kept:
                kept.append(self.operator.composed(arguments, inputs, True)(*inputs)[1])
            family = self.operator.families[candidate.family]
            with self._naming(candidate, problem):
                run = family.backward(candidate, problem, grad, tuple(inputs), y, wanted)
                return run(grad, tuple(inputs), y, *kept)

        with launching.on_device(x.device):
            everything = (grad_output, *tensors, output)
            decision = launching.choose(problem, x.device, self.backend, trial, self.arguments, everything)
            family = self.operator.families[decision.candidate.family]
            run = family.backward(decision.candidate, problem, grad_output, tensors, output, mask)
        self._note(run, decision.candidate, problem)
        return run, decision.settled


def find(
    operator: Operator, tensors: tuple[Tensor | None, ...], arguments: tuple, backend: str, save: bool | None = None
) -> Prepared:
    """The prepared call of checked tensors and arguments; ValueError or TypeError where they are not right."""
    key: list[Any] = [operator.name, arguments, backend, save, *flags(tensors[0], backend)]
    for tensor in tensors:
        key += (None,) if tensor is None else signature(tensor)
    found = _calls.get(key := tuple(key))
    if found is None:
        operator.check(tensors, arguments)
        found = keep(_calls, key, Prepared(operator, tensors, arguments, backend, save))
    return found


def signature(tensor: Tensor) -> tuple[Any, ...]:
    return tensor.shape, tensor.stride(), tensor.dtype, tensor.device, tensor.data_ptr() & 15


def flags(x: Tensor, backend: str) -> tuple[Any, ...]:
    """Values that change a choice besides the call: PyTorch's flags, a family asked for, a newer measurement."""
    if x.is_cuda or (MEASURES_CPU and x.is_cpu):
        found = (
            launching.wish.family,
            choice.generation,
            _deterministic(),
            _cudnn_enabled(),
            _cudnn_benchmark(),
            _cudnn_deterministic(),
        )
    elif backend == "fused":
        found = (launching.wish.family,)
    else:
        return ()  # PyTorch's own, whatever is set
    return (*found, tf32()) if x.dtype is torch.float32 else found


def _check_like(name: str, tensor: Tensor, x: Tensor, shape: tuple[int, ...]) -> None:
    if tuple(tensor.shape) != shape:
        raise ValueError(f"{name}: expected the output's shape {shape}, got {tuple(tensor.shape)}")
    if tensor.dtype != x.dtype:
        raise TypeError(f"{name}: expected x's dtype {x.dtype}, got {tensor.dtype}")
    if tensor.device != x.device:
        raise ValueError(f"{name}: expected x's device {x.device}, got {tensor.device}")
