"""A headless Chromium that sees no network, and that notices whatever a page complains of."""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

APT_SECONDS = 240


def find_chromium() -> str:
    """Its program; skips the test, with the reason, where there is none and none can be had."""
    pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
    found = shutil.which("chromium") or _installed()
    if found is None:
        pytest.skip("no Chromium: `chromium` is not on the PATH, and apt-get could not install it")
    return found


def _installed() -> str | None:
    """Chromium, after one attempt to install it where we may."""
    if os.geteuid() != 0 or shutil.which("apt-get") is None:
        return None
    install = ["apt-get", "install", "-y", "--no-install-recommends", "chromium"]
    try:
        for command in (["apt-get", "update"], install):  # a new machine has no lists of packages yet
            subprocess.run(command, capture_output=True, timeout=APT_SECONDS, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return shutil.which("chromium")


@contextmanager
def launched() -> Iterator[Any]:
    """A browser; it takes a second to start, so that tests share it."""
    program = find_chromium()
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=program, args=["--no-sandbox"])
        yield browser
        browser.close()


@contextmanager
def offline(browser: Any, **options: Any) -> Iterator[Any]:
    """A context without a network.

    Args:
        browser: From `launched`.
        **options: Of the context, such as ``viewport``.
    """
    context = browser.new_context(**{"viewport": {"width": 1280, "height": 900}, **options})
    context.set_offline(True)
    context.set_default_timeout(30_000)
    yield context
    context.close()


@contextmanager
def opened(context: Any, file: Path, fragment: str = "") -> Iterator[Any]:
    """A page of a file; at the end, nothing may have been asked of a network, and nothing complained of.

    Args:
        context: From `offline`.
        file: HTML.
        fragment: Of its address, with ``#``.
    """
    problems: list[str] = []
    page = context.new_page()

    def route(route: Any) -> None:
        url = route.request.url
        if url.startswith(("file:", "data:")):
            route.continue_()
        else:
            problems.append(f"asked for {url}")
            route.abort()

    def dismiss(dialog: Any) -> None:
        problems.append(f"dialog: {dialog.message}")
        dialog.dismiss()

    page.route("**/*", route)
    page.on("console", lambda message: problems.append(f"console: {message.text}"))
    page.on("pageerror", lambda error: problems.append(f"error: {error}"))
    page.on("dialog", dismiss)
    try:
        page.goto(file.as_uri() + fragment)
        yield page
    finally:
        page.close()
    assert not problems, "; ".join(problems)
