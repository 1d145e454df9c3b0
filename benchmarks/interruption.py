"""Ctrl-C and SIGTERM end a run as KeyboardInterrupt, so that what was measured until then is kept.

`timeout` sends SIGTERM, and a shell's background job ignores SIGINT unless it is asked for. Python drops an exception
that a signal raises inside a callback, as an import has them: so the wish is remembered, and asked for at each row.
"""

import signal
from types import FrameType

_asked = False


def on_signals() -> None:
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, _interrupt)


def _interrupt(number: int, frame: FrameType | None) -> None:
    global _asked
    _asked = True
    raise KeyboardInterrupt


def check() -> None:
    """Raises KeyboardInterrupt where a signal has asked for it."""
    if _asked:
        raise KeyboardInterrupt
