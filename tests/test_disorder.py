"""Spatial disorder against motions that are known."""

import json
import math

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from transformers import CLIPModel

from hf_modx import ContinualRun, ModXTrainingArguments, Phase, PhaseStream
from hf_modx.data import PairCollator, PairDataset
from hf_modx.evaluation import EncodedPairs, encode_pairs, imav, spatial_disorder
from hf_modx.evaluation.disorder import angles, bin_names
from hf_modx.run.disorder import RunDisorder

from launch import launch
from tiny import tiny_clip, tiny_pairs, tiny_processor


def unit(rows, dim=8, seed=0, dtype=torch.float32):
    generator = torch.Generator().manual_seed(seed)
    return F.normalize(torch.randn(rows, dim, generator=generator, dtype=torch.float64), dim=1).to(dtype)


def turn(dim=8, degrees=40.0):
    """Turns every vector by the same angle: a rotation in each of dim / 2 orthogonal planes, in a random basis."""
    angle = math.radians(degrees)
    cosine, sine = math.cos(angle), math.sin(angle)
    plane = torch.tensor([[cosine, -sine], [sine, cosine]], dtype=torch.float64)
    basis, _ = torch.linalg.qr(torch.randn(dim, dim, generator=torch.Generator().manual_seed(7)).double())
    return basis @ torch.block_diag(*[plane] * (dim // 2)) @ basis.T


def turned(vectors, rotation):
    return (vectors.double() @ rotation.T).to(vectors.dtype)


def pairs(image, text):
    return EncodedPairs.of_pairs(image, text)


def test_known_rotation_of_one_modality_is_found_to_a_tenth_of_a_degree():
    image, text = unit(300, seed=0), unit(300, seed=1)
    found = spatial_disorder(pairs(image, text), pairs(turned(image, turn(degrees=40)), text))
    assert found.image.ram.mean == pytest.approx(40, abs=1e-4)
    assert found.image.ram.shares == (0, 0, 0, 0, 1)
    assert found.image.rotation == pytest.approx(40, abs=1e-4)
    assert found.image.rotation_residual == pytest.approx(0, abs=1e-4)
    assert found.image.rotation_share == pytest.approx(1, abs=1e-6)
    assert found.image.sam.mean == pytest.approx(0, abs=1e-4) and found.image.sam.shares == (1, 0, 0, 0, 0)
    assert (found.text.ram.mean, found.text.rotation_share) == (0, None)
    assert found.text.rotation == pytest.approx(0, abs=1e-4)
    assert found.intermodal_rotation == pytest.approx(40, abs=1e-4)


def test_lengths_do_not_count():
    """Half precision keeps them to three digits."""
    image, text, rotation = unit(300, seed=0), unit(300, seed=1), turn(degrees=40)
    found = spatial_disorder(pairs(1.01 * image, 0.99 * text), pairs(turned(image, rotation), 1.02 * text))
    assert found.image.sam.mean == pytest.approx(0, abs=1e-4) and found.image.ram.mean == pytest.approx(40, abs=1e-4)
    assert found.text.rotation_share is None and found.intermodal_rotation == pytest.approx(40, abs=1e-4)


def test_rotation_of_both_modalities_alike_is_no_deviation():
    image, text = unit(300, seed=0), unit(300, seed=1)
    found = spatial_disorder(pairs(image, text), pairs(turned(image, turn()), turned(text, turn())))
    assert found.text.rotation == pytest.approx(40, abs=1e-4)
    assert found.intermodal_rotation == pytest.approx(0, abs=1e-4)


def test_rotation_under_noise_is_told_from_the_noise():
    image, text = unit(4000, seed=0), unit(4000, seed=1)
    noisy = F.normalize(turned(image, turn(degrees=25)) + 0.3 * unit(4000, seed=2), dim=1)
    found = spatial_disorder(pairs(image, text), pairs(noisy, text))
    assert found.image.rotation == pytest.approx(25, abs=1)
    rest = angles(turned(image, turn(degrees=25)), noisy).mean().item()
    assert found.image.rotation_residual == pytest.approx(rest, abs=0.1)
    assert 0.4 < found.image.rotation_share < 0.9


@pytest.mark.parametrize("rows", [3, 6])
def test_fewer_samples_than_dimensions_determine_the_rotation_where_they_are(rows):
    # The texts span what the images span: with 8 dimensions nothing is said about the rest.
    image = unit(rows, seed=0)
    text = F.normalize(torch.randn(rows, rows, generator=torch.Generator().manual_seed(3)) @ image, dim=1)
    found = spatial_disorder(pairs(image, text), pairs(turned(image, turn()), text))
    assert found.intermodal_rotation == pytest.approx(40, abs=1e-3)


def test_modalities_that_share_no_direction_have_no_relative_rotation():
    image, text = torch.eye(8)[:3], torch.eye(8)[4:7]
    assert spatial_disorder(pairs(image, text), pairs(turned(image, turn()), text)).intermodal_rotation is None


def test_nothing_has_moved_between_a_model_and_itself():
    same = pairs(unit(50, seed=0), unit(50, seed=1))
    found = spatial_disorder(same, same)
    assert (found.image.sam.mean, found.text.ram.mean, found.image.rotation_share) == (0, 0, None)
    assert found.intermodal_rotation == pytest.approx(0, abs=1e-4)


def loop_shape_change(old, new):
    """Shares and mean of |angle(a, b) before - after| over all pairs, one by one."""
    counts, changes = [0] * 5, []
    for a in range(len(old)):
        for b in range(a):
            before, after = (math.degrees(math.acos(min(1.0, float(v[a] @ v[b])))) for v in (old, new))
            changes.append(abs(before - after))
            counts[sum(changes[-1] > bound for bound in (5, 10, 15, 20))] += 1
    return [count / len(changes) for count in counts], sum(changes) / len(changes)


@pytest.mark.parametrize("tile", [1, 7, 30, 1000])
def test_shape_change_equals_a_loop_over_pairs(tile):
    old, new = (
        unit(30, dtype=torch.float64),
        F.normalize(unit(30, dtype=torch.float64) + 0.3 * unit(30, seed=5), dim=1),
    )
    shares, mean = loop_shape_change(old, new)
    found = spatial_disorder(pairs(old, old), pairs(new, new), tile=tile).image.sam
    assert found.shares == pytest.approx(shares) and found.mean == pytest.approx(mean)
    assert min(found.shares) > 0


def test_upper_bounds_belong_to_their_bin():
    vectors = torch.tensor([[1.0, 0.0], [0.0, 1.0]], dtype=torch.float64)
    for degrees, place in ((15 - 1e-9, 0), (15 + 1e-9, 1), (30 - 1e-9, 3), (30 + 1e-9, 4)):
        found = spatial_disorder(pairs(vectors, vectors), pairs(turned(vectors, turn(2, degrees)), vectors))
        assert found.image.ram.shares[place] == 1


@pytest.mark.parametrize("degrees", [1e-5, 0.01, 90, 179.99])
def test_angles_keep_their_digits_near_0_and_180(degrees):
    vectors = unit(20, dtype=torch.float64)
    assert angles(vectors, turned(vectors, turn(degrees=degrees))) == pytest.approx(degrees, rel=1e-6)


def test_first_caption_counts():
    image, text = unit(4, seed=0), unit(8, seed=1)
    rows = torch.arange(4)
    old = EncodedPairs(image, text, rows, rows.repeat_interleave(2), rows.repeat_interleave(2))
    changed = text.clone()
    changed[1::2] = unit(4, seed=9)
    new = EncodedPairs(image, changed, rows, rows.repeat_interleave(2), rows.repeat_interleave(2))
    assert spatial_disorder(old, new).text.ram.mean == 0


def test_imav_is_the_change_of_the_angle_between_image_and_caption():
    # Pair 0: from 10 to 18 degrees; pair 1: from 5 to 5 degrees the other way; pair 2 was not found before.
    def at(*degrees):
        return torch.stack([torch.tensor([math.cos(math.radians(d)), math.sin(math.radians(d))]) for d in degrees])

    old, new = pairs(at(0, 90, 200), at(10, 95, -30)), pairs(at(0, 90, 200), at(18, 85, 200))
    found, number = imav(old, new)
    assert number == 2
    assert found.mean == pytest.approx(4, abs=1e-4) and found.shares == (0.5, 0.5, 0, 0, 0)
    assert imav(pairs(at(0, 90), at(90, 0)), pairs(at(0, 90), at(0, 90))) == (None, 0)


def test_other_samples_are_refused():
    with pytest.raises(ValueError, match=r"\(3, 8\) and \(4, 8\)"):
        spatial_disorder(pairs(unit(3), unit(3)), pairs(unit(4), unit(4)))
    with pytest.raises(ValueError, match="at least two samples"):
        spatial_disorder(pairs(unit(1), unit(1)), pairs(unit(1), unit(1)))
    other = EncodedPairs(unit(3), unit(3), torch.tensor([4, 5, 6]), *[torch.arange(3)] * 2)
    with pytest.raises(ValueError, match="of other samples"):
        spatial_disorder(pairs(unit(3), unit(3)), other)


def save_disorder(folder):
    old, new = pairs(unit(30), unit(30, seed=1)), pairs(unit(30, seed=2), unit(30, seed=3))
    found = spatial_disorder(old, new, tile=8, sharded=True).to_dict()
    (folder / f"{dist.get_rank() if dist.is_initialized() else 'alone'}.json").write_text(json.dumps(found))


def test_processes_share_the_tiles_and_get_the_numbers_of_one(tmp_path):
    save_disorder(tmp_path)
    launch(2, save_disorder, tmp_path)
    alone, first, second = (json.loads((tmp_path / f"{name}.json").read_text()) for name in ("alone", 0, 1))
    assert first == second
    assert first["image"]["sam"]["shares"] == pytest.approx(alone["image"]["sam"]["shares"])
    assert first["text"]["sam"]["mean"] == pytest.approx(alone["text"]["sam"]["mean"])
    del first["image"]["sam"], first["text"]["sam"], alone["image"]["sam"], alone["text"]["sam"]
    assert first == alone


# ---- In a run ----


def stream(base=True):
    data = tiny_pairs(48)
    parts = [
        Phase(f"part {k}", data.select(range(12 * k, 12 * k + 9)), data.select(range(12 * k + 9, 12 * k + 12)))
        for k in range(3)
    ]
    return PhaseStream(tuple(parts[1:]), base=parts[0] if base else None)


def finish(args, phases=None):
    processor = tiny_processor()
    run = ContinualRun(phases or stream(), "finetune", args, model=tiny_clip(processor), processing_class=processor)
    run.run()
    return run, json.loads((run.folder / "results.json").read_text())


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """A run that was not interrupted."""
    args = ModXTrainingArguments(
        output_dir=str(tmp_path_factory.mktemp("whole") / "out"), per_device_train_batch_size=8, max_steps=3,
        learning_rate=1e-3, save_strategy="no", report_to="none", disable_tqdm=True, use_cpu=True,
        imav_samples=5,
    )  # fmt: skip
    return finish(args)


def test_run_compares_every_phase_with_the_one_before_and_the_start(whole):
    run, results = whole
    start, first, second = results["spatial_disorder"]["phases"]
    assert start is None and first["since_previous"] == first["since_start"]
    assert set(second["since_start"]["tests"]) == {"part 0", "part 1", "part 2"}
    tables = {}
    for number in (0, 2):
        trained = CLIPModel.from_pretrained(run.phase_folder(number))
        test = PairDataset(stream().base.test, "image", "caption", "pair_id")
        tables[number] = encode_pairs(trained.eval(), test, PairCollator(tiny_processor()), batch_size=8)
    expected = json.loads(json.dumps(spatial_disorder(tables[0], tables[2]).to_dict()))
    found = second["since_start"]["tests"]["part 0"]
    assert found["image"]["ram"]["mean"] == pytest.approx(expected["image"]["ram"]["mean"], abs=1e-3)
    assert found["intermodal_rotation"] == pytest.approx(expected["intermodal_rotation"], abs=0.1)
    assert found["image"]["ram"]["mean"] > 0.1
    assert second["since_start"]["imav"]["pairs"] <= 5


def test_card_shows_the_angles(whole):
    run, results = whole
    card = (run.phase_folder(2) / "README.md").read_text()
    found = results["spatial_disorder"]["phases"][2]["since_start"]["tests"]["part 1"]
    row = next(line for line in card.splitlines() if line.startswith("| the start | part 1 |"))
    assert f"| {found['image']['ram']['mean']:.1f} | {found['image']['sam']['mean']:.1f} |" in row


@pytest.mark.slow
def test_interrupted_run_finds_the_same_disorder(whole, make_args):
    settings = {"max_steps": 3, "spatial_disorder": True, "imav_samples": 5, "per_device_eval_batch_size": 8}
    phases = stream()
    finish(make_args(**settings), PhaseStream(phases.phases[:1], base=phases.base))
    _, continued = finish(make_args(**settings))
    expected, found = (results["spatial_disorder"]["phases"] for results in (whole[1], continued))
    one, other = (entries[1]["since_start"] for entries in (expected, found))
    assert one["imav"]["mean"] == pytest.approx(other["imav"]["mean"], abs=1e-3)
    assert one["tests"]["part 0"]["text"]["sam"]["mean"] == pytest.approx(
        other["tests"]["part 0"]["text"]["sam"]["mean"], abs=1e-3
    )
    for since in ("since_previous", "since_start"):
        for name, test in expected[2][since]["tests"].items():
            same = found[2][since]["tests"][name]
            assert same["text"]["sam"]["mean"] == pytest.approx(test["text"]["sam"]["mean"], abs=1e-3)
        assert found[2][since]["imav"]["mean"] == pytest.approx(expected[2][since]["imav"]["mean"], abs=1e-3)


def test_stream_without_a_base_has_no_training_pairs_of_the_start(make_args):
    _, results = finish(make_args(max_steps=3, spatial_disorder=True, imav_samples=4), stream(base=False))
    second = results["spatial_disorder"]["phases"][2]
    assert "imav" in second["since_previous"] and "imav" not in second["since_start"]


def test_without_it_neither_results_nor_card_have_a_place_for_it(make_args):
    run, results = finish(make_args(max_steps=3, spatial_disorder=False))
    assert "spatial_disorder" not in results
    assert "embeddings have moved" not in (run.phase_folder(2) / "README.md").read_text()


def test_models_that_diverge_have_no_disorder_and_the_run_goes_on(caplog):
    record = RunDisorder(lambda number, what: pairs(unit(3) * (math.nan if number else 1), unit(3)))
    assert record.measure(1, ["broken"], [])["since_start"]["tests"] == {"broken": None}
    assert "not finite" in caplog.text


def test_large_tests_are_thinned_evenly(monkeypatch):
    monkeypatch.setattr("hf_modx.run.disorder.MAX_SAMPLES", 4)
    record = RunDisorder(lambda number, what: pairs(unit(10, seed=number), unit(10)))
    found = record.measure(1, ["large"], [])["since_start"]["tests"]["large"]
    rows = [0, 3, 6, 9]
    assert found["samples"] == 4
    assert found["image"]["ram"]["mean"] == pytest.approx(angles(unit(10)[rows], unit(10, seed=1)[rows]).mean().item())


def test_training_pairs_without_disorder_are_refused(make_args):
    with pytest.raises(ValueError, match="imav_samples"):
        make_args(spatial_disorder=False, imav_samples=5)


def test_bins_are_named_by_their_bounds():
    assert bin_names((5.0, 12.5)) == ["[0, 5]", "(5, 12.5]", "(12.5, 180]"]
