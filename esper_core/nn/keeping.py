"""Keeping the weights that did best on held-back samples, and knowing when to give up: shared by all ways to teach a kernel."""

from __future__ import annotations

import copy

from torch import nn

CHECK_EVERY = 20
"""Steps between looks at the held-back samples."""
PATIENCE = 3
"""Looks without an improvement after which learning ends."""


class Best:
    """The best weights so far.

    Args:
        kernel: whose weights they are; those it has now count as the first.
        figure: what they are worth, higher is better.
    """

    def __init__(self, kernel: nn.Module, figure: float) -> None:
        self.kernel, self.figure = kernel, figure
        self._weights, self._waited = copy.deepcopy(kernel.state_dict()), 0

    def look(self, figure: float) -> bool:
        """Take in what the present weights are worth; whether learning on is worth while.

        A figure that is not a number is kept as well, and ends learning: whoever judges the kernel must see it.
        """
        self._waited += 1
        if not figure <= self.figure:
            self.figure, self._waited = figure, 0
            self._weights = copy.deepcopy(self.kernel.state_dict())
        return self._waited < PATIENCE and figure == figure

    def restore(self) -> float:
        """Give the kernel its best weights; what they are worth."""
        self.kernel.load_state_dict(self._weights)
        return self.figure
