"""The process that compiling and measuring processes are forked from. It has torch, triton and the templates loaded and never
touches a GPU, so a new process is ready in a moment and may use one."""

import multiprocessing
import signal
from multiprocessing import forkserver, resource_tracker
from multiprocessing.context import ForkServerContext

from ..kernels.registry import NAMES


def start() -> None:
    """Start it, to load in the background; nothing if it runs. Its environment is that of this moment."""
    context().set_forkserver_preload(["torch", "triton", *(f"patune.kernels.{name}" for name in NAMES)])
    resource_tracker.ensure_running()  # which the server's start would do, and unblock SIGINT again
    before = signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGINT])  # it inherits that: Ctrl-C is this process's to handle
    try:
        forkserver.ensure_running()
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def context() -> ForkServerContext:
    return multiprocessing.get_context("forkserver")
