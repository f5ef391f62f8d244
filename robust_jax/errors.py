"""What this package raises for a mistake that its user can fix.

Everything here is a ValueError. launch.py prints a UserError in one line. A wrong argument to a
library function raises a plain ValueError.
"""


class UserError(ValueError):
    """A mistake in a config, a file or a flag; the one-line message says what to do about it."""

    def __init__(self, message: str):
        # What it quotes may span several lines, as a ConfigDict does.
        super().__init__(" ".join(part.strip() for part in message.splitlines()).strip())


class CannotWrite(UserError):
    """A file of the run could not be written: the disk is full or the folder is read-only."""


class UnusableState(ValueError):
    """A saved state of AutoAttack belongs to other inputs or another network, or is damaged."""


class NothingToAudit(ValueError):
    """None of the examples given to the audit is classified correctly."""
