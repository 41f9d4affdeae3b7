"""The opened photos that the server keeps, of all visitors."""

from __future__ import annotations

import secrets
from collections import OrderedDict
from dataclasses import dataclass
from threading import Lock

from unseg_hf.demo.session import Marks, Photo
from unseg_hf.protection import Protected


@dataclass(frozen=True, eq=False)
class Session:
    """What the server keeps of a photo between two clicks."""

    photo: Photo
    marks: Marks
    protected: Protected | None = None  # until the pictures that take longer are there


class Sessions:
    """Sessions by ids that nobody can guess; beyond `most` the ones not used for longest go."""

    def __init__(self, most: int):
        self._most = most
        self._kept: OrderedDict[str, Session] = OrderedDict()
        self._lock = Lock()

    def add(self, session: Session) -> str:
        """Keep a session; its id."""
        key = secrets.token_urlsafe(16)
        with self._lock:
            self._kept[key] = session
            while len(self._kept) > self._most:
                self._kept.popitem(last=False)
        return key

    def find(self, key: str | None) -> Session | None:
        with self._lock:
            if key in self._kept:
                self._kept.move_to_end(key)
            return self._kept.get(key)

    def replace(self, key: str, session: Session) -> bool:
        """Put a session in the place of an earlier one; False, and nothing is kept, where that has gone meanwhile."""
        with self._lock:
            if key not in self._kept:
                return False
            self._kept[key] = session
            return True

    def drop(self, key: str | None) -> None:
        with self._lock:
            self._kept.pop(key, None)
