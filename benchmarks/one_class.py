"""Binary masks of one class of a data set of many, for `unseg audit`: is a road, say, protected as an object is?

    python benchmarks/one_class.py --data camvid/train.parquet --label 3 --output road-train.parquet

Images that show next to nothing of the class are left out.
"""

import argparse


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", required=True, help="parquet with the columns image and mask, a label image")
    parser.add_argument("--label", type=int, required=True, help="value of the class in the masks")
    parser.add_argument("--least", type=float, default=0.01, help="share of an image that it has to cover")
    parser.add_argument("--output", required=True, help="parquet to write")
    options = parser.parse_args()

    import numpy as np
    from datasets import Features, Image, load_dataset
    from PIL import Image as Pillow

    rows = load_dataset("parquet", data_files=options.data, split="train").select_columns(["image", "mask"])
    # Files of images stay as they are.
    rows = rows.cast_column("image", Image(decode=False))

    def of_class(row: dict) -> dict:
        return {"mask": Pillow.fromarray((np.asarray(row["mask"]) == options.label).astype(np.uint8))}

    features = Features({"image": Image(decode=False), "mask": Image()})
    rows = rows.map(of_class, features=features).filter(lambda row: np.asarray(row["mask"]).mean() >= options.least)
    if not len(rows):
        raise SystemExit(f"one_class: no image of {options.data} shows label {options.label}")
    rows.cast_column("image", Image()).to_parquet(options.output)
    print(f"{options.output}: {len(rows)} images")


if __name__ == "__main__":
    main()
