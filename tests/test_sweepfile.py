"""Sweep files: what a user would find out only after a night of training if it were read wrong."""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable
from typing import Any

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from packcli.config import ARMS, ArmSpec, CellSpec, SweepSpec
from packcli.errors import ConfigError

SWEEP = """\
name: example
model: {config: {model_type: llama}, tokenizer: train, vocab_size: 300}
data:
  source: tiny
  max_length: 64
train:
  epochs: 1
  lr: 1e-3
  global_batch: 8
matrix:
  arm: [padding, best_fit]
"""

Load = Callable[..., SweepSpec]


def labels(spec: SweepSpec) -> list[str]:
    return [" ".join(values.values()) for values, _ in spec.cells]


def with_matrix(text: str) -> str:
    return SWEEP.replace("matrix:\n  arm: [padding, best_fit]\n", text)


def test_case_38_every_problem_is_said_at_once_with_file_line_path_and_nearest_key(load_text: Load) -> None:
    text = SWEEP.replace("max_length", "max_lenght").replace("lr: 1e-3", "lr: fast").replace("name", "nmae")
    with pytest.raises(ConfigError) as caught:
        load_text(text.replace("best_fit", "best_fti"))
    problems = [line.partition("sweep.yaml")[2] for line in caught.value.cause.splitlines()]
    assert problems == [
        ":1: unknown key `nmae`; did you mean `name`?",
        ": `name` is required: letters, digits, `.`, `_`, `-`, at most 64",
        ":3: `data.max_length` is required",
        ":5: unknown key `data.max_lenght`; did you mean `data.max_length`?",
        ":8: `train.lr`: Input should be a valid number, unable to parse string as a number, not `fast`",
        ":11: unknown arm `best_fti`; did you mean `best_fit`?",
    ]
    assert caught.value.fix


def test_a_problem_of_an_axis_points_at_the_axis(load_text: Load) -> None:
    with pytest.raises(ConfigError, match=r"sweep\.yaml:12: `train\.lr`"):
        load_text(SWEEP + "  train.lr: [1e-3, -1]\n")
    with pytest.raises(ConfigError, match=r"sweep\.yaml:12: unknown key `train\.lrr`; did you mean `train\.lr`"):
        load_text(SWEEP + "  train.lrr: [1e-3]\n")
    with pytest.raises(ConfigError, match=r"sweep\.yaml:12: unknown key `lr`; did you mean `train\.lr`"):
        load_text(SWEEP + "  lr: [1e-3]\n")


def test_a_key_that_only_begins_like_an_axis_keeps_its_own_line(load_text: Load) -> None:
    text = SWEEP.replace("lr: 1e-3", "lr: 1e-3\n  lr_final: 1") + "  train.lr: [1e-3]\n"
    with pytest.raises(ConfigError, match=r"sweep\.yaml:9: unknown key `train\.lr_final`"):
        load_text(text)


def test_an_unknown_key_deep_in_a_base_model_names_the_nearest_one(load_text: Load) -> None:
    base = "base: {data: {source: tiny, max_length: 64}, arm: padding, train: {stepz: 3, lr: 1, global_batch: 1}}"
    with pytest.raises(ConfigError) as caught:
        load_text(SWEEP.replace("vocab_size: 300}", f"vocab_size: 300, {base}}}"))
    assert "unknown key `model.base.train.stepz`; did you mean `model.base.train.steps`?" in caught.value.cause


def test_case_38_a_duplicate_key_is_refused_with_both_lines(load_text: Load) -> None:
    with pytest.raises(ConfigError, match=r"sweep\.yaml:9: duplicate key `train\.lr`, first on line 8"):
        load_text(SWEEP.replace("  lr: 1e-3\n", "  lr: 1e-3\n  lr: 1e-4\n"))


def test_1e_5_without_a_point_is_a_number_and_its_label_stays_as_typed(load_text: Load) -> None:
    spec = load_text(SWEEP + "  train.lr: [1e-5, 0.00001e1, 2E3, 5e+2]\n", only=["arm=padding"])
    assert [values["train.lr"] for values, _ in spec.cells] == ["1e-5", "0.00001e1", "2E3", "5e+2"]
    assert [cell.train.lr for _, cell in spec.cells] == [1e-5, 1e-4, 2000.0, 500.0]


def test_a_list_of_sources_is_labelled_by_its_parts(load_text: Load) -> None:
    spec = load_text(SWEEP + "  data.source: [[tiny, tiny_base], tiny]\n", only=["arm=padding"])
    assert [values["data.source"] for values, _ in spec.cells] == ["tiny+tiny_base", "tiny"]
    assert [item.source for item in spec.cells[0][1].data.sources] == ["tiny", "tiny_base"]


def test_exclude_drops_what_matches_all_its_keys_and_nothing_else(load_text: Load) -> None:
    text = SWEEP + "  seed: [0, 1]\nexclude:\n  - {arm: padding, seed: 1}\n"
    assert labels(load_text(text)) == ["padding 0", "best_fit 0", "best_fit 1"]
    assert labels(load_text(SWEEP + "  seed: [0, 1]\nexclude: [{seed: 1}]\n")) == ["padding 0", "best_fit 0"]


def test_include_extends_fitting_cells_and_else_adds_one_as_github_actions_does(load_text: Load) -> None:
    # The example of GitHub's documentation, with arms for fruits: an entry never overwrites an original axis.
    text = SWEEP + (
        "  seed: [0, 1]\n"
        "include:\n"
        "  - {train.clip: 1.5}\n"  # no axis of the matrix: goes to all
        "  - {train.clip: 2.5, seed: 0}\n"  # may overwrite what an include added
        "  - {arm: padding, train.epochs: 3}\n"
        "  - {arm: greedy}\n"  # fits none: a cell of its own, with nothing of the others
        "  - {arm: greedy, train.clip: 9.5}\n"  # nor may it extend a cell that an include added
    )
    found = {tuple(values.items()): (cell.train.clip, cell.train.epochs) for values, cell in load_text(text).cells}
    assert found == {
        (("arm", "padding"), ("seed", "0"), ("train.clip", "2.5"), ("train.epochs", "3")): (2.5, 3),
        (("arm", "padding"), ("seed", "1"), ("train.clip", "1.5"), ("train.epochs", "3")): (1.5, 3),
        (("arm", "best_fit"), ("seed", "0"), ("train.clip", "2.5")): (2.5, 1),
        (("arm", "best_fit"), ("seed", "1"), ("train.clip", "1.5")): (1.5, 1),
        (("arm", "greedy"),): (1.0, 1),
        (("arm", "greedy"), ("train.clip", "9.5")): (9.5, 1),
    }


def test_include_alone_makes_a_sweep(load_text: Load) -> None:
    spec = load_text(with_matrix("include: [{arm: padding}, {arm: greedy, seed: 3}]\n"))
    assert labels(spec) == ["padding", "greedy 3"]
    assert spec.cells[1][1].seed == 3


@pytest.mark.parametrize(
    ("tail", "message"),
    [
        ("exclude: [{arm: padding}, {arm: best_fit}]\n", "leaves no cell"),
        ("  seed: []\n", "axis `seed` is a list of at least one value"),
        ("  seed: 3\n", "axis `seed` is a list of at least one value"),
        ("  seed: [1, 1]\n", "2 cells have the same labels: arm=padding seed=1"),
        ("  seed: [-1]\n", "`seed`"),
        ("include: [{seed: 1, train.lrr: 3}]\n", "did you mean `train.lr`"),
        ("  seed: [0]\ninclude: [{seed: 7}]\n", "needs an `arm`"),
        ("baseline: greedy\n", "`baseline: greedy` is none of the arms padding, best_fit"),
    ],
)
def test_a_matrix_that_cannot_be_meant_is_refused(load_text: Load, tail: str, message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        load_text(SWEEP + tail)
    assert message in caught.value.cause


def test_a_sweep_without_arms_says_which_there_are(load_text: Load) -> None:
    with pytest.raises(ConfigError, match=r"`matrix\.arm` is required: a list of padding, padding_free"):
        load_text(with_matrix("matrix: {seed: [0]}\n"))


def test_case_39_a_matrix_too_large_is_refused_before_it_is_multiplied_out(load_text: Load) -> None:
    axis = ", ".join(map(str, range(1, 1001)))
    text = SWEEP + "".join(f"  {key}: [{axis}]\n" for key in ("seed", "train.epochs", "train.global_batch"))
    started = time.monotonic()
    with pytest.raises(ConfigError, match=r"the matrix has 2,000,000,000 cells; at most 10,000"):
        load_text(text)
    assert time.monotonic() - started < 10


def test_aliases_of_aliases_are_refused_before_they_fill_the_memory(load_text: Load) -> None:
    levels = ["x0: &x0 [1, 1, 1, 1, 1, 1, 1, 1, 1, 1]"]
    levels += [f"x{n}: &x{n} [{', '.join([f'*x{n - 1}'] * 10)}]" for n in range(1, 12)]
    with pytest.raises(ConfigError, match="more than 100,000 values"):
        load_text(SWEEP + "\n".join(levels) + "\n")


def test_case_46_yaml_tags_run_nothing(load_text: Load, tmp_path: Any) -> None:
    for tag in (f"!!python/object/apply:os.mkdir [{tmp_path / 'made'}]", "!!python/name:os.system ''", "!own 3"):
        with pytest.raises(ConfigError, match="could not determine a constructor") as caught:
            load_text(SWEEP + f"baseline: {tag}\n")
        assert "tags" in caught.value.fix
    assert not (tmp_path / "made").exists()


@pytest.mark.parametrize(
    "text",
    [
        "",
        "[1]",
        "name:\t- x\n",
        "a: 1\n---\nb: 2\n",
        SWEEP + "1: x\n",
        SWEEP + "on: x\n",
        SWEEP + "arms: &a {x: *a}\n",
        SWEEP + "arms: " + "[" * 2000 + "]" * 2000 + "\n",
        SWEEP + "arms: {mine: 3}\n",
        SWEEP + "arms: {mine: {extends: [padding]}}\n",
        SWEEP + "include: {arm: padding}\n",
        SWEEP + "include: [padding]\n",
        SWEEP + "exclude: [padding]\n",
        SWEEP + "exclude: 3\n",
        SWEEP + "  3: [x]\n",
        SWEEP + "  model: [x]\n",
        SWEEP + "  data.source: [3]\n",
        SWEEP.replace("name: example", 'name: "example\\n"'),
        SWEEP.replace("name: example", "name: ../elsewhere"),
        SWEEP.replace("source: tiny", "source: ''"),
        SWEEP.replace("lr: 1e-3", "lr: .inf"),
        SWEEP.replace("epochs: 1", "epochs: 1\n  steps: 1"),
        SWEEP.replace("  epochs: 1\n", ""),
    ],
)
def test_a_malformed_file_is_a_config_error_and_never_a_traceback(load_text: Load, text: str) -> None:
    with pytest.raises(ConfigError) as caught:
        load_text(text)
    assert "sweep.yaml" in caught.value.cause
    assert caught.value.fix


def test_only_means_or_within_an_axis_and_and_between_axes(load_text: Load) -> None:
    text = SWEEP + "  seed: [0, 1, 2]\n"
    chosen = load_text(text, only=["seed=0", "arm=best_fit", "seed=2"])
    assert labels(chosen) == ["best_fit 0", "best_fit 2"]
    assert chosen.axes == load_text(text).axes


@pytest.mark.parametrize(
    ("only", "message"),
    [
        ("sed=0", "no axis `sed` in this sweep"),
        ("seed", "`--only seed`"),
        ("seed=9", "`seed` has no value `9`"),
        ("seed=00", "`seed` has no value `00`"),
    ],
)
def test_only_with_an_unknown_axis_or_value_says_what_there_is(load_text: Load, only: str, message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        load_text(SWEEP + "  seed: [0, 1]\n", only=[only])
    assert message in caught.value.cause
    assert "0, 1" in caught.value.fix or "arm, seed" in caught.value.fix


def test_only_that_no_cell_matches_is_refused(load_text: Load) -> None:
    text = SWEEP + "  seed: [0, 1]\nexclude: [{arm: padding, seed: 1}]\n"
    with pytest.raises(ConfigError, match="no cell matches"):
        load_text(text, only=["arm=padding", "seed=1"])


def test_set_changes_every_cell_and_is_read_as_yaml(load_text: Load) -> None:
    sets = ["train.lr=2e-5", "data.source=[tiny, tiny_base]", "train.clip=null", "model.config.hidden_size=48"]
    for _, cell in load_text(SWEEP, sets=sets).cells:
        assert (cell.train.lr, cell.train.clip) == (2e-5, None)
        assert [item.source for item in cell.data.source] == ["tiny", "tiny_base"]
        assert cell.model.config == {"model_type": "llama", "hidden_size": 48}


@pytest.mark.parametrize(
    ("item", "message"),
    [
        ("train.lr", "is not key=value"),
        ("train.lrr=1", "unknown key `train.lrr`; did you mean `train.lr`?"),
        ("lr=1", "did you mean `train.lr`?"),
        ("arm=padding", "it is an axis of the matrix"),
        ("train.lr=fast", "`train.lr`"),
        ("train.lr=[1", "not valid YAML"),
        ("model=3", "`model` is a mapping"),
    ],
)
def test_a_set_that_would_do_nothing_is_refused(load_text: Load, item: str, message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        load_text(SWEEP, sets=[item])
    assert message in caught.value.cause


@pytest.mark.parametrize(
    ("tail", "item", "message"),
    [
        (
            "  model: [{name: a/b}, {name: c/d}]\n",
            "model.dtype=bfloat16",
            "`--set model.dtype`: `model` is an axis",
        ),
        (
            "  train.lr: [1e-3]\n",
            "train={epochs: 1, lr: 1, global_batch: 8}",
            "`--set train`: `train.lr` is an axis",
        ),
        ("  train.lora.rank: [8]\n", "train.lora=null", "`--set train.lora`: `train.lora.rank` is an axis"),
        ("include: [{arm: padding, train.clip: 2}]\n", "train.clip=1", "`--set train.clip`: it is an axis"),
        ("include: [{arm: greedy, data: {max_length: 9}}]\n", "data.max_length=8", "`data` is an axis"),
    ],
)
def test_a_set_that_an_axis_would_undo_is_refused(load_text: Load, tail: str, item: str, message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        load_text(SWEEP + tail, sets=[item])
    assert message in caught.value.cause


def test_a_block_may_be_set_beside_an_axis_for_a_key_that_it_does_not_hold(load_text: Load) -> None:
    spec = load_text(SWEEP + "  train.lr: [1e-3, 1e-4]\n", sets=["train={epochs: 2, global_batch: 8}"])
    assert {(cell.train.epochs, cell.train.lr) for _, cell in spec.cells} == {(2, 1e-3), (2, 1e-4)}


def test_an_axis_of_blocks_does_not_undo_one_of_a_key_in_them(load_text: Load) -> None:
    axes = "  train.lr: [1e-3, 1e-4]\n  train: [{epochs: 1, lr: 1, global_batch: 8}]\n"
    spec = load_text(SWEEP + axes, only=["arm=padding"])
    assert [(values["train.lr"], cell.train.lr) for values, cell in spec.cells] == [("1e-3", 1e-3), ("1e-4", 1e-4)]


def test_batch_unit_of_matrix_or_set_wins_over_the_arm_and_the_arm_over_train(load_text: Load) -> None:
    own = "arms: {mine: {extends: best_fit, batch_unit: documents}}\n"
    plain = SWEEP.replace("best_fit]", "mine]").replace("lr: 1e-3", "lr: 1e-3\n  batch_unit: tokens")

    def units(text: str, sets: tuple[str, ...] = ()) -> list[str]:
        return [cell.arm.batch_unit or cell.train.batch_unit for _, cell in load_text(text, sets=sets).cells]

    assert units(plain + own) == ["tokens", "documents"]
    assert units(plain + own, ("train.batch_unit=rows",)) == ["rows", "rows"]
    assert units(plain + "  train.batch_unit: [rows]\n" + own) == ["rows", "rows"]


def test_a_key_of_matrix_or_set_wins_over_the_arm_from_within_a_block_too(load_text: Load) -> None:
    text = SWEEP.replace("best_fit]", "mine]")
    own = "arms: {mine: {extends: best_fit, global_batch: 4, batch_unit: documents}}\n"
    block = "{epochs: 1, lr: 1, global_batch: 16}"
    for spec in (load_text(text + own, sets=[f"train={block}"]), load_text(f"{text}  train: [{block}]\n{own}")):
        arm = spec.cells[1][1].arm
        assert (arm.global_batch, arm.batch_unit) == (None, "documents")


@pytest.mark.parametrize("value", ["5", "[5]", "{a: b}"])
def test_a_value_that_may_be_of_two_kinds_is_refused_by_the_key_in_the_file(load_text: Load, value: str) -> None:
    with pytest.raises(ConfigError) as caught:
        load_text(SWEEP.replace("lr: 1e-3", f"lr: 1e-3\n  lora: {{rank: 8, alpha: 16, targets: {value}}}"))
    assert "sweep.yaml:9: `train.lora.targets`: Input should be 'all-linear'" in caught.value.cause
    assert "tuple[" not in caught.value.cause


def test_own_arms_extend_others_and_each_other(load_text: Load) -> None:
    own = (
        "arms:\n  masked_nfd: {extends: greedy, attention: document, positions: reset}\n"
        "  by_tokens: {extends: masked_nfd, batch_unit: tokens}\n"
    )
    spec = load_text(SWEEP.replace("padding, best_fit", "by_tokens") + own)
    expected = {**ARMS["greedy"], "attention": "document", "positions": "reset", "batch_unit": "tokens"}
    assert spec.cells[0][1].arm == ArmSpec.model_validate(expected)
    with pytest.raises(ConfigError, match=r"arm `b` extends `bestfit`"):
        load_text(SWEEP + "arms: {b: {extends: bestfit}}\n")


def test_an_own_arm_without_extends_must_state_every_field(load_text: Load) -> None:
    with pytest.raises(ConfigError) as caught:
        load_text(SWEEP.replace("best_fit", "mine") + "arms:\n  mine: {layout: pad, pad_to: max_length}\n")
    for field in ("packer", "overlong", "attention", "positions", "loss"):
        assert f"sweep.yaml:13: `arms.mine.{field}` is required" in caught.value.cause


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ("extends: padding, attention: causal", "needs `layout: pack`"),
        ("extends: padding, packer: best_fit", "`packer` belongs to `layout: pack`"),
        ("extends: padding, pad_to: none", "`pad_to: none` is what `layout: padding_free` means"),
        ("extends: random, overlong: truncate", "only `packer: concat` cuts documents"),
    ],
)
def test_an_arm_that_contradicts_itself_is_refused(load_text: Load, fields: str, message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        load_text(SWEEP.replace("best_fit", "mine") + f"arms:\n  mine: {{{fields}}}\n")
    assert message in caught.value.cause
    assert "sweep.yaml:13: " in caught.value.cause


def test_the_default_baseline_is_padding_wherever_it_stands(load_text: Load) -> None:
    assert load_text(SWEEP.replace("padding, best_fit", "best_fit, padding")).baseline == "padding"
    assert load_text(SWEEP.replace("padding, best_fit", "best_fit, greedy")).baseline is None
    assert load_text(SWEEP + "baseline: best_fit\n").baseline == "best_fit"


@pytest.mark.parametrize("name", sorted(ARMS))
def test_a_built_in_arm_states_every_field_the_study_varies(name: str) -> None:
    assert ARMS[name].keys() == ArmSpec.model_fields.keys() - {"batch_unit", "global_batch"}
    ArmSpec.model_validate(ARMS[name])


_CELLS = st.fixed_dictionaries(
    {
        "model": st.fixed_dictionaries(
            {
                "config": st.just({"model_type": "llama", "rope": {"theta": 1e4}}),
                "tokenizer": st.just("some/hub-id"),
            },
            optional={"dtype": st.sampled_from(["float32", "bfloat16"]), "revision": st.text(max_size=5)},
        ),
        "data": st.fixed_dictionaries(
            {
                "source": st.text(min_size=1) | st.lists(st.text(min_size=1), min_size=1),
                "max_length": st.integers(2, 1 << 24),
            },
            optional={
                "validation": st.floats(0, 1, exclude_max=True),
                "mapping": st.none() | st.dictionaries(st.text(), st.text()),
                "max_documents": st.none() | st.integers(1, 2**63 - 1),
            },
        ),
        "arm": st.sampled_from(list(ARMS.values())),
        "train": st.fixed_dictionaries(
            {
                "steps": st.integers(1, 2**63 - 1),
                "lr": st.floats(0, exclude_min=True, allow_infinity=False),
                "global_batch": st.integers(1, 2**63 - 1),
            },
            optional={
                "batch_unit": st.sampled_from(["rows", "documents", "tokens"]),
                "betas": st.tuples(st.floats(0, 1, exclude_max=True), st.floats(0, 1, exclude_max=True)),
                "save_every": st.none() | st.integers(1, 2**63 - 1),
            },
        ),
        "eval": st.fixed_dictionaries(
            {"tasks": st.lists(st.text()), "limit": st.none() | st.integers(1, 2**63 - 1)}
        ),
        "seed": st.integers(0, 2**31 - 1),
    }
)


@given(_CELLS)
def test_a_resolved_cell_survives_its_own_files(raw: dict[str, Any]) -> None:
    cell = CellSpec.model_validate(raw)
    assert CellSpec.model_validate(cell.model_dump()) == cell
    assert CellSpec.model_validate(cell.model_dump(mode="json")) == cell
    assert CellSpec.model_validate_json(cell.model_dump_json()) == cell
    assert CellSpec.model_validate(yaml.safe_load(yaml.safe_dump(cell.model_dump(mode="json")))) == cell


def test_a_resolved_sweep_survives_its_own_file(load_text: Load) -> None:
    spec = load_text(SWEEP + "  seed: [0, 1]\n  train.lr: [1e-5]\n")
    assert SweepSpec.model_validate_json(spec.model_dump_json()) == spec
    assert len(spec.cells) == len(list(itertools.product(*spec.axes.values())))


def test_an_exclude_that_can_match_nothing_is_a_typo_and_not_a_cell_that_runs(
    load_text: Callable[..., SweepSpec],
) -> None:
    text = SWEEP + "exclude: [{arm: paddng}, {train.lrr: 1}]\n"
    with pytest.raises(ConfigError) as caught:
        load_text(text)
    assert "axis `arm` has no value `paddng`" in caught.value.cause
    assert "unknown key `train.lrr`" in caught.value.cause


def test_a_checkpoint_and_random_weights_at_once_are_refused(load_text: Callable[..., SweepSpec]) -> None:
    with pytest.raises(ConfigError, match="give one"):
        load_text(SWEEP, sets=["model.name=some/checkpoint"])
