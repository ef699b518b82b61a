import torch

from cramlab.tasks.copying import CopyingConfig
from cramlab.tasks.relabelling import RelabellingConfig
from cramlab.tasks.srcd import SRCDConfig
from cramlab.tasks.task import BatchStream, Task


def test_every_task_satisfies_the_contract():
    for config in (SRCDConfig(seq_len=64), CopyingConfig(seq_len=64), RelabellingConfig(seq_len=64)):
        assert isinstance(config, Task)
        batch, spec = config.draw(range(3), seed=0, split="test"), config.input_spec
        assert batch.gaps.shape == (3, config.seq_len)
        assert (batch.discrete.shape[-1], batch.continuous.shape[-1]) == (len(spec.vocab_sizes), spec.n_continuous)
        assert (batch.discrete.amax(dim=(0, 1)) < torch.tensor(spec.vocab_sizes)).all()
        assert 0 <= int(batch.retrieval_target.min()) <= int(batch.retrieval_target.max()) < spec.n_classes
        assert int(batch.pattern.max()) < config.n_patterns


def test_a_stream_draws_consecutive_sequences_of_its_task():
    task = CopyingConfig(seq_len=16)
    stream = iter(BatchStream(task, seed=4, split="validation", batch_size=2, start=6))
    for first in (6, 8):
        batch = next(stream)
        for i in range(2):
            alone = task.draw(range(first + i, first + i + 1), seed=4, split="validation")
            assert torch.equal(batch.retrieval_target[i : i + 1], alone.retrieval_target)


def test_what_draws_no_data_is_no_task():
    assert not isinstance(object(), Task)
