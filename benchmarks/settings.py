"""How to measure: what the command line and the machine decide."""

from dataclasses import dataclass

from layers import NETWORKS, Layer
from roofline import Ceilings


@dataclass(frozen=True)
class Settings:
    device: str
    """"cpu" or "cuda"."""
    batches: tuple[int, ...]
    dtypes: tuple[str, ...]
    layouts: tuple[str, ...]
    model_layouts: tuple[str, ...]
    """Of whole networks."""
    passes: tuple[str, ...]
    networks: tuple[str, ...]
    """Whose layers are timed."""
    peers: tuple[str, ...]
    """Kinds of peers, see peers.py."""
    modes: tuple[str, ...]
    """In which layers are sampled, see timing.py."""
    seconds: float
    """To spend on the samples of each row."""
    threads: int
    """That PyTorch uses on the CPU."""
    turns: int
    """In how many parts the samples are taken. A CPU's speed drifts with what else runs: taking turns shares that."""
    ceilings: Ceilings
    """Of the device."""

    @property
    def layers(self) -> list[Layer]:
        return [layer for network in self.networks for layer in NETWORKS[network]]
