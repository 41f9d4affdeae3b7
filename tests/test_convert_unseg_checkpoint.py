import hashlib
import importlib.util
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch

from unseg_hf import UnSegModel, UnSegProcessor

FIXTURES = Path(__file__).parent / "fixtures"
SCRIPT = Path(__file__).parents[1] / "training_scripts" / "convert_unseg_checkpoint.py"


@pytest.fixture(scope="module")
def script():
    spec = importlib.util.spec_from_file_location("convert_unseg_checkpoint", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def shapes() -> dict[str, list[int]]:
    """The names and shapes of the authors' released state dict."""
    return json.loads((FIXTURES / "unseg_vitb_keys.json").read_text())


@pytest.fixture
def released(shapes) -> dict[str, torch.Tensor]:
    """Zeros under the released names; each takes no more room, in memory or in a file, than one number."""
    return {name: torch.zeros(1).expand(shape) for name, shape in shapes.items()}


def drawn(name: str, shape: list[int]) -> np.ndarray:
    """Standard normal values that depend on the name alone, the same on every machine."""
    seed = int.from_bytes(hashlib.sha256(name.encode()).digest()[:4], "little")
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def synthetic_weight(name: str, shape: list[int]) -> torch.Tensor:
    """A weight of sensible size: what the authors' code ran on to make the expected noise."""
    weight = torch.from_numpy(drawn(name, shape))
    if len(shape) == 1:
        weight = 1 + 0.1 * weight if name.endswith("weight") else 0.05 * weight
    elif "pos_embed" in name or "positional" in name:
        weight = 0.02 * weight
    else:
        weight = weight / np.sqrt(np.prod(shape[1:]))
    return 0.05 * weight if "noise_mlp" in name and ".layers.2." in name else weight


def synthetic_image() -> torch.Tensor:
    """(1, 3, 1024, 1024), smooth, normalised as the generator takes it."""
    noise = torch.from_numpy(np.random.default_rng(7).random((1, 3, 1024, 1024)).astype(np.float32))
    image = torch.nn.functional.avg_pool2d(noise, 9, stride=1, padding=4)
    image = (image - image.min()) / (image.max() - image.min())
    mean, std = (torch.tensor(v)[:, None, None] for v in ([0.485, 0.456, 0.406], [0.229, 0.224, 0.225]))
    return (image - mean) / std


def ellipse() -> torch.Tensor:
    """The mask prompt, (1, 1, 256, 256) in {0, 1}."""
    y, x = torch.meshgrid(torch.arange(256.0), torch.arange(256.0), indexing="ij")
    return (((y - 120) / 60) ** 2 + ((x - 140) / 80) ** 2 < 1).float()[None, None]


@pytest.mark.slow
@torch.inference_mode()
def test_converted_file_gives_the_noise_that_the_authors_code_gives(script, shapes, tmp_path):
    checkpoint, folder = tmp_path / "released.pth", tmp_path / "converted"
    try:
        torch.save({"model": {name: synthetic_weight(name, shape) for name, shape in shapes.items()}}, checkpoint)
        script.main(["--checkpoint", str(checkpoint), "--output_dir", str(folder)])
        generator = UnSegModel.from_pretrained(folder)
        processor = UnSegProcessor.from_pretrained(folder)
        left = {path.name for path in tmp_path.iterdir()}
        code = {path.name for path in folder.glob("*.py")}
    finally:  # some 800 MB
        checkpoint.unlink(missing_ok=True)
        shutil.rmtree(folder, ignore_errors=True)
    assert left == {"released.pth", "converted"}
    assert "modeling_unseg.py" in code
    assert processor.target_size == 1024
    config, sam = generator.config, generator.sam
    assert (config.noise_token_offset, config.epsilon, config.epsilon_background) == (-1, 8 / 255, 2 / 255)
    assert sam.prompt_encoder.shared_embedding.positional_embedding is sam.shared_image_embedding.positional_embedding

    noise = generator(synthetic_image(), input_masks=ellipse()).noise
    expected = np.load(FIXTURES / "unseg_vitb_noise_every_4th_pixel.npz")["noise"]
    # Far below what another layer norm epsilon (2e-4) or other tokens (4e-4) would change here.
    np.testing.assert_allclose(noise[0, 0, :, ::4, ::4], expected, atol=2e-5, rtol=0)


def test_every_parameter_has_exactly_one_released_name(script, shapes):
    with torch.device("meta"):
        parameters = UnSegModel(script.released_config()).state_dict()
    tied = "sam.prompt_encoder.shared_embedding.positional_embedding"
    assert {script.released_name(n): list(w.shape) for n, w in parameters.items() if n != tied} == shapes
    assert len(parameters) - 1 == len(shapes) == 359


def test_wrong_names_and_shapes_are_reported_together_with_their_counts(script, released):
    for i in range(7):
        del released[f"image_encoder.blocks.{i}.norm1.bias"]
    released["mask_decoder.hf_token.weight"] = torch.zeros(1, 256)
    released["mask_decoder.noise_token.weight"] = torch.zeros(1, 256)
    with pytest.raises(ValueError, match="not the released UnSeg weights") as caught:
        script.convert(released)
    message = str(caught.value)
    assert "7 missing (image_encoder.blocks.0.norm1.bias, " in message
    assert "blocks.4.norm1.bias, ...)" in message
    assert "blocks.5" not in message
    assert "1 unexpected (mask_decoder.hf_token.weight)" in message
    assert "1 of another shape (mask_decoder.noise_token.weight [1, 256] instead of [3, 256])" in message


def test_plain_sam_weights_are_refused_for_want_of_the_noise_head(script, released):
    sam = {name: weight for name, weight in released.items() if "noise" not in name}
    with pytest.raises(ValueError, match=r"45 missing \(mask_decoder.noise_token.weight") as caught:
        script.convert(sam)
    assert "unexpected" not in str(caught.value)


@pytest.mark.parametrize("nesting", [None, "model", "state_dict"])
def test_refused_file_leaves_nothing_behind(script, released, tmp_path, nesting):
    del released["mask_decoder.noise_token.weight"]
    torch.save({nesting: released, "epoch": 27} if nesting else released, tmp_path / "weights.pth")
    with pytest.raises(SystemExit, match=r"1 missing \(mask_decoder.noise_token.weight\)"):
        script.main(["--checkpoint", str(tmp_path / "weights.pth"), "--output_dir", str(tmp_path / "out")])
    assert [path.name for path in tmp_path.iterdir()] == ["weights.pth"]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({"model": {"epoch": 3}}, "holds no state dict"),
        ({"generator": {"weight": torch.zeros(1)}}, "holds no state dict"),
        ([torch.zeros(1)], "holds no state dict"),
        (Path("an object that weights_only does not load"), "cannot be read as a PyTorch file"),
        (b"no PyTorch file at all", "cannot be read as a PyTorch file"),
        (b"", "cannot be read as a PyTorch file"),
        (None, "cannot be read as a PyTorch file"),
    ],
    ids=["values", "other nesting", "list", "object", "text", "empty", "no file"],
)
def test_file_that_holds_no_weights_is_named(script, tmp_path, content, message):
    file = tmp_path / "weights.pth"
    if isinstance(content, bytes):
        file.write_bytes(content)
    elif content is not None:
        torch.save(content, file)
    with pytest.raises(SystemExit, match=f"weights.pth {message}"):
        script.main(["--checkpoint", str(file), "--output_dir", str(tmp_path / "out")])
    assert not (tmp_path / "out").exists()


def test_output_folder_with_something_in_it_is_refused_and_kept(script, tmp_path):
    folder = tmp_path / "out"
    folder.mkdir()
    (folder / "mine.txt").write_text("kept")
    with pytest.raises(SystemExit, match="out is not an empty folder"):
        script.main(["--checkpoint", str(tmp_path / "none.pth"), "--output_dir", str(folder)])
    assert (folder / "mine.txt").read_text() == "kept"
