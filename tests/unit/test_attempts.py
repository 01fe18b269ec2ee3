"""attempts.jsonl: what is appended can be read, whatever was there before."""

import os

import pytest

from megatron_sft.attempts import append, json_lines
from megatron_sft.errors import TrainingError
from megatron_sft.train.recorded import recorded, versions


def test_a_half_written_line_does_not_swallow_the_next(tmp_path):
    append(str(tmp_path), {"a": 1})
    with open(tmp_path / "attempts.jsonl", "ab") as file:
        file.write(b'{"event": "st')
    append(str(tmp_path), {"b": 2})
    assert json_lines(tmp_path / "attempts.jsonl") == [{"a": 1}, {"b": 2}]
    with pytest.raises(OSError, match="at most 0 MiB"):
        json_lines(tmp_path / "attempts.jsonl", 3)


def test_nothing_is_written_through_a_link(tmp_path):
    (tmp_path / "notes").write_text("mine\n")
    (tmp_path / "attempts.jsonl").symlink_to("notes")
    with pytest.raises(OSError, match="no regular file"):
        append(str(tmp_path), {"a": 1})
    assert (tmp_path / "notes").read_text() == "mine\n"


def test_a_start_has_its_end_also_when_the_run_fails(tmp_path):
    save = str(tmp_path / "out")
    with recorded(save, 0, {"iteration": 3}) as end:
        end["status"] = 0
    with pytest.raises(TrainingError), recorded(save, 0, {}):
        raise TrainingError("rank 1")
    with pytest.raises(KeyboardInterrupt), recorded(save, 0, {}):
        raise KeyboardInterrupt
    lines = json_lines(tmp_path / "out" / "attempts.jsonl")
    assert [line["event"] for line in lines] == ["start", "end"] * 3
    assert [(line["status"], line.get("error")) for line in lines[1::2]] == [
        (0, None),
        (3, "TrainingError: rank 1"),
        (1, "KeyboardInterrupt: "),
    ]
    assert lines[0]["iteration"] == 3 and lines[0]["time"].endswith("+00:00")
    with recorded(None, 0, {}), recorded(save, 1, {}):
        pass
    assert len(json_lines(tmp_path / "out" / "attempts.jsonl")) == 6


def test_a_place_that_cannot_be_written_is_an_error_not_a_wait(tmp_path):
    os.mkfifo(tmp_path / "attempts.jsonl")
    with pytest.raises(TrainingError, match=r"attempts\.jsonl: cannot be written"), recorded(str(tmp_path), 0, {}):
        pass


def test_versions_have_what_is_installed():
    assert {"megatron-sft", "python", "torch", "megatron-core"} <= versions().keys()
