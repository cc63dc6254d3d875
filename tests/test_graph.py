"""What a cluster is asked to do: work that is sent twice, forgotten, or starts before its inputs are there."""

from __future__ import annotations

import copy
from collections.abc import Iterable
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from test_plan import BASE, SWEEP, made

from packcli.launch.graph import Array, Element, Known, Need, Stage, graph, names
from packcli.launch.profile import Profile
from packcli.plan import Plan


def profile(**keys: Any) -> Profile:
    return Profile.model_validate({"name": "site", "partition": "gpu", "prepare_parts": 1, **keys})


def planned(*, base: bool = False, **matrix: list[Any]) -> Plan:
    """A plan with a training for each point of `matrix`, dots of keys written as `__`."""
    document = copy.deepcopy(SWEEP)
    document["matrix"] = {"arm": ["padding"], "seed": [0]}
    document["matrix"].update({key.replace("__", "."): values for key, values in matrix.items()})
    document["eval"] = {"tasks": ["tiny_copy", "gsm8k"]}
    if base:
        document["model"]["base"] = BASE
    return made(document)


def kinds(arrays: Iterable[Array]) -> list[tuple[str, int]]:
    """(kind, elements) of each array."""
    return [(array.job, len(array.elements)) for array in arrays]


def inputs(plan: Plan, stage: Stage) -> list[Stage]:
    """All that a stage reads."""
    found: list[Stage] = list(plan.inputs(*stage))
    return [*found, ("tokens", plan.trains[stage[1]].tokens)] if stage[0] == "train" else found


# Shape -------------------------------------------------------------------------------------------------


def test_each_stage_waits_for_what_it_reads() -> None:
    plan = planned(base=True)
    arrays = graph(plan, profile(), Known())
    assert kinds(arrays) == [("prepare", 2), ("base", 1), ("train", 1), ("eval", 1), ("report", 1)]
    prepare, base, train, score, report = arrays
    # The base has other data: it waits for its own token store, not for the cells'.
    place = {element.stages[0][1]: number for number, element in enumerate(prepare.elements)}
    [shared], [cell] = plan.shared, plan.cells
    of_base = Need(kind="afterok", array=0, element=place[plan.trains[shared].tokens])
    assert base.needs == (of_base,)
    own = Need(kind="afterok", array=0, element=place[cell.tokens])
    assert set(train.needs) == {own, Need(kind="afterok", array=1, element=0)}
    assert score.needs == (Need(kind="afterok", array=2, element=0),)
    assert report.needs == tuple(Need(kind="afterany", array=number) for number in range(4))
    assert [stage for array in (base, train) for stage in array.elements[0].stages] == [
        ("train", shared),
        ("train", cell.train),
    ]


def test_indexes_are_made_by_the_job_that_makes_their_tokens() -> None:
    plan = planned(arm=["padding", "greedy"], seed=[0, 1])
    [prepare] = [array for array in graph(plan, profile(), Known()) if array.job == "prepare"]
    [element] = prepare.elements
    assert element.stages == (*(("tokens", id_) for id_ in plan.tokens), *(("index", id_) for id_ in plan.indexes))
    assert len(element.stages) == 5


def test_a_thousand_cells_are_not_a_thousand_submissions() -> None:
    plan = planned(arm=["padding", "greedy"], seed=list(range(500)))
    arrays = graph(plan, profile(), Known())
    assert kinds(arrays) == [("prepare", 1), ("train", 1000), ("eval", 1000), ("report", 1)]


def test_trainings_on_another_number_of_nodes_are_another_array() -> None:
    """`train.nodes` enters no id, so the widths have to meet in different trainings."""
    plan = planned(train__lr=[0.1, 0.2, 0.3])
    trains = list(plan.trains)
    wide = plan.trains[trains[1]]
    wide = wide.model_copy(update={"train": wide.train.model_copy(update={"nodes": 2})})
    plan = plan.model_copy(update={"trains": {**plan.trains, trains[1]: wide}})
    arrays = graph(plan, profile(nodes=4), Known())
    shapes = [
        (array.job, array.nodes, [element.stages[0][1] for element in array.elements]) for array in arrays[1:3]
    ]
    assert shapes == [("train", 4, [trains[0], trains[2]]), ("train", 2, [trains[1]])]
    assert [array.nodes for array in arrays[3:]] == [1, 1, 1]
    assert [array.needs for array in arrays[3:5]] == [
        (Need(kind="aftercorr", array=1),),
        (Need(kind="afterok", array=2, element=0),),
    ]


def test_a_score_never_waits_for_the_training_of_another_cell() -> None:
    plan = planned(arm=["padding", "greedy"], seed=[0, 1, 2])
    _, train, score, _ = graph(plan, profile(), Known())
    assert score.needs == (Need(kind="aftercorr", array=train.number),)
    for trained, scored in zip(train.elements, score.elements, strict=True):
        assert trained.index == scored.index
        assert {plan.evals[id_].train for _, id_ in scored.stages} == {trained.stages[0][1]}
        assert len(scored.stages) == 2
        assert scored.name == trained.name


def test_trainings_that_wait_for_different_data_share_an_array() -> None:
    """Ten data sets are not ten arrays of trainings, and none waits for data that it does not read."""
    plan = planned(data__source=[f"{number}.jsonl" for number in range(10)])
    prepare, train, *_ = graph(plan, profile(), Known())
    assert (len(prepare.elements), train.needs) == (10, (Need(kind="aftercorr", array=0),))
    for element in train.elements:
        [(_, id_)] = element.stages
        assert ("tokens", plan.trains[id_].tokens) in prepare.at(element.index).stages


def test_an_array_is_no_longer_than_the_cluster_allows() -> None:
    plan = planned(seed=list(range(7)))
    arrays = graph(plan, profile(array_max=3), Known())
    assert kinds(arrays) == [
        ("prepare", 1), ("train", 3), ("train", 3), ("train", 1),
        ("eval", 3), ("eval", 3), ("eval", 1), ("report", 1),
    ]  # fmt: skip
    assert [array.needs[0].array for array in arrays[4:7]] == [1, 2, 3]
    trained = [stage for array in arrays[1:4] for element in array.elements for stage in element.stages]
    assert trained == [("train", id_) for id_ in plan.trains]


@pytest.mark.parametrize(("parts", "size", "expected"), [(5, 0, 5), ("auto", 4_100, 5), ("auto", 4_000, 4)])
def test_a_store_of_large_data_waits_for_all_of_its_parts(parts: Any, size: int, expected: int) -> None:
    plan = planned()
    [tokens] = plan.tokens
    asked = profile(prepare_parts=parts, part_bytes=1_000, array_max=3)
    arrays = graph(plan, asked, Known(source_bytes={tokens: size}))
    made_of = [array for array in arrays if array.job == "parts"]
    assert [element.part for array in made_of for element in array.elements] == [
        (number, expected) for number in range(expected)
    ]
    [prepare] = [array for array in arrays if array.job == "prepare"]
    assert prepare.needs == tuple(Need(kind="afterok", array=array.number) for array in made_of)
    assert len(made_of) == 2


def test_small_data_is_not_cut_into_parts() -> None:
    plan = planned()
    [tokens] = plan.tokens
    asked = profile(prepare_parts="auto", part_bytes=1_000)
    assert kinds(graph(plan, asked, Known(source_bytes={tokens: 999})))[0] == ("prepare", 1)
    # Only indexes are missing: there is nothing to cut.
    known = Known(done={("tokens", tokens)}, source_bytes={tokens: 10_000})
    assert kinds(graph(plan, asked, known))[0] == ("prepare", 1)


# What is there already ---------------------------------------------------------------------------------


def test_what_is_done_is_not_submitted() -> None:
    plan = planned(seed=[0, 1])
    assert graph(plan, profile(), Known(done=set(plan.stages()))) == ()
    missing: Stage = ("eval", list(plan.evals)[2])
    arrays = graph(plan, profile(), Known(done=set(plan.stages()) - {missing}))
    assert kinds(arrays) == [("eval", 1), ("report", 1)]
    assert (arrays[0].elements[0].stages, arrays[0].needs) == ((missing,), ())


def test_what_an_earlier_submission_does_is_waited_for_and_not_sent_again() -> None:
    plan = planned(seed=[0, 1])
    one, other = plan.trains
    store: Stage = ("tokens", next(iter(plan.tokens)))
    live = {store: "7_0", **{("index", id_): "7_0" for id_ in plan.indexes}, ("train", one): "8_3"}
    arrays = graph(plan, profile(), Known(live=live))
    assert kinds(arrays) == [("train", 1), ("eval", 1), ("eval", 1), ("report", 1)]
    train, own, awaited, report = arrays
    assert (train.elements[0].stages, train.needs) == (
        (("train", other),),
        (Need(kind="afterok", job="7", element=0),),
    )
    assert own.needs == (Need(kind="afterok", array=0, element=0),)
    assert awaited.needs == (Need(kind="afterok", job="8", element=3),)
    assert {plan.evals[id_].train for _, id_ in awaited.elements[0].stages} == {one}
    # The table has to wait for jobs of the earlier submission too: for their whole arrays.
    assert report.needs[:2] == (Need(kind="afterany", job="7"), Need(kind="afterany", job="8"))


def test_a_thousand_scores_of_live_trainings_are_not_a_thousand_submissions() -> None:
    plan = planned(seed=list(range(50)))
    known = Known(
        done={stage for stage in plan.stages() if stage[0] in ("tokens", "index")},
        live={("train", id_): f"{8 + number % 2}_{number}" for number, id_ in enumerate(plan.trains)},
    )
    arrays = graph(plan, profile(), known)
    assert kinds(arrays) == [("eval", 25), ("eval", 25), ("report", 1)]
    for array, job in zip(arrays, ("8", "9"), strict=False):
        assert array.needs == (Need(kind="aftercorr", job=job),)
        for element in array.elements:
            [id_] = {plan.evals[id_].train for _, id_ in element.stages}
            assert known.live["train", id_] == f"{job}_{element.index}"


def test_the_table_is_made_though_its_job_was_never_submitted() -> None:
    plan = planned()
    live: dict[Stage, str] = dict.fromkeys(plan.stages(), "7_0")
    [report] = graph(plan, profile(), Known(live=live))
    assert (report.job, report.needs) == ("report", (Need(kind="afterany", job="7"),))
    assert graph(plan, profile(), Known(live=live, has_report=True)) == ()


def test_a_training_waits_for_a_token_store_that_was_deleted_below_its_index() -> None:
    plan = planned()
    done: set[Stage] = {("index", id_) for id_ in plan.indexes}
    prepare, train, *_ = graph(plan, profile(), Known(done=done))
    assert prepare.elements[0].stages == (("tokens", next(iter(plan.tokens))),)
    assert train.needs == (Need(kind="afterok", array=0, element=0),)


def test_a_blocked_stage_takes_its_children_along_and_nobody_else() -> None:
    plan = planned(arm=["padding", "greedy"], seed=[0, 1])
    lost, *others = plan.trains
    arrays = graph(plan, profile(), Known(blocked={("train", lost)}))
    assert kinds(arrays) == [("prepare", 1), ("train", 3), ("eval", 3), ("report", 1)]
    submitted = {stage for array in arrays for element in array.elements for stage in element.stages}
    assert {("train", id_) for id_ in others} <= submitted
    assert set(plan.stages()) - submitted == {
        ("train", lost),
        *(("eval", id_) for id_, order in plan.evals.items() if order.train == lost),
    }


def test_nothing_is_sent_where_all_that_is_left_is_blocked() -> None:
    plan = planned(base=True)
    tokens = {("tokens", id_) for id_ in plan.tokens}
    assert graph(plan, profile(), Known(blocked=tokens)) == ()


def test_a_job_can_be_told_from_the_others_by_its_name() -> None:
    plan = planned(base=True, arm=["padding", "greedy"], seed=[0, 1])
    called = names(plan)
    assert called["train", plan.shared[0]] == "shared base model"
    assert {called["train", cell.train] for cell in plan.cells} == {
        "padding 0", "padding 1", "greedy 0", "greedy 1",
    }  # fmt: skip


# Any state ---------------------------------------------------------------------------------------------

MANY = planned(
    base=True,
    arm=["padding", "greedy"],
    seed=[0, 1],
    data__source=["a.jsonl", "b.jsonl"],
    train__lr=[0.1, 0.2],
)


@st.composite
def situations(draw: st.DrawFn) -> tuple[Known, Profile]:
    """Any state of any stage, likely or not, with any limits of a cluster."""
    stages = MANY.stages()
    assert len(stages) > 40
    words = st.sampled_from(["missing", "missing", "missing", "done", "live", "blocked"])
    states = dict(zip(stages, draw(st.lists(words, min_size=len(stages), max_size=len(stages))), strict=True))
    live = {stage: f"{900 + number // 4}_{number % 4}" for number, stage in enumerate(stages)}
    known = Known(
        done={stage for stage in stages if states[stage] == "done"},
        live={stage: live[stage] for stage in stages if states[stage] == "live"},
        blocked={stage for stage in stages if states[stage] == "blocked"},
        has_report=draw(st.booleans()),
    )
    limits = {"array_max": draw(st.integers(1, 5)), "prepare_parts": draw(st.integers(1, 3))}
    return known, profile(**limits)


def possible(known: Known) -> set[Stage]:
    """Missing stages that depend on nothing blocked."""
    found: set[Stage] = set()
    for stage in MANY.stages():
        missing = stage not in known.done and stage not in known.live and stage not in known.blocked
        if missing and all(
            item in found or item in known.done or item in known.live for item in inputs(MANY, stage)
        ):
            found.add(stage)
    return found


def awaits(array: Array, index: int, upstream: tuple[int, int] | str) -> bool:
    """Whether element `place` of an array waits for an element of another, or a job of SLURM's, to end well."""
    if isinstance(upstream, str):
        job, _, place = upstream.partition("_")
        element = int(place)
        exactly, own = Need(kind="afterok", job=job, element=element), Need(kind="aftercorr", job=job)
    else:
        number, element = upstream
        exactly, own = Need(kind="afterok", array=number, element=element), Need(kind="aftercorr", array=number)
    return exactly in array.needs or (own in array.needs and index == element)


@given(situations())
def test_every_state_is_completed_once_and_in_order(situation: tuple[Known, Profile]) -> None:
    known, asked = situation
    arrays = graph(MANY, asked, known)
    place: dict[Stage, tuple[int, int]] = {}
    for array in arrays:
        assert array.number == arrays.index(array)
        assert 1 <= len(array.elements) <= asked.array_max
        assert len({element.index for element in array.elements}) == len(array.elements)
        for element in array.elements:
            assert array.at(element.index) is element
            for stage in () if element.part else element.stages:
                assert stage not in place, "submitted twice"
                ready = [item for item in inputs(MANY, stage) if item not in known.done]
                for item in ready:
                    upstream = known.live.get(item) or place[item]
                    assert upstream == (array.number, element.index) or awaits(array, element.index, upstream)
                place[stage] = (array.number, element.index)
        for need in array.needs:
            assert (need.array is None) != (need.job is None)
            assert need.array is None or need.array < array.number
            if need.kind == "aftercorr" and need.array is not None:
                awaited = {element.index for element in arrays[need.array].elements}
                assert {element.index for element in array.elements} <= awaited
            if need.job is not None:
                assert need.job in {job.partition("_")[0] for job in known.live.values()}
    assert place.keys() == possible(known)
    assert_parts_are_whole(arrays, asked, place)
    assert bool(arrays) == bool(place or (known.live and not known.has_report))
    if arrays:
        assert [array.job for array in arrays].count("report") == 1
        assert arrays[-1].job == "report"
        assert {need.array for need in arrays[-1].needs} - {None} == set(range(len(arrays) - 1))


def assert_parts_are_whole(arrays: tuple[Array, ...], asked: Profile, place: dict[Stage, tuple[int, int]]) -> None:
    parts: dict[Stage, list[tuple[int, Element]]] = {}
    for array in arrays:
        for element in array.elements if array.job == "parts" else ():
            parts.setdefault(element.stages[0], []).append((array.number, element))
    cut = {stage for stage in place if stage[0] == "tokens"} if asked.prepare_parts != 1 else set()
    assert parts.keys() == cut
    for stage, found in parts.items():
        count = asked.prepare_parts
        assert [element.part for _, element in found] == [(number, count) for number in range(int(count))]
        needs = arrays[place[stage][0]].needs
        assert {Need(kind="afterok", array=number) for number, _ in found} <= set(needs)
