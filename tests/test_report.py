"""The report: its numbers are the summaries', nothing of a run folder becomes code, and a browser can work with it."""

import base64
import contextlib
import json
import os
import shutil
import signal
import socket
import subprocess
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from toolkit import UserError
from toolkit.report import write
from toolkit.runs.folder import Run

CHROMIUM, DRIVER = shutil.which("chromium"), shutil.which("chromedriver")
FLAGS = ["--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking",
         "--disable-component-update", "--disable-sync", "--hide-scrollbars"]  # fmt: skip


class Browser:
    """A headless Chromium, spoken to by the WebDriver protocol."""

    def __init__(self, profile: Path) -> None:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
        self.process = subprocess.Popen([str(DRIVER), f"--port={port}"], start_new_session=True, **quiet)
        self.url = f"http://127.0.0.1:{port}"
        options = {"binary": CHROMIUM, "args": [*FLAGS, f"--user-data-dir={profile}"]}
        wanted = {"goog:chromeOptions": options, "goog:loggingPrefs": {"browser": "ALL"}}
        try:
            self.wait()
            self.url += f"/session/{self.send('POST', '/session', capabilities={'alwaysMatch': wanted})['sessionId']}"
        except BaseException:
            self.close()
            raise

    def wait(self, seconds: float = 15) -> None:
        """Until the driver answers."""
        end = time.monotonic() + seconds
        while True:
            try:
                self.send("GET", "/status")
                return
            except OSError:
                if time.monotonic() > end:
                    raise
                time.sleep(0.05)

    def send(self, method: str, path: str, **body: Any) -> Any:
        data = json.dumps(body).encode() if method == "POST" else None
        request = urllib.request.Request(self.url + path, data, {"Content-Type": "application/json"}, method=method)
        with urllib.request.build_opener(urllib.request.ProxyHandler({})).open(request, timeout=30) as answer:
            return json.load(answer)["value"]

    def open(self, page: Path, width: int = 1200, height: int = 900) -> None:
        self.send("POST", "/window/rect", width=width, height=height)
        self.send("POST", "/url", url=page.resolve().as_uri())

    def run(self, script: str, *arguments: object) -> Any:
        return self.send("POST", "/execute/sync", script=script, args=arguments)

    def find(self, selector: str) -> str:
        (found,) = self.send("POST", "/element", using="css selector", value=selector).values()
        return str(found)

    def click(self, selector: str) -> None:
        self.send("POST", f"/element/{self.find(selector)}/click")

    def type(self, selector: str, keys: str) -> None:
        self.send("POST", f"/element/{self.find(selector)}/value", text=keys)

    def hover(self, x: float, y: float) -> None:
        move = {"type": "pointerMove", "x": round(x), "y": round(y), "duration": 0}
        self.send("POST", "/actions", actions=[{"type": "pointer", "id": "mouse", "actions": [move]}])

    def texts(self, selector: str) -> list[str]:
        return list(self.run("return [...document.querySelectorAll(arguments[0])].map((e) => e.textContent)", selector))

    def errors(self) -> list[str]:
        return [entry["message"] for entry in self.send("POST", "/se/log", type="browser") if entry["level"] == "SEVERE"]

    def close(self) -> None:
        """Ends the driver with the browser that it started, and nothing else."""
        if "session" in self.url:
            with contextlib.suppress(OSError):
                self.send("DELETE", "")
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGTERM)
        self.process.wait(10)


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    if CHROMIUM is None or DRIVER is None:
        pytest.skip("there is no chromium with its chromedriver on this machine")
    started = Browser(tmp_path_factory.mktemp("profile"))
    yield started
    started.close()


# A PNG of one white pixel.
PIXEL = base64.b64decode("iVBORw0KGgoAAAANSUhEUgAAAAEAAAABCAAAAAA6fptVAAAACklEQVR4nGP4DwABAQEAsTj2WAAAAABJRU5ErkJggg==")


def summary(**changes: Any) -> dict[str, Any]:
    """A result of accuracy after 0 to 3 steps, trained with 1."""
    mean = changes.pop("mean", [0.2, 0.7, 0.75, 0.8])
    test = {"tasks": 600, "steps": [0, 1, 2, 3], "metric": "accuracy", "mean": mean, "ci95": [0.01, 0.02, 0.015, 0.01],
            "median": mean, "loss": mean, "finite": [1.0, 1.0, 1.0, 1.0], "worst_tenth": [0.1, 0.31, 0.4, 0.5]}  # fmt: skip
    card = {"nll": [1.6, 0.912, 0.8, 0.7], "ece": [0.1, 0.1234, 0.1, 0.1], "brier": [0.8, 0.456, 0.4, 0.3],
            "by_class": [[0.2, 0.2]] * 4, "reliability": [[[0.25, 0.0, 0.75], [0.1, 0.0, 0.6], [0.05, 0.0, 0.45]]] * 4,
            "worst_tasks": [44, 7], "seconds_per_task": 0.0123}  # fmt: skip
    return {
        "experiment": "quickstart", "algorithm": "maml", "sampler": "glyphs", "seed": 0, "inner_steps": 1, "chance": 0.2,
        "test": test, "card": card, "selected": {"iteration": 200, "val_metric": 0.72, "val_ci95": 0.03},
        "cost": {"seconds": 90.0, "peak_mb": 1106, "adapted_parameters": 112261, "parameters": 112261},
        "batch_norm": "batch", "transductive": True, "versions": {"torch": "2.14.1"}, "task_list_hash": "f00",
        "selection": "the best on 100 validation tasks", "git": "0df2ae89",
        "command": "python experiments/quickstart.py --seed 0",
    } | changes  # fmt: skip


def folder(path: Path, config: dict[str, Any] | None = None, **changes: Any) -> Run:
    """A run folder that is complete."""
    path.mkdir(parents=True)
    result = summary(**changes)
    n = len(result["test"]["steps"])
    rows = [{"iteration": i, "loss": 1.0, "metric": 0.5 + i / 1000, "seconds": i} for i in range(10, 201, 10)]
    rows += [{"iteration": i, "val_metric": 0.6 + i / 2000, "val_ci95": 0.02} for i in (100, 200)]
    curve = {"metric_name": "accuracy", "task_list_hash": "f00", "loss": [[1.0] * n] * 2, "metric": [[0.5] * n] * 2}
    flags = {"algorithm": result["algorithm"], "ways": 5, "shots": 1, "iterations": 200, "out": str(path), "inner_lr": 0.4}
    (path / "summary.json").write_text(json.dumps(result))
    (path / "config.json").write_text(json.dumps(flags | (config or {})))
    (path / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (path / "curve.json").write_text(json.dumps(curve))
    (path / "task.png").write_bytes(PIXEL)
    return Run(path)


def text_of(page: Path) -> str:
    """The page, with the numbers as they are read."""
    return page.read_text(encoding="utf-8").replace("\N{NO-BREAK SPACE}", " ")


def row_of(page: str, index: int) -> str:
    return page.split(f'<tr id="row-{index}">' if f'<tr id="row-{index}">' in page else f'id="row-{index}"')[1].split("</tr>")[
        0
    ]


def test_the_numbers_are_those_of_the_summary(tmp_path: Path) -> None:
    runs = [folder(tmp_path / "one"), folder(tmp_path / "two", {"inner_lr": 0.1}, algorithm="anil", seed=3)]
    out = write(runs, tmp_path / "new" / "report.html")
    page = text_of(out)
    assert out == tmp_path / "new" / "report.html" and [f.name for f in out.parent.iterdir()] == ["report.html"]
    row = row_of(page, 1)
    for said in ("anil", "5-way 1-shot", ">3<", "20.00 <", "± 1.00 %", "70.00 <", "after 1 step<", "80.00 <", "after 3 steps<",
                 ">600<", ">0.912<", ">12.34 %<", ">31.00 %<", "transductive", ">1.5<", ">1,106<", ">112,261<"):  # fmt: skip
        assert said in row, said
    assert 'data-value="0.912"' in row and 'data-value="70.0"' in row
    for said in ("0.456", "44, 7", "12.3 ms", "iteration 200, validation 72.00 ± 3.00 %", "0df2ae89", "torch 2.14.1",
                 "python experiments/quickstart.py --seed 0", "All runs were tested on the same tasks"):  # fmt: skip
        assert said in page, said
    drawn = {chart["kind"]: chart for chart in json.loads(page.split('id="data">')[1].split("</script>")[0])["charts"]}
    places = {kind: [[point["x"], point["y"]] for point in chart["series"][1]["points"]] for kind, chart in drawn.items()}
    assert places == {
        "adaptation": [[0, 20.0], [1, 70.0], [2, 75.0], [3, 80.0]],
        "calibration": [[40.0, 20.0], [80.0, 60.0]],
        "training": [[100, 65.0], [200, 70.0]],
    }
    flags = page.split('id="flags-caption"')[1].split("</table>")[0]
    assert "inner_lr" in flags and "0.1" in flags and "algorithm" in flags and "shots" not in flags and "out" not in flags
    assert page.count(base64.b64encode(PIXEL).decode()) == 2
    assert "What is missing" not in page


def test_the_page_needs_nothing_else_and_is_the_same_again(tmp_path: Path) -> None:
    runs = [folder(tmp_path / name) for name in ("b", "a")]
    first = write(runs, tmp_path / "1.html").read_bytes()
    assert first == write([Run(run.path) for run in runs], tmp_path / "2.html").read_bytes()
    assert first == write([*runs, runs[0]], tmp_path / "3.html").read_bytes()  # given twice, shown once
    page = first.decode()
    assert "http:" not in page and "https:" not in page and "@import" not in page and "url(" not in page.replace("url(#", "")
    assert "default-src 'none'" in page


HOSTILE = "</script><img src=x onerror=\"document.title='owned'\"><b>'&\ud800"


def test_nothing_of_a_run_folder_becomes_code(tmp_path: Path) -> None:
    bad = dict.fromkeys(("algorithm", "sampler", "experiment", "selection", "git", "command", "batch_norm", "seed"), HOSTILE)
    one = folder(
        tmp_path / "<i>one", {HOSTILE: HOSTILE, "dataset": HOSTILE, "ways": HOSTILE}, **bad, versions={HOSTILE: HOSTILE}
    )
    page = write([one, folder(tmp_path / "two")], tmp_path / "report.html").read_text(encoding="utf-8")
    assert "<img src=x" not in page and "<i>" not in page and "<b>" not in page
    assert page.count("</script>") == 2 and page.count("&lt;img src=x") > 10
    data = json.loads(page.split('id="data">')[1].split("</script>")[0])
    assert data["runs"][0]["name"] == "<i>one"


def test_a_broken_folder_costs_only_itself(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    good, cut, old, bare, odd = (folder(tmp_path / name) for name in ("good", "cut", "old", "bare", "odd"))
    with open(cut.path / "metrics.jsonl", "a") as file:
        file.write('{"iteration": 3')
    new = {"card", "command", "selection"}
    (old.path / "summary.json").write_text(json.dumps({k: v for k, v in summary().items() if k not in new}))
    for name in ("metrics.jsonl", "curve.json", "config.json", "task.png"):
        (bare.path / name).unlink()
    test = {"steps": [0, 1], "mean": [10**400, 0.5], "ci95": "x", "metric": ["odd"], "tasks": {}}
    (odd.path / "summary.json").write_text(
        json.dumps({"test": test, "card": [], "cost": 7, "selected": None, "inner_steps": "x"})
    )
    (odd.path / "task.png").write_bytes(b"no picture")
    half = tmp_path / "half"
    half.mkdir()
    (half / "config.json").write_text("{}")
    torn = tmp_path / "torn"
    torn.mkdir()
    (torn / "summary.json").write_bytes(b'{"test": \xff')
    listed = tmp_path / "listed"
    listed.mkdir()
    (listed / "summary.json").write_text("[1]")
    broken = [Run(path) for path in (half, torn, listed, tmp_path / "absent")]
    page = text_of(write([*broken, cut, old, bare, odd, good], tmp_path / "report.html"))
    top = page.split("What is missing")[1].split("</aside>")[0]
    lacks = {
        "half": "not shown (no summary.json).",
        "torn, listed": "not shown (summary.json is damaged).",
        "absent": "not shown (there is no such folder).",
        "cut": "shown without the course of training (metrics.jsonl is damaged).",
        "old": "shown without NLL, calibration error, the command, how the checkpoint was selected (of an older version).",
        "bare": "shown without its configuration (no config.json), the course of training (no metrics.jsonl), the single test "
        "tasks (no curve.json).",
    }
    assert "absent: not shown (there is no such folder)" in caplog.messages
    for name, words in lacks.items():
        assert f"{name}</strong>: {words}" in top, name
    assert "good" not in top and "70.00 <" in row_of(page, 0) and "50.00" not in row_of(page, 4)
    assert ">0.5<" in row_of(page, 3) and "did not keep its command" in page


def test_no_run_at_all_is_one_sentence(tmp_path: Path) -> None:
    for runs in ([], [Run(tmp_path / "absent")]):
        with pytest.raises(UserError, match="there is no run to report on"):
            write(runs, tmp_path / "report.html")
    assert not (tmp_path / "report.html").exists()
    with pytest.raises(UserError, match="cannot be written"):
        write([folder(tmp_path / "run")], tmp_path / "run" / "summary.json" / "x.html")
    with pytest.raises(UserError, match=r"summary\.json is no name for a page; give one that ends in \.html"):
        write([Run(tmp_path / "run")], tmp_path / "run" / "summary.json")


def test_an_older_run_still_tells_its_worst_tenth(tmp_path: Path) -> None:
    """From the curve, where the summary does not hold it; and runs of one name get the end of their path that differs."""
    result = summary()
    del result["test"]["worst_tenth"]
    runs = [folder(tmp_path / name / "run") for name in ("x", "y")]
    (runs[0].path / "summary.json").write_text(json.dumps(result))
    page = text_of(write(runs, tmp_path / "report.html"))
    assert ">50.00 %<" in row_of(page, 0) and ">31.00 %<" in row_of(page, 1)
    assert ">x/run<" in page and ">y/run<" in page


NAMES = "return [...document.querySelectorAll('#runs tbody tr')].map((row) => row.cells[0].textContent)"


@pytest.fixture
def page(tmp_path: Path) -> Path:
    """Three runs of accuracy, one without a card, and two of squared error over more than a factor of 10."""
    a = folder(tmp_path / "a", mean=[0.2, 0.7, 0.75, 0.9])
    b = folder(tmp_path / "b", algorithm=HOSTILE[:-1], mean=[0.19, 0.6, 0.65, 0.7], card={})
    c = folder(tmp_path / "c", mean=[0.21, 0.5, None, 0.6])
    for name, factor in (("d", 1.0), ("e", 2.0)):
        result = summary(chance=None)
        result["test"] |= {
            "metric": "squared error",
            "mean": [4 * factor, factor, 0.4 * factor, 0.1 * factor],
            "ci95": [0.05] * 4,
        }
        run = folder(tmp_path / name)
        (run.path / "summary.json").write_text(json.dumps(result))
    return write([a, b, c, Run(tmp_path / "d"), Run(tmp_path / "e")], tmp_path / "report.html")


def test_in_a_browser(browser: Browser, page: Path) -> None:
    browser.open(page)
    # The table sorts numbers as numbers, both ways, by mouse and keyboard; what is missing stays last.
    head = "#runs thead th:nth-child({}) button"
    browser.click(head.format(8))
    browser.click(head.format(10))
    assert browser.run(NAMES)[-1] == "b"
    browser.click(head.format(10))
    assert browser.run(NAMES)[-1] == "b"
    browser.click(head.format(8))
    assert browser.run(NAMES) == ["d", "e", "c", "b", "a"]
    browser.type(head.format(8), "\ue007")
    assert browser.run(NAMES) == ["a", "b", "c", "e", "d"]
    assert browser.run("return document.querySelector('th[aria-sort]').getAttribute('aria-sort')") == "descending"
    # A chart for each metric and kind, each run a path; a run that is unticked goes, everywhere.
    assert browser.run("return document.querySelectorAll('.chart svg[viewBox]').length") >= 4
    series = "return [...document.querySelectorAll('#adaptation-0 .series')].map((g) => g.dataset.run)"
    assert browser.run(series) == ["0", "1", "2"]
    browser.click("#adaptation-0 input[data-run='1']")
    assert browser.run(series) == ["0", "2"]
    assert browser.run("return document.querySelectorAll('#training-0 .series').length") == 2
    browser.click("#adaptation-0 .button:last-child")
    assert browser.run(series) == [] and "No run is chosen." in browser.texts("#adaptation-0 text")
    browser.click("#adaptation-0 .button:nth-last-child(2)")
    assert browser.run(series) == ["0", "1", "2"]
    assert "chance, 20 %" in browser.texts("#adaptation-0 text")
    # Powers on the axis of squared error, and the numbers of the point under the mouse.
    assert {"0.1", "1"} <= set(browser.texts("#adaptation-1 text"))
    x, y = browser.run(
        "const ring = document.querySelector('#adaptation-0 [data-run=\"0\"] .ring'); ring.scrollIntoView({block: 'center'});"
        "const box = ring.getBoundingClientRect(); return [box.x + box.width / 2, box.y + box.height / 2]"
    )
    browser.hover(x + 3, y + 2)
    (tip,) = browser.texts("#adaptation-0 .tip:not([hidden])")
    assert tip.replace("\N{NO-BREAK SPACE}", " ") == "a70.00 ± 2.00 %after 1 stepmedian 70.00 %"
    # The same by keyboard: from a gap in a curve to the next point that there is.
    browser.hover(1, 1)
    browser.type("#adaptation-0 .plot", "\ue011\ue014\ue015\ue015\ue014")  # Home, right, twice down, right
    (tip,) = browser.texts("#adaptation-0 .tip:not([hidden])")
    assert tip.startswith("c60.00") and "3\N{NO-BREAK SPACE}steps" in tip
    browser.type("#adaptation-0 .plot", "\ue00c")
    assert browser.texts("#adaptation-0 .tip:not([hidden])") == []
    browser.click("#run-0 .copy")
    assert "owned" not in browser.run("return document.title")
    assert browser.errors() == []


def test_on_a_telephone(browser: Browser, page: Path) -> None:
    """The page is no wider than the screen; the charts have drawn themselves for it."""
    screen = {"width": 390, "height": 800, "deviceScaleFactor": 1, "mobile": True}
    browser.send("POST", "/goog/cdp/execute", cmd="Emulation.setDeviceMetricsOverride", params=screen)
    try:
        browser.open(page)
        assert browser.run("return document.documentElement.scrollWidth") <= 390
        assert 200 < browser.run("return document.querySelector('#adaptation-0 svg').getBoundingClientRect().width") < 390
        assert browser.errors() == []
    finally:
        browser.send("POST", "/goog/cdp/execute", cmd="Emulation.clearDeviceMetricsOverride", params={})


def test_without_scripts(browser: Browser, page: Path) -> None:
    """All numbers are there; only the charts are not, and say so."""
    browser.send("POST", "/goog/cdp/execute", cmd="Emulation.setScriptExecutionDisabled", params={"value": True})
    try:
        browser.open(page)
        assert "The chart needs JavaScript." in browser.texts(".chart")
        assert browser.run(NAMES) == ["a", "b", "c", "d", "e"]
        assert browser.texts("#adaptation-0-points tbody tr:nth-child(2) td")[0].startswith("70.00")
    finally:
        browser.send("POST", "/goog/cdp/execute", cmd="Emulation.setScriptExecutionDisabled", params={"value": False})
