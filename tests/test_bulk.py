"""Whole data sets in shards: every kind in and out, killed at every step, and checked afterwards."""

import hashlib
import importlib.util
import io
import json
import os
import shutil
import signal
import socket
import struct
import subprocess
import sys
import tarfile
import zlib
from pathlib import Path
from unittest.mock import Mock

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from datasets import Array2D, Array3D, Dataset, Features, List, Value, load_dataset
from datasets import Image as ImageFeature
from PIL import Image

from unseg_hf import ProtectImages, Protector, UnSegProcessor, cli
from unseg_hf.bulk import manifest, outputs
from unseg_hf.bulk.opening import open_source
from unseg_hf.bulk.progress import Progress, duration
from unseg_hf.bulk.run import protect_dataset, where_pids_hold
from unseg_hf.mapping import RecordError
from unseg_hf.protection import PROTECTED_BEFORE

SCRIPT = Path(__file__).parent.parent / "training_scripts" / "protect_dataset.py"


def encoded(pixels, format="PNG"):
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, format)
    return buffer.getvalue()


def photo(seed, height=24, width=32):
    return np.random.default_rng(seed).integers(40, 210, (height, width + seed % 3, 3), dtype=np.uint8)


def mask(seed, height=24, width=32):
    drawn = np.zeros((height, width + seed % 3), np.uint8)
    drawn[4:15, 6:20] = 255
    return drawn


GOOD = 9
BROKEN = {
    "cut": encoded(photo(0))[:-60],
    "empty": b"",
    "heic": b"\0\0\0\x18ftypheic\0\0\0\0mif1heic",
    "text": b"hello",
}


def samples():
    """Name, suffix, image and mask of every record, in the order of their names."""
    found = [(f"p{i}", "jpg" if i % 2 else "png", i) for i in range(GOOD)]
    good = [(name, suffix, encoded(photo(i), {"jpg": "JPEG"}.get(suffix, "PNG")), i) for name, suffix, i in found]
    bad = [(name, "png", data, 0) for name, data in BROKEN.items()]
    bad.append(("other_mask", "png", encoded(photo(0)), 1))
    return sorted((name, suffix, data, encoded(mask(i))) for name, suffix, data, i in good + bad)


@pytest.fixture
def place(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return tmp_path


def write_images(folder):
    for name, suffix, data, drawn in samples():
        for path, content in ((f"in/{name}.{suffix}", data), (f"masks/{name}.png", drawn)):
            (folder / path).parent.mkdir(parents=True, exist_ok=True)
            (folder / path).write_bytes(content)
    return {"inputs": ["in"], "masks": folder / "masks"}


def rows():
    return {
        "image": [{"bytes": data, "path": None} for _, _, data, _ in samples()],
        "mask": [{"bytes": drawn, "path": None} for *_, drawn in samples()],
        "caption": [name for name, *_ in samples()],
        "numbers": [[1, index] for index, _ in enumerate(samples())],
    }


FEATURES = Features(
    {"image": ImageFeature(), "mask": ImageFeature(), "caption": Value("string"), "numbers": [Value("int16")]}
)


def write_parquet(folder):
    dataset = Dataset.from_dict(rows(), features=FEATURES)
    (folder / "in").mkdir()
    dataset.select(range(8)).to_parquet(folder / "in/a.parquet", batch_size=3)
    dataset.select(range(8, len(dataset))).to_parquet(folder / "in/b.parquet")
    return {"inputs": ["in"], "mask_column": "mask"}


def write_saved(folder):
    Dataset.from_dict(rows(), features=FEATURES).save_to_disk(folder / "in")
    return {"inputs": ["in"], "mask_column": "mask"}


def write_tars(folder):
    (folder / "in").mkdir()
    for part in range(2):
        with tarfile.open(folder / f"in/part{part}.tar", "w") as tar:
            for name, suffix, data, drawn in samples()[part * 7 :][:7]:
                for ending, content in (
                    (suffix, data),
                    ("mask.png", drawn),
                    ("json", b'{"name": "%s"}' % name.encode()),
                ):
                    info = tarfile.TarInfo(f"s/{name}.{ending}")
                    info.size = len(content)
                    tar.addfile(info, io.BytesIO(content))
    return {"inputs": ["in/*.tar"], "mask_column": "mask.png"}


WRITE = {"images": write_images, "parquet": write_parquet, "saved": write_saved, "tars": write_tars}


def run(source, model, output="out", kind="parquet", epsilon=None, **options):
    opened = open_source(**source, output=Path(output), shard_size=5)
    protect = ProtectImages(str(model), mask_column="masks", epsilon=epsilon)
    return protect_dataset(opened, Path(output), kind, protect, **options)


def files(folder):
    return {
        path.relative_to(folder).as_posix(): path.read_bytes() for path in Path(folder).rglob("*") if path.is_file()
    }


def lines(output="out"):
    parts = sorted(Path(output, "manifest").glob("*.jsonl"))
    return [json.loads(line) for part in parts for line in part.read_text().splitlines()]


def published(output="out"):
    """Source key and image of everything that was published."""
    found = {}
    for line in lines(output):
        if line["status"] == "protected":
            places = [(line["output"], line["at"])]
            found[line["source"]] = next(outputs.published_images(Path(output), places, "image"))
    return found


@pytest.mark.parametrize("kind", outputs.KINDS)
@pytest.mark.parametrize("given", WRITE)
def test_every_source_in_every_output_has_the_protectors_pixels(place, saved_generator, given, kind):
    source = WRITE[given](place)
    summary = run(source, saved_generator, kind=kind)
    assert summary.complete
    assert (summary.records, summary.failed) == (GOOD + 5, 5)
    protector = Protector.from_pretrained(saved_generator)
    images = published()
    assert len(images) == GOOD
    for line, (name, _, data, drawn) in zip(lines(), samples(), strict=True):
        if line["status"] == "failed":
            assert name in {*BROKEN, "other_mask"}
            assert line["error"]
            continue
        expected = protector.protect(data, mask=drawn)
        assert np.array_equal(np.asarray(Image.open(io.BytesIO(images[line["source"]]))), np.asarray(expected.image))
        assert line["max_noise"] == expected.report["max_noise"]
    assert not Path("out/.partial").exists()


def test_parquet_keeps_all_columns_and_marks_what_failed(place, saved_generator):
    run(write_parquet(place), saved_generator)
    dataset = load_dataset("out", split="train", cache_dir=str(place / "cache"))
    assert dataset.features == Features(FEATURES | {"protection_error": Value("string")})
    assert dataset["caption"][:] == rows()["caption"]
    assert dataset["numbers"][:] == rows()["numbers"]
    images = dataset.cast_column("image", ImageFeature(decode=False))["image"]
    failed = [bool(error) for error in dataset["protection_error"]]
    assert [image is None for image in images] == failed
    assert sum(failed) == 5
    shutil.rmtree("out")
    run({"inputs": ["in"], "mask_column": "mask"}, saved_generator, on_error="drop")
    dropped = load_dataset("out", split="train", cache_dir=str(place / "cache2"))
    assert dropped.features == FEATURES
    assert dropped["caption"][:] == [name for name, gone in zip(rows()["caption"], failed, strict=True) if not gone]


def test_tars_and_folders_keep_what_lies_beside_an_image(place, saved_generator):
    run(write_tars(place), saved_generator, kind="tars")
    with tarfile.open("out/data/part0.tar") as tar:
        names = tar.getnames()
        assert [name for name in names if "/p0." in name] == ["s/p0.png", "s/p0.mask.png", "s/p0.json"]
        assert json.loads(tar.extractfile("s/p0.json").read()) == {"name": "p0"}
        assert not any("/cut." in name for name in names)
    shutil.rmtree("in")
    run(write_parquet(place), saved_generator, "folder", kind="folder")
    assert Image.open("folder/data/a/00000005.png").format == "PNG"


def test_images_inside_other_columns_become_files_beside_the_image(place, saved_generator):
    picture = {"bytes": encoded(photo(1)), "path": None}
    columns = {
        "image": [{"bytes": encoded(photo(0)), "path": None}],
        "views": [[picture, None]],
        "more": [{"thumb": picture, "n": 7}],
        "both": [[picture, picture]],
        "name": ["both.0.png"],
    }
    image = ImageFeature()
    features = Features(
        {"image": image, "views": [image], "more": {"thumb": image, "n": Value("int8")}, "both": [image],
         "name": Value("string")}
    )  # fmt: skip
    Dataset.from_dict(columns, features=features).to_parquet("a.parquet")
    source = open_source(["a.parquet"], Path("out"))
    protect_dataset(source, Path("out"), "folder", ProtectImages(str(saved_generator), whole_image=True))
    beside = {path.name.partition(".")[2]: path.read_bytes() for path in Path("out/beside").rglob("*.*")}
    assert json.loads(beside.pop("json")) == {
        "views": ["views.0.png", None], "more": {"thumb": "more.thumb.png", "n": 7}, "name": "both.0.png"
    }  # fmt: skip
    names = {"views.0.png", "more.thumb.png", "both.0.png", "both.1.png"}
    assert beside == dict.fromkeys(names, picture["bytes"])
    # Two files of one name, and one that would lead elsewhere, cost their record alone.
    for name, key in (("more.thumb", "thumb"), ("views", "a/../../../b")):
        odd = {"image": columns["image"], name: [picture], "more": [{key: picture}]}
        features = Features({"image": image, name: image, "more": {key: image}})
        Dataset.from_dict(odd, features=features).to_parquet("odd.parquet")
        for kind in ("folder", "tars"):
            output = Path(f"{name}-{kind}")
            protect = ProtectImages(str(saved_generator), whole_image=True)
            protect_dataset(open_source(["odd.parquet"], output), output, kind, protect)
            (line,) = lines(output)
            assert line["status"] == "failed"
            assert "would be called more.thumb.png" in line["error"] or "leads out" in line["error"]
            assert not list(output.rglob("*.png"))


def test_an_image_beside_a_mask_that_is_called_png_gets_a_name_of_its_own(place, saved_generator):
    with tarfile.open("a.tar", "w") as tar:
        for name, data in (("0.jpg", encoded(photo(0), "JPEG")), ("0.png", encoded(mask(0)))):
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    run({"inputs": ["a.tar"], "mask_column": "png"}, saved_generator, kind="tars")
    with tarfile.open("out/data/a.tar") as tar:
        assert tar.getnames() == ["0.image.png", "0.png"]


def test_a_folder_that_is_called_as_a_shard_is_keeps_its_name_in_tars(place, saved_generator):
    for name in ("in/x.png", "in/00000/x.png", "in/00000/y.png"):
        Path(name).parent.mkdir(parents=True, exist_ok=True)
        Path(name).write_bytes(encoded(photo(0)))
    protect = ProtectImages(str(saved_generator), whole_image=True)
    summary = protect_dataset(open_source(["in"], Path("out")), Path("out"), "tars", protect)
    assert (summary.records, summary.failed) == (3, 0)
    with tarfile.open("out/data/00000.tar") as tar:
        assert {n for n in tar.getnames() if n.endswith(".png")} == {"x.png", "00000/x.png", "00000/y.png"}


def test_a_table_without_rows_is_refused(place, saved_generator):
    Dataset.from_dict({"image": []}, features=Features({"image": ImageFeature()})).to_parquet("none.parquet")
    protect = ProtectImages(str(saved_generator), whole_image=True)
    with pytest.raises(ValueError, match="parquet without images: there is nothing to protect"):
        protect_dataset(open_source(["none.parquet"], Path("out")), Path("out"), "parquet", protect)
    assert not Path("out").exists()


def test_names_in_a_tar_that_lead_out_of_the_output_are_refused(place, saved_generator):
    with tarfile.open("a.tar", "w") as tar:
        for name in ("../../evil.png", "fine.png", "fine.txt", "other.png", "fine.png"):
            data = encoded(photo(0))
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    opened = open_source(["a.tar"], Path("out"))
    protect_dataset(opened, Path("out"), "folder", ProtectImages(str(saved_generator), whole_image=True))
    assert [line.get("error", "")[-40:] for line in lines()] == [
        "../../evil leads out of the output; rename it"[-40:],
        "",
        "",
        "a/fine is there a second time; rename one"[-40:],
    ]
    assert not list(place.parent.glob("evil*"))


def test_two_neighbours_of_one_name_in_a_tar_are_an_error_and_not_one_image(place, saved_generator):
    with tarfile.open("a.tar", "w") as tar:
        for seed, name in enumerate(("p.png", "p.png", "q.png")):
            data = encoded(photo(seed))
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    opened = open_source(["a.tar"], Path("out"))
    protect_dataset(opened, Path("out"), "tars", ProtectImages(str(saved_generator), whole_image=True))
    assert [line.get("error", "") for line in lines()] == ["p.png is there twice, side by side; rename one", ""]
    with tarfile.open("out/data/a.tar") as tar:
        assert tar.getnames() == ["q.png"]
    protect_dataset(opened, Path("table"), "parquet", ProtectImages(str(saved_generator), whole_image=True))
    failed, protected = pq.read_table("table/data").to_pylist()
    assert failed.keys() == protected.keys() == {"__key__", "image", "protection_error"}
    assert failed["image"] is None


def test_names_of_tars_with_dots_stay_apart_and_the_same_name_twice_is_refused(place, saved_generator):
    write_tars(place)
    for part in range(2):
        Path(f"in/part{part}.tar").rename(f"in/part.{part}.tar")
    run({"inputs": ["in"], "mask_column": "mask.png"}, saved_generator, kind="tars")
    assert sorted(path.name for path in Path("out/data").iterdir()) == ["part.0.tar", "part.1.tar"]
    shutil.copy("in/part.0.tar", "in/part.0.tgz")
    with pytest.raises(ValueError, match=r"several tars are called part.0: .*rename one"):
        open_source(["in"], Path("out"))


def test_tars_that_are_named_by_way_of_other_folders_replace_nothing(place, saved_generator, monkeypatch):
    for name in ("b.tar", "x/b.tar", "x/y/none"):
        Path(name).parent.mkdir(parents=True, exist_ok=True)
        with tarfile.open(name, "w") as tar:
            data = encoded(photo(len(name)))
            info = tarfile.TarInfo("p.png")
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    before = files(place)
    monkeypatch.chdir("x/y")
    opened = open_source(["../../b.tar", "../b.tar"], Path("../out"))
    protect_dataset(opened, Path("../out"), "tars", ProtectImages(str(saved_generator), whole_image=True))
    after = files(place)
    assert {name: after[name] for name in before} == before
    written = {name for name in after if name.endswith(".tar")} - before.keys()
    assert written == {f"x/out/data/{place.name}/b.tar", "x/out/data/x/b.tar"}
    writer = outputs.FolderShard(opened, 0, place / "partial", False)
    for name in ("../evil", "/evil"):
        with pytest.raises(ValueError, match="leads out of the output"):
            writer._open(name)


@pytest.mark.parametrize(("given", "kind"), [("images", "folder"), ("parquet", "parquet")])
def test_an_output_inside_the_input_is_not_protected_again(place, saved_generator, given, kind):
    source = WRITE[given](place)
    first = run(source, saved_generator, "in/out", kind=kind)
    before = files("in/out")
    assert run(source, saved_generator, "in/out", kind=kind) == first
    assert files("in/out") == before


def test_sa1b_annotations_are_masks(place, saved_generator):
    from unseg_hf.data.records import Record
    from unseg_hf.data.sa1b_writer import write_sa1b

    masks = [mask(0) > 0, np.roll(mask(0) > 0, 8, axis=1)]
    write_sa1b([Record("a", Image.fromarray(photo(0)), masks)], "in", report=lambda line: None)
    run({"inputs": ["in"], "mask_column": "json"}, saved_generator, kind="tars")
    with tarfile.open("in/sa_000000.tar") as tar:
        original = tar.extractfile("sa_1.jpg").read()
    expected = Protector.from_pretrained(saved_generator).protect(original, masks=masks).image
    assert np.array_equal(np.asarray(Image.open(io.BytesIO(published()["sa_000000.tar/sa_1"]))), np.asarray(expected))
    assert cli.main(["verify", "out", "--originals", "in"]) == 0


def write_sample(image, described):
    with tarfile.open("in.tar", "w") as tar:
        for name, data in (("a.png", image), ("a.json", json.dumps(described).encode())):
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return {"inputs": ["in.tar"], "mask_column": "json"}


def test_masks_may_be_of_the_upright_image(place, saved_generator):
    from pycocotools import mask as coder

    upright = Image.fromarray(photo(0))
    drawn = mask(0) > 0
    code = coder.encode(np.asfortranarray(drawn.astype(np.uint8)))
    code["counts"] = code["counts"].decode()
    exif = Image.Exif()
    exif[274] = 6
    turned = io.BytesIO()
    upright.transpose(Image.Transpose.ROTATE_90).save(turned, "PNG", exif=exif)
    described = {"annotations": [{"segmentation": code, "area": int(drawn.sum())}]}
    summary = run(write_sample(turned.getvalue(), described), saved_generator, kind="tars")
    assert (summary.records, summary.failed) == (1, 0)
    expected = Protector.from_pretrained(saved_generator).protect(upright, mask=drawn).image
    assert np.array_equal(np.asarray(Image.open(io.BytesIO(next(iter(published().values()))))), np.asarray(expected))


def test_of_an_image_that_is_not_read_its_own_error_is_told(place, saved_generator):
    described = {"annotations": [{"segmentation": {"size": [9, 9], "counts": "0"}, "area": 9}]}
    wide = encoded(photo(0))
    wide = wide[:16] + struct.pack(">II", 20_000, 20_000) + wide[24:29] + struct.pack(">I", zlib.crc32(
        wide[12:16] + struct.pack(">II", 20_000, 20_000) + wide[24:29])) + wide[33:]  # fmt: skip
    for image, said in ((wide, "20000 x 20000 is more than"), (b"no image", "this is not an image")):
        shutil.rmtree("out", ignore_errors=True)
        assert run(write_sample(image, described), saved_generator, kind="tars").failed == 1
        assert said in lines()[0]["error"]
        assert "masks" not in lines()[0]["error"]


@pytest.mark.parametrize("size", [[20_000, 20_000], [2**70, 1], [24, 31]])
def test_masks_of_another_size_than_their_image_are_not_decoded(place, saved_generator, size):
    described = {"annotations": [{"segmentation": {"size": size, "counts": "0"}, "area": 9}]}
    summary = run(write_sample(encoded(photo(0)), described), saved_generator, kind="tars")
    assert (summary.records, summary.failed) == (1, 1)
    assert f"masks of (height, width) [({size[0]}, {size[1]})] for an image of" in lines()[0]["error"]


def killed_at(step, source, model, **options):
    """Run in a process that kills itself before the renaming number `step`; False if it came to its end."""
    child = os.fork()
    if child == 0:
        try:
            replace, left = os.replace, [step]

            def replace_or_die(*arguments):
                left[0] -= 1
                if left[0] < 0:
                    os.kill(os.getpid(), signal.SIGKILL)
                replace(*arguments)

            os.replace = replace_or_die
            run(source, model, **options)
        finally:
            os._exit(0)
    _, status = os.waitpid(child, 0)
    return os.WIFSIGNALED(status)


@pytest.mark.parametrize(("given", "kind"), [("images", "folder"), ("parquet", "parquet"), ("tars", "tars")])
def test_killed_before_every_renaming_the_next_run_gives_the_same_bytes(place, saved_generator, given, kind):
    source = WRITE[given](place)
    run(source, saved_generator, "whole", kind=kind)
    expected, step = files("whole"), 0
    while killed_at(step, source, saved_generator, kind=kind):
        assert set(files("out")) != set(expected)
        run(source, saved_generator, kind=kind)
        assert files("out") == expected, step
        shutil.rmtree("out")
        step += 2
    assert step >= 6
    # Killed again and again, every time later.
    shutil.rmtree("out")
    step = 1
    while killed_at(step, source, saved_generator, kind=kind):
        step += 2
    assert files("out") == expected


def test_finished_shards_are_not_made_again_unless_they_were_damaged(place, saved_generator, monkeypatch):
    source = write_images(place)
    run(source, saved_generator)
    expected, made = files("out"), []
    apply = Protector.apply
    monkeypatch.setattr(Protector, "apply", lambda self, *a: made.append(1) or apply(self, *a))
    run(source, saved_generator)
    assert not made
    second = Path("out/data/train-00001-of-00003.parquet")
    second.write_bytes(second.read_bytes()[:-1])
    run(source, saved_generator)
    assert 0 < len(made) <= 5
    assert files("out") == expected


@pytest.mark.parametrize("given", ["parquet", "saved"])
def test_shards_dealt_to_several_jobs_equal_one_run(place, saved_generator, given):
    source = WRITE[given](place)
    run(source, saved_generator, "whole")
    first = run(source, saved_generator, process=(0, 2))
    assert not first.complete
    assert first.finished_shards < first.shards
    assert run(source, saved_generator, process=(1, 2)).complete
    assert files("out") == files("whole")


def test_other_settings_are_refused_by_name(place, saved_generator):
    source = write_images(place)
    run(source, saved_generator)
    before = files("out")
    with pytest.raises(ValueError, match=r"begun with output.on_error 'mark' and not 'drop', protection.epsilon 0.03"):
        run(source, saved_generator, epsilon=0.01, on_error="drop")
    (place / "in/new.png").write_bytes(encoded(photo(3)))
    with pytest.raises(ValueError, match=r"begun with other images or masks"):
        run(source, saved_generator)
    assert files("out") == before
    Path("full").mkdir()
    Path("full/mine.txt").touch()
    with pytest.raises(FileExistsError, match=r"full holds files and no settings.json"):
        run(source, saved_generator, "full")


@pytest.mark.parametrize("changed", ["in/p1.jpg", "masks/p1.png"])
def test_a_run_does_not_go_on_with_images_or_masks_that_were_changed(place, saved_generator, changed):
    source = write_images(place)
    run(source, saved_generator, process=(1, 2))
    line = next(line for line in lines() if line["source"] == "p1.jpg")
    assert line["mask_sha256"] == hashlib.sha256(Path("masks/p1.png").read_bytes()).hexdigest()
    data = Path(changed).read_bytes()
    Path(changed).write_bytes(data[:-1] + b"x")
    with pytest.raises(ValueError, match=r"begun with other images or masks"):
        run(source, saved_generator)


def test_a_damaged_shard_has_no_mark_while_it_is_made_anew_and_others_work_on(place, saved_generator):
    source = write_images(place)
    run(source, saved_generator, kind="folder")
    whole = files("out")
    for name in ("data/p1.png", "data/p8.png"):
        Path("out", name).unlink()
    at_work, killed = (Path("out/.partial", f"{where_pids_hold()}-{pid}-0") for pid in (os.getpid(), 2**22 + 1))
    elsewhere = Path("out/.partial", f"{socket.gethostname()}.1-{2**22 + 1}-0")  # another container of this host
    for folder in (at_work, killed, elsewhere):
        folder.mkdir(parents=True)
    seen = []

    class Watched(outputs.WRITERS["folder"]):
        def close(self):
            seen.append(sorted(Path("out/manifest").glob("*.json")))
            super().close()

    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(outputs.WRITERS, "folder", Watched)
        run(source, saved_generator, kind="folder")
    assert [len(marks) for marks in seen] == [1, 2]
    assert at_work.is_dir()
    assert not killed.exists()
    elsewhere.rmdir()
    at_work.rmdir()
    Path("out/.partial").rmdir()
    assert files("out") == whole


@pytest.mark.parametrize("kind", ["folder", "tars"])
def test_a_name_that_is_not_utf8_costs_its_record_alone(place, saved_generator, kind):
    for folder, pixels in (("in", photo(0)), ("masks", mask(0))):
        Path(folder).mkdir()
        for name in (b"a.png", b"bad\xff.png", b"z.png"):
            Path(folder, os.fsdecode(name)).write_bytes(encoded(pixels))
    summary = run({"inputs": ["in"], "masks": Path("masks")}, saved_generator, kind=kind)
    assert summary.complete
    assert (summary.records, summary.failed) == (3, 1)
    (failed,) = [line for line in manifest.read_lines(Path("out"), 0) if line.get("error")]
    assert "is no name in UTF-8; rename it" in failed["error"]
    assert [name for name in files("out") if "bad" in name] == []
    assert len(load_dataset("out", split="train", cache_dir=str(place / "cache"))) == 2


def test_a_name_that_is_too_long_for_a_file_costs_its_record_alone(place, saved_generator):
    long = "n" * 260
    members = {f"{name}.png": encoded(photo(0)) for name in ("a", long, "z")}
    members |= {f"{name}.mask.png": encoded(mask(0)) for name in ("a", long, "z")}
    write_tar("in.tar", dict(sorted(members.items())))
    source = {"inputs": ["in.tar"], "image_column": "png", "mask_column": "mask.png"}
    summary = run(source, saved_generator, kind="folder")
    assert summary.complete
    assert (summary.records, summary.failed) == (3, 1)


def test_folders_and_files_are_found_by_their_own_names(place, saved_generator):
    for folder in ("set1", "set[1]"):
        Path(folder).mkdir()
        Path(folder, f"{len(folder)}.png").write_bytes(encoded(photo(0)))
    source = open_source(["set[1]"], Path("out"))
    assert [record.key for record in source.read(0)] == ["6.png"]
    run({"inputs": ["set[1]"]}, saved_generator, kind="folder")
    Path("out/more").symlink_to(Path("set1").resolve())
    assert manifest.strange_files(Path("out"), 1) == ["more"]


def test_a_broken_record_stops_the_run_on_request_and_what_was_finished_stays(place, saved_generator):
    source = write_images(place)
    with pytest.raises(RecordError, match=r"cut.png: .*damaged.*mend it, or choose --on_error"):
        run(source, saved_generator, on_error="raise")
    assert not list(Path("out").rglob("*.parquet")) or all(
        ".partial" in str(p) for p in Path("out").rglob("*.parquet")
    )


def test_a_tar_that_is_cut_gives_what_is_whole_and_says_so(place, saved_generator):
    source = write_tars(place)
    data = Path("in/part1.tar").read_bytes()
    Path("in/part1.tar").write_bytes(data[: len(data) * 2 // 3])
    summary = run(source, saved_generator, kind="tars")
    assert summary.complete
    last = lines()[-1]
    assert last["source"] == "part1.tar"
    assert "part1.tar: it is damaged" in last["error"]
    assert any(line["source"].startswith("part1.tar/") and line["status"] == "protected" for line in lines())
    assert cli.main(["verify", "out", "--originals", "in"]) == 0


def write_tar(path, members):
    with tarfile.open(path, "w:gz" if str(path).endswith("gz") else "w") as tar:
        for name, data in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))


@pytest.mark.parametrize("damage", ["no tar", "overwritten"])
def test_columns_are_those_of_the_first_whole_sample_where_the_first_tar_is_damaged(place, saved_generator, damage):
    def members(*numbers):
        return {f"{i}.{suffix}": encoded(draw(i)) for i in numbers for suffix, draw in drawings}

    drawings = (("png", photo), ("mask.png", mask))
    write_tar("b.tar", {"0.png": encoded(photo(0))} | members(1))
    write_tar("c.tar", members(2, 3))
    write_tar("whole.tar", {"0.txt": b"text" * 100_000})
    packer = zlib.compressobj(wbits=31)
    begin = packer.compress(Path("whole.tar").read_bytes()[:200_000]) + packer.flush(zlib.Z_FULL_FLUSH)
    # In the midst of a member it is zlib that meets a block of no kind.
    Path("a.tar.gz").write_bytes(begin + b"\xff" * 100 if damage == "overwritten" else b"no tar" * 200)
    source = {"inputs": ["a.tar.gz", "b.tar", "c.tar"], "mask_column": "mask.png"}
    run(source, saved_generator, "alone")
    for process in (2, 0, 1):
        summary = run(source, saved_generator, process=(process, 3))
    assert files("out") == files("alone")
    assert (summary.records, summary.failed) == (5, 2)
    assert lines()[0]["source"] == "a.tar.gz"
    assert "a.tar.gz: it is damaged, or no tar" in lines()[0]["error"]
    dataset = load_dataset("out", split="train", cache_dir=str(place / "cache"))
    assert dataset.column_names == ["__key__", "image", "mask.png", "protection_error"]
    assert [image is not None for image in dataset["image"]] == [False, True, True, True]
    run(source, saved_generator, "tars", kind="tars")
    assert len(load_dataset("tars", split="train", cache_dir=str(place / "cache"))) == 3


@pytest.mark.parametrize("on_error", ["mark", "drop"])
def test_a_damaged_row_group_costs_its_own_records_alone(place, saved_generator, on_error):
    columns = {name: values[:9] for name, values in rows().items()}
    columns["image"] = [{"bytes": encoded(photo(i)), "path": None} for i in range(9)]
    columns["mask"] = [{"bytes": encoded(mask(i)), "path": None} for i in range(9)]
    table = Dataset.from_dict(columns, features=FEATURES).with_format("arrow")[:]
    required = [field.with_nullable(field.name != "caption") for field in table.schema]
    pq.write_table(table.cast(pa.schema(required)), "in.parquet", row_group_size=3, compression="snappy")
    page = pq.read_metadata("in.parquet").row_group(1).column(2)
    assert page.path_in_schema == "mask.bytes"
    data = bytearray(Path("in.parquet").read_bytes())
    begin = page.dictionary_page_offset or page.data_page_offset
    data[begin : begin + page.total_compressed_size] = bytes(page.total_compressed_size)
    Path("in.parquet").write_bytes(data)
    # Shards of five rows: the first ends, and the second begins, in the damaged row group.
    summary = run({"inputs": ["in.parquet"], "mask_column": "mask"}, saved_generator, on_error=on_error)
    assert (summary.shards, summary.records, summary.failed) == (2, 9, 3)
    assert [line["source"] for line in lines()] == [f"in.parquet#{row}" for row in range(9)]
    for line in lines()[3:6]:
        assert line["error"].startswith("in.parquet: row group 1 is damaged (")
    protector = Protector.from_pretrained(saved_generator)
    images = published()
    assert [int(key.partition("#")[2]) for key in images] == [0, 1, 2, 6, 7, 8]
    for key, image in images.items():
        row = int(key.partition("#")[2])
        expected = protector.protect(encoded(photo(row)), mask=mask(row)).image
        assert np.array_equal(np.asarray(Image.open(io.BytesIO(image))), np.asarray(expected))
    captions = load_dataset("out", split="train", cache_dir=str(place / "cache"))["caption"][:]
    gone = [None] * 3 if on_error == "mark" else []
    assert captions == columns["caption"][:3] + gone + columns["caption"][6:]
    assert cli.main(["verify", "out", "--originals", "in.parquet"]) == 0


def test_rows_of_a_file_that_cannot_be_opened_any_more_are_listed_one_by_one(place, saved_generator):
    write_parquet(place)
    source = open_source([str(place / "in")], Path("out"), mask_column="mask")
    Path("in/b.parquet").unlink()
    protect = ProtectImages(str(saved_generator), mask_column="masks")
    summary = protect_dataset(source, Path("out"), "folder", protect)
    assert summary.records == len(samples())
    lost = [line for line in lines() if line["source"].startswith("b.parquet#")]
    assert len(lost) == len(samples()) - 8
    assert all("b.parquet: " in line["error"] and str(place) not in line["error"] for line in lost)


def test_a_damaged_parquet_file_is_named(place, saved_generator):
    source = write_parquet(place)
    data = bytearray(Path("in/b.parquet").read_bytes())
    Path("in/c.parquet").write_bytes(data[:-20])
    with pytest.raises(ValueError, match=r"c.parquet: no parquet file, or a damaged one"):
        run(source, saved_generator)
    Path("in/c.parquet").unlink()
    data[4:400] = bytes(396)
    Path("in/b.parquet").write_bytes(data)
    assert run(source, saved_generator).complete
    assert any("b.parquet: row group 0 is damaged" in line.get("error", "") for line in lines())


@pytest.mark.parametrize(("given", "kind"), [("images", "folder"), ("parquet", "parquet"), ("tars", "tars")])
def test_verify_finds_a_changed_byte_a_strange_file_and_a_broken_bound(place, saved_generator, capsys, given, kind):
    source = WRITE[given](place)
    run(source, saved_generator, kind=kind)
    originals = ["--originals", *source["inputs"]] + (["--masks", "masks"] if given == "images" else [])
    if given == "tars":
        originals = ["--originals", "in"]
    assert cli.main(["verify", "out"]) == 0
    assert cli.main(["verify", "out", *originals]) == 0
    assert f"{GOOD} images" in capsys.readouterr().out

    victim = next(path for path in sorted(Path("out/data").rglob("*.*")) if path.is_file())
    whole = victim.read_bytes()
    victim.write_bytes(whole[:100] + bytes([whole[100] ^ 1]) + whole[101:])
    Path("out/data/unprotected.png").write_bytes(encoded(photo(0)))
    assert cli.main(["verify", "out"]) == 1
    said = capsys.readouterr().err.splitlines()
    assert len(said) == 2
    assert f"{victim.relative_to('out')}: its sha256 is not the manifest's" in said[0]
    assert "data/unprotected.png: it is not in the manifest" in said[1]
    victim.write_bytes(whole)
    Path("out/data/unprotected.png").unlink()

    mark = next(Path("out/manifest").glob("*.json"))
    told = json.loads(mark.read_text())
    os.mkfifo("out/pipe")
    mark.write_text(json.dumps(told | {"files": told["files"] | dict.fromkeys(["/dev/zero", "../x", "pipe"], "0")}))
    assert cli.main(["verify", "out"]) == 1
    assert capsys.readouterr().err.count("this is no file of the output") == 3
    mark.write_text(json.dumps(told))
    Path("out/pipe").unlink()

    settings = json.loads(Path("out/settings.json").read_text())
    settings["protection"] |= {"epsilon": 1 / 255, "epsilon_background": 1 / 255}
    Path("out/settings.json").write_text(json.dumps(settings))
    assert cli.main(["verify", "out", *originals]) == 1
    said = capsys.readouterr().err
    assert said.count("differs from its original by") == GOOD
    assert "where 1 is the most" in said


def test_verify_knows_the_mask_and_changed_originals(place, saved_generator, capsys):
    source = write_images(place)
    run(source, saved_generator, kind="folder")
    drawn = np.asarray(Image.open("masks/p1.png"))
    Image.fromarray(255 - drawn).save("masks/p1.png")
    Image.fromarray(photo(5)).save("in/p3.jpg", "PNG")
    capsys.readouterr()  # the first to load the generator shows how far it is
    assert cli.main(["verify", "out", "--originals", "in", "--masks", "masks"]) == 1
    said = capsys.readouterr().err.splitlines()
    assert len(said) == 2
    assert "data/p1.png: its mask was changed since" in said[0]
    assert "data/p3.png: its original p3.jpg was changed since" in said[1]
    Path("in/p3.jpg").rename("in/p33.jpg")
    assert cli.main(["verify", "out", "--originals", "in", "--masks", "masks"]) == 2
    assert "these are not the originals of out" in capsys.readouterr().err
    assert cli.main(["verify", "in"]) == 2
    assert "in has no settings.json" in capsys.readouterr().err


@pytest.mark.parametrize("stored", ["array", "several", "label_map"])
def test_verify_reads_masks_of_array_columns_as_the_run_did(place, saved_generator, stored, capsys):
    drawn = np.zeros((24, 32), np.uint8)
    drawn[4:15, 6:20] = 1
    other = np.roll(drawn, 10, axis=1)
    value = {"array": drawn, "several": np.stack([drawn, other]), "label_map": drawn + 2 * other}[stored]
    feature = Array3D(value.shape, "uint8") if stored == "several" else Array2D(value.shape, "uint8")
    row = {"image": [{"bytes": encoded(photo(i, width=32 - i % 3)), "path": None} for i in range(2)]}
    row["mask"] = [value, value]
    features = Features({"image": ImageFeature(), "mask": feature})
    Dataset.from_dict(row, features=features).to_parquet("in.parquet")
    opened = open_source(["in.parquet"], Path("out"), mask_column="mask")
    protect = ProtectImages(str(saved_generator), mask_column="masks", label_maps=stored == "label_map")
    assert protect_dataset(opened, Path("out"), "parquet", protect).failed == 0
    assert cli.main(["verify", "out", "--originals", "in.parquet"]) == 0
    # What lies outside of the masks was checked, and with the budget of the background.
    settings = json.loads(Path("out/settings.json").read_text())
    settings["protection"]["epsilon_background"] = 0
    Path("out/settings.json").write_text(json.dumps(settings))
    capsys.readouterr()
    assert cli.main(["verify", "out", "--originals", "in.parquet"]) == 1
    assert capsys.readouterr().err.count("outside the mask, where 0 is the most") == 2


def test_classes_of_a_table_choose_the_noises(place, build_generator, script, capsys):
    build_generator(noise_codes=4).save_pretrained("coded")
    UnSegProcessor.for_image_size(64).save_pretrained("coded")
    objects = Features({"bbox": List(List(Value("float32"))), "category": List(Value("int64"))})
    boxes, classes = [[3, 4, 9, 12], [14, 8, 20, 20]], [[2, 0], [1, 1], [0]]
    rows = {
        "image": [{"bytes": encoded(photo(i)), "path": None} for i in range(3)],
        "objects": [{"bbox": boxes, "category": numbers} for numbers in classes],
    }
    Dataset.from_dict(rows, features=Features({"image": ImageFeature(), "objects": objects})).to_parquet("in.parquet")
    request = ["in.parquet", "--output", "out", "--model", "coded", "--box_column", "objects.bbox", "--per_segment"]
    assert script(*request, "--class_column", "objects.category") == 0
    protector = Protector.from_pretrained("coded")
    for index, image in enumerate(published().values()):
        expected = protector.protect(photo(index), boxes=boxes, classes=classes[index], mode="per_segment").image
        np.testing.assert_array_equal(np.asarray(Image.open(io.BytesIO(image))), np.asarray(expected))
    assert len(published()) == 2
    assert "classes=[0] for 2 masks or boxes" in lines()[2]["error"]
    assert "the boxes of the data set, each with the noise of its class" in Path("out/README.md").read_text()
    assert cli.main(["verify", "out", "--originals", "in.parquet"]) == 0
    capsys.readouterr()
    assert script(*request) == 2
    assert "protection.classes" in capsys.readouterr().err
    assert script(*request[:-1], "--class_column", "objects.category") == 2
    assert "--class_column objects.category needs --per_segment, and" in capsys.readouterr().err


@pytest.mark.parametrize("kind", ["parquet", "tars"])
def test_boxes_of_a_table_are_the_protectors_boxes_and_are_verified(place, saved_generator, script, capsys, kind):
    boxes = [[[3, 4, 9, 12.5]], [[1, 1, 4, 4], [10, 8, 12, 9]], [], [[5, 5, 0, 3]]]
    objects = Features({"bbox": List(List(Value("float32"))), "category": List(Value("int64"))})
    rows = {
        "image": [{"bytes": encoded(photo(i)), "path": None} for i in range(4)],
        "objects": [{"bbox": found, "category": [1] * len(found)} for found in boxes],
    }
    Dataset.from_dict(rows, features=Features({"image": ImageFeature(), "objects": objects})).to_parquet("in.parquet")
    request = ["in.parquet", "--output", "out", "--output_format", kind, "--model", str(saved_generator)]
    request += ["--epsilon", "8", "--epsilon_background", "0", "--box_column", "objects.bbox"]
    assert script(*request, "--box_format", "xywh") == 0
    protector = Protector.from_pretrained(saved_generator)
    for index, image in enumerate(published().values()):
        given = {"boxes": boxes[index], "box_format": "xywh"} if boxes[index] else {"masks": []}
        expected = protector.protect(photo(index), epsilon=8 / 255, epsilon_background=0.0, **given)
        np.testing.assert_array_equal(np.asarray(Image.open(io.BytesIO(image))), np.asarray(expected.image))
    assert len(published()) == 3
    assert "needs a width and a height above 0" in lines()[3]["error"]
    card = Path("out/README.md").read_text()
    assert "in the boxes" in card
    assert "the boxes of the data set" in card
    if kind == "parquet":
        assert Dataset.from_parquet("out/data/*.parquet")["objects"][:] == rows["objects"]
    capsys.readouterr()
    assert cli.main(["verify", "out", "--originals", "in.parquet"]) == 0
    assert "NOT checked" not in capsys.readouterr().out
    assert script(*request) == 2
    assert "protection.boxes" in capsys.readouterr().err
    # Widths taken for corners lie elsewhere: what is outside of them was changed.
    settings = json.loads(Path("out/settings.json").read_text())
    assert settings["protection"]["boxes"] == "xywh"
    settings["protection"]["boxes"] = "xyxy"
    Path("out/settings.json").write_text(json.dumps(settings))
    assert cli.main(["verify", "out", "--originals", "in.parquet"]) == 1
    assert "outside the mask, where 0 is the most" in capsys.readouterr().err


def test_verify_looks_at_the_whole_folder_and_says_where_the_masks_are_not_known(place, saved_generator, capsys):
    run(write_images(place), saved_generator, kind="folder")
    for name in (
        ".gitattributes",
        ".cache/huggingface/download/a",
        "original.png",
        "manifest/more.jsonl",
        "x/[1].png",
    ):
        Path("out", name).parent.mkdir(parents=True, exist_ok=True)
        Path("out", name).write_bytes(encoded(photo(0)))
    capsys.readouterr()
    assert cli.main(["verify", "out", "--originals", "in", "--masks", "masks"]) == 1
    said = capsys.readouterr()
    assert [line.split(": ")[1] for line in said.err.splitlines()] == [
        "manifest/more.jsonl",
        "original.png",
        "x/[1].png",
    ]
    assert "NOT checked" not in said.out
    cli.main(["verify", "out", "--originals", "in"])
    assert "the bound outside the masks was NOT checked: name them with --masks" in capsys.readouterr().out
    for whole, unchecked in ((False, True), (True, False)):
        protect = ProtectImages(str(saved_generator), whole_image=whole)
        protect_dataset(open_source(["in"], Path(f"{whole}")), Path(f"{whole}"), "folder", protect)
        assert cli.main(["verify", f"{whole}", "--originals", "in"]) == 0
        assert ("NOT checked: the generator found them" in capsys.readouterr().out) == unchecked


@pytest.mark.parametrize("suffix", ["jsonl", "csv"])
def test_masks_that_metadata_names_are_not_protected_as_photos(place, saved_generator, suffix, capsys):
    Path("in/train").mkdir(parents=True)
    (place / "in/train/a.png").write_bytes(encoded(photo(0)))
    (place / "in/train/a_mask.png").write_bytes(encoded(mask(0)))
    entry = {"file_name": "a.png", "mask_file_name": "a_mask.png"}
    text = json.dumps(entry) if suffix == "jsonl" else "\n".join(map(",".join, (entry, entry.values())))
    (place / f"in/train/metadata.{suffix}").write_text(text)
    with pytest.raises(
        ValueError, match=rf"metadata.{suffix}: mask_file_name are images of this folder too, and would"
    ):
        open_source(["in"], Path("out"))
    assert [len(open_source(["in/train/a.png"], Path("out")).shards)] == [1]
    # As the message says; nothing leads back to this machine, and the masks are there without its files.
    load_dataset("imagefolder", data_dir="in", split="train").save_to_disk("saved")
    shutil.rmtree("in")
    run({"inputs": ["saved"], "mask_column": "mask"}, saved_generator)
    expected = Protector.from_pretrained(saved_generator).protect(photo(0), mask=mask(0)).image
    (image,) = published().values()
    np.testing.assert_array_equal(np.asarray(Image.open(io.BytesIO(image))), np.asarray(expected))
    np.testing.assert_array_equal(np.asarray(Dataset.from_parquet("out/data/*.parquet")[0]["mask"]), mask(0))
    assert not any(str(place).encode() in content for content in files("out").values())


def test_metadata_of_anything_else_leaves_a_folder_as_it_is(place, saved_generator):
    source = write_images(place)
    for name, text in (("metadata.jsonl", '{"file_name": "p0.png", "caption": "x"}'), ("sub/metadata.csv", "\xff\n")):
        Path("in", name).parent.mkdir(exist_ok=True)
        Path("in", name).write_text(text, encoding="latin-1")
    run(source, saved_generator)
    assert len(published()) == GOOD
    # An output that was made of masks, too, can be verified.
    Path("in/metadata.jsonl").write_text('{"file_name": "p0.png", "mask_file_name": "p1.jpg"}')
    assert cli.main(["verify", "out", "--originals", "in"]) == 0


def test_files_that_rows_name_and_that_are_gone_leave_their_names(place, saved_generator):
    (place / "b").write_bytes(encoded(photo(1)))
    (place / "secret.png").write_bytes(b"TOKEN=abc")
    rows = {"image": [{"bytes": encoded(photo(0)), "path": None}] * 3}
    rows["others"] = [[{"bytes": None, "path": str(place / name)}] for name in ("a.png", "b", "secret.png")]
    features = Features({"image": ImageFeature(), "others": List(ImageFeature())})
    pq.write_table(pa.Table.from_pydict(rows, features.arrow_schema), "in.parquet")
    protect = ProtectImages(str(saved_generator), whole_image=True)
    protect_dataset(open_source(["in.parquet"], Path("out")), Path("out"), "parquet", protect)
    (table,) = (pq.read_table(path) for path in Path("out/data").glob("*.parquet"))
    assert table["others"].to_pylist() == [
        [{"bytes": None, "path": "a.png"}],
        [{"bytes": encoded(photo(1)), "path": "b"}],
        [{"bytes": None, "path": "secret.png"}],
    ]
    assert [line.get("unprotected") for line in lines()] == [{"others": 1}] * 3


def test_images_beside_the_boxes_that_are_used_are_counted(place, saved_generator):
    one = {"bytes": encoded(photo(1)), "path": None}
    rows = {"image": [{"bytes": encoded(photo(0)), "path": None}]}
    rows["objects"] = [
        {"bbox": [[1, 2, 9, 9]], "crop": [one, one], "mask": [{"bytes": encoded(mask(0)), "path": None}]}
    ]
    objects = {"bbox": List(List(Value("float32"))), "crop": List(ImageFeature()), "mask": List(ImageFeature())}
    features = Features({"image": ImageFeature(), "objects": objects})
    Dataset.from_dict(rows, features=features).to_parquet("in.parquet")
    for option, unprotected in (("box_column", 3), ("mask_column", 2)):
        name = {"box_column": "objects.bbox", "mask_column": "objects.mask"}[option]
        protect = ProtectImages(str(saved_generator), **{option: "given"})
        source = open_source(["in.parquet"], Path(option), **{option: name})
        protect_dataset(source, Path(option), "parquet", protect)
        assert [line.get("unprotected") for line in lines(option)] == [{"objects": unprotected}]


def test_columns_of_kinds_that_cannot_be_described_can_be_left_out(place, saved_generator):
    images = [{"bytes": encoded(photo(0)), "path": None}]
    pairs = pa.array([[("a", 1)]], pa.map_(pa.string(), pa.int64()))
    pq.write_table(pa.table({"image": images, "pairs": pairs}), "in.parquet")
    protect = ProtectImages(str(saved_generator), whole_image=True)
    with pytest.raises(ValueError, match=r"map.* leave its column out with --drop_columns"):
        protect_dataset(open_source(["in.parquet"], Path("out")), Path("out"), "parquet", protect)
    source = open_source(["in.parquet"], Path("other"), drop_columns=["pairs"])
    assert protect_dataset(source, Path("other"), "parquet", protect).failed == 0


def test_verify_finds_what_was_taken_out_of_an_output_and_its_settings(place, saved_generator, capsys):
    run(write_images(place), saved_generator)
    request = ["verify", "out", "--originals", "in", "--masks", "masks"]
    assert cli.main(request) == 0
    settings = json.loads(Path("out/settings.json").read_text())
    settings["output"]["shards"] -= 1
    Path("out/settings.json").write_text(json.dumps(settings))
    capsys.readouterr()
    assert cli.main(request) == 1
    assert "the originals are 3 shards, and settings.json says 2" in capsys.readouterr().err


def test_verify_finds_clean_images_lines_and_counts_that_were_changed(place, saved_generator, capsys):
    run(write_images(place), saved_generator, kind="folder", epsilon=8 / 255)
    request = ["verify", "out", "--originals", "in", "--masks", "masks"]
    (part,) = (path for path in Path("out/manifest").glob("000000.jsonl"))
    entries = [json.loads(line) for line in part.read_text().splitlines()]
    clean = next(entry for entry in entries if entry["status"] == "protected")
    original = encoded(np.asarray(Image.open(Path("in", clean["source"]))))
    Path("out", clean["output"]).write_bytes(original)
    before, after = clean["output_sha256"], hashlib.sha256(original).hexdigest()
    text = part.read_text()
    part.write_text(text.replace(before, after))
    mark_file = part.with_suffix(".json")
    mark = mark_file.read_text().replace(before, after)
    mark = mark.replace(hashlib.sha256(text.encode()).hexdigest(), hashlib.sha256(part.read_bytes()).hexdigest())
    mark_file.write_text(mark)
    capsys.readouterr()
    assert cli.main(request) == 1
    said = capsys.readouterr().err
    assert f"{clean['output']}: it differs from its original by 0 of 255, and the manifest says" in said
    values = json.loads(mark)
    mark_file.write_text(json.dumps(values | {"failed": values["failed"] + 1}))
    assert cli.main(["verify", "out"]) == 1
    assert "shard 0: its mark and its lines differ in failed" in capsys.readouterr().err


def test_verify_says_which_shards_are_not_there_yet(place, saved_generator, capsys):
    run(write_images(place), saved_generator, process=(0, 2))
    assert cli.main(["verify", "out"]) == 1
    assert "shard 1: it is not complete" in capsys.readouterr().err


def test_progress_counts_what_all_processes_have_finished(place, saved_generator):
    source = write_images(place)
    said = []
    run(source, saved_generator, process=(0, 2), report=said.append, report_every=0)
    assert said[0].startswith("1 of 14 images (7%), ")
    opened = open_source(**source, output=Path("out"), shard_size=5)
    progress = Progress(Path("out"), opened, None)
    assert progress.line().startswith("9 of 14 images (64%), 0.0 images/s")
    run(source, saved_generator, process=(1, 2))
    assert progress.line().startswith("14 of 14 images (100%), ")
    assert [duration(s) for s in (5, 600, 7200, 360000)] == ["5 s", "10 min", "2.0 h", "4.2 days"]


@pytest.mark.parametrize(
    ("inputs", "options", "message"),
    [
        (["no/thing/here"], {}, "no/thing/here: no such file or folder"),
        (["in", "nowhere"], {}, "nowhere: no such file or folder; a Hub id stands alone"),
        (["in/a.parquet", "images/a.png"], {}, "parquet files, tars and images are not mixed"),
        (["in/a.parquet", "./in/a.parquet"], {}, "in/a.parquet: this file is named twice"),
        (["in", "in/*.parquet"], {}, "in/a.parquet: this file is named twice"),
        (["both"], {}, "both: parquet files, tars and images are not mixed"),
        (["loud"], {}, "loud: parquet files, tars and images are not mixed"),
        (["images"], {"masks": Path("labels.json")}, "--masks labels.json: this takes mask files"),
        (["in/a.parquet"], {"image_column": "photo"}, "no column 'photo'; there is image, mask"),
        (["in/a.parquet"], {"box_column": "numbers.x"}, "no field 'x' for 'numbers.x': the column 'numbers' is list"),
        (["in/a.parquet"], {"mask_column": "cells.x"}, "there is no column 'cells.x': the data set has image, mask"),
        (["in/a.parquet"], {"masks": Path("in")}, "--masks in is for folders of images"),
        (["in"], {"shard_size": 0}, "shard_size=0"),
        (["images"], {"mask_column": "mask"}, "--mask_column mask is for tables and tars"),
        (["images"], {"box_column": "boxes"}, "--box_column boxes is for tables"),
        (["a.tar"], {"box_column": "boxes"}, "--box_column boxes is for tables"),
        (["images"], {"class_column": "labels"}, "--class_column labels is for tables"),
        (["images"], {"split": "test"}, "--split test is for data sets with splits"),
        (["in"], {"revision": "v1"}, "--revision v1 is for the Hub"),
        (["in"], {"split": "test"}, "--split test: no parquet file is named so"),
        (["hub"], {}, "several splits, test, train: name one with --split"),
    ],
)
def test_sources_that_are_not_there_or_do_not_fit_are_refused(place, inputs, options, message):
    write_parquet(place)
    Path("images").mkdir()
    Image.fromarray(photo(0)).save("images/a.png")
    shutil.copytree("images", "both/images")
    shutil.copy("in/a.parquet", "both")
    Path("loud").mkdir()
    shutil.copy("images/a.png", "loud/A.PNG")
    shutil.copy("in/a.parquet", "loud/A.PARQUET")
    Path("a.tar").touch()
    Path("hub").mkdir()
    for split in ("train", "test"):
        shutil.copy("in/a.parquet", f"hub/{split}-00000-of-00001.parquet")
    with pytest.raises(ValueError, match=message):
        open_source(inputs, Path("out"), **options)


def test_a_split_of_parquet_files_is_the_one_that_was_asked_for(place, saved_generator):
    write_parquet(place)
    for split, file in (("train", "a"), ("test", "b")):
        Path(f"in/{file}.parquet").rename(f"in/{split}-00000-of-00001.parquet")
    run({"inputs": ["in"], "mask_column": "mask", "split": "test"}, saved_generator)
    assert {line["source"].partition("#")[0] for line in lines()} == {"test-00000-of-00001.parquet"}
    Path("plain").mkdir()
    for split in ("train", "test"):
        shutil.copy(f"in/{split}-00000-of-00001.parquet", f"plain/{split}.parquet")
    with pytest.raises(ValueError, match="several splits, test, train: name one with --split"):
        open_source(["plain"], Path("other"))
    assert len(open_source(["plain"], Path("other"), split="test").shards) == 1
    # An output that was made of both before splits were known by these names.
    both = open_source(["plain"], Path("both"), mask_column="mask", verifying=True)
    protect_dataset(both, Path("both"), "parquet", ProtectImages(str(saved_generator), mask_column="masks"))
    assert cli.main(["verify", "both", "--originals", "plain"]) == 0
    assert cli.main(["verify", "out", "--originals", "in"]) == 0


def test_links_to_folders_of_tars_are_entered_and_links_in_tars_are_named(place, saved_generator):
    source = write_tars(place)
    Path("in").rename("elsewhere")
    Path("in").mkdir()
    Path("in/linked").symlink_to(place / "elsewhere")
    for name in ("above", "above too"):  # one is followed 40 times, two of them without end
        Path("in", name).symlink_to(place / "in")
    with tarfile.open("in/links.tar", "w") as tar:
        for name, kind in (("a.png", tarfile.SYMTYPE), ("b.png", tarfile.LNKTYPE)):
            info = tarfile.TarInfo(name)
            info.type, info.linkname = kind, "elsewhere.png"
            tar.addfile(info)
    run(source | {"inputs": ["in"]}, saved_generator)
    failed = [line for line in lines() if "is a link; write the tar with --dereference" in line.get("error", "")]
    assert [line["source"] for line in failed] == ["links.tar/a", "links.tar/b"]
    assert sum(line["status"] == "protected" for line in lines()) == GOOD


def test_annotations_without_end_cost_their_sample_alone(place, saved_generator):
    Path("in").mkdir()
    with tarfile.open("in/a.tar", "w") as tar:
        for name, data in (("a.jpg", encoded(photo(0))), ("a.json", b'{"annotations": ' + b"[" * 200_000)):
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    run({"inputs": ["in"], "mask_column": "json"}, saved_generator, kind="folder")
    (line,) = lines()
    assert line["status"] == "failed"
    assert "the masks in a.json cannot be read" in line["error"]


def test_no_folder_of_this_machine_is_in_what_is_published(place, saved_generator):
    home = place / "home/somebody"
    home.mkdir(parents=True)
    (home / "cut.png").write_bytes(BROKEN["cut"])
    columns = {"image": [{"bytes": None, "path": str(home / name)} for name in ("cut.png", "gone.png")]}
    kind = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
    pq.write_table(pa.table({"image": pa.array(columns["image"], kind)}), place / "some.parquet")
    opened = open_source(["some.parquet"], Path("out"))
    protect_dataset(opened, Path("out"), "parquet", ProtectImages(str(saved_generator), whole_image=True))
    assert all(line["status"] == "failed" for line in lines())
    assert not any(b"somebody" in data for data in files("out").values())


def test_what_was_protected_is_not_protected_again(place, saved_generator):
    run(write_images(place), saved_generator, kind="folder")
    for inputs in ("out", "out/data"):
        with pytest.raises(ValueError, match="is protected already"):
            open_source([inputs], Path("again"))


def test_an_empty_list_of_masks_is_an_image_without_objects(place, saved_generator):
    image = {"bytes": encoded(photo(0)), "path": None}
    Dataset.from_dict(
        {"image": [image, image], "mask": [[], [{"bytes": encoded(mask(0)), "path": None}]]},
        features=Features({"image": ImageFeature(), "mask": List(ImageFeature())}),
    ).to_parquet(place / "some.parquet")
    run({"inputs": ["some.parquet"], "mask_column": "mask"}, saved_generator, epsilon=0.01)
    empty, full = lines()
    assert (empty["status"], full["status"]) == ("protected", "protected")
    assert empty["max_noise"] == 0 < full["max_noise"]
    assert "the mask is empty" in " ".join(empty["notes"])


def test_verify_misses_a_mask(place, saved_generator, capsys):
    run(write_images(place), saved_generator)
    Path("masks/p1.png").unlink()
    Path("masks/new").touch()
    assert cli.main(["verify", "out", "--originals", "in", "--masks", "masks"]) == 1
    (said,) = [line for line in capsys.readouterr().err.splitlines() if "its mask is missing" in line]
    assert "out-" not in said


def test_an_image_that_cannot_be_written_costs_its_record_alone(place, saved_generator):
    for path in ("in/sub.jpg", "in/sub.png/q.png"):
        Path(path).parent.mkdir(parents=True, exist_ok=True)
        Path(path).write_bytes(encoded(photo(0)))
    opened = open_source(["in"], Path("out"))
    protect_dataset(opened, Path("out"), "folder", ProtectImages(str(saved_generator), whole_image=True))
    (failed,) = [line for line in lines() if line["status"] == "failed"]
    assert "a folder of another image has its name" in failed["error"]


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"kind": "zip"}, ValueError, "kind='zip': must be one of parquet, folder, tars"),
        ({"on_error": "keep"}, ValueError, "on_error='keep': must be one of mark, drop, raise"),
        ({"output": "a file"}, FileExistsError, "a file is a file: name a folder"),
    ],
)
def test_a_run_that_makes_no_sense_begins_no_output(options, error, message, place, saved_generator):
    source = write_images(place)
    Path("a file").touch()
    with pytest.raises(error, match=message):
        run(source, saved_generator, **options)
    assert not Path("out").exists()
    with pytest.raises(ValueError, match=r"--output y\.png: name a folder"):
        open_source(["in/p0.png"], Path("y.png"))


@pytest.mark.parametrize(("name", "value"), [("RANK", "a"), ("RANK", "5"), ("WORLD_SIZE", "0")])
def test_ranks_that_make_no_sense_are_refused(name, value, place, saved_generator, script, monkeypatch, capsys):
    write_images(place)
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv(name, value)
    assert script("in", "--output", "out", "--whole_image", "--model", saved_generator) == 2
    assert f"{name}={value}" in capsys.readouterr().err


def test_columns_without_a_note_of_datasets_and_of_plain_bytes_are_read(place, saved_generator):
    data = [encoded(photo(i)) for i in range(3)]
    pq.write_table(pa.table({"picture": data, "when": pa.array([1, 2, 3], pa.timestamp("s"))}), "a.parquet")
    source = open_source(["a.parquet"], Path("out"), image_column="picture")
    protect_dataset(source, Path("out"), "parquet", ProtectImages(str(saved_generator), whole_image=True))
    table = pq.read_table("out/data/train-00000-of-00001.parquet")
    assert table.schema.field("when").type == pa.timestamp("ms")  # as parquet stores it
    assert all(image["bytes"].startswith(b"\x89PNG") for image in table["picture"].to_pylist())
    assert manifest.read_settings(Path("out"))["source"]["image_column"] == "picture"


def test_images_that_are_paths_are_read(place, saved_generator):
    (place / "p.jpg").write_bytes(encoded(photo(1), "JPEG"))
    pq.write_table(pa.table({"image": [str(place / "p.jpg"), str(place / "gone.jpg")]}), "in.parquet")
    source = open_source(["in.parquet"], Path("out"))
    protect_dataset(source, Path("out"), "parquet", ProtectImages(str(saved_generator), whole_image=True))
    first, second = pq.read_table("out/data").to_pylist()
    expected = Protector.from_pretrained(saved_generator).protect("p.jpg", whole_image=True).image
    assert np.array_equal(np.asarray(Image.open(io.BytesIO(first["image"]["bytes"]))), np.asarray(expected))
    assert second["image"] is None
    assert "No such file" in second["protection_error"]


def load_script():
    """The command as a function of its arguments."""
    spec = importlib.util.spec_from_file_location("protect_dataset", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return lambda *arguments: module.main([str(argument) for argument in arguments])


@pytest.fixture(scope="module")
def script():
    return load_script()


def test_a_tint_reaches_the_images_and_the_settings(place, script):
    """With the generator in the package, which has one."""
    Path("in").mkdir()
    Image.fromarray(photo(1, 60, 80)).save("in/a.png")
    assert script("in", "--output", "out", "--output_format", "folder", "--whole_image", "--tint", "always") == 0
    assert manifest.read_settings(Path("out"))["protection"]["tint"] == "always"
    tinted, plain = (
        Protector.from_pretrained().protect("in/a.png", whole_image=True, tint=tint) for tint in ("always", "auto")
    )
    assert (tinted.tinted, plain.tinted) == (True, False)
    (written,) = Path("out").rglob("a.png")
    np.testing.assert_array_equal(np.asarray(Image.open(written)), tinted.picture.pixels)


def test_images_that_stay_as_they_were_are_not_counted_as_protected(place, saved_generator, script, capsys):
    for folder in ("in", "masks", "none"):
        Path(folder).mkdir()
    for index in range(3):
        Image.fromarray(photo(0)).save(f"in/{index}.png")
        Image.fromarray(mask(0) * (index != 1)).save(f"masks/{index}.png")
        Image.fromarray(mask(0)).save(f"none/{index}.png")
    request = ["in", "--model", str(saved_generator), "--epsilon", "8", "--epsilon_background", "0"]
    assert script(*request, "--masks", "masks", "--output", "out") == 0
    said = capsys.readouterr()
    assert "out: 2 images protected, 0 failed" in said.out
    sentence = "1 image with nothing to protect (an empty mask, say; see manifest/) is not protected"
    assert sentence in said.err
    assert [line.get("notes") for line in lines()] == [None, ["the mask is empty: nothing is protected"], None]
    assert sentence in Path("out/README.md").read_text()
    assert cli.main(["verify", "out"]) == 0
    assert sentence in capsys.readouterr().out
    # All there is in these label maps is what is ignored.
    assert script(*request, "--masks", "none", "--labels", "--output", "all") == 1
    assert "not one of 3 images could be protected" in capsys.readouterr().err


def test_images_with_unlike_noises_are_counted_and_said(place, script, capsys):
    """With the generator in the package, which has a tint for what is low."""
    for folder in ("in", "masks"):
        Path(folder).mkdir()
    for index, height in enumerate((70, 70, 4, 0)):  # the last has nothing to protect
        mask = np.zeros((96, 128), np.uint8)
        mask[20 : 20 + height, 10:100] = 255
        Image.fromarray(photo(0, 96, 128)).save(f"in/{index}.png")
        Image.fromarray(mask).save(f"masks/{index}.png")
    for tint, said in (("auto", True), ("never", False)):
        arguments = ["in", "--masks", "masks", "--output", tint, "--tint", tint, "--shard_size", "3"]
        assert script(*arguments) == 0
        assert ("note: images with a tint: 1, with waves: 2;" in capsys.readouterr().out) == said
    assert [line["tinted"] for shard in (0, 1) for line in manifest.read_lines(Path("auto"), shard)] == [
        False, False, True, None
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--device", "foo"], "does not load on 'foo'"),
        (["--device", "cuda:99"], "does not load on 'cuda:99'"),
        (["--model", "cut"], "the generator cut does not load on 'cpu'"),
        (["--epsilon_background", "2"], "--epsilon_background 2 needs --epsilon: give both"),
        (["--epsilon", "4", "--epsilon_background", "5"], "--epsilon_background 5 is above --epsilon 4"),
        (["--labels"], "--labels needs --masks or --mask_column"),
        (["--masks", "masks"], "pass one of masks, --box_column and --whole_image"),
        (["--box_format", "xywh"], "--box_format xywh needs --box_column"),
    ],
)
def test_a_run_that_cannot_begin_says_why_in_one_line_and_leaves_nothing(
    place, saved_generator, script, capsys, options, message
):
    write_images(place)
    weights = Path(shutil.copytree(saved_generator, "cut"), "model.safetensors")
    weights.write_bytes(weights.read_bytes()[:-50])
    arguments = ["in", "--output", "out", "--whole_image", "--model", saved_generator, *options]
    capsys.readouterr()
    assert script(*arguments) == 2
    (line,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("protect_dataset.py: ")]
    assert message in line
    assert not Path("out").exists()


def test_a_run_that_is_interrupted_or_lacks_an_extra_says_so(place, saved_generator, script, monkeypatch, capsys):
    write_images(place)
    arguments = ["in", "--output", "out", "--whole_image", "--model", saved_generator]
    for error, status in ((KeyboardInterrupt(), 130), (ImportError("install pycocotools"), 2)):
        with monkeypatch.context() as patch:
            patch.setattr("unseg_hf.bulk.opening.open_source", Mock(side_effect=error))
            assert script(*arguments) == status
        assert ("stopped" if status == 130 else "install pycocotools") in capsys.readouterr().err


def test_an_output_from_before_there_was_a_tint_is_verified_and_not_gone_on_with(place, saved_generator):
    run(write_images(place), saved_generator)
    settings = manifest.read_settings(Path("out"))
    del settings["protection"]["tint"]
    Path("out/settings.json").write_text(json.dumps(settings))
    assert cli.main(["verify", "out"]) == 0
    with pytest.raises(manifest.SettingsError, match=r"protection\.tint None and not 'auto'"):
        run(write_images(place), saved_generator)


def test_verify_names_damaged_settings_and_marks(place, saved_generator, capsys):
    run(write_images(place), saved_generator)
    mark = Path("out/manifest/000001.json")
    for damaged in ("[]", '{"files": []}', "{"):
        mark.write_text(damaged)
        assert cli.main(["verify", "out"]) == 1
        assert "shard 1: it is not complete, or its mark is damaged" in capsys.readouterr().err
    for damaged in ("{}", "[1]", '{"source": {}}', "{"):
        Path("out/settings.json").write_text(damaged)
        assert cli.main(["verify", "out"]) == 2
        assert capsys.readouterr().err.startswith("unseg: out/settings.json is damaged")


def test_a_run_that_protected_nothing_ends_with_status_1_and_pushes_nothing(
    place, saved_generator, script, monkeypatch, capsys
):
    Path("in").mkdir()
    Path("in/cut.png").write_bytes(BROKEN["cut"])
    monkeypatch.setattr("unseg_hf.training.publishing.check_hub", lambda name: name)
    monkeypatch.setattr("unseg_hf.bulk.card.push_dataset", lambda *arguments: pytest.fail("it was pushed"))
    assert script("in", "--output", "out", "--model", saved_generator, "--whole_image", "--push_to_hub", "a/b") == 1
    assert "out: not one of 1 images could be protected" in capsys.readouterr().err


@pytest.mark.slow
def test_two_processes_of_the_script_killed_and_begun_again_equal_one(place, saved_generator):
    source = write_images(place)
    run(source, saved_generator, "whole")
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    command = [SCRIPT, "in", "--masks", "masks", "--output", "out", "--model", saved_generator, "--shard_size", "5"]
    # Alone first, killed as soon as there is something of it.
    alone = subprocess.Popen([sys.executable, *map(str, command)], stderr=subprocess.DEVNULL)
    while alone.poll() is None and not list(Path("out").glob("data/*")):
        pass
    alone.kill()
    alone.wait()
    finished = subprocess.run([*launcher, *map(str, command)], capture_output=True, text=True)
    assert finished.returncode == 0, finished.stderr[-3000:]
    assert "9 images protected, 5 failed" in finished.stdout
    assert files("out") == files("whole")


def test_verify_misses_a_mask_that_was_taken_out_of_a_tar(place, saved_generator, capsys):
    run(write_tars(place), saved_generator, kind="tars")
    tar, size = Path("in/part1.tar"), Path("in/part1.tar").stat().st_size
    with tarfile.open(tar) as whole:
        members = [(info, whole.extractfile(info).read()) for info in whole]
    with tarfile.open(tar, "w") as less:
        for info, data in members:
            if info.name != "s/p8.mask.png":
                less.addfile(info, io.BytesIO(data))
    with tar.open("ab") as file:
        file.write(bytes(size - tar.stat().st_size))  # tars end in zeros, as many as there are
    capsys.readouterr()
    assert cli.main(["verify", "out", "--originals", "in"]) == 1
    (said,) = capsys.readouterr().err.splitlines()
    assert "its mask is missing, so that the bound cannot be checked" in said


def test_verify_ignores_the_labels_that_the_run_ignored(place, saved_generator, capsys):
    labels = np.full((24, 32), 3, np.uint8)
    labels[4:15, 6:20] = 1
    rows = {"image": [{"bytes": encoded(photo(0)), "path": None}], "mask": [labels]}
    features = Features({"image": ImageFeature(), "mask": Array2D(labels.shape, "uint8")})
    Dataset.from_dict(rows, features=features).to_parquet("in.parquet")
    opened = open_source(["in.parquet"], Path("out"), mask_column="mask")
    protect = ProtectImages(str(saved_generator), mask_column="masks", label_maps=True, ignore_labels=(3,))
    assert protect_dataset(opened, Path("out"), "parquet", protect).failed == 0
    settings = json.loads(Path("out/settings.json").read_text())
    settings["protection"]["epsilon_background"] = 0
    Path("out/settings.json").write_text(json.dumps(settings))
    capsys.readouterr()
    assert cli.main(["verify", "out", "--originals", "in.parquet"]) == 1
    assert "outside the mask, where 0 is the most" in capsys.readouterr().err


def test_what_was_protected_before_is_counted(script, place, capsys):
    example = SCRIPT.parent.parent / "spaces_demo/examples/coffee.png"
    assert cli.main(["protect", str(example), "-o", "photos/again.png"]) == 0
    shutil.copy(example, "photos/coffee.png")
    assert script("photos", "--output", "out") == 0
    assert f"note: 1 images: {PROTECTED_BEFORE}" in capsys.readouterr().out
    again, first = manifest.read_lines(place / "out", 0)
    assert 0.8 < again["noise_before"] < 1.1
    assert again["notes"] == [PROTECTED_BEFORE]
    assert "noise_before" not in first
    assert cli.main(["verify", "out", "--originals", "photos"]) == 0
