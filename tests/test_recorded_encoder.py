from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

from unseg_hf import UnSegModel
from unseg_hf.recorded_encoder import RecordedEncoder


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("bf16", [False, True])
def test_replays_give_each_image_of_each_thread_what_the_model_gives_it(saved_generator, bf16):
    model = UnSegModel.from_pretrained(saved_generator)
    if bf16:
        model.encode_in_bf16()
    model = model.cuda().eval()
    side = model.config.sam_config.vision_config.image_size
    images = torch.randn(16, 3, side, side, generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        expected = [model.get_image_embeddings(image[None].cuda()) for image in images]
    encoder = RecordedEncoder(model)
    with ThreadPoolExecutor(4) as pool:
        found = list(pool.map(encoder, images.split(2)))
    for number, single in enumerate(expected):
        replayed = found[number // 2].of_image(number % 2)
        assert torch.equal(replayed.image_embeddings, single.image_embeddings)
        assert torch.equal(replayed.noise_features, single.noise_features)
    assert not torch.equal(expected[0].image_embeddings, expected[1].image_embeddings)


def test_a_generator_on_a_cpu_cannot_be_recorded(generator):
    with pytest.raises(ValueError, match="the generator is on 'cpu': only a CUDA device"):
        RecordedEncoder(generator)
