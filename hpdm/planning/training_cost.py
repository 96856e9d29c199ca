"""Memory and work of a training step, predicted on any machine: one step of the real model on fake tensors.

Fake tensors have shapes and storages but no data, so every operation runs through PyTorch, forward, backward and
optimizer, at any size in seconds. Each storage is counted when it appears and when it dies, products by PyTorch's
formulas. The ops of :mod:`hpdm_kernels` run as their portable implementation, workspace included. Not counted: what
PyTorch's own operations allocate inside, the allocator's rounding and fragmentation, the CUDA context.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry, sdpa_flop_count

from hpdm.patch.config import HPDMConfig
from hpdm.patch.model import HPDM
from hpdm.training.optim import EMA, make_optimizer
from hpdm_kernels.attention.read import backward as read_backward
from hpdm_kernels.attention.read import forward as read_forward
from hpdm_kernels.context import torch_backend as context_torch

TEXT_TOKENS = 128
"""Length of the text that a text-conditional model is planned for: the longest by default (`hpdm data embed`)."""

PRECISIONS = ("fp32", "bf16")
CATEGORIES = ("weights", "gradients", "moments", "average", "inputs", "activations", "temporaries")


@dataclass(frozen=True)
class StepCost:
    """One training step. Bytes are those alive at the moment when most is."""

    kernels: str
    recompute: str
    precision: str
    optimizer: str
    batch: int
    weights_bytes: int
    gradients_bytes: int
    moments_bytes: int
    """The optimizer's."""
    average_bytes: int
    """The exponential moving average of the weights."""
    inputs_bytes: int
    """Noised patches, targets and conditioning."""
    activations_bytes: int
    """What the forward pass left for the backward pass and is still there."""
    temporaries_bytes: int
    """Everything else: results within the backward pass or the optimizer, recomputed activations, workspace."""
    flops: int
    """Products and attention, forward, backward and what is recomputed; a multiply-add is two."""
    moved_bytes: int
    """Memory traffic if every operation reads each input and writes each result once."""

    @property
    def static_bytes(self) -> int:
        """What is there between two steps: weights, moments, moving average."""
        return self.weights_bytes + self.moments_bytes + self.average_bytes

    @property
    def peak_bytes(self) -> int:
        """Most that is alive at once in the whole step."""
        return (
            self.static_bytes
            + self.gradients_bytes
            + self.inputs_bytes
            + self.activations_bytes
            + self.temporaries_bytes
        )


def training_step(
    config: HPDMConfig,
    batch: int = 1,
    kernels: str = "torch",
    recompute: str = "none",
    precision: str = "fp32",
    optimizer: str = "adamw",
) -> StepCost:
    """Predicts one training step, the second of a run, so that the optimizer has its moments.

    Args:
        config: the model.
        batch: clips per step and device, at least 1.
        kernels: ``"reference"`` (the paper's formulas) or ``"torch"`` (the library's ops; the Triton kernels keep the
            same tensors).
        recompute: ``"none"``, ``"selective"`` or ``"block"``, see :data:`hpdm.patch.rin.Recompute`.
        precision: ``"fp32"``, or ``"bf16"`` for automatic mixed precision with weights and their statistics in fp32.
        optimizer: ``"adamw"`` or ``"lamb"``.

    Raises:
        ValueError: an argument out of range.
    """
    if batch < 1:
        raise ValueError(f"batch: got {batch}, expected at least 1")
    if kernels not in ("reference", "torch"):
        raise ValueError(f"kernels: got {kernels!r}, expected 'reference' or 'torch'")
    if precision not in PRECISIONS:
        raise ValueError(f"precision: got {precision!r}, expected one of {', '.join(map(repr, PRECISIONS))}")
    with fake_fp32():
        model = HPDM(config, kernels, recompute)
        parameters = list(model.parameters())
        stepper = make_optimizer(model, optimizer, 1e-3, 0.01)
        average = EMA(model, 0.999)
        for p in parameters:
            p.grad = torch.zeros_like(p)
        stepper.step()
        stepper.zero_grad(set_to_none=True)
        inputs = example_inputs(config, batch)
        target = torch.empty_like(inputs["x"])
        with Ledger() as ledger:
            ledger.label(parameters, "weights")
            ledger.label(_moments(stepper), "moments")
            ledger.label(average.shadow.values(), "average")
            ledger.label([*inputs.values(), target], "inputs")
            with torch.autocast("cpu", torch.bfloat16, enabled=precision == "bf16"):
                loss = (model(**inputs) - target).square().mean()
            ledger.label_living("activations")
            loss.backward()
            ledger.label([p.grad for p in parameters if p.grad is not None], "gradients")
            torch.nn.utils.clip_grad_norm_(parameters, 1.0, foreach=True)
            stepper.step()
            average.update(model)
        held = ledger.at_peak()
    return StepCost(
        kernels=kernels,
        recompute=recompute,
        precision=precision,
        optimizer=optimizer,
        batch=batch,
        flops=ledger.flops,
        moved_bytes=ledger.moved,
        **{f"{category}_bytes": held.get(category, 0) for category in CATEGORIES},
    )


def largest_batch(memory: int, cost: Callable[[int], StepCost]) -> int:
    """The largest batch whose peak fits into ``memory`` bytes, 0 if not even one clip does.

    Args:
        memory: bytes.
        cost: the prediction for a batch. Its peak rises with the batch, from some batch on linearly, once activations
            are more than the optimizer needs: doubling first, then interpolating and halving takes few predictions.
    """
    fits, fits_bytes = 0, 0
    fails, fails_bytes = 1, cost(1).peak_bytes
    while fails_bytes <= memory:
        fits, fits_bytes = fails, fails_bytes
        fails *= 2
        fails_bytes = cost(fails).peak_bytes
    halve = False
    while fails - fits > 1:
        # In turns: where the peak is still flat, interpolation alone would creep.
        share = 0.5 if halve else (memory - fits_bytes) / (fails_bytes - fits_bytes)
        halve = not halve
        guess = min(max(fits + int(share * (fails - fits)), fits + 1), fails - 1)
        peak = cost(guess).peak_bytes
        if peak <= memory:
            fits, fits_bytes = guess, peak
        else:
            fails, fails_bytes = guess, peak
    return fits


def example_inputs(config: HPDMConfig, batch: int) -> dict[str, Tensor]:
    """Arguments of :meth:`HPDM.forward` with the right shapes and no particular values."""
    inputs = {
        "x": torch.empty(batch, config.levels, config.channels, *config.patch),
        "boxes": torch.empty(batch, config.levels, 6),
        "t": torch.empty(batch, config.levels),
    }
    if config.conditioning == "class":
        inputs["labels"] = torch.empty(batch, dtype=torch.long)
    if config.conditioning == "text":
        inputs["text"] = torch.empty(batch, TEXT_TOKENS, config.text_width)
        inputs["text_mask"] = torch.empty(batch, TEXT_TOKENS, dtype=torch.bool)
    return inputs


@contextmanager
def fake_fp32() -> Iterator[None]:
    """Tensors made inside have no data, and fp32 unless said otherwise."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float32)
    try:
        with FakeTensorMode():
            yield
    finally:
        torch.set_default_dtype(before)


def _moments(stepper: torch.optim.Optimizer) -> list[Tensor]:
    return [t for state in stepper.state.values() for t in state.values() if isinstance(t, Tensor)]


def _attention_flops(q: Any, k: Any, v: Any, *args: Any, **kwargs: Any) -> int:
    return sdpa_flop_count(q.shape, k.shape, v.shape)


def _attention_backward_flops(grad: Any, q: Any, k: Any, v: Any, *args: Any, **kwargs: Any) -> int:
    # Two products forward; five backward, the scores computed again.
    return sdpa_flop_count(q.shape, k.shape, v.shape) * 5 // 2


class Ledger(TorchDispatchMode):
    """Counts storages that appear and die, FLOPs and memory traffic of what runs inside."""

    def __init__(self) -> None:
        super().__init__()
        self.flops = self.moved = 0
        self._changes: list[tuple[int, int]] = []  # (number of the storage, bytes: plus when it appears)
        self._labels: dict[int, str] = {}
        self._known: dict[int, tuple[weakref.ref[Any], int]] = {}
        aten, ours = torch.ops.aten, torch.ops.hpdm
        self._formulas: dict[Any, Callable[..., int]] = {
            aten._scaled_dot_product_flash_attention_for_cpu: _attention_flops,
            aten._scaled_dot_product_flash_attention_for_cpu_backward: _attention_backward_flops,
            **flop_registry,
        }
        # Run as what they do, so that their products and workspace count.
        self._opened: dict[Any, Callable[..., Any]] = {
            ours.fuse_context_fwd: _open_fuse_forward,
            ours.fuse_context_bwd: _open_fuse_backward,
            ours.read_tokens_fwd: read_forward,
            ours.read_tokens_bwd: read_backward,
        }

    def label(self, tensors: Iterable[Tensor], category: str) -> None:
        """Puts the storages of ``tensors`` into a category."""
        for tensor in tensors:
            self._labels[self._add(tensor)] = category

    def label_living(self, category: str) -> None:
        """Puts whatever is alive and has no category into one."""
        for _, number in self._known.values():
            self._labels.setdefault(number, category)

    def at_peak(self) -> dict[str, int]:
        """Bytes per category when most was alive; ``"temporaries"`` is what has no category."""
        held = list(accumulate(size for _, size in self._changes))
        last = max(range(len(held)), key=held.__getitem__, default=-1)
        out: dict[str, int] = {}
        for number, size in self._changes[: last + 1]:
            category = self._labels.get(number, "temporaries")
            out[category] = out.get(category, 0) + size
        return out

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.prim.device.default:  # most calls by far, and it is only an attribute
            return args[0].fake_device
        opened = self._opened.get(func._overloadpacket)
        if opened is not None:
            with self:
                return opened(*args, **(kwargs or {}))
        inputs = {t.untyped_storage()._cdata: t for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor)}
        out = func(*args, **(kwargs or {}))
        results = [t for t in tree_leaves(out) if isinstance(t, Tensor)]
        for tensor in results:
            self._add(tensor)
        if not _is_view(func):
            self.moved += sum(t.numel() * t.element_size() for t in (*inputs.values(), *results))
        formula = self._formulas.get(func._overloadpacket)
        if formula is not None:
            self.flops += int(formula(*args, **(kwargs or {}), out_val=out))
        return out

    def _add(self, tensor: Tensor) -> int:
        storage = tensor.untyped_storage()
        key = storage._cdata
        if key in self._known:
            return self._known[key][1]
        number, size = len(self._changes), storage.nbytes()

        def gone(_: Any) -> None:
            del self._known[key]
            self._changes.append((number, -size))

        self._known[key] = weakref.ref(storage, gone), number
        self._changes.append((number, size))
        return number


def _is_view(func: Any) -> bool:
    """Whether an operation only looks at its input in another way."""
    return any(r.alias_info is not None and not r.alias_info.is_write for r in func._schema.returns)


def _triples(flat: Any) -> list[Any]:
    return [flat[i : i + 3] for i in range(0, len(flat), 3)]


def _open_fuse_forward(
    x: Tensor, sources: Any, source_boxes: Any, box: Tensor, weight: Tensor, bias: Any, index: Any, grids: Any,
    grid: Any, footprints: Any, projected: bool, *rest: Any,
) -> Tensor:  # fmt: skip
    return context_torch.fuse_forward(
        x, sources, source_boxes, box, weight, bias, index, _triples(grids), grid, _triples(footprints), projected
    )


def _open_fuse_backward(
    grad: Tensor, x: Tensor, sources: Any, source_boxes: Any, box: Tensor, weight: Tensor, bias: Any, index: Any,
    grids: Any, grid: Any, footprints: Any, wanted: Any, projected: bool, *rest: Any,
) -> list[Tensor]:  # fmt: skip
    return context_torch.fuse_backward(
        grad, x, sources, source_boxes, box, weight, bias, index, _triples(grids), grid, _triples(footprints), wanted,
        projected,
    )  # fmt: skip
