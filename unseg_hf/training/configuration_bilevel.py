"""Settings of the bilevel loop, with the paper's as defaults."""

import math
from dataclasses import dataclass, field

from ..configuration_unseg import check_epsilon
from .differentiable_post_processing import POSTPROCESSINGS
from .prompts import PROMPT_KINDS


def _setting(default, text: str):
    """A setting with the help text that scripts show."""
    return field(default=default, metadata={"help": text})


@dataclass
class BilevelConfig:
    """Settings of the loop; the defaults are the paper's (UnSeg, section 4.1, and the authors' code).

    Raises:
        ValueError: values that contradict each other, naming them.
    """

    epochs: int = _setting(27, "Passes over the data.")
    max_steps: int = _setting(0, "The run, and with it every schedule, ends after this many steps; 0: after epochs.")
    batch_size: int = _setting(4, "Images a batch and process.")
    gradient_accumulation_steps: int = _setting(1, "Batches a step.")
    learning_rate: float = _setting(1e-4, "Of the generator's Adam.")
    surrogate_learning_rate: float = _setting(1e-4, "Of the surrogates' Adam.")
    max_gradient_norm: float = _setting(0.0, "Gradients are clipped to this norm; 0 does not clip (the paper's).")
    schedule: str = _setting(
        "step",
        "'step' divides both rates by 10 at decay_at (the paper's); 'cosine' warms up over 100 steps, decays to 0.",
    )
    decay_at: float = _setting(20 / 27, "Share of all steps after which 'step' decays.")
    alternation: str = _setting(
        "epoch",
        "Whose turn it is changes by 'epoch' (the paper's) or by 'step'; 'joint': both in every step, on the same "
        "noise.",
    )
    surrogate_turns: int = _setting(1, "Epochs or steps in a row that the surrogates are trained.")
    generator_turns: int = _setting(3, "Epochs or steps in a row that the generator is trained after them.")
    surrogate_restart: int = _setting(
        0,
        "Steps after which a surrogate begins anew from fresh weights, several of them one after another, at a "
        "constant rate; 0: never (the paper's). Noise that a surrogate has grown used to in a whole run need not be "
        "what a fresh network, as a victim is, learns first.",
    )
    label_modification: bool = _setting(
        True, "The generator's target is an all-ones mask (the paper's), not the mask."
    )
    epsilon: float = _setting(
        1 / 255, "Budget in training inside the mask, 0 to 1. The paper protects with a larger one."
    )
    epsilon_background: float = _setting(0.25 / 255, "Budget in training outside the mask, 0 to epsilon.")
    epsilon_start: float = _setting(1.0, "Multiple of the budget at the start, from which it falls linearly to 1.")
    epsilon_warmup: float = _setting(0.0, "Share of all steps over which the budget falls from epsilon_start to 1.")
    prompt_kinds: list[str] = field(
        default_factory=lambda: list(PROMPT_KINDS),
        metadata={"help": "Kinds of prompts; the generator gets a random subset of them, the surrogates one."},
    )
    postprocessings: list[str] = field(
        default_factory=lambda: list(POSTPROCESSINGS),
        metadata={"help": "What may happen to protected images before the surrogates see them."},
    )
    postprocess_probability: float = _setting(0.0, "Probability of each of postprocessings (the paper has none).")
    cast_weight: float = _setting(
        0.0,
        "Weight of the share of the noise's energy that local averaging leaves. Without it a small generator ends in "
        "one colour cast for every image, which greyscale and white balance remove (the paper has none).",
    )
    correlation_weight: float = _setting(
        0.0,
        "Weight of the mean squared correlation between the noises of two images of a batch. Without it a small "
        "generator ends in one pattern for every image, which averaging finds (the paper has none).",
    )
    augmentation_probability: float = _setting(
        0.0,
        "Share of the batches that surrogates see rotated, scaled, recoloured, blurred and greyed, as strongly "
        "augmented victims of the audit do (the paper has none).",
    )
    sam_loss_weight: float = _setting(
        0.0,
        "Weight of SAM's own segmentation loss, for a SAM trained from random weights; a frozen one has none.",
    )
    points: int = _setting(12_544, "Points a mask in the loss.")
    seed: int = _setting(0, "Of every random choice.")
    log_every: int = _setting(50, "Steps between two lines of the log.")
    validate_every: int = _setting(0, "Steps between two validations; 0 validates only at the end.")
    save_every: int = _setting(0, "Steps between two checkpoints; 0 saves only at the end.")
    keep_checkpoints: int = _setting(2, "Checkpoints that stay, the newest; 0 keeps all.")

    def __post_init__(self):
        check_epsilon(self.epsilon, self.epsilon_background)
        for name, value, allowed in (
            ("alternation", self.alternation, ("epoch", "step", "joint")),
            ("schedule", self.schedule, ("step", "cosine")),
        ):
            if value not in allowed:
                raise ValueError(f"{name}={value!r}: must be one of {', '.join(allowed)}")
        for name, values, allowed in (
            ("prompt_kinds", self.prompt_kinds, PROMPT_KINDS),
            ("postprocessings", self.postprocessings, POSTPROCESSINGS),
        ):
            if not values or set(values) - set(allowed):
                raise ValueError(f"{name}={values}: needs at least one of {', '.join(allowed)}, and nothing else")
        if self.correlation_weight > 0 and self.batch_size < 2:
            raise ValueError(
                f"correlation_weight={self.correlation_weight} with batch_size={self.batch_size}: the correlation is "
                "that of the images of a batch, of which it needs at least 2"
            )
        if self.epsilon_start < 1:
            raise ValueError(
                f"epsilon_start={self.epsilon_start}: must be at least 1, the multiple the budget falls from"
            )
        if self.epsilon_start > 1 and not self.epsilon_warmup > 0:
            raise ValueError(
                f"epsilon_start={self.epsilon_start} with epsilon_warmup={self.epsilon_warmup}: the budget falls over "
                "that share of all steps, which must be above 0 (0.6, say)"
            )
        for name in ("epochs", "batch_size", "gradient_accumulation_steps", "surrogate_turns", "points", "log_every"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)}: must be at least 1")
        for name in (
            "generator_turns", "max_steps", "validate_every", "save_every", "keep_checkpoints", "learning_rate",
            "surrogate_learning_rate", "max_gradient_norm", "cast_weight", "sam_loss_weight", "correlation_weight",
            "surrogate_restart",
        ):  # fmt: skip
            if not getattr(self, name) >= 0:
                raise ValueError(f"{name}={getattr(self, name)}: must be at least 0")
        for name in ("postprocess_probability", "augmentation_probability", "decay_at", "epsilon_warmup"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"{name}={getattr(self, name)}: must be from 0 to 1")

    def trains(self, epoch: int, step: int) -> tuple[bool, bool]:
        """Whether the generator, and whether the surrogates, are trained in a step of an epoch."""
        if self.alternation == "joint":
            return True, True
        turn = (epoch if self.alternation == "epoch" else step) % (self.surrogate_turns + self.generator_turns)
        return turn >= self.surrogate_turns, turn < self.surrogate_turns

    def budget(self, progress: float) -> tuple[float, float]:
        """(epsilon, epsilon_background) after a share `progress` of all steps."""
        left = max(0.0, 1 - progress / self.epsilon_warmup) if self.epsilon_warmup > 0 else 0.0
        multiple = 1 + (self.epsilon_start - 1) * left
        return self.epsilon * multiple, self.epsilon_background * multiple

    def restarts(self, step: int, surrogates: int) -> list[int]:
        """Which of so many surrogates begin anew before a step, the first ones after a whole period."""
        every = self.surrogate_restart
        if not every:
            return []
        return [i for i in range(surrogates) if step >= every and (step - i * every // surrogates) % every == 0]

    def rate(self, progress: float, step: int) -> float:
        """Multiple of the learning rates after a share `progress` of all steps."""
        if self.schedule == "step":
            return 0.1 if progress >= self.decay_at else 1.0
        return min(1.0, (step + 1) / 100) * 0.5 * (1 + math.cos(progress * math.pi))
