"""Victims: the segmentation models that somebody else trains on the published images, and their test."""

from __future__ import annotations

from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import nn

SIZE_MULTIPLE = 16
"""The U-Net halves its input four times: once in its first convolution, three times by pooling."""


def _two_convolutions(in_channels: int, out_channels: int, stride: int = 1) -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(in_channels, out_channels, 3, stride=stride, padding=1, bias=False),
        nn.BatchNorm2d(out_channels),
        nn.ReLU(inplace=True),
        nn.Conv2d(out_channels, out_channels, 3, padding=1, bias=False),
        nn.BatchNorm2d(out_channels),
        nn.ReLU(inplace=True),
    )


class UNet(nn.Module):
    """A plain U-Net with batch norm and no pretrained weights, which works at half the size of its input.

    Half size because it costs a quarter of the time, and an evaluation is made of many victims. Channels are
    `width` at half size to `8 * width` at a sixteenth; the logits are enlarged to the size of the input.

    Args:
        num_classes: classes the model tells apart, background included.
        in_channels: channels of the images.
        width: channels at half size.
    """

    def __init__(self, num_classes: int, in_channels: int = 3, width: int = 16) -> None:
        super().__init__()
        widths = [width * 2**level for level in range(4)]
        self.stem = _two_convolutions(in_channels, width, stride=2)
        self.down = nn.ModuleList(_two_convolutions(shallow, deep) for shallow, deep in pairwise(widths))
        pairs = list(pairwise(reversed(widths)))
        self.upsample = nn.ModuleList(nn.ConvTranspose2d(deep, shallow, 2, stride=2) for deep, shallow in pairs)
        self.up = nn.ModuleList(_two_convolutions(2 * shallow, shallow) for _, shallow in pairs)
        self.classify = nn.Conv2d(width, num_classes, 1)

    def forward(self, pixel_values: torch.Tensor) -> torch.Tensor:
        """Segment images.

        Args:
            pixel_values: shape `(batch, in_channels, height, width)`, float in [-1, 1]; height and width are
                multiples of 16.

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
        return F.interpolate(self.classify(hidden), scale_factor=2, mode="bilinear")


def train_victim(
    images: torch.Tensor,
    masks: torch.Tensor,
    *,
    epochs: int,
    batch_size: int,
    lr: float,
    seed: int,
    device: str | torch.device = "cpu",
    num_classes: int = 2,
    width: int = 16,
    bf16: bool = False,
) -> UNet:
    """Train a U-Net from scratch: Adam, cosine decay to zero, cross-entropy, horizontal flips and nothing else.

    The same seed gives the same weights, bit by bit, on a CPU with the same number of threads. The global random
    number generators are left as they were found.

    Args:
        images: shape `(count, 3, size, size)`, uint8 in [0, 255]; `size` is a multiple of 16.
        masks: class ids, shape `(count, size, size)`, int64 in [0, num_classes - 1], or 255 for pixels to ignore.
        epochs: passes over the images.
        batch_size: images a step; the last batch of an epoch may be smaller.
        lr: highest learning rate.
        seed: seed of the initial weights, the order of the images and the flips.
        device: where to train.
        num_classes: classes, background included.
        width: channels of the U-Net at half size.
        bf16: run the forward pass in bfloat16 autocast; slower on CPUs without bfloat16 instructions.

    Returns:
        The trained model, on `device`, in evaluation mode.

    Raises:
        ValueError: the shapes of images and masks do not fit, or the size is no multiple of 16.
    """
    _check_images_and_masks(images, masks)
    device = torch.device(device)
    # Layers draw their initial weights from the global CPU generator, and torch.manual_seed would reseed the
    # accelerators as well, which fork_rng(devices=[]) does not restore.
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)
        model = UNet(num_classes, images.shape[1], width)
    model = model.to(device, memory_format=torch.channels_last).train()
    optimizer = torch.optim.Adam(model.parameters(), lr=lr)
    steps_per_epoch = -(-len(images) // batch_size)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=epochs * steps_per_epoch)
    generator = torch.Generator().manual_seed(seed)
    for _ in range(epochs):
        for batch in torch.randperm(len(images), generator=generator).split(batch_size):
            flip = torch.rand(len(batch), generator=generator) < 0.5
            pixels = torch.where(flip[:, None, None, None], images[batch].flip(-1), images[batch])
            target = torch.where(flip[:, None, None], masks[batch].flip(-1), masks[batch])
            with torch.autocast(device.type, dtype=torch.bfloat16, enabled=bf16):
                logits = model(_pixel_values(pixels, device))
            loss = F.cross_entropy(logits.float(), target.to(device), ignore_index=255)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
    return model.eval()


@torch.no_grad()
def foreground_iou(model: nn.Module, images: torch.Tensor, masks: torch.Tensor, batch_size: int = 64) -> float:
    """Test a two-class victim: the IoU of class 1 over the whole test set.

    Data-set level: the sum of the intersections over the sum of the unions, so that an image counts by the
    size of its object.

    Args:
        model: maps pixel values in [-1, 1] to logits of shape `(batch, 2, size, size)`, as [`UNet`] does.
        images: clean test images, shape `(count, 3, size, size)`, uint8 in [0, 255].
        masks: shape `(count, size, size)`, int64: 1 = foreground, 0 = background, 255 = not counted.
        batch_size: images a forward pass; changes nothing but memory.

    Returns:
        IoU in [0, 1].

    Raises:
        ValueError: the shapes do not fit, or no mask has a foreground pixel.
    """
    from .metrics import SemanticSegmentation  # `evaluate` takes seconds to import, and training needs none of it

    _check_images_and_masks(images, masks)
    if not (masks == 1).any():
        raise ValueError("no test mask has a foreground pixel (value 1), so IoU says nothing; test on other images")
    device = next(model.parameters()).device
    was_training = model.training
    model.eval()
    metric = SemanticSegmentation(num_classes=2)
    for start in range(0, len(images), batch_size):
        logits = model(_pixel_values(images[start : start + batch_size], device))
        metric.add_batch(predictions=logits.argmax(1).cpu(), references=masks[start : start + batch_size])
    model.train(was_training)
    return metric.compute()["foreground_iou"]


def _pixel_values(images: torch.Tensor, device: torch.device) -> torch.Tensor:
    return images.to(device, memory_format=torch.channels_last).float() / 127.5 - 1


def _check_images_and_masks(images: torch.Tensor, masks: torch.Tensor) -> None:
    if images.ndim != 4 or images.dtype != torch.uint8:
        raise ValueError(f"images are {images.dtype} {tuple(images.shape)}; pass uint8 (count, 3, size, size)")
    if masks.shape != (len(images), *images.shape[2:]) or masks.dtype != torch.int64:
        raise ValueError(
            f"masks are {masks.dtype} {tuple(masks.shape)}; pass int64 {(len(images), *images.shape[2:])}, "
            "one mask for each image"
        )
    if images.shape[2] % SIZE_MULTIPLE or images.shape[3] % SIZE_MULTIPLE:
        raise ValueError(f"images are {tuple(images.shape[2:])} pixels; resize them to a multiple of {SIZE_MULTIPLE}")
