"""Images that lie beside the protected ones: counted, named, left out on request, never loaded in their place."""

import io
import json
import tarfile
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
from datasets import Dataset, Features, List, Value, load_dataset
from datasets import Image as ImageFeature
from huggingface_hub import DatasetCard
from PIL import Image
from test_bulk import BROKEN, encoded, files, lines, load_script, mask, photo, published, run, write_tar

from unseg_hf import ProtectImages, cli
from unseg_hf.bulk import outputs
from unseg_hf.bulk.opening import open_source
from unseg_hf.bulk.records import count_images, image_kind
from unseg_hf.bulk.run import protect_dataset


@pytest.fixture
def place(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return tmp_path


def thumb(seed):
    return encoded(photo(seed, 6, 8), "JPEG")


def write_table():
    """Three rows, the second of them broken; images in four columns besides that of the masks."""
    stored = [{"bytes": data, "path": None} for data in (encoded(photo(0)), BROKEN["cut"], encoded(photo(2)))]
    columns = {
        "image": stored,
        "mask": [{"bytes": encoded(mask(i)), "path": None} for i in range(3)],
        "thumb": [{"bytes": thumb(i), "path": None} for i in range(2)] + [None],
        "views": [[{"bytes": thumb(i), "path": None}] * i for i in range(3)],
        "raw": [thumb(0), b"no image", b""],
        "crops": [{"where": [1, 2], "picture": {"bytes": encoded(photo(i)), "path": None}} for i in range(3)],
        "caption": ["a", "b", "c"],
    }
    image = ImageFeature()
    features = {"image": image, "mask": image, "thumb": image, "views": List(image), "raw": Value("binary")}
    features |= {"crops": {"where": List(Value("int8")), "picture": image}, "caption": Value("string")}
    Dataset.from_dict(columns, features=Features(features)).to_parquet("in.parquet")
    return {"inputs": ["in.parquet"], "mask_column": "mask"}


def write_samples():
    """Two tars of two samples, the last of them broken; the first one has two thumbnails and no text."""
    for part in range(2):
        members = {}
        for i in (2 * part, 2 * part + 1):
            members |= {f"s/{i}.jpg": BROKEN["cut"] if i == 3 else encoded(photo(i), "JPEG")}
            members |= {f"s/{i}.mask.png": encoded(mask(i)), f"s/{i}.thumb.jpg": thumb(i), f"s/{i}.icon": thumb(i)}
            members |= {f"s/{i}.json": b'{"a": 1}'}
        write_tar(f"{part}.tar", members)
    return {"inputs": ["0.tar", "1.tar"], "mask_column": "mask.png", "image_column": "jpg"}


FOUND_IN_ROWS = [{"thumb": 1, "raw": 1, "crops": 1}, {"thumb": 1, "views": 1, "crops": 1}, {"views": 2, "crops": 1}]


@pytest.mark.parametrize(
    ("kind", "on_error"), [("parquet", "mark"), ("parquet", "drop"), ("folder", "mark"), ("tars", "mark")]
)
def test_other_images_of_a_table_are_counted_by_column_where_they_are_in_the_output(
    place,
    saved_generator,
    kind,
    on_error,
):
    summary = run(write_table(), saved_generator, kind=kind, on_error=on_error)
    assert (summary.records, summary.failed) == (3, 1)
    kept = [0, 1, 2] if (kind, on_error) == ("parquet", "mark") else [0, 2]
    assert [line.get("unprotected") for line in lines()] == [
        found if row in kept else None for row, found in enumerate(FOUND_IN_ROWS)
    ]
    total = {name: sum(FOUND_IN_ROWS[row].get(name, 0) for row in kept) for name in ("crops", "raw", "thumb", "views")}
    assert summary.unprotected == total


def test_names_of_columns_are_no_markdown_in_the_card(place, saved_generator):
    name = "thumb**\n\n# All is safe\n<img src=x onerror=alert(1)>"
    table = write_table()
    Dataset.from_parquet("in.parquet").rename_column("thumb", name).to_parquet("in.parquet")
    run(table, saved_generator)
    card = DatasetCard.load("out/README.md").text
    assert r"in the column thumb\*\*\\n\\n\# All is safe\\n\<img src=x" in card
    assert not [line for line in card.splitlines() if line.startswith("# All") or "<img" in line.replace(r"\<", "")]


@pytest.mark.parametrize("kind", outputs.KINDS)
def test_other_images_of_samples_are_counted_by_suffix_and_named(place, saved_generator, kind, capsys):
    summary = run(write_samples(), saved_generator, kind=kind)
    count = 4 if kind == "parquet" else 3  # where the row of the broken one keeps what lay beside it
    assert summary.unprotected == {"icon": count, "thumb.jpg": count}
    card = DatasetCard.load("out/README.md").text
    for suffix in ("icon", "thumb.jpg"):
        assert f"**{count} images with the suffix {suffix} are not protected**, but as in the source." in card
    assert cli.main(["verify", "out"]) == 0
    assert f"out: {count} images with the suffix thumb.jpg are not protected" in capsys.readouterr().out


@pytest.mark.parametrize("kind", outputs.KINDS)
@pytest.mark.parametrize(
    ("write", "dropped"), [(write_table, ["thumb", "views", "raw", "crops"]), (write_samples, ["thumb.jpg", "icon"])]
)
def test_columns_that_are_dropped_are_not_in_the_output_and_all_else_is(
    place,
    saved_generator,
    kind,
    write,
    dropped,
):
    source = write()
    run(source, saved_generator, "all", kind=kind)
    summary = run(source | {"drop_columns": dropped}, saved_generator, kind=kind)
    assert summary.unprotected == {}
    assert not any("unprotected" in line for line in lines())
    assert "not protected" not in Path("out/README.md").read_text()
    assert published("out") == published("all")
    clean = [thumb(i)[2:] for i in range(4)] + [encoded(photo(i))[8:] for i in range(3)]

    def clean_copies(output):
        contents = [data for name, data in files(output).items() if name.startswith(("data/", "beside/"))]
        return sum(part in data for part in clean for data in contents)

    assert clean_copies("all") > 0
    assert clean_copies("out") == 0
    assert cli.main(["verify", "out", "--originals", *source["inputs"]]) == 0
    if kind == "parquet":
        names = pq.read_schema(next(Path("all/data").iterdir())).names
        left = [name for name in names if name not in dropped]
        assert pq.read_schema(next(Path("out/data").iterdir())).names == left
        assert load_dataset("out", split="train", cache_dir=str(place / "cache")).column_names == left
    with pytest.raises(ValueError, match=r"begun with source.drop_columns"):
        run(source, saved_generator, kind=kind)


def test_masks_may_be_dropped_after_they_were_used(place, saved_generator):
    source = write_samples()
    run(source, saved_generator, "all", kind="tars")
    run(source | {"drop_columns": ["mask.png"]}, saved_generator, kind="tars")
    assert published("out") == published("all")
    with tarfile.open("out/data/0.tar") as tar:
        names = [name.removeprefix("s/0.") for name in tar.getnames() if name.startswith("s/0.")]
    assert names == ["png", "thumb.jpg", "icon", "json"]


def test_an_image_that_is_dropped_does_not_make_it_doubtful_which_one_is_meant(place, saved_generator):
    source = write_samples() | {"image_column": None}
    assert run(source, saved_generator, "doubtful", kind="tars").failed == 4
    assert run(source | {"drop_columns": ["thumb.jpg"]}, saved_generator, kind="tars").failed == 1
    assert cli.main(["verify", "out", "--originals", *source["inputs"]]) == 0


@pytest.mark.parametrize(
    ("inputs", "options", "message"),
    [
        (["in.parquet"], {"drop_columns": ["thmb"]}, "no column 'thmb'; there is image, mask.*say which with drop_c"),
        (["in.parquet"], {"drop_columns": ["image"]}, "--drop_columns image: these are the images that are protected"),
        (["0.tar"], {"drop_columns": ["jpg"], "image_column": "jpg"}, "--drop_columns jpg: these are the images"),
        (["photos"], {"drop_columns": ["a", "b"]}, "--drop_columns a b is for tables and tars"),
    ],
)
def test_columns_that_cannot_be_dropped_are_refused(place, inputs, options, message):
    write_table()
    write_samples()
    Path("photos").mkdir()
    Image.fromarray(photo(0)).save("photos/a.png")
    with pytest.raises(ValueError, match=message):
        open_source(inputs, Path("out"), **options)


def test_the_command_says_what_is_not_protected_and_how_to_leave_it_out(place, saved_generator, capsys):
    write_table()
    script = load_script()

    def said(*more):
        assert script("in.parquet", "--mask_column", "mask", "--model", saved_generator, *more) == 0
        return capsys.readouterr().err

    first = said("--output", "out")
    assert "out: 3 images in the column crops are not protected; 1 image in the column raw is not" in first
    assert first.strip().endswith("into a new folder with --drop_columns crops raw thumb views")
    assert "not protected" not in said("--output", "new", "--drop_columns", "crops", "raw", "thumb", "views")


@pytest.mark.parametrize("kind", outputs.KINDS)
@pytest.mark.parametrize("write", [write_table, write_samples])
def test_load_dataset_gives_exactly_the_protected_images(place, saved_generator, write, kind):
    source = write()
    if (write, kind) == (write_table, "tars"):
        source["drop_columns"] = ["thumb", "views", "raw"]  # `load_dataset` wants the same members in every sample
    run(source, saved_generator, kind=kind)
    dataset = load_dataset("out", split="train", cache_dir=str(place / "cache"))
    column = {"parquet": "image", "folder": "image", "tars": "png"}[kind]
    wanted = list(published().values())
    loaded = [image for image in dataset[column] if image is not None]
    assert len(loaded) == len(wanted) == len(dataset) - (kind == "parquet")
    for one, other in zip(loaded, wanted, strict=True):
        np.testing.assert_array_equal(np.asarray(one), np.asarray(Image.open(io.BytesIO(other))))
    if kind == "folder":
        beside = {name for name in files("out") if name.startswith("beside/")}
        assert len(beside) > len(wanted)
        assert json.loads(Path(next(f"out/{name}" for name in beside if name.endswith("json"))).read_text())


def test_names_of_source_files_are_not_loaded_as_classes_and_folders_of_photos_are(place, saved_generator):
    for name in ("cat", "dog"):
        (place / "photos" / name).mkdir(parents=True)
        (place / "photos" / name / "1.png").write_bytes(encoded(photo(0)))
        Dataset.from_dict({"image": [str(place / "photos" / name / "1.png")]}).to_parquet(f"{name}.parquet")
    columns = []
    for number, inputs in enumerate((["photos"], ["cat.parquet", "dog.parquet"])):
        protect = ProtectImages(str(saved_generator), whole_image=True)
        assert (
            protect_dataset(open_source(inputs, Path(f"{number}")), Path(f"{number}"), "folder", protect).records == 2
        )
        columns.append(load_dataset(f"{number}", split="train", cache_dir=str(place / "cache")).column_names)
    assert columns == [["image", "label"], ["image"]]


@pytest.mark.parametrize(
    ("format", "suffix"),
    [
        ("PNG", "png"),
        ("JPEG", "jpg"),
        ("GIF", "gif"),
        ("TIFF", "tiff"),
        ("WEBP", "webp"),
        ("BMP", "bmp"),
        ("AVIF", "avif"),
        ("JPEG2000", "jp2"),
        ("PPM", "ppm"),
    ],
)
def test_images_are_known_by_how_they_begin(format, suffix):
    assert image_kind(encoded(photo(0), format)) == suffix


def test_what_is_no_image_is_not_counted():
    assert image_kind(BROKEN["heic"]) == "heic"
    texts = (b"", b"hello", b"BMW is a car", b"P5", b"\0\0\0\x18ftypisom\0\0\0\0", b"RIFF\0\0\0\0WAVEfmt ")
    assert [image_kind(data) for data in texts] == [None] * 6
    assert count_images([{"bytes": None, "path": "https://x.org/a.JPG"}, {"bytes": None, "path": None}]) == 1
    assert count_images([{"bytes": b"RIFF\0\0\0\0WAVEfmt ", "path": "a.jpg"}, None, "photo.jpg", 3]) == 0
