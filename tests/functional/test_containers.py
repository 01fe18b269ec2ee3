"""Dockerfile, Kubernetes and SkyPilot files, as far as can be without a cluster: syntax, needed keys, the command they start."""

import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from megatron_sft.errors import ConfigError
from megatron_sft.requirements import requirements

ROOT = Path(__file__).resolve().parents[2]
INSTRUCTIONS = {"ARG", "FROM", "RUN", "ENV", "WORKDIR", "COPY", "ENTRYPOINT", "CMD"}


def instructions() -> list[tuple[str, str]]:
    """(instruction, arguments) of the Dockerfile, lines that go on joined."""
    text = "\n".join(line for line in (ROOT / "Dockerfile").read_text().splitlines() if not line.startswith("#"))
    lines = [line for line in text.replace("\\\n", " ").split("\n") if line.strip()]
    return [(line.split(maxsplit=1)[0], line.split(maxsplit=1)[1]) for line in lines]


def checked(script: str, shell: str = "bash") -> None:
    subprocess.run([shell, "-n"], input=script, text=True, check=True)
    if found := shutil.which("shellcheck", path=os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])):
        done = subprocess.run(
            [found, "-s", shell, "-S", "warning", "-"], input=script, text=True, capture_output=True, check=False
        )
        assert done.returncode == 0, done.stdout


def test_the_dockerfile_has_known_instructions_and_copies_what_there_is() -> None:
    listed = instructions()
    assert {name for name, _ in listed} <= INSTRUCTIONS
    assert [name for name, _ in listed if name in ("FROM", "ENTRYPOINT", "CMD")] == ["FROM", "ENTRYPOINT", "CMD"]
    for name, arguments in listed:
        if name == "RUN":
            checked(arguments, "sh")
        if name == "COPY":
            *sources, _ = arguments.split()
            assert all((ROOT / source).exists() for source in sources), arguments
    defined = {arguments.partition("=")[0] for name, arguments in listed if name == "ARG"} | {"PATH"}
    used = {found for _, arguments in listed for found in re.findall(r"\$\{(\w+)", arguments)}
    assert used <= defined
    first = [name for name, _ in listed].index("FROM")
    inside = {arguments.partition("=")[0] for name, arguments in listed[first:] if name == "ARG"}
    assert {"TRANSFORMER_ENGINE", "EXTRAS"} == inside, "an ARG before FROM is not known behind it"


def test_the_image_has_all_that_the_wheel_is_built_of() -> None:
    copied = [word for name, arguments in instructions() if name == "COPY" for word in arguments.split()[:-1]]
    setup = (ROOT / "setup.py").read_text()
    folders = re.findall(r'": "([a-z_/]+)"', setup[setup.index("SHELL = {") : setup.index("}")])
    assert {"setup.py", "pyproject.toml", "megatron_sft", "finetune.py", "generate.py"} <= set(copied)
    assert all(any(folder.startswith(name) for name in copied) for folder in folders) and len(folders) == 2
    ignored = (ROOT / ".dockerignore").read_text().split()
    assert not set(copied) & set(ignored)


@pytest.fixture
def dry(tmp_path: Path) -> Any:
    """Runs a script with an interpreter that prints its arguments; returns them."""
    python, command = tmp_path / "bin" / "python", tmp_path / "bin" / "megatron-sft"
    python.parent.mkdir()
    python.write_text(f'#!/bin/bash\n[[ $1 == -I ]] && exec "{sys.executable}" "$@"\nprintf "%s\\n" "$@"\n')
    command.write_text(f'#!/bin/bash\nPYTHONPATH="{ROOT}" exec "{sys.executable}" -m megatron_sft "$@"\n')
    for script in (python, command):
        script.chmod(0o755)

    def run(script: str, variables: dict[str, str]) -> list[str]:
        checked(script)
        environment = {"PATH": f"{python.parent}:/usr/bin:/bin", "PYTHON": str(python), "HOME": str(tmp_path), **variables}
        done = subprocess.run(["bash", "-euc", script], cwd=ROOT, env=environment, capture_output=True, text=True, timeout=60)
        assert (done.returncode, done.stderr) == (0, ""), done.stderr
        return done.stdout.splitlines()

    return run


LAUNCH = "-m megatron_sft.launch --nnodes 2 --node-rank 1 --nproc-per-node 8 --master-addr {} --master-port 29500"


def after(words: list[str], flag: str) -> str:
    return words[len(words) - words[::-1].index(flag)]


def test_kubernetes(dry: Any) -> None:
    service, job = yaml.safe_load_all((ROOT / "examples/kubernetes/finetune.yaml").read_text())
    assert (service["apiVersion"], service["kind"], job["apiVersion"], job["kind"]) == ("v1", "Service", "batch/v1", "Job")
    spec, pod = job["spec"], job["spec"]["template"]["spec"]
    assert spec["completionMode"] == "Indexed" and spec["completions"] == spec["parallelism"] == 2
    assert pod["restartPolicy"] == "Never", "podFailurePolicy needs it"
    assert spec["podFailurePolicy"]["rules"][0]["onExitCodes"]["values"] == [ConfigError.exit_status]
    assert pod["terminationGracePeriodSeconds"] > 30
    assert service["spec"]["clusterIP"] == "None" and pod["subdomain"] == service["metadata"]["name"]
    assert service["spec"]["selector"].items() <= job["spec"]["template"]["metadata"]["labels"].items()
    (container,) = pod["containers"]
    assert {mount["name"] for mount in container["volumeMounts"]} == {volume["name"] for volume in pod["volumes"]}
    variables = {item["name"]: item["value"] for item in container["env"]}
    assert all(isinstance(value, str) for value in variables.values())
    assert variables["MASTER"] == f"{job['metadata']['name']}-0.{service['metadata']['name']}"
    assert int(variables["GPUS"]) == container["resources"]["limits"]["nvidia.com/gpu"]
    assert int(variables["NODES"]) * int(variables["GPUS"]) == int(variables["TP"]) * int(variables["DP"])
    words = dry(container["args"][0], {**variables, "JOB_COMPLETION_INDEX": "1"})
    expected = LAUNCH.format("sft-0.sft").split()
    assert words[: len(expected)] == expected and Path(words[len(expected)]).name == "finetune.py"
    assert (after(words, "--load"), after(words, "--save"), words[-4:]) == (
        "/data/Qwen3-32B",
        "/data/out",
        ["--save-interval", "200", "--save-retain", "2"],
    )


def test_skypilot(dry: Any) -> None:
    task = yaml.safe_load((ROOT / "examples/skypilot/finetune.yaml").read_text())
    known = {"name", "resources", "num_nodes", "workdir", "file_mounts", "envs", "setup", "run"}
    assert task.keys() == known and all(isinstance(value, str) for value in task["envs"].values())
    model, _, count = task["resources"]["accelerators"].partition(":")
    assert model and task["num_nodes"] * int(count) == int(task["envs"]["TP"]) * int(task["envs"]["DP"])
    checked(task["setup"])
    here = {"SKYPILOT_NUM_NODES": "2", "SKYPILOT_NODE_RANK": "1", "SKYPILOT_NUM_GPUS_PER_NODE": count}
    words = dry(task["run"], {**task["envs"], **here, "SKYPILOT_NODE_IPS": "10.0.0.1\n10.0.0.2"})
    expected = LAUNCH.format("10.0.0.1").split()
    assert words[: len(expected)] == expected and after(words, "--tensor-model-parallel-size") == "8"
    assert after(words, "--finetune-hf-dataset") == "/data/chats.jsonl"


def test_requirements_leave_the_vendors_torch_alone() -> None:
    listed = requirements()
    names = {re.split(r"[<>=!~; \[]", line)[0].lower() for line in listed}
    assert "torch" not in names and {"megatron-core", "transformers", "safetensors"} <= names


def test_the_page_shows_the_flags_that_there_are() -> None:
    page = (ROOT / "docs" / "containers.md").read_text()
    arguments = {words.partition("=")[0] for name, words in instructions() if name == "ARG"}
    assert set(re.findall(r"--build-arg (\w+)=", page)) <= arguments
    assert all(shlex.split(line) for block in re.findall(r"```bash\n(.*?)```", page, re.DOTALL) for line in block.splitlines())
