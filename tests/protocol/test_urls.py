"""Origins and URLs: what proxies may say, Location, and URLs in Upload-Concat."""

from __future__ import annotations

from typing import Any

import pytest

from tuswsgi.core.errors import BadRequest, InvalidConcat
from tuswsgi.web.settings import LocationForm, WebSettings
from tuswsgi.web.urls import Origin, origin_of, upload_id, upload_url

PROXIED = WebSettings(behind_proxy=True)
ID = "0123456789abcdef"


def environ(headers: dict[str, str] | None = None, **values: Any) -> dict[str, Any]:
    given = {
        f"HTTP_{name.upper().replace('-', '_')}": text for name, text in (headers or {}).items()
    }
    return {
        "SERVER_PROTOCOL": "HTTP/1.1",
        "SERVER_NAME": "inside",
        "SERVER_PORT": "1081",
        "SCRIPT_NAME": "",
        "PATH_INFO": "/files",
        "REMOTE_ADDR": "127.0.0.1",
        "HTTP_HOST": "inside:1081",
        "wsgi.url_scheme": "http",
        **given,
        **values,
    }


def url_of(request: dict[str, Any], settings: WebSettings) -> str:
    return upload_url(request, ID, settings, origin_of(request, settings))


def location(headers: dict[str, str], settings: WebSettings = PROXIED, **values: Any) -> str:
    return url_of(environ(headers, **values), settings).removesuffix(f"/files/{ID}")


class TestHost:
    @pytest.mark.parametrize(
        "host",
        ["example.org", "example.org:443", "127.0.0.1:1081", "[::1]", "[2001:db8::1]:8080", "a_b"],
    )
    def test_it_is_what_the_client_said(self, host: str) -> None:
        assert location({"Host": host}, WebSettings()) == f"http://{host}"

    # "If the port is equal to the default port for a scheme, the normal form is to omit the port
    # subcomponent." (RFC 9110, 4.2.3)
    @pytest.mark.parametrize(
        ("scheme", "port"), [("http", "80"), ("https", "443"), ("http", ""), ("http", "00080")]
    )
    @pytest.mark.parametrize("host", ["example.org", "127.0.0.1", "[2001:db8::1]"])
    def test_the_default_port_is_left_out(self, host: str, scheme: str, port: str) -> None:
        said = {"Host": f"{host}:{port}"}
        values = {"wsgi.url_scheme": scheme}
        assert location(said, WebSettings(), **values) == f"{scheme}://{host}"
        for forwarded in (
            {"X-Forwarded-Host": f"{host}:{port}", "X-Forwarded-Proto": scheme},
            {"Host": f"{host}:{port}", "X-Forwarded-Proto": scheme},
            {"Forwarded": f'host="{host}:{port}";proto={scheme}'},
        ):
            assert location(forwarded) == f"{scheme}://{host}"

    def test_the_default_port_of_another_scheme_is_not(self) -> None:
        said = {"Host": "example.org:80", "X-Forwarded-Proto": "https"}
        assert location(said) == "https://example.org:80"

    @pytest.mark.parametrize("key", ["RAW_URI", "REQUEST_URI"])
    @pytest.mark.parametrize("host", ["example.org", "example.org:8080", "[::1]:8080"])
    def test_the_targets_own_wins(self, host: str, key: str) -> None:
        for target in (f"http://{host}/files", f"HTTP://{host}?x", f"https://{host}"):
            request = environ({"Host": "other.org"}, **{key: target})
            assert origin_of(request, WebSettings()).host == host
        # What a proxy says that is trusted comes from farther out.
        said = environ({"X-Forwarded-Host": "outside.org"}, **{key: f"http://{host}/files"})
        assert origin_of(said, PROXIED).host == "outside.org"

    @pytest.mark.parametrize("target", ["/http://evil.org/", "//evil.org/files", "*", "/files"])
    def test_a_target_that_is_but_a_path(self, target: str) -> None:
        assert origin_of(environ(RAW_URI=target), WebSettings()).host == "inside:1081"

    def test_a_target_whose_host_is_none(self) -> None:
        with pytest.raises(BadRequest, match="host in the request's target is invalid"):
            origin_of(environ(RAW_URI="http://user@example.org/files"), WebSettings())

    @pytest.mark.parametrize(
        "host",
        [
            "a b",
            "a/b",
            "user@host",
            "a\\b",
            'a"b',
            "é",
            "[::1",
            "a:b",
            "a:123456",
            "a#b",
            "a?b",
            "<",
        ],
    )
    def test_what_is_no_host(self, host: str) -> None:
        with pytest.raises(BadRequest, match="Host header is invalid"):
            origin_of(environ({"Host": host}), WebSettings())

    def test_http_1_1_needs_one(self) -> None:
        # "A server MUST respond with a 400 (Bad Request) status code to any HTTP/1.1
        # request message that lacks a Host header field" (RFC 9112, 3.2)
        with pytest.raises(BadRequest, match="Host header is missing"):
            origin_of(environ(HTTP_HOST=""), WebSettings())

    def test_http_1_0_does_not(self) -> None:
        old = environ(HTTP_HOST="", SERVER_PROTOCOL="HTTP/1.0")
        assert origin_of(old, WebSettings()).host == "inside"


class TestWhoIsBelieved:
    SAID = {  # noqa: RUF012
        "X-Forwarded-Proto": "https",
        "X-Forwarded-Host": "example.org",
        "X-Forwarded-Prefix": "/api",
        "X-Forwarded-For": "203.0.113.9",
        "Forwarded": "for=203.0.113.9;proto=https;host=example.org",
    }

    @pytest.mark.parametrize(
        "peer",
        [
            "127.0.0.1",
            "127.8.9.1",
            "10.1.2.3",
            "172.16.0.1",
            "192.168.1.1",
            "::1",
            "fd00::1",
            "::ffff:10.0.0.1",
            "",
        ],
    )
    def test_private_peers_and_unix_sockets(self, peer: str) -> None:
        assert location(self.SAID, REMOTE_ADDR=peer) == "https://example.org/api"

    @pytest.mark.parametrize(
        "peer", ["203.0.113.1", "172.32.0.1", "2001:db8::1", "x", "10.0.0.1.x"]
    )
    def test_nobody_else(self, peer: str) -> None:
        origin = origin_of(environ(self.SAID, REMOTE_ADDR=peer), PROXIED)
        assert origin == Origin("http", "inside:1081", "", peer)

    def test_nobody_without_the_switch(self) -> None:
        origin = origin_of(environ(self.SAID), WebSettings())
        assert origin == Origin("http", "inside:1081", "", "127.0.0.1")

    def test_those_that_are_named(self) -> None:
        settings = WebSettings(behind_proxy=True, trusted_proxies=("203.0.113.0/24", "2001:db8::7"))
        for peer, believed in {
            "203.0.113.1": True,
            "2001:db8::7": True,
            "2001:db8::8": False,
            "127.0.0.1": False,
            "": False,
        }.items():
            origin = origin_of(environ(self.SAID, REMOTE_ADDR=peer), settings)
            assert (origin.scheme == "https") is believed


class TestXForwarded:
    def test_each_alone(self) -> None:
        assert location({"X-Forwarded-Proto": "https"}) == "https://inside:1081"
        assert location({"X-Forwarded-Host": "example.org:8443"}) == "http://example.org:8443"
        assert location({"X-Forwarded-Prefix": "/api/v1"}) == "http://inside:1081/api/v1"

    @pytest.mark.parametrize("proto", ["HTTPS", "https, http", " https "])
    def test_the_first_of_several(self, proto: str) -> None:
        assert location({"X-Forwarded-Proto": proto}) == "https://inside:1081"

    @pytest.mark.parametrize("proto", ["", "ftp", "javascript", "https:", "\xe9"])
    def test_a_scheme_that_is_none(self, proto: str) -> None:
        assert location({"X-Forwarded-Proto": proto}) == "http://inside:1081"

    def test_a_host_that_is_none(self) -> None:
        with pytest.raises(BadRequest, match="Host"):
            location({"X-Forwarded-Host": "a/b"})

    @pytest.mark.parametrize("prefix", ["/api/", "/api", "/api//"])
    def test_slashes_at_the_end_of_a_prefix(self, prefix: str) -> None:
        assert location({"X-Forwarded-Prefix": prefix}) == "http://inside:1081/api"

    @pytest.mark.parametrize(
        "prefix",
        [
            "api",
            "//evil.org",
            "/a b",
            "/a//b",
            "https://evil.org",
            "/a?b",
            "/a#b",
            "/\xe9",
            "/",
            "/\\evil",
            "/..",
            "/a/../b",
            "/./a",
        ],
    )
    def test_a_prefix_that_is_none(self, prefix: str) -> None:
        assert location({"X-Forwarded-Prefix": prefix}) == "http://inside:1081"

    @pytest.mark.parametrize(
        ("chain", "client"),
        [
            ("203.0.113.9", "203.0.113.9"),
            ("203.0.113.9:4711", "203.0.113.9"),
            ("[2001:db8::1]:4711", "2001:db8::1"),
            ("2001:db8::1", "2001:db8::1"),
            ("6.6.6.6, 203.0.113.9, 10.0.0.1", "203.0.113.9"),
            ("10.0.0.7, 10.0.0.1", "10.0.0.7"),
            ("unknown", "127.0.0.1"),
            ("", "127.0.0.1"),
            ("<script>", "127.0.0.1"),
        ],
    )
    def test_the_client(self, chain: str, client: str) -> None:
        assert origin_of(environ({"X-Forwarded-For": chain}), PROXIED).client == client


class TestForwarded:
    @pytest.mark.parametrize(
        ("header", "url", "client"),
        [
            ("proto=https", "https://inside:1081", "127.0.0.1"),
            ("proto=https;host=example.org", "https://example.org", "127.0.0.1"),
            ("Proto=HTTPS; Host=example.org", "https://example.org", "127.0.0.1"),
            ('for=192.0.2.60;proto="https"', "https://inside:1081", "192.0.2.60"),
            ('host="example.org:8443";proto=https', "https://example.org:8443", "127.0.0.1"),
            ('host="[2001:db8::1]:443";proto=https', "https://[2001:db8::1]", "127.0.0.1"),
            ('for="[2001:db8:cafe::17]:4711"', "http://inside:1081", "2001:db8:cafe::17"),
            ('for="[2001:db8:cafe::17]"', "http://inside:1081", "2001:db8:cafe::17"),
            ('for="192.0.2.43:47011"', "http://inside:1081", "192.0.2.43"),
            ("for=_gazonk;host=example.org", "http://example.org", "127.0.0.1"),
            ("for=unknown;proto=https", "https://inside:1081", "127.0.0.1"),
            ('for=1.1.1.1;by="a,b;c";host=example.org', "http://example.org", "1.1.1.1"),
            ('host="exam\\ple.org"', "http://example.org", "127.0.0.1"),
            ("", "http://inside:1081", "127.0.0.1"),
            ("garbage", "http://inside:1081", "127.0.0.1"),
            (";;;,,;=", "http://inside:1081", "127.0.0.1"),
            ('host="example.org', "http://inside:1081", "127.0.0.1"),
        ],
    )
    def test_one_hop(self, header: str, url: str, client: str) -> None:
        assert location({"Forwarded": header}) == url
        assert origin_of(environ({"Forwarded": header}), PROXIED).client == client

    def test_several_hops(self) -> None:
        # The client talks to the proxy that is farthest out among those we trust; what it
        # says itself comes before and counts for nothing.
        header = (
            "for=6.6.6.6;proto=ftp;host=evil.org, for=203.0.113.9;proto=https;host=example.org,"
            " for=10.0.0.2;proto=http;host=middle"
        )
        assert location({"Forwarded": header}) == "https://example.org"
        assert origin_of(environ({"Forwarded": header}), PROXIED).client == "203.0.113.9"

    def test_it_wins_over_what_came_before_it(self) -> None:
        headers = {
            "Forwarded": "host=example.org;for=203.0.113.9",
            "X-Forwarded-Host": "other.org",
            "X-Forwarded-Proto": "https",
            "X-Forwarded-Prefix": "/api",
            "X-Forwarded-For": "6.6.6.6",
        }
        assert location(headers) == "https://example.org/api"
        assert origin_of(environ(headers), PROXIED).client == "203.0.113.9"


class TestLocation:
    def test_relative(self) -> None:
        settings = WebSettings(location=LocationForm.RELATIVE, behind_proxy=True)
        assert url_of(environ(), settings) == f"/files/{ID}"
        prefixed = environ({"X-Forwarded-Prefix": "/api"})
        assert url_of(prefixed, settings) == f"/api/files/{ID}"

    @pytest.mark.parametrize("public", ["https://example.org/up", "https://example.org/up/"])
    @pytest.mark.parametrize("form", LocationForm)
    def test_public(self, public: str, form: LocationForm) -> None:
        settings = WebSettings(public_url=public, behind_proxy=True, location=form)
        headers = {"X-Forwarded-Host": "other.org", "X-Forwarded-Prefix": "/api"}
        assert url_of(environ(headers), settings) == f"https://example.org/up/{ID}"

    def test_below_a_script(self) -> None:
        mounted = environ(SCRIPT_NAME="/app", PATH_INFO="/files/")
        assert url_of(mounted, WebSettings()) == f"http://inside:1081/app/files/{ID}"

    def test_paths_that_are_not_ascii(self) -> None:
        path = "/файлы".encode().decode("latin-1")
        url = url_of(environ(PATH_INFO=path), WebSettings())
        assert url == f"http://inside:1081/%D1%84%D0%B0%D0%B9%D0%BB%D1%8B/{ID}"


class TestUrlsOfParts:
    @pytest.mark.parametrize(
        "url",
        [
            f"/files/{ID}",
            f"http://inside:1081/files/{ID}",
            f"HTTP://INSIDE:1081/files/{ID}",
            f"https://inside:1081/files/{ID}",
            f"//inside:1081/files/{ID}",
            f"http://inside/files/{ID}",
            f"http://inside:80/files/{ID}",
            f"http://other.org/files/{ID}",
            f"//other.org:8080/files/{ID}",
            f"http://user@inside:1081/files/{ID}",
        ],
    )
    def test_of_any_host(self, url: str) -> None:
        assert upload_id(url, environ(), WebSettings()) == ID

    @pytest.mark.parametrize(
        "url",
        [
            f"/api/files/{ID}",
            f"/files/{ID}",
            f"https://example.org/api/files/{ID}",
        ],
    )
    def test_behind_a_proxy(self, url: str) -> None:
        proxied = environ(
            {
                "X-Forwarded-Host": "example.org",
                "X-Forwarded-Proto": "https",
                "X-Forwarded-Prefix": "/api",
            }
        )
        assert upload_id(url, proxied, PROXIED) == ID

    @pytest.mark.parametrize(
        "url",
        [
            f"https://example.org/up/{ID}",
            f"/up/{ID}",
            f"/files/{ID}",
            f"http://inside:1081/files/{ID}",
        ],
    )
    def test_of_the_public_url(self, url: str) -> None:
        settings = WebSettings(public_url="https://example.org/up/")
        assert upload_id(url, environ(), settings) == ID

    @pytest.mark.parametrize(
        "url",
        [
            f"http://evil.org/{ID}",
            f"http://evil.org/other/{ID}",
            f"http://evil.org/files/{ID}?x",
            f"ftp://inside:1081/files/{ID}",
            f"javascript:/files/{ID}",
            f"/other/{ID}",
            f"/{ID}",
            ID,
            f"files/{ID}",
            f"/files/x/{ID}",
            f"/files//{ID}",
            f"/files/../files/{ID}",
            f"/files/{ID}?x",
            f"/files/{ID}#x",
            "/files/",
            "/files",
            "/files/..",
            "/files/%2e%2e",
            f"/files/%2F{ID}",
            "/files/.hidden",
            "/files/" + "x" * 129,
            "/files/\xe9",
            "/files/a%00",
            "http://[::1/files/a",
            "http://[inside]/files/a",
            "",
        ],
    )
    def test_of_nothing_here(self, url: str) -> None:
        with pytest.raises(InvalidConcat, match="The Upload-Concat header"):
            upload_id(url, environ(), WebSettings())

    def test_paths_that_are_not_ascii(self) -> None:
        path = "/файлы".encode().decode("latin-1")
        for url in (
            f"/%D1%84%D0%B0%D0%B9%D0%BB%D1%8B/{ID}",
            f"/%d1%84%d0%b0%d0%b9%d0%bb%d1%8b/{ID}",
        ):
            assert upload_id(url, environ(PATH_INFO=path), WebSettings()) == ID
