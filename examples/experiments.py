"""The Xception paper's comparisons, one command each: a table, and all curves in one picture.

    python examples/experiments.py activation
    python examples/experiments.py residual --data-dir imagenet --model xception --recipe imagenet --amp

activation      none, ReLU or ELU between the two convolutions (Figure 10)
residual        with and without residual connections (Figure 9)
spectrum        an Xception of regular convolutions, of 2, 3, 4, ... segments, and of a segment a channel (Section 1.2)
architectures   Xception, Inception V3 and GoogLeNet (Figures 6 to 8, Tables 1 and 3)
backends        the same network with our kernels and with PyTorch's convolutions: images/s

On scikit-learn's digits; every flag of train.py goes to it, for other data. Each run is in its folder of --output.
"""

import argparse
import contextlib
import statistics
import sys
from pathlib import Path

from matplotlib import colormaps
from matplotlib.figure import Figure

import train
from training import networks, run
from training.arguments import parse
from training.data import ImageData

ACTIVATIONS = {"none": "None", "ReLU": "relu", "ELU": "elu"}
SEGMENTS = (1, 2, 3, 4, 8, 16, 32)
EXPERIMENTS: dict[str, dict[str, list[str]]] = {
    "activation": {name: ["--model-kwargs", f"mid_activation={value}"] for name, value in ACTIVATIONS.items()},
    "residual": {name: ["--model-kwargs", f"residual={name == 'with'}"] for name in ("with", "without")},
    "spectrum": {f"{n} segment{'s' * (n > 1)}": ["--model-kwargs", f"segments={n}"] for n in SEGMENTS}
    | {"a segment a channel": []},
    "architectures": {  # timm's Inception V3 has no auxiliary head unless it is asked for, and nor has the paper's
        "Xception": ["--model", "xception"],
        "Inception V3": ["--model", "inception_v3"],
        "GoogLeNet": ["--model", "googlenet"],
    },
    "backends": {name: ["--backend", name] for name in ("auto", "reference")},
}
DIGITS = {
    "spectrum": ["--epochs", "4"],
    "architectures": ["--img-size", "75", "--batch-size", "16", "--epochs", "1"],
}
"""On digits alone: eight networks take their time, and three are large for a CPU; Inception V3 needs 75 pixels."""
PAPER = {
    "Xception": {"parameters": "22,855,952", "steps/s": "28", "top-1": "79.0", "top-5": "94.5"},
    "Inception V3": {"parameters": "23,626,728", "steps/s": "31", "top-1": "78.2", "top-5": "94.1"},
}
"""On ImageNet with 60 K80 GPUs, from its Tables 1 and 3."""


def compare(name: str, output: Path, flags: list[str]) -> str:
    """Runs an experiment; gives its table, and leaves the picture in `output`."""
    data = [] if "--dataset" in flags or "--data-dir" in flags else ["--dataset", "digits", *DIGITS.get(name, [])]
    rows, logs = [], {}
    for variant, own in EXPERIMENTS[name].items():
        folder = output / variant.replace(" ", "_")
        arguments = [*data, *flags, *own, "--output", str(folder)]
        print(f"=== {variant}: train.py {' '.join(arguments)}", file=sys.stderr)
        with contextlib.redirect_stdout(sys.stderr):  # the table alone is the result here
            status = train.main(arguments)
        if status:
            raise SystemExit(status)
        options, log = parse(arguments), run.read(folder)
        network = train.network_of(options, options.model, len(ImageData(options).classes))
        speed = statistics.median(row["train/images_per_second"] for row in log if "train/images_per_second" in row)
        per_step = options.batch_size * options.grad_accum_steps
        rows.append({name: variant, **networks.cost(network, options.img_size)})
        rows[-1] |= {"images/s": f"{speed:.1f}", "steps/s": f"{speed / per_step:.2f}", **run.last_evaluation(log)}
        logs[variant] = log
    if name == "architectures":
        rows += [{name: f"{variant}, in the paper", **figures} for variant, figures in PAPER.items()]
    picture(logs, f"{name}: train.py {' '.join((*data, *flags))}").savefig(output / f"{name}.png", dpi=110)
    return run.table(rows)


def picture(logs: dict[str, run.Rows], title: str) -> Figure:
    """All variants' curves, their last evaluations large enough to be compared."""
    # A few runs have colours of their own; many are in an order, from dark to bright.
    palette = colormaps["tab10"] if len(logs) < 6 else colormaps["viridis"].resampled(len(logs) + 1)
    figure = run.draw(logs, title, palette.colors)
    score = figure.axes[1]
    ends = [line.get_ydata()[-1] for line in score.lines]
    bottom = max(0, min(95, 100 - 4 * (100 - min(ends))))
    score.set_ylim(bottom, max(ends) + (100 - bottom) / 10)
    figure.legend(*score.get_legend_handles_labels(), loc="outside lower center", ncols=8, frameon=False)
    return figure


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("name", choices=EXPERIMENTS)
    parser.add_argument("--output", type=Path, help="default: output/NAME")
    options, flags = parser.parse_known_args()
    output = options.output or Path("output") / options.name
    print(compare(options.name, output, flags))
    print(f"curves: {output / options.name}.png", file=sys.stderr)


if __name__ == "__main__":
    main()
