"""The scaling curve of a family: held-out loss over parameters and training tokens.

    python benchmarks/scaling.py RUN [RUN ...] [--picture docs/scaling.png]

Every RUN is a finished run of `optlm pretrain` of one recipe, its learning rate brought down by the
end, so a run gives one point. Fitted is the form of Hoffmann et al. 2022 (arXiv 2203.15556,
section 3.3),

    L(N, D) = E + A / N^alpha + B / D^beta,

by the Huber loss of log L (delta 1e-3) from many starts. N counts all parameters, D the tokens
that were read, L is the mean of the domains' bits per byte at the last validation. The interval
comes from drawing the runs anew, with replacement (bootstrap, 90 %). The fit is also
tested on what it has not seen: each run predicted from the others.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import minimize

from optlm.config import OPTConfig
from report import Report

DELTA = 1e-3  # Huber's, of log L: as in the paper
STARTS = [
    (a, b, e, alpha, beta)
    for a in (2.0, 6.0)
    for b in (2.0, 6.0)
    for e in (-0.5, 0.0)
    for alpha in (0.2, 0.5)
    for beta in (0.2, 0.5)
]
Points = NDArray[np.float64]  # (R, 3): parameters, tokens, bits per byte


def main() -> None:
    options = arguments()
    found = [point(run) for run in options.runs]
    found.sort(key=lambda row: (row["parameters"], row["tokens"]))
    points = np.array([[row["parameters"], row["tokens"], row["bits"]] for row in found])
    best = fit(points)
    draws = bootstrap(points, best, options.draws)
    for index, row in enumerate(found):
        row["fit"] = float(loss_at(best, points[index : index + 1])[0])
        others = fit(np.delete(points, index, axis=0), starts=[best])
        row["predicted"] = float(loss_at(others, points[index : index + 1])[0])
    headline = told(best, draws) | errors(found)
    Report(
        name="scaling",
        title="Scaling of the mini family",
        method=(
            "L = E + A / N^alpha + B / D^beta, bits per byte, mean of six domains; 90 % intervals "
            f"from {options.draws} bootstrap draws of the {len(found)} runs. `fit`: by all runs; "
            "`predicted`: by the others alone."
        ),
        rows=found,
        columns={key: key for key in found[0]},
        headline=headline,
        packages={},
    ).publish(options, lambda path: draw(path, points, best, draws))
    if options.picture:
        draw(options.picture, points, best, draws)


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("runs", type=Path, nargs="+", metavar="RUN")
    parser.add_argument("--draws", type=int, default=300, help="of the bootstrap (300)")
    parser.add_argument("--picture", type=Path, help="draw the curve here too")
    parser.add_argument("--name", help="name of the result files (scaling)")
    parser.add_argument("--json", help="write the JSON line here too")
    parser.add_argument(
        "--results", type=Path, default=Path(__file__).parent / "results", help="folder"
    )
    return parser.parse_args()


def point(run: Path) -> dict[str, Any]:
    settings = json.loads((run / "run.json").read_text())
    shapes = OPTConfig.from_dict(settings["model"]).parameter_shapes()
    events = [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]
    last = [event for event in events if event["kind"] == "valid"][-1]
    if last["step"] != settings["loop"]["steps"]:
        raise SystemExit(f"{run} was validated at step {last['step']} last: it is not finished")
    return {
        "parameters": sum(int(np.prod(shape)) for shape in shapes.values()),
        "tokens": last["tokens"],
        "bits": last["score"],
    }


# ---- the fit -----------------------------------------------------------------------------------


def loss_at(theta: NDArray[np.float64], points: Points) -> NDArray[np.float64]:
    """Bits per byte (R,) of theta = (log A, log B, log E, alpha, beta)."""
    a, b, e, alpha, beta = theta
    n, d = np.log(points[:, 0]), np.log(points[:, 1])
    return np.exp(a - alpha * n) + np.exp(b - beta * d) + np.exp(e)


def fit(points: Points, starts: Any = STARTS) -> NDArray[np.float64]:
    def cost(theta: NDArray[np.float64]) -> float:
        error = np.abs(np.log(loss_at(theta, points)) - np.log(points[:, 2]))
        huber = np.where(error < DELTA, error**2 / 2, DELTA * (error - DELTA / 2))
        return float(1e6 * huber.sum())

    bounds = [(-10, 20), (-10, 20), (-6, 1), (0.01, 2), (0.01, 2)]
    tries = [minimize(cost, start, method="L-BFGS-B", bounds=bounds) for start in starts]
    best = min(tries, key=lambda found: found.fun)
    polished = minimize(
        cost, best.x, method="Nelder-Mead", bounds=bounds, options={"maxiter": 4000}
    )
    return np.asarray(min((best, polished), key=lambda found: found.fun).x)


def bootstrap(points: Points, best: NDArray[np.float64], draws: int) -> NDArray[np.float64]:
    """(draws, 5): fits of as many runs, drawn with replacement; at least 6 different ones."""
    random, fits = np.random.default_rng(0), []
    while len(fits) < draws:
        chosen = random.integers(len(points), size=len(points))
        if len(set(chosen.tolist())) >= min(6, len(points)):
            fits.append(fit(points[chosen], starts=[best]))
    return np.array(fits)


def told(best: NDArray[np.float64], draws: NDArray[np.float64]) -> dict[str, Any]:
    spread = constants(draws)
    return {
        name: f"{value:.3g} ({np.quantile(spread[name], 0.05):.3g} to "
        f"{np.quantile(spread[name], 0.95):.3g})"
        for name, value in constants(best).items()
    }


def constants(theta: NDArray[np.float64]) -> dict[str, Any]:
    """The constants of the law by name, of one theta (5,) or many (..., 5)."""
    return {
        "A": np.exp(theta[..., 0]),
        "B": np.exp(theta[..., 1]),
        "E (bits per byte)": np.exp(theta[..., 2]),
        "alpha": theta[..., 3],
        "beta": theta[..., 4],
    }


def errors(found: list[dict[str, Any]]) -> dict[str, Any]:
    within = [abs(row["fit"] / row["bits"] - 1) for row in found]
    unseen = [abs(row["predicted"] / row["bits"] - 1) for row in found]
    return {
        "error of the fit, median and largest": f"{np.median(within):.2%}, {max(within):.2%}",
        "error of a run left out": f"{np.median(unseen):.2%}, {max(unseen):.2%}",
    }


def draw(path: Path, points: Points, best: NDArray[np.float64], draws: NDArray[np.float64]) -> None:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 5), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots()
    tokens = np.geomspace(points[:, 1].min() / 1.2, points[:, 1].max() * 2, 60)
    for index, size in enumerate(np.unique(points[:, 0])):
        mine = points[points[:, 0] == size]
        grid = np.stack([np.full_like(tokens, size), tokens, tokens], axis=1)
        band = np.array([loss_at(theta, grid) for theta in draws])
        color = f"C{index}"
        low, high = np.quantile(band, (0.05, 0.95), axis=0)
        axes.fill_between(tokens, low, high, color=color, alpha=0.15, linewidth=0)
        axes.plot(tokens, loss_at(best, grid), color=color, label=f"{size / 1e6:.1f}M parameters")
        axes.plot(mine[:, 1], mine[:, 2], "o", color=color)
    axes.set(xscale="log", xlabel="training tokens", ylabel="bits per byte, mean of six domains")
    axes.set_title("Held-out loss of the mini family: runs, fit, and 90 % interval of the fit")
    axes.grid(alpha=0.3, which="both")
    axes.legend()
    figure.savefig(path, dpi=110)


if __name__ == "__main__":
    main()
