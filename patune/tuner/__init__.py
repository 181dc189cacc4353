"""The tuner: search space, compile ahead, measure, accept; or the same search against a recorded landscape."""
