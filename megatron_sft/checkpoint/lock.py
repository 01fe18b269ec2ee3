"""One run at a time in a --save folder: a lock file that says who holds it and that a dead run does not hold.

run.lock is JSON (host, process, since when, and an id that no other lock has), hard-linked into place, which is atomic on
local disks and over NFS; its modification time is the owner's heartbeat. An owner on this machine is dead when its process
is; one elsewhere when its heartbeat has stood still for STALE_S. Clocks are not compared: the file server dates everything.

A dead owner's lock is taken over in this order, so that two who find it cannot both get it:
1. the right to replace it is a lock of its own, named after the dead lock's id (and taken over likewise if its owner dies);
2. whoever has that right looks again, and replaces the lock by a rename only if it still is the dead one's;
3. an owner that was only suspended finds before its next save that the lock is not its own any more, and ends.
"""

import contextlib
import errno
import json
import os
import re
import socket
import stat
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, fields
from pathlib import Path

from megatron_sft.checkpoint.reading import open_regular
from megatron_sft.errors import CheckpointError
from megatron_sft.files import remove
from megatron_sft.log import logger
from megatron_sft.parallel import Ranks, agree

LOCK = "run.lock"
BEAT_S = 10.0
STALE_S = 180.0
_NO_HARD_LINKS = (errno.EPERM, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS, errno.EMLINK)
_ID = re.compile(r"[0-9a-f-]{1,64}")


@dataclass(frozen=True)
class Owner:
    """What a lock file says."""

    id: str
    host: str
    machine: str
    """Boot and process namespace: only where both are this process's own do process numbers mean the same."""
    pid: int
    started: str
    """start_of(pid)."""
    since: str

    def __str__(self) -> str:
        return f"process {self.pid} on {self.host}, since {self.since}" if self.pid else "a process that it does not name"


@dataclass(frozen=True)
class _Seen:
    owner: Owner
    beat: float
    """Modification time, in seconds of the file server's clock."""


class Lock:
    """The lock of one folder. Not for sharing: one object a run.

    Args:
        folder: what is locked, made when missing; None: nothing is locked.
        beat_s: seconds between two heartbeats.
        stale_s: silence after which an owner on another machine counts as dead.
        flag: which names the folder.
        stands_for: what is locked, where the folder is there for its lock alone and vanishes with it.
    """

    def __init__(
        self,
        folder: Path | None,
        beat_s: float = BEAT_S,
        stale_s: float = STALE_S,
        flag: str = "--save",
        stands_for: str | Path | None = None,
    ):
        self._folder, self._beat_s, self._stale_s = folder, beat_s, stale_s
        self._flag, self._stands_for = flag, stands_for
        started = start_of(os.getpid()) or ""
        since = time.strftime("%Y-%m-%d %H:%M:%S UTC", time.gmtime())
        self._own = Owner(str(uuid.uuid4()), socket.gethostname(), _machine(), os.getpid(), started, since)
        self._made: list[Path] = []
        self._stop = threading.Event()
        self._thread: threading.Thread | None = None

    def acquire(self) -> None:
        """Takes the lock.

        Raises:
            CheckpointError: another run holds it, and which; or the folder cannot be written.
        """
        if self._folder is None:
            return
        try:
            self._make_folder(self._folder)
            holder = self._claim(self._folder / LOCK)
            if holder is None:
                self._sweep()
        except OSError as error:
            self.release()
            use = "the HF folder" if self._stands_for else "checkpoints"
            raise CheckpointError(
                f"{self._name()}: cannot be used for {use} ({error.strerror}: {error.filename or LOCK}). Expected a "
                f"writable folder with room. Mend it, or choose another {self._flag}."
            ) from None
        if holder is not None:
            raise CheckpointError(
                f"{self._name()}: another run is using it: {holder}. Expected a {self._flag} folder for each run. Wait until "
                f"that one has ended, end it, or choose another {self._flag}."
            )
        self._thread = threading.Thread(target=self._beat, name="sft-lock", daemon=True)
        self._thread.start()

    def _name(self) -> str | Path | None:
        return self._stands_for or self._folder

    def is_mine(self) -> bool:
        """Whether this run holds the lock, or needs none."""
        owner = self._owner()
        return self._folder is None or (owner is not None and owner.id == self._own.id)

    def require(self) -> None:
        """Raises CheckpointError when the lock is not this run's any more."""
        if not self.is_mine():
            raise CheckpointError(
                f"{self._folder}: this run's lock on it is gone, {self._owner() or 'nobody'} holds it. Expected it to last as "
                f"long as the run; a process that is suspended for more than {self._stale_s:.0f} s loses it. Nothing was "
                "written. Look whether another run uses the folder, and give the same command again when it has ended."
            )

    def _owner(self) -> Owner | None:
        seen = _look(self._folder / LOCK) if self._folder is not None else None
        return seen.owner if seen else None

    def release(self) -> None:
        """Gives the lock back, if it is this run's. Safe to call again, and from any thread."""
        self._stop.set()
        if self._folder is None:
            return
        with contextlib.suppress(OSError):
            if self.is_mine():
                (self._folder / LOCK).unlink()
        for folder in [*([self._folder] if self._stands_for else []), *reversed(self._made)]:  # what is empty
            with contextlib.suppress(OSError):
                folder.rmdir()

    def _make_folder(self, folder: Path) -> None:
        missing = [path for path in (folder, *folder.parents) if not path.exists()]
        folder.mkdir(parents=True, exist_ok=True)
        self._made = missing[::-1]

    def _claim(self, path: Path) -> Owner | None:
        """Takes a name of the folder, or returns the living owner of it."""
        while not self._create(path):
            seen = _look(path)
            if seen is None:
                continue
            if not self._is_dead(path, seen):
                return seen.owner
            right = path.with_name(f".{LOCK}.{seen.owner.id}")
            holder = self._claim(right)
            if holder is not None:
                return holder
            try:
                again = _look(path)
                if again is not None and again.owner.id == seen.owner.id:
                    os.replace(self._written(), path)
                    logger.warning("%s: taken over from %s, which is dead.", path, seen.owner)
                    return None
            finally:
                right.unlink(missing_ok=True)
        return None

    def _create(self, path: Path) -> bool:
        """Whether the lock file is now this run's; False when somebody's is there."""
        temporary = self._written()
        try:
            os.link(temporary, path)
        except FileExistsError:
            return os.stat(temporary).st_nlink == 2  # over NFS an answer can be lost, and the second try meets the first
        except OSError as error:
            if error.errno not in _NO_HARD_LINKS:
                raise
            return self._create_exclusively(path)
        finally:
            temporary.unlink(missing_ok=True)
        return True

    def _create_exclusively(self, path: Path) -> bool:
        """For file systems without hard links. A reader may see the file before its content."""
        try:
            descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o666)
        except FileExistsError:
            return False
        with os.fdopen(descriptor, "w") as file:
            file.write(json.dumps(asdict(self._own)))
        return True

    def _written(self) -> Path:
        temporary = self._beside(".new")
        temporary.write_text(json.dumps(asdict(self._own)))
        return temporary

    def _beside(self, suffix: str) -> Path:
        assert self._folder is not None, "nothing is locked without a folder"
        return self._folder / f".{LOCK}.{self._own.id}{suffix}"

    def _is_dead(self, path: Path, seen: _Seen) -> bool:
        """Whether the owner is gone; waits, where one on another machine is suspiciously silent, until that is clear."""
        owner = seen.owner
        if owner.machine and owner.machine == self._own.machine:
            return start_of(owner.pid) != owner.started
        silent_s = max(0.0, self._now() - seen.beat)
        if silent_s < 3 * self._beat_s:
            return False
        if silent_s < self._stale_s:
            logger.warning(
                "%s: %s has been silent for %.0f s; it counts as dead at %.0f s.", path, owner, silent_s, self._stale_s
            )
        deadline = time.monotonic() + self._stale_s - silent_s
        while time.monotonic() < deadline:
            time.sleep(min(1.0, self._beat_s / 4))
            now = _look(path)
            if now is None or now.owner.id != owner.id:
                return True
            if now.beat != seen.beat:
                return False
        return True

    def _now(self) -> float:
        """Of the clock that dates the heartbeats."""
        temporary = self._written()
        try:
            return temporary.stat().st_mtime
        finally:
            temporary.unlink(missing_ok=True)

    def _sweep(self) -> None:
        """Removes what processes left that were killed while they took a lock."""
        assert self._folder is not None, "nothing is locked without a folder"
        now = self._now()
        for entry in self._folder.glob(f".{LOCK}.*"):
            with contextlib.suppress(FileNotFoundError):  # of a process that is refused right now
                if now - entry.lstat().st_mtime > self._stale_s:
                    remove(entry)

    def _beat(self) -> None:
        assert self._folder is not None, "nothing is locked without a folder"
        path = self._folder / LOCK
        while not self._stop.wait(self._beat_s):
            with contextlib.suppress(OSError, CheckpointError):  # a file server may be away for a while
                if self.is_mine():
                    os.utime(path, follow_symlinks=False)


@contextlib.contextmanager
def held(
    folder: str | Path | None,
    ranks: Ranks,
    before_end: list[Callable[[], None]],
    flag: str = "--save",
    stands_for: str | Path | None = None,
) -> Iterator[Lock]:
    """Collective: holds a folder's lock in the block; rank 0 takes it, and all fail with its reason.

    It is given back however the block ends. What ends the process without ending the block (kill -9, a signal that nothing
    handles) leaves a dead owner's lock, which the next run takes over.

    Args:
        before_end: gets what gives the lock back, before it is taken: for whoever ends the process without ending the block.
        flag, stands_for: as of Lock.

    Raises:
        CheckpointError: another run holds the folder.
    """
    lock = Lock(Path(folder) if folder and ranks.rank == 0 else None, flag=flag, stands_for=stands_for)
    before_end.append(lock.release)
    try:
        agree(lock.acquire)
        yield lock
    finally:
        lock.release()


def _look(path: Path) -> _Seen | None:
    """What a lock file says, None when there is none. What cannot be understood is a lock of nobody known."""
    try:
        if not stat.S_ISREG(os.stat(path, follow_symlinks=False).st_mode):
            raise CheckpointError(f"{path}: is no file; expected a lock file or nothing. Remove it.")
        with open_regular(path) as file:
            status, text = os.fstat(file.fileno()), file.read(1 << 16)
    except FileNotFoundError:
        return None
    try:
        owner = Owner(**json.loads(text))
        is_whole = all(type(getattr(owner, field.name)) is field.type for field in fields(Owner))
        is_whole = is_whole and bool(_ID.fullmatch(owner.id)) and f"{owner.host}{owner.since}".isprintable()
    except (ValueError, TypeError, RecursionError):
        is_whole = False
    unknown = Owner(f"{status.st_ino:x}-{status.st_mtime_ns:x}", "", "", 0, "", "")
    return _Seen(owner if is_whole else unknown, status.st_mtime)


def _machine() -> str:
    """Which processes' numbers this process can look up; empty where there is no /proc."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        return f"{boot} {os.readlink('/proc/self/ns/pid')}"
    except OSError:
        return ""


def start_of(pid: int) -> str | None:
    """Start time of a process, so that another with its number is never taken for it; None when it is gone or a zombie.

    Field 22 of proc_pid_stat(5), after the name in brackets.
    """
    try:
        values = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return None
    return None if values[0] in "ZX" else values[19]
