"""What a resume keeps, tells and refuses: every field of the configuration has exactly one fate."""

import dataclasses
import json
import logging
from collections import Counter

import pytest

from megatron_sft.checkpoint.resume import (
    BY_DATA,
    FREE,
    REFUSED,
    TOLD,
    changes,
    kept_batch_size,
    other_states,
    refuse_changed,
    run_config_json,
)
from megatron_sft.config.problems import problems
from megatron_sft.config.run import DATA_IDENTITY, CheckpointConfig, RunConfig, TrainConfig
from megatron_sft.errors import CheckpointError

SAME = dict.fromkeys(DATA_IDENTITY, "a")
OTHER_PACKS = {**SAME, "data_packs": "b"}


def other(value):
    """A value of the same kind that differs."""
    if isinstance(value, bool):
        return not value
    if isinstance(value, int | float):
        return value + 1
    if isinstance(value, dict):
        return {"other": "1"}
    if isinstance(value, tuple):
        return (*value[1:], 7.0) if value else ("other",)
    return "other"


RESOLVED = RunConfig(train=TrainConfig(global_batch_size=4))


def saved(run=RESOLVED, identity=SAME):
    return json.loads(run_config_json(run, identity))


def changed(**values):
    """RESOLVED with section__field = value."""
    run = RESOLVED
    for name, value in values.items():
        section, field = name.split("__")
        run = dataclasses.replace(run, **{section: dataclasses.replace(getattr(run, section), **{field: value})})
    return run


FIELDS = [
    (section.name, field.name)
    for section in dataclasses.fields(RunConfig)
    for field in dataclasses.fields(getattr(RunConfig(), section.name))
]


def test_every_field_has_exactly_one_fate():
    """A new field fails here until somebody decides what its change means for a resume."""
    fates = Counter((section, name) for table in (REFUSED, BY_DATA, TOLD, FREE) for section in table for name in table[section])
    assert fates == Counter(FIELDS)


@pytest.mark.parametrize(("section", "field"), FIELDS)
def test_a_changed_field_meets_its_fate(section, field):
    run = changed(**{f"{section}__{field}": other(getattr(getattr(RESOLVED, section), field))})
    table = next(t for t in (REFUSED, BY_DATA, TOLD, FREE) if field in t.get(section, ()))
    names = [[line.split(":")[0] for line in lines] for lines in changes(saved(), run, SAME)]
    others = [[line.split(":")[0] for line in lines] for lines in changes(saved(), run, OTHER_PACKS)]
    name = [f"{section}.{field}"]
    assert names == {id(REFUSED): [name, []], id(FREE): [[], []]}.get(id(table), [[], name])
    refused, told = (name, []) if table is BY_DATA else names
    assert others == [[*refused, "data_packs"], told]


def test_other_packs_are_refused_with_the_flags_that_may_have_done_it(caplog):
    run = changed(data__valid_data=("v.jsonl",), data__split=(80.0, 20.0, 0.0), optim__lr=1.0)
    with pytest.raises(CheckpointError) as error, caplog.at_level(logging.WARNING, "megatron_sft"):
        refuse_changed(saved(), run, (), OTHER_PACKS)
    assert str(error.value) == (
        "resume: 2 settings differ from the checkpoint's: data.split: [100.0, 0.0, 0.0] -> [80.0, 20.0, 0.0]; "
        'data_packs: "a" -> "b". Expected the same data, order and model. Restore them, start afresh with another --save folder, '
        "or pass --allow-changed data.split data_packs."
    )
    told = ['data.valid_data: [] -> ["v.jsonl"]', "optim.lr: 5e-05 -> 1.0"]
    assert caplog.messages == [f"changed since the checkpoint: {line}" for line in told]
    caplog.clear()
    refuse_changed(saved(), run, ("split", "data_packs"), OTHER_PACKS)
    assert caplog.messages[-1] == (
        "other data since the checkpoint: rows of the epoch under way may be trained twice, or not at all."
    )


def test_what_the_refusal_proposes_is_what_the_flag_takes():
    """--allow-changed takes words, not a list with commas."""
    run = dataclasses.replace(RunConfig(), checkpoint=CheckpointConfig(allow_changed=("data.split", "seed", "data_packs", "a,b")))
    found = [problem for problem in problems(run, 1) if "--allow-changed" in problem]
    assert found == [
        "--allow-changed a,b: no such setting; expected names as run_config.json has them, such as train.global_batch_size or "
        "data_tokens. Take them from the refusal."
    ]


def test_a_setting_that_an_older_release_did_not_know_had_its_default():
    old = saved()
    del old["data"]["eod_mask_loss"], old["train"]["loss_spike_factor"]
    assert changes(old, RESOLVED, SAME) == ([], [])
    refused, told = changes(old, changed(data__eod_mask_loss=False, train__loss_spike_factor=3.0), SAME)
    assert (refused, told) == (["data.eod_mask_loss: true -> false"], ["train.loss_spike_factor: null -> 3.0"])


def test_data_of_which_the_checkpoint_says_nothing_is_other_data():
    """A release before data_tokens and data_packs."""
    lines = ['data_tokens: null -> "a"', 'data_packs: null -> "a"']
    assert changes(saved(identity={}), RESOLVED, SAME) == (lines, [])


def test_a_checkpoint_of_megatron_lm_is_said_to_be_incomparable(caplog):
    refuse_changed({}, RESOLVED, (), SAME)
    assert caplog.messages == ["the checkpoint does not say what it was trained on (Megatron-LM's do not): nothing is compared."]


@pytest.mark.parametrize(
    ("flag", "kept", "expected", "said"),
    [
        (None, None, 6, ""),
        (None, 6, 6, ""),
        (8, 4, 8, ""),
        (None, 12, 12, "12 as in the checkpoint; --micro-batch-size 2 x 3 data-parallel processes would be 6."),
        (None, 4, 4, "4 as in the checkpoint; --micro-batch-size 2 x 3 data-parallel processes would be 6. They do not share 4 "),
    ],
)
def test_the_checkpoints_batch_size_is_kept_and_said(caplog, flag, kept, expected, said):
    with caplog.at_level(logging.INFO, "megatron_sft"):
        config = {} if kept is None else saved(changed(train__global_batch_size=kept))
        assert kept_batch_size(config, TrainConfig(micro_batch_size=2, global_batch_size=flag), 3) == expected
    assert said in "".join(caplog.messages) and bool(caplog.messages) == bool(said)


def test_another_batch_size_is_refused_and_an_unknown_one_is_not():
    run = changed(train__global_batch_size=8)
    assert changes(saved(changed(train__global_batch_size=4)), run, SAME)[0] == ["train.global_batch_size: 4 -> 8"]
    assert changes(saved(RunConfig()), run, SAME) == ([], [])


def test_a_configuration_without_records_is_compared_name_by_name():
    """As a release wrote it that had all of megatron-core's names in `core`."""
    core = {"num_moe_experts": 8, "moe_router_topk": 2, "moe_latent_size": None, "softmax_scale": 0.5, "moe_aux_loss_coeff": 0.1}
    run = dataclasses.replace(RESOLVED, model=RESOLVED.model.with_core(core))
    old = saved(run)
    for name in ("moe", "mla", "mamba", "softmax_scale"):
        del old["model"][name]
    old["model"]["core"] = core
    assert changes(old, run, SAME) == ([], [])
    other_model = dataclasses.replace(run, model=run.model.with_core({"moe_router_topk": 4}))
    assert changes(old, other_model, SAME)[0] == ["model.moe.moe_router_topk: 2 -> 4"]


@pytest.mark.parametrize(
    ("before", "after", "is_refused"),
    [
        (("router lr=1e-6",), ("router lr=1e-5 weight_decay=0", "norm lr=1e-5"), False),
        (("a optimizer=sgd", "b lr=1"), ("a lr=1 optimizer=sgd",), False),
        (("router lr=1e-6",), ("router lr=1e-6 optimizer=sgd",), True),
        (("a optimizer=sgd",), ("b lr=1", "a optimizer=sgd"), True),
        (("a optimizer=sgd",), (), True),
    ],
)
def test_another_table_of_groups_is_told_and_one_with_other_optimizers_refused(before, after, is_refused):
    old, new = saved(changed(optim__param_groups=before)), changed(optim__param_groups=after)
    line = [f"optim.param_groups: {json.dumps(before)} -> {json.dumps(after)}"]
    assert changes(old, new, SAME) == ((line, []) if is_refused else ([], line))
    assert other_states(old, new) == (line if is_refused else [])


def test_a_new_run_takes_optimizer_states_of_the_same_parameters_alone():
    run = changed(optim__optimizer="muon", train__freeze=("embedding",), lora__lora_rank=4, data__seq_length=8, optim__lr=1.0)
    names = [line.partition(":")[0] for line in other_states(saved(), run)]
    assert names == ["optim.optimizer", "train.freeze", "lora.lora_rank"] and other_states({}, run) == []
