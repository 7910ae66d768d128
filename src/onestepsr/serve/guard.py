"""The guard in front of the server: who may ask, what every answer carries, and the one form of a refusal."""

from __future__ import annotations

import ipaddress
import secrets
import socket
from base64 import b64decode
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any

from fastapi import HTTPException
from fastapi.responses import JSONResponse
from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram
from prometheus_client.process_collector import ProcessCollector
from starlette.datastructures import Headers, MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

# ---- refusals ----


class Refusal(HTTPException):
    """An answer other than the one that was asked for: a status, a code for programs and a sentence for people."""

    def __init__(self, status: int, code: str, message: str, headers: Mapping[str, str] | None = None) -> None:
        super().__init__(status, message, dict(headers or {}))
        self.code = code


def refusal_body(code: str, message: str) -> dict[str, Any]:
    """The JSON of every refusal."""
    return {"error": {"code": code, "message": message}}


ERROR = {
    "description": "The reason",
    "content": {
        "application/json": {
            "schema": {
                "type": "object",
                "required": ["error"],
                "properties": {
                    "error": {
                        "type": "object",
                        "required": ["code", "message"],
                        "properties": {"code": {"type": "string"}, "message": {"type": "string"}},
                    }
                },
            }
        }
    },
}


def errors(*statuses: int) -> dict[int | str, dict[str, Any]]:
    """Refusals with these statuses, or 500, as the document of the API describes them."""
    return dict.fromkeys((*statuses, 500), ERROR)


UPLOAD_ERRORS = errors(408, 413, 415, 422, 429, 503, 507)


# ---- every request ----

PAGE_POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' blob: data:; connect-src 'self'; "
    "base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)
_HEADERS = {
    "content-security-policy": PAGE_POLICY,
    "x-content-type-options": "nosniff",
    "x-frame-options": "DENY",
    "referrer-policy": "no-referrer",
    "cross-origin-opener-policy": "same-origin",
    "cross-origin-resource-policy": "same-origin",
    "permissions-policy": "camera=(), geolocation=(), microphone=()",
    "cache-control": "no-store",
}
_OPEN = ("/healthz", "/readyz")  # and the page with its files: it asks for the token
_METHODS = ("GET", "HEAD", "POST", "DELETE", "OPTIONS")  # clients may invent others: no figures for those
_LOCAL_NAMES = ("localhost",)


class Guard:
    """Checks Host, Origin and token of every request, counts it, and adds security headers to its answer.

    A page of another site that has its own name resolve to this machine (DNS rebinding) is known by that name in Host;
    one that posts across sites, by its Origin. Addresses are let through: they are nobody's name.
    """

    def __init__(self, app: ASGIApp, *, token: str | None, hosts: Sequence[str] | None, metrics: Metrics) -> None:
        self._app, self._metrics = app, metrics
        self._token = None if token is None else token.encode()
        names = (*_LOCAL_NAMES, socket.gethostname().lower())
        self._hosts = None if hosts is None else {*names, *(name.lower().rstrip(".") for name in hosts)}

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer one request."""
        if scope["type"] != "http":
            if scope["type"] == "lifespan":
                await self._app(scope, receive, send)
            return
        status = 500

        async def answer(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                headers = MutableHeaders(scope=message)
                for name, value in _HEADERS.items():
                    headers.setdefault(name, value)
            await send(message)

        refusal = self._refusal(scope)
        try:
            if refusal is not None:
                await refusal(scope, receive, answer)
            else:
                await self._app(scope, receive, answer)
        finally:
            route = getattr(scope.get("route"), "path", "other")
            method = scope["method"] if route != "other" and scope["method"] in _METHODS else ""
            self._metrics.requests.labels(method, route, str(status)).inc()

    def _refusal(self, scope: Scope) -> JSONResponse | None:
        headers, path = Headers(scope=scope), scope["path"]
        host = headers.get("host", "")
        if not self._is_ours(host):
            message = f"this server is not called '{host[:200]}'; start it with --allow-host NAME to let it be"
            return JSONResponse(refusal_body("host", message), 403)
        if scope["method"] not in ("GET", "HEAD"):
            origin = headers.get("origin")
            foreign = origin is not None and origin.partition("://")[2].lower() != host.lower()
            if foreign or headers.get("sec-fetch-site") in ("cross-site", "same-site"):
                return JSONResponse(refusal_body("origin", "requests of other sites are not answered"), 403)
        if self._token is None or path in _OPEN or path == "/" or path.startswith("/page/"):
            return None
        if not secrets.compare_digest(_given_token(headers), self._token):
            answer = refusal_body("token", "the token is missing or wrong")
            return JSONResponse(answer, 401, {"www-authenticate": 'Bearer realm="onestepsr"'})
        return None

    def _is_ours(self, host: str) -> bool:
        if self._hosts is None:
            return True
        name = host.lower()
        name = name[1:].partition("]")[0] if name.startswith("[") else name.partition(":")[0].rstrip(".")
        with suppress(ValueError):
            ipaddress.ip_address(name)
            return True
        return name in self._hosts


def _given_token(headers: Headers) -> bytes:
    """The token of a request: a bearer's, or the password of basic authentication, which older clients send."""
    kind, _, value = headers.get("authorization", "").partition(" ")
    if kind.lower() == "bearer":
        return value.strip().encode("latin-1")  # the bytes that were sent
    if kind.lower() == "basic":
        with suppress(ValueError):
            return b64decode(value.strip(), validate=True).partition(b":")[2]
    return b""


@dataclass(kw_only=True)
class Metrics:
    """Figures for Prometheus."""

    registry: CollectorRegistry = field(default_factory=CollectorRegistry)
    requests: Counter = field(init=False)
    jobs: Counter = field(init=False)
    seconds: Histogram = field(init=False)
    queued: Gauge = field(init=False)

    def __post_init__(self) -> None:
        own: dict[str, Any] = {"namespace": "onestepsr", "registry": self.registry}
        self.requests = Counter("requests", "Requests answered", ["method", "route", "status"], **own)
        self.jobs = Counter("jobs", "Jobs accepted and refused", ["outcome"], **own)
        buckets = (0.05, 0.1, 0.2, 0.5, 1, 2, 5, 10, 30, 60, 300, 1800)
        self.seconds = Histogram("job_seconds", "Seconds of a job, without waiting", buckets=buckets, **own)
        self.queued = Gauge("queue_jobs", "Jobs that wait", **own)
        ProcessCollector(registry=self.registry)
