"""Flags whose spelling is not the name of a field of run.py, as tables. arguments.py makes the parser.

Every field `x_y` of run.py is a flag `--x-y` already, and so is every field of megatron-core's TransformerConfig.
"""

from collections.abc import Mapping
from typing import Any

SWITCHES: Mapping[str, tuple[tuple[str, Any], ...]] = {
    "--swiglu": (("model.activation", "silu"), ("model.gated_mlp", True)),
    "--squared-relu": (("model.activation", "squared_relu"), ("model.gated_mlp", False)),
    "--geglu": (("model.activation", "gelu_tanh"), ("model.gated_mlp", True)),
    "--quick-geglu": (("model.activation", "quick_gelu"), ("model.gated_mlp", True)),
    "--disable-bias-linear": (("model.add_bias_linear", False),),
    "--untie-embeddings-and-output-weights": (("model.share_embeddings_and_output_weights", False),),
    "--apply-layernorm-1p": (("model.norm_zero_centered", True),),
    "--use-rotary-position-embeddings": (("model.position_embedding_type", "rope"),),
    "--bf16": (("train.params_dtype", "bf16"),),
    "--fp32": (("train.params_dtype", "fp32"),),
    "--recompute-activations": (("train.recompute_granularity", "selective"),),
    "--no-check-for-nan-in-loss-and-grad": (("train.check_for_nan", False),),
    "--check-for-nan-in-loss-and-grad": (("train.check_for_nan", True),),
    "--rollout-shuffle": (("data.shuffle", True),),
    "--group-query-attention": (),
    "--accumulate-allreduce-grads-in-fp32": (("optim.main_grads_dtype", "fp32"),),
}
"""Flag without a value -> fields it sets."""

SPELLINGS: Mapping[str, str] = {
    "--num-experts": "core.num_moe_experts",
    "--max-length": "data.seq_length",
    "--rollout-batch-size": "train.global_batch_size",
    "--num-iterations": "train.train_iters",
    "--num-virtual-stages-per-pipeline-rank": "parallel.virtual_pipeline_model_parallel_size",
    "--finetune-data-split": "data.data_split",
    "--finetune-data-config": "data.data_config",
    "--chat-template-path": "data.chat_template",
    "--num-train-epochs": "train.num_epoch",
    "--total-epochs": "train.num_epoch",
    "--ulysses-sequence-parallel-size": "parallel.context_parallel_size",
    "--hybrid-layer-pattern": "core.hybrid_layer_pattern",
    "--hybrid-override-pattern": "core.hybrid_layer_pattern",
    "--tensorboard-logdir": "log.tensorboard_dir",
    "--prompt-data-epochs": "data.train_epochs",
    "--prompt-data-weights": "data.train_weights",
    "--label-smoothing-factor": "train.label_smoothing",
    "--warmup-ratio": "optim.lr_warmup_fraction",
    "--lr-warmup-steps-ratio": "optim.lr_warmup_fraction",
    "--warmup-steps-ratio": "optim.lr_warmup_fraction",
    "--min-lr-ratio": "optim.final_lr_frac",
    "--data": "own.prompts_path",
    "--lora-dim": "lora.lora_rank",
    "--target-modules": "lora.lora_target_modules",
    "--lora-target": "lora.lora_target_modules",
    "--adapter-path": "lora.lora_load",
    "--lora-adapter-path": "lora.lora_load",
    "--merge-lora": "lora.lora_merge",
}
"""Flag with a value -> the one field it is another name of."""

NOT_THE_SAME: Mapping[str, str] = {
    "train.global_batch_size": "both say how many packs a step has here, because no rows are made by a rollout. Give one number.",
}
"""Field that is no synonym in the project that one of its flags comes from: different values are an error, not an override."""

_KERNEL = "this project chooses kernels by what the machine has"
_TRUE = "that is how this project always works"
_NEVER_DRAWN = "weights are loaded, never drawn"
_NO_METRIC = "not a metric of this project"
_ON_DEVICE = "with --optimizer-cpu-offload the device computes the update, of states that come and go in slices"
_RL = "there is no rollout engine here: rows are read from files"
NO_EFFECT: Mapping[str, tuple[int, str]] = {
    "--use-mcore-models": (0, _TRUE),
    "--calculate-per-token-loss": (0, _TRUE),
    "--auto-detect-ckpt-format": (0, _TRUE),
    "--no-position-embedding": (0, "RoPE models have no position table"),
    "--no-masked-softmax-fusion": (0, _KERNEL),
    "--no-rope-fusion": (0, _KERNEL),
    "--no-bias-swiglu-fusion": (0, _KERNEL),
    "--no-bias-gelu-fusion": (0, _KERNEL),
    "--no-bias-dropout-fusion": (0, _KERNEL),
    "--no-gradient-accumulation-fusion": (0, _KERNEL),
    "--gradient-accumulation-fusion": (0, _KERNEL),
    "--apply-rope-fusion": (0, _KERNEL),
    "--masked-softmax-fusion": (0, _KERNEL),
    "--bias-activation-fusion": (0, _KERNEL),
    "--bias-dropout-fusion": (0, _KERNEL),
    "--moe-grouped-gemm": (0, _KERNEL),
    "--moe-permute-fusion": (0, _KERNEL),
    "--moe-router-fusion": (0, _KERNEL),
    "--moe-shared-expert-overlap": (0, _KERNEL),
    "--tp-comm-overlap": (0, _KERNEL),
    "--no-persist-layer-norm": (0, _KERNEL),
    "--use-cpu-initialization": (0, _NEVER_DRAWN),
    "--no-initialization": (0, _NEVER_DRAWN),
    "--moe-per-layer-logging": (0, _NO_METRIC),
    "--log-timers-to-tensorboard": (0, "perf/step_ms and data/wait_ms are always there"),
    "--exit-on-missing-checkpoint": (0, _TRUE),
    "--manual-gc": (0, "Python collects when it has to"),
    "--manual-gc-interval": (1, "Python collects when it has to"),
    "--cross-entropy-loss-fusion": (0, "the loss is always fused with the head"),
    "--cross-entropy-fusion-impl": (1, "the loss is always fused with the head"),
    "--use-fused-weighted-squared-relu": (0, _KERNEL),
    "--attention-softmax-in-fp32": (0, "softmax is always in fp32"),
    "--use-flash-attn": (0, _KERNEL),
    "--export-te-mcore-model": (0, "checkpoints have one set of names with and without TransformerEngine"),
    "--export-force-local-attention": (0, _KERNEL),
    "--export-default-te-spec": (0, _KERNEL),
    "--export-model-type": (1, "the model type follows from the architecture"),
    "--export-qk-l2-norm": (0, "it follows from the checkpoint's config.json"),
    "--export-moe-apply-probs-on-input": (0, "it follows from the checkpoint's config.json"),
    "--enable-gpt-oss": (0, "it follows from the checkpoint's config.json"),
    "--modelopt-enabled": (0, "there is no quantisation state here"),
    "--sft": (0, _TRUE),
    "--use-checkpoint-args": (0, _TRUE),
    "--use-dist-ckpt": (0, _TRUE),
    "--ckpt-format": (1, "checkpoints are torch_dist; others are recognised when loaded"),
    "--dist-ckpt-format": (1, "checkpoints are torch_dist; others are recognised when loaded"),
    "--use-persistent-ckpt-worker": (0, "the writer of --async-save needs no worker of its own"),
    "--disable-gloo-process-groups": (0, "gloo groups cost nothing"),
    "--enable-experimental": (0, "nothing here depends on it"),
    "--log-throughput": (0, _TRUE),
    "--log-params-norm": (0, _NO_METRIC),
    "--log-num-zeros-in-grad": (0, _NO_METRIC),
    "--timing-log-level": (1, "there are no timers"),
    "--dataloader-type": (1, "order is a function of seed, epoch and consumed samples"),
    "--num-dataset-builder-threads": (1, "see --num-workers"),
    "--tiktoken-pattern": (1, "tokenizers are Hugging Face or sentencepiece ones"),
    "--trust-local-cache": (0, _TRUE),
    "--disable-compute-advantages-and-returns": (0, _RL),
    "--debug-train-only": (0, _RL),
    "--rollout-function-path": (1, _RL),
    "--n-samples-per-prompt": (1, _RL),
    "--use-remove-padding": (0, "rows are always packed without padding"),
    "--rotary-seq-len-interpolation-factor": (1, "RoPE scaling follows from the checkpoint's config.json"),
    "--disable-tqdm": (0, "the bar shows only in a terminal"),
    "--init-model-with-meta-device": (0, "weights are never initialised twice"),
    "--use-torch-optimizer-for-cpu-offload": (0, _ON_DEVICE),
    "--overlap-cpu-optimizer-d2h-h2d": (0, _ON_DEVICE),
    "--no-pin-cpu-grads": (0, _ON_DEVICE),
    "--no-pin-cpu-params": (0, _ON_DEVICE),
    "--distributed-timeout-seconds-after-init": (1, "see --distributed-timeout-minutes"),
}
"""Accepted flag -> (number of values, why it has no effect here). A line is printed for each reason."""

PROBLEMS: Mapping[str, str] = {
    "--fp16": "fp16 needs loss scaling, which this project does not have. Use --bf16.",
    "--main-params-dtype": "master weights are always fp32. Leave it out.",
    "--batch-size": "unknown flag. Packs a step are --global-batch-size, packs a forward pass --micro-batch-size.",
    "--learning-rate": "unknown flag. It is --lr here.",
    "--epochs": "unknown flag. It is --num-epoch here.",
}
"""Known flag that cannot work -> what to do."""

_ONE_PRECISION = "layers compute in bf16 or fp32 alone here. Leave it out, and use --bf16."
_ALL_TOKENS = "experts take every token that is routed to them here, in every layout. Leave it out."
_NO_SUCH_MODEL = "no model here has it. Leave it out."
REFUSED: Mapping[str, str] = {
    r"fp[48]|(fp[48]|kitchen|use-kitchen|num-layers-at|first-last-layers)-.*|use-kitchen|quant-recipe": _ONE_PRECISION,
    r"mtp-.*": "further tokens are not predicted here: such layers of a checkpoint are left as they are. Leave it out.",
    r"qk-clip.*": "attention scores are not clipped here. Leave it out; --clip-grad limits the gradient.",
    r"(cpu|fine-grained-activation|fine-grained|activation)-offload.*|offload-.*|min-offloaded-.*": (
        "activations stay on the device here. Leave it out, and use --recompute-granularity."
    ),
    r"(no-)?muon-(num-ns-steps|scale-mode|tp-mode|split-qkv|use-nesterov|fp32-matmul-prec|extra-scale-factor|coefficient-type)": (
        "muon has five Nesterov steps on whole matrices, each part of a fused one alone. Leave it out; see --muon-variant."
    ),
    r"(distribute-saved-activations|moe-layer-recompute|num-microbatches-with-partial-activation-checkpoints)": (
        "no such recomputation here. Use --sequence-parallel, or --recompute-granularity with --recompute-modules."
    ),
    r"tp-comm-.*|symmetric-ar-type|(enable-|external-)?cuda-graph.*|delay-wgrad-.*|defer-embedding-.*|wgrad-deferral-.*"
    r"|overlap-moe-.*|ep-overlap-.*|moe-(enable-deepep|deepep-.*|hybridep-.*|flex-.*|ncclep-.*)": (
        "no such overlap or graph here. Leave it out; --overlap-grad-reduce and --overlap-param-gather are there."
    ),
    r"moe-(expert-capacity-factor|pad-expert-.*|token-drop.*|expert-rank-.*)": _ALL_TOKENS,
    r"moe-(input-jitter-.*|router-force-.*|router-topk-limited-.*)": "it would route tokens to other experts. Leave it out.",
    r"(moe-shared-expert-gate|attention-output-gate|experimental-attention-.*|(dsa|linear|mup)-.*|use-mup|mrope-section"
    r"|apply-query-key-layer-scaling|fp32-residual-connection|apply-residual-connection-post-layernorm)": _NO_SUCH_MODEL,
    r"(account-for-.*-in-pipeline-split|pipeline-model-parallel-layout)": (
        "stages are cut by layers. Use --decoder-first-pipeline-num-layers and --decoder-last-pipeline-num-layers."
    ),
    r"inference-.*|flash-decode|cache-mla-latents": "generation here has no such setting. Leave it out.",
}
"""Pattern of flags, without --, of what this project does not do -> why, and what to do."""
