"""Predictions and real swaps combined by hierarchical Bayes: what either is worth is fitted to the study's
own swaps."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import pandas as pd
from scipy import special, stats

from aquabit.sensitivity.effects.predicted import Player
from aquabit.stats import around_replicates, between_percentiles, replicate_errors

CHAINS, SETTLE, KEEP = (
    32,
    80,
    32,
)  # the sampler's size, not the model's: ten times longer runs give the same intervals
FARTHEST = 300.0  # place on the asinh scale that still has a number in units
LEAST_VARIANCE = 1e-12  # of relative noise: swaps that repeat to the last bit would drive it to 0


@dataclass(frozen=True)
class Combined:
    """Per player: the combined effect with its 95 % interval and joint draws [draws, players] of what it may
    be (none without an interval).

    ``ratio``: how many times larger the errors of predictions are than their replicates say, as swaps show; 1
    without swaps, never less.
    """

    effect: np.ndarray
    low: np.ndarray
    high: np.ndarray
    draws: np.ndarray
    ratio: float = 1.0


def combine(
    players: Sequence[Player],
    predicted: np.ndarray,
    replicates: np.ndarray,
    swaps: pd.DataFrame,
    seed: int = 0,
) -> Combined:
    """Predicted effects [players], refitted as ``replicates`` [r, players], combined with real swaps (layer,
    before, after, and what each worsened as ``real``; swaps between other schemes do not count).

    With swaps: medians and 95 % intervals of the posterior of each layer's effect m_l, its mean over contexts
    in the objective's units:

        swap of layer l in context c    y_lc ~ N(m_l, v_l (r^2 + m_l^2)),
                                        or asinh(y_lc / r) ~ N(asinh(exp(-w / 2) m_l / r), v_l)
        layers differ in noise          v_l ~ inverse gamma(nu / 2, nu w / 2)
        effect, given prediction p_l    asinh(m_l / s) ~ a + c + b (asinh(p_l / s) - c) + t Student(f)
                                        c: mean of swapped layers

    Noise grows with effects beyond size r, errors of predictions beyond size s. It is normal in units or,
    where skewed, on the asinh scale, whichever the swaps show; there exp(-w / 2) leads from a mean in units
    to the scale's own, so that m_l is a mean in units in both and nothing is transformed back. A layer that
    was never swapped has a draw of the last line. All else is drawn with m_l, not plugged in, so that few
    swaps give wide intervals. Priors know no units: a and b - 1 are Cauchy(0, 1), sqrt(t^2 + w) is
    half-Cauchy(1) (Gelman 2006; 1 is a factor of e), w / (t^2 + w) uniform (Daniels 1999), 2 / nu and 2 / f
    uniform on (0, 1) (from normal to tails without a variance), log r and log s uniform over the sizes seen,
    both kinds of noise as likely. Replicates do not count. Swaps of different layers are taken to have
    contexts of their own, and to be new to the predictions.

    Without any swap: the predictions, with the intervals of ``around_replicates``. These do not know the
    surrogate's bias; none below two replicates.
    """
    values = [_real(p, swaps) for p in players]
    known = [len(v) > 0 for v in values]
    if not any(known):
        low, high = around_replicates(predicted, replicates)
        return Combined(
            predicted, low, high, predicted + _errors(predicted, replicates, np.random.default_rng([seed, 6]))
        )
    with np.errstate(over="ignore", invalid="ignore"):  # steps too far to compute are not taken
        draws = _posterior(np.asarray(predicted, float), values, np.random.default_rng([seed, 6]))
    effect, (low, high) = np.quantile(draws, 0.5, axis=0), between_percentiles(draws)
    return Combined(effect, low, high, draws, _ratio(predicted[known], replicates[:, known], draws[:, known]))


def _errors(predicted: np.ndarray, replicates: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Draws [draws, players] of a multivariate Student t with the replicates' covariance, so that errors
    that layers share remain in a mean over them; none below two replicates."""
    count = len(replicates)
    if count < 2:
        return np.empty((0, len(predicted)))
    normal = rng.normal(size=(CHAINS * KEEP, count)) @ (replicates - predicted) / np.sqrt(count)
    return np.asarray(normal * np.sqrt(count / rng.chisquare(count, (CHAINS * KEEP, 1))))


def real_means(players: Sequence[Player], swaps: pd.DataFrame) -> tuple[np.ndarray, np.ndarray]:
    """The mean [players] of each player's real swaps (NaN without), and their number."""
    values = [_real(p, swaps) for p in players]
    return np.array([v.mean() if len(v) else np.nan for v in values]), np.array([len(v) for v in values])


def _real(player: Player, swaps: pd.DataFrame) -> np.ndarray:
    own = (
        (swaps.layer == player.layer)
        & (swaps.before == str(player.before))
        & (swaps.after == str(player.after))
    )
    return swaps.real[own].to_numpy(float)


def _ratio(predicted: np.ndarray, replicates: np.ndarray, draws: np.ndarray) -> float:
    """The median distance of ``draws`` [draws, swapped layers] from predictions, over the one that
    replicates expect; at least 1."""
    if len(replicates) < 2:
        return 1.0
    error = replicate_errors(predicted, replicates)
    distance = np.abs(draws - predicted)[:, error > 0] / error[error > 0]
    return (
        max(1.0, float(np.median(distance)) / float(stats.t.ppf(0.75, len(replicates))))
        if distance.size
        else 1.0
    )


@dataclass(frozen=True)
class _Data:
    """Swaps one after the other; of each swapped layer their number, mean and sum of squares, and the
    prediction [k]; each number of swaps, and of layers that have it; the range of log sizes."""

    values: np.ndarray
    count: np.ndarray
    mean: np.ndarray
    squares: np.ndarray
    predicted: np.ndarray
    numbers: tuple[np.ndarray, np.ndarray]
    sizes: tuple[float, float]

    def sums(self, values: np.ndarray) -> np.ndarray:
        """[..., swaps] added up by layer, [..., k]."""
        return np.asarray(
            np.add.reduceat(values, np.cumsum(self.count.astype(int)) - self.count.astype(int), axis=-1)
        )


@dataclass(frozen=True)
class _State:
    """One draw a chain [chains], of the letters of ``combine``; variances and sizes as logarithms."""

    a: np.ndarray
    b: np.ndarray
    log_t2: np.ndarray
    log_w: np.ndarray
    log_s: np.ndarray
    log_r: np.ndarray
    error_tail: np.ndarray  # 2 / f
    noise_tail: np.ndarray  # 2 / nu
    skewed: np.ndarray  # whether noise is normal on the asinh scale, else in units
    place: np.ndarray  # asinh(m / s) [chains, k]
    line: np.ndarray  # asinh(p / s) [chains, k]
    on_scale: (
        np.ndarray
    )  # swaps on the asinh scale of r: mean, sum of squares, and log of the scale's slope, [chains, 3, k]

    def where(self, accepted: np.ndarray, other: _State) -> _State:
        """``other`` in the accepted chains."""
        mine, theirs = self.__dict__, other.__dict__
        return _State(
            **{k: np.where(accepted.reshape(-1, *[1] * (v.ndim - 1)), theirs[k], v) for k, v in mine.items()}
        )


def _posterior(predicted: np.ndarray, values: Sequence[np.ndarray], rng: np.random.Generator) -> np.ndarray:
    """Draws [CHAINS x KEEP, players] of effects in units: Gibbs and Metropolis steps in CHAINS chains that
    run side by side."""
    known = np.array([len(v) > 0 for v in values])
    sizes = np.abs(np.concatenate([predicted, *values]))
    sizes = np.log(sizes[sizes > 0]) if sizes.any() else np.zeros(1)
    own = [v for v in values if len(v)]
    count, mean = np.array([len(v) for v in own], float), np.array([v.mean() for v in own])
    squares = np.array([np.square(v - v.mean()).sum() for v in own])
    numbers = np.unique(count, return_counts=True)
    data = _Data(
        np.concatenate(own),
        count,
        mean,
        squares,
        predicted[known],
        numbers,
        (float(sizes.min()), float(sizes.max())),
    )
    log_s, log_r = np.clip(np.median(sizes) + rng.normal(size=(2, CHAINS)), *data.sizes)
    size = np.exp(log_s)[:, None]
    line = np.arcsinh(data.predicted / size)
    place = np.arcsinh(data.mean / size)
    (log_t2, log_w), tails, zero = (
        rng.normal(-1, 1, (2, CHAINS)),
        rng.uniform(size=(3, CHAINS)),
        np.zeros(CHAINS),
    )
    scales = (log_t2, log_w, log_s, log_r)
    state = _State(
        zero, zero + 1, *scales, tails[0], tails[1], tails[2] < 0.5, place, line, _on_scale(log_r, data)
    )
    found = []
    for sweep in range(SETTLE + KEEP):
        for step in _STEPS:
            state = step(state, data, rng)
        if sweep >= SETTLE:
            apart = rng.standard_t(2 / state.error_tail[:, None], (CHAINS, len(predicted)))
            place = (
                _line(state, np.arcsinh(predicted / np.exp(state.log_s)[:, None]))
                + np.exp(state.log_t2 / 2)[:, None] * apart
            )
            place[:, known] = state.place
            found.append(np.exp(state.log_s)[:, None] * np.sinh(np.clip(place, -FARTHEST, FARTHEST)))
    return np.concatenate(found)


def _line(state: _State, predicted: np.ndarray) -> np.ndarray:
    """Expected places [chains, n] of layers whose ``predicted`` effects [chains, n] are on the asinh
    scale."""
    center = state.line.mean(1, keepdims=True)
    return np.asarray(state.a[:, None] + center + state.b[:, None] * (predicted - center))


def _on_scale(log_r: np.ndarray, data: _Data) -> np.ndarray:
    """What ``_State.on_scale`` holds."""
    size = np.exp(log_r)[:, None]
    places = np.arcsinh(data.values / size)
    mean = data.sums(places) / data.count
    squares = np.maximum(data.sums(np.square(places)) - data.count * np.square(mean), 0)
    return np.stack([mean, squares, data.sums(np.log(np.hypot(size, data.values)))], 1)


def _fit_of_swaps(state: _State, data: _Data) -> np.ndarray:
    """Log likelihood [chains, k] of the swaps of each layer, its noise integrated over (a Student t),
    without ``_gammas``."""
    n, nu, w = data.count, 2 / state.noise_tail[:, None], np.exp(state.log_w)[:, None]
    effect, size = np.exp(state.log_s)[:, None] * np.sinh(state.place), np.exp(state.log_r)[:, None]
    apart, slope = np.empty_like(effect), np.empty_like(effect)
    plain, skewed = ~state.skewed, state.skewed
    square = np.square(size[plain]) + np.square(effect[plain])
    apart[plain] = (data.squares + n * np.square(data.mean - effect[plain])) / square
    slope[plain] = n / 2 * np.log(square)
    mean, squares, slope[skewed] = np.moveaxis(state.on_scale[skewed], 1, 0)
    apart[skewed] = squares + n * np.square(
        mean - np.arcsinh(effect[skewed] / size[skewed] * np.exp(-w[skewed] / 2))
    )
    return np.asarray(-n / 2 * np.log(nu * w) - (nu + n) / 2 * np.log1p(apart / (nu * w)) - slope)


def _gammas(tail: np.ndarray, numbers: np.ndarray, layers: np.ndarray | int) -> np.ndarray:
    """The part [chains] of log densities of Student's t that the degrees of freedom alone decide, for so
    many ``layers`` of each number of values."""
    freedom = 2 / tail[:, None]
    return np.asarray(
        ((special.gammaln((freedom + numbers) / 2) - special.gammaln(freedom / 2)) * layers).sum(1)
    )


def _fit_of_places(state: _State, data: _Data) -> np.ndarray:
    """Log density [chains, k] of places around the line, a Student t, without ``_gammas``."""
    freedom, t2 = 2 / state.error_tail[:, None], np.exp(state.log_t2)[:, None]
    apart = np.square(state.place - _line(state, state.line))
    return np.asarray(-(freedom + 1) / 2 * np.log1p(apart / (freedom * t2)) - np.log(freedom * t2) / 2)


def _prior_of_variances(state: _State) -> np.ndarray:
    """Log density [chains] of (log t^2, log w): their sum's root half-Cauchy, w's share of it uniform."""
    both = np.logaddexp(state.log_t2, state.log_w)
    return np.asarray(state.log_t2 + state.log_w - 1.5 * both - np.logaddexp(0, both))


def _jump(rng: np.random.Generator, *shape: int) -> np.ndarray:
    """Steps of a random walk, small to large, so that none has to be tuned."""
    return np.asarray(rng.normal(size=shape) * np.exp(rng.uniform(-3, 1, size=shape)))


def _accepted(rng: np.random.Generator, gain: np.ndarray) -> np.ndarray:
    return np.asarray(np.log(rng.uniform(size=gain.shape)) < gain)


def _move_tail(tail: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """A step within (0, 1): one that leads out leads back."""
    moved = np.abs(tail + _jump(rng, CHAINS) / 2) % 2
    return np.clip(np.where(moved > 1, 2 - moved, moved), 1e-6, 1)


def _move_places(state: _State, data: _Data, rng: np.random.Generator) -> _State:
    """Each layer's place by itself: a draw from about where the line and its swaps lead to expect it, then
    a step."""
    s, r, center = np.exp(state.log_s)[:, None], np.exp(state.log_r)[:, None], _line(state, state.line)
    ours, theirs = np.exp(-state.log_t2)[:, None], data.count * np.exp(-state.log_w)[:, None]
    theirs = theirs * (np.square(s) + np.square(data.mean)) / (np.square(r) + np.square(data.mean))
    middle, reach = (
        (ours * center + theirs * np.arcsinh(data.mean / s)) / (ours + theirs),
        1 / np.sqrt(ours + theirs),
    )
    before = _fit_of_swaps(state, data) + _fit_of_places(state, data)
    for step in range(2):
        if step == 0:
            place = middle + reach * rng.standard_t(3, state.place.shape)
            old, new = (np.square((at - middle) / reach) for at in (state.place, place))
            toward = 2 * np.log1p(new / 3) - 2 * np.log1p(
                old / 3
            )  # the density of the old place under the draw, over that of the new
        else:
            place, toward = state.place + 2 * reach * _jump(rng, *state.place.shape), 0.0
        moved = replace(state, place=place)
        after = _fit_of_swaps(moved, data) + _fit_of_places(moved, data)
        taken = _accepted(rng, after - before + toward)
        state, before = (
            replace(state, place=np.where(taken, place, state.place)),
            np.where(taken, after, before),
        )
    return state


def _move_line(state: _State, data: _Data, rng: np.random.Generator) -> _State:
    """a and b, exactly: Gaussian given places, and the variances whose mixture makes errors Student's and
    priors Cauchy."""
    center, freedom, t2 = (
        state.line.mean(1, keepdims=True),
        2 / state.error_tail[:, None],
        np.exp(state.log_t2)[:, None],
    )
    x, y = state.line - center, state.place - center
    apart = np.square(y - state.a[:, None] - state.b[:, None] * x)
    precision = rng.gamma((freedom + 1) / 2, size=y.shape) * 2 / (freedom * t2 + apart)

    def drawn(old: np.ndarray, middle: float, along: np.ndarray | float, left: np.ndarray) -> np.ndarray:
        own = rng.gamma(1, size=CHAINS) * 2 / (1 + np.square(old - middle))  # precision of the prior
        total = (precision * np.square(along)).sum(1) + own
        return np.asarray(
            ((precision * along * left).sum(1) + middle * own) / total
            + rng.normal(size=CHAINS) / np.sqrt(total)
        )

    a = drawn(state.a, 0, 1.0, y - state.b[:, None] * x)
    return replace(state, a=a, b=drawn(state.b, 1, x, y - a[:, None]))


def _move_errors(state: _State, data: _Data, rng: np.random.Generator) -> _State:
    """t and the tail of prediction errors, given places, twice."""

    def density(at: _State) -> np.ndarray:
        return np.asarray(
            _fit_of_places(at, data).sum(1)
            + _gammas(at.error_tail, np.ones(1), len(data.count))
            + _prior_of_variances(at)
        )

    for _ in range(2):
        log_t2 = np.maximum(state.log_t2 + _jump(rng, CHAINS), np.log(LEAST_VARIANCE))
        moved = replace(state, log_t2=log_t2, error_tail=_move_tail(state.error_tail, rng))
        state = state.where(_accepted(rng, density(moved) - density(state)), moved)
    return state


def _move_together(state: _State, data: _Data, rng: np.random.Generator) -> _State:
    """a, b and t, then t and w with their sum kept, all places moved along: what frees the chain where t
    is small beside the noise."""
    for step in range(2):
        if step == 0:
            reach = np.sqrt(np.exp(state.log_w) / len(data.count))
            moved = replace(
                state,
                a=state.a + reach * _jump(rng, CHAINS),
                b=state.b + reach * _jump(rng, CHAINS),
                log_t2=state.log_t2 + _jump(rng, CHAINS),
            )
        else:
            both, odds = (
                np.logaddexp(state.log_t2, state.log_w),
                state.log_w - state.log_t2 + 2 * _jump(rng, CHAINS),
            )
            moved = replace(state, log_t2=both - np.logaddexp(0, odds), log_w=both - np.logaddexp(0, -odds))
        ratio = np.exp((moved.log_t2 - state.log_t2) / 2)[:, None]
        moved = replace(
            moved, place=_line(moved, state.line) + ratio * (state.place - _line(state, state.line))
        )
        gain = [
            _fit_of_swaps(at, data).sum(1)
            + _prior_of_variances(at)
            - np.log1p(at.a**2)
            - np.log1p((at.b - 1) ** 2)
            for at in (state, moved)
        ]
        possible = np.minimum(moved.log_t2, moved.log_w) > np.log(LEAST_VARIANCE)
        state = state.where(possible & _accepted(rng, gain[1] - gain[0]), moved)
    return state


def _move_noise(state: _State, data: _Data, rng: np.random.Generator) -> _State:
    """w and nu, twice, then r, then the scale that noise is normal on."""

    def density(at: _State) -> np.ndarray:
        return np.asarray(
            _fit_of_swaps(at, data).sum(1) + _gammas(at.noise_tail, *data.numbers) + _prior_of_variances(at)
        )

    before = density(state)
    for step in range(4):
        inside = np.ones(CHAINS, bool)
        if step < 2:
            log_w = np.maximum(state.log_w + _jump(rng, CHAINS), np.log(LEAST_VARIANCE))
            moved = replace(state, log_w=log_w, noise_tail=_move_tail(state.noise_tail, rng))
        elif step == 2:
            change = _jump(rng, CHAINS)
            log_r = np.clip(state.log_r + change, *data.sizes)
            inside = log_r == state.log_r + change
            log_w = state.log_w - 2 * change * rng.integers(
                2, size=CHAINS
            )  # in half of them w r^2 stays, the noise of small effects
            moved = replace(state, log_r=log_r, log_w=log_w, on_scale=_on_scale(log_r, data))
        else:
            moved = replace(state, skewed=~state.skewed)
        after = density(moved)
        taken = inside & _accepted(rng, after - before)
        state, before = state.where(taken, moved), np.where(taken, after, before)
    return state


def _move_size(state: _State, data: _Data, rng: np.random.Generator) -> _State:
    """s, with effects in units where they are."""
    change = _jump(rng, CHAINS)
    log_s = np.clip(state.log_s + change, *data.sizes)
    place = np.arcsinh(np.exp(state.log_s - log_s)[:, None] * np.sinh(state.place))
    moved = replace(state, log_s=log_s, place=place, line=np.arcsinh(data.predicted / np.exp(log_s)[:, None]))

    def density(at: _State) -> np.ndarray:
        jacobian = at.log_s[:, None] + np.log(
            np.cosh(at.place)
        )  # of effects in units, which stay, for places
        return np.asarray((_fit_of_places(at, data) - jacobian).sum(1))

    return state.where(
        (log_s == state.log_s + change) & _accepted(rng, density(moved) - density(state)), moved
    )


_STEPS = (_move_places, _move_line, _move_errors, _move_together, _move_noise, _move_size)
