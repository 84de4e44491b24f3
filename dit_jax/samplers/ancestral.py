"""Ancestral sampling of a Gaussian process by its own reverse variance, learned or fixed (arXiv 2006.11239)."""

from __future__ import annotations

from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np

from dit_jax.diffusion.gaussian import GaussianDiffusion
from dit_jax.diffusion.process import DenoiseFn
from dit_jax.samplers.course import Course, GaussianCourse
from dit_jax.samplers.loop import Denoiser, draw

Array = jax.Array


def ddpm_step(
    diffusion: GaussianDiffusion,
    model_output: Array,
    x_t: Array,
    t: Array,
    noise: Array,
    clip_denoised: bool = False,
) -> Array:
    """x_{t-1} by one ancestral step (arXiv 2006.11239, algorithm 2); no noise is added at t = 0.

    model_output: the network's output at (x_t, t), (B, H, W, C or 2C). t: step of the process, (B,).
    noise: standard normal, of x_t's shape.
    """
    p = diffusion.p_mean_variance(model_output, x_t, t, clip_denoised)
    add = jnp.asarray(t > 0, jnp.float32).reshape((-1,) + (1,) * (x_t.ndim - 1))
    return p.mean + add * jnp.exp(0.5 * p.log_variance) * noise


@dataclass(frozen=True)
class Ancestral:
    """DDPM through every step of the course's process: its variances are those between neighbours."""

    clip_denoised: bool = False
    evaluations: int = 1
    draws: bool = True

    def last(self, course: Course, end: float) -> None:
        """It takes all steps."""

    def rows(self, course: Course, times: np.ndarray) -> np.ndarray:
        """Steps of the process down to 0, all of them or the last ones."""
        if not isinstance(course, GaussianCourse):
            raise ValueError(
                "ddpm takes its variances from a table of timesteps; expected a Gaussian process"
            )
        steps = np.arange(course.process.num_timesteps)[::-1][-(len(times) - 1) :]
        if not np.array_equal(times, np.append(steps, -1)):
            raise ValueError("ddpm goes through every step of a process; expected one thinned to these times")
        return steps

    def begin(self, x: Array) -> None:
        """Nothing is carried."""

    def step(
        self, denoiser: Denoiser, x: Array, carry: None, row: Array, noise: Array | None
    ) -> tuple[Array, None]:
        """One evaluation."""
        assert isinstance(denoiser.course, GaussianCourse) and noise is not None
        process, t = denoiser.course.process, jnp.broadcast_to(row, x.shape[:1])
        output = process.denoise(denoiser.denoise_fn, x, t)
        return ddpm_step(process, output, x, t, noise, self.clip_denoised), None


def sample_ddpm(
    diffusion: GaussianDiffusion,
    denoise_fn: DenoiseFn,
    noise: Array,
    key: Array | None = None,
    step_noise: Array | None = None,
    return_trajectory: bool = False,
    clip_denoised: bool = False,
) -> Array:
    """x0 (B, H, W, C) by ancestral sampling over all steps of the process, from `noise` (B, H, W, C).

    denoise_fn(x, t): the network, given original timesteps (B,).
    key: one key, folded with 0..B-1, or one key per sample (see `sample_keys`), typed or raw.
    step_noise: (T, B, H, W, C), replaces the drawn noise, in order of use; no key is needed then.
    return_trajectory: return the state after every step, (T, B, H, W, C), instead.
    clip_denoised: clip every predicted x0 to [-1, 1].

    Raises ValueError when shapes do not fit or the noise has no source.
    """
    drawn = draw(
        GaussianCourse(diffusion), Ancestral(clip_denoised), denoise_fn, noise, key,
        times=every_step(diffusion), step_noise=step_noise, keep_states=return_trajectory,
    )  # fmt: skip
    return drawn.x if drawn.states is None else drawn.states


def every_step(diffusion: GaussianDiffusion) -> np.ndarray:
    """Times T - 1 .. 0 of a process and the data's, (T + 1,)."""
    return np.arange(diffusion.num_timesteps - 1, -2, -1).astype(np.float64)


def thinned(diffusion: GaussianDiffusion, times: np.ndarray) -> GaussianDiffusion:
    """The process of these times alone (S + 1,), the data's last (arXiv 2102.09672, eq. 19).

    Raises ValueError for a time that is no whole step of the process.
    """
    steps = np.rint(times[:-1]).astype(np.int32)[::-1]
    if not np.array_equal(steps, times[:-1][::-1]) or times[-1] != -1 or len(steps) < 2:
        raise ValueError(
            "grid holds other times than whole timesteps and -1, the data, at the end; "
            "expected those alone for ddpm, two or more, as of respaced"
        )
    return diffusion.thin(steps)
