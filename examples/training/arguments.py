"""The command line. Flags that timm's train.py has too mean the same here."""

import argparse
import ast
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from .recipes import RECIPES

DATASETS: dict[str, dict[str, Any]] = {
    "folder": {},
    # 1437 + 360 images of 8 x 8 pixels, enlarged; a mirrored digit is none.
    "digits": {
        "model": "xception_slim",
        "img_size": 32,
        "scale": (0.7, 1.0),
        "hflip": 0.0,
        "crop_pct": 1.0,
        "epochs": 15,
        "warmup_epochs": 3,
        "log_interval": 10,
    },
    "synthetic": {},
}
"""Their names, and the values of flags that suit them."""

EXAMPLES = """examples:
  a first run, minutes on a CPU:
    python examples/train.py --dataset digits
  the paper's network and recipe, on all GPUs of a machine:
    torchrun --nproc-per-node=8 examples/train.py --data-dir imagenet --recipe imagenet --amp --channels-last
  the same, going on by itself after a lost process, or when the command is given again:
    torchrun --nproc-per-node=8 --max-restarts=3 examples/train.py ... --output runs/1 --resume
  Keras's weights on a folder of images:
    python examples/train.py --evaluate --data-dir imagenet/val --weights xception_weights_tf_dim_ordering_tf_kernels.h5
"""


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """The options. What is not given comes from the dataset, or from the recipe, or from the flag itself."""
    parser = _parser()
    given = parser.parse_args(argv)
    parser.set_defaults(**{**RECIPES[given.recipe], **DATASETS[given.dataset]})
    options = parser.parse_args(argv)
    options.device = options.device or ("cuda" if torch.cuda.is_available() else "cpu")
    options.model_kwargs = dict(options.model_kwargs)
    _check(parser, options)
    return options


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description="Trains an image classifier, on one machine or many; or evaluates one.",
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    yes_or_no = argparse.BooleanOptionalAction

    data = parser.add_argument_group("data")
    data.add_argument(
        "--data-dir", type=Path, metavar="DIR", help="DIR/train and DIR/val, with a folder for each class"
    )
    data.add_argument("--dataset", choices=DATASETS, default="folder", help="default: folder, which is --data-dir")
    data.add_argument("--multi-label", action="store_true", help="many labels an image, listed in DIR/*/labels.csv")
    data.add_argument("--img-size", type=_at_least(1), default=299, metavar="N", help="pixels; default: 299")
    data.add_argument("-b", "--batch-size", type=_at_least(1), default=64, metavar="N", help="of a rank; default: 64")
    data.add_argument("-j", "--workers", type=_at_least(0), metavar="N", help="default: 4, or none in memory")
    data.add_argument("--scale", type=_share, nargs=2, default=(0.08, 1.0), metavar="P", help="area of training crops")
    data.add_argument("--hflip", type=_probability, default=0.5, metavar="P", help="default: 0.5")
    data.add_argument("--crop-pct", type=_share, default=0.9, metavar="P", help="of the side, evaluated; default: 0.9")
    data.add_argument("--mean", type=float, nargs=3, default=(0.5, 0.5, 0.5), metavar="X", help="default: 0.5 0.5 0.5")
    data.add_argument("--std", type=_positive, nargs=3, default=(0.5, 0.5, 0.5), metavar="X", help="the same")
    data.add_argument("--synthetic-images", type=_at_least(1), default=4096, metavar="N", help="default: 4096")

    model = parser.add_argument_group("model")
    model.add_argument("--model", default="xception", metavar="NAME", help="xception, xception_slim, or one of timm's")
    model.add_argument("--model-kwargs", type=_assignment, nargs="*", default=[], metavar="K=V", help="its arguments")
    model.add_argument("--num-classes", type=_at_least(1), metavar="N", help="default: as many as the data has")
    model.add_argument("--drop", type=_probability, metavar="P", help="dropout before the last layer")
    model.add_argument(
        "--initial-checkpoint",
        "--weights",
        type=Path,
        metavar="FILE",
        dest="weights",
        help="weights to start from, or to evaluate: .safetensors of a run, or Keras's or timm's files of Xception",
    )
    model.add_argument("--backend", choices=("auto", "fused", "reference"), default="auto", help="see use_backend")
    model.add_argument("--channels-last", action="store_true", help="images as NHWC")
    model.add_argument(
        "--torchcompile", nargs="?", const="inductor", metavar="BACKEND", help="torch.compile the network"
    )

    learning = parser.add_argument_group("recipe")
    learning.add_argument(
        "--recipe", choices=RECIPES, default="adamw", help="values for the flags below; default: adamw"
    )
    learning.add_argument("--epochs", type=_at_least(1), metavar="N")
    learning.add_argument("--opt", choices=("adamw", "sgd", "rmsprop"))
    learning.add_argument("--lr", type=_positive, metavar="X", help="learning rate, for all ranks together")
    learning.add_argument("--momentum", type=_probability, default=0.9, metavar="X", help="default: 0.9")
    learning.add_argument("--weight-decay", type=float, metavar="X")
    learning.add_argument("--sched", choices=("cosine", "step", "none"))
    learning.add_argument("--decay-rate", type=_share, default=0.94, metavar="X", help="of --sched step")
    learning.add_argument("--decay-epochs", type=_positive, default=2.0, metavar="N", help="it decays after so many")
    learning.add_argument("--decay-images", type=_at_least(1), metavar="N", help="or after so many images")
    learning.add_argument("--warmup-epochs", type=_at_least(0), metavar="N")
    learning.add_argument("--smoothing", type=_probability, metavar="X", help="of labels")
    learning.add_argument("--model-ema", action=yes_or_no, help="evaluate averaged weights (Polyak)")
    learning.add_argument("--model-ema-decay", type=_probability, default=0.9999, metavar="X", help="default: 0.9999")

    engine = parser.add_argument_group("engine")
    engine.add_argument("--device", choices=("cpu", "cuda"), help="default: cuda where there is a GPU")
    engine.add_argument("--amp", action="store_true", help="automatic mixed precision")
    engine.add_argument("--amp-dtype", choices=("bfloat16", "float16"), default="bfloat16", help="default: bfloat16")
    engine.add_argument("--distributed", choices=("ddp", "fsdp"), default="ddp", help="under torchrun; fsdp is FSDP2")
    engine.add_argument("--sync-bn", action="store_true", help="BatchNorm over all ranks' images (GPUs)")
    engine.add_argument("--grad-accum-steps", type=_at_least(1), default=1, metavar="N", help="batches in a step")
    engine.add_argument("--seed", type=_at_least(0), default=42, metavar="N", help="default: 42")

    run = parser.add_argument_group("run")
    run.add_argument("--output", type=Path, metavar="DIR", help="of the run; default: output/<time>-<model>")
    run.add_argument(
        "--resume",
        nargs="?",
        const=True,
        metavar="CHECKPOINT",
        help="go on from a checkpoint; without a name from the newest in --output, if there is one",
    )
    run.add_argument("--recovery-interval", type=_at_least(0), default=0, metavar="N", help="steps between checkpoints")
    run.add_argument(
        "--checkpoint-hist", type=_at_least(1), default=2, metavar="N", help="checkpoints kept; default: 2"
    )
    run.add_argument("--log-interval", type=_at_least(1), default=50, metavar="N", help="steps a row; default: 50")
    run.add_argument("--evaluate", action="store_true", help="no training: evaluate --weights")
    return parser


def _check(parser: argparse.ArgumentParser, options: argparse.Namespace) -> None:
    if options.device == "cuda" and not torch.cuda.is_available():
        parser.error("argument --device: PyTorch sees no CUDA GPU on this machine")
    if options.dataset == "folder" and options.data_dir is None:
        parser.error("argument --data-dir: expected a folder of images, or --dataset digits")
    if options.dataset != "folder" and options.data_dir is not None:
        parser.error(f"argument --data-dir: --dataset {options.dataset} has no folder")
    if options.multi_label and options.dataset != "folder":
        parser.error(f"argument --multi-label: --dataset {options.dataset} has one label an image")
    if options.multi_label and options.smoothing:
        parser.error("argument --smoothing: is for one class an image, not for --multi-label")
    if options.sync_bn and options.device == "cpu":
        parser.error("argument --sync-bn: PyTorch's SyncBatchNorm needs GPUs")
    if options.scale[0] > options.scale[1]:
        parser.error(f"argument --scale: expected the smaller share first, got {options.scale[0]} {options.scale[1]}")
    if options.warmup_epochs >= options.epochs:
        parser.error(
            f"argument --warmup-epochs: expected fewer than the {options.epochs} epochs, got {options.warmup_epochs}"
        )
    if options.evaluate and options.weights is None:
        parser.error("argument --weights: --evaluate needs a file")
    if options.resume is True and options.output is None:
        parser.error("argument --resume: without the name of a checkpoint it needs --output")


def _at_least(minimum: int) -> Callable[[str], int]:
    def integer(text: str) -> int:
        value = int(text)
        if value < minimum:
            raise argparse.ArgumentTypeError(f"expected {minimum} or more, got {value}")
        return value

    return integer


def _positive(text: str) -> float:
    value = float(text)
    if not 0 < value < float("inf"):
        raise argparse.ArgumentTypeError(f"expected more than 0, got {text}")
    return value


def _share(text: str) -> float:
    value = float(text)
    if not 0 < value <= 1:
        raise argparse.ArgumentTypeError(f"expected more than 0 and at most 1, got {text}")
    return value


def _probability(text: str) -> float:
    value = float(text)
    if not 0 <= value < 1:
        raise argparse.ArgumentTypeError(f"expected 0 or more and less than 1, got {text}")
    return value


def _assignment(text: str) -> tuple[str, Any]:
    name, equals, value = text.partition("=")
    if not equals or not name.isidentifier():
        raise argparse.ArgumentTypeError(f"expected NAME=VALUE, got {text!r}")
    try:
        return name, ast.literal_eval(value)
    except (ValueError, SyntaxError):
        return name, value
