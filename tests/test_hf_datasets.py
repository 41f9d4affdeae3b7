"""Data sets of every layout become the same records."""

import io
import itertools
import pickle

import datasets
import numpy as np
import pytest
from datasets import Dataset, DatasetDict, Features, List, Value
from datasets import Image as ImageFeature
from PIL import Image

from unseg_hf.data.hf_datasets import DatasetSource


@pytest.fixture(autouse=True)
def cache(tmp_path_factory, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path_factory.mktemp("cache"))


LABELS = np.repeat(np.array([[0, 1, 7], [7, 255, 255]], np.uint8), 4, axis=1)


def png(array, mode=None):
    buffer = io.BytesIO()
    image = array if isinstance(array, Image.Image) else Image.fromarray(array)
    (image.convert(mode) if mode else image).save(buffer, "PNG")
    return buffer.getvalue()


def photo(shade=0, size=(12, 2)):
    return Image.new("RGB", size, (shade, 0, 0))


def parquet(folder, masks, images=None, **columns):
    """Masks and images are encoded files."""
    images = images or [png(photo(i)) for i in range(len(masks))]
    rows = {"image": images, "mask": masks, **columns}
    path = folder / "train.parquet"
    Dataset.from_dict(rows).to_parquet(path)
    return path


def one(folder, mask, **options):
    return DatasetSource(parquet(folder, [mask]), **options).load(0)


def test_no_program_is_started_for_an_image(tmp_path):
    eps = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 12 2\n%%EndComments\nshowpage\n"
    source = DatasetSource(parquet(tmp_path, [png(photo())], images=[eps]))
    with pytest.raises(OSError, match="cannot identify image file"):
        source.load(0)
    other = io.BytesIO()
    photo(7).save(other, "PPM")
    path = parquet(tmp_path, [png(photo())], images=[other.getvalue()])
    assert np.array_equal(np.asarray(DatasetSource(path).load(0).image), np.asarray(photo(7)))


class TestMasks:
    @pytest.mark.parametrize(
        ("masks", "ignore", "values"),
        [
            ("binary", (), [(1, 7, 255)]),
            ("binary", (255, 7), [(1,)]),
            ("regions", (), [(0,), (1,), (7,), (255,)]),
            ("instances", (255,), [(1,), (7,)]),
            ("classes", (255,), [(0,), (1,), (7,)]),
        ],
    )
    def test_label_values_become_masks(self, tmp_path, masks, ignore, values):
        record = one(tmp_path, png(LABELS), masks=masks, ignore=ignore)
        expected = [np.isin(LABELS, of_one) for of_one in values]
        assert len(record.masks) == len(expected)
        for mask, right in zip(record.masks, expected, strict=True):
            assert mask.dtype == bool
            np.testing.assert_array_equal(mask, right)
        assert record.class_ids == ((0, 1, 7) if masks == "classes" else None)

    def test_palette_images_count_by_their_indices(self, tmp_path):
        image = Image.fromarray(LABELS).convert("P")
        image.putdata(LABELS.flatten().tolist())
        image.putpalette([255, 255, 255, 0, 0, 0] + [9, 9, 9] * 254)
        record = one(tmp_path, png(image), masks="classes")
        assert record.class_ids == (0, 1, 7, 255)
        np.testing.assert_array_equal(record.masks[1], LABELS == 1)

    def test_sixteen_bits_are_kept(self, tmp_path):
        assert one(tmp_path, png(LABELS.astype(np.uint16) * 257), masks="classes").class_ids == (0, 257, 1799, 65535)

    @pytest.mark.parametrize("mode", ["1", "LA", "RGB", "RGBA"])
    def test_black_and_white_may_be_saved_in_any_mode(self, tmp_path, mode):
        mask = (LABELS == 7).astype(np.uint8) * 255
        np.testing.assert_array_equal(one(tmp_path, png(mask, mode)).masks[0], mask > 0)

    def test_jpeg_masks_are_cut_in_the_middle(self, tmp_path):
        mask = np.kron(np.eye(2, dtype=np.uint8), np.ones((37, 37), np.uint8)) * 255
        buffer = io.BytesIO()
        Image.fromarray(mask).save(buffer, "JPEG", quality=60)
        path = parquet(tmp_path, [buffer.getvalue()])
        assert len(np.unique(Image.open(buffer))) > 2
        np.testing.assert_array_equal(DatasetSource(path).load(0).masks[0], mask > 0)
        with pytest.raises(ValueError, match="row 0 of column 'mask' is a JPEG"):
            DatasetSource(path, masks="regions").load(0)

    def test_colours_are_refused_with_the_column_and_the_fix(self, tmp_path):
        colours = np.stack([LABELS, LABELS // 2, LABELS], -1)
        with pytest.raises(ValueError, match=r"row 0 of column 'mask': a mask of kind RGB with colours or fractions"):
            one(tmp_path, png(colours))

    def test_a_mask_that_is_its_alpha_is_read_as_in_files(self, tmp_path):
        alpha = (LABELS == 7).astype(np.uint8) * 255
        buffer = io.BytesIO()
        Image.merge("LA", [Image.new("L", alpha.shape[::-1], 9), Image.fromarray(alpha)]).save(buffer, "PNG")
        np.testing.assert_array_equal(one(tmp_path, buffer.getvalue()).masks[0], LABELS == 7)

    def test_lists_hold_a_mask_each(self, tmp_path):
        features = Features({"image": ImageFeature(), "mask": List(ImageFeature())})
        masks = [Image.fromarray((value == LABELS).astype(np.uint8)) for value in (1, 7)]
        path = tmp_path / "lists.parquet"
        Dataset.from_dict({"image": [photo(), photo()], "mask": [masks, []]}, features=features).to_parquet(path)
        source = DatasetSource(path)
        listed = source.load(0).masks
        assert len(listed) == 2
        np.testing.assert_array_equal(listed[1], LABELS == 7)
        assert len(source.load(1).masks) == 0
        with pytest.raises(ValueError, match=r"masks='regions' of .*lists of masks.*masks=binary"):
            DatasetSource(path, masks="regions")

    def test_a_row_without_a_mask_has_none(self, tmp_path):
        source = DatasetSource(parquet(tmp_path, [png(LABELS), None]))
        assert len(source.load(1).masks) == 0


class TestLocations:
    def test_image_folder_with_metadata(self, tmp_path):
        lines = ["file_name,mask_file_name"]
        (tmp_path / "train").mkdir()
        for i in range(3):
            photo(50 * i).save(tmp_path / "train" / f"{i}.png")
            Image.fromarray(LABELS * (i > 0)).save(tmp_path / "train" / f"mask{i}.png")
            lines.append(f"{i}.png,mask{i}.png")
        (tmp_path / "train" / "metadata.csv").write_text("\n".join(lines))
        source = DatasetSource(tmp_path)
        assert source.size == 3
        assert [source.load(i).image.getpixel((0, 0))[0] for i in range(3)] == [0, 50, 100]
        assert [source.load(i).masks[0].any() for i in range(3)] == [False, True, True]

    def test_folder_of_parquet_files_and_their_splits(self, tmp_path):
        for split, count in (("train", 3), ("test", 2)):
            parquet(tmp_path, [png(LABELS)] * count).rename(tmp_path / f"{split}-00000-of-00001.parquet")
        assert DatasetSource(tmp_path).size == 3
        assert DatasetSource(tmp_path, split="test").size == 2
        assert DatasetSource(tmp_path, split="train[:2]").size == 2
        with pytest.raises(ValueError, match=r"Unknown split .*val.*train.*test"):
            DatasetSource(tmp_path, split="val")

    def test_saved_data_sets(self, tmp_path):
        features = Features({"image": ImageFeature(), "mask": ImageFeature()})
        rows = {"image": [photo()] * 2, "mask": [Image.fromarray(LABELS)] * 2}
        saved = Dataset.from_dict(rows, features=features)
        saved.with_format("numpy").save_to_disk(tmp_path / "single")
        DatasetDict({"train": saved, "val": saved.select([0])}).save_to_disk(tmp_path / "dict")
        assert DatasetSource(tmp_path / "single").load(1).masks[0].any()
        assert DatasetSource(tmp_path / "dict", split="val").size == 1
        with pytest.raises(ValueError, match="no split 'test'; there is train, val"):
            DatasetSource(tmp_path / "dict", split="test")
        with pytest.raises(ValueError, match="no split 'test'; there is train"):
            DatasetSource(tmp_path / "single", split="test")

    def test_paths_in_a_parquet_file_are_opened(self, tmp_path):
        photo(9).save(tmp_path / "photo.png")
        Image.fromarray(LABELS).save(tmp_path / "labels.png")
        path = parquet(tmp_path, [str(tmp_path / "labels.png")], [str(tmp_path / "photo.png")])
        assert DatasetSource(path).load(0).image.getpixel((0, 0)) == (9, 0, 0)

    def test_a_hub_id_is_looked_up_there(self, tmp_path, monkeypatch):
        path = parquet(tmp_path, [png(LABELS)])
        asked = []

        def load_dataset(*args, **options):
            asked.append((args, options))
            return Dataset.from_parquet(str(path))

        monkeypatch.setattr(datasets, "load_dataset", load_dataset)
        source = DatasetSource("someone/photos", split="test", config="small")
        assert asked == [(("someone/photos", "small"), {"split": "test"})]
        assert source.name == "someone/photos (test)"

    def test_what_is_nowhere_is_named(self, tmp_path, monkeypatch):
        for location in ("no/where/at/all", "/no/where", "nowhere.parquet"):
            with pytest.raises(FileNotFoundError, match=f"{location}: no such parquet file.* Hub"):
                DatasetSource(location)
        (tmp_path / "rows.csv").write_text("image,mask")
        with pytest.raises(ValueError, match=r"rows\.csv: not a parquet file"):
            DatasetSource(tmp_path / "rows.csv")
        (tmp_path / "cut.parquet").write_bytes(b"PAR1")
        with pytest.raises(ValueError, match=r"cut\.parquet: Parquet"):
            DatasetSource(tmp_path / "cut.parquet")

        def offline(*args, **options):
            raise ConnectionError("Couldn't reach 'some/folder' on the Hub")

        monkeypatch.setattr(datasets, "load_dataset", offline)
        with pytest.raises(FileNotFoundError, match=r"some/folder: no such parquet file or folder.*Couldn't reach"):
            DatasetSource("some/folder")


class TestRecords:
    def test_columns_are_checked(self, tmp_path):
        path = parquet(tmp_path, [png(LABELS)], number=[3])
        with pytest.raises(ValueError, match=r"no column 'masks': name one of image, mask, number"):
            DatasetSource(path, mask_column="masks")
        with pytest.raises(ValueError, match=r"column 'number' of .* holds no images"):
            DatasetSource(path, mask_column="number")
        with pytest.raises(ValueError, match=r"masks='both'.*must be one of binary, regions"):
            DatasetSource(path, masks="both")

    def test_other_columns_give_the_images_and_the_name(self, tmp_path):
        path = parquet(tmp_path, [png(LABELS)] * 2, photo=[png(photo(1)), png(photo(2))], name=["first", None])
        source = DatasetSource(path, image_column="photo")
        assert [source.load(i).name for i in range(2)] == ["first", "row 1"]
        assert source.load(1).image.getpixel((0, 0)) == (2, 0, 0)

    def test_structs_of_bytes_without_a_feature_are_images(self, tmp_path):
        value = {"bytes": Value("binary"), "path": Value("string")}
        rows = {name: [{"bytes": png(array), "path": None}] for name, array in (("image", photo()), ("mask", LABELS))}
        path = tmp_path / "plain.parquet"
        Dataset.from_dict(rows, features=Features({"image": value, "mask": value})).to_parquet(path)
        assert DatasetSource(path).load(0).masks[0].sum() == (LABELS > 0).sum()

    def test_images_are_turned_upright(self, tmp_path):
        exif = Image.Exif()
        exif[0x0112] = 6
        buffer = io.BytesIO()
        photo(size=(2, 12)).save(buffer, "JPEG", exif=exif)
        assert DatasetSource(parquet(tmp_path, [png(LABELS)], [buffer.getvalue()])).load(0).image.size == (12, 2)

    def test_damage_is_an_os_error_that_names_the_row(self, tmp_path):
        whole = png(np.random.default_rng(0).integers(0, 256, (2, 12, 3), dtype=np.uint8))
        images = [whole, whole[:60], b"no image", whole[:-20] + b"\x00" * 20, None]
        source = DatasetSource(parquet(tmp_path, [png(LABELS)] * 5, images))
        source.load(0)
        for row in range(1, 5):
            with pytest.raises(OSError, match=f"row {row}: column 'image'"):
                source.load(row)
        source = DatasetSource(parquet(tmp_path, [b"nothing"]))
        with pytest.raises(OSError, match="row 0: column 'mask'"):
            source.load(0)

    def test_processes_share_a_pass(self, tmp_path):
        source = DatasetSource(parquet(tmp_path, [png(LABELS)] * 7))
        parts = [list(source.order(np.random.default_rng(3), rank, 3)) for rank in range(3)]
        assert [len(part) for part in parts] == [3, 2, 2]
        assert sorted(itertools.chain.from_iterable(parts)) == list(range(7))
        assert parts[0] != sorted(parts[0]) or parts[1] != sorted(parts[1])

    def test_a_pickled_source_gives_the_same_records(self, tmp_path):
        source = DatasetSource(parquet(tmp_path, [png(LABELS)] * 2), masks="instances")
        copy = pickle.loads(pickle.dumps(source))
        assert copy.load(1).image.tobytes() == source.load(1).image.tobytes()
        assert len(copy.load(1).masks) == 3
