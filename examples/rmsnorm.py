"""A kernel of one's own as a patune template: RMSNorm over rows. docs/templates.md walks through it.

    patune run --gpu auto --kernel examples/rmsnorm.py:TEMPLATE

The key's head_dim is the length of a row, the workload's batch_size the number of rows; the other sizes are 1.
"""

import torch
import triton
import triton.language as tl

import patune
from patune.kernels.template import Launch, Template
from patune.workload import Workload

NAME = "examples/rmsnorm.py:TEMPLATE"
EPSILON = 1e-6
COLD_BYTES = 160e6  # what the buffer sets add up to, three times an H100's L2


@triton.jit
def rmsnorm(
    x_ptr, weight_ptr, out_ptr, rows, COLUMNS: tl.constexpr, EPSILON: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr
):
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    column = tl.arange(0, BLOCK)
    mask = (row < rows)[:, None] & (column < COLUMNS)[None, :]
    offsets = row.to(tl.int64)[:, None] * COLUMNS + column[None, :]
    x = tl.load(x_ptr + offsets, mask=mask, other=0.0).to(tl.float32)
    weight = tl.load(weight_ptr + column, mask=column < COLUMNS, other=0.0).to(tl.float32)
    scale = tl.rsqrt(tl.sum(x * x, axis=1) / COLUMNS + EPSILON)
    tl.store(out_ptr + offsets, x * scale[:, None] * weight[None, :], mask=mask)


def launch(x, weight, out, config) -> Launch:
    """One launch over x [rows, columns], complete but not made: the tuner compiles it ahead, checks it and times it."""
    rows, columns = x.shape
    args = {
        "x_ptr": x, "weight_ptr": weight, "out_ptr": out, "rows": rows, "COLUMNS": columns, "EPSILON": EPSILON,
        "ROWS": config["ROWS"], "BLOCK": triton.next_power_of_2(columns), "num_warps": config["num_warps"],
    }  # fmt: skip
    return Launch(rmsnorm, (triton.cdiv(rows, config["ROWS"]),), args)


class RmsNormProblem:
    """One workload with its tensors; see patune.kernels.template.Problem."""

    tolerance = 1e-2  # bfloat16

    def __init__(self, key, workload, *, device, seed=0, sets=None):
        rows, columns = workload.batch_size, key.head_dim
        dtype = getattr(torch, key.q_dtype)
        self.bytes = 2 * rows * columns * dtype.itemsize
        self.flops = 4 * rows * columns
        self.sets = 1 if device == "meta" else sets or max(2, min(40, round(COLD_BYTES / self.bytes)))
        if device != "meta":
            torch.manual_seed(seed)
        self.weight = torch.randn(columns, device=device).to(dtype)
        self.x = [torch.randn(rows, columns, device=device).to(dtype) for _ in range(self.sets)]
        self.out = [torch.empty_like(x) for x in self.x]

    def launches(self, config, r=0):
        return [launch(self.x[r], self.weight, self.out[r], config)]

    def poison(self, r=0):
        self.out[r].fill_(float("nan"))

    def error(self, r=0):
        x = self.x[r].float()
        want = x * torch.rsqrt(x.square().mean(1, keepdim=True) + EPSILON) * self.weight.float()
        error = (self.out[r].float() - want).norm() / want.norm()
        return float("inf") if error.isnan() else error.item()


def invalid(config, key, workload):
    """Why a point cannot or need not run."""
    elements = config["ROWS"] * triton.next_power_of_2(key.head_dim) // (32 * config["num_warps"])
    if elements > 128:
        return "more than 128 elements a thread"
    if config["ROWS"] > workload.batch_size:
        return "more rows than there are"
    return None


TEMPLATE = Template(
    name="rmsnorm",
    tunables={"ROWS": (1, 2, 4, 8), "num_warps": (1, 2, 4, 8, 16)},
    runtime=frozenset(),
    invalid=invalid,
    default=lambda key, workload: {"ROWS": 1, "num_warps": 4},
    problem=RmsNormProblem,
    jit_functions=(rmsnorm,),
    targets=[({"head_dim": 4096}, [Workload(rows, kv_len=1, kv_heads=1) for rows in (1, 64, 4096)])],
)


def rms_norm(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """x [rows, columns] over its rows, with the config that was tuned for so many of them, or for the nearest number."""
    rows, columns = x.shape
    config = patune.get_best_config(NAME, head_dim=columns, page_size=1, batch_size=rows, kv_len=1, kv_heads=1)
    out = torch.empty_like(x)
    launch(x, weight, out, config or {"ROWS": 1, "num_warps": 4}).run()
    return out
