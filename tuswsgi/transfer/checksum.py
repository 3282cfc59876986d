"""The algorithms and values of the Checksum extension.

Names are those of the specification (lower-case ASCII). A digest is the algorithm's raw bytes,
for crc32 four bytes in network order.
"""

from __future__ import annotations

import binascii
import hashlib
import zlib
from base64 import b64decode
from collections.abc import Callable
from dataclasses import dataclass
from hmac import compare_digest
from typing import Protocol

from tuswsgi.core.errors import InvalidChecksum


class Hash(Protocol):
    """The part of hashlib's objects that is used."""

    def update(self, data: bytes | memoryview, /) -> None: ...

    def digest(self) -> bytes: ...


class _Crc32:
    def __init__(self) -> None:
        self._value = 0

    def update(self, data: bytes | memoryview, /) -> None:
        self._value = zlib.crc32(data, self._value)

    def digest(self) -> bytes:
        return self._value.to_bytes(4, "big")


#: "The Server MUST support at least the SHA1 checksum algorithm identified by `sha1`."
#: Clients use the first ones; the others come with the library.
ALGORITHMS: dict[str, Callable[[], Hash]] = {
    "sha1": lambda: hashlib.sha1(usedforsecurity=False),
    "md5": lambda: hashlib.md5(usedforsecurity=False),
    "crc32": _Crc32,
    "sha256": hashlib.sha256,
    "sha512": hashlib.sha512,
    "sha224": hashlib.sha224,
    "sha384": hashlib.sha384,
    "sha3_256": hashlib.sha3_256,
    "sha3_512": hashlib.sha3_512,
    "blake2b": hashlib.blake2b,
    "blake2s": hashlib.blake2s,
}


@dataclass(frozen=True)
class Checksum:
    """The checksum of a body, as its client sent it."""

    algorithm: str
    digest: bytes

    @classmethod
    def parse(cls, text: str) -> Checksum:
        """Return the checksum of an ``Upload-Checksum`` header or trailer.

        :raises InvalidChecksum: "400 Bad Request if the checksum algorithm is not
            supported by the server", and if the value is malformed.
        """
        algorithm, _, encoded = text.strip(" \t").partition(" ")
        if algorithm not in ALGORITHMS:
            raise InvalidChecksum("The Upload-Checksum header names an unsupported algorithm.")
        try:
            digest = b64decode(encoded.strip(" \t"), validate=True)
        except (binascii.Error, ValueError):
            raise InvalidChecksum("The Upload-Checksum header's value is not Base64.") from None
        if len(digest) != len(ALGORITHMS[algorithm]().digest()):
            raise InvalidChecksum("The Upload-Checksum header's value has the wrong length.")
        return cls(algorithm, digest)

    def hash(self) -> Hash:
        """Return a fresh hash object of the algorithm."""
        return ALGORITHMS[self.algorithm]()

    def matches(self, hash: Hash) -> bool:
        return compare_digest(hash.digest(), self.digest)
