"""JPEG that keeps a protected picture's bound after decoding as well as JPEG can, and says what is lost."""

from dataclasses import dataclass, replace

import numpy as np

from unseg_hf.image_files import Picture, encode, read
from unseg_hf.inspection import share_left
from unseg_hf.protection import Protected, whole_levels

INSIDE = 1
"""Grey levels between the bound and what the encoder gets: even at quality 100 rounding moves pixels by as much."""
ROUNDS = 2
"""Times that what was decoded is clipped and encoded again; each lowers the share over the bound, and the noise."""


@dataclass(frozen=True, eq=False)
class BoundedJpeg:
    """An encoded picture and its costs.

    Args:
        data: the file.
        picture: as decoded from it.
        over_share: share of pixels, in [0, 1], of which a channel is over the bound.
        over_levels: largest excess over the bound, in grey levels of 255.
        noise_left: share of the noise that is left, as `share_left` measures it; None where there was no noise.
    """

    data: bytes
    picture: Picture
    over_share: float
    over_levels: int
    noise_left: float | None


def encode_within_bound(protected: Protected, quality: int) -> BoundedJpeg:
    """Encode a protected picture so that few decoded pixels leave the bound, at 4:4:4.

    The picture is pulled a level inside the bound, encoded and decoded; what left the bound is clipped to it and
    encoded again, and the version with the fewest pixels over the bound is kept.

    Args:
        protected: of 8-bit pixels without transparency.
        quality: of the JPEG, 1 to 100.

    Raises:
        ImageFileError: JPEG cannot hold the picture.
    """
    original = protected.original.pixels.astype(np.int16)
    inside, outside = whole_levels(255, protected.epsilon, protected.epsilon_background)
    budget = np.where(protected.region, inside, outside).astype(np.int16)[:, :, None]
    inner = np.maximum(budget - INSIDE, 0)
    candidate, best = protected.picture.pixels.astype(np.int16), None
    for _ in range(1 + ROUNDS):
        candidate = np.clip(np.clip(candidate, original - inner, original + inner), 0, 255)
        data = encode(protected.picture.with_pixels(candidate.astype(np.uint8)), "jpeg", quality)
        decoded = read(data)
        candidate = decoded.pixels.astype(np.int16)
        over = (np.abs(candidate - original) - budget).max(axis=2)
        if best is None or (over > 0).mean() < best.over_share:
            best = BoundedJpeg(data, decoded, float((over > 0).mean()), max(0, int(over.max())), None)
    clean = read(encode(protected.original, "jpeg", quality)).rgb8()
    left = share_left(protected.original, protected.picture, clean, best.picture.rgb8())
    return replace(best, noise_left=left)
