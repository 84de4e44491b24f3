"""Flow matching and stochastic interpolants: a process in continuous time.

Lipman et al., arXiv 2210.02747; Ma et al. (SiT), arXiv 2401.08740, whose conventions and numbers these are.

Time runs from t = 0, noise, to t = 1, data: x_t = alpha_t x1 + sigma_t x0, with x1 the clean latent and x0 standard
normal noise. Other systems count the other way, or show the network 1000 t: `time_direction` and `time_scale` say
what this network is shown.

B batch, H height, W width, C channels of the latent. x is (B, H, W, C) float32, t is (B,) float32.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Literal

import jax
import jax.numpy as jnp

from dit_jax.diffusion import predictions
from dit_jax.diffusion.losses import mean_flat
from dit_jax.diffusion.paths import PATHS, PathName, point
from dit_jax.diffusion.predictions import PREDICTIONS, Point, Prediction
from dit_jax.diffusion.process import DenoiseFn, Process
from dit_jax.diffusion.times import TimeDistribution

Array = jax.Array
LossWeight = Literal["velocity", "likelihood"]
DiffusionForm = Literal["constant", "sbdm", "sigma", "linear", "decreasing", "increasing_decreasing"]


@dataclass(frozen=True)
class FlowMatching(Process):
    """A path between noise and data and what the network predicts on it; `create` fills in the margins of time."""

    path: PathName = "linear"
    """linear, gvp or vp (see `paths`)."""
    prediction: Prediction = "velocity"
    """What the network's first C channels mean; further channels are ignored."""
    loss_weight: LossWeight | None = None
    """Weight of a squared error of noise, score or x0: that of the velocity's error, or of the likelihood's bound."""
    cosine_weight: float = 0.0
    """Weight of an added 1 - cosine similarity of prediction and target over channels (arXiv 2501.01423)."""
    train_eps: float = 0.0
    """Margin of time that training leaves out where the path is singular."""
    sample_eps: float = 0.0
    """The same for sampling."""
    time_scale: float = 1.0
    """The network is shown this times t: 1 in SiT, 1000 in SD3."""
    time_direction: Literal["to_data", "to_noise"] = "to_data"
    """Whether the network is shown t, or 1 - t and predicts the velocity towards the noise, as SD3 and REPA do."""
    times: TimeDistribution = field(default_factory=TimeDistribution)
    """What training draws its times from, before they are mapped to `training_interval`."""

    def __post_init__(self) -> None:
        for name, choices in (
            ("path", tuple(PATHS)),
            ("prediction", PREDICTIONS),
            ("loss_weight", (None, "velocity", "likelihood")),
            ("time_direction", ("to_data", "to_noise")),
        ):
            if getattr(self, name) not in choices:
                expected = ", ".join(map(str, choices))
                raise ValueError(f"{name} is {getattr(self, name)!r}; expected one of {expected}")
        if self.prediction == "velocity" and self.loss_weight == "likelihood":
            raise ValueError(
                "loss_weight is 'likelihood' with prediction 'velocity'; expected None, or another prediction"
            )

    @classmethod
    def create(
        cls,
        path: PathName = "linear",
        prediction: Prediction = "velocity",
        loss_weight: LossWeight | None = None,
        **options: Any,
    ) -> FlowMatching:
        """The process with SiT's margins: none where no formula is singular, else 1e-3 (1e-5 to train on vp)."""
        margin = 1e-3 if path == "vp" or prediction != "velocity" else 0.0
        margins = {"train_eps": 1e-5 if path == "vp" else margin, "sample_eps": margin}
        return cls(path, prediction, loss_weight, **(margins | options))

    @property
    def predicts(self) -> Prediction:
        """`prediction`."""
        return self.prediction

    @property
    def loss_names(self) -> tuple[str, ...]:
        """Terms of `training_losses`."""
        return ("loss", "mse") if self.cosine_weight == 0 else ("loss", "mse", "cosine")

    # ---------------------------------------------------------------------------------------------- time

    def training_times(self, key: Array, n: int) -> Array:
        """n times, (n,) float32, of the distribution over `training_interval`."""
        low, high = self.training_interval()
        return low + (high - low) * self.times.draw(key, n)

    def training_interval(self) -> tuple[float, float]:
        """The times that training draws from."""
        return self._interval(self.train_eps, singular=self.prediction != "velocity")

    def sampling_interval(
        self, diffusion_form: DiffusionForm | None = None, last_step_size: float = 0.0
    ) -> tuple[float, float]:
        """First and last time of a sampler: the ODE's, or with a form of diffusion the SDE's before its last step."""
        stochastic = diffusion_form is not None
        start, end = self._interval(
            self.sample_eps,
            singular=self.prediction != "velocity" or diffusion_form == "sbdm",
            ends_early=self.prediction != "velocity" or stochastic,
        )
        return start, 1 - last_step_size if stochastic and last_step_size else end

    def _interval(self, eps: float, singular: bool, ends_early: bool | None = None) -> tuple[float, float]:
        """Data (t = 1) is singular on vp, noise (t = 0) is not; on the other paths it is as the caller says."""
        if self.path == "vp":
            return 0.0, 1 - eps
        early = singular if ends_early is None else ends_early
        return (eps if singular else 0.0), (1 - eps if early else 1.0)

    def shown_time(self, t: Array) -> Array:
        """What the network is shown at time t."""
        return self.time_scale * (t if self.time_direction == "to_data" else 1 - t)

    def shown_noise_level(self, shown: Array) -> Array:
        """`noise_level` at the time of which the network is shown this."""
        t = shown / self.time_scale
        return self.noise_level(t if self.time_direction == "to_data" else 1 - t)

    def noise_level(self, t: Array) -> Array:
        """sigma / (alpha + sigma), which is 1 - t on the linear path."""
        p = point(self.path, jnp.asarray(t))
        return p.sigma / (p.alpha + p.sigma)

    # -------------------------------------------------------------------------------------------- process

    def levels(self, t: Array, like: Array) -> Point:
        """Levels and derivatives at times t (B,), shaped to multiply `like`."""
        return point(self.path, t.reshape(t.shape + (1,) * (like.ndim - t.ndim)))

    def q_sample(self, x1: Array, t: Array, noise: Array) -> Array:
        """x_t of clean latents and noise."""
        p = self.levels(t, x1)
        return p.alpha * x1 + p.sigma * noise

    def target_velocity(self, x1: Array, t: Array, noise: Array) -> Array:
        """The derivative of x_t by t."""
        return predictions.target("velocity", x1, noise, self.levels(t, x1))

    def predict(self, denoise_fn: DenoiseFn, x: Array, t: Array) -> Array:
        """The network's prediction (B, H, W, C) float32 at times t (B,), in our direction of time."""
        output = denoise_fn(x, self.shown_time(t))[..., : x.shape[-1]].astype(jnp.float32)
        if output.shape != x.shape:
            raise ValueError(f"the network's output has shape {output.shape}; expected {x.shape}")
        backwards = self.time_direction == "to_noise" and self.prediction == "velocity"
        return -output if backwards else output

    def velocity(self, output: Array, x: Array, p: Point) -> Array:
        """Drift of the probability-flow ODE, of the network's prediction at x."""
        return predictions.to_velocity(self.prediction, output, x, p)

    def score(self, output: Array, x: Array, p: Point) -> Array:
        """Gradient of log p(x_t), of the network's prediction at x."""
        return predictions.to_score(self.prediction, output, x, p)

    # --------------------------------------------------------------------------------------------- losses

    def training_losses(self, denoise_fn: DenoiseFn, x1: Array, t: Array, noise: Array) -> dict[str, Array]:
        """Per-example losses, each (B,): "loss", and the "mse" and "cosine" that it is the sum of.

        denoise_fn(x_t, shown time) -> the prediction. x1: clean latents. t: times in `training_interval`.
        """
        p, x_t = self.levels(t, x1), self.q_sample(x1, t, noise)
        output = self.predict(denoise_fn, x_t, t)
        target = predictions.target(self.prediction, x1, noise, p)
        error = output * p.sigma + noise if self.prediction == "score" else output - target
        mse = mean_flat(self._weight(p) * jnp.square(error))
        if self.cosine_weight == 0:
            return {"loss": mse, "mse": mse}
        cosine = mean_flat(1 - cosine_similarity(output, target))
        return {"loss": mse + self.cosine_weight * cosine, "mse": mse, "cosine": cosine}

    def _weight(self, p: Point) -> Any:
        """Weight of a squared error of noise (the score's is scaled to it), x0 or velocity."""
        if self.loss_weight is None or self.prediction == "velocity":
            return 1.0
        rate = half_squared_diffusion(p)
        weight = jnp.square(rate / p.sigma) if self.loss_weight == "velocity" else rate / jnp.square(p.sigma)
        return weight * jnp.square(p.alpha / p.sigma) if self.prediction == "x0" else weight


def cosine_similarity(a: Array, b: Array, floor: float = 1e-2) -> Array:
    """Over the last axis: (..., C) -> (...); norms below `floor` count as it.

    A new network's output is zero everywhere, where the norm has no derivative and 1 over it no bound.
    """
    squares = jnp.sum(a * a, axis=-1), jnp.sum(b * b, axis=-1)
    norms = [jnp.sqrt(jnp.maximum(square, floor**2)) for square in squares]
    return jnp.sum(a * b, axis=-1) / (norms[0] * norms[1])


def half_squared_diffusion(p: Point) -> Any:
    """g^2 / 2 of the forward SDE with these marginals: alpha'/alpha sigma^2 - sigma sigma'; needs alpha > 0."""
    return -p.sigma * p.determinant / p.alpha


def diffusion_coefficient(form: DiffusionForm, t: Any, p: Point, norm: float, xp: Any) -> Any:
    """w_t of the reverse SDE dx = (v + w score) dt + sqrt(2 w) dW (SiT, section 2.4), which a sampler may choose."""
    forms: dict[str, Callable[[], Any]] = {
        "constant": lambda: norm * xp.ones_like(t),
        "sbdm": lambda: norm * half_squared_diffusion(p),
        "sigma": lambda: norm * p.sigma,
        "linear": lambda: norm * (1 - t),
        "decreasing": lambda: 0.25 * (norm * xp.cos(xp.pi * t) + 1) ** 2,
        "increasing_decreasing": lambda: norm * xp.sin(xp.pi * t) ** 2,
    }
    if form not in forms:
        raise ValueError(f"diffusion_form is {form!r}; expected one of {', '.join(forms)}")
    return forms[form]()
