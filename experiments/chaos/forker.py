"""A process that has torch, transformers and rayft loaded, and forks a `rayft` command on request.

A fresh `rayft train` on a CPU spends ten seconds on imports; a fork of this process needs none, and
runs the same `rayft.entry.main` on the same arguments. `commands.py` speaks to it: one JSON line
per command over a Unix socket in, {"pid"} and at its end {"code"} out. It ends with its parent.
"""

from __future__ import annotations

import contextlib
import importlib
import json
import os
import selectors
import signal
import socket
import sys
import tempfile

WARM = (
    "rayft.entry",
    "rayft.cli",
    "rayft.training.driver",
    "rayft.training.in_process",
    "rayft.compose.execute",
    "rayft.compose.data",
    "rayft.compose.offline",
    "rayft.report",
    "rayft.report.facts",
    "transformers.models.llama.modeling_llama",
    "transformers.models.llama.tokenization_llama",
    "torch.distributed",
    "bitsandbytes",
    "peft",
    "pandas",
    "pyarrow.compute",
    "pyarrow.pandas_compat",
)


def serve(path: str) -> None:
    """Fork what comes in at the socket `path` until standard input ends."""
    for name in WARM:
        with contextlib.suppress(ImportError):  # a module that moved only costs time
            importlib.import_module(name)
    wake, waker = socket.socketpair()
    waker.setblocking(False)
    wake.setblocking(False)
    signal.set_wakeup_fd(waker.fileno())
    signal.signal(signal.SIGCHLD, lambda *_: None)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    listener = socket.socket(socket.AF_UNIX)
    listener.bind(path)
    listener.listen(64)
    running: dict[int, socket.socket] = {}
    with selectors.DefaultSelector() as selector:
        for source in (sys.stdin, listener, wake):
            selector.register(source, selectors.EVENT_READ)
        print("ready", flush=True)
        while True:
            for key, _ in selector.select():
                if key.fileobj is sys.stdin:
                    signal.set_wakeup_fd(-1)
                    for pid in running:
                        os.kill(pid, signal.SIGKILL)
                    return
                if key.fileobj is listener:
                    client, _ = listener.accept()
                    running[_fork(client)] = client
                else:
                    wake.recv(4096)
                    _reap(running)


def _fork(client: socket.socket) -> int:
    wish = json.loads(client.makefile().readline())
    pid = os.fork()
    if pid == 0:
        signal.set_wakeup_fd(-1)
        code = 70
        try:
            code = _run(wish)
        finally:
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(code)
    client.sendall(json.dumps({"pid": pid}).encode() + b"\n")
    return pid


def _run(wish: dict) -> int:
    """One command, in the child; its exit code."""
    for number in (signal.SIGCHLD, signal.SIGINT):
        signal.signal(number, signal.SIG_DFL)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    os.setsid()
    out = os.open(wish["out"], os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
    os.closerange(3, out)  # the sockets of others
    os.dup2(out, 1)
    os.dup2(out, 2)
    os.environ.update(wish["env"])
    tempfile.tempdir = None  # TMPDIR may be another one now
    from rayft.entry import main

    sys.argv = ["rayft", *wish["argv"]]
    code = main()
    import logging

    logging.shutdown()
    return code


def _reap(running: dict[int, socket.socket]) -> None:
    for pid in list(running):
        done, status = os.waitpid(pid, os.WNOHANG)
        if done:
            client = running.pop(pid)
            with contextlib.suppress(OSError):
                client.sendall(json.dumps({"code": os.waitstatus_to_exitcode(status)}).encode())
            client.close()


if __name__ == "__main__":
    serve(sys.argv[1])
