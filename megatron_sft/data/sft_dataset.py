"""Packed conversations as a torch.utils.data.Dataset. Works alone: no Megatron, no processes, no CUDA.

    from transformers import AutoTokenizer
    from megatron_sft.data.sft_dataset import SFTDataset

    tokenizer = AutoTokenizer.from_pretrained("HuggingFaceTB/SmolLM2-135M-Instruct")
    dataset = SFTDataset.from_files(["train.jsonl"], tokenizer, seq_length=1024)
    item = dataset[0]                       # tokens, labels, loss_mask, position_ids, cu_seqlens, max_seqlen
    trained = item["labels"][item["loss_mask"] > 0]
    print(len(dataset), tokenizer.decode(trained))
    loader = torch.utils.data.DataLoader(dataset, batch_size=4, collate_fn=SFTDataset.collate)

Not here: rendering and masks (chat.py), which documents share a pack (packing.py), order and micro-batches (loader.py).
"""

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from megatron_sft.config.run import DataConfig
from megatron_sft.data.packing import PackPlan, pack, padded_lengths
from megatron_sft.data.store import DocumentStore
from megatron_sft.errors import ConfigError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


@dataclass(frozen=True)
class Pack:
    """One pack without its padded tail, as numpy arrays of T tokens and k documents."""

    tokens: np.ndarray
    """int64 [T]."""
    labels: np.ndarray
    """int64 [T]: the token that follows."""
    loss_mask: np.ndarray
    """float32 [T]: weight of the loss on `labels`; 0: not trained."""
    position_ids: np.ndarray
    """int64 [T]."""
    document_offsets: np.ndarray
    """int32 [k + 1], 0..T: where documents start."""
    cu_seqlens: np.ndarray
    """int32, 0..T: what attention treats as one document; document_offsets unless reset_attention_mask is off."""
    document_ids: np.ndarray
    """int64 [k]: ids in the store."""
    source_ids: np.ndarray
    """int16 [k]."""


class SFTDataset(torch.utils.data.Dataset):
    """Packs of documents, each padded to `seq_length` tokens.

    Args:
        store: the documents (store.py).
        plan: which documents share a pack (packing.py), made with the same `multiple`.
        seq_length: tokens per item.
        pad_token_id: fills the tail of an item; never trained.
        multiple: every document is padded up to a multiple of it (context parallelism).
        reset_position_ids: positions restart at every document. False: they run on through the pack.
        reset_attention_mask: documents do not see each other. False: a pack is one document to attention.
        eod_mask_loss: no loss on the step from a document to the next. False: that step is trained when the first
            token of the next document is (never for a chat that starts with a prompt; always with --train-on all).
            Megatron masks by the input token (`loss_mask[data == eod] = 0`), which is the same step.
    """

    def __init__(
        self,
        store: DocumentStore,
        plan: PackPlan,
        seq_length: int,
        pad_token_id: int,
        *,
        multiple: int = 1,
        reset_position_ids: bool = True,
        reset_attention_mask: bool = True,
        eod_mask_loss: bool = True,
    ):
        self.store = store
        self.plan = plan
        self.seq_length = seq_length
        self.pad_token_id = pad_token_id
        self.multiple = multiple
        self.reset_position_ids = reset_position_ids
        self.reset_attention_mask = reset_attention_mask
        self.eod_mask_loss = eod_mask_loss

    @classmethod
    def from_files(
        cls,
        paths: Sequence[str],
        tokenizer: "PreTrainedTokenizerBase",
        seq_length: int,
        config: DataConfig | None = None,
        context_parallel_size: int = 1,
    ) -> "SFTDataset":
        """Reads, tokenises and packs `paths` in this process, for small data and for use alone.

        Args:
            paths: files or folders that sources.open_source reads.
            tokenizer: a Hugging Face tokenizer with a chat template.
            seq_length: tokens per item.
            config: everything else (packing, truncation, train_on ...); None: the defaults.
            context_parallel_size: documents are padded to multiples of twice as many tokens, which Megatron cuts each into.

        Raises:
            ConfigError: seq_length is no such multiple.
        """
        from megatron_sft.data.chat import ChatEncoder
        from megatron_sft.data.sources import open_source
        from megatron_sft.data.tokens import build_memory_store

        multiple = 2 * context_parallel_size if context_parallel_size > 1 else 1
        if seq_length % multiple:
            raise ConfigError(
                [
                    f"seq_length {seq_length}: expected a multiple of {multiple}, twice the context-parallel size "
                    f"{context_parallel_size}. Change one of them."
                ]
            )
        config = dataclasses.replace(config or DataConfig(), seq_length=seq_length)
        store = build_memory_store(config, [open_source(p, config) for p in paths], ChatEncoder(tokenizer, config))
        plan = pack(store.lengths, seq_length, config.packing, multiple)
        return cls.from_config(store, plan, config, pad_token_id_of(tokenizer), multiple)

    @staticmethod
    def collate(items: Sequence[dict[str, torch.Tensor]]) -> dict[str, torch.Tensor]:
        """Items as one packed row, for the collate_fn of a DataLoader.

        Example: two items of 8 tokens, cu_seqlens [0, 3, 5, 8] and [0, 8] -> cu_seqlens [0, 3, 5, 8, 16].

        Returns:
            tokens, labels, position_ids int64 [1, T]; loss_mask float32 [1, T]; cu_seqlens int32 [documents + 1], 0..T;
            max_seqlen int32 scalar. T: all their tokens.
        """
        rows = ("tokens", "labels", "loss_mask", "position_ids")
        starts = np.cumsum([0, *(len(item["tokens"]) for item in items)])
        ends = [item["cu_seqlens"][1:] + int(start) for item, start in zip(items, starts, strict=False)]
        return {
            **{name: torch.cat([item[name] for item in items]).unsqueeze(0) for name in rows},
            "cu_seqlens": torch.cat([torch.zeros(1, dtype=torch.int32), *ends]).to(torch.int32),
            "max_seqlen": torch.stack([item["max_seqlen"] for item in items]).max(),
        }

    @classmethod
    def from_config(
        cls, store: DocumentStore, plan: PackPlan, config: DataConfig, pad_token_id: int, multiple: int = 1
    ) -> "SFTDataset":
        """The data set that `config` describes, over a store and a plan that exist."""
        return cls(
            store,
            plan,
            config.seq_length,
            pad_token_id,
            multiple=multiple,
            reset_position_ids=config.reset_position_ids,
            reset_attention_mask=config.reset_attention_mask,
            eod_mask_loss=config.eod_mask_loss,
        )

    def __len__(self) -> int:
        return len(self.plan)

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        """Item `index`.

        Example: documents of 3 and 2 tokens, seq_length 8 -> cu_seqlens [0, 3, 5, 8],
        position_ids [0, 1, 2, 0, 1, 0, 1, 2]; the tail of 3 is its own masked document.

        Returns:
            tokens, labels, position_ids int64 [seq_length]; loss_mask float32 [seq_length];
            cu_seqlens int32 [k + 1], 0..seq_length; max_seqlen int32 scalar.
        """
        if not -len(self) <= index < len(self):
            raise IndexError(f"pack {index} of {len(self)}")
        item = self.pack(index % len(self))
        tail = self.seq_length - len(item.tokens)
        cu_seqlens = item.cu_seqlens if not tail else np.append(item.cu_seqlens, np.int32(self.seq_length))
        tail_positions = np.arange(tail) if self.reset_position_ids else np.arange(len(item.tokens), self.seq_length)
        padding = np.full(tail, self.pad_token_id, dtype=np.int64)
        return {
            "tokens": torch.from_numpy(np.concatenate([item.tokens, padding])),
            "labels": torch.from_numpy(np.concatenate([item.labels, padding])),
            "loss_mask": torch.from_numpy(np.concatenate([item.loss_mask, np.zeros(tail, dtype=np.float32)])),
            "position_ids": torch.from_numpy(np.concatenate([item.position_ids, tail_positions])),
            "cu_seqlens": torch.from_numpy(cu_seqlens.astype(np.int32)),
            "max_seqlen": torch.tensor(int(np.diff(cu_seqlens).max()), dtype=torch.int32),
        }

    def attended_lengths(self, pack_ids: Sequence[int] | np.ndarray) -> np.ndarray:
        """Tokens of what attention treats as one document in these packs, without padding. int64 [documents]."""
        lengths = [np.asarray(self.store.lengths[self.plan[int(i)]], dtype=np.int64) for i in pack_ids]
        return np.concatenate(lengths if self.reset_attention_mask else [[pack.sum()] for pack in lengths])

    def pack(self, index: int) -> Pack:
        """Pack `index` without its padded tail."""
        document_ids = self.plan[index]
        documents = [self.store.document(int(i)) for i in document_ids]
        lengths = np.array([len(tokens) for tokens, _ in documents], dtype=np.int64)
        offsets = np.zeros(len(documents) + 1, dtype=np.int64)
        np.cumsum(padded_lengths(lengths, self.multiple), out=offsets[1:])
        total = int(offsets[-1])
        tokens = np.full(total, self.pad_token_id, dtype=np.int64)
        weights = np.zeros(total + 1, dtype=np.float32)  # of each token as a target; one more for the shift
        for start, (document, mask) in zip(offsets, documents, strict=False):
            tokens[start : start + len(document)] = document
            weights[start : start + len(document)] = mask
        labels = np.append(tokens[1:], self.pad_token_id)
        loss_mask = weights[1:]
        if self.eod_mask_loss or self.multiple > 1:  # padding between documents has no next token
            loss_mask[offsets[1:] - 1] = 0.0
        positions = np.arange(total, dtype=np.int64)
        if self.reset_position_ids:
            positions -= np.repeat(offsets[:-1], np.diff(offsets))
        document_offsets = offsets.astype(np.int32)
        return Pack(
            tokens=tokens,
            labels=labels,
            loss_mask=loss_mask,
            position_ids=positions,
            document_offsets=document_offsets,
            cu_seqlens=document_offsets if self.reset_attention_mask else np.array([0, total], dtype=np.int32),
            document_ids=document_ids,
            source_ids=np.asarray(self.store.source_ids[document_ids], dtype=np.int16),
        )


def pad_token_id_of(tokenizer: Any) -> int:
    """The id that fills tails: the tokenizer's pad token, else its end token, else 0. It is masked by place, not id."""
    for token_id in (tokenizer.pad_token_id, tokenizer.eos_token_id):
        if token_id is not None:
            return int(token_id)
    return 0
