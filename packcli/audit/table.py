"""Findings as one table: a question a line, a trainer's configuration a column."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from packcli.audit.questions import QUESTIONS
from packcli.audit.run import Audited

SAID = {
    "isolated": "documents of a row do not see each other",
    "as_alone": "a document in a row computes what it computes alone",
    "gradient_as_alone": "a step's gradient is that of its documents one by one",
    "boundaries": "no token is trained as another document's continuation",
    "shifted_by_one": "each trained token is predicted from the one before it",
    "answers_trained": "every word of an answer is trained",
    "stops_trained": "every answer's stop token is trained",
    "prompts_untrained": "nothing of a prompt is trained",
    "fitting_once": "each token of a document that fits is seen once an epoch",
    "fitting_whole": "a document that fits is not cut",
    "long_kept": "no token of an over-long document is lost",
    "weights_equal": "all trained tokens of a step count the same",
    "mean_taken": "their weights sum to 1, in a partial step too",
    "micro_batches": "micro-batch and accumulation change nothing",
    "ranks": "on two ranks tokens count the same",
    "ranks_once": "two ranks see each fitting token once an epoch",
    "loss_reported": "the loss it reports is the true one",
    "resume_exact": "a resumed run repeats and skips nothing",
    "same_seed": "the same seed gives the same steps",
}
_MARKS = {"yes": "yes", "no": "NO", "not seen": "-"}


def document(rows: Sequence[Audited]) -> dict[str, Any]:
    """What `--json` prints."""
    return {"questions": SAID, "rows": [row.record() for row in rows]}


def drawn(rows: Sequence[Audited]) -> Any:
    """For a terminal."""
    from rich.table import Table

    table = Table("", *(_head(row) for row in rows), title="Read off each step's gradient; no: see below")
    for line in _lines(rows):
        table.add_row(*line)
    return table


def markdown(rows: Sequence[Audited]) -> str:
    cells = [["", *(_head(row).replace("\n", "<br>") for row in rows)], ["---"] * (len(rows) + 1), *_lines(rows)]
    return "\n".join(f"| {' | '.join(line)} |" for line in cells)


def warnings(rows: Sequence[Audited]) -> list[str]:
    """What to know before the answers: keys that its trainer made nothing of, which a slip of a letter may be."""
    return [
        f"{_head(row).replace(chr(10), ' ')}: NOT audited, as its trainer has no use for them: "
        f"{', '.join(row.not_carried)}. What follows is of the other keys"
        for row in rows
        if row.not_carried
    ]


def evidence(rows: Sequence[Audited]) -> list[str]:
    """What was seen behind every `no` and every question without an answer, and what the audit set itself."""
    said = []
    for row in rows:
        head = _head(row).replace("\n", " ")
        other = [finding for finding in row.findings if finding.answer != "yes"]
        said += [f"{head}: {SAID[one.question]}: {one.answer}. {one.evidence}" for one in other]
        if row.subject.replaced:
            said.append(f"{head}: set by the audit: {', '.join(row.subject.replaced)}")
    return said


def _head(row: Audited) -> str:
    return f"{row.subject.trainer} {row.versions[row.subject.trainer]}\n{row.subject.name}"


def _lines(rows: Sequence[Audited]) -> list[list[str]]:
    answers = [{finding.question: finding.answer for finding in row.findings} for row in rows]
    names = [question.__name__ for question in QUESTIONS]
    return [[SAID[name], *(_MARKS[one[name]] for one in answers)] for name in names]
