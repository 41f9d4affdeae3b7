"""HQSeg-44K, on a small tree of its layout."""

import itertools

import numpy as np
import pytest
from PIL import Image

from unseg_hf.data.hqseg import PARTS, TRAINING_PARTS, HqSegSource

CASCADE = ["DUTS-TE", "DUTS-TR", "MSRA_10K", "ecssd", "fss_all"]


@pytest.fixture
def tree(tmp_path):
    """Two images in each folder that the published archives have."""
    folders = [(f"cascade_psp/{name}",) * 2 for name in CASCADE]
    folders += [(f"DIS5K/{name}/im", f"DIS5K/{name}/gt") for name in ("DIS-TR", "DIS-VD")]
    thin = "thin_object_detection"
    folders += [(f"{thin}/ThinObject5K/images_{s}", f"{thin}/ThinObject5K/masks_{s}") for s in ("train", "test")]
    folders += [
        (f"{thin}/COIFT/images", f"{thin}/COIFT/masks"),
        (f"{thin}/HRSOD/images", f"{thin}/HRSOD/masks_max255"),
    ]
    mask = np.zeros((8, 12), np.uint8)
    mask[2:5, 3:9], mask[5, 3:9], mask[6, 3:9] = 255, 128, 127
    for index, (images, masks) in enumerate(folders):
        for folder in (images, masks):
            (tmp_path / folder).mkdir(parents=True, exist_ok=True)
        for stem in ("b.c", "a"):
            Image.new("RGB", (12, 8), (20 * index, 0, 0)).save(tmp_path / images / f"{stem}.jpg")
            # Some of the published masks are grey RGB.
            Image.fromarray(mask).convert("RGB" if stem == "a" else "L").save(tmp_path / masks / f"{stem}.png")
    (tmp_path / "DIS5K" / "DIS5K Dataset Terms of Use.pdf").write_text("terms")
    return tmp_path


def test_every_part_of_the_published_tree_is_read(tree):
    source = HqSegSource(tree, parts=list(PARTS))
    assert source.size == 2 * len(PARTS) == 22
    records = [source.load(handle) for handle in range(source.size)]
    assert len({record.name for record in records}) == 22
    assert records[0].name == "DIS5K-TR/a"
    assert records[1].name == "DIS5K-TR/b.c"
    shades = {record.name.split("/")[0]: record.image.getpixel((0, 0))[0] // 20 for record in records}
    assert shades["fss_all"] == CASCADE.index("fss_all")
    assert sorted(shades.values()) == list(range(11))


def test_the_training_parts_are_the_default(tree):
    source = HqSegSource(tree)
    assert {source.load(i).name.split("/")[0] for i in range(source.size)} == set(TRAINING_PARTS)
    assert source.size == 14


def test_masks_are_cut_above_127(tree):
    source = HqSegSource(tree, parts=["COIFT"])
    for handle in range(2):
        (mask,) = source.load(handle).masks
        assert mask.shape == (8, 12)
        assert mask.dtype == bool
        assert mask.sum() == 4 * 6


def test_processes_share_a_pass(tree):
    source = HqSegSource(tree)
    parts = [list(source.order(np.random.default_rng(0), rank, 3)) for rank in range(3)]
    assert sorted(itertools.chain.from_iterable(parts)) == list(range(14))
    again = HqSegSource(tree)
    assert parts == [list(again.order(np.random.default_rng(0), rank, 3)) for rank in range(3)]
    assert [again.load(i).name for i in range(14)] == [source.load(i).name for i in range(14)]


def test_a_missing_folder_is_named_with_the_layout(tree):
    for path in (tree / "DIS5K" / "DIS-TR" / "gt").iterdir():
        path.unlink()
    (tree / "DIS5K" / "DIS-TR" / "gt").rmdir()
    with pytest.raises(
        FileNotFoundError, match=r"DIS-TR/gt: no such folder; .*layout(.|\n)*cascade_psp/ecssd/\*\.jpg"
    ):
        HqSegSource(tree)
    assert HqSegSource(tree, parts=["ecssd"]).size == 2
    with pytest.raises(FileNotFoundError, match="nowhere/DIS5K/DIS-TR/im: no such folder"):
        HqSegSource("nowhere")


def test_a_folder_without_images_is_named(tree):
    for path in (tree / "cascade_psp" / "ecssd").iterdir():
        path.unlink()
    with pytest.raises(FileNotFoundError, match=r"cascade_psp/ecssd: no \.jpg files"):
        HqSegSource(tree)


def test_what_has_no_partner_is_left_out_and_named(tree):
    before = HqSegSource(tree).size
    folder = tree / "thin_object_detection" / "ThinObject5K"
    (folder / "masks_train" / "a.png").unlink()
    with pytest.warns(UserWarning, match=r"ThinObject5K-TR: 1 left out, such as a, whose image is there alone"):
        assert HqSegSource(tree).size == before - 1
    (folder / "images_train" / "a.jpg").unlink()
    (tree / "cascade_psp" / "fss_all" / "b.c.jpg").unlink()
    with pytest.warns(UserWarning, match=r"fss_all: 1 left out, such as b\.c, whose mask is there alone"):
        HqSegSource(tree)


def test_an_unknown_part_is_named(tree):
    with pytest.raises(ValueError, match=r"no part 'DUTS'; there is DIS5K-TR, .*MSRA_10K"):
        HqSegSource(tree, parts=["DUTS"])


def test_damage_is_an_os_error_that_names_the_file(tree):
    path = tree / "cascade_psp" / "ecssd" / "a.jpg"
    path.write_bytes(path.read_bytes()[:-300])
    with pytest.raises(OSError, match=r"ecssd/a\.jpg cannot be decoded"):
        HqSegSource(tree, parts=["ecssd"]).load(0)
