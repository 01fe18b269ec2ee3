"""What a run writes while it trains: checkpoints, the mark of the best one, HF folders.

Not here: how a checkpoint is written (checkpoint/distributed.py), when (loop.py).
"""

import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from megatron_sft.checkpoint import tracker
from megatron_sft.checkpoint.distributed import CheckpointSaver
from megatron_sft.checkpoint.lock import Lock
from megatron_sft.config.folders import PLACEHOLDERS, export_folder, export_folders
from megatron_sft.config.run import RunConfig
from megatron_sft.hf.exporter import save_hf, try_hf, try_places
from megatron_sft.hf.peft import save_peft
from megatron_sft.hf.weights import require_finite
from megatron_sft.log import logger
from megatron_sft.parallel import Ranks
from megatron_sft.train.benchmarks import is_less_better
from megatron_sft.train.state import TrainState
from megatron_sft.train.watch import Watch


class Saving:
    """Writes the checkpoints and HF folders of one run.

    Args:
        run: its `checkpoint` says what and where.
        ranks: of this process.
        chunks: the model in DDP, and with it what a checkpoint holds:
        optimizer: megatron-core's.
        scheduler: megatron-core's.
        identity: of the data, by DATA_IDENTITY's names.
        watch: is told what this rank does.
        lock: of the --save folder; None: nobody else writes there.
        went_on_from: as CheckpointSaver's.
    """

    def __init__(
        self,
        run: RunConfig,
        ranks: Ranks,
        chunks: list[Any],
        optimizer: Any,
        scheduler: Any,
        identity: Mapping[str, str],
        watch: Watch,
        lock: Lock | None = None,
        went_on_from: int | None = None,
    ):
        self._run, self._ranks, self._chunks, self._watch = run, ranks, chunks, watch
        self._optimizer, self._scheduler, self._identity = optimizer, scheduler, identity
        self._saver = CheckpointSaver(run.checkpoint.save, run, ranks, lock, went_on_from) if run.checkpoint.save else None
        self._unmarked: tuple[int, float] | None = None
        self._unsaid: tuple[int, float] | None = None
        self._exported: int | None = None
        self._is_adapter = run.lora.lora_rank > 0 and not run.lora.lora_merge
        if run.checkpoint.save_hf:
            place, like = export_folders(run.checkpoint.save_hf)[-1], run.data.tokenizer_model
            if self._is_adapter:
                try_places([place], ranks, like)
            else:
                try_hf(chunks, run.model, place, ranks, like)

    def checkpoint(self, state: TrainState, value: float | None) -> None:
        """Collective: writes a checkpoint, and an HF folder for each iteration where --save-hf asks for it.

        Args:
            state: after a step.
            value: of --best-metric at it, where that was taken.
        """
        assert self._saver is not None, "the loop saves only with --save"
        self._watch.tell(f"saving iteration {state.iteration}")
        self.finish()
        require_finite(self._chunks, self._ranks, f"iteration {state.iteration}")
        values = {**state.to_dict(), "consumed_train_samples": state.consumed_samples, **self._identity}
        if value is not None:
            values[self._run.checkpoint.best_metric] = value
            self._unmarked = (state.iteration, value)
        self._unsaid = (state.iteration, time.monotonic())
        self._saver.save(state.iteration, self._chunks, self._optimizer, self._scheduler, values)
        if not self._run.checkpoint.async_save:
            self.finish()
        if self._is_by_iteration():
            self.export(state.iteration)
        self._watch.tell("training")

    def finish(self) -> None:
        """Collective: waits for a save in the background; its checkpoint may be the best one."""
        if self._saver is None:
            return
        self._saver.finish()
        if self._unsaid is not None and self._ranks.rank == 0:
            self._say(*self._unsaid)
        self._unsaid = None
        if self._unmarked is not None:
            self.mark(*self._unmarked)
            self._unmarked = None

    def _say(self, iteration: int, begin: float) -> None:
        folder = tracker.checkpoint_folder(Path(str(self._run.checkpoint.save)), iteration)
        size = sum(file.stat().st_size for file in folder.iterdir())
        taken = "in the background" if self._run.checkpoint.async_save else f"in {time.monotonic() - begin:.1f} s"
        logger.info("saved %s (%.1f MB) %s", folder, size / 1e6, taken)

    def mark(self, iteration: int, value: float) -> None:
        """Marks a whole checkpoint as the best one if it is: --save-retain keeps it, best_checkpoint.json names it."""
        if self._saver is None or self._ranks.rank != 0:
            return
        root = Path(str(self._run.checkpoint.save))
        metric, best = self._run.checkpoint.best_metric, tracker.read_best(root)
        if best and best["metric"] == metric and tracker.checkpoint_folder(root, int(best["iteration"])).is_dir():
            before = float(best["value"])
            if before <= value if is_less_better(metric) else before >= value:
                return
        self._saver.mark_best(iteration, metric, value)
        logger.info("best checkpoint so far: iteration %d, %s %.6f", iteration, metric, value)

    def export(self, iteration: int) -> None:
        """Collective, within whole_parameters: writes the HF folder of --save-hf, which appears whole."""
        if not self._run.checkpoint.save_hf or self._exported == iteration:
            return
        self._watch.tell("writing the HF folder")
        folder = export_folder(self._run.checkpoint.save_hf, iteration)
        require_finite(self._chunks, self._ranks, folder)
        if self._is_adapter:
            save_peft(self._chunks, self._run, folder, self._ranks)
        else:
            save_hf(self._chunks, self._run.model, folder, self._ranks, self._run.data.tokenizer_model)
        self._exported = iteration
        logger.info("wrote the HF folder %s", folder)

    def _is_by_iteration(self) -> bool:
        return any(name in (self._run.checkpoint.save_hf or "") for name in PLACEHOLDERS)
