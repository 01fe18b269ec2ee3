"""What we patch, override or call without a promise in megatron-core, torch and jinja2 is still there, and as we know it.

A name that is gone would be set without effect; another signature would fail in the middle of a run. Sources are parsed, not
imported: each line names the upstream symbol and why it matters.
"""

import ast
import importlib.util
import inspect
from functools import cache
from pathlib import Path
from typing import Any

import jinja2.compiler
import pytest
import torch
from torch.distributed.checkpoint import filesystem, metadata, planner

TORCH = Path(importlib.util.find_spec("torch").submodule_search_locations[0])
CORE = Path(importlib.util.find_spec("megatron.core").submodule_search_locations[0])
SIGNATURES: dict[str, str] = {
    # core_compat.py puts functions of its own in the place of these
    "tensor_parallel/random.py:_set_cuda_rng_state": "new_state device graph_safe",
    "tensor_parallel/random.py:_get_cuda_rng_state": "device clone graph_safe",
    "tensor_parallel/random.py:CheckpointWithoutOutput.__init__": "self fp8",
    "tensor_parallel/mappings.py:_gather_along_first_dim": "input_ group output_split_sizes",
    "tensor_parallel/mappings.py:_reduce_scatter_along_first_dim": "input_ group input_split_sizes",
    "transformer/moe/moe_utils.py:maybe_move_tensor_to_cpu": "tensor as_numpy record_stream",
    "transformer/moe/moe_utils.py:sort_chunks_by_idxs": "input split_sizes sorted_idxs probs fused",
    "transformer/moe/token_dispatcher.py:MoEAlltoAllTokenDispatcher._maybe_dtoh_and_synchronize": "self point tokens_per_expert",
    "transformer/moe/moe_utils.py:get_tokens_per_expert_and_token_count": "routing_map reduce_group",
    "transformer/moe/moe_utils.py:z_loss_func": "logits z_loss_coeff",
    "transformer/moe/router.py:TopKRouter._apply_expert_bias": "self routing_map padding_mask",
    "transformer/moe/router.py:TopKRouter.attach_and_log_load_balancing_loss": "self activation aux_loss_coeff aux_loss",
    "models/common/embeddings/rope_utils.py:_apply_rotary_pos_emb_thd": "t cu_seqlens freqs rotary_interleaved",
    "utils.py:local_multi_tensor_l2_norm": "chunk_size noop_flag tensor_lists per_tensor",
    "utils.py:local_multi_tensor_scale": "chunk_size noop_flag tensor_lists scale",
    # checkpoint/torch_dist.py calls these private ones
    "dist_checkpointing/strategies/torch.py:_replace_state_dict_keys_with_sharded_keys": (
        "sharded_state_dict keep_only_main_replica"
    ),
    "dist_checkpointing/strategies/torch.py:mcore_to_pyt_state_dict": "state_dict is_loading",
    "dist_checkpointing/strategies/torch.py:_unwrap_pyt_sharded_tensor": "sh_ten",
    "dist_checkpointing/strategies/torch.py:_replace_sharded_keys_with_state_dict_keys": "state_dict flat_mapping rename_mapping",
    "dist_checkpointing/strategies/torch.py:_restore_dict_types": "x keys_template",
    "dist_checkpointing/strategies/torch.py:MCoreSavePlanner.__init__": "self dedup_replicated_tensors",
    "dist_checkpointing/strategies/torch.py:MCoreLoadPlanner.__init__": (
        "self shapes_validation_sharded_tensors allow_shape_mismatch_sharded_tensors"
    ),
    "dist_checkpointing/state_dict_utils.py:save_preprocess": "sharded_state_dict validate_access_integrity",
    "dist_checkpointing/state_dict_utils.py:load_preprocess": "sharded_state_dict",
    # the schedules call what train/optim.py and train/step.py set
    "distributed/finalize_model_grads.py:finalize_model_grads": "model num_tokens",
    "distributed/finalize_model_grads.py:_update_router_expert_bias": "model config",
    "distributed/finalize_model_grads.py:_allreduce_embedding_grad": "model embd_group pp_group weight_getter skip_if_none",
    # train/clipping.py is ChainedOptimizer.step in two parts
    "optimizer/optimizer.py:ChainedOptimizer.prepare_grads": "self",
    "optimizer/optimizer.py:ChainedOptimizer.step_with_ready_grads": "self",
    "optimizer/optimizer.py:ChainedOptimizer.grads_states_parallel_group_is_shared": "self",
    "optimizer/optimizer.py:MegatronOptimizer.get_grad_stats_parallel_group": "self",
    "optimizer/clip_grads.py:clip_grad_by_total_norm_fp32": "parameters max_norm total_norm use_decoupled_grad",
    # train/optim.py overrides the first, train/muon.py reads where the distributed optimizer cut a matrix
    "optimizer_param_scheduler.py:OptimizerParamScheduler.get_lr": "self param_group",
    "optimizer/distrib_optimizer.py:DistributedOptimizer._get_model_param_range_map": "self param",
    # model/ overrides or goes around these
    "transformer/attention.py:SelfAttention.get_query_key_value_tensors": "self hidden_states",
    "tensor_parallel/layers.py:ColumnParallelLinear.forward": "self input_",
    "tensor_parallel/layers.py:RowParallelLinear.forward": "self input_",
    "transformer/moe/experts.py:SequentialMLP.forward": "self permuted_local_hidden_states tokens_per_expert permuted_probs",
    "transformer/mlp.py:MLP.forward": "self hidden_states per_token_scale",
    "ssm/mamba_layer.py:MambaLayer.__init__": "self config submodules layer_number",
    "models/common/language_module/language_module.py:LanguageModule.shared_embedding_or_output_weight": "self",
}
"""file:qualified name -> parameters that we rely on, in this order."""
PATCHED: dict[str, str] = {
    "cuda/__init__.py:synchronize": "device",
    "cuda/random.py:get_rng_state": "device",
    "cuda/random.py:set_rng_state": "new_state device",
    "cuda/__init__.py:stream": "stream",
    "cuda/__init__.py:current_stream": "device",
    "cuda/__init__.py:default_stream": "device",
    "cuda/__init__.py:current_device": "",
    "cuda/graphs.py:is_current_stream_capturing": "",
    "cuda/streams.py:Stream.wait_stream": "self stream",
    "cuda/streams.py:Stream.record_event": "self event",
    "cuda/streams.py:Event.record": "self stream",
    "__init__.py:compile": "model",
    "autograd/graph.py:_engine_run_backward": "t_outputs",
}
"""The same of torch: what core_compat.py answers with the CPU."""
WORDS: dict[str, list[str]] = {
    "tensor_parallel/random.py": ["self.fp8 = fp8 is not None"],
    "transformer/moe/token_dispatcher.py": ["maybe_move_tensor_to_cpu(", "sort_chunks_by_idxs(", "self.num_out_tokens ="],
    "transformer/moe/moe_utils.py": ["te_general_gemm"],
    "transformer/moe/moe_layer.py": ["HAVE_TE", "TELinear"],
    "transformer/moe/router.py": ["get_tokens_per_expert_and_token_count(", "z_loss_func("],
    "transformer/multi_latent_attention.py": ["HAVE_TE"],
    "optimizer/clip_grads.py": ["l2_norm_impl", "multi_tensor_scale_impl"],
    "optimizer/__init__.py": [
        "Float16OptimizerWithFloat16Params",
        "USING_PYTORCH_OPTIMIZER",
        "is_te_min_version",
        "config.use_precision_aware_optimizer_no_fp8_or_ds_fp8",
    ],
    "optimizer/distrib_optimizer.py": [
        "HAVE_APEX_OR_TE",
        "USING_APEX_OPTIMIZER",
        "self.model_param_group_index_map",
        "self.data_parallel_group = ",
        "for key in param_group_identifier_keys:",
    ],
    "optimizer/optimizer.py": [
        "is_not_shared = param_is_not_shared(param)",  # model/lora.py sets `shared`
        "self.init_state_fn(",
        "param.main_param = main_param",
        "'lr_mult'",
    ],
    "optimizer_param_scheduler.py": ["param_group.get('max_lr'", "param_group.get('start_wd'", "param_group.get('wd_mult'"],
    "pipeline_parallel/schedules.py": ["config.finalize_model_grads_func(", "no_sync_func = config.no_sync_func"],
    "distributed/distributed_data_parallel.py": ["getattr(param, 'allreduce', True)"],
    "ssm/mamba_layer.py": ["class MambaLayer(GraphableMegatronModule)"],  # whose __init__ ours calls past MambaLayer's
}
"""file -> what it says: names that it looks up where we put others, attributes that we set for it."""


@cache
def tree(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"))


def parameters(path: Path, name: str) -> list[str]:
    """Of a function or method in a file."""
    found: Any = tree(path)
    for part in name.split("."):
        found = next(node for node in ast.walk(found) if isinstance(node, ast.FunctionDef | ast.ClassDef) and node.name == part)
    return [argument.arg for argument in [*found.args.posonlyargs, *found.args.args, *found.args.kwonlyargs]]


@pytest.mark.parametrize("symbol", SIGNATURES | PATCHED)
def test_a_function_takes_what_we_give_it(symbol: str) -> None:
    path, name = symbol.split(":")
    found, wanted = parameters((CORE if symbol in SIGNATURES else TORCH) / path, name), (SIGNATURES | PATCHED)[symbol].split()
    assert found[: len(wanted)] == wanted, "its signature changed: look at who patches, overrides or calls it"


@pytest.mark.parametrize("path", WORDS)
def test_what_is_set_from_outside_is_still_looked_up(path: str) -> None:
    text = (CORE / path).read_text(encoding="utf-8")
    assert [word for word in WORDS[path] if word not in text] == []


def test_norms_of_latent_attention_are_resolved_where_we_override_that() -> None:
    """model/self_attention.py; from 0.17 on. Before, no module is replaced."""
    path = "transformer/multi_latent_attention.py"
    text = (CORE / path).read_text(encoding="utf-8")
    assert ("layer_classes = self._resolve_qk_norm_config(submodules)" in text) == ("QKNormConfigResolver" in text)


UNPROMISED: dict[Any, str] = {
    filesystem._StorageInfo: "relative_path offset length",
    metadata.Metadata: "state_dict_metadata planner_data storage_data storage_meta",
    metadata.MetadataIndex: "fqn offset index",
    planner.WriteItem: "index type bytes_io_data tensor_data",
    torch.overrides.TorchFunctionMode.__torch_function__: "self func types args kwargs",
    jinja2.compiler.CodeGenerator._output_child_to_const: "self node frame finalize",
}
"""What checkpoint/, core_compat.py and data/templates.py fill in or override."""


@pytest.mark.parametrize("symbol", UNPROMISED, ids=lambda symbol: getattr(symbol, "__qualname__", str(symbol)))
def test_a_function_of_torch_or_jinja2_takes_what_we_give_it(symbol: Any) -> None:
    wanted = UNPROMISED[symbol].split()
    assert list(inspect.signature(symbol).parameters)[: len(wanted)] == wanted


def test_names_that_torch_does_not_promise_are_there() -> None:
    from torch.distributed._shard._utils import narrow_tensor_by_index
    from torch.serialization import get_crc32_options, set_crc32_options
    from torch.testing._internal.distributed.fake_pg import FakeStore

    assert callable(get_crc32_options) and callable(set_crc32_options) and callable(FakeStore)
    assert list(inspect.signature(narrow_tensor_by_index).parameters) == ["tensor", "offsets", "sizes"]
    assert callable(torch.distributed.distributed_c10d._get_default_store)
    assert isinstance(torch.nn.Module()._forward_pre_hooks, dict)
    assert callable(torch.Tensor.cuda) and callable(torch.Tensor.record_stream) and callable(torch._foreach_norm)
    for method in ("add_param_group", "load_state_dict", "state_dict", "zero_grad"):  # torch/_compile.py:_disable_dynamo
        wrapped = getattr(torch.optim.Optimizer, method).__wrapped__
        assert "__dynamo_disable" in inspect.getsource(torch._compile._disable_dynamo) and callable(wrapped)


def test_torchrun_reads_the_patience_that_we_set() -> None:
    from torch.distributed.launcher import api

    assert "TORCH_ELASTIC_SHUTDOWN_TIMEOUT" in inspect.getsource(api) or torch.__version__ < "2.12"
