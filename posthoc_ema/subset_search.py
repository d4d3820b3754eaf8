"""Search for the subset of the stored averages whose predicted error is least.

Every target is a least-squares problem on the same Gram matrix G of the kept averages, under
sum x_i = 1 (`fit`). Let C be the inverse of G on that constraint, C = G^-1 - G^-1 1 1' G^-1 / (1' G^-1 1),
and f_j the squared error of target j. Then

- without average i:  f_j + x_ij^2 / C_ii;
- with average r too: f_j - n_rj^2 / s_r, where s_r is the squared distance of r from the best combination
  of the kept ones and n_rj the inner product of the two residuals;
- without i and with r: both, n_rj and s_r becoming n_rj + y_ir x_ij / C_ii and s_r + y_ir^2 / C_ii, where y_r
  are the coefficients of that best combination.

So all removals, or all exchanges, of all averages are judged for all targets at once. Removing the
cheapest one by one and then exchanging pairs until none helps comes within a few per cent of the best
choice that hundreds of random restarts find (docs/how-to/plan-and-prune.md).
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Literal

import numpy as np
import numpy.typing as npt

from posthoc_ema.errors import ConfigError
from posthoc_ema.least_squares import FLOOR, IntArray, LeastSquares
from posthoc_ema.profiles import FloatArray

Criterion = Literal["worst", "mean-log"]

_RESTARTS = 40  # of the exchanges, from a disturbed choice; only while they are cheap
_EFFORT = 3e9  # multiplications that exchanges may cost, about: some seconds


class SubsetSearch:
    """Subsets by removal and exchange; one of the averages that end last always stays.

    Args:
        problem: errors of subsets.
        criterion: "worst" makes the largest error small, "mean-log" the geometric mean.
        sizes: size of each average, > 0, (num_inputs,).
        ends: training time at which each ends, (num_inputs,).
    """

    def __init__(
        self, problem: LeastSquares, criterion: Criterion, sizes: FloatArray, ends: FloatArray
    ) -> None:
        self.problem = problem
        self.worst = criterion == "worst"
        self.sizes = sizes
        self.is_last = ends == ends.max()
        self.all = np.arange(len(sizes))

    def of_count(self, keep: int) -> IntArray:
        """`keep` of them, rising indices."""
        kept = self.all
        for kept in self._removals():
            if len(kept) <= keep:
                break
        return self._improved(kept)

    def of_size(self, most: float) -> IntArray:
        """As good as possible with sizes that sum to `most` at most.

        Raises:
            ConfigError: `most` holds none of the last.
        """
        if not most >= self.sizes[self.is_last].min():
            raise ConfigError(
                f"max_bytes must hold at least one average of the last time, "
                f"{self.sizes[self.is_last].min():.0f} bytes, got {most:.0f}."
            )
        kept = self.all
        for kept in self._removals():
            if self.sizes[kept].sum() <= most:
                break
        kept = self._improved(kept, most)
        while True:  # what is left over may hold a smaller one
            room = most - self.sizes[kept].sum()
            others = np.setdiff1d(self.all, kept)
            others = others[self.sizes[others] <= room]
            if len(others) == 0:
                return kept
            trials = [self._cost(self.problem.solve(_with(kept, r)).f) for r in others]
            kept = _with(kept, others[int(np.argmin(trials))])

    def of_error(self, most: float, unit: float) -> IntArray:
        """As few as possible with a worst error of `most`; errors are `unit` times sqrt(f).

        Raises:
            ConfigError: all together are not that good.
        """

        def error(kept: IntArray) -> float:
            return float(unit * np.sqrt(self.problem.solve(kept).f.max()))

        if not most >= error(self.all):
            raise ConfigError(
                f"max_error must be at least what all {len(self.all)} stored averages give, "
                f"{error(self.all):.2e}, got {most:g}."
            )
        best, path = self.all, list(self._removals())
        low, high = 0, len(path)  # subsets of the path before `low` are good enough
        while low < high:
            middle = (low + high) // 2
            low, high = (middle + 1, high) if error(path[middle]) <= most else (low, middle)
        if low:
            best = path[low - 1]
        for kept in path[low:]:  # with exchanges some more can go
            trial = self._improved(kept)
            if error(trial) > most:
                break
            best = trial
        return best

    def _cost(self, f: FloatArray) -> FloatArray:
        """What exchanges make small; over the last axis, the targets."""
        if self.worst:
            return f.max(axis=-1) + 1e-3 * f.mean(axis=-1)  # a little of all breaks ties
        return np.log(f).mean(axis=-1)

    def _removal_cost(self, f: FloatArray) -> FloatArray:
        """What removals make small. Sums foresee the next removals better than the largest."""
        return f.sum(axis=-1) if self.worst else np.log(f).sum(axis=-1)

    def _removals(self) -> Iterator[IntArray]:
        """All, then subsets that are one smaller each, by taking out what costs least per byte.

        Columns of C after m removals are those at the last solve less m rank-one terms, which is cheap
        while m is small; solving anew now and then also keeps rounding from piling up.
        """
        kept = self.all
        yield kept
        while len(kept) > 1:
            solution = self.problem.solve(kept)
            x, f, diagonal = solution.x, solution.f, np.diag(solution.constrained).copy()
            alive = np.ones(len(kept), dtype=bool)
            rounds = max(1, min(len(kept) - 1, len(kept) // 5))
            terms = np.zeros((rounds, len(kept)))
            for done in range(rounds):
                cost = self._removal_costs(f, x, diagonal, kept, alive)
                i = int(np.argmin(cost))
                column = solution.constrained[i] - terms[:done, i] @ terms[:done]
                column[~alive] = 0
                terms[done] = column / np.sqrt(column[i])
                f = f + x[i] ** 2 / column[i]
                x = x - np.outer(column, x[i] / column[i])
                diagonal = diagonal - terms[done] ** 2
                alive[i] = False
                yield kept[alive]
            kept = kept[alive]

    def _removal_costs(
        self,
        f: FloatArray,
        x: FloatArray,
        diagonal: FloatArray,
        kept: IntArray,
        alive: npt.NDArray[np.bool_],
    ) -> FloatArray:
        raised = f + x**2 / np.maximum(diagonal, 1e-300)[:, None]
        cost = (self._removal_cost(raised) - self._removal_cost(f)) / self.sizes[kept]
        fixed = self.is_last[kept]
        stays = fixed if (fixed & alive).sum() == 1 else np.zeros_like(alive)
        return np.where(alive & ~stays, cost, np.inf)

    def _improved(self, kept: IntArray, most: float = np.inf) -> IntArray:
        """Exchanges until none helps, then again from slightly disturbed choices."""
        num_out = len(self.all) - len(kept)
        if num_out == 0:
            return kept
        if len(kept) == 1:
            return self._best_single(most)
        effort = len(kept) * num_out * (len(kept) + 8.0 * len(self.problem.squares))
        steps = int(max(4, _EFFORT / effort))
        best, used = self._exchange(kept, most, steps)
        best_cost = float(self._cost(self.problem.solve(best).f))
        rng = np.random.default_rng(0)  # the same disturbances every time
        for _ in range(_RESTARTS):
            if steps - used < 40:
                break
            trial = self._disturbed(best, rng, most)
            trial, more = self._exchange(trial, most, steps - used)
            used += more
            cost = float(self._cost(self.problem.solve(trial).f))
            if cost < best_cost * (1 - 1e-6) if self.worst else cost < best_cost - 1e-6:
                best, best_cost = trial, cost
        return best

    def _best_single(self, most: float) -> IntArray:
        """Of those that end last, the one that is nearest to all targets by itself."""
        able = np.flatnonzero(self.is_last & (self.sizes <= most))
        gram = np.diag(self.problem.gram)[able, None]
        f = self.problem.squares - 2 * self.problem.products[able] + gram
        return able[[int(np.argmin(self._cost(np.maximum(f, FLOOR))))]]

    def _disturbed(self, kept: IntArray, rng: np.random.Generator, most: float) -> IntArray:
        others = np.setdiff1d(self.all, kept)
        num = min(3, len(kept), len(others))
        out, new = rng.choice(kept, num, replace=False), rng.choice(others, num, replace=False)
        trial = np.sort(np.append(np.setdiff1d(kept, out), new))
        sound = self.is_last[trial].any() and self.sizes[trial].sum() <= most
        return trial if sound else kept

    def _exchange(self, kept: IntArray, most: float, steps: int) -> tuple[IntArray, int]:
        """The best exchange, again and again; the result and how many steps it took."""
        cost = float(self._cost(self.problem.solve(kept).f))
        for step in range(steps):
            i, r = self._best_exchange(kept, most)
            if i < 0:
                return kept, step + 1
            trial = _with(np.delete(kept, i), r)
            new = float(self._cost(self.problem.solve(trial).f))
            if not (new < cost * (1 - 1e-6) if self.worst else new < cost - 1e-6):
                return kept, step + 1
            kept, cost = trial, new
        return kept, steps

    def _best_exchange(self, kept: IntArray, most: float) -> tuple[int, int]:
        """Position in `kept` and new input of the exchange with the least cost; (-1, -1) if none."""
        s = self.problem.solve(kept)
        others = np.setdiff1d(self.all, kept)
        gram, across = self.problem.gram[np.ix_(kept, kept)], self.problem.gram[kept][:, others]
        y = s.constrained @ across + s.mean[:, None]
        shared = gram @ y
        distance = np.diag(self.problem.gram)[others] + np.sum(y * (shared - 2 * across), axis=0)
        gradient = self.problem.products[others] - across.T @ s.x
        common = gradient - y.T @ (self.problem.products[kept] - gram @ s.x)
        room = most - self.sizes[kept].sum()
        only_last = self.is_last[kept].sum() == 1
        found, best = (-1, -1), np.inf
        for i in range(len(kept)):
            share = y[i] / s.constrained[i, i]
            raised = s.f + s.x[i] ** 2 / s.constrained[i, i]
            gain = (common + np.outer(share, s.x[i])) ** 2
            gain /= np.maximum(distance + share * y[i], 1e-300)[:, None]
            cost = self._cost(np.maximum(raised - gain, FLOOR))
            bad = self.sizes[others] - self.sizes[kept[i]] > room
            if only_last and self.is_last[kept[i]]:
                bad |= ~self.is_last[others]
            cost = np.where(bad, np.inf, cost)
            r = int(np.argmin(cost))
            if cost[r] < best:
                found, best = (i, int(others[r])), float(cost[r])
        return found


def _with(kept: IntArray, new: int) -> IntArray:
    return np.sort(np.append(kept, new))
