"""Checks the annotated shapes and dtypes of every call to some modules, in tests alone."""

from beartype import BeartypeConf, beartype
from jaxtyping import install_import_hook

CHECKED = (
    "jaxinfer.cache.attention", "jaxinfer.cache.quantized", "jaxinfer.cache.store",
    "jaxinfer.decode.prompt_logprobs",
    "jaxinfer.decode.sampling", "jaxinfer.model.model",
)  # fmt: skip
_beartype = beartype(conf=BeartypeConf(is_pep484_tower=True))  # an int is a float, as type checkers have it


def checked(function):
    """Beartype, save for constructors: JAX builds a pytree anew around whatever it maps over one, also what is no
    array."""
    return function if function.__name__ == "__init__" else _beartype(function)


def install() -> None:
    """To be called before any of the modules is imported."""
    install_import_hook(CHECKED, "tests.shape_checks.checked")
