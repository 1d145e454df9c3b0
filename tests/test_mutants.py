"""That the tests see what they are meant to see: a dozen bugs planted in the kernels are caught, each of them.

The dozen is drawn from what `python -m tests.mutants` goes through whole.
"""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.cuda_on_cpu.build import ROOT
from tests.mutants.explained import EXPLAINED, explanation
from tests.mutants.judge import Judge
from tests.mutants.mutate import KERNELS, Mutant, all_mutants, mutants_of, sample
from tests.mutants.trial import CAUGHT_BY, Trials

MUTANTS = all_mutants(ROOT)
DOZEN = sample([mutant for mutant in MUTANTS if not explanation(mutant)], 12, seed=3)


@pytest.fixture(scope="module")
def trials(tmp_path_factory: pytest.TempPathFactory) -> Trials:
    return Trials(tmp_path_factory.mktemp("mutants"))


@pytest.fixture(scope="module")
def judge(trials: Trials) -> Iterator[Judge]:
    with trials.judge() as judge:
        yield judge


@pytest.mark.parametrize("mutant", DOZEN, ids=lambda mutant: f"{mutant.file}:{mutant.line}-{mutant.kind}")
def test_a_planted_bug_is_caught(trials: Trials, judge: Judge, mutant: Mutant) -> None:
    outcome = trials.run(mutant, judge)
    assert outcome.end in CAUGHT_BY, outcome


def test_what_judges_them_executes_every_instance(trials: Trials) -> None:
    assert trials.unused == []


@pytest.mark.parametrize("wrong, seen", [("__builtin_abort();", "crash"), ('for (;;) asm volatile("");', "time-out")])
def test_a_crash_and_an_endless_loop_are_caught(trials: Trials, judge: Judge, wrong: str, seen: str) -> None:
    text = (trials.scratch.pristine / KERNELS / "reduce_splits.cuh").read_text()
    start = text.index("{", text.index("FSC_KERNEL(")) + 1
    outcome = trials.run(Mutant("reduce_splits.cuh", 0, "planted", start, "", wrong, wrong), judge)
    assert outcome.end == "plain"
    assert outcome.why.startswith(seen)


def test_every_kind_and_file_has_mutants() -> None:
    assert {mutant.file for mutant in MUTANTS} == {path.name for path in (ROOT / KERNELS).glob("*.cuh")}
    assert {mutant.kind for mutant in DOZEN} == {mutant.kind for mutant in MUTANTS}


def test_names_tell_mutants_apart() -> None:
    assert len({(mutant.file, mutant.name) for mutant in MUTANTS}) == len(MUTANTS)


def test_what_is_explained_exists() -> None:
    names = {(mutant.file, mutant.name) for mutant in MUTANTS}
    assert [key for key in EXPLAINED if key not in names] == []


KERNEL = """\
// a < b in a comment
template <class Traits>
FSC_KERNEL(Traits::kThreads, 4)
simt_copy(const FSC_CONST_PARAM Params params, int kh, int kw) {
  static_assert(kRows == 64, "a < b");
  constexpr int kSide = kRows / 4;
  for (int i = threadIdx.x; i < params.count; i += kSide) {
    if (i < 0 || kh >= shape.H) continue;
    shared[i] = i < end ? activate(shape.activation, f<a, b>(i, n)) : Compute(0);
    __syncthreads();
    sum += shared[i - 1] * kh;
  }
}
"""


def test_the_rules_on_a_small_kernel() -> None:
    changes = {(mutant.kind, mutant.original, mutant.replacement) for mutant in mutants_of("copy.cuh", KERNEL)}
    assert changes == {
        ("start", "threadIdx.x", "1 + (threadIdx.x)"),
        ("short", " < ", " + 1 < "),
        ("stride", "kSide", "2 * (kSide)"),
        ("boundary", "<", "<="),
        ("boundary", ">=", ">"),
        ("guard", "i < 0", "false"),
        ("guard", "kh >= shape.H", "false"),
        ("guard", "i < end", "true"),
        ("twin", "H", "W"),
        ("twin", "kh", "kw"),
        ("twin", "activation", "pre_activation"),
        ("statement", "shared[i] = i < end ? activate(shape.activation, f<a, b>(i, n)) : Compute(0);", ";"),
        ("bypass", "activate(shape.activation, f<a, b>(i, n))", "(f<a, b>(i, n))"),
        ("constant", "0", "0 + 1"),
        ("barrier", "__syncthreads();", ";"),
        ("statement", "sum += shared[i - 1] * kh;", ";"),
        ("accumulate", "+=", "="),
        ("term", " - 1", ""),
        ("term", " * kh", ""),
    }


def test_a_mutant_is_the_text_with_its_change_alone() -> None:
    (barrier,) = (mutant for mutant in mutants_of("copy.cuh", KERNEL) if mutant.kind == "barrier")
    assert barrier.line == 10
    assert barrier.apply(KERNEL) == KERNEL.replace("__syncthreads()", "")


def test_a_name_does_not_hang_on_line_breaks() -> None:
    broken = KERNEL.replace(" ? ", "\n        ? ").replace(" || ", " ||\n        ")
    assert [mutant.name for mutant in mutants_of("a", broken)] == [mutant.name for mutant in mutants_of("a", KERNEL)]
