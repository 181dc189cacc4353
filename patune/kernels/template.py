"""What a kernel template offers the tuner: its tunables, their validity, its default, and launches for a problem."""

import functools
import hashlib
import io
import tokenize
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from ..workload import Key, Workload

Values = Mapping[str, int]  # one point of a search space: tunable -> value


@dataclass(frozen=True, slots=True)
class Launch:
    """One kernel launch, complete but not yet made: the same object runs, compiles ahead, or is looked at."""

    fn: Any  # triton.JITFunction
    grid: tuple[int, ...]
    args: dict[str, Any]  # every kernel argument by name, constexprs, num_warps and num_stages included
    cluster: int = 1  # programs along x that are launched together and reach each other's shared memory; the grid counts clusters

    def run(self):
        """Returns the compiled kernel; None in the interpreter, which has none."""
        if self.cluster > 1:
            self.warmup()
        return self.fn[self.grid](**self.args)

    def again(self, kernel) -> Callable[[], Any]:
        """What makes this launch once more: the kernel that run() returned, with its arguments and without the JIT's search."""
        if kernel is None:
            return self.run
        launcher = kernel[(*self.grid, 1, 1)[:3]]
        return functools.partial(launcher, *(self.args.get(p.name, p.default) for p in self.fn.params))

    def compiles_as(self, other: "Launch") -> bool:
        """Whether the JIT takes one compiled kernel for both: their arguments differ in the addresses of tensors alone, and are
        equally aligned."""
        return self.fn is other.fn and all(_alike(value, other.args[name]) for name, value in self.args.items())

    def warmup(self):
        """Compile without running; tensors may be on the meta device. Returns the compiled kernel."""
        kernel = self.fn.warmup(grid=self.grid, **self.args)
        if self.cluster > 1:
            # Triton's own num_ctas spreads one program's tensors over a cluster; here its programs are compiled as they are, and
            # the launcher alone is told.
            num_warps, _, *rest = kernel.packed_metadata
            kernel.packed_metadata = (num_warps, self.cluster, *rest)
        return kernel


def _alike(a: Any, b: Any) -> bool:
    if hasattr(a, "data_ptr") and hasattr(b, "data_ptr"):
        return a.dtype == b.dtype and (a.data_ptr() % 16 == 0) == (b.data_ptr() % 16 == 0)
    if hasattr(a, "block_shape") and hasattr(b, "block_shape"):  # a tensor map
        return all(getattr(a, name) == getattr(b, name) for name in ("shape", "strides", "block_shape")) and _alike(a.base, b.base)
    return a is b or (type(a) is type(b) and a == b)


class Problem(Protocol):
    """One workload with its tensors: `sets` disjoint buffer sets, so that no call finds its data in the cache."""

    sets: int
    tolerance: float  # largest relative Frobenius error that counts as right
    bytes: int  # bytes that one call must move at least
    flops: int  # floating-point operations that one call must do at least

    def launches(self, config: Values, r: int = 0) -> list[Launch]:
        """The launches that compute set r with this config."""
        ...

    def poison(self, r: int = 0) -> None:
        """Fill what the kernel writes with NaN."""
        ...

    def error(self, r: int = 0) -> float:
        """Relative Frobenius error of set r against the fp32 reference; inf if anything is NaN."""
        ...


@dataclass(frozen=True)
class Template:
    """A kernel with its search space. A user's own kernel becomes tunable by filling in one of these."""

    name: str
    tunables: Mapping[str, tuple[int, ...]]  # every value of every tunable, ascending
    runtime: frozenset[str]  # tunables that are run-time arguments: changing them compiles nothing
    invalid: Callable[[Values, Key, Workload], str | None]  # why a point cannot or need not run, else None
    default: Callable[[Key, Workload], dict[str, int]]
    problem: Callable[..., Problem]  # (key, workload, *, device, seed=0, sets=None)
    jit_functions: tuple[Any, ...]  # the kernels and the device functions that they call
    # (config, key, its workload, another workload): the config fitted to the other one, a point worth trying there
    fit: Callable[[Values, Key, Workload, Workload], dict[str, int]] = lambda config, key, of, to: dict(config)
    # what `patune run` tunes unless it is told: fields of Key (those left out are 1, and bfloat16), and workloads for them
    targets: Sequence[tuple[Mapping[str, Any], Sequence[Workload]]] = ()

    @functools.cached_property
    def source_hash(self) -> str:
        """12 hex digits over the device code's tokens; comments, blank lines and indentation width do not count."""
        digest = hashlib.sha256()
        for token in self._tokens():
            digest.update(token.encode() + b"\0")
        return digest.hexdigest()[:12]

    @functools.cached_property
    def source_size(self) -> int:
        """Tokens of the device code: what compiling a variant takes grows with it."""
        return sum(1 for _ in self._tokens())

    def _tokens(self) -> Iterator[str]:
        for fn in self.jit_functions:
            # .src of a JITFunction, else (interpreter) the wrapped function's own text.
            yield from tokens(device_source(fn))


def tokens(source: str) -> Iterator[str]:
    """The tokens that make a program what it is, the same ones in every Python: from 3.12 on, an f-string is many."""
    skip = {tokenize.COMMENT, tokenize.NL, tokenize.NEWLINE, tokenize.INDENT, tokenize.DEDENT, tokenize.ENDMARKER}
    f_start, f_end = getattr(tokenize, "FSTRING_START", None), getattr(tokenize, "FSTRING_END", None)
    lines = source.splitlines(keepends=True)
    starts: list[tuple[int, int]] = []  # of the f-strings that a token is in
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type == f_start:
            starts.append(token.start)
        elif token.type == f_end:
            (row, column), (last, end) = starts.pop(), token.end
            if not starts:
                text = "".join(lines[row - 1 : last])
                yield text[column : len(text) - len(lines[last - 1]) + end]
        elif not starts and token.type not in skip:
            yield token.string


def device_source(fn) -> str:
    """The text of a jit function from its `def` on, without decorators."""
    import inspect
    import textwrap

    text = textwrap.dedent(inspect.getsource(getattr(fn, "fn", fn)))
    return text[text.index("def ") :]
