"""Where a sweep runs: worker processes of this machine, the workers of an existing Dask scheduler, or Slurm jobs.

All are the same to the driver: a `Crew`. Dask's own settings (`~/.config/dask/*.yaml`) apply.
"""

from __future__ import annotations

import importlib.util
import logging
import shutil
import uuid
from collections import Counter
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from workbench.environment import n_cpus
from workbench.keys import package_digest
from workbench.sweep.gpus import VARIABLE, visible_gpus

if TYPE_CHECKING:
    from workbench.sweep.crew import Crew

CONNECT_S = 15
CLOSE_S = 10
START_S = 120  # for the first worker of this machine


@dataclass(frozen=True)
class Where:
    """The place of a sweep. Without `scheduler` or `slurm` it is this machine.

    workers     how many runs at once       gpus    the same, each with one GPU of its own
    scheduler   address of a Dask scheduler       slurm   the queue (partition) that jobs are sent to
    """

    workers: int | None = None
    gpus: int = 0
    scheduler: str | None = None
    slurm: str | None = None

    def __post_init__(self) -> None:
        if self.workers is not None and self.workers < 1:
            raise ValueError(f"--workers: got {self.workers}, expected at least 1.")
        if self.gpus < 0:
            raise ValueError(f"--gpus: got {self.gpus}, expected at least 1, or none.")
        if self.gpus and self.workers not in (None, self.gpus):
            raise ValueError(
                f"--gpus {self.gpus} --workers {self.workers}: each run gets one GPU, so that --gpus alone says how "
                "many run at once."
            )
        if self.scheduler and self.slurm:
            raise ValueError("--scheduler and --slurm are both given, expected one of them.")

    def at_once(self, n_runs: int) -> int:
        """How many of `n_runs` this machine, or a request to Slurm, makes at once; two CPUs per run unless said."""
        wanted = self.gpus or self.workers or (1 if self.slurm else max(1, n_cpus() // 2))
        return max(1, min(wanted, n_runs))

    def check(self) -> None:
        """Refuse what can't be had, before anything starts."""
        if self.gpus and not self.scheduler and not self.slurm and self.gpus > len(names := visible_gpus()):
            raise ValueError(
                f"--gpus {self.gpus}: this machine shows {len(names)}. Expected up to as many; {VARIABLE} names "
                "those that may be used."
            )
        if self.slurm and importlib.util.find_spec("dask_jobqueue") is None:
            raise ValueError("--slurm needs dask-jobqueue. Install it: pip install dask-jobqueue")
        if self.slurm and shutil.which("sbatch") is None:
            raise ValueError("--slurm: no `sbatch` on this machine. Start the sweep on a login node of the cluster.")


@dataclass(frozen=True)
class Opened:
    """A crew that is ready, how many runs share one machine, and lines for the user."""

    crew: Crew
    share: int
    lines: tuple[str, ...]


@contextmanager
def opened(where: Where, n_runs: int) -> Iterator[Opened]:
    """The crew for `n_runs` runs; what was started for it ends with the block, without waiting for runs."""
    from distributed import Client

    from workbench.sweep.crew import Crew, Runners  # here, as it imports Dask, which takes its time

    name = f"workbench-{uuid.uuid4().hex[:8]}"
    with ExitStack() as undo:
        n_workers, share, refresh, lines = where.at_once(n_runs), 1, lambda: None, []
        if where.scheduler:
            client = undo.enter_context(_connected(where.scheduler))
            _refuse_other_packages(client)
            share = _share(client)
            lines = [f"{sum(client.nthreads().values())} places on {where.scheduler}"]
        else:
            cluster = _slurm_cluster(where, n_workers) if where.slurm else _local_cluster(n_workers, where.gpus > 0)
            undo.callback(cluster.close, timeout=CLOSE_S)
            client = undo.enter_context(Client(cluster, set_as_default=False))
            lines = [_dashboard(cluster)]
            if where.slurm:
                refresh = lambda: cluster.scale(jobs=n_workers)  # noqa: E731
            else:
                share = n_workers
                client.wait_for_workers(1, timeout=START_S)
        client.register_plugin(Runners(name, own=not where.scheduler), name=name)
        if where.scheduler:  # it lives on; a cluster of ours takes its plugins along
            undo.callback(client.unregister_worker_plugin, name)
        most = where.gpus or where.workers if where.scheduler else None
        patience_s = START_S if not where.scheduler and not where.slurm else float("inf")
        crew = Crew(client, name, where.gpus > 0, most, refresh=refresh, patience_s=patience_s)
        if where.scheduler and where.gpus and not any(crew.places().values()):
            raise ValueError("--gpus: no worker of this scheduler offers one. Start them with --resources GPU=1.")
        yield Opened(crew, share, tuple(lines))


def slurm_settings(queue: str, gpu: bool) -> dict[str, Any]:
    """What one Slurm job is asked to be: one worker that makes one run at a time, with all of the job's CPUs.

    Account, memory, time and the like come from `~/.config/dask/jobqueue.yaml`; 4 CPUs and 16 GB unless it says
    otherwise. Its `walltime` should hold several runs: a run whose job ends is made again by another.
    """
    import dask_jobqueue  # noqa: F401  # loads the defaults that are looked up here  # pyright: ignore[reportMissingImports]
    from dask import config

    configured = config.get("jobqueue.slurm")
    settings: dict[str, Any] = {
        "queue": queue,
        "cores": 1,  # threads of the Dask worker: one run at a time
        "processes": 1,
        "job_cpu": configured["job-cpu"] or configured["cores"] or 4,
        "memory": configured["memory"] or "16GB",
        "job_name": "workbench-sweep",
    }
    if gpu:
        settings["job_extra_directives"] = [*(configured["job-extra-directives"] or []), "--gres=gpu:1"]
        settings["worker_extra_args"] = [*(configured["worker-extra-args"] or []), "--resources", "GPU=1"]
    return settings


def _local_cluster(n_workers: int, gpu: bool) -> Any:
    from dask import config
    from distributed import LocalCluster

    ours = {
        "distributed.scheduler.allowed-failures": 0,  # a lost worker is told at once, and counted by the driver
        "distributed.nanny.pre-spawn-environ": {},  # kernels get their thread counts from the runner
    }
    with config.set(ours):
        return LocalCluster(
            n_workers=n_workers,
            threads_per_worker=1,
            processes=True,
            memory_limit=0,  # a kernel's memory is not the worker's
            dashboard_address="127.0.0.1:0",  # a free port; without bokeh there is nothing to see on it
            silence_logs=logging.CRITICAL,
            resources={"GPU": 1} if gpu else None,
        )


def _slurm_cluster(where: Where, n_jobs: int) -> Any:
    from dask_jobqueue.slurm import SLURMCluster  # pyright: ignore[reportMissingImports]

    cluster = SLURMCluster(**slurm_settings(str(where.slurm), where.gpus > 0))
    cluster.scale(jobs=n_jobs)
    return cluster


@contextmanager
def _connected(address: str) -> Iterator[Any]:
    from distributed import Client
    from distributed.comm.addressing import parse_address, parse_host_port

    try:
        parse_host_port(parse_address(address)[1])  # first: a client that was half made by a wrong one ends with noise
        client = Client(address, timeout=CONNECT_S, set_as_default=False)
    except (OSError, ValueError) as error:
        raise ValueError(
            f"--scheduler: {address} does not answer ({error}). Expected the address of a running Dask scheduler, such "
            "as tcp://host:8786."
        ) from None
    with client:
        yield client


def _refuse_other_packages(client: Any) -> None:
    """Workers with another source of this package would compute other runs than those that were planned."""
    try:
        found = client.run(package_digest)
    except ImportError as error:
        raise ValueError(f"--scheduler: its workers can't import this package ({error}). Install it there.") from None
    others = sorted(address for address, digest in found.items() if digest != package_digest())
    if others:
        raise ValueError(
            f"--scheduler: {len(others)} of {len(found)} workers have another source of this package, such as "
            f"{others[0]}. Bring them to the same version and restart them."
        )


def _share(client: Any) -> int:
    """How many runs go on at once on the fullest of the workers' machines."""
    hosts: Counter[str] = Counter()
    for address, n_threads in client.nthreads().items():
        hosts[address.rpartition(":")[0]] += n_threads
    return max(hosts.values(), default=1)


def _dashboard(cluster: Any) -> str:
    if _has_bokeh():
        return f"dashboard   {cluster.dashboard_link}"
    return "dashboard   none; `pip install bokeh` would show one"


def _has_bokeh() -> bool:
    return importlib.util.find_spec("bokeh") is not None
