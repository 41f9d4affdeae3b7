"""Data sets of a Hub on the loopback interface, streamed in, and protected ones pushed with their card."""

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
from hub_server import TOKEN, Commit, HubServer, Repository
from huggingface_hub import DatasetCard, constants
from test_bulk import BROKEN, GOOD, SCRIPT, files, mask, published, run, samples, write_parquet

from unseg_hf import Protector
from unseg_hf.bulk.card import push_dataset
from unseg_hf.bulk.manifest import read_settings
from unseg_hf.image_files import read
from unseg_hf.training.publishing import HubError


@pytest.fixture
def place(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.slow
def test_a_data_set_of_the_hub_is_streamed_protected_and_pushed(place, saved_generator):
    write_parquet(place)
    stored = {
        f"data/train-{index}.parquet": Path(f"in/{name}.parquet").read_bytes() for index, name in enumerate("ab")
    }
    command = [SCRIPT, "tester/source", "--mask_column", "mask", "--output", "out", "--model", saved_generator]
    command += ["--push_to_hub", "protected"]
    with HubServer() as hub:
        hub.repositories["datasets:tester/source"] = Repository(False, [Commit("images", stored)])
        environment = {name: value for name, value in os.environ.items() if not name.startswith("HF_")}
        # The server has no storage for the Xet protocol, which the client uses without asking.
        environment |= {"HF_ENDPOINT": hub.url, "HF_TOKEN": TOKEN, "HF_HUB_DISABLE_XET": "1"}
        environment |= {"HF_HOME": str(place / "home")}

        def script():
            return subprocess.run(
                [sys.executable, *map(str, command)], env=environment, capture_output=True, text=True, timeout=300
            )

        process = script()
        assert process.returncode == 0, process.stderr[-3000:]
        assert f"pushed to {hub.url}/datasets/tester/protected" in process.stdout
        pushed = hub.repositories["datasets:tester/protected"].commits[-1].files
        assert pushed.pop(".gitattributes") is not None
        assert pushed == files("out")
        sent = sum(request.startswith("PUT /lfs/") for request in hub.requests)
        Path("out/[original].png").write_bytes(b"not the run's")
        assert script().returncode == 0
        pushed = hub.repositories["datasets:tester/protected"].commits[-1].files
        assert "[original].png" not in pushed
        assert sum(request.startswith("PUT /lfs/") for request in hub.requests) == sent
        commit = hub.repositories["datasets:tester/source"].commits[-1].sha
    assert read_settings(Path("out"))["source"]["revision"] == commit
    protector = Protector.from_pretrained(saved_generator)
    wanted = [protector.protect(d, mask=m).picture for n, _, d, m in samples() if n not in (*BROKEN, "other_mask")]
    got = [read(image) for image in published().values()]
    assert len(got) == GOOD
    for one, other in zip(got, wanted, strict=True):
        np.testing.assert_array_equal(one.pixels, other.pixels)
    assert len(pq.read_table("out/data")) == len(samples())


def test_the_card_says_that_the_images_are_protected_and_how(place, saved_generator):
    run(write_parquet(place), saved_generator, epsilon=5 / 255)
    card = DatasetCard.load("out/README.md")
    assert card.data.to_dict()["configs"][0]["data_files"] == [{"split": "train", "path": "data/*.parquet"}]
    assert "protected-images" in card.data.tags
    identity = read_settings(Path("out"))["model"]["identity"]
    for said in (
        "9 protected, 5 that could not be read", "at most 5 grey levels of 255 in the masks, 1.25 elsewhere", identity,
        "the masks of the data set, together", "## What this does not promise", "They are not the original images",
    ):  # fmt: skip
        assert said in card.text


def test_a_push_that_the_hub_refuses_says_how_to_push_later(place, saved_generator, monkeypatch):
    assert mask(0).any()
    run(write_parquet(place), saved_generator)
    Path("out/mine.png").touch()
    with HubServer() as hub:
        monkeypatch.setattr(constants, "ENDPOINT", hub.url)
        monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
        monkeypatch.setenv("HF_TOKEN", TOKEN)
        hub.failures["POST /api/datasets/.*/commit/"] = (403, "storage is full")
        with pytest.raises(
            HubError,
            match=r"tester/mine at .*403 storage is full.* hf upload tester/mine out .* --exclude mine.png",
        ):
            push_dataset(Path("out"), "tester/mine")
