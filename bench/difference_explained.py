"""The differences that DESIGN.md wants: what `difference.py` need not list as unexplained."""

from __future__ import annotations

import re
from typing import Callable, NamedTuple

from difference_cases import Case

PARTS = ("status", "headers", "body", "end", "received", "log")


class Outcome(NamedTuple):
    """What one process made of a case, without what varies from run to run."""

    answer: bytes
    end: str
    received: tuple[bytes, ...]
    log: tuple[str, ...]

    @property
    def statuses(self) -> tuple[int, ...]:
        """The statuses of all answers on the connection."""
        return tuple(int(code) for code in re.findall(rb"HTTP/1\.1 ([0-9]{3}) ", self.answer))

    @property
    def reasons(self) -> tuple[str, ...]:
        """The reasons of failures that were logged."""
        found = (re.match(r"\w+ (?:module \w+|no module): (\w+):", line) for line in self.log)
        return tuple(each[1] for each in found if each)

    @property
    def head(self) -> bytes:
        """The first answer's head, without its status line."""
        return self.answer.partition(b"\r\n\r\n")[0].partition(b"\r\n")[2]

    @property
    def body(self) -> bytes:
        """Whatever follows the first answer's head."""
        return self.answer.partition(b"\r\n\r\n")[2]

    def parts(self) -> tuple[object, ...]:
        """Return the values that PARTS names."""
        return (self.statuses, self.head, self.body, self.end, self.received, self.log)

    def summary(self) -> str:
        """Return statuses, reasons and end in a few words."""
        statuses = " ".join(map(str, self.statuses)) or "nothing"
        return ", ".join((statuses, *self.reasons, self.end))


class Explanation(NamedTuple):
    """Why two outcomes may differ."""

    name: str
    design: str  # the line of DESIGN.md that wants it
    prometheus: str  # what a real Prometheus says of such answers
    holds: Callable[[Case, Outcome, Outcome], bool]


EXPLAINED: tuple[Explanation, ...] = ()
