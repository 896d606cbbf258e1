"""Reading data sets into a cache of the test's own."""

from pathlib import Path

import pytest

from vpt_peft.data.arguments import DataArguments
from vpt_peft.tasks import get_task


@pytest.fixture
def load(tmp_path: Path):
    """Read a data set for image classification; keywords are fields of `DataArguments`."""

    def call(name, **options):
        return get_task().read(DataArguments(str(name), **options), cache_dir=str(tmp_path / "cache"))

    return call
