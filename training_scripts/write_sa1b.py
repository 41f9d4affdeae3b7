"""Write any images with masks as SA-1B is published: tars of `sa_N.jpg` and `sa_N.json`.

BSDS500's 200 training images, every region a mask, in two tars:

    python training_scripts/write_sa1b.py --data bsds500/train.parquet,masks=regions \\
        --output tars/ --images_per_shard 100

The tars are training data like any other: `sa1b:tars/*.tar`.
"""

import argparse
import warnings


def main(arguments: list[str] | None = None) -> None:
    """Write the tars; `arguments` replaces the command line's."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--data",
        nargs="+",
        required=True,
        help="Sources, written one after the other: [KIND:]LOCATION[,OPTION=VALUE]..., see unseg_hf/data/sources.py.",
    )
    parser.add_argument("--output", required=True, help="Folder of the tars; must hold none yet.")
    parser.add_argument("--images_per_shard", type=int, default=1000, help="Images in a tar.")
    parser.add_argument("--quality", type=int, default=95, help="Of the JPEG images, 1 to 100.")
    parser.add_argument("--longest_side", type=int, help="Larger images are made smaller (default: none).")
    options = parser.parse_args(arguments)

    import numpy as np

    from unseg_hf.data.sa1b_writer import write_sa1b
    from unseg_hf.data.sources import parse_source

    def records():
        for source in sources:
            for handle in source.order(np.random.default_rng(0), 0, 1):
                try:
                    yield source.load(handle)
                except OSError as error:
                    warnings.warn(f"{source.name}: left out, {error}", stacklevel=2)

    try:
        sources = [parse_source(spec) for spec in options.data]
        written = write_sa1b(
            records(), options.output, options.images_per_shard, options.quality, options.longest_side
        )
    except (ImportError, OSError, ValueError) as error:
        parser.error(str(error))
    if not written:
        parser.error(f"no images in {options.data}; no tar was written")
    print(f"wrote {written} images to {options.output}")


if __name__ == "__main__":
    main()
