"""Repositories, commits and users of the test Hub, in memory: what the server serves, without any HTTP."""

import fnmatch
import hashlib
import re
import threading
import uuid
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from datetime import datetime, timezone
from typing import Any


# The patterns that a new repository's .gitattributes sends to large file storage.
LFS_PATTERNS: tuple[str, ...] = (
    *("*.arrow", "*.bin", "*.h5", "*.npy", "*.npz", "*.onnx", "*.parquet", "*.pt", "*.pth", "*.safetensors"),
    *("*.tar", "*.tar.*", "*.zip", "*tfevents*"),
)
LFS_SIZE = 10 * 1024 * 1024


class HubError(Exception):
    """An answer other than success: status, the Hub's X-Error-Code, and X-Error-Message."""

    def __init__(self, status: int, code: str, message: str, **body: Any) -> None:
        super().__init__(message)
        self.status, self.code, self.message, self.body = status, code, message, body
        self.headers: dict[str, str] = {}


@dataclass(frozen=True)
class Blob:
    """A file's content, kept in git or in large file storage."""

    data: bytes
    lfs: bool

    @property
    def sha256(self) -> str:
        return hashlib.sha256(self.data).hexdigest()

    @property
    def pointer(self) -> bytes:
        """What git itself holds: the content, or the pointer to large file storage."""
        if not self.lfs:
            return self.data
        return (
            f"version https://git-lfs.github.com/spec/v1\noid sha256:{self.sha256}\nsize {len(self.data)}\n"
        ).encode()

    @property
    def oid(self) -> str:
        """git's name of the blob."""
        return hashlib.sha1(b"blob %d\0" % len(self.pointer) + self.pointer).hexdigest()

    @property
    def etag(self) -> str:
        return self.sha256 if self.lfs else self.oid


@dataclass(frozen=True)
class Commit:
    """The whole tree at one point in time."""

    oid: str
    files: Mapping[str, Blob]
    parent: "Commit | None"
    title: str
    message: str
    author: str
    date: str


@dataclass
class Repo:
    """One repository. `kind` is "model", "dataset" or "space"; `repo_id` is "user/name"."""

    kind: str
    repo_id: str
    private: bool
    branches: dict[str, Commit] = field(default_factory=dict)
    tags: dict[str, Commit] = field(default_factory=dict)
    pull_requests: dict[str, Commit] = field(default_factory=dict)
    commits: dict[str, Commit] = field(default_factory=dict)
    created: str = field(default_factory=lambda: now())

    @property
    def owner(self) -> str:
        return self.repo_id.split("/")[0]

    @property
    def path(self) -> str:
        """Where the repository lies under the endpoint."""
        return self.repo_id if self.kind == "model" else f"{self.kind}s/{self.repo_id}"

    def resolve(self, revision: str) -> Commit:
        """The commit of a branch, a tag, a pull request, or an id (seven or more digits are enough)."""
        for refs in (self.branches, self.tags, self.pull_requests, self.commits):
            if revision in refs:
                return refs[revision]
        if re.fullmatch(r"[0-9a-f]{7,40}", revision):
            found = [commit for oid, commit in self.commits.items() if oid.startswith(revision)]
            if len(found) == 1:
                return found[0]
        raise HubError(404, "RevisionNotFound", f"Invalid rev id: {revision}")

    def file(self, revision: str, path: str) -> tuple[Commit, Blob]:
        commit = self.resolve(revision)
        if path not in commit.files:
            error = HubError(404, "EntryNotFound", "Entry not found")
            error.headers["X-Repo-Commit"] = commit.oid
            raise error
        return commit, commit.files[path]

    def add_commit(
        self, branch: str, files: Mapping[str, Blob], title: str, message: str, author: str, create_pr: bool = False
    ) -> tuple[Commit, str | None]:
        """Append a commit to a branch, or put it on a new pull request (whose ref is the second value)."""
        parent = self.branches.get(branch)
        oid = hashlib.sha1(uuid.uuid4().bytes).hexdigest()
        commit = Commit(oid, dict(files), parent, title, message, author, now())
        self.commits[oid] = commit
        if not create_pr:
            self.branches[branch] = commit
            return commit, None
        ref = f"refs/pr/{len(self.pull_requests) + 1}"
        self.pull_requests[ref] = commit
        return commit, ref

    def history(self, revision: str) -> list[Commit]:
        commit: Commit | None = self.resolve(revision)
        chain = []
        while commit is not None:
            chain.append(commit)
            commit = commit.parent
        return chain


@dataclass(frozen=True)
class User:
    """A user, or nobody (`name` is ""). `role` is "read" or "write"."""

    name: str
    role: str


NOBODY = User("", "read")


class Store:
    """All users, repositories and large files. `lock` guards every change and every look across several of them."""

    def __init__(self) -> None:
        self.lock = threading.RLock()
        self.users: dict[str, User] = {}
        self.repos: dict[tuple[str, str], Repo] = {}
        self.large_files: dict[str, bytes] = {}

    def add_user(self, name: str, role: str = "write") -> str:
        """Add a token of a user and return it."""
        token = f"hf_{uuid.uuid4().hex}"
        self.users[token] = User(name, role)
        return token

    def authenticate(self, header: str | None) -> User:
        if header is None:
            return NOBODY
        user = self.users.get(header.removeprefix("Bearer ").strip())
        if user is None:
            raise HubError(401, "", "Invalid credentials in Authorization header")
        return user

    def repo(self, kind: str, repo_id: str, user: User, write: bool = False) -> Repo:
        """A repository that `user` may see (and change, with `write`).

        As on the Hub, one that may not be seen is answered like one that does not exist: 401 to nobody, 404 to users.
        """
        repo = self.repos.get((kind, repo_id))
        if repo is None or (repo.private and user.name != repo.owner):
            raise HubError(404 if user.name else 401, "RepoNotFound", "Repository not found")
        if write and not user.name:
            raise HubError(401, "", "Invalid username or password.")
        if write and (user.name != repo.owner or user.role != "write"):
            raise HubError(403, "", f"Forbidden: you do not have the required permissions to write to {repo_id}")
        return repo

    def create_repo(self, kind: str, repo_id: str, private: bool, user: User) -> Repo:
        if not user.name:
            raise HubError(401, "", "Invalid username or password.")
        if user.role != "write" or repo_id.split("/")[0] != user.name:
            raise HubError(403, "", f"Forbidden: you do not have the rights to create {repo_id}")
        if (kind, repo_id) in self.repos:
            raise HubError(409, "", f"You already created this {kind} repo", url=self.repos[kind, repo_id].path)
        repo = Repo(kind, repo_id, private)
        attributes = "".join(f"{pattern} filter=lfs diff=lfs merge=lfs -text\n" for pattern in LFS_PATTERNS)
        files = {".gitattributes": Blob(attributes.encode(), lfs=False)}
        repo.add_commit("main", files, "initial commit", "", user.name)
        self.repos[kind, repo_id] = repo
        return repo

    def apply(self, repo: Repo, files: Mapping[str, Blob], operations: Iterable[Mapping[str, Any]]) -> dict[str, Blob]:
        """The tree after a commit's operations, as the Hub's commit API names them. Nothing is changed."""
        tree = dict(files)
        for operation in operations:
            key, value = operation["key"], operation["value"]
            path = value["path"]
            if key == "file":
                tree[path] = Blob(value["data"], lfs=False)
            elif key == "lfsFile":
                if value["oid"] not in self.large_files:
                    raise HubError(400, "", f"LFS pointer pointed to a file that does not exist: {path}")
                tree[path] = Blob(self.large_files[value["oid"]], lfs=True)
            elif key == "deletedFile" and path in tree:
                del tree[path]
            elif key == "deletedFolder" and (
                inside := [name for name in tree if name.startswith(f"{path.strip('/')}/")]
            ):
                for name in inside:
                    del tree[name]
            elif key in ("deletedFile", "deletedFolder"):
                raise HubError(404, "EntryNotFound", f"A file with this name doesn't exist: {path}")
            else:
                raise HubError(400, "", f"Unknown operation {key}")
        return tree


def now() -> str:
    return datetime.now(timezone.utc).strftime("%Y-%m-%dT%H:%M:%S.%f")[:-3] + "Z"


def is_large(path: str, size: int) -> bool:
    """Whether the Hub keeps a file in large file storage."""
    return size >= LFS_SIZE or any(fnmatch.fnmatch(path.rsplit("/", 1)[-1], pattern) for pattern in LFS_PATTERNS)


def folders(files: Iterable[str]) -> list[str]:
    """Every folder that the paths lie in."""
    found: set[str] = set()
    for path in files:
        parts = path.split("/")[:-1]
        found.update("/".join(parts[: depth + 1]) for depth in range(len(parts)))
    return sorted(found)
