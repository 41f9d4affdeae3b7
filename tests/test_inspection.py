"""What `unseg inspect` measures and draws."""

import io

import numpy as np
import pytest
from PIL import Image

from unseg_hf.image_files import from_array, from_pil
from unseg_hf.inspection import (
    amplified_noise,
    comparison_picture,
    contact_sheet,
    inspect_pair,
    noise_left,
    noise_left_as_published,
    on_the_sheet,
)


def photo(height=64, width=96):
    y, x = np.mgrid[:height, :width]
    return np.stack([60 + y, 40 + x, 200 - x], axis=-1).astype(np.uint8)


def pair(noise):
    pixels = photo()
    return from_array(pixels), from_array((pixels + noise).astype(np.uint8))


def test_smooth_noise_survives_jpeg_and_pixel_noise_does_not():
    y = np.mgrid[:64, :96][0]
    stripes = np.where(y // 8 % 2, 6, -6)[..., None]
    pixels = np.where(np.random.default_rng(0).random((64, 96, 3)) < 0.5, 6, -6)
    assert noise_left(*pair(stripes), quality=75) > 0.9
    assert noise_left(*pair(pixels), quality=75) < 0.5


def test_share_left_is_the_projection_of_what_jpeg_leaves():
    original, protected = pair(np.random.default_rng(1).integers(-8, 9, (64, 96, 3)))
    before, after = (
        np.asarray(recompressed(Image.fromarray(picture.pixels), 75)).astype(float).ravel()
        for picture in (original, protected)
    )
    noise = protected.pixels.astype(float).ravel() - original.pixels.ravel()
    left = np.dot(after - before, noise) / np.dot(noise, noise)
    assert noise_left(original, protected, quality=75) == pytest.approx(left, rel=1e-5)


def test_a_report_says_what_jpeg_75_leaves():
    original, protected = pair(np.random.default_rng(1).integers(-8, 9, (64, 96, 3)))
    assert inspect_pair(original, protected)["left_after_jpeg75"] == noise_left(original, protected, quality=75)


def stripes():
    rows = np.mgrid[:64, :96][0]
    return np.where(rows // 8 % 2, 6, -6)[..., None] * np.array([1, -1, 1])


def recompressed(picture, quality):
    buffer = io.BytesIO()
    picture.save(buffer, "JPEG", quality=quality)
    return Image.open(buffer).convert("RGB")


@pytest.mark.parametrize(
    ("treated", "left"),
    [
        (lambda picture: picture, 1.0),
        (lambda picture: recompressed(picture, 75), None),
        (lambda picture: picture.resize((192, 128)), 1.0),
        (lambda picture: picture.resize((48, 32)), 0.95),
        (lambda picture: picture.point(lambda value: value * 0.8 + 20), 0.8),
        (lambda picture: picture.convert("L").convert("RGB"), 0.174),  # 0.299 - 0.587 + 0.114
    ],
)
def test_what_a_site_left_of_the_noise_is_seen_in_what_it_serves(treated, left):
    original, protected = pair(stripes())
    found, clean = (
        noise_left_as_published(original, protected, from_pil(treated(Image.fromarray(picture.pixels))))
        for picture in (protected, original)
    )
    # Of JPEG it is what both pictures, treated alike, say.
    left = noise_left(original, protected, quality=75) if left is None else left
    assert found == pytest.approx(left, abs=0.06)
    assert clean == pytest.approx(0, abs=0.03)


def test_what_was_published_is_one_of_the_figures_and_has_the_same_proportions():
    original, protected = pair(stripes())
    half = from_pil(Image.fromarray(protected.pixels).resize((47, 32)))
    assert inspect_pair(original, protected, published=half)["left_as_published"] > 0.8
    assert inspect_pair(original, original, published=half)["left_as_published"] is None
    for cropped in (protected.pixels[:60], protected.pixels.transpose(1, 0, 2)):
        with pytest.raises(ValueError, match="the protected one 96 x 64: it was cropped or turned"):
            inspect_pair(original, protected, published=from_array(np.ascontiguousarray(cropped)))


def test_equal_pictures_have_no_noise_to_lose():
    figures = inspect_pair(*pair(0))
    assert figures["max_noise"] == 0
    assert figures["psnr"] is None
    assert figures["left_after_jpeg75"] is None
    assert figures["ssim"] == pytest.approx(1)


def test_inside_and_outside_are_measured_apart():
    region = np.zeros((64, 96), bool)
    region[:30] = True
    figures = inspect_pair(*pair(np.where(region, 7, -2)[..., None]), region)
    assert (figures["max_noise"], figures["max_noise_background"]) == (7, 2)


def test_grey_that_a_format_made_rgb_is_compared_as_grey():
    grey = from_array(photo()[..., 0])
    published = from_array((photo()[..., :1] + 3).astype(np.uint8).repeat(3, axis=2))
    assert inspect_pair(grey, published)["max_noise"] == 3


def test_pictures_of_different_size_are_refused():
    with pytest.raises(ValueError, match=r"96 x 64.*at the same size"):
        inspect_pair(from_array(photo()), from_array(photo()[:10]))


def test_amplified_noise_is_grey_where_nothing_changed_and_full_where_most_did():
    noise = np.zeros((64, 96, 3), int)
    noise[0, 0], noise[1, 1] = 5, -5
    drawn = np.asarray(amplified_noise(*pair(noise)))
    assert drawn[0, 0].tolist() == [255] * 3
    assert drawn[1, 1].tolist() == [1] * 3
    assert (drawn[10:] == 128).all()


def test_comparison_shows_both_pictures_unchanged():
    original, protected = pair(3)
    sheet = np.asarray(comparison_picture(original, protected))
    height, width = original.pixels.shape[:2]
    for picture, left in ((original, 8), (protected, 8 + width + 8)):
        np.testing.assert_array_equal(sheet[24 : 24 + height, left : left + width], picture.pixels)


def test_a_contact_sheet_has_every_photo_beside_its_noise():
    noise = np.zeros((64, 96, 3), int)
    noise[:32] = 8
    tall = from_array(photo(300, 100))
    photos = [on_the_sheet(*pair(noise), "wide.png")] * 4 + [on_the_sheet(tall, tall, "tall.png")]
    sheet = np.asarray(contact_sheet(photos, columns=4))
    assert sheet.shape == (8 + 64 + 26 + 160 + 26, 8 + 4 * 332, 3)
    for left in range(8, 8 + 4 * 332, 332):
        np.testing.assert_array_equal(sheet[8:72, left : left + 96], photo())
        assert (sheet[8:40, left + 164 : left + 260] == 255).all()
        assert (sheet[40:72, left + 164 : left + 260] == 128).all()
    assert (sheet[98:258, 172:225] == 128).all()  # the tall one's, where nothing changed
