"""The server over real HTTP and in a real Chromium: what fires in a typed text, a text steered, and who is answered."""

from __future__ import annotations

import http.client
import json
import threading
import time
from collections.abc import Iterator
from typing import Any

import pytest

import pages
import writesae as ws
from browser import chromium, watch
from pages import hooked, part
from writesae.zoo import shipped_saes

uvicorn = pytest.importorskip("uvicorn", reason="needs the extra [serve]")
pytest.importorskip("starlette", reason="needs the extra [serve]")

from writesae.pages.serve import MOST_NEW, application  # noqa: E402

pytestmark = pytest.mark.filterwarnings(
    "ignore:unclosed:ResourceWarning",  # Playwright's pipes, when it is torn down
    "ignore::DeprecationWarning:uvicorn",
)
TEXT = "The state of the Union is strong"


@pytest.fixture(scope="module")
def port() -> Iterator[int]:
    app = application(hooked(), part(), pages.site(), name="tiny-gdn/L2H1")
    server = uvicorn.Server(
        uvicorn.Config(app, host="127.0.0.1", port=0, log_level="warning", loop="asyncio", http="h11")
    )
    thread = threading.Thread(target=server.run, daemon=True)
    thread.start()
    while not server.started:
        assert thread.is_alive()
        time.sleep(0.05)
    yield server.servers[0].sockets[0].getsockname()[1]
    server.should_exit = True
    thread.join(20)


def ask(port: int, path: str, values: Any = None, **headers: str) -> tuple[int, Any]:
    """Status and body of an answer: JSON of ours, text of pages."""
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=120)
    sent = {"Content-Type": "application/json"} | {name.replace("_", "-"): value for name, value in headers.items()}
    body = values if isinstance(values, str) else json.dumps(values)
    connection.request("GET" if values is None else "POST", path, None if values is None else body, sent)
    answer = connection.getresponse()
    read = answer.read().decode()
    connection.close()
    return answer.status, json.loads(read) if path.startswith("/api") and read.startswith("{") else read


def test_it_reads_as_encode_does(port: int) -> None:
    status, found = ask(port, "/api/read", {"text": TEXT})
    model, codes = hooked(), hooked().encode(part(), TEXT)
    assert status == 200
    assert [one["token"] for one in found["tokens"]] == model.to_str_tokens(TEXT)
    for one, atoms, values in zip(found["tokens"], codes.indices[0], codes.values[0], strict=True):
        wanted = [(int(i), float(v)) for i, v in zip(atoms, values, strict=True) if v > 0]
        assert [i for i, _ in one["atoms"]] == [i for i, _ in wanted]
        assert [v for _, v in one["atoms"]] == pytest.approx([v for _, v in wanted], rel=1e-3)
    assert any(one["atoms"] for one in found["tokens"])
    _, other = ask(port, "/api/read", {"text": "Call me Ishmael"})
    assert other != found


def test_it_steers(port: int) -> None:
    asked = {"text": TEXT, "atom": 5, "scale": 4, "n_tokens": 8}
    status, found = ask(port, "/api/steer", asked)
    assert status == 200 and len(found["before"]) == len(found["after"]) == 8
    assert found["before"] != found["after"] and found["before"][: found["same"]] == found["after"][: found["same"]]
    _, none = ask(port, "/api/steer", asked | {"scale": 0})
    assert none["before"] == none["after"] == found["before"] and none["same"] == 8


def test_what_it_refuses(port: int) -> None:
    good = {"text": TEXT, "atom": 5, "scale": 4, "n_tokens": 8}
    for change, said in (
        ({"text": ""}, "give a text that is not empty"),
        ({"text": 3}, "give a text that is not empty"),
        ({"text": "a " * 4000}, "allowed are 1 to 2048"),
        ({"atom": 40}, "atom=40: allowed are 0 to 39"),
        ({"atom": "5"}, "atom='5': allowed"),
        ({"scale": 1e9}, "allowed are numbers from -100 to 100"),
        ({"n_tokens": MOST_NEW + 1}, f"allowed are 1 to {MOST_NEW}"),
    ):
        status, found = ask(port, "/api/steer", good | change)
        assert status == 400 and said in found["error"], change
    assert ask(port, "/api/steer", "{")[0] == 400 and ask(port, "/api/steer", [1])[0] == 400
    assert ask(port, "/api/read", {"text": TEXT}, Content_Type="text/plain")[0] == 415, "as another site's form sends"
    assert ask(port, "/", None, Host="elsewhere.example")[0] == 400, "another name that leads here"
    assert ask(port, "/../pyproject.toml")[0] == 404 and ask(port, "/no-such-page")[0] == 404
    with pytest.raises(FileNotFoundError, match="write the site first"):
        application(hooked(), part(), "no such folder")
    other = ws.WriteSAE.from_pretrained(shipped_saes("tiny-rwkv7")[0])
    with pytest.raises(ValueError):
        application(hooked(), other, pages.site())


def test_in_a_browser(port: int) -> None:
    from playwright.sync_api import expect  # it waits without a script in the page, which the page's policy forbids

    expect.set_options(timeout=60_000)
    with chromium() as browser:
        seen = watch(browser, viewport=dict(width=1000, height=900))
        page = seen.page
        page.goto(f"http://127.0.0.1:{port}/")
        page.get_by_role("link", name="Type a text, and steer").click()
        page.wait_for_selector("#tokens .t")
        page.locator("#text").fill("<img src=x onerror=alert(1)> the State of the Union")
        page.locator("#read").click()
        expect(page.locator("#tokens")).to_contain_text("onerror")
        assert page.locator("img").count() == 0 and page.locator("#tokens .t.on").count() > 2
        page.locator("#fired button").first.click()
        expect(page.locator("#before")).not_to_be_empty()
        expect(page.locator("#said")).to_be_empty()
        before = page.locator("#before").inner_text()
        page.locator("#scale").fill("8")
        assert page.locator("#strength").inner_text() == "+8"
        after = page.locator("#after").inner_text()
        page.locator("#scale").dispatch_event("change")
        expect(page.locator("#after")).not_to_have_text(after)
        assert page.locator("#before").inner_text() == before and page.locator("#after").inner_text() != before
        held: list[Any] = []
        page.route("**/api/steer", lambda route: held.append(route), times=1)
        page.locator("#steer").click()
        expect(page.locator("#said")).to_contain_text("running")
        page.locator("#atom").fill("99999")
        page.locator("#steer").click()
        expect(page.locator("#said")).to_contain_text("allowed are 0 to 39")
        with page.expect_response("**/api/steer"):  # the first question is answered after the second
            held[0].continue_()
        page.wait_for_timeout(500)
        expect(page.locator("#said")).to_contain_text("allowed are 0 to 39")
        assert all(url.startswith((f"http://127.0.0.1:{port}/", "data:", "blob:")) for url in seen.requests)
        assert [e for e in seen.errors if "400" not in e] == [] and seen.dialogs == []
