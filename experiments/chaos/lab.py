"""What the storms share: small runs, their uninterrupted twins, and what lies on storage."""

from __future__ import annotations

import contextlib
import hashlib
import json
import random
import re
import shutil
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from commands import Command, Commands
from tally import Case

from rayft.checkpoint.reader import find_commit
from rayft.records.series import read_series
from rayft.storage.folder import Storage

LORA = {"kind": "lora", "rank": 4, "dropout": 0.1, "lr_ratio": 4}  # dropout: generators count too
KINDS: dict[str, dict[str, Any]] = {
    "lora": {"methods": [LORA]},
    "full": {"methods": [{"kind": "full"}]},
    "qlora": {"methods": [LORA], "model": {"path": "builtin:tiny", "quant": "nf4"}},
}
STEPS, SAVE = 24, 3
NUMBERS = ("loss", "lr", "grad_norm", "tokens", "eval_loss", "eval_tokens")
NAME = "r"


def write_data(folder: Path) -> None:
    """train.jsonl and eval.jsonl: made-up pairs, so that no start spends seconds on reading them"""
    draw = random.Random(0)
    words = ("run", "step", "loss", "rank", "save", "load", "file", "shard", "lease", "trial")
    for name, count in (("train", 96), ("eval", 8)):
        with (folder / f"{name}.jsonl").open("w") as file:
            for _ in range(count):
                some = [draw.choice(words) for _ in range(draw.randint(4, 12))]
                row = {"prompt": " ".join(some), "completion": " ".join(reversed(some))}
                file.write(json.dumps(row) + "\n")


def config(kind: str, storage: str, data: Path, **changes: Any) -> dict[str, Any]:
    """A run of 24 steps of 40 to 80 ms of builtin:tiny, in process.

    Args:
        data: folder with the files of `write_data`.
    """
    made = {
        "name": NAME,
        "storage": storage,
        "model": {"path": "builtin:tiny"},
        "data": {
            "train": [{"path": str(data / "train.jsonl")}],
            "eval": [{"path": str(data / "eval.jsonl")}],
            "max_length": 64,
        },
        "optim": {"lr": 1e-3, "warmup": 2},
        "train": {
            "steps": STEPS,
            "save_every": SAVE,
            "eval_every": 6,
            "global_batch": 4,
            "micro_batch": 2,
        },
        "scale": {"workers": 0, "gpus": 0},
    }
    return made | KINDS[kind] | changes


@dataclass(frozen=True)
class Evidence:
    """What a finished run is compared by: equal means equal to the last bit."""

    series: dict[tuple[str, int], dict[str, Any]]
    state: tuple[str, ...]  # sha256 of the last commit's shards: parameters, optimizer, generators
    export: str  # sha256 of the exported weights

    def differs(self, other: Evidence) -> str:
        """Where `other` (the uninterrupted one) differs first; "" where nothing does."""
        for key in sorted({*self.series, *other.series}, key=lambda key: (key[1], key[0])):
            mine, theirs = self.series.get(key), other.series.get(key)
            if mine != theirs:
                return f"{key[0]} step {key[1]}: {mine}, uninterrupted {theirs}"
        if self.state != other.state:
            return "the last commit's tensors differ"
        return "" if self.export == other.export else "the exported weights differ"

    def lacks_only(self, other: Evidence) -> bool:
        """Lines of the log are missing, and nothing that is there is wrong."""
        rows = all(other.series.get(key) == row for key, row in self.series.items())
        return rows and (self.state, self.export) == (other.state, other.export)


def evidence(uri: str) -> Evidence:
    """Of the run at `uri`, read with rayft's own readers."""
    home = Storage.open(uri)
    series = {
        (row["split"], row["step"]): {key: row[key] for key in NUMBERS if key in row}
        for row in read_series(home)
    }
    commit = find_commit(home, set_bad_aside=False)
    state = () if commit is None else tuple(m.sha256 for m in commit.manifests)
    names = [e.name for e in home.list("export") if e.name.endswith(".safetensors")]
    weights = b"".join(home.read_bytes(f"export/{name}") for name in sorted(names))
    return Evidence(series, state, hashlib.sha256(weights).hexdigest())


@dataclass
class Lab:
    """Where all storms happen.

    Args:
        scale: of the number of cases; 1 is the full storm.
    """

    folder: Path
    commands: Commands
    seed: int
    scale: float
    twins: dict[str, Evidence] = field(default_factory=dict)
    notes: dict[str, Any] = field(default_factory=dict)  # what `prepare` leaves for the cases

    def __post_init__(self) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        write_data(self.folder)

    def config(self, kind: str, storage: str, **changes: Any) -> dict[str, Any]:
        """See `config`; on this storm's data."""
        return config(kind, storage, self.folder, **changes)

    def rng(self, case: Case) -> random.Random:
        """The case's own draws."""
        return random.Random(f"{self.seed}/{case.storm}/{case.number}")

    def place(self, case: Case) -> Place:
        """An empty place for one case."""
        folder = self.folder / case.name
        shutil.rmtree(folder, ignore_errors=True)
        (folder / "tmp").mkdir(parents=True)
        return Place(folder, self.commands)

    def twin(self, kind: str, name: str = "", **changes: Any) -> Evidence:
        """The uninterrupted run of this config; made once, for all storms.

        Args:
            name: of the config, where it is not that of its kind.
        """
        name = name or kind
        if name not in self.twins:
            place = Place(self.folder / f"twin-{name}", self.commands)
            (place.folder / "tmp").mkdir(parents=True)
            place.configure(self.config(kind, str(place.storage), **changes))
            command = place.train()
            if command.wait() != 0:
                raise RuntimeError(f"the uninterrupted run failed:\n{command.text()}")
            self.notes[f"seconds {name}"] = time.monotonic() - command.began
            self.twins[name] = evidence(str(place.home))
        return self.twins[name]


@dataclass
class Place:
    """The folder of one case: config.json, out.txt, tmp/ (TMPDIR), st/ (storage)."""

    folder: Path
    commands: Commands
    fresh: bool = False  # whole new processes instead of forks
    env: dict[str, str] = field(default_factory=dict)

    @property
    def storage(self) -> Path:
        """Where runs go, if it is a local folder."""
        return self.folder / "st"

    @property
    def home(self) -> Path:
        """Of the run."""
        return self.storage / NAME

    def configure(self, wish: dict[str, Any]) -> None:
        """Write the config that `train` takes."""
        (self.folder / "config.json").write_text(json.dumps(wish))

    def train(self, **env: str) -> Command:
        """`rayft train CONFIG`: always the same command."""
        return self.rayft("train", str(self.folder / "config.json"), **env)

    def rayft(self, *argv: str, out: str = "out.txt", **env: str) -> Command:
        """Any command."""
        env = {"TMPDIR": str(self.folder / "tmp")} | self.env | env
        return self.commands.start(*argv, out=self.folder / out, fresh=self.fresh, env=env)

    def judge_leftovers(self, case: Case) -> None:
        """After the last command has ended well: what is there that nobody needs?"""
        temporary = [str(path) for path in (self.folder / "tmp").glob("rayft-*")]
        case.check("temporary folders of killed commands are removed", not temporary, temporary)
        torn = [str(path) for path in self.storage.rglob(".*.tmp")]
        leases = [str(path) for path in self.storage.rglob("driver.lease")]
        case.check("the lease is given back", not leases, leases)
        cut = f"{self.folder.parent}/"
        case.left += [name.removeprefix(cut) for name in (*temporary, *torn, *leases)]

    def remove(self) -> None:
        """It is no longer needed."""
        shutil.rmtree(self.folder, ignore_errors=True)


# ---- what lies on storage, read without rayft: also while a run goes on


def lines(home: Path) -> list[bytes]:
    """The whole lines of metrics.jsonl."""
    with contextlib.suppress(OSError):
        return (home / "metrics.jsonl").read_bytes().split(b"\n")[:-1]
    return []


def trained(some: list[bytes]) -> list[int]:
    """The steps that these lines say were trained, in their order."""
    found = []
    for line in some:
        with contextlib.suppress(ValueError, KeyError, TypeError):
            row = json.loads(line)
            if row["split"] == "train":
                found.append(row["step"])
    return found


def added(before: list[bytes], now: list[bytes]) -> list[bytes]:
    """The lines after those that both have."""
    same = 0
    while same < min(len(before), len(now)) and before[same] == now[same]:
        same += 1
    return now[same:]


def committed(home: Path) -> int:
    """The step of the newest commit; 0 without one."""
    found = (home / "checkpoints").glob("step-*/COMMIT.json")
    return max((int(path.parent.name.split("-")[1]) for path in found), default=0)


def record(home: Path) -> dict[str, Any]:
    """run.json; {} while there is none."""
    with contextlib.suppress(OSError, ValueError):
        return json.loads((home / "run.json").read_bytes())
    return {}


def tree(home: Path, skip: str = r"driver\.lease|\.tmp$") -> dict[str, str]:
    """{path: sha256} of all files below."""
    return {
        str(path.relative_to(home)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(home.rglob("*"))
        if path.is_file() and not re.search(skip, str(path))
    }


def until(condition: Callable[[], Any], limit: float, every: float = 0.02) -> bool:
    """Wait for an outside fact; whether it came in time."""
    end = time.monotonic() + limit
    while not condition():
        if time.monotonic() > end:
            return False
        time.sleep(every)
    return True


def follow(command: Command, home: Path, stop: Callable[[], bool]) -> Iterator[None]:
    """Yields every 10 ms until the command has ended or `stop()`."""
    while command.poll() is None and not stop():
        yield
        time.sleep(0.01)


def shared_memory() -> set[str]:
    """What lies in /dev/shm."""
    folder = Path("/dev/shm")
    return {path.name for path in folder.iterdir()} if folder.is_dir() else set()
