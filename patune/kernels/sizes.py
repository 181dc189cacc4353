"""Integer arithmetic of launches. Triton's own versions take 4 µs a call on the host, because they also serve kernels."""

MAX_GRID_Y = 65535  # programs along the second and third axis of a grid, CUDA C++ programming guide, technical specifications


def ceil_div(a: int, b: int) -> int:
    return -(-a // b)


def exceeds_registers(block_m: int, block_n: int, head_dim: int, warps: int) -> bool:
    """Whether a program of head_dim above 256 has more than 4 rows or keys a warp.

    Compiled for sm_90, both plain templates: up to there nothing spills, beyond it nearly everything does or takes 240 registers.
    """
    return head_dim > 256 and max(block_m, block_n) > 4 * warps


def next_power_of_2(n: int) -> int:
    """The smallest power of two that is at least n; 1 for n <= 1."""
    return 1 << (n - 1).bit_length() if n > 1 else 1
