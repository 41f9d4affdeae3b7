"""Sources of training images, written as [KIND:]LOCATION[,OPTION=VALUE]...

kind     location                                        options, beside weight
dataset  a parquet file, a folder or a Hub id            split, config, image_column, mask_column, ignore,
         (the default kind)                              masks (binary, regions, instances or classes)
hqseg    the unpacked folder of HQSeg-44K                parts
sa1b     a tar of SA-1B, a pattern such as "data/*.tar", buffer_size, min_area, max_area, min_predicted_iou,
         or a list of tars (.txt, .tsv); local, https:// min_stability
         or hf://datasets/user/name/*.tar

A list is written with +, as in ignore=0+255. Either every source of a mixture has a weight, or none has.

    ecssd/train.parquet
    user/name,mask_column=label,masks=classes,ignore=0+255,weight=2
    hqseg:data/hqseg44k,parts=DIS5K-TR+ThinObject5K-TR,weight=1
    sa1b:data/sa_*.tar,min_predicted_iou=0.9,weight=1
"""

import inspect
import re
import types
import typing
from collections.abc import Callable, Sequence
from typing import Any

from .records import Source

# Two letters at least, and no //: a drive of Windows and the start of a URL are no kinds.
_KIND = re.compile(r"(?:([a-z0-9_]{2,}):(?!//))?(.*)", re.DOTALL)
_OPTIONS = re.compile(r"(.*?)((?:,[a-z_]+=[^,]*)*)", re.DOTALL)


def parse_source(spec: str) -> Source:
    """The source of a line such as `hqseg:data/hqseg44k,weight=0.5`; the module's text says what there is.

    Raises:
        ValueError: an unknown kind or option, a value of the wrong type, or what the source finds wrong.
        FileNotFoundError: there is nothing at the location.
    """
    kind, rest = _KIND.fullmatch(spec).groups()
    build = _kind(kind or "dataset", spec)
    location, options = _OPTIONS.fullmatch(rest).groups()
    if not location:
        raise ValueError(f"{spec!r} names no location; write [KIND:]LOCATION[,OPTION=VALUE]...")
    annotations = {name: p.annotation for name, p in inspect.signature(build, eval_str=True).parameters.items()}
    del annotations[next(iter(annotations))]  # the location itself
    arguments: dict[str, Any] = {}
    for name, _, text in (option.partition("=") for option in options.split(",")[1:]):
        if name not in annotations:
            there_is = ", ".join(annotations)
            raise ValueError(f"{spec!r}: no option {name!r} for {kind or 'dataset'}; there is {there_is}")
        if name in arguments:
            raise ValueError(f"{spec!r}: {name} is given twice")
        try:
            arguments[name] = _converted(text, annotations[name])
        except ValueError:
            raise ValueError(f"{spec!r}: {name}={text!r} is no {_described(annotations[name])}") from None
    return build(location, **arguments)


def _kind(kind: str, spec: str) -> Callable[..., Source]:
    if kind == "dataset":
        from .hf_datasets import DatasetSource

        return DatasetSource
    if kind == "hqseg":
        from .hqseg import HqSegSource

        return HqSegSource
    if kind == "sa1b":
        from .sa1b import Sa1bSource

        return Sa1bSource
    raise ValueError(f"{spec!r}: no kind {kind!r}; there is dataset, hqseg, sa1b (a path with a colon: dataset:PATH)")


def _plain(annotation: Any) -> tuple[type, bool]:
    """The type of a value, or of the parts of a list, and whether it is a list."""
    if typing.get_origin(annotation) in (types.UnionType, typing.Union):
        annotation = next(choice for choice in typing.get_args(annotation) if choice is not types.NoneType)
    if typing.get_origin(annotation) in (tuple, Sequence):
        return typing.get_args(annotation)[0], True
    return annotation, False


def _converted(text: str, annotation: Any) -> Any:
    plain, several = _plain(annotation)
    return tuple(plain(part) for part in text.split("+")) if several else plain(text)


def _described(annotation: Any) -> str:
    plain, several = _plain(annotation)
    name = {int: "whole number", float: "number"}.get(plain, plain.__name__)
    return f"list of {name}s, such as 0+255" if several else name
