"""The one exception for a user's mistake: a single line that says what is wrong, where, and what to do."""


class UserError(Exception):
    """Raised for anything the user can mend; the command line prints it on one line and exits with code 2."""
