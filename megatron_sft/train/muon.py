"""Muon: steps along orthogonalised matrices, each as HF has it (q, k, v, gate, up and every expert alone), however it is cut.

1. momentum is element by element: each process keeps it for what it holds, as it does Adam's moments;
2. `gathered` puts updates together: over data-parallel processes where the distributed optimizer cut through a matrix, then
   over tensor-parallel ones, many at once;
3. every process that holds a part orthogonalises the whole (`orthogonal`, or nanochat's `polar`);
4. it takes its own part back (`Matrix.part`) and steps.

Formulas: torch.optim.Muon (Keller Jordan, kellerjordan.github.io/posts/muon) with the learning rate of Moonlight (arXiv
2502.16982, section 2.2: 0.2 sqrt(max(rows, columns))), so that rates of AdamW fit; and nanochat's (nanochat/optim.py).
"""

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer

from megatron_sft.config.run import ModelConfig
from megatron_sft.core_compat import device
from megatron_sft.hf.layout import LAYOUTS, Placement, Shard, read_shard, write_shard
from megatron_sft.train.adam import SLICE, FusedAdam
from megatron_sft.train.groups import named_parameters

TORCH = (3.4445, -4.775, 2.0315)
"""Coefficients of torch.optim.Muon, for each of STEPS iterations."""
STEPS = 5
POLAR = (
    (8.156554524902461, -22.48329292557795, 15.878769915207462),
    (4.042929935166739, -2.808917465908714, 0.5000178451051316),
    (3.8916678022926607, -2.772484153217685, 0.5060648178503393),
    (3.285753657755655, -2.3681294933425376, 0.46449024233003106),
    (2.3465413258596377, -1.7097828382687081, 0.42323551169305323),
)
"""Polar Express (arXiv 2505.16932), for 5 iterations."""
SECOND_BETA = 0.9
"""Of NorMuon's second moment in nanochat."""


def orthogonal(update: torch.Tensor, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
    """[rows, columns] -> `dtype`, its singular values near 1: torch.optim.Muon's iteration, operation by operation."""
    a, b, c = TORCH
    wide = update.to(dtype)
    if update.shape[0] > update.shape[1]:
        wide = wide.T
    wide = wide / wide.norm().clamp(min=1e-7)
    for _ in range(STEPS):
        gram = wide @ wide.T
        wide = torch.addmm(wide, torch.addmm(gram, gram, gram, beta=b, alpha=c), wide, beta=a)
    return wide.T if update.shape[0] > update.shape[1] else wide


def polar(update: torch.Tensor) -> torch.Tensor:
    """[rows, columns] -> fp32: rows made equally long, Polar Express, Frobenius norm sqrt(min(rows, columns)).

    In bf16 on CUDA and fp32 elsewhere, as nanochat's COMPUTE_DTYPE. Rows: arXiv 2603.28254; the norm: arXiv 2602.21545.
    """
    rows, columns = update.shape
    x = update.bfloat16() if update.is_cuda else update
    lengths = x.float().norm(dim=1, keepdim=True).clamp(min=1e-6)
    x = x * (x.float().norm() / rows**0.5 / lengths).to(x.dtype)
    x = x / (x.norm() * 1.01 + 1e-6)
    for a, b, c in POLAR:
        gram = x.T @ x if rows > columns else x @ x.T
        step = b * gram + c * (gram @ gram)
        x = a * x + (x @ step if rows > columns else step @ x)
    x = x.float()
    return x * (min(rows, columns) ** 0.5 / x.norm().clamp(min=1e-6))


def evened(update: torch.Tensor, second: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """NorMuon (arXiv 2510.05491): lines of an update scaled by their running mean square; the update's norm stays.

    Args:
        update: [rows, columns].
        second: the same shape, every element of a line (a row, of a wide matrix a column) the line's running mean square.

    Returns:
        (the update, the new running mean squares in the same shape).
    """
    line = 1 if update.shape[0] >= update.shape[1] else 0
    mean = update.square().mean(dim=line, keepdim=True)
    running = second.narrow(line, 0, 1).lerp(mean, 1 - SECOND_BETA)
    scale = running.clamp(min=1e-10).rsqrt()
    before, after = mean.sum().sqrt(), (mean * scale.square()).sum().sqrt()
    return update * (scale * (before / after.clamp(min=1e-10))), running.expand_as(update)


def nanochat_momentum(step: int) -> float:
    """0.85 in the first step, 0.95 from the 300th on (scripts/base_train.py:get_muon_momentum)."""
    return 0.85 + 0.1 * min((step - 1) / 300, 1.0)


@dataclass(frozen=True)
class Matrix:
    """Where a parameter that Muon updates lies: this process's elements of a tensor-parallel part of it."""

    layout: str
    """Of hf/layout.py: which HF matrices it consists of."""
    shape: tuple[int, int]
    """Of the tensor-parallel part."""
    start: int
    end: int
    """Elements of the part that this process updates."""
    model: ModelConfig = field(repr=False)
    tensor_group: dist.ProcessGroup | None
    """Processes with the other parts; None: there are none."""
    data_group: dist.ProcessGroup | None
    """Processes with the other elements; None: this one has all of the part."""

    def joined(self, mine: torch.Tensor | None, dtype: torch.dtype) -> torch.Tensor | None:
        """Collective over the data group: the whole tensor-parallel part, `shape`; None where this process has none of it.

        Args:
            mine: [end - start]; None: this process has none.
            dtype: what is sent and returned.
        """
        part = None if mine is None else mine.to(dtype).reshape(-1)
        if self.data_group is not None:
            whole = torch.zeros(math.prod(self.shape), dtype=dtype, device=device())
            if part is not None:
                whole[self.start : self.end] = part
            dist.all_reduce(whole, group=self.data_group)
            part = whole if part is not None else None
        return None if part is None or self.start == self.end else part.view(self.shape)

    def split(self, parts: Sequence[torch.Tensor]) -> dict[int, torch.Tensor]:
        """The HF matrices that all tensor-parallel parts, in the order of their ranks, make up."""
        shapes = self._placement(0, len(parts)).shapes
        found = {number: torch.zeros(shape, dtype=parts[0].dtype, device=parts[0].device) for number, shape in enumerate(shapes)}
        for rank, shard in enumerate(parts):
            write_shard(self._placement(rank, len(parts)), shard, found)
        return found

    def part(self, sources: Mapping[int, torch.Tensor]) -> torch.Tensor:
        """This process's elements of HF matrices, 0 where a matrix is not given: [end - start], the matrices' dtype."""
        group = self.tensor_group
        rank, size = (0, 1) if group is None else (dist.get_rank(group), dist.get_world_size(group))
        first = next(iter(sources.values()))
        shard = torch.zeros(self.shape, dtype=first.dtype, device=first.device)
        read_shard(self._placement(rank, size), shard, sources)
        return shard.view(-1)[self.start : self.end]

    def _placement(self, rank: int, size: int) -> Placement:
        return LAYOUTS[self.layout](Shard(self.shape, rank, size, self.model))


def gathered(held: Sequence[tuple[Matrix, torch.Tensor | None]], dtype: torch.dtype) -> list[dict[int, torch.Tensor]]:
    """Collective: the HF matrices that this process's elements are part of, in `dtype`; one exchange per tensor-parallel group.

    Args:
        held: matrices and what this process has of them, in one order on all processes; None: it has none, and gets none.
        dtype: what is sent and returned.
    """
    parts = [matrix.joined(mine, dtype) for matrix, mine in held]
    whole = [[part] if part is not None else [] for part in parts]
    by_group: dict[dist.ProcessGroup, list[int]] = {}
    for number, (matrix, _) in enumerate(held):
        if matrix.tensor_group is not None and parts[number] is not None:
            by_group.setdefault(matrix.tensor_group, []).append(number)
    for group, numbers in by_group.items():
        flat = torch.cat([part.reshape(-1) for number in numbers if (part := parts[number]) is not None])
        received = [torch.empty_like(flat) for _ in range(dist.get_world_size(group))]
        dist.all_gather(received, flat, group=group)
        shapes = [held[number][0].shape for number in numbers]
        by_rank = [pieces.split([math.prod(shape) for shape in shapes]) for pieces in received]
        for number, shape, pieces in zip(numbers, shapes, zip(*by_rank, strict=True), strict=True):
            whole[number] = [piece.view(shape) for piece in pieces]
    return [matrix.split(found) if found else {} for (matrix, _), found in zip(held, whole, strict=True)]


Plan = list[tuple[torch.Tensor | None, Matrix]]
"""Matrices in one order on all processes, each with this process's elements; None: only others hold some."""


class MixedOptimizer(FusedAdam):
    """FusedAdam with groups whose "method" is muon-torch or muon-nanochat; `plans` is given once the shards are known."""

    plans: dict[tuple[float, float], Plan]
    """Of each such group."""
    iteration_dtype = torch.bfloat16
    """Of muon-torch: what torch.optim.Muon sends an update through. In fp32, layouts can be compared: bf16 makes 4e-3 of 1e-7."""

    def _step_group(self, method: str, group: dict[str, Any], pairs: list[tuple[torch.Tensor, torch.Tensor]]) -> None:
        if not method.startswith("muon"):
            super()._step_group(method, group, pairs)
            return
        gradients = dict(pairs)
        momentum = nanochat_momentum(group["step"]) if method == "muon-nanochat" else group["momentum"]
        step = self._nanochat if method == "muon-nanochat" else self._torch
        for plan in _in_slices(self.plans.get(group_key(group), [])):
            updates = []
            for param, matrix in plan:
                update = None
                if param is not None:
                    with self.fetched(param, "exp_avg") as average:
                        average.lerp_(gradients[param], 1 - momentum)
                        update = gradients[param].lerp(average, momentum)
                updates.append((matrix, update))
            step(group, plan, updates)

    def _torch(self, group: dict[str, Any], plan: Plan, updates: list[tuple[Matrix, torch.Tensor | None]]) -> None:
        for (param, matrix), sources in zip(plan, gathered(updates, self.iteration_dtype), strict=True):
            if param is None:
                continue
            param.mul_(1 - group["lr"] * group["weight_decay"])
            for number, source in sources.items():
                rate = group["lr"] * 0.2 * math.sqrt(max(source.shape))
                step = matrix.part({number: orthogonal(source, self.iteration_dtype)})
                param.add_(step.view(param.shape), alpha=-rate)  # 0 outside of this source

    def _nanochat(self, group: dict[str, Any], plan: Plan, updates: list[tuple[Matrix, torch.Tensor | None]]) -> None:
        """Weight decay is cautious: only where the step goes towards 0."""
        moments = [
            (matrix, None if param is None else self.state[param]["exp_avg_sq"].to(param.device)) for param, matrix in plan
        ]
        every = zip(plan, gathered(updates, torch.float32), gathered(moments, torch.float32), strict=True)
        for (param, matrix), found, seconds in every:
            if param is None:
                continue
            steps, rates = {}, {}
            for number, source in found.items():
                steps[number], seconds[number] = evened(polar(source), seconds[number])
                rates[number] = torch.full_like(source, group["lr"] * math.sqrt(max(1.0, source.shape[0] / source.shape[1])))
            step, rate = matrix.part(steps).view(param.shape), matrix.part(rates).view(param.shape)
            self.state[param]["exp_avg_sq"].copy_(matrix.part(seconds).view(param.shape))
            param.sub_(rate * (step + group["weight_decay"] * param * (step * param >= 0)))


def _in_slices(plan: Plan) -> Iterator[Plan]:
    """Consecutive matrices of SLICE elements together, at least one: what is sent at once."""
    first, size = 0, 0
    for number, (_, matrix) in enumerate(plan):
        elements = math.prod(matrix.shape)
        if size + elements > SLICE and number > first:
            yield plan[first:number]
            first, size = number, 0
        size += elements
    if plan:
        yield plan[first:]


def group_key(group: Mapping[str, Any]) -> tuple[float, float]:
    """What tells the groups of one table apart (groups.py:config_overrides)."""
    return group["lr_mult"], group["wd_mult"]


def attach(optimizer: Any, chunks: Sequence[Any], model: ModelConfig) -> None:
    """Collective over data parallel: tells every MixedOptimizer inside megatron-core's optimizer where its matrices lie.

    Args:
        optimizer: megatron-core's.
        chunks: of this process, wrapped in DDP.
        model: whose matrices they are.
    """
    parameters = list(named_parameters(chunks))
    for part in getattr(optimizer, "chained_optimizers", [optimizer]):
        inner = part.optimizer
        if inner is None:
            continue
        groups = {id(p): group for group in inner.param_groups for p in group["params"]}
        mine = {}
        shards = {}
        for number, (_, parameter) in enumerate(parameters):
            shard, start, end = _held(part, parameter)
            if shard is not None and id(shard) in groups and groups[id(shard)].get("method", "adam").startswith("muon"):
                mine[number], shards[number] = (start, end, group_key(groups[id(shard)])), shard
        sharded = isinstance(part, DistributedOptimizer)
        everyone = [mine]
        if sharded:
            everyone = [{} for _ in range(dist.get_world_size(part.data_parallel_group))]
            dist.all_gather_object(everyone, mine, group=part.data_parallel_group)
        inner.plans = {}
        for number in sorted({number for found in everyone for number in found}):
            name, parameter = parameters[number]
            pieces = [found[number] for found in everyone if number in found]
            is_cut = any(end - start < parameter.numel() for start, end, _ in pieces)
            if number not in mine and not is_cut:
                continue
            start, end, key = mine.get(number, (0, 0, pieces[0][2]))
            matrix = _matrix(name, parameter, model, start, end, part.data_parallel_group if is_cut else None)
            inner.plans.setdefault(key, []).append((shards.get(number), matrix))


def _held(part: Any, parameter: torch.Tensor) -> tuple[torch.Tensor | None, int, int]:
    """(what the torch optimizer inside `part` updates of a parameter, its first element, behind its last); None: nothing."""
    if not isinstance(part, DistributedOptimizer):
        return getattr(parameter, "main_param", parameter), 0, parameter.numel()
    if parameter not in part.model_param_group_index_map:
        return None, 0, 0
    group, place = part.model_param_group_index_map[parameter]
    span = part._get_model_param_range_map(parameter)["param"]
    return part.optimizer.param_groups[group]["params"][place], span.start, span.end


def _matrix(name: str, parameter: Any, model: ModelConfig, start: int, end: int, data_group: Any) -> Matrix:
    is_expert = ".experts." in name
    group = parallel_state.get_expert_tensor_parallel_group() if is_expert else parallel_state.get_tensor_model_parallel_group()
    is_cut = getattr(parameter, "tensor_model_parallel", False) and dist.get_world_size(group) > 1
    layout = "column" if getattr(parameter, "partition_dim", 0) == 1 else "row"
    if name.endswith("linear_qkv.weight"):
        layout = "qkv"
    elif name.endswith("linear_fc1.weight") and model.gated_mlp:
        layout = "gated"
    elif name.endswith("mixer.in_proj.weight"):
        layout = "mamba_in"
    elif not is_cut:
        layout = "whole"
    shape = (parameter.shape[0], parameter.shape[1])
    return Matrix(layout, shape, start, end, model, group if is_cut else None, data_group)
