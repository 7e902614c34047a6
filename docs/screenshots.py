"""Opens TensorBoard in a real browser, without a screen, and photographs what the dashboard shows.

``python docs/screenshots.py lightning_logs shots`` needs playwright, and a Chromium: the system's
(``apt install chromium``) or playwright's own (``playwright install chromium``).
"""

import argparse
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from urllib.error import URLError
from urllib.request import urlopen

from playwright.sync_api import Page, sync_playwright

TABS = ("scalars", "images", "hparams")
BROWSERS = ("chromium", "chromium-headless-shell", "google-chrome")


@contextmanager
def tensorboard(logdir: Path) -> Iterator[str]:
    """The address of a TensorBoard that runs meanwhile."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{free.getsockname()[1]}"
    command = [sys.executable, "-m", "tensorboard.main", "--logdir", str(logdir), "--port", address.rpartition(":")[2]]
    server = subprocess.Popen(
        [*command, "--samples_per_plugin", "images=100"], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    try:
        deadline = time.monotonic() + 120
        while True:
            try:
                # it answers at once, and knows the tags when it has read the files
                tags = urlopen(f"http://{address}/data/plugin/images/tags").read()
                if len(tags) > 2:
                    break
            except URLError:
                pass
            if time.monotonic() > deadline:
                raise TimeoutError(f"TensorBoard shows no images of {logdir}")
            time.sleep(0.5)
        yield f"http://{address}"
    finally:
        server.terminate()
        server.wait()


def photograph(page: Page, address: str, tab: str, path: Path) -> None:
    """Photograph a tab when it has drawn everything."""
    page.goto(f"{address}/?darkMode=false#{tab}", wait_until="networkidle")
    page.wait_for_timeout(3000)  # the cards fade in
    page.screenshot(path=path)


def main() -> None:
    """Photograph every tab."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("logdir", type=Path, help="folder of the runs")
    parser.add_argument("out", type=Path, help="folder of the pictures, a PNG a tab")
    options = parser.parse_args()
    options.out.mkdir(parents=True, exist_ok=True)
    installed = next((path for name in BROWSERS if (path := shutil.which(name))), None)
    with tensorboard(options.logdir) as address, sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=installed, args=["--no-sandbox"])
        page = browser.new_page(viewport={"width": 1500, "height": 1000})
        for tab in TABS:
            photograph(page, address, tab, options.out / f"{tab}.png")
        browser.close()


if __name__ == "__main__":
    main()
