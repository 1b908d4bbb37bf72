"""Each other method does what its paper says, and learns; ours is changed where it should be."""

import copy

import numpy as np
import pytest
import torch
from torch.nn import functional

from core.checkpoint import write_json
from core.errors import UserError
from core.site_data import SiteData
from core.wire import Prototypes, SiteUpdate


@pytest.fixture
def step_of(bench, study_recipe, hospitals):
    """Makes what a loss takes, and the trained networks, from a competitor."""

    def make(competitor, number=0, recipe=study_recipe):
        module = bench.competitor_step
        state = module._state(recipe, competitor, torch.device("cpu"))
        start = module.first_state(recipe, competitor)
        module.load_network(state.student, start.student)
        module.load_network(state.teacher, start.teacher)
        data = SiteData([*hospitals["us"], *hospitals["dermatology"]])
        large, small = module._views(recipe, data.batches(recipe, "s", number), "s", number)
        draws = torch.Generator().manual_seed(number)
        return module.Step(state.student, state.teacher, large, small, recipe, number, draws)

    return make


def rounds(bench, recipe, hospitals, arm, number=2, sites=("us", "dermatology")):
    """A federation of two sites."""
    recipe = bench.federation_loop.changed(recipe, federation={"rounds": number})
    return bench.federation_loop.federate(
        recipe, hospitals, lambda number: list(sites), lambda number: arm
    )


@pytest.mark.parametrize("name", ["dino", "mae", "fedema"])
def test_the_loss_of_a_competitor_falls_in_a_few_steps_and_its_gradient_is_finite(
    bench, step_of, study_recipe, name
):
    competitor = {
        "dino": bench.competitor_dino.dino(prototypes=32, temperature=0.04),
        "mae": bench.competitor_mae.masked_autoencoder(depth=1),
        "fedema": bench.competitor_fedema.byol(),
    }[name]
    values, _ = bench.competitors.chosen_values(name, "", bench.competitors.CHOSEN)
    recipe = bench.competitors.make_arm(name, values).recipe(study_recipe)
    step = step_of(competitor, recipe=recipe)
    optimizer = torch.optim.AdamW(step.student.parameters(), lr=3e-3)
    losses = []
    targets = copy.deepcopy(step.teacher.state_dict())
    for _ in range(12):  # the same views and targets: whether they can be learned
        step.draws.manual_seed(0)
        step.teacher.load_state_dict(targets)
        loss = competitor.loss(step)
        optimizer.zero_grad()
        loss.backward()
        gradients = [p.grad for p in step.student.parameters() if p.grad is not None]
        assert all(torch.isfinite(gradient).all() for gradient in gradients)
        assert sum(float(gradient.abs().sum()) for gradient in gradients) > 0
        optimizer.step()
        losses.append(float(loss.detach()))
    assert losses[-1] < 0.95 * losses[0]


def test_every_arm_federates_two_rounds_with_finite_weights(bench, study_recipe, hospitals):
    recipe = bench.federation_loop.changed(study_recipe, federation={"local_steps": 1})
    elsewhere = {"init", "pooled", "rehearsal", *bench.competitors.WITHOUT_NETWORK}
    elsewhere |= {*bench.competitors.LOCAL}
    elsewhere |= {*bench.competitors.ROUND_LENGTHS, *bench.competitors.STARTS}
    for name in set(bench.competitors.ARMS) - elsewhere:
        values, _ = bench.competitors.chosen_values(
            name, "no such recipe", bench.competitors.CHOSEN
        )
        arm = bench.competitors.make_arm(name, values)
        federation = rounds(bench, recipe, hospitals, arm)
        outcomes = [o for line in federation.lines for o in line["sites"].values()]
        assert [o["outcome"] for o in outcomes] == ["admitted"] * 4, name
        backbone = bench.scenario_measure.backbone_of(study_recipe, federation.state.teacher)
        assert all(torch.isfinite(p).all() for p in backbone.parameters()), name


def test_a_masked_autoencoder_hides_three_quarters_of_the_patches_of_every_image(bench):
    seen, hidden = bench.competitor_mae.hide(50, 64, torch.Generator().manual_seed(0))
    assert seen.shape == (50, 16)
    assert hidden.sum(1).tolist() == [48] * 50
    assert not hidden.gather(1, seen).any()
    assert len({tuple(sorted(row)) for row in seen.tolist()}) == 50


@pytest.mark.parametrize("stem", [False, True])
def test_a_masked_autoencoder_sees_nothing_of_what_is_hidden(bench, step_of, study_recipe, stem):
    recipe = study_recipe
    if stem:  # convolutions, which reach from one patch into others
        options = {**study_recipe.model.options, "patch_size": 1}
        model = {"backbone": "vit_tiny_r_s16_p8_224", "options": options}
        recipe = bench.federation_loop.changed(study_recipe, model=model)
    step = step_of(bench.competitor_mae.masked_autoencoder(depth=1), recipe=recipe)
    pixels = step.large[0]
    seen, hidden = bench.competitor_mae.hide(len(pixels), 64, step.draws)
    shown = functional.interpolate((~hidden).float().view(-1, 1, 8, 8), scale_factor=4)
    changed = pixels * shown + 7 * (1 - shown)
    with torch.no_grad():
        torch.testing.assert_close(step.student(pixels, seen), step.student(changed, seen))
        assert not torch.allclose(step.student(pixels, seen), step.student(pixels + 1, seen))


def test_a_masked_autoencoders_targets_are_its_patches_of_mean_zero_and_deviation_one(
    bench, step_of
):
    step = step_of(bench.competitor_mae.masked_autoencoder(depth=1))
    targets = step.student.targets(step.large[0])
    patch = step.large[0][0, :, 4:8, 8:12].flatten()  # row 1, column 2 of a grid of 8
    expected = (patch - patch.mean()) / patch.std()
    torch.testing.assert_close(targets[0, 8 + 2], expected, rtol=1e-3, atol=1e-3)


def test_dinos_centre_moves_a_tenth_of_the_way_to_the_mean_score_and_is_averaged(
    bench, step_of, study_recipe, hospitals
):
    competitor = bench.competitor_dino.dino(prototypes=32, temperature=0.04)
    step = step_of(competitor)
    step.teacher.centre.fill_(1.0)
    with torch.no_grad():
        mean = step.teacher.scores(step.large, step.recipe).mean((0, 1))
    competitor.loss(step)
    torch.testing.assert_close(step.teacher.centre, 0.9 + 0.1 * mean)
    arm = bench.competitor_step.arm_of(competitor, rate=1.0)
    assert np.abs(rounds(bench, study_recipe, hospitals, arm).state.teacher["centre"]).max() > 0


def test_dinos_prototypes_stand_still_in_the_first_tenth_of_the_steps(bench, step_of, study_recipe):
    competitor = bench.competitor_dino.dino(prototypes=32, temperature=0.04)
    recipe = bench.federation_loop.changed(study_recipe, federation={"rounds": 20})
    for number, moves in ((3, False), (4, True)):  # of 40 steps
        step = step_of(competitor, number, recipe)
        competitor.loss(step).backward()
        assert (step.student.prototypes.weight.grad is not None) == moves


def test_fedema_keeps_tau_of_a_sites_weights_the_first_time_and_then_as_they_part(bench):
    module = bench.competitor_fedema
    received = {"backbone.a": np.array([3.0, 4.0]), "predictor.b": np.array([100.0])}
    own = {"backbone.a": np.zeros(2), "predictor.b": np.zeros(1)}
    mu, scale = module.share_kept(received, own, None, 0.7)
    assert mu == pytest.approx(0.7)
    assert float(scale) == pytest.approx(0.7 / 5)  # the predictor does not count
    nearer = {"backbone.a": np.array([0.0, 1.0]), "predictor.b": np.array([100.0])}
    assert module.share_kept(nearer, own, scale, 0.7)[0] == pytest.approx(0.14)
    farther = {"backbone.a": np.array([0.0, 10.0]), "predictor.b": np.array([100.0])}
    assert module.share_kept(farther, own, scale, 0.7)[0] == 1
    moved = module.mixed(received, own, 0.7)
    np.testing.assert_allclose(moved["backbone.a"], [0.9, 1.2], rtol=1e-6)
    np.testing.assert_allclose(moved["predictor.b"], [30.0], rtol=1e-6)


def test_fedema_sites_train_from_the_global_weights_first_and_then_from_between(
    bench, study_recipe, hospitals
):
    starts = []

    def spy(recipe, received, shards, private, *, site, first_step, device):
        starts.append(received)
        update = SiteUpdate(
            round_number=1, prototypes=Prototypes({}, {}), num_examples={"us": 1}, metrics={},
            student={"backbone.w": np.float32([2.0])}, teacher={"backbone.w": np.float32([9.0])},
        )  # fmt: skip
        return update, {}

    at_site = bench.competitor_fedema.divergence_aware(0.7)(spy)
    sent = bench.federation_loop.GlobalState(
        student={"backbone.w": np.float32([1.0])}, teacher={"backbone.w": np.float32([5.0])}
    )
    options = {"site": "us", "first_step": 0, "device": "cpu"}
    _, private = at_site(study_recipe, sent, [], {}, **options)
    at_site(study_recipe, sent, [], private, **options)
    assert [float(s.student["backbone.w"][0]) for s in starts] == pytest.approx([1.0, 1.7])
    assert [float(s.teacher["backbone.w"][0]) for s in starts] == [1.0, 9.0]  # its own target


def test_a_frozen_teacher_stays_bit_for_bit_and_the_student_that_is_measured_moves(
    bench, study_recipe, hospitals
):
    arm = bench.competitors.make_arm("frozen", {})
    assert arm.measured == "student"
    start = bench.federation_loop.initial_state(study_recipe)
    end = rounds(bench, study_recipe, hospitals, arm).state
    assert end.teacher.keys() == start.teacher.keys()
    assert all(np.array_equal(end.teacher[n], start.teacher[n]) for n in start.teacher)
    plain = rounds(bench, study_recipe, hospitals, bench.our_arms.ours()).state
    name = "backbone.blocks.0.mlp.fc1.weight"
    assert not np.array_equal(plain.teacher[name], start.teacher[name])
    assert not np.array_equal(end.student[name], start.student[name])


def distance(federation, start):
    """How far the global student has gone."""
    student = federation.state.student
    return np.sqrt(sum(np.square(student[n] - start[n]).sum() for n in student))


def test_fedprox_pulls_a_site_to_the_weights_it_was_sent(bench, study_recipe, hospitals):
    recipe = bench.federation_loop.changed(study_recipe, federation={"local_steps": 6})
    start = bench.federation_loop.initial_state(recipe).student
    plain, weak, strong = (
        distance(rounds(bench, recipe, hospitals, arm, number=1), start)
        for arm in (
            bench.our_arms.ours(), bench.our_arms.fedprox(0.0), bench.our_arms.fedprox(1000.0)
        )
    )  # fmt: skip
    assert weak == plain
    assert strong < 0.9 * plain


def test_an_anchor_keeps_the_student_near_the_received_teacher(bench, study_recipe, hospitals):
    recipe = bench.federation_loop.changed(study_recipe, federation={"local_steps": 6})
    states = [
        rounds(bench, recipe, hospitals, arm, number=1).state
        for arm in (bench.our_arms.ours(), bench.our_arms.anchor(1000.0))
    ]
    start = bench.scenario_measure.backbone_of(
        recipe, bench.federation_loop.initial_state(recipe).teacher
    )
    images = torch.rand(8, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        before = start.forward_features(images)
        errors = [
            (bench.scenario_measure.backbone_of(recipe, s.student).forward_features(images))
            .sub(before).square().mean().item()
            for s in states
        ]  # fmt: skip
    assert errors[1] < 0.8 * errors[0]


def test_server_momentum_moves_a_part_of_the_change_and_goes_on_moving(bench, monkeypatch):
    module = bench.our_arms
    merged = iter([1.0, 0.75])  # the second round's sites return what they were sent
    state = bench.federation_loop.GlobalState(
        student={"w": np.float32([0.5])}, teacher={"w": np.float32([0.5])}
    )

    def aggregate(recipe, state, contributions, updates, *, round_number):
        array = np.float32([next(merged)])
        return module.replace(state, student={"w": array}, teacher={"w": array}), {}, {}

    monkeypatch.setattr(module, "aggregate", aggregate)
    merge = module.ServerMomentum(0.5)
    first, _, _ = merge(None, state, {}, {}, round_number=1)
    second, _, _ = merge(None, first, {}, {}, round_number=2)
    assert first.student["w"] == first.teacher["w"] == 0.75  # half of the change of .5
    assert second.student["w"] == 0.875  # no change, and half of the speed of .25


def test_cosine_loss_is_the_mean_over_pairs_of_different_views(bench):
    student = functional.normalize(
        torch.randn(3, 4, 8, generator=torch.Generator().manual_seed(0)), dim=-1
    )
    teacher = functional.normalize(
        torch.randn(2, 4, 8, generator=torch.Generator().manual_seed(1)), dim=-1
    )
    pairs = [(v, u) for v in range(3) for u in range(2) if v != u]
    by_hand = [1 - (student[v] * teacher[u]).sum(-1).mean() for v, u in pairs]
    whole, _ = bench.our_arms.cosine_loss(student, teacher)
    torch.testing.assert_close(whole, torch.stack(by_hand).mean())
    local, _ = bench.our_arms.cosine_loss(student[2:], teacher, first_view=2)
    torch.testing.assert_close(local, torch.stack(by_hand[-2:]).mean())


def test_unweighted_counts_every_image_once(bench, study_recipe):
    start = bench.federation_loop.GlobalState(student={"w": np.float32([0])}, teacher={})
    updates = {
        name: SiteUpdate(
            round_number=1, student={"w": np.float32([value])}, teacher={"w": np.float32([value])},
            prototypes=Prototypes({}, {}), num_examples=counts, metrics={},
        )
        for name, value, counts in (("a", 1.0, {"us": 30}), ("b", 5.0, {"ct": 6, "cxr": 4}))
    }  # fmt: skip
    arm = bench.our_arms.unweighted()
    state, _, weights = arm.merge(study_recipe, start, {}, updates, round_number=1)
    assert weights == {"a": 0.75, "b": 0.25}
    assert float(state.student["w"][0]) == 2.0


def test_a_memory_of_random_anchors_is_never_written(bench, study_recipe, hospitals):
    plain, arm = bench.our_arms.ours(), bench.our_arms.random_anchors()
    written = [rounds(bench, study_recipe, hospitals, a).private["us"] for a in (plain, arm)]
    patients = [arrays["memory/patients"] for arrays in written]
    assert (patients[0] >= 0).any()
    assert not (patients[1] >= 0).any()


def test_description_alone_trains_no_head_and_needs_a_recipe_that_describes(
    bench, study_recipe, hospitals
):
    recipe = bench.federation_loop.changed(study_recipe, optim={"weight_decay": [0.0, 0.0]})
    start = bench.federation_loop.initial_state(recipe).student
    student = rounds(bench, recipe, hospitals, bench.our_arms.description_alone()).state.student
    moved = {n for n in student if not np.array_equal(student[n], start[n])}
    assert not {n for n in moved if n.startswith("head.")}
    assert {"description.grid.weight", "backbone.blocks.0.mlp.fc1.weight"} <= moved
    plain = bench.federation_loop.changed(recipe, loss={"description_weight": 0.0})
    with pytest.raises(UserError, match=r"needs a recipe with 'loss\.description_weight'"):
        rounds(bench, plain, hospitals, bench.our_arms.description_alone())


def test_all_arms_begin_with_the_same_backbone(bench, study_recipe):
    ours = bench.federation_loop.initial_state(study_recipe).student
    for name in ("dino", "mae", "fedema"):
        values, _ = bench.competitors.chosen_values(name, "", bench.competitors.CHOSEN)
        arm = bench.competitors.make_arm(name, values)
        theirs = arm.initial(arm.recipe(study_recipe))
        for network in (theirs.student, theirs.teacher):
            backbone = {n for n in ours if n.startswith("backbone.")}
            assert all(np.array_equal(network[n], ours[n]) for n in backbone)


def test_every_tuned_arm_has_the_same_number_of_tries(bench):
    for name in bench.competitors.GRIDS:
        found = bench.competitors.tries(name)
        assert len(found) == bench.competitors.TRIES
        assert len({tuple(values.items()) for values in found}) == len(found)


def test_tuned_values_count_for_their_recipe_alone(bench, tmp_path):
    file = tmp_path / "competitors.json"
    chosen = {"rate": 3.0, "temperature": 0.07, "measured": "student"}
    file.write_text(
        bench.competitors.json.dumps({"recipe_sha256": "one", "chosen": {"dino": chosen}})
    )
    assert bench.competitors.chosen_values("dino", "one", file) == (chosen, True)
    usual = bench.competitors.tries("dino")[0]
    assert bench.competitors.chosen_values("dino", "two", file) == (usual, False)
    assert bench.competitors.make_arm("dino", chosen).measured == "student"
    chosen = {"rate": 0.333, "koleo": 0.1, "measured": "student"}
    write_json(file, {"recipe_sha256": "one", "chosen": {"no_memory": chosen}})
    found = bench.competitors.chosen_values("no_memory_25600", "one", file)
    assert found == (chosen, True)  # another start, the same values


def test_the_best_try_is_that_of_the_network_with_the_highest_auroc(bench):
    rows = [({"rate": 1.0}, {"student": 0.8, "teacher": 0.7}),
            ({"rate": 3.0}, {"student": 0.6, "teacher": 0.75})]  # fmt: skip
    assert bench.competitors.best("dino", rows) == {"rate": 1.0, "measured": "student"}
    assert bench.competitors.best("fedprox", rows) == {"rate": 3.0, "measured": "teacher"}
