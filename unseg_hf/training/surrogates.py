"""Surrogate segmenters: what the generator's noise is trained against."""

import torch
from torch import nn
from transformers import SamConfig, SamModel

from ..evaluation.victims import UNet


class SamSurrogate(nn.Module):
    """SAM's architecture from scratch, prompted, as in UnSeg; one mask a prompt.

    Args:
        config: sizes; `image_size` of `vision_config` may differ from the generator's.
        prompt_size: side of the square whose pixels the prompts count, the generator's input.
    """

    def __init__(self, config: SamConfig, prompt_size: int):
        super().__init__()
        self.prompt_size = prompt_size
        self.sam = SamModel(config)
        # Read, but outside the surrogate's loss: left trainable, they would be unused parameters under DDP.
        self.sam.mask_decoder.iou_prediction_head.requires_grad_(False)
        self.sam.shared_image_embedding.requires_grad_(False)

    def forward(self, images: torch.Tensor, prompts: dict[str, torch.Tensor]) -> torch.Tensor:
        """`(batch, 3, h, w)` normalised images to logits `(batch, h', w')`; prompts in pixels of `prompt_size`."""
        size = self.sam.config.vision_config.image_size
        factor = size / self.prompt_size
        prompts = {k: v * factor if k in ("input_points", "input_boxes") else v for k, v in prompts.items()}
        masks = prompts.pop("input_masks", None)
        if masks is not None:
            side = 4 * self.sam.config.prompt_encoder_config.image_embedding_size
            masks = nn.functional.interpolate(masks, (side, side), mode="area") * 255
        return self.sam(_resized(images, size), input_masks=masks, multimask_output=False, **prompts).pred_masks[
            :, 0, 0
        ]


class UNetSurrogate(nn.Module):
    """A small U-Net that sees no prompt: what it knows of the mask, it reads from the picture or the noise.

    Args:
        width: channels at full resolution.
        image_size: the square that images are resized to, a multiple of 16.
    """

    def __init__(self, width: int, image_size: int):
        super().__init__()
        self.unet, self.image_size = UNet(num_classes=1, width=width), image_size

    def forward(self, images: torch.Tensor, prompts: dict[str, torch.Tensor]) -> torch.Tensor:
        """`(batch, 3, h, w)` normalised images to logits `(batch, h', w')`; the prompts are not looked at."""
        return self.unet(_resized(images, self.image_size))[:, 0]


def _resized(images: torch.Tensor, size: int) -> torch.Tensor:
    return nn.functional.interpolate(images, (size, size), mode="bilinear", align_corners=False, antialias=True)
