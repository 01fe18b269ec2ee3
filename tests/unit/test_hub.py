"""Models by name from a hub on this machine, by huggingface_hub as it is, in processes with caches of their own."""

import json
import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from megatron_sft.errors import CheckpointError
from megatron_sft.hf.folder import INDEX, _indexed_files
from megatron_sft.hub import folder
from tests.hub_server import TOKEN, Hub, Repository, serving

FILES = {
    "config.json": b"{}",
    "tokenizer.json": b'{"model": {}}',
    "chat_template.jinja": b"{{ messages }}",
    "model-00001-of-00002.safetensors": b"a" * 1000,
    "model-00002-of-00002.safetensors": b"b" * 2000,
}
NEVER = {
    "pytorch_model.bin": b"pickle",
    "modeling_own.py": b"code",
    "onnx/model.safetensors": b"other",
    "consolidated.safetensors": b"twice",
    "training_args.bin": b"pickle",
}
CLIENT = """
import dataclasses, json, os, sys
from megatron_sft import hub, log
from megatron_sft.config.run import CheckpointConfig, DataConfig, RunConfig
from megatron_sft.errors import UserError
log.configure(0, True)
for line in sys.stdin:
    asked = json.loads(line)
    os.environ["HF_TOKEN"] = asked.pop("token", "")
    data = DataConfig(tokenizer_model=asked.pop("tokenizer", ""), trust_remote_code=asked.pop("code", False))
    weights = asked.pop("weights", True)
    try:
        run = hub.fetched(RunConfig(data=data, checkpoint=CheckpointConfig(**asked)), weights)
        answer = [run.checkpoint.load, run.data.tokenizer_model]
    except UserError as error:
        answer = str(error)
    print(json.dumps(answer), flush=True)
"""
Ask = Callable[..., Any]


@pytest.fixture(scope="module")
def hub() -> Iterator[Hub]:
    with serving() as started:
        yield started


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("home")


def client(hub: Hub, home: Path, log: Path, **environment: str) -> Iterator[Ask]:
    """Asks a process that has its own environment: hub.fetched's folders of --load and --tokenizer-model, or its error."""
    with log.open("w") as errors:
        command, variables = [sys.executable, "-c", CLIENT], hub.environment(home, **environment)
        process = subprocess.Popen(
            command, env=variables, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=errors, text=True, cwd=home
        )

        def ask(**asked: Any) -> Any:
            assert process.stdin and process.stdout
            print(json.dumps(asked), file=process.stdin, flush=True)
            return json.loads(process.stdout.readline() or json.dumps(log.read_text()))

        yield ask
        process.communicate()


@pytest.fixture(scope="module")
def online(hub: Hub, home: Path) -> Iterator[Ask]:
    yield from client(hub, home, home / "online.log")


@pytest.fixture(scope="module")
def offline(hub: Hub, home: Path) -> Iterator[Ask]:
    yield from client(hub, home, home / "offline.log", HF_HUB_OFFLINE="1")


def content(folder: str) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in Path(folder).rglob("*") if path.is_file()}


@pytest.mark.parametrize(
    "place", ["out/iter_0000004", "out/release", "/there/model", "./org/model", "org/model/deep", "model", ""]
)
def test_a_path_is_no_name(place: str) -> None:
    assert folder("--load", place, weights=True) == place


def test_what_is_there_is_no_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "org" / "model").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    assert folder("--load", "org/model", weights=True) == "org/model"


def test_weights_and_tokenizer_of_a_name_come_once_and_nothing_else_does(hub: Hub, online: Ask, offline: Ask) -> None:
    hub.models["org/whole"] = Repository(FILES | NEVER)
    load, tokenizer = online(load="org/whole", tokenizer="org/whole")
    assert load == tokenizer
    assert content(load) == FILES
    assert Path(load).name == hub.models["org/whole"].commit
    assert sorted(hub.downloads()) == sorted(FILES)

    hub.asked.clear()
    assert online(load="org/whole") == [load, ""]
    assert hub.downloads() == []
    hub.asked.clear()
    assert offline(load="org/whole", tokenizer="org/whole") == [load, load]
    assert hub.asked == []


def test_a_tokenizer_alone_takes_no_weights(hub: Hub, online: Ask, tmp_path: Path) -> None:
    hub.models["org/tokens"] = Repository(FILES | NEVER)
    small = {name: value for name, value in FILES.items() if "model-" not in name}
    load, tokenizer = online(load=str(tmp_path), tokenizer="org/tokens")
    assert load == str(tmp_path)
    assert content(tokenizer) == small
    assert online(load="org/tokens", tokenizer="org/tokens", weights=False) == [tokenizer, tokenizer]
    assert content(tokenizer) == small


def test_a_run_that_goes_on_from_its_checkpoint_takes_no_weights(hub: Hub, online: Ask, tmp_path: Path) -> None:
    hub.models["org/resumed"] = Repository(FILES)
    (tmp_path / "latest_checkpointed_iteration.txt").write_text("10")
    for name in ("metadata.json", "common.pt", ".metadata"):
        (tmp_path / "iter_0000010").mkdir(exist_ok=True)
        (tmp_path / "iter_0000010" / name).write_text("")
    _, tokenizer = online(load="org/resumed", tokenizer="org/resumed", save=str(tmp_path))
    assert sorted(content(tokenizer)) == ["chat_template.jinja", "config.json", "tokenizer.json"]


def test_code_comes_with_trust_remote_code_alone(hub: Hub, online: Ask) -> None:
    hub.models["org/code"] = Repository(FILES | NEVER)
    load, _ = online(load="org/code", code=True)
    assert content(load) == {**FILES, "modeling_own.py": b"code"}


def test_a_revision_is_taken_by_branch_or_commit(hub: Hub, online: Ask) -> None:
    hub.models["org/old"] = old = Repository(FILES)
    load, _ = online(load=f"org/old@{old.commit}")
    hub.models["org/old"] = new = Repository({**FILES, "config.json": b"[]"})
    assert online(load="org/old@main")[0] != load
    hub.models["org/old"] = old
    assert online(load=f"org/old@{old.commit}") == [load, ""]
    assert new.commit != old.commit
    sentence = "no such folder, and the model has no such revision; expected a branch, tag or commit after @. Correct it."
    assert online(load="org/old@v9").endswith(f"--load org/old@v9: {sentence}")


def test_the_folder_of_another_machines_cache_is_its_commit(hub: Hub, online: Ask) -> None:
    hub.models["org/moved"] = Repository(FILES)
    there = f"/there/hub/models--org--moved/snapshots/{hub.models['org/moved'].commit}"
    assert content(online(load=there)[0]) == FILES


def test_a_download_that_broke_off_goes_on(hub: Hub, online: Ask, offline: Ask) -> None:
    hub.models["org/broken"] = Repository(FILES)
    hub.fails.add("model-00002-of-00002.safetensors")
    message = online(load="org/broken")
    assert "--load org/broken: no such folder, and it is not whole in the cache" in message
    assert "500 Internal Server Error" in message and "hf download org/broken --local-dir broken" in message
    assert "it is not whole in the cache" in offline(load="org/broken")

    hub.fails.clear()
    hub.asked.clear()
    hub.breaks["model-00002-of-00002.safetensors"] = 700  # and huggingface_hub asks again by itself
    assert content(online(load="org/broken")[0]) == FILES
    assert set(hub.downloads()) <= {"model-00002-of-00002.safetensors", "chat_template.jinja", "config.json", "tokenizer.json"}
    assert hub.downloads().count("model-00002-of-00002.safetensors") == 2


@pytest.mark.parametrize(
    ("asked", "message"),
    [
        ({"load": "org/nothing"}, "the hub shows no model of that name; expected a folder, or a public model, or a token"),
        ({"load": "org/gated"}, "the hub gives the model only to those who accepted its terms; expected a token of one"),
        ({"load": "org/gated", "token": "hf_wrong"}, "the hub refuses the token .status 401.; expected a valid one"),
        ({"load": "org/pickled"}, "the model on the hub has no safetensors; expected some, as to unpickle"),
        ({"load": "org/nothing", "tokenizer": "org/nothing"}, "--load org/nothing: no such folder"),
        ({"tokenizer": "org/nothing"}, "--tokenizer-model org/nothing: no such folder"),
    ],
)
def test_what_the_hub_refuses_is_one_sentence(hub: Hub, online: Ask, asked: dict[str, str], message: str) -> None:
    hub.models["org/gated"] = Repository(FILES, gated=True)
    hub.models["org/pickled"] = Repository({"config.json": b"{}", "pytorch_model.bin": b"pickle"})
    found = online(**asked)
    head, sentence = found.split("\n  - ")
    assert head == "1 problem in the configuration:"
    assert "\n" not in sentence
    assert re.search(message, sentence)


def test_a_gated_model_comes_with_the_right_token(hub: Hub, online: Ask) -> None:
    hub.models["org/allowed"] = Repository({**FILES, "LICENSE": b"terms"}, gated=True)
    assert "LICENSE" in content(online(load="org/allowed", token=TOKEN)[0])


def test_without_a_network_one_line_says_what_to_download_and_where_to_put_it(hub: Hub, offline: Ask, home: Path) -> None:
    assert offline(load="org/absent@v1").partition(" (Cannot reach")[0] == (
        "1 problem in the configuration:\n  - --load org/absent@v1: no such folder, and it is not whole in the cache "
        f"{home}/hub, and was not downloaded"
    )
    assert offline(load="org/absent@v1").partition("expected ")[2] == (
        "one of these. Give the command again where there is a network (files that are whole are kept), or download it elsewhere "
        "(hf download org/absent --revision v1 --local-dir absent), copy that folder here, and name it: --load PATH, or "
        "HF_MODEL_CKPT=PATH."
    )


def test_of_several_processes_one_downloads(hub: Hub, home: Path) -> None:
    hub.models["org/ranks"] = Repository({**FILES, "model-00002-of-00002.safetensors": b"c" * 2**22})
    hub.asked.clear()
    asked = json.dumps({"load": "org/ranks"}) + "\n"
    command = [sys.executable, "-c", CLIENT]
    running = [
        subprocess.Popen(command, env=hub.environment(home), stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, cwd=home)
        for _ in range(2)
    ]
    for process in running:
        assert process.stdin
        process.stdin.write(asked)
        process.stdin.close()
    answers = [json.loads(process.stdout.read()) for process in running if process.stdout]
    assert answers[0] == answers[1] and content(answers[0][0])["model-00002-of-00002.safetensors"] == b"c" * 2**22
    assert hub.downloads().count("model-00002-of-00002.safetensors") == 1


@pytest.mark.parametrize(("target", "is_right"), [("../../../blobs/ab/cdef", True), ("../../../other/cdef", False)])
def test_links_of_the_cache_lead_to_the_blobs_that_its_models_share(tmp_path: Path, target: str, is_right: bool) -> None:
    """snapshots/COMMIT/FILE -> ../../blobs/ETAG -> ../../blobs/ab/HASH (huggingface_hub 2: utils/_shared_blobs.py)."""
    model = tmp_path / "models--org--name"
    snapshot = model / "snapshots" / ("0" * 40)
    for made in (snapshot, model / "blobs", tmp_path / "blobs" / "ab", tmp_path / "other"):
        made.mkdir(parents=True)
    for place in ("blobs/ab/cdef", "other/cdef"):
        (tmp_path / place).write_bytes(b"weights")
    (model / "blobs" / "etag").symlink_to(tmp_path / target.removeprefix("../../../"))
    (snapshot / "a.safetensors").symlink_to("../../blobs/etag")
    (snapshot / INDEX).write_text(json.dumps({"weight_map": {"w": "a.safetensors"}}))
    if is_right:
        assert _indexed_files(snapshot, snapshot / INDEX) == {snapshot / "a.safetensors": ["w"]}
    else:
        with pytest.raises(CheckpointError, match="lies outside the folder"):
            _indexed_files(snapshot, snapshot / INDEX)
