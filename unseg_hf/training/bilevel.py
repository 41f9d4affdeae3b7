"""The bilevel loop: a generator of noise and a surrogate segmenter, trained against the same masks.

    delta = generator(image, prompt) * (epsilon * mask + epsilon_background * (1 - mask))
    min over generator, min over surrogate of loss(surrogate(clip(image + delta, 0, 1), prompt'), target)

UnSeg (NeurIPS 2024), section 3. The paper's recipe is one setting of `BilevelConfig`; everything else is an option.
"""

import json
import shutil
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path

import torch
from accelerate import Accelerator
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader

from ..configuration_unseg import check_epsilon
from ..data.records import InteractiveSegmentation
from ..modeling_unseg import UnSegModel
from .losses import interactive_loss, point_loss
from .postprocessing import random_postprocess
from .prompts import PROMPT_KINDS, choose_kinds, make_prompts

IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


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
    batch_size: int = _setting(4, "Images a step and process.")
    learning_rate: float = _setting(1e-4, "Of the generator's Adam.")
    surrogate_learning_rate: float = _setting(1e-4, "Of the surrogate's Adam.")
    max_gradient_norm: float = _setting(0.0, "Gradients are clipped to this norm; 0 does not clip (the paper's).")
    schedule: str = _setting(
        "step",
        "'step' divides both rates by 10 at decay_at (the paper's); 'cosine' warms up over 100 steps, decays to 0.",
    )
    decay_at: float = _setting(20 / 27, "Share of all steps after which 'step' decays.")
    alternation: str = _setting(
        "epoch",
        "'epoch': the surrogate in every fourth epoch, the first included, the generator in the others (the paper's); "
        "'step': both in every step, on the same noise.",
    )
    label_modification: bool = _setting(
        True, "The generator's target is an all-ones mask (the paper's), not the mask."
    )
    epsilon: float = _setting(
        1 / 255, "Budget in training inside the mask, 0 to 1. The paper protects with a larger one."
    )
    epsilon_background: float = _setting(0.25 / 255, "Budget in training outside the mask, 0 to epsilon.")
    epsilon_start: float = _setting(1.0, "The budget starts at this multiple and falls linearly to 1 ...")
    epsilon_warmup: float = _setting(0.0, "... over this share of all steps.")
    prompt_kinds: list[str] = field(
        default_factory=lambda: list(PROMPT_KINDS),
        metadata={"help": "Kinds of prompts; the generator gets a random subset of them, the surrogate one."},
    )
    postprocess_probability: float = _setting(
        0.0,
        "Probability of each of greyscale, resizing, blur and JPEG between noise and surrogate (the paper has none).",
    )
    cast_weight: float = _setting(
        0.0,
        "Weight of the squared local mean of the noise. Without it a small generator ends in one colour cast for "
        "every image, which greyscale and white balance remove (the paper has none).",
    )
    sam_loss_weight: float = _setting(
        0.0,
        "Weight of SAM's own segmentation loss, for a SAM trained from random weights; a frozen one has none.",
    )
    points: int = _setting(12_544, "Points a mask in the loss.")
    seed: int = _setting(0, "Of every random choice.")
    log_every: int = _setting(50, "Steps between two lines of the log.")
    save_every: int = _setting(0, "Steps between two checkpoints; 0 saves only at the end.")

    def __post_init__(self):
        check_epsilon(self.epsilon, self.epsilon_background)
        for name, value, allowed in (
            ("alternation", self.alternation, ("epoch", "step")),
            ("schedule", self.schedule, ("step", "cosine")),
        ):
            if value not in allowed:
                raise ValueError(f"{name}={value!r}: must be one of {', '.join(allowed)}")
        if not self.prompt_kinds or set(self.prompt_kinds) - set(PROMPT_KINDS):
            raise ValueError(f"prompt_kinds={self.prompt_kinds}: needs at least one of {', '.join(PROMPT_KINDS)}")
        if self.epsilon_start < 1:
            raise ValueError(
                f"epsilon_start={self.epsilon_start}: must be at least 1, the multiple the budget falls from"
            )

    def trains(self, epoch: int) -> tuple[bool, bool]:
        """Whether the generator, and whether the surrogate, is trained in an epoch."""
        if self.alternation == "step":
            return True, True
        return epoch % 4 != 0, epoch % 4 == 0

    def budget(self, progress: float) -> tuple[float, float]:
        """(epsilon, epsilon_background) after a share `progress` of all steps."""
        left = max(0.0, 1 - progress / self.epsilon_warmup) if self.epsilon_warmup > 0 else 0.0
        multiple = 1 + (self.epsilon_start - 1) * left
        return self.epsilon * multiple, self.epsilon_background * multiple

    def rate(self, progress: float, step: int) -> float:
        """Multiple of the learning rates after a share `progress` of all steps."""
        if self.schedule == "step":
            return 0.1 if progress >= self.decay_at else 1.0
        return min(1.0, (step + 1) / 100) * 0.5 * (1 + torch.cos(torch.tensor(progress * torch.pi)).item())


@dataclass
class Progress:
    """Where a run stands; saved with every checkpoint."""

    step: int = 0

    def state_dict(self) -> dict:
        return asdict(self)

    def load_state_dict(self, state: dict) -> None:
        self.step = state["step"]


def train(
    generator: UnSegModel,
    surrogate: nn.Module,
    data: InteractiveSegmentation,
    config: BilevelConfig,
    output_dir: str | Path,
    accelerator: Accelerator | None = None,
    resume: bool = False,
    num_workers: int = 0,
    report: Callable[[str], None] = print,
) -> None:
    """Train `generator` in place; `surrogate` is thrown away afterwards.

    Args:
        generator: its SAM is trained too where `generator.config.freeze_sam` is False.
        surrogate: `surrogate(images, prompts)` gives logits; `SamSurrogate` and `UNetSurrogate` do.
        data: images and masks, at the generator's input size.
        config: settings.
        output_dir: gets `training_log.jsonl`, a line every `log_every` steps, and `checkpoint/`, all that an exact
            resume needs.
        accelerator: devices, processes and precision; a plain `Accelerator()` by default.
        resume: go on from `output_dir/checkpoint`.
        num_workers: data loading processes.
        report: called with a line of progress every `log_every` steps.

    Raises:
        FloatingPointError: a loss that is not finite, naming the step and phase.
        FileNotFoundError: `resume` without a checkpoint.
        FileExistsError: a checkpoint without `resume`.
        ValueError: less data than a batch, or several processes.
    """
    accelerator = accelerator or Accelerator()
    output_dir, checkpoint = Path(output_dir), Path(output_dir) / "checkpoint"
    if accelerator.num_processes > 1:
        # With one kind of prompt a step, some parameters have no gradient in it, which DDP does not take.
        raise ValueError(f"{accelerator.num_processes} processes: the loop runs on one; start it without a launcher")
    if resume and not checkpoint.is_dir():
        raise FileNotFoundError(f"{checkpoint}: no checkpoint to resume from; start without resume")
    if checkpoint.exists() and not resume:
        raise FileExistsError(f"{checkpoint} is an earlier run's: resume it, or choose another output folder")
    output_dir.mkdir(parents=True, exist_ok=True)

    # Shuffled by epoch and seed alone, so that an epoch can be entered in its middle.
    sampler = _Shuffled(data, config.seed)
    loader = DataLoader(data, config.batch_size, sampler=sampler, num_workers=num_workers, drop_last=True)
    adam_g = torch.optim.Adam((p for p in generator.parameters() if p.requires_grad), config.learning_rate)
    adam_s = torch.optim.Adam((p for p in surrogate.parameters() if p.requires_grad), config.surrogate_learning_rate)
    generator, surrogate, adam_g, adam_s, loader = accelerator.prepare(generator, surrogate, adam_g, adam_s, loader)
    progress = Progress()
    accelerator.register_for_checkpointing(progress)
    if resume:
        accelerator.load_state(str(checkpoint))

    if len(loader) == 0:
        raise ValueError(f"batch_size={config.batch_size} with {len(data)} images: not one full batch an epoch")
    total, start = len(loader) * config.epochs, time.perf_counter()
    began = progress.step
    log = _Log(output_dir / "training_log.jsonl", accelerator, report)
    surrogate_parameters = [p for p in surrogate.parameters() if p.requires_grad]
    whole_generator = accelerator.unwrap_model(generator)
    trains_sam = config.sam_loss_weight > 0 and not whole_generator.config.freeze_sam
    generator.train()
    surrogate.train()

    for epoch in range(progress.step // len(loader), config.epochs):
        skip = progress.step - epoch * len(loader)
        batches = accelerator.skip_first_batches(loader, skip) if skip else loader
        batches.set_epoch(epoch)  # reaches the data set, which draws its crops and its order from it
        for batch in batches:
            share = progress.step / total
            for optimizer, base in ((adam_g, config.learning_rate), (adam_s, config.surrogate_learning_rate)):
                for group in optimizer.param_groups:
                    group["lr"] = base * config.rate(share, progress.step)
            train_generator, train_surrogate = config.trains(epoch)
            random = torch.Generator().manual_seed(config.seed * 1_000_003 + progress.step)
            losses = {}

            # One accumulate block for both phases: with two, one of them would never step.
            with accelerator.accumulate(generator, surrogate):
                # Generator phase: the surrogate is fixed, the noise moves towards what it reads as the target.
                for parameter in surrogate_parameters:
                    parameter.requires_grad_(not train_generator)
                with torch.set_grad_enabled(train_generator), accelerator.autocast():
                    protected, output = _protect(generator, batch, config, share, random)
                if train_generator:
                    with accelerator.autocast():
                        target = torch.ones_like(batch["mask"]) if config.label_modification else batch["mask"]
                        loss = _segmentation_loss(surrogate, protected, batch["mask"], target, config, random)
                        losses["generator"] = loss.detach()
                        if config.cast_weight:
                            losses["cast"] = _colour_cast(output.noise)
                            loss = loss + config.cast_weight * losses["cast"]
                        if trains_sam:
                            clean = output.image_embeddings.image_embeddings
                            losses["sam"] = _sam_loss(whole_generator.sam, clean, batch["mask"], config, random)
                            loss = loss + config.sam_loss_weight * losses["sam"]
                    _step(accelerator, loss, generator, adam_g, config, "generator", progress.step)

                # Surrogate phase: the noise is fixed, the surrogate learns the true masks from protected images.
                if train_surrogate:
                    for parameter in surrogate_parameters:
                        parameter.requires_grad_(True)
                    with accelerator.autocast():
                        loss = _segmentation_loss(
                            surrogate, protected.detach(), batch["mask"], batch["mask"], config, random
                        )
                    losses["surrogate"] = loss
                    _step(accelerator, loss, surrogate, adam_s, config, "surrogate", progress.step)

            progress.step += 1
            log.add(losses, progress.step, total, (progress.step - began) * len(batch["mask"]), start, config)
            if config.save_every and progress.step % config.save_every == 0:
                _save(accelerator, checkpoint)
    _save(accelerator, checkpoint)


def _protect(generator, batch, config, share, random):
    """Protected images in [0, 1], with gradients into the generator, and the generator's output."""
    images, masks = batch["image"], batch["mask"]
    kinds = choose_kinds(config.prompt_kinds, several=True, generator=random)
    output = generator(pixel_values=normalise(images), **make_prompts(masks, kinds, random))
    noise = F.interpolate(output.noise[:, 0].float(), images.shape[-2:], mode="bilinear", align_corners=False)
    epsilon, background = config.budget(share)
    budget = epsilon * masks + background * (1 - masks)
    return (images + noise * budget.unsqueeze(1)).clamp(0, 1), output


def _segmentation_loss(surrogate, protected, masks, target, config, random):
    """How far the surrogate is from `target` on protected images, after what the web may do to them."""
    seen = random_postprocess(protected, config.postprocess_probability, random)
    kinds = choose_kinds(config.prompt_kinds, several=False, generator=random)
    logits = surrogate(normalise(seen), make_prompts(masks, kinds, random))
    return point_loss(logits, target, random, config.points).mean()


def _colour_cast(noise):
    """Mean square of what is left of the noise when each 8 x 8 cells are averaged; 1 for a saturated cast."""
    return F.avg_pool2d(noise.flatten(0, 1).float(), 8, stride=1).square().mean()


def _sam_loss(sam, image_embeddings, masks, config, random):
    """SAM's own loss for one point or a box, so that a SAM from random weights learns to propose masks."""
    if torch.rand((), generator=random) < 0.5:
        prompts = make_prompts(masks, ("box",), random)
    else:
        prompts = make_prompts(masks, ("points",), random, points=1)
    output = sam(image_embeddings=image_embeddings, multimask_output=True, **prompts)
    return interactive_loss(output.pred_masks[:, 0], output.iou_scores[:, 0], masks, random, config.points // 4)


def normalise(images: torch.Tensor) -> torch.Tensor:
    """`(batch, 3, h, w)` in [0, 1] to what SAM's encoder and the surrogates see."""
    mean, std = (images.new_tensor(v).view(1, 3, 1, 1) for v in (IMAGENET_MEAN, IMAGENET_STD))
    return (images - mean) / std


def _step(accelerator, loss, model, optimizer, config, phase, step) -> None:
    if not torch.isfinite(loss):
        raise FloatingPointError(
            f"the {phase} loss is {loss.item()} at step {step}: lower the learning rates, or go on from the last "
            "checkpoint with others"
        )
    accelerator.backward(loss)
    if config.max_gradient_norm and accelerator.sync_gradients:
        accelerator.clip_grad_norm_([p for p in model.parameters() if p.requires_grad], config.max_gradient_norm)
    optimizer.step()
    optimizer.zero_grad()


def _save(accelerator: Accelerator, checkpoint: Path) -> None:
    """Writes a checkpoint beside the old one and then takes its place, so that there is always a whole one."""
    partial, old = (checkpoint.with_name(checkpoint.name + suffix) for suffix in (".partial", ".old"))
    shutil.rmtree(partial, ignore_errors=True)
    accelerator.save_state(str(partial))
    shutil.rmtree(old, ignore_errors=True)
    if checkpoint.exists():
        checkpoint.rename(old)
    partial.rename(checkpoint)
    shutil.rmtree(old, ignore_errors=True)


class _Shuffled(torch.utils.data.Sampler):
    """A new order each epoch, from the seed and the data's epoch alone."""

    def __init__(self, data: InteractiveSegmentation, seed: int):
        self.data, self.seed = data, seed

    def __len__(self) -> int:
        return len(self.data)

    def __iter__(self):
        order = torch.Generator().manual_seed(self.seed * 7919 + self.data.epoch)
        yield from torch.randperm(len(self.data), generator=order).tolist()


class _Log:
    """Running means of the losses, to a file and to `report`."""

    def __init__(self, path: Path, accelerator: Accelerator, report: Callable[[str], None]):
        self.path, self.accelerator, self.report = path, accelerator, report
        self.sums: dict[str, list[torch.Tensor]] = {}

    def add(self, losses, step, total, images, start, config) -> None:
        for name, loss in losses.items():
            self.sums.setdefault(name, []).append(loss.detach())
        if step % config.log_every and step != total:
            return
        means = {name: torch.stack(values).mean().item() for name, values in self.sums.items()}
        self.sums.clear()
        if not self.accelerator.is_main_process:
            return
        rate = images * self.accelerator.num_processes / (time.perf_counter() - start)
        with self.path.open("a") as file:
            file.write(json.dumps({"step": step, "images_per_second": round(rate, 2), **means}) + "\n")
        figures = "  ".join(f"{name} {value:.4f}" for name, value in means.items())
        self.report(f"step {step}/{total}  {figures}  {rate:.1f} images/s")
