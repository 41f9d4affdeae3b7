"""Bilevel steps of this package, and of a plain loop that computes the same, for `speed.py training`: prints images/s.

    python benchmarks/train_steps.py loop large
    python benchmarks/train_steps.py plain small

Both train generator and surrogate on the same noise in every step. The plain loop has transformers' own SAM, keeps all
of its hidden states, and lets every backward pass reach all that is trained.
"""

import argparse
import contextlib
import io
import json
import tempfile
import time
from functools import partial
from pathlib import Path

import numpy as np
import torch
from accelerate import Accelerator
from PIL import Image
from transformers import SamModel

from unseg_hf import UnSegConfig, UnSegImageEmbeddings, UnSegModel, default_checkpoint
from unseg_hf.data.interactive import InteractiveSegmentation
from unseg_hf.data.records import Record
from unseg_hf.evaluation.victims.base import normalise
from unseg_hf.training.bilevel import apply_budget, train
from unseg_hf.training.configuration_bilevel import BilevelConfig
from unseg_hf.training.losses import point_loss
from unseg_hf.training.prompts import make_prompts
from unseg_hf.training.surrogates import Surrogates, UNetSurrogate

STEPS = 3  # after one that is not counted


class Squares:
    """Pictures of noise with a square in each."""

    name, weight = "squares", None

    def __init__(self, size: int, side: int):
        self.size, self.side = size, side

    def order(self, random, rank, world):
        return iter(random.permutation(self.size)[rank::world].tolist())

    def load(self, index):
        pixels = np.random.default_rng(index).integers(0, 256, (self.side, self.side, 3), dtype=np.uint8)
        square = np.zeros((self.side, self.side), dtype=bool)
        square[self.side // 4 : self.side // 2, self.side // 3 : self.side // 2] = True
        return Record(f"square {index}", Image.fromarray(pixels), [square])


def networks(size: str) -> tuple[UnSegModel, Surrogates]:
    """`large`: the paper's generator, its SAM frozen, with 3 of its 12 layers; `small`: the embedded one, all of it
    trained."""
    torch.manual_seed(0)
    if size == "small":
        generator = UnSegModel.from_pretrained(default_checkpoint())
    else:
        vision = {"num_hidden_layers": 3, "global_attn_indexes": [2]}
        generator = UnSegModel(UnSegConfig(sam_config={"vision_config": vision}))
    side = generator.config.sam_config.vision_config.image_size
    return generator, Surrogates([partial(UNetSurrogate, width=16, image_size=min(side, 256))])


def loop(generator: UnSegModel, surrogates: Surrogates, data: InteractiveSegmentation, batch_size: int) -> float:
    """Images/s of this package's loop."""
    config = BilevelConfig(
        max_steps=STEPS + 1, epochs=1, batch_size=batch_size, alternation="joint", prompt_kinds=["box"], log_every=1
    )
    with tempfile.TemporaryDirectory() as folder, contextlib.redirect_stderr(io.StringIO()):
        train(generator, surrogates, data, config, folder, Accelerator(cpu=True), report=lambda line: None)
        lines = (Path(folder) / "training_log.jsonl").read_text().splitlines()
    rates = [json.loads(line)["images_per_second"] for line in lines][1:]
    return len(rates) / sum(1 / rate for rate in rates)


def plain(generator: UnSegModel, surrogates: Surrogates, data: InteractiveSegmentation, batch_size: int) -> float:
    """Images/s of the plain loop."""
    config, random = BilevelConfig(), torch.Generator().manual_seed(0)
    sam = SamModel(generator.config.sam_config)
    sam.load_state_dict(generator.sam.state_dict())
    for own, stock in zip(generator.sam.parameters(), sam.parameters(), strict=True):
        stock.requires_grad_(own.requires_grad)
    generator.sam = sam
    adam_g = torch.optim.Adam((p for p in generator.parameters() if p.requires_grad), config.learning_rate)
    adam_s = torch.optim.Adam(surrogates.parameters(), config.surrogate_learning_rate)
    generator.train()
    surrogates.train()
    loader = torch.utils.data.DataLoader(data, batch_sampler=data.batches(0, batch_size))

    def loss_of(images: torch.Tensor, masks: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        (logits,) = surrogates(normalise(images), make_prompts(masks, ("box",), random))
        return point_loss(logits, target, random, config.points).mean()

    seconds, start = [], time.perf_counter()
    for batch in loader:
        masks = batch["mask"]
        encoded = sam.vision_encoder(normalise(batch["image"]), output_hidden_states=True)
        embeddings = UnSegImageEmbeddings(
            encoded.last_hidden_state,
            generator.noise_head.image_features(
                encoded.last_hidden_state, encoded.hidden_states[generator.config.fusion_layer]
            ),
        )
        noise = generator(image_embeddings=embeddings, **make_prompts(masks, ("box",), random)).noise[:, 0]
        protected = apply_budget(batch, noise, config.epsilon, config.epsilon_background)
        loss_of(protected, masks, torch.ones_like(masks)).backward()
        adam_g.step()
        adam_g.zero_grad()
        adam_s.zero_grad()
        loss_of(protected.detach(), masks, masks).backward()
        adam_s.step()
        adam_s.zero_grad()
        now = time.perf_counter()
        seconds.append(now - start)
        start = now
    return batch_size * STEPS / sum(seconds[1:])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("way", choices=("plain", "loop"))
    parser.add_argument("size", choices=("large", "small"))
    parser.add_argument("--threads", type=int, default=1)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    generator, surrogates = networks(options.size)
    side = generator.config.sam_config.vision_config.image_size
    batch_size = 1 if options.size == "large" else 8
    data = InteractiveSegmentation([Squares(batch_size * (STEPS + 1), side)], side, (1.0, 1.0))
    print({"plain": plain, "loop": loop}[options.way](generator, surrogates, data, batch_size))


if __name__ == "__main__":
    main()
