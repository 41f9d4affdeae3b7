"""A tiny random generator for tests of everything around the weights."""

import copy
import os
import signal

import pytest
import torch
from transformers import SamConfig

from unseg_hf import Protector, UnSegConfig, UnSegModel, UnSegProcessor

# Tests run side by side, a process a core, and start processes of their own. Small models are faster, and the same
# everywhere, on one thread.
os.environ["OMP_NUM_THREADS"] = "1"
torch.set_num_threads(1)

# What is started in the background of a shell ignores Ctrl-C, and so would all that tests start, and stop by it.
if signal.getsignal(signal.SIGINT) == signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)

IMAGE_SIZE = 64  # the embedding grid is 4 x 4, the noise 16 x 16


@pytest.fixture(scope="session")
def tiny_sam_config():
    """A function: the smallest sensible SAM; keywords change its vision encoder."""

    def build(**vision) -> SamConfig:
        return SamConfig(
            vision_config={
                "hidden_size": 32,
                "output_channels": 32,
                "num_hidden_layers": 2,
                "num_attention_heads": 2,
                "image_size": IMAGE_SIZE,
                "use_rel_pos": False,
                "window_size": 2,
                "global_attn_indexes": [1],
                "num_pos_feats": 16,
                "scale": 1,  # as in SAM; SamConfig has hidden_size // 2, so high that bfloat16 cannot follow
                # SAM's own 1e-10 would make every image look the same.
                "initializer_range": 0.2,
                **vision,
            },
            prompt_encoder_config={"hidden_size": 32, "image_size": IMAGE_SIZE},
            mask_decoder_config={"hidden_size": 32, "mlp_dim": 64, "iou_head_hidden_dim": 32},
            initializer_range=0.2,
        )

    return build


@pytest.fixture(scope="session")
def build_generator(tiny_sam_config):
    """A function: a tiny generator with weights from a fixed seed; keywords change its configuration."""

    def build(sam_config: SamConfig | None = None, **changes) -> UnSegModel:
        config = UnSegConfig(sam_config=sam_config or tiny_sam_config(), initializer_range=0.2, **changes)
        with torch.random.fork_rng():
            torch.manual_seed(0)
            return UnSegModel(config).eval()

    return build


@pytest.fixture(scope="session")
def saved_generator(build_generator, tmp_path_factory):
    """The folder of a tiny random generator with its processor."""
    folder = tmp_path_factory.mktemp("generator")
    build_generator().save_pretrained(folder)
    UnSegProcessor.for_image_size(IMAGE_SIZE).save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def loaded_generator(saved_generator):
    return UnSegModel.from_pretrained(saved_generator).eval()


@pytest.fixture
def generator(loaded_generator):
    """A copy for each test, free to be changed."""
    return copy.deepcopy(loaded_generator)


@pytest.fixture
def processor(saved_generator):
    return UnSegProcessor.from_pretrained(saved_generator)


@pytest.fixture(scope="session")
def protector_of(build_generator):
    """A function: a protector around `build_generator(**changes)`; it stretches images if it has an object finder."""

    def build(**changes) -> Protector:
        image_processor = UnSegProcessor.for_image_size(IMAGE_SIZE).image_processor
        stretch = changes.get("object_finder_width") is not None
        return Protector(build_generator(**changes), UnSegProcessor(image_processor, stretch=stretch))

    return build


@pytest.fixture
def tiny_protector(protector_of):
    """Believes every proposed segment, so that random weights propose some."""
    return protector_of(proposal_iou=-100, proposal_stability=-1)


@pytest.fixture
def nothing_found_protector(protector_of):
    return protector_of(proposal_iou=100)


@pytest.fixture(scope="session")
def loud_protector(protector_of):
    """Its noise fills the budget, so that a broken bound shows."""
    protector = protector_of()
    with torch.no_grad():
        for mlp in protector.model.noise_head.noise_mlps:
            mlp[-1].weight *= 30
    return protector


@pytest.fixture(scope="module")
def demo_page(saved_generator, tmp_path_factory):
    """A running demo around a tiny random generator: `.local_url`, and `.uploads`, the folder it keeps files in."""
    from unseg_hf.demo.serving import checkout_examples, launch_options, page_for
    from unseg_hf.demo.session import Limits

    limits = Limits(file_bytes=2**20, pixels=1_000_000, side=5_000, marks=5, photos=4, batch_bytes=2 * 2**20)
    with pytest.MonkeyPatch.context() as patch:
        uploads = tmp_path_factory.mktemp("uploads")
        patch.setenv("GRADIO_TEMP_DIR", str(uploads))
        page = page_for(str(saved_generator), "cpu", checkout_examples(), limits)
        page.launch(**launch_options(limits), prevent_thread_lock=True, quiet=True)
        page.uploads = uploads
        yield page
        page.close()
