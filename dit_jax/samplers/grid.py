"""Where on its course a sampler stops: grids of times from noise to data, in float64.

| grid      | equal steps in                                                                                    |
|-----------|---------------------------------------------------------------------------------------------------|
| uniform   | time                                                                                              |
| respaced  | time, whole timesteps from the first to the last, then the data: the published DDPM's and DDIM's  |
| lambda    | log(alpha / sigma) (DPM-Solver, arXiv 2206.00927), then the end                                   |
| karras    | (sigma / alpha)^(1/7) (Karras et al., arXiv 2206.00364, eq. 5), then the end                      |
| quadratic | the root of the time that is left (DDIM, arXiv 2010.02502, appendix D.2), then the end            |
| shifted   | time, moved towards the noise as for a higher resolution (SD3, arXiv 2403.03206, eq. 23)          |
| sd3       | the same from noise to a thousandth of the way before the data, moved twice there, then the end: of |
|           | Stable Diffusion 3's published programs and diffusers alike, whose last step is a long one        |

N steps are N + 1 times; the last is the end of the course. respaced is for the Gaussian process alone.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal, get_args

import numpy as np

from dit_jax.diffusion.times import shifted
from dit_jax.diffusion.timesteps import space_timesteps
from dit_jax.samplers.course import Course, GaussianCourse, log_ratio, time_of_log_ratio

GridName = Literal["uniform", "respaced", "lambda", "karras", "quadratic", "shifted", "sd3"]
GRIDS: tuple[str, ...] = get_args(GridName)
RHO = 7.0
SD3_TIMESTEPS = 1000
# Where the levels' ratio is infinite at an end of the course, the grids in it begin this share of the way inside.
INSIDE = 1e-3


def make_times(course: Course, grid: GridName, steps: int, grid_shift: float = 3.0) -> np.ndarray:
    """Times (steps + 1,) float64 of a named grid; grid_shift is that of "shifted" and "sd3".

    Raises ValueError for another name, fewer than one step, or what the process does not have.
    """
    if grid not in GRIDS:
        raise ValueError(f"grid is {grid!r}; expected one of {', '.join(GRIDS)}")
    if steps < 1:
        raise ValueError(f"steps is {steps}; expected at least 1")
    if not 0 < grid_shift < np.inf:
        raise ValueError(f"grid_shift is {grid_shift}; expected a number above 0")
    if grid == "respaced":
        return _respaced(course, steps)
    if grid == "lambda":
        return _by_ratio(course, steps, lambda ratio: ratio, lambda even: even)
    if grid == "karras":
        return _by_ratio(course, steps, lambda r: -np.exp(-r / RHO), lambda even: -RHO * np.log(-even))
    if grid == "quadratic":
        left = np.linspace(1, 0, steps + 1 if course.answers(course.end) else steps) ** 2
        return _ending(course, course.last_asked + (course.start - course.last_asked) * left, steps)
    gone = np.linspace(0, 1, steps + 1)
    if grid == "shifted":
        gone = shifted(gone, grid_shift)
    elif grid == "sd3":
        last = shifted(1 - 1 / SD3_TIMESTEPS, grid_shift)  # it is among the times that are shifted again
        gone = np.append(shifted(np.linspace(0, last, steps), grid_shift), 1.0)
    times = course.start + (course.end - course.start) * gone
    if not course.answers(times[-2]):
        raise ValueError(
            f"steps is {steps}, with which grid {grid!r} steps over the last timestep; expected fewer"
        )
    return times


def check_times(course: Course, times: np.ndarray) -> np.ndarray:
    """Times (S + 1,) float64, given by a user; ValueError where they do not lead along the course."""
    times = np.asarray(times, np.float64)
    low, high = sorted((course.start, course.end))
    forward = np.sign(course.end - course.start)
    if times.ndim != 1 or len(times) < 2 or not (forward * np.diff(times) > 0).all():
        raise ValueError(
            f"grid is {_shown(times)}; expected two or more times, each nearer to the data than the one before "
            f"({course.start:g} is noise, {course.end:g} is data)"
        )
    inside = (times >= low) & (times <= high)
    if not inside.all():
        raise ValueError(f"grid holds {times[~inside][0]:g}; expected {low:g} to {high:g}")
    for time in times[:-1]:
        if not course.answers(time):
            raise ValueError(
                f"grid holds {time:g}, at which the network cannot be asked; expected none but the end"
            )
    return times


def _shown(times: np.ndarray) -> str:
    """Times as a user writes them, cut where there are many."""
    first = ",".join(f"{time:g}" for time in np.atleast_1d(times)[:8])
    return first + ",..." if times.size > 8 else first


def _respaced(course: Course, steps: int) -> np.ndarray:
    if not isinstance(course, GaussianCourse):
        raise ValueError(
            "grid is 'respaced', which counts timesteps; expected another for a process without them"
        )
    total = course.process.num_timesteps
    if not 2 <= steps <= total:
        raise ValueError(f"steps is {steps}; expected 2 to {total}, the timesteps of training")
    return np.append(space_timesteps(total, str(steps))[::-1], course.end).astype(np.float64)


def _by_ratio(
    course: Course,
    steps: int,
    warp: Callable[[np.ndarray], np.ndarray],
    back: Callable[[np.ndarray], np.ndarray],
) -> np.ndarray:
    """Times that are even in a function of log(alpha / sigma) as far as that is finite, and the end."""
    ends = [course.start, course.last_asked]
    finite = np.isfinite(log_ratio(course.levels(np.array(ends))))
    for i, inwards in enumerate((1, -1)):
        if not finite[i]:
            ends[i] += inwards * INSIDE * (course.end - course.start)
    low, high = warp(log_ratio(course.levels(np.array(ends))))
    count = steps + 1 if course.answers(course.end) and finite[1] else steps
    times = time_of_log_ratio(course, back(np.linspace(low, high, count)))
    return _ending(course, times, steps)


def _ending(course: Course, times: np.ndarray, steps: int) -> np.ndarray:
    """These times, the first and the last of steps + 1 being exactly those of the course."""
    times = np.append(times[:steps], course.end)
    times[0] = course.start
    return check_times(course, times)
