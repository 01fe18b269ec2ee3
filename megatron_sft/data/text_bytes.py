"""How many bytes of text the trained tokens are, so that a loss can be said in bits a byte, whatever the tokenizer."""

from collections.abc import Iterable
from typing import Any

import numpy as np

from megatron_sft.data.preview import decoder
from megatron_sft.data.sft_dataset import SFTDataset


def trained_bytes(dataset: SFTDataset, packs: Iterable[int], tokenizer: Any) -> np.ndarray:
    """UTF-8 bytes of what is trained in some packs, by source; special tokens such as the end of a turn have none.

    Args:
        dataset: the packs, with documents of one or more sources.
        packs: which of them.
        tokenizer: of the tokens.

    Returns:
        int64 [sources].
    """
    decode, sizes = decoder(tokenizer), np.zeros(len(dataset.store.source_names), dtype=np.int64)
    special = [token for token, added in tokenizer.added_tokens_decoder.items() if added.special]
    for index in packs:
        pack = dataset.pack(int(index))
        is_text = (pack.loss_mask > 0) & ~np.isin(pack.labels, special)
        for source, first, last in zip(pack.source_ids, pack.document_offsets, pack.document_offsets[1:], strict=False):
            sizes[source] += len(decode(pack.labels[first:last][is_text[first:last]].tolist()).encode())
    return sizes
