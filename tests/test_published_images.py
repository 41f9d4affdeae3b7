import io
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from labelled_discs import discs, encoded, write_discs, write_parquet
from PIL import Image
from torchmetrics.functional.image import peak_signal_noise_ratio

import unseg_hf
from unseg_hf.evaluation import controls, published_images
from unseg_hf.evaluation.controls import CONTROLS
from unseg_hf.evaluation.labelled_images import DatasetRows, ImageFiles, LabelledImages
from unseg_hf.evaluation.published_images import (
    ROUGH,
    Measured,
    annotation_squares,
    clean_squares,
    noise_settings,
    protection_of,
    publish,
    published_files,
    treat,
    without_public_noise,
)

BUDGET = {"epsilon": 8 / 255, "epsilon_background": 2 / 255}


@pytest.fixture
def images(tmp_path: Path) -> LabelledImages:
    return LabelledImages(DatasetRows(write_discs(tmp_path / "train.parquet", 4, seed=0)))


def pixels_of(folder: Path, images: LabelledImages) -> list[np.ndarray]:
    return [np.asarray(Image.open(file)) for file in published_files(folder, images)]


@pytest.mark.parametrize("noise", CONTROLS)
def test_every_control_is_published_with_its_budget_and_measured(noise: str, images: LabelledImages, tmp_path: Path):
    measured = publish(images, noise, tmp_path / "out", **BUDGET)
    settings = noise_settings(images, noise, **BUDGET, model=None)
    outside = 8 if noise == "whole" else 2
    assert (measured.max_inside, measured.max_outside, measured.unchanged) == (8, outside, 0)
    assert (settings["epsilon"], settings["epsilon_background"]) == (8 / 255, outside / 255)
    psnrs = []
    for labelled, file in zip(images, pixels_of(tmp_path / "out", images), strict=True):
        difference = np.abs(file.astype(int) - np.asarray(labelled.image))
        np.testing.assert_array_equal(difference.max(axis=2), np.where(labelled.region, 8, outside))
        pair = [torch.tensor(np.asarray(image), dtype=torch.float32) for image in (file, labelled.image)]
        psnrs.append(peak_signal_noise_ratio(*pair, data_range=255.0).item())
    assert measured.mean_psnr == pytest.approx(np.mean(psnrs), abs=1e-3)
    assert 0.3 < measured.mean_ssim < 1


def test_clean_files_are_the_images(images: LabelledImages, tmp_path: Path):
    measured = publish(images, "clean", tmp_path / "out", **BUDGET)
    assert (measured.unchanged, measured.mean_psnr, measured.mean_ssim) == (4, None, pytest.approx(1))
    for labelled, file in zip(images, pixels_of(tmp_path / "out", images), strict=True):
        np.testing.assert_array_equal(file, np.asarray(labelled.image))


def test_controls_of_many_classes_follow_the_label_map(tmp_path: Path):
    file = write_discs(tmp_path / "train.parquet", 2, seed=0)
    images = LabelledImages(DatasetRows(file, mask_column="instances"), kind="classes", background=[0])
    publish(images, "colour", tmp_path / "out", **BUDGET)
    for labelled, file in zip(images, pixels_of(tmp_path / "out", images), strict=True):
        change = file.astype(int) - np.asarray(labelled.image)
        means = [change[labelled.labels == label].mean(axis=0).round().astype(int).tolist() for label in range(3)]
        assert np.abs(means).max(axis=1).tolist() == [2, 8, 8]
        assert len({tuple(np.sign(mean)) for mean in means}) == 3


def test_published_files_do_not_depend_on_the_other_images(images: LabelledImages, tmp_path: Path):
    publish(images, "random", tmp_path / "all", **BUDGET)
    publish(images.first(2), "random", tmp_path / "few", **BUDGET)
    few, every = pixels_of(tmp_path / "few", images.first(2)), pixels_of(tmp_path / "all", images)
    np.testing.assert_array_equal(few[1], every[1])
    assert (every[0] != every[1]).any()


def test_an_incomplete_folder_is_made_anew_but_never_a_foreign_one(images: LabelledImages, tmp_path: Path):
    publish(images, "random", tmp_path / "random", **BUDGET)
    first = published_files(tmp_path / "random", images)[0]
    before = first.read_bytes()
    first.unlink()
    publish(images, "random", tmp_path / "random", **BUDGET)
    assert first.read_bytes() == before
    measured = publish(images, "random", tmp_path / "random", epsilon=4 / 255, epsilon_background=1 / 255)
    assert (measured.max_inside, measured.max_outside) == (4, 1)
    again = first.stat().st_mtime_ns
    assert publish(images, "random", tmp_path / "random", epsilon=4 / 255, epsilon_background=1 / 255) == measured
    assert first.stat().st_mtime_ns == again

    (tmp_path / "photos").mkdir()
    (tmp_path / "photos" / "000000.png").touch()
    with pytest.raises(FileExistsError, match=r"photos exists and has no manifest\.json"):
        publish(images, "random", tmp_path / "photos", **BUDGET)
    assert (tmp_path / "photos" / "000000.png").is_file()


def test_a_device_that_is_not_there_is_named(images: LabelledImages, tmp_path: Path):
    with pytest.raises(ValueError, match=r"generator \(embedded\) does not load on 'abacus'"):
        publish(images, "generator", tmp_path / "generator", **BUDGET, device="abacus")


def test_a_generator_over_the_budget_publishes_nothing(images: LabelledImages, tmp_path: Path, monkeypatch):
    def overspend(image, mask, epsilon, epsilon_background, tint):
        pixels = np.asarray(image).astype(int) + np.where(mask, 8, 3)[..., None]
        return SimpleNamespace(image=Image.fromarray(pixels.clip(0, 255).astype(np.uint8)))

    monkeypatch.setattr(
        unseg_hf.Protector, "from_pretrained", lambda model, device: SimpleNamespace(protect=overspend)
    )
    with pytest.raises(ValueError, match="differ by 3 grey levels outside the region, over the budget of 2"):
        publish(images, "generator", tmp_path / "generator", **BUDGET)
    assert not (tmp_path / "generator").exists()


def test_the_generator_publishes_the_protectors_pixels_however_it_is_asked(protector_of, tmp_path, monkeypatch):
    file = write_discs(tmp_path / "train.parquet", 1, seed=0)
    images = LabelledImages(DatasetRows(file, instance_column="instances"))
    random = protector_of(object_finder_width=8)
    with torch.no_grad():
        for mlp in random.model.noise_head.noise_mlps:
            mlp[-1].weight *= 30  # noise fills the budget
    left = torch.where(torch.arange(16) < 8, 1.0, -1.0).expand(1, 16, 16)
    monkeypatch.setattr("unseg_hf.protection.find_objects", lambda finder, pixels: (left, True))
    random.model.save_pretrained(tmp_path / "model")
    random.processor.save_pretrained(tmp_path / "model")
    protector = unseg_hf.Protector.from_pretrained(tmp_path / "model")
    labelled = images[0]
    prompts = {
        "generator": {"mask": labelled.region},
        "generator-per-segment": {"masks": [labelled.instances == 1, labelled.instances == 2], "mode": "per_segment"},
        "generator-boxes": {"boxes": labelled.boxes()},
        "generator-found": {},
        "generator-whole-image": {"whole_image": True},
    }
    published = {}
    for noise, prompt in prompts.items():
        measured = publish(images, noise, tmp_path / noise, model=str(tmp_path / "model"), **BUDGET)
        assert 0 < measured.max_inside <= 8
        assert (measured.max_outside > 2) == (noise in ROUGH)
        (published[noise],) = pixels_of(tmp_path / noise, images)
        expected = protector.protect(labelled.image, **prompt, **BUDGET).image
        np.testing.assert_array_equal(published[noise], np.asarray(expected))
    assert len({pixels.tobytes() for pixels in published.values()}) == len(prompts)


def test_with_several_classes_each_segment_has_the_noise_of_its_class(protector_of, tmp_path: Path):
    images, numbers = discs(1, 30, 40, seed=0)
    labels = np.where(numbers == 0, 0, 4 + numbers).astype(np.uint8)
    write_parquet(tmp_path / "train.parquet", {"image": [encoded(images[0])], "mask": [encoded(labels[0])]})
    published = LabelledImages(DatasetRows(tmp_path / "train.parquet"))
    protector = protector_of(noise_codes=3)
    protector.model.save_pretrained(tmp_path / "model")
    protector.processor.save_pretrained(tmp_path / "model")
    publish(published, "generator-per-segment", tmp_path / "out", model=str(tmp_path / "model"), **BUDGET)
    masks = [labels[0] == value for value in (0, 5, 6)]
    found = unseg_hf.Protector.from_pretrained(tmp_path / "model").protect(
        published[0].image, masks=masks, classes=[0, 1, 2], mode="per_segment", **BUDGET
    )
    np.testing.assert_array_equal(pixels_of(tmp_path / "out", published)[0], np.asarray(found.image))


def test_settings_follow_the_generators_weights(images: LabelledImages, tmp_path: Path):
    for text in ("a", "b"):
        (tmp_path / "model").mkdir(exist_ok=True)
        (tmp_path / "model" / "model.safetensors").write_text(text)
        settings = noise_settings(images, "generator", **BUDGET, model=str(tmp_path / "model"))
        if text == "a":
            first = settings
    assert settings != first


def test_other_noise_codes_make_other_bands(images: LabelledImages, tmp_path: Path, monkeypatch):
    publish(images, "bands", tmp_path / "out", **BUDGET)
    before = pixels_of(tmp_path / "out", images)
    for module in (controls, published_images):
        monkeypatch.setattr(module, "MASK", "aaa")
    publish(images, "bands", tmp_path / "out", **BUDGET)
    after = pixels_of(tmp_path / "out", images)
    assert all((one != other).any() for one, other in zip(before, after, strict=True))


def test_bands_are_those_that_the_generator_has_for_the_image_and_the_budget(images: LabelledImages, tmp_path: Path):
    publish(images, "bands", tmp_path / "small", epsilon=4 / 255, epsilon_background=0.0)
    publish(images, "bands", tmp_path / "usual", epsilon=8 / 255, epsilon_background=0.0)
    for folder, wanted in (("small", {-1}), ("usual", {-1, 1})):
        for labelled, published in zip(images, pixels_of(tmp_path / folder, images), strict=True):
            signs = np.sign(published.astype(int) - np.asarray(labelled.image))[labelled.region]
            red, green, _ = signs[(signs != 0).all(axis=1)].T
            # Green is red's opposite, or a quarter of a wave before it.
            assert set(red * green) == wanted


def test_a_tint_is_for_all_or_for_none_where_that_is_asked_for(images: LabelledImages, tmp_path: Path):
    for noise in ("generator", "bands"):
        for tint, flat in (("always", True), ("never", False)):
            folder = tmp_path / f"{noise}-{tint}"
            publish(images, noise, folder, epsilon=8 / 255, epsilon_background=0.0, tint=tint)
            for labelled, published in zip(images, pixels_of(folder, images), strict=True):
                changes = (published.astype(int) - np.asarray(labelled.image))[labelled.region]
                signs = {tuple(sign) for sign in np.sign(changes) if sign.all()}
                assert (len(signs) == 1) == flat
    settings = [
        noise_settings(images, noise, **BUDGET, model=None, tint=tint)
        for noise in ("generator", "bands", "random")
        for tint in ("auto", "always")
    ]
    assert [one == other for one, other in zip(settings[::2], settings[1::2], strict=True)] == [False, False, True]


def test_where_waves_say_little_bands_are_the_tint_that_stands_out(tmp_path: Path):
    rows, columns = np.mgrid[:60, :60]
    grey = np.repeat((rows + 90)[..., None], 3, axis=2).astype(np.uint8)
    redder = np.stack([columns + 90, rows + 90, rows + 90], axis=-1).astype(np.uint8)
    lines = (rows % 6 == 0).astype(np.uint8)
    for name, pixels, wanted in (("grey", grey, (8, -8, -8)), ("redder", redder, (8, -8, 8))):
        files = tmp_path / f"{name}.png", tmp_path / f"{name}_mask.png"
        for file, array in zip(files, (pixels, lines * 255), strict=True):
            Image.fromarray(array).save(file)
        images = LabelledImages(ImageFiles([files], tmp_path))
        publish(images, "bands", tmp_path / name, epsilon=8 / 255, epsilon_background=0.0)
        (published,) = pixels_of(tmp_path / name, images)
        assert {tuple(change) for change in (published.astype(int) - pixels)[lines > 0]} == {wanted}


def test_victims_see_the_treated_files(images: LabelledImages, tmp_path: Path):
    publish(images, "stripes", tmp_path / "stripes", **BUDGET)
    seen = {}
    for treatment in ("none", "jpeg75", "half"):
        treat(tmp_path / "stripes", images, treatment, 32, tmp_path / f"{treatment}.npy")
        seen[treatment] = np.load(tmp_path / f"{treatment}.npy")
        assert seen[treatment].shape == (4, 3, 32, 32)
    for index, file in enumerate(published_files(tmp_path / "stripes", images)):
        buffer = io.BytesIO()
        Image.open(file).save(buffer, "JPEG", quality=75)
        jpeg = torch.from_numpy(np.array(Image.open(buffer))).permute(2, 0, 1)[None].float()
        expected = {"jpeg75": [(32, 32)], "half": [(22, 26), (32, 32)]}
        for treatment, sizes in expected.items():
            pixels = jpeg if treatment == "jpeg75" else torch.tensor(np.array(Image.open(file))).permute(2, 0, 1)[None]
            for size in sizes:
                pixels = torch.nn.functional.interpolate(pixels.float(), size, mode="bilinear", antialias=True)
            assert np.abs(seen[treatment][index] - pixels[0].numpy()).max() <= 2
    assert (seen["none"] != seen["jpeg75"]).any()
    before = (tmp_path / "half.npy").stat().st_mtime_ns
    treat(tmp_path / "stripes", images, "half", 32, tmp_path / "half.npy")
    assert (tmp_path / "half.npy").stat().st_mtime_ns == before


def test_removal_is_fitted_to_the_published_files(images: LabelledImages, tmp_path: Path):
    publish(images, "stripes", tmp_path / "stripes", **BUDGET)
    publish(images.first(2), "stripes", tmp_path / "attacker", **BUDGET)
    attacker = (tmp_path / "attacker", images.first(2))
    for name in ("median3", "denoiser"):
        treat(tmp_path / "stripes", images, f"removal:{name}", 32, tmp_path / f"{name}.npy", attacker)
        assert np.load(tmp_path / f"{name}.npy").shape == (4, 3, 32, 32)
    with pytest.raises(ValueError, match="denoiser"):
        treat(tmp_path / "stripes", images, "removal:denoiser", 32, tmp_path / "without.npy")


def test_who_has_the_public_generator_can_subtract_what_it_adds(images: LabelledImages, tmp_path: Path):
    budget = {"epsilon": 8 / 255, "epsilon_background": 0.0}
    publish(images, "generator", tmp_path / "generator", **budget)
    protect = protection_of(images, "generator", *budget.values(), None, "auto", "cpu")
    for labelled, published in zip(images, pixels_of(tmp_path / "generator", images), strict=True):
        found = np.asarray(without_public_noise(Image.fromarray(published), labelled, protect)).astype(int)
        before, after = (np.abs(one - np.asarray(labelled.image)).mean() for one in (published.astype(int), found))
        assert after < before / 3
    treat(tmp_path / "generator", images, "removal:generator", 32, tmp_path / "seen.npy", protect=protect)
    assert np.load(tmp_path / "seen.npy").shape == (4, 3, 32, 32)


def test_annotations_are_resized_from_their_own_size_by_nearest_neighbour(tmp_path: Path):
    file = write_discs(tmp_path / "train.parquet", 2, seed=0)
    images = LabelledImages(DatasetRows(file, instance_column="instances"))
    labels, instances = annotation_squares(images, 64)
    assert labels.shape == instances.shape == clean_squares(images, 64)[:, 0].shape
    for index, labelled in enumerate(images):
        rows, columns = (np.arange(64) + 0.5) * 44 // 64, (np.arange(64) + 0.5) * 52 // 64
        picked = np.ix_(rows.astype(int), columns.astype(int))
        np.testing.assert_array_equal(labels[index], labelled.labels[picked])
        np.testing.assert_array_equal(instances[index], labelled.instances[picked])
    assert annotation_squares(LabelledImages(DatasetRows(file)), 64)[1] is None


def test_the_mean_psnr_leaves_unchanged_images_out():
    grey, everywhere = np.full((8, 8, 3), 100, np.uint8), np.ones((8, 8), bool)
    measured = Measured()
    for levels in (1, 0, 10):
        measured.add(grey, grey + np.uint8(levels), everywhere)
    psnrs = [20 * np.log10(255 / levels) for levels in (1, 10)]
    assert measured.mean_psnr == pytest.approx(np.mean(psnrs))
