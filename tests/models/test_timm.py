"""timm builds, loads and takes apart our Xception as it does its own."""

import pytest
import torch

from fused_sepconv.models import Xception
from tests.support.third_party import timm

# isort: split
import fused_sepconv.timm  # noqa: F401 - registers the model, with the timm that the line above made importable


def test_timm_knows_it():
    assert "fused_xception" in timm.list_models("*xception*")
    model = timm.create_model("fused_xception", num_classes=7, in_chans=1, drop_rate=0.3, mid_activation="elu")
    assert isinstance(model, Xception)
    assert model.classifier.out_features == 7 and model.in_channels == 1 and model.dropout.p == 0.3
    assert model.entry.module1.bn1.eps == 1e-5 and model.pool_padding == "symmetric"
    config = timm.data.resolve_data_config({}, model=model)
    assert config["input_size"] == (3, 299, 299) and config["mean"] == (0.5, 0.5, 0.5)
    timm.create_model("fused_xception", num_classes=0, global_pool="")


@torch.no_grad()
def test_pretrained_weights_are_timm_s_own(tmp_path):
    theirs = timm.create_model("legacy_xception").eval()
    for module in theirs.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            module.running_mean.normal_(0, 0.1)
    torch.save(theirs.state_dict(), tmp_path / "xception.pth")
    overlay = {"file": str(tmp_path / "xception.pth")}
    ours = timm.create_model("fused_xception", pretrained=True, pretrained_cfg_overlay=overlay).eval()
    x = torch.randn(1, 3, 96, 96)
    assert (ours(x) - theirs(x)).abs().max() < 1e-5 * theirs(x).abs().max()

    features = timm.create_model(
        "fused_xception", pretrained=True, pretrained_cfg_overlay=overlay, features_only=True, out_indices=(1, 4)
    ).eval()
    assert features.feature_info.channels() == [128, 2048] and features.feature_info.reduction() == [4, 32]
    expected = theirs.forward_intermediates(x, indices=[1, 4], intermediates_only=True)
    for mine, their in zip(features(x), expected, strict=True):
        assert (mine - their).abs().max() < 1e-5 * their.abs().max()

    fewer = timm.create_model("fused_xception", pretrained=True, pretrained_cfg_overlay=overlay, num_classes=5)
    assert fewer.classifier.out_features == 5
    assert torch.equal(fewer.exit.module2.bn2.running_mean, theirs.bn4.running_mean)

    torch.save(ours.state_dict(), tmp_path / "xception.pth")
    again = timm.create_model("fused_xception", checkpoint_path=str(tmp_path / "xception.pth")).eval()
    assert torch.equal(again(x), ours(x))


def test_a_checkpoint_of_something_else_is_refused(tmp_path):
    torch.save(timm.create_model("mobilenetv3_small_050").state_dict(), tmp_path / "other.pth")
    with pytest.raises(RuntimeError, match=r"Missing key|Unexpected key"):
        timm.create_model(
            "fused_xception", pretrained=True, pretrained_cfg_overlay={"file": str(tmp_path / "other.pth")}
        )
