"""Encoding on a CUDA device as one recorded graph, for many images one after the other."""

import threading

import torch

from .modeling_unseg import UnSegImageEmbeddings, UnSegModel


class RecordedEncoder:
    """`UnSegModel.get_image_embeddings`, recorded once and replayed for each image.

    A large encoder starts about 1,500 kernels an image. Python takes longer to start them one by one than they run,
    and meanwhile no other thread gets on with reading or writing images; a replay starts them all at once. Every image
    is encoded by itself, so that its noise does not depend on which others are in a batch.

    May be called by several threads. Weights are read where they lay when it was made: make another one after
    replacing or moving them.

    Args:
        model: a generator in evaluation mode on a CUDA device, where nothing else runs while this is made.

    Raises:
        ValueError: the generator is on another device.
    """

    def __init__(self, model: UnSegModel):
        if model.device.type != "cuda":
            raise ValueError(f"the generator is on {str(model.device)!r}: only a CUDA device records what it does")
        side = model.config.sam_config.vision_config.image_size
        self._turn = threading.Lock()
        self._pixels = torch.zeros(1, 3, side, side, device=model.device)
        self._graph = torch.cuda.CUDAGraph()
        with torch.inference_mode(), torch.cuda.device(model.device):
            # Libraries allocate and choose on the first call what may not be allocated or chosen in a recording.
            aside = torch.cuda.Stream()
            aside.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(aside):
                model.get_image_embeddings(self._pixels)
            torch.cuda.current_stream().wait_stream(aside)
            with torch.cuda.graph(self._graph):
                self._embeddings = model.get_image_embeddings(self._pixels)

    @torch.inference_mode()
    def __call__(self, pixel_values: torch.Tensor) -> UnSegImageEmbeddings:
        """`(batch, 3, image_size, image_size)`, on any device, to the embeddings of each image."""
        # The turn is for the order in which work is handed to the device, which does it in that order.
        with self._turn:
            copies = [self._replayed(pixels) for pixels in pixel_values]
        return UnSegImageEmbeddings(*(torch.cat(parts) for parts in zip(*copies, strict=True)))

    def _replayed(self, pixels: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        self._pixels[0].copy_(pixels)
        self._graph.replay()
        return self._embeddings.image_embeddings.clone(), self._embeddings.noise_features.clone()
