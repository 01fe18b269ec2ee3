import json

import numpy as np
import pytest
import torch

from megatron_sft.data.packing import PackPlan
from megatron_sft.data.sft_dataset import SFTDataset
from megatron_sft.data.store import MemoryStore
from megatron_sft.errors import ConfigError
from tests.text_models import byte_tokenizer

PLAN = PackPlan(np.array([0, 1]), np.array([0, 2]))


def store():
    return MemoryStore([(np.array([11, 12, 13]), np.array([0, 1, 1])), (np.array([21, 22]), np.array([1, 1]))])


def item_lists(**flags):
    item = SFTDataset(store(), PLAN, 8, 99, **flags)[0]
    return {name: value.tolist() for name, value in item.items()}


def test_item_has_labels_of_the_same_document_and_a_masked_tail():
    assert item_lists() == {
        "tokens": [11, 12, 13, 21, 22, 99, 99, 99],
        "labels": [12, 13, 21, 22, 99, 99, 99, 99],
        "loss_mask": [1.0, 1.0, 0.0, 1.0, 0.0, 0.0, 0.0, 0.0],
        "position_ids": [0, 1, 2, 0, 1, 0, 1, 2],
        "cu_seqlens": [0, 3, 5, 8],
        "max_seqlen": 3,
    }


def test_dtypes():
    item = SFTDataset(store(), PLAN, 8, 99)[0]
    assert {name: value.dtype for name, value in item.items()} == {
        "tokens": torch.int64,
        "labels": torch.int64,
        "loss_mask": torch.float32,
        "position_ids": torch.int64,
        "cu_seqlens": torch.int32,
        "max_seqlen": torch.int32,
    }


def test_a_full_pack_has_no_tail():
    item = SFTDataset(store(), PLAN, 5, 99)[0]
    assert item["cu_seqlens"].tolist() == [0, 3, 5] and item["tokens"].tolist() == [11, 12, 13, 21, 22]


def test_positions_run_on_without_reset_position_ids():
    assert item_lists(reset_position_ids=False)["position_ids"] == [0, 1, 2, 3, 4, 5, 6, 7]


def test_one_document_to_attention_without_reset_attention_mask():
    item = item_lists(reset_attention_mask=False)
    assert item["cu_seqlens"] == [0, 5, 8] and item["max_seqlen"] == 5
    assert item["loss_mask"] == [1.0, 1.0, 0.0, 1.0, 0.0, 0.0, 0.0, 0.0]


def test_without_eod_mask_loss_a_trained_first_token_is_a_target():
    assert item_lists(eod_mask_loss=False)["loss_mask"] == [1.0, 1.0, 1.0, 1.0, 0.0, 0.0, 0.0, 0.0]


def test_weights_are_carried():
    weighted = MemoryStore([(np.array([1, 2, 3]), np.array([0.0, 0.5, 2.0], dtype=np.float32))])
    item = SFTDataset(weighted, PackPlan(np.array([0]), np.array([0, 1])), 4, 0)[0]
    assert item["loss_mask"].tolist() == [0.5, 2.0, 0.0, 0.0]


def test_documents_are_padded_to_a_multiple_inside_a_pack():
    item = SFTDataset(store(), PLAN, 8, 99, multiple=4)[0]
    assert item["tokens"].tolist() == [11, 12, 13, 99, 21, 22, 99, 99]
    assert item["cu_seqlens"].tolist() == [0, 4, 8]
    assert item["loss_mask"].tolist() == [1.0, 1.0, 0.0, 0.0, 1.0, 0.0, 0.0, 0.0]
    assert item["position_ids"].tolist() == [0, 1, 2, 3, 0, 1, 2, 3]


def test_it_is_a_sequence():
    dataset = SFTDataset(store(), PLAN, 8, 99)
    assert len(dataset) == 1 and dataset[-1]["tokens"].tolist() == dataset[0]["tokens"].tolist()
    assert len(list(torch.utils.data.DataLoader(dataset, batch_size=None))) == 1


def test_a_data_loader_gets_one_packed_row():
    dataset = SFTDataset(store(), PackPlan(np.array([0, 1]), np.array([0, 1, 2])), 4, 99)
    batch = next(iter(torch.utils.data.DataLoader(dataset, batch_size=2, collate_fn=SFTDataset.collate)))
    assert {name: value.tolist() for name, value in batch.items()} == {
        "tokens": [[11, 12, 13, 99, 21, 22, 99, 99]],
        "labels": [[12, 13, 99, 99, 22, 99, 99, 99]],
        "loss_mask": [[1.0, 1.0, 0.0, 0.0, 1.0, 0.0, 0.0, 0.0]],
        "position_ids": [[0, 1, 2, 0, 0, 1, 0, 1]],
        "cu_seqlens": [0, 3, 4, 6, 8],
        "max_seqlen": 3,
    }
    assert [value.dtype for value in batch.values()] == [value.dtype for value in dataset[0].values()]


def test_from_files_pads_documents_for_context_parallelism(tmp_path):
    rows = [{"messages": [{"role": "user", "content": "a" * n}, {"role": "assistant", "content": "b"}]} for n in (1, 2, 3)]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    dataset = SFTDataset.from_files([str(tmp_path / "rows.jsonl")], byte_tokenizer(), 256, context_parallel_size=2)
    ends = dataset[0]["cu_seqlens"].tolist()
    lengths = sorted(dataset.store.lengths.tolist())
    assert len(ends) == 5 and all(end % 4 == 0 for end in ends)
    assert sorted(np.diff(ends[:4])) == [-(-length // 4) * 4 for length in lengths]
    with pytest.raises(ConfigError, match="seq_length 258: expected a multiple of 4"):
        SFTDataset.from_files([str(tmp_path / "rows.jsonl")], byte_tokenizer(), 258, context_parallel_size=2)
