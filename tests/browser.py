"""A real headless browser for tests; they skip where none is installed."""

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest

_NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable", "chrome")


@contextmanager
def page(**context: Any) -> Iterator[Any]:
    """A page in the machine's Chromium, driven by Playwright; `problems` collects the errors of scripts and console."""
    playwright = pytest.importorskip("playwright.sync_api")
    executable = next(filter(None, map(shutil.which, _NAMES)), None)
    if executable is None:
        pytest.skip("no Chromium on this machine: apt-get install chromium")
    with playwright.sync_playwright() as play:
        browser = play.chromium.launch(executable_path=executable, args=["--no-sandbox"])
        try:
            made = browser.new_context(viewport={"width": 1280, "height": 900}, **context).new_page()
            made.problems = []
            made.on("console", lambda said: said.type == "error" and made.problems.append(said.text))
            made.on("pageerror", lambda error: made.problems.append(str(error)))
            yield made
        finally:
            browser.close()


def screenshot(page: Any, file: Path, selector: str | None = None) -> np.ndarray:
    """The pixels of the page, or of an element: uint8 [height, width, 3]; also kept in a PNG file."""
    from matplotlib.image import imread

    if selector is None:
        page.screenshot(path=file, full_page=True)
    else:
        page.locator(selector).screenshot(path=file)
    return (imread(file)[..., :3] * 255).round().astype(np.uint8)


def share_of(pixels: np.ndarray, hexadecimal: str) -> float:
    """The share of pixels of about this colour."""
    wanted = np.array([int(hexadecimal[i : i + 2], 16) for i in (1, 3, 5)])
    return float((np.abs(pixels.astype(int) - wanted).max(-1) < 12).mean())
