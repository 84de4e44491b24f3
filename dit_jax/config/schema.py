"""Every option of a run, its default and its meaning, once."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from dit_jax.config.lora import LoraConfig
from dit_jax.config.networks import DIT_PATCHES as DIT_PATCHES
from dit_jax.config.networks import DIT_SIZES as DIT_SIZES
from dit_jax.config.networks import Conditioning as Conditioning
from dit_jax.config.networks import DiTConfig, NetworkConfig
from dit_jax.config.networks import ModelConfig as ModelConfig
from dit_jax.config.processes import GaussianConfig, ProcessConfig
from dit_jax.config.text import TextConfig

Precision = Literal["float32", "bfloat16"]


class ConfigError(ValueError):
    """An option is unknown, of the wrong type, or contradicts another."""


@dataclass(frozen=True)
class ComputeConfig:
    """How the network is computed on the machine at hand. A run may change it at every start: what a checkpoint
    holds does not depend on it."""

    dtype: Precision = "float32"
    """Compute precision. Parameters, norms' statistics, softmax, timestep embedding and loss stay float32."""
    quantization: Literal["none", "fp8"] = "none"
    """fp8: training computes the blocks' four large products (qkv, proj, fc1, fc2) in 8-bit floats, forward and
    backward; not with attention tokens_last. For GPUs that have 8-bit matrix units (Ada, Hopper and later)."""
    attention: Literal["auto", "einsum", "tokens_last", "tokens_last_by_head", "xla", "cudnn"] = "auto"
    """Attention kernel: auto picks cudnn on a GPU in bfloat16, tokens_last (einsum in a TPU's layout; by_head: one
    head after the other, for long sequences) on a TPU, einsum elsewhere."""
    norm_kernel: Literal["xla", "pallas"] = "xla"
    """Residual, gate, norm and modulation between a block's branches: xla as the compiler fuses them, pallas in one
    kernel for GPUs, for adaln and adaln_zero (on a CPU it is interpreted, which is slow; not for TPUs)."""
    remat: Literal["none", "full", "dots", "dots_attention"] = "none"
    """What the backward pass recomputes: nothing; all but block inputs; all but linear layers' outputs; all but
    linear layers' and attention's outputs."""
    unroll: Literal[True, False, "auto"] = "auto"
    """Unroll the loop over layers: longer compilation, at times faster steps. auto: on a single CPU device, where
    they are wide (256 channels or more). Parameters keep their layout. Without a value true; --compute.no-unroll is
    false."""


@dataclass(frozen=True)
class DataConfig:
    """The latent dataset."""

    dir: str = ""
    """Folder of the prepared latent dataset (TFDS format, ArrayRecord shards)."""
    mixture: tuple[tuple[str, float], ...] = ()
    """Several datasets in the place of `dir`, each with its weight, such as data/a 3 data/b 1: three quarters of a
    run's records are of the first. They must have the same autoencoder, latents and classes or captions."""
    sizes: tuple[tuple[int, int], ...] = ()
    """Heights and widths of latents that parts of the mixture may have besides --model.input-size, such as 24 40 40
    24: a batch is of one size then, and its part is drawn by the weights at every step."""
    source: str = ""
    """Where to prepare the dataset from when `dir` does not exist yet: digits, or digits-text, pairs of them with
    captions, which need no download."""
    mirror: bool = True
    """Draw every image or its mirror with equal chance (needs a dataset prepared with mirrors)."""
    cache: Literal["none", "ram", "device"] = "none"
    """Hold the whole set in host or device memory."""
    local_cache: str = ""
    """Folder on each host's own disk, or in its memory, to which shards are copied before they are read (empty: they
    are read where they lie)."""
    local_cache_gb: float = 100.0
    """Size of that folder at most, in units of 10^9 bytes; the shard unused for longest leaves first."""
    workers: int = 0
    """Threads that read ahead (0: chosen by the machine)."""
    vae: str = ""
    """Autoencoder that the dataset must have been encoded by, and that decodes the samples of a run: a diffusers
    folder, a hub id or `digits` (empty: the one that the dataset names)."""


@dataclass(frozen=True)
class OptimConfig:
    """AdamW and the running average of the parameters."""

    learning_rate: float = 1e-4
    """Peak learning rate."""
    schedule: Literal["constant", "cosine", "linear"] = "constant"
    """Learning rate after warm-up; cosine and linear decay to zero at train.steps."""
    warmup_steps: int = 0
    """Steps of linear warm-up from zero."""
    b1: float = 0.9
    """Adam's decay of the first moment."""
    b2: float = 0.999
    """Adam's decay of the second moment."""
    eps: float = 1e-8
    """Adam's addend to the root of the second moment, in units of the gradient: where gradients are no larger,
    updates shrink with them instead of growing rounding noise to the size of a step."""
    weight_decay: float = 0.0
    """Decoupled weight decay, on matrices only."""
    grad_clip: float = 0.0
    """Largest global gradient norm (0: no clipping)."""
    ema_decay: float = 0.9999
    """Decay of the exponential moving average; warmed up as min(decay, (1 + n) / (10 + n))."""
    ema_more: tuple[float, ...] = ()
    """Decays of further averages that are kept beside the main one."""
    ema_sigma_rel: tuple[float, ...] = ()
    """Relative widths of power-function averages (EDM2), such as 0.05 0.1; with train.snapshot-every any other
    width can be made afterwards."""


@dataclass(frozen=True)
class MeshConfig:
    """Devices as a mesh (data, fsdp, tensor). One size may be -1, which fills in."""

    preset: Literal["replicated", "zero1", "fsdp", "fsdp_tensor"] = "replicated"
    """What is split over devices besides the batch: nothing; optimizer state and EMA, over data and fsdp; those
    and the parameters, over fsdp; the same with heads and MLP width over tensor."""
    data: int | None = None
    """Devices that each hold a copy and a part of the batch (None: all that the other two leave)."""
    fsdp: int | None = None
    """Devices that share parameters and also split the batch (None: up to 16 of a GPU node or a TPU slice under fsdp
    and fsdp_tensor, up to 128 under zero1, else 1)."""
    tensor: int | None = None
    """Devices that split heads and MLP width (None: 2 for fsdp_tensor, else 1)."""


@dataclass(frozen=True)
class TrainConfig:
    """The run."""

    workdir: str = "runs/default"
    """Folder of the run: config.json, checkpoints/, metrics.jsonl, TensorBoard events, samples/."""
    seed: int = 0
    """Seed of everything random; each draw is a function of (seed, step, purpose)."""
    batch_size: int = 256
    """Global batch size."""
    microbatch: int = 0
    """Images that one device holds at once; gradients accumulate over the rest of its share (0: no split)."""
    steps: int = 400_000
    """Train until this step."""
    log_every: int = 100
    """Steps between lines of metrics."""
    checkpoint_every: int = 10_000
    """Steps between checkpoints; one more is written at the end."""
    local_checkpoint_every: int = 0
    """Steps between emergency copies of the state on the hosts themselves, each part on two of them (0: none); a run
    that goes on takes the newest, if that is newer than its checkpoints."""
    local_checkpoint_dir: str = ""
    """Folder of a host for them (empty: /dev/shm where it has room, else the system's temporary folder)."""
    keep: int = 3
    """Newest checkpoints kept; the one with the best loss is kept as well."""
    milestone_every: int = 0
    """Steps between checkpoints that are kept for good (0: none)."""
    snapshot_every: int = 0
    """Steps between snapshots of the averages of optim.ema-sigma-rel (0: none)."""
    bad_steps: int = 10
    """Updates in a row that are not finite before the run goes back to its last checkpoint, on other data."""
    max_rollbacks: int = 3
    """How often it may do so before it stops."""
    stall_minutes: float = 0.0
    """Minutes that a step may take, once the first one is done; then the process says where it is and ends with code
    75, so that a scheduler starts it again (0: any time)."""
    profile_steps: str = ""
    """First and last step, such as 20:23, of which a trace is written to WORKDIR/profile (empty: none)."""
    init_from: str = ""
    """Folder of a run whose averaged weights this one starts from; of its label table, those of classes with the same
    name (or all, where names are missing and the numbers of classes agree)."""
    sample_every: int = 10_000
    """Steps between grids of samples (0: none)."""
    sample_count: int = 64
    """Samples in a grid."""
    sample_steps: int = 50
    """Steps of their sampler, which is the one of sample.py without --sampler."""
    sample_cfg_scale: float = 1.5
    """Guidance scale of those samples (1: none)."""
    evaluate_every: int = 0
    """Steps between measurements of the averaged weights, by samples drawn as those of the grids (0: none)."""
    evaluate_count: int = 10_000
    """Samples of a measurement, the same ones each time."""
    evaluate_reference: str = ""
    """What they are compared with, as evaluate.py --reference: by the Inception weights of $DIT_JAX_INCEPTION, or by
    the referee of the digits (empty: the digits, of a run on them)."""


@dataclass(frozen=True)
class Config:
    """A training run of a Diffusion Transformer on precomputed VAE latents."""

    model: NetworkConfig = field(default_factory=DiTConfig)
    text: TextConfig = field(default_factory=TextConfig)
    lora: LoraConfig = field(default_factory=LoraConfig)
    compute: ComputeConfig = field(default_factory=ComputeConfig)
    diffusion: ProcessConfig = field(default_factory=GaussianConfig)
    data: DataConfig = field(default_factory=DataConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    mesh: MeshConfig = field(default_factory=MeshConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
