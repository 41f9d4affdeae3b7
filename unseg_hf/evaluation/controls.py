"""Control noises: what a learned noise has to beat on the same budget before it may claim anything."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import lru_cache, partial
from itertools import product

import numpy as np

from unseg_hf.evaluation.victims.base import IGNORED
from unseg_hf.noise_codes import CLASSES, MASK, code_noise

STRIPE_PERIOD = 16
"""Period of the horizontal stripes of the `stripes` control, in pixels of the published image."""

COARSE_CELL = 4
"""Side of a cell of the `coarse` control, in pixels."""

PATCH_CELL = 8
"""Side of a cell of the `patches` control, in pixels."""

BANDS = 12
"""Waves of the `bands` control from one side of the image to the other."""

UNWEIGHTED = ("whole",)
"""Controls that are applied with `epsilon_background` = `epsilon`, so with a larger budget than all others."""

TEXTURES = 256
"""Classes with a colour or stripes of their own; class ids beyond begin again at the first."""

PATCH_CELLS = 64
"""Cells down and across the image after which the `patches` control repeats itself."""


def _random_cells(labels: np.ndarray, seed: int, cell: int) -> np.ndarray:
    height, width = labels.shape
    signs = _signs(-(-height // cell), -(-width // cell), seed)
    return signs.repeat(cell, axis=0).repeat(cell, axis=1)[:height, :width]


def _signs(rows: int, columns: int, seed: int) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 2, size=(rows, columns, 3), dtype=np.int8) * 2 - 1


def _by_class(
    labels: np.ndarray, seed: int, pattern: Callable[[int, np.ndarray, np.ndarray], np.ndarray]
) -> np.ndarray:
    """Each class's own pattern, whatever the seed; 0 where there is no class, as nothing is learned there."""
    noise = np.zeros((*labels.shape, 3), np.float32)
    for label in map(int, np.unique(labels)):
        if label != IGNORED:
            rows, columns = np.nonzero(labels == label)
            noise[rows, columns] = pattern(label, rows, columns)
    return noise


def _class_patches(label: int, rows: np.ndarray, columns: np.ndarray) -> np.ndarray:
    # Cells of a grid of fixed size, so that images of all sizes begin with the same ones.
    cells = _signs(PATCH_CELLS, PATCH_CELLS, label)
    return cells[rows // PATCH_CELL % PATCH_CELLS, columns // PATCH_CELL % PATCH_CELLS]


def _class_colour(label: int, rows: np.ndarray, columns: np.ndarray) -> np.ndarray:
    return _colours()[label % TEXTURES]


def _class_stripes(label: int, rows: np.ndarray, columns: np.ndarray) -> np.ndarray:
    down, across = _frequencies()[label % TEXTURES]
    return np.where((rows * down + columns * across) % 1 < 0.5, 1, -1)[:, None]


def _stripes(labels: np.ndarray, seed: int) -> np.ndarray:
    return _by_class(_textures(labels), seed, _class_stripes)


def _textures(labels: np.ndarray) -> np.ndarray:
    """Which texture each pixel gets: its class's; in a mask all the same, as the amplitude tells it from the rest."""
    return np.zeros_like(labels) if labels.dtype == bool else labels


def _bands(labels: np.ndarray, seed: int, code: str = MASK) -> np.ndarray:
    codes = [code] if labels.dtype == bool else CLASSES

    def pattern(label: int, rows: np.ndarray, columns: np.ndarray) -> np.ndarray:
        places = ((rows + 0.5) / labels.shape[0], (columns + 0.5) / labels.shape[1])
        return code_noise(codes[label % len(codes)], *(place * BANDS for place in places))

    return _by_class(_textures(labels), seed, pattern)


def tint_for(pixels: np.ndarray, codes: Sequence[str]) -> str:
    """Which of several tints stands out most of the colours of an image, `(height, width, 3)` uint8."""
    from unseg_hf.noise_choice import standing_out

    return codes[standing_out(pixels, np.stack([code_noise(code, 0, 0) for code in codes]))]


@lru_cache(maxsize=1)
def _colours() -> np.ndarray:
    """RGB of each class: the corners of the cube [-1, 1]^3 in opposite pairs, then points of its surface."""
    # Magenta and green come first: of the corners, those whose luminance differs least from that of their opposite.
    pairs = [(1, -1, 1), (1, 1, -1), (1, -1, -1), (1, 1, 1)]
    corners = [[sign * channel for channel in pair] for pair in pairs for sign in (-1, 1)]
    surface = [colour for colour in product(np.linspace(-1, 1, 9), repeat=3) if np.abs(colour).max() == 1]
    colours = np.array([*corners, *surface])
    distances = np.linalg.norm(colours[:, None] - colours, axis=-1)
    return colours[_farthest_first(distances, len(corners))]


@lru_cache(maxsize=1)
def _frequencies() -> np.ndarray:
    """Frequency of each class's stripes, down and across, in cycles a pixel; the first is that of binary masks."""
    # Periods of 10 to 25 pixels: less than a factor of 3 apart, so that the third harmonic of no square wave is the
    # frequency of another.
    polar = [(1 / STRIPE_PERIOD, 0.0), *product(np.linspace(1 / 25, 1 / 10, 13), np.arange(48) * np.pi / 48)]
    frequencies = np.array([(radius * np.cos(angle), radius * np.sin(angle)) for radius, angle in polar])
    # Of stripes nobody can say whether they run up or down.
    distances = np.minimum(*(np.linalg.norm(frequencies[:, None] - sign * frequencies, axis=-1) for sign in (1, -1)))
    return frequencies[_farthest_first(distances, 1)].round(12)


def _farthest_first(distances: np.ndarray, given: int) -> list[int]:
    """Indices of `TEXTURES` points: the first `given` ones, then always the one farthest from all before it."""
    # Rounded, so that another machine's last digit does not decide between points equally far away.
    distances = distances.round(9)
    chosen, nearest = list(range(given)), distances[:given].min(axis=0)
    while len(chosen) < TEXTURES:
        chosen.append(int(nearest.argmax()))
        nearest = np.minimum(nearest, distances[chosen[-1]])
    return chosen


CONTROLS: dict[str, Callable[..., np.ndarray]] = {
    "random": partial(_random_cells, cell=1),
    "stripes": _stripes,
    "bands": _bands,
    "coarse": partial(_random_cells, cell=COARSE_CELL),
    "colour": partial(_by_class, pattern=_class_colour),
    "patches": partial(_by_class, pattern=_class_patches),
    "whole": partial(_random_cells, cell=1),
}
"""Name of each control noise -> function of (labels, seed); of `bands` also of code."""


def control_noise(name: str, labels: np.ndarray, seed: int, code: str = MASK) -> np.ndarray:
    """Make a noise with no learning in it, at full amplitude.

    The amplitude is set by the caller, with [`unseg_hf.protection.apply_noise`], the function that also applies the
    generator's noise: so a control and the generator spend the same budget, `epsilon` in the mask and
    `epsilon_background` outside. `whole` alone is to be applied with `epsilon_background` = `epsilon` (see
    [`UNWEIGHTED`]): it says nothing of the mask, and spends more.

    - `random`: an independent sign for each pixel and channel.
    - `coarse`: an independent sign for each cell of 4 x 4 pixels and each channel.
    - `whole`: as `random`; what differs is the budget.
    - `stripes`: luminance stripes, a square wave. For a mask horizontal with a period of 16 pixels, the same inside
      and outside; for class ids with an angle and a period (10 to 25 pixels) of each class's own.
    - `bands`: what the embedded generator was taught, sharp and without a network: 12 waves in every image, whatever
      its size, so that they lie alike in all images that somebody resizes to one size. For a mask
      those of `code`; for class ids one of the 24 `CLASSES` of
      [`unseg_hf.noise_codes`].
    - `colour`: one colour a class; for a mask magenta inside and its opposite, green, outside. The colours are full
      signs here too, and the budget weights them as it does any other noise: a change of colour of `epsilon` inside
      and of `epsilon_background` outside.
    - `patches`: for each class a random colour in each cell of 8 x 8 pixels, the same in every image, repeating itself
      after 512 pixels; a mask has two classes, inside and outside.

    Angles and periods, and the colours from the ninth on, are ordered so that each class gets the ones farthest from
    those of the classes before it: the fewer classes a data set has, the more they differ.

    Args:
        name: one of [`CONTROLS`].
        labels: class of each pixel, shape `(height, width)`: bool for a mask (True = inside), or whole numbers from 0
            on, 255 = ignored. A mask of 0 and 255 goes in as `mask != 0`.
        seed: seed of the image, at least 0. `stripes`, `bands`, `colour` and `patches` depend on the labels alone:
            they are the same in every image.
        code: of a mask's `bands` (see [`unseg_hf.noise_codes`]).

    Returns:
        Noise, shape `(height, width, 3)`, float32 in [-1, 1]. Every value is -1 or 1, with two exceptions:
        `stripes`, `bands`, `colour` and `patches` are 0 at ignored pixels, and of the colours from the ninth class on
        only one channel need be -1 or 1.

    Raises:
        ValueError: unknown name, or labels that are not two-dimensional, not of whole numbers, or below 0.

    Source:
        `patches`: the synthetic perturbations (LSP, also called SynPer) of Yu et al., "Availability Attacks Create
        Shortcuts", KDD 2022. Theirs, too, are cells of 8 x 8 pixels, but normally scattered around a centre of the
        class and bounded by their L2 norm; here every image gets the centre itself, at the full bound.
    """
    if name not in CONTROLS:
        raise ValueError(f"unknown control noise {name!r}; use one of {', '.join(CONTROLS)}")
    if labels.ndim != 2:
        raise ValueError(f"labels have shape {labels.shape}; pass one mask or label map of shape (height, width)")
    if labels.dtype.kind not in "bui":
        raise ValueError(f"labels are {labels.dtype}; pass a mask as bool, a label map as integers")
    if labels.min(initial=0) < 0:
        raise ValueError(f"labels go down to {labels.min()}; number classes from 0, with {IGNORED} = ignored")
    options = {"code": code} if name == "bands" else {}
    return CONTROLS[name](labels, seed, **options).astype(np.float32, copy=False)
