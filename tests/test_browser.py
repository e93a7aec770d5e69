"""The site and the explore notebook in a real browser, Debian's Chromium, without a network."""

import json
import os
import re
import shutil
import subprocess
import sys
import time
from contextlib import contextmanager, suppress
from pathlib import Path
from urllib.error import URLError
from urllib.request import urlopen

import nbformat
import pytest

from cim.gallery.build import build_gallery
from cim.gallery.settings import GallerySettings
from cim.gallery.shards import gallery_shards
from cim.pipeline import site
from conftest import ROOT

CHROMIUM, DRIVER = shutil.which("chromium"), shutil.which("chromedriver")
pytestmark = pytest.mark.skipif(not (CHROMIUM and DRIVER), reason="no Chromium here: 'make chromium' installs it")
OFFLINE = "MAP * ~NOTFOUND , EXCLUDE 127.0.0.1"
FLAGS = (
    "headless", "no-sandbox", "disable-gpu", "disable-quic", "no-first-run", "disable-background-networking",
    "disable-component-update", "disable-sync", "window-size=1400,1400", f"host-resolver-rules={OFFLINE}",
)  # fmt: skip


@pytest.fixture
def browser(tmp_path):
    from selenium import webdriver

    options = webdriver.ChromeOptions()
    options.binary_location = CHROMIUM
    for flag in (*FLAGS, f"user-data-dir={tmp_path / 'chromium'}"):
        options.add_argument(f"--{flag}")
    options.set_capability("goog:loggingPrefs", {"performance": "ALL"})
    driver = webdriver.Chrome(options=options, service=webdriver.ChromeService(DRIVER))
    yield driver
    driver.quit()


def wait(browser, selector, seconds=180):
    """The elements of a CSS selector, once there are some."""
    from selenium.webdriver.support.ui import WebDriverWait

    return WebDriverWait(browser, seconds).until(lambda b: b.find_elements("css selector", selector))


def requested(browser) -> set[str]:
    """The web addresses that pages have asked for so far."""
    events = [json.loads(entry["message"])["message"] for entry in browser.get_log("performance")]
    urls = {e["params"]["request"]["url"] for e in events if e["method"] == "Network.requestWillBeSent"}
    return {url for url in urls if url.startswith("http")}


def test_the_site_opens_from_the_disk(browser, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "reports").mkdir()
    (tmp_path / "results").symlink_to(ROOT / "results")
    cells = [
        nbformat.v4.new_markdown_cell("# Results\nWhat was *measured*?"),
        nbformat.v4.new_code_cell("1 + 1", outputs=[nbformat.v4.new_output("stream", text="two\n")]),
    ]
    nbformat.write(nbformat.v4.new_notebook(cells=cells), tmp_path / "reports" / "results.ipynb")
    site.run({"runs": {"grpo": [], "sft": [], "on_sft": []}, "results": {"profile": "tiny"}})
    browser.get((tmp_path / "site" / "index.html").as_uri())
    assert "Cross-modal Identity Mapping" in browser.find_element("tag name", "h1").text
    images = browser.find_elements("tag name", "img")
    assert images
    assert all(browser.execute_script("return arguments[0].naturalWidth", image) > 100 for image in images)
    browser.find_element("link text", "Results").click()
    assert "What was measured?" in wait(browser, "main")[0].text
    assert "two" in browser.find_element("tag name", "main").text
    code = browser.find_element("css selector", ".jp-InputArea-editor")
    assert not code.is_displayed()
    browser.find_element("tag name", "summary").click()
    assert code.is_displayed()
    assert not requested(browser)


@contextmanager
def jupyterlab(folder: Path, home: Path):
    """JupyterLab as `make lab` starts it, on a free port; its address."""
    command = [sys.executable, "-m", "jupyterlab", "--config=conf/jupyter_lab_config.py", "notebooks"]
    options = ["--no-browser", "--port=0", "--ip=127.0.0.1", "--IdentityProvider.token=secret"]
    options += ["--allow-root"] if os.getuid() == 0 else []
    log = home / "lab.log"
    with log.open("w") as file:
        env = {**os.environ, "HOME": str(home), "JUPYTER_CONFIG_DIR": str(home), "OMP_NUM_THREADS": "1"}
        server = subprocess.Popen([*command, *options], cwd=folder, env=env, stdout=file, stderr=subprocess.STDOUT)
        try:
            deadline = time.monotonic() + 180
            while True:
                assert time.monotonic() < deadline, log.read_text()
                assert server.poll() is None, log.read_text()
                found = re.search(r"(http://127\.0\.0\.1:\d+)/lab", log.read_text())
                if found:
                    with suppress(URLError):  # the address is logged a moment before it answers
                        urlopen(f"{found[1]}/api?token=secret").close()
                        break
                time.sleep(0.1)
            yield found[1]
        finally:
            server.terminate()
            server.wait(120)
    assert "without encryption" not in log.read_text()


def test_the_explore_notebook_answers_in_jupyterlab(browser, workspace, world, encoders, tmp_path_factory):
    from selenium.webdriver.common.keys import Keys

    # A gallery whose paths hold in this workspace, as the pipeline's do in its own.
    (workspace / "artifacts/gallery").unlink()
    settings = GallerySettings(splits=["gallery", "train"])
    build_gallery(gallery_shards(world, settings), settings, *encoders, workspace / "artifacts/gallery")
    for name in ("notebooks", "conf"):
        shutil.copytree(ROOT / name, workspace / name)
    with jupyterlab(workspace, tmp_path_factory.mktemp("home")) as address:
        browser.get(f"{address}/lab/tree/explore.ipynb?token=secret")
        wait(browser, ".jp-Notebook-ExecutionIndicator[data-status=idle]")
        next(item for item in wait(browser, ".lm-MenuBar-itemLabel") if item.text == "Run").click()
        wait(browser, "li[data-command='runmenu:run-all']")[0].click()

        def scores() -> list[str]:
            # In one call: the page may be replaced between two.
            texts = "return [...document.querySelectorAll('.cim .scores')].map(element => element.innerText)"
            return browser.execute_script(texts)

        def changed(before: list[str]) -> list[str]:
            deadline = time.monotonic() + 180
            while len(now := scores()) < 2 or now == before:
                assert time.monotonic() < deadline, now
                time.sleep(0.1)
            return now

        wait(browser, ".cim img")
        first = changed([])
        assert re.fullmatch(r"GRC \d\.\d{3} QIR -?\d\.\d{3} CIM -?\d\.\d{3}", first[0])
        slider = browser.find_elements("css selector", ".jupyter-widgets .noUi-handle")[0]
        slider.click()
        slider.send_keys(Keys.ARROW_RIGHT)
        moved = changed(first)
        assert len(browser.find_elements("css selector", ".cim figure")) == 8
        caption = browser.find_elements("css selector", ".jupyter-widgets textarea")[0]
        caption.send_keys(Keys.CONTROL + "a")
        caption.send_keys("a green crab is below a small piano.")
        browser.find_elements("css selector", ".jupyter-widgets textarea")[1].click()
        typed = changed(moved)
        assert typed[0] != moved[0]
        assert typed[1] == moved[1]
        if folder := os.environ.get("SCREENSHOTS"):
            browser.save_screenshot(str(Path(folder) / "explore.png"))
        loaded = "return [...document.querySelectorAll('.cim img')].every(image => image.naturalWidth > 0)"
        assert browser.execute_script(loaded)
        assert all(url.startswith(address) for url in requested(browser))
        assert not browser.find_elements("css selector", ".Toastify__toast")  # no question about news
