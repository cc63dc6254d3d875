"""One Python file that audits a trainer, or reproduces one finding, where only that trainer is installed."""

from __future__ import annotations

import inspect
import json
import re
from pathlib import Path
from typing import Any

from packcli import processes
from packcli.audit.questions import QUESTIONS, Finding

_HERE = Path(__file__).parent
_OWN_IMPORT = re.compile(r"^from packcli\.audit\.\w+ import (\([^)]*\)|[^\n(]*)\n", re.MULTILINE)
_FUTURE = re.compile(r"^from __future__ import annotations\n", re.MULTILINE)
_DOCSTRING = re.compile(r'\A""".*?"""\n', re.DOTALL)
_ALL = re.compile(r"^__all__ = .*\n", re.MULTILINE)

_HEAD = '''"""{asked}

Found by the audit, in all of its runs: {found}
With {versions}
and {configuration}

    {launch} FILE

Crafted data and a tiny Llama with random weights, on a CPU; nothing is downloaded. What is run is at the end.
"""

'''
# Before all slow imports. Ranks lie in sessions of their own, so only their parent's death can take them along.
_GUARD = """
import ctypes
import os
import signal
import sys

PR_SET_PDEATHSIG = {constant}


{guard}

if __name__ == "__main__":
    die_with_parent(int(os.environ["PACKCLI_AUDIT_PARENT"]))
    os.environ["PACKCLI_AUDIT_PARENT"] = str(os.getpid())
    if "RANK" not in os.environ and sys.argv[4] != "1":
        from torch.distributed.run import main

        main(["--standalone", "--nproc-per-node", sys.argv[4], *sys.argv])
        sys.exit()

"""
_RUN = """

if __name__ == "__main__":
    import json

    job = json.loads(Path(sys.argv[1]).read_text())
    recorded = perform(job, Path(sys.argv[2]), drive, PACKAGES)
    if int(os.environ.get("RANK", "0")) == 0:
        Path(sys.argv[3]).write_text(json.dumps(recorded))
"""
_REPRODUCE = """

import json

JOB = json.loads(r'''
{job}
''')

if __name__ == "__main__":
    import sys
    import tempfile

    with tempfile.TemporaryDirectory() as scratch:
        recorded = perform(JOB, Path(scratch), drive, PACKAGES)
    finding = {question}(recorded["runs"])
    if int(os.environ.get("RANK", "0")) > 0:
        sys.exit()
    print(", ".join(f"{{name}} {{number}}" for name, number in recorded["versions"].items()))
    print(f"{{finding.question}}: {{finding.answer}}. {{finding.evidence}}")
"""


def runner(trainer: str) -> str:
    """`python FILE JOB.json WORK OUT.json RANKS` performs a job, and dies with PACKCLI_AUDIT_PARENT (a pid)."""
    guard = _GUARD.format(constant=processes.PR_SET_PDEATHSIG, guard=inspect.getsource(processes.die_with_parent))
    head, future, rest = _joined("crafted", "trace", f"drive_{trainer}", "perform").partition("annotations\n")
    return head + future + guard + rest + _RUN


def reproducer(trainer: str, finding: Finding, job: dict[str, Any], versions: dict[str, str]) -> str:
    """`python FILE` performs the job in the trainer's environment, and prints the finding."""
    question = next(one for one in QUESTIONS if one.__name__ == finding.question)
    ranks = [run["name"] for run in job["runs"]] == ["ranks"]
    launch = "python -m torch.distributed.run --standalone --nproc-per-node 2" if ranks else "python"
    head = _HEAD.format(
        asked=question.__doc__,
        found=f"{finding.answer}. {finding.evidence}",
        versions=", ".join(f"{name} {number}" for name, number in versions.items()),
        launch=launch,
        configuration=json.dumps(job["configuration"]),
    )
    body = _joined("crafted", "trace", f"drive_{trainer}", "perform", "questions")
    # In JSON an apostrophe stands in strings only; written like this it cannot end Python's own.
    text = json.dumps(job, indent=1).replace("'", "\\u0027")
    return head + body + _REPRODUCE.format(job=text, question=finding.question)


def _joined(*modules: str) -> str:
    """Sources one after another, without what holds them together as modules."""
    parts = ["from __future__ import annotations\n"]
    for name in modules:
        text = (_HERE / f"{name}.py").read_text(encoding="utf-8")
        heading = f"\n\n# {name} {'-' * (100 - len(name))}\n\n"
        for pattern in (_DOCSTRING, _FUTURE, _OWN_IMPORT, _ALL):
            text = pattern.sub("", text)
        parts.append(heading + text.strip("\n") + "\n")
    return "".join(parts)
