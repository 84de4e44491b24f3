"""The Gaussian diffusion process (DDPM): forward noising, reverse distribution, training losses.

Ho et al., arXiv 2006.11239 (the process), Nichol & Dhariwal, arXiv 2102.09672 (learned variance, respacing,
the variational bound in the loss), Salimans & Ho, arXiv 2202.00512 (v prediction). The numbers are those of
the published DiT code.

B batch, H height, W width, C channels of the latent; T steps of the process. x is (B, H, W, C) float32,
t is (B,) int32, a step of *this* process, 0 (least noise) to T - 1; the network is given original timesteps,
`timestep_map[t]`.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from dit_jax.diffusion import predictions
from dit_jax.diffusion.losses import discretized_gaussian_log_likelihood, mean_flat, normal_kl
from dit_jax.diffusion.predictions import Point, Prediction
from dit_jax.diffusion.process import DenoiseFn, Process
from dit_jax.diffusion.schedules import make_betas
from dit_jax.diffusion.timesteps import sample_timesteps, space_timesteps

# The published names of what is predicted. Salimans & Ho's v is the velocity of a quarter of a circle.
PREDICTS: dict[str, Prediction] = {"epsilon": "noise", "x0": "x0", "v": "velocity"}


class ReverseDistribution(NamedTuple):
    """p(x_{t-1} | x_t), each (B, H, W, C), and the x0 it was made from."""

    mean: jax.Array
    variance: jax.Array
    log_variance: jax.Array
    pred_xstart: jax.Array


@dataclass(frozen=True, eq=False)
class GaussianDiffusion(Process):
    """A diffusion process over given betas; `create` builds one by the names of the published options.

    Compared and hashed by identity, so one process can be a static argument of jit.
    """

    betas: np.ndarray
    """Variance added at each step, (T,) float64, each in (0, 1)."""
    timestep_map: np.ndarray
    """Original timestep of each step, (T,) int32: what the network is given."""
    learn_sigma: bool = True
    """The network's last C channels place the log variance between its two bounds."""
    loss: Literal["mse", "rescaled_mse", "kl", "rescaled_kl"] = "mse"
    """Training loss; with learn_sigma the mse losses add the variational bound for the variance."""
    prediction: Literal["epsilon", "x0", "v"] = "epsilon"
    """What the network's first C channels mean."""
    sigma: Literal["fixed_small", "fixed_large"] = "fixed_large"
    """The reverse variance when learn_sigma is off: the posterior's, or beta."""

    def __post_init__(self) -> None:
        for name, choices in (
            ("loss", ("mse", "rescaled_mse", "kl", "rescaled_kl")),
            ("prediction", tuple(PREDICTS)),
            ("sigma", ("fixed_small", "fixed_large")),
        ):
            if getattr(self, name) not in choices:
                raise ValueError(f"{name} is {getattr(self, name)!r}; expected one of {', '.join(choices)}")
        betas = np.array(self.betas, np.float64)
        timestep_map = np.array(self.timestep_map, np.int32)
        if betas.ndim != 1 or len(betas) < 2 or not ((betas > 0) & (betas < 1)).all():
            raise ValueError(f"betas are {betas}; expected a vector of at least 2 numbers between 0 and 1")
        if timestep_map.shape != betas.shape:
            raise ValueError(
                f"timestep_map has shape {timestep_map.shape}; expected that of betas, {betas.shape}"
            )
        for name, table in (("betas", betas), ("timestep_map", timestep_map)):
            table.setflags(write=False)
            object.__setattr__(self, name, table)

    @classmethod
    def create(
        cls,
        respacing: str = "",
        schedule: str = "linear",
        learn_sigma: bool = True,
        loss: Literal["mse", "rescaled_mse", "kl", "rescaled_kl"] = "mse",
        num_timesteps: int = 1000,
        prediction: Literal["epsilon", "x0", "v"] = "epsilon",
        sigma: Literal["fixed_small", "fixed_large"] = "fixed_large",
    ) -> GaussianDiffusion:
        """The process of a named schedule over num_timesteps, thinned to the timesteps of `respacing`.

        A thinned process has the marginals q(x_t | x_0) of the full one at the timesteps it keeps
        (arXiv 2102.09672, eq. 19). Names: see `make_betas`, `space_timesteps` and the fields.

        Raises ValueError that names the option.
        """
        alphas_cumprod = np.cumprod(1 - make_betas(schedule, num_timesteps))
        kept = space_timesteps(num_timesteps, respacing)
        betas = _betas_between(alphas_cumprod[kept])
        return cls(betas, kept, learn_sigma, loss, prediction, sigma)

    def thin(self, steps: np.ndarray) -> GaussianDiffusion:
        """The process of these steps alone, (S,) ascending: its marginals at them are this one's."""
        betas = _betas_between(self.alphas_cumprod[steps])
        return replace(self, betas=betas, timestep_map=self.timestep_map[steps])

    @property
    def predicts(self) -> Prediction:
        """`prediction` by its name in `predictions`."""
        return PREDICTS[self.prediction]

    @property
    def loss_names(self) -> tuple[str, ...]:
        """Terms of `training_losses`, of any of its kinds."""
        return ("loss", "mse", "vb")

    # ------------------------------------------------------------------------------ tables, (T,) float64

    @property
    def num_timesteps(self) -> int:
        """T, the number of steps of this process."""
        return len(self.betas)

    @cached_property
    def alphas_cumprod(self) -> np.ndarray:
        """Share of the signal's variance left after step t."""
        return np.cumprod(1 - self.betas)

    @cached_property
    def alphas_cumprod_prev(self) -> np.ndarray:
        """alphas_cumprod one step earlier; 1 before the first."""
        return np.append(1.0, self.alphas_cumprod[:-1])

    @cached_property
    def posterior_variance(self) -> np.ndarray:
        """Variance of q(x_{t-1} | x_t, x_0) (arXiv 2006.11239, eq. 7); 0 at t = 0."""
        return self.betas * (1 - self.alphas_cumprod_prev) / (1 - self.alphas_cumprod)

    @cached_property
    def posterior_log_variance_clipped(self) -> np.ndarray:
        """Its logarithm, with the value of t = 1 at t = 0, where the variance is 0."""
        return np.log(np.append(self.posterior_variance[1], self.posterior_variance[1:]))

    def at(self, table: np.ndarray, t: jax.Array, like: jax.Array) -> jax.Array:
        """table[t] in float32, shaped (B, 1, ..., 1) to multiply `like`.

        A t out of range raises IndexError where its values are known, and gives NaN under jit.
        """
        t = self._checked(t, like.shape[0])
        # Without these two options a gather would clamp a t too large, and count a negative one from the end.
        values = jnp.asarray(table, jnp.float32).at[t].get(mode="fill", wrap_negative_indices=False)
        return values.reshape(t.shape + (1,) * (like.ndim - 1))

    def _checked(self, t: jax.Array, batch: int) -> jax.Array:
        steps = self.num_timesteps
        if np.shape(t) != (batch,) or not jnp.issubdtype(jnp.result_type(t), jnp.integer):
            raise ValueError(
                f"t is {jnp.result_type(t)}{list(np.shape(t))}; expected integers of shape ({batch},)"
            )
        known = not isinstance(t, jax.core.Tracer) and getattr(t, "is_fully_addressable", True)
        if known and not all(0 <= step < steps for step in np.asarray(t).tolist()):
            raise IndexError(f"t is {np.asarray(t).tolist()}; expected steps from 0 to {steps - 1}")
        return jnp.asarray(t)

    # --------------------------------------------------------------------------------------------- times

    def training_times(self, key: jax.Array, n: int) -> jax.Array:
        """n steps, each as likely as any other, (n,) int32."""
        return sample_timesteps(key, n, self.num_timesteps)

    def shown_time(self, t: jax.Array) -> jax.Array:
        """The original timestep of step t."""
        # A traced t out of range is clipped here, and shows as NaN where the output meets the tables.
        return jnp.asarray(self.timestep_map).at[t].get(mode="clip")

    def noise_level(self, t: jax.Array) -> jax.Array:
        """t / T, from a table: a compiler may divide with an error, and t T / 4 begins a quarter of the log."""
        return self.at(np.arange(self.num_timesteps) / self.num_timesteps, t, t)

    def shown_noise_level(self, shown: jax.Array) -> jax.Array:
        """That of the kept steps, interpolated."""
        kept = jnp.asarray(self.timestep_map, jnp.float32)
        levels = jnp.arange(self.num_timesteps) / self.num_timesteps
        return jnp.interp(jnp.asarray(shown, jnp.float32), kept, levels)

    def levels(self, t: jax.Array, like: jax.Array) -> Point:
        """Roots of alphas_cumprod and its rest; their derivatives are by the angle of the circle that they lie on."""
        alpha = self.at(np.sqrt(self.alphas_cumprod), t, like)
        sigma = self.at(np.sqrt(1 - self.alphas_cumprod), t, like)
        return Point(alpha, sigma, -sigma, alpha)

    # ---------------------------------------------------------------------------------- forward process

    def q_sample(self, x0: jax.Array, t: jax.Array, noise: jax.Array) -> jax.Array:
        """x_t drawn from q(x_t | x_0) with the given standard normal noise (arXiv 2006.11239, eq. 4)."""
        if noise.shape != x0.shape:
            raise ValueError(f"noise has shape {noise.shape}; expected that of x0, {x0.shape}")
        p = self.levels(t, x0)
        return p.alpha * x0 + p.sigma * noise

    def q_posterior_mean_variance(
        self, x0: jax.Array, x_t: jax.Array, t: jax.Array
    ) -> tuple[jax.Array, jax.Array, jax.Array]:
        """Mean, variance and clipped log variance of q(x_{t-1} | x_t, x_0) (arXiv 2006.11239, eq. 6 and 7).

        The mean is (B, H, W, C), the other two (B, 1, 1, 1).
        """
        alphas, prev = 1 - self.betas, self.alphas_cumprod_prev
        coef_x0 = self.betas * np.sqrt(prev) / (1 - self.alphas_cumprod)
        coef_xt = (1 - prev) * np.sqrt(alphas) / (1 - self.alphas_cumprod)
        mean = self.at(coef_x0, t, x_t) * x0 + self.at(coef_xt, t, x_t) * x_t
        variance = self.at(self.posterior_variance, t, x_t)
        return mean, variance, self.at(self.posterior_log_variance_clipped, t, x_t)

    # ---------------------------------------------------------------------------------- reverse process

    def denoise(self, denoise_fn: DenoiseFn, x_t: jax.Array, t: jax.Array) -> jax.Array:
        """The network's output at step t of this process; it is called with original timesteps."""
        return denoise_fn(x_t, self.shown_time(self._checked(t, x_t.shape[0])))

    def predict(self, denoise_fn: DenoiseFn, x: jax.Array, t: jax.Array) -> jax.Array:
        """The network's prediction (B, H, W, C) float32 at step t, without what it says of the variance."""
        return self.prediction_of(self.denoise(denoise_fn, x, t), x)

    def prediction_of(self, model_output: jax.Array, x: jax.Array) -> jax.Array:
        """The first C channels of the network's output at x, float32; ValueError for another number of channels."""
        return self._split(model_output, x)[0]

    def predict_xstart(self, prediction: jax.Array, x_t: jax.Array, t: jax.Array) -> jax.Array:
        """x0 from the network's first C channels, whichever `prediction` they are."""
        return predictions.to_x0(self.predicts, prediction, x_t, self.levels(t, x_t))

    def predict_eps(self, pred_xstart: jax.Array, x_t: jax.Array, t: jax.Array) -> jax.Array:
        """The noise that leads from pred_xstart to x_t."""
        return predictions.to_noise("x0", pred_xstart, x_t, self.levels(t, x_t))

    def p_mean_variance(
        self, model_output: jax.Array, x_t: jax.Array, t: jax.Array, clip_denoised: bool = False
    ) -> ReverseDistribution:
        """p(x_{t-1} | x_t) of a network's output, (B, H, W, C), or (B, H, W, 2C) with learn_sigma.

        clip_denoised clips the predicted x0 to [-1, 1] (for pixels; latents are not bounded).
        """
        prediction, fraction = self._split(model_output, x_t)
        pred_xstart = self.predict_xstart(prediction, x_t, t)
        if clip_denoised:
            pred_xstart = jnp.clip(pred_xstart, -1.0, 1.0)
        mean, _, _ = self.q_posterior_mean_variance(pred_xstart, x_t, t)
        if fraction is not None:  # arXiv 2102.09672, eq. 15, with the fraction in [-1, 1] instead of [0, 1]
            low = self.at(self.posterior_log_variance_clipped, t, x_t)
            high = self.at(np.log(self.betas), t, x_t)
            log_variance = 0.5 * (fraction + 1.0) * (high - low) + low
            variance = jnp.exp(log_variance)
        else:
            large, small = np.append(self.posterior_variance[1], self.betas[1:]), self.posterior_variance
            logs = np.log(large) if self.sigma == "fixed_large" else self.posterior_log_variance_clipped
            variance = self.at(large if self.sigma == "fixed_large" else small, t, x_t)
            variance = jnp.broadcast_to(variance, x_t.shape)
            log_variance = jnp.broadcast_to(self.at(logs, t, x_t), x_t.shape)
        return ReverseDistribution(mean, variance, log_variance, pred_xstart)

    def _split(self, model_output: jax.Array, x: jax.Array) -> tuple[jax.Array, jax.Array | None]:
        """(prediction, variance fraction or None), float32 whatever the network computes in."""
        channels = x.shape[-1]
        expected = (*x.shape[:-1], channels * (2 if self.learn_sigma else 1))
        if model_output.shape != expected:
            raise ValueError(
                f"the network's output has shape {model_output.shape}; expected {expected} "
                f"(learn_sigma={self.learn_sigma})"
            )
        model_output = model_output.astype(jnp.float32)
        return model_output[..., :channels], model_output[..., channels:] if self.learn_sigma else None

    # -------------------------------------------------------------------------------------------- losses

    def vb_terms(self, model_output: jax.Array, x0: jax.Array, x_t: jax.Array, t: jax.Array) -> jax.Array:
        """Term t of the variational bound, bits per dimension, (B,) (arXiv 2102.09672, eq. 4 to 7).

        KL(q(x_{t-1} | x_t, x_0) || p(x_{t-1} | x_t)); at t = 0 -log p(x_0 | x_1), discretised as 8 bits.
        """
        true_mean, _, true_log_variance = self.q_posterior_mean_variance(x0, x_t, t)
        p = self.p_mean_variance(model_output, x_t, t)
        kl = normal_kl(true_mean, true_log_variance, p.mean, p.log_variance)
        nll = -discretized_gaussian_log_likelihood(x0, p.mean, 0.5 * p.log_variance)
        return jnp.where(t == 0, mean_flat(nll), mean_flat(kl)) / math.log(2)

    def training_losses(
        self, denoise_fn: DenoiseFn, x0: jax.Array, t: jax.Array, noise: jax.Array
    ) -> dict[str, jax.Array]:
        """Per-example losses, each (B,): "loss", and "mse" and "vb" where they are part of it.

        mse            mean squared error of the prediction; + vb with learn_sigma, whose gradient reaches the
                       variance only (arXiv 2102.09672, eq. 16)
        rescaled_mse   the same with vb times T / 1000
        kl             the variational bound's term at t, in bits per dimension
        rescaled_kl    the same times T, an unbiased estimate of the sum over t
        """
        x_t = self.q_sample(x0, t, noise)
        output = self.denoise(denoise_fn, x_t, t)
        if self.loss in ("kl", "rescaled_kl"):
            vb = self.vb_terms(output, x0, x_t, t)
            return {"loss": vb * self.num_timesteps if self.loss == "rescaled_kl" else vb, "vb": vb}
        prediction, fraction = self._split(output, x0)
        target = predictions.target(self.predicts, x0, noise, self.levels(t, x0))
        mse = mean_flat(jnp.square(target - prediction))
        if fraction is None:
            return {"loss": mse, "mse": mse}
        frozen = jnp.concatenate([jax.lax.stop_gradient(prediction), fraction], axis=-1)
        vb = self.vb_terms(frozen, x0, x_t, t)
        if self.loss == "rescaled_mse":
            vb = vb * (self.num_timesteps / 1000)
        return {"loss": mse + vb, "mse": mse, "vb": vb}


def _betas_between(alphas_cumprod: np.ndarray) -> np.ndarray:
    """Betas of steps that leave these shares of the signal's variance."""
    return 1 - alphas_cumprod / np.append(1.0, alphas_cumprod[:-1])
