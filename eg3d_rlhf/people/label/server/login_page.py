"""The log-in page in the reader's language, whole in one answer, as nobody who reads it is known yet. Its script never varies."""

import base64
import hashlib
import html
import json
from pathlib import Path

from eg3d_rlhf.people.label.server.models import Refusal, Withdrawn

_HERE = Path(__file__).parent
_STYLE, _SCRIPT, _PAGE = ((_HERE / name).read_text() for name in ("login.css", "login.js", "login.html"))
TEXTS: dict[str, dict[str, str]] = json.loads((_HERE / "login.json").read_text())  # language -> key, or a refusal's status -> text
STYLE_SOURCE, SCRIPT_SOURCE = (  # for the Content-Security-Policy
    f"'sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}'" for text in (_STYLE, _SCRIPT)
)


def language_of(accepted: str) -> str:
    """The language of TEXTS that an Accept-Language header (RFC 9110, 12.5.4) likes best; English where it names none of them."""
    weights: dict[str, float] = {}
    for part in accepted[:1000].split(","):
        tag, _, parameter = part.partition(";")
        code, weight = tag.strip()[:2].lower(), parameter.strip().removeprefix("q=") or "1"
        if code in TEXTS and weight.replace(".", "", 1).isdecimal():
            weights[code] = max(weights.get(code, 0.0), float(weight))
    return max(weights, key=lambda code: weights[code]) if any(weights.values()) else "en"


def login_page(accepted: str, csrf: str, refusal: Refusal | None = None) -> str:
    """The page's HTML.

    Args: accepted: the Accept-Language header; csrf: the form's; refusal: of the attempt before.
    """
    language = language_of(accepted)
    texts = {key: html.escape(text) for key, text in TEXTS[language].items()}
    message = ""
    if refusal is not None:
        key = "withdrawn" if isinstance(refusal, Withdrawn) else str(refusal.status)
        said = texts.get(key, html.escape(f"{refusal.error} {refusal.remedy}"))
        message = f"<p role=alert>{said.replace('{seconds}', refusal.headers.get('Retry-After', ''))}</p>"
    return _PAGE.format(
        language=language, title=texts["title"], token=texts["token"], button=texts["button"], waiting=texts["waiting"],
        later=texts["later"], style=_STYLE, script=_SCRIPT, message=message, csrf=csrf,
    )  # fmt: skip
