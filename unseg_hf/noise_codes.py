"""Noises of waves, written down in three letters: what the embedded default was taught, and a control of the audit."""

import re

import numpy as np

MASK, FAINT, TINTS = "ded", "dDd", ("+--", "+-+")
"""The noise of masks without a class: waves, half of them in colour, of which photographs have least between magenta
and green, and half in luminance, which greyscale leaves; at small budgets waves in colour alone; and where waves say
little, for objects lower than a wave or so, a tint, red or magenta."""

_CLASSES = "dDd aAa +-+ -+- dDD aAA ddD aaA +-- -++ ++- --+ ddd aaa +++ --- DdD AaA Ddd Aaa DDd AAa DDD AAA"
CLASSES = tuple(_CLASSES.split())
"""The noises of classes, in their order: waves down, waves across and flat colours, first those that victims learn
readily; at the end the opposites of the waves before, which nothing but their place tells apart."""


def code_noise(code: str, rows: np.ndarray, columns: np.ndarray) -> np.ndarray:
    """The noise that a code stands for.

    Args:
        code: a letter each for red, green and blue: `+` and `-` are flat, `d` and `a` are waves down the image and
            across it, `e` is `d` a quarter of a wave earlier, and `D`, `A` and `E` are the opposite waves. `ddD`:
            yellow and blue waves down the image.
        rows, columns: places down the image and across it, in waves, that broadcast to `(height, width)`.

    Returns:
        `(height, width, 3)` float32, 1 and -1.

    Raises:
        ValueError: no such code.
    """
    if not re.fullmatch(r"[-+dDeEaA]{3}", code):
        raise ValueError(f"code {code!r}: three of +, -, d, D, e, E, a, A, for red, green and blue")
    rows, columns = np.broadcast_arrays(rows, columns)
    waves = {"d": _waves(rows), "e": _waves(rows + 0.25), "a": _waves(columns), "+": np.ones(rows.shape)}
    waves |= {"D": -waves["d"], "E": -waves["e"], "A": -waves["a"], "-": -waves["+"]}
    return np.stack([waves[letter] for letter in code], axis=-1).astype(np.float32)


def _waves(places: np.ndarray) -> np.ndarray:
    """Square waves, 1 and then -1."""
    return np.where(places % 1 < 0.5, 1.0, -1.0)
