"""Checkpoints whose pickles were changed by somebody who wants in; what the reader does with them.

    python tests/soak/mutated_pickles.py [--trials 500] [--seed 1]

A tiny checkpoint without manifest (the attacker's own). Each trial changes .metadata, common.pt or the random states in a
.distcp file: random bytes; a pushed value replaced by one of ATTACKS, pieces of pickle that call, build, set attributes or
refer to things; places replaced by paths outside. Then the checkpoint is loaded, and another one is saved beside it with
--save-retain. Checked each time, in a process of its own that may take 6 GB:

    the checkpoint is loaded, or refused with CheckpointError, within 20 s;
    no class or function that a pickle can name has another attribute than before, and no module was imported;
    nothing was opened for writing, removed, renamed or started, except in the root.

Prints counts; exits with 1 if anything else was found.
"""

import argparse
import io
import os
import pickle
import pickletools
import random
import resource
import shutil
import sys
import tempfile
import threading
import time
import zipfile
from collections import Counter
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from tests.gloo import run_ranks

FOLDER = "iter_0000001"
_DCP = "torch.distributed.checkpoint."
NAMEABLE = [
    *(f"{_DCP}metadata.{name}" for name in ("Metadata", "MetadataIndex", "TensorStorageMetadata", "BytesStorageMetadata")),
    *(f"{_DCP}metadata.{name}" for name in ("ChunkStorageMetadata", "TensorProperties", "StorageMeta", "_MEM_FORMAT_ENCODING")),
    *(f"{_DCP}filesystem.{name}" for name in ("_StorageInfo", "_StoragePrefix")),
    *(f"{_DCP}planner.{name}" for name in ("SavePlan", "WriteItem", "WriteItemType", "TensorWriteData")),
    *(f"megatron.core.dist_checkpointing.strategies.torch.{name}" for name in ("MCoreMetadata", "MCoreSavePlan")),
    *("pathlib.PosixPath", "pathlib.PurePosixPath", "torch.Size", "torch.float32", "torch.serialization._get_layout"),
    *("collections.OrderedDict", "argparse.Namespace", "types.SimpleNamespace", "signal.Signals", "io.BytesIO"),
    *("megatron.core.enums.ModelType", "megatron.core.transformer.enums.AttnBackend", "torch._utils._rebuild_tensor_v2"),
    *("torch._utils._rebuild_parameter", "torch.FloatStorage", "numpy.dtype", "numpy.ndarray", "_codecs.encode"),
    *(
        "torch.Tensor",
        "torch.nn.parameter.Parameter",
        "torch._tensor._rebuild_from_type_v2",
        "builtins.set",
        "builtins.bytearray",
    ),
]
FOREIGN = ["os.system", "builtins.eval", "builtins.getattr", "subprocess.Popen", "shutil.rmtree", "copyreg._reconstructor"]
OUTSIDE = ["../victim", "/etc/passwd", "..", "", ".", "a/../../victim", "x\0y", "/dev/zero", "../../victim/kept"]


def named(name: str) -> bytes:
    module, _, last = name.rpartition(".")
    return f"c{module}\n{last}\n".encode()


def text(value: str) -> bytes:
    data = value.encode("utf-8", "surrogatepass")
    return b"X" + len(data).to_bytes(4, "little") + data


def attacks(canary: str) -> dict[str, Callable[[str], bytes]]:
    """{name: f(dotted name)}: a piece of pickle that ends with one more object on the stack."""
    evil = b"}(" + text("name") + text(canary) + text("__reduce__") + text(canary) + text("pwned") + text(canary) + b"u"
    return {
        "state of a class": lambda name: named(name) + evil + b"b",
        "slots of a class": lambda name: named(name) + b"(N" + evil + b"tb",
        "slots of an object": lambda name: named(name) + b")\x81(N" + evil + b"tb",
        "state of an object": lambda name: named(name) + b")\x81" + evil + b"b",
        "two states": lambda name: named(name) + b")\x81" + evil + b"b" + evil + b"b",
        "state of a call": lambda name: named(name) + b")R" + evil + b"b",
        "state of a member": lambda name: named(name) + b"K\x00\x85R(N" + evil + b"tb",
        "call": lambda name: named(name) + text(f"touch {canary}") + b"\x85R",
        "call of a call": lambda name: named(name) + b")R" + text(canary) + b"\x85R",
        "call with keywords": lambda name: named(name) + b")}(" + text("name") + text(canary) + b"u\x92",
        "INST": lambda name: b"(" + text(canary) + b"i" + named(name)[1:],
        "OBJ": lambda name: b"(" + named(name) + text(canary) + b"o",
        "EXT": lambda name: b"\x82\x01",
        "PERSID": lambda name: b"P" + canary.encode() + b"\n",
        "BINPERSID": lambda name: named(name) + b"Q",
        "storage": lambda name: b"(" + text("storage") + named(name) + text("../victim") + text("cpu") + b"J\xff\xff\xff\x7ftQ",
        "items of a class": lambda name: named(name) + text("pwned") + text(canary) + b"s",
        "append to a class": lambda name: named(name) + text(canary) + b"a",
        "far memo": lambda name: named(name) + b"r\xff\xff\xff\x7f",
        "long to hash": lambda name: b"}K\x01" + b"q\xc8h\xc8\x86" * 64 + b"K\x01s",
        "nested": lambda name: b"]" * 2000 + b"a" * 1999,
        "in itself": lambda name: b"]q\xc9h\xc9a",
        "shares": lambda name: b"]" + b"q\xca]h\xcaah\xcaa" * 60,
        "long text": lambda name: b"\x8d" + (1 << 62).to_bytes(8, "little") + b"x",
        "long bytes": lambda name: b"B\xff\xff\xff\xffx",
        "long number": lambda name: b"\x8b\xff\xff\xff\x7f" + b"\xff" * 100,
        "many bytes": lambda name: named("builtins.bytearray") + b"\x8a\x05\x00\x00\x00\x00\x10\x85R",
        "type, state": lambda name: named("torch._tensor._rebuild_from_type_v2") + b"(" + named(name) * 2 + b")" + evil + b"tR",
        "path outside": lambda name: named("pathlib.PosixPath") + text("/") + text(canary) + b"\x86R",
    }  # fmt: skip


PUSHES = {"BININT", "BININT1", "BININT2", "NONE", "NEWFALSE", "NEWTRUE", "BINUNICODE", "BINFLOAT", "EMPTY_TUPLE", "BINGET"}


def mutated(data: bytes, chance: random.Random, canary: str) -> tuple[str, bytes]:
    """(what was done, the pickle)."""
    kind = chance.random()
    if kind < 0.25:
        changed = bytearray(data)
        for _ in range(chance.choice((1, 1, 2, 8))):
            changed[chance.randrange(len(changed))] = chance.randrange(256)
        return "bytes", bytes(changed)
    places = [(op, start) for op, _, start in pickletools.genops(data)]
    ends = [start for _, start in places[1:]] + [len(data)]
    values = [(start, end, op.name) for (op, start), end in zip(places, ends, strict=True) if op.name in PUSHES]
    if kind < 0.4:
        start, end, _ = chance.choice([value for value in values if value[2] == "BINUNICODE"])
        return "text", data[:start] + text(chance.choice(OUTSIDE)) + data[end:]
    found = attacks(canary)
    name = chance.choice(sorted(found))
    start, end, _ = chance.choice(values)
    piece = found[name](chance.choice(NAMEABLE if chance.random() < 0.85 else FOREIGN))
    return name, data[:start] + piece + data[end:]


def archived(files: dict[str, bytes], compression: int = zipfile.ZIP_STORED) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", compression) as archive:
        for name, data in files.items():
            archive.writestr(f"archive/{name}", data)
    return buffer.getvalue()


def as_of_others(folder: Path) -> None:
    """Takes away what says that a checkpoint is ours, and has checksums."""
    import torch

    for name in ("manifest.json", "run_config.json"):
        (folder / name).unlink()
    common = torch.load(folder / "common.pt", weights_only=False)
    del common["train_state"]
    torch.save(common, folder / "common.pt")


class Subject:
    """A root with one checkpoint, and ways to change its pickles and to put them back."""

    def __init__(self, root: Path):
        from megatron_sft.checkpoint import torch_dist

        self.folder = root / FOLDER
        self.whole = {path.name: path.read_bytes() for path in self.folder.iterdir()}
        places = torch_dist.read_metadata(self.folder).storage_data
        self._place = next(place for index, place in places.items() if index.fqn.startswith("rng_state"))
        self.metadata = pickle.dumps(pickle.loads(self.whole[".metadata"]), protocol=2)  # frames would need new lengths

    def restore(self) -> None:
        for path in self.folder.parent.glob("iter_*"):
            shutil.rmtree(path)
        self.folder.mkdir()
        for name, data in self.whole.items():
            (self.folder / name).write_bytes(data)

    def archive(self, name: str) -> dict[str, bytes]:
        """The files of common.pt or of the random states ("rng")."""
        data = self.whole["common.pt"] if name == "common.pt" else self._rng()
        with zipfile.ZipFile(io.BytesIO(data)) as archive:
            return {info.filename.partition("/")[2]: raw(data, info) for info in archive.infolist()}

    def _rng(self) -> bytes:
        start = self._place.offset
        return self.whole[self._place.relative_path][start : start + self._place.length]

    def put(self, name: str, data: bytes) -> None:
        """Replaces .metadata, common.pt, or the random states, which go to the end of their file."""
        if name != "rng":
            (self.folder / name).write_bytes(data)
            return
        path = self.folder / self._place.relative_path
        metadata = pickle.loads(self.whole[".metadata"])
        place = next(place for index, place in metadata.storage_data.items() if index.fqn.startswith("rng_state"))
        place.offset, place.length = path.stat().st_size, len(data)
        with path.open("ab") as file:
            file.write(data)
        (self.folder / ".metadata").write_bytes(pickle.dumps(metadata))


def raw(data: bytes, info: zipfile.ZipInfo) -> bytes:
    start = info.header_offset + 30 + sum(int.from_bytes(data[info.header_offset + at :][:2], "little") for at in (26, 28))
    return data[start : start + info.file_size]


class Guard:
    """Sees what a process does: through an audit hook, and by comparing what pickles can name with what it was."""

    def __init__(self, root: Path):
        self._root = str(root)
        self._on = False
        self.seen: list[str] = []
        self._before = self._named()
        "".encode("cp437")  # zipfile imports it for a name
        sys.addaudithook(self._hook)

    def _hook(self, event: str, arguments: tuple[Any, ...]) -> None:
        if not self._on or threading.current_thread() is not threading.main_thread():
            return
        places: list[Any] = []
        if event == "open":
            writes = isinstance(arguments[2], int) and arguments[2] & (os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC)
            places = [arguments[0]] if writes and not isinstance(arguments[0], int) else []
        elif event in ("os.remove", "os.rmdir", "os.mkdir", "shutil.rmtree", "os.chmod", "os.utime"):
            places = [arguments[0]] if arguments[-1] in (-1, None) else []  # otherwise below a folder that was seen
        elif event == "os.truncate":
            places = [arguments[0]]
        elif event in ("os.rename", "os.link", "os.symlink"):
            places = list(arguments[:2])
        elif event in (
            "os.system",
            "subprocess.Popen",
            "os.exec",
            "os.posix_spawn",
            "os.fork",
            "socket.connect",
            "ctypes.dlopen",
        ):
            self.seen.append(f"{event}{arguments}")
        elif event == "import" and arguments[0] not in sys.modules:
            self.seen.append(f"import {arguments[0]}")
        for place in places:
            if not f"{os.path.abspath(os.fsdecode(place))}/".startswith(f"{self._root}/"):
                self.seen.append(f"{event} {os.fsdecode(place)}")

    def _named(self) -> dict[str, dict[str, int]]:
        found = {}
        for name in NAMEABLE:
            module, _, last = name.rpartition(".")
            thing = getattr(sys.modules[module], last)
            found[name] = {key: id(value) for key, value in getattr(thing, "__dict__", {}).items()}
            for member in getattr(thing, "__members__", {}).values():
                found[f"{name}.{member.name}"] = {key: id(value) for key, value in vars(member).items()}
        return found

    def watched(self, action: Callable[[], str]) -> str:
        self._on = True
        try:
            return action()
        finally:
            self._on = False

    def changed(self) -> list[str]:
        """What is not as it was, since the last question."""
        now, seen = self._named(), self.seen
        found = [f"{name} has other attributes" for name in now if now[name] != self._before[name]]
        self._before, self.seen = now, []
        return [*found, *seen]


Trials = Iterable[tuple[str, str, bytes]]
"""(what was done, file, its content)"""


def trials(root: str, number: int, seed: int, chosen: Callable[["Subject", str], Trials] | None = None) -> dict[str, Any]:
    """Makes a checkpoint, changes it and loads it; runs as one rank of tests/gloo.py.

    Args:
        root: of the checkpoint; `victim` beside it must stay as it is.
        number: of random trials.
        seed: of them.
        chosen: other trials, of a subject and the path of a file that must not appear.
    """
    from megatron_sft.checkpoint.distributed import CheckpointSaver, load_checkpoint, save_checkpoint
    from megatron_sft.config.run import CheckpointConfig, ParallelConfig
    from megatron_sft.errors import CheckpointError
    from megatron_sft.log import logger
    from tests.distributed.checkpoint_rig import build

    logger.setLevel("ERROR")
    rig = build(ParallelConfig(), CheckpointConfig(save_retain=1), num_layers=2)
    rig.train(1, 1)
    save_checkpoint(root, 1, rig.chunks, rig.optimizer, rig.scheduler, {"consumed_train_samples": 1}, rig.run, rig.ranks)
    as_of_others(Path(root) / FOLDER)
    subject, chance, canary = Subject(Path(root)), random.Random(seed), str(Path(root).parent / "canary")
    outcomes, bad = Counter[str](), []

    def load() -> str:
        try:
            load_checkpoint(root, rig.chunks, rig.optimizer, rig.scheduler, rig.ranks)
        except CheckpointError as error:
            assert FOLDER in str(error), error
            return "refused"
        CheckpointSaver(root, rig.run, rig.ranks).save(2, rig.chunks, rig.optimizer, rig.scheduler, {})
        return "loaded"

    assert load() == "loaded"
    guard = Guard(Path(root))
    if number:  # a limit of the address space, above what is mapped now
        mapped = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_AS, (mapped + (6 << 30), resource.RLIM_INFINITY))
    for label, name, data in chosen(subject, canary) if chosen else random_trials(subject, chance, canary, number):
        subject.restore()
        (Path(root) / "latest_checkpointed_iteration.txt").unlink(missing_ok=True)
        subject.put(name, data)
        began = time.monotonic()
        try:
            outcome = guard.watched(load)
        except (KeyboardInterrupt, SystemExit):
            raise
        except BaseException as error:
            outcome = "failed"
            bad.append(f"{label} in {name}: {type(error).__name__}: {str(error)[:300]}")
            if not isinstance(error, (ArithmeticError, LookupError, OSError, RuntimeError, TypeError, ValueError)):
                raise
        if time.monotonic() - began > 20:
            bad.append(f"{label} in {name}: {time.monotonic() - began:.0f} s")
        bad += [f"{label} in {name}: {what}" for what in guard.changed()]
        if os.path.exists(canary):
            bad.append(f"{label} in {name}: the canary exists")
            os.unlink(canary)
        outcomes[f"{name:10} {outcome}"] += 1
    return {"outcomes": dict(outcomes), "bad": bad}


def random_trials(subject: Subject, chance: random.Random, canary: str, number: int) -> Trials:
    for _ in range(number):
        name = chance.choice((".metadata", ".metadata", "common.pt", "rng"))
        if name == ".metadata":
            label, data = mutated(subject.metadata, chance, canary)
        else:
            files = subject.archive(name)
            label, files["data.pkl"] = mutated(files["data.pkl"], chance, canary)
            data = archived(files)
        yield label, name, data


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--trials", type=int, default=500)
    parser.add_argument("--seed", type=int, default=1)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        victim = Path(folder) / "victim"
        victim.mkdir()
        (victim / "kept").write_text("kept")
        [found] = run_ranks(trials, 1, f"{folder}/root", options.trials, options.seed, timeout_s=3600)
        if [path.name for path in victim.iterdir()] != ["kept"] or (victim / "kept").read_text() != "kept":
            found["bad"].append("the folder beside the root was touched")
    for text in found["bad"]:
        print(text)
    for outcome, count in sorted(found["outcomes"].items()):
        print(f"{outcome:20}{count:6}")
    print(f"{options.trials} trials, {len(found['bad'])} bad")
    return int(bool(found["bad"]))


if __name__ == "__main__":
    sys.exit(main())
