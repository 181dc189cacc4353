"""The process that compiling and measuring processes are forked from. It has torch, triton and the templates loaded and never
touches a GPU, so a new process is ready in a moment and may use one."""

import multiprocessing
from multiprocessing import forkserver
from multiprocessing.context import ForkServerContext

from ..kernels.registry import NAMES


def start() -> None:
    """Start it, to load in the background; nothing if it runs. Its environment is that of this moment."""
    context().set_forkserver_preload(["torch", "triton", *(f"patune.kernels.{name}" for name in NAMES)])
    forkserver.ensure_running()


def context() -> ForkServerContext:
    return multiprocessing.get_context("forkserver")
