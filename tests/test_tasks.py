"""Scores of the tasks, worked out by hand on victims whose predictions are given."""

import numpy as np
import pytest
import torch

from unseg_hf.evaluation.tasks import evaluate_victim, score_name, trivial_score
from unseg_hf.evaluation.victims.base import Victim

SIZE = 32


class Given(Victim):
    """Predicts what it was given, image after image, and counts its batches."""

    def __init__(self, task, predictions):
        super().__init__()
        self.task, self.predictions, self.batches = task, list(predictions), 0
        self.weight = torch.nn.Parameter(torch.zeros(1))

    def predict(self, batch):
        assert not self.training
        assert not torch.is_grad_enabled()
        assert 0 <= batch.images.min() <= batch.images.max() <= 1
        self.batches += 1
        return [self.predictions.pop(0) for _ in batch.images]


def square(rows, columns):
    mask = torch.zeros(SIZE, SIZE, dtype=torch.bool)
    mask[slice(*rows), slice(*columns)] = True
    return mask


LEFT, RIGHT = square((4, 12), (4, 12)), square((4, 12), (20, 28))
LABELS = (LEFT | RIGHT).byte().numpy()[None]
INSTANCES = (LEFT.int() + 2 * RIGHT.int()).numpy()[None]


def evaluate(task, prediction, labels=LABELS, instances=INSTANCES, num_classes=2, things=(1,)):
    images = np.full((len(labels), 3, SIZE, SIZE), 200, dtype=np.uint8)
    predictions = prediction if isinstance(prediction, list) else [prediction]
    return evaluate_victim(Given(task, predictions), images, labels, instances, num_classes, things)


def objects(*masks):
    return {"masks": torch.stack(masks), "labels": torch.ones(len(masks)).long(), "scores": torch.ones(len(masks))}


@pytest.mark.parametrize(
    ("task", "num_classes", "name"),
    [
        ("semantic", 2, "foreground_iou"),
        ("semantic", 11, "mean_iou"),
        ("instance", 2, "ap"),
        ("detection", 2, "ap"),
        ("panoptic", 11, "pq"),
        ("interactive", 2, "object_iou"),
    ],
)
def test_every_task_is_scored_by_a_figure_that_its_evaluation_has(task, num_classes, name):
    prediction = {
        "semantic": torch.from_numpy(LABELS[0]).long(),
        "instance": objects(LEFT, RIGHT),
        "detection": objects(LEFT, RIGHT) | {"boxes": torch.tensor([[4, 4, 12, 12], [20, 4, 28, 12]])},
        "panoptic": torch.from_numpy(np.stack([LABELS[0], INSTANCES[0]], -1)).long(),
        "interactive": torch.stack([LEFT, RIGHT]),
    }[task]
    assert score_name(task, num_classes) == name
    assert evaluate(task, prediction, num_classes=num_classes)[name] == pytest.approx(1)


def test_an_unknown_task_is_refused():
    with pytest.raises(ValueError, match="'depth'; use one of semantic"):
        score_name("depth", 2)


def test_the_batch_size_and_the_mode_of_the_victim_change_nothing():
    labels = np.concatenate([LABELS] * 5)
    victim = Given("semantic", [torch.from_numpy(LABELS[0]).long()] * 5).train()
    images = np.zeros((5, 3, SIZE, SIZE), dtype=np.uint8)
    result = evaluate_victim(victim, images, labels, None, 2, (), batch_size=2)
    assert result["foreground_iou"] == 1
    assert victim.batches == 3
    assert victim.training


def test_unlabelled_pixels_count_for_average_precision_alone():
    labels = LABELS.copy()
    labels[0, 16:] = 255
    wrong_below = torch.from_numpy(LABELS[0]).long().clone()
    wrong_below[16:] = 1
    semantic = evaluate("semantic", wrong_below, labels)
    assert semantic["foreground_iou"] == semantic["boundary_iou"] == 1
    below = square((16, SIZE), (0, SIZE))
    assert evaluate("interactive", torch.stack([LEFT | below, RIGHT]), labels)["object_iou"] == 1
    panoptic = torch.from_numpy(np.stack([wrong_below.numpy(), INSTANCES[0] + 3 * below.numpy()], -1)).long()
    assert evaluate("panoptic", panoptic, labels)["pq"] == pytest.approx(1)
    surest = {"scores": torch.tensor([0.9, 0.8, 0.7])}
    assert evaluate("instance", objects(below, LEFT, RIGHT) | surest, labels)["ap"] < 0.8


def test_classes_that_do_not_occur_have_no_iou():
    result = evaluate("semantic", torch.from_numpy(LABELS[0]).long(), num_classes=3)
    assert result["per_class_iou"] == [1, 1, None]
    assert "boundary_iou" not in result


def test_ap_counts_objects_and_not_their_pixels():
    merged = evaluate("instance", objects(LEFT | RIGHT))
    assert merged["ap75"] == 0
    half = evaluate("instance", objects(LEFT))
    assert half["ap50"] == pytest.approx(0.5, abs=0.01)
    assert half["box_ap50"] == pytest.approx(0.5, abs=0.01)


def test_what_is_found_on_a_crowd_is_no_error():
    instances = np.where(INSTANCES == 1, 1, 0)
    # RIGHT has the class of an object, but is none.
    prediction = objects(RIGHT, LEFT) | {"scores": torch.tensor([0.9, 0.8])}
    assert evaluate("instance", prediction, instances=instances)["ap"] == pytest.approx(1)
    panoptic = torch.from_numpy(np.stack([LABELS[0], INSTANCES[0]], -1)).long()
    assert evaluate("panoptic", panoptic, instances=instances)["pq"] == pytest.approx(1)


def test_object_iou_is_the_mean_over_objects():
    assert evaluate("interactive", torch.stack([LEFT, LEFT]))["object_iou"] == pytest.approx(0.5)


def test_without_instances_the_foreground_is_the_object():
    result = evaluate("interactive", (LEFT | RIGHT)[None], instances=None)
    assert result["object_iou"] == 1


def test_trivial_scores_are_those_of_the_models_they_describe():
    everything = torch.ones(SIZE, SIZE, dtype=torch.int64)
    assert trivial_score("semantic", LABELS, 2) == pytest.approx(evaluate("semantic", everything)["foreground_iou"])
    background = evaluate("semantic", everything * 0, num_classes=3)["mean_iou"]
    assert trivial_score("semantic", LABELS, 3) == pytest.approx(background)
    box = square((4, 12), (4, 28))
    filled = evaluate("interactive", box[None], instances=None)["object_iou"]
    assert trivial_score("interactive", LABELS, 2) == pytest.approx(filled) == pytest.approx(2 / 3)
    assert trivial_score("interactive", LABELS, 2, INSTANCES) == 1
    for task in ("instance", "detection", "panoptic"):
        assert trivial_score(task, LABELS, 2) == 0


@pytest.mark.parametrize("task", ["instance", "detection", "interactive"])
def test_a_test_set_without_objects_is_refused(task):
    with pytest.raises(ValueError, match="no test image has an object"):
        evaluate(task, None, instances=np.zeros_like(INSTANCES))


def test_a_test_set_with_nothing_to_score_is_refused():
    with pytest.raises(ValueError, match=r"foreground pixel \(label 1\)"):
        evaluate("semantic", None, labels=np.zeros_like(LABELS))
    with pytest.raises(ValueError, match=r"foreground pixel \(label 1\)"):
        trivial_score("interactive", np.zeros_like(LABELS), 2)
    with pytest.raises(ValueError, match="no test pixel has a class"):
        evaluate("panoptic", None, labels=np.full_like(LABELS, 255))
    with pytest.raises(ValueError, match="instances is None, but instance is scored by objects"):
        evaluate("instance", None, instances=None)


def test_a_crowd_may_be_found_or_not():
    instances = np.where(INSTANCES == 1, 1, 0)  # RIGHT has the class of an object, but is none
    for found in (LABELS[0], LABELS[0] * LEFT.numpy(), np.where(INSTANCES[0] == 2, 255, LABELS[0])):
        panoptic = torch.from_numpy(np.stack([found, INSTANCES[0]], -1)).long()
        pq = evaluate("panoptic", panoptic, instances=instances)["pq"]
        assert pq == pytest.approx(1)


def test_the_trivial_score_leaves_unlabelled_pixels_out():
    labels = LABELS.copy()
    labels[0, 4:8, 12:28] = 255  # between the two, and a part of the right one
    filled = evaluate("interactive", square((4, 12), (4, 28))[None], labels, instances=None)["object_iou"]
    assert trivial_score("interactive", labels, 2) == pytest.approx(filled)


def test_unlabelled_pixels_of_an_object_do_not_count():
    labels = LABELS.copy()
    labels[0, 4:8] = 255
    below = square((8, 12), (0, SIZE))
    assert evaluate("interactive", torch.stack([LEFT & below, RIGHT & below]), labels)["object_iou"] == 1
