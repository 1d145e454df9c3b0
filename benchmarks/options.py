"""The command line of a run: what is not given fits the machine, and what does not fit it is refused."""

import argparse
import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from ceilings import measure
from layers import NETWORKS, XCEPTION, Layer
from peers import PEERS, default_peers
from problem import DTYPES, LAYOUTS, PASSES, Problem
from roofline import Ceilings
from settings import Settings
from timing import MODES

SUITES = ("layers", "model", "memory", "overhead")

SECONDS = {"cpu": 1.0, "cuda": 0.1}
"""Spent on the samples of each row."""
QUICK_SECONDS = {"cpu": 0.1, "cuda": 0.03}

ALIASES = {"fp32": "float32", "fp16": "float16", "bf16": "bfloat16"}

LIVE_COPIES = 4
"""A layer's forward and backward hold about so many times its inputs and its output."""


@dataclass(frozen=True)
class Options:
    suites: tuple[str, ...]
    quick: bool
    json: Path
    device: str
    batches: tuple[int, ...]
    dtypes: tuple[str, ...]
    layouts: tuple[str, ...]
    passes: tuple[str, ...]
    networks: tuple[str, ...]
    peers: tuple[str, ...]
    modes: tuple[str, ...]

    def settings(self, ceilings: Ceilings) -> Settings:
        gpu = self.device == "cuda"
        return Settings(
            device=self.device,
            batches=self.batches,
            dtypes=self.dtypes,
            layouts=self.layouts,
            model_layouts=self.layouts[-1:] if self.quick else self.layouts,
            passes=self.passes,
            networks=self.networks,
            peers=self.peers,
            modes=self.modes,
            seconds=(QUICK_SECONDS if self.quick else SECONDS)[self.device],
            threads=torch.get_num_threads(),
            turns=1 if gpu else 3,
            ceilings=ceilings,
        )

    def measure_ceilings(self) -> Ceilings:
        return measure(self.device, self.dtypes, torch.get_num_threads())


def parse(argv: Sequence[str] | None) -> Options:
    """Ends the process with a message that names the argument where it is wrong or does not fit the machine."""
    parser = argparse.ArgumentParser(
        prog="bench.py",
        description="Times the fused separable convolution against PyTorch's own.",
        epilog="`bench.py compare A.json B.json` shows what changed between two results; `bench.py report` rebuilds "
        "README's results from benchmarks/results/.",
    )
    parser.add_argument("--quick", action="store_true", help="fewer samples and peers: two minutes on two CPU cores")
    parser.add_argument("--suite", default="all", metavar="S,S", help=f"of {','.join(SUITES)}; default: all of them")
    parser.add_argument("--device", choices=tuple(MODES), help="default: cuda where there is a GPU")
    parser.add_argument("--batch", metavar="N,N", help="images; default: 1 on the CPU, 64 on a GPU")
    parser.add_argument(
        "--dtype", metavar="D,D", help=f"of {','.join(DTYPES)}; default: float32 on the CPU, bfloat16 on a GPU"
    )
    parser.add_argument("--layout", metavar="L,L", help="nchw, nhwc; default: both on the CPU, nhwc on a GPU")
    parser.add_argument("--passes", default=",".join(PASSES), metavar="P,P", help="default: %(default)s")
    parser.add_argument(
        "--networks",
        metavar="N,N",
        help=f"whose layers, of {','.join(NETWORKS)}; default: all on a GPU, xception with --quick and on the CPU",
    )
    parser.add_argument(
        "--peers",
        metavar="P,P",
        help=f"of {','.join(PEERS)}; default: what the machine has, without compilers if quick",
    )
    parser.add_argument("--modes", metavar="M,M", help="how layers are sampled on a GPU: cold,graph; default: both")
    parser.add_argument("--json", type=Path, default=Path("bench.json"), metavar="PATH", help="default: %(default)s")
    given = parser.parse_args(argv)

    def several(name: str, default: Sequence[str], known: Iterable[str]) -> tuple[str, ...]:
        """A list of names."""
        value = getattr(given, name)
        names = tuple(dict.fromkeys(ALIASES.get(part, part) for part in value.split(","))) if value else tuple(default)
        if unknown := [part for part in names if part not in known]:
            parser.error(f"argument --{name}: expected some of {','.join(known)}, got {unknown[0]!r}")
        return names

    device = given.device or ("cuda" if torch.cuda.is_available() else "cpu")
    gpu = device == "cuda"
    if gpu and not torch.cuda.is_available():
        parser.error("argument --device: PyTorch sees no CUDA GPU on this machine")
    options = Options(
        suites=SUITES if given.suite == "all" else several("suite", SUITES, SUITES),
        quick=given.quick,
        json=given.json,
        device=device,
        batches=_batches(parser, given.batch) if given.batch else (64 if gpu else 1,),
        dtypes=several("dtype", ["bfloat16" if gpu else "float32"], DTYPES),
        layouts=several("layout", ["nhwc"] if gpu else list(LAYOUTS), LAYOUTS),
        passes=several("passes", tuple(PASSES), PASSES),
        networks=several("networks", tuple(NETWORKS) if gpu and not given.quick else ("xception",), NETWORKS),
        peers=several("peers", default_peers(device, given.quick), PEERS),
        modes=several("modes", MODES[device], MODES[device]),
    )
    if not options.json.absolute().parent.is_dir():
        parser.error(f"argument --json: there is no folder {options.json.parent}")
    if misfit := _misfit(options):
        parser.error(misfit)
    return options


def _batches(parser: argparse.ArgumentParser, value: str) -> tuple[int, ...]:
    try:
        batches = tuple(dict.fromkeys(int(part) for part in value.split(",")))
    except ValueError:
        parser.error(f"argument --batch: expected whole numbers, got {value!r}")
    if min(batches) < 1:
        parser.error(f"argument --batch: expected 1 or more, got {min(batches)}")
    return batches


def _misfit(options: Options) -> str | None:
    """What is asked for that this machine can't do; None where all fits."""
    for dtype in options.dtypes:
        if dtype == "tf32" and options.device == "cpu":
            return "argument --dtype: tf32 is arithmetic of CUDA GPUs"
        if dtype in ("tf32", "bfloat16") and options.device == "cuda" and torch.cuda.get_device_capability() < (8, 0):
            return (
                f"argument --dtype: {torch.cuda.get_device_name()} has no {dtype}; compute capability 8.0 and newer do"
            )
    if "forced" in options.peers and options.device == "cpu":
        return "argument --peers: forced chooses between a GPU's depthwise kernels"
    if set(options.suites) == {"model"} and options.passes == ("bwd",):
        return "argument --passes: the model suite times inference (fwd) and training steps (both), and no bwd alone"
    memory = _memory(options.device)
    for problem in _largest_problems(options):
        needed = LIVE_COPIES * problem.tensor_bytes
        if needed > memory:
            return (
                f"argument --batch: layer {problem.layer.name} at batch {problem.batch} in {problem.dtype} needs about "
                f"{needed / 1e9:.0f} GB, and the {'GPU' if options.device == 'cuda' else 'machine'} has "
                f"{memory / 1e9:.0f} GB"
            )
    return None


def _largest_problems(options: Options) -> list[Problem]:
    """The largest layer at the largest batch in each dtype, of the suites that run layers."""
    layers: list[Layer] = []
    if "layers" in options.suites:
        layers += [layer for network in options.networks for layer in NETWORKS[network]]
    if "memory" in options.suites or "model" in options.suites:
        layers += XCEPTION
    problems = [
        Problem(layer, max(options.batches), dtype, "nhwc", options.device)
        for dtype in options.dtypes
        for layer in layers
    ]
    return [max(problems, key=lambda problem: problem.tensor_bytes)] if problems else []


def _memory(device: str) -> int:
    """In bytes, all that the device has."""
    if device == "cuda":
        return torch.cuda.get_device_properties(torch.cuda.current_device()).total_memory
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
