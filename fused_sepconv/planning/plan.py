"""From a problem to a plan: which kernel runs, why, and what it is expected to cost. Pure: no GPU, no native module.

`plan(problem, device, kernels)` asks every family in `families/` for its candidates, PyTorch's own two convolutions
among them. A candidate that can't run carries its `refusal`. The fastest predicted one that can is chosen.

Predictions rank the candidates, and no more is asked of them, as the choice is measured on the user's GPU. They count
device bytes, flop, whole waves of blocks and launches. The shares of a ceiling that kernels reach are assumed until
`benchmarks/first_minutes.py --apply` puts measured ones in their place; each says so where it stands.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import lru_cache

from fused_sepconv.families import joins
from fused_sepconv.families.depthwise import plan as depthwise
from fused_sepconv.families.mma import backward as mma_backward
from fused_sepconv.families.mma import backward_input as mma_input
from fused_sepconv.families.mma import backward_weight as mma_weight
from fused_sepconv.families.mma import forward as mma_forward
from fused_sepconv.families.mma import nchw as mma_nchw
from fused_sepconv.families.pytorch import plan as pytorch
from fused_sepconv.families.simt import plan as simt
from fused_sepconv.families.split import plan as split
from fused_sepconv.planning.devices import Device
from fused_sepconv.planning.problem import Candidate, DepthwiseProblem, Kernels, Problem

FAMILIES = (pytorch, simt, split, mma_forward, mma_backward, mma_nchw)
SAVING_FAMILIES = (pytorch, split)
"""The families whose forward has the depthwise result in memory, and can give it to the backward."""

INSTANCES = {
    **simt.INSTANCES,
    **depthwise.INSTANCES,
    **mma_forward.INSTANCES,
    **mma_weight.INSTANCES,
    **mma_input.INSTANCES,
    **joins.INSTANCES,
}
"""Every kernel of a complete native module, by name."""


@dataclass(frozen=True)
class Plan:
    """All candidates of a problem on a device, the fastest predicted first, those that can't run last.

    Where nothing is known of the device's speed, PyTorch's own convolutions come first: a well-kept library. Where
    some were measured (`choice.py`), they come first, by what they took.
    """

    problem: Problem | DepthwiseProblem
    device: Device
    candidates: tuple[Candidate, ...]

    @property
    def chosen(self) -> Candidate:
        """The candidate that "auto" runs."""
        return self.candidates[0]

    @property
    def floor_seconds(self) -> float:
        """Seconds that no kernel could beat on this device."""
        return self.problem.floor_seconds(self.device)

    def choose(self, backend: str, family: str | None = None) -> Candidate:
        """The candidate that a backend runs; under "fused" a RuntimeError with the reasons where no kernel can.

        With `family`, "fused" runs that family's kernels where one of them can.
        """
        if backend == "auto":
            return self.chosen
        for candidate in sorted(self._able(backend), key=lambda candidate: candidate.family != family):
            return candidate
        reasons = "; ".join(dict.fromkeys(c.refusal for c in self.candidates if c.refusal))
        raise RuntimeError(f'use_backend("fused"): no kernel runs {self.problem}: {reasons}')

    def runs(self, backend: str) -> bool:
        """Whether a backend has something that runs the problem."""
        return backend == "auto" or bool(self._able(backend))

    def _able(self, backend: str) -> list[Candidate]:
        reference = backend == "reference"
        return [c for c in self.candidates if (c.family == "pytorch") == reference and not c.refusal]

    def _why(self, candidate: Candidate) -> str:
        """The bound of a candidate, and how far behind the chosen one that leaves it."""
        if candidate is self.chosen:
            return f"; bound by {candidate.bound}"
        times = [
            c.predicted_seconds if c.measured_seconds is None else c.measured_seconds for c in (candidate, self.chosen)
        ]
        return f"; {times[0] / times[1]:.2f} times as long: bound by {candidate.bound}"

    def __str__(self) -> str:
        lines = [f"{self.problem} on {self.device.name}"]
        if self.device.source:
            lines[0] += f": floor {self.floor_seconds * 1e6:.1f} us"
        for candidate in self.candidates:
            mark = "->" if candidate is self.chosen else "  "
            measured = candidate.measured_seconds
            if not candidate.refusal and not self.device.source:
                lines.append(f"  {mark} {candidate.name}: runs (no figures of this device to predict from)")
            elif candidate.refusal:
                lines.append(f"  {mark} {candidate.name}: can't run: {candidate.refusal}")
            elif candidate.excluded:
                lines.append(f"  {mark} {candidate.name}: excluded on this device: {candidate.excluded}")
            else:
                lines.append(
                    f"  {mark} {candidate.name}: "
                    + ("" if measured is None else f"measured {measured * 1e6:.1f} us, ")
                    + f"predicted {candidate.predicted_seconds * 1e6:.1f} us, "
                    f"{candidate.bytes / 1e6:.1f} MB, {candidate.flops / 1e9:.2f} Gflop"
                    + (f", {candidate.blocks} blocks in {candidate.waves:.2f} waves" if candidate.blocks else "")
                    + self._why(candidate)
                    + (f"; {candidate.note}" if candidate.note else "")
                )
        return "\n".join(lines)


@lru_cache(maxsize=4096)
def plan(problem: Problem | DepthwiseProblem, device: Device, kernels: Kernels) -> Plan:
    """The plan of a problem; never empty, as PyTorch's own convolutions run every valid one."""
    if isinstance(problem, DepthwiseProblem):
        families: tuple = (depthwise,)
    else:
        families = SAVING_FAMILIES if problem.saved and problem.direction == "forward" else FAMILIES
    candidates = [candidate for family in families for candidate in family.candidates(problem, device, kernels)]
    if device.source:
        candidates.sort(key=lambda candidate: (bool(candidate.refusal), candidate.predicted_seconds))
    return Plan(problem, device, tuple(candidates))


def saving_pays(forward: Problem, device: Device, kernels: Kernels, backend: str, family: str | None = None) -> bool:
    """Whether a training step is faster where the forward gives the depthwise result to the backward, by prediction.

    Only where the backward would run the depthwise forward again. `family` as in `Plan.choose`.
    """
    backward = replace(forward, direction="backward")
    plans = [plan(problem, device, kernels) for problem in (forward, backward)]
    saving = [plan(replace(problem, saved=True), device, kernels) for problem in (forward, backward)]
    if not all(p.runs(backend) for p in (*plans, *saving)):  # "fused", and no kernel that leaves the result in memory
        return False
    without, kept = ([p.choose(backend, family) for p in pair] for pair in (plans, saving))
    if not without[1].recomputes:
        return False
    return sum(c.predicted_seconds for c in kept) < sum(c.predicted_seconds for c in without)
