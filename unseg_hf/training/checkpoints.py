"""Checkpoints of a training run: whole or not there, as many as wanted, without weights that nobody trains."""

import hashlib
import itertools
import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import nn

from ..image_files import one_line

SETTINGS, PROGRESS = "settings.json", "progress.json"
_UNFINISHED = ".unfinished-"


class Checkpoints:
    """The checkpoints `step-NNNNNNNN` in a folder.

    A checkpoint is written under another name and renamed when it is whole, so that a process may be killed at any
    moment. Weights that `frozen` names are left out of it: they come from where the run got them.

    Args:
        folder: of the checkpoints.
        accelerator: with the models and optimizers of the run prepared, and no objects registered.
        settings: whatever decides the result of the run; a run is resumed with the same ones only.
        keep: the number of checkpoints that stay, the newest; 0 keeps all.
        frozen: a module whose weights no checkpoint holds.
    """

    def __init__(
        self, folder: Path, accelerator: Accelerator, settings: dict[str, Any], keep: int, frozen: nn.Module | None
    ):
        self.folder, self.accelerator, self.keep = folder, accelerator, keep
        self._frozen = {id(tensor) for tensor in frozen.state_dict(keep_vars=True).values()} if frozen else set()
        # Through JSON and back, so that what is compared is what a file can say.
        self.settings = json.loads(json.dumps(settings | {"frozen_weights": fingerprint(frozen) if frozen else None}))
        accelerator.register_save_state_pre_hook(self._save_weights)
        accelerator.register_load_state_pre_hook(self._load_weights)

    def save(self, step: int) -> None:
        """Write a checkpoint, and remove those that are too many.

        Raises:
            OSError: it cannot be written, on a full disk, say; those before it are whole.
        """
        target = self.folder / f"step-{step:08d}"
        if target.exists():
            return
        unfinished = self.folder / f"{_UNFINISHED}{target.name}"
        if self.accelerator.is_main_process:
            self._sweep()
        self.accelerator.wait_for_everyone()
        try:
            self.accelerator.save_state(str(unfinished))
            if self.accelerator.is_main_process:
                (unfinished / SETTINGS).write_text(json.dumps(self.settings, indent=2))
                # Not an object that Accelerate saves: it unpickles those, which runs whatever a file says.
                (unfinished / PROGRESS).write_text(json.dumps({"step": step}))
        except (OSError, RuntimeError, SafetensorError) as error:  # a full disk is each of them, by who writes
            shutil.rmtree(unfinished, ignore_errors=True)
            raise OSError(
                f"{target} could not be written ({one_line(error)}); make room, or mend what is wrong there, and "
                f"resume from {latest_in(self.folder) or 'the beginning: there is no earlier checkpoint'}"
            ) from error
        self.accelerator.wait_for_everyone()
        if self.accelerator.is_main_process:
            unfinished.rename(target)
            # Renamed before they are emptied: a checkpoint with files missing must not look like one.
            for old in sorted(self.folder.glob("step-*"))[: -self.keep] if self.keep else ():
                old.rename(self.folder / f"{_UNFINISHED}{old.name}")
            self._sweep()

    def load(self, checkpoint: Path) -> int:
        """Go back to where a checkpoint was written; the number of steps until then.

        Raises:
            ValueError: the checkpoint is of a run with other settings, naming each.
        """
        stored = json.loads((checkpoint / SETTINGS).read_text())
        if not (checkpoint / PROGRESS).exists():
            raise ValueError(f"{checkpoint} is of an earlier version of this package: start anew in another folder")
        differing = [
            f"{name} is {self.settings.get(name)!r}, was {stored.get(name)!r}"
            for name in sorted(stored.keys() | self.settings.keys())
            if stored.get(name) != self.settings.get(name)
        ]
        if differing:
            raise ValueError(
                f"{checkpoint} is of a run with other settings: {'; '.join(differing)}. Resume with the same ones, or "
                "start anew in another output folder"
            )
        if self.accelerator.is_main_process:
            self._sweep()
        self.accelerator.load_state(str(checkpoint))
        return json.loads((checkpoint / PROGRESS).read_text())["step"]

    def _sweep(self) -> None:
        """What a killed process left."""
        for leftover in self.folder.glob(f"{_UNFINISHED}*"):
            shutil.rmtree(leftover, ignore_errors=True)

    def _trained(self, model: nn.Module) -> Iterator[tuple[str, torch.Tensor]]:
        model = self.accelerator.unwrap_model(model)
        for name, tensor in itertools.chain(model.named_parameters(), model.named_buffers()):
            if id(tensor) not in self._frozen:
                yield name, tensor

    def _save_weights(self, models: list[nn.Module], weights: list[dict], folder: str) -> None:
        weights.clear()  # Accelerate's own files would hold the frozen weights too
        if self.accelerator.is_main_process:
            for index, model in enumerate(models):
                tensors = {name: tensor.detach().contiguous() for name, tensor in self._trained(model)}
                save_file(tensors, Path(folder) / f"model_{index}.safetensors")

    def _load_weights(self, models: list[nn.Module], folder: str) -> None:
        for index, model in enumerate(models):
            stored = load_file(Path(folder) / f"model_{index}.safetensors")
            own = dict(self._trained(model))
            if stored.keys() != own.keys():
                odd = sorted(stored.keys() ^ own.keys())
                raise ValueError(f"{folder} is of another model: {len(odd)} weights do not match, {odd[0]} among them")
            with torch.no_grad():
                for name, tensor in own.items():
                    tensor.copy_(stored[name])
        models.clear()


def latest_in(folder: Path) -> Path | None:
    """The newest checkpoint in a folder."""
    return max(folder.glob("step-*"), default=None)


def fingerprint(module: nn.Module) -> str:
    """SHA-256 of a module's weights, the same on every device."""
    digest = hashlib.sha256()
    for name, tensor in sorted(module.state_dict().items()):
        digest.update(name.encode() + tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()
