"""What of an image and its mask decides which noise it gets."""

import numpy as np
import pytest
import skimage.measure
from PIL import Image

from unseg_hf.evaluation.post_processing import jpeg
from unseg_hf.noise_choice import (
    TEXTURED,
    ceiling_of,
    parts_less_holes,
    standing_out,
    texture,
    typical_height,
    without_colour,
)


def test_of_several_tints_the_one_is_taken_that_stands_out_of_the_colours():
    grey = np.random.default_rng(0).integers(0, 256, (600, 500, 1)).repeat(3, axis=2).astype(np.uint8)
    red, magenta, white = (1, -1, -1), (1, -1, 1), (1, 1, 1)
    for tints, wanted in (((red, magenta), red), ((magenta, red), magenta), ((white, red), red), ((red, white), red)):
        tints = np.array(tints, np.float32)
        assert tuple(tints[standing_out(grey, tints)]) == wanted
    redder, yellower = (grey // 2 for _ in range(2))
    redder[..., 0] = np.arange(500) // 4
    yellower[..., :2] = (np.arange(500) // 4)[:, None]
    for tint, pixels in ((magenta, redder), (red, yellower)):
        for of_its_kind in (pixels, pixels.astype(np.uint16) * 257):
            tints = 0.1 * np.array([red, magenta])
            assert tuple(np.sign(tints[standing_out(of_its_kind, tints)])) == tint
    # One pixel, or one colour, varies in nothing.
    assert standing_out(np.full((1, 1, 3), 7, np.uint8), np.array([red, np.multiply(2, magenta)])) == 1


def test_the_typical_height_is_that_of_stripes_of_lines_and_of_most_of_the_pixels():
    rows, columns = np.mgrid[:200, :1300]
    assert typical_height((rows // 5) % 2 == 0) == 5
    assert typical_height(columns % 7 == 0) == 200
    assert typical_height((rows < 150) & (columns < 600) | (rows >= 199)) == 150
    assert typical_height((rows < 150) & (columns < 6) | (rows >= 199)) == 1
    assert typical_height(np.zeros((9, 9), bool)) == float("inf")


def test_parts_less_holes_is_eulers_number():
    random = np.random.default_rng(0)
    shapes = ((40, 33), (1, 9), (7, 1), (511, 511))
    for region in (random.random(shape) < random.random() for shape in shapes for _ in range(8)):
        assert parts_less_holes(region) == skimage.measure.euler_number(region, connectivity=2)
    # Of large ones every other pixel is looked at.
    rows, columns = np.mgrid[:900, :40]
    assert parts_less_holes((rows % 100 < 40) & (columns % 10 < 6)) == 36
    assert parts_less_holes(np.zeros((9, 9), bool)) == 0


def test_what_was_grey_is_grey_after_jpeg_and_a_faint_tint_is_a_colour():
    random = np.random.default_rng(0)
    texture = random.integers(0, 256, (1100, 700, 1), dtype=np.uint8).repeat(3, axis=2)
    assert without_colour(np.asarray(jpeg(Image.fromarray(texture), 50)))
    assert without_colour(texture.astype(np.uint16) * 257)
    assert not without_colour(np.maximum(texture, 8) - np.uint8([0, 4, 0]))
    assert not without_colour(texture[..., :1])


def test_another_tint_must_stand_out_by_a_tenth():
    pixels = np.random.default_rng(0).integers(0, 256, (500, 500, 3)).astype(np.uint8)  # alike in all colours
    for times, chosen in ((1.05, 0), (1.08, 0), (1.13, 1)):
        assert standing_out(pixels, np.array([[1, 0, 0], [0, times, 0]])) == chosen


def test_the_ceiling_rises_from_smooth_to_textured():
    # Of a little more texture than hides noise, of half of it, and of less than a third.
    deviations = 255 * TEXTURED * np.repeat([1.1, 1.1, 1.1, 0.67, 0.25], 120)[:, None, None]
    pixels = np.rint(128 + deviations * np.random.default_rng(0).normal(size=(600, 480, 1))).astype(np.uint8)
    region = np.ones((600, 480), bool)
    region[360:] = False
    largest = ceiling_of(pixels, region, 8 / 255, 2 / 255)[:][..., 0] * 255
    assert largest[20:340].min() > 7.5
    assert largest[400:440].mean() == pytest.approx(5, abs=0.4)
    assert largest[520:580].max() == pytest.approx(2)


def test_a_stamp_in_colour_leaves_a_picture_grey():
    random = np.random.default_rng(0)
    stamped = random.integers(0, 256, (600, 700, 1), dtype=np.uint8).repeat(3, axis=2)
    stamped[:4, :4] = (255, 0, 0)
    assert without_colour(stamped)


def test_texture_is_the_same_at_the_edges():
    noise = np.rint(128 + 10 * np.random.default_rng(0).normal(size=(480, 480, 1))).astype(np.uint8)
    assert texture(noise).min() > 0.85 * 10 / 255  # at the edges and corners, too
