"""examples/train.py: what it learns, what it draws at random, what a bad input and an interruption do to a run."""

from __future__ import annotations

import re
import resource
import shutil
import signal
from argparse import Namespace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import nn

from fused_sepconv.models import xception
from tests.support.emulation import emulated_kernels
from tests.support.third_party import keras, timm
from tests.support.train_runs import (
    NETWORK,
    NOISE,
    RECIPE,
    STEPS,
    TINY,
    after_step,
    checkpoints,
    losses,
    rows,
    run,
)
from training import checkpoint, recipes, transforms
from training.arguments import parse
from training.distributed import Ranks
from training.export import Exporter
from training.loaders import EvaluationShare, MicroBatches
from training.metrics import Score

ONE = Ranks(0, 1, torch.device("cpu"))
EIGHT_A_STEP = ("--batch-size", "8")


@pytest.fixture(scope="module")
def whole_run(tmp_path_factory):
    """TINY in one process, without interruption."""
    output = tmp_path_factory.mktemp("whole")
    assert run(output, *TINY, *EIGHT_A_STEP) == 0
    assert len(losses(output)) == STEPS
    return output


# Learning -----------------------------------------------------------------------------------------------------------


def test_it_learns_digits_and_says_so_in_its_last_line(tmp_path, capsys):
    assert run(tmp_path, "--dataset", "digits", "--epochs", "2", "--warmup-epochs", "0") == 0
    last = capsys.readouterr().out.splitlines()[-1]
    match = re.fullmatch(r"top-1 (\d+\.\d) top-5 (\d+\.\d)", last)
    assert match, last
    (_, evaluation) = rows(tmp_path, "epochs.csv")
    assert 70 < float(match[1]) == round(evaluation["top1"], 1) <= float(match[2]) == round(evaluation["top5"], 1)
    first, *_, end = rows(tmp_path)
    assert end["loss"] < 0.7 * first["loss"]
    with Image.open(tmp_path / "curves.png") as picture:
        assert min(picture.size) > 300
    assert list((tmp_path / "tensorboard").iterdir())


@pytest.mark.parametrize(
    "flags", [(), ("--amp",), ("--amp", "--amp-dtype", "float16"), ("--torchcompile", "aot_eager")], ids=str
)
def test_the_engine_s_flags_change_nothing_but_the_rounding(whole_run, tmp_path, flags):
    short = (*TINY, *EIGHT_A_STEP, "--channels-last", *flags)
    after = 10
    with pytest.MonkeyPatch.context() as patch:
        after_step(patch, after, lambda: signal.raise_signal(signal.SIGTERM))
        run(tmp_path, *short)
    assert losses(tmp_path) == pytest.approx(losses(whole_run)[:after], rel=5e-2 if "--amp" in flags else 1e-3)


def test_every_optimiser_and_loss_trains(tmp_path):
    labels = "image,labels\n" + "".join(f"{i}.png,{'dark' if i % 2 else 'light'} all\n" for i in range(16))
    for split in ("train", "val"):
        (tmp_path / split).mkdir()
        for i in range(16):
            Image.new("RGB", (32, 32), (60 if i % 2 else 180,) * 3).save(tmp_path / split / f"{i}.png")
        (tmp_path / split / "labels.csv").write_text(labels)
    flags = (*NETWORK, "--data-dir", str(tmp_path), "-j", "0", *EIGHT_A_STEP, "--epochs", "8", "--log-interval", "1")
    assert run(tmp_path / "jft", *flags, "--recipe", "jft", "--lr", "0.003") == 0
    *_, end = rows(tmp_path / "jft", "epochs.csv")
    assert end["top1"] == 100 and end["map100"] == 100  # "all", and then the right one of the two
    curve = losses(tmp_path / "jft")
    assert curve[-1] < 0.5 * curve[0]
    assert run(tmp_path / "sgd", *NETWORK, *NOISE, *EIGHT_A_STEP, "--recipe", "imagenet", "--epochs", "1") == 0


def test_the_fused_kernels_train_to_the_reference_s_losses(tmp_path):
    """20 steps in float32: each step's rounding goes into the next, and they still agree to 1e-5."""
    flags = (*NETWORK, *NOISE, *EIGHT_A_STEP, "--opt", "sgd", "--lr", "0.02", "--sched", "none")
    flags = (*flags, "--epochs", "2", "--warmup-epochs", "0", "--log-interval", "1")
    with emulated_kernels(checked=False) as native:
        assert run(tmp_path / "fused", *flags, "--backend", "fused") == 0
        names = " ".join(native.executed())
    assert all(kernel in names for kernel in ("simt_forward", "simt_backward_input", "simt_backward_pointwise_weight"))
    assert run(tmp_path / "reference", *flags, "--backend", "reference") == 0
    fused, reference = losses(tmp_path / "fused"), losses(tmp_path / "reference")
    assert len(fused) == 20
    assert fused == pytest.approx(reference, rel=1e-5)
    assert max(reference) > 1.05 * min(reference)  # what agrees is not a constant


# Recipes ------------------------------------------------------------------------------------------------------------


def factors(options, steps, steps_per_epoch, images_per_step=1):
    return [recipes.learning_rate_factor(step, options, steps_per_epoch, images_per_step) for step in steps]


def test_the_paper_s_recipes():
    imagenet = parse(["--dataset", "synthetic", "--recipe", "imagenet"])
    assert (imagenet.opt, imagenet.lr, imagenet.momentum, imagenet.weight_decay) == ("sgd", 0.045, 0.9, 1e-5)
    assert imagenet.drop == 0.5 and imagenet.model_ema and not imagenet.smoothing
    # x 0.94 every two epochs
    expected = [0.94 ** (epoch // 2) for epoch in range(10)]
    assert factors(imagenet, range(0, 70, 7), 7) == pytest.approx(expected)
    assert factors(imagenet, [13, 14], 7) == pytest.approx([1, 0.94])

    jft = parse(["--data-dir", ".", "--recipe", "jft"])
    assert (jft.opt, jft.lr, jft.momentum, jft.weight_decay) == ("rmsprop", 0.001, 0.9, 1e-5)
    assert jft.drop == 0 and jft.model_ema and jft.multi_label
    # x 0.9 every three million images
    assert factors(jft, [0, 5999, 6000, 12000], 10**6, 500) == pytest.approx([1, 1, 0.9, 0.81])
    assert isinstance(recipes.losses(jft)[0], nn.BCEWithLogitsLoss)


def test_what_is_given_comes_before_the_recipe():
    options = parse(["--dataset", "synthetic", "--recipe", "imagenet", "--lr", "0.1", "--no-model-ema"])
    assert (options.lr, options.model_ema, options.opt) == (0.1, False, "sgd")


def test_the_cosine_begins_after_the_warm_up_and_ends_at_0():
    options = Namespace(warmup_epochs=2, epochs=10, sched="cosine")
    warmup = factors(options, range(20), 10)
    assert warmup == sorted(warmup) and 0 < warmup[0] < 0.1 and warmup[-1] < 1
    assert factors(options, [20, 60, 100], 10) == pytest.approx([1, 0.5, 0])


def test_weight_decay_spares_biases_and_batch_norm():
    network = xception(3, width=0.02, middle_blocks=0)
    decayed, spared = recipes.optimizer(network, parse(["--dataset", "synthetic"])).param_groups
    assert decayed["weight_decay"] == 0.05 and spared["weight_decay"] == 0
    assert {id(p) for p in decayed["params"]} == {
        id(m.weight) for m in network.modules() if isinstance(m, (nn.Conv2d, nn.Linear))
    }


def test_averaged_weights_follow_tensorflow_s_formula():
    network = nn.Sequential(nn.Linear(1, 1, bias=False), nn.BatchNorm1d(1))
    average = recipes.averaged(network, 0.6)
    expected = None
    for n, value in enumerate((1.0, 2.0, 5.0, -3.0, 7.0, 4.0, 1.0, 9.0, 2.0, 6.0, 5.0, 3.0)):
        network[0].weight.data.fill_(value)
        network[1].running_mean.fill_(value)
        average.update_parameters(network)
        decay = min(0.6, (1 + n) / (10 + n))
        expected = value if expected is None else decay * expected + (1 - decay) * value
    assert average.module[0].weight.item() == pytest.approx(expected)
    assert average.module[1].running_mean.item() == pytest.approx(expected)


# Data ---------------------------------------------------------------------------------------------------------------


def noise(path: Path, size: tuple[int, int] = (40, 32), seed: int = 0) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = np.random.default_rng(seed).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    Image.fromarray(pixels).save(path)
    return path


@pytest.fixture
def tree(tmp_path):
    """20 training images in two classes, one of them in a folder of its own, and 4 to evaluate."""
    for i in range(20):
        noise(tmp_path / "data" / "train" / ("cat", "dog")[i % 2] / ("more" if i == 4 else "") / f"{i}.png", seed=i)
    for i in range(4):
        noise(tmp_path / "data" / "val" / ("cat", "dog")[i % 2] / f"{i}.png", seed=100 + i)
    return tmp_path / "data"


def test_torchvision_and_the_minimal_pipeline_give_the_same_images(monkeypatch, tmp_path):
    how = transforms.Preparation(24, (0.5, 0.4, 0.3), (0.2, 0.3, 0.4), (0.2, 0.9), 0.5, 0.875)
    assert transforms.v2 is not None
    for size in ((50, 40), (31, 77), (400, 10), (24, 24)):
        with Image.open(noise(tmp_path / "image.png", size)) as image:
            image.load()
        for make in (transforms.training_transform, transforms.evaluation_transform):
            both = []
            for installed in (transforms.v2, None):
                monkeypatch.setattr(transforms, "v2", installed)
                torch.manual_seed(3)
                both.append(torch.stack([make(how)(image) for _ in range(8)]))
            monkeypatch.undo()
            assert both[0].shape == (8, 3, 24, 24)
            torch.testing.assert_close(*both, rtol=0, atol=1e-6)


def test_two_ranks_see_in_a_step_what_one_sees_in_two_turns():
    def steps(ranks, turns, start=0):
        batches = MicroBatches(50, 4, turns, ranks, seed=1)
        batches.start_at(3, start)
        return list(batches)

    ranks = [steps(Ranks(rank, 2, torch.device("cpu")), 1) for rank in (0, 1)]
    dealt = [batch for pair in zip(*ranks, strict=True) for batch in pair]
    assert steps(ONE, 2) == dealt
    assert steps(ONE, 2, start=4) == dealt[8:]
    images = [index for batch in dealt for _, index in batch]
    assert len(set(images)) == len(images) == 48
    assert {epoch for batch in dealt for epoch, _ in batch} == {3}


@pytest.mark.parametrize("world", [1, 2, 3, 5])
def test_the_ranks_evaluate_every_image_once_and_in_as_many_batches(world):
    shares = [EvaluationShare(11, 2, Ranks(rank, world, torch.device("cpu"))) for rank in range(world)]
    assert len({len(share) for share in shares}) == 1
    counted = [key for share in shares for key in [key for batch in share for key in batch][: share.mine]]
    assert sorted(counted) == [(0, index) for index in range(11)]


def test_scores_are_those_of_their_definitions():
    generator = torch.Generator().manual_seed(0)
    logits = torch.rand(40, 9, generator=generator)
    targets = torch.randint(9, (40,), generator=generator)
    score = Score(9, multi_label=False, device=ONE.device)
    for begin in (0, 25, 40):
        part = slice(begin, 25 if begin == 0 else 40)
        score.add(logits[part], targets[part], nn.functional.cross_entropy(logits[part], targets[part]))
    order = logits.argsort(1, descending=True)
    hits = order == targets[:, None]
    result = score.result()
    assert result.top1 == pytest.approx(100 * hits[:, 0].float().mean().item())
    assert result.top5 == pytest.approx(100 * hits[:, :5].any(1).float().mean().item())
    assert result.loss == pytest.approx(nn.functional.cross_entropy(logits, targets).item())

    labels = (torch.rand(40, 9, generator=generator) < 0.3).float()
    labels[0] = 0  # no label, no score
    score = Score(9, multi_label=True, device=ONE.device)
    score.add(logits, labels, torch.tensor(0.0))
    found = labels.gather(1, order)[1:]
    found = found[found.any(1)]
    precision = found.cumsum(1) / torch.arange(1, 10)
    average_precision = (precision * found).sum(1) / found.sum(1)
    result = score.result()
    assert result.top1 == pytest.approx(100 * found[:, 0].mean().item())
    assert result.map100 == pytest.approx(100 * average_precision.mean().item(), rel=1e-5)


# Evaluation ---------------------------------------------------------------------------------------------------------


def test_a_run_s_weights_evaluate_to_its_last_line(whole_run, capsys):
    for name in ("model.safetensors", "model_best.safetensors"):
        flags = (*NETWORK, *NOISE, "--evaluate", "--weights", str(whole_run / name))
        assert run(whole_run, *flags) == 0
        top1 = [row["top1"] for row in rows(whole_run, "epochs.csv")]
        expected = top1[-1] if name == "model.safetensors" else max(top1)
        assert capsys.readouterr().out.startswith(f"top-1 {expected:.1f} top-5 ")


def keras_network():
    network = keras.applications.Xception(weights=None, classes=2, input_shape=(71, 71, 3), classifier_activation=None)
    dense = network.layers[-1]

    def logits(x):
        return network(x.permute(0, 2, 3, 1)).detach()

    def centre(mean):
        dense.bias.assign(-mean.numpy())  # which were zeros

    def save(folder):
        network.save_weights(folder / "xception.weights.h5")
        return folder / "xception.weights.h5"

    return logits, centre, save


def timm_network():
    network = timm.create_model("legacy_xception", num_classes=2).eval()

    def centre(mean):
        network.fc.bias.data.sub_(mean)

    def save(folder):
        save_file(network.state_dict(), folder / "xception.safetensors")
        return folder / "xception.safetensors"

    return network, centre, save


@pytest.mark.parametrize("network", [keras_network, timm_network])
def test_weights_of_others_give_the_others_answers(network, tmp_path, capsys):
    """The right class of each image is the one that the other implementation has: all must be right."""
    logits, centre, save = network()
    files = [noise(tmp_path / f"{i}.png", (71, 71), seed=i) for i in range(6)]
    for shade, file in zip((20, 60, 120, 160, 200, 240), files, strict=True):
        image = np.array(Image.open(file)) // 4 + np.uint8(shade * 3 // 4)
        Image.fromarray(image).save(file)
    x = torch.stack([torch.from_numpy(np.array(Image.open(file))) for file in files]).permute(0, 3, 1, 2) / 127.5 - 1
    with torch.no_grad():
        centre(logits(x).mean(0))
        answers = logits(x).argmax(1).tolist()
    assert set(answers) == {0, 1}
    for answer, file in zip(answers, files, strict=True):
        (tmp_path / "folder" / str(answer)).mkdir(parents=True, exist_ok=True)
        shutil.move(file, tmp_path / "folder" / str(answer))
    flags = ("--evaluate", "--data-dir", str(tmp_path / "folder"), "--img-size", "71", "--crop-pct", "1", "-j", "0")
    assert run(tmp_path, *flags, "--weights", str(save(tmp_path))) == 0
    assert capsys.readouterr().out == "top-1 100.0 top-5 100.0\n"
    # The other way round none is right: it is the weights that answer.
    (tmp_path / "folder" / "0").rename(tmp_path / "folder" / "2")
    assert run(tmp_path, *flags, "--weights", str(save(tmp_path))) == 0
    assert capsys.readouterr().out == "top-1 0.0 top-5 100.0\n"


def test_weights_for_other_classes_keep_all_but_the_classifier(whole_run, tmp_path):
    best = str(whole_run / "model.safetensors")
    flags = (*NETWORK, *RECIPE[:2], "--dataset", "synthetic", "--synthetic-images", "8", *EIGHT_A_STEP, "--epochs", "1")
    flags = (*flags, "--warmup-epochs", "0", "--lr", "1e-12", "--weight-decay", "0", "--initial-checkpoint", best)
    assert run(tmp_path, *flags, "--num-classes", "3") == 0
    before, after = load_file(best), load_file(tmp_path / "model.safetensors")
    assert after["classifier.weight"].shape[0] == 3 and before["classifier.weight"].shape[0] == 6
    parameters = [name for name in before if name.endswith("weight") and not name.startswith("classifier")]
    assert len(parameters) > 20
    for name in parameters:
        torch.testing.assert_close(after[name], before[name], rtol=0, atol=1e-8)


def test_timm_s_inception_v3_trains_by_the_same_loop(tmp_path, capsys):
    flags = ("--model", "inception_v3", "--dataset", "synthetic", "--synthetic-images", "8", "--num-classes", "4")
    assert run(tmp_path, *flags, "--img-size", "75", "--batch-size", "4", "--epochs", "1", "--warmup-epochs", "0") == 0
    assert re.match(r"top-1 \d", capsys.readouterr().out)
    network = timm.create_model("inception_v3", num_classes=4)
    network.load_state_dict(load_file(tmp_path / "model.safetensors"))


# Interruptions and bad input ----------------------------------------------------------------------------------------


def error_of(capsys, output, *flags):
    """The message of a run that must end with one, and without a result."""
    capsys.readouterr()
    assert run(output, *flags) == 1
    captured = capsys.readouterr()
    assert captured.out == ""
    return next(line for line in captured.err.splitlines() if line.startswith("train.py: "))


def test_sigterm_saves_and_a_resumed_run_is_the_same_run(whole_run, tmp_path, monkeypatch):
    flags = (*TINY, *EIGHT_A_STEP, "--log-interval", "4")  # it stops between two rows
    with monkeypatch.context() as patch:
        after_step(patch, 13, lambda: signal.raise_signal(signal.SIGTERM))
        assert run(tmp_path, *flags) == 128 + signal.SIGTERM
    assert checkpoints(tmp_path) == ["step-00000010", "step-00000013"]
    assert run(tmp_path, *flags, "--resume") == 0
    whole = losses(whole_run)
    means = [sum(whole[step - 4 : step]) / 4 for step in range(4, STEPS + 1, 4)]
    assert [row["loss"] for row in rows(tmp_path)] == pytest.approx(means, rel=1e-6)
    assert rows(tmp_path, "epochs.csv") == rows(whole_run, "epochs.csv")
    ours, theirs = (load_file(output / "model.safetensors") for output in (tmp_path, whole_run))
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


def test_a_killed_run_loses_the_steps_since_its_last_checkpoint_alone(whole_run, tmp_path, monkeypatch):
    class Killed(BaseException):
        pass

    def kill():
        raise Killed

    with monkeypatch.context() as patch:
        after_step(patch, 18, kill)
        with pytest.raises(Killed):
            run(tmp_path, *TINY, *EIGHT_A_STEP)
    (tmp_path / "checkpoints" / "unfinished-step-00000020").mkdir()  # what a process killed while saving leaves
    with open(tmp_path / "steps.csv", "a") as file:
        file.write("19,2,1.")
    assert run(tmp_path, *TINY, *EIGHT_A_STEP, "--resume") == 0
    assert losses(tmp_path) == losses(whole_run)
    assert rows(tmp_path, "epochs.csv") == rows(whole_run, "epochs.csv")
    assert checkpoints(tmp_path) == ["step-00000025", "step-00000030"]


def test_a_full_disk_leaves_the_old_checkpoint(whole_run, tmp_path, monkeypatch, capsys):
    """The system's limit on the size of a file stands for the disk: a write fails in the middle."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    with monkeypatch.context() as patch:
        after_step(patch, 8, lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, hard)))
        try:
            message = error_of(capsys, tmp_path, *TINY, *EIGHT_A_STEP)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert re.search(r"--output: the checkpoint \S+step-00000010 could not be written", message)
    assert "File too large" in message
    assert re.search(r"step-00000005 is whole, and --resume goes on from there", message)
    assert checkpoints(tmp_path) == ["step-00000005"]
    assert run(tmp_path, *TINY, *EIGHT_A_STEP, "--resume") == 0
    assert losses(tmp_path) == losses(whole_run)


def test_a_full_disk_leaves_the_old_weights(tmp_path):
    network = xception(3, width=0.02, middle_blocks=0)
    file = tmp_path / "model.safetensors"
    exporter = Exporter(network)
    exporter.write(network, file, ONE)
    before = file.read_bytes()
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, hard))
    try:
        with pytest.raises(checkpoint.UserError, match=r"model\.safetensors could not be written"):
            exporter.write(network, file, ONE)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert file.read_bytes() == before
    assert list(tmp_path.iterdir()) == [file]


def test_a_truncated_image_is_named_and_nothing_is_lost(tree, tmp_path, capsys):
    flags = (*NETWORK, *RECIPE, "--data-dir", str(tree), "--epochs", "2", "--batch-size", "4", "-j", "2")
    assert run(tmp_path / "whole", *flags) == 0
    broken = tree / "train" / "dog" / "7.png"
    contents = broken.read_bytes()
    broken.write_bytes(contents[: len(contents) // 2])
    message = error_of(capsys, tmp_path / "run", *flags)
    assert f"{broken} cannot be read as an image" in message and "truncated" in message
    done = len(losses(tmp_path / "run"))
    assert checkpoints(tmp_path / "run")[-1] == f"step-{done:08d}"
    broken.write_bytes(contents)
    assert run(tmp_path / "run", *flags, "--resume") == 0
    assert losses(tmp_path / "run") == losses(tmp_path / "whole")


def test_what_is_wrong_with_a_folder_is_named(tree, tmp_path, capsys):
    flags = (*NETWORK, *RECIPE, "--epochs", "2", "--batch-size", "4", "-j", "0", "--data-dir")
    (tree / "train" / "empty").mkdir()
    assert error_of(capsys, tmp_path / "run", *flags, str(tree)).endswith(f"no images in {tree}/train/empty")
    (tree / "train" / "empty").rename(tree / "val" / "bird")
    noise(tree / "val" / "bird" / "1.png")
    assert "bird only here" in error_of(capsys, tmp_path / "run", *flags, str(tree))
    shutil.rmtree(tree / "val")
    assert "no folder val" in error_of(capsys, tmp_path / "run", *flags, str(tree))
    assert "no folder train" in error_of(capsys, tmp_path / "run", *flags, str(tree / "train"))
    assert "there is no folder" in error_of(capsys, tmp_path / "run", *flags, str(tree / "nowhere"))
    assert not (tmp_path / "run").exists()


def test_a_checkpoint_of_another_run_is_refused(whole_run, tmp_path, capsys):
    newest = str(whole_run / "checkpoints" / "step-00000030")
    flags = (*TINY, *EIGHT_A_STEP, "--resume", newest)
    message = error_of(capsys, tmp_path, *flags, "--model-kwargs", "width=0.02", "middle_blocks=2")
    assert "of another run: model_kwargs" in message and "'middle_blocks': 2" in message
    assert "images_per_step 8 there, 4 here" in error_of(
        capsys, tmp_path, *TINY, "--batch-size", "4", "--resume", newest
    )
    assert "is no checkpoint" in error_of(capsys, tmp_path, *flags[:-1], str(tmp_path))
    # Even where the description fits, names and shapes must.
    fake = tmp_path / "fake"
    shutil.copytree(newest, fake)
    sidecar = (fake / "run.json").read_text()
    (fake / "run.json").write_text(sidecar.replace('"middle_blocks": 1', '"middle_blocks": 2'))
    message = error_of(capsys, tmp_path, *flags[:-1], str(fake), "--model-kwargs", "width=0.02", "middle_blocks=2")
    assert "middle.module2.bn1.bias missing there, (" in message and " more" in message
    assert (fake / "run.json").exists() and checkpoints(whole_run)[-1] == "step-00000030"


def test_weights_of_another_network_are_refused(whole_run, tmp_path, capsys):
    evaluate = (*NOISE, "--img-size", "32", "--evaluate", "--weights")
    message = error_of(capsys, tmp_path, *evaluate, str(whole_run / "model.safetensors"))
    assert "does not fit Xception" in message
    assert "no such file" in error_of(capsys, tmp_path, *evaluate, str(tmp_path / "nothing.safetensors"))
    (tmp_path / "text.h5").write_text("text")
    assert "--weights: " in error_of(capsys, tmp_path, *evaluate, str(tmp_path / "text.h5"))


def test_a_run_is_not_overwritten(whole_run, capsys):
    before = losses(whole_run)
    assert "holds a run" in error_of(capsys, whole_run, *TINY, *EIGHT_A_STEP)
    assert losses(whole_run) == before


def test_a_loss_that_is_no_number_ends_the_run(tmp_path, capsys):
    flags = (*TINY, *EIGHT_A_STEP, "--opt", "sgd", "--lr", "1e30")
    assert "diverged" in error_of(capsys, tmp_path, *flags)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--data-dir", ".", "--batch-size", "0"], "--batch-size.*expected 1 or more, got 0"),
        ([], "--data-dir: expected a folder"),
        (["--dataset", "digits", "--data-dir", "."], "--data-dir"),
        (["--dataset", "digits", "--multi-label"], "--multi-label"),
        (["--dataset", "digits", "--device", "cpu", "--sync-bn"], "--sync-bn"),
        (["--dataset", "digits", "--epochs", "3", "--warmup-epochs", "3"], "--warmup-epochs"),
        (["--dataset", "digits", "--evaluate"], "--weights"),
        (["--dataset", "digits", "--resume"], "--resume"),
        (["--dataset", "digits", "--scale", "0.9", "0.1"], "--scale"),
        (["--dataset", "digits", "--drop", "1.5"], "--drop"),
        (["--dataset", "digits", "--model-kwargs", "width"], "--model-kwargs.*NAME=VALUE"),
        (["--dataset", "digits", "--lr", "-1"], "--lr"),
    ],
)
def test_bad_arguments_are_named(flags, message, capsys):
    with pytest.raises(SystemExit) as stop:
        parse(flags)
    assert stop.value.code == 2
    assert re.search(f"error: argument .*{message}", capsys.readouterr().err)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--model", "nonsense"], "--model nonsense: "),
        (["--model", "xception", "--model-kwargs", "depth=3"], "--model xception: .*depth"),
        (["--num-classes", "4"], "--num-classes: the data has 10, got 4"),
        (["--batch-size", "2000"], "--batch-size: 1437 training images do not fill one step of 2000"),
        (["--distributed", "fsdp"], "--distributed"),
    ],
)
def test_bad_values_are_named(flags, message, tmp_path, capsys):
    assert re.search(message, error_of(capsys, tmp_path / "run", "--dataset", "digits", *flags))
