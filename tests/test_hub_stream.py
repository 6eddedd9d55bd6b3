"""A stream of phases as a data set on the Hub."""

from contextlib import suppress

import pytest
from datasets import load_dataset
from huggingface_hub.errors import RepositoryNotFoundError

from hf_modx import PhaseStream
from hf_modx.hub import HubError, NotAStream
from hf_modx.phases import content_fingerprint

from hub_server import Faults
from test_continual import make_stream
from tiny import tiny_pairs

pytestmark = pytest.mark.usefixtures("short_waits")


def stream_with_all_kinds_of_names():
    stream = make_stream(2)
    extra = {"größe/1": tiny_pairs(4, style="soft"), "größe 1": tiny_pairs(4, style="soft", shift=2)}
    for number, phase in enumerate(stream.all_phases()):
        phase.train.info.description, phase.train.info.license = f"drawings {number}", "mit"
    return PhaseStream(stream.phases, stream.base, extra)


def test_stream_comes_back_with_names_order_base_and_rows(hub):
    stream = stream_with_all_kinds_of_names()
    assert stream.push_to_hub("stream") == "owner/stream"
    again = PhaseStream.from_hub("owner/stream")
    assert [phase.name for phase in again] == ["part 1", "part 2"] and again.base.name == "part 0"
    assert list(again.tests()) == list(stream.tests())
    for old, new in zip(stream.all_phases(), again.all_phases(), strict=True):
        assert content_fingerprint(old.train) == content_fingerprint(new.train)
        assert content_fingerprint(old.test) == content_fingerprint(new.test)
        assert (old.train.info.description, old.train.info.license) == (
            new.train.info.description,
            new.train.info.license,
        )
    for name, test in stream.extra_tests.items():
        assert content_fingerprint(test) == content_fingerprint(again.extra_tests[name])


def test_stream_on_the_hub_is_private_and_has_a_card(hub, api):
    stream_with_all_kinds_of_names().push_to_hub("owner/stream")
    info = api.dataset_info("owner/stream")
    assert info.private
    card = hub.repository("owner/stream", "datasets").git("show", "main:README.md")
    assert "| phase 2 | part 2 | part_2_train | 9 | mit | drawings 2 |" in card
    assert 'PhaseStream.from_hub("owner/stream")' in card


def test_phase_of_a_stream_on_the_hub_can_be_streamed(hub):
    stream = make_stream(1)
    stream.push_to_hub("owner/stream")
    rows = list(load_dataset("owner/stream", split="part_1_train", streaming=True))
    assert [row["caption"] for row in rows] == stream.phases[0].train["caption"]


def test_stream_with_a_new_month_replaces_the_old_one(hub):
    make_stream(1).push_to_hub("owner/stream")
    make_stream(2).push_to_hub("owner/stream")
    assert len(PhaseStream.from_hub("owner/stream")) == 2


def test_stream_is_published_and_read_though_a_third_of_the_requests_fails(hub):
    hub.faults = Faults(seed=2, rate=1 / 3, stall=0.05, where="whoami|/create|/commit/|/refs|info|resolve|revision")
    for _ in range(10):
        with suppress(HubError):
            make_stream(1).push_to_hub("owner/stream")
            again = PhaseStream.from_hub("owner/stream")
            break
    assert sum(entry.fault is not None for entry in hub.log) > 5
    assert content_fingerprint(again.phases[0].train) == content_fingerprint(make_stream(1).phases[0].train)


def test_data_set_that_is_no_stream_is_refused(hub, pairs):
    pairs.push_to_hub("owner/pairs")
    with pytest.raises(NotAStream, match="owner/pairs has no stream.json"):
        PhaseStream.from_hub("owner/pairs")


def test_data_set_that_is_not_there_is_named(hub):
    with pytest.raises(RepositoryNotFoundError, match="owner/none"):
        PhaseStream.from_hub("owner/none")


def test_parts_with_different_columns_are_no_data_set(hub):
    stream = make_stream(2)
    short = PhaseStream(stream.phases, stream.base, {"extra": tiny_pairs(4, style="soft").remove_columns("pair_id")})
    with pytest.raises(ValueError, match="extra_test has"):
        short.push_to_hub("owner/stream")
