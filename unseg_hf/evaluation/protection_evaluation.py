"""Does a noise protect? Victims trained on published files, tested on clean images, control noises beside it."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any

import unseg_hf
from unseg_hf.evaluation.controls import UNWEIGHTED
from unseg_hf.evaluation.post_processing import POST_PROCESSINGS
from unseg_hf.evaluation.published_images import NOISES, ParquetRecords, noise_settings, publish, victim_arrays


@dataclass
class ProtectionEvaluationConfig:
    """Options of an evaluation; the help texts of the fields are their documentation.

    Raises:
        ValueError: a name is unknown or stands twice, or a number is out of its range.
    """

    train: str = field(metadata={"help": "Parquet file of the images to publish (columns name, image, mask)."})
    test: str = field(metadata={"help": "Parquet file of the clean held-out test images (same columns)."})
    output: str = field(metadata={"help": "Folder for the published files, results.json and results.md."})
    model: str | None = field(
        default=None,
        metadata={"help": "Checkpoint of the generator: a folder or Hub id; default: the embedded one."},
    )
    noises: list[str] = field(
        default_factory=lambda: ["clean", "generator", "random", "stripes"],
        metadata={"help": f"Rows of the table: of {', '.join(NOISES)}."},
    )
    post_processings: list[str] = field(
        default_factory=lambda: ["none", "jpeg75"],
        metadata={"help": f"Columns of the table: of {', '.join(POST_PROCESSINGS)}."},
    )
    seeds: list[int] = field(
        default_factory=lambda: [0, 1, 2], metadata={"help": "Seeds of the victims; a claim needs at least three."}
    )
    epochs: int = field(default=8, metadata={"help": "Epochs of a victim."})
    size: int = field(
        default=96,
        metadata={"help": "Side of the square that images are resized to for the victim: a multiple of 16 from 32."},
    )
    batch_size: int = field(default=16, metadata={"help": "Images in a training step of a victim."})
    lr: float = field(default=1e-3, metadata={"help": "Highest learning rate of a victim (Adam, cosine decay)."})
    width: int = field(default=16, metadata={"help": "Channels of the victim's U-Net at half size."})
    epsilon: float = field(default=8.0, metadata={"help": "Bound of the noise in the mask, in grey levels of 255."})
    epsilon_background: float = field(
        default=2.0,
        metadata={
            "help": f"Bound of the noise outside the mask, in grey levels of 255; {', '.join(UNWEIGHTED)}: epsilon."
        },
    )
    max_train: int | None = field(
        default=None, metadata={"help": "Publish only the first N images, for a quick run; default: all."}
    )
    max_test: int | None = field(
        default=None, metadata={"help": "Test on only the first N images, for a quick run; default: all."}
    )
    device: str = field(default="cpu", metadata={"help": "Device that trains the victims: cpu, cuda or mps."})

    def __post_init__(self) -> None:
        for option, known in (("noises", NOISES), ("post_processings", tuple(POST_PROCESSINGS)), ("seeds", None)):
            values = getattr(self, option)
            unknown = [value for value in values if known and value not in known]
            if unknown:
                raise ValueError(f"{option}: unknown {unknown[0]!r}; use {', '.join(known)}")
            if not values or len(set(values)) < len(values):
                raise ValueError(f"{option} is {values}; give at least one, and each only once")
        for option in ("epochs", "batch_size", "width", "lr"):
            if getattr(self, option) <= 0:
                raise ValueError(f"{option} is {getattr(self, option)}; give a number above 0")
        # 32: at 16 the deepest features are one pixel, and batch norm cannot train on a last batch of one image.
        if self.size < 32 or self.size % 16:
            raise ValueError(f"size is {self.size}; give a multiple of 16, at least 32")
        if not 0 <= self.epsilon_background <= self.epsilon <= 255:
            raise ValueError(
                f"epsilon is {self.epsilon} and epsilon_background {self.epsilon_background}; "
                "give grey levels with 0 <= epsilon_background <= epsilon <= 255, such as 8 and 2"
            )

    def published_folder(self, noise: str) -> Path:
        """Folder of the published files of a noise."""
        return Path(self.output) / "published" / noise


def evaluate_protection(
    config: ProtectionEvaluationConfig, command: str = "", report: Callable[[str], None] = print
) -> dict[str, Any]:
    """Run the grid noise x post-processing x seed, one victim each, and write `results.json` and `results.md`.

    Both files are written anew after every victim. A second run with the same settings trains only the victims
    that `results.json` does not hold; it may name other noises, post-processings and seeds than the first.

    Args:
        config: the options.
        command: the command line, for the results files.
        report: gets one line of progress for each victim.

    Returns:
        What `results.json` holds: `command`, `settings`, `grid`, `threads`, `all_foreground_iou` (of a victim that
        calls every pixel foreground), for each noise its `settings` and what was `measured` on its files, and every
        victim's `noise`, `post_processing`, `seed`, `foreground_iou` (in [0, 1], on the clean test images) and
        `seconds`.

    Raises:
        FileNotFoundError: a Parquet file is missing.
        ValueError: the data do not fit (see [`ParquetRecords`]), a test image is also a training image, or the
            output folder holds results of other settings.
    """
    import torch

    from unseg_hf.evaluation.victims import foreground_iou, train_victim

    output = Path(config.output)
    train = ParquetRecords(config.train, config.max_train)
    test = ParquetRecords(config.test, config.max_test)
    held_in = set(train.images)
    for name, image in zip(test.names, test.images, strict=True):
        if image in held_in:
            raise ValueError(f"the test image {name!r} of {config.test} is also a training image; test on others")
    budget = {
        "epsilon": config.epsilon / 255,
        "epsilon_background": config.epsilon_background / 255,
        "model": config.model,
    }
    results = _open_results(output / "results.json", _victim_settings(config, train, test))
    results["command"] = command
    results["grid"] = {key: getattr(config, key) for key in ("noises", "post_processings", "seeds")}
    results["threads"] = torch.get_num_threads()
    clean_images, clean_masks = map(torch.from_numpy, victim_arrays(test, config.size))
    results["all_foreground_iou"] = clean_masks.float().mean().item()
    # Every noise is published and measured before the first victim, so that what can fail fails in the first minutes.
    for noise in config.noises:
        settings = noise_settings(train, noise, **budget)
        if noise in results["noises"]:
            _refuse_other_settings(output / "results.json", results["noises"][noise]["settings"], settings)
        measured = publish(train, noise, config.published_folder(noise), **budget)
        results["noises"][noise] = {"settings": settings, "measured": asdict(measured)}
        report(
            f"published {noise}: {measured.images} files, largest change {measured.max_inside}/255 in the mask, "
            f"{measured.max_outside}/255 outside"
        )

    done = {(victim["noise"], victim["post_processing"], victim["seed"]) for victim in results["victims"]}
    count = len(config.noises) * len(config.post_processings) * len(config.seeds)
    position = 0
    for noise in config.noises:
        folder = config.published_folder(noise)
        for post_processing in config.post_processings:
            pending = [seed for seed in config.seeds if (noise, post_processing, seed) not in done]
            position += len(config.seeds) - len(pending)
            if not pending:
                continue
            images, masks = map(torch.from_numpy, victim_arrays(train, config.size, folder, post_processing))
            for seed in pending:
                start = time.perf_counter()
                victim = train_victim(
                    images,
                    masks,
                    epochs=config.epochs,
                    batch_size=config.batch_size,
                    lr=config.lr,
                    seed=seed,
                    device=config.device,
                    width=config.width,
                )
                result = {
                    "noise": noise,
                    "post_processing": post_processing,
                    "seed": seed,
                    "foreground_iou": foreground_iou(victim, clean_images, clean_masks),
                    "seconds": round(time.perf_counter() - start, 1),
                }
                results["victims"].append(result)
                _write_results(output, results)
                position += 1
                report(
                    f"[{position}/{count}] {noise}, {post_processing}, seed {seed}: "
                    f"foreground IoU {result['foreground_iou']:.3f} in {result['seconds']:.1f} s"
                )
    _write_results(output, results)
    return results


def _victim_settings(
    config: ProtectionEvaluationConfig, train: ParquetRecords, test: ParquetRecords
) -> dict[str, Any]:
    settings = {key: getattr(config, key) for key in ("epochs", "size", "batch_size", "lr", "width", "device")}
    settings |= {"epsilon": config.epsilon, "epsilon_background": config.epsilon_background}
    settings |= {"train": train.fingerprint(), "train_images": len(train)}
    settings |= {"test": test.fingerprint(), "test_images": len(test)}
    settings |= {f"{package}_version": version(package) for package in ("torch", "pillow", "numpy")}
    return settings | {"unseg_hf_version": unseg_hf.__version__}


def _open_results(file: Path, settings: dict[str, Any]) -> dict[str, Any]:
    if not file.is_file():
        return {"settings": settings, "noises": {}, "victims": []}
    results = json.loads(file.read_text())
    _refuse_other_settings(file, results["settings"], settings)
    return results


def _refuse_other_settings(file: Path, stored: dict[str, Any], wanted: dict[str, Any]) -> None:
    for key in stored.keys() | wanted.keys():
        if stored.get(key) != wanted.get(key):
            raise ValueError(
                f"{file} holds results of {key} {stored.get(key)!r}, this run has {wanted.get(key)!r}; "
                "choose another output folder, or remove that file"
            )


def _write_results(output: Path, results: dict[str, Any]) -> None:
    output.mkdir(parents=True, exist_ok=True)
    for name, text in (("results.json", json.dumps(results, indent=2)), ("results.md", results_table(results))):
        partial = output / f"{name}.partial"
        partial.write_text(text + "\n")
        os.replace(partial, output / name)


def results_table(results: dict[str, Any]) -> str:
    """Lay out the results of [`evaluate_protection`] as Markdown: rows = noises, columns = post-processings.

    A cell is the mean foreground IoU over the seeds with its smallest and largest value; `n of m` marks a cell whose
    victims are not all trained yet. Noises that are not weighted by the mask are marked as such, as their budget is
    larger.
    """
    settings, grid = results["settings"], results["grid"]
    columns = ["noise", *grid["post_processings"], "PSNR (dB)", "largest change in the mask", "outside"]
    lines = ["| " + " | ".join(columns) + " |", "|---" * len(columns) + "|"]
    for noise in grid["noises"]:
        measured = results["noises"][noise]["measured"]
        cells = [_cell(results, noise, post_processing) for post_processing in grid["post_processings"]]
        psnr = "unchanged" if measured["mean_psnr"] is None else f"{measured['mean_psnr']:.1f}"
        bounds = [f"{measured[key]}/255" for key in ("max_inside", "max_outside")]
        label = f"{noise} (not weighted by the mask)" if noise in UNWEIGHTED else noise
        lines.append("| " + " | ".join([label, *cells, psnr, *bounds]) + " |")
    seeds = ", ".join(map(str, grid["seeds"]))
    few_seeds = "" if len(grid["seeds"]) >= 3 else " **Fewer than three seeds are too few for a claim.**"
    larger_budget = (
        f" A noise that is not weighted by the mask has the bound {settings['epsilon']:g}/255 outside it too, and so "
        "spends more than the other rows."
        if set(UNWEIGHTED) & set(grid["noises"])
        else ""
    )
    paragraphs = [
        "# Protection evaluation",
        f"Foreground IoU of victims on {settings['test_images']} clean test images (data-set level: sum of "
        "intersections over sum of unions): mean (smallest to largest) over the victims' seeds "
        f"{seeds}.{few_seeds} The victims are U-Nets trained from scratch on {settings['train_images']} published "
        "images, post-processed as the column says. Lower is better protected, and a noise counts for as much as it "
        "does better than the controls. A victim that calls every pixel foreground would have "
        f"{results['all_foreground_iou']:.3f}. PSNR and largest change are measured on the published PNG files, "
        f"before post-processing.{larger_budget}",
        "\n".join(lines),
        f"```\n{results['command']}\n```",
        f"```json\n{json.dumps(settings, indent=2)}\n```",
    ]
    return "\n\n".join(paragraphs)


def _cell(results: dict[str, Any], noise: str, post_processing: str) -> str:
    seeds = results["grid"]["seeds"]
    figures = [
        victim["foreground_iou"]
        for victim in results["victims"]
        if (victim["noise"], victim["post_processing"]) == (noise, post_processing) and victim["seed"] in seeds
    ]
    if not figures:
        return "not yet"
    partial = "" if len(figures) == len(seeds) else f", {len(figures)} of {len(seeds)}"
    return f"{sum(figures) / len(figures):.3f} ({min(figures):.3f} to {max(figures):.3f}{partial})"
