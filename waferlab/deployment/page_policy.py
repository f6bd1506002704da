"""What a page may run: its own script and style, by their digests, and nothing that somebody has put into it."""

from __future__ import annotations

import base64
import hashlib
import re


def digest_of(page: str, tag: str) -> str:
    """Of what stands in the page's first `<tag>`, as a content security policy names it."""
    content = re.search(f"<{tag}>(.*?)</{tag}>", page, re.DOTALL)[1]
    return f"sha256-{base64.b64encode(hashlib.sha256(content.encode()).digest()).decode()}"
