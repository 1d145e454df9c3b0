"""Depthwise separable convolution for PyTorch: the depthwise and the pointwise convolution in one kernel."""

from . import reference
from ._version import __version__
from .autograd import SeparableConv2dFunction
from .backend import use_backend
from .explain import explain
from .functional import separable_conv2d
from .module import SeparableConv2d

__all__ = [
    "SeparableConv2d",
    "SeparableConv2dFunction",
    "__version__",
    "explain",
    "reference",
    "separable_conv2d",
    "use_backend",
]
