"""A server on this machine that speaks the Hugging Face hub's protocol, as far as huggingface_hub and datasets ask.

Protocol: huggingface_hub 2.4 (hf_api.py: repo_info, list_repo_tree, get_paths_info; file_download.py: get_hf_file_metadata,
http_get). Files of FILTERED kinds are answered with a redirect, as the hub's large files are.
"""

import functools
import hashlib
import json
import os
import re
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit

LARGE = (".safetensors", ".parquet", ".bin")
TOKEN = "hf_right"
API = re.compile(r"/api/(models|datasets)/([^/]+/[^/]+)(?:/(revision|tree|paths-info)/([^/]+)(?:/(.*))?)?")
FILE = re.compile(r"/(datasets/)?([^/]+/[^/]+)/resolve/([^/]+)/(.+)")


@dataclass
class Repository:
    """What the hub has under one name."""

    files: Mapping[str, bytes]
    gated: bool = False
    """Files are given to those with TOKEN alone; the rest everybody sees."""

    @property
    def commit(self) -> str:
        return hashlib.sha1(repr(sorted(self.files.items())).encode()).hexdigest()


@dataclass
class Hub:
    """The server's content, and what it was asked."""

    models: dict[str, Repository] = field(default_factory=dict)
    datasets: dict[str, Repository] = field(default_factory=dict)
    asked: list[str] = field(default_factory=list)
    """METHOD path, in order."""
    breaks: dict[str, int] = field(default_factory=dict)
    """{file name: bytes after which the connection is closed, once}."""
    fails: set[str] = field(default_factory=set)
    """Names of files whose content is answered with status 500."""
    url: str = ""

    def environment(self, home: Any, **more: str) -> dict[str, str]:
        """For a process that uses this hub, with its own cache in `home`."""
        kept = {name: value for name, value in os.environ.items() if not name.startswith(("HF_", "HUGGINGFACE_"))}
        return {**kept, "HF_ENDPOINT": self.url, "HF_HOME": str(home), "HF_HUB_DISABLE_TELEMETRY": "1", **more}

    def downloads(self) -> list[str]:
        """Names of the files whose content was asked for, in order."""
        content = re.compile(r"GET (/cdn/|.*/resolve/).*")
        return [path.rpartition("/")[2] for path in self.asked if content.fullmatch(path)]


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def __init__(self, hub: Hub, *args: Any):
        self.hub = hub
        super().__init__(*args)

    def log_message(self, *args: Any) -> None:
        pass

    def do_HEAD(self) -> None:
        self._answer()

    def do_GET(self) -> None:
        self._answer()

    def do_POST(self) -> None:
        self._answer()

    def _answer(self) -> None:
        length = int(self.headers.get("Content-Length") or 0)
        body = self.rfile.read(length)
        path = unquote(urlsplit(self.path).path)
        self.hub.asked.append(f"{self.command} {path}")
        token = (self.headers.get("Authorization") or "").removeprefix("Bearer ")
        if token not in ("", TOKEN):
            self._refuse(401, "", "Invalid credentials in Authorization header")
        elif path.startswith("/cdn/"):
            kind, owner, name, file = path.removeprefix("/cdn/").split("/", 3)
            repository = getattr(self.hub, kind)[f"{owner}/{name}"]
            if file in self.hub.fails and self.command == "GET":
                self._refuse(500, "", "Internal error")
            else:
                self._send_file(repository, file, repository.files[file])
        elif api := API.fullmatch(path):
            self._answer_api(api, token, body)
        elif file := FILE.fullmatch(path):
            self._answer_file(file, token)
        else:
            self._refuse(404, "", "Not found")

    def _repository(self, kind: str, name: str, revision: str | None) -> Repository | None:
        repository = getattr(self.hub, kind).get(name)
        if repository is None:
            self._refuse(401, "RepoNotFound", "Repository not found")
        elif revision not in (None, "main", repository.commit):
            self._refuse(404, "RevisionNotFound", f"Invalid rev id: {revision}")
        else:
            return repository
        return None

    def _answer_api(self, asked: re.Match[str], token: str, body: bytes) -> None:
        kind, name, what, revision, below = asked.groups()
        repository = self._repository(kind, name, revision)
        if repository is None:
            return
        if what == "tree":
            self._send_json(_tree(repository, below or "", "recursive=true" in self.path.lower()))
            return
        if what == "paths-info":
            wanted = parse_qs(body.decode()).get("paths", [])
            self._send_json([entry for entry in _tree(repository, "", True) if entry["path"] in wanted])
            return
        names = [{"rfilename": file} for file in repository.files]
        info = {"_id": "0" * 24, "id": name, "sha": repository.commit, "siblings": names, "private": False, "tags": []}
        info |= {"modelId": name} if kind == "models" else {"author": name.partition("/")[0]}
        self._send_json({**info, "gated": "auto" if repository.gated else False, "downloads": 0, "likes": 0})

    def _answer_file(self, asked: re.Match[str], token: str) -> None:
        kind, name, revision, file = "datasets" if asked[1] else "models", asked[2], asked[3], asked[4]
        repository = self._repository(kind, name, revision)
        if repository is None:
            return
        if repository.gated and token != TOKEN:
            self._refuse(403 if token else 401, "GatedRepo", f"Access to model {name} is restricted.")
        elif file not in repository.files:
            self._refuse(404, "EntryNotFound", "Entry not found", {"X-Repo-Commit": repository.commit})
        elif file.endswith(LARGE):
            content = repository.files[file]
            linked = {"X-Linked-Etag": f'"{hashlib.sha256(content).hexdigest()}"', "X-Linked-Size": str(len(content))}
            self._send(302, b"", {**linked, "X-Repo-Commit": repository.commit, "Location": f"/cdn/{kind}/{name}/{file}"})
        else:
            self._send_file(repository, file, repository.files[file])

    def _send_file(self, repository: Repository, name: str, content: bytes) -> None:
        headers = {"ETag": f'"{_oid(content)}"', "X-Repo-Commit": repository.commit, "Accept-Ranges": "bytes"}
        span = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range") or "")
        if span is None:
            self._send(200, content, headers, self.hub.breaks.pop(name, None) if self.command == "GET" else None)
            return
        first, last = int(span[1]), min(int(span[2] or len(content)), len(content) - 1)
        self._send(206, content[first : last + 1], {**headers, "Content-Range": f"bytes {first}-{last}/{len(content)}"})

    def _refuse(self, status: int, code: str, message: str, headers: Mapping[str, str] | None = None) -> None:
        content = json.dumps({"error": message}).encode()
        self._send(status, content, {**(headers or {}), "X-Error-Code": code, "X-Error-Message": message})

    def _send_json(self, value: Any) -> None:
        self._send(200, json.dumps(value).encode(), {"Content-Type": "application/json"})

    def _send(self, status: int, content: bytes, headers: Mapping[str, str], breaks: int | None = None) -> None:
        self.send_response(status)
        for name, value in {**headers, "Content-Length": str(len(content))}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command == "HEAD":
            return
        self.wfile.write(content if breaks is None else content[:breaks])
        if breaks is not None:
            self.close_connection = True


def _tree(repository: Repository, folder: str, recursive: bool) -> list[dict[str, Any]]:
    """What is in a folder: files and folders, those of its folders too if recursive."""
    below = {file: content for file, content in repository.files.items() if file.startswith(folder + "/" if folder else "")}
    parents = {"/".join(parts[:n]) for parts in (file.split("/") for file in below) for n in range(1, len(parts))}
    depth = folder.count("/") + 1 if folder else 0
    entries = [{"type": "directory", "oid": "0" * 40, "size": 0, "path": path} for path in sorted(parents) if path != folder]
    entries += [_entry(path, content) for path, content in below.items()]
    return [entry for entry in entries if recursive or entry["path"].count("/") == depth]


def _oid(content: bytes) -> str:
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()


def _entry(path: str, content: bytes) -> dict[str, Any]:
    entry: dict[str, Any] = {"type": "file", "oid": _oid(content), "size": len(content), "path": path}
    if path.endswith(LARGE):
        entry["lfs"] = {"oid": hashlib.sha256(content).hexdigest(), "size": len(content), "pointerSize": 134}
    return entry


@contextmanager
def serving() -> Iterator[Hub]:
    """A hub on a port of its own, until the end of the block."""
    hub = Hub()
    server = ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(_Handler, hub))
    server.daemon_threads = True
    hub.url = f"http://127.0.0.1:{server.server_address[1]}"
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
