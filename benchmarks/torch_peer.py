"""The same work in PyTorch: a training step with AdamW and EMA, and the guided DDIM loop.

Networks: the published design with SDPA (`torch_dit`), or diffusers' DiTTransformer2DModel and its pipeline.
In bfloat16: autocast, or all of it with float32 master weights. Fused AdamW, and torch.compile as asked.

Letters: B batch, C latent channels, T steps of the process.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch_dit import TorchDiT

from dit_jax.config import Config

Network = Callable[[Tensor, Tensor, Tensor], Tensor]
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
torch.backends.cudnn.allow_tf32 = False  # in what is compared with plain float32; see set_products


def set_products(kind: str) -> None:
    """How a GPU multiplies what is float32: "tf32" or "float32"."""
    torch.set_float32_matmul_precision("high" if kind == "tf32" else "highest")
    torch.backends.cudnn.allow_tf32 = kind == "tf32"


def facts() -> dict[str, Any]:
    """What the figures hang on besides the versions."""
    return {"cpu_capability": torch.backends.cpu.get_cpu_capability(), "threads": torch.get_num_threads()}


def synchronize() -> None:
    """Wait for the GPU, if there is one."""
    if DEVICE == "cuda":
        torch.cuda.synchronize()


def torch_network(config: Config, params: Any = None) -> nn.Module:
    """The published design; with `params`, our parameters in it."""
    m = config.model
    assert m.patch_size and m.hidden_size and m.num_heads and m.depth
    rows, hidden = m.num_classes + 1, int(m.hidden_size * m.mlp_ratio)
    network = TorchDiT(
        m.input_size[0], m.patch_size, m.in_channels, m.hidden_size, m.depth, m.num_heads, hidden, rows
    )
    if params is not None:
        from dit_jax.interop.official import state_dict_from_params
        from dit_jax.models.create import build_model

        state = state_dict_from_params(params, build_model(config))
        network.load_state_dict({name: torch.from_numpy(value.copy()) for name, value in state.items()})
    return network.to(DEVICE)


def diffusers_network(config: Config) -> nn.Module:
    """diffusers' DiT of these sizes, with its own random weights."""
    from diffusers import DiTTransformer2DModel

    m = config.model
    assert m.hidden_size and m.num_heads
    return DiTTransformer2DModel(
        num_attention_heads=m.num_heads, attention_head_dim=m.hidden_size // m.num_heads,
        in_channels=m.in_channels, out_channels=2 * m.in_channels, num_layers=m.depth,
        sample_size=m.input_size[0], patch_size=m.patch_size, num_embeds_ada_norm=m.num_classes,
    ).to(DEVICE)  # fmt: skip


def call(network: nn.Module, name: str) -> Network:
    """The network as a function (x, t, y) -> output."""
    if name == "diffusers":
        return lambda x, t, y: network(x, t, y, return_dict=False)[0]
    return network


def compiled(function: Any, mode: str) -> Any:
    """`function` under torch.compile, or as it is."""
    if mode == "none":
        return function
    return torch.compile(function, mode=None if mode == "default" else mode)


# ------------------------------------------------------------------------------------------- training


class Diffusion:
    """The linear schedule's tables, and the published loss: MSE plus the variance's bound."""

    def __init__(self, steps: int = 1000) -> None:
        betas = np.linspace(0.1 / steps, 20 / steps, steps)
        ac = np.cumprod(1 - betas)
        previous = np.append(1.0, ac[:-1])
        variance = betas * (1 - previous) / (1 - ac)
        columns = {
            "signal": np.sqrt(ac), "noise": np.sqrt(1 - ac), "log_max": np.log(betas),
            "log_min": np.log(np.append(variance[1], variance[1:])),
            "of_x0": betas * np.sqrt(previous) / (1 - ac),
            "of_xt": (1 - previous) * np.sqrt(1 - betas) / (1 - ac),
        }  # fmt: skip
        self.tables = {k: torch.tensor(v, dtype=torch.float32, device=DEVICE) for k, v in columns.items()}
        self.steps = steps

    def loss(self, network: Network, x0: Tensor, t: Tensor, noise: Tensor, y: Tensor) -> Tensor:
        """Mean loss; x0 and noise (B, C, H, W), t and y (B,)."""
        at = {name: table[t][:, None, None, None] for name, table in self.tables.items()}
        x_t = at["signal"] * x0 + at["noise"] * noise
        eps, fraction = network(x_t, t, y).float().chunk(2, dim=1)
        mse = (noise - eps).square().mean()
        # The bound trains the variance alone, as the mean's part is detached (arXiv 2102.09672, eq. 16).
        share = (fraction + 1) / 2
        log_variance = share * at["log_max"] + (1 - share) * at["log_min"]
        pred_x0 = (x_t - at["noise"] * eps.detach()) / at["signal"]
        mean = at["of_x0"] * pred_x0 + at["of_xt"] * x_t
        true_mean = at["of_x0"] * x0 + at["of_xt"] * x_t
        difference = at["log_min"] - log_variance
        kl = 0.5 * (
            difference.exp() - 1 - difference + (true_mean - mean).square() * torch.exp(-log_variance)
        )
        likelihood = -_log_bin(x0, mean, 0.5 * log_variance)
        terms = torch.where(t[:, None, None, None] == 0, likelihood, kl)
        return mse + terms.mean() / math.log(2)


def _log_bin(x: Tensor, mean: Tensor, log_scale: Tensor) -> Tensor:
    """Log probability of the 8-bit bin around x under a normal distribution (arXiv 2006.11239, eq. 13)."""

    def cdf(v: Tensor) -> Tensor:
        return 0.5 * (1 + torch.tanh(math.sqrt(2 / math.pi) * (v + 0.044715 * v**3)))

    inverse = torch.exp(-log_scale)
    upper, lower = cdf(inverse * (x - mean + 1 / 255)), cdf(inverse * (x - mean - 1 / 255))
    inside = torch.where(x < -0.999, upper, torch.where(x > 0.999, 1 - lower, upper - lower))
    return inside.clamp(min=1e-12).log()


class TrainStep:
    """A training step that draws latents, times, noise and dropped labels, and updates weights and EMA.

    In bfloat16 the network computes under autocast, or with `master` is bfloat16 itself: AdamW and EMA then work on
    float32 weights, which are rounded into it.
    """

    def __init__(
        self, network: nn.Module, name: str, config: Config, mode: str, scaling: float, master: bool = False
    ) -> None:
        self.config, self.scaling, self.master = config, scaling, master
        self.diffusion = Diffusion()
        self.weights = [p.detach().clone() for p in network.parameters() if p.requires_grad] if master else []
        if master:
            network = network.to(torch.bfloat16)
        self.network = network
        self.trained = [p for p in network.parameters() if p.requires_grad]
        self.weights = self.weights or self.trained  # float32, those that AdamW updates
        self.averages = [p.detach().clone() for p in self.weights]
        o = config.optim
        self.optimizer = torch.optim.AdamW(
            self.weights, o.learning_rate, (o.b1, o.b2), o.eps, weight_decay=o.weight_decay, fused=True
        )
        self.call = compiled(call(network, name), mode)
        self.autocast = config.compute.dtype == "bfloat16" and not master

    def denoise(self, x: Tensor, t: Tensor, y: Tensor) -> Tensor:
        """The network in its own type."""
        return self.call(x.bfloat16() if self.master else x, t, y)

    def __call__(self, moments: Tensor, y: Tensor) -> Tensor:
        """moments (B, 2C, H, W) float16, y (B,) -> the loss."""
        m = self.config.model
        mean, std = moments.float().chunk(2, dim=1)
        x0 = (mean + std * torch.randn_like(mean)) * self.scaling
        t = torch.randint(self.diffusion.steps, (len(x0),), device=x0.device)
        dropped = torch.rand(len(x0), device=x0.device) < m.class_dropout_prob
        y = torch.where(dropped, m.num_classes, y)
        with torch.autocast(DEVICE, torch.bfloat16, enabled=self.autocast):
            loss = self.diffusion.loss(self.denoise, x0, t, torch.randn_like(x0), y)
        loss.backward()
        if self.master:
            for weight, rounded in zip(self.weights, self.trained, strict=True):
                weight.grad = None if rounded.grad is None else rounded.grad.float()
                rounded.grad = None
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        with torch.no_grad():
            if self.master:
                torch._foreach_copy_(self.trained, self.weights)
            torch._foreach_lerp_(self.averages, self.weights, 1 - self.config.optim.ema_decay)
        return loss


# ------------------------------------------------------------------------------------------- sampling


def make_diffusers_loop(config: Config, steps: int, scale: float, mode: str) -> Callable[[Tensor], Tensor]:
    """diffusers' DiTPipeline with DDIM, from labels (B,) to latents; its autoencoder does nothing."""
    from diffusers import DDIMScheduler, DiTPipeline

    class NoAutoencoder(nn.Module):
        dtype, device = torch.float32, torch.device(DEVICE)
        config = type("config", (), {"scaling_factor": 1.0})

        def decode(self, latents: Tensor) -> Any:
            return type("output", (), {"sample": latents})

    dtype = getattr(torch, config.compute.dtype)
    network = diffusers_network(config).eval().to(dtype)
    if mode != "none":
        network.compile(mode=None if mode == "default" else mode)
    pipeline = DiTPipeline(network, NoAutoencoder(), DDIMScheduler(num_train_timesteps=1000))
    pipeline.set_progress_bar_config(disable=True)

    def sample(labels: Tensor) -> Tensor:
        images = pipeline(
            labels.tolist(),
            guidance_scale=scale,
            num_inference_steps=steps,
            output_type="np",
            return_dict=False,
        )
        return torch.from_numpy(np.asarray(images[0]))

    return sample


def make_torch_loop(
    network: nn.Module, config: Config, steps: int, scale: float, mode: str
) -> Callable[[Tensor, Tensor], Tensor]:
    """Guided DDIM on all channels: start noise (B, C, H, W), labels (B,) -> latents (B, C, H, W)."""
    m = config.model
    dtype = getattr(torch, config.compute.dtype)
    forward = compiled(network.eval().to(dtype), mode)
    kept = np.round(np.linspace(0, 999, steps)).astype(np.int64)  # as space_timesteps of this package
    ac = np.cumprod(1 - np.linspace(1e-4, 0.02, 1000))[kept]
    previous = np.append(1.0, ac[:-1])

    @torch.inference_mode()
    def sample(noise: Tensor, labels: Tensor) -> Tensor:
        x = noise
        both = torch.cat([labels, torch.full_like(labels, m.num_classes)])
        for i in reversed(range(steps)):
            t = torch.full((len(both),), int(kept[i]), device=x.device)
            out = forward(torch.cat([x, x]).to(dtype), t, both).float()
            conditional, null = out[:, : m.in_channels].chunk(2)
            eps = null + scale * (conditional - null)
            x0 = (x - math.sqrt(1 - ac[i]) * eps) / math.sqrt(ac[i])
            x = math.sqrt(previous[i]) * x0 + math.sqrt(1 - previous[i]) * eps
        return x

    return sample
