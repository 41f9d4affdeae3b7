import numpy as np
import pytest

from unseg_hf.evaluation.controls import CONTROLS, control_noise
from unseg_hf.protection import apply_noise


def test_stripes_are_luminance_stripes_of_16_pixels_whatever_the_seed():
    noise = control_noise("stripes", np.zeros((64, 20), bool), seed=0)
    assert (noise.shape, noise.dtype, set(np.unique(noise))) == ((64, 20, 3), np.float32, {-1, 1})
    np.testing.assert_array_equal(noise[16:], noise[:-16])
    np.testing.assert_array_equal(noise[8:], -noise[:-8])
    assert (noise == noise[:, :1, :1]).all()
    np.testing.assert_array_equal(noise, control_noise("stripes", np.zeros((64, 20), bool), seed=1))


def test_random_signs_are_independent_by_pixel_channel_and_seed():
    region = np.zeros((100, 100), bool)
    noise, other = control_noise("random", region, seed=0), control_noise("random", region, seed=1)
    assert (noise.shape, noise.dtype, set(np.unique(noise))) == ((100, 100, 3), np.float32, {-1, 1})
    np.testing.assert_array_equal(noise, control_noise("random", region, seed=0))
    pairs = [(noise, other), (noise[..., 0], noise[..., 1]), (noise[1:], noise[:-1]), (noise[:, 1:], noise[:, :-1])]
    for first, second in pairs:
        assert abs(np.mean(first * second)) < 0.05
    assert abs(noise.mean()) < 0.05


def test_control_noise_refuses_an_unknown_name_and_a_region_with_channels():
    with pytest.raises(ValueError, match=r"unknown control noise 'plaid'; use one of random, stripes"):
        control_noise("plaid", np.zeros((4, 4), bool), seed=0)
    with pytest.raises(ValueError, match=r"\(4, 4, 1\); pass one mask"):
        control_noise("random", np.zeros((4, 4, 1), bool), seed=0)


def test_every_control_spends_the_same_budget_once_applied():
    region = np.zeros((48, 40), bool)
    region[10:30, 5:25] = True
    pixels = np.full((48, 40, 3), 128, np.uint8)
    for name in CONTROLS:
        published = apply_noise(pixels, control_noise(name, region, seed=0), region, 8 / 255, 2 / 255)
        difference = np.abs(published.astype(int) - pixels)
        assert (difference[region] == 8).all()
        assert (difference[~region] == 2).all()
