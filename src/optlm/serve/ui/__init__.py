"""The web playground: one page at `/`, which talks to the API and to nothing else.

Vue and Vuetify come from the wheels of trame-client and trame-vuetify: the two libraries as their
authors publish them, in a form that pip installs and that works without a network. Only their
files are served; their Python is never imported.
"""

from __future__ import annotations

import secrets
from importlib import resources
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from fastapi import FastAPI

__all__ = ["mount_ui", "ui_missing"]

_LIBRARIES = {
    "vue.js": ("trame_client", "module/vue3-www/vue.global.js"),
    "vuetify.js": ("trame_vuetify", "module/v3-serve/vuetify3.js"),
    "css/vuetify.css": ("trame_vuetify", "module/v3-serve/vuetify3.css"),
    "css/mdi.css": ("trame_vuetify", "module/v3-serve/css/mdi.css"),
    "fonts/materialdesignicons-webfont.woff2": (
        "trame_vuetify",
        "module/v3-serve/fonts/materialdesignicons-webfont.woff2",
    ),
}
_OWN = ("playground.js", "playground.css")
_TYPES = {
    ".js": "text/javascript; charset=utf-8",
    ".css": "text/css; charset=utf-8",
    ".woff2": "font/woff2",
}
_HEADERS = {"X-Content-Type-Options": "nosniff", "Referrer-Policy": "no-referrer"}


def ui_missing() -> str | None:
    """Why the page cannot be served, or None if it can."""
    for package, file in _LIBRARIES.values():
        found = _library_file(package, file)
        if found is None or not found.is_file():
            return f"the playground needs {package} ({file}): pip install 'optlm[serve]'"
    return None


def mount_ui(app: FastAPI) -> None:
    """Add the page and its files to `app`; they hold no data, so they ask for no API key.

    Raises:
        RuntimeError: the libraries are not installed; see `ui_missing`.
    """
    from fastapi import HTTPException
    from fastapi.responses import HTMLResponse, Response

    missing = ui_missing()
    if missing is not None:
        raise RuntimeError(missing)
    page = _own("index.html").decode()
    files = {name: _own(name) for name in _OWN}

    @app.get("/", include_in_schema=False)
    def playground() -> HTMLResponse:
        nonce = secrets.token_urlsafe(16)  # for the one style sheet that Vuetify writes itself
        policy = (
            "default-src 'none'; script-src 'self'; connect-src 'self'; img-src 'self' data:; "
            f"font-src 'self'; style-src 'self' 'nonce-{nonce}'; base-uri 'none'; "
            "form-action 'none'; frame-ancestors 'none'"
        )
        return HTMLResponse(
            page.replace("{{nonce}}", nonce),
            headers=_HEADERS | {"Content-Security-Policy": policy, "Cache-Control": "no-store"},
        )

    @app.get("/ui/{name:path}", include_in_schema=False)
    def file(name: str) -> Response:
        if name in files:
            content, age = files[name], 0
        elif name.startswith("lib/") and name[4:] in _LIBRARIES:
            content, age = _library(name[4:]), 86_400
        else:
            raise HTTPException(404, f"there is no file {name!r} of the playground")
        return Response(
            content,
            media_type=_TYPES[Path(name).suffix],
            headers=_HEADERS | {"Cache-Control": f"max-age={age}"},
        )


def _own(name: str) -> bytes:
    return resources.files(__package__).joinpath(name).read_bytes()


def _library(name: str) -> bytes:
    found = _library_file(*_LIBRARIES[name])
    assert found is not None  # `mount_ui` looked
    return found.read_bytes()


def _library_file(package: str, file: str) -> Path | None:
    spec = find_spec(package)
    if spec is None or not spec.submodule_search_locations:
        return None
    return Path(spec.submodule_search_locations[0]) / file
