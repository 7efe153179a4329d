"""Storm 4b: S3 that is slow, busy, cut off or refuses credentials; moto behind `proxy.py`.

Faults that pass (503, 500, resets, cut bodies, hanging or slow answers at a rate) cost nothing but
time; outages and expired credentials may end the run with exit 6, and the same command continues.
Every other case writes its address with options (endpoint_override), as MinIO users do.
"""

from __future__ import annotations

import os
import random
import re
import socket
import subprocess
import sys
import time
from collections.abc import Callable

from commands import Command
from lab import STEPS, Lab, Place, evidence, until
from proxy import PASS, Proxy
from tally import Case

CASES = 27
RATES = {"503": 0.3, "500": 0.3, "reset": 0.2, "cut": 0.2, "hang": 0.02, "slow": 1.0}
PLAN = (*RATES, "outage", "expired", "down at start")
KEYS = {
    "AWS_ACCESS_KEY_ID": "test",
    "AWS_SECRET_ACCESS_KEY": "test",
    "AWS_EC2_METADATA_DISABLED": "true",
    "AWS_DEFAULT_REGION": "us-east-1",
}
AGAIN = re.compile(r"^step (\d+)/", re.MULTILINE)
START = 120.0  # seconds in which a start without storage must have ended


def prepare(lab: Lab) -> None:
    """A server with a bucket, and the uninterrupted run."""
    lab.twin("lora")
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    argv = [sys.executable, "-m", "moto.server", "-H", "127.0.0.1", "-p", str(port)]
    lab.notes["server"] = subprocess.Popen(
        argv, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True
    )

    def answers() -> bool:
        with socket.socket() as client:
            return client.connect_ex(("127.0.0.1", port)) == 0

    if not until(answers, 60):
        raise RuntimeError("moto did not start")
    os.environ |= KEYS | {"AWS_ENDPOINT_URL": f"http://127.0.0.1:{port}"}  # what reads evidence
    from pyarrow.fs import S3FileSystem

    S3FileSystem(
        endpoint_override=f"127.0.0.1:{port}",
        scheme="http",
        region="us-east-1",
        allow_bucket_creation=True,
    ).create_dir("bucket")
    lab.notes["port"] = port


def close(lab: Lab) -> None:
    """End the server."""
    if "server" in lab.notes:
        lab.notes["server"].kill()
        lab.notes["server"].wait()
    for name in (*KEYS, "AWS_ENDPOINT_URL"):
        os.environ.pop(name, None)


def run(case: Case, lab: Lab) -> None:
    """One kind of fault, by the case's number."""
    what, rng, place = PLAN[case.number % len(PLAN)], lab.rng(case), lab.place(case)
    proxy = Proxy(lab.notes["port"])
    endpoint = f"127.0.0.1:{proxy.port}"
    uri = f"s3://bucket/{case.number}"
    address = uri
    if case.number // len(PLAN) % 2 == 1 or lab.notes.get("options"):
        address = f"{uri}?scheme=http&endpoint_override={endpoint}&region=us-east-1"
        place.env = KEYS | {"AWS_ENDPOINT_URL": "http://127.0.0.1:9"}  # the address must count
    else:
        place.env = KEYS | {"AWS_ENDPOINT_URL": f"http://{endpoint}"}
    place.configure(lab.config("lora", address))
    try:
        if what in RATES:
            _at_a_rate(case, place, proxy, what, rng)
        else:
            _for_a_time(case, place, proxy, what, rng)
    finally:
        proxy.close()
    if not case.broken:
        differs = evidence(f"{uri}/r").differs(lab.twins["lora"])
        case.check("the same bits as uninterrupted", not differs, f"{place.folder}: {differs}")
    if not case.broken:
        place.remove()


def _at_a_rate(case: Case, place: Place, proxy: Proxy, what: str, rng: random.Random) -> None:
    """Each request meets the fault with the same probability."""
    rate = RATES[what]
    proxy.decide = lambda: what if rng.random() < rate else PASS
    command = place.train()
    code = command.wait()
    case.faults[what] += proxy.injected.total()
    case.check(
        "faults that pass cost time only",
        code == 0,
        f"{place.folder}: {dict(proxy.injected)}: exit {code}\n{command.text()[-3000:]}",
    )
    if not proxy.injected:
        case.skipped.append(f"{what}: no request met it")


def _for_a_time(case: Case, place: Place, proxy: Proxy, what: str, rng: random.Random) -> None:
    """Every request meets the fault, from one moment to another."""
    goal = 0 if what == "down at start" else rng.randint(2, STEPS - 6)
    fault = "expired" if what == "expired" else "503"
    bad: Callable[[], str] = lambda: fault  # noqa: E731
    if not goal:
        proxy.decide = bad
    command = place.train()
    far = lambda: max([*map(int, AGAIN.findall(command.text())), *_saved(command), 0])  # noqa: E731
    until(lambda: far() >= goal or command.poll() is not None, 120)
    proxy.decide = bad
    if what == "outage":
        until(lambda: command.poll() is not None, rng.uniform(2, 12))
        proxy.decide = lambda: PASS
    code, wanted = command.wait(), {"outage": (0, 6)}.get(what, (6,))
    proxy.decide = lambda: PASS
    case.faults[what] += 1
    where = f"{place.folder}: {what} from step {goal}: exit {code}"
    case.check("exit 6 when storage is gone", code in wanted, f"{where}\n{command.text()[-3000:]}")
    took = time.monotonic() - command.began
    case.check("soon", took < START, f"{where} after {took:.0f} s")
    if what == "expired":
        said = re.search("credential|token|permission", command.text(), re.IGNORECASE)
        case.check("it says that credentials are the cause", said is not None, command.text())
    if code != 0:
        command = place.train()
        if until(lambda: AGAIN.search(command.text()) or command.poll() is not None, 120):
            case.again.append(time.monotonic() - command.began)
        code = command.wait()
        case.check("the same command continues", code == 0, f"{where}\n{command.text()[-3000:]}")


def _saved(command: Command) -> list[int]:
    return [int(step) for step in re.findall(r"^step (\d+)  saved", command.text(), re.MULTILINE)]
