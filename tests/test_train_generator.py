"""The training script and the data scripts beside it, run for real on tiny generators."""

import json
import os
import signal
import subprocess
import sys
import time
from datetime import timedelta
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hub_server import TOKEN, HubServer
from PIL import Image

from unseg_hf import Protector, UnSegModel, UnSegProcessor, default_checkpoint
from unseg_hf.training import processes

SCRIPTS = Path(__file__).parent.parent / "training_scripts"
TINY, PAPER = (["--config", SCRIPTS / "configs" / name] for name in ("tiny.json", "paper-vit-b.json"))
SMALL = [
    "--image_size", "64", "--hidden_size", "32", "--layers", "2", "--heads", "2", "--decoder_size", "32",
    "--surrogate_width", "4", "--batch_size", "2", "--points", "64", "--log_every", "1",
]  # fmt: skip
ENVIRONMENT = os.environ | {"PYTHONUNBUFFERED": "1"}


@pytest.fixture(scope="module")
def parquet(tmp_path_factory):
    from datasets import Dataset, Features
    from datasets import Image as ImageFeature

    rng = np.random.default_rng(0)
    masks = [np.zeros((40, 60), np.uint8) for _ in range(6)]
    for i, mask in enumerate(masks):
        mask[5 + i : 25, 10 : 40 + i] = 1
    rows = {
        "image": [Image.fromarray(rng.integers(0, 256, (40, 60, 3), dtype=np.uint8)) for _ in masks],
        "mask": [Image.fromarray(mask) for mask in masks],
    }
    path = tmp_path_factory.mktemp("data") / "train.parquet"
    Dataset.from_dict(rows, features=Features({name: ImageFeature() for name in rows})).to_parquet(path)
    return str(path)


def run(*arguments, script="train_generator.py", launcher=(), **environment):
    return subprocess.run(
        [sys.executable, *launcher, str(SCRIPTS / script), *map(str, arguments)],
        capture_output=True,
        text=True,
        check=False,
        env=ENVIRONMENT | environment,
    )


def steps_of(folder):
    log = [json.loads(line) for line in (folder / "training_log.jsonl").read_text().splitlines()]
    return [entry["step"] for entry in log if "images_per_second" in entry]


@pytest.mark.slow
def test_a_run_from_start_to_hub(parquet, tmp_path):
    with HubServer() as hub:
        done = run(
            *TINY, *SMALL, "--surrogate_size", 32, "--train_data", parquet, "--validation_data", parquet,
            "--validation_size", 4, "--epochs", 2, "--validate_every", 2, "--output_dir", tmp_path / "run",
            "--push_to_hub", "--hub_model_id", "tiny-generator",
            HF_ENDPOINT=hub.url, HF_TOKEN=TOKEN, HF_HUB_DISABLE_XET="1", HF_HUB_OFFLINE="0",
        )  # fmt: skip
        assert done.returncode == 0, done.stderr
        (repository,) = hub.repositories
        assert f"uploaded to {hub.url}/{repository}" in done.stdout
    folder = tmp_path / "run"
    assert steps_of(folder) == [1, 2, 3, 4, 5, 6]
    assert {path.name for path in (folder / "validation").iterdir()} == {f"step-0000000{n}.png" for n in (2, 4, 6)}
    assert any(path.name.startswith("events.out.tfevents") for path in (folder / "logs").rglob("*"))
    assert {"config.json", "model.safetensors", "processor_config.json", "modeling_unseg.py", "pipeline_unseg.py"} <= {
        path.name for path in folder.iterdir()
    }
    card = (folder / "README.md").read_text()
    assert f'model="{repository}"' in card
    assert "surrogate iou protected" in card
    assert str(Path(parquet).parent.parent) not in card  # a reader of the card need not know the folders of a machine
    protector = Protector.from_pretrained(folder)
    assert protector.model.config.epsilon == pytest.approx(8 / 255)
    protected = protector.protect(np.full((40, 60, 3), 128, np.uint8), whole_image=True)
    assert 0 < protected.report["max_noise"] <= 8


@pytest.mark.slow
def test_the_papers_recipe_in_two_processes_on_tars_and_a_tree(parquet, tmp_path, tiny_sam_config):
    """A pretrained SAM, a surrogate with a pretrained encoder, SA-1B's tars and HQSeg's folders, weighted."""
    from transformers import SamModel, ViTMAEConfig, ViTMAEModel

    SamModel(tiny_sam_config()).save_pretrained(tmp_path / "sam")
    mae = ViTMAEConfig(
        hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=128, image_size=32, patch_size=16
    )
    ViTMAEModel(mae).save_pretrained(tmp_path / "mae")
    written = run(
        "--data", parquet, "--output", tmp_path / "tars", "--images_per_shard", 2, script="write_sa1b.py"
    )  # fmt: skip
    assert written.returncode == 0, written.stderr
    folder = tmp_path / "hqseg" / "cascade_psp" / "ecssd"
    folder.mkdir(parents=True)
    for i in range(4):
        mask = np.zeros((40, 60), np.uint8)
        mask[5 : 25 + i, 10:40] = 255
        Image.fromarray(mask).save(folder / f"{i}.png")
        pixels = np.random.default_rng(i).integers(0, 256, (40, 60, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / f"{i}.jpg")

    done = run(
        *PAPER, *SMALL, "--sam", tmp_path / "sam", "--surrogate_size", 32, "--surrogate_encoder", tmp_path / "mae",
        "--train_data", f"sa1b:{tmp_path}/tars/*.tar,weight=2", f"hqseg:{tmp_path}/hqseg,parts=ecssd,weight=1",
        "--epoch_size", 4, "--epochs", 5, "--output_dir", tmp_path / "run", "--save_code", "False",
        "--gradient_checkpointing", "--tracker", "none", "--workers", 1,
        launcher=("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"),
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert steps_of(tmp_path / "run") == [1, 2, 3, 4, 5]
    assert done.stdout.count("step 5/5") == 1  # one process speaks
    assert "modeling_unseg.py" not in {path.name for path in (tmp_path / "run").iterdir()}
    before, after = SamModel.from_pretrained(tmp_path / "sam"), Protector.from_pretrained(tmp_path / "run").model.sam
    for name, value in before.state_dict().items():
        assert (value == after.state_dict()[name]).all(), name


@pytest.mark.slow
def test_ctrl_c_saves_and_resume_goes_on(parquet, tmp_path):
    request = [
        *TINY, *SMALL, "--surrogate", "unet", "sam", "segformer", "--surrogate_size", 32, 64, 32,
        "--train_data", parquet, "--output_dir", tmp_path / "run", "--epochs", 15, "--tracker", "none",
        "--save_code", "False",
    ]  # fmt: skip
    process = subprocess.Popen(
        [sys.executable, *map(str, (SCRIPTS / "train_generator.py", *request))],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=ENVIRONMENT,
    )  # fmt: skip
    for line in process.stdout:
        if line.startswith("step 3/"):
            process.send_signal(signal.SIGINT)
            break
    out, _ = process.communicate(timeout=60)
    assert process.returncode == 130
    assert "with --resume goes on" in out
    (checkpoint,) = (tmp_path / "run/checkpoints").iterdir()
    stopped = int(checkpoint.name.removeprefix("step-"))
    assert 3 <= stopped < 45
    assert not (tmp_path / "run/config.json").exists()

    start = time.time()
    done = run(*request, "--resume")
    assert done.returncode == 0, done.stderr
    assert steps_of(tmp_path / "run") == list(range(1, 46))
    assert (tmp_path / "run/model.safetensors").stat().st_mtime > start - 1
    other = run(*request, "--resume", "--learning_rate", 1)
    assert other.returncode == 1
    assert "learning_rate is 1.0, was 0.0003" in other.stderr
    assert "Traceback" not in other.stderr


def test_of_a_generator_of_several_noises_the_first_is_trained_on_and_the_others_go(parquet, tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(str(SCRIPTS))
    import train_generator

    options = ["--train_data", f"{parquet},weight=2", "--epoch_size", "2", "--epochs", "1", "--tracker", "none"]
    options += ["--sam", str(default_checkpoint()), "--stretch", "True", "--learning_rate", "0", "--no_save_code"]
    options += ["--alternation", "joint"]
    train_generator.main([*SMALL, *options, "--output_dir", str(tmp_path / "run")])
    before, after = (UnSegModel.from_pretrained(folder) for folder in (default_checkpoint(), tmp_path / "run"))
    assert (after.config.noise_codes, after.config.tint_codes, after.config.faint_code) == (1, None, None)
    assert torch.equal(after.noise_head.noise_tokens.weight, before.noise_head.noise_tokens.weight[:3])
    processor = UnSegProcessor.from_pretrained(tmp_path / "run")
    assert (processor.stretch, processor.sharpness) == (True, 6)
    assert "train.parquet (weight=2): 6 images" in (tmp_path / "run/README.md").read_text()


def test_a_new_noise_head_is_not_at_its_bounds_and_the_rest_is_the_checkpoints(parquet, tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(str(SCRIPTS))
    import train_generator

    sam = ["--sam", str(default_checkpoint()), "--image_size", "512"]
    options = [
        "--train_data",
        parquet,
        "--epochs",
        "1",
        "--tracker",
        "none",
        "--stretch",
        "True",
        "--surrogate",
        "unet",
    ]
    options += ["--surrogate_size", "32", "--new_noise_head", "True", "--learning_rate", "0", "--alternation", "joint"]
    train_generator.main([*sam, *options, "--points", "64", "--no_save_code", "--output_dir", str(tmp_path / "run")])
    before, after = (UnSegModel.from_pretrained(folder).eval() for folder in (default_checkpoint(), tmp_path / "run"))
    assert after.config.epsilon_background == before.config.epsilon_background == 0
    with torch.no_grad():
        pixels = torch.rand(1, 3, 192, 192, generator=torch.Generator().manual_seed(0))
        old, new = (model(pixels).noise.abs().mean() for model in (before, after))
    assert old > 0.9
    assert new < 0.5
    # What the checkpoint decides is no setting of the run.
    assert '"image_size"' not in (tmp_path / "run/README.md").read_text()


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", "bad.json is not JSON"),
        ("[1]", "bad.json holds a list"),
        ('{"epocs": 3}', "bad.json: there is no setting 'epocs'; 'epochs'\\?"),
    ],
)
def test_a_configuration_that_is_none_is_named(content, message, tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(str(SCRIPTS))
    import train_generator

    (tmp_path / "bad.json").write_text(content)
    with pytest.raises(ValueError, match=message):
        train_generator.parse(["--config", str(tmp_path / "bad.json"), "--train_data", "x", "--output_dir", "y"])
    (tmp_path / "good.json").write_text('{"epoch_size": null, "epochs": 3, "prompt_kinds": ["box", "mask"]}')
    _, data, _, config = train_generator.parse(
        ["--config", str(tmp_path / "good.json"), "--train_data", "x", "--output_dir", "y"]
    )
    assert (data.epoch_size, config.epochs, config.prompt_kinds) == (None, 3, ["box", "mask"])


@pytest.mark.slow
def test_what_needs_one_process_is_refused_in_two(parquet, saved_generator, tmp_path):
    done = run(
        saved_generator, "--train_data", parquet, "--output", tmp_path / "out", script="train_sam.py",
        launcher=("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"),
    )  # fmt: skip
    assert done.returncode
    assert "2 processes: a SAM small enough for this script needs one" in done.stderr


def test_processes_that_do_not_work_together_are_refused(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    given = accelerator_of(monkeypatch)
    with pytest.raises(ValueError, match="2 processes were started, and 1 work together on cpu"):
        processes.build_accelerator()
    (patience,) = given["kwargs_handlers"]
    assert patience.timeout == timedelta(hours=3)  # one process may validate as long as that


def accelerator_of(monkeypatch, precision="no"):
    """What the next `build_accelerator` tells accelerate."""
    given = {}

    def accelerator(**options):
        given.update(options)
        return SimpleNamespace(num_processes=1, device=torch.device("cpu"), mixed_precision=precision)

    monkeypatch.setattr(processes, "Accelerator", accelerator)
    return given


def test_a_mac_trains_on_its_processor(monkeypatch):
    given = accelerator_of(monkeypatch)
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: True)
    for is_a_mac in (True, False):
        monkeypatch.setattr(torch.backends.mps, "is_available", lambda: is_a_mac)  # noqa: B023
        processes.build_accelerator()
        assert given["cpu"] is is_a_mac


def test_float16_is_refused(monkeypatch):
    accelerator_of(monkeypatch, "fp16")
    with pytest.raises(ValueError, match="mixed precision fp16: must be no or bf16"):
        processes.build_accelerator()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--train_data", "nowhere.parquet"], "nowhere.parquet"),
        (["--train_data", "PARQUET,maskss=regions"], "no option 'maskss'"),
        (["--train_data", "PARQUET", "--surrogate", "vgg"], "'vgg': must be sam, or a victim of unet"),
        (["--train_data", "PARQUET", "--surrogate", "sam", "unet"], "1 values for 2 surrogates"),
        (
            ["--train_data", "PARQUET", "--surrogate", "unet", "--surrogate_size", "100"],
            "100: a U-Net needs a multiple",
        ),
        (
            ["--train_data", "PARQUET", "--surrogate", "unet", "--surrogate_encoder", "mae"],
            "mae is for a sam surrogate",
        ),
        (["--train_data", "PARQUET", "--alternation", "week"], "alternation='week'"),
        (["--train_data", "PARQUET", "--tracker", "paper"], "--tracker paper"),
        (["--train_data", "PARQUET", "--push_to_hub"], "needs --hub_model_id"),
        (["--train_data", "PARQUET", "--min_scale", "3"], "scales from 3 to 2: the first must be above 0"),
        (["--train_data", "PARQUET", "--sam", str(default_checkpoint())], "pass --stretch True"),
    ],
)
def test_requests_that_make_no_sense_are_named(arguments, message, parquet, tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(str(SCRIPTS))
    import train_generator

    arguments = [argument.replace("PARQUET", parquet) for argument in arguments]
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        train_generator.main([*SMALL, "--tracker", "none", *arguments, "--output_dir", str(tmp_path / "run")])
    assert not (tmp_path / "run").exists()
