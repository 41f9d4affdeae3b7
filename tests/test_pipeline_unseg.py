"""The "image-protection" pipeline gives what `Protector` gives, for one image, lists and batches."""

import functools
import http.server
import json
import threading

import numpy as np
import pytest
from datasets import Dataset, Features
from datasets import Image as ImageFeature
from PIL import Image
from transformers import pipeline

from unseg_hf import ImageFileError, Protector, UnSegModel, default_checkpoint, modeling_unseg


def photo(seed, height=40, width=56):
    y, x = np.mgrid[:height, :width]
    return Image.fromarray(np.stack([90 + y, 60 + x + seed, 200 - x], axis=-1).astype(np.uint8))


def box_mask(height=40, width=56):
    mask = np.zeros((height, width), bool)
    mask[10:30, 20:40] = True
    return mask


@pytest.fixture(scope="module")
def protect(saved_generator):
    return pipeline("image-protection", model=str(saved_generator))


@pytest.fixture(scope="module")
def protector(saved_generator):
    return Protector.from_pretrained(saved_generator)


def test_one_image_equals_the_protector(protect, protector):
    result = protect(photo(0), mask=box_mask(), epsilon=16 / 255)
    expected = protector.protect(photo(0), mask=box_mask(), epsilon=16 / 255)
    np.testing.assert_array_equal(np.asarray(result["image"]), np.asarray(expected.image))
    np.testing.assert_array_equal(np.asarray(result["mask"]), box_mask() * 255)
    assert result["report"]["max_noise"] == expected.report["max_noise"] > 0
    assert result["report"]["epsilon_background"] == pytest.approx(4)


def test_a_list_with_a_prompt_for_each_image(protect, protector):
    inputs = [
        {"image": photo(0), "mask": box_mask()},
        {"image": photo(1), "whole_image": True},
        {"image": photo(2, 30, 90), "boxes": [[3, 4, 40, 25]]},
    ]
    for item, result in zip(inputs, protect(inputs), strict=True):
        expected = protector.protect(**item)
        np.testing.assert_array_equal(np.asarray(result["image"]), np.asarray(expected.image))


def test_a_call_adds_to_what_the_pipeline_was_made_with(saved_generator, protector):
    labels = box_mask().astype(np.uint8) + 1
    made = pipeline(
        "image-protection", model=str(saved_generator), mode="per_segment", ignore_labels=(1,), epsilon=4 / 255
    )
    wanted = {"label_map": labels, "mode": "per_segment", "ignore_labels": (1,), "epsilon": 4 / 255}
    for call, expected in (
        (made(photo(0), label_map=labels), protector.protect(photo(0), **wanted)),
        (made({"image": photo(0), "label_map": labels}), protector.protect(photo(0), **wanted)),
        (made(photo(0), label_map=labels, mode="union"), protector.protect(photo(0), **(wanted | {"mode": "union"}))),
    ):
        np.testing.assert_array_equal(np.asarray(call["image"]), np.asarray(expected.image))
    with pytest.raises(ValueError, match="mask and whole_image were given"):
        pipeline("image-protection", model=str(saved_generator), whole_image=True)(photo(0), mask=box_mask())


def test_batches_differ_from_singles_by_rounding_alone(protect):
    inputs = [{"image": photo(i, 30 + i, 60), "whole_image": True} for i in range(5)]
    for single, batched in zip(protect(inputs), protect(inputs, batch_size=3), strict=True):
        difference = np.abs(np.asarray(single["image"], int) - np.asarray(batched["image"], int))
        assert difference.max() <= 1
        assert (difference > 0).mean() < 0.01


def test_an_unknown_keyword_is_named(protect):
    with pytest.raises(ValueError, match=r"unknown masc: the prompt has mask, masks"):
        protect(photo(0), masc=box_mask())
    with pytest.raises(ValueError, match="unknown masc: the prompt has"):
        protect({"image": photo(0), "masc": box_mask()})
    with pytest.raises(ValueError, match="a dict of mask: it needs an 'image'"):
        protect({"mask": box_mask()})


@pytest.mark.parametrize("mode", ["RGB", "L", "RGBA", "I;16"])
def test_a_photo_may_be_an_address(protect, tmp_path, mode):
    pixels = np.asarray(photo(0).convert("L"), np.uint16) * 200
    given = Image.fromarray(pixels) if mode == "I;16" else photo(0).convert(mode)
    given.save(tmp_path / "photo.png")
    handler = functools.partial(http.server.SimpleHTTPRequestHandler, directory=tmp_path)
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        fetched = protect(f"HTTP://127.0.0.1:{server.server_port}/photo.png", mask=box_mask())
        with pytest.raises(ImageFileError, match=r"none\.png: it cannot be fetched \(.*404"):
            protect(f"http://127.0.0.1:{server.server_port}/none.png", mask=box_mask())
        server.shutdown()
    assert fetched["image"].mode == mode
    np.testing.assert_array_equal(fetched["image"], protect(given, mask=box_mask())["image"])


def test_a_pipeline_works_with_the_model_that_it_has_now(protect, saved_generator):
    fresh = pipeline("image-protection", model=str(saved_generator))
    before = fresh(photo(0), mask=box_mask())["image"]
    other = UnSegModel.from_pretrained(saved_generator)
    other.noise_head.noise_tokens.weight.data *= -1
    fresh.model = other
    assert (np.asarray(fresh(photo(0), mask=box_mask())["image"]) != np.asarray(before)).any()


def test_what_would_be_left_out_or_misread_is_refused(protect):
    with pytest.raises(ValueError, match="by name: mask="):
        protect(photo(0), box_mask())
    with pytest.raises(ValueError, match="this is a data set: pass one of its columns"):
        protect(Dataset.from_dict({"image": [1]}))


def test_a_tuple_gives_a_list_a_column_an_iterator_and_nothing_nothing(protect, protector):
    photos = [photo(seed) for seed in range(2)]
    expected = [np.asarray(protector.protect(one, mask=box_mask()).image) for one in photos]
    column = Dataset.from_dict({"image": photos}, features=Features({"image": ImageFeature()}))["image"]
    listed, streamed = (protect(given, mask=box_mask()) for given in (tuple(photos), column))
    assert isinstance(listed, list)
    assert not isinstance(streamed, list)
    for results in (listed, streamed):
        np.testing.assert_array_equal([np.asarray(result["image"]) for result in results], expected)
    assert protect([]) == []


def test_a_pipeline_is_not_pushed_in_part(protect, tmp_path):
    with pytest.raises(ValueError, match=r"push the model alone; call push_to_hub\(repo_id\) of the pipeline"):
        protect.save_pretrained(tmp_path / "new", push_to_hub=True, repo_id="tester/tiny")
    assert not (tmp_path / "new").exists()


def test_without_a_model_it_is_the_one_that_comes_with_the_package():
    model = pipeline("image-protection").model
    assert model.config.to_dict() == UnSegModel.from_pretrained(default_checkpoint()).config.to_dict()


def test_a_model_saved_without_its_pipeline_names_none_that_is_not_there(saved_generator, tmp_path, monkeypatch):
    said = []
    monkeypatch.setattr(modeling_unseg.logger, "warning", said.append)
    protect = pipeline("image-protection", model=str(saved_generator))
    protect.save_pretrained(tmp_path / "pipeline")
    assert "custom_pipelines" in json.loads((tmp_path / "pipeline/config.json").read_text())
    assert not said
    # Loaded, or still in memory.
    for model in (UnSegModel.from_pretrained(tmp_path / "pipeline"), protect.model):
        model.save_pretrained(tmp_path / "model")
        protect.processor.save_pretrained(tmp_path / "model")
        assert "custom_pipelines" not in json.loads((tmp_path / "model/config.json").read_text())
        assert ["saved without its pipeline" in line for line in said] == [True]
        said.clear()
        again = pipeline("image-protection", model=str(tmp_path / "model"))
        np.testing.assert_array_equal(
            again(photo(0), mask=box_mask())["image"], protect(photo(0), mask=box_mask())["image"]
        )


def test_an_images_own_fields_come_before_those_of_the_call(protect, protector):
    labels = box_mask().astype(np.uint8)
    labels[32:, :10] = 2
    own = {"image": photo(0), "label_map": labels, "ignore_labels": (0, 2)}
    got = protect([own, {"image": photo(0), "label_map": labels}], ignore_labels=(0, 1))
    for result, ignored in zip(got, ((0, 2), (0, 1)), strict=True):
        expected = protector.protect(photo(0), label_map=labels, ignore_labels=ignored)
        np.testing.assert_array_equal(np.asarray(result["mask"]) > 0, expected.region)
