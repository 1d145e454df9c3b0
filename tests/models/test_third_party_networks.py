"""Networks of four libraries give what they gave, outputs and gradients, once they are converted."""

import copy

import pytest
import torch
from torch.utils._pytree import tree_leaves

from fused_sepconv import replace_depthwise_convs, replace_separable_convs
from tests.support.third_party import segmentation_models_pytorch as smp
from tests.support.third_party import timm, torchvision

NETWORKS = {
    "timm": """
        coat_tiny coatnet_pico_rw_224 convmixer_768_32 convnext_atto convnext_atto_ols convnextv2_atto
        convformer_s18 davit_tiny edgenext_xx_small edgenext_small_rw efficientformerv2_s0 efficientnet_b0
        efficientnet_blur_b0 efficientnet_es efficientnet_lite0 efficientnetv2_rw_t efficientvit_b0
        efficientvit_m0 fbnetc_100 fbnetv3_b fastvit_t8 focalnet_tiny_srf ghostnet_050 ghostnetv2_100
        ghostnetv3_050 hardcorenas_a hgnetv2_b0 inception_next_atto lcnet_050 legacy_xception mambaout_femto
        maxvit_rmlp_pico_rw_256 mixnet_s mnasnet_small mobilenet_edgetpu_100 mobilenetv1_100 mobilenetv2_050
        mobilenetv3_small_050 mobilenetv4_conv_small_050 mobilenetv4_hybrid_medium mobileone_s0 mobilevit_xxs
        mobilevitv2_050 mvitv2_tiny pit_ti_224 pvt_v2_b0 repghostnet_050 repvit_m0_9 rexnet_100 rexnetr_200
        semnasnet_050 shvit_s1 spnasnet_100 starnet_s1 swiftformer_xs tf_efficientnet_b0 tf_efficientnet_lite0
        tf_efficientnetv2_b0 tf_mixnet_s tf_mobilenetv3_small_minimal_100 tinynet_e tiny_vit_5m_224
        twins_svt_small xception41 xception41p xception65 xcit_nano_12_p16_224
    """,
    "torchvision": """
        convnext_tiny efficientnet_b0 efficientnet_v2_s mnasnet0_5 mobilenet_v2 mobilenet_v3_large
        mobilenet_v3_small shufflenet_v2_x0_5 shufflenet_v2_x1_0 segmentation/deeplabv3_mobilenet_v3_large
        segmentation/lraspp_mobilenet_v3_large
    """,
    "smp": """
        DeepLabV3Plus/resnet18 FPN/mobilenet_v2 Unet/efficientnet-b0 Unet/xception MAnet/mobileone_s0
        Segformer/mit_b0
    """,
    "transformers": """
        ConvBert ConvNext ConvNextV2 Cvt DINOv3ConvNext EfficientNet FocalNet GLPN HGNetV2 MobileNetV1
        MobileNetV2 MobileViT MobileViTV2 PvtV2 Segformer SwiftFormer Wav2Vec2Bert Wav2Vec2Conformer
    """,
}
CASES = [(library, name) for library, names in NETWORKS.items() for name in names.split()]
OWN_CLASSES = ("Unet/efficientnet-b0", "EfficientNet")
"""Their convolutions are subclasses with a padding of their own: nothing is replaced."""


def network(library, name):
    """(the network, an input of its)"""
    size = 64
    if library == "timm":
        model = timm.create_model(name, num_classes=10)
        size = model.default_cfg["input_size"][-1] if model.default_cfg.get("fixed_input_size") else size
    elif library == "torchvision":
        kind, _, name = name.rpartition("/")
        folder = getattr(torchvision.models, kind) if kind else torchvision.models
        model = getattr(folder, name)(weights=None, **({"weights_backbone": None} if kind else {}))
    elif library == "smp":
        kind, encoder = name.split("/")
        model = getattr(smp, kind)(encoder, encoder_weights=None)
    else:
        transformers = pytest.importorskip("transformers")
        is_small = name in ("ConvBert", "Wav2Vec2Bert", "Wav2Vec2Conformer")
        few = {"num_hidden_layers": 2, "hidden_size": 96, "num_attention_heads": 4, "intermediate_size": 192}
        config = getattr(transformers, f"{name}Config")(**few if is_small else {})
        model = transformers.AutoModel.from_config(config)
        if name == "ConvBert":
            return model, torch.arange(24).view(1, 24)
        if name.startswith("Wav2"):
            return model, torch.randn(1, 4000) if name == "Wav2Vec2Conformer" else torch.randn(1, 50, 160)
    return model, torch.randn(2, 3, size, size)


def results(model, x):
    """Outputs and gradients, in evaluation."""
    outputs = [y for y in tree_leaves(model(x)) if isinstance(y, torch.Tensor) and y.requires_grad]
    sum(y.square().mean() for y in outputs).backward()
    return outputs, [parameter.grad for parameter in model.parameters()]


@pytest.mark.full
@pytest.mark.parametrize(("library", "name"), CASES, ids=[f"{library}-{name}" for library, name in CASES])
def test_a_converted_network_gives_what_it_gave(library, name):
    torch.manual_seed(0)
    theirs, x = network(library, name)
    ours = copy.deepcopy(theirs.eval())
    pairs, rest = replace_separable_convs(ours), replace_depthwise_convs(ours)
    torch.testing.assert_close(results(ours, x), results(theirs, x), rtol=1e-4, atol=1e-6)
    assert bool(pairs.replaced or rest.replaced) != (name in OWN_CLASSES)
