"""In which order a run reads its groups or prompts: shuffled epochs that depend on the seed alone."""

from __future__ import annotations

import numpy as np


class EpochOrder:
    """The endless sequence of shuffled epochs over `num` items: place p holds item `order[p]`, so a resumed run needs
    no state but its place. With 3 items and no shuffling, places 0 to 4 hold 0, 1, 2, 0, 1."""

    def __init__(self, num: int, *, seed: int, shuffle: bool) -> None:
        self.num = num
        self.seed = seed
        self.shuffle = shuffle
        self._epoch = -1
        self._order: np.ndarray = np.arange(num)

    def __getitem__(self, place: int) -> int:
        epoch, offset = divmod(place, self.num)
        if self.shuffle and epoch != self._epoch:
            self._epoch, self._order = epoch, np.random.default_rng([self.seed, epoch]).permutation(self.num)
        return int(self._order[offset])

    def upcoming(self, place: int, count: int) -> list[int]:
        """The items at the next `count` places from `place` on, each once, ascending.

        >>> EpochOrder(5, seed=0, shuffle=False).upcoming(3, 3)
        [0, 3, 4]
        """
        # whatever the place, a whole epoch is among them
        if count >= 2 * self.num:
            return list(range(self.num))
        return sorted({self[place] for place in range(place, place + count)})
