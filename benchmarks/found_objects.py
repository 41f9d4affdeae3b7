"""How well a generator finds what a box or a click means, and what it finds by itself.

    python benchmarks/found_objects.py --data ecssd/test.parquet --models default runs/sam

Each mask of each image is asked for by the box around it and by the point that lies deepest inside it. Printed is the
mean IoU of what would be protected, where an unsure SAM makes it all of the box or of the image, beside that of all of
the box and of the image; of what is found without a prompt that of the part that fits best, with the number of parts;
and that of all that is found with all masks of the image.
"""

import argparse
import itertools
from statistics import mean


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", nargs="+", required=True, help="[KIND:]LOCATION[,option=value]..., as for training")
    parser.add_argument("--models", nargs="+", default=["default"], help="folders, Hub ids, or `default`")
    parser.add_argument("--images", type=int, default=60, help="of each source, in a shuffled order")
    parser.add_argument(
        "--smallest", type=float, default=0.01, help="smaller masks are passed over; share of the image"
    )
    options = parser.parse_args()

    import numpy as np
    from scipy.ndimage import distance_transform_edt

    from unseg_hf import Prompt, Protector
    from unseg_hf.data.sources import parse_source
    from unseg_hf.image_files import as_rgb8

    def iou(one: np.ndarray, other: np.ndarray) -> float:
        return np.count_nonzero(one & other) / np.count_nonzero(one | other)

    print("| data | generator | box | all of the box | click | all of the image | best part | parts | all, of all |")
    print("|---|---|---|---|---|---|---|---|---|")
    for text in options.data:
        source = parse_source(text)
        handles = itertools.islice(source.order(np.random.default_rng(0), 0, 1), options.images)
        records = [source.load(handle) for handle in handles]
        for name in options.models:
            protector = Protector.from_pretrained(None if name == "default" else name)
            found: dict[str, list[float]] = {}
            proposals = []
            for record in records:
                image = as_rgb8(record.image)
                everything = protector.prepare(image, Prompt())
                embeddings = protector.encode([everything])[0]
                proposed = protector.find_masks(everything, embeddings)[0]
                proposals.append(len(proposed))
                masks = [np.asarray(mask) for mask in record.masks]
                if masks:
                    found.setdefault("all", []).append(iou(*map(np.logical_or.reduce, (proposed, masks))))
                for mask in masks:
                    if mask.mean() < options.smallest:
                        continue
                    rows, columns = np.nonzero(mask)
                    box = [int(v) for v in (columns.min(), rows.min(), columns.max() + 1, rows.max() + 1)]
                    filled = np.zeros_like(mask)
                    filled[box[1] : box[3], box[0] : box[2]] = True
                    inside = distance_transform_edt(np.pad(mask, 1))[1:-1, 1:-1]
                    row, column = np.unravel_index(inside.argmax(), inside.shape)
                    regions = {"filled": filled, "whole": np.ones_like(mask)}
                    prompts = {"box": Prompt(boxes=[box]), "click": Prompt(points=[(int(column), int(row))])}
                    for kind, prompt in prompts.items():
                        (regions[kind],) = protector.find_masks(protector.prepare(image, prompt), embeddings)[0]
                    for kind, region in regions.items():
                        found.setdefault(kind, []).append(iou(region, mask))
                    found.setdefault("proposed", []).append(max(iou(one, mask) for one in proposed))
            columns = ("box", "filled", "click", "whole", "proposed")
            figures = " | ".join(f"{mean(found[kind]):.3f}" for kind in columns)
            print(f"| {text} | {name} | {figures} | {mean(proposals):.1f} | {mean(found['all']):.3f} |", flush=True)


if __name__ == "__main__":
    main()
