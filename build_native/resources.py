"""Reads what `ptxas -v` says about every kernel: registers, spills, stack, shared and constant memory."""

from __future__ import annotations

import re
import shutil
import subprocess
from collections.abc import Iterable

ENTRY = re.compile(r"Compiling entry function '(?P<kernel>[^']+)' for '(?P<architecture>[^']+)'")
PROPERTIES = re.compile(r"Function properties for (?P<function>\S+)")
STACK = re.compile(r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads")
USED = re.compile(r"Used (\d+) registers(?P<rest>.*)")
SHARED = re.compile(r"(\d+) bytes smem")
CONSTANT = re.compile(r"(\d+) bytes cmem\[\d+\]")

Report = dict[str, dict[str, dict[str, "int | str"]]]


def parse_ptxas(text: str) -> Report:
    """{architecture: {mangled kernel name: resources}} from one compiler's output.

    Functions that are called rather than inlined have properties of their own, which are not a kernel's.
    """
    report: Report = {}
    kernel = function = ""
    resources: dict[str, int | str] = {}
    for line in text.splitlines():
        if entry := ENTRY.search(line):
            kernel = function = entry["kernel"]
            resources = report.setdefault(entry["architecture"], {}).setdefault(kernel, {"name": kernel})
        elif properties := PROPERTIES.search(line):
            function = properties["function"]
        elif (stack := STACK.search(line)) and function == kernel:
            resources["stack"], resources["spill_stores"], resources["spill_loads"] = map(int, stack.groups())
        elif used := USED.search(line):
            resources["registers"] = int(used[1])
            resources["static_shared"] = sum(map(int, SHARED.findall(used["rest"])))
            if constant := CONSTANT.findall(used["rest"]):  # ptxas does not say for sm_90 and newer
                resources["constant"] = sum(map(int, constant))
    return report


def merge(reports: Iterable[Report]) -> Report:
    """One report of those of several sources."""
    merged: Report = {}
    for report in reports:
        for architecture, kernels in report.items():
            merged.setdefault(architecture, {}).update(kernels)
    return merged


def add_readable_names(report: Report) -> None:
    """Sets each kernel's `name` to its C++ spelling; it stays mangled where the machine has no c++filt."""
    mangled = sorted({name for kernels in report.values() for name in kernels})
    if not mangled or shutil.which("c++filt") is None:
        return
    run = subprocess.run(["c++filt"], input="\n".join(mangled), capture_output=True, text=True, check=True)
    readable = dict(zip(mangled, run.stdout.splitlines(), strict=True))
    for kernels in report.values():
        for name, resources in kernels.items():
            resources["name"] = readable[name]
