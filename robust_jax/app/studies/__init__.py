"""Studies: arms × seeds of runs, verdicts on claims, and the page."""
