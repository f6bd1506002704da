"""Addresses of stores, as they may be shown and written down."""

from __future__ import annotations

import re

PASSWORD = re.compile(r"(?<=://)([^:/@\s]*):[^@/\s]*(?=@)")  # after the name of the user


def without_password(address: str) -> str:
    """The address without the password that may be in it."""
    return PASSWORD.sub(r"\1", address)
