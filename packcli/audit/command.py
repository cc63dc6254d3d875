"""`packcli audit`: which trainers with which configurations, one after another."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from packcli import log, whose, yamlfile
from packcli.audit import run as running
from packcli.audit import trainers
from packcli.audit.run import Audited
from packcli.audit.trainers import TRAINERS, Subject, Trainer
from packcli.errors import ConfigError, MissingError, PackcliError
from packcli.files import make_directory


@dataclass(frozen=True, slots=True)
class Asked:
    """files: a user's configurations by trainer; trainers: whose references; python: `NAME=PATH` each."""

    files: dict[str, Path | None]
    trainers: list[str]
    envs: Path
    python: list[str]
    out: Path | None

    @property
    def named(self) -> bool:
        """Whether anything to audit was named."""
        return bool(self.trainers) or any(self.files.values())


def install(names: list[str], envs: Path) -> None:
    """Make the environments of these trainers."""
    for name in [_trainer(name) for name in names]:
        running.install(name, envs)


def run(asked: Asked) -> tuple[list[Audited], list[PackcliError]]:
    """The rows of the table, and what could not be run.

    Raises:
        ConfigError: a file, a trainer or an interpreter that is not there.
        MissingError: a trainer that was asked for has no environment.
    """
    if asked.out is not None:
        make_directory(asked.out, "findings")  # before the minutes of an audit
    pythons = _pythons(asked)
    rows: list[Audited] = []
    failures: list[PackcliError] = []
    subjects = _subjects(asked, pythons)
    with log.progress() as display:
        task = display.add_task("audit", total=len(subjects), note="")
        for number, subject in enumerate(subjects, 1):
            name = f"{subject.trainer} {subject.name}"
            try:
                display.update(task, note=name)
                if display.disable:  # no terminal: a line each, as one takes minutes
                    log.logger.info("audit %d of %d: %s", number, len(subjects), name)
                row = running.audit(subject, pythons[subject.trainer])
            except PackcliError as error:
                failures.append(error)
            else:
                rows.append(row)
                for path in running.write(row, asked.out) if asked.out else []:
                    log.logger.info("%s", path)
            display.advance(task)
    return rows, failures


def _pythons(asked: Asked) -> dict[Trainer, Path]:
    """The interpreter of every trainer that has one."""
    given: dict[Trainer, Path] = {}
    for text in asked.python:
        name, found, path = text.partition("=")
        if not found:
            raise ConfigError(f"--python {text}: no `=`", "--python trl=envs/trl/bin/python")
        if name == "packcli":
            raise ConfigError(f"--python {text}: packcli is audited by the Python that runs it", "leave it out")
        given[_trainer(name)] = Path(path).absolute()
    found_at = {name: running.python_of(name, asked.envs.absolute(), given) for name in TRAINERS}
    return {name: path for name, path in found_at.items() if path is not None}


def _subjects(asked: Asked, pythons: dict[Trainer, Path]) -> list[Subject]:
    files = {_trainer(name): path for name, path in asked.files.items() if path is not None}
    named = [_trainer(name) for name in asked.trainers]
    for name in (*files, *named):
        if name not in pythons:
            raise MissingError(
                f"{name} is audited in an environment of its own, and `{asked.envs / name}` is not there",
                f"`packcli audit --install {name} --envs {asked.envs}` makes it; or --python {name}=PATH",
            )
    subjects = [_own(name, path) for name, path in files.items()]
    for name in named or ([] if files else TRAINERS):
        if name in pythons:
            subjects += trainers.references(name)
        else:
            log.logger.info("%s: no environment in %s; `packcli audit --install %s`", name, asked.envs, name)
    return subjects


def _own(trainer: Trainer, path: Path) -> Subject:
    text = yamlfile.read(path, f"configuration of {trainer}", "name a YAML file of the trainer")
    configuration = yamlfile.parse(text, str(path), "docs/audit.md")[0]
    if trainer != "packcli":
        whose.confirm(trainer, map(str, configuration), str(path), "--{}")
    return trainers.own(trainer, path.name, configuration)


def _trainer(name: str) -> Trainer:
    for known in TRAINERS:
        if name == known:
            return known
    raise ConfigError(f"no trainer `{name}` can be audited", f"one of {', '.join(TRAINERS)}")
