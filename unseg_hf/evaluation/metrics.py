"""Scores of victims on masks, and of protected images beside their originals, as `evaluate` metrics for offline use.

```python
>>> from unseg_hf.evaluation.metrics import SemanticSegmentation

>>> metric = SemanticSegmentation(num_classes=2)
>>> metric.add_batch(predictions=[[[0, 1], [1, 1]]], references=[[[0, 1], [0, 255]]])
>>> metric.compute()["pixel_accuracy"]
0.6666666666666666
```

Instances and panoptic maps are scored in `unseg_hf.evaluation.detection_metrics`.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Iterable
from typing import Any

import datasets
import evaluate
import numpy as np
import torch

INPUTS = ("predictions", "references")


class StreamingMetric(evaluate.Metric):
    """Base of the metrics: `evaluate.Metric` with running sums in place of its Arrow file of all inputs.

    A subclass has `FEATURES` and `CITATION`, and fills in `_reset` (start anew), `_check` (one pair as arrays, or a
    ValueError), `_update` (count what `_check` returned) and `_result`. One process counts: sums are not gathered
    from other processes.
    """

    FEATURES: datasets.Features
    CITATION: str

    def __init__(self) -> None:
        super().__init__()
        self._count = 0
        self._reset()

    def _info(self) -> evaluate.MetricInfo:
        description = inspect.getdoc(type(self))
        return evaluate.MetricInfo(
            description=description.splitlines()[0],
            citation=self.CITATION,
            features=self.FEATURES,
            inputs_description=f"\n\n{description}",
        )

    def _build_data_dir(self) -> str:
        # The parent creates a cache folder here, which nothing would be written to; a read-only home has none.
        return self._data_dir_root

    def __len__(self) -> int:
        """Number of pairs added since the last `compute`."""
        return self._count

    def add(self, *, prediction: Any = None, reference: Any = None) -> None:
        """Add one pair; as `add_batch` with lists of one."""
        self.add_batch(predictions=[prediction], references=[reference])

    def add_batch(self, *, predictions: Iterable[Any] | None = None, references: Iterable[Any] | None = None) -> None:
        """Add a batch, one prediction and one reference for each image; they are not kept, only counted.

        Raises:
            ValueError: predictions and references differ in number, or a pair does not fit together; nothing of the
                batch is counted then.
        """
        if predictions is None or references is None:
            missing = "predictions" if predictions is None else "references"
            raise ValueError(f"{missing} is None; pass predictions and references, one of each for every image")
        predictions, references = list(predictions), list(references)
        if len(predictions) != len(references):
            raise ValueError(f"{len(predictions)} predictions and {len(references)} references; pass one for each")
        checked = []
        for index, (prediction, reference) in enumerate(zip(predictions, references, strict=True)):
            try:
                checked.append(self._check(prediction, reference))
            except ValueError as error:
                raise ValueError(f"image {index} of the batch: {error}") from error
        for pair in checked:
            self._update(*pair)
        self._count += len(checked)

    def compute(self, *, predictions: Iterable[Any] | None = None, references: Iterable[Any] | None = None) -> dict:
        """The scores of everything added, and of this batch if one is passed; then starts anew.

        Raises:
            ValueError: nothing was added, or as `add_batch` says.
        """
        if predictions is not None or references is not None:
            self.add_batch(predictions=predictions, references=references)
        if not self._count:
            raise ValueError("nothing to compute: 0 images were added; call add_batch first")
        result = self._result()
        self._count = 0
        self._reset()
        return result


class SemanticSegmentation(StreamingMetric):
    """Mean IoU, Dice and pixel accuracy of class maps, at the level of the data set.

    Pixels of all images go into one confusion matrix, and IoU = true positives / (true positives + false positives
    + false negatives) is taken for each class of it, as in Pascal VOC (Everingham et al., IJCV 2010, section 4.1.3).
    The means are over the classes that occur, at a counted pixel, in a reference or a prediction: a class that is
    only predicted counts as 0. torchmetrics' `MeanIoU` instead averages over images what each image scores by
    itself, so that the same errors weigh more in small objects, and the two differ.

    Args:
        num_classes: classes, background included.
        ignore_index: label of pixels in the references that are not counted, whatever is predicted there; None to
            count all.

    Inputs, for each image: prediction and reference, integers or booleans of shape `(height, width)`: class ids in
    [0, num_classes - 1], in the reference `ignore_index` as well. Images may differ in size.

    Returns from `compute`: `mean_iou`, `mean_dice`, `pixel_accuracy` in [0, 1], nan if no pixel counts;
    `per_class_iou`, a list of `num_classes` floats in [0, 1], nan for classes that occur in neither; with two classes
    also `foreground_iou`, the IoU of class 1.

    Raises:
        ValueError: fewer than one class, or `ignore_index` is one of the classes.
    """

    FEATURES = datasets.Features(dict.fromkeys(INPUTS, datasets.List(datasets.List(datasets.Value("int64")))))
    CITATION = "Everingham et al., The Pascal Visual Object Classes (VOC) Challenge, IJCV 2010"

    def __init__(self, num_classes: int, ignore_index: int | None = 255) -> None:
        if num_classes < 1:
            raise ValueError(f"num_classes is {num_classes}; give at least 1")
        if ignore_index is not None and 0 <= ignore_index < num_classes:
            raise ValueError(
                f"ignore_index {ignore_index} is one of the {num_classes} classes; choose a label outside "
                f"[0, {num_classes - 1}], such as -1, or None"
            )
        self.num_classes, self.ignore_index = num_classes, ignore_index
        super().__init__()

    def _reset(self) -> None:
        self._counts = np.zeros((self.num_classes, self.num_classes), dtype=np.int64)

    def _check(self, prediction: Any, reference: Any) -> tuple[np.ndarray, np.ndarray]:
        prediction, reference = same_maps(prediction, reference, ("height", "width"))
        counted = reference != self.ignore_index if self.ignore_index is not None else np.ones(reference.shape, bool)
        pair = prediction[counted].astype(np.int64), reference[counted].astype(np.int64)
        for name, labels in zip(("prediction", "reference"), pair, strict=True):
            strange = labels[(labels < 0) | (labels >= self.num_classes)]
            if strange.size:
                raise ValueError(
                    f"the {name} has label {strange[0]} with {self.num_classes} classes, and ignore_index is "
                    f"{self.ignore_index}; give labels in [0, {self.num_classes - 1}], or another num_classes"
                )
        return pair

    def _update(self, prediction: np.ndarray, reference: np.ndarray) -> None:
        pairs = np.bincount(reference * self.num_classes + prediction, minlength=self.num_classes**2)
        self._counts += pairs.reshape(self._counts.shape)

    def _result(self) -> dict[str, Any]:
        hits = np.diag(self._counts)
        both = self._counts.sum(0) + self._counts.sum(1)
        occurs = both > 0
        iou = np.full(self.num_classes, math.nan)
        iou[occurs] = hits[occurs] / (both - hits)[occurs]
        total = self._counts.sum()
        result = {
            "mean_iou": mean_or_nan(iou[occurs]),
            "per_class_iou": iou.tolist(),
            "mean_dice": mean_or_nan(2 * hits[occurs] / both[occurs]),
            "pixel_accuracy": float(hits.sum() / total) if total else math.nan,
        }
        return result | ({"foreground_iou": float(iou[1])} if self.num_classes == 2 else {})


class BoundaryIoU(StreamingMetric):
    """Boundary IoU of binary masks (Cheng et al., CVPR 2021, section 4), the mean over the masks of a data set.

    Each mask is reduced to its pixels at most d from its contour, and the IoU is that of the two bands. As in the
    authors' code, d is `dilation_ratio` of the image's diagonal, rounded, at least 1 pixel; distances are those of a
    3 x 3 erosion (chessboard), and the edge of the image is part of the contour.

    Args:
        dilation_ratio: d as a share of the diagonal, above 0.

    Inputs, for each mask: prediction and reference of shape `(height, width)`, booleans, or integers 0 and 1.

    Returns from `compute`: `boundary_iou` in [0, 1]. A pair in which both masks are empty is left out of the mean, one
    in which a single mask is empty counts as 0; nan if all pairs are left out.

    Raises:
        ValueError: `dilation_ratio` is not above 0.
    """

    FEATURES = datasets.Features(dict.fromkeys(INPUTS, datasets.List(datasets.List(datasets.Value("bool")))))
    CITATION = "Cheng et al., Boundary IoU: Improving Object-Centric Image Segmentation Evaluation, CVPR 2021"

    def __init__(self, dilation_ratio: float = 0.02) -> None:
        if not dilation_ratio > 0:
            raise ValueError(f"dilation_ratio is {dilation_ratio}; give a number above 0, such as 0.02")
        self.dilation_ratio = dilation_ratio
        super().__init__()

    def _reset(self) -> None:
        self._sum, self._masks = 0.0, 0

    def _check(self, prediction: Any, reference: Any) -> tuple[np.ndarray, np.ndarray]:
        pair = same_maps(prediction, reference, ("height", "width"))
        for name, mask in zip(("prediction", "reference"), pair, strict=True):
            strange = mask[(mask != 0) & (mask != 1)]
            if strange.size:
                raise ValueError(f"the {name} has value {strange[0]}; give a mask of booleans, or of 0 and 1")
        return tuple(mask.astype(bool) for mask in pair)

    def _update(self, prediction: np.ndarray, reference: np.ndarray) -> None:
        distance = max(1, round(self.dilation_ratio * math.hypot(*reference.shape)))
        bands = _boundary(prediction, distance), _boundary(reference, distance)
        union = np.count_nonzero(bands[0] | bands[1])
        if union:
            self._sum += np.count_nonzero(bands[0] & bands[1]) / union
            self._masks += 1

    def _result(self) -> dict[str, float]:
        return {"boundary_iou": self._sum / self._masks if self._masks else math.nan}


class ImageQuality(StreamingMetric):
    """Largest noise, PSNR and SSIM of protected images beside their originals.

    Each image is measured by `unseg_hf.fidelity.compare`: SSIM as in Wang et al. (IEEE TIP 2004), with a Gaussian
    window of 11 pixels.

    Inputs, for each image: prediction = the protected image, reference = the original, of the same size, channels
    and depth, in any form that `Protector.protect` takes: PIL image; array `(height, width[, channels])`, uint8 in
    [0, 255], uint16 grey, or float in [0, 1]; tensor `(channels, height, width)` of the same kinds; file.

    Returns from `compute`: `max_noise`, the largest difference in any image, in grey levels of 255; `psnr`, the mean
    over the images that were changed, in dB, None if none was; `ssim`, the mean over all images, at most 1;
    `unchanged`, the number of images without any difference.
    """

    FEATURES = datasets.Features(dict.fromkeys(INPUTS, datasets.Image()))
    CITATION = "Wang et al., Image Quality Assessment: From Error Visibility to Structural Similarity, IEEE TIP 2004"

    def _reset(self) -> None:
        self._measured: list[dict[str, float | None]] = []

    def _check(self, prediction: Any, reference: Any) -> tuple[Any, Any]:
        from unseg_hf.inputs import read_any

        protected, original = read_any(prediction).pixels, read_any(reference)
        if (protected.shape, protected.dtype) != (original.pixels.shape, original.pixels.dtype):
            raise ValueError(
                f"the protected image is {protected.dtype} {protected.shape}, the original {original.pixels.dtype} "
                f"{original.pixels.shape}; pass two images of the same size, channels and depth"
            )
        return original.with_pixels(protected), original

    def _update(self, protected: Any, original: Any) -> None:
        from unseg_hf.fidelity import compare

        everywhere = np.ones((original.height, original.width), dtype=bool)
        self._measured.append(compare(original, protected, everywhere))

    def _result(self) -> dict[str, Any]:
        psnr = [measured["psnr"] for measured in self._measured if measured["psnr"] is not None]
        return {
            "max_noise": float(max(measured["max_noise"] for measured in self._measured)),
            "psnr": float(np.mean(psnr)) if psnr else None,
            "ssim": float(np.mean([measured["ssim"] for measured in self._measured])),
            "unchanged": len(self._measured) - len(psnr),
        }


def as_array(values: Any) -> np.ndarray:
    """An array from an array, a nested list, a PIL image or a tensor on any device."""
    if isinstance(values, torch.Tensor):
        values = values.detach().cpu()
        # NumPy has no bfloat16.
        values = values.float() if values.dtype == torch.bfloat16 else values
    return np.asarray(values)


def same_maps(prediction: Any, reference: Any, axes: tuple[str, ...]) -> tuple[np.ndarray, np.ndarray]:
    """Two arrays of integers or booleans, of the same shape with these axes; else ValueError."""
    prediction, reference = as_array(prediction), as_array(reference)
    for name, array in (("prediction", prediction), ("reference", reference)):
        if array.dtype.kind not in "biu" or array.ndim != len(axes):
            raise ValueError(
                f"the {name} is {array.dtype} {array.shape}; give integers or booleans of shape ({', '.join(axes)}), "
                "not scores: take their argmax or threshold first"
            )
    if prediction.shape != reference.shape:
        raise ValueError(
            f"the prediction is {prediction.shape}, the reference {reference.shape}; resize the prediction to "
            f"{reference.shape}"
        )
    return prediction, reference


def mean_or_nan(values: np.ndarray) -> float:
    """The mean, nan without a warning where there is nothing."""
    return float(np.mean(values)) if len(values) else math.nan


def _boundary(mask: np.ndarray, distance: int) -> np.ndarray:
    """Pixels of a mask whose chessboard distance to the outside, the image's edge included, is at most this."""
    window = 2 * distance + 1
    inside = np.pad(mask, distance)
    # A square window is full where its columns are, and of those a row: sums make the cost the same for any window.
    for _ in range(2):
        sums = np.cumsum(np.pad(inside, ((1, 0), (0, 0))), axis=0, dtype=np.int32)
        inside = (sums[window:] - sums[:-window] == window).T
    return mask & ~inside
