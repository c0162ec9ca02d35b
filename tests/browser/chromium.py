"""A headless Chromium: opens a page, tells what is wrong with it, and takes its picture."""

import json
from pathlib import Path
from typing import Any

from selenium.webdriver import ActionChains, Chrome


class Chromium:
    """One browser with one tab."""

    def __init__(self, driver: Chrome) -> None:
        self._driver, self._cdp = driver, driver.execute_cdp_cmd

    def open(self, url: str, width: int, height: int, *, scale: float = 1) -> None:
        """Open a page in a window of `width` by `height` CSS pixels, and wait until it is loaded.

        A CSS pixel is `scale` pixels wide and high in pictures.
        """
        size = {"width": width, "height": height, "deviceScaleFactor": scale, "mobile": False}
        self._cdp("Emulation.setDeviceMetricsOverride", size)
        self.errors()  # Forget those of the page before.
        self._driver.get(url)

    def prefer(self, scheme: str) -> None:
        """Set the `prefers-color-scheme` that pages see: light or dark."""
        features = [{"name": "prefers-color-scheme", "value": scheme}]
        self._cdp("Emulation.setEmulatedMedia", {"features": features})

    def keys(self, keys: str) -> None:
        """Press keys, one after the other, wherever the focus is."""
        ActionChains(self._driver, duration=0).send_keys(keys).perform()

    def heap(self) -> int:
        """Return the size of the page's objects in bytes, after a garbage collection."""
        self._cdp("HeapProfiler.collectGarbage", {})
        return int(self._cdp("Runtime.getHeapUsage", {})["usedSize"])

    def slow_down(self, factor: int) -> None:
        """Give the page a fraction of the CPU from now on; 1 gives it all."""
        self._cdp("Emulation.setCPUThrottlingRate", {"rate": factor})

    def names(self) -> dict[str, list[str]]:
        """Return the names that a screen reader says, by role."""
        found: dict[str, list[str]] = {}
        for node in self._cdp("Accessibility.getFullAXTree", {})["nodes"]:
            if not node["ignored"]:
                role = str(node["role"]["value"])
                found.setdefault(role, []).append(str(node.get("name", {}).get("value", "")))
        return found

    def run(self, script: str, *arguments: object) -> Any:
        """Run the body of a JavaScript function in the page and return what it returns.

        Selenium's own way leaves some kilobytes in the page each time. Raises RuntimeError for
        what the function throws.
        """
        call = f"(function () {{{script}}})(...{json.dumps(arguments)})"
        answer = self._cdp("Runtime.evaluate", {"expression": call, "returnByValue": True})
        if "exceptionDetails" in answer:
            raise RuntimeError(answer["exceptionDetails"])
        return answer["result"].get("value")

    def errors(self) -> list[str]:
        """Return the errors of scripts and of loading since the page was opened or last asked."""
        entries = self._driver.get_log("browser")
        return [str(entry["message"]) for entry in entries if entry["level"] == "SEVERE"]

    def overflow(self) -> int:
        """Return by how many CSS pixels the page is wider than its window."""
        script = "return document.documentElement.scrollWidth - window.innerWidth"
        return max(0, int(self.run(script)))

    def picture(self, path: Path, element: str = "") -> None:
        """Write a PNG of the window, or of the one element that a CSS selector names."""
        if element:
            png = self._driver.find_element("css selector", element).screenshot_as_png
        else:
            png = self._driver.get_screenshot_as_png()
        path.write_bytes(png)
