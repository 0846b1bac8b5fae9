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
STATUS = re.compile(rb"HTTP/1\.1 ([0-9]{3}) [^\r\n]*\r\n")  # and not one that a message quotes
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
    is_newer: bool = False  # the rule is, than the Go of the Prometheus that judges


def without_order(_case: Case, old: Outcome, new: Outcome) -> Outcome:
    """Take away that a target gets the same headers in another order."""
    if old.received_sorted == new.received_sorted:
        return new._replace(received=old.received)
    return new


OWN_LENGTH = re.compile(rb"(X-Content-Type-Options: nosniff\r\nContent-Length: )[0-9]+")
OWN_WORDS = re.compile(rb"(\r\n\r\n)module (\w+): [^\n]*\n")
LOGGED_WORDS = re.compile(r"^(module \w+: \w+): .*|^(debug \S+: response not sent): .*")
LEFT_OUT = re.compile(r"^\w+ (module .*?)(?: \([0-9]+ more left out\))?$", re.DOTALL)


def without_levels(log: Sequence[str]) -> list[str]:
    """Return what happened to modules, whether it was a warning or not, without recoveries."""
    lines = [LEFT_OUT.sub(r"\1", line) for line in log]
    return [line for line in lines if not line.endswith(": recovered")]


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
    return [LOGGED_WORDS.sub(r"\1\2 WORDS", line) for line in without_levels(outcome.log)]


def without_amount(_case: Case, old: Outcome, new: Outcome) -> Outcome:
    """Take away how much of a stream was passed on before it failed."""
    both = (old, new)
    if not all("aborted" in each.reasons and each.end != "end" for each in both):
        return new
    if old.answer.startswith(new.answer) or new.answer.startswith(old.answer):
        return new._replace(answer=old.answer)
    return new


def refusal(words: bytes, tags: Sequence[str]) -> Callable[[Case, Outcome, Outcome], Outcome]:
    """Return what takes away that a client's request is read which was refused with these words.

    The case must have one of the tags. The answers before the refusal must be the same. A request
    that is refused for another reason as well gets the same answer, without a body if it is a HEAD
    request. The log names such a request now.
    """

    def forgive(case: Case, old: Outcome, new: Outcome) -> Outcome:
        """Return the old outcome if its last answer is that refusal."""
        before, _, last = old.answer.rpartition(b"HTTP/1.1 4")
        is_meant = last.endswith(b"\r\n\r\n" + words + b"\n") and new.answer.startswith(before)
        if '- - "-" 4' in "".join(old.log):
            is_head = "HEAD" in case.tags and new.answer.endswith(b"\r\n\r\n")
            is_meant |= old.answer == new.answer
            is_meant |= is_head and old.answer.startswith(new.answer)
        return old if is_meant and not set(tags).isdisjoint(case.tags) else new

    return forgive


FIELD = re.compile(rb"(?m)^([!#$%&'*+.^_`|~0-9A-Za-z-]+):[ \t]*(.*?)[ \t]*\r$")


def trimmed(line: bytes) -> bytes:
    """Return a head, or a line of one, without the blanks around the values of headers."""
    return FIELD.sub(rb"\1: \2\r", line)


def without_blanks(_case: Case, old: Outcome, new: Outcome) -> Outcome:
    """Take away that blanks around a header's value are not passed on."""
    head, end, body = new.answer.partition(b"\r\n\r\n")
    old_head = old.answer.partition(b"\r\n\r\n")[0]
    if head + b"\r" == trimmed(old_head + b"\r"):
        new = new._replace(answer=old_head + end + body)
    received = tuple(map(untrimmed, old.received, new.received))
    if len(old.received) == len(new.received):
        new = new._replace(received=received)
    return new


def untrimmed(old: bytes, new: bytes) -> bytes:
    """Return a new head with those blanks around values that the old one has."""
    lines = {trimmed(line + b"\r"): line for line in old.split(b"\r\n")}
    return b"\r\n".join(lines.get(line + b"\r", line) for line in new.split(b"\r\n"))


def without_unseen(case: Case, old: Outcome, new: Outcome) -> Outcome:
    """Take away that one target was asked when the case ended, and the other was not yet."""
    is_meant = "client goes" in case.tags and not (old.received and new.received)
    return new._replace(received=old.received) if is_meant else new


CONNECTION = re.compile(rb"(\r\nConnection: )(?:close|keep-alive)\r\n")


def is_beginning(one: Outcome, other: Outcome) -> bool:
    """Return whether one outcome is the beginning of the other, and then the connection ends."""
    last = one.answer.rpartition(b"HTTP/1.1 ")[2]
    if one.end != "end" or b"\r\nConnection: close\r\n" not in last:
        return False
    answers = [CONNECTION.sub(rb"\1EITHER\r\n", each.answer) for each in (one, other)]
    is_part = answers[1].startswith(answers[0]) and other.log[: len(one.log)] == one.log
    return is_part and one.received == other.received


SPLIT_ITEM = re.compile(rb"(?i)\nconnection:[^\n]*[a-z-] +[a-z-]")


def without_end(case: Case, old: Outcome, new: Outcome) -> Outcome:
    """Take away that a connection ends, or goes on, since blanks around items mean nothing.

    A blank within an item makes it another item, so that `c lose` does not close. Requests that
    follow on a connection which has ended are answered with a reset.
    """
    tags = {"Connection with blanks", "Connection with tabs"}
    ended = new._replace(end="end") if "pipelined" in case.tags else new
    ends = tags.intersection(case.tags) and is_beginning(ended, old)
    sent = b"".join(step.data for step in case.client if step.action == "send")
    may_go_on = "length with blanks around" in case.tags or SPLIT_ITEM.search(sent)
    return old if ends or (may_go_on and is_beginning(old, new)) else new


BLANK_IN_HOST = re.compile(rb'-web\.external-address, found "(?:[ \t]|[^"\n]*[ \t]"\n)')
HOST_WITH_BLANK = re.compile(rb"(?i)\nhost:(?:[^\n]*[ \t]\r?\n|[ \t]*\r?\n[ \t])")


def without_host(case: Case, old: Outcome, new: Outcome) -> Outcome:
    """Take away that /sd was refused for a blank or fold around the host in Host."""
    sent = b"".join(step.data for step in case.client if step.action == "send")
    is_meant = HOST_WITH_BLANK.search(sent) and 200 in new.statuses
    was_refused = BLANK_IN_HOST.search(old.answer) or "HEAD" in case.tags
    return old if is_meant and was_refused and 400 in old.statuses else new


HOST_REFUSED = re.compile(rb"\r\n\r\nexpected one header Host, found [0-9]+: send exactly one\n\Z")
HOST_TAGS = {"no Host", "two Host", "two equal Host"}


def without_host_refusal(case: Case, old: Outcome, new: Outcome) -> Outcome:
    """Take away that a request without exactly one Host is refused.

    The answers before the refusal must be the same. Plain HTTP on the port for TLS is refused for
    that; the log does not name the request any more.
    """
    before = new.answer.rpartition(b"HTTP/1.1 400 ")[0]
    is_plain = HOST_TAGS.intersection(case.tags) and old.answer == new.answer
    is_meant = HOST_REFUSED.search(new.answer) and old.answer.startswith(before)
    return old if is_plain or is_meant else new


NO_STORE = b"\r\nCache-Control: no-store\r\n"


def without_no_store(_case: Case, old: Outcome, new: Outcome) -> Outcome:
    """Take away that /sd forbids to keep its answer."""
    if NO_STORE in old.answer:
        return new
    return new._replace(answer=new.answer.replace(NO_STORE, b"\r\n"))


def without_level(_case: Case, old: Outcome, new: Outcome) -> Outcome:
    """Take away which failures and recoveries of a module are warnings.

    That depends on what was logged in the 10 s before, and so on other cases.
    """
    if without_levels(old.log) == without_levels(new.log):
        return new._replace(log=old.log)
    return new


OLD_VERSIONS = {"answer of HTTP/1.0", "answer of HTTP/0.9"}
CODING = re.compile(rb"(?i)\ntransfer-encoding *:")


def without_coding(case: Case, old: Outcome, new: Outcome) -> Outcome:
    """Take away that a Transfer-Encoding is ignored in an answer of HTTP/1.0 or 0.9."""
    is_meant = OLD_VERSIONS.intersection(case.tags) and CODING.search(answer_heads(case))
    return old._replace(received=new.received) if is_meant else new


def without_count(case: Case, old: Outcome, new: Outcome) -> Outcome:
    """Take away that an answer was refused for the number of its headers, not for their bytes."""
    is_meant = any(line.endswith("got more than 100 headers") for line in old.log[:1])
    is_meant = is_meant and len(answer_heads(case)) <= HEAD_BYTES
    return old._replace(received=new.received) if is_meant else new


def without_reset(_case: Case, old: Outcome, new: Outcome) -> Outcome:
    """Take away that a connection ends well which was reset behind its last whole answer.

    What the kernel still held unread decided that. A new reset stays a difference.
    """
    if old.answer and old._replace(end="end") == new and old.end == "reset":
        return old
    return new


def answer_heads(case: Case) -> bytes:
    """Return the bytes of a target's answer up to its body, with the heads of interim answers."""
    rest = b"".join(step.data for step in case.target if step.action == "send")
    heads = b""
    while found := HEAD.match(rest):
        heads += found[0]
        rest = rest[found.end() :]
        if not found[1].startswith(b"1"):
            break
    return heads or rest


HEAD = re.compile(rb"(?s)HTTP/[0-9.]+ +([0-9]*).*?\n\r?\n")
NOTHING = re.compile(rb"(?!)")


def when(
    tags: Sequence[str],
    before: Sequence[str],
    behind: Sequence[str],
    mutation: re.Pattern[bytes] = NOTHING,
    without: str = "",
) -> Callable[[Case, Outcome, Outcome], Outcome]:
    """Return what explains whole differences of answers with one of the tags.

    The same holds for a mutated answer whose heads contain `mutation`. Nothing is explained for a
    case with the tag `without`. The first failure that is logged must be one of `before` in the
    old outcome, the last one must be one of `behind` in the new outcome; "" is no failure. What
    the target received is not explained.
    """

    def forgive(case: Case, old: Outcome, new: Outcome) -> Outcome:
        """Return the old outcome where the case is meant."""
        reasons = ("".join(old.reasons[:1]), "".join(new.reasons[-1:]))
        is_meant = case.direction == "target" and not set(tags).isdisjoint(case.tags)
        if case.direction == "target" and any(tag.startswith("mutation") for tag in case.tags):
            is_meant |= bool(mutation.search(answer_heads(case)))
        is_meant = is_meant and reasons[0] in before and reasons[1] in behind
        is_meant = is_meant and without not in case.tags
        return old._replace(received=new.received) if is_meant else new

    return forgive


BLANKS = (
    "blank before colon",
    "blank within a name",
    "From line",
    "From line with a colon",
    "blank before colon of Content-Length",
    "blank before colon of Transfer-Encoding",
    "blank before colon of the length",
    "blank before colon of the coding",
)
BLANK_IN_NAME = re.compile(rb"\n[!#$%&'*+.^_`|~0-9A-Za-z-]+ [^:\n]*:")
REFUSED_CHARACTERS = (
    "NUL in a value",
    "control character in a value",
    "DEL in a value",
    "bare CR in a value",
    "bare CR and a header",
    "bare CR at the end of a value",
    "two CR at the end of a value",
    "vertical tab in a value",
    "form feed in a value",
    "separator characters in a value",
    "reason phrase with a bare CR",
    "NUL in a name",
    "control character in a name",
    "not ASCII in a name",
    "brackets in a name",
    "at sign in a name",
    "quotes in a name",
    "slash in a name",
    "braces in a name",
)
REFUSED_CHARACTER = re.compile(
    rb"[\0-\x08\x0b\x0c\x0e-\x1f\x7f]|\r(?=[^\n])|\n[^:\n]*[\"(),/;<=>?@\[\\\]{}\x80-\xff][^:\n]*:"
)
MANY_HEADERS = (*(f"{number} headers" for number in NUMBER_OF_HEADERS), "long obs-fold")
HEAD_BYTES = 1 << 18  # of a target's answer, at most
LARGE_HEADS = (
    *MANY_HEADERS,
    *(f"headers of about {size} bytes" for size in ANSWER_HEAD_BYTES if size <= HEAD_BYTES),
    "header of 70000 bytes",
    "reason phrase of 70000 bytes",
)
INTERIM_TAGS = tuple(f"{number} interim" for number in range(1, 8))
INTERIM_ANSWERS = INTERIM_TAGS[:5]  # more are refused
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
REFUSED_STATUS_LINE = re.compile(rb"\A(?!HTTP/[0-9]\.[0-9] +[0-9]{3}[ \r\n])")
BODILESS_STATUSES = ("status 204", "status 304")
ODD_LINE_ENDS = ("bare CR as line end", "two CR as line end")
TYPES_OF_MAIL = ("message type", "delivery status type")
TOLERATED = (*TYPES_OF_MAIL, "answer of HTTP/2.0")
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
        "which failures and recoveries are warnings",
        "Logs: at most one warning in 10 s for each module, with the number of those left out",
        "",
        without_level,
    ),
    Explanation(
        "blanks around the value of a header",
        "RFC 9110, 5.5, and RFC 9112, 5.1: they are no part of the value; 5.2: nor is the fold of "
        "an empty value",
        "up",
        without_blanks,
    ),
    Explanation(
        "order of the headers to a target",
        "Requests to targets: no order is given (RFC 9110, 5.3: it means nothing). That goes for "
        "our own Accept-Encoding: identity to an unverified target, too",
        "",
        without_order,
    ),
    Explanation(
        "words of a failure; its status and reason are the same",
        "Failures: one table (status and reason); the words are free. Content-Encoding: anything "
        "but gzip is read as it is, and the message names it",
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
        "any number of headers in a request",
        "Limits: request line / header block: bytes, and no number. Only the number of headers is "
        "free by now; the bytes are bounded as before (8,192 and 32,768)",
        "",
        refusal(b"too many headers", MANY_HEADERS),
    ),
    Explanation(
        "requests that only the reader of mails refused",
        "RFC 9110, 8.3: message/rfc822 and message/delivery-status are types like any other; a "
        "request's Content-Type means nothing here",
        "",
        refusal(b"malformed headers", TYPES_OF_MAIL),
    ),
    Explanation(
        "a target that was asked, or was not asked yet, when its client hung up",
        "Failures: aborted | or the client hung up before it. Time decides what has happened then",
        "",
        without_unseen,
    ),
    Explanation(
        "a connection that ends, or goes on, after blanks around `close` or around a length of 0",
        "RFC 9110, 5.5 and 5.6.1: blanks around a value or an item are no part of it",
        "",
        without_end,
    ),
    Explanation(
        "a blank or fold around the host in Host",
        "RFC 9110, 5.5, and RFC 9112, 5.2: it is no part of the value, so /sd answers",
        "",
        without_host,
    ),
    Explanation(
        "requests of HTTP/1.1 without exactly one Host",
        "RFC 9112, 3.2: such a request is answered with 400",
        "",
        without_host_refusal,
    ),
    Explanation(
        "Cache-Control of /sd",
        "Beyond the original: discovery. A cache must not keep the list of modules",
        "",
        without_no_store,
    ),
    Explanation(
        "control characters in a target's headers, and names that are no token",
        "facts.md, Go's client: a tab or control character is an error. What Go's client "
        "tolerates, ours does: exactly that",
        "up for 2.42, which is built with Go 1.19; net/textproto of Go 1.20 and later refuses "
        "these",
        when(REFUSED_CHARACTERS, ANY_REASON, ("protocol",), REFUSED_CHARACTER),
        is_newer=True,
    ),
    Explanation(
        "interim answers with malformed headers",
        "Failures: protocol | 502 | not HTTP. Principles: fail like the exporter would",
        "down",
        when(("100 with a bad header before",), ANY_REASON, ("protocol",)),
    ),
    Explanation(
        "bare CR or two CR as the end of lines",
        "Failures: protocol | 502 | not HTTP. It was another reason of 502",
        "down",
        when(ODD_LINE_ENDS, ("truncated", "unreachable"), ("protocol",)),
    ),
    Explanation(
        "204 and 304 with a framing",
        "RFC 9112, 6.3: they end with their head, whatever framing it announces. Redirects: 304 "
        "[is] passed on",
        "down (the status)",
        when(BODILESS_STATUSES, ("truncated", "aborted"), ("status",)),
    ),
    Explanation(
        "blanks in or behind a header's name",
        "What Go's client tolerates: blanks before a header's colon (that header is dropped)",
        "up",
        when(BLANKS, ("protocol",), NOT_HEAD, BLANK_IN_NAME),
    ),
    Explanation(
        "Transfer-Encoding in an answer of HTTP/1.0 or 0.9",
        "What Go's client tolerates: Transfer-Encoding in an HTTP/1.0 answer (ignored)",
        "down where the body is chunked (the chunks are taken for the body), else up",
        without_coding,
    ),
    Explanation(
        "interim answers",
        "What Go's client tolerates: up to five 1xx before the answer (not 101)",
        "up",
        when(INTERIM_ANSWERS, ("protocol",), NOT_HEAD, without="101 before"),
    ),
    Explanation(
        "large heads",
        "What Go's client tolerates: hundreds of headers within the bound of bytes. "
        "Limits: head of a target's answer | 256 KiB",
        "up",
        when(LARGE_HEADS, ("protocol",), NOT_HEAD),
    ),
    Explanation(
        "more than 100 headers in an answer, also lines of a body that are taken for headers",
        "What Go's client tolerates: hundreds of headers within the bound of bytes",
        "up, or down where they are no headers",
        without_count,
    ),
    Explanation(
        "interim answers that are cut off",
        "Failures: truncated | 502 | less than announced. It was another reason of 502",
        "down",
        when(INTERIM_TAGS, ("unreachable", "protocol"), ("truncated",)),
    ),
    Explanation(
        "a head over 256 KiB whose target resets the connection",
        "Failures: unreachable | 502 | reset. Up to 256 KiB are read first. It was 100 lines",
        "down",
        when(("headers of about 300000 bytes",), ("protocol",), ("unreachable",)),
    ),
    Explanation(
        "content encodings",
        "Content-Encoding: exactly `gzip` is decoded, as in Prometheus; anything else is read as "
        "it is",
        "down where the body is no exposition as it is, else up",
        when(tuple(tag for _, tag, _ in ENCODINGS[1:]), ("", "malformed"), ("", "malformed")),
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
        when(REFUSED_STATUS_LINES, ANY_REASON, ("protocol",), REFUSED_STATUS_LINE),
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
