"""`python -m patune` is `patune`."""

from .cli.main import main

if __name__ == "__main__":  # processes that the tuner starts import this file too
    main(prog_name="patune")
