"""Eager calls are looked up by all that decides what runs: nothing of an earlier call shows in a later one."""

import itertools
import threading
from contextlib import nullcontext
from types import SimpleNamespace

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from fused_sepconv import separable_conv2d, use_backend
from fused_sepconv.native import marshalling
from fused_sepconv.ops import calls, eager, launching
from fused_sepconv.tensors.memory_format import output_strides
from tests.support.cases import two_convolutions


class Passing(TorchDispatchMode):
    """Sees every operator, and lets it be."""

    def __torch_dispatch__(self, op, types, args=(), kwargs=None):
        return op(*args, **(kwargs or {}))


@pytest.fixture(autouse=True)
def nothing_prepared():
    eager.clear()
    yield
    eager.clear()


def tensors(channels=4, size=7, dtype=torch.float32, seed=0):
    random = torch.Generator().manual_seed(seed)
    shapes = (2, channels, size, size), (channels, 1, 3, 3), (5, channels, 1, 1), (5,)
    return [torch.randn(shape, generator=random, dtype=dtype).requires_grad_() for shape in shapes]


def results(function, inputs, **options):
    """Output and gradients, where there are any."""
    y = function(*inputs, padding=1, mid_activation="relu", **options)
    return (y, *torch.autograd.grad(y.square().sum(), inputs)) if y.requires_grad else (y,)


def assert_right(*inputs, **options):
    inputs = inputs or tensors()
    ours = results(separable_conv2d, inputs, **options)
    torch.testing.assert_close(ours, results(two_convolutions, inputs, **options))
    assert ours[0].stride() == output_strides(inputs[0], ours[0].shape)


@pytest.mark.quick
def test_a_full_cache_forgets_the_oldest(monkeypatch):
    monkeypatch.setattr(calls, "MOST", 3)
    for size in (*range(5, 12), *range(5, 12)):
        assert_right(*tensors(size=size))
        assert len(eager._routes) <= 3 and len(calls._calls) <= 3
    images = (next(part for part in key if isinstance(part, torch.Size)) for key in eager._routes)
    assert {shape[2] for shape in images} == {9, 10, 11}


STATES = {
    "plain": nullcontext,
    "no gradients": torch.no_grad,
    "inference": torch.inference_mode,
    "autocast": lambda: torch.autocast("cpu", torch.bfloat16),
    "PyTorch's own": lambda: use_backend("reference"),
    "a dispatch mode": Passing,
    "deterministic": lambda: torch.backends.cudnn.flags(deterministic=True),
    "no cuDNN": lambda: torch.backends.cudnn.flags(enabled=False),
}


@pytest.mark.quick
@pytest.mark.parametrize(("first", "then"), list(itertools.permutations(STATES, 2)))
def test_a_state_that_changes_between_calls_is_another_call(first, then, monkeypatch):
    monkeypatch.setattr(calls, "MEASURES_CPU", True)  # PyTorch's flags are then part of the key, as on a GPU
    for state in (first, then, first):
        with STATES[state]():
            assert_right()


@pytest.mark.parametrize("flag", ("deterministic", "benchmark", "enabled", "allow_tf32"))
def test_pytorch_s_flags_are_part_of_the_key(flag, monkeypatch):
    monkeypatch.setattr(calls, "MEASURES_CPU", True)
    inputs = tensors()
    kept = []
    for value in (False, True, False, True):
        with torch.backends.cudnn.flags(**{flag: value}):
            separable_conv2d(*inputs)
            kept.append(len(eager._routes))
    assert kept == [1, 2, 2, 2]


def test_a_family_that_is_asked_for_is_part_of_the_key(monkeypatch):
    monkeypatch.setattr(calls, "MEASURES_CPU", True)
    for family in (None, "simt", None):
        with launching.preferring(family):
            assert_right()
    assert len(eager._routes) == 2


@pytest.mark.quick
def test_strides_alignment_and_dtype_may_change_between_calls():
    x, *weights = tensors()
    storage = torch.randn(2 * 4 * 7 * 7 + 1)
    for image in (
        x,
        x.detach().contiguous(memory_format=torch.channels_last).requires_grad_(),
        storage[1:].view(2, 4, 7, 7).requires_grad_(),
        x[:, :, :, ::2].detach().requires_grad_(),
        x,
    ):
        assert_right(image, *weights)
    assert_right(*tensors(dtype=torch.float64))
    assert_right(*tensors(), stride=2)
    assert_right(*tensors(), stride=(2, 1))


def test_a_weight_that_moves_between_forward_and_backward_is_read_where_it_is():
    inputs = tensors()
    y = separable_conv2d(*inputs, padding=1)
    expected = torch.autograd.grad(two_convolutions(*inputs, padding=1).sum(), inputs)
    for tensor in inputs:  # other memory and strides, the same numbers
        tensor.data = tensor.data.clone(
            memory_format=torch.channels_last if tensor.dim() == 4 else torch.preserve_format
        )
    torch.testing.assert_close(torch.autograd.grad(y.sum(), inputs), expected)


def test_threads_prepare_and_forget_at_once(monkeypatch):
    monkeypatch.setattr(calls, "MOST", 4)
    failures = []

    def work(seed):
        try:
            for step in range(30):
                assert_right(*tensors(size=5 + (seed + step) % 6, seed=seed))
        except BaseException as error:
            failures.append(error)

    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures and len(eager._routes) <= 4


@pytest.mark.quick
def test_the_native_module_is_told_the_device_where_pytorchs_guard_binds_none(monkeypatch):
    """Before CUDA 12 cudaSetDevice leaves the thread another device's context, on which our runtime would launch."""
    told = []
    monkeypatch.setattr(torch.cuda, "device", lambda device: nullcontext())
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 1)
    monkeypatch.setattr(marshalling.loader, "load", lambda: SimpleNamespace(set_device=told.append))
    for binds, expected in ((True, []), (False, [1])):
        monkeypatch.setattr(marshalling, "GUARD_BINDS", binds)
        with launching.on_device(torch.device("cuda", 1)), launching.on_device(torch.device("cpu")):
            assert told == expected
