"""Addresses of stores, and command lines that hold some, as they may be shown and written down.

Imports the standard library alone: a program that is interrupted as it still imports says from here how to go on.
"""

from __future__ import annotations

import re
import shlex
import sys
from pathlib import Path

# After the name of the user, up to the last @, as requests reads it; or named behind the question mark.
PASSWORD = re.compile(
    r"(?<=://)([^:/@\s]*):\S*(?=@)|([?&](?:(?:ssl)?passw(?:or)?d|odbc_connect)=)[^&#\s'\")]*", re.IGNORECASE
)
WITH_SPACES = re.compile(r"^([^:/?#]+://[^:/@]*):.*(?=@)", re.DOTALL)  # of what is an address and nothing else


def address_without_password(address: str) -> str:
    """An address, whose password may even hold spaces, without it."""
    return without_password(WITH_SPACES.sub(r"\1", address))


def without_password(text: str) -> str:
    """A text, such as an address or an error that names one, without the passwords of addresses that may be in it."""
    return PASSWORD.sub(lambda found: found[1] or found[2] or "", text)


def command_line_used(*, folder: bool = False) -> str:
    """How this program was started, without passwords of addresses, and without the `folder` it lies in or with it."""
    program = sys.argv[0] if folder else Path(sys.argv[0]).name
    return shlex.join(["python", program, *map(address_without_password, sys.argv[1:])])
