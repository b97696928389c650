"""Quantities as people read them."""

_PREFIXES = ("P", "T", "G", "M", "k", "", "m", "µ", "n")
_LARGEST = 15  # power of ten of the first prefix


def si(value: float, unit: str) -> str:
    """Three digits with a decimal prefix: si(4.54e12, "B/s") is "4.54 TB/s"."""
    for place, prefix in enumerate(_PREFIXES):
        scale = 10.0 ** (_LARGEST - 3 * place)
        if abs(value) >= 0.9995 * scale:
            return f"{_three_digits(value / scale)} {prefix}{unit}"
    return f"{value:.3g} {unit}"


def _three_digits(value: float) -> str:
    decimals = 2 if abs(value) < 9.995 else 1 if abs(value) < 99.95 else 0
    return f"{value:,.{decimals}f}"
