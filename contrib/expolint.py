#!/usr/bin/env python3
"""expolint lists what is wrong with Prometheus expositions, also what Prometheus tolerates.

    python3 contrib/expolint.py [--strict] [--content-type TYPE] FILE...

It reads text, OpenMetrics and protobuf from files, or from stdin for `-`. It prints each finding as
`file:line:column: message`, with the line and a caret under the place. `strict: ` marks what breaks
a rule of the format although Prometheus ingests the body.

Exit codes: 0 Prometheus ingests all files, 1 it refuses one or, with --strict, there is a finding,
2 a file cannot be read or the arguments are bad.

    from expolint import findings
    findings(body, content_type)

It needs Python 3.9 or later, and expexp.py beside it or in the folder above. Prometheus's own rules
are those of expexp's readers. This file adds the rules of the text format 0.0.4 and of OpenMetrics
1.0 that Prometheus does not enforce. In protobuf there are none.

The default collector of client_golang breaks a rule of OpenMetrics: its gauge and its counter of
allocated bytes are two families of one name there. They are found as a second HELP and TYPE.

Contents:
  1  Reading lines
  2  Reading families
  3  Judging families
  4  Findings
  5  Command line

Licensed under the Apache License, Version 2.0.
"""

from __future__ import annotations

import argparse
import dataclasses
import io
import math
import re
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Callable, NamedTuple

FOLDER = Path(__file__).resolve().parent
sys.path[:0] = [str(FOLDER), str(FOLDER.parent)]
try:
    from expexp import (
        NULS,
        NUMBER,
        TEXT,
        Dialect,
        ExpositionError,
        Label,
        Limits,
        Line,
        Metadata,
        Sample,
        ScrapeError,
        Source,
        choose_dialect,
        compile_production,
        excerpt,
        is_utf8,
        point_at,
        quote,
        read_input,
        read_line,
        read_quoted,
        tell,
        text_scrape,
        unescape,
        verify_exposition,
        words_of,
    )
except ModuleNotFoundError:
    sys.stderr.write("expolint.py needs expexp.py beside it or in the folder above\n")
    sys.exit(2)

__all__ = ["Finding", "findings", "main"]

# ==================================================================================================
# 1  Reading lines
# ==================================================================================================
# expexp's reader takes what Prometheus takes. A line is first read by a stricter dialect, then by
# Prometheus's own. What no dialect can say is looked for in the bytes of the line.


class Finding(NamedTuple):
    """One thing wrong with an exposition; `strict` if Prometheus ingests the body anyway.

    In protobuf the line is 0, and the column is the offset of a byte.
    """

    line: int
    column: int
    message: str
    strict: bool = False


class Reading(NamedTuple):
    """What a line says, and what is wrong with it."""

    line: Line
    is_readable: bool
    findings: list[Finding]


STRICT_TEXT = TEXT._replace(
    label_value=compile_production(rb'[^"\\\n]*+(?:\\[\\"n][^"\\\n]*+)*'),
    after_name=re.compile(rb"[ \t]|(?=\n)|\Z"),
)
FIRST_WORD = re.compile(rb"[ \t]*#[ \t]*(?P<word>[A-Z]*\0)?")
HELP_ESCAPE = re.compile(rb"\\[\\n]|(?P<other>\\)")


def find_line_end(body: bytes, pos: int) -> int:
    """Return where the line at `pos` ends: at its newline, or with the body."""
    end = body.find(b"\n", pos)
    return end if end >= 0 else len(body)


def to_finding(error: ExpositionError, strict: bool = False) -> Finding:
    """Return the finding that an error of expexp stands for."""
    return Finding(error.line, error.column or error.offset, error.message, strict)


def check_keyword(source: Source, pos: int) -> Iterator[ExpositionError]:
    """Yield the error for a NUL byte in the first word of a comment."""
    found = FIRST_WORD.match(source.body, pos)
    if found and found["word"]:
        message = "expected no NUL byte in the first word of a comment"
        yield source.error_at(found.start("word"), message)


def check_help(source: Source, metadata: Metadata) -> Iterator[ExpositionError]:
    """Yield the error for an escape in HELP that the text format does not have."""
    start = find_line_end(source.body, metadata.pos) - len(metadata.text)
    for found in HELP_ESCAPE.finditer(metadata.text):
        if found["other"]:
            yield source.expected(start + found.start(), r"one of the escapes \\ and \n")
            return


def check_commas(source: Source, pos: int, end: int) -> Iterator[ExpositionError]:
    """Yield the errors for labels without a comma between them or, in OpenMetrics, one too many."""
    opening = source.body.find(b'"', pos, end)
    while opening >= 0:
        source.pos = opening
        read_quoted(source, TEXT.label_value, "a label")  # also fits names
        source.take(NULS, "a run of NUL bytes")
        source.skip_blanks()
        after = source.pos
        if source.dialect.openmetrics:
            if source.body.startswith(b",}", after):
                yield source.expected(after + 1, "a label name")
        elif source.peek() not in (b",", b"}", b"="):
            yield source.expected(after, '"," or "}"')
        opening = source.body.find(b'"', after, end)


def check_line(source: Source, pos: int, end: int, line: Line) -> Iterator[ExpositionError]:
    """Yield what the bytes of a line from `pos` to `end` show to be wrong."""
    yield from check_keyword(source, pos)
    if isinstance(line, Sample):
        yield from check_commas(source, line.pos, end)
    if source.dialect.openmetrics:
        return
    if isinstance(line, Sample) and line.pos > pos and source.body[line.pos : line.pos + 1] != b"{":
        message = (
            "a blank before a name; Prometheus 2 refuses it, and 3 makes it a part of the name"
        )
        yield source.error_at(pos, message)
    if isinstance(line, Metadata) and line.keyword == b"HELP":
        yield from check_help(source, line)
    last = len(source.body)
    if end > last and source.body[pos:].strip(b" \t"):
        yield source.expected(last, "a newline")


def try_line(source: Source) -> Line | ExpositionError:
    """Return what `read_line` returns or raises."""
    try:
        return read_line(source)
    except ExpositionError as error:
        return error


def read_strictly(source: Source) -> Reading:
    """Return the next line with what is wrong with it."""
    start = source.pos
    findings = []
    reader = source
    if not source.dialect.openmetrics:
        reader = dataclasses.replace(source, dialect=STRICT_TEXT)
    line = try_line(reader)
    if isinstance(line, ExpositionError):
        stricter = to_finding(line, strict=True)
        source.pos = start
        reader = source
        line = try_line(reader)
        if isinstance(line, ExpositionError):
            # A quoted name may go on in the next lines: the fault can be in one of them.
            source.pos = find_line_end(source.body, line.offset) + 1
            return Reading(None, False, [to_finding(line)])
        findings.append(stricter)
    end = reader.pos
    findings += [to_finding(error, strict=True) for error in check_line(source, start, end, line)]
    source.pos = end
    return Reading(line, True, findings)


# ==================================================================================================
# 2  Reading families
# ==================================================================================================
# A family is a run of lines about one name.

#: A family with more samples is not judged. What the checks need takes 500 bytes a sample.
MAX_JUDGED_SAMPLES = 100_000
MAX_FINDINGS = 100  # a reader needs no more, and to find the line of each takes time

#: The suffixes of the samples of a type, by whether it is OpenMetrics. Other types have none.
SUFFIXES: dict[tuple[bool, bytes], tuple[bytes, ...]] = {
    (False, b"histogram"): (b"_bucket", b"_count", b"_sum"),
    (False, b"summary"): (b"", b"_count", b"_sum"),
    (True, b"counter"): (b"_total", b"_created"),
    (True, b"histogram"): (b"_bucket", b"_count", b"_sum", b"_created"),
    (True, b"gaugehistogram"): (b"_bucket", b"_gcount", b"_gsum"),
    (True, b"summary"): (b"", b"_count", b"_sum", b"_created"),
    (True, b"info"): (b"_info",),
}


class Row(NamedTuple):
    """A sample as its family sees it."""

    pos: int
    line: int  #: its number
    kind: bytes  #: the family's type, and the suffix of the sample's name
    written: bytes  #: the value as it was written
    value: float
    timestamp: bytes
    exemplar: list[Label] | None
    labels: str  #: those with a value, in order and as a text, without the special one
    special: bytes  #: the name of the label that tells the samples of one metric apart, if any
    bound: bytes  #: the value of the special label
    number: float  #: the same as a number; NaN for a state, or where it is no number


class Heading(NamedTuple):
    """What is kept of a family to judge those below it."""

    name: bytes
    type: bytes
    suffixes: tuple[bytes, ...]
    line: int
    interrupted: int  #: the number of the line behind the last one


class Family:
    """A run of lines about one name."""

    def __init__(self, first: Sample | Metadata, line: int, dialect: Dialect) -> None:
        """Begin with the name in the first line. The line itself is still to be added."""
        self.name = first.name
        self.pos = first.pos
        self.line = line
        self.interrupted = 0
        self.openmetrics = dialect.openmetrics
        self.type = dialect.types[0]
        self.suffixes: tuple[bytes, ...] = (b"",)
        self.names = {first.name}  #: of the samples
        self.metadata: list[Metadata] = []
        self.misnamed: list[int] = []  #: where samples without a suffix are
        self.rows: list[Row] = []
        self.metrics: dict[tuple[str, float | None], list[Row]] = {}

    def takes(self, line: Sample | Metadata) -> bool:
        """Return whether this family goes on with `line`. A sample may lack its suffix."""
        if line.name == self.name:
            return True
        return isinstance(line, Sample) and line.name in self.names

    def add(self, line: Sample | Metadata, number: int) -> None:
        """Take one more line, and its number."""
        if isinstance(line, Metadata):
            self.metadata.append(line)
            if line.keyword == b"TYPE":
                self.set_type(line.text)
        elif line.name not in self.names:
            if len(self.misnamed) < MAX_FINDINGS:
                self.misnamed.append(line.pos)
        elif len(self.rows) <= MAX_JUDGED_SAMPLES:
            row = self.make_row(line, number)
            self.rows.append(row)
            has_point = self.openmetrics and row.timestamp
            point = float(row.timestamp) if has_point else None
            self.metrics.setdefault((row.labels, point), []).append(row)

    def set_type(self, kind: bytes) -> None:
        """Keep the type, and with it the names of the samples."""
        self.type = kind
        self.suffixes = SUFFIXES.get((self.openmetrics, kind), (b"",))
        self.names = {self.name + suffix for suffix in self.suffixes}

    def make_row(self, sample: Sample, line: int) -> Row:
        """Return what the rules ask of a sample. A label without a value is no label."""
        kind = self.type + sample.name[len(self.name) :]
        special = b""
        if kind.endswith(b"histogram_bucket"):
            special = b"le"
        elif kind == b"summary":
            special = b"quantile"
        elif kind == b"stateset":
            special = self.name
        labels = {label.name: unescape(label.value) for label in sample.labels if label.value}
        bound = labels.pop(special, b"")
        number = math.nan
        if kind != b"stateset" and NUMBER.fullmatch(bound):
            number = float(bound)
        return Row(
            sample.pos,
            line,
            kind,
            sample.value,
            float(sample.value),
            sample.timestamp,
            sample.exemplar,
            repr(sorted(labels.items())),
            special,
            bound,
            number,
        )

    def group(self) -> Iterator[list[Row]]:
        """Yield the samples of each metric, in OpenMetrics of each metric at each point in time.

        In OpenMetrics a series may be there again at a point in time, since timestamps may have
        been truncated. Only the first sample counts then.
        """
        for (_, point), rows in self.metrics.items():
            if point is None:
                yield rows
                continue
            first: dict[tuple[bytes, bytes], Row] = {}
            for row in rows:
                first.setdefault((row.kind, row.bound), row)
            yield list(first.values())

    def heading(self) -> Heading:
        """Return what the families below are compared with."""
        return Heading(self.name, self.type, self.suffixes, self.line, self.interrupted)


def read_families(source: Source) -> Iterator[Finding | Family]:
    """Yield what is wrong with lines, and the families except those with an unreadable line."""
    family = None
    number = 1
    while source.pos <= len(source.body):
        pos = source.pos
        reading = read_strictly(source)
        yield from reading.findings
        line = reading.line
        if not reading.is_readable:
            family = None
        if line is not None:
            if family and not family.takes(line):
                family.interrupted = number
                yield family
                family = None
            family = family or Family(line, number, source.dialect)
            family.add(line, number)
        number += source.body.count(b"\n", pos, source.pos)
    if family:
        yield family


# ==================================================================================================
# 3  Judging families
# ==================================================================================================
# One `check_*` function a rule, each with examples that pass and that do not, which the tests run.
# A check gets a family of well-formed lines, and those of its rows to look at: all in their order,
# or those of one metric (in OpenMetrics at one point in time). It yields where it found what.

Complaints = Iterator[tuple[int, str]]
Check = Callable[[Family, list[Row]], Complaints]


def explain_names(family: Heading) -> str:
    """Return why a sample cannot have the name of its family."""
    names = [quote(family.name + suffix) for suffix in family.suffixes]
    kind = family.type.decode()
    subject = f"a {kind} {quote(family.name)}"
    samples = f"samples {', '.join(names[:-1])} and {names[-1]}"
    if kind == "info":
        subject = f"an info {quote(family.name)}"
        samples = f"the sample {names[0]}"
    return f"{subject} has {samples}, found {quote(family.name)}"


def check_names(family: Family, _: list[Row]) -> Complaints:
    r"""Yield samples that lack the suffix of their type.

    Good: `# TYPE a counter\na_total 1\na_created 1\n# EOF`
    Bad: `# TYPE a counter\na 1\n# EOF`
    Bad: `# TYPE a histogram\na 1\n`
    """
    for pos in family.misnamed:
        yield pos, explain_names(family.heading())


UNITLESS = (b"info", b"stateset")


def check_metadata(family: Family, rows: list[Row]) -> Complaints:
    r"""Yield what is repeated, comes after the first sample, or is not for the type.

    Good: `# HELP a x\n# TYPE a gauge\na 1\n`
    Bad: `# TYPE a gauge\n# TYPE a gauge\n`
    Bad: `a 1\n# TYPE a gauge\n`
    Good: `# TYPE a_s gauge\n# UNIT a_s s\n# EOF`
    Bad: `# TYPE a_s info\n# UNIT a_s s\n# EOF`
    """
    seen: set[bytes] = set()
    samples = [*family.misnamed[:1], *(row.pos for row in rows[:1])]
    for metadata in family.metadata:
        pos = metadata.pos
        keyword = metadata.keyword
        what = f"{keyword.decode()} of {quote(metadata.name)}"
        if keyword in seen:
            yield pos, f"found a second {what}"
        elif samples and pos > min(samples):
            yield pos, f"expected the {what} before its samples"
        has_unit = keyword == b"UNIT" and metadata.text
        if has_unit and family.type in UNITLESS:
            kind = family.type.decode()
            yield pos, f"expected no unit for the type {kind}"
        seen.add(keyword)


def check_order(family: Family, rows: list[Row]) -> Complaints:
    r"""Yield OpenMetrics samples of one metric that do not stand together, or go back in time.

    Good: `# TYPE a gauge\na 1 1\na 2 2\n# EOF`
    Bad: `# TYPE a gauge\na 1 2\na 2 1\n# EOF`
    Bad: `# TYPE a gauge\na 1\na 2 1\n# EOF`
    Bad: `# TYPE a summary\na_sum{b="1"} 1\na_sum{b="2"} 1\na_count{b="1"} 1\n# EOF`
    """
    if not family.openmetrics:
        return
    interrupted: dict[str, int] = {}
    for before, row in zip(rows, rows[1:]):
        if row.labels != before.labels:
            interrupted.setdefault(before.labels, row.line)
            if row.labels in interrupted:
                line = interrupted[row.labels]
                yield row.pos, explain_interruption("samples of one metric", line)
        elif bool(row.timestamp) != bool(before.timestamp):
            yield row.pos, "expected a timestamp at every sample of a metric, or at none"
        elif row.timestamp and float(row.timestamp) < float(before.timestamp):
            earliest = f"{excerpt(before.timestamp)} (line {before.line})"
            found = quote(row.timestamp)
            yield row.pos, f"expected no timestamp before {earliest}, found {found}"


def explain_interruption(what: str, line: int) -> str:
    """Return why lines should have been further up."""
    return f"the {what} must stand together; they were interrupted on line {line}"


def find_expected_label(row: Row, openmetrics: bool) -> str:
    """Return what the special label of a sample must hold, nothing if it holds that."""
    is_bucket = row.kind.endswith(b"_bucket")
    if is_bucket and math.isnan(row.number):
        return "a number or +Inf"
    if is_bucket and openmetrics and row.number == math.inf and row.bound != b"+Inf":
        return "infinity written as +Inf"
    if row.kind == b"summary" and not 0 <= row.number <= 1:
        return "a number from 0 to 1"
    if row.kind == b"stateset" and not row.bound:
        return "the state"
    return ""


def check_labels(family: Family, rows: list[Row]) -> Complaints:
    r"""Yield a bucket, quantile or state whose label is missing or wrong.

    Good: `# TYPE a summary\na{quantile="0.5"} 1\n`
    Bad: `# TYPE a summary\na{quantile="2"} 1\n`
    Bad: `# TYPE a histogram\na_bucket{le="x"} 1\n`
    Bad: `# TYPE a histogram\na_bucket{le="inf"} 1\n# EOF`
    Bad: `# TYPE a stateset\na 1\n# EOF`
    """
    for row in rows:
        wanted = find_expected_label(row, family.openmetrics)
        if wanted:
            found = "none"
            label = quote(row.special)
            if row.bound:
                found = quote(row.bound)
            yield row.pos, f"expected a label {label} with {wanted}, found {found}"


NOT_NEGATIVE = "a number that is not negative"
COUNTS = (b"_bucket", b"count")
TOTALS = (b"_total", b"_sum", b"summary", *COUNTS)


def find_expected_value(row: Row) -> str:
    """Return what kind of value a sample must have, nothing if it has such a value."""
    # A quantile of NaN is one that is not known.
    is_negative = row.value < 0 if row.kind == b"summary" else not row.value >= 0
    if row.kind.endswith(COUNTS) and not row.value.is_integer():
        return "a whole number"
    if row.kind.endswith(TOTALS) and is_negative:
        return NOT_NEGATIVE
    if row.kind == b"gaugehistogram_gsum" and math.isnan(row.value):
        return "a sum that is a number"
    if row.kind == b"info_info" and row.value != 1:
        return "1 as the value of an info"
    if row.kind == b"stateset" and row.value not in (0, 1):
        return "0 or 1 as the value of a state"
    return ""


def check_values(family: Family, rows: list[Row]) -> Complaints:
    r"""Yield values that OpenMetrics does not allow for the type.

    Good: `# TYPE a counter\na_total 1.5\n# EOF`
    Bad: `# TYPE a counter\na_total NaN\n# EOF`
    Bad: `# TYPE a summary\na_count 1.5\n# EOF`
    Bad: `# TYPE a info\na_info 2\n# EOF`
    Bad: `# TYPE a stateset\na{a="b"} 2\n# EOF`
    """
    if not family.openmetrics:
        return
    for row in rows:
        wanted = find_expected_value(row)
        if wanted:
            yield row.pos, f"expected {wanted}, found {quote(row.written)}"


MAX_EXEMPLAR = 128  # characters, OpenMetrics 1.0 "Exemplars"


def check_exemplars(_: Family, rows: list[Row]) -> Complaints:
    r"""Yield exemplars that are too long, not UTF-8, or on other samples than totals and buckets.

    Good: `# TYPE a counter\na_total 1 # {b="c"} 1\n# EOF`
    Bad: `# TYPE a gauge\na 1 # {b="c"} 1\n# EOF`
    """
    for row in rows:
        if row.exemplar is None:
            continue
        if not row.kind.endswith((b"_total", b"_bucket")):
            yield row.pos, "expected an exemplar only on a counter's total or on a bucket"
        length = 0
        for label in row.exemplar:
            if not is_utf8(label.name):
                found = quote(label.name)
                yield label.pos, f"expected a name in UTF-8, found {found}"
            length += len(label.name.decode("utf-8", "replace"))
            length += len(unescape(label.value).decode())
        if length > MAX_EXEMPLAR:
            most = f"at most {MAX_EXEMPLAR} characters in an exemplar's labels"
            yield row.pos, f"expected {most}, found {length}"


def check_series(_: Family, rows: list[Row]) -> Complaints:
    r"""Yield series that are there twice.

    Good: `a{b="1",c="2"} 1\na{b="2",c="1"} 1\n`
    Bad: `a{b="1",c="2"} 1\na{c="2",b="1"} 1\n`
    Good: `# TYPE a gauge\na 1 1\na 2 1\n# EOF`
    Bad: `# TYPE a gauge\na 1\na 2\n# EOF`
    """
    seen: dict[tuple[bytes, bytes], int] = {}
    for row in rows:
        series = row.kind, row.bound
        if series in seen:
            yield row.pos, f"found the same series twice, first on line {seen[series]}"
        seen.setdefault(series, row.line)


def check_bounds(family: Family, rows: list[Row]) -> Complaints:
    r"""Yield buckets and quantiles that are not in ascending order.

    Good: `# TYPE a summary\na{quantile="0.5"} 1\na{quantile="0.9"} 1\n`
    Bad: `# TYPE a summary\na{quantile="0.9"} 1\na{quantile="0.5"} 1\n`
    Bad: `# TYPE a histogram\na_bucket{le="+Inf"} 1\na_bucket{le="1"} 1\n`
    Bad: `# TYPE a histogram\na_bucket{le="1"} 1\na_bucket{le="1.0"} 1\na_bucket{le="+Inf"} 1\n`
    """
    if family.openmetrics and family.type == b"summary":
        return
    bounded = [row for row in rows if row.special]
    for before, row in zip(bounded, bounded[1:]):
        if row.number <= before.number and row.bound != before.bound:
            label = row.special.decode()
            found = quote(row.bound)
            above = f"{quote(before.bound)} (line {before.line})"
            yield row.pos, f"expected {label} in ascending order, found {found} after {above}"


def check_buckets(family: Family, rows: list[Row]) -> Complaints:
    r"""Yield buckets that have less in them than a lower one, or less than nothing.

    Good: `# TYPE a histogram\na_bucket{le="1"} 1\na_bucket{le="+Inf"} 2\na_count 2\n`
    Bad: `# TYPE a histogram\na_bucket{le="1"} 2\na_bucket{le="+Inf"} 1\n`
    Bad: `# TYPE a histogram\na_bucket{le="1"} -1\na_bucket{le="+Inf"} 1\n`
    """
    buckets = [row for row in rows if row.special and not math.isnan(row.number)]
    buckets.sort(key=lambda row: row.number)
    for row in buckets[:1]:
        if row.value < 0 and not family.openmetrics:
            yield row.pos, f"expected {NOT_NEGATIVE}, found {quote(row.written)}"
    for before, row in zip(buckets, buckets[1:]):
        if row.value < before.value:
            bucket = describe_bucket(row)
            lower = describe_bucket(before)
            yield row.pos, f"{bucket} is below {lower} on line {before.line}"


def describe_bucket(row: Row) -> str:
    """Return the bound and value of a bucket, in words."""
    return f"bucket le={quote(row.bound)} ({excerpt(row.written)})"


def check_count(_: Family, rows: list[Row]) -> Complaints:
    r"""Yield histograms without a last bucket, or whose count is another.

    Good: `# TYPE a histogram\na_bucket{le="1"} 1\na_bucket{le="+Inf"} 2\na_count 2\n`
    Bad: `# TYPE a histogram\na_bucket{le="1"} 1\n`
    Bad: `# TYPE a histogram\na_bucket{le="+Inf"} 2\na_count 1\n`
    """
    infinite = [row for row in rows if row.number == math.inf]
    if not infinite:
        yield rows[-1].pos, 'expected a bucket with le="+Inf" in this histogram'
        return
    last = infinite[0]
    bucket = describe_bucket(last)
    for row in rows:
        if row.kind.endswith(b"count") and row.value != last.value:
            count = f"the count ({excerpt(row.written)})"
            yield row.pos, f"{count} differs from {bucket} on line {last.line}"


def check_sums(family: Family, rows: list[Row]) -> Complaints:
    r"""Yield the sums and counts of OpenMetrics histograms that cannot be, or are missing.

    Good: `# TYPE a histogram\na_bucket{le="+Inf"} 2\na_sum 3\na_count 2\n# EOF`
    Bad: `# TYPE a histogram\na_bucket{le="+Inf"} 2\na_count 2\n# EOF`
    Bad: `# TYPE a histogram\na_bucket{le="+Inf"} 2\na_sum 2\n# EOF`
    Bad: `# TYPE a histogram\na_bucket{le="-1"} 0\na_bucket{le="+Inf"} 2\na_sum 3\na_count 2\n# EOF`
    """
    if not family.openmetrics:
        return
    sums = [row for row in rows if row.kind.endswith(b"sum")]
    counts = [row for row in rows if row.kind.endswith(b"count")]
    has_negative = any(row.number < 0 for row in rows)
    for row in sums[:1]:
        if has_negative and family.type == b"histogram":
            yield row.pos, "expected no sum in a histogram with a negative bucket"
        elif not counts:
            yield row.pos, "found a sum without a count: write both or neither"
        elif row.value < 0 and not has_negative:
            yield row.pos, "expected no negative sum without a negative bucket"
    for row in counts[:1]:
        if not sums:
            yield row.pos, "found a count without a sum: write both or neither"


FAMILY_CHECKS: Sequence[Check] = (
    check_names,
    check_metadata,
    check_order,
    check_labels,
    check_values,
    check_exemplars,
)
METRIC_CHECKS: Sequence[Check] = (check_series, check_bounds)
HISTOGRAM_CHECKS: Sequence[Check] = (*METRIC_CHECKS, check_buckets, check_count, check_sums)


def check_family(family: Family) -> Complaints:
    """Yield what all checks find in a family."""
    for check in FAMILY_CHECKS:
        yield from check(family, family.rows)
    checks = HISTOGRAM_CHECKS if family.type.endswith(b"histogram") else METRIC_CHECKS
    for rows in family.group():
        for check in checks:
            yield from check(family, rows)


UNTYPED = ("untyped", "unknown")


def explain_clash(family: Family, above: Heading, name: bytes) -> str:
    """Return why a family cannot have a name that one above it has."""
    owner = quote(above.name)
    is_same = family.name == above.name
    if family.metadata and not is_same:
        kind = above.type.decode()
        if kind in UNTYPED:
            kind = "family"
        return f"the name {quote(name)} belongs to the {kind} {owner} on line {above.line}"
    if is_same and not family.metadata and b"" not in above.suffixes:
        return explain_names(above)
    return explain_interruption(f"lines of {owner}", above.interrupted)


def check_place(family: Family, above: dict[bytes, Heading]) -> Complaints:
    """Yield the first name of a family that one above it has."""
    for name in [family.name, *sorted(family.names)]:
        if name in above:
            yield family.pos, explain_clash(family, above[name], name)
            return


# ==================================================================================================
# 4  Findings
# ==================================================================================================


def judge_families(source: Source) -> Iterator[Finding]:
    """Yield what is wrong with lines, with families, and with all families together."""
    above: dict[bytes, Heading] = {}
    for found in read_families(source):
        if isinstance(found, Finding):
            yield found
            continue
        complaints = list(check_place(found, above))
        if len(found.rows) <= MAX_JUDGED_SAMPLES:
            complaints += check_family(found)
        for pos, message in sorted(complaints, key=lambda complaint: complaint[0]):
            yield to_finding(source.error_at(pos, message), strict=True)
        heading = found.heading()
        for name in (found.name, *found.names):
            above.setdefault(name, heading)


def find_refusal(body: bytes, content_type: str) -> Iterator[Finding]:
    """Yield why Prometheus refuses the body, if it does."""
    try:
        verify_exposition(body, content_type)
    except ExpositionError as error:
        yield to_finding(error)


def find_all(body: bytes, content_type: str) -> Iterator[Finding]:
    """Yield the findings, some of them twice. A refusal by Prometheus comes first."""
    yield from find_refusal(body, content_type)
    dialect = choose_dialect(content_type)
    if dialect is None or body.startswith(b"\x1f\x8b"):  # what follows a fault cannot be read
        return
    source = Source(body, dialect)
    if dialect.openmetrics and not body:
        error = source.expected(0, '"# EOF"')
        yield to_finding(error, strict=True)
    yield from judge_families(source)


def findings(body: bytes, content_type: str) -> list[Finding]:
    """Return up to 100 findings in the order of the body, also the one for which it is refused.

    Differences from the Go library expfmt: blanks at the end of a line pass, as the text format
    says. Differences from prometheus_client's parser, which has bugs there: quoted names without
    metadata pass, escaped quotes and braces in exemplars, and integer after float timestamps. A
    label without a value is no label, so a series that has one may be there already. A series that
    is there twice without a timestamp of its own is refused. Names that the formats reserve (`__x`)
    pass: Prometheus ingests them, and exporters have them. Of a family of more than 100,000 samples
    only the lines are judged, since the rest would take too much memory.
    """
    found: dict[Finding, None] = {}
    for finding in find_all(body, content_type):
        found[finding] = None
        if len(found) == MAX_FINDINGS:
            break
    return sorted(found, key=lambda finding: (finding.line, finding.column))


# ==================================================================================================
# 5  Command line
# ==================================================================================================


def parse_arguments(arguments: Sequence[str] | None) -> argparse.Namespace:
    """Return the options and files of a command line. Bad ones end the program with 2."""
    parser = argparse.ArgumentParser(
        prog="expolint.py",
        description="List what is wrong with Prometheus expositions.",
        allow_abbrev=False,
    )
    parser.add_argument("--strict", action="store_true", help="exit with 1 for any finding")
    parser.add_argument(
        "--content-type", default="", metavar="TYPE", help="by default the last line decides"
    )
    parser.add_argument("files", nargs="+", metavar="FILE", help="an exposition; - is stdin")
    return parser.parse_args(arguments)


def render_finding(name: str, line: bytes, finding: Finding) -> str:
    """Return `file:line:column: message` and the place, for protobuf `file: byte N: message`."""
    message = finding.message
    column = finding.column
    if finding.strict:
        message = f"strict: {message}"
    if not finding.line:
        return f"{name}: byte {column}: {message}\n"
    return f"{name}:{finding.line}:{column}: {message}\n{point_at(line, column)}"


def is_refused(found: list[Finding]) -> bool:
    """Return whether Prometheus refuses a body with these findings."""
    return not all(finding.strict for finding in found)


def render_findings(name: str, body: bytes, found: list[Finding]) -> str:
    """Return the findings of a file as text. The last line counts them, and has the verdict."""
    lines = dict.fromkeys((finding.line for finding in found), b"")
    for number, line in enumerate(io.BytesIO(body), 1):
        if number in lines:
            lines[number] = line.rstrip(b"\n")
    shown = [render_finding(name, lines[finding.line], finding) for finding in found]
    more = " or more" if len(found) == MAX_FINDINGS else ""
    verdict = "accepted"
    if is_refused(found):
        verdict = "refused"
    shown.append(f"{name}: findings: {len(found)}{more}, {verdict} by Prometheus\n")
    return "".join(shown)


def lint_file(name: str, arguments: argparse.Namespace) -> int:
    """Print the findings in a file. Return the exit code for it, 2 if it cannot be read. IO."""
    shown = "<stdin>" if name == "-" else excerpt(name, 200)
    failure = f"{shown}: cannot be read"
    try:
        body = read_input(name, Limits())
        content_type = arguments.content_type or text_scrape(body).headers[0][1]
        found = findings(body, content_type)
        text = render_findings(shown, body, found)
        failure = "<stdout>: cannot be written"
        with open(1, "wb", closefd=False) as stdout:
            stdout.write(text.encode("utf-8", "replace"))
    except (OSError, ScrapeError) as error:
        tell(f"{failure}: {words_of(error)}\n")
        return 2
    return int(is_refused(found) or (arguments.strict and bool(found)))


def main(argv: Sequence[str] | None = None) -> int:
    """Lint the files of these arguments, or of the command line's. Return the exit code."""
    arguments = parse_arguments(argv)
    return max(lint_file(name, arguments) for name in arguments.files)


if __name__ == "__main__":
    sys.exit(main())
