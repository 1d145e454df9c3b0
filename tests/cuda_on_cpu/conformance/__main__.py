"""python -m tests.cuda_on_cpu.conformance: computes the primitives' vectors on this machine's GPU and stores them.

With --rehearse the emulator computes them, and nothing is stored.
"""

from __future__ import annotations

import argparse
import dataclasses
import importlib.util
import os
import subprocess
import sysconfig
from pathlib import Path
from types import ModuleType

import pybind11

from build_native.toolkit import find_toolkit

from ..build import BUILD, EMULATOR, ROOT, build_module
from . import vectors

KERNELS = EMULATOR / "test_kernels"


def build_device_module() -> ModuleType:
    target = ROOT / BUILD / "conformance" / ("_conformance_device" + sysconfig.get_config_var("EXT_SUFFIX"))
    target.parent.mkdir(parents=True, exist_ok=True)
    includes = ["csrc", pybind11.get_include(), sysconfig.get_paths()["include"]]
    sources = [KERNELS / "primitives.cu", EMULATOR / "conformance/device_runner.cu"]
    command = [find_toolkit(os.environ).nvcc, "-std=c++17", "-arch=native", "-shared", "-Xcompiler=-fPIC", "-o", target]
    subprocess.run([*command, *(f"-I{folder}" for folder in includes), *sources], cwd=ROOT, check=True)
    return _imported("_conformance_device", target)


def emulated_module() -> ModuleType:
    sources = [KERNELS / "execution.cu", KERNELS / "primitives.cu"]
    return _imported("_emulator_tests", build_module("_emulator_tests", sources, [KERNELS / "bind.cpp"]))


def _imported(name: str, file: Path) -> ModuleType:
    spec = importlib.util.spec_from_file_location(name, file)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m tests.cuda_on_cpu.conformance", description=__doc__)
    parser.add_argument("--rehearse", action="store_true", help="on the emulator, without storing them")
    rehearse = parser.parse_args().rehearse
    module = emulated_module() if rehearse else build_device_module()
    made = [dataclasses.replace(vector, outputs=vector.run(module)) for vector in vectors.make()]
    if rehearse:
        print(f"{len(made)} vectors of the emulator, not stored")
        return
    vectors.save(made, module.device_name())
    print(f"{len(made)} vectors of {module.device_name()} in {vectors.FILE.relative_to(ROOT)}")


if __name__ == "__main__":
    main()
