"""The example that classifies a photograph: from a file of pixels and one of weights to the names of classes."""

import importlib.util
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from sklearn.datasets import load_sample_image

from fused_sepconv.models import weights, xception
from tests.support.third_party import timm

EXAMPLE = Path(__file__).resolve().parents[2] / "examples" / "classify.py"


@pytest.fixture(scope="module")
def example():
    spec = importlib.util.spec_from_file_location("classify", EXAMPLE)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def photograph(tmp_path):
    path = tmp_path / "flower.png"
    Image.fromarray(load_sample_image("flower.jpg")).save(path)
    return path


def test_the_names_are_imagenet_s_in_its_order(example):
    names = example.CLASSES.read_text().splitlines()
    assert len(names) == len(set(names)) == 1000
    known = {0: "tench", 1: "goldfish", 207: "golden retriever", 281: "tabby", 340: "zebra", 999: "toilet tissue"}
    assert {index: names[index] for index in known} == known


def test_an_image_is_prepared_as_timm_prepares_it(example, photograph):
    config = timm.data.resolve_data_config({}, model=timm.create_model("legacy_xception"))
    expected = timm.data.create_transform(**config)(Image.open(photograph))
    actual = example.read_image(photograph)[0]
    assert actual.shape == expected.shape == (3, 299, 299)
    torch.testing.assert_close(actual, expected, rtol=0, atol=1e-6)


def test_it_prints_the_five_likeliest_classes(example, photograph, tmp_path, capsys):
    theirs = timm.create_model("legacy_xception").eval()
    with torch.no_grad():
        theirs.fc.weight.mul_(1e-3)
        for rank, index in enumerate((985, 309, 323, 108, 11)):
            theirs.fc.bias[index] += 10 - rank
    torch.save(theirs.state_dict(), tmp_path / "timm.pth")
    own = xception()
    weights.load_timm(own, theirs)
    weights.save_safetensors(own, tmp_path / "own.safetensors")
    with torch.no_grad():
        expected = theirs(example.read_image(photograph)).softmax(1)[0].topk(5)
    assert expected.indices.tolist() == [985, 309, 323, 108, 11]
    for file in ("timm.pth", "own.safetensors"):
        assert example.main([str(photograph), "--weights", str(tmp_path / file), "--device", "cpu"]) == 0
        first, *lines = capsys.readouterr().out.splitlines()
        assert first == str(photograph)
        found = [tuple(line.strip().split("  ")) for line in lines]
        assert [name for _, name in found] == ["daisy", "bee", "monarch", "sea anemone", "goldfinch"]
        assert [percent for percent, _ in found] == [f"{float(p):.1%}" for p in expected.values]


@pytest.mark.full
def test_keras_s_file_and_other_classes(example, photograph, tmp_path, capsys):
    from tests.support.third_party import keras

    theirs = keras.applications.Xception(weights=None, classes=3)
    theirs.layers[-1].bias.assign(np.array([0.0, 9.0, 5.0]))
    theirs.save_weights(tmp_path / "three.weights.h5")
    (tmp_path / "three.txt").write_text("one\ntwo\nthree\n")
    command = [
        str(photograph),
        "--weights",
        str(tmp_path / "three.weights.h5"),
        "--classes",
        str(tmp_path / "three.txt"),
    ]
    assert example.main([*command, "--top", "2", "--device", "cpu"]) == 0
    assert [line.split()[-1] for line in capsys.readouterr().out.splitlines()[1:]] == ["two", "three"]
    assert example.main(command) == 1
    assert "--top: expected 1 to 3, got 5" in capsys.readouterr().err


def test_what_is_wrong_is_said_in_a_line(example, photograph, tmp_path, capsys):
    (tmp_path / "x.h5").write_text("hello")
    assert example.main([str(photograph), "--weights", str(tmp_path / "x.h5")]) == 1
    assert "is no Keras file" in capsys.readouterr().err
    assert example.main([str(photograph), "--weights", str(tmp_path / "y.pth")]) == 1
    assert "no such file" in capsys.readouterr().err
