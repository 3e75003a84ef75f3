"""How long urgent newcomers wait among equals: python bench/scheduler_waits.py [--equals N ...] [--share S].

N tasks of equal urgency wait, and with them, one after another, newcomers: each comes when the one before is served,
with the urgency that gives it the share S of what waits then. That goes on until the equals are served, which by their
shares takes N / (1 - S) turns, or for three times as long. Waits are in turns; a newcomer's by its share alone would be
1/S, so 3/S is the bound.
"""

from __future__ import annotations

import argparse
import math

import numpy as np
from tqdm import tqdm

import foveal
from weighted_completion import Simulated

POLICIES = ("credit", "sample", "strict")


def waits(policy: str, equals: int, share: float) -> tuple[list[int], list[int]]:
    """How many turns each newcomer and each equal waited; of a newcomer that still waits at the end, until then."""
    scheduler = foveal.Scheduler(Simulated(), max_in_flight=1, policy=policy, seed=0)
    turn, came, left = 0, -1, equals  # came: when the newcomer that waits did; -1: none waits
    last = 3 * equals / (1 - share)  # "strict" would serve newcomers alone for ever
    of_newcomers: list[int] = []
    of_equals: list[int] = []

    def newcomer_comes() -> None:
        nonlocal came
        came = -1
        if left and turn < last:
            came = turn
            scheduler.submit(newcomer, urgency=math.log(left * share / (1 - share)))

    def newcomer() -> None:
        nonlocal turn
        turn += 1
        of_newcomers.append(turn - came)
        newcomer_comes()

    def equal() -> None:
        nonlocal turn, left
        turn += 1
        left -= 1
        of_equals.append(turn)
        if turn == 1:
            newcomer_comes()
        elif not left and came >= 0:
            of_newcomers.append(turn - came)

    for _ in range(equals):
        scheduler.submit(equal)
    scheduler.run()
    assert len(of_equals) == equals
    return of_newcomers, of_equals


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--equals", type=int, nargs="*", default=[10, 100, 1_000, 10_000, 100_000])
    parser.add_argument("--share", type=float, default=0.5)
    parser.add_argument("--policies", nargs="*", default=POLICIES)
    options = parser.parse_args()
    share = options.share
    print("| policy | equals | newcomers: mean and worst wait | the last equal, in N / (1 - S) turns |")
    print("|---|---|---|---|")
    for policy in tqdm(options.policies, leave=False):
        for equals in options.equals:
            newcomers, last = waits(policy, equals, share)
            print(
                f'| "{policy}" | {equals:,} | {np.mean(newcomers):,.1f}, {max(newcomers):,} '
                f"| {max(last) * (1 - share) / equals:.2f} |",
                flush=True,
            )


if __name__ == "__main__":
    main()
