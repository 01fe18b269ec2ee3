"""Logging of rank 0, to standard output, one plain line per message. Not for metrics (metrics.py)."""

import logging
import sys

logger = logging.getLogger("megatron_sft")


class _Handler(logging.StreamHandler):  # type: ignore[type-arg]
    """Leaves out what nobody reads any more (| head) or what a full disk refuses: a run goes on without its lines."""

    def handleError(self, record: logging.LogRecord) -> None:
        if not isinstance(sys.exc_info()[1], OSError):
            super().handleError(record)


def configure(rank: int, to_stderr: bool = False) -> None:
    """Sends messages to standard output on rank 0; other ranks show warnings and errors, prefixed with their rank.

    Safe to call again: the handler is replaced, not added.

    Args:
        rank: of this process.
        to_stderr: standard output belongs to something else.
    """
    handler = _Handler(sys.stderr if to_stderr else sys.stdout)
    handler.setFormatter(logging.Formatter("%(message)s" if rank == 0 else f"[rank {rank}] %(message)s"))
    logger.handlers[:] = [handler]
    logger.setLevel(logging.INFO if rank == 0 else logging.WARNING)
    logger.propagate = False


def printable(text: str) -> str:
    """Control characters as escapes, so that data cannot drive a terminal or a page."""
    return "".join(c if c in "\n\t" or c.isprintable() else repr(c)[1:-1] for c in text)
