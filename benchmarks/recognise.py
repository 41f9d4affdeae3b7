"""How surely an image that carries a generator's noise is told from one that does not, without its original.

    python benchmarks/recognise.py --data ecssd/train.parquet --images 400

Each image is protected where its masks are, treated as web sites do, and protected once more, which says how much of
the noise it had; beside it, the image that was never protected, treated alike. Printed are the shares of the noise,
smallest, median and largest, and how many are taken to carry it (`unseg_hf.recognition`); images of which it cannot be
told (tints, no colour) are counted apart.
"""

import argparse
import itertools
from statistics import median

TREATMENTS = ("none", "jpeg75", "jpeg50", "half", "half+jpeg75", "blur1.5", "5bit")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", required=True, help="[KIND:]LOCATION[,option=value]..., as for training")
    parser.add_argument("--model", help="folder or Hub id; by default the embedded generator")
    parser.add_argument("--images", type=int, default=100, help="in a shuffled order")
    parser.add_argument("--epsilon", type=float, help="of 255; by default the model's")
    parser.add_argument("--found", action="store_true", help="protect what the generator finds, each time anew")
    parser.add_argument("--unmarked", action="store_true", help="protect masks, and look where the generator would")
    parser.add_argument("--treatments", nargs="+", default=TREATMENTS)
    options = parser.parse_args()

    import numpy as np
    from PIL import Image

    from unseg_hf import Protector
    from unseg_hf.data.sources import parse_source
    from unseg_hf.evaluation.post_processing import POST_PROCESSINGS
    from unseg_hf.image_files import as_rgb8

    protector = Protector.from_pretrained(options.model)
    epsilon = None if options.epsilon is None else options.epsilon / 255
    source = parse_source(options.data)
    found: dict[tuple[str, str], list] = {}
    for handle in itertools.islice(source.order(np.random.default_rng(0), 0, 1), options.images):
        record = source.load(handle)
        image = as_rgb8(record.image)
        mask = Image.fromarray(np.logical_or.reduce([np.asarray(mask) for mask in record.masks]))

        def protect(picture: Image.Image, unmarked: bool, mask: Image.Image = mask):
            own = None if unmarked else mask.resize(picture.size, Image.Resampling.NEAREST)
            return protector.protect(picture, mask=own, epsilon=epsilon)

        published = protect(image, options.found).image
        for treatment in options.treatments:
            treated = POST_PROCESSINGS[treatment]
            for kind, picture in (("clean", image), ("protected", published)):
                again = protect(treated(picture), options.found or options.unmarked)
                found.setdefault((treatment, kind), []).append(again.before)
    print("| images | | share of the noise | taken to carry it | cannot be told |")
    print("|---|---|---|---|---|")
    for (treatment, kind), all_of_them in found.items():
        told = [one for one in all_of_them if one is not None]
        shares = [one.share for one in told] or [float("nan")]
        print(
            f"| {kind} | {treatment} | {min(shares):.2f}, {median(shares):.2f}, {max(shares):.2f} | "
            f"{sum(one.sure for one in told)} of {len(told)} | {len(all_of_them) - len(told)} |"
        )


if __name__ == "__main__":
    main()
