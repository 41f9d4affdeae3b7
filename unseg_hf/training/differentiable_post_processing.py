"""Differentiable versions of what happens to published images, sampled between noise and surrogate.

Published unlearnable noises mostly die under recompression, resizing or greyscale (Image Shortcut Squeezing, ICML
2023); a generator that meets them in training has to find noise that lives through them.
"""

from collections.abc import Collection

import torch
import torch.nn.functional as F

from ..evaluation.augmentation import greyscale

POSTPROCESSINGS = ("greyscale", "crop", "resize", "blur", "bit_depth", "jpeg")
"""All kinds, in the order in which they happen to a picture."""


def random_postprocess(
    images: torch.Tensor,
    masks: torch.Tensor,
    kinds: Collection[str],
    probability: float,
    generator: torch.Generator,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Each of `kinds`, or not, in the order of `POSTPROCESSINGS`.

    The same numbers are drawn whatever the kinds and the probability, so that neither changes what happens to the
    others, nor what is drawn after this call.

    Args:
        images: `(batch, 3, height, width)` float in [0, 1], sides multiples of 32.
        masks: `(batch, height, width)`, 0 or 1.
        kinds: from `POSTPROCESSINGS`.
        probability: of each of them, 0 to 1; the whole batch gets the same.
        generator: the source of randomness, on the CPU.

    Returns:
        Images `(batch, 3, h, w)` in [0, 1], smaller after a resize, sides multiples of 32; and masks `(batch, height,
        width)`, which follow a crop and nothing else. The arguments themselves where nothing happens.
    """
    draws = torch.rand(len(POSTPROCESSINGS), 2, generator=generator).tolist()
    treatments = {"resize": resize, "blur": blur, "bit_depth": bit_depth, "jpeg": jpeg}
    treatments["greyscale"] = lambda images, _: greyscale(images)
    # Where a crop lies takes more numbers: they come from a source of their own.
    place = torch.Generator().manual_seed(int(torch.randint(2**31, (), generator=generator)))
    for kind, (chance, strength) in zip(POSTPROCESSINGS, draws, strict=True):
        if kind not in kinds or chance >= probability:
            continue
        if kind == "crop":
            images, masks = crop(images, masks, strength, place)
        else:
            images = treatments[kind](images, strength)
    return images, masks


def jpeg(images: torch.Tensor, strength: float) -> torch.Tensor:
    """JPEG of quality 95 (strength 0) down to 40 (strength 1)."""
    from kornia.enhance import jpeg_codec_differentiable

    quality = torch.tensor([95 - 55 * strength], device=images.device)
    return jpeg_codec_differentiable(images.float(), quality).clamp(0, 1)


def bit_depth(images: torch.Tensor, strength: float) -> torch.Tensor:
    """Rounding to 6 bits (strength 0) down to 4 bits (strength 1) a channel; gradients pass as if there were none."""
    highest = 2 ** round(6 - 2 * strength) - 1
    rounded = (images * highest).round() / highest
    return images + (rounded - images).detach()


def crop(
    images: torch.Tensor, masks: torch.Tensor, strength: float, generator: torch.Generator
) -> tuple[torch.Tensor, torch.Tensor]:
    """One random box for the batch, enlarged to the size of the whole; images and masks move together.

    Args:
        images: `(batch, 3, height, width)` float in [0, 1].
        masks: `(batch, height, width)`, 0 or 1.
        strength: the box has between 1 (strength 0) and 1/2 (strength 1) of each side.
        generator: the source of randomness, on the CPU.

    Returns:
        Images and masks of the same shapes; the arguments themselves where a mask would lose its last pixel.
    """
    size = images.shape[-2:]
    box = [round(side * (1 - strength / 2)) for side in size]
    top, left = (
        int(torch.randint(side - part + 1, (), generator=generator)) for side, part in zip(size, box, strict=True)
    )
    rows, columns = slice(top, top + box[0]), slice(left, left + box[1])
    kept = masks[:, rows, columns]
    if not kept.flatten(1).any(1).all():
        return images, masks
    images = F.interpolate(
        images[:, :, rows, columns], size, mode="bilinear", align_corners=False, antialias=True
    ).clamp(0, 1)
    # "nearest-exact" has the pixel centres of the bilinear one; "nearest" is off by up to half a pixel.
    return images, F.interpolate(kept.unsqueeze(1), size, mode="nearest-exact").squeeze(1)


def resize(images: torch.Tensor, strength: float) -> torch.Tensor:
    """Antialiased reduction to between 1 (strength 0) and 3/8 (strength 1) of the size."""
    size = [max(32, round(side * (1 - 0.625 * strength) / 32) * 32) for side in images.shape[-2:]]
    return F.interpolate(images, size, mode="bilinear", align_corners=False, antialias=True).clamp(0, 1)


def blur(images: torch.Tensor, strength: float) -> torch.Tensor:
    """Gaussian blur with a standard deviation of 0.5 to 2 pixels."""
    from kornia.filters import gaussian_blur2d

    sigma = 0.5 + 1.5 * strength
    return gaussian_blur2d(images, (13, 13), (sigma, sigma))
