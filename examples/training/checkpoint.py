"""Checkpoints: whole or not there at all.

    OUTPUT/checkpoints/step-00001234/     tensors, by torch.distributed.checkpoint: each rank writes its own shards, and
                                          any number of ranks can read them
                                     run.json    the rest: what is trained, the position, schedule and loss scale

A checkpoint is written under another name and renamed when all ranks have written all of it, so that whatever goes
wrong in between leaves the one before it. Only then are old ones deleted.
"""

import json
import shutil
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.metadata import TensorStorageMetadata
from torch.distributed.checkpoint.state_dict import get_model_state_dict, get_state_dict, set_state_dict

from .distributed import Ranks
from .errors import UserError
from .state import Position, TrainingState

PREFIX, UNFINISHED = "step-", "unfinished-"
SIDECAR = "run.json"
SHOWN_DIFFERENCES = 3


def save(output: Path, state: TrainingState, trained: Mapping[str, Any], ranks: Ranks, keep: int) -> None:
    """Writes a checkpoint of all ranks, and deletes all but the newest `keep`.

    Args:
        trained: what `load` compares: of which network, on which data, in which steps.

    Raises:
        UserError: in all ranks, where one of them could not write. What was there before is there still.
    """
    folder = output / "checkpoints"
    name = f"{PREFIX}{state.position.steps:08d}"
    unfinished, finished = folder / f"{UNFINISHED}{name}", folder / name
    state.merge_ranks(ranks)
    if ranks.first_does(finished.exists):  # saved at this very step: of a run, the same contents
        return

    def begin() -> None:
        with _user_error(output, finished):
            folder.mkdir(parents=True, exist_ok=True)
            for path in folder.glob(f"{UNFINISHED}*"):  # of a process that was killed
                shutil.rmtree(path)

    def end() -> None:
        with _user_error(output, finished):
            sidecar = {
                "trained": trained,
                "position": asdict(state.position),
                "window": [float(state.window.total), state.window.steps],
                "scheduler": _without_lambdas(state.scheduler.state_dict()),
                "scaler": state.scaler.state_dict(),
            }
            (unfinished / SIDECAR).write_text(json.dumps(sidecar, indent=1) + "\n")
            unfinished.rename(finished)
            for old in _finished(folder)[:-keep]:
                shutil.rmtree(old)

    ranks.first_does(begin)
    with _user_error(output, finished), _one_process_is_meant():
        dcp.save(_tensors(state), checkpoint_id=unfinished)  # what fails in one rank is raised in all
    ranks.first_does(end)


def latest(output: Path) -> Path | None:
    """The newest whole checkpoint of a run."""
    return next(reversed(_finished(output / "checkpoints")), None)


def load(path: Path, state: TrainingState, trained: Mapping[str, Any]) -> None:
    """Puts `state` where a checkpoint left it. Checks that it is of the same run before anything is changed."""
    sidecar = _read_sidecar(path)
    if different := [
        f"{name} {sidecar['trained'].get(name)!r} there, {value!r} here"
        for name, value in trained.items()
        if sidecar["trained"].get(name) != value
    ]:
        raise UserError(f"--resume: {path} is of another run: {'; '.join(different)}")
    tensors = _tensors(state)
    _compare(path, tensors)
    try:
        with _one_process_is_meant():
            dcp.load(tensors, checkpoint_id=path)
    except (OSError, RuntimeError, CheckpointException) as error:
        raise UserError(f"--resume: {path} cannot be read: {_reason(error)}") from None
    set_state_dict(
        state.network, state.optimizer, model_state_dict=tensors["model"], optim_state_dict=tensors["optimizer"]
    )
    if state.average is not None:
        state.average.load_state_dict(tensors["average"])
    state.position = Position(**sidecar["position"])
    total, state.window.steps = sidecar["window"]
    state.window.total.fill_(total)
    state.scheduler.load_state_dict(sidecar["scheduler"])
    state.scaler.load_state_dict(sidecar["scaler"])


def _tensors(state: TrainingState) -> dict[str, Any]:
    model, optimizer = get_state_dict(state.network, state.optimizer)
    tensors = {"model": model, "optimizer": optimizer}
    if state.average is not None:
        tensors["average"] = get_model_state_dict(state.average)
    return tensors


def _without_lambdas(scheduler: dict[str, Any]) -> dict[str, Any]:
    """LambdaLR's functions are of the run, not of its state."""
    return {**scheduler, "lr_lambdas": [None] * len(scheduler["lr_lambdas"])}


def _finished(folder: Path) -> list[Path]:
    """Oldest first."""
    return sorted(path for path in folder.glob(f"{PREFIX}*") if path.is_dir())


def _read_sidecar(path: Path) -> dict[str, Any]:
    try:
        return json.loads((path / SIDECAR).read_text())
    except FileNotFoundError:
        raise UserError(f"--resume: {path} is no checkpoint: it has no {SIDECAR}") from None
    except (OSError, ValueError) as error:
        raise UserError(f"--resume: {path / SIDECAR} cannot be read: {error}") from None


def _compare(path: Path, tensors: Mapping[str, Any]) -> None:
    """Names and shapes, in the checkpoint and here."""
    try:
        entries = dcp.FileSystemReader(path).read_metadata().state_dict_metadata
    except Exception as error:  # a pickle: anything can be wrong with it
        raise UserError(f"--resume: {path} cannot be read: {_reason(error)}") from None
    there = {name: tuple(entry.size) for name, entry in entries.items() if isinstance(entry, TensorStorageMetadata)}
    here = {name: tuple(tensor.shape) for name, tensor in _flat(tensors).items()}
    differences = [
        f"{name} {there.get(name, 'missing')} there, {here.get(name, 'missing')} here"
        for name in sorted(there.keys() | here.keys())
        if there.get(name) != here.get(name)
    ]
    if differences:
        shown = "; ".join(differences[:SHOWN_DIFFERENCES])
        more = f" and {len(differences) - SHOWN_DIFFERENCES} more" if len(differences) > SHOWN_DIFFERENCES else ""
        raise UserError(f"--resume: {path} is of another network or optimiser: {shown}{more}")


def _flat(nested: Mapping[str, Any], prefix: str = "") -> dict[str, torch.Tensor]:
    """Tensors by the names that torch.distributed.checkpoint gives them."""
    flat = {}
    for key, value in nested.items():
        name = f"{prefix}{key}"
        if isinstance(value, Mapping):
            flat |= _flat(value, f"{name}.")
        elif isinstance(value, torch.Tensor):
            flat[name] = value
    return flat


def _reason(error: BaseException) -> str:
    """The cause in one line: CheckpointException wraps what each rank had."""
    if isinstance(error, CheckpointException) and error.failures:
        rank, (cause, _) = next(iter(error.failures.items()))
        return f"rank {rank}: {_reason(cause)}"
    text = str(error).strip().splitlines()
    return f"{type(error).__name__}: {text[0]}" if text else type(error).__name__


@contextmanager
def _user_error(output: Path, checkpoint: Path) -> Iterator[None]:
    """An error in writing is told with what is left, after what was half written has made room."""
    try:
        yield
    except (OSError, RuntimeError, CheckpointException) as error:
        for path in checkpoint.parent.glob(f"{UNFINISHED}*"):
            shutil.rmtree(path, ignore_errors=True)
        newest = latest(output)
        rest = f"{newest} is whole, and --resume goes on from there" if newest else "there is none before it"
        raise UserError(
            f"--output: the checkpoint {checkpoint} could not be written ({_reason(error)}); {rest}"
        ) from None


@contextmanager
def _one_process_is_meant() -> Iterator[None]:
    """torch.distributed.checkpoint warns where there is no process group."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "torch.distributed is disabled")
        yield
