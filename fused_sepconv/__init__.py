"""Depthwise separable convolution for PyTorch: the depthwise and the pointwise convolution in one kernel."""

from . import models, reference
from ._version import __version__
from .autograd import DepthwiseConv2dFunction, SeparableConv2dFunction
from .backend import use_backend
from .convert import replace_separable_convs
from .convert_depthwise import replace_depthwise_convs
from .depthwise_module import DepthwiseConv1d, DepthwiseConv2d
from .explain import explain
from .functional import depthwise_conv2d, separable_conv2d
from .inference import optimize_for_inference
from .module import SeparableConv2d

__all__ = [
    "DepthwiseConv1d",
    "DepthwiseConv2d",
    "DepthwiseConv2dFunction",
    "SeparableConv2d",
    "SeparableConv2dFunction",
    "__version__",
    "depthwise_conv2d",
    "explain",
    "models",
    "optimize_for_inference",
    "reference",
    "replace_depthwise_convs",
    "replace_separable_convs",
    "separable_conv2d",
    "use_backend",
]
