"""Getting rid of a noise: what somebody can do who has nothing but published images, and the public model.

Each attack is fitted to a set of published images and then applied to each of them. They are meant to be as good as a
competent person's: a protection is only as good as the best attack it was tried on.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageFilter
from torch import nn

Removal = Callable[[Image.Image], Image.Image]
Pairs = Sequence[tuple[np.ndarray, np.ndarray]]

RESIDUAL_SIGMA = 16.0
"""Image minus its blur by so many pixels is where noise is looked for: patterns of longer period stay unseen."""

RESIDUAL_CLIP = 16.0
"""Residuals are cut at so many grey levels a channel, as edges and texture would drown a noise of 8."""

CANVAS = 512
"""Pixels of the longest side in the frame of patterns that scale with the image, and the most of the other frame's."""

GAIN_SIGMA = 32.0
"""The strength of the pattern is estimated over so many pixels, as it differs inside and outside objects."""

LARGEST_GAIN = 4.0
TILE = 128
"""Side of the tiles whose mean spectrum the notch filter is made from."""

PEAK = 6.0
"""Power above the median of its neighbours from which a frequency is notched out."""

SLOWEST = 2 / TILE
"""Frequencies below, in cycles a pixel, are left alone: the image itself is strongest there."""


def fit_removal(name: str, published: Sequence[Path], pairs: Pairs | None = None) -> Removal:
    """Fit an attack to published images.

    - `mean`: the average of the images' residuals is the pattern; it is subtracted as strongly as it is found in each
      part of an image. The pattern may lie on the grid of pixels or scale with the image: the frame in which two
      halves of the images agree better is taken.
    - `notch`: frequencies at which the mean spectrum of the residuals stands out are taken out of every image.
    - `median3`, `bilateral`: filters, without any fit.
    - `denoiser`: a small residual network trained on pairs that the attacker made.

    Args:
        name: one of [`REMOVALS`].
        published: files of the published images, of any sizes.
        pairs: for `denoiser`: images that the attacker protected, and their originals, `(height, width, 3)` uint8.

    Returns:
        A function from RGB image to RGB image of the same size.

    Raises:
        ValueError: an unknown name, no images, or no pairs for `denoiser`.
    """
    if name not in REMOVALS:
        raise ValueError(f"unknown removal {name!r}; use one of {', '.join(REMOVALS)}")
    if not published:
        raise ValueError(f"{name}: no published images were given; give one at least")
    return REMOVALS[name](published, pairs)


def _read(file: Path) -> torch.Tensor:
    with Image.open(file) as image:
        return _tensor(image)


def _tensor(image: Image.Image) -> torch.Tensor:
    """`(3, height, width)` float32 in grey levels."""
    return torch.from_numpy(np.array(image.convert("RGB"))).permute(2, 0, 1).float()


_OPPONENT = torch.linalg.qr(torch.tensor([[1.0, 1, 1], [1, 0, -1], [1, -2, 1]]).T).Q.T
"""Rows: grey, red - blue, magenta - green, of length 1. In the last two images vary much less, and noise shows."""


def _opponent(pixels: torch.Tensor) -> torch.Tensor:
    return torch.einsum("oc,chw->ohw", _OPPONENT, pixels)


def _rgb(channels: torch.Tensor) -> torch.Tensor:
    return torch.einsum("oc,ohw->chw", _OPPONENT, channels)


def _image(pixels: torch.Tensor) -> Image.Image:
    return Image.fromarray(pixels.round().clamp(0, 255).byte().permute(1, 2, 0).numpy())


def _blurred(pixels: torch.Tensor, sigma: float) -> torch.Tensor:
    """Gaussian blur of `(channels, height, width)`, continued at the edges; sigma in pixels."""
    from kornia.filters import gaussian_blur2d

    return gaussian_blur2d(pixels[None], 2 * round(3 * sigma) + 1, (sigma, sigma), "replicate")[0]


def _residual(channels: torch.Tensor) -> torch.Tensor:
    """What noise is looked for in, of `(3, height, width)` opponent channels."""
    # A change of all of R, G and B is sqrt(3) times as much in the grey channel.
    largest = torch.tensor([3**0.5, 1.0, 1.0]).view(3, 1, 1) * RESIDUAL_CLIP
    return torch.clamp(channels - _blurred(channels, RESIDUAL_SIGMA), -largest, largest)


def _scaled(pixels: torch.Tensor, height: int, width: int) -> torch.Tensor:
    return F.interpolate(pixels[None], (height, width), mode="bilinear", antialias=True)[0]


def _canvas_size(height: int, width: int) -> tuple[int, int]:
    longest = max(height, width)
    return max(1, round(height * CANVAS / longest)), max(1, round(width * CANVAS / longest))


class _Average:
    """The mean of images of different sizes laid upon each other at the top left corner, in two halves."""

    def __init__(self) -> None:
        self.sums, self.counts = torch.zeros(2, 3, CANVAS, CANVAS), torch.zeros(2, 1, CANVAS, CANVAS)

    def add(self, index: int, pixels: torch.Tensor) -> None:
        height, width = (min(side, CANVAS) for side in pixels.shape[1:])
        self.sums[index % 2, :, :height, :width] += pixels[:, :height, :width]
        self.counts[index % 2, :, :height, :width] += 1

    def agreement(self) -> float:
        """Correlation of the means of the two halves, where both have images."""
        both = (self.counts > 0).all(0)
        if not both.any():
            return 0.0
        halves = [(s / c.clamp(min=1))[:, both[0]].flatten() for s, c in zip(self.sums, self.counts, strict=True)]
        return float(torch.corrcoef(torch.stack(halves))[0, 1].nan_to_num())

    def pattern(self) -> torch.Tensor:
        """The mean, of whose frequencies that much is left which the two halves agree on: the rest is the images."""
        first, second = (torch.fft.fft2(s / c.clamp(min=1)) for s, c in zip(self.sums, self.counts, strict=True))
        common, mean = (first * second.conj()).real, (first + second) / 2
        # Over neighbouring frequencies, as one alone says little.
        common, energy = (
            F.avg_pool2d(F.pad(one[None], (1, 1, 1, 1), mode="circular"), 3, stride=1)[0]
            for one in (common, mean.abs().square())
        )
        return torch.fft.ifft2(mean * (common / energy.clamp(min=1e-6)).clamp(0, 1)).real


def _fit_mean(published: Sequence[Path], pairs: Pairs | None) -> Removal:
    fixed, scaled = _Average(), _Average()
    for index, file in enumerate(published):
        residual = _residual(_opponent(_read(file)))
        fixed.add(index, residual)
        scaled.add(index, _scaled(residual, *_canvas_size(*residual.shape[1:])))
    scales = scaled.agreement() > fixed.agreement()
    return partial(_subtract, (scaled if scales else fixed).pattern(), scales)


def _subtract(pattern: torch.Tensor, scales: bool, image: Image.Image) -> Image.Image:
    pixels = _opponent(_tensor(image))
    height, width = pixels.shape[1:]
    if scales:
        rows, columns = _canvas_size(height, width)
        pattern = _scaled(pattern[:, :rows, :columns], height, width)
    else:
        # Beyond what was averaged there is nothing to subtract.
        pattern = F.pad(pattern[:, :height, :width], (0, max(0, width - CANVAS), 0, max(0, height - CANVAS)))
    shared, energy = (_blurred(one * pattern, GAIN_SIGMA) for one in (_residual(pixels), pattern))
    gain = (shared / energy.clamp(min=1e-3)).clamp(0, LARGEST_GAIN)
    return _image(_rgb(pixels - gain * pattern))


def _fit_notch(published: Sequence[Path], pairs: Pairs | None) -> Removal:
    from scipy.ndimage import binary_dilation, median_filter

    power, tiles = torch.zeros(3, TILE, TILE), 0
    window = torch.hann_window(TILE, periodic=False)
    window = window[:, None] * window
    for file in published:
        residual = _residual(_opponent(_read(file)))
        short = [max(0, TILE - side) for side in residual.shape[1:]]
        residual = F.pad(residual[None], (0, short[1], 0, short[0]), mode="replicate")[0]
        for rows in residual.unfold(1, TILE, TILE // 2).unfold(2, TILE, TILE // 2).flatten(1, 2).movedim(1, 0):
            power += torch.fft.fft2(rows * window).abs().square()
            tiles += 1
    level = np.log((power / tiles).numpy() + 1e-6)
    peaks = level - median_filter(level, size=(1, 11, 11), mode="wrap") > np.log(PEAK)
    frequency = np.fft.fftfreq(TILE)
    may_go = np.hypot(frequency[:, None], frequency) > SLOWEST
    # A window spreads a line over its neighbours.
    notched = binary_dilation(peaks & may_go, np.ones((1, 3, 3), bool)) & may_go
    return partial(_filter_out, torch.from_numpy(notched))


def _filter_out(peaks: torch.Tensor, image: Image.Image) -> Image.Image:
    pixels = _opponent(_tensor(image))
    height, width = pixels.shape[1:]
    margins = [min(TILE // 2, side - 1) for side in (height, width)]
    padded = F.pad(pixels[None], (margins[1], margins[1], margins[0], margins[0]), mode="reflect")[0]
    bins = [(torch.fft.fftfreq(side) * TILE).round().long() % TILE for side in padded.shape[1:]]
    spectrum = torch.fft.fft2(padded)
    spectrum[peaks[:, bins[0][:, None], bins[1]]] = 0
    cleaned = torch.fft.ifft2(spectrum).real
    return _image(_rgb(cleaned[:, margins[0] : margins[0] + height, margins[1] : margins[1] + width]))


def _fit_median(published: Sequence[Path], pairs: Pairs | None) -> Removal:
    return lambda image: image.filter(ImageFilter.MedianFilter(3))


def _fit_bilateral(published: Sequence[Path], pairs: Pairs | None) -> Removal:
    from kornia.filters import bilateral_blur

    def smooth(image: Image.Image) -> Image.Image:
        return _image(bilateral_blur(_tensor(image)[None] / 255, (7, 7), 0.1, (2.0, 2.0), "replicate")[0] * 255)

    return smooth


class _Denoiser(nn.Module):
    """A residual network on 2 x 2 pixels at a time; it sees some 25 pixels to each side."""

    def __init__(self, width: int = 48) -> None:
        super().__init__()
        layers: list[nn.Module] = [nn.PixelUnshuffle(2), nn.Conv2d(12, width, 3, padding=1), nn.ReLU(inplace=True)]
        for dilation in (1, 2, 4, 2):
            layers += [nn.Conv2d(width, width, 3, padding=dilation, dilation=dilation), nn.ReLU(inplace=True)]
        self.layers = nn.Sequential(*layers, nn.Conv2d(width, 12, 3, padding=1), nn.PixelShuffle(2))

    def forward(self, pixels: torch.Tensor) -> torch.Tensor:
        """Clean images of `(batch, 3, height, width)`, even sides, in grey levels."""
        return pixels - self.layers(pixels / 128 - 1) * 8


def _fit_denoiser(published: Sequence[Path], pairs: Pairs | None, steps: int = 800) -> Removal:
    if not pairs:
        raise ValueError("denoiser: there are no pairs of protected images and originals; give some")
    side = min(64, *(extent // 2 * 2 for pair in pairs for extent in pair[0].shape[:2]))
    random = np.random.default_rng(0)
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(0)
        network = _Denoiser()
    optimizer = torch.optim.Adam(network.parameters(), lr=1e-3)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    for _ in range(steps):
        patches = [_patch(pairs[random.integers(len(pairs))], side, random) for _ in range(16)]
        noisy, clean = (torch.from_numpy(np.stack(part)).movedim(-1, 1).float() for part in zip(*patches, strict=True))
        loss = F.mse_loss(network(noisy), clean)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    return partial(_denoise, network.eval())


def _patch(pair: tuple[np.ndarray, np.ndarray], side: int, random: np.random.Generator) -> list[np.ndarray]:
    # Not mirrored: a fixed pattern has its orientation.
    top, left = (random.integers(extent - side + 1) for extent in pair[0].shape[:2])
    return [part[top : top + side, left : left + side] for part in pair]


@torch.no_grad()
def _denoise(network: _Denoiser, image: Image.Image) -> Image.Image:
    pixels = _tensor(image)
    height, width = pixels.shape[1:]
    even = F.pad(pixels[None], (0, width % 2, 0, height % 2), mode="replicate")
    return _image(network(even)[0, :, :height, :width])


REMOVALS: dict[str, Callable[[Sequence[Path], Pairs | None], Removal]] = {
    "mean": _fit_mean,
    "notch": _fit_notch,
    "median3": _fit_median,
    "bilateral": _fit_bilateral,
    "denoiser": _fit_denoiser,
}
"""Name of each attack -> function of (published files, pairs)."""
