"""The options of each kind of process. `kind` tells them apart, in a recipe's class and in a saved config.

Each kind says what its options must be, as (whether it holds, option, what was found, what is expected).
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Annotated, Any, Literal

Rule = tuple[bool, str, object, str]


@dataclass(frozen=True)
class GaussianConfig:
    """Gaussian diffusion: noise schedule, what the network predicts, the loss."""

    schedule: Literal["linear", "squaredcos_cap_v2"] = "linear"
    """Betas over the training timesteps."""
    num_timesteps: int = 1000
    """Training timesteps T."""
    prediction: Literal["epsilon", "x0", "v"] = "epsilon"
    """What the network's first C output channels mean."""
    learn_sigma: bool = True
    """Learn the reverse variance in a second half of output channels (learned range)."""
    sigma: Literal["fixed_small", "fixed_large"] = "fixed_large"
    """The reverse variance when learn_sigma is off."""
    loss: Literal["mse", "rescaled_mse", "kl", "rescaled_kl"] = "mse"
    """Training loss; with learn_sigma the two mse losses add the variational bound for the variance."""
    kind: Literal["gaussian"] = "gaussian"
    """The kind of process, which the recipe chooses."""

    def rules(self) -> Iterator[Rule]:
        """What the options must be."""
        least = 21 if self.schedule == "linear" else 2  # linear betas reach 1 with fewer
        yield self.num_timesteps > 0, "num_timesteps", self.num_timesteps, "a number above 0"
        yield self.num_timesteps <= 1_000_000, "num_timesteps", self.num_timesteps, "at most 1000000"
        expected = f"at least {least} for --diffusion.schedule {self.schedule}"
        yield self.num_timesteps >= least, "num_timesteps", self.num_timesteps, expected

    def steps_of_a_sampler(self) -> tuple[float, str]:
        """(the most that one can take, what is expected in words)."""
        return self.num_timesteps, f"2 to {self.num_timesteps}, the timesteps of training"


@dataclass(frozen=True)
class FlowMatchingConfig:
    """Flow matching in continuous time, from noise at t = 0 to data at t = 1."""

    path: Literal["linear", "gvp", "vp"] = "linear"
    """Levels of signal and noise over time: t and 1 - t, a quarter of a circle, or DDPM's limit."""
    prediction: Literal["velocity", "score", "noise", "x0"] = "velocity"
    """What the network's first C output channels mean."""
    loss_weight: Literal["none", "velocity", "likelihood"] = "none"
    """Weight of a squared error of score, noise or x0: that of the velocity's error, or of the likelihood's bound."""
    cosine_weight: float = 0.0
    """Weight of an added 1 - cosine similarity of prediction and target (arXiv 2501.01423)."""
    times: Literal["uniform", "logit_normal", "mode", "cosmap"] = "uniform"
    """Distribution of the training times (arXiv 2403.03206, section 3.1)."""
    logit_mean: float = 0.0
    """Mean of logit_normal's logit; above 0 favours times near the data."""
    logit_std: float = 1.0
    """Standard deviation of logit_normal's logit."""
    mode_scale: float = 1.29
    """Of mode: below 0 favours both ends, above 0 the middle."""
    shift: float = 1.0
    """Moves training times towards the noise (above 1), as for higher resolutions."""
    time_scale: float = 1.0
    """The network is shown this times t: 1 in SiT, 1000 in SD3."""
    time_direction: Literal["to_data", "to_noise"] = "to_data"
    """Whether the network is shown t, or 1 - t and predicts the velocity towards the noise (SD3, REPA)."""
    train_eps: float | None = None
    """Margin of time that training leaves out where the path is singular (None: SiT's)."""
    sample_eps: float | None = None
    """The same for sampling (None: SiT's)."""
    learn_sigma: bool = False
    """Give the network a second half of output channels, which nothing reads: published SiT networks have one."""
    kind: Literal["flow"] = "flow"
    """The kind of process, which the recipe chooses."""

    def rules(self) -> Iterator[Rule]:
        """What the options must be."""
        for name in ("logit_std", "shift", "time_scale"):
            value = getattr(self, name)
            yield value > 0, name, value, "a number above 0"
        most = 2 / (math.pi - 2)
        yield -1 <= self.mode_scale <= most, "mode_scale", self.mode_scale, f"-1 to {most:.4f}"
        yield self.cosine_weight >= 0, "cosine_weight", self.cosine_weight, "0 or more"
        for name in ("train_eps", "sample_eps"):
            margin = getattr(self, name)
            yield margin is None or 0 <= margin < 0.5, name, margin, "at least 0 and below 0.5"
        fits = self.prediction != "velocity" or self.loss_weight != "likelihood"
        yield fits, "loss_weight", self.loss_weight, "none, or another --diffusion.prediction than velocity"

    def steps_of_a_sampler(self) -> tuple[float, str]:
        """(the most that one can take, what is expected in words)."""
        return math.inf, "2 or more"


DiffusionConfig = GaussianConfig
"""The name of the one kind that there was."""


class ByKind:
    """Has pydantic, which is not imported before a config is read, choose the member of a union by its kind."""

    def __get_pydantic_core_schema__(self, source: Any, handler: Any) -> Any:
        import pydantic

        return handler.generate_schema(Annotated[source, pydantic.Field(discriminator="kind")])


PROCESS_KINDS = ("gaussian", "flow")
ProcessConfig = Annotated[GaussianConfig | FlowMatchingConfig, ByKind()]
