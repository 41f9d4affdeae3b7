"""A soak: many small images, one in a hundred broken in every way, and two kills; nothing may be lost or there twice.

    python benchmarks/soak_protect_dataset.py --images 10000 --kills 2

Every run is training_scripts/protect_dataset.py in processes of its own. The output of the run that was killed and
begun again is checked as `unseg verify --originals` does, then compared, byte for byte, with that of a run in one go.
"""

import argparse
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from protect_datasets import SCRIPT, write_images, write_tiny_generator

BROKEN = ("empty", "text", "cut", "flipped", "no_mask", "mask_size", "mask_text", "frames", "unreadable", "heic")


def break_images(folder: Path, every: int) -> dict[str, str]:
    """Break every `every`-th image in one of ten ways, in turn; returns the way by name."""
    from PIL import Image

    broken = {}
    for number, path in enumerate(sorted((folder / "images").rglob("*.jpg"))[::every]):
        way, data = BROKEN[number % len(BROKEN)], path.read_bytes()
        mask = folder / "masks" / path.relative_to(folder / "images").with_suffix(".png")
        if way in ("empty", "text", "cut", "flipped", "heic"):
            contents = {
                "empty": b"",
                "text": b"no image",
                "cut": data[: len(data) // 2],
                "flipped": bytes(64) + data[64:],
                "heic": b"\0\0\0\x18ftypheic" + data,
            }
            path.write_bytes(contents[way])
        elif way == "no_mask":
            mask.unlink()
        elif way == "mask_size":
            Image.new("L", (3, 3), 255).save(mask)
        elif way == "mask_text":
            mask.write_text("no mask")
        elif way == "frames":
            Image.new("L", (9, 9)).save(path, "GIF", save_all=True, append_images=[Image.new("L", (9, 9), 200)])
        else:
            path.unlink()
            path.symlink_to("nowhere.jpg")
        broken[path.relative_to(folder / "images").as_posix()] = way
    return broken


def contents(folder: Path) -> dict[str, bytes]:
    return {p.relative_to(folder).as_posix(): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--images", type=int, default=10000)
    parser.add_argument("--broken_every", type=int, default=100)
    parser.add_argument("--kills", type=int, default=2)
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--size", type=int, default=64, help="side of the images, in pixels (default: 64)")
    parser.add_argument("--shard_size", type=int, default=100)
    parser.add_argument("--output_format", default="folder", choices=("parquet", "folder", "tars"))
    parser.add_argument("--model", help="folder or Hub id, or tiny (default: the embedded generator)")
    options = parser.parse_args()

    from unseg_hf.bulk.manifest import read_lines
    from unseg_hf.bulk.verify import verify

    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        write_images(folder, options.images, options.size)
        broken = break_images(folder, options.broken_every)
        model = write_tiny_generator(folder / "model") if options.model == "tiny" else options.model
        shards = -(-options.images // options.shard_size)
        environment = os.environ | {"OMP_NUM_THREADS": "1"}

        def begin(output: Path) -> list[subprocess.Popen]:
            command = [SCRIPT, folder / "images", "--masks", folder / "masks", "--output", output]
            command += ["--shard_size", options.shard_size, "--output_format", options.output_format]
            command += ["--model", model] if model else []
            return [
                subprocess.Popen(
                    [sys.executable, *map(str, command), "--shard", f"{i}/{options.processes}"],
                    env=environment,
                    stdout=subprocess.DEVNULL,
                    stderr=subprocess.DEVNULL,
                )
                for i in range(options.processes)
            ]

        def run_to_the_end(output: Path) -> None:
            statuses = [run.wait() for run in begin(output)]
            assert not any(statuses), statuses

        def finished(output: Path) -> int:
            return len(list((output / "manifest").glob("*.json")))

        start = time.perf_counter()
        killed = folder / "killed"
        for kill in range(1, options.kills + 1):
            runs = begin(killed)
            while finished(killed) < kill * shards // (options.kills + 1) and any(r.poll() is None for r in runs):
                time.sleep(0.05)
            for run in runs:
                run.send_signal(signal.SIGKILL)
                run.wait()
            print(f"killed with {finished(killed)} of {shards} shards complete")
        run_to_the_end(killed)
        print(f"finished after {time.perf_counter() - start:.0f} s, kills and starts included")

        lines = [line for shard in range(shards) for line in read_lines(killed, shard)]
        failed = {line["source"] for line in lines if line["status"] != "protected"}
        sources = [line["source"] for line in lines]
        places = [(line["output"], line["at"]) for line in lines if line["status"] == "protected"]
        assert len(sources) == len(set(sources)) == options.images, "lost, or there twice, in the manifest"
        assert len(places) == len(set(places)) == options.images - len(broken), "lost, or there twice, in the output"
        assert failed == broken.keys(), sorted(failed ^ broken.keys())
        result = verify(killed, [str(folder / "images")], folder / "masks")
        assert not result.wrong, result.wrong[:5]
        print(f"{result.images} images, {len(failed)} broken ones listed; every file and pixel verified")

        whole = folder / "whole"
        run_to_the_end(whole)
        there, wanted = contents(killed), contents(whole)
        assert there == wanted, sorted(set(there) ^ set(wanted))[:5]
        print(f"{len(wanted)} files, {sum(map(len, wanted.values())) / 1e6:.1f} MB: equal to those of a run in one go")
        shutil.rmtree(killed)


if __name__ == "__main__":
    main()
