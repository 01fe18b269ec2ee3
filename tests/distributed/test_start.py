"""How processes find each other: what goes wrong there is one sentence on one rank, and every rank ends."""

import ctypes
import os
import socket
from pathlib import Path
from typing import Any

import pytest

from megatron_sft.config.run import ParallelConfig
from megatron_sft.errors import ConfigError, DataError
from megatron_sft.parallel import initialize, tell_others
from tests.gloo import run_ranks, run_script
from tests.text_models import text_model

CLONE_NEWNET = 0x40000000


@pytest.fixture(scope="module")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("model")
    text_model("llama", folder)
    return folder


def started() -> str:
    """The message of an initialize that fails, or nothing."""
    try:
        initialize(ParallelConfig(distributed_timeout_minutes=1), 1)
    except ConfigError as error:
        return str(error)
    return ""


def meets(bad: dict[int, str]) -> tuple[str, bool]:
    """What initialize raises, or a bad rank tells the others, and whether rank 0 says that."""
    rank = int(os.environ["RANK"])
    if rank in bad:
        error = DataError(bad[rank])
        return str(error), tell_others(error)
    try:
        initialize(ParallelConfig(), 1)
    except DataError as error:
        return str(error), error.is_said
    return "", False


def in_a_network_of_its_own() -> str:
    if ctypes.CDLL(None, use_errno=True).unshare(CLONE_NEWNET):
        return f"not permitted: {os.strerror(ctypes.get_errno())}"
    return started()


def as_rank_0_of_2(port: int) -> str:
    os.environ.update(RANK="0", WORLD_SIZE="2", LOCAL_RANK="0", MASTER_ADDR="localhost", MASTER_PORT=str(port))
    return started()


@pytest.mark.parametrize(
    ("bad", "expected"),
    [
        ({}, [("", False), ("", False), ("", False)]),
        ({0: "no rows", 1: "no rows", 2: "no rows"}, [("no rows", True), ("no rows", True), ("no rows", True)]),
        ({1: "no disk"}, [("rank 1: no disk", False), ("no disk", True), ("rank 1: no disk", True)]),
        ({0: "a", 2: "b"}, [("a", True), ("a", True), ("b", False)]),
    ],
)
def test_what_one_rank_finds_before_the_start_ends_all_and_is_said_once(bad: dict[int, str], expected: list[Any]) -> None:
    assert run_ranks(meets, 3, bad) == expected


def test_a_used_port_is_named() -> None:
    with socket.socket() as used:
        used.bind(("", 0))
        used.listen()
        [message] = run_ranks(as_rank_0_of_2, 1, used.getsockname()[1])
    assert "rank 0 of 2: the processes cannot be connected (" in message and "EADDRINUSE" in message
    assert message.endswith("Choose another MASTER_PORT (--master-port), or end the process that has it.")


def test_a_machine_without_loopback_is_told_to_raise_it() -> None:
    [message] = run_ranks(in_a_network_of_its_own, 1)
    if message.startswith("not permitted"):
        pytest.skip(message)
    assert "Expected a network interface, if only loopback: ip link set lo up, or name one in GLOO_SOCKET_IFNAME." in message


@pytest.mark.parametrize(
    ("flags", "expected"),
    [
        (["--seq-length", "0", "--lr", "-1"], "2 problems in the configuration:\n  - --seq-length 0: expected"),
        (["--load", "/nowhere"], "/nowhere: neither an HF folder"),
        (["--finetune-hf-dataset", "/nowhere.jsonl"], "/nowhere.jsonl: no such file or folder"),
    ],
)
def test_wrong_input_of_two_ranks_is_said_once_and_nothing_follows(tmp_path, tiny_model, flags, expected) -> None:
    rows = tmp_path / "rows.jsonl"
    rows.write_text('{"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}\n')
    needed = ["--load", tiny_model, "--tokenizer-model", tiny_model, "--finetune-hf-dataset", rows, "--num-epoch", 1]
    done = run_script("finetune.py", [*needed, "--data-cache-path", tmp_path / "cache", *flags], 2)
    assert done.returncode == 2
    said = [line for line in done.stdout.splitlines() if not line.startswith("waiting for the token store")]
    assert "\n".join(said).startswith(expected), done.stdout
    assert done.stdout.count(expected.partition("\n")[0]) == 1 and "[rank 1]" not in done.stdout
    assert "Traceback" not in done.stderr
