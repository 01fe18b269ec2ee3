"""What stands behind the last layer, as one object: hidden states in, losses, logits or the states themselves out.

Training, validation, generation, scoring and distillation all ask the same head. What a pass gives is said by a function of
(head, hidden states), an `Output`, handed to SFTModel.forward: a new kind of loss is a method here and its arithmetic in
loss.py; a use of logits or states is a function of its own, beside its user.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.distributed as dist
from megatron.core.tensor_parallel import gather_from_tensor_model_parallel_region

from megatron_sft.model.loss import CROSS_ENTROPY, TokenLoss, linear_cross_entropy


@dataclass(frozen=True)
class Head:
    """The output embedding of this tensor-parallel rank and what is done with its logits."""

    weight: torch.Tensor
    """[rows, hidden]: this rank's rows of the vocabulary."""
    vocab_size: int
    """Ids from here on are padding of the table and get no probability."""
    softcap: float | None
    """Logits become softcap * tanh(logit / softcap) (Gemma 2)."""
    group: dist.ProcessGroup
    """Tensor-parallel ranks, which have the other rows."""
    triton: bool = False
    """Losses by Triton's kernels."""

    def losses(
        self,
        hidden: torch.Tensor,
        labels: torch.Tensor,
        loss_mask: torch.Tensor,
        token_loss: TokenLoss = CROSS_ENTROPY,
        trained: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Per-token costs, by blocks of the vocabulary: full logits never exist.

        Args:
            hidden: [tokens, hidden], the same on every tensor-parallel rank.
            labels: [tokens] int64.
            loss_mask: [tokens] float32; tokens at 0 cost nothing.
            token_loss: what the others cost.
            trained: [n] int64, where loss_mask is not 0; None: the device is asked.

        Returns:
            [tokens] float32; 0 where loss_mask is 0. Not multiplied by the mask's weights.
        """
        settings = self.vocab_size, self.group, self.softcap, token_loss
        return linear_cross_entropy(hidden, self.weight, labels, loss_mask, *settings, trained, self.triton)

    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """[tokens, hidden] -> [tokens, rows] in the activations' dtype: those of this rank's rows, padding included."""
        logits = hidden @ self.weight.T
        return logits if self.softcap is None else self.softcap * torch.tanh(logits / self.softcap)

    def whole_logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """[tokens, hidden] -> [tokens, vocab_size] float32 on every tensor-parallel rank. Collective over them."""
        return gather_from_tensor_model_parallel_region(self.logits(hidden), group=self.group)[:, : self.vocab_size].float()


Output = Callable[[Head, torch.Tensor], torch.Tensor]
"""What a forward pass gives on the last stage, of the head and the last layer's states [tokens, hidden] after its norm."""
