"""The site from a local server that also runs the model: what fires in a typed text, and how it goes on steered.

Only this machine is answered, and only pages that this server sent may ask: a request has to name this machine, so that
no other site's name can lead to it, and to bring JSON, which a browser lets no other site send.
"""

from __future__ import annotations

import threading
from pathlib import Path
from typing import TYPE_CHECKING, Any

from jaxtyping import Int
from torch import Tensor

from writesae.hooks.attachable import fit
from writesae.jobs.extras import need
from writesae.pages.effects import steer
from writesae.pages.render import asset, digits, render, shown
from writesae.pages.survey import token_string

if TYPE_CHECKING:
    from starlette.applications import Starlette

    from writesae.model import HookedRecurrentModel
    from writesae.saes import WriteSAE

HOST, HOSTS = "127.0.0.1", ["127.0.0.1", "localhost"]
MOST_TEXT, MOST_NEW = 2048, 200  # tokens of a text that is read, and of a continuation
LINK = '<nav class="site" aria-label="Server"><a href="try.html">Type a text, and steer</a></nav>'


class Refused(ValueError):
    """What a request asked for can't be done; the message is for the person who asked."""


def application(
    model: HookedRecurrentModel, sae: WriteSAE, site: str | Path, *, name: str = "", check_model: bool = True
) -> Starlette:
    """The server, as an application for any ASGI server; `writesae serve` runs it on loopback.

    Args:
        model: the model.
        sae: an SAE of one of its heads.
        site: the folder of a site of this SAE, as `write_pages` made it.
        name: the SAE's name, for the title.
        check_model: refuse an SAE trained on other weights.

    Raises:
        ValueError: an SAE that does not say its head, or one of another model; a site of several SAEs.
        FileNotFoundError: the folder holds no site.
        ImportError: the extra ``[serve]`` is not installed.
    """
    need("starlette")
    from starlette.applications import Starlette
    from starlette.concurrency import run_in_threadpool
    from starlette.middleware import Middleware
    from starlette.middleware.trustedhost import TrustedHostMiddleware
    from starlette.responses import HTMLResponse, JSONResponse, Response
    from starlette.routing import Mount, Route
    from starlette.staticfiles import StaticFiles

    fit(sae, model, check_model=check_model)
    folder = Path(site)
    if not (folder / "index.html").is_file():
        raise FileNotFoundError(f"{folder / 'index.html'} does not exist: write the site first, `writesae pages`")
    if not (folder / "atom").is_dir():
        raise ValueError(f"{folder} holds a site of several SAEs, and the server runs one: write that one's own site")
    one_at_a_time = threading.Lock()

    def asking(answer: Any) -> Any:
        async def endpoint(request: Any) -> Any:
            if request.headers.get("content-type", "").partition(";")[0] != "application/json":
                return JSONResponse({"error": "send JSON, with Content-Type: application/json"}, 415)
            try:
                values = await request.json()
                if not isinstance(values, dict):
                    raise Refused("send an object, {...}")
                return JSONResponse(await run_in_threadpool(answer, values))
            except ValueError as error:  # JSON that is none is one too
                return JSONResponse({"error": str(error)}, 400)

        return endpoint

    def read(values: dict[str, Any]) -> dict[str, Any]:
        with one_at_a_time:
            return firings(model, sae, text_ids(model, values))

    def go_on(values: dict[str, Any]) -> dict[str, Any]:
        with one_at_a_time:
            return steered(model, sae, values)

    def index(_: Any) -> Any:
        page = (folder / "index.html").read_text("utf-8")
        return HTMLResponse(page.replace("<body>", f"<body>\n{LINK}", 1))

    def try_it(_: Any) -> Any:
        text = "The state of the Union is strong, and the people are"
        about = {"study": {"name": name}, "cfg": sae.cfg, "text": text, "atom": 0, "most": MOST_NEW}
        return HTMLResponse(render("serve", **about))

    def script(_: Any) -> Any:
        return Response(asset("serve.js"), media_type="text/javascript")

    def style(_: Any) -> Any:
        return Response(asset("style.css"), media_type="text/css")

    routes = [
        Route("/", index),
        Route("/index.html", index),
        Route("/try.html", try_it),
        Route("/assets/serve.js", script),
        Route("/assets/style.css", style),
        Route("/api/read", asking(read), methods=["POST"]),
        Route("/api/steer", asking(go_on), methods=["POST"]),
        Mount("/", StaticFiles(directory=folder)),
    ]
    return Starlette(routes=routes, middleware=[Middleware(TrustedHostMiddleware, allowed_hosts=HOSTS)])


def text_ids(model: HookedRecurrentModel, values: dict[str, Any]) -> Int[Tensor, " pos"]:
    """Token ids of the text of a request; `Refused` if there is none, or too much."""
    text = values.get("text")
    if not isinstance(text, str) or not text:
        raise Refused("text: give a text that is not empty")
    ids = model.to_tokens(text)[0][0]
    if not 0 < len(ids) <= MOST_TEXT:
        raise Refused(f"the text has {len(ids)} tokens: allowed are 1 to {MOST_TEXT}")
    return ids


def firings(model: HookedRecurrentModel, sae: WriteSAE, ids: Int[Tensor, " pos"]) -> dict[str, Any]:
    """Of each token of a text, the atoms that are active there and their activations, strongest first."""
    codes = model.encode(sae, ids[None], check_model=False)
    rows = zip(ids.tolist(), codes.indices[0].tolist(), codes.values[0].tolist(), strict=True)
    return {
        "tokens": [
            {
                "token": shown(token_string(model, token)),
                "atoms": [(i, digits(x)) for i, x in zip(atoms, values, strict=True) if x > 0],
            }
            for token, atoms, values in rows
        ]
    }


def steered(model: HookedRecurrentModel, sae: WriteSAE, values: dict[str, Any]) -> dict[str, Any]:
    """How a text goes on, and how with an atom added; ``same`` tokens of both are the same."""
    ids = text_ids(model, values)
    atom, scale, n = (values.get(what) for what in ("atom", "scale", "n_tokens"))
    if not isinstance(atom, int) or isinstance(atom, bool) or not 0 <= atom < sae.cfg.n_atoms:
        raise Refused(f"atom={atom!r}: allowed are 0 to {sae.cfg.n_atoms - 1}")
    if not isinstance(scale, int | float) or isinstance(scale, bool) or not abs(scale) <= 100:
        raise Refused(f"scale={scale!r}: allowed are numbers from -100 to 100")
    if not isinstance(n, int) or isinstance(n, bool) or not 1 <= n <= MOST_NEW:
        raise Refused(f"n_tokens={n!r}: allowed are 1 to {MOST_NEW}")
    ((one,),) = steer(model, sae, [atom], [ids], scales=(float(scale),), n_tokens=n)
    return {"before": list(one.plain), "after": list(one.steered), "same": one.same}
