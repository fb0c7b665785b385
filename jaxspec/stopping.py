"""Long work that ends cleanly when it is asked to: what Ctrl-C and SIGTERM mean for training and distillation."""

import signal
from types import FrameType


class Stopped(Exception):
    """The work was asked to stop (Ctrl-C, SIGTERM); what it had finished is saved. The message says how to go on."""


class Broken(Exception):
    """The work cannot go on, through no fault of what it was given; the message says why."""


class CatchSignals:
    """Remembers SIGINT and SIGTERM; a second one interrupts at once."""

    def __enter__(self) -> "CatchSignals":
        self.received = False
        self.previous = {number: signal.signal(number, self.receive) for number in (signal.SIGINT, signal.SIGTERM)}
        return self

    def receive(self, number: int, frame: FrameType | None) -> None:
        if self.received:
            raise KeyboardInterrupt
        self.received = True

    def __exit__(self, *exc: object) -> None:
        for number, handler in self.previous.items():
            signal.signal(number, handler)
