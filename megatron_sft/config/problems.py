"""Contradictions in a configuration, one sentence each, found before anything is read.

`problems(run, world_size)` returns all of them at once; an empty list means that the run can start. What needs the
checkpoint or the data comes later.
"""

import dataclasses
import os
import re
from collections.abc import Collection, Mapping
from typing import Any

from megatron_sft.config.adapters import trained_problems
from megatron_sft.config.core_fields import RECORD_OF, RECORDS, CoreTraining, has_part
from megatron_sft.config.fields import Factor, flag_of, kind_of, kinds, range_problems, shown
from megatron_sft.config.folders import folder_problems
from megatron_sft.config.groups import group_problems, lowest_rate, parameter_groups
from megatron_sft.config.hints import nearest
from megatron_sft.config.log import log_problems
from megatron_sft.config.run import (
    DATA_IDENTITY,
    EFFECTIVE,
    OWN_CORE,
    CheckpointConfig,
    DataConfig,
    ModelConfig,
    ParallelConfig,
    RunConfig,
)
from megatron_sft.config.tasks import CHATCORE, TASK_NAMES, TasksConfig

LENGTHS = ("train_iters", "train_samples", "num_epoch")
ROPE_NEEDS: Mapping[str, tuple[str, ...]] = {
    "default": (),
    "linear": ("factor",),
    "llama3": ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"),
    "yarn": (),
    "longrope": ("short_factor", "long_factor"),
}
"""Kinds of RoPE scaling that the model has, and what config.json must then say."""
ROPE_NUMBERS = ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings", "beta_fast", "beta_slow")
FACTOR = kind_of(Factor)
PARTS: Mapping[str, str] = {"moe": "experts", "mla": "latent attention", "mamba": "Mamba layers"}


def problems(run: RunConfig, world_size: int, training: bool = True) -> list[str]:
    """Every contradiction in a configuration, one sentence each; what needs the checkpoint or the data comes later.

    Args:
        run: as the flags say it.
        world_size: processes.
        training: False for commands that only read a model (generate, mmlu).
    """
    if wrong := _range_problems(run):  # what follows counts with these values
        return wrong
    wrong = _layout_problems(run, world_size) + model_problems(run.model) + trained_problems(run) + _task_problems(run.tasks)
    if training:
        wrong += _training_problems(run) + _optim_problems(run) + _folder_problems(run.checkpoint)
        wrong += folder_problems(run) + _allowed_problems(run) + log_problems(run.log) + _idle_task_problems(run.tasks)
    return wrong


def _range_problems(run: RunConfig) -> list[str]:
    """Values that their field may not have, those of the model's records and of ModelConfig.core included."""
    sections = [getattr(run, field.name) for field in dataclasses.fields(run)] + [getattr(run.model, name) for name in RECORDS]
    return [sentence for section in sections for sentence in range_problems(section)] + core_problems(run.model.core)


def core_problems(core: Mapping[str, Any]) -> list[str]:
    """Entries of ModelConfig.core that have no effect here or belong elsewhere, or a value that they may not have."""
    problems = []
    for name, value in core.items():
        if name in RECORD_OF or name in OWN_CORE:
            problems.append(f"model setting {name!r}: expected outside of `core`. Set it with ModelConfig.with_core.")
        elif name not in EFFECTIVE:
            near = nearest(name, list(EFFECTIVE))
            way_out = f"Did you mean {near}?" if near else "Leave it out."
            problems.append(f"model setting {name!r}: expected a setting of megatron-core that has an effect here. {way_out}")
        elif not EFFECTIVE[name].has(value):
            problems.append(f"{flag_of(name)} is {shown(value)}; expected {EFFECTIVE[name].expected()}. Correct it.")
    return problems


def _layout_problems(run: RunConfig, world_size: int) -> list[str]:
    parallel, model = run.parallel, run.model
    tp, pp = parallel.tensor_model_parallel_size, parallel.pipeline_model_parallel_size
    cp, ep = parallel.context_parallel_size, parallel.expert_model_parallel_size
    problems = []
    if world_size % parallel.model_parallel_size:
        problems.append(
            f"{world_size} processes cannot be cut into TP {tp} x PP {pp} x CP {cp} = {parallel.model_parallel_size}. "
            "Start a multiple of it, or change --tensor-, --pipeline- or --context-parallel-size."
        )
    elif world_size // pp % (ep * parallel.expert_tensor_parallel_size):
        problems.append(
            f"{world_size // pp} processes a pipeline stage cannot be cut into EP {ep} x ETP "
            f"{parallel.expert_tensor_parallel_size}. Change --expert-model-parallel-size, or "
            "--expert-tensor-parallel-size (TP's where it is not given)."
        )
    problems += _division_problems(run)
    for name, value in (("num_attention_heads", model.num_attention_heads), ("num_query_groups", model.num_query_groups)):
        if value % tp and not (name == "num_query_groups" and tp % value == 0):
            flag = f"--{name.replace('_', '-')}"
            problems.append(f"--tensor-model-parallel-size {tp} does not divide {flag} {value}. Choose one that does.")
    if parallel.virtual_pipeline_model_parallel_size and pp == 1:
        problems.append("virtual pipeline stages need --pipeline-model-parallel-size 2 or more.")
    if parallel.sequence_parallel and tp == 1:
        problems.append("--sequence-parallel needs --tensor-model-parallel-size 2 or more. Leave it out.")
    if cp > 1 and parallel.cp_comm_type == "p2p":
        problems.append("--cp-comm-type p2p needs TransformerEngine. Use a2a (heads divisible by CP x TP) or allgather.")
    problems += _head_problems(model, parallel)
    if model.norm_placement != "pre" and model.add_bias_linear:
        problems.append(f"--norm-placement {model.norm_placement} with biases: expected none. Add --disable-bias-linear.")
    if parallel.overlap_param_gather and not parallel.use_distributed_optimizer:
        problems.append("--overlap-param-gather needs --use-distributed-optimizer. Add it.")
    if parallel.overlap_param_gather and not parallel.overlap_grad_reduce:
        problems.append("--overlap-param-gather needs --overlap-grad-reduce. Add it.")
    return problems


def _division_problems(run: RunConfig) -> list[str]:
    """Layers over pipeline stages, experts over EP, the MLP over TP: what megatron-core only asserts."""
    parallel, model = run.parallel, run.model
    problems = []
    ends = (parallel.decoder_first_pipeline_num_layers, parallel.decoder_last_pipeline_num_layers)
    stages = parallel.pipeline_model_parallel_size - sum(1 for layers in ends if layers is not None)
    if stages < 0 or (any(ends) and parallel.pipeline_model_parallel_size == 1):
        return ["--decoder-first- and --decoder-last-pipeline-num-layers need --pipeline-model-parallel-size 2 or more."]
    layers = model.num_layers - sum(layers or 0 for layers in ends)
    chunks = stages * (parallel.virtual_pipeline_model_parallel_size or 1)
    if model.num_layers and (layers < 0 or (layers % chunks if stages else layers)):
        problems.append(
            f"{layers} layers cannot be cut into {chunks} equal pipeline stages. Change --pipeline-model-parallel-size, or use "
            "--decoder-first-pipeline-num-layers and --decoder-last-pipeline-num-layers."
        )
    experts, ep = model.moe.num_moe_experts or 0, parallel.expert_model_parallel_size
    if ep > 1 and model.is_whole and not experts:
        problems.append(f"--expert-model-parallel-size {ep}: the model has no experts. Expected 1 (EP=1); leave it out.")
    if experts % ep:
        problems.append(f"--expert-model-parallel-size {ep} does not divide --num-experts {experts}. Choose one that does.")
    if experts and model.add_bias_linear and parallel.expert_tensor_parallel_size > 1:
        etp = parallel.expert_tensor_parallel_size
        problems.append(f"--expert-tensor-parallel-size {etp}: megatron-core cuts no expert that has biases. Use 1 (ETP=1).")
    tp = parallel.tensor_model_parallel_size
    widths = {"--ffn-hidden-size": model.ffn_hidden_size}
    if model.mla.multi_latent_attention:
        widths["--kv-lora-rank + --qk-pos-emb-head-dim"] = model.mla.kv_lora_rank + model.mla.qk_pos_emb_head_dim
        widths["--q-lora-rank"] = model.mla.q_lora_rank or 0
    for flag, width in widths.items():
        if width % tp:
            problems.append(f"--tensor-model-parallel-size {tp} does not divide {flag} {width}. Choose one that does.")
    return problems


def _chunk_layers(run: RunConfig) -> list[int]:
    """Layers of the model chunks of a run that has no division problem; each number once."""
    parallel = run.parallel
    ends = (parallel.decoder_first_pipeline_num_layers, parallel.decoder_last_pipeline_num_layers)
    given = [layers for layers in ends if layers is not None]
    stages = parallel.pipeline_model_parallel_size - len(given)
    equal = [(run.model.num_layers - sum(given)) // stages] if stages else []
    return sorted({layers // (parallel.virtual_pipeline_model_parallel_size or 1) for layers in given + equal})


def _head_problems(model: ModelConfig, parallel: ParallelConfig) -> list[str]:
    """What --cp-comm-type a2a asks of the heads: each context-parallel rank takes some of those of its TP rank."""
    tp, cp = parallel.tensor_model_parallel_size, parallel.context_parallel_size
    if cp == 1 or parallel.cp_comm_type != "a2a" or not model.num_attention_heads:
        return []
    problems = []
    way_out = "Change --context-parallel-size, or use --cp-comm-type allgather."
    if model.num_attention_heads % (tp * cp):
        problems.append(
            f"--cp-comm-type a2a: --num-attention-heads {model.num_attention_heads} is not a multiple of "
            f"--tensor-model-parallel-size {tp} x --context-parallel-size {cp}. {way_out}"
        )
    groups = max(model.num_query_groups // tp, 1)  # of one tensor-parallel rank
    if model.num_query_groups and groups % cp and cp % groups:
        problems.append(
            f"--cp-comm-type a2a: {groups} of --num-query-groups {model.num_query_groups} on a tensor-parallel rank; "
            f"expected a multiple or a divisor of --context-parallel-size {cp}. {way_out}"
        )
    return problems


def model_problems(model: ModelConfig) -> list[str]:
    """Counts of a model that do not go together; what is not said yet is left out."""
    core, moe, problems = model.core, model.moe, []
    if model.num_query_groups and model.num_attention_heads % model.num_query_groups:
        problems.append(
            f"--num-query-groups {model.num_query_groups} does not divide --num-attention-heads "
            f"{model.num_attention_heads}. Choose one that does."
        )
    experts, groups, best = moe.num_moe_experts, moe.moe_router_num_groups, moe.moe_router_group_topk
    if experts and moe.moe_router_topk > experts:
        problems.append(f"--moe-router-topk {moe.moe_router_topk} is above --num-experts {experts}. Lower it.")
    problems += idle_problems(model, model.core_fields().keys())
    if (groups is None) != (best is None) or (groups and best and (best > groups or (experts or groups) % groups)):
        problems.append(
            f"--moe-router-num-groups {groups} and --moe-router-group-topk {best}: expected both, groups that divide "
            f"--num-experts {experts}, and no more of them than there are. Correct them."
        )
    losses, weights = core.get("moe_router_load_balancing_type"), core.get("moe_aux_loss_coeff")
    if isinstance(losses, list) and not (isinstance(weights, list) and len(weights) == len(losses)):
        problems.append(f"--moe-router-load-balancing-type has {len(losses)} values; expected as many of --moe-aux-loss-coeff.")
    if isinstance(weights, list) and not isinstance(losses, list):
        problems.append(f"--moe-aux-loss-coeff has {len(weights)} values; expected one for one --moe-router-load-balancing-type.")
    problems += [f"--rope-scaling: {sentence}. Correct it." for sentence in rope_problems(model.rope_scaling)]
    return problems + _layer_problems(model)


def idle_problems(model: ModelConfig, names: Collection[str]) -> list[str]:
    """Of these names of megatron-core those that mean nothing, because the model has not the part that they are about."""
    problems = []
    for record, part in PARTS.items():
        training = {name for name in kinds(CoreTraining) if record == "moe" and name.startswith("moe_")}
        idle = sorted(name for name in names if RECORD_OF.get(name) == record or name in training)
        if idle and model.is_whole and not has_part(getattr(model, record)):
            problems.append(f"{', '.join(map(flag_of, idle))}: the model has no {part}. Expected none of these; leave them out.")
    return problems


def rope_problems(scaling: Mapping[str, Any] | None) -> list[str]:
    """What is wrong with a RoPE scaling of config.json or of --rope-scaling, one sentence each."""
    kind = (scaling or {}).get("rope_type", "default")
    if scaling is None or kind not in ROPE_NEEDS:
        known = ", ".join(ROPE_NEEDS)
        return [] if scaling is None else [f"rope_scaling: unknown rope_type {kind!r}; expected one of {known}"]
    problems = [f"rope_scaling of type {kind}: {key} is missing" for key in ROPE_NEEDS[kind] if key not in scaling]
    for key in ROPE_NUMBERS:
        if scaling.get(key) is not None and not FACTOR.has(scaling[key]):
            problems.append(f"rope_scaling: {key} is {scaling[key]!r}; expected {FACTOR.expected()}")
    return problems


def _layer_problems(model: ModelConfig) -> list[str]:
    """Lists with one entry per layer."""
    layers, pattern, problems = model.num_layers, model.mamba.hybrid_layer_pattern, []
    every = {"--moe-layer-freq": model.moe.moe_layer_freq, "--no-rope-freq": model.no_rope_freq}
    lists = {"--window-attn-skip-freq": model.window_layers, **every, "--hybrid-layer-pattern": pattern}
    for name, listed in lists.items():
        if layers and listed and not isinstance(listed, int) and len(listed) != layers:
            problems.append(f"{name} names {len(listed)} layers; expected --num-layers {layers}. Correct one of them.")
    for name, nth in every.items():
        if nth == 0:
            problems.append(f"{name} 0: expected every how many layers, from 1 on, or a list. Leave it out for none.")
    skipped = model.no_rope_freq
    if layers and isinstance(skipped, int) and skipped and layers % skipped:
        problems.append(f"--no-rope-freq {skipped} does not divide --num-layers {layers}. Choose one that does, or give a list.")
    if pattern is not None and (not pattern or set(pattern) - set("M*-E")):
        problems.append(f"--hybrid-layer-pattern {pattern!r}: expected M, *, - and E, one letter a layer. Correct it.")
    if model.window_layers and model.is_whole and not model.window_size:
        problems.append("--window-attn-skip-freq has no effect without --window-size. Add it, or leave both out.")
    return problems


def _training_problems(run: RunConfig) -> list[str]:
    train, data = run.train, run.data
    lengths = {name: value for name in LENGTHS if (value := getattr(train, name)) is not None}
    problems = []
    if len(lengths) != 1:
        spelled = ", ".join(f"{flag_of(name)} {value:g}" for name, value in lengths.items()) or "no length"
        problems.append(f"{spelled}: expected one of {', '.join(map(flag_of, LENGTHS))}. Give one.")
    problems += data_problems(data)
    tp = run.parallel.tensor_model_parallel_size
    if run.model.moe.num_moe_experts and tp > 1 and not run.parallel.sequence_parallel:
        problems.append(f"--tensor-model-parallel-size {tp} with experts needs --sequence-parallel (megatron-core). Add it.")
    if train.max_tokens_per_gpu and train.max_tokens_per_gpu < data.seq_length:
        problems.append(
            f"--max-tokens-per-gpu {train.max_tokens_per_gpu} is below --seq-length {data.seq_length}: a pack would not fit. "
            "Raise it, or lower --seq-length."
        )
    if train.global_batch_size and train.micro_batch_size > train.global_batch_size:
        problems.append(
            f"--micro-batch-size {train.micro_batch_size} is above --global-batch-size {train.global_batch_size}: a step has no "
            "such forward pass. Lower the first, or raise the second."
        )
    if train.loss_spike_action != "skip" and train.loss_spike_factor is None:
        problems.append(f"--loss-spike-action {train.loss_spike_action} has no effect without --loss-spike-factor. Add it.")
    if train.skip_train and not train.eval_iters:
        problems.append("--skip-train needs --eval-iters (-1: all held-out rows) above 0: there is nothing else to do. Add it.")
    return problems + _recompute_problems(run) + _best_problems(run)


def _best_problems(run: RunConfig) -> list[str]:
    """A --best-metric that nothing measures."""
    metric, tasks, needs = run.checkpoint.best_metric, run.tasks.eval_tasks, ""
    if metric.startswith("eval/"):
        wanted = metric.removeprefix("eval/")
        if wanted not in (*TASK_NAMES, CHATCORE):
            needs = "a task of --eval-tasks behind eval/"
        elif wanted not in tasks and CHATCORE not in tasks:
            needs = f"--eval-tasks {wanted}"
    elif not re.fullmatch(r"valid/(loss|bits_per_byte)(/.+)?", metric):
        needs = "valid/loss, valid/bits_per_byte, each perhaps with /SOURCE behind it, or eval/TASK"
    elif not run.train.eval_iters and (metric != CheckpointConfig.best_metric or run.train.early_stop_patience):
        needs = "--eval-iters (-1: all held-out rows) above 0"
    return [f"--best-metric {metric}: nothing measures it; expected {needs}. Add it, or name another."] if needs else []


def _recompute_problems(run: RunConfig) -> list[str]:
    train, num_layers, how, problems = run.train, run.model.num_layers, run.train.recompute_granularity, []
    if how == "full" and not (train.recompute_method and train.recompute_num_layers):
        problems.append("--recompute-granularity full needs --recompute-method uniform|block and --recompute-num-layers N.")
    elif how == "full" and train.recompute_method == "uniform":
        problems += [
            f"--recompute-method uniform: {layers} layers of a model chunk are no multiple of --recompute-num-layers "
            f"{train.recompute_num_layers}. Choose a divisor, or --recompute-method block."
            for layers in _chunk_layers(run)
            if layers % (train.recompute_num_layers or 1)
        ]
    if how != "full" and (train.recompute_method or train.recompute_num_layers):
        problems.append(
            "--recompute-method and --recompute-num-layers have no effect without --recompute-granularity full. Add it, or "
            "leave them out."
        )
    if how != "selective" and train.recompute_modules:
        problems.append("--recompute-modules has no effect without --recompute-granularity selective. Add it, or leave it out.")
    if num_layers and (train.recompute_num_layers or 0) > num_layers:
        problems.append(f"--recompute-num-layers {train.recompute_num_layers}: the model has {num_layers} layers. Lower it.")
    return problems


def data_problems(data: DataConfig) -> list[str]:
    """What is wrong with the data section alone, one sentence each."""
    problems = []
    if not data.train_data or "" in data.train_data:
        problems.append("no training data: expected --finetune-hf-dataset (or DATASET) with a file, a folder or a hub name.")
    if not data.tokenizer_model:
        problems.append("--tokenizer-model is missing: expected an HF folder, a hub name or a sentencepiece tokenizer.model.")
    if data.train_epochs and data.train_weights:
        problems.append("--prompt-data-epochs and --prompt-data-weights contradict each other. Give one of them.")
    for name, values in (("epochs", data.train_epochs), ("weights", data.train_weights)):
        if values and not any(values):
            problems.append(f"--prompt-data-{name} is {values}; expected one above 0. Raise one.")
    for name in ("train_names", "train_epochs", "train_weights"):
        count = len(getattr(data, name))
        if count and count != len(data.train_data):
            problems.append(f"{count} values of {name} for {len(data.train_data)} sources; expected one per source.")
    for name in data.train_names:
        if not name.isprintable():
            problems.append(
                f"--prompt-data {name!a}: expected a name that can be printed, as tables and metrics have it. Rename it."
            )
    if len(data.split) != 3 or not data.split[0]:
        problems.append(f"--split is {data.split}; expected shares of training, validation and test, the first above 0.")
    return problems


def _optim_problems(run: RunConfig) -> list[str]:
    optim, train = run.optim, run.train
    problems = []
    peak = optim.lr * optim.init_lr_frac
    said = f"--lr {optim.lr:g}" + (f" x --init-lr-frac {optim.init_lr_frac:g}" if optim.init_lr_frac != 1 else "")
    for name, value in (("--min-lr", lowest_rate(optim, optim.lr)), ("--lr-warmup-init", optim.lr_warmup_init)):
        if value > peak:
            problems.append(f"{name} {value:g} is above {said}. Lower it, or raise --lr.")
    if optim.final_lr_frac is not None and optim.min_lr:
        problems.append("--final-lr-frac and --min-lr both say where the rate ends. Give one of them.")
    if optim.unembedding_lr is not None and run.model.is_whole and run.model.share_embeddings_and_output_weights:
        problems.append("--unembedding-lr: the head is tied to the embeddings. Leave it out, or use --embedding-lr.")
    if optim.warmdown_ratio is not None and (optim.lr_warmup_fraction or 0) + optim.warmdown_ratio > 1:
        problems.append(
            f"--warmup-ratio {optim.lr_warmup_fraction:g} and --warmdown-ratio {optim.warmdown_ratio:g} are more than the whole "
            "schedule. Lower one."
        )
    problems += group_problems(optim)
    others = {group.optimizer for group in parameter_groups(optim)} - {"adam"} if not problems else set()
    if others and optim.use_precision_aware_optimizer:
        problems.append(f"--use-precision-aware-optimizer: expected adam alone, not {', '.join(sorted(others))}. Leave it out.")
    if optim.optimizer_offload_fraction != 1 and not optim.optimizer_cpu_offload:
        problems.append(
            f"--optimizer-offload-fraction {optim.optimizer_offload_fraction:g} has no effect without --optimizer-cpu-offload. "
            "Add it, or leave it out."
        )
    if "muon" in others and (run.lora.lora_rank or run.lora.lora_load):
        problems.append(
            "--optimizer muon with adapters: what is trained are factors, whose product it would have to orthogonalise. Expected "
            "adam or sgd. Use one of them."
        )
    narrow = [n for n in ("main_grads_dtype", "exp_avg_dtype", "exp_avg_sq_dtype") if getattr(optim, n) != "fp32"]
    if narrow and not (optim.use_precision_aware_optimizer and train.params_dtype == "bf16"):
        spelled = ", ".join(f"--{name.replace('_', '-')}" for name in narrow)
        problems.append(
            f"{spelled} bf16: expected --use-precision-aware-optimizer and --bf16 with it. Add them, or leave it out."
        )
    if optim.exp_avg_sq_dtype == "bf16" and optim.adam_beta2 > 0.98:
        problems.append(
            f"--exp-avg-sq-dtype bf16 with --adam-beta2 {optim.adam_beta2:g}: a step changes the moment by less than bf16 can "
            "hold (1 part in 256), so that it stands still. Use 0.98 or less, or fp32."
        )
    return problems + _schedule_problems(run)


def _schedule_problems(run: RunConfig) -> list[str]:
    """Lengths of the schedule, as far as flags alone say them; optim.py has the rest once the data is packed."""
    optim, train = run.optim, run.train
    problems = []
    samples = [n for n in ("lr_decay_samples", "lr_warmup_samples", "lr_wsd_decay_samples") if getattr(optim, n)]
    iters = [n for n in ("lr_decay_iters", "lr_warmup_iters", "lr_wsd_decay_iters") if getattr(optim, n)]
    if iters and (samples or train.train_samples):
        problems.append(
            f"{', '.join(map(flag_of, iters + samples))}: a schedule is in iterations or in samples, not both. Give all lengths "
            "in the run's unit."
        )
    if optim.lr_warmup_fraction is not None and (optim.lr_warmup_iters or optim.lr_warmup_samples):
        problems.append("--lr-warmup-fraction excludes --lr-warmup-iters and --lr-warmup-samples. Give one of them.")
    for unit, run_length in (("iters", train.train_iters), ("samples", train.train_samples)):
        decay, warmup, final = (getattr(optim, f"lr_{part}_{unit}") for part in ("decay", "warmup", "wsd_decay"))
        length, source = (decay, f"--lr-decay-{unit}") if decay else (run_length, f"--train-{unit}")
        problems += length_problems(unit, warmup, length, final, f"{source} {length}")
    lengths = [n for n in (*samples, *iters) if "wsd" in n]
    if optim.lr_decay_style == "WSD" and not lengths:
        problems.append(
            "--lr-decay-style WSD needs the length of its last part. Give --lr-wsd-decay-iters or --lr-wsd-decay-samples, such "
            "as a tenth of the run's length."
        )
    if optim.lr_decay_style != "WSD" and lengths:
        problems.append(f"{flag_of(lengths[0])} has no effect without --lr-decay-style WSD. Add it, or leave it out.")
    return problems


def length_problems(unit: str, warmup: int, decay: int | None, final: int | None, said: str) -> list[str]:
    """What is wrong with the parts of a schedule of `decay` iterations or samples; None is not known, or not there.

    Args:
        unit: iters or samples.
        warmup: length of the rise.
        decay: length of the whole schedule.
        final: WSD's last part.
        said: what gave `decay`, for the message: "--train-iters 20".
    """
    if decay is None:
        return []
    problems = []
    if warmup >= decay:
        problems.append(f"--lr-warmup-{unit} {warmup}: the schedule ends with {said}. Expected fewer; lower it, or train longer.")
    elif final and final > decay - warmup:
        problems.append(
            f"--lr-wsd-decay-{unit} {final}: {said} leave {decay - warmup} for it after the warm-up. Expected at most that; "
            "lower it."
        )
    return problems


def _folder_problems(checkpoint: CheckpointConfig) -> list[str]:
    problems = []
    for name in ("save_interval", "save_retain", "async_save"):
        if getattr(checkpoint, name) and not checkpoint.save:
            problems.append(f"{flag_of(name)} has no effect without --save. Add it, or leave it out.")
    if checkpoint.save and checkpoint.save_hf and os.path.realpath(checkpoint.save) == os.path.realpath(checkpoint.save_hf):
        problems.append(f"--save and --save-hf are both {checkpoint.save}. Give them folders of their own.")
    for flag, target in (("--save", checkpoint.save), ("--save-hf", checkpoint.save_hf)):
        if not target:
            continue
        if os.path.exists(os.path.join(target, "config.json")) and flag == "--save":
            problems.append(f"--save {target} is an HF folder; a checkpoint would mix with it. Choose another folder.")
        parent = os.path.abspath(target)
        while not os.path.exists(parent):
            parent = os.path.dirname(parent)
        if not os.path.isdir(parent) or not os.access(parent, os.W_OK):
            problems.append(f"{flag} {target}: {parent} cannot be written. Choose a folder that can be.")
    return problems


def _task_problems(tasks: TasksConfig) -> list[str]:
    names = list(dict.fromkeys(name.partition("/")[0] for name in TASK_NAMES))
    unknown = [name for name in tasks.eval_data if name not in names]
    return [f"--eval-data {name}=: no such task; expected one of {', '.join(names)}. Correct it." for name in unknown]


def _idle_task_problems(tasks: TasksConfig) -> list[str]:
    """Settings of an evaluation that does not take place."""
    alone = ("eval_max_problems", "eval_data", "eval_few_shots", "unsafe_code")
    named = [name for name in alone if getattr(tasks, name) and not tasks.eval_tasks]
    if tasks.eval_task_interval and not tasks.eval_tasks and not tasks.sample_prompts:
        named.append("eval_task_interval")
    return [f"{flag_of(name)} has no effect without --eval-tasks. Add it, or leave it out." for name in named]


def _allowed_problems(run: RunConfig) -> list[str]:
    """Names that --allow-changed cannot mean."""
    known = set(DATA_IDENTITY)
    for section in dataclasses.fields(run):
        for field in dataclasses.fields(getattr(run, section.name)):
            known |= {field.name, f"{section.name}.{field.name}"}
    unknown = [name for name in run.checkpoint.allow_changed if name not in known]
    expected = "expected names as run_config.json has them, such as train.global_batch_size or data_tokens"
    return [f"--allow-changed {name}: no such setting; {expected}. Take them from the refusal." for name in unknown]
