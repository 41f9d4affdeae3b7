"""The training script, run for real on a tiny generator."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from unseg_hf import Protector

SCRIPTS = Path(__file__).parent.parent / "training_scripts"
SMALL = [
    "--image_size", "64", "--hidden_size", "32", "--layers", "2", "--heads", "2", "--decoder_size", "32",
    "--surrogate_size", "32", "--surrogate_width", "4", "--batch_size", "2", "--points", "64", "--log_every", "1",
]  # fmt: skip


@pytest.fixture(scope="module")
def parquet(tmp_path_factory):
    from datasets import Dataset, Features
    from datasets import Image as ImageFeature

    rng = np.random.default_rng(0)
    masks = [np.zeros((40, 60), np.uint8) for _ in range(4)]
    for i, mask in enumerate(masks):
        mask[5 + i : 25, 10 : 40 + i] = 1
    rows = {
        "image": [Image.fromarray(rng.integers(0, 256, (40, 60, 3), dtype=np.uint8)) for _ in masks],
        "mask": [Image.fromarray(mask) for mask in masks],
    }
    path = tmp_path_factory.mktemp("data") / "train.parquet"
    Dataset.from_dict(rows, features=Features({name: ImageFeature() for name in rows})).to_parquet(path)
    return str(path)


def run(*arguments):
    return subprocess.run(
        [sys.executable, SCRIPTS / "train_generator.py", *map(str, arguments)],
        capture_output=True,
        text=True,
        check=False,
        env=os.environ | {"ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1"},
    )


@pytest.mark.slow
def test_the_script_trains_a_generator_that_protects_and_goes_on_where_it_stopped(parquet, tmp_path):
    request = ["--config", SCRIPTS / "configs" / "tiny.json", *SMALL, "--train_files", parquet]
    request += ["--mask_kinds", "binary", "--output_dir", tmp_path / "run"]
    done = run(*request, "--epochs", 1)
    assert done.returncode == 0, done.stderr
    assert "step 2/2" in done.stdout
    assert {"config.json", "model.safetensors", "processor_config.json", "modeling_unseg.py", "pipeline_unseg.py"} <= {
        path.name for path in (tmp_path / "run").iterdir()
    }
    protector = Protector.from_pretrained(tmp_path / "run")
    assert protector.model.config.epsilon == pytest.approx(8 / 255)
    protected = protector.protect(np.full((40, 60, 3), 128, np.uint8), whole_image=True)
    assert 0 < protected.report["max_noise"] <= 8

    done = run(*request, "--epochs", 2, "--resume", "True", "--save_code", "False")
    assert done.returncode == 0, done.stderr
    steps = [json.loads(line)["step"] for line in (tmp_path / "run/training_log.jsonl").read_text().splitlines()]
    assert steps == [1, 2, 3, 4]


@pytest.mark.slow
def test_a_frozen_sam_checkpoint_with_the_papers_recipe(parquet, tmp_path, tiny_sam_config):
    from transformers import SamModel

    SamModel(tiny_sam_config()).save_pretrained(tmp_path / "sam")
    done = run(
        "--config", SCRIPTS / "configs" / "paper-vit-b.json", *SMALL, "--sam", tmp_path / "sam", "--surrogate", "sam",
        "--train_files", parquet, "--mask_kinds", "binary", "--output_dir", tmp_path / "run", "--epochs", 2,
        "--save_code", "False",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    saved = {path.name for path in (tmp_path / "run").iterdir()}
    assert "model.safetensors" in saved
    assert "modeling_unseg.py" not in saved
    before, after = SamModel.from_pretrained(tmp_path / "sam"), Protector.from_pretrained(tmp_path / "run").model.sam
    for name, value in before.state_dict().items():
        assert (value == after.state_dict()[name]).all(), name


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--train_files", "a", "b", "--mask_kinds", "binary"], "1 values for 2 --train_files"),
        (["--train_files", "nowhere.parquet", "--mask_kinds", "binary"], "nowhere.parquet"),
        (["--train_files", "a", "--mask_kinds", "binary", "--surrogate", "vgg"], "must be sam or unet"),
        (["--train_files", "a", "--mask_kinds", "binary", "--alternation", "week"], "alternation='week'"),
    ],
)
def test_requests_that_make_no_sense_are_named(arguments, message, tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(str(SCRIPTS))
    import train_generator

    with pytest.raises((SystemExit, ValueError, FileNotFoundError), match=message):
        train_generator.main([*SMALL, *arguments, "--output_dir", str(tmp_path / "run")])
    assert not (tmp_path / "run").exists()
