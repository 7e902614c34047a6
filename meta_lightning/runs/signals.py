"""Signals that end training between two meta-iterations, in all processes at the same one."""

import signal
import threading
from typing import Any

import lightning as L
import torch


class Signals:
    """SIGTERM and SIGINT of one training, from its start on.

    Each process says after every meta-iteration whether it has received one. Several processes read the answer one
    meta-iteration later: it has arrived by then, so that nobody waits for it.
    """

    def __init__(self, trainer: L.Trainer) -> None:
        self.received: int | None = None  # by this process
        self.stop = False  # agreed on by all processes
        # on the CPU: a decision through the devices would wait for them at every step
        several = trainer.world_size > 1 and torch.distributed.is_gloo_available()
        self.voters: Any = torch.distributed.new_group(backend="gloo") if several else None
        self.vote: tuple[Any, torch.Tensor] | None = None
        if threading.current_thread() is threading.main_thread():  # required by signal; Lightning restores the handlers
            for number in (signal.SIGTERM, signal.SIGINT):
                signal.signal(number, self.receive)

    def receive(self, number: int, frame: Any) -> None:
        """Note a signal; a second Ctrl-C interrupts at once."""
        self.received = number
        if number == signal.SIGINT:
            signal.signal(number, signal.default_int_handler)

    def ask(self, trainer: L.Trainer) -> bool:
        """Whether to stop, after a meta-iteration of all processes."""
        received = self.received is not None
        if self.voters is None:
            self.stop = trainer.strategy.reduce_boolean_decision(received, all=False)
            return self.stop
        self.stop = self.answer()
        count = torch.tensor(int(received))
        self.vote = torch.distributed.all_reduce(count, group=self.voters, async_op=True), count
        return self.stop

    def answer(self) -> bool:
        """The answer to the last question."""
        if self.vote is None:
            return False
        work, count = self.vote
        work.wait()
        return bool(count)

    def end(self) -> None:
        """End the votes."""
        if self.voters is not None:
            self.answer()
            torch.distributed.destroy_process_group(self.voters)

    @property
    def status(self) -> int:
        """Exit status of a training that a signal has ended."""
        return 128 + (self.received or signal.SIGTERM)
