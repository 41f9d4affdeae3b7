"""The contracts: the bound on saved files, grey stays grey, one result whatever the way in."""

import copy
import io
import json
import shutil
import threading
import tracemalloc
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image

from unseg_hf import ImageFileError, Prompt, Protector, UnSegProcessor, image_files, protection
from unseg_hf.fidelity import compare
from unseg_hf.inputs import given_masks, mask_of_box, read_region
from unseg_hf.noise_choice import texture
from unseg_hf.protection import ALL_OVER, apply_noise

RNG = np.random.default_rng(0)


def photo(height=60, width=80, channels=3):
    """Smooth enough to be a photo, with black and white corners where clipping happens."""
    y, x = np.mgrid[:height, :width] / max(height, width)
    planes = [np.clip(300 * (0.4 * y + 0.6 * x + 0.1 * np.sin(9 * x + c)) - 20, 0, 255) for c in range(channels)]
    return np.stack(planes, axis=-1).astype(np.uint8)


def box_mask(height=60, width=80):
    mask = np.zeros((height, width), dtype=bool)
    mask[height // 4 : height // 2 + 1, width // 4 : 3 * width // 4 + 1] = True
    return mask


def difference(a, b):
    return np.abs(np.asarray(a, dtype=np.int64) - np.asarray(b, dtype=np.int64))


@settings(max_examples=60, deadline=None)
@given(
    height=st.integers(1, 40),
    width=st.integers(1, 40),
    channels=st.sampled_from([1, 3]),
    deep=st.booleans(),
    epsilon=st.floats(0, 1),
    share=st.floats(0, 1),
    seed=st.integers(0, 2**16),
)
def test_noise_never_exceeds_the_budget_whatever_the_noise(height, width, channels, deep, epsilon, share, seed):
    rng = np.random.default_rng(seed)
    dtype = np.uint16 if deep and channels == 1 else np.uint8
    top = np.iinfo(dtype).max
    pixels = rng.choice(np.array([0, 1, top // 2, top - 1, top], dtype=dtype), (height, width, channels))
    noise = rng.choice(np.float32([-1, -0.5, 0.03, 0.999999, 1]), (height, width, 3))
    region = rng.random((height, width)) < 0.5
    protected = apply_noise(pixels, noise, region, epsilon, share * epsilon)
    assert protected.dtype == dtype
    change = difference(protected, pixels).max(axis=2)
    assert change[region].max(initial=0) <= epsilon * top + 1e-6
    assert change[~region].max(initial=0) <= share * epsilon * top + 1e-6


def test_full_noise_uses_the_whole_budget():
    grey = np.full((4, 4, 3), 100, np.uint8)
    region = np.eye(4, dtype=bool)
    protected = apply_noise(grey, np.ones((4, 4, 3), np.float32), region, 8 / 255, 2 / 255)
    np.testing.assert_array_equal(protected[..., 0], np.where(region, 108, 102))


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    height=st.integers(1, 90),
    width=st.integers(1, 90),
    mode=st.sampled_from(["RGB", "RGBA", "L", "LA", "P", "CMYK", "1", "I;16"]),
    suffix=st.sampled_from([".png", ".tif", ".webp"]),
    epsilon=st.sampled_from([0, 0.5, 1, 4, 8, 16.7, 255]),
    data=st.data(),
)
def test_saved_files_keep_the_bound_in_every_mode(
    loud_protector, tmp_path, height, width, mode, suffix, epsilon, data
):
    if mode == "I;16" and suffix == ".webp":
        suffix = ".png"
    background = data.draw(st.floats(0, 1)) * epsilon
    image = Image.fromarray(photo(height, width))
    image = (
        Image.fromarray(photo(height, width, 1)[..., 0].astype(np.uint16) * 257)
        if mode == "I;16"
        else image.convert(mode)
    )
    before = image_files.from_pil(image)
    mask = box_mask(height, width)
    result = loud_protector.protect(image, mask=mask, epsilon=epsilon / 255, epsilon_background=background / 255)
    image_files.write(result.picture, tmp_path / f"out{suffix}")
    after = image_files.read(tmp_path / f"out{suffix}")
    scale = before.max_value / 255
    change = difference(after.pixels, before.pixels).max(axis=2)
    assert change[mask].max(initial=0) <= epsilon * scale + 1e-6
    assert change[~mask].max(initial=0) <= background * scale + 1e-6
    if before.pixels.shape[2] == 1:
        assert (after.pixels == after.pixels[:, :, :1]).all()
    if before.alpha is not None and (before.alpha != 255).any():
        np.testing.assert_array_equal(after.alpha, before.alpha)


@pytest.mark.slow
def test_an_image_that_stays_as_it_was_is_said_to_be(loud_protector):
    said = "no pixel was changed"
    assert said in loud_protector.protect(photo(), whole_image=True, epsilon=0.3 / 255).notes[-1]
    assert said in loud_protector.protect(photo(), mask=box_mask(), epsilon=0).notes[-1]
    assert not any(said in note for note in loud_protector.protect(photo(), mask=box_mask(), epsilon=8 / 255).notes)
    nothing = loud_protector.protect(photo(), masks=[], epsilon=8 / 255, epsilon_background=0)
    assert nothing.unchanged
    assert nothing.notes == ("the mask is empty: nothing is protected",)


@pytest.mark.parametrize(("height", "width"), [(3000, 5000), (1, 5000), (5000, 1), (1, 1)])
def test_extreme_sizes_keep_the_bound_on_file(loud_protector, tmp_path, height, width):
    pixels = photo(height, width)
    mask = box_mask(height, width)
    result = loud_protector.protect(pixels, mask=mask)
    image_files.write(result.picture, tmp_path / "out.png")
    change = difference(image_files.read(tmp_path / "out.png").pixels, pixels).max(axis=2)
    assert change[mask].max(initial=0) <= 8
    assert change[~mask].max(initial=0) <= 2
    assert change[mask].max() > 0


def test_boxes_and_points_may_be_arrays_or_tensors(tiny_protector):
    plain = tiny_protector.protect(photo(), points=[[40, 30], [5, 5]], point_labels=[1, 0])
    for kind in (np.array, torch.tensor):
        same = tiny_protector.protect(photo(), points=kind([[40, 30], [5, 5]]), point_labels=kind([1, 0]))
        np.testing.assert_array_equal(same.region, plain.region)
        assert tiny_protector.protect(photo(), boxes=kind([[1.0, 2.0, 30.5, 40.0]])).region.any()


def test_jpeg_masks_are_read_at_half_their_range(loud_protector, tmp_path):
    Image.fromarray(box_mask().astype(np.uint8) * 255).save(tmp_path / "mask.jpg", quality=75)
    np.testing.assert_array_equal(loud_protector.protect(photo(), mask=tmp_path / "mask.jpg").region, box_mask())


def test_a_checkpoint_without_a_noise_head_protects_nothing(tiny_sam_config, tmp_path):
    from transformers import SamModel

    from unseg_hf import UnSegProcessor

    SamModel(tiny_sam_config()).save_pretrained(tmp_path)
    UnSegProcessor.for_image_size(64).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="no trained generator"):
        Protector.from_pretrained(tmp_path)


def test_a_generator_in_a_subfolder_loads_with_its_processor(saved_generator, tmp_path):
    shutil.copytree(saved_generator, tmp_path / "part")
    inside = Protector.from_pretrained(tmp_path, subfolder="part")
    beside = Protector.from_pretrained(saved_generator)
    results = [one.protect(photo(), mask=box_mask()).picture.pixels for one in (inside, beside)]
    np.testing.assert_array_equal(*results)


def test_every_way_in_gives_the_same_pixels(loud_protector, tmp_path):
    pixels, mask = photo(), box_mask()
    Image.fromarray(pixels).save(tmp_path / "photo.png")
    Image.fromarray(mask).save(tmp_path / "mask.png")
    expected = np.asarray(loud_protector.protect(pixels, mask=mask).image)
    images = [
        Image.fromarray(pixels),
        tmp_path / "photo.png",
        str(tmp_path / "photo.png"),
        (tmp_path / "photo.png").read_bytes(),
        io.BytesIO((tmp_path / "photo.png").read_bytes()),
        torch.from_numpy(pixels).permute(2, 0, 1),
        torch.from_numpy(pixels).permute(2, 0, 1).float() / 255,
        pixels.astype(np.float64) / 255,
    ]
    masks = [
        Image.fromarray(mask),
        tmp_path / "mask.png",
        mask.astype(np.uint8) * 7,
        mask.astype(np.float32) * 0.9,
        torch.from_numpy(mask)[None],
        mask[:, :, None].astype(np.int64) * -3,
        np.repeat(mask[:, :, None], 3, axis=2),
        torch.from_numpy(mask).to(torch.bfloat16),
        Image.fromarray(mask.astype(np.float32)),
        Image.fromarray(mask.astype(np.uint8) * 255).convert("RGB"),
    ]
    for image in images:
        np.testing.assert_array_equal(np.asarray(loud_protector.protect(image, mask=mask).image), expected)
    for other in masks:
        np.testing.assert_array_equal(np.asarray(loud_protector.protect(pixels, mask=other).image), expected)


@pytest.mark.parametrize("kind", ["embedded", "random"])
def test_bfloat16_moves_few_pixels_and_those_by_one_grey_level(kind, build_generator, tiny_sam_config, tmp_path):
    checkpoint = None
    if kind == "random":
        checkpoint = tmp_path
        # Deep enough for errors to add up, with position biases as in the paper's generator and noise in all levels.
        vision = {"num_hidden_layers": 12, "use_rel_pos": True, "window_size": 3, "global_attn_indexes": [2, 5, 8, 11]}
        generator = build_generator(tiny_sam_config(**vision))
        with torch.no_grad():
            for name, parameter in generator.named_parameters():
                if "rel_pos" in name:
                    parameter.normal_(0, 0.2, generator=torch.Generator().manual_seed(0))
            for mlp in generator.noise_head.noise_mlps:
                mlp[-1].weight *= 30
        generator.save_pretrained(tmp_path)
        UnSegProcessor.for_image_size(64).save_pretrained(tmp_path)
    moved = []
    # One alone says little: what rounding does to a photo is drawn anew with every order of sums.
    for picture in (photo(240, 320), photo(320, 240), photo(280, 280), photo(200, 400)):
        exact, fast = (
            Protector.from_pretrained(checkpoint, bf16=bf16).protect(picture, whole_image=True).picture.pixels
            for bf16 in (False, True)
        )
        levels = np.bincount(difference(exact, picture).ravel(), minlength=9)
        assert len(levels) == 9
        assert kind == "embedded" or levels.min() > 1000
        moved.append(difference(exact, fast).max(axis=2))
        assert moved[-1].max() <= 1
    assert np.mean([some.mean() for some in moved]) <= 0.1


def test_pixels_do_not_depend_on_what_was_protected_before(loud_protector):
    pixels, mask = photo(), box_mask()
    first = loud_protector.protect(pixels, mask=mask)
    loud_protector.protect(photo(33, 90), whole_image=True)
    np.testing.assert_array_equal(first.picture.pixels, loud_protector.protect(pixels, mask=mask).picture.pixels)


def test_noise_depends_on_the_image_and_on_the_mask(loud_protector):
    pixels, mask = photo(), box_mask()
    base = loud_protector.protect(pixels, mask=mask)
    other_mask = loud_protector.protect(pixels, mask=~mask)
    other_image = loud_protector.protect(255 - pixels, mask=mask)
    noise = [p.picture.pixels.astype(int) - p.original.pixels for p in (base, other_mask, other_image)]
    assert (noise[0] != noise[1]).any()
    assert (noise[0] != noise[2]).any()


def test_grey_stays_one_channel(loud_protector):
    result = loud_protector.protect(Image.fromarray(photo(channels=1)[..., 0]), whole_image=True)
    assert result.image.mode == "L"
    assert difference(result.picture.pixels, result.original.pixels).max() > 0


def test_mask_is_drawn_on_the_upright_picture(loud_protector, tmp_path):
    pixels = photo(40, 60)
    exif = Image.Exif()
    exif[274] = 6  # the camera was turned: shown after a quarter turn to the right
    Image.fromarray(np.ascontiguousarray(np.rot90(pixels))).save(tmp_path / "turned.png", exif=exif)
    result = loud_protector.protect(tmp_path / "turned.png", mask=box_mask(40, 60))
    assert result.picture.pixels.shape == (40, 60, 3)
    np.testing.assert_array_equal(result.original.pixels, pixels)


@pytest.mark.parametrize("mode", ["union", "per_segment"])
def test_label_map_of_many_labels_is_not_held_as_a_mask_for_each(loud_protector, mode):
    labels = np.kron(np.arange(1, 257, dtype=np.uint16).reshape(16, 16), np.ones((32, 32), dtype=np.uint16))
    labels[::8] = 0
    given = photo(512, 512)
    tracemalloc.start()
    try:
        result = loud_protector.protect(given, label_map=labels, ignore_labels=(0,), mode=mode)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert result.masks == 256
    assert np.array_equal(result.region, labels > 0)
    assert peak < 256 * labels.size / 2  # a byte a pixel and mask


def test_label_map_leaves_ignored_labels_out(loud_protector):
    labels = np.zeros((60, 80), np.uint8)
    labels[:20], labels[20:30], labels[30:40] = 5, 9, 255
    result = loud_protector.protect(photo(), label_map=labels)
    np.testing.assert_array_equal(result.region, (labels == 5) | (labels == 9))
    assert result.masks == 2
    everything_but_5 = loud_protector.protect(photo(), label_map=labels, ignore_labels=(5,))
    np.testing.assert_array_equal(everything_but_5.region, labels != 5)


def test_an_image_without_objects_is_protected_at_the_background_budget(loud_protector):
    result = loud_protector.protect(photo(), mask=np.zeros((60, 80), bool))
    assert result.report["max_noise_background"] <= 2
    assert result.report["notes"] == ["the mask is empty: the background budget applies everywhere"]
    none = loud_protector.protect(photo(), mask=np.zeros((60, 80), bool), epsilon=8 / 255, epsilon_background=0)
    assert (none.picture.pixels == none.original.pixels).all()
    assert none.report["notes"] == ["the mask is empty: nothing is protected"]


def test_per_segment_prompts_each_mask_by_itself(loud_protector):
    left, right = np.zeros((60, 80), bool), np.zeros((60, 80), bool)
    left[10:50, 5:35], right[10:50, 45:75] = True, True
    union = loud_protector.protect(photo(), masks=[left, right])
    segments = loud_protector.protect(photo(), masks=[left, right], mode="per_segment")
    alone = loud_protector.protect(photo(), mask=left)
    inside = segments.picture.pixels[left].astype(int) - segments.original.pixels[left]
    by_itself = alone.picture.pixels[left].astype(int) - alone.original.pixels[left]
    assert difference(inside, by_itself).max() <= 1  # decoded in another batch: rounding alone may differ
    assert (segments.picture.pixels != union.picture.pixels).any()
    np.testing.assert_array_equal(segments.picture.pixels[~(left | right)], union.picture.pixels[~(left | right)])


@pytest.fixture(scope="module")
def coded_protector(protector_of):
    """A noise for masks and three for classes, far enough apart to show in 8-bit pixels."""
    protector = protector_of(noise_codes=4)
    with torch.no_grad():
        for mlp in protector.model.noise_head.noise_mlps:
            mlp[-1].weight *= 30
    return protector


def test_segments_of_a_class_have_its_noise_in_every_image(coded_protector):
    def noise(image, mask, class_id):
        result = coded_protector.protect(image, masks=[mask], classes=[class_id], mode="per_segment")
        return result.picture.pixels[mask].astype(int) - result.original.pixels[mask]

    grey, mask = np.full((60, 80, 3), 128, np.uint8), box_mask()
    of_classes = [noise(grey, mask, number) for number in range(3)]
    of_masks = coded_protector.protect(grey, mask=mask).picture.pixels[mask].astype(int) - 128
    for i in range(3):
        assert difference(of_classes[i - 1], of_classes[i]).mean() > 1
        assert difference(of_masks, of_classes[i]).mean() > 1
    np.testing.assert_array_equal(noise(grey, mask, 5), of_classes[2])  # classes begin again at the first noise
    labels = np.where(mask, 1, 0)
    labels[50:, 60:] = 2
    mapped = coded_protector.protect(grey, label_map=labels, mode="per_segment")
    inside = mapped.picture.pixels[mask].astype(int) - 128
    assert difference(inside, of_classes[1]).mean() < difference(inside, of_classes[2]).mean() / 4
    # Together they are one object, as in the paper.
    union = coded_protector.protect(grey, masks=[mask], classes=[2])
    np.testing.assert_array_equal(union.picture.pixels[mask].astype(int) - 128, of_masks)


def test_the_code_for_tints_is_for_what_is_too_low_for_waves(coded_protector, protector_of):
    with_tint = protector_of(noise_codes=4, tint_codes=[2])
    with_tint.model.load_state_dict(coded_protector.model.state_dict())

    def noise(protector, image, **prompt):
        result = protector.protect(image, **prompt)
        return result.picture.pixels.astype(int) - result.original.pixels

    one_channel = np.full((60, 80), 128, np.uint8)
    grey = np.repeat(one_channel[..., None], 3, axis=2)
    yellow = grey - np.uint8([0, 0, 9])
    # A wave is a patch of the encoder: here a quarter of the longer side, 20 pixels. Without colour two are asked for,
    # and two and a half of eight parts.
    for image, height, parts, gets_it in (
        (one_channel, 8, 1, False), (one_channel, 18, 8, False), (yellow, 14, 1, True), (yellow, 18, 1, False),
        (grey, 24, 1, True), (grey, 44, 1, False), (yellow, 44, 8, True), (yellow, 44, 7, False),
        (grey, 44, 8, True), (yellow, 52, 8, False),
    ):  # fmt: skip
        low = np.zeros((60, 80), bool)
        for part in range(parts):
            low[4 : 4 + height, 10 + 8 * part : 16 + 8 * part] = True
        for tint, has_it in (("auto", gets_it), ("always", image is not one_channel), ("never", False)):
            protected = with_tint.protect(image, mask=low, tint=tint)
            assert protected.tinted == protected.report["tinted"] == has_it
            assert any("one channel takes none" in note for note in protected.notes) == (has_it < (tint == "always"))
            wanted = {"masks": [low], "classes": [1], "mode": "per_segment"} if has_it else {"mask": low}
            expected = coded_protector.protect(image, **wanted).picture.pixels
            np.testing.assert_array_equal(protected.picture.pixels[low], expected[low])
        of_class = noise(coded_protector, image, masks=[low], classes=[1], mode="per_segment")[low]
        of_masks = noise(coded_protector, image, mask=low)[low]
        assert difference(of_masks, of_class).mean() > 0.5
        for class_id in range(3):
            own = (
                noise(protector, image, masks=[low], classes=[class_id], mode="per_segment")[low]
                for protector in (with_tint, coded_protector)
            )
            np.testing.assert_array_equal(*own)
    for none in (None, []):
        coded_protector.model.config.tint_codes = none
        always = coded_protector.protect(yellow, mask=low, tint="always")
        assert always.notes == ("it has noise that is no tint: this generator has none",)
    coded_protector.model.config.tint_codes = None
    np.testing.assert_array_equal(always.picture.pixels, coded_protector.protect(yellow, mask=low).picture.pixels)


def test_smooth_parts_get_their_own_epsilon_and_small_budgets_the_faint_code(coded_protector, protector_of):
    protector = protector_of(noise_codes=4, faint_code=2, epsilon_smooth=2 / 255)
    protector.model.load_state_dict(coded_protector.model.state_dict())
    # A meadow under, over or beside a sky.
    pixels = np.full((240, 320, 3), 128, np.uint8)
    pixels[50:] = np.random.default_rng(0).integers(60, 200, (190, 320, 3))
    sky, meadow = np.s_[:35], np.s_[70:]

    def noise(protector, picture=pixels, **options):
        result = protector.protect(picture, **({"whole_image": True} | options))
        return result.picture.pixels.astype(int) - result.original.pixels

    meadow_mask = np.zeros((240, 320), bool)
    meadow_mask[80:] = True
    softened, full = noise(protector), noise(coded_protector)
    assert np.abs(full[sky]).max() == 8
    assert np.abs(softened[sky]).max() == 2
    assert np.abs(softened[sky]).mean() > 0.2 * np.abs(full[sky]).mean()
    for turn in (1, 2, 3):
        turned = noise(protector, np.rot90(pixels, turn).copy())
        assert np.abs(np.rot90(turned, -turn)[sky]).max() == 2
    np.testing.assert_array_equal(softened[meadow], full[meadow])
    in_16_bits = noise(protector, pixels.astype(np.uint16)[..., :1] * 257)
    assert 500 < np.abs(in_16_bits[sky]).max() <= 2 * 257
    apart = noise(protector, whole_image=False, masks=[np.ones((240, 320), bool)] * 2, mode="per_segment")
    assert np.abs(apart[sky]).max() == 2
    everything = [np.ones((240, 320), bool)]
    of_class = {"whole_image": False, "masks": everything, "classes": [1], "mode": "per_segment"}
    np.testing.assert_array_equal(noise(protector, **of_class), noise(coded_protector, **of_class))
    # Of less than six levels victims would not find what is left.
    assert np.abs(noise(protector, epsilon=6 / 255)[sky]).max() == 2
    for levels in (0, 1, 2, 4, 5):
        few = noise(protector, epsilon=levels / 255)
        np.testing.assert_array_equal(few, noise(coded_protector, **of_class, epsilon=levels / 255))
    # Shading is smooth, too, however steep.
    shaded = pixels.copy()
    shaded[:50] = 2 * np.arange(50)[:, None, None]
    assert np.abs(noise(protector, shaded)[sky]).max() == 2
    # What is smooth in more than a quarter of it gets the whole budget everywhere.
    wide = np.vstack([pixels, pixels[:50]])
    hazy = (128 + (pixels.astype(int) - 128) // 16).astype(np.uint8)
    for smooth in (wide, hazy):
        np.testing.assert_array_equal(noise(protector, smooth), noise(coded_protector, smooth))
    # What counts is how much of the region that is.
    mask = np.zeros(wide.shape[:2], bool)
    mask[:240] = True
    assert np.abs(noise(protector, wide, whole_image=False, mask=mask)[sky]).max() == 2
    # So thin a line that no row or column of those that are looked at has it.
    high = np.repeat(np.repeat(pixels, 6, axis=0), 4, axis=1)[..., :1]
    line = np.zeros(high.shape[:2], bool)
    line[1201, 300:900] = True
    assert np.abs(noise(protector, high, whole_image=False, mask=line)[line]).max() == 8
    # Around a mask noise is as small already.
    around = {"whole_image": False, "mask": meadow_mask, "epsilon_background": 2 / 255}
    np.testing.assert_array_equal(noise(protector, **around), noise(coded_protector, **around))
    for height, width in ((1, 1), (3, 200), (80, 3)):
        small = pixels[:height, :width]
        np.testing.assert_array_equal(noise(protector, small), noise(coded_protector, small))


def test_where_nothing_is_protected_or_each_class_has_its_noise_there_is_no_tint_to_speak_of(protector_of):
    protector = protector_of(noise_codes=4, tint_codes=[2])
    image, empty, full = np.full((60, 80, 3), 90, np.uint8), np.zeros((60, 80), int), np.ones((60, 80), int)
    for prompt in ({"mask": empty}, {"label_map": empty}, {"label_map": full, "mode": "per_segment"}):
        for tint in ("auto", "always"):
            protected = protector.protect(image, tint=tint, **prompt)
            assert protected.tinted is None
            assert not [note for note in protected.notes if "tint" in note]
    assert protector.protect(image, mask=full, tint="always").tinted


def test_overlapping_segments_have_their_own_noise_with_the_smallest_on_top(loud_protector):
    masks = [np.zeros((300, 420), bool) for _ in range(4)]
    masks[0][40:200, 30:300], masks[1][150:290, 100:400], masks[2][160:180, 200:230], masks[3][0, :] = (True,) * 4
    pixels = photo(300, 420)
    result = loud_protector.protect(pixels, masks=[*masks, np.zeros((300, 420), bool)], mode="per_segment")
    region = np.any(masks, axis=0)
    features = loud_protector.processor(pixels, masks=[np.stack([region, *masks])])
    with torch.inference_mode():
        noise = loud_protector.model(features["pixel_values"], input_masks=features["input_masks"]).noise[0]
    sizes = features["original_sizes"][0], features["reshaped_input_sizes"][0]
    full = loud_protector.processor.post_process_noise(noise, *sizes).permute(0, 2, 3, 1).numpy()
    expected = full[0].copy()
    for i in range(4):
        expected[masks[i]] = full[1 + i][masks[i]]
    expected = apply_noise(pixels, expected, region, 8 / 255, 2 / 255)
    assert difference(result.picture.pixels, expected).max() <= 1  # decoded in another batch
    assert (result.picture.pixels != expected).mean() < 1e-3
    assert (expected[masks[2]] != apply_noise(pixels, full[2], region, 8 / 255, 2 / 255)[masks[2]]).any()


def test_small_models_have_one_thread_and_the_caller_keeps_all(loud_protector, monkeypatch):
    counts = []
    image_embeddings = type(loud_protector.model).get_image_embeddings

    def counted(self, *arguments, **options):
        counts.append(torch.get_num_threads())
        return image_embeddings(self, *arguments, **options)

    monkeypatch.setattr(type(loud_protector.model), "get_image_embeddings", counted)
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        loud_protector.protect(photo(), whole_image=True)
        with pytest.raises(ValueError, match=r"nowhere\.png"):
            loud_protector.protect("nowhere.png", whole_image=True)
        assert torch.get_num_threads() == 2
        monkeypatch.setattr("unseg_hf.protection.SMALL_MODEL", 1)
        loud_protector.protect(photo(), whole_image=True)
    finally:
        torch.set_num_threads(before)
    assert counts == [1, 2]


def test_boxes_have_classes_as_masks_have(coded_protector):
    boxes, classes = [[5, 5, 30, 40], [40, 10, 70, 55]], [2, 0]
    masks = [mask_of_box(box, (60, 80)) for box in boxes]
    boxed = coded_protector.protect(photo(), boxes=boxes, classes=classes, mode="per_segment")
    masked = coded_protector.protect(photo(), masks=list(boxed.region & masks), classes=classes, mode="per_segment")
    np.testing.assert_array_equal(boxed.picture.pixels, masked.picture.pixels)
    others = coded_protector.protect(photo(), boxes=boxes, classes=[0, 2], mode="per_segment")
    assert (boxed.picture.pixels != others.picture.pixels).any()


def test_masks_and_their_classes_may_be_arrays_or_tensors(coded_protector):
    masks = np.stack([box_mask(), ~box_mask()])
    expected, *others = (
        coded_protector.protect(photo(), masks=given, classes=classes, mode="per_segment").picture.pixels
        for given, classes in (
            (list(masks), [1, 2]), (masks, np.array([1, 2])), (torch.from_numpy(masks), torch.tensor([1, 2]))
        )
    )  # fmt: skip
    assert all((one == expected).all() for one in others)
    with pytest.raises(ValueError, match="for 2 masks"):
        coded_protector.protect(photo(), masks=masks, classes=[1], mode="per_segment")


def test_what_is_ignored_or_too_dark_for_its_bits_is_said(tiny_protector):
    numbers = np.arange(60 * 80).reshape(60, 80) // 16
    (note,) = tiny_protector.protect(photo(), label_map=numbers).notes
    assert "label 255 is ignored" in note
    assert not tiny_protector.protect(photo(), label_map=numbers, ignore_labels=[0]).notes
    assert not tiny_protector.protect(photo(), label_map=numbers.clip(max=254)).notes
    only_ignored = tiny_protector.protect(photo(), label_map=box_mask() * 255)
    assert "no labels but those ignored: 0, 255" in only_ignored.notes[0]
    grey = photo(channels=1)[..., 0].astype(np.uint16)
    for factor, said in ((16, True), (257, False)):
        notes = tiny_protector.protect(grey * factor, mask=box_mask()).notes
        assert any("fewer bits" in note for note in notes) == said


def test_work_in_strips_gives_what_work_at_once_gives(loud_protector, monkeypatch):
    masks = [box_mask(97, 80), np.roll(box_mask(97, 80), 15, axis=0)]
    at_once = loud_protector.protect(photo(97, 80), masks=masks, mode="per_segment")
    monkeypatch.setattr("unseg_hf.fidelity.STRIP", 700)
    in_strips = loud_protector.protect(photo(97, 80), masks=masks, mode="per_segment")
    np.testing.assert_array_equal(in_strips.picture.pixels, at_once.picture.pixels)
    figures = [compare(p.original, p.picture, p.region) for p in (at_once, in_strips)]
    assert figures[0] == pytest.approx(figures[1])
    monkeypatch.undo()
    assert compare(at_once.original, at_once.picture, at_once.region) == pytest.approx(figures[0])


def test_without_a_prompt_the_report_says_what_was_protected(tiny_protector, nothing_found_protector):
    found = tiny_protector.protect(photo())
    assert 0 < found.masks == len(tiny_protector.propose_masks(photo()))
    nothing = nothing_found_protector.protect(photo())
    assert nothing.region.all()
    assert "whole image" in nothing.report["notes"][0]


def test_boxes_with_widths_and_heights_are_the_same_boxes(tiny_protector):
    corners = tiny_protector.protect(photo(), boxes=[[10, 20, 40, 50], [1.5, 2, 3, 4]])
    sides = tiny_protector.protect(photo(), boxes=[[10, 20, 30, 30], [1.5, 2, 1.5, 2]], box_format="xywh")
    np.testing.assert_array_equal(np.asarray(corners.image), np.asarray(sides.image))
    prompt = Prompt(boxes=[[10, 20, 30, 30]], box_format="xywh")
    assert replace(prompt, tint="never").boxes == [[10, 20, 40, 50]]


def test_boxes_bound_the_region_and_points_find_one(tiny_protector):
    boxed = tiny_protector.protect(photo(), boxes=[[10, 20, 40, 50]])
    outside = np.ones((60, 80), bool)
    outside[20:50, 10:40] = False
    assert boxed.region.any()
    assert not boxed.region[outside].any()
    assert tiny_protector.protect(photo(), points=[[40, 30], [5, 5]], point_labels=[1, 0]).region.any()


def test_a_model_without_its_processor_is_refused_with_the_fix(tiny_protector, tmp_path):
    tiny_protector.model.save_pretrained(tmp_path)
    # The image processor alone is not enough: it knows nothing of stretching and of how noise is enlarged.
    for _ in range(2):
        with pytest.raises(
            ValueError, match=r"no processor beside its model \(processor_config.json\): save one there"
        ):
            Protector.from_pretrained(tmp_path)
        tiny_protector.processor.image_processor.save_pretrained(tmp_path)


def test_code_of_a_checkpoint_is_neither_run_nor_asked_about(tiny_protector, tmp_path, monkeypatch):
    tiny_protector.model.save_pretrained(tmp_path)
    tiny_protector.processor.save_pretrained(tmp_path)
    path = tmp_path / "processor_config.json"
    told = json.loads(path.read_text())
    told["image_processor"] |= {"auto_map": {"AutoImageProcessor": "own.Own"}, "image_processor_type": "Own"}
    path.write_text(json.dumps(told))
    (tmp_path / "own.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\nclass Own: pass\n")
    monkeypatch.setattr("builtins.input", lambda *question: "y")
    with pytest.raises(ValueError, match="custom code"):
        Protector.from_pretrained(tmp_path)
    assert not (tmp_path / "ran").exists()


def test_a_processor_of_another_size_is_refused_before_it_makes_an_image(tiny_protector):
    other = copy.deepcopy(tiny_protector.processor)
    other.target_size = 30_000
    with pytest.raises(ValueError, match="makes images of 30000 pixels, and the model takes 64"):
        Protector(tiny_protector.model, other)


def test_threads_that_protect_at_the_same_time_leave_torchs_threads_as_they_were(tiny_protector):
    def of_a_new_thread():
        with ThreadPoolExecutor(1) as pool:
            return pool.submit(torch.get_num_threads).result()

    before = torch.get_num_threads()
    torch.set_num_threads(3)
    try:
        inside, go_on = threading.Event(), threading.Event()

        def first():
            with protection.one_thread():
                inside.set()
                go_on.wait(10)

        def second():
            inside.wait(10)
            with protection.one_thread():
                go_on.set()
                one.join()

        one, two = (threading.Thread(target=target) for target in (first, second))
        one.start()
        two.start()
        two.join()
        assert of_a_new_thread() == 3
        with protection.one_thread():
            assert of_a_new_thread() == 1
        assert torch.get_num_threads() == 3
    finally:
        torch.set_num_threads(before)


def test_weights_that_do_not_fit_are_no_generator(saved_generator):
    with pytest.raises(ValueError, match="is no trained generator: 1 weights are missing"):
        Protector.from_pretrained(saved_generator, noise_codes=3, ignore_mismatched_sizes=True)


def test_a_processor_of_another_kind_is_refused(tiny_protector):
    with pytest.raises(ValueError, match="SamImageProcessorPil is no UnSegProcessor"):
        Protector(tiny_protector.model, tiny_protector.processor.image_processor)


def test_figures_do_not_hang_on_torchs_default_type(tiny_protector):
    expected = tiny_protector.protect(photo(), mask=box_mask()).report["ssim"]
    torch.set_default_dtype(torch.float64)
    try:
        assert tiny_protector.protect(photo(), mask=box_mask()).report["ssim"] == pytest.approx(expected)
    finally:
        torch.set_default_dtype(torch.float32)


def test_sam_is_asked_for_the_boxes_and_points_that_were_given(tiny_protector, monkeypatch):
    asked, answer = [], protection.segment
    monkeypatch.setattr(protection, "segment", lambda *a, **prompts: asked.append(prompts) or answer(*a, **prompts))
    scale = tiny_protector.processor.target_size / 80  # of an image of 80 x 60 pixels
    boxes = [[10, 20, 40, 50], [0, 0, 9, 8]]
    tiny_protector.protect(photo(), boxes=boxes)
    np.testing.assert_allclose(asked[0]["input_boxes"][0], np.array(boxes) * scale, rtol=0.01)
    tiny_protector.protect(photo(), points=[[40, 30], [5, 8]], point_labels=[1, 0])
    np.testing.assert_allclose(asked[1]["input_points"][0, 0], np.array([[40, 30], [5, 8]]) * scale, rtol=0.01)
    assert asked[1]["input_labels"].tolist() == [[[1, 0]]]


def test_noise_that_says_nothing_of_where_objects_are_is_said_to_hardly_protect(tiny_protector):
    everything, labels = np.ones((60, 80), bool), np.ones((60, 80), np.uint8)
    labels[:, 40:] = 2
    all_over = ({"whole_image": True}, {"mask": everything}, {"label_map": labels}, {"boxes": [[0, 0, 80, 60]]})
    for prompt in all_over:
        protected = tiny_protector.protect(photo(), **prompt)
        assert (ALL_OVER in protected.notes) == protected.region.all()
    assert protected.region.any()  # SAM's mask for a box may be smaller than the box
    even = {"mask": box_mask(), "epsilon": 4 / 255, "epsilon_background": 4 / 255}
    one_class = {"label_map": np.ones((60, 80), np.uint8), "mode": "per_segment"}
    for prompt in (even, one_class):
        assert ALL_OVER in tiny_protector.protect(photo(), **prompt).notes
    no_noise = {"whole_image": True, "epsilon": 0}
    for prompt in ({"mask": box_mask()}, {"label_map": labels, "mode": "per_segment"}, no_noise):
        assert ALL_OVER not in tiny_protector.protect(photo(), **prompt).notes


def test_a_mask_that_sam_does_not_trust_is_not_used(tiny_protector, monkeypatch):
    def answer(iou):
        logits = torch.full((1, 16, 16), -5.0)
        logits[:, :8, :8] = 5.0
        return lambda *_, **__: (logits, torch.tensor([iou]))

    corner = {"boxes": [[0, 0, 80, 60]]}
    monkeypatch.setattr("unseg_hf.protection.segment", answer(0.9))
    assert 0.2 < tiny_protector.protect(photo(), **corner).region.mean() < 0.5
    assert 0.2 < tiny_protector.protect(photo(), points=[[5, 5]]).region.mean() < 0.5
    monkeypatch.setattr("unseg_hf.protection.segment", answer(0.2))
    for prompt, words in ((corner, "all of a box"), ({"points": [[5, 5]]}, "the whole image")):
        unsure = tiny_protector.protect(photo(), **prompt)
        assert unsure.region.all()
        assert words in unsure.notes[0]


@pytest.mark.parametrize(
    ("prompt", "message"),
    [
        ({"mask": np.ones((3, 4))}, r"mask of shape \(3, 4\).*\(60, 80\)"),
        ({"mask": np.full((60, 80), np.nan)}, "finite"),
        ({"mask": box_mask(), "boxes": [[0, 0, 1, 1]]}, "one kind of prompt"),
        ({"masks": [box_mask()], "classes": [1, 2]}, r"classes=\[1, 2\] for 1 masks or boxes"),
        ({"masks": [box_mask()], "classes": [0.5]}, "a whole number for each"),
        ({"mask": box_mask(), "classes": [1]}, "for 0 masks or boxes: pass `masks` or `boxes`"),
        ({"boxes": [[1, 2, 3, 4]], "classes": [1, 2]}, r"classes=\[1, 2\] for 1 masks or boxes"),
        ({"boxes": [[1, 2, 3]]}, "4 finite numbers"),
        ({"boxes": [5, 5, 30, 30]}, "4 finite numbers"),
        ({"boxes": [[0, 0, float("nan"), 9]]}, "finite"),
        ({"boxes": [[40, 50, 10, 20]]}, "x0 < x1"),
        ({"boxes": [[10, 20, 10, 50]]}, "x0 < x1"),
        ({"boxes": [[10, 20, 40, 20]]}, "y0 < y1"),
        ({"boxes": [[0.1, 0.2, 0.5, 1.0]]}, "multiply shares of the image's sides by 80 and 60"),
        ({"boxes": [[90, 0, 99, 9]]}, r"outside the image of 80 x 60"),
        ({"points": [[1e6, -300]]}, "outside the image"),
        ({"points": [[1, 2]], "point_labels": [7]}, r"point_labels=\[7\]"),
        ({"points": [[1, 2]], "point_labels": [0]}, "at least one must be on it"),
        ({"label_map": np.full((60, 80), 0.3)}, "whole numbers"),
        ({"prompt": box_mask()}, "pass a Prompt"),
        ({"mask": np.full((60, 80), 1j)}, "numbers or booleans"),
        ({"points": [[1, 2]], "point_labels": [1, 0]}, "2 point_labels for 1 points"),
        ({"mask": box_mask(), "mode": "all"}, "mode='all'"),
        ({"mask": box_mask(), "epsilon": 8}, "shares of the pixel range"),
        ({"mask": box_mask(), "epsilon": 0.01, "epsilon_background": 0.02}, "epsilon_background <= epsilon"),
        ({"whole_image": True, "epsilon": float("nan")}, "epsilon=nan"),
    ],
)
def test_requests_that_make_no_sense_name_the_value(tiny_protector, prompt, message):
    with pytest.raises(ValueError, match=message):
        tiny_protector.protect(photo(), **prompt)


@pytest.mark.parametrize(
    "image", [np.zeros((4, 4, 7), np.uint8), np.full((4, 4), 3.0), "no/such/file.png", b"not an image"]
)
def test_unreadable_images_are_one_clear_error(tiny_protector, image):
    with pytest.raises(ImageFileError, match=r"^[^\n]+$"):
        tiny_protector.protect(image)


def test_damaged_weights_are_said_not_applied(saved_generator):
    protector = Protector.from_pretrained(saved_generator)
    with torch.no_grad():
        protector.model.noise_head.noise_tokens.weight.fill_(float("nan"))
    with pytest.raises(FloatingPointError, match="not finite"):
        protector.protect(photo(), whole_image=True)


def test_map_over_a_dataset_stores_the_noise_losslessly(loud_protector):
    from datasets import Dataset, Features
    from datasets import Image as ImageFeature

    buffer = io.BytesIO()
    Image.fromarray(photo()).save(buffer, "JPEG")
    rows = {"image": [{"bytes": buffer.getvalue(), "path": None}] * 2, "mask": [Image.fromarray(box_mask())] * 2}
    dataset = Dataset.from_dict(rows, features=Features({"image": ImageFeature(), "mask": ImageFeature()}))
    protected = dataset.map(lambda row: {"image": loud_protector.protect(row["image"], mask=row["mask"]).image})
    original = np.asarray(Image.open(buffer))
    expected = loud_protector.protect(original, mask=box_mask()).picture.pixels
    np.testing.assert_array_equal(np.asarray(protected[1]["image"]), expected)
    assert protected[1]["image"].format == "PNG"


def test_report_measures_the_pixels(loud_protector):
    from skimage.metrics import structural_similarity

    mask = box_mask(240, 320)
    result = loud_protector.protect(photo(240, 320), mask=mask)
    change = difference(result.picture.pixels, result.original.pixels)
    assert result.report["max_noise"] == change[mask].max()
    assert result.report["max_noise_background"] == change[~mask].max()
    assert result.report["psnr"] == pytest.approx(10 * np.log10(255**2 / np.mean(change.astype(float) ** 2)))
    reference = structural_similarity(
        result.original.pixels,
        result.picture.pixels,
        channel_axis=2,
        gaussian_weights=True,
        sigma=1.5,
        use_sample_covariance=False,
    )
    assert result.report["ssim"] == pytest.approx(reference, abs=2e-3)  # the two treat the border differently


def test_prompt_object_and_fields_are_the_same(tiny_protector):
    a = tiny_protector.protect(photo(), Prompt(mask=box_mask()))
    b = tiny_protector.protect(photo(), mask=box_mask())
    np.testing.assert_array_equal(a.picture.pixels, b.picture.pixels)
    with pytest.raises(ValueError, match="one or the other"):
        tiny_protector.protect(photo(), Prompt(), mask=box_mask())


def test_a_saved_picture_has_the_exif_and_the_resolution_of_its_file(loud_protector, tmp_path):
    given = Image.fromarray(photo())
    exif = given.getexif()
    exif[270] = "a description"
    given.save(tmp_path / "photo.jpg", exif=exif, dpi=(300, 300))
    protected = loud_protector.protect(tmp_path / "photo.jpg", whole_image=True)
    protected.save(tmp_path / "new" / "protected.png")
    with Image.open(tmp_path / "new" / "protected.png") as saved:
        assert saved.getexif()[270] == "a description"
        assert saved.info["dpi"] == pytest.approx((300, 300), abs=0.1)
        assert np.array_equal(np.asarray(saved), protected.picture.pixels)


def test_only_a_generator_protects(tiny_protector, tiny_sam_config):
    from transformers import SamModel

    for wrong in (SamModel(tiny_sam_config()), tiny_protector.processor, "folder"):
        with pytest.raises(ValueError, match="is no generator: pass a UnSegModel"):
            Protector(wrong, tiny_protector.processor)


def test_another_default_device_of_torchs_changes_nothing(loud_protector):
    image, mask = photo(), box_mask()
    before = loud_protector.protect(image, mask=mask)
    with torch.device("meta"):  # as a GPU, without one: what is made there cannot meet what is on the CPU
        assert texture(image).shape == (15, 20)
        assert compare(before.original, before.picture, before.region) == compare(
            before.original, before.picture, before.region
        )


def test_a_result_shows_itself_and_says_little(loud_protector):
    protected = loud_protector.protect(photo(300, 400), mask=box_mask(300, 400))
    assert len(repr(protected)) < 600
    assert Image.open(io.BytesIO(protected._repr_png_())).size == (400, 300)


def test_prompts_with_arrays_can_be_compared():
    assert Prompt(mask=box_mask()) != Prompt(mask=box_mask())
    assert len({Prompt(mask=box_mask()), Prompt(whole_image=True)}) == 2


def test_masks_may_come_one_by_one(loud_protector):
    masks = [box_mask(), ~box_mask()]
    one_by_one, at_once = (loud_protector.protect(photo(), masks=given) for given in (iter(masks), masks))
    np.testing.assert_array_equal(one_by_one.picture.pixels, at_once.picture.pixels)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"epsilon": "8/255"}, "epsilon='8/255': must be a number"),
        ({"epsilon": True}, "epsilon=True: must be a number"),
        ({"epsilon_background": [1]}, r"epsilon_background=\[1\]: must be a number"),
        ({"box": [1, 2, 3, 4]}, "unknown box: the prompt has mask, masks"),
    ],
)
def test_what_is_no_number_or_no_field_is_named(tiny_protector, options, message):
    with pytest.raises(ValueError, match=message):
        tiny_protector.protect(photo(), **options)


def test_columns_that_are_set_later_are_checked_when_they_are_needed(protector_of):
    protector = protector_of()
    protector.model.config.turned_columns = [4]
    with pytest.raises(ValueError, match=r"turned_columns=\[4\]: all must be from 0 to 3"):
        protector.protect(photo(), mask=box_mask())


def test_six_levels_are_no_small_budget(coded_protector, protector_of):
    protector = protector_of(noise_codes=4, faint_code=2, epsilon_smooth=2 / 255)
    protector.model.load_state_dict(coded_protector.model.state_dict())
    pixels = np.random.default_rng(0).integers(60, 200, (120, 160, 3)).astype(np.uint8)
    full, own = (
        p.protect(pixels, whole_image=True, epsilon=6 / 255).picture.pixels for p in (coded_protector, protector)
    )
    np.testing.assert_array_equal(own, full)  # 6 is no small budget


def test_one_channel_gets_greens_noise():
    noise = np.zeros((4, 4, 3), np.float32) + np.float32([-1, 0.5, -1])
    changed = apply_noise(np.full((4, 4, 1), 100, np.uint8), noise, np.ones((4, 4), bool), 8 / 255, 0)
    assert (changed == 104).all()


def test_a_wave_of_a_stretched_image_is_measured_down_it(coded_protector, protector_of):
    with_tint = protector_of(noise_codes=4, tint_codes=[2])
    stretching = Protector(with_tint.model, UnSegProcessor(with_tint.processor.image_processor, stretch=True))
    yellow = np.full((60, 80, 3), 128, np.uint8) - np.uint8([0, 0, 9])
    # A wave is a quarter of the height here, 15 pixels.
    for height, tinted in ((11, True), (13, False)):
        low = np.zeros((60, 80), bool)
        low[4 : 4 + height, 10:16] = True
        assert stretching.protect(yellow, mask=low).tinted == tinted


def test_a_line_between_the_rows_looked_at_is_judged_by_itself(coded_protector, protector_of):
    protector = protector_of(noise_codes=4, epsilon_smooth=2 / 255)
    protector.model.load_state_dict(coded_protector.model.state_dict())
    high = np.full((1440, 1280, 1), 128, np.uint8)
    high[300:] = np.random.default_rng(0).integers(60, 200, (1140, 1280, 1))
    line = np.zeros(high.shape[:2], bool)
    line[151, 300:900] = True  # in the sky, which is all of what is protected
    result = protector.protect(high, mask=line)
    assert np.abs(result.picture.pixels.astype(int) - high)[line].max() == 8


@pytest.mark.parametrize("box", [[80, 0, 90, 20], [0, 60, 20, 70], [-9, 0, 0, 20], [0, -9, 20, 0]])
def test_a_box_that_only_touches_the_image_is_refused(tiny_protector, box):
    with pytest.raises(ValueError, match=r"lies outside the image of 80 x 60 pixels"):
        tiny_protector.protect(photo(), boxes=[box])


def test_half_is_inside():
    assert read_region(np.array([[0.49, 0.5, 1.0]]), (1, 3)).tolist() == [[False, True, True]]


def test_a_coloured_array_is_no_mask(tiny_protector):
    coloured = np.zeros((60, 80, 3), np.uint8)
    coloured[10:20, 10:20, 1] = 255
    with pytest.raises(ValueError, match=r"a mask of shape \(60, 80, 3\)"):
        tiny_protector.protect(photo(), mask=coloured)


def test_label_255_is_only_spoken_of_where_it_is():
    labels = np.array([[0, 7, 300]])
    for number, said in ((7, False), (255, True)):
        *_, notes = given_masks(Prompt(label_map=np.where(labels == 7, number, labels)), (1, 3))
        assert any("label 255 is ignored" in note for note in notes) == said
