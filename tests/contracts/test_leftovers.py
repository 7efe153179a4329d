"""Temporary folders of dead processes are removed, and nothing else."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

from rayft.core import process

ROOT = Path(__file__).parents[2]
HOLD = (
    "import sys; from pathlib import Path; from rayft.core import process; "
    "folder = process.temporary('test'); (Path(folder.name) / 'big').write_text('x'); "
    "session = Path(sys.argv[1]); session.mkdir(); process.own_session(session); "
    "print(folder.name, flush=True); sys.stdin.read()"
)


@pytest.fixture
def holder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """A process with a temporary folder, and a session of Ray that is called its own."""
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    session = tmp_path / "ray/session_1"
    session.parent.mkdir()
    running = subprocess.Popen(
        [sys.executable, "-c", HOLD, str(session)], stdin=subprocess.PIPE, stdout=subprocess.PIPE,
        text=True, env=os.environ | {"PYTHONPATH": str(ROOT), "TMPDIR": str(tmp_path)},
    )  # fmt: skip
    yield running, Path(running.stdout.readline().strip()), session
    running.kill()
    running.communicate()


def kill(running: subprocess.Popen[str]) -> None:
    running.send_signal(signal.SIGKILL)
    running.wait()


def test_what_a_killed_process_left_is_removed_at_the_next_start(holder) -> None:
    running, folder, session = holder
    assert process.remove_dead() == [] and process.remove_dead_sessions(session.parent) == []
    kill(running)
    assert folder.is_dir() and session.is_dir()
    assert process.remove_dead() == [folder]
    assert process.remove_dead_sessions(session.parent) == [session]
    assert not folder.exists() and not session.exists()


def test_a_session_with_a_process_that_lives_stays(holder) -> None:
    running, _, session = holder
    kill(running)
    code = "import sys; print(flush=True); sys.stdin.read()"
    with subprocess.Popen(
        [sys.executable, "-c", code, f"--session-dir={session}"],
        stdin=subprocess.PIPE, stdout=subprocess.PIPE,
    ) as raylet:  # fmt: skip
        raylet.stdout.readline()
        assert process.remove_dead_sessions(session.parent) == []
        raylet.stdin.close()
    assert process.remove_dead_sessions(session.parent) == [session]


@pytest.mark.parametrize(
    "change",
    [
        {"machine": "another boot/pid:[1]"},
        {"machine": ""},
        {"started": ""},
        {"pid": os.getpid(), "started": process.started(os.getpid())},
        {"pid": "x"},
        None,
    ],
)
def test_what_is_not_surely_ours_and_dead_stays(holder, change, tmp_path: Path) -> None:
    running, folder, session = holder
    kill(running)
    marker = session / process.OWNER
    owner = json.loads(marker.read_text())
    marker.write_text("{" if change is None else json.dumps(owner | change))
    (tmp_path / "ray/session_2").mkdir()  # somebody else's, without a word
    assert process.remove_dead_sessions(session.parent) == []
    ours, _, rest = folder.name.removeprefix("rayft-test-").partition("-")
    for name in (
        f"rayft-test-{'0' * len(ours)}-{rest}",  # of another machine
        f"rayft-test-{ours}-{os.getpid()}-{process.started(os.getpid())}-abc",  # alive
        f"rayft-test-{ours}-1-0-abc",  # nobody knows when it began
        "rayft-error-x",
    ):
        (tmp_path / name).mkdir()
    (tmp_path / f"rayft-link-{ours}-{rest}").symlink_to(tmp_path / "ray")
    (tmp_path / f"rayft-file-{ours}-{rest}").write_text("")
    assert process.remove_dead() == [folder]
    assert (tmp_path / "ray/session_2").is_dir()


def test_a_folder_of_another_user_stays(holder) -> None:
    running, folder, session = holder
    kill(running)
    if os.getuid() != 0:
        pytest.skip("only root can give a folder away")
    for path in (folder, session):
        os.chown(path, 12345, 12345)
    assert process.remove_dead() == [] and process.remove_dead_sessions(session.parent) == []
