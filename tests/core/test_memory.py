import torch

from core.memory import NO_PATIENT, MemoryBank


def bank(entries: int = 4) -> MemoryBank:
    return MemoryBank(entries, 2, torch.Generator().manual_seed(0))


def rows(*values: float) -> torch.Tensor:
    return torch.tensor([[value, 0.0] for value in values])


def test_a_fresh_bank_holds_unit_anchors_and_no_patient() -> None:
    fresh = bank()
    assert torch.allclose(fresh.embeddings.norm(dim=-1), torch.ones(7, 4))
    assert len(fresh.written(0)[0]) == 0


def test_the_oldest_entries_are_overwritten_first() -> None:
    memory = bank()
    memory.write(2, rows(1, 2, 3), torch.tensor([1, 2, 3]))
    memory.write(2, rows(4, 5), torch.tensor([4, 5]))
    embeddings, patients = memory.written(2)
    assert embeddings[:, 0].tolist() == [5, 2, 3, 4]
    assert patients.tolist() == [5, 2, 3, 4]


def test_writing_one_modality_leaves_the_others_alone() -> None:
    memory, untouched = bank(), bank()
    memory.write(1, rows(1), torch.tensor([9]))
    assert torch.equal(memory.embeddings[0], untouched.embeddings[0])
    assert (memory.patients[0] == NO_PATIENT).all()


def test_a_batch_larger_than_the_ring_leaves_its_last_entries() -> None:
    memory = bank()
    memory.write(0, rows(*range(10)), torch.arange(10))
    assert sorted(memory.written(0)[1].tolist()) == [6, 7, 8, 9]


def test_a_restored_bank_goes_on_where_it_stopped() -> None:
    memory, restored = bank(), bank()
    memory.write(0, rows(1, 2, 3), torch.tensor([1, 2, 3]))
    restored.load_arrays({name: array.copy() for name, array in memory.to_arrays().items()})
    for other in (memory, restored):
        other.write(0, rows(7, 8), torch.tensor([7, 8]))
    assert torch.equal(memory.embeddings, restored.embeddings)
    assert torch.equal(memory.patients, restored.patients)


def test_the_mean_counts_only_slots_that_hold_an_image() -> None:
    memory = bank()
    assert memory.mean(1).tolist() == [0, 0]
    memory.write(1, rows(1, 4), torch.tensor([1, 2]))
    assert memory.mean(1).tolist() == [2.5, 0]
