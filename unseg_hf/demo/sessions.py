"""The opened photos that the server keeps, of all visitors."""

from __future__ import annotations

import secrets
import time
from collections import OrderedDict
from collections.abc import Hashable
from dataclasses import dataclass, field
from threading import Lock, Thread
from weakref import ref

from unseg_hf.demo.session import Marks, Photo
from unseg_hf.protection import Protected


@dataclass(frozen=True, eq=False)
class Session:
    """What the server keeps of a photo between two clicks."""

    photo: Photo
    marks: Marks
    protected: Protected | None = None  # until the pictures that take longer are there


@dataclass(eq=False)
class _Kept:
    """A session, when it was used last, and what was noted of it."""

    session: Session
    used: float = field(default_factory=time.monotonic)
    settings: Hashable | None = None


class Sessions:
    """Sessions by ids that nobody can guess; beyond `most` the ones not used for longest go, and all after a while.

    Args:
        most: how many are kept.
        seconds: how long one is kept that is not used. Gradio keeps the states of closed tabs for an hour.
    """

    def __init__(self, most: int, seconds: float):
        self._most, self._seconds = most, seconds
        self._kept: OrderedDict[str, _Kept] = OrderedDict()
        self._lock = Lock()
        Thread(target=_forget_now_and_then, args=(ref(self), max(1.0, seconds / 6)), daemon=True).start()

    def forget_old(self) -> None:
        """Drop the sessions that were not used for too long."""
        with self._lock:
            now = time.monotonic()
            for key in [key for key, kept in self._kept.items() if now - kept.used > self._seconds]:
                del self._kept[key]

    def note(self, key: str | None, settings: Hashable) -> None:
        """Keep what the page's settings are now: what is being made may have been asked for with others."""
        with self._lock:
            if key in self._kept:
                self._kept[key].settings = settings

    def settings(self, key: str | None) -> Hashable | None:
        """What was noted last; None if nothing was, or there is no such session."""
        with self._lock:
            return self._kept[key].settings if key in self._kept else None

    def add(self, session: Session) -> str:
        """Keep a session; its id."""
        key = secrets.token_urlsafe(16)
        with self._lock:
            self._kept[key] = _Kept(session)
            while len(self._kept) > self._most:
                self._kept.popitem(last=False)
        return key

    def find(self, key: str | None) -> Session | None:
        with self._lock:
            if key not in self._kept:
                return None
            self._kept.move_to_end(key)
            self._kept[key].used = time.monotonic()
            return self._kept[key].session

    def replace(self, key: str, session: Session) -> bool:
        """Put a session in the place of an earlier one; False, and nothing is kept, where that has gone meanwhile."""
        with self._lock:
            if key not in self._kept:
                return False
            self._kept[key].session = session
            return True

    def drop(self, key: str | None) -> None:
        with self._lock:
            self._kept.pop(key, None)


def _forget_now_and_then(sessions: ref[Sessions], seconds: float) -> None:
    while (kept := sessions()) is not None:
        kept.forget_old()
        del kept
        time.sleep(seconds)
