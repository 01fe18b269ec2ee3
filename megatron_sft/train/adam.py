"""Adam on torch's fused kernels with the interfaces that megatron-core knows: Apex's, and TransformerEngine's for moments
and gradients in bf16; and SGD for groups that ask for it. Not here: which parameters, which rate (groups.py, optim.py)."""

from collections.abc import Callable
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
    moments or gradients in bf16 each slice of them goes through the same kernel in fp32 and is rounded once, to nearest.

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

    def initialize_state(self, param: torch.Tensor, method: str = "adam") -> None:
        """Makes the states of a parameter, and its fp32 weights where they are kept here."""
        state = self.state[param]
        for name in STATES[method]:
            state[name] = torch.zeros_like(param, dtype=self._dtypes[name])
        if self.master_weights:
            state["master_param"] = param.detach().clone().float()

    def get_unscaled_state(self, param: torch.Tensor, name: str) -> torch.Tensor:
        """A state as megatron-core's checkpoints read it."""
        return self.state[param][name]

    def set_scaled_state(self, param: torch.Tensor, name: str, value: torch.Tensor) -> None:
        """Takes a state from a checkpoint, in whatever dtype it was saved."""
        self.state[param][name] = value.to(device=param.device, dtype=self._dtypes[name], copy=True)

    def load_state_dict(self, state_dict: Any) -> None:
        """As torch's, which would turn every state into its parameter's dtype, and hold them twice on the way."""
        super().load_state_dict({**state_dict, "state": {}})
        ids = [number for group in state_dict["param_groups"] for number in group["params"]]
        owned = [(p, STATES[group.get("method", "adam")]) for group in self.param_groups for p in group["params"]]
        for number, (param, states) in zip(ids, owned, strict=True):
            names = (*states, "master_param")
            for name, value in state_dict["state"].get(number, {}).items():
                if name in names:
                    self.state[param][name] = value.to(device=param.device, dtype=self._dtypes[name])

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
            for param, _ in pairs:
                if "master_param" in self.state[param]:
                    param.copy_(self.state[param]["master_param"])

    def _step_group(self, method: str, group: dict[str, Any], pairs: list[tuple[torch.Tensor, torch.Tensor]]) -> None:
        assert method in ("adam", "sgd"), f"{method}: not a method of this optimizer (muon.py)"
        if method == "adam":
            self._step_adam(group, pairs)
        else:
            self._step_sgd(group, pairs)

    def _step_adam(self, group: dict[str, Any], pairs: list[tuple[torch.Tensor, torch.Tensor]]) -> None:
        columns = [
            (self.state[p].get("master_param", p), gradient, self.state[p]["exp_avg"], self.state[p]["exp_avg_sq"])
            for p, gradient in pairs
        ]
        whole = [column for column in columns if len({tensor.dtype for tensor in column}) == 1]
        if whole:
            self._update(group, *map(list, zip(*whole, strict=True)))
        for column in columns:
            if len({tensor.dtype for tensor in column}) > 1:
                self._update_in_slices(group, *column)

    def _step_sgd(self, group: dict[str, Any], pairs: list[tuple[torch.Tensor, torch.Tensor]]) -> None:
        """Weight decay is added to the gradient, as in torch.optim.SGD: b = m b + (g + d w), w = w - lr b."""
        for param, gradient in pairs:
            buffer = self.state[param]["exp_avg"]
            buffer.mul_(group["momentum"]).add_(gradient.add(param, alpha=group["weight_decay"]))
            param.add_(buffer, alpha=-group["lr"])

    def _gradient(self, param: torch.Tensor) -> torch.Tensor | None:
        return getattr(param, "decoupled_grad", None) if self._use_decoupled_grad else param.grad

    def _update_in_slices(self, group: dict[str, Any], weight: Any, gradient: Any, first: Any, second: Any) -> None:
        flat = [tensor.view(-1).split(SLICE) for tensor in (weight, gradient, first, second)]
        for parts in zip(*flat, strict=True):
            wide = [part.float() for part in parts]  # the fp32 ones are the tensors themselves
            self._update(group, *([part] for part in wide))
            for part, changed in zip(parts[2:], wide[2:], strict=True):
                if part is not changed:
                    part.copy_(changed)

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
