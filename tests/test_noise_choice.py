"""What of an image and its mask decides which noise it gets."""

import numpy as np
import skimage.measure
from PIL import Image

from unseg_hf.evaluation.post_processing import jpeg
from unseg_hf.noise_choice import parts_less_holes, standing_out, typical_height, without_colour


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
