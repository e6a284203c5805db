"""The processes of one run, as torchrun starts them: sums, agreements and messages between them.

A run on W ranks computes what one rank computes with W rounds per batch (docs/guides/many-gpus.md): rank r
takes rows r, r + W, ... of every batch. A run of one process needs no process group.
"""

import atexit
import contextlib
import dataclasses
import datetime
import json
import os
import socket
import sys
import time
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, TypeVar

import torch
import torch.distributed as dist

Item = TypeVar("Item")


class PeerLostError(ValueError):
    """Error: another process of the run died, stopped, or did not answer in time."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Ranks:
    """This process among those of the run.

    The default is a run of one process, for which every method is trivial.
    """

    rank: int = 0
    world: int = 1  # number of processes
    local_rank: int = 0  # rank among the processes of this machine
    neighbours: int = 1  # number of processes of the run on this machine, including this one
    restarts: int = 0  # how often torchrun has restarted the workers
    device: torch.device = torch.device("cpu")  # where the process computes and the group exchanges tensors
    minutes: float = 30.0  # longest time that an exchange may take

    @property
    def main(self) -> bool:
        """True for the process that writes, prints and evaluates."""
        return self.rank == 0

    @contextlib.contextmanager
    def _exchange(self, what: str) -> Iterator[None]:
        """Turn errors of torch.distributed into PeerLostError; `what` is the purpose, for the message."""
        try:
            yield
        except RuntimeError as error:
            # Only the first line: gloo and NCCL append stack traces.
            reason = str(error).strip().splitlines()[0][:160] if str(error).strip() else type(error).__name__
            raise PeerLostError(
                f"rank {self.rank} of {self.world}: expected every rank to {what} within {self.minutes:g}"
                f" minutes, got: {reason}. A process of the run died or does not respond. Everything written"
                " so far is intact. Continue with --resume=RUN."
            ) from error

    def sum_(self, tensor: torch.Tensor, what: str = "exchange gradients") -> torch.Tensor:
        """Replace a tensor by its sum over ranks, in place, and return it."""
        if self.world > 1:
            moved = tensor.to(self.device)  # NCCL sums tensors on GPUs only
            with self._exchange(what):
                dist.all_reduce(moved)
                if moved is not tensor:
                    tensor.copy_(moved)
        return tensor

    def any(self, *flags: bool) -> list[bool]:
        """Return for each flag whether it is true on any rank."""
        counts = self.sum_(torch.tensor([float(f) for f in flags]), "agree to continue")
        return [count > 0 for count in counts.tolist()]

    def broadcast_(self, tensors: Iterable[torch.Tensor]) -> None:
        """Overwrite tensors by those of rank 0, in place, in one transfer per dtype."""
        if self.world == 1:
            return
        # Only tensors of one dtype can be concatenated.
        kinds: dict[torch.dtype, list[torch.Tensor]] = {}
        for tensor in tensors:
            kinds.setdefault(tensor.dtype, []).append(tensor)
        for group in kinds.values():
            flat = torch.cat([t.detach().reshape(-1).to(self.device) for t in group])
            with self._exchange("receive rank 0's state"):
                dist.broadcast(flat, src=0)
            with torch.no_grad():
                for tensor, part in zip(group, flat.split([t.numel() for t in group]), strict=True):
                    tensor.copy_(part.reshape(tensor.shape))

    def broadcast(self, value: Any) -> Any:
        """Return rank 0's JSON-able value, on every rank."""
        return self.gather(value if self.main else None)[0]

    def gather(self, value: object) -> list:
        """Return every rank's JSON-able value, in order of rank, on every rank."""
        if self.world == 1:
            return [value]
        # JSON instead of dist.all_gather_object, which pickles: no code of another process is executed.
        data = torch.tensor(list(json.dumps(value).encode()), dtype=torch.uint8, device=self.device)
        with self._exchange("exchange messages"):
            # all_gather needs equal sizes, so the lengths are exchanged first and the messages padded.
            sizes = [torch.zeros(1, dtype=torch.int64, device=self.device) for _ in range(self.world)]
            dist.all_gather(sizes, torch.tensor([len(data)], device=self.device))
            length = max(int(s) for s in sizes)
            padded = torch.zeros(length, dtype=torch.uint8, device=self.device)
            padded[: len(data)] = data
            parts = [torch.zeros_like(padded) for _ in range(self.world)]
            dist.all_gather(parts, padded)
        return [
            json.loads(part[: int(size)].cpu().numpy().tobytes())
            for part, size in zip(parts, sizes, strict=True)
        ]

    def share(self, items: Sequence[Item]) -> Sequence[Item]:
        """Return this rank's items of a list that ranks work through together: r, r + W, ..."""
        return items[self.rank :: self.world]

    def joined(self, results: Sequence) -> list:
        """Combine JSON-able results of every rank's `share`, in the order of the whole list, on every rank.

        >>> ranks.joined([make(item) for item in ranks.share(items)])  # one per item
        """
        parts = self.gather(list(results))
        results_in_order = [None] * sum(map(len, parts))
        for rank, part in enumerate(parts):
            results_in_order[rank :: self.world] = part
        return results_in_order

    def broadcast_named(self, tensors: Any) -> dict[str, torch.Tensor]:
        """Return rank 0's tensors by name, on the CPU of every rank. The other ranks pass None."""
        if self.world == 1:
            return tensors
        described = self.broadcast(
            [[k, list(t.shape), str(t.dtype).removeprefix("torch.")] for k, t in (tensors or {}).items()]
        )
        if not self.main:
            tensors = {
                name: torch.empty(shape, dtype=getattr(torch, dtype)) for name, shape, dtype in described
            }
        # One by one: concatenated, a large checkpoint would need its memory twice.
        for name, _, _ in described:
            self.broadcast_([tensors[name]])
        return tensors

    def barrier(self) -> None:
        """Wait for every rank."""
        self.any(False)

    @contextlib.contextmanager
    def first_per_machine(self) -> Iterator[None]:
        """Let one process of each machine run the block first, for instance to fill a cache."""
        if self.local_rank:
            self.barrier()
        yield
        # Every rank passes the barrier exactly once: the first
        # processes after the block, the others before it.
        if not self.local_rank:
            self.barrier()


SINGLE = Ranks()  # a run of one process


def launch_identity() -> str | None:
    """Return a text that all attempts of one torchrun launch share; None without torchrun.

    It is the --rdzv-id if one was given, otherwise the machine and the process of the launcher.
    """
    if "TORCHELASTIC_RUN_ID" not in os.environ:
        return None
    named = os.environ["TORCHELASTIC_RUN_ID"]
    # torchrun sets "none" if no --rdzv-id was given.
    return named if named != "none" else f"{socket.gethostname()}/{os.getppid()}"


@contextlib.contextmanager
def process_group(device: torch.device, minutes: float) -> Iterator[Ranks]:
    """Join the other processes that torchrun started; a process that was started alone is a run of one rank.

    The backend is NCCL on CUDA, with one GPU per process, otherwise gloo. At the end all processes wait for
    each other. If processes fail together, one of them reports why, and the others exit silently with code 2.

    Args:
        device: 'cuda' or 'cpu'.
        minutes: how long one exchange may take before the run ends with an error.
    Raises: ValueError for incomplete environment variables or too few GPUs; PeerLostError.
    """
    # Without these variables, neither torchrun nor a launcher like it started this process.
    if not {"RANK", "WORLD_SIZE"} <= os.environ.keys():
        yield SINGLE
        return
    try:
        rank, world, local_rank = (int(os.environ[name]) for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK"))
        restarts = int(os.environ.get("TORCHELASTIC_RESTART_COUNT", 0))
        neighbours = int(os.environ.get("LOCAL_WORLD_SIZE", world))
    except (KeyError, ValueError) as error:
        raise ValueError(
            f"torchrun: expected RANK, WORLD_SIZE and LOCAL_RANK as integers, got {error}. Start with"
            " torchrun."
        ) from None
    if device.type == "cuda":
        if local_rank >= torch.cuda.device_count():
            count = torch.cuda.device_count()
            raise ValueError(
                f"torchrun: expected a GPU per process, got {count} GPUs and process {local_rank}. Lower"
                " --nproc-per-node."
            )
        device = torch.device("cuda", local_rank)
        torch.cuda.set_device(device)
    ranks = Ranks(
        rank=rank,
        world=world,
        local_rank=local_rank,
        neighbours=neighbours,
        restarts=restarts,
        device=device,
        minutes=minutes,
    )
    if world == 1:
        yield ranks
        return
    limit = datetime.timedelta(minutes=minutes)
    with ranks._exchange("start"):
        store, _, _ = next(dist.rendezvous("env://", timeout=limit))
        # torchrun keeps its store over restarts, with the addresses of processes that no longer exist. A
        # prefix per restart hides them.
        store = dist.PrefixStore(f"eg3d_rlhf/{restarts}", store)
        dist.init_process_group(
            "nccl" if device.type == "cuda" else "gloo",
            store=store,
            rank=rank,
            world_size=world,
            timeout=limit,
        )
    with _one_report(store, ranks):
        yield ranks
        if dist.is_initialized():
            # A process that left early would break an exchange in which the others still wait.
            ranks.barrier()
            leave()


def leave() -> None:
    """End the group. Afterwards, each process continues alone."""
    if dist.is_initialized():
        dist.destroy_process_group()


@contextlib.contextmanager
def _one_report(store: dist.Store, ranks: Ranks) -> Iterator[None]:
    """Let the first process that fails report its error, and end the others silently.

    Rank 0 hosts the store. When it fails, it gives the others two seconds to count themselves there.
    """
    try:
        yield
    except Exception as error:
        # Errors of users have exit code 2, errors of this program have a traceback and 1.
        is_user_error = isinstance(error, (ValueError, OSError))
        atexit.register(_end, 2 if is_user_error else 1)
        try:
            # The store counts atomically: exactly one process gets 1.
            first = store.add("errors", 1) == 1
            deadline = time.monotonic() + 2
            while ranks.main and store.add("errors", 0) < ranks.world and time.monotonic() < deadline:
                time.sleep(0.02)
        except RuntimeError:
            # The store ended with its host, so the count is not available.
            first = True
        if first or not is_user_error:
            raise
        sys.exit(2)
    except BaseException as error:
        # SystemExit keeps its exit code; KeyboardInterrupt exits with 1.
        atexit.register(
            _end, error.code if isinstance(error, SystemExit) and isinstance(error.code, int) else 1
        )
        raise
    atexit.register(_end, 0)


def _end(code: int) -> None:
    """Exit without the interpreter's own shutdown.

    Threads of gloo may abort there, after everything is done (about one run in five).
    """
    # os._exit does not flush.
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)
