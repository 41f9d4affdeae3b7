"""The parts of the bilevel loop, each against an independent computation or a property that must hold."""

import io
import json

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from PIL import Image
from scipy.ndimage import map_coordinates

from unseg_hf.data.records import InteractiveSegmentation, Source
from unseg_hf.training import postprocessing
from unseg_hf.training.bilevel import BilevelConfig, train
from unseg_hf.training.losses import interactive_loss, point_loss, sample_at, uncertain_points
from unseg_hf.training.prompts import boxes_around, choose_kinds, make_prompts, points_in
from unseg_hf.training.surrogates import SamSurrogate, UNetSurrogate


def rng(seed=0):
    return torch.Generator().manual_seed(seed)


def disc(size=64, x=40, y=24, radius=12):
    grid = np.mgrid[:size, :size]
    return ((grid[0] - y) ** 2 + (grid[1] - x) ** 2 < radius**2).astype(np.uint8)


@pytest.fixture(scope="session")
def parquet(tmp_path_factory):
    """Twelve pictures of a disc on a gradient, with binary masks and with region maps."""
    from datasets import Dataset, Features
    from datasets import Image as ImageFeature

    rows = {"image": [], "mask": [], "regions": []}
    for i in range(12):
        mask = disc(x=20 + 2 * i, y=44 - 2 * i)
        shade = np.mgrid[:64, :64][1] * 2 + 10 * i
        picture = np.stack([shade, shade // 2, 200 - shade], -1) + mask[..., None] * 30
        rows["image"].append(Image.fromarray(np.clip(picture, 0, 255).astype(np.uint8)))
        rows["mask"].append(Image.fromarray(mask))
        rows["regions"].append(Image.fromarray(mask + (np.mgrid[:64, :64][0] > 32).astype(np.uint8) * 2))
    path = tmp_path_factory.mktemp("data") / "train.parquet"
    features = Features({name: ImageFeature() for name in rows})
    Dataset.from_dict(rows, features=features).to_parquet(path)
    return str(path)


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
        from unseg_hf.training import losses

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


class TestPostprocessing:
    def test_jpeg_is_close_to_pillows(self):
        y, x = np.mgrid[:64, :64]
        texture = np.random.default_rng(0).normal(0, 12, (64, 64, 3))
        pixels = np.clip(np.stack([2 * y + 40, 3 * x + 20, 200 - y - x], -1) + texture, 0, 255).astype(np.uint8)
        images = torch.from_numpy(pixels).permute(2, 0, 1)[None].float() / 255
        buffer = io.BytesIO()
        Image.fromarray(pixels).save(buffer, "JPEG", quality=40)
        reference = torch.from_numpy(np.asarray(Image.open(buffer)).copy()).permute(2, 0, 1)[None].float() / 255
        ours = postprocessing.jpeg(images, strength=1.0)
        assert (ours - reference).abs().mean() < 0.4 * (images - reference).abs().mean()

    def test_greyscale_is_pillows(self):
        pixels = np.random.default_rng(0).integers(0, 256, (32, 32, 3), dtype=np.uint8)
        grey = postprocessing.greyscale(torch.from_numpy(pixels).permute(2, 0, 1)[None].float())
        np.testing.assert_allclose(grey[0, 1], np.asarray(Image.fromarray(pixels).convert("L")), atol=0.51)

    @pytest.mark.parametrize("name", ["jpeg", "resize", "blur", "greyscale"])
    def test_gradients_pass_through(self, name):
        images = torch.rand(2, 3, 64, 64, generator=rng(), requires_grad=True)
        treated = getattr(postprocessing, name)(images, 0.7)
        assert treated.min() >= 0
        assert treated.max() <= 1
        treated.sum().backward()
        assert torch.isfinite(images.grad).all()
        assert images.grad.abs().sum() > 0

    def test_probability_decides_how_often(self):
        images = torch.rand(1, 3, 64, 64, generator=rng())
        source = rng(3)
        treated = [postprocessing.random_postprocess(images, 0.3, source) for _ in range(60)]
        assert 5 < sum(t is images for t in treated) < 30
        grey = [torch.allclose(t[:, 0], t[:, 2], atol=1e-4) for t in treated]
        assert 8 < sum(grey) < 30
        assert postprocessing.random_postprocess(images, 0.0, source) is images


class TestData:
    def test_images_and_masks_move_together(self, parquet):
        data = InteractiveSegmentation([Source(parquet)], 48, (0.5, 1.5))
        for index in range(len(data)):
            item = data[index]
            assert item["image"].shape == (3, 48, 48)
            inside = item["mask"] > 0
            assert inside.any()
            # Red minus twice green is 0 up to rounding outside, and 30 - 60 on the disc, where nothing is clipped.
            contrast = (item["image"][0] - 2 * item["image"][1]) * 255
            assert contrast[inside].median() < -20
            assert contrast[~inside].median() > -10

    def test_items_depend_on_seed_epoch_and_index_alone(self, parquet):
        a, b = (InteractiveSegmentation([Source(parquet)], 48, seed=5) for _ in range(2))
        b[3], b[7]
        assert torch.equal(a[2]["image"], b[2]["image"])
        b.set_epoch(1)
        assert not torch.equal(a[2]["image"], b[2]["image"])

    def test_regions_become_masks_of_one_or_more_labels(self, parquet):
        source = Source(parquet, "regions", mask_column="regions")
        single = InteractiveSegmentation([source], 64, (1.0, 1.0))
        several = InteractiveSegmentation([source], 64, (1.0, 1.0), max_regions=3)
        area = [np.mean([d[i]["mask"].mean().item() for i in range(12)]) for d in (single, several)]
        assert area[1] > area[0]

    def test_a_missing_column_or_file_is_named(self, parquet):
        with pytest.raises(ValueError, match=r"no column 'masks'.*image, mask, regions"):
            InteractiveSegmentation([Source(parquet, mask_column="masks")], 48)
        with pytest.raises(FileNotFoundError, match=r"nowhere\.parquet"):
            InteractiveSegmentation([Source("nowhere.parquet")], 48)
        with pytest.raises(ValueError, match="kind='both'"):
            Source(parquet, "both")


def small_run(
    parquet, build_generator, folder, epochs=2, resume=False, surrogate="unet", tiny_sam_config=None, **config
):
    torch.manual_seed(0)
    generator = build_generator(freeze_sam=False)
    torch.manual_seed(1)
    if surrogate == "unet":
        other = UNetSurrogate(width=4, image_size=32)
    else:
        other = SamSurrogate(tiny_sam_config(image_size=64), prompt_size=64)
    data = InteractiveSegmentation([Source(parquet)], 64, (0.8, 1.2))
    settings = {"batch_size": 4, "points": 256, "log_every": 1, "sam_loss_weight": 1.0, "schedule": "cosine"} | config
    settings = BilevelConfig(epochs=epochs, **settings)
    train(generator, other, data, settings, folder, Accelerator(cpu=True), resume=resume, report=lambda line: None)
    log = [json.loads(line) for line in (folder / "training_log.jsonl").read_text().splitlines()]
    return generator, other, log


def weights(model):
    return torch.cat([p.detach().flatten() for p in model.parameters()])


class TestLoop:
    def test_epochs_alternate_as_in_the_paper(self):
        phases = [BilevelConfig().trains(epoch) for epoch in range(8)]
        assert phases == [(False, True), (True, False), (True, False), (True, False)] * 2

    def test_each_phase_moves_its_own_network_alone(self, parquet, build_generator, tmp_path):
        fresh = build_generator(freeze_sam=False)
        torch.manual_seed(1)
        fresh_surrogate = UNetSurrogate(width=4, image_size=32)
        # One epoch by the paper's alternation is a surrogate epoch.
        generator, surrogate, log = small_run(parquet, build_generator, tmp_path, epochs=1, alternation="epoch")
        assert torch.equal(weights(generator), weights(fresh))
        assert not torch.equal(weights(surrogate), weights(fresh_surrogate))
        assert set(log[0]) == {"step", "images_per_second", "surrogate"}
        generator_2, surrogate_2, log = small_run(
            parquet, build_generator, tmp_path, epochs=2, alternation="epoch", resume=True
        )
        assert not torch.equal(weights(generator_2), weights(fresh))
        assert torch.equal(weights(surrogate_2), weights(surrogate))
        assert "generator" in log[-1]
        assert "surrogate" not in log[-1]

    @pytest.mark.parametrize("surrogate", ["unet", "sam"])
    def test_noise_learns_to_show_the_mask(self, parquet, build_generator, tmp_path, surrogate, tiny_sam_config):
        _, _, log = small_run(
            parquet, build_generator, tmp_path, surrogate=surrogate, tiny_sam_config=tiny_sam_config,
            epochs=25, schedule="step", decay_at=1.0,
            alternation="step", label_modification=False, epsilon=0.3, epsilon_background=0.05, learning_rate=2e-3,
            surrogate_learning_rate=2e-3, sam_loss_weight=0.0,
        )  # fmt: skip
        first, last = (np.mean([entry["surrogate"] for entry in part]) for part in (log[:3], log[-3:]))
        assert last < 0.88 * first

    def test_a_resumed_run_ends_with_the_same_weights(self, parquet, build_generator, tmp_path):
        options = {"alternation": "step", "postprocess_probability": 0.5, "epsilon_start": 4.0, "epsilon_warmup": 0.5}
        whole, whole_surrogate, _ = small_run(parquet, build_generator, tmp_path / "whole", save_every=4, **options)

        class StoppedError(Exception):
            pass

        def stop_at_5(line):
            if line.startswith("step 5/"):
                raise StoppedError

        torch.manual_seed(0)
        generator = build_generator(freeze_sam=False)
        torch.manual_seed(1)
        surrogate = UNetSurrogate(width=4, image_size=32)
        data = InteractiveSegmentation([Source(parquet)], 64, (0.8, 1.2))
        config = BilevelConfig(
            epochs=2,
            batch_size=4,
            points=256,
            log_every=1,
            sam_loss_weight=1.0,
            schedule="cosine",
            save_every=4,
            **options,
        )
        with pytest.raises(StoppedError):
            train(generator, surrogate, data, config, tmp_path / "cut", Accelerator(cpu=True), report=stop_at_5)
        resumed, resumed_surrogate, _ = small_run(
            parquet, build_generator, tmp_path / "cut", resume=True, save_every=4, **options
        )
        assert torch.equal(weights(resumed), weights(whole))
        assert torch.equal(weights(resumed_surrogate), weights(whole_surrogate))

    def test_budget_falls_from_the_multiple_to_one(self):
        config = BilevelConfig(epsilon=0.02, epsilon_background=0.005, epsilon_start=4.0, epsilon_warmup=0.6)
        assert config.budget(0.0) == pytest.approx((0.08, 0.02))
        assert config.budget(0.3) == pytest.approx((0.05, 0.0125))
        assert config.budget(0.6) == config.budget(1.0) == pytest.approx((0.02, 0.005))

    def test_a_loss_that_is_not_finite_stops_the_run_and_names_the_step(self, parquet, build_generator, tmp_path):
        with pytest.raises(FloatingPointError, match=r"generator loss is nan at step \d+"):
            small_run(parquet, build_generator, tmp_path, epochs=20, alternation="step", learning_rate=float("inf"))

    @pytest.mark.parametrize(
        ("settings", "message"),
        [
            ({"alternation": "week"}, "alternation='week'"),
            ({"prompt_kinds": ["text"]}, "prompt_kinds"),
            ({"epsilon": 0.1, "epsilon_background": 0.2}, "epsilon_background <= epsilon"),
            ({"epsilon_start": 0.5}, "epsilon_start=0.5"),
        ],
    )
    def test_contradicting_settings_are_named(self, settings, message):
        with pytest.raises(ValueError, match=message):
            BilevelConfig(**settings)
