import numpy as np
import pytest
import torch
from labelled_discs import discs
from torch import nn

from unseg_hf.evaluation.victims.base import Batch, Victim, boxes_of, objects_of, segments_of
from unseg_hf.evaluation.victims.training import STRONG_EPOCHS, TRAININGS, TrainingData, train_victim


class Pixelwise(Victim):
    """Tells reddish pixels from bluish ones, and counts what it is shown."""

    task, size_multiple, lr = "semantic", 4, 0.5

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Conv2d(3, 2, 1)
        self.batches: list[Batch] = []

    def loss(self, batch: Batch) -> torch.Tensor:
        self.batches.append(batch)
        return nn.functional.cross_entropy(self.layer(batch.images * 2 - 1), batch.labels, ignore_index=255)

    def predict(self, batch: Batch) -> torch.Tensor:
        return self.layer(batch.images * 2 - 1).argmax(1)


def data(count: int = 9, instances: bool = False) -> TrainingData:
    images, numbers = discs(count, 32, 40, seed=0)
    images, numbers = images[:, :, :32].transpose(0, 3, 1, 2), numbers[:, :, :32]
    return TrainingData(images, (numbers > 0).astype(np.uint8), numbers.astype(np.int32) if instances else None)


SETTINGS = {"epochs": 4, "batch_size": 3, "seed": 0}


@pytest.mark.parametrize("training", TRAININGS)
def test_a_victim_learns_and_repeats_itself_without_touching_the_global_rng(training: str):
    torch.manual_seed(123)
    state = torch.get_rng_state()
    first = train_victim(Pixelwise, data(), training=training, **SETTINGS)
    assert torch.equal(torch.get_rng_state(), state)
    torch.manual_seed(456)
    again = train_victim(Pixelwise, data(), training=training, **SETTINGS)
    assert torch.equal(first.layer.weight, again.layer.weight)
    other = train_victim(Pixelwise, data(), training=training, **SETTINGS | {"seed": 1})
    assert not torch.equal(first.layer.weight, other.layer.weight)

    assert not first.training
    batch = data().batch(np.arange(9), torch.device("cpu"))
    assert (first.predict(batch) == batch.labels).float().mean() > 0.9
    epochs = 4 if training != "strong" else round(4 * STRONG_EPOCHS)
    # The adversary looks at each batch once more.
    assert len(first.batches) == epochs * 3 * (2 if training == "adversarial" else 1)


def test_every_image_is_seen_once_an_epoch_flipped_or_not_with_its_annotations():
    images = np.zeros((7, 3, 8, 8), np.uint8)
    images[:, 0] = np.arange(7)[:, None, None] * 10
    images[:, 1] = np.arange(8) * 20
    instances = np.broadcast_to(np.arange(8, dtype=np.int32), (7, 8, 8)).copy()
    seen = train_victim(Pixelwise, TrainingData(images, instances.astype(np.uint8) % 2, instances), **SETTINGS).batches
    for epoch in range(4):
        batches = seen[epoch * 2 : epoch * 2 + 2]  # 7 = 3 + 3 + 1, and one image alone is left out
        numbers = torch.cat([batch.images[:, 0, 0, 0] for batch in batches]) * 25.5
        assert len(set(numbers.round().int().tolist())) == 6
    columns = torch.cat([batch.images[:, 1, 0] for batch in seen]) * 12.75
    assert torch.equal(columns.round().long(), torch.cat([batch.instances[:, 0] for batch in seen]))
    assert torch.equal(torch.cat([batch.labels for batch in seen]), torch.cat([batch.instances for batch in seen]) % 2)
    flipped = columns[:, 0] > columns[:, -1]
    assert 0 < flipped.sum() < len(flipped)


def test_the_learning_rate_is_the_victims_own_unless_given():
    weights = [train_victim(Pixelwise, data(), **SETTINGS, lr=lr).layer.weight for lr in (None, Pixelwise.lr, 1e-4)]
    assert torch.equal(weights[0], weights[1])
    assert not torch.equal(weights[0], weights[2])


@pytest.mark.parametrize("bf16", [False, True])
def test_the_recipe_is_adamw_with_cosine_decay_clipped_gradients_and_autocast_on_request(monkeypatch, bf16):
    class Recorded(torch.optim.AdamW):
        def step(self):
            (group,) = self.param_groups
            gradients = [parameter.grad.flatten() for parameter in group["params"]]
            steps.append((group["lr"], group["weight_decay"], torch.cat(gradients).norm().item()))
            super().step()

    class Loud(Pixelwise):
        weight_decay, max_grad_norm = 0.125, 0.01

        def loss(self, batch: Batch) -> torch.Tensor:
            autocasts.append(torch.is_autocast_enabled("cpu"))
            return 100 * super().loss(batch)

    steps, autocasts = [], []
    monkeypatch.setattr(torch.optim, "AdamW", Recorded)
    victim = train_victim(Loud, data(), bf16=bf16, **SETTINGS)
    rates, decays, norms = zip(*steps, strict=True)
    assert rates == pytest.approx([0.25 * (1 + np.cos(np.pi * step / 12)) for step in range(12)])
    assert set(decays) == {0.125}
    assert norms == pytest.approx([0.01] * 12, rel=1e-3)
    assert autocasts == [bf16] * 12
    assert victim.layer.weight.dtype == torch.float32


def test_strong_training_takes_more_epochs():
    assert STRONG_EPOCHS == 1.6  # what is said of it in the documents


def test_what_does_not_fit_is_refused():
    good = data(2)
    with pytest.raises(ValueError, match="images are float32"):
        TrainingData(good.images.astype(np.float32), good.labels)
    with pytest.raises(ValueError, match=r"labels are \(1, 32, 32\); pass \(2, 32, 32\), one map an image"):
        TrainingData(good.images, good.labels[:1])
    with pytest.raises(ValueError, match="training is 'hard'; use one of plain, strong, adversarial"):
        train_victim(Pixelwise, good, training="hard", **SETTINGS)
    odd = TrainingData(good.images[..., :30, :30], good.labels[:, :30, :30])
    with pytest.raises(ValueError, match="images are 30 pixels wide; resize them to a multiple of 4"):
        train_victim(Pixelwise, odd, **SETTINGS)


def test_a_loss_that_is_not_finite_stops_the_training():
    class Diverging(Pixelwise):
        def loss(self, batch: Batch) -> torch.Tensor:
            return super().loss(batch) * (float("nan") if len(self.batches) == 3 else 1)

    with pytest.raises(FloatingPointError, match=r"the victim's loss is nan; use a lower rate than 0\.5"):
        train_victim(Diverging, data(), **SETTINGS)


def test_objects_segments_and_boxes():
    labels = torch.tensor([[0, 0, 1, 1], [0, 2, 2, 1], [255, 2, 2, 255]])
    instances = torch.tensor([[0, 0, 1, 1], [0, 4, 4, 1], [7, 4, 4, 0]])
    objects = objects_of(labels, instances)
    assert objects.classes.tolist() == [1, 2]  # the object 7 has no class
    assert boxes_of(objects.masks).tolist() == [[2, 0, 4, 2], [1, 1, 3, 3]]
    segments = segments_of(labels, instances)
    assert segments.classes.tolist() == [1, 2, 0]
    assert segments.is_thing.tolist() == [True, True, False]
    assert torch.equal(segments.masks[2], labels == 0)

    nothing = objects_of(labels, torch.zeros_like(instances))
    assert nothing.masks.shape == (0, 3, 4)
    assert boxes_of(nothing.masks).shape == (0, 4)
    assert segments_of(labels, torch.zeros_like(instances)).classes.tolist() == [0, 1, 2]
    assert not segments_of(torch.full((3, 4), 255), torch.zeros_like(instances)).masks.any()


def test_the_seed_decides_the_order_of_the_images():
    images = np.zeros((8, 3, 8, 8), np.uint8) + (np.arange(8, dtype=np.uint8) * 10)[:, None, None, None]
    data = TrainingData(images, np.zeros((8, 8, 8), np.uint8))
    orders = []
    for seed in (0, 1):
        batches = train_victim(Pixelwise, data, **SETTINGS | {"seed": seed, "batch_size": 4}).batches
        orders.append(torch.cat([batch.images[:, 0, 0, 0] for batch in batches]))
    assert not torch.equal(*orders)
