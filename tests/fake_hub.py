"""A small server that speaks the part of the Hub's HTTP protocol with which a model is pushed and loaded.

Repositories live in memory. A commit is a dict of files; a branch names one. The rules for metadata are those that the
documentation of the Hub states.
"""

from __future__ import annotations

import base64
import hashlib
import json
import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit

import yaml

TOKEN, USER = "hf_of_the_test", "tester"
LICENSES = {"apache-2.0", "mit", "cc-by-4.0", "cc-by-nc-4.0", "other", "unknown"}
RELATIONS = {"adapter", "merge", "quantized", "finetune"}
TASKS = {"automatic-speech-recognition", "audio-classification", "feature-extraction"}
REPO_ID = re.compile(r"([\w.-]+/)?[\w.-]{1,96}")
Files = dict[str, bytes]


def metadata_errors(content: str) -> list[str]:
    """What is wrong in the metadata of a card."""
    found = re.match(r"---\n(.*?)\n---\n", content, re.DOTALL)
    if found is None:
        return ["there is no metadata"]
    data = yaml.safe_load(found[1])
    errors = []
    if data.get("license") not in {None, *LICENSES}:
        errors.append('"license" must be one of the known licenses')
    if data.get("license") == "other" and not data.get("license_name"):
        errors.append('"license_name" is required where "license" is other')
    languages = data.get("language", [])
    for language in [languages] if isinstance(languages, str) else languages:
        if not re.fullmatch(r"[a-z]{2,3}|multilingual|code", str(language)):
            errors.append('"language" must only contain ISO 639 codes')
    for name in ("base_model", "datasets"):
        values = data.get(name, [])
        for value in [values] if isinstance(values, str) else values:
            if not REPO_ID.fullmatch(str(value)):
                errors.append(f'"{name}" with value {value!r} is not valid')
    if data.get("base_model_relation") not in {None, *RELATIONS}:
        errors.append('"base_model_relation" must be one of the known relations')
    if data.get("pipeline_tag") not in {None, *TASKS}:
        errors.append('"pipeline_tag" must be a known task')
    for name in ("tags", "metrics"):
        if not all(isinstance(value, str) for value in data.get(name, [])):
            errors.append(f'"{name}" must be a list of strings')
    for model in data.get("model-index", []):
        if not isinstance(model.get("name"), str) or not model["name"]:
            errors.append('"model-index[0].name" is required')
        for result in model.get("results", []):
            required = [
                result["task"].get("type"),
                result["dataset"].get("type"),
                result["dataset"].get("name"),
            ]
            for metric in result["metrics"]:
                required += [metric.get("type"), metric.get("value")]
            if None in required:
                errors.append('"model-index[0].results[0]" must have a task, a data set and metrics')
    return errors


class FakeHub(ThreadingHTTPServer):
    """The server, its repositories, and what was asked of it."""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.endpoint = f"http://127.0.0.1:{self.server_port}"
        self.branches: dict[str, dict[str, str]] = {}  # of each repository, the commit by branch
        self.commits: dict[str, Files] = {}
        self.large: Files = {}  # by their sha256
        self.private: set[str] = set()
        self.asked: list[str] = []

    def files(self, repo_id: str, revision: str = "main") -> Files:
        """The files of a revision, which is a branch or a commit."""
        return self.commits[self.branches[repo_id].get(revision, revision)]

    def commit(self, repo_id: str, revision: str, changed: Files) -> str:
        """Adds a commit with these files to a branch, and returns its name."""
        files = self.files(repo_id, revision) | changed
        name = hashlib.sha1(f"{len(self.commits)}{sorted(files)}".encode()).hexdigest()
        self.commits[name] = files
        self.branches[repo_id][revision] = name
        return name

    @property
    def environment(self) -> dict[str, str]:
        """The variables with which a process uses this server as the Hub."""
        return {
            "HF_ENDPOINT": self.endpoint,
            "HF_HUB_OFFLINE": "0",
            "HF_HUB_DISABLE_XET": "1",
            "HF_HUB_DISABLE_TELEMETRY": "1",
            "HF_TOKEN": TOKEN,
            "NO_PROXY": "127.0.0.1",
        }


class Handler(BaseHTTPRequestHandler):
    """Answers one request."""

    protocol_version = "HTTP/1.1"
    server: FakeHub

    def log_message(self, *_: Any) -> None:
        """Says nothing."""

    def do_POST(self) -> None:  # noqa: PLR0911
        body = self._body()
        hub, path, query = self.server, *self._asked()
        if path == "/api/validate-yaml":
            errors = metadata_errors(json.loads(body)["content"])
            answer = {"errors": [{"message": error} for error in errors], "warnings": []}
            return self._json(answer, 400 if errors else 200)
        if self.headers.get("Authorization") != f"Bearer {TOKEN}":
            return self._json({"error": "Invalid username or password."}, 401)
        if path == "/api/repos/create":
            wanted = json.loads(body)
            repo_id = f"{wanted['organization'] or USER}/{wanted['name']}"
            known = repo_id in hub.branches
            if not known:
                hub.commits["0" * 40] = {}
                hub.branches[repo_id] = {"main": "0" * 40}
                if wanted.get("visibility") == "private" or wanted.get("private"):
                    hub.private.add(repo_id)
            return self._json({"url": f"{hub.endpoint}/{repo_id}", "name": repo_id}, 409 if known else 200)
        if found := re.fullmatch(r"/(.+)\.git/info/lfs/objects/batch", path):
            objects = [
                {
                    **one,
                    "actions": {"upload": {"href": f"{hub.endpoint}/large/{one['oid']}", "header": {}}},
                }
                for one in json.loads(body)["objects"]
            ]
            return self._json({"transfer": "basic", "objects": objects})
        found = re.fullmatch(r"/api/models/([^/]+/[^/]+)/(preupload|commit|branch)/(.+)", path)
        if not found or found[1] not in hub.branches:
            return self._missing("RepoNotFound")
        repo_id, verb, revision = found.groups()
        if verb == "branch":
            if revision in hub.branches[repo_id]:
                return self._json({"error": "the branch exists"}, 409)
            hub.branches[repo_id][revision] = hub.branches[repo_id]["main"]
            return self._json({})
        if revision not in hub.branches[repo_id]:
            return self._missing("RevisionNotFound")
        if verb == "preupload":
            return self._json(
                {
                    "files": [
                        {
                            "path": file["path"],
                            "uploadMode": "lfs" if file["path"].endswith(".safetensors") else "regular",
                            "shouldIgnore": False,
                        }
                        for file in json.loads(body)["files"]
                    ]
                }
            )
        changed: Files = {}
        for line in map(json.loads, body.splitlines()):
            value = line["value"]
            if line["key"] == "file":
                changed[value["path"]] = base64.b64decode(value["content"])
            elif line["key"] == "lfsFile":
                changed[value["path"]] = hub.large[value["oid"]]
        if "create_pr" in query:
            revision = "refs/pr/1"
            hub.branches[repo_id][revision] = hub.branches[repo_id]["main"]
        name = hub.commit(repo_id, revision, changed)
        answer = {"commitUrl": f"{hub.endpoint}/{repo_id}/commit/{name}", "commitOid": name}
        return self._json(answer | {"pullRequestUrl": f"{hub.endpoint}/{repo_id}/discussions/1"})

    def do_PUT(self) -> None:
        path, _ = self._asked()
        content = self._body()
        assert path == f"/large/{hashlib.sha256(content).hexdigest()}"
        self.server.large[path.rpartition("/")[2]] = content
        self._json({})

    def do_HEAD(self) -> None:
        self.do_GET()

    def do_GET(self) -> None:  # noqa: PLR0911
        hub, (path, _) = self.server, self._asked()
        if path == "/api/whoami-v2":
            return self._json({"type": "user", "name": USER, "orgs": []})
        pattern = (
            r"/(?:api/models/)?([^/]+/[^/]+?)(?:/(revision|tree|resolve)/(refs/pr/\d+|[^/]+)(?:/(.+))?)?"
        )
        found = re.fullmatch(pattern, path)
        if not found or found[1] not in hub.branches:
            return self._missing("RepoNotFound")
        repo_id, verb, revision, name = found.groups()
        known = hub.branches[repo_id]
        commit = known.get(revision or "main", revision)
        if commit not in hub.commits:
            return self._missing("RevisionNotFound")
        files = hub.commits[commit]
        if verb == "resolve":
            if name not in files:
                return self._missing("EntryNotFound")
            etag = hashlib.sha256(files[name]).hexdigest()
            return self._send(files[name], {"ETag": f'"{etag}"', "X-Repo-Commit": commit})
        if verb == "tree":
            return self._missing("EntryNotFound") if name else self._json([])
        siblings = [{"rfilename": file} for file in sorted(files)]
        answer = {"id": repo_id, "modelId": repo_id, "sha": commit, "siblings": siblings, "tags": []}
        return self._json(answer | {"private": repo_id in hub.private, "downloads": 0, "likes": 0})

    def _body(self) -> bytes:
        if self.headers.get("Transfer-Encoding") != "chunked":
            return self.rfile.read(int(self.headers.get("Content-Length", 0)))
        parts = []
        while size := int(self.rfile.readline(), 16):
            parts.append(self.rfile.read(size))
            self.rfile.readline()
        self.rfile.readline()
        return b"".join(parts)

    def _asked(self) -> tuple[str, dict[str, list[str]]]:
        parts = urlsplit(self.path)
        path = unquote(parts.path)
        self.server.asked.append(f"{self.command} {path}")
        return path, parse_qs(parts.query)

    def _missing(self, what: str) -> None:
        status = 401 if what == "RepoNotFound" and not self.headers.get("Authorization") else 404
        self._json({"error": what}, status, {"X-Error-Code": what, "X-Error-Message": what})

    def _json(self, values: Any, status: int = 200, headers: dict[str, str] | None = None) -> None:
        kind = {"Content-Type": "application/json"}
        self._send(json.dumps(values).encode(), kind | (headers or {}), status)

    def _send(self, content: bytes, headers: dict[str, str], status: int = 200) -> None:
        self.send_response(status)
        for name, value in (headers | {"Content-Length": str(len(content))}).items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)


@contextmanager
def running_hub() -> Iterator[FakeHub]:
    """A server that answers until the end of the block."""
    hub = FakeHub()
    thread = threading.Thread(target=hub.serve_forever, daemon=True)
    thread.start()
    try:
        yield hub
    finally:
        hub.shutdown()
        hub.server_close()
        thread.join()
