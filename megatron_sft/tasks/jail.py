"""Runs one program that nobody trusts; started by sandbox.py as a process of its own. The standard library alone, Linux alone.

    python -I -S jail.py < {"program", "python", "prefix", "word", "limits": {...}}     prints {"passed", "why"}

1. a new mount namespace gets a root of its own: Python and /usr, read-only, and a small /tmp;
2. new user, pid, network, IPC and UTS namespaces, in which the process is nobody (65534) and, when root began it, also outside;
3. its first child is the init of the pid namespace: it starts the program with limits, waits, and takes every other process
   with it when it ends.

A program has passed when it came to its end: then, and only then, the code around it writes `word`.
"""

import contextlib
import ctypes
import json
import os
import resource
import signal
import struct
import sys
import time
from collections.abc import Mapping
from typing import Any

NOBODY = 65534
NEW_NS, NEW_USER, NEW_PID, NEW_NET, NEW_IPC, NEW_UTS = 0x20000, 0x10000000, 0x20000000, 0x40000000, 0x8000000, 0x4000000
MS_NOSUID, MS_NODEV, MS_NOEXEC, MS_BIND, MS_REC, MS_PRIVATE, MNT_DETACH = 2, 4, 8, 4096, 16384, 1 << 18, 2
PR_SET_PDEATHSIG, PR_SET_DUMPABLE, PR_SET_NO_NEW_PRIVS = 1, 4, 38
MOUNT_SETATTR, AT_FDCWD, AT_RECURSIVE = 442, -100, 0x8000
RDONLY_NOSUID = 3
PIVOT_ROOT = {"x86_64": 155, "aarch64": 41}
LIBC = ctypes.CDLL(None, use_errno=True)
PR_SET_SECCOMP, SECCOMP_FILTER, ALLOW, DENY, UNKNOWN = 22, 2, 0x7FFF0000, 0x50001, 0x50026
NEW_ANY = 0x7E020000
"""Flags of clone that make a namespace of any kind."""
REFUSED: Mapping[str, tuple[int, int, tuple[int, ...]]] = {
    "x86_64": (0xC000003E, 56, (29, 64, 68, 101, 155, 165, 166, 240, 248, 249, 250, 272, 298, 308, 310, 311, 319, 321, 323)),
    "aarch64": (0xC00000B7, 220, (39, 40, 41, 97, 117, 180, 186, 190, 194, 217, 218, 219, 241, 268, 270, 271, 279, 280, 282)),
}
"""Of a machine: its audit number, the number of clone, and of calls whose memory no limit counts (shmget, semget, msgget,
mq_open, memfd_create), and of those that make namespaces, mount, or reach into processes and the kernel (linux/unistd.h)."""
REFUSED_ANYWHERE = (425, 428, 429, 430, 442, 447)
"""io_uring_setup, open_tree, move_mount, fsopen, mount_setattr, memfd_secret: calls since Linux 5.1 have one number."""
CLONE3 = 435
SYSTEM = ("/usr", "/lib", "/lib64", "/lib32", "/bin", "/sbin", "/etc/ld.so.cache")
DEVICES = ("/dev/null", "/dev/zero", "/dev/random", "/dev/urandom")
WORD_FD = 3
RUNNER = f"""
import json, os, sys
asked = json.load(sys.stdin)
null = os.open("/dev/null", os.O_RDONLY)
os.dup2(null, 0)
os.close(null)
try:
    exec(compile(asked["program"], "<program>", "exec"), {{"__name__": "__main__"}})
except BaseException as error:
    os.write({WORD_FD}, f"{{type(error).__name__}}: {{error}}"[:200].encode(errors="replace"))
    os._exit(1)
os.write({WORD_FD}, asked["word"].encode())
os._exit(0)
"""
"""What Python runs: the program, and then the word."""


def main() -> None:
    asked = json.load(sys.stdin)
    _call("prctl", PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
    try:
        _enter(asked["prefix"])
        child = os.fork()  # the first process of the new pid namespace
    except OSError as error:
        print(json.dumps({"passed": False, "why": f"no sandbox: {error.strerror}: {error.filename or ''}"}))
        sys.exit(3)
    if child == 0:
        _call("prctl", PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
        print(json.dumps(run(asked, asked["limits"])), flush=True)
        os._exit(0)
    os.waitpid(child, 0)


def _enter(prefix: str) -> None:
    """Steps 1 and 2."""
    own = os.open("/proc/self", os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    others = NEW_USER | NEW_PID | NEW_NET | NEW_IPC | NEW_UTS
    if os.geteuid() == 0:
        mounts = LIBC.unshare(NEW_NS) == 0  # while root can still reach Python, wherever it is
        if mounts:
            _new_root(prefix)
        os.setgroups([])
        os.setresgid(NOBODY, NOBODY, NOBODY)
        os.setresuid(NOBODY, NOBODY, NOBODY)
        _call("prctl", PR_SET_DUMPABLE, 1, 0, 0, 0)  # else /proc/self stays root's
    else:
        mounts = False
    user, group = os.geteuid(), os.getegid()
    _call("unshare", others if mounts else others | NEW_NS)
    for name, text in (("setgroups", "deny"), ("uid_map", f"{NOBODY} {user} 1"), ("gid_map", f"{NOBODY} {group} 1")):
        with open(os.open(name, os.O_WRONLY, dir_fd=own), "w") as file:
            file.write(text)
    os.close(own)
    if not mounts:
        _new_root(prefix)


def _new_root(prefix: str) -> None:
    """The root becomes a tmpfs that holds Python and the system's libraries, all read-only, and /tmp."""
    _mount(None, "/", None, MS_REC | MS_PRIVATE)
    root = "/tmp"
    kept = [os.open(path, os.O_PATH) for path in (*SYSTEM, *DEVICES, prefix) if os.path.exists(path)]
    names = [path for path in (*SYSTEM, *DEVICES, prefix) if os.path.exists(path)]
    links = {path: os.readlink(path) for path in SYSTEM if os.path.islink(path)}
    _mount("tmpfs", root, "tmpfs", MS_NOSUID | MS_NODEV, "size=1m,mode=755")
    for path, handle in zip(names, kept, strict=True):
        target = root + path
        if path in links:
            os.symlink(links[path], target)
        elif path != prefix or not path.startswith("/usr/"):  # that would be there already
            is_folder = os.path.isdir(f"/proc/self/fd/{handle}")
            os.makedirs(target if is_folder else os.path.dirname(target), 0o755, exist_ok=True)
            if not is_folder:
                os.close(os.open(target, os.O_CREAT | os.O_WRONLY, 0o644))
            _mount(f"/proc/self/fd/{handle}", target, None, MS_BIND | MS_REC)
        os.close(handle)
    os.mkdir(f"{root}/tmp", 0o1777)
    attributes = (ctypes.c_uint64 * 4)(RDONLY_NOSUID, 0, 0, 0)
    _call("syscall", MOUNT_SETATTR, AT_FDCWD, root.encode(), AT_RECURSIVE, ctypes.byref(attributes), ctypes.c_size_t(32))
    _mount("tmpfs", f"{root}/tmp", "tmpfs", MS_NOSUID | MS_NODEV | MS_NOEXEC, "size=16m,nr_inodes=1000,mode=1777")
    os.chdir(root)
    _call("syscall", PIVOT_ROOT[os.uname().machine], b".", b".")
    _call("umount2", b".", MNT_DETACH)
    os.chdir("/tmp")


def run(asked: Mapping[str, Any], limits: Mapping[str, float]) -> dict[str, Any]:
    """Step 3, also without a sandbox: the program in a process with limits, and what became of it."""
    read, write = os.pipe()
    source, sink = os.pipe()
    worker = os.fork()
    if worker == 0:
        _become(asked, limits, source, write)
    os.close(source)
    os.close(write)
    with contextlib.suppress(BrokenPipeError), open(sink, "w") as file:
        json.dump({"program": asked["program"], "word": asked["word"]}, file)
    deadline, status = time.monotonic() + limits["seconds"], None
    while status is None and time.monotonic() < deadline:
        pid, code = os.waitpid(-1, os.WNOHANG)
        if pid == worker:
            status = code
        elif pid == 0:
            time.sleep(0.003)
    with contextlib.suppress(ProcessLookupError):
        os.killpg(worker, signal.SIGKILL)
    if status is None:
        return {"passed": False, "why": f"still running after {limits['seconds']:g} s"}
    os.set_blocking(read, False)
    try:
        said = os.read(read, 4096).decode(errors="replace")
    except BlockingIOError:  # a process that it left behind holds the pipe
        said = ""
    if status == 0 and said == asked["word"]:
        return {"passed": True, "why": ""}
    ended = f"killed by signal {os.WTERMSIG(status)}" if os.WIFSIGNALED(status) else "ended before its last line"
    return {"passed": False, "why": said[:200].replace(asked["word"], "") or ended}


def _become(asked: Mapping[str, Any], limits: Mapping[str, float], source: int, write: int) -> None:
    """The worker: nothing open but the pipes, no way to more rights, limits, then Python."""
    try:
        os.setsid()
        _call("prctl", PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
        _call("prctl", PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0)
        _refuse_calls()
        null = os.open("/dev/null", os.O_WRONLY)
        places = [os.dup(number) for number in (source, null, null, write)]  # above 3, or as they are to be
        for number, handle in enumerate([os.dup(place) for place in places]):
            os.dup2(handle, number)
        os.closerange(WORD_FD + 1, 1024)
        memory, seconds = int(limits["memory_bytes"]), int(limits["cpu_seconds"])
        for what, most in (
            (resource.RLIMIT_AS, memory),
            (resource.RLIMIT_FSIZE, int(limits["file_bytes"])),
            (resource.RLIMIT_NOFILE, 64),
            (resource.RLIMIT_CORE, 0),
            (resource.RLIMIT_CPU, seconds),
        ):
            resource.setrlimit(what, (most, most))
        if limits.get("processes"):  # without a user namespace it would count what the user has elsewhere
            resource.setrlimit(resource.RLIMIT_NPROC, (int(limits["processes"]), int(limits["processes"])))
        os.execve(asked["python"], [asked["python"], "-I", "-S", "-c", RUNNER], {"PATH": "/usr/bin:/bin", "HOME": "/tmp"})
    finally:
        os._exit(127)


def _refuse_calls() -> None:
    """Lets the kernel refuse REFUSED, for good; its filter is seccomp(2)'s."""
    if os.uname().machine not in REFUSED:
        return
    machine, clone, numbers = REFUSED[os.uname().machine]
    load, equal, at_least, has, give = 0x20, 0x15, 0x35, 0x45, 0x06
    refused = (*numbers, *REFUSED_ANYWHERE)
    checks = [(load, 0, 0, 0), (at_least, True, 0, 0x40000000), *[(equal, True, 0, number) for number in refused]]  # also x32
    checks += [(equal, 0, 2, clone), (load, 0, 0, 16), (has, True, 0, NEW_ANY), (give, 0, 0, ALLOW)]
    steps = [(load, 0, 0, 4), (equal, 1, 0, machine), (give, 0, 0, DENY)]  # the 32-bit way in has another machine
    steps += [(load, 0, 0, 0), (equal, 0, 1, CLONE3), (give, 0, 0, UNKNOWN)]  # glibc takes clone then, whose flags are in reach
    steps += [(code, len(checks) - at - 1 if to is True else to, no, k) for at, (code, to, no, k) in enumerate(checks)]
    steps += [(give, 0, 0, DENY)]
    text = ctypes.create_string_buffer(b"".join(struct.pack("HBBI", *step) for step in steps))
    program = struct.pack("HxxxxxxP", len(steps), ctypes.addressof(text))
    _call("prctl", PR_SET_SECCOMP, SECCOMP_FILTER, ctypes.c_char_p(program), 0, 0)


def _mount(source: str | None, target: str, kind: str | None, flags: int, options: str = "") -> None:
    words = [None if word is None else word.encode() for word in (source, target, kind)]
    _call("mount", *words, ctypes.c_ulong(flags), options.encode(), what=target)


def _call(name: str, *arguments: Any, what: str = "") -> None:
    """A function of libc that gives -1 and errno where it fails. Raises OSError."""
    if getattr(LIBC, name)(*arguments) == -1:
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number), f"{name} {what}".strip())


if __name__ == "__main__":
    main()
