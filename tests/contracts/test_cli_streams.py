"""The command where its output goes nowhere, its error cannot be told, or a signal comes early."""

from __future__ import annotations

import os
import pty
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml
from rich.console import Console

import rayft.training.driver
from rayft import cli, unexpected
from rayft.compose.job import ProgressEvent
from rayft.core.console import LastingStream
from rayft.core.errors import ConfigError, RayftError
from rayft.training.progress import LiveProgress

ROOT = Path(__file__).parents[2]
QLORA = str(ROOT / "experiments/quickstart/qlora.yaml")
COMMAND = [sys.executable, "-m", "rayft"]


def command(*arguments: str, **options: object) -> subprocess.Popen[str]:
    env = os.environ | {"PYTHONPATH": str(ROOT)} | options.pop("env", {})
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True} | options
    return subprocess.Popen([*COMMAND, *arguments], env=env, **pipes)


def ended(process: subprocess.Popen[str], code: int) -> str:
    out, err = process.communicate(timeout=60)
    assert process.returncode == code, err
    assert "Traceback" not in err and "Exception ignored" not in err
    return (out or "") + err


# --- streams --------------------------------------------------------------------------------------


def test_a_reader_that_has_seen_enough_is_no_error() -> None:
    for arguments, code in ((["check", QLORA], 0), (["check", "--schema"], 0)):
        ours, theirs = os.pipe()
        os.close(ours)  # nobody will ever read
        process = command(*arguments, stdout=theirs)
        os.close(theirs)
        assert ended(process, code) == ""


def test_nobody_reads_standard_error() -> None:
    ours, theirs = os.pipe()
    os.close(ours)
    process = command("check", "nowhere.yaml", stderr=theirs)
    os.close(theirs)
    process.communicate(timeout=60)
    assert process.returncode == 2


@pytest.mark.parametrize("closed", ["<&-", ">&-", "2>&-", "<&- >&- 2>&-"])
def test_streams_that_are_closed(closed: str) -> None:
    line = f'exec "$@" {closed}'
    run = ["bash", "-c", line, "x", *COMMAND, "check"]
    env = os.environ | {"PYTHONPATH": str(ROOT)}
    for config, code in ((QLORA, 0), ("nowhere.yaml", 2)):
        done = subprocess.run([*run, config], env=env, capture_output=True, text=True, timeout=60)
        assert done.returncode == code, done.stderr
        assert "Traceback" not in done.stderr


def test_a_result_that_cannot_be_written_is_an_error() -> None:
    with Path("/dev/full").open("w") as full:
        said = ended(command("check", QLORA, stdout=full), 1)
    assert said == "error: cannot write to standard output: No space left on device\n"


FEW = [
    {"PYTHONIOENCODING": "ascii"},
    {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"},
]


@pytest.mark.parametrize("env", FEW)
def test_output_in_few_characters_reads_back_the_same(env: dict[str, str], tmp_path: Path) -> None:
    path = tmp_path / "größe.yaml"
    text = Path(QLORA).read_text().replace("storage: runs", "storage: läufe/😀")
    path.write_text(text, encoding="utf-8")
    assert yaml.safe_load(ended(command("check", str(path), env=env), 0))["storage"] == "läufe/😀"
    assert "Traceback" not in ended(command("check", str(path), "größe=1", env=env), 2)


def test_arguments_that_are_no_text(tmp_path: Path) -> None:
    path = os.fsencode(tmp_path) + b"/\xff.yaml"
    Path(os.fsdecode(path)).write_text(Path(QLORA).read_text())
    env = os.environ | {"PYTHONPATH": str(ROOT)}
    for tail, code in (([path], 0), ([path, b"name=\xfe"], 2), ([b"\xfd"], 2)):
        done = subprocess.run([*COMMAND, "check", *tail], env=env, capture_output=True, timeout=60)
        assert done.returncode == code, done.stderr
        assert b"Traceback" not in done.stderr


def test_a_lost_terminal_does_not_end_a_run() -> None:
    """As after a connection is lost: every write to it is an input/output error."""
    main, side = pty.openpty()
    with os.fdopen(side, "w") as stream:
        view = LiveProgress(Console(file=LastingStream(stream)))
        os.close(main)
        view.show(ProgressEvent("step", 1, numbers={"loss": 1.0}))
        view.show(ProgressEvent("warn", text="[/bold]"))
        view.close()


# --- the handler of errors ------------------------------------------------------------------------


class Mute(Exception):
    """Cannot say what it is."""

    def __str__(self) -> str:
        raise ValueError("no words")


@pytest.mark.parametrize(
    "error",
    [
        Mute(),
        ValueError("[/bold] \udcff \x1b[31m \0"),
        ValueError("long" * 10**6),
        ValueError("many\n" * 10**5),
        ExceptionGroup("\udcff", [ValueError("[red]")]),
        RecursionError(),
        MemoryError(),
        RayftError("\udcff" * 10**6, where="\x1b[2J", cause="[/x]", fix="a\nb"),
        ConfigError("x" * 10**6),
    ],
    ids=lambda error: type(error).__name__,
)
@pytest.mark.parametrize("writable", [True, False])
def test_any_error_is_told_in_few_plain_lines(
    error: Exception,
    writable: bool,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
) -> None:
    def fail(*_: object, **__: object) -> None:
        raise error from OSError("\udcff")

    monkeypatch.setattr(rayft.training.driver, "train", fail)
    folder = tmp_path if writable else tmp_path / "gone"
    monkeypatch.setattr(unexpected.tempfile, "tempdir", str(folder))
    storage = tmp_path / "[/bold]"
    code = cli.main(["train", QLORA, f"storage={storage}"])
    assert code == (error.exit_code if isinstance(error, RayftError) else 1)
    said = capsys.readouterr().err
    lines = said.splitlines()
    assert 1 < len(lines) <= 15 and max(map(len, lines)) < 4200
    assert all(line.isprintable() for line in lines)
    if not writable:
        assert lines[-1].startswith("  traceback: could not be written")
    else:
        assert "Traceback" in Path(lines[-1].removeprefix("  traceback: ")).read_text()


def test_no_place_for_temporary_files_at_all(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def nowhere() -> str:
        raise FileNotFoundError(2, "No usable temporary directory found")

    def fail(*_: object, **__: object) -> None:
        raise ZeroDivisionError

    monkeypatch.setattr(unexpected.tempfile, "gettempdir", nowhere)
    monkeypatch.setattr(rayft.training.driver, "train", fail)
    assert cli.main(["train", QLORA, "storage=/nowhere/at/all"]) == 1
    assert "could not be written (FileNotFoundError: " in capsys.readouterr().err


# --- signals --------------------------------------------------------------------------------------


def stopped(arguments: list[str], number: int, after: float) -> tuple[int, str]:
    """The exit code, and what is said, of a command that gets a signal `after` seconds."""
    process = command(*arguments, start_new_session=True)
    time.sleep(after)
    process.send_signal(number)
    _, err = process.communicate(timeout=60)
    return process.returncode, err


BOOT = (
    "import sys; sys.argv = ['rayft', *sys.argv[1:]]; import rayft.entry as entry; "
    "sys.stderr.write('up\\n'); sys.stderr.flush(); sys.exit(entry.main())"
)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
@pytest.mark.parametrize(("word", "code"), [("train", 75), ("sweep", 75), ("check", None)])
def test_a_signal_before_anything_began_is_quiet(word: str, code: int | None, number: int) -> None:
    """From the moment our first line runs: while typer, pydantic and torch are imported."""
    for after in (0.0, 0.02, 0.1):
        process = subprocess.Popen(
            [sys.executable, "-c", BOOT, word, QLORA, "storage=/nowhere/at/all"],
            env=os.environ | {"PYTHONPATH": str(ROOT)}, stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE, text=True, start_new_session=True,
        )  # fmt: skip
        assert process.stderr.readline() == "up\n"
        time.sleep(0.01 + after)
        process.send_signal(number)
        _, said = process.communicate(timeout=60)
        assert "Traceback" not in said
        allowed = {code} if code else {0, 130, 128 + number, -number}
        assert process.returncode in allowed, said


ENDING = """
import atexit, os, signal, sys, time
sys.argv = ["rayft", "train"]
from rayft import cli, entry
cli.main = lambda: {code}
class Slow:
    def __del__(self):
        again(); time.sleep(0.2)
def again():
    os.kill(os.getpid(), {signal})
{when}
sys.exit(entry.main())
"""


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
@pytest.mark.parametrize("code", [0, 6, 75])
@pytest.mark.parametrize(
    "when",
    [
        "atexit.register(again)",  # after ours: runs before it
        "sys.modules['slow'] = Slow()",  # when modules are taken apart
        "import threading; threading.Thread(target=lambda: (time.sleep(0.3), again())).start()",
    ],
    ids=["atexit", "teardown", "thread"],
)
def test_a_signal_during_the_exit_keeps_its_code(number: int, code: int, when: str) -> None:
    text = ENDING.format(code=code, signal=int(number), when=when)
    done = subprocess.run(
        [sys.executable, "-c", text], env=os.environ | {"PYTHONPATH": str(ROOT)}, timeout=60,
        capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == code, done.stderr
    assert "Traceback" not in done.stderr


def test_nohup_stays_so() -> None:
    process = subprocess.run(
        ["nohup", sys.executable, "-c",
         "import signal; from rayft import entry; entry.arm();"
         "print(signal.getsignal(signal.SIGHUP) is signal.SIG_IGN)"],
        env=os.environ | {"PYTHONPATH": str(ROOT)}, capture_output=True, text=True, timeout=60,
    )  # fmt: skip
    assert process.stdout.strip() == "True"
