"""One line of text names a source and its options."""

import sys
import types
from dataclasses import dataclass

import pytest

from unseg_hf.data import hf_datasets, hqseg, sources
from unseg_hf.data.sources import parse_source


@dataclass
class Tars:
    """Stands for `Sa1bSource`: keeps its arguments."""

    location: str
    weight: float | None = None
    buffer_size: int | None = None
    min_area: float = 0.0


@dataclass
class Rows:
    """Stands for `DatasetSource`."""

    location: str
    split: str = "train"
    mask_column: str = "mask"
    ignore: tuple[int, ...] = ()
    weight: float | None = None


@dataclass
class Tree:
    """Stands for `HqSegSource`."""

    root: str
    parts: tuple[str, ...] | None = None
    weight: float | None = None


@pytest.fixture
def stand_ins(monkeypatch):
    monkeypatch.setitem(sys.modules, "unseg_hf.data.sa1b", types.SimpleNamespace(Sa1bSource=Tars))
    monkeypatch.setattr(hf_datasets, "DatasetSource", Rows)
    monkeypatch.setattr(hqseg, "HqSegSource", Tree)


@pytest.mark.parametrize(
    ("spec", "expected"),
    [
        ("a/train.parquet", Rows("a/train.parquet")),
        ("user/name,weight=2", Rows("user/name", weight=2.0)),
        ("dataset:a,b c.parquet,split=test", Rows("a,b c.parquet", split="test")),
        ("dataset:odd:name", Rows("odd:name")),
        (r"C:\data\train.parquet", Rows(r"C:\data\train.parquet")),
        ("a,mask_column=label,ignore=0+255", Rows("a", mask_column="label", ignore=(0, 255))),
        ("a,ignore=255", Rows("a", ignore=(255,))),
        ("a,split=train[:10%]", Rows("a", split="train[:10%]")),
        ("a=b,Some,weight=1e-1", Rows("a=b,Some", weight=0.1)),
        ("hqseg:data", Tree("data")),
        ("hqseg:data,parts=DIS5K-TR+fss_all", Tree("data", parts=("DIS5K-TR", "fss_all"))),
        ("sa1b:tars/*.tar,min_area=0.01,buffer_size=5", Tars("tars/*.tar", min_area=0.01, buffer_size=5)),
        (
            "sa1b:https://host:8/x.tar?Date=1,2&Sig=a=b,weight=3",
            Tars("https://host:8/x.tar?Date=1,2&Sig=a=b", weight=3.0),
        ),
        ("sa1b:hf://datasets/user/name/*.tar", Tars("hf://datasets/user/name/*.tar")),
        ("hf://datasets/user/name", Rows("hf://datasets/user/name")),
    ],
)
def test_kind_location_and_options(stand_ins, spec, expected):
    assert parse_source(spec) == expected


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("a,wieght=2", r"no option 'wieght' for dataset; there is split, mask_column, ignore, weight$"),
        ("hqseg:a,split=b", r"no option 'split' for hqseg; there is parts, weight$"),
        ("a,location=b", "no option 'location'"),
        ("a,weight=much", "weight='much' is no number"),
        ("sa1b:a,buffer_size=1.5", "buffer_size='1.5' is no whole number"),
        ("a,ignore=0+void", "ignore='0.void' is no list of whole numbers, such as 0.255"),
        ("a,weight=1,weight=2", "weight is given twice"),
        ("coco:a", "no kind 'coco'; there is dataset, hqseg, sa1b"),
        ("", "names no location"),
        ("sa1b:,weight=2", "names no location"),
    ],
)
def test_mistakes_are_named(stand_ins, spec, message):
    with pytest.raises(ValueError, match=message):
        parse_source(spec)


def test_real_sources_take_the_options_that_the_text_names(tmp_path):
    text = sources.__doc__
    for kind in ("dataset", "hqseg", "sa1b"):
        with pytest.raises(ValueError, match="no option 'x'") as caught:
            parse_source(f"{kind}:{tmp_path},x=1")
        for option in str(caught.value).split("there is ")[1].split(", "):
            assert option in text
    with pytest.raises(FileNotFoundError, match=r"DIS5K/DIS-TR/im: no such folder"):
        parse_source(f"hqseg:{tmp_path}")
