"""The pages of `suanli serve`, as people use them: a real browser, a real server, real models."""

from __future__ import annotations

import base64
import io
import json
import re
import shutil
import time
from collections.abc import Iterator
from importlib import resources
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from sklearn.datasets import load_digits

import browser as chromium
from browser import Browser
from hostile import engines, register
from served import Served, digits_run, serving
from suanli.data.preprocess.text import TextPreprocess
from suanli.serving import pages

HOSTILE = "<img src=x onerror=window.hurt=1>"
TWO = [[(0.3, 0.35), (0.35, 0.2), (0.5, 0.14), (0.66, 0.22), (0.66, 0.4), (0.4, 0.72), (0.28, 0.85), (0.74, 0.84)]]
THREE = [
    [
        (0.32, 0.2),
        (0.5, 0.14),
        (0.66, 0.24),
        (0.62, 0.4),
        (0.46, 0.48),
        (0.64, 0.55),
        (0.68, 0.7),
        (0.54, 0.85),
        (0.32, 0.8),
    ]
]
ZERO = [[(0.5 + 0.22 * np.sin(a), 0.5 - 0.34 * np.cos(a)) for a in np.linspace(0, 6.28, 24)]]
TAB, ENTER, CONTROL, RIGHT = "\ue004", "\ue007", "\ue009", "\ue014"  # as WebDriver writes keys

needs_browser = pytest.mark.skipif(chromium.WHY_NOT is not None, reason=str(chromium.WHY_NOT))


@pytest.fixture(scope="module")
def environment() -> Iterator[dict[str, str]]:
    with register() as result:
        yield result


@pytest.fixture(scope="module")
def odd(tmp_path_factory: pytest.TempPathFactory, environment: dict[str, str]) -> Path:  # noqa: ARG001
    """A model that finds the level of a grey picture even or odd; one of its classes has a name that is HTML."""
    return engines(tmp_path_factory.mktemp("models") / "odd", classes=(HOSTILE, "plain"), side=12)


@pytest.fixture(scope="module")
def served(odd: Path, tmp_path_factory: pytest.TempPathFactory, environment: dict[str, str]) -> Iterator[Served]:
    """Three models: `digits`, `odd`, and `reviews`, of texts."""
    words = TextPreprocess(vocabulary=("film", "plot", "lovely", "great", "dull", "awful"), length=8)
    engines(odd.parent / "reviews", classes=("bad", "good"), preprocess=words)
    shutil.copytree(digits_run(tmp_path_factory) / "model", odd.parent / "digits" / "1")
    with serving(odd.parent, environment=environment) as result:
        yield result


@pytest.fixture(scope="module")
def window(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    with Browser(tmp_path_factory.mktemp("profile")) as result:
        yield result


@pytest.fixture
def browser(window: Browser, served: Served) -> Iterator[Browser]:
    """The page, with the digits model, in English. Afterwards: no complaint in the console, nothing asked elsewhere."""
    window.size(1400, 900)
    window.go(served.url)
    window.run("localStorage.clear(); sessionStorage.clear()")
    window.messages(), window.requests()
    window.go(served.url)
    choose(window, "digits")
    yield window
    assert window.messages() == []
    addresses = [address for address in window.requests() if not address.startswith(("data:", "blob:"))]
    assert addresses
    assert [address for address in addresses if not address.startswith(f"{served.url}/")] == []


def choose(page: Browser, model: str) -> None:
    page.until("document.querySelectorAll('#model option').length === 3")
    page.run(
        "const list = document.getElementById('model');"
        "list.value = [...list.options].find((o) => o.text === arguments[0]).value;"
        "list.dispatchEvent(new Event('change'))",
        model,
    )
    assert page.text("h1") == model


def answers(page: Browser, count: int = 1) -> list[str]:
    """The labels of the newest answer, once all of them are there."""
    page.until(f"document.querySelectorAll('.batch:first-child .label:not(.none)').length >= {count}")
    return list(page.run("return [...document.querySelectorAll('.batch:first-child .label')].map((e) => e.innerText)"))


def png(pixels: np.ndarray) -> bytes:
    stream = io.BytesIO()
    Image.fromarray(pixels).save(stream, "png")
    return stream.getvalue()


def digit(value: int, nth: int = 0) -> bytes:
    """A picture of a digit from scikit-learn's, as the data set gives it."""
    result = load_digits()
    return png(np.rint(result.images[result.target == value][nth] * 255 / 16).astype(np.uint8))


GIVE = """
const [kind, name, type, base64] = arguments;
const bytes = Uint8Array.from(atob(base64), (c) => c.charCodeAt(0));
const carried = new DataTransfer();
carried.items.add(new File([bytes], name, {type}));
const event = kind === "paste"
  ? new ClipboardEvent("paste", {clipboardData: carried, bubbles: true, cancelable: true})
  : new DragEvent(kind, {dataTransfer: carried, bubbles: true, cancelable: true});
document.body.dispatchEvent(event);
return event.defaultPrevented;
"""


def give(page: Browser, kind: str, name: str, content: bytes, media_type: str = "image/png") -> None:
    assert page.run(GIVE, kind, name, media_type, base64.b64encode(content).decode())


@needs_browser
def test_files_that_are_chosen(browser: Browser, tmp_path: Path) -> None:
    for value in (3, 6):
        (tmp_path / f"{value}.png").write_bytes(digit(value))
    browser.click("#tab-picture")
    browser.write("#files", str(tmp_path / "6.png"))
    assert answers(browser) == ["6"]
    bars = browser.run("return [...document.querySelectorAll('.bars li')].map((e) => e.innerText.split(/\\s+/))")
    shares = [float(value) for _, value, _ in bars]
    assert sorted(name for name, _, _ in bars) == [str(i) for i in range(10)]
    assert shares == sorted(shares, reverse=True)
    assert sum(shares) == pytest.approx(100, abs=0.06)
    assert all(re.fullmatch(r"\d+\.\d\d", value) for _, value, _ in bars)
    widths = browser.run("return [...document.querySelectorAll('.bars .bar')].map((e) => e.offsetWidth)")
    assert widths == sorted(widths, reverse=True)
    assert widths[0] > 50
    byline = browser.text(".by")
    assert re.search(r"[\d.]+\sm?s on the server, [\d.]+\sm?s round trip", byline)
    assert "eager float32" in byline
    assert "digits, version 1" in byline
    assert browser.run("return document.querySelector('.batch img').naturalWidth") == 8
    assert browser.run("return document.getElementById('announcer').textContent").startswith("6.png: 6, ")

    browser.write("#files", f"{tmp_path / '3.png'}\n{tmp_path / '6.png'}")
    browser.until("document.querySelectorAll('.batch').length === 2")
    assert answers(browser, 2) == ["3", "6"]


@needs_browser
def test_the_answer_is_that_of_predict(browser: Browser, served: Served) -> None:
    content = digit(4)
    answer = served.ask("POST", "/predict?model=digits", content, {"Content-Type": "image/png"})
    wanted = answer.json()["predictions"][0]["probabilities"]
    give(browser, "drop", "four.png", content)
    answers(browser)
    bars = browser.run(
        "return Object.fromEntries([...document.querySelectorAll('.bars li')].map((e) => e.innerText.split(/\\s+/)))"
    )
    for name, share in wanted.items():
        assert float(bars[name]) == pytest.approx(100 * share, abs=0.0051)


@needs_browser
@pytest.mark.parametrize("pointer", ["mouse", "touch"])
@pytest.mark.parametrize(("label", "strokes"), [("0", ZERO), ("2", TWO), ("3", THREE)])
def test_a_digit_that_is_drawn(browser: Browser, label: str, strokes: list, pointer: str) -> None:
    assert browser.run("return document.getElementById('tab-draw').getAttribute('aria-selected')") == "true"
    browser.draw("#drawing", strokes, pointer=pointer)
    assert answers(browser) == [label]
    assert not browser.find_all("#draw-hint:not([hidden])")
    browser.click("#clear")
    assert browser.find_all("#draw-hint:not([hidden])")
    assert browser.run("return document.getElementById('undo').disabled")


@needs_browser
def test_strokes_change_one_answer_and_a_clear_slate_begins_another(browser: Browser) -> None:
    browser.draw("#drawing", THREE)
    answers(browser)
    browser.draw("#drawing", [[(0.3, 0.85), (0.7, 0.85)]])
    time.sleep(0.5)
    answers(browser)
    assert len(browser.find_all(".batch")) == 1
    browser.click("#undo")
    browser.click("#clear")
    browser.draw("#drawing", ZERO)
    browser.until("document.querySelectorAll('.batch').length === 2")
    assert answers(browser) == ["0"]
    browser.click("#forget")
    assert not browser.find_all(".batch")
    assert (
        browser.text("#empty") == "The most likely classes will appear here, with the time taken and the engine used."
    )


@needs_browser
@pytest.mark.parametrize("way", ["paste", "drop"])
def test_pasted_and_dropped(browser: Browser, way: str) -> None:
    if way == "drop":
        give(browser, "dragover", "five.png", digit(5))
        assert browser.run("return getComputedStyle(document.getElementById('dropping')).display") == "grid"
    give(browser, way, "five.png", digit(5))
    assert answers(browser) == ["5"]
    assert browser.run("return getComputedStyle(document.getElementById('dropping')).display") == "none"
    assert browser.text(".batch .file") == "five.png"


@needs_browser
def test_a_file_that_is_no_picture(browser: Browser, tmp_path: Path) -> None:
    (tmp_path / "good.png").write_bytes(digit(2))
    (tmp_path / "bad.png").write_text("no picture <b>at all</b>")
    browser.click("#tab-picture")
    browser.write("#files", str(tmp_path / "bad.png"))  # alone: the whole request is refused
    browser.until("document.querySelector('.batch .bad')")
    assert "it is text that starts with" in browser.text(".batch .bad")
    assert [" 400 " in message for message in browser.messages()] == [True]  # the browser notes every refusal
    browser.click("#forget")
    browser.write("#files", f"{tmp_path / 'bad.png'}\n{tmp_path / 'good.png'}")
    assert answers(browser) == ["No answer", "2"]
    assert "Not an image that suanli can read" in browser.text(".batch .bad")


FULL = """
const real = window.fetch;
window.fetch = (address, options) => {
  if (!address.startsWith("predict")) return real(address, options);
  window.fetch = real;
  const headers = {"Content-Type": "application/json", "Retry-After": "1"};
  return Promise.resolve(new Response('{"error": "Too much <b>waits</b>."}', {status: 503, headers}));
};
"""


@needs_browser
def test_a_full_server(browser: Browser) -> None:
    browser.run(FULL)  # its answer is put in: no test can count on a server that is full just now
    give(browser, "drop", "5.png", digit(5))
    browser.until("document.querySelector('.batch .banner button:disabled')")
    assert browser.text(".batch .banner button").startswith("Try again in 1")
    assert "The server has too many requests" in browser.text(".batch .banner")
    assert "Too much <b>waits</b>." in browser.text(".batch .banner")
    browser.until("document.querySelector('.batch .banner button:enabled')")
    browser.click(".batch .banner button")
    assert answers(browser) == ["5"]
    assert not browser.find_all(".batch .banner")


@needs_browser
def test_camera(browser: Browser) -> None:
    browser.click("#tab-camera")
    browser.click("#camera-on")
    browser.until("document.getElementById('video').videoWidth > 0 && !document.getElementById('camera-take').hidden")
    browser.click("#camera-take")
    answers(browser)
    assert browser.text(".batch .file") == "Camera"
    assert browser.run("return document.querySelector('.batch img').naturalWidth") > 100

    browser.click("#camera-live")
    browser.until("document.querySelectorAll('.batch').length === 2")
    first = answers(browser) and browser.run("return document.querySelector('.batch img').src")
    browser.until(f"document.querySelector('.batch img').src !== {first!r}")  # the next frame, in its place
    browser.click("#camera-live")
    assert len(browser.find_all(".batch")) == 2
    browser.click("#tab-picture")
    assert browser.run("return document.getElementById('video').srcObject") is None


@needs_browser
def test_without_a_secure_context_the_page_says_why_there_is_no_camera(browser: Browser) -> None:
    browser.run(
        "Object.defineProperty(navigator, 'mediaDevices', {value: undefined, configurable: true});"
        "Object.defineProperty(window, 'isSecureContext', {value: false, configurable: true})"
    )
    browser.click("#tab-camera")
    assert "https" in browser.text("#camera-note")
    assert not browser.find_all("#camera-on:not([hidden])")
    browser.click("#language")
    assert "https" in browser.text("#camera-note")


@needs_browser
def test_a_text(browser: Browser, served: Served) -> None:
    choose(browser, "reviews")
    assert not browser.find_all("#tabs:not([hidden])")
    for count, text in enumerate(("a lovely film, a great plot", "dull <i>and</i> awful film"), 1):
        addresses = json.dumps({"inputs": [text]})
        answer = served.ask("POST", "/predict?model=reviews", addresses, {"Content-Type": "application/json"}).json()
        browser.run("document.getElementById('text').value = ''")
        browser.write("#text", text)
        if count == 1:
            browser.click("#panel-text button")
        else:
            browser.press(CONTROL, ENTER)
        browser.until(f"document.querySelectorAll('.batch').length === {count}")
        assert answers(browser) == [answer["predictions"][0]["label"]]
        assert browser.text(".batch:first-child blockquote") == text
        assert len(browser.find_all(".batch:first-child .bars li")) == 2


@needs_browser
def test_chinese_is_remembered(browser: Browser, served: Served) -> None:
    give(browser, "drop", "8.png", digit(8))
    answers(browser)
    assert browser.run("return document.documentElement.lang") == "en"
    browser.click("#language")
    assert browser.run("return document.documentElement.lang") == "zh-CN"
    assert "服务器用时" in browser.text(".by")
    assert browser.text("#tab-draw") == "手写"
    assert browser.text("#language") == "English"
    browser.go(f"{served.url}/health")
    browser.until("document.querySelectorAll('tbody tr').length === 3")
    assert browser.text("#overall") == "就绪"
    browser.click("#language")
    assert browser.text("#overall") == "Ready"
    browser.go(served.url)
    browser.until("document.querySelector('#tab-draw').innerText === 'Draw'")  # once the page knows the model


@needs_browser
def test_the_language_of_the_browser(served: Served, tmp_path: Path) -> None:
    with Browser(tmp_path / "profile", language="zh-CN,zh") as page:
        page.go(served.url)
        assert page.text("#language") == "English"
        assert page.run("return document.documentElement.lang") == "zh-CN"
        assert page.text("#tab-camera") == "摄像头"


@needs_browser
def test_a_name_that_is_html_is_text(browser: Browser) -> None:
    choose(browser, "odd")
    browser.click("#classes summary")
    give(browser, "drop", f"{HOSTILE}.png", png(np.full((12, 12, 3), 60, np.uint8)))
    assert answers(browser) == [HOSTILE]
    assert HOSTILE in browser.text("#classes")
    assert browser.text(".batch .file") == f"{HOSTILE}.png"
    assert not browser.find_all("img[src=x]")
    assert browser.run("return window.hurt") is None


@needs_browser
@pytest.mark.parametrize("width", [360, 1400])
@pytest.mark.parametrize("language", ["en", "zh"])
def test_nothing_is_wider_than_the_page(browser: Browser, served: Served, width: int, language: str) -> None:
    fits = "document.documentElement.scrollWidth <= document.documentElement.clientWidth"
    browser.size(width, 800)
    browser.run("localStorage.setItem('suanli.language', arguments[0])", language)
    browser.go(f"{served.url}/health")
    browser.until("document.querySelectorAll('tbody tr').length === 3")
    assert browser.run(f"return {fits}")
    browser.go(served.url)
    choose(browser, "odd")
    browser.click("#shell summary")
    give(browser, "drop", f"{'a-long-name-' * 20}.png", png(np.full((12, 12, 3), 60, np.uint8)))
    answers(browser)
    for tab in ("picture", "camera"):
        browser.click(f"#tab-{tab}")
        assert browser.run(f"return {fits}")
    choose(browser, "digits")
    browser.click("#tab-draw")
    assert browser.run("const c = document.getElementById('drawing'); return c.clientWidth === c.clientHeight")
    assert browser.run(f"return {fits}")


@needs_browser
def test_by_keyboard(browser: Browser) -> None:
    browser.run("document.getElementById('tab-draw').focus()")
    browser.press(RIGHT)
    assert browser.run("return document.activeElement.id") == "tab-picture"
    assert browser.find_all("#panel-picture:not([hidden])")
    browser.press(TAB)
    assert browser.run("return document.activeElement.id") == "files"
    ring = "getComputedStyle(document.querySelector('#files + label')).outlineStyle"
    assert browser.run(f"return {ring}") == "solid"
    unnamed = (
        "[...document.querySelectorAll('button, select, input, textarea, a, [role=tab], canvas, video')]"
        ".filter((e) => !e.hidden && !(e.innerText || e.getAttribute('aria-label') || e.labels?.length)).length"
    )
    assert browser.run(f"return {unnamed}") == 0


@needs_browser
def test_what_is_put_into_the_page_is_not_run(browser: Browser) -> None:
    browser.run(
        "const script = document.createElement('script'); script.textContent = 'window.hurt = 1';"
        "document.body.append(script)"
    )
    assert browser.run("return window.hurt") is None
    refused = browser.messages()
    assert len(refused) == 1
    assert "Content Security Policy" in refused[0]


@needs_browser
def test_health(browser: Browser, served: Served) -> None:
    browser.go(f"{served.url}/health")
    browser.until("document.querySelectorAll('tbody tr').length === 3")
    assert browser.text("#overall") == "Ready"
    cells = "[...document.querySelectorAll('tbody tr')].map((row) => [...row.cells].map((c) => c.lastChild.innerText))"
    before = {row[0].split("\n")[0]: row for row in browser.run(f"return {cells}")}
    assert before.keys() == {"digits", "odd", "reviews"}
    assert before["digits"][1] == "ready"
    assert before["digits"][2] == "eager float32"
    assert served.ask("POST", "/predict?model=digits", digit(1), {"Content-Type": "image/png"}).status == 200
    more = int(before["digits"][3]) + 1
    browser.until(f"{cells}.some((row) => row[0].startsWith('digits') && row[3] === '{more}')", seconds=5)


@needs_browser
def test_a_key_and_a_server_that_goes_and_comes_back(
    odd: Path, environment: dict[str, str], window: Browser, tmp_path: Path
) -> None:
    (tmp_path / "key").write_text("sesame\n")
    page = window
    even, uneven = (png(np.full((12, 12, 3), level, np.uint8)) for level in (60, 61))
    page.size(1400, 900)
    with serving(odd, "--api-key-file", str(tmp_path / "key"), environment=environment) as result:
        page.go(result.url)
        page.until("!document.getElementById('key-form').hidden")
        give(page, "drop", "9.png", uneven)
        page.until("document.querySelector('.batch .banner')")
        page.write("#key", f"wrong{ENTER}")
        page.until("document.getElementById('key-note').textContent.includes(\"didn't accept\")")
        page.run("document.getElementById('key').value = ''")
        page.write("#key", f"sesame{ENTER}")
        assert answers(page) == ["plain"]  # what had been refused is asked again
        assert not page.find_all("#key-form:not([hidden])")
        assert "sesame" not in page.run("return JSON.stringify(localStorage) + document.cookie")
        page.go(result.url)
        page.until("document.getElementById('title').textContent === 'odd'")
        give(page, "drop", "9.png", uneven)
        assert answers(page) == ["plain"]  # the tab has kept the key

    give(page, "drop", "6.png", even)
    page.until("document.querySelector('.batch .banner button')")
    assert "No connection" in page.text(".batch .banner")
    page.until("document.getElementById('notice').innerText.includes('No connection')")
    with serving(odd, "--port", str(result.port), environment=environment):
        page.until("document.getElementById('notice').hidden")
        page.click(".batch .banner button")
        assert answers(page) == [HOSTILE]
    page.run("sessionStorage.clear()")
    page.messages()  # the console tells of what was refused, and of what had gone


def test_what_the_server_sends_with_a_page(served: Served) -> None:
    folder = resources.files("suanli").joinpath(pages.FOLDER)
    tags = set()
    for path, name in (("/", "page.html"), ("/health", "health.html"), ("/page/page.js", "page.js")):
        first = served.ask("GET", path)
        assert first.status == 200
        assert first.body == folder.joinpath(name).read_bytes()
        assert first.headers["content-type"] == pages.MEDIA_TYPES[name.partition(".")[2]]
        assert "default-src 'none'" in first.headers["content-security-policy"]
        assert "unsafe" not in first.headers["content-security-policy"]
        assert {name.lower(): value for name, value in pages.SECURITY.items()}.items() <= first.headers.items()
        tag = first.headers["etag"]
        tags.add(tag)
        for known in (tag, f'"other", W/{tag}', "*"):
            again = served.ask("GET", path, headers={"If-None-Match": known})
            assert (again.status, again.body, again.headers["etag"]) == (304, b"", tag)
        assert served.ask("GET", path, headers={"If-None-Match": '"other"'}).status == 200
    assert len(tags) == 3
    for path in ("/page/", "/page/page.html", "/page/../report.html", "/page/%2e%2e/report.css", "/page", "/page.js"):
        assert served.ask("GET", path).status == 404, path


def test_pages_name_no_other_site_and_hold_no_script_or_style() -> None:
    folder = Path(pages.__file__).parents[1] / pages.FOLDER
    for file in folder.iterdir():
        text = file.read_text(encoding="utf-8").replace("http://www.w3.org/2000/svg", "")
        assert not re.search(r"(?:https?:)?//[\w-]+\.\w", text), file
        if file.suffix == ".html":
            assert not re.search(r"<script(?![^>]*src=)|<style|\sstyle=|\son\w+=", text), file


def test_both_languages_say_everything() -> None:
    text = (Path(pages.__file__).parents[1] / pages.FOLDER / "language.js").read_text(encoding="utf-8")
    _, english, chinese = re.split(r"^  (?:en|zh): \{$", text.partition("\n};\n")[0], flags=re.M)
    words = []
    for part in (english, chinese):
        _, *keys_and_texts = re.split(r"^    (\w+):", part, flags=re.M)
        words.append(dict(zip(keys_and_texts[::2], keys_and_texts[1::2], strict=True)))
    needed = {key for key in words[0] if not key.endswith("_one")}  # Chinese has one form
    assert needed == words[1].keys()
    for key in needed:
        assert set(re.findall(r"\{\w+\}", words[0][key])) == set(re.findall(r"\{\w+\}", words[1][key])), key
