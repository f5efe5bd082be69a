"""The one exception that is meant for users."""


class UserError(ValueError):
    """Something the user can mend: the message names the thing, the value, the rule and the remedy.

    The command line prints it as one line and exits with status 2; everything else is a bug and keeps its traceback.
    """
