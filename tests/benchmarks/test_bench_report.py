"""`bench.py compare` and `bench.py report`: every figure comes from a result, and predictions are called that."""

from __future__ import annotations

import json
import re
from copy import deepcopy
from pathlib import Path
from typing import Any

import bench
import ceilings
import jsonschema
import options
import pytest
import record
import report
import roofline
import summary
from layers import NETWORKS, Layer
from plans import explanations
from predictions import predict_suite

CHECKOUT = Path(__file__).parents[2]
README = f"# Title\n\nbefore\n\n{report.BEGIN}\n\nold\n\n{report.END}\n\nafter\n"
LAYERS = (Layer(6, 10, 5, count=3), Layer(10, 12, 3))


@pytest.fixture(scope="module")
def measured(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """A small result of the CPU."""
    path = tmp_path_factory.mktemp("measured") / "cpu.json"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(bench, "XCEPTION", LAYERS)
        patch.setattr(bench, "show", lambda *_: None)
        patch.setitem(NETWORKS, "xception", LAYERS)
        patch.setitem(options.QUICK_SECONDS, "cpu", 0.01)
        patch.setitem(ceilings.COPY_BYTES, "cpu", 2**16)
        patch.setitem(ceilings.PRODUCT_SIZE, "cpu", 32)
        bench.main(["--quick", "--device", "cpu", "--suite", "layers", "--passes", "fwd", "--json", str(path)])
    return json.loads(path.read_text())


@pytest.fixture
def result(measured: dict[str, Any]) -> dict[str, Any]:
    """That result, for a test of its own."""
    return deepcopy(measured)


def of_a_gpu(result: dict[str, Any]) -> dict[str, Any]:
    """What a GPU's result looks like: the same rows with times and a name that no machine has."""
    made = deepcopy(result)
    made["env"]["gpu"] = {
        "name": "Planted GPU",
        "capability": "9.0",
        "memory_bytes": 1,
        "multiprocessors": 1,
        "driver": "1.2",
        "clocks": None,
        "cuda": "13.0",
        "cudnn": 91900,
    }
    times = {"eager-nchw": 0.9, "eager-nhwc": 0.6, "fused_sepconv": 0.2}
    layers = [row for row in made["rows"] if row["layout"] == "nhwc" or row["impl"] == "eager-nchw"]
    for row in layers:
        row |= {"device": "cuda", "mode": "cold", "median_ms": times[row["impl"]], "floor_ms": 0.1}
    networks = [
        layers[0] | {"suite": "model", "network": network, "case": case, "impl": impl, "pass": "both", "median_ms": ms}
        for network, case, impl, ms in (
            ("inception_v3", "Inception V3@299", "timm-nhwc", 50.0),
            ("xception", "Xception@299", "timm-nhwc", 100.0),
            ("xception", "Xception@299", "fused_sepconv", 40.0),
        )
    ]
    made["rows"] = layers + networks
    made["summary"] = summary.summarize(made["rows"], made["summary"]["predictions"])
    jsonschema.validate(made, json.loads(record.SCHEMA_FILE.read_text()))
    return made


@pytest.fixture
def place(tmp_path: Path) -> Path:
    """A README, and a folder of results with nothing in it."""
    (tmp_path / "README.md").write_text(README)
    (tmp_path / "results").mkdir()
    return tmp_path


def run_report(place: Path, *more: str) -> tuple[int, str]:
    status = bench.main(["report", "--readme", str(place / "README.md"), "--results", str(place / "results"), *more])
    return status, (place / "README.md").read_text()


def unwrapped(text: str) -> str:
    """Without the line breaks of paragraphs."""
    return " ".join(text.split())


# Report


def test_without_a_gpu_the_readme_says_so_and_shows_predictions(place: Path, result: dict[str, Any]) -> None:
    (place / "results" / "cpu.json").write_text(json.dumps(result))
    status, text = run_report(place)
    assert status == 0
    assert text.startswith("# Title\n\nbefore\n") and text.endswith("\n\nafter\n") and "old" not in text
    assert "**No GPU has been measured yet" in text
    assert "predicted for an H200, not measured" in unwrapped(text)
    lines = {
        (line["case"], line["pass"]): line
        for line in predict_suite(report.XCEPTION, ("fwd", "bwd"), 64, "bfloat16")["rows"]
    }
    (row,) = (line for line in text.splitlines() if line.startswith("| 728->728@19 |"))
    figures = [float(cell) for cell in row.strip("| ").split("|")[2:]]
    assert figures == pytest.approx(
        [
            lines["728->728@19", direction][key] * 1e3
            for direction in ("fwd", "bwd")
            for key in ("unfused_floor_ms", "predicted_ms", "floor_ms")
        ],
        rel=6e-3,
    )
    assert "inference 3.98 ms with separate kernels, 2.04 ms fused" in unwrapped(text)


def test_a_gpu_result_replaces_the_predictions(place: Path, result: dict[str, Any]) -> None:
    (place / "results" / "gpu.json").write_text(json.dumps(of_a_gpu(result)))
    (place / "results" / "gpu.models.png").write_bytes(b"")
    status, text = run_report(place)
    assert status == 0
    assert "### Planted GPU" in text and "redicted" not in text
    assert "| xception | forward | float32, 1 | nhwc | cold | 3.00x | 3.00x (6->10@5) |" in text
    assert re.search(r"\| 6->10@5 \| 3 \| 200 \| 600 \(eager-nhwc\) \| 3.00x \| 100 \|", text)
    assert "0.90 in the paper (28 against 31), 0.48 to 0.64 in timm's published figures. Ours: 1.25." in unwrapped(text)
    assert "[models](benchmarks/results/gpu.models.png)" in text


def test_report_changes_nothing_twice_and_check_tells_an_old_readme(place: Path) -> None:
    assert run_report(place, "--check") == (1, README)
    _, first = run_report(place)
    assert run_report(place) == (0, first)
    assert run_report(place, "--check") == (0, first)


def test_a_readme_without_a_place_for_results_is_an_error(place: Path, capsys: pytest.CaptureFixture) -> None:
    (place / "README.md").write_text("# Title\n")
    assert run_report(place) == (2, "# Title\n")
    assert report.BEGIN in capsys.readouterr().out


def test_our_readme_is_up_to_date(capsys: pytest.CaptureFixture) -> None:
    assert bench.main(["report", "--check"]) == 0, capsys.readouterr().out


def test_committed_results_validate() -> None:
    schema = json.loads(record.SCHEMA_FILE.read_text())
    jsonschema.Draft202012Validator.check_schema(schema)
    for path in (CHECKOUT / "benchmarks" / "results").glob("*.json"):
        jsonschema.validate(json.loads(path.read_text()), schema)


# Compare


def test_compare_shows_what_changed(result: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    later = deepcopy(result)
    later["env"]["torch"] = "9.9"
    first, second, third, *_ = later["rows"]
    first["median_ms"] *= 10
    second["median_ms"] += second["iqr_ms"] / 2
    third |= {"median_ms": None, "iqr_ms": None, "error": "wrong answer: y"}
    later["rows"].pop()
    paths = []
    for name, content in (("a", result), ("b", later)):
        paths.append(tmp_path / f"{name}.json")
        paths[-1].write_text(json.dumps(content))
    capsys.readouterr()
    assert bench.main(["compare", *map(str, paths)]) == 0
    output = capsys.readouterr().out
    assert f"torch: {result['env']['torch']} -> 9.9" in output
    assert "10.00x" in output and output.count("layers:") == 1
    assert "a time -> wrong answer: y" in output
    assert f"Only in {paths[0]}: 1 rows" in output


@pytest.mark.parametrize(
    ("content", "message"), [("{", "can't be read"), ("[]", "not a result"), ('{"schema": 1}', "not a result")]
)
def test_compare_names_a_file_that_is_no_result(
    content: str, message: str, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    path = tmp_path / "broken.json"
    path.write_text(content)
    assert bench.main(["compare", str(path), str(path)]) == 2
    assert f"{path}: " in (output := capsys.readouterr().out) and message in output


def test_a_result_of_another_schema_is_refused(result: dict[str, Any], tmp_path: Path) -> None:
    path = tmp_path / "old.json"
    path.write_text(json.dumps(result | {"schema": 1}))
    with pytest.raises(ValueError, match="schema 1"):
        record.read(path)


# Plan


@pytest.mark.parametrize("device", ["A100", "H200"])
def test_the_plan_of_a_network_shows_every_layer_and_sums_them(capsys: pytest.CaptureFixture[str], device: str) -> None:
    assert bench.main(["plan", "--device", device]) == 0
    text = capsys.readouterr().out
    names = re.findall(r"^(\d+) x (\S+)$", text, re.MULTILINE)
    assert [(int(count), name) for count, name in names] == [
        (layer.count, layer.name) for layer in NETWORKS["xception"]
    ]
    assert text.count("  -> ") == 2 * len(names) and text.count(f"on {device}: floor") == 2 * len(names)
    for direction in ("forward", "backward"):
        layers = re.findall(rf" {direction},.*: floor ([\d.]+) us\n  -> .*?predicted ([\d.]+) us", text)
        sums = [
            sum(int(count) * float(line[column]) for (count, _), line in zip(names, layers, strict=True))
            for column in (1, 0)
        ]
        total = re.search(rf"34 layers, predicted:.* {direction} (\d+) us \(floor (\d+)\)", text)
        assert [float(figure) for figure in total.groups()] == pytest.approx(sums, abs=2)


@pytest.mark.parametrize("dtype", ["bfloat16", "float32", "tf32"])
def test_a_plans_floor_is_that_of_perfect_fused_kernels(dtype: str) -> None:
    for layer in NETWORKS["xception"]:
        (explanation,) = explanations([layer], "H200", 64, dtype)
        for direction, floor in (("fwd", explanation.forward), ("bwd", explanation.backward)):
            expected = roofline.floor(layer, 64, dtype, direction).milliseconds
            assert floor.floor_seconds * 1e3 == pytest.approx(expected, rel=0.02)  # it counts the depthwise weights too


@pytest.mark.parametrize("arguments", [["--device", "Z80"], ["--batch", "0"], ["--network", "lenet"]])
def test_a_plan_refuses_what_it_does_not_know(capsys: pytest.CaptureFixture[str], arguments: list[str]) -> None:
    with pytest.raises(SystemExit):
        bench.main(["plan", *arguments])
    assert arguments[0] in capsys.readouterr().err
