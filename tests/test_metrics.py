import itertools
import math
import sys

import evaluate
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from PIL import Image
from pycocotools import mask as coco_mask
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval
from scipy.ndimage import distance_transform_cdt
from skimage.metrics import peak_signal_noise_ratio, structural_similarity
from torchmetrics.detection import PanopticQuality as TorchmetricsPanopticQuality

from unseg_hf.evaluation.detection_metrics import AveragePrecision, PanopticQuality
from unseg_hf.evaluation.metrics import BoundaryIoU, ImageQuality, SemanticSegmentation

quickly = settings(max_examples=40, deadline=None)


def maps(*labels: int, shape: tuple[int, ...] = (5, 6)):
    return arrays(np.int64, shape, elements=st.sampled_from(labels))


# Semantic segmentation


def semantic_by_loops(predictions, references, num_classes: int) -> dict:
    pairs = [
        (p, r)
        for prediction, reference in zip(predictions, references, strict=True)
        for p, r in zip(prediction.ravel().tolist(), reference.ravel().tolist(), strict=True)
        if r != 255
    ]
    iou, dice = [], []
    for label in range(num_classes):
        intersection = sum(p == r == label for p, r in pairs)
        union = sum(label in pair for pair in pairs)
        iou.append(intersection / union if union else math.nan)
        dice.append(2 * intersection / (union + intersection) if union else math.nan)
    occurring = [label for label in range(num_classes) if not math.isnan(iou[label])]
    if not pairs:
        return {"mean_iou": math.nan, "per_class_iou": iou, "mean_dice": math.nan, "pixel_accuracy": math.nan}
    return {
        "mean_iou": sum(iou[label] for label in occurring) / len(occurring),
        "per_class_iou": iou,
        "mean_dice": sum(dice[label] for label in occurring) / len(occurring),
        "pixel_accuracy": sum(p == r for p, r in pairs) / len(pairs),
    }


@quickly
@given(st.lists(st.tuples(maps(0, 1, 3), maps(0, 2, 3, 255)), min_size=1, max_size=3))
def test_semantic_scores_equal_loops_over_pixels_in_one_go_and_in_batches(pairs):
    predictions, references = map(list, zip(*pairs, strict=True))
    expected = semantic_by_loops(predictions, references, num_classes=5)
    metric = SemanticSegmentation(num_classes=5)
    for prediction, reference in pairs:
        metric.add_batch(predictions=torch.from_numpy(prediction)[None], references=reference[None].astype(np.uint8))
    streamed = metric.compute()
    assert streamed.pop("per_class_iou") == pytest.approx(expected.pop("per_class_iou"), nan_ok=True)
    assert streamed == pytest.approx(expected, nan_ok=True)
    at_once = metric.compute(predictions=predictions, references=references)
    at_once.pop("per_class_iou")
    assert at_once == pytest.approx(expected, nan_ok=True)


def test_semantic_scores_of_perfect_ignored_and_two_class_maps():
    reference = np.array([[0, 1, 255], [0, 0, 255]])
    metric = SemanticSegmentation(num_classes=2)
    # Whatever is predicted at ignored pixels, even what is no class, changes nothing.
    perfect = metric.compute(predictions=[np.where(reference == 255, 77, reference)], references=[reference])
    assert perfect == {
        "mean_iou": 1,
        "per_class_iou": [1, 1],
        "mean_dice": 1,
        "pixel_accuracy": 1,
        "foreground_iou": 1,
    }
    constant = metric.compute(predictions=[np.ones((2, 3), np.uint8)], references=[reference])
    assert constant["foreground_iou"] == constant["per_class_iou"][1] == 0.25
    assert constant["mean_iou"] == 0.125

    nothing = metric.compute(predictions=[reference], references=[np.full((2, 3), 255)])
    assert math.isnan(nothing["mean_iou"])
    assert math.isnan(nothing["pixel_accuracy"])
    only_background = metric.compute(predictions=[np.zeros((2, 3), bool)], references=[np.zeros((2, 3), bool)])
    assert only_background["mean_iou"] == 1
    assert math.isnan(only_background["foreground_iou"])
    # Images of different sizes stand in one batch; None counts every pixel.
    pair = [np.zeros((1, 4), int), np.ones((3, 2), int)]
    assert SemanticSegmentation(256, ignore_index=None).compute(predictions=pair, references=pair)["mean_iou"] == 1


# Boundary IoU


def boundary_iou_by_distance(prediction, reference) -> float | None:
    limit = max(1, round(0.02 * math.sqrt(prediction.shape[0] ** 2 + prediction.shape[1] ** 2)))
    bands = []
    for mask in (prediction, reference):
        distance = distance_transform_cdt(np.pad(mask, 1), metric="chessboard")[1:-1, 1:-1]
        bands.append(mask & (distance <= limit))
    union = (bands[0] | bands[1]).sum()
    return (bands[0] & bands[1]).sum() / union if union else None


@quickly
@given(st.lists(st.tuples(*[arrays(bool, (9, 7))] * 2), min_size=1, max_size=4))
def test_boundary_iou_of_small_masks_equals_chessboard_distances(pairs):
    scores = [score for pair in pairs if (score := boundary_iou_by_distance(*pair)) is not None]
    metric = BoundaryIoU()
    for prediction, reference in pairs:
        metric.add(prediction=prediction, reference=reference)
    measured = metric.compute()["boundary_iou"]
    assert measured == pytest.approx(sum(scores) / len(scores) if scores else math.nan, nan_ok=True)


def test_boundary_iou_of_large_masks_equals_chessboard_distances():
    rows, columns = np.mgrid[:120, :260]
    reference = (rows - 60) ** 2 + (columns - 90) ** 2 < 50**2
    prediction = (rows - 55) ** 2 + (columns - 92) ** 2 < 56**2  # cut by the edge of the image
    expected = boundary_iou_by_distance(prediction, reference)
    assert 0.05 < expected < 0.5
    metric = BoundaryIoU()
    one = metric.compute(predictions=[prediction.astype(np.uint8)], references=[torch.from_numpy(reference)])
    assert one["boundary_iou"] == pytest.approx(expected)
    assert metric.compute(predictions=[reference], references=[reference])["boundary_iou"] == 1
    # Nothing against nothing is left out, nothing against something is 0.
    empty = np.zeros_like(reference)
    two = metric.compute(predictions=[empty, empty, reference], references=[empty, reference, reference])
    assert two["boundary_iou"] == 0.5


# Average precision


def random_objects(generator, images: int) -> tuple[list[dict], list[dict]]:
    """Rectangles, some of them crowds, and predictions: near them, missed, invented, of a wrong class."""
    predictions, references = [], []
    for _ in range(images):
        boxes = []
        for _ in range(generator.integers(0, 6)):
            x0, y0 = generator.integers(0, 30, 2)
            boxes.append([x0, y0, x0 + generator.integers(3, 18), y0 + generator.integers(3, 18)])
        boxes = np.array(boxes, int).reshape(-1, 4)
        labels = generator.integers(0, 3, len(boxes))
        repeats = generator.integers(0, 3, len(boxes))
        found, found_labels = np.repeat(boxes, repeats, axis=0), np.repeat(labels, repeats)
        found = np.concatenate([found, generator.integers([0, 0, 20, 20], [20, 20, 48, 48], (2, 4))])
        found = np.clip(found + generator.integers(-1, 2, found.shape), 0, 48)
        found_labels = np.append(found_labels, generator.integers(0, 4, 2))
        found_labels[generator.random(len(found)) < 0.2] = 3
        references.append(
            {
                "boxes": boxes,
                "labels": labels,
                "masks": filled(boxes),
                "iscrowd": generator.random(len(boxes)) < 0.15,
            }
        )
        predictions.append(
            {
                "boxes": found + generator.random(found.shape) * (0, 0, 1, 1),
                "labels": found_labels,
                "masks": filled(found),
                "scores": generator.random(len(found)),
            }
        )
    return predictions, references


def filled(boxes) -> np.ndarray:
    masks = np.zeros((len(boxes), 48, 50), dtype=bool)
    for mask, (x0, y0, x1, y1) in zip(masks, boxes, strict=True):
        mask[y0:y1, x0:x1] = True
    return masks


def rle(mask) -> dict:
    return coco_mask.encode(np.asfortranarray(mask, dtype=np.uint8))


def average_precision_by_pycocotools(predictions, references, iou_type: str) -> list[float]:
    def annotations(sides) -> list[dict]:
        found = []
        for image, side in enumerate(sides):
            for index, (x0, y0, x1, y1) in enumerate(side["boxes"].tolist()):
                shape = {"bbox": [x0, y0, x1 - x0, y1 - y0]}
                if iou_type == "segm":
                    shape = {"segmentation": rle(side["masks"][index])}
                found.append(
                    shape
                    | {"image_id": image, "category_id": int(side["labels"][index]), "area": 100.0}
                    | ({"score": float(side["scores"][index])} if "scores" in side else {})
                    | {"id": len(found) + 1, "iscrowd": int(side.get("iscrowd", [0] * (index + 1))[index])}
                )
        return found

    truth = COCO()
    truth.dataset = {
        "images": [{"id": image, "height": 48, "width": 50} for image in range(len(references))],
        "categories": [{"id": label} for label in range(4)],
        "annotations": annotations(references),
        "info": {},
    }
    truth.createIndex()
    evaluation = COCOeval(truth, truth.loadRes(annotations(predictions)), iou_type)
    evaluation.evaluate()
    evaluation.accumulate()
    evaluation.summarize()
    return evaluation.stats[:3].tolist()


@pytest.mark.parametrize("iou_type", ["segm", "bbox"])
@pytest.mark.parametrize("seed", range(3))
def test_average_precision_equals_pycocotools_in_one_go_and_in_batches(iou_type, seed, capsys):
    predictions, references = random_objects(np.random.default_rng(seed), images=12)
    expected = average_precision_by_pycocotools(predictions, references, iou_type)
    assert 0.05 < expected[0] < 0.9
    capsys.readouterr()
    metric = AveragePrecision(iou_type)
    at_once = metric.compute(predictions=predictions, references=references)
    assert list(at_once) == ["ap", "ap50", "ap75"]
    assert list(at_once.values()) == pytest.approx(expected)
    assert capsys.readouterr().out == ""
    for start in range(0, 12, 5):
        batch = slice(start, start + 5)
        metric.add_batch(
            predictions=[{key: torch.as_tensor(value) for key, value in p.items()} for p in predictions[batch]],
            references=references[batch],
        )
    assert metric.compute() == at_once


def test_average_precision_takes_every_kind_of_rle():
    predictions, references = random_objects(np.random.default_rng(0), images=6)
    metric = AveragePrecision()
    expected = metric.compute(predictions=predictions, references=references)

    def with_text(encoded: dict) -> dict:
        return encoded | {"counts": encoded["counts"].decode()}

    def uncompressed(mask) -> dict:
        values = mask.ravel(order="F").tolist()
        counts = [len(list(run)) for _, run in itertools.groupby(values)]
        return {"size": list(mask.shape), "counts": [0, *counts] if values[0] else counts}

    for encode in (rle, lambda mask: with_text(rle(mask)), uncompressed):
        pairs = [
            [side | {"masks": [encode(mask) for mask in side["masks"]]} for side in sides]
            for sides in (predictions, references)
        ]
        assert metric.compute(predictions=pairs[0], references=pairs[1]) == expected


@pytest.mark.parametrize("iou_type", ["segm", "bbox"])
def test_average_precision_of_perfect_empty_and_false_predictions(iou_type):
    _, references = random_objects(np.random.default_rng(1), images=4)
    references = [reference | {"iscrowd": np.zeros(len(reference["labels"]))} for reference in references]
    metric = AveragePrecision(iou_type)
    perfect = [reference | {"scores": np.ones(len(reference["labels"]))} for reference in references]
    assert set(metric.compute(predictions=perfect, references=references).values()) == {1}
    nothing = {"boxes": [], "masks": [], "labels": [], "scores": []}
    assert set(metric.compute(predictions=[nothing] * 4, references=references).values()) == {0}
    shifted = [side | {"labels": side["labels"] + 10} for side in perfect]
    assert set(metric.compute(predictions=shifted, references=references).values()) == {0}
    for predicted in (nothing, perfect[0]):
        assert all(map(math.isnan, metric.compute(predictions=[predicted], references=[nothing]).values()))


# Panoptic quality

VOID = 255


def panoptic_by_sets(predictions, references, things, stuffs) -> dict:
    """Sets of pixels, every pair of them compared; rules of panopticapi's `pq_compute_single_core`."""
    scores = {label: {"iou": 0.0, "tp": 0, "fp": 0, "fn": 0} for label in (*things, *stuffs)}
    for prediction, reference in zip(predictions, references, strict=True):
        segments = []
        for ids in (prediction, reference):
            pixels: dict = {}
            for place in np.ndindex(ids.shape[:2]):
                label, instance = ids[place].tolist()
                pixels.setdefault((label, instance if label in things else 0), set()).add(place)
            segments.append(pixels)
        found, true = segments
        void = true.pop((VOID, 0), set())
        found.pop((VOID, 0), None)
        matched = set()
        for (label, instance), pixels in true.items():
            for other, other_pixels in found.items():
                iou = len(pixels & other_pixels) / len(pixels | (other_pixels - void))
                if other[0] == label and iou > 0.5:
                    scores[label]["iou"] += iou
                    scores[label]["tp"] += 1
                    matched |= {("true", label, instance), ("found", *other)}
        for label, instance in true:
            scores[label]["fn"] += ("true", label, instance) not in matched
        for (label, instance), pixels in found.items():
            if ("found", label, instance) not in matched and len(pixels & void) / len(pixels) <= 0.5:
                scores[label]["fp"] += 1
    rows = []
    for score in scores.values():
        weight = score["tp"] + 0.5 * score["fp"] + 0.5 * score["fn"]
        if weight:
            rows.append((score["iou"] / weight, score["iou"] / max(score["tp"], 1), score["tp"] / weight))
    return dict(zip(("pq", "sq", "rq"), np.mean(rows, axis=0).tolist() if rows else [math.nan] * 3, strict=True))


@st.composite
def panoptic_pairs(draw, labels=(3, 4, 7, VOID)):
    """A reference and a prediction that differs from it in some pixels, so that there is something to match."""

    def ids() -> np.ndarray:
        return np.stack([draw(maps(*labels, shape=(3, 3))), draw(maps(0, 1, shape=(3, 3)))], axis=-1).repeat(2, 0)

    reference, other = ids(), ids()
    keep = draw(arrays(bool, (6, 3), elements=st.sampled_from([True, True, False])))
    return np.where(keep[..., None], reference, other), reference


@quickly
@given(st.lists(panoptic_pairs(), min_size=1, max_size=3))
def test_panoptic_quality_equals_brute_force_in_one_go_and_in_batches(pairs):
    predictions, references = map(list, zip(*pairs, strict=True))
    expected = panoptic_by_sets(predictions, references, things=(3, 4), stuffs=(7,))
    metric = PanopticQuality(things=[3, 4], stuffs=[7])
    assert metric.compute(predictions=predictions, references=references) == pytest.approx(expected, nan_ok=True)
    for prediction, reference in pairs:
        metric.add(prediction=torch.from_numpy(prediction), reference=reference)
    assert metric.compute() == pytest.approx(expected, nan_ok=True)


@settings(max_examples=15, deadline=None)
@given(panoptic_pairs(labels=(3, 4, 7)), arrays(bool, (6, 3)))
def test_panoptic_quality_equals_torchmetrics_where_no_void_is_predicted(pair, unlabelled):
    prediction, reference = pair
    reference = np.where(unlabelled[..., None], VOID, reference)
    theirs = TorchmetricsPanopticQuality(things={3, 4}, stuffs={7}, return_sq_and_rq=True)
    theirs.update(torch.from_numpy(prediction)[None], torch.from_numpy(reference)[None])
    ours = PanopticQuality(things=[3, 4], stuffs=[7]).compute(predictions=[prediction], references=[reference])
    assert list(ours.values()) == pytest.approx(theirs.compute().tolist(), nan_ok=True)


def test_panoptic_quality_of_perfect_void_and_missing_segments():
    reference = np.zeros((10, 10, 2), int)
    reference[:, 5:, 0] = 1
    metric = PanopticQuality(things=[0], stuffs=[1])
    assert metric.compute(predictions=[reference], references=[reference]) == {"pq": 1, "sq": 1, "rq": 1}
    # Most of the thing is left void: a miss, for all that what was found of it is right.
    missing = reference.copy()
    missing[:8, :5] = VOID
    assert metric.compute(predictions=[missing], references=[reference]) == {"pq": 0.5, "sq": 0.5, "rq": 0.5}
    # The same pixels without a label count nowhere.
    assert metric.compute(predictions=[reference], references=[missing]) == {"pq": 1, "sq": 1, "rq": 1}
    void = np.full((10, 10, 2), VOID)
    assert metric.compute(predictions=[void], references=[reference])["pq"] == 0
    assert all(map(math.isnan, metric.compute(predictions=[reference], references=[void]).values()))


# Image quality


def test_image_quality_equals_numpy_and_skimage():
    generator = np.random.default_rng(0)
    originals = list(generator.integers(20, 230, (3, 32, 40, 3), dtype=np.uint8))
    noise = generator.integers(-8, 9, (3, 32, 40, 3))
    noise[1] //= 3
    noise[2] = 0
    protected = [(original + delta).astype(np.uint8) for original, delta in zip(originals, noise, strict=True)]
    psnr = [peak_signal_noise_ratio(*pair) for pair in zip(originals[:2], protected[:2], strict=True)]
    ssim = [
        structural_similarity(
            *pair, channel_axis=2, gaussian_weights=True, sigma=1.5, use_sample_covariance=False, data_range=255
        )
        for pair in zip(originals, protected, strict=True)
    ]
    expected = {"max_noise": np.abs(noise).max(), "psnr": np.mean(psnr), "ssim": np.mean(ssim), "unchanged": 1}
    metric = ImageQuality()
    at_once = metric.compute(predictions=protected, references=originals)
    assert at_once == pytest.approx(expected, abs=1e-4)
    for one, other in zip(protected, originals, strict=True):
        metric.add(prediction=torch.from_numpy(one).permute(2, 0, 1), reference=Image.fromarray(other))
    assert metric.compute() == pytest.approx(at_once)

    same = metric.compute(predictions=originals, references=originals)
    assert same == {"max_noise": 0, "psnr": None, "ssim": pytest.approx(1), "unchanged": 3}
    deep = np.full((16, 16), 1000, np.uint16)
    assert metric.compute(predictions=[deep + 514], references=[deep])["max_noise"] == pytest.approx(2)


# All of them

METRICS = (lambda: SemanticSegmentation(3), BoundaryIoU, AveragePrecision, lambda: PanopticQuality([1], []))


@pytest.mark.parametrize("build", [*METRICS, ImageQuality])
def test_metrics_are_evaluate_metrics_that_write_no_files(build, monkeypatch, tmp_path):
    monkeypatch.setattr(evaluate.config, "HF_METRICS_CACHE", tmp_path / "cache")
    metric = build()
    assert isinstance(metric, evaluate.Metric)
    assert set(metric.features) == {"predictions", "references"}
    assert metric.citation
    assert "Returns from `compute`" in metric.inputs_description
    assert metric.inputs_description in metric.compute.__doc__
    with pytest.raises(ValueError, match="0 images were added; call add_batch first"):
        metric.compute()
    with pytest.raises(ValueError, match="references is None; pass predictions and references"):
        metric.compute(predictions=[1])
    with pytest.raises(ValueError, match="2 predictions and 1 references"):
        metric.add_batch(predictions=[1, 2], references=[1])
    assert not (tmp_path / "cache").exists()


def test_metrics_can_be_combined_and_forget_after_compute():
    combined = evaluate.combine([SemanticSegmentation(2), BoundaryIoU()])
    mask = np.eye(8, dtype=np.uint8)
    combined.add_batch(predictions=[mask], references=[mask])
    assert combined.compute() == {
        "mean_iou": 1,
        "per_class_iou": [1, 1],
        "mean_dice": 1,
        "pixel_accuracy": 1,
        "foreground_iou": 1,
        "boundary_iou": 1,
    }
    metric = BoundaryIoU()
    metric.add(prediction=mask, reference=1 - mask)
    assert len(metric) == 1
    assert "stored examples: 1" in repr(metric)
    assert metric.compute()["boundary_iou"] == 0
    assert len(metric) == 0
    assert metric.compute(predictions=[mask], references=[mask])["boundary_iou"] == 1


def test_a_batch_with_an_error_counts_nothing():
    metric = SemanticSegmentation(2)
    good, bad = np.zeros((2, 2), int), np.full((2, 2), 2)
    with pytest.raises(ValueError, match="image 1 of the batch: the prediction has label 2 with 2 classes"):
        metric.add_batch(predictions=[good, bad], references=[good, good])
    assert len(metric) == 0
    assert metric.compute(predictions=[good], references=[good])["pixel_accuracy"] == 1


ids = np.ones((4, 4, 2), int)
objects = {"masks": np.ones((2, 4, 4), bool), "labels": [1, 2], "scores": [0.5, 0.4]}
picture = np.zeros((20, 20, 3), np.uint8)


@pytest.mark.parametrize(
    ("metric", "prediction", "reference", "message"),
    [
        (METRICS[0], ids[..., 0], np.full((4, 4), 3), r"reference has label 3 with 3 classes.*labels in \[0, 2\]"),
        (METRICS[0], -ids[..., 0], ids[..., 0], "prediction has label -1"),
        (METRICS[0], ids[..., 0] * 0.5, ids[..., 0], r"prediction is float64 \(4, 4\); give integers or booleans"),
        (METRICS[0], ids[0], ids[..., 0], r"\(4, 2\), the reference \(4, 4\); resize the prediction"),
        (BoundaryIoU, ids[..., 0] * 255, ids[..., 0], "prediction has value 255; give a mask of booleans"),
        (BoundaryIoU, ids, ids, r"give integers or booleans of shape \(height, width\)"),
        (METRICS[3], ids[..., :1], ids[..., :1], r"prediction is \(4, 4, 1\); give \(height, width, 2\)"),
        (METRICS[3], ids * 9, ids, r"class id 9, which is none of things \[1\] and stuffs \[\]"),
        (AveragePrecision, {"masks": []}, objects, "prediction has no 'labels'; pass a dict with masks, labels, sc"),
        (AveragePrecision, ids, objects, "prediction has no 'masks'; pass a dict"),
        (AveragePrecision, objects | {"scores": [1]}, objects, r"2 masks and scores of shape \(1,\); give one for"),
        (AveragePrecision, objects | {"scores": [1, math.nan]}, objects, "give finite numbers"),
        (AveragePrecision, objects | {"labels": [1.5, 2]}, objects, "labels are float64; give integers"),
        (AveragePrecision, objects | {"masks": np.ones((2, 5, 4), bool)}, objects, r"\[\(4, 4\), \(5, 4\)\] in one"),
        (AveragePrecision, objects | {"masks": np.full((2, 4, 4), 0.5)}, objects, "masks are float64"),
        (AveragePrecision, objects | {"masks": [{"size": [4, 4]}] * 2}, objects, "give COCO RLE"),
        (
            AveragePrecision,
            objects,
            objects | {"masks": np.zeros((2, 4, 4), bool)},
            "object 0 of the reference has no",
        ),
        (lambda: AveragePrecision("bbox"), objects | {"boxes": [[4, 0, 1, 1]] * 2}, objects, "x0 <= x1 and y0 <= y1"),
        (lambda: AveragePrecision("bbox"), objects | {"boxes": [[0, 1]] * 2}, objects, r"shape \(2, 2\); give \(obj"),
        (ImageQuality, picture[:9], picture, r"uint8 \(9, 20, 3\), the original uint8 \(20, 20, 3\); pass two images"),
        (ImageQuality, picture.astype(int), picture, "image 0 of the batch"),
    ],
)
def test_metrics_refuse_what_does_not_fit(metric, prediction, reference, message):
    with pytest.raises(ValueError, match=message):
        metric().add(prediction=prediction, reference=reference)


def test_metrics_refuse_settings_that_make_no_sense(monkeypatch):
    for build, message in (
        (lambda: SemanticSegmentation(0), "num_classes is 0; give at least 1"),
        (lambda: SemanticSegmentation(300), "ignore_index 255 is one of the 300 classes; choose a label outside"),
        (lambda: BoundaryIoU(0), "dilation_ratio is 0"),
        (lambda: AveragePrecision("mask"), "iou_type is 'mask'; use one of segm, bbox"),
        (lambda: PanopticQuality([], []), "there is no class"),
        (lambda: PanopticQuality([1], [1]), "id 1 stands in two of them"),
        (lambda: PanopticQuality([1], [2], void=2), "id 2 stands in two of them"),
    ):
        with pytest.raises(ValueError, match=message):
            build()
    monkeypatch.setitem(sys.modules, "faster_coco_eval", None)
    with pytest.raises(ImportError, match=r"pip install 'unseg-hf\[audit\]'"):
        AveragePrecision()
