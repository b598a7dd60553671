"""What measured checkpoints say of predictions: a factor for each candidate, as far as they tell candidates apart.

A checkpoint is predicted to lose Σ_c k_c P_c, with P_c the sum over the decisions that have candidate c. The factors k
are those of least squared relative error, with a ridge towards one that is common to all: a single checkpoint, or
several that are mixed alike, corrects all predictions by the same factor.
"""

from collections.abc import Sequence

import numpy as np

from lowbit_quantize.sensitivity.assignment import Assignment
from lowbit_quantize.sensitivity.report import FP8_CACHE

RIDGE = 0.1  # against one checkpoint's error
LEAST = 0.1  # of the common factor


def factors_of(measured: Sequence[tuple[Assignment, float]]) -> dict[str, float]:
    """What each candidate's predictions are to be multiplied by, of checkpoints and the KL that each was measured at.

    Empty without checkpoints; of candidates that none of them has, it says the common factor.
    """
    if not measured:
        return {}
    names = [*(one.name for one in measured[0][0].found.candidates), FP8_CACHE]
    predicted = np.array(
        [
            [sum(c.kl for _, chosen, c in one.choices if chosen == name) for name in names]
            for one, _ in measured
        ]
    )
    lost = np.array([kl for _, kl in measured])
    common = float(np.exp(np.mean(np.log(lost / predicted.sum(1)))))
    rows = np.concatenate([predicted * common / lost[:, None], np.sqrt(RIDGE) * np.eye(len(names))])
    aims = np.concatenate([np.ones(len(lost)), np.full(len(names), np.sqrt(RIDGE))])
    found = np.linalg.lstsq(rows, aims, rcond=None)[0].clip(min=LEAST)
    return {name: common * float(one) for name, one in zip(names, found, strict=True)}
