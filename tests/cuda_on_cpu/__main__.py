"""python -m tests.cuda_on_cpu [--checked]: builds the emulated native module; its path is the last line printed."""

from __future__ import annotations

import argparse

from .build import build_native


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m tests.cuda_on_cpu", description=__doc__)
    parser.add_argument("--checked", action="store_true", help="check every memory access of device code (slower)")
    print(build_native(checked=parser.parse_args().checked))


if __name__ == "__main__":
    main()
