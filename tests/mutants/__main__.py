"""python -m tests.mutants: plants every bug that `mutate.py` can make in the kernels, and counts those that are seen.

Some 700 mutants take about half an hour on two cores. The exit status is 1 where fewer than 95 % of those that are not
equivalent are caught, or where one survives that explained.py does not explain.
"""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
from collections import Counter
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path
from queue import SimpleQueue

from .explained import explanation, is_equivalent
from .judge import Judge
from .mutate import Mutant, all_mutants, sample
from .trial import CAUGHT_BY, Outcome, Trials

WANTED = 0.95
COLUMNS = ("mutants", *CAUGHT_BY, "equivalent", "survived", "caught")


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.mutants", description=__doc__)
    parser.add_argument("--file", nargs="+", default=[""], help="only kernel files whose name contains one of these")
    parser.add_argument("--kind", help="only this kind of mutant")
    parser.add_argument("--sample", type=int, metavar="N", help="only N of them")
    parser.add_argument("--seed", type=int, default=0, help="which N")
    parser.add_argument("--jobs", type=int, default=os.cpu_count(), help="trials side by side (default: one a core)")
    parser.add_argument("--list", action="store_true", help="only print the mutants")
    arguments = parser.parse_args()

    with tempfile.TemporaryDirectory(prefix="mutants-") as folder:
        trials = None if arguments.list else Trials(Path(folder))
        mutants = [
            mutant
            for mutant in all_mutants(trials.scratch.pristine if trials else Path(__file__).parents[2])
            if any(part in mutant.file for part in arguments.file) and arguments.kind in (None, mutant.kind)
        ]
        if arguments.sample is not None:
            mutants = sample(mutants, arguments.sample, arguments.seed)
        if trials is None:
            print(*mutants, sep="\n")
            return 0
        outcomes = []
        for outcome in _all_outcomes(trials, mutants, arguments.jobs):
            outcomes.append(outcome)
            print(f"[{len(outcomes):{len(str(len(mutants)))}}/{len(mutants)}] {_line(outcome)}", flush=True)
    return _report(outcomes)


def _all_outcomes(trials: Trials, mutants: Sequence[Mutant], jobs: int) -> Iterator[Outcome]:
    """The outcomes as they come, `jobs` trials side by side."""
    places: SimpleQueue[tuple[str, Judge]] = SimpleQueue()
    judges = [trials.judge() for _ in range(jobs)]
    for number, judge in enumerate(judges):
        places.put((f"mutant{number}", judge))

    def run(mutant: Mutant) -> Outcome:
        copy, judge = places.get()
        try:
            return trials.run(mutant, judge, copy)
        finally:
            places.put((copy, judge))

    with ThreadPoolExecutor(jobs) as pool:
        for future in as_completed([pool.submit(run, mutant) for mutant in mutants]):
            yield future.result()
    for judge in judges:
        judge.close()


def _line(outcome: Outcome) -> str:
    end = f"caught {outcome.end}" if outcome.end in CAUGHT_BY else outcome.end
    why = next((line for line in outcome.why.splitlines() if outcome.end in CAUGHT_BY or "error:" in line), "")
    return f"{end:14} {outcome.mutant}" + (f"  <- {why}" if why else "")


def _report(outcomes: Sequence[Outcome]) -> int:
    """Prints the figures and the survivors; gives the exit status."""
    judged = [outcome for outcome in outcomes if outcome.end != "no program"]
    survivors = [outcome.mutant for outcome in judged if outcome.end == "survived"]

    print("\n" + " " * 12 + "".join(f"{column:>12}" for column in COLUMNS))
    for kind in (*sorted({outcome.mutant.kind for outcome in judged}), "all"):
        ends = Counter(
            "equivalent" if outcome.end == "survived" and is_equivalent(outcome.mutant) else outcome.end
            for outcome in judged
            if kind in (outcome.mutant.kind, "all")
        )
        caught = sum(ends[name] for name in CAUGHT_BY)
        share = caught / max(ends.total() - ends["equivalent"], 1)  # of those that could be caught
        figures = (ends.total(), *(ends[name] for name in COLUMNS[1:-1]), f"{share:.1%}")
        print(f"{kind:12}" + "".join(f"{figure:>12}" for figure in figures))
    print(f"\n{len(outcomes) - len(judged)} more were no programs. What was not caught:")
    for mutant in survivors:
        print(f"  {mutant}\n      {explanation(mutant) or 'NOT EXPLAINED'}")
    return 0 if share >= WANTED and all(map(explanation, survivors)) else 1


if __name__ == "__main__":
    sys.exit(main())
