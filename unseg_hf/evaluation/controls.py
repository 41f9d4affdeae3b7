"""Control noises: what a learned noise has to beat on the same budget before it may claim anything."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

STRIPE_PERIOD = 16
"""Period of the `stripes` control, in pixels of the published image."""


def _random(height: int, width: int, seed: int) -> np.ndarray:
    signs = np.random.default_rng(seed).integers(0, 2, size=(height, width, 3), dtype=np.int8)
    return signs.astype(np.float32) * 2 - 1


def _stripes(height: int, width: int, seed: int) -> np.ndarray:
    rows = np.where(np.arange(height) % STRIPE_PERIOD < STRIPE_PERIOD // 2, 1, -1).astype(np.float32)
    return np.broadcast_to(rows[:, None, None], (height, width, 3)).copy()


CONTROLS: dict[str, Callable[[int, int, int], np.ndarray]] = {"random": _random, "stripes": _stripes}
"""Name of each control noise -> function of (height, width, seed)."""


def control_noise(name: str, region: np.ndarray, seed: int) -> np.ndarray:
    """Make a noise with no learning in it, at full amplitude everywhere.

    The mask enters only through the amplitude, which the caller sets with
    [`unseg_hf.protection.apply_noise`], the function that also applies the generator's noise: so a control and
    the generator spend the same budget with the same weighting.

    Args:
        name: `random` (an independent sign for each pixel and channel) or `stripes` (horizontal luminance
            stripes: a square wave down the image with a period of 16 pixels, the same in all channels and,
            whatever the seed, in all images).
        region: mask, shape `(height, width)`, bool; gives the noise its size.
        seed: seed of the noise, at least 0.

    Returns:
        Noise, shape `(height, width, 3)`, float32, every value -1 or 1.

    Raises:
        ValueError: unknown name, or a region that is not two-dimensional.
    """
    if name not in CONTROLS:
        raise ValueError(f"unknown control noise {name!r}; use one of {', '.join(CONTROLS)}")
    if region.ndim != 2:
        raise ValueError(f"region has shape {region.shape}; pass one mask of shape (height, width)")
    return CONTROLS[name](*region.shape, seed)
