"""Checks of options that several update rules share."""


def check_beta(beta: float, name: str = "beta") -> None:
    """Refuse a weight of the old memory that is not in [0, 1).

    Raises:
        ValueError: what was expected.
    """
    if not 0 <= beta < 1:
        raise ValueError(f"expected {name} in [0, 1), got {beta}; it weighs the old memory, 0.9 is the default")


def check_choice(name: str, value: object, choices: tuple[str, ...]) -> None:
    """Refuse a name that is none of the choices.

    Raises:
        ValueError: the choices.
    """
    if value not in choices:
        raise ValueError(f"expected {name} to be one of {', '.join(choices)}, got {value!r}")
