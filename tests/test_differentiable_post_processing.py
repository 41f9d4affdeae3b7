"""What happens to published images: against Pillow and numpy, and by properties that must hold."""

import io

import numpy as np
import pytest
import torch
from PIL import Image

from unseg_hf.training import differentiable_post_processing as post_processing
from unseg_hf.training.differentiable_post_processing import POSTPROCESSINGS, crop, random_postprocess


def rng(seed=0):
    return torch.Generator().manual_seed(seed)


def noise_images(batch=2, size=64):
    return torch.rand(batch, 3, size, size, generator=rng())


def disc(size=64, x=40, y=24, radius=12):
    rows, columns = np.mgrid[:size, :size]
    return torch.from_numpy(((rows - y) ** 2 + (columns - x) ** 2 < radius**2).astype(np.float32))


class TestKinds:
    def test_jpeg_is_close_to_pillows(self):
        y, x = np.mgrid[:64, :64]
        texture = np.random.default_rng(0).normal(0, 12, (64, 64, 3))
        pixels = np.clip(np.stack([2 * y + 40, 3 * x + 20, 200 - y - x], -1) + texture, 0, 255).astype(np.uint8)
        images = torch.from_numpy(pixels).permute(2, 0, 1)[None].float() / 255
        buffer = io.BytesIO()
        Image.fromarray(pixels).save(buffer, "JPEG", quality=40)
        reference = torch.from_numpy(np.asarray(Image.open(buffer)).copy()).permute(2, 0, 1)[None].float() / 255
        ours = post_processing.jpeg(images, strength=1.0)
        assert (ours - reference).abs().mean() < 0.4 * (images - reference).abs().mean()

    def test_greyscale_is_pillows(self):
        pixels = np.random.default_rng(0).integers(0, 256, (32, 32, 3), dtype=np.uint8)
        grey = post_processing.greyscale(torch.from_numpy(pixels).permute(2, 0, 1)[None].float())
        np.testing.assert_allclose(grey[0, 1], np.asarray(Image.fromarray(pixels).convert("L")), atol=0.51)

    @pytest.mark.parametrize(("strength", "bits"), [(0.0, 6), (0.5, 5), (1.0, 4)])
    def test_bit_depth_is_numpys_rounding(self, strength, bits):
        images = noise_images()
        rounded = post_processing.bit_depth(images, strength)
        highest = 2**bits - 1
        np.testing.assert_allclose(rounded, np.round(images.numpy() * highest) / highest, atol=1e-6)
        assert len(np.unique((rounded * highest).round())) == 2**bits

    def test_gradients_pass_straight_through_the_rounding(self):
        images = noise_images().requires_grad_()
        weights = torch.randn(images.shape, generator=rng(1))
        (post_processing.bit_depth(images, 1.0) * weights).sum().backward()
        assert torch.equal(images.grad, weights)

    @pytest.mark.parametrize("name", POSTPROCESSINGS)
    def test_gradients_pass_through(self, name):
        images = noise_images().requires_grad_()
        if name == "crop":
            treated, _ = crop(images, torch.ones(2, 64, 64), 0.7, rng())
        else:
            treated = getattr(post_processing, name)(images, *([] if name == "greyscale" else [0.7]))
        assert treated.min() >= 0
        assert treated.max() <= 1
        treated.sum().backward()
        assert torch.isfinite(images.grad).all()
        assert images.grad.abs().sum() > 0


class TestCrop:
    @pytest.mark.parametrize("seed", range(6))
    def test_images_and_masks_move_together(self, seed):
        masks = torch.stack([disc(), disc(x=24, y=36, radius=9)])
        images = masks.unsqueeze(1).expand(-1, 3, -1, -1)
        cropped, moved = crop(images, masks, 0.8, rng(seed))
        assert cropped.shape == images.shape
        assert set(moved.unique().tolist()) == {0, 1}
        assert not torch.equal(moved, masks)
        # Bilinear values are above one half on the side of the edge where the nearest pixel is one.
        assert ((cropped[:, 0] > 0.5) == (moved > 0.5)).float().mean() > 0.98

    def test_the_box_has_the_side_the_strength_says(self):
        # Each pixel of the ramps knows where it was: their ends are the box.
        ramp = (torch.arange(64) + 0.5) / 64
        images = torch.stack([ramp.expand(64, 64), ramp.expand(64, 64).T, torch.zeros(64, 64)])[None]
        everywhere = torch.ones(1, 64, 64)
        corners = set()
        for seed in range(20):
            cropped, _ = crop(images, everywhere, 1.0, rng(seed))
            corners.add((cropped[0, 0].min().item(), cropped[0, 1].min().item()))
            for channel in (0, 1):
                assert cropped[0, channel].max() - cropped[0, channel].min() == pytest.approx(31 / 64)
        assert len(corners) > 15
        whole, _ = crop(images, everywhere, 0.0, rng())
        torch.testing.assert_close(whole, images)

    def test_a_mask_is_never_left_empty(self):
        images = noise_images()
        corners = torch.zeros(2, 64, 64)
        corners[0, 0, 0] = corners[1, 63, 63] = 1  # no half of the picture holds both
        for seed in range(10):
            same_images, same_masks = crop(images, corners, 1.0, rng(seed))
            assert same_images is images
            assert same_masks is corners
        one_pixel = torch.zeros(1, 64, 64)
        one_pixel[0, 30, 30] = 1
        for strength in torch.linspace(0, 1, 20).tolist():
            assert crop(images[:1], one_pixel, strength, rng())[1].any()


class TestMix:
    def test_a_seed_gives_the_same_pictures(self):
        images, masks = noise_images(), disc().expand(2, -1, -1)
        for seed in range(8):
            first = random_postprocess(images, masks, POSTPROCESSINGS, 0.6, rng(seed))
            again = random_postprocess(images, masks, POSTPROCESSINGS, 0.6, rng(seed))
            assert torch.equal(first[0], again[0])
            assert torch.equal(first[1], again[1])

    def test_nothing_happens_at_probability_0_or_without_kinds(self):
        images, masks = noise_images(), disc().expand(2, -1, -1)
        for kinds, probability in ((POSTPROCESSINGS, 0.0), ((), 1.0)):
            same_images, same_masks = random_postprocess(images, masks, kinds, probability, rng())
            assert same_images is images
            assert same_masks is masks

    def test_everything_happens_at_probability_1_in_the_published_order(self, monkeypatch):
        happened = []
        for kind in POSTPROCESSINGS:
            monkeypatch.setattr(post_processing, kind, self.recorder(kind, happened))
        random_postprocess(noise_images(), torch.ones(2, 64, 64), POSTPROCESSINGS, 1.0, rng())
        assert tuple(kind for kind, _ in happened) == POSTPROCESSINGS

    @pytest.mark.parametrize("alone", POSTPROCESSINGS)
    def test_a_kind_does_not_depend_on_the_others(self, alone, monkeypatch):
        happened = []
        for kind in POSTPROCESSINGS:
            monkeypatch.setattr(post_processing, kind, self.recorder(kind, happened))
        images, masks = noise_images(), torch.ones(2, 64, 64)
        mixed, single = rng(4), rng(4)
        for _ in range(10):
            random_postprocess(images, masks, POSTPROCESSINGS, 0.5, mixed)
        in_the_mix = [entry for entry in happened if entry[0] == alone]
        happened.clear()
        for _ in range(10):
            random_postprocess(images, masks, [alone], 0.5, single)
        assert happened == in_the_mix
        assert 0 < len(happened) < 10
        assert torch.equal(mixed.get_state(), single.get_state())

    @staticmethod
    def recorder(kind, happened):
        """A stand-in that changes nothing and notes the numbers it was given; a crop draws from its generator."""

        def record(*arguments):
            if kind == "crop":
                images, masks, strength, place = arguments
                happened.append((kind, (strength, torch.rand((), generator=place).item())))
                return images, masks
            images, *strength = arguments  # grey is grey
            happened.append((kind, strength))
            return images

        return record

    def test_probability_decides_how_often(self):
        images, masks = noise_images(batch=1), torch.ones(1, 64, 64)
        source = rng(3)
        kinds = ("greyscale", "resize", "blur", "jpeg")
        treated = [random_postprocess(images, masks, kinds, 0.3, source)[0] for _ in range(60)]
        assert 5 < sum(t is images for t in treated) < 30
        grey = [torch.allclose(t[:, 0], t[:, 2], atol=1e-4) for t in treated]
        assert 8 < sum(grey) < 30

    def test_masks_keep_their_resolution(self):
        images, masks = noise_images(), disc().expand(2, -1, -1)
        sizes = set()
        for seed in range(12):
            treated, moved = random_postprocess(images, masks, POSTPROCESSINGS, 1.0, rng(seed))
            assert moved.shape == masks.shape
            assert moved.flatten(1).any(1).all()
            assert 0 <= treated.min() <= treated.max() <= 1
            sizes.add(tuple(treated.shape[-2:]))
        assert sizes == {(32, 32), (64, 64)}


@pytest.mark.parametrize(("strength", "quality"), [(0.0, 95), (0.5, 68), (1.0, 40)])
def test_jpegs_quality_is_what_the_strength_says(strength, quality):
    pixels = np.random.default_rng(0).integers(0, 256, (8, 8, 3)).repeat(8, 0).repeat(8, 1)
    pixels = (pixels // 2 + np.random.default_rng(1).integers(0, 128, (64, 64, 3))).astype(np.uint8)
    ours = post_processing.jpeg(torch.from_numpy(pixels).permute(2, 0, 1)[None] / 255, strength)[0]

    def distance(of_quality):
        buffer = io.BytesIO()
        Image.fromarray(pixels).save(buffer, "JPEG", quality=of_quality, subsampling="4:2:0")
        theirs = torch.from_numpy(np.array(Image.open(buffer))).permute(2, 0, 1) / 255
        return (theirs - ours).square().mean().item()

    others = [q for q in (quality - 8, quality + 8) if q <= 100]
    assert all(distance(quality) < distance(other) for other in others)


def test_a_crop_reaches_the_last_place():
    images = torch.arange(64).expand(1, 3, 64, 64) / 63
    everywhere = torch.ones(1, 64, 64)
    last = {crop(images, everywhere, 2 / 64, rng(seed))[0][0, 0].max().item() for seed in range(20)}
    assert len(last) == 2  # a box of 63 columns lies in two places
