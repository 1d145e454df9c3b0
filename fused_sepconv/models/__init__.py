"""Networks made of separable convolutions."""

from . import weights
from .xception import Xception, xception

__all__ = ["Xception", "weights", "xception"]
