"""Trains Xception, or any image classifier of timm's, with Lightning: one process, or many under torchrun.

    python examples/train.py --dataset digits
    torchrun --nproc-per-node=8 examples/train.py --data-dir imagenet --recipe imagenet --amp --channels-last

`--help` has all flags. The files of a run are in its `--output`: csv/ and tensorboard/ as it goes, checkpoints/ and
best.ckpt; at the end model.safetensors, model_best.safetensors and curves.png.
"""

import argparse
import copy
import logging
import os
import sys
import time
import warnings
from collections.abc import Sequence
from pathlib import Path

import torch
import torch.distributed as dist

try:
    import lightning

    import fused_sepconv
except ModuleNotFoundError as error:
    if error.name not in ("fused_sepconv", "lightning"):
        raise
    sys.exit(f'{error.name} is not installed: run `pip install ".[train]"` at the root of the checkout first')
except RuntimeError as error:  # Lightning imports torchvision where it is installed
    if "torchvision::nms" not in str(error):
        raise
    sys.exit(f"torchvision is for another PyTorch than {torch.__version__}: install the one that fits, or uninstall it")

from lightning.pytorch.callbacks import ModelCheckpoint, RichProgressBar
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger
from lightning.pytorch.strategies import DDPStrategy, ModelParallelStrategy

from training import networks, run
from training.arguments import parse
from training.classifier import Classifier, ShardedClassifier, averaged, shown
from training.data import ImageData, Images, read_csv, splits
from training.errors import UserError

logging.getLogger("lightning.pytorch").setLevel(logging.WARNING)
# What Lightning warns of is meant: the order of the images knows where to go on in an epoch, for one.
for text in ("You're resuming from", ".*does not have many workers", "Checkpoint directory", ".*treespec, LeafSpec"):
    warnings.filterwarnings("ignore", text)


def main(argv: Sequence[str] | None = None) -> int:
    """Returns 0; 1 after an error that is the user's to mend; 128 and the signal's number after a signal."""
    options = parse(argv)
    try:
        _join_again()
        with fused_sepconv.use_backend(options.backend):
            if options.summary:
                print(networks.summary(network_of(options, options.model, options.num_classes), options.img_size))
            elif options.evaluate:
                print(evaluate(options))
            else:
                results = train(options)
                if _rank() == 0:
                    print(f"top-1 {results['top1']:.1f} top-5 {results['top5']:.1f}")
    except (UserError, OSError) as error:
        print(f"train.py: {error}", file=sys.stderr)
        return 1
    except run.Interrupted as stop:
        print(f"train.py: {stop}", file=sys.stderr)
        return 128 + stop.signal if stop.signal else 1
    return 0


def _rank() -> int:
    return int(os.environ.get("RANK", 0))


def network_of(options: argparse.Namespace, name: str, classes: int) -> torch.nn.Module:
    torch.manual_seed(options.seed)
    network = networks.create(name, classes, options.drop, options.img_size, options.model_kwargs)
    if options.fuse_norm:
        fused_sepconv.fuse_batch_norm(network)
    return network


def class_count(options: argparse.Namespace, images: Images) -> int:
    there = len(images.classes)
    if options.num_classes is not None and options.num_classes < there:
        raise UserError(f"--num-classes: the data has {there}, got {options.num_classes}")
    return options.num_classes or there


def _class_weights(options: argparse.Namespace, images: Images) -> torch.Tensor | None:
    if options.class_weights is None:
        return None
    given = {row["label"]: float(row["weight"]) for row in read_csv(options.class_weights, ["label", "weight"])}
    return torch.tensor([given.get(name, 1.0) for name in images.classes])


def trainer(options: argparse.Namespace, **more: object) -> lightning.Trainer:
    """Lightning's, for this process and those that torchrun has started beside it."""
    local, world = (int(os.environ.get(name, 1)) for name in ("LOCAL_WORLD_SIZE", "WORLD_SIZE"))
    strategy: object = "auto"
    if options.distributed == "fsdp":
        if "RANK" not in os.environ:
            raise UserError("--distributed fsdp: start it with torchrun, one process will do")
        strategy = ModelParallelStrategy(world, 1, save_distributed_checkpoint=False)
    elif world > 1:
        strategy = DDPStrategy(gradient_as_bucket_view=True)
    precision = {"bfloat16": "bf16-mixed", "float16": "16-mixed"}[options.amp_dtype] if options.amp else "32-true"
    where = {"accelerator": "gpu" if options.device == "cuda" else "cpu", "devices": local, "num_nodes": world // local}
    how = {"precision": precision, "sync_batchnorm": options.sync_bn, "use_distributed_sampler": False}
    told = {"enable_model_summary": False, "log_every_n_steps": 1, "enable_progress_bar": sys.stderr.isatty()}
    return lightning.Trainer(strategy=strategy, num_sanity_val_steps=0, **where, **how, **told, **more)


def evaluate(options: argparse.Namespace) -> str:
    """A table with a row for each file of weights."""
    _, images = splits(options)
    classes, weights = class_count(options, images), _class_weights(options, images)
    rows = []
    names = options.models * len(options.weights) if len(options.models) == 1 else options.models
    for name, path in zip(names, options.weights, strict=False):
        network = network_of(options, name, classes)
        print(networks.load_weights(network, path, head_may_differ=False), file=sys.stderr)
        parameters, multiply_adds = networks.cost(network, options.img_size)
        module = Classifier(network, options, class_weights=weights)
        trainer(options, logger=False).validate(module, ImageData(options, None, images), verbose=False)
        row = {"model": name, "weights": path.name, "parameters": f"{parameters:,}"}
        row["multiply-adds"] = f"{multiply_adds:,}"
        rows.append(row | shown(module.trainer.callback_metrics))
    return run.table(rows)


def train(options: argparse.Namespace) -> dict[str, float]:
    """The last evaluation's figures."""
    train_images, images = splits(options)
    classes, world = class_count(options, images), int(os.environ.get("WORLD_SIZE", 1))
    images_per_step = options.batch_size * options.grad_accum_steps * world
    steps = len(train_images) // images_per_step
    if not steps:
        raise UserError(
            f"--batch-size: {len(train_images)} training images do not fill one step of {images_per_step} (batch size "
            f"{options.batch_size} x {options.grad_accum_steps} accumulation steps x {world} ranks)"
        )
    output = options.output or Path("output") / f"{time.strftime('%Y%m%d-%H%M%S')}-{options.model}"
    newest = run.latest(output)
    if _rank() == 0 and not options.resume and (newest or (output / "csv").exists()):
        raise UserError(f"--output: {output} holds a run; give --resume to go on with it, or another folder")
    network = network_of(options, options.model, classes)
    title = f"{options.model}, {options.dataset}, {options.recipe}, {world} rank{'s' * (world > 1)}"
    notes = [f"{title}: {len(train_images)} images, {steps} steps an epoch, into {output}"]
    for path in options.weights:
        notes.append(networks.load_weights(network, path, head_may_differ=True))
    skeleton = copy.deepcopy(network).to("meta")
    if options.channels_last:
        network.to(memory_format=torch.channels_last)
    if options.torchcompile:
        network.compile(backend=options.torchcompile)

    measure = "val/map100" if options.multi_label else "val/top1"
    # Whole, as Lightning puts averaged weights into no others.
    how = {"save_on_train_epoch_end": False, "enable_version_counter": False}
    best = ModelCheckpoint(output, "best", monitor=measure, mode="max", **how)
    callbacks = [run.Checkpoints(output / "checkpoints", options.recovery_interval, options.checkpoint_hist), best]
    if options.model_ema:
        callbacks.append(averaged(options.model_ema_decay))
    if sys.stderr.isatty():
        callbacks.append(RichProgressBar(leave=False))
    version = len(list(output.glob("csv/version_*")))
    csv = CSVLogger(output, "csv", version=version, flush_logs_every_n_steps=1)
    kind = ShardedClassifier if options.distributed == "fsdp" else Classifier
    module = kind(network, options, steps, images_per_step, _class_weights(options, images))
    every = {"max_epochs": options.epochs, "accumulate_grad_batches": options.grad_accum_steps}
    if options.eval_interval:
        every |= {"val_check_interval": options.eval_interval * options.grad_accum_steps}
        every |= {"check_val_every_n_epoch": None}
    loggers = [csv, TensorBoardLogger(output, "tensorboard", version="")]
    trainer_ = trainer(options, callbacks=callbacks, logger=loggers, **every)
    resumed = newest if options.resume is True else options.resume
    if resumed:
        notes.append(f"resumed from {resumed}")
    if _rank() == 0:
        print(*notes, sep="\n", file=sys.stderr)
    trainer_.fit(module, ImageData(options, train_images, images), ckpt_path=resumed, weights_only=True)
    if _rank() == 0:
        for file, checkpoint in (("model", run.latest(output)), ("model_best", output / "best.ckpt")):
            networks.export(skeleton, checkpoint, output / f"{file}.safetensors")
        run.draw({options.model: output}, output / "curves.png", title)
        print(f"curves: {output / 'curves.png'}", file=sys.stderr)
    return {name.removeprefix("val/"): float(v) for name, v in trainer_.callback_metrics.items()}


def _join_again() -> None:
    """Joins the other ranks after torchrun has restarted them. It keeps its store then (seen in PyTorch 2.13), and
    Lightning would find the addresses of those that have died. Several machines do not count restarts alike, so there
    it is left as it is.
    """
    restart, local = (os.environ.get(name, "0") for name in ("TORCHELASTIC_RESTART_COUNT", "LOCAL_WORLD_SIZE"))
    if restart != "0" and local == os.environ["WORLD_SIZE"]:
        store, rank, world = next(dist.rendezvous("env://"))
        dist.init_process_group(store=dist.PrefixStore(f"restart {restart}", store), rank=rank, world_size=world)


def leave(status: int) -> None:
    """A rank ends without Python's own clean-up, which stops gloo's threads wherever they ask for the interpreter: C++
    aborts if that is inside of its own frames, after a training that had succeeded."""
    sys.stdout.flush()
    sys.stderr.flush()
    if "RANK" in os.environ:
        os._exit(status)
    sys.exit(status)


if __name__ == "__main__":
    leave(main())
