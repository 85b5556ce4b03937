"""The type checker that jaxtyping's import hook puts around every function of minidiff and weights_loader in the tests."""

from beartype import BeartypeConf, beartype

# Python's own rule that an int is welcome where a float is expected, which beartype leaves out unless asked.
strict = beartype(conf=BeartypeConf(is_pep484_tower=True))
