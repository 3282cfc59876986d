"""One short function per method: parse the request, call ``Uploads``, build the response."""

from __future__ import annotations

from collections.abc import Callable, Collection
from typing import Any, NamedTuple

from tuswsgi.core.errors import (
    ExtensionDisabled,
    InvalidUploadLength,
    UnsupportedVersion,
    UploadGone,
    UploadNotFound,
)
from tuswsgi.core.events import RequestInfo
from tuswsgi.core.extensions import Extension
from tuswsgi.observing.logs import UPLOAD_ID
from tuswsgi.protocol.creating import Creation
from tuswsgi.protocol.uploads import Uploads
from tuswsgi.transfer.body import RequestBody
from tuswsgi.transfer.checksum import ALGORITHMS
from tuswsgi.transfer.reader import UploadReader
from tuswsgi.transfer.sendfile import Content
from tuswsgi.web import downloads
from tuswsgi.web import headers as tus
from tuswsgi.web.headers import TusHeaders
from tuswsgi.web.mixed_content import MixedContentWatch
from tuswsgi.web.responses import Answer, Headers, success_response
from tuswsgi.web.settings import WebSettings
from tuswsgi.web.urls import Origin, upload_id, upload_url


class Call(NamedTuple):
    """One request, as the views see it.

    :param id: the upload's; empty for the collection.
    :param common: the headers that every response has.
    """

    environ: dict[str, Any]
    id: str
    headers: TusHeaders
    body: RequestBody
    request: RequestInfo
    common: Headers
    origin: Origin


_Methods = dict[str, Callable[[Call], Answer]]


class Views:
    """The methods of the upload collection and of uploads.

    :param methods: the methods to serve, ``None`` for all.
    """

    def __init__(
        self, uploads: Uploads, settings: WebSettings, methods: Collection[str] | None = None
    ) -> None:
        self._uploads = uploads
        self._settings = settings
        self._mixed_content = MixedContentWatch(settings)
        self._extensions = frozenset(uploads.extensions)
        self._capabilities = self._describe_server()
        of_collection: _Methods = {"OPTIONS": self.options}
        if Extension.CREATION in self._extensions:
            of_collection["POST"] = self.post
        of_upload: _Methods = {"OPTIONS": self.options, "HEAD": self.head, "PATCH": self.patch}
        if Extension.GETTING in self._extensions:
            of_upload["GET"] = self.get
        if Extension.TERMINATION in self._extensions:
            of_upload["DELETE"] = self.delete
        self._of_collection, self._of_upload = (
            {name: view for name, view in views.items() if methods is None or name in methods}
            for views in (of_collection, of_upload)
        )

    def methods(self, id: str) -> _Methods:
        """Return the views of a URL by their methods."""
        return self._of_upload if id else self._of_collection

    def options(self, call: Call) -> Answer:
        return Answer(204, [*call.common, *self._capabilities], b"", call.body)

    def post(self, call: Call) -> Answer:
        creation = self._creation(call)
        reader = self._reader(call)
        if not reader.is_empty:
            self._require(Extension.CREATION_WITH_UPLOAD, "POST requests with a body")
            # "The Client MUST include the Content-Type: application/offset+octet-stream
            # header." (Creation With Upload)
            call.headers.check_content_type()
        info, answer = self._uploads.create(creation, reader, call.request)
        call.environ[UPLOAD_ID] = info.id
        location = upload_url(call.environ, info.id, self._settings, call.origin)
        self._mixed_content.check_location(call.environ, location)
        headers = [*call.common, ("Location", location), *tus.describe(info, full=False)]
        return success_response(201, headers, info.response or answer, call.body)

    def head(self, call: Call) -> Answer:
        info = self._uploads.inspect(call.id, call.request)
        # "The Server MUST prevent the client and/or proxies from caching the response by
        # adding the Cache-Control: no-store header to the response." (HEAD)
        headers = [*call.common, ("Cache-Control", "no-store"), *tus.describe(info, full=True)]
        return Answer(200, headers, b"", call.body)

    def head_of_download(self, call: Call) -> Answer:
        """Respond to a HEAD without ``Tus-Resumable``, which browsers and ``curl -I`` send.

        As in tusd, the response has the headers of a GET and the offset. Unfinished uploads cannot
        be downloaded, so only tus clients may ask for them.
        """
        try:
            info = self._uploads.downloadable(call.id, call.request)
        except (UploadNotFound, UploadGone):
            raise UnsupportedVersion from None
        if not info.is_finished:
            raise UnsupportedVersion
        validators = downloads.validators(info)
        if downloads.is_cached(call.environ, validators):
            return Answer(304, [*call.common, *validators], b"", call.body)
        # If the content is missing, HEAD fails as GET does.
        self._uploads.open(info, 0).close()
        headers = [
            *call.common,
            *validators,
            *downloads.content_headers(info),
            ("Content-Length", str(info.offset)),
            *tus.describe(info, full=True),
        ]
        return Answer(200, headers, b"", call.body)

    def patch(self, call: Call) -> Answer:
        call.headers.check_content_type()
        offset = call.headers.offset
        size = call.headers.length
        info = self._uploads.append(call.id, offset, size, self._reader(call), call.request)
        # "The Server MUST acknowledge successful PATCH requests with the 204 No Content
        # status. It MUST include the Upload-Offset header containing the new offset."
        headers = [*call.common, *tus.describe(info, full=False)]
        return success_response(204, headers, info.response, call.body)

    def delete(self, call: Call) -> Answer:
        answer = self._uploads.terminate(call.id, call.request)
        return success_response(204, call.common, answer, call.body)

    def get(self, call: Call) -> Answer:
        info = self._uploads.downloadable(call.id, call.request)
        validators = downloads.validators(info)
        if downloads.is_cached(call.environ, validators):
            return Answer(304, [*call.common, *validators], b"", call.body)
        wanted = downloads.wanted_range(call.environ, validators, info.offset)
        start, stop = wanted or (0, info.offset)
        headers = [
            *call.common,
            *validators,
            *downloads.content_headers(info),
            ("Content-Length", str(stop - start)),
        ]
        if wanted is not None:
            headers.append(("Content-Range", f"bytes {start}-{stop - 1}/{info.offset}"))
        timeout = self._uploads.settings.network_timeout
        content = Content(self._uploads.open(info, start), stop - start, timeout)
        return Answer(206 if wanted else 200, headers, content, call.body)

    def _creation(self, call: Call) -> Creation:
        headers = call.headers
        concat = headers.concat
        deferred = headers.defers_length
        if concat is not None:
            self._require(Extension.CONCATENATION, tus.UPLOAD_CONCAT)
        if deferred:
            self._require(Extension.CREATION_DEFER_LENGTH, tus.UPLOAD_DEFER_LENGTH)
        if concat is None or concat == "partial":
            return Creation(headers.promised_size, headers.metadata, concat)
        # "The Client MUST NOT include the Upload-Length header in the final upload
        # creation." (Concatenation)
        if deferred or headers.length is not None:
            raise InvalidUploadLength("A final upload takes no Upload-Length header.")
        urls = tus.final_urls(concat, self._uploads.settings.max_parts)
        parts = tuple(upload_id(url, call.environ, self._settings) for url in urls)
        return Creation(None, headers.metadata, concat, parts)

    def _reader(self, call: Call) -> UploadReader:
        checksum = call.headers.checksum
        awaits_trailer = call.headers.announces_checksum
        if checksum is not None or awaits_trailer:
            self._require(Extension.CHECKSUM, tus.UPLOAD_CHECKSUM)
        awaits_trailer = awaits_trailer and checksum is None
        if awaits_trailer:
            self._require(Extension.CHECKSUM_TRAILER, "Checksums in trailers")
        return UploadReader(call.body, checksum=checksum, awaits_trailer=awaits_trailer)

    def _require(self, extension: Extension, what: str) -> None:
        if extension not in self._extensions:
            raise ExtensionDisabled(f"{what}: the extension {extension} is not offered here.")

    def _describe_server(self) -> Headers:
        headers = [(tus.TUS_VERSION, tus.VERSION)]
        if self._extensions:
            names = ",".join(str(extension) for extension in self._uploads.extensions)
            headers.append((tus.TUS_EXTENSION, names))
        # "The Server SHOULD set this header if there is a known hard limit."
        if self._uploads.settings.max_file_size is not None:
            headers.append((tus.TUS_MAX_SIZE, str(self._uploads.settings.max_file_size)))
        if Extension.CHECKSUM in self._extensions:
            headers.append((tus.TUS_CHECKSUM_ALGORITHM, ",".join(ALGORITHMS)))
        return headers
