"""One mutant on trial: built and judged plain, and where that shows nothing, checked."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path

from .judge import Judge, Ran
from .mutate import Mutant
from .scratch import DoesNotCompile, Scratch

CAUGHT_BY = ("plain", "checked")


@dataclass(frozen=True)
class Outcome:
    """How a trial ended: caught "plain" or "checked", "survived", or "no program" (which is no mutant); and why."""

    mutant: Mutant
    end: str
    why: str = ""


class Trials:
    """What the trials of all mutants share: the copies, and what the unbroken kernels come to."""

    def __init__(self, folder: Path) -> None:
        self.scratch = Scratch(folder)
        self.unused: list[str] = []  # instances that no check runs: their mutants would seem to survive
        self._ran: dict[bool, dict[str, Ran]] = {}
        with self.judge() as judge:
            for checked, native in self.scratch.native.items():
                verdict = judge.judge(native, checked)
                if verdict["caught"]:
                    raise RuntimeError(f"the kernels are wrong before they are mutated: {verdict['caught']}")
                self.unused = verdict["unused"]
                self._ran[checked] = verdict["ran"]

    def judge(self) -> Judge:
        return Judge(self.scratch.pristine)

    def run(self, mutant: Mutant, judge: Judge, copy: str = "mutant") -> Outcome:
        """Trials that run side by side need a judge and a copy of their own each."""
        root = self.scratch.copy(copy, mutant)
        kernels = sorted(
            self.scratch.kernels_with(mutant.file), key=lambda kernel: sum(self._limits([kernel]).values())
        )
        for checked, name in enumerate(CAUGHT_BY):
            for kernel in list(kernels):
                try:
                    native = self.scratch.build(root, bool(checked), kernel)
                except DoesNotCompile as error:
                    return Outcome(mutant, "no program", str(error))
                if not checked and self.scratch.has_the_same_code(root, kernel):
                    kernels.remove(kernel)
                    continue
                # Of a function that is not inlined the linker takes one kernel's for all: in the end, all are asked.
                asked = kernels if kernel == kernels[-1] else [kernel]
                verdict = judge.judge(native, bool(checked), self._limits(asked, bool(checked)))
                if verdict["caught"]:
                    return Outcome(mutant, name, verdict["caught"])
        return Outcome(mutant, "survived", "" if kernels else "the compiler makes the same of it")

    def _limits(self, kernels: Collection[str], checked: bool = False) -> dict[str, float]:
        """Seconds for each of the checks that run one of these kernels, the shortest first: no other can tell."""
        ran = {name: ran for name, ran in self._ran[checked].items() if not set(ran["kernels"]).isdisjoint(kernels)}
        return {name: 3 + 5 * ran[name]["seconds"] for name in sorted(ran, key=lambda name: ran[name]["seconds"])}
