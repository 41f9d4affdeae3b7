"""A plain U-Net, from scratch: a victim of the audit, and a surrogate of the generator's training."""

from __future__ import annotations

from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import nn

SIZE_MULTIPLE = 16
"""What the side of the images must be a multiple of by default: a strided convolution and three poolings halve it."""


def two_convolutions(in_channels: int, out_channels: int, stride: int = 1) -> nn.Sequential:
    """3 x 3 convolution, batch norm and ReLU, twice; the first with a stride."""
    return nn.Sequential(
        nn.Conv2d(in_channels, out_channels, 3, stride=stride, padding=1, bias=False),
        nn.BatchNorm2d(out_channels),
        nn.ReLU(inplace=True),
        nn.Conv2d(out_channels, out_channels, 3, padding=1, bias=False),
        nn.BatchNorm2d(out_channels),
        nn.ReLU(inplace=True),
    )


class UNet(nn.Module):
    """A U-Net (Ronneberger et al., MICCAI 2015) with batch norm, padded convolutions and no pretrained weights.

    By default it works at half the size of its input, which costs a quarter of the time, and with three poolings.
    The architecture of the paper has `width=64, stem_stride=1, poolings=4`. Channels are `width` at the highest
    resolution and double with each pooling; the logits are enlarged to the size of the input.

    Args:
        num_classes: classes the model tells apart, background included.
        width: channels at the highest resolution.
        stem_stride: 2 to work at half the size of the input, 1 to work at its full size.
        poolings: how often the features are halved after that.
    """

    def __init__(self, num_classes: int, width: int = 16, stem_stride: int = 2, poolings: int = 3) -> None:
        super().__init__()
        widths = [width * 2**level for level in range(poolings + 1)]
        self.stem_stride = stem_stride
        self.stem = two_convolutions(3, width, stride=stem_stride)
        self.down = nn.ModuleList(two_convolutions(shallow, deep) for shallow, deep in pairwise(widths))
        pairs = list(pairwise(reversed(widths)))
        self.upsample = nn.ModuleList(nn.ConvTranspose2d(deep, shallow, 2, stride=2) for deep, shallow in pairs)
        self.up = nn.ModuleList(two_convolutions(2 * shallow, shallow) for _, shallow in pairs)
        self.classify = nn.Conv2d(width, num_classes, 1)

    def forward(self, pixel_values: torch.Tensor) -> torch.Tensor:
        """Segment images.

        Args:
            pixel_values: shape `(batch, 3, height, width)`, float around 0; height and width are
                multiples of `stem_stride * 2**poolings`: 16 by default, 8 with `stem_stride=1`.

        Returns:
            Class logits, shape `(batch, num_classes, height, width)`.
        """
        skips = []
        hidden = self.stem(pixel_values)
        for block in self.down:
            skips.append(hidden)
            hidden = block(F.max_pool2d(hidden, 2))
        for upsample, block in zip(self.upsample, self.up, strict=True):
            hidden = block(torch.cat([upsample(hidden), skips.pop()], dim=1))
        logits = self.classify(hidden)
        if self.stem_stride == 1:
            return logits
        return F.interpolate(logits, scale_factor=self.stem_stride, mode="bilinear")
