"""What a training step moves: BatchNorm units save what they are for, in the plan's bytes and in the kernels' own."""

import pytest
import torch
import traffic
from torch import nn

from fused_sepconv import SeparableConv2d, fuse_batch_norm, restore_convs
from fused_sepconv.models.xception import SeparableStack
from fused_sepconv.ops import joins, norm_units
from fused_sepconv.ops.launching import preferring
from tests.support.emulation import planned_for

NORM = {"eps": 1e-3, "momentum": 0.1}


def middle_block(channels, **factory):
    """A module of the middle flow: three separable convolutions, each with its BatchNorm, and the residual."""
    factory = {"dtype": torch.bfloat16, **factory}
    return SeparableStack(channels, (channels,) * 3, norm=NORM, **factory).to(memory_format=torch.channels_last)


def save(choice, model):
    for module in model.modules():
        if isinstance(module, SeparableConv2d):
            module.save_intermediate = choice


def image(n, channels, size, device):
    x = torch.ones(n, channels, size, size, dtype=torch.bfloat16, device=device)
    return x.to(memory_format=torch.channels_last).requires_grad_()


def test_a_unit_takes_15_passes_where_it_took_21_and_eager_25():
    """BatchNorm, ReLU and a separable convolution of the middle flow at batch 64; a pass is the bytes of the image."""
    passes = {}
    for name, choice, change in (
        ("eager", "auto", restore_convs),
        ("recomputed", False, None),
        ("saved", True, None),
        ("unit", "auto", fuse_batch_norm),
    ):
        model = nn.Sequential(
            nn.BatchNorm2d(728), SeparableConv2d(728, 728, 3, padding=1, bias=False, pre_activation="relu")
        )
        model = model.to("meta", torch.bfloat16).to(memory_format=torch.channels_last)
        save(choice, model)
        if change:
            change(model)
        x = image(64, 728, 19, "meta")
        with preferring("split"):
            step = traffic.count(model, x)
        passes[name] = step.traffic.total() / x.nbytes
    # Weights, partial sums, and pixels that two blocks read are the rest.
    right = {"eager": 25, "recomputed": 21, "saved": 19, "unit": 15}
    assert passes == pytest.approx(right, rel=0.06) and all(passes[name] >= right[name] for name in right)


class Emulated(traffic.Traffic):
    """Bytes that the emulated kernels' threads ask for, in place of the plan's."""

    def __init__(self, native, compared):
        super().__init__()
        self.native, self.compared = native, compared

    def run(self, op, args, kwargs):
        self.native.reset_counters()
        return super().run(op, args, kwargs)

    def planned(self, op, args):
        counters = self.native.counters()
        images = ("x", "y", "grad_output", "grad_x")
        asked = sum(counters[way].get(name, 0) for way in ("bytes_read", "bytes_written") for name in images)
        self.compared.append((set(self.native.executed()), asked, super().planned(op, args)))
        return asked


def test_emulated_a_middle_flow_block_takes_53_passes_where_it_took_63(checked, monkeypatch):
    """PyTorch's operators are counted as on a GPU, our kernels' bytes are those of images that their threads ask for.

    The first convolution takes 11 passes, the two units 19 or 15 each, the last BatchNorm and its addition 11 or 9, the
    addition of its gradients 3.
    """
    for module in (norm_units, joins):
        monkeypatch.setattr(module, "is_on_gpu", lambda x: True)
    passes = {}
    for fused in (False, True):
        compared = []
        monkeypatch.setattr(traffic, "Traffic", lambda compared=compared: Emulated(checked, compared))
        model = middle_block(16)
        save(True, model)
        if fused:
            assert fuse_batch_norm(model).replaced == ("bn1", "bn2", "bn3")
        x = image(2, 16, 19, "cpu")
        with planned_for(2), preferring("depthwise"):
            step = traffic.count(model, x)
        passes[fused] = step.traffic.total() / x.nbytes
        ran = [names for names, _, _ in compared]
        assert len(ran) == 6 and sum(any("normalised" in name for name in names) for names in ran) == 4 * fused
        for names, asked, planned in compared:  # which counts weights and partial sums besides
            assert asked < planned < 1.1 * asked, names
    assert passes == pytest.approx({False: 63, True: 53}, rel=0.06)
    assert passes[False] - passes[True] == pytest.approx(10, rel=0.1)


def test_a_step_of_xception_moves_and_saves_less():
    """The eager step is the sum that was made by hand before there was a kernel: 64.5 GB."""
    wanted = ("PyTorch, eager", "False", "True", "False, fuse_norm", "True, fuse_norm")
    steps = {name: traffic.xception_step(traffic.VARIANTS[name], 64) for name in wanted}
    moved = {name: step.traffic.total() / 1e9 for name, step in steps.items()}
    saved = {name: step.saved / 1e9 for name, step in steps.items()}
    assert moved["PyTorch, eager"] == pytest.approx(64.5, abs=0.1)
    # Each of the 21 units gives four passes over its tensor, 1.252 GB in all, and its normalised tensor, once. The rest
    # is the joins': two passes of 8 tensors, and of a pooled one all that its normalised tensor and wide indices took.
    assert moved["True"] - moved["True, fuse_norm"] == pytest.approx(4 * 1.252 + 6.05, rel=0.01)
    assert moved["True, fuse_norm"] < 43.5
    kept = [saved[name] for name in ("False, fuse_norm", "True, fuse_norm", "False", "True", "PyTorch, eager")]
    assert kept == sorted(kept) and kept[1] < kept[2] - 0.5 and kept[1] < 0.7 * kept[-1]
