"""What of an image and its mask decides which noise it gets, and how much of it where."""

import functools

import numpy as np
import torch
import torch.nn.functional as F

from .processing_unseg import FullSizeNoise

GREY = 3 / 255  # of an image's range, between its channels
LOW, LOW_IN_GREY = 0.8, 2  # waves: of less height they say little, and in images without colour
LOW_OF_MANY, MANY = 2.5, 8  # waves, and so many parts: what cells are like under a microscope, and hardly any photo
SMALL_BUDGET = 6 / 255  # of an image's range: what is below is small
LEAST_SPREAD = 4 / 255  # of an image's range: colours that vary less hide a tint no less
CLEARLY = 1.1  # times as far
TEXTURE_CELLS = 48  # down an image and across it
TEXTURED = 6 / 255  # deviation of grey from a plane, of its range, from which noise is hidden
SMOOTH = 1 / 3  # of that, up to which it shows
SPARED = 1 / 4  # of a region, the most that may have less texture than TEXTURED and get less noise


def needs_tint(pixels: np.ndarray, region: np.ndarray, wave: float) -> bool:
    """Whether a tint says more than waves: the region is lower than [`LOW`] waves, [`LOW_IN_GREY`] without colour, or
    [`LOW_OF_MANY`] if it has [`MANY`] parts or more, less their holes.

    The images of a data set should all get the same noise: from a few that do not, a model learns what objects look
    like, as from clean ones. So the limits are such that photographs hardly ever get a tint, and cells nearly always.

    Args:
        pixels: `(height, width, 3)` uint8 or uint16.
        region: `(height, width)` bool.
        wave: height of a wave in pixels.
    """
    waves = typical_height(region) / wave
    return (
        waves < LOW
        or (waves < LOW_IN_GREY and without_colour(pixels))
        or (waves < LOW_OF_MANY and parts_less_holes(region) >= MANY)
    )


def standing_out(pixels: np.ndarray, tints: np.ndarray) -> int:
    """Index of the tint that is least like an image's own colours: the first, unless another is 1.1 times as far out.

    How far out is Mahalanobis' distance, given how the image's pixels vary: in a retina, whose pixels differ in how
    red they are, red is not far.

    Args:
        pixels: `(height, width, 3)` uint8 or uint16.
        tints: `(tints, 3)`, changes of red, green and blue, all in one unit.
    """
    few = _thinned(pixels).reshape(-1, 3) / np.iinfo(pixels.dtype).max
    spread = np.cov(few, rowvar=False, bias=True) + LEAST_SPREAD**2 * np.eye(3)
    squares = np.einsum("tc,cd,td->t", tints, np.linalg.inv(spread), tints)
    return 0 if squares.max() < CLEARLY**2 * squares[0] else int(squares.argmax())


def ceiling_of(pixels: np.ndarray, region: np.ndarray, epsilon: float, epsilon_smooth: float) -> FullSizeNoise | None:
    """The largest change that hides in each part of an image: `epsilon_smooth` where it is smooth, `epsilon` where its
    texture covers that much; `(height, width, 1)`, in parts, as shares of the pixel range.

    None, for `epsilon` everywhere, if more than a quarter of the region is smooth: of a road or a wall that is less
    noise in most of it, and models learn from such images what they look like.

    Args:
        pixels: `(height, width, channels)` uint8 or uint16.
        region: `(height, width)` bool.
        epsilon, epsilon_smooth: shares of the pixel range, the second below the first.
    """
    rough = texture(pixels)
    few = _thinned(region)
    few = few if few.any() else region  # thin lines may lie between
    covered = F.adaptive_avg_pool2d(torch.from_numpy(few.astype(np.float32))[None], rough.shape)[0].numpy()
    if (rough[covered >= min(0.5, covered.max())] < TEXTURED).mean() > SPARED:
        return None
    share = ((rough / TEXTURED - SMOOTH) / (1 - SMOOTH)).clip(0, 1)
    largest = (1 - share) * epsilon_smooth + share * epsilon
    return FullSizeNoise(largest[..., None].astype(np.float32), [(largest.shape, pixels.shape[:2])])


def texture(pixels: np.ndarray) -> np.ndarray:
    """How rough an image is: in each of 48 x 48 cells, of 4 pixels at least, and its neighbours the standard deviation
    of its grey from a plane (the root of the mean variance): the slopes of shading hide no noise.

    Args:
        pixels: `(height, width, channels)` uint8 or uint16.

    Returns:
        `(rows, columns)` float64, as shares of the pixel range.
    """
    # In float32 the differences below would leave a texture to what is flat.
    grey = torch.from_numpy(_thinned(pixels).mean(axis=2, dtype=np.float64) / np.iinfo(pixels.dtype).max)
    cells = [max(1, min(TEXTURE_CELLS, side // 4)) for side in grey.shape]

    def mean(values: torch.Tensor) -> torch.Tensor:
        return F.adaptive_avg_pool2d(values.expand(1, *grey.shape), cells)

    level = mean(grey)
    variance = mean(grey**2) - level**2
    # A plane fits best whose two slopes do: over a rectangle they have nothing to do with each other.
    rows, columns = (torch.arange(side, dtype=grey.dtype, device=grey.device) for side in grey.shape)
    for places in (rows[:, None], columns):
        place = mean(places)
        covariance = mean(grey * places) - level * place
        variance -= covariance**2 / (mean(places**2) - place**2).clamp(min=1e-9)
    variance = variance.clamp(min=0)[None]
    return F.avg_pool2d(variance, 3, stride=1, padding=1, count_include_pad=False).sqrt()[0, 0].numpy()


def typical_height(region: np.ndarray) -> float:
    """Median length of the vertical runs of a `(height, width)` bool region, weighted by their pixels; infinite if
    empty."""
    # Runs begin and end where a column, with nothing before and after it, changes.
    changes = np.flatnonzero(np.diff(np.pad(region.T, ((0, 0), (1, 1))), axis=1))
    runs = np.sort(changes[1::2] - changes[::2])
    return float(runs[np.searchsorted(np.cumsum(runs), runs.sum() / 2)]) if len(runs) else float("inf")


def parts_less_holes(region: np.ndarray) -> int:
    """Euler's number of a `(height, width)` bool region whose pixels hang together at corners, too, counted from the
    windows of 2 x 2 pixels (Gray, "Local properties of binary images in two dimensions", 1971)."""
    around = np.pad(_thinned(region), 1).view(np.uint8)
    above, below = around[:-1], around[1:]
    inside = above[:, :-1] + above[:, 1:] + below[:, :-1] + below[:, 1:]
    diagonal = (inside == 2) & (above[:, :-1] == below[:, 1:])
    corners = np.count_nonzero(inside == 1) - np.count_nonzero(inside == 3)
    return (corners - 2 * np.count_nonzero(diagonal)) // 4


def without_colour(pixels: np.ndarray) -> bool:
    """Whether an image of three channels, `(height, width, channels)` uint8 or uint16, is grey all the same.

    Its channels differ by less than [`GREY`] on average: what JPEG leaves of an image that was grey. An image of one
    channel is not: nothing can be told from its colour.
    """
    if pixels.shape[2] < 3:
        return False
    # numpy's own maximum over a last axis of three takes ten times as long.
    few = np.moveaxis(_thinned(pixels), 2, 0)
    spread = functools.reduce(np.maximum, few) - functools.reduce(np.minimum, few)
    return float(spread.mean()) < GREY * np.iinfo(pixels.dtype).max


def _thinned(pixels: np.ndarray) -> np.ndarray:
    """At most 512 rows and columns of an image, which tell its colours as well as all do."""
    height, width = pixels.shape[:2]
    return pixels[:: 1 + height // 512, :: 1 + width // 512]
