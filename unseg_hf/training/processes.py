"""The Accelerator of a training script."""

import os
from datetime import timedelta

import torch
from accelerate import Accelerator
from accelerate.utils import InitProcessGroupKwargs


def build_accelerator(**options) -> Accelerator:
    """An Accelerator of all the processes that a launcher started, on CPUs as well, which accelerate has to be told.

    A Mac's GPU is left alone: torch has no gradients there of images that are reduced with antialiasing.

    Args:
        options: of the [`Accelerator`].

    Raises:
        ValueError: the processes do not work together: each would train by itself, all into one folder; or a precision
            that [`check_precision`] refuses.
    """
    # The others wait while one validates, or looks for its place in a stream.
    patience = InitProcessGroupKwargs(timeout=timedelta(hours=3))
    handlers = [patience, *options.pop("kwargs_handlers", ())]
    on_cpu = not torch.accelerator.is_available() or torch.backends.mps.is_available()
    accelerator = Accelerator(cpu=on_cpu, kwargs_handlers=handlers, **options)
    check_precision(accelerator)
    started = int(os.environ.get("WORLD_SIZE", 1))
    if accelerator.num_processes != started:
        raise ValueError(
            f"{started} processes were started, and {accelerator.num_processes} work together on "
            f"{accelerator.device.type}: start one"
        )
    return accelerator


def check_precision(accelerator: Accelerator) -> None:
    """ValueError for float16: it scales the loss, and the scaler's overflows would look like a run that went wrong."""
    if accelerator.mixed_precision not in ("no", "bf16"):
        raise ValueError(f"mixed precision {accelerator.mixed_precision}: must be no or bf16")
