"""Checks of a scaler's parameters and of its saved state, entry by entry."""

from __future__ import annotations

from typing import Any


def integral(value: Any) -> Any:
    """Return a float without a fraction as the int that it is; torch takes such intervals."""
    return int(value) if isinstance(value, float) and value.is_integer() else value


def check_kinds(values: dict[str, Any], kinds: tuple[type, ...], expected: str) -> None:
    """Raise unless every value is of one of the kinds; True and False are no numbers."""
    for name, value in values.items():
        if not isinstance(value, kinds) or isinstance(value, bool):
            raise TypeError(f"{name} is {value!r}, expected {expected}")


def check_number(key: str, value: Any, kind: type, low: float, high: float) -> None:
    """Raise unless the entry is a number of that kind within the range."""
    kinds = (int,) if kind is int else (int, float)
    if not isinstance(value, kinds) or isinstance(value, bool) or not low <= value <= high:  # NaN fails the last
        name = "an integer" if kind is int else "a number"
        raise ValueError(f"GradScaler.load_state_dict: {key!r} is {value!r}, expected {name} from {low:g} to {high:g}")


def check_keys(
    where: str, mapping: Any, required: tuple[str, ...], optional: tuple[str, ...] = (), *, owner: str = "GradScaler"
) -> None:
    """Raise unless the mapping has all required keys and no others but the optional ones."""
    if not isinstance(mapping, dict):
        raise TypeError(f"{owner}.load_state_dict: state_dict{where} is {type(mapping).__name__}, expected a dict")
    missing = [key for key in required if key not in mapping]
    foreign = [key for key in mapping if key not in required and key not in optional]
    if missing or foreign:
        raise ValueError(
            f"{owner}.load_state_dict: state_dict{where} has "
            + " and ".join(f"{what} keys {keys}" for what, keys in (("missing", missing), ("unknown", foreign)) if keys)
            + f"; expected {', '.join(required + optional)}"
        )
