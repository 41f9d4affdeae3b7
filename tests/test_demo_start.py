"""Starting the demo: as a Space, and by `unseg demo`."""

import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
import tomllib
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path

import httpx
import pytest
import yaml
from gradio_client import Client, handle_file
from PIL import Image

from unseg_hf import cli
from unseg_hf.protection import default_checkpoint

ROOT = Path(__file__).parents[1]
SPACE = ROOT / "spaces_demo"
COFFEE = SPACE / "examples" / "coffee.png"


@contextmanager
def running(arguments: list[str], port: int, folder: Path, stop=signal.SIGINT, **environment: str):
    """A server of its own process, without network but for this machine; its address, once it answers."""
    offline = {"HF_HUB_OFFLINE": "1", "HTTP_PROXY": "http://127.0.0.1:9", "HTTPS_PROXY": "http://127.0.0.1:9"}
    offline |= {"NO_PROXY": "127.0.0.1,localhost", "GRADIO_TEMP_DIR": str(folder / "uploads")}
    path = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
    log = folder / "log"
    (folder / "uploads").mkdir()
    with log.open("w") as file:
        process = subprocess.Popen(
            [sys.executable, *arguments], cwd=folder, stdout=file, stderr=subprocess.STDOUT,
            env=os.environ | offline | environment | {"PYTHONPATH": path},
        )  # fmt: skip
    address = f"http://127.0.0.1:{port}"
    try:
        deadline = time.monotonic() + 120
        while True:
            assert process.poll() is None, log.read_text()
            assert time.monotonic() < deadline, log.read_text()
            try:
                httpx.get(address, trust_env=False).raise_for_status()
                break
            except httpx.HTTPError:
                time.sleep(0.3)
        yield address
    finally:
        process.send_signal(stop)
        try:
            process.wait(timeout=30)
        finally:
            process.kill()


@pytest.fixture
def port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


def test_the_space_serves_the_generator_that_its_variable_names(saved_generator, tmp_path, port):
    settings = {"UNSEG_MODEL": str(saved_generator), "GRADIO_SERVER_PORT": str(port)}
    with running([str(SPACE / "app.py")], port, tmp_path, **settings) as address:
        client = Client(address, verbose=False, download_files=str(tmp_path / "got"))
        file, _, _ = client.predict(image=handle_file(COFFEE), whole_image=True, api_name="/protect")
        page = httpx.get(f"{address}/config", trust_env=False).text
        assert "Or try: coffee" in page
        assert "has no model card" in page
    expected = tmp_path / "expected.png"
    request = ["protect", str(COFFEE), "-o", str(expected), "--whole-image", "--model", str(saved_generator)]
    assert cli.main(request) == 0
    assert Path(file).read_bytes() == expected.read_bytes()


def test_photos_of_a_demo_that_was_killed_go_with_the_next_one(tmp_path):
    from unseg_hf.demo.serving import _own_folder, _sweep

    ended = subprocess.Popen([sys.executable, "-c", ""])
    ended.wait()
    left, own, other = (
        f"{_own_folder()}{ended.pid}-a",
        f"{_own_folder()}{os.getpid()}-b",
        f"unseg-demo-x-{ended.pid}-c",
    )
    for name in (left, own, other):  # the last one of another machine
        (tmp_path / name).mkdir()
        (tmp_path / name / "photo.png").write_bytes(b"photo")
    _sweep(tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == {own, other}


@pytest.mark.parametrize("stop", [signal.SIGINT, signal.SIGTERM])
def test_unseg_demo_serves_the_embedded_generator_and_leaves_no_photo_behind(tmp_path, port, stop):
    card = (default_checkpoint() / "README.md").read_text(encoding="utf-8")
    (measured,) = [line for line in card.splitlines() if line.startswith("| **unseg-tiny**")]
    with running(["-m", "unseg_hf.cli", "demo", "--port", str(port)], port, tmp_path, stop) as address:
        client = Client(address, verbose=False, download_files=str(tmp_path / "got"))
        file, _, report = client.predict(image=handle_file(COFFEE), boxes=[[90, 20, 540, 390]], api_name="/protect")
        assert report["max_noise"] == 8
        assert json.dumps(measured)[1:-1] in httpx.get(f"{address}/config", trust_env=False).text
        kept = [path for path in (tmp_path / "uploads").rglob("*") if path.is_file()]
        assert any(path.name == "coffee.png" for path in kept)
        assert any(path.name == "coffee_protected.png" for path in kept)
    assert not [path for path in (tmp_path / "uploads").rglob("*") if path.is_file()]
    assert not list((tmp_path / "uploads").glob("unseg-demo-*"))
    assert Image.open(file).size == Image.open(COFFEE).size


def test_photos_are_deleted_while_the_server_runs(saved_generator, tmp_path):
    from unseg_hf.demo.serving import launch_options, page_for
    from unseg_hf.demo.session import Limits

    limits = Limits(kept_seconds=2)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("GRADIO_TEMP_DIR", str(tmp_path / "uploads"))
        page = page_for(str(saved_generator), "cpu", None, limits)
        page.launch(**launch_options(limits), prevent_thread_lock=True, quiet=True)
        try:
            client = Client(page.local_url, verbose=False, download_files=str(tmp_path / "got"))
            client.predict(image=handle_file(COFFEE), whole_image=True, api_name="/protect")
            deadline = time.monotonic() + 30
            while any(path.is_file() for path in (tmp_path / "uploads").rglob("*")):
                assert time.monotonic() < deadline, list((tmp_path / "uploads").rglob("*"))
                time.sleep(0.3)
        finally:
            page.close()


def test_a_generator_that_does_not_load_is_one_line(tmp_path, capsys):
    assert cli.main(["demo", "--model", str(tmp_path / "nothing")]) == 2
    assert capsys.readouterr().err.count("\n") == 1


def test_without_gradio_the_command_says_what_to_install(monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "gradio", None)
    assert cli.main(["demo"]) == 2
    assert "pip install 'unseg-hf[demo]'" in capsys.readouterr().err


def test_the_cards_front_matter_and_requirements_name_what_is_there():
    front = yaml.safe_load(re.match(r"---\n(.*?)\n---\n", (SPACE / "README.md").read_text(), re.DOTALL)[1])
    assert (front["sdk"], front["license"]) == ("gradio", "apache-2.0")
    assert (SPACE / front["app_file"]).is_file()
    assert len(front["short_description"]) <= 60
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert (SPACE / "requirements.txt").read_text().split() == [f"{project['name']}[demo]"]
    (wanted,) = [r for r in project["optional-dependencies"]["demo"] if r.startswith("gradio")]
    assert wanted.startswith(f"gradio>={front['sdk_version'].rsplit('.', 1)[0]}")
    assert version("gradio").split(".")[0] == front["sdk_version"].split(".")[0]
    assert f">={front['python_version']}" == project["requires-python"]
