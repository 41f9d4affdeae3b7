"""Victims: the models that somebody else trains on the published images, by name.

```python
>>> from unseg_hf.evaluation.victims import build_victim

>>> victim = build_victim("segformer", "semantic", num_classes=2)
>>> victim.task, victim.size_multiple
('semantic', 1)
```
"""

from __future__ import annotations

from collections.abc import Sequence
from importlib import import_module
from pathlib import Path

from .base import TASKS, Victim

_TABLE = {
    "unet": (("semantic",), "semantic:UNetVictim"),
    "unetpp": (("semantic",), "semantic:UNetPlusPlusVictim"),
    "segformer": (("semantic",), "semantic:SegformerVictim"),
    "upernet": (("semantic",), "semantic:UperNetVictim"),
    "deeplabv3plus": (("semantic",), "semantic:DeepLabV3PlusVictim"),
    "mask2former": (("semantic", "instance", "panoptic"), "objects:Mask2FormerVictim"),
    "maskformer": (("semantic", "instance", "panoptic"), "objects:MaskFormerVictim"),
    "rt_detr_v2": (("detection",), "objects:RTDetrVictim"),
    "d_fine": (("detection",), "objects:DFineVictim"),
    "sam": (("interactive",), "interactive:SamVictim"),
    "sam_hq": (("interactive",), "interactive:SamHQVictim"),
}

VICTIMS = tuple(_TABLE)
"""Names that [`build_victim`] knows."""

PRESETS = ("small", "full")
"""Sizes: one that trains from scratch on a CPU, and the published architecture."""


def victims_for(task: str) -> tuple[str, ...]:
    """Names of the victims that can do a task, one of [`TASKS`].

    Raises:
        ValueError: an unknown task.
    """
    if task not in TASKS:
        raise ValueError(f"task is {task!r}; use one of {', '.join(TASKS)}")
    return tuple(name for name, (tasks, _) in _TABLE.items() if task in tasks)


def build_victim(
    name: str,
    task: str,
    num_classes: int,
    pretrained: str | Path | None = None,
    preset: str = "small",
    image_size: int | None = None,
    things: Sequence[int] = (),
) -> Victim:
    """Make a victim, with new weights from torch's global random number generator or with pretrained ones.

    Args:
        name: one of [`VICTIMS`].
        task: one of [`TASKS`] that the victim can do.
        num_classes: classes of the data set, background or stuff included.
        pretrained: folder or Hub id of a checkpoint, or a file that the victim's class says it reads; None: from
            scratch. The victim's `lr` is its `pretrained_lr` then.
        preset: one of [`PRESETS`].
        image_size: side of the images in pixels, for victims that need it.
        things: ids of the classes that are objects, for victims that tell objects from stuff.

    Raises:
        ValueError: an unknown name, task or preset, a task that the victim cannot do, or `pretrained` does not load
            or is of another architecture.
        ImportError: a package that the victim needs is not installed.
    """
    if name not in _TABLE:
        raise ValueError(f"victim is {name!r}; use one of {', '.join(VICTIMS)}")
    if name not in victims_for(task):
        raise ValueError(
            f"the victim {name} cannot do the task {task}; use one of {', '.join(victims_for(task))}, "
            f"or one of its own tasks: {', '.join(_TABLE[name][0])}"
        )
    if preset not in PRESETS:
        raise ValueError(f"preset is {preset!r}; use one of {', '.join(PRESETS)}")
    module, _, class_name = _TABLE[name][1].partition(":")
    victim = getattr(import_module(f".{module}", __name__), class_name)(
        task=task,
        num_classes=num_classes,
        pretrained=pretrained,
        preset=preset,
        image_size=image_size,
        things=things,
    )
    if pretrained is not None:
        victim.lr = victim.pretrained_lr
    return victim
