"""How far a protected picture is from its original."""

import functools
from collections.abc import Iterator

import numpy as np
import torch
import torch.nn.functional as F

from .image_files import Picture

STRIP = 2**16  # pixels of a large photo that are worked on at a time


def max_noise(original: np.ndarray, protected: np.ndarray, region: np.ndarray) -> tuple[int, int]:
    """Largest absolute difference inside and outside a region, in steps of the pixels' own range."""
    largest = [0, 0]
    for part in strips(original):
        a, b = original[part], protected[part]
        difference = np.maximum(a, b) - np.minimum(a, b)
        # numpy's own maximum over a last axis of three takes ten times as long.
        most = functools.reduce(np.maximum, (difference[:, :, channel] for channel in range(difference.shape[2])))
        for i, where in enumerate((region[part], ~region[part])):
            largest[i] = max(largest[i], int((most * where).max(initial=0)))
    return largest[0], largest[1]


def noise_levels(original: Picture, protected: Picture, region: np.ndarray) -> dict[str, float]:
    """`max_noise` and `max_noise_background`: the largest change inside and outside a region, in levels of 255."""
    inside, outside = max_noise(original.pixels, protected.pixels, region)
    scale = 255 / original.max_value
    return {"max_noise": inside * scale, "max_noise_background": outside * scale}


def compare(original: Picture, protected: Picture, region: np.ndarray) -> dict[str, float | None]:
    """What `noise_levels` says, `psnr` in dB (None for equal pictures), and `ssim`."""
    pixels = original.pixels, protected.pixels, original.max_value
    return {**noise_levels(original, protected, region), "psnr": psnr(*pixels), "ssim": ssim(*pixels)}


def psnr(original: np.ndarray, protected: np.ndarray, max_value: int = 255) -> float | None:
    """In dB, of two arrays of one shape in [0, max_value]; None if they are equal."""
    squares, scale = 0.0, np.float32(255 / max_value)
    for part in strips(original):
        difference = (original[part].astype(np.float32) - protected[part]) * scale
        squares += float(np.square(difference).sum(dtype=np.float64))
    return None if squares == 0 else float(10 * np.log10(255**2 * original.size / squares))


def ssim(original: np.ndarray, protected: np.ndarray, max_value: int = 255) -> float:
    """SSIM of two `(height, width, channels)` arrays in [0, max_value].

    The mean over pixels and channels, with a Gaussian window of 11 pixels and sigma 1.5; pictures end in reflections.
    """
    scale = 255 / max_value
    # The window must fit; smaller pictures are continued at their edges.
    short = [(0, max(0, 11 - side)) for side in original.shape[:2]]
    pictures = [
        np.pad(p, (*short, (0, 0)), mode="edge") if short != [(0, 0)] * 2 else p for p in (original, protected)
    ]
    height, width, channels = pictures[0].shape
    # torchmetrics has the same figure, but not the window as a column and a row, which is six times faster.
    window = torch.exp(-0.5 * ((torch.arange(11, dtype=torch.float32, device="cpu") - 5) / 1.5) ** 2)
    window = (window / window.sum()).expand(4 * channels, 1, 1, 11)
    total, step = 0.0, max(1, STRIP // width)
    for start in range(0, height, step):
        end = min(start + step, height)
        # With the five rows around them that their windows reach.
        rows = slice(max(0, start - 5), min(height, end + 5))
        a, b = (
            F.pad(
                torch.from_numpy(p[rows].astype(np.float32)).permute(2, 0, 1)[None].contiguous() * scale - 128,
                (5, 5, 5 - (start - rows.start), 5 - (rows.stop - end)),
                mode="reflect",
            )
            for p in pictures
        )
        maps = torch.cat([a, b, a * a + b * b, a * b], dim=1)
        maps = F.conv2d(F.conv2d(maps, window.mT, groups=4 * channels), window, groups=4 * channels)
        mean_a, mean_b, squares, products = maps[0].unflatten(0, (4, channels))
        variances = (squares - mean_a**2 - mean_b**2).clamp(min=0)
        covariance = products - mean_a * mean_b
        # Around 128 the squares above keep digits that they would lose around 0.
        mean_a, mean_b = mean_a + 128, mean_b + 128
        c1, c2 = (0.01 * 255) ** 2, (0.03 * 255) ** 2
        similarity = (2 * mean_a * mean_b + c1) * (2 * covariance + c2)
        similarity /= (mean_a**2 + mean_b**2 + c1) * (variances + c2)
        total += similarity.sum(dtype=torch.float64).item()
    return min(1.0, total / pictures[0].size)  # float32 may round equal pictures to more


def strips(pixels: np.ndarray) -> Iterator[slice]:
    """Rows of a `(height, width, ...)` array, few at a time: float copies of a large photo take many times its memory,
    and those of a strip stay in the processor's cache."""
    rows = max(1, STRIP // pixels.shape[1])
    return (slice(start, min(start + rows, len(pixels))) for start in range(0, len(pixels), rows))
