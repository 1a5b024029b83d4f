"""Settings: the numbers of its own that every direction of the fused kernels takes."""

from __future__ import annotations

from collections.abc import Mapping

__all__ = ["NAMES", "SETTINGS", "check_settings"]

SETTINGS = {
    "sgd": ("momentum", "dampening", "nesterov"),
    "adam": ("beta1", "beta2", "eps"),
    "adamw": ("beta1", "beta2", "eps"),
    "lion": ("beta1", "beta2"),
}
"""Direction -> names of its settings.  All are needed and no others are taken: none has a default."""


NAMES = {direction: frozenset(names) for direction, names in SETTINGS.items()}
"""The same as sets."""


def check_settings(backend: str, direction: str, given: Mapping[str, object]) -> None:
    """Raise unless exactly the settings of ``direction`` are given, or a kernel would run with numbers of its own.

    >>> check_settings("native", "lion", {"beta1": 0.9, "beta2": 0.99})
    >>> check_settings("native", "lion", {"beta1": 0.9, "momentum": 0.9})
    Traceback (most recent call last):
    ...
    TypeError: native: the direction 'lion' takes the settings beta1, beta2, not momentum, and beta2 is missing; ...
    """
    known = SETTINGS[direction]
    if given.keys() == set(known):
        return
    wrong = ""
    if unknown := [name for name in given if name not in known]:
        wrong += f", not {', '.join(unknown)}"
    if missing := [name for name in known if name not in given]:
        wrong += f", and {', '.join(missing)} {'is' if len(missing) == 1 else 'are'} missing"
    raise TypeError(
        f"{backend}: the direction {direction!r} takes the settings {', '.join(known)}{wrong}; let Direction.settings "
        "return exactly these, or leave Direction.row as it is, so that the reference steps it"
    )
