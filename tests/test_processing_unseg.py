import json

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from transformers import SamProcessor
from transformers.models.sam.image_processing_pil_sam import SamImageProcessorPil

from unseg_hf import UnSegProcessor

MEAN = torch.tensor([0.485, 0.456, 0.406])[:, None, None]
STD = torch.tensor([0.229, 0.224, 0.225])[:, None, None]


def picture(height: int, width: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)


def unnormalised(pixel_values: torch.Tensor) -> torch.Tensor:
    return pixel_values * STD + MEAN


@pytest.mark.parametrize(("size", "reshaped"), [((96, 128), (48, 64)), ((128, 96), (64, 48)), ((20, 10), (64, 32))])
def test_image_is_resized_normalised_and_padded_with_black_at_the_right_and_bottom(processor, size, reshaped):
    image = picture(*size)
    features = processor(image)
    height, width = reshaped
    resized = np.asarray(Image.fromarray(image).resize((width, height), Image.Resampling.BILINEAR))
    expected = torch.zeros(3, 64, 64)
    expected[:, :height, :width] = torch.from_numpy(resized.copy()).permute(2, 0, 1) / 255
    assert features["pixel_values"].dtype is torch.float32
    torch.testing.assert_close(unnormalised(features["pixel_values"][0]), expected, atol=1e-6, rtol=0)
    assert features["original_sizes"].tolist() == [list(size)]
    assert features["reshaped_input_sizes"].tolist() == [list(reshaped)]


def test_images_of_different_sizes_make_a_batch_that_equals_single_images(processor):
    images = [picture(30, 64), picture(64, 30, seed=1)]
    batch = processor(images)
    for i, image in enumerate(images):
        assert torch.equal(batch["pixel_values"][i : i + 1], processor(image)["pixel_values"])
    assert batch["original_sizes"].tolist() == [[30, 64], [64, 30]]


def test_grey_and_pil_images_equal_the_same_pixels_in_colour(processor):
    grey = picture(40, 50)[:, :, 0]
    expected = processor(np.stack([grey] * 3, axis=2))["pixel_values"]
    for same in (grey, grey[:, :, None], Image.fromarray(grey), Image.fromarray(grey).convert("RGB")):
        assert torch.equal(processor(same)["pixel_values"], expected)


def test_coordinates_become_pixels_of_the_models_input(processor):
    features = processor(
        picture(96, 128),
        input_points=[[[[0, 0], [128, 96]], [[10, 30], [64, 48]]]],
        input_labels=[[[1, 0], [1, 1]]],
        input_boxes=[[[2, 4, 100, 90], [0, 0, 128, 96]]],
    )
    assert features["input_points"].tolist() == [[[[0, 0], [64, 48]], [[5, 15], [32, 24]]]]
    assert features["input_labels"].tolist() == [[[1, 0], [1, 1]]]
    assert features["input_boxes"].tolist() == [[[1, 2, 50, 45], [0, 0, 64, 48]]]
    assert features["input_points"].dtype is features["input_boxes"].dtype is torch.float32


def test_features_go_into_the_generator_as_they_are(processor, generator):
    features = processor(
        [picture(96, 128), picture(50, 40)],
        masks=[np.ones((2, 96, 128), dtype=bool), np.ones((2, 50, 40), dtype=bool)],
        input_points=[[[[1, 2]], [[3, 4]]]] * 2,
        input_labels=[[[1], [0]]] * 2,
        input_boxes=[[[0, 0, 5, 5], [1, 1, 30, 40]]] * 2,
    )
    sizes = features.pop("original_sizes"), features.pop("reshaped_input_sizes")
    noise = generator(**features).noise
    assert noise.shape == (2, 2, 3, 16, 16)
    for one, original, reshaped in zip(noise, *sizes, strict=True):
        assert processor.post_process_noise(one, original, reshaped).shape == (2, 3, *original.tolist())


def test_mask_prompt_is_the_covered_share_of_each_cell(processor):
    masks = np.random.default_rng(0).random((3, 64, 64)) < 0.4
    expected = masks.reshape(3, 16, 4, 16, 4).mean(axis=(2, 4))
    prompts = processor(picture(64, 64), masks=[masks])["input_masks"]
    np.testing.assert_allclose(prompts[0], expected, atol=1e-6)


def test_mask_prompt_of_a_larger_image_covers_the_same_region_and_no_padding(processor):
    mask = np.zeros((1, 128, 256), dtype=np.uint8)  # 32 x 64 in the model's input, 8 x 16 cells
    mask[0, 32:, 64:128] = 7  # any value but zero is inside
    prompts = processor(picture(128, 256), masks=[mask])["input_masks"]
    expected = torch.zeros(1, 1, 16, 16)
    expected[..., 2:8, 4:8] = 1
    assert torch.equal(prompts, expected)


def test_region_thinner_than_a_cell_still_leaves_a_trace_in_the_mask_prompt(processor):
    mask = np.zeros((1, 640, 640), dtype=bool)
    mask[0, :, 300] = True
    prompts = processor(picture(640, 640), masks=[mask])["input_masks"][0, 0]
    assert prompts[:, 7].min() > 0
    assert torch.count_nonzero(prompts) == 16


@pytest.mark.parametrize("extent", [(0, 0, 0, 0), (13, 14, 90, 91), (20, 71, 5, 44), (0, 77, 0, 101)])
def test_mask_prompt_is_pillows_box_filter_wherever_the_mask_lies(processor, extent):
    top, bottom, left, right = extent
    mask = np.zeros((77, 101), dtype=bool)
    mask[top:bottom, left:right] = np.random.default_rng(0).random((bottom - top, right - left)) < 0.7
    whole = Image.fromarray(mask.astype(np.uint8) * 255).resize((64, 49), Image.Resampling.BOX)
    square = np.zeros((64, 64), dtype=np.float32)
    square[:49] = np.asarray(whole)
    cells = square.reshape(16, 4, 16, 4).mean(axis=(1, 3)) / 255
    prompts = processor(picture(77, 101), masks=[mask[None]])["input_masks"][0, 0]
    np.testing.assert_allclose(prompts, cells, atol=1e-6)


@pytest.mark.parametrize("size", [(100, 200), (200, 100), (8, 16), (64, 64), (33, 65)])
def test_noise_appears_in_the_image_where_it_was_in_the_padded_square(processor, size):
    features = processor(picture(*size))
    height, width = features["reshaped_input_sizes"][0].tolist()
    noise = torch.zeros(2, 3, 16, 16)
    noise[0, :, :, : width // 8], noise[0, :, :, width // 8 :] = 1, -1  # left and right half
    noise[1, 0, : height // 8], noise[1, 1, height // 8 :] = 1, -1  # upper half of red, lower half of green
    result = processor.post_process_noise(noise, size, (height, width))
    assert result.shape == (2, 3, *size)
    assert result.dtype is torch.float32
    rows, columns = size
    edge = 2 + max(size) // 16  # the interpolation blurs an edge by about a cell
    assert (result[0, :, :, : max(columns // 2 - edge, 1)] > 0.99).all()
    assert (result[0, :, :, min(columns // 2 + edge, columns - 1) :] < -0.99).all()
    assert (result[1, 0, : max(rows // 2 - edge, 1)] > 0.99).all()
    assert (result[1, 1, min(rows // 2 + edge, rows - 1) :] < -0.99).all()
    assert not result[1, 2].any()


@pytest.mark.parametrize("size", [(5, 9), (64, 64), (150, 300)])
def test_noise_never_leaves_its_range(processor, size):
    features = processor(picture(*size))
    noise = torch.randint(0, 2, (1, 3, 16, 16), generator=torch.Generator().manual_seed(0)) * 2.0 - 1
    result = processor.post_process_noise(
        noise, features["original_sizes"][0].tolist(), features["reshaped_input_sizes"][0].tolist()
    )
    assert result.abs().max() <= 1
    assert result.std() > 0.1


@pytest.mark.parametrize("size", [(31, 47), (64, 48), (150, 301), (400, 33)])
def test_a_part_of_the_noise_is_that_part_of_all_of_it(processor, size):
    reshaped = processor(picture(*size))["reshaped_input_sizes"][0].tolist()
    noise = torch.randn(3, 16, 16, generator=torch.Generator().manual_seed(0)).clamp(-1, 1)
    full = processor.full_size_noise(noise, size, reshaped)
    whole = full[:]
    square = F.interpolate(noise[None], (64, 64), mode="bilinear")[..., : reshaped[0], : reshaped[1]]
    smaller = size[0] < reshaped[0] or size[1] < reshaped[1]
    expected = F.interpolate(square, size, mode="bilinear", antialias=smaller)[0].permute(1, 2, 0)
    np.testing.assert_allclose(whole, expected, atol=2e-6)
    rows, columns = slice(size[0] // 3, size[0] // 2), slice(size[1] // 4, size[1])
    np.testing.assert_array_equal(full[rows], whole[rows])
    np.testing.assert_array_equal(full[rows, columns], whole[rows, columns])


@pytest.mark.parametrize("size", [(31, 47), (64, 48), (150, 301)])
def test_sharper_noise_is_multiplied_and_clipped_at_the_images_size(size, tmp_path):
    UnSegProcessor.for_image_size(64, sharpness=2.5).save_pretrained(tmp_path)
    soft, sharp = UnSegProcessor.for_image_size(64), UnSegProcessor.from_pretrained(tmp_path)
    reshaped = soft(picture(*size))["reshaped_input_sizes"][0].tolist()
    noise = torch.randn(3, 16, 16, generator=torch.Generator().manual_seed(0)).clamp(-1, 1)
    made = sharp.full_size_noise(noise, size, reshaped)
    expected = (2.5 * soft.full_size_noise(noise, size, reshaped)[:]).clip(-1, 1)
    np.testing.assert_allclose(made[:], expected, atol=2e-6)
    np.testing.assert_array_equal(made[3:9], made[:][3:9])
    assert 0.1 < (np.abs(expected) == 1).mean() < 0.9


def test_noise_cannot_be_made_softer():
    with pytest.raises(ValueError, match=r"sharpness=0.5: must be at least 1"):
        UnSegProcessor.for_image_size(64, sharpness=0.5)


@pytest.mark.parametrize("size", [(7, 9), (31, 47), (64, 64), (150, 301), (1, 500)])
def test_what_a_mask_gets_comes_from_the_cells_of_its_box(processor, size):
    reshaped = processor(picture(*size))["reshaped_input_sizes"][0].tolist()
    rng = np.random.default_rng(0)
    noise = torch.from_numpy(rng.random((3, 16, 16), np.float32))
    for _ in range(20):
        y, x = rng.integers(size[0]), rng.integers(size[1])
        rows, columns = slice(y, min(y + 1 + size[0] // 5, size[0])), slice(x, min(x + 1 + size[1] // 5, size[1]))
        extent = rows.start, rows.stop, columns.start, columns.stop
        top, bottom, left, right = processor.noise_box(extent, size, reshaped, 16)
        inside = torch.zeros(3, 16, 16)
        part = slice(4 * top, 4 * bottom), slice(4 * left, 4 * right)
        inside[:, *part] = noise[:, *part]
        whole, of_box = (processor.full_size_noise(one, size, reshaped)[:] for one in (noise, inside))
        np.testing.assert_array_equal(whole[rows, columns], of_box[rows, columns])


def test_half_precision_noise_comes_back_in_float32(processor):
    result = processor.post_process_noise(torch.ones(1, 3, 16, 16, dtype=torch.bfloat16), (10, 10), (64, 64))
    torch.testing.assert_close(result, torch.ones(1, 3, 10, 10))


@pytest.mark.parametrize("size", [(1, 1), (1, 5000), (5000, 1), (2, 129)])
def test_images_of_extreme_sizes_make_the_whole_round_trip(processor, generator, size):
    features = processor(picture(*size), masks=[np.ones((1, *size), dtype=bool)])
    assert features["original_sizes"].tolist() == [list(size)]
    reshaped = features["reshaped_input_sizes"][0].tolist()
    assert min(reshaped) >= 1
    assert max(reshaped) == 64
    padding = unnormalised(features["pixel_values"][0])
    padding[:, : reshaped[0], : reshaped[1]] = 0
    assert padding.abs().max() < 1e-6
    assert features["input_masks"].max() > 0
    noise = generator(features["pixel_values"], input_masks=features["input_masks"]).noise[0]
    result = processor.post_process_noise(noise, size, reshaped)
    assert result.shape == (1, 3, *size)
    assert result.isfinite().all()


def test_coordinates_on_a_very_narrow_image_stay_inside_it(processor):
    features = processor(picture(1, 5000), input_boxes=[[[1250, 0, 5000, 1]]])
    x0, y0, x1, y1 = features["input_boxes"][0, 0].tolist()
    assert (x0, x1) == (16, 64)
    assert 0 <= y0 <= y1 <= 1


@pytest.mark.parametrize("source", ["SamProcessor", "file of the Hub"])
def test_processor_of_a_plain_sam_checkpoint_loads(tmp_path, source):
    if source == "SamProcessor":
        SamProcessor(SamImageProcessorPil()).save_pretrained(tmp_path)
    else:  # what facebook/sam-vit-base has, of a time before mask sizes
        square = {"height": 1024, "width": 1024}
        values = {
            "do_convert_rgb": True,
            "do_normalize": True,
            "do_pad": True,
            "do_rescale": True,
            "do_resize": True,
            "image_mean": MEAN.flatten().tolist(),
            "image_processor_type": "SamImageProcessor",
            "image_std": STD.flatten().tolist(),
            "pad_size": square,
            "processor_class": "SamProcessor",
            "resample": 2,
            "rescale_factor": 1 / 255,
            "size": {"longest_edge": 1024},
        }
        (tmp_path / "preprocessor_config.json").write_text(json.dumps(values))
    loaded, new = UnSegProcessor.from_pretrained(tmp_path), UnSegProcessor.for_image_size(1024)
    inputs = {"images": picture(60, 90), "masks": [np.ones((1, 60, 90))], "input_boxes": [[[1, 2, 30, 40]]]}
    for name, expected in new(**inputs).items():
        torch.testing.assert_close(loaded(**inputs)[name], expected)


def test_saved_and_loaded_processor_gives_identical_features(tmp_path):
    processor = UnSegProcessor.for_image_size(96)
    processor.save_pretrained(tmp_path)
    loaded = UnSegProcessor.from_pretrained(tmp_path)
    inputs = {"images": picture(60, 90), "masks": [np.ones((1, 60, 90))], "input_boxes": [[[1, 2, 30, 40]]]}
    features = processor(**inputs)
    assert features["pixel_values"].shape == (1, 3, 96, 96)
    assert features["input_masks"].shape == (1, 1, 24, 24)
    for name, expected in features.items():
        assert torch.equal(loaded(**inputs)[name], expected), name
    noise = torch.rand(1, 3, 24, 24)
    assert torch.equal(
        loaded.post_process_noise(noise, (60, 90), (64, 96)), processor.post_process_noise(noise, (60, 90), (64, 96))
    )


@pytest.mark.parametrize(
    ("image", "message"),
    [
        (np.zeros((8, 9, 4), np.uint8), r"shape \(8, 9, 4\) and type uint8: pass \(height, width, 3\)"),
        (np.zeros((1, 8, 9, 3), np.uint8), r"shape \(1, 8, 9, 3\)"),
        (np.zeros(5, np.uint8), r"shape \(5,\)"),
        (np.zeros((8, 9, 3), np.float32), r"shape \(8, 9, 3\) and type float32: .*uint8 in \[0, 255\]"),
    ],
)
def test_errors_about_images_name_shape_and_type(processor, image, message):
    for images in (image, [image]):
        with pytest.raises(ValueError, match=message):
            processor(images)


@pytest.mark.parametrize(
    ("masks", "message"),
    [
        ([np.ones((1, 9, 8))], r"masks of shapes \[\(1, 9, 8\)\] for images of \(height, width\) \[\(8, 9\)\]"),
        ([np.ones((8, 9))], r"shapes \[\(8, 9\)\].*: pass \(prompts, height, width\)"),
        (
            [np.ones((1, 8, 9))] * 2,
            r"shapes \[\(1, 8, 9\), \(1, 8, 9\)\] for images of \(height, width\) \[\(8, 9\)\]",
        ),
        ([], r"shapes \[\]"),
    ],
)
def test_errors_about_masks_name_both_shapes(processor, masks, message):
    with pytest.raises(ValueError, match=message):
        processor(picture(8, 9), masks=masks)


def test_images_of_a_batch_need_the_same_number_of_masks(processor):
    with pytest.raises(ValueError, match=r"shapes \[\(1, 8, 9\), \(2, 8, 9\)\].*the same number of prompts"):
        processor([picture(8, 9)] * 2, masks=[np.ones((1, 8, 9)), np.ones((2, 8, 9))])


def test_other_tensor_backends_are_refused(processor):
    with pytest.raises(ValueError, match=r"return_tensors='np': .*'pt'"):
        processor(picture(8, 9), return_tensors="np")


@pytest.mark.parametrize("shape", [(30, 90), (90, 30), (64, 64), (400, 300)])
def test_stretched_images_fill_the_square_and_so_does_their_noise(shape, tmp_path):
    UnSegProcessor.for_image_size(64, stretch=True).save_pretrained(tmp_path)
    processor = UnSegProcessor.from_pretrained(tmp_path)
    height, width = shape
    image = np.zeros((height, width, 3), np.uint8)
    image[height // 2 :, width // 2 :] = 255  # the last quarter
    mask = image[None, :, :, 0] > 0
    corner = [[[width / 2, height / 2]]]
    features = processor(
        image, masks=[mask], input_points=[corner], input_boxes=[[[width / 2, height / 2, width, height]]]
    )
    assert features["reshaped_input_sizes"].tolist() == [[64, 64]]
    assert features["original_sizes"].tolist() == [[height, width]]
    bright = features["pixel_values"][0].mean(0) > 0
    assert bright[34:, 34:].all()
    assert not bright[:30].any()
    assert not bright[:, :30].any()
    assert features["input_points"].flatten().tolist() == [32, 32]
    assert features["input_boxes"].flatten().tolist() == [32, 32, 64, 64]
    assert features["input_masks"][0, 0].round().sum() == 8 * 8
    noise = torch.zeros(1, 3, 16, 16)
    noise[..., 8:, 8:] = 1
    full = processor.post_process_noise(noise, shape, (64, 64))
    assert full.shape == (1, 3, height, width)
    assert ((full[0, 0] > 0.5) == torch.from_numpy(mask[0])).float().mean() > 0.98


def test_sixteen_bits_are_scaled_and_not_clipped(processor):
    grey = picture(40, 60)[..., 0]
    deep = [Image.fromarray(grey.astype(np.uint16) * 257), Image.fromarray(grey.astype(np.int32) * 257)]
    wanted = processor(grey)["pixel_values"]
    assert {image.mode for image in deep} == {"I;16", "I"}
    assert all(torch.equal(processor(image)["pixel_values"], wanted) for image in deep)


def test_a_tensor_is_no_batch_of_grey_images(processor):
    with pytest.raises(ValueError, match=r"a tensor of shape \(3, 40, 60\): pass PIL images"):
        processor(torch.zeros(3, 40, 60, dtype=torch.uint8))


@pytest.mark.parametrize("size", [(20, 150), (150, 20)])
def test_noise_of_stretched_images_is_antialiased_if_one_side_shrinks(size):
    noise = torch.randn(3, 16, 16, generator=torch.Generator().manual_seed(0)).clamp(-1, 1)
    square = F.interpolate(noise[None], (64, 64), mode="bilinear")
    expected = F.interpolate(square, size, mode="bilinear", antialias=True)[0].permute(1, 2, 0)
    stretching = UnSegProcessor.for_image_size(64, stretch=True)
    np.testing.assert_allclose(stretching.full_size_noise(noise, size, (64, 64))[:], expected, atol=2e-6)
