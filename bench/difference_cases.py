"""The cases of `difference.py`: requests and answers, made from a seed and the case's number.

A case is a value. The same seed and number always give the same case, so that one can be replayed.
Every peculiarity that is chosen is one of the case's tags.
"""

from __future__ import annotations

import gzip
import random
import zlib
from collections.abc import Sequence
from typing import NamedTuple

Table = Sequence[tuple[int, str, bytes]]  #: weight, tag ("" for what is usual), value

TARGET_SHARE = 0.5  # of all cases
SILENT_SHARE = 0.004  # cases that wait for a deadline
DRIP_SECONDS = 0.0005
SLOW_DRIP_SECONDS = 0.05
ANSWER_HEAD_BYTES = (32768, 65536, 262144, 300000)  # near known limits
NUMBER_OF_HEADERS = (95, 99, 100, 101, 102, 150, 300, 500)
EXPOSITION = b'# HELP up_a Help.\n# TYPE up_a gauge\nup_a 1\nup_b{c="d"} 2.5\n'
OPENMETRICS = b"# TYPE a counter\na_total 1\n# EOF\n"
SMUGGLED_REQUEST = b"GET /nowhere HTTP/1.1\r\nHost: smuggled\r\n\r\n"
SMUGGLED_ANSWER = b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nx\n"


class Step(NamedTuple):
    """One thing that a peer does: send, pause, half-close, or how it ends the connection."""

    action: str  # "send", "pause", "half-close", "close", "reset", "cut", "hold"
    data: bytes = b""
    seconds: float = 0


Steps = tuple[Step, ...]


class Case(NamedTuple):
    """What a client sends on one connection, and what the target plays when it is asked."""

    number: int
    direction: str  # "client" or "target": which side is peculiar
    tags: tuple[str, ...]
    listener: str  # "plain" or "tls"
    client_tls: bool  # whether the client shakes hands
    client: Steps
    target: Steps
    module: str
    waits: bool  # for a deadline


class Draft:
    """The choices of one case, and the tags of those that are peculiar."""

    def __init__(self, seed: str) -> None:
        self.random = random.Random(seed)  # noqa: S311 - a reproducible choice, not a secret
        self.tags: list[str] = []

    def tag(self, name: str) -> None:
        """Add a tag, once."""
        if name and name not in self.tags:
            self.tags.append(name)

    def happens(self, share: float, tag: str = "") -> bool:
        """Return True in this share of the cases, and add the tag then."""
        found = self.random.random() < share
        if found:
            self.tag(tag)
        return found

    def choose(self, table: Table) -> bytes:
        """Return one value of a table, and add its tag."""
        _, tag, value = self.random.choices(table, [row[0] for row in table])[0]
        self.tag(tag)
        return value

    def between(self, low: int, high: int) -> int:
        """Return a number from low to high."""
        return self.random.randint(low, high)


# --- what clients send

METHODS: Table = (
    (70, "", b"GET"),
    (10, "HEAD", b"HEAD"),
    (3, "POST", b"POST"),
    (2, "OPTIONS", b"OPTIONS"),
    (1, "CONNECT", b"CONNECT"),
    (1, "TRACE", b"TRACE"),
    (1, "method in small letters", b"get"),
    (1, "method with a bracket", b"G(T"),
    (1, "method with a colon", b"GE:T"),
    (1, "method with a control character", b"GE\x01T"),
    (1, "method not ASCII", b"G\xc3\x8bT"),
    (1, "long method", b"A" * 3000),
    (1, "no method", b""),
)
TARGETS: Table = (
    (30, "", b"/-/healthy"),
    (12, "", b"/proxy?module=f"),
    (4, "", b"/"),
    (4, "/sd", b"/sd"),
    (4, "", b"/nowhere"),
    (2, "/-/reload", b"/-/reload"),
    (2, "", b"/proxy?module=unknown"),
    (2, "", b"/proxy"),
    (2, "double slash", b"//proxy?module=f"),
    (2, "absolute form", b"http://example.org/-/healthy"),
    (1, "absolute form without path", b"http://example.org"),
    (1, "absolute form without path", b"http://example.org?module=f"),
    (1, "absolute form in capitals", b"HTTPS://EXAMPLE.ORG/-/healthy"),
    (1, "absolute form with port", b"http://[::1]:99999/-/healthy"),
    (1, "absolute form of ftp", b"ftp://example.org/-/healthy"),
    (1, "absolute form without host", b"http:///-/healthy"),
    (1, "authority form", b"example.org:80"),
    (1, "asterisk form", b"*"),
    (1, "fragment", b"/-/healthy#x"),
    (1, "percent in the path", b"/%2d/healthy"),
    (1, "broken percent", b"/proxy?module=%zz%"),
    (1, "not ASCII in the target", b"/\xc3\xa9"),
    (1, "control character in the target", b"/-/heal\x01thy"),
    (1, "NUL in the target", b"/-/healthy\0"),
    (1, "tab in the target", b"/-/healthy\tx"),
    (1, "bare CR in the target", b"/-/healthy\rx"),
    (1, "vertical tab in the target", b"/-/healthy\x0bx"),
    (1, "DEL in the target", b"/-/healthy\x7f"),
    (1, "no slash", b"-/healthy"),
    (1, "empty query", b"/-/healthy?"),
    (1, "dots in the path", b"/./-/healthy"),
    (1, "semicolon in the path", b"/-/healthy;x"),
    (1, "backslash in the path", b"/-\\healthy"),
    (1, "quotes in the target", b"/<\"'>"),
    (1, "no target", b""),
)
VERSIONS: Table = (
    (70, "", b"HTTP/1.1"),
    (12, "HTTP/1.0", b"HTTP/1.0"),
    (1, "HTTP/0.9", b"HTTP/0.9"),
    (1, "HTTP/1.2", b"HTTP/1.2"),
    (1, "HTTP/2.0", b"HTTP/2.0"),
    (1, "HTTP/1", b"HTTP/1"),
    (1, "HTTP/1.10", b"HTTP/1.10"),
    (1, "HTTP/01.1", b"HTTP/01.1"),
    (1, "version with two dots", b"HTTP/1.1.1"),
    (1, "version without digits", b"HTTP/."),
    (1, "version with a sign", b"HTTP/+1.1"),
    (1, "version not HTTP", b"HTTQ/1.1"),
    (1, "version in small letters", b"http/1.1"),
    (1, "version with a blank", b"HTTP/1.1 "),
    (1, "version with a tab", b"HTTP/1.1\t"),
    (1, "version with words", b"HTTP/1.1 x"),
    (1, "no version", b""),
)
SEPARATORS: Table = (
    (120, "", b" "),
    (1, "two blanks in the request line", b"  "),
    (1, "tab in the request line", b"\t"),
    (1, "no-break space in the request line", b"\xa0"),
    (1, "vertical tab in the request line", b"\x0b"),
    (1, "bare CR in the request line", b"\r"),
)
STARTS: Table = (
    (100, "", b""),
    (3, "empty line before the request", b"\r\n"),
    (1, "bare LF before the request", b"\n"),
    (1, "two empty lines before the request", b"\r\n\r\n"),
    (1, "three bare LF before the request", b"\n\n\n"),
    (1, "bare CR before the request", b"\r"),
    (1, "blank before the request", b" "),
    (1, "TLS before the request", b"\x16\x03\x01\x00\x05"),
    (1, "proxy protocol", b"PROXY TCP4 1.2.3.4 5.6.7.8 9 10\r\n"),
    (1, "HTTP/2 preface", b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"),
)
LINE_ENDS: Table = (
    (100, "", b"\r\n"),
    (6, "bare LF", b"\n"),
    (1, "bare CR as line end", b"\r"),
    (1, "two CR as line end", b"\r\r\n"),
    (1, "blank before the line end", b" \r\n"),
    (1, "LF CR as line end", b"\n\r"),
)
HOSTS: Table = (
    (60, "", b"Host: x"),
    (4, "no Host", b""),
    (2, "two Host", b"Host: x\r\nHost: y"),
    (2, "two equal Host", b"Host: x\r\nHost: x"),
    (1, "empty Host", b"Host:"),
    (1, "Host with port", b"Host: example.org:9999"),
    (1, "Host with a bad port", b"Host: example.org:99999"),
    (1, "Host of IPv6", b"Host: [::1]:1"),
    (1, "Host with a blank", b"Host: a b"),
    (1, "Host with a comma", b"Host: a, b"),
    (1, "Host with a user", b"Host: user@x"),
    (1, "Host not ASCII", b"Host: \xc3\xa9"),
    (1, "Host with quotes", b'Host: "><x'),
    (1, "folded Host", b"Host: x\r\n y"),
    (1, "Host with blank before colon", b"Host : x"),
    (1, "HOST in capitals", b"HOST:x"),
)
CONNECTIONS: Table = (
    (50, "", b""),
    (10, "Connection: close", b"Connection: close"),
    (10, "Connection: keep-alive", b"Connection: keep-alive"),
    (1, "Connection in capitals", b"CONNECTION: CLOSE"),
    (2, "Connection of both", b"Connection: keep-alive, close"),
    (1, "Connection with blanks", b"Connection:  \t close \t "),
    (1, "Connection with tabs", b"Connection: x,\tclose"),
    (1, "Connection with empty items", b"Connection: ,, close ,"),
    (1, "repeated Connection", b"Connection: keep-alive\r\nConnection: close"),
    (1, "folded Connection", b"Connection: keep-alive,\r\n close"),
    (1, "Connection with quotes", b'Connection: "close"'),
    (1, "Connection with other words", b"Connection: closed, keep-alived"),
    (1, "Connection with a parameter", b"Connection: close;x=1"),
    (1, "Connection: Upgrade", b"Connection: Upgrade\r\nUpgrade: h2c"),
    (1, "Proxy-Connection", b"Proxy-Connection: close"),
    (1, "empty Connection", b"Connection:"),
)
#: Headers that are peculiar in form, in both directions.
ODD_HEADERS: Table = (
    (4, "obs-fold", b"X-Fold: one\r\n two"),
    (2, "obs-fold with a tab", b"X-Fold: one\r\n\ttwo"),
    (2, "obs-fold with an empty line", b"X-Fold: one\r\n \r\n two"),
    (1, "obs-fold with bare LF", b"X-Fold: one\n two"),
    (1, "obs-fold of an empty value", b"X-Fold:\r\n two"),
    (1, "obs-fold with a colon", b"X-Fold: one\r\n Content-Length: 7"),
    (1, "long obs-fold", b"X-Fold: one" + b"\r\n two" * 200),
    (4, "blank before colon", b"X-Blank : 1"),
    (2, "tab before colon", b"X-Tab\t: 1"),
    (1, "blanks before colon", b"X-Blanks  \t : 1"),
    (1, "blank before colon of Content-Length", b"Content-Length : 3"),
    (1, "blank before colon of Transfer-Encoding", b"Transfer-Encoding : chunked"),
    (1, "blank within a name", b"X Blank: 1"),
    (1, "empty name", b": 1"),
    (2, "no colon", b"nonsense"),
    (1, "no colon, one letter", b"x"),
    (1, "control character in a name", b"X\x01Y: 1"),
    (1, "NUL in a name", b"X\0Y: 1"),
    (2, "NUL in a value", b"X-Nul: a\0b"),
    (2, "control character in a value", b"X-Ctl: a\x01b"),
    (1, "DEL in a value", b"X-Del: a\x7fb"),
    (2, "tab in a value", b"X-Tab: a\tb"),
    (2, "bare CR in a value", b"X-Cr: a\rb"),
    (1, "bare CR and a header", b"X-Cr: a\rX-Next: b"),
    (1, "bare CR at the end of a value", b"X-Cr: a\r"),
    (1, "two CR at the end of a value", b"X-Cr: a\r\r"),
    (1, "vertical tab in a value", b"X-Vt: a\x0bb"),
    (1, "form feed in a value", b"X-Ff: a\x0cb"),
    (1, "separator characters in a value", b"X-Fs: a\x1cb\x1db\x1eb"),
    (1, "C1 in a value", b"X-C1: a\x85b\xa0"),
    (1, "line separator in a value", b"X-Ls: a\xe2\x80\xa8b"),
    (2, "not ASCII in a value", b"X-Utf: caf\xc3\xa9"),
    (1, "not UTF-8 in a value", b"X-Bytes: \xff\xfe"),
    (1, "not ASCII in a name", b"X-\xc3\xa9: 1"),
    (1, "brackets in a name", b"X(Y): 1"),
    (1, "at sign in a name", b"X@Y: 1"),
    (1, "quotes in a name", b'X"Y: 1'),
    (1, "slash in a name", b"X/Y: 1"),
    (1, "braces in a name", b"X{Y}: 1"),
    (1, "all token characters in a name", b"!#$%&'*+.^_`|~-09: 1"),
    (2, "empty value", b"X-Empty:"),
    (1, "value of blanks", b"X-Blanks:  \t "),
    (1, "blanks around a value", b"X-Blanks: \t a \t "),
    (1, "no blank after the colon", b"X-Tight:a"),
    (1, "colons in a value", b"X-Colons: a:b::c"),
    (2, "From line", b"From nobody Mon Sep 17 00:00:00 2001"),
    (1, "From line with a colon", b"From : x"),
    (1, "multipart type", b"Content-Type: multipart/mixed"),
    (1, "multipart type with a boundary", b"Content-Type: multipart/mixed; boundary=x"),
    (1, "message type", b"Content-Type: message/rfc822"),
    (1, "delivery status type", b"Content-Type: message/delivery-status"),
    (1, "transfer encoding of mail", b"Content-Transfer-Encoding: base64"),
    (1, "encoded word", b"Subject: =?utf-8?q?=0D=0AX-Injected:_1?="),
    (1, "MIME version", b"MIME-Version: 1.0"),
    (2, "repeated header", b"X-Twice: a\r\nX-Twice: b"),
    (1, "repeated header in other case", b"X-Twice: a\r\nx-twice: b"),
    (1, "repeated Cookie", b"Cookie: a=1\r\nCookie: b=2"),
    (1, "line of a blank", b" "),
    (1, "line of a tab", b"\t"),
    (1, "line of dashes", b"--x"),
    (1, "status line among the headers", b"HTTP/1.1 200 OK"),
    (1, "header of 60000 bytes", b"X-Long: " + b"a" * 60000),
    (1, "header of 70000 bytes", b"X-Long: " + b"a" * 70000),
    (1, "long name", b"X" * 5000 + b": 1"),
)
#: A length of a body, as %-template of the true one.
LENGTHS: Table = (
    (40, "", b"Content-Length: %d"),
    (2, "length with a plus", b"Content-Length: +%d"),
    (2, "negative length", b"Content-Length: -%d"),
    (2, "length with a blank behind", b"Content-Length: %d "),
    (2, "length with blanks around", b"Content-Length:  \t%d\t "),
    (2, "length without a blank", b"Content-Length:%d"),
    (2, "length with zeros", b"Content-Length: 000%d"),
    (1, "length in hex", b"Content-Length: 0x%x"),
    (1, "length with a point", b"Content-Length: %d.0"),
    (1, "length with an underscore", b"Content-Length: 0_%d"),
    (2, "length twice in one line", b"Content-Length: %d, %d"),
    (1, "length twice without a blank", b"Content-Length: %d,%d"),
    (2, "repeated equal length", b"Content-Length: %d\r\nContent-Length: %d"),
    (1, "repeated padded length", b"Content-Length: %d \r\nContent-Length:  %d"),
    (1, "repeated length with zeros", b"Content-Length: %d\r\nContent-Length: 0%d"),
    (2, "repeated different length", b"Content-Length: %d\r\nContent-Length: 1"),
    (1, "repeated different length", b"Content-Length: 0\r\nContent-Length: %d"),
    (1, "different lengths in one line", b"Content-Length: %d, 1"),
    (1, "empty length", b"Content-Length:"),
    (1, "repeated length, one empty", b"Content-Length:\r\nContent-Length: %d"),
    (1, "length of letters", b"Content-Length: abc"),
    (1, "length with a letter behind", b"Content-Length: %da"),
    (1, "length of a superscript digit", b"Content-Length: \xb2"),
    (1, "length of Arabic digits", b"Content-Length: \xd9\xa3"),
    (1, "huge length", b"Content-Length: 99999999999999999999999"),
    (1, "length of 2^63", b"Content-Length: 9223372036854775808"),
    (1, "length of 300 MiB", b"Content-Length: 314572800"),
    (1, "length of 5000 digits", b"Content-Length: " + b"1" * 5000),
    (1, "folded length", b"Content-Length:\r\n %d"),
    (1, "length folded in the middle", b"Content-Length: %d\r\n 0"),
    (1, "length with a NUL", b"Content-Length: %d\0"),
    (1, "length with a vertical tab", b"Content-Length: \x0b%d"),
    (1, "length with a no-break space", b"Content-Length: \xa0%d"),
    (1, "blank before colon of the length", b"Content-Length : %d"),
    (1, "length in capitals", b"CONTENT-LENGTH: %d"),
    (1, "length with a quote", b'Content-Length: "%d"'),
    (1, "length one too long", b"Content-Length: 1%d"),
    (2, "zero length", b"Content-Length: 0"),
    (1, "length too short", b"Content-Length: 2"),
)
CODINGS: Table = (
    (40, "", b"Transfer-Encoding: chunked"),
    (2, "chunked in capitals", b"Transfer-Encoding: Chunked"),
    (2, "chunked with blanks", b"Transfer-Encoding:  chunked\t "),
    (2, "chunked twice in one line", b"Transfer-Encoding: chunked, chunked"),
    (2, "repeated chunked", b"Transfer-Encoding: chunked\r\nTransfer-Encoding: chunked"),
    (2, "identity", b"Transfer-Encoding: identity"),
    (2, "gzip, chunked", b"Transfer-Encoding: gzip, chunked"),
    (1, "chunked, gzip", b"Transfer-Encoding: chunked, gzip"),
    (1, "gzip and chunked repeated", b"Transfer-Encoding: gzip\r\nTransfer-Encoding: chunked"),
    (1, "chunked and identity", b"Transfer-Encoding: chunked, identity"),
    (
        1,
        "identity and chunked repeated",
        b"Transfer-Encoding: identity\r\nTransfer-Encoding: chunked",
    ),
    (1, "chunked with a parameter", b"Transfer-Encoding: chunked;q=1"),
    (1, "xchunked", b"Transfer-Encoding: xchunked"),
    (1, "chunked in quotes", b'Transfer-Encoding: "chunked"'),
    (1, "chunked after a comma", b"Transfer-Encoding: ,chunked"),
    (1, "chunked before a comma", b"Transfer-Encoding: chunked,"),
    (1, "empty coding", b"Transfer-Encoding:"),
    (1, "folded coding", b"Transfer-Encoding:\r\n chunked"),
    (1, "coding folded behind", b"Transfer-Encoding: chunked\r\n x"),
    (1, "chunked with a vertical tab", b"Transfer-Encoding: \x0bchunked"),
    (1, "chunked with a no-break space", b"Transfer-Encoding: \xa0chunked"),
    (1, "chunked with a NUL", b"Transfer-Encoding: chunked\0"),
    (1, "blank before colon of the coding", b"Transfer-Encoding : chunked"),
    (1, "coding with an underscore", b"Transfer_Encoding: chunked"),
    (1, "gzip coding alone", b"Transfer-Encoding: gzip"),
    (1, "bare CR before chunked", b"Transfer-Encoding: \rchunked"),
)
BOTH_FRAMINGS: Table = (
    (30, "", b""),
    (3, "length and chunked", b"Content-Length: %d"),
    (2, "length 0 and chunked", b"Content-Length: 0"),
    (1, "bad length and chunked", b"Content-Length: abc"),
    (1, "short length and chunked", b"Content-Length: 3"),
)
MORE_HEADERS: Table = (
    (30, "", b"User-Agent: Prometheus/2.42.0"),
    (20, "", b"Accept: application/openmetrics-text;version=1.0.0,text/plain;q=0.5,*/*;q=0.1"),
    (20, "", b"Accept-Encoding: gzip"),
    (8, "Accept of JSON", b"Accept: application/json"),
    (8, "Expect", b"Expect: 100-continue"),
    (2, "Expect of nonsense", b"Expect: 200-ok"),
    (3, "Authorization", b"Authorization: Basic YTpi"),
    (3, "Range", b"Range: bytes=0-1"),
    (3, "If-None-Match", b"If-None-Match: *"),
    (3, "TE", b"TE: trailers"),
    (3, "Upgrade", b"Upgrade: websocket"),
    (3, "Trailer", b"Trailer: X-T"),
    (3, "Cookie", b"Cookie: a=1"),
)
#: The line of a chunk's size, as %-template; chunks of zero bytes use them, too.
CHUNK_LINES: Table = (
    (60, "", b"%x\r\n"),
    (3, "size in capitals", b"%X\r\n"),
    (3, "size with zeros", b"000%x\r\n"),
    (1, "size with 20 zeros", b"00000000000000000000%x\r\n"),
    (2, "size with a blank behind", b"%x \r\n"),
    (1, "size with a tab behind", b"%x\t\r\n"),
    (2, "size with a blank before", b" %x\r\n"),
    (4, "chunk extension", b"%x;a=b\r\n"),
    (2, "chunk extension with blanks", b"%x ; a = b\r\n"),
    (2, "chunk extension in quotes", b'%x;a="b;\\"c"\r\n'),
    (1, "empty chunk extension", b"%x;\r\n"),
    (1, "chunk extension with a bare CR", b"%x;a\rb\r\n"),
    (1, "chunk extension with a NUL", b"%x;a\0b\r\n"),
    (1, "chunk extension with bare LF", b"%x;a\n"),
    (1, "chunk extension of 3000 bytes", b"%x;" + b"a" * 3000 + b"\r\n"),
    (1, "chunk extension of 5000 bytes", b"%x;" + b"a" * 5000 + b"\r\n"),
    (1, "chunk extension of 70000 bytes", b"%x;" + b"a" * 70000 + b"\r\n"),
    (1, "size in hex with 0x", b"0x%x\r\n"),
    (1, "size with a plus", b"+%x\r\n"),
    (1, "negative size", b"-%x\r\n"),
    (1, "size with an underscore", b"0_%x\r\n"),
    (2, "size with bare LF", b"%x\n"),
    (1, "size with bare CR", b"%x\r"),
    (1, "size with two CR", b"%x\r\r\n"),
    (1, "size with words", b"%x x\r\n"),
    (1, "empty size", b"\r\n"),
    (1, "extension without a size", b";a\r\n"),
    (1, "size of letters", b"g\r\n"),
    (1, "size not ASCII", b"\xd9\xa3\r\n"),
    (1, "huge size", b"fffffffffffffffffffff\r\n"),
    (1, "size of 2^63", b"8000000000000000\r\n"),
    (1, "size of 300 MiB", b"12c00000\r\n"),
    (1, "size one too large", b"1%x\r\n"),
    (1, "NUL behind a size", b"%x\0\r\n"),
)
CHUNK_ENDS: Table = (
    (60, "", b"\r\n"),
    (1, "bare LF behind a chunk", b"\n"),
    (1, "bare CR behind a chunk", b"\r"),
    (1, "nothing behind a chunk", b""),
    (1, "blank behind a chunk", b" \r\n"),
    (1, "letter behind a chunk", b"x\r\n"),
    (1, "two line ends behind a chunk", b"\r\n\r\n"),
)
TRAILERS: Table = (
    (40, "", b"\r\n"),
    (5, "trailer", b"X-T: 1\r\n\r\n"),
    (2, "two trailers", b"X-T: 1\r\nX-U: 2\r\n\r\n"),
    (1, "trailer with bare LF", b"X-T: 1\n\n"),
    (1, "trailer with a length", b"Content-Length: 3\r\n\r\n"),
    (1, "trailer without a colon", b"nonsense\r\n\r\n"),
    (1, "folded trailer", b"X-T: 1\r\n 2\r\n\r\n"),
    (1, "trailer with blank before colon", b"X-T : 1\r\n\r\n"),
    (1, "trailer with a NUL", b"X-T: \0\r\n\r\n"),
    (1, "unfinished trailer", b"X-T: 1"),
    (1, "trailer of 70000 bytes", b"X-T: " + b"a" * 70000 + b"\r\n\r\n"),
    (1, "300 trailers", b"X-T: 1\r\n" * 300 + b"\r\n"),
    (1, "many trailers", b"X-T: 1\r\n" * 40000 + b"\r\n"),
    (1, "end behind the last chunk", b""),
    (1, "bare LF as the end of trailers", b"\n"),
    (1, "bare CR as the end of trailers", b"\r"),
    (1, "letter as the end of trailers", b"x"),
)


def fill(template: bytes, count: int) -> bytes:
    """Return a template with the number in all its places."""
    places = template.count(b"%d") + template.count(b"%x") + template.count(b"%X")
    return template % ((count,) * places) if places else template


def chunked(draft: Draft, body: bytes, oddness: float) -> bytes:
    """Return the body in chunks; in a share of the cases one thing about them is odd."""
    pieces: list[bytes] = []
    places = sorted(draft.between(0, len(body)) for _ in range(draft.between(0, 3)))
    ends = [*places, len(body)]
    parts = [body[start:end] for start, end in zip([0, *places], ends) if end > start]
    odd = draft.between(0, len(parts)) if draft.happens(oddness) else -1
    for position, part in enumerate([*parts, b""]):
        is_odd = position == odd
        line = draft.choose(CHUNK_LINES) if is_odd else b"%x\r\n"
        pieces += [fill(line, len(part)), part]
        if part:
            pieces.append(draft.choose(CHUNK_ENDS) if is_odd else b"\r\n")
    if draft.happens(0.02, "no last chunk"):
        pieces[-2:] = []
        return b"".join(pieces)
    return b"".join(pieces) + draft.choose(TRAILERS if draft.happens(oddness) else TRAILERS[:2])


def framed(draft: Draft, body: bytes, oddness: float) -> tuple[list[bytes], bytes]:
    """Return the header lines that frame a body, and the bytes of the body on the wire."""
    if draft.happens(0.35, "chunked"):
        coding = draft.choose(CODINGS) if draft.happens(oddness) else CODINGS[0][2]
        beside = draft.choose(BOTH_FRAMINGS) if draft.happens(oddness) else b""
        lines = [coding, fill(beside, len(body))]
        draft.random.shuffle(lines)
        return [line for line in lines if line], chunked(draft, body, oddness)
    length = draft.choose(LENGTHS) if draft.happens(oddness) else LENGTHS[0][2]
    return [fill(length, len(body))], body


def many_headers(draft: Draft) -> list[bytes]:
    """Return a number of headers near a known limit."""
    count = draft.random.choice(NUMBER_OF_HEADERS)
    draft.tag(f"{count} headers")
    return [b"X-%d: %d" % (number, number) for number in range(count)]


def large_headers(draft: Draft, limits: Sequence[int]) -> list[bytes]:
    """Return headers whose size together is near a limit, in lines of 1000 bytes."""
    limit = draft.random.choice(limits)
    draft.tag(f"headers of about {limit} bytes")
    size = limit + draft.between(-300, 300)
    return [b"X-%04d: %b" % (number, b"a" * 990) for number in range(size // 1000)]


def odd_headers(draft: Draft, lines: list[bytes], share: float) -> None:
    """Put peculiar headers among the lines, in a share of the cases."""
    while draft.happens(share):
        place = draft.between(0, len(lines))
        if place == 0:
            draft.tag("odd first header")
        lines.insert(place, draft.choose(ODD_HEADERS))


def head_bytes(draft: Draft, first: bytes, lines: list[bytes]) -> bytes:
    """Return a head: its first line, its headers, and their line ends."""
    end = draft.choose(LINE_ENDS) if draft.happens(0.08) else b"\r\n"
    mixed = draft.happens(0.02, "mixed line ends")
    ends = (b"\r\n", b"\n") if mixed else (end,)
    head = [first + end, *(line + draft.random.choice(ends) for line in lines)]
    last = draft.choose(LINE_ENDS) if draft.happens(0.02, "odd end of the head") else end
    return b"".join(head) + last


def request_line(draft: Draft, oddness: float) -> bytes:
    """Return a request line without its end."""
    if draft.happens(0.02, "long request line"):
        limit = draft.random.choice((8192, 16384, 65536))
        draft.tag(f"request line of about {limit} bytes")
        size = limit - 27 + draft.between(-4, 4)
        return b"GET /-/healthy?" + b"a" * size + b" HTTP/1.1"
    if not draft.happens(oddness):
        method = draft.choose(METHODS[:3])
        return method + b" " + draft.choose(TARGETS[:5]) + b" " + draft.choose(VERSIONS[:2])
    parts = [draft.choose(METHODS), draft.choose(TARGETS), draft.choose(VERSIONS)]
    line = parts[0]
    for part in parts[1:]:
        line += draft.choose(SEPARATORS) + part if part else b""
    return line


def request_body(draft: Draft, oddness: float) -> tuple[list[bytes], bytes]:
    """Return the header lines and the bytes of a request's body, mostly none."""
    if not draft.happens(0.25, "request body"):
        return [], b""
    bodies = ((6, "", b"hello"), (2, "empty body", b""), (3, "smuggled request", SMUGGLED_REQUEST))
    return framed(draft, draft.choose(bodies), oddness)


def client_request(draft: Draft, oddness: float) -> bytes:
    """Return a request as a client may send it to expexp's own paths."""
    start = draft.choose(STARTS) if draft.happens(oddness * 0.5) else b""
    line = request_line(draft, oddness)
    lines = [draft.choose(HOSTS if draft.happens(oddness) else HOSTS[:1])]
    lines += [draft.choose(MORE_HEADERS) for _ in range(draft.between(0, 2))]
    lines.append(draft.choose(CONNECTIONS if draft.happens(oddness) else CONNECTIONS[:3]))
    framing, body = request_body(draft, oddness)
    lines += framing
    draft.random.shuffle(lines)
    odd_headers(draft, lines, oddness * 0.6)
    if draft.happens(0.02):
        lines += many_headers(draft)
    if draft.happens(0.015):
        lines += large_headers(draft, (32768, 65536))
    return start + head_bytes(draft, line, [each for each in lines if each]) + body


BROKEN_BYTES = (b"\0", b"\r", b"\n", b" ", b"\t", b":", b"\xff", b"\r\n", b"\r\n\r\n", b",")


def mutated(draft: Draft, content: bytes) -> bytes:
    """Return the bytes with one change: a byte put in, replaced or removed, or a part twice."""
    place = draft.between(0, len(content))
    kind = draft.random.choice(("insert", "replace", "remove", "repeat", "swap"))
    draft.tag(f"mutation: {kind}")
    new = draft.random.choice(BROKEN_BYTES)
    before, behind = content[:place], content[place:]
    if kind == "insert":
        return before + new + behind
    if kind == "replace":
        return before + new + behind[1:]
    if kind == "remove":
        return before + behind[draft.between(1, 3) :]
    if kind == "repeat":
        return before + behind[:10] + behind
    return before + behind[1:2] + behind[:1] + behind[2:]


def delivered(draft: Draft, content: bytes) -> list[Step]:
    """Return the steps that send the bytes: at once, in a few parts, or dripped."""
    way = draft.random.random()
    if way < 0.75 or not content:
        return [Step("send", content)]
    if way < 0.95 or len(content) > 2000:
        draft.tag("in parts")
        places = sorted(draft.between(0, len(content)) for _ in range(draft.between(1, 4)))
        pause = DRIP_SECONDS
    else:
        draft.tag("dripped")
        places = list(range(1, len(content), max(1, len(content) // 100)))
        pause = DRIP_SECONDS / 5
    steps: list[Step] = []
    for start, end in zip([0, *places], [*places, len(content)]):
        steps += [Step("send", content[start:end]), Step("pause", b"", pause)]
    return steps[:-1]


PROBE = b"GET /-/healthy HTTP/1.1\r\nHost: probe\r\nConnection: close\r\n\r\n"


def client_steps(draft: Draft, content: bytes) -> tuple[list[Step], bool]:
    """Return what a client does with its bytes to the end, and whether the server waits then."""
    if draft.happens(SILENT_SHARE, "silent client"):
        return delivered(draft, content[: draft.between(0, len(content))]), True
    if draft.happens(0.05, "cut request"):
        part = content[: draft.between(0, len(content))]
        end = draft.random.choice(("half-close", "reset"))
        draft.tag(f"cut by a {end}")
        return [*delivered(draft, part), Step(end)], False
    if draft.happens(0.03, "half-closed"):
        return [*delivered(draft, content), Step("half-close")], False
    steps = delivered(draft, content)
    if draft.happens(0.8):  # together with the probe: what is not read decides how it ends
        return [*steps[:-1], Step("send", steps[-1].data + PROBE)], False
    return [*steps, Step("send", PROBE)], False


def client_case(number: int, draft: Draft) -> Case:
    """Return a case whose client is peculiar."""
    oddness = draft.random.choice((0.05, 0.2, 0.2, 0.5))
    count = draft.random.choices((1, 2, 3), (75, 18, 7))[0]
    if count > 1:
        draft.tag("pipelined")
    content = b"".join(client_request(draft, oddness) for _ in range(count))
    if draft.happens(0.08):
        content = mutated(draft, content)
    listener, client_tls = "plain", False
    if draft.happens(0.1, "TLS"):
        listener, client_tls = "tls", True
    elif draft.happens(0.02, "plain HTTP to TLS"):
        listener = "tls"
    steps, waits = client_steps(draft, content)
    tags = tuple(draft.tags)
    return Case(number, "client", tags, listener, client_tls, tuple(steps), (), "", waits)


# --- what targets answer

STATUS_LINES: Table = (
    (60, "", b"HTTP/1.1 200 OK"),
    (8, "answer of HTTP/1.0", b"HTTP/1.0 200 OK"),
    (4, "status 204", b"HTTP/1.1 204 No Content"),
    (4, "status 304", b"HTTP/1.1 304 Not Modified"),
    (3, "status 404", b"HTTP/1.1 404 Not Found"),
    (3, "status 500", b"HTTP/1.1 500 Internal Server Error"),
    (1, "status 205", b"HTTP/1.1 205 Reset Content"),
    (1, "status 206", b"HTTP/1.1 206 Partial Content"),
    (1, "status 203", b"HTTP/1.1 203 Non-Authoritative Information"),
    (1, "status 407", b"HTTP/1.1 407 Proxy Authentication Required"),
    (1, "status 401", b"HTTP/1.1 401 Unauthorized"),
    (1, "status 300", b"HTTP/1.1 300 Multiple Choices"),
    (1, "status 305", b"HTTP/1.1 305 Use Proxy"),
    (1, "status 299", b"HTTP/1.1 299 X"),
    (1, "status 600", b"HTTP/1.1 600 X"),
    (1, "status 999", b"HTTP/1.1 999 X"),
    (1, "status 1000", b"HTTP/1.1 1000 X"),
    (1, "status 099", b"HTTP/1.1 099 X"),
    (1, "status 000", b"HTTP/1.1 000 X"),
    (1, "status 20", b"HTTP/1.1 20 X"),
    (1, "status 0200", b"HTTP/1.1 0200 OK"),
    (1, "status with a plus", b"HTTP/1.1 +20 OK"),
    (1, "negative status", b"HTTP/1.1 -20 OK"),
    (1, "status with an underscore", b"HTTP/1.1 2_0 OK"),
    (1, "status of letters", b"HTTP/1.1 abc OK"),
    (1, "status of Arabic digits", b"HTTP/1.1 \xd9\xa2\xd9\xa0\xd9\xa0 OK"),
    (1, "status with a letter behind", b"HTTP/1.1 200a OK"),
    (2, "no reason phrase", b"HTTP/1.1 200"),
    (2, "empty reason phrase", b"HTTP/1.1 200 "),
    (1, "reason phrase not ASCII", b"HTTP/1.1 200 d\xc3\xa9j\xc3\xa0"),
    (1, "reason phrase with a tab", b"HTTP/1.1 200 O\tK"),
    (1, "reason phrase with a NUL", b"HTTP/1.1 200 O\0K"),
    (1, "reason phrase with a control character", b"HTTP/1.1 200 O\x01K"),
    (1, "reason phrase with a bare CR", b"HTTP/1.1 200 O\rK"),
    (1, "reason phrase of 70000 bytes", b"HTTP/1.1 200 " + b"a" * 70000),
    (1, "two blanks before the status", b"HTTP/1.1  200 OK"),
    (1, "tab before the status", b"HTTP/1.1\t200 OK"),
    (1, "tab behind the status", b"HTTP/1.1 200\tOK"),
    (1, "blank before the status line", b" HTTP/1.1 200 OK"),
    (1, "empty line before the status line", b"\r\nHTTP/1.1 200 OK"),
    (1, "answer of http/1.1", b"http/1.1 200 OK"),
    (1, "answer of HTTP/1.2", b"HTTP/1.2 200 OK"),
    (1, "answer of HTTP/2.0", b"HTTP/2.0 200 OK"),
    (1, "answer of HTTP/0.9", b"HTTP/0.9 200 OK"),
    (1, "answer of HTTP/1", b"HTTP/1 200 OK"),
    (1, "answer of HTTP/1.10", b"HTTP/1.10 200 OK"),
    (1, "answer of HTTP/01.1", b"HTTP/01.1 200 OK"),
    (1, "answer of HTTP/1.x", b"HTTP/1.x 200 OK"),
    (1, "answer of HTTP/3", b"HTTP/3 200 OK"),
    (1, "answer of HTTP", b"HTTP 200 OK"),
    (1, "answer of ICY", b"ICY 200 OK"),
    (1, "no status line", b"Content-Type: text/plain"),
    (1, "an SSH server", b"SSH-2.0-OpenSSH_9.2"),
    (1, "an SMTP server", b"220 mail ESMTP"),
    (1, "a TLS alert", b"\x15\x03\x01\x00\x02\x02\x46"),
    (1, "empty first line", b""),
)
REDIRECTS: Table = (
    (2, "redirect to itself", b"Location: /other"),
    (1, "redirect to another host", b"Location: http://example.invalid/metrics"),
    (1, "redirect to another port", b"Location: http://127.0.0.1:1/metrics"),
    (1, "redirect to https", b"Location: https://127.0.0.1/metrics"),
    (1, "redirect without Location", b"X-Location: none"),
    (1, "redirect with empty Location", b"Location:"),
    (1, "redirect to a broken URL", b"Location: http://[::1/"),
    (1, "redirect to another scheme", b"Location: ftp://127.0.0.1/"),
    (1, "redirect with two Locations", b"Location: /one\r\nLocation: /two"),
    (1, "redirect by URI", b"URI: /other"),
)
INTERIM: Table = (
    (5, "100 before", b"HTTP/1.1 100 Continue\r\n\r\n"),
    (5, "103 before", b"HTTP/1.1 103 Early Hints\r\nLink: </a>; rel=preload\r\n\r\n"),
    (2, "102 before", b"HTTP/1.1 102 Processing\r\n\r\n"),
    (2, "101 before", b"HTTP/1.1 101 Switching Protocols\r\nUpgrade: x\r\n\r\n"),
    (1, "199 before", b"HTTP/1.1 199 X\r\n\r\n"),
    (1, "100 of HTTP/1.0 before", b"HTTP/1.0 100 Continue\r\n\r\n"),
    (1, "100 with a length before", b"HTTP/1.1 100 Continue\r\nContent-Length: 3\r\n\r\n"),
    (1, "100 with chunked before", b"HTTP/1.1 100 C\r\nTransfer-Encoding: chunked\r\n\r\n"),
    (1, "100 with a bad header before", b"HTTP/1.1 100 Continue\r\nnonsense\r\n\r\n"),
    (1, "100 with bare LF before", b"HTTP/1.1 100 Continue\n\n"),
    (1, "103 of 100000 bytes before", b"HTTP/1.1 103 E\r\n" + b"X: aaaaaa\r\n" * 9000 + b"\r\n"),
    (1, "100 with a long header before", b"HTTP/1.1 100 C\r\nX: " + b"a" * 70000 + b"\r\n\r\n"),
)
TYPES: Table = (
    (40, "", b"Content-Type: text/plain; version=0.0.4; charset=utf-8"),
    (4, "", b"Content-Type: text/plain"),
    (3, "no type", b""),
    (2, "empty type", b"Content-Type:"),
    (2, "type of HTML", b"Content-Type: text/html"),
    (1, "type of JSON", b"Content-Type: application/json"),
    (2, "type of OpenMetrics", b"Content-Type: application/openmetrics-text; version=1.0.0"),
    (1, "broken type", b"Content-Type: text/plain; version"),
    (1, "type with a broken parameter", b"Content-Type: text/plain; a=b=c"),
    (1, "type of nonsense", b"Content-Type: ;;;"),
    (1, "type in capitals", b"Content-Type: TEXT/PLAIN; VERSION=0.0.4"),
    (1, "repeated type", b"Content-Type: text/plain\r\nContent-Type: application/json"),
    (1, "folded type", b"Content-Type: text/plain;\r\n version=0.0.4"),
    (1, "type of protobuf", b"Content-Type: application/vnd.google.protobuf; proto=x"),
)
ANSWER_HEADERS: Table = (
    (20, "", b"Date: Sun, 06 Nov 1994 08:49:37 GMT"),
    (20, "", b"Server: test"),
    (10, "Connection-named", b"Connection: X-Named\r\nX-Named: 1"),
    (5, "Connection: close", b"Connection: close"),
    (5, "Connection: keep-alive", b"Connection: keep-alive"),
    (2, "hop-by-hop", b"Keep-Alive: timeout=5"),
    (2, "hop-by-hop", b"Proxy-Authenticate: Basic"),
    (2, "hop-by-hop", b"Upgrade: h2c"),
    (2, "hop-by-hop", b"Trailer: X-T"),
    (2, "hop-by-hop", b"TE: trailers"),
    (2, "hop-by-hop", b"Proxy-Connection: close"),
    (2, "Set-Cookie twice", b"Set-Cookie: a=1\r\nSet-Cookie: b=2"),
    (2, "Location of 200", b"Location: /other"),
    (2, "Age", b"Age: 5"),
    (2, "two Date", b"Date: x\r\nDate: y"),
    (2, "Last-Modified", b"Last-Modified: Mon, 01 Jan 2024 00:00:00 GMT"),
    (1, "Refresh", b"Refresh: 0; url=/other"),
    (1, "Content-Range", b"Content-Range: bytes 0-1/2"),
    (1, "X-Content-Type-Options", b"X-Content-Type-Options: sniff"),
)
ENCODINGS: Table = (
    (20, "gzip", b"Content-Encoding: gzip"),
    (2, "gzip in capitals", b"Content-Encoding: GZIP"),
    (2, "gzip with blanks", b"Content-Encoding: \t gzip  "),
    (2, "x-gzip", b"Content-Encoding: x-gzip"),
    (2, "deflate", b"Content-Encoding: deflate"),
    (2, "encoding identity", b"Content-Encoding: identity"),
    (1, "empty encoding", b"Content-Encoding:"),
    (1, "gzip twice in one line", b"Content-Encoding: gzip, gzip"),
    (1, "repeated gzip", b"Content-Encoding: gzip\r\nContent-Encoding: gzip"),
    (1, "gzip and identity repeated", b"Content-Encoding: gzip\r\nContent-Encoding: identity"),
    (1, "identity and gzip repeated", b"Content-Encoding: identity\r\nContent-Encoding: gzip"),
    (1, "folded gzip", b"Content-Encoding:\r\n gzip"),
    (1, "encoding br", b"Content-Encoding: br"),
)
PACKED = gzip.compress(EXPOSITION, mtime=0)
BODIES: Table = (
    (50, "", EXPOSITION),
    (4, "empty body", b""),
    (4, "body no exposition", b"<html>\n"),
    (4, "body of OpenMetrics", OPENMETRICS),
    (3, "large body", b"".join(b"metric_%d 1\n" % number for number in range(6000))),
    (1, "body of NULs", b"\0" * 10),
    (1, "body without a line end", b"a 1"),
)
PACKED_BODIES: Table = (
    (20, "", PACKED),
    (4, "packed body not packed", EXPOSITION),
    (2, "packed body cut", PACKED[:-5]),
    (2, "packed body of two members", PACKED + PACKED),
    (2, "packed body and more", PACKED + b"more"),
    (2, "packed body and zeros", PACKED + b"\0" * 8),
    (2, "packed body with a wrong sum", PACKED[:-8] + b"\0" * 8),
    (2, "body of zlib", zlib.compress(EXPOSITION)),
    (1, "empty packed body", b""),
    (1, "packed body of nothing", gzip.compress(b"", mtime=0)),
    (1, "packed body no exposition", gzip.compress(b"<html>\n", mtime=0)),
)


def answer_body(draft: Draft) -> tuple[list[bytes], bytes]:
    """Return a header line of its encoding, if any, and a body."""
    if draft.happens(0.15):
        return [draft.choose(ENCODINGS)], draft.choose(PACKED_BODIES)
    return [], draft.choose(BODIES)


def answer_framing(draft: Draft, body: bytes, oddness: float) -> tuple[list[bytes], bytes, bool]:
    """Return framing headers, the bytes of the body, and whether only the close ends it."""
    if draft.happens(0.15, "no framing"):
        return [], body, True
    lines, wire = framed(draft, body, oddness)
    if draft.happens(0.04, "more than announced"):
        wire += draft.choose(((1, "", b"x"), (1, "smuggled answer", SMUGGLED_ANSWER)))
    if draft.happens(0.04, "less than announced"):
        wire = wire[: draft.between(0, max(0, len(wire) - 1))]
    return lines, wire, False


def status_lines(draft: Draft, oddness: float) -> tuple[bytes, list[bytes]]:
    """Return the bytes up to the end of the status line's text, and lines of a redirect."""
    before = b""
    if draft.happens(oddness * 0.25):
        count = draft.random.choice((1, 1, 2, 3, 4, 5, 6, 7))
        draft.tag(f"{count} interim")
        before = b"".join(draft.choose(INTERIM) for _ in range(count))
    if draft.happens(0.03, "redirect"):
        status = draft.random.choice((301, 302, 303, 307, 308))
        draft.tag(f"status {status}")
        return before + b"HTTP/1.1 %d Moved" % status, [draft.choose(REDIRECTS)]
    if draft.happens(oddness):
        return before + draft.choose(STATUS_LINES), []
    return before + draft.choose(STATUS_LINES[:1]), []


def target_answer(draft: Draft, oddness: float) -> tuple[bytes, bool]:
    """Return an answer, and whether it has an end without the connection's."""
    first, more = status_lines(draft, oddness)
    encoding, body = answer_body(draft)
    framing, wire, endless = answer_framing(draft, body, oddness)
    lines = [*more, *encoding, *framing]
    lines.append(draft.choose(TYPES if draft.happens(oddness) else TYPES[:2]))
    lines += [draft.choose(ANSWER_HEADERS) for _ in range(draft.between(0, 2))]
    draft.random.shuffle(lines)
    odd_headers(draft, lines, oddness * 0.6)
    if draft.happens(0.02):
        lines += many_headers(draft)
    if draft.happens(0.01):
        lines += large_headers(draft, ANSWER_HEAD_BYTES)
    lines = [each for each in lines if each]
    return head_bytes(draft, first, lines) + wire, endless


#: Tags of answers whose end a reader finds without the connection's end.
HARMLESS: frozenset[str] = frozenset(
    (
        "chunked",
        "gzip",
        "trailer",
        "chunk extension",
        "obs-fold",
        "hop-by-hop",
        "Connection-named",
        "Connection: keep-alive",
        "status 204",
        "status 304",
        "status 404",
        "status 500",
        "empty body",
        "large body",
        "body of OpenMetrics",
        "in parts",
        "dripped",
        "redirect",
        "Age",
        "bare LF",
        "repeated equal length",
    )
)


def target_steps(draft: Draft, answer: bytes, endless: bool) -> tuple[list[Step], bool]:
    """Return what a target does with its answer to the end, and whether expexp waits then."""
    if draft.happens(SILENT_SHARE, "silent target"):
        part = answer[: draft.between(0, len(answer))]
        return [*delivered(draft, part), Step("hold")], True
    if draft.happens(SILENT_SHARE, "target drips for too long"):
        step = max(1, len(answer) // 40)
        parts = (answer[start : start + step] for start in range(0, len(answer), step))
        slow = (Step("pause", b"", SLOW_DRIP_SECONDS),)
        return [each for part in parts for each in (Step("send", part), *slow)], True
    if draft.happens(0.05, "cut answer"):
        part = answer[: draft.between(0, len(answer))]
        end = draft.random.choice(("close", "reset", "cut"))
        draft.tag(f"cut by a {end}")
        return [*delivered(draft, part), Step(end)], False
    peculiar = endless or not HARMLESS.issuperset(draft.tags)
    if draft.happens(0.01 if peculiar else 0.5, "held open"):
        return [*delivered(draft, answer), Step("hold")], peculiar
    end = draft.random.choices(("close", "cut", "reset"), (90, 7, 3))[0]
    draft.tag("" if end == "close" else f"ended by a {end}")
    return [*delivered(draft, answer), Step(end)], False


QUERIES: Table = (
    (60, "", b""),
    (2, "", b"&a=b"),
    (1, "percent in the query", b"&a=%20%2b%2F%c3%a9"),
    (1, "plus in the query", b"&a=b+c"),
    (1, "name alone in the query", b"&a"),
    (1, "empty name in the query", b"&=b"),
    (1, "ampersands in the query", b"&&"),
    (1, "equal signs in the query", b"&a==b=c"),
    (1, "semicolon in the query", b"&a=1;b=2"),
    (1, "not ASCII in the query", b"&a=\xc3\xa9"),
    (1, "not UTF-8 in the query", b"&a=%ff\xfe"),
    (1, "broken percent in the query", b"&a=%zz%"),
    (1, "question mark in the query", b"&a=?b"),
    (1, "quotes in the query", b"&a=<\"'>"),
    (1, "params", b"&params=x=y"),
    (1, "params without a name", b"&params=x"),
    (1, "args", b"&args=1"),
    (1, "second module", b"&module=u"),
    (1, "repeated parameter", b"&a=1&a=2"),
    (1, "NUL in the query", b"&a=%00"),
    (1, "line break in the query", b"&a=%0d%0aX-Injected:%201"),
    (1, "fragment in the query", b"&a=b#c"),
)
ASKING_HEADERS: Table = (
    (3, "Accept-Encoding of deflate", b"Accept-Encoding: deflate"),
    (3, "Accept-Encoding with q=0", b"Accept-Encoding: gzip;q=0"),
    (2, "Accept-Encoding with q", b"Accept-Encoding: deflate, gzip;q=0.5"),
    (2, "Accept-Encoding in capitals", b"Accept-Encoding: GZIP"),
    (1, "Accept-Encoding of a star", b"Accept-Encoding: *"),
    (1, "repeated Accept-Encoding", b"Accept-Encoding: deflate\r\nAccept-Encoding: gzip"),
    (1, "empty Accept-Encoding", b"Accept-Encoding:"),
    (3, "X-Forwarded-For", b"X-Forwarded-For: 1.2.3.4"),
    (1, "repeated X-Forwarded-For", b"X-Forwarded-For: 1.2.3.4\r\nx-forwarded-for: 5.6.7.8"),
    (1, "empty X-Forwarded-For", b"X-Forwarded-For:"),
    (3, "client's timeout", b"X-Prometheus-Scrape-Timeout-Seconds: 1.5"),
    (1, "client's timeout not a number", b"X-Prometheus-Scrape-Timeout-Seconds: abc"),
    (1, "client's timeout nan", b"X-Prometheus-Scrape-Timeout-Seconds: nan"),
    (1, "client's timeout inf", b"X-Prometheus-Scrape-Timeout-Seconds: inf"),
    (1, "client's timeout negative", b"X-Prometheus-Scrape-Timeout-Seconds: -1"),
    (1, "client's timeout with e", b"X-Prometheus-Scrape-Timeout-Seconds: 1e1"),
    (1, "client's timeout with blanks", b"X-Prometheus-Scrape-Timeout-Seconds: \t5 "),
    (1, "client's timeout with an underscore", b"X-Prometheus-Scrape-Timeout-Seconds: 1_0"),
    (2, "Connection-named", b"Connection: X-Named\r\nX-Named: 1"),
    (1, "Connection-named Host", b"Connection: Host, Accept, User-Agent"),
    (1, "Connection-named in capitals", b"CONNECTION: x-NAMED ,, close\r\nX-Named: 1"),
    (1, "Connection-named twice", b"Connection: a\r\nConnection: x-named\r\nX-Named: 1"),
    (2, "hop-by-hop", b"Keep-Alive: 5"),
    (2, "hop-by-hop", b"Proxy-Authorization: Basic x"),
    (2, "hop-by-hop", b"TE: trailers"),
    (2, "hop-by-hop", b"Upgrade: h2c"),
    (2, "hop-by-hop", b"Proxy-Connection: close"),
    (2, "hop-by-hop", b"Trailer: X"),
    (2, "Expect", b"Expect: 100-continue"),
    (2, "repeated Cookie", b"Cookie: a=1\r\nCookie: b=2"),
    (2, "Authorization", b"Authorization: Bearer x"),
    (1, "repeated Accept", b"Accept: text/plain\r\nAccept: */*"),
    (1, "no User-Agent", b"X-A: 1"),
    (1, "empty User-Agent", b"User-Agent:"),
    (1, "Content-Type of a request", b"Content-Type: text/plain"),
    (1, "names in odd case", b"x-oDD-cASE: 1"),
    (1, "own header of a module", b"x-module: client"),
    (1, "name with digits", b"X-1a-2b: 1"),
    (1, "name with an underscore", b"x_under_score: 1"),
    (1, "name with an apostrophe", b"x'y-don't: 1"),
    (1, "Content-Encoding of a request", b"Content-Encoding: gzip"),
    (1, "URI of a request", b"Referer: http://x/"),
)


def asking(draft: Draft, number: int, module: str, oddness: float) -> bytes:
    """Return the request of a client for a module, with the case's number for the target."""
    method, version = draft.choose(METHODS[:2]), draft.choose(VERSIONS[:2])
    query = draft.choose(QUERIES) if draft.happens(oddness) else b""
    place = b"/proxy?module=%b&case=%d%b" % (module.encode(), number, query)
    lines = [b"Host: x", draft.choose(CONNECTIONS if draft.happens(oddness) else CONNECTIONS[:3])]
    if draft.happens(0.7):
        lines += [MORE_HEADERS[0][2], MORE_HEADERS[1][2], MORE_HEADERS[2][2]]
    while draft.happens(oddness):
        lines.append(draft.choose(ASKING_HEADERS))
    odd_headers(draft, lines, oddness * 0.4)
    content = b"\r\n".join([b" ".join((method, place, version)), *filter(None, lines), b"", b""])
    return mutated(draft, content) if draft.happens(oddness * 0.05) else content


def choose_module(draft: Draft, waits: bool) -> str:
    """Return a module's name: verified or not, plain or TLS, and with a short deadline or not."""
    if not waits and draft.happens(0.04, "module with settings"):
        return "h"
    name = "v" if draft.happens(0.6, "verified") else "u"
    if draft.happens(0.1, "target with TLS"):
        name += "t"
    return name + ("s" if waits else "")


def target_case(number: int, draft: Draft) -> Case:
    """Return a case whose target, or whose request to a target, is peculiar."""
    oddness, asked = draft.random.choice(((0.1, 0), (0.3, 0), (0.5, 0), (0.3, 0.05), (0.02, 0.4)))
    answer, endless = target_answer(draft, oddness)
    if draft.happens(0.05):
        answer = mutated(draft, answer)
    steps, waits = target_steps(draft, answer, endless)
    module = choose_module(draft, waits)
    content = asking(draft, number, module, asked)
    client_tls = draft.happens(0.05, "TLS")
    client: list[Step] = [Step("send", content + PROBE)]
    if draft.happens(0.01, "client goes"):
        client = [Step("send", content), Step(draft.random.choice(("half-close", "reset")))]
    listener = "tls" if client_tls else "plain"
    tags = tuple(draft.tags)
    return Case(
        number, "target", tags, listener, client_tls, tuple(client), tuple(steps), module, waits
    )


#: Tags of what every reader must understand, or of what a second tag says more exactly.
PLAIN_TAGS: frozenset[str] = HARMLESS.difference(("obs-fold", "bare LF")) | {
    "/sd",
    *(f"{count} interim" for count in range(1, 6)),
    *(f"status {status}" for status in (301, 302, 303, 307, 308)),
    "Accept of JSON",
    "Connection: close",
    "HEAD",
    "HTTP/1.0",
    "TLS",
    "cut answer",
    "cut request",
    "held open",
    "long request line",
    "module with settings",
    "no framing",
    "odd end of the head",
    "odd first header",
    "pipelined",
    "request body",
    "target with TLS",
    "verified",
}
LONE_ATTEMPTS = 15


def odd_tags(case: Case) -> list[str]:
    """Return the tags of what is peculiar about a case."""
    return [tag for tag in case.tags if tag not in PLAIN_TAGS]


def draw_case(seed: str, number: int) -> Case:
    """Return a case made from a seed of its own."""
    draft = Draft(seed)
    if draft.happens(TARGET_SHARE):
        return target_case(number, draft)
    return client_case(number, draft)


def make_case(seed: int, number: int) -> Case:
    """Return the case of a number; those of even numbers have one peculiarity at most, mostly."""
    case = draw_case(f"{seed}:{number}", number)
    attempt = 1
    while number % 2 == 0 and len(odd_tags(case)) != 1 and attempt < LONE_ATTEMPTS:
        case = draw_case(f"{seed}:{number}:{attempt}", number)
        attempt += 1
    return case
