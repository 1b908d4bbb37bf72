"""Who holds what, and who answers when."""

import numpy as np
import pytest

from core.errors import UserError
from core.sites import training_images


def label_shares(shards):
    """Share of each label among a site's training images."""
    labels = np.concatenate([shard.label for shard in shards])
    return np.bincount(labels, minlength=3) / len(labels)


def spread(sites):
    """How much the sites of ultrasound differ in their labels."""
    rows = [label_shares(shards) for name, shards in sites.items() if name.startswith("us")]
    return float(np.std(rows, axis=0).sum())


@pytest.mark.parametrize("name", ["skewed_0.5", "skewed_0.1", "sizes", "participation"])
def test_every_training_image_is_at_one_site_and_no_patient_at_two(bench, hospitals, name):
    sites = bench.scenario_sites.build(name, hospitals, 0, 10).sites
    for modality, (shard,) in hospitals.items():
        parts = [s for shards in sites.values() for s in shards if s.name == shard.name]
        assert sum(len(part.images) for part in parts) == (shard.split == "train").sum()
        patients = [set(part.patient.tolist()) for part in parts]
        assert sum(map(len, patients)) == len(set.union(*patients)), modality
        assert all((part.split == "train").all() for part in parts)


def test_a_smaller_concentration_skews_labels_more(bench, hospitals):
    build = bench.scenario_sites.build
    mild, strong = (
        np.mean([spread(build(name, hospitals, seed, 2).sites) for seed in range(8)])
        for name in ("skewed_0.5", "skewed_0.1")
    )
    assert strong > 1.2 * mild > 0.1


def test_a_split_follows_from_its_seed_and_leaves_no_site_too_few(bench, hospitals):
    build = bench.scenario_sites.build
    first, again, other = (build("skewed_0.1", hospitals, seed, 2).sites for seed in (0, 0, 1))
    images = [{n: training_images(s) for n, s in sites.items()} for sites in (first, again, other)]
    assert images[0] == images[1] != images[2]
    fewest = bench.scenario_sites.FEWEST_IMAGES
    assert all(sum(counts.values()) >= fewest for counts in images[0].values())


def test_images_without_a_label_are_dealt_evenly(bench, hospitals):
    (shard,) = hospitals["us"]
    unlabelled = bench.scenario_sites.replace(shard, label=np.full_like(shard.label, -1))
    sites = bench.scenario_sites.build("skewed_0.1", {"us": [unlabelled]}, 0, 2).sites
    sizes = [len(shards[0].images) for shards in sites.values()]
    assert max(sizes) - min(sizes) <= 2  # a patient has two images


def test_too_few_images_to_split_are_refused_by_modality(bench, hospitals):
    (shard,) = hospitals["us"]
    few = bench.scenario_sites.cut(shard, np.flatnonzero(shard.patient < 12), "few")
    with pytest.raises(UserError, match=r"us: 1000 draws .* over 2 sites .* fewer than 24"):
        bench.scenario_sites.build("skewed_0.5", {"us": [few]}, 0, 2)


def test_the_big_site_has_four_fifths_of_every_modality(bench, hospitals):
    sites = bench.scenario_sites.build("sizes", hospitals, 0, 2).sites
    for modality, (shard,) in hospitals.items():
        total = (shard.split == "train").sum()
        assert training_images(sites["big"])[modality] == pytest.approx(0.8 * total, abs=6)
        assert training_images(sites[modality])[modality] == pytest.approx(0.2 * total, abs=6)


def test_a_share_keeps_whole_patients_and_a_smaller_one_is_within_it(bench, hospitals):
    parts = [bench.scenario_sites.build(n, hospitals, 0, 2).sites for n in ("quarter", "sixteenth")]
    for modality, (shard,) in hospitals.items():
        quarter, sixteenth = (sites[modality][0] for sites in parts)
        total = (shard.split == "train").sum()
        assert len(quarter.images) == pytest.approx(total / 4, abs=4)
        assert len(sixteenth.images) == pytest.approx(total / 16, abs=4)
        patients = [set(part.patient.tolist()) for part in (sixteenth, quarter)]
        assert patients[0] < patients[1]
        assert all((shard.patient == p).sum() == (quarter.patient == p).sum() for p in patients[1])


def test_three_modalities_alone_have_sites(bench, hospitals):
    assert set(bench.scenario_sites.build("three", hospitals, 0, 2).sites) == {"cxr", "us"}


def test_only_sites_of_a_modality_leave_after_half_time_and_join_then(bench, hospitals):
    leaving = bench.scenario_sites.build("leaving", hospitals, 0, 10)
    assert leaving.changing == ("us", "dermatology")
    assert leaving.answering(5) == ["cxr", "dermatology", "us"]
    assert leaving.answering(6) == ["cxr"]
    joining = bench.scenario_sites.build("joining", hospitals, 0, 10)
    assert joining.answering(5) == ["cxr", "us"]
    assert joining.answering(6) == ["cxr", "dermatology", "us"]


def test_thirty_percent_answer_others_each_round_as_seed_and_round_say(bench, hospitals):
    first, again, other = (
        bench.scenario_sites.build("participation", hospitals, seed, 10) for seed in (0, 0, 1)
    )
    rounds = [first.answering(number) for number in range(1, 31)]
    assert {len(names) for names in rounds} == {2}  # of six sites
    assert {name for names in rounds for name in names} == set(first.sites)
    assert rounds == [again.answering(number) for number in range(1, 31)]
    assert rounds != [other.answering(number) for number in range(1, 31)]


def test_a_damaged_site_has_half_of_dermatology_broken_or_under_another_name(bench, hospitals):
    (shard,) = hospitals["dermatology"]
    broken = bench.scenario_sites.build("broken", hospitals, 0, 2).sites
    misnamed = bench.scenario_sites.build("misnamed", hospitals, 0, 2).sites
    half = (shard.split == "train").sum() / 2
    assert training_images(broken["damaged"])["dermatology"] == pytest.approx(half, abs=4)
    (images,) = (s.images for s in broken["damaged"])
    assert (images[0::2] == 0).all()
    assert 120 < images[1::2].mean() < 135
    assert list(training_images(misnamed["damaged"])) == ["cxr"]
    originals = {image.tobytes() for image in shard.images}
    assert all(image.tobytes() in originals for image in misnamed["damaged"][0].images)
