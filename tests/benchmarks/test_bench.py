"""The benchmark tells the truth: its floors are right, it refuses a wrong answer, and its file says it all."""

from __future__ import annotations

import csv
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import bench
import ceilings
import jsonschema
import options
import pytest
import record
import roofline
import settings
import suites
import summary
import timing
import torch
from check import Check
from gpu_state import State
from layers import NETWORKS, XCEPTION, Layer
from peers import Implementation, eager, implementations
from predictions import predict_suite
from problem import DTYPES, GRADIENTS, LAYOUTS, PASSES, Geometry, Problem
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

CHECKOUT = Path(__file__).parents[2]
TINY = Layer(6, 10, 5, count=3)
EVERY_RESULT = ("y", *GRADIENTS)
SETTINGS = settings.Settings(
    device="cpu",
    batches=(1,),
    dtypes=("float32",),
    layouts=("nchw", "nhwc"),
    model_layouts=("nhwc",),
    passes=("fwd", "bwd", "both"),
    networks=("xception",),
    peers=("eager",),
    modes=("plain",),
    seconds=0.01,
    threads=1,
    turns=2,
    ceilings=roofline.H200,
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
    monkeypatch.setitem(NETWORKS, "xception", (TINY,))
    monkeypatch.setitem(options.QUICK_SECONDS, "cpu", 0.01)
    monkeypatch.setitem(ceilings.COPY_BYTES, "cpu", 2**16)
    monkeypatch.setitem(ceilings.PRODUCT_SIZE, "cpu", 32)

    def run(*options: str) -> tuple[int, dict]:
        path = tmp_path / "tiny.json"
        status = bench.main(["--quick", "--device", "cpu", "--json", str(path), *options])
        return status, json.loads(path.read_text())

    return run


def contest(*contestants: Implementation, **changes: object) -> list[record.Row]:
    return list(suites.contest("layers", TINY, "float32", 1, contestants, replace(SETTINGS, **changes)))


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


@pytest.mark.parametrize("layer", [layer for layers in NETWORKS.values() for layer in layers], ids=lambda x: x.name)
def test_a_layer_computes_the_sizes_that_its_floor_counts(layer: Layer) -> None:
    problem = Problem(layer, 2, "bfloat16", "nhwc", "meta")
    inputs = problem.meta_inputs()
    y = eager(*inputs[:3], problem.geometry)
    assert y.shape == inputs.grad_output.shape
    counted = roofline.quantities(layer, 2, "bfloat16")
    assert (counted.input, counted.output) == (inputs.x.nbytes, y.nbytes)
    with FlopCounterMode(display=False) as flops:
        eager(*inputs[:3], problem.geometry)
    assert counted.product + counted.taps == flops.get_total_flops()


def test_ceilings_are_a_copy_and_products(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ceilings, "_best_cpu", lambda *_, **__: 0.5)
    found = ceilings.measure("cpu", ["bfloat16"], threads=1)
    assert found.bytes_per_second == 2 * ceilings.COPY_BYTES["cpu"] / 0.5  # read and written
    assert found.fma_flops == 2 * ceilings.PRODUCT_SIZE["cpu"] ** 3 / 0.5
    assert found.matrix("float32") == found.fma_flops
    assert found.matrix("bfloat16") >= found.fma_flops


def test_fractions_of_a_row_refer_to_the_ceilings() -> None:
    (row,) = contest(Implementation("eager-nchw", eager, "nchw"), passes=("fwd",))
    seconds = row["median_ms"] / 1e3
    products = 2 * TINY.size**2 * TINY.in_channels * TINY.out_channels
    assert row["bandwidth_fraction"] == pytest.approx(row["bytes"] / seconds / roofline.H200.bytes_per_second)
    assert row["matrix_fraction"] == pytest.approx(products / seconds / roofline.H200.fma_flops)


# Refusing


def wrong_forward(x: Tensor, depthwise_weight: Tensor, pointwise_weight: Tensor, geometry: Geometry) -> Tensor:
    return eager(x, depthwise_weight, pointwise_weight, geometry) * 1.01


def one_wrong_pixel(x: Tensor, depthwise_weight: Tensor, pointwise_weight: Tensor, geometry: Geometry) -> Tensor:
    y = eager(x, depthwise_weight, pointwise_weight, geometry).clone()
    y[-1, -1, -1, -1] += 0.01
    return y


def not_a_number(x: Tensor, depthwise_weight: Tensor, pointwise_weight: Tensor, geometry: Geometry) -> Tensor:
    y = eager(x, depthwise_weight, pointwise_weight, geometry).clone()
    y[0, 0, 0, 0] = float("nan")
    return y


def wrong_shape(x: Tensor, depthwise_weight: Tensor, pointwise_weight: Tensor, geometry: Geometry) -> Tensor:
    return eager(x, depthwise_weight, pointwise_weight, geometry)[:, :1]


def no_kernel(x: Tensor, depthwise_weight: Tensor, pointwise_weight: Tensor, geometry: Geometry) -> Tensor:
    raise RuntimeError("no kernel serves this\nand more about it")


def wrong_gradient(x: Tensor, depthwise_weight: Tensor, pointwise_weight: Tensor, geometry: Geometry) -> Tensor:
    halved = depthwise_weight / 2 + depthwise_weight.detach() / 2
    return eager(x, halved, pointwise_weight, geometry)


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
    assert set(check.faults(wrong_in_the_last_image, "nchw", EVERY_RESULT)) == {
        "y",
        "x",
        "depthwise_weight",
        "pointwise_weight",
    }
    assert check.faults(eager, "nchw", EVERY_RESULT) == {}


@pytest.mark.parametrize("arithmetic", [name for name in DTYPES if name != "tf32"])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_right_answers_pass(arithmetic: str, layout: str) -> None:
    check = Check(Problem(Layer(32, 48, 9), 2, arithmetic, layout, "cpu"), tuple(PASSES))
    for implementation in implementations("cpu", (layout,)):
        assert check.faults(implementation.function, layout, EVERY_RESULT) == {}, implementation.name


def test_a_failure_while_timing_is_a_row_too() -> None:
    calls = iter(range(3))

    def works_only_at_first(*arguments: object) -> Tensor:
        if next(calls, None) is None:
            raise RuntimeError("out of memory")
        return eager(*arguments)

    (row,) = contest(Implementation("peer", works_only_at_first, "nchw"), passes=("fwd",))
    assert row["error"] == "RuntimeError: out of memory"
    assert row["median_ms"] is None


# Peers


def test_a_gpu_has_every_peer_and_ours_in_the_layouts_that_are_asked_for() -> None:
    names = [who.name for who in implementations("cuda", ["nhwc"], ("eager", "forced", "compile", "max-autotune"))]
    assert names == [
        "eager-nchw",
        "eager-nhwc",
        "cudnn-nchw",
        "native-nchw",
        "compile-nhwc",
        "max-autotune-nhwc",
        "fused_sepconv",
    ]


def test_a_forced_depthwise_kernel_is_forced_while_it_is_checked_and_timed() -> None:
    seen = []

    def notes_the_setting(*arguments: object) -> Tensor:
        seen.append(torch.backends.cudnn.depthwise_kernel)
        return eager(*arguments)

    (row,) = contest(
        Implementation("native-nchw", notes_the_setting, "nchw", depthwise_kernel="native"), passes=("fwd",)
    )
    assert row["error"] is None
    assert len(seen) > 2 and set(seen) == {"native"}
    assert torch.backends.cudnn.depthwise_kernel == "auto"


def test_a_depthwise_kernel_that_pytorch_can_not_force_is_a_row_with_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    class OldCudnn:
        flags = staticmethod(torch.backends.cudnn.flags)

    monkeypatch.setattr(torch.backends, "cudnn", OldCudnn)
    (row,) = contest(Implementation("native-nchw", eager, "nchw", depthwise_kernel="native"), passes=("fwd",))
    assert "can't force a depthwise kernel" in row["error"]


def test_a_compiled_peer_runs_every_pass_more_than_once() -> None:
    (compiled,) = (who for who in implementations("cpu", ["nchw"], ("compile",)) if not who.is_ours)
    rows = contest(compiled)
    assert [row["error"] for row in rows] == [None, None, None]


def test_what_has_no_backward_is_timed_forward() -> None:
    def forward_only(*arguments: object) -> Tensor:
        if torch.is_grad_enabled():
            raise NotImplementedError("no backward")
        return eager(*arguments)

    rows = contest(Implementation("tensorrt-nchw", forward_only, "nchw"))
    assert [row["error"] for row in rows] == [None, *["NotImplementedError: no backward"] * 2]


# Rows, files and what is shown


def test_the_file_of_a_run(
    tiny_run: Callable[..., tuple[int, dict]], capsys: pytest.CaptureFixture, tmp_path: Path
) -> None:
    status, result = tiny_run("--suite", "layers", "--passes", "fwd,both", "--batch", "2")
    assert status == 0
    jsonschema.validate(result, json.loads(record.SCHEMA_FILE.read_text()))
    assert result["env"]["torch"] == torch.__version__

    assert [(row["pass"], row["impl"], row["layout"]) for row in result["rows"]] == [
        (direction, impl, layout)
        for direction in ("fwd", "both")
        for impl, layout in (
            ("eager-nchw", "nchw"),
            ("eager-nhwc", "nhwc"),
            ("fused_sepconv", "nchw"),
            ("fused_sepconv", "nhwc"),
        )
    ]
    for row in result["rows"]:
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
    for picture in ("speedup-xception", "time-xception", "roofline", "predictions"):
        assert (tmp_path / f"tiny.{picture}.png").read_bytes().startswith(b"\x89PNG")
    with (tmp_path / "tiny.csv").open() as file:
        lines = list(csv.DictReader(file))
    assert [(line["impl"], float(line["median_ms"])) for line in lines] == [
        (row["impl"], row["median_ms"]) for row in result["rows"]
    ]


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
    assert not list(tmp_path.glob("*.png"))


def test_a_wrong_answer_of_ours_ends_the_run_with_an_error(
    tiny_run: Callable[..., tuple[int, dict]], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    contestants = [Implementation("eager-nchw", eager, "nchw"), Implementation("fused_sepconv", wrong_forward, "nchw")]
    monkeypatch.setattr(suites, "implementations", lambda *_: contestants)
    status, result = tiny_run("--suite", "layers", "--passes", "fwd")
    assert status == 1
    assert [row["impl"] for row in result["summary"]["failed"]] == ["fused_sepconv"]
    assert [total["median_ms"] is None for total in result["summary"]["totals"]] == [False, True]
    assert "No figures for fused_sepconv, 6->10@5, nchw, fwd: wrong answer: y" in capsys.readouterr().out


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


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_ends_a_run_that_still_writes_its_result(number: signal.Signals, tmp_path: Path) -> None:
    path = tmp_path / "part.json"
    command = [sys.executable, CHECKOUT / "benchmarks" / "bench.py", "--quick", "--suite", "layers", "--json", path]
    environment = os.environ | {"PYTHONPATH": str(CHECKOUT), "PYTHONUNBUFFERED": "1"}
    run = subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True)
    for line in run.stdout:
        if line.startswith("Ceilings"):  # printed last before the measurements
            time.sleep(1)
            run.send_signal(number)
            break
    output = run.stdout.read()
    assert run.wait(timeout=120) == bench.INTERRUPTED
    assert "Interrupted" in output
    result = json.loads(path.read_text())
    jsonschema.validate(result, json.loads(record.SCHEMA_FILE.read_text()))
    assert len(result["rows"]) < 3 * 4 * len(XCEPTION)


def test_the_overhead_is_a_ratio_of_interleaved_times() -> None:
    rows = [row for step in suites.overhead_suite(SETTINGS, seconds=0.04) for row in step.run()]
    lines = summary.overhead(rows)
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
        common = dict.fromkeys(record.Row.__annotations__, 1) | {"device": device}
        return [common | {"impl": impl, "layout": layout, "median_ms": ms} for (impl, layout), ms in times.items()]

    for device, expected in (("cpu", 2.0), ("cuda", 0.5)):
        *peers, ours = rows(device)
        assert record.speed_up(ours, [*peers, ours]) == expected


def test_a_timing_is_median_and_interquartile_range() -> None:
    samples = timing.Samples([5.0, 1.0]) + timing.Samples([2.0, 4.0, 3.0], throttled=3)
    assert timing.summarize(samples) == timing.Timing(median_ms=3000.0, iqr_ms=2000.0, samples=5, throttled=3)


def test_a_gpus_samples_are_marked_where_its_clocks_were_held_back(monkeypatch: pytest.MonkeyPatch) -> None:
    """By chunks; and a replay of several calls counts as so many."""
    states = [
        State(1980, 3201, 300.0, 40, ()),
        *(State(1500, 3201, 700.0, 80, why) for why in ((), ("power cap",)) * 2),
    ]
    sensor = SimpleNamespace(read=iter(states).__next__)
    monkeypatch.setattr(timing.Sensor, "of_current_gpu", lambda: sensor)
    monkeypatch.setattr(timing.CudaSampler, "_run", lambda self, call, times: [0.004] * times)
    samples = timing.CudaSampler("graph", seconds=0.16)._sample(lambda: None, calls=2)
    assert samples.seconds == [0.002] * 40
    assert samples.throttled == 20
    assert (samples.before, samples.after) == (states[0], states[-1])
    problem = Problem(TINY, 1, "float32", "nhwc", "cuda")
    row = record.layer_row("layers", problem, "fwd", "peer", "graph", roofline.H200, timing.summarize(samples))
    assert (row["throttled_samples"], row["sm_mhz"], row["power_w"]) == (20, [1980, 1500], [300.0, 700.0])


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
        (["--suite", "layer"], "'layer'"),
        (["--batch", "many"], "'many'"),
        (["--device", "cpu", "--peers", "forced"], "--peers: forced"),
        (["--device", "cpu", "--modes", "graph"], "--modes: expected some of plain"),
        (["--suite", "model", "--passes", "bwd"], "--passes: the model suite"),
        (["--device", "cpu", "--batch", "1000000"], "--batch: layer 128->128@147 at batch 1000000"),
    ],
)
def test_a_wrong_option_is_named(options: list[str], message: str, capsys: pytest.CaptureFixture) -> None:
    with pytest.raises(SystemExit):
        bench.main(options)
    assert message in capsys.readouterr().err


def test_a_gpu_is_asked_for_where_there_is_none(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(SystemExit):
        bench.main(["--device", "cuda"])
    assert "PyTorch sees no CUDA GPU" in capsys.readouterr().err


def test_an_old_gpu_has_no_bfloat16(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (7, 5))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "Tesla T4")
    with pytest.raises(SystemExit):
        bench.main(["--device", "cuda", "--dtype", "bf16"])
    assert "Tesla T4 has no bfloat16" in capsys.readouterr().err
