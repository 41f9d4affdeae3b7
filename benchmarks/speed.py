"""Start-up, a folder of photos, one large photo, many segments, a large generator, and training: seconds and peak
memory, checkouts side by side.

    python benchmarks/speed.py startup folder photo segments --repeats 5
    python benchmarks/speed.py large training --repeats 3

With `--trees . ../before` every measurement is made for each checkout in turn, so that other work on the machine slows
all alike; the ratios are to the last one. Every run is a process of its own. Reports medians.
"""

import argparse
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

EXAMPLE = Path(__file__).parent.parent / "spaces_demo" / "examples" / "coffee.png"
LARGE = (4000, 3000)
SIZES = [(480, 320)] * 50 + [(400, 300)] * 50 + [(640, 480)] * 40
SIZES += [(1024, 768)] * 24 + [(1600, 1200)] * 18 + [(2048, 1536)] * 12 + [(4000, 3000)] * 6

DECODE_AND_ENCODE = """
import io, sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from PIL import Image

def again(path):
    with Image.open(path) as image:
        image.save(io.BytesIO(), "PNG", **{options})

with ThreadPoolExecutor({threads}) as pool:
    list(pool.map(again, sorted(Path(sys.argv[1]).iterdir())))
"""
SEGMENTS = """
import sys, time
import numpy as np
import torch
from PIL import Image
from unseg_hf import Protector, image_files

photo, count, repeats = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
torch.set_num_threads(1)
protector = Protector.from_pretrained()
width, height = Image.open(photo).size
y, x = np.mgrid[:height, :width]
side = round(count**0.5)
cells = (y * side // height) * side + x * side // width
masks = [cells == i for i in range(count)]
seconds = []
for repeat in range(repeats + 1):
    start = time.perf_counter()
    protected = protector.protect(photo, masks=masks, mode="per_segment")
    image_files.write(protected.picture, photo + ".png")
    seconds.append(time.perf_counter() - start)
print(sorted(seconds[1:])[repeats // 2])
"""


def run(tree: Path, *arguments: object) -> tuple[float, float, float, str]:
    """Seconds, CPU seconds, peak memory in MB and output of a Python process that imports from `tree`."""
    environment = os.environ | {"PYTHONPATH": str(tree.resolve()), "TOKENIZERS_PARALLELISM": "false"}
    with tempfile.TemporaryFile() as output:
        start = time.perf_counter()
        process = subprocess.Popen([sys.executable, "-P", *map(str, arguments)], env=environment, stdout=output)
        _, status, usage = os.wait4(process.pid, 0)
        seconds = time.perf_counter() - start
        process.returncode = os.waitstatus_to_exitcode(status)
        if process.returncode:
            raise SystemExit(f"{arguments} ended with {process.returncode}")
        output.seek(0)
        return seconds, usage.ru_utime + usage.ru_stime, usage.ru_maxrss / 1024, output.read().decode()


def compare(title: str, trees: list[Path], repeats: int, rows: dict[str, tuple]) -> None:
    """Run every row's command for every tree in turn, and print a table of medians."""
    found: dict[tuple[str, Path], list] = {}
    for _ in range(repeats):
        for name, command in rows.items():
            for tree in trees:
                found.setdefault((name, tree), []).append(run(tree, *command)[:3])
    print(f"\n## {title}\n")
    print("| | " + " | ".join(f"{tree}: s | CPU s | MB" for tree in trees) + " | s, last over first |")
    print("|---" * (2 + 3 * len(trees)) + "|")
    for name in rows:
        medians = [[statistics.median(values) for values in zip(*found[name, tree], strict=True)] for tree in trees]
        cells = " | ".join(f"{seconds:.2f} | {cpu:.2f} | {memory:.0f}" for seconds, cpu, memory in medians)
        print(f"| {name} | {cells} | {medians[-1][0] / medians[0][0]:.2f} |", flush=True)


def startup(options: argparse.Namespace, folder: Path) -> None:
    photo(folder / "small.png", (64, 64), 0)
    protect = ("-m", "unseg_hf.cli", "protect", folder / "small.png", "-o", folder / "out.png", "--overwrite")
    rows = {
        "`import torch`": ("-c", "import torch"),
        "`from transformers import SamModel, SamProcessor`": ("-c", "from transformers import SamModel, SamProcessor"),
        "`unseg --help`": ("-m", "unseg_hf.cli", "--help"),
        "`unseg protect` of 64 x 64 pixels": (*protect, "--whole-image"),
    }
    compare("Start-up", options.trees, options.repeats, rows)


def folder_of_photos(options: argparse.Namespace, folder: Path) -> None:
    photos = options.photos
    if photos is None:
        photos = folder / "photos"
        photos.mkdir()
        for number, size in enumerate(SIZES):
            photo(photos / f"{number:03}.jpg", size, number)
    protect = ("-m", "unseg_hf.cli", "protect", photos, "--overwrite", "-o", folder / "protected")
    same = {"compress_level": 4, "compress_type": 3}
    rows = {
        "decode and encode, one thread, Pillow's defaults": ("-c", decode(1, {}), photos),
        "decode and encode, two threads, Pillow's defaults": ("-c", decode(2, {}), photos),
        "decode and encode, two threads, PNG as here": ("-c", decode(2, same), photos),
        "`unseg protect --whole-image`": (*protect, "--whole-image"),
    }
    if options.masks:
        rows["`unseg protect --masks`"] = (*protect, "--masks", options.masks)
    if options.proposals:
        rows["`unseg protect`, the generator finds the objects"] = protect
    compare("A folder of photos", options.trees, options.repeats, rows)


def large_photo(options: argparse.Namespace, folder: Path) -> None:
    photo(folder / "small.png", (64, 64), 0)
    photo(folder / "large.jpg", LARGE, 0)
    protect = ("-m", "unseg_hf.cli", "protect", "--whole-image", "--overwrite", "-o", folder / "out.png")
    rows = {
        "start-up (64 x 64 pixels)": (*protect, folder / "small.png"),
        "`unseg protect` of {} x {} pixels".format(*LARGE): (*protect, folder / "large.jpg"),
    }
    compare("A photo of 12 megapixels", options.trees, options.repeats, rows)


def segments(options: argparse.Namespace, folder: Path) -> None:
    print("\n## Segments of one photo, each with its own noise; one thread, from file to file\n")
    print("| photo | segments | " + " | ".join(f"{tree}: s" for tree in options.trees) + " |")
    print("|---" * (2 + len(options.trees)) + "|")
    for size in ((480, 320), (1024, 768), (2048, 1536)):
        photo(folder / "photo.jpg", size, 0)
        medians = {
            count: [
                float(run(tree, "-c", SEGMENTS, folder / "photo.jpg", count, options.repeats)[3])
                for tree in options.trees
            ]
            for count in (1, 64)
        }
        for count, values in medians.items():
            cells = (f"{s:.2f} ({s / one:.1f} x)" for s, one in zip(values, medians[1], strict=True))
            print(f"| {size[0]} x {size[1]} | {count} | " + " | ".join(cells) + " |", flush=True)


def large_generator(options: argparse.Namespace, folder: Path) -> None:
    tree = options.trees[-1]
    program = Path(__file__).parent / "protect_large.py"
    generator, picture = folder / "generator", folder / "photo.png"
    photo(picture, (1200, 800), 0)
    run(tree, program, "make", generator)
    print("\n## SAM ViT-B at 1024 px, random weights: one image, the second of a process\n")
    print("| | s | CPU s, loading too | MB | pixels that differ from the first row's | largest difference |")
    print("|---" * 6 + "|")
    found: dict[str, list] = {}
    ways = ("stock", "parts", "bf16") if options.bf16 else ("stock", "parts")
    for _ in range(options.repeats):
        for way in ways:
            arguments = (program, way, generator, picture, folder / f"{way}.png", "--threads", options.threads)
            _, cpu, memory, seconds = run(tree, *arguments)
            found.setdefault(way, []).append((float(seconds), cpu, memory))
    for way, values in found.items():
        seconds, cpu, memory = (statistics.median(column) for column in zip(*values, strict=True))
        share, largest = differing(folder / "stock.png", folder / f"{way}.png")
        print(f"| {way} | {seconds:.2f} | {cpu:.1f} | {memory:.0f} | {share:.2%} | {largest} |", flush=True)


def training(options: argparse.Namespace, folder: Path) -> None:
    program = Path(__file__).parent / "train_steps.py"
    print("\n## Bilevel steps, generator and surrogate in each\n")
    print("| | " + " | ".join(f"{tree}: images/s | MB" for tree in options.trees) + " |")
    print("|---" * (1 + 2 * len(options.trees)) + "|")
    for size in ("small", "large"):
        found: dict[tuple[str, Path], list] = {}
        for _ in range(options.repeats):
            for way in ("plain", "loop"):
                for tree in options.trees:
                    _, _, memory, rate = run(tree, program, way, size, "--threads", options.threads)
                    found.setdefault((way, tree), []).append((float(rate), memory))
        for way in ("plain", "loop"):
            medians = (
                [statistics.median(column) for column in zip(*found[way, t], strict=True)] for t in options.trees
            )
            print(f"| {size}, {way} | " + " | ".join(f"{r:.3g} | {m:.0f}" for r, m in medians) + " |", flush=True)


def differing(one: Path, other: Path) -> tuple[float, int]:
    """Share of the pixels of two pictures that differ, and by how many grey levels at most."""
    import numpy as np
    from PIL import Image

    with Image.open(one) as a, Image.open(other) as b:
        difference = np.abs(np.asarray(a, dtype=int) - np.asarray(b)).max(axis=2)
    return float((difference > 0).mean()), int(difference.max())


def decode(threads: int, options: dict) -> str:
    return DECODE_AND_ENCODE.format(threads=threads, options=options)


def photo(path: Path, size: tuple[int, int], number: int) -> None:
    """A part of the example photo at this size, another one for each number."""
    from PIL import Image

    with Image.open(EXAMPLE) as example:
        left, top = number * 7 % (example.width // 4), number * 5 % (example.height // 4)
        part = example.convert("RGB").crop((left, top, left + 3 * example.width // 4, top + 3 * example.height // 4))
    part.resize(size, Image.Resampling.LANCZOS).save(path, **({"quality": 92} if path.suffix == ".jpg" else {}))


PARTS = {
    "startup": startup,
    "folder": folder_of_photos,
    "photo": large_photo,
    "segments": segments,
    "large": large_generator,
    "training": training,
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("parts", nargs="+", choices=PARTS)
    parser.add_argument("--trees", nargs="+", type=Path, default=[Path(__file__).parent.parent], help="checkouts")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--photos", type=Path, help="folder of photos, not made from the example photo")
    parser.add_argument("--masks", type=Path, help="folder of their masks")
    parser.add_argument("--proposals", action="store_true", help="the folder also with the objects that are found")
    parser.add_argument("--threads", type=int, default=1, help="of the large generator and of training")
    parser.add_argument("--bf16", action="store_true", help="the large generator in bfloat16, too")
    options = parser.parse_args()
    for part in options.parts:
        with tempfile.TemporaryDirectory() as folder:
            PARTS[part](options, Path(folder))


if __name__ == "__main__":
    main()
