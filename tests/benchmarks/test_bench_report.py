"""`bench.py compare` and `bench.py report`: every figure comes from a result, and floors are called that."""

from __future__ import annotations

import json
from copy import deepcopy
from pathlib import Path
from typing import Any

import bench
import machine
import pytest
import record
import report
from layers import NETWORKS, Layer

README = f"# Title\n\nbefore\n\n{report.BEGIN}\n\nold\n\n{report.END}\n\nafter\n"
LAYERS = (Layer(6, 10, 5, count=3), Layer(10, 12, 3))


@pytest.fixture(scope="module")
def measured(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """A small result of the CPU."""
    path = tmp_path_factory.mktemp("measured") / "cpu.json"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(bench.plots, "draw", lambda *_: ())
        patch.setitem(NETWORKS, "xception", LAYERS)
        patch.setitem(bench.QUICK_SECONDS, "cpu", 0.01)
        patch.setitem(machine.COPY_BYTES, "cpu", 2**16)
        patch.setitem(machine.PRODUCT_SIZE, "cpu", 32)
        bench.main(["--quick", "--device", "cpu", "--suite", "layers", "--passes", "fwd", "--json", str(path)])
    return json.loads(path.read_text())


@pytest.fixture
def result(measured: dict[str, Any]) -> dict[str, Any]:
    """That result, for a test of its own."""
    return deepcopy(measured)


def of_a_gpu(made: dict[str, Any]) -> dict[str, Any]:
    """The same rows with times and a name that no machine has."""
    made["env"]["gpu"] = {"name": "Planted GPU", "driver": "1.2", "cuda": "13.0", "cudnn": 91900}
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
    return made | {"summary": record.summarize(made["rows"])}


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


def test_without_a_gpu_the_readme_says_so_and_shows_floors(place: Path, result: dict[str, Any]) -> None:
    (place / "results" / "cpu.json").write_text(json.dumps(result))
    status, text = run_report(place)
    assert status == 0
    assert text.startswith("# Title\n\nbefore\n") and text.endswith("\n\nafter\n") and "old" not in text
    assert "No GPU has been measured yet" in text and "computed and not measured" in unwrapped(text)
    assert "| 728->728@19 | 25 | 1166 | 775 | 2332 | 1550 |" in text
    assert "| all | 34 | 2363 | 1488 | 4725 | 2728 |" in text


def test_a_gpu_result_replaces_the_floors(place: Path, result: dict[str, Any]) -> None:
    (place / "results" / "gpu.json").write_text(json.dumps(of_a_gpu(result)))
    (place / "results" / "gpu.networks.png").write_bytes(b"")
    status, text = run_report(place)
    assert status == 0
    assert "### Planted GPU" in text and "No GPU" not in text
    assert "| xception | forward | float32, 1 | nhwc | cold | 3.00x | 3.00x (6->10@5) |" in text
    assert "| 6->10@5 | 3 | 0.900 | 0.600 | 0.200 | 3.00x |" in text
    assert "0.90 in the paper (28 against 31), 0.48 to 0.64 in timm's published figures. Ours: 1.25." in unwrapped(text)
    assert "[networks](benchmarks/results/gpu.networks.png)" in text


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
    ("content", "message"),
    [
        ("{", "can't be read"),
        ("[]", "not a result"),
        ('{"schema": 1}', "not a result"),
        ('{"schema": 1, "env": {}, "rows": [], "summary": {}}', "schema 1"),
    ],
)
def test_compare_names_a_file_that_is_no_result(
    content: str, message: str, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    path = tmp_path / "broken.json"
    path.write_text(content)
    assert bench.main(["compare", str(path), str(path)]) == 2
    assert f"{path}: " in (output := capsys.readouterr().out) and message in output
