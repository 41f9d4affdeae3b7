import os
import subprocess
import sys
import sysconfig

import numpy as np
import pytest
import torch
from transformers import AutoConfig, AutoModel, AutoProcessor, pipeline

import unseg_hf
from unseg_hf import ImageProtectionPipeline, UnSegConfig, UnSegModel, UnSegProcessor

# Runs where the installed package is out of reach: the folder's own code has to do.
LOADER = """
import sys

# Without `site` the path hooks of editable installs are not there; the libraries themselves are.
sys.path.append(sys.argv[1])
try:
    import unseg_hf
except ModuleNotFoundError:
    pass
else:
    raise SystemExit(f"unseg_hf can be imported, from {unseg_hf.__file__}")

import numpy as np
import torch
from transformers import AutoModel, AutoProcessor, pipeline

entry, folder, inputs, outputs = sys.argv[2:]
given = np.load(inputs)
if entry == "pipeline":
    protect = pipeline("image-protection", model=folder, trust_remote_code=True)
    protect.save_pretrained(outputs + "-again")
    protect = pipeline("image-protection", model=outputs + "-again", trust_remote_code=True)
    result = np.asarray(protect(given["image"], mask=given["mask"])["image"])
else:
    model = AutoModel.from_pretrained(folder, trust_remote_code=True)
    processor = AutoProcessor.from_pretrained(folder, trust_remote_code=True)
    features = processor(given["image"], masks=given["mask"][None, None])
    with torch.inference_mode():
        noise = model(features["pixel_values"], input_masks=features["input_masks"]).noise[0]
    sizes = features["original_sizes"][0], features["reshaped_input_sizes"][0]
    result = processor.post_process_noise(noise, *sizes).numpy()
assert not any(name.split(".")[0] == "unseg_hf" for name in sys.modules)
np.save(outputs, result)
"""


@pytest.fixture
def image():
    return np.random.default_rng(0).integers(0, 256, (48, 80, 3), dtype=np.uint8)


@pytest.fixture
def mask():
    mask = np.zeros((48, 80), dtype=np.uint8)
    mask[10:40, 20:50] = 255
    return mask


def test_auto_classes_know_the_generator_once_the_package_is_imported(saved_generator):
    assert type(AutoConfig.from_pretrained(saved_generator)) is UnSegConfig
    assert type(AutoModel.from_pretrained(saved_generator)) is UnSegModel
    assert type(AutoProcessor.from_pretrained(saved_generator)) is UnSegProcessor
    assert type(AutoConfig.for_model("unseg")) is UnSegConfig


def test_pipeline_loads_by_its_task_name_and_protects(saved_generator, image, mask):
    protect = pipeline("image-protection", model=str(saved_generator))
    assert type(protect) is ImageProtectionPipeline
    assert type(protect.processor) is UnSegProcessor
    result = protect(image, mask=mask)
    changed = np.abs(np.asarray(result["image"]).astype(int) - image)
    inside = mask > 0
    assert 2 < changed[inside].max() <= 8
    assert 0 < changed[~inside].max() <= 2


def test_importing_the_package_twice_registers_everything_once():
    unseg_hf._register()
    assert type(AutoConfig.for_model("unseg")) is UnSegConfig


@pytest.mark.slow
@pytest.mark.parametrize(
    "imports",
    [
        "import unseg_hf\nfrom transformers import AutoModel, pipeline",
        "from unseg_hf.modeling_unseg import UnSegModel\nfrom transformers import AutoModel, pipeline",
        "from unseg_hf import UnSegModel\nfrom transformers import AutoModel, pipeline",
    ],
    ids=["package first", "module first", "class first"],
)
def test_the_auto_classes_know_the_generator_whatever_was_imported_first(saved_generator, imports):
    program = f"""{imports}
model = AutoModel.from_pretrained({str(saved_generator)!r})
assert type(model).__module__ == "unseg_hf.modeling_unseg"
assert type(pipeline("image-protection", model={str(saved_generator)!r}).model) is type(model)
import sys
assert not any("unseg_hf" in type(finder).__module__ for finder in sys.meta_path)
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-4000:]


def test_the_public_names_are_there_without_having_been_imported():
    assert set(unseg_hf.__all__) == set(unseg_hf._MODULE_OF) <= set(dir(unseg_hf))
    assert all(getattr(unseg_hf, name).__name__ == name for name in unseg_hf.__all__)
    with pytest.raises(AttributeError, match="no attribute 'Protekt'"):
        unseg_hf.Protekt  # noqa: B018
    with pytest.raises(ImportError, match="Protekt"):
        from unseg_hf import Protekt  # noqa: F401


@pytest.mark.slow
@pytest.mark.parametrize("entry", ["classes", "pipeline"])
def test_saved_pipeline_runs_with_its_own_code_where_the_package_is_not_installed(
    saved_generator, image, mask, tmp_path, entry
):
    protect = pipeline("image-protection", model=str(saved_generator))
    folder, inputs, outputs = tmp_path / "saved", tmp_path / "inputs.npz", tmp_path / "outputs.npy"
    protect.save_pretrained(folder)
    np.savez(inputs, image=image, mask=mask)
    if entry == "pipeline":
        expected = np.asarray(protect(image, mask=mask)["image"])
    else:
        processor, model = protect.processor, protect.model
        features = processor(image, masks=mask[None, None])
        with torch.inference_mode():
            noise = model(features["pixel_values"], input_masks=features["input_masks"]).noise[0]
        sizes = features["original_sizes"][0], features["reshaped_input_sizes"][0]
        expected = processor.post_process_noise(noise, *sizes).numpy()

    libraries = sysconfig.get_paths()["purelib"]
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("PYTHON", "HF_"))}
    environment |= {"HF_HOME": str(tmp_path / "home"), "HF_MODULES_CACHE": str(tmp_path / "modules")}
    environment |= {"HF_HUB_OFFLINE": "1"}
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    process = subprocess.run(
        [sys.executable, "-S", "-c", LOADER, libraries, entry, str(folder), str(inputs), str(outputs)],
        cwd=elsewhere,
        env=environment,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert process.returncode == 0, process.stderr[-4000:]
    np.testing.assert_array_equal(np.load(outputs), expected)
