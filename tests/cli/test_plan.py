from dataclasses import replace

import pytest

from patune.cli.plan import KERNELS, Request, Sizes, shape_of
from patune.errors import UsageError
from patune.models import Shape
from patune.tuner.workloads import TARGETS, standard_workloads
from patune.workload import Workload

from .recording import H100


def plan(kernels=KERNELS, shape=None, sizes=None):
    return Request(kernels, shape, sizes, "bfloat16").measured(H100)


def test_shapes_that_differ_in_kv_heads_alone_share_a_key_and_have_the_workloads_of_both():
    found = {key.kernel: w for key, w in plan(("decode",)).items() if (key.head_dim, key.q_heads_per_kv) == (128, 8)}
    assert found.keys() == {"decode", "decode_hopper"}
    for shared in found.values():
        assert set(shared) == {*standard_workloads("decode", 8), *standard_workloads("decode", 1)}
        assert len(set(shared)) == len(shared)


def test_every_standard_target_is_planned():
    """With the one for Hopper where there is one; prefill's takes no fp8 cache."""
    wanted = {
        (name, s.head_dim, s.page_size, 1 if kernel == "append" else s.q_heads // s.kv_heads, s.kv_dtype or "bfloat16")
        for kernel, s in TARGETS
        for name in (kernel, f"{kernel}_hopper")
        if name == kernel or (s.head_dim <= 256 and (kernel == "decode" or (kernel == "prefill" and s.kv_dtype is None)))
    }
    assert {(k.kernel, k.head_dim, k.page_size, k.q_heads_per_kv, k.kv_dtype) for k in plan()} == wanted
    assert {(k.gpu, k.sm_count, k.q_dtype) for k in plan()} == {(H100.gpu, 132, "bfloat16")}


def test_one_workload_means_the_usual_number_of_new_tokens_for_each_kernel():
    workloads = plan(shape=Shape(32, 8, 128), sizes=Sizes(4, 512, None, True))
    assert {key.kernel: w for key, (w,) in workloads.items()} == {
        "decode": Workload(4, 512, 1, 8, True),
        "decode_hopper": Workload(4, 512, 1, 8, True),
        "prefill": Workload(4, 512, 512, 8, True),
        "prefill_hopper": Workload(4, 512, 512, 8, True),
        "append": Workload(4, 512, 1, 8, True),
    }


def test_a_model_has_its_shape_but_for_the_page_size_that_is_given():
    assert shape_of("gpt-oss-20b", page_size=None) == Shape(64, 8, 64, 16)
    assert shape_of("gpt-oss-20b", page_size=64) == Shape(64, 8, 64, 64)
    assert shape_of(None, head_dim=80, q_heads=14, kv_heads=2, page_size=None) == Shape(14, 2, 80, 16)


def test_the_kernels_for_hopper_are_tuned_with_the_plain_ones_and_only_where_they_can_run():
    """Not on another architecture, nor for a shape that they do not take."""
    other = replace(H100, gpu="NVIDIA A100-SXM4-80GB", sm_count=108, capability="8.0")
    for kernel in ("decode", "prefill"):
        assert {key.kernel for key in plan((kernel,))} == {kernel, f"{kernel}_hopper"}
        assert {key.kernel for key in plan((kernel,), Shape(8, 8, 80, 16))} == {kernel}
        assert {key.kernel for key in Request((kernel,), Shape(32, 8, 128, 16), None, "float32").measured(H100)} == {kernel}
        assert {key.kernel for key in Request((kernel,), None, None, "bfloat16").measured(other)} == {kernel}
    fp8 = Shape(32, 8, 128, 16, "float8_e4m3fn")
    assert {key.kernel for key in plan(("decode",), fp8)} == {"decode", "decode_hopper"}
    assert {key.kernel for key in plan(("prefill",), fp8)} == {"prefill"}
    assert {key.kernel for key in plan(("decode",), Shape(32, 1, 128, 16))} == {"decode"}
    assert {key.kernel for key in plan(("decode",), Shape(32, 8, 128), Sizes(4, 512, 5, False))} == {"decode"}


def test_one_template_of_a_kernel_is_tuned_alone_with_the_kernel_s_targets():
    """And one that cannot run there is refused, with its kernel as the way out. "prefill" is the kernel, with both of its."""
    for kernel in ("decode", "prefill"):
        both, alone = plan((kernel,)), plan((f"{kernel}_hopper",))
        assert alone == {key: workloads for key, workloads in both.items() if key.kernel == f"{kernel}_hopper"}
        assert len(alone) > 1
        with pytest.raises(UsageError, match=f"--kernel: {kernel}_hopper .* use --kernel {kernel}"):
            plan((f"{kernel}_hopper",), Shape(8, 8, 80, 16))
    (key,) = plan(("prefill_hopper",), Shape(32, 8, 128), Sizes(4, 512, None, False))
    assert plan(("prefill_hopper",), Shape(32, 8, 128), Sizes(4, 512, None, False))[key] == [Workload(4, 512, 512, 8)]
