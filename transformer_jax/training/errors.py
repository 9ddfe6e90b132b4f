"""How a training run can end early."""

import signal


class Interrupted(Exception):
    """Training was stopped by a signal, after saving."""

    def __init__(self, signum: int, step: int):
        super().__init__(f"{signal.Signals(signum).name}: saved step {step}")
        self.signum = signum
        self.step = step


class NotFiniteError(RuntimeError):
    """Too many updates in a row had a gradient that is not finite."""
