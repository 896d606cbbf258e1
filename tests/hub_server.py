"""A Hub in memory on loopback: the part of its HTTP interface that the real client uses to push and to load.

All files are "regular" to it, so that the client sends them with the commit and needs no large file storage.
"""

import base64
import json
import os
import re
import threading
import uuid
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import PurePosixPath
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit


@dataclass
class Repo:
    """One repository: its branches, and the files of every commit."""

    private: bool
    branches: dict[str, str] = field(default_factory=dict)
    commits: dict[str, dict[str, bytes]] = field(default_factory=dict)

    def commit(self, branch: str, files: dict[str, bytes]) -> str:
        oid = uuid.uuid4().hex + "0" * 8
        self.commits[oid], self.branches[branch] = files, oid
        return oid


class Refusal(Exception):
    """An answer other than success: status, and the Hub's error code."""

    def __init__(self, status: int, code: str = "", commit: str = "", **body: str) -> None:
        super().__init__(code)
        self.status, self.body = status, body
        self.headers = {"X-Error-Code": code, "X-Error-Message": code or "refused", "X-Repo-Commit": commit}


class Hub:
    """The server, its repositories and its one user, whose `token` may write to repositories named "user/...".

    Attributes:
        url: the endpoint.
        repos: repositories by kind ("models", "datasets") and id.
    """

    user = "user"

    def __init__(self) -> None:
        self.token = f"hf_{uuid.uuid4().hex}"
        self.repos: dict[tuple[str, str], Repo] = {}
        handler = type("Handler", (_Handler,), {"hub": self})
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
        self._server.daemon_threads = True
        self.url = f"http://127.0.0.1:{self._server.server_port}"
        threading.Thread(target=self._server.serve_forever, daemon=True).start()

    def environment(self, home: str) -> dict[str, str]:
        """The variables that lead the client here; it reads them once, when it is imported."""
        return {
            "HF_ENDPOINT": self.url,
            "HF_HOME": home,
            "HF_TOKEN": self.token,
            "HF_HUB_DISABLE_XET": "1",
            "HF_HUB_DISABLE_TELEMETRY": "1",
            "NO_PROXY": ",".join(filter(None, (os.environ.get("NO_PROXY"), "127.0.0.1"))),
        }

    def files(self, repo_id: str, revision: str = "main", kind: str = "models") -> dict[str, bytes]:
        """What a repository holds, without asking a client."""
        repo = self.repos[kind, repo_id]
        return repo.commits[repo.branches[revision]]

    def answer(self, method: str, path: str, query: dict, body: bytes, user: str) -> tuple[Any, dict[str, str]]:
        """Content (bytes, or else JSON) and headers of an answer."""
        if path == "/api/whoami-v2":
            if not user:
                raise Refusal(401)
            access = {"displayName": "test", "role": "write"}
            return {"type": "user", "name": user, "orgs": [], "auth": {"accessToken": access}}, {}
        if path == "/api/validate-yaml":
            return {"errors": [], "warnings": []}, {}
        if path == "/api/repos/create":
            return self._create(json.loads(body), user), {}
        found = re.fullmatch(r"/api/(models|datasets)/([^/]+/[^/]+)(?:/([a-z-]+))?(?:/([^/]+))?(?:/(.+))?", path)
        if found:
            kind, repo_id, action, revision, inside = (unquote(part or "") for part in found.groups())
            repo = self._find(kind, repo_id, user, write=method == "POST" and action != "paths-info")
            if action == "tree":
                return _tree(
                    self._resolve(repo, revision)[1], inside, query.get("recursive", [""])[0].lower() in ("1", "true")
                ), {}
            return self._act(repo, repo_id, action, revision or "main", body), {}
        found = re.fullmatch(r"/(datasets/)?([^/]+/[^/]+)/resolve/([^/]+)/(.+)", path)
        if found:
            kind, repo_id, revision, name = (unquote(part or "") for part in found.groups())
            repo = self._find(kind.rstrip("/") or "models", repo_id, user)
            oid, files = self._resolve(repo, revision)
            if name not in files:
                raise Refusal(404, "EntryNotFound", oid)
            return files[name], {"X-Repo-Commit": oid, "ETag": f'"{_etag(files[name])}"'}
        raise Refusal(404)

    def _create(self, asked: dict[str, Any], user: str) -> dict[str, str]:
        repo_id = f"{asked.get('organization') or user}/{asked['name']}"
        key = (f"{asked.get('type') or 'model'}s", repo_id)
        if not user:
            raise Refusal(401)
        if not repo_id.startswith(f"{self.user}/"):
            raise Refusal(403)
        if key in self.repos:
            raise Refusal(409, url=f"{self.url}/{repo_id}")
        repo = self.repos[key] = Repo(bool(asked.get("private")) or asked.get("visibility") == "private")
        repo.commit("main", {})
        return {"url": f"{self.url}/{repo_id}", "name": repo_id, "id": repo_id}

    def _find(self, kind: str, repo_id: str, user: str, write: bool = False) -> Repo:
        repo = self.repos.get((kind, repo_id))
        if repo is None or ((repo.private or write) and not user):
            raise Refusal(404 if user else 401, "RepoNotFound")
        return repo

    @staticmethod
    def _resolve(repo: Repo, revision: str) -> tuple[str, dict[str, bytes]]:
        oid = repo.branches.get(revision, revision)
        if oid not in repo.commits:
            raise Refusal(404, "RevisionNotFound")
        return oid, repo.commits[oid]

    def _act(self, repo: Repo, repo_id: str, action: str, revision: str, body: bytes) -> Any:
        if action == "branch":
            if revision in repo.branches:
                raise Refusal(409)
            repo.branches[revision] = repo.branches["main"]
            return {}
        oid, files = self._resolve(repo, revision)
        if action in ("", "revision"):
            names = [{"rfilename": name} for name in sorted(files)]
            return {"id": repo_id, "sha": oid, "private": repo.private, "tags": [], "siblings": names}
        if action == "paths-info":
            return [_entry(name, files) for name in parse_qs(body.decode())["paths"] if name in _names(files)]
        if action == "preupload":
            modes = {"uploadMode": "regular", "shouldIgnore": False}
            return {"files": [{"path": asked["path"], **modes} for asked in json.loads(body)["files"]]}
        if action == "commit":
            _, *operations = [json.loads(line) for line in body.splitlines() if line]
            changed = {o["value"]["path"]: base64.b64decode(o["value"]["content"]) for o in operations}
            made = repo.commit(revision, {**files, **changed})
            return {"success": True, "commitOid": made, "commitUrl": f"{self.url}/{repo_id}/commit/{made}"}
        raise Refusal(404)


def _etag(content: bytes) -> str:
    return uuid.uuid5(uuid.NAMESPACE_OID, content.hex()).hex


def _names(files: dict[str, bytes]) -> set[str]:
    """Files, and the folders they lie in."""
    folders = (str(folder) for name in files for folder in PurePosixPath(name).parents)
    return {*files, *folders} - {"."}


def _entry(name: str, files: dict[str, bytes]) -> dict[str, Any]:
    if name not in files:
        return {"type": "directory", "path": name, "oid": _etag(name.encode()), "size": 0}
    return {"type": "file", "path": name, "oid": _etag(files[name]), "size": len(files[name])}


def _tree(files: dict[str, bytes], inside: str, recursive: bool) -> list[dict[str, Any]]:
    found = [name for name in sorted(_names(files)) if not inside or name.startswith(f"{inside}/")]
    if not found:
        raise Refusal(404, "EntryNotFound")
    depth = inside.count("/") + 1 if inside else 0
    return [_entry(name, files) for name in found if recursive or name.count("/") == depth]


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    hub: Hub

    def log_message(self, *args: Any) -> None:
        """Requests are not printed."""

    def do_GET(self) -> None:
        body, url = self._read_body(), urlsplit(self.path)
        shown = self.headers.get("Authorization", "").removeprefix("Bearer ")
        status, content, headers = 200, b"", {}
        try:
            if shown not in ("", self.hub.token):
                raise Refusal(401)
            user = self.hub.user if shown else ""
            content, headers = self.hub.answer(self.command, url.path, parse_qs(url.query), body, user)
        except Refusal as refusal:
            status, content, headers = refusal.status, refusal.body, refusal.headers
        if not isinstance(content, bytes):
            content = json.dumps(content).encode()
        self.send_response(status)
        for name, value in {"Content-Length": str(len(content)), **headers}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)

    do_HEAD = do_POST = do_GET

    def _read_body(self) -> bytes:
        if "chunked" not in self.headers.get("Transfer-Encoding", ""):
            return self.rfile.read(int(self.headers.get("Content-Length") or 0))
        body = b""
        while size := int(self.rfile.readline(), 16):
            body += self.rfile.read(size)
            self.rfile.readline()
        self.rfile.readline()
        return body
