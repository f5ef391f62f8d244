"""The one exception that means "the user can mend this": launch.py prints it in one line."""


class UserError(ValueError):
    """A mistake in a config, a file or a call; its message says what to do about it."""
