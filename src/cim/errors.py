"""The one exception that a user should see, and how commands report it."""

import sys
from collections.abc import Iterator
from contextlib import contextmanager


class CimError(Exception):
    """A problem that the user can fix; the message names the file or parameter and how to fix it.

    Commands print it as one line and exit with status 2.
    """


@contextmanager
def one_line_errors() -> Iterator[None]:
    """Print a CimError as one line and exit with status 2."""
    try:
        yield
    except CimError as error:
        print(f"error: {error}", file=sys.stderr, flush=True)
        sys.exit(2)
