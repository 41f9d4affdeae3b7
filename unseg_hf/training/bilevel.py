"""The bilevel loop: a generator of noise and surrogate segmenters, trained against the same masks.

    delta = generator(image, prompt) * (epsilon * mask + epsilon_background * (1 - mask))
    min over generator, min over surrogate of loss(surrogate(clip(image + delta, 0, 1), prompt'), target)

UnSeg (NeurIPS 2024), section 3. The paper's recipe is one setting of `BilevelConfig`; everything else is an option.
"""

import itertools
import math
import signal
import threading
import weakref
from collections.abc import Callable
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.utils import send_to_device
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader

from ..data.interactive import InteractiveSegmentation
from ..evaluation.augmentation import strong_augmentation
from ..evaluation.victims.base import Batch, normalise
from ..modeling_unseg import UnSegModel
from .checkpoints import Checkpoints, latest_in
from .configuration_bilevel import BilevelConfig
from .differentiable_post_processing import random_postprocess
from .losses import interactive_loss, point_loss
from .processes import check_precision
from .prompts import choose_kinds, make_prompts
from .run_log import RunLog
from .surrogates import Surrogates, frozen
from .validation import validate

# What may change when a run is resumed: it decides what is written, not what is trained.
_FREE_SETTINGS = ("log_every", "validate_every", "save_every", "keep_checkpoints")

_SERVED: "weakref.WeakSet[Accelerator]" = weakref.WeakSet()
"""Accelerators that a run has given its models, which would be a part of the next run's checkpoints."""


class _Generator(nn.Module):
    """All that one step asks of the generator, in the one forward that data-parallel training allows."""

    def __init__(self, model: UnSegModel):
        super().__init__()
        self.model = model

    def forward(self, images: torch.Tensor, prompts: dict, sam_prompts: dict | None = None):
        """The noise `(batch, 3, h, w)`, and what SAM itself answers to `sam_prompts`: masks and predicted IoUs."""
        output = self.model(pixel_values=normalise(images), **prompts)
        if sam_prompts is None:
            return output.noise[:, 0], None, None
        clean = output.image_embeddings.image_embeddings
        found = self.model.sam(image_embeddings=clean, multimask_output=True, **sam_prompts)
        return output.noise[:, 0], found.pred_masks[:, 0], found.iou_scores[:, 0]


def train(
    generator: UnSegModel,
    surrogates: Surrogates,
    data: InteractiveSegmentation,
    config: BilevelConfig,
    output_dir: str | Path,
    accelerator: Accelerator,
    *,
    validation: InteractiveSegmentation | None = None,
    settings: dict[str, Any] | None = None,
    resume: bool = False,
    num_workers: int = 0,
    report: Callable[[str], None] = print,
) -> bool:
    """Train `generator` in place; the surrogates are thrown away afterwards.

    SIGINT and SIGTERM end the run after the step that is going on, with a checkpoint; a second one ends it at once.

    Args:
        generator: its SAM is trained too where `generator.config.freeze_sam` is False.
        surrogates: trained side by side on the same noise.
        data: images and masks, at the generator's input size.
        config: settings.
        output_dir: gets `training_log.jsonl`, a line every `log_every` steps, `validation/`, and `checkpoints/`, all
            that an exact resume needs.
        accelerator: devices, processes, precision, trackers; a new one for each run. Its gradient accumulation must be
            the config's, and with several processes it needs
            `DistributedDataParallelKwargs(find_unused_parameters=True)`: with one kind of prompt in a step, some
            parameters have no gradient in it.
        validation: held-out images for `validate`.
        settings: what else decides the result (data, architecture); compared, with `config`, when a run is resumed.
        resume: go on from the newest checkpoint.
        num_workers: data loading processes.
        report: called with a line of progress every `log_every` steps.

    Returns:
        Whether the run is over; False if a signal ended it before its time.

    Raises:
        FloatingPointError: a loss that is not finite, naming the step, the phase and the images.
        FileNotFoundError: `resume` without a checkpoint.
        FileExistsError: a checkpoint without `resume`.
        ValueError: less data than a step needs, a run too short to train the generator, a resumed one with other
            settings, or a generator, surrogates or an accelerator that cannot be trained with.
    """
    _check_trainable(generator, surrogates, accelerator)
    output_dir = Path(output_dir)
    per_step, rank, world = config.gradient_accumulation_steps, accelerator.process_index, accelerator.num_processes
    if accelerator.gradient_accumulation_steps != per_step:
        raise ValueError(
            f"the accelerator accumulates over {accelerator.gradient_accumulation_steps} batches, the settings say "
            f"gradient_accumulation_steps={per_step}: make them the same"
        )
    steps_an_epoch = len(data) // (config.batch_size * per_step * world)
    if steps_an_epoch == 0:
        raise ValueError(
            f"an epoch of {len(data)} images is less than one step of batch_size={config.batch_size} x "
            f"{per_step} batches x {world} processes"
        )
    total = min(config.max_steps or math.inf, steps_an_epoch * config.epochs)
    if config.generator_turns and not any(config.trains(step // steps_an_epoch, step)[0] for step in range(total)):
        raise ValueError(
            f"the run ends after {total} steps, before the generator's first turn: an epoch has {steps_an_epoch}, and "
            f"alternation={config.alternation!r} begins with surrogate_turns={config.surrogate_turns} of the "
            "surrogates; raise epochs or max_steps"
        )

    folder = output_dir / "checkpoints"
    latest = latest_in(folder)
    if resume and latest is None:
        raise FileNotFoundError(f"{folder}: no checkpoint to resume from; start without resume")
    if latest and not resume:
        raise FileExistsError(f"{latest} is an earlier run's: resume it, or choose another output folder")
    _SERVED.add(accelerator)
    wrapped = _Generator(generator)
    adam_g = torch.optim.Adam((p for p in wrapped.parameters() if p.requires_grad), config.learning_rate)
    adam_s = torch.optim.Adam((p for p in surrogates.parameters() if p.requires_grad), config.surrogate_learning_rate)
    wrapped, trained_surrogates, adam_g, adam_s = accelerator.prepare(wrapped, surrogates, adam_g, adam_s)
    decisive = {name: value for name, value in asdict(config).items() if name not in _FREE_SETTINGS}
    checkpoints = Checkpoints(
        folder,
        accelerator,
        decisive | {"processes": world} | (settings or {}),
        config.keep_checkpoints,
        generator.sam if generator.config.freeze_sam else None,
    )
    done = checkpoints.load(latest) if resume else 0
    accelerator.wait_for_everyone()  # nobody writes before everybody has looked
    output_dir.mkdir(parents=True, exist_ok=True)
    log = RunLog(output_dir, accelerator, done, total, config.log_every, report)
    generator.train()
    surrogates.train()

    with _signals() as stopped:
        while done < total:
            epoch = done // steps_an_epoch
            skip = done % steps_an_epoch * per_step
            # Its order comes from seed and epoch alone, so that an epoch can be entered in its middle. It ends with a
            # whole step, so that no gradient is carried into another epoch or phase.
            batches = data.batches(epoch, config.batch_size, rank, world, skip)
            loader = DataLoader(
                data,
                batch_sampler=itertools.islice(batches, steps_an_epoch * per_step - skip),
                num_workers=num_workers,
                worker_init_fn=_ignore_signals,
                pin_memory=accelerator.device.type == "cuda",
                # It would draw from the global one, which a run that enters an epoch in its middle has restored.
                generator=torch.Generator(),
            )
            names = []  # of the images of a step
            for number, batch in enumerate(loader, skip):
                names += batch["name"]
                images = send_to_device({k: v for k, v in batch.items() if k != "name"}, accelerator.device)
                random = _random(config.seed, epoch, number, rank)
                share = done / total
                rate = config.rate(share, done)
                # A surrogate that has just begun needs the whole rate, however late in the run.
                surrogate_rate = 1.0 if config.surrogate_restart else rate
                for optimizer, value in (
                    (adam_g, config.learning_rate * rate),
                    (adam_s, config.surrogate_learning_rate * surrogate_rate),
                ):
                    for group in optimizer.param_groups:
                        group["lr"] = value
                if number % per_step == 0:
                    for index in config.restarts(done, len(surrogates)):
                        seed = int(np.random.SeedSequence((config.seed, done, index)).generate_state(1)[0])
                        surrogates.restart(index, seed, adam_s.optimizer)
                train_generator, train_surrogates = config.trains(epoch, done)
                losses = {}

                # One accumulate block for both phases: with two, one of them would never step.
                with accelerator.accumulate(wrapped, trained_surrogates):
                    with torch.set_grad_enabled(train_generator):
                        protected, noise, sam_loss = _protect(wrapped, generator, images, config, share, random)
                    losses["noise"] = noise.detach().abs().mean()  # no loss, but it tells of a generator gone silent
                    if train_generator:
                        # Generator phase: the surrogates are fixed, the noise moves towards what they read as the
                        # target. They are not called through their data-parallel wrapper, which would wait for
                        # gradients of theirs.
                        with frozen(surrogates):
                            loss = losses["generator"] = _segmentation_loss(
                                surrogates, protected, images["mask"], config.label_modification, config, random
                            )
                            if config.cast_weight:
                                losses["cast"] = _colour_cast(noise)
                                loss = loss + config.cast_weight * losses["cast"]
                            if config.correlation_weight:
                                losses["correlation"] = _correlation(
                                    noise, budget_of(images, config.epsilon, config.epsilon_background)
                                )
                                loss = loss + config.correlation_weight * losses["correlation"]
                            if sam_loss is not None:
                                losses["sam"] = sam_loss
                                loss = loss + config.sam_loss_weight * sam_loss
                            where = done, "generator", names
                            _update(accelerator, loss, wrapped, adam_g, config, *where)
                    if train_surrogates:
                        # Surrogate phase: the noise is fixed, the surrogates learn the masks from protected images.
                        losses["surrogate"] = loss = _segmentation_loss(
                            trained_surrogates, protected.detach(), images["mask"], False, config, random
                        )
                        where = done, "surrogate", names
                        _update(accelerator, loss, trained_surrogates, adam_s, config, *where)

                log.add(losses, len(images["mask"]) * world)
                if not accelerator.sync_gradients:
                    continue
                names.clear()
                done += 1
                log.step(done)
                ends = done == total or stopped(accelerator)
                with log.paused():
                    if validation and (done == total or _due(config.validate_every, done)):
                        if accelerator.is_main_process:
                            found = _validate(generator, surrogates, validation, config, accelerator)
                            log.validation(done, *found)
                        accelerator.wait_for_everyone()
                    if ends or _due(config.save_every, done):
                        checkpoints.save(done)
                if ends:
                    log.close()
                    return done == total
    log.close()
    return True


def _check_trainable(generator: UnSegModel, surrogates: Surrogates, accelerator: Accelerator) -> None:
    """ValueError for what would fail later, or be trained in part and published as a whole."""
    for name, value, kind in (("generator", generator, UnSegModel), ("surrogates", surrogates, Surrogates)):
        if not isinstance(value, kind):
            raise ValueError(f"{name} is a {type(value).__name__}: pass a {kind.__name__}")
    if not any(parameter.requires_grad for parameter in generator.parameters()):
        raise ValueError("no parameter of the generator requires gradients: there is nothing to train")
    if generator.config.noise_codes > 1 or generator.config.turned_columns:
        raise ValueError(
            f"the generator has noise_codes={generator.config.noise_codes} and turned_columns="
            f"{generator.config.turned_columns}, and the loop trains one noise: call keep_first_noise(generator) first"
        )
    check_precision(accelerator)
    if accelerator in _SERVED:
        raise ValueError("the accelerator holds the models of an earlier run: make a new Accelerator for each run")


def keep_first_noise(model: UnSegModel) -> None:
    """Leave out the noises of tints, small budgets and classes: one is trained, and the others would not fit it."""
    if model.config.noise_codes > 1:
        tokens = model.noise_head.noise_tokens.weight.detach()[: len(model.noise_head.noise_mlps)].clone()
        model.noise_head.noise_tokens = nn.Embedding.from_pretrained(tokens, freeze=False)
        model.config.noise_codes, model.config.tint_codes, model.config.faint_code = 1, None, None
    model.config.turned_columns = None  # which training knows nothing of


def _random(seed: int, epoch: int, number: int, rank: int) -> torch.Generator:
    """The source of all random choices of one batch."""
    state = np.random.SeedSequence((seed, epoch, number, rank)).generate_state(1, np.uint64)[0]
    return torch.Generator().manual_seed(int(state >> 1))


def _due(every: int, step: int) -> bool:
    return every > 0 and step % every == 0


def _protect(wrapped, generator, batch, config, share, random):
    """Protected images in [0, 1], with gradients into the generator, the noise, and SAM's own loss if it has one."""
    kinds = choose_kinds(config.prompt_kinds, several=True, generator=random)
    prompts = make_prompts(batch["mask"], kinds, random)
    if config.sam_loss_weight == 0 or generator.config.freeze_sam or not torch.is_grad_enabled():
        noise, _, _ = wrapped(batch["image"], prompts)
        return apply_budget(batch, noise, *config.budget(share)), noise, None
    # One point or a box, so that a SAM from random weights learns to propose masks.
    if torch.rand((), generator=random) < 0.5:
        sam_prompts = make_prompts(batch["mask"], ("box",), random)
    else:
        sam_prompts = make_prompts(batch["mask"], ("points",), random, points=1)
    noise, found, ious = wrapped(batch["image"], prompts, sam_prompts)
    sam_loss = interactive_loss(found, ious, batch["mask"], random, config.points // 4)
    return apply_budget(batch, noise, *config.budget(share)), noise, sam_loss


def apply_budget(batch: dict, noise: torch.Tensor, epsilon: float, background: float) -> torch.Tensor:
    """Noise `(batch, 3, h, w)` in [-1, 1] on a batch's images; padding, which no published image has, stays black."""
    noise = F.interpolate(noise.float(), batch["image"].shape[-2:], mode="bilinear", align_corners=False)
    return (batch["image"] + noise * budget_of(batch, epsilon, background).unsqueeze(1)).clamp(0, 1)


def _segmentation_loss(surrogates, protected, masks, all_ones, config, random):
    """How far the surrogates are from their target on protected images, after what the web may do to them."""
    seen, masks = random_postprocess(protected, masks, config.postprocessings, config.postprocess_probability, random)
    if config.augmentation_probability:
        seen, masks = _augmented(seen, masks, config.augmentation_probability, random)
    kinds = choose_kinds(config.prompt_kinds, several=False, generator=random)
    target = torch.ones_like(masks) if all_ones else masks
    found = surrogates(normalise(seen), make_prompts(masks, kinds, random))
    return torch.stack([point_loss(logits, target, random, config.points).mean() for logits in found]).mean()


def _augmented(images, masks, probability, random):
    """A share of the batches as strongly augmented victims see them, unless a mask would lose its last pixel.

    What lies beyond the image is no object.
    """
    seed = int(torch.randint(2**31, (), generator=random))
    if torch.rand((), generator=random) >= probability:
        return images, masks
    drawn = F.interpolate(masks[:, None], images.shape[-2:], mode="nearest-exact")[:, 0]
    with torch.random.fork_rng(devices=[]):
        # The augmentation draws from the CPU's global generator; seeding all devices would seed dropout, too.
        torch.default_generator.manual_seed(seed)
        batch = strong_augmentation(Batch(images, drawn.long()))
    # At the masks' own size: prompts are in its pixels, also where the images have become smaller.
    kept = F.interpolate((batch.labels == 1)[:, None].to(masks.dtype), masks.shape[-2:], mode="nearest-exact")[:, 0]
    if not kept.flatten(1).any(1).all():
        return images, masks
    return batch.images, kept


def budget_of(batch: dict, epsilon: float, background: float) -> torch.Tensor:
    """How far noise may go at each pixel of a batch's images, `(batch, height, width)`; nowhere in their padding."""
    return (epsilon * batch["mask"] + background * (1 - batch["mask"])) * batch["inside"]


def _correlation(noise: torch.Tensor, budget: torch.Tensor) -> torch.Tensor:
    """Mean squared correlation between the noises `(batch, 3, h, w)` of two images, weighted by their budgets.

    Of all noise, a generator would vary what lies outside the masks, and leave what is published as it is.
    """
    weights = F.interpolate(budget.unsqueeze(1), noise.shape[-2:], mode="area").expand_as(noise)
    noise, total = noise.float(), weights.sum((1, 2, 3), keepdim=True).clamp(min=1e-9)
    mean = (noise * weights).sum((1, 2, 3), keepdim=True) / total
    flat = F.normalize(((noise - mean) * weights).flatten(1), dim=1)
    others = (flat @ flat.T)[~torch.eye(len(flat), dtype=torch.bool, device=flat.device)]
    return others.square().mean()


def _colour_cast(noise):
    """The share of the noise's energy that is left when each 8 x 8 cells are averaged: 1 for a cast, 0 for a texture.

    A share, not the energy itself: that would reward a generator for falling silent, from which it does not come back.
    """
    noise = noise.float()
    return F.avg_pool2d(noise, 8, stride=1).square().mean() / noise.square().mean().clamp(min=1e-6)


def _update(accelerator, loss, model, optimizer, config, step, phase, names) -> None:
    """One backward pass, and one step of the optimizer where the gradients of a step are complete."""
    _refuse("loss", loss, step, phase, names)
    accelerator.backward(loss)
    if accelerator.sync_gradients:
        # Without a limit the norm is looked at all the same: a loss can be finite and its gradients not.
        norm = accelerator.clip_grad_norm_(model.parameters(), config.max_gradient_norm or math.inf)
        _refuse("norm of the gradients", norm, step, phase, names)
    optimizer.step()
    optimizer.zero_grad()


def _refuse(what: str, value: torch.Tensor, step: int, phase: str, names: list[str]) -> None:
    if not torch.isfinite(value):
        raise FloatingPointError(
            f"the {phase} {what} is {value.item()} at step {step}, in this process with {', '.join(names)}: look at "
            "these images, or start anew with lower learning rates"
        )


def _validate(generator, surrogates, data, config, accelerator):
    def protect(batch, kinds, random):
        output = generator(pixel_values=normalise(batch["image"]), **make_prompts(batch["mask"], kinds, random))
        return apply_budget(batch, output.noise[:, 0], config.epsilon, config.epsilon_background)

    with accelerator.autocast():
        return validate(protect, surrogates, data, config.batch_size, config.prompt_kinds, accelerator.device)


def _ignore_signals(worker: int) -> None:
    """Launchers and schedulers send a signal to every process; the one that trains decides what it means."""
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)


@contextmanager
def _signals():
    """Gives a function that says whether any process has been told to stop."""
    asked = threading.Event()
    if threading.current_thread() is not threading.main_thread():
        yield lambda accelerator: False
        return

    def ask(number, frame):
        asked.set()
        # Ctrl-C, once more or after a SIGTERM, ends the process at once. Not a second SIGTERM: a scheduler sends one
        # to every process, and the launcher among them passes its own on.
        signal.signal(signal.SIGINT, before[signal.SIGINT])

    before = {number: signal.signal(number, ask) for number in (signal.SIGINT, signal.SIGTERM)}

    def stopped(accelerator: Accelerator) -> bool:
        if accelerator.num_processes == 1:
            return asked.is_set()
        if asked.is_set():
            accelerator.set_trigger()
        return accelerator.check_trigger()

    try:
        yield stopped
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
