"""Time and memory of the mask layer: one training step (forward and backward) on weights of several sizes.

Three ways to multiply a weight by a sampled mask are interleaved in one run:

- ours: `uniform_noise` and `straight_through_gumbel`;
- reference: `torch.stack([m, 0])`, `F.gumbel_softmax(hard=True, dim=0)[0]`, times the weight;
- multiply: one plain product of weight and logit, the cheapest layer that has the same inputs, output and gradients.

Run it as ``python benchmarks/sampling.py --threads 2 --output sampling.json``. Times are medians of the repetitions
and ratios those of the medians; *best* is the fastest repetition: where it is far below the median, other programs
were running.
Memory is counted in tensors of the weight's size: *kept* is what autograd saves (seen through
`saved_tensors_hooks`, inputs left out, shared storage counted once) plus the result; *held* and *peak* are what
the allocator says is in use after the forward and at worst, beyond the inputs.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import platform
import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from weakref import WeakSet

# Torch reads both when it is imported. Idle threads sleep, else every parallel loop spins away whole time slices as
# soon as another program wants a core; and the profiler does not report each start and stop.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
os.environ.setdefault("KINETO_LOG_LEVEL", "99")

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks
from torch.profiler import ProfilerActivity, profile

from gumbel_plugin.masks.functional import straight_through_gumbel, uniform_noise

Forward = Callable[[Tensor, Tensor], Tensor]

HEADER = """\
|    weights | weight  | way       |  forward | backward | total ms |  best ms | / mult | faster | kept | held | peak |
|-----------:|---------|-----------|---------:|---------:|---------:|---------:|-------:|-------:|-----:|-----:|-----:|"""


@dataclass(frozen=True)
class Case:
    """The inputs of one comparison; in `frozen` ones only the logits learn."""

    weight: Tensor
    logit: Tensor
    grad: Tensor

    @classmethod
    def make(cls, size: int, frozen: bool, device: torch.device) -> Case:
        """Draw a weight, logits and an incoming gradient of `size` elements."""
        weight, logit, grad = torch.randn(3, size, device=device).unbind()
        return cls(weight.clone().requires_grad_(not frozen), logit.clone().requires_grad_(), grad.clone())


@dataclass(frozen=True)
class Result:
    """One row of the table: times in milliseconds, memory in tensors of the weight's size."""

    size: int
    weight: str
    way: str
    forward: float
    backward: float
    total: float
    best: float
    times_multiply: float
    times_faster_than_reference: float
    kept: float
    held: float
    peak: float

    def line(self) -> str:
        """Format the row under `HEADER`."""
        return (
            f"| {self.size:>10,} | {self.weight:7} | {self.way:9} "
            f"| {self.forward:8.2f} | {self.backward:8.2f} | {self.total:8.2f} | {self.best:8.2f} "
            f"| {self.times_multiply:6.1f} | {self.times_faster_than_reference:6.1f} "
            f"| {self.kept:4.1f} | {self.held:4.1f} | {self.peak:4.1f} |"
        )


def ours(device: torch.device) -> Forward:
    """Return the mask layer of this project, with fresh noise at every call."""
    counter = itertools.count()

    def forward(weight: Tensor, logit: Tensor) -> Tensor:
        noise = uniform_noise(weight.shape, seed=0, counter=next(counter), stream=0, device=device)
        return straight_through_gumbel(weight, logit, noise)

    return forward


def reference(weight: Tensor, logit: Tensor) -> Tensor:
    """Mask a weight the way the Gumbel-Softmax is usually written: two Gumbel variables per weight."""
    classes = torch.stack([logit, torch.zeros_like(logit)])
    return F.gumbel_softmax(classes, tau=1.0, hard=True, dim=0)[0] * weight


def multiply(weight: Tensor, logit: Tensor) -> Tensor:
    """Multiply, and nothing else."""
    return weight * logit


def step_time(forward: Forward, case: Case) -> tuple[float, float]:
    """Return the milliseconds of one forward and of one backward."""
    times = [_now(case.grad)]
    out = forward(case.weight, case.logit)
    times.append(_now(case.grad))
    out.backward(case.grad)
    times.append(_now(case.grad))
    case.weight.grad = case.logit.grad = None
    return times[1] - times[0], times[2] - times[1]


def _now(on: Tensor) -> float:
    if on.is_cuda:
        torch.cuda.synchronize(on.device)
    return time.perf_counter() * 1e3


def kept_tensors(forward: Forward, case: Case) -> float:
    """Count what lives between forward and backward: saved tensors that are no inputs, and the result."""
    saved: WeakSet[_Saved] = WeakSet()  # weak, for what is saved on a branch that dies within the forward

    def pack(tensor: Tensor) -> _Saved:
        holder = _Saved(tensor)
        saved.add(holder)
        return holder

    with saved_tensors_hooks(pack, lambda holder: holder.tensor):
        out = forward(case.weight, case.logit)
    storages = [tensor.untyped_storage() for tensor in (out, *(holder.tensor for holder in saved))]
    bytes_of = {storage.data_ptr(): storage.nbytes() for storage in storages}
    for tensor in (case.weight, case.logit):
        bytes_of.pop(tensor.untyped_storage().data_ptr(), None)
    return sum(bytes_of.values()) / case.weight.nbytes


class _Saved:
    """A saved tensor, in a box that lives exactly as long as autograd keeps it."""

    def __init__(self, tensor: Tensor) -> None:
        self.tensor = tensor


def allocated_tensors(forward: Forward, case: Case) -> tuple[float, float]:
    """Measure what the allocator holds after the forward, and its peak over forward and backward."""
    measure = _allocated_cuda if case.weight.is_cuda else _allocated_cpu
    held, peak = measure(forward, case)
    case.weight.grad = case.logit.grad = None
    return held / case.weight.nbytes, peak / case.weight.nbytes


def _allocated_cpu(forward: Forward, case: Case) -> tuple[int, int]:
    """Sum up every allocation and release that torch's CPU allocator reports to the profiler."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as first:
        out = forward(case.weight, case.logit)
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as second:
        out.backward(case.grad)
    forward_levels, backward_levels = _levels(first), _levels(second)
    held = forward_levels[-1]
    return held, max(*forward_levels, *(held + level for level in backward_levels))


def _levels(profiler: profile) -> list[int]:
    """Bytes in use after each event, counted from 0."""
    kineto = profiler.profiler.kineto_results.events()
    events = sorted((event.start_ns(), event.nbytes()) for event in kineto if event.name() == "[memory]")
    return [0, *itertools.accumulate(size for _, size in events)]


def _allocated_cuda(forward: Forward, case: Case) -> tuple[int, int]:
    torch.cuda.synchronize(case.weight.device)
    before = torch.cuda.memory_allocated(case.weight.device)
    torch.cuda.reset_peak_memory_stats(case.weight.device)
    out = forward(case.weight, case.logit)
    held = torch.cuda.memory_allocated(case.weight.device) - before
    out.backward(case.grad)
    return held, torch.cuda.max_memory_allocated(case.weight.device) - before


def compare(size: int, frozen: bool, device: torch.device, repeats: int) -> Iterator[Result]:
    """Run the three ways in turn, `repeats` times, and yield a row for each."""
    case = Case.make(size, frozen, device)
    ways: dict[str, Forward] = {"ours": ours(device), "reference": reference, "multiply": multiply}
    for forward in ways.values():
        step_time(forward, case)  # warm up
    times: dict[str, list[tuple[float, float]]] = {name: [] for name in ways}
    for _ in range(repeats):
        for name, forward in ways.items():
            times[name].append(step_time(forward, case))
    total = {name: statistics.median(map(sum, steps)) for name, steps in times.items()}
    for name, forward in ways.items():
        held, peak = allocated_tensors(forward, case)
        yield Result(
            size=size,
            weight="frozen" if frozen else "trained",
            way=name,
            forward=statistics.median(step[0] for step in times[name]),
            backward=statistics.median(step[1] for step in times[name]),
            total=total[name],
            best=min(map(sum, times[name])),
            times_multiply=total[name] / total["multiply"],
            times_faster_than_reference=total["reference"] / total[name],
            kept=kept_tensors(forward, case),
            held=held,
            peak=peak,
        )


def environment(device: torch.device) -> dict[str, str | int]:
    """Say where the numbers come from."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else platform.processor() or platform.machine()
    return {"device": f"{device} ({name})", "threads": torch.get_num_threads(), "torch": torch.__version__}


def main() -> None:
    """Parse the command line, print the table and write the JSON file."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--sizes", type=int, nargs="+", default=[100_000, 2_400_000, 10_000_000], help="weights")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads(), help="CPU threads of torch")
    parser.add_argument("--repeats", type=int, default=15)
    parser.add_argument("--output", type=Path, help="write the table to this JSON file too")
    arguments = parser.parse_args()

    torch.set_num_threads(arguments.threads)
    torch.manual_seed(0)
    device = torch.device(arguments.device)
    place = environment(device)
    print(", ".join(f"{key} {value}" for key, value in place.items()), f"repeats {arguments.repeats}", sep=", ")
    print(HEADER)
    rows = []
    for size, frozen in itertools.product(arguments.sizes, (False, True)):
        for row in compare(size, frozen, device, arguments.repeats):
            rows.append(row)
            print(row.line())
    if arguments.output:
        document = {"environment": place, "repeats": arguments.repeats, "rows": [asdict(row) for row in rows]}
        arguments.output.write_text(json.dumps(document, indent=2) + "\n")


if __name__ == "__main__":
    main()
