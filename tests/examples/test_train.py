"""examples/train.py: what it learns, what it draws at random, what a bad input and an interruption do to a run."""

from __future__ import annotations

import re
import signal
from argparse import Namespace

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from torch import nn

import train
from tests.support.emulation import emulated_kernels
from tests.support.train_runs import NETWORK, STEPS, TINY, checkpoints, evaluations, losses, make_noise, rows, run
from training import classifier, networks
from training.arguments import parse
from training.run import Checkpoints

EIGHT_A_STEP = ("--batch-size", "8")
EMA = "--model-ema"
DIGITS = ("--dataset", "digits")
DATA = Namespace(class_weights=None, steps=1, images_per_step=4)
"""What a network is trained on, in short."""


@pytest.fixture(scope="module")
def whole_run(noise, tmp_path_factory):
    """TINY in one process, without interruption."""
    output = tmp_path_factory.mktemp("whole")
    assert run(output, *TINY, *noise, EMA, *EIGHT_A_STEP) == 0
    assert len(losses(output)) == STEPS
    return output


def stop_after(patch: pytest.MonkeyPatch, step: int) -> None:
    """Sends SIGTERM to this process once so many steps are done."""
    original = Checkpoints.on_train_batch_end

    def noted(self, trainer, *rest):
        if trainer.global_step == step:
            signal.raise_signal(signal.SIGTERM)
        original(self, trainer, *rest)

    patch.setattr(Checkpoints, "on_train_batch_end", noted)


def test_it_learns_digits_and_says_so_on_stdout(tmp_path, capsys):
    """One epoch is no warm-up; no other flag is needed."""
    assert run(tmp_path, *DIGITS, "--epochs", "1", "--lr", "0.003", "--img-size", "16") == 0
    match = re.fullmatch(r"top-1 (\d+\.\d) top-5 (\d+\.\d)\n", capsys.readouterr().out)
    assert match and 50 < float(match[1]) == round(rows(tmp_path)[-1]["val/top-1"], 1) <= float(match[2])
    with Image.open(tmp_path / "curves.png") as picture:
        assert min(picture.size) > 300
    assert list((tmp_path / "tensorboard").iterdir())


@pytest.mark.parametrize(
    "flags", [["--amp"], pytest.param(["--compile", "aot_eager"], marks=pytest.mark.full)], ids=str
)
def test_the_engine_s_flags_change_nothing_but_the_rounding(whole_run, noise, tmp_path, monkeypatch, flags):
    stop_after(monkeypatch, 3)
    run(tmp_path, *TINY, *noise, *EIGHT_A_STEP, "--channels-last", *flags)
    assert losses(tmp_path) == pytest.approx(losses(whole_run)[:3], rel=5e-2 if "--amp" in flags else 1e-3)


def test_many_labels_an_image_are_learnt_and_scored(tmp_path, capsys):
    for split in ("train", "val"):
        (tmp_path / split).mkdir()
        for i in range(16):
            Image.new("RGB", (32, 32), (60 if i % 2 else 180,) * 3).save(tmp_path / split / f"{i}.png")
        labels = "".join(f"{i}.png,{'dark' if i % 2 else 'light'} all\n" for i in range(16))
        (tmp_path / split / "labels.csv").write_text("image,labels\n" + labels)
    (tmp_path / "weights.csv").write_text("label,weight\nall,1\ndark,2\nlight,3\n")
    flags = (*NETWORK, "--data-dir", str(tmp_path), "-j", "0", "--class-weights", str(tmp_path / "weights.csv"))
    flags = (*flags, "--recipe", "jft", *EIGHT_A_STEP)
    assert run(tmp_path / "jft", *flags, "--epochs", "16", "--log-interval", "1", "--lr", "0.003") == 0
    *_, end = rows(tmp_path / "jft")
    assert end["val/top-1"] == 100 and end["val/MAP@100"] == pytest.approx(100)  # "all", and then the right one
    capsys.readouterr()
    assert run(tmp_path, *flags, "--evaluate", "--weights", str(tmp_path / "jft" / "model.safetensors")) == 0
    head, row = capsys.readouterr().out.splitlines()
    assert head.split()[-1] == "MAP@100" and row.split()[-1] == "100.0"


@pytest.mark.parametrize(
    ("flags", "size"),
    [(["googlenet"], 32), (["inception_v3", "--model-kwargs", "aux_logits=True"], 299)],
    ids=["googlenet", "inception_v3"],
)
def test_auxiliary_heads_are_trained_and_left_out_of_the_evaluation(flags, size, monkeypatch):
    options = parse(["--data-dir", ".", "--smoothing", "0", "--model", *flags])
    module = classifier.Classifier(train.network_of(options, options.model, 10), options, DATA)
    module._trainer = Namespace(global_step=0)
    x, targets = torch.rand(3, 3, size, size), torch.tensor([0, 1, 2])
    loss = module.train().training_step((x, targets, None), 0)
    torch.manual_seed(int(classifier.generator(42, "dropout", 0).integers(2**63)))
    main, *auxiliary = (nn.functional.cross_entropy(logits, targets) for logits in module.network(x))
    assert len(auxiliary) == (2 if "googlenet" in flags else 1)
    torch.testing.assert_close(loss, main + 0.3 * sum(auxiliary))
    monkeypatch.setattr(module, "log", lambda *_, **__: None)
    with torch.no_grad():
        module.eval().validation_step((x, targets, torch.tensor([True, True, False])), 0)
        logits = module.network(x)
    logits = logits[0] if isinstance(logits, tuple) else logits  # timm's gives the other head's in evaluation too
    torch.testing.assert_close(module.scores["loss"].compute(), nn.functional.cross_entropy(logits[:2], targets[:2]))


def test_the_fused_kernels_train_to_the_reference_s_losses(noise, tmp_path):
    """Each step's rounding goes into the next, and they still agree to 1e-5."""
    flags = (*NETWORK, *noise, *EIGHT_A_STEP, "--opt", "sgd", "--lr", "0.02", "--sched", "none", "-j", "0")
    flags = (*flags, "--epochs", "1", "--log-interval", "1")
    with emulated_kernels(checked=False) as native:
        assert run(tmp_path / "fused", *flags, "--backend", "fused") == 0
        names = " ".join(native.executed())
    assert all(kernel in names for kernel in ("simt_forward", "simt_backward_input", "simt_backward_pointwise_weight"))
    assert run(tmp_path / "reference", *flags, "--backend", "reference") == 0
    fused, reference = losses(tmp_path / "fused"), losses(tmp_path / "reference")
    assert fused == pytest.approx(reference, rel=1e-5)
    assert max(reference) > 1.01 * min(reference)  # what agrees is not a constant


def factors(options, steps, *per):
    return pytest.approx([classifier.learning_rate_factor(step, options, *per) for step in steps])


def test_the_paper_s_recipes():
    names = ("opt", "lr", "momentum", "weight_decay", "drop", "smoothing", "model_ema", "multi_label")
    imagenet, jft = (parse(["--data-dir", ".", "--recipe", name]) for name in ("imagenet", "jft"))
    assert [getattr(imagenet, name) for name in names] == ["sgd", 0.045, 0.9, 1e-5, 0.5, 0, True, False]
    assert [getattr(jft, name) for name in names] == ["rmsprop", 0.001, 0.9, 1e-5, 0, 0, True, True]
    # x 0.94 every two epochs of 7 steps; x 0.9 every three million images, of 500 a step
    assert [0.94 ** (epoch // 2) for epoch in range(10)] == factors(imagenet, range(0, 70, 7), 7, 1)
    assert factors(jft, [0, 5999, 6000, 12000], 10**6, 500) == [1, 1, 0.9, 0.81]
    given = parse(["--data-dir", ".", "--recipe", "imagenet", "--lr", "0.1", "--model", "inception_v3"])
    assert (given.lr, given.weight_decay, given.opt) == (0.1, 4e-5, "sgd")
    cosine = Namespace(warmup_epochs=2, epochs=10, sched="cosine")
    assert factors(cosine, [0, 20, 60, 100], 10, 1) == [1 / 21, 1, 0.5, 0]


@pytest.mark.parametrize("opt", ["adamw", "adam", "sgd", "rmsprop"])
def test_weight_decay_spares_biases_and_batch_norm(opt):
    options = parse(["--dataset", "digits", "--opt", opt])
    module = classifier.Classifier(networks.create("xception_slim", 3, 0.0, {}), options, DATA)
    decayed, spared = module.configure_optimizers()["optimizer"].param_groups
    assert decayed["weight_decay"] == 0.05 and spared["weight_decay"] == 0
    weights = [m.weight for m in module.modules() if isinstance(m, (nn.Conv2d, nn.Linear))]
    assert {id(p) for p in decayed["params"]} == {id(weight) for weight in weights}


def test_averaged_weights_follow_tensorflow_s_formula():
    norm = nn.BatchNorm1d(1)
    average = torch.optim.swa_utils.AveragedModel(norm, use_buffers=True, **classifier.averaged(0.6)._kwargs)
    expected = 1.0
    for n, value in enumerate((1.0, 2.0, 5.0, -3.0, 7.0, 4.0, 1.0, 9.0, 2.0, 6.0, 5.0, 3.0)):
        nn.init.constant_(norm.weight, value)
        norm.running_mean.fill_(value)
        average.update_parameters(norm)
        decay = min(0.6, (1 + n) / (10 + n))
        expected = decay * expected + (1 - decay) * value
    assert average.module.weight.item() == average.module.running_mean.item() == pytest.approx(expected)


def test_average_precision_is_its_definition():
    logits, targets = torch.tensor([[3.0, 2.0, 1.0, 0.0]]), torch.tensor([[0.0, 1.0, 0.0, 1.0]])
    order = logits.topk(3).indices  # the last label is beyond the first three answers
    assert classifier.average_precision(order, targets, None).item() == pytest.approx((1 / 2) / 2)
    weights = torch.tensor([1.0, 3.0, 1.0, 1.0])
    assert classifier.average_precision(order, targets, weights).item() == pytest.approx((3 / 2) / 4)


def test_a_folder_of_images_and_what_can_be_wrong_with_it(tmp_path, capsys):
    folder = make_noise(tmp_path / "data")
    flags = (*TINY, "--data-dir", str(folder), "--batch-size", "4", "-j", "1")
    broken = folder / "train" / "0" / "0.png"
    broken.write_bytes(broken.read_bytes()[:200])
    message = error_of(capsys, tmp_path / "run", *flags)
    assert f"{broken} cannot be read as an image" in message
    (folder / "val" / "1").rename(folder / "val" / "bird")
    assert "no training images of bird" in error_of(capsys, tmp_path / "none", *flags)
    (folder / "train").rename(folder / "trian")
    assert f"no folder {folder}/train" in error_of(capsys, tmp_path / "none", *flags)


def test_an_evaluation_is_a_table_with_a_row_a_model(whole_run, noise, capsys):
    files = [str(whole_run / name) for name in ("model.safetensors", "best.ckpt")]
    assert run(whole_run, *NETWORK, *noise, "-j", "0", "--evaluate", "--weights", *files) == 0
    head, last, best = capsys.readouterr().out.splitlines()
    assert head.split() == ["model", "weights", "parameters", "multiply-adds", "loss", "top-1", "top-5"]
    assert float(last.split()[-3]) == pytest.approx(evaluations(whole_run)[-1], abs=1e-4)
    top1 = max(row["val/top-1"] for row in rows(whole_run) if "val/top-1" in row)
    assert float(best.split()[-2]) == pytest.approx(top1, abs=0.05)


def test_the_summary_counts_as_the_paper_does(capsys):
    assert train.main(["--summary"]) == 0
    lines = capsys.readouterr().out.splitlines()
    middle = next(line.split() for line in lines if "middle.module1.sepconv1 " in line)
    assert middle[1:6] == ["728", "x", "19", "x", "19"] and middle[6] == f"{728 * 9 + 728**2:,}"
    assert middle[7] == f"{19 * 19 * (728 * 9 + 728**2):,}" and middle[8] == f"{1 / 728 + 1 / 9:.1%}"
    assert lines[-1].split()[1] == "22,855,952"


def test_weights_for_other_classes_keep_all_but_the_classifier(whole_run, tmp_path):
    network = networks.create("xception", 3, 0.0, {"width": 0.02, "middle_blocks": 1})
    assert "starts anew" in networks.load_weights(network, whole_run / "model.safetensors", new_head=True)
    theirs = load_file(whole_run / "model.safetensors")
    ours = network.state_dict()
    assert ours["classifier.weight"].shape[0] == 3 and theirs["classifier.weight"].shape[0] == 6
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs if not name.startswith("classifier"))
    with pytest.raises(networks.UserError, match="classifier"):
        networks.load_weights(network, whole_run / "model.safetensors")


def error_of(capsys, output, *flags):
    """The message of a run that must end with one."""
    assert run(output, *flags) == 1
    return [line for line in capsys.readouterr().err.splitlines() if line.startswith("train.py: ")][-1]


def test_sigterm_saves_and_a_resumed_run_is_the_same_run(whole_run, noise, tmp_path, monkeypatch, capsys):
    flags = (*TINY, *noise, EMA, *EIGHT_A_STEP)
    with monkeypatch.context() as patch:
        stop_after(patch, 7)
        assert run(tmp_path, *flags) == 128 + signal.SIGTERM
    assert checkpoints(tmp_path) == ["step-00000006", "step-00000007"]
    assert "of another run: lr 0.01 there, 0.5 here" in error_of(capsys, tmp_path, *flags, "--resume", "--lr", "0.5")
    assert "holds a run" in error_of(capsys, tmp_path, *flags)
    assert run(tmp_path, *flags, "--resume") == 0
    assert rows(tmp_path) == rows(whole_run)
    ours, theirs = (load_file(output / "model.safetensors") for output in (tmp_path, whole_run))
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


def test_an_evaluation_interval_in_steps(noise, tmp_path):
    flags = (*TINY, *noise, "--batch-size", "4", "--grad-accum-steps", "2", "--eval-interval", "4")
    assert run(tmp_path, *flags) == 0
    assert [row["step"] for row in rows(tmp_path) if "val/loss" in row] == [4, 8]


def test_bad_values_are_named(noise, tmp_path, capsys):
    flags = (*TINY, *noise, *EIGHT_A_STEP, "--opt", "sgd", "--lr", "1e30")
    assert "diverged" in error_of(capsys, tmp_path / "1", *flags)
    assert "--model nonsense: " in error_of(capsys, tmp_path, *DIGITS, "--model", "nonsense")
    assert "a step needs 2000" in error_of(capsys, tmp_path, *DIGITS, "--batch-size", "2000")
    assert "--distributed" in error_of(capsys, tmp_path, *DIGITS, "--distributed", "fsdp")
    assert "o such file" in error_of(capsys, tmp_path, *DIGITS, "--evaluate", "--weights", "nothing.safetensors")


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--data-dir", ".", "--batch-size", "0"], "--batch-size.*expected 1 or more, got 0"),
        ([], "--data-dir: expected a folder"),
        ([*DIGITS, "--multi-label"], "--multi-label"),
        ([*DIGITS, "--evaluate"], "--weights"),
        ([*DIGITS, "--resume"], "--resume"),
        ([*DIGITS, "--model-kwargs", "width"], "--model-kwargs.*NAME=VALUE"),
    ],
)
def test_bad_arguments_are_named(flags, message, capsys):
    with pytest.raises(SystemExit, match="2"):
        parse(flags)
    assert re.search(f"error: argument .*{message}", capsys.readouterr().err)
