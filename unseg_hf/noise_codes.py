"""Noises of waves, written down in three letters: what the embedded default was taught, and a control of the audit."""

import re

import numpy as np

_HUES = (("ddD", "aaA", "++-"), ("dDd", "aAa", "+-+"), ("dDD", "aAA", "+--"), ("ddd", "aaa", "+++"))
_OPPOSITES = str.maketrans("+-dDaA", "-+DdAa")

MASK, GREY_MASK = "ddD", "+--"
"""The noise of masks without a class: yellow and blue waves, and a red tint in images without colour, which show
nothing as plainly as a tint."""

CLASSES = tuple(code.translate(table) for hue in _HUES for table in ({}, _OPPOSITES) for code in hue)
"""The noises of classes, in their order: waves down, waves across and a flat colour, in each of four colours and its
opposite."""


def code_noise(code: str, down: np.ndarray, across: np.ndarray) -> np.ndarray:
    """The noise that a code stands for.

    Args:
        code: a letter each for red, green and blue: `+` and `-` are flat, `d` and `a` are waves down the image and
            across it, `D` and `A` the opposite ones. `ddD`: yellow and blue waves down the image.
        down, across: waves that broadcast to `(height, width)`, in [-1, 1].

    Returns:
        `(height, width, 3)` float32 in [-1, 1].

    Raises:
        ValueError: no such code.
    """
    if not re.fullmatch(r"[-+dDaA]{3}", code):
        raise ValueError(f"code {code!r}: three of +, -, d, D, a, A, for red, green and blue")
    down, across = np.broadcast_arrays(down, across)
    channels = {"+": np.ones_like(down), "-": -np.ones_like(down), "d": down, "D": -down, "a": across, "A": -across}
    return np.stack([channels[letter] for letter in code], axis=-1).astype(np.float32)


def waves(places: np.ndarray) -> np.ndarray:
    """Square waves, 1 and then -1, at places in whole waves."""
    return np.where(places % 1 < 0.5, 1.0, -1.0)
