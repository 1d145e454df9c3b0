"""The benchmark tells the truth: its floors are right, it refuses a wrong answer, and its file says it all."""

import itertools
import json
import signal
from copy import deepcopy
from dataclasses import replace
from types import SimpleNamespace

import bench
import check
import floors
import host
import machine
import networks
import pytest
import record
import report
import suites
import tables
import timing
import torch
from layers import NETWORKS, XCEPTION, Layer
from networks import Network
from peers import Implementation, eager, implementations
from problem import DTYPES, GRADIENTS, LAYOUTS, PASSES, Problem
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from fused_sepconv import SeparableConv2d
from fused_sepconv.ops import backend

TINY = Layer(6, 10, 5, count=3)
SETTINGS = suites.Settings(
    suites=("layers",), device="cpu", batches=(1,), dtypes=("float32",), layouts=("nchw", "nhwc"),
    model_layouts=("nhwc",), passes=("fwd", "bwd", "both"), networks=("xception",), peers=("eager",), modes=("plain",),
    seconds=0.01, host_seconds=0.05, threads=1, turns=2, ceilings=floors.H200,
)  # fmt: skip


@pytest.fixture
def tiny_run(monkeypatch, tmp_path):
    """Runs the command line on one tiny layer; returns its exit status and what it wrote."""
    monkeypatch.setitem(NETWORKS, "xception", (TINY,))
    monkeypatch.setitem(bench.QUICK_SECONDS, "cpu", 0.01)
    monkeypatch.setitem(machine.COPY_BYTES, "cpu", 2**16)
    monkeypatch.setitem(machine.PRODUCT_SIZE, "cpu", 32)
    path = tmp_path / "tiny.json"

    def run(options):
        status = bench.main(["--quick", "--device", "cpu", "--json", str(path), *options.split()])
        return status, json.loads(path.read_text())

    return run


def contest(*contestants, **changes):
    return list(suites.contest(TINY, "float32", 1, contestants, replace(SETTINGS, **changes)))


# Floors


def test_the_layers_are_those_of_the_networks():
    assert sum(layer.count for layer in XCEPTION) == 34
    assert NETWORKS["mobilenet"][6] == Layer(512, 512, 14, count=5, network="mobilenet")
    assert NETWORKS["deeplab"][5] == Layer(2048, 256, 33, dilation=18, network="deeplab")
    assert NETWORKS["mobilenet"][1].stride == 2 and NETWORKS["convnext"][0].kernel_size == 7


FLOORS = {  # µs, bfloat16, batch 64, on an H200: forward separate and fused, backward separate and in one pass
    "64->128@147": (205.8, 123.5, 411.7, 164.7),
    "728->728@19": (46.6, 31.0, 93.3, 62.0),
    "1536->2048@10": (60.1, 51.0, 120.2, 101.9),
}


def test_floors_of_xceptions_layers_and_of_all_of_them():
    kinds = [(direction, fused) for direction in ("fwd", "bwd") for fused in (False, True)]
    for layer in (layer for layer in XCEPTION if layer.name in FLOORS):
        found = [floors.floor(layer, 64, "bfloat16", way, fused=fused).milliseconds * 1e3 for way, fused in kinds]
        assert found == pytest.approx(FLOORS[layer.name], abs=0.05)
    sums = [floors.network_floor(XCEPTION, 64, "bfloat16", way, fused=fused).milliseconds * 1e3 for way, fused in kinds]
    assert sums == pytest.approx((2363, 1488, 4725, 2728), abs=0.5)
    floor = floors.floor(XCEPTION[6], 64, "float32", "fwd")  # strict: on the CUDA cores
    assert floor.milliseconds == pytest.approx(1e3 * floor.flops / floors.H200.fma_flops)


def test_a_layer_computes_the_sizes_that_its_floor_counts():
    for layer in (layer for layers in NETWORKS.values() for layer in layers):
        problem = Problem(layer, 2, "bfloat16", "nhwc", "meta")
        inputs = problem.meta_inputs()
        counted = floors.problem_of(layer, 2, "bfloat16", "forward")
        with FlopCounterMode(display=False) as flops:
            y = eager(*inputs[:3], problem.geometry)
        assert y.shape == inputs.grad_output.shape, layer
        assert (counted.x_bytes, counted.y_bytes) == (inputs.x.nbytes, y.nbytes), layer
        assert counted.pointwise_flops + counted.depthwise_flops == flops.get_total_flops(), layer


def test_ceilings_are_a_copy_and_products(monkeypatch):
    monkeypatch.setattr(machine, "_best_cpu", lambda *_, **__: 0.5)
    found = machine.measure_ceilings("cpu", ["bfloat16"], threads=1)
    assert found.bytes_per_second == 2 * machine.COPY_BYTES["cpu"] / 0.5  # read and written
    assert found.fma_flops == 2 * machine.PRODUCT_SIZE["cpu"] ** 3 / 0.5
    assert found.matrix("float32") == found.fma_flops
    assert found.matrix("bfloat16") >= found.fma_flops


# Refusing


def wrong_forward(*arguments):
    return eager(*arguments) * 1.01


def with_last_pixel(change):
    def planted(*arguments):
        y = eager(*arguments).clone()
        y[-1, -1, -1, -1] = change(y[-1, -1, -1, -1])
        return y

    return planted


def no_kernel(*arguments):
    raise RuntimeError("no kernel serves this\nand more about it")


@pytest.mark.parametrize(
    ("function", "message"),
    [
        (wrong_forward, "wrong answer: y"),
        (with_last_pixel(lambda y: y + 0.01), "wrong answer: y"),
        (with_last_pixel(lambda y: y * float("nan")), "wrong answer: y"),
        (lambda *arguments: eager(*arguments)[:, :1], "shape"),
        (no_kernel, "RuntimeError: no kernel serves this"),
    ],
)
def test_a_wrong_answer_is_refused_and_not_timed(function, message, monkeypatch):
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


def test_a_wrong_gradient_refuses_the_passes_that_compute_it():
    def wrong_gradient(x, depthwise_weight, pointwise_weight, geometry):
        return eager(x, depthwise_weight / 2 + depthwise_weight.detach() / 2, pointwise_weight, geometry)

    rows = contest(Implementation("fused-planted", wrong_gradient, "nchw"))
    assert [(row["pass"], row["error"] is None) for row in rows] == [("fwd", True), ("bwd", False), ("both", False)]
    assert "the gradient of depthwise_weight" in rows[1]["error"]


def test_every_image_of_a_batch_is_checked():
    def wrong_in_the_last_image(x, *others):
        return eager(torch.cat([x[:-1], x[-1:] * 1.1]), *others)

    checked = check.Check(Problem(TINY, 12, "float32", "nchw", "cpu"), ("fwd", "bwd"))
    assert checked.faults(wrong_in_the_last_image, "nchw", ("y", *GRADIENTS)).keys() == {"y", *GRADIENTS}
    assert checked.faults(eager, "nchw", ("y", *GRADIENTS)) == {}


@pytest.mark.parametrize("arithmetic", [name for name in DTYPES if name != "tf32"])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_right_answers_pass(arithmetic, layout):
    checked = check.Check(Problem(Layer(32, 48, 9), 2, arithmetic, layout, "cpu"), tuple(PASSES))
    for implementation in implementations("cpu", (layout,)):
        assert checked.faults(implementation.function, layout, ("y", *GRADIENTS)) == {}, implementation.name


def test_a_failure_while_timing_is_a_row_too():
    calls = iter(range(3))

    def works_only_at_first(*arguments):
        if next(calls, None) is None:
            raise RuntimeError("out of memory")
        return eager(*arguments)

    (row,) = contest(Implementation("peer", works_only_at_first, "nchw"), passes=("fwd",))
    assert row["error"] == "RuntimeError: out of memory" and row["median_ms"] is None


def test_what_ours_is_compared_with_on_a_gpu_and_on_the_cpu():
    names = [who.name for who in implementations("cuda", ["nhwc"], ("eager", "compile", "max-autotune"))]
    assert names == ["eager-nchw", "eager-nhwc", "compile-nhwc", "max-autotune-nhwc", "fused_sepconv"]
    times = {("eager", "nchw"): 4.0, ("eager", "nhwc"): 1.0, ("fused_sepconv", "nchw"): 2.0}
    for device, expected in (("cpu", 2.0), ("cuda", 0.5)):  # in its layout, with all
        common = dict.fromkeys(record.Row.__annotations__, 1) | {"device": device}
        *peers, ours = (common | {"impl": i, "layout": layout, "median_ms": ms} for (i, layout), ms in times.items())
        assert record.speed_up(ours, [*peers, ours]) == expected


# Whole networks and memory


class Small(nn.Module):
    """A network with one separable convolution."""

    def __init__(self):
        super().__init__()
        self.separable, self.norm = SeparableConv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8)
        self.classifier = nn.Linear(8, networks.CLASSES)

    def forward(self, x):
        return self.classifier(self.norm(self.separable(x)).mean((2, 3)))


class WrongInTraining(Small):
    """Its gradients are doubled, where they are not the reference's."""

    def forward(self, x):
        y = super().forward(x)
        return 2 * y - y.detach() if backend.default == "auto" else y


def broken():
    raise ModuleNotFoundError("No module named 'timm'")


def test_a_network_is_timed_or_refused_or_absent_with_its_error(monkeypatch):
    monkeypatch.setattr(suites, "IMAGE_SIZE", 9)
    monkeypatch.setattr(check, "CHECKED_SIZE", 9)

    def rows_of(build, *suite):
        network = Network("xception", "Small", "fused_sepconv", build, "nhwc")
        monkeypatch.setattr(suites, "networks", lambda *_: [network])
        return [row for make in suite for step in make(SETTINGS) for row in step.run()]

    rows = rows_of(Small, suites.model_suite)
    assert [(row["pass"], row["error"]) for row in rows] == [("fwd", None), ("both", None)]
    assert all(row["images_per_second"] == pytest.approx(1e3 / row["median_ms"]) for row in rows)
    rows = rows_of(broken, suites.model_suite, suites.memory_suite)
    assert [row["error"] for row in rows] == ["ModuleNotFoundError: No module named 'timm'"] * 3
    timed = []
    monkeypatch.setattr(suites, "timed", lambda network, direction, *_: timed.append(direction) or "not timed")
    errors = {row["pass"]: row["error"] for row in rows_of(WrongInTraining, suites.model_suite)}
    assert timed == ["fwd"] and errors["both"].startswith("wrong answer: the gradient is off by")


def test_peak_memory_counts_what_is_held_at_once_and_saved_memory_each_storage_once():
    def call():
        first = torch.empty(1_000_000, dtype=torch.uint8)
        del first
        kept = [torch.empty(300_000, dtype=torch.uint8) for _ in range(4)]
        del kept

    assert suites.peak_bytes(call, "cpu") == 1_200_000
    x, weight = torch.randn(100, 50, requires_grad=True), torch.randn(50, 50, requires_grad=True)

    def forward():
        y = x @ weight  # keeps x, and weight, which is a parameter
        return (y * y).sum() + y.exp().sum()  # keeps y, twice, and exp's result

    assert suites.saved_bytes(forward, [weight]) == 4 * (x.numel() + 2 * 100 * 50)


# The host's time


def test_the_host_suite_counts_python_calls_and_refuses_another_familys_kernels(monkeypatch):
    def inner():
        pass

    assert host.python_calls(lambda: [inner() for _ in "abc"]) - host.python_calls(lambda: []) >= 3
    monkeypatch.setattr(host.loader, "load", lambda: SimpleNamespace(executed=lambda: {"simt_forward_float32": 1}))
    host.check_kernels("simt")
    with pytest.raises(RuntimeError, match="of the family mma"):
        host.check_kernels("mma")


def test_a_host_row_for_each_implementation_and_pass_and_for_a_null_build_that_fails(monkeypatch, tmp_path):
    monkeypatch.setattr(host, "CHECKOUT", tmp_path)
    (step,) = suites.host_suite(replace(SETTINGS, suites=("host",)))
    rows = list(step.run())
    assert {row["pass"] for row in rows if row["error"]} == set(host.PASSES)
    assert "fused-" in tables.host_table(rows, {}).rows[0][0] or rows[0]["impl"] == host.PEER
    monkeypatch.undo()
    (step,) = suites.host_suite(replace(SETTINGS, suites=("layers", "host")))
    rows = list(step.run())
    found = {(row["impl"], row["pass"]): row for row in rows}
    assert {impl for impl, _ in found} >= {host.PEER, "fused-reference"}
    assert all(row["error"] is None and row["python_calls"] > 0 and row["median_ms"] > 0 for row in rows)
    assert found["fused-reference", "grad"]["python_calls"] < found["fused-reference", "both"]["python_calls"]


# Timing


def test_a_timing_is_median_and_interquartile_range():
    assert timing.summarize([5.0, 1.0, 2.0, 4.0, 3.0]) == timing.Timing(median_ms=3000.0, iqr_ms=2000.0, samples=5)


# Runs


def test_the_file_of_a_run(tiny_run, capsys, tmp_path):
    status, result = tiny_run("--suite layers --passes fwd,both --batch 2")
    assert status == 0
    assert result["schema"] == record.SCHEMA and result["env"]["torch"] == torch.__version__
    assert [(row["pass"], row["impl"], row["layout"]) for row in result["rows"]] == [
        (direction, impl if ours else f"{impl}-{layout}", layout)
        for direction in ("fwd", "both")
        for impl, ours in (("eager", False), ("fused_sepconv", True))
        for layout in ("nchw", "nhwc")
    ]
    for row in result["rows"]:
        assert row.keys() == record.Row.__annotations__.keys()
        assert (row["case"], row["count"], row["batch"], row["device"]) == ("6->10@5", 3, 2, "cpu")
        assert row["error"] is None
        assert row["median_ms"] > 0 and row["iqr_ms"] >= 0 and row["samples"] >= 3
        assert row["bytes"] > 0 and row["flops"] > 0 and row["floor_ms"] > 0
        assert (row["plan"] is not None) == row["impl"].startswith("fused")
    for total in result["summary"]["totals"]:
        (row,) = (row for row in result["rows"] if all(row[key] == total[key] for key in ("pass", "impl", "layout")))
        assert total["case"] == "all 3"
        assert total["median_ms"] == pytest.approx(3 * row["median_ms"])
    assert result["summary"]["failed"] == []
    assert str(tmp_path / "tiny.json") in capsys.readouterr().out.splitlines()[-1]
    assert (tmp_path / "tiny.layers-xception.png").read_bytes().startswith(b"\x89PNG")


def test_a_wrong_answer_of_ours_ends_the_run_with_an_error(tiny_run, monkeypatch, capsys):
    contestants = [Implementation("eager-nchw", eager, "nchw"), Implementation("fused_sepconv", wrong_forward, "nchw")]
    monkeypatch.setattr(suites, "implementations", lambda *_: contestants)
    status, result = tiny_run("--suite layers --passes fwd")
    assert status == 1
    assert [row["impl"] for row in result["summary"]["failed"]] == ["fused_sepconv"]
    assert [total["median_ms"] is None for total in result["summary"]["totals"]] == [False, True]
    assert "No figures for fused_sepconv, 6->10@5, nchw, fwd: wrong answer: y" in capsys.readouterr().out


def test_a_signal_ends_a_run_that_still_writes_its_result(tiny_run, monkeypatch, capsys):
    prepare, calls = suites.prepare, itertools.count()

    def interrupted(*arguments):
        if next(calls) == 3:
            signal.raise_signal(signal.SIGTERM)
        return prepare(*arguments)

    monkeypatch.setattr(suites, "prepare", interrupted)
    monkeypatch.setattr(bench, "_interrupted", False)
    before = signal.signal(signal.SIGTERM, bench.interrupt)
    try:
        status, result = tiny_run("--suite layers")
    finally:
        signal.signal(signal.SIGTERM, before)
    assert status == bench.INTERRUPTED and "Interrupted" in capsys.readouterr().out
    assert len(result["rows"]) < 3 * 4


def test_a_wrong_option_is_named(capsys, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    for options, message in (
        ("--passes fwd,up", "'up'"),
        ("--batch 0", "got '0'"),
        ("--batch many", "'many'"),
        ("--device tpu", "'tpu'"),
        ("--device cuda", "PyTorch sees no CUDA GPU"),
        ("--device cpu --dtype tf32", "tf32"),
        ("--json no/such/folder/bench.json", "no/such/folder"),
        ("--suite layer", "'layer'"),
        ("--suite model --passes bwd", "--passes: the model suite"),
        ("--ceilings no/such.json", "--ceilings: no/such.json"),
        ("--device cuda --dtype bf16", "Tesla T4 has neither"),
    ):
        if "T4" in message:
            monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
            monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (7, 5))
            monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "Tesla T4")
        with pytest.raises(SystemExit):
            bench.main(options.split())
        assert message in capsys.readouterr().err


# Report and compare

README = f"# Title\n\nbefore\n\n{report.BEGIN}\n\nold\n\n{report.END}\n\nafter\n"
LAYERS_FORWARD = "--suite layers --passes fwd"


def of_a_gpu(made):
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
def run_report(tmp_path):
    """Writes the report of a README and a folder of results; returns its exit status and the README."""
    (tmp_path / "README.md").write_text(README)
    (tmp_path / "results").mkdir()

    def run(*more):
        options = ["--readme", str(tmp_path / "README.md"), "--results", str(tmp_path / "results"), *more]
        return bench.main(["report", *options]), (tmp_path / "README.md").read_text()

    return run


def test_without_a_gpu_the_readme_says_so_and_shows_floors(run_report, tmp_path, tiny_run):
    (tmp_path / "results" / "cpu.json").write_text(json.dumps(tiny_run(LAYERS_FORWARD)[1]))
    status, text = run_report()
    assert status == 0
    assert text.startswith("# Title\n\nbefore\n") and text.endswith("\n\nafter\n") and "old" not in text
    assert "No GPU has been measured yet" in text and "computed and not measured" in " ".join(text.split())
    assert "| 728->728@19 | 25 | 1166 | 775 | 2332 | 1550 |" in text
    assert "| all | 34 | 2363 | 1488 | 4725 | 2728 |" in text


def test_a_gpu_result_replaces_the_floors(run_report, tmp_path, tiny_run):
    (tmp_path / "results" / "gpu.json").write_text(json.dumps(of_a_gpu(tiny_run(LAYERS_FORWARD)[1])))
    (tmp_path / "results" / "gpu.networks.png").write_bytes(b"")
    status, text = run_report()
    assert status == 0
    assert "### Planted GPU" in text and "No GPU" not in text
    assert "| 6->10@5 | 3 | 0.900 | 0.600 | 0.200 | 3.00x |" in text
    against = "0.90 in the paper (28 against 31), 0.48 to 0.64 in timm's published figures. Ours: 1.25."
    assert against in " ".join(text.split())
    assert "[networks](benchmarks/results/gpu.networks.png)" in text


def test_report_changes_nothing_twice_and_tells_an_old_readme_and_one_without_a_place(run_report, tmp_path, capsys):
    assert run_report("--check") == (1, README)
    _, first = run_report()
    assert run_report() == run_report("--check") == (0, first)
    (tmp_path / "README.md").write_text("# Title\n")
    assert run_report() == (2, "# Title\n")
    assert report.BEGIN in capsys.readouterr().out
    assert bench.main(["report", "--check"]) == 0, capsys.readouterr().out  # our own is up to date


def test_compare_shows_what_changed_and_names_a_file_that_is_no_result(tiny_run, tmp_path, capsys):
    result = tiny_run(LAYERS_FORWARD)[1]
    later = deepcopy(result)
    later["env"]["torch"] = "9.9"
    first, second, third, *_ = later["rows"]
    first["median_ms"] *= 10
    second["median_ms"] += second["iqr_ms"] / 2
    third |= {"median_ms": None, "iqr_ms": None, "error": "wrong answer: y"}
    later["rows"].pop()
    paths = [tmp_path / "a.json", tmp_path / "b.json"]
    for path, content in zip(paths, (result, later), strict=True):
        path.write_text(json.dumps(content))
    capsys.readouterr()
    assert bench.main(["compare", *map(str, paths)]) == 0
    output = capsys.readouterr().out
    assert f"torch: {result['env']['torch']} -> 9.9" in output
    assert "10.00x" in output and output.count("layers:") == 1
    assert "a time -> wrong answer: y" in output
    assert f"Only in {paths[0]}: 1 rows" in output
    for content, message in (
        ("{", "can't be read"),
        ("[]", "not a result"),
        ('{"schema": 1}', "not a result"),
        ('{"schema": 1, "env": {}, "rows": [], "summary": {}}', "schema 1"),
    ):
        paths[0].write_text(content)
        assert bench.main(["compare", str(paths[0]), str(paths[0])]) == 2
        assert f"{paths[0]}: " in (output := capsys.readouterr().out) and message in output
