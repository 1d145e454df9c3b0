"""From the command line to what a run is made of."""

import time
from argparse import Namespace
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.utils.data import DataLoader

from . import checkpoint, datasets, distributed, journal, networks, recipes
from .datasets import Splits
from .distributed import Ranks
from .errors import UserError
from .export import Exporter
from .loaders import EvaluationData, EvaluationShare, MicroBatches, Prepared, loader
from .loop import Precision
from .state import LossWindow, TrainingState
from .transforms import Preparation, evaluation_transform, training_transform

SYNTHETIC_CLASSES = 1000
FOLDER_WORKERS = 4


def splits(options: Namespace) -> Splits:
    """The images, and a check that the network has an answer for each of their classes."""
    if options.dataset == "digits":
        found = datasets.digits()
    elif options.dataset == "synthetic":
        found = datasets.synthetic(options.synthetic_images, options.num_classes or SYNTHETIC_CLASSES)
    else:
        found = datasets.folders(options.data_dir, options.multi_label, options.evaluate)
    classes = len(found.evaluation.classes)
    if options.num_classes is not None and options.num_classes < classes:
        raise UserError(f"--num-classes: the data has {classes}, got {options.num_classes}")
    return found


def class_count(options: Namespace, images: Splits) -> int:
    return options.num_classes or len(images.evaluation.classes)


def training_data(options: Namespace, images: Splits, ranks: Ranks) -> tuple[MicroBatches, DataLoader]:
    batches = MicroBatches(len(images.train), options.batch_size, options.grad_accum_steps, ranks, options.seed)
    prepared = Prepared(images.train, training_transform(_preparation(options)), options.seed)
    return batches, loader(prepared, batches, _workers(options), ranks)


def evaluation_data(options: Namespace, images: Splits, ranks: Ranks) -> EvaluationData:
    share = EvaluationShare(len(images.evaluation), options.batch_size, ranks)
    prepared = Prepared(images.evaluation, evaluation_transform(_preparation(options)), options.seed)
    return EvaluationData(share, loader(prepared, share, _workers(options), ranks))


def network(options: Namespace, classes: int, ranks: Ranks) -> tuple[nn.Module, str | None]:
    """The network on its device, with its first weights, and what was loaded. All ranks have the same."""
    torch.manual_seed(options.seed)
    created = networks.create(options.model, classes, options.drop, options.model_kwargs)
    loaded = None
    if options.weights is not None:
        loaded = networks.load_weights(created, options.weights, head_may_differ=not options.evaluate)
    created.to(ranks.device, memory_format=precision(options, ranks).memory_format)
    if options.sync_bn and ranks.world > 1:
        created = nn.SyncBatchNorm.convert_sync_batchnorm(created)
    return created, loaded


def training_state(
    options: Namespace, created: nn.Module, batches: MicroBatches, ranks: Ranks
) -> tuple[TrainingState, Exporter]:
    """The network among the ranks, with all that trains it."""
    exporter = Exporter(created)
    average = recipes.averaged(created, options.model_ema_decay) if options.model_ema else None
    replica = created
    if options.torchcompile:
        created.compile(backend=options.torchcompile)
    if options.distributed == "fsdp":
        for module in (created, average.module) if average else (created,):
            distributed.shard(module, ranks)
    else:
        replica = distributed.replicate(created, ranks)
    optimizer = recipes.optimizer(created, options)
    state = TrainingState(
        network=created,
        replica=replica,
        average=average,
        optimizer=optimizer,
        scheduler=recipes.scheduler(optimizer, options, batches.steps, batches.images_per_step),
        scaler=torch.amp.GradScaler(ranks.device.type, enabled=options.amp and options.amp_dtype == "float16"),
        window=LossWindow(ranks.device),
    )
    return state, exporter


def precision(options: Namespace, ranks: Ranks) -> Precision:
    amp_dtype = {"bfloat16": torch.bfloat16, "float16": torch.float16}[options.amp_dtype] if options.amp else None
    layout = torch.channels_last if options.channels_last else torch.contiguous_format
    return Precision(ranks.device, amp_dtype, layout)


def identity(options: Namespace, classes: int, batches: MicroBatches) -> dict[str, Any]:
    """What must be the same in a run that is resumed, or it would be another run."""
    names = (
        *("model", "model_kwargs", "multi_label", "model_ema", "batch_size", "seed"),
        *("opt", "lr", "momentum", "weight_decay"),  # of the optimiser's state, which would win over the flags
    )
    chosen = {name: getattr(options, name) for name in names}
    return {**chosen, "classes": classes, "images_per_step": batches.images_per_step, "steps": batches.steps}


def output_folder(options: Namespace, ranks: Ranks) -> Path:
    """The run's folder, there and not another run's."""

    def make() -> Path:
        output = options.output or Path("output") / f"{time.strftime('%Y%m%d-%H%M%S')}-{options.model}"
        if not options.resume and (checkpoint.latest(output) or (output / journal.STEPS).exists()):
            raise UserError(f"--output: {output} holds a run; give --resume to go on with it, or another folder")
        try:
            output.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise UserError(f"--output: {output} cannot be made: {error}") from None
        return output

    return ranks.first_does(make)


def checkpoint_to_resume(options: Namespace, output: Path, ranks: Ranks) -> Path | None:
    def find() -> Path | None:
        newest = checkpoint.latest(output)
        if options.resume is None or options.resume is True:
            return newest
        wanted = Path(options.resume)
        if newest is not None and newest.resolve() != wanted.resolve():
            raise UserError(f"--resume: {output} goes on to {newest}; to go back to {wanted} give another --output")
        return wanted

    return ranks.first_does(find)


def _preparation(options: Namespace) -> Preparation:
    return Preparation(
        img_size=options.img_size,
        mean=tuple(options.mean),
        std=tuple(options.std),
        scale=tuple(options.scale),
        hflip=options.hflip,
        crop_pct=options.crop_pct,
    )


def _workers(options: Namespace) -> int:
    if options.workers is not None:
        return options.workers
    return FOLDER_WORKERS if options.dataset == "folder" else 0
