"""A NaN at a random step, process and tensor: the run goes on or stops, always with a good checkpoint."""

import shutil

from hpdm.training.checkpoint import list_checkpoints, verify
from tests.reliability.hooks import break_a_number
from tests.reliability.run_files import digest
from tests.reliability.soak import generator, times

PARTS = ("loss", "gradient", "weight", "average", "state")


def test_a_nan_anywhere_leaves_a_good_checkpoint(commands, training, tmp_path):
    random = generator("nan")
    first = random.randrange(len(PARTS))
    for number in range(times(2, 50)):
        run, world_size = tmp_path / "run", random.choice((1, 2))
        shutil.rmtree(run, ignore_errors=True)
        part, step, victim = PARTS[(first + number) % len(PARTS)], random.randrange(2, 9), random.randrange(world_size)
        parallel = random.choice(("ddp", "fsdp"))
        words = [*training, "--out", run, "--steps", 8, "--parallel", parallel, "--max-skipped", 2]
        hooks = [None] * world_size
        hooks[victim] = (break_a_number, (step, part, random.random()))
        if world_size == 2:
            ranks = commands.start_ranks(2, *words, before=hooks)
        else:
            ranks = [commands.start(*words, before=hooks[0])]
        what = f"{part} of step {step} on process {victim} of {world_size}, {parallel}"
        status = [rank.wait(60) for rank in ranks]
        assert status in ([0] * world_size, [1] * world_size), f"{what}: {status} {ranks[0].output()}"
        for checkpoint in list_checkpoints(run):
            verify(checkpoint)
        kept = {path.name: digest(path) for path in list_checkpoints(run)}
        assert kept or step <= 2, what
        ranks = commands.start_ranks(2, *words) if world_size == 2 else [commands.start(*words)]
        assert [rank.wait(60) for rank in ranks] == [0] * world_size, f"{what}: {ranks[0].output()}"
        assert list_checkpoints(run)[-1].name == "step-00000008", what
