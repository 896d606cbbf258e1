"""The notebooks run from top to bottom as they stand, and hold their pictures."""

from __future__ import annotations

from pathlib import Path

import pytest


nbformat = pytest.importorskip("nbformat")
nbclient = pytest.importorskip("nbclient")
pytest.importorskip("ipykernel")

ROOT = Path(__file__).parents[1]
NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))


def outputs_of(notebook) -> list:
    return [output for cell in notebook.cells if cell.cell_type == "code" for output in cell.outputs]


def text_of(notebook) -> str:
    return "".join(output.get("text", "") for output in outputs_of(notebook))


PICTURES = {
    "1_quickstart": 3,
    "2_own_images_own_trainer": 2,
    "3_gated_prompts": 4,
    "4_segmentation_and_detection": 4,
    "5_many_tasks": 1,
    "6_how_it_works": 1,
}
# The first runs with all tests, the others with those of the docs: they train longer
EACH = [
    pytest.param(path, id=path.stem, marks=() if path.stem.startswith("1") else pytest.mark.docs) for path in NOTEBOOKS
]


def check(path: Path, notebook) -> None:
    outputs, text = outputs_of(notebook), text_of(notebook)
    assert not [output for output in outputs if output.output_type == "error"]
    assert sum("image/png" in output.get("data", {}) for output in outputs) == PICTURES[path.stem]
    number = path.stem[0]
    if number == "1":
        assert 93 < float(text.split("test accuracy ")[1].split("%")[0]) <= 100
        assert "same outputs: True" in text
    if number == "2":
        with_recipe, without = (
            float(text.split(f"with the {way}: ")[1].split("%")[0]) for way in ("recipe", "defaults")
        )
        assert with_recipe > without + 20
    if number == "3":
        assert float(text.split("gated ")[1].split("%")[0]) > 40
    if number == "4":
        with_prompts, alone = (
            float(text.split(f"{way}: mean IoU ")[1].split()[0]) for way in ("with prompts", "head alone")
        )
        assert with_prompts > alone + 0.05
        assert float(text.split("mAP at IoU 0.50: ")[1].split(";")[0]) > 0.8
    if number == "5":
        assert "20 tasks in" in text and float(text.split("largest difference ")[1].split()[0]) < 1e-4
    if number == "6":
        assert float(text.split("largest difference: ")[1].split()[0]) < 1e-12
        assert "bit for bit the base: True" in text


def test_all_are_known():
    assert {path.stem for path in NOTEBOOKS} == set(PICTURES)


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_saved_outputs(path):
    check(path, nbformat.read(path, as_version=4))
    # Nothing of the machine it was made on
    assert str(Path.home()) not in path.read_text() and "site-packages" not in path.read_text()


@pytest.mark.parametrize("path", EACH)
def test_runs(path, tmp_path, monkeypatch):
    # Threads that wait without spinning: other tests run beside this one
    monkeypatch.setenv("OMP_WAIT_POLICY", "PASSIVE")
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("IPYTHONDIR", str(tmp_path / "ipython"))
    monkeypatch.setenv("MPLBACKEND", "module://matplotlib_inline.backend_inline")
    notebook = nbformat.read(path, as_version=4)
    for cell in notebook.cells:
        if cell.cell_type == "code":
            cell.outputs = []
    resources = {"metadata": {"path": str(tmp_path)}}
    nbclient.NotebookClient(notebook, timeout=600, kernel_name="python3", resources=resources).execute()
    check(path, notebook)
