"""Training meets its device in a few places alone: clips and draws on their way there, and what the log's rows read.

There need not be a GPU: the trainer runs on the ``meta`` device, whose tensors have no values. So whatever reads one is
seen, with the function that does, and so is every copy.
"""

import importlib
import sys
from collections import Counter
from contextlib import nullcontext, suppress
from functools import partial
from pathlib import Path

import pytest
import torch
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import hpdm
from hpdm.commands.train import prepare
from hpdm.training import batches, step
from hpdm.training.log import Reports
from hpdm.training.trainer import Trainer
from tests.small import train_options

DEVICE = torch.device("meta")
ROOT = Path(hpdm.__file__).parent
READS_VALUES = {torch.Tag.data_dependent_output, torch.Tag.dynamic_output_shape}

FLAG = ("delayed.py", "take", "read")
"""Whether an earlier step was skipped. On a GPU it is in the host's memory by then; this device has no such copies."""
OF_A_ROW = Counter({("means.py", "read", "read"): 1, ("statistics.py", "optimizer_statistics", "read"): 1})
"""What a logged row reads: its means, and the norms of weights and updates."""
# Of four steps with a row after the third and the last: the flags of the steps before are read once a later one is
# under way, and all of them before a row.
EXPECTED = {1: Counter(), 2: Counter({FLAG: 1}), 3: Counter({FLAG: 2}) + OF_A_ROW, 4: Counter({FLAG: 1}) + OF_A_ROW}
# LAMB sends the least norms of matrices that start at zero, once. Muon is PyTorch's, whose step is taken or not: the
# host decides, and moves the averages after it.
FIRST_OF_LAMB = Counter({("lamb.py", "_least_norms", "upload"): 1})
DECIDED = Counter({("step.py", "update", "read"): 1})


class Meetings(TorchDispatchMode):
    """Counts what waits for the device, as (file, function, what): reads of values, and copies that are waited for.

    Reads give zeros. Copies to the device that are not waited for are counted in ``sent``.
    """

    def __init__(self):
        super().__init__()
        self.found, self.sent = Counter(), Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        given = [value for value in tree_leaves((args, kwargs)) if isinstance(value, torch.Tensor)]
        on_device = [t for t in given if t.device == DEVICE]
        name = func._overloadpacket.__name__
        if on_device and _reads(func, args):
            return self._read(name, on_device[0])
        if name == "_to_copy" and on_device and torch.device(kwargs.get("device") or DEVICE) != DEVICE:
            self._count("read")
            return torch.zeros(on_device[0].shape, dtype=kwargs.get("dtype") or on_device[0].dtype)
        if name == "copy_" and len({t.device for t in args[:2]}) > 1 and args[0].device != DEVICE:
            self._count("read")
            return args[0].zero_()
        out = func(*args, **kwargs)
        devices = {t.device for t in [*given, *tree_leaves(out)] if isinstance(t, torch.Tensor) and t.ndim}
        if len(devices) > 1:
            copies = name in ("_to_copy", "copy_")
            waits = not (kwargs.get("non_blocking") or (name == "copy_" and True in args[2:]))
            self._count("mixture" if not copies else "upload" if waits else "sent")
        return out

    def _read(self, name, tensor):
        self._count("read")
        if name == "_local_scalar_dense":
            return 0.0 if tensor.is_floating_point() else 0
        raise AssertionError(f"{name} needs the values of {tensor}")

    def _count(self, what):
        (self.sent if what == "sent" else self.found)[(*_place(), what)] += 1


class Uploads(TorchFunctionMode):
    """Counts tensors of the device that are made from Python's numbers: copies from the host, which wait."""

    def __init__(self, meetings):
        super().__init__()
        self.meetings = meetings

    def __torch_function__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        if func in (torch.tensor, torch.as_tensor, torch.Tensor.new_tensor) and out.device == DEVICE:
            self.meetings._count("upload")
        return out


def _reads(func, args):
    """Whether an operation needs values of its inputs on the host; an index with numbers does not, one with a mask."""
    if func is torch.ops.aten.index.Tensor or func is torch.ops.aten.index_put_.default:
        return any(index is not None and index.dtype in (torch.bool, torch.uint8) for index in args[1])
    return bool(READS_VALUES & set(func.tags)) or func is torch.ops.aten.is_nonzero.default


def _place():
    """File and function, of this package, in which an operation runs."""
    frame = sys._getframe()
    while not Path(frame.f_code.co_filename).is_relative_to(ROOT):
        frame = frame.f_back
    return Path(frame.f_code.co_filename).name, frame.f_code.co_name


@pytest.fixture
def trainer(clips, tmp_path, monkeypatch):
    """Makes a trainer on the device; its checkpoints, which read everything, are left out."""
    # PyTorch has shapes for fused and foreach operations on this device, but its functions refuse it.
    for module, name in (("torch.optim.optimizer", "fused"), ("torch.utils._foreach_utils", "foreach")):
        supported = f"_get_{name}_kernels_supported_devices"
        monkeypatch.setattr(importlib.import_module(module), supported, lambda: ["cuda", DEVICE.type])
    monkeypatch.setattr(Trainer, "autocast", lambda self: nullcontext())  # there is none for this device
    monkeypatch.setattr(Trainer, "save", lambda self, **what: None)

    (tmp_path / "run").mkdir()

    def make(**changes):
        options = {"steps": 4, "log_every": 3, "batch": 2, "micro_batch": 1, "save_every": 100} | changes
        return Trainer(prepare(train_options(clips, tmp_path / "run", **options), torch.device("cpu")), DEVICE)

    return make


def run(trainer, monkeypatch):
    """Trains; returns what was found in the steps with a row and in those without, and the rows."""
    steps, rows = {}, []
    real_step, real_write = Trainer._after_step, Reports.write

    def after_step(self, *arguments):
        real_step(self, *arguments)
        steps[self.step], meetings.found = meetings.found, Counter()

    def write(self, row):
        rows.append(row)
        real_write(self, row)

    monkeypatch.setattr(Trainer, "_after_step", after_step)
    monkeypatch.setattr(Reports, "write", write)
    meetings = Meetings()
    with meetings, Uploads(meetings):
        trainer.fit()
    return steps, rows, meetings.sent


OPTIONS = {
    "lamb": {"recompute": "selective", "self_conditioning": 0.9, "ema": (0.05, 0.1), "weighting": "min-snr"},
    "adamw": {"images": 0.5, "flip": True, "low_discrepancy": True, "clip_norm": 0.0},
    "muon": {"cuts": True, "clean_context": 0.5},
}


@pytest.mark.parametrize("optimizer", OPTIONS)
def test_only_rows_of_the_log_read_the_device(trainer, monkeypatch, optimizer):
    """Forward, backward, clipping, optimizer, moving averages and the sums for the log, in a real run."""
    # What is read is zero here: false, so that Muon's steps would be skipped.
    monkeypatch.setattr(step, "bool", lambda applied: bool(applied) or True, raising=False)
    steps, rows, sent = run(trainer(optimizer=optimizer, **OPTIONS[optimizer]), monkeypatch)
    assert [row["step"] for row in rows] == [3, 4]
    expected = dict(EXPECTED)
    if optimizer == "lamb":
        expected[1] = expected[1] + FIRST_OF_LAMB
    elif optimizer == "muon":
        expected = {number: found + DECIDED for number, found in expected.items()}
    assert steps == expected
    # Clips and draws are all that is sent to the device, without waiting for it.
    assert {file for file, _, _ in sent} == {"batches.py", "objective.py"}


def test_what_is_sent_lies_in_pinned_memory(trainer, monkeypatch):
    """Else a copy waits, whatever it was asked for."""
    pinned, asked = [], {}
    monkeypatch.setattr(torch.Tensor, "pin_memory", lambda self: pinned.append(self) or self)
    monkeypatch.setattr(batches, "DataLoader", lambda *arguments, **options: asked.update(options) or iter(()))
    monkeypatch.setattr("hpdm.data.loader._start", lambda loader: loader)
    made = trainer(batch=2)
    made.device = torch.device("cuda")
    draws = made.draw(0)
    assert len(pinned) == sum(value is not None for value in draws)
    assert list(batches.loader(made.job.dataset, made.batches, 0, made.device)) == []
    assert asked["pin_memory"]


def test_what_is_looked_for_is_seen():
    """Each way to wait for a device, in a step of its own."""
    t = torch.zeros(3, device=DEVICE)

    def found(wait):
        expected = suppress(AssertionError, RuntimeError, NotImplementedError)
        with Meetings() as meetings, Uploads(meetings), expected:
            wait()
        return sorted(what for _, _, what in meetings.found)

    # The places that are told are those of the package.
    scope = {}
    exec(compile("def call(wait):\n    return wait()\n", str(ROOT / "call.py"), "exec"), scope)
    call = scope["call"]
    for wait in (
        lambda: t.sum().item(), lambda: float(t.sum()), lambda: bool(t.any()), t.cpu, t.nonzero, lambda: t[t > 0],
        lambda: torch.equal(t, t), lambda: t.masked_select(t > 0), lambda: torch.zeros(3).copy_(t, non_blocking=True),
        lambda: t.sum().tolist(),
    ):  # fmt: skip
        assert found(partial(call, wait)) == ["read"]
    for wait in (
        lambda: torch.tensor([1.0, 2.0], device=DEVICE), lambda: t.new_tensor([1.0]), lambda: torch.zeros(3).to(DEVICE),
        lambda: t.copy_(torch.ones(3)),
    ):  # fmt: skip
        assert found(partial(call, wait)) == ["upload"]
    index = torch.zeros(2, dtype=torch.long, device=DEVICE)
    for work in (lambda: t + 1, lambda: torch.full((), 2.0, device=DEVICE), lambda: t[index], lambda: t * 2.0):
        assert found(partial(call, work)) == []
