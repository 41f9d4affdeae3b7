import subprocess
import sys
from pathlib import Path

import torch

from unseg_hf import UnSegModel, UnSegProcessor

SCRIPT = Path(__file__).parent.parent / "training_scripts" / "adjust_generator.py"


def test_the_channels_asked_for_change_their_sign_and_nothing_else_does(saved_generator, tmp_path):
    adjusted = tmp_path / "adjusted"

    def run(*options):
        command = [sys.executable, SCRIPT, saved_generator, *options, "--output", adjusted]
        return subprocess.run(list(map(str, command)), capture_output=True, text=True)

    done = run("--signs", 1, -1, -1, "--stretch")
    assert done.returncode == 0, done.stderr
    images = torch.rand(2, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        before, after = (UnSegModel.from_pretrained(at).eval()(images).noise for at in (saved_generator, adjusted))
    assert torch.equal(after, before * torch.tensor([1, -1, -1]).view(3, 1, 1))
    assert [UnSegProcessor.from_pretrained(at).stretch for at in (saved_generator, adjusted)] == [False, True]
    again = run()
    assert again.returncode == 1
    assert again.stderr.startswith("adjust_generator: ")
    assert "choose a new folder" in again.stderr


def test_at_another_input_size_all_weights_but_the_positions_stay(saved_generator, tmp_path):
    command = [sys.executable, SCRIPT, saved_generator, "--image_size", "96", "--output", tmp_path / "larger"]
    done = subprocess.run(list(map(str, command)), capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    before, after = (UnSegModel.from_pretrained(at) for at in (saved_generator, tmp_path / "larger"))
    assert after(torch.zeros(1, 3, 96, 96)).noise.shape == (1, 1, 3, 24, 24)
    assert UnSegProcessor.from_pretrained(tmp_path / "larger").target_size == 96
    weights = before.state_dict()
    changed = [name for name, value in after.state_dict().items() if not torch.equal(value, weights[name])]
    assert changed == ["sam.vision_encoder.pos_embed"]
    assert after.config.epsilon == before.config.epsilon
