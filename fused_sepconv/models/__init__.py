"""Networks made of separable convolutions."""

from .xception import Xception, xception

__all__ = ["Xception", "xception"]
