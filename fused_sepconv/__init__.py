"""Depthwise separable convolution for PyTorch: the depthwise and the pointwise convolution in one kernel."""

from fused_sepconv import models
from fused_sepconv._version import __version__
from fused_sepconv.explain import explain
from fused_sepconv.nn.depthwise import DepthwiseConv1d, DepthwiseConv2d
from fused_sepconv.nn.functional import depthwise_conv2d, separable_conv2d
from fused_sepconv.nn.norm_units import norm_depthwise_conv2d, norm_separable_conv2d
from fused_sepconv.nn.separable import SeparableConv2d
from fused_sepconv.ops.autograd import DepthwiseConv2dFunction, SeparableConv2dFunction
from fused_sepconv.ops.backend import use_backend
from fused_sepconv.transforms.batch_norm import fuse_batch_norm, unfuse_batch_norm
from fused_sepconv.transforms.depthwise import replace_depthwise_convs
from fused_sepconv.transforms.inference import optimize_for_inference
from fused_sepconv.transforms.restore import restore_convs
from fused_sepconv.transforms.separable import replace_separable_convs

__all__ = [
    "DepthwiseConv1d",
    "DepthwiseConv2d",
    "DepthwiseConv2dFunction",
    "SeparableConv2d",
    "SeparableConv2dFunction",
    "__version__",
    "depthwise_conv2d",
    "explain",
    "fuse_batch_norm",
    "models",
    "norm_depthwise_conv2d",
    "norm_separable_conv2d",
    "optimize_for_inference",
    "replace_depthwise_convs",
    "replace_separable_convs",
    "restore_convs",
    "separable_conv2d",
    "unfuse_batch_norm",
    "use_backend",
]
