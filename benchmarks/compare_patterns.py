"""What a fixed pattern of waves must be like for a victim to learn it instead of the objects, or of the classes.

    python benchmarks/compare_patterns.py --data ecssd/train.parquet --output runs/ecssd.json --patterns ddD ddD/+--
    python benchmarks/compare_patterns.py --data camvid/train.parquet --test_data camvid/val.parquet \\
        --train 0 367 --test 0 101 --ignore_labels 11 --epochs 10 --output runs/camvid.json \\
        --patterns ddD,aaA,dDd,aAa,dDD,aAA,ddd,aaa,++-,+-+,+--

A pattern is a code of `unseg_hf/noise_codes.py`, or one for each class with commas between, or several with slashes:
those behind the first are for images without colour and thin masks, which get the one that stands out most. Waves are
square, or with --cells as soft as those of a generator whose noise has so many cells down the image and across it (the
default's has 48, and --gain 3). It is added at 8 of 255 in the mask and 0 outside, unless --epsilon and --background
say otherwise. Of a binary data set's training split (no test split is looked at) the images from 300 to 599 train a
victim and those from 660 to 760, clean, test it, unless --train and --test say others. Printed are the victim's scores
on those and on what it was trained on: one that has found the noise knows its training images better than one that has
not. Everything is in memory: the audit, which walks over files, is for generators. What --output has already is not
trained again.
"""

import argparse
import itertools
import json
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np

BATCH = 8
PLACES = ("locked", "random sign", "random phase", "random phase and angle", "padded frame")


def pattern_noise(number: int, labelled, pattern: str, count: int, place: str, cells: int, gain: float) -> np.ndarray:
    """Noise `(height, width, 3)` in [-1, 1] of one image, with so many waves down it and across it."""
    import torch

    from unseg_hf.evaluation.controls import tint_for
    from unseg_hf.noise_choice import needs_tint
    from unseg_hf.noise_codes import code_noise

    waves, *tints = pattern.split("/")
    random = np.random.default_rng(number)
    height, width = labelled.labels.shape
    pixels = np.asarray(labelled.image)
    if tints and needs_tint(pixels, labelled.region, height / count):
        # Of one there is no choice, and it may be a list of codes.
        waves = tint_for(pixels, tints) if len(tints) > 1 else tints[0]
    codes = waves.split(",")
    grid = (cells, cells) if cells else (height, width)
    rows, columns = ((np.arange(side) + 0.5) / side for side in grid)
    rows = rows[:, None]
    angle = random.uniform(0, np.pi) if place == "random phase and angle" else 0.0
    phase = 0.0
    if place == "random sign":
        phase = random.integers(2) / 2
    elif place.startswith("random phase"):
        phase = random.uniform()
    # Where images are padded to a square, a side that is shorter has fewer waves.
    shares = [side / max(height, width) if place == "padded frame" else 1.0 for side in (height, width)]
    down = (rows * np.cos(angle) + columns * np.sin(angle)) * count * shares[0] + phase
    across = (columns * np.cos(angle) - rows * np.sin(angle)) * count * shares[1] + phase
    noises = [code_noise(code, down, across) for code in codes]
    if cells:
        enlarged = torch.nn.functional.interpolate(
            torch.from_numpy(np.stack(noises)).permute(0, 3, 1, 2), (height, width), mode="bilinear"
        )
        noises = list((gain * enlarged).clamp(-1, 1).permute(0, 2, 3, 1).numpy())
    if len(codes) == 1:
        return noises[0]
    classes = np.where(labelled.labels == 255, 0, labelled.labels) % len(codes)
    return np.choose(classes[..., None], noises[: classes.max() + 1])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", required=True, help="parquet file of images with masks")
    parser.add_argument("--test_data", help="another file for the test images (default: --data)")
    parser.add_argument(
        "--train", type=int, nargs=2, default=(300, 600), help="first image, and the one after the last"
    )
    parser.add_argument("--test", type=int, nargs=2, default=(660, 761))
    parser.add_argument("--ignore_labels", type=int, nargs="+", default=(), help="mask values that are no class")
    parser.add_argument("--output", type=Path, required=True, help="JSON file")
    parser.add_argument("--patterns", nargs="+", required=True)
    parser.add_argument("--waves", nargs="+", type=int, default=[12])
    parser.add_argument("--cells", type=int, default=0, help="of the noise, down and across; 0: none, sharp waves")
    parser.add_argument("--gain", type=float, default=1, help="of the noise of cells, before it is clipped")
    parser.add_argument("--epsilon", type=float, default=8, help="noise inside the mask, in grey levels of 255")
    parser.add_argument("--background", type=float, default=0, help="noise outside the mask, in grey levels of 255")
    parser.add_argument("--places", nargs="+", choices=PLACES, default=["locked"])
    parser.add_argument("--victims", nargs="+", default=["unet", "segformer"])
    parser.add_argument("--treatments", nargs="+", default=["none"], help="of the audit's")
    parser.add_argument("--training", default="plain", help="plain, strong or adversarial")
    parser.add_argument("--size", type=int, default=96, help="side of the squares that victims see, in pixels")
    parser.add_argument("--epochs", type=int, default=8)
    parser.add_argument("--seeds", nargs="+", type=int, default=[0])
    options = parser.parse_args()

    import torch

    from unseg_hf.evaluation.labelled_images import DatasetRows, LabelledImages
    from unseg_hf.evaluation.published_images import annotation_squares, clean_squares
    from unseg_hf.evaluation.victims.training import TrainingData

    torch.set_num_threads(1)  # small victims are faster, and the same everywhere, on one thread
    images = LabelledImages(DatasetRows(options.data), ignore=options.ignore_labels)
    others = images
    if options.test_data:
        others = LabelledImages(DatasetRows(options.test_data), ignore=options.ignore_labels, like=images)
    for name, (first, last), some in (("train", options.train, images), ("test", options.test, others)):
        if not 0 <= first < last <= len(some):
            parser.error(f"--{name} {first} {last}: {some.name} has {len(some)} images")
    train = [images[index] for index in range(*options.train)]
    test = [others[index] for index in range(*options.test)]
    data = f"{images.name} {options.train}, {others.name} {options.test}, ignored {options.ignore_labels}"
    found = json.loads(options.output.read_text()) if options.output.is_file() else {"data": data}
    if found.get("data") != data:
        parser.error(f"{options.output} is of {found.get('data')}, and not of {data}: choose another --output")
    budget = (options.epsilon / 255, options.background / 255)
    named: dict[str, Callable | None] = {"clean": None}
    settings = [f"{options.cells} cells, gain {options.gain:g}"] if options.cells else []
    settings += [f"{options.epsilon:g} inside, {options.background:g} outside"]
    named |= {
        ", ".join([f"{count} waves", pattern, place, *settings]): partial(
            pattern_noise, pattern=pattern, count=count, place=place, cells=options.cells, gain=options.gain
        )
        for count in options.waves
        for pattern in options.patterns
        for place in options.places
    }
    size = options.size
    labels = annotation_squares(train, size)[0]
    clean = TrainingData(clean_squares(test, size), annotation_squares(test, size)[0])
    for name, pattern in named.items():
        for treatment in options.treatments:
            learned = None  # the same for all victims and seeds
            for victim, seed in itertools.product(options.victims, options.seeds):
                key = f"{name} | {treatment} | {options.training} {victim} of {size}, {options.epochs} epochs | {seed}"
                if key not in found:
                    learned = learned or TrainingData(
                        published_squares(train, pattern, budget, treatment, size), labels
                    )
                    found[key] = train_and_score(learned, clean, len(images.classes), victim, options, seed)
                    options.output.parent.mkdir(parents=True, exist_ok=True)
                    options.output.write_text(json.dumps(found, indent=1) + "\n")
                print("{:.3f} {:.3f}".format(*found[key]), key, flush=True)


def published_squares(images, pattern: Callable | None, budget: tuple, treatment: str, size: int) -> np.ndarray:
    """Images with a pattern's noise, treated, as a victim sees them: `(count, 3, size, size)` uint8."""
    from PIL import Image

    from unseg_hf.evaluation.post_processing import POST_PROCESSINGS
    from unseg_hf.evaluation.published_images import clean_squares
    from unseg_hf.protection import apply_noise

    published = []
    for number, labelled in enumerate(images):
        image = labelled.image
        if pattern:
            noise = pattern(number, labelled)
            pixels = apply_noise(np.asarray(image), noise, labelled.region, *budget)
            image = Image.fromarray(pixels)
        published.append(replace(labelled, image=POST_PROCESSINGS[treatment](image).convert("RGB")))
    return clean_squares(published, size)


def train_and_score(learned, clean, num_classes: int, victim: str, options, seed: int) -> list[float]:
    """Foreground IoU, of several classes their mean IoU, of a victim on clean images and on those it learned from."""
    from unseg_hf.evaluation.tasks import evaluate_victim, score_name
    from unseg_hf.evaluation.victims import build_victim
    from unseg_hf.evaluation.victims.training import train_victim

    build = partial(build_victim, victim, "semantic", num_classes, image_size=clean.images.shape[-1])
    trained = train_victim(
        build, learned, epochs=options.epochs, batch_size=BATCH, seed=seed, training=options.training
    )
    scores = [
        evaluate_victim(trained, data.images, data.labels, None, num_classes, (), batch_size=BATCH)
        for data in (clean, learned)
    ]
    return [score[score_name("semantic", num_classes)] for score in scores]


if __name__ == "__main__":
    main()
