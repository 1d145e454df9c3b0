"""`import fused_sepconv.timm` registers the network with timm: `timm.create_model("fused_xception", ...)`.

It is timm's `legacy_xception` (its arguments, its epsilon and pooling, and with `pretrained=True` its weights) on fused
separable convolutions. `Xception`'s own arguments, such as `mid_activation`, are taken too.
"""

from __future__ import annotations

from typing import Any

from timm.models import build_model_with_cfg, generate_default_cfgs, get_pretrained_cfg, register_model
from torch import Tensor, nn

from fused_sepconv.models import Xception
from fused_sepconv.models.weights import TIMM_EPSILON, from_timm_names

__all__ = ["fused_xception"]


def _pretrained_cfg() -> dict[str, Any]:
    """timm's own, with the names that the first and the last layer have here."""
    cfg = get_pretrained_cfg("legacy_xception.tf_in1k").to_dict(remove_null=True)
    cfg = {key: value for key, value in cfg.items() if key not in ("architecture", "tag")}
    return {**cfg, "first_conv": "entry.module1.conv1", "classifier": "classifier"}


default_cfgs = generate_default_cfgs({"fused_xception.tf_in1k": _pretrained_cfg()})


def _create(
    num_classes: int = 1000,
    in_chans: int = 3,
    drop_rate: float = 0.0,
    global_pool: str = "avg",
    bn_eps: float = TIMM_EPSILON,
    pool_padding: str = "symmetric",
    **options: Any,
) -> Xception:
    return Xception(
        num_classes,
        in_chans,
        dropout=drop_rate,
        global_pool=global_pool,
        bn_eps=bn_eps,
        pool_padding=pool_padding,
        **options,
    )


def _in_our_names(state: dict[str, Tensor], model: Xception) -> dict[str, Tensor]:
    """A checkpoint of `legacy_xception`'s in our names; one of `fused_xception`'s as it is."""
    if "entry.module1.conv1.weight" in state:
        return state
    renamed, unexpected = from_timm_names(model, state)
    return renamed | {name: state[name] for name in unexpected if name in state}  # for timm to complain of


@register_model
def fused_xception(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """Xception on fused separable convolutions, with timm's arguments."""
    return build_model_with_cfg(
        _create,
        "fused_xception",
        pretrained,
        pretrained_filter_fn=_in_our_names,
        feature_cfg={"feature_cls": "getter"},
        **kwargs,
    )
