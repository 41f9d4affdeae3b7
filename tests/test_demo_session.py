"""What the demo does with a photo, without a page."""

import io
import json
import pickle
import shlex
import time
import zipfile
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from unseg_hf import ImageFileError, Protector, default_checkpoint
from unseg_hf.demo.batch import protect_to_zip
from unseg_hf.demo.card import NO_CARD, read_card, results
from unseg_hf.demo.pictures import DETAIL, detail_window, marked, web_treatments
from unseg_hf.demo.session import VIEW_SIDE, Limits, Marks, Workbench, file_stem, percent, report_rows
from unseg_hf.demo.sessions import Session, Sessions
from unseg_hf.demo.texts import found, nothing_marked, typed_marks
from unseg_hf.inputs import Prompt
from unseg_hf.protection import WHOLE_BOX

COFFEE = Path(__file__).parents[1] / "spaces_demo" / "examples" / "coffee.png"


@pytest.fixture
def bench(protector_of) -> Workbench:
    return Workbench(protector_of(), Limits(file_bytes=2**20, pixels=4_000_000, photos=3, batch_bytes=2**21))


@pytest.fixture
def coffee(bench):
    return bench.open(COFFEE, "coffee.png")


def test_a_click_answers_in_well_under_a_second_with_the_embedded_default():
    bench = Workbench(Protector.from_pretrained(), Limits())
    photo = bench.open(COFFEE, "coffee.png")
    encode = bench.protector.encode
    bench.protector.encode = None  # a click that encodes again fails
    bench.find_masks(photo, Prompt(points=[[300, 200]]))
    start = time.perf_counter()
    marks = Marks("points").clicked(300, 200, 1)
    masks, _ = bench.find_masks(photo, marks.prompt())
    marked(photo, marks, masks)
    assert time.perf_counter() - start < 0.8
    bench.protector.encode = encode


def test_the_sessions_not_used_for_longest_go_and_a_dropped_one_does_not_come_back(coffee):
    sessions = Sessions(2, seconds=100)
    sent = [Session(coffee, Marks(way)) for way in ("points", "boxes", "whole")]
    first, second = sessions.add(sent[0]), sessions.add(sent[1])
    assert sessions.find(first) is sent[0]
    third = sessions.add(sent[2])
    assert [sessions.find(key) for key in (first, second, third)] == [sent[0], None, sent[2]]
    assert sessions.replace(first, sent[1])
    assert sessions.find(first) is sent[1]
    sessions.drop(first)
    assert not sessions.replace(first, sent[0])
    assert sessions.find(first) is None
    assert sessions.find(None) is None


def test_sessions_that_nobody_uses_go_and_so_does_what_is_noted_of_them(coffee):
    sessions = Sessions(5, seconds=0.3)
    used, forgotten = (sessions.add(Session(coffee, Marks())) for _ in range(2))
    for _ in range(4):
        time.sleep(0.1)
        assert sessions.find(used)
    sessions.forget_old()
    assert sessions.find(used)
    assert sessions.find(forgotten) is None
    assert sessions.settings(used) is None
    for key in (used, forgotten, None):
        sessions.note(key, (8, True))
    assert [sessions.settings(key) for key in (used, forgotten, None)] == [(8, True), None, None]
    sessions.drop(used)
    assert sessions.settings(used) is None


def test_marks_become_the_prompt_and_the_arguments_of_the_command_line():
    points = Marks("points").clicked(5, 6, 0)
    assert points.prompt() is None
    points = points.clicked(7, 8, 1)
    assert (points.prompt().points, points.prompt().point_labels) == ([[5, 6], [7, 8]], [0, 1])
    assert points.arguments("m.png") == ["--point=5,6,0", "--point=7,8"]
    boxes = Marks("boxes").clicked(9, 2, 1)
    assert boxes.corner == (9, 2)
    assert boxes.prompt() is None
    boxes = boxes.clicked(3, 8, 1)
    assert boxes.boxes == ((3, 2, 10, 9),)
    assert boxes.arguments("m.png") == ["--box=3,2,10,9"]
    drawn = Marks("brush", drawn=np.ones((2, 2), bool))
    assert drawn.prompt().mask is drawn.drawn
    assert drawn.arguments("m.png") == ["--masks", "m.png"]
    assert Marks("whole").prompt().whole_image
    assert Marks("whole").arguments("m.png") == ["--whole-image"]
    assert vars(Marks("objects").prompt()) == vars(Prompt())
    assert Marks("objects").arguments("m.png") == []


def test_undo_takes_back_one_thing_and_clear_all():
    marks = Marks("boxes").clicked(1, 1, 1).clicked(4, 4, 1).clicked(6, 6, 1)
    assert marks.undone() == Marks("boxes", boxes=((1, 1, 5, 5),))
    assert marks.undone().undone() == Marks("boxes")
    assert Marks("boxes").undone() == Marks("boxes")
    assert marks.cleared() == Marks("boxes")
    # What is marked in another way stays.
    other = replace(marks, way="objects")
    assert other.cleared() == other.undone() == other
    assert Marks("points", points=((1, 1, 1), (2, 2, 1))).undone().points == ((1, 1, 1),)


def test_every_pixel_of_the_view_belongs_to_a_pixel_of_the_photo(bench, tmp_path):
    Image.new("L", (3_000, 500), 90).save(tmp_path / "wide.png")
    photo = bench.open(tmp_path / "wide.png", "wide.png")
    assert photo.view.size == (VIEW_SIDE, round(500 * VIEW_SIDE / 3_000))
    assert photo.from_view(0, 0) == (1, 1)
    assert photo.from_view(VIEW_SIDE - 1, photo.view.height - 1) == (2_998, 498)
    assert photo.from_view(10**9, -5) == (2_999, 0)
    brushed = np.zeros(photo.view.size[::-1], bool)
    brushed[:, : VIEW_SIDE // 2] = True
    full = photo.mask_from_view(brushed)
    assert full.shape == (500, 3_000)
    assert (full[:, :1_500].all(), full[:, 1_501:].any()) == (True, False)


def test_masks_are_coloured_and_clicks_are_signs(coffee):
    mask = np.zeros((400, 600), bool)
    mask[100:200, 100:300] = True
    marks = Marks("points").clicked(450, 300, 1)
    before, after = np.asarray(coffee.view).astype(int), np.asarray(marked(coffee, marks, [mask])).astype(int)
    changed = np.abs(after - before).max(axis=2) > 5
    assert changed[105:195, 105:295].mean() > 0.95
    assert changed[300, 450]
    assert not changed[:90].any()
    assert not changed[350:, :300].any()


@pytest.mark.parametrize(
    ("text", "way", "words"),
    [
        ("12", "points", "x,y"),
        ("a,b", "points", "x,y"),
        ("1e999,2", "points", "x,y"),
        ("1,2", "boxes", "left,top,right,bottom"),
        ("9,9,2,2", "boxes", "left must be smaller than right"),
        ("1,2", "whole", "choose one of them first"),
        ("<img src=x onerror=alert(1)>", "points", "&lt;img"),
    ],
)
def test_typed_coordinates_that_make_no_sense_are_named(text, way, words):
    with pytest.raises(ValueError, match=words):
        typed_marks(text, Marks(way), 1)


def test_typed_coordinates_mark_the_same_as_clicks():
    assert typed_marks(" 12, 34 ", Marks("points"), 0) == Marks("points").clicked(12, 34, 0)
    assert typed_marks("1,2,30,40", Marks("boxes"), 1).boxes == ((1, 2, 30, 40),)


def test_the_line_under_the_ways_says_what_was_found():
    half = np.zeros((4, 4), bool)
    half[:2] = True
    assert found(Marks("points", points=((0, 0, 1),)), [half], []) == "1 object, 50% of the photo."
    advice = " Not right? Mark boxes, or brush."
    assert found(Marks("objects"), [half, ~half], []) == f"2 objects, 100% of the photo.{advice}"
    said = found(Marks("boxes", boxes=((0, 0, 1, 1),)), [half], [WHOLE_BOX] * 2)
    assert said == "1 box, 50% of the photo."
    said = found(Marks("points", points=((3, 4, 0),)), [], [])
    assert said.startswith("So far there are only clicks on what is not the object")
    assert nothing_marked(Marks("points", points=((3, 4, 0),))) == said
    assert nothing_marked(Marks("points")) == "nothing is marked yet: click on an object first"
    said = found(Marks("objects"), [half | ~half], ["none found"])
    assert said == "None found. That hardly protects: draw a box, or brush over it."
    assert found(Marks("objects"), [half], ["not sure"]) == "Not sure."
    assert "opposite" in found(Marks("boxes", corner=(1, 1)), [], [])


@pytest.mark.parametrize(
    ("limits", "words"),
    [
        (Limits(file_bytes=1_000), "coffee.png: 0 MB, and at most 0 MB"),
        (Limits(pixels=1_000), "600 x 400 is more than 1000 pixels"),
        (Limits(side=500), "no side may be above 500 pixels"),
    ],
)
def test_a_photo_above_a_limit_is_refused_by_name(protector_of, limits, words):
    with pytest.raises(ImageFileError, match=words) as caught:
        Workbench(protector_of(), limits).open(COFFEE, "coffee.png")
    assert str(COFFEE.parent) not in str(caught.value)


def test_the_work_goes_through_the_accelerator_as_through_another_process(protector_of):
    calls = []

    def elsewhere(function):
        def call(*arguments):
            calls.append(function.__name__)
            return pickle.loads(pickle.dumps(function(*pickle.loads(pickle.dumps(arguments)))))

        return call

    bench = Workbench(protector_of(), Limits(), on_accelerator=elsewhere)
    photo = bench.open(COFFEE, "coffee.png")
    bench.find_masks(photo, Prompt(points=[[300, 200]]))
    protected = bench.protect(photo, Prompt(boxes=[[10, 10, 300, 300]]))
    assert [name.strip("_") for name in calls] == ["encode", "find_masks", "decode"]
    expected = protector_of().protect(COFFEE, boxes=[[10, 10, 300, 300]])
    np.testing.assert_array_equal(protected.picture.pixels, expected.picture.pixels)


def test_web_sites_leave_what_they_leave(bench, coffee):
    protected = bench.protect(coffee, Prompt(whole_image=True), 16)
    shares = {title: share for _, title, share in web_treatments(protected)}
    assert set(shares) == {"JPEG 75", "half size", "greyscale"}
    # The tiny generator's noise is colour and coarse: small pictures keep more of it than grey ones.
    assert all(share < 1.1 for share in shares.values())
    assert shares["half size"] > shares["greyscale"]
    for image, _, _ in web_treatments(protected):
        assert image.size == (DETAIL, 400)
    untouched = bench.protect(coffee, Prompt(whole_image=True), 0)
    assert all(share is None for _, _, share in web_treatments(untouched))


def test_the_detail_is_where_the_mask_is(bench, tmp_path):
    Image.new("RGB", (1_500, 900), (90, 120, 60)).save(tmp_path / "a.png")
    photo = bench.open(tmp_path / "a.png", "a.png")
    protected = bench.protect(photo, Prompt(mask=_corner(900, 1_500)))
    rows, columns = detail_window(protected)
    assert protected.region[rows, columns].shape == (DETAIL, DETAIL)
    assert protected.region[rows, columns].sum() == protected.region.sum()


def _corner(height, width):
    mask = np.zeros((height, width), bool)
    mask[-100:, -80:] = True
    return mask


def _deep(folder):
    pixels = np.random.default_rng(0).integers(0, 2**16, (40, 50), dtype=np.uint16)
    Image.fromarray(pixels).save(folder / "deep.png")
    return folder / "deep.png"


@pytest.mark.parametrize(
    ("share", "words"), [(0, "0%"), (0.001, "under 1%"), (0.4, "40%"), (0.999, "over 99%"), (1, "100%")]
)
def test_a_little_is_not_nothing(share, words):
    assert percent(share) == words


def test_the_report_names_the_bound_and_leaves_out_what_is_not_there(bench, coffee, tmp_path):
    part = bench.protect(coffee, Prompt(boxes=[[0, 0, 100, 100]]), 12)
    rows = dict(report_rows(part, part.report))
    assert "bound: 12" in rows["Largest change where protected"]
    assert "bound: 3" in rows["Largest change elsewhere"]
    deep = bench.open(_deep(tmp_path), "deep.png")
    protected = bench.protect(deep, Prompt(whole_image=True), 2.5)
    assert "(bound: 2.498)" in dict(report_rows(protected, protected.report))["Largest change where protected"]
    everything = bench.protect(coffee, Prompt(whole_image=True))
    assert "Largest change elsewhere" not in dict(report_rows(everything, everything.report))


@pytest.mark.parametrize(
    ("name", "stem"),
    [
        ("../../etc/passwd", "passwd"),
        ("C:\\photos\\me.jpg", "me"),
        ("two words; $(rm -rf).png", "two_words_rm_-rf"),
        ("...png", "photo"),
        ("", "photo"),
        ("x" * 300 + ".png", "x" * 60),
        ("<b>.png", "b"),
        ("写真.jpg", "写真"),
        (
            "\N{DEVANAGARI LETTER PHA}\N{DEVANAGARI VOWEL SIGN O}.jpg",
            "\N{DEVANAGARI LETTER PHA}\N{DEVANAGARI VOWEL SIGN O}",
        ),
        ("Cafe\N{COMBINING ACUTE ACCENT}.jpg", "Caf\N{LATIN SMALL LETTER E WITH ACUTE}"),
    ],
)
def test_file_names_are_harmless(name, stem):
    assert file_stem(name) == stem


def test_the_command_names_the_photo_as_its_user_has_it(bench):
    for original in ("two words; $(id) & more.png", "-o.png", "it's.png"):
        photo = bench.open(COFFEE, "photo.png", original)
        words = shlex.split(bench.command(photo, Marks("whole"), 8))
        assert Path(words[2]) == Path(original)
        assert not words[2].startswith("-")
        assert words[3:5] == ["-o", "photo_protected.png"]


def test_a_zip_holds_every_good_photo_and_says_what_was_wrong_with_the_others(bench, tmp_path):
    small = Image.open(COFFEE).crop((0, 0, 80, 60))
    for folder in ("x", "y"):
        (tmp_path / folder).mkdir()
        small.save(tmp_path / folder / "A.png")
    (tmp_path / "cut.png").write_bytes(COFFEE.read_bytes()[:999])
    uploads = [(tmp_path / "x/A.png", "A.png"), (tmp_path / "cut.png", "cut.png"), (tmp_path / "y/A.png", "a.png")]
    steps, shown = [], []
    entries = protect_to_zip(
        bench, uploads, tmp_path / "out.zip", Prompt(whole_image=True), 8,
        on_progress=lambda *step: steps.append(step),
        on_protected=lambda photo, protected: shown.append((photo.name, protected.report)),
    )  # fmt: skip
    assert [entry["status"] for entry in entries] == ["protected", "failed", "protected"]
    assert "cut.png" in entries[1]["error"]
    assert str(tmp_path) not in json.dumps(entries)
    assert steps == [(0, 3, "A.png"), (1, 3, "cut.png"), (2, 3, "a.png"), (3, 3, "")]
    assert shown == [("A.png", entries[0]["report"]), ("a.png", entries[2]["report"])]
    with zipfile.ZipFile(tmp_path / "out.zip") as archive:
        assert archive.namelist() == ["A_protected.png", "a_protected_2.png", "report.json"]
        assert json.loads(archive.read("report.json"))["images"] == entries
        got = np.asarray(Image.open(io.BytesIO(archive.read("A_protected.png"))))
    expected = bench.protector.protect(small, whole_image=True)
    np.testing.assert_array_equal(got, np.asarray(expected.image))


def test_a_batch_above_a_limit_or_without_a_good_photo_leaves_no_zip(bench, tmp_path):
    (tmp_path / "cut.png").write_bytes(COFFEE.read_bytes()[:999])
    bad = (tmp_path / "cut.png", "cut.png")
    with pytest.raises(ValueError, match="4 photos: at most 3"):
        protect_to_zip(bench, [bad] * 4, tmp_path / "out.zip", Prompt())
    (tmp_path / "large.png").write_bytes(bytes(2**21 + 1))
    with pytest.raises(ValueError, match="at most 2 MB at once"):
        protect_to_zip(bench, [(tmp_path / "large.png", "large.png")], tmp_path / "out.zip", Prompt())
    assert protect_to_zip(bench, [bad], tmp_path / "out.zip", Prompt())[0]["status"] == "failed"
    (gone,) = protect_to_zip(bench, [(tmp_path / "gone.png", "gone.png")], tmp_path / "out.zip", Prompt())
    assert "gone.png: it was forgotten after a while" in gone["error"]
    assert not (tmp_path / "out.zip").exists()


def test_the_about_page_shows_the_measured_tables_of_the_embedded_card():
    card = read_card(default_checkpoint())
    shown = results(card)
    tables = [line for line in card.splitlines() if line.startswith("|")]
    assert len(tables) >= 8
    assert all(line in shown for line in tables)
    assert "## Limits" in shown
    assert "```" not in shown
    assert "pipeline_tag" not in shown


def test_commands_leave_the_card_with_the_sentence_that_announces_them():
    commands = "```bash\nunseg audit a\n```"
    card = f"## Limits\n\nIt is 0.2. The commands, whose figures\nlie in `docs`:\n\n{commands}\n\nMore.\n"
    assert results(card) == "## Limits\n\nIt is 0.2.\n\nMore."
    assert results(f"## Limits\n\nSo:\n\n- a\n\n{commands}\n") == "## Limits\n\nSo:\n\n- a"


def test_a_card_of_another_kind_is_shown_whole_and_none_is_said(tmp_path):
    assert results(read_card(tmp_path)) == NO_CARD
    (tmp_path / "README.md").write_text("---\nlicense: mit\n---\n# Mine\n\nIt is good.\n\n## Use\n\nYes.\n")
    assert results(read_card(tmp_path)) == "# Mine\n\nIt is good.\n\n## Use\n\nYes."
