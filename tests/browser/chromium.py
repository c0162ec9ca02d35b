"""A headless Chromium: opens a page, tells what it complains of, and takes its picture."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from selenium.webdriver import ActionChains, Chrome, ChromeOptions, ChromeService

_ARGUMENTS = (
    "--headless=new",
    "--no-proxy-server",
    "--hide-scrollbars",
    # A page has to be whole without the outside: no other name resolves.
    "--host-resolver-rules=MAP * ~NOTFOUND, EXCLUDE 127.0.0.1",
)


class Chromium:
    """One browser with one tab. Made by `start_chromium`."""

    def __init__(self, driver: Chrome) -> None:
        self._driver = driver

    def open(self, url: str, width: int, height: int, *, scale: float = 1) -> None:
        """Open a page in a window of `width` by `height` CSS pixels, and wait until it is loaded.

        `scale` is how many pixels of a picture make one of them.
        """
        size = {"width": width, "height": height, "deviceScaleFactor": scale, "mobile": False}
        self._driver.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)
        self.errors()  # Those of the page before are of no interest any more.
        self._driver.get(url)

    def prefer(self, scheme: str) -> None:
        """Have pages see `prefers-color-scheme`: light or dark."""
        features = [{"name": "prefers-color-scheme", "value": scheme}]
        self._driver.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": features})

    def keys(self, keys: str) -> None:
        """Press keys, one after the other, wherever the focus is."""
        ActionChains(self._driver, duration=0).send_keys(keys).perform()

    def heap(self) -> int:
        """Return how many bytes the page's objects take, after a collection of garbage."""
        self._driver.execute_cdp_cmd("HeapProfiler.collectGarbage", {})
        return int(self._driver.execute_cdp_cmd("Runtime.getHeapUsage", {})["usedSize"])

    @contextmanager
    def slowed(self, factor: int) -> Iterator[None]:
        """Give the page that much less of the CPU while the block runs."""
        self._driver.execute_cdp_cmd("Emulation.setCPUThrottlingRate", {"rate": factor})
        yield
        self._driver.execute_cdp_cmd("Emulation.setCPUThrottlingRate", {"rate": 1})

    def names(self) -> dict[str, list[str]]:
        """Return the names that a screen reader says, by role."""
        found: dict[str, list[str]] = {}
        for node in self._driver.execute_cdp_cmd("Accessibility.getFullAXTree", {})["nodes"]:
            if not node["ignored"]:
                role = str(node["role"]["value"])
                found.setdefault(role, []).append(str(node.get("name", {}).get("value", "")))
        return found

    def run(self, script: str, *arguments: object) -> Any:
        """Run the body of a JavaScript function in the page and return what it returns.

        Not by Selenium's own way, of which each run leaves some kilobytes in the page. Raises
        RuntimeError for what the function throws.
        """
        call = f"(function () {{{script}}})(...{json.dumps(arguments)})"
        asked = {"expression": call, "returnByValue": True}
        answer = self._driver.execute_cdp_cmd("Runtime.evaluate", asked)
        if "exceptionDetails" in answer:
            raise RuntimeError(answer["exceptionDetails"])
        return answer["result"].get("value")

    def errors(self) -> list[str]:
        """Return what has failed, scripts and loading, since the page was opened or last asked."""
        entries = self._driver.get_log("browser")
        return [str(entry["message"]) for entry in entries if entry["level"] == "SEVERE"]

    def overflow(self) -> int:
        """Return by how many CSS pixels the page is wider than its window."""
        script = "return document.documentElement.scrollWidth - window.innerWidth"
        return max(0, int(self.run(script)))

    def picture(self, path: Path, element: str | None = None) -> None:
        """Write a PNG of the window, or of the one element that a CSS selector names."""
        if element is None:
            png = self._driver.get_screenshot_as_png()
        else:
            png = self._driver.find_element("css selector", element).screenshot_as_png
        path.write_bytes(png)


@contextmanager
def start_chromium() -> Iterator[Chromium]:
    """Run a browser while the block runs; raises RuntimeError if there is none."""
    driver = shutil.which("chromedriver")
    if driver is None:
        raise RuntimeError("chromedriver is missing: make browser-test installs it")
    options = ChromeOptions()
    for argument in _ARGUMENTS:
        options.add_argument(argument)
    if os.geteuid() == 0:
        # Chromium refuses to sandbox its parts for root.
        options.add_argument("--no-sandbox")
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    chrome = Chrome(options, ChromeService(driver))
    try:
        yield Chromium(chrome)
    finally:
        chrome.quit()
