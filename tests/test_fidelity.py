"""The figures of a report are what others measure."""

import numpy as np
import pytest
import torch
from torchmetrics.functional.image import structural_similarity_index_measure

from unseg_hf.fidelity import compare
from unseg_hf.image_files import from_array


def test_ssim_measured_in_strips_is_that_of_the_whole_picture():
    rng = np.random.default_rng(0)
    original = rng.integers(0, 256, (900, 700, 1), np.uint8)
    changed = np.clip(original + rng.integers(-20, 21, original.shape) * (np.arange(900)[:, None, None] > 500), 0, 255)
    pictures = [from_array(pixels.astype(np.uint8)) for pixels in (original, changed)]
    figures = compare(*pictures, np.ones((900, 700), bool))
    whole = (torch.from_numpy(p.pixels.astype(np.float32)).permute(2, 0, 1)[None] for p in reversed(pictures))
    expected = float(structural_similarity_index_measure(*whole, data_range=255.0))
    assert figures["ssim"] == pytest.approx(expected, abs=1e-6)
    assert figures["ssim"] < 0.999


def test_ssim_of_equal_pictures_is_one():
    picture = from_array(np.random.default_rng(0).integers(0, 256, (400, 361, 3), np.uint8))
    assert 0.999999 < compare(picture, picture, np.ones((400, 361), bool))["ssim"] <= 1


def test_16_bits_have_the_figures_of_8():
    rng = np.random.default_rng(0)
    original = rng.integers(0, 256, (40, 50, 1))
    changed = np.clip(original + rng.integers(-20, 21, original.shape), 0, 255)
    everywhere = np.ones((40, 50), bool)
    in_8, in_16 = (
        compare(*(from_array((pixels * factor).astype(dtype)) for pixels in (original, changed)), everywhere)
        for factor, dtype in ((1, np.uint8), (257, np.uint16))
    )
    assert in_16 == pytest.approx(in_8, abs=1e-5)


def test_ssim_of_small_pictures_is_that_of_their_continuation():
    rng = np.random.default_rng(0)
    small = rng.integers(0, 256, (5, 7, 3), np.uint8)
    changed = np.clip(small + rng.integers(-20, 21, small.shape), 0, 255).astype(np.uint8)
    wide = [np.pad(pixels, ((0, 6), (0, 4), (0, 0)), mode="edge") for pixels in (small, changed)]
    figures = [
        compare(*map(from_array, pair), np.ones(pair[0].shape[:2], bool))["ssim"] for pair in ((small, changed), wide)
    ]
    assert figures[0] == figures[1] < 0.999
