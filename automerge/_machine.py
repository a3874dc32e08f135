"""What the machine has."""

from __future__ import annotations

import os


def physical_memory() -> int | None:
    """The bytes of memory of the machine; None where the system does not say."""
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (AttributeError, OSError, ValueError):
        return None
