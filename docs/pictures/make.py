"""Makes the pictures of docs/arms.md: made-up conversations, laid out by packcli."""

from __future__ import annotations

from pathlib import Path

from packcli.config import ARMS, ArmSpec
from packcli.data import draw, sample

MAX_LENGTH = 512
MICRO_BATCH = 4
TURNS = [
    [(40, 160), (30, 90)],
    [(30, 30)],
    [(90, 240), (60, 200), (40, 110)],  # longer than a row
    [(20, 120)],
    [(60, 70), (20, 60)],
    [(30, 400)],
    [(25, 45)],
    [(50, 110), (30, 70), (20, 40)],
    [(15, 75)],
    [(100, 150)],
    [(35, 25), (20, 30)],
    [(40, 200)],
]
"""Of each conversation (tokens asked, tokens answered), turn by turn."""
BESIDE = {
    "padding": "best_fit",
    "padding_free": "padding",
    "sorted": "padding",
    "random": "padding",
    "greedy": "padding",
    "best_fit": "greedy",
    "longalign": "best_fit",
    "padding_released": "padding",
    "random_released": "random",
    "greedy_released": "greedy",
}
"""Each built-in arm, and the one it is drawn beside."""


def conversation(turns: list[tuple[int, int]]) -> sample.Document:
    """One of these lengths, supervised where it answers."""
    spans, end = list[tuple[int, int]](), 0
    for asked, answered in turns:
        spans.append((end + asked, end + asked + answered))
        end = spans[-1][1]
    return sample.Document(length=end, supervised=tuple(spans))


def pictures() -> dict[str, str]:
    """File name to SVG text, one for each built-in arm."""
    documents = [conversation(turns) for turns in TURNS]
    note = f"Micro-batches of {MICRO_BATCH} rows. Made-up conversations."
    found = {}
    for name, other in BESIDE.items():
        arms = {one: ArmSpec.model_validate(ARMS[one]) for one in (other, name)}
        panels = sample.panels(documents, arms, MAX_LENGTH, MICRO_BATCH)
        title = f"{name}, beside {other}"
        found[f"{name}.svg"] = draw.picture(documents, panels, MAX_LENGTH, title, note)
    return found


if __name__ == "__main__":
    for file, text in pictures().items():
        (Path(__file__).parent / file).write_text(text, encoding="utf-8")
