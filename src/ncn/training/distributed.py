"""Which part of a step's batch a process computes.

Every random draw, of windows, of sliders and of what is left out of them, is made for the batch of the whole step and
then cut by rank. So the draws do not depend on the number of processes, and every divisor counts the whole step.
"""

from __future__ import annotations

from dataclasses import dataclass

from ncn.errors import UserError


@dataclass(frozen=True)
class Processes:
    """This process's `rank` among `count` processes that train together."""

    rank: int = 0
    count: int = 1

    def rows(self, batch_size: int) -> slice:
        """This process's rows of a step's batch; raises `UserError` where they cannot be shared equally."""
        if batch_size % self.count:
            raise UserError(
                f"a batch of {batch_size} cannot be shared equally by {self.count} processes; "
                f"set batch_size to a multiple of {self.count}"
            )
        size = batch_size // self.count
        return slice(self.rank * size, (self.rank + 1) * size)
