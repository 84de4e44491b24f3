"""On a Gaussian mixture, whose best denoiser is known, every solver's error falls with its order as steps double."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy.integrate import solve_ivp

from dit_jax.diffusion import predictions
from dit_jax.diffusion.flow import FlowMatching
from dit_jax.diffusion.gaussian import GaussianDiffusion
from dit_jax.samplers.adams import AdamsBashforth
from dit_jax.samplers.course import course_of, time_of_log_ratio
from dit_jax.samplers.ddim import Ddim
from dit_jax.samplers.dpm import DPMSolverPP
from dit_jax.samplers.heun import Heun
from dit_jax.samplers.loop import Denoiser, cast
from dit_jax.samplers.unipc import UniPC

MEANS, STD, SHARES = np.array([-1.0, 0.8]), 0.6, np.array([0.4, 0.6])
FLOW = FlowMatching.create("gvp", "noise", sample_eps=0.1)
GAUSSIAN = GaussianDiffusion.create(prediction="v", learn_sigma=False)
Z = np.linspace(-1.8, 1.8, 7)


def best_x0(x, alpha, sigma, xp):
    """E[x0 | x] of the mixture."""
    variance = (alpha * STD) ** 2 + sigma**2
    shifts = [x - alpha * mean for mean in MEANS]
    logits = [np.log(share) - shift**2 / (2 * variance) for share, shift in zip(SHARES, shifts, strict=True)]
    top = functools.reduce(xp.maximum, logits)
    weights = [xp.exp(logit - top) for logit in logits]
    means = [mean + alpha * STD**2 / variance * shift for mean, shift in zip(MEANS, shifts, strict=True)]
    return sum(w * m for w, m in zip(weights, means, strict=True)) / sum(weights)


class Exact:
    """A course with the best network, and where its ODE leads."""

    def __init__(self, process, noisy, clean):
        self.course = course_of(process)
        p = self.course.levels(np.array([noisy, clean]))
        self.ratios = np.log(p.alpha / p.sigma)

    def times(self, steps, beyond=0):
        """Even in log(alpha / sigma), with some more of the same width beyond the end."""
        width = (self.ratios[1] - self.ratios[0]) / steps
        return time_of_log_ratio(self.course, self.ratios[0] + width * np.arange(steps + 1 + beyond))

    def denoiser(self):
        course = self.course

        class Best(Denoiser):
            def prediction(self, x, at):
                p = at.point
                x0 = best_x0(x, p.alpha, p.sigma, jnp)
                return predictions.target(course.predicts, x0, (x - p.alpha * x0) / p.sigma, p)

        return Best(course, None)

    def states(self, times):
        """x at these times from Z at the first, float64: d(x / alpha) / d(sigma / alpha) is the noise."""
        p = self.course.levels(times)
        s = p.sigma / p.alpha

        def slope(s, y):
            alpha = 1 / np.sqrt(1 + s * s)  # both processes preserve the variance
            x = alpha * y
            return (x - alpha * best_x0(x, alpha, s * alpha, np)) / (s * alpha)

        solved = solve_ivp(
            slope, s[[0, -1]], Z / p.alpha[0], t_eval=s, rtol=1e-11, atol=1e-11, method="DOP853"
        )
        return (solved.y * p.alpha).T


PROCESSES = {"flow": Exact(FLOW, 0.1, 0.75), "gaussian": Exact(GAUSSIAN, 700.0, 200.0)}
# Order, the steps that need an exact history before them, and steps that are taken at lower orders at the end.
SOLVERS = {
    "euler": (AdamsBashforth(1), 1, 0, 0),
    "ddim": (Ddim(), 1, 0, 0),
    "ab2": (AdamsBashforth(2), 2, 1, 0),
    "ab3": (AdamsBashforth(3), 3, 2, 0),
    "ab4": (AdamsBashforth(4), 4, 3, 0),
    "heun": (Heun(), 2, 0, 0),
    "dpmpp_2m": (DPMSolverPP(2), 2, 1, 2),
    "dpmpp_3m": (DPMSolverPP(3), 3, 2, 3),
    "unipc_2_bh1": (UniPC(2, "bh1"), 3, 1, 2),
    "unipc_2": (UniPC(2), 3, 1, 2),
    "unipc_3": (UniPC(3), 4, 2, 3),
    "unipc_3_bh1": (UniPC(3, "bh1"), 4, 2, 3),
}


def error(exact, solver, steps, warm, beyond):
    """Largest error after `steps` steps, the first `warm` of which are set right."""
    times = exact.times(steps, beyond)
    denoiser, truth = exact.denoiser(), exact.states(times[: steps + 1]).astype(np.float32)
    rows = cast(solver.rows(exact.course, times))
    x = jnp.asarray(truth[0])
    carry = solver.begin(x)
    step = jax.jit(lambda x, carry, row: solver.step(denoiser, x, carry, row, None))
    for i in range(steps):
        x, carry = step(x, carry, jax.tree.map(lambda table, i=i: table[i], rows))
        if i < warm:
            x = jnp.asarray(truth[i + 1])
    return float(np.abs(np.asarray(x) - truth[-1]).max())


@pytest.mark.parametrize("name", SOLVERS)
@pytest.mark.parametrize("process", PROCESSES)
def test_the_error_falls_with_the_order(process, name):
    solver, order, warm, beyond = SOLVERS[name]
    coarse, fine = (error(PROCESSES[process], solver, steps, warm, beyond) for steps in (14, 28))
    assert order - 0.6 < np.log2(coarse / fine) < order + 0.8, (coarse, fine)
