"""Storm 5: bit flips, truncation, zeros and deletion in every kind of file on storage.

Each is followed by the same command, or by what only reads. Promised: the right numbers, or an
error (or a word, where a log has lost lines) that names the file, with the right exit code; never
other numbers in silence.
"""

from __future__ import annotations

import csv
import random
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

from commands import Command
from lab import NAME, Lab, Place, committed, evidence
from tally import Case

from rayft.config.load import load
from rayft.records.ledger import Ledger
from rayft.records.run_record import SweepRecord
from rayft.storage.failpoints import VARIABLE
from rayft.storage.folder import Storage

CASES = 300
SWEEP = {"trials": 12, "space": {"optim.lr": {"loguniform": [1e-5, 1e-2]}}, "scheduler": "none"}

# of a run that was cut off: (files, exit codes that may refuse)
CUT: dict[str, tuple[str, tuple[int, ...]]] = {
    "run.json": ("r/run.json", (6,)),
    "metrics.jsonl": ("r/metrics.jsonl", (6,)),
    "shard": ("r/checkpoints/*/rank-*.safetensors", (6,)),
    "manifest": ("r/checkpoints/*/manifest-*.json", (6,)),
    "COMMIT.json": ("r/checkpoints/*/COMMIT.json", (6,)),
    "every commit": ("r/checkpoints/*/COMMIT.json", (6,)),
    "driver.lease": ("r/driver.lease", (6,)),
    "cache meta.json": (".cache/*/meta.json", (3, 6)),
    "cache tokens": (".cache/*/tokens-*.arrow", (3, 6)),
    "cache bad rows": (".cache/*/bad_rows*.jsonl", (3, 6)),
}
DONE = {
    "run.json": "r/run.json",
    "shard": "r/checkpoints/*/rank-*.safetensors",
    "manifest": "r/checkpoints/*/manifest-*.json",
    "COMMIT.json": "r/checkpoints/*/COMMIT.json",
    "cache tokens": ".cache/*/tokens-*.arrow",
}
LEDGER = {"sweep.json": "s/sweep.json", "trials.jsonl": "s/trials.jsonl"}


def prepare(lab: Lab) -> None:
    """A run that was cut off after three commits, one that is done, and a sweep that is done."""
    for kind in lab.notes.get("kinds", ["lora"]):
        lab.twin(kind)
        cut = Place(lab.folder / f"cut-{kind}", lab.commands)
        (cut.folder / "tmp").mkdir(parents=True)
        cut.configure(lab.config(kind, str(cut.storage)))
        cut.train(**{VARIABLE: "checkpoint.committed:kill:3"}).wait()
        if committed(cut.home) != 9:
            raise RuntimeError(f"no run that was cut off after step 9: {cut.folder}")
        done = Place(lab.folder / f"twin-{kind}", lab.commands)
        said = {name: done.rayft(*argv, out=name) for name, argv in _readers(done).items()}
        for name, command in said.items():
            if command.wait() != 0:
                raise RuntimeError(f"`rayft {name}` of an unharmed run failed:\n{command.text()}")
            lab.notes[f"{name} {kind}"] = _numbers(command, done)
    _write_sweep(lab.folder / "sweep", lab)
    whole = Place(lab.folder / "sweep", lab.commands)
    (whole.folder / "tmp").mkdir()
    if whole.rayft("report", str(whole.storage / "s")).wait() != 0:
        raise RuntimeError("`rayft report` of an unharmed sweep failed")
    lab.notes["table"] = _table(whole.storage / "s")


def run(case: Case, lab: Lab) -> None:
    """One damage, one command."""
    rng = lab.rng(case)
    # By the number, so that few cases already meet all kinds of files.
    plans = [
        *(("cut", name) for name in CUT),
        *(("ledger", name) for name in LEDGER),
        *(("done", name) for name in DONE),
    ]
    which, target = plans[case.number % len(plans)]
    kind = rng.choice(lab.notes.get("kinds", ["lora"]))
    template = {"cut": f"cut-{kind}", "done": f"twin-{kind}", "ledger": "sweep"}[which]
    place = lab.place(case)
    shutil.copytree(lab.folder / template / "st", place.storage)
    place.configure(lab.config(kind, str(place.storage)))
    pattern = {
        "cut": lambda: CUT[target][0],
        "done": lambda: DONE[target],
        "ledger": lambda: LEDGER[target],
    }[which]()
    files = sorted(place.storage.glob(pattern))
    if target == "every commit":
        harm = ", ".join(_harm(path, rng) for path in files)
    else:
        path = rng.choice(files)
        harm = _harm(path, rng)
        files = [path]
    case.faults[f"{target} of a {'sweep' if which == 'ledger' else which + ' run'}"] += 1
    judges: dict[str, Callable[..., tuple[bool, str]]] = {
        "cut": _continued,
        "done": _read,
        "ledger": _reported,
    }
    good, what = judges[which](lab, place, kind, target, files, rng)
    case.check("right numbers or a named error", good, f"{place.folder}: {target}: {harm}: {what}")
    if good:
        place.remove()


def _harm(path: Path, rng: random.Random) -> str:
    """Damage the file; how."""
    data = bytearray(path.read_bytes())
    ways = {"flip": 40, "flips": 10, "cut": 25, "zeros": 10, "empty": 5, "gone": 10}
    how = rng.choices(list(ways), list(ways.values()))[0]
    if not data and how != "gone":
        how = "gone"
    place = rng.randrange(len(data)) if data else 0
    if how == "gone":
        path.unlink()
        return f"{path.name} gone"
    if how.startswith("flip"):
        for _ in range(1 if how == "flip" else 3):
            data[place] ^= 1 << rng.randrange(8)
            how += f" byte {place}"
            place = rng.randrange(len(data))
    elif how == "zeros":
        end = min(len(data), place + rng.choice((1, 16, 4096)))
        data[place:end] = bytes(end - place)
        how += f" {place} to {end}"
    else:
        del data[0 if how == "empty" else place :]
        how += f" at {len(data)}"
    path.write_bytes(data)
    return f"{path.name} {how}"


def _named(text: str, files: list[Path]) -> bool:
    """Whether the output names what was damaged: the file, or its folder on storage."""
    return any(path.name in text or path.parent.name in text for path in files)


def _continued(
    lab: Lab, place: Place, kind: str, target: str, files: list[Path], rng: random.Random
) -> tuple[bool, str]:
    """The same command goes on with a run that was cut off."""
    command = place.train()
    code, twin, what = command.wait(), lab.twins[kind], command.text()[-1500:]
    if target == "every commit":
        return code == 6 and "restart" in what, f"exit {code}, wanted 6 and the choice\n{what}"
    if code != 0:
        good = code in CUT[target][1] and _named(what, files)
        return good, f"exit {code}\n{what}"
    found = evidence(str(place.home))
    differs = found.differs(twin)
    if not differs or (found.lacks_only(twin) and _named(what, files)):
        return True, ""
    return False, f"exit 0, other numbers and no word: {differs}\n{what}"


def _readers(place: Place) -> dict[str, tuple[str, ...]]:
    return {
        "train": ("train", str(place.folder / "config.json")),
        "eval": ("eval", str(place.home)),
    }


def _numbers(command: Command, place: Place) -> list[str]:
    """Its lines, without the folder that differs."""
    return command.text().replace(str(place.folder), "").splitlines()


def _read(
    lab: Lab, place: Place, kind: str, target: str, files: list[Path], rng: random.Random
) -> tuple[bool, str]:
    """A done run is read: by the same command, which only tells, or evaluated again."""
    name = rng.choice(("train", "eval")) if target == "run.json" else "eval"
    command = place.rayft(*_readers(place)[name])
    code, what = command.wait(), command.text()[-1500:]
    if code != 0:
        return code in (3, 6) and _named(what, files), f"{name}: exit {code}\n{what}"
    want, said = lab.notes[f"{name} {kind}"], _numbers(command, place)
    if [line for line in said if line in want] == want:
        return True, ""  # what else it says is a word on the damage
    return _named(what, files), f"{name}: other numbers and no word: {said}, unharmed {want}"


def _reported(
    lab: Lab, place: Place, kind: str, target: str, files: list[Path], rng: random.Random
) -> tuple[bool, str]:
    """`rayft report` of a done sweep."""
    (place.storage / "s/trials.csv").unlink()
    command = place.rayft("report", str(place.storage / "s"))
    code, what = command.wait(), command.text()[-1500:]
    if code != 0:
        # Without its record a folder is no sweep: the address is wrong, as far as anybody can see.
        good = code == 6 or (code == 2 and not (place.storage / "s/sweep.json").exists())
        return good and _named(what, files), f"exit {code}\n{what}"
    table, whole = _table(place.storage / "s"), lab.notes["table"]
    wrong = [row for row, right in zip(table, whole, strict=False) if row != right]
    return table == whole or _named(what, files), f"{len(table)} rows, other numbers: {wrong[:2]}"


def _table(home: Path) -> list[dict[str, str]]:
    with (home / "trials.csv").open() as file:
        return list(csv.DictReader(file))


def _write_sweep(folder: Path, lab: Lab) -> None:
    """A done sweep of 12 trials, through rayft's own writers; its numbers are made up."""
    config: dict[str, Any] = lab.config(
        "lora", str(folder / "st"), sweep=SWEEP, scale={"workers": 1, "gpus": 0}
    )
    run = load(config | {"name": "s"})
    home, draw, results = Storage.open(str(folder / "st")).child("s"), random.Random(0), {}
    ledger = Ledger(home, clock=lambda: 1.795e9 + len(results))
    for number in range(12):
        trial, params = f"t{number:04d}", {"optim.lr": 10 ** draw.uniform(-5, -2)}
        ledger.add(trial, "running", 0, params)
        value = 5.9
        for step in (6, 12, 18, 24):
            value -= draw.uniform(0.1, 0.6)
            numbers = {
                "eval_loss": value,
                "loss": value,
                "tokens": 80.0 * step,
                "seconds": step / 9,
            }
            ledger.add(trial, "done" if step == 24 else "running", step, params, numbers)
        results[trial] = {"trial": trial, "step": 24, "metric": value, "params": params}
    ledger.close()
    best = min(results.values(), key=lambda result: result["metric"])
    record = SweepRecord(
        "s",
        "done",
        run.resolved(),
        run.sweep_digest(),
        "eval_loss",
        "min",
        best=best,
        stopped_by="trials",
        starts=1,
    )
    home.write_text("sweep.json", record.to_json())


assert NAME == "r", "the patterns above name the run's folder"
