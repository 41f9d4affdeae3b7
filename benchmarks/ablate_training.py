"""What each choice of the training recipe does, at small scale: one choice changed at a time, three seeds.

    python benchmarks/ablate_training.py --ecssd ecssd/train.parquet --bsds bsds500/train.parquet \\
        --output runs/ablation

Of ECSSD's training images the first 300 (with BSDS500's) train the generators, the next 360 are protected and train
the victims, the last 101, clean, test them; no test split is looked at. A generator of seed s meets a victim of seed
s. The same command again goes on where an interrupted one stopped. `results.md` and `results.json` have every figure.
"""

import argparse
import json
import subprocess
import sys
from pathlib import Path
from statistics import mean

SCRIPTS = Path(__file__).parent.parent / "training_scripts"
# Without post-processing in training: these victims meet none, and what is asked here shows in fewer steps.
SMALL = {
    "hidden_size": 64, "layers": 4, "decoder_size": 64, "image_size": 128, "batch_size": 4, "max_steps": 600,
    "epochs": 100, "learning_rate": 1e-3, "points": 2000, "postprocess_probability": 0, "save_every": 0,
    "tracker": "none", "save_code": False,
}  # fmt: skip
BASE = "tiny.json, smaller and shorter"
CELLS = {
    BASE: {},
    "no epsilon curriculum": {"epsilon_start": 1, "epsilon_warmup": 0},
    "epsilon generalization: trained at 1/255 and 0.25/255": {"epsilon": 1 / 255, "epsilon_background": 0.25 / 255},
    "label modification": {"label_modification": True},
    "alternation by epoch, 1 : 3": {"alternation": "epoch", "epoch_size": 200},
    "alternation by step, 1 : 1": {"alternation": "step", "surrogate_turns": 1, "generator_turns": 1},
    "pretrained SAM, frozen": {"sam": "the base run's"},
}
CONTROLS = ("clean", "random", "stripes")
VICTIM_EPOCHS = 10


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--ecssd", required=True, help="parquet file of ECSSD's training images")
    parser.add_argument("--bsds", required=True, help="parquet file of BSDS500's training images")
    parser.add_argument("--output", type=Path, required=True, help="folder for generators, victims' files and results")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    options = parser.parse_args()
    parts = split(options.ecssd, options.output)
    for seed in options.seeds:
        for cell, changes in CELLS.items():
            folder = options.output / f"{slug(cell)}-{seed}"
            if not (folder / "model.safetensors").is_file():
                train(folder, parts["generator"], options.bsds, seed, changes, options.output)
            evaluate(folder / "victim", parts, ["generator"], seed, str(folder))
            summarise(options.output, options.seeds)
        evaluate(options.output / f"controls-{seed}", parts, list(CONTROLS), seed, None)
        summarise(options.output, options.seeds)


def slug(name: str) -> str:
    return "-".join("".join(c if c.isalnum() else " " for c in name).split())


def split(ecssd: str, output: Path) -> dict[str, str]:
    """ECSSD's training images in three parts, as parquet files."""
    import pyarrow.parquet as pq

    output.mkdir(parents=True, exist_ok=True)
    table = pq.read_table(ecssd)
    parts = {}
    for name, start, count in (("generator", 0, 300), ("victim", 300, 360), ("test", 660, 101)):
        parts[name] = str(output / f"{name}.parquet")
        pq.write_table(table.slice(start, count), parts[name])
    return parts


def train(folder: Path, ecssd: str, bsds: str, seed: int, changes: dict, output: Path) -> None:
    settings = SMALL | {"seed": seed, "output_dir": folder} | changes
    if "sam" in settings:
        from unseg_hf import UnSegModel

        settings["sam"] = folder.with_name(f"{folder.name}-sam")
        UnSegModel.from_pretrained(output / f"{slug(BASE)}-{seed}").sam.save_pretrained(settings["sam"])
    if any(folder.glob("checkpoints/step-*")):
        settings["resume"] = True
    command = [sys.executable, SCRIPTS / "train_generator.py", "--config", SCRIPTS / "configs" / "tiny.json"]
    command += ["--train_data", ecssd, f"{bsds},masks=regions"]
    command += [word for name, value in settings.items() for word in (f"--{name}", str(value))]
    subprocess.run(list(map(str, command)), check=True)


def evaluate(output: Path, parts: dict[str, str], noises: list[str], seed: int, model: str | None) -> None:
    from unseg_hf.evaluation.audit import Audit, AuditConfig
    from unseg_hf.evaluation.labelled_images import DatasetRows, LabelledImages

    train = LabelledImages(DatasetRows(parts["victim"]))
    test = LabelledImages(DatasetRows(parts["test"]), like=train)
    config = AuditConfig(
        output=output, model=model, noises=noises, treatments=["none"], victims=["unet"], seeds=[seed],
        epochs=VICTIM_EPOCHS,
    )  # fmt: skip
    Audit(config, train, test).run()


def summarise(output: Path, seeds: list[int]) -> None:
    """`results.json` and `results.md`, from the files of every victim there is."""
    ious: dict[str, dict[int, float]] = {}
    for seed in seeds:
        for cell in CELLS:
            file = output / f"{slug(cell)}-{seed}" / "victim" / "results.json"
            if file.is_file():
                for victim in json.loads(file.read_text())["cells"]:
                    ious.setdefault(cell, {})[seed] = victim["scores"]["foreground_iou"]
        file = output / f"controls-{seed}" / "results.json"
        if file.is_file():
            for victim in json.loads(file.read_text())["cells"]:
                ious.setdefault(f"control: {victim['noise']}", {})[seed] = victim["scores"]["foreground_iou"]
    lines = ["| recipe | IoU of victims on clean images, mean | by seed |", "|---|---|---|"]
    for name, values in ious.items():
        by_seed = ", ".join(f"{seed}: {value:.3f}" for seed, value in values.items())
        lines.append(f"| {name} | {mean(values.values()):.3f} | {by_seed} |")
    settings = {"small": SMALL, "cells": CELLS, "victim_epochs": VICTIM_EPOCHS, "seeds": seeds}
    (output / "results.json").write_text(json.dumps({"settings": settings, "foreground_iou": ious}, indent=2) + "\n")
    (output / "results.md").write_text("\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
