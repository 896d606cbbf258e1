"""The Hub's HTTP interface over a `Store`: one function for each page that huggingface_hub asks for."""

import base64
import hashlib
import json
import re
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import parse_qs, quote, unquote

from hub_cards import check_card, read_metadata
from hub_store import Blob, Commit, HubError, Repo, Store, User, folders, is_large


PAGE_SIZE = 1000


@dataclass(frozen=True)
class Request:
    """One request; `endpoint` and `cdn` are the addresses of the two servers."""

    method: str
    path: str
    query: dict[str, list[str]]
    headers: dict[str, str]
    body: bytes
    endpoint: str
    cdn: str

    def json(self) -> Any:
        return json.loads(self.body or b"{}")

    def flag(self, name: str) -> bool:
        return self.query.get(name, ["0"])[0].lower() in ("1", "true")


@dataclass(frozen=True)
class Response:
    """One answer: bytes as they are, or anything else as JSON."""

    content: Any = field(default_factory=dict)
    status: int = 200
    headers: dict[str, str] = field(default_factory=dict)


Handler = Callable[..., Response]
ROUTES: list[tuple[str, re.Pattern[str], Handler]] = []
_REPO = r"/api/(models|datasets|spaces)/([^/]+/[^/]+)"
_WEB_REPO = r"/(datasets/|spaces/)?([^/]+/[^/]+)"


def route(method: str, pattern: str) -> Callable[[Handler], Handler]:
    """Register a page; its function gets the store, the user, the request, and the pattern's groups, unquoted."""

    def register(handler: Handler) -> Handler:
        ROUTES.append((method, re.compile(pattern), handler))
        return handler

    return register


def serve(store: Store, request: Request) -> Response:
    """Answer a request to the Hub itself."""
    user = store.authenticate(next((v for k, v in request.headers.items() if k.lower() == "authorization"), None))
    for method, pattern, handler in ROUTES:
        match = pattern.fullmatch(request.path)
        if match and (request.method == method or (request.method == "HEAD" and method == "GET")):
            return handler(store, user, request, *(unquote(part or "") for part in match.groups()))
    if re.match(r"/api/(models|datasets|spaces)/", request.path):
        raise HubError(404 if user.name else 401, "RepoNotFound", "Repository not found")
    raise HubError(404, "", f"No such page: {request.method} {request.path}")


def serve_large_file(store: Store, request: Request) -> Response:
    """Answer a request to the CDN: take or give a large file, by an address that needs no token."""
    if any(name.lower() == "authorization" for name in request.headers):
        raise HubError(400, "", "Only one auth mechanism allowed: the token was sent beyond the Hub")
    oid = request.path.rsplit("/", 1)[-1]
    if request.method == "PUT":
        if hashlib.sha256(request.body).hexdigest() != oid:
            raise HubError(400, "", "The content does not have the sha256 that was announced")
        store.large_files[oid] = request.body
        return Response(b"")
    if oid not in store.large_files:
        raise HubError(404, "", "No such file")
    return _content(request, store.large_files[oid], {"ETag": f'"{oid}"'})


def _content(request: Request, data: bytes, headers: dict[str, str]) -> Response:
    headers = {"Content-Type": "application/octet-stream", "Accept-Ranges": "bytes", **headers}
    wanted = next((value for name, value in request.headers.items() if name.lower() == "range"), "")
    match = re.fullmatch(r"bytes=(\d+)-(\d*)", wanted)
    if not match:
        return Response(data, 200, headers)
    start, stop = int(match.group(1)), int(match.group(2) or len(data) - 1) + 1
    if start >= len(data):
        raise HubError(416, "", "Requested range not satisfiable")
    headers["Content-Range"] = f"bytes {start}-{min(stop, len(data)) - 1}/{len(data)}"
    return Response(data[start:stop], 206, headers)


@route("GET", r"/api/whoami-v2")
def whoami(store: Store, user: User, request: Request) -> Response:
    if not user.name:
        raise HubError(401, "", "Invalid username or password.")
    access = {"displayName": "test", "role": user.role, "createdAt": "2024-01-01T00:00:00.000Z"}
    auth = {"type": "access_token", "accessToken": access}
    return Response(
        {"type": "user", "id": user.name, "name": user.name, "fullname": user.name, "orgs": [], "auth": auth}
    )


@route("GET", r"/api/telemetry/.*")
def telemetry(store: Store, user: User, request: Request, *_: str) -> Response:
    return Response()


@route("POST", r"/api/validate-yaml")
def validate_card(store: Store, user: User, request: Request) -> Response:
    errors, warnings = check_card(request.json()["content"])
    body = {"errors": [{"message": m} for m in errors], "warnings": [{"message": m} for m in warnings]}
    return Response(body, 400 if errors else 200)


@route("POST", r"/api/repos/create")
def create_repo(store: Store, user: User, request: Request) -> Response:
    kind, repo_id, asked = _named_repo(request, user)
    private = asked.get("visibility") == "private" or bool(asked.get("private"))
    try:
        repo = store.create_repo(kind, repo_id, private, user)
    except HubError as error:
        if "url" in error.body:
            error.body["url"] = f"{request.endpoint}/{error.body['url']}"
        raise
    return Response({"url": f"{request.endpoint}/{repo.path}", "name": repo_id, "id": repo_id})


@route("DELETE", r"/api/repos/delete")
def delete_repo(store: Store, user: User, request: Request) -> Response:
    kind, repo_id, _ = _named_repo(request, user)
    store.repo(kind, repo_id, user, write=True)
    del store.repos[kind, repo_id]
    return Response()


def _named_repo(request: Request, user: User) -> tuple[str, str, dict[str, Any]]:
    asked = request.json()
    return asked.get("type") or "model", f"{asked.get('organization') or user.name}/{asked['name']}", asked


@route("GET", r"/api/(models|datasets|spaces)")
def list_repos(store: Store, user: User, request: Request, kinds: str) -> Response:
    author = request.query.get("author", [None])[0]
    visible = [
        repo
        for (kind, _), repo in sorted(store.repos.items())
        if kind == kinds[:-1] and author in (None, repo.owner) and (not repo.private or repo.owner == user.name)
    ]
    return Response([_info(repo, repo.resolve("main"), blobs=False) for repo in visible])


@route("GET", _REPO + r"(?:/revision/([^/]+))?")
def repo_info(store: Store, user: User, request: Request, kinds: str, repo_id: str, revision: str) -> Response:
    repo = store.repo(kinds[:-1], repo_id, user)
    return Response(_info(repo, repo.resolve(revision or "main"), request.flag("blobs")))


def _info(repo: Repo, commit: Commit, blobs: bool) -> dict[str, Any]:
    siblings: list[dict[str, Any]] = [{"rfilename": path} for path in sorted(commit.files)]
    if blobs:
        for sibling in siblings:
            sibling |= {"blobId": (entry := _file(sibling["rfilename"], commit)).pop("oid"), "size": entry["size"]}
            sibling |= {"lfs": entry["lfs"] | {"sha256": entry["lfs"]["oid"]}} if "lfs" in entry else {}
    card = read_metadata(commit.files["README.md"].data.decode())[0] if "README.md" in commit.files else {}
    return {
        "_id": hashlib.sha1(repo.path.encode()).hexdigest()[:24],
        "id": repo.repo_id,
        "modelId": repo.repo_id,
        "author": repo.owner,
        "sha": commit.oid,
        "createdAt": repo.created,
        "lastModified": commit.date,
        "private": repo.private,
        "gated": False,
        "disabled": False,
        "downloads": 0,
        "likes": 0,
        "tags": card.get("tags") or [],
        "library_name": card.get("library_name"),
        "pipeline_tag": card.get("pipeline_tag"),
        "cardData": card,
        "siblings": siblings,
    }


@route("GET", _REPO + r"/auth-check(/write)?")
def auth_check(store: Store, user: User, request: Request, kinds: str, repo_id: str, write: str) -> Response:
    store.repo(kinds[:-1], repo_id, user, write=bool(write))
    return Response()


@route("PUT", _REPO + r"/settings")
def settings(store: Store, user: User, request: Request, kinds: str, repo_id: str) -> Response:
    repo, asked = store.repo(kinds[:-1], repo_id, user, write=True), request.json()
    repo.private = asked["visibility"] == "private" if "visibility" in asked else asked.get("private", repo.private)
    return Response({"private": repo.private})


@route("GET", _REPO + r"/refs")
def refs(store: Store, user: User, request: Request, kinds: str, repo_id: str) -> Response:
    repo = store.repo(kinds[:-1], repo_id, user)

    def listed(prefix: str, references: dict[str, Commit]) -> list[dict[str, str]]:
        return [{"name": n, "ref": f"{prefix}{n}", "targetCommit": c.oid} for n, c in sorted(references.items())]

    body = {"branches": listed("refs/heads/", repo.branches), "tags": listed("refs/tags/", repo.tags), "converts": []}
    return Response(body | {"pullRequests": listed("", repo.pull_requests)})


@route("GET", _REPO + r"/commits/([^/]+)")
def commits(store: Store, user: User, request: Request, kinds: str, repo_id: str, revision: str) -> Response:
    history = store.repo(kinds[:-1], repo_id, user).history(revision)
    return Response(
        [
            {"id": c.oid, "title": c.title, "message": c.message, "date": c.date, "authors": [{"user": c.author}]}
            for c in history
        ]
    )


@route("GET", _REPO + r"/discussions")
def discussions(store: Store, user: User, request: Request, kinds: str, repo_id: str) -> Response:
    store.repo(kinds[:-1], repo_id, user)
    return Response({"discussions": [], "count": 0, "start": 0})


@route("POST", _REPO + r"/branch/([^/]+)")
def create_branch(store: Store, user: User, request: Request, kinds: str, repo_id: str, branch: str) -> Response:
    repo = store.repo(kinds[:-1], repo_id, user, write=True)
    if branch in repo.branches:
        raise HubError(409, "", f"Reference already exists: {branch}")
    repo.branches[branch] = repo.resolve(request.json().get("startingPoint") or "main")
    return Response()


@route("DELETE", _REPO + r"/branch/([^/]+)")
def delete_branch(store: Store, user: User, request: Request, kinds: str, repo_id: str, branch: str) -> Response:
    repo = store.repo(kinds[:-1], repo_id, user, write=True)
    if branch == "main" or repo.branches.pop(branch, None) is None:
        raise HubError(403 if branch == "main" else 404, "" if branch == "main" else "RevisionNotFound", branch)
    return Response()


@route("POST", _REPO + r"/tag/([^/]+)")
def create_tag(store: Store, user: User, request: Request, kinds: str, repo_id: str, revision: str) -> Response:
    repo, tag = store.repo(kinds[:-1], repo_id, user, write=True), request.json()["tag"]
    if tag in repo.tags:
        raise HubError(409, "", f"Tag reference exists already: {tag}")
    repo.tags[tag] = repo.resolve(revision)
    return Response()


@route("DELETE", _REPO + r"/tag/([^/]+)")
def delete_tag(store: Store, user: User, request: Request, kinds: str, repo_id: str, tag: str) -> Response:
    if store.repo(kinds[:-1], repo_id, user, write=True).tags.pop(tag, None) is None:
        raise HubError(404, "RevisionNotFound", tag)
    return Response()


@route("POST", _REPO + r"/preupload/([^/]+)")
def preupload(store: Store, user: User, request: Request, kinds: str, repo_id: str, revision: str) -> Response:
    pull_request = request.flag("create_pr")
    files = store.repo(kinds[:-1], repo_id, user, write=not pull_request).resolve(revision).files
    answer = []
    for asked in request.json()["files"]:
        path = asked["path"]
        entry = {"path": path, "uploadMode": "lfs" if is_large(path, asked["size"]) else "regular"}
        answer.append(entry | {"shouldIgnore": False, "oid": files[path].etag if path in files else None})
    return Response({"files": answer})


@route("POST", _WEB_REPO + r"\.git/info/lfs/objects/batch")
def large_files(store: Store, user: User, request: Request, kinds: str, repo_id: str) -> Response:
    store.repo(kinds.rstrip("/").removesuffix("s") or "model", repo_id, user, write=True)
    answer = []
    for asked in request.json()["objects"]:
        upload = {"upload": {"href": f"{request.cdn}/lfs-upload/{asked['oid']}"}}
        answer.append(asked | ({} if asked["oid"] in store.large_files else {"actions": upload}))
    return Response({"transfer": "basic", "objects": answer})


@route("POST", _REPO + r"/commit/([^/]+)")
def commit(store: Store, user: User, request: Request, kinds: str, repo_id: str, branch: str) -> Response:
    pull_request = request.flag("create_pr")
    repo = store.repo(kinds[:-1], repo_id, user, write=not pull_request)
    if not user.name:
        raise HubError(401, "", "Invalid username or password.")
    if branch not in repo.branches:
        raise HubError(404, "RevisionNotFound", f"Invalid rev id: {branch}")
    header, *operations = [json.loads(line) for line in request.body.splitlines() if line]
    wanted, head = header["value"].get("parentCommit"), repo.branches[branch]
    if wanted and not head.oid.startswith(wanted):
        raise HubError(412, "", "A commit has happened since. Please refresh and try again.")
    for operation in operations:
        if operation["key"] == "file":
            operation["value"]["data"] = base64.b64decode(operation["value"]["content"])
    files = store.apply(repo, head.files, operations)
    title, message = header["value"]["summary"], header["value"].get("description", "")
    made, ref = repo.add_commit(branch, files, title, message, user.name, pull_request)
    url = f"{request.endpoint}/{repo.path}"
    answer = {"success": True, "commitOid": made.oid, "commitUrl": f"{url}/commit/{made.oid}", "hookOutput": ""}
    return Response(answer | ({"pullRequestUrl": f"{url}/discussions/{ref.rsplit('/', 1)[-1]}"} if ref else {}))


@route("GET", _REPO + r"/tree/([^/]+)(?:/(.+))?")
def tree(store: Store, user: User, request: Request, kinds: str, repo_id: str, revision: str, path: str) -> Response:
    commit = store.repo(kinds[:-1], repo_id, user).resolve(revision)
    inside = f"{path.rstrip('/')}/" if path else ""
    if inside and not any(name.startswith(inside) for name in commit.files):
        raise HubError(404, "EntryNotFound", f"{path} does not exist on {revision}")
    names = [name for name in (*folders(commit.files), *sorted(commit.files)) if name.startswith(inside)]
    if not request.flag("recursive"):
        names = [name for name in names if "/" not in name.removeprefix(inside)]
    start = int(request.query.get("cursor", ["0"])[0])
    entries = [_entry(name, commit, request.flag("expand")) for name in names[start : start + PAGE_SIZE]]
    if start + PAGE_SIZE >= len(names):
        return Response(entries)
    following = f"recursive={request.flag('recursive')}&expand={request.flag('expand')}&cursor={start + PAGE_SIZE}"
    return Response(entries, 200, {"Link": f'<{request.endpoint}{request.path}?{following}>; rel="next"'})


@route("POST", _REPO + r"/paths-info/([^/]+)")
def paths_info(store: Store, user: User, request: Request, kinds: str, repo_id: str, revision: str) -> Response:
    commit = store.repo(kinds[:-1], repo_id, user).resolve(revision)
    form = parse_qs(request.body.decode())
    known = {*folders(commit.files), *commit.files}
    expand = form.get("expand", ["false"])[0].lower() == "true"
    return Response([_entry(path, commit, expand) for path in form.get("paths", []) if path in known])


def _entry(path: str, commit: Commit, expand: bool) -> dict[str, Any]:
    entry = _file(path, commit) if path in commit.files else _folder(path, commit)
    if expand:
        entry["lastCommit"] = {"id": commit.oid, "title": commit.title, "date": commit.date}
    return entry


def _file(path: str, commit: Commit) -> dict[str, Any]:
    blob: Blob = commit.files[path]
    entry = {"type": "file", "path": path, "oid": blob.oid, "size": len(blob.data)}
    if blob.lfs:
        entry["lfs"] = {"oid": blob.sha256, "size": len(blob.data), "pointerSize": len(blob.pointer)}
    return entry


def _folder(path: str, commit: Commit) -> dict[str, Any]:
    content = "".join(f"{name}{blob.oid}" for name, blob in commit.files.items() if name.startswith(f"{path}/"))
    return {"type": "directory", "path": path, "oid": hashlib.sha1(content.encode()).hexdigest(), "size": 0}


@route("GET", _WEB_REPO + r"/resolve/([^/]+)/(.+)")
def download(
    store: Store, user: User, request: Request, kinds: str, repo_id: str, revision: str, path: str
) -> Response:
    repo = store.repo(kinds.rstrip("/").removesuffix("s") or "model", repo_id, user)
    commit, blob = repo.file(revision, path)
    headers = {"X-Repo-Commit": commit.oid, "ETag": f'"{blob.etag}"'}
    if not blob.lfs:
        return _content(request, blob.data, headers)
    headers |= {"X-Linked-ETag": f'"{blob.etag}"', "X-Linked-Size": str(len(blob.data))}
    location = f"{request.cdn}/lfs-download/{quote(path)}/{blob.sha256}"
    return Response(b"", 302, headers | {"Location": location})
