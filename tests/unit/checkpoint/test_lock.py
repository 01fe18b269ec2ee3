"""One run at a time in a folder: who is refused, whose lock is taken over, and that no two ever hold it."""

import contextlib
import errno
import json
import multiprocessing
import os
import re
import signal
import socket
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, replace
from pathlib import Path

import pytest

from megatron_sft.checkpoint.lock import LOCK, Lock, Owner
from megatron_sft.errors import CheckpointError

FORK = multiprocessing.get_context("fork")
ELSEWHERE = Owner("0a0b-1", "node7", "another boot", 4242, "99", "2026-11-24 08:00:00 UTC")


@contextlib.contextmanager
def taken(folder: Path, **seconds: float) -> Iterator[Lock]:
    lock = Lock(folder, **seconds)
    lock.acquire()
    try:
        yield lock
    finally:
        lock.release()


def is_refused(folder: Path, **seconds: float) -> str:
    """The reason why the lock cannot be had."""
    with pytest.raises(CheckpointError) as caught, taken(folder, **seconds):
        pass
    return str(caught.value)


def put(folder: Path, owner: Owner, silent_s: float) -> None:
    (folder / LOCK).write_text(json.dumps(asdict(owner)))
    os.utime(folder / LOCK, (time.time() - silent_s,) * 2)


def hold_and_wait(folder: Path, ready: object) -> None:
    Lock(folder).acquire()
    ready.set()
    time.sleep(600)


def dead_owner(folder: Path, reap: bool = True) -> Owner:
    """Leaves the lock of a process that was killed with SIGKILL while it held it."""
    ready = FORK.Event()
    process = FORK.Process(target=hold_and_wait, args=(folder, ready))
    process.start()
    assert ready.wait(60)
    os.kill(process.pid, signal.SIGKILL)
    if reap:
        process.join()
    else:
        os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOWAIT)
    return Owner(**json.loads((folder / LOCK).read_text()))


def test_the_second_run_is_told_who_holds_the_folder(tmp_path: Path) -> None:
    with taken(tmp_path / "new" / "out"):
        reason = is_refused(tmp_path / "new" / "out")
        assert re.fullmatch(
            rf"{tmp_path}/new/out: another run is using it: process {os.getpid()} on {socket.gethostname()}, since "
            r"20\d\d-\d\d-\d\d \d\d:\d\d:\d\d UTC\. Expected a --save folder for each run\. Wait until that one has ended, end "
            r"it, or choose another --save\.",
            reason,
        )
        assert [path.name for path in (tmp_path / "new" / "out").iterdir()] == [LOCK]
    assert not (tmp_path / "new").exists()  # made for the run, and nothing was written into it
    (tmp_path / "out").mkdir()
    for _ in range(2):
        with taken(tmp_path / "out"):
            pass
    assert list((tmp_path / "out").iterdir()) == []


@pytest.mark.parametrize("reap", [True, False], ids=["gone", "zombie"])
def test_the_lock_of_a_killed_process_of_this_machine_is_taken_over_at_once(tmp_path: Path, reap: bool) -> None:
    owner = dead_owner(tmp_path, reap)
    started = time.monotonic()
    with taken(tmp_path):
        assert time.monotonic() - started < 10
        assert Owner(**json.loads((tmp_path / LOCK).read_text())).pid == os.getpid() != owner.pid
    assert list(tmp_path.iterdir()) == []


def test_another_process_with_the_same_number_is_not_the_owner(tmp_path: Path) -> None:
    with taken(tmp_path):
        own = Owner(**json.loads((tmp_path / LOCK).read_text()))
    put(tmp_path, replace(own, started="1"), silent_s=0)
    with taken(tmp_path):
        pass


def test_an_owner_elsewhere_holds_it_while_its_heart_beats(tmp_path: Path) -> None:
    put(tmp_path, ELSEWHERE, silent_s=20)
    assert "process 4242 on node7, since 2026-11-24 08:00:00 UTC" in is_refused(tmp_path)
    put(tmp_path, ELSEWHERE, silent_s=200)
    with taken(tmp_path) as lock:
        lock.require()
    assert list(tmp_path.iterdir()) == []


def test_a_silent_owner_elsewhere_is_watched_before_it_counts_as_dead(tmp_path: Path) -> None:
    put(tmp_path, ELSEWHERE, silent_s=2)
    started = time.monotonic()
    with taken(tmp_path, beat_s=0.5, stale_s=4):
        assert time.monotonic() - started > 1
    put(tmp_path, ELSEWHERE, silent_s=2)
    threading.Timer(0.5, os.utime, [tmp_path / LOCK]).start()
    assert "node7" in is_refused(tmp_path, beat_s=0.5, stale_s=60)
    put(tmp_path, ELSEWHERE, silent_s=-(10**6))  # dated by a clock that was set back since
    assert "node7" in is_refused(tmp_path, beat_s=0.1, stale_s=60)


def test_the_owner_beats(tmp_path: Path) -> None:
    with taken(tmp_path, beat_s=0.05):
        os.utime(tmp_path / LOCK, (0, 0))
        deadline = time.monotonic() + 60
        while (tmp_path / LOCK).stat().st_mtime == 0 and time.monotonic() < deadline:
            time.sleep(0.02)
        assert (tmp_path / LOCK).stat().st_mtime > 0


def test_who_lost_the_lock_writes_nothing_more_and_does_not_give_it_back(tmp_path: Path) -> None:
    with taken(tmp_path, beat_s=0.05) as lock:
        lock.require()
        put(tmp_path, ELSEWHERE, silent_s=50)
        with pytest.raises(CheckpointError, match="lock on it is gone, process 4242 on node7, since"):
            lock.require()
        time.sleep(0.3)
        assert time.time() - (tmp_path / LOCK).stat().st_mtime > 40  # nor does it beat for the other
    assert (tmp_path / LOCK).exists()
    (tmp_path / LOCK).unlink()
    with pytest.raises(CheckpointError, match="gone, nobody holds it"):
        lock.require()


@pytest.mark.parametrize(
    "content",
    [b"", b"{}", b"[]", b"[" * 100_000, b"\xff", b'{"id": "../../x"}', json.dumps(asdict(replace(ELSEWHERE, id="../x"))).encode()]
    + [json.dumps(asdict(replace(ELSEWHERE, host=host))).encode() for host in ("\x1b[2J", "a\nb")],
)
def test_a_lock_that_cannot_be_understood_holds_until_it_is_stale(tmp_path: Path, content: bytes) -> None:
    (tmp_path / LOCK).write_bytes(content)
    assert "another run is using it: a process that it does not name." in is_refused(tmp_path)
    os.utime(tmp_path / LOCK, (time.time() - 1000,) * 2)
    with taken(tmp_path):
        pass
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    "make", [os.mkdir, os.mkfifo, lambda path: os.symlink("/dev/zero", path), lambda path: os.symlink("x", path)]
)
def test_what_is_no_file_is_named_and_left_alone(tmp_path: Path, make: Callable[[Path], None]) -> None:
    make(tmp_path / LOCK)
    assert is_refused(tmp_path) == f"{tmp_path / LOCK}: is no file; expected a lock file or nothing. Remove it."
    assert os.path.lexists(tmp_path / LOCK)


def test_a_folder_that_cannot_be_made_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    assert "file/out: cannot be used for checkpoints (Not a directory" in is_refused(tmp_path / "file" / "out")


def test_a_file_system_without_hard_links(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(source: object, target: object) -> None:
        raise OSError(errno.EPERM, "Operation not permitted")

    monkeypatch.setattr(os, "link", refuse)
    dead_owner(tmp_path)
    with taken(tmp_path):
        assert f"process {os.getpid()} on" in is_refused(tmp_path)
    assert list(tmp_path.iterdir()) == []


def try_at(folder: Path, go: object, done: object, answers: object) -> None:
    go.wait()
    lock = Lock(folder)
    try:
        lock.acquire()
    except CheckpointError as error:
        answers.put(str(error))
        return
    answers.put("taken")
    done.wait()  # nobody may get it meanwhile
    lock.require()
    lock.release()


def contest(folder: Path, number: int) -> list[str]:
    """What so many processes get who ask at once; the winner holds it until all have asked."""
    go, done, answers = FORK.Event(), FORK.Event(), FORK.SimpleQueue()
    processes = [FORK.Process(target=try_at, args=(folder, go, done, answers)) for _ in range(number)]
    for process in processes:
        process.start()
    go.set()
    found = [answers.get() for _ in processes]
    done.set()
    for process in processes:
        process.join()
        assert process.exitcode == 0
    return found


@pytest.mark.parametrize("dead", [False, True], ids=["free", "dead owner's"])
def test_of_many_who_ask_at_once_one_gets_it(tmp_path: Path, dead: bool) -> None:
    for _ in range(5):
        if dead:
            put(tmp_path, ELSEWHERE, silent_s=1000)
        found = contest(tmp_path, 6)
        assert found.count("taken") == 1, found
        assert all("another run is using it" in text for text in found if text != "taken")
        assert list(tmp_path.iterdir()) == []


def test_who_is_killed_while_taking_over_is_taken_over_too(tmp_path: Path) -> None:
    dead = dead_owner(tmp_path)
    os.rename(tmp_path / LOCK, tmp_path / f".{LOCK}.{ELSEWHERE.id}")  # as the right to replace ELSEWHERE's
    put(tmp_path, ELSEWHERE, silent_s=1000)
    (tmp_path / f".{LOCK}.{dead.id}.new").write_text("")
    os.utime(tmp_path / f".{LOCK}.{dead.id}.new", (0, 0))
    found = contest(tmp_path, 6)
    assert found.count("taken") == 1, found
    assert list(tmp_path.iterdir()) == []
