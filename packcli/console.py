"""How a command ends: one JSON document or a table on stdout, one line a failure on stderr, an exit code."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import orjson
import typer

from packcli import log

_PIPE_WIDTH = 140


def say(text: str, *, err: bool = False) -> None:
    """Lines for a reader, with control characters shown and not obeyed: they may repeat what others wrote."""
    typer.echo("\n".join(map(log.plain, log.masked(text).split("\n"))), err=err)


def print_json(document: object) -> None:
    """The one document that `--json` promises; numpy's numbers are numbers."""
    options = orjson.OPT_INDENT_2 | orjson.OPT_SERIALIZE_NUMPY
    typer.echo(log.plain_json(orjson.dumps(document, option=options).decode()))


def show(renderable: Any) -> None:
    """Anything rich can draw, on stdout."""
    from rich.console import Console

    class Plain(Console):
        """Shows control characters in the texts it is given: labels may come from data."""

        def render_str(self, text: str, **options: Any) -> Any:
            return super().render_str("\n".join(map(log.plain, text.split("\n"))), **options)

    console = Console()
    # Into a file or a pipe there is no width to respect: let no column be cut.
    Plain(width=None if console.is_terminal else max(console.width, _PIPE_WIDTH)).print(renderable)


def finish(failures: Iterable[Any]) -> None:
    """Say what failed, each cause once, and exit with the code of the first: 6 only when nothing else failed."""
    said: dict[str, str] = {}
    for failure in failures:
        said.setdefault(failure.cause, failure.fix)
    for cause, fix in said.items():
        complain(cause, fix)
    codes = [failure.exit_code for failure in failures]
    if codes:
        raise typer.Exit(next((code for code in codes if code != 6), 6))


def complain(cause: str, fix: str) -> None:
    """`error: <cause>`, a blank line, `hint: <fix>`, with control characters shown and not obeyed."""
    text = f"error: {cause}\n" + (f"\nhint: {fix}\n" if fix else "")
    say(text.removesuffix("\n"), err=True)
