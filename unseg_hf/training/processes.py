"""The Accelerator of a training script."""

import os

import torch
from accelerate import Accelerator


def build_accelerator(**options) -> Accelerator:
    """An Accelerator of all the processes that a launcher started, on CPUs as well, which accelerate has to be told.

    Args:
        options: of the [`Accelerator`].

    Raises:
        ValueError: the processes do not work together: each would train by itself, all into one folder.
    """
    accelerator = Accelerator(cpu=not torch.accelerator.is_available(), **options)
    started = int(os.environ.get("WORLD_SIZE", 1))
    if accelerator.num_processes != started:
        raise ValueError(
            f"{started} processes were started, and {accelerator.num_processes} work together on "
            f"{accelerator.device.type}: start one"
        )
    return accelerator
