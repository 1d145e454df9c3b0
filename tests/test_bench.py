"""The benchmark tells the truth: its floors are right, it refuses a wrong answer, and its file says it all."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).parent.parent / "benchmarks"))  # its files import each other by their bare names

import bench
import record
import roofline
import suites
import timing
from check import Check
from layers import XCEPTION, Layer
from peers import Implementation, eager, implementations
from predictions import predict_suite
from problem import DTYPES, LAYOUTS, PASSES, Problem

TINY = Layer(6, 10, 5, count=3)
SETTINGS = suites.Settings(
    device="cpu",
    batch=1,
    dtype="float32",
    layouts=("nchw", "nhwc"),
    passes=("fwd", "bwd", "both"),
    seconds=0.01,
    threads=1,
    turns=2,
    input_sets=1,
)

MODELS = (
    roofline.forward_unfused,
    roofline.forward_fused,
    roofline.backward_unfused,
    roofline.backward_two_kernels,
    roofline.backward_one_pass,
)
FLOORS = {  # µs for each of MODELS, bfloat16, batch 64
    "64->128@147": (205.8, 123.5, 411.7, 288.2, 164.7),
    "128->128@147": (329.3, 164.7, 658.7, 411.7, 247.0),
    "128->256@74": (104.3, 62.6, 208.7, 146.1, 83.5),
    "256->256@74": (166.9, 83.5, 333.9, 208.7, 125.2),
    "256->728@37": (62.2, 41.3, 124.4, 92.0, 82.7),
    "728->728@37": (176.9, 117.6, 353.8, 235.1, 235.1),
    "728->728@19": (46.6, 31.0, 93.3, 62.0, 62.0),
    "728->1024@19": (59.2, 43.6, 118.5, 87.2, 87.2),
    "1024->1536@10": (31.6, 25.5, 63.2, 51.0, 51.0),
    "1536->2048@10": (60.1, 51.0, 120.2, 101.9, 101.9),
}
ALL_FLOORS = (2363, 1488, 4725, 3172, 2728)


@pytest.fixture
def tiny_run(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Callable[..., tuple[int, dict]]:
    """Runs the command line on one tiny layer; returns its exit status and what it wrote."""
    monkeypatch.setattr(bench, "XCEPTION", (TINY,))
    monkeypatch.setattr(bench, "QUICK_SECONDS", 0.01)

    def run(*options: str) -> tuple[int, dict]:
        path = tmp_path / "tiny.json"
        status = bench.main(["--quick", "--device", "cpu", "--json", str(path), *options])
        return status, json.loads(path.read_text())

    return run


def contest(*contestants: Implementation, **settings: object) -> list[record.Row]:
    return list(suites.contest("layers", TINY, contestants, replace(SETTINGS, **settings)))


# Floors


def test_the_layers_are_xceptions_34() -> None:
    assert [layer.name for layer in XCEPTION] == list(FLOORS)
    assert sum(layer.count for layer in XCEPTION) == 34


@pytest.mark.parametrize("layer", XCEPTION, ids=lambda layer: layer.name)
def test_floor_of_each_layer(layer: Layer) -> None:
    floors = [roofline.seconds(model(layer, 64, "bfloat16"), "bfloat16") * 1e6 for model in MODELS]
    assert floors == pytest.approx(FLOORS[layer.name], abs=0.05)


def test_floor_of_all_layers() -> None:
    totals = [
        sum(layer.count * roofline.seconds(model(layer, 64, "bfloat16"), "bfloat16") for layer in XCEPTION) * 1e6
        for model in MODELS
    ]
    assert totals == pytest.approx(ALL_FLOORS, abs=0.5)


def test_strict_float32_multiplies_on_the_cuda_cores() -> None:
    (kernel,) = roofline.forward_fused(XCEPTION[6], 64, "float32")
    assert kernel.seconds("float32") == kernel.flops / roofline.H200.fma_flops


# Refusing


def wrong_forward(x: Tensor, depthwise_weight: Tensor, pointwise_weight: Tensor, padding: int) -> Tensor:
    return eager(x, depthwise_weight, pointwise_weight, padding) * 1.01


def one_wrong_pixel(x: Tensor, depthwise_weight: Tensor, pointwise_weight: Tensor, padding: int) -> Tensor:
    y = eager(x, depthwise_weight, pointwise_weight, padding).clone()
    y[-1, -1, -1, -1] += 0.01
    return y


def not_a_number(x: Tensor, depthwise_weight: Tensor, pointwise_weight: Tensor, padding: int) -> Tensor:
    y = eager(x, depthwise_weight, pointwise_weight, padding).clone()
    y[0, 0, 0, 0] = float("nan")
    return y


def wrong_shape(x: Tensor, depthwise_weight: Tensor, pointwise_weight: Tensor, padding: int) -> Tensor:
    return eager(x, depthwise_weight, pointwise_weight, padding)[:, :1]


def no_kernel(x: Tensor, depthwise_weight: Tensor, pointwise_weight: Tensor, padding: int) -> Tensor:
    raise RuntimeError("no kernel serves this\nand more about it")


def wrong_gradient(x: Tensor, depthwise_weight: Tensor, pointwise_weight: Tensor, padding: int) -> Tensor:
    halved = depthwise_weight / 2 + depthwise_weight.detach() / 2
    return eager(x, halved, pointwise_weight, padding)


@pytest.mark.parametrize(
    ("function", "message"),
    [
        (wrong_forward, "wrong answer: y"),
        (one_wrong_pixel, "wrong answer: y"),
        (not_a_number, "wrong answer: y"),
        (wrong_shape, "shape"),
        (no_kernel, "RuntimeError: no kernel serves this"),
    ],
)
def test_a_wrong_answer_is_refused_and_not_timed(
    function: Callable[..., Tensor], message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    timed = []
    monkeypatch.setattr(suites, "prepare", lambda function, *rest: timed.append(function) or (lambda: None))
    planted, right = Implementation("fused-planted", function, "nchw"), Implementation("eager", eager, "nchw")
    rows = contest(planted, right, passes=("fwd", "both"))
    assert set(timed) == {eager}
    for row in rows:
        if row["impl"] == "eager":
            assert row["error"] is None and row["median_ms"] > 0
        else:
            assert message in row["error"] and "\n" not in row["error"]
            assert row["median_ms"] is None and row["iqr_ms"] is None


def test_a_wrong_gradient_refuses_the_passes_that_compute_it() -> None:
    rows = contest(Implementation("fused-planted", wrong_gradient, "nchw"))
    assert [(row["pass"], row["error"] is None) for row in rows] == [("fwd", True), ("bwd", False), ("both", False)]
    assert "the gradient of depthwise_weight" in rows[1]["error"]


def test_every_image_of_a_batch_is_checked() -> None:
    def wrong_in_the_last_image(x: Tensor, *others: object) -> Tensor:
        return eager(torch.cat([x[:-1], x[-1:] * 1.1]), *others)

    check = Check(Problem(TINY, 12, "float32", "nchw", "cpu"), ("fwd", "bwd"))
    assert set(check.faults(wrong_in_the_last_image, "nchw")) == {"y", "x", "depthwise_weight", "pointwise_weight"}
    assert check.faults(eager, "nchw") == {}


@pytest.mark.parametrize("arithmetic", [name for name in DTYPES if name != "tf32"])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_right_answers_pass(arithmetic: str, layout: str) -> None:
    check = Check(Problem(Layer(32, 48, 9), 2, arithmetic, layout, "cpu"), tuple(PASSES))
    for implementation in implementations("cpu", (layout,)):
        assert check.faults(implementation.function, layout) == {}, implementation.name


def test_a_failure_while_timing_is_a_row_too() -> None:
    calls = iter(range(3))

    def works_only_at_first(*arguments: object) -> Tensor:
        if next(calls, None) is None:
            raise RuntimeError("out of memory")
        return eager(*arguments)

    (row,) = contest(Implementation("peer", works_only_at_first, "nchw"), passes=("fwd",))
    assert row["error"] == "RuntimeError: out of memory"
    assert row["median_ms"] is None


# Rows, files and what is shown


def test_the_file_of_a_run(
    tiny_run: Callable[..., tuple[int, dict]], capsys: pytest.CaptureFixture, tmp_path: Path
) -> None:
    status, result = tiny_run("--suite", "layers", "--passes", "fwd,both", "--batch", "2")
    assert status == 0
    assert set(result) == {"schema", "env", "rows", "summary"}
    assert result["schema"] == record.SCHEMA
    assert result["env"]["torch"] == torch.__version__

    assert [(row["pass"], row["impl"], row["layout"]) for row in result["rows"]] == [
        (direction, impl, layout)
        for direction in ("fwd", "both")
        for layout in ("nchw", "nhwc")
        for impl in ("eager", "fused_sepconv")
    ]
    for row in result["rows"]:
        assert set(row) == set(record.Row.__annotations__)
        assert (row["case"], row["count"], row["batch"], row["device"]) == ("6->10@5", 3, 2, "cpu")
        assert row["error"] is None
        assert row["median_ms"] > 0 and row["iqr_ms"] >= 0 and row["samples"] >= 3
        assert row["bytes"] > 0 and row["flops"] > 0 and row["floor_ms"] > 0
        ours = row["impl"].startswith("fused")
        assert (row["plan"] is not None, row["predicted_ms"] is not None) == (ours, ours)

    for total in result["summary"]["totals"]:
        (row,) = (row for row in result["rows"] if all(row[key] == total[key] for key in ("pass", "impl", "layout")))
        assert total["case"] == "all 3"
        assert total["median_ms"] == pytest.approx(3 * row["median_ms"])
    assert result["summary"]["failed"] == []

    output = capsys.readouterr().out
    assert "predicted, not measured; batch 64, bfloat16, nhwc" in output
    assert str(tmp_path / "tiny.json") in output.splitlines()[-1]
    assert (tmp_path / "tiny.png").exists() == (find_spec("matplotlib") is not None)


def test_core_dependencies_suffice(
    tiny_run: Callable[..., tuple[int, dict]],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture,
    tmp_path: Path,
) -> None:
    for absent in ("rich", "matplotlib"):
        for module in [name for name in sys.modules if name.partition(".")[0] == absent]:
            monkeypatch.delitem(sys.modules, module)
        monkeypatch.setitem(sys.modules, absent, None)  # importing it raises ModuleNotFoundError
    monkeypatch.delitem(sys.modules, "plots", raising=False)

    status, result = tiny_run("--suite", "layers", "--passes", "fwd", "--layout", "nchw")
    captured = capsys.readouterr()
    assert status == 0
    assert len(result["rows"]) == 2
    assert "6->10@5" in captured.out
    assert sum('pip install ".[bench]"' in line for line in captured.out.splitlines()) == 1
    assert "0 of 2 done" in captured.err
    assert not (tmp_path / "tiny.png").exists()


def test_a_wrong_answer_of_ours_ends_the_run_with_an_error(
    tiny_run: Callable[..., tuple[int, dict]], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    contestants = [Implementation("eager", eager, "nchw"), Implementation("fused_sepconv", wrong_forward, "nchw")]
    monkeypatch.setattr(suites, "implementations", lambda *_: contestants)
    status, result = tiny_run("--suite", "layers", "--passes", "fwd")
    assert status == 1
    assert [row["impl"] for row in result["summary"]["failed"]] == ["fused_sepconv"]
    assert [total["median_ms"] is None for total in result["summary"]["totals"]] == [False, True]
    assert "No time for fused_sepconv, 6->10@5, nchw, fwd: wrong answer: y" in capsys.readouterr().out


def test_an_interrupted_run_keeps_what_it_has(
    tiny_run: Callable[..., tuple[int, dict]], monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = suites.contest

    def interrupted(*arguments: object) -> Iterator[record.Row]:
        rows = whole(*arguments)
        yield next(rows)
        raise KeyboardInterrupt

    monkeypatch.setattr(suites, "contest", interrupted)
    status, result = tiny_run("--suite", "layers")
    assert status == 130
    assert len(result["rows"]) == 1


def test_the_overhead_is_a_ratio_of_interleaved_times() -> None:
    rows = [row for step in suites.overhead_suite(seconds=0.04) for row in step.run()]
    lines = record.overhead(rows)
    assert [(line["pass"], line["target"]) for line in lines] == [("fwd", 1.5), ("both", 2.5)]
    for line in lines:
        assert line["ratio"] == pytest.approx(line["ours_us"] / line["eager_us"])


def test_predictions_stand_between_floors() -> None:
    predictions = predict_suite(XCEPTION, ("fwd",))
    *layers, total = predictions["rows"]
    assert predictions["note"] == "predicted, not measured"
    assert [line["case"] for line in layers] == list(FLOORS)
    assert all(line["predicted_ms"] >= line["floor_ms"] for line in layers)
    assert total["case"] == "all 34"
    assert (total["unfused_floor_ms"], total["floor_ms"]) == pytest.approx((2.363, 1.488), abs=5e-4)


def test_on_the_cpu_ours_is_compared_in_its_layout_and_on_a_gpu_with_all_peers() -> None:
    def rows(device: str) -> list[record.Row]:
        times = {("eager", "nchw"): 4.0, ("eager", "nhwc"): 1.0, ("fused_sepconv", "nchw"): 2.0}
        common = {"suite": "layers", "case": "c", "pass": "fwd", "dtype": "float32", "batch": 1, "device": device}
        return [common | {"impl": impl, "layout": layout, "median_ms": ms} for (impl, layout), ms in times.items()]

    for device, expected in (("cpu", 2.0), ("cuda", 0.5)):
        *peers, ours = rows(device)
        assert record.speed_up(ours, [*peers, ours]) == expected


def test_a_timing_is_median_and_interquartile_range() -> None:
    assert timing.summarize([5.0, 1.0, 2.0, 4.0, 3.0]) == timing.Timing(median_ms=3000.0, iqr_ms=2000.0, samples=5)


def test_calls_take_turns() -> None:
    made = []
    call = timing.in_turn([lambda: made.append("a"), lambda: made.append("b")])
    for _ in range(3):
        call()
    assert made == ["a", "b", "a"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--passes", "fwd,up"], "'up'"),
        (["--batch", "0"], "got 0"),
        (["--device", "tpu"], "'tpu'"),
        (["--device", "cpu", "--dtype", "tf32"], "tf32"),
        (["--json", "no/such/folder/bench.json"], "no/such/folder"),
    ],
)
def test_a_wrong_option_is_named(options: list[str], message: str, capsys: pytest.CaptureFixture) -> None:
    with pytest.raises(SystemExit):
        bench.main(options)
    assert message in capsys.readouterr().err
