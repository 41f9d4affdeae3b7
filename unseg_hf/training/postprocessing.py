"""Differentiable versions of what happens to published images, sampled between noise and surrogate.

Published unlearnable noises mostly die under recompression, resizing or greyscale (Image Shortcut Squeezing, ICML
2023); a generator that meets them in training has to find noise that lives through them.
"""

import torch
import torch.nn.functional as F


def random_postprocess(images: torch.Tensor, probability: float, generator: torch.Generator) -> torch.Tensor:
    """Greyscale, resizing, blur and JPEG, each or not, in the order in which they happen to a picture.

    Args:
        images: `(batch, 3, height, width)` float in [0, 1], sides multiples of 32.
        probability: of each of them; the whole batch gets the same.
        generator: the source of randomness, on the CPU.

    Returns:
        `(batch, 3, h, w)` in [0, 1]; smaller after a resize, sides multiples of 32.
    """
    for treatment in (greyscale, resize, blur, jpeg):
        chance, strength = torch.rand(2, generator=generator).tolist()
        if chance < probability:
            images = treatment(images, strength)
    return images


def jpeg(images: torch.Tensor, strength: float) -> torch.Tensor:
    """JPEG of quality 95 (strength 0) down to 40 (strength 1)."""
    from kornia.enhance import jpeg_codec_differentiable

    quality = torch.tensor([95 - 55 * strength], device=images.device)
    return jpeg_codec_differentiable(images.float(), quality).clamp(0, 1)


def resize(images: torch.Tensor, strength: float) -> torch.Tensor:
    """Antialiased reduction to between 1 (strength 0) and 3/8 (strength 1) of the size."""
    size = [max(32, round(side * (1 - 0.625 * strength) / 32) * 32) for side in images.shape[-2:]]
    return F.interpolate(images, size, mode="bilinear", align_corners=False, antialias=True).clamp(0, 1)


def blur(images: torch.Tensor, strength: float) -> torch.Tensor:
    """Gaussian blur with a standard deviation of 0.5 to 2 pixels."""
    from kornia.filters import gaussian_blur2d

    sigma = 0.5 + 1.5 * strength
    return gaussian_blur2d(images, (13, 13), (sigma, sigma))


def greyscale(images: torch.Tensor, strength: float = 1.0) -> torch.Tensor:
    """Luma (ITU-R BT.601, as Pillow's "L") in all three channels, whatever the strength."""
    weights = images.new_tensor([0.299, 0.587, 0.114]).view(1, 3, 1, 1)
    return (images * weights).sum(1, keepdim=True).expand_as(images)
