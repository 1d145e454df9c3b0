"""One mutant on trial: built and judged plain, and where that shows nothing, checked."""

from __future__ import annotations

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
        kernels = self.scratch.kernels_with(mutant.file)
        for checked, name in enumerate(CAUGHT_BY):
            try:
                native = self.scratch.build(root, bool(checked))
            except DoesNotCompile as error:
                return Outcome(mutant, "no program", str(error))
            if self.scratch.has_the_same_code(root, kernels):
                return Outcome(mutant, "survived", "the compiler makes the same of it")
            verdict = judge.judge(native, bool(checked), self._limits(kernels, bool(checked)))
            if verdict["caught"]:
                return Outcome(mutant, name, verdict["caught"])
        return Outcome(mutant, "survived")

    def _limits(self, kernels: frozenset[str], checked: bool) -> dict[str, float]:
        """Seconds for each of the checks that run one of these kernels, the shortest first: no other can differ."""
        seconds = {name: ran["seconds"] for name, ran in self._ran[checked].items() if kernels & set(ran["kernels"])}
        return {name: 3 + 5 * seconds[name] for name in sorted(seconds, key=seconds.__getitem__)}
