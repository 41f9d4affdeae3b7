"""The images that an audit publishes and tests on: what a victim learns from, class by class and object by object."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from copy import copy
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import numpy as np
from PIL import Image

from unseg_hf.evaluation.victims.base import IGNORED
from unseg_hf.image_files import as_rgb8, one_line, read, read_mask
from unseg_hf.inputs import LabelMasks

MASK_KINDS = ("auto", "binary", "classes")


@dataclass(frozen=True, eq=False)
class LabelledImage:
    """One image and its annotation.

    Args:
        name: what an error calls it.
        image: RGB, upright.
        labels: `(height, width)` uint8, class ids from 0 on without gaps, 255 where there is no class.
        region: `(height, width)` bool: what gets the full budget, the labelled pixels that are no background.
        instances: `(height, width)` int32, number of the object, 0 for none; None where the data set has no objects.
    """

    name: str
    image: Image.Image
    labels: np.ndarray
    region: np.ndarray
    instances: np.ndarray | None = None

    def segments(self) -> list[tuple[np.ndarray, int]]:
        """A bool mask and the class of each object, and of each class of the pixels of no object."""
        instances = np.zeros(self.labels.shape, np.int32) if self.instances is None else self.instances
        # As `segments_of` does for victims, whose images are small: of a photo its tensors would take gigabytes.
        objects = [instances == number for number in np.unique(instances) if number]
        rest = np.where(instances == 0, self.labels, IGNORED)
        classes = [rest == label for label in np.unique(rest) if label != IGNORED]
        pairs = [(mask, _commonest(self.labels[mask], (IGNORED,))) for mask in objects + classes]
        return [(mask, label) for mask, label in pairs if label is not None]

    def boxes(self) -> list[tuple[int, int, int, int]]:
        """`(x0, y0, x1, y1)` in pixels around each object, where there are none around each connected part of each
        class in the region."""
        from scipy.ndimage import find_objects, label

        numbers = np.zeros(self.labels.shape, np.int32) if self.instances is None else self.instances
        # Numbered anew: of numbers in the millions, as panoptic ids are, it would go through them all.
        values, anew = np.unique(np.where(self.region, numbers, 0), return_inverse=True)
        maps = [anew.reshape(numbers.shape) + (values[0] != 0)]
        rest = self.region & (numbers == 0)
        maps += [label(rest & (self.labels == value))[0] for value in np.unique(self.labels[rest])]
        found = [slices for numbered in maps for slices in find_objects(numbered) if slices]
        return [(columns.start, rows.start, columns.stop, rows.stop) for rows, columns in found]


@dataclass(frozen=True)
class Raw:
    """An image as its source holds it: labels with the source's own numbers, and where there are crowds, bool, which
    get no noise, as in the paper."""

    name: str
    image: Image.Image
    labels: np.ndarray
    instances: np.ndarray | None = None
    crowds: np.ndarray | None = None


class RawSource(Protocol):
    """Where raw images come from: `len` and `load`, which raises OSError or ValueError for one that is unfit."""

    name: str

    def __len__(self) -> int: ...

    def load(self, index: int) -> Raw: ...


class DatasetRows:
    """A parquet file, a folder as `datasets` reads it, or a Hub id; see [`unseg_hf.data.hf_datasets.DatasetSource`].

    Args:
        location: of the data set.
        split: of the data set.
        image_column: name of the image column.
        mask_column: name of the column of masks.
        instance_column: name of the column of object numbers; None where objects do not matter.
        kind: "binary" takes every mask value but 0 as one class, which JPEG masks need; else values are classes.
        ignores: whether some mask values are no class: then masks keep their values, of "binary" ones, too.

    Raises:
        FileNotFoundError: there is nothing at the location.
        ValueError: no such split or column, or columns that hold no images.
    """

    def __init__(
        self,
        location: str | Path,
        split: str = "train",
        image_column: str = "image",
        mask_column: str = "mask",
        instance_column: str | None = None,
        kind: str = "auto",
        ignores: bool = False,
    ) -> None:
        from unseg_hf.data.hf_datasets import DatasetSource

        where = {"location": str(location), "split": split, "image_column": image_column}
        self._masks = DatasetSource(
            **where, mask_column=mask_column, masks="binary" if kind == "binary" and not ignores else "classes"
        )
        self._instances = None
        if instance_column is not None:
            self._instances = DatasetSource(**where, mask_column=instance_column, masks="instances")
        self.name = self._masks.name

    def __len__(self) -> int:
        return self._masks.size

    def load(self, index: int) -> Raw:
        record = self._masks.load(index)
        if not record.masks:
            raise ValueError(f"{self.name}: {record.name} has no mask")
        labels = np.logical_or.reduce(record.masks) if record.class_ids is None else record.masks.labels
        instances = None
        if self._instances is not None:
            numbers = self._instances.load(index).masks
            if not isinstance(numbers, LabelMasks):
                raise ValueError(f"{self.name}: {record.name} has no map of instances")
            instances = numbers.labels
        return Raw(record.name, as_rgb8(record.image), labels, instances)


class ImageFiles:
    """Image files with a mask file each.

    Args:
        pairs: image file and mask file.
        folder: that they come from; images are named by their paths below it, and so are the same wherever it is.
    """

    def __init__(self, pairs: Sequence[tuple[Path, Path]], folder: Path) -> None:
        self._pairs, self._folder, self.name = list(pairs), folder, str(folder)

    def __len__(self) -> int:
        return len(self._pairs)

    def load(self, index: int) -> Raw:
        image, mask = self._pairs[index]
        name = image.relative_to(self._folder).as_posix()
        return Raw(name, Image.fromarray(read(image).rgb8()), read_mask(mask))


class CocoImages:
    """Image files with the objects that COCO's json has of them, as `unseg protect --masks` takes them.

    A class is numbered by its category's id and one more (two from 254 on: 255 is no class), so that it has the same
    number in every json; 0 is what belongs to no object, crowds as well.

    Args:
        json: of the upright images.
        images: image files, and their paths below the folder.
        folder: that they come from; images are named by their paths below it, and so are the same wherever it is.

    Raises:
        ValueError: a json that is not COCO's, or whose images are not told apart, naming what to do.
    """

    def __init__(self, json: Path, images: Mapping[Path, Path], folder: Path) -> None:
        from unseg_hf.image_tasks import annotations_of
        from unseg_hf.layouts.coco import CocoInstances

        self._json, self.name = json, str(folder)
        self._images = [(image, path.as_posix()) for image, path in images.items()]
        self._annotations = annotations_of(json, images)
        self._categories = CocoInstances("{split}").classes(json.parent, json.name)
        self._numbers = {category: category + 1 + (category + 1 >= IGNORED) for category in self._categories}

    def check_same_categories(self, other: CocoImages) -> None:
        """ValueError if a category's id means one thing here and another there."""
        for category, name in other._categories.items():
            if self._categories.get(category, name) != name:
                raise ValueError(
                    f"category {category} is {name!r} in {other._json} and {self._categories[category]!r} in "
                    f"{self._json}: number them alike"
                )

    def __len__(self) -> int:
        return len(self._images)

    def load(self, index: int) -> Raw:
        image, name = self._images[index]
        annotation = self._annotations[image]
        if annotation is None:
            raise ValueError(f"{image}: {self._json} has no image of this name")
        pixels = read(image).rgb8()
        labels, instances = (np.zeros(pixels.shape[:2], np.int32) for _ in range(2))
        found = [s for s in annotation.segments(labels.shape, None, True) if s.mask.any()]
        # Small ones lie over large ones.
        for number, (mask, category) in enumerate(sorted(found, key=lambda s: -np.count_nonzero(s.mask)), 1):
            if category not in self._numbers:
                raise ValueError(f"{image}: {self._json} has an object of category {category}, which it does not list")
            labels[mask], instances[mask] = self._numbers[category], number
        crowds = np.zeros(labels.shape, bool)
        for mask, category in annotation.crowds(labels.shape):
            # Pixels of no object, whose class has objects: nothing that is found there counts against a victim.
            alone = mask & (instances == 0)
            labels[alone], crowds[alone] = self._numbers.get(category, IGNORED), True
        return Raw(name, Image.fromarray(pixels), labels, instances, crowds)


class ProposedSegments:
    """Images without masks: what a generator takes for objects is the foreground.

    Args:
        images: image files.
        folder: that they come from; images are named by their paths below it.
        model: checkpoint of the generator; None for the embedded one.
        device: where it runs.
    """

    def __init__(self, images: Sequence[Path], folder: Path, model: str | None = None, device: str = "cpu") -> None:
        self._images, self._folder, self.name = list(images), folder, str(folder)
        self._model, self._device = model, device
        self._protector = None
        self._found: dict[int, tuple[tuple[int, int], np.ndarray]] = {}

    def __len__(self) -> int:
        return len(self._images)

    def load(self, index: int) -> Raw:
        from unseg_hf.protection import load_generator

        picture = read(self._images[index])
        if index not in self._found:
            self._protector = self._protector or load_generator(self._model, self._device)
            masks = self._protector.propose_masks(picture)
            if not masks:
                raise ValueError(f"{self._images[index]}: the generator finds no object in it; give a mask")
            # Kept, an eighth of a byte a pixel: every noise asks for it anew.
            self._found[index] = masks[0].shape, np.packbits(np.logical_or.reduce(masks))
        shape, bits = self._found[index]
        region = np.unpackbits(bits, count=shape[0] * shape[1]).reshape(shape).astype(bool)
        name = self._images[index].relative_to(self._folder).as_posix()
        return Raw(name, Image.fromarray(picture.rgb8()), region)


class LabelledImages(Sequence):
    """Those images of a source that can be used, with class ids that start at 0 and have no gaps.

    Everything is decoded once here, so that what is unfit is known before anything is trained; images are decoded
    again when they are asked for, and never all held.

    Args:
        source: where they come from.
        kind: "binary": two classes, 0 and everything else; "classes": each value is a class; "auto": binary if there
            is no more than one value but 0, or one beside 255, which is no class then.
        ignore: values that are no class. With several classes 255 is always one of them.
        background: values of the classes that get the background's budget; of binary masks it is 0. Of two classes
            one of which is background the other one is scored.
        like: other images whose classes these have too, as test images have those of the training images; values
            that are none of them count as ignored. `kind`, `ignore` and `background` are taken
            from there.
        limit: take the first so many images that can be used; None: all.

    Attributes:
        binary: whether there are two classes, 0 and everything else.
        classes: the source's value of each class id; (0, 1) for binary masks.
        things: ids of the classes that have objects, empty without instances.
        digests: SHA-256 of each image's pixels.
        left_out: why images were left out, a line each.

    Raises:
        ValueError: no image can be used, or there are more than 255 classes.
    """

    def __init__(
        self,
        source: RawSource,
        kind: str = "auto",
        ignore: Sequence[int] = (),
        background: Sequence[int] = (),
        like: LabelledImages | None = None,
        limit: int | None = None,
    ) -> None:
        if kind not in MASK_KINDS:
            raise ValueError(f"masks are {kind!r}: must be one of {', '.join(MASK_KINDS)}")
        _check_limit(limit)
        self._source, self._indices = source, []
        self.name, self.left_out, self.digests = source.name, [], []
        self._annotations: list[bytes] = []
        values: set[int] = set()
        objects: set[int] = set()
        counting_255: set[int] = set()
        unclassed = list(ignore if like is None else like._ignored)
        for index in range(len(source)):
            try:
                raw = source.load(index)
                _check(raw)
            except (OSError, ValueError) as error:
                self.left_out.append(one_line(error))
                continue
            self._indices.append(index)
            self.digests.append(hashlib.sha256(str(raw.image.size).encode() + raw.image.tobytes()).hexdigest())
            parts = raw.name.encode(), raw.labels.tobytes(), b"" if raw.instances is None else raw.instances.tobytes()
            self._annotations.append(b"".join(hashlib.sha256(part).digest() for part in parts))
            own = set(np.unique(raw.labels).tolist())
            values |= own
            if raw.instances is not None:
                found = set(_classes_of_objects(raw.labels, raw.instances, [IGNORED, *unclassed]))
                objects |= found
                # Each object is looked at once where there is no 255 to count.
                has_255 = IGNORED in own
                counting_255 |= set(_classes_of_objects(raw.labels, raw.instances, unclassed)) if has_255 else found
            if len(self._indices) == limit:
                break
        if not self._indices:
            reason = f": {self.left_out[0]}" if self.left_out else ""
            raise ValueError(f"{source.name} has no image that can be used{reason}")
        if like is not None:
            self.classes, self.binary, self._kind = like.classes, like.binary, like._kind
            self._ignored, self._background = like._ignored, like._background
            if self.binary and self._kind == "auto" and _has_border(values - self._ignored):
                self._ignored |= {IGNORED}
        else:
            self._kind, self._ignored = kind, frozenset(ignore)
            values -= self._ignored
            if kind == "auto" and _has_border(values):
                self._ignored |= {IGNORED}
                values -= self._ignored
            self.binary = kind == "binary" or (kind == "auto" and len(values - {0}) <= 1)
            # The one class of a binary mask is everything but 0, whatever its number: 1 and 255 are both in use.
            self.classes = (0, 1) if self.binary else tuple(sorted(values - {IGNORED}))
            self._background = (0,) if self.binary else tuple(background)
            if self.binary and set(background) - {0}:
                raise ValueError(
                    f"{source.name} has binary masks, whose background is 0, not {', '.join(map(str, background))}: "
                    "invert the masks"
                )
            if len(self.classes) == 2 and self.classes[1] in self._background:
                self.classes = self.classes[::-1]  # the second is the one that is scored
        if len(self.classes) > IGNORED:
            raise ValueError(f"{source.name} has {len(self.classes)} classes; at most {IGNORED} fit into a label map")
        if self.binary:
            # There 255 is the object, unless it is the border of one.
            objects = {int(value != 0) for value in (objects if IGNORED in self._ignored else counting_255)}
        self.things = tuple(i for i, value in enumerate(self.classes) if value in objects)

    def __len__(self) -> int:
        return len(self._indices)

    def __getitem__(self, index: int) -> LabelledImage:
        raw = self._source.load(self._indices[index])
        labels = np.full(raw.labels.shape, IGNORED, np.uint8)
        if self.binary:
            counted = ~np.isin(raw.labels, list(self._ignored))
            labels[counted] = raw.labels[counted] != 0
        else:
            for number, value in enumerate(self.classes):
                labels[raw.labels == value] = number
        instances = None if raw.instances is None else raw.instances.astype(np.int32)
        background = [number for number, value in enumerate(self.classes) if value in self._background]
        region = ~np.isin(labels, [*background, IGNORED])
        if raw.crowds is not None:
            region &= ~raw.crowds
        return LabelledImage(raw.name, raw.image, labels, region, instances)

    def fingerprint(self) -> str:
        """SHA-256 of images, names, annotations and classes: the same data have the same one, wherever they lie."""
        annotations = hashlib.sha256(b"".join(self._annotations)).digest()
        whole = hashlib.sha256("".join(self.digests).encode() + annotations)
        whole.update(repr((self.classes, self.binary, sorted(self._ignored), self._background)).encode())
        whole.update(repr(self.things).encode() if self.things else b"")
        return whole.hexdigest()

    def split(self, test_share: float) -> tuple[LabelledImages, LabelledImages]:
        """Training and test images; which is which depends on the images' pixels alone, and copies stay together.

        Args:
            test_share: in (0, 1), the share of test images.

        Raises:
            ValueError: one side would be empty.
        """
        different = sorted(set(self.digests))
        test = set(different[: max(1, round(test_share * len(different)))])
        sides = tuple(
            self._some([i for i, digest in enumerate(self.digests) if (digest in test) == is_test])
            for is_test in (False, True)
        )
        if not all(map(len, sides)):
            raise ValueError(
                f"{self.name} has {len(self)} images, of which {len(sides[1])} would be test images; give more, or "
                "test images of their own"
            )
        return sides

    def first(self, count: int | None) -> LabelledImages:
        """The first so many images; None: all. ValueError if that is none."""
        _check_limit(count)
        return self._some(range(len(self))[:count])

    def _some(self, indices: Sequence[int]) -> LabelledImages:
        some = copy(self)
        some._indices = [self._indices[index] for index in indices]
        some.digests = [self.digests[index] for index in indices]
        some._annotations = [self._annotations[index] for index in indices]
        return some

    def __iter__(self) -> Iterator[LabelledImage]:
        return (self[index] for index in range(len(self)))


def _has_border(values: set[int]) -> bool:
    """Whether labels are those of an object, of what is none, and of a border that is neither."""
    return len(values) == 3 and {0, IGNORED} < values


def _classes_of_objects(labels: np.ndarray, instances: np.ndarray, unclassed: Sequence[int]) -> list[int]:
    """Classes that objects have: stray pixels of another class, at an outline say, make none of their own."""
    found = (_commonest(labels[instances == number], unclassed) for number in np.unique(instances) if number)
    return [label for label in found if label is not None]


def _commonest(labels: np.ndarray, unclassed: Sequence[int]) -> int | None:
    """The label of most pixels that have one, the smallest of several; None if none has."""
    values, counts = np.unique(labels[~np.isin(labels, unclassed)], return_counts=True)
    return int(values[counts.argmax()]) if len(values) else None


def _check_limit(images: int | None) -> None:
    if images is not None and images < 1:
        raise ValueError(f"the limit of {images} images leaves none; take at least 1, or None for all")


def _check(raw: Raw) -> None:
    size = (raw.image.height, raw.image.width)
    for what, values in (("mask", raw.labels), ("map of instances", raw.instances)):
        if values is not None and values.shape != size:
            raise ValueError(f"{raw.name}: the {what} is {values.shape}, the image {size}; both must be the same")
    if raw.labels.dtype.kind == "f":
        raise ValueError(f"{raw.name}: the mask is {raw.labels.dtype}; give whole numbers, one for each class")
