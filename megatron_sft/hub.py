"""Models that are named as on the Hugging Face hub: ORG/MODEL, or ORG/MODEL@REVISION, as folders of this machine's cache.

1. what is there as a file or folder is no name; neither is anything else that is not spelled like one;
2. the hub says what the revision has now; where it does not answer, the cache says what it had;
3. one process of a machine downloads what the cache lacks, the others wait for it.

Cache, token, endpoint and offline mode are huggingface_hub's (HF_HOME, HF_HUB_CACHE, HF_TOKEN, HF_ENDPOINT, HF_HUB_OFFLINE).
Not here: data sets (data/sources.py). No torch.
"""

import contextlib
import dataclasses
import os
import re
import sys
from collections.abc import Iterator
from pathlib import Path

from megatron_sft.checkpoint.tracker import candidates
from megatron_sft.config.run import RunConfig
from megatron_sft.errors import ConfigError
from megatron_sft.lock import only_one
from megatron_sft.log import logger

_PART = "[A-Za-z0-9_][A-Za-z0-9_.-]*"
NAME = re.compile(rf"(?P<repo>{_PART}/(?!(iter_[0-9]+|release)$){_PART})(@(?P<revision>[A-Za-z0-9_][A-Za-z0-9_./-]*))?")
"""Not the folder of one checkpoint, which a typing error leads to."""
SNAPSHOT = re.compile(r".*/models--(?P<org>[^/]+?)--(?P<model>[^/]+)/snapshots/(?P<commit>[0-9a-f]{40})/?")
"""A folder of a cache, perhaps of another machine's."""
SMALL_FILES = (
    "*.json *.jinja *.model *.tiktoken *.txt *.spm tokenizer* vocab* merges* tekken* README.md LICENSE* NOTICE*"
).split()
"""config.json, tokenizer, templates, index, licence. No code, no pickles."""
WEIGHTS = "*.safetensors"
IGNORED = ("*/*", "consolidated*", "*.bin", "*.pt", "*.pth", "*.pkl", "*.pickle", "*.py")
"""Folders (onnx, original), weights that are there twice, and what could run code, whatever it is called."""
CODE = "*.py"
"""With --trust-remote-code alone."""


def fetched(run: RunConfig, weights: bool = True) -> RunConfig:
    """The run with folders in the place of the hub names in --load and --tokenizer-model. Each process of a run calls it.

    Args:
        run: as the flags say it.
        weights: whether those of --load are needed; not where --save holds a checkpoint, which a run goes on from.

    Raises:
        ConfigError: there is no such folder, and neither the hub nor the cache has it; one sentence says what to do.
    """
    load, save, tokenizer = run.checkpoint.load, run.checkpoint.save, run.data.tokenizer_model
    code = run.data.trust_remote_code
    weights = weights and not (save and candidates(Path(save)))
    place = folder("--load", load, weights, code) if load and (weights or load == tokenizer) else load
    tokens = place if tokenizer == load else folder("--tokenizer-model", tokenizer, False, code)
    return dataclasses.replace(
        run,
        checkpoint=dataclasses.replace(run.checkpoint, load=place),
        data=dataclasses.replace(run.data, tokenizer_model=tokens or ""),
    )


def folder(flag: str, place: str, weights: bool, code: bool = False) -> str:
    """A folder with the files of a hub name; any other place as it is.

    Args:
        flag: that named it, for messages.
        place: hub name, path, or the folder of another machine's cache.
        weights: also its safetensors.
        code: also its Python files (--trust-remote-code).

    Raises:
        ConfigError: as fetched.
    """
    elsewhere = SNAPSHOT.fullmatch(place)
    if elsewhere and not os.path.lexists(place):
        place = f"{elsewhere['org']}/{elsewhere['model']}@{elsewhere['commit']}"
    name = NAME.fullmatch(place)
    if name is None or os.path.lexists(place):
        return place
    path = _download(flag, name["repo"], name["revision"], weights, code)
    if weights and not any(Path(path).glob(WEIGHTS)):
        raise ConfigError(
            [
                f"{flag} {place}: the model on the hub has no safetensors; expected some, as to unpickle other files can run "
                "code. Choose another revision or model, or convert it where you trust it: "
                "AutoModelForCausalLM.from_pretrained(NAME).save_pretrained(FOLDER)."
            ]
        )
    return path


def _download(flag: str, repo: str, revision: str | None, weights: bool, code: bool) -> str:
    """The folder of the cache, filled."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.utils import disable_progress_bars

    if not sys.stderr.isatty():
        disable_progress_bars()
    wanted = [*SMALL_FILES, *([WEIGHTS] if weights else []), *([CODE] if code else [])]
    ignored = [pattern for pattern in IGNORED if not (code and pattern == CODE)]
    refusal = _refusal(repo, revision)
    try:
        with contextlib.nullcontext() if refusal else _one_process(repo):
            local = refusal is not None
            place = snapshot_download(
                repo, revision=revision, local_files_only=local, allow_patterns=wanted, ignore_patterns=ignored
            )
    except _errors() as error:
        raise ConfigError([_explained(flag, repo, revision, refusal or error)]) from None
    if refusal:
        logger.warning("%s: not asked anew of the hub (%s).", repo, _short(refusal))
    logger.info("%s of the hub: %s", repo, place)
    return place


def _refusal(repo: str, revision: str | None) -> Exception | None:
    """Why the hub does not say what the model has; None where it does, and then it is told that a download may begin.

    Every process of a machine asks at the same time: one after the other, each would wait for a network that is not there.
    """
    from huggingface_hub import HfApi, constants

    try:
        commit = HfApi().model_info(repo, revision=revision, timeout=constants.HF_HUB_ETAG_TIMEOUT).sha
    except _errors() as error:
        return error
    logger.info("%s of the hub: commit %s; what the cache lacks is downloaded", repo, commit)
    return None


def _errors() -> tuple[type[Exception], ...]:
    """What a request can raise: the base class of its HTTP errors is of requests, httpx or httpx2, as the version has it."""
    from huggingface_hub.errors import HfHubHTTPError

    return (*HfHubHTTPError.__bases__, OSError, ValueError)  # type: ignore[return-value]


@contextlib.contextmanager
def _one_process(repo: str) -> Iterator[None]:
    """Lets one process of the machine download; a cache that cannot be written has nothing to wait for."""
    from huggingface_hub import constants

    locks = Path(constants.HF_HUB_CACHE) / ".locks"
    path = locks / f"megatron_sft--{repo.replace('/', '--')}.lock"
    try:
        locks.mkdir(parents=True, exist_ok=True)
        path.touch()
    except OSError:
        yield
        return
    with only_one(path, f"the download of {repo}"):
        yield


def _explained(flag: str, repo: str, revision: str | None, error: Exception) -> str:
    """The sentence for what the hub or the way to it refuses."""
    from huggingface_hub import constants
    from huggingface_hub.errors import GatedRepoError, HfHubHTTPError, RepositoryNotFoundError, RevisionNotFoundError

    place = f"{flag} {repo}{'@' + revision if revision else ''}: no such folder, and"
    status = error.response.status_code if isinstance(error, HfHubHTTPError) and error.response is not None else None
    if isinstance(error, GatedRepoError):
        return (
            f"{place} the hub gives the model only to those who accepted its terms; expected a token of one. Accept them on "
            f"{constants.ENDPOINT}/{repo} and set HF_TOKEN (or: hf auth login)."
        )
    if isinstance(error, RepositoryNotFoundError):
        return (
            f"{place} the hub shows no model of that name; expected a folder, or a public model, or a token that may read it. "
            "Correct the path or the name, or set HF_TOKEN."
        )
    if isinstance(error, RevisionNotFoundError):
        return f"{place} the model has no such revision; expected a branch, tag or commit after @. Correct it."
    if status in (401, 403):
        return f"{place} the hub refuses the token (status {status}); expected a valid one. Set HF_TOKEN anew, or unset it."
    options = f" --revision {revision}" if revision else ""
    target = repo.rpartition("/")[2]
    return (
        f"{place} it is not whole in the cache {constants.HF_HUB_CACHE}, and was not downloaded ({_short(error)}); expected one "
        "of these. Give the command again where there is a network (files that are whole are kept), or download it elsewhere (hf "
        f"download {repo}{options} --local-dir {target}), copy that folder here, and name it: {flag} PATH, or HF_MODEL_CKPT=PATH."
    )


def _short(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0][:200]
