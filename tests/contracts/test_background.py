"""core/background.py: what a call beside the main thread hands over."""

import subprocess
import sys
import threading

import pytest

from rayft.core.background import in_background


def test_the_value_comes_home_from_a_named_daemon():
    seen = in_background(threading.current_thread, "beside").result(60)
    assert (seen.name, seen.daemon) == ("beside", True)


@pytest.mark.parametrize("error", [ValueError("no"), SystemExit(3)])
def test_an_error_is_raised_to_whoever_waits(error):
    def fail() -> None:
        raise error

    with pytest.raises(type(error)) as caught:
        in_background(fail, "beside").result(60)
    assert caught.value is error


def test_a_call_that_hangs_keeps_no_process_alive():
    code = (
        "import threading\n"
        "from rayft.core.background import in_background\n"
        "in_background(threading.Event().wait, 'hangs')\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)
