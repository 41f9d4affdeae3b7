import io

import numpy as np
import pytest
import torch
from PIL import Image
from scipy.ndimage import gaussian_filter

from unseg_hf.evaluation.post_processing import POST_PROCESSINGS


@pytest.fixture
def pixels() -> np.ndarray:
    """Smooth colours with the fine noise that a post-processing is to meet; odd sides, (45, 61, 3) uint8."""
    rng = np.random.default_rng(0)
    smooth = np.add.outer(np.linspace(0, 120, 45), np.linspace(0, 100, 61))[..., None] + [0, 20, 35]
    return (smooth + rng.integers(-8, 9, smooth.shape)).clip(0, 255).astype(np.uint8)


def processed(name: str, pixels: np.ndarray) -> np.ndarray:
    image = POST_PROCESSINGS[name](Image.fromarray(pixels))
    assert image.mode == "RGB"
    return np.asarray(image).astype(int)


def as_jpeg(pixels: np.ndarray, quality: int) -> np.ndarray:
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, format="JPEG", quality=quality)
    return np.asarray(Image.open(buffer))


def halved(pixels: np.ndarray) -> np.ndarray:
    batch = torch.tensor(pixels).permute(2, 0, 1)[None].double()
    size = tuple(-(-side // 2) for side in pixels.shape[:2])
    return torch.nn.functional.interpolate(batch, size, mode="bilinear", antialias=True)[0].permute(1, 2, 0).numpy()


EXPECTED = {
    "none": (0, lambda pixels: pixels),
    "jpeg75": (0, lambda pixels: as_jpeg(pixels, 75)),
    "jpeg50": (0, lambda pixels: as_jpeg(pixels, 50)),
    # Pillow rounds between the two directions, so that a value may be off by one.
    "half": (1.01, halved),
    "blur1.5": (0.51, lambda pixels: gaussian_filter(pixels.astype(float), (1.5, 1.5, 0), mode="nearest")),
    "greyscale": (0.51, lambda pixels: np.repeat(pixels @ np.array([[0.299], [0.587], [0.114]]), 3, axis=2)),
    # Of 32 equally spaced levels the nearest.
    "5bit": (
        0.5,
        lambda pixels: np.linspace(0, 255, 32)[np.abs(pixels[..., None] - np.linspace(0, 255, 32)).argmin(-1)],
    ),
}


@pytest.mark.parametrize("name", EXPECTED)
def test_post_processing_equals_an_independent_computation(name: str, pixels: np.ndarray):
    tolerance, compute = EXPECTED[name]
    expected = compute(pixels)
    result = processed(name, pixels)
    assert result.shape == expected.shape
    assert np.abs(result - expected).max() <= tolerance


def test_every_post_processing_is_tested_alone_or_as_a_combination():
    combined = {name for name in POST_PROCESSINGS if "+" in name}
    assert combined == {"half+jpeg75", "greyscale+jpeg75"}
    assert set(POST_PROCESSINGS) - combined == set(EXPECTED)


@pytest.mark.parametrize("name", ["half+jpeg75", "greyscale+jpeg75"])
def test_a_combination_is_its_steps_in_the_order_of_its_name(name: str):
    # In colours so strong that JPEG clips them, as otherwise greyscale and JPEG may change places.
    pixels = np.random.default_rng(0).integers(0, 256, (45, 61, 3), dtype=np.uint8)
    first, then = name.split("+")
    expected = processed(then, processed(first, pixels).astype(np.uint8))
    np.testing.assert_array_equal(processed(name, pixels), expected)
    other_order = processed(first, processed(then, pixels).astype(np.uint8))
    assert (expected != other_order).any()


@pytest.mark.parametrize("name", POST_PROCESSINGS)
def test_only_halving_changes_the_size_and_nothing_changes_the_given_image(name: str, pixels: np.ndarray):
    before = pixels.copy()
    expected = (23, 31, 3) if "half" in name else pixels.shape
    assert processed(name, pixels).shape == expected
    np.testing.assert_array_equal(pixels, before)
    assert processed(name, pixels[:1, :1]).shape == (1, 1, 3)
    flat = np.full((9, 9, 3), 255, np.uint8)
    np.testing.assert_array_equal(processed(name, flat), np.full_like(processed(name, flat), 255))
