"""What a report holds: its JSON is the contract of `packcli report --format json`.

Scores, averages and differences are fractions of 1 (tables show them times 100); a missing number is null.
"""

from __future__ import annotations

from packcli.config import Spec
from packcli.store import State

Interval = tuple[float, float]

SIGNIFICANT = 0.05
"""A difference is shown where its p-value, after Holm's correction over the report, is below this."""


class Train(Spec):
    """A finished training. `tokens`, `slots`, `supervised` and `documents` (that start in its rows) are of the
    whole run; `efficiency` is the ledger's.

    `mfu` is null where the peak of the device is unknown, as on CPUs. `own_validation`: its validation loss is of
    rows that were held out after packing (`validation_after_packing`), and compares with no other arm's.
    """

    steps: int | None
    wall_s: float | None
    cpu_s: float | None
    useful_tokens_per_s: float | None
    padded_tokens_per_s: float | None
    mfu: float | None
    efficiency: float | None
    final_loss: float | None
    validation_loss: float | None
    own_validation: bool = False
    tokens: int | None
    slots: int | None
    supervised: int | None
    documents: int | None
    random_weights: bool
    device: str | None
    processes: int | None
    threads: int | None


class Score(Spec):
    """One task of one model. `stderr` is over the test items; null for a single item.

    `partial`: only `n` of the task's `n_total` items were scored, as `eval.limit` asks or, `left_out`, because the
    machine could not score the others. `protocol`: scores compare where it is equal.
    """

    metric: str
    score: float
    stderr: float | None
    n: int
    n_total: int
    partial: bool
    left_out: bool
    version: int | str | None
    health: dict[str, float]
    protocol: str


class Probed(Spec):
    """What the probes found in a checkpoint: nats are per supervised token, means over `n` documents.

    `crossing`: by the arm whose rows were probed, the share of attention that goes to other documents of the row,
    without what goes to its first token, mean over layers; `even`: that share, were attention spread evenly.
    `alone`: a document's loss; `behind`: what another before it, seen without a mask, adds. `mask`: what a
    document mask changes in the boundary experiment, null where it was not crossed.
    """

    crossing: dict[str, float | None]
    even: dict[str, float | None]
    alone: float
    behind: dict[str, float]
    mask: float | None
    n: int


class Failure(Spec):
    """Why a stage of the cell failed: `stage` as a user would say it, such as `eval gsm8k`."""

    stage: str
    cause: str
    fix: str


class ItemDifference(Spec):
    """Difference to the baseline on the same `n_items` test items of the same `n_seeds` pairs of models.

    `low`, `high`: 95% over items (Student's t), null where all items tell the same. It holds for these models: of
    other seeds it says nothing.
    """

    delta: float
    low: float | None
    high: float | None
    n_items: int
    n_seeds: int


class Row(Spec):
    """One cell. `average` is the unweighted mean over its benchmarks, null when one is missing or left out rows.

    `tasks`: the state of each task, `failed` also where a stage before it failed. `ledger`: one epoch, in the
    words of `packcli prepare`. `ids`: the stage directories that hold all this. `physics`: what of the finished
    training cannot be true (`report/physics.py`); empty where nothing was found. `damaged`: what is wrong with
    files that results were to be read from; such a stage counts as failed.
    """

    labels: dict[str, str]
    state: State
    train: Train | None
    eval: dict[str, Score]
    average: float | None
    cell: str
    ids: dict[str, str]
    train_state: State
    tasks: dict[str, State]
    failures: tuple[Failure, ...]
    ledger: dict[str, int | float] | None
    probes: Probed | None
    physics: tuple[str, ...]
    damaged: tuple[str, ...]


class TrainMeans(Spec):
    """Means over the `n` cells of a group that finished training; each over those that have the number.

    `validation_loss_stderr` is over seeds, null for one. `device`: null where the cells used unlike ones.
    """

    n: int
    steps: float | None
    wall_s: float | None
    cpu_s: float | None
    useful_tokens_per_s: float | None
    padded_tokens_per_s: float | None
    mfu: float | None
    efficiency: float | None
    final_loss: float | None
    validation_loss: float | None
    validation_loss_stderr: float | None
    own_validation: bool = False
    tokens: float | None
    slots: float | None
    documents: float | None
    device: str | None


class PooledScore(Spec):
    """One task over seeds. `stderr` is over seeds, null for one seed; `stderr_items` that of one run over the
    test items (root mean square over seeds). `n` and `n_total` are test items, `n_seeds` models. `protocols`: one
    where all were scored alike."""

    metric: str
    score: float
    stderr: float | None
    stderr_items: float | None
    n_seeds: int
    n: int
    n_total: int
    partial: bool
    protocols: tuple[str, ...]


class Speedup(Spec):
    """Mean time of the baseline over this arm's, over the `n_pairs` seeds that both have.

    `cpu_range`, `wall_range`: the lowest and the highest of the ratio seed by seed. `cpu_per_slot`,
    `wall_per_slot`: the same of the time a slot takes; `cpu` and `wall` are these times how many fewer slots.
    """

    cpu: float | None
    cpu_range: Interval | None
    wall: float | None
    wall_range: Interval | None
    cpu_per_slot: float | None
    wall_per_slot: float | None
    n_pairs: int


class Group(Spec):
    """Cells whose labels differ in `seed` only; `labels` leaves it out.

    `n_seeds` of its `n_cells` have an average: `average` and `stderr` are over those. `delta` is the mean
    difference to the baseline arm over the `n_pairs` seeds both have; null without any, and for the baseline
    itself. `interval` (95%, Student's t) is of this difference alone, and `p` its p-value; `p_holm` is corrected
    over all differences of the report (Holm), and `detectable` the smallest effect that such a report finds in 80%
    of repetitions, corrected as Holm's first step is. All four are null for fewer than two pairs, and where the
    pairs do not scatter at all. `items`: the difference of each task over its test items; `average_items`: of
    their unweighted mean, over the pairs that `delta` is of. `left_out`: by task, "n/N" of the scores that stand
    in no mean, because the machine could not score all rows. `probes`: of each seed that has them.
    """

    labels: dict[str, str]
    n_seeds: int
    average: float | None
    stderr: float | None
    delta: float | None
    interval: Interval | None
    n_cells: int
    n_pairs: int
    stderr_items: float | None
    detectable: float | None
    p: float | None
    p_holm: float | None
    states: dict[State, int]
    train_states: dict[State, int]
    task_states: dict[str, dict[State, int]]
    train: TrainMeans | None
    ledger: dict[str, float] | None
    eval: dict[str, PooledScore]
    left_out: dict[str, str]
    items: dict[str, ItemDifference]
    average_items: ItemDifference | None
    speedup: Speedup | None
    slot_ratio: float | None
    probes: tuple[Probed, ...]

    @property
    def arm(self) -> str:
        return self.labels.get("arm", "")

    @property
    def shown(self) -> bool:
        """Whether its difference to the baseline is."""
        return self.p_holm is not None and self.p_holm < SIGNIFICANT

    @property
    def setting(self) -> dict[str, str]:
        """All labels but the arm: what arms are compared within."""
        return {axis: value for axis, value in self.labels.items() if axis != "arm"}


class Report(Spec):
    sweep: str
    baseline: str | None
    rows: tuple[Row, ...]
    groups: tuple[Group, ...]
    verdict: str

    def settings(self) -> list[tuple[dict[str, str], list[Group]]]:
        """Groups by setting, both in the order of the sweep."""
        return by_setting(self.groups)

    def damaged(self) -> list[str]:
        """What is wrong with damaged files, each said once."""
        return list(dict.fromkeys(one for row in self.rows for one in row.damaged))


def by_setting(groups: tuple[Group, ...]) -> list[tuple[dict[str, str], list[Group]]]:
    found: dict[frozenset[tuple[str, str]], list[Group]] = {}
    for group in groups:
        found.setdefault(frozenset(group.setting.items()), []).append(group)
    return [(members[0].setting, members) for members in found.values()]
