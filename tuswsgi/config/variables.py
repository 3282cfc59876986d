"""Finds environment variables that look like options, but that nothing reads."""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterator, Mapping, Set

#: Variables that are not those of an option.
_OTHERS = frozenset({"TUSWSGI_CONFIG"})

#: What Kubernetes sets in each container for a service that is called `tuswsgi` or `rustus`.
_OF_KUBERNETES = re.compile(
    r"(TUSWSGI|RUSTUS)_(SERVICE_HOST|SERVICE_PORT(_\w+)?|PORT_\d+_(TCP|UDP|SCTP)(_\w+)?)"
)

_URL_OF_KUBERNETES = re.compile(r"(tcp|udp|sctp)://[0-9a-fA-F.:\[\]]+")


def is_of_kubernetes(name: str, value: str) -> bool:
    """Return whether Kubernetes has set a variable, e.g. ``TUSWSGI_PORT=tcp://10.0.0.7:1081``."""
    if name in ("TUSWSGI_PORT", "RUSTUS_PORT"):
        return _URL_OF_KUBERNETES.fullmatch(value) is not None
    return _OF_KUBERNETES.fullmatch(name) is not None


def unread(environ: Mapping[str, str], known: Set[str]) -> Iterator[str]:
    """Yield a sentence for each variable that was probably meant as an option.

    :param known: the variables of all options.
    """
    known = known | _OTHERS
    for name in sorted(environ):
        is_known = name in known or name.removesuffix("_FILE") in known
        if is_known or not name.startswith(("TUSWSGI_", "RUSTUS_")):
            continue
        if is_of_kubernetes(name, environ[name]):
            continue
        close = difflib.get_close_matches(name, known, n=1, cutoff=0.8)
        hint = f" Did you mean {close[0]}?" if close else ""
        yield f"The environment variable {name} has no effect: there is no such option.{hint}"
