"""A clock and a stepper that several tests of the scheduler share."""

from foveal import Step


class Clock:
    """Goes on by a second each time it is read."""

    def __init__(self):
        self.now = 0.0

    def __call__(self):
        self.now += 1.0
        return self.now


def endless(budget):
    return Step(False)
