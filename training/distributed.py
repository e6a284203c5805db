"""Communication between the processes of one run, which torchrun starts: sums, broadcasts and messages.

A process is also called a rank. A run on W ranks gives the same result as one rank that computes W rounds for
each batch (docs/guides/many-gpus.md): rank r processes the rows r, r + W, ... of every batch. A run of one
process needs no process group.
"""

import atexit
import contextlib
import dataclasses
import datetime
import hashlib
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
    """Error of a process of the run after another process died, stopped, or did not respond in time."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Ranks:
    """The position of this process among the processes of the run, with methods for communication.

    The default is a run of one process, in which no method communicates.
    """

    rank: int = 0  # index of this process, 0 <= rank < world
    world: int = 1  # number of processes
    local_rank: int = 0  # rank among the processes of this machine
    neighbours: int = 1  # number of processes of the run on this machine, including this one
    restarts: int = 0  # number of times that torchrun has restarted the processes
    device: torch.device = torch.device("cpu")  # device of the computation and of exchanged tensors
    minutes: float = 30.0  # longest time that an exchange may take, minutes

    @property
    def is_main(self) -> bool:
        """True for rank 0, which writes files, prints and evaluates."""
        return self.rank == 0

    @contextlib.contextmanager
    def _exchange(self, purpose: str) -> Iterator[None]:
        """Convert errors of torch.distributed in the block to PeerLostError.

        Args: purpose: verb phrase for the message that says what the ranks are doing, such as "exchange
            gradients".
        """
        try:
            yield
        except RuntimeError as error:
            # Only the first line of the message, because gloo and NCCL append stack traces.
            reason = str(error).strip().splitlines()[0][:160] if str(error).strip() else type(error).__name__
            raise PeerLostError(
                f"rank {self.rank} of {self.world}: the ranks could not {purpose} ({reason}; time limit:"
                f" {self.minutes:g} minutes). A process of the run died or does not respond. All files that"
                " were written before are intact. Continue with --resume=RUN, where RUN is the folder of the"
                " run."
            ) from error

    def sum_(self, tensor: torch.Tensor, purpose: str = "exchange gradients") -> torch.Tensor:
        """Replace a tensor by its sum over ranks, in place, and return it.

        Args: tensor: tensor of this rank; purpose: verb phrase that describes the exchange in messages.
        """
        if self.world > 1:
            tensor_on_device = tensor.to(self.device)  # NCCL sums only tensors on GPUs
            with self._exchange(purpose):
                dist.all_reduce(tensor_on_device)
                # `to` returns the tensor itself if it is on the device already.
                if tensor_on_device is not tensor:
                    tensor.copy_(tensor_on_device)
        return tensor

    def any_rank(self, *flags: bool) -> list[bool]:
        """Return, for each flag of this rank, True if the flag is true on at least one rank."""
        flag_counts = self.sum_(torch.tensor([float(flag) for flag in flags]), "agree to continue")
        return [flag_count > 0 for flag_count in flag_counts.tolist()]

    def broadcast_(self, tensors: Iterable[torch.Tensor]) -> None:
        """Overwrite tensors by the tensors of rank 0, in place.

        Every rank must pass tensors of the same shapes and dtypes in the same order.
        """
        if self.world == 1:
            return
        # One transfer for each dtype, because only tensors of the same dtype can be concatenated.
        tensors_by_dtype: dict[torch.dtype, list[torch.Tensor]] = {}
        for tensor in tensors:
            tensors_by_dtype.setdefault(tensor.dtype, []).append(tensor)
        for same_dtype_tensors in tensors_by_dtype.values():
            concatenated_values = torch.cat(
                [tensor.detach().reshape(-1).to(self.device) for tensor in same_dtype_tensors]
            )
            with self._exchange("receive rank 0's state"):
                dist.broadcast(concatenated_values, src=0)
            received_values = concatenated_values.split([tensor.numel() for tensor in same_dtype_tensors])
            with torch.no_grad():
                for tensor, tensor_values in zip(same_dtype_tensors, received_values, strict=True):
                    tensor.copy_(tensor_values.reshape(tensor.shape))

    def broadcast(self, value: Any) -> Any:
        """Return the value of rank 0 on every rank.

        Args: value: JSON value; the values of other ranks are ignored.
        """
        return self.gather(value if self.is_main else None)[0]

    def gather(self, value: object) -> list:
        """Return the list of the values of all ranks, in the order of ranks, on every rank.

        Args: value: JSON value of this rank.
        """
        if self.world == 1:
            return [value]
        # JSON is used instead of dist.all_gather_object, which unpickles data and could execute code in it.
        message_bytes = torch.tensor(list(json.dumps(value).encode()), dtype=torch.uint8, device=self.device)
        with self._exchange("exchange messages"):
            # all_gather needs tensors of equal size. The lengths are exchanged first, and the messages
            # are padded.
            message_sizes = [torch.zeros(1, dtype=torch.int64, device=self.device) for _ in range(self.world)]
            dist.all_gather(message_sizes, torch.tensor([len(message_bytes)], device=self.device))
            largest_size = max(int(message_size) for message_size in message_sizes)
            padded_message = torch.zeros(largest_size, dtype=torch.uint8, device=self.device)
            padded_message[: len(message_bytes)] = message_bytes
            messages = [torch.zeros_like(padded_message) for _ in range(self.world)]
            dist.all_gather(messages, padded_message)
        return [
            json.loads(message[: int(message_size)].cpu().numpy().tobytes())
            for message, message_size in zip(messages, message_sizes, strict=True)
        ]

    def share(self, items: Sequence[Item]) -> Sequence[Item]:
        """Return the items of a list that this rank r has to process: items r, r + W, r + 2W, ..."""
        return items[self.rank :: self.world]

    def gather_in_order(self, results_of_share: Sequence) -> list:
        """Return the results of all items of a list, in its order, on every rank.

        >>> ranks.gather_in_order([make(item) for item in ranks.share(items)])  # one result for each item

        Args: results_of_share: results of this rank's `share` of the list, JSON values.
        """
        results_by_rank = self.gather(list(results_of_share))
        results_in_order = [None] * sum(map(len, results_by_rank))
        for rank, rank_results in enumerate(results_by_rank):
            results_in_order[rank :: self.world] = rank_results
        return results_in_order

    def broadcast_named(self, tensors: Any) -> dict[str, torch.Tensor]:
        """Return rank 0's tensors by name, on the CPU of every rank.

        Args: tensors: tensors by name on rank 0; None on all other ranks.
        """
        if self.world == 1:
            return tensors
        # Name, shape and dtype of each tensor, so that the other ranks can allocate memory for them.
        tensor_descriptions = self.broadcast(
            [
                [name, list(tensor.shape), str(tensor.dtype).removeprefix("torch.")]
                for name, tensor in (tensors or {}).items()
            ]
        )
        if not self.is_main:
            tensors = {
                name: torch.empty(shape, dtype=getattr(torch, dtype))
                for name, shape, dtype in tensor_descriptions
            }
        # One tensor at a time, because concatenating a large checkpoint would need its memory twice.
        for name, _, _ in tensor_descriptions:
            self.broadcast_([tensors[name]])
        return tensors

    def barrier(self) -> None:
        """Wait until every rank has called this method."""
        self.any_rank(False)

    @contextlib.contextmanager
    def first_per_machine(self) -> Iterator[None]:
        """Run the block on one process of each machine, and then on the others.

        The first process can fill a cache that the others use.
        """
        # Every rank calls the barrier exactly once: local rank 0 after the block, all others before it.
        if self.local_rank:
            self.barrier()
        yield
        if not self.local_rank:
            self.barrier()


SINGLE = Ranks()  # for a run of one process


def launch_identity() -> str | None:
    """Return a text that identifies the launch of this run by torchrun.

    The text does not change if torchrun restarts the processes. It is torchrun's --rdzv-id if it was given,
    otherwise the name of the machine with the number of the launching process.

    Returns: the text, or None if the process was not started by torchrun.
    """
    if "TORCHELASTIC_RUN_ID" not in os.environ:
        return None
    rendezvous_id = os.environ["TORCHELASTIC_RUN_ID"]
    # torchrun sets "none" if no --rdzv-id was given.
    return rendezvous_id if rendezvous_id != "none" else f"{socket.gethostname()}/{os.getppid()}"


def is_first_report(message: str) -> bool:
    """Return True if no other process of this launch of torchrun has reported the same error before.

    Errors of the command line, and of files that all processes open, occur on every process before the
    process group exists. torchrun's own store decides which process reports them. Without torchrun, and with
    launchers that have no such store, every process reports its errors.

    Args: message: text of the error.
    """
    if os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True" or os.environ.get("WORLD_SIZE") in (
        None,
        "1",
    ):
        return True
    restarts = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
    key = f"eg3d_rlhf/reported/{restarts}/{hashlib.sha256(message.encode()).hexdigest()}"
    try:
        store = dist.TCPStore(
            os.environ["MASTER_ADDR"],
            int(os.environ["MASTER_PORT"]),
            is_master=False,
            timeout=datetime.timedelta(seconds=10),
        )
        # `add` is atomic, so exactly one process gets 1.
        return store.add(key, 1) == 1
    except (KeyError, ValueError, RuntimeError):
        # An error that several processes report is better than one that none reports.
        return True


@contextlib.contextmanager
def process_group(device: torch.device, minutes: float) -> Iterator[Ranks]:
    """Join the group of the processes that torchrun started, and yield the position of this process.

    A process that was not started by torchrun is a run of one rank. The backend is NCCL on CUDA, with one GPU
    per process, otherwise gloo. At the end of the block, all processes wait for each other. If several
    processes fail, one of them reports the reason, and the others exit silently with code 2.

    Args:
        device: device 'cuda' or 'cpu'.
        minutes: longest time that an exchange may take, minutes. After it, the run ends with an error.
    Raises: ValueError for incomplete environment variables or too few GPUs; PeerLostError if another process
        does not join in time.
    """
    # torchrun, and launchers that are compatible with it, set these variables.
    if not {"RANK", "WORLD_SIZE"} <= os.environ.keys():
        yield SINGLE
        return
    try:
        rank, world, local_rank = (
            int(os.environ[variable_name]) for variable_name in ("RANK", "WORLD_SIZE", "LOCAL_RANK")
        )
        restarts = int(os.environ.get("TORCHELASTIC_RESTART_COUNT", 0))
        neighbours = int(os.environ.get("LOCAL_WORLD_SIZE", world))
    except (KeyError, ValueError) as error:
        raise ValueError(
            f"torchrun: the environment variables RANK, WORLD_SIZE and LOCAL_RANK must be integers ({error})."
            " Start with torchrun."
        ) from None
    if device.type == "cuda":
        if local_rank >= torch.cuda.device_count():
            gpu_count = torch.cuda.device_count()
            raise ValueError(
                f"torchrun: each process needs its own GPU, but this machine has {gpu_count} GPUs for the"
                f" process with LOCAL_RANK={local_rank}. Start torchrun with --nproc-per-node={gpu_count}."
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
    time_limit = datetime.timedelta(minutes=minutes)
    with ranks._exchange("start"):
        # A store holds key-value pairs that all processes can access. "env://" takes its address from
        # environment variables.
        store, _, _ = next(dist.rendezvous("env://", timeout=time_limit))
        # After a restart, torchrun's store still contains the addresses of processes that no longer exist.
        # With another prefix for each restart, they are not found.
        store = dist.PrefixStore(f"eg3d_rlhf/{restarts}", store)
        dist.init_process_group(
            "nccl" if device.type == "cuda" else "gloo",
            store=store,
            rank=rank,
            world_size=world,
            timeout=time_limit,
        )
    with _one_report(store, ranks):
        yield ranks
        if dist.is_initialized():
            # If a process left earlier, the exchanges of the other processes would fail.
            ranks.barrier()
            leave()


def leave() -> None:
    """End the process group. Afterwards, the processes can no longer communicate."""
    if dist.is_initialized():
        dist.destroy_process_group()


@contextlib.contextmanager
def _one_report(store: dist.Store, ranks: Ranks) -> Iterator[None]:
    """Report only the error of the first process that fails in the block. The other processes exit silently.

    A counter in the store shows which process is the first. Rank 0 hosts the store, so if it fails, it waits
    up to two seconds until all other processes have increased the counter.
    """
    try:
        yield
    except Exception as error:
        # Users' errors have the exit code 2. Bugs have a traceback and the exit code 1.
        is_user_error = isinstance(error, (ValueError, OSError))
        atexit.register(_end, 2 if is_user_error else 1)
        try:
            # `add` is atomic, so exactly one process gets 1.
            is_first = store.add("errors", 1) == 1
            deadline = time.monotonic() + 2
            while ranks.is_main and store.add("errors", 0) < ranks.world and time.monotonic() < deadline:
                time.sleep(0.02)
        except RuntimeError:
            # Rank 0 has ended already, and with it the store. This process reports its error, too.
            is_first = True
        if is_first or not is_user_error:
            raise
        sys.exit(2)
    except BaseException as error:
        # SystemExit has an exit code. KeyboardInterrupt has none and exits with 1.
        exit_code = error.code if isinstance(error, SystemExit) and isinstance(error.code, int) else 1
        atexit.register(_end, exit_code)
        raise
    atexit.register(_end, 0)


def _end(exit_code: int) -> None:
    """Exit with an exit code, without the interpreter's own shutdown.

    In about one run of five, threads of gloo abort during the shutdown, after all work is done.
    """
    # os._exit does not write buffered output.
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(exit_code)
