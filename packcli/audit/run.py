"""Run an audit: each trainer in its own environment, one process a subject, and what was found."""

from __future__ import annotations

import contextlib
import json
import os
import re
import signal
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import orjson

from packcli.audit import bundle, questions, trainers
from packcli.audit.questions import Finding
from packcli.audit.trainers import Subject, Trainer
from packcli.errors import ConfigError, MissingError, RunError
from packcli.files import atomic_write
from packcli.log import is_secret, logger

LIMIT_S = 900.0
"""Of one process; a subject takes some 20 to 60 s on one core."""
_LEAVE_S = 5.0
"""What a trainer that is stopped may take to stop its ranks; then it is killed, and they with it."""
_NEEDS = {
    "isolated": ("base", "wide", "narrow"),
    "as_alone": ("base", "wide", "narrow"),
    "micro_batches": ("base", "wide", "narrow"),
    "resume_exact": ("base", "stopped", "resumed"),
    "same_seed": ("base", "again"),
    "ranks": ("ranks",),
    "ranks_once": ("ranks",),
}
_OTHERS = re.compile("WANDB|^HF_")
"""Variables of trackers and of the hub, which an audit does without."""
_REQUIREMENTS = Path(__file__).parent / "environments"


@dataclass(frozen=True, slots=True)
class Audited:
    """A subject's row. versions: of its packages; not_carried: keys it was given and its driver has no use for."""

    subject: Subject
    versions: dict[str, str]
    findings: list[Finding]
    not_carried: tuple[str, ...]

    def record(self) -> dict[str, Any]:
        return {
            "trainer": self.subject.trainer,
            "name": self.subject.name,
            "configuration": self.subject.configuration,
            "replaced": list(self.subject.replaced),
            "not_carried": list(self.not_carried),
            "versions": self.versions,
            "findings": [asdict(finding) for finding in self.findings],
        }


def python_of(trainer: Trainer, envs: Path, given: Mapping[Trainer, Path]) -> Path | None:
    """The interpreter of a trainer's environment; None: there is none.

    Raises:
        ConfigError: one that was named is not there.
    """
    if trainer == "packcli":
        return Path(sys.executable)
    if trainer in given:
        if not (given[trainer].is_file() and os.access(given[trainer], os.X_OK)):
            cause = f"`{given[trainer]}` is no program"
            raise ConfigError(cause, f"--python {trainer}=PATH names an interpreter, as in {trainer}/bin/python")
        return given[trainer]
    found = envs / trainer / "bin" / "python"
    return found if found.exists() else None


def install(trainer: Trainer, envs: Path) -> None:
    """Make `envs`/TRAINER with pip, at the versions of `environments/TRAINER.txt`.

    Raises:
        MissingError: pip could not; what it said last.
    """
    home, files = envs / trainer, sorted(_REQUIREMENTS.glob(f"{trainer}*.txt"))
    if not files:
        raise ConfigError(f"no environment is known for `{trainer}`", f"one of {', '.join(trainers.TRAINERS[1:])}")
    steps = [[sys.executable, "-m", "venv", str(home)]]
    for file in files:  # TRAINER.txt, then TRAINER.without-dependencies.txt
        bare = ["--no-deps"] if "without-dependencies" in file.name else []
        steps.append([str(home / "bin" / "python"), "-m", "pip", "install", *bare, "-r", str(file)])
    for command in steps:
        logger.info("%s", " ".join(command))
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode:
            last = (done.stderr.strip() or done.stdout.strip()).splitlines()[-1:]
            raise MissingError(f"{trainer}: {' '.join(last)}", f"try by hand: {' '.join(command)}")


def audit(subject: Subject, python: Path) -> Audited:
    """Train the crafted data with it, several times over, and answer every question.

    Raises:
        RunError: the trainer could not be run at all; what it said.
    """
    alone, together = trainers.jobs(subject)
    with tempfile.TemporaryDirectory(prefix="packcli-audit-", ignore_cleanup_errors=True) as scratch:
        work = Path(scratch)
        (work / "run.py").write_text(bundle.runner(subject.trainer))
        environment = _environment(subject.trainer, work)
        recorded = _perform(python, 1, alone, work, environment)
        if failed := recorded["runs"]["base"]["failed"]:
            cause = f"{subject.trainer} {subject.name}: {failed}"
            raise RunError(cause, "correct its configuration, or name another")
        try:
            recorded["runs"] |= _perform(python, 2, together, work, environment)["runs"]
        except RunError as error:
            recorded["runs"]["ranks"] = {"failed": error.cause, "steps": [], "losses": []}
    found = questions.answered(recorded["runs"])
    return Audited(subject, recorded["versions"], found, tuple(recorded.get("not_carried", ())))


def _perform(python: Path, ranks: int, job: dict[str, Any], work: Path, environment: dict[str, str]) -> Any:
    (work / "asked.json").write_text(json.dumps(job))
    (work / "work").mkdir(exist_ok=True)
    (work / "tmp").mkdir(exist_ok=True)
    command = [str(python), "run.py", "asked.json", "work", "out.json", str(ranks)]
    done = _ended(command, work, environment)
    if done.returncode or not (work / "out.json").exists():
        errors = [line for line in done.stderr.splitlines() if re.match(r"^\S*(Error|Exception)\b.*:", line)]
        last = (errors or done.stderr.strip().splitlines() or ["nothing"])[0 if errors else -1]
        raise RunError(f"it ended with {done.returncode}: {last[:300]}", "`pip check` its environment")
    recorded = orjson.loads((work / "out.json").read_bytes())
    (work / "out.json").unlink()
    return recorded


def _ended(command: list[str], work: Path, environment: dict[str, str]) -> subprocess.CompletedProcess[str]:
    """Run a trainer to its end; it outlives neither this call nor this process, however that ends.

    Raises:
        RunError: it takes too long.
    """
    with subprocess.Popen(
        command,
        cwd=work,
        env=environment,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,  # Ctrl-C is for packcli, which stops it
    ) as process:
        try:
            said, complained = process.communicate(timeout=LIMIT_S)
        except subprocess.TimeoutExpired:
            raise RunError(f"no end after {LIMIT_S:,.0f} s", "") from None
        finally:
            _stop(process)
    return subprocess.CompletedProcess(command, process.returncode, said, complained)


def _stop(process: subprocess.Popen[str]) -> None:
    """End it, where it has not ended by itself, and all that it started."""
    try:
        if process.poll() is None:
            process.terminate()  # torch's agent sees its ranks out
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(_LEAVE_S)
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def _environment(trainer: Trainer, work: Path) -> dict[str, str]:
    """Offline, on the CPU, without the user's own tokens and trackers.

    A trainer's temporary files go where they are deleted with all the rest. Packages beside packcli are on the
    path for its own row alone: another trainer would run with them in place of its own.
    """
    kept = {key: value for key, value in os.environ.items() if not (is_secret(key) or _OTHERS.search(key))}
    here = {
        "HF_HUB_OFFLINE": "1",
        "HF_DATASETS_OFFLINE": "1",
        "CUDA_VISIBLE_DEVICES": "",
        "OMP_NUM_THREADS": "1",
    }
    own = {"PACKCLI_AUDIT_PARENT": str(os.getpid()), "TMPDIR": str(work / "tmp")}
    if trainer == "packcli":
        own["PYTHONPATH"] = str(Path(__file__).parents[2])
    return {**kept, **here, **own, "TOKENIZERS_PARALLELISM": "false"}


def write(audited: Audited, directory: Path) -> list[Path]:
    """`findings.json` of a row and one script for each "no"; the paths."""
    slug = re.sub(r"\W+", "_", f"{audited.subject.trainer} {audited.subject.name}").strip("_")
    home = directory / slug
    home.mkdir(parents=True, exist_ok=True)
    paths = [home / "findings.json"]
    with atomic_write(paths[0]) as file:
        file.write(orjson.dumps(audited.record(), option=orjson.OPT_INDENT_2))
    alone, together = trainers.jobs(audited.subject)
    for finding in audited.findings:
        if finding.answer == "no":
            needed = _NEEDS.get(finding.question, ("base",))
            job = {**alone, "runs": [run for run in (*alone["runs"], *together["runs"]) if run["name"] in needed]}
            paths.append(home / f"{finding.question}.py")
            with atomic_write(paths[-1]) as file:
                file.write(bundle.reproducer(audited.subject.trainer, finding, job, audited.versions).encode())
    return paths
