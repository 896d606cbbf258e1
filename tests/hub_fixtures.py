"""The `hub` fixture: a running test Hub, to which the clients of this process and of sub-processes are pointed."""

import importlib
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
from hub_server import Hub


CLIENTS = ("accelerate", "datasets", "evaluate", "huggingface_hub", "peft", "transformers")


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    """A Hub on loopback with one user, who is logged in here; the clients' cache is in `tmp_path / "hf_home"`.

    In this process the real clients talk to it at once. For a sub-process: `subprocess.run(..., env=hub.env)`.
    """
    running = Hub(home=tmp_path / "hf_home")
    running.start()
    with _clients_at(running, monkeypatch):
        yield running
    running.stop()


@contextmanager
def _clients_at(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Point every Hugging Face library of this process at `hub`.

    The libraries read the environment once, when they are imported, and copy what they read from module to module, so
    every copy is replaced, and so are the clients that were made with it. Modules imported in between copy the
    replaced values and are put right at the end.
    """
    import huggingface_hub.hf_api
    import huggingface_hub.hf_file_system
    import huggingface_hub.utils._http as http
    import transformers.utils.hub

    for optional in ("datasets.config", "evaluate.config"):
        # Imported inside a test, these would read the test's environment for good.
        with suppress(ImportError):
            importlib.import_module(optional)

    values = _constants(hub)
    originals: dict[str, Any] = {}
    seen = dict(_client_modules())
    for module in seen.values():
        for name in values.keys() & vars(module).keys():
            originals.setdefault(name, vars(module)[name])
            monkeypatch.setattr(module, name, _like(vars(module)[name], values[name]))

    for name, value in hub.env.items():
        if name.startswith("HF_") or name.lower() == "no_proxy":
            monkeypatch.setenv(name, value)
    for name in ("HF_HUB_OFFLINE", "HF_DATASETS_OFFLINE", "TRANSFORMERS_OFFLINE"):
        monkeypatch.delenv(name, raising=False)

    port = int(hub.url.rsplit(":", 1)[1])
    monkeypatch.setattr(http, "_HUB_ORIGINS", frozenset({("http", "127.0.0.1", port)}), raising=False)
    for client in (
        huggingface_hub.hf_api.api,
        huggingface_hub.hf_file_system.hffs,
        huggingface_hub.hf_file_system.hffs._api,
    ):
        monkeypatch.setattr(client, "endpoint", hub.url)
    monkeypatch.setattr(transformers.utils.hub, "_hf_api", None, raising=False)
    # Between its attempts the client waits for seconds; nothing here gets better by waiting.
    impatient = SimpleNamespace(**vars(time))
    impatient.sleep = lambda seconds: None
    monkeypatch.setattr(http, "time", impatient)

    _forget_connections()
    yield
    _forget_connections()
    for module_name, module in _client_modules():
        if module_name not in seen:
            for name in originals.keys() & vars(module).keys():
                setattr(module, name, _like(vars(module)[name], originals[name]))


def _client_modules() -> list[tuple[str, ModuleType]]:
    return [(name, module) for name, module in list(sys.modules.items()) if name.split(".")[0] in CLIENTS]


def _like(old: Any, value: Any) -> Any:
    """`value` as the type in which the library keeps it: a path, a string or a truth value."""
    return type(old)(value) if isinstance(old, str | Path) else value


def _constants(hub: Hub) -> dict[str, Any]:
    cache, datasets = hub.home / "hub", hub.home / "datasets"
    return {
        "ENDPOINT": hub.url,
        "HF_ENDPOINT": hub.url,
        "HUGGINGFACE_CO_URL_TEMPLATE": hub.url + "/{repo_id}/resolve/{revision}/{filename}",
        "HUB_DATASETS_URL": hub.url + "/datasets/{repo_id}/resolve/{revision}/{path}",
        "HF_HOME": hub.home,
        "HF_CACHE_HOME": hub.home,
        "HF_HUB_CACHE": cache,
        "HUGGINGFACE_HUB_CACHE": cache,
        "default_cache_path": cache,
        "HF_ASSETS_CACHE": hub.home / "assets",
        "HUGGINGFACE_ASSETS_CACHE": hub.home / "assets",
        "HF_XET_CACHE": hub.home / "xet",
        "HF_TOKEN_PATH": hub.home / "token",
        "HF_STORED_TOKENS_PATH": hub.home / "stored_tokens",
        "AGENT_HARNESSES_PATH": hub.home / ".agent_harnesses.json",
        "HF_DATASETS_CACHE": datasets,
        "DOWNLOADED_DATASETS_PATH": datasets / "downloads",
        "EXTRACTED_DATASETS_PATH": datasets / "downloads" / "extracted",
        "HF_HUB_OFFLINE": False,
        "HF_DATASETS_OFFLINE": False,
        "HF_HUB_DISABLE_IMPLICIT_TOKEN": False,
        "HF_HUB_DISABLE_TELEMETRY": True,
        "HF_HUB_DISABLE_XET": True,
    }


def _forget_connections() -> None:
    """Drop what the clients hold open or remember of a server that is about to come or to go."""
    from huggingface_hub import HfFileSystem, close_session

    close_session()
    HfFileSystem.clear_instance_cache()
