"""From a regular convolution to a depthwise separable one: what each step costs.

    python examples/inception_spectrum.py --channels 728 --size 19

Prints parameters and multiply-adds of a 1 x 1 convolution followed by 3 x 3 convolutions on 1, 2, … segments of its
channels (Figure 3 of the Xception paper), and of the Inception module that the spectrum begins from (Figure 1).
"""

from __future__ import annotations

import argparse

import torch
from torch import nn

from fused_sepconv import explain
from fused_sepconv.models.inception_spectrum import InceptionModule, SegmentedInception


def cost(module: nn.Module, channels: int, size: int) -> tuple[int, int]:
    """Parameters, and multiply-adds for one image of `size` x `size` pixels. No weight is ever allocated."""
    x = torch.empty(1, channels, size, size, device="meta")
    return sum(p.numel() for p in module.parameters()), explain(module, x).multiply_adds


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--channels", type=int, default=728, help="in and out (default: Xception's middle flow)")
    parser.add_argument("--size", type=int, default=19, help="pixels a side")
    options = parser.parse_args()
    channels, size = options.channels, options.size
    if channels < 1 or size < 1:
        parser.error("--channels and --size: expected at least 1")

    divisors = [n for n in range(1, channels + 1) if channels % n == 0]
    forms = [
        (f"{n} segment" if n == 1 else f"{n} segments", SegmentedInception(channels, channels, n, device="meta"))
        for n in divisors
    ]
    if channels % 4 == 0:
        forms.insert(0, ("Inception module", InceptionModule(channels, channels // 4, device="meta")))
    regular = cost(SegmentedInception(channels, channels, 1, device="meta"), channels, size)[1]

    print(f"{channels} -> {channels} channels, {size} x {size} pixels")
    print(f"{'form':<18}{'parameters':>14}{'multiply-adds':>16}{'of one segment':>16}")
    for name, module in forms:
        parameters, multiply_adds = cost(module, channels, size)
        print(f"{name:<18}{parameters:>14,}{multiply_adds:>16,}{multiply_adds / regular:>15.1%}")
    print(f"1 segment: a regular convolution after a 1 x 1. {channels} segments: depthwise separable.")


if __name__ == "__main__":
    main()
