"""Annotations in COCO's json: objects as polygons or run-length codes, and panoptic segments in RGB PNGs."""

import contextlib
import json
from array import array
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np

from unseg_hf import image_files
from unseg_hf.data.sa1b import run_length_coder
from unseg_hf.image_tasks import stays_inside

from .annotations import Annotation, Index, Segment, fitting, select_segments

MOST_OUTLINE = 10_000
"""Times the image's longer side that the outlines of an object are long, at most."""
_NEEDED = {"images", "annotations", "categories", "id", "name", "file_name", "height", "width", "image_id", "iscrowd"}
_NEEDED |= {"category_id", "segmentation", "bbox", "segments_info", "size", "counts"}


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
            raise ValueError(
                f"{path} is damaged, or no json as COCO's ({error!r}); mend it, or download it again"
            ) from error
        return content, path

    def _by_image(self, base: Path, split: str) -> tuple[dict[str, tuple[dict, list[dict]]], Path]:
        """Each image's entry and annotations, by its file name without suffix, and the json's path."""
        content, path = self._load(base, split)
        try:
            by_id: dict[Any, tuple[dict, list[dict]]] = {}
            for image in content["images"]:
                if image["id"] in by_id:
                    twice = f"{by_id[image['id']][0]['file_name']} and {image['file_name']}"
                    raise ValueError(f"{twice} have the same id, {image['id']!r}: number the images anew")
                by_id[image["id"]] = (image, [])
            alike = {str(number): number for number in by_id}
            for annotation in content["annotations"]:
                number = annotation["image_id"]
                if number in by_id:
                    by_id[number][1].append(annotation)
                elif (same := alike.get(str(number))) is not None:
                    raise ValueError(f"image_id {number!r} of an annotation is {same!r} in images: write both alike")
            # Written on Windows, it may have backslashes.
            names = [str(PurePosixPath(i["file_name"].replace("\\", "/")).with_suffix("")) for i, _ in by_id.values()]
        except (KeyError, TypeError, AttributeError) as error:
            raise ValueError(
                f"{path} is no json as COCO's: an entry lacks its {error}; mend it, or download it again"
            ) from error
        except ValueError as error:
            raise ValueError(f"{path}: {error}") from error
        if twice := [name for name, count in Counter(names).items() if count > 1]:
            raise ValueError(f"{path} has several images called {twice[0]}, whatever their suffix: keep one")
        return dict(zip(names, by_id.values(), strict=True)), path


@dataclass(frozen=True)
class CocoInstances(CocoKind):
    """Object masks as polygons or run-length codes, or, where an object has none, its box; crowds are left out."""

    def index(self, base: Path, split: str) -> Index:
        run_length_coder()
        entries, path = self._by_image(base, split)

        def find(name: str) -> Annotation | None:
            if name not in entries:
                return None
            image, annotations = entries[name]
            return InstanceMasks(path, name, (image.get("height"), image.get("width")), tuple(annotations))

        return Index(find, frozenset(entries))


@dataclass(frozen=True)
class InstanceMasks:
    """Objects of one image, as COCO's json has them."""

    json: Path
    image: str
    size: tuple[int, int]
    objects: tuple[dict[str, Any], ...]

    @property
    def files(self) -> tuple[Path, ...]:
        return (self.json,)

    @property
    def name(self) -> str:
        return f"{self.json}, {self.image}"

    def segments(self, size: tuple[int, int], classes: frozenset[int] | None, separate: bool) -> list[Segment]:
        coder = run_length_coder()
        wanted = [one for one in self.objects if not one.get("iscrowd")]
        codes = self._coded(
            coder, size, [one for one in wanted if classes is None or one.get("category_id") in classes]
        )
        if not separate and codes:
            codes = [(coder.merge([code for code, _ in codes]), None)]
        segments = [Segment(coder.decode(code).astype(bool), class_id) for code, class_id in codes]
        return [segment for segment in segments if segment.mask.any()] or [Segment(np.zeros(size, dtype=bool))]

    def crowds(self, size: tuple[int, int]) -> list[Segment]:
        """The pixels of many objects of a class that nobody has told apart; argument and errors as for `segments`."""
        coder = run_length_coder()
        codes = self._coded(coder, size, [one for one in self.objects if one.get("iscrowd")])
        return [Segment(coder.decode(code).astype(bool), class_id) for code, class_id in codes]

    def _coded(self, coder, size: tuple[int, int], objects: list[dict[str, Any]]) -> list[tuple[dict, Any]]:
        """The run-length codes of objects of an image of this size, and their classes."""
        if None in self.size:
            raise ValueError(f"{self.name}: its entry in the json lacks its height or width")
        if tuple(size) != tuple(self.size):
            turned = "; was it turned?" if tuple(size) == tuple(self.size[::-1]) else ""
            raise ValueError(
                f"{self.name}: annotated as {self.size} (height, width), but the image has {tuple(size)}{turned}"
            )
        return [
            (code, one.get("category_id"))
            for one in objects
            for code in self._codes(coder, one.get("segmentation"), one.get("bbox"))
        ]

    def _codes(self, coder, form: Any, box: Any) -> list[dict[str, Any]]:
        """The compressed run-length code of an object; none where its polygons cover nothing.

        Args:
            form: polygons, or a run-length code.
            box: left, top, width and height in pixels: all of it is the object where `form` has nothing.
        """
        try:
            outlined = form if isinstance(form, dict) else any(map(len, form or ()))
            if not outlined and box is not None:  # annotated for detection
                from unseg_hf.inputs import mask_of_box

                x, y, width, height = box
                corners = (x, y, x + width, y + height)
                self._refuse_shares(corners)
                mask = mask_of_box(corners, self.size)
                return [coder.encode(np.asfortranarray(mask, dtype=np.uint8))]
            if isinstance(form, dict):
                if tuple(form["size"]) != tuple(self.size):
                    raise ValueError(f"a code of size {form['size']}")
                counts = form["counts"]
                # What a code that is too short does not reach, the decoder leaves as it finds it in memory.
                if isinstance(counts, list):
                    # pycocotools would round fractions, and leave pixels as it finds them in memory.
                    numbers = all(isinstance(count, int) and count >= 0 for count in counts)
                    whole = numbers and sum(counts) == self.size[0] * self.size[1]
                else:
                    packed = counts.encode() if isinstance(counts, str) else counts
                    whole = coder.encode(coder.decode(form))["counts"] == packed
                if not whole:
                    raise ValueError("the code does not fill the image")
                return [coder.frPyObjects(form, *self.size) if isinstance(counts, list) else form]
            if any(len(polygon) % 2 for polygon in form):
                raise ValueError("a polygon has an x without its y")
            # pycocotools would walk all the way there.
            far = 2 * max(self.size)
            if not all(-far <= number <= far for polygon in form for number in polygon):
                raise ValueError("a corner of a polygon lies far outside the image")
            # It keeps every pixel of an outline.
            length = sum(sum(map(abs, np.diff(polygon[axis::2]).tolist())) for polygon in form for axis in (0, 1))
            if length > MOST_OUTLINE * max(self.size):
                raise ValueError(f"an outline {length:.0f} pixels long")
            self._refuse_shares([number for polygon in form for number in polygon])
            # Two points cover nothing, and pycocotools would take them for a box.
            polygons = [list(polygon) for polygon in form if len(polygon) >= 6]
            return [coder.merge(coder.frPyObjects(polygons, *self.size))] if polygons else []
        except (KeyError, TypeError, ValueError, OverflowError) as error:
            raise ValueError(f"{self.name}: an object's 'segmentation' or 'bbox' is damaged ({error})") from error

    def _refuse_shares(self, numbers: Sequence[float]) -> None:
        """ValueError where coordinates are shares of the image's sides, as YOLO has them."""
        from unseg_hf.inputs import are_shares  # it brings torch

        if are_shares(numbers, self.size):
            raise ValueError("all of its coordinates are from 0 to 1: give pixels, not shares of the image's sides")


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
            return PanopticPng(path, name, folder, annotations[0]) if annotations else None

        return Index(find, frozenset(entries))


@dataclass(frozen=True)
class PanopticPng:
    """Segments of one image: the folder of its PNG, and its entry in the json."""

    json: Path
    image: str
    folder: Path
    entry: dict[str, Any]

    @property
    def files(self) -> tuple[Path, ...]:
        file_name = self.entry.get("file_name")
        inside = isinstance(file_name, str) and stays_inside(file_name)
        return (self.json, self.folder / file_name) if inside else (self.json,)

    def segments(self, size: tuple[int, int], classes: frozenset[int] | None, separate: bool) -> list[Segment]:
        try:
            path = self.folder / self.entry["file_name"]
            class_of = {s["id"]: s["category_id"] for s in self.entry["segments_info"] if not s.get("iscrowd")}
        except (KeyError, TypeError) as error:
            raise ValueError(f"{self.json}, {self.image}: its entry in the json lacks {error}") from error
        if not stays_inside(self.entry["file_name"]):
            raise ValueError(
                f"{self.json}, {self.image}: file_name leads out of the folder of the segments: give a name in it"
            )
        colours = fitting(image_files.read(path).rgb8(), size, path).astype(np.int32)
        segments = colours[:, :, 0] + 256 * colours[:, :, 1] + 256**2 * colours[:, :, 2]
        return select_segments(segments, class_of, classes, separate)


def _needed(entry: dict[str, Any]) -> dict[str, Any]:
    """What is needed of an entry in COCO's json, polygons packed: the train split would take gigabytes as lists."""
    entry = {name: value for name, value in entry.items() if name in _NEEDED}
    outlines = entry.get("segmentation")
    if (any(outlines) if isinstance(outlines, list) else outlines) or "image_id" not in entry:
        entry.pop("bbox", None)  # no use where there are outlines, or of a panoptic segment
    if isinstance(outlines, list):
        # A damaged one stays as it is, and is met when its image's turn comes.
        with contextlib.suppress(TypeError):
            entry["segmentation"] = [array("d", polygon) for polygon in outlines]
    return entry
