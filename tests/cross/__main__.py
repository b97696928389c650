"""Every family on every mesh, with every way to decode, against one device; on eight virtual devices of a CPU.

    python -m tests.cross                                 # all of it, which takes two hours on one core
    python -m tests.cross --minutes 30                    # as much as begins in that time, what tells most first
    python -m tests.cross --families mixtral --checks logits plain

A check is `logits`, in float32 to 1e-5, or greedy text through the engine, token for token, by a method. What has run
is kept in benchmarks/results/cpu/cross.json beside what ran before, family by family and check by check: on how many
meshes they agree, which are refused and why, which fail.
"""

from __future__ import annotations

import tempfile
import time
from argparse import Namespace
from collections.abc import Callable
from itertools import product
from pathlib import Path

from tests import conftest  # noqa: F401, first: it makes the eight devices

# isort: split
import jax

from benchmarks.record import Failure, Record, arguments_of, environment, update
from tests.cross.checks import RefusedError, difference, same_texts, small_steps
from tests.cross.setups import COVERING, FAMILIES, METHODS, Sizes, meshes

FIRST = ("logits", "plain")
CHECKS = ("logits", *METHODS)


def main() -> None:
    asked, made_in = parsed(), environment()
    jax.config.update("jax_default_matmul_precision", "highest")
    began = time.monotonic()
    with tempfile.TemporaryDirectory() as root, small_steps():
        for check, family in ordered(asked.checks, asked.families):
            if time.monotonic() - began > 60 * asked.minutes:
                print(f"{family} {check}: not begun within {asked.minutes} minutes", flush=True)
                continue
            records, failures = cross(Path(root), family, check, list(meshes()))
            update("cross", made_in, records, failures, asked.output)
            for told in (*records, *failures):
                print(told, flush=True)
            jax.clear_caches()


def ordered(checks: list[str], families: list[str]) -> list[tuple[str, str]]:
    """What tells most comes first: logits and plain text of all families, then methods of the covering ones."""
    return sorted(product(checks, families), key=lambda pair: (pair[0] not in FIRST) * (1 + (pair[1] not in COVERING)))


def cross(root: Path, family: str, check: str, tried: list[Sizes]) -> tuple[list[Record], list[Failure]]:
    """One check of one family on some meshes."""
    agreed: list[float] = []
    others: dict[str, list[Sizes]] = {}
    for sizes in tried:
        try:
            agreed.append(one(check)(root, family, sizes))
        except RefusedError as error:
            others.setdefault(f"refused: {error}", []).append(sizes)
        except Exception as error:  # whatever it is, the others are still to be tried
            others.setdefault(f"failed: {type(error).__name__}: {error}", []).append(sizes)
    case = check if check == "logits" else f"text by {check}"
    record = Record(case, family, "meshes that agree", len(agreed), "meshes", samples=len(tried))
    worst = [Record(case, family, "largest difference", max(agreed), "")] if check == "logits" and agreed else []
    told = [f"{', '.join(map(str, where))}: {reason}" for reason, where in others.items()]
    return [record, *worst], [Failure(case, family, reason) for reason in told]


def one(check: str) -> Callable[[Path, str, Sizes], float]:
    if check == "logits":
        return difference
    return lambda root, family, sizes: same_texts(root, family, sizes, check)


def parsed() -> Namespace:
    parser = arguments_of("tests.cross", __doc__)
    parser.add_argument("--families", nargs="+", choices=FAMILIES, default=list(FAMILIES))
    parser.add_argument("--checks", nargs="+", choices=CHECKS, default=list(CHECKS))
    parser.add_argument("--minutes", type=float, default=float("inf"), help="after which no other check begins")
    parser.add_argument("--output", type=Path, help="folder of results; by default that of this machine's device")
    return parser.parse_args()


if __name__ == "__main__":
    main()
