"""Images per second and peak memory of a run over a whole data set, for several sizes and numbers of processes.

    python benchmarks/protect_datasets.py --images 100 1000 10000 --processes 1 2 --size 96

Every run is training_scripts/protect_dataset.py in processes of its own, on JPEG images with masks that are written
first. The rate is that from the first complete shard to the last, so that loading the package and the generator does
not count; the whole time is given too, and the CPU time of all processes, their start included, which other work on
the machine hardly changes. The share of each step, in CPU time, comes from one process that protects some images.
With `--model tiny` the generator is a random one of 64 px, which costs next to nothing: what is left is all the rest.
"""

import argparse
import io
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path

EXAMPLE = Path(__file__).parent.parent / "spaces_demo" / "examples" / "coffee.png"
SCRIPT = Path(__file__).parent.parent / "training_scripts" / "protect_dataset.py"


def write_images(folder: Path, count: int, size: int) -> None:
    """Crops of the example photo, enlarged if need be, as JPEG, with a box in the middle as mask."""
    import numpy as np
    from PIL import Image

    photo = Image.open(EXAMPLE).convert("RGB")
    if size > min(photo.size):
        photo = photo.resize((2 * size, 2 * size), Image.Resampling.LANCZOS)
    mask = np.zeros((size, size), np.uint8)
    mask[size // 4 : 3 * size // 4, size // 4 : 3 * size // 4] = 255
    drawn = io.BytesIO()
    Image.fromarray(mask).save(drawn, "PNG")
    random = np.random.default_rng(0)
    for index in range(count):
        left, top = (int(random.integers(0, side - size + 1)) for side in photo.size)
        for part in ("images", "masks"):
            (folder / part / f"{index // 1000:03d}").mkdir(parents=True, exist_ok=True)
        name = f"{index // 1000:03d}/{index:06d}"
        crop = photo.crop((left, top, left + size, top + size))
        crop.save(folder / f"images/{name}.jpg", quality=90)
        (folder / f"masks/{name}.png").write_bytes(drawn.getvalue())


def write_tiny_generator(folder: Path) -> str:
    """A random generator that costs next to nothing; returns its folder."""
    from transformers import SamConfig

    from unseg_hf import UnSegConfig, UnSegModel, UnSegProcessor

    vision = {"hidden_size": 32, "output_channels": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    vision |= {"image_size": 64, "use_rel_pos": False, "window_size": 2, "global_attn_indexes": [1]}
    sam = SamConfig(
        vision_config=vision | {"num_pos_feats": 16},
        prompt_encoder_config={"hidden_size": 32, "image_size": 64},
        mask_decoder_config={"hidden_size": 32, "mlp_dim": 64, "iou_head_hidden_dim": 32},
    )
    UnSegModel(UnSegConfig(sam_config=sam)).save_pretrained(folder)
    UnSegProcessor.for_image_size(64).save_pretrained(folder)
    return str(folder)


def measure(folder: Path, processes: int, model: str | None, shard_size: int, kind: str) -> tuple[float, ...]:
    """Seconds of a run, images/s from its first complete shard to its last, CPU seconds of all processes, and the most
    memory of one in MB."""
    with tempfile.TemporaryDirectory() as output:
        command = [str(SCRIPT), str(folder / "images"), "--masks", str(folder / "masks"), "--output", f"{output}/out"]
        command += ["--shard_size", str(shard_size), "--output_format", kind] + (["--model", model] if model else [])
        # A child of its own measures its children, one run's alone.
        code = (
            "import resource, subprocess, sys\n"
            "runs = [subprocess.Popen([sys.executable, *sys.argv[2:], '--shard', f'{i}/{sys.argv[1]}'],"
            " stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) for i in range(int(sys.argv[1]))]\n"
            "assert not any([run.wait() for run in runs])\n"
            "used = resource.getrusage(resource.RUSAGE_CHILDREN)\n"
            "print(used.ru_utime + used.ru_stime, used.ru_maxrss / 1024)\n"
        )
        start = time.perf_counter()
        done = subprocess.run(
            [sys.executable, "-c", code, str(processes), *command], capture_output=True, text=True, check=True
        )
        seconds = time.perf_counter() - start
        marks = sorted(Path(output, "out/manifest").glob("*.json"), key=lambda path: path.stat().st_mtime)
        if len(marks) < 2:
            raise SystemExit("too few --images for two shards, between which the rate is measured")
        first, last = (marks[index].stat().st_mtime for index in (0, -1))
        images = sum(json.loads(mark.read_text())["records"] for mark in marks[1:])
        return seconds, images / (last - first), *map(float, done.stdout.split())


def shares(folder: Path, model: str | None, count: int) -> dict[str, float]:
    """CPU seconds an image in decoding and preparing, the model, and encoding (PNG, decoded again and compared)."""
    from unseg_hf import Prompt, Protector
    from unseg_hf.image_files import encode_verified

    protector = Protector.from_pretrained(model)
    seconds = {"decoding": 0.0, "model": 0.0, "encoding": 0.0}
    images = sorted((folder / "images").rglob("*.jpg"))[: count + 1]
    for index, path in enumerate(images):
        mask = folder / "masks" / path.relative_to(folder / "images").with_suffix(".png")
        times = [time.process_time()]
        job = protector.prepare(path.read_bytes(), Prompt(mask=mask))
        times.append(time.process_time())
        protected = protector.apply(job, protector.decode(job, protector.encode([job])[0]))
        times.append(time.process_time())
        encode_verified(protected.picture, "png")
        times.append(time.process_time())
        if index:  # the first one warms up
            for name, start, end in zip(seconds, times, times[1:], strict=False):
                seconds[name] += (end - start) / (len(images) - 1)
    return seconds


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--images", type=int, nargs="+", default=[100, 1000, 10000])
    parser.add_argument("--processes", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--size", type=int, default=96, help="side of the images, in pixels (default: 96)")
    parser.add_argument("--shard_size", type=int, default=10)
    parser.add_argument("--output_format", default="parquet", choices=("parquet", "folder", "tars"))
    parser.add_argument("--model", help="folder or Hub id, or tiny (default: the embedded generator)")
    options = parser.parse_args()

    import torch

    print(f"{options.size} px, shards of {options.shard_size}, {options.output_format}, torch {torch.__version__}")
    with tempfile.TemporaryDirectory() as folder:
        model = write_tiny_generator(Path(folder) / "model") if options.model == "tiny" else options.model
        for processes in options.processes:
            for count in options.images:
                images = Path(folder) / str(count)
                if not images.is_dir():
                    write_images(images, count, options.size)
                seconds, rate, cpu, memory = measure(
                    images, processes, model, options.shard_size, options.output_format
                )
                line = f"{processes} process(es)  {count:>6} images  {seconds:7.1f} s  {rate:6.1f} images/s"
                print(f"{line}  {cpu:7.1f} s of CPU  {memory:6.0f} MB a process", flush=True)
        taken = shares(Path(folder) / str(options.images[-1]), model, min(50, options.images[-1] - 1))
    total = sum(taken.values())
    parts = ", ".join(f"{name} {value * 1000:.0f} ms ({value / total:.0%})" for name, value in taken.items())
    print(f"CPU time of an image, on {torch.get_num_threads()} threads: {parts}")


if __name__ == "__main__":
    main()
