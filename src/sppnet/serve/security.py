"""Who may ask what: names of the server, origins of pages, tokens, kinds of bodies, and what pages may load.

docs/security.md says what each of these is against.
"""

from __future__ import annotations

import base64
import binascii
import hashlib
import ipaddress
import logging
import secrets
import socket
from dataclasses import dataclass, field
from http.cookies import CookieError, SimpleCookie
from typing import TYPE_CHECKING, Any
from urllib.parse import parse_qs

from starlette.datastructures import Headers, MutableHeaders
from starlette.responses import JSONResponse, RedirectResponse

if TYPE_CHECKING:
    from starlette.types import ASGIApp, Message, Receive, Scope, Send

COOKIE = "sppnet"
LOOPBACK = frozenset({"127.0.0.1", "localhost", "::1"})

_SAFE = frozenset({"GET", "HEAD", "OPTIONS"})
_POLICY = (
    "default-src 'self'; script-src 'self'; style-src 'self'; img-src 'self' blob: data:; "
    "connect-src 'self'; object-src 'none'; base-uri 'none'; form-action 'self'; frame-ancestors 'none'"
)
_HEADERS = {
    "Content-Security-Policy": _POLICY,
    "X-Content-Type-Options": "nosniff",
    "X-Frame-Options": "DENY",
    "Referrer-Policy": "no-referrer",
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Permissions-Policy": "camera=(), geolocation=(), microphone=()",
}
# They say nothing of the project: others can see whether the server lives, and the page asks for the token.
_OPEN = frozenset({"/", "/api/v1/health", "/label-studio/health"})
# Where nothing is said of keeping an answer, nobody is to keep it.
_KEEPING = "no-store"
# Built files have other names when they are others.
_FILES, _KEPT = "/assets/", "public, max-age=31536000, immutable"


@dataclass(frozen=True)
class Rules:
    """What is allowed.

    Attributes
    ----------
    host : str
        The address that the server listens at.
    token : str
        What programs must know to change anything; the page's own requests need not.
    closed : bool
        Whether whoever does not know the token is shown nothing but a page that asks for it.
    """

    host: str = "127.0.0.1"
    token: str = field(default_factory=lambda: secrets.token_urlsafe(24))
    closed: bool = False

    def names(self, name: str) -> bool:
        """Tell whether a name, as a browser has it, is one of this server.

        Addresses are. Names are only where they are known to be this machine's, so that the name of a
        stranger's page cannot come to lead here.
        """
        if name in LOOPBACK:
            return True
        if self.host in LOOPBACK:
            return False
        return _is_address(name) or name in {self.host.lower(), socket.gethostname().lower()}

    @property
    def cookie(self) -> str:
        """What a browser keeps to show that it knows the token."""
        return hashlib.sha256(self.token.encode()).hexdigest()

    def knows(self, headers: Headers) -> bool:
        """Tell whether a request shows that whoever sends it knows the token."""
        kind, _, given = headers.get("authorization", "").partition(" ")
        if kind.lower() == "basic":
            given = _password(given)
        known = kind.lower() in ("bearer", "token", "basic") and _equal(given, self.token)
        return known or _equal(_cookie(headers), self.cookie)


def _is_address(name: str) -> bool:
    try:
        ipaddress.ip_address(name)
    except ValueError:
        return False
    return True


def _equal(given: str, expected: str) -> bool:
    return secrets.compare_digest(given.encode("utf-8", "replace"), expected.encode())


def _password(given: str) -> str:
    try:
        return base64.b64decode(given, validate=True).decode("utf-8", "replace").partition(":")[2]
    except (binascii.Error, ValueError):
        return ""


def _cookie(headers: Headers) -> str:
    try:
        found = SimpleCookie(headers.get("cookie", "")).get(COOKIE)
    except CookieError:
        return ""
    return "" if found is None else found.value


def host_name(header: str) -> str:
    """Return the name in a ``Host`` header, without its port and the brackets of an address of version 6."""
    if header.startswith("["):
        return header[1:].partition("]")[0].lower()
    return header.partition(":")[0].lower()


class Guard:
    """Lets requests through that may be, and puts headers on all answers.

    Parameters
    ----------
    app : ASGI application
    rules : Rules
    """

    def __init__(self, app: ASGIApp, rules: Rules) -> None:
        self.app, self.rules = app, rules

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer a request, or let the application do it."""
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return

        async def guarded(message: Message) -> None:
            if message["type"] == "http.response.start":
                headers = MutableHeaders(scope=message)
                for name, value in _HEADERS.items():
                    headers[name] = value
                headers.setdefault("Cache-Control", _KEPT if scope["path"].startswith(_FILES) else _KEEPING)
            await send(message)

        entered = self._entered(scope)
        if entered is not None:
            await entered(scope, receive, guarded)
            return
        refused = self._refused(
            scope["method"], scope["path"], Headers(scope=scope), scope.get("scheme", "http")
        )
        if refused is None:
            await self._answered(scope, receive, guarded)
            return
        answer = JSONResponse({"error": {"message": refused[1]}}, refused[0])
        if refused[0] == 401:
            answer.headers["WWW-Authenticate"] = "Bearer"
        await answer(scope, receive, guarded)

    async def _answered(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Let the application answer; what it raises after a whole answer concerns the log alone."""
        whole = False

        async def noted(message: Message) -> None:
            nonlocal whole
            whole = message["type"] == "http.response.body" and not message.get("more_body")
            await send(message)

        try:
            await self.app(scope, receive, noted)
        except Exception:
            if not whole:
                raise
            logging.getLogger("uvicorn.error").exception("A request failed: %s", scope["path"])

    def _entered(self, scope: Scope) -> Any:
        """Return the way in for a browser that comes with the token in its address."""
        if scope["path"] != "/" or scope["method"] != "GET":
            return None
        given = parse_qs(scope.get("query_string", b"").decode("latin-1")).get("token")
        if not given or not _equal(given[0], self.rules.token):
            return None
        if not self.rules.names(host_name(Headers(scope=scope).get("host", ""))):
            return None
        answer = RedirectResponse("/", 303)
        answer.set_cookie(COOKIE, self.rules.cookie, httponly=True, samesite="strict")
        return answer

    def _refused(self, method: str, path: str, headers: Headers, scheme: str) -> tuple[int, str] | None:
        """Return status and message of what is wrong with a request; None if nothing is."""
        host = headers.get("host", "")
        if not self.rules.names(host_name(host)):
            return 421, f"found the host {host_name(host)!r}, expected a name of this server"
        known = self.rules.knows(headers)
        shown = path in _OPEN or path.startswith(_FILES)
        if self.rules.closed and not known and not shown:
            return 401, "found no token, expected that of the server: open the address that it printed"
        origin, site = headers.get("origin"), headers.get("sec-fetch-site", "none")
        if origin is not None and origin != f"{scheme}://{host}":
            return 403, f"found the origin {origin!r}, expected this server's page"
        if site not in ("same-origin", "none") and not (path == "/" and method in _SAFE):
            return 403, "found a request from another site, expected one from this server's page"
        if method in _SAFE:
            return None
        if origin is None and not known:
            return 401, "found no token, expected that of the server: Authorization: Bearer TOKEN"
        return self._odd_body(headers)

    @staticmethod
    def _odd_body(headers: Headers) -> tuple[int, str] | None:
        """Return what is wrong with the kind of a body: what a form of another site could send is refused."""
        kind = headers.get("content-type", "").partition(";")[0].strip().lower()
        empty = headers.get("content-length", "0") == "0" and "transfer-encoding" not in headers
        if kind == "application/json" or kind.startswith("image/") or (empty and not kind):
            return None
        return 415, f"found a body of the kind {kind!r}, expected application/json or image/*"
