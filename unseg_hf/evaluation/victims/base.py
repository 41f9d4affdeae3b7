"""What every victim is: a model that somebody else trains on the published images, whatever its task."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import nn
from transformers.image_utils import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD

FOUR_STAGES = ["stage1", "stage2", "stage3", "stage4"]
"""What transformers calls the stages of a backbone."""
TASKS = ("semantic", "instance", "panoptic", "detection", "interactive")
IGNORED = 255
"""Label of pixels that belong to no class: not learned from, not counted."""


@dataclass(frozen=True)
class Batch:
    """Square images and their annotations, all of one size.

    Args:
        images: `(batch, 3, size, size)` float in [0, 1], RGB, not normalised.
        labels: `(batch, size, size)` int64, class ids from 0, or 255 for pixels without a class.
        instances: `(batch, size, size)` int64, number of the object that a pixel belongs to, unique in its image,
            0 for pixels of no object; None where the data set has no objects.
    """

    images: torch.Tensor
    labels: torch.Tensor
    instances: torch.Tensor | None = None

    def to(self, device: torch.device | str) -> Batch:
        """The same batch on a device."""
        instances = None if self.instances is None else self.instances.to(device)
        return Batch(self.images.to(device), self.labels.to(device), instances)


@dataclass(frozen=True)
class Segments:
    """The segments of one image.

    Args:
        masks: `(segments, size, size)` bool, none of them empty.
        classes: `(segments,)` int64.
        is_thing: `(segments,)` bool: an object, not a region of stuff.
    """

    masks: torch.Tensor
    classes: torch.Tensor
    is_thing: torch.Tensor


def objects_of(labels: torch.Tensor, instances: torch.Tensor) -> Segments:
    """The objects of one image, `(size, size)` labels and instances as in [`Batch`]: a segment for each instance.

    An object's class is the commonest label of its pixels that is not 255; an object without any is left out.
    """
    masks, classes = [], []
    for number in torch.unique(instances):
        if number == 0:
            continue
        mask = instances == number
        values = labels[mask & (labels != IGNORED)]
        if len(values):
            masks.append(mask)
            classes.append(torch.bincount(values).argmax())  # `mode` is not there on all devices
    if not masks:
        empty = torch.zeros(0, dtype=torch.int64, device=labels.device)
        return Segments(torch.zeros(0, *labels.shape, dtype=torch.bool, device=labels.device), empty, empty.bool())
    classes = torch.stack(classes)
    return Segments(torch.stack(masks), classes, torch.ones_like(classes, dtype=torch.bool))


def segments_of(labels: torch.Tensor, instances: torch.Tensor) -> Segments:
    """All segments of one image: its objects, and for each class one segment of the pixels of no object."""
    things = objects_of(labels, instances)
    classes = list(torch.unique(labels[(instances == 0) & (labels != IGNORED)]))
    masks = [(labels == value) & (instances == 0) for value in classes]
    if not masks:
        return things
    classes = torch.stack(classes)
    return Segments(
        torch.cat([things.masks, torch.stack(masks)]),
        torch.cat([things.classes, classes]),
        torch.cat([things.is_thing, torch.zeros_like(classes, dtype=torch.bool)]),
    )


def boxes_of(masks: torch.Tensor) -> torch.Tensor:
    """Boxes around `(count, size, size)` bool masks, none empty: `(count, 4)` float, x0, y0, x1, y1 in pixels.

    x1 and y1 are one beyond the last pixel, so that a mask of one pixel has a box of area 1.
    """
    if not len(masks):
        return torch.zeros(0, 4, device=masks.device)
    sides = []
    for axis in (1, 2):
        occupied = masks.any(dim=axis).int()
        first = occupied.argmax(1)
        last = occupied.shape[1] - occupied.flip(1).argmax(1)
        sides.append((first, last))
    (x0, x1), (y0, y1) = sides
    return torch.stack([x0, y0, x1, y1], dim=1).float()


def ious_of(found: torch.Tensor, true: torch.Tensor) -> torch.Tensor:
    """IoU of bool masks `(..., height, width)`, which are broadcast; 0 of two that are empty."""
    return (found & true).sum((-2, -1)) / (found | true).sum((-2, -1)).clamp(min=1)


def shrunk(masks: torch.Tensor, size: tuple[int, int]) -> torch.Tensor:
    """Masks `(n, height, width)`, 0 or 1, at another size: bool, where they cover more than half of a pixel."""
    return F.interpolate(masks[:, None], size, mode="area")[:, 0] > 0.5


def normalise(images: torch.Tensor) -> torch.Tensor:
    """`(batch, 3, h, w)` in [0, 1] to what SAM's encoder and most victims see."""
    mean, std = (images.new_tensor(v).view(1, 3, 1, 1) for v in (IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD))
    return (images - mean) / std


def dice_loss(probabilities: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """`1 - (2 |p y| + 1) / (|p| + |y| + 1)` over the last dimension; one added so that two empty masks agree."""
    overlap = 2 * (probabilities * labels).sum(-1) + 1
    return 1 - overlap / (probabilities.sum(-1) + labels.sum(-1) + 1)


class Victim(nn.Module):
    """Base of the victims. Subclasses fill in `loss` and `predict`, which take images of any size they can divide.

    Attributes:
        task: one of [`TASKS`].
        size_multiple: what the side of the images must be a multiple of.
        lr: highest learning rate that suits it from scratch, for AdamW with cosine decay.
        pretrained_lr: the same from pretrained weights.
        weight_decay: of AdamW.
        max_grad_norm: where gradients are cut; None: nowhere.
    """

    task: str
    size_multiple: ClassVar[int] = 32
    lr: ClassVar[float] = 1e-3
    pretrained_lr: ClassVar[float] = 2e-4
    weight_decay: ClassVar[float] = 0.0
    max_grad_norm: ClassVar[float | None] = None

    def loss(self, batch: Batch) -> torch.Tensor:
        """The training loss of a batch, a scalar with a gradient; pixels labelled 255 do not count."""
        raise NotImplementedError

    def predict(self, batch: Batch) -> Sequence[Any]:
        """What the metric of the task takes as predictions, one for each image; annotations serve as prompts only.

        - semantic: class ids `(size, size)`, int64;
        - instance: dict of `masks` `(n, size, size)` bool, `labels` `(n,)`, `scores` `(n,)`;
        - detection: dict of `boxes` `(n, 4)` in pixels, `labels`, `scores`;
        - panoptic: `(size, size, 2)` int64, class id and segment number; 255 and 0 where nothing was found;
        - interactive: `(objects, size, size)` bool, the mask found for the box of each of the image's objects in the
          order of [`objects_of`].
        """
        raise NotImplementedError
