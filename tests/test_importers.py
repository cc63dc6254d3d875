"""`packcli import-config`: real files of three trainers, and what each key of a file becomes."""

from __future__ import annotations

import json
import re
import tempfile
from pathlib import Path
from typing import Any

import pytest
import yaml
from conftest import REPO
from hypothesis import given, settings
from hypothesis import strategies as st

from packcli import stages, sweepfile
from packcli.errors import ConfigError
from packcli.importers import convert, dialect
from packcli.importers.convert import Imported
from packcli.store import Store
from packcli.whose import Trainer

FILES = sorted((REPO / "tests" / "imported").glob("*.y*ml"))


def given_text(directory: Path, text: str, **options: Any) -> Imported:
    path = directory / "theirs.yaml"
    path.write_text(text)
    return convert.convert(path, options.pop("trainer", None), options.pop("processes", 1), **options)


def sweep(imported: Imported, directory: Path) -> dict[str, Any]:
    """The sweep it makes, as written: it must be one that packcli reads."""
    out = directory / "sweep.yaml"
    convert.write(imported, out)
    sweepfile.load(out)
    found: dict[str, Any] = yaml.safe_load(out.read_text())
    return found


def fate(imported: Imported, key: str) -> str:
    [entry] = [entry for entry in imported.entries if entry.key == key]
    return entry.fate


TRL = "model_name_or_path: owner/model\ndataset_name: owner/data\n"
AXOLOTL = "base_model: owner/model\nsequence_len: 2048\ndatasets: [{path: owner/data, type: chat_template}]\n"
FACTORY = "model_name_or_path: owner/model\nstage: sft\ndataset: mine\ncutoff_len: 2048\nfinetuning_type: full\n"


def leaves(value: Any, path: str = "") -> set[str]:
    if isinstance(value, dict) and value:
        return {leaf for key, inner in value.items() for leaf in leaves(inner, f"{path}.{key}")}
    if isinstance(value, list) and any(isinstance(item, dict) for item in value):
        return {leaf for place, item in enumerate(value) for leaf in leaves(item, f"{path}.{place}")}
    return {path.removeprefix(".")}


@pytest.mark.parametrize("file", FILES, ids=lambda path: path.stem)
def test_no_key_of_a_real_file_is_lost_or_told_twice(file: Path, tmp_path: Path) -> None:
    imported = convert.convert(file, None, None)
    assert imported.trainer == file.stem.partition("_")[0]
    for leaf in leaves(yaml.safe_load(file.read_text())):
        covering = [e.key for e in imported.entries if leaf == e.key or leaf.startswith(f"{e.key}.")]
        assert len(covering) == 1, (leaf, covering)
    text = file.read_text().splitlines()
    for entry in imported.entries:
        assert entry.key.rpartition(".")[2] in text[entry.line - 1]
        assert entry.why or entry.fate == "carried"
    sweep(imported, tmp_path)


@pytest.mark.parametrize("file", FILES, ids=lambda path: path.stem)
def test_a_real_file_with_the_toy_in_it_can_be_planned(file: Path, tmp_path: Path) -> None:
    sweep(convert.convert(file, None, None, toy=True), tmp_path)
    store = Store(tmp_path / "runs")
    plan = stages.make_plan(sweepfile.load(tmp_path / "sweep.yaml"), store)
    assert "best_fit" in {cell.labels["arm"] for cell in plan.cells}
    assert plan.baseline in {cell.labels["arm"] for cell in plan.cells}


def test_the_command_writes_a_sweep_and_accounts_for_every_key(tmp_path: Path, run_cli: Any) -> None:
    file = next(path for path in FILES if path.stem == "axolotl_lora_1b")
    done = run_cli("import-config", file, "--processes", 8, "--json", cwd=tmp_path)
    assert done.code == 0, done.stderr
    document = done.json()
    assert (document["trainer"], document["sweep"]) == ("axolotl", "sweep.yaml")
    assert {key["fate"] for key in document["keys"]} == {"carried", "changed", "no_effect"}
    spec = sweepfile.load(tmp_path / "sweep.yaml").cells[0][1]
    assert (spec.train.global_batch, spec.train.ranks) == (2 * 2 * 8, 8)
    again = run_cli("import-config", file, cwd=tmp_path)
    assert (again.code, "is not overwritten" in again.stderr) == (2, True)


# Packing ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "arm", "fields"),
    [
        (f"{TRL}packing: true", "trl_bfd", {"attention": "document", "window": 1000, "overlong": "truncate"}),
        (f"{TRL}packing: true\npacking_strategy: wrapped", "trl_wrapped",
         {"attention": "causal", "packer": "concat"}),
        (TRL, "trl_padding", {"layout": "pad", "pad_to": "longest"}),
        (f"{TRL}padding_free: true", "padding_free", {"layout": "padding_free"}),
        (f"{AXOLOTL}sample_packing: true", "axolotl_multipack",
         {"packer": "shuffled_first_fit", "repack_each_epoch": True, "overlong": "drop", "loss": "micro_batch"}),
        (f"{AXOLOTL}sample_packing: true\nmax_steps: 9", "axolotl_multipack", {"repack_each_epoch": False}),
        (f"{AXOLOTL}excess_length_strategy: truncate", "axolotl_padding",
         {"overlong": "truncate", "layout": "pad"}),
        (f"{FACTORY}packing: true", "llamafactory_packing", {"attention": "causal", "positions": "reset"}),
        (f"{FACTORY}neat_packing: true", "llamafactory_neat_packing", {"attention": "document", "window": 1000}),
        (FACTORY, "llamafactory_padding", {"layout": "pad", "truncation": "per_turn"}),
    ],
)  # fmt: skip
def test_each_way_of_packing_gets_the_arm_that_does_the_same(
    text: str, arm: str, fields: dict[str, Any], tmp_path: Path
) -> None:
    sweep(given_text(tmp_path, text), tmp_path)
    spec = sweepfile.load(tmp_path / "sweep.yaml")
    found = next(cell.arm for labels, cell in spec.cells if labels["arm"] == arm)
    assert {key: getattr(found, key) for key in fields} == fields
    assert {"best_fit"} < set(spec.axes["arm"])
    layouts = {cell.arm.layout for labels, cell in spec.cells if labels["arm"] == spec.baseline}
    assert layouts == {"pad"}


def test_a_file_that_pads_is_asked_at_equal_documents_too(tmp_path: Path) -> None:
    assert sweep(given_text(tmp_path, TRL), tmp_path)["matrix"]["train.batch_unit"] == ["rows", "documents"]


# What is trained on ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "train_on"),
    [
        (TRL, "all"),
        (f"{TRL}assistant_only_loss: true", "assistant"),
        (f"{TRL}completion_only_loss: true", "last_assistant"),
        (AXOLOTL, "assistant"),
        (f"{AXOLOTL}train_on_inputs: true", "all"),
        (FACTORY, "assistant"),
        (f"{FACTORY}mask_history: true", "last_assistant"),
        (f"{FACTORY}train_on_prompt: true", "all"),
    ],
)
def test_the_same_tokens_are_trained_on(text: str, train_on: str, tmp_path: Path) -> None:
    assert sweep(given_text(tmp_path, text), tmp_path)["data"]["train_on"] == train_on


# Numbers --------------------------------------------------------------------------------------------------------


def test_defaults_of_the_trainer_are_written_out_and_not_replaced_by_ours(tmp_path: Path) -> None:
    imported = given_text(tmp_path, TRL)
    train = sweep(imported, tmp_path)["train"]
    assert (train["lr"], train["schedule"], train["epochs"], train["micro_batch"]) == (2e-5, "linear", 3, 8)
    assert {"train.lr", "train.schedule", "train.epochs"} <= {item.key for item in imported.assumed}


@pytest.mark.parametrize(
    ("keys", "expected"),
    [
        ("warmup_steps: 10\nwarmup_ratio: 0.3", {"warmup_steps": 10}),
        ("warmup_steps: 0.2", {"warmup_ratio": 0.2}),
        ("warmup_ratio: 0.2", {"warmup_ratio": 0.2}),
        ("lr_scheduler_type: constant\nwarmup_ratio: 0.2", {"schedule": "constant"}),
        (
            "lr_scheduler_type: constant_with_warmup\nwarmup_ratio: 0.2",
            {"schedule": "constant", "warmup_ratio": 0.2},
        ),
        ("max_steps: 7\nnum_train_epochs: 3", {"steps": 7}),
        ("num_train_epochs: 0.5", {"epochs": 1}),
        ("adam_beta2: 0.95", {"betas": [0.9, 0.95]}),
        ("max_grad_norm: 0", {"clip": None}),
        ("per_device_train_batch_size: 2\ngradient_accumulation_steps: 3", {"global_batch": 24, "micro_batch": 2}),
    ],
)
def test_numbers_mean_what_transformers_takes_them_for(
    keys: str, expected: dict[str, Any], tmp_path: Path
) -> None:
    train = sweep(given_text(tmp_path, f"{TRL}{keys}\n", processes=4), tmp_path)["train"]
    known = (
        "warmup_steps",
        "warmup_ratio",
        "schedule",
        "steps",
        "epochs",
        "betas",
        "clip",
        "global_batch",
        "micro_batch",
    )
    touched = {key: train[key] for key in known if key in train and key in expected}
    assert touched == expected
    assert ("warmup_steps" in expected) or "warmup_steps" not in train
    assert ("warmup_ratio" in expected) or "warmup_ratio" not in train


@pytest.mark.parametrize(
    ("keys", "expected"),
    [
        ("warmup_steps: 0", {"warmup_steps": 0}),
        ("warmup_steps: 0\nwarmup_ratio: 0.2", {"warmup_steps": 0}),
        ("micro_batch_size: 2\nbatch_size: 64", {"global_batch": 2, "warmup_ratio": 0.03}),
        ("micro_batch_size: 2\nbatch_size: 64\ngradient_accumulation_steps:", {"global_batch": 64}),
    ],
)
def test_numbers_of_axolotl_mean_what_they_do_elsewhere(
    keys: str, expected: dict[str, Any], tmp_path: Path
) -> None:
    train = sweep(given_text(tmp_path, f"{AXOLOTL}{keys}\n"), tmp_path)["train"]
    assert {key: train.get(key) for key in expected} == expected
    assert not {"warmup_ratio", "warmup_steps"} <= train.keys()


@pytest.mark.parametrize("text", [TRL, FACTORY], ids=["trl", "llamafactory"])
def test_a_key_of_axolotl_is_said_to_set_the_batch_of_another_trainer(text: str, tmp_path: Path) -> None:
    assert fate(given_text(tmp_path, f"{text}batch_size: 64"), "batch_size") == "not_carried"


def test_an_optimizer_that_packcli_lacks_is_said_to_be_missing(tmp_path: Path) -> None:
    assert fate(given_text(tmp_path, f"{TRL}optim: adafactor"), "optim") == "not_carried"
    assert fate(given_text(tmp_path, f"{TRL}optim: paged_adamw_8bit"), "optim") == "changed"


def test_what_is_switched_off_is_not_reported_as_missing(tmp_path: Path) -> None:
    imported = given_text(tmp_path, f"{TRL}neftune_noise_alpha: 5\nload_in_4bit: false\npad_token: x\n")
    assert fate(imported, "neftune_noise_alpha") == "not_carried"
    assert fate(imported, "load_in_4bit") == "no_effect"
    assert fate(imported, "pad_token") == "no_effect"


@pytest.mark.parametrize(
    "keys",
    ["hub_token: VALUE", "hf_token: VALUE", "env_vars: {WANDB_API_KEY: VALUE}", "env: {API_KEY: VALUE}",
     "x: [{wandb_token: VALUE}]", "access_token: {of: VALUE}"],
)  # fmt: skip
def test_a_secret_is_printed_or_written_into_the_sweep(keys: str, tmp_path: Path) -> None:
    imported = given_text(tmp_path, f"{TRL}{keys}")
    assert "VALUE" not in imported.text + str(imported.document(Path("x")))


def test_tokens_of_a_text_are_hidden_as_if_they_were_secrets(tmp_path: Path) -> None:
    imported = given_text(tmp_path, f"{AXOLOTL}special_tokens: {{eos_token: '<end>'}}\ntokens: ['<a>']\n")
    assert {"<end>", '["<a>"]'} <= {entry.value for entry in imported.entries}


def test_merged_keys_end_in_a_traceback_or_go_unsaid(tmp_path: Path) -> None:
    text = (
        f"x: &x {{seed: 7, learning_rate: 1}}\ny: &y {{<<: *x, seed: 8}}\n<<: [*y, *x]\nlearning_rate: 1e-4\n{TRL}"
    )
    imported = given_text(tmp_path, text)
    assert [(entry.key, entry.line) for entry in imported.entries if "." not in entry.key] == [
        ("seed", 2), ("learning_rate", 4), ("model_name_or_path", 5), ("dataset_name", 6),
    ]  # fmt: skip
    found = sweep(imported, tmp_path)
    assert (found["train"]["lr"], found["matrix"]["seed"][0]) == (1e-4, 8)


def test_numbers_as_keys_where_axolotl_has_them_end_in_a_traceback(tmp_path: Path) -> None:
    imported = given_text(tmp_path, f"{AXOLOTL}added_tokens_overrides: {{128041: '<a>'}}")
    assert fate(imported, "added_tokens_overrides") == "not_carried"


def test_a_key_that_nobody_knows_is_reported(tmp_path: Path) -> None:
    imported = given_text(tmp_path, f"{TRL}my_own_switch: {{deep: 1}}\n")
    assert fate(imported, "my_own_switch.deep") == "not_carried"
    assert "my_own_switch.deep" in imported.text


def test_lora_keeps_each_trainers_defaults(tmp_path: Path) -> None:
    found = {
        trainer: sweep(given_text(tmp_path, text), _new(tmp_path, trainer))["train"]["lora"]
        for trainer, text in (
            ("trl", f"{TRL}use_peft: true"),
            ("axolotl", f"{AXOLOTL}adapter: qlora\nlora_r: 8\nlora_alpha: 16\nlora_target_linear: true"),
            ("factory", FACTORY.replace("finetuning_type: full", "lora_rank: 4")),
        )
    }
    assert found["trl"] == {"rank": 16, "alpha": 32, "dropout": 0.05, "targets": ["q_proj", "v_proj"]}
    assert found["axolotl"] == {"rank": 8, "alpha": 16, "dropout": 0.0, "targets": "all-linear"}
    assert found["factory"] == {"rank": 4, "alpha": 8, "dropout": 0.0, "targets": "all-linear"}


def _new(directory: Path, name: str) -> Path:
    (directory / name).mkdir()
    return directory / name


# Data -----------------------------------------------------------------------------------------------------------


def test_dataset_info_beside_the_file_says_where_data_and_fields_are(tmp_path: Path) -> None:
    info = {
        "mine": {
            "file_name": "mine.json",
            "columns": {"prompt": "question", "response": "reply", "history": "old"},
        },
        "theirs": {"hf_hub_url": "owner/chats", "formatting": "sharegpt", "columns": {"messages": "turns"}},
    }
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "dataset_info.json").write_text(json.dumps(info))
    imported = given_text(tmp_path, FACTORY.replace("dataset: mine", "dataset: mine, theirs"))
    assert sweep(imported, tmp_path)["data"]["source"] == [
        {
            "source": str(tmp_path / "data" / "mine.json"),
            "mapping": {"instruction": "question", "output": "reply"},
        },
        {"source": "owner/chats", "mapping": {"messages": "turns"}},
    ]
    assert any("columns.history" in sentence for sentence in imported.differences)


def test_names_without_dataset_info_are_said_to_stand_for_nothing(tmp_path: Path) -> None:
    assert fate(given_text(tmp_path, FACTORY), "dataset") == "not_carried"


def test_a_mixture_keeps_weights_and_subsets(tmp_path: Path) -> None:
    text = (
        "model_name_or_path: m/m\ndatasets:\n- {path: a/b, name: sub, fraction: 0.5}\n- {path: c/d, data_dir: x}\n"
    )
    imported = given_text(tmp_path, text, trainer="trl")
    assert sweep(imported, tmp_path)["data"]["source"] == [
        {"source": "a/b", "subset": "sub", "weight": 0.5},
        {"source": "c/d"},
    ]
    assert fate(imported, "datasets.1.data_dir") == "not_carried"


def test_an_inline_template_gets_a_file_that_the_sweep_names(tmp_path: Path) -> None:
    template = "{% for m in messages %}{{ m.content }}{% endfor %}"
    found = sweep(given_text(tmp_path, f'{AXOLOTL}chat_template_jinja: "{template}"'), tmp_path)
    assert Path(found["data"]["template"]).read_text() == template


@pytest.mark.parametrize(
    ("text", "place"),
    [
        (f"{TRL}dataset_train_split: train[:50%]".replace("owner/data", "chats.jsonl"), "dataset_train_split"),
        (f"{TRL}dataset_config: main".replace("owner/data", "chats.jsonl"), "dataset_config"),
        (AXOLOTL.replace("owner/data", "chats.jsonl, split: 'train[:50%]'"), "datasets.0.split"),
        (AXOLOTL.replace("owner/data", "json, data_files: chats.jsonl, split: 'train[:9]'"), "datasets.0.split"),
    ],
)
def test_a_key_of_the_hub_makes_a_sweep_of_a_local_file_that_cannot_run(
    text: str, place: str, tmp_path: Path
) -> None:
    imported = given_text(tmp_path, text)
    assert fate(imported, place) == "not_carried"
    source = sweep(imported, tmp_path)["data"]["source"]
    assert source in ("chats.jsonl", ["chats.jsonl"])


def test_a_split_of_the_hub_is_lost_and_the_default_one_reported_as_missing(tmp_path: Path) -> None:
    text = f"{TRL}dataset_train_split: train[:50%]"
    found = sweep(given_text(tmp_path, text), tmp_path)["data"]["source"]
    assert found == {"source": "owner/data", "split": "train[:50%]"}
    plain = given_text(tmp_path, AXOLOTL.replace("owner/data", "chats.jsonl, split: train"))
    assert fate(plain, "datasets.0.split") == "no_effect"


def test_a_loader_is_taken_for_data(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="`json` names a loader"):
        given_text(tmp_path, TRL.replace("owner/data", "json"))
    several = TRL.replace("owner/data", "json\ndata_files: [a.jsonl, b.jsonl]")
    assert sweep(given_text(tmp_path, several), _new(tmp_path, "trl"))["data"]["source"] == ["a.jsonl", "b.jsonl"]
    text = AXOLOTL.replace("owner/data", "json, data_files: [a.jsonl, b.jsonl]")
    imported = given_text(tmp_path, text)
    assert sweep(imported, tmp_path)["data"]["source"] == ["a.jsonl", "b.jsonl"]
    assert fate(imported, "datasets.0.data_files") == "carried"


def test_data_that_are_not_there_are_found_missing_only_when_the_sweep_runs(tmp_path: Path) -> None:
    text = TRL.replace("owner/data", str(tmp_path / "chats.jsonl"))
    assert any("no data at" in sentence for sentence in given_text(tmp_path, text).warnings)
    (tmp_path / "chats.jsonl").write_text("{}\n")
    assert not given_text(tmp_path, text).warnings
    assert not given_text(tmp_path, TRL, toy=True).warnings


@pytest.mark.parametrize(
    ("found", "said"),
    [({"ms_hub_url": "a/b"}, "is named by `ms_hub_url`"), ({"columns": {}}, "names no data")],
)
def test_data_that_packcli_cannot_name_become_a_file_of_an_invented_name(
    found: dict[str, Any], said: str, tmp_path: Path
) -> None:
    (tmp_path / "dataset_info.json").write_text(json.dumps({"mine": found}))
    with pytest.raises(ConfigError, match=said):
        given_text(tmp_path, FACTORY)


def test_a_split_of_a_local_file_of_dataset_info_makes_a_sweep_that_cannot_run(tmp_path: Path) -> None:
    info = {"mine": {"file_name": "mine.json", "split": "train[:9]", "subset": "main"}}
    (tmp_path / "dataset_info.json").write_text(json.dumps(info))
    imported = given_text(tmp_path, FACTORY)
    assert sweep(imported, tmp_path)["data"]["source"] == str(tmp_path / "mine.json")
    assert any("subset of a local file, split of a local file" in said for said in imported.differences)


def test_a_part_of_the_data_is_taken_for_all_of_them(tmp_path: Path) -> None:
    imported = given_text(tmp_path, AXOLOTL.replace("type:", "shards: 10, shards_idx: 0, type:"))
    assert {fate(imported, f"datasets.0.{key}") for key in ("shards", "shards_idx")} == {"not_carried"}


def test_a_name_beside_a_mixture_is_called_unknown(tmp_path: Path) -> None:
    imported = given_text(tmp_path, f"{TRL}datasets: [{{path: a/b}}]", trainer="trl")
    assert sweep(imported, tmp_path)["data"]["source"] == [{"source": "a/b"}]
    assert fate(imported, "dataset_name") == "no_effect"


def test_two_templates_are_both_said_to_be_used(tmp_path: Path) -> None:
    imported = given_text(tmp_path, f"{TRL}chat_template: x\nchat_template_path: t.jinja")
    assert (imported.files, sweep(imported, tmp_path)["data"]["template"]) == ({}, "t.jinja")
    assert fate(imported, "chat_template") == "no_effect"


# Keys that are called something else ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "key", "meant"),
    [
        (f"{TRL}paking: true", "paking", "packing"),
        (f"{AXOLOTL}packing: true", "packing", "sample_packing"),
        (f"{FACTORY}neat_packin: true", "neat_packin", "neat_packing"),
        (f"{TRL}neftune_noise_alfa: 5", "neftune_noise_alfa", "neftune_noise_alpha"),
    ],
)
def test_a_slip_of_a_letter_silently_makes_another_sweep(text: str, key: str, meant: str, tmp_path: Path) -> None:
    imported = given_text(tmp_path, text)
    assert fate(imported, key) == "not_carried"
    [warning] = [sentence for sentence in imported.warnings if f" {key}: " in sentence]
    assert f"did you mean `{meant}`?" in warning
    assert "another question" in warning


def test_a_published_file_with_an_earlier_name_of_a_key_loses_it(tmp_path: Path) -> None:
    imported = given_text(tmp_path, f"{TRL}max_seq_length: 512\nmax_length: 64")
    assert sweep(imported, tmp_path)["data"]["max_length"] == 512
    assert (fate(imported, "max_seq_length"), fate(imported, "max_length")) == ("changed", "no_effect")
    for name in ("model_revision", "revision_of_model"):
        found = sweep(given_text(tmp_path, f"{AXOLOTL}{name}: v1"), _new(tmp_path, name))
        assert found["model"]["revision"] == "v1"


# What is printed ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("file", FILES, ids=lambda path: path.stem)
def test_a_key_is_missing_on_the_screen(file: Path) -> None:
    imported = convert.convert(file, None, None)
    words = set(re.split(r"[\s,:]+", "\n".join(convert.lines(imported, Path("mine.yml"), []))))
    assert not [entry.key for entry in imported.entries if entry.key not in words]


def test_the_toy_is_said_to_have_a_precision_that_its_sweep_lacks(tmp_path: Path) -> None:
    imported = given_text(tmp_path, TRL, toy=True)
    assert "model.dtype" not in {item.key for item in imported.assumed}
    assert "dtype" not in sweep(imported, tmp_path)["model"]


def test_the_toys_base_model_comes_as_a_surprise(tmp_path: Path) -> None:
    imported = given_text(tmp_path, TRL, toy=True)
    assert any("base model (2,600 steps)" in line for line in convert.lines(imported, Path("mine.yml"), []))


def test_a_dash_becomes_a_file_of_that_name(tmp_path: Path, run_cli: Any) -> None:
    (tmp_path / "theirs.yaml").write_text(TRL)
    done = run_cli("import-config", "theirs.yaml", "--out", "-", cwd=tmp_path)
    assert (done.code, yaml.safe_load(done.stdout)["model"]["name"]) == (0, "owner/model")
    assert "a file of TRL" in done.stderr
    assert not (tmp_path / "-").exists()
    assert run_cli("import-config", "theirs.yaml", "--out", "-", "--json", cwd=tmp_path).code == 2


@pytest.mark.parametrize(
    ("out", "said"), [("none/here/x.yml", "no directory `.*none/here`"), ("/proc/x.yml", "cannot")]
)
def test_a_sweep_is_written_where_nobody_looks_for_it(out: str, said: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=said):
        convert.write(given_text(tmp_path, TRL), tmp_path / out)
    assert not (tmp_path / "none").exists()


def test_a_directory_to_write_into_ends_in_a_traceback(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ConfigError, match="is a directory"):
        convert.write(given_text(tmp_path, f"{TRL}chat_template: x"), Path())


@pytest.mark.parametrize("out", ["a #1.yml", "my: s.yml"])
def test_the_name_of_a_template_is_read_as_yaml(out: str, tmp_path: Path) -> None:
    convert.write(given_text(tmp_path, f"{TRL}chat_template: x"), tmp_path / out)
    found = yaml.safe_load((tmp_path / out).read_text())
    assert Path(found["data"]["template"]).read_text() == "x"


@pytest.mark.parametrize("name", ["2024", "true", "1e5"])
def test_the_name_of_a_file_is_read_as_a_number(name: str, tmp_path: Path) -> None:
    (tmp_path / f"{name}.yaml").write_text(TRL)
    imported = convert.convert(tmp_path / f"{name}.yaml", None, 1)
    convert.write(imported, tmp_path / "sweep.yaml")
    assert sweepfile.load(tmp_path / "sweep.yaml").name == name


# Refusals -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "trainer", "said"),
    [
        ("learning_rate: 1e-5", None, "keys are those of none"),
        (f"{TRL}stage: sft", "trl", ""),
        (FACTORY.replace("sft", "dpo"), None, "`stage: dpo`"),
        (f"{AXOLOTL}rl: dpo", None, "rl: dpo"),
        (f"{TRL}num_generations: 8", None, "no key of SFT"),
        (f"{TRL}learning_rate: fast", None, "no number: `fast`"),
        ("dataset_name: a/b", None, "no `model_name_or_path`"),
        (AXOLOTL, "trl", "is a file of axolotl, not of TRL"),
        (FACTORY, "axolotl", "is a file of LLaMA-Factory, not of axolotl"),
        (AXOLOTL.replace("chat_template", "completion"), None, "theirs.yaml:3: `type: completion` is plain text"),
        ("- 1", None, "a mapping"),
        (f"{TRL}packing: true\npacking_strategy: bdf", None, "yaml:4: TRL has no `packing_strategy: bdf`"),
        (f"{TRL}max_length: null", None, "yaml:3: `max_length` is empty: TRL then cuts nothing"),
        (f"{TRL}max_steps: inf", None, "no number: `inf`"),
        (f"{TRL}num_train_epochs: nan", None, "no number: `nan`"),
        (AXOLOTL.replace("path: owner/data, ", ""), None, "yaml:3: a data set without `path`"),
        (AXOLOTL.replace("type:", "1: x, type:"), None, "yaml:3: `datasets.0`: a key that is no word: `1`"),
        (f"{AXOLOTL}special_tokens: {{true: x}}", None, "`special_tokens`: a key that is no word: `True`"),
        (f"{TRL}datasets: [{{split: train}}]", "trl", "yaml:3: a data set without `path`"),
    ],
)
def test_what_cannot_be_imported_is_one_clear_line(
    text: str, trainer: Trainer | None, said: str, tmp_path: Path
) -> None:
    if not said:
        assert given_text(tmp_path, text, trainer=trainer).trainer == "trl"
        return
    with pytest.raises(ConfigError, match=said) as error:
        given_text(tmp_path, text, trainer=trainer)
    assert "\n" not in error.value.cause


_KEYS = sorted(
    {*dialect.NOT_CARRIED, *(key for keys in dialect.NO_EFFECT.values() for key in keys)}
    | {
        "packing",
        "sample_packing",
        "neat_packing",
        "max_length",
        "sequence_len",
        "cutoff_len",
        "lora_r",
        "lora_rank",
    }
    | {
        "lora_alpha",
        "lora_target_modules",
        "lora_target",
        "use_peft",
        "adapter",
        "finetuning_type",
        "learning_rate",
    }
    | {
        "lr_scheduler_type",
        "lr_scheduler",
        "warmup_steps",
        "warmup_ratio",
        "max_steps",
        "val_size",
        "val_set_size",
    }
    | {"special_tokens", "chat_template", "template", "bf16", "fp16", "seed", "optim", "optimizer", "batch_size"}
)
_VALUES = [
    None,
    True,
    False,
    0,
    1,
    2,
    0.5,
    -1,
    1e-5,
    "auto",
    "none",
    "",
    "cosine",
    "all-linear",
    ["a", "b"],
    {"p": 1},
]


@settings(max_examples=30)
@given(
    st.sampled_from([TRL, AXOLOTL, FACTORY]),
    st.dictionaries(st.sampled_from(_KEYS), st.sampled_from(_VALUES), max_size=9),
)
def test_any_mixture_of_keys_is_imported_or_refused_and_none_is_lost(text: str, more: dict[str, Any]) -> None:
    document = {**more, **yaml.safe_load(text)}
    with tempfile.TemporaryDirectory() as directory:
        path = Path(directory) / "theirs.yaml"
        path.write_text(yaml.safe_dump(document))
        trainer: Trainer = "axolotl" if text == AXOLOTL else "trl" if text == TRL else "llamafactory"
        try:
            imported = convert.convert(path, trainer, None)
        except ConfigError:
            return
        sweep(imported, Path(directory))
    keys = [entry.key for entry in imported.entries]
    for leaf in leaves(document):
        assert sum(leaf == key or leaf.startswith(f"{key}.") for key in keys) == 1


@pytest.mark.parametrize(
    ("keys", "said"),
    [
        ("max_length: long", "theirs.yaml:3 max_length"),
        ("weight_decay: -1", "theirs.yaml:3 weight_decay"),
        ("adam_beta2: 2", "theirs.yaml:3 adam_beta2"),
    ],
)
def test_a_value_that_packcli_cannot_take_is_named_where_it_stands(keys: str, said: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=said):
        given_text(tmp_path, f"{TRL}{keys}")
