"""Processes that do part of a command's work, and those that would be in each other's way."""

import contextlib
import multiprocessing
import os
import threading
from collections.abc import Iterator
from pathlib import Path

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


def end_with_parent() -> None:
    """In a process that `multiprocessing` started: end when the one that started it has ended.

    Else the workers of a command that was killed would wait for work for ever, or write beside the next run.
    """
    threading.Thread(target=_end, args=(multiprocessing.parent_process(),), daemon=True).start()


def _end(parent) -> None:
    parent.join()
    os._exit(1)
