"""Checkpoints written by somebody who wants in: every way to act from a pickle, archives that are bombs, and what stands in a
file's place. Random ones: tests/soak/mutated_pickles.py."""

import itertools
import os
import pickletools
import time
import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from megatron_sft.checkpoint.distributed import load_checkpoint, save_checkpoint
from megatron_sft.config.run import ParallelConfig
from megatron_sft.errors import CheckpointError
from tests.distributed.checkpoint_rig import build
from tests.gloo import run_ranks
from tests.soak.mutated_pickles import FOLDER, OUTSIDE, PUSHES, Subject, Trials, archived, as_of_others, attacks, text, trials

NAMES = ("pathlib.PosixPath", "argparse.Namespace", "torch.distributed.checkpoint.metadata.MetadataIndex")


def _attacks(subject: Subject, canary: str) -> Trials:
    """Every attack in place of a value of each file's pickle, and every path outside in place of a file's name."""
    for file in (".metadata", "common.pt", "rng"):
        files = subject.archive(file) if file != ".metadata" else {"data.pkl": subject.metadata}
        data = files["data.pkl"]
        values = [
            (start, end) for (op, _, start), (_, _, end) in itertools.pairwise(pickletools.genops(data)) if op.name in PUSHES
        ]
        for number, (kind, make) in enumerate(attacks(canary).items()):
            start, end = values[(number * 7) % len(values)]
            changed = {**files, "data.pkl": data[:start] + make(NAMES[number % len(NAMES)]) + data[end:]}
            yield kind, file, archived(changed) if file != ".metadata" else changed["data.pkl"]
    for place in OUTSIDE:
        yield place, ".metadata", subject.metadata.replace(text("__0_0.distcp"), text(place))


def test_nothing_in_a_pickle_acts(tmp_path: Path) -> None:
    (tmp_path / "victim").mkdir()
    (tmp_path / "victim" / "kept").write_text("kept")
    [found] = run_ranks(trials, 1, str(tmp_path / "root"), 0, 0, _attacks)
    assert found["bad"] == []
    assert sum(found["outcomes"].values()) == 3 * len(attacks("")) + len(OUTSIDE)
    assert (tmp_path / "victim" / "kept").read_text() == "kept"


def _one_checkpoint(root: str) -> tuple:
    rig = build(ParallelConfig(), num_layers=2)
    rig.train(1, 1)
    save_checkpoint(root, 1, rig.chunks, rig.optimizer, rig.scheduler, {}, rig.run, rig.ranks)
    as_of_others(Path(root) / FOLDER)
    return rig, Subject(Path(root))


def _bombs(root: str) -> dict[str, str]:
    """What is said of archives that are not as torch.save writes them; a bomb must not be unpacked before that."""
    rig, subject = _one_checkpoint(root)
    whole = subject.archive("common.pt")
    tensor = subject.archive("rng")
    bombs = {
        "compressed": (archived({**whole, "filler": b"\0" * (128 << 20)}, zipfile.ZIP_DEFLATED), "common.pt"),
        "big pickle": (archived({**whole, "data.pkl": b"\x80\x02" + b"]" * (17 << 20)}), "common.pt"),
        "no archive": (b"\x80\x02}q\x00.", "common.pt"),
        "no pickle": (archived({"version": b"3"}), "common.pt"),
        "other bytes": (archived({**whole, "byteorder": b"big"}), "common.pt"),
        "cut off": (archived(whole)[:-30], "common.pt"),
        "storage missing": (archived({name: data for name, data in tensor.items() if name != "data/0"}), "rng"),
        "storage too small": (archived({**tensor, "data/0": b"1234"}), "rng"),
        "not a dict": (archived({**whole, "data.pkl": b"\x80\x02]q\x00."}), "common.pt"),
    }
    found = {}
    for name, (data, file) in bombs.items():
        subject.restore()
        subject.put(file, data)
        before = _peak_bytes()
        with pytest.raises(CheckpointError) as caught:
            load_checkpoint(root, rig.chunks, rig.optimizer, None, rig.ranks)
        assert _peak_bytes() - before < 64 << 20, name
        found[name] = str(caught.value)
    return found


def _peak_bytes() -> int:
    return int(next(line.split()[1] for line in open("/proc/self/status") if line.startswith("VmHWM"))) << 10


def test_archives_are_bounded_before_they_are_read(tmp_path: Path) -> None:
    [found] = run_ranks(_bombs, 1, str(tmp_path))
    expected = {
        "compressed": "it is compressed, which torch.save's archives are not",
        "big pickle": "its data.pkl has 17825794 bytes; expected at most 16777216",
        "no archive": "it is no archive of torch.save (File is not a zip file)",
        "no pickle": "it has no 'data.pkl'",
        "other bytes": "its bytes are in b'big' order; this machine's is little",
        "cut off": "it is no archive of torch.save (File is not a zip file)",
        "storage missing": "it has no 'data/0'",
        "storage too small": "it has a tensor of shape [5056] in a storage of 4 elements",
        "not a dict": "its common state is no dict",
    }
    for name, reason in expected.items():
        assert reason in found[name] and f"{tmp_path / FOLDER}: " in found[name], (name, found[name])
        assert "Restore it from a copy" in found[name]


def fifo(path: Path) -> None:
    os.mkfifo(path)


def link_to(target: str) -> Callable[[Path], None]:
    return lambda path: path.symlink_to(target)


PLACES: dict[str, Callable[[Path], None]] = {
    "folder": os.mkdir,
    "FIFO": fifo,
    "device": link_to("/dev/zero"),
    "terminal": link_to("/dev/tty"),
    "link to itself": lambda path: path.symlink_to(path),
    "dangling link": link_to("nowhere"),
}


def _no_files(root: str) -> list[str]:
    rig, subject = _one_checkpoint(root)
    bad = []
    for name in (".metadata", "common.pt", "metadata.json", "__0_0.distcp"):
        for kind, make in PLACES.items():
            subject.restore()
            (subject.folder / name).unlink()
            make(subject.folder / name)
            began = time.monotonic()
            try:
                load_checkpoint(root, rig.chunks, rig.optimizer, None, rig.ranks)
                bad.append(f"{kind} as {name}: loaded")
            except CheckpointError as error:
                if FOLDER not in str(error):
                    bad.append(f"{kind} as {name}: {error}")
            if time.monotonic() - began > 20:
                bad.append(f"{kind} as {name}: took {time.monotonic() - began:.0f} s")
    subject.restore()
    os.rename(subject.folder / "common.pt", Path(root) / "elsewhere")
    (subject.folder / "common.pt").symlink_to("../elsewhere")  # files may be links to files
    load_checkpoint(root, rig.chunks, rig.optimizer, None, rig.ranks)
    return bad


def test_what_is_no_file_is_refused_without_waiting(tmp_path: Path) -> None:
    [bad] = run_ranks(_no_files, 1, str(tmp_path))
    assert bad == []


class Broken(torch.nn.Module):
    """A model with a bug of its own."""

    def sharded_state_dict(self, **_: object) -> dict:
        return {}["no such key"]


def _own_bugs(root: str) -> None:
    rig, _ = _one_checkpoint(root)
    with pytest.raises(KeyError, match="no such key"):
        load_checkpoint(root, [Broken()], None, None, rig.ranks)
    with pytest.raises(KeyError, match="no such key"):
        save_checkpoint(root, 2, [Broken()], None, None, {}, rig.run, rig.ranks)


def test_a_bug_of_ours_is_not_called_a_damaged_checkpoint(tmp_path: Path) -> None:
    run_ranks(_own_bugs, 1, str(tmp_path))
