#!/usr/bin/env python3
"""Print the manual page of a command of expexp, made of its docstring and its table of flags.

    python3 contrib/manual.py FOLDER MODULE COMMAND VERSION [FILE...]

MODULE is expexp, expolint or fleet_sd, and is in FOLDER. COMMAND is its name where it is installed.
The files are listed under FILES. SOURCE_DATE_EPOCH has the date in seconds since 1970.

It needs Python 3.9 or later. The page is for man and mandoc, in the macros of man(7).
License: Apache License, Version 2.0.
"""

from __future__ import annotations

import contextlib
import datetime
import importlib
import io
import os
import re
import sys
import textwrap
from collections.abc import Iterator, Sequence
from types import ModuleType
from typing import Any

WIDTH = 70  # escapes make a line longer, and mandoc wants 80 at most
#: Paragraphs of a docstring that begin so are for readers of the source.
FOR_READERS = ('"IO." marks', "Contents:", "    from ", "License", "Specifi")
LABEL = re.compile(r"(?m)^(?=[A-Z][a-z ]*[a-z]: )")
ESCAPES = {"\\": r"\e", "-": r"\-", "'": r"\(aq", "`": r"\(ga", "^": r"\(ha", "~": r"\(ti"}


def escape(text: str) -> str:
    """Return a line that man shows as it is."""
    escaped = "".join(ESCAPES.get(character, character) for character in text)
    return rf"\&{escaped}" if escaped.startswith(".") else escaped


def render_text(text: str) -> list[str]:
    """Return the lines of a paragraph. A sentence begins a line."""
    sentences = re.split(r"(?<=[.:]) (?=[A-Z])", " ".join(text.split()))
    wrapped = [textwrap.wrap(one, WIDTH, break_on_hyphens=False) for one in sentences]
    return [escape(line) for lines in wrapped for line in lines]


def render_verbatim(text: str) -> list[str]:
    """Return the lines of a block of commands or a table."""
    lines = textwrap.dedent(text).strip("\n").splitlines()
    return [".RS 4", ".nf", *map(escape, lines), ".fi", ".RE"]


def paragraphs_of(module: ModuleType, command: str) -> Iterator[str]:
    """Yield the paragraphs of a docstring that are for users, with the name of the command."""
    text = re.sub(rf"python3 \S*{module.__name__}\.py", command, module.__doc__ or "")
    for block in re.split(r"\n\n+", text):
        for paragraph in LABEL.split(block):
            if paragraph.strip() and not paragraph.startswith(FOR_READERS):
                yield paragraph


def render_flag(flag: Any, name: str, default: str) -> list[str]:
    """Return the entry of a flag. One that is "false" by default takes no value."""
    shown = rf".TP{os.linesep}\fB{escape(f'-{name}')}\fR"
    if default == "false":
        return [shown, *render_text(flag.documentation)]
    shown += r" \fIvalue\fR"
    ending = f" The default is {default}." if default else ""
    return [shown, *render_text(flag.documentation + ending)]


def render_options(module: ModuleType, command: str) -> list[str]:
    """Return the entries of all flags. A program with argparse has its own list."""
    flags = getattr(module, "FLAGS", ())
    entries: list[list[str]] = []
    if isinstance(flags, dict):
        entries = [render_flag(flag, name, flag.default or "") for name, flag in flags.items()]
    elif flags:
        entries = [render_flag(flag, flag.name, flag.default) for flag in flags]
    else:
        with contextlib.redirect_stdout(io.StringIO()) as said, contextlib.suppress(SystemExit):
            module.main(["--help"])
        entries = [render_verbatim(said.getvalue().replace(f"{module.__name__}.py", command))]
    return [line for entry in entries for line in entry]


def render_manual(module: ModuleType, command: str, version: str, files: Sequence[str]) -> str:
    """Return the page."""
    day = datetime.datetime.fromtimestamp(
        int(os.environ.get("SOURCE_DATE_EPOCH", "0")), datetime.timezone.utc
    )
    first, *paragraphs = paragraphs_of(module, command)
    purpose = first.strip().rstrip(".").partition(", ")[0]
    purpose = purpose.partition(f"{module.__name__} ")[2] or purpose
    lines = [f'.TH {command.upper()} 1 {day:%Y-%m-%d} "expexp {version}"', ".SH NAME"]
    lines += [rf"{escape(command)} \- {escape(purpose[:1].lower() + purpose[1:])}"]
    lines += [".SH SYNOPSIS", rf".B {escape(command)}", r"[\fIoption\fR ...]", ".SH DESCRIPTION"]
    status: list[str] = []
    for paragraph in paragraphs:
        if paragraph.startswith("Exit codes: "):
            status = render_text(paragraph.partition(": ")[2])
        elif paragraph.startswith("    "):
            lines += render_verbatim(paragraph)
        else:
            lines += [".PP", *render_text(paragraph)]
    lines += [".SH OPTIONS", *render_options(module, command), ".SH EXIT STATUS", *status]
    if files:
        lines += [".SH FILES", *[rf".TP{os.linesep}.I {escape(name)}" for name in files]]
    lines += [".SH SEE ALSO", "/usr/share/doc/expexp\\-py"]
    return "\n".join(lines) + "\n"


def main(arguments: Sequence[str]) -> None:
    """Print the page that these arguments name."""
    folder, name, command, version, *files = arguments
    sys.path.insert(0, folder)
    page = render_manual(importlib.import_module(name), command, version, files)
    sys.stdout.write(page)


if __name__ == "__main__":
    main(sys.argv[1:])
