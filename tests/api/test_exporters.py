"""What reads a model to run it elsewhere: torch.fx, torch.jit, torch.export, ONNX."""

import copy
import io

import pytest
import torch
from torch import nn
from torch.ao.quantization import get_default_qconfig_mapping, quantize_fx

from fused_sepconv import (
    DepthwiseConv1d,
    DepthwiseConv2d,
    SeparableConv2d,
    depthwise_conv2d,
    optimize_for_inference,
    separable_conv2d,
)
from fused_sepconv.models import xception

MODULES = {
    "separable": lambda **options: SeparableConv2d(4, 6, 3, mid_activation="relu", **options),
    "depthwise": lambda **options: DepthwiseConv2d(4, 3, activation="silu", **options),
    "1d": lambda **options: DepthwiseConv1d(4, 3, **options),
}
OPTIONS = {
    "plain": {"padding": 1},
    "same": {"padding": "same"},
    "same, stride 2": {"padding": "same", "stride": 2},
    "same, stride 4": {"padding": "same", "stride": 4},
    "reflect": {"padding": 1, "padding_mode": "reflect"},
}
modules = pytest.mark.parametrize("kind", MODULES)
options = pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)


def made(kind, options):
    module = MODULES[kind](**options).eval()
    return module, torch.randn(2, 4, 9, *(() if kind == "1d" else (8,)))


def other(x):
    """An image of other sizes, odd where x's are even."""
    return torch.randn(1, 4, *(size + 3 for size in x.shape[2:]))


def close(actual, expected):
    torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning")
@modules
@options
def test_fx_traces_it_as_one_call_and_jit_traces_it_for_every_size(kind, options):
    module, x = made(kind, options)
    traced = torch.fx.symbolic_trace(nn.Sequential(module))
    assert sum(node.target in (separable_conv2d, depthwise_conv2d) for node in traced.graph.nodes) == 1
    jitted = torch.jit.trace(module, x)
    for image in (x, other(x)):
        close(traced(image), module(image))
        close(jitted(image), module(image))
    with pytest.raises(ValueError, match=r"x: expected \(N, 4"):
        traced(x[:, :2])


def test_fx_traces_a_residual_and_a_child_with_a_hook():
    module = SeparableConv2d(4, 4, 3, padding=1)
    x, residual = torch.randn(2, 2, 4, 5, 5)
    traced = torch.fx.symbolic_trace(module)
    close(traced(x, residual), module(x, residual))
    close(traced(x), module(x))
    module.depthwise.register_forward_hook(lambda module, inputs, y: 2 * y)
    close(torch.fx.symbolic_trace(module)(x, residual), module(x, residual))


def small_xception(**options):
    torch.manual_seed(0)
    return xception(10, width=0.05, middle_blocks=1, **options).eval(), torch.randn(1, 3, 75, 80)


@pytest.mark.parametrize("options", ({}, {"pool_padding": "symmetric"}, {"output_stride": 8}), ids=str)
def test_fx_traces_xception(options):
    model, x = small_xception(**options)
    traced = torch.fx.symbolic_trace(model)
    for image in (x, torch.randn(2, 3, 96, 71)):
        assert torch.equal(traced(image), model(image))
    with pytest.raises(ValueError, match="at least 7 pixels"):
        traced(x[..., :6])


def test_a_network_of_features_is_folded_as_far_as_one_of_classes():
    """The whole network is traced: a flow, whose children it calls and which it does not, is no second caller."""
    model, x = small_xception(features_only=True)
    expected = model(x)
    assert len(optimize_for_inference(model).replaced) == 13
    for actual, wanted in zip(model(x), expected, strict=True):
        close(actual, wanted)


def test_feature_extractors_read_xception():
    from tests.support.third_party import torchvision

    model, x = small_xception()
    wanted = {"entry.module2": "early", "middle": "late"}
    features = torchvision.models.feature_extraction.create_feature_extractor(model, wanted)(x)
    early = model.entry.module2(model.entry.module1(x))
    assert features.keys() == {"early", "late"} and torch.equal(features["early"], early)


def test_fx_quantisation_quantises_what_is_round_the_separable_convolutions():
    model, x = small_xception()
    expected = model(x)
    prepared = quantize_fx.prepare_fx(copy.deepcopy(model), get_default_qconfig_mapping("x86"), (x,))
    prepared(x)
    quantised = quantize_fx.convert_fx(prepared)
    assert any("quantized" in type(module).__module__ for module in quantised.modules())
    assert (quantised(x) - expected).abs().max() < 0.1 * expected.abs().max()


# torch.export


def ranges(x):
    """Every size free within bounds, that no layer's stride divides."""
    names = ("n", "c", "h", "w")
    dims = {i: torch.export.Dim(names[i], min=1 if i == 0 else 8, max=99) for i in range(x.dim()) if i != 1}
    return (dims,)


# By default the two hardest, by turns: every other kind of padding is one of PyTorch's own sizes.
HARDEST = (("separable", "same, stride 2"), ("depthwise", "reflect"), ("1d", "same, stride 2"))


@pytest.mark.parametrize(
    ("kind", "name"),
    [
        pytest.param(kind, name, marks=() if (kind, name) in HARDEST else pytest.mark.full)
        for kind in MODULES
        for name in OPTIONS
    ],
)
def test_every_size_of_a_range_exports_and_decomposes_into_convolutions(kind, name):
    module, x = made(kind, OPTIONS[name])
    program = torch.export.export(module, (x,), dynamic_shapes=ranges(x))
    decomposed = program.run_decompositions()
    kept = program.run_decompositions({})  # asks for none
    for graph, own in ((program, True), (decomposed, False), (kept, True)):
        assert any("fused_sepconv" in str(node.target) for node in graph.graph.nodes) == own
    targets = [str(node.target) for node in decomposed.graph.nodes]
    assert targets.count("aten.convolution.default") == (2 if kind == "separable" else 1)
    for image in (x, other(x)):
        close(program.module()(image), module(image))
        close(decomposed.module()(image), module(image))


@pytest.mark.parametrize("strict", (False, True), ids=("not strict", "strict"))
def test_fixed_sizes_export_and_decompose_and_the_program_is_saved_and_loaded(tmp_path, strict):
    module, x = made("separable", OPTIONS["same, stride 2"])
    program = torch.export.export(module, (x,), strict=strict)
    torch.export.save(program, tmp_path / "program.pt2")
    for found in (torch.export.load(tmp_path / "program.pt2"), program.run_decompositions()):
        close(found.module()(x), module(x))


class Residual(nn.Module):
    """The sum of a separable convolution and a strided one, which an export must see to be of one size."""

    def __init__(self):
        super().__init__()
        self.sepconv, self.skip = SeparableConv2d(4, 6, 3, 2, "same"), nn.Conv2d(4, 6, 1, 2)

    def forward(self, x):
        return self.sepconv(x) + self.skip(x)


def test_same_with_a_stride_has_the_size_of_a_strided_convolution():
    module, x = Residual().eval(), torch.randn(2, 4, 9, 8)
    program = torch.export.export(module, (x,), dynamic_shapes=ranges(x))
    for image in (x, other(x)):
        close(program.module()(image), module(image))


# ONNX


def onnx_result(model, x):
    onnxruntime = pytest.importorskip("onnxruntime")
    session = onnxruntime.InferenceSession(model, providers=["CPUExecutionProvider"])
    (y,) = session.run(None, {session.get_inputs()[0].name: x.numpy()})
    return torch.from_numpy(y)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("kind", ("separable", "depthwise", pytest.param("1d", marks=pytest.mark.full)))
def test_onnx_gets_convolutions(kind):
    pytest.importorskip("onnxscript")
    module, x = made(kind, OPTIONS["same, stride 2"])
    program = torch.onnx.export(module, (x,), dynamo=True, verbose=False)
    assert {node.op_type for node in program.model.graph} >= {"Conv"}
    assert {node.domain for node in program.model.graph} == {""}
    close(onnx_result(program.model_proto.SerializeToString(), x), module(x))


@pytest.mark.filterwarnings("ignore")
@options
@modules
def test_the_older_onnx_exporter_gets_convolutions(kind, options):
    onnx = pytest.importorskip("onnx")
    module, x = made(kind, options)
    file = io.BytesIO()
    axes = {"x": {0: "n", 2: "h", 3: "w"} if x.dim() == 4 else {0: "n", 2: "l"}}
    torch.onnx.export(module, (x,), file, dynamo=False, input_names=["x"], dynamic_axes=axes)
    assert {node.domain for node in onnx.load_from_string(file.getvalue()).graph.node} == {""}
    for image in (x, other(x)):
        close(onnx_result(file.getvalue(), image), module(image))


@modules
def test_torch_jit_script_says_what_to_do(kind):
    module, _ = made(kind, {})
    with pytest.raises(RuntimeError, match=r"restore_convs\(model\)"):
        torch.jit.script(nn.Sequential(module))
