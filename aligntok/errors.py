class UserError(ValueError):
    """A mistake in what the user gave us: the message says what, where and the remedy, in a line or two.

    The command line prints the message without a traceback and exits with code 2.
    """
