"""python -m tests.cuda_on_cpu.conformance: computes the primitives' vectors on this machine's GPU and stores them."""

from __future__ import annotations

import dataclasses
import importlib.util
import os
import subprocess
import sysconfig
from pathlib import Path
from types import ModuleType

import pybind11

from ..build import BUILD, EMULATOR, ROOT
from . import vectors


def build_device_module() -> ModuleType:
    target = ROOT / BUILD / "conformance" / ("_conformance_device" + sysconfig.get_config_var("EXT_SUFFIX"))
    target.parent.mkdir(parents=True, exist_ok=True)
    includes = ["csrc", pybind11.get_include(), sysconfig.get_paths()["include"]]
    sources = [EMULATOR / "test_kernels/primitives.cu", EMULATOR / "conformance/device_runner.cu"]
    nvcc = Path(os.environ.get("CUDA_HOME", "/usr/local/cuda")) / "bin/nvcc"
    command = [nvcc, "-std=c++17", "-arch=native", "-shared", "-Xcompiler=-fPIC", "-o", target]
    subprocess.run([*command, *(f"-I{folder}" for folder in includes), *sources], cwd=ROOT, check=True)
    spec = importlib.util.spec_from_file_location("_conformance_device", target)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def main() -> None:
    module = build_device_module()
    made = [dataclasses.replace(vector, outputs=vector.run(module)) for vector in vectors.make()]
    vectors.save(made, module.device_name())
    print(f"{len(made)} vectors of {module.device_name()} in {vectors.FILE.relative_to(ROOT)}")


if __name__ == "__main__":
    main()
