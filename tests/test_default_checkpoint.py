"""The generator that comes with the package does what its card says it is for."""

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from unseg_hf import Protector, default_checkpoint
from unseg_hf.image_files import read, read_mask
from unseg_hf.inspection import noise_left
from unseg_hf.noise_codes import CLASSES, FAINT, MASK, TINTS, code_noise

EXAMPLES = Path(__file__).parent.parent / "spaces_demo" / "examples"


@pytest.fixture(scope="module")
def protected():
    protector = Protector.from_pretrained()
    return protector.protect(EXAMPLES / "coffee.png", mask=EXAMPLES / "coffee_mask.png")


def test_it_is_small_and_has_a_card():
    files = list(default_checkpoint().iterdir())
    assert sum(file.stat().st_size for file in files) <= 12e6
    assert "model.safetensors" in {file.name for file in files}
    card = (default_checkpoint() / "README.md").read_text()
    assert "train_generator.py --config" in card


def test_it_protects_the_example_within_the_bound_at_good_quality(protected):
    mask = read_mask(EXAMPLES / "coffee_mask.png") != 0
    difference = np.abs(protected.picture.pixels.astype(int) - read(EXAMPLES / "coffee.png").pixels).max(axis=2)
    assert 4 <= difference[mask].max() <= 8
    assert difference[~mask].max() == 0
    assert protected.report["psnr"] > 33.5  # it is smooth, and so gets the whole budget all over


def test_it_finds_what_the_example_is_of_without_a_mask():
    mask = read_mask(EXAMPLES / "coffee_mask.png") != 0
    found = Protector.from_pretrained().protect(EXAMPLES / "coffee.png")
    assert np.count_nonzero(found.region & mask) > 0.7 * np.count_nonzero(found.region | mask)
    assert found.notes == ()
    assert (found.picture.pixels == found.original.pixels)[~found.region].all()


def test_its_noise_lives_through_jpeg_and_reduction(protected):
    assert noise_left(protected.original, protected.picture, quality=75) > 0.7

    def halved(picture):
        image = Image.fromarray(picture.rgb8())
        return np.asarray(image.resize((image.width // 2, image.height // 2), Image.Resampling.BILINEAR), float)

    rms = [np.sqrt(np.mean((a - b) ** 2)) for a, b in (
        (protected.picture.rgb8().astype(float), protected.original.rgb8()),
        (halved(protected.picture), halved(protected.original)),
    )]  # fmt: skip
    assert rms[1] > 0.6 * rms[0]


def test_without_its_tint_there_are_waves_left(protected):
    """The noise is no flat colour alone, which white balance would take off."""
    noise = (protected.picture.pixels.astype(float) - protected.original.pixels)[protected.region]
    assert (noise - noise.mean(axis=0)).std() > 3


def test_a_grey_photo_gets_waves_of_the_whole_budget():
    grey = Image.open(EXAMPLES / "coffee.png").convert("L")
    protected = Protector.from_pretrained().protect(grey, mask=EXAMPLES / "coffee_mask.png")
    noise = (protected.picture.pixels.astype(float) - protected.original.pixels)[protected.region]
    assert noise.min() == -8
    assert noise.max() == 8
    assert noise.std() > 5


def test_each_of_its_codes_is_the_noise_it_was_taught():
    protector = Protector.from_pretrained()
    grey, masks = np.full((192, 192, 3), 128, np.uint8), [np.ones((192, 192), bool)]
    places = (np.arange(192) + 0.5) / 16
    assert protector.model.config.noise_codes == 1 + len(CLASSES)

    def likeness(code, image, **prompt):
        result = protector.protect(image, **prompt)
        noise = (result.picture.pixels.astype(float) - result.original.pixels) / 8
        # Square waves come through the cells between them as steep trapezes.
        return (noise * code_noise(code, places[:, None], places)).mean()

    for number, code in enumerate(CLASSES):
        assert likeness(code, grey, masks=masks, classes=[number], mode="per_segment") > 0.8, code
    # Nuclei, vessels: lower than a wave.
    thin = np.zeros((192, 192), bool)
    thin[::8] = True

    def on_lines(pixels):
        result = protector.protect(pixels, mask=thin)
        return (result.picture.pixels[thin].astype(int) - pixels[thin]).mean(axis=0).round()

    np.testing.assert_array_equal(on_lines(grey), 8 * code_noise(TINTS[0], 0, 0))
    # Where red varies, as in a retina, a red tint is hard to see.
    redder = grey.copy()
    redder[..., 0] = np.arange(20, 212)
    redder[..., 1:] = np.arange(20, 212)[:, None, None]
    np.testing.assert_array_equal(on_lines(redder), 8 * code_noise(TINTS[1], 0, 0))
    textured = np.random.default_rng(0).integers(60, 196, (192, 192, 3)).astype(np.uint8)
    assert likeness(MASK, textured, masks=masks) > 0.8
    assert likeness(FAINT, textured, masks=masks, epsilon=4 / 255) > 0.8 * 4 / 8
    sky = textured.copy()
    sky[:32] = 128 - np.uint8([20, 10, 0])
    above = np.zeros((192, 192), bool)
    above[:24] = True
    result = protector.protect(sky, masks=masks)
    assert 1 < np.abs(result.picture.pixels.astype(int) - sky)[above].max() <= 2


@pytest.mark.parametrize("size", [(192, 192), (240, 320), (65, 500)])
@pytest.mark.parametrize("colour", [(108, 118, 128), (90, 160, 230), (200, 37, 91)])
def test_what_is_flat_all_over_gets_the_whole_budget_and_a_flat_part_its_least(size, colour):
    flat = np.broadcast_to(np.uint8(colour), (*size, 3)).copy()
    protector = Protector.from_pretrained()
    assert protector.protect(flat, whole_image=True).report["max_noise"] == 8
    rough = flat.copy()
    texture = np.random.default_rng(0).integers(-25, 25, rough[size[0] // 6 :].shape)
    rough[size[0] // 6 :] = (rough[size[0] // 6 :] + texture).clip(0, 255)
    result = protector.protect(rough, whole_image=True)
    noise = np.abs(result.picture.pixels.astype(int) - rough)
    assert noise[: size[0] // 32].max() == 2
    assert noise.max() == 8


def test_its_configuration_is_the_one_the_card_names():
    import json

    script = (EXAMPLES.parent.parent / "training_scripts" / "configs" / "tiny.json").read_text()
    config = json.loads((default_checkpoint() / "config.json").read_text())
    for name in ("proposal_iou", "proposal_stability"):
        assert config[name] == json.loads(script)[name]


def test_in_turned_columns_waves_are_the_opposite_and_tints_and_noises_of_classes_stay_as_they_are():
    protector, turned = Protector.from_pretrained(), Protector.from_pretrained()
    turned.model.config.turned_columns = columns = [0, 2, 5, 8, 9, 10]
    pixels = np.full((240, 360, 3), 128, np.uint8)
    pixels[::2] += 20  # rough enough for the whole budget
    full = np.ones((240, 360), bool)
    full[0] = False
    middles = np.arange(15, 360, 30)
    before, after = (
        one.protect(pixels, mask=full).picture.pixels[1:, middles].astype(int) - pixels[1:, middles]
        for one in (protector, turned)
    )
    signs = np.where(np.isin(np.arange(12), columns), -1, 1)
    np.testing.assert_array_equal(after, before * signs[:, None])
    assert (np.abs(before).max(axis=(0, 2)) == 8).all()
    # Without --per-segment the classes of a label map are one object.
    mapped, masked = (turned.protect(pixels, **{name: full}).picture.pixels for name in ("label_map", "mask"))
    np.testing.assert_array_equal(mapped, masked)
    for prompt in ({"mask": full, "tint": "always"}, {"masks": [full], "classes": [1], "mode": "per_segment"}):
        one, other = (p.protect(pixels, **prompt).picture.pixels for p in (protector, turned))
        np.testing.assert_array_equal(one, other)
    for wrong in ([12], [-1]):
        turned.model.config.turned_columns = wrong
        with pytest.raises(ValueError, match=r"turned_columns=.*: all must be from 0 to 11"):
            turned.model.config.validate_architecture()


def test_segments_get_the_tint_that_stands_out():
    thin = np.zeros((192, 192), bool)
    thin[::8] = True
    redder = np.full((192, 192, 3), 128, np.uint8)
    redder[..., 0] = np.arange(20, 212)
    redder[..., 1:] = np.arange(20, 212)[:, None, None]
    halves = [thin & (np.arange(192) < 96), thin & (np.arange(192) >= 96)]
    protector = Protector.from_pretrained()
    result = protector.protect(redder, masks=halves, mode="per_segment")
    for half in halves:
        noise = (result.picture.pixels[half].astype(int) - redder[half]).mean(axis=0).round()
        np.testing.assert_array_equal(noise, 8 * code_noise(TINTS[1], 0, 0))
