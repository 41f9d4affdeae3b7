"""The generator that comes with the package does what its card says it is for."""

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from unseg_hf import Protector, default_checkpoint
from unseg_hf.image_files import read, read_mask
from unseg_hf.inspection import noise_left

EXAMPLES = Path(__file__).parent.parent / "spaces_demo" / "examples"


@pytest.fixture(scope="module")
def protected():
    protector = Protector.from_pretrained()
    return protector.protect(EXAMPLES / "coffee.png", mask=EXAMPLES / "coffee_mask.png")


def test_it_is_small_and_has_a_card():
    files = list(default_checkpoint().iterdir())
    assert sum(file.stat().st_size for file in files) <= 12e6
    assert "model.safetensors" in {file.name for file in files}
    card = (default_checkpoint() / "README.md").read_text()
    assert "train_generator.py --config" in card


def test_it_protects_the_example_within_the_bound_at_good_quality(protected):
    mask = read_mask(EXAMPLES / "coffee_mask.png") != 0
    difference = np.abs(protected.picture.pixels.astype(int) - read(EXAMPLES / "coffee.png").pixels).max(axis=2)
    assert 4 <= difference[mask].max() <= 8
    assert difference[~mask].max() <= 2
    assert protected.report["psnr"] > 34


def test_its_noise_lives_through_jpeg_and_reduction(protected):
    assert noise_left(protected.original, protected.picture, quality=75) > 0.7

    def halved(picture):
        image = Image.fromarray(picture.rgb8())
        return np.asarray(image.resize((image.width // 2, image.height // 2), Image.Resampling.BILINEAR), float)

    rms = [np.sqrt(np.mean((a - b) ** 2)) for a, b in (
        (protected.picture.rgb8().astype(float), protected.original.rgb8()),
        (halved(protected.picture), halved(protected.original)),
    )]  # fmt: skip
    assert rms[1] > 0.6 * rms[0]


def test_it_has_no_cast(protected):
    """The noise averages out over the object: no tint that white balance or greyscale would take off."""
    noise = protected.picture.pixels.astype(float) - protected.original.pixels
    assert np.abs(noise[protected.region].mean(axis=0)).max() < 2


def test_its_configuration_is_the_one_the_card_names():
    import json

    script = (EXAMPLES.parent.parent / "training_scripts" / "configs" / "tiny.json").read_text()
    config = json.loads((default_checkpoint() / "config.json").read_text())
    for name in ("proposal_iou", "proposal_stability"):
        assert config[name] == json.loads(script)[name]
