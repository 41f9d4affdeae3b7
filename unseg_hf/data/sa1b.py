"""Images and masks in the layout that SA-1B is published in: tars of `sa_N.jpg` and `sa_N.json`, local or streamed.

Each json holds `annotations`, and each of them `segmentation` (`size`: height and width; `counts`: COCO's compressed
run-length code), `area` in pixels, `predicted_iou` and `stability_score`. `unseg_hf.data.sa1b_writer` makes such tars.
"""

import functools
import io
import itertools
import json
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from types import ModuleType
from typing import Any

import numpy as np
from PIL import Image

from ..image_files import formats_of_data
from .records import Record, decoding
from .sa1b_tars import Pair, Shard, count_pairs, find_shards, is_remote, read_member, read_pairs, shown

LOCAL_BUFFER, STREAM_BUFFER = 1000, 256


def run_length_coder() -> ModuleType:
    """pycocotools' `mask`.

    Raises:
        ImportError: it is not installed.
    """
    try:
        from pycocotools import mask
    except ImportError as error:
        raise ImportError("run-length codes and polygons need pycocotools: pip install 'unseg-hf[layouts]'") from error
    return mask


class RleMasks(Sequence):
    """Masks that are decoded when they are asked for.

    Args:
        name: what an error calls them.
        codes: COCO's compressed run-length codes, all of one size.
        areas: pixels of each, as the annotations have them.
    """

    def __init__(self, name: str, codes: Sequence[dict[str, Any]], areas: Sequence[int]):
        self.name, self.codes, self.areas = name, codes, areas

    def __len__(self) -> int:
        return len(self.codes)

    def __getitem__(self, index: int) -> np.ndarray:
        """`(height, width)` bool.

        Raises:
            OSError: the code is damaged.
        """
        coder, code = run_length_coder(), self.codes[index]
        try:
            mask = coder.decode(code).astype(bool)
        except ValueError as error:
            raise OSError(f"{self.name}: a mask's 'counts' are damaged ({error}); write the tar again") from error
        # What a code that is too short does not reach, the decoder leaves as it finds it in memory. Areas may be
        # counted in another way than in pixels; then a code that is whole is the one that its mask has.
        if mask.sum() != self.areas[index] and coder.encode(np.asfortranarray(mask)) != _bytes(code):
            raise OSError(f"{self.name}: a mask's 'counts' end before the image does; write the tar again")
        return mask


def _bytes(code: dict[str, Any]) -> dict[str, Any]:
    return {"size": list(code["size"]), "counts": code["counts"].encode()}


@dataclass(frozen=True)
class Sa1bSource:
    """SA-1B, a part of it, or any tars of its layout, as a source of `unseg_hf.data.interactive`.

    A pass goes through the tars in random order and shuffles their pairs in a buffer. Streamed tars are dealt to the
    processes; where they are fewer than processes, and of local tars, each process leaves out the others' pairs.

    Args:
        location: a tar, a pattern with `*` for several, or a list of them. Tars are local, `http(s)://` (no patterns),
            `hf://datasets/user/name/path/*.tar`, or what else fsspec opens. A list is a `.txt` or `.tsv` file with a
            location a line, or a name, a tab and a location as in Meta's `file_name  cdn_link`. Local tars must not be
            compressed. Remote ones are streamed anew in each pass, and a pass that is entered in its middle downloads
            what comes before.
        weight: its share in a mixture, see [`Source`].
        buffer_size: pairs in the shuffle buffer; by default 1000 where all tars are local, and 256 (in SA-1B about
            256 MB) where one is streamed, whose buffer holds the encoded images and annotations.
        min_area: masks with a smaller share of the image are left out, in [0, 1].
        max_area: masks with a larger share of the image are left out, in [0, 1].
        min_predicted_iou: masks with a lower `predicted_iou` are left out.
        min_stability: masks with a lower `stability_score` are left out.

    Raises:
        ValueError: an argument is out of its range.
        ImportError: pycocotools is not installed.
    """

    location: str
    weight: float | None = None
    buffer_size: int | None = None
    min_area: float = 0.0
    max_area: float = 1.0
    min_predicted_iou: float = 0.0
    min_stability: float = 0.0

    def __post_init__(self):
        if not 0 <= self.min_area < self.max_area <= 1:
            raise ValueError(
                f"min_area={self.min_area}, max_area={self.max_area}: shares of the image, "
                "0 <= min_area < max_area <= 1"
            )
        if self.buffer_size is not None and self.buffer_size < 1:
            raise ValueError(
                f"buffer_size={self.buffer_size}: must be at least 1 (which keeps the pairs of a tar in order)"
            )
        run_length_coder()

    @property
    def name(self) -> str:
        return shown(self.location)

    @functools.cached_property
    def shards(self) -> tuple[Shard, ...]:
        """The tars, in stored order; looked up once.

        Raises:
            FileNotFoundError: there are none.
            ValueError: the list has a line that is none of its kind.
        """
        return tuple(find_shards(self.location))

    @functools.cached_property
    def size(self) -> int | None:
        """Number of pairs, counted in the headers of local tars (seconds for one of SA-1B's); None for streams.

        Raises:
            FileNotFoundError: there are no tars.
            ValueError: as in `order`.
        """
        if any(map(is_remote, self.shards)):
            return None
        return sum(map(count_pairs, self.shards))

    def order(self, random: np.random.Generator, rank: int, world: int) -> Iterator[Pair]:
        """See [`Source`].

        Raises:
            ValueError: a tar is damaged or holds no pairs, or a member has no partner beside it; names both.
            OSError: a tar cannot be opened, or its connection broke.
        """
        shards = [self.shards[index] for index in random.permutation(len(self.shards))]
        # Pairs of local tars are dealt one by one, so that every process has its share; a stream is read by one.
        dealt = len(shards) >= world and any(map(is_remote, shards))
        pairs = itertools.chain.from_iterable(map(read_pairs, shards[rank::world] if dealt else shards))
        if not dealt:
            pairs = itertools.islice(pairs, rank, None, world)
        default = STREAM_BUFFER if any(map(is_remote, shards)) else LOCAL_BUFFER
        return _shuffled(pairs, self.buffer_size or default, random)

    def load(self, handle: Pair) -> Record:
        """The decoded image, and the masks that pass the filters.

        Raises:
            OSError: the image or its annotations are damaged, or these lack a field or are not of the image's size.
        """
        name = f"{handle.tar}/{handle.image.name}"
        data = read_member(handle.tar, handle.image)
        with decoding(name):
            image = Image.open(io.BytesIO(data), formats=formats_of_data())
            image.load()
        return Record(name, image, self._masks(handle, image))

    def _masks(self, handle: Pair, image: Image.Image) -> RleMasks:
        name = f"{handle.tar}/{handle.annotations.name}"
        try:
            described = json.loads(read_member(handle.tar, handle.annotations))
        except ValueError as error:
            raise OSError(f"{name} is damaged json: {error}") from error
        codes, areas = [], []
        try:
            for annotation in described["annotations"]:
                area, code = annotation["area"], annotation["segmentation"]
                quality = annotation["predicted_iou"], annotation["stability_score"]
                if not isinstance(code["counts"], str):
                    raise TypeError("'counts' must be a string, COCO's compressed run-length code")
                if list(code["size"]) != [image.height, image.width]:
                    raise OSError(
                        f"{name}: segmentation 'size' is {code['size']}, the image's [height, width] is "
                        f"{[image.height, image.width]}; the json belongs to another image, or the image was resized"
                    )
                share = area / (image.height * image.width)
                good = quality[0] >= self.min_predicted_iou and quality[1] >= self.min_stability
                if area and self.min_area <= share <= self.max_area and good:
                    codes.append(code)
                    areas.append(area)
        except KeyError as error:
            raise OSError(f"{name} has no field {error}; write it as SA-1B does, see {__name__}") from error
        except TypeError as error:
            raise OSError(f"{name} is not laid out as SA-1B's: {error}; see {__name__}") from error
        return RleMasks(name, codes, areas)


def _shuffled(items: Iterable[Any], size: int, random: np.random.Generator) -> Iterator[Any]:
    buffer = []
    for item in items:
        if len(buffer) < size:
            buffer.append(item)
            continue
        place = int(random.integers(size))
        yield buffer[place]
        buffer[place] = item
    random.shuffle(buffer)
    while buffer:
        yield buffer.pop()
