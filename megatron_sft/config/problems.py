"""Contradictions in a configuration, one sentence each, found before anything is read.

`problems(run, world_size)` returns all of them at once; an empty list means that the run can start. What needs the
checkpoint or the data comes later.
"""

import dataclasses
import os
import sys

from megatron_sft.config.run import DATA_IDENTITY, CheckpointConfig, DataConfig, ModelConfig, ParallelConfig, RunConfig


def problems(run: RunConfig, world_size: int, training: bool = True) -> list[str]:
    """Every contradiction in a configuration, one sentence each; what needs the checkpoint or the data comes later.

    Args:
        run: as the flags say it.
        world_size: processes.
        training: False for commands that only read a model (generate, mmlu).
    """
    found = _layout_problems(run, world_size)
    if training:
        found += _training_problems(run) + _optim_problems(run) + _folder_problems(run.checkpoint)
        found += _allowed_problems(run)
    return found


def _layout_problems(run: RunConfig, world_size: int) -> list[str]:
    parallel, model = run.parallel, run.model
    tp, pp = parallel.tensor_model_parallel_size, parallel.pipeline_model_parallel_size
    cp, ep = parallel.context_parallel_size, parallel.expert_model_parallel_size
    found = []
    if world_size % parallel.model_parallel_size:
        found.append(
            f"{world_size} processes cannot be cut into TP {tp} x PP {pp} x CP {cp} = {parallel.model_parallel_size}. "
            "Start a multiple of it, or change --tensor-, --pipeline- or --context-parallel-size."
        )
    elif world_size // pp % (ep * parallel.expert_tensor_parallel_size):
        found.append(
            f"{world_size // pp} processes a pipeline stage cannot be cut into EP {ep} x ETP "
            f"{parallel.expert_tensor_parallel_size}. Change --expert-model-parallel-size, or "
            "--expert-tensor-parallel-size (TP's where it is not given)."
        )
    found += _division_problems(run)
    for name, value in (("num_attention_heads", model.num_attention_heads), ("num_query_groups", model.num_query_groups)):
        if value % tp and not (name == "num_query_groups" and tp % value == 0):
            flag = f"--{name.replace('_', '-')}"
            found.append(f"--tensor-model-parallel-size {tp} does not divide {flag} {value}. Choose one that does.")
    if parallel.virtual_pipeline_model_parallel_size and pp == 1:
        found.append("virtual pipeline stages need --pipeline-model-parallel-size 2 or more.")
    if cp > 1 and parallel.cp_comm_type == "p2p":
        found.append("--cp-comm-type p2p needs TransformerEngine. Use a2a (heads divisible by CP x TP) or allgather.")
    found += _head_problems(model, parallel)
    if model.norm_placement != "pre" and model.add_bias_linear:
        found.append(f"--norm-placement {model.norm_placement} with biases: expected none. Add --disable-bias-linear.")
    if model.core.get("attention_dropout"):
        found.append(f"--attention-dropout {model.core['attention_dropout']}: attention here has none. Leave it out, or give 0.")
    if parallel.overlap_param_gather and not parallel.use_distributed_optimizer:
        found.append("--overlap-param-gather needs --use-distributed-optimizer. Add it.")
    if parallel.overlap_param_gather and not parallel.overlap_grad_reduce:
        found.append("--overlap-param-gather needs --overlap-grad-reduce. Add it.")
    return found


def _division_problems(run: RunConfig) -> list[str]:
    """Layers over pipeline stages, experts over EP, the MLP over TP: what megatron-core only asserts."""
    parallel, model = run.parallel, run.model
    found = []
    ends = (parallel.decoder_first_pipeline_num_layers, parallel.decoder_last_pipeline_num_layers)
    stages = parallel.pipeline_model_parallel_size - sum(1 for layers in ends if layers is not None)
    layers = model.num_layers - sum(layers or 0 for layers in ends)
    chunks = stages * (parallel.virtual_pipeline_model_parallel_size or 1)
    if model.num_layers and (layers < 0 or (layers % chunks if stages else layers)):
        found.append(
            f"{layers} layers cannot be cut into {chunks} equal pipeline stages. Change --pipeline-model-parallel-size, or use "
            "--decoder-first-pipeline-num-layers and --decoder-last-pipeline-num-layers."
        )
    experts, ep = model.core.get("num_moe_experts") or 0, parallel.expert_model_parallel_size
    if experts % ep:
        found.append(f"--expert-model-parallel-size {ep} does not divide --num-experts {experts}. Choose one that does.")
    if experts and model.add_bias_linear and parallel.expert_tensor_parallel_size > 1:
        etp = parallel.expert_tensor_parallel_size
        found.append(f"--expert-tensor-parallel-size {etp}: megatron-core cuts no expert that has biases. Use 1 (ETP=1).")
    tp = parallel.tensor_model_parallel_size
    widths = {"--ffn-hidden-size": model.ffn_hidden_size}
    if model.core.get("multi_latent_attention"):
        latent = ("kv_lora_rank", "qk_pos_emb_head_dim")
        widths["--kv-lora-rank + --qk-pos-emb-head-dim"] = sum(model.core.get(name, 0) for name in latent)
        widths["--q-lora-rank"] = model.core.get("q_lora_rank") or 0
    for flag, width in widths.items():
        if width % tp:
            found.append(f"--tensor-model-parallel-size {tp} does not divide {flag} {width}. Choose one that does.")
    return found


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
    found = []
    way_out = "Change --context-parallel-size, or use --cp-comm-type allgather."
    if model.num_attention_heads % (tp * cp):
        found.append(
            f"--cp-comm-type a2a: --num-attention-heads {model.num_attention_heads} is not a multiple of "
            f"--tensor-model-parallel-size {tp} x --context-parallel-size {cp}. {way_out}"
        )
    groups = max(model.num_query_groups // tp, 1)  # of one tensor-parallel rank
    if model.num_query_groups and groups % cp and cp % groups:
        found.append(
            f"--cp-comm-type a2a: {groups} of --num-query-groups {model.num_query_groups} on a tensor-parallel rank; "
            f"expected a multiple or a divisor of --context-parallel-size {cp}. {way_out}"
        )
    return found


def _training_problems(run: RunConfig) -> list[str]:
    train, data = run.train, run.data
    found = []
    for name in ("micro_batch_size", "global_batch_size", "max_tokens_per_gpu", "train_iters", "train_samples", "num_epoch"):
        value = getattr(train, name)
        if value is not None and value <= 0:
            found.append(f"--{name.replace('_', '-')} is {value}; expected a positive number.")
    found += data_problems(data)
    tp = run.parallel.tensor_model_parallel_size
    if run.model.core.get("num_moe_experts") and tp > 1 and not run.parallel.sequence_parallel:
        found.append(f"--tensor-model-parallel-size {tp} with experts needs --sequence-parallel (megatron-core). Add it.")
    if train.max_tokens_per_gpu and train.max_tokens_per_gpu < data.seq_length:
        found.append(
            f"--max-tokens-per-gpu {train.max_tokens_per_gpu} is below --seq-length {data.seq_length}: a pack would not fit. "
            "Raise it, or lower --seq-length."
        )
    if train.loss_spike_factor is not None and train.loss_spike_factor <= 1:
        found.append(f"--loss-spike-factor is {train.loss_spike_factor}; expected a number above 1, such as 3.")
    if train.recompute_granularity == "full" and not (train.recompute_method and train.recompute_num_layers):
        found.append("--recompute-granularity full needs --recompute-method uniform|block and --recompute-num-layers N.")
    elif train.recompute_granularity == "full" and train.recompute_method == "uniform":
        found += [
            f"--recompute-method uniform: {layers} layers of a model chunk are no multiple of --recompute-num-layers "
            f"{train.recompute_num_layers}. Choose a divisor, or --recompute-method block."
            for layers in _chunk_layers(run)
            if layers % (train.recompute_num_layers or 1)
        ]
    return found


def data_problems(data: DataConfig) -> list[str]:
    """What is wrong with the data section alone, one sentence each."""
    found = []
    if not data.train_data:
        found.append("no training data: expected --finetune-hf-dataset (or DATASET) with a file, a folder or a hub name.")
    if not data.tokenizer_model:
        found.append("--tokenizer-model is missing: expected an HF folder, a hub name or a sentencepiece tokenizer.model.")
    if data.seq_length <= 1:
        found.append(f"--seq-length is {data.seq_length}; expected 2 or more.")
    if data.max_bad_rows < 0:
        found.append(f"--max-bad-rows is {data.max_bad_rows}; expected 0 or more.")
    if data.train_epochs and data.train_weights:
        found.append("--prompt-data-epochs and --prompt-data-weights contradict each other. Give one of them.")
    most = sys.float_info.max  # what infinity and nan are not below
    for flag, values, limit in (("epochs", data.train_epochs, 1000.0), ("weights", data.train_weights, most)):
        if values and (not all(0 <= value <= limit for value in values) or not any(values)):
            found.append(f"--prompt-data-{flag} is {values}; expected numbers from 0 to {limit:g}, one above 0.")
    for name in ("train_names", "train_epochs", "train_weights"):
        count = len(getattr(data, name))
        if count and count != len(data.train_data):
            found.append(f"{count} values of {name} for {len(data.train_data)} sources; expected one a source.")
    if not all(0 <= share <= most for share in data.split) or not data.split[0]:
        found.append(f"--split is {data.split}; expected a positive share for training, none below 0.")
    return found


def _optim_problems(run: RunConfig) -> list[str]:
    optim, train = run.optim, run.train
    found = []
    if optim.lr < 0 or optim.min_lr < 0 or optim.min_lr > optim.lr:
        found.append(f"--lr {optim.lr:g} and --min-lr {optim.min_lr:g}: expected 0 <= --min-lr <= --lr.")
    narrow = [n for n in ("main_grads_dtype", "exp_avg_dtype", "exp_avg_sq_dtype") if getattr(optim, n) != "fp32"]
    if narrow and not (optim.use_precision_aware_optimizer and train.params_dtype == "bf16"):
        spelled = ", ".join(f"--{name.replace('_', '-')}" for name in narrow)
        found.append(f"{spelled} bf16: expected --use-precision-aware-optimizer and --bf16 with it. Add them, or leave it out.")
    if optim.exp_avg_sq_dtype == "bf16" and optim.adam_beta2 > 0.98:
        found.append(
            f"--exp-avg-sq-dtype bf16 with --adam-beta2 {optim.adam_beta2:g}: a step changes the moment by less than bf16 can "
            "hold (1 part in 256), so that it stands still. Use 0.98 or less, or fp32."
        )
    samples = [n for n in ("lr_decay_samples", "lr_warmup_samples", "lr_wsd_decay_samples") if getattr(optim, n)]
    iters = [n for n in ("lr_decay_iters", "lr_warmup_iters", "lr_wsd_decay_iters") if getattr(optim, n)]
    spelled = ", ".join("--" + name.replace("_", "-") for name in iters + samples)
    if iters and (samples or train.train_samples):
        found.append(f"{spelled}: a schedule is in iterations or in samples, not both. Give all lengths in the run's unit.")
    if optim.lr_warmup_fraction is not None and (optim.lr_warmup_iters or optim.lr_warmup_samples):
        found.append("--lr-warmup-fraction excludes --lr-warmup-iters and --lr-warmup-samples. Give one of them.")
    return found


def _folder_problems(checkpoint: CheckpointConfig) -> list[str]:
    found = []
    if checkpoint.save and checkpoint.save_hf and os.path.realpath(checkpoint.save) == os.path.realpath(checkpoint.save_hf):
        found.append(f"--save and --save-hf are both {checkpoint.save}. Give them folders of their own.")
    for flag, target in (("--save", checkpoint.save), ("--save-hf", checkpoint.save_hf)):
        if not target:
            continue
        if os.path.exists(os.path.join(target, "config.json")) and flag == "--save":
            found.append(f"--save {target} is an HF folder; a checkpoint would mix with it. Choose another folder.")
        parent = os.path.abspath(target)
        while not os.path.exists(parent):
            parent = os.path.dirname(parent)
        if not os.path.isdir(parent) or not os.access(parent, os.W_OK):
            found.append(f"{flag} {target}: {parent} cannot be written. Choose a folder that can be.")
    return found


def _allowed_problems(run: RunConfig) -> list[str]:
    """Names that --allow-changed cannot mean."""
    known = set(DATA_IDENTITY)
    for section in dataclasses.fields(run):
        for field in dataclasses.fields(getattr(run, section.name)):
            known |= {field.name, f"{section.name}.{field.name}"}
    unknown = [name for name in run.checkpoint.allow_changed if name not in known]
    expected = "expected names as run_config.json has them, such as train.global_batch_size or data_tokens"
    return [f"--allow-changed {name}: no such setting; {expected}. Take them from the refusal." for name in unknown]
