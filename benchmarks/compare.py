"""`bench.py compare A.json B.json`: what changed between two results."""

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from record import Row, read
from tables import factor, figure, megabytes, name_of
from terminal import Table, terminal

Key = tuple[Any, ...]

MEASURED = {"median_ms": ("ms", figure), "peak_bytes": ("peak MB", megabytes), "saved_bytes": ("kept MB", megabytes)}
"""What is compared, its heading, and how it is written."""

SETTINGS = ("fused_sepconv", "commit", "torch", "cpu", "threads")
GPU_SETTINGS = ("name", "driver", "cuda", "cudnn")


def key_of(row: Row) -> Key:
    """Equal for rows of two results that measured the same."""
    return tuple(
        row[name] for name in ("suite", "network", "case", "dtype", "layout", "batch", "pass", "impl", "device", "mode")
    )


def parse(argv: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="bench.py compare", description="What changed between two results.")
    parser.add_argument("before", type=Path, metavar="A.json")
    parser.add_argument("after", type=Path, metavar="B.json")
    parser.add_argument("--all", action="store_true", help="also rows that differ by no more than their noise")
    return parser.parse_args(argv)


def main(argv: Sequence[str]) -> int:
    """Returns 0, or 2 where a file is no result."""
    given = parse(argv)
    screen = terminal()
    try:
        before, after = read(given.before), read(given.after)
    except ValueError as error:
        screen.say(str(error))
        return 2
    for line in differences(before["env"], after["env"]):
        screen.say(line)
    old, new = ({key_of(row): row for row in result["rows"]} for result in (before, after))
    changed = [
        (old[key], new[key], name)
        for key in old
        if key in new
        for name in MEASURED
        if differs(old[key], new[key], name, given.all)
    ]
    if changed:
        screen.show(table(changed))
    for text, gone, here in (("Only in", old, new), ("Only in", new, old)):
        if missing := [key for key in gone if key not in here]:
            path = given.before if gone is old else given.after
            screen.say(f"{text} {path}: {len(missing)} rows, such as {' '.join(map(str, missing[0]))}")
    for key in old.keys() & new.keys():
        if old[key]["error"] != new[key]["error"]:
            screen.say(f"{' '.join(map(str, key))}: {old[key]['error'] or 'a time'} -> {new[key]['error'] or 'a time'}")
    same = len(old.keys() & new.keys()) - len({key_of(row) for row, _, _ in changed})
    screen.say(f"{same} of {len(old.keys() & new.keys())} common rows did not change beyond their noise.")
    return 0


def differences(before: dict[str, Any], after: dict[str, Any]) -> list[str]:
    """What is not the same about the two machines and their software, a line each."""
    pairs = [(name, before.get(name), after.get(name)) for name in SETTINGS]
    gpus = [env.get("gpu") or {} for env in (before, after)]
    pairs += [(f"GPU {name}", *(gpu.get(name) for gpu in gpus)) for name in GPU_SETTINGS]
    return [f"{name}: {old} -> {new}" for name, old, new in pairs if old != new]


def differs(old: Row, new: Row, name: str, all_of_them: bool) -> bool:
    """Whether a measured value changed: a time by more than the interquartile ranges explain."""
    if old[name] is None or new[name] is None:
        return False
    if all_of_them:
        return True
    noise = (old["iqr_ms"] + new["iqr_ms"]) / 2 if name == "median_ms" else 0
    return abs(new[name] - old[name]) > noise


def table(changed: Sequence[tuple[Row, Row, str]]) -> Table:
    """The largest change first; below 1x it is faster, or smaller, than it was."""
    lines = sorted(changed, key=lambda line: line[1][line[2]] / max(line[0][line[2]], 1e-12))
    body = []
    for old, new, name in lines:
        text, write = MEASURED[name]
        body.append(
            [
                f"{new['suite']}: {new['case']}",
                f"{new['pass']}, {new['mode']}",
                f"{new['dtype']}, {new['batch']}",
                name_of(new["impl"], new["layout"]),
                text,
                write(old[name]),
                write(new[name]),
                factor(new[name] / old[name] if old[name] else None),
            ]
        )
    return Table(
        title="Changed",
        header=["", "pass, mode", "dtype, batch", "", "", "before", "after", "after by\nbefore"],
        rows=body,
        caption="Times that differ by more than the mean of their interquartile ranges; any difference in bytes.",
    )
