"""DataConfig -> token store, rows held out for validation and test, packs of one epoch. No torch, no GPU.

What `megatron-sft prepare` does ahead of time, and training does again in an instant from the cached store.
"""

import os
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from megatron_sft.config.run import DataConfig
from megatron_sft.data.mixture import epochs_from_weights, mixture_documents
from megatron_sft.data.packing import PackPlan, pack
from megatron_sft.data.sources import open_source
from megatron_sft.data.store import DocumentStore
from megatron_sft.data.tokens import TokenStore, build_token_store
from megatron_sft.errors import DataError
from megatron_sft.log import logger


class Split(NamedTuple):
    """Documents by what they are for: int64 ids, ascending; together every document once."""

    train: np.ndarray
    valid: np.ndarray
    test: np.ndarray


VALID_SPLITS = ("validation", "test")
"""Of a folder or hub name in valid_data that has splits, the first that is there is read."""


def open_store(config: DataConfig, paths: Sequence[str], names: Sequence[str] = (), splits: Sequence[str] = ()) -> TokenStore:
    """The tokens and masks of all rows at `paths`, from the cache or built now.

    Args:
        config: how rows become tokens; data_cache_path says where the cache is.
        paths: files, folders, globs or hub names, in order.
        names: one a path; empty: the file stems.
        splits: of folders and hub names; empty: config.data_split.

    Raises:
        DataError: rows that cannot be used, or a cache that cannot be written.
    """
    cache = Path(config.data_cache_path) if config.data_cache_path else _users_cache()
    sources = [open_source(path, config, names[index] if names else None, splits) for index, path in enumerate(paths)]
    try:
        return build_token_store(config, sources, cache / "tokens")
    except OSError as error:  # of the rows' files it is a DataError already
        raise DataError(
            f"{cache}: the tokens cannot be kept there ({error}); expected a writable folder with room. Make room, or name "
            "another one with --data-cache-path."
        ) from None


def _users_cache() -> Path:
    try:
        return Path.home() / ".cache" / "megatron_sft"
    except RuntimeError:
        raise DataError(
            f"user {os.getuid()} has no home folder for the token store: HOME is not set, and the system does not know the user. "
            "Pass --data-cache-path FOLDER."
        ) from None


def training_set(config: DataConfig) -> tuple[TokenStore, PackPlan]:
    """The token store of the training data, and the packs of one epoch of it."""
    store = open_store(config, config.train_data, config.train_names)
    return store, pack_documents(config, store, mixture(config, store, split_documents(config, store).train))


def split_documents(config: DataConfig, store: DocumentStore) -> Split:
    """Divides a store by --split. A row goes to one part with all its documents; the seed says which.

    --valid-data has no influence: what is trained on does not depend on what is validated on.
    """
    rows, row_of = np.unique(store.row_ids, return_inverse=True)
    shares = np.array(config.split) / max(config.split)
    ends = np.round(np.cumsum(shares[1:] / shares.sum()) * len(rows)).astype(np.int64)
    order = np.random.Generator(np.random.PCG64([config.seed, 1])).permutation(np.arange(len(rows)))
    part_of = np.zeros(len(rows), dtype=np.int8)  # 0 training, 1 validation, 2 test
    part_of[order[: ends[1]]] = 2
    part_of[order[: ends[0]]] = 1
    if any(config.split[1:]):
        _log_split(config, np.bincount(part_of, minlength=3).tolist())
    return Split(*(np.flatnonzero(part_of[row_of] == part) for part in range(3)))


def _log_split(config: DataConfig, counts: list[int]) -> None:
    train, valid, test = counts
    unread = " and not read, because --valid-data is" if config.valid_data and valid else ""
    shares = ",".join(f"{share:g}" for share in config.split)
    text = f"{train:,} rows to train on, {valid:,} held out for validation{unread}, {test:,} held out for test (not read here)"
    logger.info("--split %s: %s.", shares, text)
    for name, share, count in zip(("validation", "test"), config.split[1:], counts[1:], strict=True):
        if share and not count:
            logger.warning("--split %s: the %s share of %s rows is less than half a row: none.", shares, name, f"{sum(counts):,}")


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
        raise DataError(
            f"no row is left of {len(store)} documents by --split {config.split}, --prompt-data-epochs {config.train_epochs} and "
            f"--prompt-data-weights {config.train_weights}; expected at least one. Give training a larger share."
        )
    return pack(store.lengths[documents], config.seq_length, config.packing).remapped(documents)
