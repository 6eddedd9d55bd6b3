"""A reader sees the old or the new content, never a part."""

import pytest

from hf_modx.files import has_whole_seal, publish_folder, read_json, seal, write_json


def test_json_comes_back_as_it_was_written(tmp_path):
    content = {"matrix": [[0.5, None], [1e-9, 1]], "name": "größer", "empty": {}}
    write_json(tmp_path / "results.json", content)
    assert read_json(tmp_path / "results.json") == content


def test_json_is_readable_text(tmp_path):
    write_json(tmp_path / "results.json", {"name": "größer"})
    assert (tmp_path / "results.json").read_text(encoding="utf-8") == '{\n  "name": "größer"\n}\n'


def test_json_replaces_what_was_there(tmp_path):
    write_json(tmp_path / "results.json", {"old": list(range(1000))})
    write_json(tmp_path / "results.json", {"new": 1})
    assert read_json(tmp_path / "results.json") == {"new": 1}


def test_nothing_but_the_file_is_left(tmp_path):
    write_json(tmp_path / "results.json", {"new": 1})
    assert [path.name for path in tmp_path.iterdir()] == ["results.json"]


def test_an_error_while_serialising_leaves_the_old_file(tmp_path):
    path = tmp_path / "results.json"
    write_json(path, {"old": 1})
    with pytest.raises(TypeError):
        write_json(path, {"rows": list(range(10_000)), "not json": object()})
    assert read_json(path) == {"old": 1}


def test_writing_works_after_an_error(tmp_path):
    path = tmp_path / "results.json"
    with pytest.raises(TypeError):
        write_json(path, {"not json": object()})
    assert read_json(path) is None
    write_json(path, {"new": 1})
    assert read_json(path) == {"new": 1}
    assert [found.name for found in tmp_path.iterdir()] == ["results.json"]


def test_a_file_that_is_not_there_reads_as_none(tmp_path):
    assert read_json(tmp_path / "results.json") is None


def test_a_broken_file_is_an_error_and_not_none(tmp_path):
    (tmp_path / "results.json").write_text('{"matrix": [')
    with pytest.raises(ValueError, match="results.json is no JSON"):
        read_json(tmp_path / "results.json")


def complete_folder(path):
    (path / "inner").mkdir(parents=True)
    (path / "config.json").write_text("{}")
    (path / "inner" / "weights").write_bytes(b"123")
    return path


def test_a_published_folder_has_everything_under_its_final_name(tmp_path):
    temporary = complete_folder(tmp_path / ".phase-1.tmp")
    publish_folder(temporary, tmp_path / "phase-1")
    assert not temporary.exists()
    assert (tmp_path / "phase-1" / "config.json").read_text() == "{}"
    assert (tmp_path / "phase-1" / "inner" / "weights").read_bytes() == b"123"


def test_a_folder_that_is_complete_is_not_overwritten(tmp_path):
    final = complete_folder(tmp_path / "phase-1")
    temporary = complete_folder(tmp_path / ".phase-1.tmp")
    (temporary / "config.json").write_text("other")
    with pytest.raises(OSError):
        publish_folder(temporary, final)
    assert (final / "config.json").read_text() == "{}"


def test_a_sealed_folder_is_whole_until_a_file_is_cut_or_gone(tmp_path):
    folder = complete_folder(tmp_path / "checkpoint")
    assert not has_whole_seal(folder)
    seal(folder)
    assert has_whole_seal(folder)
    (folder / "inner" / "weights").write_bytes(b"12")
    assert not has_whole_seal(folder)
    (folder / "inner" / "weights").unlink()
    assert not has_whole_seal(folder)
    assert has_whole_seal(folder, may_lack=["inner/weights"])


def test_a_seal_is_renewed_with_the_folder(tmp_path):
    folder = complete_folder(tmp_path / "checkpoint")
    seal(folder)
    (folder / "config.json").write_text("longer")
    (folder / "more").write_text("")
    seal(folder)
    assert has_whole_seal(folder)
