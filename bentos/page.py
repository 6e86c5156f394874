"""GET /: a web page to try the model. One file, which sends requests only to this server."""

import base64
import hashlib
import re
from pathlib import Path

from fastapi import APIRouter
from starlette.responses import HTMLResponse, Response

from bentos.schemas import DEFAULTS

_FILE = Path(__file__).with_name("page.html").read_text(encoding="utf-8")
HTML = _FILE.replace("{temperature}", f"{DEFAULTS.temperature:g}").replace(
    "{max_new_tokens}", str(DEFAULTS.max_new_tokens)
)


def _hash(tag: str) -> str:
    """Return the Content-Security-Policy source that allows the page's only inline element of this name."""
    found = re.search(rf"<{tag}>(.*?)</{tag}>", HTML, re.DOTALL)
    assert found is not None
    return f"'sha256-{base64.b64encode(hashlib.sha256(found[1].encode()).digest()).decode()}'"


HEADERS = {
    "Content-Security-Policy": f"default-src 'none'; script-src {_hash('script')}; style-src {_hash('style')}; "
    "img-src data:; connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'",
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cache-Control": "no-cache",  # a new version of the service may have a new page
}

router = APIRouter()


@router.get("/", include_in_schema=False)
async def index() -> Response:
    return HTMLResponse(HTML, headers=HEADERS)
