"""Hooks as HTTP requests, as in rustus and tusd: a POST of JSON to each URL.

This file owns the headers, the signature and the meaning of response statuses. The body is that
of ``hooks.payloads``, and ``connections.http`` sends the requests.
"""

from __future__ import annotations

import hashlib
import hmac
import logging
import re
import time
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from email.message import Message
from functools import partial
from typing import TYPE_CHECKING, ClassVar
from urllib.parse import urlsplit

from marshmallow import ValidationError

from tuswsgi.core.display import printable
from tuswsgi.core.errors import HookBroken, HookFailed, HookRefusal
from tuswsgi.core.options import Duration, KiB, Size, option
from tuswsgi.core.process import PerProcess
from tuswsgi.hooks.answers import CONNECTION_HEADERS
from tuswsgi.hooks.base import Hook, HookRequest, HookResponse, ask_in_turn
from tuswsgi.hooks.forwarding import forwarded
from tuswsgi.hooks.payloads import BadAnswer, PayloadFormat, check_object, decode_answer
from tuswsgi.hooks.retries import PermanentFailure, TransientFailure, with_retries

if TYPE_CHECKING:
    from tuswsgi.connections.http import HttpAnswer, HttpClient

log = logging.getLogger(__name__)

#: Headers of the client's request that are never forwarded: they describe the client's own
#: message or connection, or hooks have their own.
_NOT_FORWARDED = {
    *CONNECTION_HEADERS,
    "accept-encoding",
    "content-encoding",
    "content-type",
    "expect",
    "hook-id",
    "hook-name",
    "hook-sequence",
    "host",
    "idempotency-key",
    "webhook-signature",
    "x-request-id",
}

#: The 4xx after which the same request may succeed later (RFC 9110, 15.5.9; RFC 8470; RFC 6585).
_TRANSIENT = {408, 425, 429}

#: A header's value (RFC 9110, 5.5). ``requests`` refuses leading white space, of which Latin-1
#: has more than WSGI servers strip.
_VALUE = re.compile(r"(?!\s)[\t\x20-\x7e\x80-\xff]*")


def _check_urls(urls: Sequence[str]) -> None:
    for url in urls:
        try:
            parts = urlsplit(url)
            port_is_right = parts.port is None or parts.port > 0
        except ValueError:
            port_is_right = False
        if not port_is_right or parts.scheme not in ("http", "https") or not parts.hostname:
            raise ValidationError("Not an absolute URL such as https://example.org/hooks.")


@dataclass
class HttpHook(Hook):
    """Hooks as HTTP requests.

    A request has the headers ``Hook-Name``, ``Hook-Id`` and ``Idempotency-Key`` (the same in
    every attempt) and ``Hook-Sequence``, besides those that are forwarded. With a secret it is
    signed: ``Webhook-Signature: t=<unix time>,v1=<signature>``, where the signature is the
    HMAC-SHA256, in hex, of the time, a dot and the body. Receivers compute it too, compare in
    constant time and refuse old times.

    A 2xx accepts, and its body may be an answer in tusd's format. A 4xx response to a blocking
    hook is sent to the client with its body and type; with rustus' formats, so is the 5xx of the
    last attempt. Everything else is a failure. Redirects are not followed.

    URLs are called in turn. The first refusal of a blocking hook ends the calls. Post-hooks are
    sent to all URLs, and again to all of them if one failed.

    :param format: the format of the body.
    """

    name: ClassVar[str] = "http"
    section: ClassVar[str] = "hooks.http"

    format: PayloadFormat
    urls: tuple[str, ...] = option(
        (),
        "The URLs that hooks are sent to, all of them in turn; the first refusal counts.",
        rustus="HOOKS_HTTP_URLS",
        aliases=("hooks-http",),
        validate=_check_urls,
    )
    proxy_headers: tuple[str, ...] = option(
        (),
        "Headers of the client's request to forward, e.g. `Authorization,Cookie`.",
        rustus="HOOKS_HTTP_PROXY_HEADERS",
        aliases=("hooks-http-forward-headers",),
    )
    timeout: float = option(
        2.0,
        "The timeout of an attempt, from connecting to the end of the response. A receiver that "
        "hangs delays a request by `timeout` for each attempt and `backoff` between them: 11 s by "
        "default, for each blocking hook and URL. `[hooks] blocking_timeout` bounds the sum.",
        kind=Duration,
        rustus="HTTP_HOOK_TIMEOUT",
        aliases=("http-hook-timeout",),
    )
    retries: int = option(
        3,
        "How many times to retry a blocking hook after a network error or a 5xx. `[hooks]` "
        "configures the retries of other hooks.",
        aliases=("hooks-http-retry",),
    )
    backoff: float = option(1.0, "The time between two attempts.", kind=Duration)
    secret: str | None = option(
        None,
        "Signs requests: `Webhook-Signature: t=<unix time>,v1=<hex HMAC-SHA256 of the time, a "
        "dot and the body>`.",
        secret=True,
    )
    max_answer: int = option(
        64 * KiB,
        "The largest response. A longer one to a blocking hook is a failure, and the text of a "
        "refusal is cut.",
        kind=Size,
        aliases=("hooks-http-size-limit",),
    )

    def __post_init__(self) -> None:
        self._client: PerProcess[HttpClient] = PerProcess(self._open)

    @property
    def forwards(self) -> Collection[str]:
        return self.proxy_headers

    def send(self, request: HookRequest) -> HookResponse | None:
        failures: list[HookFailed] = []
        names = [name for name in self.proxy_headers if name.lower() not in _NOT_FORWARDED]
        headers = forwarded(request, names, _is_sendable)

        def ask(url: str, request: HookRequest) -> HookResponse | None:
            try:
                return self._ask(url, request, headers)
            except HookFailed as error:
                if request.type.blocking:
                    raise
                # The other URLs get the event even while this one is down.
                failures.append(error)
                return None

        answer = ask_in_turn([partial(ask, url) for url in self.urls], request)
        if failures:
            # A transient failure comes first: it means that a retry may help.
            raise min(failures, key=lambda failure: isinstance(failure, PermanentFailure))
        return answer

    def close(self) -> None:
        client = self._client.pop()
        if client is not None:
            client.close()

    def _ask(
        self, url: str, request: HookRequest, headers: Mapping[str, str]
    ) -> HookResponse | None:
        """Send a hook to one URL; a blocking hook is retried."""
        body = self.format.encode(request).encode()

        def attempt() -> HttpAnswer:
            try:
                own = self._headers(request, body)
                timeout = request.time_left(self.timeout)
                answer = self._client.get().post(url, body, {**headers, **own}, timeout)
            except ValueError as error:
                raise HookFailed(f"The request to {_shown(url)} is invalid: {error}") from None
            except OSError as error:
                raise TransientFailure(f"{_shown(url)} did not answer: {error}") from None
            if answer.status >= 500:
                raise _ServerError(url, answer)
            return answer

        try:
            answer = with_retries(attempt, request, retries=self.retries, backoff=self.backoff)
        except _ServerError as error:
            if not request.type.blocking:
                raise
            answer = error.answer
        return self._interpret(url, request, answer)

    def _headers(self, request: HookRequest, body: bytes) -> dict[str, str]:
        own = {
            "Content-Type": "application/json",
            "Hook-Name": request.type.value,
            "Hook-Id": request.id,
            "Hook-Sequence": str(request.sequence),
            "Idempotency-Key": request.id,
        }
        id = request.request.headers.get("x-request-id")
        if id and _is_sendable(id):
            own["X-Request-ID"] = id
        if self.secret:
            now = str(int(time.time()))
            signed = hmac.digest(self.secret.encode(), now.encode() + b"." + body, hashlib.sha256)
            own["Webhook-Signature"] = f"t={now},v1={signed.hex()}"
        return own

    def _interpret(self, url: str, request: HookRequest, answer: HttpAnswer) -> HookResponse | None:
        type = request.type
        summary = f"{_shown(url)} answered {answer.status}"
        if answer.status >= 500 and type.blocking and self.format.follows_tusd:
            raise HookBroken(summary)
        if answer.status >= 400 and type.blocking:
            level = logging.INFO if answer.status < 500 else logging.ERROR
            log.log(level, "%s of %s: %s", type, request.info.id, summary)
            raise HookRefusal(answer.status, *_for_client(answer))
        if not 200 <= answer.status < 300:
            is_permanent = 400 <= answer.status < 500 and answer.status not in _TRANSIENT
            raise (PermanentFailure if is_permanent else HookFailed)(summary)
        try:
            if not answer.complete:
                raise BadAnswer(f"more than {self.max_answer} bytes")
            if self.format.follows_tusd:
                check_object(answer.body)
            return decode_answer(type, answer.body)
        except BadAnswer as error:
            if type.blocking:
                raise HookBroken(f"The answer of {_shown(url)} is invalid: {error}") from None
            # The event has been delivered; sending it again would not improve the answer.
            reason = printable(str(error))
            log.warning("%s of %s: invalid answer: %s", type, request.info.id, reason)
            return None

    def _open(self) -> HttpClient:
        # The import takes 0.1 s, and most servers send no hooks over HTTP.
        from tuswsgi.connections.http import HttpClient

        return HttpClient(self.timeout, self.max_answer)


class _ServerError(TransientFailure):
    """A 5xx response, which is the answer if it is the one to the last attempt."""

    def __init__(self, url: str, answer: HttpAnswer) -> None:
        super().__init__(f"{_shown(url)} answered {answer.status}")
        self.answer = answer


def _is_sendable(value: str) -> bool:
    return _VALUE.fullmatch(value) is not None


def _for_client(answer: HttpAnswer) -> tuple[str, dict[str, str]]:
    """Return the body of a refusal as text, and its type with UTF-8 as its charset."""
    content_type = answer.content_type
    if content_type is None or not (content_type.isascii() and content_type.isprintable()):
        return answer.body.decode(errors="replace"), {}
    parsed = Message()
    parsed["Content-Type"] = content_type
    charset = parsed.get_content_charset("utf-8")
    try:
        body = answer.body.decode(charset, "replace")
    except LookupError:
        body = answer.body.decode(errors="replace")
    if charset != "utf-8":
        parsed.set_param("charset", "utf-8")
    return body, {"Content-Type": parsed["Content-Type"]}


def _shown(url: str) -> str:
    """Return a URL without credentials, and without its query, which may contain some."""
    parts = urlsplit(url)
    return f"{parts.scheme}://{parts.netloc.rpartition('@')[2]}{parts.path}"
