import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from labelled_discs import write_discs

from unseg_hf import UnSegModel, UnSegProcessor, default_checkpoint
from unseg_hf.noise_codes import CLASSES, code_noise

SCRIPT = Path(__file__).parent.parent / "training_scripts" / "teach_noise_codes.py"


def test_a_code_says_what_each_channel_carries():
    rows, columns = (np.arange(8) / 4)[:, None], np.arange(4) / 2
    noise = code_noise("+Da", rows, columns)
    assert noise.shape == (8, 4, 3)
    assert (noise[..., 0] == 1).all()
    np.testing.assert_array_equal(code_noise("-eE", rows, columns)[:, 1, 1], [1, -1, -1, 1, 1, -1, -1, 1])
    np.testing.assert_array_equal(code_noise("-eE", rows, columns)[:, 1, 2], [-1, 1, 1, -1, -1, 1, 1, -1])
    np.testing.assert_array_equal(noise[:, 2, 1], [-1, -1, 1, 1, -1, -1, 1, 1])
    np.testing.assert_array_equal(noise[5, :, 2], [1, -1, 1, -1])
    for code in ("dd", "ddx", "++++"):
        with pytest.raises(ValueError, match="three of"):
            code_noise(code, rows, columns)


def test_no_two_codes_of_the_default_are_the_same():
    assert len(set(CLASSES)) == len(CLASSES)
    for code in CLASSES:
        code_noise(code, np.ones((1, 1)), np.ones((1, 1)))


def test_the_noises_asked_for_are_learned_and_the_sam_stays(saved_generator, tmp_path):
    data, taught = write_discs(tmp_path / "train.parquet", 12, seed=0), tmp_path / "taught"

    def run(*options):
        command = [sys.executable, SCRIPT, saved_generator, "--train_data", data, "--output", taught, *options]
        return subprocess.run(list(map(str, command)), capture_output=True, text=True)

    codes = ("--mask_code", "ddd", "--class_codes", "DDD", "+++", "--tint_codes", "+++")
    done = run(*codes, "--steps", 100, "--learning_rate", 0.01)
    assert done.returncode == 0, done.stderr
    model, before = UnSegModel.from_pretrained(taught).eval(), UnSegModel.from_pretrained(saved_generator)
    assert (model.config.noise_codes, model.config.tint_codes, model.config.faint_code) == (3, [2], 0)
    assert UnSegProcessor.from_pretrained(taught).target_size == 64
    sam = before.sam.state_dict()
    assert all(torch.equal(value, sam[name]) for name, value in model.sam.state_dict().items())
    masks = torch.zeros(1, 3, 16, 16)
    masks[..., 4:12, 4:12] = 1
    with torch.no_grad():
        images = torch.rand(1, 3, 64, 64, generator=torch.Generator().manual_seed(0))
        noise = model(images, input_masks=masks, codes=torch.tensor([[0, 1, 2]])).noise[0]
    wave = torch.tensor([1.0, 1.0, -1.0, -1.0]).repeat(4)[:, None]
    for made, wanted in zip(noise, (wave, -wave, torch.ones(16, 1)), strict=True):
        assert (made * wanted).mean() > 0.3
    assert "choose a new folder" in run().stderr
    assert "code 'xyz'" in run("--class_codes", "xyz", "--output", tmp_path / "other").stderr
    wrong = run("--class_codes", "ddd", "--tint_codes", "+++", "--output", tmp_path / "other")
    assert "--tint_codes +++: must be among the codes ded ddd" in wrong.stderr
    wrong = run("--epsilon_smooth", "300", "--output", tmp_path / "other")
    assert wrong.stderr.strip().endswith("must be from 0 to 1 (2 grey levels are 2/255)")


def test_at_another_input_size_the_sam_keeps_all_weights_but_the_positions(saved_generator, tmp_path):
    data = write_discs(tmp_path / "train.parquet", 4, seed=0)
    options = ("--stretch", "--image_size", 96, "--steps", 1, "--train_data", data, "--output", tmp_path / "larger")
    done = subprocess.run(
        [sys.executable, SCRIPT, saved_generator, *map(str, options)], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    before, after = (UnSegModel.from_pretrained(at) for at in (saved_generator, tmp_path / "larger"))
    assert after(torch.zeros(1, 3, 96, 96)).noise.shape == (1, 1, 3, 24, 24)
    processor = UnSegProcessor.from_pretrained(tmp_path / "larger")
    assert (processor.target_size, processor.stretch) == (96, True)
    weights = before.sam.state_dict()
    changed = [name for name, value in after.sam.state_dict().items() if not torch.equal(value, weights[name])]
    assert changed == ["vision_encoder.pos_embed"]
    assert after.config.epsilon == before.config.epsilon


def test_a_generator_with_an_object_finder_is_taught_without_it(tmp_path):
    data = write_discs(tmp_path / "train.parquet", 4, seed=0)
    command = [sys.executable, SCRIPT, default_checkpoint(), "--train_data", data, "--output", tmp_path / "taught"]
    command += ["--steps", 1, "--batch_size", 2, "--class_codes", "DDD"]
    done = subprocess.run(list(map(str, command)), capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert UnSegModel.from_pretrained(tmp_path / "taught").object_finder is None
