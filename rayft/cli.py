"""The command line: parse, call, print. Each command's module is imported when it is called.

Output is plain lines, so that it reads the same on a terminal, in a Ray job's log and in a pipe.
Results go to stdout, errors to stderr, exit codes are those of rayft.core.errors.
"""

from __future__ import annotations

import json
import logging
import os
import shlex
import sys
from collections.abc import Iterable
from contextvars import ContextVar
from typing import TYPE_CHECKING, Annotated

import typer

import rayft
from rayft import unexpected
from rayft.core.address import below, carried, clean, redact
from rayft.core.console import say, takes
from rayft.core.errors import MAX_LINES, ConfigError, RayftError, line_of
from rayft.entry import INTERRUPTED, RESUMED, SIGNALS
from rayft.storage.remote import refuse_malformed

if TYPE_CHECKING:
    from rayft.config.run import Run
    from rayft.records.run_record import RunRecord, SweepRecord

app = typer.Typer(
    help="Fine-tune language models on a Ray cluster, and find the best way to do it.",
    add_completion=False,
    context_settings={"help_option_names": ["-h", "--help"]},
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)

# The run's folder or URI, once a command knows it: where an unexpected error is logged.
_folder: ContextVar[str] = ContextVar("folder", default="")

Config = Annotated[str, typer.Argument(metavar="CONFIG", help="A YAML or JSON file.")]
Overrides = Annotated[
    list[str] | None,
    typer.Argument(metavar="[a.b=c]...", help="Values over the file: methods.0.rank=8"),
]
Where = Annotated[
    str, typer.Argument(metavar="DIR_OR_URI", help="A run's folder: <storage>/<name>.")
]


@app.callback(invoke_without_command=True)
def _top(
    context: typer.Context,
    version: Annotated[bool, typer.Option("--version", help="Print the version.")] = False,
) -> None:
    if version:
        say(f"rayft {rayft.__version__}")
        raise typer.Exit
    if context.invoked_subcommand is None:
        say(context.get_help())


@app.command()
def check(
    config: Annotated[
        str | None, typer.Argument(metavar="CONFIG", help="A YAML or JSON file.")
    ] = None,
    overrides: Overrides = None,
    schema: Annotated[
        bool, typer.Option("--schema", help="Print the JSON Schema of a config instead.")
    ] = False,
) -> None:
    """Validate a config, and print it with every default written out."""
    if schema:
        from rayft.config.schema import schema as build

        say(json.dumps(build(), indent=2))
        return
    if config is None:
        raise ConfigError("no config given", fix="rayft check CONFIG [a.b=c ...]")
    from rayft.config.parse import dump

    run = rayft.load(config, overrides or ())
    for address in run.addresses():
        refuse_malformed(address)
    _warn_of_credentials(run.addresses())
    text = dump(run.resolved())
    say(redact(f"# {line_of(config)} is valid; digest {run.digest()}"))
    say(text if takes(text) else dump(run.resolved(), unicode=False), end="")
    if run.sweep is not None:
        say(f"# sweep: {_searched(run)}")


@app.command()
def train(
    config: Config,
    overrides: Overrides = None,
    restart: Annotated[
        bool,
        typer.Option("--restart", help="Set checkpoints and metrics aside, begin at step 0."),
    ] = False,
) -> None:
    """Run, or continue the unfinished run of that name."""
    run = rayft.load(config, overrides or ())
    folder = below(run.storage, run.name)
    _folder.set(folder)
    from rayft.training.driver import train as start

    record = start(run, again=_typed("train", config, overrides), restart=restart)
    say("\n".join(_summary(record, folder)))


@app.command()
def sweep(config: Config, overrides: Overrides = None) -> None:
    """Search the sweep block of a config, or continue; leaves best/ and report.html."""
    run = rayft.load(config, overrides or ())
    folder = below(run.storage, run.name)
    _folder.set(folder)
    from rayft.sweeps.driver import sweep as start

    record = start(run, again=_typed("sweep", config, overrides))
    say("\n".join(_found(record, folder)))


@app.command("eval")
def evaluate(
    where: Where,
    generate: Annotated[
        int, typer.Option(min=0, metavar="N", help="Also generate N completions, and score them.")
    ] = 0,
    limit: Annotated[
        int | None, typer.Option(min=1, metavar="N", help="Evaluate only N held-out rows.")
    ] = None,
) -> None:
    """Held-out loss of base and tuned model, per task."""
    from rayft.compose.offline import evaluate_run

    where = _address(where)
    say(evaluate_run(where, generate=generate, limit=limit))


@app.command()
def export(
    where: Where,
    merge: Annotated[
        bool, typer.Option("--merge", help="Merge adapters into the unquantised base.")
    ] = False,
    check: Annotated[
        str | None, typer.Option(metavar="vllm", help="Say whether vllm would load it.")
    ] = None,
    to: Annotated[str | None, typer.Option(metavar="FOLDER", help="Default: <run>/export.")] = None,
    step: Annotated[
        int | None, typer.Option(min=1, metavar="N", help="Default: the best checkpoint.")
    ] = None,
) -> None:
    """Write the PEFT or Hugging Face layout: weights, tokenizer, chat template, model card."""
    if check not in (None, "vllm"):
        raise ConfigError(f"--check knows vllm only, not {check!r}")
    from rayft.compose.offline import export_run

    where, to = _address(where), to and clean(to)
    say(export_run(where, merge=merge, check=check, to=to, step=step))


@app.command()
def report(
    where: Annotated[
        str, typer.Argument(metavar="DIR_OR_URI", help="A sweep's folder: <storage>/<name>.")
    ],
) -> None:
    """Build report.html, trials.csv and an Optuna journal of a sweep from its storage alone."""
    where = _address(where)
    from rayft.report import build

    for address in build(where):
        say(address)


def _address(where: str) -> str:
    """The folder a command works on, without the credentials that were typed with it."""
    where = clean(where)
    _folder.set(where)
    _warn_of_credentials([where])
    return where


def _warn_of_credentials(addresses: Iterable[str]) -> None:
    if said := carried(addresses):
        say(f"note: {said}", err=True)


def _typed(command: str, config: str, overrides: list[str] | None) -> str:
    """The command line that continues a run: what was typed, without credentials."""
    return shlex.join(["rayft", command, *(redact(text) for text in (config, *(overrides or ())))])


def _searched(run: Run) -> str:
    """`32 trials of at most 90 steps, optuna, asha`."""
    sweep = run.sweep
    if sweep is None:
        return "none"
    steps = sweep.steps or run.train.steps
    length = f"{run.train.epochs:g} epochs" if steps is None else f"{steps} steps"
    trials = f"{sweep.count} trial{'' if sweep.count == 1 else 's'}"
    return f"{trials} of at most {length}, {sweep.search.kind}, {sweep.scheduler.kind}"


def _summary(record: RunRecord, folder: str) -> list[str]:
    """The last lines of a training command."""
    trained = f"{record.params_trainable:,} of {record.params_total:,} parameters"
    lines = [
        f"{record.name}: {record.status}, {record.steps} steps, {record.seconds:.0f} s, {trained}"
    ]
    for name, tuned in record.eval.items():
        task = name.removeprefix("eval_loss")
        if name.startswith("eval_loss") and name in record.base:
            before, after = (each[f"eval_ppl{task}"] for each in (record.base, record.eval))
            ppl = f"perplexity {before:.1f} -> {after:.1f}"
            label = f"held-out loss{task.replace('/', ', task ')}"
            lines.append(f"  {label}: base {record.base[name]:.4f} -> tuned {tuned:.4f} ({ppl})")
    if record.best:
        lines.append(f"  best: {record.best.metric:.4f} at step {record.best.step}")
    again = shlex.join(["rayft", "eval", folder, "--generate", "64"])
    lines += [f"  export: {below(folder, 'export')}", f"  next: {again}"]
    return lines


def _found(record: SweepRecord, folder: str) -> list[str]:
    """The last lines of a sweep."""
    best = record.best
    before = record.base.get(record.metric)
    base = "" if before is None else f" (base {before:.4f})"
    lines = [f"{record.name}: {record.status}, {record.seconds:.0f} s"]
    if best is not None:
        lines.append(f"  best: {best.trial}, {record.metric} {best.metric:.4f}{base}")
        lines += [
            f"    {path}: {value:.6g}" if isinstance(value, float) else f"    {path}: {value}"
            for path, value in best.params.items()
        ]
    again = shlex.join(["rayft", "export", below(folder, "best"), "--merge"])
    lines += [f"  report: {below(folder, 'report.html')}", f"  next: {again}"]
    return lines


def main(arguments: list[str] | None = None) -> int:
    """Run one command; the exit code. The only place where errors are caught."""
    if not sys.stderr.isatty():  # before transformers is imported: no bars in a log
        os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    logging.raiseExceptions = False  # a log line that nobody can read is no second error
    try:
        result = app(args=arguments, prog_name="rayft", standalone_mode=False)
        return result if isinstance(result, int) else 0
    except RayftError as error:
        lines, code = str(error).splitlines(), error.exit_code
        if error.__cause__ is not None:
            lines = [*lines[: MAX_LINES - 1], unexpected.log(error, _folder.get())]
    except typer.TyperException as error:
        said = [f"error: {error.format_message()}", f"  next: {_help(arguments)}"]
        lines, code = list(map(line_of, said)), 2
    except (typer.Abort, KeyboardInterrupt, SystemExit) as error:
        if isinstance(error, SystemExit) and error.code not in SIGNALS:
            raise  # Ray's handler of SIGTERM leaves with its number
        resumed = _word(arguments) in RESUMED
        lines, code = (["interrupted"], INTERRUPTED) if resumed else (["stopped"], 130)
    except Exception as error:  # whatever it is, people get a short message and a log, not a trace
        lines, code = unexpected.told(error, _folder.get()), 1
    say("\n".join(lines), err=True)
    return code


def _word(arguments: list[str] | None) -> str:
    """The command that was typed."""
    return next(iter(sys.argv[1:] if arguments is None else arguments), "")


def _help(arguments: list[str] | None) -> str:
    """The help page nearest to what was typed."""
    word = _word(arguments)
    known = ("check", "train", "sweep", "eval", "export", "report")
    return f"rayft {word} --help" if word in known else "rayft --help"
