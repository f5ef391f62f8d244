"""The HTML pages: of a run, of several side by side, and what they share."""
