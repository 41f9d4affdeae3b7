"""The audit: data set -> protect or control -> files -> treat -> train a victim -> test on clean images -> report.

Every stage is kept under a name made from everything that decides it, so that a stopped run goes on where it was, and
a changed setting makes anew only what it touches.
"""

from __future__ import annotations

import hashlib
import io
import json
import time
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import asdict, dataclass
from datetime import timedelta
from functools import cache, cached_property
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

import unseg_hf
from unseg_hf.configuration_unseg import UnSegConfig
from unseg_hf.evaluation.augmentation import STRONG_VERSION
from unseg_hf.evaluation.controls import CONTROLS
from unseg_hf.evaluation.labelled_images import LabelledImage, LabelledImages
from unseg_hf.evaluation.post_processing import POST_PROCESSINGS
from unseg_hf.evaluation.published_images import (
    ATTACKER_IMAGES,
    DENOISER,
    GENERATORS,
    NOISES,
    PUBLIC,
    PUBLIC_ROUNDS,
    TREATMENTS,
    Measured,
    annotation_squares,
    clean_squares,
    noise_settings,
    protection_of,
    publish,
    published_files,
    treat,
)
from unseg_hf.evaluation.report import RESULTS, write_report
from unseg_hf.evaluation.tasks import check_scorable, evaluate_victim, score_name, trivial_score
from unseg_hf.evaluation.victims.base import Victim
from unseg_hf.evaluation.victims.training import TRAININGS, TrainingData, steps_an_epoch, train_victim
from unseg_hf.image_files import put_in_place, sha256_of
from unseg_hf.inputs import TINTS
from unseg_hf.model_identity import model_identity
from unseg_hf.protection import default_checkpoint
from unseg_hf.worker_processes import alone

GRID = ("noises", "treatments", "victims", "trainings", "clean_shares", "seeds")
"""Options whose values span the grid; the others hold for all of its cells."""

VICTIM_SETTINGS = ("task", "epochs", "size", "batch_size", "lr", "preset", "device", "bf16")
"""Options that decide the figures of a victim, beside its cell and its images."""

VERSIONED = ("torch", "transformers", "pillow", "numpy", "kornia")
REPORT_EVERY = 60
"""Seconds between two reports of a run, whose plots take one or two."""

FIGURES = ("scores", "seconds")
"""What is kept of a cell."""

EXAMPLES = "examples.png"
EXAMPLE_SIDE = 160
"""Pixels of each that are shown, across and down."""


@dataclass
class AuditConfig:
    """What is trained and tested, beside the data.

    One thing is varied at a time: of `treatments`, `trainings` and `clean_shares` the first is the base, and all
    values of one meet the bases of the other two; noises, victims and seeds are crossed with everything.

    Args:
        output: folder for results, report and all that is kept between runs.
        task: "semantic", "instance", "panoptic", "detection" or "interactive".
        noises: of `published_images.NOISES`; what the training images carry.
        treatments: of `published_images.TREATMENTS`; what happens to them before the training.
        victims: names of `victims.build_victim`, each alone or as `name@checkpoint`.
        trainings: of `victims.training.TRAININGS`.
        clean_shares: in [0, 1); the share of the training images that stays clean. With noise "clean" only that share
            is trained on, for as many steps, so that a mixture stands beside its clean images alone.
        seeds: of the victims; a claim needs three at least.
        epochs: passes over the training images.
        size: side of the square that images are resized to, in pixels.
        batch_size: images in a step.
        lr: highest learning rate; None: each victim's own.
        preset: of the victims, "small" or "full".
        epsilon: bound of the noise in the region, in grey levels of 255; None: the generator's.
        epsilon_background: bound elsewhere; None: as much smaller as the generator's is. Controls get the same.
        model: checkpoint of the generator: a folder or Hub id; None: the embedded one.
        tint: when it takes a tint, "auto", "always" or "never", see [`Prompt`]; so do `bands`.
        device: where generator and victims run.
        bf16: train victims in bfloat16 autocast.
        examples: training images of which the report shows a part; 0 where they may not be published.

    Raises:
        ValueError: an unknown name or one that stands twice, or a number out of its range.
    """

    output: Path
    task: str = "semantic"
    noises: Sequence[str] = ("clean", "generator", *CONTROLS)
    treatments: Sequence[str] = tuple(POST_PROCESSINGS)
    victims: Sequence[str] = ("unet", "segformer")
    trainings: Sequence[str] = ("plain",)
    clean_shares: Sequence[float] = (0.0,)
    seeds: Sequence[int] = (0, 1, 2)
    epochs: int = 10
    size: int = 96
    batch_size: int = 16
    lr: float | None = None
    preset: str = "small"
    epsilon: float | None = None
    epsilon_background: float | None = None
    model: str | None = None
    tint: str = "auto"
    device: str = "cpu"
    bf16: bool = False
    examples: int = 2

    def __post_init__(self) -> None:
        from unseg_hf.evaluation.victims import victims_for

        self.output = Path(self.output)
        known_victims = victims_for(self.task)
        for option, known in (
            ("noises", NOISES),
            ("treatments", TREATMENTS),
            ("trainings", TRAININGS),
            ("victims", known_victims),
            ("clean_shares", None),
            ("seeds", None),
        ):
            values = list(getattr(self, option))
            setattr(self, option, values)
            names = [value.partition("@")[0] for value in values] if option == "victims" else values
            unknown = [name for name in names if known is not None and name not in known]
            if unknown:
                whose = f" for the task {self.task}" if option == "victims" else ""
                raise ValueError(f"{option}: unknown {unknown[0]!r}{whose}; use {', '.join(known)}")
            if not values or len(set(values)) < len(values):
                raise ValueError(f"{option} is {values}; give at least one, and each only once")
        if self.tint not in TINTS:
            raise ValueError(f"tint is {self.tint!r}; use one of {', '.join(TINTS)}")
        if len(self.clean_shares) > 1 and "clean" not in self.noises:
            raise ValueError(f"clean_shares is {self.clean_shares}, and noises has no 'clean': add it")
        if self.clean_shares[0] != 0 or not all(0 <= share < 1 for share in self.clean_shares):
            raise ValueError(f"clean_shares is {self.clean_shares}; give 0 and then shares below 1")
        for option in ("epochs", "batch_size", "size", "lr"):
            if getattr(self, option) is not None and not getattr(self, option) > 0:
                raise ValueError(f"{option} is {getattr(self, option)}; give a number above 0")
        if unfit := [seed for seed in self.seeds if seed < 0]:
            raise ValueError(f"seeds has {unfit[0]}; give whole numbers from 0 on")
        if self.examples < 0:
            raise ValueError(f"examples is {self.examples}; give 0 or more")
        generator = UnSegConfig.from_pretrained(default_checkpoint() if self.model is None else self.model)
        levels = (self.epsilon, self.epsilon_background)
        try:
            budget = generator.budget(*(None if level is None else level / 255 for level in levels))
        except ValueError as error:
            raise ValueError(
                f"epsilon is {self.epsilon} and epsilon_background {self.epsilon_background}; "
                "give grey levels with 0 <= epsilon_background <= epsilon <= 255, such as 8 and 2"
            ) from error
        self.epsilon, self.epsilon_background = (round(share * 255, 6) for share in budget)


@dataclass(frozen=True)
class Cell:
    """One victim: what it learns from, and how."""

    noise: str
    treatment: str
    victim: str
    training: str
    clean_share: float
    seed: int

    def __str__(self) -> str:
        parts = [self.victim, self.noise, self.treatment]
        parts += [] if self.training == "plain" else [f"{self.training} training"]
        parts += [f"{self.clean_share:.0%} clean"] if self.clean_share else []
        return ", ".join([*parts, f"seed {self.seed}"])


def plan(config: AuditConfig) -> list[Cell]:
    """The cells of the grid, the base of all first, and in each the seeds next to each other."""
    base = (config.treatments[0], config.trainings[0], config.clean_shares[0])
    lines = dict.fromkeys(
        [(treatment, *base[1:]) for treatment in config.treatments]
        + [(base[0], training, base[2]) for training in config.trainings]
        + [(*base[:2], share) for share in config.clean_shares]
    )
    return [
        Cell(noise, treatment, victim, training, share, seed)
        for treatment, training, share in lines
        for victim in config.victims
        for noise in config.noises
        for seed in config.seeds
    ]


class Audit:
    """A grid of victims over one data set.

    Args:
        config: the settings.
        train: the images that are published.
        test: the images that victims are tested on, which stay clean.
        attacker: what somebody who removes noise by a trained denoiser has of clean images; None: the test images.
        notes: sentences for the top of the report.
        command: the command line, for the report.
        say: gets each line of progress.

    Raises:
        ValueError: a test image is also a training image, the data have nothing to score, or a victim's checkpoint
            does not load.
        ImportError: a victim's package is not installed.
    """

    def __init__(
        self,
        config: AuditConfig,
        train: LabelledImages,
        test: LabelledImages,
        attacker: LabelledImages | None = None,
        notes: Sequence[str] = (),
        command: str = "",
        say: Callable[[str], None] = print,
    ) -> None:
        self.config, self.train, self.test = config, train, test
        self.attacker = (attacker or test).first(ATTACKER_IMAGES)
        self.notes, self.command, self.say = list(notes), command, say
        self._settings: dict[tuple[str, bool], dict[str, Any]] = {}
        self._known: dict[str, dict[str, Any]] = {}
        self._device = config.device
        both = set(train.digests) & set(test.digests)
        if both:
            name = test[test.digests.index(both.pop())].name
            raise ValueError(f"the test image {name!r} is also a training image; test on others")
        if attacker is not None and set(train.digests) & set(attacker.digests):
            raise ValueError(
                "the attacker's images are training images: whoever has those needs no denoiser; give others"
            )
        if config.task in ("instance", "panoptic", "detection") and not train.things:
            raise ValueError(
                f"{train.name} numbers no objects, which the task {config.task} needs; name the column that does "
                "(--instance-column)"
            )
        for victim in config.victims:
            # What is missing, a package or a checkpoint, is said before hours of work and not after them.
            if config.size % (multiple := self._victim(victim).size_multiple):
                raise ValueError(f"size {config.size}: the victim {victim} needs a multiple of {multiple}")
        for share in config.clean_shares:
            if share and round(share * len(train)) < 2:
                raise ValueError(
                    f"clean share {share:g}: of {len(train)} training images that is {round(share * len(train))}, and "
                    "a victim needs two"
                )
        check_scorable(config.task, self._test_data.labels, self._test_data.instances, len(train.classes))
        by_ap = score_name(config.task, len(train.classes)) == "ap"
        for package, needed in (("matplotlib", True), ("faster_coco_eval", by_ap)):
            if needed and find_spec(package) is None:
                raise ImportError(f"an audit of this task needs {package}; run pip install 'unseg-hf[audit]'")

    def run(self) -> dict[str, Any]:
        """Run what is not there yet, share it among accelerate's processes, and write results and report.

        Returns:
            What `results.json` holds, see [`unseg_hf.evaluation.report`]; nothing in the other processes.
        """
        from accelerate import PartialState
        from accelerate.utils import InitProcessGroupKwargs

        # A process that has finished its share waits for the slowest one, which may take hours.
        patience = InitProcessGroupKwargs(timeout=timedelta(days=30)).to_kwargs()
        config = self.config
        state = PartialState(cpu=config.device == "cpu", **patience)
        rank, world = state.process_index, state.num_processes
        if config.device == "cuda" and world > 1:
            # Not in the settings: a cell has one file, whichever process trained it.
            self._device = str(state.device)
        # One process of a launcher has the folder for all of them.
        config.output.mkdir(parents=True, exist_ok=True)
        with alone(config.output) if rank == 0 else nullcontext():
            return self._run(rank, world, state.wait_for_everyone)

    def _run(self, rank: int, world: int, wait_for_everyone: Callable[[], None]) -> dict[str, Any]:
        config = self.config
        cells = plan(config)
        if rank == 0:
            self._restore()
        for noise in config.noises[rank::world]:
            measured = self._publish(noise, self.train)
            self.say(
                f"published {noise}: {measured.images} files, largest change {measured.max_inside}/255 in the region, "
                f"{measured.max_outside}/255 elsewhere"
            )
            if DENOISER in config.treatments:
                self._publish(noise, self.attacker)
        wait_for_everyone()
        if rank == 0:
            self._write_examples()
        pending = [cell for cell in cells if not self._file(cell).is_file()]
        needed = dict.fromkeys(pair for cell in pending for pair in self._parts(cell))
        for noise, treatment in list(needed)[rank::world]:
            self.say(f"treating {noise}: {treatment}")
            attacker = (self._published(noise, self.attacker), self.attacker) if treatment == DENOISER else None
            file = self._treated(noise, treatment)
            public = self._public_protection(noise) if treatment == PUBLIC else None
            treat(self._published(noise, self.train), self.train, treatment, config.size, file, attacker, public)
        wait_for_everyone()
        self._run_cells(cells, pending, rank, world)
        wait_for_everyone()
        return self._write_results() if rank == 0 else {}

    def report(self) -> dict[str, Any]:
        """Write results and report of the cells that are done; nothing is trained, noises may be published."""
        self._restore()
        for noise in self.config.noises if self.config.examples else ():
            self._publish(noise, self.train)
        self._write_examples()
        return self._write_results()

    def _write_results(self) -> dict[str, Any]:
        results = self.results()
        write_report(self.config.output, results)
        return results

    def results(self) -> dict[str, Any]:
        """What `results.json` holds, of the cells that are done."""
        import torch

        config, test, classes = self.config, self._test_data, len(self.train.classes)
        settings = {key: value for key, value in asdict(config).items() if key != "output" and key not in GRID}
        settings |= self._data | {
            "classes": list(self.train.classes),
            "num_classes": classes,
            "train_images": len(self.train),
            "test_images": len(self.test),
            "threads": torch.get_num_threads(),
        }
        done = [(cell, self._file(cell)) for cell in plan(config)]
        return {
            "command": self.command,
            "settings": settings,
            "score": score_name(config.task, classes),
            "trivial_score": trivial_score(config.task, test.labels, classes, test.instances),
            "grid": {key: list(getattr(config, key)) for key in GRID},
            "noises": {
                noise: {
                    "settings": self._noise_settings(noise, self.train),
                    "measured": self._measured(noise),
                }
                for noise in config.noises
            },
            "cells": [
                asdict(cell) | {"key": file.stem} | json.loads(file.read_text())
                for cell, file in done
                if file.is_file()
            ],
            "planned": len(done),
            # Both halves of a split have the notes of the whole.
            "notes": list(dict.fromkeys([*self.notes, *_left_out(self.train), *_left_out(self.test)])),
        }

    def _restore(self) -> None:
        """Keep all cells of the results that stand in the output folder, where nothing else was kept of them, and what
        was measured of the noises.

        So results can be moved, or committed, without the work that made them, and later runs go on from them, also
        those of another grid, which writes other results in their place.
        """
        file = self.config.output / RESULTS
        if not file.is_file():
            return
        try:
            results = json.loads(file.read_text())
            found, self._known = results["cells"], results.get("noises", {})
            figures = {self._place(cell["key"]): {name: cell[name] for name in FIGURES} for cell in found}
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise ValueError(
                f"{file} is no results of this command ({error!r}); choose another output folder, or remove it"
            ) from error
        for place, kept in figures.items():
            if not place.is_file():
                put_in_place(json.dumps(kept).encode(), place)

    def _run_cells(self, cells: list[Cell], pending: list[Cell], rank: int, world: int) -> None:
        seconds: list[float] = []
        reported = time.monotonic()
        for cell in pending[rank::world]:
            try:
                figures = self._train_and_test(cell)
            except FloatingPointError as error:
                # The others of the grid can be trained all the same.
                self.say(f"{cell}: not trained, {error}")
                continue
            put_in_place(json.dumps(figures).encode(), self._file(cell))
            seconds.append(figures["seconds"])
            left = sum(not self._file(other).is_file() for other in pending)
            score = next(iter(figures["scores"].values()))
            shown = "no score" if score is None else f"{score:.3f}"
            remaining = timedelta(seconds=round(left * float(np.mean(seconds)) / world))
            self.say(f"[{len(cells) - left}/{len(cells)}] {cell}: {shown} in {seconds[-1]:.0f} s; {remaining} to go")
            if rank == 0 and time.monotonic() - reported > REPORT_EVERY:
                # A run that is stopped leaves a report of what it had.
                self._write_results()
                reported = time.monotonic()

    def _train_and_test(self, cell: Cell) -> dict[str, Any]:
        config, start = self.config, time.perf_counter()
        images = np.load(self._treated(cell.noise, cell.treatment))
        labels, instances = self._train_annotations
        if cell.clean_share:
            clean = self._clean(cell.clean_share)
            if cell.noise == "clean":
                images, labels = images[clean], labels[clean]
                instances = None if instances is None else instances[clean]
            else:
                images[clean] = np.load(self._treated("clean", cell.treatment), mmap_mode="r")[clean]
        victim = train_victim(
            lambda: self._victim(cell.victim),
            TrainingData(images, labels, instances),
            epochs=self._epochs(cell),
            batch_size=config.batch_size,
            lr=config.lr,
            seed=cell.seed,
            training=cell.training,
            device=self._device,
            bf16=config.bf16,
        )
        test = self._test_data
        scores = evaluate_victim(
            victim, test.images, test.labels, test.instances, len(self.train.classes), self.train.things
        )
        best = score_name(config.task, len(self.train.classes))
        scores = {best: scores[best]} | scores
        return dict(zip(FIGURES, (scores, round(time.perf_counter() - start, 1)), strict=True))

    def _victim(self, named: str) -> Victim:
        """A new victim, of a name or `name@checkpoint`."""
        from unseg_hf.evaluation.victims import build_victim

        name, _, checkpoint = named.partition("@")
        return build_victim(
            name,
            self.config.task,
            len(self.train.classes),
            pretrained=checkpoint or None,
            preset=self.config.preset,
            image_size=self.config.size,
            things=self.train.things,
        )

    def _epochs(self, cell: Cell) -> int:
        """Passes over the images: clean images alone are trained on for as many steps as a mixture with them.

        Fewer steps would make them look worse than they are, and protection in a mixture too.
        """
        if cell.noise != "clean" or not cell.clean_share:
            return self.config.epochs
        images, batch_size = len(self.train), self.config.batch_size
        steps = self.config.epochs * steps_an_epoch(images, batch_size)
        return max(1, round(steps / steps_an_epoch(round(cell.clean_share * images), batch_size)))

    def _parts(self, cell: Cell) -> list[tuple[str, str]]:
        """The noises and treatments of the images that a cell learns from."""
        noises = dict.fromkeys([cell.noise, "clean"] if cell.clean_share else [cell.noise])
        return [(noise, cell.treatment) for noise in noises]

    def _clean(self, share: float) -> np.ndarray:
        """Which training images are the clean ones; those of a smaller share are among those of a larger."""
        order = np.argsort(self.train.digests, kind="stable")
        return np.sort(order[: round(share * len(order))])

    @cached_property
    def _data(self) -> dict[str, Any]:
        return {"train": self.train.fingerprint(), "test": self.test.fingerprint(), "versions": _versions()}

    @cached_property
    def _train_annotations(self) -> tuple[np.ndarray, np.ndarray | None]:
        return annotation_squares(self.train, self.config.size)

    @cached_property
    def _test_data(self) -> TrainingData:
        return TrainingData(
            clean_squares(self.test, self.config.size), *annotation_squares(self.test, self.config.size)
        )

    def _noise_settings(self, noise: str, images: LabelledImages) -> dict[str, Any]:
        # Kept, since reading the generator's weights for it is not free and every cell asks.
        key = (noise, images is self.train)
        if key not in self._settings:
            self._settings[key] = noise_settings(images, noise, **self._asked)
        return self._settings[key]

    @property
    def _asked(self) -> dict[str, Any]:
        """What every noise is asked for with."""
        config = self.config
        bounds = {"epsilon": config.epsilon / 255, "epsilon_background": config.epsilon_background / 255}
        return {**bounds, "model": config.model, "tint": config.tint}

    def _publish(self, noise: str, images: LabelledImages) -> Measured:
        return publish(images, noise, self._published(noise, images), **self._asked, device=self._device)

    def _measured(self, noise: str) -> dict[str, Any]:
        """What the noise did to the published files; of noises of which results say it nothing is published."""
        known = self._known.get(noise)
        if known and known.get("settings") == self._noise_settings(noise, self.train):
            return known["measured"]
        return asdict(self._publish(noise, self.train))

    def _public_protection(self, noise: str) -> Callable[[LabelledImage], Image.Image]:
        """What the generator does to images, asked as for this noise; nothing to those that it did not protect, where
        there is nothing to subtract."""
        way = noise if noise in GENERATORS else "clean"
        return protection_of(self.train, way, **self._asked, device=self._device)

    def _published(self, noise: str, images: LabelledImages) -> Path:
        return self.config.output / "published" / f"{noise}-{_key(self._noise_settings(noise, images))}"

    def _treated_settings(self, noise: str, treatment: str) -> dict[str, Any]:
        settings = {"published": self._noise_settings(noise, self.train), "treatment": treatment}
        if treatment == DENOISER:
            settings["attacker"] = self.attacker.fingerprint()
        if treatment == PUBLIC:
            settings["rounds"] = PUBLIC_ROUNDS
        return settings | {"size": self.config.size, "versions": _versions()}

    def _treated(self, noise: str, treatment: str) -> Path:
        name = f"{noise}-{treatment}".replace(":", "-")
        return self.config.output / "treated" / f"{name}-{_key(self._treated_settings(noise, treatment))}.npy"

    def _file(self, cell: Cell) -> Path:
        """Where the figures of a cell are kept, under everything that decides them."""
        config = self.config
        settings = asdict(cell) | self._data | {key: getattr(config, key) for key in VICTIM_SETTINGS}
        settings["epochs"] = self._epochs(cell)
        name, _, checkpoint = cell.victim.partition("@")
        if checkpoint and checkpoint != "imagenet":
            # By what is in it, which may change, and not by where it lies.
            settings["victim"] = f"{name}@{_identity_of(checkpoint)}"
        if cell.training == "strong":
            settings["strong"] = STRONG_VERSION
        extras = (("monai",) if name == "unetpp" else ()) + (() if config.task == "semantic" else ("scipy",))
        extras += ("faster-coco-eval",) if config.task in ("instance", "detection") else ()
        if extras:
            settings["extras"] = {package: version(package) for package in extras}
        settings["parts"] = [self._treated_settings(*part) for part in self._parts(cell)]
        return self._place(_key(settings))

    def _place(self, key: str) -> Path:
        if not key.isalnum():
            raise ValueError(f"key {key!r}")
        return self.config.output / "cells" / f"{key}.json"

    def _write_examples(self) -> None:
        """The same part of some training images with every noise, at 100 %, and the noises amplified."""
        from unseg_hf.image_files import from_array
        from unseg_hf.inspection import amplified_noise, captioned

        if not self.config.examples:
            # Of an earlier run, which was allowed to show them.
            (self.config.output / EXAMPLES).unlink(missing_ok=True)
            return
        rows: list[list[Image.Image]] = []
        for index in range(min(self.config.examples, len(self.train))):
            labelled = self.train[index]
            shown, noises = [], []
            # Around the region, where the noise is strongest.
            where = np.argwhere(labelled.region) if labelled.region.any() else np.array([labelled.labels.shape]) // 2
            row, column = where.mean(0) - EXAMPLE_SIDE / 2
            left = int(np.clip(column, 0, max(0, labelled.image.width - EXAMPLE_SIDE)))
            top = int(np.clip(row, 0, max(0, labelled.image.height - EXAMPLE_SIDE)))
            part = (left, top, left + EXAMPLE_SIDE, top + EXAMPLE_SIDE)
            for noise in self.config.noises:
                with Image.open(published_files(self._published(noise, self.train), self.train)[index]) as image:
                    pair = [from_array(np.asarray(one.crop(part))) for one in (labelled.image, image.convert("RGB"))]
                shown.append(Image.fromarray(pair[1].rgb8()))
                noises.append(amplified_noise(*pair, factor=127 / max(1.0, self.config.epsilon)))
            rows += [shown, noises]
        sheet = captioned(rows, list(self.config.noises), gap=6, caption=20, font_size=12)
        buffer = io.BytesIO()
        sheet.save(buffer, "PNG")
        put_in_place(buffer.getvalue(), self.config.output / EXAMPLES)


def _key(settings: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()[:16]


@cache
def _identity_of(checkpoint: str) -> str:
    """Of a victim's checkpoint, a folder, file or Hub id; read once, and not for every cell."""
    return sha256_of(checkpoint) if Path(checkpoint).is_file() else model_identity(checkpoint)[0]


def _versions() -> dict[str, str]:
    return {"unseg_hf": unseg_hf.__version__} | {name: version(name) for name in VERSIONED}


def _left_out(images: LabelledImages) -> list[str]:
    if not images.left_out:
        return []
    return [f"{len(images.left_out)} images of {images.name} were left out, the first: {images.left_out[0]}"]
