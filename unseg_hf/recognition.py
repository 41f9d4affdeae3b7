"""Whether an image carries a noise already, told without its original."""

from dataclasses import dataclass

import numpy as np

from .noise_choice import without_colour

LAGS = 48  # of an image's height: a step between two pixels is a quarter of one of the embedded generator's 12 waves
SIDE = 256  # rows and columns at most: they tell it as well as all do
BLOCKS = 4  # down and across what has noise, from whose differences the standard error comes
FEW = 256  # pairs of pixels that say nothing
CARRIED, SURELY = 0.3, 4  # share of a noise that its absence was hardly seen to look like; standard errors
LEAST_VARIANCE = 0.5  # in levels: what rounding alone does


@dataclass(frozen=True)
class Recognition:
    """How much of a noise an image carries: 1 all of it, 0 nothing; and the standard error of that, a rough one, which
    is too small by about a third."""

    share: float
    error: float

    @property
    def sure(self) -> bool:
        """Whether the noise is there. At 8 of 255 photographs without it had shares of -0.25 to 0.31, those with it
        mostly of 0.65 and more, after half size and JPEG 75 of 0.35 and more (`benchmarks/recognise.py`)."""
        return self.share > CARRIED and self.share > SURELY * self.error

    @property
    def unclear(self) -> bool:
        """Whether there is something that may be a little of the noise."""
        return not self.sure and self.share > SURELY * self.error


def recognise(pixels: np.ndarray, protected: np.ndarray, region: np.ndarray) -> Recognition | None:
    """How much of the noise that an image gets it has carried before.

    Generalized least squares for the noise's factor in the image: differences of pixels that lie a few rows or columns
    apart, of the image and of the noise, weighted by the inverse covariance of what the image has without the noise.
    Waves of magenta and green stand out so, for hardly anything in a photograph has such edges.

    Args:
        pixels, protected: `(height, width, 3)` uint8 or uint16, the image and what became of it.
        region: `(height, width)` bool, where the noise is looked for.

    Returns:
        None where it cannot be told: images without colour, noise without edges, or hardly any pixel of it.
    """
    if pixels.shape[2] < 3 or without_colour(pixels):
        return None
    thinned = tuple(slice(None, None, 1 + side // SIDE) for side in region.shape)
    inside, image = region[thinned], pixels[thinned].astype(np.float32)
    if not inside.any():
        return None
    noise = protected[thinned] - image
    scale = np.float32(255 / np.iinfo(pixels.dtype).max)
    image, noise = image * scale, noise * scale
    step = max(1, len(inside) // LAGS)
    products = []  # of each block
    for rows in np.array_split(np.flatnonzero(inside.any(axis=1)), BLOCKS):
        for columns in np.array_split(np.flatnonzero(inside.any(axis=0)), BLOCKS):
            if len(rows) and len(columns):
                here = np.s_[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1]
                products.append(_products(image[here], noise[here], inside[here], step))
    counts, own, mixed, square = (np.array(column) for column in zip(*products, strict=True))
    if counts.sum() < FEW or np.count_nonzero(counts) < 2:
        return None
    share = 0.0
    for _ in range(8):
        crossed = mixed.sum(0)
        left = own.sum(0) - share * (crossed + crossed.T) + share**2 * square.sum(0)
        weight = np.linalg.inv(left / counts.sum() + LEAST_VARIANCE * np.eye(3))
        found, there = (np.einsum("cd,bdc->b", weight, part) for part in (mixed, square))
        share = float(found.sum() / there.sum())
    apart = found - share * there
    blocks = np.count_nonzero(counts)
    return Recognition(share, float(np.sqrt((apart**2).sum() * blocks / (blocks - 1)) / there.sum()))


def _products(
    image: np.ndarray, noise: np.ndarray, inside: np.ndarray, step: int
) -> tuple[int, np.ndarray, np.ndarray, np.ndarray]:
    """Number of pairs of pixels whose noise differs, and sums over them, `(3, 3)`, of the products of the differences:
    of the image, of the image with the noise, and of the noise."""
    count, sums = 0, np.zeros((3, 3, 3))
    for axis in (0, 1):
        first, second = ((slice(None),) * axis + (part,) for part in (slice(step, None), slice(None, -step)))
        steps = noise[first] - noise[second]
        pairs = inside[first] & inside[second] & steps.any(axis=2)
        steps, own = steps[pairs].T, (image[first] - image[second])[pairs].T
        count += steps.shape[1]
        sums += np.stack([own @ own.T, own @ steps.T, steps @ steps.T])
    return count, *sums
