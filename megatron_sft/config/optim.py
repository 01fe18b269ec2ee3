"""Optimizer and schedule, as flags. A section of RunConfig (run.py); its table of groups is read in groups.py."""

from dataclasses import dataclass
from typing import Annotated

from megatron_sft.config.fields import Length, Number, Precision, Words


@dataclass(frozen=True)
class OptimConfig:
    """Optimizer and learning-rate schedule. Exactly one of *_iters and *_samples may be given for decay and warm-up."""

    optimizer: Annotated[str, Words("adam", "sgd", "muon")] = "adam"
    """adam (AdamW), sgd, or muon: orthogonalised steps for matrices, adam for embeddings, head, norms and biases."""
    sgd_momentum: Annotated[float, Number(0, 0.999999)] = 0.9
    """Share of the running gradient that a step of sgd keeps."""
    muon_variant: Annotated[str, Words("torch", "nanochat")] = "torch"
    """torch: torch.optim.Muon's, with rates as AdamW has them; nanochat: Polar Express and NorMuon, with nanochat's rates."""
    muon_momentum: Annotated[float, Number(0, 0.999999)] = 0.95
    """Share of the running gradient that a step of muon keeps; nanochat's goes from 0.85 to 0.95 in 300 steps instead."""
    lr: Annotated[float, Number(0, 1)] = 5e-5
    """Highest learning rate."""
    min_lr: Annotated[float, Number(0, 1)] = 0.0
    """Learning rate at the end of the schedule."""
    lr_decay_style: Annotated[str, Words("constant", "linear", "cosine", "inverse-square-root", "WSD")] = "cosine"
    """constant, linear, cosine, inverse-square-root or WSD."""
    lr_decay_iters: Annotated[Length, "iterations"] | None = None
    """From start to min_lr; None: the whole run."""
    lr_decay_samples: Annotated[Length, "packs"] | None = None
    """The same in packs."""
    lr_warmup_iters: Annotated[int, Number(0, 10**12), "iterations"] = 0
    """From lr_warmup_init to lr."""
    lr_warmup_samples: Annotated[int, Number(0, 10**12), "packs"] = 0
    """The same in packs."""
    lr_warmup_fraction: Annotated[float, Number(0, 0.999), "share"] | None = None
    """The same as a share of the schedule."""
    lr_warmup_init: Annotated[float, Number(0, 1)] = 0.0
    """Learning rate that the warm-up begins with."""
    init_lr_frac: Annotated[float, Number(1e-6, 1), "share"] = 1.0
    """All highest rates are multiplied by it."""
    warmdown_ratio: Annotated[float, Number(0, 1), "share"] | None = None
    """In place of lr_decay_style: constant, then linear to the lowest rate over this share of the schedule."""
    final_lr_frac: Annotated[float, Number(0, 1), "share"] | None = None
    """In place of min_lr: the lowest rate as a share of the highest."""
    param_groups: tuple[str, ...] = ()
    """Each "PATTERN lr=X min_lr=X weight_decay=X optimizer=WORD": settings of parameters whose name the pattern matches."""
    matrix_lr: Annotated[float, Number(0, 1)] | None = None
    """Highest learning rate of all matrices but embeddings and head."""
    embedding_lr: Annotated[float, Number(0, 1)] | None = None
    """The same of the embeddings, also where the head is tied to them."""
    unembedding_lr: Annotated[float, Number(0, 1)] | None = None
    """The same of a head with weights of its own."""
    lr_wsd_decay_style: Annotated[str, Words("exponential", "linear", "cosine", "minus_sqrt")] = "exponential"
    """How WSD decays at its end."""
    lr_wsd_decay_iters: Annotated[Length, "iterations"] | None = None
    """Length of WSD's decay."""
    lr_wsd_decay_samples: Annotated[Length, "packs"] | None = None
    """The same in packs."""
    weight_decay: Annotated[float, Number(0, 1)] = 0.0
    """Of matrices; norms and biases have none."""
    adam_beta1: Annotated[float, Number(0, 0.999999)] = 0.9
    """Share of the first moment that a step keeps."""
    adam_beta2: Annotated[float, Number(0, 0.999999)] = 0.95
    """Share of the second moment that a step keeps."""
    adam_eps: Annotated[float, Number(1e-20, 1)] = 1e-8
    """Added to the root of the second moment."""
    clip_grad: Annotated[float, Number(0, 1e6), "norm"] = 1.0
    """The gradient is scaled down to it; 0: never."""
    use_precision_aware_optimizer: bool = False
    """The dtypes below count: with bf16 gradients and moments 12 bytes per parameter in place of 18. Master weights stay fp32."""
    main_grads_dtype: Precision = "fp32"
    """fp32 or bf16: gradients as they are added up, reduced and kept for the step."""
    exp_avg_dtype: Precision = "fp32"
    """fp32 or bf16: Adam's first moment."""
    exp_avg_sq_dtype: Precision = "fp32"
    """fp32 or bf16: Adam's second moment."""
    optimizer_cpu_offload: bool = False
    """Optimizer states stay in host memory; with --use-distributed-optimizer and adam alone master weights do too."""
    optimizer_offload_fraction: Annotated[float, Number(0, 1), "share"] = 1.0
    """Share of the parameters whose states do."""
