"""Losses and prompts, each against an independent computation or a property that must hold."""

import numpy as np
import pytest
import torch
from scipy.ndimage import map_coordinates

from unseg_hf.training import losses
from unseg_hf.training.losses import interactive_loss, point_loss, sample_at, uncertain_points
from unseg_hf.training.prompts import boxes_around, choose_kinds, make_prompts, points_in


def rng(seed=0):
    return torch.Generator().manual_seed(seed)


def disc(size=64, x=40, y=24, radius=12):
    grid = np.mgrid[:size, :size]
    return ((grid[0] - y) ** 2 + (grid[1] - x) ** 2 < radius**2).astype(np.uint8)


class TestLosses:
    def test_samples_equal_scipys_bilinear_interpolation(self):
        values = torch.randn(3, 9, 13, generator=rng())
        points = torch.rand(3, 50, 2, generator=rng(1)) * 0.8 + 0.1
        for i in range(3):
            # Pixel centres lie at (index + 0.5) / size.
            at = [points[i, :, 1] * 9 - 0.5, points[i, :, 0] * 13 - 0.5]
            expected = map_coordinates(values[i].numpy(), [a.numpy() for a in at], order=1)
            np.testing.assert_allclose(sample_at(values, points)[i], expected, atol=1e-5)

    def test_most_points_lie_where_the_logits_are_small(self):
        logits = torch.full((2, 32, 32), 8.0)
        logits[:, :, 14:18] = 0.1
        points = uncertain_points(logits, 400, rng())
        assert points.shape == (2, 400, 2)
        in_band = (points[..., 0] > 13 / 32) & (points[..., 0] < 19 / 32)
        # A fifth of all candidates lies in the band; three quarters of the points are picked from there first.
        assert (in_band[:, :300].float().mean(1) > 0.55).all()
        assert (in_band[:, 300:].float().mean(1) < 0.35).all()

    def test_loss_of_constant_predictions_is_what_pencil_and_paper_say(self):
        logits = torch.tensor([-1.5, 2.0])[:, None, None].expand(2, 16, 16)
        targets = torch.stack([torch.ones(16, 16), torch.zeros(16, 16)])
        p = 1 / (1 + np.exp([1.5, -2.0]))
        count = 200
        bce = -np.log([p[0], 1 - p[1]])
        dice = 1 - (2 * count * p * [1, 0] + 1) / (count * p + count * np.array([1, 0]) + 1)
        np.testing.assert_allclose(point_loss(logits, targets, rng(), count), bce + dice, rtol=1e-5)

    def test_loss_over_many_points_equals_the_dense_loss(self):
        targets = torch.from_numpy(disc()).float()[None]
        logits = torch.nn.functional.avg_pool2d(targets * 6 - 3, 5, 1, 2) + 0.3
        probability = logits.sigmoid()
        bce = torch.nn.functional.binary_cross_entropy(probability, targets)
        dice = 1 - 2 * (probability * targets).sum() / (probability.sum() + targets.sum())
        # Uniform points (no importance) estimate the integral.
        points = torch.rand(1, 200_000, 2, generator=rng())
        sampled = losses.sample_at(probability, points), losses.sample_at(targets, points)
        assert losses.dice_loss(*sampled).item() == pytest.approx(dice.item(), abs=0.02)
        assert point_loss(logits, targets, rng(), 5000).item() > (bce + dice).item()  # boundary points are harder

    def test_gradients_reach_the_logits(self):
        logits = torch.zeros(1, 16, 16, requires_grad=True)
        point_loss(logits, torch.ones(1, 16, 16), rng(), 256).sum().backward()
        assert (logits.grad <= 0).all()
        assert (logits.grad < 0).float().mean() > 0.5

    def test_interactive_loss_takes_the_best_mask_and_the_iou_error(self):
        target = torch.from_numpy(disc()).float()[None]
        good, bad = target * 40 - 20, 20 - target * 40
        true_ious = torch.tensor([[1.0, 0.0]])
        both = torch.stack([good, bad], dim=1)
        right = interactive_loss(both, true_ious, target, rng(), 500).item()
        assert right < 0.2  # not 0: on the boundary itself a label between 0 and 1 meets a certain prediction
        wrong = interactive_loss(both, 1 - true_ious, target, rng(), 500).item()
        assert wrong == pytest.approx(right + 1, abs=0.02)


class TestPrompts:
    def test_boxes_hold_the_mask_exactly(self):
        masks = torch.zeros(2, 20, 30)
        masks[0, 3:7, 10:21] = 1
        masks[1, 19, 29] = 1
        assert boxes_around(masks).tolist() == [[10, 3, 20, 6], [29, 19, 29, 19]]

    def test_points_lie_in_the_mask(self):
        masks = torch.from_numpy(np.stack([disc(), disc(x=10, y=50, radius=4)])).float()
        points = points_in(masks, 40, rng()).long()
        for mask, drawn in zip(masks, points, strict=True):
            assert (mask[drawn[:, 1], drawn[:, 0]] == 1).all()
            assert len({tuple(p) for p in drawn.tolist()}) > 10

    def test_noisy_masks_change_the_boundary_alone(self):
        masks = torch.from_numpy(disc(128, 64, 64, 40)).float()[None]
        noisy = make_prompts(masks, ("mask",), rng())["input_masks"][0, 0]
        small = torch.nn.functional.avg_pool2d(masks, 4)[0]
        assert noisy.shape == (32, 32)
        assert ((noisy >= 0) & (noisy <= 1)).all()
        assert noisy[16, 16] == 1
        assert noisy[0, 0] == 0
        assert 0.05 < (noisy != small).float().mean() < 0.5

    def test_every_subset_of_kinds_is_drawn_and_never_none(self):
        source = rng()
        drawn = {choose_kinds(("box", "points", "mask"), several=True, generator=source) for _ in range(200)}
        assert len(drawn) == 7
        assert () not in drawn
        single = {choose_kinds(("box", "points", "mask"), several=False, generator=source) for _ in range(60)}
        assert single == {("box",), ("points",), ("mask",)}


def test_sure_of_none_is_sure_too():
    """Sure of an object is as sure as sure of none."""
    logits = torch.full((1, 32, 32), 8.0)
    logits[:, 16:] = -8
    logits[:, :, 14:18] = 0.1
    points = uncertain_points(logits, 400, rng())[0, :300]
    assert ((points[:, 0] > 13 / 32) & (points[:, 0] < 19 / 32)).float().mean() > 0.55
