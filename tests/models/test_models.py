"""Xception: the network of the paper, what its arguments change, and that all of PyTorch takes it."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import fused_sepconv
from fused_sepconv import SeparableConv2d, explain
from fused_sepconv.models import Xception, xception
from fused_sepconv.models.max_pool import MaxPool3x3
from fused_sepconv.models.xception import SeparableStack
from tests.support.closeness import assert_as_close_as_eager, assert_gradient_as_close_as_eager


def randomise(model):
    """Values everywhere that an exchange of two layers would show, BatchNorm's statistics among them."""
    generator = torch.Generator().manual_seed(0)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            for tensor, low, high in (
                (module.weight, 0.5, 1.5),
                (module.bias, -0.2, 0.2),
                (module.running_mean, -0.2, 0.2),
                (module.running_var, 0.5, 1.5),
            ):
                tensor.data.uniform_(low, high, generator=generator)
    return model


def small(**options):
    """One module in the middle: all that differs between the flows, at a third of the cost."""
    return randomise(xception(middle_blocks=1, **options)).eval()


def conv_layers(model):
    """The paper's 36: a separable convolution is one, and the residual connections' are not counted."""
    separable = [name for name, module in model.named_modules() if isinstance(module, SeparableConv2d)]
    plain = [
        name
        for name, module in model.named_modules()
        if isinstance(module, nn.Conv2d) and "sepconv" not in name and "skip" not in name
    ]
    return separable, plain


# The network --------------------------------------------------------------------------------------------------------


def test_it_has_the_paper_s_parameters_layers_and_modules():
    model = xception(device="meta")
    trainable = sum(parameter.numel() for parameter in model.parameters())
    statistics = sum(b.numel() for name, b in model.named_buffers() if not name.endswith("num_batches_tracked"))
    assert trainable == 22_855_952
    assert trainable + statistics == 22_910_480
    separable, plain = conv_layers(model)
    assert (len(separable), len(plain)) == (34, 2)
    assert [len(flow) for flow in (model.entry, model.middle, model.exit)] == [4, 8, 2]
    without_residual = [m for flow in (model.entry, model.middle, model.exit) for m in flow if not has_residual(m)]
    assert without_residual == [model.entry.module1, model.exit.module2]


def has_residual(module):
    return getattr(module, "residual", False)


def test_the_state_dict_s_names_follow_the_flows():
    names = {name.rsplit(".", 1)[0] for name in xception(device="meta").state_dict()}
    assert {name.split(".")[0] for name in names} == {"entry", "middle", "exit", "classifier"}
    assert {
        "entry.module1.conv1",
        "entry.module4.skip_bn",
        "middle.module8.sepconv3.depthwise",
        "exit.module1.bn2",
        "exit.module2.sepconv2.pointwise",
    } <= names


def test_every_relu_before_a_separable_convolution_is_fused_into_it():
    model = xception(device="meta")
    plain = [name for name, m in model.named_modules() if isinstance(m, SeparableConv2d) and m.pre_activation is None]
    # The stem ends in a ReLU that the residual connection reads too; nothing precedes the last module's first.
    assert plain == ["entry.module2.sepconv1", "exit.module2.sepconv1"]
    assert not [m for m in model.modules() if isinstance(m, nn.ReLU)]


def test_the_image_shrinks_from_299_to_10():
    model = xception(device="meta").eval()
    sizes = []
    for module in (model.entry.module1.conv1, model.entry.module1, *model.entry[1:], model.middle, model.exit):
        module.register_forward_hook(lambda module, args, y: sizes.append(tuple(y.shape[-2:])))
    assert model(torch.empty(2, 3, 299, 299, device="meta")).shape == (2, 1000)
    assert sizes == [(n, n) for n in (149, 147, 74, 37, 19, 19, 10)]


def test_width_makes_the_same_network_slim():
    slim, full = (xception(width=width, device="meta") for width in (0.25, 1.0))
    assert list(slim.state_dict()) == list(full.state_dict())
    assert [info["num_chs"] for info in slim.feature_info] == [16, 32, 64, 184, 512]  # 728 / 4, to a multiple of 8
    assert slim.num_features == slim.classifier.in_features == 512
    least = xception(10, width=1e-3)
    assert {m.out_channels for m in least.modules() if isinstance(m, nn.Conv2d)} == {8}
    assert least(torch.randn(2, 3, 32, 32)).shape == (2, 10)


@pytest.mark.parametrize("width", [0, -1.0, float("inf"), float("nan")])
def test_width_is_a_factor_above_0(width):
    with pytest.raises(ValueError, match=r"^width: "):
        xception(width=width)


def test_explain_counts_8_36_g_multiply_adds_at_299():
    explanation = explain(xception(device="meta"), torch.empty(1, 3, 299, 299, device="meta"))
    assert len(explanation.layers) == 34
    assert round(explanation.multiply_adds / 1e9, 2) == 8.36
    separable = sum(layer.forward.chosen.flops for _, layer in explanation.layers) / 2
    assert 0.8 * explanation.multiply_adds < separable < explanation.multiply_adds
    assert "8.357 G multiply-adds" in str(explanation)


def paper_network(weights, x, residual=True, mid_activation=None, middle_blocks=8):
    """Figure 5, written down a second time, in plain PyTorch, from a state dict."""
    mid = {None: lambda t: t, "relu": F.relu, "elu": F.elu}[mid_activation]

    def norm(name, t):
        mean, var, weight, bias = (
            weights[f"{name}.{part}"][:, None, None] for part in ("running_mean", "running_var", "weight", "bias")
        )
        return (t - mean) / (var + 1e-3).sqrt() * weight + bias

    def sepconv(module, number, t):
        depthwise = weights[f"{module}.sepconv{number}.depthwise.weight"]
        t = mid(F.conv2d(t, depthwise, padding=1, groups=t.shape[1]))
        return norm(f"{module}.bn{number}", F.conv2d(t, weights[f"{module}.sepconv{number}.pointwise.weight"]))

    def pool(t):  # TensorFlow's "same": what is missing for the last window goes mostly behind
        height, width = (max((-(-n // 2) - 1) * 2 + 3 - n, 0) for n in t.shape[-2:])
        return F.max_pool2d(
            F.pad(t, (width // 2, width - width // 2, height // 2, height - height // 2), value=-torch.inf), 3, 2
        )

    def strided(module, t, relu_first=True):
        y = sepconv(module, 1, F.relu(t) if relu_first else t)
        y = pool(sepconv(module, 2, F.relu(y)))
        if not residual:
            return y
        return y + norm(f"{module}.skip_bn", F.conv2d(t, weights[f"{module}.skip.weight"], stride=2))

    x = F.relu(norm("entry.module1.bn1", F.conv2d(x, weights["entry.module1.conv1.weight"], stride=2)))
    x = F.relu(norm("entry.module1.bn2", F.conv2d(x, weights["entry.module1.conv2.weight"])))
    x = strided("entry.module2", x, relu_first=False)
    x = strided("entry.module4", strided("entry.module3", x))
    for block in range(1, middle_blocks + 1):
        y = x
        for number in (1, 2, 3):
            y = sepconv(f"middle.module{block}", number, F.relu(y))
        x = y + x if residual else y
    x = strided("exit.module1", x)
    x = F.relu(sepconv("exit.module2", 1, x))
    x = F.relu(sepconv("exit.module2", 2, x))
    return x.mean((2, 3)) @ weights["classifier.weight"].T + weights["classifier.bias"]


@pytest.mark.parametrize(
    "options",
    ({}, {"residual": False}, {"mid_activation": "relu"}, {"mid_activation": "elu"}, {"middle_blocks": 2}),
    ids=str,
)
def test_it_computes_what_the_paper_s_figure_5_says(options):
    model = randomise(xception(10, width=0.25, dtype=torch.float64, **{"middle_blocks": 1, **options})).eval()
    x = torch.randn(2, 3, 71, 86, dtype=torch.float64)
    with torch.no_grad():
        expected = paper_network(model.state_dict(), x, **{"middle_blocks": 1, **options})
        torch.testing.assert_close(model(x), expected, rtol=1e-9, atol=1e-9 * float(expected.abs().max()))


# Its arguments ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("pool_padding", ("same", "symmetric"))
def test_a_smaller_output_stride_computes_the_same_features_more_densely(pool_padding):
    x = torch.randn(1, 3, 150, 131, dtype=torch.float64)  # the poolings meet odd and even sizes
    options = {"num_classes": 0, "pool_padding": pool_padding, "width": 0.25, "dtype": torch.float64}
    strided = small(**options)
    with torch.no_grad():
        expected = strided.forward_features(x)
        for output_stride, size in ((16, (9, 8)), (8, (18, 16))):
            dense = small(output_stride=output_stride, **options)
            dense.load_state_dict(strided.state_dict())
            features = dense.forward_features(x)
            assert features.shape[-2:] == size
            step = 32 // output_stride
            torch.testing.assert_close(features[..., ::step, ::step], expected, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("size", (1, 2, 3, 4, 7, 8, 37, 74))
def test_symmetric_pooling_is_torch_s_and_same_pooling_is_tensorflow_s(size):
    x = torch.randn(2, 3, size, size + 1)
    torch.testing.assert_close(MaxPool3x3(2, "symmetric")(x), F.max_pool2d(x, 3, 2, 1), rtol=0, atol=0)
    out = MaxPool3x3(2, "same")(x)
    assert out.shape[-2:] == (-(-size // 2), -(-(size + 1) // 2))
    begin = [0 if n % 2 == 0 else -1 for n in (size, size + 1)]
    for i in range(out.shape[2]):
        for j in range(out.shape[3]):
            top, left = begin[0] + 2 * i, begin[1] + 2 * j
            window = x[..., max(top, 0) : top + 3, max(left, 0) : left + 3]
            assert torch.equal(out[..., i, j], window.amax((2, 3)))


def test_features_only_gives_the_features_at_five_strides():
    model, whole = small(features_only=True), small()
    weights = whole.state_dict()
    model.load_state_dict({name: weights[name] for name in model.state_dict()})
    x = torch.randn(1, 3, 96, 96)
    with torch.no_grad():
        features = model(x)
        last, chosen = whole.forward_intermediates(x, indices=[1, -1])
    assert [f.shape[1] for f in features] == [64, 128, 256, 728, 2048] == [i["num_chs"] for i in model.feature_info]
    assert [i["reduction"] for i in model.feature_info] == [2, 4, 8, 16, 32]
    assert all(f.min() >= 0 for f in features)
    assert torch.equal(features[-1], whole.forward_features(x).detach())
    assert torch.equal(last, chosen[1]) and torch.equal(chosen[0], features[1])
    assert [i["reduction"] for i in xception(features_only=True, output_stride=8, device="meta").feature_info][2:] == [
        8,
        8,
        8,
    ]
    with pytest.raises(ValueError, match="features_only"):
        model.reset_classifier(10)


def test_hidden_units_are_fully_connected_layers_before_the_last():
    model = small(num_classes=7, hidden_units=(32, 16))
    features = torch.randn(2, 2048, 3, 3)
    first, second = model.hidden[0], model.hidden[2]
    expected = F.relu(second(F.relu(first(features.mean((2, 3))))))
    torch.testing.assert_close(model.forward_head(features, pre_logits=True), expected)
    torch.testing.assert_close(model.forward_head(features), model.classifier(expected))
    assert model.head_hidden_size == model.classifier.in_features == 16


def test_dropout_comes_before_the_last_layer_and_only_in_training():
    model = small(dropout=0.5)
    features = torch.rand(4, 2048, 2, 2) + 1
    pooled = features.mean((2, 3))
    torch.testing.assert_close(model.forward_head(features, pre_logits=True), pooled)
    dropped = model.train().forward_head(features, pre_logits=True)
    kept = dropped != 0
    assert 0.4 < kept.float().mean() < 0.6
    torch.testing.assert_close(dropped[kept], 2 * pooled[kept])


def test_the_classifier_is_replaced_as_in_timm():
    model = small(dtype=torch.float64)
    x = torch.randn(1, 3, 71, 71, dtype=torch.float64)
    model.reset_classifier(5)
    assert model.num_classes == 5 and model.get_classifier() is model.classifier
    assert model(x).shape == (1, 5) and not model.classifier.training
    model.reset_classifier(0, "max")
    with torch.no_grad():
        assert torch.equal(model(x), model.forward_features(x).amax((2, 3)))
    model.reset_classifier(0, "")
    assert model(x).shape == (1, 2048, 3, 3)


def test_seventeen_thousand_labels_train_with_a_sigmoid_each():
    jft = xception(17_000, hidden_units=(4096, 4096), device="meta")
    head = 2048 * 4096 + 4096 + 4096 * 4096 + 4096 + 4096 * 17_000 + 17_000
    assert sum(p.numel() for p in jft.parameters()) == 22_855_952 - 2049 * 1000 + head

    model = xception(17_000, middle_blocks=0, width=0.25)
    with torch.no_grad():
        frequency = torch.full((17_000,), 1e-3)
        model.classifier.bias.copy_((frequency / (1 - frequency)).log())
    x = torch.randn(2, 3, 71, 71)
    labels = torch.zeros(2, 17_000)
    labels[0, [3, 16_999]] = labels[1, [0]] = 1
    optimiser = torch.optim.SGD(model.parameters(), 1e-2)
    losses = []
    for _ in range(3):
        loss = F.binary_cross_entropy_with_logits(model(x), labels, reduction="sum")
        optimiser.zero_grad()
        loss.backward()
        assert all(parameter.grad is not None for parameter in model.parameters())
        optimiser.step()
        losses.append(float(loss.detach()))
    assert losses[2] < 0.9 * losses[0]


@pytest.mark.parametrize(
    ("options", "words"),
    (
        ({"num_classes": -1}, "num_classes"),
        ({"in_channels": 0}, "in_channels"),
        ({"dropout": 2}, "dropout"),
        ({"hidden_units": (0,)}, "hidden_units"),
        ({"mid_activation": "tanh"}, "mid_activation"),
        ({"middle_blocks": -1}, "middle_blocks"),
        ({"output_stride": 4}, "output_stride"),
        ({"pool_padding": "keras"}, "pool_padding"),
        ({"global_pool": "catavg"}, "global_pool"),
        ({"global_pool": ""}, "global_pool"),
    ),
    ids=str,
)
def test_a_bad_argument_is_named(options, words):
    with pytest.raises(ValueError, match=words):
        xception(**{"device": "meta", **options})


@pytest.mark.parametrize("shape", ((3, 71, 71), (1, 1, 71, 71), (1, 3, 71, 6)))
def test_a_bad_image_is_named(shape):
    with pytest.raises(ValueError, match="x: expected"):
        xception(device="meta")(torch.empty(shape, device="meta"))


# PyTorch ------------------------------------------------------------------------------------------------------------


def gradients(model, x):
    model.zero_grad()
    model(x).square().mean().backward()
    return [parameter.grad.clone() for parameter in model.parameters()]


@pytest.mark.full
def test_the_whole_network_compiles_into_one_graph_and_trains_so():
    model = randomise(xception())
    compiled = torch.compile(copy.deepcopy(model), fullgraph=True, backend="aot_eager")
    x = torch.randn(2, 3, 71, 71)
    for ours, theirs in zip(gradients(compiled, x), gradients(model, x), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4 * float(theirs.abs().max()))


@pytest.mark.full
def test_inductor_compiles_it():
    model = small()
    x = torch.randn(1, 3, 71, 71)
    with torch.no_grad():
        y = model(x)
        compiled = torch.compile(model, fullgraph=True)(x)
    torch.testing.assert_close(compiled, y, rtol=1e-4, atol=1e-4 * float(y.abs().max()))


def test_the_whole_network_exports_with_any_batch():
    model = randomise(xception(width=0.1)).eval()
    free = torch.export.Dim.DYNAMIC
    program = torch.export.export(model, (torch.randn(2, 3, 71, 71),), dynamic_shapes=({0: free},))
    targets = [str(node.target) for node in program.graph.nodes]
    assert sum(target == "fused_sepconv.separable_conv2d.default" for target in targets) == 34
    x = torch.randn(3, 3, 71, 71)
    with torch.no_grad():
        torch.testing.assert_close(program.module()(x), model(x))


def saved_bytes(model, x):
    """Bytes of activations that autograd keeps between forward and backward, each storage once."""
    parameters = {p.untyped_storage().data_ptr() for p in (*model.parameters(), *model.buffers())}
    storages = {}

    def pack(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in parameters:
            storages[storage.data_ptr()] = (tensor, storage.nbytes())  # kept, so that no address is used twice
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        model(x)
    return sum(size for _, size in storages.values())


class EagerSeparableConv2d(nn.Module):
    """ReLU and two convolutions, as everybody writes it."""

    def __init__(self, ours):
        super().__init__()
        self.relu = nn.ReLU() if ours.pre_activation else nn.Identity()
        self.depthwise, self.pointwise = ours.depthwise, ours.pointwise

    def forward(self, x):
        return self.pointwise(self.depthwise(self.relu(x)))


def test_a_training_step_saves_less_than_eager_s():
    """The depthwise results too by default; without them a quarter less, at the least."""
    ours = xception()
    eager = copy.deepcopy(ours)
    for module in [m for m in eager.modules() if isinstance(m, SeparableStack)]:
        for name, child in list(module.named_children()):
            if isinstance(child, SeparableConv2d):
                setattr(module, name, EagerSeparableConv2d(child))
    x = torch.randn(1, 3, 96, 96)
    eager_bytes = saved_bytes(eager, x)
    assert saved_bytes(ours, x) < eager_bytes
    for module in [m for m in ours.modules() if isinstance(m, SeparableConv2d)]:
        module.save_intermediate = False
    # Of three tensors a layer (what ReLU, depthwise and pointwise gave) the depthwise result is gone; poolings' indices
    # and the stem's tensors stay.
    assert saved_bytes(ours, x) < 0.75 * eager_bytes


# On the kernels -----------------------------------------------------------------------------------------------------

BLOCKS = {
    "entry": lambda: SeparableStack(
        8, (12, 12), pool=MaxPool3x3(2), stride=2, norm={"eps": 1e-3, "momentum": 0.1}, activate_first=False
    ),
    "middle": lambda: SeparableStack(12, (12, 12, 12), norm={"eps": 1e-3, "momentum": 0.1}),
    "exit": lambda: SeparableStack(12, (12, 20), pool=MaxPool3x3(2), stride=2, norm={"eps": 1e-3, "momentum": 0.1}),
}


def test_blocks_export_with_images_of_any_size():
    model = nn.Sequential(BLOCKS["entry"](), BLOCKS["exit"]()).eval()
    free = torch.export.Dim.DYNAMIC
    program = torch.export.export(model, (torch.randn(2, 8, 18, 21),), dynamic_shapes=({2: free, 3: free},))
    for height, width in ((17, 17), (18, 20), (30, 33)):  # the poolings meet odd and even sizes
        x = torch.randn(2, 8, height, width)
        with torch.no_grad():
            torch.testing.assert_close(program.module()(x), model(x))


@pytest.mark.gradients
@pytest.mark.dtypes(torch.bfloat16)
@pytest.mark.parametrize("flow", BLOCKS)
def test_a_block_of_each_flow_goes_forward_and_back_on_the_kernels(target, dtype, flow):
    exact = BLOCKS[flow]().double()
    x = torch.randn(2, exact.sepconv1.depthwise.in_channels, 7, 8, dtype=torch.float64)
    block = copy.deepcopy(exact).to(target.device, dtype)
    x = x.to(dtype).contiguous(memory_format=torch.channels_last)
    exact.load_state_dict({name: tensor.double() for name, tensor in block.state_dict().items()})

    def there_and_back(block, x):
        x = x.detach().clone(memory_format=torch.preserve_format).requires_grad_()
        y = block(x)
        weight = torch.linspace(-1, 1, y.numel(), dtype=torch.float64).view(y.shape).to(y)
        (y * weight).sum().backward()
        return y.detach(), {"x": x.grad, **{name: p.grad for name, p in block.named_parameters()}}

    with fused_sepconv.use_backend("reference"):
        oracle, oracle_gradients = there_and_back(exact, x.double())
        eager, eager_gradients = there_and_back(copy.deepcopy(block), x.to(target.device))
    ours, our_gradients = there_and_back(block, x.to(target.device))
    assert_as_close_as_eager(ours, eager, oracle)
    assert len(our_gradients) > 10
    for name, gradient in our_gradients.items():
        assert_gradient_as_close_as_eager(gradient, eager_gradients[name], oracle_gradients[name], name=name)


def test_the_names_that_others_rely_on():
    assert isinstance(fused_sepconv.models.xception(device="meta"), Xception)
