"""What a run is: frozen dataclasses, one a concern.

Not here: what contradicts what (problems.py), flag spellings (arguments.py), anything that changes while training
(train/state.py).
"""

import dataclasses
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Annotated, Any, Self

from megatron_sft.config.core_fields import (
    RECORD_OF,
    RECORDS,
    CoreArchitecture,
    CoreTraining,
    Layers,
    MambaConfig,
    MLAConfig,
    MoEConfig,
    record_fields,
)
from megatron_sft.config.fields import (
    Amount,
    Batch,
    Count,
    Kind,
    Length,
    Number,
    Parts,
    Precision,
    Seed,
    Share,
    Weight,
    Words,
    kinds,
)
from megatron_sft.config.log import LogConfig
from megatron_sft.config.lora import LoraConfig
from megatron_sft.config.optim import OptimConfig
from megatron_sft.config.tasks import TasksConfig
from megatron_sft.errors import CheckpointError

RecomputedModule = Annotated[str, Words("core_attn", "layernorm", "mla_up_proj", "mlp", "moe", "shared_experts")]

ATTENTION_BACKENDS = ("auto", "flash", "flash2", "flash3", "flash4", "cudnn", "flex", "sdpa", "fused", "unfused", "local")
"""flash, fused, unfused and local are Megatron's: chosen as auto."""

DATA_IDENTITY = ("data_tokens", "data_packs")
"""What run_config.json says of the data beside the flags: sha256 of all tokens and masks; of the packs and their order."""

BASE_IDENTITY = "base_weights"
"""What it says of the weights that an adapter belongs to, as does the header of a PEFT folder's file: their fingerprint."""


@dataclass(frozen=True)
class ModelConfig:
    """Architecture of a decoder-only transformer, in Megatron's words. One value a field; nothing is derived later."""

    num_layers: Parts = 0
    """Transformer layers over all pipeline stages."""
    hidden_size: Count = 0
    """Width of the residual stream."""
    ffn_hidden_size: Count = 0
    """Width of the dense MLP (of one of its two halves when gated)."""
    num_attention_heads: Count = 0
    """Query heads."""
    num_query_groups: Count = 0
    """Key/value heads; equal to num_attention_heads without grouped-query attention."""
    kv_channels: Count = 0
    """Width of one head."""
    vocab_size: Count = 0
    """Rows of the embedding table of the HF checkpoint; the table here may be padded beyond it (padded_vocab_size)."""
    padded_vocab_size: Annotated[Amount, "rows"] = 0
    """Rows of the embedding table here, over all tensor-parallel ranks. 0: the smallest that TP divides."""
    make_vocab_size_divisible_by: Annotated[int, Number(1, 2**20)] = 1
    """padded_vocab_size, where it is not given, is the smallest multiple of this times TP."""
    max_position_embeddings: Annotated[Count, "tokens"] = 0
    """Longest position that the model was made for."""
    normalization: Annotated[str, Words("RMSNorm", "LayerNorm")] = "RMSNorm"
    """RMSNorm or LayerNorm."""
    norm_epsilon: Annotated[float, Number(0, 1)] = 1e-5
    """Added to the variance in every norm."""
    norm_zero_centered: bool = False
    """Norm weights are stored as w - 1 (Gemma, Nemotron: --apply-layernorm-1p)."""
    activation: Annotated[str, Words("silu", "gelu", "gelu_tanh", "squared_relu", "quick_gelu")] = "silu"
    """silu, gelu, gelu_tanh, squared_relu or quick_gelu (gpt-oss)."""
    gated_mlp: bool = True
    """Two halves of linear_fc1, one gating the other (--swiglu)."""
    add_bias_linear: bool = False
    """Biases on linear_proj, linear_fc1 and linear_fc2 (and on linear_qkv)."""
    add_qkv_bias: bool = False
    """Bias on linear_qkv alone (Qwen2)."""
    qk_layernorm: bool = False
    """A norm over each head's query and key, before RoPE (Qwen3)."""
    share_embeddings_and_output_weights: bool = True
    """Tied embeddings. False: --untie-embeddings-and-output-weights."""
    position_embedding_type: Annotated[str, Words("rope", "yarn", "none")] = "rope"
    """rope, yarn or none."""
    rotary_base: Annotated[float, Number(1, 1e12)] = 10000.0
    """RoPE theta."""
    rotary_percent: Share = 1.0
    """Share of each head that RoPE turns."""
    rope_scaling: Mapping[str, Any] | None = None
    """HF's rope_scaling ({"rope_type": "llama3" | "linear" | "yarn", "factor": ...}); None without scaling."""
    window_size: Annotated[Count, "tokens"] | None = None
    """Sliding attention window in tokens, this one included; None: full attention."""
    window_layers: tuple[bool, ...] = ()
    """Per layer: uses window_size. Empty: every layer does when window_size is set."""
    rotary_base_local: Annotated[float, Number(1, 1e12)] | None = None
    """RoPE theta, unscaled, of the layers with a window (Gemma 3); None: rotary_base for all."""
    attention_chunk_size: Annotated[Count, "tokens"] | None = None
    """Tokens see only their own chunk of this many in layers with RoPE (Llama 4)."""
    no_rope_freq: Layers | list[Layers] | None = None
    """Every n-th layer has no RoPE, or a list with 1 where one has none."""
    rotary_interleaved: bool = False
    """RoPE turns neighbours, not halves (Llama 4)."""
    attn_temperature_scale: Annotated[float, Number(0, 1000)] | None = None
    """In layers without RoPE queries are multiplied by 1 + scale x log(1 + floor((position + 1) / floor)) (Llama 4)."""
    attn_temperature_floor: Annotated[Count, "tokens"] = 8192
    """Positions of one step of it."""
    norm_placement: Annotated[str, Words("pre", "pre_post", "post")] = "pre"
    """pre; pre_post: also over the outputs of attention and MLP before they are added (Gemma); post: only there (OLMo-2)."""
    qk_layernorm_full: bool = False
    """The query norm and the key norm each span all heads together (OLMo-2)."""
    embedding_scale: Annotated[float, Number(1e-6, 1e6)] | None = None
    """Embeddings are multiplied by it (Gemma: the square root of hidden_size)."""
    softmax_scale: Annotated[float, Number(1e-6, 1e6)] | None = None
    """Attention scores are multiplied by it; not given: 1 / sqrt(head width)."""
    attn_logit_softcapping: Annotated[float, Number(1e-3, 1e6)] | None = None
    """Attention scores become cap * tanh(score / cap) (Gemma 2)."""
    final_logit_softcapping: Annotated[float, Number(1e-3, 1e6)] | None = None
    """The same for the logits."""
    init_method_std: Annotated[float, Number(0, 10)] = 0.02
    """Standard deviation of fresh weights."""
    moe: MoEConfig = MoEConfig()
    mla: MLAConfig = MLAConfig()
    mamba: MambaConfig = MambaConfig()
    core: Mapping[str, Any] = field(default_factory=dict)
    """Other fields of megatron-core's TransformerConfig that have an effect here (core_fields.py), passed through unread."""

    @property
    def is_whole(self) -> bool:
        """The architecture is complete: flags alone may leave out what a checkpoint says."""
        return bool(self.num_layers and self.hidden_size and self.vocab_size and self.padded_vocab_size)

    def with_core(self, values: Mapping[str, Any]) -> Self:
        """The model with fields of megatron-core's TransformerConfig set by name, each in its place: a record, here or `core`."""
        places: dict[str, dict[str, Any]] = {name: {} for name in ("", "core", *RECORDS)}
        for name, value in values.items():
            places["" if name in OWN_CORE else RECORD_OF.get(name, "core")][name] = value
        records = {name: dataclasses.replace(getattr(self, name), **places[name]) for name in RECORDS}
        return dataclasses.replace(self, **places[""], **records, core={**self.core, **places["core"]})

    def core_fields(self) -> dict[str, Any]:
        """What with_core makes the same model of: fields of the parts that it has, and all that is not the default."""
        own = {name: getattr(self, name) for name in OWN_CORE if getattr(self, name) not in (None, False)}
        records = {name: value for record in RECORDS for name, value in record_fields(getattr(self, record)).items()}
        return {**own, **records, **self.core}


OWN_CORE = ("no_rope_freq", "rotary_interleaved", "softmax_scale")
"""Fields of ModelConfig that are megatron-core's by name, meaning and default."""
EFFECTIVE: Mapping[str, Kind] = {name: kinds(ModelConfig)[name] for name in OWN_CORE} | {
    name: kind for part in (*RECORDS.values(), CoreArchitecture, CoreTraining) for name, kind in kinds(part).items()
}
"""{field of TransformerConfig: what it may be}"""


def model_config_from_json(values: Mapping[str, Any]) -> ModelConfig:
    """The ModelConfig whose dataclasses.asdict went through JSON; older releases had all names of megatron-core in `core`.

    Raises:
        CheckpointError: unknown keys, which are of a later release.
    """
    records = [values.get(name, {}) for name in RECORDS]
    unknown = values.keys() - {field.name for field in dataclasses.fields(ModelConfig)}
    unknown |= {name for record in records for name in record.keys() - RECORD_OF.keys()}
    if unknown:
        raise CheckpointError(
            f"run_config.json: unknown model settings {', '.join(sorted(unknown))}; expected those of this release. "
            "Use the release of megatron-sft that wrote the checkpoint, or a newer one."
        )
    plain = {name: value for name, value in values.items() if name not in RECORDS and name != "core"}
    model = ModelConfig(**{**plain, "window_layers": tuple(values.get("window_layers", ()))})
    for part in (values.get("core", {}), *records):
        model = model.with_core(part)
    return model


@dataclass(frozen=True)
class ParallelConfig:
    """How the model and the data are cut over processes. Data parallel is what remains of the world size."""

    tensor_model_parallel_size: Annotated[Count, "processes"] = 1
    """Each layer is cut over so many (TP)."""
    pipeline_model_parallel_size: Annotated[Count, "processes"] = 1
    """The layers are dealt to so many stages (PP)."""
    virtual_pipeline_model_parallel_size: Annotated[Count, "chunks"] | None = None
    """Model chunks per pipeline rank."""
    context_parallel_size: Annotated[Count, "processes"] = 1
    """Each pack is cut over so many (CP)."""
    expert_model_parallel_size: Annotated[Count, "processes"] = 1
    """The experts are dealt to so many (EP)."""
    expert_tensor_parallel_size: Annotated[Count, "processes"] = 1
    """Each expert is cut over so many (ETP). On a command line without it: the tensor-parallel size."""
    sequence_parallel: bool = False
    """Activations between tensor-parallel regions are cut along the sequence."""
    cp_comm_type: Annotated[str, Words("a2a", "allgather", "p2p")] = "a2a"
    """a2a or allgather (ours); p2p needs TransformerEngine."""
    use_distributed_optimizer: bool = False
    """Optimizer states are dealt over the data-parallel processes."""
    overlap_grad_reduce: bool = False
    """Gradients are reduced while the backward pass goes on."""
    overlap_param_gather: bool = False
    """Parameters are gathered while the forward pass goes on."""
    distributed_timeout_minutes: Annotated[int, Number(1, 10**6), "minutes"] = 30
    """An operation between processes may take so long."""
    stall_timeout_s: Annotated[float, Number(1, 1e6, also=(0,)), "seconds"] = 20.0
    """Silence after which a rank counts as stalled and every rank ends; work of any length is no silence. 0: never."""
    distributed_backend: Annotated[str, Words("nccl", "gloo")] | None = None
    """nccl or gloo; None: nccl on CUDA, gloo elsewhere."""
    decoder_first_pipeline_num_layers: Annotated[Count, "layers"] | None = None
    """Of the first stage, where the stages are not equal."""
    decoder_last_pipeline_num_layers: Annotated[Count, "layers"] | None = None
    """Of the last stage."""

    @property
    def model_parallel_size(self) -> int:
        """Processes that hold one copy of the dense model (tensor x pipeline x context)."""
        return self.tensor_model_parallel_size * self.pipeline_model_parallel_size * self.context_parallel_size


@dataclass(frozen=True)
class DataConfig:
    """What is read, how it becomes tokens and masks, and how it is packed."""

    train_data: tuple[str, ...] = ()
    """Files, folders or hub names, read in this order. More than one source: train_names tells them apart."""
    train_names: tuple[str, ...] = ()
    """One name a source (--prompt-data NAME PATH ...); empty: the file stems."""
    train_epochs: tuple[Annotated[float, Number(0, 1000)], ...] = ()
    """Passes over each source in one epoch of the mixture (--prompt-data-epochs); empty: 1 each."""
    train_weights: tuple[Weight, ...] = ()
    """Shares of the sources' documents in one epoch, instead of train_epochs (--prompt-data-weights)."""
    valid_data: tuple[Annotated[str, "place"], ...] = ()
    """Held-out sources, in place of the validation share of split. What is trained on does not depend on them."""
    split: tuple[Weight, Weight, Weight] = (100.0, 0.0, 0.0)
    """Shares of the rows for training, validation and test; only the first is trained on, test rows are not read."""
    data_split: str = "train"
    """Split that is read of a hub data set, or of a folder whose files are named for splits (--finetune-data-split)."""
    data_config: str | None = None
    """Configuration of hub data sets that have several (--finetune-data-config); NAME:CONFIG says it of one of them."""
    tokenizer_model: Annotated[str, "place"] = ""
    """Folder or hub name (see --load) of the Hugging Face tokenizer, or a sentencepiece tokenizer.model file."""
    chat_template: str | None = None
    """Jinja text or file that replaces the tokenizer's own template."""
    trust_remote_code: bool = False
    """A tokenizer or data set may bring code of its own, which is run."""
    seq_length: Annotated[int, Number(2, 2**24), "tokens"] = 4096
    """Of a pack."""
    packing: Annotated[str, Words("best-fit", "sequential", "none")] = "best-fit"
    """best-fit, sequential or none."""
    truncation: Annotated[str, Words("error", "right", "left", "drop", "split")] = "right"
    """Rows longer than seq_length: error, right (keep the beginning, as Megatron-LM), left, drop or split; all counted."""
    train_on: Annotated[str, Words("assistant", "last-turn", "all")] = "assistant"
    """assistant, last-turn or all."""
    train_on_tool_calls: bool = True
    """Tool calls of the assistant are trained."""
    history_thinking: Annotated[str, Words("keep", "drop", "mask", "expand")] = "keep"
    """Reasoning of earlier answers: keep (where the template can), drop, mask (not trained) or expand (a sample an answer)."""
    empty_thinking: Annotated[str, Words("train", "mask")] = "train"
    """Empty <think> blocks that the template writes before answers without reasoning: train or mask."""
    special_in_content: Annotated[str, Words("keep", "error", "text")] = "keep"
    """Special tokens such as <|im_end|> in what somebody says: keep (counted), error, or text (ordinary characters)."""
    role_map: Mapping[str, str] = field(default_factory=dict)
    """Roles of the rows as ours: bot=assistant human=user."""
    data_schema: Annotated[str, Words("messages", "alpaca", "pair", "text")] | None = None
    """messages (also ShareGPT's), alpaca, pair or text; None: detected row by row and reported."""
    input_key: str | None = None
    """Column that holds the messages; None: detected."""
    tool_key: str = "tools"
    """Column that holds the tools."""
    prompt_key: str | None = None
    """Column of the prompt, in rows without messages; None: detected."""
    response_key: str | None = None
    """Column of the response; None: detected."""
    prompt_dict_keys: tuple[str, ...] = ()
    """Keys within the prompt column, where that holds a mapping."""
    response_dict_keys: tuple[str, ...] = ()
    """Keys within the response column."""
    custom_dataset: str | None = None
    """FILE.py:CLASS of a row source of the user's own."""
    max_bad_rows: Annotated[Amount, "rows"] = 0
    """Bad rows that may be set aside (quarantined in a file) before the run is refused."""
    reset_position_ids: bool = True
    """Position ids restart at every conversation."""
    reset_attention_mask: bool = True
    """Conversations in a pack do not see each other."""
    eod_mask_loss: bool = True
    """No loss on the step from one conversation to the next."""
    shuffle: bool = True
    """Packs are shuffled anew every epoch."""
    seed: Seed = 1234
    """Of order, packs and --split; not given: the same as --seed of training."""
    data_cache_path: Annotated[str, "folder"] | None = None
    """Folder of the token store; None: megatron_sft below the user's cache (XDG_CACHE_HOME, ~/.cache)."""
    num_workers: Annotated[int, Number(0, 1024), "processes"] = 0
    """Of tokenising; 0: one a core."""
    prefetch: Annotated[int, Number(0, 1024), "steps"] = 2
    """Prepared ahead by the loader thread; 0: none."""


ROW_FIELDS = (
    *("data_schema", "input_key", "tool_key", "prompt_key", "response_key", "prompt_dict_keys", "response_dict_keys"),
    *("custom_dataset", "max_bad_rows"),
)
"""Fields of DataConfig that say what a row is."""


@dataclass(frozen=True)
class TrainConfig:
    """Length, batch and numerics of the run. Exactly one of train_iters, train_samples and num_epoch is set."""

    micro_batch_size: Annotated[Batch, "packs"] = 1
    """In one forward pass of one data-parallel rank."""
    global_batch_size: Annotated[Batch, "packs"] | None = None
    """In one optimizer step; None: micro_batch_size x data-parallel size where a run begins, then the checkpoint's."""
    max_tokens_per_gpu: Annotated[Count, "tokens"] | None = None
    """Micro-batches are filled to so many, in place of micro_batch_size packs."""
    train_iters: Annotated[Length, "iterations"] | None = None
    """Length of the run in optimizer steps."""
    train_samples: Annotated[Length, "packs"] | None = None
    """Length of the run in packs."""
    num_epoch: Annotated[float, Number(1e-6, 1e6), "epochs"] | None = None
    """Length of the run in passes over the data; 1 where no length is given."""
    params_dtype: Precision = "fp32"
    """fp32 or bf16 (--bf16); optimizer states stay fp32."""
    recompute_granularity: Annotated[str, Words("selective", "full")] | None = None
    """selective or full."""
    recompute_method: Annotated[str, Words("uniform", "block")] | None = None
    """uniform or block: which layers full recomputes."""
    recompute_num_layers: Annotated[Count, "layers"] | None = None
    """Recomputed together (uniform), or of each stage (block)."""
    recompute_modules: tuple[RecomputedModule, ...] = ()
    """What selective recomputes; none: core_attn."""
    loss_type: Annotated[str, Words("sft", "dft", "eaft")] = "sft"
    """What a trained token costs: sft (cross-entropy), dft (times its probability) or eaft (times the entropy of its top 20)."""
    label_smoothing: Annotated[float, Number(0, 0.999)] = 0.0
    """Share of the target that is spread evenly over the vocabulary."""
    z_loss_coeff: Annotated[float, Number(0, 1)] = 0.0
    """Adds this times the square of the log of the softmax's denominator."""
    neftune_noise_alpha: Annotated[float, Number(0, 1000)] = 0.0
    """Training embeddings get noise of up to alpha / sqrt(L d), L the document's tokens, d the hidden size; 5 is usual."""
    seed: Seed = 1234
    """Of whatever is drawn."""
    freeze: tuple[str, ...] = ()
    """Regular expressions for parameters that are not trained, by Megatron's or Hugging Face's name."""
    train_only: tuple[str, ...] = ()
    """The same for the only ones that are."""
    skip_train: bool = False
    """Validate only."""
    check_for_nan: bool = True
    """NaN or Inf in loss or gradient ends the run."""
    loss_spike_factor: Annotated[float, Number(1.01, 1e6)] | None = None
    """A step whose loss exceeds this times the running mean of the loss is not applied; None: every step is."""
    loss_spike_action: Annotated[str, Words("skip", "stop")] = "skip"
    """What such a step does: skip (training goes on with the next) or stop (saves a checkpoint of the step before it)."""
    eval_iters: Annotated[int, Number(-1, 10**12), "global-batches"] = 0
    """Of a validation; 0: no validation, -1: the whole held-out set."""
    eval_interval: Annotated[Length, "iterations"] = 1000
    """Between two validations."""
    early_stop_patience: Annotated[Count, "evaluations"] | None = None
    """The run ends after so many in a row that are no better in --best-metric than the best before; None: it goes on."""
    exit_interval: Annotated[Length, "iterations"] | None = None
    """The run saves and ends after an iteration that this divides."""
    exit_duration_in_mins: Annotated[int, Number(1, 10**6), "minutes"] | None = None
    """The run saves and ends after so long."""
    exit_signal_handler: bool = True
    """SIGTERM and Ctrl-C save before they end the run."""
    kernels: Annotated[str, Words("auto", "torch", "triton")] = "auto"
    """Loss, norm with RoPE, Adam with bf16 moments: by torch's operations or Triton's; auto: torch, until a GPU has compared."""
    attention_backend: Annotated[str, Words(*ATTENTION_BACKENDS)] = "auto"
    """Kernels of attention; the log says why: auto is FlashAttention 2 where it runs, else sdpa, a document at a time."""
    deterministic_mode: bool = False
    """On CUDA: torch's and megatron-core's repeatable kernels; a resumed run is then bit-identical, as on a CPU."""


@dataclass(frozen=True)
class CheckpointConfig:
    """Where weights come from and where results go."""

    load: Annotated[str, "place"] | None = None
    """HF folder, hub name (ORG/MODEL or ORG/MODEL@REVISION) or Megatron checkpoint."""
    ckpt_step: Annotated[Amount, "iteration"] | None = None
    """Which checkpoint of load is taken; None: the newest. A load that ends in iter_0000040 says it too."""
    save: Annotated[str, "folder"] | None = None
    """Checkpoints and metrics.jsonl go there; a run that finds its checkpoint there goes on from it."""
    save_hf: Annotated[str, "folder"] | None = None
    """HF folder written at the end of training; with {iteration} in its name also with every checkpoint, one folder each."""
    save_interval: Annotated[Length, "iterations"] | None = None
    """Between two checkpoints; None: one at the end."""
    save_retain: Annotated[Count, "checkpoints"] | None = None
    """Newest checkpoints kept, and the best one (best_checkpoint.json); None: all."""
    best_metric: Annotated[str, "metric"] = "valid/loss"
    """What the best checkpoint is best in, as metrics.jsonl names it: valid/loss, valid/bits_per_byte or eval/TASK."""
    async_save: bool = False
    """Checkpoints are written while training goes on."""
    finetune: bool = False
    """Weights only: iteration, optimizer, rng and data order start afresh."""
    load_optimizer: Annotated[int, Number(0, 1)] = 0
    """1: a new run from a Megatron checkpoint (--finetune) takes the optimizer's moments too; rates are this run's."""
    load_optim: bool = True
    """A resumed run takes the optimizer states."""
    load_rng: bool = True
    """A resumed run takes the random states."""
    save_optim: bool = True
    """Checkpoints have the optimizer states."""
    save_rng: bool = True
    """Checkpoints have the random states."""
    verify_integrity: bool = True
    """Every file of a checkpoint is checksummed before it is loaded."""
    verify_conversion: bool = True
    """Converted weights are compared with transformers, first layers."""
    importer: Annotated[str, Words("builtin", "modelopt")] = "builtin"
    """builtin, or modelopt: for quantised weights, and for a model_type that builtin lacks, as the flags describe it."""
    allow_changed: tuple[str, ...] = ()
    """Settings of run_config.json that may differ from the checkpoint's on resume: train.seed or seed, DATA_IDENTITY's too."""


@dataclass(frozen=True)
class RunConfig:
    """One training run. arguments.py builds it; nothing changes it afterwards."""

    model: ModelConfig = ModelConfig()
    parallel: ParallelConfig = ParallelConfig()
    data: DataConfig = DataConfig()
    optim: OptimConfig = OptimConfig()
    train: TrainConfig = TrainConfig()
    checkpoint: CheckpointConfig = CheckpointConfig()
    lora: LoraConfig = LoraConfig()
    tasks: TasksConfig = TasksConfig()
    log: LogConfig = LogConfig()

    def to_json(self) -> str:
        """The resolved configuration as indented JSON, sorted, so that two runs can be compared with diff."""
        return json.dumps(dataclasses.asdict(self), indent=1, sort_keys=True, default=str)
