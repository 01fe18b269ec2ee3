"""Resumes runs in other layouts at random steps and counts which rows the model was given in each epoch.

    python tests/soak/resume_changes.py [--changes 60] [--seed 0]

A trial is one run of finetune.py's own functions in real processes, stopped at random steps and resumed with another DP,
TP, PP, micro-batch size or --max-tokens-per-gpu; sometimes it loses its newest checkpoints. The global batch size is given
never, always, at the first start only, or another each time (--allow-changed). Packings, mixtures, fractions of epochs, held
out rows, cut rows and lengths in epochs, samples and iterations vary by trial. Counted is what the embedding got while the
model trained: documents by their tokens. Exits with 1 unless every document of an epoch was trained exactly once, in steps of
the size that the rules say.
"""

import argparse
import json
import random
import shutil
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from megatron_sft.checkpoint import tracker
from tests.gloo import run_ranks
from tests.text_models import text_model

LAYOUTS = ((1, 1, 1), (1, 1, 1), (2, 1, 1), (3, 1, 1), (1, 2, 1), (1, 1, 2), (2, 2, 1), (2, 1, 2), (1, 2, 2))
"""(DP, TP, PP)."""
BATCH_SIZES = ("never", "always", "first", "other")
SEQ_LENGTH = 128


def write_inputs(root: Path) -> None:
    """A tiny model and two files of 29 and 14 rows of 40 to 150 tokens, no two alike."""
    text_model("llama", root / "model")
    number = 0
    for name, count in (("big", 29), ("small", 14)):
        with (root / f"{name}.jsonl").open("w") as file:
            for _ in range(count):
                number += 1
                question = {"role": "user", "content": f"{number}?" + f" So {number}?" * (number % 5)}
                answer = {"role": "assistant", "content": f"{number}." + f" Yes, {number}." * (number % 7)}
                file.write(json.dumps({"messages": [question, answer]}) + "\n")


@dataclass(frozen=True)
class Part:
    """What one process of one part of a run did."""

    counts: bool
    """Whether this process stands for its data-parallel rank."""
    given: Mapping[int, list[int]]
    """Iteration -> documents that the model was given."""
    batch_size: int
    num_packs: int
    is_finished: bool
    epoch: Counter[int]
    """Documents of an epoch, as often as the mixture has them."""


def train_part(flags: list[str]) -> Part:
    """Called in every process: trains from the checkpoint in --save, or from the start, as finetune.py does."""
    import os

    from megatron_sft import parallel
    from megatron_sft.checkpoint.background import torch_optimizers
    from megatron_sft.checkpoint.state import unwrap
    from megatron_sft.config.arguments import parse
    from megatron_sft.data.prepare import mixture, split_documents
    from megatron_sft.train import setup
    from megatron_sft.train.loop import train
    from megatron_sft.train.watch import Watch

    run, explicit = parse(flags, int(os.environ["WORLD_SIZE"]))
    run, source = setup.resolved(run, explicit)
    ranks = parallel.initialize(run.parallel, run.train.seed)
    data = setup.build_data(run)
    job, state, saving = setup.build_job(run, ranks, source, data, Watch(ranks, 0))
    known = {data.store.document(i).tokens.tobytes(): i for i in range(len(data.store))}
    assert len(known) == len(data.store), "two documents are alike"
    given: dict[int, list[int]] = {state.iteration + 1: []}

    def count(module: Any, _: Any, kwargs: Mapping[str, Any]) -> None:
        if not module.training:
            return
        tokens, positions = kwargs["input_ids"][0].int().numpy(), kwargs["position_ids"][0].tolist()
        starts = [i for i, position in enumerate(positions) if position == 0]
        for start, end in zip(starts, [*starts[1:], len(positions)], strict=True):
            document = tokens[start:end]
            if document.tobytes() in known:
                given[max(given)].append(known[document.tobytes()])
            else:
                assert set(document.tolist()) <= {0, 256}, f"the model was given what is no document: {document.tolist()}"

    for chunk in job.chunks:
        model = unwrap(chunk)
        if ranks.is_first_stage:
            model.embedding.register_forward_pre_hook(count, with_kwargs=True)
    torch_optimizers(job.optimizer)[0].register_step_post_hook(lambda *_: given.update({max(given) + 1: []}))
    state, _ = train(job, state)
    saving.finish()
    parallel.finalize()
    del given[max(given)]
    epoch = Counter(mixture(run.data, data.store, split_documents(run.data, data.store).train).tolist())
    return Part(
        counts=ranks.tp_rank == 0 and ranks.is_first_stage,
        given=given,
        batch_size=run.train.global_batch_size or 0,
        num_packs=len(data.train),
        is_finished=state.iteration == len(job.loader),
        epoch=epoch,
    )


@dataclass
class Trial:
    """One run and all that is known of it."""

    chance: random.Random
    save: Path
    flags: list[str]
    """Of every part of the run."""
    batch_size: str
    """One of BATCH_SIZES: when --global-batch-size is given."""
    given: dict[int, list[int]] = field(default_factory=dict)
    consumed: dict[int, int] = field(default_factory=dict)
    expected: int | None = None
    """The global batch size that the rules say."""
    layouts: list[str] = field(default_factory=list)

    def part(self, stop_after: int | None, layout: tuple[int, int, int] | None = None) -> Part:
        """Trains on with a random layout, or the given (DP, TP, PP); `stop_after` iterations more, None: to the end."""
        chance, done = self.chance, max(self.given, default=0)
        dp, tp, pp = layout or chance.choice(LAYOUTS)
        micro = 1 if layout else chance.randint(1, 3)
        fills = not layout and chance.random() < 0.25
        flags = ["--max-tokens-per-gpu", SEQ_LENGTH * chance.randint(1, 3)] if fills else []
        flags += ["--async-save"] if chance.random() < 0.25 else []
        if self.expected is None:
            self.expected = micro * dp if self.batch_size == "never" else chance.randint(2, 7)
            flags += [] if self.batch_size == "never" else ["--global-batch-size", self.expected]
        elif self.batch_size == "always":
            flags += ["--global-batch-size", self.expected]
        elif self.batch_size == "other":
            self.expected = chance.randint(1, 9)
            flags += ["--global-batch-size", self.expected, "--allow-changed", "global_batch_size"]
        micro = min(micro, self.expected)  # more is refused
        flags += ["--tensor-model-parallel-size", tp, "--pipeline-model-parallel-size", pp, "--micro-batch-size", micro]
        if stop_after is not None:
            flags += ["--exit-interval", done + stop_after]
        self.layouts.append(f"DP {dp} TP {tp} PP {pp} micro {micro} batch {self.expected} from {done}")
        parts = run_ranks(train_part, dp * tp * pp, [*self.flags, *map(str, flags), "--save", str(self.save)])
        assert parts[0].batch_size == self.expected, f"batch size {parts[0].batch_size}; expected {self.expected}"
        for iteration in parts[0].given:
            self.given[iteration] = [i for part in parts if part.counts for i in part.given[iteration]]
        for line in (self.save / "metrics.jsonl").read_text().splitlines():
            values = json.loads(line)
            self.consumed[values["iteration"]] = values["consumed_samples"]
        self._check_sizes(done, parts[0])
        return parts[0]

    def _check_sizes(self, done: int, part: Part) -> None:
        """Steps of the expected size, except the last of an epoch and of the run."""
        last = len(self.given)
        assert sorted(self.consumed) == sorted(self.given) == list(range(1, last + 1))
        for iteration in range(done + 1, last + 1):
            before, size = self.consumed.get(iteration - 1, 0), part.batch_size
            full = min(before + size, (before // part.num_packs + 1) * part.num_packs)
            found = self.consumed[iteration]
            assert found == full or (iteration == last and part.is_finished and found < full), (
                f"step {iteration} has {found - before}"
            )

    def lose(self) -> None:
        """What a kill may do: the newest checkpoints are not there."""
        kept = self.chance.choice(tracker.iterations(self.save))
        for iteration in [i for i in tracker.iterations(self.save) if i > kept]:
            shutil.rmtree(tracker.checkpoint_folder(self.save, iteration))
        (self.save / tracker.TRACKER).write_text(str(kept))
        self.given = {i: rows for i, rows in self.given.items() if i <= kept}
        self.consumed = {i: packs for i, packs in self.consumed.items() if i <= kept}

    def check(self, num_packs: int, epoch: Counter[int]) -> int:
        """Every epoch has its documents, each as often as the mixture says; returns how many epochs were whole."""
        found: dict[int, Counter[int]] = {}
        for iteration, rows in self.given.items():
            found.setdefault((self.consumed[iteration] - 1) // num_packs, Counter()).update(rows)
        whole = self.consumed[len(self.given)] // num_packs
        for number, rows in sorted(found.items()):
            if number < whole:
                wrong = {i: (rows[i], epoch[i]) for i in rows.keys() | epoch.keys() if rows[i] != epoch[i]}
            else:
                wrong = {i: (rows[i], epoch[i]) for i in rows if rows[i] > epoch[i]}
            assert not wrong, f"epoch {number}: document: (trained, expected) {wrong}"
        return whole


def needed_flags(root: Path) -> list[str]:
    """What every run needs, beside data and length."""
    model = str(root / "model")
    flags = ["--load", model, "--tokenizer-model", model, "--data-cache-path", str(root / "cache"), "--num-workers", "1"]
    return [*flags, "--seq-length", str(SEQ_LENGTH), "--lr", "1e-3", "--save-interval", "2", "--no-verify-conversion"]


def random_trial(root: Path, seed: int, batch_size: str) -> Trial:
    """A run whose data and length are drawn by the seed."""
    chance = random.Random(seed)
    big, small = (str(root / name) for name in ("big.jsonl", "small.jsonl"))
    data = chance.choice(
        [
            ["--finetune-hf-dataset", big],
            ["--prompt-data", "a", big, "b", small, "--prompt-data-epochs", "1", str(chance.choice([0.5, 1.5, 2]))],
            ["--prompt-data", "a", big, "b", small, "--prompt-data-weights", "1", "1"],
        ]
    )
    data += chance.choice([[], [], ["--split", "80,10,10", "--eval-iters", "1", "--eval-interval", "3"]])
    data += ["--packing", chance.choice(["best-fit", "none", "sequential"]), *chance.choice([[], ["--truncation", "split"]])]
    data += ["--no-shuffle"] if chance.random() < 0.2 else []
    length = chance.choice(
        [["--num-epoch", str(chance.choice([1, 1.4, 2, 2.5]))], ["--train-samples", str(chance.randint(20, 60))]]
    )
    length = ["--train-iters", str(chance.randint(8, 16))] if chance.random() < 0.2 else length
    data += ["--use-distributed-optimizer"] if chance.random() < 0.5 else []
    return Trial(chance, root / f"trial{seed}", [*needed_flags(root), *data, *length], batch_size)


def run_trial(trial: Trial, changes: int) -> tuple[int, int, int]:
    """Trains to the end with at most `changes` stops on the way: (stops, times that checkpoints were lost, whole epochs)."""
    stops = losses = 0
    while True:
        part = trial.part(trial.chance.randint(1, 4) if stops < changes else None)
        if part.is_finished:
            return stops, losses, trial.check(part.num_packs, part.epoch)
        stops += 1
        if trial.chance.random() < 0.25:
            trial.lose()
            losses += 1


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--changes", type=int, default=60)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    start, failures, total = time.monotonic(), 0, Counter[str]()
    with tempfile.TemporaryDirectory() as folder:
        write_inputs(Path(folder))
        while total["changes"] < options.changes:
            seed = options.seed + total["trials"]
            trial = random_trial(Path(folder), seed, BATCH_SIZES[total["trials"] % len(BATCH_SIZES)])
            total["trials"] += 1
            try:
                stops, losses, epochs = run_trial(trial, trial.chance.randint(3, 7))
            except AssertionError as error:
                failures += 1
                print(f"seed {seed}: {error}\n  batch size given: {trial.batch_size}; {' '.join(trial.flags)}")
                print("  " + "\n  ".join(trial.layouts))
                continue
            total.update(changes=stops, losses=losses, epochs=epochs, documents=sum(map(len, trial.given.values())))
            print(
                f"seed {seed}: batch size given {trial.batch_size}: {stops} changes, {epochs} whole epochs; {trial.layouts[-1]}"
            )
    seconds = time.monotonic() - start
    print(f"{dict(total)}, {failures} trials with a wrong count, {seconds:.0f} s")
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main())
