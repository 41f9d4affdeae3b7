import colorsys

import kornia
import torch
from torch import nn

from unseg_hf.evaluation import augmentation
from unseg_hf.evaluation.augmentation import adversarial, plain_augmentation, strong_augmentation
from unseg_hf.evaluation.victims.base import Batch, Victim


def batch(count: int = 16, size: int = 48) -> Batch:
    """Images of which a disc off the middle is white, with labels and instances that follow."""
    rows, columns = torch.meshgrid(torch.arange(size), torch.arange(size), indexing="ij")
    disc = ((rows - 18) ** 2 + (columns - 28) ** 2 < 64).long().repeat(count, 1, 1)
    instances = disc * torch.arange(1, count + 1).view(-1, 1, 1) * 1000
    colour = torch.tensor([0.5, 0.3, 0.45]).view(3, 1, 1)
    return Batch(0.3 + colour * disc[:, None].float(), disc, instances)


def test_flips_take_the_annotations_along():
    torch.manual_seed(0)
    before = batch()
    after = plain_augmentation(before)
    assert torch.equal(after.images[:, 0] > 0.5, after.labels == 1)
    assert torch.equal(after.instances, after.labels * torch.arange(1, 17).view(-1, 1, 1) * 1000)
    flipped = (after.labels != before.labels).flatten(1).any(1)
    assert 0 < flipped.sum() < 16
    assert torch.equal(after.labels[flipped], before.labels[flipped].flip(-1))
    assert plain_augmentation(Batch(before.images, before.labels)).instances is None


def test_strong_augmentation_keeps_images_and_annotations_aligned():
    torch.manual_seed(0)
    before = batch(64)
    after = strong_augmentation(before)
    assert after.images.min() >= 0
    assert after.images.max() <= 1
    counted = after.labels != 255
    assert torch.equal(after.instances > 0, after.labels == 1)
    for image, labels, inside, instances in zip(after.images, after.labels, counted, after.instances, strict=True):
        assert set(labels.unique().tolist()) <= {0, 1, 255}
        assert len(instances.unique()) == 2
        brightness = image.mean(0)
        bright = brightness > (brightness[labels == 1].mean() + brightness[labels == 0].mean()) / 2
        # Blur and interpolation move the edge by a pixel or two.
        union = (bright & inside) | (labels == 1)
        assert ((bright & (labels == 1)).sum() / union.sum()) > 0.7


def test_strong_augmentation_differs_from_image_to_image_and_repeats_with_the_seed():
    torch.manual_seed(0)
    after = strong_augmentation(batch(64))
    torch.manual_seed(0)
    assert torch.equal(strong_augmentation(batch(64)).images, after.images)
    areas = (after.labels == 1).flatten(1).sum(1) / (batch(1).labels == 1).sum()
    assert areas.min() < 0.6  # 0.6 ** 2 = 0.36 at the smallest scale
    assert areas.max() > 1.8  # 1.6 ** 2 = 2.56 at the largest
    assert areas.min() > 0.3
    assert areas.max() < 2.7
    centres = torch.stack([(labels == 1).nonzero().float().mean(0) for labels in after.labels])
    assert centres.std(0).min() > 2
    assert 0 < (after.images.std(1).flatten(1).amax(1) < 1e-6).sum() < 64


def test_strong_augmentation_turns_hues_and_blurs_half_of_the_images(monkeypatch):
    torch.manual_seed(0)
    sigmas, blur = [], kornia.filters.gaussian_blur2d
    monkeypatch.setattr(kornia.filters, "gaussian_blur2d", lambda x, size, s: sigmas.append(s) or blur(x, size, s))
    colour = torch.tensor([0.4, 0.2, 0.25]).view(3, 1, 1)  # which nothing clips
    labels = torch.zeros(64, 16, 16, dtype=torch.long)
    after = strong_augmentation(Batch(colour.expand(64, 3, 16, 16).clone(), labels)).images[:, :, 8, 8]
    hues = torch.tensor([colorsys.rgb_to_hsv(*pixel)[0] for pixel in after[after.std(1) > 1e-3].tolist()])
    turns = (hues - colorsys.rgb_to_hsv(*colour.flatten().tolist())[0] + 0.5) % 1 - 0.5
    assert turns.abs().max() < 0.101
    assert turns.min() < -0.07
    assert turns.max() > 0.07
    (sigma,) = sigmas
    assert 20 < len(sigma) < 44
    assert 0.1 <= sigma.min() < 0.4
    assert 1.7 < sigma.max() <= 2


def test_strong_augmentation_changes_brightness_and_contrast():
    torch.manual_seed(0)
    tones = torch.full((200, 3, 16, 16), 0.3)
    tones[:, :, :, 8:] = 0.4
    images = strong_augmentation(Batch(tones, torch.zeros(200, 16, 16, dtype=torch.long))).images
    middle = images[:, 0, 5:11, 5:11].flatten(1)
    dark, bright = middle.amin(1), middle.amax(1)
    # Brightness alone, or twice, would leave the ratio as it was.
    ratios = (bright / dark)[bright - dark > 0.02]
    assert ratios.min() < 1.25
    assert ratios.max() > 1.45
    assert middle.mean(1).min() < 0.25
    assert middle.mean(1).max() > 0.42


class Linear(Victim):
    task = "semantic"

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Conv2d(3, 2, 1)

    def loss(self, batch: Batch) -> torch.Tensor:
        return nn.functional.cross_entropy(self.layer(batch.images), batch.labels)


def test_adversarial_images_raise_the_loss_within_the_radius_and_leave_no_gradients():
    torch.manual_seed(0)
    victim, before = Linear(), batch(4)
    after = adversarial(victim, before, radius=8 / 255)
    difference = (after.images - before.images).abs()
    assert difference.max() <= 8 / 255 + 1e-6
    assert after.images.min() >= 0
    assert after.images.max() <= 1
    assert victim.loss(after) > victim.loss(before) + 0.01
    assert all(parameter.grad is None for parameter in victim.parameters())
    assert not after.images.requires_grad
    assert torch.equal(after.labels, before.labels)


def test_grey_is_luma(monkeypatch):
    for name, value in (("JITTER", 0), ("HUE", 0), ("BLUR_PROBABILITY", 0), ("GREY_PROBABILITY", 1)):
        monkeypatch.setattr(augmentation, name, value)
    colour = torch.tensor([0.4, 0.2, 0.25]).view(3, 1, 1)
    labels = torch.zeros(4, 16, 16, dtype=torch.long)
    after = strong_augmentation(Batch(colour.expand(4, 3, 16, 16).clone(), labels)).images[:, :, 8, 8]
    luma = 0.299 * 0.4 + 0.587 * 0.2 + 0.114 * 0.25
    torch.testing.assert_close(after, torch.full((4, 3), luma))
