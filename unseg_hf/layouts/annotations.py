"""What data sets publish about the objects in an image: label images, `.mat` files, panoptic PNGs and COCO's json.

Each kind is a description with paths in which `{split}` and `{name}` stand for those of an image. Its `index` looks up
the annotations of one split, and what it finds for an image can be pickled and is read only where the image is.
"""

import contextlib
import json
from array import array
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import Any, Protocol

import numpy as np

from unseg_hf import image_files
from unseg_hf.data.sa1b import run_length_coder

OBJECT = 1000
"""Number of an object times this, plus its class, tells apart all segments of a label image with objects."""


class Annotation(Protocol):
    """The annotation of one image."""

    def masks(self, size: tuple[int, int], classes: frozenset[int] | None, separate: bool) -> list[np.ndarray]:
        """The labelled pixels, without those to ignore and without crowds.

        Args:
            size: height and width of the image.
            classes: only these; None for all.
            separate: one mask for each segment (object, or class where there are no objects), else their union.

        Returns:
            At least one `(height, width)` bool mask, empty where nothing is labelled.

        Raises:
            OSError, ValueError: an annotation that cannot be read or does not fit the image, naming it.
        """
        ...


@dataclass(frozen=True)
class Index:
    """The annotations of one split.

    Args:
        find: the annotation of the image with a name; None where there is none.
        names: of all images in the split, where the annotations say it.
    """

    find: Callable[[str], Annotation | None]
    names: frozenset[str] | None = None


class Kind(Protocol):
    """A way to annotate images; an entry of the table holds one."""

    @property
    def files(self) -> tuple[str, ...]:
        """Templates of the annotation files; any one of them is enough."""
        ...

    def index(self, base: Path, split: str) -> Index: ...

    def classes(self, base: Path, split: str) -> dict[int, str]:
        """Names of the classes; several names of one class have commas between them."""
        ...


@dataclass(frozen=True)
class FileKind:
    """A kind with a file for each image.

    Args:
        files: templates; the first file that is there counts.
    """

    files: tuple[str, ...]

    def index(self, base: Path, split: str) -> Index:
        def find(name: str) -> Annotation | None:
            for template in self.files:
                if (path := base / template.format(split=split, name=name)).is_file():
                    return self._at(path, base, split, name)
            return None

        return Index(find)

    def classes(self, base: Path, split: str) -> dict[int, str]:
        return {}

    def _at(self, path: Path, base: Path, split: str, name: str) -> Annotation:
        raise NotImplementedError


@dataclass(frozen=True)
class BinaryMasks(FileKind):
    """Mask images, bright on the objects, in any image format."""

    def _at(self, path: Path, base: Path, split: str, name: str) -> Annotation:
        return BinaryMask(path)


@dataclass(frozen=True)
class BinaryMask:
    path: Path

    def masks(self, size: tuple[int, int], classes: frozenset[int] | None, separate: bool) -> list[np.ndarray]:
        values = image_files.read(self.path, upright=False).rgb8().max(axis=2)
        # Half of the range cuts smoothed edges and JPEG's ringing in the middle; a mask of 0 and 1 has neither.
        return [_fitting(values > (127 if values.max() > 1 else 0), size, self.path)]


@dataclass(frozen=True)
class LabelImages(FileKind):
    """Label images: every value is a class.

    Args:
        ignored: values that are no class.
        objects: template of images that number the objects, 0 and 255 for none, which separate segments of a class.
        named: names of the classes, or the name of a file that has them: `objectInfo150.txt` of ADE20K.
    """

    ignored: tuple[int, ...] = (0, 255)
    objects: str | None = None
    named: Mapping[int, str] | str = field(default_factory=dict)

    def _at(self, path: Path, base: Path, split: str, name: str) -> Annotation:
        objects = base / self.objects.format(split=split, name=name) if self.objects else None
        return LabelImage(path, self.ignored, objects if objects and objects.is_file() else None)

    def classes(self, base: Path, split: str) -> dict[int, str]:
        if not isinstance(self.named, str):
            return dict(self.named)
        try:
            lines = (base / self.named).read_text().splitlines()[1:]
            return {int(fields[0]): fields[-1] for fields in (line.strip().split("\t") for line in lines) if fields[0]}
        except FileNotFoundError:
            return {}


@dataclass(frozen=True)
class LabelImage:
    path: Path
    ignored: tuple[int, ...]
    objects: Path | None

    def masks(self, size: tuple[int, int], classes: frozenset[int] | None, separate: bool) -> list[np.ndarray]:
        segments = _fitting(_labels(self.path), size, self.path).astype(np.int32)
        labelled = ~np.isin(segments, self.ignored)
        if separate and self.objects is not None:
            objects = _fitting(_labels(self.objects), size, self.objects).astype(np.int32)
            segments += OBJECT * np.where(np.isin(objects, (0, 255)), 0, objects)
        found = np.unique(segments[labelled]).tolist()
        return _select(np.where(labelled, segments, -1), {s: s % OBJECT for s in found}, classes, separate)


@dataclass(frozen=True)
class CityscapesImages(FileKind):
    """`instanceIds.png` of Cityscapes: the class of stuff and of groups of things, and 1000 times it for one thing.

    Args:
        stuff: names of the classes without objects that are evaluated.
        things: names of those with objects; their groups are crowds.
    """

    stuff: Mapping[int, str]
    things: Mapping[int, str]

    def _at(self, path: Path, base: Path, split: str, name: str) -> Annotation:
        return CityscapesImage(path, frozenset(self.stuff), frozenset(self.things))

    def classes(self, base: Path, split: str) -> dict[int, str]:
        return {**self.stuff, **self.things}


@dataclass(frozen=True)
class CityscapesImage:
    path: Path
    stuff: frozenset[int]
    things: frozenset[int]

    def masks(self, size: tuple[int, int], classes: frozenset[int] | None, separate: bool) -> list[np.ndarray]:
        segments = _fitting(_labels(self.path), size, self.path)
        class_of = {s: s if s < OBJECT else s // OBJECT for s in np.unique(segments).tolist()}
        wanted = {s: c for s, c in class_of.items() if c in (self.stuff if s < OBJECT else self.things)}
        return _select(segments, wanted, classes, separate)


@dataclass(frozen=True)
class CocoKind:
    """A kind with COCO's json for each split.

    Args:
        json: template of the json.
    """

    json: str

    @property
    def files(self) -> tuple[str, ...]:
        return (self.json,)

    def classes(self, base: Path, split: str) -> dict[int, str]:
        return {entry["id"]: entry["name"] for entry in self._load(base, split)[0]["categories"]}

    def _load(self, base: Path, split: str) -> tuple[dict[str, Any], Path]:
        path = base / self.json.format(split=split)
        try:
            content = json.loads(path.read_bytes(), object_hook=_needed)
            for field in ("images", "annotations", "categories"):
                if not isinstance(content[field], list):
                    raise TypeError(f"{field} is no list")
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError(f"{path} is damaged, or no json as COCO's ({error!r}); download it again") from error
        return content, path

    def _by_image(self, base: Path, split: str) -> tuple[dict[str, tuple[dict, list[dict]]], Path]:
        """Each image's entry and annotations, by its file name without suffix, and the json's path."""
        content, path = self._load(base, split)
        try:
            by_id = {image["id"]: (image, []) for image in content["images"]}
            for annotation in content["annotations"]:
                if annotation["image_id"] in by_id:
                    by_id[annotation["image_id"]][1].append(annotation)
            names = (str(PurePosixPath(image["file_name"]).with_suffix("")) for image, _ in by_id.values())
            return dict(zip(names, by_id.values(), strict=True)), path
        except (KeyError, TypeError) as error:
            raise ValueError(f"{path} is no json as COCO's: an entry lacks its {error}; download it again") from error


@dataclass(frozen=True)
class CocoInstances(CocoKind):
    """Object masks as polygons or run-length codes; crowds are left out."""

    def index(self, base: Path, split: str) -> Index:
        run_length_coder()
        entries, path = self._by_image(base, split)

        def find(name: str) -> Annotation | None:
            if name not in entries:
                return None
            image, annotations = entries[name]
            return InstanceMasks(f"{path}, {name}", (image.get("height"), image.get("width")), tuple(annotations))

        return Index(find, frozenset(entries))


@dataclass(frozen=True)
class InstanceMasks:
    """Objects of one image, as COCO's json has them."""

    name: str
    size: tuple[int, int]
    objects: tuple[dict[str, Any], ...]

    def masks(self, size: tuple[int, int], classes: frozenset[int] | None, separate: bool) -> list[np.ndarray]:
        if tuple(size) != tuple(self.size):
            raise ValueError(f"{self.name}: annotated as {self.size} (height, width), but the image has {tuple(size)}")
        coder = run_length_coder()
        codes = [
            self._code(coder, one.get("segmentation"))
            for one in self.objects
            if not one.get("iscrowd") and (classes is None or one.get("category_id") in classes)
        ]
        if not separate and codes:
            codes = [coder.merge(codes)]
        masks = [coder.decode(code).astype(bool) for code in codes]
        return [mask for mask in masks if mask.any()] or [np.zeros(size, dtype=bool)]

    def _code(self, coder, form: Any) -> dict[str, Any]:
        try:
            if isinstance(form, dict):
                if tuple(form["size"]) != tuple(self.size):
                    raise ValueError(f"a code of size {form['size']}")
                return coder.frPyObjects(form, *self.size) if isinstance(form["counts"], list) else form
            # pycocotools would take four numbers for a box.
            if not form or any(len(polygon) < 6 or len(polygon) % 2 for polygon in form):
                raise ValueError("a polygon needs three points or more")
            return coder.merge(coder.frPyObjects([list(polygon) for polygon in form], *self.size))
        except (KeyError, TypeError, ValueError) as error:
            raise ValueError(f"{self.name}: an object's 'segmentation' is damaged ({error})") from error


@dataclass(frozen=True)
class CocoPanoptic(CocoKind):
    """Panoptic segments: their numbers in RGB PNGs, their classes in the json; crowds are left out.

    Args:
        folders: templates of the folder of PNGs; the first that is there counts.
    """

    folders: tuple[str, ...]

    def index(self, base: Path, split: str) -> Index:
        entries, path = self._by_image(base, split)
        folders = [base / template.format(split=split) for template in self.folders]
        folder = next((folder for folder in folders if folder.is_dir()), None)
        if folder is None:
            raise FileNotFoundError(f"{folders[0]}: no such folder; unpack {split}'s panoptic PNGs there, of {path}")

        def find(name: str) -> Annotation | None:
            annotations = entries[name][1] if name in entries else []
            return PanopticPng(f"{path}, {name}", folder, annotations[0]) if annotations else None

        return Index(find, frozenset(entries))


@dataclass(frozen=True)
class PanopticPng:
    """Segments of one image: the folder of its PNG, and its entry in the json."""

    name: str
    folder: Path
    entry: dict[str, Any]

    def masks(self, size: tuple[int, int], classes: frozenset[int] | None, separate: bool) -> list[np.ndarray]:
        try:
            path = self.folder / self.entry["file_name"]
            class_of = {s["id"]: s["category_id"] for s in self.entry["segments_info"] if not s.get("iscrowd")}
        except (KeyError, TypeError) as error:
            raise ValueError(f"{self.name}: its entry in the json lacks {error}") from error
        colours = _fitting(image_files.read(path).rgb8(), size, path).astype(np.int32)
        segments = colours[:, :, 0] + 256 * colours[:, :, 1] + 256**2 * colours[:, :, 2]
        return _select(segments, class_of, classes, separate)


_NEEDED = {"images", "annotations", "categories", "id", "name", "file_name", "height", "width", "image_id", "iscrowd"}
_NEEDED |= {"category_id", "segmentation", "segments_info", "size", "counts"}


def _needed(entry: dict[str, Any]) -> dict[str, Any]:
    """What is needed of an entry in COCO's json, polygons packed: the train split would take gigabytes as lists."""
    entry = {name: value for name, value in entry.items() if name in _NEEDED}
    if isinstance(entry.get("segmentation"), list):
        # A damaged one stays as it is, and is met when its image's turn comes.
        with contextlib.suppress(TypeError):
            entry["segmentation"] = [array("d", polygon) for polygon in entry["segmentation"]]
    return entry


def _select(
    segments: np.ndarray, class_of: Mapping[int, int], classes: frozenset[int] | None, separate: bool
) -> list[np.ndarray]:
    """Masks of the segments of some classes, from an image of their numbers."""
    wanted = [segment for segment, class_id in class_of.items() if classes is None or class_id in classes]
    union = np.isin(segments, wanted)
    if not separate or not union.any():
        return [union]
    return [mask for mask in (segments == segment for segment in wanted) if mask.any()]


def _labels(path: Path) -> np.ndarray:
    """`(height, width)` whole numbers of a label image, or of the `Segmentation` in one of SBD's `.mat` files.

    Raises:
        ImportError: a `.mat` file, and SciPy is not installed.
        ValueError: the file is damaged or holds no labels.
    """
    if path.suffix != ".mat":
        return image_files.read_mask(path)
    try:
        from scipy.io import loadmat
    except ImportError as error:
        raise ImportError("SBD's .mat files need SciPy: pip install 'unseg-hf[layouts]'") from error
    try:
        content = loadmat(path)
        (field,) = (name for name in content if name.startswith("GT"))
        return content[field][0]["Segmentation"][0]
    except OSError as error:
        raise ValueError(f"{path} cannot be read ({error}); unpack it again") from error
    except Exception as error:
        # SciPy's reader meets damaged files with whatever its parsing raises.
        raise ValueError(f"{path} is damaged, or no .mat file as SBD's ({error!r}); unpack it again") from error


def _fitting(values: np.ndarray, size: Iterable[int], path: Path) -> np.ndarray:
    if values.shape[:2] != tuple(size):
        raise ValueError(f"{path} has {values.shape[:2]} (height, width), but its image has {tuple(size)}")
    return values
