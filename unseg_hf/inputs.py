"""What callers hand in: images, prompts and masks, in any form."""

import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, BinaryIO

import numpy as np
import torch
from PIL import Image

from .image_files import Picture, from_array, from_pil, read, read_mask

MODES = ("union", "per_segment")
TINTS = ("auto", "always", "never")
BOX_FORMATS = ("xyxy", "xywh")
ImageInput = str | os.PathLike | bytes | BinaryIO | Image.Image | np.ndarray | torch.Tensor | Picture


@dataclass(frozen=True, eq=False)
class Prompt:
    """What to protect in one image: at most one of `mask`, `masks`, `label_map`, `boxes`, `points` and `whole_image`;
    with none of them the generator looks for objects itself: its object finder, or SAM where it has none.

    Args:
        mask: a mask image, numeric or boolean: PIL image, array or tensor `(height, width)`, or a file. Whole numbers
            are inside where they are not 0, floats where they are at least 0.5, JPEG files where they are at least
            128.
        masks: several of those; none of them where nothing is to be protected.
        classes: number of the class of each of `masks` or `boxes`, for "per_segment".
        label_map: a label image; every label becomes a mask, except `ignore_labels`, and is its class.
        ignore_labels: labels of `label_map` that are no objects.
        boxes: `[x0, y0, x1, y1]` each, in pixels of the upright image. In each the object that SAM finds is protected;
            where it finds none, the whole box is. The SAM of the embedded generator finds none, so its boxes are
            protected completely: from photographs models learn hardly more then than with masks.
        box_format: "xywh" if `boxes` are `[x, y, width, height]`, as COCO has them; they are turned into the other
            form, and this into "xyxy".
        points: `[x, y]` each, in pixels of the upright image, on an object: of those that the object finder has found,
            or, in a generator without one, the object that SAM finds there.
        point_labels: 1 for a point on the object, 0 for one that is not; all 1 by default.
        whole_image: everything gets the full budget. It does not say where objects are: models learn them as before.
        mode: "union" prompts the generator once with all masks together (the paper's way), "per_segment" once with
            each mask, on the same image embedding. Where classes are known, each class gets a noise of its own then,
            the same in all images; if the generator has fewer noises than there are classes, some share one.
        tint: when masks without a class get a flat tint in place of the generator's noise, if it has one: "auto" where
            that says more ([`needs_tint`]), "always" (images of one channel excepted) or "never". All images of a data
            set should get the same: from a few that do not, a model learns what objects look like.

    Raises:
        ValueError: contradicting fields, naming them.
    """

    mask: Any = None
    masks: Sequence[Any] | None = None
    classes: Sequence[int] | None = None
    label_map: Any = None
    ignore_labels: Sequence[int] = (0, 255)
    boxes: Sequence[Sequence[float]] | None = None
    box_format: str = "xyxy"
    points: Sequence[Sequence[float]] | None = None
    point_labels: Sequence[int] | None = None
    whole_image: bool = False
    mode: str = "union"
    tint: str = "auto"

    def __post_init__(self):
        given = [n for n in ("mask", "masks", "label_map", "boxes", "points") if getattr(self, n) is not None]
        given += ["whole_image"] if self.whole_image else []
        if len(given) > 1:
            raise ValueError(f"{' and '.join(given)} were given: pass one kind of prompt")
        if self.mode not in MODES:
            raise ValueError(f"mode={self.mode!r}: must be one of {', '.join(MODES)}")
        if self.tint not in TINTS:
            raise ValueError(f"tint={self.tint!r}: must be one of {', '.join(TINTS)}")
        if self.box_format not in BOX_FORMATS:
            raise ValueError(f"box_format={self.box_format!r}: must be one of {', '.join(BOX_FORMATS)}")
        if self.masks is not None and not hasattr(self.masks, "__len__"):
            object.__setattr__(self, "masks", list(self.masks))
        if self.classes is not None:
            marked = self.boxes if self.masks is None else self.masks
            object.__setattr__(self, "classes", _class_numbers(self.classes, marked))
        for name, width in (("boxes", 4), ("points", 2)):
            if getattr(self, name) is not None:
                object.__setattr__(self, name, _coordinates(name, getattr(self, name), width))
        if self.box_format == "xywh":
            for x, y, width, height in self.boxes or ():
                if not (width > 0 and height > 0):
                    raise ValueError(f"box {[x, y, width, height]}: needs a width and a height above 0, in pixels")
            object.__setattr__(self, "boxes", self.boxes and [[x, y, x + w, y + h] for x, y, w, h in self.boxes])
            object.__setattr__(self, "box_format", "xyxy")
        for x0, y0, x1, y1 in self.boxes or ():
            if not (x0 < x1 and y0 < y1):
                raise ValueError(
                    f"box {[x0, y0, x1, y1]}: needs x0 < x1 and y0 < y1, in pixels (for widths and heights there is "
                    "box_format, xywh)"
                )
        labels = [1] * len(self.points or ()) if self.point_labels is None else np.ravel(self.point_labels).tolist()
        if len(labels) != len(self.points or ()):
            raise ValueError(f"{len(labels)} point_labels for {len(self.points or ())} points: pass one each")
        if labels and (set(labels) - {0, 1} or 1 not in labels):
            raise ValueError(f"point_labels={labels}: 1 is on the object, 0 is not, and at least one must be on it")
        object.__setattr__(self, "point_labels", [int(label) for label in labels])
        object.__setattr__(self, "ignore_labels", tuple(np.ravel(self.ignore_labels).tolist()))

    @classmethod
    def check_names(cls, names: Iterable[str]) -> None:
        """ValueError for names that are none of a prompt's fields."""
        if unknown := set(names) - cls.__dataclass_fields__.keys():
            raise ValueError(
                f"unknown {', '.join(sorted(unknown))}: the prompt has {', '.join(cls.__dataclass_fields__)}; epsilon "
                "and epsilon_background stand beside it, for all images of a call"
            )

    def check_inside(self, height: int, width: int) -> None:
        """ValueError for a box that misses an image of this size, a point outside it, or boxes that are shares of its
        sides and not pixels."""
        if are_shares([number for box in self.boxes or () for number in box], (height, width)):
            raise ValueError(
                f"boxes={self.boxes}: all are within one pixel; multiply shares of the image's sides by {width} and "
                f"{height}"
            )
        for x0, y0, x1, y1 in self.boxes or ():
            if x0 >= width or y0 >= height or x1 <= 0 or y1 <= 0:
                raise ValueError(f"box {[x0, y0, x1, y1]} lies outside the image of {width} x {height} pixels")
        for x, y in self.points or ():
            if not (0 <= x <= width and 0 <= y <= height):
                raise ValueError(f"point {[x, y]} lies outside the image of {width} x {height} pixels")


def _class_numbers(classes, marked) -> list[int]:
    numbers, count = np.asarray(classes), 0 if marked is None else len(marked)
    if numbers.shape != (count,) or (count and numbers.dtype.kind not in "iu"):
        raise ValueError(
            f"classes={classes!r} for {count} masks or boxes: pass `masks` or `boxes`, and a whole number for each"
        )
    return numbers.tolist()


def _coordinates(name: str, values, width: int) -> list[list[float]]:
    """Boxes or points of any numeric kind as nested lists of finite numbers."""
    try:
        array = np.asarray([[float(number) for number in item] for item in values])
    except (TypeError, ValueError):
        array = np.empty(0)
    if array.ndim != 2 or array.shape[1] != width or len(array) == 0 or not np.isfinite(array).all():
        raise ValueError(f"{name}={values!r}: pass a list of {width} finite numbers each, in pixels")
    return array.tolist()


def read_any(image: ImageInput) -> Picture:
    """A picture from whatever `Protector.protect` accepts."""
    if isinstance(image, Picture):
        return image
    if isinstance(image, Image.Image):
        return from_pil(image)
    if isinstance(image, torch.Tensor):
        if image.ndim == 3:
            if not 1 <= image.shape[0] <= 4:
                raise ValueError(f"a tensor of shape {tuple(image.shape)}: pass (channels, height, width)")
            image = image.permute(1, 2, 0)
        # NumPy has no bfloat16.
        return from_array(_numpy(image), "the tensor")
    if isinstance(image, np.ndarray):
        return from_array(image)
    return read(image)


class LabelMasks(Sequence):
    """The masks of a label image, one for each of its values, each made when it is asked for: there may be thousands.

    Args:
        labels: `(height, width)` integers.
        ignored: values that belong to no mask.
    """

    def __init__(self, labels: np.ndarray, ignored: Sequence[int] = ()):
        self.labels = labels
        self.values = tuple(int(value) for value in np.unique(labels) if value not in ignored)

    def __len__(self) -> int:
        return len(self.values)

    def __getitem__(self, index: int) -> np.ndarray:
        return self.labels == self.values[index]

    def union(self) -> np.ndarray:
        """Where any of the values is."""
        return np.isin(self.labels, self.values)


def union_of(masks: Sequence[np.ndarray]) -> np.ndarray:
    """What at least one of the masks covers, a new array; there is at least one."""
    return masks.union() if isinstance(masks, LabelMasks) else np.logical_or.reduce(masks)


def given_masks(
    prompt: Prompt, size: tuple[int, int]
) -> tuple[Sequence[np.ndarray] | None, Sequence[int] | None, tuple[str, ...]]:
    """`(height, width)` bool masks of a prompt that holds them, else None, their classes where it has those, and what
    a user should know of them."""
    if prompt.whole_image:
        return [np.ones(size, dtype=bool)], None, ()
    if prompt.mask is not None:
        return [read_region(prompt.mask, size)], None, ()
    if prompt.masks is not None:
        if not len(prompt.masks):
            return [np.zeros(size, dtype=bool)], None, ()
        return [read_region(mask, size) for mask in prompt.masks], prompt.classes, ()
    if prompt.label_map is not None:
        labels = _labels(prompt.label_map, size)
        if labels.dtype.kind == "f":
            raise ValueError(f"a label map of {labels.dtype}: pass whole numbers, one for each object or class")
        masks = LabelMasks(labels, prompt.ignore_labels)
        if not masks:
            ignored = ", ".join(map(str, prompt.ignore_labels))
            return [np.zeros(size, dtype=bool)], None, (f"the label map has no labels but those ignored: {ignored}",)
        notes = ()
        if 255 in prompt.ignore_labels and masks.values[-1] > 255 and (labels == 255).any():
            notes = ("label 255 is ignored: if labels count objects here, ignore 0 alone (ignore_labels)",)
        return masks, list(masks.values), notes
    return None, prompt.classes, ()


def are_shares(coordinates: Sequence[float], size: tuple[int, int]) -> bool:
    """Whether coordinates in an image of `(height, width)` must be shares of its sides, as YOLO has them: all of them
    would lie within one pixel."""
    return bool(len(coordinates)) and min(size) > 2 and all(0 <= number <= 1 for number in coordinates)


def mask_of_box(box: Sequence[float], size: tuple[int, int]) -> np.ndarray:
    """The pixels that a box `[x0, y0, x1, y1]` touches, in an image of `(height, width)`: bool."""
    x0, y0, x1, y1 = (max(number, 0) for number in box)
    mask = np.zeros(size, dtype=bool)
    mask[int(y0) : int(np.ceil(y1)), int(x0) : int(np.ceil(x1))] = True
    return mask


def read_region(mask, size: tuple[int, int]) -> np.ndarray:
    """A mask in any accepted form as `(height, width)` bool; ValueError unless it has that size."""
    values = _labels(mask, size)
    return values >= 0.5 if values.dtype.kind == "f" else values != 0


def _labels(mask, size: tuple[int, int]) -> np.ndarray:
    if isinstance(mask, torch.Tensor):
        values = _numpy(mask)
    elif isinstance(mask, Image.Image) and mask.mode == "F":
        values = np.asarray(mask)
    else:
        values = np.asarray(mask) if isinstance(mask, (np.ndarray, list)) else read_mask(mask)
    if values.dtype.kind not in "biuf" or (values.dtype.kind == "f" and not np.isfinite(values).all()):
        raise ValueError(f"a mask of {values.dtype}, or with values that are not finite: pass numbers or booleans")
    if values.shape[:1] == (1,) and values.shape[1:] == size:
        values = values[0]
    elif values.ndim == 3 and values.shape[:2] == size and (values == values[:, :, :1]).all():
        values = values[:, :, 0]  # one channel, or a grey picture in several
    if values.shape != size:
        raise ValueError(
            f"a mask of shape {values.shape} for an upright image of (height, width) {size}: both must be the same"
        )
    return values


def _numpy(tensor: torch.Tensor) -> np.ndarray:
    tensor = tensor.detach().cpu()
    return (tensor.float() if tensor.dtype == torch.bfloat16 else tensor).numpy()
