"""`patune` in a replay whose races take real time, and whose heart beats fast. Run as a program, by tests.

Arguments: seconds a race, grace in seconds, then those of `patune`.
"""

import sys
import time

from patune.cli.main import main
from patune.tuner import shared, storage
from patune.tuner.replay import ReplayRunner

if __name__ == "__main__":
    race_s, grace_s = float(sys.argv[1]), int(sys.argv[2])
    storage.HEARTBEAT_S, storage.GRACE_S, shared.POLL_S = 1, grace_s, 0.2
    answer = ReplayRunner.measure

    def measure(*args, **kwargs):
        time.sleep(race_s)
        return answer(*args, **kwargs)

    ReplayRunner.measure = measure
    main(sys.argv[3:], prog_name="patune")
