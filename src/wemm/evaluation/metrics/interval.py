"""How far a mean of scores may be from the model's true one, given that only so many questions were asked."""

from __future__ import annotations

import math

from wemm.errors import ParameterError

_Z = 1.959964  # 95 %, both sides


def wilson_interval(share: float, total: int) -> tuple[float, float]:
    """95 % interval (low, high) of a mean `share` of `total` scores, both in 0..1. Raises ParameterError.

    Wilson's interval is made for right and wrong answers. Scores between 0 and 1 vary less than coin flips of the
    same mean m, whose variance m(1 - m) is the most there can be: for them it holds at least 95 %.
    The questions have to be independent: ten about one picture tell less than ten about ten. `total` 0: (0, 1).
    """
    if total < 0 or not 0 <= share <= 1:
        raise ParameterError(
            f"an interval needs a share in 0..1 of 0 or more questions. Given: {share} of {total}"
        )
    if total == 0:
        return 0.0, 1.0
    z2 = _Z * _Z
    middle = (share + z2 / (2 * total)) / (1 + z2 / total)
    half = _Z * math.sqrt(share * (1 - share) / total + z2 / (4 * total * total)) / (1 + z2 / total)
    # Rounding must not put the share itself outside.
    return max(0.0, min(share, middle - half)), min(1.0, max(share, middle + half))
