"""What a training run says while it goes on: a progress bar, lines, `training_log.jsonl`, and trackers."""

import json
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import torch
from accelerate import Accelerator
from PIL import Image
from tqdm import tqdm

from ..image_files import put_in_place


class RunLog:
    """Means of the losses since the last line, over all processes.

    Args:
        folder: gets `training_log.jsonl` and `validation/`.
        accelerator: its trackers get every line, too.
        first: step that the run begins with; lines of later steps, of a run that was killed, are removed.
        total: step that it ends with.
        every: steps between two lines.
        report: called with each line, as text.
    """

    def __init__(
        self, folder: Path, accelerator: Accelerator, first: int, total: int, every: int, report: Callable[[str], None]
    ):
        self.folder, self.accelerator, self.every, self.report = folder, accelerator, every, report
        self.total, self._images, self._since = total, 0, time.perf_counter()
        self._losses: dict[str, list[torch.Tensor]] = {}
        self._file = folder / "training_log.jsonl"
        self._bar = tqdm(
            total=total, initial=first, unit="step", disable=None if accelerator.is_main_process else True
        )
        if accelerator.is_main_process and self._file.exists():
            lines = self._file.read_text().splitlines(keepends=True)
            kept = [line for line in lines if line.endswith("\n") and json.loads(line)["step"] <= first]
            put_in_place("".join(kept).encode(), self._file)

    def add(self, losses: dict[str, torch.Tensor], images: int) -> None:
        """Count a batch: its losses, scalars, and its images, those of all processes."""
        self._images += images
        for name, loss in losses.items():
            self._losses.setdefault(name, []).append(loss.detach())

    def step(self, step: int) -> None:
        """A step is over."""
        self._bar.update()
        if step % self.every and step != self.total:
            return
        means = {}
        if self._losses:
            own = torch.stack([torch.stack(values).mean() for values in self._losses.values()])
            means = dict(zip(self._losses, self.accelerator.reduce(own, "mean").tolist(), strict=True))
        now = time.perf_counter()
        rate = self._images / (now - self._since)
        self._losses, self._images, self._since = {}, 0, now
        self._bar.set_postfix({name: f"{value:.3f}" for name, value in means.items()} | {"images/s": f"{rate:.3g}"})
        figures = "  ".join(f"{name} {value:.4f}" for name, value in means.items())
        self._write(step, {**means, "images_per_second": round(rate, 4)}, f"{figures}  {rate:.3g} images/s")

    def validation(self, step: int, figures: dict[str, float], pictures: Image.Image) -> None:
        """Figures and a sheet of pictures of held-out images; the main process calls this alone."""
        folder = self.folder / "validation"
        folder.mkdir(exist_ok=True)
        pictures.save(folder / f"step-{step:08d}.png")
        self._write(step, figures, "  ".join(f"{name} {value:.3f}" for name, value in figures.items()))
        for tracker in self.accelerator.trackers:
            if tracker.name == "tensorboard":
                tracker.log_images({"validation": np.asarray(pictures)[None]}, step=step, dataformats="NHWC")
            elif tracker.name == "trackio":
                import trackio

                tracker.log({"validation": trackio.Image(pictures)}, step=step)
            else:
                tracker.log_images({"validation": [pictures]}, step=step)

    @contextmanager
    def paused(self) -> Iterator[None]:
        """What happens inside takes no time of training's."""
        start = time.perf_counter()
        yield
        self._since += time.perf_counter() - start

    def close(self) -> None:
        """End the progress bar."""
        self._bar.close()

    def _write(self, step: int, figures: dict[str, float], text: str) -> None:
        self.accelerator.log(figures, step=step)
        if self.accelerator.is_main_process:
            with self._file.open("a") as file:
                file.write(json.dumps({"step": step, **figures}) + "\n")
            with tqdm.external_write_mode():
                self.report(f"step {step}/{self.total}  {text}")
