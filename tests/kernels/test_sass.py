"""The machine code of the fast kernels, as cuobjdump shows it: 16 bytes a copy and a store, nothing in local memory,
matrix instructions where they are meant.

Where the package has no kernels there is no code, and nothing is claimed.
"""

from __future__ import annotations

import importlib.util
import re
import shutil
import subprocess
from functools import cache
from pathlib import Path

from fused_sepconv.families.depthwise import plan as depthwise
from fused_sepconv.families.mma import backward_input as mma_input
from fused_sepconv.families.mma import backward_weight as mma_weight
from fused_sepconv.families.mma import forward as mma_forward
from fused_sepconv.native import loader

LINE_BY_LINE = set(mma_input.INSTANCES)  # a warp stores a pixel's whole line of 128 bytes, a lane 4 of them
TENSOR_KERNELS = {*mma_forward.INSTANCES, *mma_weight.INSTANCES} | LINE_BY_LINE
FAST_KERNELS = {traits.name for traits in (*depthwise.ALL_TRAITS, *depthwise.PLANE_TRAITS)} | TENSOR_KERNELS

ARCHITECTURE = re.compile(r"^arch = (\S+)")
FUNCTION = re.compile(r"^\s*Function : (\S+)")
INSTRUCTION = re.compile(r"^\s*/\*[0-9a-f]+\*/\s+(?:@!?U?P\w+\s+)?([A-Z][\w.]*)")


def cuobjdump() -> str:
    """The toolkit's, or the one that comes with the triton package."""
    if found := shutil.which("cuobjdump"):
        return found
    spec = importlib.util.find_spec("triton")
    assert spec is not None, "cuobjdump is in no folder of PATH, and `pip install triton`, which has one, was not done"
    return str(Path(spec.submodule_search_locations[0]) / "backends/nvidia/bin/cuobjdump")


@cache
def opcodes() -> dict[tuple[str, str], set[str]]:
    """{(architecture, instance): its opcodes} of the fast kernels in the native module."""
    info = loader.build_info()
    if info is None or info["emulated"]:
        return {}
    instances = {instance.spelling: instance.name for instance in loader.instances().values()}
    kernels = {
        (architecture, mangled): instances[resources["name"]]
        for architecture, report in loader.resources().items()
        for mangled, resources in report.items()
        if instances.get(resources["name"]) in FAST_KERNELS
    }
    found: dict[tuple[str, str], set[str]] = {}
    architecture, current = "", None
    with subprocess.Popen([cuobjdump(), "-sass", loader.path()], stdout=subprocess.PIPE, text=True) as dump:
        for line in dump.stdout:
            if match := ARCHITECTURE.match(line):
                architecture = match[1]
            elif match := FUNCTION.match(line):
                instance = kernels.get((architecture, match[1]))
                current = found.setdefault((architecture, instance), set()) if instance else None
            elif current is not None and (match := INSTRUCTION.match(line)):
                current.add(match[1])
    assert dump.returncode == 0
    return found


def test_the_code_of_every_fast_kernel_was_found():
    expected = {(architecture, name) for architecture in loader.resources() for name in FAST_KERNELS}
    assert set(opcodes()) == expected


def test_fast_kernels_copy_and_store_16_bytes_at_a_time():
    for kernel, codes in opcodes().items():
        assert any(code.startswith("LDGSTS.E") and "128" in code.split(".") for code in codes), kernel
        if kernel[1] in LINE_BY_LINE:
            continue
        # ST: where ptxas did not see that the address is a global one.
        assert any(code.startswith(("STG.E", "ST.E")) and "128" in code.split(".") for code in codes), kernel


def test_nothing_is_kept_in_local_memory():
    for kernel, codes in opcodes().items():
        assert not {code for code in codes if code.split(".")[0] in ("LDL", "STL")}, kernel


def test_tensor_core_kernels_multiply_by_mma_from_matrices_of_shared_memory():
    for (architecture, instance), codes in opcodes().items():
        if instance not in TENSOR_KERNELS:
            continue
        # Both operands come four 8x8 matrices an instruction, 16 bytes a lane.
        shape = "1688" if instance.endswith("tf32") else "16816"
        assert any(code.startswith("HMMA") and shape in code.split(".") for code in codes), (architecture, instance)
        if instance in mma_weight.INSTANCES and shape == "1688":
            # The sum is over rows of both, and no instruction transposes what is 32 bits wide.
            assert any(code.startswith("LDS") and "64" in code.split(".") for code in codes), (architecture, instance)
        else:
            assert {code.split(".")[-1] for code in codes if code.startswith("LDSM")} == {"4"}, (architecture, instance)
