import io
import json
import os
import re
import runpy
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from unittest.mock import Mock

import numpy as np
import pytest
import torch
from datasets import Dataset, Features, Image, Value
from PIL import Image as PILImage
from torchmetrics.functional.image import peak_signal_noise_ratio
from transformers import SamConfig

import unseg_hf
from unseg_hf.evaluation import victims
from unseg_hf.evaluation.controls import CONTROLS
from unseg_hf.evaluation.protection_evaluation import ProtectionEvaluationConfig, evaluate_protection
from unseg_hf.evaluation.published_images import ParquetRecords, noise_settings, publish, victim_arrays

SCRIPT = Path(__file__).parents[1] / "training_scripts" / "evaluate_protection.py"
BUDGET = {"epsilon": 8 / 255, "epsilon_background": 2 / 255}
pytestmark = pytest.mark.usefixtures("one_thread")


def discs(count: int, height: int, width: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Reddish discs on a bluish ground: (count, height, width, 3) uint8 and (count, height, width) bool."""
    rng = np.random.default_rng(seed)
    rows, columns = np.mgrid[:height, :width]
    images = rng.integers(90, 130, (count, height, width, 3))
    masks = np.zeros((count, height, width), bool)
    for image, mask in zip(images, masks, strict=True):
        row, column, radius = rng.integers(10, height - 10), rng.integers(10, width - 10), rng.integers(6, 10)
        mask[:] = (rows - row) ** 2 + (columns - column) ** 2 < radius**2
        image[..., 0][mask] += 60
        image[..., 2][~mask] += 60
    return images.astype(np.uint8), masks


def columns(images: np.ndarray, masks: np.ndarray) -> dict:
    def encoded(array: np.ndarray, file_format: str) -> dict:
        buffer = io.BytesIO()
        PILImage.fromarray(array).save(buffer, file_format)
        return {"bytes": buffer.getvalue(), "path": None}

    return {
        "name": [f"{index:03d}" for index in range(len(images))],
        "image": [encoded(image, "JPEG") for image in images],
        "mask": [encoded(mask, "PNG") for mask in masks],
    }


@pytest.fixture
def config(tmp_path: Path) -> dict:
    features = Features({"name": Value("string"), "image": Image(), "mask": Image()})
    small = {"noises": ["clean", "random", "stripes"], "seeds": [0, 1], "epochs": 1, "size": 32, "batch_size": 4}
    for split, count in (("train", 10), ("test", 4)):
        small[split] = str(tmp_path / f"{split}.parquet")
        Dataset.from_dict(columns(*discs(count, 44, 52, seed=count)), features=features).to_parquet(small[split])
    return {**small, "output": str(tmp_path / "run")}


def evaluate(config: dict, **changes) -> dict:
    return evaluate_protection(ProtectionEvaluationConfig(**{**config, **changes}))


def as_arguments(config: dict) -> list[str]:
    words = ([f"--{key}", *(value if isinstance(value, list) else [value])] for key, value in config.items())
    return [str(word) for option in words for word in option]


def run_script(config: dict, **changes) -> None:
    runpy.run_path(str(SCRIPT))["main"](as_arguments({**config, **changes}))


def test_script_measures_the_files_writes_both_results_and_resumes(config: dict, monkeypatch):
    output = Path(config["output"])
    one_thread = {**os.environ, "OMP_NUM_THREADS": "1"}
    subprocess.run([sys.executable, SCRIPT, *as_arguments(config)], check=True, env=one_thread)
    results = json.loads((output / "results.json").read_text())
    assert all(0 <= victim["foreground_iou"] <= 1 for victim in results["victims"])

    assert {folder.name for folder in (output / "published").iterdir()} == set(config["noises"])
    for noise, inside, outside in (("clean", 0, 0), ("random", 8, 2), ("stripes", 8, 2)):
        measured = results["noises"][noise]["measured"]
        assert (measured["max_inside"], measured["max_outside"]) == (inside, outside)
        psnrs = []
        for record in ParquetRecords(config["train"]):
            file = PILImage.open(output / "published" / noise / f"{record.name}.png")
            pair = [torch.from_numpy(np.asarray(image).astype(np.float32)) for image in (file, record.image)]
            psnrs.append(peak_signal_noise_ratio(*pair, data_range=255.0).item())
        assert measured["mean_psnr"] == (None if noise == "clean" else pytest.approx(np.mean(psnrs), abs=1e-3))

    table = (output / "results.md").read_text()
    assert len(results["victims"]) == 3 * 2 * 2
    ious = {tuple(victim.values())[:3]: victim["foreground_iou"] for victim in results["victims"]}
    figures = [ious["random", "jpeg75", seed] for seed in (0, 1)]
    cell = f"{np.mean(figures):.3f} ({min(figures):.3f} to {max(figures):.3f})"
    row = next(line for line in table.splitlines() if line.startswith("| random |"))
    assert cell in row.split(" | ")
    assert row.endswith("| 8/255 | 2/255 |")
    assert " ".join(as_arguments(config)) in table
    assert "not weighted by the mask" not in table

    trained, tested = Mock(wraps=victims.train_victim), Mock(wraps=victims.foreground_iou)
    monkeypatch.setattr(victims, "train_victim", trained)
    monkeypatch.setattr(victims, "foreground_iou", tested)
    written = {file: file.stat().st_mtime_ns for file in output.glob("published/*/*")}
    run_script(config)
    trained.assert_not_called()

    lost = results["victims"].pop(7)
    (output / "results.json").write_text(json.dumps(results))
    run_script(config)
    trained.assert_called_once()
    assert (lost["noise"], lost["post_processing"], lost["seed"]) == ("random", "jpeg75", 1)
    assert trained.call_args.kwargs["seed"] == 1
    published = victim_arrays(ParquetRecords(config["train"]), 32, output / "published" / "random", "jpeg75")
    clean = victim_arrays(ParquetRecords(config["test"]), 32)
    for given, expected in ((trained.call_args.args, published), (tested.call_args.args[1:], clean)):
        for tensor, array in zip(given, expected, strict=True):
            np.testing.assert_array_equal(tensor.numpy(), array)
    resumed = json.loads((output / "results.json").read_text())["victims"][-1]
    assert {**resumed, "seconds": 0} == {**lost, "seconds": 0}
    assert {file: file.stat().st_mtime_ns for file in output.glob("published/*/*")} == written

    with pytest.raises(ValueError, match="results of epochs 1, this run has 2; choose another output folder"):
        run_script(config, epochs=2)


def test_victims_see_the_post_processed_files_and_binary_masks(config: dict, tmp_path: Path):
    records = ParquetRecords(config["train"], limit=3)
    publish(records, "stripes", tmp_path / "stripes", **BUDGET)
    images, masks = victim_arrays(records, 32, tmp_path / "stripes", "jpeg75")
    assert images.shape == (3, 3, 32, 32)
    assert set(np.unique(masks)) == {0, 1}
    for index, record in enumerate(records):
        buffer = io.BytesIO()
        PILImage.open(tmp_path / "stripes" / f"{record.name}.png").save(buffer, "JPEG", quality=75)
        pixels = torch.from_numpy(np.array(PILImage.open(buffer))).permute(2, 0, 1)[None].float()
        resized = torch.nn.functional.interpolate(pixels, (32, 32), mode="bilinear", antialias=True)[0]
        assert np.abs(images[index] - resized.numpy()).max() <= 1.5
    untouched, _ = victim_arrays(records, 32, tmp_path / "stripes", "none")
    assert (untouched != images).any()


def test_a_victim_sees_a_halved_image_whole_and_at_its_own_size(config: dict):
    records = ParquetRecords(config["train"], limit=3)
    images, masks = victim_arrays(records, 64, post_processing="half")
    np.testing.assert_array_equal(masks, victim_arrays(records, 64)[1])
    for index, record in enumerate(records):
        pixels = torch.from_numpy(np.array(record.image)).permute(2, 0, 1)[None].float()
        for size in ((22, 26), (64, 64)):
            pixels = torch.nn.functional.interpolate(pixels, size, mode="bilinear", antialias=True)
        assert np.abs(images[index] - pixels[0].numpy()).max() <= 2


@pytest.mark.parametrize("noise", CONTROLS)
def test_every_control_is_published_with_its_budget(noise: str, config: dict, tmp_path: Path):
    records = ParquetRecords(config["train"], limit=2)
    measured = publish(records, noise, tmp_path / noise, **BUDGET)
    settings = noise_settings(records, noise, **BUDGET, model=None)
    outside = 8 if noise == "whole" else 2
    assert (measured.max_inside, measured.max_outside) == (8, outside)
    assert (settings["epsilon"], settings["epsilon_background"]) == (8 / 255, outside / 255)
    for record in records:
        file = np.asarray(PILImage.open(tmp_path / noise / f"{record.name}.png")).astype(int)
        difference = np.abs(file - np.asarray(record.image))
        np.testing.assert_array_equal(difference.max(axis=2), np.where(record.mask, 8, outside))


def test_table_says_which_noise_has_a_larger_budget_and_holds_every_column(config: dict):
    post_processings = ["none", "half", "greyscale+jpeg75"]
    changes = {"noises": ["coarse", "whole"], "post_processings": post_processings, "seeds": ["0"]}
    run_script(config, **changes)
    table = (Path(config["output"]) / "results.md").read_text()
    assert "| noise | none | half | greyscale+jpeg75 | PSNR (dB) |" in table
    rows = {line.split(" | ")[0]: line for line in table.splitlines() if line.startswith("| ")}
    assert rows["| coarse"].endswith("| 8/255 | 2/255 |")
    assert rows["| whole (not weighted by the mask)"].endswith("| 8/255 | 8/255 |")
    assert "not weighted by the mask has the bound 8/255 outside it too" in table


def test_published_files_do_not_depend_on_the_other_images(config: dict, tmp_path: Path):
    publish(ParquetRecords(config["train"]), "random", tmp_path / "all", **BUDGET)
    publish(ParquetRecords(config["train"], limit=2), "random", tmp_path / "few", **BUDGET)
    assert (tmp_path / "few" / "001.png").read_bytes() == (tmp_path / "all" / "001.png").read_bytes()
    assert (tmp_path / "all" / "000.png").read_bytes() != (tmp_path / "all" / "001.png").read_bytes()


def test_other_settings_replace_published_files_but_never_a_foreign_folder(config: dict, tmp_path: Path):
    records = ParquetRecords(config["train"], limit=2)
    publish(records, "random", tmp_path / "random", **BUDGET)
    (tmp_path / "random" / "000.png").unlink()
    assert publish(records, "random", tmp_path / "random", **BUDGET).max_inside == 8
    assert (tmp_path / "random" / "000.png").is_file()
    measured = publish(records, "random", tmp_path / "random", epsilon=4 / 255, epsilon_background=1 / 255)
    assert (measured.max_inside, measured.max_outside) == (4, 1)

    (tmp_path / "photos").mkdir()
    (tmp_path / "photos" / "000.png").touch()
    with pytest.raises(FileExistsError, match=r"photos exists and has no manifest\.json"):
        publish(records, "random", tmp_path / "photos", **BUDGET)
    assert (tmp_path / "photos" / "000.png").is_file()


def test_a_generator_over_the_budget_publishes_nothing(config: dict, tmp_path: Path, monkeypatch):
    def overspend(image, mask, epsilon, epsilon_background):
        pixels = np.asarray(image).astype(int) + np.where(mask, 8, 3)[..., None]
        return SimpleNamespace(image=PILImage.fromarray(pixels.clip(0, 255).astype(np.uint8)))

    protector = SimpleNamespace(from_pretrained=lambda model: SimpleNamespace(protect=overspend))
    monkeypatch.setattr(unseg_hf, "Protector", protector, raising=False)
    with pytest.raises(ValueError, match="differ by 3 grey levels outside the mask, over the budget of 2"):
        publish(ParquetRecords(config["train"]), "generator", tmp_path / "generator", **BUDGET)
    assert not (tmp_path / "generator").exists()


def untrained_generator(folder: Path, seed: int) -> str:
    vision = {"hidden_size": 16, "output_channels": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    vision |= {"image_size": 64, "global_attn_indexes": [0], "mlp_dim": 32, "num_pos_feats": 8}
    decoder = {"hidden_size": 16, "mlp_dim": 32, "num_attention_heads": 2, "iou_head_hidden_dim": 16}
    prompts = {"hidden_size": 16, "image_size": 64}
    sam = SamConfig(vision_config=vision, prompt_encoder_config=prompts, mask_decoder_config=decoder)
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        unseg_hf.UnSegModel(unseg_hf.UnSegConfig(sam_config=sam)).save_pretrained(folder)
    unseg_hf.UnSegProcessor.for_image_size(64).save_pretrained(folder)
    return str(folder)


def test_generator_row_publishes_the_protectors_pixels_and_follows_its_weights(config: dict, tmp_path: Path):
    model = untrained_generator(tmp_path / "generator", seed=0)
    results = evaluate(config, noises=["generator"], post_processings=["none"], seeds=[0], model=model)
    measured = results["noises"]["generator"]["measured"]
    assert 0 < measured["max_inside"] <= 8
    assert measured["max_outside"] <= 2
    file = tmp_path / "run" / "published" / "generator" / "000.png"
    record = ParquetRecords(config["train"])[0]
    protected = unseg_hf.Protector.from_pretrained(model).protect(record.image, mask=record.mask, **BUDGET)
    np.testing.assert_array_equal(np.asarray(PILImage.open(file)), np.asarray(protected.image))

    untrained_generator(tmp_path / "generator", seed=1)
    with pytest.raises(ValueError, match=r"results of model .+ choose another output folder"):
        evaluate(config, noises=["generator"], post_processings=["none"], seeds=[0], model=model)


@pytest.mark.skipif(not unseg_hf.default_checkpoint().is_dir(), reason="no embedded checkpoint")
def test_the_embedded_generator_is_the_default(config: dict, tmp_path: Path):
    measured = publish(ParquetRecords(config["train"], limit=2), "generator", tmp_path / "generator", **BUDGET)
    assert measured.unchanged == 0
    assert measured.max_inside <= 8


IMAGES, MASKS = discs(2, 44, 52, seed=2)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"mask": None}, "has no column mask; rename its columns to name, image, mask"),
        ({"name": [], "image": [], "mask": []}, "has no rows; give a data set with at least one image"),
        ({"name": ["same", "same"]}, "'same' stands in several rows; make names unique"),
        ({"name": ["a", "../up"]}, "'../up' is no file name; rename it"),
        ({"image": [{"bytes": None, "path": "a.jpg"}] * 2}, "'image' has rows without image bytes"),
        ({"mask": columns(IMAGES, MASKS[:, :9])["mask"]}, "the mask of '000' has shape (9, 52), its image (44, 52)"),
        ({"mask": columns(IMAGES, MASKS.cumsum(2).astype(np.uint8))["mask"]}, "several foreground values, [1, 2, 3,"),
    ],
    ids=["no mask", "no rows", "repeated name", "path as name", "no bytes", "mask of another size", "many classes"],
)
def test_unfit_data_are_refused_with_the_fix(changes: dict, message: str, config: dict, tmp_path: Path):
    table = {**columns(IMAGES, MASKS), **changes}
    file = str(tmp_path / "bad.parquet")
    Dataset.from_dict({name: cells for name, cells in table.items() if cells is not None}).to_parquet(file)
    with pytest.raises(ValueError, match=re.escape(message)):
        evaluate(config, train=file)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"noises": ["clean", "plaid"]}, "noises: unknown 'plaid'; use clean, generator, random, stripes"),
        ({"post_processings": ["jpeg7"]}, "post_processings: unknown 'jpeg7'; use none, jpeg75, jpeg50, half"),
        ({"seeds": [1, 1]}, "seeds is [1, 1]; give at least one, and each only once"),
        ({"size": 40}, "size is 40; give a multiple of 16, at least 32"),
        ({"epsilon": 300.0}, "epsilon is 300.0 and epsilon_background 2.0; give grey levels"),
        ({"epochs": 0}, "epochs is 0; give a number above 0"),
    ],
)
def test_script_refuses_bad_options_with_the_fix(changes: dict, message: str, config: dict, capsys):
    with pytest.raises(SystemExit):
        run_script(config, **changes)
    assert message in capsys.readouterr().err


def test_missing_files_and_training_images_among_the_test_images_are_refused(config: dict):
    with pytest.raises(FileNotFoundError, match=r"nowhere\.parquet is no file"):
        evaluate(config, test="nowhere.parquet")
    with pytest.raises(ValueError, match=r"test image '000' of .+ is also a training image"):
        evaluate(config, test=config["train"])
