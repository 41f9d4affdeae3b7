"""Processes that do part of a command's work."""

import multiprocessing
import os
import threading


def end_with_parent() -> None:
    """In a process that `multiprocessing` started: end when the one that started it has ended.

    Else the workers of a command that was killed would wait for work for ever, or write beside the next run.
    """
    threading.Thread(target=_end, args=(multiprocessing.parent_process(),), daemon=True).start()


def _end(parent) -> None:
    parent.join()
    os._exit(1)
