"""The page in a real browser, and what it is made of."""

from __future__ import annotations

import os
import shutil
import socket
import subprocess
import sys
import time
import urllib.request
import zipfile
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from vpt_peft.app.jobs import TrainingFailed, run_training
from vpt_peft.app.page import ask, curves_of, train
from vpt_peft.app.serving import Adapters
from vpt_peft.app.uploads import root_of, unpack_images
from vpt_peft.cli.main import main
from vpt_peft.data.images import DataError


ROOT = Path(__file__).parents[2]
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")


def draw(path: Path, hue: int) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = np.random.default_rng(hue).integers(0, 100, (32, 32, 3))
    pixels[..., hue] += 150
    Image.fromarray(pixels.astype("uint8")).save(path)
    return path


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    place = tmp_path_factory.mktemp("app")
    for method, tokens in (("vpt", "4"), ("gated_vpt", "6"), ("linear", None)):
        more = ["--num_virtual_tokens", tokens] if tokens else []
        assert not main(["train", "--dataset_name", "digits", "--max_train_samples", "40", "--max_eval_samples", "20",
                         "--max_predict_samples", "20", "--num_train_epochs", "1", "--use_cpu", "--method", method,
                         "--output_dir", str(place / method), *more])  # fmt: skip
    draw(place / "red.png", 0)
    draw(place / "blue.png", 2)
    (place / "broken.png").write_bytes(b"no image")
    return place


@pytest.fixture(scope="module")
def adapters(folder) -> Adapters:
    found = Adapters()
    assert [found.add(folder / name) for name in ("vpt", "gated_vpt")] == ["vpt", "gated_vpt"]
    return found


def test_answers_are_those_of_predict(adapters, folder, capsys):
    table, pictures, said = ask(adapters, [str(folder / "red.png"), str(folder / "broken.png")], ["vpt", "gated_vpt"])
    capsys.readouterr()
    for row, name in zip(table.values.tolist(), ("vpt", "gated_vpt"), strict=True):
        assert main(["predict", str(folder / name), str(folder / "red.png"), "--top_k", "1"]) == 0
        label, probability = capsys.readouterr().out.splitlines()[1].split(",")[1:3]
        assert row == ["red.png", name, f"{label} ({float(probability):.0%})"]
    assert "Not readable as images: broken.png." in said
    assert pictures.count("<img") == 3 and "gated_vpt: gates" in pictures


def test_one_backbone_in_memory(adapters):
    first, second = (adapters.served[name].model for name in ("vpt", "gated_vpt"))
    assert first is not second
    weight = "base_model.model.vit.layers.0.attention.q_proj.weight"
    assert first.get_parameter(weight) is second.get_parameter(weight)


def test_nothing_chosen(adapters, folder):
    assert ask(adapters, None, ["vpt"])[2] == "Drop one or more images first."
    assert ask(adapters, [str(folder / "red.png")], [])[2] == "Choose at least one adapter."


def test_what_is_no_adapter_of_prompts(folder, tmp_path):
    with pytest.raises(ValueError, match=r"holds no adapter_config.json"):
        Adapters().add(folder / "linear")
    with pytest.raises((OSError, ValueError), match="nothing"):
        Adapters().add(tmp_path / "nothing")
    with pytest.raises(ValueError, match="is of the backbone 'embedded', the page runs 'embedded-mae'"):
        Adapters("embedded-mae").add(folder / "vpt")


def make_zip(path: Path, names: dict[str, Path]) -> Path:
    with zipfile.ZipFile(path, "w") as archive:
        for name, source in names.items():
            archive.write(source, name)
    return path


def test_zip_files(folder, tmp_path):
    names = {f"mine/{label}/{index}.png": folder / f"{label}.png" for label in ("red", "blue") for index in range(3)}
    names |= {"../../escape/a.png": folder / "red.png", "mine/run.sh": folder / "broken.png"}
    names |= {"__MACOSX/mine/red/0.png": folder / "broken.png"}
    target = tmp_path / "a/b/target"
    target.mkdir(parents=True)
    assert unpack_images(make_zip(tmp_path / "x.zip", names), target) == 6
    assert len([path for path in (tmp_path / "a").rglob("*") if path.is_file()]) == 6
    assert [path.suffix for path in target.rglob("*") if path.is_file()] == [".png"] * 6
    assert root_of(target) == target / "mine"


def test_zip_files_that_cannot_be(folder, tmp_path, monkeypatch):
    with pytest.raises(DataError, match="cannot be read"):
        unpack_images(folder / "broken.png", tmp_path)
    with pytest.raises(DataError, match="no images in folders"):
        unpack_images(make_zip(tmp_path / "x.zip", {"red.png": folder / "red.png"}), tmp_path)
    monkeypatch.setattr("vpt_peft.app.uploads.MAX_BYTES", 10)
    with pytest.raises(DataError, match="at most"):
        unpack_images(make_zip(tmp_path / "y.zip", {"a/red.png": folder / "red.png"}), tmp_path)
    assert not list(tmp_path.rglob("*.png"))


def test_training_from_the_page(adapters, folder, tmp_path):
    names = {f"all/{label}/{index}.png": folder / f"{label}.png" for label in ("red", "blue") for index in range(6)}
    states = list(train(adapters, str(make_zip(tmp_path / "x.zip", names)), "colours", "vpt", 2, 2))
    assert states[0][1] == "12 images unpacked."
    curves, said = states[-1]
    assert said == "Done. The adapter is called 'colours'; choose it on the first tab."
    assert curves.count("<img") == 1 and "2 epochs" in curves
    assert adapters.served["colours"].id2label == {0: "blue", 1: "red"}
    assert {row[2].split()[0] for row in ask(adapters, [str(folder / "red.png")], ["colours"])[0].values} <= {
        "red",
        "blue",
    }


def test_training_that_fails(adapters, folder, tmp_path):
    said = list(train(adapters, str(folder / "broken.png"), "x", "vpt", 2, 1))[-1][1]
    assert said.startswith("This did not work: the zip file cannot be read")
    with pytest.raises(TrainingFailed, match="nowhere"):
        list(run_training(["--dataset_name", str(tmp_path / "nowhere")], tmp_path / "run"))


def test_curves_of_a_log():
    log = [{"epoch": 1.0, "loss": 0.5, "learning_rate": 1.0}, {"epoch": 1.0, "eval_loss": 1.0, "eval_accuracy": 0.25}]
    log.append({"epoch": 1.0, "eval_accuracy": 0.75})
    assert curves_of(log) == {"training loss": [(1.0, 0.5)], "accuracy": [(1.0, 0.25)]}


@pytest.fixture(scope="module")
def address(folder):
    pytest.importorskip("gradio")
    pytest.importorskip("playwright")
    if CHROMIUM is None:
        pytest.skip("no chromium")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [
        sys.executable,
        "-m",
        "vpt_peft",
        "app",
        str(folder / "vpt"),
        str(folder / "gated_vpt"),
        "--port",
        str(port),
    ]
    log = (folder / "server.log").open("w")
    process = subprocess.Popen(command, env={**os.environ, "PYTHONPATH": str(ROOT)}, stdout=log, stderr=log)
    url = f"http://127.0.0.1:{port}"
    for _ in range(240):
        time.sleep(0.5)
        assert process.poll() is None, (folder / "server.log").read_text()[-2000:]
        try:
            urllib.request.urlopen(url, timeout=5).close()
            break
        except OSError:
            continue
    yield url
    process.terminate()
    try:
        process.wait(30)
    except subprocess.TimeoutExpired:
        process.kill()


@pytest.fixture(scope="module")
def browser(address):
    from playwright.sync_api import Error, sync_playwright

    with sync_playwright() as playwright:
        try:
            opened = playwright.chromium.launch(
                executable_path=CHROMIUM, args=["--no-sandbox", "--disable-dev-shm-usage"]
            )
        except Error as error:
            pytest.skip(f"chromium does not start here: {error}")
        yield opened
        opened.close()


def open_page(browser, address, width=1280, height=900):
    page = browser.new_page(viewport={"width": width, "height": height})
    page.set_default_timeout(120_000)
    page.asked = []
    page.on("request", lambda request: page.asked.append(request.url))
    page.goto(address)
    page.wait_for_selector("#ask")
    return page


def upload(page, *paths):
    page.set_input_files("#images input[type=file]", [str(path) for path in paths])
    for path in paths:
        page.wait_for_selector(f"#images >> text={path.stem[:4]}", timeout=120_000)


def wait_for_answer(page, text):
    page.wait_for_function(f"document.querySelector('#answers').innerText.includes('{text}')")


@pytest.mark.parametrize("width", [1280, 390], ids=["desktop", "phone"])
def test_upload_and_read_the_answer(browser, address, folder, width):
    page = open_page(browser, address, width)
    upload(page, folder / "red.png", folder / "blue.png")
    page.click("#ask")
    page.wait_for_selector("#said >> text=2 images, 2 adapters", timeout=120_000)
    wait_for_answer(page, "blue.png")
    assert page.locator("#inside img").count() == 3
    # Nothing is wider than the screen, and nothing comes from elsewhere
    assert page.evaluate("document.documentElement.scrollWidth") <= width
    assert all(url.startswith((address, "data:", "blob:")) for url in page.asked)
    page.close()


def test_switch_the_adapter_and_a_wrong_file(browser, address, folder):
    page = open_page(browser, address)
    page.locator("#adapters label", has_text="gated_vpt").locator("input").uncheck()
    upload(page, folder / "broken.png", folder / "red.png")
    page.click("#ask")
    page.wait_for_selector("#said >> text=1 images, 1 adapters", timeout=120_000)
    assert "Not readable as images: broken.png" in page.inner_text("#said")
    assert "gated_vpt" not in page.inner_text("#answers")
    page.close()


def test_two_users_at_once(browser, address, folder):
    first, second = open_page(browser, address), open_page(browser, address)
    first.locator("#adapters label", has_text="gated_vpt").locator("input").uncheck()
    upload(first, folder / "red.png")
    upload(second, folder / "blue.png")
    first.click("#ask")
    second.click("#ask")
    first.wait_for_selector("#said >> text=1 images, 1 adapters", timeout=120_000)
    second.wait_for_selector("#said >> text=1 images, 2 adapters", timeout=120_000)
    wait_for_answer(first, "red.png")
    wait_for_answer(second, "blue.png")
    assert "blue.png" not in first.inner_text("#answers") and "red.png" not in second.inner_text("#answers")
    first.close()
    second.close()


def test_train_in_the_browser(browser, address):
    page = open_page(browser, address)
    page.get_by_role("tab", name="Train").click()
    page.fill("#name input, #name textarea", "digits")
    page.fill("#epochs input[type=number]", "1")
    page.click("#train")
    page.wait_for_selector("#state >> text=The adapter is called", timeout=240000)
    assert "'digits'" in page.inner_text("#state")
    assert page.locator("#curves img").count() == 1
    page.get_by_role("tab", name="Ask").click()
    page.wait_for_selector("#adapters label >> text=digits")
    page.close()
