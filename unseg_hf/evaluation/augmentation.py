"""What is done to a batch before a victim learns from it: flips, strong augmentation, adversarial examples.

Everything random comes from torch's global generator, which whoever trains has seeded.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F

from unseg_hf.evaluation.victims.base import IGNORED, Batch, Victim

ROTATION = 45.0
"""Largest rotation, in degrees."""

SCALES = (0.6, 1.6)
JITTER = 0.4
"""Brightness, contrast and saturation are multiplied by 1 - JITTER to 1 + JITTER."""

HUE = 0.1
"""Largest change of the hue, in turns."""

STRONG_VERSION = 2
"""Of strong augmentation, in the keys of an audit's cells: figures of another one do not stand beside its own."""

BLUR_SIGMAS = (0.1, 2.0)
BLUR_PROBABILITY = 0.5
GREY_PROBABILITY = 0.2


def plain_augmentation(batch: Batch) -> Batch:
    """Flip half of the images left to right, with their annotations."""
    flip = (torch.rand(len(batch.images)) < 0.5).to(batch.images.device)

    def flipped(values: torch.Tensor | None) -> torch.Tensor | None:
        if values is None:
            return None
        return torch.where(flip.view(-1, *[1] * (values.ndim - 1)), values.flip(-1), values)

    return Batch(flipped(batch.images), flipped(batch.labels), flipped(batch.instances))


def strong_augmentation(batch: Batch) -> Batch:
    """Flip, rotate, scale, recolour, blur and grey images, each in a way of its own.

    Rotation to 45 degrees and scale 0.6 to 1.6 about the middle; brightness, contrast and saturation by 0.6 to 1.4 and
    hue by a tenth of a turn; half of the images are blurred (sigma 0.1 to 2 pixels), a fifth made grey.

    Returns:
        Images in [0, 1], black before they are recoloured where nothing was; labels are 255 and instances 0 there.
    """
    return _recoloured(_warped(plain_augmentation(batch)))


def _warped(batch: Batch) -> Batch:
    count, device = len(batch.images), batch.images.device
    angle = torch.empty(count).uniform_(-math.radians(ROTATION), math.radians(ROTATION))
    # As likely to shrink as to grow.
    scale = torch.empty(count).uniform_(math.log(SCALES[0]), math.log(SCALES[1])).exp()
    cos, sin, zero = angle.cos() / scale, angle.sin() / scale, torch.zeros(count)
    matrix = torch.stack([torch.stack([cos, -sin, zero], 1), torch.stack([sin, cos, zero], 1)], 1).to(device)
    grid = F.affine_grid(matrix, list(batch.images.shape), align_corners=False)

    def nearest(values: torch.Tensor, outside: int) -> torch.Tensor:
        # Outside is what grid_sample leaves at 0; float32 holds every label and object number exactly.
        shifted = (values - outside).float()[:, None]
        return F.grid_sample(shifted, grid, mode="nearest", align_corners=False)[:, 0].long() + outside

    return Batch(
        F.grid_sample(batch.images, grid, mode="bilinear", align_corners=False).clamp(0, 1),
        nearest(batch.labels, IGNORED),
        None if batch.instances is None else nearest(batch.instances, 0),
    )


def _recoloured(batch: Batch) -> Batch:
    # Kornia's plain contrast is its brightness; this one is torchvision's, about the mean of the grey image.
    from kornia.enhance import adjust_contrast_with_mean_subtraction, adjust_hue, adjust_saturation
    from kornia.filters import gaussian_blur2d

    count, device = len(batch.images), batch.images.device
    factors = torch.empty(3, count).uniform_(1 - JITTER, 1 + JITTER).to(device)
    hue = (torch.empty(count).uniform_(-HUE, HUE) * 2 * math.pi).to(device)
    sigma = torch.empty(count, 1).uniform_(*BLUR_SIGMAS).expand(count, 2).to(device)
    blurred, grey = (torch.rand(count) < p for p in (BLUR_PROBABILITY, GREY_PROBABILITY))
    images = (batch.images * factors[0].view(-1, 1, 1, 1)).clamp(0, 1)
    images = adjust_contrast_with_mean_subtraction(images, factors[1])
    images = adjust_hue(adjust_saturation(images, factors[2]), hue)
    if blurred.any():
        images[blurred] = gaussian_blur2d(images[blurred], 9, sigma[blurred])
    images[grey] = greyscale(images[grey])
    return Batch(images.clamp(0, 1), batch.labels, batch.instances)


def greyscale(images: torch.Tensor) -> torch.Tensor:
    """Luma (ITU-R BT.601, as Pillow's "L") of `(batch, 3, height, width)` in all three channels."""
    # Not kornia's, whose last bit differs: audits of before are gone on with.
    weights = images.new_tensor([0.299, 0.587, 0.114]).view(1, 3, 1, 1)
    return (images * weights).sum(1, keepdim=True).expand_as(images)


def adversarial(victim: Victim, batch: Batch, radius: float = 4 / 255) -> Batch:
    """Move images within a radius so that the victim's loss grows.

    FGSM from a random start (Wong et al., "Fast is better than free", ICLR 2020, algorithm 3: a step of 1.25 times the
    radius). The victim's parameters collect no gradients here, but its batch norms count these batches too, as in the
    authors' code.

    Args:
        victim: in training mode.
        batch: what it would have learned from.
        radius: largest change of a pixel, in [0, 1].

    Returns:
        The batch with other images, in [0, 1].
    """
    start = torch.empty_like(batch.images).uniform_(-radius, radius)
    images = (batch.images + start).clamp(0, 1).requires_grad_()
    loss = victim.loss(Batch(images, batch.labels, batch.instances))
    (gradient,) = torch.autograd.grad(loss, images)
    moved = images.detach() + 1.25 * radius * gradient.sign()
    images = moved.clamp(batch.images - radius, batch.images + radius).clamp(0, 1)
    return Batch(images, batch.labels, batch.instances)
