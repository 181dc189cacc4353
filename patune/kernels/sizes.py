"""Integer arithmetic of launches. Triton's own versions take 4 µs a call on the host, because they also serve kernels."""

MAX_GRID_Y = 65535  # programs along the second and third axis of a grid, CUDA C++ programming guide, technical specifications


def ceil_div(a: int, b: int) -> int:
    return -(-a // b)


def next_power_of_2(n: int) -> int:
    """The smallest power of two that is at least n; 1 for n <= 1."""
    return 1 << (n - 1).bit_length() if n > 1 else 1
