"""Outcomes of cases, and the differences that DESIGN.md wants.

An explanation takes a part of a difference away: it returns the new outcome with that part as the
old one has it. What is equal in the end is explained.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Callable, NamedTuple

from difference_cases import Case

PARTS = ("status", "headers", "body", "end", "received", "order", "log")
STATUS = re.compile(rb"HTTP/1\.1 ([0-9]{3}) ")
REASON = re.compile(r"\w+ (?:module \w+|no module): (\w+):")


def sorted_head(head: bytes) -> bytes:
    """Return a head with its headers in the order of their names; equal names keep theirs."""
    first, *lines = head.split(b"\r\n")
    return b"\r\n".join([first, *sorted(lines, key=lambda line: line.partition(b":")[0])])


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


def when(
    direction: str, tags: Sequence[str], holds: Callable[[Outcome, Outcome], bool]
) -> Callable[[Case, Outcome, Outcome], Outcome]:
    """Return an explanation of whole differences: of cases with one of the tags where it holds."""

    def forgive(case: Case, old: Outcome, new: Outcome) -> Outcome:
        """Return the old outcome where the case is meant."""
        is_meant = case.direction == direction and not set(tags).isdisjoint(case.tags)
        return old if is_meant and holds(old, new) else new

    return forgive


def changes(before: Sequence[str], behind: Sequence[str]) -> Callable[[Outcome, Outcome], bool]:
    """Return whether the first failure was one of the reasons before, and is one behind.

    The reason "" is no failure.
    """

    def holds(old: Outcome, new: Outcome) -> bool:
        """Compare the first reasons."""
        return "".join(old.reasons[:1]) in before and "".join(new.reasons[:1]) in behind

    return holds


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
        "down in both cases",
        without_words,
    ),
    Explanation(
        "part of a stream that was sent before it failed",
        "A truncated body is never passed on as a complete one: after [the status] the "
        "connection is reset",
        "down in both cases",
        without_amount,
    ),
)
