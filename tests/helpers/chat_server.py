"""A server on the loopback that speaks the chat-completions protocol. It knows nothing of ours but the questions."""

from __future__ import annotations

import json
import re
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

Fault = Callable[["Handler", int], bool]  # given the number of the call; whether it was answered otherwise


class Oracle(ThreadingHTTPServer):
    """Labels are ``the word "cat"``, of the word that is marked most; judges look whether it is there, or marked."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.fault: Fault = lambda handler, number: False
        self.n, self.lock = 0, threading.Lock()
        self.seen: list[dict[str, Any]] = []  # questions
        self.keys: list[str | None] = []

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}/v1"

    def handle_error(self, request: Any, client_address: Any) -> None:
        """A client that goes away is no news."""


class Handler(BaseHTTPRequestHandler):
    server: Oracle

    def do_GET(self) -> None:
        self.send(200, {"data": []})

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        with self.server.lock:
            self.server.n += 1
            number = self.server.n
            self.server.seen.append(body)
            self.server.keys.append(self.headers.get("Authorization"))
        if not self.server.fault(self, number):
            self.answer(answer(body["messages"][-1]["content"]))

    def answer(self, text: str, why: str = "stop") -> None:
        self.send(200, {"choices": [{"message": {"content": text}, "finish_reason": why}]})

    def send(self, status: int, body: Any, **headers: str) -> None:
        data = json.dumps(body).encode()
        self.send_response(status)
        for name, value in {"Content-Length": str(len(data)), **headers}.items():
            self.send_header(name.replace("_", "-"), value)
        self.end_headers()
        self.wfile.write(data)

    def log_message(self, *args: Any) -> None:
        """No log."""


def answer(question: str) -> str:
    if question.startswith("Active:"):
        marked = Counter(one for part in re.findall(r"<<(.*?)>>", question) for one in part.split())
        return json.dumps({"label": f'the word "{marked.most_common(1)[0][0]}"'})
    word = re.search(r'the word \\"(\w+)\\"', question.splitlines()[0])
    assert word is not None, question
    texts = [json.loads(line.split(". ", 1)[1]) for line in question.splitlines()[2:]]
    if any("<<" in text for text in texts):
        texts = [" ".join(re.findall(r"<<(.*?)>>", text)) for text in texts]
    return json.dumps({"answers": [int(word[1] in text.split()) for text in texts]})


@contextmanager
def oracle(fault: Fault | None = None) -> Iterator[Oracle]:
    server = Oracle()
    if fault is not None:
        server.fault = fault
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True)
    thread.start()
    try:
        yield server
    finally:
        server.shutdown()
        server.server_close()


def drop(handler: Handler) -> None:
    """Close the connection in the middle of a response."""
    handler.send_response(200)
    handler.send_header("Content-Length", "100")
    handler.end_headers()
    handler.wfile.write(b'{"choices": [')
    handler.close_connection = True


def sleep(seconds: float) -> None:
    time.sleep(seconds)
