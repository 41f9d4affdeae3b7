"""SA-1B's tars: written, read in part, streamed from real servers, and refused where they are damaged."""

import contextlib
import http.server
import importlib.util
import io
import itertools
import json
import pickle
import re
import tarfile
import threading
import warnings
from pathlib import Path

import fsspec
import numpy as np
import pytest
import torch
from PIL import Image

from unseg_hf.data import sa1b, sa1b_tars
from unseg_hf.data.interactive import InteractiveSegmentation
from unseg_hf.data.records import Record
from unseg_hf.data.sa1b import Sa1bSource
from unseg_hf.data.sa1b_writer import write_sa1b

# pycocotools calls numpy in an old way.
pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")

IMAGES = 10
SCRIPT = Path(__file__).parents[1] / "training_scripts" / "write_sa1b.py"


def make_record(number: int) -> Record:
    """A smooth image, another for each number, with a disc, its surroundings, single pixels, and an empty mask."""
    height, width = 40 + number, 56 - number
    rows, columns = np.mgrid[:height, :width]
    pixels = np.stack([rows * 3, columns * 3, np.full_like(rows, 20 * number)], axis=-1).astype(np.uint8)
    disc = (rows - height / 2) ** 2 + (columns - width / 2) ** 2 < (8 + number) ** 2
    masks = [disc, ~disc, (rows * 7 + columns * 3) % 11 == number, np.zeros_like(disc)]
    return Record(f"photo {number}", Image.fromarray(pixels), masks)


def pass_names(source: Sa1bSource, seed: int = 0, rank: int = 0, world: int = 1) -> list[str]:
    """The images of a pass, in its order."""
    return [handle.image.name for handle in source.order(np.random.default_rng(seed), rank, world)]


def load_all(source: Sa1bSource) -> dict[str, Record]:
    return {handle.image.name: source.load(handle) for handle in source.order(np.random.default_rng(0), 0, 1)}


def write_tar(path: Path, members: dict[str, bytes | None]) -> str:
    """A tar of members in the order given; those without contents are folders."""
    with tarfile.open(path, "w") as tar:
        for name, data in members.items():
            info = tarfile.TarInfo(name)
            info.size, info.type = len(data or b""), tarfile.DIRTYPE if data is None else tarfile.REGTYPE
            tar.addfile(info, io.BytesIO(data or b""))
    return str(path)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Four tars of 3, 3, 3 and 1 images."""
    folder = tmp_path_factory.mktemp("tars")
    assert write_sa1b(map(make_record, range(IMAGES)), folder, images_per_shard=3, report=lambda line: None) == IMAGES
    return folder


@pytest.fixture
def members(folder):
    """The six members of the first tar: names and contents."""
    with tarfile.open(folder / "sa_000000.tar") as tar:
        return {info.name: tar.extractfile(info).read() for info in tar}


class TarServer(http.server.BaseHTTPRequestHandler):
    """Serves a folder: /ranges/NAME in parts, /plain/NAME whole only, /cut/NAME whole with a lost connection.

    /flaky/NAME answers in parts, and loses the connection once for each part.
    """

    folder: Path
    lost: set

    def do_HEAD(self):
        self.do_GET(body=False)

    def do_GET(self, body: bool = True):
        _, kind, name = self.path.partition("?")[0].split("/")
        if not (self.folder / name).is_file():
            self.send_error(404)
            return
        data = (self.folder / name).read_bytes()
        ranges = re.fullmatch(r"bytes=(\d+)-(\d+)", self.headers.get("Range", ""))
        sent = data
        if ranges and kind in ("ranges", "flaky"):
            first, last = int(ranges[1]), min(int(ranges[2]), len(data) - 1)
            sent = data[first : last + 1]
            self.send_response(206)
            self.send_header("Content-Range", f"bytes {first}-{last}/{len(data)}")
        else:
            self.send_response(200)
        self.send_header("Content-Length", str(len(sent)))
        self.end_headers()
        if kind == "flaky" and len(sent) > 1 and sent not in self.lost:
            self.lost.add(sent)
            sent = sent[: len(sent) // 2]
        if body:
            self.wfile.write(sent[: len(sent) // 3] if kind == "cut" else sent)

    def log_message(self, *arguments):
        pass


@pytest.fixture(scope="module")
def serve():
    """A function: serves a folder and returns the address."""
    with contextlib.ExitStack() as stack:

        def start(folder: Path) -> str:
            handler = type("Handler", (TarServer,), {"folder": folder, "lost": set()})
            server = stack.enter_context(http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler))
            threading.Thread(target=server.serve_forever, daemon=True).start()
            stack.callback(server.shutdown)
            return f"http://127.0.0.1:{server.server_port}"

        yield start


@pytest.fixture(scope="module")
def server(serve, folder):
    """The address of a server of the tars."""
    return serve(folder)


@pytest.fixture(params=["local", "ranges", "plain", "fsspec"])
def location(request, folder):
    """The first tar, as a file, on servers that do and do not answer to ranges, and on another file system."""
    if request.param == "local":
        return str(folder / "sa_000000.tar")
    if request.param == "fsspec":
        with fsspec.open("memory://sa1b/sa_000000.tar", "wb") as file:
            file.write((folder / "sa_000000.tar").read_bytes())
        return "memory://sa1b/*.tar"
    return f"{request.getfixturevalue('server')}/{request.param}/sa_000000.tar?signature=1"


# --- images and masks ---


def test_written_masks_are_read_back_exactly_and_images_closely(folder):
    source = Sa1bSource(f"{folder}/*.tar")
    loaded = load_all(source)
    assert source.size == len(loaded) == IMAGES
    for number in range(IMAGES):
        original, read = make_record(number), loaded[f"sa_{number + 1}.jpg"]
        assert len(read.masks) == 3  # all but the empty one
        for mask, expected in zip(read.masks, original.masks, strict=False):
            assert mask.dtype == bool
            np.testing.assert_array_equal(mask, expected)
        difference = np.asarray(read.image, int) - np.asarray(original.image, int)
        assert read.image.mode == "RGB"
        assert np.abs(difference).mean() < 3


def test_every_location_gives_the_same_records(location, folder):
    expected = load_all(Sa1bSource(str(folder / "sa_000000.tar")))
    source = Sa1bSource(location)
    assert source.size == (3 if location.startswith("/") else None)
    loaded = load_all(source)
    assert loaded.keys() == expected.keys()
    for name, record in loaded.items():
        assert record.image.tobytes() == expected[name].image.tobytes()
        for mask, other in zip(record.masks, expected[name].masks, strict=True):
            np.testing.assert_array_equal(mask, other)


def decode_counts(counts: str, height: int, width: int) -> np.ndarray:
    """COCO's compressed run-length code, from its description: 5 bits a character, runs as differences."""
    runs, value, shift = [], 0, 0
    for character in counts:
        bits = ord(character) - 48
        value |= (bits & 0x1F) << shift
        shift += 5
        if not bits & 0x20:
            value -= (1 << shift) if bits & 0x10 else 0
            runs.append(value + (runs[-2] if len(runs) > 2 else 0))
            value, shift = 0, 0
    flat = np.repeat(np.arange(len(runs)) % 2 == 1, runs)
    return flat.reshape(width, height).T


def test_written_annotations_describe_the_masks(members):
    described = json.loads(members["sa_2.json"])
    record = make_record(1)
    size = {"width": record.image.width, "height": record.image.height}
    assert described["image"] == {"image_id": 2, **size, "file_name": "sa_2.jpg", "source_name": "photo 1"}
    assert [annotation["id"] for annotation in described["annotations"]] == [4, 5, 6]
    for annotation, mask in zip(described["annotations"], record.masks, strict=False):
        code = annotation["segmentation"]
        np.testing.assert_array_equal(decode_counts(code["counts"], *code["size"]), mask)
        rows, columns = np.nonzero(mask)
        left, top = columns.min(), rows.min()
        assert annotation["bbox"] == [left, top, columns.max() + 1 - left, rows.max() + 1 - top]
        assert annotation["area"] == mask.sum()
        assert annotation["predicted_iou"] == annotation["stability_score"] == 1
        ((x, y),) = annotation["point_coords"]
        assert mask[int(y), int(x)]
        assert annotation["crop_box"] == [0, 0, *size.values()]


@pytest.mark.parametrize(
    ("filters", "kept"),
    [
        ({}, [0, 1, 2, 3]),
        ({"min_area": 0.1}, [1, 2, 3]),
        ({"max_area": 0.2}, [0, 1]),
        ({"min_area": 0.1, "max_area": 0.4}, [1, 2]),
        ({"min_predicted_iou": 0.8}, [0, 2, 3]),
        ({"min_stability": 0.9}, [0, 1, 3]),
        ({"min_area": 0.9}, []),
    ],
)
def test_filters_choose_masks_by_the_json_alone(tmp_path, members, filters, kept):
    described = json.loads(members["sa_1.json"])
    height, width = described["annotations"][0]["segmentation"]["size"]
    annotation = described["annotations"][0]
    annotation["segmentation"]["counts"] = "no code at all"  # which a decoder would refuse
    values = [(0.05, 0.9, 0.9), (0.1, 0.7, 0.9), (0.3, 0.8, 0.8), (0.5, 0.9, 0.9)]
    described["annotations"] = [
        {**annotation, "area": share * height * width, "predicted_iou": iou, "stability_score": stability}
        for share, iou, stability in values
    ]
    path = write_tar(
        tmp_path / "a.tar", {"sa_1.jpg": members["sa_1.jpg"], "sa_1.json": json.dumps(described).encode()}
    )
    (record,) = load_all(Sa1bSource(path, **filters)).values()
    expected = [values[index][0] * height * width for index in kept]
    assert record.masks.areas == expected


# --- order ---


@pytest.mark.parametrize(("tars", "world"), [("*", 2), ("*", 4), ("sa_000000", 2), ("*", 5)])
def test_processes_together_see_every_pair_exactly_once(folder, tars, world):
    source = Sa1bSource(f"{folder}/{tars}.tar", buffer_size=2)
    seen = [pass_names(source, 3, rank, world) for rank in range(world)]
    assert sorted(itertools.chain.from_iterable(seen)) == sorted(pass_names(source))
    assert all(seen)


def test_a_pass_depends_on_the_generator_alone(folder):
    first, second = (Sa1bSource(f"{folder}/*.tar") for _ in range(2))
    assert pass_names(first, 5) == pass_names(second, 5)
    orders = {tuple(pass_names(first, seed)) for seed in range(5)}
    assert len(orders) == 5
    assert len({order[0] for order in orders}) > 1


def test_a_small_buffer_still_changes_the_order_of_tars(folder):
    source = Sa1bSource(f"{folder}/*.tar", buffer_size=1)
    orders = [[(int(name[3:-4]) - 1) // 3 for name in pass_names(source, seed)] for seed in range(8)]
    assert all(len(list(itertools.groupby(shards))) == 4 for shards in orders)  # a tar at a time
    assert len(set(map(tuple, orders))) > 4


def test_handles_of_local_tars_are_small_and_all_can_be_pickled(location):
    source = Sa1bSource(location)
    for handle in source.order(np.random.default_rng(0), 0, 1):
        pickled = pickle.dumps(handle)
        assert len(pickled) < 1000 or not location.startswith("/")
        record = pickle.loads(pickle.dumps(source)).load(pickle.loads(pickled))
        assert record.masks[0].any()


def test_an_epoch_entered_in_its_middle_goes_on_as_one_that_was_not(location):
    data = InteractiveSegmentation([Sa1bSource(location, weight=1, buffer_size=2)], image_size=16, epoch_size=12)
    batches = list(data.batches(1, 2))
    assert list(data.batches(1, 2, skip=4)) == batches[4:]
    assert len({draw.handle.image.name for batch in batches for draw in batch}) == 3


def test_workers_change_nothing(folder):
    data = InteractiveSegmentation([Sa1bSource(f"{folder}/*.tar")], image_size=32)
    loaded = [
        list(torch.utils.data.DataLoader(data, batch_sampler=list(data.batches(0, 2)), num_workers=workers))
        for workers in (0, 2)
    ]
    assert len(loaded[0]) == IMAGES // 2
    for alone, helped in zip(*loaded, strict=True):
        assert alone["name"] == helped["name"]
        for key in ("image", "mask", "inside"):
            assert torch.equal(alone[key], helped[key])
        assert alone["mask"].flatten(1).any(1).all()


# --- locations ---


def test_a_list_of_links_as_meta_gives_it(tmp_path, folder, server):
    links = tmp_path / "links.txt"
    rows = [f"sa_00000{n}.tar\t{server}/ranges/sa_00000{n}.tar?sign=secret" for n in (0, 1)]
    links.write_text("\n".join(["file_name\tcdn_link", *rows]) + "\n")
    source = Sa1bSource(str(links))
    assert source.size is None
    assert {shard.name for shard in source.shards} == {"sa_000000.tar", "sa_000001.tar"}
    assert sorted(load_all(source)) == [f"sa_{n}.jpg" for n in range(1, 7)]


def test_a_list_of_local_tars_and_patterns(tmp_path, folder):
    links = tmp_path / "mine.tsv"
    links.write_text(f"{folder}/sa_000003.tar\n\n{folder}/sa_00000[01].tar\n")
    assert Sa1bSource(str(links)).size == 7
    links.write_text("a\tb\tc\n")
    with pytest.raises(ValueError, match="a tab and a location"):
        Sa1bSource(str(links)).size  # noqa: B018
    links.write_text("file_name\tcdn_link\n")
    with pytest.raises(FileNotFoundError, match="lists no tars"):
        Sa1bSource(str(links)).size  # noqa: B018


def test_nothing_at_the_location(tmp_path, server):
    for missing in (f"{tmp_path}/*.tar", str(tmp_path), "memory://nowhere/*.tar"):
        with pytest.raises(FileNotFoundError, match=re.escape(missing)):
            Sa1bSource(missing).size  # noqa: B018
    with pytest.raises(ConnectionError, match=r"gone\.tar cannot be opened.*404.*link") as error:
        pass_names(Sa1bSource(f"{server}/plain/gone.tar?sign=secret"))
    assert "secret" not in str(error.value)


def test_a_lost_connection_names_the_tar_and_does_not_end_the_pass(tmp_path, serve):
    noise = np.random.default_rng(0).integers(0, 256, (12, 512, 512, 3), np.uint8)
    write_sa1b([Record(f"{n}", Image.fromarray(pixels), []) for n, pixels in enumerate(noise)], tmp_path)
    source = Sa1bSource(f"{serve(tmp_path)}/cut/sa_000000.tar?sign=secret", buffer_size=1)
    names = []
    with pytest.raises(ConnectionError, match=r"sa_000000\.tar: the connection broke after [1-9]\d* byt") as error:
        names.extend(handle.image.name for handle in source.order(np.random.default_rng(0), 0, 1))
    assert 0 < len(names) < 12
    assert "secret" not in str(error.value)


def test_a_part_that_was_lost_is_asked_for_again(monkeypatch, server):
    monkeypatch.setattr(sa1b_tars.time, "sleep", lambda seconds: None)
    assert sorted(pass_names(Sa1bSource(f"{server}/flaky/sa_000002.tar"))) == ["sa_7.jpg", "sa_8.jpg", "sa_9.jpg"]


def test_argument_out_of_range():
    for wrong in ({"min_area": 0.5, "max_area": 0.5}, {"min_area": -0.1}, {"max_area": 1.5}, {"buffer_size": 0}):
        (name, value), *_ = wrong.items()
        with pytest.raises(ValueError, match=f"{name}={value}"):
            Sa1bSource("a.tar", **wrong)


# --- damage ---


def read_both_ways(path: str, tmp_path) -> list[Sa1bSource]:
    """A tar as a file and as a stream."""
    with fsspec.open(f"memory://damaged/{Path(path).name}", "wb") as file:
        file.write(Path(path).read_bytes())
    return [Sa1bSource(path), Sa1bSource(f"memory://damaged/{Path(path).name}")]


@pytest.mark.parametrize(
    ("order", "named"),
    [
        (["sa_1.jpg", "sa_1.json", "sa_2.jpg"], r"sa_2\.jpg has no sa_2\.json"),
        (["sa_1.jpg", "sa_2.jpg", "sa_2.json"], r"sa_1\.jpg has no sa_1\.json"),
        (["sa_1.json", "sa_2.jpg", "sa_2.json"], r"sa_1\.json has no sa_1\.jpg"),
        (["sa_1.jpg", "sa_2.jpg", "sa_1.json", "sa_2.json"], r"sa_1\.jpg has no sa_1\.json beside it"),
        ([], r"a\.tar.*(no sa_N\.jpg|damaged)"),
        (["sa_1.jpg", "sa_1.json", "notes.png"], r"notes\.png is neither"),
    ],
)
def test_a_member_without_its_partner_beside_it_is_named(tmp_path, members, order, named):
    members["notes.png"] = b""
    path = write_tar(tmp_path / "a.tar", {name: members[name] for name in order})
    for source in read_both_ways(path, tmp_path):
        with pytest.raises(ValueError, match=named) as error:
            pass_names(source)
        assert "a.tar" in str(error.value)


def test_folders_and_hidden_files_are_passed_over_and_either_of_a_pair_may_come_first(tmp_path, members):
    layout = {
        "./": None,
        "./._sa_1.jpg": b"Mac",
        "./sa_1.json": members["sa_1.json"],
        "./sa_1.jpg": members["sa_1.jpg"],
        "deeper": None,
        "deeper/sa_2.jpg": members["sa_2.jpg"],
        "deeper/sa_2.json": members["sa_2.json"],
    }
    for source in read_both_ways(write_tar(tmp_path / "a.tar", layout), tmp_path):
        assert load_all(source).keys() == {"sa_1.jpg", "deeper/sa_2.jpg"}


@pytest.mark.parametrize("where", ["header", "between", "data", "garbage"])
def test_a_cut_tar_is_named_with_the_member_before_the_cut(tmp_path, folder, where):
    whole = folder / "sa_000000.tar"
    with tarfile.open(whole) as tar:
        infos = {info.name: info for info in tar}
    second = infos["sa_2.jpg"]
    keep = {"header": second.offset + 100, "data": second.offset_data + 50}.get(where, second.offset)
    path = tmp_path / "cut.tar"
    path.write_bytes(whole.read_bytes()[:keep] + (b"\xff" * 1024 if where == "garbage" else b""))
    last = "sa_2.jpg" if where == "data" else "sa_1.json"
    for source in read_both_ways(str(path), tmp_path):
        with pytest.raises(ValueError, match=rf"cut\.tar is damaged.* at {re.escape(last)}.*again"):
            pass_names(source)


def test_a_compressed_local_tar_is_refused(tmp_path, folder):
    with tarfile.open(tmp_path / "a.tar", "w:gz") as tar:
        tar.add(folder / "sa_000000.tar", "sa_1.jpg")
    with pytest.raises(ValueError, match="no tar without compression"):
        pass_names(Sa1bSource(str(tmp_path / "a.tar")))


def test_an_image_that_says_it_is_too_large_is_damaged(tmp_path, members, monkeypatch):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 10)
    source = Sa1bSource(write_tar(tmp_path / "a.tar", members))
    with pytest.raises(OSError, match=r"a\.tar/sa_\d\.jpg cannot be decoded"):
        source.load(next(iter(source.order(np.random.default_rng(0), 0, 1))))


@pytest.mark.parametrize("damaged", ["sa_1.jpg", "sa_1.json"])
@pytest.mark.parametrize("how", ["cut", "garbage"])
def test_damaged_contents_are_named_and_stop_nothing_else(tmp_path, members, damaged, how):
    members[damaged] = members[damaged][: len(members[damaged]) // 2] if how == "cut" else b"\xff\xfenothing"
    source = Sa1bSource(write_tar(tmp_path / "a.tar", members))
    handles = {handle.image.name: handle for handle in source.order(np.random.default_rng(0), 0, 1)}
    with pytest.raises(OSError, match=rf"a\.tar/{re.escape(damaged)}"):
        source.load(handles["sa_1.jpg"])
    assert len(source.load(handles["sa_2.jpg"]).masks) == 3
    data = InteractiveSegmentation([source], image_size=16)
    (batch,) = data.batches(0, 3)
    with pytest.warns(UserWarning, match=rf"left out.*{re.escape(damaged)}"):
        assert len(data.__getitems__(batch)) == 3


@pytest.mark.parametrize(
    ("change", "named"),
    [
        (lambda d: d.pop("annotations"), "'annotations'"),
        (lambda d: d["annotations"][1].pop("area"), "'area'"),
        (lambda d: d["annotations"][1].pop("stability_score"), "'stability_score'"),
        (lambda d: d["annotations"][1]["segmentation"].pop("size"), "'size'"),
        (lambda d: d["annotations"][1]["segmentation"].update(size=[56, 40]), r"'size' is \[56, 40\].*\[40, 56\]"),
        (lambda d: d["annotations"][1]["segmentation"].update(counts=[1, 2]), "'counts' must be a string"),
        (lambda d: d.update(annotations=3), "not laid out as SA-1B's"),
    ],
)
def test_annotations_of_another_layout_name_the_field(tmp_path, members, change, named):
    described = json.loads(members["sa_1.json"])
    change(described)
    members["sa_1.json"] = json.dumps(described).encode()
    source = Sa1bSource(write_tar(tmp_path / "a.tar", members))
    with pytest.raises(OSError, match=rf"a\.tar/sa_1\.json.*{named}"):
        load_all(source)


@pytest.mark.parametrize("counts", ["", "zzzzz", "half", "too long"])
def test_a_damaged_run_length_code_is_an_error_not_a_mask(tmp_path, members, counts):
    described = json.loads(members["sa_1.json"])
    code = described["annotations"][0]["segmentation"]
    right = code["counts"]
    code["counts"] = {"half": right[: len(right) // 2], "too long": right + "99"}.get(counts, counts)
    members["sa_1.json"] = json.dumps(described).encode()
    record = load_all(Sa1bSource(write_tar(tmp_path / "a.tar", members)))["sa_1.jpg"]
    with pytest.raises(OSError, match=r"a\.tar/sa_1\.json.*'counts'"):
        record.masks[0]
    assert record.masks[1].any()


def test_an_area_that_is_not_the_number_of_pixels_is_no_damage(tmp_path, members):
    described = json.loads(members["sa_1.json"])
    code = described["annotations"][0]["segmentation"]
    described["annotations"][0]["area"] += 0.5
    members["sa_1.json"] = json.dumps(described).encode()
    record = load_all(Sa1bSource(write_tar(tmp_path / "a.tar", members)))["sa_1.jpg"]
    np.testing.assert_array_equal(record.masks[0], decode_counts(code["counts"], *code["size"]))


# --- the writer ---


def test_tars_that_exist_are_never_touched(folder):
    before = {path: path.read_bytes() for path in folder.iterdir()}
    with pytest.raises(FileExistsError, match=r"sa_000000\.tar exists: choose another folder"):
        write_sa1b([make_record(0)], folder)
    assert {path: path.read_bytes() for path in folder.iterdir()} == before


def test_a_tar_has_its_name_once_it_is_whole(tmp_path):
    def records():
        yield make_record(0)
        yield make_record(1)
        assert [path.name for path in tmp_path.glob("*.tar")] == []
        yield make_record(2)
        yield make_record(3)
        assert [path.name for path in tmp_path.glob("*.tar")] == ["sa_000000.tar"]
        raise RuntimeError("the disk of the records is gone")

    with pytest.raises(RuntimeError):
        write_sa1b(records(), tmp_path, images_per_shard=3)
    assert Sa1bSource(f"{tmp_path}/*.tar").size == 3


def test_records_that_cannot_be_read_or_used(tmp_path):
    encoded = io.BytesIO()
    make_record(0).image.save(encoded, "PNG")
    broken = Record("broken photo", Image.open(io.BytesIO(encoded.getvalue()[:100])), make_record(0).masks)
    lines = []
    with pytest.warns(UserWarning, match="left out broken photo"):
        assert write_sa1b([make_record(0), broken, make_record(2)], tmp_path, 1, report=lines.append) == 2
    assert lines == [f"{tmp_path}/sa_00000{n}.tar: 1 images" for n in (0, 1)]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["sa_000000.tar", "sa_000001.tar"]
    odd = Record("photo 1", make_record(1).image, make_record(2).masks)
    with pytest.warns(UserWarning, match="left out photo 1: a mask has shape"):
        assert write_sa1b([odd, make_record(2)], tmp_path / "other") == 1
    for wrong in ({"images_per_shard": 0}, {"quality": 101}):
        ((name, value),) = wrong.items()
        with pytest.raises(ValueError, match=f"{name}={value}"):
            write_sa1b([], tmp_path / "third", **wrong)


@pytest.fixture
def script():
    specification = importlib.util.spec_from_file_location("write_sa1b_script", SCRIPT)
    module = importlib.util.module_from_spec(specification)
    specification.loader.exec_module(module)
    return module


def test_the_command_writes_what_its_sources_hold(tmp_path, folder, script, capsys):
    output = tmp_path / "again"
    data = [f"sa1b:{folder}/sa_00000{n}.tar" for n in (0, 3)]
    script.main(["--data", *data, "--output", str(output), "--images_per_shard", "3"])
    assert "wrote 4 images" in capsys.readouterr().out
    source = Sa1bSource(f"{output}/*.tar")
    assert source.size == 4
    assert sum(len(record.masks) for record in load_all(source).values()) == 12
    with pytest.raises(SystemExit), warnings.catch_warnings():
        script.main(["--data", *data, "--output", str(output)])
    assert "exists: choose another folder" in capsys.readouterr().err


def test_a_mask_of_everything_stays(tmp_path):
    everything = Record("one", Image.new("RGB", (20, 10)), [np.ones((10, 20), bool)])
    write_sa1b([everything], tmp_path, report=lambda line: None)
    (record,) = load_all(Sa1bSource(str(tmp_path / "*.tar"))).values()
    assert len(record.masks) == 1


def test_local_tars_have_the_large_buffer(folder, monkeypatch):
    sizes, shuffled = [], sa1b._shuffled
    monkeypatch.setattr(
        sa1b, "_shuffled", lambda items, size, random: sizes.append(size) or shuffled(items, size, random)
    )
    pass_names(Sa1bSource(str(folder / "*.tar")))
    pass_names(Sa1bSource(str(folder / "*.tar"), buffer_size=7))
    assert sizes == [1000, 7]


def test_fewer_pairs_than_the_buffer_holds_are_shuffled(folder):
    source = Sa1bSource(str(folder / "sa_000000.tar"))
    orders = {tuple(pass_names(source, seed)) for seed in range(30)}
    assert len(orders) == 6  # of its three images, which are fewer than the buffer holds
