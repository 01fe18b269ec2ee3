"""megatron-core's optimizer and learning-rate scheduler from our configuration.

Not here: Adam (adam.py), the step itself (step.py), checkpoints of the states (checkpoint/distributed.py).
"""

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig, finalize_model_grads
from megatron.core.optimizer import MegatronOptimizer, OptimizerConfig, get_megatron_optimizer
from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler

from megatron_sft.checkpoint.background import torch_optimizers
from megatron_sft.config.groups import lowest_rate, parameter_groups
from megatron_sft.config.problems import length_problems
from megatron_sft.config.run import OptimConfig, ParallelConfig, RunConfig
from megatron_sft.config.state_bytes import adam_has_main_weights
from megatron_sft.core_compat import fuse_gradient_norm, provide_adam
from megatron_sft.errors import ConfigError
from megatron_sft.kernels import takes_triton
from megatron_sft.model.build import DTYPES
from megatron_sft.parallel import gather
from megatron_sft.train import muon
from megatron_sft.train.adam import FusedAdam, NarrowGradientOptimizer
from megatron_sft.train.groups import config_overrides

SAMPLES, ITERATIONS, STEPS_OF_DATA = "samples", "iterations", "steps of data"


def wrap_ddp(chunks: list[Any], parallel: ParallelConfig, grads_dtype: str = "fp32") -> list[DistributedDataParallel]:
    """Collective: wraps every model chunk in megatron-core's DDP. A weight that the first and the last pipeline stage tie is
    frozen in both where it is in one.

    Args:
        chunks: of this rank.
        parallel: the layout.
        grads_dtype: gradients are added up and reduced in it: fp32, or the parameters' own (bf16).
    """
    _freeze_tied_copies(chunks)
    ddp_config = DistributedDataParallelConfig(
        grad_reduce_in_fp32=grads_dtype == "fp32",
        use_distributed_optimizer=parallel.use_distributed_optimizer,
        overlap_grad_reduce=parallel.overlap_grad_reduce,
        overlap_param_gather=parallel.overlap_param_gather,
        check_for_nan_in_grad=False,  # step.py names the rows; this one would only name the bucket
    )
    wrapped = [
        DistributedDataParallel(chunk.config, ddp_config, chunk, disable_bucketing=index > 0)
        for index, chunk in enumerate(chunks)
    ]
    for chunk in chunks:  # what the schedules call back; as megatron/training/training.py:train sets them
        chunk.config.finalize_model_grads_func = finalize_gradients
        if parallel.overlap_grad_reduce:
            hooks = [model.no_sync for model in wrapped]
            chunk.config.no_sync_func = hooks if len(hooks) > 1 else hooks[0]
    return wrapped


def finalize_gradients(model: list[Any], num_tokens: torch.Tensor | None = None, **options: Any) -> None:
    """Collective: megatron-core's finalize_model_grads, then its division by the step's trained tokens.

    That of 0.16 asks on the host whether there are any, and so waits for the device; here none divides by one, as in 0.19.

    Args:
        model: every chunk of this rank.
        num_tokens: [] int32, those of this rank's micro-batches; those of the last pipeline stage count.
        options: what a schedule passes on.
    """
    finalize_model_grads(model, None, **options)
    if num_tokens is None:
        return
    last = parallel_state.get_pipeline_model_parallel_last_rank()
    dist.broadcast(num_tokens, src=last, group=parallel_state.get_pipeline_model_parallel_group())
    dist.all_reduce(num_tokens, group=parallel_state.get_data_parallel_group(with_context_parallel=True))
    for chunk in model:
        chunk.scale_gradients(1.0 / num_tokens.clamp(min=1))


def _freeze_tied_copies(chunks: list[Any]) -> None:
    """Makes the pipeline stages that hold a copy of tied embeddings agree that it is frozen.

    megatron/core/distributed/finalize_model_grads.py:_allreduce_embedding_grad waits for the other copy unless both are.
    """
    group = parallel_state.get_embedding_group(check_initialized=False)
    ends = [chunk for chunk in chunks if getattr(chunk, "pre_process", False) or getattr(chunk, "post_process", False)]
    copies = [end.shared_embedding_or_output_weight() for end in ends if end.share_embeddings_and_output_weights]
    if copies and any(gather(any(not copy.requires_grad for copy in copies), group)):
        for copy in copies:
            copy.requires_grad_(False)


@contextlib.contextmanager
def whole_parameters(chunks: list[DistributedDataParallel], parallel: ParallelConfig) -> Iterator[None]:
    """Within it every rank holds every updated parameter: for validation, checkpoints and export.

    With overlap_param_gather the optimizer's update reaches the other ranks only in the next forward pass.
    """
    lazy = parallel.use_distributed_optimizer and parallel.overlap_param_gather
    if lazy:
        for chunk in chunks:
            chunk.disable_forward_pre_hook()
    yield
    if lazy:
        for chunk in chunks:
            chunk.enable_forward_pre_hook()


def build_optimizer(chunks: list[DistributedDataParallel], run: RunConfig) -> MegatronOptimizer:
    """megatron-core's optimizer: fp32 master weights for bf16, sharded over data parallel when asked for.

    Bytes a parameter with --bf16 (weights + gradients + master weights + two moments): 2 + 4 + 4 + 8 = 18; with
    --use-precision-aware-optimizer and all its dtypes bf16 2 + 2 + 4 + 4 = 12. With --fp32 4 + 4 + 8 = 16. With
    --optimizer-cpu-offload moments, and Adam's own master weights, lie in host memory (adam.py:keep_in_host_memory).
    """
    has_muon = any(group.optimizer == "muon" for group in parameter_groups(run.optim))
    provide_adam(muon.MixedOptimizer if has_muon else FusedAdam, NarrowGradientOptimizer)
    fuse_gradient_norm()
    optim, train, sharded = run.optim, run.train, run.parallel.use_distributed_optimizer
    config = OptimizerConfig(
        optimizer="adam",  # ours, which updates each group by its own method
        lr=optim.lr * optim.init_lr_frac,
        min_lr=lowest_rate(optim, optim.lr),
        weight_decay=optim.weight_decay,
        adam_beta1=optim.adam_beta1,
        adam_beta2=optim.adam_beta2,
        adam_eps=optim.adam_eps,
        clip_grad=optim.clip_grad,
        bf16=train.params_dtype == "bf16",
        params_dtype=DTYPES[train.params_dtype],
        use_distributed_optimizer=sharded,
        overlap_param_gather=run.parallel.overlap_param_gather,
    )
    if optim.use_precision_aware_optimizer or adam_has_main_weights(run):
        # Set afterwards: megatron-core's own check wants TransformerEngine's FusedAdam, whose interface ours has.
        config.use_precision_aware_optimizer = config.use_precision_aware_optimizer_no_fp8_or_ds_fp8 = True
        config.store_param_remainders = False
        config.main_grads_dtype = DTYPES[optim.main_grads_dtype]
        config.exp_avg_dtype, config.exp_avg_sq_dtype = DTYPES[optim.exp_avg_dtype], DTYPES[optim.exp_avg_sq_dtype]
    optimizer = get_megatron_optimizer(config, chunks, config_overrides=config_overrides(chunks, optim))
    for part in getattr(optimizer, "chained_optimizers", [optimizer]):
        part.init_state_fn = _initialize_states
    if has_muon:
        muon.attach(optimizer, chunks, run.model)
    if not sharded and optim.use_precision_aware_optimizer:
        for part in torch_optimizers(optimizer):
            part.master_weights = False  # type: ignore[attr-defined] # its parameters are fp32 master weights already
    if optim.optimizer_cpu_offload:
        for part in torch_optimizers(optimizer):
            part.keep_in_host_memory(optim.optimizer_offload_fraction)  # type: ignore[attr-defined]
    for part in torch_optimizers(optimizer):
        part.triton = takes_triton(train.kernels)  # type: ignore[attr-defined]
    return optimizer


def _initialize_states(inner: FusedAdam, config: Any = None) -> None:
    """megatron-core's init_state_fn, before a checkpoint is loaded: those states that each parameter's method has."""
    for group in inner.param_groups:
        for param in group["params"]:
            if not inner.state[param]:
                inner.initialize_state(param, group.get("method", "adam"))


@dataclass(frozen=True)
class ScheduleLengths:
    """Lengths of the learning-rate schedule, all in one unit.

    SAMPLES: packs; where a flag, or the run's length, is in samples.
    ITERATIONS: optimizer steps done; where --train-iters or --lr-decay-iters says the length.
    STEPS_OF_DATA: optimizer steps of this global batch size that the packs so far take; where the schedule is as long as a
    run of so many epochs. Iterations, unless the batch size was changed: a run that is half through its data is then half
    through its schedule still.
    """

    unit: str
    warmup: int
    decay: int
    wsd_decay: int | None

    def position(self, iteration: int, consumed_samples: int, steps_of_data: int) -> int:
        """Where a run stands, given in every unit."""
        return {SAMPLES: consumed_samples, ITERATIONS: iteration, STEPS_OF_DATA: steps_of_data}[self.unit]


def schedule_lengths(run: RunConfig, total_iterations: int, total_samples: int) -> ScheduleLengths:
    """Resolves warm-up and decay lengths; what is not given is the whole run.

    Args:
        run: flags; *_iters and *_samples are not mixed (problems.py).
        total_iterations: optimizer steps of the whole run, of this global batch size.
        total_samples: packs of the whole run.

    Raises:
        ConfigError: the parts are longer than the whole, which flags alone do not say of a run of --num-epoch.
    """
    optim = run.optim
    if run.train.train_samples or optim.lr_decay_samples or optim.lr_warmup_samples or optim.lr_wsd_decay_samples:
        unit, decay, warmup = SAMPLES, optim.lr_decay_samples or total_samples, optim.lr_warmup_samples
        wsd_decay = optim.lr_wsd_decay_samples
    else:
        unit = ITERATIONS if run.train.train_iters or optim.lr_decay_iters else STEPS_OF_DATA
        decay, warmup = optim.lr_decay_iters or total_iterations, optim.lr_warmup_iters
        wsd_decay = optim.lr_wsd_decay_iters
    if optim.lr_warmup_fraction is not None:
        warmup = int(optim.lr_warmup_fraction * decay)
    if problems := length_problems("samples" if unit == SAMPLES else "iters", warmup, decay, wsd_decay, f"its {decay} {unit}"):
        raise ConfigError(problems)
    return ScheduleLengths(unit, warmup, decay, wsd_decay)


class RateScheduler(OptimizerParamScheduler):
    """megatron-core's, with nanochat's schedule beside its own (karpathy/nanochat scripts/chat_sft.py:get_lr_multiplier).

    With `warmdown` w and warm-up share u a rate is, at progress t = position / length: max_lr * t / u while t < u (from init_lr),
    max_lr up to 1 - w, then linear to min_lr at 1.
    """

    def __init__(self, *args: Any, warmdown: float | None, warmup: float, **kwargs: Any):
        self._warmdown, self._warmup = warmdown, warmup
        super().__init__(*args, **kwargs)

    def get_lr(self, param_group: dict) -> float:
        if self._warmdown is None:
            return super().get_lr(param_group)
        own = {"max_lr": self.max_lr, "min_lr": self.min_lr, **param_group}
        high, low = float(own["max_lr"]), float(own["min_lr"])
        progress = min(self.num_steps / self.lr_decay_steps, 1.0)
        if progress < self._warmup:
            return float(self.init_lr + (high - self.init_lr) * progress / self._warmup)
        if progress <= 1 - self._warmdown:
            return float(high)
        return float(low + (high - low) * (1 - progress) / self._warmdown)


def rates(optimizer: MegatronOptimizer, scheduler: OptimizerParamScheduler) -> dict[str, float]:
    """{"lr": the run's, "lr/LABEL": a group's, ...} at the scheduler's place; the same on every process."""
    groups = {f"lr/{group['label']}": scheduler.get_lr(group) for group in optimizer.param_groups if "label" in group}
    return {"lr": scheduler.get_lr({}), **groups}


def build_scheduler(
    optimizer: MegatronOptimizer, optim: OptimConfig, lengths: ScheduleLengths, position: int = 0
) -> OptimizerParamScheduler:
    """The scheduler at `position`; that and its `step(increment)` are in the unit of `lengths`."""
    fraction = optim.lr_warmup_fraction
    scheduler = RateScheduler(
        optimizer,
        warmdown=optim.warmdown_ratio,
        warmup=lengths.warmup / lengths.decay if fraction is None else fraction,
        init_lr=optim.lr_warmup_init,
        max_lr=optim.lr * optim.init_lr_frac,
        min_lr=lowest_rate(optim, optim.lr),
        lr_warmup_steps=lengths.warmup,
        lr_decay_steps=lengths.decay,
        lr_decay_style=optim.lr_decay_style,
        start_wd=optim.weight_decay,
        end_wd=optim.weight_decay,
        wd_incr_steps=lengths.decay,
        wd_incr_style="constant",
        wsd_decay_steps=lengths.wsd_decay,
        lr_wsd_decay_style=optim.lr_wsd_decay_style if optim.lr_decay_style == "WSD" else None,
        use_checkpoint_opt_param_scheduler=False,  # the flags of this run say the schedule, also on resume
        override_opt_param_scheduler=True,
    )
    scheduler.step(position)
    return scheduler
