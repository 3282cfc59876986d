"""The tus extensions by name, and which of them need each other or the data store."""

from __future__ import annotations

from enum import Enum


class Extension(str, Enum):
    """An extension of tus 1.0.0, by the name in ``Tus-Extension``.

    ``GETTING`` (downloads) is not in the specification; the name is rustus'.
    """

    CREATION = "creation"
    CREATION_WITH_UPLOAD = "creation-with-upload"
    CREATION_DEFER_LENGTH = "creation-defer-length"
    EXPIRATION = "expiration"
    CHECKSUM = "checksum"
    CHECKSUM_TRAILER = "checksum-trailer"
    TERMINATION = "termination"
    CONCATENATION = "concatenation"
    CONCATENATION_UNFINISHED = "concatenation-unfinished"
    GETTING = "getting"

    def __str__(self) -> str:
        return self.value


#: "If the Server does not offer the Creation extension, it MUST NOT offer the
#: Creation With Upload extension either" (Creation With Upload); the others
#: extend their base in the same way.
REQUIRES: dict[Extension, Extension] = {
    Extension.CREATION_WITH_UPLOAD: Extension.CREATION,
    Extension.CREATION_DEFER_LENGTH: Extension.CREATION,
    Extension.CHECKSUM_TRAILER: Extension.CHECKSUM,
    Extension.CONCATENATION: Extension.CREATION,
    Extension.CONCATENATION_UNFINISHED: Extension.CONCATENATION,
}

#: The extensions that a data store has to support; the others do not concern it.
OF_STORES: frozenset[Extension] = frozenset(
    {
        Extension.CHECKSUM,
        Extension.CHECKSUM_TRAILER,
        Extension.TERMINATION,
        Extension.CONCATENATION,
        Extension.CONCATENATION_UNFINISHED,
        Extension.GETTING,
    }
)
