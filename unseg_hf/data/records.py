"""What every source of images becomes: records of an image and its masks."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
from PIL import Image


@contextmanager
def decoding(what: str) -> Iterator[None]:
    """OSError that names `what`, for whatever goes wrong while an image is decoded, lack of memory aside.

    Pillow's readers meet damaged files with whatever their parsing raises.
    """
    try:
        yield
    except MemoryError:
        raise
    except Exception as error:
        raise OSError(f"{what} cannot be decoded ({error})") from error


@dataclass(frozen=True)
class Record:
    """An image and the masks of its objects.

    Args:
        name: what an error or a log line calls it; unique in its source.
        image: any mode; `unseg_hf.image_files.as_rgb8` is the user's.
        masks: each `(height, width)` bool, of the size of the image, made when it is asked for, which raises `OSError`
            where the mask is damaged; may be empty.
        class_ids: the class of each mask, where the source knows classes.
    """

    name: str
    image: Image.Image
    masks: Sequence[np.ndarray]
    class_ids: tuple[int, ...] | None = None


class Source(Protocol):
    """A data set that is read as records; see `unseg_hf.data.sources` for those there are.

    A pass over a source is split in two: `order` says, in one process and without decoding anything, which records
    come when; `load`, called in data loading workers, decodes one. So a pass can be entered in its middle at the price
    of its order alone, and no worker holds any state.

    Attributes:
        name: for errors, logs and model cards.
        weight: its share in a mixture, relative to the other sources'; None draws every record once an epoch.
        size: number of records, None where only reading it all would tell.
    """

    name: str
    weight: float | None
    size: int | None

    def order(self, random: np.random.Generator, rank: int, world: int) -> Iterator[Any]:
        """One shuffled pass over the part of process `rank` of `world`, as handles for `load`.

        Args:
            random: in the same state in every process.
            rank: of this process, from 0.
            world: number of processes; together they see every record once.

        Yields:
            Handles, picklable, small where the data lie on a disk.
        """
        ...

    def load(self, handle: Any) -> Record:
        """The record of a handle.

        Raises:
            OSError: the record cannot be read or decoded; others still can.
        """
        ...
