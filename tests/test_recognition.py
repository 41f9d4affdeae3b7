"""Noise is recognised in images that carry it, and only there."""

import io
import json
import warnings
from pathlib import Path

import numpy as np
import pytest
from datasets import Dataset
from PIL import Image

from unseg_hf import ProtectImages, Protector, cli
from unseg_hf.protection import PROTECTED_BEFORE
from unseg_hf.recognition import Recognition, recognise

EXAMPLES = Path(__file__).parent.parent / "spaces_demo" / "examples"
HEIGHT, WIDTH = 240, 200
REGION = np.zeros((HEIGHT, WIDTH), bool)
REGION[30:220, 20:170] = True


def photo(seed):
    """Soft shapes, whose colours vary less than their brightness, as in photographs."""
    rng = np.random.default_rng(seed)
    soft = Image.fromarray(rng.integers(0, 256, (12, 10), np.uint8)).resize((WIDTH, HEIGHT), Image.Resampling.BICUBIC)
    hue = Image.fromarray(rng.integers(0, 40, (9, 7, 3), np.uint8)).resize((WIDTH, HEIGHT), Image.Resampling.BICUBIC)
    grain = rng.normal(0, 3, (HEIGHT, WIDTH, 3))
    return np.clip(np.asarray(soft, float)[..., None] * 0.6 + np.asarray(hue) + 20 + grain, 0, 255).astype(np.uint8)


def waves(colour, levels=8.0):
    """Twelve of them down the image, in a colour."""
    phase = np.sin(2 * np.pi * 12 * np.arange(HEIGHT) / HEIGHT)[:, None, None]
    return np.rint(levels * phase * np.array(colour, float)) * REGION[..., None]


MAGENTA = waves((1, -1, 1))


def added(pixels, noise):
    top = np.iinfo(pixels.dtype).max
    return np.clip(pixels + noise * (top / 255), 0, top).astype(pixels.dtype)


@pytest.mark.parametrize("share", [0, 0.5, 1, 2])
def test_the_share_of_a_noise_is_found_within_its_error(share):
    found = []
    for seed in range(12):
        published = added(photo(seed), share * MAGENTA)
        found.append(recognise(published, added(published, MAGENTA), REGION))
    shares, errors = (np.array([getattr(one, name) for one in found]) for name in ("share", "error"))
    assert np.abs(shares - share).max() < 0.1
    assert np.abs(shares - share).mean() < 2 * errors.mean() < 0.2
    assert all(one.sure == (share > 0) for one in found)


def test_16_bits_of_colour_have_the_share_of_8():
    published = added(photo(0), MAGENTA)
    wide = published.astype(np.uint16) * 257
    in_8, in_16 = (recognise(pixels, added(pixels, MAGENTA), REGION) for pixels in (published, wide))
    assert in_16.share == pytest.approx(in_8.share, abs=1e-4)
    assert in_16.error == pytest.approx(in_8.error, abs=1e-4)


def test_grey_waves_are_not_taken_for_what_a_photograph_has_anyway():
    grey = waves((1, 1, 1), levels=2)
    for seed in range(12):
        found = recognise(photo(seed), added(photo(seed), grey), REGION)
        assert not found.sure
        assert found.error > 0.1


def test_another_noise_is_not_this_one():
    other = np.roll(waves((1, -1, 1)), HEIGHT // 48, axis=0)  # a quarter of a wave on
    published = added(photo(3), other * REGION[..., None])
    assert abs(recognise(published, added(published, MAGENTA), REGION).share) < 0.15


def test_what_cannot_be_told_is_not_said():
    pixels = photo(1)
    grey = np.repeat(pixels[..., :1], 3, axis=2)
    assert recognise(grey, added(grey, MAGENTA), REGION) is None
    assert recognise(grey[..., :1], added(grey[..., :1], MAGENTA[..., :1]), REGION) is None
    flat = np.full_like(MAGENTA, 6) * REGION[..., None]
    dark = np.minimum(pixels, 200)  # so that nothing is clipped, which would be an edge
    assert recognise(dark, added(dark, flat), REGION) is None
    few = np.zeros_like(REGION)
    few[100:106, 100:103] = True
    assert recognise(pixels, added(pixels, MAGENTA * few[..., None]), few) is None
    assert recognise(pixels, pixels, REGION) is None
    assert recognise(pixels, added(pixels, MAGENTA), np.zeros_like(REGION)) is None


def test_images_of_a_few_pixels_are_no_trouble():
    for height, width in ((1, 1), (1, 200), (200, 1), (3, 2), (5000, 1)):
        pixels = np.random.default_rng(0).integers(0, 255, (height, width, 3), np.uint8)
        noisy = pixels + (np.arange(height)[:, None, None] % 2).astype(np.uint8)
        assert recognise(pixels, noisy, np.ones((height, width), bool)) is None


def test_a_flat_image_has_none_of_it():
    flat = np.full((HEIGHT, WIDTH, 3), (20, 90, 200), np.uint8)
    assert recognise(flat, added(flat, MAGENTA), REGION) == Recognition(0.0, 0.0)


def test_of_noise_in_one_corner_there_is_no_error_to_be_had():
    pixels, corner = photo(2), np.zeros_like(REGION)
    corner[32:70, 22:50] = True
    assert recognise(pixels, added(pixels, MAGENTA * corner[..., None]), REGION) is None
    assert recognise(pixels, added(pixels, MAGENTA * corner[..., None]), corner) is not None


@pytest.mark.parametrize(
    ("share", "error", "sure", "unclear"),
    [
        (0.31, 0.05, True, False),
        (0.29, 0.05, False, True),
        (0.9, 0.2, True, False),
        (0.9, 0.25, False, False),
        (0.1, 0.05, False, False),
        (-0.9, 0.01, False, False),
    ],
)
def test_noise_is_there_where_its_share_is_far_from_what_chance_gives(share, error, sure, unclear):
    found = Recognition(share, error)
    assert (found.sure, found.unclear) == (sure, unclear)


@pytest.fixture(scope="module")
def protector():
    return Protector.from_pretrained()


@pytest.fixture(scope="module")
def published(protector):
    return protector.protect(EXAMPLES / "coffee.png", mask=EXAMPLES / "coffee_mask.png")


def jpeg(image, quality=75):
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", quality=quality)
    return Image.open(buffer)


def test_a_photo_that_is_protected_again_is_said_to_be(protector, published):
    mask = Image.open(EXAMPLES / "coffee_mask.png")
    assert abs(published.before.share) < 0.1
    assert published.notes == ()
    for image in (published.image, jpeg(published.image)):
        again = protector.protect(image, mask=mask)
        assert 0.5 < again.report["noise_before"] < 1.1
        assert again.notes == (PROTECTED_BEFORE,)
    small = jpeg(published.image.resize((200, 133)))
    assert PROTECTED_BEFORE in protector.protect(small, mask=mask.resize((200, 133))).notes
    half = protector.protect(published.image, mask=mask, epsilon=16 / 255).before
    assert half.share == pytest.approx(protector.protect(published.image, mask=mask).before.share / 2, abs=0.02)


def test_of_tints_of_grey_images_and_of_next_to_no_noise_it_is_not_said(protector, published):
    mask = EXAMPLES / "coffee_mask.png"
    for image, options in (
        (published.image, {"tint": "always"}),
        (published.image.convert("L"), {}),
        (published.image, {"epsilon": 1 / 255}),
    ):
        again = protector.protect(image, mask=mask, **options)
        assert again.before is None
        assert again.report["noise_before"] is None
        assert again.notes == ()


def test_a_data_set_that_is_mapped_again_is_warned_of(published):
    rows = {"image": [published.original.to_pil(), published.original.to_pil()]}
    protect = ProtectImages()
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        once = Dataset.from_dict(rows).map(protect, batched=True)
    with pytest.warns(UserWarning, match="'image'.*it seems to carry this noise already"):
        once.map(ProtectImages(report_columns=["noise_before"]), batched=True)


def test_inspect_looks_for_the_noise_in_one_image(protector, published, tmp_path, capsys):
    published.save(tmp_path / "protected.png")
    jpeg(published.image).save(tmp_path / "site.jpg")
    published.image.convert("L").save(tmp_path / "grey.png")
    mask = ["--mask", str(EXAMPLES / "coffee_mask.png")]

    def said(*arguments):
        assert cli.main(["inspect", *map(str, arguments)]) == 0
        return capsys.readouterr().out

    assert "no sign of the noise that it would get (" in said(EXAMPLES / "coffee.png", *mask)
    protector.protect(EXAMPLES / "coffee.png", mask=mask[1], epsilon=2 / 255).save(tmp_path / "faint.png")
    assert "it carries this generator's noise (2.0 of 255" in said(tmp_path / "faint.png", *mask)
    Image.new("L", (600, 400)).save(tmp_path / "empty.png")
    nothing = said(tmp_path / "protected.png", "--mask", tmp_path / "empty.png")
    assert "cannot be told: hardly any pixel of it would get noise" in nothing
    assert "note: the mask is empty" in nothing
    assert "it carries this generator's noise (8." in said(tmp_path / "protected.png", *mask)
    assert "it carries this generator's noise" in said(tmp_path / "site.jpg")
    assert "cannot be told: it has no colour" in said(tmp_path / "grey.png")
    # Stripes of random colours, each as high as half a wave: whatever is in it would be lost among them.
    blocks = np.random.default_rng(0).integers(0, 256, (24, 1, 3), np.uint8).repeat(10, 0).repeat(200, 1)
    Image.fromarray(blocks).save(tmp_path / "loud.png")
    Image.new("L", (200, 240), 255).save(tmp_path / "all.png")
    assert "cannot be told, for what it shows" in said(tmp_path / "loud.png", "--mask", tmp_path / "all.png")
    figures = json.loads(said(tmp_path / "protected.png", *mask, "--json"))
    assert 7 < figures["noise"] < 8.5
    assert 0 < figures["standard_error"] < 1
    assert figures["sure"] is True
    assert json.loads(said(tmp_path / "grey.png", "--json")) == {"noise": None, "standard_error": None, "sure": None}
    assert cli.main(["inspect", str(tmp_path / "protected.png"), "--picture", str(tmp_path / "look.png")]) == 2
    assert "--picture: for originals and protected images" in capsys.readouterr().err
    assert not (tmp_path / "look.png").exists()
