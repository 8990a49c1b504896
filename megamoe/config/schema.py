"""Every setting of a run: typed, bounded, documented once. The reference page is generated from this file.

Sizes that follow from these settings (parameters, FLOPs) are in :mod:`megamoe.model.size`; whether a layout can run at
all is in :mod:`megamoe.parallel.layout`.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, model_validator


class Section(BaseModel):
    """A block of settings: unknown keys are errors, values cannot change after loading."""

    model_config = ConfigDict(
        extra="forbid", frozen=True, allow_inf_nan=False, validate_default=True, serialize_by_alias=True
    )


def _as_list(value: object) -> object:
    return [value] if isinstance(value, str) else value


def _as_sources(value: object) -> object:
    """Shards alone are one source."""
    if isinstance(value, str) or (isinstance(value, list) and value and all(isinstance(each, str) for each in value)):
        return [{"shards": value}]
    return [value] if isinstance(value, dict) else value


Shards = Annotated[list[str], BeforeValidator(_as_list)]
PositiveInt = Annotated[int, Field(gt=0, strict=True)]
Count = Annotated[int, Field(ge=0, strict=True)]
NonNegative = Annotated[float, Field(ge=0)]
Positive = Annotated[float, Field(gt=0)]


class RunConfig(Section):
    """Identity of the run."""

    name: str = Field("run", min_length=1, pattern=r"^[A-Za-z0-9._-]+$", description="Name of the run.")
    dir: Path | None = Field(None, description="Folder of the run. Default: runs/<run.name>.")
    seed: Count = Field(0, description="Seed of the initial weights and of the order of samples.")

    @property
    def folder(self) -> Path:
        """Folder that holds everything the run writes."""
        return self.dir if self.dir is not None else Path("runs") / self.name


class VisionConfig(Section):
    """Vision encoder in the SigLIP layout (arXiv:2303.15343): patch convolution, pre-norm blocks, GELU-tanh MLP."""

    image_size: PositiveInt = Field(224, description="Side in pixels to which pictures are resized.")
    patch_size: PositiveInt = Field(16, description="Side of a patch in pixels; divides image_size.")
    width: PositiveInt = Field(768, description="Width of the residual stream.")
    depth: PositiveInt = Field(12, description="Number of blocks.")
    heads: PositiveInt = Field(12, description="Attention heads; divides width.")
    mlp_width: PositiveInt = Field(3072, description="Hidden width of a dense block's MLP.")
    sparse_every: Count = Field(
        0, description="Every n-th block has experts in place of its MLP (n=2: blocks 1, 3, 5, ...); 0: all dense."
    )
    expert_width: PositiveInt = Field(1024, description="Hidden width of one expert in the sparse blocks.")
    norm_eps: Positive = Field(1e-6, description="Epsilon of the layer norms.")

    @property
    def patches(self) -> int:
        """Tokens per picture, in the encoder and, after the projector, in the decoder."""
        return (self.image_size // self.patch_size) ** 2

    def is_sparse(self, block: int) -> bool:
        """Whether block ``block`` (from 0) has experts."""
        return self.sparse_every > 0 and (block + 1) % self.sparse_every == 0

    @model_validator(mode="after")
    def _divides(self) -> VisionConfig:
        if self.image_size % self.patch_size:
            raise ValueError(f"patch_size {self.patch_size} does not divide image_size {self.image_size}")
        if self.width % self.heads:
            raise ValueError(f"heads {self.heads} does not divide width {self.width}")
        return self


class DecoderConfig(Section):
    """Language decoder in the Qwen3-MoE layout (arXiv:2505.09388): RMSNorm, RoPE, GQA with q/k norm, SwiGLU."""

    vocab_size: PositiveInt = Field(32000, description="Rows of the embedding; at least the tokenizer's pieces.")
    width: PositiveInt = Field(1024, description="Width of the residual stream.")
    depth: PositiveInt = Field(12, description="Number of blocks.")
    heads: PositiveInt = Field(16, description="Query heads.")
    kv_heads: PositiveInt = Field(4, description="Key/value heads (grouped-query attention); divides heads.")
    head_dim: PositiveInt = Field(64, description="Width of one head; even, for rotary positions.")
    mlp_width: PositiveInt = Field(4096, description="Hidden width of a dense block's SwiGLU.")
    sparse_every: Count = Field(1, description="Every n-th block has experts in place of its MLP; 0: all dense.")
    expert_width: PositiveInt = Field(1024, description="Hidden width of one expert in the sparse blocks.")
    rope_theta: Positive = Field(1e6, description="Base of the rotary position frequencies.")
    norm_eps: Positive = Field(1e-6, description="Epsilon of the RMS norms.")

    def is_sparse(self, block: int) -> bool:
        """Whether block ``block`` (from 0) has experts."""
        return self.sparse_every > 0 and (block + 1) % self.sparse_every == 0

    @model_validator(mode="after")
    def _divides(self) -> DecoderConfig:
        if self.heads % self.kv_heads:
            raise ValueError(f"kv_heads {self.kv_heads} does not divide heads {self.heads}")
        if self.head_dim % 2:
            raise ValueError(f"head_dim {self.head_dim} is odd; rotary positions need an even number")
        return self


class MoEConfig(Section):
    """Sparse blocks of both towers: softmax top-k router in fp32, renormalised weights, dropless."""

    experts: PositiveInt = Field(8, description="Experts per sparse block.")
    top_k: PositiveInt = Field(2, description="Experts that each token visits.")
    aux_loss: NonNegative = Field(
        0.01, description="Weight of the load-balancing loss (arXiv:2101.03961), taken per packed sequence."
    )
    z_loss: NonNegative = Field(0.001, description="Weight of the router z-loss (arXiv:2202.08906).")

    @model_validator(mode="after")
    def _k_of_e(self) -> MoEConfig:
        if self.top_k > self.experts:
            raise ValueError(f"top_k {self.top_k} is more than experts {self.experts}")
        return self


class ModelConfig(Section):
    """The vision-language model: encoder, two-layer MLP projector, decoder."""

    vision: VisionConfig = VisionConfig()
    decoder: DecoderConfig = DecoderConfig()
    moe: MoEConfig = MoEConfig()
    init_std: Positive = Field(0.02, description="Standard deviation of the initial weights.")
    attention: Literal["auto", "sdpa", "flex"] = Field(
        "auto",
        description="Kernel for packed sequences: sdpa takes a dense mask, flex a block mask (CUDA); auto picks.",
    )


class ParallelConfig(Section):
    """How the ranks share the work. Data parallelism is what is left: ranks / pipeline."""

    pipeline: PositiveInt = Field(1, description="Pipeline stages.")
    expert: PositiveInt = Field(1, description="Ranks that share the experts of a block; divides data parallelism.")
    zero: Annotated[int, Field(ge=0, le=3, strict=True)] = Field(
        1, description="ZeRO stage of DeepSpeed: 1, or without a pipeline 2 or 3. 0 is refused: it clips wrongly."
    )
    recompute: Literal["none", "block", "offload"] = Field(
        "none",
        description="Activations kept for backward: all; only block inputs (torch checkpoint); block inputs moved to "
        "host memory (fairscale checkpoint_wrapper).",
    )


class SourceConfig(Section):
    """Shards that are mixed with others at a given weight."""

    shards: Annotated[Shards, Field(min_length=1)] = Field(description="Shards of this source.")
    weight: Positive = Field(1.0, description="Share of the samples read, relative to the other sources.")
    name: str | None = Field(None, min_length=1, description="Name in the metrics. Default: its number.")


Sources = Annotated[list[SourceConfig], BeforeValidator(_as_sources)]


class DataConfig(Section):
    """Image-text shards and how they become packed sequences."""

    train: Sources = Field(
        [],
        description="Training shards: folder, glob, path/{00000..00063}.tar, a::b, http(s)://, s3:// and what else fsspec "
        "knows, pipe:. Several sources are a list of {shards: ..., weight: 1.0, name: ...}; weight is the share of the "
        "samples read, and each source goes through its own epochs.",
    )
    validation: Shards = Field([], description="Held-out shards, same forms: what eval takes without --data.")
    held_out: Annotated[float, Field(ge=0, lt=1)] = Field(
        0.0,
        description="Share of the training samples, chosen by a hash of their keys, that is never trained on; eval takes "
        "them if there is no data.validation. The choice stays when shards are re-cut.",
    )
    tokenizer: Path | None = Field(None, description="sentencepiece model made by `megamoe data tokenizer`.")
    sequence_length: PositiveInt = Field(2048, description="Tokens of a packed sequence, picture tokens included.")
    images_per_sequence: PositiveInt = Field(8, description="Picture slots of a packed sequence.")
    workers: Count = Field(2, description="Decoding processes per loading rank; 0: decode in the training process.")
    prefetch: PositiveInt = Field(2, description="Steps that each worker prepares ahead.")
    shuffle_shards: PositiveInt = Field(
        8, description="Samples are shuffled within windows of so many shards, shards over the whole epoch."
    )
    index: Path | None = Field(
        None, description="Folder for indexes of shards that have none beside them. Default: <run.dir>/index."
    )
    cache: Path | None = Field(
        None,
        description="Folder of this node for shards that are not local files, shared by its ranks. Default: "
        "$MEGAMOE_CACHE, else ~/.cache/megamoe/shards.",
    )
    cache_gb: Positive = Field(
        100.0, description="Size of the cache in GB (10^9 bytes); what was used least recently is dropped first."
    )
    bad_shards: Literal["stop", "quarantine"] = Field(
        "stop",
        description="When a shard cannot be had or read: stop the run, or go on without it; all ranks do the same and the "
        "checkpoint keeps it.",
    )
    max_bad_shards: Count = Field(10, description="Stop when more shards than this are in quarantine.")
    max_corrupt: Annotated[float, Field(ge=0, le=1)] = Field(
        0.01, description="Stop when more than this share of the samples read so far could not be used."
    )
    audit: bool = Field(False, description="Write the id of each sample trained on to <run.dir>/audit.")


class TrainConfig(Section):
    """Length, batch and number format of the run."""

    steps: PositiveInt = Field(1000, description="Optimizer steps.")
    global_batch: PositiveInt = Field(64, description="Packed sequences per optimizer step, over all ranks.")
    micro_batch: PositiveInt = Field(1, description="Packed sequences per forward pass of a rank.")
    check_every: Count = Field(
        100,
        description="Steps between comparisons of what must be equal on several ranks (weights, bit by bit; counters, "
        "generators, position in the data); they are made before each checkpoint as well. 0: never, and no rank looks "
        "after its masters and moments either.",
    )
    max_skipped: Count = Field(
        3,
        description="Steps in a row that may be skipped before the run stops: their loss or gradient is NaN or Inf, also "
        "when computed once more.",
    )
    # The demo, which is healthy, never gets beyond 6.4 of 64 updates, and far beyond is where real spikes are.
    spike_threshold: NonNegative = Field(
        20.0,
        description="A step is a spike, and is not applied, if its loss or gradient norm is so many times the spread "
        "(1.48 x median absolute deviation, at least 5% of the median for the loss and 20% for the norm) above the median "
        "of the last updates. 0: never.",
    )
    spike_window: Annotated[int, Field(ge=8)] = Field(
        64, description="Updates that a step is compared with; before so many are made nothing is a spike."
    )
    max_spikes: Count = Field(
        3,
        description="Spikes in a row that may be skipped; at one more the run goes back to a checkpoint from before them, "
        "and past them.",
    )
    spike_margin: Count = Field(
        8,
        description="Steps before the first of these spikes that the run goes past as well: it was their updates that led "
        "there.",
    )
    max_rollbacks: Count = Field(
        2,
        description="Times that the run goes back without a new checkpoint from behind the spikes; then it stops.",
    )
    precision: Literal["fp32", "bf16"] = Field("bf16", description="bf16 keeps fp32 master weights.")
    # Longer than the six tries that a stuck shard gets (6.5 minutes), shorter than the timeout of collectives (10), which
    # would end the ranks that wait and not say where the one hangs that they wait for.
    watchdog_seconds: NonNegative = Field(
        480.0,
        description="A rank that waits longer in one part of a step ends itself, with the stacks of its threads in its "
        "log; ten times as long in start-up, first step and saving. 0: never.",
    )


class OptimConfig(Section):
    """Optimizer, schedule and clipping."""

    name: Literal["adamw", "sgd"] = Field("adamw", description="Optimizer.")
    lr: Positive = Field(3e-4, description="Peak learning rate.")
    betas: tuple[float, float] = Field((0.9, 0.95), description="AdamW: decay of the two moments.")
    eps: Positive = Field(1e-8, description="AdamW: epsilon.")
    momentum: Annotated[float, Field(ge=0, lt=1)] = Field(0.0, description="SGD: momentum.")
    weight_decay: NonNegative = Field(0.1, description="Decoupled decay of matrices; norms and biases have none.")
    clip: NonNegative = Field(1.0, description="Clip the global gradient norm to this; 0: no clipping.")
    schedule: Literal["cosine", "wsd", "constant"] = Field(
        "cosine", description="After warm-up: cosine, warmup-stable-decay (arXiv:2404.06395), or constant."
    )
    warmup: Count = Field(100, description="Steps of linear warm-up.")
    decay: Count = Field(0, description="wsd: steps of linear decay at the end; 0: a tenth of the run.")
    min_lr: Annotated[float, Field(ge=0, le=1)] = Field(0.1, description="Final rate as a fraction of the peak.")

    @model_validator(mode="after")
    def _betas(self) -> OptimConfig:
        if not all(0 <= beta < 1 for beta in self.betas):
            raise ValueError(f"betas {list(self.betas)} must lie in [0, 1)")
        return self


class CheckpointConfig(Section):
    """When checkpoints are written and how many stay."""

    every: PositiveInt = Field(500, description="Steps between checkpoints; the last step is always saved.")
    keep: PositiveInt = Field(
        3, description="Checkpoints kept; older ones are deleted after a new one is complete, and when a run goes on."
    )
    keep_every: Count = Field(0, description="Checkpoints of steps that this divides stay for ever; 0: none.")
    # Off takes no memory beyond the training itself; on, what a fault costs is the same but for the seconds of one save.
    in_background: bool = Field(
        False,
        alias="async",
        description="Training goes on while a checkpoint is written from a copy in host memory (AdamW: 12 bytes for each "
        "parameter that the rank owns). The last one, and the one before a stop, are waited for.",
    )
    # With wait every checkpoint asked for is written; skip never holds the training up.
    when_busy: Literal["wait", "skip"] = Field(
        "wait",
        description="With checkpoint.async, when the one before is still being written: wait for it, or leave the new one "
        "out.",
    )
    mirror: str | None = Field(
        None,
        description="Folder of an object store (s3://bucket/runs/one, or what else fsspec writes) to which each checkpoint "
        "is copied while training goes on. --resume auto takes from there what the run's folder has lost.",
    )


class MetricsConfig(Section):
    """What is written for people to look at. metrics.jsonl has every step in any case."""

    tensorboard: bool = Field(True, description="Write TensorBoard event files.")
    tensorboard_every: PositiveInt = Field(10, description="Steps between scalars and expert loads in TensorBoard.")
    images_every: Count = Field(200, description="Steps between training pictures in TensorBoard; 0: none.")


class SlurmConfig(Section):
    """What `megamoe launch slurm` asks of SLURM; the names are those of sbatch. An option of the command wins."""

    model_config = ConfigDict(coerce_numbers_to_str=True)  # account: 4711, time: 90

    partition: str | None = Field(None, description="Partition.  None: the site's default.")
    account: str | None = Field(None, description="Account to charge.")
    qos: str | None = Field(None, description="Quality of service.")
    time: str | None = Field(None, description="Time limit of one job, such as 24:00:00; the run goes on in the next.")
    constraint: str | None = Field(None, description="Features that nodes must have.")
    exclude: str | None = Field(None, description="Nodes never to use.")
    reservation: str | None = Field(None, description="Reservation.")
    container: str | None = Field(None, description="Image to run in, for sites with pyxis (--container-image).")
    container_mounts: list[str] = Field(
        [], description="Further FOLDER:FOLDER_INSIDE for the container; the run's and the working folder are always there."
    )
    cpus_per_node: PositiveInt | None = Field(None, description="CPUs of each node.  None: all, the node is ours alone.")
    memory: str | None = Field(None, description="Memory of each node, such as 500G.  None: all of it.")
    # Twice the grace, so that a save under way and one more step with its save fit in.
    signal_seconds: PositiveInt = Field(
        120, description="Seconds before the time limit at which the run saves; more than launch.stop_grace."
    )
    again: Literal["requeue", "chain", "never"] = Field(
        "requeue",
        description="How the run goes on after the time limit or the loss of its nodes. requeue: the same job again; "
        "chain: a successor that waits for the end of the job, for sites that forbid requeue; never: it stops.",
    )
    extra: list[str] = Field([], description="Further options of sbatch, such as --mail-type=FAIL.")
    setup: list[str] = Field([], description="Shell lines before the start, such as module load cuda.")


class HealthConfig(Section):
    """What a node must have before ranks start on it (`megamoe launch`). Of a limit, 0 turns it off. Sizes in GiB."""

    check: Literal["full", "quick", "off"] = Field(
        "full",
        description="quick: each node looks at itself (GPUs, memory, disk, clock) and whether it reaches the others, at "
        "each start. full: also a short collective over all nodes, whenever one is new; it takes some seconds.",
    )
    # Python with torch and DeepSpeed takes 0.6 GiB before the model comes.
    free_memory: NonNegative = Field(1.0, description="Free host memory for each rank, within the job's own limit.")
    # Containers have 64 MiB unless told otherwise: data workers die in it with a bus error.
    free_shared: NonNegative = Field(0.25, description="Free space in /dev/shm.")
    # Compilers and spooled shards write there, and a full one ends a rank after hours.
    free_temporary: NonNegative = Field(1.0, description="Free space in the folder for temporary files.")
    # A display or a monitor takes a few hundred MiB; what another job has forgotten takes more.
    gpu_used: NonNegative = Field(1.0, description="Memory of a GPU that others may use.")
    # Nodes of a site agree to milliseconds; whoever is seconds off has lost its time server, and its logs mislead.
    clock: NonNegative = Field(5.0, description="Seconds that a node's clock may differ from the supervisor's.")
    # Racks and neighbours on a switch explain a factor of two; a link that has fallen back to a lower speed is at ten.
    slow: NonNegative = Field(4.0, description="A link is slow when it is so many times slower than the others.")
    bandwidth: NonNegative = Field(0.0, description="Gbit/s that each link must have; 0: they are held against each other.")
    # A second on sound nodes; importing torch from a cold network file system takes most of this.
    seconds: Positive = Field(120.0, description="Seconds that the checks between the nodes may take.")


class LaunchConfig(Section):
    """How a run is started and kept going, by `megamoe train --nproc N` and by `megamoe launch`."""

    max_restarts: Count = Field(
        3, description="Restarts after a rank has died or hangs; each new checkpoint makes the count begin anew."
    )
    # One restart may meet the same fault by chance. A second one that ends at that step shows that it is in the run.
    max_restarts_without_progress: PositiveInt = Field(
        2, description="Stop, with status 77, when so many restarts in a row end at no later step than was reached before."
    )
    # SLURM kills a step 30 s after SIGTERM unless told otherwise, but sends SIGUSR1 as early as one asks.
    stop_grace: Positive = Field(
        60.0, description="Seconds that the ranks have to finish a step and save when they are asked to stop."
    )
    nodes: PositiveInt = Field(1, description="Nodes at work, when there are as many (`megamoe launch`).")
    min_nodes: PositiveInt | None = Field(
        None,
        description="Fewest nodes to go on with when some are lost; if set, a run that is started again waits for no more. "
        " None: as few as a layout fits.",
    )
    spares: Count = Field(0, description="Nodes on top of those at work that stand by to take the place of a lost one.")
    ranks_per_node: PositiveInt | None = Field(
        None, description="Ranks of each node.  None: one for each GPU (launch.gpus_per_node), or one."
    )
    gpus_per_node: Count = Field(0, description="GPUs of each node; 0: the ranks compute on its CPU.")
    node_timeout: Positive = Field(15.0, description="Seconds without a sign of life after which a node is taken for lost.")
    node_wait: NonNegative = Field(
        0.0, description="Seconds to wait for another node when one is lost, before the run goes on with fewer."
    )
    bind: Literal["auto", "none"] = Field(
        "auto", description="auto: each rank on its own share of the node's cores, next to its memory (NUMA)."
    )
    health: HealthConfig = HealthConfig()
    slurm: SlurmConfig = SlurmConfig()


class Config(Section):
    """A whole run."""

    run: RunConfig = RunConfig()
    model: ModelConfig = ModelConfig()
    parallel: ParallelConfig = ParallelConfig()
    data: DataConfig = DataConfig()
    train: TrainConfig = TrainConfig()
    optim: OptimConfig = OptimConfig()
    checkpoint: CheckpointConfig = CheckpointConfig()
    metrics: MetricsConfig = MetricsConfig()
    launch: LaunchConfig = LaunchConfig()

    @model_validator(mode="after")
    def _names_of_sources(self) -> Config:
        names = [source.name for source in self.data.train if source.name is not None]
        if len(set(names)) < len(names):
            raise ValueError(f"data.train: two sources have one name ({', '.join(names)}); name them apart")
        return self

    @model_validator(mode="after")
    def _fits(self) -> Config:
        if self.train.global_batch % self.train.micro_batch:
            raise ValueError(
                f"train.micro_batch {self.train.micro_batch} does not divide train.global_batch {self.train.global_batch}"
            )
        if self.model.vision.patches + 2 > self.data.sequence_length:
            raise ValueError(
                f"data.sequence_length {self.data.sequence_length} has no room for one picture of "
                f"{self.model.vision.patches} tokens and a caption; raise it or model.vision.patch_size"
            )
        return self
