import json
import re
from pathlib import Path

import numpy as np
import pytest
from labelled_discs import discs, encoded, write_discs, write_parquet
from PIL import Image

from unseg_hf import cli
from unseg_hf.evaluation import audit_command
from unseg_hf.evaluation.labelled_images import (
    CocoImages,
    DatasetRows,
    ImageFiles,
    LabelledImages,
    ProposedSegments,
    Raw,
)

IMAGES, NUMBERS = discs(4, 30, 40, seed=0)


class InMemory:
    name = "memory"

    def __init__(self, labels: list, instances: list | None = None) -> None:
        self.labels, self.instances = labels, instances

    def __len__(self) -> int:
        return len(self.labels)

    def load(self, index: int) -> Raw:
        if self.labels[index] is None:
            raise OSError(f"image {index} is damaged")
        instances = None if self.instances is None else self.instances[index]
        return Raw(str(index), Image.fromarray(IMAGES[index]), self.labels[index], instances)


@pytest.mark.parametrize("value", [1, 255])
def test_two_values_are_a_binary_mask_whatever_the_foregrounds_number(value: int):
    images = LabelledImages(InMemory(list((NUMBERS > 0) * np.uint8(value))))
    assert images.classes == (0, 1)
    for labelled, numbers in zip(images, NUMBERS, strict=True):
        np.testing.assert_array_equal(labelled.labels, numbers > 0)
        np.testing.assert_array_equal(labelled.region, numbers > 0)


def test_a_border_of_255_around_a_binary_mask_is_no_class():
    labels = (NUMBERS > 0).astype(np.uint8)
    labels[:, :4] = 255
    images = LabelledImages(InMemory(list(labels)))
    assert images.binary
    np.testing.assert_array_equal(images[0].labels, labels[0])
    np.testing.assert_array_equal(images[0].region, labels[0] == 1)


def test_of_two_classes_the_one_that_is_no_background_is_scored():
    trimaps = np.where(NUMBERS > 0, 1, 2).astype(np.uint8)
    trimaps[:, :4] = 3
    images = LabelledImages(InMemory(list(trimaps)), ignore=[3], background=[2])
    assert images.classes == (2, 1)
    np.testing.assert_array_equal(images[0].labels == 1, (NUMBERS[0] > 0) & (trimaps[0] != 3))
    np.testing.assert_array_equal(images[0].region, images[0].labels == 1)


def test_the_background_of_a_binary_mask_is_0():
    with pytest.raises(ValueError, match="binary masks, whose background is 0, not 255: invert the masks"):
        LabelledImages(InMemory(list((NUMBERS > 0) * np.uint8(255))), background=[255])


def test_classes_are_numbered_without_gaps_and_the_test_images_follow():
    labels = np.select([NUMBERS == 1, NUMBERS == 2], [7, 30], 3).astype(np.uint8)
    labels[:, 0], labels[:, 1] = 255, 11
    train = LabelledImages(InMemory(list(labels)), ignore=[11], background=[3])
    assert train.classes == (3, 7, 30)
    np.testing.assert_array_equal(train[0].labels[2:], NUMBERS[0, 2:])
    assert (train[0].labels[:2] == 255).all()
    np.testing.assert_array_equal(train[0].region[2:], NUMBERS[0, 2:] > 0)
    assert not train[0].region[:2].any()

    other = np.where(NUMBERS == 1, 30, 99).astype(np.uint8)
    test = LabelledImages(InMemory(list(other)), like=train)
    np.testing.assert_array_equal(test[1].labels, np.where(NUMBERS[1] == 1, 2, 255))


def test_without_a_background_every_labelled_pixel_gets_the_full_budget():
    labels = np.where(NUMBERS == 1, 2, NUMBERS * 0)
    labels[:, :5], labels[:, 5] = 255, 1
    assert np.array_equal(LabelledImages(InMemory(list(labels)))[0].region, labels[0] != 255)


def test_things_are_the_classes_with_objects_and_segments_are_objects_then_stuff():
    labels = np.where(NUMBERS > 0, 5, 2).astype(np.uint8)
    labels[:, :3] = 9
    images = LabelledImages(InMemory(list(labels), list(NUMBERS)))
    assert images.classes == (2, 5, 9)
    assert images.things == (1,)
    segments = images[0].segments()
    expected = [NUMBERS[0] == 1, NUMBERS[0] == 2, labels[0] == 2, (labels[0] == 9) & (NUMBERS[0] == 0)]
    assert len(segments) == 4
    for (segment, _), mask in zip(segments, expected, strict=True):
        np.testing.assert_array_equal(segment, mask)
    # The classes are numbered without gaps: 2, 5 and 9 are 0, 1 and 2. Most of the first object is of class 9.
    first = int(np.bincount(labels[0][NUMBERS[0] == 1]).argmax())
    assert [class_id for _, class_id in segments] == [images.classes.index(first), 1, 0, 2]


def test_a_stray_pixel_of_an_object_makes_no_class_one_of_objects():
    labels = np.zeros((2, 30, 40), np.uint8)
    labels[:, 20:] = 1
    labels[:, 2:9, 3:9] = 2
    numbers = (labels == 2).astype(np.int32)
    numbers[1, 9, 3:9] = 1  # an outline that is drawn otherwise in both maps
    both = LabelledImages(InMemory(list(labels), list(numbers)), background=(0,))
    assert both.things == (2,)
    numbers[1, 20:] = 2
    more = LabelledImages(InMemory(list(labels), list(numbers)), background=(0,))
    assert more.things == (1, 2)
    assert more.first(1).fingerprint() != both.first(1).fingerprint()


def test_boxes_are_around_objects_or_else_around_connected_parts_of_the_region():
    labels = np.zeros((1, 30, 40), np.uint8)
    labels[0, 2:6, 3:9] = labels[0, 10:15, 1:4] = labels[0, 12:18, 20:30] = 1
    assert LabelledImages(InMemory(list(labels)))[0].boxes() == [(3, 2, 9, 6), (1, 10, 4, 15), (20, 12, 30, 18)]
    numbers = labels.astype(np.int32)
    numbers[:, :, 20:] = 0
    # The first two are one object, and the third part is none.
    assert LabelledImages(InMemory(list(labels), list(numbers)))[0].boxes() == [(1, 2, 9, 15), (20, 12, 30, 18)]
    numbers[:] = 2**24  # as in panoptic annotations
    numbers[:, :, 20:] += 5
    assert LabelledImages(InMemory(list(labels * 0 + 1), list(numbers)))[0].boxes() == [
        (0, 0, 20, 30),
        (20, 0, 40, 30),
    ]
    labels[:, 12:18, 20:25] = 2
    of_classes = LabelledImages(InMemory(list(labels)), background=(0,))[0].boxes()
    assert of_classes == [(3, 2, 9, 6), (1, 10, 4, 15), (25, 12, 30, 18), (20, 12, 25, 18)]


def test_the_class_of_an_object_is_none_of_its_pixels_without_one():
    labels = np.where(NUMBERS > 0, 3, 0).astype(np.uint8)
    labels[:, ::2], labels[:, 1::4] = 255, np.where(NUMBERS[:, 1::4] > 0, 255, 0)
    labels[NUMBERS == 2] = 255
    segments = LabelledImages(InMemory(list(labels), list(NUMBERS)))[0].segments()
    assert [class_id for _, class_id in segments] == [1, 0]


def test_one_bad_image_is_left_out_and_named_and_all_bad_ones_are_an_error():
    labels = [*(NUMBERS[:2] > 0), None, NUMBERS[3][:9]]
    images = LabelledImages(InMemory(labels))
    assert [labelled.name for labelled in images] == ["0", "1"]
    assert images.left_out == [
        "image 2 is damaged",
        "3: the mask is (9, 40), the image (30, 40); both must be the same",
    ]
    with pytest.raises(ValueError, match="memory has no image that can be used: image 0 is damaged"):
        LabelledImages(InMemory([None]))


def test_the_limit_counts_images_that_can_be_used():
    images = LabelledImages(InMemory([None, *(NUMBERS[1:] > 0)]), limit=2)
    assert [labelled.name for labelled in images] == ["1", "2"]
    assert [labelled.name for labelled in images.first(1)] == ["1"]
    with pytest.raises(ValueError, match="the limit of 0 images leaves none"):
        LabelledImages(InMemory([None]), limit=0)
    for count in (0, -1):
        with pytest.raises(ValueError, match=f"the limit of {count} images leaves none"):
            images.first(count)


def test_split_depends_on_the_pixels_alone_and_keeps_copies_together(tmp_path: Path):
    pictures, numbers = discs(30, 30, 40, seed=3)
    pictures[20:] = pictures[:10]
    for names in (range(30), reversed(range(30))):
        order = list(names)
        columns = {
            "name": [str(i) for i in order],
            "image": [encoded(pictures[i]) for i in order],
            "mask": [encoded((numbers[i] > 0).astype(np.uint8)) for i in order],
        }
        train, test = LabelledImages(DatasetRows(write_parquet(tmp_path / "all.parquet", columns))).split(0.3)
        assert {x.name for x in train} | {x.name for x in test} == {str(i) for i in range(30)}
        assert not set(train.digests) & set(test.digests)
        if order[0] == 0:
            first = {x.name for x in test}
    assert {x.name for x in test} == first
    # Of the 20 different ones 6, and each of them may be there twice.
    assert 6 <= len(first) <= 12
    assert len(set(test.digests)) == 6
    with pytest.raises(ValueError, match="has 1 images, of which"):
        train.first(1).split(0.5)


def test_the_fingerprint_follows_images_masks_and_classes(tmp_path: Path):
    file = write_discs(tmp_path / "a.parquet", 3, seed=1)
    first = LabelledImages(DatasetRows(file)).fingerprint()
    assert LabelledImages(DatasetRows(write_discs(tmp_path / "b.parquet", 3, seed=1))).fingerprint() == first
    others = [
        LabelledImages(DatasetRows(file), limit=2),
        LabelledImages(DatasetRows(file, instance_column="instances")),
        LabelledImages(DatasetRows(file), kind="classes"),
        LabelledImages(DatasetRows(file, mask_column="instances"), kind="binary"),
        LabelledImages(DatasetRows(write_discs(tmp_path / "c.parquet", 3, seed=2))),
    ]
    fingerprints = {images.fingerprint() for images in others}
    assert len(fingerprints | {first}) == 1 + len(others)
    # What is not among the images makes no difference.
    assert LabelledImages(DatasetRows(file)).first(2).fingerprint() == others[0].fingerprint()


def test_object_numbers_that_are_stored_in_three_channels_are_read(tmp_path: Path):
    pictures, numbers = discs(2, 44, 52, seed=1)
    columns = {
        "name": ["a", "b"],
        "image": [encoded(picture) for picture in pictures],
        "mask": [encoded((number > 0).astype(np.uint8)) for number in numbers],
        "instances": [encoded(number[..., None].repeat(3, axis=2)) for number in numbers],
    }
    images = LabelledImages(DatasetRows(write_parquet(tmp_path / "a.parquet", columns), instance_column="instances"))
    np.testing.assert_array_equal(images[1].instances, numbers[1])


def test_rows_with_instances(tmp_path: Path):
    images = LabelledImages(DatasetRows(write_discs(tmp_path / "a.parquet", 2, seed=1), instance_column="instances"))
    np.testing.assert_array_equal(images[1].instances, discs(2, 44, 52, seed=1)[1][1])
    assert images.things == (1,)
    assert images.binary
    numbers = [encoded(NUMBERS[0].astype(np.uint8)), encoded(np.zeros_like(NUMBERS[1], np.uint8)), None]
    columns = {
        "name": ["a", "b", "c"],
        "image": [encoded(picture) for picture in IMAGES[:3]],
        "mask": [encoded((picture > 0).astype(np.uint8)) for picture in NUMBERS[:3]],
        "numbers": numbers,
    }
    file = write_parquet(tmp_path / "some.parquet", columns)
    some = LabelledImages(DatasetRows(file, instance_column="numbers"))
    assert [labelled.name for labelled in some] == ["a", "b"]
    assert not some[1].instances.any()
    assert "c has no map of instances" in some.left_out[0]


def test_a_jpeg_mask_is_read_as_binary_only(tmp_path: Path):
    columns = {
        "name": ["a"],
        "image": [encoded(IMAGES[0])],
        "mask": [encoded((NUMBERS[0] > 0) * np.uint8(255), "JPEG")],
    }
    file = write_parquet(tmp_path / "jpeg.parquet", columns)
    with pytest.raises(ValueError, match="is a JPEG, which changes label numbers"):
        LabelledImages(DatasetRows(file))
    columns["mask"] = [encoded(np.where(NUMBERS[0] > 1, 255, NUMBERS[0]).astype(np.uint8))]
    numbers = write_parquet(tmp_path / "numbers.parquet", columns)
    void = LabelledImages(DatasetRows(numbers, kind="binary", ignores=True), kind="binary", ignore=(255,))
    np.testing.assert_array_equal(void[0].labels, np.where(NUMBERS[0] > 1, 255, NUMBERS[0]))
    np.testing.assert_array_equal(void[0].region, NUMBERS[0] == 1)
    images = LabelledImages(DatasetRows(file, kind="binary"), kind="binary")
    assert (images[0].region == (NUMBERS[0] > 0)).mean() > 0.98


def test_image_files_with_masks(tmp_path: Path):
    Image.fromarray(IMAGES[0]).save(tmp_path / "a.png")
    Image.fromarray((NUMBERS[0] > 0) * np.uint8(255)).save(tmp_path / "a_mask.png")
    pairs = [(tmp_path / "a.png", tmp_path / "a_mask.png"), (tmp_path / "no.png", tmp_path / "no_mask.png")]
    images = LabelledImages(ImageFiles(pairs, tmp_path))
    assert len(images) == 1
    assert re.search(r"no\.png", images.left_out[0])
    np.testing.assert_array_equal(np.asarray(images[0].image), IMAGES[0])
    np.testing.assert_array_equal(images[0].region, NUMBERS[0] > 0)


def test_image_files_with_cocos_json(tmp_path: Path):
    names = ("a.png", "sub/b.png", "nothing.png", "unlisted.png", "odd.png")
    for name in names:
        (tmp_path / name).parent.mkdir(exist_ok=True)
        Image.fromarray(IMAGES[0]).save(tmp_path / name)
    size = {"height": 30, "width": 40}
    content = {
        "images": [{"id": i, "file_name": name, **size} for i, name in enumerate(names) if name != "unlisted.png"],
        "annotations": [
            {"image_id": 0, "category_id": 7, "bbox": [5, 6, 4, 3]},
            {"image_id": 0, "category_id": 0, "bbox": [2, 2, 20, 20]},
            {"image_id": 0, "category_id": 7, "bbox": [30, 0, 5, 5], "iscrowd": 1},
            {"image_id": 1, "category_id": 0, "bbox": [0, 0, 2, 2]},
            {"image_id": 4, "category_id": 8, "bbox": [0, 0, 2, 2]},
        ],
        "categories": [{"id": 7, "name": "cup"}, {"id": 0, "name": "table"}],
    }
    path = tmp_path / "objects.json"
    path.write_text(json.dumps(content))
    images = {tmp_path / name: Path(name) for name in sorted(names)}
    labelled = LabelledImages(CocoImages(path, images, tmp_path), background=(0,))
    assert [image.name for image in labelled] == ["a.png", "nothing.png", "sub/b.png"]
    odd, unlisted = labelled.left_out
    assert "odd.png" in odd
    assert "category 8, which it does not list" in odd
    assert f"unlisted.png: {path} has no image of this name" in unlisted
    assert (labelled.classes, labelled.things) == ((0, 1, 8), (1, 2))
    # The same category has the same number in a json that lists others.
    content["categories"], content["annotations"] = [{"id": 7, "name": "cup"}], content["annotations"][:1]
    (tmp_path / "cups.json").write_text(json.dumps(content))
    cups = CocoImages(tmp_path / "cups.json", images, tmp_path)
    assert LabelledImages(cups, like=labelled)[0].labels.max() == 2
    cups.check_same_categories(CocoImages(path, images, tmp_path))
    content["categories"][0]["name"] = "saucer"
    (tmp_path / "saucers.json").write_text(json.dumps(content))
    with pytest.raises(ValueError, match=r"category 7 is 'saucer' in .*saucers.json and 'cup' in .*cups.json"):
        cups.check_same_categories(CocoImages(tmp_path / "saucers.json", images, tmp_path))
    labels, instances = np.zeros((2, 30, 40), int)
    labels[2:22, 2:22] = instances[2:22, 2:22] = 1
    labels[6:9, 5:9] = instances[6:9, 5:9] = 2
    labels[0:5, 30:35] = 2  # a crowd: of a class, of no object, and without noise
    np.testing.assert_array_equal(labelled[0].region, instances > 0)
    np.testing.assert_array_equal(labelled[0].labels, labels)
    np.testing.assert_array_equal(labelled[0].instances, instances)
    assert not labelled[1].region.any()


def test_a_folder_is_the_same_data_wherever_it_lies(tmp_path: Path):
    fingerprints = []
    for folder in (tmp_path / "here", tmp_path / "there" / "photos"):
        folder.mkdir(parents=True)
        Image.fromarray(IMAGES[0]).save(folder / "a.png")
        Image.fromarray((NUMBERS[0] > 0) * np.uint8(255)).save(folder / "a_mask.png")
        images = LabelledImages(ImageFiles([(folder / "a.png", folder / "a_mask.png")], folder))
        assert images[0].name == "a.png"
        fingerprints.append(images.fingerprint())
    assert fingerprints[0] == fingerprints[1]


def test_proposed_segments_are_the_foreground_and_an_image_without_any_is_left_out(tmp_path: Path, monkeypatch):
    from unseg_hf.protection import Protector

    for index in range(2):
        Image.fromarray(IMAGES[index]).save(tmp_path / f"{index}.png")
    found = {IMAGES[0].tobytes(): [NUMBERS[0] == 1, NUMBERS[0] == 2], IMAGES[1].tobytes(): []}
    monkeypatch.setattr(Protector, "propose_masks", lambda self, picture: found[picture.rgb8().tobytes()])
    images = LabelledImages(ProposedSegments([tmp_path / "0.png", tmp_path / "1.png"], tmp_path))
    assert len(images) == 1
    assert "finds no object in it; give a mask" in images.left_out[0]
    np.testing.assert_array_equal(images[0].region, NUMBERS[0] > 0)


def test_too_many_classes_and_unknown_kinds_are_refused():
    many = np.arange(30 * 40).reshape(30, 40)
    with pytest.raises(ValueError, match="has 1199 classes; at most 255"):
        LabelledImages(InMemory([many]))
    with pytest.raises(ValueError, match="masks are 'colours': must be one of auto, binary, classes"):
        LabelledImages(InMemory([many]), kind="colours")


def test_no_coco_category_becomes_255(tmp_path: Path):
    Image.new("RGB", (40, 30)).save(tmp_path / "a.png")
    content = {
        "images": [{"id": 0, "file_name": "a.png", "height": 30, "width": 40}],
        "annotations": [
            {"image_id": 0, "category_id": category, "bbox": [5 * number, 6, 4, 3]}
            for number, category in enumerate((253, 254, 255))
        ],
        "categories": [{"id": category, "name": str(category)} for category in (253, 254, 255)],
    }
    (tmp_path / "objects.json").write_text(json.dumps(content))
    raw = CocoImages(tmp_path / "objects.json", {tmp_path / "a.png": Path("a.png")}, tmp_path).load(0)
    assert sorted(set(raw.labels.ravel().tolist())) == [0, 254, 256, 257]  # 255 is no class


def test_the_fingerprint_follows_each_thing_that_decides_noise_or_labels():
    class Given:
        name = "given"

        def __init__(self, pixels=IMAGES[0], labels=NUMBERS[0], instances=NUMBERS[0], name="0") -> None:
            self.raw = Raw(name, Image.fromarray(pixels), labels, instances)

        def __len__(self) -> int:
            return 1

        def load(self, index: int) -> Raw:
            return self.raw

    def of(kind: str = "classes", ignore=(), background=(), **changes) -> str:
        return LabelledImages(Given(**changes), kind, ignore, background).fingerprint()

    merged = np.minimum(NUMBERS[0], 1).astype(np.uint8)
    border = np.where(NUMBERS[0] == 2, 255, NUMBERS[0]).astype(np.uint8)
    found = [
        of(),
        of(pixels=IMAGES[1]),
        of(instances=NUMBERS[0] * np.uint8(3)),
        of(instances=merged),
        of(name="1"),
        of(background=(0,)),
        of(ignore=(2,)),
        of(labels=merged),
        of("binary"),
        of("binary", labels=border),
        of("binary", labels=border, ignore=(255,)),
    ]
    assert len(set(found)) == len(found)
    assert of() == found[0]


def test_a_crowd_takes_nothing_of_the_objects_that_lie_in_it(tmp_path: Path):
    Image.fromarray(IMAGES[0]).save(tmp_path / "a.png")
    content = {
        "images": [{"id": 0, "file_name": "a.png", "height": 30, "width": 40}],
        "annotations": [
            {"image_id": 0, "category_id": 1, "bbox": [5, 6, 4, 3]},
            {"image_id": 0, "category_id": 2, "bbox": [0, 0, 20, 20], "iscrowd": 1},
        ],
        "categories": [{"id": 1, "name": "cup"}, {"id": 2, "name": "people"}],
    }
    (tmp_path / "objects.json").write_text(json.dumps(content))
    source = CocoImages(tmp_path / "objects.json", {tmp_path / "a.png": Path("a.png")}, tmp_path)
    labelled = LabelledImages(source, background=(0,))[0]
    cup = np.zeros((30, 40), bool)
    cup[6:9, 5:9] = True
    np.testing.assert_array_equal(labelled.region, cup)
    np.testing.assert_array_equal(labelled.instances, cup)
    assert set(labelled.labels[cup]) == {1}
    assert set(labelled.labels[:20, :20][~cup[:20, :20]]) == {2}


def test_maps_of_another_size_and_masks_of_fractions_are_left_out():
    masks = [NUMBERS[0] > 0, (NUMBERS[1] > 0).astype(np.float32), NUMBERS[2] > 0]
    images = LabelledImages(InMemory(masks, [NUMBERS[0], NUMBERS[1], NUMBERS[2][:9]]))
    assert [labelled.name for labelled in images] == ["0"]
    assert images.left_out == [
        "1: the mask is float32; give whole numbers, one for each class",
        "2: the map of instances is (9, 40), the image (30, 40); both must be the same",
    ]


@pytest.mark.parametrize(("kind", "border"), [("auto", 255), ("binary", 1)])
def test_a_border_that_the_test_images_alone_have_is_one_unless_255_was_said_to_be_the_object(kind: str, border: int):
    plain = (NUMBERS > 0).astype(np.uint8)
    bordered = plain.copy()
    bordered[:, :4] = 255
    train = LabelledImages(InMemory(list(plain)), kind=kind)
    test = LabelledImages(InMemory(list(bordered)), like=train)
    assert set(np.unique(test[1].labels[:4])) == {border}
    np.testing.assert_array_equal(test[1].labels[4:], plain[1][4:])
    assert train[1].labels.max() == 1


def test_test_images_ignore_what_the_training_images_ignore():
    labels = (NUMBERS > 0).astype(np.uint8)
    labels[:, :4] = 255
    train = LabelledImages(InMemory(list(labels)))
    test = LabelledImages(InMemory(list(labels), list(NUMBERS)), like=train)
    np.testing.assert_array_equal(test[1].labels, labels[1])
    np.testing.assert_array_equal(test[1].region, labels[1] == 1)
    trimaps = np.where(NUMBERS > 0, 1, 0).astype(np.uint8)
    trimaps[:, :4] = 3
    train = LabelledImages(InMemory(list(trimaps)), kind="binary", ignore=[3])
    test = LabelledImages(InMemory(list(trimaps)), like=train)
    np.testing.assert_array_equal(test[1].labels == 255, trimaps[1] == 3)


def test_proposed_segments_are_those_of_the_generator_that_was_named(tmp_path: Path, monkeypatch):
    asked = []

    class Finds:
        def propose_masks(self, picture):
            return [NUMBERS[0] > 0]

    monkeypatch.setattr("unseg_hf.protection.load_generator", lambda *given: asked.append(given) or Finds())
    Image.fromarray(IMAGES[0]).save(tmp_path / "0.png")
    arguments = ["audit", str(tmp_path), "-o", str(tmp_path / "out"), "--model", "mine", "--device", "cuda"]
    options = cli.build_parser().parse_args(arguments)
    assert len(LabelledImages(audit_command._source(options, str(tmp_path), None, "train"))) == 1
    monkeypatch.setenv("LOCAL_RANK", "3")
    for count in (4, 1):
        monkeypatch.setattr("torch.cuda.device_count", lambda: count)  # noqa: B023
        assert len(LabelledImages(audit_command._source(options, str(tmp_path), None, "train"))) == 1
    assert asked == [("mine", "cuda"), ("mine", "cuda:3"), ("mine", "cuda:0")]


def test_images_of_the_same_bytes_and_another_shape_are_others(tmp_path: Path):
    pixels = np.arange(16 * 24 * 3, dtype=np.uint8).reshape(16, 24, 3)
    found = []
    for shape in ((16, 24), (24, 16)):
        file, mask = tmp_path / f"{shape[0]}.png", tmp_path / f"{shape[0]}-mask.png"
        Image.fromarray(pixels.reshape(*shape, 3)).save(file)
        Image.fromarray((np.arange(16 * 24) % 2 * 255).astype(np.uint8).reshape(shape)).save(mask)
        found += LabelledImages(ImageFiles([(file, mask)], tmp_path)).digests
    assert found[0] != found[1]


def test_objects_of_a_mask_of_0_and_255_are_things():
    masks = list((NUMBERS > 0) * np.uint8(255))
    assert LabelledImages(InMemory(masks, list(NUMBERS))).things == (1,)
