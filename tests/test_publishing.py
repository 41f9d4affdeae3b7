"""Generators saved, pushed and loaded, with the real huggingface_hub client and a Hub on the loopback interface."""

import json
import os
import re
import shlex
import subprocess
import sys
import sysconfig
from pathlib import Path

import numpy as np
import pytest
import torch
from hub_server import TOKEN, HubServer
from huggingface_hub import ModelCard, constants
from test_auto_classes import LOADER

from unseg_hf import Protector, UnSegConfig, UnSegModel, UnSegProcessor, default_checkpoint
from unseg_hf.training import publishing
from unseg_hf.training.publishing import HubError, check_hub, fill_model_card, push_generator, save_generator

TEMPLATE = (Path(__file__).parent.parent / "model_card.md").read_text()
SECTIONS = {name: f"the {name}" for name in ("name", "model_id", "data", "settings", "results", "limits", "licence")}
WEIGHTS = {"config.json", "model.safetensors", "processor_config.json"}
CODE = {
    f"{name}.py"
    for name in (
        "configuration_unseg", "modeling_unseg", "processing_unseg", "pipeline_unseg", "protection", "inputs",
        "noise_choice", "fidelity", "proposals", "object_finder", "image_files", "vision_unseg", "recorded_encoder",
        "recognition", "costly_files",
    )
}  # fmt: skip


@pytest.fixture
def hub(monkeypatch, tmp_path):
    """A Hub that this process's client speaks to; the client reads its settings from the environment at import."""
    with HubServer() as hub:
        monkeypatch.setattr(constants, "ENDPOINT", hub.url)
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
        monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "no_token"))
        monkeypatch.delenv("HUGGING_FACE_HUB_TOKEN", raising=False)
        monkeypatch.setenv("HF_TOKEN", TOKEN)
        yield hub


@pytest.fixture
def parts(build_generator):
    return build_generator(), UnSegProcessor.for_image_size(64)


@pytest.fixture
def folder(parts, tmp_path):
    """The output folder of a training run, with more in it than the generator."""
    folder = tmp_path / "run"
    (folder / "checkpoint").mkdir(parents=True)
    for name in ("checkpoint/model.safetensors", "checkpoint/README.md", "log.jsonl", "notes.py"):
        (folder / name).write_text(f"mine: {name}")
    save_generator(*parts, folder, fill_model_card(TEMPLATE, **SECTIONS))
    return folder


def contents(folder):
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_card_has_every_section_and_a_front_matter_that_parses():
    card = ModelCard(fill_model_card(TEMPLATE, **SECTIONS))
    assert (card.data.license, card.data.library_name) == ("apache-2.0", "transformers")
    assert all(text in card.text for text in SECTIONS.values())
    assert not re.search(r"\{\w+\}", card.text)


@pytest.mark.parametrize(
    "card",
    ["spaces_demo/README.md", "unseg_hf/checkpoints/unseg-tiny/README.md"],
)
def test_cards_that_are_published_as_they_are_say_licence_and_tags(card):
    data = ModelCard.load(Path(__file__).parent.parent / card).data
    assert data.license == "apache-2.0"
    assert data.tags
    if "checkpoints" in card:
        assert (data.library_name, data.pipeline_tag) == ("transformers", "image-to-image")


def test_braces_rules_and_backslashes_in_a_section_are_text():
    text = '{data} {} {0!r} {{licence}} \\1 \\g<0>\n---\n{"a": {"b": 1}}'
    card = fill_model_card(TEMPLATE, **SECTIONS | {"settings": text})
    assert text in card
    assert ModelCard(card).data.license == "apache-2.0"


@pytest.mark.parametrize(
    ("template", "sections", "message"),
    [
        ("---\na: 1\n---\n{name} {data} {limits}", {"name": "x"}, r"no text for \{data\}, \{limits\} .*: pass data="),
        ("---\na: 1\n---\n{name}", {"name": "x", "date": "y"}, r"has no \{date\}: its placeholders are \{name\}"),
        ("---\nlicense: {name}\n---\n", {"name": "a: b: c"}, "front matter of the model card is no YAML mapping"),
        ("---\n- {name}\n---\n", {"name": "x"}, "front matter of the model card is no YAML mapping"),
        ("# {name}\n", {"name": "x"}, "has no front matter"),
    ],
)  # fmt: skip
def test_a_card_that_is_not_whole_is_refused(template, sections, message):
    with pytest.raises(ValueError, match=message):
        fill_model_card(template, **sections)


def test_saved_generator_is_whole_and_what_was_in_the_folder_stays(parts, folder):
    files = contents(folder)
    assert set(files) == {*WEIGHTS, *CODE, "README.md"} | {
        "checkpoint/model.safetensors", "checkpoint/README.md", "log.jsonl", "notes.py"
    }  # fmt: skip
    assert all(files[name].decode() == f"mine: {name}" for name in files if "/" in name or name == "notes.py")
    # Who may read one of them may read all.
    assert len({(folder / name).stat().st_mode for name in (*WEIGHTS, *CODE, "README.md")}) == 1
    loaded = UnSegModel.from_pretrained(folder).state_dict()
    assert all(torch.equal(loaded[name], value) for name, value in parts[0].state_dict().items())


def test_saving_leaves_the_generator_in_its_mode(parts, tmp_path):
    save_generator(parts[0].train(), parts[1], tmp_path)
    assert all(module.training for module in parts[0].modules())
    save_generator(parts[0].eval(), parts[1], tmp_path)
    assert not any(module.training for module in parts[0].modules())


def test_without_code_nothing_refers_to_code_and_the_next_generator_has_it_again(parts, tmp_path):
    save_generator(*parts, tmp_path / "with")
    written = save_generator(*parts, tmp_path / "without", with_code=False)
    assert set(written) == set(contents(tmp_path / "without")) == WEIGHTS
    assert not any(
        word in (tmp_path / "without" / name).read_text()
        for name in ("config.json", "processor_config.json")
        for word in ("auto_map", "custom_pipelines")
    )
    Protector.from_pretrained(tmp_path / "without")
    assert all(cls._auto_class for cls in (UnSegConfig, UnSegModel, UnSegProcessor))
    save_generator(*parts, tmp_path / "again")
    assert contents(tmp_path / "again") == contents(tmp_path / "with")


@pytest.mark.parametrize("at", [0, 3])
def test_interrupted_saving_leaves_no_half_file(parts, folder, tmp_path, monkeypatch, at):
    before = contents(folder)
    with torch.no_grad():
        parts[0].noise_head.noise_mlps[0][-1].weight *= 2
    save_generator(*parts, tmp_path / "new", "---\nlicense: mit\n---\nnew")
    after = before | contents(tmp_path / "new")
    replace, calls = os.replace, iter(range(100))

    def interrupted(*paths):
        if next(calls) == at:
            raise KeyboardInterrupt
        replace(*paths)

    monkeypatch.setattr(publishing.os, "replace", interrupted)
    with pytest.raises(KeyboardInterrupt):
        save_generator(*parts, folder, "---\nlicense: mit\n---\nnew")
    left = contents(folder)
    assert set(left) == set(before)
    assert all(left[name] in (before[name], after[name]) for name in left)
    assert sum(left[name] != before[name] for name in left) == (1 if at else 0)  # README.md; code is the same


def test_push_uploads_the_generator_and_nothing_else_in_one_commit(hub, folder):
    assert check_hub("tiny") == "tester/tiny"
    assert push_generator(folder, "tiny", private=True) == f"{hub.url}/tester/tiny"
    repository = hub.repositories["tester/tiny"]
    assert repository.private
    assert [commit.message for commit in repository.commits] == ["initial commit", "Upload UnSeg generator"]
    files = {name: content for name, content in repository.commits[-1].files.items() if name != ".gitattributes"}
    assert files == {name: (folder / name).read_bytes() for name in {*WEIGHTS, *CODE, "README.md"}}
    assert list(hub.objects.values()) == [files["model.safetensors"]]  # alone by LFS


def test_second_push_makes_one_further_commit_of_what_changed(hub, parts, folder):
    push_generator(folder, "lab/tiny")
    save_generator(*parts, folder, fill_model_card(TEMPLATE, **SECTIONS | {"results": "better ones"}))
    push_generator(folder, "lab/tiny", commit_message="Better")
    first, last = hub.repositories["lab/tiny"].commits[1:]
    assert last.message == "Better"
    assert [name for name in first.files if first.files[name] != last.files[name]] == ["README.md"]
    assert b"better ones" in last.files["README.md"]
    assert sum(request.startswith("PUT ") for request in hub.requests) == 1


def test_generator_without_code_is_pushed_without(hub, parts, folder):
    save_generator(*parts, folder, with_code=False)
    push_generator(folder, "tiny")
    assert set(hub.repositories["tester/tiny"].commits[-1].files) == {*WEIGHTS, "README.md", ".gitattributes"}


@pytest.mark.parametrize(
    ("failures", "message"),
    [
        ({"PUT /lfs/": (403, "storage quota exceeded")}, "403 storage quota exceeded"),
        ({"POST .*/commit/main": (500, "internal trouble")}, "500 internal trouble"),
        ({"POST .*/validate-yaml": (400, "bad")}, "ValueError: Invalid metadata in README.md"),
        ({"POST .*/create": (401, "Invalid credentials")}, r"401 Invalid credentials \(log in with `hf auth login`"),
    ],
)
def test_failed_push_says_why_and_its_command_pushes_later(hub, folder, failures, message):
    before = contents(folder)
    hub.failures |= failures
    with pytest.raises(HubError, match=message) as error:
        push_generator(folder, "lab/tiny", private=True)
    said = str(error.value)
    assert "\n" not in said
    assert said.startswith(f"could not push to lab/tiny at {hub.url}")
    assert f"The generator is safe in {folder}" in said
    assert contents(folder) == before
    assert all(len(repository.commits) == 1 for repository in hub.repositories.values())

    hub.failures.clear()
    python, c, code = shlex.split(said.split("push it later with: ")[1])
    assert (python, c) == ("python", "-c")
    exec(code, {})
    assert set(hub.repositories["lab/tiny"].commits[-1].files) > WEIGHTS
    assert hub.repositories["lab/tiny"].private


def test_wrong_token_is_refused_before_and_after_training(hub, folder):
    with pytest.raises(HubError, match=r"pushing to lab/tiny: 401 .*log in with `hf auth login`"):
        check_hub("lab/tiny", token="hf_other")
    with pytest.raises(HubError, match=r"could not push to lab/tiny .*401 .*The generator is safe in"):
        push_generator(folder, "lab/tiny", token="hf_other")
    assert not hub.repositories


def test_without_network_the_message_says_so(hub, folder, monkeypatch):
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")  # nothing listens on the port "discard"
    with pytest.raises(HubError, match=r"could not ask http://127.0.0.1:9 .* tiny: ConnectError"):
        check_hub("tiny")
    with pytest.raises(HubError, match=r"could not push to tiny at http://127.0.0.1:9: ConnectError.*safe in"):
        push_generator(folder, "tiny")


def test_folder_without_a_generator_is_refused_before_anything_is_sent(hub, folder):
    (folder / "processor_config.json").unlink()
    with pytest.raises(ValueError, match=r"run has no processor_config.json: save_generator first"):
        push_generator(folder, "tiny")
    assert not hub.requests


@pytest.mark.parametrize("model_id", ["a/b/c", "", "runs/", "two words", "x--y"])
def test_an_id_of_another_form_is_refused_without_asking_the_hub(hub, model_id):
    with pytest.raises(ValueError, match=f"{model_id!r} is no model id: pass NAME or NAMESPACE/NAME"):
        check_hub(model_id)
    assert not hub.requests


def test_who_may_not_push_is_told_before_training(hub, monkeypatch):
    assert check_hub("lab/tiny") == "lab/tiny"
    with pytest.raises(ValueError, match="tester cannot push to other/tiny: its namespace must be tester or lab"):
        check_hub("other/tiny")
    hub.role = "read"
    with pytest.raises(ValueError, match="token of tester may only read"):
        check_hub("lab/tiny")
    monkeypatch.delenv("HF_TOKEN")
    with pytest.raises(ValueError, match="no token to push to lab/tiny with: log in with `hf auth login`"):
        check_hub("lab/tiny")


# Pushes, and loads with the installed package, for which no code from the Hub is needed.
PUSHER = """
import sys
import numpy as np
from unseg_hf import Protector
from unseg_hf.training.publishing import HubError, check_hub, push_generator

folder, inputs, outputs = sys.argv[1:]
model_id = check_hub("tiny")
print(push_generator(folder, model_id))
given = np.load(inputs)
np.save(outputs, np.asarray(Protector.from_pretrained(model_id).protect(given["image"], mask=given["mask"]).image))
"""


@pytest.mark.slow
def test_pushed_generator_protects_where_only_transformers_is_installed(parts, folder, tmp_path):
    image = np.random.default_rng(0).integers(0, 256, (48, 80, 3), dtype=np.uint8)
    mask = np.zeros((48, 80), dtype=np.uint8)
    mask[10:40, 20:50] = 255
    expected = np.asarray(Protector(*parts).protect(image, mask=mask).image)
    inputs, outputs, elsewhere = tmp_path / "inputs.npz", tmp_path / "outputs.npy", tmp_path / "elsewhere"
    np.savez(inputs, image=image, mask=mask)
    elsewhere.mkdir()

    def run(*command, home, **settings):
        """A new process, with a cache of its own, so that everything comes from the server."""
        outputs.unlink(missing_ok=True)
        environment = {name: value for name, value in os.environ.items() if not name.startswith(("PYTHON", "HF_"))}
        environment |= {"HF_HOME": str(tmp_path / home)} | settings
        command = [sys.executable, *map(str, command)]
        process = subprocess.run(
            command, cwd=elsewhere, env=environment, capture_output=True, text=True, timeout=300, check=False
        )
        assert process.returncode == 0, process.stderr[-4000:]
        np.testing.assert_array_equal(np.load(outputs), expected)
        return process.stdout

    with HubServer() as hub:
        # The server has no storage for the Xet protocol, which the client uses without asking.
        settings = {"HF_ENDPOINT": hub.url, "HF_TOKEN": TOKEN, "HF_HUB_DISABLE_XET": "1"}
        pushed = run("-c", PUSHER, folder, inputs, outputs, home="pusher", **settings)
        assert pushed.strip().endswith(f"{hub.url}/tester/tiny")
        assert set(hub.repositories["tester/tiny"].commits[-1].files) == {
            *WEIGHTS, *CODE, "README.md", ".gitattributes"
        }  # fmt: skip
        asked = len(hub.requests)
        libraries = sysconfig.get_paths()["purelib"]
        loader = ["-S", "-c", LOADER, libraries, "pipeline", "tester/tiny", inputs, outputs]
        run(*loader, home="loader", HF_ENDPOINT=hub.url)
        sha = hub.repositories["tester/tiny"].commits[-1].sha
        for name in WEIGHTS | CODE:
            assert f"GET /tester/tiny/resolve/{sha}/{name}" in hub.requests[asked:]


def test_config_of_a_pushed_generator_names_no_path_of_this_machine(folder, tmp_path):
    for name in ("config.json", "processor_config.json"):
        written = json.dumps(json.loads((folder / name).read_text()))
        assert str(tmp_path) not in written
        assert str(default_checkpoint()) not in written
