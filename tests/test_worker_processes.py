import subprocess
import sys
from pathlib import Path

import pytest

from unseg_hf.worker_processes import alone

PARENT = """
import multiprocessing, signal, time
from unseg_hf.worker_processes import end_with_parent

def work():
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    end_with_parent()
    print("at work", flush=True)
    time.sleep(120)

if __name__ == "__main__":
    multiprocessing.get_context("spawn").Process(target=work).start()
    time.sleep(120)
"""


def test_a_worker_ends_when_the_command_that_started_it_is_killed(tmp_path: Path):
    script = tmp_path / "parent.py"
    script.write_text(PARENT)
    with subprocess.Popen([sys.executable, script], stdout=subprocess.PIPE, text=True) as parent:
        assert parent.stdout.readline() == "at work\n"
        parent.kill()
        # The worker has the pipe, too: it is at its end when the worker is gone.
        assert parent.communicate(timeout=30) == ("", None)


def test_a_folder_is_one_process_at_a_time(tmp_path: Path):
    with alone(tmp_path), pytest.raises(ValueError, match="another run is writing there"), alone(tmp_path):
        pass
    with alone(tmp_path):
        pass
