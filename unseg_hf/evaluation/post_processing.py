"""What happens to published images on their way to a training set: web sites resize, recompress and convert them."""

from __future__ import annotations

import io
from collections.abc import Callable
from functools import partial, reduce

import numpy as np
from numpy.lib.stride_tricks import sliding_window_view
from PIL import Image

PostProcessing = Callable[[Image.Image], Image.Image]


def jpeg(image: Image.Image, quality: int) -> Image.Image:
    """Encode and decode an RGB image as Pillow's JPEG (its default chroma subsampling), quality in [1, 95]."""
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", quality=quality)
    return Image.open(buffer).convert("RGB")


def half(image: Image.Image) -> Image.Image:
    """Resize an RGB image to half its width and height, rounded up, with antialiased bilinear interpolation."""
    return image.resize(((image.width + 1) // 2, (image.height + 1) // 2), Image.Resampling.BILINEAR)


def blur(image: Image.Image, sigma: float) -> Image.Image:
    """Blur an RGB image with a Gaussian of a standard deviation of `sigma` pixels, continued by its edge pixels."""
    # Not Pillow's, which is three box blurs: on fine noise it is off by several grey levels, the size of the noise.
    radius = round(4 * sigma)
    weights = np.exp(-0.5 * (np.arange(-radius, radius + 1) / sigma) ** 2).astype(np.float32)
    weights /= weights.sum()
    pixels = np.asarray(image, np.float32)
    for axis in (0, 1):
        margins = [(radius, radius) if axis == padded else (0, 0) for padded in range(3)]
        pixels = sliding_window_view(np.pad(pixels, margins, mode="edge"), len(weights), axis=axis) @ weights
    return Image.fromarray(np.rint(pixels).astype(np.uint8))


def greyscale(image: Image.Image) -> Image.Image:
    """Replace an RGB image's three channels by its luma, 0.299 R + 0.587 G + 0.114 B (ITU-R BT.601)."""
    return image.convert("L").convert("RGB")


def bit_depth(image: Image.Image, bits: int) -> Image.Image:
    """Round each channel of an RGB image to 2 ** `bits` equally spaced levels from 0 to 255, `bits` in [1, 8]."""
    highest = 2**bits - 1
    levels = np.rint(np.rint(np.arange(256) * highest / 255) * 255 / highest).astype(int).tolist()
    return image.point(levels * 3)


_SINGLE: dict[str, PostProcessing] = {
    "none": lambda image: image,
    "jpeg75": partial(jpeg, quality=75),
    "jpeg50": partial(jpeg, quality=50),
    "half": half,
    "blur1.5": partial(blur, sigma=1.5),
    "greyscale": greyscale,
    "5bit": partial(bit_depth, bits=5),
}


def _one_after_another(name: str) -> PostProcessing:
    steps = [_SINGLE[step] for step in name.split("+")]
    return lambda image: reduce(lambda done, step: step(done), steps, image)


POST_PROCESSINGS: dict[str, PostProcessing] = _SINGLE | {
    name: _one_after_another(name) for name in ("half+jpeg75", "greyscale+jpeg75")
}
"""Name of each post-processing -> function from RGB image to RGB image, which may be smaller (`half`).

In a combined name the steps stand in the order in which they happen. That greyscale, JPEG and a lower bit depth undo
most unlearnable noises is known from Liu et al., "Image Shortcut Squeezing", ICML 2023.
"""
