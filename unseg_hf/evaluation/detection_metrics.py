"""Scores of instances (COCO's average precision) and of panoptic maps, as `evaluate` metrics for offline use."""

from __future__ import annotations

import math
from collections.abc import Collection
from typing import Any

import datasets
import numpy as np

from unseg_hf.evaluation.metrics import INPUTS, StreamingMetric, as_array, mean_or_nan, same_maps

SHAPES = {"segm": "masks", "bbox": "boxes"}
"""What is compared, by `iou_type`."""
OBJECTS = {
    "masks": datasets.List(datasets.List(datasets.List(datasets.Value("bool")))),
    "boxes": datasets.List(datasets.List(datasets.Value("float64"))),
    "labels": datasets.List(datasets.Value("int64")),
}


class AveragePrecision(StreamingMetric):
    """COCO's average precision of instances, by masks or boxes (Lin et al., ECCV 2014), through faster-coco-eval.

    The mean over the classes that occur in the references, with at most 100 predictions for each image and class, and
    over the IoU thresholds 0.50, 0.55, ... 0.95 (`ap`) or at one (`ap50`, `ap75`).

    Args:
        iou_type: "segm" compares masks, "bbox" boxes.

    Inputs, for each image, prediction and reference: a dict of

    - `masks` ("segm"): booleans or 0 and 1, shape `(objects, height, width)`, or a list of COCO RLE dicts (`size`,
      `counts`), of one size in the image;
    - `boxes` ("bbox"): shape `(objects, 4)`, x0, y0, x1, y1 in pixels;
    - `labels`: class ids, integers, shape `(objects,)`;
    - `scores`, in predictions only: any finite numbers, shape `(objects,)`;
    - `iscrowd`, in references only and optional: booleans, shape `(objects,)`; predictions on a crowd do not count.

    Arrays for no objects have length 0. Other keys are not looked at. Masks are kept as RLE until `compute`, so
    memory grows with the number of objects, by some hundred bytes each.

    Returns from `compute`: `ap`, `ap50`, `ap75` in [0, 1]; nan if no reference has an object that is no crowd.

    Raises:
        ValueError: an unknown `iou_type`.
        ImportError: faster-coco-eval is not installed.
    """

    FEATURES = datasets.Features(
        {
            "predictions": OBJECTS | {"scores": datasets.List(datasets.Value("float64"))},
            "references": OBJECTS | {"iscrowd": datasets.List(datasets.Value("bool"))},
        }
    )
    CITATION = "Lin et al., Microsoft COCO: Common Objects in Context, ECCV 2014"

    def __init__(self, iou_type: str = "segm") -> None:
        if iou_type not in SHAPES:
            raise ValueError(f"iou_type is {iou_type!r}; use one of {', '.join(SHAPES)}")
        try:
            import faster_coco_eval
        except ImportError as error:
            raise ImportError(
                "AveragePrecision needs faster-coco-eval; install it with: pip install 'unseg-hf[audit]'"
            ) from error
        self._coco = faster_coco_eval
        self.iou_type = iou_type
        super().__init__()

    def _reset(self) -> None:
        self._images: list[dict] = []
        self._references: list[dict] = []
        self._predictions: list[dict] = []

    def _check(self, prediction: Any, reference: Any) -> tuple[list[dict], list[dict], tuple[int, int]]:
        sizes: set[tuple[int, int]] = set()
        found, true = self._objects("prediction", prediction, sizes), self._objects("reference", reference, sizes)
        if len(sizes) > 1:
            raise ValueError(f"masks of (height, width) {sorted(sizes)} in one image; resize them to the reference's")
        empty = [index for index, thing in enumerate(true) if not thing["area"] > 0]
        if empty:
            raise ValueError(f"object {empty[0]} of the reference has no area; leave it out")
        return found, true, next(iter(sizes), (0, 0))

    def _objects(self, name: str, given: Any, sizes: set[tuple[int, int]]) -> list[dict]:
        """COCO annotations of the objects in a prediction or reference; adds the sizes of masks to `sizes`."""
        key, extra = SHAPES[self.iou_type], {"prediction": ["scores"], "reference": []}[name]
        for field in (key, "labels", *extra):
            if not isinstance(given, dict) or field not in given:
                raise ValueError(f"the {name} has no {field!r}; pass a dict with {', '.join([key, 'labels', *extra])}")
        shapes = _boxes(name, given[key]) if key == "boxes" else self._masks(name, given[key], sizes)
        labels = as_array(given["labels"])
        if labels.size and labels.dtype.kind not in "iu":
            raise ValueError(f"the {name}'s labels are {labels.dtype}; give integers")
        columns = {"labels": ("category_id", labels.astype(np.int64))}
        if name == "prediction":
            columns["scores"] = ("score", as_array(given["scores"]).astype(np.float64))
            if not np.isfinite(columns["scores"][1]).all():
                raise ValueError(f"the prediction's scores are {columns['scores'][1]}; give finite numbers")
        else:
            columns["iscrowd"] = ("iscrowd", as_array(given.get("iscrowd", np.zeros(len(shapes)))).astype(np.int64))
        for field, (_, values) in columns.items():
            if values.shape != (len(shapes),):
                raise ValueError(
                    f"the {name} has {len(shapes)} {key} and {field} of shape {values.shape}; give one for each"
                )
        return [
            shape | {column: values[index].item() for column, values in columns.values()}
            for index, shape in enumerate(shapes)
        ]

    def _masks(self, name: str, masks: Any, sizes: set[tuple[int, int]]) -> list[dict]:
        """Objects with their masks as RLE; adds the sizes it finds to `sizes`."""
        mask_api = self._coco.mask
        if isinstance(masks, (list, tuple)) and all(isinstance(mask, dict) for mask in masks):
            broken = [mask for mask in masks if not mask.keys() >= {"size", "counts"}]
            if broken:
                raise ValueError(f"a mask of the {name} is {broken[0]}; give COCO RLE, a dict with size and counts")
            # Plain lists of counts are COCO's uncompressed RLE.
            rles = [mask_api.frPyObjects(m, *m["size"]) if isinstance(m["counts"], list) else m for m in masks]
        else:
            array = as_array(masks)
            if array.shape[:1] == (0,):
                return []
            if array.ndim != 3 or array.dtype.kind not in "biu" or ((array != 0) & (array != 1)).any():
                raise ValueError(
                    f"the {name}'s masks are {array.dtype} {array.shape}; give booleans, or 0 and 1, of shape "
                    "(objects, height, width), or a list of COCO RLE"
                )
            rles = mask_api.encode(np.asfortranarray(array.transpose(1, 2, 0), dtype=np.uint8))
        sizes.update(tuple(int(side) for side in rle["size"]) for rle in rles)
        return [{"segmentation": rle, "area": float(mask_api.area(rle))} for rle in rles]

    def _update(self, prediction: list[dict], reference: list[dict], size: tuple[int, int]) -> None:
        image = len(self._images) + 1
        self._images.append({"id": image, "height": size[0], "width": size[1]})
        self._predictions += [found | {"image_id": image} for found in prediction]
        # COCO's matching takes the id 0 for "no object".
        first = len(self._references) + 1
        self._references += [true | {"image_id": image, "id": first + i} for i, true in enumerate(reference)]

    def _result(self) -> dict[str, float]:
        names = ("ap", "ap50", "ap75")
        if all(reference["iscrowd"] for reference in self._references):
            return dict.fromkeys(names, math.nan)
        classes = sorted({found["category_id"] for found in self._references + self._predictions})
        truth = self._coco.COCO(
            {
                "images": self._images,
                "annotations": self._references,
                "categories": [{"id": label, "name": str(label)} for label in classes],
            }
        )
        evaluation = self._coco.COCOeval_faster(truth, truth.loadRes(self._predictions), self.iou_type)
        evaluation.run()
        return dict(zip(names, map(float, evaluation.stats), strict=False))


def _boxes(name: str, boxes: Any) -> list[dict]:
    array = as_array(boxes).astype(np.float64)
    array = array.reshape(0, 4) if array.size == 0 else array
    if array.ndim != 2 or array.shape[1] != 4:
        raise ValueError(f"the {name}'s boxes have shape {array.shape}; give (objects, 4): x0, y0, x1, y1 in pixels")
    wrong = array[~(np.isfinite(array).all(1) & (array[:, :2] <= array[:, 2:]).all(1))]
    if len(wrong):
        raise ValueError(f"a box of the {name} is {wrong[0].tolist()}; give finite x0 <= x1 and y0 <= y1, in pixels")
    sides = array[:, 2:] - array[:, :2]
    return [
        {"bbox": [*corner, *side], "area": side[0] * side[1]}
        for corner, side in zip(array[:, :2].tolist(), sides.tolist(), strict=True)
    ]


class PanopticQuality(StreamingMetric):
    """Panoptic, segmentation and recognition quality (Kirillov et al., Panoptic Segmentation, CVPR 2019, section 4).

    Segments of one class match where their IoU is above 0.5. For each class SQ is the mean IoU of its matches, RQ is
    matches / (matches + half of the unmatched), PQ their product; each is averaged over the classes that occur in
    a reference or a prediction. As in the authors' panopticapi, pixels that are void in the reference do not count
    in a prediction's area, and an unmatched prediction of which more than half lies on void is no error. Pixels that
    are void in the prediction do count: torchmetrics' `PanopticQuality` drops them, so that a model that leaves
    objects out would score 1.

    Args:
        things: ids of the classes with instances.
        stuffs: ids of the classes without; their instance ids are not looked at.
        void: class id of pixels without a label: crowds and unlabelled areas in references, nothing found in
            predictions.

    Inputs, for each image: prediction and reference, integers of shape `(height, width, 2)`: class id and instance id.

    Returns from `compute`: `pq`, `sq`, `rq` in [0, 1], nan if no class occurs.

    Raises:
        ValueError: no class, or one id in two of `things`, `stuffs` and `void`.
    """

    FEATURES = datasets.Features(
        dict.fromkeys(INPUTS, datasets.List(datasets.List(datasets.List(datasets.Value("int64")))))
    )
    CITATION = "Kirillov et al., Panoptic Segmentation, CVPR 2019"

    def __init__(self, things: Collection[int], stuffs: Collection[int], void: int = 255) -> None:
        self.things, self.stuffs, self.void = sorted(set(things)), sorted(set(stuffs)), void
        classes = [*self.things, *self.stuffs]
        twice = [label for label in [*classes, void] if [*classes, void].count(label) > 1]
        if not classes or twice:
            problem = f"id {twice[0]} stands in two of them" if twice else "there is no class"
            raise ValueError(
                f"things {self.things}, stuffs {self.stuffs}, void {void}: {problem}; give each class one id"
            )
        self._ids = np.array(sorted([*classes, void]))
        super().__init__()

    def _reset(self) -> None:
        # Rows: sum of the matches' IoU, matches, unmatched predictions, unmatched references.
        self._sums = np.zeros((4, len(self._ids)))

    def _check(self, prediction: Any, reference: Any) -> tuple[np.ndarray, np.ndarray]:
        pair = same_maps(prediction, reference, ("height", "width", "2"))
        for name, ids in zip(("prediction", "reference"), pair, strict=True):
            if ids.shape[2] != 2:
                raise ValueError(f"the {name} is {ids.shape}; give (height, width, 2): class id and instance id")
            strange = np.setdiff1d(ids[..., 0], self._ids)
            if strange.size:
                raise ValueError(
                    f"the {name} has class id {strange[0]}, which is none of things {self.things} and stuffs "
                    f"{self.stuffs}; give one of them, or void ({self.void})"
                )
        return pair

    def _segments(self, ids: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Class of each segment, as a position in `_ids`, and for each pixel the number of its segment."""
        classes = np.searchsorted(self._ids, ids[..., 0].ravel())
        instances = np.where(np.isin(self._ids, self.things)[classes], ids[..., 1].ravel(), 0)
        names, instances = np.unique(instances, return_inverse=True)
        # Numbers in place of pairs, which NumPy sorts many times faster.
        segments, pixels = np.unique(classes * len(names) + instances, return_inverse=True)
        return segments // max(1, len(names)), pixels

    def _update(self, prediction: np.ndarray, reference: np.ndarray) -> None:
        found, found_pixels = self._segments(prediction)
        true, true_pixels = self._segments(reference)
        overlap = np.bincount(true_pixels * len(found) + found_pixels, minlength=len(true) * len(found))
        overlap = overlap.reshape(len(true), len(found))
        void = np.searchsorted(self._ids, self.void)
        found_area, found_on_void = overlap.sum(0), overlap[true == void].sum(0)
        overlap, true = overlap[true != void], true[true != void]
        iou = overlap / (overlap.sum(1)[:, None] + found_area - found_on_void - overlap)
        match = (true[:, None] == found) & (iou > 0.5)
        wrong = ~match.any(0) & (found != void) & (found_on_void <= found_area / 2)
        for row, (classes, weights) in enumerate(
            (
                (true[match.nonzero()[0]], iou[match]),
                (true[match.any(1)], None),
                (found[wrong], None),
                (true[~match.any(1)], None),
            )
        ):
            self._sums[row] += np.bincount(classes, weights, minlength=len(self._ids))

    def _result(self) -> dict[str, float]:
        iou, matches, false_positives, false_negatives = self._sums[:, self._sums[1:].any(0)]
        sq = iou / np.maximum(matches, 1)
        rq = matches / (matches + (false_positives + false_negatives) / 2)
        return {"pq": mean_or_nan(sq * rq), "sq": mean_or_nan(sq), "rq": mean_or_nan(rq)}
