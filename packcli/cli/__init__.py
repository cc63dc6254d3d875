"""The command line: parse, call one function, print. The only place that catches a `PackcliError`.

Results go to stdout, progress and errors to stderr. Heavy libraries load inside commands, so `--help` is quick.
"""

from __future__ import annotations

import os
import sys
from io import TextIOWrapper
from typing import Annotated, Any

import typer

from packcli import __version__, console, log
from packcli.cli.options import app
from packcli.errors import LeftError, OutOfMemoryError, PackcliError

# isort: off
from packcli.cli import prepare, run, evaluate, show, machine, trainers  # noqa: F401  # in the order of --help

# isort: on

# click's, of which some versions of typer carry a copy of their own.
_UsageError: Any = typer.BadParameter.__base__


def _version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"packcli {__version__}")
        raise typer.Exit


@app.callback()
def root(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version and exit.")
    ] = False,
) -> None:
    """Should I pack or pad my fine-tuning data, how, and what does it cost?"""


def main() -> None:
    """The console script."""
    log.setup()
    if isinstance(sys.stdout, TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")  # as stderr does: not every terminal takes every sign
    try:
        code = app(standalone_mode=False) or 0
    except LeftError as error:
        console.say(f"{error.cause}; {error.fix}", err=True)
        sys.exit(error.exit_code)
    except PackcliError as error:
        # torchrun's ranks all raise what they share; memory is each one's own.
        if os.environ.get("RANK", "0") == "0" or isinstance(error, OutOfMemoryError):
            console.complain(error.cause, error.fix)
        sys.exit(error.exit_code)
    except typer.Abort:
        code = 130
    except _UsageError as error:
        command = error.ctx.command_path if error.ctx else "packcli"
        console.complain(error.format_message(), f"see `{command} --help`")
        code = 2
    if code == 130:  # typer makes this, or an Abort, of KeyboardInterrupt
        console.complain("interrupted", "run the same command again: it goes on where it was")
    sys.exit(code)
