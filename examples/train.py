"""Trains Xception, or any image classifier of timm's, with PyTorch alone: one process, or many under torchrun.

    python examples/train.py --dataset digits
    torchrun --nproc-per-node=8 examples/train.py --data-dir imagenet --recipe imagenet --amp --channels-last

`--help` has all flags. The files of a run are in its `--output`: steps.csv, epochs.csv and tensorboard/ as it goes,
checkpoints/, model.safetensors (the last weights that were evaluated), model_best.safetensors, and curves.png.
"""

import argparse
import sys
from collections.abc import Sequence
from contextlib import closing, nullcontext

try:
    import fused_sepconv
except ModuleNotFoundError as error:
    if error.name != "fused_sepconv":
        raise
    sys.exit('fused_sepconv is not installed: run `pip install ".[train]"` at the root of the checkout first')

from training import build, checkpoint, curves, recipes
from training.arguments import parse
from training.distributed import Ranks, join_ranks, leave
from training.errors import UserError
from training.journal import Journal
from training.loop import Interrupted, Interruption, evaluate, train_epoch
from training.metrics import Result


def main(argv: Sequence[str] | None = None) -> int:
    """Returns 0; 1 after an error that is the user's to mend; 128 and the signal's number after a signal."""
    options = parse(argv)
    try:
        with join_ranks(options.device) as ranks, fused_sepconv.use_backend(options.backend):
            result = evaluate_weights(options, ranks) if options.evaluate else train(options, ranks)
            if ranks.first:
                print(result)
    except UserError as error:
        print(f"train.py: {error}", file=sys.stderr)
        return 1
    except Interrupted as stop:
        if isinstance(stop.cause, int):
            return 128 + stop.cause
        if stop.cause is not None:
            print(f"train.py: {stop.cause}", file=sys.stderr)
        return 1
    return 0


def evaluate_weights(options: argparse.Namespace, ranks: Ranks) -> Result:
    images = build.splits(options)
    classes = build.class_count(options, images)
    network, loaded = build.network(options, classes, ranks)
    if ranks.first:
        print(loaded, file=sys.stderr)
    data = build.evaluation_data(options, images, ranks)
    _, criterion = recipes.losses(options)
    return evaluate(network, data, criterion, classes, options.multi_label, build.precision(options, ranks))


def train(options: argparse.Namespace, ranks: Ranks) -> Result:
    images = build.splits(options)
    classes = build.class_count(options, images)
    batches, data = build.training_data(options, images, ranks)
    evaluation = build.evaluation_data(options, images, ranks)
    network, loaded = build.network(options, classes, ranks)
    state, exporter = build.training_state(options, network, batches, ranks)
    criterion, evaluation_criterion = recipes.losses(options)
    precision = build.precision(options, ranks)

    output = build.output_folder(options, ranks)
    identity = build.identity(options, classes, batches)
    resumed = build.checkpoint_to_resume(options, output, ranks)
    if resumed:
        checkpoint.load(resumed, state, identity)
    position = state.position
    if position.epoch >= options.epochs:
        raise UserError(f"--epochs: {resumed} is in epoch {position.epoch + 1} already, got {options.epochs}")

    def save() -> None:
        checkpoint.save(output, state, identity, ranks, options.checkpoint_hist)

    def after_step() -> None:
        if options.recovery_interval and position.steps % options.recovery_interval == 0:
            save()

    title = f"{options.model}, {options.dataset}, {options.recipe}, {ranks.world} rank{'s' * (ranks.world > 1)}"
    journal = Journal(output, position.steps, position.epoch) if ranks.first else None
    with closing(journal) if journal else nullcontext(), Interruption().watched() as interruption:
        if journal:
            journal.say(f"{title}: {batches.images} images, {batches.steps} steps an epoch, into {output}")
            for note in (loaded, f"resumed from {resumed}, after {position.steps} steps" if resumed else None):
                if note:
                    journal.say(note)
        for epoch in range(position.epoch, options.epochs):
            with journal.epoch(epoch, options.epochs, batches.steps, position.step) if journal else nullcontext():
                try:
                    train_epoch(
                        state,
                        data,
                        batches,
                        criterion,
                        precision,
                        ranks,
                        journal,
                        options.log_interval,
                        after_step,
                        interruption,
                    )
                except Interrupted:
                    if position.steps:
                        save()
                    if journal:
                        journal.say(f"stopped after {position.steps} steps, which are saved: --resume goes on")
                    raise
            save()  # before the evaluation, which might not succeed
            result = evaluate(
                state.evaluated, evaluation, evaluation_criterion, classes, options.multi_label, precision
            )
            if journal:
                journal.evaluation(epoch + 1, position.steps, result)
            exporter.write(state.evaluated, output / "model.safetensors", ranks)
            if result.top1 > position.best:
                position.best = result.top1
                exporter.write(state.evaluated, output / "model_best.safetensors", ranks)
            position.epoch, position.step = epoch + 1, 0
    if ranks.first:
        print(f"curves: {curves.draw(output, title)}", file=sys.stderr)
    return result


if __name__ == "__main__":
    leave(main())
