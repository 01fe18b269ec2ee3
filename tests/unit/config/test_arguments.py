"""Flags: the tutorial's list, the three outcomes, all problems at once."""

import dataclasses
import shlex

import pytest

from megatron_sft.config.arguments import parse, read_flags
from megatron_sft.config.options import GenerateConfig
from megatron_sft.config.problems import data_problems, problems
from megatron_sft.config.run import DataConfig, ModelConfig, ParallelConfig, RunConfig
from megatron_sft.errors import ConfigError

NEEDED = ["--load", "model", "--finetune-hf-dataset", "rows.jsonl"]
TUTORIAL = """
    --bf16 --no-masked-softmax-fusion --disable-bias-linear --position-embedding-type rope --no-rope-fusion
    --normalization RMSNorm --swiglu --num-layers 28 --hidden-size 1024 --ffn-hidden-size 3072
    --num-attention-heads 16 --group-query-attention --num-query-groups 8 --kv-channels 128 --qk-layernorm
    --seq-length 4096 --max-position-embeddings 40960 --tokenizer-type HuggingFaceTokenizer
    --tokenizer-model /path/to/Qwen3-0.6B --make-vocab-size-divisible-by 1187 --use-mcore-models --rotary-percent 1.0
    --rotary-base 1000000 --no-bias-swiglu-fusion --tensor-model-parallel-size 1 --pipeline-model-parallel-size 1
    --micro-batch-size 1 --train-samples 128000 --lr-decay-samples 128000 --lr-warmup-samples 0 --split 100,0,0
    --finetune-hf-dataset "Magpie-Align/Magpie-Llama-3.1-Pro-MT-300K-Filtered" --lr 5.0e-5 --min-lr 1.0e-7
    --lr-decay-style cosine --clip-grad 1.0 --weight-decay 0.0 --adam-beta1 0.9 --adam-beta2 0.95
    --use-distributed-optimizer --no-gradient-accumulation-fusion --reset-position-ids --reset-attention-mask
    --eod-mask-loss --attention-dropout 0.0 --hidden-dropout 0.0 --no-check-for-nan-in-loss-and-grad --eval-iters 1
    --eval-interval 1000 --save-interval 1000 --log-interval 100 --load /path/to/Qwen3-0.6B --save {save} --finetune
    --auto-detect-ckpt-format --export-te-mcore-model
"""


def test_the_tutorials_flags_parse_unchanged(tmp_path):
    run, explicit = parse(shlex.split(TUTORIAL.format(save=tmp_path / "out")), 1)
    assert (run.model.num_layers, run.model.qk_layernorm, run.model.rotary_base) == (28, True, 1e6)
    assert (run.train.params_dtype, run.train.train_samples, run.optim.lr_decay_samples) == ("bf16", 128000, 128000)
    assert run.data.train_data == ("Magpie-Align/Magpie-Llama-3.1-Pro-MT-300K-Filtered",)
    assert (run.data.reset_position_ids, run.data.reset_attention_mask, run.data.eod_mask_loss) == (True, True, True)
    assert run.checkpoint.finetune and run.parallel.use_distributed_optimizer and not run.train.check_for_nan
    assert "norm_epsilon" not in explicit and "num_layers" in explicit


def test_every_problem_is_reported_at_once():
    argv = ["--trian-iters", "3", "--lr", "x", "--packing", "bestfit", "--fp16", "--micro-batch-size", "0", *NEEDED]
    with pytest.raises(ConfigError) as error:
        parse(argv, 1)
    assert error.value.problems == (
        "--trian-iters: unknown flag. Did you mean --train-iters?",
        "--fp16: fp16 needs loss scaling, which this project does not have. Use --bf16.",
        "--lr x: expected a number from 0 to 1. Correct it.",
        "--packing bestfit: expected one of best-fit, sequential, none. Did you mean best-fit?",
        "--micro-batch-size 0: expected a whole number from 1 to 1048576. Correct it.",
    )


def test_experts_are_cut_over_tensor_parallel_ranks_unless_told_otherwise():
    sizes = ["--tensor-model-parallel-size", "2"]
    assert parse([*NEEDED, *sizes], 2)[0].parallel.expert_tensor_parallel_size == 2
    assert parse([*NEEDED, *sizes, "--expert-tensor-parallel-size", "1"], 2)[0].parallel.expert_tensor_parallel_size == 1


def test_no_effect_flag_prints_one_line(capsys):
    from megatron_sft import log

    log.configure(0)
    parse([*NEEDED, "--use-mcore-models"], 1)
    assert capsys.readouterr().out == "--use-mcore-models has no effect: that is how this project always works.\n"
    read_flags(["--no-rope-fusion", "--sft", "--use-flash-attn", "--no-rope-fusion"])
    assert capsys.readouterr().out == (
        "--no-rope-fusion, --use-flash-attn have no effect: this project chooses kernels by what the machine has.\n"
        "--sft has no effect: that is how this project always works.\n"
    )


@pytest.mark.parametrize("name", ["reset-position-ids", "reset-attention-mask", "eod-mask-loss"])
def test_resets_are_on_and_can_be_turned_off(name):
    field = name.replace("-", "_")
    assert getattr(parse(NEEDED, 1)[0].data, field) is True
    assert getattr(parse([*NEEDED, f"--no-{name}"], 1)[0].data, field) is False
    assert getattr(parse([*NEEDED, f"--no-{name}", f"--{name}"], 1)[0].data, field) is True


def test_the_last_run_length_wins_with_schedules_of_its_unit():
    default = "--train-samples 128000 --lr-decay-samples 128000 --lr-warmup-samples 0"
    run, _ = parse([*NEEDED, *default.split(), "--num-epoch", "2"], 1)
    assert (run.train.train_samples, run.train.num_epoch, run.optim.lr_decay_samples) == (None, 2.0, None)
    run, _ = parse([*NEEDED, "--train-iters=7", "--train-samples", "9"], 1)
    assert (run.train.train_iters, run.train.train_samples) == (None, 9)


def test_names_of_other_projects():
    argv = "--hf-checkpoint hf --prompt-data a a.parquet b b.jsonl --input-key messages --rollout-shuffle --num-epoch 3"
    argv += " --rollout-batch-size 8 --global-batch-size 8 --loss-type sft_loss --calculate-per-token-loss"
    argv += " --disable-compute-advantages-and-returns --debug-train-only --rollout-function-path x.y"
    run, _ = parse(argv.split(), 1)
    assert (run.data.train_names, run.data.train_data) == (("a", "b"), ("a.parquet", "b.jsonl"))
    assert (run.checkpoint.load, run.data.tokenizer_model, run.train.global_batch_size) == ("hf", "hf", 8)


def test_kinds_of_losses_and_their_names_elsewhere():
    wanted = {"sft_loss": "sft", "sft": "sft", "dft": "dft", "eaft": "eaft"}
    assert {word: parse([*NEEDED, "--loss-type", word], 1)[0].train.loss_type for word in wanted} == wanted
    argv = "--label-smoothing-factor 0.1 --z-loss-coeff 1e-4 --neftune-noise-alpha 5".split()
    train = parse([*NEEDED, *argv], 1)[0].train
    assert (train.label_smoothing, train.z_loss_coeff, train.neftune_noise_alpha) == (0.1, 1e-4, 5.0)
    _, found = read_flags(["--loss-type", "asft"])
    assert found == [
        "--loss-type asft: it anchors to a second, frozen copy of the weights, which this project does not hold beside the "
        "model. Use dft, which is asft without the anchor, with fewer steps or a lower --lr."
    ]
    assert read_flags(["--loss-type", "policy_loss"])[1] == [
        "--loss-type policy_loss: expected one of sft, dft, eaft. Correct it."
    ]


def test_a_file_is_no_name_of_a_source(tmp_path):
    plain = tmp_path / "rows"
    plain.touch()
    _, found = read_flags(["--prompt-data", "A.jsonl", "B.jsonl"])
    assert found == [
        "--prompt-data A.jsonl B.jsonl: A.jsonl stands where a name is expected: NAME PATH NAME PATH, or one path. Write "
        "--prompt-data A A.jsonl B B.jsonl, or --finetune-data-files A.jsonl B.jsonl without names."
    ]
    assert len(read_flags(["--prompt-data", str(plain), "B.jsonl"])[1]) == 1
    assert read_flags(["--prompt-data", "A", "A.jsonl"])[1] == []


@pytest.mark.parametrize("flag", ["--save", "--save-hf", "--valid-data", "--chat-template"])
def test_an_empty_value_is_told_of(flag: str) -> None:
    told = f"{flag} '': expected a value; perhaps a variable is not set. Give one, or leave the flag out."
    assert read_flags([flag, ""])[1] == read_flags([f"{flag}="])[1] == [told]
    assert read_flags(["--wandb-exp-name", ""])[1] == []
    assert data_problems(DataConfig(train_data=("",), tokenizer_model="x"))[0].startswith("no training data: expected ")


@pytest.mark.parametrize("name", ["a\nb", "a\x1b[2J", "\u202ea"])
def test_names_of_sources_can_be_printed(name: str) -> None:
    data = DataConfig(train_data=("a.jsonl", "b.jsonl"), train_names=(name, "b"), tokenizer_model="x")
    expected = "expected a name that can be printed, as tables and metrics have it. Rename it."
    assert data_problems(data) == [f"--prompt-data {name!a}: {expected}"]
    assert data_problems(dataclasses.replace(data, train_names=("\u4e2d a/b", "b"))) == []


def test_lists_of_integers_are_evaluated_without_eval():
    values, found = read_flags(["--moe-layer-freq", "([0]*1+[1]*2)"])
    assert values == {"core.moe_layer_freq": [0, 1, 1]} and not found
    _, found = read_flags(["--moe-layer-freq", "__import__('os')"])
    assert len(found) == 1


def test_rope_scaling_and_windows():
    argv = "--use-rope-scaling --rope-scaling-factor 32 --num-layers 4 --window-size 127,0 --window-attn-skip-freq 2"
    model = parse([*NEEDED, *argv.split()], 1)[0].model
    assert model.rope_scaling["factor"] == 32.0
    assert (model.window_size, model.window_layers) == (128, (True, False, True, False))


def test_layout_that_does_not_fit():
    argv = "--tensor-model-parallel-size 3 --num-attention-heads 8 --context-parallel-size 2 --cp-comm-type p2p".split()
    with pytest.raises(ConfigError) as error:
        parse([*NEEDED, *argv], 4)
    assert len(error.value.problems) == 3


def test_save_into_an_hf_folder_is_refused(tmp_path):
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(ConfigError, match="is an HF folder"):
        parse([*NEEDED, "--save", str(tmp_path)], 1)


def test_generate_has_its_own_flags():
    argv = "--load x --prompt a --prompt b --osl 5 --data p.txt --no-chat-template".split()
    _, _, options = parse(argv, 1, options=GenerateConfig)
    assert options == GenerateConfig(prompt=("a", "b"), osl=5, prompts_path="p.txt", no_chat_template=True)


def test_a2a_needs_heads_for_every_context_parallel_rank() -> None:
    model = ModelConfig(num_attention_heads=12, num_query_groups=6)
    layout = ParallelConfig(tensor_model_parallel_size=2, context_parallel_size=4)
    way_out = "Change --context-parallel-size, or use --cp-comm-type allgather."
    run = RunConfig(model=model, parallel=layout)
    assert problems(run, 8, training=False) == [
        "--cp-comm-type a2a: --num-attention-heads 12 is not a multiple of --tensor-model-parallel-size 2 x "
        f"--context-parallel-size 4. {way_out}",
        "--cp-comm-type a2a: 3 of --num-query-groups 6 on a tensor-parallel rank; expected a multiple or a divisor of "
        f"--context-parallel-size 4. {way_out}",
    ]
    gathering = dataclasses.replace(layout, cp_comm_type="allgather")
    assert problems(dataclasses.replace(run, parallel=gathering), 8, training=False) == []
    fewer_groups = dataclasses.replace(model, num_attention_heads=16, num_query_groups=4)
    assert problems(dataclasses.replace(run, model=fewer_groups), 8, training=False) == []


@pytest.mark.parametrize(
    "given",
    [
        ["--main-params-dtype", "bf16"],
        ["--main-grads-dtype", "bf16"],
        ["--exp-avg-sq-dtype", "bf16", "--use-precision-aware-optimizer", "--bf16", "--adam-beta2", "0.999"],
        ["--exp-avg-dtype", "fp8"],
        ["--attention-dropout", "0.1"],
        ["--loss-spike-factor", "1"],
        ["--recompute-method", "uniform", "--recompute-granularity", "full", "--recompute-num-layers", "3", "--num-layers", "8"],
    ],
)
def test_a_flag_that_would_do_nothing_is_refused(given: list[str]) -> None:
    with pytest.raises(ConfigError, match=given[0]):
        parse([*NEEDED, *given], 1)


@pytest.mark.parametrize(("named", "expected"), [("/there", "/there/megatron_sft"), ("not/absolute", None), ("", None)])
def test_the_token_store_is_below_xdg_cache_home(monkeypatch: pytest.MonkeyPatch, named: str, expected: str | None) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", named)
    flags = ["--load", "x", "--train-data", "a.jsonl"]
    assert parse(flags, 1)[0].data.data_cache_path == expected
    assert parse([*flags, "--data-cache-path", "/own"], 1)[0].data.data_cache_path == "/own"
