"""`ProtectImages` under the `map` of real data sets."""

import io
import os
import pickle
import shutil

import numpy as np
import pytest
import torch
from datasets import Dataset, Features, Image, IterableDataset, List, Value
from datasets.fingerprint import Hasher
from hub_server import Commit, HubServer, Repository
from huggingface_hub import constants
from PIL import Image as PILImage
from safetensors.torch import load_file, save_file

from unseg_hf import ProtectImages, Protector, UnSegProcessor, cli
from unseg_hf.mapping import RecordError, stored_prompt
from unseg_hf.model_identity import model_identity


def encoded(pixels, format="PNG", **options):
    buffer = io.BytesIO()
    PILImage.fromarray(pixels).save(buffer, format, **options)
    return buffer.getvalue()


def photo(height, width, channels=3, seed=0):
    pixels = np.random.default_rng(seed).integers(30, 220, (height, width, channels), dtype=np.uint8)
    return pixels[:, :, 0] if channels == 1 else pixels


def box(height, width):
    mask = np.zeros((height, width), np.uint8)
    mask[height // 4 : height // 2, width // 4 :] = 255
    return mask


SIZES = [(48, 64, 3, "PNG"), (50, 30, 3, "JPEG"), (40, 40, 1, "PNG"), (33, 60, 4, "PNG"), (20, 24, 3, "WEBP")]


def rows():
    """Images of several sizes, modes and formats, with masks and an annotation."""
    images = [encoded(photo(h, w, c, i), format) for i, (h, w, c, format) in enumerate(SIZES)]
    return {
        "image": [{"bytes": data, "path": f"{i}.jpg"} for i, data in enumerate(images)],
        "mask": [{"bytes": encoded(box(h, w)), "path": None} for h, w, *_ in SIZES],
        "caption": [f"picture {i}" for i in range(len(SIZES))],
    }


FEATURES = Features({"image": Image(), "mask": Image(), "caption": Value("string")})


@pytest.fixture
def dataset(tmp_path, monkeypatch):
    """On disk, as the cache needs it."""
    monkeypatch.chdir(tmp_path)
    Dataset.from_dict(rows(), features=FEATURES).save_to_disk(tmp_path / "saved")
    return Dataset.load_from_disk(tmp_path / "saved")


@pytest.fixture
def broken(tmp_path, monkeypatch):
    """The rows with: a cut image, no image, text, a missing mask, and a mask of another size among them."""
    monkeypatch.chdir(tmp_path)
    columns = rows()
    good = columns["image"][0]["bytes"]
    bad = [({"bytes": good[:-60], "path": "cut.png"}, 0), (None, 0), ({"bytes": b"text", "path": None}, 0)]
    bad += [({"bytes": good, "path": None}, None), ({"bytes": good, "path": None}, 1)]
    for image, mask in bad:
        columns["image"].insert(2, image)
        columns["mask"].insert(2, None if mask is None else columns["mask"][mask])
        columns["caption"].insert(2, "bad")
    Dataset.from_dict(columns, features=FEATURES).save_to_disk(tmp_path / "broken")
    return Dataset.load_from_disk(tmp_path / "broken")


def stored(dataset, column="image"):
    return [value and value["bytes"] for value in dataset.cast_column(column, Image(decode=False))[column]]


def test_pixels_are_those_of_the_protector_and_of_the_command(dataset, saved_generator, tmp_path):
    mapped = dataset.map(ProtectImages(str(saved_generator), mask_column="mask"), batched=True)
    protector = Protector.from_pretrained(saved_generator)
    columns = rows()
    for index, data in enumerate(stored(mapped)):
        assert data.startswith(b"\x89PNG")
        image, mask = (columns[name][index]["bytes"] for name in ("image", "mask"))
        expected = protector.protect(image, mask=mask).image
        got = PILImage.open(io.BytesIO(data))
        assert got.mode == expected.mode
        np.testing.assert_array_equal(np.asarray(got), np.asarray(expected))
        (tmp_path / "in").mkdir(exist_ok=True)
        (tmp_path / "in/image").write_bytes(image)
        (tmp_path / "in/mask").write_bytes(mask)
    arguments = ["protect", "in/image", "-o", "out.png", "--masks", "in/mask", "--model", saved_generator]
    assert cli.main([str(argument) for argument in arguments]) == 0
    np.testing.assert_array_equal(np.asarray(PILImage.open("out.png")), np.asarray(got))
    assert mapped["caption"][:] == columns["caption"]
    assert stored(mapped, "mask") == [mask["bytes"] for mask in columns["mask"]]
    assert mapped.features == dataset.features


def test_boxes_in_a_column_are_the_protectors_boxes(dataset, saved_generator):
    boxes = [[[8, 12, 40, 30.5], [0, 0, 5, 5]], [[2, 2, 20, 20]], [], None, [[90, 0, 99, 9]]]
    protect = ProtectImages(str(saved_generator), box_column="boxes", on_error="mark")
    mapped = dataset.add_column("boxes", boxes).map(protect, batched=True)
    protector = Protector.from_pretrained(saved_generator)
    for index in (0, 1):
        expected = protector.protect(rows()["image"][index]["bytes"], boxes=boxes[index]).image
        np.testing.assert_array_equal(np.asarray(mapped[index]["image"]), np.asarray(expected))
    errors = mapped["protection_error"][:]
    assert errors[:3] == ["", "", ""]
    np.testing.assert_array_equal(
        np.asarray(mapped[2]["image"]),
        np.asarray(protector.protect(rows()["image"][2]["bytes"], mask=np.zeros((40, 40))).image),
    )
    assert "the boxes are missing" in errors[3]
    assert "lies outside the image" in errors[4]
    assert stored(mapped)[3:] == [None] * 2


def test_boxes_of_detection_data_sets_are_fields_and_have_widths_and_heights(dataset, saved_generator):
    objects = [{"bbox": [[8, 12, 32, 18.5], [0, 0, 5, 5]], "category": [1, 2]}, None, {"bbox": [], "category": []}]
    objects += [{"bbox": [[2, 2, 0, 18]], "category": [1]}, {"bbox": [[2, 2, 18]], "category": [1]}]
    listed = [None if o is None else [{"bbox": b, "category": 1} for b in o["bbox"]] for o in objects]
    expected = Protector.from_pretrained(saved_generator).protect(
        rows()["image"][0]["bytes"], boxes=[[8, 12, 40, 30.5], [0, 0, 5, 5]]
    )
    for name, column in (("objects", objects), ("listed", listed)):
        protect = ProtectImages(str(saved_generator), box_column=f"{name}.bbox", box_format="xywh", on_error="mark")
        mapped = dataset.add_column(name, column).map(protect, batched=True)
        np.testing.assert_array_equal(np.asarray(mapped[0]["image"]), np.asarray(expected.image))
        errors = mapped["protection_error"][:]
        assert [bool(error) for error in errors] == [False, True, False, True, True]
        assert "the boxes are missing" in errors[1]
        assert "[2.0, 2.0, 0.0, 18.0]: needs a width and a height above 0" in errors[3]
        assert mapped[name][:] == dataset.add_column(name, column)[name][:]
    protect = ProtectImages(str(saved_generator), box_column="objects.boxes", on_error="mark")
    with pytest.raises(ValueError, match="has no field 'boxes': there is bbox, category"):
        dataset.add_column("objects", objects).map(protect, batched=True)


def test_a_column_says_of_which_class_each_mask_or_box_is(dataset, build_generator, tmp_path):
    build_generator(noise_codes=4).save_pretrained(tmp_path)
    UnSegProcessor.for_image_size(64).save_pretrained(tmp_path)
    protector = Protector.from_pretrained(tmp_path)
    boxes = [[0, 0, 20, 20], [20, 20, 40, 40]]
    objects = [{"bbox": boxes, "category": [2, 1]}] * 2 + [{"bbox": boxes, "category": [1]}]
    objects += [{"bbox": boxes, "category": None}, {"bbox": [], "category": []}]
    settings = {"mode": "per_segment", "on_error": "mark"}
    protect = ProtectImages(str(tmp_path), box_column="o.bbox", class_column="o.category", **settings)
    mapped = dataset.add_column("o", objects).map(protect, batched=True)
    image = rows()["image"][0]["bytes"]
    expected = protector.protect(image, boxes=boxes, classes=[2, 1], mode="per_segment").image
    np.testing.assert_array_equal(np.asarray(mapped[0]["image"]), np.asarray(expected))
    errors = mapped["protection_error"][:]
    assert [bool(error) for error in errors] == [False, False, True, True, False]
    assert "classes=[1] for 2 masks or boxes" in errors[2]
    assert "the classes are missing" in errors[3]
    # One mask and its class, without lists.
    protect = ProtectImages(str(tmp_path), mask_column="mask", class_column="class", **settings)
    mapped = dataset.add_column("class", [2] * 5).map(protect, batched=True)
    expected = protector.protect(image, masks=[rows()["mask"][0]["bytes"]], classes=[2], mode="per_segment").image
    np.testing.assert_array_equal(np.asarray(mapped[0]["image"]), np.asarray(expected))


def test_what_boxes_are_not_is_named_with_the_option_that_is_meant(dataset, saved_generator):
    for column, message in (
        ({"bbox": [[1, 2, 3, 4]]}, "the boxes are a struct of bbox: name the field, as in 'objects.bbox'"),
        ([[40, 30, 20, 10]], "needs x0 < x1 and y0 < y1, in pixels .*box_format, xywh"),
    ):
        with pytest.raises(RecordError, match=message):
            dataset.add_column("boxes", [column] * 5).map(
                ProtectImages(str(saved_generator), box_column="boxes"), batched=True
            )


def test_columns_that_would_be_lost_or_protected_twice_are_refused(dataset, saved_generator):
    settings = {"mask_column": "mask", "on_error": "keep"}
    once = dataset.map(ProtectImages(str(saved_generator), **settings), batched=True)
    with pytest.raises(
        ValueError, match="there is a column 'protection_error' already: if these images are protected"
    ):
        once.map(ProtectImages(str(saved_generator), **settings), batched=True)
    again = ProtectImages(str(saved_generator), **settings, error_column="second")
    assert once.map(again, batched=True)["protection_error"][:] == once["protection_error"][:]
    reported = ProtectImages(str(saved_generator), mask_column="mask", report_columns=("psnr",))
    with pytest.raises(ValueError, match="there is a column 'protection_psnr' already"):
        dataset.map(reported, batched=True).map(reported, batched=True)


def test_images_that_are_no_images_are_named_by_what_they_are(dataset, saved_generator):
    protect = ProtectImages(str(saved_generator), image_column="other", whole_image=True)
    with pytest.raises(ValueError, match=r"column 'other' holds paths or bytes: cast it to datasets.Image\(\)"):
        dataset.add_column("other", ["a.png"] * 5).map(protect, batched=True)
    listed = dataset.map(lambda row: {"other": [row["image"]]})
    with pytest.raises(RecordError, match="the image is a list of images: map takes one a row"):
        listed.map(protect, batched=True)


def test_masks_may_be_fields_too_and_a_name_with_a_dot_is_a_name_first(dataset, saved_generator):
    expected = dataset.map(ProtectImages(str(saved_generator), mask_column="mask"), batched=True)
    nested = dataset.map(lambda row: {"objects": {"mask": row["mask"], "a": 1}})
    with pytest.raises(ValueError, match=r"image_column='objects.mask' is a field of a column, in which the original"):
        nested.map(ProtectImages(str(saved_generator), image_column="objects.mask"), batched=True)
    for name, rows_ in (("objects.mask", nested), ("a.b", dataset.rename_column("mask", "a.b"))):
        mapped = rows_.map(ProtectImages(str(saved_generator), mask_column=name), batched=True)
        assert stored(mapped) == stored(expected)


def test_shares_of_an_image_are_no_boxes(dataset, saved_generator):
    protect = ProtectImages(str(saved_generator), box_column="boxes")
    with pytest.raises(RecordError, match=r"column 'image' \(0\.jpg\): .*multiply shares of the image's sides by 64"):
        dataset.add_column("boxes", [[[0.1, 0.2, 0.8, 0.9]]] * 5).map(protect, batched=True)


def test_a_pipe_in_a_column_is_an_error_and_not_waited_for(dataset, saved_generator, tmp_path):
    os.mkfifo(tmp_path / "pipe.png")
    rows = Dataset.from_dict({"image": [str(tmp_path / "pipe.png")] * 2}).cast_column("image", Image())
    mapped = rows.map(ProtectImages(str(saved_generator), on_error="mark"), batched=True)
    assert mapped["protection_error"] == ["the image is no file: pipe.png"] * 2


@pytest.mark.parametrize("format", ["numpy", "torch"])
def test_formatted_rows_are_refused(format, dataset, saved_generator):
    protect = ProtectImages(str(saved_generator), mask_column="mask")
    with pytest.raises(ValueError, match="leave with_format out"):
        dataset.with_format(format).map(protect, batched=True, features=dataset.features)


def test_masks_that_are_no_images_are_named_by_what_they_have(dataset, saved_generator):
    protect = ProtectImages(str(saved_generator), mask_column="code")
    code = [{"size": [48, 64], "counts": "abc"}] * 5
    with pytest.raises(RecordError, match=r"the mask has '\w+', '\w+', and no bytes or path"):
        dataset.add_column("code", code).map(protect, batched=True)


def test_a_stream_without_known_columns_is_refused_and_features_are_those_of_images(saved_generator):
    protect = ProtectImages(str(saved_generator))
    with pytest.raises(ValueError, match="give it features="):
        protect.features(None)
    assert protect.features(Features({"image": Image(decode=False)})) == Features({"image": Image()})


def test_a_file_that_happens_to_have_the_images_name_is_not_stored_in_its_place(dataset, saved_generator, tmp_path):
    (tmp_path / "0.jpg").write_bytes(rows()["image"][0]["bytes"])
    (tmp_path / "0.png").write_bytes(rows()["image"][0]["bytes"])
    mapped = dataset.map(ProtectImages(str(saved_generator), whole_image=True), batched=True)
    again = mapped.cast_column("image", Image(decode=False)).map(lambda row: {"image": row["image"]})
    assert stored(mapped)[0] == stored(again)[0] != rows()["image"][0]["bytes"]


def test_a_second_map_comes_from_the_cache_and_other_settings_or_weights_do_not(
    dataset, saved_generator, tmp_path, monkeypatch
):
    model = shutil.copytree(saved_generator, tmp_path / "model")
    calls = []
    apply = Protector.apply
    monkeypatch.setattr(Protector, "apply", lambda self, *a: calls.append(1) or apply(self, *a))

    def mapped(**settings):
        calls.clear()
        result = dataset.map(ProtectImages(str(model), mask_column="mask", **settings), batched=True)
        return stored(result), len(calls)

    first, made = mapped()
    assert made == len(SIZES)
    assert mapped() == (first, 0)
    assert mapped(epsilon=0.01)[1] == mapped(mode="per_segment")[1] == len(SIZES)
    weights = load_file(model / "model.safetensors")
    name = next(name for name in weights if "noise_mlps" in name)
    save_file({**weights, name: weights[name] + 1}, model / "model.safetensors", {"format": "pt"})
    changed, made = mapped()
    assert made == len(SIZES)
    assert changed != first


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"epsilon_background": 0.1}, "epsilon_background=0.1 needs epsilon"),
        ({"epsilon_background": float("nan")}, "epsilon_background=nan needs epsilon"),
        ({"epsilon": 0.1, "epsilon_background": float("nan")}, "epsilon_background=nan"),
        ({"epsilon": float("nan")}, "epsilon=nan"),
        ({"epsilon": float("inf"), "epsilon_background": 0.1}, "epsilon=inf"),
    ],
)
def test_a_budget_that_bounds_nothing_is_refused(saved_generator, settings, message):
    with pytest.raises(ValueError, match=message):
        ProtectImages(str(saved_generator), **settings)


def test_hashing_and_pickling_take_no_weights(saved_generator):
    protect = ProtectImages(str(saved_generator), whole_image=True)
    before = Hasher.hash(protect)
    protect({"image": [photo(20, 20)]})
    assert len(pickle.dumps(protect)) < 2000
    assert Hasher.hash(protect) == Hasher.hash(pickle.loads(pickle.dumps(protect))) == before


def test_two_processes_give_the_same(dataset, saved_generator):
    protect = ProtectImages(str(saved_generator), mask_column="mask")
    alone = dataset.map(protect, batched=True)
    both = dataset.map(protect, batched=True, num_proc=2, with_rank=True, batch_size=2)
    assert stored(alone) == stored(both)


@pytest.mark.parametrize("how", ["decode", "cast"])
def test_an_iterable_data_set_gives_the_same_broken_rows_included(broken, saved_generator, how):
    protect = ProtectImages(str(saved_generator), mask_column="mask", on_error="drop")
    expected = broken.map(protect, batched=True, batch_size=4)
    stream = broken.to_iterable_dataset(num_shards=2)
    assert isinstance(stream, IterableDataset)
    if how == "decode":
        stream = stream.decode(False)
    else:
        stream = stream.cast_column("image", Image(decode=False)).cast_column("mask", Image(decode=False))
    mapped = stream.map(protect, batched=True, batch_size=4, features=protect.features(broken.features))
    got = list(mapped.decode())
    assert [row["caption"] for row in got] == expected["caption"][:]
    for row, image in zip(got, expected["image"], strict=True):
        assert np.array_equal(np.asarray(row["image"]), np.asarray(image))


def test_broken_rows_are_marked_kept_dropped_or_stop_the_map(broken, saved_generator):
    def mapped(on_error):
        protect = ProtectImages(str(saved_generator), mask_column="mask", on_error=on_error)
        return broken.map(protect, batched=True, batch_size=3)

    marked = mapped("mark")
    errors = marked["protection_error"][:]
    assert [bool(error) for error in errors] == [caption == "bad" for caption in broken["caption"]]
    assert [image is None for image in stored(marked)] == [bool(error) for error in errors]
    for said in ("damaged or cut short", "the image is missing", "not an image", "the mask is missing", "of shape"):
        assert sum(said in error for error in errors) == 1
    kept = mapped("keep")
    assert kept["protection_error"][:] == errors
    for before, after, error in zip(stored(broken), stored(kept), errors, strict=True):
        assert (before == after) == bool(error)
    dropping = ProtectImages(str(saved_generator), mask_column="mask", on_error="drop")
    # The first batch, without a bad row, has the columns of the others.
    for order in (range(len(broken)), sorted(range(len(broken)), key=lambda i: broken["caption"][i] == "bad")):
        short = broken.select(order).map(dropping, batched=True, batch_size=2, remove_columns="caption")
        assert len(short) == len(rows()["caption"])
    dropped = mapped("drop")
    assert stored(dropped) == [data for data in stored(marked) if data is not None]
    assert dropped["caption"][:] == rows()["caption"]
    assert dropped.features == broken.features
    with pytest.raises(RecordError, match=r"row \d of the batch, column 'image': .*on_error='mark'"):
        mapped("raise")


def test_a_list_of_masks_and_a_label_map_reach_the_generator(saved_generator, dataset):
    size = SIZES[0][:2]
    labels = np.zeros(size, np.uint8)
    labels[5:20, 5:20], labels[30:40, 30:50] = 1, 2
    masks = [{"bytes": encoded((labels == value).astype(np.uint8)), "path": None} for value in (1, 2)]
    row = {"image": [rows()["image"][0]], "masks": [masks], "labels": [{"bytes": encoded(labels), "path": None}]}
    features = Features({"image": Image(), "masks": List(Image()), "labels": Image()})
    one = Dataset.from_dict(row, features=features)
    results = []
    shaped = stored_prompt(labels[None], True), stored_prompt(labels[..., None], True)
    assert all((prompt.label_map == labels).all() for prompt in shaped)
    for settings in ({"mask_column": "masks"}, {"mask_column": "labels", "label_maps": True}):
        protect = ProtectImages(str(saved_generator), mode="per_segment", report_columns=("masks",), **settings)
        results.append(one.map(protect, batched=True))
    expected = Protector.from_pretrained(saved_generator).protect(
        row["image"][0]["bytes"], label_map=labels, mode="per_segment"
    )
    for result in results:
        assert result["protection_masks"][:] == [2]
        np.testing.assert_array_equal(np.asarray(result[0]["image"]), np.asarray(expected.image))


def test_all_images_of_a_data_set_may_get_the_same_noise():
    """With the generator in the package, which has a tint for what is low."""
    masks = np.zeros((3, 96, 128), np.uint8)
    masks[:, 20:24, 10:100] = masks[0, 20:90, 10:100] = 1
    image, masks = encoded(np.full((96, 128, 3), 90, np.uint8)), [encoded(mask) for mask in masks]
    columns = {
        name: [{"bytes": data, "path": None} for data in stored]
        for name, stored in (("image", [image] * 3), ("mask", masks))
    }
    images = Dataset.from_dict(columns, features=Features({"image": Image(), "mask": Image()}))
    for tint, wanted in (("auto", [0, 1, 1]), ("always", [1, 1, 1]), ("never", [0, 0, 0])):
        protect = ProtectImages(mask_column="mask", tint=tint, report_columns=("tinted",))
        assert images.map(protect, batched=True)["protection_tinted"][:] == wanted


def test_report_columns_keep_their_type_where_the_first_rows_have_no_figures(broken, saved_generator):
    figures = ("max_noise", "psnr", "notes")
    protect = ProtectImages(str(saved_generator), mask_column="mask", on_error="mark", report_columns=figures)
    mapped = broken.select(range(2, 10)).map(protect, batched=True, batch_size=2, writer_batch_size=2)
    noise = np.array(mapped["protection_max_noise"])
    failed = np.array([bool(error) for error in mapped["protection_error"]])
    assert np.isnan(noise[failed]).all()
    assert (noise[~failed] <= 8).all()
    assert mapped.features == protect.features(broken.features)
    stream = broken.to_iterable_dataset().decode(False)
    streamed = stream.map(protect, batched=True, batch_size=3, features=protect.features(broken.features)).decode()
    assert [row["protection_error"] for row in streamed][2:] == mapped["protection_error"][:]


def test_metadata_are_kept(saved_generator):
    exif = PILImage.Exif()
    exif[0x010E] = "harbour"
    data = encoded(photo(30, 30), "JPEG", exif=exif, dpi=(72, 72))
    dataset = Dataset.from_dict({"image": [{"bytes": data, "path": None}]}, features=Features({"image": Image()}))
    mapped = dataset.map(ProtectImages(str(saved_generator), whole_image=True), batched=True)
    image = PILImage.open(io.BytesIO(stored(mapped)[0]))
    assert image.getexif()[0x010E] == "harbour"
    assert image.info["dpi"] == pytest.approx((72, 72), abs=0.1)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"model": "no/such/folder"}, "no/such/folder: no such folder"),
        ({"model": {}}, "model is a dict: pass a folder or Hub id"),
        ({"whole_image": True, "mask_column": "mask"}, "one kind of prompt"),
        ({"mask_column": "mask", "box_column": "boxes"}, "mask_column='mask' and box_column='boxes' were given"),
        ({"box_column": "boxes", "box_format": "yolo"}, "box_format='yolo': must be one of xyxy, xywh"),
        ({"box_format": "xywh"}, "box_format='xywh' needs box_column"),
        ({"box_column": "boxes", "class_column": "c"}, "class_column='c' needs mode='per_segment'"),
        ({"class_column": "c", "mode": "per_segment"}, "class_column='c' needs .*mask_column or box_column"),
        ({"label_maps": True}, "needs mask_column"),
        ({"on_error": "ignore"}, "must be one of raise, keep, mark, drop"),
        ({"mode": "all"}, "must be one of union"),
        ({"tint": "some"}, "tint='some': must be one of auto, always, never"),
        ({"report_columns": ["noise"]}, "report_columns has noise: there is max_noise"),
        ({"epsilon": 2.0}, "epsilon"),
        ({"batch_size": 0}, "at least 1"),
    ],
)
def test_settings_that_make_no_sense_are_refused_at_once(settings, message):
    with pytest.raises(ValueError, match=message):
        ProtectImages(**settings)


def test_a_column_that_is_not_there_and_a_map_without_batches_are_refused(dataset, saved_generator):
    with pytest.raises(ValueError, match="no column 'picture': the data set has image, mask, caption"):
        dataset.map(ProtectImages(str(saved_generator), image_column="picture"), batched=True)
    with pytest.raises(ValueError, match="pass batched=True"):
        dataset.map(ProtectImages(str(saved_generator), whole_image=True))


def test_a_generator_of_the_hub_is_known_by_its_commit_also_where_the_hub_cannot_be_reached(
    saved_generator, tmp_path, monkeypatch
):
    with HubServer() as hub:
        monkeypatch.setattr(constants, "ENDPOINT", hub.url)
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
        hub.repositories["tester/tiny"] = Repository(False, [Commit("one", {"config.json": b"{}"})])
        commit = hub.repositories["tester/tiny"].commits[-1].sha
        assert model_identity("tester/tiny") == (f"tester/tiny@{commit}", commit)
        # As the client keeps what it has fetched.
        fetched = tmp_path / "cache/models--tester--tiny"
        for name, text in (("refs/main", "a" * 40), (f"snapshots/{'a' * 40}/config.json", "{}")):
            (fetched / name).parent.mkdir(parents=True)
            (fetched / name).write_text(text)
        hub.failures["."] = (403, "closed")
        assert model_identity("tester/tiny") == (f"tester/tiny@{'a' * 40}", "a" * 40)
        with pytest.raises(ValueError, match=r"tester/other: no such folder, and as a Hub id: .*closed"):
            model_identity("tester/other")


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_a_gpu_protects_in_batches_within_the_bound(dataset, saved_generator):
    protect = ProtectImages(str(saved_generator), mask_column="mask", device="cuda", batch_size=3)
    mapped = dataset.map(protect, batched=True)
    for index, (before, after) in enumerate(zip(rows()["image"], stored(mapped), strict=True)):
        a, b = (np.asarray(PILImage.open(io.BytesIO(data))).astype(int) for data in (before["bytes"], after))
        inside = box(*SIZES[index][:2]) > 0
        assert np.abs(a - b)[inside].max() <= 8
        assert np.abs(a - b)[~inside].max() <= 2


def test_each_process_takes_a_gpu_of_its_own(saved_generator, monkeypatch):
    devices = []
    monkeypatch.setattr("unseg_hf.mapping._load", lambda model, revision, identity, device: devices.append(device))
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 4)
    for device, rank in (("cuda", 6), ("cuda", None), ("cpu", 6)):
        ProtectImages(str(saved_generator), device=device).protector(rank)
    assert devices == ["cuda:2", "cuda", "cpu"]


def test_one_label_to_ignore_needs_no_list(saved_generator):
    assert ProtectImages(str(saved_generator), mask_column="mask", ignore_labels=0).ignore_labels == (0,)


def test_indices_are_not_taken_for_a_rank(saved_generator):
    dataset = Dataset.from_dict({"image": [PILImage.fromarray(photo(20, 30))]}, features=Features({"image": Image()}))
    with pytest.raises(ValueError, match="leave out with_indices"):
        dataset.map(ProtectImages(str(saved_generator), whole_image=True), batched=True, with_indices=True)


def test_both_budgets_reach_the_protector(dataset, saved_generator):
    budget = {"epsilon": 8 / 255, "epsilon_background": 0}
    mapped = dataset.map(ProtectImages(str(saved_generator), mask_column="mask", **budget), batched=True)
    protector, columns = Protector.from_pretrained(saved_generator), rows()
    for index, data in enumerate(stored(mapped)):
        image, mask = (columns[name][index]["bytes"] for name in ("image", "mask"))
        expected = protector.protect(image, mask=mask, **budget).image
        np.testing.assert_array_equal(np.asarray(PILImage.open(io.BytesIO(data))), np.asarray(expected))
