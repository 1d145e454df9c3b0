"""Weights for others: safetensors files, which hold tensors by name and nothing that could be executed."""

import copy
import os
from pathlib import Path

from safetensors.torch import save_file
from torch import nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict

from fused_sepconv.models import Xception, weights

from .distributed import Ranks
from .errors import UserError


class Exporter:
    """Args:
    network: before it is sharded. Its structure is kept, with what belongs to the weights and is no tensor.
    """

    def __init__(self, network: nn.Module) -> None:
        self.skeleton = copy.deepcopy(network).to("meta")

    def write(self, network: nn.Module, path: Path, ranks: Ranks) -> None:
        """Writes the weights of `network`, gathered from all ranks, to `path`: all of them or none.

        For Xception it is `fused_sepconv.models.weights.save_safetensors`' file, whose loader takes it.

        Raises:
            UserError: in all ranks, where the file cannot be written.
        """
        gathered = get_model_state_dict(network, options=StateDictOptions(full_state_dict=True, cpu_offload=True))
        ranks.first_does(lambda: self._write(gathered, path))

    def _write(self, tensors: dict, path: Path) -> None:
        unfinished = path.with_name(f"unfinished-{path.name}")
        try:
            if isinstance(self.skeleton, Xception):
                whole = copy.deepcopy(self.skeleton)
                whole.load_state_dict(tensors, assign=True)
                weights.save_safetensors(whole, unfinished)
            else:
                save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, unfinished)
            os.replace(unfinished, path)
        except Exception as error:  # safetensors has an error of its own for a full disk
            unfinished.unlink(missing_ok=True)
            raise UserError(f"--output: {path} could not be written: {error}") from None
