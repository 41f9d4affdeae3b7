"""Training a victim, as somebody does who has the published images and correct labels."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch

from unseg_hf.evaluation.augmentation import adversarial, plain_augmentation, strong_augmentation
from unseg_hf.evaluation.victims.base import Batch, Victim

TRAININGS = ("plain", "strong", "adversarial")
"""How victims are trained: with flips alone; strongly augmented; on adversarial examples of flipped images."""

STRONG_EPOCHS = 1.6
"""Strongly augmented victims are trained for so many times the epochs, as they see every image less alike."""


@dataclass(frozen=True)
class TrainingData:
    """What a victim learns from.

    Args:
        images: `(count, 3, size, size)` uint8 in [0, 255].
        labels: `(count, size, size)` uint8, class ids, or 255 for pixels to ignore.
        instances: `(count, size, size)` int32, number of the object, 0 for none; None without objects.

    Raises:
        ValueError: the shapes do not fit.
    """

    images: np.ndarray
    labels: np.ndarray
    instances: np.ndarray | None = None

    def __post_init__(self) -> None:
        if self.images.ndim != 4 or self.images.dtype != np.uint8:
            raise ValueError(f"images are {self.images.dtype} {self.images.shape}; pass uint8 (count, 3, size, size)")
        for name, maps in (("labels", self.labels), ("instances", self.instances)):
            if maps is not None and maps.shape != (len(self.images), *self.images.shape[2:]):
                raise ValueError(
                    f"{name} are {maps.shape}; pass {(len(self.images), *self.images.shape[2:])}, one map an image"
                )

    def batch(self, indices: np.ndarray, device: torch.device) -> Batch:
        """Some of the images on a device."""
        instances = None if self.instances is None else torch.from_numpy(self.instances[indices]).long()
        labels = torch.from_numpy(self.labels[indices]).long()
        return Batch(torch.from_numpy(self.images[indices]).float() / 255, labels, instances).to(device)


def steps_an_epoch(images: int, batch_size: int) -> int:
    """Batches in a pass over so many images."""
    # Batch norm cannot train on one image whose deepest features are one pixel.
    lone = images > 1 and images % batch_size == 1
    return images // batch_size + (not lone and images % batch_size > 0)


def train_victim(
    build: Callable[[], Victim],
    data: TrainingData,
    *,
    epochs: int,
    batch_size: int,
    seed: int,
    lr: float | None = None,
    training: str = "plain",
    device: str | torch.device = "cpu",
    bf16: bool = False,
) -> Victim:
    """Train a victim: AdamW, cosine decay to zero, its own loss.

    The same seed gives the same weights, bit by bit, on a CPU with the same number of threads. The global random
    number generators are left as they were found.

    Args:
        build: makes the victim, drawing initial weights from torch's global generator.
        data: what it learns from.
        epochs: passes over the images; [`STRONG_EPOCHS`] times as many for "strong".
        batch_size: images a step; the last batch of an epoch may be smaller, and is left out if it is one image alone.
        lr: highest learning rate; None: the victim's own.
        seed: seed of the initial weights, the order of the images and all that is random in training.
        training: one of [`TRAININGS`].
        device: where to train.
        bf16: run the forward pass in bfloat16 autocast.

    Returns:
        The trained model, on `device`, in evaluation mode.

    Raises:
        ValueError: an unknown `training`, or images of a size that the victim cannot take.
        FloatingPointError: the loss is not finite.
    """
    if training not in TRAININGS:
        raise ValueError(f"training is {training!r}; use one of {', '.join(TRAININGS)}")
    device = torch.device(device)
    accelerators = [] if device.type == "cpu" else [device]
    epochs = round(epochs * STRONG_EPOCHS) if training == "strong" else epochs
    with torch.random.fork_rng(devices=accelerators, device_type=device.type if accelerators else "cuda"):
        torch.manual_seed(seed)
        victim = build()
        if data.images.shape[2] % victim.size_multiple:
            raise ValueError(
                f"images are {data.images.shape[2]} pixels wide; resize them to a multiple of {victim.size_multiple}"
            )
        victim = victim.to(device).train()
        trained = [parameter for parameter in victim.parameters() if parameter.requires_grad]
        optimizer = torch.optim.AdamW(trained, lr=victim.lr if lr is None else lr, weight_decay=victim.weight_decay)
        order = np.random.default_rng(seed)
        steps = steps_an_epoch(len(data.images), batch_size)
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=epochs * steps)
        for _ in range(epochs):
            shuffled = order.permutation(len(data.images))
            for step in range(steps):
                batch = data.batch(shuffled[step * batch_size : (step + 1) * batch_size], device)
                batch = strong_augmentation(batch) if training == "strong" else plain_augmentation(batch)
                if training == "adversarial":
                    batch = adversarial(victim, batch)
                with torch.autocast(device.type, dtype=torch.bfloat16, enabled=bf16):
                    loss = victim.loss(batch)
                if not torch.isfinite(loss):
                    highest = optimizer.param_groups[0]["initial_lr"]
                    raise FloatingPointError(f"the victim's loss is {loss.item()}; use a lower rate than {highest}")
                optimizer.zero_grad()
                loss.backward()
                if victim.max_grad_norm is not None:
                    torch.nn.utils.clip_grad_norm_(trained, victim.max_grad_norm)
                optimizer.step()
                schedule.step()
    return victim.eval()
