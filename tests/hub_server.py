"""A small Hub for tests: enough of the Hugging Face Hub's HTTP interface for the real client, on loopback.

Large files go through a second server on another port, as the Hub's go through a CDN: requests there must not carry
the user's token, and are refused if they do.
"""

import json
import os
import socket
import threading
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit

from hub_api import Request, Response, serve, serve_large_file
from hub_store import HubError, Store


@dataclass
class Fault:
    """A failure to come: the next `times` requests whose path holds `substring` are answered with `status`."""

    substring: str
    status: int
    times: int
    method: str | None


@dataclass(frozen=True)
class Logged:
    """One request that was answered."""

    server: str
    method: str
    path: str
    status: int
    authorized: bool


class Hub:
    """The two servers, their content, and what tests need to steer and to look at them.

    Attributes:
        url: the endpoint (HF_ENDPOINT).
        user, token: a user with a token that may write.
        home: HF_HOME for the clients.
        requests: every request answered so far.
    """

    def __init__(self, home: Path, user: str = "user") -> None:
        self.home, self.user = home, user
        self.store = Store()
        self.token = self.store.add_user(user)
        self.requests: list[Logged] = []
        self._faults: list[Fault] = []
        self._servers = {name: _Server(self, name) for name in ("hub", "cdn")}
        self.url = f"http://127.0.0.1:{self._servers['hub'].server_port}"
        # Under another name, since some versions of the client take one name with two ports for one host.
        self.cdn_url = f"http://localhost:{self._servers['cdn'].server_port}"

    def start(self) -> None:
        for server in self._servers.values():
            threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True).start()

    def stop(self) -> None:
        for server in self._servers.values():
            server.shutdown()
            server.server_close()

    @property
    def env(self) -> dict[str, str]:
        """The environment for a client in a process of its own, logged in as `user`."""
        ours = ("HF_", "HUGGINGFACE", "TRANSFORMERS_OFFLINE", "DO_NOT_TRACK", "DISABLE_TELEMETRY")
        inherited = {name: value for name, value in os.environ.items() if not name.startswith(ours)}
        return inherited | {
            "HF_ENDPOINT": self.url,
            "HF_HOME": str(self.home),
            "HF_TOKEN": self.token,
            "HF_HUB_DISABLE_XET": "1",
            "HF_HUB_DISABLE_TELEMETRY": "1",
            "HF_HUB_DISABLE_PROGRESS_BARS": "1",
            "NO_PROXY": "127.0.0.1,localhost",
            "no_proxy": "127.0.0.1,localhost",
        }

    def add_user(self, name: str, role: str = "write") -> str:
        """Another user's token (or another token of the same user); `role` is "read" or "write"."""
        return self.store.add_user(name, role)

    def fail_next(self, path_substring: str, status: int = 500, times: int = 1, method: str | None = None) -> None:
        """Let the next `times` requests whose path holds `path_substring` fail with `status`; 0 drops the connection.

        Paths of uploads: `/preupload/`, `/info/lfs/objects/batch`, `/lfs-upload/` (on the CDN), `/commit/`; of
        downloads: `/resolve/`, `/lfs-download/` (on the CDN). Except for `/commit/`, the client tries five times more
        after 408, 429, 5xx and dropped connections.
        """
        with self.store.lock:
            self._faults.append(Fault(path_substring, status, times, method))

    def files(self, repo_id: str, revision: str = "main", repo_type: str = "model") -> dict[str, bytes]:
        """What the Hub holds, without asking a client; .gitattributes, which every repository has, is left out."""
        commit = self.store.repos[repo_type, repo_id].resolve(revision)
        return {path: blob.data for path, blob in commit.files.items() if path != ".gitattributes"}

    def take_fault(self, method: str, path: str) -> int | None:
        """The status with which a request must fail, if it must."""
        with self.store.lock:
            for fault in self._faults:
                if fault.times > 0 and fault.substring in path and fault.method in (None, method):
                    fault.times -= 1
                    return fault.status
        return None


class _Server(ThreadingHTTPServer):
    daemon_threads = True
    block_on_close = False

    def __init__(self, hub: Hub, name: str) -> None:
        self.hub, self.name = hub, name
        super().__init__(("127.0.0.1", 0), _Handler)

    def handle_error(self, request: Any, client_address: Any) -> None:
        """A client that went away is no news."""


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: _Server

    def log_message(self, format: str, *args: Any) -> None:
        """The requests are kept in `Hub.requests` instead of being printed."""

    def do_GET(self) -> None:
        hub, url = self.server.hub, urlsplit(self.path)
        body = self._read_body()
        status = hub.take_fault(self.command, unquote(self.path))
        if status == 0:
            self._log(0)
            self.close_connection = True
            self.connection.shutdown(socket.SHUT_RDWR)
            return
        try:
            if status is not None:
                error = HubError(status, "", "Failure on demand")
                error.headers["Retry-After"] = "0"
                raise error
            request = Request(
                method=self.command,
                path=url.path,
                query=parse_qs(url.query),
                headers=dict(self.headers.items()),
                body=body,
                endpoint=hub.url,
                cdn=hub.cdn_url,
            )
            if self.server.name == "cdn":
                response = serve_large_file(hub.store, request)
            else:
                with hub.store.lock:
                    response = serve(hub.store, request)
        except HubError as error:
            headers = {"X-Error-Message": error.message, **error.headers}
            if error.code:
                headers["X-Error-Code"] = error.code
            response = Response({"error": error.message, **error.body}, error.status, headers)
        self._send(response)

    do_HEAD = do_POST = do_PUT = do_DELETE = do_GET

    def _read_body(self) -> bytes:
        if "chunked" not in self.headers.get("Transfer-Encoding", ""):
            return self.rfile.read(int(self.headers.get("Content-Length") or 0))
        body = b""
        while size := int(self.rfile.readline().split(b";")[0], 16):
            body += self.rfile.read(size)
            self.rfile.readline()
        self.rfile.readline()
        return body

    def _send(self, response: Response) -> None:
        content = response.content if isinstance(response.content, bytes) else json.dumps(response.content).encode()
        headers = {"Content-Type": "application/json", "Content-Length": str(len(content)), **response.headers}
        self._log(response.status)
        self.send_response(response.status)
        for name, value in headers.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)

    def _log(self, status: int) -> None:
        authorized = "Authorization" in self.headers
        self.server.hub.requests.append(Logged(self.server.name, self.command, self.path, status, authorized))
