"""Makes mutants: one small wrong change each, by rules that know C++'s punctuation and the words of this project.

No kernel is named here, so a new one in csrc/kernels is mutated as the others are. The rules read formatted text: a
binary operator has a space on both sides, which tells it from a template's bracket, a pointer's star and a sign.

| kind       | what is done, each place in turn |
|------------|----------------------------------|
| barrier    | a barrier, or a wait for copies, is left out |
| boundary   | `<` for `<=`, `>` for `>=`, `==` for `!=`, and the other way round |
| short      | a loop ends one early |
| start      | a loop starts one late, a sum starts at 1 |
| stride     | a loop takes twice the step |
| guard      | a condition lets everything through |
| term       | `+ b`, `- b`, `* b`, `/ b` or `% b` is left out |
| twin       | another member or function of the same type: `kw` for `kh`, `shape.W` for `shape.H`, `row` for `column` |
| bypass     | an activation, or its derivative, is not applied |
| accumulate | `=` for `+=` |
| statement  | an assignment is left out |
| constant   | a number that is compared with or chosen is one more: zero filling fills with ones |

Tile sizes and the widths of integers are left alone: any consistent tile is right, and only tensors of gigabytes tell a
narrow integer from a wide one.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path

KERNELS = Path("csrc/kernels")

BARRIER = re.compile(r"\b(?:__sync\w+|barrier_\w+|cluster_sync|async_copy_wait(?:<[^;>]*>)?|\w+_wait)\([^;{}]*\);")

# What stands for what: in a row, each for the next one.
TWINS = (
    ("kh", "kw"),
    ("tap_row", "tap_column"),
    (".H", ".W"),
    (".oh", ".ow"),
    (".out_h", ".out_w"),
    (".kernel_h", ".kernel_w"),
    (".stride_h", ".stride_w"),
    (".stride_n", ".stride_c"),
    (".dilation_h", ".dilation_w"),
    (".pad_top", ".pad_left"),
    (".row", ".column"),
    (".C", ".K", ".F"),
    (".a", ".b"),
    (".pre_activation", ".mid_activation", ".activation"),
    ("first_channel", "first_feature"),
)

# Functions that change a value and could be forgotten, with the place of the value among their arguments.
VALUE_ARGUMENT = {"activate": 1, "differentiate": 1, "through_mid_activation": 3}

BOUNDARY = {"<": "<=", "<=": "<", ">": ">=", ">=": ">", "==": "!=", "!=": "=="}


@dataclass(frozen=True)
class Mutant:
    """One change of one kernel file. `name` tells it from all others of the file, whatever the file's line breaks."""

    file: str  # in csrc/kernels
    line: int
    kind: str
    start: int
    original: str
    replacement: str
    name: str

    def __str__(self) -> str:
        return f"{self.file}:{self.line} {self.kind}: {self.name}"

    def apply(self, text: str) -> str:
        end = self.start + len(self.original)
        assert text[self.start : end] == self.original, f"{self.file} has changed under {self}"
        return text[: self.start] + self.replacement + text[end:]


def all_mutants(root: Path) -> list[Mutant]:
    """The mutants of every kernel of the checkout (or a copy of it) at `root`, in the order of the text."""
    return [
        mutant for path in sorted((root / KERNELS).glob("*.cuh")) for mutant in mutants_of(path.name, path.read_text())
    ]


def mutants_of(file: str, text: str) -> list[Mutant]:
    code = masked(text)
    changes = sorted({change for rule in RULES for change in rule(code)})
    seen: Counter[str] = Counter()
    mutants = []
    for start, end, kind, replacement in changes:
        name = _in_context(code, start, end, replacement)
        seen[name] += 1
        if seen[name] > 1:
            name += f" #{seen[name]}"
        line = text.count("\n", 0, start) + 1
        mutants.append(Mutant(file, line, kind, start, text[start:end], replacement, name))
    return mutants


# ---- reading the text

_NOT_CODE = re.compile(
    r"//[^\n]*|/\*.*?\*/|\"(?:\\.|[^\"\\\n])*\"|^[ \t]*#[^\n]*"  # comments, strings, directives
    r"|\bstatic_assert\s*\([^;]*;|\btemplate <[^;{}]*?>\n|\b(?:static )?constexpr (?!\()[^;{}]*;|\busing [^;]*;"
    r"|\bFSC_KERNEL\([^)]*\)",
    re.DOTALL | re.MULTILINE,
)


def masked(text: str) -> str:
    """The text with everything blank that no rule may touch; every character stays where it is."""
    return _NOT_CODE.sub(lambda match: re.sub(r"[^\n]", " ", match.group()), text)


Change = tuple[int, int, str, str]
"""First and one past the last character, kind, replacement."""

_OPENING, _CLOSING = "([{", ")]}"


def _scan(code: str, at: int, step: int, stop: re.Pattern[str]) -> int:
    """From `at` on in steps of 1 or -1 to what `stop` matches outside of brackets, or to a bracket that encloses."""
    depth = 0
    opening, closing = (_OPENING, _CLOSING) if step > 0 else (_CLOSING, _OPENING)
    while 0 <= at < len(code):
        if code[at] in opening:
            depth += 1
        elif code[at] in closing:
            if depth == 0:
                return at
            depth -= 1
        elif depth == 0 and stop.match(code, at):
            return at
        at += step
    return at


def _strip(code: str, start: int, end: int) -> tuple[int, int]:
    """The span without the spaces at its ends."""
    piece = code[start:end]
    return start + len(piece) - len(piece.lstrip()), end - len(piece) + len(piece.rstrip())


def _closing(code: str, opening: int) -> int:
    """Where the bracket that opens at `opening` closes."""
    return _scan(code, opening + 1, 1, re.compile(r"(?!)"))


def _statement(code: str, start: int, end: int) -> tuple[int, int]:
    """The text between the semicolons and braces around a span."""
    first = max(code.rfind(mark, 0, start) for mark in ";{}") + 1
    last = min((at for mark in ";{}" if (at := code.find(mark, end)) >= 0), default=len(code))
    return _strip(code, min(first, start), max(last, end))


def _in_context(code: str, start: int, end: int, replacement: str, width: int = 28) -> str:
    """The statement in one line with the change marked in it: `k {< -> <=} shape.K`."""
    first, last = _statement(code, start, end)
    parts = (code[first:start], code[start:end], code[end:last], replacement)
    before, old, after, new = (re.sub(r"\s+", " ", part) for part in parts)
    before = before if len(before) <= width else "…" + before[-width:]
    after = after if len(after) <= width else after[:width] + "…"
    return f"{before}{{{old.strip()} -> {new.strip()}}}{after}"


_OPERAND_END = re.compile(r"&&|\|\||\?|[;,]|(?<!:):(?!:)|(?<![=!<>])=(?!=)|\breturn\b")
_COMPARISON = re.compile(r"(?<=\s)(<=|>=|==|!=|<|>)(?=\s)")
_FLAG = re.compile(r"(?<=\w = )(?!nullptr)[a-z_]\w*(?=\s+(?:\?|&&)\s)|(?<=\bif \()[a-z_]\w*(?=\)| &&)")


def _comparisons(code: str) -> Iterator[tuple[int, int, re.Match[str]]]:
    """Every comparison with its two operands: first character, one past the last, operator."""
    for match in _COMPARISON.finditer(code):
        start = _scan(code, match.start() - 1, -1, _OPERAND_END)
        keyword = _OPERAND_END.match(code, start)
        if keyword and code[start] not in _OPENING:
            start += len(keyword.group()) - 1
        end = _scan(code, match.end(), 1, _OPERAND_END)
        yield *_strip(code, start + 1, end), match


def _header_around(code: str, at: int, word: str) -> int:
    """Where the bracket of the `for (` or `if (` opens that `at` stands in; -1 if in none."""
    while (opening := _scan(code, at - 1, -1, re.compile(r"[{}]"))) >= 0 and code[opening] == "(":
        if re.search(rf"\b{word}\s*(?:constexpr\s*)?$", code[:opening]):
            return opening
        at = opening
    return -1


# ---- the rules


def _barriers(code: str) -> Iterator[Change]:
    for match in BARRIER.finditer(code):
        yield match.start(), match.end(), "barrier", ";"


def _boundaries(code: str) -> Iterator[Change]:
    for _, _, match in _comparisons(code):
        yield match.start(), match.end(), "boundary", BOUNDARY[match.group()]


def _guards(code: str) -> Iterator[Change]:
    conditions = [(start, end) for start, end, _ in _comparisons(code)] + [m.span() for m in _FLAG.finditer(code)]
    for start, end in conditions:
        if _header_around(code, start, "for") >= 0:
            continue  # a loop that never ends shows nothing but the time-out
        opening = _header_around(code, start, "if")
        leaves = opening >= 0 and re.match(r"\)\s*(?:continue|return|break)\b", code[_closing(code, opening) :])
        either = re.match(r"\s*\|\|", code[end:]) or re.search(r"\|\|\s*$", code[:start])
        yield start, end, "guard", "false" if leaves or either else "true"


def _loops(code: str) -> Iterator[Change]:
    for match in re.finditer(r"\bfor \(", code):
        opening = match.end() - 1
        closing = _closing(code, opening)
        parts = code[opening + 1 : closing].split(";")
        if len(parts) != 3:
            continue
        first, condition = opening + 1, opening + 2 + len(parts[0])
        begin = first + parts[0].index("= ") + 2
        yield begin, condition - 1, "start", f"1 + ({code[begin : condition - 1]})"
        if less := re.search(r" < ", parts[1]):
            at = condition + less.start()
            yield at, at + 3, "short", " + 1 < "
        if step := re.search(r" \+= ", parts[2]):
            at = condition + len(parts[1]) + 1 + step.end()
            yield at, closing, "stride", f"2 * ({code[at:closing]})"
    for match in re.finditer(r"(?<=\w = )[01](?=;)", code):
        if _header_around(code, match.start(), "for") < 0:
            yield *match.span(), "start", str(int(match.group()) + 1)


_TERM = re.compile(r"[\w.:]+(?:<[\w:, ]+>)?")


def _end_of_term(code: str, at: int) -> int:
    """Past a name, number or bracketed expression with the calls and subscripts that follow it."""
    match = _TERM.match(code, at)
    at = match.end() if match else at
    while at < len(code) and code[at] in "([.":
        at = _closing(code, at) + 1 if code[at] in "([" else _TERM.match(code, at).end()
    return at


def _terms(code: str) -> Iterator[Change]:
    for match in re.finditer(r"(?<=[\w)\]])\s([-+*/%])\s+(?=[\w(])", code):
        end = _end_of_term(code, match.end())
        if match.group(1) in "+-":
            while product := re.compile(r"\s[*/%]\s+(?=[\w(])").match(code, end):
                end = _end_of_term(code, product.end())
        yield match.start(), end, "term", ""


def _twins(code: str) -> Iterator[Change]:
    for row in TWINS:
        for name, twin in zip(row, (*row[1:], row[0]), strict=True):
            is_member = name.startswith(".")
            pattern = rf"(?<=\.){name[1:]}\b(?!\()" if is_member else rf"(?<![\w.]){name}\b"
            for match in re.finditer(pattern, code):
                if is_member or _may_stand_at(code, twin, match.start()):
                    yield *match.span(), "twin", twin.removeprefix(".")


def _may_stand_at(code: str, name: str, at: int) -> bool:
    """Whether a name in place of that at `at` would compile, and would neither declare anything nor count a loop."""
    if re.search(r"\b(?:int|int32_t|int64_t|auto) $", code[:at]) or _header_around(code, at, "for") >= 0:
        return False
    function = code.rfind("\n}", 0, at) + 1
    return code[at:].lstrip("abcdefghijklmnopqrstuvwxyz_")[0] == "(" or bool(
        re.search(rf"\b{name}\b", code[function:at])
    )


def _bypasses(code: str) -> Iterator[Change]:
    for name, place in VALUE_ARGUMENT.items():
        for match in re.finditer(rf"\b{name}(?:<[\w, ]+>)?\(", code):
            closing = _closing(code, match.end() - 1)
            if re.match(r"\)\s*\{", code[closing:]):
                continue  # its definition
            yield match.start(), closing + 1, "bypass", f"({_arguments(code, match.end(), closing)[place]})"


def _arguments(code: str, start: int, end: int) -> list[str]:
    """What the commas outside of brackets separate, template brackets included."""
    arguments = []
    while start < end:
        comma = start
        while (comma := _scan(code, comma, 1, re.compile(","))) < end:
            if (argument := code[start:comma]).count("<") == argument.count(">"):
                break
            comma += 1
        arguments.append(code[start:comma].strip())
        start = comma + 1
    return arguments


_CONTROL = re.compile(r"\s*(?:FSC_UNROLL\b|else\b|case [\w:]+:|(?:for|if(?: constexpr)?) (?=\())")
_ASSIGNS = re.compile(r"(?:(?<=\s)[-+*/]=|(?<=\s)=)(?=\s)")


def _statements(code: str) -> Iterator[Change]:
    for match in re.finditer(r"[;{}]", code):
        start = match.end()
        while control := _CONTROL.match(code, start):
            start = control.end()
            if code[start] == "(":
                start = _closing(code, start) + 1
        end = code.find(";", start)
        start, _ = _strip(code, start, max(end, start))
        if end < 0 or re.search(r"[{}]", code[start:end]) or _header_around(code, start, "for") >= 0:
            continue
        operator = _scan(code, start, 1, _ASSIGNS)
        assigns = _ASSIGNS.match(code, operator)
        if operator >= end or not assigns:
            continue
        target = re.sub(r"<[^<>;]*>|\([^;]*\)|\[[^;]*\]", "", code[start:operator]).strip()
        if re.search(r"\s", target):
            continue  # a declaration: type and name
        yield start, end + 1, "statement", ";"
        if assigns.group() == "+=":
            yield operator, assigns.end(), "accumulate", "="


def _constants(code: str) -> Iterator[Change]:
    for match in re.finditer(r"(?<=[<>=?:] )Compute\((-?[\d.]+)\)", code):
        yield match.start(1), match.end(1), "constant", f"{match.group(1)} + 1"


RULES = (_barriers, _boundaries, _guards, _loops, _terms, _twins, _bypasses, _statements, _constants)


def sample(mutants: list[Mutant], count: int, seed: int) -> list[Mutant]:
    """So many of them, in the order of the text: the choice is by chance, but every kind and file gets its turn.

    The place of a mutant in the draw is its own: a change of one kernel leaves most of what is drawn of the others.
    """
    shuffled = sorted(mutants, key=lambda mutant: sha256(f"{seed} {mutant.file} {mutant.name}".encode()).digest())
    taken: list[Mutant] = []
    while shuffled and len(taken) < count:
        kinds, files = Counter(m.kind for m in taken), Counter(m.file for m in taken)
        taken.append(min(shuffled, key=lambda mutant: (kinds[mutant.kind], files[mutant.file])))
        shuffled.remove(taken[-1])
    return [mutant for mutant in mutants if mutant in taken]
