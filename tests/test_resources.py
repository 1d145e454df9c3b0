"""What the compiler gave each kernel, on every architecture it was compiled for: the report that the build leaves.

Where the package has no kernels there is no report, and nothing is claimed.
"""

from __future__ import annotations

from fused_sepconv import _native
from fused_sepconv.plan import INSTANCES

REGISTERS_OF_AN_SM = 65_536

# Blocks an SM that the kernels' launch bounds ask for; all have 256 threads.
BLOCKS = {"simt_forward": 2, "simt_backward_intermediate": 2, "simt_backward_pointwise_weight": 2}
OTHER_BLOCKS = 4


def kernels() -> list[tuple[str, str, dict]]:
    """(architecture, kernel, its resources)"""
    return [
        (architecture, resources["name"], resources)
        for architecture, report in _native.resources().items()
        for resources in report.values()
    ]


def test_there_is_a_report_where_there_are_kernels():
    info = _native.build_info()
    assert bool(_native.resources()) == (info is not None and not info["emulated"])


def test_every_instance_was_compiled_for_every_architecture():
    for architecture, report in _native.resources().items():
        assert len(report) == len(INSTANCES), architecture


def test_nothing_spills_or_lives_in_local_memory():
    for architecture, name, resources in kernels():
        used = {what: resources[what] for what in ("stack", "spill_stores", "spill_loads")}
        assert not any(used.values()), f"{architecture} {name}: {used}"


def test_shared_memory_is_the_struct_that_the_launch_gives():
    for architecture, name, resources in kernels():
        assert resources["static_shared"] == 0, f"{architecture} {name}: {resources['static_shared']} bytes beside it"


def test_as_many_blocks_fit_an_sm_as_the_launch_bounds_ask_for():
    for architecture, name, resources in kernels():
        blocks = next((count for kernel, count in BLOCKS.items() if f"{kernel}<" in name), OTHER_BLOCKS)
        per_thread = -(-resources["registers"] // 8) * 8  # registers are given out in units of 8 a thread
        assert per_thread * 256 * blocks <= REGISTERS_OF_AN_SM, f"{architecture} {name}: {resources['registers']}"
