"""The real clients against the test Hub: what they upload is what they get back, and refusals are the Hub's own."""

import huggingface_hub
import huggingface_hub.utils._http as client
import pytest
from huggingface_hub import (
    CommitOperationAdd,
    CommitOperationCopy,
    CommitOperationDelete,
    HfApi,
    ModelCard,
    create_repo,
    hf_hub_download,
    snapshot_download,
    upload_folder,
    whoami,
)
from huggingface_hub.errors import (
    EntryNotFoundError,
    HfHubHTTPError,
    LocalEntryNotFoundError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)


pytest_plugins = ["hub_fixtures"]
# The client's own use of its HTTP library.
pytestmark = pytest.mark.filterwarnings("ignore:Use 'content:DeprecationWarning")

# The HTTP library of huggingface_hub 2, or else of huggingface_hub 1.
transport = getattr(client, "httpx2", None) or client.httpx

SMALL, LARGE = b'{"a": 1}', bytes(range(256)) * 200


@pytest.fixture
def api(hub):
    return HfApi()


@pytest.fixture
def folder(tmp_path):
    """A small file, a large one (LFS by its name), one in a subfolder and an empty one."""
    path = tmp_path / "local"
    (path / "sub").mkdir(parents=True)
    (path / "config.json").write_bytes(SMALL)
    (path / "model.safetensors").write_bytes(LARGE)
    (path / "sub" / "model.safetensors").write_bytes(LARGE[::-1])
    (path / "empty.txt").touch()
    return path


CONTENT = {
    "config.json": SMALL,
    "model.safetensors": LARGE,
    "sub/model.safetensors": LARGE[::-1],
    "empty.txt": b"",
}


def read(folder):
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def test_the_real_hub_is_never_asked(hub, api):
    assert hub.url.startswith("http://127.0.0.1:")
    assert api.endpoint == hub.url == HfApi(token=False).endpoint
    assert whoami()["name"] == hub.user
    assert [r.path for r in hub.requests] == ["/api/whoami-v2"]


@pytest.mark.parametrize("repo_type", ["model", "dataset"])
def test_upload_and_download(hub, folder, repo_type, tmp_path):
    url = create_repo("user/repo", repo_type=repo_type)
    assert (url.repo_id, url.repo_type, url.endpoint) == ("user/repo", repo_type, hub.url)
    upload_folder(repo_id="user/repo", folder_path=folder, repo_type=repo_type)
    assert hub.files("user/repo", repo_type=repo_type) == CONTENT
    uploads = [r for r in hub.requests if r.method == "PUT"]
    assert [(r.server, r.authorized) for r in uploads] == [("cdn", False)] * 2

    for name, content in CONTENT.items():
        with open(hf_hub_download("user/repo", name, repo_type=repo_type), "rb") as file:
            assert file.read() == content
    downloads = [r for r in hub.requests if r.server == "cdn" and r.method == "GET"]
    assert [r.authorized for r in downloads] == [False] * 2
    cached = snapshot_download("user/repo", repo_type=repo_type)
    assert cached.startswith(str(hub.home))
    copied = snapshot_download("user/repo", repo_type=repo_type, local_dir=tmp_path / "copy", ignore_patterns=".gita*")
    assert {n: c for n, c in read(tmp_path / "copy").items() if ".cache" not in n} == CONTENT, copied


def test_one_repository_per_kind(hub, api):
    create_repo("user/repo")
    assert api.repo_exists("user/repo") and not api.repo_exists("user/repo", repo_type="dataset")
    with pytest.raises(HfHubHTTPError, match="409"):
        create_repo("user/repo")
    assert create_repo("repo", exist_ok=True).repo_id == "user/repo"
    api.delete_repo("user/repo")
    assert not api.repo_exists("user/repo")
    with pytest.raises(RepositoryNotFoundError):
        api.delete_repo("user/repo")


def test_listings(hub, api, folder):
    create_repo("user/repo")
    upload_folder(repo_id="user/repo", folder_path=folder, commit_message="first")
    assert set(api.list_repo_files("user/repo")) == {".gitattributes", *CONTENT}
    entries = {e.path: e for e in api.list_repo_tree("user/repo")}
    assert set(entries) == {".gitattributes", "config.json", "model.safetensors", "empty.txt", "sub"}
    assert (entries["config.json"].size, entries["config.json"].lfs) == (len(SMALL), None)
    assert entries["model.safetensors"].lfs.size == len(LARGE)
    assert [e.path for e in api.list_repo_tree("user/repo", "sub")] == ["sub/model.safetensors"]
    with pytest.raises(EntryNotFoundError):
        list(api.list_repo_tree("user/repo", "no"))
    infos = api.get_paths_info("user/repo", ["sub", "config.json", "no"], expand=True)
    assert [(i.path, i.last_commit.title) for i in infos] == [("sub", "first"), ("config.json", "first")]
    info = api.model_info("user/repo", files_metadata=True)
    assert {s.rfilename: s.size for s in info.siblings if s.rfilename in CONTENT} == {
        n: len(c) for n, c in CONTENT.items()
    }
    assert (info.id, info.author, info.private) == ("user/repo", "user", False)
    assert [m.id for m in api.list_models(author="user")] == ["user/repo"]


def test_long_listings_have_pages(hub, api, monkeypatch):
    monkeypatch.setattr("hub_api.PAGE_SIZE", 3)
    create_repo("user/repo")
    names = [f"{i:02}.txt" for i in range(10)]
    api.create_commit("user/repo", [CommitOperationAdd(n, n.encode()) for n in names], commit_message="many")
    assert sorted(api.list_repo_files("user/repo")) == [".gitattributes", *names]
    assert len([r for r in hub.requests if "/tree/" in r.path]) == 4


def test_commits(hub, api):
    create_repo("user/repo")
    add = [CommitOperationAdd("a.txt", b"a"), CommitOperationAdd("d/b.bin", b"b"), CommitOperationAdd("d/c.txt", b"c")]
    first = api.create_commit("user/repo", add, commit_message="first", commit_description="three files")
    change = [
        CommitOperationAdd("a.txt", b"A"),
        CommitOperationCopy("d/b.bin", "b.bin"),
        CommitOperationDelete("d/c.txt"),
    ]
    second = api.create_commit("user/repo", change, commit_message="second", parent_commit=first.oid)
    assert hub.files("user/repo") == {"a.txt": b"A", "b.bin": b"b", "d/b.bin": b"b"}
    assert hub.files("user/repo", revision=first.oid[:8]) == {"a.txt": b"a", "d/b.bin": b"b", "d/c.txt": b"c"}
    assert second.repo_url.repo_id == "user/repo"
    history = api.list_repo_commits("user/repo")
    assert [c.title for c in history] == ["second", "first", "initial commit"]
    assert (history[1].commit_id, history[1].message, history[1].authors) == (first.oid, "three files", ["user"])

    with pytest.raises(HfHubHTTPError, match="412"):
        api.create_commit("user/repo", [CommitOperationAdd("x", b"x")], commit_message="late", parent_commit=first.oid)
    with pytest.raises(EntryNotFoundError):
        api.create_commit("user/repo", [CommitOperationDelete("no.txt")], commit_message="no")
    api.delete_folder("d", "user/repo")
    assert hub.files("user/repo") == {"a.txt": b"A", "b.bin": b"b"}

    before = api.model_info("user/repo").sha
    assert api.create_commit("user/repo", [CommitOperationAdd("a.txt", b"A")], commit_message="same").oid == before


def test_revisions(hub, api):
    create_repo("user/repo")
    first = api.upload_file(path_or_fileobj=b"1", path_in_repo="f.txt", repo_id="user/repo")
    api.create_tag("user/repo", tag="v1")
    api.create_branch("user/repo", branch="dev/next", revision="v1")
    api.upload_file(path_or_fileobj=b"2", path_in_repo="f.txt", repo_id="user/repo", revision="dev/next")
    api.upload_file(path_or_fileobj=b"3", path_in_repo="f.txt", repo_id="user/repo")

    def content(revision):
        with open(hf_hub_download("user/repo", "f.txt", revision=revision)) as file:
            return file.read()

    assert [content(r) for r in (None, "main", "v1", first.oid, "dev/next")] == ["3", "3", "1", "1", "2"]
    refs = api.list_repo_refs("user/repo")
    assert ([b.name for b in refs.branches], [t.name for t in refs.tags]) == (["dev/next", "main"], ["v1"])
    assert refs.tags[0].target_commit == first.oid
    with pytest.raises(HfHubHTTPError, match="409"):
        api.create_branch("user/repo", branch="dev/next")
    api.create_branch("user/repo", branch="dev/next", exist_ok=True)
    api.delete_tag("user/repo", tag="v1")
    api.delete_branch("user/repo", branch="dev/next")
    for revision in ("v1", "dev/next", "0" * 40):
        with pytest.raises(RevisionNotFoundError):
            content(revision)
    with pytest.raises(EntryNotFoundError):
        hf_hub_download("user/repo", "no.txt")

    pull = api.upload_file(path_or_fileobj=b"4", path_in_repo="f.txt", repo_id="user/repo", create_pr=True)
    assert (pull.pr_num, content("refs/pr/1"), content("main")) == (1, "4", "3")


@pytest.mark.parametrize("name", ["config.json", "model.safetensors"])
def test_private_repositories(hub, api, folder, name):
    create_repo("user/secret", private=True)
    upload_folder(repo_id="user/secret", folder_path=folder)
    other = hub.add_user("other")
    for token in (False, other):
        assert not api.repo_exists("user/secret", token=token)
        with pytest.raises(RepositoryNotFoundError):
            api.model_info("user/secret", token=token)
        with pytest.raises(RepositoryNotFoundError):
            hf_hub_download("user/secret", name, token=token)
    with pytest.raises(HfHubHTTPError, match="Invalid credentials in Authorization header"):
        api.model_info("user/secret", token="hf_wrong")
    with pytest.raises(HfHubHTTPError, match="Invalid user token|Invalid credentials"):
        whoami(token="hf_wrong")
    with open(hf_hub_download("user/secret", name), "rb") as file:
        assert file.read() == CONTENT[name]

    api.update_repo_settings("user/secret", private=False)
    hf_hub_download("user/secret", name, token=False, force_download=True)


@pytest.mark.parametrize("who", ["nobody", "other", "read"])
def test_writing_needs_the_right(hub, api, who):
    token = {"nobody": False, "other": hub.add_user("other"), "read": hub.add_user(hub.user, role="read")}[who]
    with pytest.raises(HfHubHTTPError, match="401" if who == "nobody" else "403"):
        create_repo("user/repo", token=token)
    create_repo("user/repo")
    with pytest.raises(HfHubHTTPError, match="401|403"):
        api.upload_file(path_or_fileobj=b"1", path_in_repo="f.txt", repo_id="user/repo", token=token)
    with pytest.raises(HfHubHTTPError, match="401|403"):
        api.delete_repo("user/repo", token=token)
    assert hub.files("user/repo") == {}


@pytest.mark.parametrize(
    ("where", "status", "times", "name"),
    [
        ("/preupload/", 403, 1, "config.json"),
        ("/info/lfs/objects/batch", 507, 1, "model.safetensors"),
        ("/lfs-upload/", 500, 6, "model.safetensors"),
        ("/lfs-upload/", 0, 6, "model.safetensors"),
        ("/commit/", 500, 1, "config.json"),
        ("/commit/", 0, 1, "config.json"),
    ],
)
def test_a_failed_upload_changes_nothing_and_can_be_done_again(hub, folder, where, status, times, name):
    create_repo("user/repo")
    upload_folder(repo_id="user/repo", folder_path=folder)
    (folder / name).write_bytes(b"changed")
    hub.fail_next(where, status, times)
    with pytest.raises((HfHubHTTPError, RuntimeError, transport.HTTPError)):
        upload_folder(repo_id="user/repo", folder_path=folder)
    assert hub.files("user/repo") == CONTENT
    assert sum(r.status == status for r in hub.requests) == times
    upload_folder(repo_id="user/repo", folder_path=folder)
    assert hub.files("user/repo") == CONTENT | {name: b"changed"} == read(folder)


def test_passing_failures_are_overcome(hub, folder):
    create_repo("user/repo")
    for where in ("/preupload/", "/lfs-upload/"):
        hub.fail_next(where, status=503, times=2)
    upload_folder(repo_id="user/repo", folder_path=folder)
    assert hub.files("user/repo") == CONTENT
    hub.fail_next("/lfs-download/", status=0, method="GET")
    with open(hf_hub_download("user/repo", "model.safetensors"), "rb") as file:
        assert file.read() == LARGE


def test_a_broken_download_goes_on_where_it_stopped(hub, folder, tmp_path):
    create_repo("user/repo")
    upload_folder(repo_id="user/repo", folder_path=folder)
    address = f"{hub.url}/user/repo/resolve/main/model.safetensors"
    answer = client.get_session().get(address, headers={"Range": "bytes=100-"})
    assert (answer.status_code, answer.content) == (206, LARGE[100:])


@pytest.mark.parametrize(
    ("metadata", "message"),
    [
        ("tags: [a]\nlibrary_name: peft\nbase_model: user/repo", None),
        ("tags: a", '"tags" has the wrong type'),
        ("base_model: /tmp/vit", '"base_model" with value "/tmp/vit" is not valid'),
        ("model-index:\n- name: a\n  results:\n  - task: {type: x}", "results need task, dataset and metrics"),
        ("tags: [a", "YAML Metadata Error"),
    ],
)
def test_cards_are_validated(hub, api, metadata, message):
    create_repo("user/repo")
    card = f"---\n{metadata}\n---\n# Card\n"

    def push():
        api.upload_file(path_or_fileobj=card.encode(), path_in_repo="README.md", repo_id="user/repo")

    if message is None:
        push()
        assert ModelCard.load("user/repo").data.library_name == "peft"
        assert api.model_info("user/repo").card_data.base_model == "user/repo"
        if int(huggingface_hub.__version__.split(".")[0]) >= 2:
            # Version 1 asks the real Hub, whatever the endpoint.
            ModelCard(card).validate()
    else:
        with pytest.raises(ValueError, match="Invalid metadata") as caught:
            push()
        assert message in str(caught.value)
        assert hub.files("user/repo") == {}


def test_a_server_that_is_gone(hub, folder, monkeypatch):
    create_repo("user/repo")
    upload_folder(repo_id="user/repo", folder_path=folder)
    cached = snapshot_download("user/repo")
    hub.stop()
    assert snapshot_download("user/repo") == cached
    with pytest.raises((LocalEntryNotFoundError, OSError)):
        hf_hub_download("user/other", "config.json")
