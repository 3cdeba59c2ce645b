"""Takes docs/img/atom-page.png and docs/img/atom-index.png, pictures of the pages about atoms of `tiny-gdn`.

writesae pages tiny-gdn/L2H1 tiny-gdn/L0H0 --out runs/pages-tiny-gdn
python docs/img/atom_pages.py runs/pages-tiny-gdn
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

from PIL import Image

FOLDER = Path(__file__).parent
sys.path.insert(0, str(FOLDER.parents[1] / "tests" / "helpers"))

from browser import chromium, watch  # noqa: E402

ATOM = "L2H1/atom/{:05d}.html"


def save(page: Any, name: str) -> None:
    """What is in sight of a page, in few colours, which takes a third of the bytes."""
    path = FOLDER / name
    page.screenshot(path=path)
    Image.open(path).convert("RGB").quantize(128).save(path, optimize=True)
    print(path, path.stat().st_size, "bytes")


def take(site: Path, atom: int) -> None:
    """Both pictures."""
    with chromium() as browser:
        seen = watch(browser, viewport={"width": 1000, "height": 1560}, color_scheme="light")
        seen.page.goto((site / ATOM.format(atom)).resolve().as_uri())
        seen.page.locator("#strongest li").nth(2).locator(".t.here").hover()
        save(seen.page, "atom-page.png")
        seen.page.set_viewport_size({"width": 1180, "height": 880})
        seen.page.goto((site / "index.html").resolve().as_uri())
        seen.page.locator("#search").fill("captain")
        save(seen.page, "atom-index.png")
        seen.check()


if __name__ == "__main__":
    take(Path(sys.argv[1]), int(sys.argv[2]) if len(sys.argv) > 2 else 671)
