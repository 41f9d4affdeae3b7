"""Processes that do part of a command's work, and those that would be in each other's way."""

import contextlib
import multiprocessing
import os
import signal
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None


@contextlib.contextmanager
def alone(output: Path, held: str = ".") -> Iterator[None]:
    """Keep a folder to one process at a time, until it ends, however it does.

    Args:
        output: the folder.
        held: what in it is locked, the folder itself by default; NFS gives locks to those alone who may write a file.

    Raises:
        ValueError: another process has it.
    """
    path = output / held
    file = os.open(path, os.O_RDONLY if path.is_dir() else os.O_RDWR) if fcntl is not None else None
    try:
        if file is not None:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError as error:
                raise ValueError(f"{output}: another run is writing there; wait until it ends") from error
            except OSError:
                pass  # a file system without locks
        yield
    finally:
        if file is not None:
            os.close(file)


@contextlib.contextmanager
def when_asked_to_end(handler: Callable[[int, Any], Any]) -> Iterator[None]:
    """Meanwhile a request to end, or a terminal that is closed, calls a handler of signals; in the main thread alone,
    and not for what is ignored, as `nohup` has closed terminals."""
    names = ("SIGTERM", "SIGHUP") if threading.current_thread() is threading.main_thread() else ()
    numbers = [getattr(signal, name) for name in names if hasattr(signal, name)]  # Windows has one
    before = {number: signal.getsignal(number) for number in numbers if signal.getsignal(number) != signal.SIG_IGN}
    for number in before:
        signal.signal(number, handler)
    try:
        yield
    finally:
        for number, earlier in before.items():
            signal.signal(number, earlier)


def end_with_parent() -> None:
    """In a process that `multiprocessing` started: end when the one that started it has ended.

    Else the workers of a command that was killed would wait for work for ever, or write beside the next run.
    """
    threading.Thread(target=_end, args=(multiprocessing.parent_process(),), daemon=True).start()


def _end(parent) -> None:
    parent.join()
    os._exit(1)
