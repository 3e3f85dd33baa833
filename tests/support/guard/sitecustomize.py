"""Imported by every Python that the tests start, as it starts."""

import write_guard

write_guard.install()
