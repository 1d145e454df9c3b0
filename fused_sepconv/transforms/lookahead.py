"""Look-ahead: which module a running forward will hand a module's result to, read from the code that is running.

A forward may branch, and its modules may be wrapped or replaced at any time. So nothing that was found out earlier is
relied on: the caller's own next instructions, and the modules that its names stand for at this moment, are looked at.
Whatever is not understood is answered with None.
"""

from __future__ import annotations

import dis
import re
from bisect import bisect_right
from collections.abc import Callable
from functools import lru_cache
from types import CodeType, FrameType
from typing import Any, NamedTuple

from torch import nn

from fused_sepconv.ops.torch_internals import has_global_hooks

_CALL_IMPL, _WRAPPED_CALL_IMPL = nn.Module._call_impl.__code__, nn.Module._wrapped_call_impl.__code__
_SEQUENTIAL_FORWARD = nn.Sequential.forward.__code__
_CALLS = ("CALL", "CALL_METHOD", "CALL_FUNCTION")
_NOISE = ("PRECALL", "CACHE", "EXTENDED_ARG", "NOP", "NOT_TAKEN")
_ENDS = ("RETURN_VALUE", "RETURN_CONST", "RAISE_VARARGS", "RERAISE")

Path = tuple[str, ...]
"""A local variable and the names of attributes after it: ("self", "block", "conv")."""


class Handover(NamedTuple):
    """A call of one argument whose result is the one argument of the next call, and is read nowhere else."""

    caller: Path
    """What is called."""
    taker: Path
    """What is called with its result."""


def module_caller(frame: FrameType | None) -> FrameType | None:
    """The frame that called the module whose forward `frame` is, if it did so with nothing in between."""
    for code in (_CALL_IMPL, _WRAPPED_CALL_IMPL):
        frame = None if frame is None else frame.f_back
        if frame is None or frame.f_code is not code:
            return None
    return frame.f_back


def next_module(
    module: nn.Module,
    forward: FrameType,
    caller_of: Callable[[FrameType], FrameType | None] = module_caller,
) -> nn.Module | None:
    """The module that gets the result of `module`, whose forward is the frame `forward`, as its next and only reader.

    None if that is not certain: because hooks look on, because the result goes elsewhere or is kept, or because the
    calling code is of a form that is not understood.
    """
    if has_global_hooks():
        return None
    while (frame := caller_of(forward)) is not None and not is_looked_at(module):
        if frame.f_code is not _SEQUENTIAL_FORWARD:
            return _first(_taker(frame, module))
        sequential = _local(frame, "self")
        children = list(sequential._modules.values())
        places = [i for i, child in enumerate(children) if child is module]
        if len(places) != 1 or type(sequential).__iter__ is not nn.Sequential.__iter__:
            return None
        if places[0] + 1 < len(children):
            return _first(children[places[0] + 1])
        module, forward = sequential, frame  # the last child's result is the whole's
    return None


def is_looked_at(module: nn.Module) -> bool:
    """Whether something is attached to a module's call: hooks, a compiled form or a forward of the instance's own."""
    return has_hooks(module) or module._compiled_call_impl is not None or "forward" in module.__dict__


def has_hooks(module: nn.Module) -> bool:
    """Whether hooks see a module's call."""
    return bool(
        module._forward_hooks or module._forward_pre_hooks or module._backward_hooks or module._backward_pre_hooks
    )


def _first(module: nn.Module | None) -> nn.Module | None:
    """The module that reads a module's input: the first one inside, for an `nn.Sequential`."""
    while (
        module is not None
        and not is_looked_at(module)
        and type(module).forward is nn.Sequential.forward
        and type(module).__iter__ is nn.Sequential.__iter__
        and module._modules
    ):
        module = next(iter(module._modules.values()))
    return None if module is None or is_looked_at(module) else module


def _taker(frame: FrameType, module: nn.Module) -> nn.Module | None:
    handover = _handover(frame.f_code, frame.f_lasti)
    if handover is None or _value(frame, handover.caller) is not module:
        return None
    return _value(frame, handover.taker)


def _value(frame: FrameType, path: Path) -> nn.Module | None:
    """The module that a path is in a running frame; None if it is anything else."""
    module = _local(frame, path[0])
    for name in path[1:]:
        # A property or an attribute of the same name would come before the child.
        if not isinstance(module, nn.Module) or hasattr(type(module), name) or name in module.__dict__:
            return None
        module = module._modules.get(name)
    return module if isinstance(module, nn.Module) else None


def _local(frame: FrameType, name: str) -> Any:
    variables = frame.f_locals
    value = variables.get(name)
    if type(variables) is dict:
        # Before Python 3.13 it is a snapshot that lives as long as the frame, and with it every tensor in it.
        variables.clear()
    return value


# Code ----------------------------------------------------------------------------------------------------------------


class _Step(NamedTuple):
    """An instruction, or half of one that loads or stores two variables."""

    offset: int
    name: str
    """LOAD and STORE are those of local variables, whatever the instruction's own name."""
    value: Any
    effect: int
    """By how much it makes the stack higher."""
    target: int | None
    """The offset that it may jump to."""


@lru_cache(maxsize=4096)
def _handover(code: CodeType, offset: int) -> Handover | None:
    """What happens to the result of the call at an offset of a function's code, if it is a handover."""
    try:
        steps = _steps(code)
    except ValueError:  # an instruction whose effect on the stack `dis` does not know
        return None
    i = bisect_right(steps, offset, key=lambda step: step.offset) - 1
    caller = _called(steps, i)
    if caller is None:
        return None
    after = [j for j in range(i + 1, len(steps)) if steps[j].name not in _NOISE]
    if not after:
        return None
    taker = _called(steps, after[0])
    if taker is not None:
        return Handover(caller, taker)
    hidden_readers = getattr(code, "co_exceptiontable", b"") or {"locals", "vars", "eval", "exec"} & {*code.co_names}
    if steps[after[0]].name != "STORE" or hidden_readers:
        return None
    variable = steps[after[0]].value
    call = next((j for j in after if steps[j].name in _CALLS), None)
    taker = None if call is None else _called(steps, call)
    if taker is None or taker[0] == variable:
        return None
    between = [steps[j] for j in after[1:] if j < call and steps[j].name != "PUSH_NULL"]
    expected = [("LOAD", taker[0]), *(("ATTRIBUTE", name) for name in taker[1:]), ("LOAD", variable)]
    if [(step.name, step.value) for step in between] != expected or _is_read(steps, call + 1, variable):
        return None
    return Handover(caller, taker)


def _steps(code: CodeType) -> list[_Step]:
    steps = []
    for instruction in dis.get_instructions(code):
        name, value, offset = instruction.opname, instruction.argval, instruction.offset
        variables = re.findall(r"(LOAD|STORE|DELETE)_FAST", name)
        if variables and name != "LOAD_FAST_AND_CLEAR":
            names = value if isinstance(value, tuple) else (value,)
            for access, variable in zip(variables, names, strict=True):
                effect = 1 if access == "LOAD" else -1
                steps.append(_Step(offset, "LOAD" if effect == 1 else "STORE", variable, effect, None))
            continue
        jumps = instruction.opcode in dis.hasjrel or instruction.opcode in dis.hasjabs
        argument = instruction.arg if instruction.opcode >= dis.HAVE_ARGUMENT else None
        effect = dis.stack_effect(instruction.opcode, argument)
        if name in ("LOAD_ATTR", "LOAD_METHOD"):
            name = "ATTRIBUTE"
        steps.append(_Step(offset, name, value, effect, value if jumps else None))
    return steps


def _called(steps: list[_Step], i: int) -> Path | None:
    """What a step calls with one positional argument; None if it does not, or calls no attribute of a variable."""
    if steps[i].name not in _CALLS or steps[i].value != 1:
        return None
    height, i = 0, i - 2 if steps[i - 1].name == "PRECALL" else i - 1
    while i >= 0 and height != 1:  # back to where the argument begins
        step = steps[i]
        if step.target is not None or step.name in ("KW_NAMES", "YIELD_VALUE"):
            return None
        height += step.effect
        i -= 1
    names: list[str] = []
    while i >= 0 and (steps[i].name in ("ATTRIBUTE", "PUSH_NULL", *_NOISE)):
        if steps[i].name == "ATTRIBUTE":
            names.insert(0, steps[i].value)
        i -= 1
    return (steps[i].value, *names) if i >= 0 and steps[i].name == "LOAD" and names else None


def _is_read(steps: list[_Step], start: int, variable: str) -> bool:
    """Whether a variable may be read after a step, before it is given another value."""
    if any(step.name.startswith("SETUP_") for step in steps):  # Python 3.10's handlers of exceptions
        return True
    waiting, seen = [start], set()
    while waiting:
        i = waiting.pop()
        if i in seen or i >= len(steps):
            continue
        seen.add(i)
        step = steps[i]
        if variable == step.value or (isinstance(step.value, tuple) and variable in step.value):
            if step.name != "STORE":
                return True
            continue
        if step.target is not None:
            waiting.append(next((j for j, other in enumerate(steps) if other.offset >= step.target), len(steps)))
        if step.name not in _ENDS:
            waiting.append(i + 1)
    return False
