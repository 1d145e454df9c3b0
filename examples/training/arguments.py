"""The command line. Flags that timm's train.py has too mean the same here."""

import argparse
import ast
import math
import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

RECIPES = Path(__file__).parents[1] / "recipes"
"""Files of flags that come before those of the command line."""


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """The options: those given, then those of the dataset, then those of the recipe."""
    parser, argv = _parser(), sys.argv[1:] if argv is None else argv
    given = parser.parse_args(argv)
    flags = [f"@{RECIPES / given.recipe}.flags", *([f"@{RECIPES}/digits.flags"] if given.dataset else [])]
    if given.model == ["inception_v3"] and given.recipe != "adamw":
        flags += ["--weight-decay=4e-5"]  # the paper's for it, in both of its recipes
    options = parser.parse_args([*flags, *argv])
    options.warmup_epochs = min(options.warmup_epochs, options.epochs // 2)
    ranks = (("RANK", 0), ("WORLD_SIZE", 1), ("LOCAL_WORLD_SIZE", 1))  # as torchrun says
    options.rank, options.ranks, options.local_ranks = (int(os.environ.get(name, n)) for name, n in ranks)
    options.model_kwargs, options.models, options.model = dict(options.model_kwargs), options.model, options.model[0]
    _check(parser, options)
    return options


def _parser() -> argparse.ArgumentParser:
    what = "Trains an image classifier, on one machine or many; or evaluates several. docs/training.md says more."
    parser = argparse.ArgumentParser(description=what, allow_abbrev=False, fromfile_prefix_chars="@")
    parser.convert_arg_line_to_args = lambda line: [] if line.startswith("#") else line.split()
    add = parser.add_argument_group("data").add_argument
    add("--data-dir", type=Path, metavar="DIR", help="DIR/train and DIR/val, with a folder for each class")
    add("--dataset", choices=("digits",), help="instead of --data-dir: scikit-learn's handwritten digits")
    add("--multi-label", action="store_true", help="many labels an image, listed in DIR/*/labels.csv")
    add("--class-weights", type=Path, metavar="FILE", help="label,weight: what labels count in MAP@100; default: 1")
    add("--img-size", type=_some, default=299, metavar="N", help="pixels; default: 299")
    add("-b", "--batch-size", type=_some, default=64, metavar="N", help="of a rank; default: 64")
    add("-j", "--workers", type=_count, default=4, metavar="N", help="default: 4, or none for the digits")
    add("--scale", type=_share, nargs=2, default=(0.08, 1.0), metavar="P", help="area of training crops")
    add("--hflip", type=_probability, default=0.5, metavar="P", help="default: 0.5")
    add("--crop-pct", type=_share, default=0.9, metavar="P", help="of the side, evaluated; default: 0.9")
    add = parser.add_argument_group("model").add_argument
    name = "xception, xception_slim, googlenet, or one of timm's; with --evaluate one for each of --weights, or for all"
    add("--model", nargs="+", default=["xception"], metavar="NAME", help=name)
    add("--model-kwargs", type=_assignment, nargs="*", action="extend", default=[], metavar="K=V", help="its arguments")
    add("--drop", type=_probability, default=0.0, metavar="P", help="dropout before the last layer")
    what = "to start from, or to evaluate: .safetensors or .ckpt of a run, Keras's or timm's files of Xception"
    add("--weights", "--initial-checkpoint", type=Path, nargs="+", default=[], metavar="FILE", help=what)
    add("--backend", choices=("auto", "fused", "reference"), default="auto", help="see use_backend")
    add("--channels-last", action="store_true", help="images as NHWC")
    add("--fuse-norm", action="store_true", help="BatchNorms together with separable convolutions: see fuse_batch_norm")
    add("--torchcompile", "--compile", nargs="?", const="inductor", metavar="BACKEND", help="torch.compile the network")
    add = parser.add_argument_group("recipe").add_argument
    recipes = [path.stem for path in RECIPES.glob("*.flags") if path.stem != "digits"]
    add("--recipe", choices=recipes, default="adamw", help=f"values for the flags below, of {RECIPES.name}/")
    add("--epochs", type=_some, metavar="N")
    add("--opt", choices=("adamw", "adam", "sgd", "rmsprop"))
    add("--lr", type=_positive, metavar="X", help="learning rate, for all ranks together")
    add("--momentum", type=_probability, default=0.9, metavar="X", help="of sgd and rmsprop; default: 0.9")
    add("--weight-decay", type=float, metavar="X")
    add("--sched", choices=("cosine", "step", "none"))
    add("--decay-rate", type=_share, default=0.94, metavar="X", help="of --sched step")
    add("--decay-epochs", type=_positive, default=2.0, metavar="N", help="it decays after so many")
    add("--decay-images", type=_some, metavar="N", help="or after so many images")
    add("--warmup-epochs", type=_count, default=0, metavar="N", help="at most half of them are")
    add("--smoothing", type=_probability, default=0.0, metavar="X", help="of the label, where there is one an image")
    add("--model-ema", action=argparse.BooleanOptionalAction, default=False, help="evaluate averaged weights (Polyak)")
    add("--model-ema-decay", type=_probability, default=0.9999, metavar="X", help="default: 0.9999")
    add = parser.add_argument_group("engine").add_argument
    device = "cuda" if torch.cuda.is_available() else "cpu"
    add("--device", choices=("cpu", "cuda"), default=device, help="default: cuda where there is a GPU")
    add("--amp", action="store_true", help="automatic mixed precision, in bfloat16")
    add("--distributed", choices=("ddp", "fsdp"), default="ddp", help="under torchrun; fsdp is FSDP2")
    add("--sync-bn", action="store_true", help="BatchNorm over all ranks' images (GPUs)")
    add("--grad-accum-steps", type=_some, default=1, metavar="N", help="batches in a step")
    add("--seed", type=_count, default=42, metavar="N", help="default: 42")
    add = parser.add_argument_group("run").add_argument
    add("--output", type=Path, metavar="DIR", help="of the run; default: output/<time>-<model>")
    whence = "go on from a checkpoint; without a name from the newest in --output, if there is one"
    add("--resume", nargs="?", const=True, metavar="CHECKPOINT", help=whence)
    add("--recovery-interval", type=_count, default=0, metavar="N", help="steps between checkpoints")
    add("--log-interval", type=_some, default=50, metavar="N", help="steps a row, at most an epoch; default: 50")
    add("--eval-interval", type=_some, metavar="N", help="steps between evaluations; default: an epoch")
    add("--evaluate", action="store_true", help="no training: a table of --weights on the evaluation images")
    add("--summary", action="store_true", help="no training: a table of the network's layers and their costs")
    return parser


def _check(parser: argparse.ArgumentParser, options: argparse.Namespace) -> None:
    models, files = len(options.models), len(options.weights)
    one_source = options.summary or (options.data_dir is None) != (options.dataset is None)
    for right, flag, why in (
        (one_source, "--data-dir", "expected a folder of images, or --dataset digits"),
        (not options.multi_label or not options.dataset, "--multi-label", "a digit has one label"),
        (options.device == "cuda" or not options.sync_bn, "--sync-bn", "PyTorch's SyncBatchNorm needs GPUs"),
        (options.distributed == "ddp" or not options.model_ema, "--model-ema", "Lightning averages no sharded weights"),
        (files >= 1 if options.evaluate else files <= 1, "--weights", "expected one file, or some to --evaluate"),
        (models == 1 or (options.evaluate and models == files), "--model", "expected one, or one a file of --weights"),
        (options.resume is not True or options.output, "--resume", "a checkpoint's name or --output is needed"),
    ):
        if not right:
            parser.error(f"argument {flag}: {why}")


def _number(kind: Callable, good: Callable[[Any], bool], expected: str) -> Callable[[str], Any]:
    def number(text: str) -> Any:
        if not good(kind(text)):
            raise argparse.ArgumentTypeError(f"expected {expected}, got {text}")
        return kind(text)

    return number


_count, _some = _number(int, lambda n: n >= 0, "0 or more"), _number(int, lambda n: n >= 1, "1 or more")
_positive = _number(float, lambda x: 0 < x < math.inf, "more than 0")
_share = _number(float, lambda x: 0 < x <= 1, "more than 0 and at most 1")
_probability = _number(float, lambda x: 0 <= x < 1, "0 or more and less than 1")


def _assignment(text: str) -> tuple[str, Any]:
    name, equals, value = text.partition("=")
    if not equals or not name.isidentifier():
        raise argparse.ArgumentTypeError(f"expected NAME=VALUE, got {text!r}")
    try:
        return name, ast.literal_eval(value)
    except (ValueError, SyntaxError):
        return name, value
