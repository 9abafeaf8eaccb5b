"""How near a number in bf16 is to the exact one."""

from torch import Tensor


def assert_rounded_once(found: Tensor, exact: Tensor, size: Tensor | None = None) -> None:
    """Whether bf16 numbers are as near to exact ones as they can be, but for fp32's error in sums of such a size."""
    in_fp32 = 2**-23 * (exact.abs() if size is None else size)
    half_a_step = 2.0 ** (exact.frexp().exponent - 9)
    assert ((found.double() - exact).abs() <= half_a_step + in_fp32).all()
