"""Every error that a client can see, with its status, code and message.

``web/responses.py`` turns them into HTTP. Codes are tusd's ``ERR_*`` where tusd has
one, so that clients and log filters written for tusd keep working.

tus clients retry 409, 423, 429 and 5xx, and forget the URL of an upload after any other
4xx. A temporary error is therefore never one of these other 4xx.
"""

from __future__ import annotations

import errno
from collections.abc import Mapping
from typing import ClassVar

#: The ``Retry-After`` of temporary errors, in seconds.
RETRY_AFTER = 1


class TusError(Exception):
    """An error that is sent to the client.

    :cvar status: the HTTP status.
    :cvar code: a stable name for programs, in tusd's form.
    :cvar message: one sentence for people; an instance may have a more precise one.
    :cvar retry_after: seconds for the ``Retry-After`` header; ``None`` sends none.
    """

    status: ClassVar[int] = 500
    code: ClassVar[str] = "ERR_INTERNAL_SERVER_ERROR"
    message: str = "The server could not process the request."
    retry_after: ClassVar[int | None] = None

    def __init__(self, message: str | None = None) -> None:
        if message is not None:
            self.message = message
        super().__init__(self.message)


class BadRequest(TusError):
    """A header, or a combination of headers, is invalid."""

    status = 400
    code = "ERR_INVALID_REQUEST"
    message = "The request is malformed."


class InvalidUploadLength(BadRequest):
    code = "ERR_INVALID_UPLOAD_LENGTH"
    message = "The Upload-Length header is missing or invalid."


class InvalidUploadDeferLength(BadRequest):
    code = "ERR_INVALID_UPLOAD_LENGTH_DEFER"
    message = "The Upload-Defer-Length header must be 1."


class AmbiguousUploadLength(BadRequest):
    code = "ERR_AMBIGUOUS_UPLOAD_LENGTH"
    message = "Upload-Length and Upload-Defer-Length exclude each other."


class InvalidUploadOffset(BadRequest):
    code = "ERR_INVALID_OFFSET"
    message = "The Upload-Offset header is missing or invalid."


class InvalidMetadata(BadRequest):
    code = "ERR_INVALID_METADATA"
    message = "The Upload-Metadata header is invalid."


class InvalidConcat(BadRequest):
    code = "ERR_INVALID_CONCAT"
    message = "The Upload-Concat header is invalid."


class PartsUnfinished(BadRequest):
    code = "ERR_UPLOAD_NOT_FINISHED"
    message = "One of the partial uploads is not finished."


class InvalidChecksum(BadRequest):
    code = "ERR_INVALID_CHECKSUM"
    message = "The Upload-Checksum header is invalid."


class ExtensionDisabled(BadRequest):
    """The request uses an extension that is switched off or that the data store lacks."""

    code = "ERR_EXTENSION_DISABLED"
    message = "The request needs an extension that this server does not offer."


class UnsupportedVersion(TusError):
    status = 412
    code = "ERR_UNSUPPORTED_VERSION"
    message = "The Tus-Resumable header is missing or names an unsupported version."


class InvalidContentType(TusError):
    status = 415
    code = "ERR_INVALID_CONTENT_TYPE"
    message = "The Content-Type header must be application/offset+octet-stream."


class MethodNotAllowed(TusError):
    """:param allowed: the methods that the URL supports, for ``Allow``."""

    status = 405
    code = "ERR_METHOD_NOT_ALLOWED"
    message = "This method is not allowed here."

    def __init__(self, allowed: tuple[str, ...]) -> None:
        super().__init__()
        self.allowed = allowed


class UploadNotFound(TusError):
    status = 404
    code = "ERR_UPLOAD_NOT_FOUND"
    message = "There is no upload with this URL."


class UploadGone(TusError):
    """The upload existed: its tombstone says that it was deleted or has expired."""

    status = 410
    code = "ERR_UPLOAD_GONE"
    message = "The upload was removed."


class FinalUploadUnmodifiable(TusError):
    status = 403
    code = "ERR_MODIFY_FINAL"
    message = "A final upload cannot be modified."


class OffsetMismatch(TusError):
    """:param offset: the upload's actual offset in bytes, for ``Upload-Offset``."""

    status = 409
    code = "ERR_MISMATCHED_OFFSET"
    message = "The Upload-Offset header differs from the upload's offset."

    def __init__(self, offset: int) -> None:
        super().__init__()
        self.offset = offset


class UploadExists(TusError):
    """The id or the path of a new upload is taken."""

    status = 409
    code = "ERR_UPLOAD_EXISTS"
    message = "An upload with this id or path exists already."


class UploadSizeExceeded(TusError):
    status = 413
    code = "ERR_UPLOAD_SIZE_EXCEEDED"
    message = "The request carries more bytes than the upload's length allows."


class MaxSizeExceeded(TusError):
    status = 413
    code = "ERR_MAX_SIZE_EXCEEDED"
    message = "The upload is larger than this server accepts."


class BodyTooLarge(TusError):
    status = 413
    code = "ERR_MAX_BODY_SIZE_EXCEEDED"
    message = "The request's body is larger than this server accepts."


class RangeNotSatisfiable(TusError):
    """:param size: the complete size in bytes, for ``Content-Range``."""

    status = 416
    code = "ERR_RANGE_NOT_SATISFIABLE"
    message = "The Range header lies outside of the upload."

    def __init__(self, size: int) -> None:
        super().__init__()
        self.size = size


class PreconditionFailed(TusError):
    status = 412
    code = "ERR_PRECONDITION_FAILED"
    message = "The upload is not the version that If-Match or If-Unmodified-Since asks for."


class ChecksumMismatch(TusError):
    status = 460
    code = "ERR_CHECKSUM_MISMATCH"
    message = "The body does not match the Upload-Checksum header."


class HookRefusal(TusError):
    """A hook refused the request; the client gets the hook's own answer.

    :param status: the HTTP status that the hook chose (400 to 599).
    :param body: the text for the client.
    :param headers: headers for the client, in wire form.
    """

    code = "ERR_UPLOAD_REJECTED"

    def __init__(
        self, status: int, body: str | None = None, headers: Mapping[str, str] | None = None
    ) -> None:
        super().__init__("The request was refused." if body is None else body)
        self.status = status  # type: ignore[misc]  # the one error whose status is data
        self.body = body
        self.headers = dict(headers or {})


class UploadStopped(HookRefusal):
    """A post-receive hook stopped the upload while it was being received."""

    code = "ERR_UPLOAD_STOPPED"


class UploadLocked(TusError):
    """The upload is in use by another request (WebDAV's status, as in tusd)."""

    status = 423
    code = "ERR_UPLOAD_LOCKED"
    message = "The upload is being used by another request."
    retry_after = RETRY_AFTER


class UploadInterrupted(UploadLocked):
    """This request held the upload's lock and released it for another request."""

    code = "ERR_UPLOAD_INTERRUPTED"
    message = "Another request for this upload took over."


class Unavailable(TusError):
    status = 503
    code = "ERR_UNAVAILABLE"
    message = "The server cannot process the request right now."
    retry_after: ClassVar[int | None] = RETRY_AFTER


class ServerShutdown(Unavailable):
    code = "ERR_SERVER_SHUTDOWN"
    message = "The server is shutting down; resume the upload."


class InfoConflict(Unavailable):
    """The record has changed since it was read."""

    code = "ERR_INFO_CONFLICT"
    message = "The upload was changed by another request; try again."


class LockLost(Unavailable):
    """The lease of the lock ran out: another request may hold the lock by now."""

    code = "ERR_LOCK_LOST"
    message = "The server lost its hold on the upload; resume it."


class HookFailed(Unavailable):
    """A blocking hook could not be reached, or failed."""

    code = "ERR_HOOK_FAILED"
    message = "The server could not ask its application about this request."


class HookBroken(HookFailed):
    """A blocking hook gave an invalid answer, or reported an error of its own.

    A retry would not help until the application is repaired.
    """

    status = 500
    code = "ERR_HOOK_BROKEN"
    message = "The server's application did not answer this request as it should."
    retry_after = None


class BodyIncomplete(Unavailable):
    code = "ERR_UNEXPECTED_EOF"
    message = "The request's body ended before its announced length."


class UnsupportedTransferCoding(TusError):
    status = 501
    code = "ERR_UNSUPPORTED_TRANSFER_CODING"
    message = "The only supported transfer coding is chunked."


class BodyMalformed(BadRequest):
    """The chunked encoding of a body is broken, so that its end is unknown."""

    code = "ERR_INVALID_BODY"
    message = "The request's body is not correctly chunked."


class ReadTimeout(Unavailable):
    code = "ERR_READ_TIMEOUT"
    message = "No bytes of the request's body arrived for too long."


class StorageFull(TusError):
    """The disk or the quota is full; the bytes received so far are kept."""

    status = 507
    code = "ERR_STORAGE_FULL"
    message = "The server has no space left for this upload."
    retry_after = 60


class LimitReached(StorageFull):
    """The upload exceeds the limit for all uploads together.

    :param limit: of all uploads together, in bytes.
    :param used: reserved by other uploads, in bytes.
    :param asked: requested for this one, in bytes.
    """

    def __init__(self, limit: int, used: int, asked: int) -> None:
        super().__init__(
            f"The server has no room for this upload: {used} of {limit} bytes are in use, and the "
            f"upload needs {asked}."
        )
        self.left = max(0, limit - used)


#: The errors of a file system that are temporary, or that an operator can end.
_PASSING = {
    errno.EROFS,
    errno.EIO,
    errno.ESTALE,
    errno.ETIMEDOUT,
    errno.EHOSTDOWN,
    errno.ENOTCONN,
    errno.EMFILE,
    errno.ENFILE,
    errno.ENOMEM,
    errno.EAGAIN,
    errno.EINTR,
    errno.EBUSY,
    errno.ENOSPC,
    errno.EDQUOT,
}


def is_temporary(error: OSError) -> bool:
    """Whether an error of a file system is temporary, and not a wrong configuration."""
    return error.errno in _PASSING


class ConfigurationError(Exception):
    """The server cannot start with its configuration."""


def startup_error(text: str, error: OSError) -> ConfigurationError | Unavailable:
    """Return the exception to raise from `error` if a file that the server needs is unusable.

    :param text: a sentence for the operator, for an error that is not temporary.
    """
    return Unavailable() if is_temporary(error) else ConfigurationError(text)
