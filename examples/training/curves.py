"""The picture of a run: what it learnt, from the CSV files that it wrote."""

from pathlib import Path

from matplotlib.figure import Figure

from . import journal

TRAIN_COLOUR, EVALUATION_COLOUR, SECOND_COLOUR = "#8a8f98", "#d1495b", "#30638e"


def draw(folder: Path, title: str) -> Path:
    """Loss, accuracy and learning rate over the epochs, into curves.png of the run's folder."""
    steps, epochs = journal.read(folder, journal.STEPS), journal.read(folder, journal.EPOCHS)
    per_epoch = epochs[0]["step"] / epochs[0]["epoch"]
    when, evaluated = [row["step"] / per_epoch for row in steps], [row["epoch"] for row in epochs]
    figure = Figure(figsize=(13, 4), layout="constrained")
    figure.suptitle(title)
    loss, accuracy, rate = figure.subplots(1, 3, width_ratios=(2, 2, 1))

    loss.plot(when, [row["loss"] for row in steps], color=TRAIN_COLOUR, label="training")
    loss.plot(evaluated, [row["loss"] for row in epochs], ".-", color=EVALUATION_COLOUR, label="evaluation")
    loss.set_title("Loss")
    loss.set_ylim(bottom=0)
    loss.legend(frameon=False)

    for name, label, colour in (("top1", "top-1", EVALUATION_COLOUR), ("top5", "top-5", SECOND_COLOUR)):
        accuracy.plot(evaluated, [row[name] for row in epochs], ".-", color=colour, label=label)
    accuracy.set_title(f"Accuracy, %: top-1 {epochs[-1]['top1']:.1f}, top-5 {epochs[-1]['top5']:.1f} at the end")
    accuracy.legend(frameon=False, loc="lower right")

    rate.plot(when, [row["lr"] for row in steps], color=TRAIN_COLOUR)
    rate.set_title("Learning rate")
    rate.set_ylim(bottom=0)
    for axes in (loss, accuracy, rate):
        axes.set_xlabel("epoch")
        axes.set_xlim(left=0)
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(alpha=0.3)
    path = folder / "curves.png"
    figure.savefig(path, dpi=110)
    return path
