"""A recorded landscape in the place of a GPU: the same search and the same decisions, on times measured before."""

from collections.abc import Mapping, Sequence
from typing import Literal

from ..cachedb.landscape import Landscape
from ..cachedb.trial import Trial
from ..errors import PatuneError
from ..kernels.template import Values
from ..workload import Key, Workload
from .phases import Phases
from .runner import ROUNDS, Race
from .space import Point, point_of


class ReplayRunner:
    """Answers with recorded trials and never makes one up."""

    mode: Literal["measured", "replay"] = "replay"

    def __init__(self, landscape: Landscape):
        self.landscape = landscape
        self.environment = landscape.environment
        self.phases = Phases()

    def prepare(self, key: Key, workload: Workload, points: Sequence[Values]) -> None:
        """Nothing to compile."""

    def measure(self, key: Key, workload: Workload, points: Sequence[Values], reference: Values, rounds: int = ROUNDS) -> Race:
        recorded = self._recorded(key, workload)
        trials = [self._trial(recorded, key, workload, config) for config in points]
        return Race(trials, self._trial(recorded, key, workload, reference))

    def optimum_us(self, key: Key, workload: Workload) -> float | None:
        self._recorded(key, workload)
        return self.landscape.optimum(key, workload).us

    def close(self) -> None:
        """Nothing to close."""

    def _recorded(self, key: Key, workload: Workload) -> Mapping[Point, Trial]:
        try:
            return self.landscape.trials(key, workload)
        except KeyError:
            raise PatuneError(
                f"the landscape of {self.environment.gpu} has no {key.kernel} {workload} with head_dim={key.head_dim}, "
                f"page_size={key.page_size}, q_heads_per_kv={key.q_heads_per_kv}: measure it on the GPU, or choose what it has"
            ) from None

    def _trial(self, recorded: Mapping[Point, Trial], key: Key, workload: Workload, config: Values) -> Trial:
        tunables = self.landscape.tunables(key)
        if config.keys() != tunables.keys() or (point := point_of(config, tunables)) not in recorded:
            raise PatuneError(
                f"the landscape of {self.environment.gpu} has no trial of {key.kernel} {workload} with "
                + " ".join(f"{name}={value}" for name, value in config.items())
            )
        return recorded[point]
