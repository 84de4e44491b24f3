"""Every step of our solvers against diffusers' schedulers, on the same outputs of the same network."""

import warnings

import jax.numpy as jnp
import numpy as np
import pytest

from dit_jax.diffusion.flow import FlowMatching
from dit_jax.diffusion.gaussian import GaussianDiffusion
from dit_jax.samplers.adams import AdamsBashforth
from dit_jax.samplers.course import FlowCourse, GaussianCourse
from dit_jax.samplers.ddim import Ddim
from dit_jax.samplers.dpm import DPMSolverPP
from dit_jax.samplers.heun import Heun
from dit_jax.samplers.loop import draw
from dit_jax.samplers.unipc import UniPC

# diffusers hands torch tensors to NumPy.
pytestmark = pytest.mark.filterwarnings(
    "ignore:__array__ implementation doesn't accept a copy:DeprecationWarning"
)

SHAPE = (2, 4, 4, 2)
BETAS = {"num_train_timesteps": 1000, "beta_start": 1e-4, "beta_end": 0.02, "beta_schedule": "linear"}
PREDICTION = {"epsilon": "epsilon", "x0": "sample", "v": "v_prediction"}


@pytest.fixture(scope="module")
def peer():
    """(torch, diffusers.schedulers)."""
    pytest.importorskip("torch", reason="needs torch (extra: interop)")
    pytest.importorskip("diffusers", reason="needs diffusers (extra: interop)")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        import diffusers.schedulers
        import torch
    return torch, diffusers.schedulers


def network(x, t, xp):
    """Mixes neighbours, bends, and moves with time (in 0 .. 1000)."""
    return (
        xp.tanh(0.7 * x[:, ::-1] - 0.4 * x + t / 700.0)
        if xp is jnp
        else xp.tanh(0.7 * x.flip(1) - 0.4 * x + t / 700.0)
    )


def start():
    rng = np.random.default_rng(0)
    return rng.normal(size=SHAPE).astype(np.float32), rng.normal(size=(40, *SHAPE)).astype(np.float32)


def peer_states(peer, scheduler, x, recorded=None, sign=1.0):
    """The peer's state after every call of its step."""
    torch = peer[0]
    x, states = torch.tensor(x), []
    for i, t in enumerate(scheduler.timesteps):
        scaled = scheduler.scale_model_input(x, t) if hasattr(scheduler, "scale_model_input") else x
        options = {} if recorded is None else {"variance_noise": torch.tensor(recorded[i])}
        x = scheduler.step(sign * network(scaled, float(t), torch), t, x, **options).prev_sample
        states.append(x.numpy())
    return np.stack(states)


def close(found, expected):
    """1e-4 of the state's size: the peer's tables are float32."""
    size = max(1.0, float(np.abs(expected).max()))
    np.testing.assert_allclose(np.asarray(found) / size, expected / size, atol=1e-4)


def gaussian_states(solver, scheduler, prediction="epsilon", recorded=None):
    process = GaussianDiffusion.create(learn_sigma=False, prediction=prediction)
    times = np.append(scheduler.timesteps.numpy().astype(np.float64), -1)
    x, _ = start()
    return draw(
        GaussianCourse(process), solver, lambda x, t: network(x, t[:, None, None, None] + 0.0, jnp), x,
        times=times, step_noise=None if recorded is None else recorded[: len(times) - 1], keep_states=True,
    ).states  # fmt: skip


def flow_states(solver, sigmas, recorded=None):
    """The peer's time is 1000 sigma, and its velocity points to the noise."""
    process = FlowMatching.create(time_scale=1000.0, time_direction="to_noise")
    return draw(
        FlowCourse(process), solver, lambda x, t: network(x, t[:, None, None, None], jnp), start()[0],
        times=1 - np.asarray(sigmas, np.float64), step_noise=recorded, keep_states=True,
    ).states  # fmt: skip


@pytest.mark.parametrize("prediction", PREDICTION)
@pytest.mark.parametrize("steps", [6, 18])
@pytest.mark.parametrize("kind", ["2m", "3m", "2m_sde"])
def test_dpm_solver_pp(peer, kind, steps, prediction):
    sde = kind == "2m_sde"
    order = int(kind[0])
    scheduler = peer[1].DPMSolverMultistepScheduler(
        **BETAS,
        prediction_type=PREDICTION[prediction],
        solver_order=order,
        algorithm_type="sde-dpmsolver++" if sde else "dpmsolver++",
    )
    scheduler.set_timesteps(steps)
    x, noise = start()
    recorded = noise if sde else None
    found = gaussian_states(DPMSolverPP(order, draws=sde), scheduler, prediction, recorded)
    close(found, peer_states(peer, scheduler, x, recorded))


@pytest.mark.parametrize("variant", ["bh1", "bh2"])
@pytest.mark.parametrize("order", [2, 3])
@pytest.mark.parametrize("prediction", ["epsilon", "v"])
def test_unipc(peer, prediction, order, variant):
    scheduler = peer[1].UniPCMultistepScheduler(
        **BETAS, prediction_type=PREDICTION[prediction], solver_order=order, solver_type=variant
    )
    scheduler.set_timesteps(9)
    found = gaussian_states(UniPC(order, variant), scheduler, prediction)
    compare_unipc(found, peer_states(peer, scheduler, start()[0]), variant)


def compare_unipc(found, expected, variant):
    """The peer's bh1 multiplies 0 by infinity in the last step, to sigma 0; bh2 shows what that step must be."""
    assert np.isfinite(found).all() and np.isnan(expected[-1]).all() == (variant == "bh1")
    compared = slice(-1) if variant == "bh1" else slice(None)
    close(found[compared], expected[compared])


@pytest.mark.parametrize(("spacing", "steps"), [("trailing", 10), ("linspace", 7)])
def test_heun_on_a_gaussian_process(peer, spacing, steps):
    scheduler = peer[1].HeunDiscreteScheduler(**BETAS, timestep_spacing=spacing)
    scheduler.set_timesteps(steps)
    times = np.append(np.unique(scheduler.timesteps.numpy())[::-1].astype(np.float64), -1)
    alpha = GaussianCourse(GaussianDiffusion.create()).levels(times).alpha
    x = start()[0]
    expected = peer_states(peer, scheduler, x / alpha[0].astype(np.float32))
    ends = [*range(1, 2 * (steps - 1), 2), 2 * (steps - 1)]  # calls that end a step; the last step has one
    process = GaussianDiffusion.create(learn_sigma=False)
    found = draw(
        GaussianCourse(process), Heun(), lambda x, t: network(x, t[:, None, None, None], jnp), x, times=times,
        keep_states=True,
    )  # fmt: skip
    assert found.evaluations == len(expected) == 2 * steps - 1
    close(found.states, expected[ends] * alpha[1:, None, None, None, None])


@pytest.mark.parametrize("solver", [AdamsBashforth(1), Ddim()])
def test_euler_on_flow_matching(peer, solver):
    scheduler = peer[1].FlowMatchEulerDiscreteScheduler(shift=3.0)
    scheduler.set_timesteps(8)
    close(flow_states(solver, scheduler.sigmas), peer_states(peer, scheduler, start()[0]))


def test_heun_on_flow_matching(peer):
    scheduler = peer[1].FlowMatchHeunDiscreteScheduler(shift=1.0)
    scheduler.set_timesteps(6)
    found = flow_states(Heun(), scheduler.sigmas.unique().flip(0))
    expected = peer_states(peer, scheduler, start()[0])[[1, 3, 5, 7, 9, 10]]
    # Its last step, to sigma 0, is Euler's; ours asks the network there as well.
    close(found[:-1], expected[:-1])


@pytest.mark.parametrize("name", ["2m", "3m", "2m_sde", "unipc_2_bh2", "unipc_3_bh1"])
def test_multistep_on_flow_matching(peer, name):
    options = {"use_flow_sigmas": True, "prediction_type": "flow_prediction", "flow_shift": 3.0}
    sde = name == "2m_sde"
    if name.startswith("unipc"):
        solver = UniPC(int(name[6]), name[8:])
        scheduler = peer[1].UniPCMultistepScheduler(
            **options, solver_order=int(name[6]), solver_type=name[8:]
        )
    else:
        solver = DPMSolverPP(int(name[0]), draws=sde)
        scheduler = peer[1].DPMSolverMultistepScheduler(
            **options, solver_order=int(name[0]), algorithm_type="sde-dpmsolver++" if sde else "dpmsolver++"
        )
    scheduler.set_timesteps(8)
    x, noise = start()
    recorded = noise[:8] if sde else None
    scheduler.timesteps = scheduler.sigmas[:-1] * 1000  # it rounds them to whole numbers
    expected = peer_states(peer, scheduler, x, recorded)
    found = flow_states(solver, scheduler.sigmas, recorded)
    if name.startswith("unipc"):
        compare_unipc(found, expected, name[8:])
    else:
        close(found, expected)
