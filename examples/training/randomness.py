"""Where random numbers come from.

Every use of them has a seed of its own, made from the run's seed and the place of use: the order of an epoch, the
augmentation of an image in an epoch, the dropout of a micro-batch. So a run that is resumed, or that has other numbers
of ranks or of workers, draws what an uninterrupted one would have drawn, and no generator's state has to be saved.
"""

import zlib

import numpy as np
import torch


def derive(seed: int, use: str, *place: int) -> int:
    """A 63-bit seed for `use` ("order", "dropout", ...) at `place`."""
    sequence = np.random.SeedSequence((seed, zlib.crc32(use.encode()), *place))
    return int(sequence.generate_state(1, np.uint64)[0] >> 1)


def set_seed(seed: int, device: torch.device) -> None:
    """Of the CPU's generator, and of the device's. (`torch.manual_seed` takes a millisecond where there is no GPU.)"""
    torch.default_generator.manual_seed(seed)
    if device.type == "cuda":
        torch.cuda.manual_seed(seed)
