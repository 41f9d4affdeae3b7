"""What a task means for an audit: how a victim of it is scored, and what one that learned nothing would get."""

from __future__ import annotations

import math
from collections.abc import Collection, Iterator
from typing import Any

import numpy as np
import torch

from unseg_hf.evaluation.detection_metrics import AveragePrecision, PanopticQuality
from unseg_hf.evaluation.metrics import BoundaryIoU, SemanticSegmentation
from unseg_hf.evaluation.victims.base import IGNORED, TASKS, Victim, boxes_of, ious_of, segments_of
from unseg_hf.evaluation.victims.training import TrainingData

SCORE_NAMES = {"instance": "ap", "detection": "ap", "panoptic": "pq", "interactive": "object_iou"}


def score_name(task: str, num_classes: int) -> str:
    """The figure of [`evaluate_victim`] that a victim is judged by, in [0, 1].

    Raises:
        ValueError: an unknown task.
    """
    if task not in TASKS:
        raise ValueError(f"task is {task!r}; use one of {', '.join(TASKS)}")
    return SCORE_NAMES.get(task) or ("foreground_iou" if num_classes == 2 else "mean_iou")


@torch.no_grad()
def evaluate_victim(
    victim: Victim,
    images: np.ndarray,
    labels: np.ndarray,
    instances: np.ndarray | None,
    num_classes: int,
    things: Collection[int],
    batch_size: int = 32,
) -> dict[str, Any]:
    """Test a victim on clean images, on the device that it is on.

    Pixels labelled 255 do not count, unless a numbered object covers them; but for AP: as in COCO, where most pixels
    have no class, an object that is found there is an error. Pixels of a class in `things` that belong to no object
    are a crowd: they count as unlabelled for panoptic maps, and what is found on them is not held against the victim
    for AP.

    Args:
        victim: left in the mode, training or evaluation, that it came in.
        images: `(count, 3, size, size)` uint8 in [0, 255].
        labels: `(count, size, size)` uint8, class ids or 255.
        instances: `(count, size, size)` int32, number of the object in its image, 0 for none; None without objects,
            which semantic and interactive victims do not need: the pixels of class 1 are one object then.
        num_classes: classes of the labels.
        things: ids of the classes that have objects.
        batch_size: images in a forward pass; changes nothing but memory.

    Returns:
        Figures in [0, 1], None where there is nothing to take a mean of:

        - semantic: all of `SemanticSegmentation`, and for two classes `boundary_iou`;
        - instance: `ap`, `ap50`, `ap75` of the masks, `box_ap`, `box_ap50`, `box_ap75` of the boxes around them;
        - detection: `ap`, `ap50`, `ap75` of the boxes;
        - panoptic: `pq`, `sq`, `rq`;
        - interactive: `object_iou`, the mean over the objects, and `boundary_iou`.

    Raises:
        ValueError: the images have nothing to score.
        ImportError: AP needs faster-coco-eval.
    """
    check_scorable(victim.task, labels, instances, num_classes)
    was_training = victim.training
    victim.eval()
    try:
        found = _found(victim, images, labels, instances, batch_size)
        scores = _SCORES[victim.task](found, num_classes, things)
    finally:
        victim.train(was_training)
    return {name: _none_for_nan(value) for name, value in scores.items()}


def trivial_score(task: str, labels: np.ndarray, num_classes: int, instances: np.ndarray | None = None) -> float:
    """The score of a model that learned nothing from the images, in [0, 1].

    Semantic with two classes: every pixel is foreground. With more: every pixel is the one class that does best.
    Interactive: each box is filled. Instances, panoptic maps and detections: 0.

    Args:
        task: one of `TASKS`.
        labels: `(count, size, size)` uint8, class ids or 255.
        num_classes: classes of the labels.
        instances: `(count, size, size)`, number of the object in its image, 0 for none, for interactive victims; None:
            the pixels of class 1 are one object.

    Raises:
        ValueError: an unknown task, or the labels have nothing to score.
    """
    if score_name(task, num_classes) in ("ap", "pq"):
        return 0.0
    check_scorable(task, labels, instances, num_classes)
    if task == "interactive":
        maps = torch.as_tensor(labels).long()
        numbers = [None] * len(maps) if instances is None else torch.as_tensor(instances).long()
        return float(np.mean([iou for image in zip(maps, numbers, strict=True) for iou in _box_ious(*image)]))
    counts = np.bincount(labels[labels != IGNORED].ravel(), minlength=num_classes)
    if num_classes == 2:
        return float(counts[1] / counts.sum())
    return float(counts.max() / counts.sum() / np.count_nonzero(counts))


def _box_ious(labels: torch.Tensor, instances: torch.Tensor | None) -> Iterator[float]:
    """IoU of each object of an image with its filled box."""
    from unseg_hf.evaluation.victims.interactive import prompted_objects

    counted = labels != IGNORED
    masks = prompted_objects(labels, instances).masks
    for mask, box in zip(masks, boxes_of(masks).int().tolist(), strict=True):
        inside = counted[box[1] : box[3], box[0] : box[2]]
        yield ((mask & counted).sum() / inside.sum()).item()


def check_scorable(task: str, labels: np.ndarray, instances: np.ndarray | None, num_classes: int) -> None:
    """ValueError for a test that says nothing; arguments as for [`evaluate_victim`]."""
    labels = np.asarray(labels)
    if (task == "semantic" and num_classes > 2) or task == "panoptic":
        if not (labels != IGNORED).any():
            raise ValueError("no test pixel has a class (all are 255), so nothing can be scored; test on other images")
    elif task == "semantic" or (task == "interactive" and instances is None):
        if not (labels == 1).any():
            raise ValueError(
                "no test image has a foreground pixel (label 1), so IoU says nothing; test on other images"
            )
    elif instances is not None and not ((np.asarray(instances) != 0) & (labels != IGNORED)).any():
        raise ValueError(f"no test image has an object, so {task} cannot be scored; test on other images")
    if instances is None and task in ("instance", "detection", "panoptic"):
        raise ValueError(f"instances is None, but {task} is scored by objects; give a map of object numbers")


def _none_for_nan(value: Any) -> Any:
    """JSON has no nan."""
    if isinstance(value, list):
        return [_none_for_nan(item) for item in value]
    return None if math.isnan(value) else float(value)


Found = Iterator[tuple[Any, torch.Tensor, torch.Tensor | None]]
"""The prediction for each image, with its labels and instances."""


def _found(victim: Victim, images: np.ndarray, labels: np.ndarray, instances: np.ndarray | None, size: int) -> Found:
    device = next(victim.parameters()).device
    data = TrainingData(images, labels, instances)
    for start in range(0, len(images), size):
        batch = data.batch(np.arange(start, min(start + size, len(images))), device)
        numbers = [None] * len(batch.labels) if batch.instances is None else batch.instances
        yield from zip(victim.predict(batch), batch.labels, numbers, strict=True)


def _semantic(found: Found, num_classes: int, things: Collection[int]) -> dict[str, Any]:
    regions, boundary = SemanticSegmentation(num_classes=num_classes), BoundaryIoU()
    for prediction, labels, _ in found:
        regions.add(prediction=prediction, reference=labels)
        if num_classes == 2:
            boundary.add(prediction=(prediction == 1) & (labels != IGNORED), reference=labels == 1)
    return regions.compute() | (boundary.compute() if num_classes == 2 else {})


def _instance(found: Found, num_classes: int, things: Collection[int]) -> dict[str, Any]:
    by_mask, by_box = AveragePrecision("segm"), AveragePrecision("bbox")
    for prediction, labels, instances in found:
        reference = _objects_and_crowds(labels, instances, things)
        by_mask.add(prediction=prediction, reference=reference)
        by_box.add(prediction=prediction | {"boxes": boxes_of(prediction["masks"])}, reference=reference)
    return by_mask.compute() | {f"box_{name}": value for name, value in by_box.compute().items()}


def _detection(found: Found, num_classes: int, things: Collection[int]) -> dict[str, Any]:
    by_box = AveragePrecision("bbox")
    for prediction, labels, instances in found:
        by_box.add(prediction=prediction, reference=_objects_and_crowds(labels, instances, things))
    return by_box.compute()


def _panoptic(found: Found, num_classes: int, things: Collection[int]) -> dict[str, Any]:
    quality = PanopticQuality(things=things, stuffs=set(range(num_classes)) - set(things), void=IGNORED)
    for prediction, labels, instances in found:
        segments = segments_of(labels, instances)
        reference = torch.stack([torch.full_like(labels, IGNORED), torch.zeros_like(labels)], dim=-1)
        for number, (mask, label, is_thing) in enumerate(
            zip(segments.masks, segments.classes.tolist(), segments.is_thing.tolist(), strict=True), start=1
        ):
            if is_thing or label not in things:
                reference[mask] = torch.tensor([label, number], device=reference.device)
        quality.add(prediction=prediction, reference=reference)
    return quality.compute()


def _interactive(found: Found, num_classes: int, things: Collection[int]) -> dict[str, Any]:
    from unseg_hf.evaluation.victims.interactive import prompted_objects

    ious, boundary = [], BoundaryIoU()
    for prediction, labels, instances in found:
        counted = labels != IGNORED
        masks, targets = prediction & counted, prompted_objects(labels, instances).masks & counted
        ious += ious_of(masks, targets).tolist()
        for mask, target in zip(masks, targets, strict=True):
            boundary.add(prediction=mask, reference=target)
    return {"object_iou": float(np.mean(ious))} | boundary.compute()


_SCORES = {
    "semantic": _semantic,
    "instance": _instance,
    "panoptic": _panoptic,
    "detection": _detection,
    "interactive": _interactive,
}


def _objects_and_crowds(labels: torch.Tensor, instances: torch.Tensor, things: Collection[int]) -> dict[str, Any]:
    """A reference of `AveragePrecision`: the objects of an image, and as a crowd what belongs to none of them."""
    segments = segments_of(labels, instances)
    kept = segments.is_thing | torch.isin(segments.classes, torch.tensor(list(things), device=labels.device))
    masks = segments.masks[kept]
    return {
        "masks": masks,
        "boxes": boxes_of(masks),
        "labels": segments.classes[kept],
        "iscrowd": ~segments.is_thing[kept],
    }
