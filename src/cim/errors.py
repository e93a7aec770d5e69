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
    """Print what stops a command as one line, and exit: status 130 if interrupted; status 2 for a CimError, a file that
    cannot be read or written, and text in another encoding.
    """
    try:
        yield
        return
    except KeyboardInterrupt:
        problem, status = "interrupted; rerun the same command to resume", 130
    except UnicodeDecodeError as error:
        problem, status = f"a file is not {error.encoding} ({error.reason} at byte {error.start}); save it as UTF-8", 2
    except OSError as error:
        where = f"{error.filename}: " if error.filename else ""
        problem, status = f"{where}{error.strerror or error}; fix this and rerun the same command", 2
    except CimError as error:
        problem, status = str(error), 2
    print("error:", " ".join(problem.split()), file=sys.stderr, flush=True)
    sys.exit(status)
