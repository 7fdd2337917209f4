"""Draws from the hierarchical model of real swaps and predicted effects: Gibbs and Metropolis steps in chains
that run side by side."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
from scipy import special

# the sampler's size, not the model's: ten times longer runs give the same intervals
CHAINS, SETTLE, KEEP = 32, 80, 32
DRAWS = CHAINS * KEEP
FARTHEST = 300.0  # place on the asinh scale that still has a number in units
LEAST_VARIANCE = 1e-12  # of relative noise: swaps that repeat to the last bit would drive it to 0


@dataclass(frozen=True)
class _Data:
    """Swaps one after the other; of each swapped layer their number, mean and sum of squares, and the
    prediction [k]; each number of swaps, and of layers that have it; the logarithms of all sizes seen."""

    values: np.ndarray
    count: np.ndarray
    mean: np.ndarray
    squares: np.ndarray
    predicted: np.ndarray
    numbers: tuple[np.ndarray, np.ndarray]
    sizes: np.ndarray

    def sums(self, values: np.ndarray) -> np.ndarray:
        """[..., swaps] added up by layer, [..., k]."""
        count = self.count.astype(int)
        return np.asarray(np.add.reduceat(values, np.cumsum(count) - count, axis=-1))

    def clipped(self, log_size: np.ndarray) -> np.ndarray:
        """Within the range of sizes seen."""
        return np.clip(log_size, self.sizes.min(), self.sizes.max())


@dataclass(frozen=True)
class _State:
    """One draw a chain [chains], of the letters of ``draw_effects``; variances and sizes as logarithms."""

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
    # swaps on the asinh scale of r: mean, sum of squares, and log of the scale's slope, [chains, 3, k]
    on_scale: np.ndarray

    def where(self, accepted: np.ndarray, other: _State) -> _State:
        """``other`` in the accepted chains."""
        pairs = ((k, v, getattr(other, k)) for k, v in self.__dict__.items())
        return _State(**{k: np.where(accepted.reshape(-1, *[1] * (v.ndim - 1)), w, v) for k, v, w in pairs})


def draw_effects(predicted: np.ndarray, values: Sequence[np.ndarray], rng: np.random.Generator) -> np.ndarray:
    """Draws [DRAWS, layers] of each layer's effect m_l, its mean over contexts in the objective's units,
    given ``predicted`` effects [layers] and what each layer's real swaps worsened (``values``):

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
    both kinds of noise as likely. Swaps of different layers are taken to have contexts of their own, and to
    be new to the predictions.
    """
    known = np.array([len(v) > 0 for v in values])
    data = _data(predicted, values)
    state, found = _start(data, rng), []
    for sweep in range(SETTLE + KEEP):
        for step in _STEPS:
            state = step(state, data, rng)
        if sweep >= SETTLE:
            size, spread = np.exp(state.log_s)[:, None], np.exp(state.log_t2 / 2)[:, None]
            apart = rng.standard_t(2 / state.error_tail[:, None], (CHAINS, len(predicted)))
            place = _line(state, np.arcsinh(predicted / size)) + spread * apart
            place[:, known] = state.place
            found.append(size * np.sinh(np.clip(place, -FARTHEST, FARTHEST)))
    return np.concatenate(found)


def _data(predicted: np.ndarray, values: Sequence[np.ndarray]) -> _Data:
    known = np.array([len(v) > 0 for v in values])
    sizes = np.abs(np.concatenate([predicted, *values]))
    sizes = np.log(sizes[sizes > 0]) if sizes.any() else np.zeros(1)
    own = [v for v in values if len(v)]
    count, mean = np.array([len(v) for v in own], float), np.array([v.mean() for v in own])
    squares = np.array([np.square(v - v.mean()).sum() for v in own])
    numbers = np.unique(count, return_counts=True)
    return _Data(np.concatenate(own), count, mean, squares, predicted[known], numbers, sizes)


def _start(data: _Data, rng: np.random.Generator) -> _State:
    """Where the chains begin: apart from each other, at effects that are the means of swaps."""
    log_s, log_r = data.clipped(np.median(data.sizes) + rng.normal(size=(2, CHAINS)))
    size = np.exp(log_s)[:, None]
    log_t2, log_w = rng.normal(-1, 1, (2, CHAINS))
    tails, zero = rng.uniform(size=(3, CHAINS)), np.zeros(CHAINS)
    return _State(
        a=zero,
        b=zero + 1,
        log_t2=log_t2,
        log_w=log_w,
        log_s=log_s,
        log_r=log_r,
        error_tail=tails[0],
        noise_tail=tails[1],
        skewed=tails[2] < 0.5,
        place=np.arcsinh(data.mean / size),
        line=np.arcsinh(data.predicted / size),
        on_scale=_on_scale(log_r, data),
    )


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
    expected = np.arcsinh(effect[skewed] / size[skewed] * np.exp(-w[skewed] / 2))
    apart[skewed] = squares + n * np.square(mean - expected)
    return np.asarray(-n / 2 * np.log(nu * w) - (nu + n) / 2 * np.log1p(apart / (nu * w)) - slope)


def _gammas(tail: np.ndarray, numbers: np.ndarray, layers: np.ndarray | int) -> np.ndarray:
    """The part [chains] of log densities of Student's t that the degrees of freedom alone decide, for so
    many ``layers`` of each number of values."""
    freedom = 2 / tail[:, None]
    each = special.gammaln((freedom + numbers) / 2) - special.gammaln(freedom / 2)
    return np.asarray((each * layers).sum(1))


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
    middle = (ours * center + theirs * np.arcsinh(data.mean / s)) / (ours + theirs)
    reach = 1 / np.sqrt(ours + theirs)
    before = _fit_of_swaps(state, data) + _fit_of_places(state, data)
    for step in range(2):
        if step == 0:
            place = middle + reach * rng.standard_t(3, state.place.shape)
            old, new = (np.square((at - middle) / reach) for at in (state.place, place))
            # the density of the old place under the draw, over that of the new
            toward = 2 * np.log1p(new / 3) - 2 * np.log1p(old / 3)
        else:
            place, toward = state.place + 2 * reach * _jump(rng, *state.place.shape), 0.0
        moved = replace(state, place=place)
        after = _fit_of_swaps(moved, data) + _fit_of_places(moved, data)
        taken = _accepted(rng, after - before + toward)
        state = replace(state, place=np.where(taken, place, state.place))
        before = np.where(taken, after, before)
    return state


def _move_line(state: _State, data: _Data, rng: np.random.Generator) -> _State:
    """a and b, exactly: Gaussian given places, and the variances whose mixture makes errors Student's and
    priors Cauchy."""
    center = state.line.mean(1, keepdims=True)
    freedom = 2 / state.error_tail[:, None]
    t2 = np.exp(state.log_t2)[:, None]
    x, y = state.line - center, state.place - center
    apart = np.square(y - state.a[:, None] - state.b[:, None] * x)
    precision = rng.gamma((freedom + 1) / 2, size=y.shape) * 2 / (freedom * t2 + apart)

    def drawn(old: np.ndarray, middle: float, along: np.ndarray | float, left: np.ndarray) -> np.ndarray:
        own = rng.gamma(1, size=CHAINS) * 2 / (1 + np.square(old - middle))  # precision of the prior
        total = (precision * np.square(along)).sum(1) + own
        center = ((precision * along * left).sum(1) + middle * own) / total
        return np.asarray(center + rng.normal(size=CHAINS) / np.sqrt(total))

    a = drawn(state.a, 0, 1.0, y - state.b[:, None] * x)
    return replace(state, a=a, b=drawn(state.b, 1, x, y - a[:, None]))


def _move_errors(state: _State, data: _Data, rng: np.random.Generator) -> _State:
    """t and the tail of prediction errors, given places, twice."""

    def density(at: _State) -> np.ndarray:
        tails = _gammas(at.error_tail, np.ones(1), len(data.count))
        return np.asarray(_fit_of_places(at, data).sum(1) + tails + _prior_of_variances(at))

    for _ in range(2):
        log_t2 = np.maximum(state.log_t2 + _jump(rng, CHAINS), np.log(LEAST_VARIANCE))
        moved = replace(state, log_t2=log_t2, error_tail=_move_tail(state.error_tail, rng))
        state = state.where(_accepted(rng, density(moved) - density(state)), moved)
    return state


def _move_together(state: _State, data: _Data, rng: np.random.Generator) -> _State:
    """a, b and t, then t and w with their sum kept, all places moved along: what frees the chain where t
    is small beside the noise."""

    def density(at: _State) -> np.ndarray:
        fit = _fit_of_swaps(at, data).sum(1) + _prior_of_variances(at)
        return np.asarray(fit - np.log1p(at.a**2) - np.log1p((at.b - 1) ** 2))

    for step in range(2):
        if step == 0:
            reach = np.sqrt(np.exp(state.log_w) / len(data.count))
            a, b = (at + reach * _jump(rng, CHAINS) for at in (state.a, state.b))
            moved = replace(state, a=a, b=b, log_t2=state.log_t2 + _jump(rng, CHAINS))
        else:
            both = np.logaddexp(state.log_t2, state.log_w)
            odds = state.log_w - state.log_t2 + 2 * _jump(rng, CHAINS)
            moved = replace(state, log_t2=both - np.logaddexp(0, odds), log_w=both - np.logaddexp(0, -odds))
        ratio = np.exp((moved.log_t2 - state.log_t2) / 2)[:, None]
        place = _line(moved, state.line) + ratio * (state.place - _line(state, state.line))
        moved = replace(moved, place=place)
        possible = np.minimum(moved.log_t2, moved.log_w) > np.log(LEAST_VARIANCE)
        state = state.where(possible & _accepted(rng, density(moved) - density(state)), moved)
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
            log_r = data.clipped(state.log_r + change)
            inside = log_r == state.log_r + change
            # in half of them w r^2 stays, the noise of small effects
            log_w = state.log_w - 2 * change * rng.integers(2, size=CHAINS)
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
    log_s = data.clipped(state.log_s + change)
    place = np.arcsinh(np.exp(state.log_s - log_s)[:, None] * np.sinh(state.place))
    moved = replace(state, log_s=log_s, place=place, line=np.arcsinh(data.predicted / np.exp(log_s)[:, None]))

    def density(at: _State) -> np.ndarray:
        # of effects in units, which stay, for places
        jacobian = at.log_s[:, None] + np.log(np.cosh(at.place))
        return np.asarray((_fit_of_places(at, data) - jacobian).sum(1))

    return state.where(
        (log_s == state.log_s + change) & _accepted(rng, density(moved) - density(state)), moved
    )


_STEPS = (_move_places, _move_line, _move_errors, _move_together, _move_noise, _move_size)
