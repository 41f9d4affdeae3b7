"""Training samples: what they show, what they depend on, and what happens to records that are no use."""

import io
import pickle
import warnings
from collections import Counter

import datasets
import numpy as np
import pytest
import torch
from datasets import Dataset, Features, List
from datasets import Image as ImageFeature
from PIL import Image

from unseg_hf.data.hf_datasets import DatasetSource
from unseg_hf.data.interactive import InteractiveSegmentation


@pytest.fixture(scope="module", autouse=True)
def cache(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path_factory.mktemp("cache"))
        yield


def png(array):
    buffer = io.BytesIO()
    Image.fromarray(array).save(buffer, "PNG")
    return buffer.getvalue()


def disc(x, y, size=64, radius=12):
    grid = np.mgrid[:size, :size]
    return ((grid[0] - y) ** 2 + (grid[1] - x) ** 2 < radius**2).astype(np.uint8)


def write(path, images, masks, **columns):
    Dataset.from_dict({"image": images, "mask": masks, **columns}).to_parquet(path)
    return str(path)


@pytest.fixture(scope="module")
def discs(tmp_path_factory):
    """Twelve pictures of a disc on a gradient, with binary masks and with region maps."""
    images, masks, regions = [], [], []
    for i in range(12):
        mask = disc(x=20 + 2 * i, y=44 - 2 * i)
        shade = np.mgrid[:64, :64][1] * 2 + 10 * i
        picture = np.stack([shade, shade // 2, 200 - shade], -1) + mask[..., None] * 30
        images.append(png(np.clip(picture, 0, 255).astype(np.uint8)))
        masks.append(png(mask))
        regions.append(png(mask + (np.mgrid[:64, :64][0] > 32).astype(np.uint8) * 2))
    return write(tmp_path_factory.mktemp("data") / "discs.parquet", images, masks, regions=regions)


@pytest.fixture
def plain(tmp_path):
    """A function: a source of so many records, each a picture with a square in it."""

    def build(count, weight=None, name="plain"):
        square = np.zeros((16, 16), np.uint8)
        square[4:12, 4:12] = 1
        rows = [png(np.full((16, 16, 3), i, np.uint8)) for i in range(count)]
        names = [f"{name} {i}" for i in range(count)]
        path = write(tmp_path / f"{name}.parquet", rows, [png(square)] * count, name=names)
        return DatasetSource(path, weight=weight)

    return build


def draws(data, epoch=0, batch_size=1, **share):
    return [draw for batch in data.batches(epoch, batch_size, **share) for draw in batch]


def same(a, b):
    return a["name"] == b["name"] and all(torch.equal(a[key], b[key]) for key in ("image", "mask", "inside"))


class TestSamples:
    def test_images_and_masks_move_together(self, discs):
        data = InteractiveSegmentation([DatasetSource(discs)], 48, (0.5, 1.5))
        for draw in draws(data):
            sample = data[draw]
            assert sample["image"].shape == (3, 48, 48)
            assert sample["mask"].shape == sample["inside"].shape == (48, 48)
            in_mask = sample["mask"] > 0
            assert in_mask.any()
            # Red minus twice green is 0 up to rounding outside, and 30 - 60 on the disc, where nothing is clipped.
            contrast = (sample["image"][0] - 2 * sample["image"][1]) * 255
            assert contrast[in_mask].median() < -20
            assert contrast[~in_mask].median() > -10

    def test_padding_is_marked(self, discs):
        data = InteractiveSegmentation([DatasetSource(discs)], 48, (0.5, 0.5))
        for draw in draws(data):
            sample = data[draw]
            assert sample["inside"][:24, :24].all()
            assert sample["inside"].sum() == 24 * 24
            outside = sample["inside"] == 0
            assert not sample["image"][:, outside].any()
            assert not sample["mask"][outside].any()
            assert sample["image"][:, :24, :24].any(0).all()  # black nowhere in the files

    def test_both_flips_and_many_scales_appear(self, discs):
        data = InteractiveSegmentation([DatasetSource(discs)], 48, (0.5, 1.5))
        samples = [data[draw] for epoch in range(3) for draw in draws(data, epoch)]
        # Red grows to the right in the files.
        grows = [s["image"][0, 0, 0] < s["image"][0, 0, 20] for s in samples]
        assert 8 < sum(grows) < 28
        assert len({int(s["inside"].sum()) for s in samples}) > 6

    def test_regions_become_masks_of_one_or_more_labels(self, discs):
        source = DatasetSource(discs, mask_column="regions", masks="regions")
        single = InteractiveSegmentation([source], 64, (1.0, 1.0))
        several = InteractiveSegmentation([source], 64, (1.0, 1.0), max_masks=3)
        area = [np.mean([d[draw]["mask"].mean().item() for draw in draws(d)]) for d in (single, several)]
        assert area[1] > area[0]

    def test_tiny_objects_are_never_lost(self, tmp_path):
        images, masks = [], []
        rng = np.random.default_rng(0)
        for shape in ((200, 300), (300, 40), (5, 257), (1, 90), (64, 64)):
            for corner in (True, False):
                mask = np.zeros(shape, np.uint8)
                mask[(-1, -1) if corner else (shape[0] // 2, shape[1] // 3)] = 255
                images.append(png(rng.integers(1, 256, (*shape, 3), dtype=np.uint8)))
                masks.append(png(mask))
        data = InteractiveSegmentation([DatasetSource(write(tmp_path / "t.parquet", images, masks))], 64, (0.1, 2.0))
        for epoch in range(20):
            for draw in draws(data, epoch):
                sample = data[draw]
                assert sample["mask"].any()
                assert (sample["inside"][sample["mask"] > 0] == 1).all()
                assert set(sample["mask"].unique().tolist()) <= {0.0, 1.0}

    def test_a_sample_depends_on_seed_and_draw_alone(self, discs):
        a, b = (InteractiveSegmentation([DatasetSource(discs)], 48, seed=5) for _ in range(2))
        order = draws(a)
        assert order == draws(b)
        for draw in order[3:]:
            b[draw]
        assert same(a[order[2]], b[order[2]])
        assert same(a.__getitems__(order[:4])[2], b[order[2]])
        assert not same(a[order[2]], a[order[2]._replace(epoch=1)])
        assert not same(a[order[2]], InteractiveSegmentation([DatasetSource(discs)], 48, seed=6)[order[2]])
        assert order != draws(a, epoch=1)
        assert same(pickle.loads(pickle.dumps(a))[order[1]], a[order[1]])

    def test_workers_change_nothing(self, discs):
        data = InteractiveSegmentation([DatasetSource(discs)], 48)
        loaded = []
        for workers in (0, 2):
            loader = torch.utils.data.DataLoader(
                data, batch_sampler=list(data.batches(0, 3)), num_workers=workers, collate_fn=list
            )
            loaded.append([sample for batch in loader for sample in batch])
        assert len(loaded[0]) == 12
        assert all(same(a, b) for a, b in zip(*loaded, strict=True))
        pictures = {sample["image"].numpy().tobytes() for sample in loaded[1]}
        assert len(pictures) == 12


class TestPasses:
    def test_an_epoch_sees_every_record_once(self, plain):
        data = InteractiveSegmentation([plain(5), plain(3, name="other")], 16)
        assert len(data) == 8
        assert sorted((d.source, d.handle) for d in draws(data)) == [(0, i) for i in range(5)] + [
            (1, i) for i in range(3)
        ]

    @pytest.mark.parametrize("sizes", [(8,), (5, 3), (1, 1, 4), (7, 4, 1)])
    @pytest.mark.parametrize("world", [2, 4])
    def test_processes_see_disjoint_records_and_together_each_once(self, plain, sizes, world):
        data = InteractiveSegmentation([plain(size, name=f"s{i}") for i, size in enumerate(sizes)], 16)
        parts = [draws(data, epoch=2, rank=rank, world=world) for rank in range(world)]
        assert {len(part) for part in parts} == {sum(sizes) // world}
        seen = [(d.source, d.handle) for part in parts for d in part]
        assert len(set(seen)) == len(seen) == sum(sizes) // world * world
        assert len({d.number for part in parts for d in part}) == len(seen)

    def test_all_processes_have_equally_many_full_batches(self, plain):
        data = InteractiveSegmentation([plain(11)], 16)
        batches = [list(data.batches(0, 2, rank=rank, world=2)) for rank in range(2)]
        assert [len(part) for part in batches] == [2, 2]
        assert all(len(batch) == 2 for part in batches for batch in part)

    @pytest.mark.parametrize("weights", [(None, None), (1.0, 3.0)])
    def test_skipping_goes_on_with_the_same_batches(self, plain, weights):
        sources = [plain(9, weights[0]), plain(7, weights[1], name="other")]
        data = InteractiveSegmentation(sources, 16, epoch_size=40)
        for rank in range(2):
            whole = list(data.batches(3, 2, rank=rank, world=2))
            assert len(whole) == 10
            assert list(data.batches(3, 2, rank=rank, world=2, skip=6)) == whole[6:]
        assert list(data.batches(3, 2, skip=20)) == []

    def test_weighted_mixtures_draw_in_their_ratio(self, plain):
        data = InteractiveSegmentation([plain(4, 1.0), plain(20, 3.0, name="other")], 16, epoch_size=2000)
        drawn = draws(data)
        assert len(drawn) == 2000
        assert 400 < Counter(d.source for d in drawn)[0] < 600
        # A small source goes round and round: no record twice before all have been seen once.
        small = [d.handle for d in drawn if d.source == 0]
        assert all(sorted(small[i : i + 4]) == [0, 1, 2, 3] for i in range(0, 400, 4))

    def test_an_epoch_longer_than_the_data_goes_on(self, plain):
        data = InteractiveSegmentation([plain(3), plain(2, name="other")], 16, epoch_size=10)
        assert set(Counter((d.source, d.handle) for d in draws(data)).values()) == {2}

    def test_a_mixture_that_says_too_little_is_refused(self, plain):
        one, other = plain(2, 1.0), plain(2, name="other")
        with pytest.raises(ValueError, match=r"other\.parquet has no weight and another source has one"):
            InteractiveSegmentation([one, other], 16)
        with pytest.raises(ValueError, match=r"weights 1\.0, -2\.0 of the sources: each must be more than 0"):
            InteractiveSegmentation([one, plain(2, -2.0, name="third")], 16)
        with pytest.raises(ValueError, match="no sources of images"):
            InteractiveSegmentation([], 16)
        with pytest.raises(ValueError, match="epoch_size=-1"):
            InteractiveSegmentation([one], 16, epoch_size=-1)

    def test_streams_need_an_epoch_size(self, plain):
        stream = plain(4)
        stream.size = None
        with pytest.raises(ValueError, match=r"plain\.parquet is a stream.*epoch_size"):
            InteractiveSegmentation([stream], 16)

    def test_more_processes_than_images_are_refused(self, plain):
        data = InteractiveSegmentation([plain(1)], 16, epoch_size=4)
        with pytest.raises(ValueError, match="no records for process 1 of 2"):
            draws(data, rank=1, world=2)


class TestUselessRecords:
    @pytest.fixture
    def source(self, tmp_path):
        """A function: six records, the first ones replaced by what is given."""

        def build(images=(), masks=()):
            square = np.zeros((16, 16), np.uint8)
            square[4:12, 4:12] = 1
            good = png(np.full((16, 16, 3), 99, np.uint8))
            all_images = [*images, *[good] * (6 - len(images))]
            return DatasetSource(
                write(tmp_path / "six.parquet", all_images, [*masks, *[png(square)] * (6 - len(masks))])
            )

        return build

    def one_batch(self, source):
        data = InteractiveSegmentation([source], 16)
        (batch,) = data.batches(0, 6)
        return data.__getitems__(batch)

    def test_a_damaged_image_is_named_and_replaced(self, source):
        whole = png(np.full((16, 16, 3), 99, np.uint8))
        with pytest.warns(
            UserWarning, match=r"six\.parquet: left out, row 0: column 'image' cannot be decoded"
        ) as caught:
            samples = self.one_batch(source(images=[whole[:50]]))
        assert len(caught) == 1
        assert len(samples) == 6
        assert all("row 0" not in sample["name"] and sample["mask"].any() for sample in samples)
        # The one that came in for it is cropped anew.
        assert len({sample["name"] for sample in samples}) == 5

    def test_records_without_a_mask_are_named_and_replaced(self, source):
        empty = png(np.zeros((16, 16), np.uint8))
        with pytest.warns(UserWarning, match="no mask with a pixel") as caught:
            samples = self.one_batch(source(masks=[empty, None]))
        assert sorted(str(w.message).split(": ")[1] for w in caught) == [
            f"row {row} left out, it has no mask with a pixel in it" for row in range(2)
        ]
        assert all(sample["mask"].any() for sample in samples)

    def test_empty_masks_beside_others_are_passed_over(self, tmp_path):
        empty, full = (Image.new("L", (16, 16), value) for value in (0, 255))
        features = Features({"image": ImageFeature(), "mask": List(ImageFeature())})
        rows = {"image": [Image.new("RGB", (16, 16))] * 6, "mask": [[empty, empty, full]] * 6}
        Dataset.from_dict(rows, features=features).to_parquet(tmp_path / "lists.parquet")
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            samples = self.one_batch(DatasetSource(tmp_path / "lists.parquet"))
        assert all(sample["mask"].any() for sample in samples)

    def test_damage_in_a_list_of_masks_is_named_and_replaced(self, tmp_path):
        full = {"bytes": png(np.full((16, 16), 255, np.uint8)), "path": None}
        broken = {"bytes": b"nothing", "path": None}
        features = Features({"image": ImageFeature(), "mask": List(ImageFeature())})
        rows = {"image": [Image.new("RGB", (16, 16))] * 6, "mask": [[broken]] + [[full]] * 5}
        Dataset.from_dict(rows, features=features).to_parquet(tmp_path / "lists.parquet")
        with pytest.warns(UserWarning, match="left out, row 0: column 'mask' cannot be decoded"):
            samples = self.one_batch(DatasetSource(tmp_path / "lists.parquet"))
        assert len(samples) == 6

    def test_a_damaged_image_that_is_a_whole_batch_is_replaced_by_another(self, source):
        data = InteractiveSegmentation([source(images=[b"nothing"])], 16)
        batches = list(data.batches(0, 1))
        with pytest.warns(UserWarning, match="row 0: column 'image' cannot be decoded"):
            samples = [data.__getitems__(batch)[0] for batch in batches]
        assert len(samples) == 6
        assert not any("row 0" in sample["name"] for sample in samples)
        (damaged,) = (batch for batch in batches if batch[0].handle == 0)
        with pytest.warns(UserWarning, match="row 0"):
            again = [data.__getitems__(damaged)[0] for _ in range(2)]
        assert again[0]["name"] == again[1]["name"]
        assert torch.equal(again[0]["image"], again[1]["image"])

    def test_data_of_nothing_but_damage_are_an_error(self, source):
        with (
            pytest.warns(UserWarning, match="left out"),
            pytest.raises(ValueError, match=r"no usable record in a batch of 6 from .*six\.parquet"),
        ):
            self.one_batch(source(images=[b"nothing"] * 6))

    def test_a_mask_of_another_size_is_named_and_replaced(self, source):
        with pytest.warns(UserWarning, match=r"row 0 left out, its mask has shape \(8, 16\) and .* \(16, 16\)"):
            samples = self.one_batch(source(masks=[png(np.ones((8, 16), np.uint8))]))
        assert len(samples) == 6
        assert not any("row 0" in sample["name"] for sample in samples)

    def test_a_record_whose_masks_differ_in_size_is_named_and_replaced(self, tmp_path):
        masks = [[disc(20, 20, 64), disc(9, 9, 30)]] + [[disc(20, 20, 64)] * 2] * 5
        features = Features({"image": ImageFeature(), "mask": List(ImageFeature())})
        rows = {
            "image": [Image.new("RGB", (64, 64), "red")] * 6,
            "mask": [[Image.fromarray(m) for m in r] for r in masks],
        }
        Dataset.from_dict(rows, features=features).to_parquet(tmp_path / "six.parquet")
        data = InteractiveSegmentation([DatasetSource(str(tmp_path / "six.parquet"))], 16, max_masks=9)
        (batch,) = data.batches(0, 6)
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            assert len(data.__getitems__(batch)) == 6
        for one in caught:
            assert "row 0 has masks of shapes (64, 64), (30, 30)" in str(one.message) or "(30, 30), (64, 64)" in str(
                one.message
            )

    def test_an_image_of_fractions_is_named_and_replaced(self, source):
        buffer = io.BytesIO()
        Image.fromarray(np.full((16, 16), 0.5, np.float32)).save(buffer, "TIFF")
        with pytest.warns(UserWarning, match=r"six\.parquet: left out, the image: .*"):
            samples = self.one_batch(source(images=[buffer.getvalue()]))
        assert len(samples) == 6

    def test_sixteen_bit_grey_is_scaled_and_not_clipped(self, source):
        deep = png(np.linspace(0, 65535, 256).reshape(16, 16).astype(np.uint16))
        samples = self.one_batch(source(images=[deep] * 6))
        assert all(len(sample["image"].unique()) > 3 for sample in samples)  # and not white alone


def test_passes_of_an_epoch_have_orders_of_their_own(plain):
    drawn = [draw.handle for draw in draws(InteractiveSegmentation([plain(8)], 16, epoch_size=16))]
    assert drawn[:8] != drawn[8:]


def test_epochs_draw_their_sources_anew(plain):
    data = InteractiveSegmentation([plain(9, 1.0), plain(7, 1.0, name="other")], 16, epoch_size=40)
    assert [draw.source for draw in draws(data)] != [draw.source for draw in draws(data, epoch=1)]


@pytest.mark.parametrize("shape", [(40, 80), (90, 30)])
def test_stretched_images_fill_the_square(tmp_path, shape):
    mask = np.zeros(shape, np.uint8)
    mask[: shape[0] // 2, : shape[1] // 2] = 1
    path = write(tmp_path / "one.parquet", [png(np.full((*shape, 3), 99, np.uint8))] * 4, [png(mask)] * 4)
    data = InteractiveSegmentation([DatasetSource(path)], 32, (1.0, 1.0), stretch=True)
    for draw in draws(data):
        sample = data[draw]
        assert sample["inside"].all()
        assert sample["mask"][:16].sum() == sample["mask"].sum() == 16 * 16


def test_what_comes_in_for_a_damaged_record_is_cropped_anew(tmp_path):
    square = np.zeros((64, 64), np.uint8)
    square[20:40, 20:40] = 1
    image = np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)
    path = write(tmp_path / "two.parquet", [png(image), b"nothing"], [png(square)] * 2)
    data = InteractiveSegmentation([DatasetSource(path)], 32)
    (batch,) = data.batches(0, 2)
    with pytest.warns(UserWarning, match="row 1"):
        one, other = data.__getitems__(batch)
    assert one["name"] == other["name"]
    assert not torch.equal(one["image"], other["image"])


def test_one_to_max_masks_are_joined(tmp_path):
    labels = np.zeros((48, 48), np.uint8)
    labels[:16, :16], labels[16:32, 16:32], labels[32:, 32:] = 1, 2, 3
    path = write(tmp_path / "r.parquet", [png(np.full((48, 48, 3), 99, np.uint8))] * 40, [png(labels)] * 40)
    data = InteractiveSegmentation([DatasetSource(path, masks="regions", ignore=(0,))], 48, (1.0, 1.0), max_masks=3)
    counts = Counter(int(data[draw]["mask"].sum()) // 256 for draw in draws(data))
    assert set(counts) == {1, 2, 3}
    assert min(counts.values()) > 5
