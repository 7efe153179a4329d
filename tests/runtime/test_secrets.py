"""No credential is printed or stored. The store checks every signature, so runs here work with the
secret or not at all; then everything that was said and everything that was written is searched."""

from __future__ import annotations

import json
import os
import shlex
import subprocess
import sys
from pathlib import Path
from urllib.parse import quote

import pytest
from pyarrow.fs import FileSelector

from rayft import cli
from rayft.cluster.driver_context import DriverContext, passed_on
from rayft.compose import execute as engine
from rayft.config.run import Run
from rayft.core import address
from rayft.core.errors import ConfigError, RayftError
from rayft.storage.remote import connect
from rayft.training.driver import train
from tests.contracts.s3 import guarded_s3


def lines(first: int) -> bytes:
    rows = [{"prompt": f"{n}?", "completion": f"{n} it is"} for n in range(first, first + 16)]
    return b"".join(json.dumps(row).encode() + b"\n" for row in rows)


@pytest.fixture
def store():
    address._remembered.clear()
    with guarded_s3() as found:
        yield found
    address._remembered.clear()


def within(clean: str, key: str, secret: str) -> str:
    return clean.replace("s3://", f"s3://{key}:{secret}@")


def asked(clean: str, key: str, secret: str) -> str:
    return f"{clean}&access_key={key}&secret_key={quote(secret, safe='')}"


def config(storage: str, data: str, **changes) -> dict:
    return {
        "name": "r",
        "storage": storage,
        "model": {"path": "builtin:tiny"},
        "methods": [{"kind": "lora", "rank": 2}],
        "data": {
            "train": [{"path": data}],
            "eval": [{"path": data.replace("rows.jsonl", "held.jsonl")}],
            "max_length": 64,
        },
        "train": {"steps": 4, "save_every": 2, "global_batch": 2, "micro_batch": 2},
        "scale": {"workers": 0, "gpus": 0},
    } | changes


def put_rows(clean: str, key: str, secret: str) -> str:
    """The address of a data file, without credentials."""
    for name, first in (("held.jsonl", 100), ("rows.jsonl", 0)):
        file = address.below(clean, name)
        fs, path = connect(within(file, key, secret))
        with fs.open_output_stream(path) as out:
            out.write(lines(first))
    return file


def forms(*secrets: str) -> list[bytes]:
    return [form.encode() for s in secrets for form in (s, quote(s, safe=""), json.dumps(s)[1:-1])]


def found_in(folder: Path, *secrets: str) -> list[str]:
    """Files below a folder that hold a secret."""
    hits = []
    for file in folder.rglob("*"):
        if file.is_file() and not file.is_symlink():
            data = file.read_bytes()
            hits += [str(file) for form in forms(*secrets) if form in data]
    return hits


def found_on(store, *secrets: str) -> list[str]:
    """Objects of the bucket that hold a secret, or have one in their name."""
    fs, path = connect(within(*store))
    hits, objects = [], 0
    for info in fs.get_file_info(FileSelector(path.split("/")[0], recursive=True)):
        data = info.path.encode()
        if info.is_file:
            objects += 1
            with fs.open_input_stream(info.path) as file:
                data += file.read()
        hits += [info.path for form in forms(*secrets) if form in data]
    assert objects > 1
    return hits


def test_commands_in_process(store, tmp_path, capsys, monkeypatch):
    """check, train, eval and export; a failure whose text holds the address; going on."""
    clean, key, secret = store
    file, data = tmp_path / "config.json", put_rows(*store)
    monkeypatch.chdir(tmp_path)
    said = ""
    address._remembered.clear()

    def command(*words: str, code: int = 0) -> str:
        nonlocal said
        assert cli.main(list(words)) == code, capsys.readouterr().err
        out, err = capsys.readouterr()
        said += out + err
        return out + err

    # The file itself is the user's own, outside of what is searched.
    file.write_text(json.dumps(config(within(*store), asked(data, key, secret))))
    text = command("check", str(file))
    assert clean in text and "AWS_ACCESS_KEY_ID" in text
    digest = text.split("digest ")[1].split()[0]
    file.write_text(json.dumps(config(clean, data)))
    assert f"digest {digest}" in command("check", str(file)), "the secret is part of no identity"
    typed = (f"storage={within(*store)}", f"data.train.0.path={within(data, key, secret)}")

    def fail(*args):
        raise OSError(f"cannot parse {within(*store)}; {secret} is no good")

    with monkeypatch.context() as patch:
        patch.setattr(engine, "execute", fail)
        text = command("train", str(file), *typed, code=1)
    assert f"continue from the last checkpoint: rayft train {file}" in text
    assert "carries credentials" in text
    command("train", str(file), *typed)
    command("eval", within(address.below(clean, "r"), key, secret))
    command("export", within(address.below(clean, "r"), key, secret))
    command("train", str(file), "optim.lr=1e-3", typed[0], code=2)  # another config
    command("check", str(file), f"storage=[{within(*store)}]", code=2)
    command("check", str(file), f"stoarge={within(*store)}", code=2)
    (tmp_path / "broken.yaml").write_text(f"storage: {within(*store)}: x\n")
    command("check", str(tmp_path / "broken.yaml"), code=2)
    (tmp_path / "broken.yaml").unlink()
    assert key not in said and secret not in said and quote(secret, safe="") not in said
    assert not found_on(store, key, secret) and not found_in(tmp_path, key, secret)


def test_the_printed_command_goes_on_with_the_environment_or_says_what_is_missing(
    store, tmp_path, capsys, monkeypatch
):
    clean, key, secret = store
    file, data = tmp_path / "config.json", put_rows(*store)
    file.write_text(json.dumps(config("unused", data)))
    printed = shlex.split(cli._typed("train", str(file), [f"storage={within(*store)}"]))
    assert printed == ["rayft", "train", str(file), f"storage={clean}"]
    address._remembered.clear()
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", key)
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "of somebody else")
    assert cli.main(printed[1:]) == 6
    assert "set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY" in capsys.readouterr().err
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", secret)
    assert cli.main(printed[1:]) == 0
    assert "carries credentials" not in capsys.readouterr().err


@pytest.mark.ray
@pytest.mark.timeout(300)
def test_a_run_on_ray_works_and_leaves_no_trace_of_them(quiet, store, tmp_path):
    """The worst way to give them: on the command line, which Ray keeps."""
    clean, key, secret = store
    data = put_rows(*store)
    file = tmp_path / "config.json"
    file.write_text(json.dumps(config("unused", data, scale={"workers": 1, "gpus": 0})))
    token = "hf_ThisIsASecretTokenOfTheHub"
    short = Path(os.environ["RAY_TMPDIR"])  # a socket's path has at most 107 bytes
    temporary, ray_files = short / "t", short / "s"
    temporary.mkdir()
    ray_files.mkdir()
    environment = os.environ | {
        "HF_TOKEN": token,
        "HF_HUB_OFFLINE": "1",
        "TMPDIR": str(temporary),
        "RAY_TMPDIR": str(ray_files),
        "RAYFT_DASHBOARD": "1",
        "RAYFT_RAY_LOGS": "1",
    }
    done = subprocess.run(
        [sys.executable, "-m", "rayft", "train", str(file), f"storage={within(*store)}"],
        env=environment, cwd=tmp_path, capture_output=True, text=True, timeout=280,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "r: done, 4 steps" in done.stdout and "carries credentials" in done.stderr
    secrets = (key, secret, token)
    assert not [s for s in secrets if s in done.stdout + done.stderr]
    assert not found_on(store, *secrets) and not found_in(tmp_path, *secrets)
    assert not found_in(temporary, *secrets)
    assert list(ray_files.rglob("*.log")), "Ray's logs were looked at"
    assert not found_in(ray_files, *secrets)


def test_what_travels_where_ray_logs_holds_no_secret(monkeypatch):
    address._remembered.clear()
    address.clean("s3://AKIAEXAMPLE:wJalrXUtnFEMI@bucket/x")
    for name in [name for name in os.environ if name.startswith("HF_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("HF_TOKEN", "hf_secret_of_the_hub")
    monkeypatch.setenv("HF_ENDPOINT", "https://me:hush-hush@mirror/hub")
    monkeypatch.setenv("HF_HOME", "/models")
    assert passed_on().get("HF_HOME") == "/models"
    assert not {"HF_TOKEN", "HF_ENDPOINT"} & set(passed_on())
    here = DriverContext.here()
    assert "wJalr" not in repr(here) and "hush" not in repr(here) and "hf_secret" not in repr(here)
    address._remembered.clear()
    monkeypatch.delenv("HF_TOKEN")
    here.enter()
    assert os.environ["HF_TOKEN"] == "hf_secret_of_the_hub"
    assert address.credentials_for("s3://bucket/y").secret_key == "wJalrXUtnFEMI"
    address._remembered.clear()


def test_errors_of_any_kind_are_clean():
    address._remembered.clear()
    address.clean("s3://AKIAEXAMPLE:wJalrXUtnFEMI@bucket/x")
    text = "no proxy http://me:hush@proxy:3128 for wJalrXUtnFEMI"
    for error in (RayftError(text), RayftError("x", where=text), RayftError("x", cause=text)):
        assert "hush" not in str(error) and "wJalr" not in str(error)
        assert "hush" not in repr(error) and "wJalr" not in repr(error)
    address._remembered.clear()


def test_a_space_over_data_is_clean():
    paths = ["s3://K:S3cretS3cret@b/a.jsonl", "s3://K:S3cretS3cret@b/b.jsonl"]
    run = Run.model_validate(
        config("x", "y") | {"sweep": {"space": {"data.train.0.path": {"choice": paths}}}}
    )
    assert "S3cret" not in json.dumps(run.resolved())
    address._remembered.clear()


@pytest.mark.parametrize("mask", [0o002, 0o077])
def test_files_are_as_open_as_the_umask_says(tmp_path, mask):
    """Neither world-readable beyond it, nor closed to the group of a shared file system."""
    rows = tmp_path / "rows.jsonl"
    rows.write_bytes(lines(0))
    (tmp_path / "held.jsonl").write_bytes(lines(100))
    before = os.umask(mask)
    try:
        train(Run.model_validate(config(str(tmp_path / f"runs-{mask}"), str(rows))))
    finally:
        os.umask(before)
    places = list((tmp_path / f"runs-{mask}").rglob("*"))
    wrong = {
        str(place.relative_to(tmp_path)): oct(place.stat().st_mode & 0o777)
        for place in places
        if place.stat().st_mode & 0o777 != (0o777 if place.is_dir() else 0o666) & ~mask
    }
    assert len(places) > 15 and not wrong


def test_a_traceback_in_the_common_folder_is_for_its_user_alone(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    monkeypatch.setattr("tempfile.tempdir", None)

    def fail(*args):
        raise ValueError("boom")

    monkeypatch.setattr(cli.rayft, "load", fail)
    assert cli.main(["check", "x.yaml"]) == 1
    (log,) = tmp_path.glob("rayft-error-*.log")
    assert log.stat().st_mode & 0o777 == 0o600 and str(log) in capsys.readouterr().err


def test_a_missing_config_does_not_repeat_the_secret():
    with pytest.raises(ConfigError) as caught:
        cli.rayft.load({"name": "x", "storage": {"s3://K:S3cretS3cret@b": 1}})
    assert "S3cret" not in str(caught.value)
