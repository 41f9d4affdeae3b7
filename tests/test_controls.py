import numpy as np
import pytest

from unseg_hf.evaluation.controls import CONTROLS, UNWEIGHTED, control_noise
from unseg_hf.noise_codes import CLASSES
from unseg_hf.protection import apply_noise

CLASS_CODED = ("stripes", "bands", "colour", "patches")
REGION = np.zeros((48, 40), bool)
REGION[10:30, 5:25] = True


def of_one_class(name: str, label: int, height: int = 128, width: int = 128) -> np.ndarray:
    return control_noise(name, np.full((height, width), label), seed=0)


def test_stripes_of_a_mask_are_luminance_stripes_of_16_pixels_whatever_the_seed():
    noise = control_noise("stripes", np.zeros((64, 20), bool), seed=0)
    assert (noise.shape, noise.dtype, set(np.unique(noise))) == ((64, 20, 3), np.float32, {-1, 1})
    np.testing.assert_array_equal(noise[16:], noise[:-16])
    np.testing.assert_array_equal(noise[8:], -noise[:-8])
    assert (noise[:8] == 1).all()
    np.testing.assert_array_equal(noise, control_noise("stripes", np.zeros((64, 20), bool), seed=1))
    np.testing.assert_array_equal(noise, control_noise("stripes", np.ones((64, 20), bool), seed=0))


def dominant_frequency(noise: np.ndarray) -> np.ndarray:
    """Cycles a pixel down and across, shape (2,), of a grey noise; half of the plane is enough."""
    height, width = noise.shape[:2]
    window = np.hanning(height)[:, None] * np.hanning(width)
    spectrum = np.abs(np.fft.rfft2(noise[..., 0] * window))
    row, column = np.unravel_index(spectrum.argmax(), spectrum.shape)
    return np.array([np.fft.fftfreq(height)[row], np.fft.rfftfreq(width)[column]])


def test_stripes_of_class_ids_are_told_apart_by_their_dominant_frequency():
    noises = [of_one_class("stripes", label) for label in range(32)]
    assert all((noise == noise[..., :1]).all() and set(np.unique(noise)) == {-1, 1} for noise in noises)
    frequencies = np.array([dominant_frequency(noise) for noise in noises])
    periods = 1 / np.linalg.norm(frequencies, axis=1)
    assert 9 < periods.min() < 11
    assert 20 < periods.max() < 28
    np.testing.assert_array_equal(frequencies[0], [1 / 16, 0])
    # At least two steps of the spectrum apart; a frequency and its negative are the same stripes.
    for sign in (1, -1):
        distances = np.linalg.norm(frequencies[:, None] - sign * frequencies, axis=-1)
        assert distances[np.triu_indices(32, k=1)].min() >= 2 / 128


@pytest.mark.parametrize("shape", [(96, 96), (192, 48), (300, 400)])
def test_bands_of_a_mask_lie_alike_in_images_of_all_sizes(shape: tuple[int, int]):
    noise = control_noise("bands", np.zeros(shape, bool), seed=0)
    assert (noise == noise[:, :1]).all()
    red, green, blue = noise[:, 0].T
    np.testing.assert_array_equal(red, blue)
    # Green begins a quarter of a wave earlier.
    for rows, borders in ((red, np.arange(1, 24) / 24), (green, np.arange(1, 48, 2) / 48)):
        places = (np.flatnonzero(np.diff(rows)) + 1) / shape[0]
        np.testing.assert_allclose(places, borders, atol=0.5 / shape[0] + 1e-9)
    np.testing.assert_array_equal(noise, control_noise("bands", np.ones(shape, bool), seed=1))
    tint = control_noise("bands", np.zeros(shape, bool), seed=0, code="+--")
    assert (tint == [1, -1, -1]).all()
    of_classes = [control_noise("bands", np.zeros(shape, np.uint8), seed=0, code=code) for code in ("+--", "ded")]
    np.testing.assert_array_equal(*of_classes)


def test_bands_of_24_classes_differ():
    noises = np.stack([of_one_class("bands", label, 96, 96).ravel() for label in range(24)])
    differ = (noises[:, None] != noises).mean(axis=-1)
    assert differ[np.triu_indices(24, k=1)].min() >= 1 / 3 - 1e-6
    np.testing.assert_array_equal(of_one_class("bands", 24, 96, 96).ravel(), noises[0])


@pytest.mark.parametrize(("name", "cell"), [("random", 1), ("whole", 1), ("coarse", 4)])
def test_random_signs_are_independent_by_cell_channel_and_seed(name: str, cell: int):
    region = np.zeros((100 * cell + 1, 100 * cell + 1), bool)
    noise, other = control_noise(name, region, seed=0), control_noise(name, region, seed=1)
    assert (noise.shape, noise.dtype, set(np.unique(noise))) == ((*region.shape, 3), np.float32, {-1, 1})
    np.testing.assert_array_equal(noise, control_noise(name, region, seed=0))
    blocks = noise[:-1, :-1].reshape(100, cell, 100, cell, 3)
    assert (blocks == blocks[:, :1, :, :1]).all()
    noise, other = noise[::cell, ::cell], other[::cell, ::cell]
    pairs = [(noise, other), (noise[..., 0], noise[..., 1]), (noise[1:], noise[:-1]), (noise[:, 1:], noise[:, :-1])]
    for first, second in pairs:
        assert abs(np.mean(first * second)) < 0.05
    assert abs(noise.mean()) < 0.05


def test_colour_of_a_mask_is_a_constant_offset_opposite_outside_and_not_grey():
    noise = control_noise("colour", REGION, seed=0)
    (inside,), (outside,) = (np.unique(noise[where], axis=0) for where in (REGION, ~REGION))
    np.testing.assert_array_equal(inside, -outside)
    assert set(inside) == {-1, 1}
    np.testing.assert_array_equal(noise, control_noise("colour", REGION, seed=1))


def test_every_class_has_a_colour_of_its_own_at_full_amplitude_where_that_is_possible():
    colours = [of_one_class("colour", label, 1, 1)[0, 0] for label in range(254)]
    assert len(np.unique(colours, axis=0)) == 254
    assert all(np.abs(colour).max() == 1 for colour in colours)
    assert (np.abs(colours[:8]) == 1).all()


def test_patches_are_the_same_for_all_images_of_a_class_and_differ_between_classes():
    cells = [of_one_class("patches", label, 64, 48).reshape(8, 8, 6, 8, 3) for label in range(4)]
    for blocks in cells:
        assert (blocks == blocks[:, :1, :, :1]).all()
    noises = [blocks.reshape(64, 48, 3) for blocks in cells]
    for first in range(4):
        for second in range(first):
            assert abs(np.mean(noises[first] * noises[second])) < 0.4

    labels = np.random.default_rng(0).integers(0, 4, (700, 600))
    noise = control_noise("patches", labels, seed=5)
    for label, expected in enumerate(noises):
        inside = labels[:64, :48] == label
        np.testing.assert_array_equal(noise[:64, :48][inside], expected[inside])
    region = control_noise("patches", REGION, seed=6)
    np.testing.assert_array_equal(region, np.where(REGION[..., None], noises[1][:48, :40], noises[0][:48, :40]))


@pytest.mark.parametrize("name", CONTROLS)
def test_controls_follow_a_label_map_within_bounds_and_leave_ignored_pixels_to_those_that_know_no_class(name: str):
    labels = np.random.default_rng(0).integers(0, 150, (60, 50)).astype(np.uint8)
    labels[:5] = 255
    noise = control_noise(name, labels, seed=3)
    assert (noise.shape, noise.dtype) == ((60, 50, 3), np.float32)
    assert np.abs(noise).max() == 1
    assert (np.abs(noise[5:]).max(axis=2) == 1).all()
    assert np.abs(noise[:5]).max() == (0 if name in CLASS_CODED else 1)
    same_for_all_images = (noise == control_noise(name, labels.astype(np.int64), seed=4)).all()
    assert same_for_all_images == (name in CLASS_CODED)


@pytest.mark.parametrize(
    ("name", "labels", "message"),
    [
        ("plaid", REGION, "unknown control noise 'plaid'; use one of random, stripes, bands, coarse"),
        ("random", np.zeros((4, 4, 1), bool), r"\(4, 4, 1\); pass one mask"),
        ("colour", np.zeros((4, 4)), "labels are float64; pass a mask as bool, a label map as integers"),
        ("patches", np.full((4, 4), -1), "labels go down to -1; number classes from 0, with 255 = ignored"),
    ],
)
def test_control_noise_refuses_unfit_arguments_with_the_fix(name: str, labels: np.ndarray, message: str):
    with pytest.raises(ValueError, match=message):
        control_noise(name, labels, seed=0)


@pytest.mark.parametrize("name", CONTROLS)
def test_every_control_spends_exactly_its_budget_once_applied(name: str):
    pixels = np.full((48, 40, 3), 128, np.uint8)
    epsilon_background = 8 if name in UNWEIGHTED else 2
    published = apply_noise(pixels, control_noise(name, REGION, seed=0), REGION, 8 / 255, epsilon_background / 255)
    difference = np.abs(published.astype(int) - pixels)
    assert (difference[REGION] == 8).all()
    assert (difference[~REGION] == epsilon_background).all()


def test_bands_across_are_twelve_whatever_the_shape():
    across = control_noise("bands", np.full((48, 96), CLASSES.index("aAa")), seed=0)
    assert (across == across[:1]).all()
    borders = np.flatnonzero(np.diff(across[0, :, 0])) + 1
    np.testing.assert_array_equal(borders, np.arange(4, 96, 4))  # 12 waves from one side to the other
