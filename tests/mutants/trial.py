"""One mutant on trial: built and judged plain, and where that shows nothing, checked."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from .judge import Judge
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
    """What the trials of all mutants share: the copies, and how long the unbroken kernels take."""

    def __init__(self, folder: Path) -> None:
        self.scratch = Scratch(folder)
        self.unused: list[str] = []  # instances that the judge never runs: their mutants would seem to survive
        self._limits: dict[bool, float] = {}
        with self.judge() as judge:
            for checked, native in self.scratch.native.items():
                verdict = judge.judge(native, seconds=600)
                if verdict["caught"]:
                    raise RuntimeError(f"the kernels are wrong before they are mutated: {verdict['caught']}")
                self.unused = verdict["unused"]
                self._limits[checked] = 3 + 5 * verdict["seconds"]

    def judge(self) -> Judge:
        return Judge(self.scratch.pristine)

    def run(self, mutant: Mutant, judge: Judge, copy: str = "mutant") -> Outcome:
        """Trials that run side by side need a judge and a copy of their own each."""
        root = self.scratch.copy(copy, mutant)
        for checked, name in enumerate(CAUGHT_BY):
            try:
                native = self.scratch.build(root, bool(checked))
            except DoesNotCompile as error:
                return Outcome(mutant, "no program", str(error))
            verdict = judge.judge(native, self._limits[bool(checked)])
            if verdict["caught"]:
                return Outcome(mutant, name, verdict["caught"])
        return Outcome(mutant, "survived")
