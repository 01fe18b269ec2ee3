"""Every difference between megatron-core and torch versions and platforms. Nothing else patches them.

CPU mode: megatron-core asks torch.cuda for devices, streams and rng states in code that has nothing to do with CUDA.
`install_cpu_mode` answers those questions with the CPU, so that the same model, schedule and optimizer code runs over gloo.
"""

import contextlib
import functools
import importlib
import importlib.util
import inspect
import logging
import os
import shutil
import sys
import warnings
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch


def device() -> "torch.device":
    """The device of this process: its CUDA device, else the CPU."""
    import torch

    return torch.device("cuda", torch.cuda.current_device()) if torch.cuda.is_available() else torch.device("cpu")


def moved(tensor: "torch.Tensor") -> "torch.Tensor":
    """A host's tensor on the device of this process, which is not waited for: CUDA waits for copies from pageable memory."""
    here = device()
    pinned = tensor.pin_memory() if here.type == "cuda" and tensor.device.type == "cpu" else tensor
    return pinned.to(here, non_blocking=True)


class _NoStream:
    """Stands in for torch.cuda.Stream and Event where there is one queue only: every wait is already over."""

    device = "cpu"

    def __init__(self, *args: object, **kwargs: object):
        pass

    def record_event(self, *args: object) -> "_NoStream":
        return self

    def wait_stream(self, *args: object) -> None:
        pass

    wait_event = record = wait = synchronize = wait_stream

    def query(self) -> bool:
        return True


def silence_missing_kernels() -> None:
    """Hides warnings about TransformerEngine, Apex and HybridModel (0.19), none of which this project needs."""
    logging.getLogger("megatron.core.models.gpt.gpt_model").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", module=r"megatron\.core.*")
    warnings.filterwarnings("ignore", message=r".*(Apex|Transformer Engine|transformer_engine|fused_layer_norm).*")


def leave_out_compiler() -> None:
    """Lets torch.compile return its function as it is, on a CPU and where there is no compiler for Triton's launchers.

    megatron/core/jit.py compiles small functions at import: on a CPU that is minutes of C++ compiler for nothing, and
    torch._dynamo and torch._inductor take 2.5 s to import. Call it before the first import of megatron.core.
    """
    import torch

    if torch.cuda.is_available() and not triton_lacks():
        return
    if "torch._dynamo" in sys.modules:  # megatron.core was imported before
        sys.modules["torch._dynamo"].config.disable = True  # type: ignore[attr-defined]
    torch.compile = lambda model=None, **kwargs: model or (lambda function: function)  # type: ignore[assignment]
    # torch/_compile.py:_disable_dynamo keeps here what it imports torch._dynamo for at the first call
    for method in ("add_param_group", "load_state_dict", "state_dict", "zero_grad"):
        function = getattr(getattr(torch.optim.Optimizer, method), "__wrapped__", None)
        if function is not None:
            setattr(function, "__dynamo_disable", function)


def triton_lacks() -> str:
    """What keeps Triton's kernels from running here; "": nothing. TRITON_INTERPRET=1 runs them on a CPU, for tests."""
    import torch

    interprets = os.environ.get("TRITON_INTERPRET") == "1"
    if not importlib.util.find_spec("triton"):
        return "triton is not installed (pip install triton)"
    if not torch.cuda.is_available():
        return "" if interprets else "there is no CUDA device"
    compilers = ("cc", "gcc", "clang", os.environ.get("CC", ""))
    return "" if any(map(shutil.which, compilers)) else "there is no C compiler (cc, gcc, clang or CC), which starts them"


def install_cpu_mode() -> None:
    """Makes megatron-core run on the CPU; does nothing where CUDA is available or when it was called before.

    What is answered and who asks (megatron-core 0.16 and 0.19):
    torch.cuda.current_device, get_rng_state: schedules, buffers, tensor_parallel/random.py; Stream and Event:
    moe/token_dispatcher.py, ddp bucket communication; device="cuda": literals all over; Tensor.type():
    optimizer/distrib_optimizer.py accepts torch.cuda types only.
    """
    import torch

    silence_missing_kernels()
    leave_out_compiler()
    _patch_core_without_kernels()
    if torch.cuda.is_available() or (isinstance(torch.cuda.Stream, type) and issubclass(torch.cuda.Stream, _NoStream)):
        return
    cpu = torch.device("cpu")
    replaced: dict[str, Any] = {
        "current_device": lambda: cpu,
        "synchronize": lambda *args, **kwargs: None,
        "get_rng_state": lambda device="cuda": torch.get_rng_state(),
        "set_rng_state": lambda state, device="cuda": torch.set_rng_state(state),
        "Stream": _NoStream,
        "Event": _NoStream,
        "stream": lambda stream: contextlib.nullcontext(),
        "current_stream": lambda *args, **kwargs: _NoStream(),
        "default_stream": lambda *args, **kwargs: _NoStream(),
        "is_current_stream_capturing": lambda: False,
    }
    for name, value in replaced.items():
        setattr(torch.cuda, name, value)
    torch.Tensor.cuda = lambda self, *args, **kwargs: self  # type: ignore[method-assign]
    torch.Tensor.record_stream = lambda self, s: None  # type: ignore[method-assign]
    mode = _cpu_function_mode()
    mode.__enter__()
    if not multiplies_bf16():
        _take_mode_into_backward(mode)
    _patch_core_for_cpu()


products_in_fp32: set[Any] = set()
"""Functions of torch that take bf16 in fp32 here; where autograd itself keeps their inputs, these are fp32 then too."""


def _cpu_function_mode() -> Any:
    """A TorchFunctionMode that sends device="cuda" to the CPU and names CPU tensor types as CUDA ones.

    On a CPU without kernels for bf16, products of bf16 are taken in fp32 and rounded: what the kernels do where there are any.
    """
    import torch
    from torch.nn import functional
    from torch.overrides import TorchFunctionMode

    cpu = torch.device("cpu")
    names = ("matmul", "mm", "bmm", "addmm", "baddbmm", "__matmul__")
    if not multiplies_bf16():
        products_in_fp32.update(getattr(owner, name) for owner in (torch, torch.Tensor) for name in names if hasattr(owner, name))
        products_in_fp32.update({functional.linear, functional.scaled_dot_product_attention, torch.einsum, torch._grouped_mm})

    def is_narrow(value: Any) -> bool:
        return isinstance(value, torch.Tensor) and value.dtype is torch.bfloat16

    def widened(value: Any) -> Any:
        return value.float() if is_narrow(value) else value

    class CpuMode(TorchFunctionMode):
        def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            if kwargs and "device" in kwargs:
                wanted = kwargs["device"]
                if isinstance(wanted, int) or str(wanted).startswith("cuda"):
                    kwargs = {**kwargs, "device": cpu}
            if kwargs and kwargs.get("pin_memory"):  # models/common/embeddings/rope_utils.py:get_pos_emb_on_this_cp_rank
                kwargs = {**kwargs, "pin_memory": False}
            if func is torch.Tensor.type and len(args) == 1 and not kwargs:
                return func(*args).replace("torch.", "torch.cuda.")
            if func in products_in_fp32 and any(map(is_narrow, args)):
                named = {name: widened(value) for name, value in (kwargs or {}).items() if name != "out"}
                product = func(*map(widened, args), **named).bfloat16()
                return kwargs["out"].copy_(product) if kwargs and "out" in kwargs else product
            return func(*args, **(kwargs or {}))

    return CpuMode()


def _take_mode_into_backward(mode: Any) -> None:
    """Tensor.backward is itself a torch function, so that the mode is off in what it calls: megatron-core's products."""
    import torch

    run_backward = torch.autograd._engine_run_backward  # type: ignore[attr-defined]

    def engine_run_backward(*args: Any, **kwargs: Any) -> Any:
        with mode:
            return run_backward(*args, **kwargs)

    torch.autograd._engine_run_backward = engine_run_backward  # type: ignore[attr-defined]


def _patch_core_for_cpu() -> None:
    """The places of megatron-core that keep their own reference to a CUDA function."""
    import torch
    from megatron.core.tensor_parallel import random as core_random
    from megatron.core.transformer.moe import token_dispatcher

    core_random._set_cuda_rng_state = lambda state, device=-1, graph_safe=False: torch.set_rng_state(state)
    core_random._get_cuda_rng_state = lambda device="cuda", clone=False, graph_safe=False: torch.get_rng_state()
    token_dispatcher.maybe_move_tensor_to_cpu = _move_tensor_to_cpu
    _exchange_uneven_parts_over_gloo()


def _exchange_uneven_parts_over_gloo() -> None:
    """Gathers and reduce-scatters parts of different lengths, which gloo knows only as all_to_all_single.

    megatron/core/tensor_parallel/mappings.py; experts that are cut over ETP and EP take such parts.
    """
    import torch
    import torch.distributed as dist
    from megatron.core.tensor_parallel import mappings

    gather, reduce_scatter = mappings._gather_along_first_dim, mappings._reduce_scatter_along_first_dim

    def exchanged(x: Any, group: Any, sent: list[int], received: list[int]) -> Any:
        output = torch.empty(sum(received), *x.shape[1:], dtype=x.dtype)
        dist.all_to_all_single(output, x.contiguous(), received, sent, group=group)
        return output

    def gather_any(x: Any, group: Any, output_split_sizes: Any = None, *args: Any, **kwargs: Any) -> Any:
        if output_split_sizes is None or group.size() == 1:
            return gather(x, group, output_split_sizes, *args, **kwargs)
        lengths = [int(length) for length in output_split_sizes]
        return exchanged(torch.cat([x] * group.size()), group, [x.shape[0]] * group.size(), lengths)

    def reduce_scatter_any(x: Any, group: Any, input_split_sizes: Any = None, *args: Any, **kwargs: Any) -> Any:
        if input_split_sizes is None or group.size() == 1:
            return reduce_scatter(x, group, input_split_sizes, *args, **kwargs)
        lengths = [int(length) for length in input_split_sizes]
        own = lengths[group.rank()]
        return exchanged(x, group, lengths, [own] * group.size()).unflatten(0, (group.size(), own)).sum(dim=0)

    mappings._gather_along_first_dim, mappings._reduce_scatter_along_first_dim = gather_any, reduce_scatter_any


def _patch_core_without_kernels() -> None:
    """What megatron-core lacks where TransformerEngine is missing, on any platform."""
    from megatron.core.tensor_parallel.random import CheckpointWithoutOutput
    from megatron.core.transformer import multi_latent_attention
    from megatron.core.transformer.moe import moe_utils

    if importlib.util.find_spec("transformer_engine") is None:
        # 0.16.1 multi_latent_attention.py:66 says HAVE_TE without it, and then asks isinstance of a mock.
        multi_latent_attention.HAVE_TE = False
        # tensor_parallel/random.py: its default, False, counts as fp8 (`fp8 is not None`), which asks for TransformerEngine;
        # --recompute-modules layernorm leaves it out (both versions).
        CheckpointWithoutOutput.__init__.__defaults__ = (None,)
    # 0.16.1 uses te_general_gemm in moe_utils.py without defining it when TransformerEngine is missing.
    if not hasattr(moe_utils, "te_general_gemm"):
        moe_utils.te_general_gemm = None


def _move_tensor_to_cpu(tensor: Any, as_numpy: bool = False, record_stream: bool = False) -> Any:
    """megatron/core/transformer/moe/moe_utils.py:maybe_move_tensor_to_cpu for tensors that are there already."""
    import torch

    return tensor.numpy() if as_numpy and torch.is_tensor(tensor) else tensor


def varlen_attention() -> Callable[..., Any]:
    """torch's varlen flash attention, called as torch 2.12 and later have it.

    torch 2.11 (torch/nn/attention/varlen.py) has no `enable_gqa`: its kernel shares keys among heads unasked.
    """
    from torch.nn.attention.varlen import varlen_attn

    if "enable_gqa" in inspect.signature(varlen_attn).parameters:
        return functools.partial(varlen_attn, enable_gqa=True)
    return varlen_attn


def varlen_kernels() -> tuple[Callable[..., Any], Callable[..., Any]]:
    """What varlen_attn calls, and what its gradient calls, with log-sum-exps [heads, tokens] fp32 given out and taken in.

    (query, key, value, cu_q, cu_k, max_q, max_k, is_causal, scale, window) -> output, log-sum-exp, random state;
    (gradient, query, key, value, output, log-sum-exp, cu_q, cu_k, max_q, max_k, is_causal, state, scale, window) -> gradients.
    torch 2.13, torch/nn/attention/varlen.py: _varlen_attn and _varlen_attn_backward.
    """
    import torch
    from torch.nn.attention import varlen  # noqa: F401 # which registers them

    return torch.ops.torch_attn._varlen_attn, torch.ops.torch_attn._varlen_attn_backward


def multiplies_bf16() -> bool:
    """Whether this device has kernels for products in bf16; torch's for AVX2 take 3 to 70 times as long as those in fp32."""
    import torch

    return torch.cuda.is_available() or torch.backends.cpu.get_cpu_capability() not in ("DEFAULT", "AVX2")


def use_deterministic_algorithms() -> None:
    """--deterministic-mode on CUDA: flash attention's backward and the sums of index_add_ repeat bit by bit.

    Call it before the first matrix product: cuBLAS reads its workspace from the environment then.
    https://docs.pytorch.org/docs/stable/notes/randomness.html
    """
    import torch

    if not torch.cuda.is_available():
        return
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined] # we read none
    torch.use_deterministic_algorithms(True)


def apply_gathered_rope(rotate: Callable[[Any, Any, bool], Any]) -> None:
    """Lets megatron-core's RoPE for packed rows take a table that is gathered by position already.

    Args:
        rotate: model/rope.py:rotate.

    megatron/core/models/common/embeddings/rope_utils.py:_apply_rotary_pos_emb_thd cuts the row into documents in
    Python and waits for the device at every call; SFTModel gathers the table once a forward pass instead.
    """
    from megatron.core.models.common.embeddings import rope_utils

    sliced = rope_utils._apply_rotary_pos_emb_thd
    if getattr(sliced, "takes_gathered", False):
        return

    def apply(t: Any, cu_seqlens: Any, freqs: Any, rotary_interleaved: bool = False, *args: Any, **kwargs: Any) -> Any:
        if freqs.dim() != 3:  # not RotaryTable.gather's [T, 2, dim]
            return sliced(t, cu_seqlens, freqs, rotary_interleaved, *args, **kwargs)
        latent = kwargs.get("multi_latent_attention") or kwargs.get("mla_rotary_interleaved")  # 0.16, 0.19
        return rotate(t, freqs, bool(rotary_interleaved or latent))

    apply.takes_gathered = True  # type: ignore[attr-defined]
    rope_utils._apply_rotary_pos_emb_thd = apply


def provide_latent_projections(linear: type) -> None:
    """Lets megatron-core build experts in a latent space (Nemotron 3 Super), for which it asks for TransformerEngine's TELinear.

    Args:
        linear: model/layers.py:WholeLinear.

    megatron/core/transformer/moe/moe_layer.py:MoELayer.__init__, both versions.
    """
    from megatron.core.transformer.moe import moe_layer

    if importlib.util.find_spec("transformer_engine") is None:
        moe_layer.HAVE_TE, moe_layer.TELinear = True, linear


def balance_experts_by_row() -> None:
    """Makes the router's own losses the same in every layout, with padding left out (train/step.py: padding_mask).

    They are multiplied by the tokens of their row, because all gradients are divided by the step's trained tokens later.
    0.16.1 (megatron/core/transformer/moe/router.py:attach_and_log_load_balancing_loss and apply_z_loss) takes those of
    one rank in place of the row's: tensor and context parallelism make the losses that much weaker. 0.19.2 multiplies
    by the number of ranks, which is right where all have as much padding. Both divide by 0 in a row of padding alone.
    """
    from megatron.core import parallel_state
    from megatron.core.transformer.moe import router

    count, z_loss = router.get_tokens_per_expert_and_token_count, router.z_loss_func
    if getattr(count, "is_by_row", False):
        return
    by_rank = "needs_dp_avg" not in inspect.signature(router.TopKRouter.attach_and_log_load_balancing_loss).parameters

    def row_ranks() -> int:
        return int(parallel_state.get_tensor_and_context_parallel_group().size())

    def counted(*args: Any, reduce_group: Any, **kwargs: Any) -> tuple[Any, Any, Any]:
        """(tokens per expert, tokens that the loss is multiplied by, tokens that it is a mean of)."""
        by_expert, _, total = count(*args, reduce_group=reduce_group, **kwargs)
        total = total.clamp(min=1) if hasattr(total, "clamp") else total
        row = total * row_ranks() / reduce_group.size()  # global_aux_loss: the group holds a row a data-parallel rank
        return by_expert, row if by_rank else row / row_ranks(), total

    counted.is_by_row = True  # type: ignore[attr-defined]
    router.get_tokens_per_expert_and_token_count = counted
    if by_rank:
        router.z_loss_func = lambda logits, coeff, **kwargs: z_loss(logits, coeff * row_ranks(), **kwargs)
    count_bias = router.TopKRouter._apply_expert_bias  # both versions: routing_map [tokens, experts] & ~mask [tokens]

    def counted_bias(self: Any, routing_map: Any, padding_mask: Any = None) -> None:
        count_bias(self, routing_map, None if padding_mask is None else padding_mask.reshape(-1, 1))

    router.TopKRouter._apply_expert_bias = counted_bias


def keep_frozen_expert_bias() -> None:
    """Lets the bias by which experts are chosen stand still where its router says `frozen_expert_bias`.

    megatron/core/distributed/finalize_model_grads.py:_update_router_expert_bias; 0.19 asks for it, 0.16 does not.
    """
    module: Any = importlib.import_module(
        "megatron.core.distributed.finalize_model_grads"
    )  # its package has a function so called
    update = module._update_router_expert_bias
    if getattr(update, "keeps_frozen", False):
        return

    def updated(model: Any, *args: Any, **kwargs: Any) -> None:
        modules = [part for chunk in model for part in chunk.modules() if getattr(part, "frozen_expert_bias", False)]
        kept = [part.expert_bias.clone() for part in modules]
        update(model, *args, **kwargs)
        for part, bias in zip(modules, kept, strict=True):
            part.expert_bias.copy_(bias)

    updated.keeps_frozen = True  # type: ignore[attr-defined]
    module._update_router_expert_bias = updated


def leave_sorted_tokens() -> None:
    """Spares a rank with all experts to itself what sorts tokens by the rank that they came from: they are sorted by expert.

    megatron/core/transformer/moe/token_dispatcher.py:MoEAlltoAllTokenDispatcher waits for the number of tokens of each expert,
    cuts tokens there and lays the pieces together in the order that they had (moe_utils.py:sort_chunks_by_idxs), both versions.
    """
    from megatron.core import parallel_state
    from megatron.core.transformer.moe import token_dispatcher

    kind, sort = token_dispatcher.MoEAlltoAllTokenDispatcher, token_dispatcher.sort_chunks_by_idxs
    synchronize = kind._maybe_dtoh_and_synchronize
    if getattr(sort, "leaves_sorted", False):
        return

    def is_alone() -> bool:
        return bool(parallel_state.get_expert_tensor_and_model_parallel_world_size() == 1)

    def sorted_chunks(input: Any, split_sizes: Any, sorted_idxs: Any, probs: Any = None, fused: bool = False) -> Any:
        return (input, probs) if is_alone() else sort(input, split_sizes, sorted_idxs, probs, fused)

    def synchronized(self: Any, point: str, tokens_per_expert: Any = None) -> Any:
        if is_alone() and isinstance(self.num_out_tokens, int):  # a tensor where experts have a capacity
            return tokens_per_expert
        return synchronize(self, point, tokens_per_expert)

    sorted_chunks.leaves_sorted = True  # type: ignore[attr-defined]
    token_dispatcher.sort_chunks_by_idxs, kind._maybe_dtoh_and_synchronize = sorted_chunks, synchronized


def fuse_gradient_norm() -> None:
    """Norm and scaling of all gradients in a few kernels, in fp32.

    megatron/core/utils.py:local_multi_tensor_l2_norm, which megatron-core takes without TransformerEngine and Apex,
    waits for the device once per parameter and rounds each norm to the gradient's dtype.
    """
    import torch
    from megatron.core.optimizer import clip_grads

    if not clip_grads.l2_norm_impl.__module__.startswith("megatron.core"):
        return

    def norm(size: int, flag: Any, lists: Any, *args: Any) -> tuple[Any, None]:
        norms = torch._foreach_norm(lists[0], 2, dtype=torch.float32)
        return torch.stack(norms).norm().reshape(1), None

    def scale(size: int, flag: Any, lists: Any, factor: float) -> None:
        assert all(source is target for source, target in zip(*lists, strict=True)), "gradients are clipped in place"
        torch._foreach_mul_(lists[1], factor)

    clip_grads.l2_norm_impl, clip_grads.multi_tensor_scale_impl = norm, scale


def gradients_for_norm(optimizer: Any) -> "list[torch.Tensor]":
    """Those of one of its optimizers that count on this rank: not shared, and of one tensor-parallel rank where all have them.

    megatron/core/optimizer/optimizer.py; 0.19 has another name, and takes those out that have a norm of their own (none here).
    """
    found = getattr(optimizer, "get_grads_for_grad_norm", None) or optimizer.get_main_grads_for_grad_norm
    return list(found())


def provide_adam(fused_adam: type, float16_optimizer: type) -> None:
    """Lets megatron-core build its optimizers from ours.

    Args:
        fused_adam: taken for its Adam, whatever else is installed.
        float16_optimizer: a subclass of its Float16OptimizerWithFloat16Params.

    megatron/core/optimizer/__init__.py falls back to torch.optim.AdamW, whose per-parameter step tensors its own
    fully_reshardable optimizer checkpoint cannot load (KeyError: 'step', both versions).
    """
    import megatron.core.optimizer as core_optimizer
    from megatron.core.optimizer import distrib_optimizer

    core_optimizer.Float16OptimizerWithFloat16Params = float16_optimizer
    core_optimizer.Adam = distrib_optimizer.Adam = fused_adam
    core_optimizer.USING_PYTORCH_OPTIMIZER = False
    # asked only whether TransformerEngine's Adam takes store_param_remainders; 0.16 fails without TransformerEngine
    core_optimizer.is_te_min_version = lambda version: False
    # state_dict of the distributed optimizer looks for `step` in the groups only when it believes in Apex
    distrib_optimizer.HAVE_APEX_OR_TE = distrib_optimizer.USING_APEX_OPTIMIZER = True
