"""The one exception that a person is meant to read."""


class UserError(Exception):
    """A problem its reader can mend: one line with what was expected, found, where, and what to do.

    Command lines print the message alone and exit with status 2; anything else is our bug and keeps
    its traceback.
    """
