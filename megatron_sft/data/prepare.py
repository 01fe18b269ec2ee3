"""DataConfig -> token store, the share held out for validation, packs of one epoch. No torch, no GPU.

What `megatron-sft prepare` does ahead of time, and training does again in an instant from the cached store.
"""

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from megatron_sft.config.run import DataConfig
from megatron_sft.data.mixture import epochs_from_weights, mixture_documents
from megatron_sft.data.packing import PackPlan, pack
from megatron_sft.data.sources import open_source
from megatron_sft.data.store import DocumentStore
from megatron_sft.data.tokens import TokenStore, build_token_store
from megatron_sft.errors import DataError


def open_store(config: DataConfig, paths: Sequence[str], names: Sequence[str] = ()) -> TokenStore:
    """The tokens and masks of all rows at `paths`, from the cache or built now.

    Args:
        config: how rows become tokens; data_cache_path says where the cache is.
        paths: files, folders, globs or hub names, in order.
        names: one a path; empty: the file stems.

    Raises:
        DataError: rows that cannot be used, or a cache that cannot be written.
    """
    cache = Path(config.data_cache_path) if config.data_cache_path else Path.home() / ".cache" / "megatron_sft"
    sources = [open_source(path, config, names[index] if names else None) for index, path in enumerate(paths)]
    try:
        return build_token_store(config, sources, cache / "tokens")
    except OSError as error:  # of the rows' files it is a DataError already
        raise DataError(
            f"{cache}: the tokens cannot be kept there ({error}); expected a writable folder with room. Make room, or name "
            "another one with --data-cache-path."
        ) from None


def training_set(config: DataConfig) -> tuple[TokenStore, PackPlan]:
    """The token store of the training data, and the packs of one epoch of it."""
    store = open_store(config, config.train_data, config.train_names)
    documents, _ = train_and_held_out(config, len(store))
    return store, pack_documents(config, store, mixture(config, store, documents))


def train_and_held_out(config: DataConfig, num_documents: int) -> tuple[np.ndarray, np.ndarray]:
    """int64 ids of the documents to train on, and of those that --split keeps for validation, chosen by the seed.

    With valid_data nothing is held out. Both are in order; 10 documents at 90,10,0 -> 9 and 1.
    """
    everything = np.arange(num_documents)
    if config.valid_data:
        return everything, everything[:0]
    share = config.split[1] / sum(config.split)
    order = np.random.Generator(np.random.PCG64([config.seed, 1])).permutation(everything)
    held_out = np.sort(order[: round(share * num_documents)])
    return np.setdiff1d(everything, held_out), held_out


def mixture(config: DataConfig, store: DocumentStore, documents: np.ndarray) -> np.ndarray:
    """The documents of one epoch: each as often as train_epochs or train_weights say. int64 [m]."""
    epochs = config.train_epochs
    if config.train_weights:
        sizes = np.bincount(store.source_ids[documents], minlength=len(store.source_names)).tolist()
        epochs = epochs_from_weights(config.train_weights, sizes)
    return mixture_documents(documents, store.source_ids, epochs, config.seed)


def pack_documents(config: DataConfig, store: DocumentStore, documents: np.ndarray) -> PackPlan:
    """Packs of the given documents.

    Raises:
        DataError: there are none.
    """
    if not len(documents):
        raise DataError(f"--split {config.split} leaves no row to train on of {len(store)}. Give training a larger share.")
    return pack(store.lengths[documents], config.seq_length, config.packing).remapped(documents)
