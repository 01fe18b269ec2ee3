"""Checkpoints under attack: asynchronous saves, full disks, flipped bits, planted payloads, half-written folders."""

import contextlib
import json
import os
import pickle
import resource
import shutil
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch

from megatron_sft.checkpoint import manifest, torch_dist, tracker
from megatron_sft.checkpoint.distributed import CheckpointSaver, latest_iteration, load_checkpoint
from megatron_sft.config.run import CheckpointConfig, DataConfig, ParallelConfig, RunConfig, TrainConfig
from megatron_sft.errors import CheckpointError, DataError, SavingError, TrainingError, UserError
from tests.distributed.checkpoint_rig import Rig, build
from tests.gloo import run_ranks
from tests.soak.mutated_pickles import as_of_others
from tests.text_models import text_model


def _save(rig: Rig, root: str | Path, iteration: int) -> None:
    saver = CheckpointSaver(root, rig.run, rig.ranks)
    saver.save(iteration, rig.chunks, rig.optimizer, rig.scheduler, {"consumed_train_samples": iteration})
    saver.finish()


def _load(rig: Rig, root: str | Path) -> dict:
    return load_checkpoint(root, rig.chunks, rig.optimizer, rig.scheduler, rig.ranks)


def _async_steps(root: str, layout: dict) -> tuple[list[str], list[str]]:
    rig = build(ParallelConfig(**layout), CheckpointConfig(async_save=True, save_retain=3))
    saver = CheckpointSaver(root, rig.run, rig.ranks)
    expected = []
    for iteration in range(1, 6):
        rig.train(iteration, iteration)
        saver.save(iteration, rig.chunks, rig.optimizer, rig.scheduler, {"consumed_train_samples": iteration})
        expected.append(rig.digest())
    saver.finish()
    found = []
    for iteration in (3, 4, 5):
        load_checkpoint(root, rig.chunks, rig.optimizer, rig.scheduler, rig.ranks, iteration=iteration)
        found.append(rig.digest())
    return expected[2:], found


@pytest.mark.parametrize(("world_size", "layout"), [(1, {}), (2, {"use_distributed_optimizer": True})])
def test_async_checkpoints_hold_the_iteration_they_were_asked_for(tmp_path: Path, world_size: int, layout: dict) -> None:
    for expected, found in run_ranks(_async_steps, world_size, str(tmp_path), layout):
        assert found == expected
    assert tracker.iterations(tmp_path) == [5, 4, 3]
    assert sorted(p.name for p in tmp_path.iterdir())[:2] == ["iter_0000003", "iter_0000004"]


def _full_disk(root: str, asynchronous: bool) -> tuple[list[str], str, float, int]:
    """Saves until the disk is full; another file takes the room of everything but the first checkpoints."""
    rig = build(ParallelConfig(), CheckpointConfig(async_save=asynchronous))
    _save(rig, root, 1)
    filler = Path(root) / "filler"
    messages = []
    free = os.statvfs(root)
    room = free.f_bavail * free.f_frsize
    size = sum(p.stat().st_size for p in (Path(root) / "iter_0000001").iterdir())
    steps = range(0, size + 4096, 4096) if not asynchronous else range(0, size, 16 * 4096)
    for left in steps:
        filler.write_bytes(b"\0" * max(0, room - left))
        started = time.monotonic()
        try:
            _save(rig, root, 2)
        except CheckpointError as error:
            messages.append(str(error))
        else:
            break
        assert time.monotonic() - started < 10
        assert sorted(p.name for p in Path(root).iterdir()) == ["filler", "iter_0000001", tracker.TRACKER]
        assert not manifest.problems(Path(root) / "iter_0000001", content=True)
    assert latest_iteration(root) in (1, 2)
    filler.unlink(missing_ok=True)
    _save(rig, root, 3)
    return messages, _load(rig, root)["iteration"], room, size


@pytest.mark.parametrize("asynchronous", [False, True])
def test_full_disk_at_every_write(tmp_path: Path, asynchronous: bool) -> None:
    if os.geteuid() != 0:
        pytest.skip("mounting a small tmpfs needs root")
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=3m", "tmpfs", str(tmp_path)], capture_output=True)
    if mounted.returncode:
        pytest.skip("tmpfs cannot be mounted here")
    try:
        [(messages, iteration, _, _)] = run_ranks(_full_disk, 1, str(tmp_path), asynchronous)
    finally:
        subprocess.run(["umount", "-l", str(tmp_path)], check=True)
    assert iteration == 3
    assert len(messages) >= (4 if asynchronous else 10)
    assert all("No space left on device" in message and "iter_0000002: not saved" in message for message in messages)


def _one_rank_fails(root: str) -> tuple[str, float, int]:
    rig = build(ParallelConfig(tensor_model_parallel_size=2))
    _save(rig, root, 1)
    saver = CheckpointSaver(root, rig.run, rig.ranks)
    if rig.ranks.rank == 1:  # its file exists as a folder: the open fails on this rank alone
        original = saver._write

        def broken(*args: object) -> None:
            (tracker.saving_folder(Path(root), 2) / "__1_0.distcp").mkdir()
            original(*args)

        saver._write = broken
    started = time.monotonic()
    with pytest.raises(CheckpointError) as caught:
        saver.save(2, rig.chunks, rig.optimizer, rig.scheduler, {})
    return str(caught.value), time.monotonic() - started, _load(rig, root)["iteration"]


def test_failure_of_one_rank_is_an_error_on_all(tmp_path: Path) -> None:
    for message, seconds, iteration in run_ranks(_one_rank_fails, 2, str(tmp_path)):
        assert "rank 1: [Errno 21] Is a directory" in message
        assert seconds < 5
        assert iteration == 1
    assert sorted(p.name for p in tmp_path.iterdir()) == ["iter_0000001", tracker.TRACKER]


def _flips(root: str) -> tuple[int, int]:
    rig = build(ParallelConfig(), hidden_size=64, ffn_hidden_size=128, padded_vocab_size=512)
    _save(rig, root, 1)
    folder = Path(root) / "iter_0000001"
    flipped = detected = 0
    for path in sorted(folder.iterdir()):
        content = bytearray(path.read_bytes())
        every = 1 if len(content) < 4096 else 1 << 16
        for position in range(0, len(content), every):
            place = min(position + (position * 7919) % every, len(content) - 1)
            content[place] ^= 1 << (position // every % 8)
            path.write_bytes(content)
            flipped += 1
            detected += bool(manifest.problems(folder, content=True))
            content[place] ^= 1 << (position // every % 8)
        path.write_bytes(content)
    assert not manifest.problems(folder, content=True)
    return flipped, detected


def test_every_flipped_bit_is_detected(tmp_path: Path) -> None:
    [(flipped, detected)] = run_ranks(_flips, 1, str(tmp_path))
    assert flipped > 1000
    assert detected == flipped


def _damage(root: str) -> dict[str, object]:
    rig = build(ParallelConfig())
    for iteration in (1, 2, 3):
        _save(rig, root, iteration)
    newest = Path(root) / "iter_0000003"
    data = newest / "__0_0.distcp"
    data.write_bytes(data.read_bytes()[:-1])
    found: dict[str, object] = {"truncated": (latest_iteration(root), _load(rig, root)["iteration"])}
    shutil.rmtree(newest)
    found["missing"] = (latest_iteration(root), _load(rig, root)["iteration"])
    (Path(root) / tracker.TRACKER).write_text("")
    found["empty tracker"] = (latest_iteration(root), _load(rig, root)["iteration"])
    (Path(root) / "iter_0000002" / "metadata.json").unlink()
    found["partial"] = (latest_iteration(root), _load(rig, root)["iteration"])
    (Path(root) / "iter_0000001" / "manifest.json").write_text("{}")
    for name, ask in {"latest": lambda: latest_iteration(root), "load": lambda: _load(rig, root)}.items():
        with pytest.raises(CheckpointError, match="no usable checkpoint"):
            ask()
        found[name] = "refused"
    return found


def test_damaged_newest_checkpoint_is_skipped(tmp_path: Path) -> None:
    [found] = run_ranks(_damage, 1, str(tmp_path))
    assert found == {
        "truncated": (2, 2),
        "missing": (2, 2),
        "empty tracker": (2, 2),
        "partial": (1, 1),
        "latest": "refused",
        "load": "refused",
    }


class Payload:
    """Leaves a file when it is unpickled."""

    def __init__(self, canary: str):
        self.canary = canary

    def __reduce__(self) -> tuple:
        return (os.system, (f"touch {self.canary}",))


def _plant(root: str, canary: str) -> dict[str, str]:
    rig = build(ParallelConfig())
    _save(rig, root, 1)
    folder = Path(root) / "iter_0000001"
    as_of_others(folder)  # the attacker's: nothing gives it away before it is read
    found = {}
    for path in sorted(folder.iterdir()):
        original = path.read_bytes()
        evils = [pickle.dumps(Payload(canary)), _torch_bytes(Payload(canary), path)]
        if path.name == ".metadata":
            metadata = pickle.loads(original)
            metadata.planner_data = Payload(canary)
            evils.append(pickle.dumps(metadata))
        if path.name.endswith(".distcp"):
            evils = [_in_every_item(original, evil, path) for evil in evils]
        for number, evil in enumerate(evils):
            path.write_bytes(evil)
            try:
                _load(rig, root)
                outcome = "loaded"
            except CheckpointError as error:
                outcome = "refused" if "iter_0000001" in str(error) else str(error)
            found[f"{path.name} {number}"] = outcome
            assert not Path(canary).exists(), path.name
        path.write_bytes(original)
    _load(rig, root)
    return found


def _torch_bytes(value: object, path: Path) -> bytes:
    scratch = path.with_name("evil")
    torch.save(value, scratch)
    content = scratch.read_bytes()
    scratch.unlink()
    return content


def _in_every_item(original: bytes, evil: bytes, path: Path) -> bytes:
    """The payload at the start of every item of a .distcp file."""
    content = bytearray(original)
    for info in torch_dist.read_metadata(path.parent).storage_data.values():
        if info.relative_path == path.name:
            content[info.offset : info.offset + min(len(evil), info.length)] = evil[: info.length]
    return bytes(content)


def test_no_file_of_a_checkpoint_can_run_code(tmp_path: Path) -> None:
    canary = tmp_path / "executed"
    [found] = run_ranks(_plant, 1, str(tmp_path / "root"), str(canary))
    assert not canary.exists()
    harmless = {name for name, outcome in found.items() if outcome == "loaded"}
    assert harmless <= {"metadata.json 0", "metadata.json 1"}
    assert {name.split()[0] for name in found} >= {".metadata", "common.pt", "__0_0.distcp"}


def _unwritable(root: str) -> str:
    rig = build(ParallelConfig())
    with pytest.raises(CheckpointError) as caught:
        _save(rig, root, 1)
    return str(caught.value)


def test_save_folder_that_is_a_file_is_a_clear_error(tmp_path: Path) -> None:
    (tmp_path / "taken").write_text("")
    [message] = run_ranks(_unwritable, 1, str(tmp_path / "taken"))
    assert "taken: cannot be used for checkpoints" in message
    assert "File exists" in message


@contextlib.contextmanager
def _no_file_above(size: int | None) -> Iterator[None]:
    """No file of this process may grow beyond `size` bytes: a full disk that needs no disk. None: as large as it likes."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (hard if size is None else size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def _refusals(kind: type[UserError], write: Callable[[], object], sizes: list[int]) -> list[str]:
    """What `write` says at each size of a full disk; without one it succeeds."""
    messages = []
    for size in sizes:
        with _no_file_above(size), pytest.raises(kind) as caught:
            write()
        messages.append(str(caught.value))
    write()
    return messages


def _writers(root: str) -> dict[str, list[str]]:
    """Every place that a run writes to beside its checkpoints: first on full disks, then where a file is in the way."""
    from megatron_sft.data.prepare import open_store
    from megatron_sft.hf.config import model_config_from_hf, read_hf_config
    from megatron_sft.hf.exporter import save_hf
    from megatron_sft.hf.weights import load_hf_weights
    from megatron_sft.model.build import build_model
    from megatron_sft.train.metrics import MetricsWriter

    place, found = Path(root), {}
    rig = build(ParallelConfig())
    _save(rig, f"{root}/run", 1)
    folder = f"{root}/hf"
    text_model("llama", place / "hf")
    row = {"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b" * 40}]}
    (place / "rows.jsonl").write_text(f"{json.dumps(row)}\n" * 50)
    (place / "file").write_text("")

    def prepare(cache: str) -> object:
        return open_store(DataConfig(tokenizer_model=folder, data_cache_path=cache, num_workers=1), [f"{root}/rows.jsonl"])

    def metrics(save: str) -> None:
        run = RunConfig(checkpoint=CheckpointConfig(save=save))
        writer = MetricsWriter(run, 1, 10)
        writer._log_interval = 100
        for iteration in range(2, 5):
            writer.write({"iteration": iteration, "sft/trained_tokens": 1, "sft/loss": 1.0, "text": "x" * 300})
        writer.close()

    model = model_config_from_hf(read_hf_config(folder))
    chunks = build_model(model, ParallelConfig(), TrainConfig())
    load_hf_weights(chunks, model, folder, rig.ranks)

    def export(out: str) -> None:
        save_hf(chunks, model, out, rig.ranks, folder)

    def best(root: str) -> None:
        CheckpointSaver(root, rig.run, rig.ranks).mark_best(1, "valid/loss", 0.5)

    found["tokens"] = _refusals(DataError, lambda: prepare(f"{root}/cache"), [0, 64, 1000])
    found["metrics"] = _refusals(TrainingError, lambda: metrics(f"{root}/run"), [0, 400, 700])
    found["best"] = _refusals(SavingError, lambda: best(f"{root}/run"), [0, 10])
    found["export"] = _refusals(SavingError, lambda: export(f"{root}/out"), [0, 1000, 20_000])
    found["checkpoint"] = _refusals(SavingError, lambda: _save(rig, f"{root}/run", 2), [0, 500, 5000])
    assert _load(rig, f"{root}/run")["iteration"] == 2
    in_the_way = {"tokens": (DataError, prepare), "metrics": (TrainingError, metrics), "export": (SavingError, export)}
    for name, (kind, write) in in_the_way.items():
        with pytest.raises(kind) as caught:
            write(f"{root}/file/below")
        found[name].append(str(caught.value))
    assert not [path for path in place.rglob("*") if ".writing" in path.name or path.suffix in (".building", ".tmp")]
    return found


def test_every_other_writer_says_that_it_cannot(tmp_path: Path) -> None:
    [found] = run_ranks(_writers, 1, str(tmp_path))
    assert {name: len(messages) for name, messages in found.items()} == {
        "tokens": 4,
        "metrics": 4,
        "best": 2,
        "export": 4,
        "checkpoint": 3,
    }
    reasons = {"tokens": "cache", "metrics": "metrics.jsonl", "best": "run", "export": "out", "checkpoint": "iter_0000002"}
    for name, messages in found.items():
        full, blocked = (messages[:-1], messages[-1:]) if name in ("tokens", "metrics", "export") else (messages, [])
        assert all("File too large" in message and reasons[name] in message for message in full), full
        assert all("Not a directory" in message and "file/below" in message for message in blocked), blocked
        assert all("xpected a writable" in message or "expected room" in message for message in messages), messages
