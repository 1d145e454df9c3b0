"""Tables and progress on the terminal: by rich where it is installed, as plain text where it is not."""

import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from typing import NamedTuple, Protocol

REDIRECTED_WIDTH = 160
"""In characters, of what rich writes into a file or a pipe."""


class Table(NamedTuple):
    title: str
    header: Sequence[str]
    """Of each column; may have several lines."""
    rows: Sequence[Sequence[str]]
    caption: str = ""


class Progress(Protocol):
    def start(self, label: str) -> None:
        """Names what is under way."""

    def advance(self) -> None:
        """One more of the total is done."""


class Terminal(Protocol):
    def say(self, text: str) -> None: ...

    def show(self, table: Table) -> None: ...

    def progress(self, total: int) -> AbstractContextManager[Progress]: ...


def terminal() -> Terminal:
    try:
        return RichTerminal()
    except ModuleNotFoundError:
        return PlainTerminal()


class PlainTerminal:
    """Nothing but text. The progress is one line that is written over, or a line a step where that is not possible."""

    def say(self, text: str) -> None:
        print(text)

    def show(self, table: Table) -> None:
        headers = [header.split("\n") for header in table.header]
        height = max(map(len, headers))
        columns = [
            [*[""] * (height - len(header)), *header, *cells]
            for header, cells in zip(headers, zip(*table.rows, strict=True), strict=True)
        ]
        first, *others = columns
        widths = [max(map(len, column)) for column in columns]
        padded = [
            [cell.ljust(widths[0]) for cell in first],
            *([cell.rjust(width) for cell in column] for column, width in zip(others, widths[1:], strict=True)),
        ]
        lines = ["  ".join(cells) for cells in zip(*padded, strict=True)]
        rule = "-" * len(lines[0])
        print("", table.title, *lines[:height], rule, *lines[height:], rule, sep="\n")
        if table.caption:
            print(table.caption)

    @contextmanager
    def progress(self, total: int) -> Iterator[Progress]:
        yield PlainProgress(total)


class PlainProgress:
    def __init__(self, total: int) -> None:
        self._total = total
        self._done = 0
        self._started = time.monotonic()
        self._end = "\r" if sys.stderr.isatty() else "\n"

    def start(self, label: str) -> None:
        line = f"{self._done:4d} of {self._total} done, {self._left()}now {label:<20}"
        print(line, end=self._end, file=sys.stderr, flush=True)

    def _left(self) -> str:
        """The time left, if the rest goes as fast."""
        if not self._done:
            return ""
        seconds = (time.monotonic() - self._started) / self._done * (self._total - self._done)
        minutes, seconds = divmod(round(seconds), 60)
        return f"{minutes}:{seconds:02d} left, "

    def advance(self) -> None:
        self._done += 1


class RichTerminal:
    """By rich. Raises ModuleNotFoundError where that is not installed."""

    def __init__(self) -> None:
        from rich.console import Console

        self._console = Console(highlight=False, markup=False)
        if not self._console.is_terminal:
            self._console.width = REDIRECTED_WIDTH

    def say(self, text: str) -> None:
        self._console.print(text, soft_wrap=True)

    def show(self, table: Table) -> None:
        import rich.box
        import rich.table

        drawn = rich.table.Table(box=rich.box.SIMPLE_HEAD, padding=(0, 1, 0, 0), show_edge=False)
        for number, header in enumerate(table.header):
            drawn.add_column(header, justify="right" if number else "left", vertical="bottom", no_wrap=True)
        for cells in table.rows:
            drawn.add_row(*cells)
        self._console.print("", table.title, style="bold", sep="\n", soft_wrap=True)
        self._console.print(drawn, end="")
        if table.caption:
            self._console.print(table.caption, soft_wrap=True)

    @contextmanager
    def progress(self, total: int) -> Iterator[Progress]:
        import rich.progress

        columns = (
            rich.progress.TextColumn("{task.description}", markup=False),
            rich.progress.BarColumn(),
            rich.progress.MofNCompleteColumn(),
            rich.progress.TimeRemainingColumn(),
        )
        with rich.progress.Progress(*columns, console=self._console, transient=True) as bar:
            yield RichProgress(bar, bar.add_task("", total=total))


class RichProgress:
    def __init__(self, bar: object, task: int) -> None:
        self._bar = bar
        self._task = task

    def start(self, label: str) -> None:
        self._bar.update(self._task, description=f"{label:<20}")

    def advance(self) -> None:
        self._bar.advance(self._task)
