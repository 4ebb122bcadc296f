"""The live page at `/`: its files, as they lie in `ui/`, under a policy that lets it load and ask nothing elsewhere.

Must not know: what the page shows, the engine, the API it calls.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from pathlib import Path

from fastapi import APIRouter
from fastapi.responses import FileResponse

_UI = Path(__file__).with_name("ui")
# Types of our own: the system's table of them may say anything.
_TYPES = {".html": "text/html", ".css": "text/css", ".js": "text/javascript", ".svg": "image/svg+xml"}
_PARTS = [path.name for path in _UI.iterdir() if path.suffix in _TYPES and path.name != "index.html"]
_FILES = {"/": "index.html", **{f"/ui/{name}": name for name in _PARTS}}
_HEADERS = {
    "Content-Security-Policy": "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self'; "
    "connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'; "
    "require-trusted-types-for 'script'; trusted-types 'none'",
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cache-Control": "no-cache",
}
PATHS = frozenset(_FILES)

router = APIRouter(include_in_schema=False)


def _serve(path: Path) -> Callable[[], Awaitable[FileResponse]]:
    async def file() -> FileResponse:
        return FileResponse(path, media_type=_TYPES[path.suffix], headers=_HEADERS)

    return file


for _path, _name in _FILES.items():
    router.add_api_route(_path, _serve(_UI / _name), methods=["GET", "HEAD"], response_class=FileResponse)
