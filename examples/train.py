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
    sys.exit(f'{error.name} is not installed: run `pip install ".[train]"` at the root of the checkout first')
except RuntimeError as error:  # Lightning imports torchvision where it is installed
    sys.exit(f"torchvision is for another PyTorch than {torch.__version__}, or broken: {error}")

from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger
from lightning.pytorch.strategies import ModelParallelStrategy

from training import networks, run
from training.arguments import parse
from training.classifier import Classifier, averaged
from training.data import ImageData, UserError

logging.getLogger("lightning.pytorch").setLevel(logging.WARNING)
# Lightning warns of what is meant (the order of the images knows where to go on in an epoch), and, beside FSDP, of the
# averaged weights that are not asked for there.
MEANT = ("You're resuming from", ".*does not have many workers", "Checkpoint directory", ".*treespec, LeafSpec")
for text in (*MEANT, "You're using the WeightAveraging"):
    warnings.filterwarnings("ignore", text)


def main(argv: Sequence[str] | None = None) -> int:
    """Returns 0; 1 after an error that is the user's to mend; 128 and the signal's number after a signal."""
    options = parse(argv)
    work = summarise if options.summary else evaluate if options.evaluate else train
    try:
        _join_again(options)
        with fused_sepconv.use_backend(options.backend):
            report = work(options)
    except (UserError, OSError) as error:
        # From a worker process of the DataLoader the message arrives inside the text of the worker's traceback.
        print(f"train.py: {str(error).rpartition('UserError: ')[2].strip()}", file=sys.stderr)
        return 1
    except run.Interrupted as stop:
        print(f"train.py: {stop}", file=sys.stderr)
        return 128 + stop.signal if stop.signal else 1
    if options.rank == 0:
        print(report)
    return 0


def network_of(options: argparse.Namespace, name: str, classes: int) -> torch.nn.Module:
    torch.manual_seed(options.seed)
    network = networks.create(name, classes, options.drop, options.model_kwargs)
    if options.fuse_norm:
        fused_sepconv.fuse_batch_norm(network)
    return network


def trainer(options: argparse.Namespace, **more: object) -> lightning.Trainer:
    """Lightning's, for this process and those that torchrun has started beside it."""
    strategy: object = "auto"  # DDP where there are several
    if options.distributed == "fsdp":
        if "RANK" not in os.environ:
            raise UserError("--distributed fsdp: start it with torchrun, one process will do")
        strategy = ModelParallelStrategy(options.ranks, 1, save_distributed_checkpoint=False)
    return lightning.Trainer(
        accelerator=options.device,
        strategy=strategy,
        devices=options.local_ranks,
        num_nodes=options.ranks // options.local_ranks,
        precision="bf16-mixed" if options.amp else "32-true",
        sync_batchnorm=options.sync_bn,
        use_distributed_sampler=False,
        num_sanity_val_steps=0,
        log_every_n_steps=1,
        enable_model_summary=False,
        enable_progress_bar=sys.stderr.isatty(),
        **more,
    )


def summarise(options: argparse.Namespace) -> str:
    return networks.summary(network_of(options, options.model, 10 if options.dataset else 1000), options.img_size)


def evaluate(options: argparse.Namespace) -> str:
    """A table with a row for each file of weights."""
    data, rows = ImageData(options), []
    names = options.models * len(options.weights) if len(options.models) == 1 else options.models
    for name, path in zip(names, options.weights, strict=True):
        network = network_of(options, name, len(data.classes))
        print(networks.load_weights(network, path), file=sys.stderr)
        row = {"model": name, "weights": path.name, **networks.cost(network, options.img_size)}
        module = Classifier(network, options, data)
        trainer(options, logger=False).validate(module, data, verbose=False)
        rows.append(row | run.shown(module.trainer.callback_metrics))
    return run.table(rows)


def train(options: argparse.Namespace) -> str:
    """Returns the last evaluation's figures."""
    data = ImageData(options)
    if not data.steps:
        raise UserError(f"--batch-size: {len(data.train)} training images, and a step needs {data.images_per_step}")
    output = options.output or Path("output") / f"{time.strftime('%Y%m%d-%H%M%S')}-{options.model}"
    newest = run.latest(output)
    if options.rank == 0 and not options.resume and (newest or (output / "csv").exists()):
        raise UserError(f"--output: {output} holds a run; give --resume to go on with it, or another folder")
    resumed = newest if options.resume is True else options.resume
    network = network_of(options, options.model, len(data.classes))
    title = f"{options.model}, {options.dataset or options.data_dir.name}, {options.recipe}, ranks: {options.ranks}"
    notes = [f"{title}: {len(data.train)} images, {data.steps} steps an epoch, into {output}"]
    notes += [networks.load_weights(network, path, new_head=True) for path in options.weights]
    notes += [f"resumed from {resumed}"] if resumed else []
    if options.rank == 0:
        print(*notes, sep="\n", file=sys.stderr)
    plain = copy.deepcopy(network)
    if options.channels_last:
        network.to(memory_format=torch.channels_last)
    if options.torchcompile:
        network.compile(backend=options.torchcompile)

    best = {"monitor": "val/MAP@100" if options.multi_label else "val/top-1", "mode": "max"}
    best |= {"save_on_train_epoch_end": False, "enable_version_counter": False}
    log = run.Log(min(options.log_interval, data.steps))  # a short epoch has a row too
    callbacks = [log, run.Checkpoints(output / "checkpoints", options.recovery_interval)]
    callbacks += [averaged(options.model_ema_decay)] if options.model_ema else []
    callbacks += [ModelCheckpoint(output, "best", **best)]
    loggers = [CSVLogger(output, "csv", flush_logs_every_n_steps=1), TensorBoardLogger(output, "tensorboard", "")]
    every = {"max_epochs": options.epochs, "accumulate_grad_batches": options.grad_accum_steps}
    if options.eval_interval:
        interval = options.eval_interval * options.grad_accum_steps
        every |= {"val_check_interval": interval, "check_val_every_n_epoch": None}
    fit = trainer(options, callbacks=callbacks, logger=loggers, **every).fit
    fit(Classifier(network, options, data), data, ckpt_path=resumed, weights_only=True)
    if options.rank != 0:
        return ""
    for file, checkpoint in (("model", run.latest(output)), ("model_best", output / "best.ckpt")):
        networks.export(plain, checkpoint, output / f"{file}.safetensors")
    rows = run.read(output)
    run.draw({options.model: rows}, title).savefig(output / "curves.png", dpi=110)
    print(f"curves: {output / 'curves.png'}", file=sys.stderr)
    return " ".join(f"{name} {figure}" for name, figure in run.last_evaluation(rows).items() if name != "loss")


def _join_again(options: argparse.Namespace) -> None:
    """Joins the other ranks after torchrun has restarted them. It keeps its store then (seen in PyTorch 2.13), and
    Lightning would find the addresses of those that have died. Several machines do not count restarts alike, so there
    it is left as it is.
    """
    restart = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
    if restart != "0" and options.local_ranks == options.ranks:
        store, rank, world = next(dist.rendezvous("env://"))
        backend, store = "nccl" if options.device == "cuda" else "gloo", dist.PrefixStore(f"restart {restart}", store)
        dist.init_process_group(backend, store=store, rank=rank, world_size=world)


if __name__ == "__main__":
    status = main()
    if "RANK" in os.environ:
        # Without Python's own clean-up, which stops gloo's threads wherever they ask for the interpreter: C++ aborts if
        # that is inside of its own frames, after a training that had succeeded.
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)
    sys.exit(status)
