"""The commands: what they are called, which options they take, and how they fail.

Nothing here computes. A command imports what it needs when it runs: help, and everything that only reads a ledger,
answers without loading JAX.
"""

from __future__ import annotations

import contextvars
import functools
import inspect
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import typer
from typer.core import TyperGroup

from fedlens import __version__
from fedlens.errors import ConfigError, FedlensError

FAILED, WRONG_USAGE = 1, 2

_debug = contextvars.ContextVar("debug", default=False)


class _Commands(TyperGroup):
    """The group of all commands; `--debug` counts wherever it stands, before the command or after it."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        options = args[: args.index("--")] if "--" in args else args
        count = options.count("--debug")
        rest = [word for place, word in enumerate(args) if word != "--debug" or place >= len(options)]
        return super().parse_args(ctx, ["--debug"] * count + rest)


app = typer.Typer(
    cls=_Commands,
    no_args_is_help=True,
    rich_markup_mode=None,  # plain help: half the time, and a usage error is a line rather than a box
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)

LedgerArgument = Annotated[Path, typer.Argument(metavar="LEDGER", help="A ledger's folder, such as runs/digits.")]
JsonOption = Annotated[bool, typer.Option("--json", help="Print JSON instead of a table.")]


def main() -> None:
    """Runs the command that the process's arguments name, and exits."""
    app(prog_name="fedlens")


def _print_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"fedlens {__version__}")
        raise typer.Exit


@app.callback()
def _everything(
    debug: Annotated[bool, typer.Option("--debug", help="Show where an error comes from: the full traceback.")] = False,
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    """Train on many clients, and keep what every one of them learned."""
    _debug.set(debug)


def _command(function: Callable[..., None]) -> Callable[..., None]:
    """Makes `function` a command whose errors are one sentence on standard error and an exit code."""

    @functools.wraps(function)
    def reporting(*arguments: Any, **options: Any) -> None:
        debug = _debug.get()
        try:
            function(*arguments, **options)
        except BrokenPipeError:
            raise  # whoever reads our output has had enough, as in `fedlens show x | head`
        except KeyboardInterrupt:
            if debug:
                raise
            _fail("Interrupted.", FAILED)
        except (FedlensError, OSError) as error:
            if debug:
                raise
            _fail(_sentence(error), WRONG_USAGE if isinstance(error, ConfigError) else FAILED)
        except (typer.Exit, typer.Abort):
            raise
        except Exception as error:
            if debug:
                raise
            what = " ".join(f"{type(error).__name__}: {error}".split())
            _fail(f"Unexpected error: {what}; run with --debug to see where.", FAILED)

    # Click keeps the lines after a backspace character as they are; a docstring spells it, as linters want it to.
    return app.command(help=(inspect.getdoc(function) or "").replace("\\b", "\b"))(reporting)


def _sentence(error: BaseException) -> str:
    """An error as text; one of the operating system's names the file at fault."""
    if isinstance(error, OSError) and not isinstance(error, FedlensError) and error.strerror:
        where = f", in {error.filename}" if error.filename else ""
        return f"Expected the operating system to comply, found: {error.strerror}{where}."
    return "\n".join([str(error), *getattr(error, "__notes__", [])])


def _fail(message: str, code: int) -> None:
    typer.echo(f"Error: {message}", err=True)
    raise typer.Exit(code)


@_command
def run(
    config: Annotated[
        str,
        typer.Argument(metavar="NAME|CONFIG.toml", help="A configuration by name (see `fedlens configs`) or a file."),
    ],
    rounds: Annotated[int | None, typer.Option(min=1, help="How many rounds, instead of the configuration's.")] = None,
    seed: Annotated[
        int | None, typer.Option(min=0, max=2**32 - 1, help="The seed, instead of the configuration's.")
    ] = None,
    ledger: Annotated[
        Path | None, typer.Option(metavar="DIR", help="A new folder for the ledger; runs/<name> by default.")
    ] = None,
) -> None:
    r"""Train, and keep every client's local model of every round.

    \b
    fedlens run digits
    fedlens configs digits > mine.toml; fedlens run mine.toml --rounds 5
    """
    from fedlens.cli import training
    from fedlens.cli.config import load

    overrides = {name: value for name, value in {"rounds": rounds, "seed": seed}.items() if value is not None}
    training.start(load(config).model_copy(update=overrides), ledger)


@_command
def resume(ledger: LedgerArgument) -> None:
    """Continue an interrupted run from its last committed round.

    The results are those of a run that was not interrupted.
    """
    from fedlens.cli import training

    training.resume(ledger)


@_command
def ls(
    folder: Annotated[Path | None, typer.Argument(metavar="[DIR]", help="Where to look; runs by default.")] = None,
    json: JsonOption = False,
) -> None:
    """List ledgers: rounds, clients, size, state, last metric."""
    from fedlens.cli import inspecting

    inspecting.list_ledgers(folder, as_json=json)


@_command
def show(
    ledger: LedgerArgument,
    round_: Annotated[int | None, typer.Option("--round", metavar="R", min=0, help="One round, from 0.")] = None,
    client: Annotated[str | None, typer.Option(metavar="C", help="One client, by its id.")] = None,
    json: JsonOption = False,
) -> None:
    """Show a run, a round, a client over rounds, or a local model.

    Without options the run; with --round that round and its clients; with --client that client's way through the run,
    with the norms of its updates by leaf; with both the client's local model of that round.
    """
    from fedlens.cli import inspecting

    inspecting.show(ledger, round_, client, as_json=json)


@_command
def export(
    ledger: LedgerArgument,
    out: Annotated[Path, typer.Argument(metavar="OUT.safetensors", help="The new file.")],
    round_: Annotated[int, typer.Option("--round", metavar="R", min=0, help="The round, from 0.")],
    client: Annotated[str, typer.Option(metavar="C", help="The client, by its id.")],
) -> None:
    """Write one local model as a safetensors file, ready to load."""
    from fedlens.cli import inspecting

    inspecting.export(ledger, round_, client, out)


@_command
def verify(ledger: LedgerArgument, json: JsonOption = False) -> None:
    """Check every checksum, and name what is damaged.

    Each damaged round, client and leaf is named, and the exit code is 1 if there is any.
    """
    from fedlens.cli import upkeep

    if not upkeep.verify(ledger, as_json=json):
        raise typer.Exit(FAILED)


@_command
def prune(
    ledger: LedgerArgument,
    keep_every: Annotated[
        int | None, typer.Option(metavar="N", min=1, help="Keep rounds 0, N, 2N, ... and the last; remove the others.")
    ] = None,
    drop_client: Annotated[
        list[str] | None, typer.Option(metavar="ID", help="Remove a client from all rounds; may be given repeatedly.")
    ] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Only say what would be removed.")] = False,
) -> None:
    r"""Remove rounds, or clients with everything that is known of them.

    What was removed is recorded, clients by a digest of their ids. Without options a removal that was interrupted is
    finished.

    \b
    fedlens prune runs/digits --drop-client form-03 --drop-client form-07
    """
    from fedlens.cli import upkeep

    upkeep.prune(ledger, keep_every, drop_client or [], dry_run=dry_run)


@_command
def du(ledger: LedgerArgument, json: JsonOption = False) -> None:
    """Show where a ledger's bytes go, by round and by leaf."""
    from fedlens.cli import upkeep

    upkeep.usage(ledger, as_json=json)


@_command
def explain(
    target: Annotated[
        str, typer.Argument(metavar="MODULE:NAME", help="A computation or learning process; FILE.py:NAME works too.")
    ],
    json: JsonOption = False,
) -> None:
    r"""Say what a computation does, and what leaves a client.

    The module is imported, which runs it.

    \b
    fedlens explain studies.rounds:average
    """
    from fedlens.cli import explaining

    explaining.explain(target, as_json=json)


@_command
def taps(
    target: Annotated[
        str, typer.Argument(metavar="MODULE:NAME", help="A computation or learning process; FILE.py:NAME works too.")
    ],
    json: JsonOption = False,
) -> None:
    r"""List where the clients' values can be taken.

    The module is imported, which runs it.

    \b
    fedlens taps studies.rounds:next_round
    """
    from fedlens.cli import tapping

    tapping.taps(target, as_json=json)


@_command
def disclosure(
    target: Annotated[
        str, typer.Argument(metavar="MODULE:NAME", help="A computation or learning process; FILE.py:NAME works too.")
    ],
    json: JsonOption = False,
    max_: Annotated[
        str | None, typer.Option("--max", metavar="LEVEL", help="Exit with 1 if an output tells more than this level.")
    ] = None,
) -> None:
    r"""Say what each output tells about one client, and why.

    Levels: public < central-dp < aggregate < per-client < raw, and public < local-dp < per-client. The module is
    imported, which runs it.

    \b
    fedlens disclosure studies.rounds:average --max aggregate
    """
    from fedlens.cli import disclosing

    disclosing.disclosure(target, as_json=json, limit=max_)


@_command
def configs(
    name: Annotated[str | None, typer.Argument(metavar="[NAME]", help="The configuration to print.")] = None,
) -> None:
    r"""List the configurations that come with fedlens, or print one.

    \b
    fedlens configs digits > mine.toml
    """
    from fedlens.cli.config import builtin_names, builtin_text

    if name is not None:
        sys.stdout.write(builtin_text(name))
        return
    width = max(map(len, builtin_names()))
    for known in builtin_names():
        typer.echo(f"{known:<{width}}  {builtin_text(known).splitlines()[0].lstrip('# ')}")
