"""A number that was measured with several seeds on the same patients: its mean, and what chance of either kind makes of it."""

from collections.abc import Sequence

import numpy as np
from scipy.special import stdtrit


def mean_of_seeds(values: Sequence[float], lows: Sequence[float], highs: Sequence[float]) -> tuple[float, float, float]:
    """Mean of `values` `(S,)` over seeds, and the bounds of a 95 % interval that joins seeds and patients.

    The seeds' part is Student's interval of their mean. The patients' part is the mean distance of `values` to their own bounds, `lows`
    and `highs` `(S,)`, by patient bootstrap: more seeds do not make it smaller, since all of them are tested on the same patients. The
    two are independent, so their squares add up. One seed has the patients' part alone.
    """
    values = np.asarray(values, np.float64)
    mean, count = values.mean(), len(values)
    seeds = stdtrit(count - 1, 0.975) * values.std(ddof=1) / np.sqrt(count) if count > 1 else 0.0
    below, above = (np.mean(side) for side in (values - lows, np.asarray(highs) - values))
    return float(mean), float(mean - np.hypot(seeds, below)), float(mean + np.hypot(seeds, above))
