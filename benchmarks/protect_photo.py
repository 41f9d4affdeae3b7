"""Time to protect one photo with a generator, model loading aside.

    python benchmarks/protect_photo.py --width 1000 --height 750 --repeats 15

Reports medians over the repeats, and the share of each step.
"""

import argparse
import statistics
import tempfile
import time
from pathlib import Path

EXAMPLE = Path(__file__).parent.parent / "spaces_demo" / "examples" / "coffee.png"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", help="folder or Hub id (default: the embedded generator)")
    parser.add_argument("--width", type=int, default=1000)
    parser.add_argument("--height", type=int, default=750)
    parser.add_argument("--repeats", type=int, default=15)
    options = parser.parse_args()

    import numpy as np
    import torch
    from PIL import Image

    from unseg_hf import Prompt, Protector, image_files

    protector = Protector.from_pretrained(options.model)
    size = (options.width, options.height)
    mask = np.zeros(size[::-1], dtype=bool)
    mask[size[1] // 4 : 3 * size[1] // 4, size[0] // 4 : 3 * size[0] // 4] = True
    steps: dict[str, list[float]] = {"read": [], "encode": [], "noise": [], "write": []}
    with tempfile.TemporaryDirectory() as folder:
        photo, output = Path(folder) / "photo.png", Path(folder) / "protected.png"
        Image.open(EXAMPLE).resize(size, Image.Resampling.LANCZOS).save(photo)
        for repeat in range(options.repeats + 1):
            times = [time.perf_counter()]
            job = protector.prepare(photo, Prompt(mask=mask))
            times.append(time.perf_counter())
            embeddings = protector.encode([job])[0]
            times.append(time.perf_counter())
            protected = protector.apply(job, protector.decode(job, embeddings))
            times.append(time.perf_counter())
            image_files.write(protected.picture, output)
            times.append(time.perf_counter())
            if repeat:  # the first one warms up
                for name, start, end in zip(steps, times, times[1:], strict=False):
                    steps[name].append(end - start)
    medians = {name: statistics.median(values) for name, values in steps.items()}
    total = statistics.median(map(sum, zip(*steps.values(), strict=True)))
    threads = torch.get_num_threads()
    print(f"{size[0]} x {size[1]}, {options.repeats} repeats, {threads} threads, torch {torch.__version__}")
    print(f"file to file  {total:.3f} s (median)")
    for name, seconds in medians.items():
        print(f"  {name:<10}  {seconds:.3f} s  {seconds / sum(medians.values()):.0%}")


if __name__ == "__main__":
    main()
