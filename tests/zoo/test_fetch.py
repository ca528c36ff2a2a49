"""Fetching a model: a wheel of our own, offered to pip by a server on this machine."""

from __future__ import annotations

import hashlib
import os
import signal
import subprocess
import sys
import threading
import zipfile
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import partial
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
import yaml

from paring import zoo
from paring.errors import ZooError

WHEEL = "paring_fake_model-1.0-py3-none-any.whl"
MODEL = bytes(range(256)) * 4000
FETCH = [sys.executable, "-c", "from paring import zoo; print(zoo.fetch('zoo:fake'))"]


def wheel_bytes(folder: Path, model: bytes) -> bytes:
    path = folder / WHEEL
    info = "paring_fake_model-1.0.dist-info"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("fake/model.gguf", model)
        archive.writestr(
            f"{info}/METADATA", "Metadata-Version: 2.1\nName: paring-fake-model\nVersion: 1.0\n"
        )
        archive.writestr(
            f"{info}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n"
        )
        archive.writestr(f"{info}/RECORD", "")
    return path.read_bytes()


@dataclass
class Shop:
    """What the server offers, and what it was asked for."""

    wheel: bytes
    cards: Path
    cache: Path
    downloads: int = 0
    half_sent: threading.Event = field(default_factory=threading.Event)
    go_on: threading.Event = field(default_factory=threading.Event)

    def write_card(self, **member: Any) -> None:
        """Write the card of the true wheel, `member`'s keys changed."""
        card = {
            "stub": "zoo:fake",
            "kind": "model",
            "title": "Fake",
            "licence": "Apache-2.0",
            "source": "nowhere",
            "architecture": "LlamaForCausalLM",
            "format": "gguf",
            "wheel": {
                "package": "paring-fake-model",
                "version": "1.0",
                "sha256": hashlib.sha256(self.wheel).hexdigest(),
                "bytes": len(self.wheel),
            },
            "member": {
                "path": "fake/model.gguf",
                "sha256": hashlib.sha256(MODEL).hexdigest(),
                "bytes": len(MODEL),
                **member,
            },
        }
        (self.cards / "fake.yaml").write_text(yaml.safe_dump(card))


class Handler(BaseHTTPRequestHandler):
    def __init__(self, shop: Shop, *args: Any) -> None:
        self.shop = shop
        super().__init__(*args)

    def do_GET(self) -> None:
        self.send_response(200)
        if not self.path.endswith(".whl"):
            body = f'<!DOCTYPE html><html><body><a href="/{WHEEL}">wheel</a></body></html>'.encode()
            self.send_header("Content-Type", "text/html")
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)
            return
        self.shop.downloads += 1
        half = len(self.shop.wheel) // 2
        self.send_header("Content-Type", "application/octet-stream")
        self.send_header("Content-Length", str(len(self.shop.wheel)))
        self.end_headers()
        self.wfile.write(self.shop.wheel[:half])
        self.wfile.flush()
        self.shop.half_sent.set()
        self.shop.go_on.wait(30)
        self.wfile.write(self.shop.wheel[half:])

    def log_message(self, *args: Any) -> None:
        """Stay quiet."""


class Server(ThreadingHTTPServer):
    daemon_threads = True

    def handle_error(self, *args: Any) -> None:
        """A killed client hangs up in the middle; that is what the test wants."""


@pytest.fixture
def shop(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Shop]:
    """A shop with one good wheel and its card, in the user's pip configuration."""
    cards, cache = tmp_path / "cards", tmp_path / "cache"
    cards.mkdir()
    shop = Shop(wheel_bytes(tmp_path, MODEL), cards, cache)
    shop.go_on.set()
    shop.write_card()
    server = Server(("127.0.0.1", 0), partial(Handler, shop))
    thread = threading.Thread(target=server.serve_forever, args=(0.05,))
    thread.start()
    for name, value in {
        "PARING_CARDS": str(cards),
        "PARING_CACHE": str(cache),
        "PIP_CONFIG_FILE": "/dev/null",
        "PIP_NO_INDEX": "1",
        "PIP_NO_CACHE_DIR": "1",
        "PIP_FIND_LINKS": f"http://127.0.0.1:{server.server_address[1]}/",
        "NO_PROXY": "127.0.0.1",
    }.items():
        monkeypatch.setenv(name, value)
    yield shop
    shop.go_on.set()
    server.shutdown()
    server.server_close()
    thread.join()


def left_in(cache: Path) -> list[Path]:
    """Everything in the cache but lock files."""
    return [path for path in cache.rglob("*") if path.is_file() and path.suffix != ".lock"]


def test_fetches_once_and_serves_from_the_cache(shop: Shop) -> None:
    seen: list[tuple[str, int, int]] = []
    folder = zoo.fetch(
        "zoo:fake", progress=lambda label, done, total, note="": seen.append((label, done, total))
    )
    assert [path.name for path in folder.iterdir()] == ["model.gguf"]
    assert (folder / "model.gguf").read_bytes() == MODEL
    assert folder.is_relative_to(shop.cache)
    assert seen[-1] == ("downloading zoo:fake", 1, 1)
    assert zoo.fetch("zoo:fake") == folder == zoo.where("zoo:fake")
    assert shop.downloads == 1


def test_a_damaged_copy_in_the_cache_is_fetched_again(shop: Shop) -> None:
    file = zoo.fetch("zoo:fake") / "model.gguf"
    file.write_bytes(MODEL[:-1] + b"x")
    with pytest.raises(ZooError, match="not in the cache"):
        zoo.where("zoo:fake")
    assert zoo.fetch("zoo:fake") == file.parent
    assert file.read_bytes() == MODEL
    assert shop.downloads == 2


def test_a_wheel_that_is_not_the_cards_is_refused(shop: Shop, tmp_path: Path) -> None:
    shop.wheel = wheel_bytes(tmp_path, MODEL[::-1])
    with pytest.raises(ZooError, match="zoo:fake: .*whl is not what the card promises: sha256"):
        zoo.fetch("zoo:fake")
    assert left_in(shop.cache) == []


@pytest.mark.parametrize(
    ("member", "message"),
    [
        ({"sha256": "0" * 64}, "fake/model.gguf is not what the card promises"),
        ({"path": "fake/other.gguf"}, "has no readable fake/other.gguf"),
    ],
)
def test_a_member_that_is_not_the_cards_is_refused(
    shop: Shop, member: dict[str, str], message: str
) -> None:
    shop.write_card(**member)
    with pytest.raises(ZooError, match=message):
        zoo.fetch("zoo:fake")
    assert left_in(shop.cache) == []


def test_what_pip_says_is_told(shop: Shop, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PIP_FIND_LINKS", str(shop.cards))
    with pytest.raises(
        ZooError, match="could not download paring-fake-model==1.0(.|\n)*No matching"
    ):
        zoo.fetch("zoo:fake")
    assert left_in(shop.cache) == []


def test_killed_in_the_middle_leaves_nothing_taken_for_whole(shop: Shop) -> None:
    shop.go_on.clear()
    killed = subprocess.Popen(FETCH, start_new_session=True, stdout=subprocess.DEVNULL)
    try:
        assert shop.half_sent.wait(30)
    finally:
        os.killpg(killed.pid, signal.SIGKILL)
        killed.wait()
    shop.go_on.set()
    with pytest.raises(ZooError, match="not in the cache; run `recipe zoo fetch zoo:fake`"):
        zoo.where("zoo:fake")
    assert list((shop.cache / "zoo").glob(".*.partial"))
    folder = zoo.fetch("zoo:fake")
    assert left_in(shop.cache) == [folder / "model.gguf"]
    assert not list((shop.cache / "zoo").glob(".*.partial"))
    assert shop.downloads == 2


def test_two_processes_at_once_download_once(shop: Shop) -> None:
    shop.go_on.clear()
    both = [subprocess.Popen(FETCH, stdout=subprocess.PIPE, text=True) for _ in range(2)]
    try:
        assert shop.half_sent.wait(30)
        shop.go_on.set()
        folders = [process.communicate(timeout=60)[0].strip() for process in both]
    finally:
        for process in both:
            process.kill()
            process.communicate()
    assert folders == [str(zoo.where("zoo:fake"))] * 2
    assert shop.downloads == 1
