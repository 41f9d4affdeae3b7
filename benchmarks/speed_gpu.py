"""A generator of the paper's size on a GPU: images a second against what its arithmetic allows.

    python benchmarks/speed_gpu.py --batches 1 4 16

SAM ViT-B at 1024 px with random weights. The card's rate is measured once, by a large matrix product; operations are
counted, not estimated. Then come the parts: one global layer's attention in several ways, encoding at several batch
sizes, recorded, and compiled, the noise of a prompt, and `unseg protect` from files to files beside Pillow's decoding
and encoding. Medians; every row is timed after two rounds that are not.
"""

import argparse
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch
import torch.nn.functional as F
from protect_large import make, take_stock_sam
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from unseg_hf import Protector, UnSegModel, vision_unseg
from unseg_hf.protect_command import MOST_THREADS
from unseg_hf.recorded_encoder import RecordedEncoder

SIDE = 1024
PHOTO = (1200, 800)


def seconds(work, rounds: int) -> float:
    """Median of so many rounds, each waited for."""
    times = []
    for number in range(rounds + 2):
        torch.cuda.synchronize()
        start = time.perf_counter()
        work()
        torch.cuda.synchronize()
        if number > 1:
            times.append(time.perf_counter() - start)
    return statistics.median(times)


def matrix_rate(dtype: torch.dtype, rounds: int) -> float:
    """Operations a second of a product of two 8192 x 8192 matrices."""
    a, b = (torch.randn(8192, 8192, device="cuda", dtype=dtype) for _ in range(2))
    return 2 * 8192**3 / seconds(lambda: a @ b, rounds)


def attention(rounds: int, images: int = 4) -> None:
    """A global layer's: 12 heads, 64 x 64 tokens, bfloat16."""

    def random(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, device="cuda", dtype=torch.bfloat16)

    query, key, value = (random(images, 12, 4096, 64) for _ in range(3))
    down, across = random(64, 64, 64) / 8, random(64, 64, 64) / 8

    def with_bias() -> torch.Tensor:
        return vision_unseg._with_bias(query, key, value, down, across, 64)

    row = torch.eye(64, device="cuda", dtype=torch.bfloat16)
    ones = torch.cat([row.repeat_interleave(64, 0), row.repeat(64, 1)], 1)

    def folded() -> torch.Tensor:
        """The bias as 128 more channels of the product: a query's towards each row and column, and a key's place."""
        grid = query.unflatten(2, (64, 64))
        vertical = torch.einsum("nhrwc,rkc->nhrwk", grid, down)
        horizontal = torch.einsum("nhrwc,wkc->nhrwk", grid, across)
        longer = torch.cat([query / 8, vertical.flatten(2, 3), horizontal.flatten(2, 3)], -1)
        places = torch.cat([key, ones.expand(*key.shape[:2], -1, -1)], -1)
        return F.scaled_dot_product_attention(longer, places, F.pad(value, (0, 128)), scale=1.0)[..., :64]

    print(f"\n| attention of a global layer, {images} images | ms an image | largest difference |")
    print("|---|---|---|")
    exact = with_bias()
    ways = {"without any bias": lambda: F.scaled_dot_product_attention(query, key, value), "bias, as here": with_bias}
    for backend in (SDPBackend.FLASH_ATTENTION, SDPBackend.CUDNN_ATTENTION):

        def way(backend=backend) -> torch.Tensor:
            with sdpa_kernel(backend):
                return folded()

        ways[f"folded into the product, {backend.name}"] = way
    for name, work in ways.items():
        try:
            difference = (work() - exact).abs().max().item()
            print(f"| {name} | {seconds(work, rounds) / images * 1e3:.2f} | {difference:.3g} |", flush=True)
        except RuntimeError as error:
            print(f"| {name} | {str(error).splitlines()[0][:80]} | |")


def encoding(folder: Path, batches: list[int], rounds: int, rate: float) -> None:
    def stock() -> UnSegModel:
        model = UnSegModel.from_pretrained(folder)
        take_stock_sam(model)
        return model

    def bf16() -> UnSegModel:
        model = UnSegModel.from_pretrained(folder)
        model.encode_in_bf16()
        return model

    ways = {"transformers' own, float32": stock, "parts, float32": lambda: UnSegModel.from_pretrained(folder)}
    ways["parts, bfloat16"] = bf16
    model = stock().cuda().eval()
    with torch.inference_mode(), FlopCounterMode(display=False) as counter:
        model.get_image_embeddings(torch.randn(1, 3, SIDE, SIDE, device="cuda"))
    count = counter.get_total_flops()
    print(f"\nencoding one image: {count / 1e9:.0f} billion operations; limit {rate / count:.0f} images/s\n")
    print("| encoder | batch | images/s | share of the limit | GB |")
    print("|---|---|---|---|---|")

    def row(name: str, encode, batch: int) -> None:
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
        pixels = torch.randn(batch, 3, SIDE, SIDE, device="cuda")
        with torch.inference_mode():
            per_second = batch / seconds(lambda: encode(pixels), rounds)
        memory = torch.cuda.max_memory_allocated() / 1e9
        print(f"| {name} | {batch} | {per_second:.1f} | {per_second * count / rate:.0%} | {memory:.1f} |", flush=True)

    for name, build in ways.items():
        model = build().cuda().eval()
        for batch in batches:
            row(name, model.get_image_embeddings, batch)
    row("the last, recorded", RecordedEncoder(model), 1)
    model.sam.vision_encoder.compile(dynamic=False)
    start = time.perf_counter()
    row("the last, compiled", model.get_image_embeddings, batches[-1])
    print(f"compiling took {time.perf_counter() - start:.0f} s")
    profile(bf16().cuda().eval(), batches[-1])


def profile(model: UnSegModel, batch: int) -> None:
    from torch.profiler import ProfilerActivity
    from torch.profiler import profile as profiler

    pixels = torch.randn(batch, 3, SIDE, SIDE, device="cuda")
    with torch.inference_mode(), profiler(activities=[ProfilerActivity.CUDA, ProfilerActivity.CPU]) as found:
        model.get_image_embeddings(pixels)
        torch.cuda.synchronize()
    kernels = [event for event in found.key_averages() if event.device_type == torch.autograd.DeviceType.CUDA]
    total = sum(event.self_device_time_total for event in kernels)
    print(f"\nwhere a batch of {batch} in bfloat16 goes, {total / 1e3:.1f} ms of kernels\n")
    for event in sorted(kernels, key=lambda event: -event.self_device_time_total)[:14]:
        print(f"    {event.self_device_time_total / total:6.1%} {event.count:5} x {event.key[:110]}")


def noise_of_prompts(folder: Path, rounds: int) -> None:
    protector = Protector.from_pretrained(folder, device="cuda", bf16=True)
    model = protector.model
    with torch.inference_mode():
        embeddings = model.get_image_embeddings(torch.randn(1, 3, SIDE, SIDE, device="cuda"))
        for prompts in (1, 16, 64):
            masks = torch.rand(1, prompts, 256, 256, device="cuda").round()
            taken = seconds(lambda: model(image_embeddings=embeddings, input_masks=masks), rounds)  # noqa: B023
            print(f"noise of {prompts} prompts of an image: {taken * 1e3:.1f} ms")


def files(folder: Path, count: int, scratch: Path) -> None:
    """`unseg protect` of a folder of JPEGs, start-up apart, and what it takes to decode and encode them."""
    from speed import decode, photo

    photos = scratch / "photos"
    photos.mkdir()
    for number in range(count):
        photo(photos / f"{number:03}.jpg", PHOTO, number)
    one = scratch / "one"
    one.mkdir()
    photo(one / "0.jpg", PHOTO, 0)
    print(f"\n`unseg protect --device cuda --whole-image` of {count} JPEGs of {PHOTO[0]} x {PHOTO[1]} pixels\n")
    protect = ["-m", "unseg_hf.cli", "protect", "-o", scratch / "out", "--overwrite"]
    protect += ["--whole-image", "--device", "cuda", "--model", folder]
    threads = min(MOST_THREADS, os.cpu_count())
    ways = {"float32": protect, "--bf16": [*protect, "--bf16"]}
    ways[f"Pillow's decoding and PNG-encoding at its defaults in {threads} threads"] = ["-c", decode(threads, {})]
    for name, command in ways.items():
        taken = []
        for source in (one, photos):
            start = time.perf_counter()
            words = [str(word) for word in (sys.executable, *command, source)]
            subprocess.run(words, check=True, stdout=subprocess.DEVNULL)
            taken.append(time.perf_counter() - start)
        rate = (count - 1) / (taken[1] - taken[0])
        print(f"{name}: {rate:.1f} images/s after {taken[0]:.1f} s for one", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 4, 16])
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--photos", type=int, default=200, help="files of the last part; 0: leave it out")
    options = parser.parse_args()
    print(f"{torch.cuda.get_device_name()}, torch {torch.__version__}, {os.cpu_count()} cores")
    rate = matrix_rate(torch.bfloat16, options.rounds)
    print(f"matrix products: bfloat16 {rate / 1e12:.0f}, float32 {matrix_rate(torch.float32, 5) / 1e12:.0f} TFLOP/s")
    attention(options.rounds)
    with tempfile.TemporaryDirectory() as scratch:
        generator = Path(scratch) / "generator"
        make(generator)
        encoding(generator, options.batches, options.rounds, rate)
        noise_of_prompts(generator, options.rounds)
        if options.photos:
            files(generator, options.photos, Path(scratch))


if __name__ == "__main__":
    main()
