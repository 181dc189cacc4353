"""What `patune run` tunes: the keys and, for each, the workloads."""

from dataclasses import dataclass
from typing import Any

from ..cachedb.landscape import Landscape
from ..cachedb.trial import Environment
from ..errors import UsageError
from ..kernels.registry import OF_KERNEL, candidates
from ..models import Shape, model
from ..tuner.workloads import TARGETS, standard_workloads
from ..workload import Key, Workload

KERNELS = tuple(OF_KERNEL)
FAMILY = {name: kernel for kernel, names in OF_KERNEL.items() for name in names}  # the kernel of a template

Plan = dict[Key, list[Workload]]


@dataclass(frozen=True, slots=True)
class Sizes:
    """The one workload that was asked for in the place of the standard ones."""

    batch_size: int
    kv_len: int
    q_len: int | None  # None: what is usual for the kernel
    ragged: bool

    def workload(self, kernel: str, kv_heads: int) -> Workload:
        q_len = self.q_len or (self.kv_len if kernel == "prefill" else 1)
        return Workload(self.batch_size, self.kv_len, q_len, kv_heads, self.ragged)


@dataclass(frozen=True, slots=True)
class Request:
    kernels: tuple[str, ...]  # KERNELS, each with all its templates; or one template
    shape: Shape | None  # None: the standard ones
    sizes: Sizes | None  # None: the standard ones
    dtype: str
    kv_dtype: str | None = None  # None: the shape's own, or that of the queries

    def measured(self, gpu: Environment) -> Plan:
        """Everything that was asked for. Shapes that differ in their number of KV heads alone share a key."""
        outside = self.kernels[0] not in FAMILY
        if outside and self.shape is None and self.sizes is None:
            return self._own_targets(gpu)
        if outside and (self.shape is None or self.sizes is None):
            missing = "--head-dim, --q-heads, --kv-heads" if self.shape is None else "--batch-size, --kv-len"
            raise UsageError(f"{missing}: missing, a kernel outside patune needs both the shape and one workload, or neither")
        kernels = [FAMILY.get(name, name) for name in self.kernels]
        targets = TARGETS if self.shape is None else [(kernel, self.shape) for kernel in kernels]
        plan: Plan = {}
        for kernel, shape in targets:
            if kernel in kernels:
                rows = shape.q_heads // shape.kv_heads * ((self.sizes and self.sizes.q_len) or 1)
                types = self.dtype, self.kv_dtype or shape.kv_dtype or self.dtype
                for name in candidates(kernel, gpu.capability, shape.head_dim, shape.page_size, rows, *types):
                    if kernel in self.kernels or name in self.kernels:
                        workloads = plan.setdefault(self._key(name, shape, gpu), [])
                        workloads += [w for w in self._workloads(kernel, shape.kv_heads) if w not in workloads]
        if not plan:
            raise UsageError(f"--kernel: {self.kernels[0]} does not take this shape on {gpu.gpu}, use --kernel {kernels[0]}")
        return plan

    def replayed(self, landscape: Landscape) -> tuple[Plan, list[Key]]:
        """What of it was recorded, and the keys that were not; UsageError names what is there if that is nothing."""
        wanted, keys = self.measured(landscape.environment), landscape.keys()
        plan: Plan = {}
        for key, workloads in wanted.items():
            recorded = landscape.workloads(key) if key in keys else []
            if self.sizes is not None:
                recorded = [w for w in recorded if w in workloads]
            elif self.shape is not None:
                recorded = [w for w in recorded if w.kv_heads == self.shape.kv_heads]
            if recorded:
                plan[key] = recorded
        if not plan:
            raise UsageError(f"the landscape of {landscape.environment.gpu} has none of it, {self._alternatives(landscape)}")
        return plan, [key for key in wanted if key not in plan and key.kernel in self.kernels]

    def _own_targets(self, gpu: Environment) -> Plan:
        from ..kernels.registry import template

        (kernel,) = self.kernels
        fixed = {"page_size": 1, "q_heads_per_kv": 1, "q_dtype": self.dtype, "kv_dtype": self.dtype}
        plan = {
            Key(**{"kernel": kernel, "gpu": gpu.gpu, "sm_count": gpu.sm_count, **fixed, **fields}): list(workloads)
            for fields, workloads in template(kernel).targets
        }
        if not plan:
            raise UsageError(f"--kernel: {kernel} names no targets, give --head-dim and so on, --batch-size and --kv-len")
        return plan

    def _key(self, kernel: str, shape: Shape, gpu: Environment) -> Key:
        group = 1 if kernel == "append" else shape.q_heads // shape.kv_heads
        kv_dtype = self.kv_dtype or shape.kv_dtype or self.dtype
        return Key(kernel, gpu.gpu, gpu.sm_count, shape.head_dim, shape.page_size, group, self.dtype, kv_dtype)

    def _workloads(self, kernel: str, kv_heads: int) -> list[Workload]:
        if self.sizes is None:
            return standard_workloads(kernel, kv_heads)
        return [self.sizes.workload(kernel, kv_heads)]

    def _alternatives(self, landscape: Landscape) -> str:
        """What was recorded: the workloads if the key is right and they alone are wrong, else the keys."""
        keys = landscape.keys()
        right = [key for key in self.measured(landscape.environment) if key in keys]
        if right:
            workloads = [f"{key.kernel} {w}" for key in right for w in landscape.workloads(key)]
            return f"its workloads are {', '.join(workloads)}"
        return "its keys are " + ", ".join(_summary(key, landscape) for key in keys)


def shape_of(model_name: str | None, **sizes: int | None) -> Shape | None:
    """The shape of --model, with another --page-size if given, or that of the single options; None without any."""
    given: dict[str, Any] = {name: value for name, value in sizes.items() if value is not None}
    if model_name is not None:
        shape = model(model_name)
        if extra := [_option(name) for name in given if name != "page_size"]:
            raise UsageError(f"{extra[0]}: --model {model_name} decides it, leave one of them out")
        return Shape(shape.q_heads, shape.kv_heads, shape.head_dim, given.get("page_size", shape.page_size))
    if not given:
        return None
    if missing := [_option(name) for name in ("head_dim", "q_heads", "kv_heads") if name not in given]:
        raise UsageError(f"{', '.join(missing)}: missing, a shape without --model needs --head-dim, --q-heads and --kv-heads")
    if given["q_heads"] % given["kv_heads"]:
        raise UsageError(f"--q-heads: {given['q_heads']} is no multiple of --kv-heads {given['kv_heads']}")
    return Shape(**given)


def sizes_of(kernel: str | None, batch_size: int | None, kv_len: int | None, q_len: int | None, ragged: bool) -> Sizes | None:
    """The one workload that these options describe; None without any. `kernel` is None for all of them."""
    if batch_size is None and kv_len is None and q_len is None and not ragged:
        return None
    if batch_size is None or kv_len is None:
        missing = "--batch-size" if batch_size is None else "--kv-len"
        raise UsageError(f"{missing}: missing, one workload needs --batch-size and --kv-len")
    if q_len is not None and kernel is None:
        raise UsageError("--q-len: means another thing for each kernel, add --kernel")
    if q_len is not None and q_len > kv_len:
        raise UsageError(f"--q-len: {q_len} is more than --kv-len {kv_len}, which includes the new tokens")
    if kernel == "decode" and ragged and q_len not in (None, 1):
        raise UsageError("--ragged: decode takes sequences of different --q-len as a prefill, use --kernel prefill")
    return Sizes(batch_size, kv_len, q_len, ragged)


def _option(name: str) -> str:
    return "--" + name.replace("_", "-")


def _summary(key: Key, landscape: Landscape) -> str:
    group = "" if key.kernel == "append" else f" q_heads_per_kv={key.q_heads_per_kv}"
    kv_dtype = "" if key.kv_dtype == key.q_dtype else f" with {key.kv_dtype} KV"
    heads = "/".join(str(n) for n in sorted({w.kv_heads for w in landscape.workloads(key)}))
    return f"{key.kernel} head_dim={key.head_dim} page_size={key.page_size}{group} kv_heads={heads} {key.q_dtype}{kv_dtype}"
