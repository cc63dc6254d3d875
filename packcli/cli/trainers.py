"""`packcli audit` and `import-config`: other trainers."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated, Literal

import typer

from packcli import console
from packcli.cli.options import Json, app
from packcli.errors import ConfigError, IntegrityError

_AUDITED_ANEW = "an audit begins anew; what --out DIR already holds of configurations that were finished stays"


@app.command("audit")
def audit_(
    trl: Annotated[
        Path | None, typer.Option("--trl", metavar="FILE.yaml", help="Your configuration of `trl sft`.")
    ] = None,
    llamafactory: Annotated[
        Path | None,
        typer.Option(
            "--llamafactory", metavar="FILE.yaml", help="Your configuration of `llamafactory-cli train`."
        ),
    ] = None,
    axolotl: Annotated[
        Path | None, typer.Option("--axolotl", metavar="FILE.yaml", help="Your configuration of `axolotl train`.")
    ] = None,
    trainers: Annotated[
        list[str] | None,
        typer.Option("--trainer", metavar="NAME", help="Its reference configurations: packcli, trl, ..."),
    ] = None,
    envs: Annotated[
        Path, typer.Option("--envs", metavar="DIR", help="Holds NAME/, a virtual environment of each trainer.")
    ] = Path("audit-envs"),
    python: Annotated[
        list[str] | None,
        typer.Option("--python", metavar="NAME=PATH", help="The interpreter of a trainer's environment."),
    ] = None,
    install: Annotated[
        list[str] | None,
        typer.Option("--install", metavar="NAME", help="Make the environment of a trainer in --envs with pip."),
    ] = None,
    out: Annotated[
        Path | None,
        typer.Option("--out", metavar="DIR", help="Write findings, and a script that shows each `no` by itself."),
    ] = None,
    format_: Annotated[Literal["table", "md"], typer.Option("--format", help="table, md.")] = "table",
    strict: Annotated[bool, typer.Option("--strict", help="Exit 4 when an answer is no.")] = False,
    json: Json = False,
) -> None:
    """Feed crafted documents to other trainers, and to packcli, and read off what they really train.

    Without a file or a --trainer: the reference configurations of every trainer whose environment is there.
    """
    from packcli.audit import command, table
    from packcli.launch.local import terminable

    files = {"trl": trl, "llamafactory": llamafactory, "axolotl": axolotl}
    asked = command.Asked(files, trainers or [], envs, python or [], out)
    command.install(install or [], envs)
    try:
        with terminable(_AUDITED_ANEW):
            rows, failures = command.run(asked) if not install or asked.named else ([], [])
    except KeyboardInterrupt:
        console.complain("interrupted", _AUDITED_ANEW)
        sys.exit(130)
    if json:
        console.print_json(table.document(rows))
    elif rows:
        for line in table.warnings(rows):
            console.say(line)
        console.say(table.markdown(rows)) if format_ == "md" else console.show(table.drawn(rows))
        for line in table.evidence(rows):
            console.say(line)
    console.finish(failures)
    if strict and (wrong := sum(finding.answer == "no" for row in rows for finding in row.findings)):
        raise IntegrityError(f"{wrong} answers are no", "--out DIR writes a script that shows each by itself")


@app.command("import-config")
def import_config(
    file: Annotated[
        Path, typer.Argument(metavar="FILE", show_default=False, help="A YAML of TRL, axolotl or LLaMA-Factory.")
    ],
    from_: Annotated[
        Literal["trl", "axolotl", "llamafactory"] | None,
        typer.Option("--from", help="Whose file it is. [default: seen by its keys]"),
    ] = None,
    out: Annotated[
        Path, typer.Option("--out", metavar="SWEEP", help="The sweep file to write; `-`: to stdout.")
    ] = Path("sweep.yaml"),
    processes: Annotated[
        int | None, typer.Option("--processes", metavar="N", min=1, help="That train together; no file says it.")
    ] = None,
    toy: Annotated[
        bool, typer.Option("--try", help="With packcli's toy model and chats instead of its own: for a laptop.")
    ] = False,
    json: Json = False,
) -> None:
    """Make a sweep of another trainer's configuration, and say what became of each of its keys."""
    from packcli.importers import convert

    to_stdout = str(out) == "-"
    if to_stdout and json:
        raise ConfigError("--json and `--out -` both want stdout", "name a file with --out")
    imported = convert.convert(file, from_, processes, toy=toy)
    text = convert.alone(imported) if to_stdout else ""
    written = [] if to_stdout else convert.write(imported, out)
    if json:
        console.print_json(imported.document(out))
        return
    typer.echo(text, nl=False)
    for line in convert.lines(imported, out, written):
        console.say(line, err=to_stdout)
