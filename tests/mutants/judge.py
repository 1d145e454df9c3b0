"""Judges an emulated native module: does what its kernels give differ from the definition, or break a rule?

`Judge` is a process that has PyTorch imported and knows the right answers, and forks for every module: what crashes or
hangs is the fork. `python -m tests.mutants.judge` is that process. It reads a line of JSON for every module, and
answers with one.
"""

from __future__ import annotations

import json
import os
import re
import resource
import signal
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import TypedDict

import torch

from fused_sepconv import _native

from .checks import Check, all_checks


class Ran(TypedDict):
    """What a check came to: the kernels that it ran, and seconds of processor time."""

    kernels: list[str]
    seconds: float


class Verdict(TypedDict):
    """`caught` is why the module is wrong. It is empty where nothing seems wrong: `ran` then has every check by its
    name, and `unused` the instances that no check executed."""

    caught: str
    ran: dict[str, Ran]
    unused: list[str]


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

    def judge(self, native: Path, checked: bool, limits: Mapping[str, float] | None = None) -> Verdict:
        """Runs checks on a module: those that `limits` names, in its order, or all.

        The module is wrong if one of them takes more than its limit, in seconds of processor time.
        """
        print(json.dumps([str(native), checked, limits]), file=self._process.stdin, flush=True)
        return json.loads(self._process.stdout.readline())


# ---- in the process

UNLIMITED = 600.0  # seconds of a check of kernels that are known to end


def main() -> None:
    torch.set_num_threads(1)
    checks = {checked: {check.name: check for check in all_checks(checked)} for checked in (False, True)}
    for check in checks[False].values():
        check.definition()  # which is kept: the forks find it there
    for line in sys.stdin:
        native, checked, limits = json.loads(line)
        if limits is None:
            limits = dict.fromkeys(checks[checked], UNLIMITED)
        asked = [(checks[checked][name], limit) for name, limit in limits.items()]
        print(json.dumps(_judge_in_a_fork(Path(native), asked)), flush=True)


def _judge_in_a_fork(native: Path, asked: Sequence[tuple[Check, float]]) -> Verdict:
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:
        os.close(reader)
        for stream in (1, 2):  # stdout is the answers', and the C library's last words say nothing to anyone
            os.dup2(os.open(os.devnull, os.O_WRONLY), stream)
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
        with os.fdopen(writer, "w") as pipe:
            json.dump(_judged(native, asked), pipe)
        os._exit(0)
    os.close(writer)
    with os.fdopen(reader) as pipe:
        answer = pipe.read()
    _, status = os.waitpid(child, 0)
    return json.loads(answer) if answer else {"caught": _how_it_ended(status), "ran": {}, "unused": []}


def _judged(native: Path, asked: Sequence[tuple[Check, float]]) -> Verdict:
    os.environ["FUSED_SEPCONV_NATIVE"] = str(native)
    ran: dict[str, Ran] = {}
    try:
        module = _native.load()
        kernel_of = {instance["name"]: _kernel(instance["spelling"]) for instance in module.instances()}
        for check, limit in asked:
            _end_after(limit)
            before, started = module.executed(), time.process_time()
            if wrong := check.what_is_wrong(module):
                return {"caught": f"{check.name}: {wrong}", "ran": {}, "unused": []}
            kernels = {kernel_of[name] for name, count in module.executed().items() if count > before.get(name, 0)}
            ran[check.name] = {"kernels": sorted(kernels), "seconds": time.process_time() - started}
        return {"caught": "", "ran": ran, "unused": sorted(kernel_of.keys() - module.executed().keys())}
    except Exception as error:
        return {"caught": f"{type(error).__name__}: {error}", "ran": {}, "unused": []}


def _kernel(spelling: str) -> str:
    """The name of the function, which is that of its file: `void fused_sepconv::reduce_splits<float>(…)`."""
    return re.search(r"fused_sepconv::(\w+)", spelling).group(1)


def _end_after(seconds: float) -> None:
    """Lets this process be ended where it takes so much processor time from now on, or sleeps for much longer."""
    signal.setitimer(signal.ITIMER_PROF, seconds)
    signal.setitimer(signal.ITIMER_REAL, 10 * seconds)


def _how_it_ended(status: int) -> str:
    code = os.waitstatus_to_exitcode(status)
    if code in (-signal.SIGPROF, -signal.SIGALRM):
        return "time-out"
    return f"crash: {signal.Signals(-code).name if code < 0 else f'exit status {code}'}"


if __name__ == "__main__":
    main()
