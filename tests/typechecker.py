"""The type checker of jaxtyping's hook while the tests run: see pyproject.toml."""

from beartype import BeartypeConf, beartype

checked = beartype(conf=BeartypeConf(is_pep484_tower=True))
