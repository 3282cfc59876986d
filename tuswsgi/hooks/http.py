"""Brings hooks to web applications, as rustus and tusd do: a POST of JSON to each URL.

This file owns the request's headers, the signature, and what the status of an answer
means. Connections are the business of ``connections.http``, the body that of payload
formats.
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
from tuswsgi.hooks.retries import LastingFailure, PassingFailure, persistently

if TYPE_CHECKING:
    from tuswsgi.connections.http import HttpAnswer, HttpClient

log = logging.getLogger(__name__)

#: Headers of the client's request that are never sent along: those that say how its own message
#: is sent, or to whom, and those that hooks have of their own.
_OURS = {
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

#: The 4xx after which the same request may be taken later (RFC 9110, 15.5.9; RFC 8470; RFC 6585).
_PASSING = {408, 425, 429}

#: What a header's value may hold (RFC 9110, 5.5). ``requests`` takes none that begins with a
#: blank, of which Latin-1 has more than a WSGI server strips.
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

    The request has the headers ``Hook-Name``, ``Hook-Id`` and ``Idempotency-Key`` (the same
    for every repetition) and ``Hook-Sequence``, besides those that are forwarded. With a
    secret it is signed: ``Webhook-Signature: t=<unix time>,v1=<signature>``, where the
    signature is the HMAC-SHA256, in hex, of the time, a dot and the body. A receiver
    computes it again, compares in constant time and refuses times that are long past.

    A 2xx accepts, and its body may be an answer in tusd's form. The 4xx of a blocking hook
    goes to the client with its body and type, in rustus' formats also the 5xx of the last
    attempt. All else is a failure; redirects are not followed. URLs are called in turn. The
    first that refuses ends the row, of a post-hook all are called: what failed is repeated by
    the caller, for all of them.

    :param format: what the body looks like.
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
        "Headers of the client's request that are sent along, e.g. `Authorization,Cookie`.",
        rustus="HOOKS_HTTP_PROXY_HEADERS",
        aliases=("hooks-http-forward-headers",),
    )
    timeout: float = option(
        2.0,
        "How long an attempt may take, from the connection to the end of the answer. A receiver "
        "that hangs costs a request `timeout` for each attempt and `backoff` between them: 11 s "
        "by default, for each blocking hook and URL. `[hooks] blocking_timeout` bounds the sum.",
        kind=Duration,
        rustus="HTTP_HOOK_TIMEOUT",
        aliases=("http-hook-timeout",),
    )
    retries: int = option(
        3,
        "How often a blocking hook is repeated that met a network error or a 5xx. Others are "
        "repeated as `[hooks]` says.",
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
        "The largest answer. A longer one to a blocking hook is a failure, and the text of a "
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
        names = [name for name in self.proxy_headers if name.lower() not in _OURS]
        sent_along = forwarded(request, names, _is_sendable)

        def ask(url: str, request: HookRequest) -> HookResponse | None:
            try:
                return self._ask(url, request, sent_along)
            except HookFailed as error:
                if request.type.blocking:
                    raise
                # One that is down must not keep the others from ever hearing of it.
                failures.append(error)
                return None

        answer = ask_in_turn([partial(ask, url) for url in self.urls], request)
        if failures:
            # It is repeated for all of them, for as long as one of them may have it.
            raise min(failures, key=lambda failure: isinstance(failure, LastingFailure))
        return answer

    def close(self) -> None:
        client = self._client.pop()
        if client is not None:
            client.close()

    def _ask(
        self, url: str, request: HookRequest, sent_along: Mapping[str, str]
    ) -> HookResponse | None:
        """Send a hook to one URL, a blocking one until it is answered or time is up."""
        body = self.format.encode(request).encode()

        def attempt() -> HttpAnswer:
            try:
                own = self._headers(request, body)
                timeout = request.time_left(self.timeout)
                answer = self._client.get().post(url, body, {**sent_along, **own}, timeout)
            except ValueError as error:
                raise HookFailed(f"{_shown(url)} cannot be asked: {error}") from None
            except OSError as error:
                raise PassingFailure(f"{_shown(url)} did not answer: {error}") from None
            if answer.status >= 500:
                raise _ServerError(url, answer)
            return answer

        try:
            answer = persistently(attempt, request, retries=self.retries, backoff=self.backoff)
        except _ServerError as error:
            if not request.type.blocking:
                raise
            answer = error.answer
        return self._understand(url, request, answer)

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

    def _understand(
        self, url: str, request: HookRequest, answer: HttpAnswer
    ) -> HookResponse | None:
        type = request.type
        told = f"{_shown(url)} answered"
        if answer.status >= 500 and type.blocking and self.format.follows_tusd:
            raise HookBroken(f"{told} {answer.status}")
        if answer.status >= 400 and type.blocking:
            level = logging.INFO if answer.status < 500 else logging.ERROR
            log.log(level, "%s of %s: %s %s", type, request.info.id, told, answer.status)
            raise HookRefusal(answer.status, *_for_client(answer))
        if not 200 <= answer.status < 300:
            lasts = 400 <= answer.status < 500 and answer.status not in _PASSING
            raise (LastingFailure if lasts else HookFailed)(f"{told} {answer.status}")
        try:
            if not answer.complete:
                raise BadAnswer(f"more than {self.max_answer} bytes")
            if self.format.follows_tusd:
                check_object(answer.body)
            return decode_answer(type, answer.body)
        except BadAnswer as error:
            if type.blocking:
                raise HookBroken(f"{told} nonsense: {error}") from None
            # It was told. To tell it again would not make its answer any better.
            said = printable(str(error))
            log.warning("%s of %s: %s nonsense: %s", type, request.info.id, told, said)
            return None

    def _open(self) -> HttpClient:
        # That takes a tenth of a second, and most servers send no hooks by HTTP.
        from tuswsgi.connections.http import HttpClient

        return HttpClient(self.timeout, self.max_answer)


class _ServerError(PassingFailure):
    """A 5xx, which counts as the answer if it comes again and again."""

    def __init__(self, url: str, answer: HttpAnswer) -> None:
        super().__init__(f"{_shown(url)} answered {answer.status}")
        self.answer = answer


def _is_sendable(value: str) -> bool:
    return _VALUE.fullmatch(value) is not None


def _for_client(answer: HttpAnswer) -> tuple[str, dict[str, str]]:
    """Return the text of a refusal, and its type: it is sent in UTF-8 whatever it was in."""
    given = answer.content_type
    text = answer.body
    if given is None or not (given.isascii() and given.isprintable()):
        return text.decode(errors="replace"), {}
    parsed = Message()
    parsed["Content-Type"] = given
    charset = parsed.get_content_charset("utf-8")
    try:
        body = text.decode(charset, "replace")
    except LookupError:
        body = text.decode(errors="replace")
    if charset != "utf-8":
        parsed.set_param("charset", "utf-8")
    return body, {"Content-Type": parsed["Content-Type"]}


def _shown(url: str) -> str:
    """Return a URL without its credentials, which a query may be, too."""
    parts = urlsplit(url)
    return f"{parts.scheme}://{parts.netloc.rpartition('@')[2]}{parts.path}"
