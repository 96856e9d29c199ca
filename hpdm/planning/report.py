"""Plans and the paper's Table 1 as text for a terminal."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from hpdm.planning.table1 import size
from hpdm.planning.training_cost import CATEGORIES

NOTE = (
    "Predicted from one training step on fake tensors. Left out: what PyTorch's operations allocate inside, the\n"
    "allocator's rounding, the CUDA context, the input video. FLOPs are those of products, convolutions and\n"
    "attention; moved counts every operation's inputs and results once. A first pass of self-conditioning is counted,\n"
    "and with kernels triton the workspaces that they allocate on an H100."
)


def plan_text(heading: str, plan: dict[str, Any]) -> str:
    """A plan as :func:`hpdm.commands.plan.plan` returns it: parameters, training, sampling."""
    lines = [heading, "", *_parameters(plan["parameters"], plan["published_parameters"])]
    ranks = ["", *_ranks(plan["ranks"])] if "ranks" in plan else []
    sampling = ["", *_sampling(plan["sampling"])] if plan["sampling"] else []
    long = ["", *_long(plan["long"])] if "long" in plan else []
    return "\n".join([*lines, "", *_training(plan["training"]), *ranks, *sampling, *long])


def _parameters(counts: dict[str, int], published: float | None) -> list[str]:
    total = sum(counts.values())
    lines = [
        "parameters [M]",
        *(f"  {part:<44}{count / 1e6:>10.2f}" for part, count in counts.items()),
        f"  {'total':<44}{total / 1e6:>10.2f}",
    ]
    if published:
        lines.append(f"  {'published':<44}{published / 1e6:>10.0f}   deviation {total / published - 1:+.1%}")
    return lines


def _training(rows: Sequence[dict[str, Any]]) -> list[str]:
    """A line per setting; all settings have the same batch, precision and optimizer."""
    first = rows[0]
    widths = {category: max(12, len(category) + 2) for category in CATEGORIES}
    titles = "".join(f"{category.replace('_', ' '):>{width}}" for category, width in widths.items())
    lines = [
        f"one training step of {first['batch']} clip(s), {first['precision']}, {first['optimizer']} [GB]",
        f"  {'kernels':<11}{'recompute':<11}{titles}{'peak':>9}{'TFLOP/video':>13}{'moved/video':>13}",
    ]
    for row in rows:
        line = (
            f"  {_on(row)}"
            + "".join(f"{_gb(row[f'{category}_bytes']):>{width}}" for category, width in widths.items())
            + f"{_gb(row['peak_bytes']):>9}{row['flops_per_video'] / 1e12:>13.3f}"
            f"{_gb(row['moved_bytes_per_video']):>13}"
        )
        if "largest_batch" in row:
            line += f"   largest batch {row['largest_batch']}"
        if "measured_bytes" in row:
            ratio = row["peak_bytes"] / row["measured_bytes"]
            line += f"   measured {_gb(row['measured_bytes'])} ({ratio - 1:+.1%})"
        lines.append(line)
    return [*lines, "  what is alive at the peak; ema: the moving averages of the weights", "", *_moved(rows)]


def _moved(rows: Sequence[dict[str, Any]]) -> list[str]:
    """A line per group of operations, with a column per setting."""
    settings = [f"{row['kernels']}, {row['recompute']}" for row in rows]
    widths = [max(12, len(setting) + 2) for setting in settings]
    lines = ["moved in this step [GB]", f"  {'':<22}" + "".join(f"{s:>{w}}" for s, w in zip(settings, widths))]
    for group in rows[0]["moved_by_group"]:
        numbers = "".join(f"{_gb(row['moved_by_group'][group]):>{width}}" for row, width in zip(rows, widths))
        lines.append(f"  {group:<22}{numbers}")
    return lines


def _ranks(rows: Sequence[dict[str, Any]]) -> list[str]:
    """Memory and traffic of one of several ranks, then times; a line per setting."""
    first = rows[0]
    groups = f" in {first['ranks'] // first['shard_ranks']} groups of {first['shard_ranks']}"
    columns = {
        "weights": 9, "gradients": 11, "optimizer_state": 17, "ema": 7, "gathered": 10, "passing": 9, "peak": 8,
        "nvlink": 11, "network": 9,
    }  # fmt: skip
    titles = "".join(f"{name.replace('_', ' '):>{width}}" for name, width in columns.items())
    gpus = list(first["hidden"])
    lines = [
        f"{first['ranks']} ranks, {first['parallel']}{groups if first['parallel'] == 'hsdp' else ''}, "
        f"{first['batch']} clips a step, {first['micro_batches']} micro-batch(es) per rank: one rank [GB]",
        f"  {'kernels':<11}{'recompute':<11}{titles}",
        *(
            f"  {_on(row)}" + "".join(f"{_gb(row[f'{name}_bytes']):>{width}}" for name, width in columns.items())
            for row in rows
        ),
        "  gathered: whole weights, their gradients and buffers; passing: inputs, activations, temporaries; each at",
        "  its largest; nvlink, network: sent per step, to GPUs of the same node of 8 and to other nodes",
        "at least, modeled [s]; hidden: the share of communication that compute can hide",
        "  " + " " * 22 + "".join(f"{gpu:^40}" for gpu in gpus),
        f"  {'kernels':<11}{'recompute':<11}" + f"{'compute':>12}{'communic.':>11}{'step':>9}{'hidden':>8}" * len(gpus),
    ]
    for row in rows:
        lines.append(f"  {_on(row)}" + "".join(_times(row, gpu) for gpu in gpus))
    return lines


def _times(row: dict[str, Any], gpu: str) -> str:
    compute, communication, step = (row[f"least_{name}_seconds"][gpu] for name in ("compute", "communication", "step"))
    return f"{compute:>12.3f}{communication:>11.3f}{step:>9.3f}{row['hidden'][gpu]:>8.0%}"


def _on(row: dict[str, Any]) -> str:
    return f"{row['kernels']:<11}{row['recompute']:<11}"


def _sampling(rows: Sequence[dict[str, Any]]) -> list[str]:
    lines = [
        "sampling one video, default options, no guidance",
        f"  {'level':<7}{'resolution':<14}{'tiles':>6}{'steps':>7}{'calls':>8}{'patches':>10}{'TFLOP':>12}"
        f"{'cached blocks':>15}{'cache [GB]':>12}",
    ]
    for row in rows:
        tflop = "-" if row["flops"] is None else f"{row['flops'] / 1e12:.1f}"
        lines.append(
            f"  {row['level']:<7}{size(row['resolution']):<14}{row['tiles']:>6}{row['steps']:>7}"
            f"{row['network_calls']:>8}{row['patches']:>10}{tflop:>12}"
            f"{row['cached_blocks']:>15}{_gb(row['cache_bytes']):>12}"
        )
    return lines


def _long(plan: dict[str, Any]) -> list[str]:
    """A line per level of the first window, and of one after it."""
    lines = [
        f"sampling a video of {plan['frames']} frames: {plan['windows']} window(s), each knows {plan['known']} "
        "frame(s) of level 0",
        f"  {'window':<9}{'level':<7}{'tiles':>8}{'features':>10}{'patches':>10}{'TFLOP':>10}",
    ]
    for name in ("first", "next"):
        for row in plan[name]:
            lines.append(
                f"  {name:<9}{row['level']:<7}{row['tiles']:>8}{row['features']:>10}{row['patches']:>10}"
                f"{row['flops'] / 1e12:>10.2f}"
            )
    return [
        *lines,
        f"  in all {plan['patches']} patches, {plan['flops'] / 1e12:.4g} TFLOP; {_gb(plan['memory_bytes'])} GB at any "
        "length",
    ]


def _gb(count: float) -> str:
    return f"{count / 1e9:.2f}"


MODELED = (
    "Modeled videos/s, which no step of these operations can exceed: each operation takes its products at the peak\n"
    "rate of TF32, or its inputs and results once at the peak rate of the memory, from NVIDIA's data sheets; no\n"
    "launches, no gaps, nothing computed again, and a batch so large that the optimizer takes no time."
)


def table1_text(preset: str, rows: Sequence[dict[str, Any]]) -> str:
    """The rows of :func:`hpdm.planning.table1.table1`: memory and work, then speed."""
    return f"{_table1_memory(preset, rows)}\n\n{_table1_speed(rows)}"


def _table1_speed(rows: Sequence[dict[str, Any]]) -> str:
    names = list(rows[0]["modeled_videos_per_s"])
    lines = [
        "Table 1, training speed [videos/s]",
        f"{'':<50}{'published':>9}  at most, modeled:",
        f"{'method':<17}{'resolution':<12}{'patch':<12}{'adaptive':<9}{'A100':>9}"
        + "".join(f"{name:>16}" for name in names),
    ]
    for row in rows:
        published = row["published_videos_per_s"]
        lines.append(
            f"{row['method']:<17}{row['resolution']:<12}{row['patch']:<12}{'yes' if row['adaptive'] else 'no':<9}"
            f"{'OOM' if published is None else f'{published:.2f}':>9}"
            + "".join(f"{row['modeled_videos_per_s'][name]:>16.1f}" for name in names)
        )
    return "\n".join([*lines, "", MODELED])


def _table1_memory(preset: str, rows: Sequence[dict[str, Any]]) -> str:
    lines = [
        f"Table 1 with {preset}: peak memory of one fp32 step with LAMB at batch 1 [GB]; work per video [TFLOP]",
        f"{'':<48}{'':>10}{'':>10}  {'kernels on, recompute':^29} {'of':>10}  {'TFLOP, recompute':^26}",
        f"{'method':<17}{'resolution':<12}{'patch':<12}{'adaptive':<9}{'published':>9}{'reference':>10}  "
        f"{'none':>9}{'selective':>10}{'block':>9}  {'published':>9}  {'none':>8}{'selective':>10}{'block':>8}",
    ]
    for row in rows:
        published, gb, work = row["published_gb"], row["kernels_gb_by_recompute"], row["kernels_tflop_per_video"]
        share = "-" if published is None else f"{row['kernels_gb'] / published:.2f}x"
        lines.append(
            f"{row['method']:<17}{row['resolution']:<12}{row['patch']:<12}{'yes' if row['adaptive'] else 'no':<9}"
            f"{'OOM' if published is None else f'{published:.1f}':>9}{row['reference_gb']:>10.1f}  "
            f"{gb['none']:>9.1f}{gb['selective']:>10.1f}{gb['block']:>9.1f}  {share:>9}  "
            f"{work['none']:>8.2f}{work['selective']:>10.2f}{work['block']:>8.2f}"
        )
    return "\n".join(lines)
