"""`babelscope serve`: a small local web page on which sentences are read and continued.

Starlette and uvicorn serve it: MLflow depends on both, so that they are installed.
"""

import sys
import threading
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

from starlette.applications import Starlette
from starlette.concurrency import run_in_threadpool
from starlette.middleware import Middleware
from starlette.middleware.trustedhost import TrustedHostMiddleware
from starlette.requests import Request
from starlette.responses import HTMLResponse, JSONResponse, Response
from starlette.routing import Route

from babelscope import config
from babelscope.core.errors import UserError
from babelscope.core.paths import Paths
from babelscope.playground import page
from babelscope.playground.reading import Reader

# Pages of the report that the server offers, too, so that a click on a feature opens its page.
_PAGES = ("features.html", "report.html")
# Characters of a sentence; the rest would be cut at corpus.max_tokens anyway.
_LONGEST = 4000


def main(host: str, port: int) -> None:
    """Load the model, print the address, and serve the page until it is interrupted."""
    import uvicorn

    app = application(Reader(config.load(), Paths(Path())), Paths(Path()), host)
    sys.stdout.write(f"http://{host}:{port}/ (Ctrl-C ends it)\n")
    sys.stdout.flush()
    uvicorn.run(app, host=host, port=port, log_level="warning")


def application(reader: Reader, paths: Paths, host: str = "127.0.0.1") -> Starlette:
    """The web application.

    Other names than those of the host are refused, so that a foreign page cannot reach it by a name that it owns (DNS
    rebinding); not if it listens on all addresses, whose names are not known. One request at a time uses the model.
    """
    lock = threading.Lock()
    names = ["*"] if host in ("0.0.0.0", "::") else ["127.0.0.1", "localhost", host]  # noqa: S104
    browser = "features.html" if (paths.reports / "features.html").is_file() else None
    start = page.build(reader, paths, browser=browser, live=True)

    def answer(work: Callable[[dict[str, str]], Any]) -> Callable[[Request], Awaitable[Response]]:
        """An endpoint that computes `work` for the arguments of the address, without blocking others."""

        def compute(arguments: dict[str, str]) -> Response:
            try:
                with lock:
                    return JSONResponse(work(arguments))
            except UserError as error:
                return JSONResponse({"error": str(error)}, status_code=400)

        async def endpoint(request: Request) -> Response:
            arguments = dict(request.query_params)
            if len(arguments.get("text", "")) > _LONGEST:
                return JSONResponse({"error": f"the text is longer than {_LONGEST} characters"}, status_code=400)
            return await run_in_threadpool(compute, arguments)

        return endpoint

    def read(arguments: dict[str, str]) -> dict[str, Any]:
        return page.as_json(reader.read(arguments.get("text", "")))

    def continued(arguments: dict[str, str]) -> dict[str, str]:
        try:
            strength = float(arguments.get("strength", ""))
        except ValueError:
            strength = float("nan")
        if not abs(strength) <= 1e3:
            raise UserError(f"strength: {arguments.get('strength')!r}; allowed: a number")
        text, target = arguments.get("text", ""), arguments.get("target", "")
        return {"text": reader.continuation(text, target, strength)}

    async def home(_request: Request) -> Response:
        return HTMLResponse(start)

    async def report(request: Request) -> Response:
        path = paths.reports / request.url.path.lstrip("/")
        return HTMLResponse(path.read_bytes()) if path.is_file() else Response("dvc repro report", status_code=404)

    return Starlette(
        routes=[
            Route("/", home),
            Route("/read", answer(read)),
            Route("/continue", answer(continued)),
            *(Route(f"/{name}", report) for name in _PAGES),
        ],
        middleware=[Middleware(TrustedHostMiddleware, allowed_hosts=names)],
    )
