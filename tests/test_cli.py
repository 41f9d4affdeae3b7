"""The `unseg` command on real files."""

import contextlib
import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import psutil
import pytest
import torch
from PIL import Image

import unseg_hf
from unseg_hf import Protector, cli, image_files, protect_command


def photo(seed=0, height=48, width=64):
    y, x = np.mgrid[:height, :width]
    return np.stack([90 + y, 60 + x + seed, 200 - x], axis=-1).astype(np.uint8)


def mask(height=48, width=64):
    drawn = np.zeros((height, width), np.uint8)
    drawn[10:30, 20:50] = 255
    return drawn


@pytest.fixture
def folder(tmp_path):
    """Two good images, one of them in a sub-folder, three bad files, and masks for all."""
    for name in ("in/a.png", "in/sub/b.jpg"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(photo()).save(tmp_path / name)
        target = (tmp_path / name.replace("in/", "masks/")).with_suffix(".png")
        target.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(mask()).save(target)
    (tmp_path / "in/empty.png").touch()
    (tmp_path / "in/text.jpg").write_text("hello")
    (tmp_path / "in/cut.png").write_bytes((tmp_path / "in/a.png").read_bytes()[:-60])
    (tmp_path / "in/readme.txt").write_text("not an image, and not named like one")
    for name in ("empty", "text", "cut"):
        Image.fromarray(mask()).save(tmp_path / f"masks/{name}.png")
    return tmp_path


def run(*arguments):
    return cli.main([str(argument) for argument in arguments])


def test_a_folder_keeps_its_tree_and_bad_files_do_not_stop_it(folder, saved_generator, capsys):
    status = run(
        "protect", folder / "in", "-o", folder / "out", "--masks", folder / "masks", "--model", saved_generator,
        "--json", folder / "report.json",
    )  # fmt: skip
    assert status == 1
    assert sorted(p.relative_to(folder / "out").as_posix() for p in (folder / "out").rglob("*.*")) == [
        "a.png",
        "sub/b.png",
    ]
    errors = capsys.readouterr().err
    for name in ("empty.png", "text.jpg", "cut.png"):
        assert errors.count(str(folder / "in" / name)) == 1
    assert len(errors.strip().splitlines()) == 3
    report = {entry["input"]: entry for entry in json.loads((folder / "report.json").read_text())["images"]}
    assert report[str(folder / "in/a.png")]["report"]["max_noise"] <= 8
    assert report[str(folder / "in/cut.png")]["status"] == "failed"


@pytest.fixture
def threads():
    """Sets how many threads torch has, and with them how many images are worked on at a time."""
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


def test_files_and_messages_do_not_depend_on_how_many_images_are_worked_on_at_a_time(
    folder, saved_generator, capsys, threads
):
    for i in range(6):
        Image.fromarray(photo(i, 40 + 3 * i, 70 - 2 * i)).save(folder / f"in/more{i}.png")
    seen = []
    for count in (1, 4):
        threads(count)
        out = folder / f"out{count}"
        assert run("protect", folder / "in", "-o", out, "--model", saved_generator, "--json", out / "r.json") == 1
        assert torch.get_num_threads() == count
        files = {path.relative_to(out).as_posix(): path.read_bytes() for path in sorted(out.rglob("*.png"))}
        entries = json.loads((out / "r.json").read_text())["images"]
        seen.append((files, capsys.readouterr().err, [(entry["input"], entry["status"]) for entry in entries]))
    assert len(seen[0][0]) == 8
    assert seen[0] == seen[1]


@pytest.mark.parametrize("request_to_stop", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_a_stopped_run_leaves_whole_files_and_a_report_of_them(
    folder, saved_generator, capsys, threads, monkeypatch, request, request_to_stop
):
    # What is started by nohup ignores one of them.
    heeded = signal.signal(request_to_stop, signal.default_int_handler)
    request.addfinalizer(lambda: signal.signal(request_to_stop, heeded))
    threads(2)
    for i in range(20):
        Image.fromarray(photo(i)).save(folder / f"in/sub/{i:02}.png")
    write = image_files.write

    def write_and_interrupt(picture, path, *arguments):
        if path.name == "02.png":
            signal.raise_signal(request_to_stop)
        return write(picture, path, *arguments)

    before = signal.getsignal(signal.SIGTERM)
    monkeypatch.setattr(image_files, "write", write_and_interrupt)
    status = run("protect", folder / "in/sub", "-o", folder / "out", "--whole-image", "--model", saved_generator,
                 "--json", folder / "r.json")  # fmt: skip
    assert status == 130
    assert signal.getsignal(signal.SIGTERM) == before
    assert "what is finished is kept" in capsys.readouterr().err
    written = sorted((folder / "out").iterdir())
    assert 3 <= len(written) < 21
    for path in written:
        assert image_files.read(path).width == 64
    entries = json.loads((folder / "r.json").read_text())["images"]
    assert [entry["output"] for entry in entries if entry["status"] == "protected"] == [str(path) for path in written]


def test_an_output_folder_inside_the_input_is_not_protected_again(folder, saved_generator, capsys):
    request = ("protect", folder / "in/sub", "-o", folder / "in/sub/out", "--whole-image", "--model", saved_generator)
    assert run(*request) == run(*request) == 0
    assert [path.name for path in (folder / "in/sub/out").rglob("*")] == ["b.png"]


def test_images_that_share_a_name_keep_their_suffix_in_it(folder, saved_generator):
    Image.fromarray(photo(9)).save(folder / "in/sub/b.png")
    assert run("protect", folder / "in/sub", "-o", folder / "out", "--whole-image", "--model", saved_generator) == 0
    assert sorted(path.name for path in (folder / "out").iterdir()) == ["b.jpg.png", "b.png.png"]


def test_paths_that_lead_nowhere_or_are_too_long_stop_no_other(folder, saved_generator, capsys):
    (folder / "odd").mkdir()
    for name in ("a.jpg", "z.png", "b" * 251 + ".jpg"):
        Image.fromarray(photo()).save(folder / "odd" / name)
    (folder / "odd/loop.png").symlink_to(folder / "odd/loop.png")
    (folder / "out/z.png").mkdir(parents=True)
    request = ("protect", folder / "odd", "-o", folder / "out", "--whole-image", "--model", saved_generator)
    assert run(*request, "--format", "webp") == 1
    out, err = capsys.readouterr()
    assert "2 protected, 2 failed" in out
    assert "loop.png" in err
    assert "File name too long" in err
    assert run(*request) == 1
    assert "it is a folder" in capsys.readouterr().err


def test_folders_behind_links_are_searched_and_never_twice(folder, saved_generator, capsys):
    (folder / "linked").mkdir()
    (folder / "linked/more").symlink_to(folder / "in/sub")
    (folder / "linked/round").symlink_to(folder / "linked")
    request = ("protect", folder / "linked", folder / "in/../linked", "--masks", folder / "masks/sub/b.png")
    assert run(*request, "-o", folder / "out", "--model", saved_generator) == 0
    assert [path.relative_to(folder).as_posix() for path in (folder / "out").rglob("*.*")] == ["out/more/b.png"]


def test_what_lies_in_the_input_beside_its_images_is_not_protected(folder, saved_generator, capsys):
    for name in ("photos/a.png", "photos/b.png", "photos/masks/a.png", "photos/masks/b.png"):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(mask() if "masks" in name else photo()).save(folder / name)
    request = ("protect", folder / "photos", "--masks", folder / "photos/masks", "--model", saved_generator)
    assert run(*request, "-o", folder / "out") == 0
    assert sorted(path.name for path in (folder / "out").rglob("*.png")) == ["a.png", "b.png"]
    for same in (("-o", folder / "photos"), ("-o", folder / "out", "--masks", folder / "photos")):
        assert run(*request, *same) == 2
        assert "keep them apart" in capsys.readouterr().err
    (folder / "photos/b.png").unlink()
    for _ in range(2):
        assert run(*request, "-o", folder / "photos/out.png", "--overwrite") == 0


def test_the_report_keeps_what_other_runs_did_and_is_known_to_be_writable(folder, saved_generator, capsys):
    request = ("protect", "--whole-image", "--model", saved_generator, "--json", folder / "r.json", "-o")
    for name in ("1.png", "2.png"):
        assert run(*request, folder / name, folder / "in/a.png") == 0
    entries = json.loads((folder / "r.json").read_text())["images"]
    assert [Path(entry["output"]).name for entry in entries] == ["1.png", "2.png"]
    (folder / "file").touch()
    assert run(*request, folder / "3.png", folder / "in/a.png", "--json", folder / "file/r.json") == 2
    assert not (folder / "3.png").exists()


@pytest.mark.parametrize(
    ("inputs", "masks", "message"),
    [
        (["A", "B"], [], "A/x.png and B/x.png would both become out/x.png.png: rename one"),
        (["C"], [], "C/a.jpg and C/a.jpg.png would both become out/a.jpg.png"),
        (["A", "D"], ["--masks", "M"], "A/x.png and D/x.webp would both get the mask M/x.png"),
    ],
)
def test_files_that_would_replace_each_other_or_share_a_mask_are_refused(
    tmp_path, monkeypatch, saved_generator, capsys, inputs, masks, message
):
    monkeypatch.chdir(tmp_path)
    for name in ("A/x.png", "B/x.png", "C/a.jpg", "C/a.png", "C/a.jpg.png", "D/x.webp", "M/x.png"):
        Path(name).parent.mkdir(exist_ok=True)
        Image.fromarray(photo()).save(name)
    assert cli.main(["protect", *inputs, *masks, "-o", "out", "--model", str(saved_generator)]) == 2
    assert message in capsys.readouterr().err
    assert not Path("out").exists()


def test_a_mask_is_never_taken_from_an_image_of_another_folder(folder, saved_generator, capsys):
    for side in ("x", "y"):
        (folder / "t" / side).mkdir(parents=True)
        Image.fromarray(photo()).save(folder / "t" / side / "1.png")
    (folder / "m/x").mkdir(parents=True)
    Image.fromarray(mask()).save(folder / "m/x/1.png")
    assert run("protect", folder / "t", "-o", folder / "o", "--masks", folder / "m", "--model", saved_generator) == 1
    assert [path.relative_to(folder / "o").as_posix() for path in (folder / "o").rglob("*.png")] == ["x/1.png"]
    assert "there is no such file" in capsys.readouterr().err


def test_the_report_of_a_folder_counts_its_notes_and_survives_a_second_run(folder, saved_generator, capsys):
    for name in ("empty.png", "text.jpg", "cut.png"):
        (folder / "in" / name).unlink()
    request = ("protect", folder / "in", "-o", folder / "out", "--format", "jpeg", "--masks", folder / "masks",
               "--json", folder / "r.json", "--model", saved_generator)  # fmt: skip
    assert run(*request) == 0
    out = capsys.readouterr().out
    assert "note (2 images): JPEG changes pixels" in out
    assert "of the noise on average" in out
    first = json.loads((folder / "r.json").read_text())["images"]
    assert run(*request) == 0
    second = json.loads((folder / "r.json").read_text())["images"]
    assert [entry["status"] for entry in second] == ["skipped"] * 2
    assert [entry["report"] for entry in second] == [entry["report"] for entry in first]


def test_pixels_equal_those_of_the_python_api(folder, saved_generator):
    run("protect", folder / "in/sub/b.jpg", "-o", folder / "b.png", "--masks", folder / "masks/sub/b.png",
        "--model", saved_generator, "--epsilon", 12)  # fmt: skip
    expected = Protector.from_pretrained(saved_generator).protect(
        folder / "in/sub/b.jpg", mask=folder / "masks/sub/b.png", epsilon=12 / 255, epsilon_background=3 / 255
    )
    np.testing.assert_array_equal(np.asarray(Image.open(folder / "b.png")), np.asarray(expected.image))


def test_a_device_on_which_nothing_can_be_encoded_is_said_in_one_line(folder, monkeypatch, capsys):
    def record_encoder():
        raise torch.OutOfMemoryError("CUDA out of memory.\nTried to allocate 2 GiB")

    model = SimpleNamespace(device=torch.device("cuda"))
    protector = SimpleNamespace(model=model, record_encoder=record_encoder, uses_all_threads=False)
    monkeypatch.setattr(protect_command, "load_protector", lambda *_: protector)
    assert run("protect", folder / "in", "-o", folder / "out", "--whole-image", "--device", "cuda") == 2
    error = capsys.readouterr().err
    assert error == "unseg: the generator does not run on 'cuda': CUDA out of memory. Tried to allocate 2 GiB\n"
    assert not list(folder.glob("out/**/*.png"))


def test_with_hardly_any_memory_one_image_after_another_is_done(folder, saved_generator, monkeypatch, threads):
    at_work, most = [], []
    protect = protect_command._Worker._protect

    def watched(self, task):
        at_work.append(task)
        most.append(len(at_work))
        try:
            return protect(self, task)
        finally:
            at_work.remove(task)

    monkeypatch.setattr(protect_command._Worker, "_protect", watched)
    monkeypatch.setattr(psutil, "virtual_memory", lambda: SimpleNamespace(available=1000))
    request = ("protect", folder / "in", "-o", folder / "out", "--whole-image", "--model", saved_generator)
    for i in range(6):
        Image.fromarray(photo(i)).save(folder / f"in/more{i}.png")
    threads(4)
    assert run(*request) == 1  # some of them are broken
    assert len(list((folder / "out").rglob("*.png"))) == 8
    assert set(most) == {1}


def test_one_thread_at_a_time_uses_the_gpu_of_a_mac():
    for device, together in (("cpu", 3), ("cuda", 2), ("mps", 1)):
        model = SimpleNamespace(device=torch.device(device))
        protector = SimpleNamespace(model=model, record_encoder=lambda: None, uses_all_threads=False)
        with protect_command._shared_processor(protector, 9) as (_, turn), contextlib.ExitStack() as others:
            for _ in range(together):
                others.enter_context(turn)
            assert device == "cpu" or not turn.acquire(blocking=False)


def test_bf16_encodes_in_bfloat16(folder, saved_generator, monkeypatch):
    encoded, encode = [], Protector.encode

    def watched(self, jobs):
        encoded.append(self.model.sam.vision_encoder.layers[0].mlp.lin1.weight.dtype)
        return encode(self, jobs)

    monkeypatch.setattr(Protector, "encode", watched)
    request = ("protect", folder / "in/a.png", "--whole-image", "--model", saved_generator, "-o")
    assert [run(*request, folder / "one.png"), run(*request, folder / "two.png", "--bf16")] == [0, 0]
    assert encoded == [torch.float32, torch.bfloat16]


def test_a_skipped_image_has_no_figures_of_another(folder, saved_generator):
    for name in ("one", "other"):
        (folder / name).mkdir()
        Image.fromarray(photo(len(name), 30, 40)).save(folder / name / "photo.png")
    request = ("--whole-image", "--model", saved_generator, "-o", folder / "out", "--json", folder / "out.json")
    assert run("protect", folder / "one/photo.png", *request) == 0
    assert run("protect", folder / "other/photo.png", *request) == 0
    (entry,) = json.loads((folder / "out.json").read_text())["images"]
    assert (entry["input"], entry["status"]) == (str(folder / "other/photo.png"), "skipped")
    assert "report" not in entry


def test_images_with_nothing_to_protect_are_not_counted_as_protected_alone(folder, saved_generator, capsys):
    (folder / "two").mkdir()
    (folder / "empty").mkdir()
    for name, drawn in (("a", 1), ("b", 0)):
        Image.fromarray(photo(1, 30, 40)).save(folder / f"two/{name}.png")
        Image.fromarray(np.full((30, 40), drawn, np.uint8)).save(folder / f"empty/{name}.png")
    request = ("protect", folder / "two", "--masks", folder / "empty", "--model", saved_generator)
    assert run(*request, "-o", folder / "out", "--epsilon", 8, "--epsilon-background", 0) == 0
    assert "1 protected, 1 written as they were (the notes say why)" in capsys.readouterr().out


def test_finished_images_are_skipped_until_overwrite(folder, saved_generator, capsys):
    request = ("protect", folder / "in/a.png", "-o", folder / "out", "--whole-image", "--model", saved_generator)
    assert run(*request) == 0
    (folder / "out/a.png").write_bytes(b"mine")
    assert run(*request) == 0
    assert (folder / "out/a.png").read_bytes() == b"mine"
    assert "1 skipped (already there, whatever the settings; --overwrite" in capsys.readouterr().out
    os.utime(folder / "out/a.png", (1, 1))
    assert run(*request) == 0
    assert "1 skipped (already there, whatever the settings, 1 of them older than their photo or mask; " in (
        capsys.readouterr().out
    )
    assert run(*request, "--overwrite") == 0
    assert Image.open(folder / "out/a.png").size == (64, 48)


def test_strength_scales_the_noise(folder, saved_generator):
    largest = {}
    for strength in ("low", "medium", "high"):
        run("protect", folder / "in/a.png", "-o", folder / f"{strength}.png", "--whole-image", "--strength", strength,
            "--model", saved_generator)  # fmt: skip
        difference = np.asarray(Image.open(folder / f"{strength}.png")).astype(int) - photo()
        largest[strength] = np.abs(difference).max()
    assert 0 < largest["low"] < largest["medium"] < largest["high"] <= 16


def test_a_folder_says_that_its_images_have_unlike_noises_and_how_to_make_them_alike(tmp_path, capsys):
    """With the generator in the package, which has a tint for what is low."""
    for folder in ("in", "masks"):
        (tmp_path / folder).mkdir()
    for index, height in enumerate((70, 70, 4, 0)):  # the last has nothing to protect
        low = np.zeros((96, 128), np.uint8)
        low[20 : 20 + height, 10:100] = 255
        Image.fromarray(photo(index, 96, 128)).save(tmp_path / f"in/{index}.png")
        Image.fromarray(low).save(tmp_path / f"masks/{index}.png")
    arguments = ("protect", tmp_path / "in", "-o", tmp_path / "out", "--masks", tmp_path / "masks", "--overwrite")
    for options, expected in (((), True), (("--tint", "never"), False), (("--tint", "always"), False)):
        assert run(*arguments, *options) == 0
        said = capsys.readouterr().out
        assert ("note: images with a tint: 1, with waves: 2;" in said) == expected
        assert ("take --tint never for photographs, --tint always for small things" in said) == expected
    expected = Protector.from_pretrained().protect(tmp_path / "in/0.png", mask=tmp_path / "masks/0.png", tint="always")
    np.testing.assert_array_equal(np.asarray(Image.open(tmp_path / "out/0.png")), expected.picture.pixels)


def test_a_tint_reaches_the_objects_of_cocos_json(tmp_path):
    Image.fromarray(photo(1, 96, 128)).save(tmp_path / "a.png")
    labels = {
        "images": [{"id": 1, "file_name": "a.png", "height": 96, "width": 128}],
        "categories": [{"id": 1, "name": "o"}],
        "annotations": [
            {"id": 1, "image_id": 1, "category_id": 1, "bbox": [10, 20, 90, 60], "area": 5400, "iscrowd": 0}
        ],
    }
    (tmp_path / "labels.json").write_text(json.dumps(labels))
    arguments = ("protect", tmp_path / "a.png", "-o", tmp_path / "b.png", "--masks", tmp_path / "labels.json")
    assert run(*arguments, "--tint", "always") == 0
    expected = Protector.from_pretrained().protect(tmp_path / "a.png", boxes=[[10, 20, 100, 80]], tint="always")
    assert expected.tinted
    np.testing.assert_array_equal(np.asarray(Image.open(tmp_path / "b.png")), expected.picture.pixels)


def test_boxes_points_and_labels_reach_the_generator(folder, saved_generator):
    request = ("protect", folder / "in/a.png", "--model", saved_generator, "--json", folder / "r.json", "-o")
    assert run(*request, folder / "1.png", "--box", "5,5,30,30", "--box", "40,5,60,40") == 0
    report = json.loads((folder / "r.json").read_text())["images"][0]["report"]
    assert report["masks"] == 2
    assert run(*request, folder / "2.png", "--point", "30,20", "--point", "2,2,0") == 0
    labels = mask() // 255 * 3 + 1
    Image.fromarray(labels).save(folder / "labels.png")
    assert (
        run(*request, folder / "3.png", "--masks", folder / "labels.png", "--labels", "--ignore-labels", "1", "0") == 0
    )
    entries = json.loads((folder / "r.json").read_text())["images"]
    assert [Path(entry["output"]).name for entry in entries] == ["1.png", "2.png", "3.png"]
    report = entries[2]["report"]
    assert report["protected_share"] == pytest.approx((mask() > 0).mean())


def test_masks_and_boxes_may_stand_in_cocos_json(folder, saved_generator, capsys):
    Image.fromarray(photo(seed=9)).save(folder / "in/other.png")
    objects = [
        {"image_id": 1, "category_id": 3, "segmentation": [[20, 10, 50, 10, 50, 30, 20, 30]]},
        {"image_id": 1, "category_id": 4, "bbox": [2, 30, 10, 12]},
        {"image_id": 2, "category_id": 3, "segmentation": [[]], "bbox": [20.4, 10.6, 29.1, 18.9]},
    ]
    images = [("a.jpg", 1), ("elsewhere/b.jpg", 2), ("empty.png", 3)]  # without suffix and folder, names are enough
    content = {
        "images": [{"id": number, "file_name": name, "height": 48, "width": 64} for name, number in images],
        "annotations": objects,
        "categories": [{"id": 3, "name": "cup"}, {"id": 4, "name": "spoon"}],
    }
    path = folder / "labels.json"
    path.write_text(json.dumps(content))
    protector = Protector.from_pretrained(saved_generator)
    drawn, boxed = np.zeros((2, 48, 64), bool)
    drawn[10:30, 20:50] = boxed[30:42, 2:12] = True
    of_a = ({"masks": [drawn | boxed]}, {"masks": [drawn, boxed], "classes": [3, 4], "mode": "per_segment"})
    for number, (options, expected) in enumerate(zip(((), ("--per-segment",)), of_a, strict=True)):
        out = folder / f"out{number}"
        assert run("protect", folder / "in", "-o", out, "--masks", path, "--model", saved_generator, *options) == 1
        got = np.asarray(Image.open(out / "a.png"))
        np.testing.assert_array_equal(got, np.asarray(protector.protect(folder / "in/a.png", **expected).image))
        got, before = np.asarray(Image.open(out / "sub/b.png")), np.asarray(Image.open(folder / "in/sub/b.jpg"))
        change = np.abs(got.astype(int) - before)
        assert change[drawn].max() > 2 >= change[~drawn].max()
        assert not (out / "other.png").exists()
        assert "other.png: " + str(path) + " has no image of this name" in capsys.readouterr().err


def test_a_json_that_leaves_open_which_objects_an_image_has_is_refused(folder, saved_generator, capsys):
    path = folder / "labels.json"

    def refused(images, *arguments, sources=("in",), size=(48, 64)):
        entries = [{"id": i, "file_name": n, "height": size[0], "width": size[1]} for i, n in enumerate(images)]
        path.write_text(json.dumps({"images": entries, "annotations": [], "categories": []}))
        sources = [folder / source for source in sources]
        status = run(
            "protect", *sources, "-o", folder / "out", "--masks", path, "--model", saved_generator, *arguments
        )
        assert not (folder / "out").exists()
        return capsys.readouterr().err if status else ""

    assert "several images called a, whatever their suffix" in refused(["a.png", "a.jpg"])
    assert "--labels is for mask images" in refused(["a.png"], "--labels")
    assert "lacks its height" in refused(["a.png"], sources=["in/a.png"], size=(None, None))
    assert "was it turned?" in refused(["a.png"], sources=["in/a.png"], size=(64, 48))
    (folder / "other").mkdir()
    Image.fromarray(photo()).save(folder / "other/a.webp")
    assert "would both get the objects of a" in refused(["a.png"], sources=["in", "other"])
    path.write_text("{}")
    assert run("protect", folder / "in", "-o", folder / "none", "--masks", path, "--model", saved_generator) == 2
    assert "labels.json is damaged, or no json as COCO's" in capsys.readouterr().err
    assert run("protect", folder / "in", "-o", folder / "none", "--masks", folder / "no.json") == 2
    assert "no such json file" in capsys.readouterr().err
    assert not (folder / "none").exists()


def test_jpeg_says_what_it_costs(folder, saved_generator, capsys):
    assert run("protect", folder / "in/a.png", "-o", folder / "a.jpg", "--format", "jpeg", "--quality", 75,
               "--whole-image", "--model", saved_generator) == 0  # fmt: skip
    out = capsys.readouterr().out
    assert "png keeps all" in out
    saved = Image.open(folder / "a.jpg")
    assert saved.format == "JPEG"
    largest = np.abs(np.asarray(saved).astype(int) - photo()).max()
    assert f"{largest} of 255 in the mask" in out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("in/a.png", "-o", "in"), "would replace a file that is needed"),
        (("in/a.png", "-o", "in/a.png"), "would replace a file that is needed"),
        (("nowhere", "-o", "out"), "nowhere"),
        (("masks_only", "-o", "out"), "no images in"),
        (("in", "-o", "out", "--masks", "masks/a.png"), "one mask file for 5 images"),
        (("in/a.png", "-o", "out", "--masks", "no/masks"), "no such mask"),
        (("in/a.png", "-o", "out", "--whole-image", "--box", "1,2,3,4"), "one kind of prompt"),
        (("in/a.png", "-o", "out", "--box", "30,5,5,30"), "box [30.0, 5.0, 5.0, 30.0]: needs x0 < x1"),
        (("in/a.png", "-o", "out", "--ignore-labels", "1"), "--ignore-labels needs --labels"),
        (("in/a.png", "-o", "out", "--quality", "80"), "--quality 80 is for --format jpeg"),
        (("in/a.png", "-o", "out", "--epsilon", "300"), "from 0 to 255"),
        (("in/a.png", "-o", "out", "--epsilon", "4", "--epsilon-background", "5"), "above --epsilon 4"),
        (("in/a.png", "-o", "out", "--epsilon", "4", "--strength", "low"), "pass one"),
        (("in/a.png", "-o", "out", "--labels"), "needs --masks"),
        (("in", "-o", "out.png"), "one file for 5 images"),
        (("in/a.png", "-o", "a.gif"), "cannot write .gif"),
        (("in/a.png", "-o", "out", "--quality", "0"), "--quality 0"),
        (("in/a.png", "-o", "out", "--epsilon-background", "5"), "needs --epsilon"),
        (("in/a.png", "-o", "out", "--device", "abacus"), "does not load on 'abacus'"),
        (("in/a.png", "-o", "masks", "--masks", "masks/a.png"), "would replace a file that is needed"),
        (("in/a.png", "-o", "out", "--json", "in/a.png"), "--json in/a.png would replace"),
        (("in/a.png", "-o", "out", "--json", "out"), "--json out would replace a file that is needed"),
        (("in/a.png", "-o", "out", "--whole-image", "--per-segment"), "needs several masks"),
        (("in/a.png", "-o", "a.jpg"), "--format jpeg"),
        (("in/a.png", "-o", "a.png", "--format", "webp"), "name it a.webp"),
    ],
)
def test_requests_that_make_no_sense_write_nothing(folder, saved_generator, capsys, monkeypatch, arguments, message):
    monkeypatch.chdir(folder)
    os.makedirs("masks_only")
    os.makedirs("twin")
    Image.fromarray(photo()).save("twin/a.jpg")
    before = sorted(folder.rglob("*"))
    original = (folder / "in/a.png").read_bytes()
    assert run("protect", *arguments, "--model", saved_generator) in (1, 2)
    assert message in capsys.readouterr().err
    assert sorted(folder.rglob("*")) == before
    assert (folder / "in/a.png").read_bytes() == original


def test_a_box_that_is_no_box_is_refused_by_the_parser(folder, capsys):
    with pytest.raises(SystemExit) as error:
        run("protect", folder / "in/a.png", "-o", folder / "out", "--box", "1,2,three")
    assert error.value.code == 2
    assert "'1,2,three' is not 4 numbers" in capsys.readouterr().err


@pytest.mark.parametrize("option", ["input", "-o", "--masks", "--json"])
def test_an_empty_path_is_not_the_folder_here(option, folder, capsys):
    rest = () if option == "input" else (folder / "in/a.png", option)
    with pytest.raises(SystemExit):
        run("protect", *rest, "", *(() if option == "-o" else ("-o", folder / "out")))
    assert "it is empty" in capsys.readouterr().err
    assert not (folder / "out").exists()


def test_the_report_of_a_run_that_is_killed_has_what_was_done(folder, saved_generator, monkeypatch):
    monkeypatch.setattr("unseg_hf.protect_command.WRITE_EVERY", 0)
    seen, write = [], image_files.put_in_place

    def look(data, target):
        write(data, target)
        if target.name == "r.json":
            seen.append(len(json.loads(target.read_text())["images"]))

    monkeypatch.setattr(image_files, "put_in_place", look)
    run("protect", folder / "in", "-o", folder / "out", "--whole-image", "--model", saved_generator,
        "--json", folder / "r.json")  # fmt: skip
    assert seen == [0, 1, 2, 3, 4, 5, 5]


def test_a_path_that_cannot_be_read_is_said_with_what_to_check(folder, capsys):
    assert run("verify", folder / "in/a.png") == 2
    assert capsys.readouterr().err.endswith(
        "in/a.png/settings.json: Not a directory; check the path and your permissions\n"
    )


def test_inspect_measures_and_draws(folder, saved_generator, capsys):
    run("protect", folder / "in/a.png", "-o", folder / "out", "--masks", folder / "masks/a.png",
        "--model", saved_generator)  # fmt: skip
    capsys.readouterr()
    pair = (folder / "in/a.png", folder / "out/a.png", "--mask", folder / "masks/a.png")
    assert run("inspect", *pair, "--picture", folder / "look.png") == 0
    assert "after JPEG 75" in capsys.readouterr().out
    assert Image.open(folder / "look.png").width > 3 * 64
    Image.fromarray(np.full_like(mask(), 255)).save(folder / "all.png")
    assert run("inspect", *pair[:2], "--mask", folder / "all.png") == 0
    assert "outside" not in capsys.readouterr().out  # there is nothing
    assert run("inspect", *pair, "--json") == 0
    figures = json.loads(capsys.readouterr().out)
    difference = np.abs(np.asarray(Image.open(folder / "out/a.png")).astype(int) - photo())
    assert figures["max_noise"] == difference[mask() > 0].max()
    Image.open(folder / "out/a.png").resize((32, 24)).save(folder / "site.jpg", quality=90)
    assert run("inspect", *pair, "--published", folder / "site.jpg", "--json") == 0
    left = json.loads(capsys.readouterr().out)["left_as_published"]
    assert run("inspect", *pair, "--published", folder / "site.jpg") == 0
    assert f"as published    {left:.0%} of the noise is left" in capsys.readouterr().out
    assert run("inspect", *pair, "--published", folder / "look.png", "--picture", folder / "look.png") == 2
    assert "would replace a file that is needed" in capsys.readouterr().err
    assert run("inspect", *pair, "--picture", folder / "in/a.png") == 2
    assert "would replace a file that is needed" in capsys.readouterr().err
    assert run("inspect", folder / "in/a.png", folder / "look.png") == 2
    assert "at the same size" in capsys.readouterr().err


def test_inspect_compares_folders_by_name_and_names_what_is_missing(folder, saved_generator, capsys):
    photos = folder / "photos"
    (photos / "sub").mkdir(parents=True)
    for name in ("a.jpg", "a.png", "sub/b.jpg"):  # beside another `a` both keep their own suffix
        Image.fromarray(photo()).save(photos / name)
    assert run("protect", photos, "-o", folder / "out", "--whole-image", "--model", saved_generator) == 0
    (folder / "site/sub").mkdir(parents=True)
    Image.open(folder / "out/sub/b.png").save(folder / "site/sub/b.jpg", quality=95)
    capsys.readouterr()
    folders = (photos, folder / "out")
    assert run("inspect", *folders, "--published", folder / "site", "--json") == 0
    lines = json.loads(capsys.readouterr().out)["images"]
    found = [(Path(line.pop("image")), Path(line.pop("protected"))) for line in lines]
    assert found == [
        (photos / name, folder / "out" / output)
        for name, output in (("a.jpg", "a.jpg.png"), ("a.png", "a.png.png"), ("sub/b.jpg", "sub/b.png"))
    ]
    assert ["left_as_published" in line for line in lines] == [False, False, True]
    assert run("inspect", *found[1], "--json") == 0
    assert json.loads(capsys.readouterr().out) == lines[1]

    (folder / "out/a.jpg.png").unlink()
    Image.open(photos / "a.png").save(folder / "out/a.png.png")
    assert run("inspect", *folders, "--picture", folder / "look.png") == 1
    said = capsys.readouterr()
    assert f"{photos / 'a.jpg'}: there is no protected image of this name" in said.err
    assert f"{photos / 'a.png'}: max |noise| 0, no difference, SSIM 1.0000" in said.out
    for line in (
        f"1 images with noise, at most {lines[2]['max_noise']:g} of 255",
        "1 images as they were",
        "1 images failed",
    ):
        assert line in said.out
    assert Image.open(folder / "look.png").width > 2 * 2 * 160
    # Alone, the folder's images are looked at for the noise of the model.
    assert run("inspect", photos, "--model", saved_generator) == 0
    assert "0 of 3 images carry this generator's noise" in capsys.readouterr().out


def test_names_of_files_do_not_command_the_terminal(folder, saved_generator, capsys):
    odd = folder / "odd"
    odd.mkdir()
    for name in ("a\x1b]0;title\x07.png", "b\r\n2 protected.png"):
        (odd / name).write_bytes(b"no image")
    Image.fromarray(photo()).save(odd / "c\x1b[2J.png")
    assert run("protect", odd, "-o", folder / "out", "--whole-image", "--model", saved_generator) == 1
    assert run("inspect", odd, folder / "out", "--picture", folder / "look.png") == 1
    assert run("inspect", odd / "a\x1b]0;title\x07.png", "--model", saved_generator) == 2
    said = "".join(capsys.readouterr())
    assert not {"\x1b", "\x07", "\r"} & set(said)
    assert r"a\x1b]0;title\x07.png" in said
    assert r"c\x1b[2J.png: max |noise|" in said


def test_inspect_of_folders_does_not_mix_up_names(folder, capsys):
    for where, level in (("o", 0), ("p", 5)):
        (folder / where).mkdir()
        Image.fromarray(photo(1) + np.uint8(level)).save(folder / where / "a.png")
        Image.fromarray(photo(2) + np.uint8(level)).save(folder / where / "a.bmp")
    grey = np.full((30, 40), 30_000, np.uint16)
    Image.fromarray(grey).save(folder / "o/deep.png")
    Image.fromarray(grey + np.uint16(1)).save(folder / "p/deep.png")  # no change in 8 bits
    assert run("inspect", folder / "o", folder / "p") == 0
    said = capsys.readouterr().out
    assert said.count("max |noise| 5,") == 2
    assert "3 images with noise, at most 5 of 255" in said
    Image.fromarray(photo(1)).save(folder / "o/b.png")
    for suffix in ("webp", "tiff"):
        Image.fromarray(photo(1)).save(folder / f"p/b.{suffix}")
    assert run("inspect", folder / "o", folder / "p") == 2
    assert "are both called like b.png: keep one of them" in capsys.readouterr().err


def test_a_report_says_what_was_asked_and_not_where_it_lies():
    given = [
        "audit",
        "/home/me/a.parquet",
        "--masks=/home/me/m",
        "-o/home/me/out",
        "-o",
        "out",
        "a/b.png",
        "--box=1,2",
        "/",
    ]
    assert [cli._public(one) for one in given] == [
        "audit", "a.parquet", "--masks=m", "-oout", "-o", "out", "a/b.png", "--box=1,2", "/"
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("in", "in/a.png"), "in/a.png: name a folder, as in is one"),
        (("in/a.png", "in"), "in: name a file, as in/a.png is one"),
        (("in", "none"), "none: no such file or folder"),
        (("none", "in"), "none: no such file or folder"),
        (("in", "masks", "--published", "in/a.png"), "in/a.png: name a folder"),
        (("in", "--picture", "look.png"), "--picture: for originals and protected images"),
        (("empty", "in"), "no images in empty"),
        (("in", "masks", "--picture", "look.jpg"), "it is a PNG"),
    ],
)
def test_inspect_refuses_what_are_no_pairs(folder, monkeypatch, capsys, arguments, said):
    monkeypatch.chdir(folder)
    (folder / "empty").mkdir()
    assert run("inspect", *arguments) == 2
    assert said in capsys.readouterr().err


@pytest.mark.parametrize(
    "command", [[], ["protect"], ["inspect"], ["verify"], ["audit"], ["protect-dataset"], ["demo"]]
)
def test_help_does_not_wait_for_the_libraries_that_only_work_needs(command):
    program = """
import sys
from unseg_hf import cli
try:
    cli.main(sys.argv[1:])
finally:
    heavy = {"torch", "transformers", "datasets", "gradio", "numpy", "PIL"} & sys.modules.keys()
    print("loaded:", *sorted(heavy), file=sys.stderr)
"""
    done = subprocess.run(
        [sys.executable, "-c", program, *command, "--help"], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0
    assert "usage: unseg" in done.stdout
    assert done.stderr == "loaded:\n"


def test_the_version_is_said(capsys):
    with pytest.raises(SystemExit) as left:
        run("--version")
    assert left.value.code == 0
    assert capsys.readouterr().out == f"unseg-hf {unseg_hf.__version__}\n"


def test_the_installed_command_runs(folder, saved_generator):
    command = os.path.join(os.path.dirname(sys.executable), "unseg")
    done = subprocess.run(
        [command, "protect", folder / "in/a.png", "-o", folder / "out", "--whole-image", "--model", saved_generator],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert "PSNR" in done.stdout
    assert done.stderr == ""


def test_a_pipe_among_the_images_is_passed_over(folder, saved_generator):
    os.mkfifo(folder / "in/sub/pipe.png")
    assert run("protect", folder / "in/sub", "-o", folder / "out", "--whole-image", "--model", saved_generator) == 0
    assert [path.name for path in (folder / "out").iterdir()] == ["b.png"]


def test_what_was_done_is_said_also_where_the_report_cannot_be_written(folder, saved_generator, monkeypatch, capsys):
    put_in_place = image_files.put_in_place

    def full(data, target):
        if target.suffix == ".json" and (folder / "out").exists():
            raise image_files.ImageFileError("r.json: it cannot be written (no space left)")
        put_in_place(data, target)

    monkeypatch.setattr(image_files, "put_in_place", full)
    request = ("protect", folder / "in/sub", "-o", folder / "out", "--whole-image", "--model", saved_generator)
    assert run(*request, "--json", folder / "r.json") == 2
    said = capsys.readouterr()
    assert f"b.jpg -> {folder / 'out/b.png'}" in said.out
    assert "no space left" in said.err
