"""Bytes that autograd keeps from the forward pass for the backward pass, as formulas.

After Korthikanti et al. 2022 (arXiv 2205.05198, equations 1 to 4: what each operation of a layer saves, cut by tensor and
sequence parallelism), for this code: no dropout masks, no [S, S] scores (varlen attention saves its output and a float a
head), grouped key/value heads, gated MLPs, experts with balanced load, Mamba layers in plain torch, and a head that
saves its input instead of logits. Not here: weights, gradients, optimizer states (plan.py).
"""

from dataclasses import dataclass

from megatron_sft.config.run import ModelConfig, ParallelConfig, TrainConfig
from megatron_sft.model.loss import block_rows
from megatron_sft.model.mamba import CHUNK


@dataclass(frozen=True)
class Activations:
    """Saved bytes on one rank, a token of its part of the row."""

    model: ModelConfig
    parallel: ParallelConfig
    train: TrainConfig

    @property
    def width(self) -> int:
        """Bytes of a number."""
        return 2 if self.train.params_dtype == "bf16" else 4

    @property
    def residual(self) -> float:
        """One [tokens, hidden] between tensor-parallel regions."""
        cut = self.parallel.tensor_model_parallel_size if self.parallel.sequence_parallel else 1
        return self.width * self.model.hidden_size / cut

    def layer(self, kind: str) -> float:
        """One layer without recomputation of the whole layer, of a kind of layer_kinds."""
        parts = {"*": self._attention, "-": self._mlp, "E": self._experts, "M": self._mamba}
        return sum(self._norms() + parts[letter]() for letter in kind)

    def stage(self, layers: list[str]) -> float:
        """The layers of a pipeline stage, with --recompute-granularity, and their rotary table."""
        train = self.train
        table = self.width * 2 * self.model.kv_channels
        if train.recompute_granularity != "full":
            return table + sum(self.layer(kind) for kind in layers)
        number = train.recompute_num_layers or 1
        if train.recompute_method == "block":
            kept = layers[number:]
            return table + self.residual * (len(layers) - len(kept)) + sum(self.layer(kind) for kind in kept)
        return table + self.residual * -(-len(layers) // number)

    def recomputed(self, layers: list[str]) -> float:
        """What stands beside `stage` while a part of it is computed again for its backward pass."""
        if self.train.recompute_granularity != "full" or not layers:
            return 0.0
        number = 1 if self.train.recompute_method == "block" else self.train.recompute_num_layers or 1
        return number * max(self.layer(kind) for kind in set(layers))

    def last(self) -> float:
        """Final norm and the loss: the norm's input, and its output for the head, whole on every tensor-parallel rank."""
        return self.residual + self.width * self.model.hidden_size + 20

    def head_workspace(self, tokens: int) -> float:
        """Bytes, not a token's: what model/loss.py holds in its backward pass beside what is saved.

        The gradient of the weight, that of the input in fp32 and twice in its own dtype, one block of logits in both.
        """
        rows = self.model.padded_vocab_size // self.parallel.tensor_model_parallel_size
        block, hidden = min(rows, block_rows(rows, tokens)), self.model.hidden_size
        return self.width * rows * hidden + (4 + 2 * self.width) * tokens * hidden + (4 + self.width) * tokens * block

    def _recomputes(self, module: str) -> bool:
        return self.train.recompute_granularity == "selective" and module in (self.train.recompute_modules or ("core_attn",))

    def _norms(self) -> float:
        """The input of half a layer, the output of the norm before it, the input of the norm after it."""
        return self.residual * (3 if self.model.norm_placement == "pre_post" else 2)

    def _attention(self) -> float:
        """Keys and values of context parallelism: as many with a2a, unless heads are repeated; all with allgather."""
        model, layout = self.model, self.parallel
        tp, cp = layout.tensor_model_parallel_size, layout.context_parallel_size
        log_sums = 0 if self._recomputes("core_attn") else 4 * model.num_attention_heads / tp
        if model.mla.multi_latent_attention:
            return self._latent_attention() + log_sums
        query = model.num_attention_heads * model.kv_channels / tp
        groups = max(model.num_query_groups / tp, 1)
        keys = groups * model.kv_channels
        seen = keys * (cp if layout.cp_comm_type == "allgather" else max(1, cp / groups))
        normed = query + (keys if model.qk_layernorm_full else 0) if model.qk_layernorm or model.qk_layernorm_full else 0
        mixed = query + 2 * keys  # the one tensor of linear_qkv, whose part is the values
        return self.width * (mixed + normed + query + seen + (seen if cp > 1 else 0) + query) + log_sums

    def _latent_attention(self) -> float:
        mla, tp = self.model.mla, self.parallel.tensor_model_parallel_size
        compressed = 2 * (mla.q_lora_rank or 0) + 2 * mla.kv_lora_rank + mla.qk_pos_emb_head_dim
        head = 2 * (mla.qk_head_dim + mla.qk_pos_emb_head_dim) + 2 * mla.v_head_dim
        return self.width * (compressed + self.model.num_attention_heads / tp * head)

    def _mlp(self) -> float:
        if self._recomputes("mlp"):
            return 0.0
        return self.width * self._inner() * self.model.ffn_hidden_size / self.parallel.tensor_model_parallel_size

    def _inner(self) -> int:
        """Widths of the MLP that are saved: gated 2 of linear_fc1, its two halves changed, their product; else 2."""
        return 5 if self.model.gated_mlp else 2

    def _experts(self) -> float:
        """Balanced load: a token's copies go to as many experts, wherever they are."""
        if self._recomputes("moe"):
            return 0.0
        moe, layout = self.model.moe, self.parallel
        width = moe.moe_ffn_hidden_size or self.model.ffn_hidden_size
        latent = moe.moe_latent_size or self.model.hidden_size
        copies = moe.moe_router_topk / (layout.tensor_model_parallel_size if layout.sequence_parallel else 1)
        routed = copies * (latent * layout.expert_tensor_parallel_size + (self._inner() + 1) * width)
        shared = self._inner() * (moe.moe_shared_expert_intermediate_size or 0) / layout.tensor_model_parallel_size
        return self.width * (routed + shared) + 8 * (moe.num_moe_experts or 0)

    def _mamba(self) -> float:
        mamba, tp = self.model.mamba, self.parallel.tensor_model_parallel_size
        heads, groups = (mamba.mamba_num_heads or 0) / tp, mamba.mamba_num_groups / tp
        inner, state = heads * mamba.mamba_head_dim, groups * mamba.mamba_state_dim
        channels = inner + 2 * state
        scan = 8 * CHUNK * heads + 4 * CHUNK * groups + CHUNK + 4 * inner * mamba.mamba_state_dim / CHUNK
        return scan + self.width * (inner + channels + heads + 4 * channels + 2 * inner) + 40 * inner + 16 * state + 24 * heads
