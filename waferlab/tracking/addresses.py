"""Addresses of stores, as they may be shown and written down."""

from __future__ import annotations

import re

# After the name of the user, and, as SQLAlchemy reads it, up to the next @; or named behind the question mark.
PASSWORD = re.compile(r"(?<=://)([^:/@\s]*):[^@\s]*(?=@)|([?&](?:ssl)?passw(?:or)?d=)[^&#\s'\")]*")


def without_password(text: str) -> str:
    """A text, such as an address or an error that names one, without the passwords of addresses that may be in it."""
    return PASSWORD.sub(lambda found: found[1] or found[2] or "", text)
