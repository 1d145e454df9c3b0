"""Xception with Keras's and timm's weights computes what Keras's and timm's own networks compute."""

import argparse
import copy
import functools
import json
import warnings
import zipfile

import h5py
import numpy as np
import pytest
import torch
from sklearn.datasets import load_sample_image
from torch import nn

from fused_sepconv.models import weights, xception
from tests.support.third_party import keras, timm

TOLERANCE = 1e-5  # of the largest logit, in float32


def photographs(size, count=2):
    """(count, 3, size, size) between -1 and 1: crops of two photographs, at different scales."""
    images = []
    for name, scale in (("china.jpg", 1), ("flower.jpg", 2))[:count]:
        pixels = torch.from_numpy(np.array(load_sample_image(name))).permute(2, 0, 1)[None].float() / 127.5 - 1
        reach = min(size * scale, 427)
        images.append(nn.functional.interpolate(pixels[..., -reach:, :reach], size, mode="bilinear"))
    return torch.cat(images)


def keras_call(model, x, **options):
    return model(x.permute(0, 2, 3, 1).contiguous(), **options).detach().cpu()


WIDTH = 0.25  # of the network: a sixteenth of its weights


@functools.cache
def keras_config(size, width, **options):
    config = keras.applications.Xception(weights=None, input_shape=size and (size, size, 3), **options).get_config()
    ours, slim = (xception(width=factor, device="meta").modules() for factor in (1.0, width))
    narrow = {a.out_channels: b.out_channels for a, b in zip(ours, slim, strict=True) if isinstance(a, nn.Conv2d)}
    for layer in config["layers"]:
        layer.pop("build_config", None)  # the shape of its input
        if "filters" in layer["config"]:
            layer["config"]["filters"] = narrow[layer["config"]["filters"]]
    return config


def keras_xception(size, like=None, width=WIDTH, **options):
    """Keras's Xception, slim, for one size of image, with another's weights."""
    model = keras.Model.from_config(copy.deepcopy(keras_config(size, width, classifier_activation=None, **options)))
    if like is not None:
        model.set_weights(like.get_weights())
    return model


def with_statistics(model):
    """Its weights random, its BatchNorm statistics those of a batch of photographs."""
    random = np.random.default_rng(0)
    for layer in model.layers:
        if isinstance(layer, keras.layers.BatchNormalization):
            channels = layer.gamma.shape[0]
            layer.gamma.assign(random.uniform(0.5, 1.5, channels))
            layer.beta.assign(random.uniform(-0.3, 0.3, channels))
            layer.momentum = 0.0  # the statistics become this batch's
    with torch.no_grad():
        keras_call(model, photographs(150), training=True)
    return model


@pytest.fixture(scope="module")
def keras_model():
    keras.utils.set_random_seed(0)
    return with_statistics(keras_xception(150))


@pytest.fixture(scope="module")
def from_keras(keras_model):
    model = xception(width=WIDTH, bn_eps=1e-5, pool_padding="symmetric").eval()  # both have to come with the weights
    report = weights.load_keras(model, keras_model)
    assert len(report.loaded) == 36 + 34 + 4 + 40 * 4 + 2 and not report.kept and not report.unused
    return model


@pytest.fixture(scope="module")
def timm_model():
    """timm's Xception with weights of its own, and statistics as they come out of training."""
    torch.manual_seed(1)
    model = timm.create_model("legacy_xception")
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.weight, 0.5, 1.5)
            nn.init.uniform_(module.bias, -0.3, 0.3)
            module.momentum = None  # the average of the batches so far
    with torch.no_grad():
        model.train()(photographs(150))
    return model.eval()


def assert_same_answer(ours, theirs):
    assert ours.shape == theirs.shape
    assert theirs.abs().max() > 0.1 and theirs.std(1).min() > 0.01, "the network says something"
    difference = (ours - theirs).abs().max() / theirs.abs().max()
    assert difference < TOLERANCE, f"relative difference {difference:.2e}"
    assert torch.equal(ours.topk(5).indices, theirs.topk(5).indices)


def same_weights(ours, other):
    own, expected = ours.state_dict(), other.state_dict()
    for name in expected:
        assert torch.equal(own[name], expected[name]), name
    assert own.keys() == expected.keys()
    assert [m.eps for m in ours.modules() if isinstance(m, nn.BatchNorm2d)] == [
        m.eps for m in other.modules() if isinstance(m, nn.BatchNorm2d)
    ]
    assert ours.pool_padding == other.pool_padding


def scrambled(**options):
    """A model in which nothing is as any weights would have it."""
    model = xception(bn_eps=1e-4, pool_padding="symmetric", **options).eval()
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.normal_(module.weight)
            module.running_mean.normal_()
    return model


def slim(**options):
    return scrambled(width=WIDTH, **options)


# Keras --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", (150, 71))
@torch.no_grad()
def test_keras_s_xception_and_ours_agree(keras_model, from_keras, size):
    x = photographs(size, count=2 if size == 150 else 1)
    assert_same_answer(from_keras(x), keras_call(keras_xception(size, like=keras_model), x))


@pytest.mark.full
@torch.no_grad()
def test_and_at_their_full_width_and_size():
    theirs, ours = with_statistics(keras_xception(299, width=1.0)), scrambled()
    weights.load_keras(ours, theirs)
    assert_same_answer(ours(photographs(299)), keras_call(theirs, photographs(299)))


@torch.no_grad()
def test_with_timm_s_epsilon_or_pooling_they_would_not(from_keras):
    x = photographs(150, count=1)
    expected = from_keras(x)
    other = copy.deepcopy(from_keras)
    other.pool_padding = "symmetric"
    assert (other(x) - expected).abs().max() > 1e-3 * expected.abs().max()
    other = copy.deepcopy(from_keras)
    for module in other.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.eps = 1e-5
    assert (other(x) - expected).abs().max() > 1e-3 * expected.abs().max()


@pytest.fixture(scope="module")
def keras_files(keras_model, tmp_path_factory):
    folder = tmp_path_factory.mktemp("keras")
    files = {suffix: folder / f"xception{suffix}" for suffix in (".keras", ".weights.h5", ".h5")}
    keras_model.save(files[".keras"])
    keras_model.save_weights(files[".weights.h5"])
    keras_model.save(files[".h5"])
    return files


@pytest.mark.parametrize("suffix", (".keras", ".weights.h5", ".h5"))
def test_every_file_of_keras_has_the_same_weights(keras_files, from_keras, suffix):
    model = slim()
    weights.load_keras(model, keras_files[suffix])
    same_weights(model, from_keras)


def test_without_a_top_the_classifier_stays(keras_model, from_keras, tmp_path):
    without_top = keras_xception(None, include_top=False)
    without_top.set_weights(keras_model.get_weights()[:-2])
    without_top.save_weights(tmp_path / "notop.weights.h5")
    for source in (without_top, tmp_path / "notop.weights.h5"):
        model = slim(num_classes=10, hidden_units=(8,))
        head = {name: t.clone() for name, t in model.state_dict().items() if name.startswith(("hidden", "classifier"))}
        report = weights.load_keras(model, source)
        assert set(report.kept) == head.keys() and "classifier.weight" in str(report)
        assert all(torch.equal(model.state_dict()[name], tensor) for name, tensor in head.items())
        assert torch.equal(model.exit.module2.bn2.running_var, from_keras.exit.module2.bn2.running_var)


def test_a_model_of_features_leaves_the_top_in_the_file(keras_model, from_keras):
    for options in ({"features_only": True}, {"num_classes": 0}):
        model = slim(**options)
        report = weights.load_keras(model, keras_model)
        assert report.unused == ("predictions",) and not report.kept
        same = from_keras.state_dict()
        assert all(torch.equal(tensor, same[name]) for name, tensor in model.state_dict().items())


def rewritten(source, target, rename):
    """A legacy .h5 file as an older Keras wrote it: weights alone, with other names for layers and variables."""
    with h5py.File(source) as old, h5py.File(target, "w") as new:
        layers = [name for name in old["model_weights"].attrs["layer_names"] if name in old["model_weights"]]
        written = []
        for layer in layers:
            new_layer = rename(layer, None)
            group = new.create_group(new_layer)
            names = []
            for name in old["model_weights"][layer].attrs["weight_names"]:
                new_name = rename(layer, name.rsplit("/", 1)[-1])
                names.append(new_name.encode())
                group[new_name] = old["model_weights"][layer][name][()]
            group.attrs["weight_names"] = names
            written.append(new_layer.encode())
        new.attrs["layer_names"] = written


def keras_1(layer, variable):
    layer = layer.replace("conv2d_", "convolution2d_1").replace("batch_normalization", "batchnormalization")
    variables = {"kernel": "W", "bias": "b", "moving_mean": "running_mean", "moving_variance": "running_std"}
    return layer if variable is None else f"{layer}_{variables.get(variable, variable)}:0"


def keras_2(layer, variable):
    return layer if variable is None else f"{layer}/{variable}:0"


@pytest.mark.parametrize("rename", (keras_1, pytest.param(keras_2, marks=pytest.mark.full)))
def test_the_names_of_older_releases_are_known(keras_files, from_keras, tmp_path, rename):
    rewritten(keras_files[".h5"], tmp_path / "old.h5", rename)
    model = slim()
    weights.load_keras(model, tmp_path / "old.h5")
    same_weights(model, from_keras)


def without_names(source, target):
    """A .weights.h5 or .keras file whose groups do not say which layer they are, as Keras 3 began."""
    if source.suffix == ".keras":
        inner = target.with_suffix(".h5")
        with zipfile.ZipFile(source) as old:
            inner.write_bytes(old.read("model.weights.h5"))
            config = old.read("config.json")
        without_names(inner, inner)
        with zipfile.ZipFile(target, "w") as new:
            new.writestr("config.json", config)
            new.write(inner, "model.weights.h5")
        return
    if source != target:
        target.write_bytes(source.read_bytes())
    with h5py.File(target, "r+") as file:
        for group in file["layers"].values():
            group["vars"].attrs.pop("name", None)


def test_a_file_that_does_not_name_its_layers_is_refused_unless_its_configuration_does(
    keras_files, from_keras, tmp_path
):
    without_names(keras_files[".keras"], tmp_path / "x.keras")
    model = slim()
    weights.load_keras(model, tmp_path / "x.keras")
    same_weights(model, from_keras)
    without_names(keras_files[".weights.h5"], tmp_path / "x.weights.h5")
    with pytest.raises(ValueError, match="does not name its layers"):
        weights.load_keras(model, tmp_path / "x.weights.h5")


def test_the_epsilon_in_the_configuration_is_the_one_that_counts(keras_files, tmp_path):
    with zipfile.ZipFile(keras_files[".keras"]) as old, zipfile.ZipFile(tmp_path / "x.keras", "w") as new:
        config = json.loads(old.read("config.json"))
        for layer in config["config"]["layers"]:
            if layer["config"]["name"] == "block9_sepconv2_bn":
                layer["config"]["epsilon"] = 0.5
        new.writestr("config.json", json.dumps(config))
        new.writestr("model.weights.h5", old.read("model.weights.h5"))
    model = slim()
    weights.load_keras(model, tmp_path / "x.keras")
    assert model.middle.module5.bn2.eps == 0.5 and model.middle.module5.bn1.eps == 1e-3


@pytest.mark.parametrize(
    ("options", "words"),
    (
        ({"num_classes": 10}, r"classifier.weight \(predictions/kernel in Keras\): expected shape \(10, 512\)"),
        ({"in_channels": 1}, r"entry.module1.conv1.weight \(block1_conv1/kernel.*\): expected shape \(8, 1, 3, 3\)"),
        ({"middle_blocks": 7}, "block14_sepconv1: no such layer.* and 3 more like it"),
        (
            {"middle_blocks": 9},
            r"module9.bn3.weight \(block13_sepconv3_bn/gamma in Keras\): missing.* \d+ more like it",
        ),
        ({"residual": False}, "conv2d.*: no such layer"),
        ({"hidden_units": (8,)}, "hidden.0.weight: missing"),
    ),
    ids=str,
)
def test_every_mismatch_is_named_and_nothing_is_loaded(keras_model, options, words):
    model = slim(**options)
    before = copy.deepcopy(model)
    with pytest.raises(ValueError, match=words):
        weights.load_keras(model, keras_model)
    same_weights(model, before)


def fine_tuned(keras_model, classes, name="my_head"):
    """The network with another head, as Keras's guide to transfer learning has it."""
    features = keras_model.get_layer("avg_pool").output
    return keras.Model(keras_model.input, keras.layers.Dense(classes, name=name)(features))


def test_a_head_of_another_name_is_the_classifier(keras_model, tmp_path):
    theirs = fine_tuned(keras_model, 7)
    kernel = torch.tensor(theirs.get_layer("my_head").get_weights()[0]).T
    theirs.save(tmp_path / "tuned.h5")
    for source in (theirs, tmp_path / "tuned.h5"):
        model = slim(num_classes=7)
        report = weights.load_keras(model, source)
        assert not report.kept and not report.unused and torch.equal(model.classifier.weight, kernel)
    report = weights.load_keras(slim(num_classes=0), theirs)
    assert report.unused == ("my_head",)
    with pytest.raises(
        ValueError, match=r"classifier.weight \(predictions/kernel in Keras\): expected shape \(10, 512\)"
    ):
        weights.load_keras(slim(num_classes=10), theirs)


def test_a_model_inside_a_model_says_what_to_pass(tmp_path):
    x = keras.Input((71, 71, 3))
    convolved = keras.layers.Conv2D(4, 3)(keras.layers.Conv2D(4, 3)(x))
    inner = keras.Model(x, keras.layers.GlobalAveragePooling2D()(convolved))
    outer = keras.Sequential([keras.Input((71, 71, 3)), inner, keras.layers.Dense(7)])
    for suffix in (".keras", ".weights.h5", ".h5"):
        (outer.save_weights if suffix == ".weights.h5" else outer.save)(tmp_path / f"nested{suffix}")
    for source in (outer, *tmp_path.iterdir()):
        with pytest.raises(ValueError, match=r"a model of its own.*model.get_layer\(...\)"):
            weights.load_keras(slim(num_classes=7), source)


def test_a_layer_that_is_missing_or_strange_is_named(keras_files, tmp_path):
    def edited(edit):
        path = tmp_path / "edited.h5"
        path.write_bytes(keras_files[".h5"].read_bytes())
        with h5py.File(path, "r+") as file:
            edit(file["model_weights"])
        return path

    def refused(edit, words):
        with pytest.raises(ValueError, match=words):
            weights.load_keras(slim(), edited(edit))

    def drop(group):
        group.attrs["layer_names"] = [n for n in group.attrs["layer_names"] if n != "block3_sepconv1"]

    def without_gamma(group):
        bn = group["block3_sepconv1_bn"]
        bn.attrs["weight_names"] = [n for n in bn.attrs["weight_names"] if "gamma" not in n]

    def twice(group):
        skip = next(name for name in group.attrs["layer_names"] if name.startswith("conv2d"))
        group.copy(skip, "another")
        group.attrs["layer_names"] = [*group.attrs["layer_names"], "another"]

    refused(drop, r"entry.module3.sepconv1.depthwise.weight \(block3_sepconv1/depthwise_kernel in Keras\): missing")
    refused(without_gamma, r"block3_sepconv1_bn: expected the variables \['beta', 'gamma'")
    refused(twice, "entry.module2.skip: .*another.* both have its shape")


def test_what_is_no_keras_model_is_refused(tmp_path):
    model = xception(middle_blocks=0)
    with pytest.raises(TypeError, match="source"):
        weights.load_keras(model, 3)
    with pytest.raises(FileNotFoundError, match="no such file"):
        weights.load_keras(model, tmp_path / "x.h5")
    (tmp_path / "x.h5").write_text("hello")
    with pytest.raises(ValueError, match="is no Keras file"):
        weights.load_keras(model, tmp_path / "x.h5")
    with h5py.File(tmp_path / "x.h5", "w") as file:
        file["a"] = np.zeros(3)
    with pytest.raises(ValueError, match="has no layers"):
        weights.load_keras(model, tmp_path / "x.h5")
    with zipfile.ZipFile(tmp_path / "x.keras", "w") as archive:
        archive.writestr("a", "b")
    with pytest.raises(ValueError, match=r"not a .keras file"):
        weights.load_keras(model, tmp_path / "x.keras")
    with pytest.raises(TypeError, match=r"model: expected a fused_sepconv.models.Xception"):
        weights.load_keras(nn.Linear(1, 1), tmp_path / "x.keras")
    with pytest.raises(ValueError, match="meta"):
        weights.load_keras(xception(device="meta"), tmp_path / "x.keras")


# timm ---------------------------------------------------------------------------------------------------------------


@torch.no_grad()
def test_timm_s_xception_and_ours_agree(timm_model):
    ours = scrambled()
    weights.load_timm(ours, timm_model)
    assert ours.entry.module1.bn1.eps == 1e-5 and ours.pool_padding == "symmetric"
    for x in (photographs(150), photographs(71, count=1)):
        assert_same_answer(ours(x), timm_model(x))


@torch.no_grad()
def test_timm_s_features_are_ours(timm_model):
    ours = scrambled(features_only=True)
    report = weights.load_timm(ours, timm_model)
    assert report.unused == ("fc.bias", "fc.weight")
    x = photographs(150, count=1)
    for mine, theirs in zip(ours(x), timm_model.forward_intermediates(x, intermediates_only=True), strict=True):
        assert (mine - theirs).abs().max() < TOLERANCE * theirs.abs().max()


@torch.no_grad()
def test_ours_written_to_timm_s_names_is_the_same_network_there(timm_model):
    ours = scrambled()
    weights.load_timm(ours, timm_model)
    for module in ours.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.eps = 1e-3
    theirs = timm.create_model("legacy_xception").eval()
    theirs.load_state_dict(weights.to_timm(ours))  # Keras's epsilon goes into the variances
    x = photographs(150, count=1)
    assert_same_answer(theirs(x), ours(x))


def test_to_timm_is_load_timm_backwards(timm_model):
    ours = xception()
    weights.load_timm(ours, timm_model)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        back = weights.to_timm(ours)
    expected = timm_model.state_dict()
    assert back.keys() == expected.keys()
    assert all(torch.equal(back[name], tensor) for name, tensor in expected.items())


def test_to_timm_says_what_timm_cannot_do():
    with pytest.warns(UserWarning, match="symmetric"):
        weights.to_timm(xception())
    for options in ({"middle_blocks": 1}, {"residual": False}, {"mid_activation": "relu"}, {"hidden_units": (3,)}):
        with pytest.raises(ValueError, match="model: timm's legacy_xception has"):
            weights.to_timm(xception(**options))
    with pytest.raises(ValueError, match="running_var"):
        model = xception(bn_eps=0, pool_padding="symmetric")
        nn.init.zeros_(model.middle.module2.bn1.running_var)
        weights.to_timm(model)


def test_timm_s_files_and_their_older_forms_load(timm_model, tmp_path):
    expected = xception()
    weights.load_timm(expected, timm_model)
    state = timm_model.state_dict()
    old = {
        name.replace("fc.", "last_linear."): tensor[:, :, 0, 0] if "pointwise" in name else tensor
        for name, tensor in state.items()
        if not name.endswith("num_batches_tracked")
    }
    torch.save(old, tmp_path / "xception-b5690688.pth")
    torch.save({"state_dict": {f"module.{name}": t for name, t in state.items()}}, tmp_path / "checkpoint.pth.tar")
    import safetensors.torch

    safetensors.torch.save_file(state, tmp_path / "model.safetensors")
    for source in (old, *tmp_path.iterdir()):
        model = scrambled()
        weights.load_timm(model, source)
        for module in model.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.num_batches_tracked.fill_(1)  # which the old file does not have
        same_weights(model, expected)


def test_checkpoints_of_training_load(timm_model, tmp_path):
    """timm's own have its arguments beside the weights; others nest them, or wrap the model."""
    expected = xception()
    weights.load_timm(expected, timm_model)
    state = timm_model.state_dict()
    arguments = argparse.Namespace(model="legacy_xception", lr=0.1, tags=["a"])
    torch.save({"epoch": 3, "args": arguments, "state_dict": state, "metric": 0.7}, tmp_path / "timm.pth.tar")
    wrapped = [
        {"state_dict": {prefix + name.replace("fc.", "last_linear."): tensor for name, tensor in state.items()}}
        for prefix in ("model.", "module.", "_orig_mod.", "module._orig_mod.", "model.module.")
    ]
    for source in (tmp_path / "timm.pth.tar", {"model": state, "epoch": 3}, *wrapped):
        model = scrambled()
        weights.load_timm(model, source)
        same_weights(model, expected)


def test_a_checkpoint_of_other_objects_is_refused(tmp_path):
    torch.save({"state_dict": {}, "recipe": Recipe()}, tmp_path / "x.pth")
    with pytest.raises(ValueError, match=r"x.pth holds more than tensors"):
        weights.load_timm(scrambled(), tmp_path / "x.pth")


class Recipe:
    """What a weights-only reader does not know."""


def test_weights_of_another_network_are_refused_in_a_few_words():
    other = timm.create_model("resnet18")
    for load, source in ((weights.load_timm, other), (weights.load_timm, {"a": torch.ones(1)})):
        with pytest.raises(ValueError, match=r"\d+ differ: .*, and \d+ more like it") as error:
            load(scrambled(), source)
        assert len(str(error.value).splitlines()) == 1 and len(str(error.value)) < 1000


def test_timm_s_mismatches_are_named(timm_model, tmp_path):
    state = timm_model.state_dict()
    model = scrambled()
    before = copy.deepcopy(model)
    missing = {name: tensor for name, tensor in state.items() if name != "block5.rep.4.pointwise.weight"}
    with pytest.raises(ValueError, match=r"module2.sepconv2.pointwise.weight \(block5.rep.4.*\): missing"):
        weights.load_timm(model, missing)
    with pytest.raises(ValueError, match=r"block5.rep.9.weight: no such tensor"):
        weights.load_timm(model, {**state, "block5.rep.9.weight": torch.zeros(1)})
    with pytest.raises(ValueError, match=r"\(fc.weight in timm\): expected shape"):
        weights.load_timm(model, {**state, "fc.weight": torch.zeros(10, 2048)})
    with pytest.raises(ValueError, match=r"classifier.bias: missing"):
        weights.load_timm(model, {name: tensor for name, tensor in state.items() if name != "fc.bias"})
    torch.save([1], tmp_path / "x.pth")
    with pytest.raises(ValueError, match="holds no state dict"):
        weights.load_timm(model, tmp_path / "x.pth")
    with pytest.raises(FileNotFoundError, match="no such file"):
        weights.load_timm(model, tmp_path / "y.pth")
    with pytest.raises(TypeError, match="source"):
        weights.load_timm(model, 3)
    same_weights(model, before)


# safetensors --------------------------------------------------------------------------------------------------------


def test_safetensors_keep_the_weights_and_what_belongs_to_them(from_keras, timm_model, tmp_path):
    from_timm = xception()
    weights.load_timm(from_timm, timm_model)
    for source, width in ((from_keras, WIDTH), (from_timm, 1.0)):
        weights.save_safetensors(source, tmp_path / "x.safetensors")
        model = scrambled(width=width)
        assert not weights.load_safetensors(model, tmp_path / "x.safetensors").kept
        same_weights(model, source)
    with pytest.raises(ValueError, match=r"middle.module8.bn1.bias: no such tensor"):
        weights.load_safetensors(xception(middle_blocks=7), tmp_path / "x.safetensors")
    import safetensors.torch

    safetensors.torch.save_file(timm_model.state_dict(), tmp_path / "timm.safetensors")
    with pytest.raises(ValueError, match="load_timm"):
        weights.load_safetensors(model, tmp_path / "timm.safetensors")
    with pytest.raises(FileNotFoundError, match="no such file"):
        weights.load_safetensors(model, tmp_path / "y.safetensors")
