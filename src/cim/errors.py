"""The one exception a user is meant to read."""


class CimError(Exception):
    """A problem that the user can mend; its message names the file or parameter and the mend.

    The command line prints it as one line and exits with status 2.
    """
