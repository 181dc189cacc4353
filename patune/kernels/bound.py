"""Bound calls: the host pays for a repeated eager call's key, its pointers and its launches, and for little else.

The checks of a call, its config, its grids and the compiled kernels that serve it follow from its key: shapes, strides, dtypes, the
alignment of pointers, the host's arguments and the table. The first call of a key takes the ordinary way, through every check,
the operator and Triton's JIT, and leaves a Bound behind; the next ones only hand their pointers to its launches. A call that
something could observe, or that is not plain eager work on the current device, has no key and always takes the ordinary way.

What is bound relies on a rule that every template keeps: launches follow from the key, up to pointers, and building them does
nothing on the device but allocate scratch, whose contents no launch relies on, and take views.
"""

import copy
import functools
import inspect
import itertools
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from operator import itemgetter
from types import CodeType, SimpleNamespace
from typing import Any, NamedTuple

import torch
import triton
from torch._C import _is_tracing, _len_torch_dispatch_stack, _len_torch_function_stack
from torch._C._autograd import _profiler_enabled
from torch._C._dynamo.guards import TensorGuards
from torch._C._functorch import peek_interpreter_stack
from triton.compiler import CompiledKernel
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor
from triton.runtime import driver

from ..cachedb import lookup
from .checks import INTERPRETED, values_are_checked
from .config import Config
from .sizes import ceil_div
from .template import Launch

MAX_BOUND = 256  # keys; the length of kv_indices, and so the key, changes as a server's sequences grow, the config seldom
MAX_MAPS = 256  # tensor maps kept of an argument: a model has a pool a layer
LONG_RUN = 12  # constants in a row that are quicker to pass as one tuple: 0.25 us of the 2 that two launches' arguments take
SCRATCH_ALIGNMENT = 128  # bytes: a cache line, and a multiple of the 16 that Triton specialises pointers on
PLAIN_TENSORS = {torch.Tensor, torch.nn.Parameter}  # another class may give an operator another meaning
IMMUTABLE = (type(None), bool, int, float, str, Config)

_bound: dict[tuple, "Bound | None"] = {}  # None: cannot be bound
_of_config: dict[tuple, "Bound | None"] = {}  # the same, by keys without the length of kv_indices but with the config


class _Waiting(threading.local):
    key: tuple | None = None  # what to bind the next call to that an operator makes


_waiting = _Waiting()


class Call(NamedTuple):
    """A call with its config: `build(*tensors)` gives its launches, and likewise those of other tensors with the same key."""

    build: Callable[..., list[Launch]]
    tensors: tuple[torch.Tensor | None, ...]
    advice: int | None = None  # index of a tensor whose length decides the config and nothing else
    config: tuple[tuple[str, Any], ...] = ()  # the template and its tunables, hashable
    bindable: bool = True  # whether `build` does nothing on the device but allocate


class Bound(NamedTuple):
    """The launches of a key."""

    device: int
    scratch: torch.Tensor  # of no bytes: its device and type
    scratch_bytes: int
    launch: Callable[[list[int], int], None]  # all launches, with the pointers, the scratch's last, on a stream

    def run(self, pointers: list[int]) -> None:
        """Launch with the pointers of the call's tensors, those of Call.tensors that are given."""
        if self.scratch_bytes:
            scratch = self.scratch.new_empty(self.scratch_bytes)  # lives until all is launched
            pointers.append(scratch.data_ptr())
        self.launch(pointers, driver.active.get_current_stream(self.device))


def find(*arguments: Any) -> tuple[tuple, list[int], Bound | None] | None:
    """A call's key, its tensors' pointers, and what is bound to the key; None if the call has to take the ordinary way.

    arguments: all that the caller gave, the tensors in the order of Call.tensors.
    """
    if _observed() or INTERPRETED or values_are_checked():
        return None
    kinds = _kinds(tuple(map(type, arguments)))
    if kinds is None:
        return None
    tensors = kinds.tensors(arguments)
    try:
        device, grad = driver.active.get_current_device(), torch.is_grad_enabled()
        host = lookup.table(), device, grad, kinds.others(arguments)
        pointers = [x.data_ptr() for x in tensors]
        offsets = [p & 15 for p in pointers]
        last = kinds.last
        if last and host == last.host and offsets == last.offsets and last.alike(*tensors):
            return last.key, pointers, last.bound
        facts = tuple(
            [(p, x.shape, x.stride(), x.dtype, x.get_device(), x.is_neg(), x.requires_grad) for p, x in zip(offsets, tensors)]
        )
    except RuntimeError:  # no GPU, or a tensor without strides or data
        return None
    key = kinds, host, facts
    bound = _bound.get(key)
    if bound is not None:
        alike = TensorGuards(*tensors, dynamic_dims_sizes=None, dynamic_dims_strides=None).check
        kinds.last = _Last(host, offsets, alike, key, bound)
    elif key in _bound or any(on != device or negated or (grad and wanted) for *_, on, negated, wanted in facts):
        return None
    return key, pointers, bound


@contextmanager
def waiting(key: tuple) -> Iterator[None]:
    """Bind the call that an operator makes meanwhile, on this thread, to its key."""
    _waiting.key = key
    try:
        yield
    finally:
        _waiting.key = None


def remember(call: Call, launches: list[Launch], kernels: list[Any]) -> None:
    """Bind a call to the key that waits for it, if one does. Its launches have just run, as these kernels."""
    key = _waiting.key
    if key is None or not call.bindable or not all(isinstance(kernel, CompiledKernel) for kernel in kernels):
        return
    if len(_bound) >= MAX_BOUND:
        forget()
    same = _without_length(key, call)
    if same not in _of_config:
        _of_config[same] = _bind(call, launches, kernels)
    _bound[key] = _of_config[same]


def _bind(call: Call, launched: list[Launch], kernels: list[CompiledKernel]) -> Bound | None:
    """The launches of a call by its compiled kernels; None if one has an argument that is not understood."""
    # Built from tensors that share no storage, a launch's pointers tell which of the call's tensors they come from. All else is
    # taken from what ran: these tensors are on no GPU, whose number of SMs may be the grid, or the length of scratch.
    apart = [None if x is None else torch.empty_strided(x.shape, x.stride(), dtype=x.dtype, device="meta") for x in call.tensors]
    origins = {_storage(x): (i, 0) for i, x in enumerate(x for x in apart if x is not None)}
    scratch, scratch_bytes = len(origins), 0

    def pointer(x: torch.Tensor, real: torch.Tensor) -> _Later:
        nonlocal scratch_bytes
        if _storage(x) not in origins:  # scratch
            origins[_storage(x)] = scratch, scratch_bytes
            scratch_bytes += ceil_div(real.untyped_storage().nbytes(), SCRATCH_ALIGNMENT) * SCRATCH_ALIGNMENT
        source, start = origins[_storage(x)]
        offset = start + (real if source == scratch else x).storage_offset() * x.element_size()
        return _Later(f"pointer_{source} + {offset}" if offset else f"pointer_{source}")

    entries = []
    for launch, ran, kernel in zip(call.build(*apart), launched, kernels, strict=True):
        arguments: list[Any] = []
        for parameter in launch.fn.params:
            ours, value = (x.args.get(parameter.name, parameter.default) for x in (launch, ran))
            if isinstance(value, torch.Tensor):
                value = pointer(ours, value) if value.numel() else 0  # data_ptr() of an empty one is 0, wherever it begins
            elif isinstance(value, TensorDescriptor):
                value = copy.copy(value)
                value.base = pointer(ours.base, value.base)
            elif not isinstance(value, IMMUTABLE):
                return None  # it may hold a tensor
            arguments.append(value)
        entry = _entry(kernel, ran.grid, arguments, _Later("stream"))
        if entry is None:
            return None
        entries.append(entry)
    like = next(x for x in call.tensors if x is not None)
    launch_all = _write(entries, scratch + (scratch_bytes > 0))
    return Bound(like.get_device(), like.new_empty(0, dtype=torch.uint8), scratch_bytes, launch_all)


def forget() -> None:
    """Unbind everything."""
    for kinds, *_ in list(_bound):
        kinds.last = None
    _bound.clear()
    _of_config.clear()


def _without_length(key: tuple, call: Call) -> tuple:
    """The key for any length of the advising tensor that leads to the same config."""
    if call.advice is None:
        return key
    *others, facts = key
    i = sum(x is not None for x in call.tensors[: call.advice])
    alignment, shape, *rest = facts[i]
    return *others, facts[:i], alignment, 0 in shape, *rest, facts[i + 1 :], call.config  # of an empty tensor no pointer is kept


class _Last(NamedTuple):
    """A call that was found by its key, and what another one with this key is known by in a third of the time."""

    host: tuple
    offsets: list[int]
    alike: Callable[..., bool]  # of tensors: all other facts in one C call; may deny it, for one that occurs twice, never err
    key: tuple
    bound: Bound


@dataclass(slots=True, eq=False)
class _Kinds:
    """Takes the tensors, or the others, out of a call's arguments."""

    tensors: itemgetter
    others: itemgetter
    last: _Last | None = None  # of the calls whose arguments are of these types


@functools.lru_cache(MAX_BOUND)
def _kinds(types: tuple[type, ...]) -> _Kinds | None:
    """None if an argument is neither a plain tensor nor immutable."""
    tensors = [i for i, kind in enumerate(types) if kind in PLAIN_TENSORS]
    others = [i for i, kind in enumerate(types) if issubclass(kind, IMMUTABLE)]
    if len(tensors) + len(others) < len(types) or min(len(tensors), len(others)) < 2:  # of one place, itemgetter makes no tuple
        return None
    return _Kinds(itemgetter(*tensors), itemgetter(*others))


class _Later(NamedTuple):
    """An argument that each call of the launches computes anew; with `expand`, the arguments that this makes of a pointer."""

    source: str
    expand: Callable[[int], list] | None = None


def _entry(
    kernel: CompiledKernel, grid: tuple[int, ...], arguments: list[Any], stream: _Later
) -> tuple[Callable[..., None], tuple] | None:
    """The C function that launches a kernel, and its arguments: Triton 3.6 gives it the kernel's one by one, 3.7 in a tuple.

    Written down by a copy of the launcher, so that nothing is launched. What the launcher does itself is most of its time. None if
    an argument is a tensor descriptor and cannot be expanded beforehand.
    """
    launcher, launch = copy.copy(kernel.run), kernel.run.launch
    allocates = launcher.global_scratch_size or launcher.profile_scratch_size  # the launcher, at each launch
    if any(isinstance(x, TensorDescriptor) for x in arguments):
        below = _below(launch, arguments)
        if below is None or allocates:
            return None
        launch, arguments = below
    given = (*(*grid, 1, 1)[:3], stream, kernel.function, kernel.packed_metadata, None, None, None, *arguments)
    if allocates:
        return kernel.run, given
    passed: list[tuple] = []
    launcher.launch = lambda *arguments: passed.append(arguments)
    launcher(*given)
    return launch, passed[0]


def _below(launch: Callable[..., None], arguments: list[Any]) -> tuple[Callable[..., None], list[Any]] | None:
    """Below a launch that expands tensor descriptors: the C function, and the arguments expanded; None if this Triton does it in
    another way than 3.6 and 3.7, where a Python function does it and calls the one in C."""
    try:
        used = inspect.getclosurevars(launch)
        function, metadata = used.nonlocals["launcher"], iter(used.nonlocals["tensordesc_meta"])
        expand = used.globals["make_tensordesc_arg"]
        inspect.signature(expand).bind("descriptor", "metadata")
    except (KeyError, TypeError):
        return None
    return function, [_expanded(x, expand, next(metadata)) if isinstance(x, TensorDescriptor) else x for x in arguments]


def _expanded(descriptor: TensorDescriptor, expand: Callable[[Any, Any], list], metadata: Any) -> _Later:
    """What Triton makes of a descriptor whose base comes later: a tensor map, which holds nothing but address and geometry and so
    outlives the memory there, the shape and the strides."""

    @functools.lru_cache(MAX_MAPS)
    def at(pointer: int) -> list:
        placed = copy.copy(descriptor)
        placed.base = SimpleNamespace(data_ptr=lambda: pointer)
        return expand(placed, metadata)

    return _Later(descriptor.base.source, at)


def _write(entries: list[tuple[Callable[..., None], tuple]], pointers: int) -> Callable[[list[int], int], None]:
    """The launches as one function, written out like the binder of Triton's JIT: a loop over arguments takes twice as long.

    entries: C functions and their arguments; pointers: how many the function written is given.
    """
    constants: dict[str, Any] = {}

    def constant(value: Any) -> str:
        name = f"constant_{len(constants)}"
        constants[name] = value
        return name

    def text(value: Any) -> str:
        if isinstance(value, _Later):
            return f"*{constant(value.expand)}({value.source})" if value.expand else value.source
        return f"({listed(value)},)" if _waits(value) else constant(value)

    def listed(values: tuple) -> str:
        parts: list[str] = []
        for waits, run in itertools.groupby(values, _waits):
            together = tuple(run)
            parts += map(text, together) if waits or len(together) < LONG_RUN else [f"*{constant(together)}"]
        return ", ".join(parts)

    given = [f"    {''.join(f'pointer_{i}, ' for i in range(pointers))} = pointers"]
    lines = [f"    {text(function)}({listed(arguments)})" for function, arguments in entries]
    exec(_compiled("\n".join(["def launch(pointers, stream):", *given, *lines, "    return"])), constants)
    return constants["launch"]


def _waits(value: Any) -> bool:
    """Whether an argument, or a part of one, comes later."""
    return isinstance(value, _Later) or (isinstance(value, tuple) and any(isinstance(x, _Later) for x in value))


@functools.lru_cache(MAX_BOUND)
def _compiled(source: str) -> CodeType:
    """Keys that differ in a length only have the same source, and compiling is most of what binding costs."""
    return compile(source, __name__, "exec")


def _storage(x: torch.Tensor) -> int:
    return x.untyped_storage()._cdata


def _observed() -> bool:
    """Whether something looks at operators or at launches: a compiler, a tracer, a mode, a transform, a profiler, a hook."""
    hooks = triton.knobs.runtime
    return bool(
        torch.compiler.is_compiling()
        or _is_tracing()
        or _len_torch_dispatch_stack()
        or _len_torch_function_stack()
        or peek_interpreter_stack()
        or _profiler_enabled()
        or getattr(hooks.launch_enter_hook, "calls", hooks.launch_enter_hook)  # a chain of hooks, or one, or None
        or getattr(hooks.launch_exit_hook, "calls", hooks.launch_exit_hook)
    )
