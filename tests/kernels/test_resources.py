"""What the compiler gave each kernel, on every architecture it was compiled for, and what the plan counts on.

The figures are those of the report that the build leaves, and the driver's where there is one. Where the package has
no kernels there are none, and nothing is claimed.
"""

from __future__ import annotations

from fused_sepconv.families.simt import plan as simt
from fused_sepconv.native import loader
from fused_sepconv.planning.devices import DEVICES
from fused_sepconv.planning.plan import INSTANCES


def compiled() -> list[tuple[str, loader.Instance]]:
    """(where the figures are from, a kernel) for every source of figures and every kernel."""
    sources = {architecture: loader.instances(architecture) for architecture in loader.resources()}
    info = loader.build_info()
    if info is not None and not info["emulated"]:
        sources["the driver, or the most of any architecture"] = loader.instances(ask_driver=True)
    return [(source, instance) for source, instances in sources.items() for instance in instances.values()]


def test_there_is_a_report_where_there_are_kernels():
    info = loader.build_info()
    assert bool(loader.resources()) == (info is not None and not info["emulated"])


def test_every_instance_was_compiled_for_every_architecture():
    for architecture, report in loader.resources().items():
        assert len(report) == len(INSTANCES), architecture


def test_the_report_tells_of_every_instance():
    for source, instance in compiled():
        assert instance.registers, f"{source} says nothing of {instance.name}: {instance.spelling}"


def test_nothing_spills_or_lives_in_local_memory():
    for source, instance in compiled():
        assert instance.local_bytes == 0, f"{source}: {instance}"


def test_all_shared_memory_is_what_the_launch_gives():
    for architecture, report in loader.resources().items():
        for resources in report.values():
            assert resources["static_shared"] == 0, f"{architecture}: {resources}"


def test_the_plan_counts_on_what_was_compiled():
    for source, instance in compiled():
        planned = INSTANCES[instance.name]
        assert (instance.threads, instance.shared_bytes) == (planned.threads, planned.shared_bytes), source
        assert instance.registers <= planned.registers, f"{source}: {instance}"


def test_as_many_blocks_fit_an_sm_as_the_plan_counts_on():
    for source, instance in compiled():
        if instance.name not in simt.INSTANCES:
            continue
        for device in DEVICES.values():
            fit = device.blocks_per_sm(instance.threads, instance.registers, instance.shared_bytes)
            assert fit >= simt.BLOCKS_PER_SM, f"{source}, {device.name}: {instance}"
