"""Outcomes of cases, and the differences that DESIGN.md wants.

An explanation takes a part of a difference away: it returns the new outcome with that part as the
old one has it. What is equal in the end is explained.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Callable, NamedTuple

from difference_cases import ANSWER_HEAD_BYTES, ENCODINGS, NUMBER_OF_HEADERS, Case

PARTS = ("status", "headers", "body", "end", "received", "order", "log")
STATUS = re.compile(rb"HTTP/1\.1 ([0-9]{3}) ")
REASON = re.compile(r"\w+ (?:module \w+|no module): (\w+):")


def sorted_head(head: bytes) -> bytes:
    """Return a head with its headers in the order of their names; equal names keep theirs."""
    lines, blank, rest = head.partition(b"\r\n\r\n")
    first, *headers = lines.split(b"\r\n")
    headers.sort(key=lambda line: line.partition(b":")[0])
    return b"\r\n".join([first, *headers]) + blank + rest


class Outcome(NamedTuple):
    """What one process made of a case, without what varies from run to run."""

    answer: bytes
    end: str
    received: tuple[bytes, ...]
    log: tuple[str, ...]

    @property
    def statuses(self) -> tuple[int, ...]:
        """The statuses of all answers on the connection."""
        return tuple(int(code) for code in STATUS.findall(self.answer))

    @property
    def reasons(self) -> tuple[str, ...]:
        """The reasons of failures that were logged."""
        found = (REASON.match(line) for line in self.log)
        return tuple(each[1] for each in found if each)

    @property
    def head(self) -> bytes:
        """The first answer's head, without its status line."""
        return self.answer.partition(b"\r\n\r\n")[0].partition(b"\r\n")[2]

    @property
    def body(self) -> bytes:
        """Whatever follows the first answer's head."""
        return self.answer.partition(b"\r\n\r\n")[2]

    @property
    def received_sorted(self) -> tuple[bytes, ...]:
        """The heads that the target received, their headers in the order of their names."""
        return tuple(sorted_head(head) for head in self.received)

    def parts(self) -> tuple[object, ...]:
        """Return the values that PARTS names."""
        received = self.received_sorted
        return (self.statuses, self.head, self.body, self.end, received, self.received, self.log)

    def summary(self) -> str:
        """Return statuses, reasons and end in a few words."""
        statuses = " ".join(map(str, self.statuses)) or "nothing"
        return ", ".join((statuses, *self.reasons, self.end))


class Explanation(NamedTuple):
    """Why two outcomes may differ."""

    name: str
    design: str  # the line of DESIGN.md that wants it
    prometheus: str  # what a real Prometheus says of such answers
    forgive: Callable[[Case, Outcome, Outcome], Outcome]


def without_order(_case: Case, old: Outcome, new: Outcome) -> Outcome:
    """Take away that a target gets the same headers in another order."""
    if old.received_sorted == new.received_sorted:
        return new._replace(received=old.received)
    return new


OWN_LENGTH = re.compile(rb"(X-Content-Type-Options: nosniff\r\nContent-Length: )[0-9]+")
OWN_WORDS = re.compile(rb"(\r\n\r\n)module (\w+): [^\n]*\n")
LOGGED_WORDS = re.compile(r"^(\w+ module \w+: \w+): .*|^(debug \S+: response not sent): .*")


def without_words(_case: Case, old: Outcome, new: Outcome) -> Outcome:
    """Take away other words of a failure that has the same status and reason."""
    if old.statuses != new.statuses or old.reasons != new.reasons or not old.reasons:
        return new
    if masked_answer(old) == masked_answer(new):
        new = new._replace(answer=old.answer)
    if masked_log(old) == masked_log(new):
        new = new._replace(log=old.log)
    return new


def masked_answer(outcome: Outcome) -> bytes:
    """Return the answer without the words of a failure."""
    masked = OWN_WORDS.sub(rb"\1module \2: WORDS\n", outcome.answer)
    return OWN_LENGTH.sub(rb"\1LENGTH", masked)


def masked_log(outcome: Outcome) -> list[str]:
    """Return the log without the words of failures."""
    return [LOGGED_WORDS.sub(r"\1\2 WORDS", line) for line in outcome.log]


def without_amount(_case: Case, old: Outcome, new: Outcome) -> Outcome:
    """Take away how much of a stream was passed on before it failed."""
    both = (old, new)
    if not all("aborted" in each.reasons and each.end != "end" for each in both):
        return new
    if old.answer.startswith(new.answer) or new.answer.startswith(old.answer):
        return new._replace(answer=old.answer)
    return new


def without_limit(_case: Case, old: Outcome, new: Outcome) -> Outcome:
    """Take away that a request is read which was too long, or had too many headers."""
    refused = {414, 431}.intersection(old.statuses)
    return old if refused and not refused.intersection(new.statuses) else new


def without_reset(_case: Case, old: Outcome, new: Outcome) -> Outcome:
    """Take away that a connection ends well which was reset behind its last whole answer.

    What the kernel still held unread decided that. A new reset stays a difference.
    """
    if old.answer and old._replace(end="end") == new and old.end == "reset":
        return old
    return new


def when(
    tags: Sequence[str], before: Sequence[str], behind: Sequence[str]
) -> Callable[[Case, Outcome, Outcome], Outcome]:
    """Return what explains whole differences of answers with one of the tags.

    The first failure that is logged must be one of `before` in the old outcome, one of `behind` in
    the new one; "" is no failure.
    """

    def forgive(case: Case, old: Outcome, new: Outcome) -> Outcome:
        """Return the old outcome where the case is meant."""
        reasons = ("".join(old.reasons[:1]), "".join(new.reasons[:1]))
        is_meant = case.direction == "target" and not set(tags).isdisjoint(case.tags)
        return old if is_meant and reasons[0] in before and reasons[1] in behind else new

    return forgive


BLANKS = (
    "blank before colon",
    "blanks before colon",
    "tab before colon",
    "blank within a name",
    "From line",
    "From line with a colon",
    "blank before colon of Content-Length",
    "blank before colon of Transfer-Encoding",
    "blank before colon of the length",
    "blank before colon of the coding",
)
LARGE_HEADS = (
    *(f"{number} headers" for number in NUMBER_OF_HEADERS),
    *(f"headers of about {size} bytes" for size in ANSWER_HEAD_BYTES),
    "long obs-fold",
    "header of 70000 bytes",
    "reason phrase of 70000 bytes",
)
INTERIM_ANSWERS = tuple(f"{number} interim" for number in range(1, 8))
UNCERTAIN_LENGTHS = (
    "length with a vertical tab",
    "length with a no-break space",
    "length of 5000 digits",
    "huge length",
    "length of 2^63",
    "chunked with a vertical tab",
    "chunked with a no-break space",
)
REFUSED_CHUNKS = (
    "size with 20 zeros",
    "chunk extension of 5000 bytes",
    "chunk extension of 70000 bytes",
    "many trailers",
    "trailer of 70000 bytes",
)
REFUSED_STATUS_LINES = (
    "answer of HTTP/1.10",
    "answer of HTTP/1.x",
    "status 0200",
    "tab before the status",
    "tab behind the status",
    "blank before the status line",
)
TOLERATED = ("message type", "delivery status type", "answer of HTTP/2.0")
ANY_REASON = (
    "",
    "status",
    "malformed",
    "truncated",
    "aborted",
    "protocol",
    "unreachable",
    "timeout",
)
NOT_HEAD = ("", "status", "malformed", "truncated", "aborted", "timeout", "unreachable")
EXPLAINED: tuple[Explanation, ...] = (
    Explanation(
        "order of the headers to a target",
        "Requests to targets: no order is given (RFC 9110, 5.3: it means nothing)",
        "",
        without_order,
    ),
    Explanation(
        "words of a failure; its status and reason are the same",
        "Failures: one table (status and reason); the words are free",
        "",
        without_words,
    ),
    Explanation(
        "part of a stream that was sent before it failed",
        "A truncated body is never passed on as a complete one: after [the status] the "
        "connection is reset",
        "",
        without_amount,
    ),
    Explanation(
        "request line and headers up to 64 KiB, in any number",
        "Limits: request line / header block | 64 KiB / 64 KiB",
        "",
        without_limit,
    ),
    Explanation(
        "blanks in or behind a header's name",
        "What Go's client tolerates: blanks before a header's colon (that header is dropped)",
        "up",
        when(BLANKS, ("protocol",), NOT_HEAD),
    ),
    Explanation(
        "Transfer-Encoding in an answer of HTTP/1.0",
        "What Go's client tolerates: Transfer-Encoding in an HTTP/1.0 answer (ignored)",
        "down where the body is chunked (the chunks are taken for the body), else up",
        when(("answer of HTTP/1.0",), ANY_REASON, ANY_REASON),
    ),
    Explanation(
        "interim answers",
        "What Go's client tolerates: up to five 1xx before the answer (not 101)",
        "up",
        when(INTERIM_ANSWERS, ("protocol",), NOT_HEAD),
    ),
    Explanation(
        "large heads",
        "What Go's client tolerates: hundreds of headers within the bound of bytes. "
        "Limits: head of a target's answer | 256 KiB",
        "up",
        when(LARGE_HEADS, ("protocol",), NOT_HEAD),
    ),
    Explanation(
        "content encodings",
        "Content-Encoding: exactly `gzip` is decoded, as in Prometheus; anything else is read as "
        "it is",
        "down where the body is no exposition as it is, else up",
        when(tuple(tag for _, tag, _ in ENCODINGS[1:]), ("", "malformed"), ("", "malformed")),
    ),
    Explanation(
        "redirects",
        "Redirects are followed for 301, 302, 303, 307 and 308 with a Location on the target's own "
        "scheme, host and effective port; any other redirect is a failure",
        "up where it leads to the target itself",
        when(("redirect", "status 300", "status 305"), ANY_REASON, ANY_REASON),
    ),
    Explanation(
        "framings whose meaning is uncertain",
        "What Go's client tolerates: only what makes the body's end or meaning uncertain is "
        "refused",
        "down",
        when(UNCERTAIN_LENGTHS, ANY_REASON, ("protocol",)),
    ),
    Explanation(
        "chunks that Go refuses",
        "Failures: truncated | 502 | less than announced, invalid chunks. "
        "Principles: fail like the exporter would",
        "down",
        when(REFUSED_CHUNKS, ANY_REASON, ("protocol", "truncated", "aborted")),
    ),
    Explanation(
        "status lines that Go refuses",
        "Failures: protocol | 502 | not HTTP. Principles: fail like the exporter would",
        "down",
        when(REFUSED_STATUS_LINES, ANY_REASON, ("protocol",)),
    ),
    Explanation(
        "answers that only the reader of mails refused",
        "What Go's client tolerates, ours does, since Prometheus scrapes these targets directly",
        "up",
        when(TOLERATED, ("protocol",), NOT_HEAD),
    ),
    Explanation(
        "a connection's end in good form instead of a reset behind the same answers",
        "Principles: never a dropped connection before a status is sent (no line asks for a reset)",
        "",
        without_reset,
    ),
)
