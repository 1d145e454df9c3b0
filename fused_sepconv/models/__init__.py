"""Networks made of separable convolutions."""

from fused_sepconv.models import weights
from fused_sepconv.models.xception import Xception, xception

__all__ = ["Xception", "weights", "xception"]
