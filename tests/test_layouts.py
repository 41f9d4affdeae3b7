"""`unseg protect-dataset` on small trees of the published layouts."""

import errno
import io
import json
import os
import shutil
import signal
import subprocess
import sys
import time
import unicodedata
from pathlib import Path, PurePath
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image
from published_trees import HEIGHT, LOWER, TREES, UPPER, WIDTH, area, labels, photo, save, text

from unseg_hf import Prompt, Protector, cli, image_files
from unseg_hf.image_files import from_array
from unseg_hf.layouts import bounded_jpeg
from unseg_hf.layouts.annotations import LabelImage
from unseg_hf.layouts.run import RECORD, SETTINGS
from unseg_hf.layouts.table import DATA_SETS
from unseg_hf.worker_processes import alone


@pytest.fixture(scope="module")
def loud_generator(protector_of, tmp_path_factory):
    """The folder of a generator of eight noises that fill the budget, of grey images too: the same in all channels."""
    folder = tmp_path_factory.mktemp("loud_generator")
    protector = protector_of(noise_codes=8)
    with torch.no_grad():
        head = protector.model.noise_head
        head.noise_tokens.weight[:] = head.noise_tokens.weight[::3].repeat_interleave(3, dim=0)
        head.noise_mlps[0][-1].weight *= 30
        for mlp in head.noise_mlps[1:]:
            mlp.load_state_dict(head.noise_mlps[0].state_dict())
    protector.model.save_pretrained(folder)
    protector.processor.save_pretrained(folder)
    return folder


@pytest.fixture
def protect(tmp_path, loud_generator):
    """A function that runs the command from `in` to `out` and returns the exit status."""

    def run(name, *options, output="out", root="in"):
        return cli.main(
            ["protect-dataset", name, "--root", str(tmp_path / root), "--output", str(tmp_path / output),
             "--model", str(loud_generator), *map(str, options)]
        )  # fmt: skip

    return run


def files(folder):
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def data_files(folder):
    return {name: data for name, data in files(folder).items() if name not in (RECORD, SETTINGS)}


def record(folder):
    return {entry["path"]: entry for entry in map(json.loads, (folder / RECORD).read_text().splitlines())}


def noise(original, protected):
    """`(height, width)`, the largest change of a channel."""
    before, after = (
        np.asarray(Image.open(io.BytesIO(d) if isinstance(d, bytes) else d)) for d in (original, protected)
    )
    assert before.shape == after.shape
    difference = np.abs(after.astype(int) - before)
    return difference.max(axis=2) if difference.ndim == 3 else difference


def assert_protected(original, protected, region, inside=8, outside=2):
    change = noise(original, protected)
    assert change[region].max(initial=0) <= inside
    assert change[~region].max(initial=0) <= outside
    assert change[~region].max(initial=0) > 0
    # More than half of the region shows that it was the region, and not only a part of it.
    assert not region.any() or (change[region] > outside).mean() > 0.5


@pytest.mark.parametrize("tree", TREES)
def test_the_training_images_are_protected_in_the_same_tree(tree, tmp_path, protect):
    name, write = TREES[tree]
    expected = write(tmp_path / "in")
    assert protect(name) == 0
    before, after = files(tmp_path / "in"), data_files(tmp_path / "out")
    assert after.keys() == before.keys()
    epsilon = DATA_SETS[name].epsilon or 8
    budget = (epsilon, epsilon / 4)
    for path, data in before.items():
        if path in expected:
            assert_protected(data, after[path], expected[path].region, *budget)
            assert Image.open(io.BytesIO(after[path])).format == ("TIFF" if path.endswith(".tif") else "PNG")
        else:
            assert after[path] == data, path
    entries = record(tmp_path / "out")
    assert entries.keys() == after.keys()
    assert {path for path, entry in entries.items() if entry["status"] == "protected"} == expected.keys()
    for path, region in ((path, one.region) for path, one in expected.items()):
        assert entries[path]["mask_share"] == pytest.approx(region.mean())
        assert (entries[path]["epsilon"], entries[path]["epsilon_background"]) == budget


@pytest.mark.parametrize("tree", [tree for tree in TREES if "," not in tree])
def test_segments_are_prompted_one_by_one(tree, tmp_path, protect):
    name, write = TREES[tree]
    expected = write(tmp_path / "in")
    assert protect(name, "--per-segment") == 0
    entries = record(tmp_path / "out")
    epsilon = DATA_SETS[name].epsilon or 8
    budget = (epsilon, epsilon / 4)
    for path, one in expected.items():
        assert entries[path]["masks"] == one.segments
        assert_protected(tmp_path / "in" / path, tmp_path / "out" / path, one.region, *budget)


@pytest.mark.parametrize(
    ("tree", "segments"),
    [
        ("voc2012", [(7, LOWER), (15, (UPPER[0], slice(6, 18))), (15, (UPPER[0], slice(18, 30)))]),
        ("sbd", [(7, UPPER), (15, LOWER)]),
        ("ade20k", [(15, UPPER), (150, LOWER)]),
        ("cityscapes", [(7, LOWER), (26, UPPER)]),
        ("coco-panoptic", [(1, UPPER), (200, LOWER)]),
        ("coco-instance", [(1, UPPER), (2, LOWER)]),
    ],
)
def test_segments_get_the_pixels_that_the_python_api_gives_their_class(
    tree, segments, tmp_path, protect, loud_generator
):
    name, write = TREES[tree]
    path = next(iter(write(tmp_path / "in")))
    assert protect(name, "--per-segment") == 0
    masks, classes = [area(place) for _, place in segments], [class_id for class_id, _ in segments]
    protector = Protector.from_pretrained(loud_generator)
    # From the file as it is: an upright copy would be another image to some.
    with Image.open(tmp_path / "out" / path) as out:
        written = np.asarray(out)

    def pixels(classes):
        prompt = Prompt(masks=masks, classes=classes, mode="per_segment")
        return np.asarray(protector.protect(tmp_path / "in" / path, prompt).image)

    np.testing.assert_array_equal(written, pixels(classes))
    assert (written != pixels([number + 1 for number in classes])).mean() > 0.05


@pytest.mark.parametrize("tree", ["voc2012", "sbd", "ade20k", "coco-panoptic", "coco-instance", "cityscapes", "nwpu"])
def test_classes_limit_the_region(tree, tmp_path, protect):
    name, write = TREES[tree]
    expected = {path: one for path, one in write(tmp_path / "in").items() if one.of_class}
    for path, one in expected.items():
        class_name, region = one.of_class
        assert protect(name, "--classes", class_name.upper()) == 0
        assert_protected(tmp_path / "in" / path, tmp_path / "out" / path, region)


def test_a_class_may_be_given_by_its_number_and_must_exist(tmp_path, protect, capsys):
    TREES["voc2012"][1](tmp_path / "in")
    assert protect("voc2012", "--classes", "15") == 0
    assert record(tmp_path / "out")["VOCdevkit/VOC2012/JPEGImages/2007_000032.jpg"]["mask_share"] == pytest.approx(
        area((slice(4, 18), slice(6, 30))).mean()
    )
    assert protect("voc2012", "--classes", "unicorn", output="other") == 2
    assert "--classes unicorn: no such class; there is aeroplane (1), bicycle (2)" in capsys.readouterr().err
    assert not (tmp_path / "other").exists()


def test_splits_and_lists_choose_the_images(tmp_path, protect, capsys):
    TREES["voc2012"][1](tmp_path / "in")
    train, val = (f"VOCdevkit/VOC2012/JPEGImages/2007_0000{n}.jpg" for n in (32, 33))
    assert protect("voc2012", "--split", "trainval", output="both") == 0
    assert protect("voc2012", "--split", "train", "val", output="named") == 0
    text(tmp_path / "list.txt", "some/folder/2007_000033.jpg\n2008_000001\n2009_000009\n")
    assert protect("voc2012", "--split", "trainval", "--names", tmp_path / "list.txt", output="listed") == 0
    for output, chosen in (("both", {train, val}), ("named", {train, val}), ("listed", {val})):
        entries = record(tmp_path / output)
        assert {path for path, entry in entries.items() if entry["status"] == "protected"} == chosen
    printed = capsys.readouterr().out
    assert "images stay clean: not in --names" in printed
    assert "1 names of" in printed
    assert "such as 2009_000009" in printed
    assert protect("voc2012", "--split", "test", output="other") == 2
    assert "train, trainval, val" in capsys.readouterr().err


def test_the_parts_of_hqseg_are_splits(tmp_path, protect):
    TREES["hqseg44k"][1](tmp_path / "in")
    assert protect("hqseg44k", "--split", "COIFT", "HRSOD") == 0
    protected = {path for path, entry in record(tmp_path / "out").items() if entry["status"] == "protected"}
    assert protected == {f"thin_object_detection/{part}/images/a.b.jpg" for part in ("COIFT", "HRSOD")}


def test_images_without_a_mask_are_copied_where_the_data_set_has_such(tmp_path, protect, capsys):
    TREES["lung-xray"][1](tmp_path / "in")
    assert protect("lung-xray") == 0
    assert "1 images stay clean: without a mask" in capsys.readouterr().out


def test_images_that_the_layout_does_not_know_and_archives_are_said(tmp_path, protect, capsys):
    many(tmp_path / "in", 2)
    (tmp_path / "in/images/001.jpg").rename(tmp_path / "in/images/001.JPG")
    save(tmp_path / "in/images/extra.png", labels((9, (slice(1, 5), slice(1, 5)))))
    save(tmp_path / "in/notes/figure.png", labels())
    text(tmp_path / "in/kvasir-seg.zip", "all images")
    assert protect("kvasir-seg") == 0
    printed = capsys.readouterr().out
    assert "2 images of all protected" in printed
    assert "1 images stay clean: named otherwise than this layout's images" in printed
    assert "1 images stay clean: outside this layout's folders of images" in printed
    assert "1 files that may hold the original images were taken over, such as kvasir-seg.zip" in printed


@pytest.mark.parametrize(
    ("tree", "copies", "others"),
    [
        (
            "ssdd, official",
            ["BBox_SSDD/coco_style/images/train/000001.jpg", "BBox_SSDD/voc_style/JPEGImages_train/000001.jpg",
             "PSeg_SSDD/voc_style/JPEGImages_train/000001.jpg", "PSeg_SSDD/coco_style/images/old/000001.jpg"],
            ["BBox_SSDD/voc_style/JPEGImages_test/000007.jpg"],
        ),
        (
            "voc2012",
            ["VOCdevkit/VOCaug/dataset/img/2007_000032.jpg", "VOCdevkit/VOC2012/JPEGImages/2007_000032.png",
             "VOCdevkit/VOC2012/JPEGImages/old/2007_000032.jpg"],
            ["VOCdevkit/VOCaug/dataset/img/2008_000009.jpg"],
        ),
        (
            "coco-instance",
            ["images/train2017/000000000009.jpg"],
            ["images/val2017/000000000077.jpg", "panoptic_train2017/000000000009.png",
             "stuffthingmaps/train2017/000000000009.png"],
        ),
    ],
)  # fmt: skip
def test_unprotected_copies_of_protected_images_are_left_out_and_said(tree, copies, others, tmp_path, protect, capsys):
    name, write = TREES[tree]
    write(tmp_path / "in")
    for path in (*copies, *others):
        photo(tmp_path / "in" / path)
    assert protect(name) == 0
    assert files(tmp_path / "in").keys() - data_files(tmp_path / "out").keys() == set(copies)
    printed = capsys.readouterr().out
    assert f"{len(copies)} files left out: unprotected copies of protected images" in printed
    assert f"such as {min(copies)}" in printed
    reason = "of other splits" if name == "coco-instance" else "outside this layout's folders of images"
    assert f"images stay clean: {reason}" in printed


def test_copies_are_left_out_whatever_kind_of_image_their_suffix_says(tmp_path, protect):
    _, write = TREES["kvasir-seg"]
    name = Path(min(write(tmp_path / "in"))).stem
    copies = {f"backup/{name}.{suffix}" for suffix in ("png", "AVIF", "heic", "jpe", "jp2")}
    for path in copies:
        (tmp_path / "in" / path).parent.mkdir(exist_ok=True)
        (tmp_path / "in" / path).write_bytes(b"as if it were an image")
    assert protect("kvasir-seg") == 0
    assert files(tmp_path / "in").keys() - data_files(tmp_path / "out").keys() == copies


def test_a_budget_that_is_given_replaces_the_data_sets(tmp_path, protect):
    expected = TREES["kvasir-seg"][1](tmp_path / "in")
    assert protect("kvasir-seg", "--epsilon", "12") == 0
    for path, one in expected.items():
        assert_protected(tmp_path / "in" / path, tmp_path / "out" / path, one.region, 12, 3)


def test_jpeg_stays_jpeg_near_the_bound_and_says_what_it_costs(tmp_path, protect, capsys):
    (path,) = TREES["voc2012"][1](tmp_path / "in")
    assert protect("voc2012", "--jpeg-names", "jpeg") == 0
    saved = Image.open(tmp_path / "out" / path)
    assert saved.format == "JPEG"
    assert [layer[1:3] for layer in saved.layer] == [(1, 1)] * 3  # 4:4:4
    entry, region = record(tmp_path / "out")[path], area((slice(4, 18), slice(6, 30)), (slice(22, 36), slice(20, 50)))
    change = noise(tmp_path / "in" / path, tmp_path / "out" / path)
    over = change - np.where(region, 8, 2)
    assert entry["over_bound_share"] == pytest.approx((over > 0).mean())
    assert entry["over_bound_levels"] == max(0, over.max()) <= 4
    assert 0.3 < entry["noise_left"] <= 1.05
    assert f"JPEG leaves {entry['noise_left']:.0%} of the noise" in capsys.readouterr().out
    assert protect("voc2012", "--jpeg-names", "jpeg", "--quality", "95", output="95") == 0
    assert record(tmp_path / "95")[path]["over_bound_share"] > entry["over_bound_share"]
    plain = io.BytesIO()
    protect("voc2012", output="png")
    Image.open(tmp_path / "png" / path).save(plain, "JPEG", quality=100, subsampling=0)
    over_plain = noise(tmp_path / "in" / path, plain.getvalue()) - np.where(region, 8, 2)
    assert entry["over_bound_share"] < 0.5 * (over_plain > 0).mean()


def test_renamed_jpegs_are_png_files(tmp_path, protect, capsys):
    (path,) = TREES["voc2012"][1](tmp_path / "in")
    assert protect("voc2012", "--jpeg-names", "rename") == 0
    names = set(data_files(tmp_path / "out"))
    renamed = path.replace(".jpg", ".png")
    assert names == set(files(tmp_path / "in")) - {path} | {renamed}
    assert record(tmp_path / "out")[renamed]["source"] == path
    assert Image.open(tmp_path / "out" / renamed).format == "PNG"
    assert protect("voc2012", "--jpeg-names", "rename") == 0
    assert set(data_files(tmp_path / "out")) == names


def test_renaming_never_replaces_a_mask(tmp_path, protect, capsys):
    TREES["hqseg44k"][1](tmp_path / "in")
    assert protect("hqseg44k", "--jpeg-names", "rename") == 2
    assert "cascade_psp/DUTS-TE/a.b.png, which is there" in capsys.readouterr().err
    TREES["voc2012"][1](tmp_path / "in2")
    images = tmp_path / "in2/VOCdevkit/VOC2012/JPEGImages"
    shutil.copy(images / "2007_000032.jpg", images / "2007_000032.JPG")
    assert protect("voc2012", "--jpeg-names", "rename", root="in2", output="out2") == 2
    assert "2007_000032.png, which is there or becomes another file's" in capsys.readouterr().err


@pytest.mark.parametrize("link", ["hard", "symbolic"])
def test_what_stays_as_it_is_can_be_linked(link, tmp_path, protect):
    (path,) = TREES["ade20k"][1](tmp_path / "in")
    before = files(tmp_path / "in")
    assert protect("ade20k", "--link", link) == 0
    for name in before.keys() - {path}:
        copy = tmp_path / "out" / name
        assert copy.is_symlink() == (link == "symbolic")
        assert copy.samefile(tmp_path / "in" / name)
    assert_protected(
        before[path], tmp_path / "out" / path, area((slice(4, 18), slice(6, 30)), (slice(22, 36), slice(20, 50)))
    )
    assert files(tmp_path / "in") == before


def test_linked_folders_of_the_input_are_followed(tmp_path, protect):
    TREES["cityscapes"][1](tmp_path / "in")
    shutil.move(tmp_path / "in/leftImg8bit", tmp_path / "elsewhere")
    (tmp_path / "in/leftImg8bit").symlink_to(tmp_path / "elsewhere")
    assert protect("cityscapes") == 0
    assert sum(entry["status"] == "protected" for entry in record(tmp_path / "out").values()) == 1
    assert not (tmp_path / "out/leftImg8bit").is_symlink()
    assert protect("cityscapes", output="elsewhere/out") == 2


def test_what_links_bring_from_elsewhere_is_named_and_pipes_are_passed_over(tmp_path, protect, capsys):
    TREES["ade20k"][1](tmp_path / "in")
    (tmp_path / "private.txt").write_text("a key")
    (tmp_path / "in/LICENSE.txt").symlink_to(tmp_path / "private.txt")
    os.mkfifo(tmp_path / "in/pipe")
    (tmp_path / "in/to the pipe").symlink_to(tmp_path / "in/pipe")
    assert protect("ade20k") == 0
    said = capsys.readouterr().out
    assert f"1 files come from elsewhere, by links in {tmp_path / 'in'}, such as LICENSE.txt from" in said
    assert str(tmp_path / "private.txt") in said
    assert not {"pipe", "to the pipe"} & {path.name for path in (tmp_path / "out").iterdir()}


def test_links_that_lead_back_are_named(tmp_path, protect, capsys):
    (path,) = TREES["ade20k"][1](tmp_path / "in")
    for name in ("one", "two"):  # one is followed 40 times, two of them without end
        (tmp_path / "in" / path).with_name(name).symlink_to(tmp_path / "in")
    assert protect("ade20k") == 2
    assert "is a link to a folder that holds it: remove the link" in capsys.readouterr().err


def many(root, count):
    """Kvasir-SEG with `count` images."""
    for number in range(count):
        photo(root / f"images/{number:03d}.jpg", seed=number % 40)
        save(root / f"masks/{number:03d}.jpg", labels((255, (slice(4, 18), slice(6 + number % 20, 40)))))


@pytest.mark.slow
def test_a_killed_run_goes_on_and_ends_with_the_same_tree(tmp_path, protect, loud_generator):
    many(tmp_path / "in", 80)
    command = [sys.executable, "-m", "unseg_hf.cli", "protect-dataset", "kvasir-seg", "--root", tmp_path / "in",
               "--output", tmp_path / "out", "--model", loud_generator, "--processes", "2"]  # fmt: skip
    process = subprocess.Popen(command, stderr=subprocess.DEVNULL, stdout=subprocess.DEVNULL)
    path, deadline = tmp_path / "out" / RECORD, time.monotonic() + 300
    while not path.exists() or b'"protected"' not in path.read_bytes():
        assert process.poll() is None
        assert time.monotonic() < deadline
        time.sleep(0.01)
    workers = [int(pid) for pid in Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()]
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    # Its workers must not write beside the next run.
    while any(is_running(pid) for pid in workers):
        assert time.monotonic() < deadline
        time.sleep(0.01)
    lines = path.read_bytes().splitlines(keepends=True)
    entries = [json.loads(line) for line in lines if line.endswith(b"\n")]
    finished = [entry["path"] for entry in entries if entry["status"] == "protected"]
    assert 0 < len(finished) < 80
    times = {name: (tmp_path / "out" / name).stat().st_mtime_ns for name in finished}
    assert protect("kvasir-seg") == 0
    assert {name: (tmp_path / "out" / name).stat().st_mtime_ns for name in finished} == times
    assert protect("kvasir-seg", output="whole") == 0
    assert files(tmp_path / "out") == files(tmp_path / "whole")


def is_running(pid):
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except (FileNotFoundError, ProcessLookupError):
        return False


def test_whatever_a_stopped_run_left_is_mended(tmp_path, protect):
    many(tmp_path / "in", 3)
    assert protect("kvasir-seg") == 0
    whole = files(tmp_path / "out")
    lines = (tmp_path / "out" / RECORD).read_bytes().splitlines(keepends=True)
    # Half a line, a file in place that is not recorded, one that is recorded and cut, and one that was being written.
    (tmp_path / "out" / RECORD).write_bytes(b"".join(lines[:-2]) + lines[-2][:20])
    (tmp_path / "out/images/000.jpg").write_bytes(whole["images/000.jpg"][:50])
    (tmp_path / "out/images/.0123456789abcdef0123456789abcdef.tmp").write_bytes(b"half")
    (tmp_path / "out/images/001.jpg").unlink()
    (tmp_path / "out/images/001.jpg").symlink_to(tmp_path / "in/images/001.jpg")
    assert protect("kvasir-seg") == 0
    assert files(tmp_path / "out") == whole
    assert Image.open(tmp_path / "in/images/001.jpg").format == "JPEG"


@pytest.mark.slow
def test_several_processes_make_the_same_tree(tmp_path, protect):
    many(tmp_path / "in", 9)
    (tmp_path / "in/images/004.jpg").write_bytes(b"no image")
    assert protect("kvasir-seg") == 1
    assert protect("kvasir-seg", "--processes", "2", output="two") == 1
    assert files(tmp_path / "out") == files(tmp_path / "two")


@pytest.mark.parametrize(
    ("tree", "label"),
    [
        ("voc2012", "VOCdevkit/VOC2012/SegmentationClass/2007_000032.png"),
        ("whu, authors", "train/label/0.tif"),
        ("coco-panoptic", "panoptic_train2017/000000000009.png"),
        ("coco-instance", "annotations/instances_train2017.json"),
        ("cityscapes", "gtFine/train/aachen/aachen_000000_000019_gtFine_instanceIds.png"),
    ],
)
def test_an_image_whose_label_was_edited_is_protected_again(tree, label, tmp_path, protect):
    name, write = TREES[tree]
    path = next(iter(write(tmp_path / "in")))
    file = tmp_path / "in" / label
    assert protect(name) == 0
    before = data_files(tmp_path / "out")
    if file.suffix == ".json":
        edited = file.read_text().replace("[6, 4, 30, 4, 30, 18, 6, 18]", "[6, 4, 20, 4, 20, 18, 6, 18]")
        file.write_text(edited)
    else:
        drawn = Image.open(file)
        drawn.paste(drawn.crop((6, 4, 18, 18)), (40, 2))
        drawn.save(file)
    assert protect(name) == 0
    after = data_files(tmp_path / "out")
    assert after.keys() == before.keys()
    assert after[path] != before[path]
    assert after[label] == file.read_bytes() != before[label]
    assert protect(name, output="whole") == 0
    assert files(tmp_path / "out") == files(tmp_path / "whole")


def test_images_and_labels_of_the_same_size_are_done_again_and_others_are_not(tmp_path, protect):
    (path,) = TREES["whu, authors"][1](tmp_path / "in")
    assert protect("whu") == 0
    times = {name: (tmp_path / "out" / name).stat().st_mtime_ns for name in data_files(tmp_path / "out")}
    size = (tmp_path / "in" / path).stat().st_size
    photo(tmp_path / "in" / path, seed=9)
    label = tmp_path / "in/val/label/0.tif"
    save(label, labels((255, (slice(5, 19), slice(6, 30)))))
    assert (tmp_path / "in" / path).stat().st_size == size == record(tmp_path / "out")[path]["input_bytes"]
    assert label.stat().st_size == record(tmp_path / "out")["val/label/0.tif"]["input_bytes"]
    assert protect("whu") == 0
    again = {name for name, time_ in times.items() if (tmp_path / "out" / name).stat().st_mtime_ns != time_}
    assert again == {path, "val/label/0.tif"}
    assert protect("whu", output="whole") == 0
    assert files(tmp_path / "out") == files(tmp_path / "whole")


def test_images_that_come_into_a_list_later_are_protected_and_their_copies_removed(tmp_path, protect, capsys):
    (path,) = TREES["voc2012"][1](tmp_path / "in")
    base = tmp_path / "in/VOCdevkit/VOC2012"
    aside = "VOCdevkit/VOCaug/dataset/img/2007_000033.jpg"
    photo(tmp_path / "in" / aside)
    assert protect("voc2012") == 0
    assert aside in record(tmp_path / "out")
    text(base / "ImageSets/Segmentation/train.txt", "2007_000032\n2007_000033\n2008_000001\n")
    assert protect("voc2012") == 1
    assert (
        "2008_000001.jpg: it is in a split to be protected, but its annotation is missing" in capsys.readouterr().err
    )
    entries = record(tmp_path / "out")
    assert entries[path.replace("32", "33")]["status"] == "protected"
    assert not (tmp_path / "out" / path.replace("2007_000032", "2008_000001")).exists()
    assert not (tmp_path / "out" / aside).exists()
    assert aside not in entries


def test_what_an_earlier_run_wrote_and_this_one_would_not_is_removed(tmp_path, protect):
    TREES["voc2012"][1](tmp_path / "in")
    base = tmp_path / "in/VOCdevkit/VOC2012"
    assert protect("voc2012", "--jpeg-names", "rename") == 0
    text(base / "ImageSets/Segmentation/train.txt", "2007_000033\n")
    assert protect("voc2012", "--jpeg-names", "rename") == 0
    assert protect("voc2012", "--jpeg-names", "rename", output="whole") == 0
    assert data_files(tmp_path / "out") == data_files(tmp_path / "whole")
    TREES["cityscapes"][1](tmp_path / "cities")
    assert protect("cityscapes", root="cities", output="moved") == 0
    for kind in ("leftImg8bit", "gtFine"):
        shutil.move(tmp_path / f"cities/{kind}/val/munster", tmp_path / f"cities/{kind}/train")
    assert protect("cityscapes", root="cities", output="moved") == 0
    assert not list((tmp_path / "moved/leftImg8bit/val").rglob("*.png"))
    assert data_files(tmp_path / "moved").keys() == files(tmp_path / "cities").keys()


def test_one_run_at_a_time_writes_an_output(tmp_path, protect, capsys):
    TREES["voc2012"][1](tmp_path / "in")
    assert protect("voc2012") == 0
    before = files(tmp_path / "out")
    with alone(tmp_path / "out", SETTINGS):
        assert protect("voc2012") == 2
    assert "another run is writing there" in capsys.readouterr().err
    assert files(tmp_path / "out") == before


def test_no_path_of_this_machine_is_published(tmp_path, protect, capsys):
    many(tmp_path / "in", 3)
    (tmp_path / "in/images/000.jpg").write_bytes(b"no image")
    (tmp_path / "in/masks/001.jpg").write_bytes(b"no mask")
    assert protect("kvasir-seg") == 1
    assert str(tmp_path) not in (tmp_path / "out" / RECORD).read_text()
    assert "images/000.jpg" in capsys.readouterr().err


def test_a_full_disk_ends_the_run_and_no_image_is_called_bad(tmp_path, protect, monkeypatch, capsys):
    many(tmp_path / "in", 3)

    def full(*arguments):
        raise image_files.ImageFileError("it cannot be written") from OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(image_files, "write", full)
    assert protect("kvasir-seg") == 2
    assert not [entry for entry in record(tmp_path / "out").values() if entry["status"] == "failed"]


def test_names_and_lists_are_read_in_the_forms_that_are_about(tmp_path, protect, capsys):
    (path,) = TREES["voc2012"][1](tmp_path / "in")
    lists = tmp_path / "in/VOCdevkit/VOC2012/ImageSets/Segmentation"
    text(lists / "trainaug.txt", "\ufeff/JPEGImages/2007_000032.jpg /SegmentationClass/2007_000032.png\n")
    assert protect("voc2012", "--split", "trainaug") == 0
    assert record(tmp_path / "out")[path]["status"] == "protected"
    text(lists / "trainaug.txt", "2019_000001\n")
    assert protect("voc2012", "--split", "trainaug", output="none") == 2
    assert "their lists name 1 images that are not there" in capsys.readouterr().err
    (lists / "trainaug.txt").write_bytes(b"\xff\xfe")
    assert protect("voc2012", "--split", "trainaug", output="none") == 2
    assert "trainaug.txt is no text in UTF-8" in capsys.readouterr().err
    (city,) = TREES["cityscapes"][1](tmp_path / "cities")
    for number, name in enumerate((Path(city).name, Path(city).name.partition("_left")[0])):
        text(tmp_path / "names.txt", name)
        options = ("--names", tmp_path / "names.txt")
        assert protect("cityscapes", *options, root="cities", output=f"city{number}") == 0
        assert record(tmp_path / f"city{number}")[city]["status"] == "protected"
    text(tmp_path / "names.txt", "nobody.png")
    assert protect("cityscapes", "--names", tmp_path / "names.txt", root="cities", output="none") == 2
    assert "none is called 'nobody', as --names has it" in capsys.readouterr().err


def test_cities_may_be_links_and_an_output_is_not_protected_again(tmp_path, protect, capsys):
    (path,) = TREES["cityscapes"][1](tmp_path / "in")
    for kind in ("leftImg8bit", "gtFine"):
        shutil.move(tmp_path / f"in/{kind}/train/aachen", tmp_path / f"disk/{kind}")
        (tmp_path / f"in/{kind}/train/aachen").symlink_to(tmp_path / f"disk/{kind}")
    assert protect("cityscapes") == 0
    assert record(tmp_path / "out")[path]["status"] == "protected"
    TREES["voc2012"][1](tmp_path / "voc")
    assert protect("voc2012", root="voc", output="first") == 0
    assert protect("voc2012", root="first/VOCdevkit", output="second") == 2
    assert "is protected already" in capsys.readouterr().err


def test_another_folder_of_the_same_name_is_refused(tmp_path, protect, capsys):
    TREES["whu, authors"][1](tmp_path / "in")
    shutil.copytree(tmp_path / "in", tmp_path / "elsewhere/in")
    assert protect("whu") == 0
    before = files(tmp_path / "out")
    assert protect("whu", root="elsewhere/in") == 2
    assert "was begun with input='in (" in capsys.readouterr().err
    assert files(tmp_path / "out") == before
    assert str(tmp_path).encode() not in b"".join(before[name] for name in (RECORD, SETTINGS))


def test_other_settings_on_the_same_output_are_refused_by_name(tmp_path, protect, capsys):
    TREES["voc2012"][1](tmp_path / "in")
    assert protect("voc2012") == 0
    before = files(tmp_path / "out")
    for options, name in (
        (("--epsilon", "4"), "epsilon=8.0, and now epsilon=4.0"),
        (("--per-segment",), "per_segment=False"),
        (("--tint", "never"), "tint='auto', and now tint='never'"),
        (("--classes", "person"), "classes=None, and now classes=[15]"),
        (("--split", "val"), "splits=['train']"),
        (("--jpeg-names", "jpeg"), "jpeg_names='png-bytes'"),
        (("--link", "hard"), "link=None"),
    ):
        assert protect("voc2012", *options) == 2
        assert name in capsys.readouterr().err
    assert files(tmp_path / "out") == before


def test_a_tint_may_be_asked_for(tmp_path):
    """Of the generator in the package, which has one."""
    TREES["voc2012"][1](tmp_path / "in")
    command = ["protect-dataset", "voc2012", "--root", str(tmp_path / "in"), "--output"]
    changes = {}
    for tint in ("never", "always"):
        assert cli.main([*command, str(tmp_path / tint), "--tint", tint]) == 0
        done = [entry for entry in record(tmp_path / tint).values() if entry["status"] == "protected"]
        assert {entry["tinted"] for entry in done} == {tint == "always"}
        changes[tint] = [(tmp_path / tint / entry["path"]).read_bytes() for entry in done]
    assert all(one != other for one, other in zip(*changes.values(), strict=True))


def test_bad_images_and_masks_are_named_and_left_out_until_they_are_mended(tmp_path, protect, capsys):
    many(tmp_path / "in", 5)
    before = files(tmp_path / "in")
    (tmp_path / "in/images/000.jpg").write_bytes(before["images/000.jpg"][:300])
    (tmp_path / "in/masks/001.jpg").write_bytes(b"no mask")
    (tmp_path / "in/masks/002.jpg").unlink()
    save(tmp_path / "in/masks/003.jpg", np.zeros((9, 9), np.uint8))
    (tmp_path / "in/broken link").symlink_to("nowhere")
    assert protect("kvasir-seg") == 1
    assert set(data_files(tmp_path / "out")) == {"images/004.jpg", *(f"masks/{n:03d}.jpg" for n in (0, 1, 3, 4))}
    printed = capsys.readouterr()
    lines = printed.err.strip().splitlines()
    assert len(lines) == 5
    for name, problem in (
        ("images/000.jpg", "damaged"),
        ("masks/001.jpg", "not an image"),
        ("images/002.jpg", "annotation is missing"),
        ("masks/003.jpg", "(9, 9)"),
        ("broken link", "No such file"),
    ):
        assert sum(name in line and problem in line for line in lines) == 1
    assert "1 images of all protected" in printed.out
    assert "5 failed and left out" in printed.out
    (tmp_path / "in/broken link").unlink()
    for name, data in before.items():
        (tmp_path / "in" / name).write_bytes(data)
    assert protect("kvasir-seg") == 0
    assert protect("kvasir-seg", output="whole") == 0
    assert data_files(tmp_path / "out") == data_files(tmp_path / "whole")


def test_one_damaged_object_costs_its_image_alone_and_a_damaged_json_stops_before_anything(tmp_path, protect, capsys):
    TREES["coco-instance"][1](tmp_path / "in")
    path = tmp_path / "in/annotations/instances_train2017.json"
    content = json.loads(path.read_text())
    for number, (damaged, problem) in enumerate(
        (
            ([[1, 2, 30, 4, 5, 6, 7]], "an x without its y"),
            ([["one", "two"] * 3], "damaged"),
            ([[1, 2, 30, 4, 1e12, 7]], "far outside the image"),
            ([[1, 2, 30, 4, float("nan"), 7]], "far outside the image"),
            (None, "damaged"),
            ({"size": [40, 56], "counts": [100, 100]}, "does not fill the image"),
            ({"size": [40, 56], "counts": "04"}, "does not fill the image"),
            ({"size": [4, 5], "counts": [20]}, "a code of size [4, 5]"),
            ({"size": [40, 56], "counts": [0.5] * 4480}, "does not fill the image"),
            ([[0, 0, 56, 40] * 10_000], "an outline"),
        )
    ):
        content["annotations"][0]["segmentation"] = damaged
        text(path, content)
        assert protect("coco-instance", output=f"out{number}") == 1
        assert problem in capsys.readouterr().err
        assert not (tmp_path / f"out{number}/train2017/000000000009.jpg").exists()
        assert (tmp_path / f"out{number}/train2017/000000000010.jpg").exists()
    content["annotations"][0] |= {"segmentation": None, "bbox": [1, 2, 30]}
    text(path, content)
    assert protect("coco-instance", output="bad box") == 1
    assert "'bbox' is damaged" in capsys.readouterr().err
    content["annotations"][0] |= {"segmentation": [[1, 2, 30, 30]], "bbox": [1, 2, 30, 30]}
    text(path, content)
    assert protect("coco-instance", output="two points") == 0
    entry = record(tmp_path / "two points")["train2017/000000000009.jpg"]
    assert entry["mask_share"] == pytest.approx(area((slice(22, 36), slice(20, 50))).mean())
    path.write_text(path.read_text()[:100])
    assert protect("coco-instance", output="other") == 2
    assert "instances_train2017.json is damaged" in capsys.readouterr().err
    assert not (tmp_path / "other").exists()


def test_objects_that_are_annotated_by_a_box_alone_are_protected_by_it(tmp_path, protect):
    TREES["coco-instance"][1](tmp_path / "in")
    path = tmp_path / "in/annotations/instances_train2017.json"
    content = json.loads(path.read_text())
    for annotation, form in zip(content["annotations"], ({"segmentation": []}, {}, {}), strict=True):
        del annotation["segmentation"]
        annotation |= form | {"bbox": [3.0, 5.0, 20.0, 10.0]}
    text(path, content)
    assert protect("coco-instance", "--per-segment") == 0
    entry = record(tmp_path / "out")["train2017/000000000009.jpg"]
    assert entry["mask_share"] == pytest.approx(area((slice(5, 15), slice(3, 23))).mean())
    assert entry["masks"] == 2


def test_a_relative_folder_is_no_part_of_the_words_of_a_failure(tmp_path, loud_generator, monkeypatch):
    many(tmp_path / "in", 2)
    (tmp_path / "in/images/000.jpg").write_bytes(b"no image, and nothing like it")
    monkeypatch.chdir(tmp_path)
    request = ["protect-dataset", "kvasir-seg", "--root", "in", "--output", "out", "--model", str(loud_generator)]
    assert cli.main(request) == 1
    (failed,) = [entry for entry in record(tmp_path / "out").values() if entry["status"] == "failed"]
    assert failed["error"].startswith("images/000.jpg: this is not an image of a kind that is read here; download or")


@pytest.mark.parametrize("climbs", [True, False])
def test_segments_are_read_from_their_folder_alone(tmp_path, protect, capsys, climbs):
    TREES["coco-panoptic"][1](tmp_path / "in")
    path = tmp_path / "in/annotations/panoptic_train2017.json"
    content = json.loads(path.read_text())
    entry = content["annotations"][0]
    entry["file_name"] = f"../{entry['file_name']}" if climbs else str(tmp_path / "outside.png")
    text(path, content)
    assert protect("coco-panoptic") == 1
    assert "file_name leads out of the folder of the segments" in capsys.readouterr().err
    assert str(tmp_path) not in (tmp_path / "out/unseg-protected.jsonl").read_text()


def test_a_damaged_panoptic_entry_costs_its_image_alone(tmp_path, protect, capsys):
    TREES["coco-panoptic"][1](tmp_path / "in")
    path = tmp_path / "in/annotations/panoptic_train2017.json"
    content = json.loads(path.read_text())
    photo(tmp_path / "in/train2017/000000000010.jpg")
    content["images"].append({"id": 10, "file_name": "000000000010.jpg", "height": 40, "width": 56})
    content["annotations"].append({"image_id": 10, "file_name": "000000000010.png"})
    text(path, content)
    assert protect("coco-panoptic") == 1
    assert "its entry in the json lacks 'segments_info'" in capsys.readouterr().err
    assert (tmp_path / "out/train2017/000000000009.jpg").exists()
    assert not (tmp_path / "out/train2017/000000000010.jpg").exists()
    del content["annotations"][0]["image_id"]
    text(path, content)
    assert protect("coco-panoptic", output="other") == 2
    assert "an entry lacks its 'image_id'" in capsys.readouterr().err


def test_listed_images_that_are_not_there_are_counted(tmp_path, protect, capsys):
    (path,) = TREES["nwpu"][1](tmp_path / "in")
    photo(tmp_path / "in/imgs/009.jpg")
    (tmp_path / "in" / path).rename(tmp_path / "in/imgs/003.jpg")
    text(tmp_path / "in/annotations/NWPU_instances_train.json",
         (tmp_path / "in/annotations/NWPU_instances_val.json").read_text().replace("002.jpg", "009.jpg"))  # fmt: skip
    text(tmp_path / "in/annotations/NWPU_instances_val.json",
         (tmp_path / "in/annotations/NWPU_instances_val.json").read_text().replace("002.jpg", "077.jpg"))  # fmt: skip
    assert protect("nwpu", "--split", "train", "val") == 0
    assert "1 images that the lists of train, val name are not in" in capsys.readouterr().out


@pytest.mark.parametrize(
    "listed", ["train2017/000000000009.jpg", "caf\N{LATIN SMALL LETTER E WITH ACUTE}.jpg", "B.jpg"]
)
def test_an_image_that_a_list_names_otherwise_is_not_published_clean(listed, tmp_path, protect, capsys):
    TREES["coco-instance"][1](tmp_path / "in")
    path = tmp_path / "in/annotations/instances_train2017.json"
    content = json.loads(path.read_text())
    name = content["images"][0]["file_name"]
    there = {"B.jpg": "b.png"}.get(listed, unicodedata.normalize("NFD", listed).rpartition("/")[2])
    (tmp_path / "in/train2017" / name).rename(tmp_path / "in/train2017" / there)
    content["images"][0]["file_name"] = listed
    text(path, content)
    assert protect("coco-instance") == 1
    assert not (tmp_path / "out/train2017" / there).exists()
    assert f"a list has it as {listed[:-4]}" in capsys.readouterr().err


def test_names_with_spaces_and_backslashes_are_read(tmp_path, protect):
    (path,) = TREES["voc2012"][1](tmp_path / "in")
    base = tmp_path / "in/VOCdevkit/VOC2012"
    for folder, suffix in (("JPEGImages", ".jpg"), ("SegmentationClass", ".png")):
        (base / folder / f"2007_000032{suffix}").rename(base / folder / f"photo 1{suffix}")
    text(base / "ImageSets/Segmentation/train.txt", "photo 1\n2007_000033 -1\n")
    assert protect("voc2012") == 0
    done = {p for p, entry in record(tmp_path / "out").items() if entry["status"] == "protected"}
    assert {PurePath(p).name for p in done} == {"photo 1.jpg", "2007_000033.jpg"}
    TREES["coco-instance"][1](tmp_path / "coco")
    path = tmp_path / "coco/annotations/instances_train2017.json"
    path.write_text(path.read_text().replace("000000000009.jpg", "some\\\\000000000009.jpg"))
    (tmp_path / "coco/train2017/some").mkdir()
    (tmp_path / "coco/train2017/000000000009.jpg").rename(tmp_path / "coco/train2017/some/000000000009.jpg")
    assert protect("coco-instance", root="coco", output="of coco") == 0
    assert record(tmp_path / "of coco")["train2017/some/000000000009.jpg"]["status"] == "protected"


def test_numbers_of_images_that_do_not_agree_stop_before_anything(tmp_path, protect, capsys):
    TREES["coco-instance"][1](tmp_path / "in")
    path = tmp_path / "in/annotations/instances_train2017.json"
    content = json.loads(path.read_text())
    for image in content["images"]:
        image["id"] = str(image["id"])
    text(path, content)
    assert protect("coco-instance") == 2
    assert "write both alike" in capsys.readouterr().err
    for image in content["images"]:
        image["id"] = 0
    text(path, content)
    assert protect("coco-instance") == 2
    assert "000000000009.jpg and 000000000010.jpg have the same id, 0" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    "outline", [{"bbox": [0.1, 0.2, 0.5, 0.3]}, {"segmentation": [[0.1, 0.1, 0.9, 0.1, 0.9, 0.8]]}]
)
def test_shares_in_place_of_pixels_are_refused(outline, tmp_path, protect, capsys):
    TREES["coco-instance"][1](tmp_path / "in")
    path = tmp_path / "in/annotations/instances_train2017.json"
    content = json.loads(path.read_text())
    del content["annotations"][0]["segmentation"]
    content["annotations"][0] |= outline
    text(path, content)
    assert protect("coco-instance") == 1
    assert "give pixels" in capsys.readouterr().err
    assert not (tmp_path / "out/train2017/000000000009.jpg").exists()


def test_pixels_of_protected_images_in_arrays_and_in_other_splits_are_left_out(tmp_path, protect, capsys):
    (path, *_) = TREES["coco-instance"][1](tmp_path / "in")
    np.save(tmp_path / "in" / path.replace(".jpg", ".npy"), np.zeros(3))
    np.save(tmp_path / "in/train2017/other.npy", np.zeros(3))
    (tmp_path / "in/val2017").mkdir(exist_ok=True)
    shutil.copy(tmp_path / "in" / path, tmp_path / "in" / path.replace("train2017", "val2017"))
    for split in ("train", "val"):
        text(tmp_path / f"in/annotations/instances_{split}2017.json",
             (tmp_path / "in/annotations/instances_train2017.json").read_text())  # fmt: skip
    assert protect("coco-instance") == 0
    assert not (tmp_path / "out" / path.replace(".jpg", ".npy")).exists()
    assert not (tmp_path / "out" / path.replace("train2017", "val2017")).exists()
    printed = capsys.readouterr().out
    assert "2 files left out" in printed
    assert "1 files that may hold the original images were taken over, such as train2017/other.npy" in printed


def test_what_systems_and_programs_put_beside_images_is_left_out(tmp_path, protect, capsys):
    many(tmp_path / "in", 1)
    for name in (".git/config", "images/.000.jpg.swp", "images/Thumbs.db", "images/000.jpg.bak", "images/000.jpg~",
                 "images/000.psd", "images/000.NEF", "__MACOSX/000.jpg"):  # fmt: skip
        text(tmp_path / "in" / name, "the original")
    text(tmp_path / "in/notes.txt", "kept")
    assert protect("kvasir-seg") == 0
    assert set(data_files(tmp_path / "out")) == {"images/000.jpg", "masks/000.jpg", "notes.txt"}
    assert "4 files left out" in capsys.readouterr().out


def test_a_record_that_leads_out_of_the_output_removes_nothing(tmp_path, protect, capsys):
    many(tmp_path / "in", 1)
    assert protect("kvasir-seg") == 0
    text(tmp_path / "mine.txt", "mine")
    with open(tmp_path / "out" / RECORD, "a") as file:
        for path in ("../mine.txt", str(tmp_path / "mine.txt")):
            print(json.dumps({"path": path, "status": "copied"}), file=file)
    assert protect("kvasir-seg") == 2
    assert "is damaged" in capsys.readouterr().err
    assert (tmp_path / "mine.txt").exists()


def test_a_run_that_changes_nothing_is_no_success(tmp_path, protect, capsys):
    many(tmp_path / "in", 2)
    for number in range(2):
        save(tmp_path / f"in/masks/{number:03d}.jpg", np.zeros((HEIGHT, WIDTH), np.uint8))
    assert protect("kvasir-seg", "--epsilon", 4, "--epsilon-background", 0) == 1
    assert "0 images of all protected, 2 with nothing to protect in them" in capsys.readouterr().out


def test_a_wrong_root_shows_the_expected_tree(tmp_path, protect, capsys):
    TREES["ade20k"][1](tmp_path / "in")
    assert protect("voc2012") == 2
    error = capsys.readouterr().err
    for part in ("in is no voc2012", "JPEGImages/{name}.jpg", "SegmentationClass/{name}.png", "VOCdevkit/VOC2012/"):
        assert part in error
    assert protect("ade20k", root="nowhere") == 2
    assert "no such folder" in capsys.readouterr().err
    assert protect("imagenet") == 2
    assert "voc2012, sbd, ade20k" in capsys.readouterr().err


def test_outputs_that_would_harm_are_refused(tmp_path, protect, capsys):
    TREES["ade20k"][1](tmp_path / "in")
    before = files(tmp_path)
    for output in ("in", "in/out"):
        assert protect("ade20k", output=output) == 2
        assert "lies in the input" in capsys.readouterr().err
    text(tmp_path / "mine/notes.txt", "mine")
    assert protect("ade20k", output="mine") == 2
    assert "choose another output" in capsys.readouterr().err
    (tmp_path / "mine/notes.txt").unlink()
    assert files(tmp_path) == before
    assert protect("ade20k") == 0
    assert protect("ade20k", root="out", output="twice") == 2
    assert "protected already" in capsys.readouterr().err


def test_options_that_make_no_sense_are_refused(tmp_path, protect, capsys):
    TREES["kvasir-seg"][1](tmp_path / "in")
    for options, message in (
        (("--quality", "98"), "with --jpeg-names jpeg"),
        (("--quality", "50", "--jpeg-names", "jpeg"), "from 95 to 100"),
        (("--processes", "0"), "--processes 0"),
        (("--classes", "polyp"), "has one class"),
        (("--epsilon", "4", "--strength", "low"), "pass one"),
        (("--names", tmp_path / "in/kavsir_bboxes.json", "--split", "train"), "--split train"),
    ):
        assert protect("kvasir-seg", *options) == 2
        assert message in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(("name", "package"), [("sbd", "scipy.io"), ("coco-instance", "pycocotools")])
def test_a_package_that_is_missing_is_named_before_anything_is_done(
    name, package, tmp_path, protect, capsys, monkeypatch
):
    TREES[name][1](tmp_path / "in")
    monkeypatch.setitem(sys.modules, package, None)
    assert protect(name) == 2
    assert "pip install 'unseg-hf[" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_the_list_and_every_layout_can_be_shown(capsys):
    with pytest.raises(SystemExit) as left:
        cli.main(["protect-dataset", "--list"])
    assert left.value.code == 0
    listed = capsys.readouterr().out.strip().splitlines()
    assert [line.split()[0] for line in listed] == list(DATA_SETS)
    assert "4/255" in listed[-1]
    for name, data_set in DATA_SETS.items():
        with pytest.raises(SystemExit):
            cli.main(["protect-dataset", "--layout", name])
        shown = capsys.readouterr().out
        assert all(images.file in shown for layout in data_set.layouts for images in layout.images)
    assert {name for name, _ in TREES.values()} == DATA_SETS.keys()


def test_pixels_turned_by_exif_stay_on_the_grid_of_their_masks(tmp_path, protect):
    many(tmp_path / "in", 1)
    image = Image.open(tmp_path / "in/images/000.jpg")
    exif = Image.Exif()
    exif[0x0112] = 6
    image.save(tmp_path / "in/images/000.jpg", exif=exif, quality=95)
    assert protect("kvasir-seg") == 0
    region = np.asarray(Image.open(tmp_path / "in/masks/000.jpg")) > 127
    assert_protected(tmp_path / "in/images/000.jpg", tmp_path / "out/images/000.jpg", region, 4, 1)
    assert Image.open(tmp_path / "out/images/000.jpg").getexif().get(0x0112, 1) == 1
    assert "EXIF orientation 6 dropped" in record(tmp_path / "out")["images/000.jpg"]["notes"][0]


def test_the_jpeg_with_the_fewest_pixels_over_the_bound_is_kept(monkeypatch):
    pixels = np.random.default_rng(0).integers(60, 190, (48, 64, 3)).astype(np.uint8)
    noise = np.random.default_rng(1).choice([-8, 8], pixels.shape)
    protected = SimpleNamespace(
        original=from_array(pixels), picture=from_array((pixels + noise).astype(np.uint8)),
        region=np.ones((48, 64), bool), epsilon=8 / 255, epsilon_background=0,
    )  # fmt: skip
    calls, encode = [], bounded_jpeg.encode

    def third_time_badly(picture, format, quality):
        calls.append(encode(picture, format, 5 if len(calls) == 2 else quality))
        return calls[-1]

    monkeypatch.setattr(bounded_jpeg, "encode", third_time_badly)
    best = bounded_jpeg.encode_within_bound(protected, 95)
    assert best.data in calls[:2]


def test_a_void_border_between_objects_is_no_object(tmp_path):
    labels, objects = np.full((4, 6), 7, np.uint8), np.zeros((4, 6), np.uint8)
    objects[:, 1:3], objects[:, 3], objects[:, 4] = 1, 255, 2  # a border that is no object between two
    for name, values in (("labels", labels), ("objects", objects)):
        Image.fromarray(values).save(tmp_path / f"{name}.png")
    image = LabelImage(tmp_path / "labels.png", (0, 255), tmp_path / "objects.png")
    found = {segment.mask.sum(): segment for segment in image.segments((4, 6), None, separate=True)}
    assert {segment.class_id for segment in found.values()} == {7}
    assert [found[size].mask[0].tolist() for size in (8, 4, 12)] == [
        (objects[0] == 1).tolist(), (objects[0] == 2).tolist(), np.isin(objects[0], (0, 255)).tolist(),
    ]  # fmt: skip
