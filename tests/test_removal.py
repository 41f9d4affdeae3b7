from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from scipy.ndimage import gaussian_filter

from unseg_hf.evaluation import removal
from unseg_hf.evaluation.removal import REMOVALS, fit_removal


def photos(count: int, height: int = 96, width: int = 128, seed: int = 0) -> np.ndarray:
    """Smooth random pictures, (count, height, width, 3) float in grey levels."""
    noise = np.random.default_rng(seed).normal(size=(count, height, width, 3))
    smooth = gaussian_filter(noise, (0, 6, 6, 0), mode="wrap")
    return (128 + smooth / smooth.std() * 25).clip(20, 235)


def stripes(height: int, width: int, period: float) -> np.ndarray:
    wave = np.sin(2 * np.pi * np.arange(height) / period)[:, None, None]
    return np.broadcast_to(wave * np.array([6.0, -6.0, 6.0]), (height, width, 3))


def save(folder: Path, images: np.ndarray | list) -> list[Path]:
    folder.mkdir(exist_ok=True)
    files = [folder / f"{index}.png" for index in range(len(images))]
    for image, file in zip(images, files, strict=True):
        Image.fromarray(np.rint(image).astype(np.uint8)).save(file)
    return files


def error(remove, noisy: np.ndarray, clean: np.ndarray) -> float:
    """Mean square error after removal, as a share of that before."""
    after = np.asarray(remove(Image.fromarray(np.rint(noisy).astype(np.uint8)))).astype(float)
    return float(np.mean((after - clean) ** 2) / np.mean((noisy - clean) ** 2))


@pytest.mark.parametrize("name", ["mean", "notch"])
def test_a_pattern_that_all_images_share_is_found_and_taken_out(name: str, tmp_path: Path):
    clean = photos(40)
    noisy = clean + stripes(96, 128, 12.8)
    remove = fit_removal(name, save(tmp_path / "noisy", noisy))
    assert np.mean([error(remove, noisy[index], clean[index]) for index in range(6)]) < 0.4


def test_the_pattern_is_subtracted_as_strongly_as_it_is_found(tmp_path: Path):
    clean = photos(40, 96, 256)
    pattern = stripes(96, 256, 12.8)
    noisy = clean + pattern * np.where(np.arange(256) < 128, 1.0, 0.1)[None, :, None]
    remove = fit_removal("mean", save(tmp_path / "noisy", noisy))
    before, after, weak = 0.0, 0.0, 0.0
    for index in range(6):
        cleaned = np.asarray(remove(Image.fromarray(np.rint(noisy[index]).astype(np.uint8)))).astype(float)
        before += np.mean((noisy[index] - clean[index])[:, :96] ** 2)
        after += np.mean((cleaned - clean[index])[:, :96] ** 2)
        weak += np.mean((cleaned - clean[index])[:, 192:] ** 2)
    assert after < 0.5 * before
    # Subtracted in full where it is weak, it would have left four fifths of its energy there.
    assert weak < 0.5 * 6 * np.mean(pattern**2)


def test_a_pattern_that_scales_with_the_image_is_found_too(tmp_path: Path):
    sizes = [(96, 128), (144, 192)]
    clean = [image for size in sizes for image in photos(20, *size)]
    noisy = [image + stripes(*image.shape[:2], period=image.shape[1] / 10) for image in clean]
    remove = fit_removal("mean", save(tmp_path / "noisy", noisy))
    for index in (0, 3, 20, 23):
        assert error(remove, noisy[index], clean[index]) < 0.45


@pytest.mark.parametrize("name", ["mean", "notch"])
def test_images_without_a_pattern_are_hardly_changed(name: str, tmp_path: Path):
    clean = photos(40)
    remove = fit_removal(name, save(tmp_path / "clean", clean))
    image = Image.fromarray(clean[0].astype(np.uint8))
    assert np.abs(np.asarray(remove(image)).astype(int) - np.asarray(image)).mean() < 2.5


@pytest.mark.parametrize("name", ["median3", "bilateral"])
def test_filters_take_noise_of_single_pixels(name: str, tmp_path: Path):
    clean = photos(1)
    noisy = clean + np.random.default_rng(0).choice([-8.0, 8.0], clean.shape)
    assert error(fit_removal(name, save(tmp_path / "noisy", noisy)), noisy[0], clean[0]) < 0.5


def test_the_denoiser_learns_from_pairs_and_repeats_itself(tmp_path: Path, monkeypatch):
    def short(published, pairs):
        return removal._fit_denoiser(published, pairs, steps=60)

    monkeypatch.setitem(REMOVALS, "denoiser", short)
    clean = np.rint(photos(8, 64, 64)).astype(np.uint8)
    noisy = np.rint(clean + stripes(64, 64, 12.8)).astype(np.uint8)
    files = save(tmp_path / "noisy", noisy)
    remove = fit_removal("denoiser", files, list(zip(noisy[:6], clean[:6], strict=True)))
    assert error(remove, noisy[7].astype(float), clean[7]) < 0.6
    again = fit_removal("denoiser", files, list(zip(noisy[:6], clean[:6], strict=True)))
    image = Image.open(files[0])
    np.testing.assert_array_equal(np.asarray(remove(image)), np.asarray(again(image)))
    with pytest.raises(ValueError, match="denoiser: there are no pairs"):
        fit_removal("denoiser", files)


def test_odd_tiny_and_large_images_and_a_single_one(tmp_path: Path, monkeypatch):
    monkeypatch.setitem(REMOVALS, "denoiser", lambda *given: removal._fit_denoiser(*given, steps=2))
    for sizes in ([(20, 33), (600, 31), (1, 1)], [(33, 20)]):
        images = [np.full((*size, 3), 99.0) for size in sizes]
        files = save(tmp_path / "odd", images)
        pair = (images[0].astype(np.uint8), images[0].astype(np.uint8))
        for name in REMOVALS:
            remove = fit_removal(name, files, [pair])
            for file in files:
                with Image.open(file) as image:
                    assert remove(image).size == image.size, name


def test_what_makes_no_sense_is_refused(tmp_path: Path):
    with pytest.raises(ValueError, match="unknown removal 'magic'; use one of mean, notch"):
        fit_removal("magic", [tmp_path / "a.png"])
    with pytest.raises(ValueError, match="mean: no published images"):
        fit_removal("mean", [])


def test_grey_noise_is_cut_at_16_levels_a_channel():
    pixels = np.full((1, 65, 65, 3), 100.0)[0]
    pixels[32, 32] += 14
    grey = removal._residual(removal._opponent(torch.from_numpy(pixels).permute(2, 0, 1).float()))[0, 32, 32]
    assert abs(grey) == pytest.approx(14 * 3**0.5, rel=0.01)
