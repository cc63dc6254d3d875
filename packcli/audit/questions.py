"""What is asked of a recorded trainer. Answers are read off traces; "no" is a fact about the run, no verdict.

Nothing of packcli is imported here: this file also runs inside another trainer's environment (`bundle.py`).
Each question is a function of the recorded runs by name (`perform.py`); pure.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

from packcli.audit.crafted import MAX_LENGTH, documents

Answer = Literal["yes", "no", "not seen"]
Runs = Mapping[str, Any]
EXACT = 1e-4
"""Relative distance within which two weights, or a reported loss and the true one, are the same."""


@dataclass(frozen=True)
class Finding:
    """question: a name of `QUESTIONS`; evidence: what was seen, in one line."""

    question: str
    answer: Answer
    evidence: str


def isolated(runs: Runs) -> Finding:
    """Changing the words of one document moves no other document of its row."""
    looks = [look for run in runs.values() for step in run["steps"] for look in step["looked"] if "others" in look]
    others, moved = (sum(look[key] for look in looks) for key in ("others", "moved"))
    if not others:
        return _found("isolated", not _steps(runs, "base"), "no row held two documents", empty="yes")
    by = max(look["by"] for look in looks)
    return _found("isolated", moved, f"{moved} of {others} tokens of other documents moved, at most by {by:.1e}")


def as_alone(runs: Runs) -> Finding:
    """A document's hidden states in a row are those it has when the model reads it alone."""
    looks = [look["alone"] for run in runs.values() for step in run["steps"] for look in step["looked"]]
    if not looks:
        return Finding("as_alone", "not seen", "no forward pass was recorded")
    return _found("as_alone", max(looks) > EXACT, f"relative distance at most {max(looks):.1e}")


def gradient_as_alone(runs: Runs) -> Finding:
    """A step's gradient, all parameters, is the weighted sum of its documents' own."""
    steps = _steps(runs, "base")
    if not steps or "apart" not in steps[0]:
        return Finding("gradient_as_alone", "not seen", "no step was recorded")
    apart = steps[0]["apart"]
    return _found("gradient_as_alone", apart > EXACT, f"step 1: relative distance {apart:.1e}")


def boundaries(runs: Runs) -> Finding:
    """No token is trained as the continuation of another document."""
    pairs = _pairs(runs, "base")
    crossing = [pair for pair in pairs if pair[2] != pair[0]]
    shown = "; ".join(f"{_name(d, p)} from {_name(fd, fp)}" for d, p, fd, fp, *_ in crossing[:2])
    return _asked(
        "boundaries",
        pairs,
        len(crossing),
        f"{len(crossing)} of {len(pairs)} trained tokens do" + (f": {shown}" if shown else ""),
    )


def shifted_by_one(runs: Runs) -> Finding:
    """Each trained token of a document is predicted from the token just before it."""
    pairs = [pair for pair in _pairs(runs, "base") if pair[2] == pair[0]]
    wrong = [pair for pair in pairs if pair[3] != pair[1] - 1]
    rest = sorted({token for step in _steps(runs, "base") for token in step["unexplained"]})
    shown = "; ".join(f"{_name(d, p)} from {_name(fd, fp)}" for d, p, fd, fp, *_ in wrong[:2])
    said = f"{len(wrong)} of {len(pairs)} are not" + (f": {shown}" if shown else "")
    said += f"; what trains {', '.join(rest[:3])} is not to be told" if rest else ""
    return _asked("shifted_by_one", pairs, len(wrong) + len(rest), said)


def stops_trained(runs: Runs) -> Finding:
    """The stop token of each answer is trained, in documents that fit a row."""
    return _kind_trained(runs, "stops_trained", "s", wanted=True)


def answers_trained(runs: Runs) -> Finding:
    """Every word of each answer is trained, in documents that fit a row."""
    return _kind_trained(runs, "answers_trained", "a", wanted=True)


def prompts_untrained(runs: Runs) -> Finding:
    """No token of a prompt, or of the template, is trained."""
    return _kind_trained(runs, "prompts_untrained", "p", wanted=False)


def _kind_trained(runs: Runs, question: str, kind: str, *, wanted: bool) -> Finding:
    trained = {(pair[0], pair[1]) for pair in _pairs(runs, "base")}
    asked = [
        (number, place)
        for number, document in enumerate(documents())
        if len(document.tokens) <= MAX_LENGTH or not wanted
        for place, letter in enumerate(document.kinds)
        if letter == kind
    ]
    wrong = [where for where in asked if (where in trained) != wanted]
    word = "untrained" if wanted else "trained"
    shown = f" (first: {_name(*wrong[0])})" if wrong else ""
    return _asked(question, trained, len(wrong), f"{len(wrong)} of {len(asked)} are {word}{shown}")


def fitting_once(runs: Runs) -> Finding:
    """Every token of a document that fits a row reaches the model once an epoch."""
    return _once(runs, "base", "fitting_once")


def _once(runs: Runs, run: str, question: str) -> Finding:
    seen = _seen(runs, run)
    lengths = [len(document.tokens) for document in documents()]
    fit = [(n, p) for n, length in enumerate(lengths) if length <= MAX_LENGTH for p in range(length)]
    lost, again = [w for w in fit if not seen[w]], [w for w in fit if seen[w] > 1]
    touched, whole = {n for n, _ in lost}, {n for n, _ in lost} - {n for n, p in fit if seen[(n, p)]}
    said = f"of {len(fit)} tokens {len(lost)} lost"
    said += f", from {len(touched)} documents, {len(whole)} of them whole" if lost else ""
    return _asked(question, seen, len(lost) + len(again), f"{said}, {len(again)} seen more than once")


def fitting_whole(runs: Runs) -> Finding:
    """A document that fits a row is not cut in two."""
    fit = {number for number, one in enumerate(documents()) if len(one.tokens) <= MAX_LENGTH}
    spans = Counter(piece[0] for step in _steps(runs, "base") for row in step["rows"] for piece in row[2])
    cut = [number for number in sorted(fit) if spans[number] > 1]
    return _asked("fitting_whole", spans, len(cut), f"{len(cut)} of {len(fit)} documents lie in pieces")


def long_kept(runs: Runs) -> Finding:
    """Of documents longer than a row no token is lost."""
    seen = _seen(runs, "base")
    long = {number: len(one.tokens) for number, one in enumerate(documents()) if len(one.tokens) > MAX_LENGTH}
    kept = {number: sum(1 for place in range(length) if seen[(number, place)]) for number, length in long.items()}
    cut = sum(long[number] - kept[number] for number in long if kept[number])
    gone = sum(long[number] for number in long if not kept[number])
    said = (
        f"of {sum(long.values())} tokens in {len(long)} documents: {cut} truncated, {gone} in documents left out"
    )
    return _asked("long_kept", seen, cut + gone, said)


def weights_equal(runs: Runs) -> Finding:
    """Every trained token of a step counts the same in its loss, however micro-batches split it."""
    spreads = []
    for step in _steps(runs, "base"):
        weights = _weights(step)
        spreads += [max(weights) / min(weights)] if weights else []
    said = f"heaviest over lightest token of a step: {max(spreads, default=0):.4f}"
    return _asked("weights_equal", spreads, max(spreads, default=1) > 1 + EXACT, said)


def mean_taken(runs: Runs) -> Finding:
    """The weights of a step's tokens sum to 1, in a last step of fewer micro-batches too."""
    steps = _steps(runs, "base")
    sums = [sum(pair[4] for pair in step["pairs"]) for step in steps]
    passes = [len({(row[0], row[1]) for row in step["rows"]}) for step in steps]
    wrong = sum(abs(total - 1) > EXACT for total in sums)
    partial = f"{passes[-1]} of {max(passes)} micro-batches" if steps else ""
    said = f"sums from {min(sums, default=0):.4f} to {max(sums, default=0):.4f}; the last step had {partial}"
    return _asked("mean_taken", sums, wrong, said)


def micro_batches(runs: Runs) -> Finding:
    """Steps of 2 x 2, 4 x 1 and 1 x 4 rows (micro-batch x accumulation) train the same tokens, weighted alike."""
    return _alike(runs, "micro_batches", ("wide", "narrow"))


def ranks(runs: Runs) -> Finding:
    """Every trained token of a step counts the same on two ranks, with a micro-batch of 2 each."""
    if not _steps(runs, "ranks"):
        return Finding("ranks", "not seen", _why(runs, "ranks"))
    steps = _steps(runs, "ranks")
    spreads = [max(w) / min(w) for step in steps if (w := _weights(step))]
    sums = [sum(pair[4] for pair in step["pairs"]) for step in steps]
    wrong = max(spreads, default=1) > 1 + EXACT or any(abs(total - 1) > EXACT for total in sums)
    said = f"two ranks: heaviest over lightest token of a step {max(spreads, default=0):.4f}"
    return _asked("ranks", sums, wrong, f"{said}, weights sum to {min(sums):.4f} to {max(sums):.4f}")


def ranks_once(runs: Runs) -> Finding:
    """Of two ranks, each token of a document that fits reaches exactly one, once an epoch."""
    if not _steps(runs, "ranks"):
        return Finding("ranks_once", "not seen", _why(runs, "ranks"))
    return _once(runs, "ranks", "ranks_once")


def loss_reported(runs: Runs) -> Finding:
    """The loss it logs for a step is that of the tokens it trained, with the weights it gave them."""
    steps, losses = _steps(runs, "base"), runs["base"]["losses"]
    if not steps or len(losses) < len(steps):
        return Finding("loss_reported", "not seen", f"{len(losses)} losses logged in {len(steps)} steps")
    true = [sum(pair[4] * pair[5] for pair in step["pairs"]) for step in steps]
    if not (trained := [k for k in range(len(steps)) if true[k]]):
        return Finding("loss_reported", "not seen", "no step trained a token")
    worst = max(trained, key=lambda k: abs(losses[k] - true[k]) / abs(true[k]))
    said = f"step {worst + 1}: logged {losses[worst]:.4f}, true {true[worst]:.4f}"
    return _found("loss_reported", abs(losses[worst] / true[worst] - 1) > 10 * EXACT, said)


def resume_exact(runs: Runs) -> Finding:
    """Resumed from a checkpoint, it trains what the uninterrupted run trains after that step."""
    whole, rest = _steps(runs, "base"), _steps(runs, "resumed")
    if not rest:
        return Finding("resume_exact", "not seen", _why(runs, "resumed"))
    after = runs["resumed"]["after"]
    before, expected = Counter(_trained(whole[:after])), Counter(_trained(whole[after:]))
    got = Counter(_trained(rest))
    again, skipped = sum(((got - expected) & before).values()), sum((expected - got).values())
    same = _by_step(whole[after:]) == _by_step(rest)
    said = f"{again} tokens trained again, {skipped} skipped, of {sum(expected.values())}"
    return _found("resume_exact", not same, said + ("" if same else "; the steps differ"))


def same_seed(runs: Runs) -> Finding:
    """The same configuration run again trains the same tokens in each step."""
    if not _steps(runs, "again"):
        return Finding("same_seed", "not seen", _why(runs, "again"))
    one, two = _by_step(_steps(runs, "base")), _by_step(_steps(runs, "again"))
    different = sum(a != b for a, b in zip(one, two, strict=False)) + abs(len(one) - len(two))
    return _found("same_seed", different, f"{different} of {len(one)} steps differ")


QUESTIONS: tuple[Callable[[Runs], Finding], ...] = (
    isolated, as_alone, gradient_as_alone, boundaries, shifted_by_one, answers_trained, stops_trained,
    prompts_untrained, fitting_once, fitting_whole, long_kept, weights_equal, mean_taken, micro_batches,
    ranks, ranks_once, loss_reported, resume_exact, same_seed,
)  # fmt: skip
"""In the order of the table."""


def answered(runs: Runs) -> list[Finding]:
    return [question(runs) for question in QUESTIONS]


# Reading records ---------------------------------------------------------------------------------------------


def _steps(runs: Runs, name: str) -> list[Any]:
    return runs[name]["steps"] if name in runs and not runs[name]["failed"] else []


def _why(runs: Runs, name: str) -> str:
    failed = runs[name]["failed"] if name in runs else "not run"
    return str(failed or "no step was recorded")


def _pairs(runs: Runs, name: str) -> list[Any]:
    return [pair for step in _steps(runs, name) for pair in step["pairs"]]


def _trained(steps: list[Any]) -> list[tuple[int, int]]:
    return [(pair[0], pair[1]) for step in steps for pair in step["pairs"]]


def _by_step(steps: list[Any]) -> list[list[tuple[int, int]]]:
    return [sorted(_trained([step])) for step in steps]


def _seen(runs: Runs, name: str) -> Counter[tuple[int, int]]:
    """How often each (document, place) reached the model in an epoch."""
    return Counter(
        (document, first + offset)
        for step in _steps(runs, name)
        for row in step["rows"]
        for document, first, length in row[2]
        for offset in range(length)
    )


def _alike(runs: Runs, question: str, others: tuple[str, ...]) -> Finding:
    base = _weighted(_steps(runs, "base"))
    found = {name: _weighted(_steps(runs, name)) for name in others if _steps(runs, name)}
    if not base or not found:
        return Finding(question, "not seen", _why(runs, others[0]))
    worst, where = 0.0, "every step alike"
    for name, steps in found.items():
        for number, (one, two) in enumerate(zip(base, steps, strict=False)):
            if one.keys() != two.keys():
                return Finding(question, "no", f"`{name}`: step {number + 1} trains other tokens")
            apart = max((abs(two[key] / one[key] - 1) for key in one), default=0.0)
            if apart > worst:
                worst, where = apart, f"`{name}`, step {number + 1}"
        if len(base) != len(steps):
            return Finding(question, "no", f"`{name}`: {len(steps)} steps in place of {len(base)}")
    return _found(question, worst > EXACT, f"a token's weight differs by at most {worst:.1e} ({where})")


def _weighted(steps: list[Any]) -> list[dict[tuple[int, int], float]]:
    return [{(pair[0], pair[1]): pair[4] for pair in step["pairs"] if _is_word(pair)} for step in steps]


def _weights(step: Any) -> list[float]:
    """Of words, each of which stands once: a template's tokens differ by context only, and are less exact."""
    return [abs(pair[4]) for pair in step["pairs"] if _is_word(pair)]


def _is_word(pair: Any) -> bool:
    token: str = documents()[pair[0]].tokens[pair[1]]
    return token.startswith("d")


def _name(document: int, place: int) -> str:
    made = documents()
    return f"`{made[document].tokens[place]}` of document {document}" if document >= 0 else "padding"


def _found(question: str, wrong: object, evidence: str, empty: Answer = "no") -> Finding:
    if empty == "yes":  # nothing there that could go wrong, unless nothing was recorded
        return Finding(question, "not seen" if wrong else "yes", evidence)
    return Finding(question, "no" if wrong else "yes", evidence)


def _asked(question: str, seen: object, wrong: object, evidence: str) -> Finding:
    """Nothing seen is no answer."""
    if not seen:
        return Finding(question, "not seen", "no step was recorded")
    return Finding(question, "no" if wrong else "yes", evidence)
