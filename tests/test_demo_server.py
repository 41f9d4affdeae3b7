"""The running demo, asked by gradio_client and by hand."""

import io
import json
import re
import struct
import threading
import zlib
from pathlib import Path

import httpx
import numpy as np
import pytest
from gradio_client import Client, handle_file
from gradio_client.exceptions import AppError
from PIL import ExifTags, Image

from unseg_hf import cli
from unseg_hf.demo import components


def photo(height=48, width=64, seed=0) -> Image.Image:
    rng = np.random.default_rng(seed)
    y, x = np.mgrid[:height, :width]
    pixels = np.stack([90 + y, 60 + x, 200 - x], axis=-1) % 230 + rng.integers(0, 25, (height, width, 1))
    return Image.fromarray(pixels.astype(np.uint8))


def saved(image: Image.Image, file_format="PNG", **options) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, file_format, **options)
    return buffer.getvalue()


def png_saying(width: int, height: int) -> bytes:
    """A small PNG file whose header promises a picture of this size."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0)
    return (
        b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(bytes(999))) + chunk(b"IEND", b"")
    )


def a_bomb() -> bytes:
    """64 million white pixels in 80 kB."""
    return saved(Image.new("1", (8_000, 8_000), 1), "PNG", compress_level=9)


PNG, JPEG = saved(photo()), saved(photo(), "JPEG")
FRAMES = [photo(seed=seed) for seed in range(3)]
BAD_UPLOADS = {
    "empty.png": b"",
    "one_byte.png": b"\x89",
    "text.jpg": b"hello, this is no photo",
    "page.png": b"<html><script>alert(1)</script></html>",
    "drawing.svg": b'<svg xmlns="http://www.w3.org/2000/svg"><image href="file:///etc/passwd"/></svg>',
    "drawing.png": b'<?xml version="1.0"?><!DOCTYPE s [<!ENTITY x SYSTEM "file:///etc/passwd">]><svg>&x;</svg>',
    "archive.png": b"PK\x03\x04" + bytes(500),
    "program.jpg": b"\x7fELF" + bytes(500),
    "document.png": b"%PDF-1.7\n" + bytes(500),
    "script.eps": b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 10 10\n(x) run\n",
    "sound.webp": b"RIFF\x24\x00\x00\x00WAVEfmt " + bytes(40),
    "zeros.png": bytes(2_000),
    "noise.jpg": np.random.default_rng(0).bytes(5_000),
    "cut.png": PNG[:-200],
    "cut_header.png": PNG[:20],
    "cut.jpg": JPEG[:-300],
    "cut_header.jpg": JPEG[:30],
    "cut.webp": saved(photo(), "WEBP", lossless=True)[:-500],
    "cut.tif": saved(photo(), "TIFF")[:-3_000],
    "cut.gif": saved(photo(), "GIF")[:-800],
    "flipped_bits.png": PNG[:200] + bytes(b ^ 255 for b in PNG[200:400]) + PNG[400:],
    "bomb.png": a_bomb(),
    "says_two_gigapixels.png": png_saying(50_000, 40_000),
    "says_four_billion_wide.png": png_saying(2**31 - 1, 2**31 - 1),
    "no_width.png": png_saying(0, 10),
    "short_data.png": png_saying(900, 900),
    "long.png": saved(Image.new("L", (6_000, 2))),
    "big.png": saved(Image.new("L", (1_001, 1_000))),
    "moving.gif": saved(FRAMES[0], "GIF", save_all=True, append_images=FRAMES[1:]),
    "moving.png": saved(FRAMES[0], "PNG", save_all=True, append_images=FRAMES[1:]),
    "moving.webp": saved(FRAMES[0], "WEBP", save_all=True, append_images=FRAMES[1:]),
    "pages.tif": saved(FRAMES[0], "TIFF", save_all=True, append_images=FRAMES[1:]),
    "floats.tif": saved(Image.fromarray(np.full((20, 20), 0.5, np.float32)), "TIFF"),
}
FILE_INPUTS = ("image", "file")
ODD_UPLOADS = {
    "sixteen_bits.png": saved(Image.fromarray(np.arange(48 * 64, dtype=np.uint16).reshape(48, 64) * 20)),
    "palette.gif": saved(photo(), "GIF"),
    "print.jpg": saved(photo().convert("CMYK"), "JPEG"),
    "see_through.png": saved(Image.merge("RGBA", (*photo().split(), Image.new("L", (64, 48), 120)))),
    "one_pixel.png": saved(photo(1, 1)),
    "a_line.png": saved(photo(1, 900)),
    "really_a_png.jpg": PNG,
    "no_suffix": PNG,
    "two words; $(id) & more.png": PNG,
    "ünïcode 写真.png": PNG,
    "<img src=x onerror=alert(1)>.png": PNG,
}


@pytest.fixture(scope="module")
def url(demo_page):
    return demo_page.local_url.rstrip("/")


@pytest.fixture(scope="module")
def client(url, tmp_path_factory):
    return Client(url, verbose=False, download_files=str(tmp_path_factory.mktemp("downloads")))


@pytest.fixture
def photo_file(tmp_path) -> Path:
    file = tmp_path / "photo.png"
    file.write_bytes(PNG)
    return file


def written_by_the_command_line(source: Path, model: Path, *options) -> bytes:
    target = source.with_name("by_command.png")
    assert cli.main(["protect", str(source), "-o", str(target), "--model", str(model), *map(str, options)]) == 0
    return target.read_bytes()


@pytest.mark.parametrize(
    ("request_", "options"),
    [
        ({"whole_image": True}, ["--whole-image"]),
        ({"boxes": [[5, 6, 40, 30], [50, 2, 60, 20]]}, ["--box", "5,6,40,30", "--box", "50,2,60,20"]),
        ({"points": [[20, 20], [60, 3, 0]]}, ["--point", "20,20", "--point", "60,3,0"]),
        ({}, []),
        ({"whole_image": True, "epsilon": 12.5}, ["--whole-image", "--epsilon", "12.5"]),
        (
            {"boxes": [[5, 6, 40, 30]], "epsilon": 16, "epsilon_background": 0},
            ["--box", "5,6,40,30", "--epsilon", "16", "--epsilon-background", "0"],
        ),
    ],
)
def test_the_download_is_byte_for_byte_what_the_command_line_writes(
    client, photo_file, saved_generator, request_, options
):
    protected, _, report = client.predict(image=handle_file(photo_file), **request_, api_name="/protect")
    assert Path(protected).read_bytes() == written_by_the_command_line(photo_file, saved_generator, *options)
    assert report["max_noise"] <= request_.get("epsilon", 8)


def test_a_mask_file_counts_as_on_the_command_line(client, photo_file, saved_generator, tmp_path):
    drawn = np.zeros((48, 64), np.uint8)
    drawn[10:30, 20:50] = 1
    mask = tmp_path / "mask.png"
    Image.fromarray(drawn).save(mask)
    protected, region, _ = client.predict(image=handle_file(photo_file), mask=handle_file(mask), api_name="/protect")
    expected = written_by_the_command_line(photo_file, saved_generator, "--masks", mask)
    assert Path(protected).read_bytes() == expected
    np.testing.assert_array_equal(np.asarray(Image.open(region)), drawn != 0)


def test_place_and_camera_leave_the_photo_unless_they_are_asked_for(client, saved_generator, tmp_path):
    exif = Image.Exif()
    exif[ExifTags.Base.Make] = "Camera"
    exif[ExifTags.IFD.GPSInfo] = {ExifTags.GPS.GPSLatitude: (52.0, 31.0, 12.0)}
    source = tmp_path / "holiday.jpg"
    photo().save(source, exif=exif, dpi=(300, 300))
    without, _, _ = client.predict(image=handle_file(source), whole_image=True, api_name="/protect")
    kept, _, _ = client.predict(image=handle_file(source), whole_image=True, keep_exif=True, api_name="/protect")
    assert b"eXIf" not in Path(without).read_bytes()
    assert Image.open(kept).getexif()[ExifTags.Base.Make] == "Camera"
    assert Path(kept).read_bytes() == written_by_the_command_line(source, saved_generator, "--whole-image")
    np.testing.assert_array_equal(np.asarray(Image.open(without)), np.asarray(Image.open(kept)))


def test_a_photo_on_its_side_is_marked_in_upright_pixels(client, saved_generator, tmp_path):
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = 6
    source = tmp_path / "turned.jpg"
    photo().save(source, exif=exif)
    protected, mask, _ = client.predict(
        image=handle_file(source), boxes=[[0, 50, 48, 64]], keep_exif=True, api_name="/protect"
    )
    assert Image.open(mask).size == (48, 64)
    assert Path(protected).read_bytes() == written_by_the_command_line(source, saved_generator, "--box", "0,50,48,64")


def test_proposed_masks_are_pictures_of_the_photos_size(client, photo_file, saved_generator):
    from unseg_hf import Protector

    masks = client.predict(image=handle_file(photo_file), api_name="/propose_masks")
    expected = Protector.from_pretrained(saved_generator).propose_masks(photo_file)
    assert len(masks) == len(expected)
    for file, mask in zip(masks, expected, strict=True):
        np.testing.assert_array_equal(np.asarray(Image.open(file)), mask)


def test_the_api_page_names_both_endpoints_with_types_and_words(client):
    described = client.view_api(return_format="dict")["named_endpoints"]
    assert set(described) == {"/protect", "/propose_masks"}
    parameters = {p["parameter_name"]: p for p in described["/protect"]["parameters"]}
    assert not parameters["image"]["parameter_has_default"]
    assert all(p["parameter_has_default"] for name, p in parameters.items() if name != "image")
    assert parameters["keep_exif"]["python_type"]["type"] == "bool"
    assert "[[left, top, right, bottom], ...]" in parameters["boxes"]["label"]
    assert "lossless" in described["/protect"]["description"]
    shown = {name: parameters[name]["example_input"] for name in ("image", "mask")}
    assert {name: file["url"] for name, file in shown.items()} == {"image": "photo.jpg", "mask": "mask.png"}


def refused(client, **request) -> str:
    with pytest.raises(AppError) as caught:
        client.predict(api_name="/protect", **request)
    message = str(caught.value)
    assert "\n" not in message
    assert len(message) < 250
    assert not re.search(r"Traceback|/tmp|/root|site-packages|\.py\b", message)
    return message


@pytest.mark.parametrize("name", BAD_UPLOADS)
def test_a_bad_upload_gets_one_line(client, tmp_path, name):
    file = tmp_path / name
    file.write_bytes(BAD_UPLOADS[name])
    assert file.stem in refused(client, image=handle_file(file), whole_image=True)


def test_bad_uploads_do_not_disturb_a_good_one_between_them(client, tmp_path, photo_file):
    bad = [tmp_path / name for name in ("bomb.png", "cut.jpg", "empty.png")]
    for file in bad:
        file.write_bytes(BAD_UPLOADS[file.name])
    files = [*bad, photo_file, *bad]
    jobs = [client.submit(image=handle_file(file), whole_image=True, api_name="/protect") for file in files]
    assert [job.exception() is None for job in jobs] == [file == photo_file for file in files]


@pytest.mark.parametrize("name", ODD_UPLOADS)
def test_an_odd_upload_is_protected_under_a_harmless_name(client, tmp_path, name):
    file = tmp_path / name
    file.write_bytes(ODD_UPLOADS[name])
    protected, _, report = client.predict(image=handle_file(file), whole_image=True, api_name="/protect")
    assert re.fullmatch(r"[\w.-]+_protected\.png", Path(protected).name)
    assert Image.open(protected).size == (report["width"], report["height"])


@pytest.mark.parametrize(
    ("request_", "words"),
    [
        ({"boxes": [[40, 5, 6, 30]]}, "x0 < x1"),
        ({"boxes": [[900, 900, 950, 950]]}, "outside the image"),
        ({"boxes": [[1, 2, 3]]}, "list of 4 finite numbers"),
        ({"boxes": [[0, 0, 9, "NaN"]]}, "finite"),
        ({"boxes": {"a": 1}}, "at most 5"),
        ({"boxes": [[0, 0, 9, 9]] * 6}, "at most 5"),
        ({"points": [[1, 2, 3, 4]]}, "points: pass"),
        ({"points": [[1, 2, 7]]}, "point_labels"),
        ({"points": [[1, 2, 0]]}, "at least one"),
        ({"points": [[1, 2]], "whole_image": True}, "one kind of prompt"),
        ({"whole_image": True, "epsilon": 300}, "0 to 255"),
        ({"whole_image": True, "epsilon": -1}, "0 to 255"),
        ({"whole_image": True, "epsilon": 4, "epsilon_background": 8}, "above"),
        ({"whole_image": True, "epsilon_background": 1}, "needs epsilon"),
    ],
)
def test_a_request_that_makes_no_sense_gets_one_line(client, photo_file, request_, words):
    assert words in refused(client, image=handle_file(photo_file), **request_)


def test_a_mask_of_another_size_is_named(client, photo_file, tmp_path):
    Image.new("L", (10, 10)).save(tmp_path / "small.png")
    message = refused(client, image=handle_file(photo_file), mask=handle_file(tmp_path / "small.png"))
    assert "small.png: this mask has 10 x 10 pixels" in message


def test_a_file_above_the_limit_is_refused_by_name_and_one_above_that_of_a_batch_not_taken(client, url, tmp_path):
    (tmp_path / "big.png").write_bytes(bytes(2**20 + 1))
    assert "big.png: 1 MB, and at most 1 MB are accepted" in refused(client, image=handle_file(tmp_path / "big.png"))
    answer = httpx.post(f"{url}/gradio_api/upload", files={"files": ("huge.png", bytes(2**21 + 1))})
    assert answer.status_code == 413


def answer_of(url: str, fn_index: int, data: list, session: str) -> str:
    """What the queue says to a request made by hand, as the page makes it."""
    body = {"fn_index": fn_index, "data": data, "session_hash": session}
    joined = httpx.post(f"{url}/gradio_api/queue/join", json=body, timeout=30)
    if joined.status_code != 200:
        return joined.text
    text = ""
    with httpx.stream("GET", f"{url}/gradio_api/queue/data?session_hash={session}", timeout=60) as stream:
        for line in stream.iter_lines():
            text += line
            if '"process_completed"' in line or "close_stream" in line:
                break
    return text


def test_no_endpoint_reads_a_file_outside_the_uploads(demo_page, url, tmp_path_factory):
    secret = tmp_path_factory.mktemp("private") / "secret.png"
    Image.new("RGB", (12, 34), "red").save(secret)
    outside = {"path": str(secret), "orig_name": "secret.png"}
    marked = outside | {"meta": {"_type": "gradio.FileData"}}
    climbing = marked | {"path": f"{demo_page.uploads}/x/../../{secret.parent.name}/secret.png"}
    link = marked | {"path": f"{url}/config"}
    config = httpx.get(f"{url}/config").json()
    kinds = {c["id"]: c["type"] for c in config["components"]}
    several = {c["id"] for c in config["components"] if c["props"].get("file_count") == "multiple"}
    takes_files = [d for d in config["dependencies"] if any(kinds[i] in FILE_INPUTS for i in d["inputs"])]
    assert len(takes_files) >= 5
    asked = 0
    for dependency in takes_files:
        for payload in (outside, marked, climbing, link):
            files = {i: [payload] if i in several else payload for i, kind in kinds.items() if kind in FILE_INPUTS}
            data = [files.get(i) for i in dependency["inputs"]]
            asked += 1
            assert '"success":false' in answer_of(url, dependency["id"], data, f"spy{asked}").replace(" ", "")
    editors = [d for d in config["dependencies"] if any(kinds[i] == "imageeditor" for i in d["inputs"])]
    assert editors
    for dependency in editors:
        for payload in (outside, marked, climbing, link):
            drawn = {"background": payload, "layers": [payload], "composite": payload, "id": None}
            data = [drawn if kinds[i] == "imageeditor" else None for i in dependency["inputs"]]
            asked += 1
            assert '"success":false' in answer_of(url, dependency["id"], data, f"spy{asked}").replace(" ", "")
    kept = b"".join(path.read_bytes() for path in demo_page.uploads.rglob("*") if path.is_file())
    assert secret.read_bytes() not in kept


def sent_layer(url: str, files, **fields) -> int:
    """The status that the server answers to what the page sends of a drawing."""
    editor = next(c["id"] for c in httpx.get(f"{url}/config").json()["components"] if c["type"] == "imageeditor")
    fields = {"component_id": str(editor), "session_hash": "drawer", "fn_name": "accept_blobs", **fields}
    return httpx.post(f"{url}/gradio_api/component_server", data=fields, files=files, timeout=30).status_code


def test_of_a_drawing_one_layer_is_kept_and_nothing_else(url, monkeypatch):
    kept = components.BrushedMask._layers
    kept.clear()
    monkeypatch.setattr(components, "KEPT_BYTES", 5_000)
    layer = {"file": ("layer_0.png", PNG[:1_000])}
    assert sent_layer(url, layer, type="layer", index="0", id="a") == 200
    assert kept == {"a": PNG[:1_000]}
    for kind in ("background", "composite"):
        assert sent_layer(url, layer, type=kind, index="null", id="b") == 200
    assert sent_layer(url, layer, type="layer", index="40000000", id="b") == 400
    assert sent_layer(url, layer, type="layer", index="x", id="b") == 400
    assert sent_layer(url, layer, type="layer", index="0") == 400
    assert sent_layer(url, layer, id="b") == 400
    assert sent_layer(url, layer, type="layer", index="0", id="b" * 100) == 413
    body = {"component_id": 0, "session_hash": "drawer", "fn_name": "accept_blobs", "data": {"type": "layer"}}
    config = httpx.get(f"{url}/config").json()["components"]
    body["component_id"] = next(c["id"] for c in config if c["type"] == "imageeditor")
    assert httpx.post(f"{url}/gradio_api/component_server", json=body, timeout=30).status_code == 400
    assert list(kept) == ["a"]
    for number in range(6):
        assert sent_layer(url, layer, type="layer", index="0", id=str(number)) == 200
    assert list(kept) == ["4", "5"]
    kept.clear()


def test_nobody_passes_the_queue_by(url):
    for name in ("protect", "propose_masks"):
        for route in ("run", "api"):
            answer = httpx.post(f"{url}/gradio_api/{route}/{name}", json={"data": [None] * 8}, timeout=30)
            assert answer.status_code == 404
    config = httpx.get(f"{url}/config").json()
    jobs = [d["id"] for d in config["dependencies"] if d["queue"] is not False]
    assert len(jobs) > 8
    for number in jobs:
        body = {"fn_index": number, "data": [None] * 8, "session_hash": "pusher"}
        assert httpx.post(f"{url}/gradio_api/run/predict", json=body, timeout=30).status_code == 404


def test_files_are_served_from_the_uploads_alone(demo_page, url, tmp_path_factory):
    secret = tmp_path_factory.mktemp("private") / "secret.txt"
    secret.write_text("the secret")
    for path in (
        secret,
        "/etc/hostname",
        Path(cli.__file__),
        Path.cwd() / "pyproject.toml",
        "pyproject.toml",
        f"{demo_page.uploads}/../{secret.parent.name}/secret.txt",
        f"{demo_page.uploads}/..%2f{secret.parent.name}%2fsecret.txt",
    ):
        for route in ("/gradio_api/file=", "/file=", "/gradio_api/file/", "/static/", "/gradio_api/stream/"):
            answer = httpx.get(f"{url}{route}{path}")
            assert answer.status_code >= 400, f"{route}{path}"


def test_no_link_is_fetched_for_a_visitor(url):
    for route in ("gradio_api/file=https://example.org/", "gradio_api/file=HTTP://example.org/", "file=http://a.b/"):
        assert httpx.get(f"{url}/{route}").status_code == 403


def test_routes_that_nobody_needs_are_shut(demo_page, url):
    before = set(demo_page.uploads.parent.rglob("*"))
    assert httpx.get(f"{url}/gradio_api/deep_link?session_hash=a").status_code == 403
    assert httpx.post(f"{url}/gradio_api/process_recording", files={"file": ("a.webm", b"x")}).status_code == 403
    assert httpx.post(f"{url}/gradio_api/vibe-edit/", json={}).status_code == 403
    assert set(demo_page.uploads.parent.rglob("*")) == before


@pytest.mark.parametrize("name", ["monitoring.png", "vibe-1.png", "deep_link.png", "profiling"])
def test_no_name_of_a_file_shuts_its_route(url, name):
    stored = httpx.post(f"{url}/gradio_api/upload", files={"files": (name, PNG)}).json()[0]
    assert Path(stored).name == name
    assert httpx.get(f"{url}/gradio_api/file={stored}").content == PNG


@pytest.mark.parametrize("route", ["queue/join", "component_server", "call/protect"])
def test_what_is_posted_has_an_end(url, route):
    chunks = (b" " * 2**16 for _ in range(200))  # whose length nobody says beforehand
    kind = {"content-type": "application/json"}
    form = {"component_id": "1", "fn_name": "accept_blobs"}
    files = [("file", (f"{number}.png", bytes(2**20))) for number in range(12)]
    for body in ({"content": chunks, "headers": kind}, {"data": form, "files": files}):
        answer = httpx.post(f"{url}/gradio_api/{route}", timeout=60, **body)
        assert (answer.status_code, answer.text[:7]) == (413, "at most")


def test_a_climbing_file_name_stays_in_the_uploads(demo_page, url):
    before = {p for p in demo_page.uploads.parent.rglob("*") if not p.is_relative_to(demo_page.uploads)}
    for name in ("../../../climbed.png", "..\\..\\climbed.png", "/tmp/climbed.png", ".hidden/../../climbed.png"):
        stored = httpx.post(f"{url}/gradio_api/upload", files={"files": (name, PNG)}).json()[0]
        assert Path(stored).resolve().is_relative_to(demo_page.uploads.resolve())
        assert Path(stored).is_file()
    after = {p for p in demo_page.uploads.parent.rglob("*") if not p.is_relative_to(demo_page.uploads)}
    assert before == after


def test_a_name_from_the_client_does_not_choose_where_results_go(demo_page, url):
    stored = httpx.post(f"{url}/gradio_api/upload", files={"files": ("a.png", PNG)}).json()[0]
    config = httpx.get(f"{url}/config").json()
    protect = next(d for d in config["dependencies"] if d["api_name"] == "protect")
    image = {"path": stored, "orig_name": "../../../../up.png", "meta": {"_type": "gradio.FileData"}}
    text = answer_of(url, protect["id"], [image, None, None, None, True, None, None, False], "climber")
    answer = json.loads(text[text.rindex("data: ") + 6 :]) if '"process_completed"' in text else {}
    result = Path(answer["output"]["data"][0]["path"])
    assert result.is_relative_to(demo_page.uploads)
    assert result.name == "up_protected.png"


def test_two_users_at_once_get_their_own_photos(url, saved_generator, tmp_path):
    sources, results = [], {}
    for user in range(2):
        sources.append(tmp_path / f"user{user}" / "photo.png")
        sources[-1].parent.mkdir()
        photo(seed=user, height=40 + 20 * user).save(sources[-1])

    def use(user: int) -> None:
        mine = Client(url, verbose=False, download_files=str(tmp_path / f"downloads{user}"))
        jobs = [mine.submit(image=handle_file(sources[user]), whole_image=True, api_name="/protect") for _ in range(3)]
        results[user] = [Path(job.result()[0]).read_bytes() for job in jobs]

    threads = [threading.Thread(target=use, args=(user,)) for user in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for user in range(2):
        assert results[user] == 3 * [written_by_the_command_line(sources[user], saved_generator, "--whole-image")]


def test_nothing_is_asked_of_another_server(url):
    page = httpx.get(url).text
    # Scripts that Gradio puts into every page work without these; nothing of this page may be on the list.
    asked = set(re.findall(r"(?:href|src)=\"(https?://[^/\"]+)", page))
    assert not {host for host in asked if "fonts" in host}
