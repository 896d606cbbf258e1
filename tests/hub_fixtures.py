"""The `hub` fixture: an empty test Hub, to which the real client of this process and of sub-processes is pointed."""

import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
from hub_server import Hub


# Before anything imports huggingface_hub, which reads its environment once; so no test ever asks the real Hub
HUB = Hub()
HOME = Path(tempfile.mkdtemp(prefix="hf_home_"))
os.environ.update(HUB.environment(str(HOME)))


def pytest_unconfigure() -> None:
    """Remove the client's cache."""
    shutil.rmtree(HOME, ignore_errors=True)


@pytest.fixture
def hub() -> Iterator[Hub]:
    """A Hub without repositories, and a client without a cache of them, logged in as its user."""
    yield HUB
    HUB.repos.clear()
    shutil.rmtree(HOME / "hub", ignore_errors=True)
