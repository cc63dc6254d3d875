"""What a task's YAML names by a plain word, because lm-eval has it in Python: `scorer` under `metadata`.

lm-eval's own functions score; here is what surrounds them where they do not work as they are. No name of a
function in a YAML is ever looked up: a word is an arm of a `match`.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from packcli.errors import MissingError
from packcli.eval import long_context
from packcli.eval.checkpoint import first_line
from packcli.eval.protocol import Task

if TYPE_CHECKING:
    from packcli.eval.rows import Row
    from packcli.eval.sandbox.sandbox import Sandbox

PUNKT = "punkt_tab"
"""NLTK's data on where sentences end."""

_NEED_PUNKT = {"length_constraints:number_sentences", "change_case:capital_word_frequency"}


@dataclass(frozen=True, slots=True)
class LeftOut:
    """Rows of a task that cannot be scored on this machine: by name, why, and what to do about it."""

    rows: tuple[str, ...]
    reason: str
    fix: str


def require(task: Task) -> None:
    """Raises MissingError where a package that the task's scorer needs is not there."""
    try:
        match task.facts.scorer:
            case "minerva_math":
                from lm_eval.tasks.minerva_math import utils  # noqa: F401
            case "ifeval":
                _ifeval()
            case "longbench":
                _longbench()
    except (ImportError, AssertionError) as error:
        extra = "longbench" if task.facts.scorer == "longbench" else "eval"
        raise MissingError(
            f"task `{task.name}` needs a package that is not there: {first_line(error)}",
            f"pip install 'packcli[{extra}]'",
        ) from error


def rows(task: Task, found: list[Row], bench_data: Path | None) -> tuple[list[Row], LeftOut | None]:
    """The rows of the test split as the scorer takes them, and those it cannot score."""
    match task.facts.scorer:
        case "minerva_math":
            from lm_eval.tasks.minerva_math import utils

            # What lm-eval's `process_docs` adds to a row.
            def answer(row: Row) -> str:
                boxed = utils.remove_boxed(utils.last_boxed_only_string(row["solution"]))
                return str(utils.normalize_final_answer(boxed))

            return [row | {"answer": answer(row)} for row in found], None
        case "ifeval" if not splits_sentences(bench_data):
            without = [row for row in found if not _NEED_PUNKT & set(row["instruction_id_list"])]
            missing = [str(row["key"]) for row in found if _NEED_PUNKT & set(row["instruction_id_list"])]
            return without, LeftOut(
                tuple(missing),
                f"{len(missing)} of {len(found)} prompts are checked with NLTK's `punkt_tab`, which is not there",
                f"python -m nltk.downloader -d {nltk_data(bench_data)} {PUNKT}",
            )
        case _:
            return found, None


def settings(task: Task, sandbox: Sandbox | None, note: Callable[[int, int, str], None]) -> dict[str, Any]:
    """Entries of lm-eval's task configuration that are functions."""
    match task.facts.scorer:
        case "minerva_math":
            from lm_eval.tasks.minerva_math import utils

            return {"process_results": utils.process_results}
        case "ifeval":
            checks = _ifeval()
            flat = {"aggregation": checks.agg_inst_level_acc}  # these metrics are a list for each prompt
            metrics = [
                metric | (flat if metric["metric"].startswith("inst_level") else {})
                for metric in task.config["metric_list"]
            ]
            return {"process_results": checks.process_results, "metric_list": metrics}
        case "humaneval":
            assert sandbox is not None
            step = {"function": "custom", "filter_fn": _runner(sandbox, note)}
            return {
                "filter_list": [{"name": task.facts.filter, "filter": [step]}],
                "process_results": lambda _, results: {task.facts.metric: float(results[0]["passed"])},
            }
        case "long_context":
            return {
                "process_results": lambda row, results: {
                    task.facts.metric: long_context.score(results[0], row["answers"])
                }
            }
        case "longbench":
            return {"process_results": _longbench()[task.facts.metric]}
        case None:
            return {}


def extracted(task: Task, filtered: Any) -> str | None:
    """What was taken for the answer, for people to read; None where nothing was found.

    `filtered` is what lm-eval's filters left of a response.
    """
    match task.facts.scorer:
        case "minerva_math":
            from lm_eval.tasks.minerva_math import utils

            answer: str = utils.get_unnormalized_answer(filtered)
            return None if answer == "[invalidanswer]" else answer
        case "humaneval":
            return "passed" if filtered["passed"] else f"{filtered['why']}: {filtered['detail']}"
        case _:
            # What lm-eval's regex filter returns where it finds nothing.
            return None if filtered == "[invalid]" else str(filtered)


def _runner(sandbox: Sandbox, note: Callable[[int, int, str], None]) -> Callable[..., list[dict[str, Any]]]:
    """A filter of lm-eval's, which sees all rows at once: each first response with the tests of its row, run.

    No `partial`: lm-eval makes deep copies of its configuration, which would take the arguments along.
    """

    def run(responses: Sequence[list[str]], docs: Sequence[Row]) -> list[dict[str, Any]]:
        programs = [_program(doc, answers[0]) for doc, answers in zip(docs, responses, strict=True)]
        outcomes = sandbox.run_all(programs, note=note)
        return [{"passed": outcome.passed, "why": outcome.why, "detail": outcome.detail} for outcome in outcomes]

    return run


def _program(row: Row, answer: str) -> str:
    """As https://github.com/openai/human-eval/blob/12d15a0314d6/human_eval/execution.py puts it together."""
    return f"{row['prompt']}{answer}\n{row['test']}\ncheck({row['entry_point']})"


@functools.cache
def _ifeval() -> Any:
    """lm-eval's checks. Importing them downloads `punkt_tab` and says so, whether or not that worked."""
    import langdetect
    import nltk

    # Else the same text is found to be in another language once in a while.
    langdetect.DetectorFactory.seed = 0
    with _replaced(nltk, "download", lambda *_, **__: False):
        from lm_eval.tasks.ifeval import utils
    return utils


def nltk_data(bench_data: Path | None) -> Path:
    """The directory where NLTK's data belongs; one of those it is looked for in."""
    return bench_data / "nltk_data" if bench_data else Path("~/nltk_data")


def splits_sentences(bench_data: Path | None) -> bool:
    """Whether what lm-eval does with `punkt_tab` works; it may lie in `nltk_data` below the benchmark data."""
    _ifeval()
    import nltk
    from lm_eval.tasks.ifeval import instructions_util

    if bench_data is not None and str(bench_data / "nltk_data") not in nltk.data.path:
        nltk.data.path.append(str(bench_data / "nltk_data"))
    try:
        num_words = len(nltk.word_tokenize("It RAINS."))
        return bool(instructions_util.count_sentences("It rains. It pours.") == 2 and num_words == 3)
    except Exception:  # Absent, cut short or in another format: each is an error of another class.
        return False


@functools.cache
def _longbench() -> dict[str, Callable[..., dict[str, float]]]:
    """lm-eval's scores of LongBench's English subsets, by metric. It imports what Chinese ones need."""
    import difflib
    import sys

    from fuzzywuzzy import fuzz
    from lm_eval.tasks.longbench import metrics

    # Its ratio is another one where python-Levenshtein happens to be installed.
    fuzz.SequenceMatcher = difflib.SequenceMatcher
    # rouge recurses once a word, and lm-eval takes the error which that is in a long sentence for a score of 0.
    sys.setrecursionlimit(max(sys.getrecursionlimit(), 20_000))
    return {
        "qa_f1_score": metrics.get_qa_f1_score,
        "rouge_score": metrics.get_rouge_score,
        "classification_score": metrics.get_classification_score,
        "count_score": metrics.get_count_score,
        "retrieval_score": metrics.get_retrieval_score,
        "code_sim_score": metrics.get_code_sim_score,
    }


@contextlib.contextmanager
def _replaced(module: Any, name: str, value: Any) -> Iterator[None]:
    before = getattr(module, name)
    setattr(module, name, value)
    try:
        yield
    finally:
        setattr(module, name, before)
