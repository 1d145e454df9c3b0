"""python -m tests.cuda_on_cpu [--checked | --null]: builds the native module for the CPU; its path is the last line."""

from __future__ import annotations

import argparse

from .build import build_native


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m tests.cuda_on_cpu", description=__doc__)
    flavour = parser.add_mutually_exclusive_group()
    for name, text in (
        ("checked", "check every memory access of device code (slower)"),
        ("null", "count launches and run nothing, to measure the host's time"),
    ):
        flavour.add_argument(f"--{name}", dest="flavour", action="store_const", const=name, help=text)
    print(build_native(parser.parse_args().flavour or "plain"))


if __name__ == "__main__":
    main()
