"""Settings of the launcher: processes and nodes, health checks, SLURM."""

from __future__ import annotations

from typing import Literal

from pydantic import ConfigDict, Field

from megamoe.config.section import Count, NonNegative, Positive, PositiveInt, Section


class SlurmConfig(Section):
    """What `megamoe launch slurm` asks of SLURM, by the names of sbatch. Options of the command take precedence."""

    model_config = ConfigDict(coerce_numbers_to_str=True)  # account: 4711, time: 90

    partition: str | None = Field(None, description="Partition. None: the site's default.")
    account: str | None = Field(None, description="Account to charge.")
    qos: str | None = Field(None, description="Quality of service.")
    time: str | None = Field(
        None, description="Time limit of one job, such as 24:00:00; the run continues in the next job."
    )
    constraint: str | None = Field(None, description="Features that nodes must have.")
    exclude: str | None = Field(None, description="Nodes never to use.")
    reservation: str | None = Field(None, description="Reservation.")
    container: str | None = Field(None, description="Image to run in, for sites with pyxis (--container-image).")
    container_mounts: list[str] = Field(
        [],
        description="Additional mounts FOLDER:FOLDER_INSIDE of the container. The run's folder and the working folder are "
        "always mounted.",
    )
    cpus_per_node: PositiveInt | None = Field(
        None, description="CPUs of each node. None: all; the job has the node to itself."
    )
    memory: str | None = Field(None, description="Memory of each node, such as 500G. None: all of it.")
    # Twice the grace, to fit a save in progress plus one more step with its own save.
    signal_seconds: PositiveInt = Field(
        120, description="Seconds before the time limit at which the run saves; more than launch.stop_grace."
    )
    again: Literal["requeue", "chain", "never"] = Field(
        "requeue",
        description="How the run continues after the time limit or the loss of its nodes. requeue: SLURM queues the same "
        "job again; chain: a successor job waits for the end of this one, for sites that forbid requeue; never: the run "
        "stops.",
    )
    extra: list[str] = Field([], description="Additional options of sbatch, such as --mail-type=FAIL.")
    setup: list[str] = Field([], description="Shell lines to run before the start, such as module load cuda.")


class HealthConfig(Section):
    """What a node must have before ranks start on it (`megamoe launch`). Sizes in GiB; 0 turns a limit off."""

    check: Literal["full", "quick", "off"] = Field(
        "full",
        description="quick: at each start, every node examines itself (GPUs, memory, disk, clock) and whether it reaches "
        "the others. full: also run a short collective over all nodes whenever one of them is new; takes some seconds.",
    )
    # Python with torch and DeepSpeed takes 0.6 GiB before the model.
    free_memory: NonNegative = Field(1.0, description="Free host memory for each rank, within the job's own limit.")
    # Containers have 64 MiB unless configured otherwise: data workers die in it with a bus error.
    free_shared: NonNegative = Field(0.25, description="Free space in /dev/shm.")
    # Compilers and spooled shards write there. When it fills up, a rank dies after hours.
    free_temporary: NonNegative = Field(1.0, description="Free space in the folder for temporary files.")
    # A display or a monitor takes a few hundred MiB; a forgotten process of another job takes more.
    gpu_used: NonNegative = Field(1.0, description="Memory of a GPU that other processes may use.")
    # Nodes of a site agree to milliseconds. A node that is seconds off has lost its time server, and its logs mislead.
    clock: NonNegative = Field(5.0, description="Seconds by which a node's clock may differ from the supervisor's.")
    # Racks and switches explain a factor of two; a link that has fallen back to a lower speed is ten times slower.
    slow: NonNegative = Field(
        4.0, description="A link counts as slow when it is this many times slower than the other links."
    )
    bandwidth: NonNegative = Field(
        0.0, description="Gbit/s that each link must reach; 0: links are compared only with each other."
    )
    # A second on healthy nodes; importing torch from a cold network file system takes most of this.
    seconds: Positive = Field(120.0, description="Seconds that the checks between the nodes may take.")


class LaunchConfig(Section):
    """How a run is started and restarted, by `megamoe train --nproc N` and by `megamoe launch`."""

    max_restarts: Count = Field(
        3,
        description="Maximum restarts after a rank dies or hangs; each new checkpoint resets the count.",
    )
    # One restart may meet the same fault by chance. A second one that ends at that step shows that the fault is in the run.
    max_restarts_without_progress: PositiveInt = Field(
        2,
        description="Stop with status 77 after this many consecutive restarts that got no further than a step already "
        "reached.",
    )
    # SLURM kills a step 30 s after SIGTERM unless configured otherwise, but sends SIGUSR1 as early as requested.
    stop_grace: Positive = Field(
        60.0, description="Seconds that ranks have to finish a step and save when they are asked to stop."
    )
    nodes: PositiveInt = Field(1, description="Nodes that train, if that many are available (`megamoe launch`).")
    min_nodes: PositiveInt | None = Field(
        None,
        description="Fewest nodes to continue with after losses. If set, a run that is started again waits for no more "
        "than these. None: as few as a layout fits.",
    )
    spares: Count = Field(0, description="Additional nodes that stand by to replace a lost node.")
    ranks_per_node: PositiveInt | None = Field(
        None, description="Ranks of each node. None: one for each GPU (launch.gpus_per_node), or one without GPUs."
    )
    gpus_per_node: Count = Field(0, description="GPUs of each node; 0: ranks compute on the CPU.")
    node_timeout: Positive = Field(
        15.0, description="Seconds without a sign of life after which a node is considered lost."
    )
    node_wait: NonNegative = Field(
        0.0, description="Seconds to wait for a replacement of a lost node before the run continues with fewer."
    )
    bind: Literal["auto", "none"] = Field(
        "auto",
        description="auto: bind each rank to its own share of the node's cores, near its memory (NUMA); none: do not bind.",
    )
    health: HealthConfig = HealthConfig()
    slurm: SlurmConfig = SlurmConfig()
