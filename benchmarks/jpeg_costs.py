"""What JPEG costs protected images: noise left, pixels over the bound, size; clipped to the bound and not.

    python benchmarks/jpeg_costs.py ecssd/train.parquet --images 60

The embedded generator at its own budget, on the first images of a data set that are stored as JPEG.
"""

import argparse
import io
from statistics import mean

import numpy as np


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("data", help="parquet file with the columns image (JPEG) and mask")
    parser.add_argument("--images", type=int, default=60)
    parser.add_argument("--qualities", type=int, nargs="+", default=[100, 98, 95])
    options = parser.parse_args()

    import pyarrow.parquet as pq

    from unseg_hf import Protector
    from unseg_hf.image_files import encode
    from unseg_hf.layouts.bounded_jpeg import encode_within_bound

    protector = Protector.from_pretrained()
    rows: dict[str, list[tuple[float, float, int, float]]] = {}
    for row in pq.read_table(options.data, columns=["image", "mask"]).slice(0, options.images).to_pylist():
        original = row["image"]["bytes"]
        protected = protector.protect(original, mask=io.BytesIO(row["mask"]["bytes"]))
        rows.setdefault("png", []).append((1.0, 0.0, 0, len(encode(protected.picture, "png")) / len(original)))
        for quality in options.qualities:
            jpeg = encode_within_bound(protected, quality)
            costs = jpeg.noise_left, jpeg.over_share, jpeg.over_levels, len(jpeg.data) / len(original)
            rows.setdefault(f"jpeg {quality}, clipped", []).append(costs)
            rows.setdefault(f"jpeg {quality}, as it comes", []).append(_plain(protected, quality, len(original)))
    print(
        "| written as | noise left | pixels over the bound | by at most | size, originals 1 |\n|---|---|---|---|---|"
    )
    for name, values in rows.items():
        left, over, levels, size = zip(*values, strict=True)
        print(f"| {name} | {mean(left):.0%} | {mean(over):.1%} | {max(levels)} | {mean(size):.1f} |")


def _plain(protected, quality: int, size: int) -> tuple[float, float, int, float]:
    """The same figures of a picture that is encoded once."""
    from unseg_hf.image_files import encode, read
    from unseg_hf.inspection import share_left
    from unseg_hf.protection import whole_levels

    data = encode(protected.picture, "jpeg", quality)
    decoded, clean = read(data), read(encode(protected.original, "jpeg", quality))
    bound = np.where(protected.region, *whole_levels(255, protected.epsilon, protected.epsilon_background))
    change = np.abs(decoded.pixels.astype(np.int16) - protected.original.pixels).max(axis=2)
    left = share_left(protected.original, protected.picture, clean.rgb8(), decoded.rgb8())
    return left, float((change > bound).mean()), max(0, int((change - bound).max())), len(data) / size


if __name__ == "__main__":
    main()
