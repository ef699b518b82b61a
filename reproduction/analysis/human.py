"""Tables of human learning and forgetting, fitted by the same code as the model's practice curves.

Source: Ebbinghaus, *Über das Gedächtnis* (1885), English by Ruger and Bussenius (1913), public domain.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from reproduction.analysis.practice import LogNormal, PracticeFit, aic_weights, compare, line_exponent


@dataclass(frozen=True, kw_only=True)
class HumanTable:
    """One table.

    Attributes:
        what: the measured quantity.
        x: the independent variable, in `unit`.
        y: measured values, in per cent or repetitions.
        unit: unit of x.
    """

    what: str
    x: tuple[float, ...]
    y: tuple[float, ...]
    unit: str


TABLES: dict[str, HumanTable] = {
    "savings": HumanTable(
        what="work saved at relearning, %",
        x=(0.33, 1.0, 8.8, 24.0, 48.0, 144.0, 744.0),
        y=(58.2, 44.2, 35.8, 33.7, 27.8, 25.4, 21.1),
        unit="delay, hours",
    ),
    "relearning, 12 syllables": HumanTable(
        what="repetitions to relearn nine series", x=(1, 2, 3, 4, 5, 6), y=(158, 109, 75, 56, 37, 31), unit="day"
    ),
    "relearning, 24 syllables": HumanTable(
        what="repetitions to relearn three series", x=(1, 2, 3, 4, 5, 6), y=(134, 71, 40, 25, 17, 14), unit="day"
    ),
}


@dataclass(frozen=True, kw_only=True)
class HumanFit:
    """Fits of the laws to a table.

    Attributes:
        fits: fits by law, best first.
        weights: Akaike weights.
        exponent: exponent of the power law: value and 95% interval from resampled residuals.
    """

    fits: dict[str, PracticeFit]
    weights: dict[str, float]
    exponent: tuple[float, float, float]


def fit_table(table: HumanTable, *, n_resamples: int = 200, seed: int = 0) -> HumanFit:
    """Fits all laws to one table; x is scaled to begin at 1, which changes no exponent."""
    x = np.array(table.x) / table.x[0]
    y = np.array(table.y)
    fits = compare(x, LogNormal(y))
    power = fits["power"].curve(x)
    residual = np.log(y / power)
    residual = residual * np.sqrt(len(x) / (len(x) - 2))  # two parameters have been fitted
    rng = np.random.default_rng(seed)
    # Under errors of this kind the likeliest power law is the line through the logs.
    again = [line_exponent(x, power * np.exp(rng.choice(residual, len(x)))) for _ in range(n_resamples)]
    low, high = np.percentile(again, (2.5, 97.5))
    return HumanFit(
        fits=fits,
        weights=aic_weights(fits),
        exponent=(fits["power"].parameters["exponent"], float(low), float(high)),
    )
