"""What a fixed pattern of stripes must be like for a victim to learn it instead of the objects.

    python benchmarks/compare_patterns.py --data ecssd/train.parquet --output runs/patterns.json

Of the images of a training split (no test split is looked at) those from 300 to 599 carry the pattern, at 8 and
2 of 255, and train a victim; those from 660 to 760, clean, test it. Everything is in memory: the audit, which walks
over files, is for generators. What `--output` has already is not trained again.
"""

import argparse
import json
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np

TRAIN, TEST = range(300, 600), range(660, 761)
SIZE, EPOCHS, BATCH = 96, 8, 8
COLOURS = {"grey": (1, 1, 1), "yellow-blue": (1, 1, -1), "magenta-green": (1, -1, 1), "red-cyan": (1, -1, -1)}
PLACES = ("locked", "random sign", "random phase", "random phase and angle", "padded frame")
PATTERNS = [
    *((waves, "grey", "locked") for waves in (32, 24, 16, 12, 8, 6, 4)),
    *((16, "grey", place) for place in ("random phase", "random phase and angle")),
    *((waves, colour, "locked") for waves in (24, 16, 12) for colour in ("yellow-blue", "magenta-green")),
    *((16, colour, "random phase") for colour in ("yellow-blue", "magenta-green", "red-cyan")),
    (16, "magenta-green", "random phase and angle"),
    *((16, colour, "random sign") for colour in ("yellow-blue", "magenta-green")),
    *((16, colour, "padded frame") for colour in ("yellow-blue", "magenta-green")),
    *((0, colour, "locked") for colour in COLOURS),
]


def stripes(number: int, region: np.ndarray, waves: int, colour: str, place: str) -> np.ndarray:
    """Noise `(height, width, 3)`, 1 and -1, of one image; 0 waves are one colour in and its opposite outside."""
    if waves == 0:
        return np.where(region, 1, -1)[..., None] * np.array(COLOURS[colour])
    random = np.random.default_rng(number)
    height, width = region.shape
    rows, columns = np.mgrid[:height, :width] / np.array([height, width]).reshape(2, 1, 1)
    angle = random.uniform(0, np.pi) if place == "random phase and angle" else 0.0
    phase = 0.0
    if place == "random sign":
        phase = random.integers(2) / 2
    elif place.startswith("random phase"):
        phase = random.uniform()
    # Where images are padded to a square, a side that is shorter has fewer waves.
    share = height / max(height, width) if place == "padded frame" else 1.0
    wave = (rows * np.cos(angle) + columns * np.sin(angle)) * waves * share + phase
    return np.where(wave % 1 < 0.5, 1, -1)[..., None] * np.array(COLOURS[colour])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", required=True, help="parquet file of images with binary masks")
    parser.add_argument("--output", type=Path, required=True, help="JSON file")
    parser.add_argument("--victims", nargs="+", default=["unet", "segformer"])
    parser.add_argument("--treatments", nargs="+", default=["none"], help="of the audit's")
    parser.add_argument("--colours", nargs="+", choices=COLOURS, default=list(COLOURS))
    parser.add_argument("--places", nargs="+", choices=PLACES, default=list(PLACES))
    parser.add_argument("--waves", nargs="+", type=int, default=sorted({waves for waves, _, _ in PATTERNS}))
    parser.add_argument("--seeds", nargs="+", type=int, default=[0])
    options = parser.parse_args()
    patterns = [
        pattern
        for pattern in PATTERNS
        if pattern[0] in options.waves and pattern[1] in options.colours and pattern[2] in options.places
    ]

    import torch

    from unseg_hf.evaluation.labelled_images import DatasetRows, LabelledImages

    torch.set_num_threads(1)  # small victims are faster, and the same everywhere, on one thread
    images = LabelledImages(DatasetRows(options.data))
    train, test = ([images[index] for index in part] for part in (TRAIN, TEST))
    found = json.loads(options.output.read_text()) if options.output.is_file() else {}
    named: dict[str, Callable | None] = {"clean": None}
    named |= {
        f"{waves} waves, {colour}, {place}": partial(stripes, waves=waves, colour=colour, place=place)
        for waves, colour, place in patterns
    }
    for name, pattern in named.items():
        for treatment in options.treatments:
            for victim in options.victims:
                for seed in options.seeds:
                    key = f"{name} | {treatment} | {victim} | {seed}"
                    if key not in found:
                        found[key] = score(train, test, pattern, treatment, victim, seed)
                        options.output.parent.mkdir(parents=True, exist_ok=True)
                        options.output.write_text(json.dumps(found, indent=1) + "\n")
                    print(f"{found[key]:.3f}  {key}", flush=True)


def score(train, test, pattern, treatment: str, victim: str, seed: int) -> float:
    """Foreground IoU on clean images of a victim trained on images with a pattern."""
    from PIL import Image

    from unseg_hf.evaluation.post_processing import POST_PROCESSINGS
    from unseg_hf.evaluation.published_images import annotation_squares, clean_squares
    from unseg_hf.evaluation.tasks import evaluate_victim
    from unseg_hf.evaluation.victims import build_victim
    from unseg_hf.evaluation.victims.training import TrainingData, train_victim
    from unseg_hf.protection import apply_noise

    published = []
    for number, labelled in enumerate(train):
        image = labelled.image
        if pattern:
            noise = pattern(number, labelled.region).astype(np.float32)
            image = Image.fromarray(apply_noise(np.asarray(image), noise, labelled.region, 8 / 255, 2 / 255))
        published.append(replace(labelled, image=POST_PROCESSINGS[treatment](image).convert("RGB")))
    data = TrainingData(clean_squares(published, SIZE), annotation_squares(train, SIZE)[0])
    build = partial(build_victim, victim, "semantic", 2, image_size=SIZE)
    trained = train_victim(build, data, epochs=EPOCHS, batch_size=BATCH, seed=seed)
    labels = annotation_squares(test, SIZE)[0]
    scores = evaluate_victim(trained, clean_squares(test, SIZE), labels, None, 2, (), batch_size=BATCH)
    return scores["foreground_iou"]


if __name__ == "__main__":
    main()
