"""Adam on torch's fused kernels with the interfaces that megatron-core knows: Apex's, and TransformerEngine's for moments
and gradients in bf16; and SGD for groups that ask for it. Not here: which parameters, which rate (groups.py, optim.py)."""

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import torch
from megatron.core.optimizer.optimizer import Float16OptimizerWithFloat16Params

STATES = {
    "adam": ("exp_avg", "exp_avg_sq"),
    "sgd": ("exp_avg",),
    "muon-torch": ("exp_avg",),
    "muon-nanochat": ("exp_avg", "exp_avg_sq"),
}
"""A group's `method` -> the states that its parameters have, beside fp32 weights."""
SLICE = 2**26
"""Elements that are turned into fp32 at once where moments or gradients are not."""


class FusedAdam(torch.optim.Optimizer):
    """Adam with the interface of apex.optimizers.FusedAdam, on torch's fused kernels for CPU and CUDA.

    The step count lives in the parameter group (not in a tensor a parameter), which is what megatron-core's
    reshardable optimizer checkpoints expect of an Adam. Kernels: torch._fused_adamw_ and torch._fused_adam_. With
    moments or gradients in bf16 each slice of them goes through the same kernel in fp32 and is rounded once, to nearest; or
    all of it through one of ours (kernels/adam_triton.py).

    States that keep_in_host_memory chooses lie in host memory, pinned where the parameter is on a GPU, and are brought to the
    parameter for its update, a slice at a time, by the same kernel.

    A group with "method": "sgd" is updated as torch.optim.SGD does with its "momentum", whose buffer is exp_avg.

    Args:
        params: parameters or parameter groups.
        lr: learning rate.
        betas: decay of the first and the second moment.
        eps: added to the root of the second moment.
        weight_decay: decoupled (AdamW) when adam_w_mode, else added to the gradient.
        adam_w_mode: which of the two.
        capturable: CUDA graphs, which this project does not use; part of apex's interface.
        exp_avg_dtype: of the first moment. This and the following are TransformerEngine's
            (transformer_engine/pytorch/optimizers/fused_adam.py).
        exp_avg_sq_dtype: of the second moment.
        master_weights: keeps fp32 weights of its own (state master_param) and writes them back rounded.
        use_decoupled_grad: gradients are in param.decoupled_grad, of any dtype.
        master_weight_dtype: only fp32.
    """

    def __init__(
        self,
        params: Any,
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        adam_w_mode: bool = True,
        capturable: bool = False,
        exp_avg_dtype: torch.dtype = torch.float32,
        exp_avg_sq_dtype: torch.dtype = torch.float32,
        master_weights: bool = False,
        use_decoupled_grad: bool = False,
        master_weight_dtype: torch.dtype = torch.float32,
    ):
        assert master_weight_dtype == torch.float32, "master weights in fp32 are the only ones here"
        super().__init__(params, dict(lr=lr, betas=betas, eps=eps, weight_decay=weight_decay))
        self._kernel: Callable[..., None] = torch._fused_adamw_ if adam_w_mode else torch._fused_adam_
        self._dtypes = {"exp_avg": exp_avg_dtype, "exp_avg_sq": exp_avg_sq_dtype, "master_param": torch.float32}
        self.master_weights, self._use_decoupled_grad = master_weights, use_decoupled_grad
        self._hosted: set[torch.Tensor] = set()
        self.triton = False
        """Where dtypes differ, one Triton kernel updates in place of torch's."""

    def keep_in_host_memory(self, share: float) -> None:
        """The states of the first parameters, until they are `share` of all elements, are made in host memory from now on."""
        params = [param for group in self.param_groups for param in group["params"]]
        wanted = share * sum(param.numel() for param in params)
        for param in params:
            if wanted <= 0:
                break
            self._hosted.add(param)
            wanted -= param.numel()

    def initialize_state(self, param: torch.Tensor, method: str = "adam") -> None:
        """Makes the states of a parameter, and its fp32 weights where they are kept here."""
        state = self.state[param]
        for name in STATES[method]:
            state[name] = self._empty(param, name).zero_()
        if self.master_weights:
            state["master_param"] = self._empty(param, "master_param").copy_(param.detach())

    def _empty(self, param: torch.Tensor, name: str) -> torch.Tensor:
        """Room for a state of a parameter, where it is kept."""
        is_hosted = param in self._hosted
        place = torch.device("cpu") if is_hosted else param.device
        return torch.empty(param.shape, dtype=self._dtypes[name], device=place, pin_memory=is_hosted and param.is_cuda)

    def get_unscaled_state(self, param: torch.Tensor, name: str) -> torch.Tensor:
        """A state as megatron-core's checkpoints read it."""
        return self.state[param][name]

    def set_scaled_state(self, param: torch.Tensor, name: str, value: torch.Tensor) -> None:
        """Takes a state from a checkpoint, in whatever dtype it was saved."""
        self.state[param][name] = self._empty(param, name).copy_(value)

    def load_state_dict(self, state_dict: Any) -> None:
        """As torch's, which would turn every state into its parameter's dtype, and hold them twice on the way."""
        super().load_state_dict({**state_dict, "state": {}})
        ids = [number for group in state_dict["param_groups"] for number in group["params"]]
        owned = [(p, STATES[group.get("method", "adam")]) for group in self.param_groups for p in group["params"]]
        for number, (param, states) in zip(ids, owned, strict=True):
            names = (*states, "master_param")
            for name, value in state_dict["state"].get(number, {}).items():
                if name in names:
                    self.state[param][name] = (
                        value if self._is_kept(param, name, value) else self._empty(param, name).copy_(value)
                    )

    def _is_kept(self, param: torch.Tensor, name: str, value: torch.Tensor) -> bool:
        """Whether a tensor is where and what a state of the parameter is."""
        if param in self._hosted:
            return value.dtype == self._dtypes[name] and value.device.type == "cpu" and value.is_pinned() == param.is_cuda
        return value.dtype == self._dtypes[name] and value.device == param.device

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> None:  # type: ignore[override]
        """One update of every parameter that has a gradient. `closure` is not used (the gradients are there)."""
        for group in self.param_groups:
            pairs = [(p, gradient) for p in group["params"] if (gradient := self._gradient(p)) is not None]
            group["step"], method = group.get("step", 0) + 1, group.get("method", "adam")
            for param, _ in pairs:
                if not self.state[param]:
                    self.initialize_state(param, method)
            self._step_group(method, group, pairs)
        if any(param.is_cuda for param in self._hosted):
            torch.cuda.current_stream().synchronize()  # who reads host memory does not wait for the stream

    def _step_group(self, method: str, group: dict[str, Any], pairs: list[tuple[torch.Tensor, torch.Tensor]]) -> None:
        assert method in ("adam", "sgd"), f"{method}: not a method of this optimizer (muon.py)"
        if method == "adam":
            self._step_adam(group, pairs)
        else:
            self._step_sgd(group, pairs)

    def _step_adam(self, group: dict[str, Any], pairs: list[tuple[torch.Tensor, torch.Tensor]]) -> None:
        whole = []
        for param, gradient in pairs:
            state = self.state[param]
            column = (state.get("master_param", param), gradient, state["exp_avg"], state["exp_avg_sq"])
            if param not in self._hosted and len({tensor.dtype for tensor in column}) == 1:
                whole.append((param, column))
            elif self.triton and param not in self._hosted:
                self._update_in_one_pass(group, param, *column)
            else:
                self._update_in_slices(group, param, *column)
        if whole:
            self._update(group, *map(list, zip(*(column for _, column in whole), strict=True)))
        for param, (weight, *_) in whole:
            if weight is not param:
                param.copy_(weight)

    def _step_sgd(self, group: dict[str, Any], pairs: list[tuple[torch.Tensor, torch.Tensor]]) -> None:
        """Weight decay is added to the gradient, as in torch.optim.SGD: b = m b + (g + d w), w = w - lr b."""
        for param, gradient in pairs:
            with self.fetched(param, "exp_avg") as buffer:
                buffer.mul_(group["momentum"]).add_(gradient.add(param, alpha=group["weight_decay"]))
                param.add_(buffer, alpha=-group["lr"])

    @contextlib.contextmanager
    def fetched(self, param: torch.Tensor, name: str) -> Iterator[torch.Tensor]:
        """A state beside its parameter; what is changed in it within the context is kept."""
        kept = self.state[param][name]
        if param not in self._hosted:
            yield kept
            return
        here = kept.to(param.device, copy=True, non_blocking=True)
        yield here
        kept.copy_(here, non_blocking=True)

    def _gradient(self, param: torch.Tensor) -> torch.Tensor | None:
        return getattr(param, "decoupled_grad", None) if self._use_decoupled_grad else param.grad

    def _update_in_one_pass(self, group: dict[str, Any], param: Any, weight: Any, gradient: Any, first: Any, second: Any) -> None:
        from megatron_sft.kernels.adam_triton import update

        rates = group["lr"], group["betas"], group["eps"], group["weight_decay"]
        decoupled, copy = self._kernel is torch._fused_adamw_, None if weight is param else param
        update(weight, gradient, first, second, copy, group["step"], *rates, decoupled)

    def _update_in_slices(self, group: dict[str, Any], param: Any, weight: Any, gradient: Any, first: Any, second: Any) -> None:
        """One stream orders it all: a slice comes, is updated, goes back, and its room is used again only then."""
        is_hosted = param in self._hosted
        flat = [tensor.view(-1).split(SLICE) for tensor in (param, weight, gradient, first, second)]
        for own, main, gradients, *moments in zip(*flat, strict=True):
            kept = [*moments, main] if weight is not param else moments
            here = [part.to(own.device, copy=True, non_blocking=True) for part in kept] if is_hosted else kept
            wide = [part.float() for part in here]  # the fp32 ones are the tensors themselves
            updated = wide[2] if weight is not param else own
            self._update(group, [updated], [gradients.float()], [wide[0]], [wide[1]])
            for part, changed in zip(kept, wide, strict=True):
                if part is not changed:
                    part.copy_(changed.to(part.dtype), non_blocking=True)
            if updated is not own:
                own.copy_(updated)

    def _update(self, group: dict[str, Any], weights: list, gradients: list, firsts: list, seconds: list) -> None:
        self._kernel(
            weights,
            gradients,
            firsts,
            seconds,
            [],
            [torch.full((), float(group["step"]), device=weights[0].device)] * len(weights),  # torch.tensor would wait
            lr=group["lr"],
            beta1=group["betas"][0],
            beta2=group["betas"][1],
            weight_decay=group["weight_decay"],
            eps=group["eps"],
            amsgrad=False,
            maximize=False,
        )


class NarrowGradientOptimizer(Float16OptimizerWithFloat16Params):
    """megatron-core's optimizer with fp32 master weights, which would copy all gradients into fp32 for its step.

    With --use-precision-aware-optimizer Adam reads them where they are, as in megatron-core's distributed optimizer.
    """

    def _copy_model_grads_to_main_grads(self) -> None:
        if not self.config.use_precision_aware_optimizer:
            super()._copy_model_grads_to_main_grads()
            return
        for model_group, main_group in zip(self.float16_groups, self.fp32_from_float16_groups, strict=True):
            for model_param, main_param in zip(model_group, main_group, strict=True):
                main_param.decoupled_grad = model_param.main_grad
        for group in self.fp32_from_fp32_groups:
            for param in group:
                param.decoupled_grad = param.main_grad
