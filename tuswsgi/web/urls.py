"""URLs: the origin of a request, the URL of an upload, and the upload of a URL.

``Forwarded`` headers count only if they come from a trusted proxy (RFC 7239, 8.1).
"""

from __future__ import annotations

import ipaddress
import re
from collections.abc import Mapping
from functools import lru_cache
from typing import Any, NamedTuple
from urllib.parse import quote, unquote, urlsplit

from tuswsgi.core.errors import BadRequest, InvalidConcat, UploadNotFound
from tuswsgi.core.info import check_id
from tuswsgi.web.settings import UNIX, LocationForm, WebSettings

_HOST = re.compile(r"(\[[0-9A-Fa-f:.]+\]|[A-Za-z0-9._~!$&'()*+,;=%-]+)(:[0-9]{0,5})?", re.ASCII)
_ABSOLUTE = re.compile(r"https?://([^/?#]*)", re.ASCII | re.IGNORECASE)
_PREFIX = re.compile(r"(/(?!\.{1,2}(/|$))[A-Za-z0-9._~!$&'()*+,;=:@%-]+)+", re.ASCII)
_FORWARDED_PAIR = re.compile(r'\s*([A-Za-z]+)=("(?:[^"\\]|\\.)*"|[^;,"\s]+)\s*', re.ASCII)

_DEFAULT_PORTS = {"http": 80, "https": 443}


class Origin(NamedTuple):
    """The two ends of a request as its client sees them.

    :param host: with its port, unless that is the scheme's default.
    :param prefix: the path that a proxy has removed, without a slash at its end.
    :param client: the client's address, ``None`` if it is unknown.
    """

    scheme: str
    host: str
    prefix: str
    client: str | None


def origin_of(environ: Mapping[str, Any], settings: WebSettings) -> Origin:
    """Return the origin of a request.

    :raises BadRequest: for an HTTP/1.1 request without a usable Host (RFC 9112, 3.2).
    """
    host = environ.get("HTTP_HOST", "")
    if not host and environ.get("SERVER_PROTOCOL") == "HTTP/1.1":
        raise BadRequest("The Host header is missing.")
    said = _forwarded(environ, settings) if _is_trusted_peer(environ, settings) else {}
    target = _target_host(environ)
    host = said.get("host") or target or host or environ["SERVER_NAME"]
    match = _HOST.fullmatch(host)
    if match is None:
        what = "host in the request's target" if host is target else "Host header"
        raise BadRequest(f"The {what} is invalid.")
    scheme = said.get("proto", "").lower()
    if scheme not in _DEFAULT_PORTS:
        scheme = environ["wsgi.url_scheme"]
    return Origin(
        scheme,
        match[1] if match[2] and _is_default(match[2][1:], scheme) else host,
        said.get("prefix", ""),
        said.get("for") or environ.get("REMOTE_ADDR") or None,
    )


def _is_default(port: str, scheme: str) -> bool:
    """Return whether URLs are written without this port (RFC 9110, 4.2.3)."""
    return not port or int(port) == _DEFAULT_PORTS.get(scheme)


def _target_host(environ: Mapping[str, Any]) -> str:
    """Return the host in the target of a request, empty if the target is a path.

    "When an origin server receives a request with an absolute-form of request-target, the origin
    server MUST ignore the received Host header field (if any) and instead use the host
    information of the request-target." (RFC 9112, 3.2.2)
    """
    target: str = environ.get("RAW_URI") or environ.get("REQUEST_URI") or ""
    if not target or target[0] == "/":
        return ""
    match = _ABSOLUTE.match(target)
    return match[1] if match else ""


def request_uri(environ: Mapping[str, Any]) -> str:
    """Return the path and query of a request, as its client sent them if the server tells."""
    uri: str = environ.get("RAW_URI") or environ.get("REQUEST_URI") or ""
    if uri:
        return uri
    path = environ.get("SCRIPT_NAME", "") + environ.get("PATH_INFO", "")
    query = environ.get("QUERY_STRING", "")
    return quote(path.encode("latin-1")) + (query and f"?{query}")


def _collection_path(environ: Mapping[str, Any]) -> str:
    """Return the path of the upload collection, to which a request was sent."""
    path: str = environ.get("SCRIPT_NAME", "") + environ.get("PATH_INFO", "")
    path = path.rstrip("/")
    # latin-1 is how PEP 3333 carries the bytes of a path.
    return path if path.isascii() else quote(path.encode("latin-1"))


def upload_url(environ: Mapping[str, Any], id: str, settings: WebSettings, origin: Origin) -> str:
    """Return the URL of a new upload, for ``Location``."""
    # All other characters of ids may be in a path (RFC 3986, 3.3).
    id = id.replace("%", "%25")
    if settings.public_url is not None:
        return f"{settings.public_url.rstrip('/')}/{id}"
    path = f"{origin.prefix}{_collection_path(environ)}/{id}"
    if settings.location is LocationForm.RELATIVE:
        return path
    return f"{origin.scheme}://{origin.host}{path}"


def upload_id(url: str, environ: Mapping[str, Any], settings: WebSettings) -> str:
    """Return the id of the upload at a URL in ``Upload-Concat``.

    The URL is absolute or a path. As in tusd, any host is accepted, since one server has many
    names. Uploads are protected by their ids and owners.

    :raises InvalidConcat: if it is not a URL of this collection.
    """
    try:
        parts = urlsplit(url)
    except ValueError:
        raise InvalidConcat("The Upload-Concat header has an invalid URL.") from None
    if parts.scheme not in ("", "http", "https") or parts.query or parts.fragment:
        raise InvalidConcat("The Upload-Concat header has a URL that is not one of an upload.")
    own = _collection_path(environ)
    bases = {own, origin_of(environ, settings).prefix + own}
    if settings.public_url:
        bases.add(urlsplit(settings.public_url).path.rstrip("/"))
    directory, _, id = parts.path.removesuffix("/").rpartition("/")
    if unquote(directory) not in map(unquote, bases):
        raise InvalidConcat("The Upload-Concat header has a URL that is not one of an upload.")
    try:
        return check_id(unquote(id))
    except UploadNotFound:
        raise InvalidConcat("The Upload-Concat header has a URL with an invalid id.") from None


def _is_trusted_peer(environ: Mapping[str, Any], settings: WebSettings) -> bool:
    if not settings.behind_proxy:
        return False
    return is_trusted(environ.get("REMOTE_ADDR", ""), settings.trusted_proxies)


@lru_cache(maxsize=1024)
def is_trusted(address: str, trusted: tuple[str, ...]) -> bool:
    """Return whether a peer is a trusted proxy.

    :param address: empty for the peer of a unix socket.
    """
    if not address:
        return UNIX in trusted
    try:
        peer = ipaddress.ip_address(address)
    except ValueError:
        return False
    if isinstance(peer, ipaddress.IPv6Address) and peer.ipv4_mapped is not None:
        peer = peer.ipv4_mapped
    return any(
        peer in ipaddress.ip_network(network, strict=False)
        for network in trusted
        if network != UNIX
    )


def _forwarded(environ: Mapping[str, Any], settings: WebSettings) -> dict[str, str]:
    """Return the proxies' ``proto``, ``host``, ``prefix`` and ``for``.

    ``Forwarded`` (RFC 7239) overrides the X-Forwarded headers.
    """
    said = {}
    for name in ("proto", "host", "prefix"):
        value = environ.get(f"HTTP_X_FORWARDED_{name.upper()}", "").partition(",")[0].strip()
        if value:
            said[name] = value
    chain = [{"for": node} for node in environ.get("HTTP_X_FORWARDED_FOR", "").split(",")]
    if (header := environ.get("HTTP_FORWARDED")) is not None:
        chain = [_pairs(element) for element in re.findall(r'(?:[^,"]|"[^"]*")+', header)]
    said |= _first_hop(chain, settings.trusted_proxies)
    prefix = said.get("prefix", "").rstrip("/")
    said["prefix"] = prefix if _PREFIX.fullmatch(prefix) else ""
    return said


def _pairs(element: str) -> dict[str, str]:
    matches = (_FORWARDED_PAIR.fullmatch(pair) for pair in element.split(";"))
    return {match[1].lower(): match[2].strip('"').replace("\\", "") for match in matches if match}


def _first_hop(chain: list[dict[str, str]], trusted: tuple[str, ...]) -> dict[str, str]:
    """Return the last element that does not name a trusted proxy.

    Every proxy appends its peer. The elements before that of the first untrusted peer may be
    forged.
    """
    for hop in reversed(chain):
        hop["for"] = _address(hop.get("for", "").strip())
        if not hop["for"] or not is_trusted(hop["for"], trusted):
            return hop
    return chain[0] if chain else {}


def _address(node: str) -> str:
    """Return the address in a node of ``Forwarded`` (RFC 7239, 6), empty if it has none."""
    if node.startswith("["):
        node = node[1:].partition("]")[0]
    elif node.count(":") == 1:
        node = node.partition(":")[0]
    try:
        return str(ipaddress.ip_address(node))
    except ValueError:
        return ""
