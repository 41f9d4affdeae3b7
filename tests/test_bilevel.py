"""The bilevel loop on tiny networks and pictures: what it trains, and that nothing can make it lose its way."""

import contextlib
import hashlib
import json
import multiprocessing
import os
import signal
import subprocess
import sys
import textwrap
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from PIL import Image

from unseg_hf.data.interactive import InteractiveSegmentation
from unseg_hf.data.records import Record
from unseg_hf.training import bilevel, checkpoints
from unseg_hf.training.bilevel import _augmented, _random, apply_budget, train
from unseg_hf.training.configuration_bilevel import BilevelConfig
from unseg_hf.training.surrogates import SamSurrogate, Surrogates, UNetSurrogate, VictimSurrogate


class Discs:
    """Twelve pictures of a disc on a gradient."""

    name, weight, size = "discs", None, 12

    def order(self, random, rank, world):
        return iter(random.permutation(self.size)[rank::world].tolist())

    def load(self, index):
        rows, columns = np.mgrid[:64, :64]
        disc = (rows - 44 + 2 * index) ** 2 + (columns - 20 - 2 * index) ** 2 < 12**2
        shade = columns * 2 + 10 * index
        pixels = np.stack([shade, shade // 2, 200 - shade], -1) + disc[..., None] * 30
        return Record(f"disc {index}", Image.fromarray(np.clip(pixels, 0, 255).astype(np.uint8)), [disc])


def networks(build_generator, tiny_sam_config, kinds=("unet",), freeze_sam=False):
    generator = build_generator(freeze_sam=freeze_sam)
    torch.manual_seed(1)
    builders = {
        "unet": partial(UNetSurrogate, width=4, image_size=32),
        "sam": partial(SamSurrogate, tiny_sam_config(image_size=64), prompt_size=64),
        "segformer": partial(VictimSurrogate, "segformer", image_size=32),
    }
    surrogates = Surrogates(builders[kind] for kind in kinds)
    return generator, surrogates


@pytest.fixture
def small_run(build_generator, tiny_sam_config):
    """A function: trains tiny networks; gives generator, surrogates and log."""

    def run(folder, kinds=("unet",), freeze_sam=False, resume=False, report=str, validation=None, workers=0, **config):
        generator, surrogates = networks(build_generator, tiny_sam_config, kinds, freeze_sam)
        data = InteractiveSegmentation([Discs()], 64, (0.8, 1.2))
        defaults = {"epochs": 2, "batch_size": 4, "points": 256, "log_every": 1, "schedule": "cosine"}
        config = BilevelConfig(**(defaults | {"sam_loss_weight": 1.0} | config))
        accelerator = Accelerator(cpu=True, gradient_accumulation_steps=config.gradient_accumulation_steps)
        train(
            generator, surrogates, data, config, folder, accelerator,
            resume=resume, report=report, validation=validation, num_workers=workers,
        )  # fmt: skip
        log = [json.loads(line) for line in (folder / "training_log.jsonl").read_text().splitlines()]
        return generator, surrogates, log

    return run


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"generator": "protector"}, "generator is a str: pass a UnSegModel"),
        ({"surrogates": UNetSurrogate(4, 32)}, "surrogates is a UNetSurrogate: pass a Surrogates"),
        ({"codes": {"noise_codes": 3, "tint_codes": [1]}}, "noise_codes=3 .*: call keep_first_noise"),
        ({"codes": {"turned_columns": [1]}}, r"turned_columns=\[1\].*: call keep_first_noise"),
        ({"frozen": True}, "nothing to train"),
    ],
)
def test_what_would_not_be_trained_as_a_whole_is_refused(build_generator, tiny_sam_config, tmp_path, given, message):
    generator, surrogates = networks(build_generator, tiny_sam_config)
    generator = given.get("generator", build_generator(**given["codes"]) if "codes" in given else generator)
    if "frozen" in given:
        generator.requires_grad_(False)
    data = InteractiveSegmentation([Discs()], 64, (0.8, 1.2))
    config = BilevelConfig(epochs=1, batch_size=4)
    with pytest.raises(ValueError, match=message):
        train(generator, given.get("surrogates", surrogates), data, config, tmp_path / "run", Accelerator(cpu=True))
    assert not (tmp_path / "run").exists()


def test_a_generator_of_many_noises_is_trained_as_one_of_the_first(build_generator, tiny_sam_config, tmp_path):
    generator = build_generator(noise_codes=3, tint_codes=[1], faint_code=2, turned_columns=[1], freeze_sam=False)
    first = generator.noise_head.noise_tokens.weight[:3].detach().clone()
    bilevel.keep_first_noise(generator)
    assert torch.equal(generator.noise_head.noise_tokens.weight, first)
    _, surrogates = networks(build_generator, tiny_sam_config)
    data = InteractiveSegmentation([Discs()], 64, (0.8, 1.2))
    settings = BilevelConfig(epochs=1, batch_size=4, points=64, alternation="joint")
    accelerator = Accelerator(cpu=True)
    with pytest.raises(FileNotFoundError, match="start without resume"):  # which takes the same accelerator
        train(generator, surrogates, data, settings, tmp_path / "run", accelerator, resume=True)
    assert train(generator, surrogates, data, settings, tmp_path / "run", accelerator, report=str)
    assert not torch.equal(generator.noise_head.noise_tokens.weight, first)
    # Its checkpoints would have the models of both.
    with pytest.raises(ValueError, match="make a new Accelerator for each run"):
        train(generator, surrogates, data, settings, tmp_path / "next", accelerator, report=str)
    assert not (tmp_path / "next").exists()


def test_a_full_disk_ends_a_run_with_the_checkpoint_to_go_on_from(small_run, tmp_path, monkeypatch):
    real = Accelerator.save_state

    def full(self, folder, **options):
        real(self, folder, **options)
        if "step-00000004" in folder:
            raise RuntimeError("[enforce fail] PytorchStreamWriter failed\nwriting file")

    monkeypatch.setattr(Accelerator, "save_state", full)
    with pytest.raises(
        OSError, match=r"step-00000004 could not be written \(.*failed writing file\); make room, .*003$"
    ):
        small_run(tmp_path, save_every=1, batch_size=4)
    assert sorted(path.name for path in (tmp_path / "checkpoints").iterdir()) == ["step-00000002", "step-00000003"]
    monkeypatch.undo()
    small_run(tmp_path, save_every=1, batch_size=4, resume=True)


def test_surrogates_are_given_as_what_makes_them():
    with pytest.raises(ValueError, match="a UNetSurrogate was given: pass functions that make one"):
        Surrogates([UNetSurrogate(4, 32)])


def weights(model):
    return torch.cat([p.detach().flatten() for p in model.parameters()])


def buffers(model):
    return torch.cat([b.detach().flatten().float() for b in model.buffers()])


class TestSettings:
    def test_the_papers_turns(self):
        config = BilevelConfig()
        turns = [config.trains(epoch, step=epoch * 100) for epoch in range(8)]
        assert turns == [(False, True), (True, False), (True, False), (True, False)] * 2
        assert len({config.trains(5, step) for step in range(20)}) == 1

    def test_turns_by_step_with_a_ratio(self):
        config = BilevelConfig(alternation="step", surrogate_turns=2, generator_turns=1)
        assert [config.trains(0, step)[0] for step in range(6)] == [False, False, True] * 2
        assert BilevelConfig(alternation="joint").trains(0, 0) == (True, True)

    def test_the_budget_falls_to_its_end_and_stays(self):
        config = BilevelConfig(epsilon=0.02, epsilon_background=0.005, epsilon_start=4, epsilon_warmup=0.6)
        assert config.budget(0.0) == pytest.approx((0.08, 0.02))
        assert config.budget(0.3) == pytest.approx((0.05, 0.0125))
        assert config.budget(0.6) == config.budget(1.0) == pytest.approx((0.02, 0.005))

    def test_rates(self):
        paper = BilevelConfig()
        assert [paper.rate(epoch / 27, 0) for epoch in (0, 19, 20, 26)] == [1.0, 1.0, 0.1, 0.1]
        cosine = BilevelConfig(schedule="cosine")
        assert cosine.rate(0.0, 0) == pytest.approx(0.01)
        assert cosine.rate(0.5, 500) == pytest.approx(0.5)

    def test_surrogates_begin_anew_one_after_another(self):
        config = BilevelConfig(surrogate_restart=10)
        begun = {step: found for step in range(31) if (found := config.restarts(step, 2))}
        assert begun == {10: [0], 15: [1], 20: [0], 25: [1], 30: [0]}
        assert not BilevelConfig().restarts(10, 2)

    @pytest.mark.parametrize(
        ("settings", "message"),
        [
            ({"alternation": "week"}, "alternation='week'"),
            ({"prompt_kinds": ["text"]}, "prompt_kinds"),
            ({"postprocessings": ["fax"]}, "postprocessings"),
            ({"epsilon": 0.1, "epsilon_background": 0.2}, "epsilon_background <= epsilon"),
            ({"epsilon_start": 0.5}, "epsilon_start=0.5"),
            ({"epsilon_start": 4.0}, "epsilon_start=4.0 with epsilon_warmup=0.0"),
            ({"surrogate_turns": 0}, "surrogate_turns=0"),
            ({"keep_checkpoints": -1}, "keep_checkpoints=-1"),
            ({"surrogate_restart": -1}, "surrogate_restart=-1"),
            ({"correlation_weight": -1.0}, "correlation_weight=-1.0"),
            ({"augmentation_probability": 1.5}, "augmentation_probability=1.5: must be from 0 to 1"),
            ({"correlation_weight": 1.0, "batch_size": 1}, "correlation_weight=1.0 with batch_size=1: .* at least 2"),
            ({"postprocess_probability": 2.0}, "postprocess_probability=2.0: must be from 0 to 1"),
            ({"max_gradient_norm": -1.0}, "max_gradient_norm=-1.0"),
            ({"learning_rate": float("nan")}, "learning_rate=nan"),
        ],
    )
    def test_contradicting_settings_are_named(self, settings, message):
        with pytest.raises(ValueError, match=message):
            BilevelConfig(**settings)


class TestPhases:
    def test_noise_keeps_to_the_budget_and_off_the_padding(self):
        mask, inside = torch.zeros(1, 16, 16), torch.ones(1, 16, 16)
        mask[:, :8], inside[..., 12:] = 1, 0
        batch = {"image": torch.full((1, 3, 16, 16), 0.5), "mask": mask, "inside": inside}
        noise = apply_budget(batch, torch.ones(1, 3, 4, 4), 0.04, 0.01) - 0.5
        assert noise[0, :, :8, :12] == pytest.approx(0.04, abs=1e-6)
        assert noise[0, :, 8:, :12] == pytest.approx(0.01, abs=1e-6)
        assert not noise[..., 12:].any()

    def test_each_turn_moves_its_own_network_alone(self, small_run, build_generator, tiny_sam_config, tmp_path):
        fresh_generator, fresh_surrogates = networks(build_generator, tiny_sam_config)
        # Three steps an epoch: the first epoch is the surrogates', the second the generator's.
        generator, surrogates, log = small_run(tmp_path / "one", epochs=1, generator_turns=0)
        assert torch.equal(weights(generator), weights(fresh_generator))
        assert not torch.equal(weights(surrogates), weights(fresh_surrogates))
        assert set(log[0]) == {"step", "images_per_second", "noise", "surrogate"}
        # The same first epoch, as cosine is not, with a constant rate.
        constant = {"schedule": "step", "decay_at": 1.0}
        _, first, _ = small_run(tmp_path / "first", epochs=1, generator_turns=0, **constant)
        generator, surrogates, log = small_run(tmp_path / "both", epochs=2, **constant)
        assert not torch.equal(weights(generator), weights(fresh_generator))
        assert torch.equal(weights(surrogates), weights(first))
        assert torch.equal(buffers(surrogates), buffers(first))  # running means of batch norm, too
        assert "generator" in log[-1]
        assert "surrogate" not in log[-1]

    def test_a_surrogate_that_begins_anew_keeps_its_rate_and_nothing_else(self, small_run, tmp_path):
        settings = {"alternation": "joint", "epochs": 8, "surrogate_learning_rate": 1e-2, "learning_rate": 0.0}
        *_, log = small_run(tmp_path, surrogate_restart=20, **settings)
        before, after = log[19]["surrogate"], log[20]["surrogate"]
        assert after > before + 0.1
        assert log[-1]["surrogate"] < after - 0.1

    def test_noises_of_different_images_part_where_that_is_asked_for(self, small_run, tmp_path):
        settings = {"alternation": "joint", "epochs": 12, "learning_rate": 3e-3}
        *_, alike = small_run(tmp_path / "alike", correlation_weight=1e-9, **settings)
        *_, apart = small_run(tmp_path / "apart", correlation_weight=5.0, **settings)
        assert apart[-1]["correlation"] < 0.5 * alike[-1]["correlation"]

    def test_what_is_not_published_does_not_make_noises_differ(self):
        random = torch.Generator().manual_seed(0)
        noise = torch.randn(2, 3, 8, 8, generator=random)
        noise[1, :, :4] = noise[0, :, :4]  # the upper halves are alike, and the masks lie there
        masks = torch.zeros(2, 32, 32)
        masks[:, :16] = 1
        assert bilevel._correlation(noise, masks / 255) == pytest.approx(1, abs=1e-4)
        assert bilevel._correlation(noise, torch.ones(2, 32, 32)) < 0.7
        assert bilevel._correlation(noise, torch.zeros(2, 32, 32)) == 0  # without a budget there is no noise

    def test_augmented_masks_follow_their_images(self):
        random = torch.Generator().manual_seed(0)
        masks = torch.zeros(2, 64, 64)
        masks[:, 20:44, 20:44] = 1
        images = masks.unsqueeze(1).expand(-1, 3, -1, -1) * 0.9 + 0.05
        state = torch.get_rng_state()
        seen, moved = _augmented(images.clone().requires_grad_(), masks, 1.0, random)
        assert torch.equal(torch.get_rng_state(), state)
        assert not torch.equal(moved, masks)
        # Whatever the colours: inside the moved mask it is brighter than outside.
        bright = seen.mean(1) > seen.detach().amax((1, 2, 3), keepdim=True)[:, 0] / 2
        assert ((bright == (moved > 0.5)).float().mean()) > 0.95
        assert torch.autograd.grad(seen.sum(), seen, allow_unused=True)[0] is not None
        same, there = _augmented(images, masks, 0.0, random)
        assert same is images
        assert there is masks
        # In the corner, from where most rotations move it out of the picture.
        corner = torch.zeros(2, 64, 64)
        corner[:, :4, :4] = 1
        kept = [_augmented(images, corner, 1.0, random) for _ in range(10)]
        assert all(there.flatten(1).any(1).all() for _, there in kept)
        assert any(same is images and there is corner for same, there in kept)

    @pytest.mark.parametrize("kinds", [("unet",), ("sam",), ("unet", "sam")])
    def test_noise_learns_to_show_the_mask(self, small_run, tmp_path, kinds):
        _, _, log = small_run(
            tmp_path, kinds, epochs=25, schedule="step", decay_at=1.0, alternation="joint", label_modification=False,
            epsilon=0.3, epsilon_background=0.05, learning_rate=2e-3, surrogate_learning_rate=2e-3,
            sam_loss_weight=0.0,
        )  # fmt: skip
        first, last = (np.mean([entry["surrogate"] for entry in part]) for part in (log[:3], log[-3:]))
        assert last < 0.88 * first

    def test_a_frozen_sam_is_not_touched_and_not_saved(self, small_run, build_generator, tmp_path):
        before = build_generator(freeze_sam=True)
        generator, _, _ = small_run(tmp_path, freeze_sam=True, alternation="joint", learning_rate=0.1)
        assert torch.equal(weights(generator.sam), weights(before.sam))
        assert not torch.equal(weights(generator.noise_head), weights(before.noise_head))
        from safetensors import safe_open

        with safe_open(tmp_path / "checkpoints/step-00000006/model_0.safetensors", "pt") as file:
            names = list(file.keys())
        assert names
        assert all("noise_head" in name for name in names)

    def test_accumulated_batches_make_one_step(self, small_run, tmp_path):
        _, _, log = small_run(
            tmp_path, alternation="joint", gradient_accumulation_steps=3, batch_size=2, epochs=3, save_every=1,
            keep_checkpoints=0,
        )  # fmt: skip
        assert [entry["step"] for entry in log] == [1, 2, 3, 4, 5, 6]
        assert len(list((tmp_path / "checkpoints").iterdir())) == 6

    def test_no_gradient_is_carried_into_another_epoch(self, small_run, tmp_path):
        # Twelve batches an epoch are two steps of five, and two batches that are left.
        options = {"alternation": "epoch", "generator_turns": 1, "batch_size": 1, "gradient_accumulation_steps": 5}
        whole, surrogates, log = small_run(tmp_path / "whole", epochs=4, **options)
        assert ["surrogate" in entry for entry in log] == [True, True, False, False] * 2

        def stop_at_3(line):
            if line.startswith("step 3/"):
                os.kill(os.getpid(), signal.SIGTERM)

        small_run(tmp_path / "cut", epochs=4, report=stop_at_3, **options)
        resumed, other, _ = small_run(tmp_path / "cut", epochs=4, resume=True, **options)
        assert torch.equal(weights(resumed), weights(whole))
        assert torch.equal(weights(other), weights(surrogates))

    def test_dropout_goes_on_where_it_was(self, small_run, tmp_path):
        def stop_at_1(line):
            if line.startswith("step 1/"):
                os.kill(os.getpid(), signal.SIGTERM)

        options = {"kinds": ("segformer",), "epochs": 1, "alternation": "joint"}
        whole, surrogates, _ = small_run(tmp_path / "whole", **options)
        small_run(tmp_path / "cut", report=stop_at_1, **options)
        resumed, other, _ = small_run(tmp_path / "cut", resume=True, **options)
        assert torch.equal(weights(resumed), weights(whole))
        assert torch.equal(weights(other), weights(surrogates))

    def test_accumulating_equals_one_larger_batch(self, build_generator, tiny_sam_config, tmp_path, monkeypatch):
        # Losses are means over batches of equal size, so that their gradients average. SAM surrogate: no batch norm.
        # The same randomness for every batch, and a loss that looks at all pixels, in place of points of its own.
        monkeypatch.setattr(bilevel, "_random", lambda *_: torch.Generator().manual_seed(0))
        dense = torch.nn.functional.binary_cross_entropy_with_logits

        def loss(logits, targets, random, count):
            small = torch.nn.functional.adaptive_avg_pool2d(targets, logits.shape[-2:])
            return dense(logits, small, reduction="none").mean((1, 2))

        monkeypatch.setattr(bilevel, "point_loss", loss)
        # Adam's first step has the size of its rate whatever the gradient's.
        monkeypatch.setattr(torch.optim, "Adam", torch.optim.SGD)
        ends = []
        for batches in (1, 2):
            generator, surrogates = networks(build_generator, tiny_sam_config, ("sam",), freeze_sam=True)
            config = BilevelConfig(
                batch_size=4 // batches, gradient_accumulation_steps=batches, max_steps=1, alternation="joint",
                prompt_kinds=["box"], learning_rate=1.0, surrogate_learning_rate=1.0, epsilon=0.1,
            )  # fmt: skip
            accelerator = Accelerator(cpu=True, gradient_accumulation_steps=batches)
            data = InteractiveSegmentation([Discs()], 64, (0.8, 1.2))
            before = weights(generator), weights(surrogates)
            train(generator, surrogates, data, config, tmp_path / str(batches), accelerator, report=str)
            ends.append((weights(generator), weights(surrogates)))
            for old, new in zip(before, ends[-1], strict=True):
                assert (new - old).abs().max() > 1e-4  # so that the tolerance below could tell
        for one, other in zip(*ends, strict=True):
            torch.testing.assert_close(one, other, atol=1e-6, rtol=1e-5)

    def test_a_loss_that_is_not_finite_stops_the_run_and_names_step_and_images(self, small_run, tmp_path):
        with pytest.raises(FloatingPointError, match=r"generator loss is nan at step \d+, .*with discs: disc \d+, "):
            small_run(tmp_path, epochs=20, alternation="joint", learning_rate=float("inf"))

    def test_gradients_that_are_not_finite_are_not_applied(self, build_generator, tiny_sam_config, tmp_path):
        generator, surrogates = networks(build_generator, tiny_sam_config)
        before = weights(generator)
        generator.noise_head.noise_tokens.weight.register_hook(lambda gradient: gradient * float("nan"))
        data = InteractiveSegmentation([Discs()], 64, (0.8, 1.2))
        config = BilevelConfig(epochs=1, alternation="joint", points=64, save_every=1)
        with pytest.raises(FloatingPointError, match=r"generator norm of the gradients is nan at step 0.*with discs"):
            train(generator, surrogates, data, config, tmp_path, Accelerator(cpu=True), report=str)
        assert torch.equal(weights(generator), before)
        assert not (tmp_path / "checkpoints").exists()

    def test_bfloat16_trains_about_as_float32_does(self, build_generator, tiny_sam_config, tmp_path):
        ends = {}
        for precision in ("no", "bf16"):
            AcceleratorState._reset_state(reset_partial_state=True)
            try:
                accelerator = Accelerator(cpu=True, mixed_precision=precision)
                generator, surrogates = networks(build_generator, tiny_sam_config, ("unet", "sam"))
                data = InteractiveSegmentation([Discs()], 64, (0.8, 1.2))
                config = BilevelConfig(
                    epochs=1, alternation="joint", points=256, log_every=1, sam_loss_weight=1.0,
                    postprocess_probability=0.5,
                )  # fmt: skip
                train(
                    generator, surrogates, data, config, tmp_path / precision, accelerator, validation=data, report=str
                )
            finally:
                AcceleratorState._reset_state(reset_partial_state=True)
            assert {p.dtype for p in (*generator.parameters(), *surrogates.parameters())} == {torch.float32}
            lines = (tmp_path / precision / "training_log.jsonl").read_text().splitlines()
            ends[precision] = json.loads(lines[0])
        assert ends["bf16"] != ends["no"]
        for name in ("generator", "surrogate", "sam", "noise"):
            assert ends["bf16"][name] == pytest.approx(ends["no"][name], rel=0.05)

    def test_less_data_than_a_step_needs_is_said(self, small_run, tmp_path):
        with pytest.raises(ValueError, match=r"an epoch of 12 images is less than one step of batch_size=13"):
            small_run(tmp_path, batch_size=13)
        with pytest.raises(ValueError, match=r"ends after 6 steps, before the generator's first turn: an epoch has 6"):
            small_run(tmp_path, batch_size=2, alternation="epoch", epochs=1)
        assert not (tmp_path / "checkpoints").exists()


class TestValidation:
    def test_figures_and_pictures_of_held_out_images(self, small_run, tmp_path):
        held_out = InteractiveSegmentation([Discs()], 64, (1.0, 1.0), epoch_size=6)
        options = {
            "alternation": "joint",
            "epochs": 30,
            "schedule": "step",
            "decay_at": 1.0,
            "label_modification": False,
        }
        strong = {"epsilon": 0.5, "epsilon_background": 0.0, "learning_rate": 2e-3, "surrogate_learning_rate": 1e-2}
        lines = []
        _, _, log = small_run(
            tmp_path / "run", ("unet", "unet"), report=lines.append, validation=held_out, validate_every=40, **options,
            **strong,
        )  # fmt: skip
        found = [entry for entry in log if "surrogate_0_iou_clean" in entry]
        assert [entry["step"] for entry in found] == [40, 80, 90]
        # They saw nothing but protected images, on which the mask is all that has noise.
        assert found[-1]["surrogate_0_iou_protected"] > found[-1]["surrogate_0_iou_clean"] + 0.05
        assert any("surrogate_1_iou_protected" in line for line in lines)
        with Image.open(tmp_path / "run/validation/step-00000090.png") as sheet:
            assert sheet.width == (4 + 2 * 2) * 68 + 4
            pixels = np.asarray(sheet.convert("RGB"))
        assert len(np.unique(pixels)) > 100

    def test_looking_changes_nothing(self, small_run, tmp_path):
        held_out = InteractiveSegmentation([Discs()], 64, (1.0, 1.0), epoch_size=5)
        with_it, other, _ = small_run(tmp_path / "a", alternation="joint", validation=held_out, validate_every=1)
        without, another, _ = small_run(tmp_path / "b", alternation="joint")
        assert torch.equal(weights(with_it), weights(without))
        assert torch.equal(buffers(other), buffers(another))


EVERYTHING = {
    "alternation": "step", "surrogate_turns": 1, "generator_turns": 1, "postprocess_probability": 0.5,
    "epsilon_start": 4.0, "epsilon_warmup": 0.5, "epochs": 4, "save_every": 2, "max_gradient_norm": 1.0,
}  # fmt: skip


def in_child(function):
    """Exit status of a forked process; negative for a signal."""

    def run():
        function()
        os._exit(0)

    process = multiprocessing.get_context("fork").Process(target=run)
    process.start()
    process.join(120)
    return process.exitcode


def die_at(call, module, name, after=False):
    """The process kills itself, as `kill -9` would, at the call-th call of module.name."""
    original, calls = getattr(module, name), []

    def dying(*args, **kwargs):
        calls.append(name)
        if after:
            original(*args, **kwargs)
        if len(calls) == call:
            os.kill(os.getpid(), signal.SIGKILL)
        return None if after else original(*args, **kwargs)

    setattr(module, name, dying)


class TestInterruptions:
    def finish(self, small_run, folder, **options):
        generator, surrogates, _ = small_run(folder, **(EVERYTHING | options))
        torch.save((generator.state_dict(), surrogates.state_dict()), folder / "end.pt")

    def digest(self, folder):
        generator, surrogates = torch.load(folder / "end.pt")
        tensors = [*generator.values(), *surrogates.values()]
        return hashlib.sha256(b"".join(tensor.numpy().tobytes() for tensor in tensors)).hexdigest()

    def test_killed_in_any_phase_and_resumed_it_ends_with_the_same_weights(self, small_run, tmp_path):
        assert in_child(lambda: self.finish(small_run, tmp_path / "whole")) == 0
        cut = tmp_path / "cut"

        def killed(*where, **when):
            def run():
                die_at(*where, **when)
                self.finish(small_run, cut, resume=any(cut.glob("checkpoints/step-*")))

            assert in_child(run) == -signal.SIGKILL
            for checkpoint in cut.glob("checkpoints/step-*"):
                assert (checkpoint / "settings.json").is_file()  # the last thing that is written

        killed(1, checkpoints, "save_file")  # in the first checkpoint: nothing to resume
        killed(2, checkpoints, "save_file")
        killed(5, bilevel, "_update")  # after a checkpoint, in the surrogates' phase
        killed(4, bilevel, "_update", after=True)  # in the generator's, its step done and not counted
        killed(1, bilevel, "random_postprocess")
        killed(1, Path, "rename")  # the checkpoint whole and not yet in its place
        killed(1, Path, "rename", after=True)
        killed(2, Path, "rename", after=True)  # an old one half removed
        killed(1, checkpoints.shutil, "rmtree")
        killed(2, checkpoints.shutil, "rmtree")
        assert in_child(lambda: self.finish(small_run, cut, resume=True)) == 0
        assert self.digest(cut) == self.digest(tmp_path / "whole")
        steps = [json.loads(line)["step"] for line in (cut / "training_log.jsonl").read_text().splitlines()]
        assert steps == list(range(1, 13))
        names = sorted(path.name for path in (cut / "checkpoints").iterdir())
        assert names == ["step-00000010", "step-00000012"]

    @pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
    def test_a_signal_saves_and_stops_between_two_steps(self, small_run, tmp_path, number):
        assert in_child(lambda: self.finish(small_run, tmp_path / "whole", save_every=0)) == 0

        def stop_at_5(line):
            if line.startswith("step 5/"):
                os.kill(os.getpid(), number)

        def cut():
            before = signal.getsignal(number)
            _, _, log = small_run(tmp_path / "cut", report=stop_at_5, **EVERYTHING | {"save_every": 0})
            assert len(log) == 5
            assert signal.getsignal(number) is before

        assert in_child(cut) == 0
        assert [path.name for path in (tmp_path / "cut/checkpoints").iterdir()] == ["step-00000005"]
        assert in_child(lambda: self.finish(small_run, tmp_path / "cut", resume=True, save_every=0)) == 0
        assert self.digest(tmp_path / "cut") == self.digest(tmp_path / "whole")

    def test_a_signal_to_the_whole_group_leaves_the_workers_at_work(self, small_run, tmp_path):
        """As launchers and schedulers send it."""

        def stop_at_5(line):
            if line.startswith("step 5/"):
                os.killpg(0, signal.SIGTERM)
                os.kill(os.getpid(), signal.SIGTERM)  # a launcher that was sent it, too, passes it on

        def cut():
            os.setpgrp()
            small_run(tmp_path, report=stop_at_5, workers=2, **EVERYTHING | {"save_every": 0})

        assert in_child(cut) == 0
        assert [path.name for path in (tmp_path / "checkpoints").iterdir()] == ["step-00000005"]

    def test_a_finished_run_resumes_to_its_end(self, small_run, tmp_path):
        generator, _, log = small_run(tmp_path, alternation="joint")
        again, _, log_again = small_run(tmp_path, alternation="joint", resume=True)
        assert torch.equal(weights(generator), weights(again))
        assert log == log_again

    def test_resume_and_start_are_not_mistaken_for_each_other(self, small_run, tmp_path):
        with pytest.raises(FileNotFoundError, match="no checkpoint to resume from"):
            small_run(tmp_path / "new", resume=True)
        small_run(tmp_path / "old")
        with pytest.raises(FileExistsError, match="step-00000006 is an earlier run's: resume it"):
            small_run(tmp_path / "old")

    def test_other_settings_are_named_before_anything_is_trained(self, small_run, tmp_path):
        small_run(tmp_path)
        with pytest.raises(ValueError, match=r"batch_size is 2, was 4; learning_rate is 0.1, was 0.0001"):
            small_run(tmp_path, resume=True, batch_size=2, learning_rate=0.1)
        small_run(tmp_path, resume=True, log_every=5)  # what is written may change

    def test_no_file_of_a_checkpoint_is_run(self, small_run, tmp_path):
        small_run(tmp_path)
        ran = tmp_path / "ran"

        class Pickled:
            def __reduce__(self):
                return Path.touch, (ran,)

        (checkpoint,) = (tmp_path / "checkpoints").iterdir()
        pickles = [path for path in checkpoint.iterdir() if path.suffix in (".bin", ".pkl")]
        assert pickles
        for path in (*pickles, checkpoint / "custom_checkpoint_0.pkl"):
            before = path.read_bytes() if path.exists() else None
            torch.save(Pickled(), path)
            with contextlib.suppress(Exception):
                small_run(tmp_path, resume=True)
            assert not ran.exists(), path
            path.unlink() if before is None else path.write_bytes(before)
        small_run(tmp_path, resume=True)

    def test_another_frozen_sam_is_noticed(self, small_run, tmp_path, monkeypatch):
        small_run(tmp_path, freeze_sam=True)
        monkeypatch.setattr(checkpoints, "fingerprint", lambda module: "another")
        with pytest.raises(ValueError, match="frozen_weights is 'another'"):
            small_run(tmp_path, freeze_sam=True, resume=True)


TWO_PROCESSES = """
    import sys
    import torch
    sys.path.insert(0, {tests!r})
    from accelerate.utils import DistributedDataParallelKwargs
    from conftest import tiny_sam_config, build_generator
    from test_bilevel import Discs, networks
    from unseg_hf.data.interactive import InteractiveSegmentation
    from unseg_hf.training.bilevel import train
    from unseg_hf.training.checkpoints import fingerprint
    from unseg_hf.training.configuration_bilevel import BilevelConfig
    from unseg_hf.training.processes import build_accelerator

    sam_config = tiny_sam_config.__wrapped__()
    generator, surrogates = networks(build_generator.__wrapped__(sam_config), sam_config, ("unet", "sam"))
    handlers = [DistributedDataParallelKwargs(find_unused_parameters=True)]
    accelerator = build_accelerator(gradient_accumulation_steps=2, kwargs_handlers=handlers)
    config = BilevelConfig(
        epochs=4, batch_size=1, gradient_accumulation_steps=2, points=128, sam_loss_weight=1.0, max_gradient_norm=1.0,
        alternation={alternation!r}, log_every=1, save_every=3, postprocess_probability=0.3,
        surrogate_turns=1, generator_turns=1,
    )
    data = InteractiveSegmentation([Discs()], 64, (0.8, 1.2))
    def report(line):
        if {stop!r} and line.startswith({stop!r}):
            import os, signal
            os.kill(os.getpid(), signal.SIGTERM)
    finished = train(generator, surrogates, data, config, {folder!r}, accelerator, resume={resume!r}, report=report)
    from pathlib import Path
    ended = finished, fingerprint(generator), hash(tuple(float(p.sum()) for p in surrogates.parameters()))
    # Not to stdout, where the lines of two processes run into each other.
    Path({results!r}, str(accelerator.process_index)).write_text(" ".join(map(str, ended)))
"""


@pytest.mark.slow
class TestTwoProcesses:
    def run(self, tmp_path, folder, alternation, resume=False, stop=""):
        program = tmp_path / "program.py"
        tests = str(Path(__file__).parent)
        values = {"tests": tests, "alternation": alternation, "folder": str(folder), "resume": resume, "stop": stop}
        values["results"] = str(tmp_path)
        program.write_text(textwrap.dedent(TWO_PROCESSES.format(**values)))
        done = subprocess.run(
            [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", program],
            capture_output=True, text=True, timeout=300, check=False,
            env=os.environ | {"PYTHONHASHSEED": "0"},
        )  # fmt: skip
        assert done.returncode == 0, done.stderr
        return [(tmp_path / rank).read_text().split() for rank in ("0", "1")]

    @pytest.mark.parametrize("alternation", ["joint", "step"])
    def test_both_end_with_the_same_weights_also_when_resumed(self, tmp_path, alternation):
        first, second = self.run(tmp_path, tmp_path / "whole", alternation)
        assert first == second
        assert first[0] == "True"
        steps = [json.loads(line)["step"] for line in (tmp_path / "whole/training_log.jsonl").read_text().splitlines()]
        assert steps == list(range(1, 13))  # 12 images an epoch, 4 a step over both processes
        if alternation == "joint":
            # One of the two is told to stop: both do, at the same step.
            assert [end[0] for end in self.run(tmp_path, tmp_path / "cut", alternation, stop="step 5/")] == [
                "False"
            ] * 2
            assert self.run(tmp_path, tmp_path / "cut", alternation, resume=True) == [first, second]


def test_each_process_makes_its_own_choices():
    assert len({_random(0, 0, 0, rank).initial_seed() for rank in range(4)}) == 4
