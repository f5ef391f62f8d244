"""The one exception that means "the user can mend this": launch.py prints it in one line."""


class UserError(ValueError):
    """A mistake in a config, a file or a call; its message, one line, says what to do about it."""

    def __init__(self, message: str):
        # What it quotes may have lines of its own, as a ConfigDict does.
        super().__init__(" ".join(part.strip() for part in message.splitlines()).strip())


class CannotWrite(UserError):
    """A file of the run could not be written: the disk is full, or nobody may write there."""
