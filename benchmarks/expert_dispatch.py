"""What it costs to bring tokens to their experts and back, beside the products that the experts compute.

    python benchmarks/expert_dispatch.py --config tiny
    python benchmarks/expert_dispatch.py --config micro --tokens 4096 16384
    deepspeed --num_gpus 4 benchmarks/expert_dispatch.py --config alpha --set parallel.expert_size=4

Measured is one layer of the run's decoder, with random weights and tokens, in the run's precision; the number
of tokens is that of each rank. Its forward pass is made twice: as the model makes it, with the backward pass,
and step by step; both must give the same. The model computes a rank's own rows while messages travel; in the
steps one thing follows the other. Times are medians of rank 0 in ms, on the clock of the GPU where there is
one:

    layer, backward  the whole layer; shared experts are in it, and in no step
    route            logits, softmax, the best experts of each token
    sort             rows by expert, where each expert's run ends; with expert ranks, tokens by rank too
    permute          rows into that order
    counts           how many tokens each rank gets; the host waits here, and where all tokens travel for the
                     number of rows before it regroups them, which the layer does not
    send             tokens to the other ranks that have experts of theirs
    regroup          rows of what came, and of what stayed, by expert
    experts          the grouped products
    return           weighted sums of each token back
    combine          weighted sum of each token's rows; with expert ranks, there and where it came from

``moved`` is the share of the steps from sort to return, the products left out, in all steps; ``dispatch`` the
time of the steps from sort to combine, the products left out, over that of the products. Without expert
ranks, counts, send, regroup and return do not exist.
"""

from __future__ import annotations

import argparse
import platform
import statistics
import sys
from collections.abc import Sequence
from pathlib import Path

# A launcher starts this file by its path: make the packages importable from a source tree too.
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch
import torch.distributed as dist

from benchmarks.clock import Clock
from benchmarks.stepping import process_group
from rxt_dist.arguments import add_overrides
from rxt_dist.config import RunConfig, load_config
from rxt_dist.errors import ConfigError, TrainingError, exit_with_message
from rxt_dist.kernels.combine import combine_rows
from rxt_dist.kernels.grouped_gemm import grouped_linear
from rxt_dist.kernels.permute import repeat_permuted
from rxt_dist.model.initialisation import initialise
from rxt_dist.model.moe import ExpertOrder, Experts, MoE
from rxt_dist.parallel.bootstrap import World
from rxt_dist.parallel.expert_messages import PassSizes, add_up, back, lay_out, there, to_host
from rxt_dist.parallel.experts import ExpertParallel
from rxt_dist.parallel.groups import open_hosts, own_group
from rxt_dist.parallel.mesh import Mesh

STEPS = ("route", "sort", "permute", "counts", "send", "regroup", "experts", "return", "combine")
MOVING = ("sort", "permute", "counts", "send", "regroup", "return")
WHOLE = ("layer", "backward")
TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 2e-2}


def build_layer(config: RunConfig, world: World) -> MoE:
    """A layer of the decoder, of whose experts this rank has its part. Collective."""
    part = config.model.decoder
    if part.moe is None:
        raise ConfigError("model.decoder.moe: found null, this model has no experts to measure")
    with torch.device("meta"):
        layer = MoE(
            part.moe, config.model.embed_dim, part.ff_dim, gated=part.gated_ff, activation=part.activation
        )
        mesh = Mesh(world.size, **config.parallel.model_dump())
        if mesh.expert_size > 1:
            own = own_group(mesh.expert_groups(), world.rank)
            sizes = PassSizes(open_hosts(mesh, world.rank))
            layer.experts = ExpertParallel(layer.experts, part.moe.top_k, mesh, world.rank, own, sizes)
    layer.to_empty(device="cpu")
    layer.router.reset_statistics()
    initialise(layer, config.seed)
    return layer.to(world.device, torch.bfloat16 if config.precision == "bf16" else torch.float32)


def routed(layer: MoE, x: torch.Tensor, clock: Clock) -> torch.Tensor:
    """The weighted outputs of the chosen experts [N, D] of ``x`` [N, D], step by step."""
    experts = layer.experts
    routing = layer.router(x)
    clock.mark("route")
    if not isinstance(experts, ExpertParallel):
        order = ExpertOrder.of(routing.experts, layer.config.num_experts)
        clock.mark("sort")
        return computed(experts, x, order, routing.weights, "permute", clock)
    leaving = experts.depart(routing.experts, routing.weights, active=True)
    staying = ExpertOrder.of_some(routing.experts, experts.held)
    clock.mark("sort")
    copies = experts.group.size() - 1
    laid_out = lay_out(x, leaving.order, leaving.inverse, copies)
    clock.mark("permute")
    traffic = experts.start(x, leaving)()
    clock.mark("counts")
    choices = there(leaving.choices, traffic, "choices").arrived()
    tokens = there(laid_out, traffic, "tokens").arrived()
    clock.mark("send")
    weights, chosen = experts.arrive(choices, routing.weights.dtype)
    coming = ExpertOrder.of_some(chosen, experts.held)
    rows = traffic.rows or to_host(torch.cat([staying.count, coming.count]))()[0]
    sums = computed(experts, tokens, coming.first(rows[1]), weights, "regroup", clock)
    own = computed(experts, x, staying.first(rows[0]), routing.weights, "regroup", clock)
    sums = back(sums, traffic, "sums").arrived()
    clock.mark("return")
    out = own + add_up(sums, leaving.inverse, copies)
    clock.mark("combine")
    return out


def computed(
    experts: Experts,
    x: torch.Tensor,
    order: ExpertOrder,
    weights: torch.Tensor,
    into_order: str,
    clock: Clock,
) -> torch.Tensor:
    """What the experts of this rank make of the tokens ``x``; ``into_order`` is the step that sorts rows."""
    rows = repeat_permuted(x, order.order, order.inverse, weights.shape[1])
    clock.mark(into_order)
    hidden = experts.hidden(grouped_linear(rows, experts.w_in, order.offsets), order)
    rows = grouped_linear(hidden, experts.w_out, order.offsets)
    clock.mark("experts")
    out = combine_rows(
        rows, experts.b_out, weights, order.order, order.inverse, order.offsets, order.expert_of_row
    )
    clock.mark("combine")
    return out


def measure(
    layer: MoE, tokens: int, world: World, arguments: argparse.Namespace
) -> tuple[dict[str, float], float]:
    """Median seconds of every step and of the whole layer; rows of the busiest expert over the mean.
    Collective."""
    weight = layer.router.proj.weight
    generator = torch.Generator().manual_seed(world.rank)
    x = torch.randn(tokens, weight.shape[1], generator=generator).to(weight).requires_grad_()
    steps, whole = Clock(world.device, STEPS), Clock(world.device, WHOLE)
    layer.loads = torch.zeros(layer.config.num_experts, dtype=torch.int64, device=world.device)
    for _ in range(arguments.warmup + arguments.repeats):
        layer.zero_grad()
        x.grad = None
        whole.start_step()
        out, _ = layer(x)
        whole.mark("layer")
        out.backward(torch.ones_like(out))
        whole.mark("backward")
        steps.start_step()
        with torch.no_grad():
            routed(layer, x, steps)
    check(layer, x, world)
    found = {}
    for clock, names in ((steps, STEPS), (whole, WHOLE)):
        seconds = clock.read()[arguments.warmup :]
        found |= {name: statistics.median(one[name] for one in seconds) for name in names}
    loads = layer.loads.double()
    dist.all_reduce(loads)
    return found, float(loads.max() / loads.mean())


def check(layer: MoE, x: torch.Tensor, world: World) -> None:
    """The steps must be those of the layer."""
    with torch.no_grad():
        expected = layer.run_experts(x, layer.router(x))
        clock = Clock(world.device, STEPS)
        clock.start_step()
        error = (routed(layer, x, clock) - expected).abs().max() / expected.abs().max()
    if not error <= TOLERANCE[x.dtype]:
        raise TrainingError(
            f"the steps differ from the layer by {float(error):.1e}: the times would mean nothing"
        )


def header() -> str:
    columns = "".join(f"{name:>10}" for name in (*WHOLE, *STEPS))
    return f"{'tokens':>8}{'uneven':>8}{columns}{'moved':>8}{'dispatch':>10}"


def line(tokens: int, seconds: dict[str, float], uneven: float) -> str:
    total = sum(seconds[name] for name in STEPS)
    moving = sum(seconds[name] for name in MOVING)
    dispatch = (moving + seconds["combine"]) / seconds["experts"]
    cells = "".join(f"{seconds[name] * 1e3:>10.3f}" for name in (*WHOLE, *STEPS))
    return f"{tokens:>8}{uneven:>8.2f}{cells}{moving / total:>8.1%}{dispatch:>10.2f}"


def describe(config: RunConfig, layer: MoE, world: World, arguments: argparse.Namespace) -> str:
    """Machine, versions and layer."""
    device = f"CPU, {torch.get_num_threads()} thread(s) a rank"
    if world.device.type == "cuda":
        device = torch.cuda.get_device_name(world.device)
    moe, part = layer.config, config.model.decoder
    return "\n".join(
        (
            f"{device}; ranks: {world.size}, expert ranks: {config.parallel.expert_size}; "
            f"python {platform.python_version()}, torch {torch.__version__}",
            f"{config.model.name}: width {config.model.embed_dim}, {moe.num_experts} experts of "
            f"{part.ff_dim}, top {moe.top_k}, {config.precision}",
            f"medians of {arguments.repeats} passes after {arguments.warmup} of warm-up, in ms; uneven: rows "
            "of the busiest expert over the mean",
            "",
            header(),
        )
    )


def parse_arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--config", default="tiny", help="run file or name of a packaged one (%(default)s)")
    parser.add_argument(
        "--tokens", type=int, nargs="+", default=[1024, 8192], help="of each rank (default: 1024 8192)"
    )
    parser.add_argument("--repeats", type=int, default=20, help="measured passes (%(default)s)")
    parser.add_argument("--warmup", type=int, default=5, help="passes before them (%(default)s)")
    add_overrides(parser, "parallel.expert_size=2")
    parser.add_argument("--local_rank", "--local-rank", type=int, help=argparse.SUPPRESS)
    arguments = parser.parse_args(argv)
    if min(arguments.tokens) < 1 or arguments.repeats < 1 or arguments.warmup < 0:
        parser.error("--tokens and --repeats must be 1 or more, --warmup 0 or more")
    return arguments


def run(arguments: argparse.Namespace) -> int:
    config = load_config(arguments.config, arguments.overrides, require_data=False)
    with process_group(config) as (world, _):
        layer = build_layer(config, world)
        if world.is_main:
            print(describe(config, layer, world, arguments), flush=True)
        for tokens in arguments.tokens:
            seconds, uneven = measure(layer, tokens, world, arguments)
            if world.is_main:
                print(line(tokens, seconds, uneven), flush=True)
    return 0


def main(argv: Sequence[str] | None = None) -> int:
    arguments = parse_arguments(argv)
    return exit_with_message(lambda: run(arguments))


if __name__ == "__main__":
    sys.exit(main())
