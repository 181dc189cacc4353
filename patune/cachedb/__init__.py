"""The tuning database: what was measured, the best config of every workload, and how a call finds its config."""
