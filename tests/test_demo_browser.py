"""The demo in a real browser, as a user has it."""

import shutil
from pathlib import Path
from threading import Event

import numpy as np
import pytest
from PIL import Image

from unseg_hf import Protector, cli

CHROMIUM = shutil.which("chromium")
pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="no chromium here: apt-get install chromium")
COFFEE = Path(__file__).parents[1] / "spaces_demo" / "examples" / "coffee.png"
SIZES = {"desktop": {"width": 1280, "height": 900}, "phone": {"width": 390, "height": 844}}


@pytest.fixture(scope="module")
def browser(tmp_path_factory):
    from playwright.sync_api import sync_playwright

    arguments = ["--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run"]
    arguments += ["--disable-background-networking", "--disable-component-update", "--disable-sync"]
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=arguments)
        yield browser
        browser.close()


@pytest.fixture
def open_page(browser, demo_page):
    """A function: a new visitor's page; what its console complains of, and what it asks other servers, is noted."""
    contexts = []

    def open_one(theme="light", size="desktop"):
        context = browser.new_context(viewport=SIZES[size], accept_downloads=True)
        context.set_default_timeout(30_000)
        contexts.append(context)
        page = context.new_page()
        page.complaints = []
        page.on("console", lambda m: page.complaints.append(m.text) if m.type == "error" else None)
        page.on("pageerror", lambda error: page.complaints.append(str(error)))
        page.goto(f"{demo_page.local_url}?__theme={theme}")
        page.wait_for_selector("#upload input[type=file]", state="attached")
        return page

    yield open_one
    for context in contexts:
        context.close()


def upload(page, file: Path) -> None:
    page.set_input_files("#upload input[type=file]", file)
    page.wait_for_selector("#view img")


def click_at(page, x: float, y: float) -> None:
    """Click on the picture, at shares of its width and height, and wait for the answer."""
    picture = page.locator("#view img")
    before = picture.get_attribute("src")
    box = picture.bounding_box()
    picture.click(position={"x": box["width"] * x, "y": box["height"] * y})
    page.wait_for_function("before => document.querySelector('#view img').src != before", arg=before)


def hint(page, words: str) -> None:
    """Wait until the line that screen readers read out says this."""
    page.wait_for_function("words => document.querySelector('#hint').innerText.includes(words)", arg=words)


def choose(page, way: str) -> None:
    page.get_by_role("radio", name=way, exact=True).click()


def protect(page) -> None:
    page.locator("#protect").click()
    page.wait_for_function("() => document.querySelector('#download')?.closest('a, div')?.offsetParent !== null")
    page.wait_for_selector("#slider img")


def downloaded(page, folder: Path, button="#download") -> Path:
    with page.expect_download() as download:
        page.locator(button).click()
    target = folder / download.value.suggested_filename
    download.value.save_as(target)
    return target


def by_command(page, folder: Path, model: Path) -> bytes:
    """What the command that the page shows writes, in a folder with the photo (and the mask) in it."""
    import shlex

    page.get_by_role("button", name="The same on the command line").click()
    shown = page.locator(".cm-content").inner_text()
    words = shlex.split(shown.replace("\n", " "))
    assert words[0] == "unseg"
    assert words[words.index("--model") + 1] == str(model)
    paths = {2: folder / words[2], words.index("-o") + 1: folder / "by_command.png"}
    if "--masks" in words:
        at = words.index("--masks") + 1
        paths[at] = folder / words[at]
    assert cli.main([str(paths.get(i, word)) for i, word in enumerate(words)][1:]) == 0
    return (folder / "by_command.png").read_bytes()


def test_clicked_protected_and_downloaded_pixels_are_those_of_the_command_line(open_page, tmp_path, saved_generator):
    shutil.copy(COFFEE, tmp_path)
    page = open_page()
    upload(page, tmp_path / "coffee.png")
    choose(page, "Click on objects")
    hint(page, "further clicks")
    click_at(page, 0.5, 0.5)
    page.get_by_role("radio", name="not on it").click()
    click_at(page, 0.05, 0.05)
    protect(page)
    file = downloaded(page, tmp_path)
    assert file.name == "coffee_protected.png"
    assert file.read_bytes() == by_command(page, tmp_path, saved_generator)
    mask = np.asarray(Image.open(downloaded(page, tmp_path, "#mask-download")))
    noise = np.abs(np.asarray(Image.open(file)).astype(int) - np.asarray(Image.open(COFFEE)))
    assert noise[mask].max() <= 8
    assert noise.max() > 0
    assert page.complaints == []


@pytest.fixture
def waiting(monkeypatch):
    """Events: the protection of a photo has begun, and may go on."""
    from unseg_hf.demo.session import Workbench

    begun, go_on, protect_photo = Event(), Event(), Workbench.protect

    def slow(*arguments, **options):
        begun.set()
        go_on.wait(20)
        return protect_photo(*arguments, **options)

    monkeypatch.setattr(Workbench, "protect", slow)
    return begun, go_on


def test_it_says_that_it_works_and_when_it_is_done(open_page, waiting):
    begun, go_on = waiting
    page = open_page(size="phone")
    upload(page, COFFEE)
    choose(page, "Everything")
    hint(page, "whole photo")
    page.locator("#protect").click()
    page.wait_for_function("() => document.querySelector('#state').innerText.includes('Protecting')")
    assert page.locator("#protect").is_disabled()
    assert begun.wait(20)
    go_on.set()
    page.wait_for_selector("text=Protected. Compare it with the original")
    page.wait_for_selector("#slider img")
    assert page.locator("#state").inner_text().strip() == ""
    assert page.locator("#protect").is_enabled()
    # It has come into the window by itself.
    page.wait_for_function("() => document.querySelector('#result').getBoundingClientRect().top < innerHeight - 100")
    choose(page, "Click on objects")
    hint(page, "further clicks")
    page.locator("#protect").click()
    page.wait_for_selector("text=click on an object first")
    page.wait_for_function("() => !document.querySelector('#protect').disabled")
    assert page.locator("#state").inner_text().strip() == ""


def test_of_two_photos_chosen_one_after_the_other_the_last_is_opened(open_page, tmp_path, monkeypatch):
    from unseg_hf.demo.session import Workbench

    begun, go_on, open_photo = Event(), Event(), Workbench.open

    def slow(bench, path, name, original=None):
        if name.startswith("first"):
            begun.set()
            go_on.wait(20)
        return open_photo(bench, path, name, original)

    monkeypatch.setattr(Workbench, "open", slow)
    Image.new("RGB", (300, 500), "white").save(tmp_path / "first.png")
    page = open_page()
    page.set_input_files("#upload input[type=file]", tmp_path / "first.png")
    assert begun.wait(20)
    page.get_by_role("button", name="Or try: coffee").click()
    page.wait_for_timeout(1_000)
    go_on.set()
    page.wait_for_function(
        "() => { const image = document.querySelector('#view img');"
        "        return image && image.naturalWidth > image.naturalHeight; }"
    )
    choose(page, "Everything")
    hint(page, "whole photo")
    protect(page)
    assert downloaded(page, tmp_path).name == "coffee_protected.png"


def test_clicks_are_on_the_object_again_after_clear(open_page):
    page = open_page()
    upload(page, COFFEE)
    choose(page, "Click on objects")
    hint(page, "further clicks")
    page.get_by_role("radio", name="not on it").click()
    click_at(page, 0.5, 0.5)
    hint(page, "only clicks on what is not the object")
    page.get_by_role("button", name="Clear", exact=True).click()
    hint(page, "further clicks")
    assert page.get_by_role("radio", name="on the object", exact=True).is_checked()


def test_a_result_that_is_deleted_by_now_is_not_offered(browser, saved_generator, tmp_path, monkeypatch):
    from unseg_hf.demo.serving import launch_options, page_for
    from unseg_hf.demo.session import Limits

    monkeypatch.setenv("GRADIO_TEMP_DIR", str(tmp_path / "uploads"))
    limits = Limits(kept_seconds=12)
    served = page_for(str(saved_generator), "cpu", None, limits)
    served.launch(**launch_options(limits), prevent_thread_lock=True, quiet=True)
    try:
        page = browser.new_page()
        page.goto(served.local_url)
        upload(page, COFFEE)
        choose(page, "Everything")
        hint(page, "whole photo")
        protect(page)
        page.wait_for_timeout(8_000)
        protect(page)  # again: this one's time begins anew
        page.wait_for_timeout(6_500)
        assert page.locator("#download").is_visible()
        page.wait_for_selector("text=is deleted by now", timeout=30_000)
        assert not page.locator("#download").is_visible()
        page.close()
    finally:
        served.close()


def test_a_setting_that_is_changed_while_it_works_gives_no_result_and_leaves_no_file(open_page, waiting):
    from gradio.utils import get_upload_folder

    begun, go_on = waiting
    page = open_page()
    upload(page, COFFEE)
    choose(page, "Everything")
    hint(page, "whole photo")
    files = set(Path(get_upload_folder()).rglob("*"))
    page.locator("#protect").click()
    assert begun.wait(20)
    page.get_by_label("Keep EXIF").first.check()
    page.wait_for_timeout(1_000)
    go_on.set()
    page.wait_for_selector("text=a setting was changed meanwhile")
    assert not page.locator("#download").is_visible()
    assert set(Path(get_upload_folder()).rglob("*")) == files


def test_the_page_is_as_wide_as_the_window_and_typed_points_lie_in_the_photo(open_page):
    page = open_page(size="phone")
    for tab in ("About", "Several photos", "One photo"):
        page.get_by_role("tab", name=tab).click()
        assert page.evaluate("document.documentElement.scrollWidth") <= SIZES["phone"]["width"]
    upload(page, COFFEE)
    choose(page, "Click on objects")
    page.get_by_role("radio", name="not on it").click()
    page.get_by_role("button", name="Type coordinates instead of clicking").click()
    page.get_by_label("Pixels of the photo").fill("9999,9999")
    page.get_by_label("Pixels of the photo").press("Enter")
    page.wait_for_selector("text=point [9999.0, 9999.0] lies outside the image")


def test_the_picture_beside_the_original_is_the_download_itself(open_page, tmp_path):
    page = open_page()
    upload(page, COFFEE)
    choose(page, "Everything")
    hint(page, "whole photo")
    protect(page)
    file = downloaded(page, tmp_path)
    sources = page.locator("#slider img").evaluate_all("images => images.map(image => image.src)")
    shown = [page.request.get(source).body() for source in dict.fromkeys(sources)]
    assert file.read_bytes() in shown
    pixels = [np.asarray(Image.open(COFFEE))]
    original = next(data for data in shown if data != file.read_bytes())
    (tmp_path / "original").write_bytes(original)
    np.testing.assert_array_equal(np.asarray(Image.open(tmp_path / "original")), pixels[0])


def test_a_box_of_two_clicks_and_another_strength(open_page, tmp_path, saved_generator):
    shutil.copy(COFFEE, tmp_path)
    page = open_page(size="phone", theme="dark")
    upload(page, tmp_path / "coffee.png")
    hint(page, "one corner of a box")
    click_at(page, 0.8, 0.9)
    hint(page, "Now click on the opposite corner")
    click_at(page, 0.3, 0.3)
    page.get_by_role("radio", name="high (16)").first.click()
    protect(page)
    file = downloaded(page, tmp_path)
    assert file.read_bytes() == by_command(page, tmp_path, saved_generator)
    noise = np.abs(np.asarray(Image.open(file)).astype(int) - np.asarray(Image.open(COFFEE)))
    outside = np.ones(noise.shape[:2], bool)
    outside[int(0.29 * 400) : int(0.91 * 400), int(0.29 * 600) : int(0.81 * 600)] = False
    assert noise[outside].max() <= 4
    width = page.evaluate("() => document.documentElement.scrollWidth")
    assert width <= SIZES["phone"]["width"]


def test_what_is_brushed_is_protected(open_page, tmp_path, saved_generator):
    shutil.copy(COFFEE, tmp_path)
    page = open_page()
    upload(page, tmp_path / "coffee.png")
    choose(page, "Brush")
    canvas = page.locator("#brush canvas").first
    canvas.wait_for()
    page.wait_for_timeout(1_500)  # the editor draws its picture some time after it has one
    canvas.scroll_into_view_if_needed()
    box = canvas.bounding_box()
    page.mouse.move(box["x"] + box["width"] * 0.4, box["y"] + box["height"] * 0.5)
    page.mouse.down()
    page.mouse.move(box["x"] + box["width"] * 0.6, box["y"] + box["height"] * 0.5, steps=6)
    # A stroke hides what was protected before it; a slow page says so seconds later, and would hide the new result.
    with page.expect_response("**/run/predict*"):
        page.mouse.up()
    # A mask that is refused takes nothing away.
    Image.fromarray(np.zeros((10, 10), np.uint8)).save(tmp_path / "small.png")
    page.locator("div.block:has-text('or a mask file') input[type=file]").last.set_input_files(tmp_path / "small.png")
    hint(page, "this mask has 10 x 10 pixels")
    protect(page)
    file = downloaded(page, tmp_path)
    mask = np.asarray(Image.open(downloaded(page, tmp_path, "#mask-download")))
    assert mask.shape == (400, 600)
    assert 0.005 < mask.mean() < 0.3
    rows, columns = np.nonzero(mask)
    assert abs(rows.mean() - 200) < 40
    assert abs(columns.mean() - 300) < 40
    assert file.read_bytes() == by_command(page, tmp_path, saved_generator)
    # Strokes are kept while another way is looked at.
    choose(page, "Everything")
    hint(page, "The whole photo")
    choose(page, "Brush")
    hint(page, "Clear it to brush anew")
    protect(page)
    np.testing.assert_array_equal(np.asarray(Image.open(downloaded(page, tmp_path, "#mask-download"))), mask)


def test_a_mask_file_takes_the_place_of_the_brush(open_page, tmp_path, saved_generator):
    page = open_page()
    upload(page, COFFEE)
    choose(page, "Brush")
    mask_file = COFFEE.with_name("coffee_mask.png")
    page.wait_for_selector("text=or a mask file")
    chooser = page.locator("div.block:has-text('or a mask file') input[type=file]").last
    chooser.set_input_files(mask_file)
    hint(page, "1 object")
    protect(page)
    expected = Protector.from_pretrained(saved_generator).protect(COFFEE, mask=mask_file)
    got = np.asarray(Image.open(downloaded(page, tmp_path)))
    np.testing.assert_array_equal(got, np.asarray(expected.image))


def test_everything_but_brushing_works_from_the_keyboard(open_page, tmp_path, saved_generator):
    page = open_page()
    upload(page, COFFEE)
    page.get_by_role("radio", name="Click on objects").focus()
    page.keyboard.press("Space")
    hint(page, "further clicks")
    for key in ("Shift+Tab", "Shift+Tab", "Space"):
        page.keyboard.press(key)
    hint(page, "one corner of a box")
    page.get_by_role("button", name="Type coordinates instead of clicking").focus()
    page.keyboard.press("Enter")
    pixels = page.get_by_label("Pixels of the photo")
    pixels.fill("30,40,500,300")
    pixels.press("Enter")  # with the focus on it: what the page still redraws may take it away
    page.wait_for_function("() => !document.querySelector('#hint').innerText.includes('one corner')")
    page.locator("#protect").focus()
    page.keyboard.press("Enter")
    page.wait_for_selector("#slider img")
    page.locator("#download").focus()
    with page.expect_download() as download:
        page.keyboard.press("Enter")
    download.value.save_as(tmp_path / "protected.png")
    expected = Protector.from_pretrained(saved_generator).protect(COFFEE, boxes=[[30, 40, 500, 300]])
    np.testing.assert_array_equal(np.asarray(Image.open(tmp_path / "protected.png")), np.asarray(expected.image))


def test_every_control_has_a_name_for_screen_readers(open_page):
    page = open_page()
    upload(page, COFFEE)
    unnamed = page.evaluate("""() => [...document.querySelectorAll('button, input, textarea, img, canvas')]
        .filter(e => e.offsetParent !== null && e.type !== 'file')
        .filter(e => !(e.getAttribute('aria-label') || e.getAttribute('aria-labelledby') || e.alt || e.title
                       || e.innerText || (e.labels && e.labels.length && e.labels[0].innerText)
                       || e.querySelector('img[alt]:not([alt=""])')))
        .map(e => e.outerHTML.slice(0, 160))""")
    assert unnamed == []
    assert page.locator("[role=status]").count() >= 1


def test_a_bad_photo_gives_one_line_and_the_next_one_works(open_page, tmp_path):
    bad = tmp_path / "holiday.png"
    bad.write_bytes(COFFEE.read_bytes()[:5_000])
    page = open_page()
    page.set_input_files("#upload input[type=file]", bad)
    toast = page.locator(".toast-body")
    toast.wait_for()
    text = toast.inner_text()
    assert "holiday.png" in text
    assert "cut short" in text
    assert "Traceback" not in text
    assert page.locator("#protect").is_disabled()
    # The photo goes, why stays, until another one is there.
    page.wait_for_selector("#upload input[type=file]", state="attached")
    assert "cut short" in page.locator("#refused").inner_text()
    upload(page, COFFEE)
    assert not page.locator("#refused").is_visible()
    choose(page, "Everything")
    protect(page)


def test_two_visitors_do_not_see_each_others_photos(open_page, tmp_path):
    other = tmp_path / "other.png"
    Image.fromarray(np.asarray(Image.open(COFFEE))[::-1, :300].copy()).save(other)
    pages = [open_page(), open_page()]
    for page, file in zip(pages, (COFFEE, other), strict=True):
        upload(page, file)
    for page in pages:
        choose(page, "Everything")
    for page in pages:
        page.locator("#protect").click()
    sizes = []
    for page, name in zip(pages, ("coffee", "other"), strict=True):
        page.wait_for_selector("#slider img")
        file = downloaded(page, tmp_path)
        assert file.name == f"{name}_protected.png"
        sizes.append(Image.open(file).size)
    assert sizes == [(600, 400), (300, 400)]


def test_several_photos_come_back_in_one_zip(open_page, tmp_path, saved_generator):
    import io
    import zipfile

    good = [tmp_path / "a.png", tmp_path / "b.jpg"]
    for number, file in enumerate(good):
        Image.fromarray(np.asarray(Image.open(COFFEE))[: 100 + number]).save(file)
    (tmp_path / "c.png").write_bytes(b"no photo")
    page = open_page()
    page.get_by_role("tab", name="Several photos").click()
    page.locator("#batch-upload input[type=file]").set_input_files([*good, tmp_path / "c.png"])
    page.wait_for_selector("#batch-upload [aria-label='c.png']")
    page.locator("#batch-start").click()
    page.wait_for_selector("text=2 of 3 protected")
    assert "c.png: this is not an image" in page.locator("#batch-table").inner_text()
    assert page.locator("#batch-gallery").is_hidden()  # all of it was, which needs no picture
    with page.expect_download() as download:
        page.locator("#batch-zip a").first.click()
    download.value.save_as(tmp_path / "got.zip")
    with zipfile.ZipFile(tmp_path / "got.zip") as archive:
        assert set(archive.namelist()) == {"a_protected.png", "b_protected.png", "report.json"}
        for file in good:
            got = np.asarray(Image.open(io.BytesIO(archive.read(f"{file.stem}_protected.png"))))
            expected = Protector.from_pretrained(saved_generator).protect(file, whole_image=True)
            np.testing.assert_array_equal(got, np.asarray(expected.image))


def test_what_was_taken_for_the_objects_of_several_photos_can_be_seen(open_page, tmp_path):
    for name in ("a", "b"):
        Image.open(COFFEE).resize((120, 80)).save(tmp_path / f"{name}.png")
    page = open_page()
    page.get_by_role("tab", name="Several photos").click()
    page.locator("#batch-upload input[type=file]").set_input_files([tmp_path / "a.png", tmp_path / "b.png"])
    page.wait_for_selector("#batch-upload [aria-label='b.png']")
    page.get_by_label("Find objects").last.check()
    page.locator("#batch-start").click()
    page.wait_for_selector("text=2 of 2 protected")
    page.wait_for_selector("#batch-gallery img >> nth=1")
    titles = [page.locator("#batch-gallery img").nth(n).get_attribute("alt") for n in (0, 1)]
    assert [title.split(":")[0] for title in titles] == ["a.png", "b.png"]
    assert all(title.endswith("%") for title in titles)
    # Like the zip, they are of the settings that stand there.
    page.get_by_label("Keep EXIF").last.check()
    page.wait_for_selector("#batch-gallery", state="hidden")


def test_the_example_can_be_picked_and_the_about_page_says_what_is_known(open_page):
    page = open_page()
    page.get_by_role("button", name="Or try: coffee").click()
    page.wait_for_selector("#view img")
    page.get_by_role("tab", name="About").click()
    # The generator of these tests has no card.
    assert "has no model card" in page.locator("#card").inner_text()


def test_many_other_requests_leave_a_visitors_photo_where_it_is(open_page, demo_page):
    import httpx

    page = open_page()
    upload(page, COFFEE)
    for number in range(40):
        body = {"fn_index": 1, "data": [8], "session_hash": f"other{number}"}
        httpx.post(f"{demo_page.local_url}gradio_api/run/predict", json=body, timeout=30).raise_for_status()
    choose(page, "Everything")
    protect(page)


def test_a_result_goes_when_its_settings_change(open_page):
    page = open_page()
    upload(page, COFFEE)
    choose(page, "Everything")
    hint(page, "whole photo")
    result = page.locator("#report")

    def change_strength():
        page.get_by_role("radio", name="high (16)").first.click()

    def change_exif():
        page.get_by_label("Keep EXIF").first.click()

    def change_way():
        choose(page, "Click on objects")

    for change in (change_strength, change_exif, change_way):
        protect(page)
        result.wait_for(state="visible")
        change()
        result.wait_for(state="hidden")
    click_at(page, 0.5, 0.5)
    protect(page)
    result.wait_for(state="visible")
    click_at(page, 0.2, 0.2)
    result.wait_for(state="hidden")


def test_a_click_that_marks_nothing_leaves_the_result_and_clear_is_where_there_are_marks(open_page):
    page = open_page()
    upload(page, COFFEE)
    choose(page, "Everything")
    hint(page, "whole photo")
    protect(page)
    assert not page.get_by_role("button", name="Clear").first.is_visible()
    # Not its answer, which may come on the stream of what is looked at after protecting.
    with page.expect_response("**/queue/join*"):
        page.locator("#view img").click()
    page.wait_for_timeout(1_000)
    assert page.locator("#download").is_visible()
    choose(page, "Boxes, by two clicks")
    page.wait_for_selector("button:has-text('Clear'):visible")


def test_a_zip_stands_only_beside_the_settings_that_gave_it(open_page, waiting):
    begun, go_on = waiting
    page = open_page()
    page.get_by_role("tab", name="Several photos").click()
    page.locator("#batch-upload input[type=file]").set_input_files(COFFEE)
    page.wait_for_selector(f"#batch-upload [aria-label='{COFFEE.name}']")
    page.locator("#batch-start").click()
    assert begun.wait(20)
    page.get_by_label("Keep EXIF").last.check()
    page.wait_for_timeout(1_000)
    go_on.set()
    page.wait_for_selector("text=changed meanwhile: press Protect all again")
    assert "protected" not in page.locator("#batch-table").inner_text()


def test_a_tall_photo_fits_the_window_and_clicks_land_where_they_are(open_page, tmp_path):
    Image.fromarray(np.asarray(Image.open(COFFEE).resize((300, 1_200)))).save(tmp_path / "tall.png")
    page = open_page()
    upload(page, tmp_path / "tall.png")
    assert page.locator("#view img").bounding_box()["height"] <= 0.8 * SIZES["desktop"]["height"]
    choose(page, "Click on objects")
    hint(page, "further clicks")
    click_at(page, 0.5, 0.25)
    protect(page)
    page.get_by_role("button", name="The same on the command line").click()
    shown = page.locator(".cm-content")
    words = shown.inner_text().replace("\n", " ").split()
    (point,) = (word for word in words if word.startswith("--point="))
    x, y = map(int, point.partition("=")[2].split(","))
    assert abs(x - 150) < 8
    assert abs(y - 300) < 8
    assert shown.bounding_box()["height"] < 120
