"""A tiny template whose tunable FAULT plants what can go wrong, for tests with real processes, on a GPU and without one."""

import os
import time
from dataclasses import dataclass, replace

import torch
import triton
import triton.language as tl

from patune.kernels.template import Launch, Template
from patune.workload import Key, Workload

NONE, WRONG, NAN, HANGS, TOO_BIG, OUT_OF_MEMORY, BREAKS_COMPILER, ILLEGAL = GPU_FAULTS = tuple(range(8))
RAISES, DIES, KILLS_COMPILER, HANGS_COMPILER, NOTED = range(8, 13)
NAME = "tests.tuner.templates:TOY"
KEY = Key(NAME, "interpreter", 1, head_dim=16, page_size=16, q_heads_per_kv=1)


@triton.jit
def double(x_ptr, out_ptr, n, shift, FACTOR: tl.constexpr, BREAKS: tl.constexpr, BLOCK: tl.constexpr):
    tl.static_assert(not BREAKS, "planted")
    offs = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    x = tl.load(x_ptr + offs, mask=offs < n)
    tl.store(out_ptr + shift + offs, x * FACTOR, mask=offs < n)


@triton.jit
def spin(flag_ptr):
    while tl.load(flag_ptr, volatile=True) == 0:  # nobody ever sets it
        pass


@triton.jit
def hoard(x_ptr, out_ptr, BLOCK: tl.constexpr):
    offs = tl.arange(0, BLOCK)
    tile = tl.load(x_ptr + offs[:, None] * BLOCK + offs[None, :])
    tl.store(out_ptr + offs[:, None] * BLOCK + offs[None, :], tl.dot(tile, tile))


@dataclass
class Doubling:
    """kv_len numbers, to be doubled."""

    key: Key
    workload: Workload
    device: str
    seed: int = 0
    sets: int = 2
    tolerance: float = 1e-6

    def __post_init__(self):
        n = self.workload.kv_len
        self.bytes, self.flops = 8 * n, n
        self.x = [torch.full((n,), r + 1.0, device=self.device) for r in range(self.sets)]
        self.out = [torch.empty_like(x) for x in self.x]
        self.flag = torch.zeros(1, dtype=torch.int32, device=self.device)
        self.tile = torch.zeros(256, 256, device=self.device)

    def launches(self, config, r=0):
        fault, meta = config["FAULT"], self.device == "meta"
        if fault == TOO_BIG:
            return [Launch(hoard, (1,), {"x_ptr": self.tile, "out_ptr": self.tile, "BLOCK": 256, "num_warps": 4})]
        if fault == HANGS and self.device != "cpu":
            return [Launch(spin, (1,), {"flag_ptr": self.flag})]
        if fault == (KILLS_COMPILER if meta else DIES):
            os._exit(7)
        if fault == (HANGS_COMPILER if meta else HANGS):
            time.sleep(60)
        if fault == NOTED and meta:  # when it is compiled, in the file that the key names in the place of a GPU
            began = time.monotonic()
            time.sleep(0.2)
            with open(self.key.gpu, "a") as file:
                file.write(f"{config['BLOCK']} {began} {time.monotonic()}\n")
        if fault == RAISES and not meta:
            raise ValueError("planted")
        if fault == OUT_OF_MEMORY and self.device == "cuda":
            torch.empty(1 << 50, dtype=torch.uint8, device=self.device)
        if fault == OUT_OF_MEMORY and self.device == "cpu":  # whose allocator raises something else
            raise torch.OutOfMemoryError("planted")
        args = {
            "x_ptr": self.x[r],
            "out_ptr": self.out[r],
            "n": self.workload.kv_len,
            "shift": 1 << 40 if fault == ILLEGAL else 0,
            "FACTOR": {WRONG: 3.0, NAN: float("nan")}.get(fault, 2.0),
            "BREAKS": fault == BREAKS_COMPILER,
            "BLOCK": config["BLOCK"],
            "num_warps": config["num_warps"],
        }
        return [Launch(double, (triton.cdiv(self.workload.kv_len, config["BLOCK"]),), args)]

    def poison(self, r=0):
        self.out[r].fill_(float("nan"))

    def error(self, r=0):
        want = 2 * self.x[r]
        error = ((self.out[r] - want).norm() / want.norm()).item()
        return error if error == error else float("inf")


class Long(Doubling):
    """As if it were much work."""

    def __post_init__(self):
        super().__post_init__()
        self.flops = 10**13


def no_tensors(key, workload, *, device, seed=0, sets=None):
    raise torch.OutOfMemoryError("planted")


TOY = Template(
    name=NAME,
    tunables={"BLOCK": (16, 32, 64), "num_warps": (1, 2, 4), "FAULT": tuple(range(13))},
    runtime=frozenset(),
    invalid=lambda config, key, workload: "planted" if config["FAULT"] else None,
    default=lambda key, workload: {"BLOCK": 16, "num_warps": 1, "FAULT": NONE},
    problem=Doubling,
    jit_functions=(double,),
)
PLANTED = replace(
    TOY,
    name="tests.tuner.templates:PLANTED",
    tunables={"BLOCK": (16, 32, 64), "num_warps": (1,), "FAULT": GPU_FAULTS},
    invalid=lambda config, key, workload: None,
)
LONG = replace(TOY, name="tests.tuner.templates:LONG", problem=Long)
NO_TENSORS = Template("no_tensors", TOY.tunables, frozenset(), TOY.invalid, TOY.default, no_tensors, (double,))


def config(block: int = 32, fault: int = NONE) -> dict[str, int]:
    return {"BLOCK": block, "num_warps": 1, "FAULT": fault}
