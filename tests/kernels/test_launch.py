"""Which launches share a compiled kernel."""

from dataclasses import replace

import torch

from patune.kernels.registry import template
from patune.workload import Key, Workload


def launch(r: int = 0):
    kernel = template("prefill")
    key, workload = Key("prefill", "", 132, 128, 16, 4), Workload(2, 64, 32)
    return kernel.problem(key, workload, device="cpu", sets=2).launches(kernel.default(key, workload), r)[0]


def test_sets_of_one_problem_share_a_kernel_and_what_the_jit_tells_apart_does_not():
    one = launch()
    assert one.compiles_as(launch(1))
    for name, other in (
        ("q_ptr", one.args["q_ptr"].half()),
        ("kv_indices_ptr", torch.empty(9, dtype=torch.int32)[1:]),  # 4 bytes past what is aligned
        ("q_heads", one.args["q_heads"] + 1),
        ("num_warps", 2 * one.args["num_warps"]),
        ("k_scale_ptr", torch.ones(1)),  # None until now
        ("soft_cap", 1),  # a float until now
    ):
        changed = replace(one, args=one.args | {name: other})
        assert not one.compiles_as(changed) and not changed.compiles_as(one), name
