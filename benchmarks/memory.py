"""How much memory does a call take? The most that it holds at once, and what its forward keeps for its backward."""

import os
from collections.abc import Callable, Collection
from typing import TypeVar

import torch
from torch import Tensor

Result = TypeVar("Result")


def peak_bytes(call: Callable[[], object], device: str) -> int:
    """The most bytes that PyTorch's allocator hands out during a call, beyond those that it held before."""
    call()  # what stays after a first call (workspaces, an optimizer's state) is not counted
    if device == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        call()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - before
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # else the profiler writes two lines into every progress bar
    with torch.autograd.profiler.profile(profile_memory=True) as profile:
        call()
    held = peak = 0
    changes = [event for event in profile.kineto_results.events() if event.name() == "[memory]"]
    for change in sorted(changes, key=lambda event: event.start_ns()):
        held += change.nbytes()
        peak = max(peak, held)
    return peak


def saved_bytes(forward: Callable[[], Result], parameters: Collection[Tensor]) -> int:
    """What a forward keeps for its backward: the bytes of the distinct storages that autograd saves.

    Parameters are there anyway and are not counted. A layer's input is: it stays because the layer needs it.
    """
    own = {parameter.untyped_storage().data_ptr() for parameter in parameters}
    saved: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            saved[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        kept = forward()  # alive until the sum is taken, so that no storage's address is used twice
    total = sum(saved.values())
    del kept
    return total
