import math

import numpy as np
import pytest
import torch

from core.backbone import initialise
from core.batch import Batch
from core.collapse import alarm, mean_cosine, rankme, spread
from core.config import Recipe
from core.train import (
    load_network,
    load_private,
    network_arrays,
    new_state,
    private_arrays,
    train,
)

CPU = torch.device("cpu")


def recipe(**sections: dict[str, object]) -> Recipe:
    small = {
        "model": {
            "options": {"patch_size": 8, "embed_dim": 32, "depth": 2, "num_heads": 2},
            "head_hidden": 32,
            "embedding_dim": 16,
        },
        "views": {"global_px": 16, "local_px": 8, "local_views": 2},
        "memory": {"entries_per_modality": 32},
        "optim": {"batch_size": 16, "learning_rate": 0.03, "precision": "fp32"},
        "federation": {"rounds": 5, "local_steps": 12},
    }
    merged = {key: {**small.get(key, {}), **sections.get(key, {})} for key in {*small, *sections}}
    return Recipe.model_validate(merged, strict=False)


def blobs(step: int, count: int = 16) -> Batch:
    """Bright discs at one of four places on noise: something to tell apart."""
    draws = np.random.default_rng(step)
    rows, columns = np.mgrid[:16, :16]
    place = draws.integers(0, 4, count)
    centre_row, centre_column = 4 + 8 * (place // 2), 4 + 8 * (place % 2)
    distance = np.hypot(
        rows - centre_row[:, None, None], columns - centre_column[:, None, None]
    )  # [B, 16, 16]
    pixels = 200.0 * (distance < 4) + draws.uniform(0, 55, (count, 16, 16))
    return Batch(2, torch.from_numpy(pixels.astype(np.uint8))[:, None], torch.arange(count))


def started(config: Recipe):
    torch.set_num_threads(1)
    state = new_state(config, CPU, "site")
    initialise(state.student, torch.Generator().manual_seed(0))
    state.teacher.load_state_dict(state.student.state_dict())
    return state


def run(config: Recipe, steps: int, batch=blobs):
    state = started(config)
    metrics = train(state, lambda step: [batch(step)], config, steps, site="site")
    embeddings, _ = state.bank.written(2)
    figures = spread(embeddings, centred=config.memory.centred)
    metrics |= {f"{name}/us": value for name, value in figures.items()}
    metrics["loss_ceiling/us"] = math.log(config.memory.entries_per_modality)
    return state, metrics


@pytest.mark.parametrize("centred", [True, False])
def test_a_healthy_run_raises_no_alarm_and_a_forced_collapse_does(centred: bool) -> None:
    memory = {"entries_per_modality": 32, "centred": centred}
    _, healthy = run(recipe(memory=memory), 60)
    assert alarm(healthy, "us") is None
    # No KoLeo, a flat target and one image over and over: the constant output is the solution.
    # Views of that image still differ from their mean, so for the centred loss they are all alike.
    still = {"rotation_degrees": 0.0, "jitter_probability": 0.0} if centred else {}
    constant = recipe(
        memory=memory,
        loss={"koleo_weight": 0.0, "teacher_temperature": (0.1, 0.1)},
        views={"global_px": 16, "local_px": 8, "local_views": 2, **still},
    )
    same = Batch(2, torch.full((16, 1, 16, 16), 90, dtype=torch.uint8), torch.arange(16))
    _, collapsed = run(constant, 60, lambda step: same)
    message = alarm(collapsed, "us")
    assert message is not None
    assert "us: collapse" in message
    assert "koleo_weight" in message


def test_figures_that_a_site_did_not_send_raise_no_alarm() -> None:
    assert alarm({}, "ct") is None


def test_what_all_embeddings_share_does_not_reach_the_centred_loss() -> None:
    """Three steps from random weights differ by chance; the mean over seeds does not."""

    def entropy(seed: int, *, moved: bool, centred: bool) -> float:
        config = recipe(memory={"entries_per_modality": 32, "centred": centred})
        config = config.model_copy(update={"seed": seed})
        state = started(config)
        if moved:
            with torch.no_grad():  # before the normalisation to unit length: a far common point
                for network in (state.student, state.teacher):
                    network.head.layers[-1].bias += 30 * torch.ones(16)
        metrics = train(state, lambda step: [blobs(step)], config, 3, site="site")
        return metrics["teacher_entropy/us"]

    def mean(**how: bool) -> float:
        return float(np.mean([entropy(seed, **how) for seed in range(16)]))

    apart, together = (mean(moved=moved, centred=True) for moved in (False, True))
    assert together == pytest.approx(apart, rel=0.3)
    assert mean(moved=True, centred=False) > 2 * together


@pytest.mark.parametrize("drop_path", [0.0, 0.5])
def test_training_is_the_same_bits_twice_and_learns_something(drop_path: float) -> None:
    options = {"patch_size": 8, "embed_dim": 32, "depth": 2, "num_heads": 2}
    config = recipe(model={"options": options, "drop_path": drop_path})
    torch.manual_seed(1)
    first, metrics = run(config, 6)
    torch.manual_seed(2)  # as another process may have it
    again, _ = run(config, 6)
    for name, array in network_arrays(first.student).items():
        assert np.array_equal(array, network_arrays(again.student)[name]), name
    assert 0 < metrics["teacher_entropy/us"] < math.log(32)
    before = network_arrays(started(recipe()).student)
    assert any(not np.array_equal(a, before[n]) for n, a in network_arrays(first.student).items())


def test_a_state_carried_over_as_arrays_continues_bit_for_bit() -> None:
    config = recipe()
    whole, _ = run(config, 8)
    part, _ = run(config, 5)
    private = {n: a.copy() for n, a in private_arrays(part, keep_memory=True).items()}
    resumed = new_state(config, CPU, "site")
    load_network(resumed.student, network_arrays(part.student))
    load_network(resumed.teacher, network_arrays(part.teacher))
    load_private(resumed, private)
    resumed.step = 5
    train(resumed, lambda step: [blobs(step)], config, 3, site="site")
    for kind in ("student", "teacher"):
        expected = network_arrays(getattr(whole, kind))
        for name, array in network_arrays(getattr(resumed, kind)).items():
            assert np.array_equal(array, expected[name]), (kind, name)


def test_a_frozen_teacher_does_not_move() -> None:
    config = recipe(optim={"ema_momentum": 1.0})
    state, _ = run(config, 4)
    for name, array in network_arrays(state.teacher).items():
        assert np.array_equal(array, network_arrays(started(config).teacher)[name])


def test_each_tensors_gradient_is_clipped_on_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    state = started(recipe(optim={"clip_norm": 1e-3}))
    seen: list[float] = []
    step = state.optimizer.step

    def watch() -> None:
        seen.extend(float(p.grad.norm()) for p in state.student.parameters())
        step()

    monkeypatch.setattr(state.optimizer, "step", watch)
    train(state, lambda s: [blobs(s)], recipe(optim={"clip_norm": 1e-3}), 1, site="site")
    assert max(seen) <= 1e-3 * (1 + 1e-5)
    assert sum(norm > 0.9e-3 for norm in seen) > 1


def test_mean_cosine_and_rankme_know_their_extremes() -> None:
    same = torch.nn.functional.normalize(torch.ones(10, 8), dim=1)
    assert mean_cosine(same) == pytest.approx(1, abs=1e-6)
    assert rankme(same) == pytest.approx(1, abs=1e-3)
    assert mean_cosine(torch.eye(8)) == pytest.approx(0, abs=1e-9)
    assert rankme(torch.eye(8)) == pytest.approx(8, rel=1e-6)


@pytest.mark.gpu
def test_a_gpu_trains_to_the_same_loss_within_two_percent() -> None:
    if not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    config = recipe()
    _, on_cpu = run(config, 20)
    state = new_state(config, torch.device("cuda"), "site")
    load_network(state.student, network_arrays(started(config).student))
    state.teacher.load_state_dict(state.student.state_dict())
    metrics = train(state, lambda step: [blobs(step)], config, 20, site="site")
    assert metrics["loss/us"] == pytest.approx(on_cpu["loss/us"], rel=0.02)
